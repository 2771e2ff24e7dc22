"""Is preparing a cohort limited by gzip, or by us?

    python tests/benchmarks/cropping.py [COHORT] [--patients=16]

Times, a patient: inflating both files (`gzip.decompress` alone, nothing else done to the bytes); all that cropping is,
in one process and in one a core, their start apart; storing (the TFDS builder, one process); and reading an ROI back
for a batch. Without COHORT, phantoms at 1 mm are made first. Prints a Markdown table.
"""

import argparse
import gzip
import itertools
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_collections
import numpy as np

from vqroi_jax.data.brats_roi.crops import crop_path, crop_scan, crop_scans
from vqroi_jax.data.cohort import find_cohort

REPEATS = 5
TIMES = 4  # the scans are cropped this often in processes, to tell their start from their work


def settings(path: Path, workers: int) -> ml_collections.ConfigDict:
    """The data settings of configs/prepare.py that matter here."""
    return ml_collections.ConfigDict(
        {
            'path': str(path),
            'layout': 'auto',
            'modality': 'flair',
            'grades_csv': '',
            'classes': (),
            'mask_labels': (),
            'known_labels': (),
            'roi_size': (128, 128, 128),
            'oversize': 'crop',
            'workers': workers,
        }
    )


def seconds(**works: Callable[[], object]) -> dict[str, float]:
    """The median of `REPEATS` runs of each; they take turns, so that a busy machine is as busy for all of them."""
    times = {name: [] for name in works}
    for _ in range(REPEATS):
        for name, work in works.items():
            start = time.perf_counter()
            work()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in times.items()}


def inflate(path: Path) -> None:
    """What no reader of a .nii.gz can do without; the CRC is part of it."""
    content = path.read_bytes()
    if path.suffix == '.gz':
        gzip.decompress(content)


def measure(path: Path, patients: int, scratch: Path) -> None:
    """Prints the table for a cohort's first `patients` scans, or for all of them in turn if they are fewer."""
    # Imported here, not above: the processes that crop import this file, and should start as fast as those of `main`.
    import tensorflow_datasets as tfds

    from vqroi_jax.data.brats_roi.brats_roi_dataset_builder import Builder
    from vqroi_jax.data.pipeline import RoiSource

    cores = len(os.sched_getaffinity(0))
    data = settings(path, 1)
    cohort = find_cohort(data)
    usable, problems = crop_scans(cohort.scans[:patients], data, scratch)  # and warms the page cache
    assert not problems, problems[0]
    scans = list(itertools.islice(itertools.cycle(cohort.scans), patients))  # a small cohort over and over
    n, many = patients, TIMES * patients
    times = seconds(
        inflate=lambda: [inflate(file) for scan in scans for file in (scan.image, scan.mask)],
        one=lambda: [crop_scan(scan, data, crop_path(scratch, n)) for n, scan in enumerate(scans)],
        few=lambda: crop_scans(scans, settings(path, cores), scratch),
        many=lambda: crop_scans(scans * TIMES, settings(path, cores), scratch),
    )
    pool = (times['many'] - times['few']) / (many - n)

    records = [(f'{n}', f'{n}', scans[n % len(scans)].label, crop_path(scratch, n)) for n in range(many)]
    dtype = np.result_type(*(crop['dtype'] for crop in usable.values())).name
    start = time.perf_counter()
    folder = Builder(
        roi_size=data.roi_size, dtype=dtype, classes=cohort.classes, splits={'train': records}, data_dir=scratch
    ).build()
    stored = (time.perf_counter() - start) / many
    size = sum(file.stat().st_size for file in folder.iterdir()) / many
    ids = [record[0] for record in records]
    source = RoiSource('train', ids, [0] * many, tfds.builder_from_directory(folder).as_data_source('train'))
    read = seconds(read=lambda: [source.volume(position) for position in range(many)])['read'] / many

    inflating, one = times['inflate'] / n, times['one'] / n
    print(
        f'\n{path}: {len(usable)} patients, {platform.machine()}, {cores} cores, Python {platform.python_version()}\n'
    )
    print('| step | s a patient | of it gzip |\n| --- | --- | --- |')
    print(f'| inflating the files, nothing else | {inflating:.3f} | 100% |')
    print(f'| cropping, in one process | {one:.3f} | {inflating / one:.0%} |')
    print(f'| cropping, in {cores} processes | {pool:.3f} | {inflating / cores / pool:.0%} |')
    print(f'| storing, {size / 2**20:.2f} MiB each | {stored:.3f} | |')
    print(f'| reading one for a batch | {read:.4f} | |')
    print(f'\nStarting {cores} processes: {times["few"] - n * pool:.1f} s.')


def main() -> None:
    """Reads the arguments, makes phantoms if there is no cohort, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('cohort', nargs='?', type=Path)
    parser.add_argument('--patients', type=int, default=16)
    arguments = parser.parse_args()
    from vqroi_jax.data.phantom import write_phantom_cohort  # see `measure`

    with tempfile.TemporaryDirectory() as scratch:
        cohort = arguments.cohort
        if cohort is None:
            cohort = Path(scratch) / 'phantoms'
            phantom = {'patients': -(-arguments.patients // 2), 'seed': 0, 'spacing': 1.0}
            write_phantom_cohort(cohort, ml_collections.ConfigDict(phantom), 0)
        measure(cohort, arguments.patients, Path(scratch) / 'crops')


if __name__ == '__main__':
    main()
