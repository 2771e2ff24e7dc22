"""Attention in blocks against JAX's own, which other platforms run, and against NumPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqroi_jax.models import attention


def arrays(length, dtype=jnp.float32, number=4):
    rng = np.random.default_rng(length)
    return [jnp.asarray(rng.normal(size=(2, length, 3, 8)), dtype) for _ in range(number)]


def result_and_gradients(function, query, key, value, gradient):
    result, pull = jax.vjp(function, query, key, value)
    return result, *pull(gradient)


@pytest.mark.parametrize('causal', [True, False])
@pytest.mark.parametrize('length', [1, 7, 128, 300])  # fewer than a block, one, and one that is not full
def test_equals_jaxs_own_with_its_gradients(length, causal):
    def ours(*inputs):
        return result_and_gradients(lambda q, k, v: attention.attend(q, k, v, causal), *inputs)

    def jaxs(*inputs):
        return result_and_gradients(lambda q, k, v: jax.nn.dot_product_attention(q, k, v, is_causal=causal), *inputs)

    inputs = arrays(length)
    for one, other in zip(jax.jit(ours)(*inputs), jax.jit(jaxs)(*inputs), strict=True):
        np.testing.assert_allclose(one, other, atol=2e-6 * float(jnp.abs(other).max()) + 1e-6)


def test_equals_the_formula():
    query, key, value = (np.asarray(a, np.float64) for a in arrays(5, number=3))
    expected = np.zeros(query.shape)
    for b, t, h in np.ndindex(*query.shape[:3]):
        logits = key[b, : t + 1, h] @ query[b, t, h] / np.sqrt(8)
        weights = np.exp(logits) / np.exp(logits).sum()
        expected[b, t, h] = weights @ value[b, : t + 1, h]
    np.testing.assert_allclose(attention.attend(*arrays(5, number=3), True), expected, atol=1e-6)


def test_bfloat16_stays_bfloat16():
    narrow, wide = arrays(40, jnp.bfloat16), arrays(40)
    attend = jax.jit(lambda *inputs: result_and_gradients(lambda *a: attention.attend(*a, True), *inputs))
    for one, other in zip(attend(*narrow), attend(*wide), strict=True):
        assert one.dtype == jnp.bfloat16
        np.testing.assert_allclose(one.astype(jnp.float32), other, atol=0.05 * float(jnp.abs(other).max()))


def test_large_logits_do_not_overflow():
    query, key, value = arrays(130, number=3)
    result = attention.attend(100 * query, 100 * key, value, True)
    assert jnp.isfinite(result).all()


@pytest.mark.parametrize('platform', ['cuda', 'tpu'])
def test_other_platforms_are_left_to_jax(platform):
    traced = jax.jit(lambda *inputs: attention.attend(*inputs, True)).trace(*arrays(300, number=3))
    text = traced.lower(lowering_platforms=(platform,)).as_text()
    assert 'while' not in text
    assert 'while' in traced.lower(lowering_platforms=('cpu',)).as_text()
