"""Meshes and batches: what fits, and where rows go."""

import dataclasses
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqroi_jax.errors import InputError
from vqroi_jax.models import axes
from vqroi_jax.models.axes import AXES
from vqroi_jax.training import partitioning

CONFIGS = pathlib.Path(__file__).parents[2] / 'configs'


@dataclasses.dataclass(frozen=True)
class FakeDevice:
    """What a mesh asks of a device."""

    process_index: int
    id: int
    platform: str = 'tpu'
    device_kind: str = 'fake'


def hosts(number, devices):
    """Devices of several hosts, in no order."""
    return [FakeDevice(i // devices, i) for i in np.random.default_rng(0).permutation(number * devices).tolist()]


def sizes(mesh):
    return {axis: number for axis, number in mesh.shape.items() if number > 1}


def test_mesh_takes_all_devices_or_as_many_as_asked():
    assert partitioning.make_mesh({'data': -1}).devices.size == jax.device_count() == 8
    assert partitioning.make_mesh({'data': 3}).shape == {'data': 3, 'fsdp': 1, 'model': 1, 'spatial': 1}
    assert sizes(partitioning.make_mesh({'data': -1, 'model': 2})) == {'data': 4, 'model': 2}
    assert sizes(partitioning.make_mesh({'data': 2, 'fsdp': -1, 'spatial': 2})) == {'data': 2, 'fsdp': 2, 'spatial': 2}
    assert partitioning.make_mesh({'data': -1, 'fsdp': 8}).shape['data'] == 1
    assert sizes(partitioning.make_mesh({'fsdp': 2, 'spatial': -1}, jax.devices()[:6])) == {'fsdp': 2, 'spatial': 3}


def test_devices_that_nothing_uses_are_told(capsys, monkeypatch):
    assert partitioning.make_mesh({'data': -1, 'model': 3}).devices.size == 6
    assert capsys.readouterr().out == 'note: config.mesh.data=-1 makes 2 of it: 6 of 8 devices are used\n'
    partitioning.make_mesh({'data': -1, 'model': 2})
    monkeypatch.setattr(partitioning, 'is_primary', lambda: False)
    partitioning.make_mesh({'data': -1, 'model': 3})
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize('name', ['vqgan', 'transformer', 'classifier', 'generate'])
def test_configs_have_axes_of_the_mesh_alone(name):
    settings = runpy.run_path(str(CONFIGS / f'{name}.py'))['get_config']('smoke').mesh
    assert set(settings) <= set(AXES)
    assert sizes(partitioning.make_mesh(settings)) == {'data': 8}


@pytest.mark.parametrize('axis', ['data', 'fsdp', 'spatial'])
@pytest.mark.parametrize('devices', [0, 9, -2])
def test_mesh_that_does_not_fit_is_refused(devices, axis):
    with pytest.raises(InputError, match=rf'config.mesh.{axis}={devices}: there are 8 cpu devices; .* between 1 and 8'):
        partitioning.make_mesh({axis: devices})


def test_a_device_alone_is_told_in_the_singular():
    with pytest.raises(InputError, match=r'config.mesh.data=2: there is one cpu device; set it to 1$'):
        partitioning.make_mesh({'data': 2}, jax.devices()[:1])


def test_mesh_whose_axes_do_not_fit_together_is_refused():
    with pytest.raises(InputError, match=r'config.mesh.model=9: there are 8 cpu devices'):
        partitioning.make_mesh({'data': -1, 'model': 9})
    with pytest.raises(InputError, match=r'config.mesh.data=4: .* devices, 4 along model; set it between 1 and 2'):
        partitioning.make_mesh({'data': 4, 'model': 4})
    with pytest.raises(InputError, match=r'config.mesh.data=-1 and config.mesh.fsdp=-1: one axis alone'):
        partitioning.make_mesh({'data': -1, 'fsdp': -1})


def test_inner_axes_lie_within_a_host_and_hosts_read_rows_in_their_order():
    mesh = partitioning.make_mesh({'data': -1, 'spatial': 4}, hosts(2, 8))
    assert sizes(mesh) == {'data': 4, 'spatial': 4}
    for part in mesh.devices.reshape(4, 4):
        assert len({device.process_index for device in part}) == 1
    assert partitioning._row_groups(mesh) == {0: 0, 1: 1}
    # A volume that reaches over two hosts: both read it, and the other two the rest of the batch.
    assert partitioning._row_groups(partitioning.make_mesh({'spatial': 8, 'data': 2}, hosts(4, 4))) == {
        0: 0, 1: 0, 2: 1, 3: 1,
    }  # fmt: skip
    assert set(partitioning._row_groups(partitioning.make_mesh({'model': 8}, hosts(2, 4))).values()) == {0}


def test_several_hosts_use_all_devices_and_share_no_row_in_part():
    with pytest.raises(InputError, match=r'config.mesh \(data 3\): a run on several hosts uses all 8 devices'):
        partitioning.make_mesh({'data': 3}, hosts(2, 4))
    with pytest.raises(InputError, match=r'config.mesh: 4 devices share each row .* the 6 devices of a host'):
        partitioning.make_mesh({'data': 3, 'model': 4}, hosts(2, 6))


def test_devices_of_hosts_that_were_not_joined_are_refused(monkeypatch):
    monkeypatch.setattr(jax, 'process_count', lambda: 4)
    with pytest.raises(InputError, match=r'JAX sees the devices of 4 hosts.*--hosts=auto'):
        partitioning.make_mesh({'data': 1})


def test_rows_are_read_where_they_are_needed_and_once():
    read = []
    mesh = partitioning.make_mesh({'data': 2, 'spatial': 4})
    rows = partitioning.put_rows(lambda row: read.append(row) or np.full(3, row, np.float32), (4, 3), mesh)
    np.testing.assert_array_equal(rows, np.arange(4)[:, None] * np.ones(3))
    assert sorted(read) == [0, 1, 2, 3]
    assert rows.sharding.is_equivalent_to(partitioning.batch_sharding(mesh), 2)


def test_arrays_are_split_by_name_along_model_and_by_size_along_fsdp(monkeypatch):
    monkeypatch.setattr(partitioning, 'FSDP_SMALLEST', 30)
    mesh = partitioning.make_mesh({'data': 2, 'fsdp': 2, 'model': 2})
    shapes = {
        'params': {
            'blocks': {
                'query': {'kernel': (6, 4, 8), 'bias': (6, 8)},
                'down': {'kernel': (6, 16, 4)},
                'norm_1': {'scale': (100, 8)},
                'up': {'kernel': (6, 5, 8)},
            },
            'kernel': (4, 4, 4),
            'odd': (7, 5),
            'small': (29,),
            'wide': (2, 40),
        },
        'codebook': {'codes': (40, 40)},
        'moments': [{'blocks': {'query': {'kernel': (6, 4, 8)}}}],
        'step': (),
    }
    tree = jax.tree.map(
        lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32), shapes, is_leaf=lambda x: type(x) is tuple
    )
    places = jax.tree.map(lambda place: tuple(place.spec), partitioning.state_shardings(tree, mesh))
    assert places == {
        'params': {
            'blocks': {
                'query': {'kernel': (None, 'fsdp', 'model'), 'bias': (None, 'model')},
                'down': {'kernel': (None, 'model', 'fsdp')},
                'norm_1': {'scale': (None, None)},  # small in each layer
                'up': {'kernel': (None, None, 'model')},  # 5 does not divide, and layers are never split
            },
            'kernel': (None, None, 'fsdp'),
            'odd': (None, None),
            'small': (None,),
            'wide': (None, 'fsdp'),
        },
        'codebook': {'codes': (None, None)},
        'moments': [{'blocks': {'query': {'kernel': (None, 'fsdp', 'model')}}}],
        'step': (),
    }


def test_batch_that_does_not_divide_is_refused_with_what_would():
    mesh = partitioning.make_mesh({'data': 4})
    partitioning.check_batch('batch_size', 16, 2, mesh)
    with pytest.raises(InputError, match=r'config.batch_size=12 does not divide .* choose 8 or 16'):
        partitioning.check_batch('batch_size', 12, 2, mesh)
    with pytest.raises(InputError, match=r'config.batch_size=3 .* choose 8,'):
        partitioning.check_batch('batch_size', 3, 2, mesh)
    with pytest.raises(InputError, match=r'config.micro_batches=0'):
        partitioning.check_batch('batch_size', 3, 0, mesh)
    with pytest.raises(InputError, match=r'config.batch_size=0: expected 1 or more'):
        partitioning.check_batch('batch_size', 0, 1, mesh)


def test_what_only_looks_takes_a_few_rows_more_where_devices_do_not_divide_them():
    mesh = partitioning.make_mesh({'data': 2, 'fsdp': 2, 'model': 2})
    assert [partitioning.even_rows(rows, mesh) for rows in (1, 3, 4, 5)] == [4, 4, 4, 8]


def test_rows_of_micro_batches_come_back_in_their_order():
    rows = {'tokens': np.arange(24).reshape(8, 3)}
    parts = partitioning.micro_batches(rows, 4)
    assert parts['tokens'][0, :, 0].tolist() == [0, 12]  # rows 0 and 4
    np.testing.assert_array_equal(partitioning.joined_micro_batches(parts)['tokens'], rows['tokens'])


def test_what_is_put_whole_is_on_every_device_as_it_was():
    mesh = partitioning.make_mesh({'data': 4, 'model': 2})
    arrays = {'kernel': np.arange(6.0, dtype=np.float32).reshape(2, 3), 'seed': np.uint32(7), 'ours': jnp.ones(3)}
    placed = partitioning.put_whole(arrays, mesh)
    for name, array in placed.items():
        assert array.dtype == arrays[name].dtype
        assert len(array.addressable_shards) == 8
        for shard in array.addressable_shards:
            np.testing.assert_array_equal(shard.data, arrays[name])


def test_rows_are_split_over_devices_in_order_and_volumes_by_depth_too():
    mesh = partitioning.make_mesh({'data': 2, 'fsdp': 2, 'spatial': 2})
    rows = np.arange(24, dtype=np.float32).reshape(8, 3)
    volume = np.arange(8 * 4 * 2 * 2, dtype=np.float32).reshape(8, 4, 2, 2, 1)
    placed = partitioning.put_batch({'rows': rows, 'volume': volume}, mesh)
    np.testing.assert_array_equal(placed['rows'], rows)
    np.testing.assert_array_equal(placed['volume'], volume)
    assert {shard.data.shape for shard in placed['rows'].addressable_shards} == {(2, 3)}
    assert {shard.data.shape for shard in placed['volume'].addressable_shards} == {(2, 2, 2, 2, 1)}


def test_a_function_mapped_over_devices_sees_no_mesh_and_its_own_rows():
    mesh = partitioning.make_mesh({'data': 2, 'fsdp': 2, 'spatial': 2})
    seen = []

    def own(whole, rows):
        seen.append((axes.parts(*AXES), rows.shape))
        return whole * axes.keep_rows(rows)

    rows = np.arange(12, dtype=np.float32).reshape(4, 3)
    result = partitioning.gather(partitioning.on_each_device(own, mesh)(jnp.float32(2), rows))
    np.testing.assert_array_equal(result, 2 * rows)
    assert set(seen) == {(1, (1, 3))}


def test_micro_batches_take_rows_from_every_device_and_lose_none():
    mesh = partitioning.make_mesh({'data': 4})
    placed = partitioning.put_batch({'row': np.arange(16)}, mesh)
    parts = jax.jit(lambda batch: partitioning.micro_batches(batch, 2))(placed)['row']
    np.testing.assert_array_equal(parts, np.arange(16).reshape(8, 2).T)
