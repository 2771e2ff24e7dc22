"""The checkpoints of a run: `checkpoints/STEP/`, each whole, the last and the best kept.

A checkpoint is Orbax's and has two parts: `state`, the training state with all its shards, and `loop`, what the loop
must know to go on as if it had never stopped (JSON). The loop writes and restores through `Checkpoints`; later stages
and evaluations read single fields of a finished run with `read_checkpoint`.
"""

import contextlib
import functools
import gc
import json
import math
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

import jax
import numpy as np
import orbax.checkpoint as ocp
from jax.experimental import multihost_utils
from ml_collections import ConfigDict

from vqroi_jax.errors import InputError
from vqroi_jax.training import partitioning
from vqroi_jax.workdir import is_primary, read_config, require_space

CHECKPOINTS_FOLDER = 'checkpoints'
UNREADABLE = 'unreadable-'  # prefix of the folder of a checkpoint that was set aside

_LINE = 128  # bytes of what a process says of a checkpoint that it cannot read


class _Manager(ocp.CheckpointManager):
    """Orbax's, but for its questions whether the machine is being preempted.

    JAX's service counts them, and Orbax would number its own by the step: a run's (`vqroi_jax.stopping`), which has
    numbers of its own, would then agree on an end long after the present step, or before it, which never comes.
    """

    def reached_preemption(self, step: int) -> bool:
        return False


class Checkpoints:
    """Saves and restores the checkpoints of one run; a context manager, which waits for what is being written.

    Args:
        workdir: the run's folder.
        training: the config's block, of which `keep_last` (checkpoints, at least 1), `keep_best` (checkpoints, may
            be 0), `best_metric` (a name among the evaluation's metrics) and `best_mode` ('min' or 'max') are used.
    """

    def __init__(self, workdir: Path, training: ConfigDict):
        self._folder = workdir.absolute() / CHECKPOINTS_FOLDER
        self._training = training

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *unused: object) -> None:
        if '_manager' in vars(self):
            self._manager.close()

    @functools.cached_property
    def _manager(self) -> _Manager:
        """Opened after `restore` has set the unreadable aside: Orbax opens no folder that has a damaged one."""
        training = self._training
        worst = math.inf if training.best_mode == 'min' else -math.inf

        def metric(metrics: dict[str, float]) -> float:
            return metrics.get(training.best_metric, worst)

        policies = ocp.checkpoint_managers
        last = policies.LatestN(training.keep_last)
        best = policies.BestN(get_metric_fn=metric, reverse=training.best_mode == 'min', n=training.keep_best)
        options = ocp.CheckpointManagerOptions(
            best_fn=metric,  # without it Orbax does not store the metrics
            best_mode=training.best_mode,
            preservation_policy=policies.AnyPreservationPolicy([last, best]),
            cleanup_tmp_directories=True,
        )
        return _Manager(self._folder, options=options, item_names=('state', 'loop'))

    def restore(self, state: Any) -> tuple[Any, dict[str, Any], list[str]] | None:
        """The newest checkpoint that can be read; newer ones are set aside under another name, not deleted.

        Of several processes of a run each reads its own shards: a checkpoint can be read if all of them could.

        Args:
            state: or its shapes, whose structure, shapes, types and shardings the result has.

        Returns:
            The state, what `save` got as `loop`, and a line on each checkpoint that could not be read; None if there
            is no checkpoint at all.

        Raises:
            InputError: there are checkpoints and none can be read, or the newest readable one has other shapes.
        """
        abstract = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), state)
        unreadable, steps = {}, _steps_of_primary(self._folder)
        for step in reversed(steps):
            found, problem = None, ''
            with _first_error_only():
                try:
                    found = _restore(self._folder / str(step), abstract)
                except (InputError, jax.errors.JaxRuntimeError):
                    raise
                except Exception as error:  # Orbax raises whatever the reading of a damaged file happens to raise
                    problem = _first_line(error)
            problems = _of_all_processes(problem)
            if found is None or any(problems):
                unreadable[step] = next(filter(None, problems))
                continue
            restored, loop = found
            for older in steps[: steps.index(step)]:  # kept as the best ones are, by these
                if problems := list(filter(None, _of_all_processes(_fault_of_metrics(self._folder / str(older))))):
                    unreadable[older] = problems[0]
            _set_aside(self._folder, list(unreadable))
            lines = [
                f'checkpoint {self._folder / str(bad)} cannot be read ({why}); set aside, going on from step {step}'
                for bad, why in unreadable.items()
            ]
            return restored, loop, lines
        if unreadable:
            raise InputError(
                f'{self._folder}: no checkpoint can be read (steps {", ".join(map(str, unreadable))}; '
                f'{next(iter(unreadable.values()))}); restore the files, or name another --workdir'
            )
        return None

    def save(self, step: int, state: Any, loop: dict[str, Any], metrics: dict[str, float]) -> None:
        """Begins to write a checkpoint; returns once `state` may be given away (donated).

        Args:
            step: updates done.
            state: of them.
            loop: what the loop needs to go on; anything that JSON can hold.
            metrics: the evaluation of this very state; without the best metric it does not count among the best.

        Raises:
            InputError: the disk has no room for it.
        """
        if is_primary():
            require_space(self._folder.parent, checkpoint_bytes(state), f'the checkpoint of step {step}')
        ranked = {name: value for name, value in metrics.items() if math.isfinite(value)}
        item = ocp.args.Composite(state=ocp.args.StandardSave(state), loop=ocp.args.JsonSave(loop))
        self._manager.save(step, args=item, metrics=ranked)

    def wait(self) -> None:
        """Waits until everything is on disk."""
        if '_manager' in vars(self):
            self._manager.wait_until_finished()


def checkpoint_bytes(state: Any) -> int:
    """Size of a checkpoint of `state`, or of its shapes, on disk in bytes; an upper bound, for it is compressed."""
    return sum(array.size * array.dtype.itemsize for array in jax.tree.leaves(state)) + 2**20


def saved_steps(workdir: str | Path) -> list[int]:
    """Steps of a run's checkpoints, in order; empty if there are none."""
    return _steps(Path(workdir) / CHECKPOINTS_FOLDER)


def best_step(workdir: str | Path) -> int:
    """Step of the best checkpoint by the run's own `training.best_metric`.

    Raises:
        InputError: no checkpoint of this run was evaluated.
    """
    training = read_config(workdir).training
    scores = {}
    for step in saved_steps(workdir):
        checkpoint = Path(workdir) / CHECKPOINTS_FOLDER / str(step)
        try:
            metrics = _metrics(checkpoint)
        except ValueError as error:
            raise InputError(f'{checkpoint} has damaged metrics ({error}); name the step of another') from None
        if training.best_metric in metrics:
            scores[step] = metrics[training.best_metric]
    if not scores:
        raise InputError(f'{workdir}: no checkpoint has {training.best_metric}; take the latest, or train on')
    return (min if training.best_mode == 'min' else max)(scores, key=scores.__getitem__)


def read_checkpoint(
    workdir: str | Path, fields: Sequence[str], step: int | str = 'latest'
) -> tuple[int, dict[str, Any]]:
    """Reads fields of a run's training state, whatever devices it was trained on.

    Args:
        workdir: the run's folder.
        fields: names of the state's fields, e.g. ('params', 'codebook').
        step: a step that has a checkpoint, 'latest' or 'best'.

    Returns:
        The step, and the fields as nested dicts of NumPy arrays.

    Raises:
        InputError: no such checkpoint or field, or it cannot be read.
    """
    steps = saved_steps(workdir)
    if not steps:
        raise InputError(f'{workdir} holds no checkpoints; train it first')
    if step in ('latest', 'best'):
        step = steps[-1] if step == 'latest' else best_step(workdir)
    if step not in steps:
        raise InputError(f'{workdir} has no checkpoint of step {step}; there are {", ".join(map(str, steps))}')
    checkpoint = Path(workdir).absolute() / CHECKPOINTS_FOLDER / str(step)
    with _first_error_only(), _reader(ocp.PyTreeCheckpointHandler()) as reader:
        try:
            stored = reader.metadata(checkpoint).item_metadata['state'].tree
            missing = [field for field in fields if field not in stored]
            if missing:
                raise InputError(f'{checkpoint} has no {missing[0]!r}; there are {", ".join(sorted(stored))}')
            wanted = {field: stored[field] for field in fields}
            item = jax.tree.map(lambda array: jax.ShapeDtypeStruct(array.shape, array.dtype), wanted)
            as_numpy = jax.tree.map(lambda array: ocp.RestoreArgs(restore_type=np.ndarray), wanted)
            args = ocp.args.PyTreeRestore(item=item, restore_args=as_numpy, partial_restore=True)
            return step, reader.restore(checkpoint, args=ocp.args.Composite(state=args)).state
        except InputError:
            raise
        except Exception as error:  # as in Checkpoints.restore
            raise InputError(f'{checkpoint} cannot be read ({_first_line(error)}); take another step') from error


def _metrics(checkpoint: Path) -> dict[str, float]:
    """What was measured of a checkpoint; empty if nothing was.

    Raises:
        ValueError: the file is damaged.
    """
    try:
        return json.loads((checkpoint / 'metrics' / 'metrics').read_text(encoding='utf-8'))
    except FileNotFoundError:
        return {}


def _fault_of_metrics(checkpoint: Path) -> str:
    """Why a checkpoint's metrics cannot be read; empty if they can."""
    try:
        _metrics(checkpoint)
    except (OSError, ValueError) as error:
        return _first_line(error)
    return ''


def _steps(folder: Path) -> list[int]:
    """Steps of the checkpoints in a folder; Orbax names one by its step once it is whole."""
    return sorted(int(path.name) for path in folder.glob('*') if path.name.isdigit())


def _steps_of_primary(folder: Path) -> list[int]:
    """The steps that the primary process sees, on all processes of the run, whose file systems may be late."""
    steps = _steps(folder)
    number = int(partitioning.from_primary(np.asarray(len(steps))))
    return partitioning.from_primary(np.resize(np.asarray(steps, np.int32), number)).tolist()


def _of_all_processes(text: str) -> list[str]:
    """A short text of each process of the run, on all of them."""
    if jax.process_count() == 1:
        return [text]
    line = np.frombuffer(text.encode()[:_LINE].ljust(_LINE, b'\0'), np.uint8)
    lines = multihost_utils.process_allgather(line)
    return [row.tobytes().rstrip(b'\0').decode(errors='replace') for row in lines]


def _reader(state: ocp.CheckpointHandler) -> contextlib.closing[ocp.CompositeCheckpointHandler]:
    """Reads checkpoints, their `state` with the given handler; a context manager.

    It is Orbax's handler without the checkpointer around it, which after reading would wait for the other processes,
    those included that could not read.
    """
    metrics = ocp.JsonCheckpointHandler('metrics')
    return contextlib.closing(
        ocp.CompositeCheckpointHandler(state=state, loop=ocp.JsonCheckpointHandler(), metrics=metrics)
    )


def _restore(checkpoint: Path, abstract: Any) -> tuple[Any, dict[str, Any]]:
    """Reads every part of a checkpoint, so that damage in any shows here."""
    with _reader(ocp.StandardCheckpointHandler()) as reader:
        _compare(checkpoint, reader.metadata(checkpoint).item_metadata['state'].tree, abstract)
        parts = {'loop': ocp.args.JsonRestore(), 'metrics': ocp.args.JsonRestore()}
        args = ocp.args.Composite(state=ocp.args.StandardRestore(abstract), **parts)
        restored = reader.restore(checkpoint, args=args)
        return restored.state, restored.loop


@contextlib.contextmanager
def _first_error_only() -> Iterator[None]:
    """Arrays are read side by side; where one cannot be, Python would print pages on each of the others."""
    hooks = sys.unraisablehook, sys.excepthook
    sys.unraisablehook = lambda unraisable: None
    sys.excepthook = lambda kind, error, traceback: None
    try:
        yield
    finally:
        gc.collect()  # what was left of the reading reports itself now
        sys.unraisablehook, sys.excepthook = hooks


def _first_line(error: Exception) -> str:
    return str(error).strip().partition('\n')[0][:100] or type(error).__name__


def _set_aside(folder: Path, steps: Sequence[int]) -> None:
    """Renames checkpoints, so that nobody takes them for good ones and their steps can be saved again."""
    if is_primary():
        for step in steps:
            number = sum(1 for _ in folder.glob(f'{UNREADABLE}{step}*'))
            (folder / str(step)).rename(folder / f'{UNREADABLE}{step}-{number}')
    if jax.process_count() > 1:
        multihost_utils.sync_global_devices('checkpoints set aside')


def _compare(checkpoint: Path, stored: Any, abstract: Any) -> None:
    """Refuses a checkpoint that is not of this state, naming the first array that differs."""
    there, here = (
        {jax.tree_util.keystr(path, simple=True, separator='/'): (tuple(leaf.shape), str(np.dtype(leaf.dtype)))
         for path, leaf in jax.tree_util.tree_flatten_with_path(tree)[0]}
        for tree in (stored, abstract)
    )  # fmt: skip
    for name in sorted(there.keys() | here.keys()):
        if there.get(name) != here.get(name):
            raise InputError(
                f'{checkpoint} is not of this model: {name} is {there.get(name, "absent")} in it and '
                f'{here.get(name, "absent")} here; name another --workdir'
            )
