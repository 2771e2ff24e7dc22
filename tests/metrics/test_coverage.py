"""Precision, recall, density and coverage against loops, and on sets with known answers."""

import numpy as np
import scipy.spatial.distance

from vqroi_jax.metrics.coverage import precision_recall_density_coverage


def figures(real, fake, neighbours=3):
    cdist = scipy.spatial.distance.cdist
    found = precision_recall_density_coverage(cdist(real, real), cdist(fake, fake), cdist(real, fake), neighbours)
    return {name: float(value.mean()) for name, value in found.items()}


def by_loops(real, fake, k):
    def radius(rows, i):
        return sorted(np.linalg.norm(rows[i] - row) for j, row in enumerate(rows) if j != i)[k - 1]

    in_real = [[np.linalg.norm(f - r) <= radius(real, i) for i, r in enumerate(real)] for f in fake]
    in_fake = [[np.linalg.norm(f - r) <= radius(fake, j) for j, f in enumerate(fake)] for r in real]
    nearest = [min(np.linalg.norm(f - r) for f in fake) <= radius(real, i) for i, r in enumerate(real)]
    return {
        'precision': np.mean([any(row) for row in in_real]),
        'recall': np.mean([any(row) for row in in_fake]),
        'density': np.sum(in_real) / (k * len(fake)),
        'coverage': np.mean(nearest),
    }


def test_equals_loops():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(20, 3)), rng.normal(0.5, 1.2, (15, 3))
    found, expected = figures(real, fake), by_loops(real, fake, 3)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-6)
        assert 0 < value < 1.5


def test_copies_are_perfect_and_a_single_mode_is_not():
    real = np.random.default_rng(1).normal(size=(40, 4))
    copies = figures(real, real)
    assert copies['precision'] == copies['recall'] == copies['coverage'] == 1
    one_mode = figures(real, real[:1] + np.random.default_rng(2).normal(0, 1e-3, (40, 4)))
    assert one_mode['precision'] == 1
    assert one_mode['recall'] < 0.1
    assert one_mode['coverage'] < 0.3
    far = figures(real, real + 100)
    assert far == {'precision': 0, 'recall': 0, 'density': 0, 'coverage': 0}
