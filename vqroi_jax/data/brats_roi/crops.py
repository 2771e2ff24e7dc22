"""Cuts the ROI of every scan out of its volume, in parallel processes.

Stands between `cohort` (which scans there are) and the TFDS builder (which stores the ROIs by split): splits are made
of the patients that turned out to be usable, so ROIs first go to a scratch folder, one small file a scan. Each volume
is opened once, and what passes between processes is a few numbers.
"""

import hashlib
from collections.abc import Iterator, Sequence
from concurrent.futures import as_completed
from pathlib import Path

import numpy as np
from ml_collections import ConfigDict

from vqroi_jax import progress
from vqroi_jax.data import workers
from vqroi_jax.data.cohort import Problem, Scan
from vqroi_jax.data.roi import PatientError, Roi, read_roi


def save_crop(path: Path, roi: Roi) -> None:
    """Writes an ROI to an .npz file: the mask as bits, and the values of the tumour's voxels alone."""
    np.savez(
        path,
        size=roi.mask.shape,
        mask=np.packbits(roi.mask),
        values=roi.raw[roi.mask],
        offset=roi.offset,
        shape=roi.shape,
        affine=roi.affine,
        range=roi.range,
        background=roi.background,
    )


def load_crop(path: Path) -> dict[str, np.ndarray]:
    """Reads back what `save_crop` wrote, as the array features of the TFDS builder.

    Returns:
        volume [D,H,W] (raw intensities, 0 outside the mask; dtype as in `Roi.raw`), mask bool [D,H,W], offset and
        shape int32 [3], affine float64 [4,4], range float64 [2], background float64 [].
    """
    with np.load(path) as crop:
        size = tuple(crop['size'])
        mask = np.unpackbits(crop['mask'], count=int(np.prod(size))).view(bool).reshape(size)
        volume = np.zeros(size, crop['values'].dtype)
        volume[mask] = crop['values']
        return {
            'volume': volume,
            'mask': mask,
            'offset': crop['offset'].astype(np.int32),
            'shape': crop['shape'].astype(np.int32),
            'affine': crop['affine'],
            'range': crop['range'].astype(np.float64),
            'background': crop['background'].astype(np.float64),
        }


def describe(scan: Scan, roi: Roi) -> dict:
    """What `cohort.json` says of a scan: numbers and strings; mL, mm, and depth, height, width."""
    axes = np.asarray(roi.affine)[:3, :3]
    digest = hashlib.sha256(np.packbits(roi.mask).tobytes())
    digest.update(roi.raw[roi.mask].tobytes())
    return {
        'id': scan.id,
        'patient': scan.patient,
        'label': scan.label,
        'image': str(scan.image),
        'mask': str(scan.mask),
        'shape': [int(side) for side in roi.shape],
        'spacing': [round(step, 4) for step in roi.spacing],
        'affine': np.asarray(roi.affine, float).tolist(),
        'offset': [int(start) for start in roi.offset],
        'dtype': roi.raw.dtype.name,
        'range': [float(bound) for bound in roi.range],
        'background': float(roi.background),
        'counts': {name: int(count) for name, count in roi.counts.items()},
        'tumour_ml': float(roi.counts['tumour_voxels'] * abs(np.linalg.det(axes)) / 1000),
        'sha256': digest.hexdigest(),
    }


def crop_scan(scan: Scan, data: ConfigDict, path: Path) -> dict | Problem:
    """Crops one scan to `path`; returns what `describe` says of it, or why it cannot be used."""
    try:
        roi = read_roi(scan, data)
    except PatientError as error:
        return error.problem
    save_crop(path, roi)
    return describe(scan, roi)


def crop_scans(scans: Sequence[Scan], data: ConfigDict, folder: Path) -> tuple[dict[str, dict], list[Problem]]:
    """Crops scans in `data.workers` processes (0: one a core), each to `crop_path(folder, position)`.

    Returns:
        What `describe` says of each usable scan, by id in the order of `scans`; and the faults of the others, in the
        same order. Two scans with the very same tumour voxels are a fault of the second.

    Raises:
        InputError: A process was killed, most likely for want of memory.
    """
    folder.mkdir(parents=True, exist_ok=True)
    results: list = [None] * len(scans)
    with progress.bar('cropping', 'patient', total=len(scans)) as bar:
        for position, result in _in_processes(scans, data, folder):
            results[position] = result
            bar.update()
    return _refuse_twins(scans, results)


def crop_path(folder: Path, position: int) -> Path:
    """The scratch file of the scan at `position` in the list given to `crop_scans`."""
    return folder / f'{position:06d}.npz'


def _in_processes(scans: Sequence[Scan], data: ConfigDict, folder: Path) -> Iterator[tuple[int, dict | Problem]]:
    """Yields (position, result) as they come; on one worker in this process."""
    number = workers.count(data.workers, len(scans))
    if number <= 1:
        for position, scan in enumerate(scans):
            yield position, crop_scan(scan, data, crop_path(folder, position))
        return
    with workers.pool(number, 'crops') as pool:
        futures = {
            pool.submit(crop_scan, scan, data, crop_path(folder, position)): position
            for position, scan in enumerate(scans)
        }
        for future in as_completed(futures):
            yield futures[future], future.result()


def _refuse_twins(scans: Sequence[Scan], results: list[dict | Problem]) -> tuple[dict[str, dict], list[Problem]]:
    """Parts results into usable and faulty; a tumour seen before, to the last voxel, is a fault."""
    usable: dict[str, dict] = {}
    seen: dict[str, str] = {}  # scans by their tumours
    problems = []
    for scan, result in zip(scans, results, strict=True):
        if isinstance(result, Problem):
            problems.append(result)
        elif result['sha256'] in seen:
            twin = seen[result['sha256']]
            message = f'has the same tumour, voxel for voxel, as {twin}, so it is that patient under another name'
            problems.append(Problem(scan.id, str(scan.image), message))
        else:
            seen[result['sha256']] = scan.id
            usable[scan.id] = result
    return usable, problems
