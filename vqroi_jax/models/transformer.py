"""Stage 2's network: a GPT over the tokens of a latent grid, which begins with the class.

The vocabulary is the codebook's K codes, [MASK] (token K), a token a class (class c is K + 1 + c) and, only where
training drops labels, a null class after them. `Transformer` is one forward pass over whole sequences, as training and
parallel decoding use it; `Block` also steps from token to token with the keys and values of earlier ones, as
`vqroi_jax.decoding` does. Source: section 2.4 of the design (minGPT's layers, Radford et al. 2019).
"""

from functools import partial

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqroi_jax.models import axes
from vqroi_jax.models.attention import attend
from vqroi_jax.models.layers import Dense, LayerNorm, save_products

_NORMAL = nn.initializers.normal(0.02)
_MLP = 4  # width of the hidden layer over the width of the network


class Block(nn.Module):
    """x + attention(norm(x)), then x + mlp(norm(x)): one layer.

    Attributes:
        width: of the layer, which the heads divide.
        heads: of the attention.
        causal: a position sees itself and earlier ones alone; else all.
        dtype: of products and activations; softmax and norms compute in float32.
        by_output: the linear layers' kernels are given as [out, in].
    """

    width: int
    heads: int
    causal: bool = True
    dtype: jnp.dtype = jnp.float32
    by_output: bool = False

    def setup(self):
        """Builds the layers."""
        self.norm_1, self.norm_2 = LayerNorm(dtype=self.dtype), LayerNorm(dtype=self.dtype)
        self.query, self.key, self.value = (self._dense(self.width) for _ in range(3))
        self.projection = self._dense(self.width)
        self.up, self.down = self._dense(_MLP * self.width), self._dense(self.width)

    @property
    def _head_width(self) -> int:
        return self.width // self.heads

    def _dense(self, features: int) -> Dense:
        return Dense(features, self.dtype, _NORMAL, nn.initializers.zeros, by_output=self.by_output)

    def _heads(self, x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
        """Queries, keys and values of `x` `[B, T, width]`, each `[B, T, heads, width / heads]`."""
        x = self.norm_1(x)
        shape = (*x.shape[:-1], self.heads, self._head_width)
        return tuple(layer(x).reshape(shape) for layer in (self.query, self.key, self.value))

    def _finish(self, x: jax.Array, attended: jax.Array) -> jax.Array:
        x = axes.keep_rows(x + self.projection(attended.reshape(x.shape)))
        return axes.keep_rows(x + self.down(gelu(self.up(self.norm_2(x)))))

    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[B, T, width]` to the same shape."""
        x = axes.keep_rows(x)
        return self._finish(x, attend(*self._heads(x), self.causal))

    def step(
        self, x: jax.Array, keys: jax.Array, values: jax.Array, position: jax.Array
    ) -> tuple[jax.Array, jax.Array, jax.Array]:
        """One position of every sample, which sees itself and what was cached of the earlier ones.

        Args:
            x: `[B, 1, width]`.
            keys: `[B, heads, T, width / heads]`, of which those before `position` count.
            values: likewise.
            position: int32 scalar in [0, T).

        Returns:
            The layer's output `[B, 1, width]`, and keys and values with those of this position.
        """
        query, key, value = (part.transpose(0, 2, 1, 3) for part in self._heads(x))
        product = partial(jnp.einsum, preferred_element_type=jnp.float32)
        logits = jnp.where(jnp.arange(keys.shape[2]) < position, product('bhqd,bhtd->bhqt', query, keys), -jnp.inf)
        logits = jnp.concatenate([logits, product('bhqd,bhqd->bhq', query, key)[..., None]], -1)
        weights = nn.softmax(logits / self._head_width**0.5).astype(self.dtype)
        earlier, own = product('bhqt,bhtd->bhqd', weights[..., :-1], values), weights[..., -1:] * value
        attended = (earlier + own).astype(self.dtype)
        # Adding nothing ties what is written to all that was read: the caches are then written where they are. Read
        # after they are written, or in no order, XLA:CPU copies them, several times a position.
        keys, values = (
            jax.lax.dynamic_update_slice_in_dim(cache, new + 0 * attended, position, axis=2)
            for cache, new in ((keys, key), (values, value))
        )
        attended = attended.transpose(0, 2, 1, 3)
        return self._finish(x, attended), keys, values


class Transformer(nn.Module):
    """Logits of the next token (causal) or of every token (bidirectional).

    Attributes:
        vocabulary: number of token ids, V.
        positions: longest sequence, P.
        layers: number of blocks, N.
        width: of each, W.
        heads: of each; they divide the width.
        causal: whether a position sees itself and earlier ones alone.
        remat: what the backward pass computes again, to save memory: 'none', 'activations' (norms and activations of
            the blocks) or 'blocks' (all but what goes into each, a third more time).
        dtype: of products and activations; parameters, softmax, norms' statistics and logits are float32.
    """

    vocabulary: int
    positions: int
    layers: int = 24
    width: int = 1024
    heads: int = 16
    causal: bool = True
    remat: str = 'none'
    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Builds the blocks with their parameters stacked along a first axis, over which the forward pass loops."""
        self.token_embedding = self.param('token_embedding', _NORMAL, (self.vocabulary, self.width), jnp.float32)
        self.position_embedding = self.param(
            'position_embedding', nn.initializers.zeros, (self.positions, self.width), jnp.float32
        )
        block = Block
        if self.remat != 'none':
            policy = save_products if self.remat == 'activations' else None
            block = nn.remat(Block, prevent_cse=False, policy=policy)
        self.blocks = block(self.width, self.heads, self.causal, self.dtype)
        self.norm = LayerNorm(dtype=self.dtype)
        self.head = Dense(self.vocabulary, self.dtype, _NORMAL, use_bias=False, output_dtype=jnp.float32)

    def embed(self, ids: jax.Array, position: jax.Array | int = 0) -> jax.Array:
        """Token ids `[B, T]`, the first at `position`, to `[B, T, W]` of the dtype."""
        tokens, positions = (
            axes.put_together(getattr(self, name), (name,)) for name in ('token_embedding', 'position_embedding')
        )
        places = jax.lax.dynamic_slice_in_dim(positions, position, ids.shape[1])
        return axes.keep_rows((jnp.take(tokens, ids, axis=0) + places).astype(self.dtype))

    def logits(self, x: jax.Array) -> jax.Array:
        """What the last block returns, `[B, T, W]`, to logits float32 `[B, T, V]`."""
        return self.head(self.norm(axes.keep_rows(x)))

    def __call__(self, ids: jax.Array) -> jax.Array:
        """Token ids int32 `[B, T]`, T at most P, to logits float32 `[B, T, V]`."""
        loop = nn.scan(
            lambda blocks, x, _: (blocks(x), None),
            variable_axes={'params': 0},
            split_rngs={'params': True},
            length=self.layers,
        )
        x, _ = loop(self.blocks, self.embed(ids), None)
        return self.logits(x)


def gelu(x: jax.Array) -> jax.Array:
    """`x` times the share of a normal distribution below it (Hendrycks & Gimpel 2016, exact), computed in float32.

    By the error function, as PyTorch has it; `jax.nn.gelu` takes its complement, which is closer for `x` far below 0,
    where the result is next to nothing, and three times as slow on a CPU.
    """
    wide = x.astype(jnp.float32)
    return (wide * (0.5 * (1 + jax.lax.erf(wide * 0.5**0.5)))).astype(x.dtype)
