"""Figures of merit of privacy: whether synthetic ROIs are copies of some that were learnt from."""

import jax.numpy as jnp
import numpy as np

from vqroi_jax import viz
from vqroi_jax.data.learnt_from import LEARNT_FROM_FILE
from vqroi_jax.merit.evaluation import Evaluation
from vqroi_jax.merit.voxels import similarities
from vqroi_jax.metrics import mmd

NEAREST = ('nearest training ROI, MS-SSIM', 'nearest training ROI, VGG distance')

_SHOWN = 6  # pairs of neighbours at least
_PICTURED = 24  # and at most


def measure_privacy(evaluation: Evaluation) -> None:
    """Whether synthetic ROIs are nearer to a patient that was learnt from than other patients are."""
    first, training = len(evaluation.real.labels), evaluation.training
    patients, held_out = np.array(evaluation.real.patients), evaluation.held_out
    evaluation.notes.extend(provenance(evaluation))
    # No scan of a real ROI's own patient counts as its neighbour, the ROI itself least of all.
    own = patients[held_out][:, None] == patients[training][None]
    held_out, own = held_out[~own.all(axis=1)], own[~own.all(axis=1)]
    if not held_out.size:
        evaluation.notes.append('privacy: the real ROIs are of one patient, so there is no other to be nearest to')
        return
    distances = evaluation.distances
    features = np.asarray(mmd.squared_distances(*[jnp.asarray(evaluation.overall)] * 2))
    number = min(evaluation.config.privacy.candidates, len(training))
    nearest = {}
    for name, part, rows, offset in (
        ('fake', evaluation.fake, np.arange(len(evaluation.fake.labels)), first),
        ('real', evaluation.real, held_out, 0),
    ):
        away = distances[np.ix_(offset + rows, training)].copy()
        seen = features[np.ix_(offset + rows, training)].copy()
        if name == 'real':
            away[own] = seen[own] = np.inf
        places = np.argsort(away, axis=1, kind='stable')[:, :number]
        candidates = training[places]
        pairs = np.stack([np.repeat(rows, number), candidates.ravel()], axis=1)
        found = similarities(pairs, part.volumes, evaluation.real.volumes, 'standard', False)
        found = np.where(np.isinf(np.take_along_axis(away, places, axis=1)), -np.inf, found.reshape(len(rows), number))
        best = found.argmax(axis=1)
        nearest[name] = found.max(axis=1), candidates[np.arange(len(rows)), best], np.sqrt(seen.min(axis=1))
    limits = float(nearest['real'][0].max()), float(nearest['real'][2].min())
    text = f'among {len(training)} real ROIs; MS-SSIM of the {number} nearest in voxels'
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
    similar, which, far = nearest['fake']
    closer = (similar > limits[0]) | (far < limits[1])
    order = np.lexsort((-similar, ~closer))
    for row in order[: max(int(closer.sum()), _SHOWN)]:
        evaluation.neighbours.append(
            {
                'synthetic': evaluation.fake.ids[row],
                'real': evaluation.real.ids[which[row]],
                'ms_ssim': float(similar[row]),
                'vgg_distance': float(far[row]),
                'closer_than_any_held_out': bool(closer[row]),
            }
        )
    other = 'held-out' if evaluation.has_held_out else 'other real'
    evaluation.notes.append(
        f'{int(closer.sum())} of {len(similar)} synthetic ROIs are closer to a real one that may have been learnt from '
        f'than any {other} one is (MS-SSIM above {limits[0]:.3f} or VGG distance under {limits[1]:.3g}).'
    )
    shown = order[: min(max(int(closer.sum()), _SHOWN), _PICTURED)]
    evaluation.pictures['nearest'] = viz.neighbours(
        evaluation.fake.volumes[shown],
        evaluation.real.volumes[which[shown]],
        [f'{evaluation.fake.ids[row]}, MS-SSIM {similar[row]:.3f}' for row in shown],
        [evaluation.real.ids[row] for row in which[shown]],
        evaluation.real.spacing,
    )


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
