"""3D residual networks that classify ROIs.

Source: Hara et al. 2018, *Can spatiotemporal 3D CNNs retrace the history of 2D CNNs and ImageNet?*, whose layout
MedicalNet and the paper's classifier share: the first convolution keeps the depth, and each of the last three stages
halves all sides.
"""

import functools
from collections.abc import Callable

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqroi_jax.models.layers import uniform_fan_in

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  # of each stage, by depth
SHORTCUTS = ('A', 'B')

_kaiming = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class ResNet3D(nn.Module):
    """Logits of ROIs. Keeps running means and variances in the collection `batch_stats`.

    Attributes:
        depth: 10, 18, 34 (blocks of two convolutions) or 50 (bottlenecks of three).
        classes: number of classes.
        width: channels of the first stage; each further one has twice as many, and bottlenecks put out four times that.
        shortcut: around a block that changes the shape: 'B', a 1x1x1 convolution, or 'A', every other voxel and zeros
            for the channels that are missing.
        dtype: of the convolutions; statistics and logits are float32.
    """

    depth: int
    classes: int
    width: int = 64
    shortcut: str = 'B'
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, volume: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[B, D, H, W, 1]` in [-1, 1] to float32 `[B, classes]`.

        Args:
            volume: sides of any size.
            train: whether to normalise by this batch, and to move the running statistics towards it.
        """
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype
        )
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=_kaiming)
        x = conv(self.width, (7, 7, 7), (1, 2, 2), padding=3, name='conv')(volume)
        x = nn.relu(norm(name='norm')(x))
        x = nn.max_pool(x, (3, 3, 3), (2, 2, 2), padding=[(1, 1)] * 3)
        kernels, expansion = ((3, 3), 1) if self.depth < 50 else ((1, 3, 1), 4)
        for stage, number in enumerate(BLOCKS[self.depth]):
            inner = self.width * 2**stage
            for block in range(number):
                stride = 2 if stage > 0 and block == 0 else 1
                x = _block(
                    self, x, f'stage_{stage}_block_{block}', kernels, inner, inner * expansion, stride, conv, norm
                )
        x = jnp.mean(x, axis=(1, 2, 3), dtype=jnp.float32)
        return nn.Dense(self.classes, kernel_init=uniform_fan_in, name='head')(x)


def _block(
    net: ResNet3D,
    x: jax.Array,
    name: str,
    kernels: tuple[int, ...],
    inner: int,
    outer: int,
    stride: int,
    conv: Callable,
    norm: Callable,
) -> jax.Array:
    """A residual block: convolutions of these kernel sizes, the first of size 3 with the stride."""
    hidden, strided = x, kernels.index(3)
    for number, size in enumerate(kernels):
        last = number == len(kernels) - 1
        step = stride if number == strided else 1
        features = outer if last else inner
        hidden = conv(features, (size,) * 3, step, padding=size // 2, name=f'{name}_conv_{number}')(hidden)
        hidden = norm(name=f'{name}_norm_{number}')(hidden)
        hidden = hidden if last else nn.relu(hidden)
    if stride > 1 or x.shape[-1] != outer:
        if net.shortcut == 'A':
            x = jnp.pad(x[:, ::stride, ::stride, ::stride], [(0, 0)] * 4 + [(0, outer - x.shape[-1])])
        else:
            x = norm(name=f'{name}_shortcut_norm')(conv(outer, (1, 1, 1), stride, name=f'{name}_shortcut')(x))
    return nn.relu(hidden + x)
