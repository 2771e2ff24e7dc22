"""SSIM in 3D against scikit-image, MS-SSIM against SciPy, and on pairs with known answers."""

import jax
import numpy as np
import pytest
from oracle import scipy_ms_ssim
from scipy import ndimage
from skimage.metrics import structural_similarity

from vqroi_jax.metrics.ssim import ms_ssim, scales, ssim


@pytest.mark.parametrize('shape', [(16, 16, 16), (11, 13, 20)])
def test_equals_scikit_image(shape):
    volume, other = pairs(shape)
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


def pairs(shape):
    """Three pairs of volumes, smooth enough that all scales have something to say, nearly alike to hardly so."""
    rng = np.random.default_rng(0)
    volume = ndimage.gaussian_filter(rng.normal(size=(3, *shape)), (0, 2, 2, 2)) * 3
    noise = np.array([0.05, 0.3, 1.0])[:, None, None, None] * rng.normal(size=volume.shape)
    return (np.clip(x, -1, 1).astype(np.float32) for x in (volume, volume + noise))


@pytest.mark.parametrize(('shape', 'levels'), [((24, 26, 25), 2), ((47, 44, 50), 3), ((16, 20, 12), 1)])
def test_ms_ssim_equals_scipy(shape, levels):
    volume, other = pairs(shape)
    assert scales(shape) == levels
    found = jax.jit(ms_ssim)(volume[..., None], other[..., None])
    expected = [
        scipy_ms_ssim.standard(a, b, levels) for a, b in zip(volume.astype(float), other.astype(float), strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    assert found[0] > found[1] > found[2]


def test_scales_are_those_that_hold_a_window():
    assert [scales((side, 200, 200)) for side in (10, 11, 21, 22, 44, 88, 175, 176, 500)] == [0, 1, 1, 2, 3, 4, 4, 5, 5]


@pytest.mark.parametrize('shape', [(24, 26, 25), (32, 16, 33)])
def test_release_mode_equals_the_published_evaluation(shape):
    volume, other = (x / 2 + 0.5 for x in pairs(shape))
    found = ms_ssim(volume[..., None], other[..., None], mode='release')
    expected = [scipy_ms_ssim.release(a, b) for a, b in zip(volume.astype(float), other.astype(float), strict=True)]
    np.testing.assert_allclose(found, expected, rtol=5e-4)


def test_a_region_leaves_out_the_windows_around_other_voxels():
    volume, other = pairs((26, 24, 24))
    region = np.zeros(volume.shape, bool)
    region[:, 8:15, 6:19, 9:12] = True
    found = ms_ssim(volume[..., None], other[..., None], region=region[..., None])
    expected = [
        scipy_ms_ssim.standard(a, b, 2, keep)
        for a, b, keep in zip(volume.astype(float), other.astype(float), region, strict=True)
    ]
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    assert np.isnan(ms_ssim(volume[..., None], other[..., None], region=np.zeros_like(region)[..., None])).all()


@pytest.mark.parametrize('mode', ['standard', 'release'])
def test_ms_ssim_of_equal_and_of_opposite_volumes(mode):
    (volume, _) = pairs((24, 24, 24))
    volume = volume[..., None]
    np.testing.assert_allclose(ms_ssim(volume, volume, mode=mode), 1, rtol=1e-5)
    opposite = ms_ssim(volume, -volume, mode=mode)
    assert np.all(opposite < 0.01)
    assert np.isfinite(opposite).all()


def test_volumes_that_are_too_small_and_unknown_modes_are_refused():
    small = np.zeros((1, 10, 30, 30, 1), np.float32)
    with pytest.raises(ValueError, match='too small'):
        ms_ssim(small, small)
    with pytest.raises(ValueError, match='too small'):
        ms_ssim(small, small, mode='release')
    with pytest.raises(ValueError, match='none of standard, release'):
        ms_ssim(small, small, mode='other')
