"""The experiments as commands: what is left, resuming, and refusals."""

import dataclasses
import json
import pathlib
import re
import runpy
import shutil

import jax
import nibabel
import numpy as np
import pytest
import scipy.stats

from vqroi_jax import main, prepare, report, templates, train_classifier, viz
from vqroi_jax.data import samples
from vqroi_jax.data.learnt_from import LearntFrom, write_learnt_from
from vqroi_jax.data.roi_sets import open_sets
from vqroi_jax.errors import InputError
from vqroi_jax.experiment import plan
from vqroi_jax.metrics import classification
from vqroi_jax.training import classifier, partitioning
from vqroi_jax.training.checkpoints import read_checkpoint

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def experiment(variant='smoke', **changes):
    config = runpy.run_path(str(CONFIGS / 'classifier.py'))['get_config'](variant)
    config.mesh.data = 1
    config.update_from_flattened_dict(changes)
    return config


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
    found = train_classifier.summarise(experiment(runs=3, baseline='plain'), results, ('LGG', 'HGG'))
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


def test_arms_whose_runs_do_not_differ_have_no_p_and_are_not_said_to_agree():
    results = {'plain': [result(0.3, 0)] * 2, 'better': [result(0.9, 0)] * 2}
    found = train_classifier.summarise(experiment(runs=2, baseline='plain'), results, ('LGG', 'HGG'))
    assert found['arms']['better']['mean']['auc'] > found['arms']['plain']['mean']['auc']
    assert found['arms']['better']['p']['auc'] is None
    some = {
        'path': '',
        'sha256': '',
        'rois': {},
        'voxels': [],
        'spacing_mm': [],
        'intensity_range': [0, 1],
        'facts': [],
        'phantoms': False,
    }
    found |= {'real': some, 'fake': None, 'test': {}, 'provenance': None}
    found['arms'] = {name: arm | {'rois': {}, 'weights': None} for name, arm in found['arms'].items()}
    page = report.render_experiment(found, viz.roc(found['roc']), {})
    assert 'no p: no spread within either arm' in page
    assert 'runs agree' not in page


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
            learnt = {stage: json.loads((folder / stage / 'rois.json').read_text())['generators'] for stage in stages}
            assert (
                set(learnt.values()) == {None} if name == 'synthetic' else learnt == {'finetune': []}
            )  # None: unknown
            part = json.loads((folder / 'result.json').read_text())
            assert len(part['ids']) == 4
            np.testing.assert_allclose(np.sum(part['probabilities'], axis=1), 1, rtol=1e-5)
        assert np.sum(found['arms'][name]['confusion']) == 8
    for name in ('roc', 'confusion'):
        assert (done / 'figures' / f'{name}.png').stat().st_size > 5000
    assert not list(done.glob('.volumes*'))


def test_the_report_is_one_page_that_holds_everything(done, folders):
    page, found = (done / 'report.html').read_text(), json.loads((done / 'metrics.json').read_text())
    assert page.count('data:image/png;base64,') == 3  # ROC, and a confusion matrix for each arm
    assert not re.search(r'(src|href)="(?!data:)', page)
    text = ' '.join(re.sub('<[^>]*>', '', page).split())
    assert 'Not for clinical use' in text
    assert f'from{folders / "cohort"}' in text.replace('from ', 'from')
    assert 'phantoms: drawings, not patients' in text
    assert 'Whether the generator of the synthetic ROIs has learnt from test patients is not known' in text
    for arm in found['arms'].values():
        for figure in ('auc', 'f1', 'accuracy', 'precision', 'recall'):
            assert f'{arm["mean"][figure]:.3f} ± {arm["sd"][figure]:.3f}' in text
        area = arm['auc_of_averages']['HGG']
        assert f'{area["value"]:.3f} {area["low"]:.3f} to {area["high"]:.3f}' in text
    assert text.count('real_only (baseline)') == 1
    p = found['arms']['synthetic']['p']['auc']
    assert 'no p: no spread within either arm' in text if p is None else f'p = {templates.number(p)}' in text
    # Of 7 patients each class for training, 2 are kept for validation; the fixture has as many ROIs in each run.
    assert found['arms']['synthetic']['rois']['pretrain'] == 2 * [
        {'train': {label: {'synthetic': 3} for label in ('LGG', 'HGG')},
         'validation': {label: {'synthetic': 1} for label in ('LGG', 'HGG')}}
    ]  # fmt: skip
    assert '3 synthetic LGG, 3 synthetic HGG' in text
    assert '5 real LGG, 5 real HGG' in text
    assert found['test'] == {'LGG': {'real': 2}, 'HGG': {'real': 2}}
    for name in ('finetune.batch_size', 'arms.synthetic.pretrain_rois', 'gamma'):
        assert name in text


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


@pytest.mark.parametrize('changed', ['real', 'fake'])
def test_goes_on_with_no_other_rois(changed, done, folders, tmp_path, capsys):
    workdir = shutil.copytree(done, tmp_path / 'experiment')
    sets = json.loads((workdir / 'sets.json').read_text())
    with open_sets(str(folders / 'cohort'), str(folders / 'fake'), experiment(), tmp_path) as (real, fake):
        assert sets == {'real': real.sha256, 'fake': fake.sha256}
    (workdir / 'sets.json').write_text(json.dumps(sets | {changed: sets[changed][::-1]}))
    assert command(folders, workdir) == 2
    assert f'config.{changed}={folders}' in capsys.readouterr().err
    assert (workdir / 'report.html').read_bytes() == (done / 'report.html').read_bytes()


def test_goes_on_with_no_other_weights(transferred, tmp_path):
    config, weights, workdir = transferred
    workdir = shutil.copytree(workdir, tmp_path / 'experiment')
    inputs = json.loads((workdir / 'sets.json').read_text())
    start = train_classifier.read_start(config, 'real_only')
    assert inputs['arms.real_only.weights'] == start.sha256
    others = {name: {**layer, 'more': np.zeros(1)} for name, layer in start.params.items()}
    assert dataclasses.replace(start, params=others).sha256 != start.sha256
    assert dataclasses.replace(start, patients=start.patients | {'another'}).sha256 != start.sha256
    (workdir / 'sets.json').write_text(json.dumps(inputs | {'arms.real_only.weights': 'another'}))
    message = rf'config\.arms\.real_only\.weights={weights} has changed since the experiment'
    with pytest.raises(InputError, match=message):
        train_classifier.run(config, workdir)


@pytest.fixture(scope='module')
def transferred(done, folders, tmp_path_factory):
    """An experiment with the frozen features of a part of another, killed in its first training and resumed."""
    workdir, weights = tmp_path_factory.mktemp('transferred'), done / 'parts' / 'synthetic' / 'run_0' / 'pretrain'
    config = experiment(real=str(folders / 'cohort'), **{'arms.real_only.frozen': True})
    config.arms.real_only.weights = str(weights)
    config.model.hidden = (3,)
    config.finetune.training.checkpoint_every = '2 steps'
    del config.arms.synthetic
    make_train_step, steps = classifier.make_train_step, []

    def dying(*arguments):
        step = make_train_step(*arguments)

        def one(*state_and_batch):
            steps.append(len(steps))
            if len(steps) == 4:
                raise KeyboardInterrupt
            return step(*state_and_batch)

        return one

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(classifier, 'make_train_step', dying)
        with pytest.raises(KeyboardInterrupt):
            train_classifier.run(config, workdir)
    train_classifier.run(config, workdir)
    return config, weights, workdir


def test_a_frozen_network_keeps_its_features_and_learns_a_new_head(transferred):
    _, weights, workdir = transferred
    given = read_checkpoint(weights, ('params', 'statistics'), 'best')[1]
    for number in range(2):
        folder = workdir / 'parts' / 'real_only' / f'run_{number}' / 'finetune'
        step, learnt = read_checkpoint(folder, ('params', 'statistics', 'optimizer'))
        assert step == 4
        assert given['params'].keys() - learnt['params'].keys() == set()
        assert learnt['params'].keys() - given['params'].keys() == {'head_0'}
        for name in given['params'].keys() - {'head'}:
            jax.tree.map(np.testing.assert_array_equal, learnt['params'][name], given['params'][name])
        jax.tree.map(np.testing.assert_array_equal, learnt['statistics'], given['statistics'])
        first = read_checkpoint(folder, ('params',), 2)[1]['params'] if number == 0 else None
        assert first is None or np.abs(first['head']['kernel'] - learnt['params']['head']['kernel']).max() > 1e-4
    found = json.loads((workdir / 'metrics.json').read_text())
    assert set(found['arms']) == {'real_only'}


def test_a_frozen_run_that_was_resumed_equals_one_that_was_not(transferred, folders, tmp_path):
    config, _, workdir = transferred
    mesh, cohort = partitioning.make_mesh({'data': 1}), str(folders / 'cohort')
    with open_sets(cohort, cohort, config, tmp_path) as sets:
        parts = plan(config, 'real_only', 0, sets)
        start = train_classifier.read_start(config, 'real_only')
        arm = config.arms.real_only
        train_classifier.train_stage(config, arm, 0, 'finetune', parts['finetune'], tmp_path / 'run', mesh, start)
    resumed, unbroken = (
        read_checkpoint(folder, ('params', 'statistics', 'optimizer'))[1]
        for folder in (workdir / 'parts' / 'real_only' / 'run_0' / 'finetune', tmp_path / 'run')
    )
    jax.tree.map(np.testing.assert_array_equal, resumed, unbroken)


def test_weights_that_know_held_out_patients_or_another_network_are_refused(transferred, folders, tmp_path, capsys):
    _, weights, workdir = transferred
    finetuned = workdir / 'parts' / 'real_only' / 'run_1' / 'finetune'
    start = ['--config.model.hidden=(3,)', f'--config.arms.real_only.weights={finetuned}']
    unfinished = tmp_path / 'unfinished'
    shutil.copytree(weights, unfinished)
    longer = (unfinished / 'config.json').read_text().replace('"duration": "4 steps"', '"duration": "9 steps"')
    (unfinished / 'config.json').write_text(longer)
    for more, message in (
        ([f'--config.arms.real_only.weights={unfinished}'], 'is unfinished (step 4 of 9)'),
        (start, 'its weights were learnt from patient'),
        ([*start, '--config.model.width=8'], 'conv/kernel is (7, 7, 7, 1, 4), not (7, 7, 7, 1, 8)'),
        ([*start, '--config.model.layout=medicalnet'], "has model.layout='hara', config.model.layout is 'medicalnet'"),
        ([f'--config.arms.real_only.weights={weights.parents[2]}'], 'holds no run'),
        (['--config.arms.real_only.frozen=True'], 'config.arms.real_only.weights is empty, but its features are'),
        (['--config.arms.real_only.weights=none.pth'], 'none.pth is no folder of a part of an experiment'),
        (['--config.model.layout=ours'], "config.model.layout='ours' is none of hara, medicalnet"),
        (['--config.model.hidden=(0,)'], 'config.model: 0 among width and hidden; expected whole numbers'),
    ):
        assert command(folders, tmp_path / 'out', *more) == 2
        printed = capsys.readouterr().err
        assert message in printed
        assert printed.count('\n') == 1


@pytest.mark.parametrize(
    ('more', 'message'),
    [
        (['--config.real='], 'config.real is empty'),
        (['--config.fake='], 'the arm synthetic wants synthetic ROIs'),
        (['--config.pretrain.training.best_metric=val/auc'], "'val/auc' is not evaluated; there are val/loss, val/acc"),
        (['--config.finetune.optimizer.learning_rate=0.0'], 'config.finetune.optimizer.learning_rate=0.0: expected mo'),
        (['--config.runs=1'], 'config.runs=1: at least 2'),
        (['--config.baseline=none'], "config.baseline='none' is none of real_only, synthetic"),
        (['--config.validation=0.6'], 'expected a share above 0 and under 1 / config.runs'),
        (['--config.model.depth=20'], 'config.model.depth=20 is none of 10, 18, 34, 50'),
        (['--config.arms.synthetic.pretrain_rois=50'], 'wants 50 synthetic ROIs of class LGG, of which there are 7'),
        (['--config.classes=("LGG","DIPG")'], 'no ROI of class DIPG'),
    ],
)
def test_bad_settings_are_told_before_any_training(more, message, folders, tmp_path, capsys):
    assert command(folders, tmp_path / 'out', *more) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count('\n') == 1


def keep(folder, labels, number):
    """Leaves `number` files of each of these classes."""
    for label in ('LGG', 'HGG'):
        for path in sorted((folder / label).iterdir())[number if label in labels else 0 :]:
            path.unlink()


def list_in_manifest(folder, **more):
    """A manifest of the files, and of more by class."""
    manifest = samples.Manifest(folder / samples.MANIFEST_FILE, [samples.KEY, 'class'])
    files = [(path.parent.name, path.relative_to(folder).as_posix()) for path in sorted(folder.rglob('*.nii.gz'))]
    for label, name in (*files, *more.items()):
        manifest.append({samples.KEY: name, 'class': label})


def learn_from_everyone(folder):
    """A record of a generator that was trained on the whole cohort."""
    everyone = frozenset(f'phantom_{label}_{number:04d}' for label in ('LGG', 'HGG') for number in range(9))
    write_learnt_from(folder, LearntFrom(everyone, frozenset()))


@pytest.mark.parametrize(
    ('spoil', 'more', 'message'),
    [
        (lambda f: keep(f, (), 0), (), 'no NIfTI file (.nii or .nii.gz), and is no prepared cohort'),
        (lambda f: keep(f, ('LGG',), 7), (), 'wants 4 synthetic ROIs of class HGG, of which there are 0'),
        (lambda f: keep(f, ('HGG',), 7), (), 'wants 4 synthetic ROIs of class LGG, of which there are 0'),
        (lambda f: keep(f, ('LGG', 'HGG'), 1), (), 'wants 4 synthetic ROIs of class LGG, of which there are 1'),
        (
            lambda f: keep(f, ('LGG', 'HGG'), 1),
            ['--config.arms.synthetic.pretrain_rois=0'],
            'arm synthetic, pretrain: 1 ROIs are too few for 2 disjoint validation sets of 1 and for training',
        ),
        (lambda f: list_in_manifest(f, GBM='LGG/none.nii.gz'), (), 'cohort has no ROI of class GBM, only of LGG, HGG'),
        (lambda f: list_in_manifest(f, LGG='LGG/none.nii.gz'), (), 'LGG/none.nii.gz: there is no such file'),
        (
            lambda f: (f / samples.MANIFEST_FILE).write_text('file,label\nLGG/0.nii.gz,LGG\n'),
            (),
            'manifest.csv has no column class',
        ),
        (learn_from_everyone, (), 'its generator was trained on patient phantom_HGG_000'),
        (lambda f: (f / 'learnt_from.json').write_text('{'), (), 'learnt_from.json is damaged'),
    ],
)
def test_synthetic_rois_that_cannot_be_used_are_told_in_one_line(spoil, more, message, folders, tmp_path, capsys):
    fake = tmp_path / 'fake'
    shutil.copytree(folders / 'fake', fake)
    spoil(fake)
    assert command(folders, tmp_path / 'out', f'--config.fake={fake}', *more) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count('\n') == 1
    assert not (tmp_path / 'out' / 'parts').exists()


def test_a_schedule_of_no_step_is_told_before_the_first_stage_is_trained(folders, tmp_path, capsys):
    assert command(folders, tmp_path / 'out', '--config.finetune.training.log_every=0.001 epochs') == 2
    assert "training.log_every: '0.001 epochs' is 0 steps" in capsys.readouterr().err
    assert not (tmp_path / 'out' / 'parts').exists()


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
