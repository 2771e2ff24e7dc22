"""What networks see in ROIs, as vectors: what sets of ROIs are compared by.

`plane_features` shows a set's slices to VGG16, plane by plane. (`class_agreement.tell` gives those of a network in 3D.)
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqroi_jax.models import perceptual

PLANES = {'axial': 1, 'coronal': 3, 'sagittal': 2}  # axis of [B, D, H, W] that its slices are taken along
BATCH = 64  # slices


def plane_features(volumes: np.ndarray, plane: str, slices: int, keep_empty: bool, weights: Any) -> np.ndarray:
    """VGG16's features of evenly spaced slices.

    Args:
        volumes: float32 [n, D, H, W] in [-1, 1], background -1, axes of BraTS; indexed by rows, may live on disk.
        plane: one of `PLANES`.
        slices: of each volume; where there are fewer, some come twice.
        keep_empty: whether they are spread over the whole volume; otherwise over the tumour's extent along the axis, so
            that none is empty. (A volume without tumour has only empty ones.)
        weights: from `perceptual.load_weights`.

    Returns:
        float32 [n, slices, 512].
    """
    axis, parts = PLANES[plane] - 1, []
    step = max(1, BATCH // slices)
    for start in range(0, len(volumes), step):
        some = [np.take(v, _places(v, axis, slices, keep_empty), axis) for v in volumes[start : start + step]]
        images = np.moveaxis(np.stack(some), axis + 1, 1)  # [b, slices, rows, columns]
        # Always as many rows, so that one program does for all.
        padded = np.pad(images, [(0, step - len(images)), *[(0, 0)] * 3])
        seen = np.asarray(_see(weights, padded.reshape(-1, *images.shape[2:])))
        parts.append(seen.reshape(step, slices, -1)[: len(images)])
    return np.concatenate(parts)


def _places(volume: np.ndarray, axis: int, slices: int, keep_empty: bool) -> np.ndarray:
    """Where the slices of a volume [D, H, W] are taken, [slices]."""
    occupied = np.flatnonzero(np.any(volume > -1, axis=tuple(a for a in range(3) if a != axis)))
    whole = keep_empty or not occupied.size
    first, last = (0, volume.shape[axis] - 1) if whole else (occupied[0], occupied[-1])
    return first + ((np.arange(slices) + 0.5) * (last - first + 1) / slices).astype(int)


@jax.jit
def _see(weights: Any, images: jax.Array) -> jax.Array:
    convolutions = {name: value for name, value in weights.items() if name.startswith('conv')}
    grey = jnp.repeat(images[..., None], 3, axis=-1)
    return perceptual.VGG16Features().apply({'params': convolutions}, grey)
