"""The experiments: which ROI goes where, what is left, resuming, and refusals."""

import json
import pathlib
import runpy

import nibabel
import numpy as np
import pytest
import scipy.stats

from vqroi_jax import main, prepare, train_classifier
from vqroi_jax.data.roi_sets import RoiSet
from vqroi_jax.errors import InputError
from vqroi_jax.metrics import classification

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def experiment(variant='smoke', **changes):
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
    config = experiment('experiment1', runs=3, validation=0.2)
    config.arms.mixed = config.arms.real_hgg_synthetic_lgg
    config.arms.mixed.update({'pretrain_rois': 20, 'rois': 10, **changes})
    return config


def test_an_arm_gets_the_rois_that_it_asks_for():
    sets = fake_sets()
    parts = train_classifier.plan(arm(), 'mixed', 0, sets)
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
    plans = [train_classifier.plan(arm(), 'mixed', number, sets) for number in range(3)]
    test = train_classifier.tested_rois(sets)
    for stage in ('pretrain', 'finetune'):
        held = [{tuple(row) for row in parts[stage].validation.rows} for parts in plans]
        assert len(held[0] | held[1] | held[2]) == sum(map(len, held))
        pools = [{tuple(row) for row in parts[stage].train.rows} | held[i] for i, parts in enumerate(plans)]
        for i, parts in enumerate(plans):
            train_classifier.check_disjoint(test, parts[stage])
            assert not parts[stage].train.patients & parts[stage].validation.patients
            assert held[i] <= pools[0] | pools[1] | pools[2]
    assert {sets[0].splits[row] for _, row in test.rows} == {'test'}


def test_balance_repeats_the_rarer_class():
    sets = fake_sets()
    config = experiment('augmentation', runs=2, validation=0.25)
    plain = counts(train_classifier.plan(config, 'unbalanced', 0, sets)['finetune'].train)
    even = train_classifier.plan(config, 'augmented', 0, sets)['finetune'].train
    assert plain[0, 0] < plain[0, 1]
    assert counts(even)[0, 0] == counts(even)[0, 1] == plain[0, 1]
    assert len({tuple(row) for row in even.rows}) == sum(plain.values())


def test_a_patient_on_two_sides_is_found():
    sets = fake_sets()
    patients = list(sets[0].patients)
    patients[-1] = patients[0]  # a training scan of a test patient
    leaking = RoiSet(**{**vars(sets[0]), 'patients': tuple(patients)}), sets[1]
    config = arm(pretrain_rois=0, rois=10)
    parts = train_classifier.plan(config, 'mixed', 0, leaking)
    test = train_classifier.tested_rois(leaking)
    leak = next(part for part in parts.values() if patients[0] in part.train.patients | part.validation.patients)
    with pytest.raises(InputError, match=f'patient {patients[0]} has ROIs in the test split and outside'):
        train_classifier.check_disjoint(test, leak)


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'rois': 17}, 'real ROIs of class LGG: 17 wanted, 16 there'),
        ({'pretrain_rois': 31}, 'pretrain_synthetic ROIs of class LGG: 31 wanted, 30 there'),
        ({'pretrain_real': ('GBM',)}, "class 'GBM' is none of LGG, HGG"),
        ({'rois': 2}, '2 ROIs are too few for 3 disjoint validation sets of 1'),
    ],
)
def test_an_arm_that_cannot_be_filled_is_refused(changes, message):
    with pytest.raises(InputError, match=message):
        train_classifier.plan(arm(**changes), 'mixed', 0, fake_sets())


def result(shift, seed):
    """A made-up outcome of a run."""
    rng = np.random.default_rng(seed)
    labels = np.arange(20) % 2
    high = 1 / (1 + np.exp(-rng.normal(shift * (2 * labels - 1), 1)))
    probabilities = np.stack([1 - high, high], axis=1)
    figures = classification.figures(probabilities, labels)
    return {'labels': labels.tolist(), 'probabilities': probabilities.tolist(), 'figures': figures}


def test_the_table_has_means_deviations_and_tests():
    results = {'plain': [result(0.3, i) for i in range(3)], 'better': [result(0.6, 10 + i) for i in range(3)]}
    found = train_classifier.summarise(experiment(runs=3), results, ('LGG', 'HGG'))
    for name, runs in results.items():
        values = [run['figures']['accuracy'] for run in runs]
        assert found['arms'][name]['mean']['accuracy'] == pytest.approx(np.mean(values))
        assert found['arms'][name]['sd']['accuracy'] == pytest.approx(np.std(values, ddof=1))
    both = [[run['figures']['auc'] for run in runs] for runs in results.values()]
    assert found['arms']['better']['p']['auc'] == pytest.approx(scipy.stats.ttest_ind(*both).pvalue)
    assert found['arms']['plain']['p']['auc'] is None
    assert np.sum(found['arms']['better']['confusion']) == 60
    area = found['arms']['better']['auc_of_averages']['HGG']
    assert area['low'] < area['value'] <= area['high']
    wrong, right = found['roc']['better']
    assert np.trapezoid(right, wrong) == pytest.approx(area['value'])
    printed = train_classifier.table(found)
    assert f'{found["arms"]["better"]["mean"]["auc"]:.3f} ±' in printed
    assert f'p={found["arms"]["better"]["p"]["auc"]:.2g}' in printed


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    """A prepared cohort of phantoms, and its own ROIs as files, in the place of synthetic ones."""
    root = tmp_path_factory.mktemp('experiment')
    config = runpy.run_path(str(CONFIGS / 'prepare.py'))['get_config']('smoke')
    config.data.phantom.spacing = 8.0
    config.data.phantom.patients = 9
    config.data.roi_size = (16, 16, 16)
    config.data.split.val = 1.0
    config.data.split.test = 2.0
    cohort = prepare.prepare(config.data, root / 'cohort')
    for source in (cohort.split('train'), cohort.split('val')):
        for i in range(len(source)):
            path = root / 'fake' / cohort.classes[source.labels[i]] / f'{source.ids[i]}.nii.gz'
            path.parent.mkdir(parents=True, exist_ok=True)
            voxels = (source.volume(i)[..., 0].transpose(1, 2, 0) + 1) / 2
            nibabel.save(nibabel.Nifti1Image(voxels, source.roi(i).affine), path)
    return root


def command(folders, workdir, *more):
    arguments = [f'--config={CONFIGS / "classifier.py"}:smoke', f'--workdir={workdir}', '--config.mesh.data=1']
    sets = [f'--config.real={folders / "cohort"}', f'--config.fake={folders / "fake"}']
    return main.main(['main', *arguments, *sets, *more])


@pytest.fixture(scope='module')
def done(folders, tmp_path_factory):
    """The folder of an experiment that was never stopped."""
    workdir = tmp_path_factory.mktemp('done')
    assert command(folders, workdir) == 0
    return workdir


def test_leaves_a_table_figures_and_a_folder_for_each_part(done):
    found = json.loads((done / 'metrics.json').read_text())
    assert set(found['arms']) == {'real_only', 'synthetic'}
    assert found['positive'] == 'HGG'
    for name, stages in (('real_only', {'finetune'}), ('synthetic', {'pretrain', 'finetune'})):
        for number in range(2):
            folder = done / 'parts' / name / f'run_{number}'
            assert {path.name for path in folder.iterdir() if path.is_dir()} == stages
            part = json.loads((folder / 'result.json').read_text())
            assert len(part['ids']) == 4
            np.testing.assert_allclose(np.sum(part['probabilities'], axis=1), 1, rtol=1e-5)
        assert np.sum(found['arms'][name]['confusion']) == 8
    for name in ('roc', 'confusion'):
        assert (done / 'figures' / f'{name}.png').stat().st_size > 5000
    assert not list(done.glob('.volumes*'))


def test_goes_on_where_it_was_stopped(done, folders, tmp_path, monkeypatch):
    """Killed in the second part: what is done is not done again, and the figures are those of the unbroken run."""
    train_stage, stages = train_classifier.train_stage, []

    def dying(*arguments):
        stages.append(arguments[3])
        if len(stages) == 3:
            raise KeyboardInterrupt
        return train_stage(*arguments)

    monkeypatch.setattr(train_classifier, 'train_stage', dying)
    assert command(folders, tmp_path / 'out') == 130
    assert command(folders, tmp_path / 'out') == 0
    assert stages == ['finetune', 'finetune', 'pretrain', 'pretrain', 'finetune', 'pretrain', 'finetune']
    unbroken, resumed = (json.loads((folder / 'metrics.json').read_text()) for folder in (done, tmp_path / 'out'))
    assert resumed['arms'] == unbroken['arms']


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--config.real='], 'config.real is empty'),
        (['--config.fake='], 'the arm synthetic wants synthetic ROIs'),
        (['--config.runs=1'], 'config.runs=1: at least 2'),
        (['--config.validation=0.6'], 'expected a share above 0 and under 1 / config.runs'),
        (['--config.model.depth=20'], 'config.model.depth=20 is none of 10, 18, 34, 50'),
        (['--config.arms.synthetic.pretrain_rois=50'], 'pretrain_synthetic ROIs of class LGG: 50 wanted, 7 there'),
        (['--config.classes=("LGG","DIPG")'], 'no ROI of class DIPG'),
    ],
)
def test_bad_settings_are_told_before_any_training(more, message, folders, tmp_path, capsys):
    assert command(folders, tmp_path / 'out', *more) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count('\n') == 1


def test_one_class_is_refused(folders, tmp_path, capsys):
    assert command(folders, tmp_path / 'out', '--config.classes=("HGG",)') == 2
    assert 'has one class, HGG; two at least can be told apart' in capsys.readouterr().err


def test_a_real_set_without_splits_is_refused(folders, tmp_path, capsys):
    assert command(folders, tmp_path / 'out', f'--config.real={folders / "fake"}') == 2
    assert 'a prepared cohort is needed, for its splits' in capsys.readouterr().err


def test_without_synthetic_arms_no_synthetic_rois_are_needed(folders, tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(
        train_classifier, 'run_arm', lambda *arguments: calls.append(arguments[1]) or result(1, len(calls))
    )
    config = experiment(real=str(folders / 'cohort'))
    del config.arms.synthetic
    train_classifier.run(config, tmp_path / 'out')
    assert calls == ['real_only', 'real_only']


def test_paper_scale_experiments_ask_for_the_papers_numbers():
    first, second = experiment('experiment1'), experiment('experiment2')
    assert {name: one.pretrain_rois for name, one in first.arms.items()} == {
        'real_only': 0,
        'real_hgg_synthetic_lgg': 183,
        'synthetic': 183,
    }
    assert second.arms.synthetic.pretrain_rois == 250
    assert {one.rois for one in (*first.arms.values(), *second.arms.values())} == {51}
    assert first.arms.synthetic.pretrain_synthetic == second.arms.synthetic.pretrain_synthetic == ('LGG', 'HGG')
