"""3D convolutions over channels-last volumes: the pure functions under every convolutional layer.

`layers.Conv3D` and `layers.UpsampleConv3D` call them; nothing above knows how a convolution is computed.
"""

import jax
from jax import lax

_DIMENSIONS = ('NDHWC', 'DHWIO', 'NDHWC')


def conv3d(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0) -> jax.Array:
    """Convolves a volume with a cubic kernel (cross-correlation, as every deep learning library has it).

    Args:
        x: volume, [batch, depth, height, width, in].
        kernel: weights of the dtype of `x`, [k, k, k, in, out].
        stride: the same along the three axes.
        padding: zeros added on both sides of the three axes.

    Returns:
        [batch, d, h, w, out] of the dtype of `x`, with d = (depth + 2 * padding - k) // stride + 1.
    """
    return lax.conv_general_dilated(
        x, kernel, (stride,) * 3, ((padding, padding),) * 3, dimension_numbers=_DIMENSIONS
    )


def upsample_conv3d(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Doubles each side by nearest neighbour, then convolves with a 3x3x3 kernel and padding 1.

    Args:
        x: volume, [batch, depth, height, width, in].
        kernel: weights of the dtype of `x`, [3, 3, 3, in, out].

    Returns:
        [batch, 2 * depth, 2 * height, 2 * width, out] of the dtype of `x`.
    """
    for axis in (1, 2, 3):
        x = x.repeat(2, axis)
    return conv3d(x, kernel, padding=1)
