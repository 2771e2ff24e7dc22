"""3D ResNets: sizes of the design, and blocks against their formula."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from vqroi_jax.models.resnet3d import BLOCKS, ResNet3D, standardised


def shapes(model, side=32):
    return jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, side, side, side, 1)))


def parameters(model):
    return sum(leaf.size for leaf in jax.tree.leaves(shapes(model)['params']))


def test_resnet_50_has_the_designs_parameters():
    assert parameters(ResNet3D(50, classes=2)) == 46_159_170


@pytest.mark.parametrize('shortcut', ['A', 'B'])
@pytest.mark.parametrize('depth', BLOCKS)
def test_parameters_are_those_of_the_layers(depth, shortcut):
    bottleneck, count, inward = depth == 50, 7**3 * 64 + 2 * 64, 64
    for stage, number in enumerate(BLOCKS[depth]):
        inner = 64 * 2**stage
        outer = 4 * inner if bottleneck else inner
        for block in range(number):
            if bottleneck:
                count += inward * inner + 27 * inner**2 + inner * outer + 2 * (2 * inner + outer)
            else:
                count += 27 * (inward * inner + inner**2) + 4 * inner
            if shortcut == 'B' and block == 0 and (stage > 0 or inward != outer):
                count += inward * outer + 2 * outer
            inward = outer
    assert parameters(ResNet3D(depth, classes=3, shortcut=shortcut)) == count + 3 * (inward + 1)


def test_one_block_is_its_formula():
    """A strided block of depth 10 by SciPy: conv, norm, ReLU, conv, norm, plus shortcut A, ReLU."""
    model = ResNet3D(10, classes=2, width=2, shortcut='A')
    volume = np.random.default_rng(0).normal(size=(1, 16, 16, 16, 1)).astype(np.float32)
    variables = jax.tree.map(
        lambda leaf: np.random.default_rng(leaf.size).uniform(0.1, 0.9, leaf.shape).astype(np.float32), shapes(model)
    )
    _, seen = model.apply(variables, volume, capture_intermediates=True)
    seen = {name: np.asarray(seen['intermediates'][name]['__call__'][0]) for name in variables['params']}

    def conv(x, name, stride):
        kernel = variables['params'][name]['kernel']
        result = [
            sum(ndimage.correlate(x[..., i], kernel[..., i, o], mode='constant') for i in range(x.shape[-1]))
            for o in range(kernel.shape[-1])
        ]
        return np.stack(result, axis=-1)[::stride, ::stride, ::stride]

    def norm(x, name):
        weights, statistics = variables['params'][name], variables['batch_stats'][name]
        return (x - statistics['mean']) / np.sqrt(statistics['var'] + 1e-5) * weights['scale'] + weights['bias']

    # What goes into stage 1's block is the output of stage 0's, by the shortcut's own identity.
    first = np.maximum(norm(conv(_pooled(seen['norm'][0]), 'stage_0_block_0_conv_0', 1), 'stage_0_block_0_norm_0'), 0)
    before = norm(conv(first, 'stage_0_block_0_conv_1', 1), 'stage_0_block_0_norm_1')
    x = np.maximum(before + _pooled(seen['norm'][0]), 0)
    hidden = np.maximum(norm(conv(x, 'stage_1_block_0_conv_0', 2), 'stage_1_block_0_norm_0'), 0)
    hidden = norm(conv(hidden, 'stage_1_block_0_conv_1', 1), 'stage_1_block_0_norm_1')
    np.testing.assert_allclose(seen['stage_1_block_0_norm_1'][0], hidden, rtol=1e-4)
    out = np.maximum(hidden + np.pad(x[::2, ::2, ::2], [(0, 0)] * 3 + [(0, 2)]), 0)
    following = conv(out, 'stage_2_block_0_conv_0', 2)
    np.testing.assert_allclose(seen['stage_2_block_0_conv_0'][0], following, rtol=1e-4)


def test_medicalnets_layout_keeps_an_eighth_of_the_sides():
    def features(layout):
        model = ResNet3D(10, classes=2, width=2, layout=layout, hidden=(5, 3))
        volume = jnp.zeros((1, 32, 48, 64, 1))
        variables = jax.eval_shape(model.init, jax.random.key(0), volume)
        _, seen = jax.eval_shape(lambda v: model.apply(v, volume, mutable=['intermediates']), variables)
        heads = {name: layer['kernel'].shape for name, layer in variables['params'].items() if 'head' in name}
        assert heads == {'head_0': (16, 5), 'head_1': (5, 3), 'head': (3, 2)}
        return seen['intermediates']['features'][0].shape

    assert features('medicalnet') == (1, 4, 6, 8, 16)
    assert features('hara') == (1, 2, 2, 2, 16)


def test_standardised_tumours_have_mean_0_and_deviation_1():
    volume = np.random.default_rng(0).uniform(-2, 1, (3, 5, 6, 7, 1)).clip(-1).astype(np.float32)
    volume[1] = -1  # nothing
    volume[2] = np.where(volume[2] > -1, 0.5, -1)  # without contrast
    found = np.asarray(standardised(jnp.asarray(volume)))
    inside = volume[0] > -1
    expected = (volume[0][inside] - volume[0][inside].mean()) / volume[0][inside].std()
    np.testing.assert_allclose(found[0][inside], expected, rtol=1e-4, atol=1e-5)
    assert not found[0][~inside].any()
    assert not found[1:].any()


def _pooled(x):
    """ReLU, then a max over 3³ voxels around every other one."""
    x = np.maximum(x, 0)
    return ndimage.maximum_filter(x, (3, 3, 3, 1), mode='constant')[::2, ::2, ::2]


def test_statistics_move_in_training_alone():
    model = ResNet3D(10, classes=2, width=2)
    volume = jnp.asarray(np.random.default_rng(0).normal(size=(3, 16, 16, 16, 1)), jnp.float32)
    variables = model.init(jax.random.key(0), volume)
    logits, changed = model.apply(variables, volume, train=True, mutable='batch_stats')
    assert logits.shape == (3, 2)
    first = np.asarray(model.apply(variables, volume, mutable=['intermediates'], capture_intermediates=True)[1]
                       ['intermediates']['conv']['__call__'][0])  # fmt: skip
    moved = changed['batch_stats']['norm']
    np.testing.assert_allclose(moved['mean'], 0.1 * first.mean(axis=(0, 1, 2, 3)), rtol=1e-3, atol=1e-5)
    np.testing.assert_allclose(moved['var'], 0.9 + 0.1 * first.var(axis=(0, 1, 2, 3)), rtol=1e-3)
