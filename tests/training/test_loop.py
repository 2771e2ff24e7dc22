"""The loop on a toy task: what it learns, writes, keeps and says, and that stopping changes none of it."""

import dataclasses
import json
import signal
import subprocess
import sys
import types
from pathlib import Path

import jax
import numpy as np
import pytest
import toy_task
from toy_task import make_task, training_config

from vqroi_jax import workdir as workdirs
from vqroi_jax.errors import InputError, Stopped
from vqroi_jax.training import loop
from vqroi_jax.training.checkpoints import saved_steps
from vqroi_jax.training.metric_writers import read_metrics

TOY = Path(toy_task.__file__)


def rows(workdir, prefix=('train/', 'val/')):
    """Lines of metrics.jsonl without speed and memory, which are never the same twice."""
    kept = [
        {name: value for name, value in row.items() if name == 'step' or name.startswith(prefix)}
        for row in read_metrics(workdir / 'metrics.jsonl')
    ]
    return [row for row in kept if len(row) > 1]


def assert_same(state, other):
    for here, there in zip(jax.tree.leaves(state), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(np.asarray(here), np.asarray(there))


def by_hand(steps):
    """The run without the loop: the state after the last step, and each step's metrics."""
    task, history = make_task(), []
    state = task.create()
    for number in range(steps):
        state = task.before_step(number, state)
        state, metrics = task.train_step(state, task.put_batch(task.batches.batch_at(number)))
        history.append({name: float(value) for name, value in metrics.items()})
    return state, history


@pytest.fixture(scope='module')
def whole_run(tmp_path_factory):
    """A run of 50 steps that nobody interrupts: its folder, final state and what it printed."""
    folder = tmp_path_factory.mktemp('whole')
    with pytest.MonkeyPatch.context() as patch:
        printed = []
        patch.setattr('builtins.print', lambda text, **unused: printed.append(text))
        state = loop.train(make_task(), training_config(), folder)
    return types.SimpleNamespace(folder=folder, state=state, printed=printed)


def test_takes_the_steps_of_the_task_on_the_batches_in_order(whole_run):
    state, history = by_hand(50)
    assert_same(whole_run.state, state)
    logged = [row for row in rows(whole_run.folder) if 'train/loss' in row]
    assert [row['step'] for row in logged] == [10, 20, 30, 40, 50]
    for row in logged:
        interval = history[row['step'] - 10 : row['step']]
        for name in ('loss', 'bias'):
            assert row[f'train/{name}'] == pytest.approx(np.mean([metrics[name] for metrics in interval]), rel=1e-12)


def test_approaches_the_least_squares_solution(tmp_path):
    seldom = dict.fromkeys(('duration', 'log_every', 'eval_every', 'checkpoint_every'), '200 steps')
    state = loop.train(make_task(before_step=None, figures=None), training_config(**seldom), tmp_path)
    source = toy_task.Source()
    design = np.concatenate([source.volumes.reshape(-1, 8), np.ones((toy_task.PATIENTS, 1))], 1)
    solution, (residual,), _, _ = np.linalg.lstsq(design, source.labels, rcond=None)
    best = residual / toy_task.PATIENTS
    start, end = np.mean(source.labels**2), rows(tmp_path)[-1]['val/loss']
    assert best <= end < best + 0.1 * (start - best)
    np.testing.assert_allclose(state.params['weights'], solution[:8], atol=0.1)


def test_evaluates_on_time_and_before_each_checkpoint_and_at_the_end(tmp_path):
    training = training_config(eval_every='12 steps', checkpoint_every='20 steps')
    loop.train(make_task(), training, tmp_path)
    assert [row['step'] for row in rows(tmp_path) if 'val/loss' in row] == [12, 20, 24, 36, 40, 48, 50]


def test_the_last_evaluation_can_be_asked_for(whole_run, tmp_path):
    evaluations = [row for row in rows(whole_run.folder) if 'val/loss' in row]
    assert loop.last_evaluation(whole_run.folder) == {'val/loss': evaluations[-1]['val/loss']}
    assert loop.last_evaluation(tmp_path) == {}


def test_reports_speed_and_memory(whole_run):
    for row in read_metrics(whole_run.folder / 'metrics.jsonl'):
        if 'train/loss' in row:
            speed = row['perf/steps_per_second']
            assert 0 < speed < 1e6
            assert row['perf/samples_per_second'] == pytest.approx(speed * toy_task.BATCH)
            assert 0.01 < row['perf/peak_memory_gib'] < 1000


def test_speed_leaves_out_compilation_evaluation_figures_and_checkpoints(tmp_path, monkeypatch):
    """On a clock that counts 1 s a step, 100 s the first, and 1000 s for everything else."""
    now = [0.0]
    monkeypatch.setattr(loop.time, 'perf_counter', lambda: now[0])
    task = make_task()

    def slow(function, seconds):
        def slower(*arguments):
            now[0] += seconds(*arguments)
            return function(*arguments)

        return slower

    task.put_batch = slow(task.put_batch, lambda batch: 100 if now[0] < 1001 else 1)
    task.figures = slow(task.figures, lambda state: 1000)
    task.evaluate = slow(task.evaluate, lambda state: 1000)
    task.before_step = slow(task.before_step, lambda done, state: 1000 if done == 12 else 0)
    loop.train(task, training_config(log_every='7 steps', eval_every='5 steps'), tmp_path)
    logged = [row for row in read_metrics(tmp_path / 'metrics.jsonl') if 'train/loss' in row]
    assert [row['perf/steps_per_second'] for row in logged] == [pytest.approx(1.0)] * 8


def test_draws_at_the_start_on_time_and_at_the_end(whole_run):
    names = [path.name for path in sorted(whole_run.folder.glob('figures/steps/*'))]
    assert names == ['weights_00000000.png', 'weights_00000025.png', 'weights_00000050.png']
    assert (whole_run.folder / 'figures' / 'weights.png').is_file()


def test_keeps_the_last_checkpoints_and_the_best(tmp_path):
    scores = iter([0.5, 0.1, 0.9, 0.3, 0.7])
    task = make_task(evaluate=lambda state: {'val/loss': next(scores)})
    training = training_config(eval_every='10 steps', checkpoint_every='10 steps')
    loop.train(task, training, tmp_path)
    assert saved_steps(tmp_path) == [20, 40, 50]


def test_progress_does_not_show_the_evaluation_of_parts(tmp_path, capsys):
    task = make_task(evaluate=lambda state: {'val/loss': 0.5, 'val/loss/HGG': 0.25})
    loop.train(task, training_config(), tmp_path)
    assert 'step 50  val/loss 0.5  (evaluated' in capsys.readouterr().out
    assert loop.last_evaluation(tmp_path)['val/loss/HGG'] == 0.25


def test_prints_one_line_an_interval(whole_run):
    lines = '\n'.join(whole_run.printed)
    assert f'training 50 steps (20 epochs) into {whole_run.folder}' in lines
    assert 'first step: ' in lines
    for step in (10, 20, 30, 40, 50):
        assert f'step {step}/50  loss 0.' in lines
    assert 'steps/s  ETA 00:0' in lines
    assert 'step 40  val/loss 0.' in lines
    assert len(whole_run.printed) == 2 + 5 + 3


def test_goes_on_as_if_it_had_never_stopped(whole_run, tmp_path):
    """Stopped after every kind of step: within an interval, at its end, at a checkpoint, before and after step 12."""

    def stopping(task, after):
        put, calls = task.put_batch, []

        def put_batch(batch):
            calls.append(batch)
            if len(calls) == after:
                signal.raise_signal(signal.SIGTERM)
            return put(batch)

        return dataclasses.replace(task, put_batch=put_batch)

    done = 0
    for step in (1, 9, 12, 13, 20, 30, 37, 38):
        with pytest.raises(Stopped, match=f'stopped after step {step} of 50'):
            loop.train(stopping(make_task(), step - done), training_config(), tmp_path)
        assert saved_steps(tmp_path)[-1] == step
        done = step
    state = loop.train(make_task(), training_config(), tmp_path)
    assert_same(state, whole_run.state)
    assert rows(tmp_path) == rows(whole_run.folder)
    loops = [json.loads((f / 'checkpoints/50/loop/metadata').read_text()) for f in (tmp_path, whole_run.folder)]
    assert loops[0] == loops[1]


def test_goes_on_from_the_last_checkpoint_after_a_crash(whole_run, tmp_path):
    task = make_task()
    put, calls = task.put_batch, []

    def put_batch(batch):
        calls.append(batch)
        if len(calls) == 33:
            raise RuntimeError('the machine is gone')
        return put(batch)

    task.put_batch = put_batch
    with pytest.raises(RuntimeError, match='gone'):
        loop.train(task, training_config(), tmp_path)
    assert saved_steps(tmp_path) == [20]
    assert rows(tmp_path)[-1]['step'] == 30
    assert_same(loop.train(make_task(), training_config(), tmp_path), whole_run.state)
    assert rows(tmp_path) == rows(whole_run.folder)


def test_a_finished_run_is_left_alone(whole_run, capsys):
    before = rows(whole_run.folder)
    task = make_task(create=None, put_batch=None, evaluate=None, figures=None)
    assert_same(loop.train(task, training_config(), whole_run.folder), whole_run.state)
    assert rows(whole_run.folder) == before
    assert 'is trained to the end (step 50)' in capsys.readouterr().out


def test_falls_back_and_says_so(whole_run, tmp_path, capsys):
    loop.train(make_task(), training_config(), tmp_path)
    for path in (tmp_path / 'checkpoints/50/state').rglob('*'):
        if path.is_file():
            path.write_bytes(b'')
    task = make_task(create=None)  # a run that goes on makes no state, which would lie beside the one that is read
    assert_same(loop.train(task, training_config(), tmp_path), whole_run.state)
    printed = capsys.readouterr().out
    assert 'warning: checkpoint ' in printed
    assert 'set aside, going on from step 40' in printed
    assert f'resuming {tmp_path} at step 40 of 50' in printed
    assert rows(tmp_path) == rows(whole_run.folder)


def poisoned_steps(patient):
    batches = make_task().batches
    return [number + 1 for number in range(50) if patient in batches.batch_at(number)['index']]


def test_a_loss_that_is_not_finite_stops_with_the_step_the_term_and_the_samples(tmp_path):
    source = toy_task.Source(poisoned=[13])
    step = poisoned_steps(13)[0]
    with pytest.raises(InputError) as caught:
        loop.train(make_task(source), training_config(checkpoint_every='1 step'), tmp_path)
    message = str(caught.value)
    assert message.startswith(f'step {step}: loss not finite; samples: ')
    names = message.split('samples: ')[1].split('. ')[0].split(', ')
    assert names == make_task().batches.ids(make_task().batches.batch_at(step - 1)['index'])
    assert 'patient_13' in names
    kept = saved_steps(tmp_path)
    assert (kept[-1] if kept else 0) == step - 1  # no checkpoint of a bad step


def test_a_loss_that_is_not_finite_is_skipped_and_counted_by_option(tmp_path, capsys):
    source = toy_task.Source(poisoned=[13])
    bad = poisoned_steps(13)
    evaluate = lambda state: {'val/loss': float(np.sum(state.params['weights']))}  # noqa: E731
    task = make_task(source, evaluate=evaluate)
    state = loop.train(task, training_config(on_nonfinite='skip'), tmp_path)
    assert int(state.step) == 50
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
    logged = [row for row in rows(tmp_path) if 'train/loss' in row]
    for row in logged:
        assert row['train/skipped_updates'] == sum(step <= row['step'] for step in bad)
        assert np.isfinite(row['train/loss'])
    assert f'{len(bad)} in all' in capsys.readouterr().out


def test_warnings_of_the_task_are_printed_once_an_interval(tmp_path, capsys):
    seen = []
    task = make_task(warn=lambda means: seen.append(means) or ['the codebook has collapsed'])
    loop.train(task, training_config(), tmp_path)
    assert capsys.readouterr().out.count('warning: the codebook has collapsed') == 5
    logged = [row for row in rows(tmp_path) if 'train/loss' in row]
    assert [means['loss'] for means in seen] == [row['train/loss'] for row in logged]


def test_a_task_may_have_no_evaluation_and_no_figures(tmp_path):
    task = make_task(evaluate=None, figures=None, before_step=None)
    loop.train(task, training_config(), tmp_path)
    assert saved_steps(tmp_path) == [40, 50]
    assert not (tmp_path / 'figures').exists()


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('duration', '5 hours', r"training\.duration: '5 hours' is no duration"),
        ('log_every', '0 steps', r'training\.log_every: .* at least 1 expected'),
        ('on_nonfinite', 'ignore', r"training\.on_nonfinite: 'ignore' is none of stop, skip"),
        ('best_mode', 'least', r"training\.best_mode: 'least' is none of min, max"),
        ('keep_last', 0, r'training\.keep_last: 0 is too few'),
        ('keep_best', -1, r'training\.keep_best: -1 is too few'),
        ('best_metric', 'val/ssim', r"training\.best_metric: 'val/ssim' is not evaluated; there are val/loss"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_compilation(tmp_path, field, value, message):
    task = make_task(train_step=None, put_batch=None, figures=None)
    with pytest.raises(InputError, match=message):
        loop.train(task, training_config(**{field: value}), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_too_little_disk_space_is_told_before_compilation(tmp_path, monkeypatch):
    monkeypatch.setattr(workdirs.shutil, 'disk_usage', lambda folder: types.SimpleNamespace(free=2**20))
    with pytest.raises(InputError, match='no disk space: keeping 3 checkpoints needs'):
        loop.train(make_task(train_step=None, figures=None), training_config(), tmp_path)


def test_signals_are_given_back(tmp_path):
    handlers = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    loop.train(make_task(), training_config(), tmp_path)
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == handlers


def test_sigterm_ends_the_command_with_everything_saved_and_status_0(whole_run, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(f'import sys\nsys.path.insert(0, {str(TOY.parent)!r})\nfrom toy_task import get_config\n')
    workdir = tmp_path / 'run'
    command = [sys.executable, TOY, f'--config={config}', f'--workdir={workdir}', '--config.terminate_at=33']
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, '')
    assert done.stdout.splitlines()[-1].startswith('vqroi_jax: stopped after step 33 of 50 and saved in ')
    assert saved_steps(workdir) == [20, 33]
    assert_same(loop.train(make_task(), training_config(), workdir), whole_run.state)
    assert rows(workdir) == rows(whole_run.folder)
