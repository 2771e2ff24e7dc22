"""Where arrays live: the device mesh, and the shardings of states and batches on it.

Batches are split over the mesh axis `data`; states are whole on every device. Everything is `jax.jit` over global
arrays (GSPMD), so a sum over the batch is a sum over all devices and hosts.
"""

from collections.abc import Mapping
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vqroi_jax.errors import InputError


def make_mesh(data: int) -> Mesh:
    """A mesh of this run's devices.

    Args:
        data: devices along the axis `data`; -1 takes all.

    Raises:
        InputError: there are fewer devices than asked for, or several hosts and not all devices in use.
    """
    devices = jax.devices()
    if data == -1:
        data = len(devices)
    if not 1 <= data <= len(devices):
        raise InputError(
            f'config.mesh.data={data}: there are {len(devices)} {devices[0].platform} devices; '
            f'set it between 1 and {len(devices)}, or to -1 for all'
        )
    if jax.process_count() > 1 and data != len(devices):
        raise InputError(
            f'config.mesh.data={data}: a run on several hosts uses all {len(devices)} devices; set it to -1'
        )
    return Mesh(np.asarray(devices[:data]), ('data',))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split along the first axis."""
    return NamedSharding(mesh, PartitionSpec('data'))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def check_batch(field: str, batch_size: int, micro_batches: int, mesh: Mesh) -> None:
    """Refuses a global batch that cannot be split evenly over devices and micro-batches.

    Args:
        field: of the config, for the message.
        batch_size: rows of the global batch.
        micro_batches: parts that it is computed in.
        mesh: of the run.

    Raises:
        InputError: naming the batch sizes that would do.
    """
    unit = mesh.devices.size * micro_batches
    if micro_batches < 1:
        raise InputError(f'config.micro_batches={micro_batches}: expected 1 or more')
    if batch_size < 1 or batch_size % unit:
        below, above = batch_size // unit * unit, max(-(-batch_size // unit), 1) * unit
        raise InputError(
            f'config.{field}={batch_size} does not divide by {mesh.devices.size} device(s) x {micro_batches} '
            f'micro-batch(es): choose {f"{below} or " if below > 0 else ""}{above}, or set config.mesh.data'
        )


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch to global arrays, split over `data`.

    Args:
        batch: arrays with this host's rows first axis; every host holds as many.
        mesh: whose axis `data` they are split over.
    """
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for name, rows in batch.items()}


def micro_batches(batch: Any, number: int) -> Any:
    """Splits the first axis of every array into `[number, rows / number]`, each device's rows evenly.

    Row r goes to micro-batch r % number, so that rows that lie on one device spread over all micro-batches.
    """
    return jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch)
