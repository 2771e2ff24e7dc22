"""Figures of merit that look at what networks see in ROIs: distances of features, coverage, what a classifier says."""

import functools
import math
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np

from vqroi_jax import features
from vqroi_jax.merit.evaluation import Evaluation
from vqroi_jax.metrics import mmd
from vqroi_jax.metrics.coverage import precision_recall_density_coverage
from vqroi_jax.metrics.frechet import frechet_distance

# Names of Fréchet and kernel distances by plane. Only what is taken of Inception-v3's features is called FID.
BY_VGG16 = {plane: (f'FD-VGG, {plane}', f'KID-VGG, {plane}') for plane in features.PLANES}
BY_INCEPTION = {plane: (f'FID-{plane[0].upper()}', f'KID-Inception, {plane}') for plane in features.PLANES}
BY_CLASSIFIER = 'FD-3D'
COVERAGE = ('precision', 'recall', 'density', 'coverage')
AGREEMENT = 'class agreement'


def measure_frechet(evaluation: Evaluation) -> None:
    """How far the distributions of what networks see are apart."""
    _measure_planes(evaluation, BY_VGG16, 'VGG16 (LPIPS)', evaluation.seen_by_vgg16)
    if evaluation.config.inception:
        seen = evaluation.seen_by(features.inception_v3(evaluation.config.inception))
        _measure_planes(evaluation, BY_INCEPTION, "FID's Inception-v3", seen)
    if len(evaluation.real.classes) > 1:
        real, fake = (of_classifier[:, None] for _, of_classifier in evaluation.told_apart)
        text = f'features of a 3D classifier trained on {evaluation.reference}s other than those that the floor is of'
        repeats = evaluation.config.frechet_bootstrap
        for sides in evaluation.sides:
            evaluation.compare(BY_CLASSIFIER, sides, _slice_distance, real, fake, text, repeats)


def _measure_planes(
    evaluation: Evaluation,
    names: Mapping[str, tuple[str, str]],
    network: str,
    seen: Mapping[str, tuple[np.ndarray, np.ndarray]],
) -> None:
    """Fréchet and kernel distances of slices in each plane.

    Args:
        evaluation: that they are added to.
        names: what the two are called, by plane.
        network: what the slices were seen by.
        seen: its features, see `Evaluation.seen_by`.
    """
    settings, repeats = evaluation.config.slices, evaluation.config.frechet_bootstrap
    where = 'the whole ROI' if settings.empty == 'keep' else "the tumour's extent"
    text = f'{network}, {settings.number} slices of each volume over {where}'
    for plane, (real, fake) in seen.items():
        for sides in evaluation.sides:
            evaluation.compare(names[plane][0], sides, _slice_distance, real, fake, text, repeats)
    for plane, (real, fake) in seen.items():
        for sides in evaluation.sides:
            metric, n = names[plane][1], sides.n
            kernel = mmd.cubic_kernel_of_sets(np.concatenate([real[sides.one], real[sides.other], fake[sides.fake]]))
            one, other, of_fake = np.arange(n), np.arange(n, 2 * n), np.arange(2 * n, 3 * n)
            statistic = functools.partial(mmd.unbiased_of_rows, kernel)
            values = [
                evaluation.bootstrap(f'{metric} {sides.label}', statistic, one, part) for part in (of_fake, other)
            ]
            how = f'{text}, cubic kernel, unbiased: no slice is paired with one of the same ROI'
            evaluation.add(metric, sides.label, values, (n, n), 'lower', how)


def _slice_distance(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(_flat(x), _flat(y))


def _flat(seen: np.ndarray) -> np.ndarray:
    """Features of slices [n, slices, features] of volumes as one list of them."""
    return seen.reshape(-1, seen.shape[-1])


def measure_coverage(evaluation: Evaluation) -> None:
    """How many synthetic ROIs are realistic, and how much of the real ones they cover."""
    first = len(evaluation.real.labels)
    for sides in evaluation.sides:
        k = min(evaluation.config.neighbours, sides.n - 1)
        rows = np.concatenate([sides.one, sides.other, first + sides.fake])
        overall = jnp.asarray(evaluation.overall[rows])
        distances, n = mmd.squared_distances(overall, overall), sides.n
        one, other, fake = slice(0, n), slice(n, 2 * n), slice(2 * n, 3 * n)
        found = [
            precision_recall_density_coverage(distances[one, one], distances[part, part], distances[one, part], k)
            for part in (fake, other)
        ]
        for name in COVERAGE:
            spread_of = _spread_of_mean if name == 'density' else _spread_of_share
            values = [(float(np.mean(side[name])), spread_of(np.asarray(side[name]))) for side in found]
            evaluation.add(name, sides.label, values, (n, n), 'higher', f'VGG16 over all planes, {k} neighbours')


def _spread_of_share(hits: np.ndarray) -> float:
    """From a share of ROIs to the farther end of its 95 % interval (Wilson's), which is never 0."""
    share, n, z = float(np.mean(hits)), len(hits), 1.96
    middle = (share + z**2 / (2 * n)) / (1 + z**2 / n)
    half = z * math.sqrt(share * (1 - share) / n + z**2 / (4 * n**2)) / (1 + z**2 / n)
    return abs(middle - share) + half


def _spread_of_mean(values: np.ndarray) -> float:
    """Half the width of a mean's 95 % interval, by its standard error."""
    return 1.96 * float(np.std(values, ddof=1)) / math.sqrt(len(values))


def measure_agreement(evaluation: Evaluation) -> None:
    """How often a classifier tells synthetic ROIs as the class that they were made for."""
    if len(evaluation.real.classes) < 2:
        evaluation.notes.append('class agreement: there is only one class')
        return
    (real, _), (fake, _) = evaluation.told
    tried = (
        evaluation.held_out if evaluation.has_held_out else np.concatenate([part.other for part in evaluation.sides])
    )
    right = [
        [np.argmax(logits[rows], axis=1) == number for number, rows in enumerate(parts)]
        for logits, parts in (
            (fake, [evaluation.fake.of(number) for number in range(len(evaluation.sides))]),
            (real, [np.intersect1d(tried, evaluation.real.of(number)) for number in range(len(evaluation.sides))]),
        )
    ]
    epochs = evaluation.config.classifier.epochs
    text = f'a small CNN trained on {evaluation.reference}s for {epochs} epochs; floor: held-out ones'
    by_class = [[(float(np.mean(hits)), _spread_of_share(hits)) for hits in side] for side in right]
    for number, label in enumerate(evaluation.real.classes):
        counts = len(right[0][number]), len(right[1][number])
        evaluation.add(AGREEMENT, label, [side[number] for side in by_class], counts, 'floor', text)
    # Each class counts alike, for the two sides may have other numbers of them.
    means = [
        (float(np.mean([value for value, _ in side])), math.hypot(*(spread for _, spread in side)) / len(side))
        for side in by_class
    ]
    counts = sum(map(len, right[0])), sum(map(len, right[1]))
    evaluation.add(AGREEMENT, '', means, counts, 'floor', f'{text}; mean over the classes')
