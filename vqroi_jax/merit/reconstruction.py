"""Figures of merit of reconstructions: how near each is to the ROI that it was made from.

The floor is no aim here but what comes of not looking: the figures of another real ROI of the class in the
reconstruction's place.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from vqroi_jax import features
from vqroi_jax.data.roi_sets import RoiSet
from vqroi_jax.errors import InputError
from vqroi_jax.merit.evaluation import Evaluation
from vqroi_jax.metrics import reconstruction
from vqroi_jax.metrics.ssim import ssim
from vqroi_jax.models import perceptual

FIGURES = {  # which is better, and what it is of
    'reconstruction, L1': ('lower', 'voxels in [-1, 1]'),
    'reconstruction, PSNR [dB]': ('higher', 'whole ROI, peak 2 for [-1, 1]'),
    'reconstruction, PSNR in the box [dB]': ('higher', "the tumour's box, peak 2 for [-1, 1]"),
    'reconstruction, SSIM': ('higher', '3D, one scale, 11 taps'),
    'reconstruction, LPIPS': ('lower', 'VGG16, sum over {slices} axial slices of {where}'),
}


def originals(real: RoiSet, fake: RoiSet) -> np.ndarray:
    """What each reconstruction was made from: the real ROI of the same name and class.

    Returns:
        int [n], for each ROI of `fake` a row of `real`.

    Raises:
        InputError: a reconstruction has no ROI, or a set has two ROIs of one name and class.
    """
    rows: dict[str, dict[tuple[str, str], int]] = {}
    for field, part in (('real', real), ('fake', fake)):
        found = rows.setdefault(field, {})
        for row, (name, number) in enumerate(zip(part.names, part.labels, strict=True)):
            label = part.classes[number]
            first = found.setdefault((label, name), row)
            if first != row:
                raise InputError(
                    f'config.{field}={part.path}: {part.ids[first]} and {part.ids[row]} are both {name} of class '
                    f"{label}; 'reconstruction' pairs ROIs by name and class"
                )
    for (label, name), row in rows['fake'].items():
        if (label, name) not in rows['real']:
            raise InputError(
                f"config.fake={fake.path}: {fake.ids[row]} has no pair: 'reconstruction' looks for an ROI called "
                f'{name} of class {label} in config.real={real.path}'
            )
    return np.array([rows['real'][pair] for pair in rows['fake']])


def measure_reconstruction(evaluation: Evaluation) -> None:
    """How near reconstructions are to their ROIs."""
    real, fake, settings = evaluation.real, evaluation.fake, evaluation.config.slices
    made_from, weights = originals(real, fake), perceptual.load_weights()
    others = np.empty_like(made_from)
    for number, label in enumerate(real.classes):
        # Each beside the next one in a ring, so that none is beside itself.
        ring = evaluation.rng(f'others {label}').permutation(real.of(number))
        following = dict(zip(ring, np.roll(ring, -1), strict=True))
        rows = fake.of(number)
        others[rows] = [following[row] for row in made_from[rows]]
    sides = []
    for part, rows in ((fake, np.arange(len(made_from))), (real, others)):
        found = []
        for row, original in zip(rows, made_from, strict=True):
            volume = real.volumes[original]
            places = features.places(volume, features.PLANES['axial'] - 1, settings.number, settings.empty == 'keep')
            found.append(jax.device_get(_compare(weights, part.volumes[row], volume, places)))
        sides.append({name: np.array([values[name] for values in found]) for name in FIGURES})
    groups = {label: fake.of(number) for number, label in enumerate(fake.classes)}
    if len(groups) > 1:
        groups = {'': np.arange(len(made_from)), **groups}
    where = 'the whole ROI' if settings.empty == 'keep' else "the original's extent"
    scaled = '; each ROI scaled by its own maximum' if evaluation.config.intensity == 'each' else ''
    floor = f'floor: another {evaluation.reference} of the class'
    for name, (better, text) in FIGURES.items():
        how = f'{text.format(slices=settings.number, where=where)}{scaled}; {floor}'
        for label, rows in groups.items():
            values = [
                evaluation.bootstrap(f'{name} {label}', lambda drawn, of=side[name]: float(np.mean(of[drawn])), rows)
                for side in sides
            ]
            evaluation.add(name, label, values, (len(rows), len(rows)), better, how)
    unused = len(real.labels) - len(made_from)
    if unused:
        evaluation.notes.append(f'{unused} of the {len(real.labels)} real ROIs have no reconstruction.')
    equal = int(np.sum(sides[0]['reconstruction, L1'] == 0))
    if equal:
        evaluation.notes.append(
            f'{equal} of the {len(made_from)} reconstructions equal their ROI: their PSNR is infinite, and a mean with '
            'them too (shown as a dash).'
        )


@jax.jit
def _compare(weights: Any, other: jax.Array, volume: jax.Array, places: jax.Array) -> dict[str, jax.Array]:
    """The figures of a reconstruction [D, H, W] of a volume, looked at in these axial slices; scalars by name."""
    other, volume = other[None, ..., None], volume[None, ..., None]
    found = (
        reconstruction.l1(other, volume)[0],
        reconstruction.psnr(other, volume, jnp.ones_like(volume, bool))[0],
        reconstruction.psnr(other, volume, reconstruction.tumour_box(volume))[0],
        ssim(other, volume)[0],
        perceptual.perceptual_loss(perceptual.LPIPS(), weights, other, volume, places[None]),
    )
    return dict(zip(FIGURES, found, strict=True))
