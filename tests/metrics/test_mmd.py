"""MMD against sums over pairs in NumPy, and on sets with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.spatial.distance

from vqroi_jax.metrics import mmd


def pairs(x, y, bandwidth):
    """Lemma 6's U-statistic, pair by pair."""

    def k(a, b):
        return np.exp(-np.sum((a - b) ** 2) / (2 * bandwidth**2))

    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_equals_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(50, 1, (9, 30)), rng.normal(50.3, 1.2, (7, 30))  # far from 0, where rounding would show
    found = jax.jit(mmd.rbf)(jnp.asarray(x), jnp.asarray(y), 6.0)
    np.testing.assert_allclose(found, pairs(x, y, 6.0), atol=2e-5)


def test_bandwidth_is_the_median_distance():
    rng = np.random.default_rng(1)
    x, y = rng.normal(size=(8, 5)), rng.normal(size=(6, 5))
    expected = np.median(scipy.spatial.distance.pdist(np.concatenate([x, y])))
    np.testing.assert_allclose(mmd.median_bandwidth(jnp.asarray(x), jnp.asarray(y)), expected, rtol=1e-5)


def test_is_around_zero_for_one_distribution_and_grows_with_the_shift():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(150, 10))
    others = [rng.normal(shift, 1, (150, 10)) for shift in (0, 0.3, 1)]
    values = [float(mmd.rbf(jnp.asarray(x), jnp.asarray(other), 4.0)) for other in others]
    assert abs(values[0]) < 0.005
    assert values[0] + 0.01 < values[1] < values[2]
