"""Stage 2's command from end to end at smoke size: what it leaves, what it measures, that stopping changes nothing."""

import contextlib
import itertools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqroi_jax import train_transformer
from vqroi_jax.errors import InputError, Stopped
from vqroi_jax.tokens import encode_cohort, find_cohort
from vqroi_jax.trained import Sampler, load_transformer, load_vqgan
from vqroi_jax.training import loop, partitioning, transformer
from vqroi_jax.training.checkpoints import read_checkpoint
from vqroi_jax.training.metric_writers import read_metrics
from vqroi_jax.workdir import read_config


def test_leaves_what_the_readme_says(tiny_transformer, tiny_vqgan):
    for name in ('config.json', 'stage1.json', 'parameters.txt', 'checkpoints/8', 'tensorboard'):
        assert (tiny_transformer / name).exists(), name
    for name in ('masking', 'completions', 'curves'):
        assert (tiny_transformer / 'figures' / f'{name}.png').exists(), name
    facts = json.loads((tiny_transformer / 'stage1.json').read_text())
    assert facts['workdir'] == str(tiny_vqgan)
    assert (facts['classes'], facts['grid'], facts['codes']) == (['LGG', 'HGG'], [4, 4, 4], 32)
    assert (facts['spacing'], facts['synthetic'], facts['step']) == ([8.0, 8.0, 8.0], True, 4)
    evaluations = [row for row in read_metrics(tiny_transformer / 'metrics.jsonl') if 'val/cross_entropy' in row]
    assert [row['step'] for row in evaluations] == [4, 8]
    assert evaluations[1]['val/cross_entropy'] < evaluations[0]['val/cross_entropy'] < np.log(35) + 0.1


def test_validation_equals_plain_loops_over_held_out_patients(tiny_transformer, tiny_transformer_config):
    config, last = tiny_transformer_config(), loop.last_evaluation(tiny_transformer)
    trained = load_transformer(tiny_transformer)
    assert trained.step == 8
    vqgan = trained.vqgan
    source = encode_cohort(vqgan, find_cohort(vqgan, ''), partitioning.make_mesh({'data': 1}))['val']
    recipe = transformer.make_recipe(config, 32, 2, vqgan.grid, 1.5)
    losses, right = {}, {}
    for index in range(len(source)):
        row = [np.asarray(part[index : index + 1]) for part in (source.tokens, source.scores, source.labels)]
        key = jax.random.fold_in(jax.random.key(config.seed), index)
        example = transformer.make_example(recipe, key[None], *row)
        logits = np.asarray(trained.model.apply({'params': trained.params}, example.ids), np.float64)[0]
        share = np.exp(logits) / np.exp(logits).sum(-1, keepdims=True)
        label, hidden = trained.classes[int(row[2][0])], np.asarray(example.corrupted[0])
        losses.setdefault(label, []).append(-np.log(share[np.arange(64), row[0][0]]))
        right.setdefault(label, []).append((logits.argmax(-1) == row[0][0])[hidden])
    for label in ('LGG', 'HGG'):
        np.testing.assert_allclose(last[f'val/cross_entropy/{label}'], np.mean(losses[label]), rtol=1e-4)
        np.testing.assert_allclose(last[f'val/top1/{label}'], np.mean(right[label]), rtol=1e-4, atol=1e-6)
    assert set(last) == set(train_transformer.evaluated_names(find_cohort(vqgan, '')))
    everything = np.concatenate([*losses['LGG'], *losses['HGG']])
    np.testing.assert_allclose(last['val/cross_entropy'], everything.mean(), rtol=1e-4)
    np.testing.assert_allclose(last['val/perplexity'], np.exp(everything.mean()), rtol=1e-4)


def state_of(folder):
    return read_checkpoint(folder, ('params', 'optimizer', 'average'))


@pytest.mark.parametrize('stop_after', [3])
def test_stopping_and_resuming_is_bit_identical(
    tiny_transformer, tiny_transformer_config, tmp_path, monkeypatch, stop_after
):
    asked = itertools.count(1)
    with monkeypatch.context() as patch:
        patch.setattr(loop, 'stop_requests', lambda: contextlib.nullcontext(lambda: next(asked) == stop_after))
        with pytest.raises(Stopped, match=f'stopped after step {stop_after}'):
            train_transformer.run(tiny_transformer_config(), tmp_path)
    train_transformer.run(tiny_transformer_config(), tmp_path)
    (step, expected), (resumed_step, actual) = state_of(tiny_transformer), state_of(tmp_path)
    assert step == resumed_step == 8
    jax.tree.map(np.testing.assert_array_equal, actual, expected)


def test_trains_on_mirrored_views(tiny_transformer_config, tmp_path):
    changes = {'augment.flip': ('width', 'depth'), 'training.duration': '2 steps', 'label_dropout': 0.5}
    train_transformer.run(tiny_transformer_config(**changes), tmp_path)
    assert np.isfinite(loop.last_evaluation(tmp_path)['val/cross_entropy'])


def test_a_bidirectional_model_trains_and_is_sampled_in_parallel(tiny_transformer_config, tmp_path):
    changes = {
        'model.attention': 'bidirectional',
        'masking.strategy': 'random_ratio',
        'loss_on': 'masked',
        'training.duration': '2 steps',
    }
    train_transformer.run(tiny_transformer_config(**changes), tmp_path)
    assert (tmp_path / 'figures' / 'completions.png').exists()
    assert not load_transformer(tmp_path).model.causal


def test_figures_keep_the_given_half(tiny_transformer, tiny_transformer_config, monkeypatch):
    seen = {}
    monkeypatch.setattr(
        train_transformer.viz, 'completions', lambda *arguments: seen.update(zip('origsxlih', arguments, strict=False))
    )
    trained = load_transformer(tiny_transformer)
    mesh, vqgan = partitioning.make_mesh({'data': 1}), trained.vqgan
    recipe = transformer.make_recipe(tiny_transformer_config(), 32, 2, vqgan.grid, 1.5)
    cohort = find_cohort(vqgan, '')
    source = encode_cohort(vqgan, cohort, mesh)['val']
    sampler = train_transformer.make_sampler(recipe, vqgan, mesh)
    state = transformer.TransformerState(jnp.int32(0), trained.params, None, None)
    kept = []
    tokens = Sampler.tokens
    monkeypatch.setattr(Sampler, 'tokens', lambda *arguments: kept.append(tokens(*arguments)) or kept[-1])
    train_transformer.make_figures(recipe, sampler, source, cohort)(state)
    half, whole = np.split(kept[0], 2)
    np.testing.assert_array_equal(half[:, :32], source.tokens[:, :32])
    assert (whole != source.tokens).any()
    originals, recons = seen['o'], seen['r']
    assert originals.shape == recons.shape == (2, 16, 16, 16)
    expected = np.asarray(vqgan.model.apply(vqgan.variables, originals[..., None], method='reconstruct'))[..., 0]
    np.testing.assert_allclose(recons, expected, atol=1e-4)


def test_shardings_are_printed_and_nothing_is_trained(tiny_transformer_config, tmp_path, capsys):
    changes = {'print_shardings': True, 'mesh.data': 1, 'mesh.fsdp': 4, 'mesh.model': 2, 'model.width': 128}
    train_transformer.run(tiny_transformer_config(**changes), tmp_path)
    rows = {line.split()[0]: ' '.join(line.split()[1:]) for line in capsys.readouterr().out.splitlines() if line}
    assert rows['params/blocks/up/kernel'] == f'(2, 128, 512) -, fsdp, model {2 * 128 * 512 * 4 // 8:,}'
    assert rows['params/blocks/query/bias'] == f'(2, 128) -, model {2 * 128 * 4 // 2:,}'
    assert rows['params/norm/scale'] == f'(128) whole {128 * 4:,}'
    assert 'optimizer' in rows
    assert rows['average'] == rows['params']
    assert not (tmp_path / 'checkpoints').exists()


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'vqgan_workdir': ''}, 'no --config.vqgan_workdir given; name the folder of a run of stage 1'),
        ({'vqgan_workdir': '/nowhere'}, '/nowhere holds no run'),
        ({'vqgan_checkpoint': '7'}, 'has no checkpoint of step 7; there are 4'),
        ({'vqgan_checkpoint': 'newest'}, "checkpoint 'newest': expected 'latest', 'best' or the number of a step"),
        ({'data.path': '/nowhere'}, '/nowhere holds no prepared cohort'),
        ({'batch_size': 5}, 'batch_size=5 does not divide by 2 device'),
        ({'training.best_metric': 'val/top2'}, 'training.best_metric.* there are val/cross_entropy, val/perplexity'),
        ({'seed': 2**32}, 'config.seed=4294967296: expected 0 to 2'),
        ({'mesh.model': -1, 'mesh.data': 1}, 'config.model.heads=2 does not divide by config.mesh.model=8'),
        ({'masking.strategy': 'nobody'}, "config.masking.strategy='nobody'"),
        ({'sampling.top_k': 33}, 'sampling.top_k=33: expected 0 .off. to 32'),
        ({'sampling.sub_batch': 0}, 'sampling.sub_batch=0'),
        ({'sampling.guidance': 1.0}, 'the model has no null class'),
    ],
    ids=str,
)
def test_bad_settings_are_told_before_any_work(tiny_transformer_config, tmp_path, changes, words, monkeypatch):
    def too_late(*unused):
        raise AssertionError('compiled something')

    monkeypatch.setattr(train_transformer, 'encode_cohort', too_late)
    with pytest.raises(InputError, match=words):
        train_transformer.run(tiny_transformer_config(**changes), tmp_path)
    assert not (tmp_path / 'stage1.json').exists()


def copy_of_stage1(tiny_vqgan, folder, **config_changes):
    """The run under another name, its files linked, its config changed."""
    folder.mkdir()
    for path in tiny_vqgan.iterdir():
        if path.name not in ('config.json', 'tokens'):
            (folder / path.name).symlink_to(path)
    config = json.loads((tiny_vqgan / 'config.json').read_text())
    for name, value in config_changes.items():
        block, _, field = name.partition('.')
        config[block][field] = value
    (folder / 'config.json').write_text(json.dumps(config))
    return folder


def test_an_unfinished_stage_1_is_refused_unless_its_step_is_named(tiny_vqgan, tiny_transformer_config, tmp_path):
    stage1 = copy_of_stage1(tiny_vqgan, tmp_path / 'stage1', **{'training.duration': '9 steps'})
    with pytest.raises(InputError, match=r'unfinished \(step 4 of 9\).*--config.vqgan_checkpoint=4'):
        train_transformer.run(tiny_transformer_config(vqgan_workdir=str(stage1)), tmp_path / 'run')
    changes = {'vqgan_workdir': str(stage1), 'vqgan_checkpoint': '4', 'training.duration': '1 steps'}
    train_transformer.run(tiny_transformer_config(**changes), tmp_path / 'run')


def test_a_step_of_the_warm_up_is_refused_for_it_has_no_codebook(tiny_vqgan, tiny_transformer_config, tmp_path):
    stage1 = copy_of_stage1(tiny_vqgan, tmp_path / 'stage1', **{'codebook.warmup': '4 steps'})
    config = tiny_transformer_config(vqgan_workdir=str(stage1), vqgan_checkpoint='4')
    with pytest.raises(InputError, match=r'step 4 of stage 1 in .* belongs to its warm-up \(4 steps\)'):
        train_transformer.run(config, tmp_path / 'run')


def test_a_run_of_another_stage_is_refused(tiny_transformer, tiny_transformer_config, tmp_path):
    with pytest.raises(InputError, match=r"is no run of stage 1: its task is 'transformer'"):
        train_transformer.run(tiny_transformer_config(vqgan_workdir=str(tiny_transformer)), tmp_path)


def test_a_cohort_of_other_sizes_is_refused(tiny_vqgan, tiny_transformer_config, tmp_path):
    from vqroi_jax.prepare import prepare

    data = load_vqgan(tiny_vqgan).config.data.copy_and_resolve_references().unlock()
    data.roi_size = (24, 24, 24)
    prepare(data, tmp_path / 'cohort')
    with pytest.raises(InputError, match=r'ROIs of \(24, 24, 24\) voxels, stage 1 was trained on \(16, 16, 16\)'):
        train_transformer.run(tiny_transformer_config(**{'data.path': str(tmp_path / 'cohort')}), tmp_path / 'run')


def test_a_run_does_not_go_on_with_another_stage_1(tiny_transformer, tiny_transformer_config, tmp_path):
    shutil.copytree(tiny_transformer, tmp_path, dirs_exist_ok=True)
    facts = json.loads((tmp_path / 'stage1.json').read_text())
    (tmp_path / 'stage1.json').write_text(json.dumps({**facts, 'identity': '0' * 16}))
    with pytest.raises(InputError, match=r'started with another stage 1 or cohort .identity 0000000000000000 then'):
        train_transformer.run(tiny_transformer_config(), tmp_path)


def test_a_run_goes_on_with_its_stage_1_at_another_place_and_with_no_other(
    tiny_vqgan, tiny_transformer, tiny_transformer_config, tmp_path, monkeypatch
):
    begun = []
    monkeypatch.setattr(train_transformer, 'train', lambda config, folder: begun.append(config.vqgan_workdir))
    run, moved = tmp_path / 'run', copy_of_stage1(tiny_vqgan, tmp_path / 'moved')
    run.mkdir()
    recorded = (tiny_transformer / 'config.json').read_text()
    (run / 'config.json').write_text(recorded)
    facts = json.loads((tiny_transformer / 'stage1.json').read_text())
    (run / 'stage1.json').write_text(json.dumps({**facts, 'identity': '0' * 16}))
    config = tiny_transformer_config(vqgan_workdir=str(moved))
    with pytest.raises(InputError, match=rf'^{moved} is not the stage 1 that {run} was started with'):
        train_transformer.run(config, run)
    assert (run / 'config.json').read_text() == recorded
    (run / 'stage1.json').write_text(json.dumps(facts))
    train_transformer.run(config, run)
    assert begun == [read_config(run).vqgan_workdir] == [str(moved)]
