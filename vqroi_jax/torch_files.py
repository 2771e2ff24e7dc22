"""Weights files that PyTorch has saved, as NumPy arrays by name; the one place that reads and writes them.

PyTorch itself is needed for that alone, and comes with the extra `convert`. Files are read with `weights_only=True`,
so that no file runs code.
"""

import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vqroi_jax.errors import InputError

_SHOWN = 5  # names in a message


def read(path: str | Path) -> dict[str, np.ndarray]:
    """Reads the tensors of a state dict.

    Args:
        path: file as `torch.save` writes it: a dict from names to tensors, or one that has such a dict as its
            `state_dict`. A prefix `module.` that all names have (of `torch.nn.DataParallel`) is left out.

    Returns:
        Arrays by name, in the file's order and dtypes (bfloat16 as float32).

    Raises:
        InputError: no such file, not a file of that kind, or PyTorch is not installed.
    """
    torch = _torch(path)
    if not Path(path).is_file():
        raise InputError(f'there is no weights file {path}')
    try:
        stored = torch.load(path, map_location='cpu', weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f'{path} is not a file of tensors that PyTorch has saved: {reason}') from None
    if isinstance(stored, Mapping) and isinstance(stored.get('state_dict'), Mapping):
        stored = stored['state_dict']
    if not isinstance(stored, Mapping) or not stored or not all(map(torch.is_tensor, stored.values())):
        raise InputError(f'{path} holds no state dict: expected names with tensors')
    prefix = 'module.' if all(name.startswith('module.') for name in stored) else ''
    return {name.removeprefix(prefix): _as_numpy(torch, tensor) for name, tensor in stored.items()}


def write(path: str | Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Writes arrays as a state dict that `torch.load` reads.

    Args:
        path: file to write.
        arrays: by name, in the order wanted.

    Raises:
        InputError: PyTorch is not installed.
    """
    torch = _torch(path)
    torch.save({name: torch.from_numpy(np.array(array)) for name, array in arrays.items()}, path)


def check(
    path: str | Path, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int, ...]], network: str
) -> None:
    """Refuses arrays that are not exactly those of a network.

    Args:
        path: of the file, for the message.
        arrays: what it holds.
        shapes: of what the network has, by name.
        network: what it is called, for the message.

    Raises:
        InputError: naming the arrays that are missing, too many, or of another shape.
    """
    faults = [f'has no {name}' for name in shapes if name not in arrays]
    faults += [f"has {name}, which is not the network's" for name in arrays if name not in shapes]
    faults += [
        f'{name} is {arrays[name].shape}, not {tuple(shape)}'
        for name, shape in shapes.items()
        if name in arrays and arrays[name].shape != tuple(shape)
    ]
    if faults:
        more = f'; and {len(faults) - _SHOWN} more' if len(faults) > _SHOWN else ''
        raise InputError(f'{path} does not fit {network}: {"; ".join(faults[:_SHOWN])}{more}')


def _torch(path: str | Path) -> Any:
    """The module, imported when it is needed: it takes seconds, and most commands do without."""
    try:
        import torch
    except ImportError:
        raise InputError(f'{path} is a file of PyTorch; to use it, pip install "vqroi_jax[convert]"') from None
    return torch


def _as_numpy(torch: Any, tensor: Any) -> np.ndarray:
    return (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
