"""The optimiser against optax's own, what it leaves alone, and that it needs no room for a copy of its state."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import pytest

from vqroi_jax.training import optimizers

SETTINGS = {'b1': 0.5, 'b2': 0.9, 'epsilon': 1e-8, 'clip_value': 0.0, 'weight_decay': 0.01}
RATE = jnp.float32(1e-2)


def decayed(params):
    return jax.tree.map(lambda p: p.ndim > 1, params)


def make(**changes):
    settings = ml_collections.ConfigDict(SETTINGS | changes)
    return optimizers.make_optimizer(settings, decayed)


def draw(seed, width=4):
    keys = jax.random.split(jax.random.key(seed))
    return {'kernel': jax.random.normal(keys[0], (width, width)), 'bias': jax.random.normal(keys[1], (width,))}


def assert_trees_equal(one, other, compare=np.testing.assert_array_equal):
    assert jax.tree.structure(one) == jax.tree.structure(other)
    jax.tree.map(compare, one, other)


def assert_trees_close(one, other):
    assert_trees_equal(one, other, lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-7))


@pytest.mark.parametrize('clip_value', [0.0, 0.3])
def test_steps_are_optaxs(clip_value):
    optimizer, params = make(clip_value=clip_value), draw(0)
    reference = optax.chain(
        optax.clip(clip_value) if clip_value else optax.identity(),
        optax.scale_by_adam(b1=0.5, b2=0.9, eps=1e-8),
        optax.add_decayed_weights(0.01, mask=decayed),
        optax.scale(-RATE),
    )
    theirs, their_state, state = params, reference.init(params), optimizer.init(params)
    step = jax.jit(optimizers.step, static_argnums=0)
    for n in range(5):
        gradient = draw(n + 1)
        params, state = step(optimizer, gradient, params, state, RATE, True)
        updates, their_state = reference.update(gradient, their_state, theirs)
        theirs = optax.apply_updates(theirs, updates)
    assert_trees_close(params, theirs)
    assert_trees_close(state[1], their_state[1])


def test_nothing_moves_where_it_must_not():
    optimizer, params = make(), draw(0)
    params, state = optimizers.step(optimizer, draw(1), params, optimizer.init(params), RATE, jnp.asarray(True))
    broken = jax.tree.map(lambda g: g * jnp.nan, draw(2))
    after = optimizers.step(optimizer, broken, params, state, RATE, jnp.asarray(False))
    assert_trees_equal(after, (params, state))
    assert_trees_equal(optimizers.moving_average(broken, params, 0.9, 500, jnp.asarray(False)), params)


def test_the_moving_average_is_its_formula():
    params, average = draw(0), draw(1)
    for step, kept in ((0, 0.1), (10, 11 / 20), (80, 0.9), (500, 0.9)):
        moved = optimizers.moving_average(params, average, 0.9, jnp.asarray(step), jnp.asarray(True))
        assert_trees_close(moved, jax.tree.map(lambda p, a, kept=kept: (1 - kept) * p + kept * a, params, average))
    assert optimizers.moving_average(params, None, 0.9, jnp.asarray(0), jnp.asarray(True)) is None


def test_a_step_in_place_needs_no_second_copy_of_the_state():
    """Two moments and the parameters are computed of each other's old values, which XLA may not overwrite too early."""
    optimizer, params = make(), draw(0, width=512)

    def step(gradient, params, state, average, number, moving):
        norm = optax.tree.norm(gradient)
        params, state = optimizers.step(optimizer, gradient, params, state, RATE, moving)
        return params, state, optimizers.moving_average(params, average, 0.9, number, moving), norm

    arrays = params, params, optimizer.init(params), params, jnp.asarray(7), jnp.asarray(True)
    compiled = jax.jit(step, donate_argnums=(1, 2, 3)).lower(*arrays).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < params['kernel'].nbytes / 10
