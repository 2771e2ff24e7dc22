"""Max pooling against SciPy's and against each window looked at by itself."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from vqroi_jax.models.pooling import max_pool

CASES = [((7, 6), 2, 2, 0), ((9, 8), 3, 2, 0), ((5, 6), 3, 1, 1), ((7, 8, 5), 3, 2, 1)]


def windows_of(sides, window, stride, padding):
    """The place of each result, and the places of the volume that its window covers, in the order of memory."""
    counts = [(side + 2 * padding - window) // stride + 1 for side in sides]
    for place in itertools.product(*map(range, counts)):
        starts = [index * stride - padding for index in place]
        covered = itertools.product(*(range(start, start + window) for start in starts))
        yield (
            place,
            [voxel for voxel in covered if all(0 <= i < side for i, side in zip(voxel, sides, strict=True))],
        )


@pytest.mark.parametrize(('sides', 'window', 'stride', 'padding'), CASES)
def test_values_are_those_of_a_maximum_filter(sides, window, stride, padding):
    x = np.random.default_rng(0).normal(size=(2, *sides, 3)).astype(np.float32)
    filtered = ndimage.maximum_filter(x, (1, *(window,) * len(sides), 1), mode='constant', cval=-np.inf)
    first = (window - 1) // 2 - padding + (window % 2 == 0)  # a filter's window lies around its voxel
    counts = [(side + 2 * padding - window) // stride + 1 for side in sides]
    wanted = filtered[:, *(slice(first, first + (count - 1) * stride + 1, stride) for count in counts)]
    np.testing.assert_array_equal(max_pool(x, window, stride, padding), wanted)


@pytest.mark.parametrize(('sides', 'window', 'stride', 'padding'), CASES)
def test_the_gradient_goes_to_the_first_of_equal_values(sides, window, stride, padding):
    rng = np.random.default_rng(0)
    x = rng.integers(0, 3, (2, *sides, 3)).astype(np.float32)  # most windows have their largest value twice
    y, pull = jax.vjp(lambda x: max_pool(x, window, stride, padding), x)
    upstream = rng.normal(size=y.shape).astype(np.float32)
    wanted = np.zeros_like(x)
    for sample, channel in itertools.product(range(2), range(3)):
        for place, covered in windows_of(sides, window, stride, padding):
            first = max(covered, key=lambda voxel: x[sample, *voxel, channel])
            wanted[sample, *first, channel] += upstream[sample, *place, channel]
    np.testing.assert_allclose(pull(upstream)[0], wanted, atol=1e-6)


def test_what_is_not_a_number_is_not_passed_over():
    x = jnp.ones((1, 4, 4, 1)).at[0, 0, 1, 0].set(jnp.nan).at[0, 2, 2, 0].set(jnp.nan)
    np.testing.assert_array_equal(np.isnan(max_pool(x, 2, 2)[0, ..., 0]), [[True, False], [False, True]])
