"""Do samples look like their class? A small classifier, trained on real ROIs alone, is asked.

It stands apart from both stages, so that it has not been part of what it judges. `train` fits it to training ROIs;
`tell` says what it makes of ROIs; held-out ones show how far it can be trusted.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax

from vqroi_jax.filtering import apply_filters, filter_matrix
from vqroi_jax.models.layers import Conv3D
from vqroi_jax.training import partitioning

EPOCHS, BATCH, RATE, DECAY = 60, 32, 3e-3, 1e-2  # of training: AdamW, one cycle of the learning rate
_FEATURES, _DROPOUT = (12, 24, 48), 0.3


class SmallClassifier(nn.Module):
    """A CNN of three layers over ROIs.

    Attributes:
        classes: number of classes.
    """

    classes: int

    @nn.compact
    def __call__(self, volume: jax.Array, key: jax.Array | None = None) -> tuple[jax.Array, jax.Array]:
        """What it tells, and from what.

        Args:
            volume: `[B, D, H, W]` in [-1, 1], sides of at least 2; an odd last voxel is not seen.
            key: for dropout; None: no dropout.

        Returns:
            Logits float32 `[B, classes]`, and the features `[B, n]` that they are linear in.
        """
        cubes = tuple(side // 2 for side in volume.shape[1:])
        x = volume[:, : 2 * cubes[0], : 2 * cubes[1], : 2 * cubes[2]]
        x = x.reshape(-1, cubes[0], 2, cubes[1], 2, cubes[2], 2).transpose(0, 1, 3, 5, 2, 4, 6)
        x = x.reshape(-1, *cubes, 8)
        for features in _FEATURES:
            x = nn.relu(Conv3D(features, kernel_size=3, padding=1, kernel_init=nn.initializers.lecun_normal())(x))
            window = tuple(min(2, side) for side in x.shape[1:-1])
            x = nn.avg_pool(x, window, window)
        seen = x.reshape(len(x), -1)
        x = nn.Dropout(_DROPOUT, deterministic=key is None)(seen, rng=key)
        return nn.Dense(self.classes)(x), seen


def train(volumes: np.ndarray, labels: np.ndarray, classes: int, seed: int = 0, epochs: int = EPOCHS) -> Any:
    """Fits the classifier, with ROIs mirrored along each axis and smoothed at random.

    Smoothed, so that it looks at shape and contrast, and not at the noise of single voxels, which no autoencoder keeps.

    Args:
        volumes: real training ROIs, float32 `[n, D, H, W]` in [-1, 1].
        labels: int `[n]` in [0, classes).
        classes: their number.
        seed: of initial values, order, mirroring and dropout.
        epochs: passes over the ROIs.

    Returns:
        The parameters, for `tell`.
    """
    steps = epochs * -(-len(volumes) // BATCH)
    model = SmallClassifier(classes)
    optimiser = optax.adamw(optax.cosine_onecycle_schedule(steps, RATE), weight_decay=DECAY)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(volumes)) for _ in range(-(-steps * BATCH // len(volumes)))])
    order = order[: steps * BATCH].reshape(steps, BATCH)

    @jax.jit
    def fit(params, drops, volumes, labels, order, coins):
        def step(carry, batch):
            params, state = carry
            rows, coins, key = batch
            x = volumes[rows]
            for axis in (1, 2, 3):
                x = jnp.where(coins[axis - 1], jnp.flip(x, axis), x)
            for coin in coins[3:]:
                x = jnp.where(coin, smooth(x), x)

            def loss(params):
                logits, _ = model.apply(params, x, key)
                return optax.softmax_cross_entropy_with_integer_labels(logits, labels[rows]).mean()

            updates, state = optimiser.update(jax.grad(loss)(params), state, params)
            return (optax.apply_updates(params, updates), state), None

        batches = order, coins, jax.random.split(drops, len(order))
        return jax.lax.scan(step, (params, optimiser.init(params)), batches)[0][0]

    start, drops = jax.random.split(jax.random.key(seed))
    options = partitioning.one_run_options(jax.default_backend())
    params = jax.jit(model.init, compiler_options=options)(start, volumes[:1])
    return fit(params, drops, volumes, labels, order, rng.random((steps, 5)) < 0.5)


def smooth(volumes: jax.Array) -> jax.Array:
    """Weighs each voxel of `[B, D, H, W]` with its neighbours, 1-2-1 along each axis; edges are repeated."""
    return apply_filters(volumes, [filter_matrix(side, (0.25, 0.5, 0.25), 'edge') for side in volumes.shape[1:]])


def tell(params: Any, volumes: np.ndarray, classes: int) -> tuple[np.ndarray, np.ndarray]:
    """What the classifier says of ROIs.

    Args:
        params: from `train`.
        volumes: `[n, D, H, W]` in [-1, 1], n at least 1; indexed by slices, may live on disk.
        classes: as `train` had them.

    Returns:
        Logits float32 `[n, classes]`, and features float32 `[n, features]`: means over mirrored views.
    """
    seen = _seen(classes)
    parts = [seen(params, volumes[start : start + BATCH]) for start in range(0, len(volumes), BATCH)]
    logits, features = (np.concatenate(kind) for kind in zip(*jax.device_get(parts), strict=True))
    return logits, features


@functools.cache
def _seen(classes: int) -> Any:
    model = SmallClassifier(classes)

    @jax.jit
    def seen(params, volumes):
        views = [volumes, *(jnp.flip(volumes, axis) for axis in (1, 2, 3))]
        told = [model.apply(params, view) for view in views]
        return jax.tree.map(lambda *of_views: sum(of_views) / len(views), *told)

    return seen
