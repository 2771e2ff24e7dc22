"""PSNR, L1 and the tumour's box against plain NumPy."""

import numpy as np
from skimage.metrics import peak_signal_noise_ratio

from vqroi_jax.metrics import reconstruction


def pair():
    rng = np.random.default_rng(0)
    volume = np.full((2, 9, 8, 7, 1), -1, np.float32)
    volume[0, 2:5, 1:4, 3:6] = rng.uniform(-0.5, 1, (3, 3, 3, 1))
    volume[0, 7, 2, 3] = 0.3  # a second piece of the tumour
    volume[1, 4:6, 0:2, 0:7] = 0.5
    return volume, (volume + 0.2 * rng.normal(size=volume.shape)).astype(np.float32)


def test_l1_and_psnr_of_each_sample():
    volume, other = pair()
    everywhere = np.ones_like(volume, bool)
    expected = [peak_signal_noise_ratio(v, o, data_range=2) for v, o in zip(volume, other, strict=True)]
    np.testing.assert_allclose(reconstruction.psnr(other, volume, everywhere), expected, rtol=1e-5)
    np.testing.assert_allclose(
        reconstruction.l1(other, volume), np.abs(volume - other).mean(axis=(1, 2, 3, 4)), rtol=1e-5
    )


def test_box_is_the_smallest_around_all_of_the_tumour():
    volume, other = pair()
    box = np.asarray(reconstruction.tumour_box(volume))
    expected = np.zeros_like(box)
    expected[0, 2:8, 1:4, 3:6] = True
    expected[1, 4:6, 0:2, 0:7] = True
    np.testing.assert_array_equal(box, expected)
    inside = [peak_signal_noise_ratio(v[b], o[b], data_range=2) for v, o, b in zip(volume, other, box, strict=True)]
    np.testing.assert_allclose(reconstruction.psnr(other, volume, box), inside, rtol=1e-5)
