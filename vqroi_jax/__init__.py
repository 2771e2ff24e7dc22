"""Class-conditional generation of 3D brain-tumour regions of interest in JAX.

    import vqroi_jax as vq

    model = vq.load('runs/transformer')
    tumours = model.sample('HGG', n=4, seed=0)  # float32 [4, D, H, W] in [-1, 1]
    tokens = model.encode(tumours)  # int32 [4, d, h, w]
    volumes = model.decode(tokens)

`load` opens a finished run of either stage. JAX is imported at the first use of a name, not with the package.
"""

import importlib
from typing import TYPE_CHECKING, Any

from vqroi_jax.errors import InputError

if TYPE_CHECKING:
    from vqroi_jax.api import Autoencoder, Generator, load

__version__ = '0.1.0'
__all__ = ['Autoencoder', 'Generator', 'InputError', '__version__', 'load']


def __getattr__(name: str) -> Any:
    if name in ('Autoencoder', 'Generator', 'load'):
        return getattr(importlib.import_module('vqroi_jax.api'), name)
    raise AttributeError(f'module {__name__!r} has no attribute {name!r}')


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
