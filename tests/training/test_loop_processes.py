"""The loop over several processes, as on several hosts: one run, stopped, lost and resumed together."""

import signal
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import toy_task

from vqroi_jax import hosts
from vqroi_jax.training import loop
from vqroi_jax.training.checkpoints import read_checkpoint, saved_steps
from vqroi_jax.training.metric_writers import read_metrics

CONFIG = 'import toy_task\n\nget_config = toy_task.get_config\n'


@pytest.fixture
def start(tmp_path, several_processes):
    """Starts the processes of a run with two devices each, through the command line."""
    (tmp_path / 'config.py').write_text(CONFIG)

    def start(workdir, number, *arguments):
        command = [
            sys.executable,
            Path(toy_task.__file__),
            f'--config={tmp_path / "config.py"}',
            f'--workdir={workdir}',
        ]
        return several_processes([*command, *arguments], number, devices=2)

    return start


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
    """Folder and weights of the run of a single process."""
    folder = tmp_path_factory.mktemp('alone')
    return folder, loop.train(toy_task.make_task(), toy_task.training_config(), folder).params['weights']


def assert_same_run(folder, alone):
    """Weights and losses as a single process has them; this holds only if all rows were read once and in order."""
    _, stored = read_checkpoint(folder, ['params'])
    np.testing.assert_allclose(stored['params']['weights'], alone[1], rtol=1e-5, atol=1e-6)
    together, single = (read_metrics(path / 'metrics.jsonl') for path in (folder, alone[0]))
    assert [row['step'] for row in together] == [row['step'] for row in single]
    for name in ('train/loss', 'val/loss'):
        losses = [[row[name] for row in rows if name in row] for rows in (together, single)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)


@pytest.mark.parametrize('number', [2, pytest.param(4, marks=pytest.mark.long)])
def test_processes_joined_by_the_command_line_make_the_run_of_one(number, start, alone, tmp_path):
    processes = start(tmp_path / 'run', number)
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0] * number, outputs
    assert 'step 50/50' in outputs[0]
    assert not any('step ' in output for output in outputs[1:])  # only one of them prints
    assert_same_run(tmp_path / 'run', alone)


@pytest.mark.long
def test_sigterm_to_one_stops_all_after_the_same_step_and_the_run_goes_on(start, alone, tmp_path):
    folder = tmp_path / 'run'
    first, second = start(folder, 2, '--config.delay=0.1')
    for line in first.stdout:
        if line.startswith('step 20/50'):
            break
    second.send_signal(signal.SIGTERM)
    ends = [process.communicate()[0].strip().splitlines()[-1] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    stopped_at = saved_steps(folder)[-1]
    assert 20 <= stopped_at < 50
    assert ends == [ends[0]] * 2
    assert ends[0].startswith(f'vqroi_jax: stopped after step {stopped_at} of 50')

    outputs = [process.communicate()[0] for process in start(folder, 2, '--config.delay=0.1')]
    assert f'resuming {folder} at step {stopped_at}' in outputs[0]
    assert_same_run(folder, alone)


@pytest.mark.long
@pytest.mark.parametrize('killed', [0, 2])
def test_when_a_process_is_killed_the_others_end_and_say_so(killed, start, alone, tmp_path):
    folder = tmp_path / 'run'
    processes = start(folder, 4, '--config.delay=0.1')
    for line in processes[0].stdout:
        if line.startswith('step 30/50'):
            break
    processes[killed].send_signal(signal.SIGKILL)
    begin = time.monotonic()
    survivors = [process for number, process in enumerate(processes) if number != killed]
    outputs = [process.communicate(timeout=2 * hosts.HEARTBEAT)[0] for process in survivors]
    assert time.monotonic() - begin < 1.5 * hosts.HEARTBEAT
    for process, output in zip(survivors, outputs, strict=True):
        assert process.returncode != 0
        told = 'another process of this run has ended' in output or 'another task died' in output
        assert told, output

    # The run goes on from its last checkpoint, of step 20, in another number of processes.
    assert saved_steps(folder) == [20]
    assert [process.wait() for process in start(folder, 2, '--config.delay=0.1')] == [0, 0]
    _, stored = read_checkpoint(folder, ['params'])
    np.testing.assert_allclose(stored['params']['weights'], alone[1], rtol=1e-5, atol=1e-6)
