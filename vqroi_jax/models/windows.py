"""How `slab_convolution` multiplies the windows of a slice with a kernel: as they are, or by Winograd's filtering.

Minimal filtering finds m results of a filter of k taps with m + k - 1 multiplications instead of m * k. A filter's
result is a product of polynomials read backwards: each is evaluated at m + k - 1 points, the values are multiplied,
and the results interpolated. All but the multiplications are sums with small constants.
Source: Lavin & Gray 2016, https://arxiv.org/abs/1509.09308, whose points these are; here along the width alone, where
it halves the multiplications of a kernel of 3, at a relative error in float32 of 1e-6 where direct products have 3e-7.
"""

from collections.abc import Sequence
from functools import cache, reduce
from operator import add
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

_POINTS = (0, 1, -1, 2, -2)  # and infinity; more points would cost digits
_TILE = 4  # results of a tile
_LEAST_TILES = 64  # of a slice: products with fewer rows take longer than what they save


class Direct:
    """Windows as they are: one product with all k * k taps of a slice.

    Attributes:
        results: windows side by side that are taken together.
        points: products that this takes.
        taps: of the kernel, in each of them.
    """

    results = points = 1

    def __init__(self, k: int):
        """For kernels of side k."""
        self.k, self.taps = k, k**2

    def weights(self, kernel: jax.Array) -> jax.Array:
        """`kernel`, [k, k, k, in, out], as [points, taps * in, k * out]: all its depth slices side by side."""
        return jnp.moveaxis(kernel, 0, 3).reshape(1, -1, self.k * kernel.shape[-1])

    def kernel_gradient(self, total: jax.Array, channels: int) -> jax.Array:
        """The transpose of `weights`: from [points, k * out, taps * in] to [k, k, k, in, out]."""
        return total.reshape(self.k, -1, self.k, self.k, channels).transpose(0, 2, 3, 4, 1)

    def windows(self, rows: jax.Array) -> jax.Array:
        """All windows of a slab, [B, h + k - 1, w + k - 1, in], as [points, B, h, tiles, taps * in]."""
        height, width = (side - self.k + 1 for side in rows.shape[1:3])
        starts = [(row, column) for row in range(self.k) for column in range(self.k)]
        return jnp.concatenate([rows[:, i : i + height, j : j + width] for i, j in starts], -1)[None]

    def combine(self, products: jax.Array) -> jax.Array:
        """Products of windows and weights, [points, B, h, tiles, k * out], as results, [B, h, w, k * out]."""
        return products[0]

    def spread(self, results: jax.Array) -> jax.Array:
        """The transpose of `combine`: from [results, k * out, B, h, tiles] to [points, k * out, B, h, tiles]."""
        return results


class Winograd(Direct):
    """Tiles of `results` windows side by side, whose width is a multiple of that: one product for each point."""

    def __init__(self, k: int, results: int = _TILE):
        """For kernels of side k, at most as many as `results`."""
        self.k, self.results, self.taps = k, results, k
        self.points = results + k - 1
        self._filtering = minimal_filtering(results, k)

    def weights(self, kernel: jax.Array) -> jax.Array:
        """As `Direct` has it."""
        weights = jnp.einsum('pw,dhwio->phido', self._filtering.taps, kernel)
        return weights.reshape(self.points, -1, self.k * kernel.shape[-1])

    def kernel_gradient(self, total: jax.Array, channels: int) -> jax.Array:
        """As `Direct` has it."""
        total = total.reshape(self.points, self.k, -1, self.k, channels)
        return jnp.einsum('pw,pdohi->dhwio', self._filtering.taps, total)

    def windows(self, rows: jax.Array) -> jax.Array:
        """As `Direct` has it."""
        batch, height, width, channels = rows.shape
        tiles = (width - self.k + 1) // self.results
        rows = jnp.pad(rows, ((0, 0), (0, 0), (0, (tiles + 1) * self.results - width), (0, 0)))
        rows = rows.reshape(batch, height, tiles + 1, self.results, channels)
        starts = [divmod(point, self.results) for point in range(self.points)]
        columns = [rows[:, :, tile : tile + tiles, column] for tile, column in starts]
        # Stacked first: XLA:CPU would compute the sums anew for each row of a window.
        data = jnp.stack(_sums(self._filtering.data, columns))
        return jnp.concatenate([data[:, :, row : row + height - self.k + 1] for row in range(self.k)], -1)

    def combine(self, products: jax.Array) -> jax.Array:
        """As `Direct` has it."""
        results = jnp.stack(_sums(self._filtering.results, list(products)), 3)
        return results.reshape(*results.shape[:2], -1, results.shape[-1])

    def spread(self, results: jax.Array) -> jax.Array:
        """As `Direct` has it."""
        return jnp.stack(_sums(self._filtering.results.T, list(results)))


def quickest(k: int, height: int, width: int, dtype: jnp.dtype) -> Direct:
    """How to multiply the `height` x `width` windows of side k of a slice.

    Narrower dtypes than float32 have no digits to spare, and a slice that is small has more to do for its kernel than
    it saves. The batch does not count, so that a sample's results do not depend on others.
    """
    winograd = k in (2, 3) and dtype == jnp.float32 and height * -(-width // _TILE) >= _LEAST_TILES
    return Winograd(k) if winograd else Direct(k)


class Filtering(NamedTuple):
    """`results @ ((taps @ filter) * (data @ signal))` are the results, n = m + k - 1 being the signal's length."""

    results: np.ndarray  # float32 [m, n]
    taps: np.ndarray  # float32 [n, k]
    data: np.ndarray  # float32 [n, n]: whole numbers


@cache
def minimal_filtering(results: int, taps: int) -> Filtering:
    """The three matrices for `results` results of a filter of `taps` taps; the sum of both is at most 7."""
    points = results + taps - 1

    def evaluate(terms: int) -> np.ndarray:
        """[points, terms]: a polynomial's value at each point; at infinity, its highest term."""
        return np.vstack([np.vander(_POINTS[: points - 1], terms, increasing=True), np.eye(terms)[-1]])

    data = np.linalg.inv(evaluate(points)).T
    scale = np.min(np.abs(data), 1, where=np.abs(data) > 1e-9, initial=np.inf)[:, None]  # leaves whole numbers
    matrices = evaluate(results).T, evaluate(taps) * scale, np.round(data / scale)
    return Filtering(*(matrix.astype(np.float32) for matrix in matrices))


def _sums(matrix: np.ndarray, parts: Sequence[jax.Array]) -> list[jax.Array]:
    """`matrix`, [m, n], times n arrays of one shape: each a sum of a few of them, where a product would read all."""
    rows = [[(number, part) for number, part in zip(row, parts, strict=True) if number] for row in matrix.tolist()]
    return [reduce(add, (part if number == 1 else number * part for number, part in row)) for row in rows]
