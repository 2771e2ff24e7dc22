"""The command `classifier`: whether synthetic ROIs make a classifier of real ones better.

two sets (data.roi_sets) -> for each arm and run: pre-training, training [the loop] -> the test split -> a table

An arm may begin with the features of given weights (transfer), and leave them as they are.
Each part has a folder of its own and is not done again once its `result.json` is there, so an experiment goes on where
it was stopped, with the ROIs that it began with.
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from ml_collections import ConfigDict
from scipy import stats

from vqroi_jax import losses, report, transfer, viz
from vqroi_jax.data import pipeline
from vqroi_jax.data.roi_sets import RoiSet, open_sets
from vqroi_jax.errors import InputError, fields_of
from vqroi_jax.experiment import Part, Rois, check_disjoint, counted, generators, plan, provenance, tested_rois
from vqroi_jax.metrics import classification
from vqroi_jax.models import resnet3d
from vqroi_jax.stopping import sigterm_interrupts
from vqroi_jax.training import classifier, loop, optimizers, partitioning
from vqroi_jax.training.checkpoints import CHECKPOINTS_FOLDER, read_checkpoint
from vqroi_jax.training.durations import to_steps
from vqroi_jax.workdir import is_primary, open_workdir, write_atomically

METRICS_FILE = 'metrics.json'
REPORT_FILE = 'report.html'
RESULT_FILE = 'result.json'  # of a part
INPUTS_FILE = 'sets.json'  # which ROIs and weights the parts were begun with
FORMAT = 1
STAGES = ('pretrain', 'finetune')
EVALUATED = ('val/loss', 'val/accuracy')


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/classifier.py`."""
    with open_workdir(workdir, config) as folder, sigterm_interrupts():
        mesh = check_settings(config)
        arms = [config.baseline, *(name for name in config.arms if name != config.baseline)]
        starts = {name: read_start(config, name) for name in arms}
        with open_sets(config.real, config.fake or config.real, config, folder, some=True) as sets:
            test = tested_rois(sets)
            parts = {(name, number): plan(config, name, number, sets) for name in arms for number in range(config.runs)}
            for (name, _), run_parts in parts.items():
                check_disjoint(test, run_parts, starts[name])
                for stage, part in run_parts.items():
                    with fields_of(stage):
                        loop.Schedule.read(
                            config[stage].training, len(part.train) / config[stage].batch_size, EVALUATED
                        )
            origin = provenance(test, parts.values())
            if is_primary():
                keep_inputs(config, sets, starts, folder)
                if origin:
                    print(origin)
            results: dict[str, list[dict]] = {name: [] for name in arms}
            for (name, number), run_parts in parts.items():
                where = folder / 'parts' / name / f'run_{number}'
                results[name].append(run_arm(config, name, number, run_parts, test, where, mesh, starts[name]))
            if is_primary():
                found = summarise(config, results, sets[0].classes)
                found |= {'real': sets[0].describe(), 'fake': sets[1].describe() if config.fake else None}
                found['test'], found['provenance'] = counted(test), origin
                for name, arm in found['arms'].items():
                    arm['rois'] = rois_of([parts[name, number] for number in range(config.runs)])
                    start = starts[name]
                    arm['weights'] = start and start.fact
                leave(found, folder)


def keep_inputs(
    config: ConfigDict, sets: tuple[RoiSet, RoiSet], starts: Mapping[str, transfer.Weights | None], folder: Path
) -> None:
    """Records which ROIs and weights an experiment begins with, or compares with those that it was begun with.

    Raises:
        InputError: something has changed since then; parts that are done would be mixed with others.
    """
    path, (real, fake) = folder / INPUTS_FILE, sets
    now, given = {'real': real.sha256, 'fake': fake.sha256}, {'real': real.path, 'fake': fake.path}
    now |= {f'arms.{name}.weights': start.sha256 for name, start in starts.items() if start}
    given |= {f'arms.{name}.weights': config.arms[name].weights for name in starts}
    if not path.exists():
        write_atomically(path, json.dumps(now, indent=1) + '\n')
        return
    there = json.loads(path.read_text(encoding='utf-8'))
    for name, sha256 in now.items():
        if name in there and there[name] != sha256:  # an experiment of old has recorded no weights
            raise InputError(
                f'config.{name}={given[name]} has changed since the experiment in {folder} was begun: other ROIs, '
                'classes, splits or weights; bring back what it was, or name another --workdir'
            )


def rois_of(runs: Sequence[Mapping[str, Part]]) -> dict[str, list[dict]]:
    """How many ROIs an arm's runs learn from and are validated on: by stage a list of runs, as `counted` counts."""
    return {
        stage: [{'train': counted(run[stage].train), 'validation': counted(run[stage].validation)} for run in runs]
        for stage in runs[0]
    }


def leave(found: Mapping, folder: Path) -> None:
    """Writes what an experiment has found, and prints its table."""
    counts = {name: np.array(arm['confusion']) for name, arm in found['arms'].items()}
    roc = viz.roc(found['roc'])
    viz.save_figure(roc, folder / 'figures' / 'roc.png')
    viz.save_figure(viz.confusion(counts, found['classes']), folder / 'figures' / 'confusion.png')
    confusions = {name: viz.confusion({name: matrix}, found['classes']) for name, matrix in counts.items()}
    write_atomically(folder / REPORT_FILE, report.render_experiment(found, roc, confusions))
    # Last, for it says that all is done.
    write_atomically(folder / METRICS_FILE, json.dumps(found, indent=2, allow_nan=False) + '\n')
    print(table(found))
    print(f'Open {folder / REPORT_FILE}')


def check_settings(config: ConfigDict) -> Mesh:
    """Refuses settings that cannot be used, before anything is read; the mesh of the others."""
    choices = (
        ('model.depth', config.model.depth, tuple(resnet3d.BLOCKS)),
        ('model.shortcut', config.model.shortcut, resnet3d.SHORTCUTS),
        ('model.layout', config.model.layout, tuple(resnet3d.LAYOUTS)),
        ('dtype', config.dtype, ('float32', 'bfloat16')),
    )
    for field, value, known in choices:
        if value not in known:
            raise InputError(f'config.{field}={value!r} is none of {", ".join(map(str, known))}')
    for width in (config.model.width, *config.model.hidden):
        if not isinstance(width, int) or width < 1:
            raise InputError(f'config.model: {width!r} among width and hidden; expected whole numbers of at least 1')
    if config.seed < 0:
        raise InputError(f'config.seed={config.seed}: expected 0 or more')
    if config.runs < 2:
        raise InputError(f'config.runs={config.runs}: at least 2 are needed for a standard deviation')
    if not 0 < config.validation < 1 / config.runs:
        raise InputError(
            f'config.validation={config.validation}: expected a share above 0 and under 1 / config.runs, as the '
            'validation sets of the runs are disjoint'
        )
    if config.baseline not in config.arms:
        raise InputError(f'config.baseline={config.baseline!r} is none of {", ".join(config.arms)}')
    for name, arm in config.arms.items():
        if arm.pretrain_synthetic and not config.fake:
            raise InputError(f'config.fake is empty, but the arm {name} wants synthetic ROIs')
        if arm.frozen and not arm.weights:
            raise InputError(
                f'config.arms.{name}.weights is empty, but its features are frozen: name the folder of a part of an '
                'earlier experiment, or a file of MedicalNet'
            )
    mesh = partitioning.make_mesh(config.mesh)
    for stage in STAGES:
        optimizers.check(config[stage].optimizer, f'config.{stage}.optimizer')
        partitioning.check_batch(f'{stage}.batch_size', config[stage].batch_size, 1, mesh)
    return mesh


def make_model(config: ConfigDict, classes: int) -> resnet3d.ResNet3D:
    """The network of an experiment."""
    return resnet3d.ResNet3D(classes=classes, dtype=jnp.dtype(config.dtype), **config.model)


def read_start(config: ConfigDict, name: str) -> transfer.Weights | None:
    """What the features of an arm begin with; None: they are drawn.

    Raises:
        InputError: its weights cannot be read or are of another network.
    """
    path = config.arms[name].weights
    return transfer.read(path, make_model(config, classes=2)) if path else None  # classes are of the head alone


def run_arm(
    config: ConfigDict,
    name: str,
    number: int,
    parts: Mapping[str, Part],
    test: Rois,
    folder: Path,
    mesh: Mesh,
    weights: transfer.Weights | None,
) -> dict:
    """Trains one run of an arm, stage by stage, and tries it on the test split; what is done already is read.

    Args:
        config: of the experiment.
        name: of the arm.
        number: of the run.
        parts: its stages by name.
        test: the test ROIs.
        folder: where to.
        mesh: of the run.
        weights: to begin with; None: drawn.

    Returns:
        `ids`, `labels` and `probabilities` of the test ROIs, and `figures`.
    """
    path = folder / RESULT_FILE
    if path.exists():
        return json.loads(path.read_text(encoding='utf-8'))
    for stage, part in parts.items():
        sizes = (report.sizes([counted(rois)]) for rois in (part.train, part.validation))
        if is_primary():
            print(f'{name}, run {number + 1} of {config.runs}, {stage}: ' + ', validated on '.join(sizes))
        weights, recipe = train_stage(config, config.arms[name], number, stage, part, folder / stage, mesh, weights)
    assert weights is not None  # the last stage's
    rows = config.finetune.batch_size
    logits = logits_of(recipe, mesh, rows)(weights.params, weights.statistics, test)
    probabilities = np.asarray(jax.nn.softmax(logits, axis=-1))
    result = {
        'ids': list(test.ids),
        'labels': test.labels.tolist(),
        'probabilities': probabilities.astype(float).tolist(),
        'figures': classification.figures(probabilities, test.labels),
    }
    if is_primary():
        write_atomically(path, json.dumps(result, indent=1) + '\n')
    return result


def train_stage(
    config: ConfigDict,
    arm: ConfigDict,
    number: int,
    stage: str,
    part: Part,
    folder: Path,
    mesh: Mesh,
    start: transfer.Weights | None,
) -> tuple[transfer.Weights, classifier.Recipe]:
    """Trains one stage of a run, in a run's folder of its own.

    Args:
        config: of the experiment.
        arm: of the run, a block of `config.arms`.
        number: of the run.
        stage: one of `STAGES`.
        part: what it learns from.
        folder: where to.
        mesh: of the run.
        start: weights to begin with; layers that it lacks are drawn. None: all are.

    Returns:
        The weights of the best checkpoint, and the recipe.
    """
    settings, classes = config[stage], len(part.train.sets[0].classes)
    seed = config.seed + number
    batches = pipeline.Batches(part.train, settings.batch_size, seed, **partitioning.this_process(mesh))
    steps = to_steps(settings.training.duration, batches.steps_per_epoch, f'config.{stage}.training.duration')
    counts = np.maximum(np.bincount(part.train.labels, minlength=classes), 1)
    recipe = classifier.Recipe(
        model=make_model(config, classes),
        optimizer=optimizers.make_optimizer(settings.optimizer),
        rate=optimizers.cosine_rate(settings.optimizer, steps),
        alpha=tuple((counts.sum() / (classes * counts)).tolist()),
        gamma=config.gamma,
        augment=config.augment if arm.augment else None,
        spacing=part.train.sets[0].spacing,
        seed=seed,
        frozen=arm.frozen,
    )
    # The stage's own config and ROIs, so that its folder can be read like any run's, and its weights used again.
    own = {'task': f'classifier.{stage}', 'run': number, 'model': config.model.to_dict(), **settings.to_dict()}
    made_from = generators(part, start)
    patients = part.train.patients | part.validation.patients | (start.patients if start else frozenset())
    with open_workdir(folder, ConfigDict(own), goes_on_from=CHECKPOINTS_FOLDER):
        if is_primary():
            learnt = {
                'patients': sorted(patients),  # those of the weights that it began with included
                'generators': None if made_from is None else sorted(made_from),  # likewise
                'train': part.train.ids,
                'validation': part.validation.ids,
            }
            write_atomically(folder / transfer.ROIS_FILE, json.dumps(learnt, indent=1) + '\n')
        given = {'params': start.params, 'statistics': start.statistics} if start else None
        size = part.train.sets[0].volumes.shape[1:]
        task = loop.TrainingTask(
            shapes=partitioning.placed_shapes(classifier.state_shapes(recipe, size), partitioning.replicated(mesh)),
            create=lambda: classifier.create_state(recipe, size, mesh, given),
            train_step=classifier.make_train_step(recipe, mesh),
            batches=batches,
            put_batch=lambda batch: partitioning.put_batch({name: batch[name] for name in ('volume', 'label')}, mesh),
            evaluate=make_evaluation(recipe, part.validation, settings.batch_size, mesh),
            headline=('loss', 'accuracy'),
            evaluated=EVALUATED,
        )
        loop.train(task, settings.training, folder)
    step, best = read_checkpoint(folder, ('params', 'statistics'), 'best')
    learnt_by = transfer.Weights(
        **best, patients=frozenset(patients), generators=made_from, fact=f'{folder}, step {step}'
    )
    return learnt_by, recipe


def logits_of(recipe: classifier.Recipe, mesh: Mesh, batch: int) -> Callable[..., np.ndarray]:
    """A function from parameters, statistics and ROIs to logits float32 [n, classes]."""
    forward = classifier.make_logits(recipe, mesh)

    def logits(params: dict, statistics: dict, rois: Rois) -> np.ndarray:
        parts = []
        for rows in pipeline.eval_batches(rois, batch, **partitioning.this_process(mesh)):
            volume = partitioning.put_batch({'volume': rows['volume']}, mesh)['volume']
            parts.append(partitioning.gather(forward(params, statistics, volume)))
        return np.concatenate(parts)[: len(rois)]

    return logits


def make_evaluation(
    recipe: classifier.Recipe, rois: Rois, batch: int, mesh: Mesh
) -> Callable[[classifier.ClassifierState], dict[str, float]]:
    """A function that measures the focal loss and the accuracy on the validation ROIs."""
    logits_on, labels = logits_of(recipe, mesh, batch), rois.labels

    def evaluate(state: classifier.ClassifierState) -> dict[str, float]:
        logits = logits_on(state.params, state.statistics, rois)
        loss = losses.focal(jnp.asarray(logits), jnp.asarray(labels), jnp.asarray(recipe.alpha), recipe.gamma)
        accuracy = np.mean(np.argmax(logits, axis=1) == labels)
        return dict(zip(EVALUATED, (float(loss.mean()), float(accuracy)), strict=True))

    return evaluate


def summarise(config: ConfigDict, results: Mapping[str, Sequence[Mapping]], classes: Sequence[str]) -> dict:
    """The experiment's table, as JSON has it.

    Args:
        config: of the experiment.
        results: by arm, what `run_arm` returned for each run.
        classes: names.

    Returns:
        By arm: `mean` and `sd` of each figure over the runs; `p`, of a two-sided t-test against the baseline (None for
        that itself, and where neither arm's runs differ); of the probabilities averaged over the runs, `auc` with
        DeLong's 95 % interval; `confusion`, added over the runs. And `roc`, curves of the averaged probabilities.
    """
    arms, curves, baseline = {}, {}, results[config.baseline]
    positive = 1 if len(classes) == 2 else None
    for name, runs in results.items():
        values = {figure: [run['figures'][figure] for run in runs] for figure in report.FIGURES}
        mean = np.mean([run['probabilities'] for run in runs], axis=0)
        labels = np.array(runs[0]['labels'])
        arms[name] = {
            'mean': {figure: float(np.mean(some)) for figure, some in values.items()},
            'sd': {figure: float(np.std(some, ddof=1)) for figure, some in values.items()},
            'p': {
                figure: _p_value(some, [run['figures'][figure] for run in baseline]) if runs is not baseline else None
                for figure, some in values.items()
            },
            'auc_of_averages': {
                label: classification.auc(mean[:, number], labels == number)._asdict()
                for number, label in enumerate(classes)
                if positive in (None, number)
            },
            'confusion': np.sum(
                [
                    classification.confusion(np.argmax(run['probabilities'], axis=1), labels, len(classes))
                    for run in runs
                ],
                axis=0,
            ).tolist(),
        }
        for number, label in enumerate(classes):
            if positive in (None, number):
                curve = classification.roc_curve(mean[:, number], labels == number)
                curves[name if positive else f'{name}, {label}'] = [axis.tolist() for axis in curve]
    return {
        'format': FORMAT,
        'config': config.to_dict(),
        'classes': list(classes),
        'positive': classes[1] if positive else None,
        'runs': config.runs,
        'baseline': config.baseline,
        'arms': arms,
        'roc': curves,
    }


def _p_value(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    if np.ptp(ours) == 0 and np.ptp(theirs) == 0:
        return None
    # From means and deviations: of nearly equal runs, SciPy's other form warns on the user's terminal.
    sides = (moment for some in (ours, theirs) for moment in (np.mean(some), np.std(some, ddof=1), len(some)))
    value = float(stats.ttest_ind_from_stats(*sides).pvalue)
    return value if math.isfinite(value) else None


def table(found: Mapping) -> str:
    """The table as lines of text: an arm a line, mean ± standard deviation over the runs, and p where there is one."""
    width = 24
    lines = [
        '',
        f'{found["runs"]} runs each, on the test split; p against {found["baseline"]}'
        + (f'; {found["positive"]} is positive' if found['positive'] else ''),
    ]
    lines.append(f'{"":28}' + ''.join(f'{name:>{width}}' for name in report.FIGURES))
    for name, arm in found['arms'].items():
        cells = []
        for figure in report.FIGURES:
            p = arm['p'][figure]
            cells.append(
                f'{arm["mean"][figure]:.3f} ± {arm["sd"][figure]:.3f}' + (f' p={p:.2g}' if p is not None else '')
            )
        lines.append(f'{name:28}' + ''.join(f'{cell:>{width}}' for cell in cells))
    return '\n'.join([*lines, ''])
