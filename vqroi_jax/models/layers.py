"""Linen layers that encoder, decoder, discriminator, scorer and classifier are built of.

Parameters are float32 whatever a layer's `dtype` (the dtype of its products and of what it returns), and are
named `kernel`, `bias` and `scale`.
"""

import math
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax import struct
from flax.typing import Dtype, Initializer
from jax.ad_checkpoint import checkpoint_name
from jax.experimental.xla_metadata import set_xla_metadata

from vqroi_jax.models import axes
from vqroi_jax.models.convolution import conv3d, upsample_conv3d

# What a network's backward pass computes again, to save memory: nothing, norms and activations, or all within a block.
REMATS = ('none', 'activations', 'blocks')

# Policy for `nn.remat`: the backward pass finds the results of linear layers and attention, and a norm's two numbers a
# row (or a sample and group); it computes norms and activations again, which costs little time and saves half of the
# memory or more.
save_products = jax.checkpoint_policies.save_only_these_names('linear', 'attention', 'statistics')


@struct.dataclass
class Deferred:
    """An activated group norm that whoever needs it computes, and the backward pass again when it gets there.

    What is normalised is all that is kept of it, which a convolution's result has to be for the norm's sake anyway.

    Attributes:
        x: what is normalised, [B, ..., channels].
        scale: float32 [channels].
        bias: float32 [channels].
        function: of the three to the activated norm, of the shape of `x`.
    """

    x: jax.Array
    scale: jax.Array
    bias: jax.Array
    function: Callable[[jax.Array, jax.Array, jax.Array], jax.Array] = struct.field(pytree_node=False)

    @property
    def shape(self) -> tuple[int, ...]:
        """Of what is computed."""
        return self.x.shape


def computed(x: jax.Array | Deferred) -> jax.Array:
    """What may be deferred, as an array."""
    return _again(_value)(x) if isinstance(x, Deferred) else x


def _value(x: jax.Array | Deferred) -> jax.Array:
    return x.function(x.x, x.scale, x.bias) if isinstance(x, Deferred) else x


def _again(function: Callable) -> Callable:
    """A function whose backward pass keeps its arguments and the norms' statistics, and computes the rest again."""
    return jax.checkpoint(function, policy=save_products)


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

    def __call__(self, x: jax.Array | Deferred) -> jax.Array:
        """Maps [B, D, H, W, in] to [B, d, h, w, features]."""
        return self.with_input(x)[0]

    @nn.compact
    def with_input(self, x: jax.Array | Deferred) -> tuple[jax.Array, jax.Array]:
        """The same, and `x` itself as it was computed."""
        return _convolve(self, partial(conv3d, stride=self.stride, padding=self.padding), self.kernel_size, x)


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
    def __call__(self, x: jax.Array | Deferred) -> jax.Array:
        """Maps [B, D, H, W, in] to [B, 2 D, 2 H, 2 W, features]."""
        return _convolve(self, upsample_conv3d, 3, x)[0]


class Dense(nn.Module):
    """Linear layer, whose kernel and bias start uniform within 1 / sqrt(fan_in) by default.

    Attributes:
        features: numbers of the output.
        dtype: of the product and of the output.
        kernel_init: initialiser of the kernel, [in, out].
        bias_init: initialiser of the bias, [out]; None: uniform within 1 / sqrt(fan_in).
        use_bias: False: no bias.
        by_output: the kernel is given as [out, in], which a CPU multiplies with a few rows in less time. For sampling
            alone: it is not split along `fsdp`, and nothing is kept for a backward pass.
        output_dtype: of the sums; None: `dtype`.
    """

    features: int
    dtype: Dtype = jnp.float32
    kernel_init: Initializer = uniform_fan_in
    bias_init: Initializer | None = None
    use_bias: bool = True
    by_output: bool = False
    output_dtype: Dtype | None = None

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., in] to [..., features]."""
        x, sums = x.astype(self.dtype), self.output_dtype or self.dtype
        if self.by_output:
            kernel = self.param('kernel', self.kernel_init, (self.features, x.shape[-1]), jnp.float32)
            # The kernel as the left operand: as the right one it takes longer than [in, out], but for a single row.
            product = jnp.einsum('...i,oi->o...', x, kernel.astype(self.dtype), preferred_element_type=sums)
            y = jnp.moveaxis(product, 0, -1)
        else:
            kernel = self.param('kernel', self.kernel_init, (x.shape[-1], self.features), jnp.float32)
            kernel = axes.put_together(kernel.astype(self.dtype), (*self.path, 'kernel'))
            y = checkpoint_name(_linear(x, kernel, sums), 'linear')
        if not self.use_bias:
            return y
        bias_init = self.bias_init or uniform_within(x.shape[-1])
        bias = self.param('bias', bias_init, (self.features,), jnp.float32)
        return (y + bias).astype(sums)  # in float32, as is then the sum that is the bias's gradient


@partial(jax.custom_vjp, nondiff_argnums=(2,))
def _linear(x: jax.Array, kernel: jax.Array, sums: Dtype) -> jax.Array:
    """`x` [..., in] times `kernel` [in, out], in the type of its sums.

    JAX's own rule finds the kernel's gradient as [out, in] and turns it over, and sums over several axes, batch and
    length; of either XLA:CPU makes a copy that is turned over in memory.
    """
    return jnp.matmul(x, kernel, preferred_element_type=sums)


def _linear_backward(
    sums: Dtype, kept: tuple[jax.Array, jax.Array], gradient: jax.Array
) -> tuple[jax.Array, jax.Array]:
    x, kernel = kept
    gradient = gradient.astype(x.dtype)
    flat, upstream = (array.reshape(-1, array.shape[-1]) for array in (x, gradient))

    def native(flat, upstream):
        return jax.lax.dot_general(flat, upstream, (((0,), (0,)), ((), ())))

    def turned(flat, upstream):
        return _turn(flat) @ upstream

    # Turning over what is wider takes as long as it saves.
    cpu = turned if flat.shape[1] <= upstream.shape[1] else native
    return gradient @ kernel.T, jax.lax.platform_dependent(flat, upstream, cpu=cpu, default=native)


def _turn(x: jax.Array) -> jax.Array:
    """`x` [rows, in] turned over, in a pass of its own.

    XLA:CPU would otherwise read `x` by columns within the product, which then takes a fourth longer, or compute what
    `x` is made of in the order of columns, which takes ten times as long. It does neither across a call.
    """
    with set_xla_metadata(inlineable='false'):
        return _turn_and_write(x)


@jax.jit
def _turn_and_write(x: jax.Array) -> jax.Array:
    return jax.lax.optimization_barrier(x.T)


_linear.defvjp(lambda x, kernel, sums: (_linear(x, kernel, sums), (x, kernel)), _linear_backward)


def _convolve(layer: nn.Module, function: Callable, k: int, x: jax.Array | Deferred) -> tuple[jax.Array, jax.Array]:
    """Makes a convolution's float32 parameters and applies them to `x`, in the layer's dtype.

    Args:
        layer: whose parameters they are.
        function: of volume, kernel and bias.
        k: side of the kernel.
        x: volume [B, D, H, W, in]; what is deferred is computed here, and in the backward pass here again.

    Returns:
        The result, and `x` as it was computed.
    """
    shape = (k, k, k, x.shape[-1], layer.features)
    kernel = layer.param('kernel', layer.kernel_init, shape, jnp.float32)
    bias = layer.param('bias', uniform_within(math.prod(shape[:-1])), shape[-1:], jnp.float32)

    def convolve(x, kernel, bias):
        kernel = axes.put_together(kernel.astype(layer.dtype), (*layer.path, 'kernel'))
        x = _value(x)
        return function(x.astype(layer.dtype), kernel, bias.astype(layer.dtype)), x

    return (_again(convolve) if isinstance(x, Deferred) else convolve)(x, kernel, bias)


def _scale_and_bias(layer: nn.Module, x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Makes a norm's float32 parameters, one of each for a feature of `x`: scales of 1 and biases of 0."""
    return tuple(
        layer.param(name, init, x.shape[-1:], jnp.float32)
        for name, init in (('scale', nn.initializers.ones), ('bias', nn.initializers.zeros))
    )


class LayerNorm(nn.Module):
    """Normalises each row of features, with scale and bias; statistics in float32.

    Attributes:
        epsilon: added to the variance.
        dtype: of the output.
    """

    epsilon: float = 1e-5
    dtype: Dtype = jnp.float32

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps [..., features] to the same shape."""
        return layer_norm(x, *_scale_and_bias(self, x), self.epsilon).astype(self.dtype)


@partial(jax.custom_vjp, nondiff_argnums=(3,))
def layer_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, epsilon: float) -> jax.Array:
    """Layer normalisation (Ba et al. 2016, https://arxiv.org/abs/1607.06450) with float32 statistics.

    Forward and backward are a few sums and one elementwise pass each, and only `x` and two numbers a row are kept in
    between.

    Args:
        x: [..., features].
        scale: float32 [features].
        bias: float32 [features].
        epsilon: added to the variance.

    Returns:
        float32, the shape of `x`.
    """
    return _layer_norm_forward(x, scale, bias, epsilon)[0]


def _layer_norm_forward(x, scale, bias, epsilon):
    wide = x.astype(jnp.float32)
    mean = checkpoint_name(jnp.mean(wide, -1, keepdims=True), 'statistics')
    variance = jnp.mean(jnp.square(wide - mean), -1, keepdims=True)
    inverse = checkpoint_name(jax.lax.rsqrt(variance + epsilon), 'statistics')
    return (wide - mean) * inverse * scale + bias, (x, scale, mean, inverse)


def _layer_norm_backward(epsilon, kept, gradient):
    del epsilon
    x, scale, mean, inverse = kept
    normalised = (x.astype(jnp.float32) - mean) * inverse
    scaled = gradient * scale
    along_constant = jnp.mean(scaled, -1, keepdims=True)
    along_x = jnp.mean(scaled * normalised, -1, keepdims=True)
    rows = tuple(range(x.ndim - 1))
    x_gradient = inverse * (scaled - along_constant - normalised * along_x)
    return x_gradient.astype(x.dtype), jnp.sum(gradient * normalised, rows), jnp.sum(gradient, rows)


layer_norm.defvjp(_layer_norm_forward, _layer_norm_backward)


def _itself(x: jax.Array) -> jax.Array:
    return x


class GroupNorm(nn.Module):
    """Normalises each sample over space and each group of channels; statistics in float32.

    Attributes:
        num_groups: groups, which divide the channels.
        epsilon: added to the variance.
        dtype: of the output.
        activation: elementwise function of the output.
        deferred: computes nothing yet, but returns a `Deferred`.
    """

    num_groups: int = 8
    epsilon: float = 1e-6
    dtype: Dtype = jnp.float32
    activation: Callable[[jax.Array], jax.Array] = _itself
    deferred: bool = False

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array | Deferred:
        """Maps [B, ..., channels] to the same shape."""

        def function(x, scale, bias):
            return self.activation(group_norm(x, scale, bias, self.num_groups, self.epsilon).astype(self.dtype))

        result = Deferred(x, *_scale_and_bias(self, x), function)
        return result if self.deferred else _value(result)


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def group_norm(x: jax.Array, scale: jax.Array, bias: jax.Array, num_groups: int, epsilon: float) -> jax.Array:
    """Group normalisation (Wu & He 2018, https://arxiv.org/abs/1803.08494) with float32 statistics.

    Forward and backward are a few sums a channel and one elementwise pass each, and only `x` is kept in between.

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
    return _group_norm_forward(x, scale, bias, num_groups, epsilon)[0]


def _group_norm_forward(x, scale, bias, num_groups, epsilon):
    if x.shape[-1] % num_groups:
        raise ValueError(f'{num_groups} groups do not divide {x.shape[-1]} channels')
    mean = checkpoint_name(_group_mean(_space_mean(x.astype(jnp.float32)), num_groups), 'statistics')
    variance = _group_mean(_space_mean(jnp.square(x.astype(jnp.float32) - mean)), num_groups)
    inverse = checkpoint_name(jax.lax.rsqrt(variance + epsilon), 'statistics')
    return (x.astype(jnp.float32) - mean) * (inverse * scale) + bias, (x, scale, mean, inverse)


def _group_norm_backward(num_groups, epsilon, kept, gradient):
    """All follows from two means a sample and channel: of the gradient, and of its product with what is normalised."""
    x, scale, mean, inverse = kept
    first = _space_mean(gradient)
    # Adding nothing ties what follows to the gradient: XLA would otherwise compute it in the forward pass and keep it.
    centred = x.astype(jnp.float32) - (mean + 0 * first)
    second = _space_mean(gradient * centred) * inverse
    points = math.prod(x.shape[1:-1])
    bias_gradient, scale_gradient = (jnp.sum(m * points, tuple(range(x.ndim - 1))) for m in (first, second))
    along_constant = _group_mean(first * scale, num_groups)
    along_x = _group_mean(second * scale, num_groups)
    x_gradient = gradient * (scale * inverse) - centred * (inverse**2 * along_x) - inverse * along_constant
    return x_gradient.astype(x.dtype), scale_gradient, bias_gradient


group_norm.defvjp(_group_norm_forward, _group_norm_backward)


def _space_mean(x: jax.Array) -> jax.Array:
    """Means over all axes but the first and the last, which stay as 1."""
    return jnp.mean(x, tuple(range(1, x.ndim - 1)), keepdims=True)


def _group_mean(channels: jax.Array, num_groups: int) -> jax.Array:
    """The mean of each channel's group, from means of the channels, [B, ..., channels].

    In two steps, since XLA:CPU vectorises a reduction that keeps the innermost axis.
    """
    groups = channels.reshape(*channels.shape[:-1], num_groups, -1)
    return jnp.broadcast_to(groups.mean(-1, keepdims=True), groups.shape).reshape(channels.shape)


class ResBlock(nn.Module):
    """Residual block x + act(norm(conv(act(norm(conv(x)))))), the two norms sharing one scale and one bias.

    Attributes:
        activation: elementwise function.
        num_groups: groups of the norms.
        dtype: of the products and of the output.
        deferred: the backward pass computes norms and activations again.
    """

    activation: Callable[[jax.Array], jax.Array]
    num_groups: int = 8
    dtype: Dtype = jnp.float32
    deferred: bool = False

    @nn.compact
    def __call__(self, x: jax.Array | Deferred) -> jax.Array:
        """Maps [B, D, H, W, channels] to the same shape."""
        norm = GroupNorm(
            self.num_groups, dtype=self.dtype, activation=self.activation, deferred=self.deferred, name='norm'
        )
        conv_0, conv_1 = (
            Conv3D(x.shape[-1], kernel_size=3, padding=1, dtype=self.dtype, name=f'conv_{index}') for index in range(2)
        )
        hidden, shortcut = conv_0.with_input(x)
        return shortcut + computed(norm(conv_1(norm(hidden))))
