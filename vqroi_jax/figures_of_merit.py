"""Figures of merit of one set of ROIs beside another: what `vqroi_jax.evaluate` reports.

`measure` adds to an `Evaluation` the groups of figures that its config asks for. Each figure has its floor, the same
between two halves of the real set, with as many ROIs on every side.
"""

import dataclasses
import functools
import math
import zlib
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from matplotlib.figure import Figure as Picture
from ml_collections import ConfigDict
from scipy import stats
from tqdm import tqdm

from vqroi_jax import class_agreement, viz
from vqroi_jax.data.roi_sets import RoiSet
from vqroi_jax.errors import InputError
from vqroi_jax.features import PLANES, plane_features
from vqroi_jax.metrics import mmd, ssim, tumour
from vqroi_jax.metrics.coverage import precision_recall_density_coverage
from vqroi_jax.metrics.frechet import frechet_distance
from vqroi_jax.models import perceptual

GROUPS = ('ms_ssim', 'mmd', 'frechet', 'coverage', 'agreement', 'statistics', 'privacy')
SEEN_BY_VGG16 = ('frechet', 'coverage', 'privacy')
FEWEST = 4  # real ROIs of a class: two halves of two

_BLOCK = 32  # volumes that distances are computed of together
_PAIRS = 8  # pairs that are compared together
_KID_SLICES = 1000  # of each set; more are drawn from
_NEAREST = 6  # pairs of neighbours that are shown at least
_PICTURED = 24  # and at most
_BINS = 32  # of intensities


@dataclasses.dataclass(frozen=True)
class Figure:
    """A figure of merit of one class.

    Attributes:
        metric: its name.
        label: the class; '' for all.
        value: of the synthetic ROIs.
        spread: half the width of its 95 % interval, 1.96 standard deviations over bootstraps of the ROIs.
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

    def rng(self, purpose: str) -> np.random.Generator:
        """Random numbers that depend on the seed and the purpose alone."""
        return np.random.default_rng([self.config.seed, zlib.crc32(purpose.encode())])

    @functools.cached_property
    def sides(self) -> list[Sides]:
        """What is compared, class by class."""
        parts = []
        for number, label in enumerate(self.real.classes):
            rng = self.rng(f'halves {label}')
            real, fake = rng.permutation(self.real.of(number)), rng.permutation(self.fake.of(number))
            n = min(len(real) // 2, len(fake))
            parts.append(Sides(label, *(np.sort(rows) for rows in (real[:n], real[n : 2 * n], fake[:n]))))
        return parts

    @functools.cached_property
    def training(self) -> np.ndarray:
        """Real rows that a generator may have learnt from: the training split, or all where there are no splits."""
        return self.real.among('train') if self.has_splits else np.arange(len(self.real.labels))

    @functools.cached_property
    def held_out(self) -> np.ndarray:
        """Real rows that it has not: the other splits, or all where there are none."""
        return self.real.among('val', 'test') if self.has_splits else np.arange(len(self.real.labels))

    @property
    def has_splits(self) -> bool:
        """Whether the real set says what is held out, and some of every class is and is not."""
        if self.real.splits is None:
            return False
        seen, classes = self.real.among('train'), range(len(self.real.classes))
        return all(0 < np.isin(self.real.of(number), seen).sum() < len(self.real.of(number)) for number in classes)

    @functools.cached_property
    def distances(self) -> np.ndarray:
        """Squared distances of voxels between all ROIs, real ones first; each counts 1 in [-1, 1]."""
        first = len(self.real.labels)

        def load(rows: np.ndarray) -> np.ndarray:
            volumes = [self.real.volumes[row] if row < first else self.fake.volumes[row - first] for row in rows]
            return np.stack(volumes).reshape(len(rows), -1)

        return mmd.all_squared_distances(first + len(self.fake.labels), load, _BLOCK)

    @functools.cached_property
    def planes(self) -> dict[str, tuple[np.ndarray, np.ndarray]]:
        """VGG16's features [n, slices, features] of the real and the synthetic set, by plane."""
        settings, weights = self.config.slices, perceptual.load_weights()

        def seen(part: RoiSet, plane: str) -> np.ndarray:
            return plane_features(part.volumes, plane, settings.number, settings.empty == 'keep', weights)

        return {plane: (seen(self.real, plane), seen(self.fake, plane)) for plane in PLANES}

    @functools.cached_property
    def overall(self) -> np.ndarray:
        """VGG16's features of ROIs as wholes, real ones first: means over the slices of each plane."""
        return np.concatenate(
            [np.concatenate([part.mean(axis=1) for part in both]) for both in self.planes.values()], axis=1
        )

    @functools.cached_property
    def told(self) -> tuple[tuple[np.ndarray, np.ndarray], ...]:
        """Logits and features of the real and the synthetic ROIs, by a classifier trained on real ones alone."""
        classes = len(self.real.classes)
        rows = self.training if self.has_splits else np.concatenate([part.one for part in self.sides])
        settings = self.config.classifier
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
        fewer than two are left, the deviation is NaN.
        """
        rng = self.rng(purpose)
        repeats = self.config.bootstrap if repeats is None else repeats
        drawn = [float(statistic(*(rng.choice(part, len(part)) for part in rows))) for _ in range(repeats)]
        kept = [value for value in drawn if not math.isnan(value)]
        return float(statistic(*rows)), 1.96 * float(np.std(kept)) if len(kept) > 1 else math.nan


def measure(evaluation: Evaluation) -> None:
    """Adds the figures that the config asks for.

    Raises:
        InputError: there are too few ROIs of a class, or a real one is empty.
    """
    _check_sizes(evaluation)
    for group in tqdm([name for name in GROUPS if name in evaluation.config.metrics], desc='measuring', disable=None):
        _MEASURES[group](evaluation)


def _check_sizes(evaluation: Evaluation) -> None:
    shape, seen = evaluation.real.volumes.shape[1:], {*SEEN_BY_VGG16} & {*evaluation.config.metrics}
    if seen and min(shape) < perceptual.SMALLEST:
        raise InputError(
            f'ROIs of {" x ".join(map(str, shape))} voxels are too small for VGG16, which needs {perceptual.SMALLEST} '
            f'along each side; leave {", ".join(sorted(seen))} out of config.metrics'
        )
    for name, part, least in (('real', evaluation.real, FEWEST), ('fake', evaluation.fake, 2)):
        for label, count in part.counts().items():
            if count < least:
                raise InputError(
                    f'config.{name}={part.path} has {count} ROI{"s" * (count != 1)} of class {label}; at least {least} '
                    'are needed' + (', as they are split in two' if name == 'real' else '')
                )
    constant = [i for i, volume in zip(evaluation.real.ids, evaluation.real.volumes, strict=True) if volume.max() <= -1]
    if constant:
        raise InputError(f'config.real={evaluation.real.path}: {constant[0]} is empty: it has no tumour')
    empty = sum(bool(volume.max() <= -1) for volume in evaluation.fake.volumes)
    if empty:
        evaluation.notes.append(f'{empty} of the synthetic ROIs are empty')
    if not evaluation.has_splits:
        evaluation.notes.append(
            'The real set does not say which ROIs were held out from training: the nearest neighbour of a real ROI is '
            'looked for among all others, and the classifier is trained on one half and tried on the other.'
        )


# ---------------------------------------------------------------------------------------------------- the figures


def _measure_ms_ssim(evaluation: Evaluation) -> None:
    """How alike the ROIs of one set are to each other: diversity."""
    config, shape = evaluation.config, evaluation.real.volumes.shape[1:]
    modes = {'standard': ssim.scales(shape) > 0, 'release': min(shape) >= 2 ** (len(ssim.WEIGHTS) - 1)}
    for mode, possible in modes.items():
        if not possible:
            evaluation.notes.append(f'MS-SSIM, {mode}: volumes of {shape} are too small for it')
            continue
        scales = ssim.scales(shape) if mode == 'standard' else len(ssim.WEIGHTS)
        for sides in evaluation.sides:
            one, two = np.triu_indices(sides.n, 1)
            chosen = evaluation.rng(f'pairs {sides.label}').permutation(len(one))[: config.pairs]
            one, two = one[chosen], two[chosen]
            values = []
            for name, part, rows in (('fake', evaluation.fake, sides.fake), ('real', evaluation.real, sides.one)):
                pairs = np.stack([rows[one], rows[two]], axis=1)
                found = similarities(pairs, part.volumes, part.volumes, mode, config.foreground)
                weighted = functools.partial(_mean_over_pairs, found, one, two)
                values.append(evaluation.bootstrap(f'{mode} {name} {sides.label}', weighted, np.arange(sides.n)))
            evaluation.add(
                f'MS-SSIM, {mode}',
                sides.label,
                values,
                (sides.n, sides.n),
                'floor',
                f'{len(chosen)} pairs within the class, {scales} of 5 scales'
                + (', foreground only' if config.foreground else '')
                + (', data range taken as 1 for [-1, 1]' if mode == 'release' else ''),
            )


def _mean_over_pairs(values: np.ndarray, one: np.ndarray, two: np.ndarray, rows: np.ndarray) -> float:
    """Mean of the values of pairs, each counted as often as both its members are in `rows`."""
    counts = np.bincount(rows, minlength=max(one.max(), two.max()) + 1)
    weights = counts[one] * counts[two]
    return float(np.sum(weights * values) / weights.sum()) if weights.any() else math.nan


def similarities(pairs: np.ndarray, volumes: np.ndarray, others: np.ndarray, mode: str, foreground: bool) -> np.ndarray:
    """MS-SSIM of pairs of ROIs, float32 [pairs].

    Args:
        pairs: int [pairs, 2]: row in `volumes`, and row in `others`.
        volumes: [n, D, H, W] in [-1, 1]; may live on disk.
        others: [m, D, H, W], likewise.
        mode: see `metrics.ssim.ms_ssim`.
        foreground: whether only windows around voxels that are tumour in one of the two count.
    """
    parts = []
    for start in range(0, len(pairs), _PAIRS):
        some = pairs[start : start + _PAIRS]
        one, two = np.pad(some, [(0, _PAIRS - len(some)), (0, 0)], mode='edge').T  # one shape, one program
        parts.append(np.asarray(_similarity(volumes[one], others[two], mode, foreground))[: len(some)])
    return np.concatenate(parts)


@functools.partial(jax.jit, static_argnames=('mode', 'foreground'))
def _similarity(x: jax.Array, y: jax.Array, mode: str, foreground: bool) -> jax.Array:
    x, y = x[..., None], y[..., None]
    return ssim.ms_ssim(x, y, mode=mode, region=(x > -1) | (y > -1) if foreground else None)


def _measure_mmd(evaluation: Evaluation) -> None:
    """How far the distributions of voxels are apart."""
    settings, first = evaluation.config.mmd, len(evaluation.real.labels)
    for sides in evaluation.sides:
        rows = np.concatenate([sides.one, sides.other, first + sides.fake])
        distances, n = evaluation.distances[np.ix_(rows, rows)], sides.n
        one, other, fake = np.arange(n), np.arange(n, 2 * n), np.arange(2 * n, 3 * n)
        batch = min(settings.batch, n)

        def by_batches(x, y, distances=distances, batch=batch, label=sides.label):
            rng = evaluation.rng(f'mini-batches {label}')
            return mmd.linear_by_batches(distances, x, y, batch, settings.repeats, rng)

        bandwidth = float(mmd.median_bandwidth(distances[: 2 * n, : 2 * n]))
        kernel = np.asarray(mmd.gaussian_kernel(distances, max(bandwidth, 1e-6)))
        for name, statistic, text in (
            ('MMD, linear, by mini-batches', by_batches, f'batches of {batch}, {settings.repeats} times, [-1, 1]'),
            ('MMD, linear, all at once', functools.partial(mmd.linear, distances), 'voxels in [-1, 1], biased'),
            (
                'MMD, RBF, squared',
                functools.partial(_unbiased, kernel),
                f'voxels, bandwidth {bandwidth:.4g} (median of the real ones), unbiased',
            ),
        ):
            values = [evaluation.bootstrap(f'{name} {sides.label}', statistic, one, part) for part in (fake, other)]
            evaluation.add(name, sides.label, values, (n, n), 'lower', text)


def _unbiased(kernel: np.ndarray, x: np.ndarray, y: np.ndarray) -> float:
    return float(mmd.unbiased(kernel, *(np.bincount(rows, minlength=len(kernel)) for rows in (x, y))))


def _measure_frechet(evaluation: Evaluation) -> None:
    """How far the distributions of what networks see are apart."""
    settings, repeats = evaluation.config.slices, evaluation.config.frechet_bootstrap
    where = 'the whole ROI' if settings.empty == 'keep' else "the tumour's extent"
    text = f'VGG16 (LPIPS), {settings.number} slices of each volume over {where}'
    compared = [(f'FD-VGG, {plane}', text, *both) for plane, both in evaluation.planes.items()]
    if len(evaluation.real.classes) > 1:
        real, fake = (features[:, None] for _, features in evaluation.told)
        compared.append(('FD-3D', 'features of a 3D classifier trained on real ROIs', real, fake))
    for metric, how, real, fake in compared:
        for sides in evaluation.sides:
            evaluation.compare(metric, sides, _slice_distance, real, fake, how, repeats)
    for plane, (real, fake) in evaluation.planes.items():
        for sides in evaluation.sides:
            metric = f'KID-VGG, {plane}'
            x, y, floor = (
                evaluation.rng(f'{metric} {sides.label}').permutation(_flat(features))[:_KID_SLICES]
                for features in (real[sides.one], fake[sides.fake], real[sides.other])
            )
            values = []
            for second in (y, floor):
                both = jnp.concatenate([x, second])
                statistic = functools.partial(_unbiased, np.asarray(mmd.cubic_kernel(both, both)))
                rows = np.arange(len(x)), np.arange(len(x), len(both))
                values.append(evaluation.bootstrap(f'{metric} {sides.label}', statistic, *rows, repeats=repeats))
            how = f'{text}, cubic kernel, unbiased, {len(x)} slices'
            evaluation.add(metric, sides.label, values, (sides.n, sides.n), 'lower', how)


def _slice_distance(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(_flat(x), _flat(y))


def _flat(features: np.ndarray) -> np.ndarray:
    """Features of slices [n, slices, features] of volumes as one list of them."""
    return features.reshape(-1, features.shape[-1])


def _measure_coverage(evaluation: Evaluation) -> None:
    """How many synthetic ROIs are realistic, and how much of the real ones they cover."""
    first = len(evaluation.real.labels)
    for sides in evaluation.sides:
        k = min(evaluation.config.neighbours, sides.n - 1)
        rows = np.concatenate([sides.one, sides.other, first + sides.fake])
        features = jnp.asarray(evaluation.overall[rows])
        distances, n = mmd.squared_distances(features, features), sides.n
        one, other, fake = slice(0, n), slice(n, 2 * n), slice(2 * n, 3 * n)
        found = [
            precision_recall_density_coverage(distances[one, one], distances[part, part], distances[one, part], k)
            for part in (fake, other)
        ]
        for name in found[0]:
            values = [(float(np.mean(side[name])), 1.96 * float(np.std(side[name])) / math.sqrt(n)) for side in found]
            evaluation.add(name, sides.label, values, (n, n), 'higher', f'VGG16 over all planes, {k} neighbours')


def _measure_agreement(evaluation: Evaluation) -> None:
    """How often a classifier tells synthetic ROIs as the class that they were made for."""
    if len(evaluation.real.classes) < 2:
        evaluation.notes.append('class agreement: there is only one class')
        return
    (real, _), (fake, _) = evaluation.told
    tried = evaluation.held_out if evaluation.has_splits else np.concatenate([part.other for part in evaluation.sides])
    right = [
        [np.argmax(logits[rows], axis=1) == number for number, rows in enumerate(parts)]
        for logits, parts in (
            (fake, [evaluation.fake.of(number) for number in range(len(evaluation.sides))]),
            (real, [np.intersect1d(tried, evaluation.real.of(number)) for number in range(len(evaluation.sides))]),
        )
    ]
    text = f'a small CNN trained on real ROIs for {evaluation.config.classifier.epochs} epochs; floor: held-out ROIs'
    parts = {'': [np.concatenate(side) for side in right]}
    parts |= {label: [side[number] for side in right] for number, label in enumerate(evaluation.real.classes)}
    for label, of_sides in parts.items():
        shares = [float(np.mean(side)) for side in of_sides]
        counts = len(of_sides[0]), len(of_sides[1])
        values = [(share, 1.96 * math.sqrt(share * (1 - share) / n)) for share, n in zip(shares, counts, strict=True)]
        evaluation.add('class agreement', label, values, counts, 'floor', text)


def _measure_statistics(evaluation: Evaluation) -> None:
    """What a radiologist would measure, and how its distributions differ."""
    measured = [_measurements(part) for part in (evaluation.real, evaluation.fake)]
    for name in _QUANTITIES:
        real, fake = (quantities[name] for quantities in measured)
        for number, sides in enumerate(evaluation.sides):
            medians = (np.median(real[evaluation.real.of(number)]), np.median(fake[evaluation.fake.of(number)]))
            text = f'KS distance; medians: real {medians[0]:.3g}, synthetic {medians[1]:.3g}'
            evaluation.compare(name, sides, _ks_distance, real, fake, text)
        real_values, fake_values = (
            {label: quantities[name][part.of(i)] for i, label in enumerate(part.classes)}
            for quantities, part in zip(measured, (evaluation.real, evaluation.fake), strict=True)
        )
        evaluation.pictures[name] = viz.distributions(real_values, fake_values, name)
    histograms = [
        {label: quantities['histogram'][part.of(i)].mean(axis=0) for i, label in enumerate(part.classes)}
        for quantities, part in zip(measured, (evaluation.real, evaluation.fake), strict=True)
    ]
    evaluation.pictures['intensities'] = viz.intensities(*histograms)


def _ks_distance(x: np.ndarray, y: np.ndarray) -> float:
    return stats.ks_2samp(x, y).statistic


_QUANTITIES = ('tumour volume [mL]', 'surface to volume [1/mm]', 'mean intensity')


def _measurements(rois: RoiSet) -> dict[str, np.ndarray]:
    """By quantity, one number for each ROI; and `histogram`."""

    @jax.jit
    def measure(volume):
        inside = volume > -1
        ml, surface = tumour.volume_ml(inside, rois.spacing), tumour.surface_cm2(inside, rois.spacing)
        mean = jnp.mean(volume, axis=(1, 2, 3), where=inside)
        # cm² / mL = 1 / cm
        values = (ml, surface / jnp.maximum(ml, 1e-6) / 10, jnp.where(ml > 0, mean, -1.0))
        return dict(zip(_QUANTITIES, values, strict=True)) | {
            'histogram': tumour.intensity_histogram(volume, inside, _BINS)
        }

    parts = [jax.device_get(measure(rois.volumes[i : i + 1])) for i in range(len(rois.labels))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}


def _measure_privacy(evaluation: Evaluation) -> None:
    """Whether synthetic ROIs are nearer to a patient that was learnt from than other patients are."""
    first, training = len(evaluation.real.labels), evaluation.training
    distances = evaluation.distances
    features = np.asarray(mmd.squared_distances(*[jnp.asarray(evaluation.overall)] * 2))
    nearest = {}
    for name, part, rows, offset in (
        ('fake', evaluation.fake, np.arange(len(evaluation.fake.labels)), first),
        ('real', evaluation.real, evaluation.held_out, 0),
    ):
        away = distances[np.ix_(offset + rows, training)].copy()
        seen = features[np.ix_(offset + rows, training)].copy()
        if offset == 0:  # a real ROI is not its own neighbour
            same = rows[:, None] == training[None]
            away[same] = seen[same] = np.inf
        number = min(evaluation.config.privacy.candidates, len(training) - 1)
        candidates = training[np.argsort(away, axis=1, kind='stable')[:, :number]]
        pairs = np.stack([np.repeat(rows, number), candidates.ravel()], axis=1)
        found = similarities(pairs, part.volumes, evaluation.real.volumes, 'standard', False)
        found = found.reshape(len(rows), number)
        best = found.argmax(axis=1)
        nearest[name] = found.max(axis=1), candidates[np.arange(len(rows)), best], np.sqrt(seen.min(axis=1))
    limits = float(nearest['real'][0].max()), float(nearest['real'][2].min())
    text = f'among {len(training)} real ROIs; MS-SSIM of the {number} nearest in voxels'
    counts = len(nearest['fake'][0]), len(nearest['real'][0])
    for name, place in (('nearest training ROI, MS-SSIM', 0), ('nearest training ROI, VGG distance', 2)):
        values = [
            evaluation.bootstrap(
                f'{name} {side}',
                lambda rows, v=nearest[side][place]: np.median(v[rows]),
                np.arange(n),
            )
            for side, n in zip(('fake', 'real'), counts, strict=True)
        ]
        evaluation.add(name, '', values, counts, 'floor', f'median; {text}')
    similar, which, far = nearest['fake']
    closer = (similar > limits[0]) | (far < limits[1])
    order = np.lexsort((-similar, ~closer))
    for row in order[: max(int(closer.sum()), _NEAREST)]:
        evaluation.neighbours.append(
            {
                'synthetic': evaluation.fake.ids[row],
                'real': evaluation.real.ids[which[row]],
                'ms_ssim': float(similar[row]),
                'vgg_distance': float(far[row]),
                'closer_than_any_held_out': bool(closer[row]),
            }
        )
    evaluation.notes.append(
        f'{int(closer.sum())} of {len(similar)} synthetic ROIs are closer to a real one that may have been learnt from '
        f'than any held-out one is (MS-SSIM above {limits[0]:.3f} or VGG distance under {limits[1]:.3g}).'
    )
    shown = order[: min(max(int(closer.sum()), _NEAREST), _PICTURED)]
    evaluation.pictures['nearest'] = viz.neighbours(
        evaluation.fake.volumes[shown],
        evaluation.real.volumes[which[shown]],
        [f'{evaluation.fake.ids[row]}, MS-SSIM {similar[row]:.3f}' for row in shown],
        [evaluation.real.ids[row] for row in which[shown]],
        evaluation.real.spacing,
    )


_MEASURES = {
    'ms_ssim': _measure_ms_ssim,
    'mmd': _measure_mmd,
    'frechet': _measure_frechet,
    'coverage': _measure_coverage,
    'agreement': _measure_agreement,
    'statistics': _measure_statistics,
    'privacy': _measure_privacy,
}
