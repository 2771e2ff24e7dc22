"""What figures of merit are computed from, two sets of ROIs side by side, and what they are: a value beside its floor.

An `Evaluation` computes what several figures share once, when the first of them asks for it.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence

import numpy as np
from matplotlib.figure import Figure as Picture
from ml_collections import ConfigDict

from vqroi_jax import class_agreement, features
from vqroi_jax.data.roi_sets import RoiSet
from vqroi_jax.metrics import mmd

_BLOCK = 32  # volumes that distances are computed of together


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of merit of one class.

    Attributes:
        metric: its name.
        label: the class; '' for all.
        value: of the synthetic ROIs.
        spread: half the width of its 95 % interval: 1.96 standard deviations over bootstraps of the ROIs, or 1.96
            standard errors of a mean (density); of a share of ROIs what lies between it and the farther end of Wilson's
            interval.
        floor: the same between real ROIs.
        floor_spread: likewise.
        n: synthetic ROIs that it is of.
        floor_n: real ROIs that the floor is of: as many, but for shares and medians, which do not depend on it.
        better: 'floor' (nearer to it), 'lower' or 'higher'.
        settings: what the value depends on.
    """

    metric: str
    label: str
    value: float
    spread: float
    floor: float
    floor_spread: float
    n: int
    floor_n: int
    better: str
    settings: str


@dataclasses.dataclass(frozen=True)
class Sides:
    """Rows of a class to compare, as many of each: one and the other half of the real ones, and synthetic ones."""

    label: str
    one: np.ndarray
    other: np.ndarray
    fake: np.ndarray

    @property
    def n(self) -> int:
        """ROIs of each."""
        return len(self.one)


@dataclasses.dataclass
class Evaluation:
    """Everything that the figures are computed from, and what has been found."""

    real: RoiSet
    fake: RoiSet
    config: ConfigDict
    figures: list[Figure] = dataclasses.field(default_factory=list)
    notes: list[str] = dataclasses.field(default_factory=list)
    neighbours: list[dict] = dataclasses.field(default_factory=list)
    pictures: dict[str, Picture] = dataclasses.field(default_factory=dict)

    @property
    def reference(self) -> str:
        """What one of the real ROIs is called in figures and tables."""
        return 'phantom' if self.real.phantoms else 'real ROI'

    def rng(self, purpose: str) -> np.random.Generator:
        """Random numbers that depend on the seed and the purpose alone."""
        return np.random.default_rng([self.config.seed, zlib.crc32(purpose.encode())])

    @functools.cached_property
    def sides(self) -> list[Sides]:
        """What is compared, class by class."""
        parts = []
        for number, label in enumerate(self.real.classes):
            rng = self.rng(f'halves {label}')
            one, other = halves(rng.permutation(self.real.of(number)), self.real.patients)
            fake = rng.permutation(self.fake.of(number))
            n = min(len(one), len(other), len(fake))
            parts.append(Sides(label, *(np.sort(rows[:n]) for rows in (one, other, fake))))
        return parts

    @functools.cached_property
    def apart(self) -> np.ndarray:
        """Real rows of patients of whom none is among the other halves."""
        other = {self.real.patients[row] for sides in self.sides for row in sides.other}
        return np.flatnonzero([patient not in other for patient in self.real.patients])

    @functools.cached_property
    def learnt(self) -> np.ndarray:
        """bool [n]: whether the generator has learnt from a real ROI's patient.

        As the synthetic set's own record says; where there is none, as the real set's splits suggest. All False where
        the real set has no splits, for its patients are not known then.
        """
        record, real = self.fake.learnt_from, self.real
        if real.splits is None:
            return np.zeros(len(real.labels), bool)
        if record is None:
            return np.array(real.splits) == 'train'
        return np.array([patient in record for patient in real.patients])

    @functools.cached_property
    def training(self) -> np.ndarray:
        """Real rows that a generator has learnt from; all where `has_held_out` is False."""
        return np.flatnonzero(self.learnt) if self.has_held_out else np.arange(len(self.real.labels))

    @functools.cached_property
    def held_out(self) -> np.ndarray:
        """Real rows that it has not learnt from; all where `has_held_out` is False."""
        return np.flatnonzero(~self.learnt) if self.has_held_out else np.arange(len(self.real.labels))

    @functools.cached_property
    def has_held_out(self) -> bool:
        """Whether some real ROIs of every class are held out, and some are learnt from."""
        return all(0 < self.learnt[rows].sum() < len(rows) for rows in map(self.real.of, range(len(self.real.classes))))

    @functools.cached_property
    def distances(self) -> np.ndarray:
        """Squared distances of voxels between all ROIs, real ones first; each counts 1 in [-1, 1]."""
        first = len(self.real.labels)

        def load(rows: np.ndarray) -> np.ndarray:
            volumes = [self.real.volumes[row] if row < first else self.fake.volumes[row - first] for row in rows]
            return np.stack(volumes).reshape(len(rows), -1)

        return mmd.all_squared_distances(first + len(self.fake.labels), load, _BLOCK)

    @functools.cached_property
    def seen_by_vgg16(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """VGG16's features: see `seen_by`."""
        return self.seen_by(features.vgg16())

    def seen_by(self, network: features.Network) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """A network's features [n, slices, features] of the real and the synthetic set, by plane."""
        settings = self.config.slices

        def seen(part: RoiSet, plane: str) -> np.ndarray:
            return features.plane_features(part.volumes, plane, settings.number, settings.empty == 'keep', network)

        return {plane: (seen(self.real, plane), seen(self.fake, plane)) for plane in features.PLANES}

    @functools.cached_property
    def overall(self) -> np.ndarray:
        """VGG16's features of ROIs as wholes, real ones first: means over the slices of each plane."""
        return np.concatenate(
            [np.concatenate([part.mean(axis=1) for part in both]) for both in self.seen_by_vgg16.values()], axis=1
        )

    @functools.cached_property
    def told(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """What a classifier says that learnt from what the generator has learnt from; see `told_by`."""
        return self.told_by(self.training) if self.has_held_out else self.told_apart

    @functools.cached_property
    def told_apart(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """What one says to which the other halves are as new as the synthetic ROIs; see `told_by`."""
        return self.told_by(self.apart)

    def told_by(self, rows: np.ndarray) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Logits and features of the real and the synthetic ROIs, by a classifier trained on these real ones."""
        classes, settings = len(self.real.classes), self.config.classifier
        volumes, labels = self.real.volumes[rows], self.real.labels[rows]
        params = class_agreement.train(volumes, labels, classes, self.config.seed, settings.epochs)
        return tuple(class_agreement.tell(params, part.volumes, classes) for part in (self.real, self.fake))

    def add(
        self,
        metric: str,
        label: str,
        values: Sequence[tuple[float, float]],
        counts: tuple[int, int],
        better: str,
        settings: str,
    ) -> None:
        """Adds a figure: of the synthetic side and of the floor, each a value and its spread, and a number of ROIs."""
        (value, spread), (floor, floor_spread) = values
        self.figures.append(Figure(metric, label, value, spread, floor, floor_spread, *counts, better, settings))

    def compare(
        self,
        metric: str,
        sides: Sides,
        distance: Callable[[np.ndarray, np.ndarray], float],
        real: np.ndarray,
        fake: np.ndarray,
        settings: str,
        repeats: int | None = None,
    ) -> None:
        """Adds a distance between sets: from one half of the real ROIs to the synthetic ones, and to the other half.

        Args:
            metric: its name.
            sides: which ROIs.
            distance: of two selections of what follows.
            real: [n, ...], what the distance is taken of, of all real ROIs.
            fake: [m, ...], the same of all synthetic ones.
            settings: what it depends on.
            repeats: of the bootstrap; None: as the config says.
        """
        values = [
            self.bootstrap(
                f'{metric} {sides.label}',
                lambda x, y, second=second: distance(real[x], second[y]),
                sides.one,
                rows,
                repeats=repeats,
            )
            for second, rows in ((fake, sides.fake), (real, sides.other))
        ]
        self.add(metric, sides.label, values, (sides.n, sides.n), 'lower', settings)

    def bootstrap(
        self, purpose: str, statistic: Callable[..., float], *rows: np.ndarray, repeats: int | None = None
    ) -> tuple[float, float]:
        """A statistic of some rows, and 1.96 times its standard deviation when each set of them is drawn anew.

        Draws that it does not exist for, such as one row over and over where pairs are wanted, are left out; where
        those that are left tell nothing (fewer than two, all the same, one infinite), the deviation is NaN.
        """
        rng = self.rng(purpose)
        repeats = self.config.bootstrap if repeats is None else repeats
        drawn = [float(statistic(*(rng.choice(part, len(part)) for part in rows))) for _ in range(repeats)]
        kept = [value for value in drawn if not math.isnan(value)]
        alike = len(kept) < len(drawn) and len(set(kept)) == 1
        known = len(kept) > 1 and np.isfinite(kept).all() and not alike
        return float(statistic(*rows)), 1.96 * float(np.std(kept)) if known else math.nan


def halves(rows: np.ndarray, patients: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
    """Two halves of ROIs, no patient in both.

    Args:
        rows: of the ROIs, in random order.
        patients: of all ROIs, by row.

    Returns:
        What is nearest to halves where patients have several ROIs; the first is not the larger where all have one.
    """
    by_patient: dict[str, list[int]] = {}
    for row in rows:
        by_patient.setdefault(patients[row], []).append(row)
    ordered = np.array([row for group in by_patient.values() for row in group], int)
    ends = np.cumsum([0, *map(len, by_patient.values())])
    cut = ends[np.argmax(np.minimum(ends, len(rows) - ends))]
    return ordered[:cut], ordered[cut:]
