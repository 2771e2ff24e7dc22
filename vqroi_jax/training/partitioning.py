"""Where arrays live: the device mesh, and the shardings of states and batches on it.

Everything is `jax.jit` over global arrays (GSPMD), so a sum over the batch is a sum over all devices and hosts. The
mesh has four axes (`vqroi_jax.models.axes`): rows of a batch are split over `data` and `fsdp` together, depth slices of
volumes over `spatial`. States are split as well, by the rules below: along `model` by name, along `fsdp` by size.
"""

import functools
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vqroi_jax.errors import InputError
from vqroi_jax.models.axes import AXES, BATCH, ROWS, VOLUMES, model_split
from vqroi_jax.workdir import is_primary

# No parameters: every vector is compared with every code.
UNSPLIT = ('codebook/codes',)
STACKED = 'blocks'  # stage 2's layers, one after the other along the first axis, which the forward pass loops over
# Smallest array that is split along `fsdp`, in numbers. Putting a smaller one together takes as long as the latency of
# a transfer, whatever its size, and norms and biases, which are smaller, are under a thousandth of a network.
FSDP_SMALLEST = 2**14
GATHERED = 2**28  # bytes of an array that are whole on a device while it is brought to all hosts


def make_mesh(settings: Mapping[str, int], devices: Sequence[jax.Device] | None = None) -> Mesh:
    """The mesh of a config's block `mesh`, with all four axes; those that the block does not name have one device.

    Devices are taken host by host, the last axis (`spatial`) first, so that axes with much traffic stay within a host
    as long as it has the devices. Prints a note where an axis of -1 cannot take all that are left.

    Args:
        settings: devices along each axis; -1 in one of them takes all that are left.
        devices: to make it of, such as those of a described topology; None: all of this run.

    Raises:
        InputError: there are fewer devices than asked for, several hosts that were not joined or of which not all
            devices are in use, or hosts whose rows of the batch would overlap in part.
    """
    if devices is None and jax.process_count() > 1 and not jax.distributed.is_initialized():
        raise InputError(
            f'JAX sees the devices of {jax.process_count()} hosts, but this run was not told of the others: start the '
            'same command on each, with --hosts=auto or --hosts=ADDRESS:PORT,NUMBER,INDEX'
        )
    devices = sorted(
        jax.devices() if devices is None else devices, key=lambda device: (device.process_index, device.id)
    )
    kind = devices[0].platform
    there = f'there is one {kind} device' if len(devices) == 1 else f'there are {len(devices)} {kind} devices'
    sizes = {**dict.fromkeys(AXES, 1), **settings}
    filling = [axis for axis in AXES if sizes[axis] == -1]
    if len(filling) > 1:
        raise InputError(
            f'config.mesh.{filling[0]}=-1 and config.mesh.{filling[1]}=-1: one axis alone can take the rest'
        )
    left, inner = len(devices), ''
    for axis in [axis for axis in reversed(AXES) if axis not in filling]:
        if not 1 <= sizes[axis] <= left:
            raise InputError(
                f'config.mesh.{axis}={sizes[axis]}: {there}{inner}; set it '
                + (f'between 1 and {left}, or one axis to -1 for all that are left' if left > 1 else 'to 1')
            )
        left //= sizes[axis]
        inner += f', {sizes[axis]} along {axis}' if sizes[axis] > 1 else ''
    sizes |= dict.fromkeys(filling, left)
    used = math.prod(sizes.values())
    if devices[-1].process_index != devices[0].process_index and used != len(devices):
        asked = ', '.join(f'{axis} {sizes[axis]}' for axis in settings)
        raise InputError(
            f'config.mesh ({asked}): a run on several hosts uses all {len(devices)} devices; set config.mesh.data=-1'
        )
    if filling and used < len(devices) and is_primary():
        print(f'note: config.mesh.{filling[0]}=-1 makes {left} of it: {used} of {len(devices)} devices are used')
    mesh = Mesh(np.asarray(devices[:used]).reshape([sizes[axis] for axis in AXES]), AXES)
    _row_groups(mesh)
    return mesh


def row_parts(mesh: Mesh) -> int:
    """Into how many parts the rows of a batch are split."""
    return math.prod(mesh.shape[axis] for axis in BATCH)


@functools.lru_cache
def _row_groups(mesh: Mesh) -> dict[int, int]:
    """Which share of the rows each process reads: processes whose devices hold the same rows read the same ones."""
    rows: dict[int, set[int]] = {}
    for row, devices in enumerate(mesh.devices.reshape(row_parts(mesh), -1)):
        for device in devices:
            rows.setdefault(device.process_index, set()).add(row)
    groups = sorted({tuple(sorted(group)) for group in rows.values()})
    if len({len(group) for group in groups}) > 1 or sum(map(len, groups)) != row_parts(mesh):
        inner = mesh.size // row_parts(mesh)
        raise InputError(
            f'config.mesh: {inner} devices share each row of the batch (model and spatial), which neither divides the '
            f'{mesh.size // len(rows)} devices of a host nor is a multiple of them; choose other sizes'
        )
    return {process: groups.index(tuple(sorted(group))) for process, group in rows.items()}


def batch_sharding(mesh: Mesh) -> NamedSharding:
    """Split along the first axis."""
    return NamedSharding(mesh, ROWS)


def volume_sharding(mesh: Mesh) -> NamedSharding:
    """Of volumes `[B, D, H, W, 1]`: split along the first axis, and along depth where the mesh says so."""
    return NamedSharding(mesh, VOLUMES)


def replicated(mesh: Mesh) -> NamedSharding:
    """Whole on every device."""
    return NamedSharding(mesh, PartitionSpec())


def state_shardings(tree: Any, mesh: Mesh) -> Any:
    """Where each array of a state lives: the rules by name for `model`, and by size for `fsdp`.

    Along `fsdp` an array is split along its largest axis that divides and that `model` leaves (the last of equals).
    Whole stay arrays of fewer than `FSDP_SMALLEST` numbers (of one layer, where layers are stacked; they are never
    split along that axis), and those of which no axis divides.

    Args:
        tree: arrays or shapes: a state, or parameters alone.
        mesh: whose axes are used.
    """

    def place(path, leaf):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        spec = [*model_split(name, leaf.ndim)]
        own = range(STACKED in name.split('/'), leaf.ndim)  # axes of the array, or of one layer's
        free = [axis for axis in own if spec[axis] is None and leaf.shape[axis] % mesh.shape['fsdp'] == 0]
        large = math.prod(leaf.shape[axis] for axis in own) >= FSDP_SMALLEST
        if free and large and not name.endswith(UNSPLIT):
            spec[max(free, key=lambda axis: (leaf.shape[axis], axis))] = 'fsdp'
        return NamedSharding(mesh, PartitionSpec(*spec))

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


def placed_state(shapes: Any, mesh: Mesh) -> Any:
    """The shapes of a state, with the places where `create` puts its arrays."""
    return placed_shapes(shapes, state_shardings(shapes, mesh))


def shardings_table(state: Any, mesh: Mesh) -> str:
    """Where a state lives, as `--config.print_shardings=True` prints it.

    Args:
        state: a dataclass of arrays or of their shapes.
        mesh: of the run.

    Returns:
        A row for each array that is no optimiser's and no average's, which are split as their parameters; then, for
        every field, and in all, bytes on a device and in the whole run.
    """
    places, rows = state_shardings(state, mesh), []
    totals: dict[str, list[int]] = {}  # bytes on a device, and in the whole run
    for (path, leaf), place in zip(jax.tree.leaves_with_path(state), jax.tree.leaves(places), strict=True):
        name = jax.tree_util.keystr(path, simple=True, separator='/')
        field = name.partition('/')[0]
        own = math.prod(place.shard_shape(leaf.shape)) * leaf.dtype.itemsize
        total = totals.setdefault(field, [0, 0])
        total[0] += own
        total[1] += leaf.size * leaf.dtype.itemsize
        if not field.endswith(('optimizer', 'average')):
            split = ', '.join('-' if axis is None else axis for axis in place.spec)
            shape = ', '.join(map(str, leaf.shape))
            rows.append((name, f'({shape})', 'whole' if place.is_fully_replicated else split, f'{own:,}'))
    head = ('array', 'shape', 'split along', 'bytes a device')
    widths = [max(len(row[column]) for row in (head, *rows)) for column in range(4)]
    lines = [
        '  '.join(f'{cell:{width}}' for cell, width in zip(row[:3], widths, strict=False)) + f'  {row[3]:>{widths[3]}}'
        for row in (head, *rows)
    ]
    totals['in all'] = [sum(column) for column in zip(*totals.values(), strict=True)]
    sizes = ', '.join(f'{axis} {size}' for axis, size in mesh.shape.items())
    lines += ['', f'on {mesh.size} device(s): {sizes}']
    lines += [f'{field:{widths[0]}}  {own:>15,} bytes a device of {size:,}' for field, (own, size) in totals.items()]
    return '\n'.join(lines)


def traced_on(mesh: Mesh, function: Callable) -> Callable:
    """A function whose networks know the mesh when they are traced: for whatever is given to `jax.jit`."""

    @functools.wraps(function)
    def traced(*arguments):
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            return function(*arguments)

    return traced


def one_run_options(platform: str) -> dict[str, int] | None:
    """Compiler options of a program that runs once, such as one that draws initial values.

    On a CPU, optimising hundreds of random draws takes far longer than they do.
    """
    return {'xla_backend_optimization_level': 0} if platform == 'cpu' else None


def keep_barriers(platform: str) -> dict[str, str] | None:
    """Compiler options with which optimisation barriers hold on every platform.

    On a CPU, XLA takes them out before it merges equal computations and orders what is left. What a backward pass
    computes again (`model.remat`) would be merged with what the forward pass had, and kept, and what is to come in turn
    would come at any time. This leaves the barriers in.
    """
    return {'xla_disable_hlo_passes': 'cse_barrier_expander'} if platform == 'cpu' else None


def create(initial: Callable[[], Any], mesh: Mesh) -> Any:
    """A state that is created in parts, each where it will live; nothing is whole anywhere that need not be.

    Args:
        initial: makes the state; it is traced once.
        mesh: whose axes `model` and `fsdp` share the arrays out.
    """
    initial = jax.jit(initial)
    places = state_shardings(jax.eval_shape(initial), mesh)
    options = one_run_options(mesh.devices.flat[0].platform)
    return jax.jit(initial, out_shardings=places, compiler_options=options)()


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
    devices = row_parts(mesh)
    unit = devices * micro_batches
    if micro_batches < 1:
        raise InputError(f'config.micro_batches={micro_batches}: expected 1 or more')
    if batch_size < 1:
        raise InputError(f'config.{field}={batch_size}: expected 1 or more')
    if batch_size % unit:
        below, above = batch_size // unit * unit, -(-batch_size // unit) * unit
        raise InputError(
            f'config.{field}={batch_size} does not divide by {devices} device(s) x {micro_batches} '
            f'micro-batch(es): choose {f"{below} or " if below > 0 else ""}{above}, or change config.mesh'
        )


def even_rows(rows: int, mesh: Mesh) -> int:
    """The least number of rows, no fewer than those, that all devices get as many of."""
    parts = row_parts(mesh)
    return -(-rows // parts) * parts


class Process(TypedDict):
    """One of a run's processes, as `vqroi_jax.data.pipeline` takes it."""

    process_index: int
    process_count: int


def this_process(mesh: Mesh) -> Process:
    """Which share of a batch this process reads.

    Where `model` or `spatial` reach over several hosts, these read the same rows.
    """
    groups = _row_groups(mesh)
    return {'process_index': groups[jax.process_index()], 'process_count': len(set(groups.values()))}


def put_batch(batch: Mapping[str, np.ndarray], mesh: Mesh) -> dict[str, jax.Array]:
    """This host's rows of a batch to global arrays, split over the devices; `volume` along depth, too.

    Args:
        batch: arrays with this host's rows first axis; every host holds as many.
        mesh: that they are split over.
    """
    shares = this_process(mesh)['process_count']

    def put(name, rows):
        rows = np.asarray(rows)
        sharding = volume_sharding(mesh) if name == 'volume' else batch_sharding(mesh)
        return jax.make_array_from_process_local_data(sharding, rows, (len(rows) * shares, *rows.shape[1:]))

    return {name: put(name, rows) for name, rows in batch.items()}


def put_whole(tree: Any, mesh: Mesh) -> Any:
    """Arrays that every host has, whole on each of the mesh's devices.

    `jax.device_put` would do for one process; of several it compares theirs, in copies of all of them on each device.

    Args:
        tree: of NumPy arrays, or JAX's of one process.
        mesh: of the run.
    """

    def put(array: Any) -> jax.Array:
        array = np.asarray(array)
        return jax.make_array_from_callback(array.shape, replicated(mesh), array.__getitem__)

    return jax.tree.map(put, tree)


def put_rows(read: Callable[[int], np.ndarray], shape: tuple[int, ...], mesh: Mesh) -> jax.Array:
    """A global array, split over the devices, of which each process reads the rows of its own devices alone.

    Args:
        read: the row of a number.
        shape: of the array.
        mesh: that its rows are split over.
    """
    read = functools.cache(read)  # devices along `model` and `spatial` have the same rows

    def part(index: Any) -> np.ndarray:
        return np.stack([read(row) for row in range(*index[0].indices(shape[0]))])

    return jax.make_array_from_callback(shape, batch_sharding(mesh), part)


def on_each_device(function: Callable, mesh: Mesh) -> Callable:
    """Jits a function so that each device computes its own rows as if it were alone: with the same program and sizes.

    Args:
        function: of something that is whole on every device, and of arrays whose rows are split over the devices;
            returns such arrays.
        mesh: of the run; devices along `model` and `spatial` compute the same rows.

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

    @jax.jit
    def jitted(whole, arrays):
        mapped = jax.shard_map(
            lambda whole, arrays: function(whole, *arrays),
            mesh=mesh,
            in_specs=(PartitionSpec(), ROWS),
            out_specs=ROWS,
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
    """Arrays that are split over devices and hosts, as whole NumPy arrays on every host.

    From other hosts they come by way of the devices, where no more than `GATHERED` bytes of them are whole at a time.
    """
    return jax.tree.map(_gather, tree) if jax.process_count() > 1 else jax.device_get(tree)


def _gather(array: jax.Array) -> np.ndarray:
    rows = max(1, GATHERED * len(array) // max(array.nbytes, 1))
    parts = (array[start : start + rows] for start in range(0, len(array), rows))  # each when the one before is there
    return np.concatenate([multihost_utils.process_allgather(part, tiled=True) for part in parts])


def from_primary(numbers: np.ndarray) -> np.ndarray:
    """The primary process's numbers or truth values, on all processes of the run; each gives an array of that shape."""
    if jax.process_count() == 1:
        return numbers
    return np.asarray(multihost_utils.broadcast_one_to_all(np.asarray(numbers, np.int32)))


def everywhere(true: bool) -> bool:
    """Whether something holds on all processes of the run."""
    return true if jax.process_count() == 1 else bool(np.all(multihost_utils.process_allgather(np.asarray(true))))


def micro_batches(batch: Any, number: int) -> Any:
    """Splits the first axis of every array into `[number, rows / number]`, each device's rows evenly.

    Row r goes to micro-batch r % number, so that rows that lie on one device spread over all micro-batches.
    """
    return jax.tree.map(lambda x: x.reshape(-1, number, *x.shape[1:]).swapaxes(0, 1), batch)


def joined_micro_batches(parts: Any) -> Any:
    """Puts the rows of `micro_batches` back in their order: `[number, rows / number]` axes become one."""
    return jax.tree.map(lambda x: x.swapaxes(0, 1).reshape(-1, *x.shape[2:]), parts)
