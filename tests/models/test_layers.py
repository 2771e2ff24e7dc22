"""Layers against Flax's own, their formulas, and the distributions that their parameters start from."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax import lax

from vqroi_jax.models.layers import (
    Conv3D,
    Dense,
    GroupNorm,
    LayerNorm,
    ResBlock,
    UpsampleConv3D,
    group_norm,
    uniform_fan_in,
)

KEY = jax.random.key(0)
VOLUME = jax.random.normal(KEY, (2, 4, 5, 6, 8))


def shapes(parameters):
    return jax.tree.map(jnp.shape, parameters)


@pytest.mark.parametrize(
    ('layer', 'kernel', 'result'),
    [
        (Conv3D(3, kernel_size=4, stride=2, padding=1), (4, 4, 4, 8, 3), (2, 2, 2, 3, 3)),
        (Conv3D(5, kernel_size=1), (1, 1, 1, 8, 5), (2, 4, 5, 6, 5)),
        (UpsampleConv3D(3), (3, 3, 3, 8, 3), (2, 8, 10, 12, 3)),
        (Dense(7), (8, 7), (2, 4, 5, 6, 7)),
    ],
    ids=['strided', '1x1x1', 'upsampling', 'dense'],
)
@pytest.mark.parametrize('dtype', [jnp.float32, jnp.bfloat16])
def test_shapes_and_dtypes(layer, kernel, result, dtype):
    y, variables = layer.clone(dtype=dtype).init_with_output(KEY, VOLUME)
    assert (y.shape, y.dtype) == (result, dtype)
    assert shapes(variables['params']) == {'kernel': kernel, 'bias': kernel[-1:]}
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype(jnp.float32)}


@pytest.mark.parametrize('features', [7, 9], ids=['narrower', 'wider'])
@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-5), (jnp.bfloat16, 2e-2)])
def test_dense_and_its_gradients_are_numpys(dtype, tolerance, features):
    layer = Dense(features, dtype)
    params = layer.init(KEY, VOLUME)['params']
    upstream = jax.random.normal(jax.random.key(1), (*VOLUME.shape[:-1], features))
    result, pull = jax.vjp(lambda params, x: layer.apply({'params': params}, x), params, VOLUME)
    of_params, of_x = pull(upstream.astype(dtype))

    x, up, kernel = (np.asarray(array, np.float64) for array in (VOLUME, upstream, params['kernel']))
    expected = {
        'value': (result, x @ kernel + np.asarray(params['bias'])),
        'kernel': (of_params['kernel'], np.einsum('bdhwi,bdhwo->io', x, up)),
        'bias': (of_params['bias'], up.sum(axis=(0, 1, 2, 3))),
        'input': (of_x, np.einsum('bdhwo,io->bdhwi', up, kernel)),
    }
    for name, (ours, theirs) in expected.items():
        scale = np.abs(theirs).max()
        np.testing.assert_allclose(np.asarray(ours, np.float64), theirs, atol=tolerance * scale, rtol=0, err_msg=name)
    assert of_params['kernel'].dtype == of_x.dtype == jnp.float32


@pytest.mark.parametrize('by_output', [False, True])
def test_sums_of_bfloat16_may_keep_their_digits(by_output):
    layer = Dense(7, jnp.bfloat16, use_bias=False, by_output=by_output, output_dtype=jnp.float32)
    x = VOLUME.astype(jnp.bfloat16)
    result, variables = layer.init_with_output(KEY, x)
    kernel = variables['params']['kernel'].astype(jnp.bfloat16)
    expected = np.asarray(x, np.float64) @ np.asarray(kernel.T if by_output else kernel, np.float64)
    assert result.dtype == jnp.float32
    np.testing.assert_allclose(result, expected, rtol=1e-4, atol=1e-5)


def test_the_kernels_gradient_on_a_cpu_reads_its_input_by_rows():
    """By columns, XLA's product takes a fourth longer; turned over with what the input is made of, ten times."""
    layer, x = Dense(32), jnp.ones((64, 16))
    params = layer.init(KEY, x)
    gradient = jax.grad(lambda params, x: jnp.sum(jnp.square(layer.apply(params, jnp.tanh(x)))))
    text = jax.jit(gradient).lower(params, x).compile().as_text()
    products = [line for line in text.splitlines() if ' dot(' in line and 'f32[16,32]' in line]
    assert products
    assert all('lhs_contracting_dims={1}' in line for line in products)
    assert sum(' call(' in line and 'f32[16,64]' in line for line in text.splitlines()) == 1  # not inlined, nor fused


def test_the_bias_is_added():
    for layer in (Conv3D(3, padding=1), UpsampleConv3D(3)):
        variables = layer.init(KEY, VOLUME)
        shifted = jax.tree_util.tree_map_with_path(lambda path, x: x + 2 * (path[-1].key == 'bias'), variables)
        difference = layer.apply(shifted, VOLUME) - layer.apply(variables, VOLUME)
        np.testing.assert_allclose(difference, 2, atol=1e-5)


def test_initial_values():
    normal = Conv3D(64, kernel_size=4).init(KEY, jnp.zeros((1, 4, 4, 4, 16)))['params']
    assert np.std(normal['kernel']) == pytest.approx(0.02, rel=0.02)
    assert np.mean(normal['kernel']) == pytest.approx(0, abs=1e-3)
    uniform = Conv3D(64, kernel_size=4, kernel_init=uniform_fan_in).init(KEY, jnp.zeros((1, 4, 4, 4, 16)))['params']
    bound = 1 / math.sqrt(4**3 * 16)
    for values in (normal['bias'], uniform['kernel'], uniform['bias']):
        assert np.abs(values).max() == pytest.approx(bound, rel=0.1)
        assert np.abs(values).max() <= bound
        assert np.std(values) == pytest.approx(bound / math.sqrt(3), rel=0.2)


@pytest.mark.parametrize('shape', [(2, 3, 4, 5, 16), (3, 16)], ids=['volume', 'vector'])
def test_group_norm_and_its_derivatives_equal_flax(shape):
    keys = jax.random.split(KEY, 4)
    x, gradient = jax.random.normal(keys[0], shape) + 2, jax.random.normal(keys[1], shape)
    scale, bias = (jax.random.normal(key, shape[-1:]) for key in keys[2:])
    reference = nn.GroupNorm(4, epsilon=1e-6, use_fast_variance=False)

    def ours(x, scale, bias):
        return group_norm(x, scale, bias, 4, 1e-6)

    def theirs(x, scale, bias):
        return reference.apply({'params': {'scale': scale, 'bias': bias}}, x)

    def everything(norm):
        y, pull = jax.vjp(norm, x, scale, bias)

        def steepness(*inputs):
            return jnp.sum(jax.grad(lambda x: jnp.sum(norm(x, *inputs[1:]) * gradient))(inputs[0]) ** 2)

        return y, *pull(gradient), *jax.grad(steepness, argnums=(0, 1))(x, scale, bias)

    for one, other in zip(jax.jit(lambda: everything(ours))(), everything(theirs), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-4, atol=1e-5 * np.abs(other).max())


@pytest.mark.parametrize(('dtype', 'tolerance'), [(jnp.float32, 1e-5), (jnp.bfloat16, 1e-2)])
def test_layer_norm_and_its_gradients_equal_flax(dtype, tolerance):
    x = (jax.random.normal(KEY, (3, 5, 64)) + 2).astype(dtype)
    gradient, scale, bias = (
        jax.random.normal(jax.random.key(n), shape) for n, shape in ((1, x.shape), (2, (64,)), (3, (64,)))
    )
    params = {'params': {'scale': scale, 'bias': bias}}
    reference = nn.LayerNorm(epsilon=1e-5, use_fast_variance=False)
    assert shapes(LayerNorm().init(KEY, x)['params']) == {'scale': (64,), 'bias': (64,)}

    def everything(norm):
        y, pull = jax.vjp(lambda params, x: norm.apply(params, x).astype(jnp.float32), params, x)
        return y, *jax.tree.leaves(pull(gradient))

    ours = jax.jit(lambda: everything(LayerNorm(dtype=dtype)))()
    theirs = everything(reference)
    assert LayerNorm(dtype=dtype).apply(params, x).dtype == ours[-1].dtype == dtype
    for one, other in zip(ours, theirs, strict=True):
        one, other = (np.asarray(array, np.float64) for array in (one, other))
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


def test_group_norm_takes_its_statistics_in_float32():
    """bfloat16 has 8 bits: sums of thousands of values would be far off."""
    x = (jax.random.normal(KEY, (1, 16, 16, 16, 8)) + 3).astype(jnp.bfloat16)
    y, variables = GroupNorm(num_groups=4, dtype=jnp.bfloat16).init_with_output(KEY, x)
    assert y.dtype == jnp.bfloat16
    assert shapes(variables['params']) == {'scale': (8,), 'bias': (8,)}
    grouped = np.asarray(y, np.float64).reshape(-1, 4, 2)
    np.testing.assert_allclose(grouped.mean((0, 2)), 0, atol=2e-3)
    np.testing.assert_allclose(grouped.std((0, 2)), 1, atol=2e-3)
    assert y[..., :2].astype(jnp.float32).std() == pytest.approx(1, abs=2e-3)


def test_group_norm_refuses_groups_that_do_not_divide():
    with pytest.raises(ValueError, match='3 groups do not divide 8 channels'):
        GroupNorm(num_groups=3).init(KEY, VOLUME)


def test_res_block_is_its_formula_with_one_shared_norm():
    block = ResBlock(nn.relu, num_groups=4)
    parameters = block.init(KEY, VOLUME)['params']
    convolution = {'kernel': (3, 3, 3, 8, 8), 'bias': (8,)}
    assert shapes(parameters) == {
        'conv_0': convolution,
        'conv_1': convolution,
        'norm': {'scale': (8,), 'bias': (8,)},
    }
    parameters['norm'] = {'scale': jnp.arange(1.0, 9.0), 'bias': jnp.arange(8.0) - 4}
    hidden = VOLUME
    for name in ('conv_0', 'conv_1'):
        numbers = ('NDHWC', 'DHWIO', 'NDHWC')
        hidden = lax.conv_general_dilated(
            hidden, parameters[name]['kernel'], (1, 1, 1), 'SAME', dimension_numbers=numbers
        )
        hidden = nn.GroupNorm(4).apply({'params': parameters['norm']}, hidden + parameters[name]['bias'])
        hidden = jnp.maximum(hidden, 0)
    np.testing.assert_allclose(block.apply({'params': parameters}, VOLUME), VOLUME + hidden, atol=1e-4)


class Level(nn.Module):
    """A convolution with norm and activation, and a ResBlock, as encoder and decoder have them."""

    deferred: bool

    @nn.compact
    def __call__(self, x):
        common = {'num_groups': 4, 'activation': nn.relu, 'deferred': self.deferred}
        return ResBlock(**common)(GroupNorm(**common)(Conv3D(8, kernel_size=3, padding=1)(x)))


def test_deferring_keeps_convolutions_alone_and_changes_no_gradient():
    plain, deferred = Level(False), Level(True)
    variables = plain.init(KEY, VOLUME)

    def loss(module):
        return lambda variables, x: jnp.sum(module.apply(variables, x))

    def kept(module):
        return sum(x.shape == VOLUME.shape for x in jax.tree.leaves(jax.vjp(loss(module), variables, VOLUME)[1]))

    assert kept(deferred) == 4 < kept(plain)  # the input and what the three convolutions gave
    np.testing.assert_array_equal(deferred.apply(variables, VOLUME), plain.apply(variables, VOLUME))
    gradients = (jax.jit(jax.grad(loss(module), argnums=(0, 1)))(variables, VOLUME) for module in (plain, deferred))
    for one, other in zip(*map(jax.tree.leaves, gradients), strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
