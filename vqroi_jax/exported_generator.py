"""A generator of synthetic 3D tumours, in the file that this module lies in; README.txt beside it says more.

    import sys; sys.path.insert(0, 'generator.zip')
    import generator
    tumours = generator.sample('HGG', n=4, seed=0)  # float32 [4, D, H, W] in (-1, 1), background about -1

It needs Python, JAX, NumPy and flatbuffers, and nothing else. What it draws is synthetic: not patients, and not for
clinical use.
"""

import functools
import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.export
import numpy as np

_FILE = Path(__file__).parent.absolute()  # the zip file


def facts() -> dict[str, Any]:
    """What is known of the generator: classes, sizes, how it samples, what it was trained on, and by which code."""
    return json.loads(_read('facts.json'))


def sample(label: str, n: int = 1, seed: int = 0, first: int = 0) -> np.ndarray:
    """Draws new tumours; what one becomes depends on its class, seed and number alone.

    Args:
        label: name of the class.
        n: how many.
        seed: 0 to 2**32 - 1.
        first: number of the first; `first=4` goes on after `n=4`.

    Returns:
        float32 `[n, D, H, W]` in (-1, 1).

    Raises:
        ValueError: an unknown class, or a number that is not whole or out of range.
    """
    return decode(tokens(label, n, seed, first))


def tokens(label: str, n: int = 1, seed: int = 0, first: int = 0) -> np.ndarray:
    """The same as tokens, int32 `[n, d, h, w]`."""
    known = facts()
    if label not in known['classes']:
        raise ValueError(f'class {label!r} is unknown; there are {", ".join(known["classes"])}')
    for name, value in (('n', n), ('seed', seed), ('first', first)):
        if not isinstance(value, int | np.integer):
            raise ValueError(f'{name}={value!r}: a whole number is expected')
    if n < 1 or not 0 <= seed < 2**32 or not 0 <= first <= 2**32 - n:
        raise ValueError(f'n={n}, seed={seed}, first={first}: n from 1, the others from 0, all below 2**32')
    number, rows = np.uint32(known['classes'].index(label)), known['rows']
    wanted = np.arange(first, first + n)
    drawn = []
    for group in range(wanted[0] // rows, wanted[-1] // rows + 1):  # sample i is always row i % rows of group i // rows
        indices = np.arange(group * rows, (group + 1) * rows)
        every = np.asarray(_program('tokens')(_weights('tokens'), np.uint32(seed), number, indices.astype(np.uint32)))
        drawn.append(every[np.isin(indices, wanted)])
    return np.concatenate(drawn)


def decode(grids: np.ndarray) -> np.ndarray:
    """The volumes of tokens, one by one.

    Args:
        grids: whole numbers `[n, d, h, w]`, as `tokens` gives them.

    Returns:
        float32 `[n, D, H, W]` in (-1, 1).

    Raises:
        ValueError: another shape, numbers that are not of a type of whole ones, or tokens that there are not.
    """
    known, grids = facts(), np.asarray(grids)
    sides, codes = known['grid'], known['codes']
    fits = grids.dtype.kind in 'iu' and len(grids.shape) == 4 and grids.shape[1:] == tuple(sides) and len(grids)
    if not fits or grids.min() < 0 or grids.max() >= codes:
        shape = ', '.join(map(str, ('n', *sides)))
        raise ValueError(f'expected tokens as whole numbers from 0 to {codes - 1}, shape ({shape}) with n from 1')
    grids = grids.astype(np.int32)
    return np.stack([np.asarray(_program('decode')(_weights('decode'), grid)) for grid in grids])


@functools.cache
def _program(name: str) -> Callable:
    """A program for the platform that JAX runs on; compiled at its first call."""
    return jax.jit(jax.export.deserialize(bytearray(_read(f'{name}.jaxexport'))).call)


@functools.cache
def _weights(name: str) -> dict[str, jax.Array]:
    """A program's weights, on the device."""
    weights, begin = {}, f'weights/{name}/'
    with zipfile.ZipFile(_FILE) as file:
        for member in file.namelist():
            if member.startswith(begin):
                with file.open(member) as stream:
                    array = np.lib.format.read_array(stream, allow_pickle=False)
                if array.dtype.kind == 'V':  # NumPy's files do not name this type
                    array = array.view(jax.numpy.bfloat16)
                weights[member.removeprefix(begin).removesuffix('.npy')] = jax.device_put(array)
    return weights


def _read(member: str) -> bytes:
    with zipfile.ZipFile(_FILE) as file:
        return file.read(member)
