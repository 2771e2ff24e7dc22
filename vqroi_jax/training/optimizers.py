"""Optimisers as the recipes of the design name them; the learning rate is applied by the step, by global step.

Keeping the rate outside lets a network that starts late (the discriminator) stand at the schedule's present value.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import ml_collections
import optax


def make_optimizer(
    settings: ml_collections.ConfigDict, decayed: Callable[[optax.Params], Any] | None = None
) -> optax.GradientTransformation:
    """Adam with gradients clipped by value, without a learning rate.

    Args:
        settings: `b1`, `b2`, `epsilon` and `clip_value` (largest absolute gradient; 0: no clipping).
        decayed: from parameters to which of them decay, as a tree of bool; makes it AdamW (Loshchilov & Hutter 2019)
            with `settings.weight_decay`. None: no decay.
    """
    clip = optax.clip(settings.clip_value) if settings.clip_value > 0 else optax.identity()
    adam = optax.scale_by_adam(b1=settings.b1, b2=settings.b2, eps=settings.epsilon)
    decay = optax.add_decayed_weights(settings.weight_decay, mask=decayed) if decayed else optax.identity()
    return optax.chain(clip, adam, decay)


def cosine_rate(settings: ml_collections.ConfigDict, steps: int) -> optax.Schedule:
    """Learning rate by step: half a cosine from `learning_rate` to `final_learning_rate` over the whole run."""
    return optax.cosine_decay_schedule(
        settings.learning_rate, steps, alpha=settings.final_learning_rate / settings.learning_rate
    )


def where(finite: jax.Array, new: Any, old: Any) -> Any:
    """A tree of arrays as the step has made it, or as it was where the step was not finite (bool scalar)."""
    return jax.tree.map(lambda n, o: jnp.where(finite, n, o), new, old)


def apply(params: optax.Params, updates: optax.Updates, rate: jax.Array) -> optax.Params:
    """`params - rate * updates`, in the parameters' dtype."""
    return jax.tree.map(lambda p, u: (p - rate * u).astype(p.dtype), params, updates)
