"""Two sets of ROIs to compare, whoever made them: read, checked, and laid out alike.

A set is a prepared cohort, or a folder of NIfTI files: one that `vqroi_jax.generate` left, with its manifest, or any
other, whose classes are its folders' names. All volumes come out as [D, H, W] in [-1, 1], with the background at -1 and
the axes of BraTS, and lie in one file that is read piece by piece, so that memory does not grow with their number.
"""

import contextlib
import dataclasses
import functools
import hashlib
import math
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from ml_collections import ConfigDict
from scipy import ndimage

from vqroi_jax import progress
from vqroi_jax.data import pipeline, samples
from vqroi_jax.data.cohort import in_order
from vqroi_jax.data.learnt_from import LEARNT_FROM_FILE, read_learnt_from
from vqroi_jax.data.roi import BACKGROUND_SHARE, edge_voxels, scale, to_brats, to_nifti, to_volume, voxel_spacing
from vqroi_jax.data.splits import SPLITS
from vqroi_jax.errors import InputError
from vqroi_jax.workdir import require_space

INTENSITIES = ('as_is', 'each')
GRIDS = ('same', 'resample')
FULL = 0.95  # of the box: a tumour that fills more is hardly one

_SCRATCH = '.volumes-'  # begins the name of the folder that they lie in
_SPACING_TOLERANCE = 0.01  # relative
_ROUNDING = 1e-6  # of the intensities' range
_BACKGROUND_TOLERANCE = 0.01  # of the intensities' range, that a background may be off
_SOFT_SHARE = 0.1  # of a box's edges, above which voxels a little above the background mean that it is not quite even
_NIFTI = re.compile(r'\.nii(\.gz)?$', re.IGNORECASE)


@dataclasses.dataclass(frozen=True)
class RoiSet:
    """Some ROIs.

    Attributes:
        path: where they come from, as the user gave it.
        ids: [n] names, unique.
        labels: int [n], positions in `classes`.
        classes: names of the classes.
        volumes: float32 [n, D, H, W] in [-1, 1], background -1; on disk, indexed by rows.
        spacing: mm a voxel along D, H and W.
        range: smallest and largest intensity of all files before they were scaled.
        patients: [n] the patient of each; the ROI's own name where the source does not say.
        splits: [n] 'train', 'val' or 'test', of a prepared cohort; None of other sources.
        sha256: of names, classes, splits, voxel sizes, voxels and `learnt_from`.
        facts: what else a reader should know, as lines of text.
        learnt_from: patients that the generator of these ROIs was trained on; None where that is not known, and of real
            ROIs.
        phantoms: whether they are drawings, not of patients, as far as the source says.
    """

    path: str
    ids: tuple[str, ...]
    labels: np.ndarray
    classes: tuple[str, ...]
    volumes: np.ndarray
    spacing: tuple[float, float, float]
    range: tuple[float, float]
    patients: tuple[str, ...]
    splits: tuple[str, ...] | None
    sha256: str
    facts: tuple[str, ...]
    learnt_from: frozenset[str] | None = None
    phantoms: bool = False

    @property
    def names(self) -> tuple[str, ...]:
        """[n] ids without folders and the endings of files."""
        return tuple(_NIFTI.sub('', name.rpartition('/')[2]) for name in self.ids)

    def of(self, label: int) -> np.ndarray:
        """Rows of a class."""
        return np.flatnonzero(self.labels == label)

    def among(self, *splits: str) -> np.ndarray:
        """Rows of some splits."""
        return np.flatnonzero(np.isin(self.splits or (), splits))

    def counts(self) -> dict[str, int]:
        """Number of ROIs by class."""
        return {name: len(self.of(number)) for number, name in enumerate(self.classes)}

    def describe(self) -> dict[str, Any]:
        """What a reader should know of the set, as JSON has it."""
        return {
            'path': self.path,
            'rois': self.counts(),
            'voxels': list(self.volumes.shape[1:]),
            'spacing_mm': list(self.spacing),
            'intensity_range': list(self.range),
            'sha256': self.sha256,
            'facts': list(self.facts),
            'phantoms': self.phantoms,
        }


@contextlib.contextmanager
def open_sets(
    real: str, fake: str, settings: ConfigDict, folder: Path, some: bool = False
) -> Iterator[tuple[RoiSet, RoiSet]]:
    """Reads two sets and makes sure that they can be compared.

    Args:
        real: path of one.
        fake: path of the other.
        settings: `classes` (names of those to compare; empty: all), `intensity` and `grid`: see configs/evaluate.py.
        folder: an existing one, for the file that the volumes are kept in; it is gone at the end.
        some: whether the second may lack classes of the first.

    Yields:
        The two, of the same classes in the same order, on the same grid.

    Raises:
        InputError: there is nothing to read or it is damaged, the two have not the same classes, or are of different
            intensity ranges, spacings or shapes and `settings` do not say that they are to be made alike.
    """
    for field, value, known in (('intensity', settings.intensity, INTENSITIES), ('grid', settings.grid, GRIDS)):
        if value not in known:
            raise InputError(f'config.{field}={value!r} is none of {", ".join(known)}')
    sources = {name: _open(name, path) for name, path in (('real', real), ('fake', fake))}
    classes = _common_classes(sources, tuple(settings.classes), some)
    for source in sources.values():
        source.keep(classes)
    grid = sources['real'].grid
    if settings.grid == 'same':
        _check_grids(sources, grid)
    if not jax.distributed.is_initialized():  # of a process that was killed
        for left in folder.glob(f'{_SCRATCH}*'):
            shutil.rmtree(left, ignore_errors=True)
    if fake == real:
        del sources['fake']
    voxels = sum(len(source.ids) for source in sources.values()) * math.prod(grid[0])
    require_space(folder, voxels * 4, 'comparing the volumes')
    with tempfile.TemporaryDirectory(dir=folder, prefix=_SCRATCH) as scratch:
        raw = {name: _Raw.read(name, source, grid, Path(scratch)) for name, source in sources.items()}
        scales = _scales(raw, sources, settings.intensity)
        finished = {name: _finish(name, sources[name], raw[name], scales[name], classes, grid[1]) for name in sources}
        yield finished['real'], finished.get('fake', finished['real'])


@dataclasses.dataclass
class _Source:
    """What is to be read: files or records.

    Attributes:
        path: as the user gave it.
        ids: names.
        labels: class names.
        places: where each is.
        read: from a place to voxels [i, j, k] and affine [4, 4].
        facts: see `RoiSet`.
        patients: None where they are not known.
        splits: None where there are none.
        learnt_from: see `RoiSet`.
        phantoms: see `RoiSet`.
    """

    path: str
    ids: list[str]
    labels: list[str]
    places: list[Any]
    read: Callable[[Any], tuple[np.ndarray, np.ndarray]]
    facts: tuple[str, ...]
    patients: list[str] | None = None
    splits: list[str] | None = None
    learnt_from: frozenset[str] | None = None
    phantoms: bool = False

    def keep(self, classes: Sequence[str]) -> None:
        """Forgets the ROIs of other classes."""
        kept = [i for i, label in enumerate(self.labels) if label in classes]
        for name in ('ids', 'labels', 'places', 'patients', 'splits'):
            values = getattr(self, name)
            if values is not None:
                setattr(self, name, [values[i] for i in kept])

    def oriented(self, index: int) -> tuple[np.ndarray, tuple[float, float, float]]:
        """Volume [D, H, W] with the axes of BraTS, and its spacing along them."""
        voxels, affine = self.read(self.places[index])
        return to_volume(to_brats(voxels, affine)[0]), voxel_spacing(affine)

    @functools.cached_property
    def grid(self) -> tuple[tuple[int, ...], tuple[float, float, float]]:
        """Shape and spacing of the first ROI."""
        volume, spacing = self.oriented(0)
        return volume.shape, spacing


def _read_record(place: tuple[pipeline.RoiSource, int]) -> tuple[np.ndarray, np.ndarray]:
    source, index = place
    roi = source.roi(index)
    return to_nifti((roi.volume + 1) / 2), roi.affine


def _read_file(path: Path) -> tuple[np.ndarray, np.ndarray]:
    image = samples.load_nifti(path, str(path))
    return samples.read_voxels(image, str(path)).astype(np.float32), image.affine


def _open(name: str, path: str) -> _Source:
    if not path:
        raise InputError(f'config.{name} is empty: name a folder of NIfTI files or a prepared cohort')
    folder = Path(path).expanduser()
    if not folder.is_dir():
        raise InputError(f'config.{name}={path}: there is no such folder')
    return _open_cohort(path, folder) if pipeline.is_prepared(folder) else _open_files(name, path, folder)


def _open_cohort(path: str, folder: Path) -> _Source:
    cohort = pipeline.open_cohort(folder)
    sources = {name: cohort.split(name) for name in SPLITS}
    places = [(source, i) for source in sources.values() for i in range(len(source))]
    synthetic = ('phantoms: drawings, not patients',) if cohort.report['synthetic'] else ()
    return _Source(
        path,
        ids=[source.ids[i] for source, i in places],
        labels=[cohort.classes[source.labels[i]] for source, i in places],
        facts=('prepared cohort', *synthetic),
        patients=[cohort.scans[source.ids[i]]['patient'] for source, i in places],
        splits=[source.name for source, _ in places],
        places=places,
        read=_read_record,
        phantoms=cohort.report['synthetic'],
    )


def _open_files(name: str, path: str, folder: Path) -> _Source:
    """Finds the files of a folder: those of its manifest, or all NIfTI files in it."""
    rows = samples.read_manifest(folder / samples.MANIFEST_FILE)
    if rows:
        missing = {samples.KEY, 'class'} - rows[0].keys()
        if missing:
            raise InputError(f'{folder / samples.MANIFEST_FILE} has no column {" or ".join(sorted(missing))}')
        ids, labels = [row[samples.KEY] for row in rows], [row['class'] for row in rows]
        facts = tuple(
            f'{title}: {", ".join(sorted(values))}'
            for title, values in (
                ('seed', {row.get('seed', '') for row in rows}),
                ('checkpoint', {row.get('checkpoint', '') for row in rows}),
                ('trained on', {row.get('trained_on', '') for row in rows}),
            )
            if values != {''}
        )
        facts = ('synthetic ROIs with a manifest', *facts)
    else:
        there = (file.relative_to(folder) for file in folder.rglob('*') if _NIFTI.search(file.name))
        files = sorted(file for file in there if not any(part.startswith('.') for part in file.parts))
        if not files:
            raise InputError(
                f'config.{name}={path} has no {samples.MANIFEST_FILE} and no NIfTI file (.nii or .nii.gz), and is no '
                'prepared cohort'
            )
        ids, labels = [file.as_posix() for file in files], [file.parent.name or 'all' for file in files]
        facts = ('NIfTI files, classes by folder',)
    learnt = read_learnt_from(folder)
    if learnt:
        facts += (f'generator learnt from {len(learnt.train)} patients, listed in its {LEARNT_FROM_FILE}',)
    places = [folder / file for file in ids]
    return _Source(path, ids, labels, places, _read_file, facts, learnt_from=learnt.train if learnt else None)


def _common_classes(sources: dict[str, _Source], asked: tuple[str, ...], some: bool) -> tuple[str, ...]:
    """The classes to compare; `some`: that the first alone must have."""
    there = {name: in_order(set(source.labels)) for name, source in sources.items()}
    wanted = asked or in_order(set(there['real']) | set(there['fake']))
    for name, labels in there.items():
        missing = [label for label in wanted if label not in labels and not (some and name == 'fake')]
        if missing:
            raise InputError(
                f'config.{name}={sources[name].path} has no ROI of class {", ".join(missing)}, only of '
                f'{", ".join(labels)}; name the classes to compare, for instance --config.classes="(\'{labels[0]}\',)"'
            )
    return wanted


def _check_grids(sources: dict[str, _Source], grid: tuple) -> None:
    shape, spacing = grid
    other_shape, other_spacing = sources['fake'].grid
    if not np.allclose(spacing, other_spacing, rtol=_SPACING_TOLERANCE, atol=0) or shape != other_shape:
        raise InputError(
            f'config.real={sources["real"].path} has ROIs of {_grid_text(shape, spacing)}, '
            f'config.fake={sources["fake"].path} of {_grid_text(other_shape, other_spacing)}: they do not compare. '
            "Give --config.grid=resample to bring the second to the first's grid"
        )


def _grid_text(shape: Sequence[int], spacing: Sequence[float]) -> str:
    voxels, mm = (' x '.join(f'{side:g}' for side in sides) for sides in (shape, spacing))
    return f'{voxels} voxels of {mm} mm'


@dataclasses.dataclass
class _Raw:
    """The volumes of a set as the files have them, on the grid of the comparison."""

    volumes: np.memmap  # float32 [n, D, H, W]
    ranges: np.ndarray  # [n, 2] smallest and largest intensity of each
    backgrounds: np.ndarray  # [n] intensity around the tumour of each
    sha256: str

    @classmethod
    def read(cls, name: str, source: _Source, grid: tuple, folder: Path) -> '_Raw':
        (shape, spacing), digest = grid, hashlib.sha256()
        volumes = np.lib.format.open_memmap(folder / f'{name}.npy', 'w+', np.float32, (len(source.ids), *shape))
        ranges, backgrounds = np.empty((len(volumes), 2)), np.empty(len(volumes))
        rows = progress.bar(f'reading {name}', 'ROI', range(len(volumes)))
        own = source.grid
        for row in rows:
            volume, there = source.oriented(row)
            if volume.shape != own[0] or not np.allclose(there, own[1], rtol=_SPACING_TOLERANCE, atol=0):
                raise InputError(
                    f'config.{name}={source.path}: {source.ids[row]} has {_grid_text(volume.shape, there)}, '
                    f'{source.ids[0]} {_grid_text(*own)}; a set has one grid'
                )
            split = source.splits[row] if source.splits else ''
            size = ' '.join(f'{mm:.4f}' for mm in there)
            digest.update(f'{source.ids[row]}\0{source.labels[row]}\0{split}\0{size}\0'.encode())
            digest.update(np.ascontiguousarray(volume).data)
            backgrounds[row] = _background(volume)
            volumes[row] = _on_grid(volume, there, shape, spacing, backgrounds[row])
            ranges[row] = volume.min(), volume.max()
        if source.learnt_from is not None:
            digest.update('\0'.join(['learnt from', *sorted(source.learnt_from)]).encode())
        return cls(volumes, ranges, backgrounds, digest.hexdigest())

    @property
    def range(self) -> tuple[float, float]:
        """Smallest and largest intensity of all."""
        return float(self.ranges[:, 0].min()), float(self.ranges[:, 1].max())

    @property
    def convention(self) -> tuple[float, float] | None:
        """[0, 1] or [-1, 1], if all intensities lie there, or a little below, and the background fits; else None."""
        low, high = self.range
        if high <= 1 and low >= -_BACKGROUND_TOLERANCE:
            return 0.0, 1.0
        if high <= 1 and low >= -1 - 2 * _BACKGROUND_TOLERANCE and np.median(self.backgrounds) < -0.5:
            return -1.0, 1.0
        return None


def _background(volume: np.ndarray) -> float:
    """The intensity around a tumour: of most of the box's edges or, where that is none or high, the lowest up to 0."""
    edges = edge_voxels(volume)
    value, low, high = float(np.median(edges)), float(volume.min()), float(volume.max())
    even = np.mean(np.abs(edges - value) <= _BACKGROUND_TOLERANCE * (high - low)) > BACKGROUND_SHARE
    return value if even and value - low <= high - value else min(low, 0.0)


def _on_grid(
    volume: np.ndarray, spacing: Sequence[float], shape: Sequence[int], wanted: Sequence[float], background: float
) -> np.ndarray:
    """A volume resampled linearly to voxels of the wanted size, and cropped or padded evenly to the wanted shape."""
    if not np.allclose(spacing, wanted, rtol=_SPACING_TOLERANCE, atol=0):
        sides = [max(1, round(n * mm / w)) for n, mm, w in zip(volume.shape, spacing, wanted, strict=True)]
        zoom = [side / n for side, n in zip(sides, volume.shape, strict=True)]
        volume = ndimage.zoom(volume, zoom, order=1, mode='nearest', grid_mode=True)
    missing = [max(target - side, 0) for side, target in zip(volume.shape, shape, strict=True)]
    for axis, (side, target) in enumerate(zip(volume.shape, shape, strict=True)):
        start = max(side - target, 0) // 2
        volume = volume.take(range(start, start + min(side, target)), axis)
    return np.pad(volume, [(n // 2, n - n // 2) for n in missing], constant_values=background)


def _scales(raw: dict[str, _Raw], sources: dict[str, _Source], intensity: str) -> dict[str, np.ndarray]:
    """What becomes -1 and 1 in each volume, [n, 2] by set.

    Raises:
        InputError: with 'as_is', where the two are not both in [0, 1] or both in [-1, 1].
    """
    conventions = {name: part.convention for name, part in raw.items()}
    if intensity == 'as_is':
        (one, *others) = set(conventions.values())
        if one is None or others:
            ranges = ', '.join(
                f'config.{name}={sources[name].path} in [{part.range[0]:g}, {part.range[1]:g}]'
                for name, part in raw.items()
            )
            raise InputError(
                f'the intensities do not compare: {ranges}; expected both in [0, 1] or both in [-1, 1], '
                'the lowest being the background. Give '
                '--config.intensity=each to scale every ROI by its own largest intensity, as preparation does'
            )
        return {name: np.tile(one, (len(part.ranges), 1)) for name, part in raw.items()}
    scales = {}
    for name, part in raw.items():
        low = np.full(len(part.ranges), -1.0) if conventions[name] == (-1, 1) else part.backgrounds
        high = np.where(part.ranges[:, 1] > low, part.ranges[:, 1], low + 1)  # an empty one stays empty
        scales[name] = np.stack([low, high], axis=1)
    return scales


def _finish(
    name: str,
    source: _Source,
    raw: _Raw,
    scales: np.ndarray,
    classes: tuple[str, ...],
    spacing: tuple[float, float, float],
) -> RoiSet:
    """Scales a set in place; what is wrong with its background is put right as far as can be, and told."""
    below, above, filled = np.zeros((3, len(scales)))
    for row, (low, high) in enumerate(scales):
        below[row] = np.count_nonzero(raw.volumes[row] < low - _ROUNDING * (high - low))
        volume = scale(raw.volumes[row], (low, high))
        faint = (volume > -1) & (volume <= -1 + 2 * _BACKGROUND_TOLERANCE)
        if edge_voxels(faint).mean() > _SOFT_SHARE:
            volume[faint] = -1
            above[row] = faint.sum()
        filled[row] = np.mean(volume > -1)
        raw.volumes[row] = volume
    raw.volumes.flush()
    notes = tuple(
        f'{int(voxels.sum())} voxels of {np.count_nonzero(voxels)} ROIs {where} the background, set to it'
        for voxels, where in ((below, 'below'), (above, 'a little above'))
        if voxels.any()
    )
    if np.median(filled) > FULL:
        notes += (
            f'tumour, which is all above the background, fills {np.median(filled):.0%} of the box: is it masked?',
        )
    for note in notes:
        print(f'warning: config.{name}={source.path}: {note}')
    return RoiSet(
        path=source.path,
        ids=tuple(source.ids),
        labels=np.array([classes.index(label) for label in source.labels]),
        classes=classes,
        volumes=raw.volumes,
        spacing=spacing,
        range=raw.range,
        patients=tuple(source.patients or source.ids),
        splits=None if source.splits is None else tuple(source.splits),
        sha256=raw.sha256,
        facts=source.facts + notes,
        learnt_from=source.learnt_from,
        phantoms=source.phantoms,
    )
