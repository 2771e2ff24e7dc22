"""ROIs against a voxel-by-voxel oracle, the round trip into the brain, and every fault of a patient's files."""

import gzip
import os
import pickle
import struct
from pathlib import Path

import nibabel
import numpy as np
import pytest

from vqroi_jax.data.cohort import find_cohort
from vqroi_jax.data.roi import (
    PatientError,
    crop_roi,
    from_brats,
    mask_box,
    put_back,
    read_roi,
    scale,
    to_brats,
    to_nifti,
    to_volume,
    unscale,
)
from vqroi_jax.errors import InputError

REAL_COHORT = Path(os.environ.get('VQROI_REAL_COHORT', Path(__file__).parents[3] / 'shared' / 'real_cohort'))


def random_case(seed: int) -> tuple[np.ndarray, np.ndarray, tuple[int, ...]]:
    """A brain [D, H, W] without zeros, a mask that may touch any border, and a box that may be too small for it."""
    rng = np.random.default_rng(seed)
    shape = rng.integers(5, 16, 3)
    low = rng.integers(0, shape)
    high = rng.integers(low, shape) + 1
    mask = np.zeros(shape, bool)
    mask[tuple(map(slice, low, high))] = rng.random(high - low) < 0.6
    mask[tuple(low)] = mask[tuple(high - 1)] = True
    return rng.integers(-50, 900, shape).astype(np.int16) * 2 + 1, mask, tuple(rng.integers(3, 14, 3).tolist())


def slow_crop(image, mask, size):
    """The definition, a voxel at a time: half of what is left, rounded down, lies before the tumour."""
    tumour = np.argwhere(mask)
    first, side = tumour.min(0), np.ptp(tumour, axis=0) + 1
    offset = [int(first[a] - np.floor((size[a] - side[a]) / 2)) for a in range(3)]
    cropped, inside = np.zeros(size, image.dtype), np.zeros(size, bool)
    for voxel in tumour:
        place = tuple(int(voxel[a]) - offset[a] for a in range(3))
        if all(0 <= place[a] < size[a] for a in range(3)):
            cropped[place], inside[place] = image[tuple(voxel)], True
    return cropped, inside, tuple(offset)


@pytest.mark.parametrize('seed', range(40))
def test_crop_is_the_definition_voxel_by_voxel(seed):
    image, mask, size = random_case(seed)
    for order in ('C', 'F'):  # NIfTI arrays come with their first axis fastest
        result = crop_roi(np.asarray(image, order=order), np.asarray(mask, order=order), size)
        for found, expected in zip(result, slow_crop(image, mask, size), strict=True):
            np.testing.assert_array_equal(found, expected)
        assert result[0].dtype == image.dtype


@pytest.mark.parametrize('seed', range(40))
def test_put_back_is_exact_and_touches_nothing_but_the_tumour(seed):
    image, mask, size = random_case(seed)
    raw, inside, offset = crop_roi(image, mask, size)
    hollow = put_back(image, np.zeros(size), inside, offset)
    changed = np.argwhere(hollow != image)  # the brain has no zeros
    in_crop = mask.copy()
    for axis in range(3):
        index = np.arange(image.shape[axis]) - offset[axis]
        in_crop &= np.expand_dims((index >= 0) & (index < size[axis]), [a for a in range(3) if a != axis])
    np.testing.assert_array_equal(changed, np.argwhere(in_crop))
    back = put_back(hollow, raw, inside, np.array(offset, np.int32))
    np.testing.assert_array_equal(back, image)
    assert back.dtype == image.dtype


def test_a_centred_tumour_has_margins_that_differ_by_one_at_most():
    for seed in range(40):
        image, mask, size = random_case(seed)
        _, inside, _ = crop_roi(image, mask, size)
        for side, target in zip(mask_box(inside), size, strict=True):
            before, after = side.start, target - side.stop
            assert after - before in (0, 1) or before == after == 0


def test_an_empty_mask_has_no_box():
    with pytest.raises(ValueError, match='empty'):
        mask_box(np.zeros((3, 4, 5), bool))


def test_depth_height_width_are_nifti_axes_2_0_1(brain, mask, write_scan, data):
    roi = read_roi(write_scan(brain, mask), data)
    assert roi.shape == (17, 20, 24)
    assert roi.spacing == (1.5, 1.0, 1.0)
    np.testing.assert_array_equal(roi.affine, nibabel.load(write_scan(brain, mask).image).affine)
    assert roi.mask.sum() == (mask > 0).sum()
    for d, h, w in np.argwhere(roi.mask):
        i, j, k = h + roi.offset[1], w + roi.offset[2], d + roi.offset[0]
        assert mask[i, j, k]
        assert roi.raw[d, h, w] == brain[i, j, k]
    assert not roi.raw[~roi.mask].any()
    assert to_nifti(to_volume(brain)).shape == brain.shape


@pytest.mark.parametrize('oblique', [False, True])
@pytest.mark.parametrize('codes', ['LPS', 'RAS', 'PIR', 'SLA'])
def test_a_scan_of_any_axes_gives_the_roi_of_brats_and_takes_it_back(codes, oblique, brain, mask, write_scan, data):
    affine = np.diag([-1, -1, 1.5, 1])
    if oblique:
        affine = nibabel.affines.from_matvec(nibabel.eulerangles.euler2mat(0.2, -0.3, 0.1)) @ affine
    expected = read_roi(write_scan(brain, mask, affine, affine), data)
    turn = nibabel.orientations.ornt_transform(
        nibabel.orientations.axcodes2ornt('LPS'), nibabel.orientations.axcodes2ornt(codes)
    )
    image, labels = (nibabel.Nifti1Image(voxels, affine).as_reoriented(turn) for voxels in (brain, mask))
    stored = np.asanyarray(image.dataobj)
    roi = read_roi(write_scan(stored, np.asanyarray(labels.dataobj), image.affine, image.affine), data)
    np.testing.assert_array_equal(roi.raw, expected.raw)
    np.testing.assert_array_equal(roi.mask, expected.mask)
    np.testing.assert_allclose(roi.affine, expected.affine, atol=1e-5)
    assert (roi.offset, roi.shape, roi.counts) == (expected.offset, expected.shape, expected.counts)
    np.testing.assert_allclose(roi.spacing, (1.5, 1, 1), rtol=1e-6)
    assert nibabel.aff2axcodes(roi.affine) == ('L', 'P', 'S')

    hollow, _ = to_brats(np.where(labels.dataobj, 0, stored), image.affine)
    back = to_nifti(put_back(to_volume(hollow), roi.raw, roi.mask, roi.offset))
    np.testing.assert_array_equal(from_brats(back, image.affine), stored)


@pytest.mark.parametrize('ending', ['.nii.gz', '.nii'])
@pytest.mark.parametrize(
    'dtype', ['int8', 'uint8', 'int16', 'uint16', 'int32', 'uint32', 'float32', 'float64', '>i2', '>f4']
)
def test_any_dtype_is_read_and_put_back_exactly(dtype, ending, brain, mask, write_scan, data):
    dtype = np.dtype(dtype)
    span = np.iinfo(dtype).max if dtype.kind in 'iu' else np.pi
    stored = np.where(brain, brain / 899 * (span - 1) + 1, 0).astype(dtype)
    roi = read_roi(write_scan(stored, mask, ending=ending), data)
    assert roi.raw.dtype == (np.float64 if dtype.itemsize > 4 or dtype.str[1:] in ('i4', 'u4') else np.float32)
    assert roi.background == 0
    hollow = np.where(mask, 0, stored).astype(dtype)
    back = put_back(to_volume(hollow), roi.raw, roi.mask, roi.offset, roi.background)
    np.testing.assert_array_equal(to_nifti(back), stored)
    assert back.dtype == dtype


@pytest.mark.parametrize(('slope', 'inter', 'factor', 'shift'), [
    (np.nan, 0, 1, 0), (np.nan, np.nan, 1, 0), (0, 7, 1, 0), (0.5, 0, 0.5, 0), (2, -30, 2, -30), (1, 5, 1, 5),
])  # fmt: skip
def test_slope_and_intercept(slope, inter, factor, shift, brain, mask, write_scan, data):
    scan = write_scan(brain, mask)
    patch_header(scan.image, 112, struct.pack('<ff', slope, inter))
    roi = read_roi(scan, data)
    expected = brain * factor  # the intercept moves background and brain alike
    np.testing.assert_array_equal(roi.raw, crop_roi(to_volume(expected), to_volume(mask > 0), data.roi_size)[0])
    assert roi.background == shift
    scaled_brain = to_volume(brain * factor + float(shift))
    back = put_back(np.where(to_volume(mask), shift, scaled_brain), roi.raw, roi.mask, roi.offset, roi.background)
    np.testing.assert_array_equal(back, scaled_brain)


def test_a_scaled_mask_has_its_scaled_labels(brain, mask, write_scan, data):
    expected = read_roi(write_scan(brain, mask), data).mask
    scan = write_scan(brain, (mask * 10).astype(np.int16))
    patch_header(scan.mask, 112, struct.pack('<ff', 0.1, 0))
    np.testing.assert_array_equal(read_roi(scan, data).mask, expected)
    scan = write_scan(brain, (mask.astype(np.int16) - 3))
    patch_header(scan.mask, 112, struct.pack('<ff', 1, 3))
    np.testing.assert_array_equal(read_roi(scan, data).mask, expected)


def patch_header(path: Path, start: int, value: bytes) -> None:
    content = bytearray(gzip.decompress(path.read_bytes()))
    content[start : start + len(value)] = value
    path.write_bytes(gzip.compress(bytes(content)))


def test_trailing_axes_of_one_and_ends_that_lie_about_gzip(brain, mask, write_scan, data):
    expected = read_roi(write_scan(brain, mask), data)
    four = read_roi(write_scan(brain[..., None], mask[..., None]), data)
    np.testing.assert_array_equal(four.raw, expected.raw)
    scan = write_scan(brain, mask)
    scan.image.write_bytes(gzip.decompress(scan.image.read_bytes()))  # .nii.gz in name only
    np.testing.assert_array_equal(read_roi(scan, data).raw, expected.raw)


def test_nifti_2(brain, mask, write_scan, data):
    scan = write_scan(brain, mask)
    expected = read_roi(scan, data)
    nibabel.save(nibabel.Nifti2Image(brain, expected.affine), scan.image)
    np.testing.assert_array_equal(read_roi(scan, data).raw, expected.raw)


def test_nan_and_negative_voxels_are_counted_and_become_background(brain, mask, write_scan, data):
    image = brain.astype(np.float32)
    tumour = np.argwhere(mask)
    image[tuple(tumour[:3].T)] = [np.nan, np.inf, -np.inf]
    image[tuple(tumour[3:8].T)] = -np.arange(1, 6)
    image[tuple(tumour[8:10].T)] = 0
    image[0, 0, 0] = np.nan  # outside the tumour, so of no interest
    roi = read_roi(write_scan(image, mask), data)
    assert roi.counts == {
        'tumour_voxels': len(tumour), 'nan_voxels': 3, 'negative_voxels': 5, 'zero_voxels': 2, 'cropped_voxels': 0,
    }  # fmt: skip
    assert np.isfinite(roi.raw).all()
    assert roi.raw.min() == -5  # not clipped
    assert (roi.volume[roi.mask] == -1).sum() == 10
    hollow = np.where(mask, 0, image)
    back = to_nifti(put_back(to_volume(hollow), roi.raw, roi.mask, roi.offset))
    same = np.isfinite(image) | (mask == 0)
    np.testing.assert_array_equal(back[same], image[same])
    assert not back[~same].any()


def test_volume_spans_minus_one_to_one_and_only_background_is_minus_one(brain, mask, write_scan, data):
    roi = read_roi(write_scan(brain, mask), data)
    volume = roi.volume
    assert volume.dtype == np.float32
    assert volume.shape == data.roi_size
    assert (volume[~roi.mask] == -1).all()
    assert (volume[roi.mask] > -1).all()
    assert volume.max() == 1
    assert roi.range == (0, brain[mask > 0].max())
    np.testing.assert_allclose(volume, 2 * roi.raw / roi.raw.max() - 1, atol=1e-6)
    np.testing.assert_allclose(unscale(volume, roi.range), roi.raw, atol=1e-4 * roi.range[1])
    hollow = np.where(mask, 0, brain)
    back = put_back(to_volume(hollow), unscale(volume, roi.range), roi.mask, roi.offset)
    np.testing.assert_array_equal(to_nifti(back), brain)  # rounded to int16


def test_a_tumour_that_fills_its_box_keeps_its_darkest_voxel_off_the_background(brain, write_scan, data):
    mask = np.zeros_like(brain, np.uint8)
    mask[3:17, 3:19, 3:15] = 1  # height 14, width 16, depth 12: the whole box
    image = np.where(brain, brain + 100, 0)
    roi = read_roi(write_scan(image, mask), data)
    assert roi.mask.all()
    assert roi.range[0] == 0
    assert roi.volume.min() > -1


def test_scaling_of_values_that_are_tiny_huge_or_out_of_range():
    for high in (1e-30, 1e30, 65535):
        raw = np.linspace(-high, 2 * high, 7)
        volume = scale(raw, (0.0, high))
        assert volume.dtype == np.float32
        np.testing.assert_allclose(volume, [-1, -1, -1, 0, 1, 1, 1], atol=1e-6)
        np.testing.assert_allclose(unscale(volume, (0.0, high)), np.clip(raw, 0, high), atol=1e-6 * high)


# Backgrounds


@pytest.mark.parametrize('dtype', [np.float32, np.float64])
@pytest.mark.parametrize('name', ['z-scored', 'in [-1, 1]', 'from 1024'])
def test_a_background_other_than_0_is_recognised_and_comes_back(name, dtype, brain, mask, write_scan, data):
    image = brain.astype(dtype)
    image = {
        'z-scored': (image - image.mean()) / image.std(),
        'in [-1, 1]': image / image.max() * 2 - 1,
        'from 1024': image + 1024,
    }[name].astype(dtype)
    roi = read_roi(write_scan(image, mask), data)
    assert roi.background == image[0, 0, 0] != 0
    plain = read_roi(write_scan(brain, mask), data)
    np.testing.assert_allclose(roi.volume, plain.volume, atol=1e-5)
    assert roi.counts == plain.counts
    hollow = np.where(mask, image[0, 0, 0], image)
    back = put_back(to_volume(hollow), roi.raw, roi.mask, roi.offset, roi.background)
    rounding = np.finfo(dtype).eps * np.ptp(image) if dtype == np.float64 else 0
    np.testing.assert_allclose(to_nifti(back), image, rtol=0, atol=rounding)
    assert back.dtype == dtype
    rounded = put_back(to_volume(hollow), unscale(roi.volume, roi.range), roi.mask, roi.offset, roi.background)
    np.testing.assert_allclose(to_nifti(rounded), image, atol=1e-5 * np.ptp(image))


def test_noise_around_the_head_is_no_background_and_a_trace_of_one_is_0(brain, mask, write_scan, data):
    rng = np.random.default_rng(2)
    noisy = np.where(brain, brain, rng.integers(1, 200, brain.shape)).astype(np.int16)
    assert read_roi(write_scan(noisy, mask), data).background == 0
    for trace in (0.01, -0.01 * rng.random(brain.shape)):  # as interpolation leaves it
        image = np.where(brain, brain, trace).astype(np.float32)
        assert read_roi(write_scan(image, mask), data).background == 0
    around_nan = np.where(brain, brain, np.nan).astype(np.float32)
    assert read_roi(write_scan(around_nan, mask), data).background == 0


# Labels and sizes


def test_mask_labels_choose_the_tumour(brain, mask, write_scan, data):
    scan = write_scan(brain, mask)
    for labels in ((4,), (1, 2)):
        data.mask_labels = labels
        chosen = np.isin(mask, labels)
        roi = read_roi(scan, data)
        assert roi.counts['tumour_voxels'] == roi.mask.sum() == chosen.sum()
        np.testing.assert_array_equal(roi.raw, crop_roi(to_volume(brain), to_volume(chosen), data.roi_size)[0])


def test_known_labels_are_checked_for_all_that_the_mask_holds(brain, mask, write_scan, data):
    data.mask_labels, data.known_labels = (1,), (1, 2)
    with pytest.raises(PatientError, match='unknown label 4'):
        read_roi(write_scan(brain, mask), data)
    data.known_labels = (1, 2, 4)
    assert read_roi(write_scan(brain, mask), data).counts['tumour_voxels'] == (mask == 1).sum()


def test_an_oversize_tumour_is_refused_or_cropped_and_counted(brain, mask, write_scan, data):
    data.roi_size = (6, 5, 4)  # the tumour is 6 x 7 x 9
    scan = write_scan(brain, mask)
    with pytest.raises(PatientError, match=r'6 x 7 x 9 voxels, larger than data.roi_size 6 x 5 x 4'):
        read_roi(scan, data)
    data.oversize = 'crop'
    roi = read_roi(scan, data)
    assert roi.raw.shape == (6, 5, 4)
    assert roi.counts['tumour_voxels'] == roi.mask.sum() > 0
    assert roi.counts['cropped_voxels'] == (mask > 0).sum() - roi.mask.sum() > 0
    hollow = put_back(to_volume(brain), np.zeros_like(roi.raw), roi.mask, roi.offset)
    assert (hollow != to_volume(brain)).sum() == roi.mask.sum()
    np.testing.assert_array_equal(put_back(hollow, roi.raw, roi.mask, roi.offset), to_volume(brain))


def test_put_back_refuses_another_brain_and_clips_to_the_dtype(brain, mask, write_scan, data):
    roi = read_roi(write_scan(brain, mask), data)
    with pytest.raises(InputError, match='another brain'):
        put_back(to_volume(brain)[:6], roi.raw, roi.mask, roi.offset)
    with pytest.raises(InputError, match='another brain'):
        put_back(to_volume(brain), roi.raw, roi.mask, (-9, *roi.offset[1:]))
    small = put_back(np.zeros(roi.shape, np.uint8), roi.raw - 500, roi.mask, roi.offset)
    assert small.min() == 0
    assert small.max() == 255


# Faults: each by damaging the good patient. A damage takes (scan, brain, mask, write_scan, data), returns the scan.


def no_image(scan, *_):
    scan.image.unlink()
    return scan


def image_is_a_folder(scan, *_):
    scan.image.unlink()
    scan.image.mkdir()
    return scan


def truncated(file: str, share: float):
    def damage(scan, *_):
        path = getattr(scan, file)
        path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
        return scan

    return damage


def without_checksum(scan, *_):
    scan.image.write_bytes(scan.image.read_bytes()[:-4])  # every voxel is still there
    return scan


def flipped_bit(scan, *_):
    content = bytearray(scan.image.read_bytes())
    content[-5] ^= 16  # of the checksum
    scan.image.write_bytes(content)
    return scan


def truncated_plain(scan, brain, mask, write_scan, _):
    scan = write_scan(brain, mask, ending='.nii')
    scan.image.write_bytes(scan.image.read_bytes()[:-9])
    return scan


def no_nifti(scan, *_):
    scan.image.write_bytes(b'<html>404</html>' * 60)
    return scan


def empty_file(scan, *_):
    scan.image.write_bytes(b'')
    return scan


def bad_dtype_code(scan, *_):
    patch_header(scan.image, 70, struct.pack('<h', 77))
    return scan


def huge_dimensions(scan, *_):
    patch_header(scan.image, 40, struct.pack('<4h', 3, 32767, 32767, 32767))  # 70 terabytes
    return scan


def no_slices(scan, *_):
    patch_header(scan.image, 46, struct.pack('<h', 0))
    return scan


def infinite_offset(scan, *_):
    patch_header(scan.image, 108, struct.pack('<f', -np.inf))
    return scan


def affine_with_nan(scan, *_):
    patch_header(scan.image, 280, struct.pack('<f', np.nan))
    return scan


def rewrite(image=lambda brain: brain, mask=lambda mask: mask, **options):
    def damage(scan, brain, mask_array, write_scan, _):
        return write_scan(image(brain), mask(mask_array), **options)

    return damage


def moved(millimetres: float):
    affine = np.array([[-1.0, 0, 0, millimetres], [0, -1, 0, 239], [0, 0, 1.5, 0], [0, 0, 0, 1]])
    return rewrite(mask_affine=affine)


def turned(scan, brain, mask, write_scan, _):
    return write_scan(brain, mask, mask_affine=np.diag([1.0, 1, 1.5, 1]))


def set_labels(scan, brain, mask, write_scan, data):
    data.mask_labels = (3,)
    return scan


def full_box(value):
    def damage(scan, brain, mask, write_scan, data):
        data.roi_size = (4, 4, 4)
        mask = np.zeros_like(mask)
        mask[8:12, 8:12, 8:12] = 1
        return write_scan(np.where(mask, value, brain).astype(brain.dtype), mask)

    return damage


def two_lesions(scan, brain, mask, write_scan, data):
    data.roi_size, data.oversize = (4, 4, 4), 'crop'
    mask = np.zeros_like(mask)
    mask[2:4, 8:12, 8:12] = mask[16:18, 8:12, 8:12] = 1
    return write_scan(brain, mask)


def with_label(value, dtype):
    def change(mask):
        mask = mask.astype(dtype)
        mask[6, 10, 6] = value
        return mask

    return rewrite(mask=change)


FAULTS = [
    (no_image, 'image', 'missing file'),
    (image_is_a_folder, 'image', 'cannot be read'),
    (truncated('image', 0.6), 'image', 'truncated or damaged gzip'),
    (truncated('mask', 0.6), 'mask', 'truncated or damaged gzip'),
    (without_checksum, 'image', 'truncated or damaged gzip'),
    (flipped_bit, 'image', 'truncated or damaged gzip'),
    (truncated_plain, 'image', 'truncated or damaged NIfTI'),
    (no_nifti, 'image', 'not a NIfTI'),
    (empty_file, 'image', 'empty file'),
    (bad_dtype_code, 'image', 'truncated or damaged NIfTI'),
    (huge_dimensions, 'image', r'truncated or damaged NIfTI file \(\d+ bytes expected, \d+ there'),
    (no_slices, 'image', r'three axes is needed, this has shape \(20, 24, 0\)'),
    (infinite_offset, 'image', 'truncated or damaged NIfTI'),
    (affine_with_nan, 'image', 'not finite'),
    (rewrite(image=lambda brain: brain + 1j * brain.astype(np.complex64)), 'image', 'real numbers'),
    (rewrite(image=lambda brain: np.stack([brain] * 2, axis=-1)), 'image', 'three axes'),
    (rewrite(image=lambda brain: brain[..., 0]), 'image', 'three axes'),
    (rewrite(mask=lambda mask: mask[:-1]), 'mask', r'shape mismatch: the mask is 19 x 24 x 17 voxels, the image 20'),
    (moved(0.5), 'mask', r'affine mismatch: .* 0.5 mm apart'),
    (turned, 'mask', 'affine mismatch'),
    (rewrite(mask=np.zeros_like), 'mask', 'empty mask: every voxel is 0'),
    (set_labels, 'mask', r'empty mask: none of data.mask_labels=\(3,\); it has 1, 2, 4'),
    (with_label(1.5, np.float32), 'mask', 'unknown label 1.5'),
    (with_label(-1, np.int16), 'mask', 'unknown label -1'),
    (with_label(np.nan, np.float32), 'mask', 'unknown label nan'),
    (rewrite(image=np.zeros_like), 'image', 'constant: every voxel in its box is 0'),
    (
        rewrite(image=lambda brain: np.where(brain, np.nan, 0).astype(np.float32)),
        'image',
        'every voxel .* not a number',
    ),
    (rewrite(image=lambda brain: -brain), 'image', 'the whole tumour is at or below the background, 0, and would'),
    (two_lesions, 'mask', r'no voxel of the tumour lies in the box of 4 x 4 x 4 voxels around its middle'),
    (full_box(300), 'image', 'constant: every voxel in its box is 300'),
]


@pytest.mark.parametrize(('damage', 'file', 'message'), FAULTS)
def test_every_fault_names_the_patient_and_the_file(damage, file, message, brain, mask, write_scan, data):
    scan = damage(write_scan(brain, mask), brain, mask, write_scan, data)
    with pytest.raises(PatientError, match=message) as caught:
        read_roi(scan, data)
    error = caught.value
    assert error.id == 'P1'
    assert error.file == str(getattr(scan, file))
    assert str(error) == str(error.problem) == f'patient P1, {error.file}: {error.message}'
    assert '\n' not in str(error)
    again = pickle.loads(pickle.dumps(error))  # as it comes from a worker process
    assert (again.id, again.file, again.message) == (error.id, error.file, error.message)


def test_a_hair_between_the_affines_is_no_fault(brain, mask, write_scan, data):
    expected = read_roi(write_scan(brain, mask), data)
    scan = moved(0.05)(None, brain, mask, write_scan, data)
    np.testing.assert_array_equal(read_roi(scan, data).raw, expected.raw)


@pytest.mark.skipif(not REAL_COHORT.is_dir(), reason=f'no real patient at {REAL_COHORT} (set VQROI_REAL_COHORT)')
def test_the_real_patient_goes_out_of_its_brain_and_back(data):
    data.path, data.roi_size = str(REAL_COHORT), (64, 64, 64)
    cohort = find_cohort(data)
    assert (cohort.layout, cohort.classes, cohort.problems) == ('brats2019', ('LGG',), ())
    (scan,) = cohort.scans
    assert scan.id == 'TCGA-DU-7294'
    roi = read_roi(scan, data)
    assert roi.counts['tumour_voxels'] == 24188
    assert roi.shape == (155, 240, 240)
    assert roi.background == 0
    assert sorted(side.stop - side.start for side in mask_box(roi.mask)) == [37, 40, 44]
    image = np.asanyarray(nibabel.load(scan.image).dataobj)
    hollow = np.where(np.asanyarray(nibabel.load(scan.mask).dataobj), 0, image).astype(image.dtype)
    assert (hollow != image).any()
    for raw in (roi.raw, unscale(roi.volume, roi.range)):
        back = put_back(to_volume(hollow), raw, roi.mask, roi.offset, roi.background)
        np.testing.assert_array_equal(to_nifti(back), image)
