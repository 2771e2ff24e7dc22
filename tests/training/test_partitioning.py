"""Meshes and batches: what fits, and where rows go."""

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from vqroi_jax.errors import InputError
from vqroi_jax.training import partitioning


def test_mesh_takes_all_devices_or_as_many_as_asked():
    assert partitioning.make_mesh(-1).devices.size == jax.device_count() == 8
    assert partitioning.make_mesh(3).shape == {'data': 3, 'model': 1}
    assert partitioning.make_mesh(-1, model=2).shape == {'data': 4, 'model': 2}


@pytest.mark.parametrize('devices', [0, 9, -2])
def test_mesh_that_does_not_fit_is_refused(devices):
    with pytest.raises(InputError, match=rf'config.mesh.data={devices}: there are 8 cpu devices'):
        partitioning.make_mesh(devices)


def test_mesh_with_shared_weights_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match=r'config.mesh.model=9: there are 8 cpu devices'):
        partitioning.make_mesh(-1, model=9)
    with pytest.raises(
        InputError, match=r'config.mesh.data=4: .* 4 of which share the weights; set it between 1 and 2'
    ):
        partitioning.make_mesh(4, model=4)


def test_arrays_are_split_by_the_end_of_their_name():
    mesh = partitioning.make_mesh(2, model=4)
    tree = {'params': {'query': {'kernel': np.zeros((3, 8))}, 'kernel': np.zeros(8)}, 'step': np.zeros(())}
    places = partitioning.shardings(tree, {'query/kernel': PartitionSpec(None, 'model')}, mesh)
    assert places['params']['query']['kernel'].shard_shape((3, 8)) == (3, 2)
    assert places['params']['kernel'].is_fully_replicated
    assert places['step'].is_fully_replicated


def test_batch_that_does_not_divide_is_refused_with_what_would():
    mesh = partitioning.make_mesh(4)
    partitioning.check_batch('batch_size', 16, 2, mesh)
    with pytest.raises(InputError, match=r'config.batch_size=12 does not divide .* choose 8 or 16'):
        partitioning.check_batch('batch_size', 12, 2, mesh)
    with pytest.raises(InputError, match=r'config.batch_size=3 .* choose 8,'):
        partitioning.check_batch('batch_size', 3, 2, mesh)
    with pytest.raises(InputError, match=r'config.micro_batches=0'):
        partitioning.check_batch('batch_size', 3, 0, mesh)


def test_rows_are_split_over_devices_in_order():
    mesh = partitioning.make_mesh(4)
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    placed = partitioning.put_batch({'rows': rows}, mesh)['rows']
    np.testing.assert_array_equal(placed, rows)
    for shard in placed.addressable_shards:
        assert shard.data.shape == (2, 3)


def test_micro_batches_take_rows_from_every_device_and_lose_none():
    mesh = partitioning.make_mesh(4)
    placed = partitioning.put_batch({'row': np.arange(16)}, mesh)
    parts = jax.jit(lambda batch: partitioning.micro_batches(batch, 2))(placed)['row']
    np.testing.assert_array_equal(parts, np.arange(16).reshape(8, 2).T)
