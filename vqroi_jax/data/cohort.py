"""Finds the patients of a cohort: which image, which mask, which class.

The first step of the data's way (cohort folder -> ROI records -> batches). It looks at names and small CSV
files only and opens no volume; `vqroi_jax.data.roi` reads and checks those. Accepted are the BraTS folder
layouts of 2018 to 2023 and, for everything else, a CSV manifest.
"""

import csv
import dataclasses
import itertools
import os
import re
from collections import defaultdict
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path

import ml_collections

from vqroi_jax.errors import InputError

LAYOUTS = {  # name -> what its patients look like, for messages; FLAIR stands for every modality
    'brats2019': 'CLASS/ID/ID_flair.nii.gz and ID_seg.nii.gz (BraTS 2018 and 2019)',
    'brats2020': 'ID/ID_flair.nii.gz and ID_seg.nii.gz, the grade in name_mapping.csv (BraTS 2020)',
    'brats2021': 'ID/ID_flair.nii.gz and ID_seg.nii.gz, the class in data.grades_csv (BraTS 2021)',
    'brats2023': 'ID/ID-t2f.nii.gz and ID-seg.nii.gz, the class in data.grades_csv (BraTS 2023)',
    'manifest': 'a CSV file with the columns id,image,mask,label',
}
MANIFEST_COLUMNS = ('id', 'image', 'mask', 'label')
GRADES_COLUMNS = ('id', 'label')
FIRST_CLASSES = ('LGG', 'HGG')  # numbers 0 and 1, as the method's authors count them
MAX_DEPTH = 5  # folders below data.path: a doubled top folder, a class and a patient are four

_MODALITIES = {  # separator in file names -> modality -> its name there
    '_': {'flair': 'flair', 't1': 't1', 't1ce': 't1ce', 't2': 't2'},
    '-': {'flair': 't2f', 't1': 't1n', 't1ce': 't1c', 't2': 't2w'},
}
# 'Segm' is how patient 355 of BraTS 2020 has it: W39_1998.09.19_Segm.nii
_MASK = {'_': r'_segm?\.nii(\.gz)?$', '-': r'-seg\.nii(\.gz)?$'}
_NIFTI = re.compile(r'\.nii(\.gz)?$', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class Scan:
    """One image and mask of one patient.

    Attributes:
        id: the scan's unique name: its folder's, or the manifest's `id`.
        patient: the unit of splits: a BraTS 2023 id without its time point, a manifest's `patient`, or `id`.
        label: the name of the class.
        image: the NIfTI file with the intensities.
        mask: the NIfTI file with the tumour's labels.
    """

    id: str
    patient: str
    label: str
    image: Path
    mask: Path


@dataclasses.dataclass(frozen=True)
class Problem:
    """What keeps one scan out: `str(problem)` is the line to print."""

    id: str
    file: str
    message: str

    def __str__(self) -> str:
        return f'patient {self.id}, {self.file}: {self.message}'


@dataclasses.dataclass(frozen=True)
class Cohort:
    """The usable scans of a cohort, sorted by id, and what was wrong with the others.

    Attributes:
        path: where it was found, as the user gave it.
        layout: one of `LAYOUTS`.
        classes: class names in the order of their numbers.
        scans: what can be read.
        problems: faults seen without opening a volume.
    """

    path: str
    layout: str
    classes: tuple[str, ...]
    scans: tuple[Scan, ...]
    problems: tuple[Problem, ...]


@dataclasses.dataclass(frozen=True)
class _Folder:
    """A folder that holds one patient: its path, its files' names, and '_' or '-', how they are named."""

    path: Path
    files: tuple[str, ...]
    separator: str


def find_cohort(data: ml_collections.ConfigDict) -> Cohort:
    """Finds every scan below `data.path`, or in the manifest that it is.

    Where the class of a patient comes from: with `data.grades_csv`, from there and nowhere else (it may name
    scans or patients); in 'brats2019', from the folder around it (LGG, HGG or one of `data.classes`; any name if
    that layout is asked for and there are several); in 'brats2020', from name_mapping.csv; in 'brats2023', from
    the folder around it too. Links are followed; hidden files are not seen.

    Args:
        data: the `data` block of a config: `path`, `layout`, `modality`, `grades_csv` and `classes` are read.

    Returns:
        The cohort. Scans with a fault are in `problems`, not in `scans`; one of the two may be empty.

    Raises:
        InputError: nothing found, or a setting that fits nothing; the message says what was looked for.
    """
    if not data.path:
        raise InputError('data.path is empty: give a cohort folder or a CSV manifest')
    if data.layout != 'auto' and data.layout not in LAYOUTS:
        raise InputError(f'data.layout={data.layout!r} is not known; choose one of auto, {", ".join(LAYOUTS)}')
    if len(set(data.classes)) < len(data.classes):
        raise InputError(f'data.classes={tuple(data.classes)} names a class twice')
    path = Path(data.path).expanduser()
    if not path.exists():
        raise InputError(f'data.path={data.path}: no such folder or file')
    if path.is_file():
        layout, scans, problems = 'manifest', *_manifest_scans(path, data)
    else:
        layout, scans, problems = _folder_scans(path, data)
    if data.classes:
        scans, unknown = _split_off_unknown_classes(scans, tuple(data.classes))
        problems += unknown
    classes = tuple(data.classes) or in_order({scan.label for scan in scans})
    by_id = sorted(scans, key=lambda scan: scan.id)
    return Cohort(str(data.path), layout, classes, tuple(by_id), tuple(sorted(problems, key=lambda p: (p.id, p.file))))


def in_order(labels: Collection[str]) -> tuple[str, ...]:
    """Classes in the order of their numbers: LGG and HGG first, the others by name."""
    first = tuple(label for label in FIRST_CLASSES if label in labels)
    return first + tuple(sorted(set(labels) - set(first)))


def _split_off_unknown_classes(scans: list[Scan], classes: tuple[str, ...]) -> tuple[list[Scan], list[Problem]]:
    expected = f'data.classes has {", ".join(classes)}'
    problems = [
        Problem(scan.id, str(scan.image), f'unknown class {scan.label!r}; {expected}')
        for scan in scans
        if scan.label not in classes
    ]
    return [scan for scan in scans if scan.label in classes], problems


def _without_doubles(scans: list[Scan], key_of: dict[str, str] | None = None) -> tuple[list[Scan], list[Problem]]:
    """Takes out every scan that shares its id with another, or its image or entry in `key_of` with another patient."""
    groups = defaultdict(list)
    for number, scan in enumerate(scans):
        groups['id', scan.id].append(number)
        groups['image', os.path.realpath(scan.image)].append(number)
        if key_of and scan.id in key_of:
            groups['key', key_of[scan.id]].append(number)
    twins = defaultdict(set)
    for numbers in groups.values():
        for one, other in itertools.permutations(numbers, 2):
            if scans[one].id == scans[other].id or scans[one].patient != scans[other].patient:
                twins[one].add(other)
    problems = [
        Problem(
            scans[number].id,
            str(scans[number].image),
            f'the same patient twice: also {", ".join(str(scans[n].image) for n in sorted(others))}',
        )
        for number, others in sorted(twins.items())
    ]
    return [scan for number, scan in enumerate(scans) if number not in twins], problems


# CSV files


def _read_csv(path: Path, columns: Iterable[str]) -> list[dict[str, str]]:
    """Reads a CSV file: a dict a row, of stripped values under lower-case keys, `columns` among them."""
    try:
        with path.open(newline='', encoding='utf-8-sig') as file:
            reader = csv.reader(file)
            header = [name.strip().lower() for name in next(reader, [])]
            rows = [(reader.line_num, [value.strip() for value in row]) for row in reader]
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise InputError(f'{path}: not readable as a CSV file in UTF-8 ({error})') from error
    missing = [name for name in columns if name not in header]
    if missing:
        raise InputError(
            f'{path}: the first line must name the column{"s" * (len(missing) > 1)} {", ".join(missing)}, '
            f'separated by commas; it has: {", ".join(header) or "nothing"}'
        )
    if twice := [name for number, name in enumerate(header) if name and name in header[:number]]:
        raise InputError(f'{path}: the first line names the column {twice[0]} twice; expected each once')
    for line, row in rows:
        if any(row[len(header) :]):
            raise InputError(
                f'{path}: line {line} has {len(row)} values, the first line names {len(header)} columns; expected no '
                'more, and quotes around a value with a comma'
            )
    return [dict(zip(header, row + [''] * len(header), strict=False)) for _, row in rows if any(row)]


def _manifest_scans(path: Path, data: ml_collections.ConfigDict) -> tuple[list[Scan], list[Problem]]:
    """Reads a manifest; a column `patient` is optional and says which scans must not be split apart."""
    if data.layout not in ('auto', 'manifest'):
        raise InputError(f'data.layout={data.layout} needs a folder, but data.path={data.path} is a file')
    if path.suffix.lower() != '.csv':
        raise InputError(f'data.path={data.path} is neither a folder nor a .csv manifest')
    rows = _read_csv(path, MANIFEST_COLUMNS)
    if not rows:
        raise InputError(f'{path}: no scans: expected lines of {",".join(MANIFEST_COLUMNS)} below the first')
    scans, problems = [], []
    for number, row in enumerate(rows, start=1):
        name = row['id'] or f'(scan {number})'
        empty = [column for column in MANIFEST_COLUMNS if not row[column]]
        if empty:
            problems.append(Problem(name, str(path), f'nothing under {", ".join(empty)}'))
            continue
        image, mask = (path.parent / Path(row[column]).expanduser() for column in ('image', 'mask'))
        absent = [file for file in (image, mask) if not file.is_file()]
        problems += [Problem(name, str(file), f'missing file, named in {path}') for file in absent]
        if not absent:
            scans.append(Scan(name, row.get('patient') or name, row['label'], image, mask))
    scans, doubles = _without_doubles(scans)
    return scans, problems + doubles


def _read_grades(path: Path) -> dict[str, str]:
    """Reads id -> class; a patient named twice must have the same class twice."""
    grades: dict[str, str] = {}
    for row in _read_csv(path, GRADES_COLUMNS):
        if row['label'] and grades.setdefault(row['id'], row['label']) != row['label']:
            raise InputError(f'{path}: {row["id"]} is {grades[row["id"]]} on one line and {row["label"]} on another')
    return grades


def _read_name_mapping(paths: list[Path]) -> tuple[dict[str, str], dict[str, str]]:
    """Reads BraTS's name_mapping.csv files: id -> grade, and id -> key of its patient over the years' ids."""
    grades, key_of = {}, {}
    for path in paths:
        for number, row in enumerate(_read_csv(path, ())):
            ids = [value for column, value in row.items() if column.endswith('subject_id')]
            for name in ids:
                if name and name != 'NA':
                    key_of[name] = f'{path}:{number}'
                    if row.get('grade'):
                        grades[name] = row['grade']
    return grades, key_of


# Folders


def _walk(root: Path) -> Iterator[tuple[Path, tuple[str, ...], bool]]:
    """Yields each folder from `root` to `MAX_DEPTH`: path, names of its files, whether it has folders."""

    def stop(error: OSError) -> None:
        raise InputError(f'{error.filename}: cannot be read ({error.strerror})') from error

    for folder, folders, files in os.walk(root, followlinks=True, onerror=stop):
        path = Path(folder)
        inner = bool(folders)
        deep = len(path.relative_to(root).parts) >= MAX_DEPTH
        folders[:] = [] if deep else sorted(n for n in folders if not n.startswith(('.', '__')))
        yield path, tuple(sorted(n for n in files if not n.startswith('.'))), inner


def _separator(files: Iterable[str]) -> str:
    """How a patient's files are named: '-' as since BraTS 2023, '_' as before, '' if like no patient's."""
    for separator in ('-', '_'):
        image = rf'{separator}({"|".join(_MODALITIES[separator].values())})\.nii(\.gz)?$'
        pattern = re.compile(f'{image}|{_MASK[separator]}', re.IGNORECASE)
        if any(pattern.search(name) for name in files):
            return separator
    return ''


def _patient_folders(root: Path) -> tuple[list[_Folder], list[Path], list[Problem]]:
    """Returns the patients' folders, the name_mapping.csv files, and folders that should be patients'."""
    patients, mappings, others = [], [], []
    for path, files, inner in _walk(root):
        mappings += [path / name for name in files if name.lower() == 'name_mapping.csv']
        separator = _separator(files)
        if separator:
            patients.append(_Folder(path, files, separator))
        elif not inner and (not files or any(_NIFTI.search(name) for name in files)):
            others.append((path, files))
    parents = {patient.path.parent for patient in patients}
    problems = [
        Problem(path.name, str(path), f'no image or mask of BraTS in it: {", ".join(files) or "it is empty"}')
        for path, files in others
        if path.parent in parents
    ]
    return patients, mappings, problems


def _folder_scans(root: Path, data: ml_collections.ConfigDict) -> tuple[str, list[Scan], list[Problem]]:
    """Finds the scans below a folder."""
    if data.layout == 'manifest':
        raise InputError(f'data.layout=manifest needs a CSV file, but data.path={data.path} is a folder')
    if data.modality not in _MODALITIES['_']:
        raise InputError(f'data.modality={data.modality!r} is not known; choose one of {", ".join(_MODALITIES["_"])}')
    folders, mappings, problems = _patient_folders(root)
    if not folders:
        raise InputError(
            f'data.path={data.path}: no patients found; looked {MAX_DEPTH} folders deep for '
            + '; '.join(LAYOUTS[name] for name in LAYOUTS if name != 'manifest')
            + ' (or the files of another data.modality). Another cohort needs a CSV manifest (id,image,mask,label) as '
            'data.path'
        )
    mapped, key_of = _read_name_mapping(mappings)
    grades = _read_grades(Path(data.grades_csv).expanduser()) if data.grades_csv else {}
    class_folders = _class_folders(folders, data)
    layout = _layout(folders, data, class_folders, bool(mapped))

    scans, unlabelled = [], []
    for folder in folders:
        name = folder.path.name
        patient = re.sub(r'(-\d+)-\d+$', r'\1', name) if layout == 'brats2023' else name
        files, faults = _image_and_mask(folder, layout, data.modality)
        problems += faults
        if data.grades_csv:
            label = grades.get(name) or grades.get(patient)
        elif layout in ('brats2019', 'brats2023') and folder.path.parent.name in class_folders:
            label = folder.path.parent.name
        else:
            label = mapped.get(name) if layout == 'brats2020' else None
        if not label:
            unlabelled.append(Problem(name, str(folder.path), f'no class: {_where_classes_are(layout, data)}'))
        elif not faults:
            scans.append(Scan(name, patient, label, *files))
    if len(unlabelled) == len(folders):
        raise InputError(
            f'data.path={data.path}: {len(folders)} patients found (layout {layout}), none of a known class: '
            f'{_where_classes_are(layout, data)}'
        )
    scans, doubles = _without_doubles(scans, key_of)
    return layout, scans, problems + unlabelled + doubles


def _class_folders(folders: list[_Folder], data: ml_collections.ConfigDict) -> set[str]:
    """Names of folders that say the class of the patients in them."""
    around = {folder.path.parent.name for folder in folders}
    known = around & {*FIRST_CLASSES, *data.classes}
    return around if data.layout == 'brats2019' and len(around) > 1 else known


def _layout(folders: list[_Folder], data: ml_collections.ConfigDict, class_folders: set[str], mapped: bool) -> str:
    """Returns `data.layout`, or what all folders look like; raises if they look like several."""
    seen = defaultdict(list)
    for folder in folders:
        if folder.separator == '-':
            name = 'brats2023'
        elif folder.path.parent.name in class_folders:
            name = 'brats2019'
        else:
            name = 'brats2020' if mapped else 'brats2021'
        seen[name].append(folder.path.name)
    found = ', '.join(f'{name} ({len(ids)}, e.g. {ids[0]})' for name, ids in sorted(seen.items()))
    if data.layout == 'auto':
        if len(seen) > 1:
            raise InputError(
                f'data.path={data.path} mixes layouts: {found}; BraTS repeats patients from year to year '
                'under new names, so give one of them, or a CSV manifest (id,image,mask,label) of what you want'
            )
        return next(iter(seen))
    separator = '-' if data.layout == 'brats2023' else '_'
    if all(folder.separator != separator for folder in folders):
        raise InputError(
            f'data.layout={data.layout}: no patient like that in {data.path}; expected '
            f'{LAYOUTS[data.layout]}, found {found}'
        )
    return data.layout


def _where_classes_are(layout: str, data: ml_collections.ConfigDict) -> str:
    """Says where the class of a patient is looked for."""
    if data.grades_csv:
        return f'neither it nor its patient is named in data.grades_csv={data.grades_csv}'
    return {
        'brats2019': 'its folder must lie in a class folder (LGG, HGG, one of data.classes), '
        'or data.grades_csv name it',
        'brats2020': 'it must be named in name_mapping.csv beside the patients, or in data.grades_csv',
        'brats2021': 'give a CSV (id,label) as data.grades_csv; if the folders around the patients are '
        'named after classes, give those as data.classes',
        'brats2023': 'give a CSV (id,label) as data.grades_csv',
    }[layout]


def _image_and_mask(folder: _Folder, layout: str, modality: str) -> tuple[list[Path], list[Problem]]:
    """Picks the two files of a patient, or says which is missing or there twice."""
    separator = '-' if layout == 'brats2023' else '_'
    names = [_MODALITIES[separator][modality], 'seg']
    patterns = [rf'{separator}{names[0]}\.nii(\.gz)?$', _MASK[separator]]
    picked, problems = [], []
    for name, pattern in zip(names, patterns, strict=True):
        matches = [file for file in folder.files if re.search(pattern, file, re.IGNORECASE)]
        expected = folder.path / f'{folder.path.name}{separator}{name}.nii.gz'
        if len(matches) > 1:
            message = f'{len(matches)} files could be it: {", ".join(matches)}; keep one'
        elif not matches or not (folder.path / matches[0]).is_file():
            message = 'missing file (nor is it there as .nii)'
        else:
            picked.append(folder.path / matches[0])
            continue
        problems.append(Problem(folder.path.name, str(expected), message))
    return picked, problems
