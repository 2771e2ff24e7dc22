"""The axes of the device mesh: what is split along which, and how networks keep it so.

    data, fsdp   rows of the batch; along fsdp, parameters are split too, and put together where they are used
    model        units of stage 2's layers
    spatial      depth slices of stage 1's volumes and feature maps

`vqroi_jax.training.partitioning` makes the mesh, and traces networks with it at hand; where there is none, as in a
function that is mapped over the devices, all of this does nothing.
"""

from collections.abc import Sequence

import jax
from jax.sharding import AxisType, PartitionSpec

AXES = ('data', 'fsdp', 'model', 'spatial')
BATCH = ('data', 'fsdp')
SPATIAL = 'spatial'

ROWS = PartitionSpec(BATCH)  # split along the first axis
VOLUMES = PartitionSpec(BATCH, SPATIAL)  # [B, D, ...], split along the first two

# How stage 2's weights are shared out along `model`, by the end of their name; attention heads and the MLP's units stay
# whole. For the last axes of an array: one more may come first, the layers.
RULES = {
    **{f'{name}/kernel': PartitionSpec(None, 'model') for name in ('query', 'key', 'value', 'up')},
    **{f'{name}/bias': PartitionSpec('model') for name in ('query', 'key', 'value', 'up')},
    **{f'{name}/kernel': PartitionSpec('model', None) for name in ('projection', 'down')},
    'token_embedding': PartitionSpec(None, 'model'),
    'position_embedding': PartitionSpec(None, 'model'),
    'head/kernel': PartitionSpec('model', None),
}


def model_split(name: str, dimensions: int) -> PartitionSpec:
    """How an array is split along `model`.

    Args:
        name: its path with slashes. Moments and averages, whose paths end in their parameter's, are split alike.
        dimensions: of the array.
    """
    for end, spec in RULES.items():
        if f'/{name}'.endswith(f'/{end}'):
            return PartitionSpec(*[None] * (dimensions - len(spec)), *spec)
    return PartitionSpec(*[None] * dimensions)


def parts(*names: str) -> int:
    """Devices along some axes of the mesh that is at hand, all together; 1 where there is none."""
    mesh, number = jax.sharding.get_abstract_mesh(), 1
    for name, size, kind in zip(mesh.axis_names, mesh.axis_sizes, mesh.axis_types or (), strict=True):
        if name in names and kind == AxisType.Auto:
            number *= size
    return number


def put_together(parameter: jax.Array, path: Sequence[str]) -> jax.Array:
    """A parameter that may be split along `fsdp`, without that split, for as long as it is used.

    Else the partitioner may split activations along channels instead of rows.

    Args:
        parameter: in the dtype that it is used in: the fewer bytes, the less is transferred.
        path: its name, as a module's `path` and the parameter's own.
    """
    if parts('fsdp') == 1:
        return parameter
    return jax.lax.with_sharding_constraint(parameter, model_split('/'.join(path), parameter.ndim))


def keep_rows(x: jax.Array) -> jax.Array:
    """Activations `[B, ...]` split by rows alone: whole along `model` and `spatial`."""
    return jax.lax.with_sharding_constraint(x, ROWS) if parts(*AXES) > 1 else x


def spread_images(images: jax.Array) -> jax.Array:
    """Images `[N, ...]` over all devices that share the batch or its volumes, if they divide evenly."""
    if parts(SPATIAL) == 1 or images.shape[0] % parts(*BATCH, SPATIAL):
        return images
    return jax.lax.with_sharding_constraint(images, PartitionSpec((*BATCH, SPATIAL)))
