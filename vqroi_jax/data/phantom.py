"""Synthetic FLAIR brains with tumours: the cohort that stands in for data which may not be shipped.

A phantom is drawn from smooth fields that are defined in millimetres and only then sampled at the voxels, so
a seed gives the same brain at any spacing. `write_phantom_cohort` writes patients to disk in the layout of
BraTS 2019; from there on they take the way of real data (cohort -> ROI -> training).

Nothing here is medical knowledge to rely on: shapes and contrasts are made to look like FLAIR, and the two
classes to be told apart nearly, not perfectly, well.
"""

import csv
import dataclasses
import json
import math
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
from ml_collections import ConfigDict
from scipy import ndimage

from vqroi_jax import progress
from vqroi_jax.data import workers as processes
from vqroi_jax.data.phantom_brain import (
    CENTRE,
    HEAD,
    Brain,
    SmoothField,
    draw_brain,
    edge_width,
    healthy,
    noise,
    ramp,
    slabs,
)
from vqroi_jax.errors import InputError

CLASSES = ('LGG', 'HGG')
VERSION = 1  # of the drawing: raise it when the same seed gives other voxels
SETTINGS_FILE = 'phantom.json'
DESCRIPTION = 'SYNTHETIC phantom made by vqroi_jax, not a patient'
README = """SYNTHETIC DATA. These are phantoms that a program (vqroi_jax) has drawn, not MRI of patients.

The layout is that of BraTS 2019: CLASS/ID/ID_flair.nii.gz and ID_seg.nii.gz (1 necrotic or solid core,
2 oedema or margin, 4 enhancing rim), and name_mapping.csv with the class of every ID. The settings that made
this cohort are in phantom.json. Do not draw medical conclusions from it.
"""

_REACH = 56.0  # mm: no tumour extends farther from its centre on any axis, so all fit a 128 mm ROI


@dataclasses.dataclass(frozen=True)
class _Tumour:
    """What is drawn for one tumour; lengths in mm, signals relative to white matter."""

    radius: float  # of the solid part
    ratios: np.ndarray  # [3] lengths of its own axes, product 1
    axes: np.ndarray  # [3,3] directions of its own axes
    irregular: float  # unevenness of the solid part's border
    oedema: float  # how far oedema reaches beyond the solid part
    rim: float  # thickness of the bright rim around a necrotic core; above the radius for no core
    cyst: float  # radius of a dark cyst in a tumour without necrosis; 0 for none
    solid_signal: float
    core_signal: float
    oedema_signal: float
    mottle: float  # sd of the texture
    push: float  # how far it moves the brain around it
    border: SmoothField  # random fields of unit variance, by what they disturb
    rim_width: SmoothField
    spread: SmoothField
    texture: SmoothField


def _draw_tumour(rng: np.random.Generator, label: str) -> _Tumour:
    """Draws a tumour of class `label`; every range overlaps with that of the other class."""
    # How malignant it looks, 0 to 1: shifts all ranges, and overlaps between the classes.
    look = float(np.clip(rng.normal(0.76 if label == 'HGG' else 0.24, 0.09), 0, 1))

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(np.clip(look + rng.normal(0, 0.15), 0, 1))

    radius = float(np.clip(between(17, 19) * math.exp(rng.normal(0, 0.2)), 9, 30))
    ratios = np.exp(rng.normal(0, 0.15, 3))
    necrotic = rng.random() < 1 / (1 + math.exp(-20 * (look - 0.5)))
    cystic = rng.random() < 0.1 and not necrotic
    return _Tumour(
        radius=radius,
        ratios=ratios / ratios.prod() ** (1 / 3),
        axes=np.linalg.qr(rng.standard_normal((3, 3)))[0],
        irregular=between(0.8, 3.5),
        oedema=between(1.5, 12.0),
        rim=between(8.0, 4.5) if necrotic else 4 * radius,
        cyst=radius * rng.uniform(0.25, 0.45) if cystic else 0.0,
        solid_signal=rng.uniform(1.55, 1.9) + 0.2 * necrotic,
        core_signal=rng.uniform(0.45, 0.9),
        oedema_signal=rng.uniform(1.45, 1.8),
        mottle=between(0.03, 0.11),
        push=between(0.2, 0.6) * radius,
        border=noise(rng, 11),
        rim_width=noise(rng, 9),
        spread=noise(rng, 20),
        texture=noise(rng, 6),
    )


def _depths(
    tumour: _Tumour, brain: Brain, axes: Sequence[np.ndarray], clear: np.ndarray
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How deep (mm, negative outside) voxels lie in the tumour's solid part, its dark core and its oedema."""
    offsets = np.meshgrid(*[a - c for a, c in zip(axes, brain.centre, strict=True)], indexing='ij', sparse=True)
    rows = (tumour.axes / tumour.ratios[:, None]).astype(np.float32)
    own = [sum(r * x.astype(np.float32) for r, x in zip(row, offsets, strict=True)) for row in rows]
    distance = np.sqrt(sum(x**2 for x in own))
    border, texture = tumour.border.at(axes), tumour.texture.at(axes)
    solid = tumour.radius - distance + tumour.irregular * border
    spread = tumour.oedema * (1 + 0.55 * tumour.spread.at(axes)) + 0.8 * tumour.irregular * texture
    oedema = np.minimum(solid + np.maximum(spread, 1), 1.2 * (clear - 2))  # it keeps to white matter

    # Neither leaves the brain, enters a ventricle, crosses the midline or outgrows the ROI.
    at = brain.sample(axes, 'surface', 'ventricles', 'midline')
    own_side = np.sign(brain.centre[0] - CENTRE[0]) * at['midline'] - 0.5
    limits = [-at['surface'], at['ventricles'], own_side, *[_REACH - np.abs(x) for x in offsets]]
    for limit in limits:
        np.minimum(solid, limit, out=solid)
        np.minimum(oedema, limit, out=oedema)
    core = solid - np.maximum(tumour.rim * (1 + 0.4 * tumour.rim_width.at(axes)), 1.5)
    if tumour.cyst:
        off_centre = np.sqrt((own[0] - 0.4 * tumour.radius) ** 2 + own[1] ** 2 + own[2] ** 2)
        core = np.maximum(core, tumour.cyst - off_centre + border)
    return solid, core, oedema


def _add_tumour(
    tumour: _Tumour, brain: Brain, axes: Sequence[np.ndarray], signal: np.ndarray, clear: np.ndarray, soft: float
) -> np.ndarray:
    """Draws the tumour into `signal`, in place, and returns its mask (uint8, BraTS labels 1, 2 and 4).

    Args:
        tumour: what to draw.
        brain: where to draw it.
        axes: positions (mm) of the voxels along three axes.
        signal: of the healthy brain, relative to white matter.
        clear: distance (mm) to CSF.
        soft: width (mm) of edges.
    """
    solid, core, oedema = _depths(tumour, brain, axes, clear)
    texture = tumour.texture.at(axes)
    inside = tumour.solid_signal * (1 + tumour.mottle * texture)
    inside += (tumour.core_signal * (1 + 0.15 * texture) - inside) * ramp(core, soft + 1.5)
    wet = tumour.oedema_signal * (1 + 0.5 * tumour.mottle * texture)
    signal += (wet - signal) * ramp(oedema - 0.5, soft + 2)
    signal += (inside - signal) * ramp(solid, soft + 1)
    mask = np.zeros(signal.shape, np.uint8)
    whole, parts = ndimage.label((oedema > 0) | (solid > 0))
    if parts > 1:
        whole = whole == 1 + np.argmax(np.bincount(whole.ravel())[1:])  # a rater leaves the specks out
    mask[whole > 0] = 2
    mask[(whole > 0) & (solid > 0)] = 4
    mask[(whole > 0) & (core > 0) & (solid > 0)] = 1
    return mask


def _scan(brain: Brain, axes: Sequence[np.ndarray], signal: np.ndarray, spacing: float, seed: Sequence[int]) -> None:
    """Gives `signal`, in place, what a scanner adds: uneven sensitivity, Rician noise and a little blur."""
    rng = np.random.default_rng(seed)
    sd = 0.06 * min(1.0, spacing**-1.5)  # a larger voxel averages more
    for slab in slabs(len(signal)):
        uneven = signal[slab] * (1 + 0.06 * brain.bias.at([axes[0][slab], *axes[1:]]))
        grain = rng.standard_normal((2, *uneven.shape), np.float32) * sd
        signal[slab] = np.hypot(uneven + grain[0], grain[1])
    if spacing < 2:
        ndimage.gaussian_filter(signal, 0.6 / spacing, truncate=2, output=signal)


def make_phantom(label: str, seed: int | Sequence[int], spacing: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one phantom patient.

    Args:
        label: class, 'LGG' or 'HGG'.
        seed: whole number, or several; the same seed gives the same anatomy at every spacing.
        spacing: mm a voxel on all axes; the head is 240 x 240 x 155 mm.

    Returns:
        FLAIR image int16 [i,j,k] with background 0, mask uint8 [i,j,k] with BraTS labels (1 dark core, 2 oedema,
        4 solid part or rim), and affine float64 [4,4], at 1 mm that of BraTS.
    """
    seed = [CLASSES.index(label), *np.atleast_1d(seed)]
    rng = np.random.default_rng(seed)
    tumour = _draw_tumour(rng, label)
    brain = draw_brain(rng, tumour.radius, tumour.push)
    gain = rng.uniform(220, 420)

    shape = [math.ceil(side / spacing) for side in HEAD]
    axes = [spacing * np.arange(n) + (spacing - 1) / 2 for n in shape]
    region, axes = _cut(axes, brain.low, brain.high)
    signal, clear, inside = healthy(brain, axes, spacing)
    box, box_axes = _cut(axes, brain.centre - _REACH, brain.centre + _REACH)
    mask = np.zeros(shape, np.uint8)
    clear += spacing - 1  # coarse voxels span the narrow sulci
    tumour_mask = _add_tumour(tumour, brain, box_axes, signal[box], clear[box], edge_width(spacing))
    inside[box] |= tumour_mask > 0
    mask[region][box] = tumour_mask
    _scan(brain, axes, signal, spacing, [*seed, 1])
    image = np.zeros(shape, np.int16)
    image[region] = np.where(inside, np.maximum(gain * signal, 1), 0)

    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    affine[:3, 3] = np.array([-1, -1, 1]) * (spacing - 1) / 2 + np.array([0, HEAD[1] - 1, 0])
    return image, mask, affine


def _cut(axes: Sequence[np.ndarray], low: np.ndarray, high: np.ndarray) -> tuple[tuple[slice, ...], list[np.ndarray]]:
    """The slices of three axes (mm) between two corners, and the axes there."""
    slices = tuple(slice(*np.searchsorted(a, corner)) for a, *corner in zip(axes, low, high, strict=True))
    return slices, [a[s] for a, s in zip(axes, slices, strict=True)]


def _write_patient(task: tuple[str, str, tuple[int, int], float]) -> None:
    folder, label, seed, spacing = task
    image, mask, affine = make_phantom(label, seed, spacing)
    path = Path(folder)
    path.mkdir(parents=True)
    for voxels, suffix in ((image, 'flair'), (mask, 'seg')):
        nifti = nib.Nifti1Image(voxels, affine)
        nifti.set_sform(affine, code='scanner')
        nifti.set_qform(affine, code='scanner')
        nifti.header.set_xyzt_units('mm')
        nifti.header['descrip'] = DESCRIPTION.encode()
        nifti.to_filename(path / f'{path.name}_{suffix}.nii.gz')  # nibabel packs at level 1


def check_settings(phantom: ConfigDict) -> None:
    """Refuses settings of which no cohort can be drawn.

    Raises:
        InputError: naming the setting and what it may be.
    """
    if phantom.patients < 1:
        raise InputError(f'data.phantom.patients is {phantom.patients}; give at least 1 patient of each class')
    if not 0.5 <= phantom.spacing <= 8:
        raise InputError(f'data.phantom.spacing is {phantom.spacing} mm; give one from 0.5 to 8')
    if phantom.seed < 0:
        raise InputError(f'data.phantom.seed is {phantom.seed}; give a whole number from 0 up')


def _settings(phantom: ConfigDict) -> dict:
    """The settings that make a cohort what it is, checked."""
    check_settings(phantom)
    numbers = {
        'patients': int(phantom.patients),
        'seed': int(phantom.seed),
        'spacing': float(phantom.spacing),
    }
    return {'synthetic': True, 'version': VERSION, 'classes': list(CLASSES), **numbers}


def _is_written(folder: Path, settings: dict) -> bool:
    """Whether `folder` holds this very cohort already; InputError where it holds anything else."""
    if not folder.exists() or (folder.is_dir() and not any(folder.iterdir())):
        return False
    try:
        found = dict(json.loads((folder / SETTINGS_FILE).read_text(encoding='utf-8')))
    except (OSError, ValueError, TypeError):
        raise InputError(
            f'{folder} is not empty and not a phantom cohort (no readable {SETTINGS_FILE}); '
            'move it away or choose another folder'
        ) from None
    if found != settings:
        differing = [
            f'{key} {found.get(key)} not {value}' for key, value in settings.items() if found.get(key) != value
        ]
        raise InputError(
            f'{folder} holds a phantom cohort with other settings ({", ".join(differing)}); '
            'delete it or choose another folder'
        )
    return True


def write_phantom_cohort(folder: str | os.PathLike, phantom: ConfigDict, workers: int) -> None:
    """Writes phantom patients in the layout of BraTS 2019, or keeps the same cohort written before.

    They are written beside `folder`, and moved there only when all are done: it is never half a cohort.

    Args:
        folder: where to; missing, empty, or holding a phantom cohort.
        phantom: settings `patients` (of each class), `seed` and `spacing` (mm); see configs/prepare.py.
        workers: processes that draw; 0 for one a core.

    Raises:
        InputError: settings out of range, `folder` holds something else, it cannot be written, or a process that
            draws was killed.
    """
    folder, settings = Path(folder).absolute(), _settings(phantom)
    if _is_written(folder, settings):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
        try:
            _write_all(partial, settings, workers)
            partial.chmod(0o755)
            partial.replace(folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    except OSError as error:
        if folder.exists() and _is_written(folder, settings):  # another process was faster
            return
        raise InputError(f'cannot write the phantom cohort to {folder}: {error.strerror or error}') from error


def _write_all(folder: Path, settings: dict, workers: int) -> None:
    names = [(label, f'phantom_{label}_{n:04d}', n) for n in range(settings['patients']) for label in CLASSES]
    tasks = [
        (str(folder / label / name), label, (settings['seed'], number), settings['spacing'])
        for label, name, number in names
    ]
    number = processes.count(workers, len(tasks))
    with progress.bar('drawing phantoms', 'patient', total=len(tasks)) as bar:
        if number == 1:
            for task in tasks:
                _write_patient(task)
                bar.update()
        else:
            with processes.pool(number, 'draws phantoms') as pool:
                for _ in pool.map(_write_patient, tasks):
                    bar.update()
    with open(folder / 'name_mapping.csv', 'w', newline='', encoding='utf-8') as file:
        rows = csv.writer(file)
        rows.writerow(('Grade', 'BraTS_2019_subject_ID'))
        rows.writerows(sorted((label, name) for label, name, _ in names))
    (folder / 'README.txt').write_text(README, encoding='utf-8')
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
