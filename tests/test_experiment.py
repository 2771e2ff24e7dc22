"""Which ROI goes where in an experiment."""

import dataclasses
import pathlib
import re
import runpy

import numpy as np
import pytest

from vqroi_jax import experiment, transfer
from vqroi_jax.data.roi_sets import RoiSet
from vqroi_jax.errors import InputError

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def settings(variant='smoke', **changes):
    config = runpy.run_path(str(CONFIGS / 'classifier.py'))['get_config'](variant)
    config.mesh.data = 1
    config.update_from_flattened_dict(changes)
    return config


def fake_sets(lgg=20, hgg=60, made=30, test=4):
    """A real set with splits, two scans of each patient of LGG, and a synthetic one; volumes that nobody reads."""

    def one(counts, splits, patients):
        labels = np.repeat(np.arange(len(counts)), counts)
        ids = tuple(f'{i}' for i in range(len(labels)))
        return RoiSet(
            'somewhere', ids, labels, ('LGG', 'HGG'), np.zeros((len(labels), 2, 2, 2)), (1, 1, 1), (0, 1),
            patients or ids, splits, '', ()
        )  # fmt: skip

    splits = [*['test'] * test, *['train'] * (lgg - test), *['test'] * test, *['train'] * (hgg - test)]
    patients = [*(f'L{i // 2}' for i in range(lgg)), *(f'H{i}' for i in range(hgg))]
    return one((lgg, hgg), tuple(splits), tuple(patients)), one((made, made), None, None)


def counts(rois):
    """Number of ROIs by (set, class)."""
    found = {}
    for (which, _), label in zip(rois.rows, rois.labels, strict=True):
        found[int(which), int(label)] = found.get((int(which), int(label)), 0) + 1
    return found


def arm(**changes):
    config = settings('experiment1', runs=3, validation=0.2)
    config.arms.mixed = config.arms.real_hgg_synthetic_lgg
    config.arms.mixed.update({'pretrain_rois': 20, 'rois': 10, **changes})
    return config


def test_an_arm_gets_the_rois_that_it_asks_for():
    sets = fake_sets()
    parts = experiment.plan(arm(), 'mixed', 0, sets)
    assert list(parts) == ['pretrain', 'finetune']
    assert counts(parts['pretrain'].train) == {(1, 0): 16, (0, 1): 16}
    assert counts(parts['pretrain'].validation) == {(1, 0): 4, (0, 1): 4}
    assert counts(parts['finetune'].validation) == {(0, 0): 2, (0, 1): 2}
    # Second scans of validation patients are left out of training.
    assert 6 <= counts(parts['finetune'].train)[0, 0] <= 8
    assert counts(parts['finetune'].train)[0, 1] == 8
    pretrained = {tuple(row) for part in (parts['pretrain'].train, parts['pretrain'].validation) for row in part.rows}
    trained = {tuple(row) for part in (parts['finetune'].train, parts['finetune'].validation) for row in part.rows}
    assert not pretrained & trained


def test_validation_sets_are_disjoint_from_run_to_run_and_from_training():
    sets = fake_sets()
    plans = [experiment.plan(arm(), 'mixed', number, sets) for number in range(3)]
    test = experiment.tested_rois(sets)
    for stage in ('pretrain', 'finetune'):
        held = [{tuple(row) for row in parts[stage].validation.rows} for parts in plans]
        assert len(held[0] | held[1] | held[2]) == sum(map(len, held))
        pools = [{tuple(row) for row in parts[stage].train.rows} | held[i] for i, parts in enumerate(plans)]
        for i, parts in enumerate(plans):
            experiment.check_disjoint(test, parts)
            assert not parts[stage].train.patients & parts[stage].validation.patients
            assert held[i] <= pools[0] | pools[1] | pools[2]
    assert {sets[0].splits[row] for _, row in test.rows} == {'test'}


def test_balance_repeats_the_rarer_class():
    sets = fake_sets()
    config = settings('augmentation', runs=2, validation=0.25)
    plain = counts(experiment.plan(config, 'unbalanced', 0, sets)['finetune'].train)
    even = experiment.plan(config, 'augmented', 0, sets)['finetune'].train
    assert plain[0, 0] < plain[0, 1]
    assert counts(even)[0, 0] == counts(even)[0, 1] == plain[0, 1]
    assert len({tuple(row) for row in even.rows}) == sum(plain.values())


def test_a_class_of_one_patient_is_refused():
    real, made = fake_sets()
    patients = tuple('P' if name[0] == 'L' and row >= 4 else name for row, name in enumerate(real.patients))
    with pytest.raises(InputError, match='finetune: the ROIs of class LGG are of too few patients'):
        experiment.plan(arm(), 'mixed', 0, (RoiSet(**{**vars(real), 'patients': patients}), made))


def test_a_patient_with_scans_of_two_classes_is_on_one_side_and_validated_on_in_one_run():
    real, made = fake_sets(lgg=44)
    patients = list(real.patients)
    patients[48:68] = patients[4:24]  # tumours that progressed
    sets = RoiSet(**{**vars(real), 'patients': tuple(patients)}), made
    test, validated = experiment.tested_rois(sets), []
    for number in range(3):
        parts = experiment.plan(settings('augmentation', runs=3, validation=0.15), 'unbalanced', number, sets)
        experiment.check_disjoint(test, parts)
        finetune = parts['finetune']
        assert not finetune.train.patients & finetune.validation.patients
        assert counts(finetune.validation) == {(0, 0): 6, (0, 1): 8}
        # Every scan of everybody else is learnt from.
        others = {row for row in real.among('train') if patients[row] not in finetune.validation.patients}
        assert {row for _, row in finetune.train.rows} == others
        validated.append(finetune.validation.patients)
    assert len(validated[0] | validated[1] | validated[2]) == sum(map(len, validated))


def test_too_few_patients_for_validation_sets_without_one_in_common_are_refused():
    real, made = fake_sets()
    patients = tuple(f'P{row % 4}' if 4 <= row < 20 else name for row, name in enumerate(real.patients))
    sets = RoiSet(**{**vars(real), 'patients': patients}), made
    experiment.plan(arm(), 'mixed', 0, sets)
    with pytest.raises(InputError, match='class LGG are of too few patients for 3 validation sets'):
        experiment.plan(arm(), 'mixed', 2, sets)


def test_a_patient_on_two_sides_is_found():
    sets = fake_sets()
    patients = list(sets[0].patients)
    patients[-1] = patients[0]  # a training scan of a test patient
    leaking = RoiSet(**{**vars(sets[0]), 'patients': tuple(patients)}), sets[1]
    config = arm(pretrain_rois=0, rois=10)
    parts = experiment.plan(config, 'mixed', 0, leaking)
    test = experiment.tested_rois(leaking)
    assert any(patients[0] in part.train.patients | part.validation.patients for part in parts.values())
    with pytest.raises(InputError, match=f'patient {patients[0]} has ROIs in the test split and outside'):
        experiment.check_disjoint(test, parts)


def test_pretraining_sees_no_other_scan_of_a_validation_patient():
    """Each patient of LGG has two scans, of which one may be left for pre-training."""
    sets, config = (
        fake_sets(lgg=44),
        arm(pretrain_real=('LGG', 'HGG'), pretrain_synthetic=(), pretrain_rois=12, rois=20),
    )
    leaks = 0
    for number in range(3):
        parts = experiment.plan(config, 'mixed', number, sets)
        held = parts['finetune'].validation.patients
        pretrained = parts['pretrain'].train.patients | parts['pretrain'].validation.patients
        assert held
        assert not held & pretrained
        assert counts(parts['pretrain'].validation)[0, 0] == round(0.2 * 12)
        experiment.check_disjoint(experiment.tested_rois(sets), parts)
        used = {row for _, row in parts['finetune'].train.rows} | {row for _, row in parts['finetune'].validation.rows}
        free = {patient for row, patient in enumerate(sets[0].patients) if row not in used}
        leaks += len(held & free)
    assert leaks  # there was something to keep out


def test_pretraining_on_a_validation_patient_is_found():
    sets = fake_sets()
    parts = experiment.plan(arm(), 'mixed', 0, sets)
    rois = parts['pretrain'].train
    leaking = experiment.Rois('train', sets, np.concatenate([rois.rows, parts['finetune'].validation.rows[:1]]))
    parts['pretrain'] = experiment.Part(leaking, parts['pretrain'].validation)
    with pytest.raises(AssertionError):
        experiment.check_disjoint(experiment.tested_rois(sets), parts)


@pytest.mark.parametrize(('side', 'what'), [('test', 'tested'), ('validation', 'validated')])
def test_given_weights_that_know_a_held_out_patient_are_refused(side, what):
    sets = fake_sets()
    parts, test = experiment.plan(arm(), 'mixed', 0, sets), experiment.tested_rois(sets)
    known = min(test.patients if side == 'test' else parts['finetune'].validation.patients)
    weights = transfer.Weights({}, {}, frozenset({known}), frozenset(), 'runs/other, step 7')
    with pytest.raises(InputError, match=f'runs/other, step 7: .*from patient {known}, on whom a run would be {what}'):
        experiment.check_disjoint(test, parts, weights)
    others = parts['finetune'].train.patients
    experiment.check_disjoint(test, parts, transfer.Weights({}, {}, frozenset(others), frozenset(), ''))


def with_record(sets, patients):
    return sets[0], dataclasses.replace(sets[1], learnt_from=None if patients is None else frozenset(patients))


def test_a_test_patient_of_the_generator_is_refused():
    sets = fake_sets()
    known = max(experiment.tested_rois(sets).patients)
    sets = with_record(sets, {known, 'H30', 'elsewhere'})
    parts, test = experiment.plan(arm(), 'mixed', 0, sets), experiment.tested_rois(sets)
    with pytest.raises(InputError, match=f'config.fake=somewhere: its generator was trained on patient {known} .see'):
        experiment.check_disjoint(test, parts)
    real_only = experiment.plan(arm(pretrain_real=('HGG',), pretrain_synthetic=()), 'mixed', 0, sets)
    experiment.check_disjoint(test, real_only)  # has nothing of that generator
    assert experiment.provenance(test, [real_only]) is None


def test_weights_learnt_from_synthetic_rois_bring_the_patients_of_their_generator():
    sets = with_record(fake_sets(), {'A', 'B'})
    stages, test = experiment.plan(arm(), 'mixed', 0, sets), experiment.tested_rois(sets)
    known = max(test.patients)
    start = transfer.Weights({}, {}, frozenset(), frozenset({known}), 'runs/other, step 7')
    assert experiment.generators(stages['pretrain'], None) == {'A', 'B'}
    assert experiment.generators(stages['pretrain'], start) == {'A', 'B', known}
    assert experiment.generators(stages['finetune'], start) == {known}
    assert experiment.generators(stages['finetune'], None) == frozenset()
    unknown = dataclasses.replace(start, generators=None)
    assert experiment.generators(stages['finetune'], unknown) is None
    assert experiment.generators(experiment.plan(arm(), 'mixed', 0, fake_sets())['pretrain'], start) is None
    with pytest.raises(InputError, match=f'runs/other, step 7: .* whose generator was trained on patient {known}, on'):
        experiment.check_disjoint(test, stages, start)
    experiment.check_disjoint(test, stages, unknown)


def test_what_is_known_of_the_generator_is_said():
    sets = fake_sets()
    splits = dict(zip(sets[0].patients, sets[0].splits, strict=True))
    learnt = {patient for patient, split in splits.items() if split == 'train'} - {'H30'}
    for record, expected in (
        (None, 'is not known: somewhere has no learnt_from.json'),
        ((), r'among the 0 .* trained on; 0 of the \d+ patients that runs are validated on are'),
        (learnt, rf'No test patient is among the {len(learnt)} that'),
    ):
        known = with_record(sets, record)
        test, runs = experiment.tested_rois(known), [experiment.plan(arm(), 'mixed', n, known) for n in range(3)]
        for parts in runs:
            experiment.check_disjoint(test, parts)
        line = experiment.provenance(test, runs)
        assert re.search(expected, line)
        if record:
            validated = set.union(*(parts['finetune'].validation.patients for parts in runs))
            assert f'; {len(validated - {"H30"})} of the {len(validated)} patients that runs are validated' in line


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'rois': 17}, r'config\.arms\..*\.rois=17 wants 17 real ROIs of class LGG, of which there are 16;'),
        ({'pretrain_rois': 31}, 'pretrain_rois=31 wants 31 synthetic ROIs of class LGG, of which there are 30'),
        ({'pretrain_real': ('GBM',)}, "class 'GBM' is none of LGG, HGG"),
        ({'rois': 2}, '2 ROIs are too few for 3 disjoint validation sets of 1'),
    ],
)
def test_an_arm_that_cannot_be_filled_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        experiment.plan(arm(**changes), 'mixed', 0, fake_sets())
