"""Volumes, surfaces and histograms of tumours of known shape."""

import numpy as np

from vqroi_jax.metrics import tumour


def test_a_box_has_its_volume_and_surface():
    boxes = np.zeros((2, 8, 9, 10), bool)
    boxes[0, 2:5, 1:3, 4:9] = True  # 3 x 2 x 5 voxels
    boxes[1] = True  # to the border
    spacing = (2.0, 1.0, 0.5)
    np.testing.assert_allclose(tumour.volume_ml(boxes, spacing), [30 / 1000, 720 / 1000])

    def surface(a, b, c):
        a, b, c = a * 2.0, b * 1.0, c * 0.5
        return 2 * (a * b + b * c + a * c) / 100

    np.testing.assert_allclose(tumour.surface_cm2(boxes, spacing), [surface(3, 2, 5), surface(8, 9, 10)], rtol=1e-6)


def test_a_hole_adds_its_own_surface():
    shell = np.zeros((1, 7, 7, 7), bool)
    shell[0, 1:6, 1:6, 1:6] = True
    shell[0, 3, 3, 3] = False
    np.testing.assert_allclose(tumour.surface_cm2(shell, (1, 1, 1)), [(6 * 25 + 6) / 100], rtol=1e-6)


def test_histograms_are_shares_of_the_tumour():
    rng = np.random.default_rng(0)
    volume = rng.uniform(-1, 1, (3, 4, 5, 6)).astype(np.float32)
    volume[0, 0, 0, 0] = 1.0
    inside = rng.random(volume.shape) < 0.4
    inside[0, 0, 0, 0] = True
    inside[2] = False
    found = np.asarray(tumour.intensity_histogram(volume, inside, 8))
    for i in (0, 1):
        counts, _ = np.histogram(volume[i][inside[i]], 8, (-1, 1))
        np.testing.assert_allclose(found[i], counts / inside[i].sum(), rtol=1e-6)
    assert not found[2].any()
