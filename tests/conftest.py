"""Gives every test 8 CPU devices, and quick compilation rather than quick programs, before JAX starts.

Programs are kept in `.pytest_cache`, so that of tests that compile the same one only the first waits for it. What JAX
keeps in memory is let go after each file: it came to 5 GB a process, which the garbage collector went through again and
again.

And what several tests of stage 2 begin with: a stage 1 that was trained for a moment.
"""

import collections
import fcntl
import gc
import os
import pathlib
import re
import runpy
import shutil
import socket
import subprocess

import pytest

os.environ['JAX_PLATFORMS'] = 'cpu'
os.environ['XLA_FLAGS'] = ' '.join(
    (
        os.environ.get('XLA_FLAGS', ''),
        '--xla_force_host_platform_device_count=8',
        '--xla_backend_optimization_level=0',
        '--xla_llvm_disable_expensive_passes=true',
        '--xla_cpu_collective_call_terminate_timeout_seconds=600',  # eight devices on two cores wait for each other
    )
)
os.environ['JAX_COMPILATION_CACHE_DIR'] = str(pathlib.Path(__file__).parents[1] / '.pytest_cache' / 'compiled')
os.environ['JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS'] = '0'
os.environ['JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES'] = '-1'

gc.set_threshold(20_000, 20, 20)  # tracing makes many objects, of which few are garbage

# Files that take a minute or more begin first, so that no process is left with one at the end.
SLOWEST = (
    'training/test_vqgan.py',
    'test_demo.py',
    'test_train_classifier.py',
    'training/test_transformer.py',
    'test_api.py',
    'test_evaluate.py',
    'test_train_transformer.py',
    'models/test_vqgan_model.py',
)
CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'


def pytest_collection_modifyitems(items):
    """The order of files: those of `SLOWEST`, then those of most tests."""
    tests = collections.Counter(item.path for item in items)
    first = {pathlib.Path(__file__).parent / name: place - len(SLOWEST) for place, name in enumerate(SLOWEST)}
    items.sort(key=lambda item: (first.get(item.path, 0), -tests[item.path]))


@pytest.fixture(scope='module', autouse=True)
def _traces_of_one_file():
    """Lets go of traces and programs when a file's tests are over."""
    import jax

    yield
    jax.clear_caches()


@pytest.fixture
def several_processes():
    """Starts a command in several processes of one run, each with some devices; none outlives the test."""
    started = []

    def start(command, number, devices):
        with socket.socket() as probe:
            probe.bind(('127.0.0.1', 0))
            address = f'127.0.0.1:{probe.getsockname()[1]}'
        flags = re.sub(r'device_count=\d+', f'device_count={devices}', os.environ['XLA_FLAGS'])
        processes = [
            subprocess.Popen(
                [*command, f'--hosts={address},{number},{index}'],
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, 'XLA_FLAGS': flags},
            )
            for index in range(number)
        ]
        started.extend(processes)
        return processes

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


@pytest.fixture(scope='session')
def tiny_vqgan(tmp_path_factory):
    """Folder of a finished run of stage 1 on phantoms: 16³ voxels, 4³ tokens of 32 codes, two held-out patients."""
    from vqroi_jax import train_vqgan

    config = runpy.run_path(str(CONFIGS / 'vqgan.py'))['get_config']('smoke')
    config.data.phantom.spacing = 8.0
    config.data.phantom.patients = 5
    config.data.roi_size = (16, 16, 16)
    config.data.split.val = config.data.split.test = 1.0
    config.discriminator.channels = (8,)
    config.mesh.data = 1
    config.batch_size = config.eval_batch_size = 2
    config.codebook.warmup = '2 steps'
    config.codebook.init_batches = 3
    config.losses.adversarial_start = '3 steps'
    config.training.duration = '4 steps'
    config.training.eval_every = config.training.checkpoint_every = config.training.figures_every = '4 steps'
    # One of the processes that run tests trains it; all use copies of their own.
    root = tmp_path_factory.getbasetemp()
    common = (root.parent if 'PYTEST_XDIST_WORKER' in os.environ else root) / 'stage1'
    with open(common.with_suffix('.lock'), 'w') as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not common.exists():
            part = common.with_suffix('.part')
            train_vqgan.run(config, part)
            part.rename(common)
    return shutil.copytree(common, tmp_path_factory.mktemp('stage1') / 'run')


@pytest.fixture(scope='session')
def tiny_transformer_config(tiny_vqgan):
    """Makes configs of the task `transformer` on that stage 1, with changes."""

    def make(**changes):
        config = runpy.run_path(str(CONFIGS / 'transformer.py'))['get_config']('smoke')
        config.vqgan_workdir = str(tiny_vqgan)
        config.mesh.data = 2
        config.batch_size = config.eval_batch_size = 4
        config.model.width = 16
        config.sampling.sub_batch = 2
        config.ema_decay = 0.9
        config.training.duration = '8 steps'
        config.training.eval_every = config.training.checkpoint_every = '4 steps'
        config.training.figures_every = '8 steps'
        config.update_from_flattened_dict(changes)
        return config

    return make


@pytest.fixture(scope='session')
def tiny_transformer(tiny_transformer_config, tmp_path_factory):
    """Folder of a run of stage 2 that was never stopped."""
    from vqroi_jax import train_transformer

    folder = tmp_path_factory.mktemp('stage2')
    train_transformer.run(tiny_transformer_config(), folder)
    return folder
