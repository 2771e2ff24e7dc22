"""Where arrays live: the device mesh, and the shardings of states and batches on it.

Batches are split over the mesh axis `data`, and are whole along `model`. States are whole on every device, but for the
arrays that a task's rules split along `model`. Everything is `jax.jit` over global arrays (GSPMD), so a sum over the
batch is a sum over all devices and hosts.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vqroi_jax.errors import InputError


def make_mesh(data: int, model: int = 1, devices: Sequence[jax.Device] | None = None) -> Mesh:
    """A mesh of this run's devices.

    Args:
        data: devices along the axis `data`; -1 takes all that are left.
        model: devices along the axis `model`.
        devices: to use; None: this run's. Those of a described machine serve to compile for it.

    Raises:
        InputError: there are fewer devices than asked for, or several hosts and not all devices in use.
    """
    devices = jax.devices() if devices is None else devices
    there = f'there are {len(devices)} {devices[0].platform} devices'
    if not 1 <= model <= len(devices):
        raise InputError(f'config.mesh.model={model}: {there}; set it between 1 and {len(devices)}')
    most = len(devices) // model
    if data == -1:
        data = most
    if not 1 <= data <= most:
        beside = f', {model} of which share the weights' if model > 1 else ''
        raise InputError(f'config.mesh.data={data}: {there}{beside}; set it between 1 and {most}, or to -1 for all')
    if jax.process_count() > 1 and data * model != len(devices):
        raise InputError(
            f'config.mesh.data={data}: a run on several hosts uses all {len(devices)} devices; set it to -1'
        )
    return Mesh(np.asarray(devices[: data * model]).reshape(data, model), ('data', 'model'))


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split along the first axis."""
    return NamedSharding(mesh, PartitionSpec('data'))


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def shardings(tree: Any, rules: Mapping[str, PartitionSpec], mesh: Mesh) -> Any:
    """Where each array of a state lives, by its name.

    Args:
        tree: arrays or shapes.
        rules: from the end of a name, such as 'query/kernel', to how the array is split; all others are whole. A
            name is the path in the tree with slashes, so moments in an optimiser's state are split as their parameter.
        mesh: whose axes the rules name.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        specs = [spec for end, spec in rules.items() if f'/{name}'.endswith(f'/{end}')]
        return NamedSharding(mesh, specs[0] if specs else PartitionSpec())

    return jax.tree_util.tree_map_with_path(place, tree)


def placed_shapes(shapes: Any, places: Any) -> Any:
    """`jax.ShapeDtypeStruct`s with shardings, to compile with where nothing may be allocated.

    Args:
        shapes: a tree of arrays or shapes.
        places: a sharding for all of them, or a tree of one for each.
    """
    if isinstance(places, NamedSharding):
        places = jax.tree.map(lambda _: places, shapes)
    return jax.tree.map(lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place), shapes, places)


def one_run_options(platform: str) -> dict[str, int] | None:
    """Compiler options of a program that runs once, such as one that draws initial values.

    On a CPU, optimising hundreds of random draws takes far longer than they do.
    """
    return {'xla_backend_optimization_level': 0} if platform == 'cpu' else None


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
    devices = mesh.shape['data']
    unit = devices * micro_batches
    if micro_batches < 1:
        raise InputError(f'config.micro_batches={micro_batches}: expected 1 or more')
    if batch_size < 1 or batch_size % unit:
        below, above = batch_size // unit * unit, max(-(-batch_size // unit), 1) * unit
        raise InputError(
            f'config.{field}={batch_size} does not divide by {devices} device(s) x {micro_batches} '
            f'micro-batch(es): choose {f"{below} or " if below > 0 else ""}{above}, or set config.mesh.data'
        )


class Process(TypedDict):
    """One of a run's processes, as `vqroi_jax.data.pipeline` takes it."""

    process_index: int
    process_count: int


def this_process() -> Process:
    """Which of the run's processes this is."""
    return {'process_index': jax.process_index(), 'process_count': jax.process_count()}


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch to global arrays, split over `data`.

    Args:
        batch: arrays with this host's rows first axis; every host holds as many.
        mesh: whose axis `data` they are split over.
    """
    sharding = batch_sharding(mesh)
    return {name: jax.make_array_from_process_local_data(sharding, np.asarray(rows)) for name, rows in batch.items()}


def on_each_device(function: Callable, mesh: Mesh) -> Callable:
    """Jits a function so that each device computes its own rows as if it were alone: with the same program and sizes.

    Args:
        function: of something that is whole on every device, and of arrays whose first axis is split over `data`;
            returns such arrays.
        mesh: of the run.

    Returns:
        The function of the former, placed already, and of NumPy arrays with all rows (the same on every host).
    """
    jitted, split = jit_on_each_device(function, mesh), batch_sharding(mesh)

    def call(whole, *arrays):
        placed = [jax.make_array_from_callback(a.shape, split, a.__getitem__) for a in arrays]
        return jitted(whole, tuple(placed))

    return call


def jit_on_each_device(function: Callable, mesh: Mesh) -> Callable:
    """The same, of what is whole and of a tuple of the arrays, all placed (or shapes, to be lowered with)."""
    rows = PartitionSpec('data')

    @jax.jit
    def jitted(whole, arrays):
        mapped = jax.shard_map(
            lambda whole, arrays: function(whole, *arrays),
            mesh=mesh,
            in_specs=(PartitionSpec(), rows),
            out_specs=rows,
            check_vma=False,  # the loops within begin with constants, which it takes for a mistake
        )
        return mapped(whole, arrays)

    return jitted


def in_batches(function: Callable, whole: Any, array: np.ndarray, rows: int) -> Iterator[Any]:
    """The results of a function of `on_each_device` for each row of an array, a batch in memory at a time.

    Args:
        function: of `whole` and of `rows` rows.
        whole: its first argument.
        array: `[n, ...]`; the last batch is filled up with copies of its last row.
        rows: that the function takes, a multiple of the devices.

    Yields:
        n times what the function returns, without the first axis, NumPy.
    """
    for start in range(0, len(array), rows):
        part = array[start : start + rows]
        padded = np.pad(part, [(0, rows - len(part)), *[(0, 0)] * (array.ndim - 1)], mode='edge')
        results = gather(function(whole, padded))
        for row in range(len(part)):
            yield jax.tree.map(lambda result, row=row: result[row], results)


def gather(tree: Any) -> Any:
    """Arrays that are split over devices and hosts, as whole NumPy arrays on every host."""
    if jax.process_count() > 1:
        return multihost_utils.process_allgather(tree, tiled=True)
    return jax.device_get(tree)


def micro_batches(batch: Any, number: int) -> Any:
    """Splits the first axis of every array into `[number, rows / number]`, each device's rows evenly.

    Row r goes to micro-batch r % number, so that rows that lie on one device spread over all micro-batches.
    """
    return jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch)
