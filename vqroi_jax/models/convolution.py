"""3D convolutions over channels-last volumes: the pure functions under every convolutional layer.

On GPU and TPU a convolution is XLA's own; on a CPU it is `slab_convolution`'s, several times as fast, a stride being
folded into the channels first. `layers.Conv3D` and `layers.UpsampleConv3D` call this module; nothing above it knows
how a convolution is computed.

Convolution, input gradient and kernel gradient are each linear in each of their two arguments, and the derivatives
of each are the other two. They are declared so, so that reverse-mode derivatives of any order work on every
platform. Forward mode (`jax.jvp`) raises, as for every function with its own reverse rule.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from vqroi_jax.models import slab_convolution


def conv3d(x: jax.Array, kernel: jax.Array, *, stride: int = 1, padding: int = 0) -> jax.Array:
    """Convolves a volume with a cubic kernel (cross-correlation, as every deep learning library has it).

    Args:
        x: volume, [B, D, H, W, in].
        kernel: weights of the dtype of `x`, [k, k, k, in, out].
        stride: the same along the three axes.
        padding: zeros added on both sides of the three axes, less than k.

    Returns:
        [B, d, h, w, out] of the dtype of `x`, with d = (D + 2 * padding - k) // stride + 1.

    Raises:
        ValueError: the kernel is not cubic, does not fit the channels or is larger than the padded volume, or the
            padding is not in 0..k-1.
    """
    k = kernel.shape[0]
    if kernel.shape[:4] != (k, k, k, x.shape[-1]) or not 0 <= padding < k or min(x.shape[1:4]) + 2 * padding < k:
        raise ValueError(f'kernel {kernel.shape} with padding {padding} does not fit volume {x.shape}')
    if k == stride == 1:
        return x @ kernel[0, 0, 0]
    return _conv(x, kernel, stride, padding)


def upsample_conv3d(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """Doubles each side by nearest neighbour, then convolves with a 3x3x3 kernel and padding 1.

    Neither is done: each 2x2x2 window of the small volume (with a border of zeros) holds all that the 2x2x2 voxels
    of the result around its centre depend on, so one convolution of k2 computes them as 8 groups of channels, with
    3.4 times fewer operations.

    Args:
        x: volume, [B, D, H, W, in].
        kernel: weights of the dtype of `x`, [3, 3, 3, in, out].

    Returns:
        [B, 2 D, 2 H, 2 W, out] of the dtype of `x`.
    """
    # Tap t of the kernel reads, for the first voxel of a window, the window's side (0, 0, 1)[t]; for the second
    # (0, 1, 1)[t].
    taps = jnp.array([[[1, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 1]]], kernel.dtype)  # [side, voxel, tap]
    phases = jnp.einsum('auk,bvl,cwm,klmio->abciuvwo', taps, taps, taps, kernel)
    y = conv3d(x, phases.reshape(2, 2, 2, x.shape[-1], -1), padding=1)
    batch, d, h, w, _ = y.shape
    y = y.reshape(batch, d, h, w, 2, 2, 2, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    return y.reshape(batch, 2 * d, 2 * h, 2 * w, -1)[:, 1:-1, 1:-1, 1:-1]


@partial(jax.custom_vjp, nondiff_argnums=(2, 3))
def _conv(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    return lax.platform_dependent(
        x,
        kernel,
        cpu=partial(_slab_conv, stride=stride, padding=padding),
        default=partial(_native_conv, stride=stride, padding=padding),
    )


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _input_gradient(gradient, kernel, stride, padding, sides):
    """Gradient of `_conv` in an input of these sides, from the gradient of its result."""

    def native(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
        x = jax.ShapeDtypeStruct((gradient.shape[0], *sides, kernel.shape[3]), gradient.dtype)
        return jax.linear_transpose(lambda x: _native_conv(x, kernel, stride, padding), x)(gradient)[0]

    def slabs(gradient: jax.Array, kernel: jax.Array) -> jax.Array:
        x = jax.ShapeDtypeStruct((gradient.shape[0], *sides, kernel.shape[3]), gradient.dtype)
        folded_kernel = _fold_kernel(kernel, stride)
        k, left = folded_kernel.shape[0], 0 if stride > 1 else padding
        flipped = jnp.flip(folded_kernel, (0, 1, 2)).swapaxes(3, 4)
        folded = slab_convolution.convolve(gradient, flipped, k - 1 - left)
        return jax.linear_transpose(lambda x: _fold(x, kernel.shape[0], stride, padding), x)(folded)[0]

    return lax.platform_dependent(gradient, kernel, cpu=slabs, default=native)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4))
def _kernel_gradient(x, gradient, stride, padding, k):
    """Gradient of `_conv` in a kernel of side k, from the gradient of its result."""
    kernel = jax.ShapeDtypeStruct((k, k, k, x.shape[-1], gradient.shape[-1]), x.dtype)

    def native(x: jax.Array, gradient: jax.Array) -> jax.Array:
        return jax.linear_transpose(lambda kernel: _native_conv(x, kernel, stride, padding), kernel)(gradient)[0]

    def slabs(x: jax.Array, gradient: jax.Array) -> jax.Array:
        folded = _fold(x, k, stride, padding)
        folded_k, left = -(-k // stride), 0 if stride > 1 else padding
        folded_gradient = slab_convolution.kernel_gradient(folded, gradient, folded_k, left)
        return jax.linear_transpose(partial(_fold_kernel, stride=stride), kernel)(folded_gradient)[0]

    return lax.platform_dependent(x, gradient, cpu=slabs, default=native)


def _conv_backward(stride, padding, inputs, gradient):
    x, kernel = inputs
    return (
        _input_gradient(gradient, kernel, stride, padding, x.shape[1:4]),
        _kernel_gradient(x, gradient, stride, padding, kernel.shape[0]),
    )


def _input_gradient_backward(stride, padding, sides, inputs, cotangent):
    gradient, kernel = inputs
    return (
        _conv(cotangent, kernel, stride, padding),
        _kernel_gradient(cotangent, gradient, stride, padding, kernel.shape[0]),
    )


def _kernel_gradient_backward(stride, padding, k, inputs, cotangent):
    x, gradient = inputs
    return (
        _input_gradient(gradient, cotangent, stride, padding, x.shape[1:4]),
        _conv(x, cotangent, stride, padding),
    )


_conv.defvjp(lambda x, kernel, *static: (_conv(x, kernel, *static), (x, kernel)), _conv_backward)
_input_gradient.defvjp(
    lambda gradient, kernel, *static: (_input_gradient(gradient, kernel, *static), (gradient, kernel)),
    _input_gradient_backward,
)
_kernel_gradient.defvjp(
    lambda x, gradient, *static: (_kernel_gradient(x, gradient, *static), (x, gradient)),
    _kernel_gradient_backward,
)


def _native_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * 3,
        ((padding, padding),) * 3,
        dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
    )


def _slab_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: int) -> jax.Array:
    folded = _fold(x, kernel.shape[0], stride, padding)
    return slab_convolution.convolve(folded, _fold_kernel(kernel, stride), 0 if stride > 1 else padding)


def _fold(x: jax.Array, k: int, stride: int, padding: int) -> jax.Array:
    """Space to depth: the padded volume with each cube of side `stride` as one voxel of stride³ times the channels.

    A convolution with this stride is one of stride 1 and no padding on the result, with `_fold_kernel`'s kernel.
    What no window reaches is cut off, and zeros complete the last windows. Stride 1: `x` itself, without padding.
    """
    if stride == 1:
        return x
    folded_k = -(-k // stride)
    edges, shape = [(0, 0, 0)], [x.shape[0]]
    for side in x.shape[1:4]:
        cubes = (side + 2 * padding - k) // stride + folded_k
        edges.append((padding, cubes * stride - side - padding, 0))  # the latter is negative where it cuts
        shape += [cubes, stride]
    x = lax.pad(x, jnp.zeros((), x.dtype), [*edges, (0, 0, 0)]).reshape(*shape, x.shape[-1])
    return x.transpose(0, 1, 3, 5, 2, 4, 6, 7).reshape(*shape[::2][:1], *shape[1::2], -1)


def _fold_kernel(kernel: jax.Array, stride: int) -> jax.Array:
    """The kernel that goes with `_fold`: zeros complete it to a multiple of the stride."""
    if stride == 1:
        return kernel
    k, (channels, features) = -(-kernel.shape[0] // stride), kernel.shape[3:]
    missing = k * stride - kernel.shape[0]
    kernel = jnp.pad(kernel, ((0, missing),) * 3 + ((0, 0),) * 2)
    kernel = kernel.reshape(k, stride, k, stride, k, stride, channels, features)
    return kernel.transpose(0, 2, 4, 1, 3, 5, 6, 7).reshape(k, k, k, stride**3 * channels, features)
