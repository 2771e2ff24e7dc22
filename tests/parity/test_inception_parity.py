"""FID's Inception-v3 beside PyTorch's, with the same weights: features of slices of any size, and the resizing."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='PyTorch is not installed: pip install -e ".[parity]"')

from oracle import torch_inception  # noqa: E402
from oracle.comparison import QUICK_COMPILATION, assert_near, channels_first, channels_last  # noqa: E402

from vqroi_jax import features  # noqa: E402
from vqroi_jax.models import inception  # noqa: E402


def test_features_of_slices_are_theirs(tmp_path):
    theirs = torch_inception.InceptionV3().eval()
    torch_inception.randomise(theirs, seed=0)
    torch.save(theirs.state_dict(), tmp_path / 'w.pth')
    slices = np.random.default_rng(0).uniform(-1, 1, (2, 40, 50)).astype(np.float32)
    slices[1, 10:30, 20:40] = -1
    with torch.no_grad():
        grey = torch.tensor((slices.astype(np.float64) + 1) / 2)[:, None].repeat(1, 3, 1, 1)
        expected = theirs.double()(grey).numpy()
    network = features.inception_v3(tmp_path / 'w.pth')
    ours = jax.jit(network.see, compiler_options=QUICK_COMPILATION)(network.weights, slices)
    assert np.mean(expected > 0) > 0.7  # few are cut off by their ReLU
    np.testing.assert_allclose(ours, expected, rtol=1e-4, atol=1e-4 * expected.mean())
    assert_near(ours[0] - ours[1], expected[0] - expected[1], 'difference of two slices')


@pytest.mark.parametrize('size', [(24, 31), (128, 128), (299, 299), (400, 310)])
def test_resizing_is_theirs(size):
    images = np.random.default_rng(0).uniform(-1, 1, (2, *size, 3)).astype(np.float32)
    expected = channels_last(torch_inception.resize(channels_first(images)))
    # Places in an image are float32, so that their rounding grows with it.
    np.testing.assert_allclose(inception.resize(images), expected, atol=3e-7 * max(size))
