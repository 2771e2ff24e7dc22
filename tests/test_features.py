"""Features of slices: which slices are taken, and that VGG16 sees them as LPIPS does."""

import jax
import numpy as np
import pytest

from vqroi_jax import features
from vqroi_jax.features import plane_features
from vqroi_jax.models import perceptual


@pytest.fixture(scope='module')
def network():
    return features.vgg16()


def volumes():
    """Two ROIs of 20 x 22 x 24 voxels with a tumour at depth 6 to 13, height 4 to 11 and width 10 to 19."""
    result = np.full((2, 20, 22, 24), -1.0, np.float32)
    result[:, 6:14, 4:12, 10:20] = np.random.default_rng(0).uniform(-0.5, 1, (2, 8, 8, 10))
    return result


see = jax.jit(perceptual.VGG16Features().apply)


def expected(image, network):
    """VGG16's last map before its pooling, averaged, by hand: from LPIPS's layers and scaling."""
    grey = np.repeat(image[None, ..., None], 3, axis=-1)
    return np.asarray(see({'params': network.weights}, grey))[0]


@pytest.mark.parametrize(
    ('plane', 'places', 'take'),
    [
        ('axial', (7, 9, 10, 12), lambda v, i: v[i]),
        ('sagittal', (5, 7, 8, 10), lambda v, i: v[:, i]),
        ('coronal', (11, 13, 16, 18), lambda v, i: v[:, :, i]),
    ],
)
def test_slices_are_spread_over_the_tumour(plane, places, take, network, monkeypatch):
    monkeypatch.setattr(features, 'BATCH', 8)
    found = plane_features(volumes(), plane, 4, keep_empty=False, network=network)
    assert found.shape == (2, 4, 512)
    for row, volume in enumerate(volumes()):
        for number in (0, 3):
            np.testing.assert_allclose(
                found[row, number], expected(take(volume, places[number]), network), rtol=1e-3, atol=1e-4
            )


@pytest.mark.parametrize(('voxels', 'slices'), [(16, 2), (17, 4), (128, 16), (5, 16), (9, 3), (24, 5)])
def test_a_mirrored_volume_is_seen_in_the_same_slices(voxels, slices):
    volume = np.full((voxels + 3, 2, 2), -1.0, np.float32)
    volume[1 : voxels + 1] = 0.5
    found = features.places(volume, 0, slices, keep_empty=False)
    mirrored = features.places(volume[::-1], 0, slices, keep_empty=False)
    assert 1 <= found[0] <= found[-1] <= voxels
    differing = np.abs(found - (voxels + 2 - mirrored[::-1]))
    assert differing.sum() == (slices % 2 and not voxels % 2)  # then the middle slice lies between two
    whole = features.places(volume, 0, slices, keep_empty=True)
    assert np.ptp(np.diff(whole)) <= 1


@pytest.mark.long
def test_or_over_the_whole_roi(network):
    found = plane_features(volumes(), 'axial', 2, keep_empty=True, network=network)
    for number, place in enumerate((5, 15)):
        np.testing.assert_allclose(found[0, number], expected(volumes()[0, place], network), rtol=1e-3, atol=1e-4)
    empty = plane_features(np.full((1, 20, 22, 24), -1.0, np.float32), 'axial', 2, False, network)
    np.testing.assert_allclose(empty[0], found[[0, 0], [0, 1]], rtol=1e-3, atol=1e-4)
