"""Stride-1 3D convolution for CPUs: windows gathered slab by slab, and matrix products.

XLA's own 3D convolution on a CPU reaches a fifth of the speed of its matrix product, and the gradients less. Here a
volume is walked through depth slice by depth slice, each slice in slabs of a few rows. A slab's k x k windows are
laid side by side (im2col within the slice: what is copied stays in the cache) and multiplied with all k depth
slices of the kernel at once, as they are or by Winograd's filtering (`windows`). Product a belongs to output slice
`d + padding - a`, so k partial sums travel along with the walk and one of them is complete after each slice. Nothing
the size of the volume is allocated but the result. Where a slice has few windows, as in the deepest maps, every
product would read a large kernel for little: then all slices are multiplied at once, and their products added up.

The batch stays an axis of every array on the way, so that a volume sharded along it stays sharded.
`convolution` calls this module, and owns strides, other platforms and differentiation.
"""

from functools import partial

import jax
import jax.numpy as jnp
from jax import lax

from vqroi_jax.models import windows

_FEW_TILES = 64  # of a slice of all samples, below which products take longer to read a kernel than to multiply with it
_SLAB_TILES = 1024  # least number of tiles in a slab: products with fewer rows are slower
_PARTS = 4  # of a slice, at most, each with an array of sums: what goes into part of an array, XLA computes on one core
_SLAB_NUMBERS = 2**16  # least tiles times channels: with k3 the windows then hold 2.4 MB (4.7 in tiles of several)


def convolve(x: jax.Array, kernel: jax.Array, bias: jax.Array, padding: tuple[int, int]) -> jax.Array:
    """Convolves with stride 1.

    Args:
        x: [B, D, H, W, in].
        kernel: [k, k, k, in, out].
        bias: [out].
        padding: zeros on both sides of the depth axis, and of height and width.

    Returns:
        [B, d, h, w, out] of the dtype of `x`.
    """
    if _is_product(kernel, padding):
        return x @ kernel[0, 0, 0] + bias
    zeros = (padding[0], padding[1], padding[1])
    depth, height, width = (side + 2 * z - kernel.shape[0] + 1 for side, z in zip(x.shape[1:4], zeros, strict=True))
    products, _ = _correlate(x, kernel.shape[0], padding, (depth, height, width), kernel=kernel, bias=bias)
    assert products is not None, 'there is a kernel'
    return products


def gradients(
    x: jax.Array, kernel: jax.Array, gradient: jax.Array, padding: tuple[int, int], wanted: tuple[bool, bool]
) -> tuple[jax.Array | None, jax.Array | None]:
    """Gradients of `convolve` in its input and in its kernel.

    Both come from the same windows, those of the result's gradient, in one walk. That they are one operation also
    means that neither can be put off by the compiler, which would have to keep what it is computed from.

    Args:
        x: what was convolved, [B, D, H, W, in].
        kernel: [k, k, k, in, out].
        gradient: of the result, [B, d, h, w, out].
        padding: zeros on both sides of the depth axis, and of height and width.
        wanted: whether the gradient in the input is wanted, and that in the kernel.

    Returns:
        Both, of the shapes and dtypes of `x` and `kernel`; None for what is not wanted.
    """
    if _is_product(kernel, padding):
        x_gradient = gradient @ kernel[0, 0, 0].T if wanted[0] else None
        if not wanted[1]:
            return x_gradient, None
        # Slice by slice, for one sum over all voxels would lose digits; in this order a wide `x` is read as it lies.
        turned = jnp.einsum('bdhwo,bdhwi->bdoi', gradient, x).sum((0, 1))
        return x_gradient, turned.T[None, None, None]
    k, (depth, height, width) = kernel.shape[0], x.shape[1:4]
    flipped = jnp.flip(kernel, (0, 1, 2)).swapaxes(3, 4)
    x_gradient, flipped_gradient = _correlate(
        gradient,
        k,
        (k - 1 - padding[0], k - 1 - padding[1]),
        (depth, height, width),
        kernel=flipped if wanted[0] else None,
        bias=jnp.zeros(x.shape[-1:], x.dtype),
        companion=x if wanted[1] else None,
    )
    if flipped_gradient is None:
        return x_gradient, None
    return x_gradient, jnp.flip(flipped_gradient, (0, 1, 2)).swapaxes(3, 4).astype(kernel.dtype)


def not_before(x: jax.Array, other: jax.Array) -> jax.Array:
    """`other`, with which XLA then computes nothing before it has `x`.

    It would otherwise do what needs only parameters or constants at the start of a program, for all layers, and keep
    the results until they are needed. (Unless told not to, it drops optimisation barriers before it orders a program
    for a CPU.)
    """
    first = x[(0,) * x.ndim]
    never = (first != first) & jnp.isfinite(first)  # no number, yet finite, which XLA does not see through
    return jnp.where(never, 0, other)


def _is_product(kernel: jax.Array, padding: tuple[int, int]) -> bool:
    """Whether a convolution is a product of each voxel's channels. Narrower dtypes would be summed in their own."""
    return kernel.shape[0] == 1 and padding == (0, 0) and kernel.dtype == jnp.float32


@partial(jax.jit, static_argnames=('k', 'padding', 'sides'), inline=True)  # traced once for layers alike
def _correlate(
    x: jax.Array,
    k: int,
    padding: tuple[int, int],
    sides: tuple[int, int, int],
    *,
    kernel: jax.Array | None,
    bias: jax.Array,
    companion: jax.Array | None = None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """Takes all windows of side k of a padded volume, and does two things with them.

    Args:
        x: [B, D, H, W, in].
        k: side of the windows.
        padding: zeros on both sides of the depth axis, and of height and width.
        sides: of the grid of windows, (d, h, w).
        kernel: to multiply the windows with, [k, k, k, in, out]; None: not done.
        bias: added to these products, [out].
        companion: to correlate the windows with, [B, d, h, w, out]; None: not done.

    Returns:
        The products, [B, d, h, w, out], and the correlations, float32 [k, k, k, in, out]; None for what is not done.
    """
    form = windows.quickest(k, *sides[1:], x.dtype)
    tiles = -(-sides[2] // form.results)
    way = _at_once if x.shape[0] * sides[1] * tiles < _FEW_TILES else _walk
    weights = None if kernel is None else form.weights(kernel)
    y, total = way(x, form, tiles, padding, sides, weights, bias, companion)
    return y, None if total is None else form.kernel_gradient(total, x.shape[-1])


def _walk(
    x: jax.Array,
    form: windows.Direct,
    tiles: int,
    padding: tuple[int, int],
    sides: tuple[int, int, int],
    weights: jax.Array | None,
    bias: jax.Array,
    companion: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """`_correlate` slice by slice, with weights and sums of correlations as `form` has them."""
    k, (batch, depth, _, _, channels) = form.k, x.shape
    ends, around = padding  # zeros at both ends of the depth axis, and around each slice
    features = bias.shape[0]
    parts, slabs, rows = _slabs(batch, sides[1], tiles, channels)
    extra_rows = parts * slabs * rows - sides[1]  # of zeros, to fill the last slab
    extra_columns = tiles * form.results - sides[2]  # likewise the last tile

    def one_slice(d, carry):
        y, sums, total, others = carry
        plane = lax.dynamic_index_in_dim(x, d, 1, keepdims=False)
        plane = jnp.pad(plane, ((0, 0), (around, around + extra_rows), (around, around + extra_columns), (0, 0)))
        if companion is not None:
            others = jnp.concatenate([turned(companion, d + ends), others[:, :-features]], 1)

        def one_slab(slab, carry, first):
            sums, total = carry
            taken = form.windows(_rows(plane, (first + slab) * rows, rows + k - 1))
            if weights is not None:
                earlier = _rows(sums, slab * rows, rows)[..., :-features]
                new = form.combine(_product(taken, weights, (4,), (1,)))
                new += jnp.pad(earlier, ((0, 0), (0, 0), (0, 0), (features, 0)))
                sums = lax.dynamic_update_slice_in_dim(sums, new, slab * rows, 1)
            if companion is not None:
                spread = form.spread(lax.dynamic_slice_in_dim(others, (first + slab) * rows, rows, 3))
                total += _product(spread, taken, (2, 3, 4), (1, 2, 3))
            return sums, total

        sums = list(sums)
        for part in range(parts):
            one_of_part = partial(one_slab, first=part * slabs)
            sums[part], total = lax.fori_loop(0, slabs, one_of_part, (sums[part], total))
        if weights is not None:
            # Results before the first (there are some if `ends` is less than k - 1) are overwritten by it.
            y = put(y, sums, k - 1, jnp.maximum(d + ends - k + 1, 0))
        return y, sums, total, others

    def turned(y, d):
        """A slice as [results of a tile, out, B, h, tiles]: what a product contracts has to come last."""
        plane = _slice_or_zeros(y, d)
        plane = jnp.pad(plane, ((0, 0), (0, extra_rows), (0, extra_columns), (0, 0)))
        return plane.reshape(batch, -1, tiles, form.results, features).transpose(3, 4, 0, 1, 2)

    def put(y, sums, tap, d):
        done = jnp.concatenate([part[..., tap * features : (tap + 1) * features] for part in sums], 1)
        done = done[:, None, : sides[1], : sides[2]]
        return lax.dynamic_update_slice_in_dim(y, (done + bias).astype(y.dtype), d, 1)

    y = total = others = None
    sums: list[jax.Array | None] = [None] * parts
    if weights is not None:
        # All of it is overwritten; zeros would be one buffer that XLA keeps and copies for every convolution.
        y = jnp.broadcast_to(x[:, :1, :1, :1, :1], (batch, *sides, features))
        sums = [jnp.zeros((batch, slabs * rows, tiles * form.results, k * features), jnp.float32)] * parts
    if companion is not None:
        # Rather than turned over, which it is once at the end: the operand that is read by columns is then the smaller.
        zero = not_before(x, jnp.zeros((), jnp.float32))
        total = jnp.broadcast_to(zero, (form.points, k * features, form.taps * channels))
        others = jnp.concatenate([turned(companion, ends - 1 - tap) for tap in range(k)], 1)
    y, sums, total, others = lax.fori_loop(0, depth, one_slice, (y, sums, total, others))
    if weights is not None:
        for tap in range(k - 2, k - 2 - ends, -1):  # the slices that only padding was to follow
            y = put(y, sums, tap, depth - 1 + ends - tap)
    return y, total


def _at_once(
    x: jax.Array,
    form: windows.Direct,
    tiles: int,
    padding: tuple[int, int],
    sides: tuple[int, int, int],
    weights: jax.Array | None,
    bias: jax.Array,
    companion: jax.Array | None,
) -> tuple[jax.Array | None, jax.Array | None]:
    """As `_walk`, all slices in one product."""
    k, (batch, depth) = form.k, x.shape[:2]
    ends, around = padding
    extra_columns = tiles * form.results - sides[2]
    planes = jnp.pad(x, ((0, 0), (0, 0), (around, around), (around, around + extra_columns), (0, 0)))
    taken = form.windows(planes.reshape(batch * depth, *planes.shape[2:]))
    y = total = None
    if weights is not None:
        new = form.combine(_product(taken, weights, (4,), (1,)))
        new = new.reshape(batch, depth, *new.shape[1:3], k, -1)
        new = jnp.pad(new, ((0, 0), (ends, ends), *((0, 0),) * 4))
        done = sum(new[:, tap : tap + sides[0], :, : sides[2], tap] for tap in range(k))  # in the order of `_walk`
        y = (done + bias).astype(x.dtype)
    if companion is not None:
        before = k - 1 - ends
        others = jnp.pad(companion, ((0, 0), (before, before), (0, 0), (0, extra_columns), (0, 0)))
        others = jnp.stack([others[:, k - 1 - tap : k - 1 - tap + depth] for tap in range(k)])
        others = others.reshape(k, batch * depth, sides[1], tiles, form.results, -1).transpose(4, 0, 5, 1, 2, 3)
        spread = form.spread(others.reshape(form.results, -1, *others.shape[3:]))
        total = _product(spread, taken, (2, 3, 4), (1, 2, 3))
    return y, total


def _slabs(batch: int, height: int, tiles: int, channels: int) -> tuple[int, int, int]:
    """Splits `height` rows, of `tiles` tiles each, into parts of slabs: their number, slabs of each, rows of each."""
    least = max(_SLAB_TILES, _SLAB_NUMBERS // channels)
    rows = -(-height // max(1, round(batch * height * tiles / least)))
    slabs = -(-height // rows)
    parts = max(number for number in range(1, _PARTS + 1) if slabs % number == 0)
    return parts, slabs // parts, rows


def _slice_or_zeros(x: jax.Array, d: jax.Array) -> jax.Array:
    plane = lax.dynamic_index_in_dim(x, jnp.clip(d, 0, x.shape[1] - 1), 1, keepdims=False)
    return jnp.where((d >= 0) & (d < x.shape[1]), plane, 0)


def _rows(plane: jax.Array, start: jax.Array, rows: int) -> jax.Array:
    return lax.dynamic_slice_in_dim(plane, start, rows, 1)


def _product(a: jax.Array, b: jax.Array, a_axes: tuple[int, ...], b_axes: tuple[int, ...]) -> jax.Array:
    return lax.dot_general(a, b, ((a_axes, b_axes), ((0,), (0,))), preferred_element_type=jnp.float32)
