"""Structural similarity of volumes.

Source: Wang et al. 2004, *Image quality assessment: from error visibility to structural similarity*, in 3D.
"""

import jax
import jax.numpy as jnp
import numpy as np

SIGMA = 1.5  # of the Gaussian window, voxels
RADIUS = 5  # voxels on either side: 11 taps


def _window_means(x: jax.Array) -> jax.Array:
    """Gaussian-weighted means over the 11³ windows that lie wholly inside: `[N, D, H, W]`, each side 10 shorter."""
    taps = np.exp(-0.5 * np.square(np.arange(-RADIUS, RADIUS + 1) / SIGMA))
    taps = jnp.asarray(taps / taps.sum(), jnp.float32)
    for axis in (1, 2, 3):
        size = x.shape[axis] - 2 * RADIUS
        x = sum(tap * jax.lax.slice_in_dim(x, i, i + size, axis=axis) for i, tap in enumerate(taps))
    return x


def ssim(volume: jax.Array, other: jax.Array, data_range: float = 2.0) -> jax.Array:
    """Mean SSIM of each pair, over the windows that lie wholly inside the volume.

    Args:
        volume: float32 `[B, D, H, W, 1]`, sides of at least 11.
        other: the same shape.
        data_range: width of the intensity range; 2 for [-1, 1].

    Returns:
        float32 `[B]` in [-1, 1].
    """
    x, y = volume[..., 0], other[..., 0]
    c1, c2 = (0.01 * data_range) ** 2, (0.03 * data_range) ** 2
    mean_x, mean_y = _window_means(x), _window_means(y)
    variance_x = _window_means(x * x) - mean_x**2
    variance_y = _window_means(y * y) - mean_y**2
    covariance = _window_means(x * y) - mean_x * mean_y
    similarity = (2 * mean_x * mean_y + c1) * (2 * covariance + c2)
    similarity /= (mean_x**2 + mean_y**2 + c1) * (variance_x + variance_y + c2)
    return jnp.mean(similarity, axis=(1, 2, 3))
