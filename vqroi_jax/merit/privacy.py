"""Figures of merit of privacy: whether synthetic ROIs are copies of some that were learnt from."""

import itertools

import jax
import jax.numpy as jnp
import numpy as np

from vqroi_jax import features, viz
from vqroi_jax.data.learnt_from import LEARNT_FROM_FILE
from vqroi_jax.merit.evaluation import Evaluation
from vqroi_jax.merit.voxels import similarities
from vqroi_jax.metrics import mmd

NEAREST = ('nearest training ROI, MS-SSIM', 'nearest training ROI, VGG distance')

# Axes of [D, H, W] that a real ROI may be mirrored along, as stage 2 may learn it (`augment.flip`), and what they are.
_MIRRORINGS = tuple(axes for n in range(4) for axes in itertools.combinations(range(3), n))
_AXES = ('top to bottom', 'left to right', 'front to back')
_BLOCK = 32  # ROIs that are compared together
_SHOWN = 6  # pairs of neighbours at least
_PICTURED = 24  # and at most


def measure_privacy(evaluation: Evaluation) -> None:
    """Whether synthetic ROIs are nearer to a patient that was learnt from than other patients are, mirrored or not."""
    real, training, held_out = evaluation.real, evaluation.training, evaluation.held_out
    evaluation.notes.extend(provenance(evaluation))
    # No scan of a real ROI's own patient counts as its neighbour, the ROI itself least of all.
    patients = np.array(real.patients)
    own = patients[held_out][:, None] == patients[training][None]
    held_out, own = held_out[~own.all(axis=1)], own[~own.all(axis=1)]
    if not held_out.size:
        evaluation.notes.append('privacy: the real ROIs are of one patient, so there is no other to be nearest to')
        return
    of_network = _features_apart(evaluation)
    number = min(evaluation.config.privacy.candidates, len(training))
    nearest = {}
    for name, part, rows, offset in (
        ('fake', evaluation.fake, np.arange(len(evaluation.fake.labels)), len(real.labels)),
        ('real', real, held_out, 0),
    ):
        away, mirrorings = _voxels_apart(part.volumes, rows, real.volumes, training)
        seen = of_network[offset + rows]
        if name == 'real':
            away[own] = seen[own] = np.inf
        places = np.argsort(away, axis=1, kind='stable')[:, :number]
        candidates, mirrored = training[places], np.take_along_axis(mirrorings, places, axis=1)
        pairs = np.stack([np.repeat(rows, number), candidates.ravel()], axis=1)
        found = np.empty(len(pairs), np.float32)
        for mirroring in np.unique(mirrored):
            some = mirrored.ravel() == mirroring
            others = _mirrored(real.volumes, mirroring)
            found[some] = similarities(pairs[some], part.volumes, others, 'standard', False)
        found = np.where(np.isinf(np.take_along_axis(away, places, axis=1)), -np.inf, found.reshape(len(rows), number))
        best = np.arange(len(rows)), found.argmax(axis=1)
        nearest[name] = (
            found[best],
            candidates[best],
            np.sqrt(seen.min(axis=1)),
            mirrored[best],
            training[seen.argmin(axis=1)],
        )
    limits = float(nearest['real'][0].max()), float(nearest['real'][2].min())
    text = (
        f'among {len(training)} {evaluation.reference}s in all 8 mirrorings; MS-SSIM of the {number} nearest in voxels'
    )
    counts = len(nearest['fake'][0]), len(nearest['real'][0])
    for name, place in zip(NEAREST, (0, 2), strict=True):
        values = [
            evaluation.bootstrap(
                f'{name} {side}',
                lambda rows, v=nearest[side][place]: np.median(v[rows]),
                np.arange(n),
            )
            for side, n in zip(('fake', 'real'), counts, strict=True)
        ]
        evaluation.add(name, '', values, counts, 'floor', f'median; {text}')
    similar, which, far, mirrored, by_vgg = nearest['fake']
    closer = (similar > limits[0]) | (far < limits[1])
    order = np.lexsort((-similar, ~closer))
    for row in order[: max(int(closer.sum()), _SHOWN)]:
        evaluation.neighbours.append(
            {
                'synthetic': evaluation.fake.ids[row],
                'real': real.ids[which[row]],
                'mirrored': ', '.join(_AXES[axis] for axis in _MIRRORINGS[mirrored[row]]),
                'ms_ssim': float(similar[row]),
                'vgg_distance': float(far[row]),
                'real_by_vgg': real.ids[by_vgg[row]],
                'closer_than_any_held_out': bool(closer[row]),
            }
        )
    other = 'held-out' if evaluation.has_held_out else 'other real'
    chance = len(similar) / (len(nearest['real'][0]) + 1)
    evaluation.notes.append(
        f'{int(closer.sum())} of {len(similar)} synthetic ROIs are closer to a real one that may have been learnt from '
        f'than any {other} one is (MS-SSIM above {limits[0]:.3f} or VGG distance under {limits[1]:.3g}), mirrored or '
        f'not. Of a model that copies nobody about {chance:.1f} would be by either measure, by chance, so between '
        f'{chance:.1f} and {2 * chance:.1f} in all.'
    )
    shown = order[: min(max(int(closer.sum()), _SHOWN), _PICTURED)]
    titles = [evaluation.real.ids[row] for row in which[shown]]
    evaluation.pictures['nearest'] = viz.neighbours(
        evaluation.fake.volumes[shown],
        np.stack([_mirrored(real.volumes[which[row]], mirrored[row]) for row in shown]),
        [evaluation.fake.ids[row] for row in shown],
        [title + ', mirrored' * bool(mirrored[row]) for title, row in zip(titles, shown, strict=True)],
        [
            f'MS-SSIM {similar[row]:.3f}, VGG distance {far[row]:.3g}' + ' to another' * bool(by_vgg[row] != which[row])
            for row in shown
        ],
        real.spacing,
        evaluation.reference,
    )


def _mirrored(volumes: np.ndarray, mirroring: int) -> np.ndarray:
    """A view of volumes [..., D, H, W] in one of `_MIRRORINGS`."""
    return np.flip(volumes, tuple(axis - 3 for axis in _MIRRORINGS[mirroring]))


def _voxels_apart(
    volumes: np.ndarray, rows: np.ndarray, others: np.ndarray, training: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Squared distances of voxels, float32 [rows, training], each in the mirroring that is nearest, and which it is."""
    away, mirrorings = np.empty((len(rows), len(training)), np.float32), np.empty((len(rows), len(training)), int)
    for column in range(0, len(training), _BLOCK):
        learnt = jnp.asarray(others[training[column : column + _BLOCK]])
        for row in range(0, len(rows), _BLOCK):
            block = np.s_[row : row + _BLOCK, column : column + _BLOCK]
            away[block], mirrorings[block] = _nearest_mirroring(jnp.asarray(volumes[rows[block[0]]]), learnt)
    return away, mirrorings


@jax.jit
def _nearest_mirroring(x: jax.Array, y: jax.Array) -> tuple[jax.Array, jax.Array]:
    flat, apart = x.reshape(len(x), -1), []
    for axes in _MIRRORINGS:
        mirrored = jnp.flip(y, [axis + 1 for axis in axes]).reshape(len(y), -1)
        apart.append(mmd.squared_distances(flat, mirrored))
    return jnp.min(jnp.stack(apart), axis=0), jnp.argmin(jnp.stack(apart), axis=0)


def _features_apart(evaluation: Evaluation) -> np.ndarray:
    """Squared distances of VGG16's features from all ROIs, real ones first, to those learnt from in any mirroring.

    A mirroring along the axis that slices are taken along changes none of them, so each plane has four, not eight.

    Returns:
        float32 [n, training], of the mirroring that is nearest.
    """
    settings, network = evaluation.config.slices, features.vgg16()
    seen: dict[tuple[str, tuple[int, ...]], np.ndarray] = {}
    for plane, axis in features.PLANES.items():
        seen[plane, ()] = evaluation.seen_by_vgg16[plane][0][evaluation.training].mean(axis=1)
        for axes in _MIRRORINGS[1:]:
            if axis - 1 in axes:
                continue
            blocks = []
            for start in range(0, len(evaluation.training), _BLOCK):
                volumes = evaluation.real.volumes[evaluation.training[start : start + _BLOCK]]
                mirrored = np.flip(volumes, tuple(a + 1 for a in axes))
                found = features.plane_features(mirrored, plane, settings.number, settings.empty == 'keep', network)
                blocks.append(found.mean(axis=1))
            seen[plane, axes] = np.concatenate(blocks)
    nearest = np.full((len(evaluation.overall), len(evaluation.training)), np.inf, np.float32)
    for axes in _MIRRORINGS:
        planes = [seen[plane, tuple(a for a in axes if a != axis - 1)] for plane, axis in features.PLANES.items()]
        apart = mmd.squared_distances(jnp.asarray(evaluation.overall), jnp.asarray(np.concatenate(planes, axis=1)))
        nearest = np.minimum(nearest, apart)
    return nearest


def provenance(evaluation: Evaluation) -> list[str]:
    """What a reader should know of who is held out: notes, none where record and splits agree."""
    real, fake = evaluation.real, evaluation.fake
    if fake.learnt_from is None:
        return [
            f'From which patients the generator has learnt is not known: {fake.path} has no {LEARNT_FROM_FILE} that '
            'says so. '
            + (
                'What is held out is so from the training split of the real set alone.'
                if evaluation.has_held_out
                else 'No real ROI is known to be held out.'
            )
        ]
    if real.splits is None:
        return [f'{real.path} does not say of which patients its ROIs are, so none is known to be held out.']
    split = np.array(real.splits) == 'train'
    leaked, unused = (int(np.sum(rows)) for rows in (evaluation.learnt & ~split, split & ~evaluation.learnt))
    if not leaked + unused:
        return []
    return [
        f'The splits of {real.path} are not those that the generator was trained with: it has learnt from the patients '
        f'of {leaked} ROIs that are not in the training split, and not from those of {unused} that are. Its '
        f'{LEARNT_FROM_FILE} decides what is held out here, not the splits.'
    ]
