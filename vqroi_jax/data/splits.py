"""Divides the patients of a cohort into training, validation and test, and keeps the result in `splits.json`.

Stands between the cohort check and the prepared dataset. All scans of a patient go to one split, each class is
divided by itself, and the outcome depends on the seed and the patients' names alone: not on the order of files
on the disk.
"""

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import ml_collections

from vqroi_jax.data.cohort import Scan
from vqroi_jax.errors import InputError
from vqroi_jax.workdir import write_atomically

SPLITS = ('train', 'val', 'test')


def split_patients(
    scans: Sequence[Scan], classes: Sequence[str], split: ml_collections.ConfigDict
) -> tuple[dict[str, list[str]], list[str]]:
    """Splits patients, stratified by class.

    The patients of a class are put in the order of a hash of seed and name; the first go to test, the next to
    validation, so that a patient more or less moves few others. A share is rounded to whole patients, at least
    one. A class of which nothing would be left for training goes there whole, with a warning. A patient whose
    scans differ in class (a tumour that progressed) counts as of the class of the first scan by id.

    Args:
        scans: all scans, in any order.
        classes: the class names; labels of scans must be among them.
        split: `seed` (int), and `val` and `test`: below 1 a share of each class's patients, from 1 their number.

    Returns:
        {'train', 'val', 'test'} -> sorted scan ids, together all scans, each once; and warnings, a line each.

    Raises:
        InputError: `val` or `test` is negative or from 1 up not whole.
    """
    for field in ('val', 'test'):
        amount = split[field]
        if not (0 <= amount < 1 or (amount >= 1 and float(amount).is_integer())):
            raise InputError(f'data.split.{field}={amount}: expected a share below 1, or a whole number of patients')
    label_of: dict[str, str] = {}  # of a patient
    for scan in sorted(scans, key=lambda scan: scan.id):
        label_of.setdefault(scan.patient, scan.label)
    patients_of = defaultdict(list)
    for patient, label in label_of.items():
        patients_of[label].append(patient)
    if unknown := sorted(set(patients_of) - set(classes)):
        raise InputError(f'class {unknown[0]!r} of a patient is not one of {", ".join(classes)}')

    split_of, warnings = {}, []
    for label in classes:
        patients = sorted(patients_of[label], key=lambda name: _rank(split.seed, name))
        test, val = (_count(split[field], len(patients)) for field in ('test', 'val'))
        if not patients:
            warnings.append(f'class {label}: no patients')
        elif test + val >= len(patients):
            warnings.append(
                f'class {label}: {len(patients)} patient{"s" * (len(patients) > 1)} cannot give {val} to validation '
                f'and {test} to test and leave one to training; all go to training'
            )
            test = val = 0
        for position, patient in enumerate(patients):
            split_of[patient] = 'test' if position < test else 'val' if position < test + val else 'train'
    assert len({scan.id for scan in scans}) == len(scans), 'a cohort has every id once'
    splits: dict[str, list[str]] = {name: [] for name in SPLITS}
    for scan in scans:
        splits[split_of[scan.patient]].append(scan.id)
    return {name: sorted(ids) for name, ids in splits.items()}, warnings


def count_patients(scans: Iterable[Mapping[str, Any]]) -> dict[str, int]:
    """Number of patients by split; one with several scans counts once.

    Args:
        scans: as `cohort.json` has them, with `patient` and `split`.
    """
    patients: dict[str, set[str]] = {name: set() for name in SPLITS}
    for scan in scans:
        patients[scan['split']].add(scan['patient'])
    return {name: len(members) for name, members in patients.items()}


def _rank(seed: int, patient: str) -> bytes:
    """A patient's place in the seeded shuffle, whoever else is in the cohort."""
    return hashlib.sha256(f'{seed}/{patient}'.encode()).digest()


def _count(amount: float, patients: int) -> int:
    """Turns a share or a number of patients into a number."""
    if amount >= 1:
        return int(amount)
    return max(1, round(amount * patients)) if amount else 0


def write_splits(path: Path, splits: dict[str, list[str]]) -> None:
    """Writes split name -> scan ids as JSON; the file is whole or not there at all."""
    write_atomically(path, json.dumps(splits, indent=1) + '\n')
