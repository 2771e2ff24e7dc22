"""MMD against sums over pairs in NumPy, and on sets with known answers."""

import jax
import jax.numpy as jnp
import numpy as np
import scipy.spatial.distance

from vqroi_jax.metrics import mmd


def pairs(x, y, k):
    """Lemma 6's U-statistic, pair by pair."""
    n, m = len(x), len(y)
    xx = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    yy = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return xx + yy - 2 * sum(k(a, b) for a in x for b in y) / (n * m)


def members(sizes, which):
    """1 for the rows of one of several sets that were put one after another."""
    return jnp.repeat(jnp.arange(len(sizes)) == which, np.array(sizes)).astype(jnp.float32)


def test_equals_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(50, 1, (9, 30)), rng.normal(50.3, 1.2, (7, 30))  # far from 0, where rounding would show
    both = jnp.concatenate([x, y])
    kernel = mmd.gaussian_kernel(mmd.squared_distances(both, both), 6.0)
    found = jax.jit(mmd.unbiased)(kernel, members((9, 7), 0), members((9, 7), 1))
    np.testing.assert_allclose(found, pairs(x, y, lambda a, b: np.exp(-np.sum((a - b) ** 2) / 72)), atol=2e-5)


def test_kid_equals_the_sum_over_pairs():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(9, 30)), rng.normal(0.3, 1.2, (7, 30))
    both = jnp.concatenate([x, y])
    found = mmd.unbiased(mmd.cubic_kernel(both, both), members((9, 7), 0), members((9, 7), 1))
    np.testing.assert_allclose(found, pairs(x, y, lambda a, b: (a @ b / 30 + 1) ** 3), rtol=1e-4)


def test_vectors_of_one_sample_are_not_paired_with_each_other():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(5, 3, 8)), rng.normal(0.3, 1.2, (4, 3, 8))

    def k(a, b):
        return np.mean([(one @ other / 8 + 1) ** 3 for one in a for other in b])

    kernel = mmd.cubic_kernel_of_sets(np.concatenate([x, y]), block=4)
    found = mmd.unbiased_of_rows(kernel, np.arange(5), np.arange(5, 9))
    np.testing.assert_allclose(found, pairs(x, y, k), rtol=1e-4)


def test_rows_drawn_several_times_are_not_paired_with_themselves():
    rng = np.random.default_rng(3)
    both = jnp.asarray(rng.normal(size=(10, 4)))
    kernel = mmd.gaussian_kernel(mmd.squared_distances(both, both), 2.0)
    x, y = jnp.array([2, 0, 1, 3, 0, 0, 0, 0, 0, 0]), jnp.array([0, 0, 0, 0, 0, 1, 2, 0, 1, 2])
    drawn = [np.repeat(np.arange(10), np.asarray(counts)) for counts in (x, y)]

    def within(rows):
        return np.mean([kernel[i, j] for i in rows for j in rows if i != j])

    between = np.mean([kernel[i, j] for i in drawn[0] for j in drawn[1]])
    expected = within(drawn[0]) + within(drawn[1]) - 2 * between
    np.testing.assert_allclose(mmd.unbiased(kernel, x, y), expected, atol=1e-6)


def test_distances_by_blocks_equal_those_at_once():
    samples = np.random.default_rng(1).normal(3, 1, (11, 6)).astype(np.float32)
    found = mmd.all_squared_distances(11, lambda rows: samples[rows], block=4)
    expected = scipy.spatial.distance.squareform(scipy.spatial.distance.pdist(samples)) ** 2
    np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-5)


def test_bandwidth_is_the_median_distance():
    samples = np.random.default_rng(1).normal(size=(4, 5))  # 6 pairs, the middle two of which are apart
    expected = np.median(scipy.spatial.distance.pdist(samples))
    distances = mmd.squared_distances(jnp.asarray(samples), jnp.asarray(samples))
    np.testing.assert_allclose(mmd.median_bandwidth(distances), expected, rtol=1e-5)


def test_is_around_zero_for_one_distribution_and_grows_with_the_shift():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(150, 10))
    others = [rng.normal(shift, 1, (150, 10)) for shift in (0, 0.3, 1)]
    sizes = (150,) * 4
    both = jnp.concatenate([x, *others])
    kernel = mmd.gaussian_kernel(mmd.squared_distances(both, both), 4.0)
    values = [float(mmd.unbiased(kernel, members(sizes, 0), members(sizes, i))) for i in (1, 2, 3)]
    assert abs(values[0]) < 0.005
    assert values[0] + 0.01 < values[1] < values[2]


def distances_of(*sets):
    both = np.concatenate(sets).reshape(sum(map(len, sets)), -1).astype(np.float32)
    return mmd.all_squared_distances(len(both), lambda rows: both[rows], block=50)


def test_linear_is_the_squared_distance_of_mean_volumes():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(6, 4, 4, 4)), rng.normal(1, 1, (7, 4, 4, 4))
    expected = np.sum((x.mean(0) - y.mean(0)) ** 2)
    distances, one, other = distances_of(x, y), np.arange(6), np.arange(6, 13)
    np.testing.assert_allclose(mmd.linear(distances, one, other), expected, rtol=1e-5)
    whole = mmd.linear_by_batches(distances, one, other[:6], 6, repeats=3, rng=np.random.default_rng(0))
    np.testing.assert_allclose(whole, np.sum((x.mean(0) - y[:6].mean(0)) ** 2), rtol=1e-5)


def test_linear_by_batches_is_the_mean_over_disjoint_batches_and_grows_as_they_shrink():
    x, y = np.random.default_rng(5).normal(size=(2, 300, 50))
    distances, one, other = distances_of(x, y), np.arange(300), np.arange(300, 600)
    found = [mmd.linear_by_batches(distances, one, other, n, 4, np.random.default_rng(0)) for n in (2, 10, 50)]
    # Of independent noise of variance 1 in 50 features, each mean has variance 50 / batch.
    np.testing.assert_allclose(found, [2 * 50 / batch for batch in (2, 10, 50)], rtol=0.15)
