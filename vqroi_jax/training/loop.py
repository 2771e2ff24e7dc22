"""The one training loop, which every task that trains goes through.

A command makes a `TrainingTask` (state, jitted step, batches, evaluation, figures) and calls `train`. The loop
restores, steps, logs, evaluates, draws, saves and stops; the task knows what is learnt. A run that was stopped and
resumed has the same parameters and the same metrics, to the bit, as one that never stopped.
"""

import contextlib
import dataclasses
import math
import resource
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from clu import parameter_overview
from jax.experimental import multihost_utils
from matplotlib.figure import Figure
from ml_collections import ConfigDict

from vqroi_jax import viz
from vqroi_jax.errors import InputError, Stopped
from vqroi_jax.stopping import stop_requests
from vqroi_jax.training.checkpoints import Checkpoints, checkpoint_bytes, saved_steps
from vqroi_jax.training.durations import to_steps
from vqroi_jax.training.metric_writers import (
    FIGURES_FOLDER,
    METRICS_FILE,
    MetricWriter,
    Progress,
    format_metrics,
    read_metrics,
)
from vqroi_jax.workdir import is_primary, require_space

CURVES_FIGURE = 'curves.png'  # metrics over steps, drawn with the task's figures

State = Any
Metrics = dict[str, float]


@dataclasses.dataclass
class TrainingTask:
    """What a command trains. Of several processes all fill it alike; evaluation and figures run on all of them.

    Attributes:
        shapes: of the state, a pytree with a `jax.ShapeDtypeStruct` for each array, its final sharding included.
        create: makes the state before the first step; `.step` (int32 scalar) is 0. A run that goes on makes none.
        train_step: jitted; takes (state, global batch), donates the state, and returns the next state (`step` one up)
            and metrics: scalars, of which `finite` (bool) says whether the update was made. Where it is False the step
            itself has left all but `step` as it was.
        batches: with `iterator()` (endless batches of this process as dicts of NumPy arrays, with `get_state()` and
            `set_state()` in terms of JSON), `steps_per_epoch`, and `ids(index)` (names of the samples that are in
            `batch['index']`).
        put_batch: from this process's batch to the global batch on the devices.
        evaluate: from a state to metrics on held-out data, named like 'val/l1', or like 'val/l1/HGG' where they are
            of a part and progress should not show them; empty as long as there is nothing to measure.
        evaluated: the names that `evaluate` returns.
        figures: from a state to figures by name.
        before_step: from (updates done, state) to state: what happens at fixed steps outside of the jitted step. It
            must depend on nothing else, so that a resumed run does the same.
        warn: from the means of an interval to lines that the user should read, e.g. that the codebook collapses.
        describe: called with the step after every checkpoint, for what the folder says of itself.
        headline: names of the step's metrics that progress shows.
    """

    shapes: State
    create: Callable[[], State]
    train_step: Callable[[State, Any], tuple[State, Mapping[str, jax.Array]]]
    batches: Any
    put_batch: Callable[[Mapping[str, np.ndarray]], Any]
    evaluate: Callable[[State], Metrics] | None = None
    figures: Callable[[State], dict[str, Figure]] | None = None
    before_step: Callable[[int, State], State] | None = None
    warn: Callable[[Metrics], list[str]] | None = None
    describe: Callable[[int], None] | None = None
    headline: tuple[str, ...] = ('loss',)
    evaluated: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Schedule:
    """The durations of `config.training` in steps."""

    total: int
    log: int
    evaluate: int
    figures: int
    checkpoint: int

    @classmethod
    def read(cls, training: ConfigDict, steps_per_epoch: float, evaluated: Sequence[str] = ()) -> 'Schedule':
        """Reads and checks the loop's fields of the config, before anything is compiled.

        Args:
            training: `duration`, `log_every`, `eval_every`, `figures_every`, `checkpoint_every` ('N steps' or
                'N epochs'), `keep_last`, `keep_best`, `best_metric`, `best_mode`, `on_nonfinite`.
            steps_per_epoch: of the training split.
            evaluated: names of what is evaluated, among which the best metric must be; empty: nothing is.

        Raises:
            InputError: a field has a value that it cannot have.
        """
        fields = ('duration', 'log_every', 'eval_every', 'figures_every', 'checkpoint_every')
        for name, values in (('best_mode', ('min', 'max')), ('on_nonfinite', ('stop', 'skip'))):
            if training[name] not in values:
                raise InputError(f'config.training.{name}: {training[name]!r} is none of {", ".join(values)}')
        for name, least in (('keep_last', 1), ('keep_best', 0)):
            if training[name] < least:
                raise InputError(f'config.training.{name}: {training[name]} is too few; at least {least} expected')
        if evaluated and training.keep_best and training.best_metric not in evaluated:
            known = ', '.join(evaluated)
            raise InputError(
                f'config.training.best_metric: {training.best_metric!r} is not evaluated; there are {known}'
            )
        return cls(*(to_steps(training[name], steps_per_epoch, f'config.training.{name}') for name in fields))

    def due(self, every: int, step: int) -> bool:
        """Whether something that happens every so many steps, and at the end, happens after `step` updates."""
        return step % every == 0 or step == self.total


def train(task: TrainingTask, training: ConfigDict, workdir: Path) -> State:
    """Trains, from the newest checkpoint in the workdir if there is one.

    Evaluation happens every `eval_every`, before every checkpoint, so that each has the score of its own weights, and
    at the end. Figures are drawn at the start too, so that a fault in them shows before hours have passed.

    Args:
        task: what to train.
        training: see `Schedule.read`.
        workdir: opened with `vqroi_jax.workdir.open_workdir`.

    Returns:
        The state after the last step.

    Raises:
        InputError: a setting cannot be used, the disk is full, no checkpoint can be read, or a loss or gradient was not
            finite and `on_nonfinite` is 'stop'.
        Stopped: SIGTERM or Ctrl-C came, and the state was saved.
    """
    schedule = Schedule.read(training, task.batches.steps_per_epoch, task.evaluated)
    with Checkpoints(workdir, training) as checkpoints:
        restored = checkpoints.restore(task.shapes)
        iterator = task.batches.iterator()
        tally, problems = _Tally(), list[str]()
        if restored:
            state, loop, problems = restored
            iterator.set_state(loop['iterator'])
            tally = _Tally.from_json(loop['tally'])
        else:
            if is_primary():
                kept = training.keep_last + training.keep_best + 1
                require_space(workdir, kept * checkpoint_bytes(task.shapes), f'keeping {kept - 1} checkpoints')
            state = task.create()
        step = int(state.step)
        with (
            MetricWriter(workdir, step) as writer,
            Progress(step, schedule.total) as progress,
            stop_requests() as requested,
        ):
            for problem in problems:
                progress.message(f'warning: {problem}')
            tools = (schedule, checkpoints, writer, progress, iterator)
            return _Loop(task, training, workdir, *tools, tally, state, step).run(requested)


def write_parameters(workdir: Path, params: Any) -> None:
    """Writes names, shapes and sizes of a network's parameters to `parameters.txt`."""
    overview = parameter_overview.get_parameter_overview(params, include_stats=False)
    (workdir / 'parameters.txt').write_text(f'{overview}\n', encoding='utf-8')


def last_evaluation(workdir: Path) -> dict[str, float | None]:
    """What `evaluate` last returned in a run; empty if it never did. A number that was not finite is None."""
    rows = [row for row in read_metrics(workdir / METRICS_FILE) if not any(name.startswith('train/') for name in row)]
    return {name: value for name, value in rows[-1].items() if name != 'step'} if rows else {}


@dataclasses.dataclass
class _Tally:
    """Sums over the steps of a log interval; part of a checkpoint, for a run may stop within an interval."""

    sums: Metrics = dataclasses.field(default_factory=dict)
    steps: int = 0  # updates made in this interval
    skipped: int = 0  # updates not made in this interval, a loss or gradient being not finite
    all_skipped: int = 0  # the same in the whole run

    def add(self, metrics: Metrics, finite: bool) -> None:
        if not finite:
            self.skipped += 1
            self.all_skipped += 1
            return
        self.steps += 1
        for name, value in metrics.items():
            self.sums[name] = self.sums.get(name, 0.0) + value

    def means(self) -> Metrics:
        """Means over the updates made; none if there were none. All steps have batches of the same size."""
        return {name: value / self.steps for name, value in self.sums.items()}

    def to_json(self) -> dict[str, Any]:
        """JSON has no NaN, which a metric other than the losses may be: as text."""
        return {**dataclasses.asdict(self), 'sums': {name: repr(value) for name, value in self.sums.items()}}

    @classmethod
    def from_json(cls, stored: dict[str, Any]) -> '_Tally':
        return cls(**{**stored, 'sums': {name: float(value) for name, value in stored['sums'].items()}})


class _Clock:
    """Time spent on training steps alone: what is outside of them (evaluation, figures, checkpoints) stops it."""

    def __init__(self):
        self.restart()

    def elapsed(self) -> float:
        """Seconds since the last restart."""
        return self._seconds + time.perf_counter() - self._since

    def rate(self) -> float | None:
        """Steps a second since the last restart; None before the first."""
        return self.steps / self.elapsed() if self.steps else None

    def restart(self) -> None:
        self._since = time.perf_counter()
        self._seconds = 0.0
        self.steps = 0  # of which the metrics have arrived

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        self._seconds += time.perf_counter() - self._since
        yield
        self._since = time.perf_counter()


@dataclasses.dataclass
class _InFlight:
    """A step that was dispatched and whose metrics were not yet fetched."""

    step: int  # updates done after it
    metrics: Mapping[str, jax.Array]
    index: np.ndarray  # this process's samples


@dataclasses.dataclass
class _Loop:
    """A running loop: what it works with, and what happens in it."""

    task: TrainingTask
    training: ConfigDict
    workdir: Path
    schedule: Schedule
    checkpoints: Checkpoints
    writer: MetricWriter
    progress: Progress
    iterator: Any
    tally: _Tally
    state: State
    step: int  # updates done, the one in flight included
    batch_size: int = 0  # of a global batch, known after the first
    clock: _Clock = dataclasses.field(default_factory=_Clock)

    def run(self, requested: Callable[[], bool]) -> State:
        """Steps until the end, or until `requested()`, asked after each, says to stop."""
        self._announce()
        if self.step == 0:
            self._draw()
        in_flight, first = None, True
        self.clock.restart()
        while self.step < self.schedule.total:
            dispatched = self._dispatch()
            if in_flight:
                self._collect(in_flight)
            in_flight = dispatched
            if first:
                self._collect(in_flight, timed=False)
                self.progress.message(f'first step: {self.clock.elapsed():.1f} s, most of it compilation')
                self.clock.restart()
                in_flight, first = None, False
            stop = requested()
            if stop or self._something_is_due():
                if in_flight:
                    self._collect(in_flight)
                in_flight = None
                saved = self._duties()
                if stop:
                    self._stop(saved)
        self.checkpoints.wait()
        return self.state

    def _announce(self) -> None:
        total = self.schedule.total
        if self.step >= total:
            self.progress.message(f'{self.workdir} is trained to the end (step {self.step})')
        elif self.step:
            self.progress.message(f'resuming {self.workdir} at step {self.step} of {total}')
        else:
            epochs = total / self.task.batches.steps_per_epoch
            self.progress.message(f'training {total} steps ({epochs:.4g} epochs) into {self.workdir}')

    def _dispatch(self) -> _InFlight:
        """Starts the next step on the devices, without waiting for it."""
        if self.task.before_step:
            with self.clock.paused():
                self.state = self.task.before_step(self.step, self.state)
        batch = next(self.iterator)
        global_batch = self.task.put_batch(batch)
        self.batch_size = jax.tree.leaves(global_batch)[0].shape[0]
        self.state, metrics = self.task.train_step(self.state, global_batch)
        self.step += 1
        return _InFlight(self.step, metrics, batch['index'])

    def _collect(self, done: _InFlight, timed: bool = True) -> None:
        """Waits for a step and adds its metrics to the interval's."""
        metrics = {name: value.item() for name, value in jax.device_get(dict(done.metrics)).items()}
        finite = metrics.pop('finite')
        if not finite and self.training.on_nonfinite == 'stop':
            self._refuse(done, metrics)
        self.tally.add(metrics, finite)
        self.clock.steps += timed
        self.progress.update(done.step, self._headline(metrics), self.clock.rate())

    def _refuse(self, done: _InFlight, metrics: Metrics) -> None:
        terms = [name for name, value in metrics.items() if not math.isfinite(value)]
        index = done.index
        if jax.process_count() > 1:  # of which some may have read the same
            index = np.unique(multihost_utils.process_allgather(index, tiled=True))
        self.checkpoints.wait()
        saved = saved_steps(self.workdir)
        raise InputError(
            f'step {done.step}: {", ".join(terms) or "the gradient"} not finite; samples: '
            f'{", ".join(self.task.batches.ids(index))}. Look at those, lower the learning rate, or set '
            '--config.training.on_nonfinite=skip in another --workdir; '
            + (f'the last checkpoint is of step {saved[-1]}' if saved else 'there is no checkpoint yet')
        )

    def _something_is_due(self) -> bool:
        schedule = self.schedule
        every = (schedule.log, schedule.evaluate, schedule.figures, schedule.checkpoint)
        return any(schedule.due(steps, self.step) for steps in every)

    def _duties(self) -> bool:
        """Logs, evaluates, draws and saves what is due at this step; returns whether it saved."""
        schedule, step = self.schedule, self.step
        if schedule.due(schedule.log, step):
            self._log()
        with self.clock.paused():
            saving = schedule.due(schedule.checkpoint, step)
            scores = self._evaluate() if saving or schedule.due(schedule.evaluate, step) else {}
            if schedule.due(schedule.figures, step):
                self._draw()
            if saving:
                self._save(scores)
        return saving

    def _log(self) -> None:
        means, rate = self.tally.means(), self.clock.rate()
        memory = peak_memory()
        row = {f'train/{name}': value for name, value in means.items()}
        if self.training.on_nonfinite == 'skip':
            row['train/skipped_updates'] = self.tally.all_skipped
        row['perf/peak_memory_gib'] = memory
        if rate:
            row |= {'perf/steps_per_second': rate, 'perf/samples_per_second': rate * self.batch_size}
        self.writer.scalars(self.step, row)
        self.progress.log(self.step, self._headline(means), rate, memory)
        if self.tally.skipped:
            self.progress.message(
                f'warning: {self.tally.skipped} updates skipped since the last line (a loss or gradient was not '
                f'finite), {self.tally.all_skipped} in all'
            )
        for line in self.task.warn(means) if self.task.warn and means else ():
            self.progress.message(f'warning: {line}')
        self.tally = _Tally(all_skipped=self.tally.all_skipped)
        self.clock.restart()

    def _evaluate(self) -> Metrics:
        if not self.task.evaluate:
            return {}
        begin = time.perf_counter()
        scores = {name: float(value) for name, value in self.task.evaluate(self.state).items()}
        seconds = time.perf_counter() - begin
        if not scores:
            return {}
        self.writer.scalars(self.step, scores)
        shown = format_metrics({name: value for name, value in scores.items() if name.count('/') < 2})
        self.progress.message(f'step {self.step}  {shown}  (evaluated in {seconds:.1f} s)')
        return scores

    def _draw(self) -> None:
        if not self.task.figures:
            return
        self.writer.figures(self.step, self.task.figures(self.state))
        if self.step and is_primary():
            curves = viz.curves(read_metrics(self.workdir / METRICS_FILE))
            viz.save_figure(curves, self.workdir / FIGURES_FOLDER / CURVES_FIGURE)

    def _save(self, scores: Metrics) -> None:
        loop = {'iterator': self.iterator.get_state(), 'tally': self.tally.to_json()}
        self.checkpoints.save(self.step, self.state, loop, scores)
        if self.task.describe:
            self.task.describe(self.step)

    def _stop(self, saved: bool) -> None:
        if not saved:
            self._save({})
        self.checkpoints.wait()
        raise Stopped(
            f'stopped after step {self.step} of {self.schedule.total} and saved in {self.workdir}; '
            'the same command again goes on from there'
        )

    def _headline(self, metrics: Metrics) -> Metrics:
        return {name: metrics[name] for name in self.task.headline if name in metrics}


def peak_memory() -> float:
    """Most memory used so far, in GiB: of the fullest local device, or of this process on a CPU."""
    stats = [device.memory_stats() for device in jax.local_devices()]
    peaks = [stat['peak_bytes_in_use'] for stat in stats if stat and 'peak_bytes_in_use' in stat]
    if peaks:
        return max(peaks) / 2**30
    unit = 1 if sys.platform == 'darwin' else 2**10  # of ru_maxrss
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
