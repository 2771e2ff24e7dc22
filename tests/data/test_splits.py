"""Splits: by patient, stratified, seeded, stable; and their file."""

import itertools
import json
import random
from collections import Counter
from pathlib import Path

import pytest

from vqroi_jax.data.cohort import Scan
from vqroi_jax.data.splits import SPLITS, split_patients, write_splits
from vqroi_jax.errors import InputError


def scans_of(**patients: int) -> list[Scan]:
    """So many patients of each class, every third with two scans."""
    scans = []
    for label, count in patients.items():
        for number in range(count):
            patient = f'{label}{number:03d}'
            scans += [
                Scan(f'{patient}-{time}', patient, label, Path('i'), Path('m')) for time in range(1 + (number % 3 == 0))
            ]
    return scans


def patients_by_split(scans, splits) -> dict[str, Counter]:
    """Split -> how many patients of each class; checks that all scans are there once and no patient is parted."""
    by_id = {scan.id: scan for scan in scans}
    assert sorted(itertools.chain(*splits.values())) == sorted(by_id)
    patients = {name: {(by_id[scan].patient, by_id[scan].label) for scan in ids} for name, ids in splits.items()}
    assert tuple(patients) == SPLITS
    assert sum(map(len, patients.values())) == len(set().union(*patients.values()))
    return {name: Counter(label for _, label in found) for name, found in patients.items()}


@pytest.fixture
def split(data):
    return data.split


@pytest.mark.parametrize(
    ('val', 'test', 'expected'),
    [  # of 76 LGG and 259 HGG, as in BraTS 2019
        (0.1, 25.0, {'val': (8, 26), 'test': (25, 25)}),
        (0.15, 0.15, {'val': (11, 39), 'test': (11, 39)}),
        (3, 0.0, {'val': (3, 3), 'test': (0, 0)}),
        (0.001, 1, {'val': (1, 1), 'test': (1, 1)}),
    ],
)
def test_each_class_gives_its_share_or_number_of_patients(val, test, expected, split):
    scans = scans_of(LGG=76, HGG=259)
    split.val, split.test = float(val), float(test)
    splits, warnings = split_patients(scans, ('LGG', 'HGG'), split)
    counts = patients_by_split(scans, splits)
    assert warnings == []
    for name, numbers in expected.items():
        assert (counts[name]['LGG'], counts[name]['HGG']) == numbers
    assert counts['train']['LGG'] == 76 - sum(numbers[0] for numbers in expected.values())


@pytest.mark.parametrize('seed', range(20))
def test_patients_are_never_parted_whatever_their_numbers(seed, split):
    rng = random.Random(seed)
    scans = scans_of(A=rng.randint(0, 40), B=rng.randint(1, 12), C=rng.randint(1, 3))
    split.seed, split.val, split.test = seed, rng.choice([0.0, 0.2, 2.0]), rng.choice([0.0, 0.3, 5.0])
    splits, _ = split_patients(scans, ('A', 'B', 'C'), split)
    patients_by_split(scans, splits)
    assert all(ids == sorted(ids) for ids in splits.values())


def test_the_seed_and_nothing_else_decides(split):
    scans = scans_of(LGG=30, HGG=30)
    first, _ = split_patients(scans, ('LGG', 'HGG'), split)
    random.Random(0).shuffle(scans)
    assert split_patients(scans, ('HGG', 'LGG'), split)[0] == first
    split.seed = 1
    assert split_patients(scans, ('LGG', 'HGG'), split)[0] != first


def test_every_patient_is_held_out_as_often(split):
    scans = [scan for scan in scans_of(LGG=10) if scan.id.endswith('-0')]
    split.val, split.test = 2.0, 3.0
    counts = {name: Counter() for name in SPLITS}
    for split.seed in range(1000):
        for name, ids in split_patients(scans, ('LGG',), split)[0].items():
            counts[name].update(ids)
    for name, expected in (('val', 200), ('test', 300)):
        assert all(abs(counts[name][scan.id] - expected) < 75 for scan in scans)  # five standard deviations


def test_one_patient_more_moves_few_others(split):
    split.val, split.test = 5.0, 5.0
    scans = scans_of(LGG=40)
    before, _ = split_patients(scans[:-1], ('LGG',), split)
    after, _ = split_patients(scans, ('LGG',), split)
    moved = sum(len(set(before[name]) - set(after[name])) for name in SPLITS)
    assert moved <= 2 * 2  # one patient, of two scans at most, over each of the two borders


@pytest.mark.parametrize('count', [1, 2, 6])
def test_a_class_too_small_goes_to_training_and_says_so(count, split):
    scans = scans_of(LGG=count, HGG=40)
    split.val, split.test = 0.1, 5.0
    splits, warnings = split_patients(scans, ('LGG', 'HGG'), split)
    counts = patients_by_split(scans, splits)
    assert counts['train']['LGG'] == count
    assert (counts['val']['HGG'], counts['test']['HGG']) == (4, 5)
    (warning,) = warnings
    assert f'class LGG: {count} patient' in warning
    assert 'all go to training' in warning


def test_the_smallest_class_that_can_be_split(split):
    split.val, split.test = 0.1, 5.0
    scans = scans_of(LGG=7)
    splits, warnings = split_patients(scans, ('LGG',), split)
    assert {name: count['LGG'] for name, count in patients_by_split(scans, splits).items()} == {
        'train': 1,
        'val': 1,
        'test': 5,
    }
    assert warnings == []


def test_a_class_without_patients_and_a_patient_whose_class_changed(split):
    split.val, split.test = 1.0, 1.0
    scans = scans_of(LGG=6)
    scans[1] = Scan(scans[1].id, scans[1].patient, 'HGG', Path('i'), Path('m'))  # LGG000's second scan
    splits, warnings = split_patients(scans, ('LGG', 'HGG', 'AST'), split)
    assert warnings == ['class HGG: no patients', 'class AST: no patients']
    assert sorted(len({scan.rsplit('-')[0] for scan in ids}) for ids in splits.values()) == [1, 1, 4]
    assert any({'LGG000-0', 'LGG000-1'} <= set(ids) for ids in splits.values())


@pytest.mark.parametrize(
    ('field', 'amount'), [('val', -0.1), ('test', 1.5), ('val', float('nan')), ('test', float('inf'))]
)
def test_amounts_that_mean_nothing(field, amount, split):
    split[field] = amount
    with pytest.raises(InputError, match=rf'data.split.{field}={amount}: expected a share below 1, or a whole number'):
        split_patients(scans_of(LGG=9), ('LGG',), split)


def test_a_label_that_is_no_class(split):
    with pytest.raises(InputError, match=r"class 'HGG' of a patient is not one of LGG"):
        split_patients(scans_of(LGG=9, HGG=9), ('LGG',), split)


def test_the_file_gives_back_what_was_written(tmp_path, split):
    splits, _ = split_patients(scans_of(LGG=60), ('LGG',), split)
    write_splits(tmp_path / 'splits.json', splits)
    assert [file.name for file in tmp_path.iterdir()] == ['splits.json']
    assert json.loads((tmp_path / 'splits.json').read_text()) == splits
