"""Figures of merit that look at what networks see in ROIs: distances of features, coverage, what a classifier says."""

import functools
import math

import jax.numpy as jnp
import numpy as np

from vqroi_jax.merit.evaluation import Evaluation
from vqroi_jax.metrics import mmd
from vqroi_jax.metrics.coverage import precision_recall_density_coverage
from vqroi_jax.metrics.frechet import frechet_distance

_KID_SLICES = 1000  # of each set; more are drawn from


def measure_frechet(evaluation: Evaluation) -> None:
    """How far the distributions of what networks see are apart."""
    settings, repeats = evaluation.config.slices, evaluation.config.frechet_bootstrap
    where = 'the whole ROI' if settings.empty == 'keep' else "the tumour's extent"
    text = f'VGG16 (LPIPS), {settings.number} slices of each volume over {where}'
    compared = [(f'FD-VGG, {plane}', text, *both) for plane, both in evaluation.planes.items()]
    if len(evaluation.real.classes) > 1:
        of_classifier = [features[:, None] for _, features in evaluation.told]
        compared.append(('FD-3D', 'features of a 3D classifier trained on real ROIs', *of_classifier))
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
                statistic = functools.partial(mmd.unbiased_of_rows, np.asarray(mmd.cubic_kernel(both, both)))
                rows = np.arange(len(x)), np.arange(len(x), len(both))
                values.append(evaluation.bootstrap(f'{metric} {sides.label}', statistic, *rows, repeats=repeats))
            how = f'{text}, cubic kernel, unbiased, {len(x)} slices'
            evaluation.add(metric, sides.label, values, (sides.n, sides.n), 'lower', how)


def _slice_distance(x: np.ndarray, y: np.ndarray) -> float:
    return frechet_distance(_flat(x), _flat(y))


def _flat(features: np.ndarray) -> np.ndarray:
    """Features of slices [n, slices, features] of volumes as one list of them."""
    return features.reshape(-1, features.shape[-1])


def measure_coverage(evaluation: Evaluation) -> None:
    """How many synthetic ROIs are realistic, and how much of the real ones they cover."""
    first = len(evaluation.real.labels)
    for sides in evaluation.sides:
        k = min(evaluation.config.neighbours, sides.n - 1)
        rows = np.concatenate([sides.one, sides.other, first + sides.fake])
        features = jnp.asarray(evaluation.overall[rows])
        distances, n = np.asarray(mmd.squared_distances(features, features)), sides.n
        one, other, fake = slice(0, n), slice(n, 2 * n), slice(2 * n, 3 * n)
        found = [
            precision_recall_density_coverage(distances[one, one], distances[part, part], distances[one, part], k)
            for part in (fake, other)
        ]
        for name in found[0]:
            values = [(float(np.mean(side[name])), 1.96 * float(np.std(side[name])) / math.sqrt(n)) for side in found]
            evaluation.add(name, sides.label, values, (n, n), 'higher', f'VGG16 over all planes, {k} neighbours')


def measure_agreement(evaluation: Evaluation) -> None:
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
    parts |= dict(zip(evaluation.real.classes, zip(*right, strict=True), strict=True))
    for label, of_sides in parts.items():
        shares = [float(np.mean(side)) for side in of_sides]
        counts = [len(side) for side in of_sides]
        values = [(share, 1.96 * math.sqrt(share * (1 - share) / n)) for share, n in zip(shares, counts, strict=True)]
        evaluation.add('class agreement', label, values, counts, 'floor', text)
