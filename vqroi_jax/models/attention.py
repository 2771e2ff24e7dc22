"""Attention over whole sequences, its backward pass computing the weights again instead of keeping them.

GPUs and TPUs run `jax.nn.dot_product_attention`. On a CPU its arrays of `[B, heads, T, T]` go to memory and back a
dozen times; head by head and block by block they stay in the caches, and blocks that a causal mask hides are not
computed. Source of the backward pass: Dao et al. 2022, *FlashAttention*, appendix B.
"""

from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.ad_checkpoint import checkpoint_name

_BLOCK = 64  # queries that are computed together; with fewer, products are small, with more, hidden ones are computed
_HEADS = 2  # that are computed side by side, so that two cores find work
_HIDDEN = -1e30  # logit of what a causal mask hides


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def attend(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool) -> jax.Array:
    """Softmax of the queries' products with the keys over the square root of their length, times the values.

    Args:
        query: `[B, T, heads, width]`, float32 or bfloat16; softmax and sums are float32.
        key: the same shape.
        value: the same shape.
        causal: a position sees itself and earlier ones alone; else all.

    Returns:
        The same shape and dtype.
    """
    return _attend_forward(query, key, value, causal)[0]


def _native(query, key, value, causal):
    return jax.nn.dot_product_attention(query, key, value, is_causal=causal)


def _attend_forward(query, key, value, causal):
    """The result, and what the backward pass needs: the logarithms of the softmax's sums are 0 where not used."""

    def native(query, key, value):
        batch, length, heads, _ = query.shape
        return _native(query, key, value, causal), jnp.zeros((batch, heads, length), jnp.float32)

    def blocks(query, key, value):
        result, log_sums = _map_heads(partial(_head_forward, causal=causal), _by_head(query, key, value))
        return _from_heads(result, query), log_sums.reshape(query.shape[0], query.shape[2], -1)

    parts = lax.platform_dependent(query, key, value, cpu=blocks, default=native)
    result, log_sums = (checkpoint_name(part, 'attention') for part in parts)
    return result, (query, key, value, result, log_sums)


def _attend_backward(causal, kept, gradient):
    def native(query, key, value, result, log_sums, gradient):
        del result, log_sums
        return jax.vjp(partial(_native, causal=causal), query, key, value)[1](gradient)

    def blocks(query, key, value, result, log_sums, gradient):
        heads = (*_by_head(query, key, value, result, gradient), log_sums.reshape(-1, log_sums.shape[-1]))
        gradients = _map_heads(partial(_head_backward, causal=causal), heads)
        return tuple(_from_heads(part, query) for part in gradients)

    return lax.platform_dependent(*kept, gradient, cpu=blocks, default=native)


attend.defvjp(_attend_forward, _attend_backward)


def _map_heads(of_head: Callable, heads: tuple[jax.Array, ...]) -> Any:
    """What the function returns of each head, stacked, as the arguments are along their first axis."""
    return lax.scan(lambda _, head: (None, of_head(*head)), None, heads, unroll=_HEADS)[1]


def _by_head(*arrays: jax.Array) -> tuple[jax.Array, ...]:
    """`[B, T, heads, width]` to `[B * heads, T, width]`."""
    return tuple(a.transpose(0, 2, 1, 3).reshape(-1, a.shape[1], a.shape[3]) for a in arrays)


def _from_heads(array: jax.Array, like: jax.Array) -> jax.Array:
    """`[B * heads, T, width]` to the shape and dtype of `like`, `[B, T, heads, width]`."""
    batch, length, heads, width = like.shape
    return array.reshape(batch, heads, length, width).transpose(0, 2, 1, 3).astype(like.dtype)


def _spans(length: int, causal: bool) -> list[tuple[int, int, int]]:
    """Blocks of queries, first and last, and how many keys each sees."""
    starts = range(0, length, _BLOCK)
    return [(start, end, end if causal else length) for start in starts for end in (min(start + _BLOCK, length),)]


def _logits(query: jax.Array, key: jax.Array, start: int, causal: bool) -> jax.Array:
    """Float32 `[keys, queries]`: sums over keys then run along the memory. `start` is the first query's position."""
    logits = _product('kw,qw->kq', key, query) * query.shape[-1] ** -0.5
    if causal:
        places = [lax.broadcasted_iota(jnp.int32, logits.shape, axis) for axis in (0, 1)]
        logits = jnp.where(places[0] <= start + places[1], logits, _HIDDEN)
    return logits


def _product(equation: str, a: jax.Array, b: jax.Array) -> jax.Array:
    return jnp.einsum(equation, a, b, preferred_element_type=jnp.float32)


def _head_forward(query: jax.Array, key: jax.Array, value: jax.Array, causal: bool) -> tuple[jax.Array, jax.Array]:
    """Of one head, `[T, width]` each: the result float32 `[T, width]`, and the logarithm of each query's sum `[T]`."""
    results, log_sums = [], []
    for start, end, seen in _spans(len(query), causal):
        logits = _logits(query[start:end], key[:seen], start, causal)
        largest = jnp.max(logits, axis=0)
        weights = jnp.exp(logits - largest)
        total = jnp.sum(weights, axis=0)
        results.append(_product('kq,kw->qw', weights.astype(value.dtype), value[:seen]) / total[:, None])
        log_sums.append(largest + jnp.log(total))
    return jnp.concatenate(results), jnp.concatenate(log_sums)


def _head_backward(query, key, value, result, gradient, log_sums, causal):
    """Of one head, `[T, width]` each: the gradients in query, key and value, float32."""
    shift = jnp.sum(gradient.astype(jnp.float32) * result, axis=1)
    scale, dtype = query.shape[-1] ** -0.5, query.dtype
    along_query, along_key, along_value = [], *(jnp.zeros(key.shape, jnp.float32) for _ in range(2))
    for start, end, seen in _spans(len(query), causal):
        weights = jnp.exp(_logits(query[start:end], key[:seen], start, causal) - log_sums[start:end])
        upstream = gradient[start:end]
        along_value = along_value.at[:seen].add(_product('kq,qw->kw', weights.astype(dtype), upstream))
        along_weights = _product('kw,qw->kq', value[:seen], upstream)
        along_logits = (weights * (along_weights - shift[start:end]) * scale).astype(dtype)
        along_query.append(_product('kq,kw->qw', along_logits, key[:seen]))
        along_key = along_key.at[:seen].add(_product('kq,qw->kw', along_logits, query[start:end]))
    return jnp.concatenate(along_query), along_key, along_value
