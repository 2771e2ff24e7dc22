"""The command `generate`: samples of a trained stage 2 as NIfTI files, with a manifest and a contact sheet.

stage 2 run -> tokens -> ROIs (vqroi_jax.trained) -> NIfTI files and manifest (data.samples) -> figure

Resuming needs no state but the manifest: a sample depends on (seed, class, index) only, so what is not listed is made.
Volumes come and go one by one; no more than what the sampler computes together is ever in memory.
"""

import dataclasses
import functools
import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path

import nibabel
import numpy as np
from matplotlib.figure import Figure
from ml_collections import ConfigDict
from scipy import ndimage
from tqdm import tqdm

from vqroi_jax import progress, trained, viz
from vqroi_jax.data import samples
from vqroi_jax.data.learnt_from import LEARNT_FROM_FILE, write_learnt_from
from vqroi_jax.data.roi import (
    from_brats,
    mask_box,
    put_back,
    scale,
    to_brats,
    to_nifti,
    to_volume,
    unscale,
    voxel_spacing,
)
from vqroi_jax.errors import InputError, Stopped, check_fields
from vqroi_jax.stopping import stop_requests
from vqroi_jax.training import partitioning
from vqroi_jax.workdir import is_primary, open_workdir, require_space, write_atomically

DESCRIPTION = 'SYNTHETIC tumour ROI made by vqroi_jax, not a patient'
PASTED_DESCRIPTION = 'SYNTHETIC tumour pasted into a brain by vqroi_jax, not a patient'
FIGURE = Path('figures') / 'samples.png'
SURFACES = Path('figures') / 'surfaces.png'
PASTED_PERCENTILE = 99.5  # of the brain's intensities: that of the brightest tumour voxel, if none is given

_LARGEST = float(np.finfo(np.float32).max)
_DISK_RESERVE = 2**24  # bytes, for what is small
# Bytes a voxel of an ROI on disk. Measured: 3.8 a tumour voxel (float32 noise hardly packs) and nothing for the
# background, so this will do for tumours that fill an eighth of the box on average.
_PACKED_VOXEL = 0.5
_NONE = -1  # instead of a step
_SPACING_TOLERANCE = 0.01  # relative, of voxel sizes that should be the same


@dataclasses.dataclass(frozen=True)
class Host:
    """A brain to paste into, with the axes of its file; ROIs have those of BraTS and are turned to them.

    Attributes:
        brain: [D, H, W] = (k, i, j) of whole numbers or float32.
        affine: float64 [4, 4] for (i, j, k) = (H, W, D).
        background: the brain's intensity where it is none.
        maximum: intensity of a tumour voxel of value 1.
        centre: voxel (D, H, W) where the ROI's middle goes.
    """

    brain: np.ndarray
    affine: np.ndarray
    background: float
    maximum: float
    centre: tuple[int, int, int]

    def turned(self, volume: np.ndarray) -> np.ndarray:
        """A view of an ROI's volume [D, H, W] with the axes of the brain."""
        return to_volume(from_brats(to_nifti(volume), self.affine))

    def middle(self, size: Sequence[int]) -> tuple[int, ...]:
        """Where in the box of an ROI of `size`, once it is turned, its voxel size // 2 lies: it goes to the centre."""
        mark = np.zeros(size, bool)
        mark[tuple(side // 2 for side in size)] = True
        return tuple(int(place) for place in np.argwhere(self.turned(mark))[0])

    def paste(self, volume: np.ndarray, tumour: np.ndarray) -> np.ndarray:
        """A copy of the brain with the voxels `tumour` (bool) of `volume` in it; both [D, H, W], as BraTS."""
        values = unscale(volume, (self.background, self.maximum))
        start = [place - middle for place, middle in zip(self.centre, self.middle(volume.shape), strict=True)]
        return put_back(self.brain, self.turned(values), self.turned(tumour), start)


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/generate.py`."""
    with open_workdir(workdir, config, free=('number', 'classes')) as folder:  # more may be wanted later
        check_settings(config)
        reference = config.reference and samples.load_nifti(config.reference, f'config.reference={config.reference}')
        host = read_host(config.paste) if config.paste.brain else None
        transformer = _load(config, folder)
        generate(transformer, config, folder, reference.affine if reference else None, host)


def check_settings(config: ConfigDict) -> None:
    """Refuses what no model could make right; the `sampling` block is the sampler's to check.

    Raises:
        InputError: naming the field and what it may be.
    """
    if not config.transformer_workdir:
        raise InputError('no --config.transformer_workdir given; name the run of stage 2 to sample from')
    intensity, pasted = config.intensity, config.paste.maximum
    fields = (
        ('seed', 0 <= config.seed < 2**32, 'a whole number from 0 to 2**32 - 1'),
        ('number', config.number >= 1, 'at least 1 sample of each class'),
        ('figure_samples', config.figure_samples >= 1, 'at least 1 sample of each class'),
        ('intensity.maximum', 0 < intensity.maximum <= _LARGEST, 'an intensity above 0'),
        ('intensity.background', 0 <= intensity.background < 1, 'a share of the maximum, from 0 to under 1'),
        ('paste.maximum', 0 <= pasted <= _LARGEST, "an intensity above 0, or 0 for the brain's own"),
    )
    check_fields('config', config, fields)
    centre = config.paste.centre
    if not config.paste.brain and (centre or config.paste.maximum):
        raise InputError('config.paste.brain is empty, but where or how to paste is set; name the brain')
    if config.paste.brain and (len(centre) != 3 or not all(type(place) is int for place in centre)):
        raise InputError(f'config.paste.centre={centre}: expected three whole numbers, a voxel (i, j, k) of the brain')


def read_host(paste: ConfigDict) -> Host:
    """Reads the brain to paste into.

    Args:
        paste: the block of the config, with a brain.

    Raises:
        InputError: the brain cannot be read or is constant, the centre lies outside of it, or the maximum does not
            lie above its background or in its type.
    """
    name = f'config.paste.brain={paste.brain}'
    image = samples.load_nifti(paste.brain, name)
    brain = to_volume(samples.read_voxels(image, name))
    corners = brain[np.ix_(*[(0, side - 1) for side in brain.shape])]
    background = float(np.median(corners))
    bright = brain[brain > background]
    if not bright.size:
        raise InputError(f'{name}: nothing in it is brighter than its corners')
    maximum = paste.maximum or float(np.percentile(bright, PASTED_PERCENTILE))
    limit = np.iinfo(brain.dtype).max if brain.dtype.kind in 'iu' else _LARGEST
    if not background < maximum <= limit:
        raise InputError(
            f"config.paste.maximum={paste.maximum}: expected above the brain's background, {background:g}, and at most "
            f'{limit:g}, as its voxels are {brain.dtype}'
        )
    i, j, k = paste.centre
    box = mask_box(brain != background)
    if not all(side.start <= place < side.stop for side, place in zip(box, (k, i, j), strict=True)):
        by_name = zip('ijk', (box[1], box[2], box[0]), strict=True)
        spans = ', '.join(f'{name} from {side.start} to {side.stop - 1}' for name, side in by_name)
        raise InputError(f'config.paste.centre={paste.centre} lies outside of the brain, which spans {spans}')
    return Host(brain, image.affine, background, maximum, (k, i, j))


def generate(
    transformer: trained.TrainedTransformer,
    config: ConfigDict,
    folder: Path,
    reference: np.ndarray | None,
    host: Host | None,
) -> None:
    """Makes the samples that are not there yet, in an opened workdir, and the contact sheet of the first of each class.

    Of several processes all compute, and the primary one writes.

    Args:
        transformer: the trained model; its `sampler` is asked for the samples.
        config: as `configs/generate.py` has it, checked by `check_settings`.
        folder: the run's.
        reference: affine [4, 4] of the samples, which are turned to its axes; None for the axes of BraTS and the
            model's voxel size.
        host: the brain to paste every sample into; None for none.

    Raises:
        InputError: an unknown class, an ROI that does not fit into the brain, a bad sampling setting, samples by
            another model in the folder, a damaged record of the patients that it was trained on, or no room on the
            disk, all before the first sample is drawn; or a sample that is not finite.
        OSError: a file cannot be written, e.g. as the disk is full; what the manifest lists is whole.
        Stopped: SIGTERM or Ctrl-C came; the samples of the batch that was being drawn are there.
    """
    labels = _chosen(config.classes, transformer.classes)
    if host:
        _check_fit(host, transformer.roi_size)
    sampler = transformer.sampler(config.sampling, config.seed, partitioning.make_mesh(config.mesh))
    store, missing = None, np.zeros((len(labels), config.number), bool)
    if is_primary():
        _warn_of_spacing(transformer.spacing, {'reference': reference, 'paste.brain': host.affine if host else None})
        store = _Store(transformer, config, folder, reference, host)
        missing = np.array([[not store.has(label, index) for index in range(config.number)] for label in labels])
        learnt = transformer.learnt_from
        require_space(folder, store.bytes_needed(int(missing.sum())), f'writing {missing.sum()} samples')
        if learnt is None:
            print(
                f'warning: the runs of {config.transformer_workdir} and its stage 1 do not say which patients they '
                f'were trained on, so {folder / LEARNT_FROM_FILE} does not either'
            )
        write_learnt_from(folder, learnt)
    missing = partitioning.from_primary(missing)

    start, left, made = time.monotonic(), int(missing.sum()), 0
    with (
        progress.bar('sampling', 'sample', total=missing.size, initial=missing.size - left, shown=is_primary()) as bar,
        stop_requests() as requested,
    ):
        for label, indices in _batches(labels, missing, sampler.rows):
            add = functools.partial(store.add, label) if store else None
            _draw(sampler, transformer.classes.index(label), indices, add, bar)
            made += len(indices)
            if requested():
                raise Stopped(
                    f'stopped with {missing.size - left + made} of {missing.size} samples in {folder}; the same '
                    'command again goes on from there'
                )
    if store:
        if store.empty:
            print(f'warning: {store.empty} samples have no voxel above config.intensity.background and are all 0')
        pace = f', {(time.monotonic() - start) / made:.3g} s each' if made else ''
        for name, figure in zip((FIGURE, SURFACES), store.figures(labels), strict=True):
            viz.save_figure(figure, folder / name)
        print(
            f'{missing.size} samples, {config.number} of each of {", ".join(labels)}, by step {transformer.step} of '
            f'{config.transformer_workdir}{" (trained on SYNTHETIC phantoms)" if transformer.synthetic else ""}; '
            f'{made} of them made now{pace}. Look at {folder / FIGURE}'
        )


def _draw(
    sampler: trained.Sampler, label: int, indices: list[int], add: Callable[[int, np.ndarray], None] | None, bar: tqdm
) -> None:
    """Draws one batch; a function of its own, so that nothing of it is in memory when the next is drawn."""
    for index, volume in zip(indices, sampler.draw(label, indices), strict=True):
        if add:
            add(index, volume)
        bar.update()


class _Store:
    """The samples' files and their manifest: what the process that writes knows of the folder."""

    def __init__(
        self,
        transformer: trained.TrainedTransformer,
        config: ConfigDict,
        folder: Path,
        reference: np.ndarray | None,
        host: Host | None,
    ):
        self._config, self._folder, self._host = config, folder, host
        centred = samples.centred_affine(transformer.roi_size, transformer.spacing or (1, 1, 1))
        self._affine = centred if reference is None else reference
        self._voxels = math.prod(transformer.roi_size)
        self._provenance = _provenance(transformer, config)
        self._manifest = samples.Manifest(folder / samples.MANIFEST_FILE, list(self._row('', 0)))
        for name, row in self._manifest.rows.items():
            if name != f'samples/{sample_file(row["class"], int(row["index"]), config.number)}':
                raise InputError(
                    f'config.number={config.number}: {folder} has samples with names of another length ({name}); name '
                    'another --workdir'
                )
            self._check_alike(row, self._row(row['class'], int(row['index'])))
        self.empty = 0  # samples added that have no tumour

    def has(self, label: str, index: int) -> bool:
        """Whether a sample is listed and there."""
        now = self._row(label, index)
        return now[samples.KEY] in self._manifest.rows and all(path.exists() for path in self._paths(now))

    def _check_alike(self, there: Mapping[str, str], now: Mapping[str, str]) -> None:
        """Refuses a sample that is listed with other settings or another model than now."""
        differences = [f'{name} {there[name]!r} there, {now[name]!r} now' for name in now if there[name] != now[name]]
        if differences:
            raise InputError(
                f'{self._folder / samples.MANIFEST_FILE} lists {now[samples.KEY]} with {"; ".join(differences)}: '
                'samples of two kinds are not mixed; name another --workdir'
            )

    def bytes_needed(self, number: int) -> int:
        """The disk space that so many more samples will take, roughly."""
        pasted = len(samples.pack(_pasted_image(self._host, self._host.brain))) if self._host else 0
        return number * (int(self._voxels * _PACKED_VOXEL) + pasted) + _DISK_RESERVE

    def add(self, label: str, index: int, volume: np.ndarray) -> None:
        """Writes the files of a sample, and lists it.

        Args:
            label: name of its class.
            index: its number within the class.
            volume: float32 [D, H, W] in [-1, 1].

        Raises:
            InputError: the volume has voxels outside of that range, or that are not numbers.
            OSError: a file cannot be written; those of this sample that were are removed again.
        """
        if not (volume.min() >= -1 and volume.max() <= 1):
            raise InputError(
                f'sample {index} of class {label} has voxels that are not in [-1, 1]: the weights of this checkpoint '
                'cannot be used; take another'
            )
        tumour, values = to_intensities(volume, self._config.intensity)
        self.empty += not tumour.any()
        images = [samples.make_nifti(from_brats(to_nifti(values), self._affine), self._affine, DESCRIPTION)]
        if self._host:
            images.append(_pasted_image(self._host, self._host.paste(volume, tumour)))
        self._write(self._row(label, index), images)

    def _write(self, row: Mapping[str, str], images: Sequence[nibabel.Nifti1Image]) -> None:
        """Writes those files of a sample that are not there, then its row; all or nothing."""
        listed, written = row[samples.KEY] in self._manifest.rows, []
        try:
            for path, image in zip(self._paths(row), images, strict=True):
                if not (listed and path.exists()):
                    write_atomically(path, samples.pack(image))
                    written.append(path)
            if not listed:
                self._manifest.append(row)
        except BaseException:
            for path in written:
                path.unlink(missing_ok=True)
            raise

    def figures(self, labels: Sequence[str]) -> tuple[Figure, Figure]:
        """The first samples of each class, from the files, with their tumour volumes: in slices, and as surfaces."""
        shown = min(self._config.number, self._config.figure_samples)
        volumes, titles = [], []
        for label in labels:
            for path in (self._paths(self._row(label, index))[0] for index in range(shown)):
                stored = samples.read_voxels(samples.load_nifti(path, str(path)), str(path))
                voxels = to_volume(to_brats(stored, self._affine)[0])
                volumes.append(scale(voxels, (0, self._config.intensity.maximum)))
                tumour = np.count_nonzero(voxels) * abs(np.linalg.det(self._affine[:3, :3])) / 1000
                titles.append(f'{path.name.removesuffix(".nii.gz")}, {tumour:.1f} mL')
        headings = [f'{label}: SYNTHETIC samples' for label in labels for _ in range(shown)]
        shown_as = np.stack(volumes), headings, titles, voxel_spacing(self._affine)
        return viz.contact_sheet(*shown_as), viz.surfaces(*shown_as)

    def _row(self, label: str, index: int) -> dict[str, str]:
        """A sample's line in the manifest."""
        file = sample_file(label, index, self._config.number)
        return {
            samples.KEY: f'samples/{file}',
            'class': label,
            'seed': str(self._config.seed),
            'index': str(index),
            **self._provenance,
            'pasted': f'pasted/{file}' if self._host else '',
        }

    def _paths(self, row: Mapping[str, str]) -> list[Path]:
        """The files of a sample."""
        return [self._folder / row[name] for name in (samples.KEY, 'pasted') if row[name]]


def _pasted_image(host: Host, brain: np.ndarray) -> nibabel.Nifti1Image:
    return samples.make_nifti(to_nifti(brain), host.affine, PASTED_DESCRIPTION)


def sample_file(label: str, index: int, number: int) -> str:
    """CLASS/CLASS_0000.nii.gz: at least four digits, and as many as the last of `number` samples needs."""
    name = samples.class_folder(label)
    return f'{name}/{name}_{index:0{max(4, len(str(number - 1)))}d}.nii.gz'


def to_intensities(volume: np.ndarray, intensity: ConfigDict) -> tuple[np.ndarray, np.ndarray]:
    """From the networks' range to that of a file.

    Args:
        volume: float32 [D, H, W] in [-1, 1], background about -1.
        intensity: `maximum`, to which 1 is mapped as -1 is to 0, and `background`, the share of it below which a
            voxel is background, unless tumour encloses it (a dark core).

    Returns:
        bool [D, H, W], what is tumour; float32 [D, H, W] in [0, maximum], 0 where there is none.
    """
    parts, _ = ndimage.label((volume <= -1) | (volume < 2 * intensity.background - 1))
    faces = [parts.take((0, -1), axis) for axis in range(3)]
    tumour = ~np.isin(parts, np.setdiff1d(np.concatenate([face.ravel() for face in faces]), 0))
    return tumour, np.where(tumour, unscale(volume, (0, intensity.maximum)), np.float32(0))


def _load(config: ConfigDict, folder: Path) -> trained.TrainedTransformer:
    """The model to sample from: of a generation that goes on, at the step that it began with."""
    begun = int(partitioning.from_primary(np.asarray(_step_begun_with(folder) if is_primary() else _NONE)))
    if begun == _NONE:
        return trained.load_transformer(config.transformer_workdir, config.checkpoint, config.vqgan_workdir)
    try:
        return trained.load_transformer(config.transformer_workdir, str(begun), config.vqgan_workdir)
    except InputError as error:
        raise InputError(f'{error} (the samples in {folder} are of step {begun}; name another --workdir)') from error


def _step_begun_with(folder: Path) -> int:
    """The checkpoint that the samples of a folder are of; `_NONE` if none are listed."""
    path = folder / samples.MANIFEST_FILE
    rows = samples.read_manifest(path)
    if not rows:
        return _NONE
    if not rows[0].get('checkpoint', '').isdecimal():
        raise InputError(f'{path} does not say of which checkpoint its samples are; restore it, or use another workdir')
    return int(rows[0]['checkpoint'])


def _provenance(transformer: trained.TrainedTransformer, config: ConfigDict) -> dict[str, str]:
    """What a sample comes from: the columns of the manifest that are the same in all rows."""
    settings = config.sampling.to_dict() | {'method': transformer.method}
    settings |= {f'intensity_{name}': x for name, x in config.intensity.to_dict().items()}
    return {
        'checkpoint': str(transformer.step),
        'identity': transformer.identity,
        'synthetic': 'true',
        'trained_on': 'phantoms' if transformer.synthetic else 'patients',
        **{name: str(value) for name, value in settings.items()},
    }


def _chosen(asked: Sequence[str], known: Sequence[str]) -> tuple[str, ...]:
    """The classes to sample."""
    if unknown := [name for name in asked if name not in known]:
        raise InputError(f'config.classes: unknown class {unknown[0]!r}; the model knows {", ".join(known)}')
    if len(set(asked)) < len(asked):
        raise InputError(f'config.classes={tuple(asked)}: a class is named twice')
    return tuple(asked) or tuple(known)


def _check_fit(host: Host, size: Sequence[int]) -> None:
    """Refuses an ROI of `size` (D, H, W) that does not lie in the brain's volume as a whole."""
    middle = host.middle(size)
    size = host.turned(np.empty(size, bool)).shape
    roi, brain = (' x '.join(map(str, sides)) for sides in (size, host.brain.shape))
    room = [length - side for side, length in zip(size, host.brain.shape, strict=True)]
    if min(room) < 0:
        raise InputError(
            f'config.paste.brain: an ROI of {roi} voxels (depth, height, width) does not fit into its {brain}'
        )
    if not all(0 <= at - first <= most for at, first, most in zip(host.centre, middle, room, strict=True)):
        depth, *others = (f'{first} to {first + most}' for first, most in zip(middle, room, strict=True))
        spans = ', '.join(f'{name} from {span}' for name, span in zip('ijk', (*others, depth), strict=True))
        k, i, j = host.centre
        raise InputError(
            f"config.paste.centre={(i, j, k)}: an ROI of {roi} voxels (depth, height, width) there leaves the brain's "
            f'volume; choose {spans}'
        )


def _warn_of_spacing(trained_spacing: Sequence[float] | None, affines: Mapping[str, np.ndarray | None]) -> None:
    """Prints a line on each file of the config whose voxels have not the size that the model was trained on."""
    for field, affine in affines.items():
        if trained_spacing is None or affine is None:
            continue
        found = voxel_spacing(affine)
        if not np.allclose(found, trained_spacing, rtol=_SPACING_TOLERANCE, atol=0):
            there, expected = (' x '.join(f'{mm:g}' for mm in size) for size in (found, trained_spacing))
            print(
                f'warning: the voxels of config.{field} are {there} mm (depth, height, width), the model was trained '
                f'on {expected} mm: the tumours will have another size'
            )


def _batches(labels: Sequence[str], missing: np.ndarray, rows: int) -> Iterator[tuple[str, list[int]]]:
    """What is missing [classes, number], class by class, at most `rows` indices at a time."""
    for label, row in zip(labels, missing, strict=True):
        indices = np.flatnonzero(row).tolist()
        for start in range(0, len(indices), rows):
            yield label, indices[start : start + rows]
