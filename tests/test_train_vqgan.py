"""Stage 1's command from end to end at smoke size: what it leaves, and that stopping changes nothing."""

import contextlib
import dataclasses
import itertools
import json
import pathlib
import runpy
from types import SimpleNamespace

import jax
import numpy as np
import pytest

from vqroi_jax import train_vqgan
from vqroi_jax.data import pipeline
from vqroi_jax.errors import InputError, Stopped
from vqroi_jax.prepare import prepare
from vqroi_jax.training import loop
from vqroi_jax.training.checkpoints import best_step, read_checkpoint
from vqroi_jax.training.metric_writers import read_metrics
from vqroi_jax.training.vqgan import VQGANState
from vqroi_jax.workdir import open_workdir

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def smoke_config(**changes):
    config = runpy.run_path(str(CONFIGS / 'vqgan.py'))['get_config']('smoke')
    config.data.phantom.spacing = 8.0
    config.data.phantom.patients = 5
    config.data.roi_size = (16, 16, 16)
    config.data.split.val = config.data.split.test = 1.0
    config.model.channels = (8,)
    config.model.encoder_res_blocks = config.model.decoder_res_blocks = (0,)
    config.discriminator.channels = (8,)
    config.mesh.data = config.mesh.spatial = 2
    config.batch_size, config.eval_batch_size = 4, 3  # of which the latter does not divide by two devices
    config.ema_decay = 0.9
    config.training.duration = '8 steps'
    config.training.eval_every = config.training.checkpoint_every = '4 steps'
    config.training.figures_every = '8 steps'
    config.losses.adversarial_start = '6 steps'
    config.update_from_flattened_dict(changes)
    return config


@pytest.fixture(scope='module')
def cohort(tmp_path_factory):
    folder = tmp_path_factory.mktemp('cohort')
    prepare(smoke_config().data, folder)
    return folder


@pytest.fixture(scope='module')
def finished(cohort, tmp_path_factory):
    """A run that was never stopped."""
    folder = tmp_path_factory.mktemp('whole')
    train_vqgan.run(smoke_config(**{'data.path': str(cohort)}), folder)
    return folder


def state_of(folder):
    fields = ('params', 'discriminator', 'codebook', 'optimizer', 'discriminator_optimizer', 'average')
    return read_checkpoint(folder, fields)


def test_leaves_what_the_readme_says(finished, cohort):
    assert json.loads((finished / 'config.json').read_text())['data']['path'] == str(cohort)
    for name in ('parameters.txt', 'figures/reconstructions.png', 'figures/curves.png', 'checkpoints/8'):
        assert (finished / name).exists(), name
    assert list((finished / 'tensorboard').iterdir())
    evaluations = [row for row in read_metrics(finished / 'metrics.jsonl') if 'val/l1' in row]
    assert [row['step'] for row in evaluations] == [8]  # at 4 there is no codebook yet
    for name in ('val/psnr/HGG', 'val/psnr_box/LGG', 'val/ssim', 'val/accuracy', 'val/perplexity', 'val/live_codes'):
        assert np.isfinite(evaluations[-1][name]), name
    overall = evaluations[-1]['val/psnr']  # one held-out patient of each class
    np.testing.assert_allclose(overall, np.mean([evaluations[-1][f'val/psnr/{c}'] for c in ('LGG', 'HGG')]), rtol=1e-5)


def test_validation_equals_plain_loops_over_the_reconstructions(finished, cohort):
    config = smoke_config(**{'data.path': str(cohort)})
    recipe = train_vqgan.vqgan.make_recipe(config, 2, 1.5)
    _, stored = read_checkpoint(finished, ('average', 'codebook'))
    variables = {'params': stored['average'], 'codebook': {'codebook': stored['codebook']}}
    source = pipeline.open_cohort(cohort).split('val')
    counts, psnr = np.zeros(config.codebook.codes), []
    for i in range(len(source)):
        volume = source.volume(i)
        fake = np.asarray(recipe.model.apply(variables, volume[None], method='reconstruct'))[0]
        psnr.append(10 * np.log10(4 / np.mean((fake - volume) ** 2)))
        tokens = np.asarray(recipe.model.apply(variables, volume[None], method='index_quantize'))
        counts += np.bincount(tokens.ravel(), minlength=len(counts))
    share = counts[counts > 0] / counts.sum()
    last = loop.last_evaluation(finished)
    np.testing.assert_allclose(last['val/psnr'], np.mean(psnr), rtol=1e-4)
    np.testing.assert_allclose(last['val/perplexity'], np.exp(-(share * np.log(share)).sum()), rtol=1e-4)
    np.testing.assert_allclose(last['val/live_codes'], np.mean(counts > 0))
    assert set(last) == set(train_vqgan.evaluated_names(pipeline.open_cohort(cohort)))
    assert 'val/ssim' in last
    assert 'ssim' not in train_vqgan.measured((8, 16, 20))  # no room for its window


def test_nothing_is_measured_or_best_in_the_warm_up(finished):
    config = smoke_config()
    assert config.codebook.warmup == config.training.eval_every == '4 steps'
    measured = [row['step'] for row in read_metrics(finished / 'metrics.jsonl') if 'val/l1' in row]
    assert measured == [8]
    assert best_step(finished) == 8


@pytest.mark.parametrize('stop_after', [3, pytest.param(5, marks=pytest.mark.long)])
def test_stopping_and_resuming_is_bit_identical(finished, cohort, tmp_path, monkeypatch, stop_after):
    """Stopped before and after the codebook's initialisation at step 4, off the checkpoints' rhythm."""
    config = smoke_config(**{'data.path': str(cohort)})
    with monkeypatch.context() as patch:
        patch.setattr(loop, 'stop_requests', lambda: stopping_after(stop_after))
        with pytest.raises(Stopped, match=f'stopped after step {stop_after}'):
            train_vqgan.run(config, tmp_path)
    train_vqgan.run(config, tmp_path)
    (step, expected), (resumed_step, actual) = state_of(finished), state_of(tmp_path)
    assert step == resumed_step == 8
    jax.tree.map(np.testing.assert_array_equal, actual, expected)
    rows = [
        [{k: v for k, v in row.items() if not k.startswith('perf/')} for row in read_metrics(f / 'metrics.jsonl')]
        for f in (finished, tmp_path)
    ]
    assert rows[0] == [row for row in rows[1] if set(row) != {'step'}]


def test_a_run_does_not_go_on_with_other_rois(finished, cohort, tmp_path):
    for name in ('checkpoints', 'learnt_from.json'):
        (tmp_path / name).symlink_to(finished / name)
    (tmp_path / 'config.json').write_text((finished / 'config.json').read_text())
    recorded = json.loads((finished / 'training_rois.json').read_text())
    (tmp_path / 'training_rois.json').write_text(json.dumps({**recorded, 'identity': '0' * 16}))
    with pytest.raises(
        InputError, match=r'was started with other ROIs than its cohort has now .* 0000000000000000 then'
    ):
        train_vqgan.run(smoke_config(**{'data.path': str(cohort)}), tmp_path)


def test_processes_connect_before_one_of_them_prepares(monkeypatch, tmp_path):
    """The others wait meanwhile, which may take longer than a connection's first try."""
    done = []
    monkeypatch.setattr(train_vqgan.jax, 'process_count', lambda: 2)
    monkeypatch.setattr(train_vqgan.multihost_utils, 'sync_global_devices', done.append)
    monkeypatch.setattr(
        train_vqgan, 'prepare', lambda data, folder: done.append('prepare') or SimpleNamespace(folder=tmp_path)
    )
    monkeypatch.setattr(train_vqgan.pipeline, 'open_cohort', lambda folder: None)
    train_vqgan.open_cohort(smoke_config(), tmp_path)
    assert done == ['cohort wanted', 'prepare', 'cohort prepared']


def stopping_after(steps):
    asked = itertools.count(1)
    return contextlib.nullcontext(lambda: next(asked) == steps)


@pytest.mark.long
def test_one_patient_trains_without_validation(cohort, tmp_path, capsys):
    data = smoke_config().data
    folder = next((cohort / 'phantom' / 'HGG').iterdir())
    alone = tmp_path / 'cohort' / 'HGG' / folder.name
    alone.parent.mkdir(parents=True)
    alone.symlink_to(folder)
    changes = {'data.path': str(tmp_path / 'cohort'), 'training.duration': '5 steps', 'batch_size': 2, 'mesh.data': 1}
    train_vqgan.run(smoke_config(**changes), tmp_path / 'run')
    printed = capsys.readouterr().out
    assert 'all go to training' in printed
    assert 'no held-out patients' in printed
    assert (tmp_path / 'run' / 'figures' / 'reconstructions.png').exists()
    assert data.split.val == 1.0


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'batch_size': 5}, 'batch_size=5 does not divide by 2 device'),
        ({'eval_batch_size': 0}, 'config.eval_batch_size=0: expected 1 or more'),
        ({'mesh.data': 9}, 'there are 8 cpu devices'),
        ({'mesh.data': 1, 'mesh.spatial': 3}, 'mesh.spatial=3 does not divide the 8 depth slices'),
        ({'data.roi_size': (16, 16, 15)}, 'width 15 does not divide by 2'),
        ({'training.duration': 'long'}, 'training.duration'),
        ({'training.best_metric': 'val/ll'}, 'training.best_metric.* there are val/l1, val/psnr'),
        ({'codebook.warmup': '8 steps'}, "codebook.warmup='8 steps'.* less than config.training.duration='8 steps'"),
        ({'seed': -1}, 'config.seed=-1: expected 0 to 2'),
        ({'training.log_every': '0.01 epochs'}, 'training.log_every: .* a smaller batch_size'),
    ],
    ids=str,
)
def test_bad_settings_are_told_before_any_work(cohort, tmp_path, change, words, monkeypatch):
    def too_late(*unused):
        raise AssertionError('compiled something')

    monkeypatch.setattr(train_vqgan.vqgan, 'create_state', too_late)
    with pytest.raises(InputError, match=words):
        train_vqgan.run(smoke_config(**{'data.path': str(cohort), **change}), tmp_path)
    assert not (tmp_path / 'config.json').exists()


def test_shardings_are_printed_and_nothing_is_trained(cohort, tmp_path, capsys):
    changes = {'data.path': str(cohort), 'mesh.fsdp': 4, 'mesh.spatial': 1, 'batch_size': 8, 'eval_batch_size': 8}
    train_vqgan.run(smoke_config(**changes, print_shardings=True), tmp_path)
    lines = capsys.readouterr().out.splitlines()
    cells = [line.split() for line in lines]
    # 8³ tokens of 8 numbers, and 128 hidden units
    assert ['params/classifier/hidden/kernel', '(4096,', '128)', 'fsdp,', '-', f'{4096 * 128 * 4 // 4:,}'] in cells
    assert ['discriminator/logits/kernel', '(4,', '4,', '4,', '8,', '1)', 'whole', f'{4**3 * 8 * 4:,}'] in cells
    assert 'on 8 device(s): data 2, fsdp 4, model 1, spatial 1' in lines
    own = {row[0]: int(row[1].replace(',', '')) for row in cells[-8:-1]}
    assert list(own) == [field.name for field in dataclasses.fields(VQGANState)]
    in_all, whole = (int(number.replace(',', '')) for number in (cells[-1][2], cells[-1][-1]))
    assert sum(own.values()) == in_all < whole
    # That the config was looked at so keeps nothing from running.
    train_vqgan.run(smoke_config(**changes, print_shardings=True), tmp_path)
    with open_workdir(tmp_path, smoke_config(**changes)):
        pass


def test_a_collapsed_codebook_is_told():
    warn = train_vqgan._codebook_warnings
    assert warn({'quantised': 1.0, 'perplexity': 40.0, 'dead_codes': 0.1}, 64) == []
    assert warn({'quantised': 0.0, 'perplexity': 1.0, 'dead_codes': 1.0}, 64) == []
    (line,) = warn({'quantised': 1.0, 'perplexity': 1.01, 'dead_codes': 0.98}, 64)
    assert '1.0 of 64 codes' in line
    assert '98% are dead' in line
