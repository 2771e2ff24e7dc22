"""SSIM in 3D against scikit-image."""

import numpy as np
import pytest
from skimage.metrics import structural_similarity

from vqroi_jax.metrics.ssim import ssim


@pytest.mark.parametrize('shape', [(16, 16, 16), (11, 13, 20)])
def test_equals_scikit_image(shape):
    rng = np.random.default_rng(0)
    volume = rng.uniform(-1, 1, (3, *shape)).astype(np.float32)
    other = np.clip(volume + np.array([0.01, 0.2, 1.0])[:, None, None, None] * rng.normal(size=volume.shape), -1, 1)
    other = other.astype(np.float32)
    expected = [
        structural_similarity(
            a, b, data_range=2, gaussian_weights=True, sigma=1.5, use_sample_covariance=False, truncate=3.5
        )
        for a, b in zip(volume.astype(float), other.astype(float), strict=True)
    ]
    np.testing.assert_allclose(ssim(volume[..., None], other[..., None]), expected, rtol=1e-4, atol=1e-5)


def test_is_one_for_equal_volumes():
    volume = np.random.default_rng(0).uniform(-1, 1, (1, 12, 12, 12, 1)).astype(np.float32)
    np.testing.assert_allclose(ssim(volume, volume), 1, rtol=1e-5)
