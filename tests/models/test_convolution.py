"""Convolutions against `lax.conv_general_dilated` and its own derivatives."""

import math
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vqroi_jax import hlo
from vqroi_jax.models import convolution, slab_convolution, windows
from vqroi_jax.models.axes import AXES, ROWS, VOLUMES
from vqroi_jax.models.convolution import conv3d, upsample_conv3d
from vqroi_jax.training import partitioning

WHOLE = PartitionSpec()

CASES = {  # batch, sides, in, out, kernel, stride, padding
    'k3': (2, (5, 6, 7), 3, 4, 3, 1, 1),
    'k3, no padding': (1, (7, 8, 9), 2, 3, 3, 1, 0),
    'k3, full padding': (1, (6, 4, 5), 2, 3, 3, 1, 2),
    'k3, many slabs, the last short': (2, (3, 11, 8), 2, 3, 3, 1, 1),
    'k3, parts of two slabs': (2, (3, 18, 7), 2, 3, 3, 1, 1),
    'k4 stride 2': (2, (8, 8, 8), 3, 5, 4, 2, 1),
    'k4 stride 2, one channel, odd sides': (1, (9, 4, 7), 1, 4, 4, 2, 1),
    'k3 stride 2, odd sides': (2, (7, 9, 5), 3, 4, 3, 2, 1),
    'k3 stride 3': (1, (7, 8, 9), 2, 3, 3, 3, 0),
    'k4, one result': (1, (4, 4, 4), 2, 1, 4, 1, 0),
    'k1': (2, (4, 5, 6), 3, 4, 1, 1, 0),
    'k1 stride 2': (1, (9, 8, 7), 2, 2, 1, 2, 0),
}


@pytest.fixture(autouse=True)
def small_slabs(monkeypatch):
    """Slabs so small that even these volumes are cut into several, and none is multiplied all at once."""
    monkeypatch.setattr(slab_convolution, '_FEW_TILES', 0)
    monkeypatch.setattr(slab_convolution, '_SLAB_TILES', 40)
    monkeypatch.setattr(slab_convolution, '_SLAB_NUMBERS', 40)


@pytest.fixture(params=['slice by slice', 'all slices at once'])
def way(request, small_slabs, monkeypatch):
    """How a volume's slices are multiplied, however large they are."""
    monkeypatch.setattr(slab_convolution, '_FEW_TILES', 0 if request.param == 'slice by slice' else math.inf)


@pytest.fixture(params=['direct', 'winograd'])
def form(request, monkeypatch):
    """Every kernel that can be is multiplied in this form, however small the slices."""
    monkeypatch.setattr(windows, '_LEAST_TILES', 0 if request.param == 'winograd' else math.inf)


def plain(x, kernel, bias, stride, padding):
    numbers = ('NDHWC', 'DHWIO', 'NDHWC')
    return lax.conv_general_dilated(x, kernel, (stride,) * 3, ((padding,) * 2,) * 3, dimension_numbers=numbers) + bias


def arguments(batch, sides, channels, features, k, dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = (batch, *sides, channels), (k, k, k, channels, features), (features,)
    return tuple(jnp.asarray(rng.normal(size=shape), dtype) for shape in shapes)


def result_and_gradients(function, inputs):
    def everything(*inputs):
        result, pull = jax.vjp(function, *inputs)
        return result, *pull(jnp.asarray(np.random.default_rng(1).normal(size=result.shape), result.dtype))

    return jax.jit(everything)(*inputs)


def on_devices(function, inputs, split, shape):
    """The compiled text of `result_and_gradients` on a mesh of this shape, and what it gives."""
    mesh = Mesh(np.array(jax.devices()[: math.prod(shape)]).reshape(shape), AXES)

    def on_mesh(*inputs):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return result_and_gradients(function, inputs)

    places = [NamedSharding(mesh, spec) for spec in (split, WHOLE, WHOLE)]
    compiled = jax.jit(on_mesh, in_shardings=places).lower(*inputs).compile()
    results = compiled(*(jax.device_put(x, place) for x, place in zip(inputs, places, strict=True)))
    return compiled.as_text(), results


def assert_same(ours, theirs, tolerance=1e-5):
    """Same shapes and dtypes, and differences small beside the largest value."""
    for one, other in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert (one.shape, one.dtype) == (other.shape, other.dtype)
        one, other = np.asarray(one, np.float64), np.asarray(other, np.float64)
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())


@pytest.mark.usefixtures('form', 'way')
@pytest.mark.parametrize('case', CASES.values(), ids=CASES)
def test_equals_lax_with_all_gradients(case):
    *sizes, stride, padding = case
    inputs = arguments(*sizes)
    ours = result_and_gradients(lambda *inputs: conv3d(*inputs, stride=stride, padding=padding), inputs)
    theirs = result_and_gradients(lambda *inputs: plain(*inputs, stride, padding), inputs)
    assert_same(ours, theirs)


@pytest.mark.parametrize('case', ['k3', 'k4 stride 2, one channel, odd sides'])
def test_the_branch_of_other_platforms_equals_lax(case, monkeypatch):
    monkeypatch.setattr(lax, 'platform_dependent', lambda *inputs, cpu, default: default(*inputs))
    test_equals_lax_with_all_gradients(CASES[case])


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_other_platforms_get_their_own_convolutions_and_no_loop(platform):
    x, kernel, _ = arguments(*CASES['k4 stride 2'][:5])
    program = jax.jit(jax.grad(lambda *inputs: conv3d(*inputs, stride=2, padding=1).sum(), argnums=(0, 1)))
    text = program.trace(x, kernel).lower(lowering_platforms=(platform,)).as_text()
    assert text.count('stablehlo.convolution') >= 2
    assert 'while' not in text
    assert 'while' in program.trace(x, kernel).lower(lowering_platforms=('cpu',)).as_text()


@pytest.mark.parametrize('features', [1, 2])
def test_a_sum_over_many_voxels_keeps_its_digits(features):
    """The gradient in a kernel of one voxel, of sums that do not cancel; one product for all loses two digits."""
    rng = np.random.default_rng(0)
    x, gradient = (rng.uniform(size=(1, 64, 64, 64, c)).astype(np.float32) for c in (4, features))
    kernel, bias = jnp.ones((1, 1, 1, 4, features)), jnp.zeros(features)
    _, pull = jax.vjp(lambda kernel: conv3d(x, kernel, bias, stride=1, padding=0), kernel)
    exact = np.einsum('bdhwi,bdhwo->io', x, gradient, dtype=np.float64)
    np.testing.assert_allclose(pull(gradient)[0][0, 0, 0], exact, rtol=2e-6)


@pytest.mark.usefixtures('way')
@pytest.mark.parametrize('case', ['k3', 'k4 stride 2', 'k1'])
def test_bfloat16_is_summed_in_float32(case):
    *sizes, stride, padding = CASES[case]
    inputs = arguments(*sizes, dtype=jnp.bfloat16)
    ours = result_and_gradients(lambda *inputs: conv3d(*inputs, stride=stride, padding=padding), inputs)
    wide = result_and_gradients(
        lambda *inputs: plain(*inputs, stride, padding), [value.astype(jnp.float32) for value in inputs]
    )
    assert {value.dtype for value in ours} == {jnp.dtype(jnp.bfloat16)}
    assert_same([value.astype(jnp.float32) for value in ours], wide, tolerance=2**-7)


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('sizes', [(2, (5, 4, 3), 3, 4, 3), (1, (1, 2, 1), 2, 1, 3)], ids=['odd', 'tiny'])
def test_upsampling_equals_repeating_and_convolving(sizes):
    def theirs(x, kernel, bias):
        for axis in (1, 2, 3):
            x = x.repeat(2, axis)
        return plain(x, kernel, bias, 1, 1)

    inputs = arguments(*sizes)
    assert_same(result_and_gradients(upsample_conv3d, inputs), result_and_gradients(theirs, inputs))


@pytest.mark.parametrize('argument', [0, 1, 2])
def test_gradient_in_one_argument_alone(argument):
    inputs = arguments(*CASES['k3'][:5])

    def gradient(convolve):
        return jax.jit(jax.grad(lambda *inputs: jnp.sum(convolve(*inputs) ** 2), argnums=argument))(*inputs)

    ours = gradient(lambda *inputs: conv3d(*inputs, padding=1))
    assert_same(ours, gradient(lambda *inputs: plain(*inputs, 1, 1)))


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize('case', ['k3', 'k4 stride 2, one channel, odd sides'])
def test_second_derivatives(case):
    *sizes, stride, padding = CASES[case]
    inputs = arguments(*sizes)

    def penalty(convolve):
        def steepness(*inputs):
            gradients = jax.grad(lambda *inputs: jnp.sum(jnp.tanh(convolve(*inputs))), argnums=(0, 1))(*inputs)
            return sum(jnp.sum(gradient**2) for gradient in gradients)

        return jax.jit(jax.grad(steepness, argnums=(0, 1, 2)))(*inputs)

    ours = penalty(lambda *inputs: conv3d(*inputs, stride=stride, padding=padding))
    assert_same(ours, penalty(lambda *inputs: plain(*inputs, stride, padding)), tolerance=1e-4)


def test_forward_mode_raises():
    x, kernel, _ = arguments(*CASES['k3'][:5])
    with pytest.raises(TypeError, match='forward-mode'):
        jax.jvp(lambda x: conv3d(x, kernel, padding=1), (x,), (x,))


@pytest.mark.parametrize(
    ('kernel', 'padding'),
    [((3, 3, 1, 3, 4), 1), ((3, 3, 3, 2, 4), 1), ((3, 3, 3, 3, 4), 3), ((3, 3, 3, 3, 4), -1), ((6, 6, 6, 3, 4), 0)],
    ids=['not cubic', 'channels', 'too much padding', 'negative padding', 'larger than the volume'],
)
def test_refuses_what_does_not_fit(kernel, padding):
    with pytest.raises(ValueError, match='does not fit'):
        conv3d(jnp.zeros((1, 5, 5, 5, 3)), jnp.zeros(kernel), padding=padding)


@pytest.mark.usefixtures('form', 'way')
def test_a_sharded_batch_stays_sharded():
    mesh = Mesh(np.asarray(jax.devices()), ('data',))
    rows, whole = NamedSharding(mesh, PartitionSpec('data')), NamedSharding(mesh, PartitionSpec())
    x, kernel, _ = arguments(8, (6, 6, 6), 3, 3, 3)
    stride_kernel = arguments(8, (6, 6, 6), 3, 3, 4)[1]

    def loss(x, kernel, stride_kernel):
        x = jnp.tanh(conv3d(x, kernel, padding=1))
        x = jnp.tanh(upsample_conv3d(x, kernel))
        return jnp.mean(conv3d(x, stride_kernel, stride=2, padding=1) ** 2)

    step = jax.value_and_grad(loss, argnums=(0, 1, 2))
    sharded = jax.jit(step, in_shardings=(rows, whole, whole), out_shardings=(whole, (rows, whole, whole)))
    text = sharded.lower(x, kernel, stride_kernel).compile().as_text()
    assert 'all-reduce' in text
    assert not any(collective in text for collective in ('all-gather', 'all-to-all', 'collective-permute'))
    assert_same(sharded(x, kernel, stride_kernel), jax.jit(step)(x, kernel, stride_kernel))


SPLIT = {  # case, mesh of data and spatial, and how many slices of the result each device then has
    'k4 stride 2': ((2, (8, 6, 5), 2, 3, 4, 2, 1), (2, 4), 1),
    'k3': ((4, (8, 5, 4), 2, 3, 3, 1, 1), (2, 4), 2),
    'k1': ((2, (4, 3, 3), 2, 3, 1, 1, 0), (1, 4), 1),
    'k5, halos of two slices': ((2, (8, 5, 4), 2, 3, 5, 1, 2), (2, 4), 2),
    'too thin for its halos': ((2, (4, 5, 4), 2, 3, 5, 1, 2), (2, 4), 4),
    'a result that does not divide': ((2, (8, 6, 6), 2, 3, 4, 1, 0), (2, 4), 5),
    'a depth that does not divide': ((2, (6, 6, 6), 2, 3, 3, 1, 1), (2, 4), 6),
    'upsampling': ((2, (4, 3, 5), 2, 3, 3, 1, 1), (2, 4), 2),
}


@pytest.mark.usefixtures('form')
@pytest.mark.parametrize(
    'name',
    [name if name in ('k4 stride 2', 'upsampling') else pytest.param(name, marks=pytest.mark.long) for name in SPLIT],
)
def test_a_volume_split_along_depth_equals_a_whole_one(name):
    (*sizes, stride, padding), shape, slices = SPLIT[name]
    inputs = arguments(*sizes)

    def convolve(*inputs):
        if name == 'upsampling':
            return upsample_conv3d(*inputs)
        return conv3d(*inputs, stride=stride, padding=padding)

    place = ROWS if sizes[1][0] % shape[1] else VOLUMES
    text, results = on_devices(convolve, inputs, place, (shape[0], 1, 1, shape[1]))
    own = results[0].addressable_shards[0].data.shape[1]
    assert own == slices
    if own < results[0].shape[1]:
        assert 'all-gather' not in text
    assert_same(results, result_and_gradients(convolve, inputs))


def test_few_windows_share_one_product_whatever_else_is_in_the_batch(monkeypatch):
    monkeypatch.setattr(slab_convolution, '_FEW_TILES', 64)
    (x, kernel, bias), convolve = arguments(8, (5, 4, 4), 3, 4, 3), partial(conv3d, padding=1)
    loops = [str(jax.make_jaxpr(convolve)(batch, kernel, bias)).count('scan[') for batch in (x[:1], x)]
    assert loops[0] == 0 < loops[1]
    assert_same(convolve(x[:1], kernel, bias), convolve(x, kernel, bias)[:1], tolerance=1e-6)


@pytest.mark.parametrize('stride', [1, 2])
def test_a_split_batch_exchanges_each_gradient_once(stride):
    """Not in every round of a loop over slices, as the partitioner would."""
    inputs, convolve = arguments(4, (6, 6, 4), 2, 3, 4), partial(conv3d, stride=stride, padding=1)
    text, results = on_devices(convolve, inputs, ROWS, (2, 2, 1, 1))
    exchanged = hlo.read_cost(text).collectives
    assert {one.kind for one in exchanged} == {'all-reduce'}
    assert sum(one.size for one in exchanged) == inputs[1].nbytes  # each device can sum the bias's itself
    assert_same(results, result_and_gradients(convolve, inputs))


def test_memory_beside_arguments_and_results_is_a_few_slices():
    """No copy the size of the volume, neither padded nor of windows."""
    x, kernel, bias = arguments(1, (64, 32, 32), 8, 8, 3)
    for function in (
        lambda *inputs: conv3d(*inputs, padding=1),
        lambda *inputs: convolution._gradients(*inputs[:2], inputs[0], 1, (1, 1), (True, True)),
    ):
        memory = jax.jit(function).lower(x, kernel, bias).compile().memory_analysis()
        assert memory.temp_size_in_bytes < x.nbytes / 2


def test_kernels_are_given_another_form_when_they_are_needed():
    """XLA would otherwise do so for all layers at the start: of eight, there were 13 kernels at a time instead of 5."""
    x, kernel, _ = arguments(1, (6, 6, 6), 64, 64, 3)

    def network(kernels, x):
        for kernel in kernels:
            x = jnp.tanh(conv3d(x, kernel, padding=1))
        return x.sum()

    memory = jax.jit(jax.grad(network, (0, 1))).lower([kernel] * 8, x).compile().memory_analysis()
    assert memory.temp_size_in_bytes < 8 * kernel.nbytes
    not_finite = x.at[0, 0, 0, 0, 0].set(jnp.nan)  # what waits for it is the same all the same
    np.testing.assert_array_equal(slab_convolution.not_before(not_finite, kernel), kernel)
    forward = jax.jit(network, compiler_options=partitioning.keep_barriers('cpu')).lower([kernel] * 8, x).compile()
    assert forward.memory_analysis().temp_size_in_bytes < 4 * kernel.nbytes  # 10 without the barriers
