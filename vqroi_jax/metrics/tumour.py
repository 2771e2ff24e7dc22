"""What a radiologist would measure of a tumour: its volume, its surface and how bright it is."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp


def volume_ml(tumour: jax.Array, spacing: Sequence[float]) -> jax.Array:
    """Volume in mL (cm³) of each sample.

    Args:
        tumour: bool `[B, D, H, W]`.
        spacing: mm a voxel along D, H and W.

    Returns:
        float32 `[B]`.
    """
    depth, height, width = spacing
    return jnp.sum(tumour, axis=(1, 2, 3)) * (depth * height * width / 1000)


def surface_cm2(tumour: jax.Array, spacing: Sequence[float]) -> jax.Array:
    """Surface in cm² of each sample: the faces between a tumour's voxel and one that is none, or the box's border.

    Faces follow the grid, so that a smooth ball's surface comes out half too large, whatever its size and the voxels';
    it is for comparing sets on one grid.

    Args:
        tumour: bool `[B, D, H, W]`.
        spacing: mm a voxel along D, H and W.

    Returns:
        float32 `[B]`.
    """
    padded = jnp.pad(tumour, [(0, 0), (1, 1), (1, 1), (1, 1)])
    total = jnp.zeros(len(tumour), jnp.float32)
    for axis in (1, 2, 3):
        one, other = (mm for a, mm in enumerate(spacing, 1) if a != axis)
        steps = jnp.diff(padded.astype(jnp.int8), axis=axis) != 0
        total += jnp.sum(steps, axis=(1, 2, 3)) * (one * other / 100)
    return total


def intensity_histogram(volume: jax.Array, tumour: jax.Array, bins: int) -> jax.Array:
    """Share of each sample's tumour voxels in equal bins of [-1, 1]; 1 belongs to the last.

    Args:
        volume: `[B, D, H, W]` in [-1, 1].
        tumour: bool, the same shape; a sample without any has zeros.
        bins: their number.

    Returns:
        float32 `[B, bins]`.
    """
    places = jnp.clip(jnp.floor((volume + 1) * (bins / 2)), 0, bins - 1).astype(jnp.int32)
    flat, inside = places.reshape(len(volume), -1), tumour.reshape(len(volume), -1)
    counts = jax.vmap(lambda p, t: jnp.zeros(bins, jnp.float32).at[p].add(t))(flat, inside.astype(jnp.float32))
    return counts / jnp.maximum(counts.sum(axis=1, keepdims=True), 1)
