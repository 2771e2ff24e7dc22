"""Winograd's filtering against filters as they are defined, in float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqroi_jax.models import slab_convolution, windows


@pytest.mark.parametrize(('results', 'taps'), [(4, 3), (4, 2), (2, 3), (3, 2), (1, 3), (3, 4)])
def test_minimal_filtering_equals_the_filter(results, taps):
    matrices = windows.minimal_filtering(results, taps)
    points = results + taps - 1
    assert [matrix.shape for matrix in matrices] == [(results, points), (points, taps), (points, points)]
    rng = np.random.default_rng(0)
    signal, taps_of_filter = rng.normal(size=points), rng.normal(size=taps)
    found = matrices.results @ ((matrices.taps @ taps_of_filter) * (matrices.data @ signal))
    np.testing.assert_allclose(found, np.correlate(signal, taps_of_filter, 'valid'), rtol=0, atol=1e-6)


def test_the_matrices_of_four_results_and_three_taps_are_those_of_the_paper():
    """Up to signs, which change in `taps` and `data` together."""
    matrices = windows.minimal_filtering(4, 3)
    sign = np.sign(matrices.taps[:, :1] + matrices.taps[:, 2:])
    np.testing.assert_array_equal(
        matrices.results, [[1, 1, 1, 1, 1, 0], [0, 1, -1, 2, -2, 0], [0, 1, 1, 4, 4, 0], [0, 1, -1, 8, -8, 1]]
    )
    np.testing.assert_allclose(
        24 * sign * matrices.taps, [[6, 0, 0], [4, 4, 4], [4, -4, 4], [1, 2, 4], [1, -2, 4], [0, 0, 24]], atol=1e-5
    )


@pytest.mark.parametrize(('k', 'padding'), [(3, 1), (2, 0), (2, 1)])
def test_digits_lost_are_few(k, padding):
    """The relative error of what a layer of 32 channels gives, and of both its gradients."""
    rng = np.random.default_rng(0)
    x, kernel = rng.normal(size=(1, 6, 16, 18, 32)), rng.normal(size=(k, k, k, 32, 32))
    padded = np.pad(x, ((0, 0), *((padding, padding),) * 3, (0, 0)))
    taken = np.lib.stride_tricks.sliding_window_view(padded, (k, k, k), (1, 2, 3))
    exact = np.einsum('bdhwiklm,klmio->bdhwo', taken, kernel, optimize=True)
    upstream = rng.normal(size=exact.shape)
    kernel_gradient = np.einsum('bdhwiklm,bdhwo->klmio', taken, upstream, optimize=True)
    assert isinstance(windows.quickest(k, *exact.shape[2:4], jnp.float32), windows.Winograd)

    x, kernel, upstream = (jnp.asarray(array, jnp.float32) for array in (x, kernel, upstream))
    found = slab_convolution.convolve(x, kernel, jnp.zeros(32), (padding, padding))
    x_gradient, found_gradient = slab_convolution.gradients(x, kernel, upstream, (padding, padding), (True, True))
    for ours, theirs in ((found, exact), (found_gradient, kernel_gradient)):
        assert np.sqrt(np.mean((ours - theirs) ** 2) / np.mean(theirs**2)) < 2e-6
    # `convolve` is linear in x, so this product is the same whichever side it is taken on.
    np.testing.assert_allclose(jnp.vdot(x_gradient, x), np.sum(exact * np.asarray(upstream)), rtol=1e-4)


@pytest.mark.parametrize(
    ('k', 'height', 'width', 'dtype', 'form'),
    [
        (3, 16, 16, jnp.float32, windows.Winograd),
        (2, 17, 17, jnp.float32, windows.Winograd),
        (3, 8, 8, jnp.float32, windows.Direct),
        (3, 64, 64, jnp.bfloat16, windows.Direct),
        (1, 64, 64, jnp.float32, windows.Direct),
        (4, 64, 64, jnp.float32, windows.Direct),
    ],
)
def test_small_slices_narrow_dtypes_and_other_kernels_are_multiplied_directly(k, height, width, dtype, form):
    assert type(windows.quickest(k, height, width, jnp.dtype(dtype))) is form


@pytest.mark.parametrize('form', [windows.Direct(3), windows.Winograd(3), windows.Winograd(2)])
def test_transposes(form):
    """`spread` and `kernel_gradient` against JAX's transposes of `combine` and `weights`."""
    rng = np.random.default_rng(0)
    batch, height, tiles, channels, features = 2, 3, 2, 4, 5
    products = jnp.asarray(rng.normal(size=(form.points, batch, height, tiles, form.k * features)), jnp.float32)
    results = rng.normal(size=(batch, height, tiles * form.results, form.k * features))
    (theirs,) = jax.linear_transpose(form.combine, products)(jnp.asarray(results, jnp.float32))
    turned = results.reshape(batch, height, tiles, form.results, -1).transpose(3, 4, 0, 1, 2)
    np.testing.assert_allclose(
        form.spread(jnp.asarray(turned, jnp.float32)).transpose(0, 2, 3, 4, 1), theirs, atol=1e-5
    )

    kernel = jax.ShapeDtypeStruct((form.k,) * 3 + (channels, features), jnp.float32)
    total = jnp.asarray(rng.normal(size=(form.points, form.taps * channels, form.k * features)), jnp.float32)
    (theirs,) = jax.linear_transpose(form.weights, kernel)(total)
    np.testing.assert_allclose(form.kernel_gradient(total.swapaxes(1, 2), channels), theirs, atol=1e-5)
