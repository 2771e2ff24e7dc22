"""Every loss of stage 1, and its gradient, against the PyTorch oracle on the same arrays."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason="PyTorch is not installed: pip install -e '.[parity]'")

from oracle import torch_losses  # noqa: E402
from oracle.comparison import QUICK_COMPILATION, assert_near, channels_first, channels_last  # noqa: E402

from vqroi_jax import losses  # noqa: E402
from vqroi_jax.models import perceptual  # noqa: E402


def draw(*shape, seed=0, low=-1.0, high=1.0):
    return np.random.default_rng(seed).uniform(low, high, shape).astype(np.float32)


def compare(ours, theirs, *arrays, constants=()):
    """Values, and gradients at every array (zero where the oracle has none); arrays are channels last.

    Args:
        ours: function of the arrays and, after them, the constants.
        theirs: function of the arrays alone, channels first.
        arrays: channels last.
        constants: pytrees of arrays.
    """
    tensors = [channels_first(x).requires_grad_() for x in arrays]
    expected = theirs(*tensors)
    expected.backward()
    both = jax.value_and_grad(ours, argnums=tuple(range(len(arrays))))
    value, gradients = jax.jit(both, compiler_options=QUICK_COMPILATION)(*arrays, *constants)
    assert value.dtype == jnp.float32
    assert_near(value, expected.detach(), 'value')
    for number, (gradient, tensor) in enumerate(zip(gradients, tensors, strict=True)):
        reference = torch.zeros_like(tensor) if tensor.grad is None else tensor.grad
        assert_near(gradient, channels_last(reference), f'gradient at argument {number}')


def test_l1():
    fake, real = draw(2, 3, 4, 5, 7, 1)
    compare(lambda x: losses.l1(x, real), lambda x: (x - channels_first(real)).abs().mean(), fake)


def test_commitment():
    normalised, codes = draw(2, 3, 4, 4, 5, 6, seed=1)
    compare(
        lambda z, c: losses.commitment(z, c, beta=0.25),
        lambda z, c: torch_losses.codebook_loss(z, c, beta=0.25),
        normalised,
        codes,
    )


def test_image_gradient():
    fake, real = draw(2, 3, 6, 5, 7, 1, seed=2)
    compare(
        lambda x: losses.image_gradient(x, real),
        lambda x: torch_losses.gradient_loss(x, channels_first(real)),
        fake,
    )


def test_feature_matching():
    fake = [draw(3, 5, 5, 5, 4, seed=10), draw(3, 3, 3, 3, 8, seed=11)]
    real = [draw(3, 5, 5, 5, 4, seed=12), draw(3, 3, 3, 3, 8, seed=13)]
    compare(
        lambda *maps: losses.feature_matching(maps[:2], maps[2:]),
        lambda *maps: torch_losses.feature_matching_loss(maps[:2], maps[2:]),
        *fake,
        *real,
    )


def test_adversarial_and_hinge():
    real, fake = draw(2, 3, 5, 5, 5, 1, seed=3, low=-2.0, high=2.0)
    compare(losses.adversarial, torch_losses.adversarial_loss, fake)
    compare(
        lambda real, fake: losses.hinge(real, real=True) + losses.hinge(fake, real=False),
        torch_losses.hinge_loss,
        real,
        fake,
    )


def test_cross_entropy():
    logits, labels = draw(5, 3, seed=4, low=-3.0, high=3.0), np.array([0, 2, 1, 1, 0])
    compare(
        lambda x: losses.cross_entropy(x, labels, smoothing=0.1),
        lambda x: torch_losses.classification_loss(x, torch.tensor(labels)),
        logits,
    )


@pytest.mark.parametrize('scale', [0.3, 30.0])  # of the adversarial gradient: the weight is clipped, or not
def test_adaptive_weight(scale):
    kernel, features, target = draw(1, 1, 1, 8, 1, seed=5), draw(2, 4, 4, 4, 8, seed=6), draw(2, 4, 4, 4, 1, seed=7)

    def fake(w):
        return jnp.tanh(features @ w[0, 0, 0])

    l1_gradient = jax.grad(lambda w: losses.l1(fake(w), target))(kernel)
    adversarial_gradient = jax.grad(lambda w: scale * losses.adversarial(fake(w) ** 2))(kernel)
    ours = losses.adaptive_weight(l1_gradient, adversarial_gradient)

    w = torch.tensor(kernel[0, 0, 0], requires_grad=True)
    theirs = torch.tanh(torch.tensor(features) @ w)
    l1 = (theirs - torch.tensor(target)).abs().mean()
    expected = torch_losses.adaptive_weight(l1, scale * torch_losses.adversarial_loss(theirs**2), w)
    assert ours == pytest.approx(expected.item(), rel=1e-4)
    assert (ours == 1) == (scale < 1)


def test_perceptual_loss_with_real_weights():
    fake, real = draw(2, 3, 8, 32, 16, 1, seed=8)
    fake = real + 0.3 * fake
    fake[:, :, :8] = real[:, :, :8] = -1.0  # flat background, as ROIs have
    slices = np.array([[3, 3], [7, 0], [4, 2]])
    lpips = torch_losses.LPIPS().double()
    compare(
        lambda x, weights: perceptual.perceptual_loss(perceptual.LPIPS(), weights, x, real, slices),
        lambda x: torch_losses.perceptual_loss(lpips, x, channels_first(real), torch.tensor(slices)),
        fake,
        constants=(perceptual.load_weights(),),
    )
