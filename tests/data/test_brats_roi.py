"""The TFDS builder and the parallel crops: nothing is lost on the way from a NIfTI file to a record."""

import errno
import itertools
import multiprocessing
import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import ml_collections
import nibabel
import numpy as np
import pytest
import tensorflow_datasets as tfds

from vqroi_jax.data.brats_roi import brats_roi_dataset_builder, crops
from vqroi_jax.data.cohort import Scan
from vqroi_jax.data.roi import Roi, put_back, to_volume
from vqroi_jax.errors import InputError

SIZE = (7, 10, 8)
AFFINE = np.array([[-1.1, 0, 0, 3], [0, -0.9, 0.1, 239], [0, 0, 1.3, 0], [0, 0, 0, 1]])
DATA = ml_collections.ConfigDict(
    {'roi_size': SIZE, 'mask_labels': (), 'known_labels': (), 'oversize': 'refuse', 'workers': 1}
)


def make_roi(seed: int, dtype: str = 'float32') -> Roi:
    rng = np.random.default_rng(seed)
    mask = rng.random(SIZE) < 0.3
    raw = np.where(mask, rng.normal(100, 80, SIZE).round(), 0).astype(dtype)  # some negative, some 0
    if dtype == 'float64':
        raw[mask] += 1 / 3
    return Roi(raw, mask, (-2, 0, seed), (20, 24, 22), AFFINE, (0.0, float(raw.max())), 0.1, {})


def write_scan(folder: Path, name: str, seed: int, dtype: str = 'int16') -> Scan:
    """A brain of noise with a box of tumour; float32 images have a background of -1.2."""
    rng = np.random.default_rng(seed)
    image, mask = np.zeros((24, 22, 20), dtype), np.zeros((24, 22, 20), np.uint8)
    image[2:-2, 2:-2, 2:-2] = rng.normal(300, 100, (20, 18, 16))
    mask[8:15, 9:15, 0:6] = rng.integers(0, 3, (7, 6, 6))
    if dtype == 'float32':
        image = (image / np.float32(170) - np.float32(1.2)).astype(np.float32)
    folder.mkdir(parents=True, exist_ok=True)
    paths = folder / f'{name}_flair.nii.gz', folder / f'{name}_seg.nii.gz'
    for array, path in zip((image, mask), paths, strict=True):
        nibabel.save(nibabel.Nifti1Image(array, AFFINE), path)
    return Scan(name, name, 'LGG', *paths)


def build(folder: Path, rois: dict[str, list[Roi]], dtype: str = 'float32') -> tfds.core.DatasetBuilder:
    """Stores ROIs by split and opens the dataset as a reader does: from its folder alone."""
    count = itertools.count()
    splits = {name: [] for name in rois}
    for name, of_split in rois.items():
        for roi in of_split:
            number = next(count)
            path = folder / f'{number}.npz'
            crops.save_crop(path, roi)
            splits[name].append((f'scan{number}', f'patient{number}', 'HGG' if number % 2 else 'LGG', path))
    builder = brats_roi_dataset_builder.Builder(
        roi_size=SIZE, dtype=dtype, classes=('LGG', 'HGG'), splits=splits, data_dir=folder
    )
    return tfds.builder_from_directory(builder.build())


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_a_crop_file_gives_the_roi_back(tmp_path, dtype):
    roi = make_roi(3, dtype)
    crops.save_crop(tmp_path / 'roi.npz', roi)
    crop = crops.load_crop(tmp_path / 'roi.npz')
    assert crop['volume'].dtype == dtype
    np.testing.assert_array_equal(crop['volume'], roi.raw)
    for field in ('mask', 'offset', 'shape', 'affine', 'range', 'background'):
        np.testing.assert_array_equal(crop[field], getattr(roi, field), err_msg=field)


@pytest.mark.parametrize('dtype', ['float32', 'float64'])
def test_records_are_the_rois_in_order_and_at_random(tmp_path, monkeypatch, dtype):
    # Shards of two records, so that a split has several.
    monkeypatch.setattr(brats_roi_dataset_builder, '_SHARD_BYTES', 2 * np.prod(SIZE) * (np.dtype(dtype).itemsize + 1))
    rois = {'train': [make_roi(seed, dtype) for seed in range(5)], 'test': [make_roi(9, dtype)]}
    builder = build(tmp_path, rois, dtype)
    assert builder.info.splits['train'].num_shards == 3
    assert set(builder.info.splits) == {'train', 'test'}
    assert builder.info.features['label'].names == ['LGG', 'HGG']
    source = builder.as_data_source('train')
    assert len(source) == 5
    for position in (4, 0, 3, 1, 2):
        record, roi = source[position], rois['train'][position]
        assert record['id'] == b'scan%d' % position
        assert record['patient'] == b'patient%d' % position
        assert record['label'] == position % 2
        assert record['volume'].dtype == dtype
        np.testing.assert_array_equal(record['volume'], roi.raw)
        for field in ('mask', 'offset', 'shape', 'affine', 'range', 'background'):
            np.testing.assert_array_equal(record[field], getattr(roi, field), err_msg=field)


@pytest.mark.parametrize('dtype', ['int16', 'float32'])
def test_an_roi_goes_back_into_its_brain_exactly(tmp_path, dtype):
    scan = write_scan(tmp_path, 'p', 0, dtype)
    assert not crops.crop_scans([scan], DATA, tmp_path)[1]
    crop = crops.load_crop(crops.crop_path(tmp_path, 0))
    brain = to_volume(np.asanyarray(nibabel.load(scan.image).dataobj))
    tumour = to_volume(np.asanyarray(nibabel.load(scan.mask).dataobj)) > 0
    hollow = np.where(tumour, 0, brain).astype(dtype)
    filled = put_back(hollow, crop['volume'], crop['mask'], crop['offset'], float(crop['background']))
    np.testing.assert_array_equal(filled, brain)
    np.testing.assert_array_equal(crop['affine'], nibabel.load(scan.image).affine)
    assert (crop['background'] != 0) == (dtype == 'float32')


def test_processes_crop_as_one_does_and_report_every_fault(tmp_path):
    scans = [write_scan(tmp_path / 'cohort', f'p{number}', number) for number in range(4)]
    scans[1].image.write_bytes(scans[1].image.read_bytes()[:-200])
    scans[2].mask.unlink()
    twin = Scan('twin', 'twin', 'LGG', scans[0].image, scans[0].mask)
    results = []
    for workers in (1, 2):
        data = DATA.copy_and_resolve_references()
        data.workers = workers
        folder = tmp_path / str(workers)
        found, problems = crops.crop_scans([*scans, twin], data, folder)
        assert [problem.id for problem in problems] == ['p1', 'p2', 'twin']
        assert problems[0].file == str(scans[1].image)
        assert problems[1].file == str(scans[2].mask)
        assert 'voxel for voxel, as p0' in problems[2].message
        results.append((found, [crops.load_crop(crops.crop_path(folder, n)) for n in (0, 3)]))
    (found, loaded), (other_found, other_loaded) = results
    assert found == other_found
    assert list(found) == ['p0', 'p3']
    for crop, other in zip(loaded, other_loaded, strict=True):
        np.testing.assert_equal(crop, other)


def test_a_process_that_is_killed_is_told(tmp_path):
    os.mkfifo(tmp_path / 'never.nii')  # nobody writes to it, so who reads it waits
    never = [Scan(name, name, 'LGG', tmp_path / 'never.nii', tmp_path / 'never.nii') for name in 'ab']

    def kill_one():
        # The pool looks after a worker that it started last only once another has done something: kill the first.
        while len(children := multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        min(children, key=lambda child: child.pid).kill()

    data = DATA.copy_and_resolve_references()
    data.workers = 2
    killer = threading.Thread(target=kill_one)
    killer.start()
    with pytest.raises(InputError, match='killed, most likely for want of memory'):
        crops.crop_scans(never, data, tmp_path / 'crops')
    killer.join()


def test_a_scan_is_described_in_physical_units(tmp_path):
    scan = write_scan(tmp_path, 'p', 0)
    found = crops.crop_scans([scan], DATA, tmp_path)[0]['p']
    voxels = int((np.asanyarray(nibabel.load(scan.mask).dataobj) > 0).sum())
    assert found['counts']['tumour_voxels'] == voxels
    assert found['tumour_ml'] == pytest.approx(voxels * 1.1 * 0.9 * 1.3 / 1000)
    assert found['shape'] == [20, 24, 22]  # depth, height, width of a NIfTI volume of 24 x 22 x 20
    assert found['spacing'] == pytest.approx([np.hypot(1.3, 0.1), 1.1, 0.9], abs=1e-4)


def test_a_full_disk_is_an_os_error(tmp_path, monkeypatch):
    def write(*_, **__):
        raise RuntimeError('write() failed: No space left on device; writing brats_roi-train.array_record')

    monkeypatch.setattr(brats_roi_dataset_builder.Builder, 'download_and_prepare', write)
    with pytest.raises(OSError, match='No space left') as error:
        build(tmp_path, {'train': [make_roi(0)]})
    assert error.value.errno == errno.ENOSPC


def test_preparing_and_reading_needs_no_tensorflow(tmp_path):
    code = f"""
import sys
from pathlib import Path
sys.path.insert(0, {str(Path(__file__).parent)!r})
import test_brats_roi as t
builder = t.build(Path({str(tmp_path)!r}), {{'train': [t.make_roi(0), t.make_roi(1)]}})
assert len([record for record in builder.as_data_source('train')]) == 2
print(sorted({{'tensorflow', 'torch'}} & set(sys.modules)))
"""
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stdout == '[]\n'  # which also says that TFDS prints nothing


def test_a_process_that_crops_loads_little():
    heavy = {'jax', 'flax', 'tensorflow', 'tensorflow_datasets', 'torch', 'grain', 'matplotlib'}
    code = f'import sys, vqroi_jax.data.brats_roi.crops; print(sorted({heavy} & set(sys.modules)))'
    result = subprocess.run([sys.executable, '-c', code], capture_output=True, text=True, check=True)
    assert result.stdout == '[]\n'
