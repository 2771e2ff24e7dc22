"""The classifier's step: its gradient, its norms over the whole batch, and that it learns."""

import dataclasses

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest
import scipy.special

from vqroi_jax.models.resnet3d import ResNet3D
from vqroi_jax.training import classifier, optimizers, partitioning

SHAPE = (16, 16, 16)
AUGMENT = ml_collections.ConfigDict({'flip': True, 'rotation': 20.0, 'scale': 1.2, 'elastic': 0.02})


def recipe(rate=1e-2, augment=None, frozen=False, **changes):
    settings = ml_collections.ConfigDict({'b1': 0.9, 'b2': 0.999, 'epsilon': 1e-8, 'clip_value': 0.0})
    return classifier.Recipe(
        model=ResNet3D(10, 2, width=4, **changes),
        optimizer=optimizers.make_optimizer(settings),
        rate=optax.constant_schedule(rate),
        alpha=(0.7, 1.3),
        gamma=2.0,
        augment=augment,
        spacing=(1.0, 1.0, 1.0),
        seed=0,
        frozen=frozen,
    )


def batch(rows=8, seed=0):
    """Class 1 has a dark core."""
    rng = np.random.default_rng(seed)
    volume = np.full((rows, *SHAPE, 1), -1.0, np.float32)
    volume[:, 3:13, 3:13, 3:13] = rng.uniform(0.2, 1, (rows, 10, 10, 10, 1))
    label = np.arange(rows, dtype=np.int32) % 2
    volume[label == 1, 6:10, 6:10, 6:10] = -0.8
    return {'volume': volume, 'label': label}


def step_on(devices, how):
    mesh = partitioning.make_mesh({'data': devices})
    state = classifier.create_state(how, SHAPE, mesh)
    return classifier.make_train_step(how, mesh)(state, partitioning.put_batch(batch(), mesh))


@pytest.mark.parametrize('augment', [pytest.param(None, marks=pytest.mark.long), AUGMENT])
def test_eight_devices_equal_one(augment):
    one, eight = (step_on(devices, recipe(augment=augment)) for devices in (1, 8))
    np.testing.assert_allclose(one[1]['loss'], eight[1]['loss'], rtol=1e-5)
    np.testing.assert_allclose(one[1]['gradient_norm'], eight[1]['gradient_norm'], rtol=1e-3)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5), one[0].statistics, eight[0].statistics
    )


def test_first_step_is_adams_on_the_focal_losss_gradient():
    how = recipe()
    mesh = partitioning.make_mesh({'data': 1})
    state = classifier.create_state(how, SHAPE, mesh)
    params, statistics = jax.device_get((state.params, state.statistics))
    rows = batch()

    def loss(params):
        logits, _ = how.model.apply(
            {'params': params, 'batch_stats': statistics}, rows['volume'], train=True, mutable=['batch_stats']
        )
        probability = jax.nn.softmax(logits)[jnp.arange(8), rows['label']]
        alpha = jnp.array([0.7, 1.3])[rows['label']]
        return jnp.mean(-alpha * (1 - probability) ** 2 * jnp.log(probability))

    expected, gradient = jax.jit(jax.value_and_grad(loss))(params)
    after, metrics = classifier.make_train_step(how, mesh)(state, partitioning.put_batch(rows, mesh))
    np.testing.assert_allclose(metrics['loss'], expected, rtol=1e-5)

    def check(before, now, slope):
        # Adam's first step is the rate along the gradient's sign, where that is not lost in rounding.
        clear = np.abs(slope) > 1e-4
        np.testing.assert_allclose((now - before)[clear], -1e-2 * np.sign(slope)[clear], rtol=1e-2)

    jax.tree.map(check, params, jax.device_get(after.params), jax.device_get(gradient))
    assert after.step == 1


@pytest.mark.long
def test_learns_to_tell_cores():
    how, mesh = recipe(rate=3e-3), partitioning.make_mesh({'data': 1})
    state = classifier.create_state(how, SHAPE, mesh)
    step = classifier.make_train_step(how, mesh)
    losses = []
    for number in range(60):
        state, metrics = step(state, partitioning.put_batch(batch(seed=number), mesh))
        losses.append(float(metrics['loss']))
    assert losses[-1] < losses[0] / 3
    logits = classifier.make_logits(how, mesh)(state.params, state.statistics, batch(seed=99)['volume'])
    assert np.mean(np.argmax(logits, axis=1) == batch()['label']) >= 0.75


def test_a_step_that_is_not_finite_moves_nothing_but_its_number():
    how, mesh = recipe(), partitioning.make_mesh({'data': 1})
    state = classifier.create_state(how, SHAPE, mesh)
    before = jax.device_get(state)
    bad = batch()
    bad['volume'][0, 0] = np.nan
    after, metrics = classifier.make_train_step(how, mesh)(state, partitioning.put_batch(bad, mesh))
    assert not metrics['finite']
    assert after.step == 1
    jax.tree.map(np.testing.assert_array_equal, jax.device_get(after.replace(step=before.step)), before)


def test_goes_on_from_given_values():
    how, mesh = recipe(), partitioning.make_mesh({'data': 1})
    first = classifier.create_state(how, SHAPE, mesh)
    start = jax.tree.map(lambda leaf: np.asarray(leaf) + 1, {'params': first.params, 'statistics': first.statistics})
    state = classifier.create_state(how, SHAPE, mesh, start)
    jax.tree.map(np.testing.assert_array_equal, state.params, start['params'])
    jax.tree.map(np.testing.assert_array_equal, state.statistics, start['statistics'])
    assert not any(np.any(leaf) for leaf in jax.tree.leaves(state.optimizer))


def test_frozen_features_stay_and_the_head_learns_as_if_they_were_given():
    how, mesh = recipe(frozen=True, hidden=(6,)), partitioning.make_mesh({'data': 1})
    free = dataclasses.replace(how, frozen=False)
    start = jax.device_get(classifier.create_state(free, SHAPE, mesh))
    features = {name: layer for name, layer in start.params.items() if not name.startswith('head')}
    # Statistics of their own, so that it shows whether they or the batch's are used.
    statistics = jax.tree.map(lambda leaf: 0.8 * leaf, start.statistics)
    state = classifier.create_state(how, SHAPE, mesh, {'params': features, 'statistics': statistics})
    assert {leaf.shape for leaf in jax.tree.leaves(state.optimizer)} <= {(), (32, 6), (6,), (6, 2), (2,)}
    step, rows, before = classifier.make_train_step(how, mesh), batch(), start.params
    jax.tree.map(np.testing.assert_array_equal, state.params, before)  # drawn by the seed, whatever was given

    _, seen = how.model.apply({'params': before, 'batch_stats': statistics}, rows['volume'], mutable=['intermediates'])
    pooled = np.mean(seen['intermediates']['features'][0], axis=(1, 2, 3))
    hidden = np.maximum(pooled @ before['head_0']['kernel'] + before['head_0']['bias'], 0)
    logits = hidden @ before['head']['kernel'] + before['head']['bias']
    right = scipy.special.softmax(logits, axis=1)[np.arange(8), rows['label']]
    expected = np.mean(-np.array([0.7, 1.3])[rows['label']] * (1 - right) ** 2 * np.log(right))
    losses = []
    for _ in range(10):
        state, metrics = step(state, partitioning.put_batch(rows, mesh))
        losses.append(float(metrics['loss']))
    assert losses[0] == pytest.approx(expected, rel=1e-4)
    assert losses[-1] < losses[0]
    after = jax.device_get(state)
    jax.tree.map(np.testing.assert_array_equal, {name: after.params[name] for name in features}, features)
    jax.tree.map(np.testing.assert_array_equal, after.statistics, statistics)
    for name in ('head_0', 'head'):
        assert np.abs(after.params[name]['kernel'] - before[name]['kernel']).max() > 1e-2


def test_bfloat16_keeps_parameters_statistics_and_loss_in_float32_and_near():
    (exact, _), (rough, metrics) = (step_on(1, recipe(dtype=dtype)) for dtype in (jnp.float32, jnp.bfloat16))
    assert {leaf.dtype for leaf in jax.tree.leaves((rough.params, rough.statistics))} == {jnp.dtype('float32')}
    assert metrics['loss'].dtype == jnp.float32
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=0.05, atol=0.02), exact.statistics, rough.statistics
    )
