"""The Fréchet distance against SciPy's matrix root, and on sets with known answers."""

import numpy as np
import pytest
import scipy.linalg

from vqroi_jax.metrics.frechet import frechet_distance


def by_matrix_root(x, y):
    means, covariances = [a.mean(axis=0) for a in (x, y)], [np.cov(a, rowvar=False) for a in (x, y)]
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    return np.sum((means[0] - means[1]) ** 2) + np.trace(sum(covariances) - 2 * root.real)


@pytest.mark.parametrize(('n', 'm', 'features'), [(300, 200, 12), (40, 13, 12), (9, 30, 20), (8, 7, 64)])
def test_equals_the_matrix_root(n, m, features):
    rng = np.random.default_rng(0)
    mix = rng.normal(size=(features, features))
    x, y = rng.normal(size=(n, features)) @ mix, rng.normal(0.4, 1.3, (m, features))
    # With fewer samples than features SciPy's root of a singular product is itself only good to a few digits.
    np.testing.assert_allclose(
        frechet_distance(x, y), by_matrix_root(x, y), rtol=1e-9 if min(n, m) > features else 1e-4
    )


def test_a_shift_costs_its_square_and_equal_sets_nothing():
    x = np.random.default_rng(1).normal(5, 1, (50, 8)).astype(np.float32)
    assert abs(frechet_distance(x, x)) < 1e-9
    np.testing.assert_allclose(frechet_distance(x, x + np.float32(0.5)), 8 * 0.25, rtol=1e-5)
    assert abs(frechet_distance(x[:5], x[:5][::-1])) < 1e-9
