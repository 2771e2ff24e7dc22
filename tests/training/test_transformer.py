"""Stage 2's step against plain computations, on one device and on eight."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from vqroi_jax import hlo, masking
from vqroi_jax.errors import InputError
from vqroi_jax.training import partitioning, transformer
from vqroi_jax.training.checkpoints import Checkpoints

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'transformer.py'
CODES, CLASSES, GRID, ROWS = 11, 3, (2, 3, 4), 8
LENGTH = 24


def tiny_config(**changes):
    config = runpy.run_path(str(CONFIG))['get_config']('smoke')
    config.model.width = 16
    config.model.layers = 2
    config.model.heads = 4
    config.masking.top_k = 0.5
    config.optimizer.learning_rate = 1e-3
    config.update_from_flattened_dict(changes)
    return config


def make_recipe(**changes):
    return transformer.make_recipe(tiny_config(**changes), CODES, CLASSES, GRID, steps_per_epoch=10)


def tokens_and_scores():
    rng = np.random.default_rng(0)
    tokens = rng.integers(CODES, size=(ROWS, LENGTH)).astype(np.int32)
    scores = rng.uniform(0.1, 0.9, (ROWS, LENGTH)).astype(np.float32)
    return {'tokens': tokens, 'scores': scores, 'label': np.arange(ROWS, dtype=np.int32) % CLASSES}


@functools.cache
def start(**changes):
    recipe = make_recipe(**changes)
    return recipe, transformer.create_state(recipe, partitioning.make_mesh({'data': 1}))


def example_of(recipe, step=0):
    batch = tokens_and_scores()
    keys = transformer.draw_keys(recipe, jnp.int32(step), ROWS)
    return transformer.make_example(recipe, keys.masking, batch['tokens'], batch['scores'], batch['label'])


def assert_trees_close(actual, expected, relative):
    """Every leaf, to a share of its own largest value (or of 1e-3 of the largest anywhere).

    But for the keys' biases: they shift all logits of a query alike, so that their gradient is rounding alone, which
    Adam makes steps of.
    """
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for path, leaf in jax.tree.leaves_with_path(expected):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        if not name.endswith('key/bias'):
            other = dict(jax.tree.leaves_with_path(actual))[path]
            scale = max(float(jnp.abs(leaf).max()), 1e-3 * largest)
            np.testing.assert_allclose(other, leaf, rtol=0, atol=relative * scale, err_msg=name)


COMPILED = {}


def gradients_of(recipe, params, example):
    """Compiled once for all recipes of which it makes the same."""
    key = recipe.model, recipe.settings.micro_batches
    if key not in COMPILED:
        COMPILED[key] = jax.jit(functools.partial(transformer.gradients, recipe))
    return COMPILED[key](params, example)


def numpy_cross_entropy(logits, target):
    logits = np.asarray(logits, np.float64)
    logits = logits - logits.max(-1, keepdims=True)
    return np.log(np.exp(logits).sum(-1)) - np.take_along_axis(logits, target[..., None], -1)[..., 0]


def test_an_example_is_the_class_and_the_corrupted_tokens():
    recipe, _ = start()
    batch, example = tokens_and_scores(), example_of(start()[0])
    assert example.ids.shape == (ROWS, LENGTH)
    np.testing.assert_array_equal(example.ids[:, 0], CODES + 1 + batch['label'])
    corrupted = np.asarray(example.corrupted)
    assert (corrupted.sum(axis=1) == recipe.masking.corrupted).all()
    read, hidden = np.asarray(example.ids[:, 1:]), corrupted[:, :-1]
    np.testing.assert_array_equal(read[~hidden], batch['tokens'][:, :-1][~hidden])
    assert (read[hidden] == CODES).any()
    np.testing.assert_array_equal(example.target, batch['tokens'])
    assert (np.asarray(example.weight) == 1).all()

    both = make_recipe(**{'model.attention': 'bidirectional', 'loss_on': 'masked', 'masking.strategy': 'random_ratio'})
    example = example_of(both)
    assert example.ids.shape == (ROWS, LENGTH + 1)
    np.testing.assert_array_equal(example.ids[:, 1:] == CODES, example.corrupted)
    np.testing.assert_array_equal(example.weight, example.corrupted)
    shape = jax.eval_shape(lambda ids: both.model.init_with_output(jax.random.key(0), ids)[0], example.ids).shape
    assert shape == (ROWS, LENGTH + 1, CODES + 1 + CLASSES)


@pytest.mark.parametrize('loss_on', ['all', 'masked'])
def test_loss_is_the_mean_over_the_positions_that_count(loss_on):
    recipe, state = start(loss_on=loss_on)
    example = example_of(recipe)
    _, metrics = gradients_of(recipe, state.params, example)
    logits = transformer.token_logits(recipe, state.params, example.ids)
    losses, corrupted = numpy_cross_entropy(logits, np.asarray(example.target)), np.asarray(example.corrupted)
    expected = losses.mean() if loss_on == 'all' else losses[corrupted].mean()
    np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)
    right = (np.argmax(logits, -1) == example.target)[corrupted].mean()
    np.testing.assert_allclose(metrics['top1'], right, rtol=1e-6)


def test_a_position_sees_what_lies_before_it_and_never_itself():
    recipe, state = start()
    params = jax.tree.map(lambda p: p + 0.3 * jnp.sin(jnp.arange(p.size)).reshape(p.shape), state.params)
    ids = np.asarray(example_of(recipe).ids)
    logits = np.asarray(transformer.token_logits(recipe, params, ids))
    for place in (1, 10, LENGTH - 1):  # the token at `place` is read at position `place`: it tells token `place` and on
        changed = ids.copy()
        changed[:, place] = (changed[:, place] + 1) % CODES
        other = np.asarray(transformer.token_logits(recipe, params, changed))
        np.testing.assert_array_equal(other[:, :place], logits[:, :place])
        assert (np.abs(other[:, place] - logits[:, place]).max(-1) > 1e-3).all()


@pytest.mark.parametrize('changes', [{}, {'masking.strategy': 'random_ratio', 'loss_on': 'masked'}], ids=str)
def test_micro_batches_change_nothing(changes):
    recipe, state = start(**changes)
    parts = make_recipe(micro_batches=4, **changes)
    example = example_of(recipe)
    whole, metrics = gradients_of(recipe, state.params, example)
    summed, other = gradients_of(parts, state.params, example)
    assert_trees_close(summed, whole, 1e-5)
    np.testing.assert_allclose([other['loss'], other['top1']], [metrics['loss'], metrics['top1']], rtol=1e-5)


@pytest.mark.parametrize('remat', ['none', 'blocks'])
def test_rematerialisation_changes_nothing(remat):
    recipe, state = start()
    assert recipe.model.remat == 'activations'
    again = make_recipe(**{'model.remat': remat})
    example = example_of(recipe)
    expected, _ = gradients_of(recipe, state.params, example)
    actual, _ = gradients_of(again, state.params, example)
    assert_trees_close(actual, expected, 1e-5)


def test_steps_are_those_of_adamw_with_decay_on_kernels_alone():
    recipe, state = start(ema_decay=0.9)
    total = int(tiny_config().training.duration.split()[0])
    rate = optax.cosine_decay_schedule(1e-3, total, 1e-5 / 1e-3)
    kernels = jax.tree_util.tree_map_with_path(
        lambda path, _: 'embedding' not in path[0].key and path[-1].key == 'kernel', state.params
    )
    oracle = optax.adamw(rate, b1=0.9, b2=0.98, eps=1e-8, weight_decay=0.01, mask=kernels)
    moments, params, average = oracle.init(state.params), state.params, state.params
    update = jax.jit(functools.partial(transformer.update, recipe))
    for step in range(3):
        example = example_of(recipe, step)
        gradient, _ = gradients_of(recipe, params, example)
        updates, moments = oracle.update(gradient, moments, params)
        params = optax.apply_updates(params, updates)
        kept = min(0.9, (1 + step) / (10 + step))
        average = jax.tree.map(lambda a, p, kept=kept: kept * a + (1 - kept) * p, average, params)
        state, metrics = update(state, example)
        np.testing.assert_allclose(metrics['learning_rate'], rate(step), rtol=1e-6)
        assert metrics['finite']
    assert int(state.step) == 3
    assert_trees_close(state.params, params, 2e-3)  # Adam enlarges the rounding of gradients near zero
    assert_trees_close(state.average, average, 2e-3)
    assert {path[-1].key for path, decays in jax.tree.leaves_with_path(kernels) if decays} == {'kernel'}


@pytest.mark.parametrize(
    ('mesh_settings', 'changes'),
    [
        ({'data': 2, 'fsdp': 2, 'model': 2}, {'label_dropout': 0.2}),
        pytest.param({'data': 8}, {}, marks=pytest.mark.long),
        pytest.param({'fsdp': 8}, {'model.remat': 'blocks'}, marks=pytest.mark.long),
        pytest.param({'data': 4, 'model': 2}, {'micro_batches': 2}, marks=pytest.mark.long),
        pytest.param({'fsdp': 2, 'model': 4}, {'model.attention': 'bidirectional'}, marks=pytest.mark.long),
        pytest.param({'data': 4, 'fsdp': 2}, {'loss_on': 'masked'}, marks=pytest.mark.long),
        pytest.param({'data': 2, 'fsdp': 4}, {}, marks=pytest.mark.long),
        pytest.param({'data': 2, 'model': 4}, {}, marks=pytest.mark.long),
        pytest.param({'fsdp': 4, 'model': 2}, {}, marks=pytest.mark.long),
        pytest.param({'model': 8}, {'model.heads': 8}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_eight_devices_make_the_same_step_as_one(mesh_settings, changes, monkeypatch):
    monkeypatch.setattr(partitioning, 'FSDP_SMALLEST', 64)
    recipe, narrow = make_recipe(ema_decay=0.5, **changes), partitioning.make_mesh({'data': 1})
    wide = partitioning.make_mesh(mesh_settings)
    state = transformer.create_state(recipe, narrow)
    spread = transformer.create_state(recipe, wide)
    jax.tree.map(np.testing.assert_array_equal, spread.params, state.params)
    for params in (spread.params, spread.average, spread.optimizer[1].mu, spread.optimizer[1].nu):
        for name in ('query', 'up', 'down'):
            kernel = params['blocks'][name]['kernel']
            own = kernel.addressable_shards[0].data
            assert kernel.size == own.size * wide.shape['fsdp'] * wide.shape['model']
            assert len(own) == 2  # layers are never split
    steps = [transformer.jit_step(recipe, s, mesh) for s, mesh in ((state, narrow), (spread, wide))]
    batch = tokens_and_scores()
    for _ in range(2):
        spread = jax.device_put(jax.device_get(state), partitioning.state_shardings(state, wide))
        state, metrics = steps[0](state, partitioning.put_batch(batch, narrow))
        spread, other = steps[1](spread, partitioning.put_batch(batch, wide))
        assert_trees_close(spread.params, state.params, 1e-5)
        assert_trees_close(spread.average, state.average, 1e-5)
        for name in ('loss', 'top1', 'gradient_norm'):
            np.testing.assert_allclose(other[name], metrics[name], rtol=1e-5)


def test_a_run_goes_on_in_the_same_bits_on_other_devices(tmp_path, monkeypatch):
    monkeypatch.setattr(partitioning, 'FSDP_SMALLEST', 64)
    recipe = make_recipe(ema_decay=0.5)
    meshes = [partitioning.make_mesh(axes) for axes in ({'data': 2, 'fsdp': 2, 'model': 2}, {'fsdp': 8}, {'data': 1})]
    states = [transformer.create_state(recipe, mesh) for mesh in meshes]
    batch = partitioning.put_batch(tokens_and_scores(), meshes[0])
    # Waited for, as the loop does: a step of eight devices and slices of its results may starve each other of threads.
    saved, _ = jax.block_until_ready(transformer.jit_step(recipe, states[0], meshes[0])(states[0], batch))
    training = ml_collections.ConfigDict({'keep_last': 1, 'keep_best': 0, 'best_metric': '', 'best_mode': 'min'})
    with Checkpoints(tmp_path, training) as checkpoints:
        checkpoints.save(1, saved, {}, {})
        checkpoints.wait()
        for state in (saved, *states[1:]):
            restored = checkpoints.restore(state)[0]
            for there, here, place in zip(*map(jax.tree.leaves, (restored, saved, state)), strict=True):
                np.testing.assert_array_equal(np.asarray(there), np.asarray(here))
                assert there.sharding == place.sharding


def test_bfloat16_stays_near_and_leaves_parameters_in_float32():
    recipe, state = start()
    half = make_recipe(dtype='bfloat16')
    example = example_of(recipe)
    _, metrics = gradients_of(recipe, state.params, example)
    actual, other = gradients_of(half, state.params, example)
    np.testing.assert_allclose(other['loss'], metrics['loss'], rtol=2e-2)
    assert {leaf.dtype for leaf in jax.tree.leaves(actual)} == {jnp.dtype('float32')}
    jaxpr = jax.make_jaxpr(functools.partial(transformer.gradients, half))(state.params, example).jaxpr
    products = list(matrix_products(jaxpr))
    assert len(products) > 20
    wide = [product for product in products if any(x.aval.dtype == jnp.float32 for x in product.invars)]
    # Softmax is float32, so what flows back through it to queries and keys is, in JAX's own attention.
    assert len(wide) == 2
    assert all(product.invars[0].aval.ndim >= 4 for product in wide)


def matrix_products(jaxpr):
    """All matrix products of a program, also those in its loops."""
    for equation in jaxpr.eqns:
        if equation.primitive.name == 'dot_general':
            yield equation
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=lambda leaf: hasattr(leaf, 'eqns')):
            inner = getattr(value, 'jaxpr', value)
            if hasattr(inner, 'eqns'):
                yield from matrix_products(inner)


def test_a_step_that_is_not_finite_moves_nothing_but_its_number():
    recipe, state = start()
    poisoned = jax.tree.map(lambda p: p, state.params)
    poisoned['head'] = {'kernel': state.params['head']['kernel'].at[0, 0].set(jnp.nan)}
    state = state.replace(params=poisoned)
    after, metrics = jax.jit(functools.partial(transformer.update, recipe))(state, example_of(recipe))
    assert not metrics['finite']
    assert int(after.step) == 1
    jax.tree.map(np.testing.assert_array_equal, after.params, state.params)
    jax.tree.map(np.testing.assert_array_equal, after.optimizer, state.optimizer)


def test_labels_are_dropped_by_share_to_the_null_class():
    keys = jax.random.split(jax.random.key(0), 4000)
    label = np.arange(4000, dtype=np.int32) % CLASSES
    dropped = np.asarray(transformer.drop_labels(keys, label, CLASSES, 0.3))
    assert abs(np.mean(dropped == CLASSES) - 0.3) < 0.03
    np.testing.assert_array_equal(dropped[dropped != CLASSES], label[dropped != CLASSES])
    assert make_recipe(label_dropout=0.3).model.vocabulary == CODES + 1 + CLASSES + 1
    assert make_recipe().model.vocabulary == CODES + 1 + CLASSES


def test_a_step_draws_each_of_a_samples_views_as_often():
    rng = np.random.default_rng(0)
    tokens = rng.integers(CODES, size=(400, 4, LENGTH)).astype(np.int32)
    scores = rng.uniform(size=tokens.shape).astype(np.float32)
    drawn = transformer.draw_views(jax.random.split(jax.random.key(1), 400), tokens, scores)
    same = (np.asarray(drawn[0])[:, None] == tokens).all(axis=2)
    assert (same.sum(axis=1) == 1).all()
    assert (np.abs(same.mean(axis=0) - 0.25) < 0.07).all()
    np.testing.assert_array_equal(drawn[1], scores[same])


@pytest.mark.parametrize('devices', [1, 2])
def test_a_step_with_views_is_that_of_those_it_draws(devices):
    recipe, mesh = make_recipe(**{'augment.flip': ('width', 'depth')}), partitioning.make_mesh({'data': devices})
    rng = np.random.default_rng(0)
    tokens = rng.integers(CODES, size=(ROWS, 4, LENGTH)).astype(np.int32)
    scores = rng.uniform(size=tokens.shape).astype(np.float32)
    batch = {'tokens': tokens, 'scores': scores, 'label': np.zeros(ROWS, np.int32)}
    state = transformer.create_state(recipe, mesh)
    keys = transformer.draw_keys(recipe, jnp.int32(0), ROWS)
    drawn = transformer.draw_views(keys.view, tokens, scores)
    assert len({tuple((row == views).all(axis=1)) for row, views in zip(np.asarray(drawn[0]), tokens, strict=True)}) > 1
    example = transformer.make_example(recipe, keys.masking, *drawn, batch['label'])
    expected = gradients_of(start()[0], state.params, example)[1]['loss']
    _, metrics = transformer.jit_step(recipe, state, mesh)(state, partitioning.put_batch(batch, mesh))
    np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)


def test_views_are_drawn_where_they_are():
    mesh, sent = partitioning.make_mesh({'data': 8}), []
    for axes in ((), ('width', 'depth')):
        recipe = make_recipe(**{'augment.flip': axes})
        state, shape = transformer.state_shapes(recipe), (8, 4, LENGTH) if axes else (8, LENGTH)
        rows = {'tokens': (shape, jnp.int32), 'scores': (shape, jnp.float32), 'label': ((8,), jnp.int32)}
        batch = {name: jax.ShapeDtypeStruct(*of) for name, of in rows.items()}
        compiled = transformer.jit_step(recipe, state, mesh).lower(state, batch).compile()
        sent.append(hlo.read_cost(compiled.as_text()).sent)
    assert sent[0] == sent[1] > 0


def test_draws_depend_on_seed_step_and_row():
    recipe, _ = start()
    first = transformer.draw_keys(recipe, jnp.int32(3), 4)
    more = transformer.draw_keys(recipe, jnp.int32(3), 8)
    other = transformer.draw_keys(recipe, jnp.int32(4), 4)
    data = jax.random.key_data
    np.testing.assert_array_equal(data(first.masking), data(more.masking[:4]))
    assert (data(first.masking) != data(other.masking)).any(axis=-1).all()
    assert (data(first.masking) != data(first.label)).any(axis=-1).all()


@masking.register('first_half')
def first_half(key, tokens, scores, settings):
    """A strategy as a user would write it."""
    del key, scores
    return masking.Corruption.of(tokens, settings, start=jnp.arange(len(tokens)) < settings.corrupted)


@pytest.mark.parametrize('name', ['first_half', 'test_transformer:first_half'])
def test_training_takes_a_strategy_of_ones_own(name, monkeypatch):
    monkeypatch.syspath_prepend(str(pathlib.Path(__file__).parent))
    recipe, (_, state) = make_recipe(**{'masking.strategy': name}), start()
    example = example_of(recipe)
    np.testing.assert_array_equal(example.corrupted, np.tile(np.arange(LENGTH) < LENGTH // 2, (ROWS, 1)))
    _, metrics = gradients_of(start()[0], state.params, example)
    assert np.isfinite(metrics['loss'])


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'dtype': 'float16'}, "config.dtype='float16': choose one of float32, bfloat16"),
        ({'loss_on': 'some'}, "config.loss_on='some': choose one of all, masked"),
        ({'model.attention': 'both'}, "config.model.attention='both'"),
        ({'model.remat': 'all'}, "config.model.remat='all'"),
        ({'model.layers': 0}, 'config.model.layers=0'),
        ({'model.heads': 3}, 'config.model.width=16 does not divide by config.model.heads=3'),
        ({'label_dropout': 1.0}, 'config.label_dropout=1.0'),
        ({'augment.flip': ('up',)}, "config.augment.flip: 'up' is none of depth, height, width"),
        ({'augment.flip': ('width', 'width')}, r"config.augment.flip=\('width', 'width'\): expected each axis once"),
        ({'masking.top_k': 0.01}, r'config\.masking\.top_k=0\.01'),
        ({'masking.ratio': 0.0}, r'config\.masking\.ratio=0\.0'),
        ({'figure_rois': 0}, 'config.figure_rois=0: expected 1 or more'),
        ({'ema_decay': 1.0}, r'config.ema_decay=1.0: expected 0 .none. to below 1'),
        ({'optimizer.learning_rate': 0.0}, 'config.optimizer.learning_rate=0.0: expected more than 0'),
        ({'optimizer.weight_decay': -0.1}, 'config.optimizer.weight_decay=-0.1'),
        ({'training.duration': 'long'}, r'config\.training\.duration'),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        make_recipe(**changes)
