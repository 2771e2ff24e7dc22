"""The terms of stage 1's objective and the classifier's loss, each a pure function of arrays.

All take any float dtype and sum in float32. Each is a mean over the samples of the batch, so that the mean over equal
micro-batches is the value of the whole batch; `adaptive_weight` alone is not, and is given whole-batch gradients.
Source: section 2.2 of the design, which names where the paper and its release differ.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
import optax


def l1(reconstruction: jax.Array, volume: jax.Array) -> jax.Array:
    """Mean absolute difference of two arrays of one shape; float32 scalar."""
    return jnp.mean(jnp.abs(reconstruction.astype(jnp.float32) - volume))


def commitment(normalised: jax.Array, codes: jax.Array, beta: float = 1.0) -> jax.Array:
    """`beta * mean((stop_gradient(code) - z)²)` over all numbers of the normalised latent vectors.

    Args:
        normalised: `[..., C]`, unit length.
        codes: `[..., C]`, the codes they were given.
        beta: weight.
    """
    return beta * jnp.mean(jnp.square(jax.lax.stop_gradient(codes) - normalised.astype(jnp.float32)))


def _taps(x: jax.Array, axis: int) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The neighbour before, the voxel itself and the neighbour after, along an axis, with zeros outside."""
    size = x.shape[axis]
    padded = jnp.pad(x, [(1, 1) if a == axis else (0, 0) for a in range(x.ndim)])
    before, here, after = (jax.lax.slice_in_dim(padded, start, start + size, axis=axis) for start in range(3))
    return before, here, after


def _smooth(x: jax.Array, axis: int) -> jax.Array:
    before, here, after = _taps(x, axis)
    return before + 2 * here + after


def _slope(x: jax.Array, axis: int) -> jax.Array:
    before, _, after = _taps(x, axis)
    return after - before


@jax.named_scope('image_gradient')
def image_gradient(reconstruction: jax.Array, volume: jax.Array) -> jax.Array:
    """Squared difference of Sobel responses, for slices along each of the three axes.

    For each slicing direction the two 3x3 Sobel filters (zero padding 1) run over every slice; their mean squared
    differences are added, and so are the three directions. The filters being linear, they see the difference.

    Args:
        reconstruction: `[B, D, H, W, 1]`.
        volume: the same shape.
    """
    difference = reconstruction.astype(jnp.float32) - volume
    total = jnp.zeros(())
    for one, other in ((2, 3), (1, 3), (1, 2)):  # the in-plane axes of axial, coronal and sagittal slices
        for slope_axis, smooth_axis in ((one, other), (other, one)):
            total += jnp.mean(jnp.square(_slope(_smooth(difference, smooth_axis), slope_axis)))
    return total


def feature_matching(fake: Sequence[jax.Array], real: Sequence[jax.Array]) -> jax.Array:
    """Mean absolute difference of the discriminator's hidden maps, added over the maps; none flows into `real`."""
    return sum(
        (
            jnp.mean(jnp.abs(f.astype(jnp.float32) - jax.lax.stop_gradient(r).astype(jnp.float32)))
            for f, r in zip(fake, real, strict=True)
        ),
        start=jnp.zeros(()),
    )


def adversarial(fake_logits: jax.Array) -> jax.Array:
    """What the generator wants: `-mean(D(fake))`."""
    return -jnp.mean(fake_logits.astype(jnp.float32))


def hinge(logits: jax.Array, real: bool) -> jax.Array:
    """What the discriminator wants, of real volumes or of fake ones: `0.5 * mean(relu(1 ∓ D(volume)))`."""
    margin = 1 - logits.astype(jnp.float32) if real else 1 + logits.astype(jnp.float32)
    return 0.5 * jnp.mean(jax.nn.relu(margin))


def adaptive_weight(l1_gradient: jax.Array, adversarial_gradient: jax.Array) -> jax.Array:
    """Weight of the adversarial term: `clip(norm(dL1/dW) / (norm(dAdv/dW) + 1e-4), 0, 1)`, without gradient.

    Source: Esser et al. 2021 (VQGAN), equation 7, with the release's clipping.

    Args:
        l1_gradient: gradient of the unweighted L1 term at the decoder's last kernel, over the whole global batch.
        adversarial_gradient: that of the adversarial term.
    """
    ratio = jnp.linalg.norm(l1_gradient.ravel()) / (jnp.linalg.norm(adversarial_gradient.ravel()) + 1e-4)
    return jax.lax.stop_gradient(jnp.clip(ratio, 0.0, 1.0))


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """Mean cross-entropy with label smoothing.

    Args:
        logits: `[B, classes]`.
        labels: int `[B]` in [0, classes).
        smoothing: share of the target spread evenly over all classes.
    """
    target = optax.smooth_labels(jax.nn.one_hot(labels, logits.shape[-1]), smoothing)
    return jnp.mean(optax.softmax_cross_entropy(logits.astype(jnp.float32), target))


def focal(logits: jax.Array, labels: jax.Array, alpha: jax.Array, gamma: float) -> jax.Array:
    """Focal loss of each sample: `alpha_c (1 - p_c)^gamma (-log p_c)`, p_c its true class's probability.

    Source: Lin et al. 2017, *Focal loss for dense object detection*.

    Args:
        logits: `[B, classes]`.
        labels: int `[B]`.
        alpha: `[classes]`, weights of the classes.
        gamma: how much less a sample counts that is told well already; 0: cross-entropy.

    Returns:
        float32 `[B]`.
    """
    loss = optax.softmax_cross_entropy_with_integer_labels(logits.astype(jnp.float32), labels)
    wrong = jnp.maximum(-jnp.expm1(-loss), 1e-7)  # 1 - p, kept off 0, where powers have no slope
    return alpha[labels] * wrong**gamma * loss
