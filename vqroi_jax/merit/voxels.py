"""Figures of merit that look at voxels: how alike ROIs are, how far sets are apart, what tumours measure."""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from scipy import stats

from vqroi_jax import viz
from vqroi_jax.data.roi_sets import RoiSet
from vqroi_jax.merit.evaluation import Evaluation
from vqroi_jax.metrics import mmd, ssim, tumour

MS_SSIM = {mode: f'MS-SSIM, {mode}' for mode in ssim.MODES}
MMD = ('MMD, linear, by mini-batches', 'MMD, linear, all at once', 'MMD, RBF, squared')
QUANTITIES = ('tumour volume [mL]', 'surface to volume [1/mm]', 'mean intensity')

_PAIRS = 8  # pairs that are compared together
_BINS = 32  # of intensities


def measure_ms_ssim(evaluation: Evaluation) -> None:
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
                weighted = functools.partial(mean_over_pairs, found, one, two)
                values.append(evaluation.bootstrap(f'{mode} {name} {sides.label}', weighted, np.arange(sides.n)))
            evaluation.add(
                MS_SSIM[mode],
                sides.label,
                values,
                (sides.n, sides.n),
                'floor',
                f'{len(chosen)} pairs within the class, {scales} of 5 scales'
                + (', foreground only' if config.foreground else '')
                + (', data range taken as 1 for [-1, 1]' if mode == 'release' else ''),
            )


def mean_over_pairs(values: np.ndarray, one: np.ndarray, two: np.ndarray, rows: np.ndarray) -> float:
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


def measure_mmd(evaluation: Evaluation) -> None:
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
        statistics: tuple[tuple[Callable[..., float], str], ...] = (
            (by_batches, f'batches of {batch}, {settings.repeats} times, [-1, 1]'),
            (functools.partial(mmd.linear, distances), 'voxels in [-1, 1], biased'),
            (
                functools.partial(mmd.unbiased_of_rows, kernel),
                f'voxels, bandwidth {bandwidth:.4g} (median distance of {2 * n} {evaluation.reference}s), unbiased',
            ),
        )
        for name, (statistic, text) in zip(MMD, statistics, strict=True):
            values = [evaluation.bootstrap(f'{name} {sides.label}', statistic, one, part) for part in (fake, other)]
            evaluation.add(name, sides.label, values, (n, n), 'lower', text)


def measure_statistics(evaluation: Evaluation) -> None:
    """What a radiologist would measure, and how its distributions differ."""
    measured = [_measurements(part) for part in (evaluation.real, evaluation.fake)]
    for name in QUANTITIES:
        real, fake = (quantities[name] for quantities in measured)
        for number, sides in enumerate(evaluation.sides):
            medians = (np.median(real[evaluation.real.of(number)]), np.median(fake[evaluation.fake.of(number)]))
            text = f'KS distance; medians of all: {evaluation.reference}s {medians[0]:.3g}, synthetic {medians[1]:.3g}'
            evaluation.compare(name, sides, _ks_distance, real, fake, text)
        of_real, of_fake = (
            {label: quantities[name][part.of(i)] for i, label in enumerate(part.classes)}
            for quantities, part in zip(measured, (evaluation.real, evaluation.fake), strict=True)
        )
        distances = {label: _ks_distance(values, of_fake[label]) for label, values in of_real.items()}
        evaluation.pictures[name] = viz.distributions(of_real, of_fake, distances, name, evaluation.reference)
    histograms = [
        {label: quantities['histogram'][part.of(i)].mean(axis=0) for i, label in enumerate(part.classes)}
        for quantities, part in zip(measured, (evaluation.real, evaluation.fake), strict=True)
    ]
    evaluation.pictures['intensities'] = viz.intensities(histograms[0], histograms[1], evaluation.reference)


def _ks_distance(x: np.ndarray, y: np.ndarray) -> float:
    return stats.ks_2samp(x, y).statistic


def _measurements(rois: RoiSet) -> dict[str, np.ndarray]:
    """By quantity, one number for each ROI; and `histogram`."""

    @jax.jit
    def measure(volume):
        inside = volume > -1
        ml, surface = tumour.volume_ml(inside, rois.spacing), tumour.surface_cm2(inside, rois.spacing)
        mean = jnp.mean(volume, axis=(1, 2, 3), where=inside)
        # cm² / mL = 1 / cm
        values = (ml, surface / jnp.maximum(ml, 1e-6) / 10, jnp.where(ml > 0, mean, -1.0))
        return dict(zip(QUANTITIES, values, strict=True)) | {
            'histogram': tumour.intensity_histogram(volume, inside, _BINS)
        }

    parts = [jax.device_get(measure(rois.volumes[i : i + 1])) for i in range(len(rois.labels))]
    return {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
