"""An experiment's ROIs: which of them an arm's stages learn from, are validated on and are tested on.

two sets (data.roi_sets) -> `plan` -> `check_disjoint` -> `train_classifier`
"""

import dataclasses
import functools
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
from ml_collections import ConfigDict

from vqroi_jax import transfer
from vqroi_jax.data.learnt_from import LEARNT_FROM_FILE
from vqroi_jax.data.roi_sets import RoiSet
from vqroi_jax.errors import InputError


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
                f'config.real={real.path} has {count} ROI(s) of class {label} to test on; at least 2 are needed: '
                'prepare the cohort with a larger data.split.test'
            )
    return Rois('test', sets, _pairs(0, rows))


def plan(config: ConfigDict, name: str, number: int, sets: tuple[RoiSet, RoiSet]) -> dict[str, Part]:
    """The stages of a run of an arm, by name, and what each learns from.

    The real ROIs for training are the same in all runs and in all arms that want as many; those for pre-training are
    taken from what is left, without other scans of patients that training is validated on. Each stage keeps a share of
    each class for validation; training keeps that of other patients in each run.

    Raises:
        InputError: there are not so many ROIs as the arm wants.
    """
    arm, real = config.arms[name], sets[0]
    for field in ('pretrain_real', 'pretrain_synthetic'):
        if unknown := [label for label in arm[field] if label not in real.classes]:
            raise InputError(f'config.arms.{name}.{field}: class {unknown[0]!r} is none of {", ".join(real.classes)}')
    kept, left, made = [], [], []
    for label, title in enumerate(real.classes):
        rng = np.random.default_rng([config.seed, label])
        there = rng.permutation(np.intersect1d(real.of(label), real.among('train', 'val')))
        made.append(rng.permutation(sets[1].of(label)))
        kept.append(_take(there, arm.rois, f'config.arms.{name}.rois', f'real ROIs of class {title}'))
        left.append(there[len(kept[-1]) :])
    finetune = _split(config, f'arm {name}, finetune', number, sets, [_pairs(0, rows) for rows in kept], arm.balance)
    seen = finetune.validation.patients
    wanted = []
    for label, title in enumerate(real.classes):
        free = np.array([row for row in left[label] if real.patients[row] not in seen], int)
        for field, which, rows in (('pretrain_real', 0, free), ('pretrain_synthetic', 1, made[label])):
            if title in arm[field]:
                what = f'{field.removeprefix("pretrain_")} ROIs of class {title}'
                rows = _take(rows, arm.pretrain_rois, f'config.arms.{name}.pretrain_rois', what)
                wanted.append(_pairs(which, rows))
    if not wanted:
        return {'finetune': finetune}
    return {
        'pretrain': _split(config, f'arm {name}, pretrain', number, sets, wanted, arm.balance),
        'finetune': finetune,
    }


def _take(rows: np.ndarray, number: int, field: str, what: str) -> np.ndarray:
    if len(rows) < max(number, 1):
        advice = '; choose fewer, or 0 for all' if len(rows) else ''
        raise InputError(f'{field}={number} wants {number or "some"} {what}, of which there are {len(rows)}{advice}')
    return rows[:number] if number else rows


def _pairs(which: int, rows: np.ndarray) -> np.ndarray:
    return np.stack([np.full(len(rows), which), rows], axis=1)


def _split(
    config: ConfigDict, what: str, number: int, sets: tuple[RoiSet, RoiSet], groups: Sequence[np.ndarray], balance: bool
) -> Part:
    """Takes this run's validation ROIs out of each group, and repeats what is left of the smaller ones if asked.

    No patient of the same groups is validated on in two runs. Other scans of a validation ROI's patient are left out,
    in every class.
    """
    # A synthetic ROI counts as a patient of its own.
    patients = [[sets[0].patients[row] if which == 0 else (which, row) for which, row in rows] for rows in groups]
    seen: set = set()
    for _ in range(number + 1):
        # The validation sets of all runs up to this one, for each leaves out the patients of those before it.
        chosen = [
            _first_of_others(config, what, sets, rows, names, seen)
            for rows, names in zip(groups, patients, strict=True)
        ]
        now = {names[place] for places, names in zip(chosen, patients, strict=True) for place in places}
        seen |= now
    validation = [rows[places] for rows, places in zip(groups, chosen, strict=True)]
    train = []
    for rows, names in zip(groups, patients, strict=True):
        train.append(rows[[name not in now for name in names]])
        if not len(train[-1]):
            raise _too_few_patients(config, what, sets, rows)
    if balance:
        most = max(map(len, train))
        train = [rows[np.arange(most) % len(rows)] for rows in train]
    return Part(*(Rois(name, sets, np.concatenate(some)) for name, some in (('train', train), ('val', validation))))


def _first_of_others(
    config: ConfigDict, what: str, sets: tuple[RoiSet, RoiSet], rows: np.ndarray, names: Sequence, seen: set
) -> list[int]:
    """Places in a group of a run's validation ROIs: its first ones that are of none of the patients seen."""
    held = max(1, round(config.validation * len(rows)))
    if held * config.runs >= len(rows):
        raise InputError(
            f'{what}: {len(rows)} ROIs are too few for {config.runs} disjoint validation sets of {held} and for '
            'training'
        )
    places = [place for place, name in enumerate(names) if name not in seen][:held]
    if len(places) < held:
        raise _too_few_patients(config, what, sets, rows)
    return places


def _too_few_patients(config: ConfigDict, what: str, sets: tuple[RoiSet, RoiSet], rows: np.ndarray) -> InputError:
    which, row = rows[0]
    return InputError(
        f'{what}: the ROIs of class {sets[0].classes[sets[which].labels[row]]} are of too few patients for '
        f'{config.runs} validation sets without a patient in common, and for training on others'
    )


def check_disjoint(test: Rois, parts: Mapping[str, Part], start: transfer.Weights | None = None) -> None:
    """Makes sure that no patient whom a run is validated or tested on is one that it has learnt from.

    Nor may a test patient be one that the generator of the run's synthetic ROIs was trained on, as far as that is known
    (`provenance`). Validation patients may: they are of the cohort's training split, as the generator's are.

    Args:
        test: the test ROIs.
        parts: the run's stages by name.
        start: weights that the run begins with.

    Raises:
        InputError: naming one that is.
    """
    made = test.sets[1]
    if _has_synthetic(*parts.values()) and (leaked := (made.learnt_from or frozenset()) & test.patients):
        raise InputError(
            f'config.fake={made.path}: its generator was trained on patient {min(leaked)} (see its '
            f'{LEARNT_FROM_FILE}), on whom a run would be tested; take the cohort as it was split then, or samples of '
            'another generator'
        )
    for part in parts.values():
        for rois in (part.train, part.validation):
            if shared := test.patients & rois.patients:
                raise InputError(f'patient {min(shared)} has ROIs in the test split and outside of it; prepare it anew')
        assert not part.train.patients & part.validation.patients
        assert not {tuple(row) for row in part.train.rows} & {tuple(row) for row in part.validation.rows}
        assert not part.train.patients & parts['finetune'].validation.patients
    for rois, what in ((test, 'tested'), (parts['finetune'].validation, 'validated')):
        if start and (known := start.patients & rois.patients):
            raise InputError(
                f'{start.fact}: its weights were learnt from patient {min(known)}, on whom a run would be {what}; '
                'take weights that were learnt from other patients, or from synthetic ROIs alone'
            )
    if start and (leaked := (start.generators or frozenset()) & test.patients):
        raise InputError(
            f'{start.fact}: its weights were learnt from synthetic ROIs whose generator was trained on patient '
            f'{min(leaked)}, on whom a run would be tested; take the cohort as it was split then, or other weights'
        )


def provenance(test: Rois, runs: Iterable[Mapping[str, Part]]) -> str | None:
    """What is known of the patients that the generator of the synthetic ROIs was trained on, as a line of text.

    Args:
        test: the test ROIs; `check_disjoint` has passed.
        runs: stages by name of all runs of the experiment.

    Returns:
        None if no run has synthetic ROIs.
    """
    runs, made = list(runs), test.sets[1]
    if not any(_has_synthetic(*run.values()) for run in runs):
        return None
    if made.learnt_from is None:
        return (
            f'Whether the generator of the synthetic ROIs has learnt from test patients is not known: {made.path} has '
            f'no {LEARNT_FROM_FILE} that says from whom it has.'
        )
    validated = frozenset().union(*(run['finetune'].validation.patients for run in runs))
    return (
        f'No test patient is among the {len(made.learnt_from)} that the generator of the synthetic ROIs was trained '
        f'on; {len(validated & made.learnt_from)} of the {len(validated)} patients that runs are validated on are, so '
        'validation, which chooses checkpoints, may flatter.'
    )


def generators(part: Part, start: transfer.Weights | None) -> frozenset[str] | None:
    """Patients that reach the weights of a stage by way of synthetic ROIs: their generators were trained on them.

    Args:
        part: what the stage learns from.
        start: weights that it begins with.

    Returns:
        None where it is not known.
    """
    before = start.generators if start else frozenset()
    now = part.train.sets[1].learnt_from if _has_synthetic(part) else frozenset()
    return None if before is None or now is None else before | now


def _has_synthetic(*parts: Part) -> bool:
    return any((rois.rows[:, 0] == 1).any() for part in parts for rois in (part.train, part.validation))


def counted(rois: Rois) -> dict[str, dict[str, int]]:
    """Number of ROIs by class and origin ('real', 'synthetic'), repeated ones counted each time."""
    found = {}
    for number, label in enumerate(rois.sets[0].classes):
        of_set = np.bincount(rois.rows[rois.labels == number, 0], minlength=2)
        found[label] = {kind: int(n) for kind, n in zip(('real', 'synthetic'), of_set, strict=True) if n}
    return found
