"""Figures of merit of one set of ROIs beside another: what `vqroi_jax.evaluate` reports.

`measure` adds to an `Evaluation` the groups of figures that its config asks for; `merit` has a file for each kind of
them. Each figure has its floor, the same between two halves of the real set, with as many ROIs on every side. (Those of
reconstructions are of pairs, and have their own.)
"""

import jax
import numpy as np

from vqroi_jax import progress
from vqroi_jax.data.roi_sets import FULL, RoiSet
from vqroi_jax.errors import InputError
from vqroi_jax.merit import networks, privacy, reconstruction, voxels
from vqroi_jax.merit.evaluation import Evaluation, halves
from vqroi_jax.models import perceptual

GROUPS = {
    'ms_ssim': voxels.measure_ms_ssim,
    'mmd': voxels.measure_mmd,
    'frechet': networks.measure_frechet,
    'coverage': networks.measure_coverage,
    'agreement': networks.measure_agreement,
    'statistics': voxels.measure_statistics,
    'privacy': privacy.measure_privacy,
    'reconstruction': reconstruction.measure_reconstruction,
}
METRICS = {  # what each group's figures are called; a set may be too small for some
    'ms_ssim': (*voxels.MS_SSIM.values(),),
    'mmd': voxels.MMD,
    'frechet': (
        *(name for names in (networks.BY_VGG16, networks.BY_INCEPTION) for both in names.values() for name in both),
        networks.BY_CLASSIFIER,
    ),
    'coverage': networks.COVERAGE,
    'agreement': (networks.AGREEMENT,),
    'statistics': voxels.QUANTITIES,
    'privacy': privacy.NEAREST,
    'reconstruction': (*reconstruction.FIGURES,),
}
SEEN_BY_VGG16 = ('frechet', 'coverage', 'privacy', 'reconstruction')
FEWEST = 4  # real ROIs of a class: two halves of two


def measure(evaluation: Evaluation) -> None:
    """Adds the figures that the config asks for.

    Raises:
        InputError: there are too few ROIs of a class, a real one is empty, or a reconstruction has no ROI.
    """
    _check_sets(evaluation)
    groups = [name for name in GROUPS if name in evaluation.config.metrics]
    # As on a CPU everywhere: by default accelerators multiply float32 with fewer digits.
    with jax.default_matmul_precision('highest'):
        for group in progress.bar('measuring', 'metric', groups):
            GROUPS[group](evaluation)


def _check_sets(evaluation: Evaluation) -> None:
    shape, seen = evaluation.real.volumes.shape[1:], {*SEEN_BY_VGG16} & {*evaluation.config.metrics}
    if seen and min(shape) < perceptual.SMALLEST:
        raise InputError(
            f'ROIs of {" x ".join(map(str, shape))} voxels are too small for VGG16, which needs {perceptual.SMALLEST} '
            f'along each side; leave {", ".join(sorted(seen))} out of config.metrics'
        )
    halved = set(evaluation.config.metrics) != {'reconstruction'}
    for name, part, least in (('real', evaluation.real, FEWEST if halved else 2), ('fake', evaluation.fake, 2)):
        for label, count in part.counts().items():
            if count < least:
                raise InputError(
                    f'config.{name}={part.path} has {count} ROI{"s" * (count != 1)} of class {label}; at least {least} '
                    'are needed' + (', as they are split in two' if name == 'real' and halved else '')
                )
    if halved:
        for number, label in enumerate(evaluation.real.classes):
            if min(map(len, halves(evaluation.real.of(number), evaluation.real.patients))) < 2:
                raise InputError(
                    f'config.real={evaluation.real.path} has too few patients of class {label}: its ROIs are split in '
                    'two halves of at least 2, no patient in both'
                )
    constant = [i for i, volume in zip(evaluation.real.ids, evaluation.real.volumes, strict=True) if volume.max() <= -1]
    if constant:
        raise InputError(f'config.real={evaluation.real.path}: {constant[0]} is empty: it has no tumour')
    empty = sum(bool(volume.max() <= -1) for volume in evaluation.fake.volumes)
    if empty:
        evaluation.notes.append(f'{empty} of the synthetic ROIs are empty')
    _check_filled(evaluation)
    if 'reconstruction' in evaluation.config.metrics:
        reconstruction.originals(evaluation.real, evaluation.fake)
    if halved and not evaluation.has_held_out:
        evaluation.notes.append(
            'Not of every class some real ROIs are known as learnt from and some as held out: the nearest neighbour of '
            'a real ROI is looked for among all others, and the classifier is tried on one half, and trained on '
            'those of other patients.'
        )


def _check_filled(evaluation: Evaluation) -> None:
    """Notes of which classes most synthetic tumours have no end within the box."""

    def count(part: RoiSet, rows: np.ndarray) -> int:
        return sum(_fills(part.volumes[row]) for row in rows)

    for number, label in enumerate(evaluation.real.classes):
        fake, real = evaluation.fake.of(number), evaluation.real.of(number)
        filled = count(evaluation.fake, fake)
        if 2 * filled > len(fake):
            evaluation.notes.append(
                f'In {filled} of {len(fake)} synthetic ROIs of class {label} the tumour reaches all six faces of the '
                f'box or nearly fills it; so it does in {count(evaluation.real, real)} of {len(real)} '
                f'{evaluation.reference}s. Where these are few, the generator has failed.'
            )


def _fills(volume: np.ndarray) -> bool:
    """Whether a tumour, what is above -1, reaches all six faces of the box or fills nearly all of it."""
    tumour = volume > -1
    faces = [tumour.take(place, axis).any() for axis in range(3) for place in (0, -1)]
    return bool(all(faces) or tumour.mean() > FULL)
