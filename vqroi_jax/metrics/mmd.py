"""Maximum mean discrepancy between two sets of samples.

Source: Gretton et al. 2012, *A kernel two-sample test*, lemma 6.
"""

import jax
import jax.numpy as jnp

_EXACT = jax.lax.Precision.HIGHEST


def squared_distances(x: jax.Array, y: jax.Array) -> jax.Array:
    """Squared Euclidean distances of all pairs, float32 `[n, m]`.

    Args:
        x: `[n, features]`.
        y: `[m, features]`.
    """
    # Around a common centre, so that products of far-away vectors do not swallow the differences.
    centre = jnp.mean(x, axis=0)
    x, y = (x - centre).astype(jnp.float32), (y - centre).astype(jnp.float32)
    products = jnp.einsum('nf,mf->nm', x, y, precision=_EXACT)
    return jnp.maximum(jnp.sum(x**2, 1)[:, None] + jnp.sum(y**2, 1) - 2 * products, 0.0)


def median_bandwidth(x: jax.Array, y: jax.Array) -> jax.Array:
    """The median distance between different samples of both sets together: the usual width of an RBF kernel."""
    both = jnp.concatenate([x, y])
    rows, columns = jnp.triu_indices(len(both), 1)
    return jnp.sqrt(jnp.median(squared_distances(both, both)[rows, columns]))


def rbf(x: jax.Array, y: jax.Array, bandwidth: jax.Array | float) -> jax.Array:
    """Unbiased estimate of the squared MMD with the kernel `exp(-distance² / (2 bandwidth²))`.

    Args:
        x: samples `[n, features]`, n at least 2; volumes flattened, or features of them.
        y: the other set's, `[m, features]`.
        bandwidth: of the kernel, in the unit of the features.

    Returns:
        float32 scalar, around 0 for sets of one distribution (so also negative).
    """

    def kernel(a, b):
        return jnp.exp(-squared_distances(a, b) / (2 * bandwidth**2))

    def within(a):
        values = kernel(a, a)
        return (jnp.sum(values) - jnp.trace(values)) / (len(a) * (len(a) - 1))

    return within(x) + within(y) - 2 * jnp.mean(kernel(x, y))
