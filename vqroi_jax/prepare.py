"""The command `prepare`, and the first thing that every training command does: a cohort becomes stored ROIs.

    cohort folder -> scans (data.cohort) -> crops (data.brats_roi.crops) -> splits (data.splits)
                  -> records (data.brats_roi) -> batches (data.pipeline)

Leaves in the folder: `splits.json`, `cohort.json`, `figures/cohort.png` and the TFDS dataset `brats_roi/`. All is made
in a scratch folder and moved into place, `cohort.json` last, so that a preparation that was interrupted starts anew.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from vqroi_jax import viz
from vqroi_jax.data import phantom
from vqroi_jax.data.brats_roi.brats_roi_dataset_builder import Builder
from vqroi_jax.data.brats_roi.crops import crop_path, crop_scans, load_crop
from vqroi_jax.data.cohort import Cohort, Problem, find_cohort
from vqroi_jax.data.pipeline import (
    COHORT_FILE,
    DATASET_FOLDER,
    FORMAT,
    OtherFormatError,
    PreparedCohort,
    is_prepared,
    open_cohort,
)
from vqroi_jax.data.roi import check_roi_size, scale
from vqroi_jax.data.splits import SPLITS, count_patients, split_patients, write_splits
from vqroi_jax.errors import InputError
from vqroi_jax.stopping import sigterm_interrupts
from vqroi_jax.workdir import open_workdir, require_space, write_atomically

_SCRATCH = '.preparing'
_PHANTOM_VOXELS = 240 * 240 * 155  # at 1 mm
_SHOWN = 8  # ROIs of each class in the figure
_DISK_RESERVE = 2**26  # bytes, for what is small
_CLIPPED = 0.01  # of a tumour below the background, above which its image is not taken to be meant so
_NAMED = 8  # scans in a warning
_COUNTS = {  # of `Roi.counts`, those that say something is odd
    'negative_voxels': 'below the background, clipped to it',
    'nan_voxels': 'not a number, set to the background',
    'zero_voxels': "of the background's own intensity",
    'cropped_voxels': 'of tumour outside the box, cropped',
}


def run(config: ConfigDict, workdir: Path) -> None:
    """Runs `--config=configs/prepare.py`."""
    with open_workdir(workdir, config):
        prepare(config.data, workdir)


@sigterm_interrupts()
def prepare(data: ConfigDict, folder: Path) -> PreparedCohort:
    """Makes sure that `folder` holds the ROIs that `data` describes, and opens them.

    What is there is used again if the settings and the source files (path, size, time of change) are the same. Without
    `data.path` a phantom cohort is written to `folder/phantom` first. A `data.path` that is itself a prepared folder is
    opened where it is. Only one process may do this at a time; of several hosts the others call `open_cohort` after.

    Args:
        data: The `data` block of a config (see configs/prepare.py).
        folder: Where to; made if missing.

    Raises:
        InputError: A setting or the cohort cannot be used, or the disk has no room. With `data.on_error='stop'` also
            any faulty patient, once all have been looked at; every one is printed.
        KeyboardInterrupt: Ctrl-C or SIGTERM came; what was half done is cleared away.
    """
    _check_settings(data)
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    if data.path and is_prepared(Path(data.path).expanduser()):
        return _open_as_asked(data)
    settings = _settings(data)
    if not data.path:
        data = _phantom_data(data, folder)
    synthetic = (Path(data.path).expanduser() / phantom.SETTINGS_FILE).exists()
    cohort = find_cohort(data)
    key = _key(settings, cohort)
    prepared = _open_if_prepared(folder)
    if prepared:
        if prepared.report['key'] == key and (data.on_error == 'skip' or not prepared.report['problems']):
            print(f'Using the ROIs of {_counted(len(prepared.scans), "scan")} prepared in {folder}.')
            return prepared
        what = 'files' if prepared.report['settings'] == settings else 'settings'
        print(f'The {what} of the cohort are not those that {folder} was prepared with; preparing it again.')
    report = {'format': FORMAT, 'key': key, 'settings': settings, 'synthetic': synthetic}
    # Measured at 128³: 0.4 MiB a ROI in the scratch folder and 0.1 MiB stored, so half a byte a voxel is ample.
    needed = len(cohort.scans) * int(np.prod(data.roi_size)) // 2
    require_space(folder, _DISK_RESERVE + needed, 'the prepared cohort')
    scratch = folder / _SCRATCH
    shutil.rmtree(scratch, ignore_errors=True)
    try:
        _prepare_in(scratch, folder, cohort, data, report)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    prepared = open_cohort(folder)
    print(cohort_table(prepared.report))
    return prepared


def _open_if_prepared(folder: Path) -> PreparedCohort | None:
    """Opens what is there, if this version can read it."""
    if not is_prepared(folder):
        return None
    try:
        return open_cohort(folder)
    except OtherFormatError:
        print(f'Another version of vqroi_jax has prepared {folder}; preparing it again.')
        return None


def _prepare_in(scratch: Path, folder: Path, cohort: Cohort, data: ConfigDict, report: dict) -> None:
    """Crops, splits and stores in `scratch`, then moves the result to `folder`."""
    told = 'left out' if data.on_error == 'skip' else 'cannot be used'
    for problem in cohort.problems:
        print(f'{told}: {problem}')
    crops, faults = crop_scans(cohort.scans, data, scratch / 'crops')
    for problem in faults:
        print(f'{told}: {problem}')
    problems = [*cohort.problems, *faults]
    _stop_on(problems, len(crops), data.on_error)

    usable = {
        scan.id: (scan, crop_path(scratch / 'crops', n)) for n, scan in enumerate(cohort.scans) if scan.id in crops
    }
    splits, warnings = split_patients([scan for scan, _ in usable.values()], cohort.classes, data.split)
    warnings += _clipped(crops)
    records = {
        name: [(scan.id, scan.patient, scan.label, path) for scan, path in map(usable.__getitem__, ids)]
        for name, ids in splits.items()
        if ids
    }
    dtype = np.result_type(*(crop['dtype'] for crop in crops.values())).name
    Builder(roi_size=data.roi_size, dtype=dtype, classes=cohort.classes, splits=records, data_dir=scratch).build()

    report |= {
        'version': str(Builder.VERSION),
        'path': cohort.path,
        'layout': cohort.layout,
        'classes': list(cohort.classes),
        'roi_size': list(data.roi_size),
        'scans': [{**crops[scan], 'split': name} for name in SPLITS for scan in splits[name]],
        'problems': [vars(problem) for problem in problems],
        'warnings': warnings,
    }
    figure = _figure(cohort.classes, records, crops)
    (folder / COHORT_FILE).unlink(missing_ok=True)
    shutil.rmtree(folder / DATASET_FOLDER, ignore_errors=True)
    (scratch / DATASET_FOLDER).rename(folder / DATASET_FOLDER)
    write_splits(folder / 'splits.json', splits)
    (folder / 'figures').mkdir(exist_ok=True)
    figure.savefig(folder / 'figures' / 'cohort.png')
    write_atomically(folder / COHORT_FILE, json.dumps(report, indent=1) + '\n')


def _clipped(crops: Mapping[str, dict]) -> list[str]:
    """A warning of the scans that lose a good part of their tumours below the background; none if there are none."""
    counts = {name: crop['counts'] for name, crop in crops.items()}
    shares = {name: count['negative_voxels'] / count['tumour_voxels'] for name, count in counts.items()}
    lost = sorted((name for name, share in shares.items() if share > _CLIPPED), key=lambda name: -shares[name])
    if not lost:
        return []
    named = ', '.join(f'{name} ({shares[name]:.0%})' for name in lost[:_NAMED])
    more = f' and {len(lost) - _NAMED} more' if len(lost) > _NAMED else ''
    return [
        f'dark voxels of tumours lie below the background and are lost in it, in {_counted(len(lost), "scan")} (share '
        f'of the tumour): {named}{more}. Images that were z-scored around a background left at 0 are like that; give '
        'ones whose background is the darkest'
    ]


def cohort_table(report: Mapping) -> str:
    """What a person wants to know of a prepared cohort, as lines of text.

    Args:
        report: The content of `cohort.json`.

    Returns:
        Patients of each class and split, tumour volumes, shapes and spacings, and what was counted.
    """
    scans = report['scans']
    patients = len({scan['patient'] for scan in scans})
    kind = f'layout {report["layout"]}' + (', with SYNTHETIC phantoms' if report['synthetic'] else '')
    lines = [
        f'{report["path"]} ({kind}): {_counted(patients, "patient")}, {_counted(len(scans), "scan")}',
        '',
        *_class_lines(report),
        '',
    ]
    for title, field, form in (('voxels', 'shape', 'd'), ('spacing, mm', 'spacing', 'g')):
        found = Counter(' x '.join(f'{side:{form}}' for side in scan[field]) for scan in scans)
        shown = [f'{value} ({_counted(count, "scan")})' for value, count in found.most_common(4)]
        rest = [_counted(len(found) - 4, 'other')] if len(found) > 4 else []
        lines.append(f'{title} (depth, height, width): {", ".join(shown + rest)}')
    lines.append(f'ROI: {" x ".join(map(str, report["roi_size"]))} voxels (depth, height, width)')
    for name, meaning in _COUNTS.items():
        of_scans = [scan['counts'][name] for scan in scans if scan['counts'][name]]
        if of_scans:
            lines.append(f'{meaning}: {_counted(sum(of_scans), "voxel")} in {_counted(len(of_scans), "scan")}')
    if shifted := [scan['background'] for scan in scans if scan['background']]:
        span = f'{min(shifted):.4g} to {max(shifted):.4g}'
        lines.append(f'background not 0 ({span}), so shifted to 0: {_counted(len(shifted), "scan")}')
    lines += [f'warning: {warning}' for warning in report['warnings']]
    return '\n'.join(lines)


def _counted(number: int, noun: str) -> str:
    return f'{number} {noun}' if number == 1 else f'{number} {noun}s'


def _class_lines(report: Mapping) -> list[str]:
    """The table of patients and tumour volumes; a class's patients are counted once each."""
    lines = [
        f'{"class":16}' + ''.join(f'{name:>7}' for name in (*SPLITS, 'all')) + '   tumour, mL: min  median     max'
    ]
    rows = [(name, {name}) for name in report['classes']]
    if len(rows) > 1:
        rows.append(('all', set(report['classes'])))
    for title, classes in rows:
        scans = [scan for scan in report['scans'] if scan['label'] in classes]
        of_split = count_patients(scans).values()
        counts = [*of_split, sum(of_split)]  # a patient is in one split
        volumes = [scan['tumour_ml'] for scan in scans]
        line = f'{title:16}' + ''.join(f'{count:7d}' for count in counts)
        if volumes:
            line += f'{min(volumes):18.1f}{np.median(volumes):8.1f}{max(volumes):8.1f}'
        lines.append(line)
    return lines


def _check_settings(data: ConfigDict) -> None:
    """Refuses what no cohort could make right."""
    check_roi_size(data.roi_size)
    if 0 in data.mask_labels:
        raise InputError(f'data.mask_labels={tuple(data.mask_labels)}: 0 is the background; expected labels of tumour')
    for field, known in (('on_error', ('stop', 'skip')), ('oversize', ('refuse', 'crop'))):
        if data[field] not in known:
            raise InputError(f'data.{field}={data[field]!r} is not known; choose one of {", ".join(known)}')
    if data.workers < 0:
        raise InputError(f'data.workers={data.workers}: expected a number of processes, or 0 for one a core')


def _open_as_asked(data: ConfigDict) -> PreparedCohort:
    """Opens the prepared folder `data.path`, if its ROIs have the asked size and classes."""
    prepared = open_cohort(Path(data.path).expanduser())
    for field, found in (('roi_size', prepared.roi_size), ('classes', prepared.classes)):
        asked = tuple(data[field])
        if asked and asked != found:
            raise InputError(
                f'{data.path} was prepared with {field}={found}, but data.{field}={asked} is asked for; '
                'ask for the same, or give the cohort itself to prepare it again'
            )
    there = prepared.report['settings']
    differ = [
        f'{name}={there[name]}'
        for name, value in _settings(data).items()
        if name not in ('path', 'classes', 'phantom') and there[name] != value
    ]
    print(
        f'Using the ROIs of {_counted(len(prepared.scans), "scan")} prepared in {data.path}'
        + (' (with SYNTHETIC phantoms)' if prepared.report['synthetic'] else '')
        + (f', as they are there: {", ".join(differ)}.' if differ else '.')
    )
    return prepared


def _phantom_data(data: ConfigDict, folder: Path) -> ConfigDict:
    """Writes the phantom cohort and returns settings that point to it."""
    path = folder / 'phantom'
    print(f'No --config.data.path: using SYNTHETIC phantoms, not patients, in {path}.')
    phantom.check_settings(data.phantom)
    if not path.exists():
        voxels = 2 * data.phantom.patients * _PHANTOM_VOXELS / data.phantom.spacing**3
        require_space(folder, _DISK_RESERVE + int(voxels), 'the phantom cohort')  # less than a byte a voxel, by gzip
    phantom.write_phantom_cohort(path, data.phantom, data.workers)
    data = data.copy_and_resolve_references()
    data.path = str(path)
    return data


def _settings(data: ConfigDict) -> dict:
    """The settings that the ROIs depend on, as JSON has them."""
    settings = data.to_dict()
    del settings['workers'], settings['on_error']
    if data.path:
        del settings['phantom']
    return json.loads(json.dumps(settings))


def _key(settings: Mapping, cohort: Cohort) -> str:
    """A hash of all that the prepared cohort depends on: settings, scans, and their files' sizes and times."""

    def stamp(path: Path) -> Sequence:
        try:
            status = path.stat()
        except OSError:
            return (str(path), 'missing')
        return (str(path), status.st_size, status.st_mtime_ns)

    scans = [(scan.id, scan.patient, scan.label, stamp(scan.image), stamp(scan.mask)) for scan in cohort.scans]
    problems = [vars(problem) for problem in cohort.problems]
    content = json.dumps([FORMAT, str(Builder.VERSION), settings, cohort.classes, scans, problems])
    return hashlib.sha256(content.encode()).hexdigest()


def _stop_on(problems: Sequence[Problem], usable: int, on_error: str) -> None:
    """Raises InputError if there are faults and the user wants to stop on them, or nothing is left without them."""
    if problems and (on_error == 'stop' or not usable):
        more = f' (and {len(problems) - 1} more, listed above)' if len(problems) > 1 else ''
        remedy = (
            '; mend or remove it, or leave faulty patients out with --config.data.on_error=skip'
            if usable
            else '; no scan is left'
        )
        total = len(problems) + usable
        raise InputError(f'{len(problems)} of {total} scans cannot be used: {problems[0]}{more}{remedy}')


def _figure(
    classes: Sequence[str], records: Mapping[str, Sequence[tuple[str, str, str, Path]]], crops: Mapping
) -> Figure:
    """Some ROIs of each class, training patients first, and the tumour volumes of all."""
    shown = []
    for name in classes:
        shown += [record for split in records.values() for record in split if record[2] == name][:_SHOWN]
    scans = [crops[scan] for scan, *_ in shown]
    rois = [load_crop(path) for *_, path in shown]
    spacings = {tuple(scan['spacing']) for scan in scans}
    return viz.cohort(
        np.stack([scale(roi['volume'], roi['range']) for roi in rois]),
        [scan['label'] for scan in scans],
        [f'{scan["id"]}, {scan["tumour_ml"]:.1f} mL' for scan in scans],
        {name: [scan['tumour_ml'] for scan in crops.values() if scan['label'] == name] for name in classes},
        spacing=spacings.pop() if len(spacings) == 1 else None,
    )
