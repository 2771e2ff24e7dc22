"""Weights files that PyTorch has saved, as NumPy arrays by name; the one place that reads and writes them.

PyTorch itself is needed for that alone, and comes with the extra `convert`. Files are read with `weights_only=True`,
so that no file runs code.
"""

import pickle
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from vqroi_jax.errors import InputError
from vqroi_jax.workdir import require_space

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
    torch, stored = _load(path)
    if isinstance(stored, Mapping) and isinstance(stored.get('state_dict'), Mapping):
        stored = stored['state_dict']
    if not isinstance(stored, Mapping) or not stored or not all(map(torch.is_tensor, stored.values())):
        raise InputError(f'{path} holds no state dict: expected names with tensors')
    prefix = 'module.' if all(name.startswith('module.') for name in stored) else ''
    return {
        name.removeprefix(prefix): (tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy()
        for name, tensor in stored.items()
    }


def read_contents(path: str | Path) -> Any:
    """Reads all that is in a file, as it is: what `write` writes back, to the bit.

    Args:
        path: file as `torch.save` writes it.

    Returns:
        Dicts, lists, tuples, numbers and texts as they were saved, tensors as arrays of their dtype.

    Raises:
        InputError: as `read`, or a tensor has a dtype that NumPy lacks.
    """
    torch, contents = _load(path)
    try:
        return _map(lambda value: value.detach().numpy() if torch.is_tensor(value) else value, contents)
    except (TypeError, RuntimeError) as error:
        raise InputError(f'{path} has tensors that cannot be read as they are: {error}') from None


def write(path: str | Path, contents: Any) -> None:
    """Writes a file that `torch.load` reads; whenever the process dies, it is there as a whole or as it was.

    Args:
        path: file to write.
        contents: arrays by name, or anything that `read_contents` returns; arrays become tensors.

    Raises:
        InputError: PyTorch is not installed, or the disk has no room.
    """
    torch, path, sizes = pytorch(f'write {path}'), Path(path), []

    def as_tensor(value: Any) -> Any:
        if not isinstance(value, np.ndarray):
            return value
        sizes.append(value.nbytes)
        return torch.from_numpy(np.array(value, order='C'))

    tensors = _map(as_tensor, contents)
    require_space(path.parent, sum(sizes), path.name)
    temporary = path.with_name(f'{path.name}.tmp')
    torch.save(tensors, temporary)
    temporary.replace(path)


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


def pytorch(purpose: str) -> Any:
    """The module, imported when it is needed: it takes seconds, and most commands do without.

    Args:
        purpose: what it is needed to do, for the message, such as 'read w.pth'.

    Raises:
        InputError: it is not installed.
    """
    try:
        import torch
    except ImportError:
        raise InputError(f'PyTorch is needed to {purpose}: pip install "vqroi_jax[convert]"') from None
    return torch


def _load(path: str | Path) -> tuple[Any, Any]:
    """PyTorch, and what it reads of a file."""
    path = Path(path).expanduser()
    if not path.is_file():
        raise InputError(f'there is no weights file {path}')
    torch = pytorch(f'read {path}')
    refusal = f'{path} is not a file of tensors that PyTorch has saved'
    try:
        return torch, torch.load(path, map_location='cpu', weights_only=True)
    except pickle.UnpicklingError:  # its text says how to let the file run code
        raise InputError(refusal) from None
    except (RuntimeError, EOFError, ValueError, KeyError) as error:
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise InputError(f'{refusal}: {reason}') from None


def _map(function: Callable[[Any], Any], contents: Any) -> Any:
    """Replaces everything that is no container."""
    if isinstance(contents, Mapping):
        return {name: _map(function, value) for name, value in contents.items()}
    if isinstance(contents, (list, tuple)):
        return type(contents)(_map(function, value) for value in contents)
    return function(contents)
