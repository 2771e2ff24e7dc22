"""From a NIfTI image and mask to a region of interest (ROI), and back into the brain.

Second step of the data's way: `read_roi` opens what `vqroi_jax.data.cohort` found, checks it, turns it to the axes of
BraTS and crops. Volumes here are [depth, height, width] = (up, to the left, to the back), which are the NIfTI axes
(2, 0, 1) of BraTS; see `to_brats` and `to_volume`, and for the way back `to_nifti` and `from_brats`. NumPy and nibabel
only, so that the processes that prepare a cohort start fast. Most of a patient's time is gzip: of the image, only the
tumour's box and the volume's edges are looked at.
"""

import dataclasses
import gzip
import math
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import ml_collections
import nibabel
import numpy as np
from nibabel import orientations

from vqroi_jax.data.cohort import Problem, Scan
from vqroi_jax.errors import InputError

BRATS_AXES = ('L', 'P', 'S')  # voxels are counted to the left, to the back and up
AFFINE_TOLERANCE = 0.1  # voxels that image and mask may lie apart at a corner of the volume
BACKGROUND_TOLERANCE = 1e-3  # of the tumour's contrast, within which the background counts as constant
BACKGROUND_SHARE = 0.5  # of the volume's edges that must have the background's value
LABEL_TOLERANCE = 1e-3  # from a whole number, for labels that were scaled


class PatientError(InputError):
    """A scan that cannot be used.

    Attributes:
        id: the scan's.
        file: the faulty one of its files.
        message: what is wrong, without those two.
    """

    def __init__(self, id: str, file: Path | str, message: str):
        super().__init__(id, file, message)  # all three, so that it can be pickled back from a worker process
        self.id, self.file, self.message = id, str(file), message

    def __str__(self) -> str:
        return str(self.problem)

    @property
    def problem(self) -> Problem:
        """The error as an entry of the cohort's report."""
        return Problem(self.id, self.file, self.message)


@dataclasses.dataclass
class Roi:
    """A tumour cut out of its brain, centred in a box of `data.roi_size`, here [D, H, W].

    Attributes:
        raw: [D, H, W], image minus `background` where `mask`, 0 elsewhere; not clipped; NaN and infinite are 0.
            float32, or float64 where float32 could not hold the image's values exactly.
        mask: bool [D, H, W], the tumour.
        offset: where the voxel (0, 0, 0) of the box lies in the full volume (D, H, W); may be negative.
        shape: the full volume's (D, H, W), with the axes of BraTS as all here.
        affine: float64 [4, 4] of the full NIfTI volume as `to_brats` turns it, so for (i, j, k) = (H, W, D).
        range: what `scale` takes: 0 (the background) and the largest value of `raw`.
        background: what was subtracted from the image; 0 unless its background was a constant other than 0.
        counts: 'tumour_voxels' in the box; of these 'nan_voxels' (NaN or infinite), 'negative_voxels' (below the
            background: clipped in the scaled volume) and 'zero_voxels' (of the background's own value); all these
            are -1 in the scaled volume, so the mask and no threshold says what is tumour. And 'cropped_voxels',
            tumour outside the box.
    """

    raw: np.ndarray
    mask: np.ndarray
    offset: tuple[int, int, int]
    shape: tuple[int, int, int]
    affine: np.ndarray
    range: tuple[float, float]
    background: float
    counts: dict[str, int]

    @property
    def spacing(self) -> tuple[float, float, float]:
        """Millimetres a voxel along D, H, W."""
        return voxel_spacing(self.affine)

    @property
    def volume(self) -> np.ndarray:
        """float32 [D, H, W] in [-1, 1]: what the networks see."""
        return scale(self.raw, self.range)


def to_brats(array: np.ndarray, affine: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Turns a NIfTI array [i, j, k] to the axes of BraTS; of oblique axes each becomes the nearest.

    Returns:
        A view of the array, and its affine [4, 4]; both as they were if they have those axes already.
    """
    stored = orientations.io_orientation(affine)
    turn = orientations.ornt_transform(stored, orientations.axcodes2ornt(BRATS_AXES))
    if np.array_equal(turn, orientations.axcodes2ornt('RAS')):  # that of NIfTI, which leaves all in place
        return array, affine
    return orientations.apply_orientation(array, turn), affine @ orientations.inv_ornt_aff(turn, array.shape)


def from_brats(array: np.ndarray, affine: np.ndarray) -> np.ndarray:
    """Returns a view of an array with the axes of BraTS that has those of `affine`, a file's: undoes `to_brats`."""
    stored = orientations.io_orientation(affine)
    turn = orientations.ornt_transform(orientations.axcodes2ornt(BRATS_AXES), stored)
    return orientations.apply_orientation(array, turn)


def voxel_spacing(affine: np.ndarray) -> tuple[float, float, float]:
    """Millimetres a voxel along D, H, W, of a NIfTI volume with any axes."""
    height, width, depth = nibabel.affines.voxel_sizes(to_brats(np.empty((1, 1, 1)), affine)[1])
    return float(depth), float(height), float(width)


def to_volume(array: np.ndarray) -> np.ndarray:
    """Returns a view [D, H, W] of a NIfTI array [i, j, k]."""
    return array.transpose(2, 0, 1)


def to_nifti(volume: np.ndarray) -> np.ndarray:
    """Returns a view [i, j, k] of a volume [D, H, W], for saving with the affine of the NIfTI file."""
    return volume.transpose(1, 2, 0)


def scale(raw: np.ndarray, range: Sequence[float] | np.ndarray) -> np.ndarray:
    """Clips to `range` (minimum, maximum) and maps that to [-1, 1]; float32 of the same shape."""
    low, high = map(float, range)
    scaled = (np.clip(raw, low, high) - low) * (2 / (high - low)) - 1
    return np.clip(scaled, -1, 1).astype(np.float32)


def unscale(volume: np.ndarray, range: tuple[float, float]) -> np.ndarray:
    """Maps [-1, 1] back to `range`: what was scaled, up to rounding and clipping; the shape and dtype stay."""
    low, high = map(float, range)
    return (volume + 1) * ((high - low) / 2) + low


def mask_box(mask: np.ndarray) -> tuple[slice, ...]:
    """Returns the smallest box around the true voxels of a bool array, a slice an axis.

    Raises:
        ValueError: no voxel is true.
    """
    box = [slice(None)] * mask.ndim
    # The slowest axis in memory first: whole slices go by in order, and the next axes see only what is left.
    for axis in np.argsort(np.abs(mask.strides))[::-1]:
        others = tuple(other for other in range(mask.ndim) if other != axis)
        hits = np.flatnonzero(mask[tuple(box)].any(axis=others))
        if not hits.size:
            raise ValueError('an empty mask has no box')
        box[axis] = slice(int(hits[0]), int(hits[-1]) + 1)
    return tuple(box)


def edge_voxels(array: np.ndarray) -> np.ndarray:
    """The voxels [n] of a volume's twelve edges, its corners several times."""
    first_last = [np.array([0, side - 1]) for side in array.shape]
    edges = [
        array[np.ix_(*[np.arange(array.shape[a]) if a == axis else first_last[a] for a in range(3)])]
        for axis in range(3)
    ]
    return np.concatenate([edge.ravel() for edge in edges])


def check_roi_size(size: Sequence[int]) -> None:
    """Refuses a `data.roi_size` that is no size of a box.

    Raises:
        InputError: saying what is expected.
    """
    if len(size) != 3 or not all(isinstance(side, int) and side > 0 for side in size):
        raise InputError(f'data.roi_size={tuple(size)}: expected three whole numbers above 0 (depth, height, width)')


def crop_roi(
    image: np.ndarray, mask: np.ndarray, size: Sequence[int]
) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """Cuts the box of `size` that is centred on the mask; what lies outside the volume or the mask is 0.

    The tumour starts floor((size - its side) / 2) voxels into the box; if that is negative, so many are cut off.

    Args:
        image: [D, H, W] of any dtype.
        mask: bool [D, H, W], not empty.
        size: (D, H, W) of the box.

    Returns:
        `image * mask` in the box, of the image's dtype; the mask in the box; where the box starts in the volume.

    Raises:
        ValueError: the mask is empty.
    """
    offset, inner, outer = [], [], []
    for side, target, length in zip(mask_box(mask), size, mask.shape, strict=True):
        start = side.start - (target - (side.stop - side.start)) // 2
        first, last = max(side.start, start), min(side.stop, start + target)
        offset.append(start)
        inner.append(slice(first - start, last - start))
        outer.append(slice(first, last))
        assert 0 <= first < last <= length
    cropped, cropped_mask = np.zeros(size, image.dtype), np.zeros(size, bool)
    tumour = mask[tuple(outer)]
    cropped_mask[tuple(inner)] = tumour
    np.copyto(cropped[tuple(inner)], image[tuple(outer)], where=tumour)
    return cropped, cropped_mask, tuple(offset)


def put_back(
    brain: np.ndarray, raw: np.ndarray, mask: np.ndarray, offset: Sequence[int], background: float = 0.0
) -> np.ndarray:
    """Writes the voxels of an ROI into a brain: the inverse of cropping.

    With `Roi.raw` it is exact, but for NaN and infinite voxels, which come back as background, and the last bit of
    float64 images whose background was not 0. With `unscale(volume, range)` it is right up to rounding, and voxels
    below the background come back as background.

    Args:
        brain: [D, H, W] with the axes of the ROI: for those of `read_roi`, a file's array by `to_brats` and
            `to_volume`. Any real dtype; unchanged.
        raw: [D, H, W] of the ROI's box.
        mask: bool, the same shape: which of its voxels to write.
        offset: where the box starts in the brain.
        background: what was subtracted from the image.

    Returns:
        A copy of the brain with the tumour in it, of its dtype (values for an integer one are rounded, clipped); by
        `to_nifti` and `from_brats` it has the file's axes again.

    Raises:
        InputError: a tumour voxel lies outside the brain.
    """
    where = tuple(axis + start for axis, start in zip(np.nonzero(mask), map(int, offset), strict=True))
    if any(axis.size and (axis.min() < 0 or axis.max() >= side) for axis, side in zip(where, brain.shape, strict=True)):
        raise InputError(f'the ROI at {tuple(offset)} does not lie in a volume of {brain.shape}; is it another brain?')
    values = raw[mask]
    if background:
        values = values.astype(np.float64) + background
    if brain.dtype.kind in 'iu':
        limits = np.iinfo(brain.dtype)
        values = np.clip(np.rint(values), limits.min, limits.max)
    result = brain.copy(order='K')
    result[where] = values.astype(brain.dtype)
    return result


def read_roi(scan: Scan, data: ml_collections.ConfigDict) -> Roi:
    """Reads, checks, turns to the axes of BraTS and crops one scan.

    Args:
        scan: which.
        data: the `data` block of a config: `mask_labels`, `known_labels`, `roi_size` and `oversize` are read.

    Returns:
        The ROI.

    Raises:
        PatientError: a file is missing, truncated or no NIfTI; image and mask differ in shape or place; the mask
            is empty or has a label that is not known; the tumour is larger than the box (unless `data.oversize`
            is 'crop'); the tumour has no finite voxel, or the box has one intensity.
    """
    image, mask_image = _open(scan, scan.image), _open(scan, scan.mask)
    _check_same_grid(scan, image, mask_image)
    mask_image, image = mask_image.turned(image.affine), image.turned(image.affine)
    box, tumour = _tumour(scan, mask_image, data)

    size = tuple(data.roi_size)
    sides = tuple(side.stop - side.start for side in mask_box(tumour))
    if data.oversize != 'crop' and any(side > target for side, target in zip(sides, size, strict=True)):
        raise PatientError(
            scan.id,
            scan.mask,
            f'the tumour is {_times(sides)} voxels, larger than data.roi_size {_times(size)} '
            '(depth, height, width); give a larger box, or data.oversize=crop to keep its middle',
        )
    whole = to_volume(image.stored)
    stored, inside, (d, h, w) = crop_roi(whole[box], tumour, size)
    offset = d + box[0].start, h + box[1].start, w + box[2].start
    values = image.values(stored[inside])
    finite = np.isfinite(values)
    background = _background(image, values[finite])
    exact = np.can_cast(image.stored.dtype, np.float32) and image.unscaled and not background
    dtype = np.dtype(np.float32 if exact else np.float64)
    values = np.where(finite, values.astype(dtype) - background, 0)  # of the tumour's voxels in the box
    high = float(values.max(initial=0))
    if not values.size:
        raise PatientError(
            scan.id,
            scan.mask,
            f'no voxel of the tumour lies in the box of {_times(size)} voxels around its middle; give a larger '
            'data.roi_size',
        )
    if not finite.any():
        raise PatientError(scan.id, scan.image, 'every voxel of the tumour is not a number (NaN) or infinite')
    if high == 0 and values.min() < 0:
        raise PatientError(
            scan.id, scan.image, f'the whole tumour is at or below the background, {background:g}, and would be empty'
        )
    if high == 0 or (inside.all() and values.min() == high):
        value = high + background
        raise PatientError(scan.id, scan.image, f'the ROI is constant: every voxel in its box is {value:g}')
    raw = np.zeros(size, dtype)
    raw[inside] = values
    counts = {
        'tumour_voxels': values.size,
        'nan_voxels': int(values.size - finite.sum()),
        'negative_voxels': int((values < 0).sum()),
        'zero_voxels': int((values[finite] == 0).sum()),
        'cropped_voxels': int(tumour.sum()) - values.size,
    }
    return Roi(raw, inside, offset, whole.shape, image.affine, (0.0, high), background, counts)


def _times(sides: Sequence[int]) -> str:
    return ' x '.join(map(str, sides))


@dataclasses.dataclass(frozen=True)
class _Nifti:
    """A NIfTI volume: `stored` [i, j, k] as in the file; a value is `stored * slope + inter`."""

    stored: np.ndarray
    affine: np.ndarray
    slope: float
    inter: float

    def turned(self, affine: np.ndarray) -> '_Nifti':
        """With the axes of BraTS, where `affine` says which it has."""
        stored, affine = to_brats(self.stored, affine)
        return dataclasses.replace(self, stored=stored, affine=affine)

    @property
    def unscaled(self) -> bool:
        return self.slope == 1 and self.inter == 0

    def values(self, stored: np.ndarray) -> np.ndarray:
        """Scales stored numbers, an array of any shape, by the file's header."""
        return stored if self.unscaled else stored.astype(np.float64) * self.slope + self.inter


def _open(scan: Scan, path: Path) -> _Nifti:
    """Reads a whole file, so that a fault anywhere in it is seen, also by gzip's checksum at its end."""
    try:
        content = path.read_bytes()
    except FileNotFoundError as error:
        raise PatientError(scan.id, path, 'missing file') from error
    except OSError as error:
        raise PatientError(scan.id, path, f'cannot be read ({error.strerror})') from error
    if not content:
        raise PatientError(scan.id, path, 'empty file; copy it again')
    if content[:2] == b'\x1f\x8b':
        try:
            content = gzip.decompress(content)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise PatientError(scan.id, path, f'truncated or damaged gzip file ({error}); copy it again') from error
    kinds = [kind for kind in (nibabel.Nifti1Image, nibabel.Nifti2Image) if _has_header(kind, content)]
    if not kinds:
        raise PatientError(scan.id, path, 'not a NIfTI file (.nii or .nii.gz)')
    try:
        image = kinds[0].from_bytes(content)
        stored_at: Any = image.dataobj  # a proxy of the bytes
        needed = int(stored_at.offset) + math.prod(map(int, image.shape)) * image.get_data_dtype().itemsize
        if needed > len(content):  # before nibabel sets so much memory apart
            raise ValueError(f'{needed} bytes expected, {len(content)} there')
        stored = stored_at.get_unscaled()
    except (OSError, ValueError, OverflowError, nibabel.spatialimages.HeaderDataError) as error:
        reason = ' '.join(str(error).split())  # nibabel's may have several lines
        raise PatientError(scan.id, path, f'truncated or damaged NIfTI file ({reason})') from error
    shape = image.shape
    if len(shape) < 3 or any(side != 1 for side in shape[3:]) or not stored.size:
        raise PatientError(scan.id, path, f'a volume of three axes is needed, this has shape {shape}')
    if stored.dtype.kind not in 'iuf':
        raise PatientError(scan.id, path, f'a volume of real numbers is needed, this has {stored.dtype}')
    if not np.isfinite(image.affine).all():
        raise PatientError(scan.id, path, 'the affine has values that are not finite')
    if not np.isfinite(orientations.io_orientation(image.affine)).all():
        raise PatientError(scan.id, path, 'the affine does not map voxels to places')
    return _Nifti(
        stored.reshape(shape[:3], order='F'),
        image.affine,
        float(stored_at.slope),
        float(stored_at.inter),
    )


def _has_header(kind: type[nibabel.Nifti1Image], content: bytes) -> bool:
    return kind.header_class.may_contain_header(content[: kind.header_class.sizeof_hdr])


def _check_same_grid(scan: Scan, image: _Nifti, mask: _Nifti) -> None:
    if image.stored.shape != mask.stored.shape:
        raise PatientError(
            scan.id,
            scan.mask,
            f'shape mismatch: the mask is {_times(mask.stored.shape)} voxels, '
            f'the image {_times(image.stored.shape)} ({scan.image.name})',
        )
    corners = np.array(list(np.ndindex(2, 2, 2))) * (np.array(image.stored.shape) - 1)
    apart = nibabel.affines.apply_affine(image.affine - mask.affine, corners)
    distance = np.linalg.norm(apart, axis=1).max()
    if distance > AFFINE_TOLERANCE * nibabel.affines.voxel_sizes(image.affine).min():
        raise PatientError(
            scan.id,
            scan.mask,
            f'affine mismatch: mask and image ({scan.image.name}) lie up to {distance:.3g} mm apart; '
            'resample one to the other',
        )


def _tumour(scan: Scan, nifti: _Nifti, data: ml_collections.ConfigDict) -> tuple[tuple[slice, ...], np.ndarray]:
    """Returns the box (D, H, W) around all labels, and what of it is tumour, bool, after a check of every label."""
    stored = to_volume(nifti.stored)
    labelled = stored != 0 if not nifti.inter else nifti.values(stored) != 0
    if not labelled.any():
        raise PatientError(scan.id, scan.mask, 'empty mask: every voxel is 0')
    box = mask_box(labelled)
    labels = nifti.values(stored[box])
    values = np.unique(labels)
    with np.errstate(invalid='ignore'):
        whole = np.rint(values)
        bad = values[~(np.abs(values - whole) <= LABEL_TOLERANCE) | (values < 0)]
    if not bad.size and data.known_labels:
        bad = values[~np.isin(whole, [0, *data.known_labels])]
    if bad.size:
        known = (
            f'one of data.known_labels={tuple(data.known_labels)}' if data.known_labels else 'a whole number from 0 up'
        )
        raise PatientError(scan.id, scan.mask, f'unknown label {bad[0]:g} in the mask; expected {known}')
    chosen = np.isin(np.rint(labels), data.mask_labels) if data.mask_labels else labels > LABEL_TOLERANCE
    if not chosen.any():
        found = ', '.join(f'{value:g}' for value in values if value)
        raise PatientError(
            scan.id,
            scan.mask,
            f'empty mask: none of data.mask_labels={tuple(data.mask_labels)}; it has {found}',
        )
    return box, chosen


def _background(image: _Nifti, tumour: np.ndarray) -> float:
    """Returns the constant value around the brain, or 0 if it is 0 or there is none.

    It is the value on most of the volume's twelve edges, which even a tightly cropped brain does not reach.
    Z-scored images and those in [-1, 1] have it elsewhere than at 0.

    Args:
        image: the whole volume.
        tumour: finite values [n] of the tumour, which say how large a difference matters.
    """
    values = image.values(edge_voxels(image.stored)).astype(np.float64)
    values = values[np.isfinite(values)]
    if not values.size or not tumour.size:
        return 0.0
    background = float(np.median(values))
    tolerance = BACKGROUND_TOLERANCE * float(np.abs(tumour - background).max())
    constant = np.mean(np.abs(values - background) <= tolerance) > BACKGROUND_SHARE
    return background if constant and abs(background) > tolerance else 0.0
