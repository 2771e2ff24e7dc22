"""The command `classifier`: whether synthetic ROIs make a classifier of real ones better.

two sets (data.roi_sets) -> for each arm and run: pre-training, training [the loop] -> the test split -> a table

Each part has a folder of its own and is not done again once its `result.json` is there, so an experiment goes on where
it was stopped.
"""

import dataclasses
import functools
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

from vqroi_jax import losses, viz
from vqroi_jax.data import pipeline
from vqroi_jax.data.roi_sets import RoiSet, open_sets
from vqroi_jax.errors import InputError
from vqroi_jax.metrics import classification
from vqroi_jax.models import resnet3d
from vqroi_jax.training import classifier, loop, optimizers, partitioning
from vqroi_jax.training.checkpoints import read_checkpoint
from vqroi_jax.training.durations import to_steps
from vqroi_jax.workdir import is_primary, open_workdir, write_atomically

METRICS_FILE = 'metrics.json'
RESULT_FILE = 'result.json'  # of a part
FORMAT = 1
FIGURES = ('auc', 'f1', 'accuracy', 'precision', 'recall')
STAGES = ('pretrain', 'finetune')


@dataclasses.dataclass(frozen=True)
class Rois:
    """Some rows of the two sets, as `pipeline.Batches` and `pipeline.eval_batches` read them.

    Attributes:
        name: of the part that they play.
        sets: the real and the synthetic set.
        rows: int [n, 2]: which set, and which of its rows.
    """

    name: str
    sets: tuple[RoiSet, RoiSet]
    rows: np.ndarray

    def __len__(self) -> int:
        return len(self.rows)

    @functools.cached_property
    def ids(self) -> tuple[str, ...]:
        """Names of the ROIs."""
        return tuple(self.sets[which].ids[row] for which, row in self.rows)

    @functools.cached_property
    def labels(self) -> np.ndarray:
        """int32 [n]."""
        return np.array([self.sets[which].labels[row] for which, row in self.rows], np.int32)

    @property
    def patients(self) -> set[str]:
        """Patients of the real ones."""
        return {self.sets[0].patients[row] for which, row in self.rows if which == 0}

    def load(self, index: np.ndarray) -> dict[str, np.ndarray]:
        """volume float32 [b,D,H,W,1] in [-1, 1], label and index int32 [b]."""
        volumes = np.stack([self.sets[which].volumes[row] for which, row in self.rows[index]])
        return {'volume': volumes[..., None], 'label': self.labels[index], 'index': index.astype(np.int32)}


@dataclasses.dataclass(frozen=True)
class Part:
    """One stage of one run of an arm: what it learns from and what it is validated on."""

    train: Rois
    validation: Rois


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/classifier.py`."""
    with open_workdir(workdir, config) as folder:
        mesh = check_settings(config)
        with open_sets(config.real, config.fake or config.real, config, folder) as sets:
            test = tested_rois(sets)
            parts = {
                (name, number): plan(config, name, number, sets)
                for name in config.arms
                for number in range(config.runs)
            }
            for run_parts in parts.values():
                for part in run_parts.values():
                    check_disjoint(test, part)
            results = {name: [] for name in config.arms}
            for (name, number), run_parts in parts.items():
                where = folder / 'parts' / name / f'run_{number}'
                results[name].append(run_arm(config, name, number, run_parts, test, where, mesh))
        if is_primary():
            found = summarise(config, results, sets[0].classes)
            write_atomically(folder / METRICS_FILE, json.dumps(found, indent=2, allow_nan=False) + '\n')
            for figure, name in (
                (viz.roc(found['roc']), 'roc'),
                (viz.confusion(_counts(found), found['classes']), 'confusion'),
            ):
                viz.save_figure(figure, folder / 'figures' / f'{name}.png')
            print(table(found))
            print(f'Look at {folder / "figures" / "roc.png"} and {folder / "figures" / "confusion.png"}')


def check_settings(config: ConfigDict) -> Mesh:
    """Refuses settings that cannot be used, before anything is read; the mesh of the others."""
    choices = (
        ('model.depth', config.model.depth, tuple(resnet3d.BLOCKS)),
        ('model.shortcut', config.model.shortcut, resnet3d.SHORTCUTS),
        ('dtype', config.dtype, ('float32', 'bfloat16')),
    )
    for field, value, known in choices:
        if value not in known:
            raise InputError(f'config.{field}={value!r} is none of {", ".join(map(str, known))}')
    if config.seed < 0:
        raise InputError(f'config.seed={config.seed}: expected 0 or more')
    if config.runs < 2:
        raise InputError(f'config.runs={config.runs}: at least 2 are needed for a standard deviation')
    if not 0 < config.validation < 1 / config.runs:
        raise InputError(
            f'config.validation={config.validation}: expected a share above 0 and under 1 / config.runs, as the '
            'validation sets of the runs are disjoint'
        )
    for name, arm in config.arms.items():
        if arm.pretrain_synthetic and not config.fake:
            raise InputError(f'config.fake is empty, but the arm {name} wants synthetic ROIs')
    mesh = partitioning.make_mesh(config.mesh)
    for stage in STAGES:
        partitioning.check_batch(f'{stage}.batch_size', config[stage].batch_size, 1, mesh)
    return mesh


def tested_rois(sets: tuple[RoiSet, RoiSet]) -> Rois:
    """The test split of the real set.

    Raises:
        InputError: the real set has no splits, or too few test ROIs of a class.
    """
    real = sets[0]
    if real.splits is None:
        raise InputError(
            f'config.real={real.path}: a prepared cohort is needed, for its splits; see configs/prepare.py'
        )
    if len(real.classes) < 2:
        raise InputError(f'config.real={real.path} has one class, {real.classes[0]}; two at least can be told apart')
    rows = real.among('test')
    for number, label in enumerate(real.classes):
        if (count := np.sum(real.labels[rows] == number)) < 2:
            raise InputError(
                f'config.real={real.path} has {count} test ROIs of class {label}; at least 2 are needed: prepare the '
                'cohort with a larger data.split.test'
            )
    return Rois('test', sets, _pairs(0, rows))


def plan(config: ConfigDict, name: str, number: int, sets: tuple[RoiSet, RoiSet]) -> dict[str, Part]:
    """The stages of a run of an arm, by name, and what each learns from.

    The real ROIs for training are the same in all runs and in all arms that want as many; those for pre-training are
    taken from what is left. Each stage keeps a share of each class for validation, another in each run.

    Raises:
        InputError: there are not so many ROIs as the arm wants.
    """
    arm, real = config.arms[name], sets[0]
    for field in ('pretrain_real', 'pretrain_synthetic'):
        if unknown := [label for label in arm[field] if label not in real.classes]:
            raise InputError(f'config.arms.{name}.{field}: class {unknown[0]!r} is none of {", ".join(real.classes)}')
    wanted = {'finetune': [], 'pretrain': []}
    for label, title in enumerate(real.classes):
        rng = np.random.default_rng([config.seed, label])
        there = rng.permutation(np.intersect1d(real.of(label), real.among('train', 'val')))
        made = rng.permutation(sets[1].of(label))
        kept = _take(there, arm.rois, f'arm {name}: real ROIs of class {title}')
        wanted['finetune'].append(_pairs(0, kept))
        left = there[len(kept) :]
        for field, which, rows in (('pretrain_real', 0, left), ('pretrain_synthetic', 1, made)):
            if title in arm[field]:
                rows = _take(rows, arm.pretrain_rois, f'arm {name}: {field} ROIs of class {title}')
                wanted['pretrain'].append(_pairs(which, rows))
    parts = {}
    for stage in STAGES:
        if wanted[stage]:
            parts[stage] = _split(config, f'arm {name}, {stage}', number, sets, wanted[stage], arm.balance)
    return parts


def _take(rows: np.ndarray, number: int, what: str) -> np.ndarray:
    if len(rows) < max(number, 1):
        raise InputError(f'{what}: {number or "some"} wanted, {len(rows)} there')
    return rows[:number] if number else rows


def _pairs(which: int, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.full(len(rows), which), rows], axis=1)


def _split(
    config: ConfigDict, what: str, number: int, sets: tuple[RoiSet, RoiSet], groups: Sequence[np.ndarray], balance: bool
) -> Part:
    """Takes this run's validation ROIs out of each group, and repeats what is left of the smaller ones if asked.

    Other scans of a validation ROI's patient are left out.
    """
    train, validation, patients = [], [], np.array(sets[0].patients)
    for rows in groups:
        held = max(1, round(config.validation * len(rows)))
        if held * config.runs >= len(rows):
            raise InputError(
                f'{what}: {len(rows)} ROIs are too few for {config.runs} disjoint validation sets of {held} and for '
                'training'
            )
        chosen = slice(number * held, (number + 1) * held)
        validation.append(rows[chosen])
        left = np.delete(rows, chosen, axis=0)
        seen = patients[rows[chosen][rows[chosen][:, 0] == 0, 1]]
        train.append(np.array([pair for pair in left if pair[0] == 1 or patients[pair[1]] not in seen]))
    if balance:
        most = max(map(len, train))
        train = [rows[np.arange(most) % len(rows)] for rows in train]
    return Part(*(Rois(name, sets, np.concatenate(some)) for name, some in (('train', train), ('val', validation))))


def check_disjoint(test: Rois, part: Part) -> None:
    """Makes sure that no patient is on two sides.

    Raises:
        InputError: naming one that is.
    """
    for rois in (part.train, part.validation):
        if shared := test.patients & rois.patients:
            raise InputError(f'patient {min(shared)} has ROIs in the test split and outside of it; prepare it anew')
    assert not part.train.patients & part.validation.patients
    assert not {tuple(row) for row in part.train.rows} & {tuple(row) for row in part.validation.rows}


def run_arm(
    config: ConfigDict, name: str, number: int, parts: Mapping[str, Part], test: Rois, folder: Path, mesh: Mesh
) -> dict:
    """Trains one run of an arm, stage by stage, and tries it on the test split; what is done already is read.

    Returns:
        `ids`, `labels` and `probabilities` of the test ROIs, and `figures`.
    """
    path = folder / RESULT_FILE
    if path.exists():
        return json.loads(path.read_text(encoding='utf-8'))
    start = None
    for stage, part in parts.items():
        print(f'{name}, run {number + 1} of {config.runs}, {stage}: {_sizes(part)}')
        start, recipe = train_stage(config, config.arms[name].augment, number, stage, part, folder / stage, mesh, start)
    rows = config.finetune.batch_size
    logits = logits_of(recipe, mesh, rows)(start['params'], start['statistics'], test)
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


def _sizes(part: Part) -> str:
    counts = {
        title: ', '.join(
            f'{np.sum((rois.labels == number) & (rois.rows[:, 0] == which))} {kind} {label}'
            for number, label in enumerate(rois.sets[0].classes)
            for which, kind in ((0, 'real'), (1, 'synthetic'))
            if np.any((rois.labels == number) & (rois.rows[:, 0] == which))
        )
        for title, rois in (('training', part.train), ('validation', part.validation))
    }
    return '; '.join(f'{title} {text}' for title, text in counts.items())


def train_stage(
    config: ConfigDict,
    augmented: bool,
    number: int,
    stage: str,
    part: Part,
    folder: Path,
    mesh: Mesh,
    start: dict | None,
) -> tuple[dict, classifier.Recipe]:
    """Trains one stage of a run, in a run's folder of its own.

    Args:
        config: of the experiment.
        augmented: whether ROIs are augmented.
        number: of the run.
        stage: one of `STAGES`.
        part: what it learns from.
        folder: where to.
        mesh: of the run.
        start: `params` and `statistics` to begin with; None: drawn.

    Returns:
        `params` and `statistics` of the best checkpoint, and the recipe.
    """
    settings, classes = config[stage], len(part.train.sets[0].classes)
    seed = config.seed + number
    batches = pipeline.Batches(part.train, settings.batch_size, seed, **partitioning.this_process(mesh))
    steps = to_steps(settings.training.duration, batches.steps_per_epoch, f'{stage}.training.duration')
    counts = np.maximum(np.bincount(part.train.labels, minlength=classes), 1)
    recipe = classifier.Recipe(
        model=resnet3d.ResNet3D(
            config.model.depth, classes, config.model.width, config.model.shortcut, jnp.dtype(config.dtype)
        ),
        optimizer=optimizers.make_optimizer(settings.optimizer),
        rate=optimizers.cosine_rate(settings.optimizer, steps),
        alpha=tuple((counts.sum() / (classes * counts)).tolist()),
        gamma=config.gamma,
        augment=config.augment if augmented else None,
        seed=seed,
    )
    # The stage's own config, so that its folder can be read like any run's.
    own = ConfigDict({'task': f'classifier.{stage}', 'run': number, **settings.to_dict()})
    with open_workdir(folder, own):
        state = classifier.create_state(recipe, part.train.sets[0].volumes.shape[1:], mesh, start)
        task = loop.TrainingTask(
            state=state,
            train_step=classifier.make_train_step(recipe, mesh),
            batches=batches,
            put_batch=lambda batch: partitioning.put_batch({name: batch[name] for name in ('volume', 'label')}, mesh),
            evaluate=make_evaluation(recipe, part.validation, settings.batch_size, mesh),
            headline=('loss', 'accuracy'),
        )
        loop.train(task, settings.training, folder)
    return read_checkpoint(folder, ('params', 'statistics'), 'best')[1], recipe


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
        return {'val/loss': float(loss.mean()), 'val/accuracy': float(accuracy)}

    return evaluate


def summarise(config: ConfigDict, results: Mapping[str, Sequence[Mapping]], classes: Sequence[str]) -> dict:
    """The experiment's table, as JSON has it.

    Args:
        config: of the experiment.
        results: by arm, what `run_arm` returned for each run.
        classes: names.

    Returns:
        By arm: `mean` and `sd` of each figure over the runs; `p`, of a two-sided t-test against the first arm (None for
        that itself, and where all runs agree); of the probabilities averaged over the runs, `auc` with DeLong's 95 %
        interval; `confusion`, added over the runs. And `roc`, curves of the averaged probabilities.
    """
    arms, curves, first = {}, {}, next(iter(results))
    positive = 1 if len(classes) == 2 else None
    for name, runs in results.items():
        values = {figure: [run['figures'][figure] for run in runs] for figure in FIGURES}
        mean = np.mean([run['probabilities'] for run in runs], axis=0)
        labels = np.array(runs[0]['labels'])
        arms[name] = {
            'mean': {figure: float(np.mean(some)) for figure, some in values.items()},
            'sd': {figure: float(np.std(some, ddof=1)) for figure, some in values.items()},
            'p': {
                figure: None if name == first else _p_value(some, [run['figures'][figure] for run in results[first]])
                for figure, some in values.items()
            },
            'auc_of_averages': {
                label: classification.auc(mean[:, number], labels == number)._asdict()
                for number, label in enumerate(classes)
                if positive in (None, number)
            },
            'confusion': sum(
                classification.confusion(np.argmax(run['probabilities'], axis=1), labels, len(classes)) for run in runs
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
        'arms': arms,
        'roc': curves,
    }


def _p_value(ours: Sequence[float], theirs: Sequence[float]) -> float | None:
    if np.ptp(ours) == 0 and np.ptp(theirs) == 0:
        return None
    value = float(stats.ttest_ind(ours, theirs).pvalue)
    return value if math.isfinite(value) else None


def _counts(found: Mapping) -> dict[str, np.ndarray]:
    return {name: np.array(arm['confusion']) for name, arm in found['arms'].items()}


def table(found: Mapping) -> str:
    """The table as lines of text: an arm a line, mean ± standard deviation over the runs, and p where there is one."""
    width = 24
    lines = [
        '',
        f'{found["runs"]} runs each, on the test split'
        + (f'; {found["positive"]} is positive' if found['positive'] else ''),
    ]
    lines.append(f'{"":28}' + ''.join(f'{name:>{width}}' for name in FIGURES))
    for name, arm in found['arms'].items():
        cells = []
        for figure in FIGURES:
            p = arm['p'][figure]
            cells.append(
                f'{arm["mean"][figure]:.3f} ± {arm["sd"][figure]:.3f}' + (f' p={p:.2g}' if p is not None else '')
            )
        lines.append(f'{name:28}' + ''.join(f'{cell:>{width}}' for cell in cells))
    return '\n'.join([*lines, ''])
