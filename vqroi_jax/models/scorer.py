"""How important each latent region is to the class, learned through an auxiliary classifier.

Both read the latent grid before it is normalised and quantised; the scores go to stage 2's masking.
Source: section 2.1 of the design (the importance scorer of Huang et al. 2023, MaskedVQ-VAE, in 3D).
"""

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqroi_jax.models.layers import Conv3D, Dense, GroupNorm, uniform_fan_in

CLASSIFIER_GROUPS = 32  # of the hidden layer's normalisation


def normalise_grid(latent: jax.Array) -> jax.Array:
    """Layer normalisation of each sample over its whole `[D, H, W, C]` grid, without scale or bias; float32."""
    latent = latent.astype(jnp.float32)
    axes = tuple(range(1, latent.ndim))
    mean = latent.mean(axis=axes, keepdims=True)
    variance = jnp.square(latent - mean).mean(axis=axes, keepdims=True)
    return (latent - mean) * jax.lax.rsqrt(variance + 1e-5)


class Scorer(nn.Module):
    """One score in (0, 1) a latent region.

    Attributes:
        dtype: of the convolutions; the normalisations and the scores are float32.
    """

    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latent: jax.Array) -> jax.Array:
        """Latent grid `[B, D, H, W, C]` to scores float32 `[B, D, H, W]`."""
        init = {'kernel_init': uniform_fan_in, 'dtype': self.dtype}
        x = Conv3D(latent.shape[-1], kernel_size=3, padding=1, name='conv', **init)(normalise_grid(latent))
        x = Conv3D(1, kernel_size=1, padding=0, name='score', **init)(nn.relu(x))
        return nn.sigmoid(GroupNorm(num_groups=1, name='norm')(x.astype(jnp.float32)))[..., 0]


class AuxiliaryClassifier(nn.Module):
    """Classes from the latent grid weighted by its scores: what makes the scores mean something.

    Attributes:
        classes: number of classes.
        hidden: width of the hidden layer; divides by `CLASSIFIER_GROUPS`.
        dropout: share of the hidden units dropped in training.
        dtype: of the matrix products; normalisations and logits are float32.
    """

    classes: int
    hidden: int = 1024
    dropout: float = 0.2
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, latent: jax.Array, scores: jax.Array, keys: jax.Array | None = None) -> jax.Array:
        """Logits of the classes.

        Args:
            latent: `[B, D, H, W, C]`.
            scores: float32 `[B, D, H, W]`.
            keys: a random key a sample, `[B]`, for dropout; None: no dropout.

        Returns:
            float32 `[B, classes]`.
        """
        weighted = normalise_grid(latent) * scores[..., None]
        x = jnp.moveaxis(weighted, -1, 1).reshape(latent.shape[0], -1)  # channel first, as the release
        x = Dense(self.hidden, dtype=self.dtype, name='hidden')(x)
        x = nn.relu(GroupNorm(num_groups=CLASSIFIER_GROUPS, name='norm')(x.astype(jnp.float32)))
        if keys is not None and self.dropout > 0:
            keep = jax.vmap(lambda key: jax.random.bernoulli(key, 1 - self.dropout, (self.hidden,)))(keys)
            x = jnp.where(keep, x / (1 - self.dropout), 0)
        return Dense(self.classes, dtype=self.dtype, name='logits')(x).astype(jnp.float32)
