"""The codebook of unit-length codes, learned by moving averages.

Stage 1 looks latent vectors up in it, stage 2 reads and writes its indices. The codes are a Flax variable
collection, `codebook`, and never a parameter: no optimiser sees them. What moves them are the pure functions
below, called by the training step once a step on the whole global batch.

Source of the rules: section 2.1 of the design (l2-normalised codes as in ViT-VQGAN, Yu et al. 2022, moved by the
exponential moving average of van den Oord et al. 2017, appendix A.1).
"""

from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

# Distances decide which code is taken, so no platform may compute them in fewer bits.
_EXACT = jax.lax.Precision.HIGHEST


def l2_normalise(vectors: jax.Array) -> jax.Array:
    """Unit-length float32 vectors along the last axis; norms below 1e-12 count as 1e-12.

    Args:
        vectors: `[..., C]`, any float dtype.
    """
    vectors = vectors.astype(jnp.float32)
    square = jnp.sum(jnp.square(vectors), axis=-1, keepdims=True)
    return vectors * jax.lax.rsqrt(jnp.maximum(square, 1e-24))


def nearest_codes(normalised: jax.Array, codes: jax.Array) -> jax.Array:
    """Index of the code with the largest cosine to each vector; the lowest index among equals.

    Args:
        normalised: float32 `[..., C]`, unit length.
        codes: float32 `[K, C]`, unit length.

    Returns:
        int32 `[...]` in [0, K).
    """
    cosine = jnp.einsum('...c,kc->...k', normalised, codes, precision=_EXACT)
    return jnp.argmax(cosine, axis=-1).astype(jnp.int32)


class Codebook(nn.Module):
    """K unit-length codes of C numbers, in the variable collection `codebook`.

    Variables:
        codes: float32 `[K, C]`, unit length. Random directions until `kmeans` replaces them.
        usage: float32 `[K]`, moving average of the assignments a step; zero at first.

    Attributes:
        size: number of codes, K.
        features: numbers a code, C.
    """

    size: int
    features: int

    def setup(self):
        """Declares the two variables."""
        self.codes = self.variable('codebook', 'codes', self._random_codes)
        self.usage = self.variable('codebook', 'usage', lambda: jnp.zeros((self.size,), jnp.float32))

    def _random_codes(self) -> jax.Array:
        return l2_normalise(jax.random.normal(self.make_rng('params'), (self.size, self.features)))

    def __call__(self, normalised: jax.Array) -> tuple[jax.Array, jax.Array]:
        """Looks vectors up.

        Args:
            normalised: float32 `[B, D, H, W, C]`, unit length.

        Returns:
            Tokens int32 `[B, D, H, W]` and their codes float32 `[B, D, H, W, C]`, both without gradient.
        """
        tokens = nearest_codes(jax.lax.stop_gradient(normalised), self.codes.value)
        return tokens, self.embed(tokens)

    def embed(self, tokens: jax.Array) -> jax.Array:
        """Codes of tokens: int `[...]` in [0, K) to float32 `[..., C]`."""
        return jnp.take(self.codes.value, tokens, axis=0)


class Assignments(NamedTuple):
    """Sums over the vectors that fell to each code: all that the moving averages need of a batch."""

    vectors: jax.Array  # float32 [K], how many
    total: jax.Array  # float32 [K, C]


def assign(normalised: jax.Array, tokens: jax.Array, size: int) -> Assignments:
    """Counts and sums of the vectors by code, as one matrix product (deterministic on every platform).

    Args:
        normalised: float32 `[..., C]`.
        tokens: int32 `[...]` in [0, size).
        size: number of codes, K.
    """
    onehot = jax.nn.one_hot(tokens, size, dtype=jnp.float32)
    places = tuple(range(tokens.ndim))  # not made one axis, which a mesh could split along its first part alone
    total = jax.lax.dot_general(onehot, normalised, ((places, places), ((), ())), precision=_EXACT)
    return Assignments(onehot.sum(axis=places), total)


def update_codes(
    codes: jax.Array, usage: jax.Array, assignments: Assignments, decay: float
) -> tuple[jax.Array, jax.Array]:
    """One step of the moving averages.

    A used code moves to `l2norm(decay * code + (1 - decay) * l2norm(mean of its vectors))`; an unused one stays.

    Args:
        codes: float32 `[K, C]`, unit length.
        usage: float32 `[K]`.
        assignments: of the whole global batch.
        decay: of both averages, in [0, 1).

    Returns:
        New codes and usage.
    """
    direction = l2_normalise(assignments.total)  # of the sum, so of the mean
    moved = l2_normalise(decay * codes + (1 - decay) * direction)
    used = assignments.vectors > 0
    return jnp.where(used[:, None], moved, codes), decay * usage + (1 - decay) * assignments.vectors


def restart_dead_codes(
    key: jax.Array, codes: jax.Array, usage: jax.Array, normalised: jax.Array, below: float
) -> tuple[jax.Array, jax.Array]:
    """Puts codes that are hardly used onto vectors of the current batch, drawn with replacement.

    Args:
        key: of the draw.
        codes: float32 `[K, C]`.
        usage: float32 `[K]`, assignments a step.
        normalised: float32 `[..., C]`, the current batch's latent vectors.
        below: codes whose usage is less than this are dead.

    Returns:
        New codes and usage; a restarted code starts from the usage `below`.
    """
    candidates = normalised.reshape(-1, normalised.shape[-1])
    drawn = candidates[jax.random.randint(key, (codes.shape[0],), 0, candidates.shape[0])]
    dead = usage < below
    return jnp.where(dead[:, None], drawn, codes), jnp.where(dead, below, usage)


def kmeans(key: jax.Array, normalised: jax.Array, size: int, rounds: int = 10) -> jax.Array:
    """Cosine k-means: the codebook's initial values.

    Starts from randomly permuted samples (drawn with replacement if there are fewer than K); an empty cluster keeps
    its mean.

    Args:
        key: of the draw of the starting samples.
        normalised: float32 `[..., C]`, unit length.
        size: number of clusters, K.
        rounds: of assignment and averaging.

    Returns:
        float32 `[K, C]`, unit length.
    """
    samples = normalised.reshape(-1, normalised.shape[-1])
    number = samples.shape[0]
    if number >= size:
        start = jax.random.permutation(key, number)[:size]
    else:
        start = jax.random.randint(key, (size,), 0, number)

    def one_round(_, means):
        sums = assign(samples, nearest_codes(samples, means), size)
        return jnp.where(sums.vectors[:, None] > 0, l2_normalise(sums.total), means)

    return jax.lax.fori_loop(0, rounds, one_round, samples[start])


def perplexity(counts: jax.Array) -> jax.Array:
    """Exponential of the entropy of the codes' frequencies: how many codes are effectively in use.

    Args:
        counts: float `[K]`, assignments by code; not all zero.

    Returns:
        float32 scalar in [1, K].
    """
    share = counts / jnp.sum(counts)
    return jnp.exp(-jnp.sum(jax.scipy.special.xlogy(share, share)))
