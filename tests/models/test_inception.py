"""FID's Inception-v3: its size and names, how arrays are taken over, what is refused. (Parity is in tests/parity.)"""

import jax
import numpy as np
import pytest

from vqroi_jax import torch_files
from vqroi_jax.errors import InputError
from vqroi_jax.models import inception


def test_has_the_size_and_the_names_that_are_known():
    shapes = inception.file_shapes()
    # torchvision's network without auxiliary head has 23,834,568 parameters with 1000 classes; FID's file has 1008.
    learnt = {name: shape for name, shape in shapes.items() if 'running' not in name}
    assert sum(np.prod(shape, dtype=int) for shape in learnt.values()) == 23_834_568 + 8 * (2048 + 1)
    assert len(shapes) == 94 * 5 + 2
    assert shapes['Conv2d_1a_3x3.conv.weight'] == (32, 3, 3, 3)
    assert shapes['Mixed_5b.branch_pool.conv.weight'] == (32, 192, 1, 1)
    assert shapes['Mixed_6b.branch7x7dbl_2.conv.weight'] == (128, 128, 7, 1)
    assert shapes['Mixed_7a.branch7x7x3_4.conv.weight'] == (192, 192, 3, 3)
    assert shapes['Mixed_7c.branch3x3dbl_3b.bn.running_var'] == (384,)


def test_kernels_are_turned_and_the_rest_stays():
    sizes = {name: np.prod(shape, dtype=int) for name, shape in inception.file_shapes().items()}
    one = np.arange(max(sizes.values()), dtype=np.float32)
    arrays = {name: one[: sizes[name]].reshape(shape) for name, shape in inception.file_shapes().items()}
    ours = inception.from_arrays(arrays)
    kernel = ours['params']['Mixed_6b']['branch7x7_2']['conv']['kernel']
    assert kernel.shape == (1, 7, 128, 128)
    assert kernel[0, 5, 2, 3] == arrays['Mixed_6b.branch7x7_2.conv.weight'][3, 2, 0, 5]
    np.testing.assert_array_equal(ours['batch_stats']['Conv2d_4a_3x3']['bn']['var'], np.arange(192))
    image = np.zeros((1, inception.SIDE, inception.SIDE, 3), np.float32)
    assert jax.eval_shape(inception.InceptionV3().apply, ours, image).shape == (1, inception.FEATURES)


@pytest.mark.parametrize(
    ('arrays', 'message'),
    [
        ({'conv1.weight': np.zeros(3)}, r'w\.pth does not fit FID.*has no Conv2d_1a_3x3\.\w.*and 468 more'),
        # What torchvision offers for download differs in these.
        ({'AuxLogits.fc.weight': np.zeros(3)}, r'has AuxLogits\.fc\.weight, which is not the network'),
        ({'fc.weight': np.zeros((1000, 2048)), 'fc.bias': np.zeros(1000)}, r'fc\.weight is \(1000, 2048\), not \(1008'),
    ],
)
def test_another_network_is_refused_by_name(arrays, message, tmp_path, monkeypatch):
    pytest.importorskip('torch', reason='PyTorch (extra convert) reads these files')
    if 'conv1.weight' not in arrays:
        some = {'Conv2d_1a_3x3.conv.weight': (32, 3, 3, 3), 'fc.weight': (1008, 2048), 'fc.bias': (1008,)}
        monkeypatch.setattr(inception, 'file_shapes', lambda: some)  # a file of 100 MB else
        arrays = {name: np.zeros(shape) for name, shape in some.items()} | arrays
    torch_files.write(tmp_path / 'w.pth', arrays)
    with pytest.raises(InputError, match=message):
        inception.load_weights(tmp_path / 'w.pth')
