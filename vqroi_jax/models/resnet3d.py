"""3D residual networks that classify ROIs.

Source: Hara et al. 2018, *Can spatiotemporal 3D CNNs retrace the history of 2D CNNs and ImageNet?*, whose networks the
paper's classifier is one of; and Chen et al. 2019, *Med3D: Transfer Learning for 3D Medical Image Analysis*, whose
published weights (MedicalNet) are of the same layers with other strides (`LAYOUTS`).
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqroi_jax.models.layers import uniform_fan_in
from vqroi_jax.models.pooling import max_pool

BLOCKS = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}  # of each stage, by depth
SHORTCUTS = ('A', 'B')
HEAD = 'head'  # what the names of the head's layers begin with; all others are of the features


class Layout(NamedTuple):
    """Steps between the voxels that convolutions compute, and between those that they see."""

    stem: tuple[int, int, int]  # stride of the first convolution along (D, H, W)
    strides: tuple[int, int, int, int]  # of the stages
    dilations: tuple[int, int, int, int]  # of the stages' convolutions of size 3


LAYOUTS = {
    'hara': Layout((1, 2, 2), (1, 2, 2, 2), (1, 1, 1, 1)),
    'medicalnet': Layout((2, 2, 2), (1, 2, 1, 1), (1, 1, 2, 4)),  # made for segmentation: features an eighth in size
}

_kaiming = nn.initializers.variance_scaling(2.0, 'fan_out', 'normal')


class ResNet3D(nn.Module):
    """Logits of ROIs. Keeps running means and variances in the collection `batch_stats`.

    Attributes:
        depth: 10, 18, 34 (blocks of two convolutions) or 50 (bottlenecks of three).
        classes: number of classes.
        width: channels of the first stage; each further one has twice as many, and bottlenecks put out four times that.
        shortcut: around a block that changes the shape: 'B', a 1x1x1 convolution, or 'A', every other voxel and zeros
            for the channels that are missing.
        layout: of `LAYOUTS`.
        standardise: whether each volume's voxels above -1 are brought to mean 0 and standard deviation 1 first, and its
            background to 0. MedicalNet saw volumes like that, but noise N(0, 1) for the background.
        hidden: widths of the head's linear layers with ReLU, between the averaged features and the logits.
        dtype: of the convolutions; statistics and the head are float32.
    """

    depth: int
    classes: int
    width: int = 64
    shortcut: str = 'B'
    layout: str = 'hara'
    standardise: bool = False
    hidden: tuple[int, ...] = ()
    dtype: jnp.dtype = jnp.float32

    @nn.compact
    def __call__(self, volume: jax.Array, train: bool = False) -> jax.Array:
        """Maps `[B, D, H, W, 1]` in [-1, 1] to float32 `[B, classes]`.

        Sows the last stage's `[B, d, h, w, C]` as `features` into the collection `intermediates`.

        Args:
            volume: sides of any size.
            train: whether to normalise by this batch, and to move the running statistics towards it.
        """
        norm = functools.partial(
            nn.BatchNorm, use_running_average=not train, momentum=0.9, epsilon=1e-5, dtype=self.dtype
        )
        conv = functools.partial(nn.Conv, use_bias=False, dtype=self.dtype, kernel_init=_kaiming)
        layout = LAYOUTS[self.layout]
        x = standardised(volume) if self.standardise else volume
        x = conv(self.width, (7, 7, 7), layout.stem, padding=3, name='conv')(x)
        x = nn.relu(norm(name='norm')(x))
        x = max_pool(x, window=3, stride=2, padding=1)
        kernels, expansion = ((3, 3), 1) if self.depth < 50 else ((1, 3, 1), 4)
        for stage, number in enumerate(BLOCKS[self.depth]):
            inner = self.width * 2**stage
            for block in range(number):
                steps = layout.strides[stage] if block == 0 else 1, layout.dilations[stage]
                x = _block(
                    self, x, f'stage_{stage}_block_{block}', kernels, inner, inner * expansion, *steps, conv, norm
                )
        self.sow('intermediates', 'features', x)
        x = jnp.mean(x, axis=(1, 2, 3), dtype=jnp.float32)
        for number, width in enumerate(self.hidden):
            x = nn.relu(nn.Dense(width, kernel_init=uniform_fan_in, name=f'{HEAD}_{number}')(x))
        return nn.Dense(self.classes, kernel_init=uniform_fan_in, name=HEAD)(x)


def standardised(volume: jax.Array) -> jax.Array:
    """Brings the voxels above -1 of each `[B, D, H, W, 1]` to mean 0 and standard deviation 1, and all others to 0."""
    inside = volume > -1
    number = jnp.maximum(jnp.sum(inside, axis=(1, 2, 3, 4), keepdims=True), 1)

    def mean(values):
        return jnp.sum(jnp.where(inside, values, 0), axis=(1, 2, 3, 4), keepdims=True) / number

    centred = volume - mean(volume)
    deviation = jnp.sqrt(mean(centred**2))
    return jnp.where(inside & (deviation > 0), centred / jnp.where(deviation > 0, deviation, 1), 0)


def is_head(name: str) -> bool:
    """Whether a layer of `ResNet3D` is of its head, and not of its features."""
    return name.startswith(HEAD)


def _block(
    net: ResNet3D,
    x: jax.Array,
    name: str,
    kernels: tuple[int, ...],
    inner: int,
    outer: int,
    stride: int,
    dilation: int,
    conv: Callable,
    norm: Callable,
) -> jax.Array:
    """A residual block: convolutions of these kernel sizes, the first of size 3 with the stride, all such dilated."""
    hidden, strided = x, kernels.index(3)
    for number, size in enumerate(kernels):
        last = number == len(kernels) - 1
        step = stride if number == strided else 1
        features = outer if last else inner
        apart = dilation if size == 3 else 1
        hidden = conv(
            features,
            (size,) * 3,
            step,
            padding=apart * (size // 2),
            kernel_dilation=apart,
            name=f'{name}_conv_{number}',
        )(hidden)
        hidden = norm(name=f'{name}_norm_{number}')(hidden)
        hidden = hidden if last else nn.relu(hidden)
    if stride > 1 or x.shape[-1] != outer:
        if net.shortcut == 'A':
            x = jnp.pad(x[:, ::stride, ::stride, ::stride], [(0, 0)] * 4 + [(0, outer - x.shape[-1])])
        else:
            x = norm(name=f'{name}_shortcut_norm')(conv(outer, (1, 1, 1), stride, name=f'{name}_shortcut')(x))
    return nn.relu(hidden + x)
