"""Each loss against the formula of section 2.2, written out in NumPy and SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy import ndimage

from vqroi_jax import losses


def volumes(shape=(2, 6, 7, 5, 1)):
    rng = np.random.default_rng(0)
    return rng.uniform(-1, 1, shape).astype(np.float32), rng.uniform(-1, 1, shape).astype(np.float32)


def test_l1():
    one, other = volumes()
    np.testing.assert_allclose(losses.l1(one, other), np.abs(one - other).mean(), rtol=1e-6)


def test_commitment_draws_the_vectors_only():
    one, other = volumes((4, 3))
    np.testing.assert_allclose(losses.commitment(one, other, 0.5), 0.5 * np.square(one - other).mean(), rtol=1e-6)
    to_vectors, to_codes = jax.grad(losses.commitment, argnums=(0, 1))(one, other)
    np.testing.assert_allclose(to_vectors, 2 * (one - other) / 12, rtol=1e-5)
    np.testing.assert_array_equal(to_codes, 0)


def test_image_gradient_is_2d_sobel_on_every_slice_of_the_three_directions():
    one, other = volumes()
    kernel = np.array([[-1, 0, 1], [-2, 0, 2], [-1, 0, 1]])
    expected = 0.0
    for direction in range(3):
        for turned in (kernel, kernel.T):
            square = []
            for a, b in zip(one[..., 0], other[..., 0], strict=True):
                for i in range(a.shape[direction]):
                    pair = [
                        ndimage.correlate(np.take(x, i, axis=direction).astype(float), turned, mode='constant')
                        for x in (a, b)
                    ]
                    square.append(np.square(pair[0] - pair[1]))
            expected += np.mean(square)
    np.testing.assert_allclose(losses.image_gradient(one, other), expected, rtol=1e-5)


def test_feature_matching_adds_the_maps_and_leaves_the_real_ones_alone():
    fake, real = zip(*(volumes(shape) for shape in ((2, 3, 4), (2, 5))), strict=True)
    expected = sum(np.abs(f - r).mean() for f, r in zip(fake, real, strict=True))
    np.testing.assert_allclose(losses.feature_matching(fake, real), expected, rtol=1e-6)
    assert all(not g.any() for g in jax.grad(losses.feature_matching, argnums=1)(fake, real))


def test_adversarial_and_hinge():
    real, fake = (2 * x for x in volumes((3, 4)))
    np.testing.assert_allclose(losses.adversarial(fake), -fake.mean(), rtol=1e-5)
    expected = 0.5 * (np.maximum(0, 1 - real).mean() + np.maximum(0, 1 + fake).mean())
    np.testing.assert_allclose(losses.hinge(real, real=True) + losses.hinge(fake, real=False), expected, rtol=1e-6)


@pytest.mark.parametrize('size', [1e-6, 0.3, 100.0])
def test_adaptive_weight_is_the_clipped_ratio_of_norms(size):
    one, other = volumes((4, 5))
    expected = np.clip(size * np.linalg.norm(one) / (np.linalg.norm(other) + 1e-4), 0, 1)
    np.testing.assert_allclose(losses.adaptive_weight(size * one, other), expected, rtol=1e-5)
    assert float(jnp.abs(jax.grad(losses.adaptive_weight)(size * one, other)).max()) == 0


def test_cross_entropy_with_label_smoothing():
    logits, labels = volumes((4, 3))[0] * 3, np.array([0, 2, 1, 2])
    log_share = logits - np.log(np.exp(logits).sum(axis=1, keepdims=True))
    target = 0.9 * np.eye(3)[labels] + 0.1 / 3
    np.testing.assert_allclose(
        losses.cross_entropy(logits, labels, 0.1), -(target * log_share).sum(1).mean(), rtol=1e-5
    )


@pytest.mark.parametrize('loss', [losses.l1, losses.image_gradient, losses.commitment])
def test_sums_are_float32_under_bfloat16(loss):
    one, other = (jnp.asarray(x, jnp.bfloat16) for x in volumes())
    value = loss(one, other.astype(jnp.float32))
    assert value.dtype == jnp.float32
    np.testing.assert_allclose(value, loss(one.astype(jnp.float32), other.astype(jnp.float32)), rtol=1e-6)


@pytest.mark.parametrize('gamma', [0.0, 2.0])
def test_focal_is_weighted_cross_entropy_that_forgets_the_easy(gamma):
    rng = np.random.default_rng(0)
    logits, labels, alpha = rng.normal(0, 2, (7, 3)).astype(np.float32), np.arange(7) % 3, np.array([0.5, 1, 2.0])
    probability = (np.exp(logits) / np.exp(logits).sum(1, keepdims=True))[np.arange(7), labels]
    expected = alpha[labels] * (1 - probability) ** gamma * -np.log(probability)
    np.testing.assert_allclose(losses.focal(logits, labels, jnp.asarray(alpha), gamma), expected, rtol=1e-4)
    certain = jnp.array([[100.0, -100.0]])
    gradient = jax.grad(lambda x: losses.focal(x, jnp.array([0]), jnp.ones(2), gamma).sum())(certain)
    assert np.isfinite(gradient).all()
