"""Structural similarity of volumes, at one scale and at several.

Sources: Wang et al. 2004, *Image quality assessment: from error visibility to structural similarity*, and Wang et al.
2003, *Multiscale structural similarity for image quality assessment*, both in 3D.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from vqroi_jax.filtering import Border, apply_filters, filter_matrix

SIGMA = 1.5  # of the Gaussian window, voxels
RADIUS = 5  # voxels on either side: 11 taps
WEIGHTS = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)  # of the scales, finest first
MODES = ('standard', 'release')

_RELEASE_RADIUS = 6  # 13 taps, where SciPy cuts a Gaussian of this width off


def _maps(
    x: jax.Array, y: jax.Array, data_range: float, radius: int = RADIUS, border: Border = 'valid'
) -> tuple[jax.Array, jax.Array]:
    """Similarity, and its part without luminance (contrast and structure), of each window: `[N, ...]` both."""
    taps = np.exp(-0.5 * np.square(np.arange(-radius, radius + 1) / SIGMA))
    windows = [filter_matrix(side, taps / taps.sum(), border) for side in x.shape[1:]]
    means = functools.partial(apply_filters, matrices=windows)
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = means(x), means(y)
    variances = means(x * x + y * y) - mean_x**2 - mean_y**2
    covariance = means(x * y) - mean_x * mean_y
    contrast = (2 * covariance + c2) / (variances + c2)
    return contrast * (2 * mean_x * mean_y + c1) / (mean_x**2 + mean_y**2 + c1), contrast


def ssim(volume: jax.Array, other: jax.Array, data_range: float = 2.0) -> jax.Array:
    """Mean SSIM of each pair, over the windows that lie wholly inside the volume.

    Args:
        volume: float32 `[B, D, H, W, 1]`, sides of at least 11.
        other: the same shape.
        data_range: width of the intensity range; 2 for [-1, 1].

    Returns:
        float32 `[B]` in [-1, 1].
    """
    return jnp.mean(_maps(volume[..., 0], other[..., 0], data_range)[0], axis=(1, 2, 3))


def scales(shape: Sequence[int]) -> int:
    """How many of the five scales `ms_ssim` uses in the mode 'standard': those whose volume holds a window."""
    room = min(shape) / (2 * RADIUS + 1)
    return min(len(WEIGHTS), 1 + math.floor(math.log2(room))) if room >= 1 else 0


def ms_ssim(
    volume: jax.Array,
    other: jax.Array,
    data_range: float = 2.0,
    mode: str = 'standard',
    region: jax.Array | None = None,
) -> jax.Array:
    """Mean multi-scale SSIM of each pair.

    'standard' is Wang et al.: contrast and structure at every scale, luminance at the coarsest, 11 taps, windows wholly
    inside the volume. A volume too small for five scales has the first few (`scales`), with their weights made to
    add up to 1. 'release' is what the paper's evaluation computes: always five scales, 13 taps, mirrored borders, a
    data range of 1 whatever the data's is, and the coarsest scale's SSIM to the fourth power of its weight, because
    it is multiplied into each of the first four factors. Between scales, means of 2 x 2 x 2 voxels; an odd last voxel
    is left out. Negative factors count as 0, in both modes.

    Args:
        volume: float32 `[B, D, H, W, 1]`; sides of at least 11, in the mode 'release' 16.
        other: the same shape.
        data_range: width of the intensity range; 2 for [-1, 1]. Not read in the mode 'release'.
        mode: one of `MODES`.
        region: bool, the same shape: only windows around these voxels count (at coarser scales, around those that
            hold one of them). None: all. A sample without such windows is NaN.

    Returns:
        float32 `[B]` in [0, 1].

    Raises:
        ValueError: the volumes are too small, or the mode is none.
    """
    if mode not in MODES:
        raise ValueError(f'mode {mode!r} is none of {", ".join(MODES)}')
    release, sides = mode == 'release', volume.shape[1:4]
    number = len(WEIGHTS) if release else scales(sides)
    if not number or (release and min(sides) < 2 ** (number - 1)):
        raise ValueError(f'volumes of {sides} are too small for MS-SSIM in the mode {mode}')
    weights = np.asarray(WEIGHTS[:number]) / (1 if release else sum(WEIGHTS[:number]))
    x, y = volume[..., 0], other[..., 0]
    inside = None if region is None else region[..., 0]
    factors = []
    for scale in range(number):
        maps = _maps(x, y, 1.0, _RELEASE_RADIUS, 'symmetric') if release else _maps(x, y, data_range)
        kept = inside if inside is None or release else inside[(slice(None), *[slice(RADIUS, -RADIUS)] * 3)]
        last = scale == number - 1
        mean = jnp.mean(maps[0 if last else 1], axis=(1, 2, 3), where=kept)
        # Not `maximum`, whose gradient and value at NaN differ between platforms.
        factors.append(jnp.where(mean < 0, 0.0, mean) ** weights[scale])
        if not last:
            x, y = (_pooled(a, jnp.add) / 8 for a in (x, y))
            inside = None if inside is None else _pooled(inside, jnp.logical_or)
    power = len(WEIGHTS) - 1 if release else 1
    return math.prod(factors[:-1]) * factors[-1] ** power


def _pooled(x: jax.Array, operation: Callable[[jax.Array, jax.Array], jax.Array]) -> jax.Array:
    """Adds up, or joins by another operation, cubes of 2 x 2 x 2 voxels of `[N, D, H, W]`."""
    for axis in (1, 2, 3):
        stop = x.shape[axis] // 2 * 2
        x = operation(*(jax.lax.slice_in_dim(x, start, stop, 2, axis) for start in (0, 1)))
    return x
