"""Stage 2's block: what its backward pass keeps. What the network computes is tested beside PyTorch's, in `parity`."""

from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import scipy.special
from flax import linen as nn

from vqroi_jax.models.layers import save_products
from vqroi_jax.models.transformer import Block, gelu

BATCH, LENGTH, WIDTH, HEADS = 2, 6, 8, 2


def test_rematerialisation_keeps_products_alone():
    x = jax.random.normal(jax.random.key(0), (BATCH, LENGTH, WIDTH))
    variables = Block(WIDTH, HEADS).init(jax.random.key(1), x)

    def kept(block_type):
        block = block_type(WIDTH, HEADS)
        backward = jax.vjp(lambda variables, x: jnp.sum(block.apply(variables, x)), variables, x)[1]
        return Counter(leaf.shape for leaf in jax.tree.leaves(backward))

    remat, plain = kept(nn.remat(Block, policy=save_products)), kept(Block)
    narrow, heads, wide = (BATCH, LENGTH, WIDTH), (BATCH, LENGTH, HEADS, WIDTH // HEADS), (BATCH, LENGTH, 4 * WIDTH)
    sums = (BATCH, HEADS, LENGTH)
    # What goes in, queries, keys, values and projection; the attention's result and sums; the hidden layer.
    assert (remat[narrow], remat[heads], remat[sums], remat[wide]) == (5, 1, 1, 1)
    assert sum(plain.values()) > sum(remat.values())
    assert plain[wide] > 1


def test_gelu_is_scipys():
    x = np.linspace(-8, 8, 1001, dtype=np.float32)
    expected = x * scipy.special.ndtr(x.astype(np.float64))
    np.testing.assert_allclose(gelu(jnp.asarray(x)), expected, rtol=1e-6, atol=1e-6)
    wide = gelu(jnp.asarray(x, jnp.bfloat16))
    assert wide.dtype == jnp.bfloat16
    np.testing.assert_allclose(wide.astype(jnp.float32), expected, rtol=1.5e-2, atol=1e-2)
