"""The loop over two processes with two devices each, as on two hosts: one run, stopped and resumed together."""

import signal
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import toy_task

from vqroi_jax.training import loop
from vqroi_jax.training.checkpoints import read_checkpoint, saved_steps
from vqroi_jax.training.metric_writers import read_metrics

PROCESS = """
import os, sys, time
os.environ['XLA_FLAGS'] = '--xla_force_host_platform_device_count=2'
import jax
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(f'127.0.0.1:{sys.argv[1]}', 2, int(sys.argv[2]))
import toy_task
from vqroi_jax.errors import Stopped
task, put = toy_task.make_task(), toy_task.make_task().put_batch
task.put_batch = lambda batch: time.sleep(0.1) or put(batch)
with toy_task.open_workdir(sys.argv[3], toy_task.get_config()) as folder:
    try:
        toy_task.loop.train(task, toy_task.training_config(), folder)
        print('done')
    except Stopped as stopped:
        print(stopped)
"""


def start(workdir):
    """Both processes of the run."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    return [
        subprocess.Popen(
            [sys.executable, '-c', PROCESS, port, str(rank), workdir],
            stdout=subprocess.PIPE,
            text=True,
            cwd=Path(toy_task.__file__).parent,
        )
        for rank in range(2)
    ]


@pytest.mark.long
def test_sigterm_to_one_stops_all_after_the_same_step_and_the_run_goes_on(tmp_path):
    first, second = start(tmp_path)
    for line in first.stdout:
        if line.startswith('step 20/50'):
            break
    second.send_signal(signal.SIGTERM)
    ends = [process.communicate()[0].strip().splitlines()[-1] for process in (first, second)]
    assert [process.returncode for process in (first, second)] == [0, 0]
    stopped_at = saved_steps(tmp_path)[-1]
    assert 20 <= stopped_at < 50
    assert ends == [ends[0]] * 2
    assert ends[0].startswith(f'stopped after step {stopped_at} of 50')

    outputs = [process.communicate()[0] for process in start(tmp_path)]
    assert f'resuming {tmp_path} at step {stopped_at}' in outputs[0]
    assert 'step ' not in outputs[1]  # only one of them prints
    assert [output.strip().splitlines()[-1] for output in outputs] == ['done', 'done']

    (tmp_path / 'alone').mkdir()
    whole = loop.train(toy_task.make_task(), toy_task.training_config(), tmp_path / 'alone')
    _, stored = read_checkpoint(tmp_path, ['params'])
    np.testing.assert_allclose(stored['params']['weights'], whole.params['weights'], rtol=1e-5, atol=1e-6)
    together, alone = (read_metrics(folder / 'metrics.jsonl') for folder in (tmp_path, tmp_path / 'alone'))
    assert [row['step'] for row in together] == [row['step'] for row in alone]
    for name in ('train/loss', 'val/loss'):
        losses = [[row[name] for row in rows if name in row] for rows in (together, alone)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
