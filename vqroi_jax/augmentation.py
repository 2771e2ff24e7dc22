"""Traditional augmentation of ROIs on the device: mirrored, rotated, scaled and bent at random, as pure functions.

`augment` does all of it to a batch; a sample's changes depend on its own key alone. The background stays -1.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from ml_collections import ConfigDict

_GRID = 4  # knots along each axis of the field that bends


class Change(NamedTuple):
    """What happens to one volume."""

    flip: jax.Array  # bool [3], along D, H and W
    matrix: jax.Array  # float32 [3, 3]: from a place in the result to its source, both from the middle, in voxels
    bend: jax.Array  # float32 [4, 4, 4, 3]: what is added to the source, in voxels, at knots from border to border


def draw_change(
    key: jax.Array, settings: ConfigDict, shape: tuple[int, int, int], spacing: tuple[float, ...]
) -> Change:
    """Draws a change.

    Args:
        key: of this sample.
        settings: `flip` (bool), `rotation` (largest angle about each axis, degrees), `scale` (largest factor, at least
            1; drawn evenly in its logarithm from its inverse up) and `elastic` (standard deviation of the knots'
            shifts, as a share of the shortest side).
        shape: D, H, W of the volume.
        spacing: mm a voxel along each, for rotations and shifts are of space.
    """
    flips, turns, size, bends = jax.random.split(key, 4)
    flip = jax.random.bernoulli(flips, shape=(3,)) & settings.flip
    angles = jnp.deg2rad(settings.rotation) * jax.random.uniform(turns, (3,), minval=-1.0)
    factor = settings.scale ** jax.random.uniform(size, minval=-1.0)
    matrix = functools.reduce(jnp.matmul, [_rotation(axis, angle) for axis, angle in enumerate(angles)]) / factor
    size_mm = jnp.asarray(spacing)
    matrix = matrix * size_mm / size_mm[:, None]
    shortest = min(side * mm for side, mm in zip(shape, spacing, strict=True))
    bend = settings.elastic * shortest * jax.random.normal(bends, (_GRID,) * 3 + (3,)) / size_mm
    return Change(flip, matrix, bend)


def _rotation(axis: int, angle: jax.Array) -> jax.Array:
    one, other = (a for a in range(3) if a != axis)
    cosine, sine = jnp.cos(angle), jnp.sin(angle)
    matrix = jnp.eye(3).at[one, one].set(cosine).at[other, other].set(cosine)
    return matrix.at[one, other].set(-sine).at[other, one].set(sine)


def apply_change(volume: jax.Array, change: Change) -> jax.Array:
    """Changes a volume.

    Args:
        volume: float32 [D, H, W] in [-1, 1], background -1.
        change: see `Change`.

    Returns:
        The same shape, interpolated linearly; what comes from outside the volume is -1.
    """
    for axis in range(3):
        volume = jnp.where(change.flip[axis], jnp.flip(volume, axis), volume)
    middle = (jnp.asarray(volume.shape) - 1) / 2
    places = jnp.stack(jnp.meshgrid(*[jnp.arange(side) for side in volume.shape], indexing='ij'))
    centred = places - middle[:, None, None, None]
    # Whole coordinates would lose too much in the fast products of accelerators.
    source = jnp.einsum('ij,jdhw->idhw', change.matrix, centred, precision=jax.lax.Precision.HIGHEST)
    source += middle[:, None, None, None] + _between_knots(change.bend, volume.shape)
    changed = jax.scipy.ndimage.map_coordinates(volume, list(source), order=1, mode='constant', cval=-1.0)
    return jnp.clip(changed, -1, 1)  # the weights add up to 1 but for rounding


def _between_knots(knots: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """A field [3, D, H, W] from its knots [k, k, k, 3], the first and last of which lie on the borders; linear."""
    field = knots
    for axis, side in enumerate(shape):
        at = jnp.linspace(0, knots.shape[axis] - 1, side)
        below = jnp.clip(jnp.floor(at).astype(int), 0, knots.shape[axis] - 2)
        share = (at - below).reshape([-1 if a == axis else 1 for a in range(4)])
        field = jnp.take(field, below, axis) * (1 - share) + jnp.take(field, below + 1, axis) * share
    return jnp.moveaxis(field, -1, 0)


def augment(keys: jax.Array, volumes: jax.Array, settings: ConfigDict, spacing: tuple[float, ...]) -> jax.Array:
    """Changes each volume in its own way.

    Args:
        keys: random keys `[B]`.
        volumes: float32 `[B, D, H, W, 1]` in [-1, 1], background -1.
        settings: see `draw_change`.
        spacing: likewise.
    """

    def one(key, volume):
        return apply_change(volume[..., 0], draw_change(key, settings, volume.shape[:3], spacing))[..., None]

    return jax.vmap(one)(keys, volumes)
