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
import multiprocessing
import os
import shutil
import tempfile
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import nibabel as nib
import numpy as np
from ml_collections import ConfigDict
from scipy import ndimage
from tqdm import tqdm

from vqroi_jax.errors import InputError

CLASSES = ('LGG', 'HGG')
HEAD = (240, 240, 155)  # mm, NIfTI axes 0 (to the left), 1 (to the back), 2 (up), as BraTS
VERSION = 1  # of the drawing: raise it when the same seed gives other voxels
SETTINGS_FILE = 'phantom.json'
DESCRIPTION = 'SYNTHETIC phantom made by vqroi_jax, not a patient'
README = """SYNTHETIC DATA. These are phantoms that a program (vqroi_jax) has drawn, not MRI of patients.

The layout is that of BraTS 2019: CLASS/ID/ID_flair.nii.gz and ID_seg.nii.gz (1 necrotic or solid core,
2 oedema or margin, 4 enhancing rim), and name_mapping.csv with the class of every ID. The settings that made
this cohort are in phantom.json. Do not draw medical conclusions from it.
"""

_CENTRE = np.array([118.0, 131.0, 76.0])  # mm: middle of the brain in the head
_STEP = 3.0  # mm between the knots of the anatomy's fields
_REACH = 56.0  # mm: no tumour extends farther from its centre on any axis, so all fit a 128 mm ROI
_CSF, _WHITE, _GREY = 0.2, 1.0, 1.13  # FLAIR signal, relative to white matter


@dataclasses.dataclass(frozen=True)
class _Field:
    """A smooth function of space: a cubic B-spline with `knots` [a,b,c] every `step` mm from `origin` mm."""

    knots: np.ndarray
    origin: np.ndarray
    step: float

    def at(self, axes: Sequence[np.ndarray]) -> np.ndarray:
        """Values float32 [len(x),len(y),len(z)] at the grid of positions (mm) along three axes."""
        values = self.knots
        for axis, positions in enumerate(axes):
            place = (positions - self.origin[axis]) / self.step
            distance = np.abs(place[:, None] - np.arange(self.knots.shape[axis])[None]).astype(np.float32)
            near = 2 / 3 - distance**2 * (1 - distance / 2)
            weights = np.where(distance < 1, near, np.maximum(2 - distance, 0) ** 3 / 6)
            values = np.tensordot(values, weights, axes=(0, 1))  # the axes rotate once round
        return values


def _noise(rng: np.random.Generator, step: float) -> _Field:
    """A random field over the head of zero mean, unit variance and a grain of about `step` mm."""
    knots = rng.standard_normal([math.ceil(side / step) + 4 for side in HEAD]).astype(np.float32)
    return _Field(knots / 0.332, np.full(3, -2.0 * step), step)  # 0.332: sd of a cubic spline of white knots


def _ellipsoid(p: np.ndarray, centre: Sequence[float], radii: Sequence[float]) -> np.ndarray:
    """Signed distance (mm, about; negative inside) of points `p` [3,...] to an ellipsoid."""
    q = (p - np.reshape(centre, (3, 1, 1, 1))) / np.reshape(radii, (3, 1, 1, 1))
    length = np.sqrt((q**2).sum(0)) + 1e-3
    slope = np.sqrt(((q / np.reshape(radii, (3, 1, 1, 1))) ** 2).sum(0)) + 1e-6
    return length * (length - 1) / slope


def _tube(p: np.ndarray, path: Sequence[Sequence[float]]) -> np.ndarray:
    """Signed distance (mm) to a chain of cones; `path` lists x, y, z and radius."""
    result = np.full(p.shape[1:], np.inf)
    for start, end in zip(np.asarray(path[:-1], float), np.asarray(path[1:], float), strict=True):
        line = end[:3] - start[:3]
        offset = p - start[:3].reshape(3, 1, 1, 1)
        share = np.clip(np.tensordot(line, offset, 1) / (line @ line), 0, 1)
        distance = np.sqrt(((offset - line.reshape(3, 1, 1, 1) * share) ** 2).sum(0))
        result = np.minimum(result, distance - (start[3] + (end[3] - start[3]) * share))
    return result


def _union(*distances: np.ndarray, softness: float = 3.0) -> np.ndarray:
    """Signed distance to shapes that melt into each other over `softness` mm."""
    lowest = np.minimum.reduce(distances)
    return lowest - softness * np.log(sum(np.exp((lowest - d) / softness) for d in distances))


def _ramp(distance: np.ndarray, width: float) -> np.ndarray:
    """0 to 1 over `width` mm around distance 0: a partial-volume edge."""
    return np.clip(distance / width + 0.5, 0, 1)


@dataclasses.dataclass(frozen=True)
class _Tumour:
    """What is drawn for one tumour; lengths in mm, signals relative to white matter."""

    radius: float  # of the solid part
    ratios: np.ndarray  # [3] lengths of its own axes, product 1
    axes: np.ndarray  # [3,3] directions of its own axes
    irregular: float  # unevenness of the solid part's border
    oedema: float  # how far oedema reaches beyond the solid part
    rim: float  # thickness of the bright rim around a necrotic core; as large as the radius for no core
    cyst: float  # radius of a dark cyst in a tumour without necrosis; 0 for none
    solid_signal: float
    core_signal: float
    oedema_signal: float
    mottle: float  # sd of the texture
    push: float  # how far it moves the brain around it
    border: _Field  # random fields of unit variance, by what they disturb
    rim_width: _Field
    spread: _Field
    texture: _Field


def _draw_tumour(rng: np.random.Generator, label: str) -> _Tumour:
    """Draws a tumour of class `label`; every range overlaps with that of the other class."""
    # How malignant it looks, 0 to 1: shifts all ranges, and overlaps between the classes.
    look = float(np.clip(rng.normal(0.73 if label == 'HGG' else 0.27, 0.13), 0, 1))

    def between(low: float, high: float) -> float:
        return low + (high - low) * float(np.clip(look + rng.normal(0, 0.2), 0, 1))

    radius = float(np.clip(between(17, 21) * math.exp(rng.normal(0, 0.2)), 9, 30))
    ratios = np.exp(rng.normal(0, 0.15, 3))
    necrotic = rng.random() < 1 / (1 + math.exp(-16 * (look - 0.48)))
    cystic = rng.random() < 0.2 and not necrotic
    return _Tumour(
        radius=radius,
        ratios=ratios / ratios.prod() ** (1 / 3),
        axes=np.linalg.qr(rng.standard_normal((3, 3)))[0],
        irregular=between(0.8, 3.5),
        oedema=between(1.5, 15.0),
        rim=between(8.0, 4.5) if necrotic else radius,
        cyst=radius * rng.uniform(0.3, 0.5) if cystic else 0.0,
        solid_signal=rng.uniform(1.55, 1.9) + 0.25 * necrotic,
        core_signal=rng.uniform(0.45, 0.9),
        oedema_signal=rng.uniform(1.4, 1.7),
        mottle=between(0.03, 0.11),
        push=between(1.0, 6.0),
        border=_noise(rng, 11),
        rim_width=_noise(rng, 9),
        spread=_noise(rng, 20),
        texture=_noise(rng, 6),
    )


def _parts(p: np.ndarray) -> dict[str, np.ndarray]:
    """Signed distances (mm, negative inside) to the brain's parts at points `p` [3,a,b,c] around its middle."""
    m = np.concatenate([np.abs(p[:1]), p[1:]])  # both halves are alike
    cerebrum = _union(
        _ellipsoid(m, (27, -6, 14), (37, 68, 47)),
        _ellipsoid(m, (24, 36, 8), (36, 44, 38)),
        _ellipsoid(m, (17, -48, 0), (25, 31, 26)),
        _ellipsoid(m, (12, 4, -6), (26, 34, 20)),
    )
    temporal = _union(_ellipsoid(m, (45, -12, -25), (19, 35, 17)), _ellipsoid(m, (43, 18, -17), (20, 32, 17)))
    cerebellum = _ellipsoid(m, (21, 44, -38), (31, 27, 20))
    stem = _tube(p, [(0, 10, -12, 15), (0, 12, -34, 14), (0, 24, -64, 9)])
    return {'cerebrum': cerebrum, 'temporal': temporal, 'cerebellum': cerebellum, 'stem': stem}


def _folds(p: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    """Distance (mm, about) to the nearest sulcus: zeros of a random field that hardly changes in depth."""
    origin = np.stack([np.where(p[0] < 0, -22.0, 22.0), np.zeros_like(p[1]), np.zeros_like(p[2])])
    offset = p - origin
    length = np.sqrt((offset**2).sum(0)) + 1.0
    shell = offset * (0.3 + 0.7 * 48.0 / length)  # drawn together along the radius
    knots = rng.standard_normal((32, 32, 32)).astype(np.float32)
    step = 10.5
    waves = ndimage.map_coordinates(knots, shell / step + 16 + 3.7 * (p[:1] < 0), order=3, prefilter=False)
    slope = np.sqrt(sum(g**2 for g in np.gradient(waves, _STEP)))
    return waves / np.maximum(slope, 0.4 * slope.mean())


def _anatomy(p: np.ndarray, moved: np.ndarray, rng: np.random.Generator) -> dict[str, np.ndarray]:
    """What the brain is made of: distances in mm on the coarse grid.

    Args:
        p: points [3,a,b,c] around the brain's centre.
        moved: the same where the tissue found there would be without the tumour's push.
        rng: draws what differs between brains.
    """
    sway = 1.5 * rng.standard_normal()
    parts, inner = _parts(p), _parts(moved)
    m = np.concatenate([np.abs(moved[:1]), moved[1:]])
    wide = rng.uniform(0.7, 1.35)
    lateral = [(7, -30, 6, 3.0), (8, -16, 15, 4.0), (11, 10, 19, 3.5), (20, 30, 9, 5.5)]
    ventricles = np.minimum(
        _tube(m, [(x, y, z, r * wide) for x, y, z, r in [*lateral, (25, 46, 3, 2.0)]]),
        _tube(m, [(20, 30, 9, 4.0 * wide), (30, 16, -12, 2.0), (32, 0, -20, 2.0)]),
    )
    third = np.maximum(np.abs(moved[0]) - 1.5 * wide, _ellipsoid(m, (0, 2, -2), (20, 15, 11)))
    fourth = _ellipsoid(m, (0, 32, -36), (6, 4, 8))
    deep_grey = np.minimum(
        _ellipsoid(m, (11, 10, 1), (8, 14, 8)),
        np.minimum(_ellipsoid(m, (26, -6, -1), (6, 18, 11)), _ellipsoid(m, (13, -20, 6), (5, 10, 9))),
    )
    return {
        'surface': _union(*parts.values(), softness=2.0),
        'midline': moved[0] + sway * np.sin(moved[1] / 30),
        'bridge': _union(_ellipsoid(m, (0, -2, 10), (30, 42, 14)), _ellipsoid(m, (0, 8, -16), (30, 26, 22))),
        'sylvian': inner['temporal'] - inner['cerebrum'],
        'tentorium': inner['cerebellum'] - np.minimum(inner['cerebrum'], inner['temporal']),
        'cerebellum': np.minimum(inner['cerebellum'], inner['stem'] - 2),
        'sulcus': _folds(moved, rng),
        'ventricles': np.minimum(np.minimum(ventricles, third), fourth),
        'deep_grey': deep_grey,
        'folia': np.sqrt((moved[1] - 26) ** 2 + 2.2 * (moved[2] + 34) ** 2),
    }


def _place(rng: np.random.Generator, p: np.ndarray, radius: float) -> np.ndarray:
    """A point of the cerebrum, mm around its centre, where a tumour of `radius` mm lies mostly inside."""
    parts = _parts(p)
    room = -np.minimum(parts['cerebrum'], parts['temporal'])
    side = np.abs(p[0])
    room = np.where((parts['cerebellum'] > 8) & (parts['stem'] > 8), np.minimum(room, side), 0)
    fits = np.argwhere(room > min(0.75 * radius, 0.9 * room.max()))
    return p[(slice(None), *fits[rng.integers(len(fits))])]


def _tissue(sampled: dict[str, np.ndarray], open_sulci: float, soft: float) -> tuple[np.ndarray, np.ndarray]:
    """FLAIR signal of a healthy brain [i,j,k] and the distance (mm) to the nearest CSF; see `_anatomy`."""
    depth = -sampled['surface']
    fissure = np.where(sampled['bridge'] > 0, np.abs(sampled['midline']) - 0.3, 9.0)
    below = sampled['cerebellum'] < 0
    sulcus = np.abs(sampled['sulcus']) + np.maximum(depth - 15, 0) * 0.8 + 9.0 * below
    gap = np.minimum(sulcus, np.abs(sampled['sylvian']) * 0.8 + np.maximum(depth - 22, 0))
    gap = np.minimum(np.minimum(gap, fissure), np.abs(sampled['tentorium']))
    gap -= open_sulci * (1.3 - 0.03 * np.clip(depth, 0, 20))
    ribbon = np.minimum(gap, depth + 1.0)
    grey = np.maximum(_ramp(3.0 - ribbon, soft), _ramp(-sampled['deep_grey'], soft + 1))
    grey = np.where(below, 0.35 + 0.35 * np.cos(sampled['folia'] * (2 * np.pi / 4.2)), grey)
    signal = _WHITE + (_GREY - _WHITE) * grey
    caps = np.exp(-np.maximum(sampled['ventricles'], 0) / 2.0)
    signal += 0.12 * caps
    csf = np.maximum(_ramp(-gap, soft), _ramp(-sampled['ventricles'], soft))
    return signal + (_CSF - signal) * csf, np.minimum(ribbon, sampled['ventricles'])


def _tumour_in(
    tumour: _Tumour,
    centre: np.ndarray,
    axes: Sequence[np.ndarray],
    sampled: dict[str, np.ndarray],
    clear: np.ndarray,
    healthy: np.ndarray,
    soft: float,
) -> tuple[np.ndarray, np.ndarray]:
    """Draws the tumour into a box.

    Args:
        tumour: what to draw.
        centre: [3] mm in the head.
        axes: positions (mm) of the box's voxels along three axes.
        sampled: the anatomy's fields in the box.
        clear: distance (mm) to CSF in the box.
        healthy: signal of the healthy brain in the box.
        soft: width (mm) of edges.

    Returns:
        Signal with the tumour, and its mask (uint8, BraTS labels 1, 2 and 4).
    """
    offset = np.stack(np.meshgrid(*[a - c for a, c in zip(axes, centre, strict=True)], indexing='ij'))
    own = np.tensordot(tumour.axes / tumour.ratios[:, None], offset.astype(np.float32), axes=1)
    solid = tumour.radius - np.sqrt((own**2).sum(0)) + tumour.irregular * tumour.border.at(axes)
    spread = tumour.oedema * (1 + 0.55 * tumour.spread.at(axes)) + 0.8 * tumour.irregular * tumour.texture.at(axes)
    around = np.minimum(solid + np.maximum(spread, 1.0), 1.2 * (clear - 2.0))  # oedema stays in white matter
    side = np.sign(centre[0] - _CENTRE[0])
    barrier = np.minimum(-sampled['surface'], sampled['ventricles'])
    barrier = np.minimum(barrier, side * sampled['midline'] - 0.5)
    solid, around = np.minimum(solid, barrier), np.minimum(around, barrier)
    for positions, middle, axis in zip(axes, centre, range(3), strict=True):
        reach = (_REACH - np.abs(positions - middle)).reshape([-1 if a == axis else 1 for a in range(3)])
        solid, around = np.minimum(solid, reach), np.minimum(around, reach)
    whole = np.maximum(solid, around)

    texture = tumour.texture.at(axes)
    rim = tumour.rim * (1 + 0.3 * tumour.rim_width.at(axes))
    core = solid - np.maximum(rim, 1.5)
    inside = tumour.solid_signal * (1 + tumour.mottle * texture)
    dark = tumour.core_signal * (1 + 0.15 * texture)
    inside += (dark - inside) * _ramp(core, soft + 1.5)
    if tumour.cyst:
        cyst = tumour.cyst - np.sqrt((own**2).sum(0)) + tumour.border.at(axes)
        inside += (dark - inside) * _ramp(cyst, soft + 1)
    wet = tumour.oedema_signal * (1 + 0.5 * tumour.mottle * texture)
    signal = healthy + (wet - healthy) * _ramp(around - 0.5, soft + 2)
    signal += (inside - signal) * _ramp(solid, soft + 1)

    mask = np.zeros(whole.shape, np.uint8)
    mask[whole > 0] = 2
    mask[solid > 0] = 4
    mask[core > 0] = 1
    return signal, mask


def make_phantom(label: str, seed: int | Sequence[int], spacing: float) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Draws one phantom patient.

    Args:
        label: class, 'LGG' or 'HGG'.
        seed: whole number, or several; the same seed gives the same anatomy at every spacing.
        spacing: mm a voxel on all axes; the head is 240 x 240 x 155 mm.

    Returns:
        FLAIR image int16 [i,j,k] with background 0, mask uint8 [i,j,k] with BraTS labels (1 core, 2 oedema,
        4 enhancing rim), and affine float64 [4,4], at 1 mm that of BraTS.
    """
    rng = np.random.default_rng([CLASSES.index(label), *np.atleast_1d(seed)])
    knots = [np.arange(low, high, _STEP) for low, high in ((36, 204), (36, 228), (-2, 160))]
    origin = np.array([k[0] for k in knots])
    scale = rng.normal(1.0, 0.03, 3).reshape(3, 1, 1, 1)
    p = np.stack(np.meshgrid(*knots, indexing='ij')) - _CENTRE.reshape(3, 1, 1, 1)
    p = (p / scale).astype(np.float32)
    tumour = _draw_tumour(rng, label)
    centre = _place(rng, p, tumour.radius)
    offset = p - centre.reshape(3, 1, 1, 1)
    length = np.sqrt((offset**2).sum(0)) + 1e-3
    moved = p - offset / length * tumour.push * np.exp(-((length / (2.2 * tumour.radius)) ** 2))
    anatomy = _anatomy(p, moved, rng)
    fields = {name: _Field(values.astype(np.float32), origin, _STEP) for name, values in anatomy.items()}
    centre = centre * scale.ravel() + _CENTRE

    shape = [math.ceil(side / spacing) for side in HEAD]
    axes = [spacing * np.arange(n) + (spacing - 1) / 2 for n in shape]
    held = np.argwhere(anatomy['surface'] < 2)
    low, high = origin + _STEP * held.min(0), origin + _STEP * held.max(0)
    brain = tuple(slice(*np.searchsorted(a, (lo, hi))) for a, lo, hi in zip(axes, low, high, strict=True))
    axes = [a[s] for a, s in zip(axes, brain, strict=True)]
    sampled = {name: field.at(axes) for name, field in fields.items()}
    soft = max(1.2, 0.8 * spacing)
    signal, clear = _tissue(sampled, rng.uniform(0.6, 1.4), soft)

    box = tuple(slice(*np.searchsorted(a, (c - _REACH, c + _REACH))) for a, c in zip(axes, centre, strict=True))
    part = {name: values[box] for name, values in sampled.items()}
    boxes = [a[s] for a, s in zip(axes, box, strict=True)]
    signal[box], tumour_mask = _tumour_in(tumour, centre, boxes, part, clear[box], signal[box], soft)

    bias = 1 + 0.06 * _noise(rng, 70).at(axes)
    gain = rng.uniform(220, 420)
    inside = sampled['surface'] < 0
    grain = np.random.default_rng([*np.atleast_1d(seed), 1]).standard_normal((2, *signal.shape), np.float32)
    grain *= 0.05 * min(1.0, spacing**-1.5)
    signal = np.hypot(signal * bias + grain[0], grain[1])
    signal = ndimage.gaussian_filter(signal, 0.6 / spacing, truncate=2) if spacing < 2 else signal

    image = np.zeros(shape, np.int16)
    image[brain] = np.where(inside, np.maximum(gain * signal, 1), 0)
    mask = np.zeros(shape, np.uint8)
    mask[brain][box] = tumour_mask * inside[box]
    affine = np.diag([-spacing, -spacing, spacing, 1.0])
    affine[:3, 3] = np.array([-1, -1, 1]) * (spacing - 1) / 2 + np.array([0, HEAD[1] - 1, 0])
    return image, mask, affine


# ----------------------------------------------------------------------------------------------------- cohort


def _write_patient(task: tuple[str, str, tuple[int, int], float]) -> None:
    folder, label, seed, spacing = task
    image, mask, affine = make_phantom(label, seed, spacing)
    path = Path(folder)
    path.mkdir(parents=True)
    for voxels, suffix in ((image, 'flair'), (mask, 'seg')):
        nifti = nib.Nifti1Image(voxels, affine)
        nifti.header.set_xyzt_units('mm')
        nifti.header['descrip'] = DESCRIPTION.encode()
        nifti.to_filename(path / f'{path.name}_{suffix}.nii.gz')  # nibabel packs at level 1


def _settings(phantom: ConfigDict) -> dict:
    """The settings that make a cohort what it is, checked."""
    if phantom.patients < 1:
        raise InputError(f'data.phantom.patients is {phantom.patients}; give at least 1 patient of each class')
    if not 0.5 <= phantom.spacing <= 8:
        raise InputError(f'data.phantom.spacing is {phantom.spacing} mm; give one from 0.5 to 8')
    if phantom.seed < 0:
        raise InputError(f'data.phantom.seed is {phantom.seed}; give a whole number from 0 up')
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
        found = json.loads((folder / SETTINGS_FILE).read_text(encoding='utf-8'))
    except (OSError, ValueError):
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
        InputError: settings out of range, `folder` holds something else, or it cannot be written.
    """
    folder, settings = Path(folder).absolute(), _settings(phantom)
    if _is_written(folder, settings):
        return
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        partial = Path(tempfile.mkdtemp(prefix=f'.{folder.name}.', dir=folder.parent))
        try:
            _write_all(partial, settings, workers or os.cpu_count() or 1)
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
    progress = tqdm(total=len(tasks), desc='Drawing phantoms', unit='patient')
    with progress:
        if workers == 1:
            for task in tasks:
                _write_patient(task)
                progress.update()
        else:  # spawned, not forked: the parent may hold the threads of JAX
            context = multiprocessing.get_context('spawn')
            with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context) as pool:
                for _ in pool.map(_write_patient, tasks, chunksize=1):
                    progress.update()
    with open(folder / 'name_mapping.csv', 'w', newline='', encoding='utf-8') as file:
        rows = csv.writer(file)
        rows.writerow(('Grade', 'BraTS_2019_subject_ID'))
        rows.writerows(sorted((label, name) for label, name, _ in names))
    (folder / 'README.txt').write_text(README, encoding='utf-8')
    (folder / SETTINGS_FILE).write_text(json.dumps(settings, indent=2) + '\n', encoding='utf-8')
