"""Maximum mean discrepancy between two sets of samples.

The RBF and polynomial kernels come as the matrix of a kernel over both sets (`gaussian_kernel`, `cubic_kernel`) and a
statistic of it (`unbiased`), so that a kernel computed once serves every comparison and every bootstrap of its rows.
Sources: Gretton et al. 2012, *A kernel two-sample test*, lemma 6; Bińkowski et al. 2018, *Demystifying MMD GANs*, for
the cubic kernel (KID).
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

_EXACT = jax.lax.Precision.HIGHEST


def squared_distances(x: jax.Array, y: jax.Array, centre: jax.Array | float | None = None) -> jax.Array:
    """Squared Euclidean distances of all pairs, float32 `[n, m]`.

    Args:
        x: `[n, features]`.
        y: `[m, features]`.
        centre: `[features]`, somewhere among the samples: products of vectors that are far from it would swallow the
            differences. None: the mean of `x`.
    """
    centre = jnp.mean(x, axis=0) if centre is None else centre
    x, y = (x - centre).astype(jnp.float32), (y - centre).astype(jnp.float32)
    products = jnp.einsum('nf,mf->nm', x, y, precision=_EXACT)
    return jnp.maximum(jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1) - 2 * products, 0.0)


def all_squared_distances(rows: int, load: Callable[[np.ndarray], np.ndarray], block: int) -> np.ndarray:
    """Squared distances between all of many large samples, of which no more than two blocks are in memory.

    Args:
        rows: how many samples there are.
        load: from their numbers, int `[b]`, to float32 `[b, features]`.
        block: samples a block.

    Returns:
        float32 `[rows, rows]`, symmetric, with a diagonal of 0.
    """
    distances = np.zeros((rows, rows), np.float32)
    parts = [np.arange(start, min(start + block, rows)) for start in range(0, rows, block)]
    for i, one in enumerate(parts):
        x = jnp.asarray(load(one))
        centre = jnp.mean(x, axis=0)
        for other in parts[i:]:
            found = np.asarray(_distances(x, x if other is one else jnp.asarray(load(other)), centre))
            distances[np.ix_(one, other)] = found
            distances[np.ix_(other, one)] = found.T
    np.fill_diagonal(distances, 0)
    return distances


_distances = jax.jit(squared_distances)


def median_bandwidth(distances: jax.Array) -> jax.Array:
    """The median distance between different samples, the usual width of an RBF kernel.

    Args:
        distances: squared, `[n, n]`.
    """
    return jnp.median(jnp.sqrt(distances[jnp.triu_indices(len(distances), 1)]))


def gaussian_kernel(distances: jax.Array, bandwidth: jax.Array | float) -> jax.Array:
    """`exp(-distance² / (2 bandwidth²))` of squared distances, of any shape."""
    return jnp.exp(-distances / (2 * bandwidth**2))


def cubic_kernel(x: jax.Array, y: jax.Array) -> jax.Array:
    """`(x·y / features + 1)³` of all pairs of `[n, features]` and `[m, features]`, as KID has it; `[n, m]`."""
    return (jnp.einsum('nf,mf->nm', x, y, precision=_EXACT) / x.shape[1] + 1) ** 3


def cubic_kernel_of_sets(seen: np.ndarray, block: int = 32) -> np.ndarray:
    """`cubic_kernel` of samples that are sets of vectors: its mean over all pairs of a vector of one and of another.

    What comes of one body is not independent. With this kernel `unbiased` pairs no sample with itself, so none of a
    body's vectors with another of the same.

    Args:
        seen: `[n, vectors, features]`.
        block: samples that are compared with all others at once.

    Returns:
        float32 `[n, n]`.
    """
    every = jnp.asarray(seen)
    parts = [_cubic_kernel_of_sets(every[start : start + block], every) for start in range(0, len(every), block)]
    return np.concatenate(jax.device_get(parts))


@jax.jit
def _cubic_kernel_of_sets(x: jax.Array, y: jax.Array) -> jax.Array:
    (n, vectors, features), m = x.shape, len(y)
    kernel = cubic_kernel(x.reshape(-1, features), y.reshape(-1, features))
    return kernel.reshape(n, vectors, m, vectors).mean(axis=(1, 3))


@jax.jit
def unbiased(kernel: jax.Array, x: jax.Array, y: jax.Array) -> jax.Array:
    """Unbiased estimate of the squared MMD between two of the sets that a kernel's matrix was computed for.

    Args:
        kernel: `[n, n]`, symmetric.
        x: `[n]`, how often each row belongs to one set: 1 or 0, or more where a bootstrap drew it several times (a
            pair of a sample with itself is then left out).
        y: `[n]`, the same of the other set.

    Returns:
        Scalar of the kernel's dtype, around 0 for sets of one distribution (so also negative).
    """
    diagonal = jnp.diagonal(kernel)

    def between(a, b):
        return jnp.einsum('i,ij,j', a, kernel, b, precision=_EXACT)

    def within(a):
        return (between(a, a) - jnp.sum(a * a * diagonal)) / (jnp.sum(a) ** 2 - jnp.sum(a * a))

    x, y = x.astype(kernel.dtype), y.astype(kernel.dtype)
    return within(x) + within(y) - 2 * between(x, y) / (jnp.sum(x) * jnp.sum(y))


def unbiased_of_rows(kernel: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """`unbiased` of two sets that are given by their rows, int `[a]` and `[b]`; one that comes twice counts twice."""
    return float(unbiased(kernel, *(np.bincount(rows, minlength=len(kernel)) for rows in (x, y))))


def linear(distances: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    """Squared distance between the mean samples of two sets: the MMD of a linear kernel, biased.

    Args:
        distances: squared, `[n, n]`, between all samples of both.
        x: rows of one set; one that comes twice counts twice.
        y: rows of the other.
    """

    def mean(a, b):
        return distances[np.ix_(a, b)].mean(dtype=np.float64)

    return float(mean(x, y) - (mean(x, x) + mean(y, y)) / 2)


def linear_by_batches(
    distances: np.ndarray, x: np.ndarray, y: np.ndarray, batch: int, repeats: int, rng: np.random.Generator
) -> float:
    """Mean of `linear` over mini-batches, as the paper's evaluation has it.

    It falls with the size of the batches, for each mean has the noise of that many samples, and grows with the range of
    the data: figures compare only where both are the same.

    Args:
        distances: squared, `[n, n]`, between all samples of both sets.
        x: rows of one set.
        y: rows of the other.
        batch: samples of each set in a mini-batch, at most as many as there are; what does not fill one up is left out.
        repeats: how often all are gone through, in a new order.
        rng: for the orders.
    """
    values = []
    for _ in range(repeats):
        one, other = rng.permutation(x), rng.permutation(y)
        starts = range(0, min(len(x), len(y)) - batch + 1, batch)
        values += [linear(distances, one[i : i + batch], other[i : i + batch]) for i in starts]
    return float(np.mean(values))
