"""Our 3D ResNets beside PyTorch's: logits, gradients and moving statistics, with the same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason='PyTorch is not installed: pip install -e ".[parity]"')

from oracle import torch_resnet3d  # noqa: E402

from vqroi_jax.models.resnet3d import BLOCKS, ResNet3D  # noqa: E402


def layers(depth, theirs):
    """Pairs of names: of our layers, and the modules of theirs."""
    yield 'conv', theirs.conv
    yield 'norm', theirs.norm
    names = [f'stage_{stage}_block_{block}' for stage, number in enumerate(BLOCKS[depth]) for block in range(number)]
    for name, block in zip(names, theirs.blocks, strict=True):
        for number, (conv, norm) in enumerate(zip(block.convs, block.norms, strict=True)):
            yield f'{name}_conv_{number}', conv
            yield f'{name}_norm_{number}', norm
        if block.projection is not None:
            yield f'{name}_shortcut', block.projection[0]
            yield f'{name}_shortcut_norm', block.projection[1]
    yield 'head', theirs.head


def to_theirs(depth, variables, theirs):
    for name, module in layers(depth, theirs):
        ours = variables['params'][name]
        with torch.no_grad():
            if 'kernel' in ours:
                kernel = np.asarray(ours['kernel'])
                axes = (4, 3, 0, 1, 2) if kernel.ndim == 5 else (1, 0)
                module.weight.copy_(torch.tensor(kernel.transpose(axes)))
                if name == 'head':
                    module.bias.copy_(torch.tensor(np.asarray(ours['bias'])))
            else:
                module.weight.copy_(torch.tensor(np.asarray(ours['scale'])))
                module.bias.copy_(torch.tensor(np.asarray(ours['bias'])))
                module.running_mean.copy_(torch.tensor(np.asarray(variables['batch_stats'][name]['mean'])))
                module.running_var.copy_(torch.tensor(np.asarray(variables['batch_stats'][name]['var'])))


@pytest.mark.parametrize(('depth', 'shortcut'), [(10, 'A'), (10, 'B'), (18, 'B'), (34, 'A'), (50, 'B')])
def test_logits_gradients_and_statistics_are_theirs(depth, shortcut):
    model, theirs = ResNet3D(depth, 3, 8, shortcut), torch_resnet3d.ResNet3D(depth, 3, 8, shortcut)
    rng = np.random.default_rng(0)
    volume, labels = rng.normal(size=(4, 32, 32, 32, 1)).astype(np.float32), np.array([0, 1, 2, 1])
    shapes = jax.eval_shape(model.init, jax.random.key(0), volume)

    def draw(path, leaf):
        if leaf.ndim > 1:
            return rng.normal(0, np.sqrt(1 / np.prod(leaf.shape[:-1])), leaf.shape).astype(np.float32)
        return rng.uniform(0.5, 1.5, leaf.shape).astype(np.float32)

    variables = jax.tree_util.tree_map_with_path(draw, shapes)
    to_theirs(depth, variables, theirs)
    assert sum(p.numel() for p in theirs.parameters()) == sum(x.size for x in jax.tree.leaves(variables['params']))
    tensor = torch.tensor(volume.transpose(0, 4, 1, 2, 3))
    with torch.no_grad():
        np.testing.assert_allclose(
            jax.jit(model.apply)(variables, volume), theirs.eval()(tensor).numpy(), rtol=2e-3, atol=2e-3
        )

    @jax.jit
    def loss(params):
        logits, changed = model.apply({**variables, 'params': params}, volume, train=True, mutable=['batch_stats'])
        return -jnp.mean(jax.nn.log_softmax(logits)[jnp.arange(4), labels]), changed['batch_stats']

    points = {}  # that each norm of theirs takes its statistics over
    for name, module in layers(depth, theirs):
        module.register_forward_hook(lambda _, inputs, out, name=name: points.update({name: out[:, 0].numel()}))
    (value, statistics), gradient = jax.jit(jax.value_and_grad(loss, has_aux=True))(variables['params'])
    expected = torch.nn.functional.cross_entropy(theirs.train()(tensor), torch.tensor(labels))
    expected.backward()
    np.testing.assert_allclose(value, expected.item(), rtol=1e-3)
    for name, module in layers(depth, theirs):
        if 'kernel' in gradient[name]:
            axes = (4, 3, 0, 1, 2) if gradient[name]['kernel'].ndim == 5 else (1, 0)
            ours, other = np.asarray(gradient[name]['kernel']).transpose(axes), module.weight.grad.numpy()
            assert np.linalg.norm(ours - other) <= 0.02 * np.linalg.norm(other) + 1e-5, name
        else:
            np.testing.assert_allclose(statistics[name]['mean'], module.running_mean.numpy(), rtol=1e-3, atol=1e-3)
            start, n = 0.9 * variables['batch_stats'][name]['var'], points[name]
            unbiased = start + (statistics[name]['var'] - start) * n / (n - 1)  # as theirs moves
            np.testing.assert_allclose(unbiased, module.running_var.numpy(), rtol=2e-3)
