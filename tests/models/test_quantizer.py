"""The codebook's rules against plain NumPy loops."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqroi_jax.models import quantizer


def unit(shape, seed=0):
    vectors = np.random.default_rng(seed).normal(size=shape).astype(np.float32)
    return vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)


def test_l2_normalise_has_unit_length_and_a_finite_gradient_at_zero():
    vectors = np.random.default_rng(0).normal(size=(5, 7)).astype(np.float32)
    expected = vectors / np.linalg.norm(vectors, axis=-1, keepdims=True)
    np.testing.assert_allclose(quantizer.l2_normalise(vectors), expected, rtol=1e-6)
    zero = jnp.zeros((2, 7))
    np.testing.assert_array_equal(quantizer.l2_normalise(zero), zero)
    assert np.isfinite(jax.grad(lambda x: quantizer.l2_normalise(x).sum())(zero)).all()


def test_nearest_codes_is_the_largest_cosine_and_the_lowest_index_among_equals():
    vectors, codes = unit((3, 4, 6)), unit((9, 6), seed=1)
    codes[5] = codes[2]
    expected = np.array([[np.argmax([v @ c for c in codes]) for v in row] for row in vectors])
    assert (expected == 2).any(), "the doubled code should be somebody's nearest"
    np.testing.assert_array_equal(quantizer.nearest_codes(vectors, codes), expected)


def test_update_moves_used_codes_to_the_mean_and_leaves_the_others():
    vectors, codes = unit((40, 4)), unit((12, 4), seed=1)
    tokens = np.random.default_rng(2).integers(0, 9, 40)  # codes 9, 10 and 11 are unused
    usage = np.linspace(0, 1, 12).astype(np.float32)
    new_codes, new_usage = quantizer.update_codes(codes, usage, quantizer.assign(vectors, tokens, 12), 0.99)
    for k in range(12):
        own = vectors[tokens == k]
        np.testing.assert_allclose(new_usage[k], 0.99 * usage[k] + 0.01 * len(own), rtol=1e-5)
        if not len(own):
            np.testing.assert_array_equal(new_codes[k], codes[k])
            continue
        mean = own.mean(axis=0)
        moved = 0.99 * codes[k] + 0.01 * mean / np.linalg.norm(mean)
        np.testing.assert_allclose(new_codes[k], moved / np.linalg.norm(moved), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize('size', [6, 50])
def test_kmeans_equals_plain_rounds(size):
    """With fewer vectors than clusters, starts repeat, and a repeated start never wins a vector."""
    vectors, key = unit((30, 5)), jax.random.key(3)
    if size <= 30:
        start = np.asarray(jax.random.permutation(key, 30)[:size])
    else:
        start = np.asarray(jax.random.randint(key, (size,), 0, 30))
    means = vectors[start].copy()
    for _ in range(10):
        nearest = np.argmax(vectors @ means.T, axis=1)
        for k in range(size):
            if (nearest == k).any():
                mean = vectors[nearest == k].mean(axis=0)
                means[k] = mean / np.linalg.norm(mean)
    np.testing.assert_allclose(quantizer.kmeans(key, vectors, size), means, rtol=1e-4, atol=1e-5)


def test_kmeans_finds_separate_clusters():
    centres = unit((4, 8))
    vectors = centres[np.arange(200) % 4] + 0.01 * unit((200, 8), seed=1)
    found = np.asarray(quantizer.kmeans(jax.random.key(0), quantizer.l2_normalise(vectors), 16))
    assert ((found @ centres.T).max(axis=0) > 0.999).all()


def test_restart_puts_only_dead_codes_onto_current_vectors():
    codes, vectors = unit((6, 4)), unit((20, 4), seed=1)
    usage = np.array([0.0, 5.0, 0.05, 1.0, 0.2, 0.0], np.float32)
    new_codes, new_usage = quantizer.restart_dead_codes(jax.random.key(0), codes, usage, vectors, below=0.1)
    for k in (1, 3, 4):
        np.testing.assert_array_equal(new_codes[k], codes[k])
    for k in (0, 2, 5):
        assert (np.abs(vectors - np.asarray(new_codes[k])).sum(axis=1) == 0).any()
    np.testing.assert_allclose(new_usage, [0.1, 5.0, 0.1, 1.0, 0.2, 0.1])


def test_perplexity_is_the_number_of_evenly_used_codes():
    np.testing.assert_allclose(quantizer.perplexity(jnp.array([3.0, 3, 3, 0, 0])), 3, rtol=1e-6)
    np.testing.assert_allclose(quantizer.perplexity(jnp.array([0.0, 7, 0])), 1, rtol=1e-6)


def test_module_returns_its_codes_and_keeps_them_out_of_the_parameters():
    book = quantizer.Codebook(size=10, features=4)
    vectors = unit((2, 1, 3, 2, 4))
    variables = book.init(jax.random.key(0), vectors)
    assert set(variables) == {'codebook'}
    tokens, codes = book.apply(variables, vectors)
    np.testing.assert_allclose(np.linalg.norm(variables['codebook']['codes'], axis=-1), 1, rtol=1e-6)
    np.testing.assert_array_equal(codes, np.asarray(variables['codebook']['codes'])[np.asarray(tokens)])
    gradient = jax.grad(lambda v: book.apply(variables, v)[1].sum())(vectors)
    np.testing.assert_array_equal(gradient, 0)
