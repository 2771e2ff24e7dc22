"""Class-conditional generation of 3D brain-tumour regions of interest in JAX.

    import vqroi_jax as vq

    model = vq.load('runs/transformer')
    tumours = model.sample('HGG', n=4, seed=0)  # float32 [4, D, H, W] in (-1, 1)
    tokens = model.encode(tumours)  # int32 [4, d, h, w]
    volumes = model.decode(tokens)

JAX is imported by `load`, not with the package.
"""

from pathlib import Path
from typing import TYPE_CHECKING

from vqroi_jax.errors import InputError

if TYPE_CHECKING:
    from vqroi_jax.api import Autoencoder

__version__ = '0.1.0'
__all__ = ['InputError', '__version__', 'load']


def load(workdir: str | Path, checkpoint: str | int = 'latest', vqgan_workdir: str | Path = '') -> 'Autoencoder':
    """Opens a finished run of either stage.

    Args:
        workdir: folder of a run of `configs/vqgan.py` (stage 1) or `configs/transformer.py` (stage 2).
        checkpoint: 'latest', 'best' or a step.
        vqgan_workdir: for a run of stage 2, where its stage 1 is, if it was moved.

    Returns:
        A `vqroi_jax.api.Generator` for stage 2, a `vqroi_jax.api.Autoencoder` for stage 1.

    Raises:
        InputError: the folder holds no run of a stage, or no such checkpoint; or stage 1 is missing.
    """
    from vqroi_jax import api

    return api.open_run(workdir, str(checkpoint), str(vqgan_workdir))
