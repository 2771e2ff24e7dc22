"""Linen layers that encoder, decoder, discriminator, scorer and classifier are built of.

Parameters are float32 whatever a layer's `dtype` (the dtype of its products and of what it returns), and are
named `kernel`, `bias` and `scale`.
"""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.typing import Dtype, Initializer

from vqroi_jax.models.convolution import conv3d, upsample_conv3d


def uniform_within(fan_in: int) -> Initializer:
    """Initialiser that draws uniformly within 1 / sqrt(fan_in) of zero (PyTorch's default)."""
    bound = 1 / math.sqrt(fan_in)

    def init(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
        return jax.random.uniform(key, shape, dtype, -bound, bound)

    return init


def uniform_fan_in(key: jax.Array, shape: tuple[int, ...], dtype: Dtype = jnp.float32) -> jax.Array:
    """Draws a kernel, [..., in, out], uniformly within 1 / sqrt(fan_in) of zero (PyTorch's default)."""
    return uniform_within(math.prod(shape[:-1]))(key, shape, dtype)


class Conv3D(nn.Module):
    """3D convolution with a cubic kernel and a bias; the bias starts uniform within 1 / sqrt(fan_in).

    Attributes:
        features: channels of the output.
        kernel_size: side of the kernel.
        stride: the same along the three axes.
        padding: zeros added on both sides of the three axes.
        dtype: of the products and of the output.
        kernel_init: initialiser of the kernel, [k, k, k, in, out].
    """

    features: int
    kernel_size: int = 3
    stride: int = 1
    padding: int = 0
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, D, H, W, in] to [B, d, h, w, features]."""
        kernel, bias = _kernel_and_bias(self, (self.kernel_size,) * 3 + (x.shape[-1], self.features))
        return conv3d(x.astype(self.dtype), kernel, stride=self.stride, padding=self.padding) + bias


class UpsampleConv3D(nn.Module):
    """Nearest-neighbour upsampling by two, then a 3x3x3 convolution with padding 1 and a bias.

    Attributes:
        features: channels of the output.
        dtype: of the products and of the output.
        kernel_init: initialiser of the kernel, [3, 3, 3, in, out].
    """

    features: int
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = nn.initializers.normal(0.02)

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, D, H, W, in] to [B, 2 D, 2 H, 2 W, features]."""
        kernel, bias = _kernel_and_bias(self, (3, 3, 3, x.shape[-1], self.features))
        return upsample_conv3d(x.astype(self.dtype), kernel) + bias


class Dense(nn.Module):
    """Linear layer with a bias, both starting uniform within 1 / sqrt(fan_in) by default.

    Attributes:
        features: numbers of the output.
        dtype: of the product and of the output.
        kernel_init: initialiser of the kernel, [in, out].
    """

    features: int
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = uniform_fan_in

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., in] to [..., features]."""
        kernel, bias = _kernel_and_bias(self, (x.shape[-1], self.features))
        return x.astype(self.dtype) @ kernel + bias


def _kernel_and_bias(layer: nn.Module, shape: tuple[int, ...]) -> tuple[jax.Array, jax.Array]:
    """Makes a layer's float32 parameters, the kernel of this shape, and returns them in the layer's dtype."""
    kernel = layer.param('kernel', layer.kernel_init, shape, jnp.float32)
    bias = layer.param('bias', uniform_within(math.prod(shape[:-1])), shape[-1:], jnp.float32)
    return kernel.astype(layer.dtype), bias.astype(layer.dtype)


class GroupNorm(nn.Module):
    """Normalises each sample over space and each group of channels; statistics in float32.

    Attributes:
        num_groups: groups, which divide the channels.
        epsilon: added to the variance.
        dtype: of the output.
    """

    num_groups: int = 8
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, ..., channels] to the same shape."""
        scale = self.param('scale', nn.initializers.ones, x.shape[-1:], jnp.float32)
        bias = self.param('bias', nn.initializers.zeros, x.shape[-1:], jnp.float32)
        return group_norm(x, scale, bias, self.num_groups, self.epsilon).astype(self.dtype)


def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, num_groups: int, epsilon: float) -> jax.Array:
    """Group normalisation (Wu & He 2018, https://arxiv.org/abs/1803.08494) with float32 statistics.

    Args:
        x: [B, ..., channels].
        scale: float32 [channels].
        bias: float32 [channels].
        num_groups: groups, which divide the channels.
        epsilon: added to the variance.

    Returns:
        float32, the shape of `x`.

    Raises:
        ValueError: the groups do not divide the channels.
    """
    channels = x.shape[-1]
    if channels % num_groups:
        raise ValueError(f'{num_groups} groups do not divide {channels} channels')
    grouped = x.astype(jnp.float32).reshape(x.shape[0], -1, num_groups, channels // num_groups)
    mean = grouped.mean((1, 3), keepdims=True)
    variance = jnp.square(grouped - mean).mean((1, 3), keepdims=True)
    normalised = (grouped - mean) * jax.lax.rsqrt(variance + epsilon)
    return normalised.reshape(x.shape) * scale + bias


class ResBlock(nn.Module):
    """Residual block x + act(norm(conv(act(norm(conv(x)))))), the two norms sharing one scale and one bias.

    Attributes:
        activation: elementwise function.
        num_groups: groups of the norms.
        dtype: of the products and of the output.
    """

    activation: Callable[[jax.Array], jax.Array]
    num_groups: int = 8
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [B, D, H, W, channels] to the same shape."""
        norm = GroupNorm(self.num_groups, dtype=self.dtype, name='norm')
        hidden = x
        for index in range(2):
            conv = Conv3D(x.shape[-1], kernel_size=3, padding=1, dtype=self.dtype, name=f'conv_{index}')
            hidden = self.activation(norm(conv(hidden)))
        return x + hidden
