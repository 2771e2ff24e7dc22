"""Stage 1's generator: a volume to a grid of tokens with importance scores, and back.

`VQGAN` holds everything that is trained to reconstruct and to classify; the discriminator stands apart. Training uses
`trunk` and `head` (the last convolution apart from the rest: the adversarial weight needs gradients at its kernel);
everybody else uses `encode`, `tokens_and_scores` (or `index_quantize` and `importance`), `decode_samples` and
`reconstruct`.
Source: section 2.1 of the design.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqroi_jax.models.layers import Conv3D, GroupNorm, ResBlock, UpsampleConv3D, computed, uniform_fan_in
from vqroi_jax.models.quantizer import Codebook, l2_normalise
from vqroi_jax.models.scorer import AuxiliaryClassifier, Scorer


def _leaky_relu(x: jax.Array) -> jax.Array:
    return nn.leaky_relu(x, 0.2)


def _common(network: 'Encoder | Decoder', activation: Callable[[jax.Array], jax.Array]) -> dict[str, Any]:
    """What all norms and ResBlocks of a network have in common."""
    return {
        'num_groups': network.num_groups,
        'dtype': network.dtype,
        'activation': activation,
        'deferred': network.remat != 'none',
    }


def _res_block(remat: str) -> type[ResBlock]:
    return nn.remat(ResBlock) if remat == 'blocks' else ResBlock


class Encoder(nn.Module):
    """Halves the volume `len(channels)` times.

    Attributes:
        channels: after each halving.
        hidden: channels of the last convolution.
        num_groups: of the group normalisations.
        res_blocks: ResBlocks after each halving.
        remat: what the backward pass computes again, as of `VQGAN`.
        dtype: of the convolutions and what lies between them.
    """

    channels: Sequence[int] = (32, 64, 128, 256)
    hidden: int = 512
    num_groups: int = 8
    res_blocks: Sequence[int] = (1, 1, 1, 1)
    remat: str = 'none'
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Volume `[B, D, H, W, 1]` to `[B, d, h, w, hidden]`, sides divided by `2**len(channels)`."""
        common, block_type = _common(self, _leaky_relu), _res_block(self.remat)
        for level, features in enumerate(self.channels):
            x = Conv3D(features, kernel_size=4, stride=2, padding=1, dtype=self.dtype, name=f'conv_{level}')(x)
            x = GroupNorm(**common, name=f'norm_{level}')(x)
            for block in range(self.res_blocks[level]):
                x = block_type(**common, name=f'block_{level}_{block}')(x)
        x = Conv3D(self.hidden, kernel_size=3, padding=1, dtype=self.dtype, name='conv_hidden')(x)
        x = GroupNorm(**common, name='norm_hidden')(x)
        return block_type(**common, name='block_hidden')(x)


class Decoder(nn.Module):
    """Doubles the latent grid `len(channels)` times; `head` then makes the volume.

    Attributes:
        channels: after each doubling, from the latent grid outwards.
        num_groups: of the group normalisations.
        res_blocks: ResBlocks after each doubling.
        remat: as in the encoder.
        dtype: of the convolutions and what lies between them; `head` returns float32.
    """

    channels: Sequence[int] = (256, 128, 64, 32)
    num_groups: int = 8
    res_blocks: Sequence[int] = (1, 1, 1, 1)
    remat: str = 'none'
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Builds the levels by name, so that parameters keep their names whatever `res_blocks` says."""
        common, block_type = _common(self, nn.relu), _res_block(self.remat)
        levels = range(len(self.channels))
        self.conv = [UpsampleConv3D(self.channels[level], dtype=self.dtype) for level in levels]
        self.norm = [GroupNorm(**common) for _ in levels]
        self.block = [[block_type(**common) for _ in range(self.res_blocks[level])] for level in levels]
        self.last = Conv3D(1, kernel_size=1, padding=0, dtype=self.dtype)

    def __call__(self, x: jax.Array) -> jax.Array:
        """Latent `[B, d, h, w, hidden]` to feature maps `[B, D, H, W, channels[-1]]`."""
        for conv, norm, blocks in zip(self.conv, self.norm, self.block, strict=True):
            x = norm(conv(x))
            for block in blocks:
                x = block(x)
        return computed(x)

    def head(self, features: jax.Array) -> jax.Array:
        """Feature maps to the volume, float32 `[B, D, H, W, 1]` in (-1, 1)."""
        return jnp.tanh(self.last(features).astype(jnp.float32))


class Trunk(NamedTuple):
    """What one forward pass of stage 1 gives, the volume itself excepted."""

    features: jax.Array  # [B, D, H, W, channels[-1]]: what the decoder's head turns into the volume
    normalised: jax.Array  # float32 [B, d, h, w, C]: latent vectors of unit length
    codes: jax.Array  # float32 [B, d, h, w, C]: the codes they were given, without gradient
    tokens: jax.Array  # int32 [B, d, h, w]
    scores: jax.Array  # float32 [B, d, h, w]: importance in (0, 1)
    logits: jax.Array  # float32 [B, classes]: of the auxiliary classifier


class VQGAN(nn.Module):
    """Encoder, codebook, decoder, importance scorer and auxiliary classifier.

    Attributes:
        classes: number of classes.
        channels: of the encoder's halvings; the decoder mirrors them.
        hidden: channels between encoder or decoder and the 1x1x1 convolutions around the codebook.
        codes: number of codes, K.
        code_features: numbers a code, C.
        num_groups: of the group normalisations.
        encoder_res_blocks: ResBlocks after each halving.
        decoder_res_blocks: ResBlocks after each doubling, from the latent grid outwards.
        classifier_hidden: width of the auxiliary classifier's hidden layer.
        classifier_dropout: share of it dropped in training.
        remat: what the backward pass computes again, to save memory: 'none', 'activations' (norms and activations of
            encoder and decoder: cheap) or 'blocks' (the inside of each ResBlock).
        dtype: of convolutions and matrix products; parameters, norms, code distances and outputs are float32.
    """

    classes: int
    channels: Sequence[int] = (32, 64, 128, 256)
    hidden: int = 512
    codes: int = 1024
    code_features: int = 128
    num_groups: int = 8
    encoder_res_blocks: Sequence[int] = (1, 1, 1, 1)
    decoder_res_blocks: Sequence[int] = (1, 1, 1, 1)
    classifier_hidden: int = 1024
    classifier_dropout: float = 0.2
    remat: str = 'none'
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Builds the parts."""
        shared = {'num_groups': self.num_groups, 'remat': self.remat, 'dtype': self.dtype}
        dense = {'kernel_size': 1, 'padding': 0, 'kernel_init': uniform_fan_in, 'dtype': self.dtype}
        self.encoder = Encoder(self.channels, self.hidden, res_blocks=self.encoder_res_blocks, **shared)
        self.pre_quantisation = Conv3D(self.code_features, **dense)
        self.codebook = Codebook(self.codes, self.code_features)
        self.post_quantisation = Conv3D(self.hidden, **dense)
        self.decoder = Decoder(self.channels[::-1], res_blocks=self.decoder_res_blocks, **shared)
        self.scorer = Scorer(dtype=self.dtype)
        self.classifier = AuxiliaryClassifier(
            self.classes, self.classifier_hidden, self.classifier_dropout, dtype=self.dtype
        )

    def encode(self, volume: jax.Array) -> jax.Array:
        """Volume `[B, D, H, W, 1]` in [-1, 1] to the latent grid before normalisation, `[B, d, h, w, C]`."""
        return self.pre_quantisation(self.encoder(volume))

    def trunk(self, volume: jax.Array, quantise: jax.Array, keys: jax.Array | None = None) -> Trunk:
        """Everything but the last convolution.

        Args:
            volume: `[B, D, H, W, 1]` in [-1, 1].
            quantise: bool scalar; False lets the normalised latent through (before the codebook is initialised).
            keys: a random key a sample `[B]`, for the classifier's dropout; None: no dropout.
        """
        latent = self.encode(volume)
        scores = self.scorer(latent)
        logits = self.classifier(latent, scores, keys)
        normalised = l2_normalise(latent)
        tokens, codes = self.codebook(normalised)
        codes = jnp.where(quantise, codes, jax.lax.stop_gradient(normalised))
        straight_through = normalised + jax.lax.stop_gradient(codes - normalised)
        features = self.decoder(self.post_quantisation(straight_through))
        return Trunk(features, normalised, codes, tokens, scores, logits)

    def head(self, features: jax.Array) -> jax.Array:
        """The decoder's feature maps to the volume, float32 `[B, D, H, W, 1]` in (-1, 1)."""
        return self.decoder.head(features)

    def tokens_and_scores(self, volume: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Volume `[B, D, H, W, 1]` to tokens int32 in [0, codes) and scores float32 in (0, 1), both `[B, d, h, w]`."""
        latent = self.encode(volume)
        return self.codebook(l2_normalise(latent))[0], self.scorer(latent)

    def index_quantize(self, volume: jax.Array) -> jax.Array:
        """Volume `[B, D, H, W, 1]` to tokens int32 `[B, d, h, w]` in [0, codes)."""
        return self.tokens_and_scores(volume)[0]

    def importance(self, volume: jax.Array) -> jax.Array:
        """Volume `[B, D, H, W, 1]` to importance scores float32 `[B, d, h, w]` in (0, 1)."""
        return self.tokens_and_scores(volume)[1]

    def decode_samples(self, tokens: jax.Array) -> jax.Array:
        """Tokens int `[B, d, h, w]` to volumes float32 `[B, D, H, W, 1]` in (-1, 1)."""
        return self.head(self.decoder(self.post_quantisation(self.codebook.embed(tokens))))

    def reconstruct(self, volume: jax.Array) -> jax.Array:
        """Volume through the codebook and back: float32 `[B, D, H, W, 1]` in (-1, 1)."""
        return self.decode_samples(self.index_quantize(volume))

    def __call__(self, volume: jax.Array) -> jax.Array:
        """Touches every part, for initialisation; returns the reconstruction."""
        return self.head(self.trunk(volume, jnp.asarray(True)).features)
