"""Is preparing a cohort limited by gzip, or by us?

    python tests/benchmarks/cropping.py [COHORT] [--patients=16]

Times, a patient: inflating both files (`gzip.decompress` alone, nothing else done to the bytes); all that cropping is,
in one process and in one a core, their start included; storing (the TFDS builder, one process); and reading an ROI back
for a batch. Without COHORT, phantoms at 1 mm are made first. Prints a Markdown table.
"""

import argparse
import gzip
import os
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import ml_collections
import numpy as np
import tensorflow_datasets as tfds

from vqroi_jax.data.brats_roi.brats_roi_dataset_builder import Builder
from vqroi_jax.data.brats_roi.crops import crop_path, crop_scan, crop_scans
from vqroi_jax.data.cohort import find_cohort
from vqroi_jax.data.phantom import write_phantom_cohort
from vqroi_jax.data.pipeline import RoiSource

REPEATS = 3


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


def seconds(work: Callable[[], object]) -> float:
    """The median of `REPEATS` runs."""
    times = []
    for _ in range(REPEATS):
        start = time.perf_counter()
        work()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def inflate(path: Path) -> None:
    """What no reader of a .nii.gz can do without; the CRC is part of it."""
    content = path.read_bytes()
    if path.suffix == '.gz':
        gzip.decompress(content)


def measure(path: Path, patients: int, scratch: Path) -> None:
    """Prints the table for a cohort's first `patients` scans."""
    cores = len(os.sched_getaffinity(0))
    data = settings(path, 1)
    cohort = find_cohort(data)
    scans = cohort.scans[:patients]
    usable, problems = crop_scans(scans, data, scratch)  # and warms the page cache
    assert usable, problems[0]

    gzip_time = seconds(lambda: [inflate(file) for scan in scans for file in (scan.image, scan.mask)])
    one = seconds(lambda: [crop_scan(scan, data, crop_path(scratch, n)) for n, scan in enumerate(scans)])
    pool = seconds(lambda: crop_scans(scans, settings(path, cores), scratch))
    records = [
        (scan.id, scan.patient, scan.label, crop_path(scratch, n)) for n, scan in enumerate(scans) if scan.id in usable
    ]
    dtype = np.result_type(*(crop['dtype'] for crop in usable.values())).name
    start = time.perf_counter()
    folder = Builder(
        roi_size=data.roi_size, dtype=dtype, classes=cohort.classes, splits={'train': records}, data_dir=scratch
    ).build()
    stored = time.perf_counter() - start
    stored_bytes = sum(file.stat().st_size for file in folder.iterdir())
    labels = [0] * len(records)
    source = RoiSource(
        'train', [r[0] for r in records], labels, tfds.builder_from_directory(folder).as_data_source('train')
    )
    read = seconds(lambda: [source.volume(position) for position in range(len(source))])

    n = len(scans)
    print(f'\n{path}: {n} patients, {platform.machine()}, {cores} cores, Python {platform.python_version()}\n')
    print('| step | s a patient | gzip share |\n| --- | --- | --- |')
    print(f'| inflating its files, nothing else | {gzip_time / n:.3f} | 100 % |')
    print(f'| cropping, in one process | {one / n:.3f} | {gzip_time / one:.0%} |')
    print(f'| cropping, in {cores} processes | {pool / n:.3f} | {gzip_time / cores / pool:.0%} |')
    print(f'| storing, {stored_bytes / n / 2**20:.2f} MiB each | {stored / n:.3f} | |')
    print(f'| reading one for a batch | {read / n:.4f} | |')


def main() -> None:
    """Reads the arguments, makes phantoms if there is no cohort, measures."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('cohort', nargs='?', type=Path)
    parser.add_argument('--patients', type=int, default=16)
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        cohort = arguments.cohort
        if cohort is None:
            cohort = Path(scratch) / 'phantoms'
            phantom = {'patients': -(-arguments.patients // 2), 'seed': 0, 'spacing': 1.0}
            write_phantom_cohort(cohort, ml_collections.ConfigDict(phantom), 0)
        measure(cohort, arguments.patients, Path(scratch) / 'crops')


if __name__ == '__main__':
    main()
