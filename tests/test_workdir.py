"""The workdir: one process at a time, one config for good, room on the disk."""

import errno
import json
import os
import subprocess
import sys
import types
from pathlib import Path

import ml_collections
import pytest

from vqroi_jax import workdir as workdirs
from vqroi_jax.errors import InputError
from vqroi_jax.workdir import open_workdir, read_config, require_space, write_atomically

HOLD = """
import sys, ml_collections
from vqroi_jax.workdir import open_workdir
with open_workdir(sys.argv[1], ml_collections.ConfigDict({'task': 'prepare'})):
    print('held', flush=True)
    sys.stdin.read()
"""

COMPILE = """
import sys, jax, ml_collections
from vqroi_jax.workdir import open_workdir
hits = []
jax.monitoring.register_event_listener(lambda event, **_: hits.append(event) if event.endswith('/cache_hits') else None)
with open_workdir(sys.argv[1], ml_collections.ConfigDict({'task': 'prepare'})):
    with open_workdir(sys.argv[1] + '/stage', ml_collections.ConfigDict({'task': 'prepare'})):
        jax.jit(lambda x: x * 3)(2.0)
jax.jit(lambda x: x * 5)(2.0)
print(len(hits))
"""


def make_config(**changes):
    config = ml_collections.ConfigDict(
        {'task': 'prepare', 'data': {'roi_size': (32, 32, 32), 'classes': (), 'split': {'val': 0.1}}, 'seed': 0}
    )
    config.update_from_flattened_dict(changes)
    return config


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*') if path.is_file()}


def test_makes_the_folder_and_records_the_config(tmp_path):
    with open_workdir(tmp_path / 'runs' / 'first', make_config()) as folder:
        assert folder == tmp_path / 'runs' / 'first'
    text = (folder / 'config.json').read_text()
    assert json.loads(text) == {
        'task': 'prepare',
        'seed': 0,
        'data': {'roi_size': [32] * 3, 'classes': [], 'split': {'val': 0.1}},
    }
    assert text.index('"data"') < text.index('"seed"') < text.index('"task"')  # sorted, a field a line
    assert '\n  "seed": 0,\n' in text


def test_what_is_recorded_is_read_as_it_was_types_included(tmp_path):
    config = make_config(**{'data.classes': ('LGG', 'HGG')})
    with open_workdir(tmp_path, config) as folder:
        assert read_config(folder).to_dict() == config.to_dict()
        assert isinstance(read_config(folder).data.roi_size, tuple)
        with pytest.raises(AttributeError):
            read_config(folder).data.rio_size  # noqa: B018


def test_the_same_config_opens_it_again_and_changes_nothing(tmp_path):
    with open_workdir(tmp_path, make_config()):
        pass
    before = (tmp_path / 'config.json').read_bytes()
    with open_workdir(tmp_path, make_config()):
        pass
    assert (tmp_path / 'config.json').read_bytes() == before


def test_another_config_is_refused_field_by_field_and_nothing_is_touched(tmp_path):
    with open_workdir(tmp_path, make_config()):
        pass
    before = contents(tmp_path)
    other = make_config(**{'data.roi_size': (64, 64, 64), 'seed': 1})
    other.added = 'new'
    with pytest.raises(InputError) as caught, open_workdir(tmp_path, other):
        pass
    message = str(caught.value)
    assert "added absent there, 'new' now" in message
    assert 'data.roi_size (32, 32, 32) there, (64, 64, 64) now' in message
    assert 'seed 0 there, 1 now' in message
    assert 'task' not in message
    assert '\n' not in message
    del before[Path('.lock')]
    after = contents(tmp_path)
    del after[Path('.lock')]
    assert after == before


def test_fields_that_are_free_may_change_and_are_recorded(tmp_path):
    with open_workdir(tmp_path, make_config()):
        pass
    with open_workdir(tmp_path, make_config(seed=1), free=('seed',)):
        assert read_config(tmp_path).seed == 1
    with pytest.raises(InputError, match='seed 1 there, 0 now'), open_workdir(tmp_path, make_config()):
        pass


def test_of_many_differences_the_first_are_shown_and_the_rest_counted(tmp_path):
    with open_workdir(tmp_path, ml_collections.ConfigDict({f'field{number:02d}': 0 for number in range(30)})):
        pass
    other = ml_collections.ConfigDict({f'field{number:02d}': 1 for number in range(30)})
    with pytest.raises(InputError, match='field07 0 there, 1 now; and 22 more'), open_workdir(tmp_path, other):
        pass


def test_whole_and_other_numbers_of_the_same_value_are_the_same(tmp_path):
    """JSON writes 1.0 as 1.0 and 1 as 1; as settings they do not differ."""
    with open_workdir(tmp_path, make_config(**{'data.split.val': 1.0})):
        pass
    with open_workdir(tmp_path, make_config(**{'data.split.val': 1})):
        pass


def test_a_run_may_go_on_computed_otherwise_and_what_is_shown_of_it_is_not_recorded(tmp_path):
    config = make_config()
    config.mesh = ml_collections.ConfigDict({'data': -1, 'fsdp': 1})
    config.model = ml_collections.ConfigDict({'remat': 'none'})
    config.micro_batches, config.print_shardings = 1, True
    with open_workdir(tmp_path, config):
        pass
    assert not (tmp_path / 'config.json').exists()
    config.print_shardings = False
    with open_workdir(tmp_path, config):
        (tmp_path / 'result').touch()
    config.mesh.fsdp, config.print_shardings = 8, True
    config.model.remat, config.micro_batches = 'blocks', 2
    with open_workdir(tmp_path, config):
        pass
    assert read_config(tmp_path).mesh.fsdp == 1
    assert not read_config(tmp_path).print_shardings


def test_a_damaged_config_is_told(tmp_path):
    (tmp_path / 'config.json').write_text('{"task": "pre')
    with pytest.raises(InputError, match=r'config\.json is damaged'), open_workdir(tmp_path, make_config()):
        pass


def test_a_folder_without_a_run_has_no_config(tmp_path):
    with pytest.raises(InputError, match='holds no run'):
        read_config(tmp_path)


def test_a_run_that_failed_before_it_could_go_on_from_anything_gives_its_folder_back(tmp_path):
    def fail(config, left, **settings):
        (tmp_path / left).parent.mkdir(exist_ok=True)
        (tmp_path / left).touch()
        with pytest.raises(RuntimeError, match='memory'), open_workdir(tmp_path, config, **settings):
            raise RuntimeError('out of memory')

    fail(make_config(), 'cohort/cohort.json')
    fail(make_config(seed=1), 'figures/masking.png', goes_on_from='checkpoints')
    fail(make_config(seed=2), 'checkpoints/5', goes_on_from='checkpoints')
    with pytest.raises(InputError, match='seed 2 there'), open_workdir(tmp_path, make_config(), (), 'checkpoints'):
        pass
    assert read_config(tmp_path).seed == 2
    (tmp_path / 'checkpoints' / '5').unlink()
    fail(make_config(seed=2), 'figures/masking.png')  # what any other run has left is its own
    with pytest.raises(InputError, match='seed 2 there'), open_workdir(tmp_path, make_config()):
        pass


def test_a_file_system_without_locks_is_told(tmp_path, monkeypatch):
    def refuse(file, operation):
        raise OSError(errno.ENOSYS, 'Function not implemented')

    monkeypatch.setattr(workdirs.fcntl, 'flock', refuse)
    message = r'its file system locks no files \(Function not implemented\)'
    with pytest.raises(InputError, match=message), open_workdir(tmp_path, make_config()):
        pass


def test_a_second_process_is_refused_until_the_first_has_ended(tmp_path):
    command = [sys.executable, '-c', HOLD, tmp_path]
    config = ml_collections.ConfigDict({'task': 'prepare'})
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline() == 'held\n'
        message = f'is in use by process {holder.pid} on .*; wait for it to end'
        with pytest.raises(InputError, match=message), open_workdir(tmp_path, config):
            pass
        holder.kill()  # no clean end is needed to free it
        holder.wait()
    with open_workdir(tmp_path, config):
        assert f'process {os.getpid()} on ' in (tmp_path / '.lock').read_text()


def test_other_processes_of_the_same_run_neither_lock_nor_write(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs, 'is_primary', lambda: False)
    with open_workdir(tmp_path, make_config()), open_workdir(tmp_path, make_config()) as folder:
        assert list(folder.iterdir()) == []


def test_a_file_is_no_workdir(tmp_path):
    (tmp_path / 'file').write_text('')
    for path in (tmp_path / 'file', tmp_path / 'file' / 'run'):
        with pytest.raises(InputError, match='cannot be written to'), open_workdir(path, make_config()):
            pass


def test_a_folder_that_may_not_be_written_is_told(tmp_path, monkeypatch):
    def refuse(*arguments, **unused):
        raise PermissionError(13, 'Permission denied')

    monkeypatch.setattr('builtins.open', refuse)
    message = r'cannot be written to \(Permission denied\)'
    with pytest.raises(InputError, match=message), open_workdir(tmp_path, make_config()):
        pass


@pytest.mark.parametrize('field', ['data.path', 'real', 'fake'])
def test_the_folder_of_the_data_is_no_workdir(field, tmp_path, monkeypatch):
    config = make_config()
    config.data.path = config.real = config.fake = ''
    monkeypatch.setenv('HOME', str(tmp_path))
    config.update_from_flattened_dict({field: '~/data'})
    (tmp_path / 'data').mkdir()
    (tmp_path / 'link').symlink_to(tmp_path / 'data')
    for path in (tmp_path / 'data', tmp_path / 'link'):
        message = rf'^--workdir={path} is the folder of data that config\.{field} names; name another'
        with pytest.raises(InputError, match=message), open_workdir(path, config):
            pass
    assert not list((tmp_path / 'data').iterdir())
    with open_workdir(tmp_path / 'data' / 'run', config):
        pass


def test_a_bucket_is_told_to_be_mounted():
    with pytest.raises(InputError, match='a local or mounted folder'), open_workdir('gs://bucket/run', make_config()):
        pass


def test_errors_inside_are_not_taken_for_the_folders(tmp_path):
    with pytest.raises(FileNotFoundError), open_workdir(tmp_path, make_config()):
        raise FileNotFoundError('something of the task')


def test_space_is_required_in_bytes(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs.shutil, 'disk_usage', lambda folder: types.SimpleNamespace(free=3 * 2**30))
    require_space(tmp_path, 3 * 2**30, 'the run')
    with pytest.raises(InputError, match=r'no disk space: the run needs 3\.00 GiB and .* has 3\.00 GiB left'):
        require_space(tmp_path, 3 * 2**30 + 1, 'the run')


def test_an_interrupted_write_leaves_the_old_text(tmp_path, monkeypatch):
    path = tmp_path / 'new' / 'file.json'
    write_atomically(path, 'old')
    assert path.read_text() == 'old'
    write_atomically(path, b'\xff')
    assert path.read_bytes() == b'\xff'
    write_atomically(path, 'old')

    def die(descriptor):
        raise OSError('the disk is full')

    monkeypatch.setattr(workdirs.os, 'fsync', die)
    with pytest.raises(OSError, match='full'):
        write_atomically(path, 'new')
    assert path.read_text() == 'old'
    assert list(path.parent.iterdir()) == [path]


def test_a_run_that_left_nothing_may_be_mended(tmp_path):
    with pytest.raises(InputError, match='faulty'), open_workdir(tmp_path, make_config()):
        raise InputError('faulty')
    other = make_config(seed=1)
    with pytest.raises(InputError, match='later'), open_workdir(tmp_path, other):
        raise_later(tmp_path / 'result')
    with pytest.raises(InputError, match='another config'), open_workdir(tmp_path, make_config()):
        pass


def test_a_run_that_was_cut_off_before_it_left_anything_may_be_mended(tmp_path):
    for error in (RuntimeError, KeyboardInterrupt):
        with pytest.raises(error), open_workdir(tmp_path, make_config()):
            raise error
        assert not (tmp_path / 'config.json').exists()


def test_prepared_rois_alone_are_no_run(tmp_path):
    config = make_config()
    config.print_shardings = True
    with open_workdir(tmp_path, config):
        (tmp_path / 'cohort').mkdir()
        (tmp_path / 'cohort' / 'cohort.json').touch()
    with open_workdir(tmp_path, make_config(seed=1)):
        pass


def raise_later(result):
    result.write_text('kept')
    raise InputError('later')


def test_programs_are_kept_in_the_outermost_workdir_and_found_again(tmp_path):
    environment = {**os.environ, 'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0', 'JAX_PLATFORMS': 'cpu'}
    del environment['JAX_COMPILATION_CACHE_DIR']
    command = [sys.executable, '-c', COMPILE, str(tmp_path)]
    hits, kept = [], []
    for _ in range(2):
        process = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
        hits.append(int(process.stdout))
        kept.append(set((tmp_path / 'compiled').rglob('*-cache')))
    assert hits == [0, 1]
    assert len(kept[0]) == 1
    assert kept[1] == kept[0]
    assert not (tmp_path / 'stage' / 'compiled').exists()


def test_compiled_programs_alone_are_no_run(tmp_path):
    (tmp_path / 'compiled').mkdir()
    (tmp_path / 'compiled' / 'program').touch()
    with pytest.raises(InputError), open_workdir(tmp_path, make_config()):
        raise InputError('a setting')
    assert not (tmp_path / 'config.json').exists()


def test_what_holds_no_run_is_named(tmp_path, monkeypatch):
    (tmp_path / 'README.md').touch()
    with pytest.raises(InputError, match=r'/README\.md holds no run: it is a file, not a folder'):
        read_config(tmp_path / 'README.md')
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=rf'^{tmp_path} holds no run: {tmp_path}/config\.json is missing'):
        read_config('')
