"""Separable filters against SciPy."""

import numpy as np
import pytest
from scipy import ndimage

from vqroi_jax.filtering import apply_filters, filter_matrix


@pytest.mark.parametrize(('border', 'mode'), [('valid', 'reflect'), ('symmetric', 'reflect'), ('edge', 'nearest')])
@pytest.mark.parametrize('shape', [(9, 8, 7), (5, 9, 12)])
def test_equals_scipy_along_every_axis(shape, border, mode):
    rng = np.random.default_rng(0)
    volumes = rng.normal(size=(2, *shape)).astype(np.float32)
    taps = rng.uniform(size=5)
    found = apply_filters(volumes, [filter_matrix(side, taps, border) for side in shape])
    expected = volumes.astype(np.float64)
    for axis in (1, 2, 3):
        expected = ndimage.correlate1d(expected, taps, axis=axis, mode=mode)
    if border == 'valid':
        expected = expected[:, 2:-2, 2:-2, 2:-2]
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4)


def test_a_row_shorter_than_the_filter_is_mirrored_over_and_over():
    taps = np.arange(1.0, 14)
    found = filter_matrix(2, taps, 'symmetric') @ np.array([3.0, -1])
    expected = ndimage.correlate1d(np.array([3.0, -1]), taps, mode='reflect')
    np.testing.assert_allclose(found, expected)
