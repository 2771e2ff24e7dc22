"""MS-SSIM in the mode 'standard' beside MONAI's, at sizes and scales that it accepts.

(torchmetrics counts the windows across mirrored borders too at the last scale, so its figures are others.)
"""

import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from vqroi_jax.metrics import ssim

torch = pytest.importorskip('torch', reason='PyTorch is not installed: pip install -e ".[parity]"')
monai = pytest.importorskip('monai.metrics', reason='MONAI is not installed: pip install -e ".[parity]"')


def pairs(side):
    rng = np.random.default_rng(0)
    volume = ndimage.gaussian_filter(rng.normal(size=(2, side, side, side)), (0, 2, 2, 2)) * 3
    noise = np.array([0.1, 0.5])[:, None, None, None] * rng.normal(size=volume.shape)
    return [np.clip(x, -1, 1).astype(np.float32) / 2 + 0.5 for x in (volume, volume + noise)]


@pytest.mark.parametrize('side', [32, 50])
def test_equals_theirs(side):
    volume, other = pairs(side)
    number = ssim.scales((side,) * 3)
    weights = tuple((np.array(ssim.WEIGHTS[:number]) / sum(ssim.WEIGHTS[:number])).tolist())
    ours = np.asarray(ssim.ms_ssim(jnp.asarray(volume[..., None]), jnp.asarray(other[..., None]), data_range=1.0))
    tensors = [torch.tensor(x[:, None]) for x in (other, volume)]
    theirs = monai.MultiScaleSSIMMetric(
        spatial_dims=3, data_range=1.0, kernel_size=11, kernel_sigma=1.5, weights=weights
    )(*tensors)
    np.testing.assert_allclose(ours, theirs.numpy()[:, 0], rtol=1e-4)
