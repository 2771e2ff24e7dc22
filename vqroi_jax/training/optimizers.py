"""Optimisers as the recipes of the design name them; the learning rate is applied by the step, by global step.

Keeping the rate outside lets a network that starts late (the discriminator) stand at the schedule's present value.
"""

import math
from collections.abc import Callable
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import ml_collections
import optax

from vqroi_jax.errors import check_fields

Tree = TypeVar('Tree')


def check(settings: ml_collections.ConfigDict, field: str) -> None:
    """Refuses settings of an optimiser that it cannot use.

    Args:
        settings: the block, as `make_optimizer` and `cosine_rate` read it.
        field: of the config, for the message.

    Raises:
        InputError: naming the field and what would do.
    """
    fields = (
        ('learning_rate', 0 < settings.learning_rate < math.inf, 'more than 0'),
        ('final_learning_rate', 0 <= settings.final_learning_rate < math.inf, '0 or more'),
        ('b1', 0 <= settings.b1 < 1, '0 to below 1'),
        ('b2', 0 <= settings.b2 < 1, '0 to below 1'),
        ('epsilon', 0 < settings.epsilon < math.inf, 'more than 0'),
        ('clip_value', 0 <= settings.clip_value < math.inf, '0 (no clipping) or more'),
        ('weight_decay', 'weight_decay' not in settings or 0 <= settings.weight_decay < math.inf, '0 or more'),
    )
    check_fields(field, settings, fields)


def make_optimizer(
    settings: ml_collections.ConfigDict, decayed: Callable[[optax.Params], Any] | None = None
) -> optax.GradientTransformationExtraArgs:
    """Adam with gradients clipped by value, without a learning rate; `step` takes its steps.

    Args:
        settings: `b1`, `b2`, `epsilon` and `clip_value` (largest absolute gradient; 0: no clipping).
        decayed: from parameters to which of them decay, as a tree of bool; makes it AdamW (Loshchilov & Hutter 2019)
            with `settings.weight_decay`. None: no decay.
    """
    clip = optax.clip(settings.clip_value) if settings.clip_value > 0 else optax.identity()
    adam = _adam(settings.b1, settings.b2, settings.epsilon)
    decay = optax.add_decayed_weights(settings.weight_decay, mask=decayed) if decayed else optax.identity()
    return optax.chain(clip, adam, decay)


def _adam(b1: float, b2: float, epsilon: float) -> optax.GradientTransformationExtraArgs:
    """`optax.scale_by_adam`, whose state stays as it is where the step is not `moving`, a bool scalar.

    The updates are made of the moments that are kept. Made of those that a step gives, moving or not, they would have
    XLA:CPU compute all three results from the old moments, which it would first copy: four times the time.
    """

    def first(moment, gradient):
        return b1 * moment + (1 - b1) * gradient

    def second(moment, gradient):
        # The gradient's square as such would be one with that in its norm, and be written to memory for both.
        return b2 * moment + (1 - b2) * gradient * gradient

    def update(gradient, state, params=None, *, moving):
        del params
        count = jnp.where(moving, optax.safe_increment(state.count), state.count)
        mu = where(moving, jax.tree.map(first, state.mu, gradient), state.mu)
        nu = where(moving, jax.tree.map(second, state.nu, gradient), state.nu)
        updates = jax.tree.map(
            lambda m, n: m / (jnp.sqrt(n) + epsilon),
            optax.tree.bias_correction(mu, b1, count),
            optax.tree.bias_correction(nu, b2, count),
        )
        return updates, optax.ScaleByAdamState(count, mu, nu)

    return optax.GradientTransformationExtraArgs(optax.scale_by_adam(b1, b2, epsilon).init, update)


def cosine_rate(settings: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step: half a cosine from `learning_rate` to `final_learning_rate` over the whole run."""
    return optax.cosine_decay_schedule(
        settings.learning_rate, steps, alpha=settings.final_learning_rate / settings.learning_rate
    )


def where(finite: jax.Array, new: Any, old: Any) -> Any:
    """A tree of arrays as the step has made it, or as it was where the step was not finite (bool scalar)."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def step(
    optimizer: optax.GradientTransformationExtraArgs,
    gradient: optax.Updates,
    params: optax.Params,
    state: optax.OptState,
    rate: jax.Array,
    moving: jax.Array,
) -> tuple[optax.Params, optax.OptState]:
    """One step of an optimiser: `params - rate * updates` in the parameters' dtype, and its state.

    Where `moving`, a bool scalar, is False, both are as they were.
    """
    updates, state = optimizer.update(gradient, state, params, moving=moving)
    moved = jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params, updates)
    return where(moving, moved, params), state


def moving_average(params: Tree, average: Tree | None, decay: float, step: jax.Array, moving: jax.Array) -> Tree | None:
    """The average of the parameters with those of a step added, as it was where not `moving`; None stays None.

    At first it forgets faster than `decay` says, by (1 + step) / (10 + step), as TensorFlow's
    `tf.train.ExponentialMovingAverage` does: the initial values would otherwise stay in it for long.
    """
    if average is None:
        return None
    kept = jnp.minimum(decay, (1 + step) / (10 + step))
    return where(moving, optax.incremental_update(params, average, 1 - kept), average)
