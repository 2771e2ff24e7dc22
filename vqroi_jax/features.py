"""What networks see in ROIs, as vectors: what sets of ROIs are compared by.

`plane_features` shows a set's slices to a `Network`, plane by plane: VGG16, whose weights are there, or FID's
Inception-v3 with a user's. (`class_agreement.tell` gives the features of a network in 3D.)
"""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqroi_jax.models import inception, perceptual

PLANES = {'axial': 1, 'coronal': 3, 'sagittal': 2}  # axis of [B, D, H, W] that its slices are taken along
BATCH = 64  # slices


@dataclasses.dataclass(frozen=True)
class Network:
    """What looks at slices.

    Attributes:
        see: jitted, from weights and slices `[N, H, W]` in [-1, 1] to features float32 `[N, features]`.
        weights: that it takes.
    """

    see: Callable[[Any, jax.Array], jax.Array]
    weights: Any


def vgg16() -> Network:
    """VGG16 with LPIPS's scaling: 512 features, the last convolution's map averaged; slices of 16 x 16 or more.

    Raises:
        InputError: see `perceptual.load_weights`.
    """
    weights = perceptual.load_weights()
    return Network(_see_by_vgg16, {name: value for name, value in weights.items() if name.startswith('conv')})


@jax.jit
def _see_by_vgg16(weights: Any, slices: jax.Array) -> jax.Array:
    return perceptual.VGG16Features().apply({'params': weights}, _grey(slices))


def inception_v3(path: str | Path) -> Network:
    """Inception-v3 as FID is defined by it: 2048 features; slices of any size, which are brought to 299 x 299.

    Intensities are not rounded to 256 steps, as they are where images come from files.

    Args:
        path: of its weights.

    Raises:
        InputError: see `inception.load_weights`.
    """
    return Network(_see_by_inception, inception.load_weights(path))


@jax.jit
def _see_by_inception(weights: Any, slices: jax.Array) -> jax.Array:
    return inception.InceptionV3().apply(weights, inception.resize(_grey(slices)))


def _grey(slices: jax.Array) -> jax.Array:
    return jnp.repeat(slices[..., None], 3, axis=-1)


def plane_features(volumes: np.ndarray, plane: str, slices: int, keep_empty: bool, network: Network) -> np.ndarray:
    """A network's features of evenly spaced slices.

    Args:
        volumes: float32 [n, D, H, W] in [-1, 1], background -1, axes of BraTS; indexed by rows, may live on disk.
        plane: one of `PLANES`.
        slices: of each volume; where there are fewer, some come twice.
        keep_empty: whether they are spread over the whole volume; otherwise over the tumour's extent along the axis, so
            that none is empty. (A volume without tumour has only empty ones.)
        network: that looks at them.

    Returns:
        float32 [n, slices, features].
    """
    axis, parts = PLANES[plane] - 1, []
    step = max(1, BATCH // slices)
    for start in range(0, len(volumes), step):
        some = [np.take(v, places(v, axis, slices, keep_empty), axis) for v in volumes[start : start + step]]
        images = np.moveaxis(np.stack(some), axis + 1, 1)  # [b, slices, rows, columns]
        # Always as many rows, so that one program does for all.
        padded = np.pad(images, [(0, step - len(images)), *[(0, 0)] * 3])
        seen = np.asarray(network.see(network.weights, jnp.asarray(padded.reshape(-1, *images.shape[2:]))))
        parts.append(seen.reshape(step, slices, -1)[: len(images)])
    return np.concatenate(parts)


def places(volume: np.ndarray, axis: int, slices: int, keep_empty: bool) -> np.ndarray:
    """Where evenly spaced slices of a volume lie: of a mirrored volume the same, if they or the voxels are even.

    Args:
        volume: [D, H, W], background -1.
        axis: that they are taken along: 0, 1 or 2.
        slices: how many.
        keep_empty: see `plane_features`.

    Returns:
        int [slices].
    """
    occupied = np.flatnonzero(np.any(volume > -1, axis=tuple(a for a in range(3) if a != axis)))
    whole = keep_empty or not occupied.size
    first, last = (0, volume.shape[axis] - 1) if whole else (occupied[0], occupied[-1])
    middles = (np.arange(slices) + 0.5) * (last - first + 1) / slices - 0.5
    # Halves are rounded towards the middle from either end.
    return first + np.where(middles < (last - first) / 2, np.floor(middles + 0.5), np.ceil(middles - 0.5)).astype(int)
