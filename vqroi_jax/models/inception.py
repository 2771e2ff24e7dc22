"""Inception-v3 as FID has it: what the network of Szegedy et al. that FID is defined by sees in images.

It is the network of TensorFlow's `inception-2015-12-05`, which differs from later ones: means of 3 x 3 pixels leave out
what is beyond the border, and the last block has a maximum in the mean's place. Weights are not shipped: they come from
the file of the package `pytorch-fid`, `pt_inception-2015-12-05-6726825d.pth`. Layers are called as in that file.
Sources: Szegedy et al. 2016, *Rethinking the Inception architecture for computer vision*; Heusel et al. 2017; and
`pytorch-fid` 0.3.0, whose features these equal.
"""

import functools
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vqroi_jax import torch_files
from vqroi_jax.models.pooling import max_pool

SHA256 = '6726825d0af5f729cebd5821db510b11b1cfad8faad88a03f1befd49fb9129b2'  # of the file that FID is computed with
SIDE = 299  # pixels that images are brought to
FEATURES = 2048

_TOLD = 1008  # classes of the file's last layer, which is not used
_KINDS = {  # the file's names of our variables
    'kernel': 'conv.weight',
    'scale': 'bn.weight',
    'bias': 'bn.bias',
    'mean': 'bn.running_mean',
    'var': 'bn.running_var',
}


class Convolution(nn.Module):
    """A convolution without bias, batch normalisation by stored statistics, and ReLU.

    Attributes:
        features: channels put out.
        kernel: its height and width.
        stride: in both directions.
        padding: 'VALID', or 'SAME' for as many pixels as come in.
    """

    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    padding: str = 'SAME'

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, channels]` to `[N, h, w, features]`."""
        conv = nn.Conv(
            self.features,
            self.kernel,
            self.stride,
            self.padding,
            use_bias=False,
            name='conv',
        )
        return nn.relu(nn.BatchNorm(use_running_average=True, epsilon=1e-3, name='bn')(conv(x)))


_shrink = functools.partial(max_pool, window=3, stride=2)
_means = functools.partial(nn.avg_pool, window_shape=(3, 3), strides=(1, 1), padding='SAME', count_include_pad=False)
_maxima = functools.partial(max_pool, window=3, stride=1, padding=1)

_POINT, _SQUARE, _ROW, _COLUMN = (1, 1), (3, 3), (1, 7), (7, 1)


class Mixed(nn.Module):
    """Branches side by side, the last of which begins with a pooling, or is one.

    Attributes:
        branches: of each its name, and of its convolutions the features and the kernel.
        pooled: features of the convolution after the pooling; 0: there is none, and the block halves the sides, each
            branch by its last layer.
    """

    branches: tuple[tuple[str, tuple[tuple[int, tuple[int, int]], ...]], ...]
    pooled: int

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, channels]` to `[N, h, w, features]`."""
        parts = []
        for name, layers in self.branches:
            part = x
            for number, (features, kernel) in enumerate(layers, 1):
                shrinks = not self.pooled and number == len(layers)
                stride, padding = (2, 'VALID') if shrinks else (1, 'SAME')
                layer = f'{name}_{number}' if len(layers) > 1 else name
                part = Convolution(features, kernel, stride, padding, name=layer)(part)
            parts.append(part)
        parts.append(Convolution(self.pooled, name='branch_pool')(_means(x)) if self.pooled else _shrink(x))
        return jnp.concatenate(parts, axis=-1)


class MixedWide(nn.Module):
    """A block of the coarsest scale, whose branches fork into a row and a column.

    Attributes:
        pool: of 3 x 3 pixels, that the last branch begins with.
    """

    pool: Callable[[jax.Array], jax.Array]

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """Maps `[N, H, W, channels]` to `[N, H, W, 2048]`."""
        square = Convolution(384, name='branch3x3_1')(x)
        double = Convolution(448, name='branch3x3dbl_1')(x)
        double = Convolution(384, _SQUARE, name='branch3x3dbl_2')(double)
        forks = [
            Convolution(384, kernel, name=f'{name}{side}')(part)
            for name, part in (('branch3x3_2', square), ('branch3x3dbl_3', double))
            for side, kernel in (('a', (1, 3)), ('b', (3, 1)))
        ]
        pooled = Convolution(192, name='branch_pool')(self.pool(x))
        return jnp.concatenate([Convolution(320, name='branch1x1')(x), *forks, pooled], axis=-1)


def _fine(pooled: int) -> Callable[..., Mixed]:
    branches = (
        ('branch1x1', ((64, _POINT),)),
        ('branch5x5', ((48, _POINT), (64, (5, 5)))),
        ('branch3x3dbl', ((64, _POINT), (96, _SQUARE), (96, _SQUARE))),
    )
    return functools.partial(Mixed, branches, pooled)


def _middle(inner: int) -> Callable[..., Mixed]:
    branches = (
        ('branch1x1', ((192, _POINT),)),
        ('branch7x7', ((inner, _POINT), (inner, _ROW), (192, _COLUMN))),
        ('branch7x7dbl', ((inner, _POINT), (inner, _COLUMN), (inner, _ROW), (inner, _COLUMN), (192, _ROW))),
    )
    return functools.partial(Mixed, branches, 192)


_BLOCKS: dict[str, Callable[..., nn.Module]] = {
    'Mixed_5b': _fine(32),
    'Mixed_5c': _fine(64),
    'Mixed_5d': _fine(64),
    'Mixed_6a': functools.partial(
        Mixed,
        (('branch3x3', ((384, _SQUARE),)), ('branch3x3dbl', ((64, _POINT), (96, _SQUARE), (96, _SQUARE)))),
        0,
    ),
    'Mixed_6b': _middle(128),
    'Mixed_6c': _middle(160),
    'Mixed_6d': _middle(160),
    'Mixed_6e': _middle(192),
    'Mixed_7a': functools.partial(
        Mixed,
        (
            ('branch3x3', ((192, _POINT), (320, _SQUARE))),
            ('branch7x7x3', ((192, _POINT), (192, _ROW), (192, _COLUMN), (192, _SQUARE))),
        ),
        0,
    ),
    'Mixed_7b': functools.partial(MixedWide, _means),
    'Mixed_7c': functools.partial(MixedWide, _maxima),
}


class InceptionV3(nn.Module):
    """The network up to its last pooling; its parameters and statistics are constants (`load_weights`)."""

    @nn.compact
    def __call__(self, images: jax.Array) -> jax.Array:
        """What it sees in images of its own size.

        Args:
            images: float32 `[N, 299, 299, 3]` in [-1, 1], see `resize`.

        Returns:
            float32 `[N, 2048]`, not negative.
        """
        x = Convolution(32, _SQUARE, 2, 'VALID', name='Conv2d_1a_3x3')(images)
        x = Convolution(32, _SQUARE, 1, 'VALID', name='Conv2d_2a_3x3')(x)
        x = _shrink(Convolution(64, _SQUARE, name='Conv2d_2b_3x3')(x))
        x = Convolution(80, name='Conv2d_3b_1x1')(x)
        x = _shrink(Convolution(192, _SQUARE, 1, 'VALID', name='Conv2d_4a_3x3')(x))
        for name, block in _BLOCKS.items():
            x = block(name=name)(x)
        return jnp.mean(x, axis=(1, 2))


def resize(images: jax.Array) -> jax.Array:
    """Images of any size at the network's, by linear interpolation between pixels' centres.

    As `pytorch-fid` does: sizes are not kept in proportion, and larger images are not smoothed before. That it
    interpolates in [0, 1] and maps to [-1, 1] afterwards comes to the same.

    Args:
        images: float32 `[N, H, W, C]`.

    Returns:
        float32 `[N, 299, 299, C]`.
    """
    shape = (images.shape[0], SIDE, SIDE, images.shape[-1])
    return jax.image.resize(images, shape, 'bilinear', antialias=False)


def load_weights(path: str | Path) -> dict[str, Any]:
    """The variables of `InceptionV3`, from the file of `pytorch-fid`.

    Args:
        path: of a PyTorch state dict.

    Raises:
        InputError: there is no such file, it holds another network, or PyTorch, which reads it, is not installed.
    """
    arrays = {name: array for name, array in torch_files.read(path).items() if not name.endswith('num_batches_tracked')}
    torch_files.check(path, arrays, file_shapes(), "FID's Inception-v3 (pt_inception-2015-12-05-6726825d.pth)")
    return from_arrays(arrays)


def file_shapes() -> dict[str, tuple[int, ...]]:
    """By name, the shapes of what the file holds; but for the layers' counts of batches, which are not read."""
    shapes = {name: tuple(leaf.shape[axis] for axis in _axes(leaf)) for name, (_, leaf) in _variables().items()}
    return shapes | {'fc.weight': (_TOLD, FEATURES), 'fc.bias': (_TOLD,)}


def from_arrays(arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
    """The variables of `InceptionV3`, float32, from arrays that are called and laid out as in the file."""
    flat = {
        path: jnp.asarray(arrays[name].transpose(np.argsort(_axes(leaf))), jnp.float32)
        for name, (path, leaf) in _variables().items()
    }
    return unflatten_dict(flat)


@functools.cache
def _variables() -> dict[str, tuple[tuple[str, ...], jax.ShapeDtypeStruct]]:
    """By the file's names: the path and the shape of each of our variables."""
    image = jax.ShapeDtypeStruct((1, SIDE, SIDE, 3), jnp.float32)
    ours = flatten_dict(jax.eval_shape(InceptionV3().init, jax.random.key(0), image))
    return {'.'.join((*path[1:-2], _KINDS[path[-1]])): (path, leaf) for path, leaf in ours.items()}


def _axes(leaf: jax.ShapeDtypeStruct) -> tuple[int, ...]:
    """Our axes in the file's order: of kernels [out, in, height, width]."""
    return (3, 2, 0, 1) if len(leaf.shape) == 4 else tuple(range(len(leaf.shape)))
