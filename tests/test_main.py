"""The command line: what it accepts, and the one line and status 2 for each slip."""

import errno
import importlib.util
import subprocess
import sys
import time
import types
from pathlib import Path

import jax
import jax.numpy as jnp
import pytest
from ml_collections import ConfigDict

from vqroi_jax import main
from vqroi_jax.errors import InputError, Stopped

CONFIG = """
import ml_collections

def get_config(variant='paper'):
    if variant not in ('paper', 'smoke'):
        raise ValueError(f'there is no variant {variant!r}; choose paper or smoke')
    return ml_collections.ConfigDict({
        'task': 'toy',
        'batch_size': 3 if variant == 'paper' else 1,
        'rate': 1e-4,
        'bf16': False,
        'data': {'path': '', 'roi_size': (128, 128, 128), 'classes': (), 'split': {'val': 0.1}},
    })
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A config file, and a task that notes what it was started with."""
    module = types.ModuleType('toy_command')
    module.started = []
    module.run = lambda config, workdir: module.started.append((config, workdir))
    monkeypatch.setitem(sys.modules, 'toy_command', module)
    monkeypatch.setitem(main.TASKS, 'toy', 'toy_command')
    module.path = tmp_path / 'config.py'
    module.path.write_text(CONFIG)
    return module


def run(toy, *arguments, variant=''):
    return main.main(['main', f'--config={toy.path}{variant}', '--workdir=runs/x', *arguments])


def test_starts_the_task_with_the_locked_config_and_the_workdir(toy):
    assert run(toy) == 0
    ((config, workdir),) = toy.started
    assert workdir == 'runs/x'
    assert (config.batch_size, config.data.roi_size) == (3, (128, 128, 128))
    assert config.is_locked
    assert config.data.is_locked


def test_a_workdir_may_begin_at_home(toy, monkeypatch):
    monkeypatch.setenv('HOME', '/home/someone')  # shells leave it to programs behind an equals sign
    assert main.main(['main', f'--config={toy.path}', '--workdir=~/runs/x']) == 0
    assert toy.started[0][1] == '/home/someone/runs/x'


def test_a_variant_is_what_follows_the_colon(toy):
    assert run(toy, variant=':smoke') == 0
    assert toy.started[0][0].batch_size == 1


def test_fields_are_set_in_every_way_of_writing_them(toy):
    status = run(
        toy,
        '--config.batch_size=8',
        '--config.rate',
        '1',
        '--config.bf16',
        '--config.data.path=a=b c',
        '--config.data.roi_size=(32,64,96)',
        '--config.data.classes=LGG,HGG',
        '--config.data.split.val=25',
    )
    assert status == 0
    config = toy.started[0][0]
    assert (config.batch_size, config.rate, config.bf16) == (8, 1.0, True)
    assert config.data.path == 'a=b c'
    assert config.data.roi_size == (32, 64, 96)
    assert config.data.split.val == 25.0
    assert isinstance(config.data.split.val, float)
    assert run(toy, '--noconfig.bf16', '--config.batch_size=4', '--config.batch_size=5') == 0
    assert (toy.started[1][0].bf16, toy.started[1][0].batch_size) == (False, 5)


def error_line(capsys):
    """What was printed: one line, on stderr."""
    out, err = capsys.readouterr()
    assert out == ''
    assert err.count('\n') == 1
    assert err.endswith('\n')
    assert err.startswith('vqroi_jax: error: ')
    return err.removeprefix('vqroi_jax: error: ')[:-1]


@pytest.mark.parametrize(
    ('argument', 'message'),
    [
        ('--config.batchsize=8', "the config has no field 'batchsize'; did you mean 'batch_size'?"),
        ('--config.data.roi_sze=8', "the config has no field 'data.roi_sze'; did you mean 'data.roi_size'?"),
        ('--config.dat.path=x', "the config has no field 'dat.path'; did you mean 'data.path'?"),
        ('--config.roi_size=8', "the config has no field 'roi_size'; did you mean 'data.roi_size'?"),
        ('--config.zzz=8', "the config has no field 'zzz'"),
        ('--config.data=x', "'data' is a block of fields; set them one by one"),
        ('--config.batch_size', 'Missing value for flag --config.batch_size'),
        ('--confg=x', "there is no flag --confg; did you mean 'config'?"),
        ('--workdr=x', "there is no flag --workdr; did you mean 'workdir'?"),
        ('extra', "'extra' is not an argument; set a field with --config.FIELD=VALUE"),
    ],
)
def test_an_argument_that_does_not_exist_is_told_with_the_nearest(toy, capsys, argument, message):
    assert run(toy, argument) == 2
    assert error_line(capsys) == message
    assert toy.started == []


def test_a_tuple_that_is_given_twice_is_told(toy, capsys):
    assert run(toy, '--config.data.classes=LGG', '--config.data.classes', 'HGG') == 2
    assert error_line(capsys) == '--config.data.classes is given twice; write all its members in one, such as A,B'
    assert toy.started == []


@pytest.mark.parametrize(
    ('argument', 'expected'),
    [
        ('--config.batch_size=2.5', 'a value of type int is expected, such as 3'),
        ('--config.rate=fast', 'a value of type float is expected, such as 0.0001'),
        ('--config.bf16=maybe', 'a value of type bool is expected, such as False'),
        ('--config.data.roi_size=(32,32', 'a value of type tuple is expected, such as (128, 128, 128)'),
        ('--config.data.roi_size=large', 'members of type int are expected, such as (128, 128, 128)'),
        ('--config.data.roi_size=32,32.5,32', 'members of type int are expected, such as (128, 128, 128)'),
    ],
)
def test_a_value_of_another_type_is_told_with_the_field_and_its_type(toy, capsys, argument, expected):
    assert run(toy, argument) == 2
    line = error_line(capsys)
    assert argument.split('=')[0] + '=' in line
    assert line.endswith(expected)
    assert toy.started == []


@pytest.mark.parametrize(
    ('arguments', 'message'),
    [
        ((), 'no --config given'),
        (('--config',), 'Missing value for flag --config'),
        (('--config=nowhere.py', '--workdir=x'), '--config=nowhere.py: there is no file nowhere.py'),
        (('--config={folder}', '--workdir=x'), 'there is no file'),
        (('--config={config}',), 'no --workdir given'),
        (('--config={config}', '--workdir='), 'no --workdir given'),
        (('--config={config}:huge', '--workdir=x'), "there is no variant 'huge'; choose paper or smoke"),
        (('--config={config}', '--workdir=x', '--config.task=fly'), "task 'fly' is none of prepare, vqgan, "),
        (('--config={empty}', '--workdir=x'), 'has no function get_config'),
        (('--config={broken}', '--workdir=x'), 'invalid syntax'),
        (('--config={text}', '--workdir=x'), 'is not a Python file'),
    ],
)
def test_what_is_missing_is_told(toy, tmp_path, capsys, arguments, message):
    files = {name: tmp_path / f'{name}.py' for name in ('empty', 'broken')} | {'text': tmp_path / 'text.txt'}
    for name, text in (('empty', ''), ('broken', 'def get_config(:'), ('text', '')):
        files[name].write_text(text)
    known = {'config': toy.path, 'folder': tmp_path, **files}
    assert main.main(['main', *(argument.format(**known) for argument in arguments)]) == 2
    assert message in error_line(capsys)
    assert toy.started == []


def test_what_a_task_finds_is_one_line_too(toy, capsys):
    def refuse(config, workdir):
        raise InputError('patient BraTS19_1: no mask\nexpected one')

    toy.run = refuse
    assert run(toy) == 2
    assert error_line(capsys) == 'patient BraTS19_1: no mask expected one'


def test_a_full_disk_is_one_line_too(toy, capsys):
    def fill(config, workdir):
        raise OSError(errno.ENOSPC, 'No space left on device', 'runs/x/metrics.jsonl')

    toy.run = fill
    assert run(toy) == 2
    assert 'No space left on device' in error_line(capsys)


def test_want_of_memory_is_one_line_that_names_what_takes_less(toy, capsys, monkeypatch):
    def ask(config, workdir):
        jax.block_until_ready(jnp.zeros((2**44,)))

    toy.run = ask
    assert run(toy) == 2
    assert 'memory is too small (RESOURCE_EXHAUSTED: Out of memory allocating' in error_line(capsys)
    config = ConfigDict({'dtype': 'bfloat16', 'batch_size': 3, 'model': {'remat': 'none', 'width': 8}})
    told = main._mendable(jax.errors.JaxRuntimeError('INTERNAL: Out of memory allocating 1 bytes.\nmore'), config)
    assert told.endswith(
        '; other values need less: config.batch_size=3 (a smaller one), config.model.remat=none (blocks)'
    )
    assert 'more' not in told
    assert main._mendable(jax.errors.JaxRuntimeError('INTERNAL: a bug'), config) is None


def test_a_stop_is_status_0_and_an_interruption_130(toy, capsys):
    def stop(config, workdir):
        raise Stopped('stopped after step 3')

    def interrupt(config, workdir):
        raise KeyboardInterrupt

    toy.run = stop
    assert run(toy) == 0
    assert capsys.readouterr().out == 'vqroi_jax: stopped after step 3\n'
    toy.run = interrupt
    assert run(toy) == 130


@pytest.mark.parametrize('error', [KeyError('volume'), ValueError('shapes'), FileNotFoundError('x')])
def test_bugs_keep_their_traceback(toy, error):
    def fail(config, workdir):
        raise error

    toy.run = fail
    with pytest.raises(type(error)):
        run(toy)


def test_a_slip_in_hosts_is_told_before_anything_starts(toy, capsys):
    assert run(toy, '--hosts=first') == 2
    assert capsys.readouterr().err.startswith(
        "vqroi_jax: error: --hosts=first: expected 'auto', 'none' or ADDRESS:PORT"
    )
    assert toy.started == []
    assert run(toy, '--hosts=none') == 0
    assert len(toy.started) == 1


def test_help_of_a_config_lists_its_fields_as_they_are_set(toy, capsys):
    assert run(toy, '--help', '--config.batch_size=17') == 0
    out = capsys.readouterr().out
    assert 'batch_size: 17' in out
    assert 'roi_size' in out
    assert toy.started == []


def test_help_comes_at_once_and_loads_nothing_heavy(tmp_path):
    """Well under the 3 s that a user waits for, most of them the interpreter's own."""
    code = (
        'import sys; from vqroi_jax import main; status = main.main(["main", "--help"]);'
        'heavy = {"jax", "tensorflow_datasets", "matplotlib", "numpy", "torch", "tensorflow"} & set(sys.modules);'
        'sys.exit(str(heavy) if heavy else status)'
    )
    begin = time.perf_counter()
    done = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, '')
    assert time.perf_counter() - begin < 3
    assert '--workdir' in done.stdout


def test_the_module_is_the_command(toy):
    command = [sys.executable, '-m', 'vqroi_jax.main', f'--config={toy.path}:huge', '--workdir=x']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (2, '')
    assert done.stderr.startswith('vqroi_jax: error: --config=')
    assert done.stderr.count('\n') == 1


@pytest.mark.parametrize('task', list(main.TASKS))
def test_every_task_has_a_command(task):
    spec = importlib.util.find_spec(main.TASKS[task])
    assert spec is not None
    assert 'def run(config' in Path(spec.origin).read_text(encoding='utf-8')
