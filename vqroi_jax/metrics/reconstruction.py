"""How near a reconstruction is to its ROI, sample by sample."""

import jax
import jax.numpy as jnp


def l1(reconstruction: jax.Array, volume: jax.Array) -> jax.Array:
    """Mean absolute difference of each sample, `[B, D, H, W, 1]` to float32 `[B]`."""
    return jnp.mean(jnp.abs(reconstruction - volume), axis=(1, 2, 3, 4))


def psnr(reconstruction: jax.Array, volume: jax.Array, region: jax.Array, peak: float = 2.0) -> jax.Array:
    """Peak signal-to-noise ratio of each sample over a region of it, in dB.

    Args:
        reconstruction: `[B, D, H, W, 1]`.
        volume: the same shape.
        region: bool, the same shape; at least one voxel of each sample (the ratio is NaN else).
        peak: width of the intensity range; 2 for [-1, 1].

    Returns:
        float32 `[B]`; infinite where the two are equal.
    """
    axes = (1, 2, 3, 4)
    square = jnp.where(region, jnp.square(reconstruction - volume), 0.0)
    return 10 * jnp.log10(peak**2 * jnp.sum(region, axis=axes) / jnp.sum(square, axis=axes))


def tumour_box(volume: jax.Array) -> jax.Array:
    """The smallest box around each sample's tumour: the voxels above the background's -1.

    Args:
        volume: `[B, D, H, W, 1]` in [-1, 1].

    Returns:
        bool, the same shape; all False where there is no tumour.
    """
    tumour = volume > -1
    inside = jnp.ones_like(tumour)
    for axis in (1, 2, 3):
        others = tuple(a for a in (1, 2, 3, 4) if a != axis)
        occupied = jnp.any(tumour, axis=others, keepdims=True)
        begun = jax.lax.cummax(occupied.astype(jnp.int8), axis=axis)
        unfinished = jax.lax.cummax(occupied.astype(jnp.int8), axis=axis, reverse=True)
        inside &= (begun & unfinished).astype(bool)
    return inside
