"""Separable filters of volumes as matrix products, one along each axis: quick to compile and to run on all platforms.

Written as shifted additions they are what compilers fuse into one another over and over.
"""

from collections.abc import Sequence
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

Border = Literal['valid', 'symmetric', 'edge']


def filter_matrix(side: int, taps: Sequence[float], border: Border) -> np.ndarray:
    """A filter of a row of voxels as a matrix.

    Args:
        side: voxels of the row.
        taps: weights of a voxel and as many neighbours on either side.
        border: 'valid', so that only windows wholly inside have a result; or how the row goes on beyond its ends, as
            `numpy.pad` calls it: 'symmetric' (its mirror image) or 'edge' (its last voxel again).

    Returns:
        float32 `[results, side]`; as many results as voxels, with 'valid' fewer by `len(taps) - 1`.
    """
    places = np.arange(side)
    if border != 'valid':
        places = np.pad(places, len(taps) // 2, mode=border)
    matrix = np.zeros((len(places) - len(taps) + 1, side))
    for row, line in enumerate(matrix):
        np.add.at(line, places[row : row + len(taps)], taps)
    return matrix.astype(np.float32)


def apply_filters(volumes: jax.Array, matrices: Sequence[np.ndarray]) -> jax.Array:
    """Filters `[B, D, H, W]` along D, H and W, each with its matrix `[results, side]`; float32."""
    for axis, matrix in enumerate(matrices, 1):
        products = jnp.tensordot(volumes, matrix, ((axis,), (1,)), precision=jax.lax.Precision.HIGHEST)
        volumes = jnp.moveaxis(products, -1, axis)
    return volumes
