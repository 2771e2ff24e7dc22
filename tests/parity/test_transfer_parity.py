"""Features with MedicalNet's weights beside those of its network in PyTorch, from a file as it publishes them."""

import jax
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='PyTorch is not installed: pip install -e ".[parity]"')

from oracle import torch_resnet3d  # noqa: E402

from vqroi_jax import transfer  # noqa: E402
from vqroi_jax.models.resnet3d import ResNet3D  # noqa: E402


def drawn(depth, shortcut, width):
    """Their network with weights and statistics drawn so that no layer's features die or explode."""
    generator = torch.Generator().manual_seed(depth)
    net = torch_resnet3d.MedicalNet(depth, shortcut, width).eval()
    for name, tensor in net.state_dict().items():
        if tensor.ndim == 5:
            tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5, generator=generator)
        elif name.endswith(('weight', 'running_var')):
            tensor.uniform_(0.5, 1.5, generator=generator)
        elif tensor.is_floating_point():
            tensor.normal_(0, 0.3, generator=generator)
    return net


@pytest.mark.parametrize(('depth', 'shortcut'), [(10, 'B'), (18, 'A'), (34, 'A'), (50, 'B')])
def test_features_are_medicalnets(depth, shortcut, tmp_path):
    theirs = drawn(depth, shortcut, width=4)
    state = {f'module.{name}': tensor for name, tensor in theirs.state_dict().items()}
    torch.save({'ecpoch': 3, 'batch_id': 0, 'state_dict': state, 'optimizer': {}}, tmp_path / 'resnet.pth')
    model = ResNet3D(depth, 2, width=4, shortcut=shortcut, layout='medicalnet', hidden=(3,))
    weights = transfer.read(str(tmp_path / 'resnet.pth'), model)
    assert not weights.patients
    sides = 40, 33, 48  # an odd one, and more than the widest dilation reaches
    volume = np.random.default_rng(0).normal(size=(2, *sides, 1)).astype(np.float32)
    with torch.no_grad():
        expected = theirs(torch.tensor(volume.transpose(0, 4, 1, 2, 3))).numpy().transpose(0, 2, 3, 4, 1)
    head = {'head_0': np.zeros((4 * 2**3 * (4 if depth == 50 else 1), 3)), 'head': np.zeros((3, 2))}
    params = weights.params | {
        name: {'kernel': kernel, 'bias': np.zeros(kernel.shape[1])} for name, kernel in head.items()
    }
    variables = {'params': params, 'batch_stats': weights.statistics}
    _, seen = jax.jit(lambda v, x: model.apply(v, x, mutable=['intermediates']))(variables, volume)
    found = np.asarray(seen['intermediates']['features'][0])
    assert found.shape == expected.shape == (2, 5, 5, 6, head['head_0'].shape[0])
    assert 0.1 < expected.std() < 1000
    assert np.linalg.norm(found - expected) <= 1e-4 * np.linalg.norm(expected)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-4 * expected.std())


@pytest.mark.parametrize(('depth', 'shortcut'), [(34, 'A'), (50, 'B')])
def test_names_and_shapes_are_those_of_the_published_sizes(depth, shortcut):
    with torch.device('meta'):
        state = torch_resnet3d.MedicalNet(depth, shortcut).state_dict()
    arrays = {name: np.broadcast_to(np.float32(0), tuple(tensor.shape)) for name, tensor in state.items()}
    params, statistics = transfer.from_medicalnet(
        'x.pth', arrays, ResNet3D(depth, 2, shortcut=shortcut, layout='medicalnet')
    )
    state = {name: tensor for name, tensor in state.items() if not name.startswith('conv_seg')}
    for tree, ends in ((params, ('weight', 'bias')), (statistics, ('running_mean', 'running_var'))):
        size = sum(tensor.numel() for name, tensor in state.items() if name.endswith(ends))
        assert sum(leaf.size for leaf in jax.tree.leaves(tree)) == size
