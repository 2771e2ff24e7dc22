"""What is kept, what comes back, and what happens to damaged checkpoints."""

import json
import shutil
import sys
import types

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from jax.experimental import multihost_utils
from jax.sharding import NamedSharding, PartitionSpec
from toy_task import ToyState

from vqroi_jax import workdir as workdirs
from vqroi_jax.errors import InputError
from vqroi_jax.training.checkpoints import (
    Checkpoints,
    best_step,
    checkpoint_bytes,
    read_checkpoint,
    saved_steps,
)

RESUME = """
import sys
from pathlib import Path
import jax, ml_collections
import jax.numpy as jnp
from jax.experimental import multihost_utils
from vqroi_jax import hosts
from vqroi_jax.training import partitioning
from vqroi_jax.training.checkpoints import Checkpoints

folder = Path(sys.argv[1])
hosts.join(sys.argv[2].removeprefix('--hosts='), 'vqgan')
mesh = partitioning.make_mesh({'fsdp': -1})
training = ml_collections.ConfigDict({'keep_last': 2, 'keep_best': 0, 'best_metric': 'val/l1', 'best_mode': 'min'})

def make(step):
    return partitioning.create(lambda: {'w': jax.random.uniform(jax.random.key(step), (2**16,))}, mesh)

with Checkpoints(folder, training) as checkpoints:
    for step in (1, 2):
        checkpoints.save(step, make(step), {'step': step}, {})
multihost_utils.sync_global_devices('saved')
if jax.process_index() == 1:
    array = max((folder / 'checkpoints/2/state/ocdbt.process_1/d').iterdir(), key=lambda path: path.stat().st_size)
    array.write_bytes(array.read_bytes()[:100])
multihost_utils.sync_global_devices('damaged')
with Checkpoints(folder, training) as checkpoints:
    state, loop, problems = checkpoints.restore(make(0))
    assert bool(jnp.all(state['w'] == make(loop['step'])['w']))
    print(f"step {loop['step']}:", *problems)
"""

TRAINING = ml_collections.ConfigDict({'keep_last': 2, 'keep_best': 1, 'best_metric': 'val/l1', 'best_mode': 'min'})


def make_state(step, size=4096):
    """A state with sharded and replicated arrays, two types and an optimiser's named tuples; no two values equal."""
    mesh = jax.make_mesh((8,), ('data',), axis_types=(jax.sharding.AxisType.Auto,))
    kernel = jax.device_put(jnp.arange(size * 4.0).reshape(size, 4) + step, NamedSharding(mesh, PartitionSpec('data')))
    half = jax.device_put(jnp.linspace(0, step, 5, dtype=jnp.bfloat16), NamedSharding(mesh, PartitionSpec()))
    params = {'encoder': {'kernel': kernel}, 'half': half}
    return ToyState(jax.device_put(jnp.int32(step), half.sharding), params, optax.adam(1e-3).init(params))


def save(folder, *steps, training=TRAINING, scores=None):
    with Checkpoints(folder, training) as checkpoints:
        for step in steps:
            metrics = {'val/l1': scores[step]} if scores and step in scores else {}
            checkpoints.save(step, make_state(step), {'iterator': {'next': step}, 'sum': step / 3}, metrics)


def assert_same(state, other):
    assert jax.tree.structure(state) == jax.tree.structure(other)
    for here, there in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        assert here.dtype == there.dtype
        assert here.sharding == there.sharding
        np.testing.assert_array_equal(np.asarray(here), np.asarray(there))


def test_restores_the_newest_to_the_bit_with_its_shardings(tmp_path):
    save(tmp_path, 1, 2)
    with Checkpoints(tmp_path, TRAINING) as checkpoints:
        state, loop, problems = checkpoints.restore(make_state(0))
    assert_same(state, make_state(2))
    assert loop == {'iterator': {'next': 2}, 'sum': 2 / 3}
    assert problems == []


def test_a_new_run_has_nothing_to_restore(tmp_path):
    with Checkpoints(tmp_path, TRAINING) as checkpoints:
        assert checkpoints.restore(make_state(0)) is None


def test_what_is_saved_is_the_state_at_the_call_even_if_it_is_donated_next(tmp_path):
    state = make_state(1, size=1 << 16)
    expected = np.asarray(state.params['encoder']['kernel']).copy()
    add = jax.jit(lambda s: jax.tree.map(lambda x: x + 1, s), donate_argnums=0)
    with Checkpoints(tmp_path, TRAINING) as checkpoints:
        checkpoints.save(1, state, {}, {})
        for _ in range(5):
            state = add(state)
    _, stored = read_checkpoint(tmp_path, ['params'])
    np.testing.assert_array_equal(stored['params']['encoder']['kernel'], expected)


@pytest.mark.parametrize(('mode', 'best'), [('min', 2), ('max', 1)])
def test_keeps_the_last_and_the_best_also_across_a_resume(tmp_path, mode, best):
    training = ml_collections.ConfigDict({**TRAINING, 'best_mode': mode})
    scores = {1: 0.9, 2: 0.1, 3: 0.3, 4: 0.5, 5: float('nan')}
    save(tmp_path, 1, 2, 3, training=training, scores=scores)
    save(tmp_path, 4, 5, 6, training=training, scores=scores)
    assert saved_steps(tmp_path) == [best, 5, 6]


def test_keeps_no_more_than_the_last_where_no_best_is_wanted(tmp_path):
    training = ml_collections.ConfigDict({**TRAINING, 'keep_best': 0})
    save(tmp_path, 1, 2, 3, 4, training=training, scores={1: 0.1})
    assert saved_steps(tmp_path) == [3, 4]


def arrays(checkpoint):
    """The file that holds most of the arrays."""
    return max(checkpoint.glob('state/ocdbt.process_0/d/*'), key=lambda path: path.stat().st_size)


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


DAMAGE = {
    'half of an array': lambda checkpoint: half(arrays(checkpoint)),
    'no arrays': lambda checkpoint: shutil.rmtree(checkpoint / 'state'),
    'half of the description': lambda checkpoint: half(checkpoint / 'state' / '_METADATA'),
    'no index': lambda checkpoint: (checkpoint / 'state' / 'manifest.ocdbt').unlink(),
    'half of the iterator': lambda checkpoint: half(checkpoint / 'loop' / 'metadata'),
    'no iterator': lambda checkpoint: shutil.rmtree(checkpoint / 'loop'),
    'empty metrics': lambda checkpoint: (checkpoint / 'metrics' / 'metrics').write_text(''),
    'an empty folder': lambda checkpoint: (shutil.rmtree(checkpoint), checkpoint.mkdir()),
}


@pytest.mark.parametrize('damage', DAMAGE)
def test_falls_back_to_the_one_before_a_damaged_one_and_says_so(tmp_path, damage):
    save(tmp_path, 1, 2)
    DAMAGE[damage](tmp_path / 'checkpoints' / '2')
    with Checkpoints(tmp_path, TRAINING) as checkpoints:
        state, loop, problems = checkpoints.restore(make_state(0))
        assert_same(state, make_state(1))
        assert loop['iterator'] == {'next': 1}
        assert len(problems) == 1
        assert f'{tmp_path}/checkpoints/2 cannot be read' in problems[0]
        assert 'going on from step 1' in problems[0]
        checkpoints.save(2, make_state(2), {}, {})  # its step is free again
    assert saved_steps(tmp_path) == [1, 2]
    assert_same(Checkpoints(tmp_path, TRAINING).restore(make_state(0))[0], make_state(2))
    assert (tmp_path / 'checkpoints' / 'unreadable-2-0').is_dir()


def test_an_older_one_with_damaged_metrics_is_set_aside_too(tmp_path):
    """Orbax reads those of all when it is to choose which to keep, and would end the run at its next save."""
    save(tmp_path, 1, 2, 3, scores={1: 0.1, 2: 0.3, 3: 0.2})
    (tmp_path / 'config.json').write_text(json.dumps({'training': TRAINING.to_dict()}))
    DAMAGE['empty metrics'](tmp_path / 'checkpoints' / '1')
    with pytest.raises(InputError, match=rf'{tmp_path}/checkpoints/1 has damaged metrics .*; name the step of another'):
        best_step(tmp_path)
    with Checkpoints(tmp_path, TRAINING) as checkpoints:
        state, _, problems = checkpoints.restore(make_state(0))
        assert_same(state, make_state(3))
        assert [problem.partition(' (')[0] for problem in problems] == [
            f'checkpoint {tmp_path}/checkpoints/1 cannot be read'
        ]
        checkpoints.save(4, make_state(4), {}, {'val/l1': 0.4})
    assert saved_steps(tmp_path) == [3, 4]  # the last two, one of them the best
    assert best_step(tmp_path) == 3


def test_only_the_run_asks_whether_it_is_to_stop(tmp_path, monkeypatch):
    """JAX's service counts the questions of all processes, so that Orbax's would upset those of the run."""

    def asked(number):
        raise AssertionError(f'asked with the number {number}')

    monkeypatch.setattr(multihost_utils, 'reached_preemption_sync_point', asked)
    with pytest.raises(AssertionError, match='number 1'), ocp.CheckpointManager(tmp_path / 'theirs') as theirs:
        theirs.save(1, args=ocp.args.StandardSave(make_state(1)))
    save(tmp_path, 1, 2)
    assert saved_steps(tmp_path) == [1, 2]


def test_all_processes_go_back_where_one_cannot_read_its_part(tmp_path, several_processes):
    processes = several_processes([sys.executable, '-c', RESUME, str(tmp_path)], 2, devices=1)
    outputs = [process.communicate(timeout=300)[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    told = f'step 1: checkpoint {tmp_path}/checkpoints/2 cannot be read'
    assert all(told in output for output in outputs), outputs
    assert saved_steps(tmp_path) == [1]
    assert (tmp_path / 'checkpoints' / 'unreadable-2-0').is_dir()


def test_a_checkpoint_whose_writing_was_cut_off_is_not_one(tmp_path):
    save(tmp_path, 1, 2)
    folder = tmp_path / 'checkpoints'
    (folder / '2').rename(folder / '2.orbax-checkpoint-tmp')  # Orbax renames it so once all is written
    with Checkpoints(tmp_path, TRAINING) as checkpoints:
        assert int(checkpoints.restore(make_state(0))[0].step) == 1
        checkpoints.save(2, make_state(2), {}, {})
    assert saved_steps(tmp_path) == [1, 2]


def test_refuses_to_start_anew_where_no_checkpoint_can_be_read(tmp_path):
    save(tmp_path, 1, 2)
    for step in ('1', '2'):
        DAMAGE['half of an array'](tmp_path / 'checkpoints' / step)
    message = r'no checkpoint can be read \(steps 2, 1;'
    with Checkpoints(tmp_path, TRAINING) as checkpoints, pytest.raises(InputError, match=message):
        checkpoints.restore(make_state(0))
    assert saved_steps(tmp_path) == [1, 2]  # left as they are, for the user to look at


@pytest.mark.parametrize(
    ('other', 'message'),
    [
        (make_state, r"encoder/kernel is \(\(4096, 4\), 'float32'\) in it and \(\(64, 4\), 'float32'\) here"),
        (lambda step, size: make_state(step).replace(momentum=None), r'momentum/0/count is .* in it and absent here'),
    ],
)
def test_a_checkpoint_of_another_model_is_refused_with_the_array(tmp_path, other, message):
    save(tmp_path, 1)
    with Checkpoints(tmp_path, TRAINING) as checkpoints, pytest.raises(InputError, match=message):
        checkpoints.restore(other(0, size=64))


def test_no_space_is_told_before_writing(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs.shutil, 'disk_usage', lambda folder: types.SimpleNamespace(free=1))
    message = 'no disk space: the checkpoint of step 7 needs'
    with Checkpoints(tmp_path, TRAINING) as checkpoints, pytest.raises(InputError, match=message):
        checkpoints.save(7, make_state(7), {}, {})
    assert saved_steps(tmp_path) == []


def test_the_size_is_an_upper_bound_and_near(tmp_path):
    rng = np.random.default_rng(0)
    state = {'params': jnp.asarray(rng.normal(size=1 << 20), jnp.float32)}  # random numbers do not compress
    with Checkpoints(tmp_path, TRAINING) as checkpoints:
        checkpoints.save(1, state, {}, {})
    size = sum(path.stat().st_size for path in tmp_path.rglob('*') if path.is_file())
    assert 0.7 * checkpoint_bytes(state) < size <= checkpoint_bytes(state)


def test_later_stages_read_single_fields_without_the_devices(tmp_path):
    save(tmp_path, 1, 2, 3, scores={1: 0.1, 2: 0.3, 3: 0.2})
    config = ml_collections.ConfigDict({'training': TRAINING})
    (tmp_path / 'config.json').write_text(json.dumps(config.to_dict()))
    for wanted, step in (('latest', 3), ('best', 1), (2, 2)):
        found, fields = read_checkpoint(tmp_path, ['params', 'step'], wanted)
        assert found == step
        assert set(fields) == {'params', 'step'}
        expected = make_state(step)
        for here, there in zip(jax.tree.leaves(fields['params']), jax.tree.leaves(expected.params), strict=True):
            assert isinstance(here, np.ndarray)
            assert here.dtype == there.dtype
            np.testing.assert_array_equal(here, np.asarray(there))
        assert fields['step'] == step
    assert best_step(tmp_path) == 1


@pytest.mark.parametrize(
    ('fields', 'step', 'message'),
    [
        (['params'], 5, 'has no checkpoint of step 5; there are 1, 2'),
        (['parms'], 'latest', "has no 'parms'; there are momentum, params, step"),
        (['params'], 2, 'checkpoints/2 cannot be read'),
        (['params'], 'best', 'holds no run'),
    ],
)
def test_what_later_stages_cannot_have_is_told(tmp_path, fields, step, message):
    save(tmp_path, 1, 2)
    if step == 2:
        DAMAGE['half of an array'](tmp_path / 'checkpoints' / '2')
    with pytest.raises(InputError, match=message):
        read_checkpoint(tmp_path, fields, step)


def test_a_folder_without_checkpoints_is_told(tmp_path):
    with pytest.raises(InputError, match='holds no checkpoints'):
        read_checkpoint(tmp_path, ['params'])
