"""3D convolutions over channels-last volumes: the pure functions under every convolutional layer.

On GPU and TPU a convolution is XLA's own; on a CPU it is `slab_convolution`'s, several times as fast, a stride being
folded into the channels first. `layers.Conv3D` and `layers.UpsampleConv3D` call this module; nothing above it knows
how a convolution is computed.

On a mesh that splits depth (`axes.SPATIAL`), each device convolves its own slices and those of its neighbours that its
windows reach (halos). A map that is too thin for that, or whose result would not divide, is put together along depth
and convolved as a whole on every device; among stage 1's, these are the discriminator's deepest maps alone.

Reverse-mode derivatives of any order work on every platform. Forward mode (`jax.jvp`) raises, as it does for every
function with a reverse rule of its own.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.custom_derivatives import SymbolicZero
from jax.sharding import PartitionSpec

from vqroi_jax.models import axes, slab_convolution

# Tap t of a kernel of 3 reads, for the first voxel of a window, the window's side (0, 0, 1)[t]; for the second
# (0, 1, 1)[t]: [side, voxel, tap]. In three dimensions: which taps a side of a voxel adds up, [64, 27].
_TAP = np.array([[[1, 1, 0], [1, 0, 0]], [[0, 0, 1], [0, 1, 1]]])
_TAPS = np.einsum('auk,bvl,cwm->abcuvwklm', _TAP, _TAP, _TAP).reshape(64, 27)

Padding = tuple[int, int]  # zeros on both sides of the depth axis, and of height and width


def conv3d(
    x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None, *, stride: int = 1, padding: int = 0
) -> jax.Array:
    """Convolves a volume with a cubic kernel (cross-correlation, as every deep learning library has it).

    Args:
        x: volume, [B, D, H, W, in].
        kernel: weights of the dtype of `x`, [k, k, k, in, out].
        bias: added to the result, [out] of the dtype of `x`.
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
    if bias is None:
        bias = jnp.zeros(kernel.shape[-1:], x.dtype)
    after = max(k - stride - padding, 0)
    divides = x.shape[1] % (stride * axes.parts(axes.SPATIAL)) == 0
    if (
        divides
        and (x.shape[1] + 2 * padding - k) // stride + 1 == x.shape[1] // stride
        and _can_split(x, padding, after)
    ):
        own = partial(_conv, stride=stride, padding=(0, padding))
        return _in_parts(own, x, kernel, bias, padding, after)
    return _conv(_whole_depth(x), kernel, bias, stride, (padding, padding))


def upsample_conv3d(x: jax.Array, kernel: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Doubles each side by nearest neighbour, then convolves with a 3x3x3 kernel and padding 1.

    Neither is done: each 2x2x2 window of the small volume (with a border of zeros) holds all that the 2x2x2 voxels
    of the result around its centre depend on, so one convolution of k2 computes them as 8 groups of channels, with
    3.4 times fewer operations.

    Args:
        x: volume, [B, D, H, W, in].
        kernel: weights of the dtype of `x`, [3, 3, 3, in, out].
        bias: added to the result, [out] of the dtype of `x`.

    Returns:
        [B, 2 D, 2 H, 2 W, out] of the dtype of `x`.
    """
    if bias is None:
        bias = jnp.zeros(kernel.shape[-1:], x.dtype)
    if x.shape[1] % axes.parts(axes.SPATIAL) == 0 and _can_split(x, 1, 1):
        return _in_parts(partial(_upsample, depth_padding=0), x, kernel, bias, 1, 1)
    return _upsample(_whole_depth(x), kernel, bias, depth_padding=1)


def _upsample(x: jax.Array, kernel: jax.Array, bias: jax.Array, depth_padding: int) -> jax.Array:
    """`upsample_conv3d`, of a volume that already has so much of its border along depth."""
    channels, features = kernel.shape[3:]
    phases = (jnp.asarray(_TAPS, kernel.dtype) @ kernel.reshape(27, -1)).reshape(2, 2, 2, 8, channels, features)
    phases = phases.swapaxes(3, 4).reshape(2, 2, 2, channels, 8 * features)
    y = _conv(x, phases, jnp.tile(bias, 8), 1, (depth_padding, 1))
    batch, d, h, w, _ = y.shape
    y = y.reshape(batch, d, h, w, 2, 2, 2, -1).transpose(0, 1, 4, 2, 5, 3, 6, 7)
    y = y.reshape(batch, 2 * d, 2 * h, 2 * w, -1)[:, 1:-1, 1:-1, 1:-1]
    # Whoever needs the result then reads this, not the groups of channels, which would be kept beside it.
    return lax.platform_dependent(y, cpu=lax.optimization_barrier, default=lambda y: y)


def _can_split(x: jax.Array, before: int, after: int) -> bool:
    """Whether the mesh splits depth, and each part of `x` holds all that a neighbour needs of it."""
    parts = axes.parts(axes.SPATIAL)
    return parts > 1 and max(before, after) <= x.shape[1] // parts


def _whole_depth(x: jax.Array) -> jax.Array:
    return axes.keep_rows(x) if axes.parts(axes.SPATIAL) > 1 else x


def _in_parts(own: Callable, x: jax.Array, kernel: jax.Array, bias: jax.Array, before: int, after: int) -> jax.Array:
    """Convolves each device's part of a volume that is split along depth.

    Args:
        own: from a part with its halos, kernel and bias to the same part of the result.
        x: volume, [B, D, H, W, in].
        kernel: of the convolution.
        bias: of the convolution.
        before: slices that are needed of the part before; zeros for the first.
        after: slices that are needed of the part after; zeros for the last.
    """

    def with_halos(x, kernel, bias):
        steps = [(number, number + 1) for number in range(lax.axis_size(axes.SPATIAL) - 1)]
        pieces = [x]
        if before:  # what nobody sends arrives as zeros, which are the padding
            pieces.insert(0, lax.ppermute(x[:, -before:], axes.SPATIAL, steps))
        if after:
            pieces.append(lax.ppermute(x[:, :after], axes.SPATIAL, [step[::-1] for step in steps]))
        return own(jnp.concatenate(pieces, 1), kernel, bias)

    return jax.shard_map(
        with_halos,
        in_specs=(axes.VOLUMES, PartitionSpec(), PartitionSpec()),
        out_specs=axes.VOLUMES,
        axis_names={*axes.BATCH, axes.SPATIAL},  # gradients are summed over all of these that an array is whole along
        check_vma=False,  # the loops of `slab_convolution` begin with constants, which it takes for a mistake
    )(x, kernel, bias)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _conv(x: jax.Array, kernel: jax.Array, bias: jax.Array, stride: int, padding: Padding) -> jax.Array:
    def native(x, kernel, bias):
        return _native_conv(x, kernel, stride, padding) + bias

    def slabs(x, kernel, bias):
        # The volume is then written once, however many read it, and nothing is computed of the kernel before.
        folded, kernel = lax.optimization_barrier((_fold_volume(x, kernel.shape[0], stride, padding), kernel))
        folded_kernel = _fold_kernel(kernel, stride)
        return slab_convolution.convolve(folded, folded_kernel, bias, _folded_padding(stride, padding))

    return lax.platform_dependent(x, kernel, bias, cpu=slabs, default=native)


def _conv_forward(x, kernel, bias, stride, padding):
    # What is not differentiated is marked by None, since residuals can only be arrays and structure.
    wanted = tuple(() if argument.perturbed else None for argument in (x, kernel))
    x, kernel, bias = x.value, kernel.value, bias.value
    return _conv(x, kernel, bias, stride, padding), (x, kernel, bias, wanted)


def _conv_backward(stride, padding, kept, gradient):
    x, kernel, bias, wanted = kept
    if isinstance(gradient, SymbolicZero):
        return None, None, None
    wanted = tuple(argument is not None for argument in wanted)
    bias_gradient = jnp.sum(gradient, (0, 1, 2, 3), dtype=jnp.float32).astype(bias.dtype)
    return *_gradients(x, kernel, gradient, stride, padding, wanted), bias_gradient


@partial(jax.custom_vjp, nondiff_argnums=(3, 4, 5))
def _gradients(x, kernel, gradient, stride, padding, wanted):
    """Gradients of `_conv` in `x` and `kernel` from that of its result; None for what is not wanted."""

    def native(x, kernel, gradient):
        convolutions = (
            (lambda x: _native_conv(x, kernel, stride, padding), x),
            (lambda kernel: _native_conv(x, kernel, stride, padding), kernel),
        )
        return tuple(
            jax.linear_transpose(convolution, argument)(gradient)[0] if want else None
            for want, (convolution, argument) in zip(wanted, convolutions, strict=True)
        )

    def own_rows(x, kernel, gradient):
        kernel = slab_convolution.not_before(gradient, kernel)
        folds = (
            (partial(_fold_volume, k=kernel.shape[0], stride=stride, padding=padding), x),
            (partial(_fold_kernel, stride=stride), kernel),
        )
        (fold_x, _), (fold_kernel, _) = folds
        folded = fold_x(x), fold_kernel(kernel), gradient, _folded_padding(stride, padding)
        if stride == 1:
            results = slab_convolution.gradients(*folded, wanted)
        else:  # apart: the windows cost little here, and the compiler can drop what the caller drops
            x_gradient, _ = slab_convolution.gradients(*folded, (wanted[0], False))
            _, kernel_gradient = slab_convolution.gradients(*folded, (False, wanted[1]))
            results = x_gradient, kernel_gradient
        return tuple(
            None if result is None else jax.linear_transpose(fold, argument)(result)[0]
            for result, (fold, argument) in zip(results, folds, strict=True)
        )

    def slabs(x, kernel, gradient):
        rows = axes.parts(*axes.BATCH)
        if rows == 1 or x.shape[0] % rows:
            return own_rows(x, kernel, gradient)

        def summed(x, kernel, gradient):
            x_gradient, kernel_gradient = own_rows(x, kernel, gradient)
            return x_gradient, None if kernel_gradient is None else lax.psum(kernel_gradient, axes.BATCH)

        # Left to the partitioner, devices would exchange the sum over the batch in every round of the walk's loops.
        return jax.shard_map(
            summed,
            in_specs=(axes.ROWS, PartitionSpec(), axes.ROWS),
            out_specs=(axes.ROWS, PartitionSpec()),
            axis_names={*axes.BATCH, axes.SPATIAL},
            check_vma=False,  # as in `_in_parts`
        )(x, kernel, gradient)

    return lax.platform_dependent(x, kernel, gradient, cpu=slabs, default=native)


def _gradients_forward(x, kernel, gradient, stride, padding, wanted):
    return _gradients(x, kernel, gradient, stride, padding, wanted), (x, kernel, gradient)


def _gradients_backward(stride, padding, wanted, kept, cotangents):
    """Both gradients are linear in each of their two arguments, and the derivatives are such convolutions again."""
    x, kernel, gradient = kept
    along_x, along_kernel = (
        jnp.zeros_like(argument) if cotangent is None else cotangent
        for argument, cotangent in zip((x, kernel), cotangents, strict=True)
    )
    x_cotangent, kernel_cotangent = _gradients(along_x, along_kernel, gradient, stride, padding, (True, True))
    no_bias = jnp.zeros(kernel.shape[-1:], x.dtype)
    gradient_cotangent = _conv(along_x, kernel, no_bias, stride, padding)
    gradient_cotangent += _conv(x, along_kernel, no_bias, stride, padding)
    return x_cotangent, kernel_cotangent, gradient_cotangent


_conv.defvjp(_conv_forward, _conv_backward, symbolic_zeros=True)
_gradients.defvjp(_gradients_forward, _gradients_backward)


def _native_conv(x: jax.Array, kernel: jax.Array, stride: int, padding: Padding) -> jax.Array:
    return lax.conv_general_dilated(
        x,
        kernel,
        (stride,) * 3,
        [(side, side) for side in _sides(padding)],
        dimension_numbers=('NDHWC', 'DHWIO', 'NDHWC'),
    )


def _sides(padding: Padding) -> tuple[int, int, int]:
    return padding[0], padding[1], padding[1]


def _fold_volume(x: jax.Array, k: int, stride: int, padding: Padding) -> jax.Array:
    """Space to depth: the padded volume with each cube of side `stride` as one voxel of stride³ times the channels.

    A convolution with this stride is one of stride 1 and no padding on the result, with `_fold_kernel`'s kernel.
    What no window reaches is cut off, and zeros complete the last windows. Stride 1: `x` itself, without padding.
    """
    if stride == 1:
        return x
    folded_k = -(-k // stride)
    edges, shape = [(0, 0, 0)], [x.shape[0]]
    for side, zeros in zip(x.shape[1:4], _sides(padding), strict=True):
        cubes = (side + 2 * zeros - k) // stride + folded_k
        edges.append((zeros, cubes * stride - side - zeros, 0))  # the latter is negative where it cuts
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


def _folded_padding(stride: int, padding: Padding) -> Padding:
    """What is left to pad: `_fold_volume` pads what it folds."""
    return padding if stride == 1 else (0, 0)
