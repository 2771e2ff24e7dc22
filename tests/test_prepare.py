"""Preparation as a user meets it: on phantoms, a real patient, a manifest, faulty cohorts, and after a kill."""

import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from pathlib import Path

import ml_collections
import nibabel
import numpy as np
import pytest

from vqroi_jax import prepare
from vqroi_jax.data.pipeline import Batches, is_prepared, open_cohort
from vqroi_jax.data.roi import put_back, to_volume
from vqroi_jax.errors import InputError

ROOT = Path(__file__).parents[1]
AFFINE = np.diag([-1.0, -1.0, 1.0, 1.0])


def settings(path='', **changes) -> ml_collections.ConfigDict:
    data = {
        'path': str(path),
        'layout': 'auto',
        'modality': 'flair',
        'grades_csv': '',
        'classes': (),
        'mask_labels': (),
        'known_labels': (),
        'roi_size': (16, 16, 16),
        'oversize': 'refuse',
        'on_error': 'stop',
        'split': {'seed': 0, 'val': 0.2, 'test': 0.2},
        'workers': 1,
        'phantom': {'patients': 2, 'seed': 0, 'spacing': 8.0},
    }
    return ml_collections.ConfigDict(data | changes).lock()


def write_scan(path: Path, seed: int, sides=(7, 5, 9)) -> tuple[Path, Path]:
    """Writes `path`_flair.nii.gz and `path`_seg.nii.gz with a box of tumour of `sides` (i, j, k)."""
    rng = np.random.default_rng(seed)
    image, mask = np.zeros((24, 22, 26), np.int16), np.zeros((24, 22, 26), np.uint8)
    image[2:-2, 2:-2, 2:-2] = rng.integers(1, 900, (20, 18, 22))
    mask[tuple(slice(3, 3 + side) for side in sides)] = 1
    files = path.with_name(path.name + '_flair.nii.gz'), path.with_name(path.name + '_seg.nii.gz')
    path.parent.mkdir(parents=True, exist_ok=True)
    for array, file in zip((image, mask), files, strict=True):
        nibabel.save(nibabel.Nifti1Image(array, AFFINE), file)
    return files


@pytest.fixture(scope='module')
def good_cohort(tmp_path_factory) -> Path:
    """Five LGG and five HGG patients in the layout of BraTS 2019; not to be changed."""
    folder = tmp_path_factory.mktemp('cohort')
    for number in range(10):
        label = ('LGG', 'HGG')[number % 2]
        write_scan(folder / label / f'P{number:02d}' / f'P{number:02d}', number)
    return folder


@pytest.fixture
def cohort(good_cohort, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(good_cohort, tmp_path / 'cohort'))


def test_a_cohort_is_found_checked_split_and_stored(good_cohort, tmp_path, capsys):
    prepared = prepare.prepare(settings(good_cohort, workers=2), tmp_path)
    splits = json.loads((tmp_path / 'splits.json').read_text())
    assert {name: len(ids) for name, ids in splits.items()} == {'train': 6, 'val': 2, 'test': 2}
    assert prepared.classes == ('LGG', 'HGG')
    assert prepared.roi_size == (16, 16, 16)
    for name, ids in splits.items():
        source = prepared.split(name)
        assert list(source.ids) == ids
        for position, scan in enumerate(ids):
            record = source[position]
            assert (record['id'], record['patient']) == (scan, scan)
            label = prepared.scans[scan]['label']
            assert prepared.classes[record['label']] == prepared.classes[source.labels[position]] == label
            folder = good_cohort / label / scan
            brain = to_volume(np.asanyarray(nibabel.load(folder / f'{scan}_flair.nii.gz').dataobj))
            roi = source.roi(position)
            hollow = put_back(brain, np.zeros_like(roi.raw), roi.mask, roi.offset)
            assert (hollow != brain).sum() == 7 * 5 * 9
            np.testing.assert_array_equal(put_back(hollow, roi.raw, roi.mask, roi.offset, roi.background), brain)
            assert source.volume(position).min() == -1
            assert source.volume(position).max() == pytest.approx(1, abs=1e-6)
    assert (tmp_path / 'figures' / 'cohort.png').read_bytes()[:4] == b'\x89PNG'
    lines = capsys.readouterr().out.splitlines()
    volume = f'{7 * 5 * 9 / 1000:.1f}'
    assert [line.split() for line in lines if line.startswith(('LGG', 'HGG', 'all'))] == [
        ['LGG', '3', '1', '1', '5', volume, volume, volume],
        ['HGG', '3', '1', '1', '5', volume, volume, volume],
        ['all', '6', '2', '2', '10', volume, volume, volume],
    ]
    assert 'voxels (depth, height, width): 26 x 24 x 22 (10 scans)' in lines
    assert 'spacing, mm (depth, height, width): 1 x 1 x 1 (10 scans)' in lines


def test_without_a_path_phantoms_are_made_and_called_synthetic(tmp_path, capsys):
    # 8 mm: heads of 30 x 30 x 19 voxels, in which every tumour fits 16.
    prepared = prepare.prepare(settings(), tmp_path)
    assert 'SYNTHETIC' in capsys.readouterr().out
    assert prepared.report['synthetic']
    assert Counter(scan['label'] for scan in prepared.scans.values()) == {'LGG': 2, 'HGG': 2}
    batch = Batches(prepared.split('train'), 3, seed=0).batch_at(0)
    assert batch['volume'].shape == (3, 16, 16, 16, 1)
    assert set(batch['label']) == {0, 1}
    prepare.prepare(settings(), tmp_path)
    assert 'Using the ROIs of 4 scans' in capsys.readouterr().out
    # By whatever way they come.
    assert prepare.prepare(settings(tmp_path / 'phantom'), tmp_path / 'again').report['synthetic']
    assert 'SYNTHETIC' in capsys.readouterr().out
    prepare.prepare(settings(tmp_path), tmp_path / 'run')
    assert 'SYNTHETIC' in capsys.readouterr().out


def test_a_real_patient(tmp_path, capsys):
    folder = Path(os.environ.get('VQROI_REAL_COHORT', ROOT.parent / 'shared' / 'real_cohort'))
    if not folder.is_dir():
        pytest.skip(f'no real patient in {folder}; VQROI_REAL_COHORT names a cohort folder to test with')
    prepared = prepare.prepare(settings(folder, roi_size=(128, 128, 128)), tmp_path)
    printed = capsys.readouterr().out
    source = prepared.split('train')
    scan = prepared.scans[source.ids[0]]
    brain = to_volume(np.asanyarray(nibabel.load(scan['image']).dataobj))
    tumour = to_volume(np.asanyarray(nibabel.load(scan['mask']).dataobj)) > 0
    roi = source.roi(0)
    hollow = np.where(tumour, -999, brain).astype(brain.dtype)
    np.testing.assert_array_equal(put_back(hollow, roi.raw, roi.mask, roi.offset, roi.background), brain)
    negative = int((brain[tumour] < 0).sum())
    assert scan['counts']['tumour_voxels'] == tumour.sum()
    assert scan['counts']['negative_voxels'] == negative
    assert f'{tumour.sum() / 1000:.1f}' in printed
    if len(prepared.scans) == 1:
        assert not prepared.split('val').ids
        assert 'warning: class LGG: 1 patient cannot give' in printed


def test_a_manifest_with_three_classes_and_odd_sizes(tmp_path, capsys):
    rows = ['id,image,mask,label']
    for number in range(9):
        image, mask = write_scan(tmp_path / 'scans' / f'x{number}', number, sides=(20, 3, 21))
        label = ('meningioma', 'metastasis', 'LGG')[number % 3]
        rows.append(f'{number},{image.relative_to(tmp_path)},{mask.relative_to(tmp_path)},{label}')
    (tmp_path / 'all.csv').write_text('\n'.join(rows))
    prepared = prepare.prepare(settings(tmp_path / 'all.csv', roi_size=(24, 20, 28)), tmp_path / 'out')
    assert prepared.classes == ('LGG', 'meningioma', 'metastasis')
    source = prepared.split('train')
    assert sorted(source.labels) == [0, 1, 2]
    roi = source.roi(0)
    assert roi.mask.shape == (24, 20, 28)
    assert [int(np.ptp(axis)) + 1 for axis in np.nonzero(roi.mask)] == [21, 20, 3]  # depth, height, width
    assert Batches(source, 2, seed=0).batch_at(0)['volume'].shape == (2, 24, 20, 28, 1)
    assert 'metastasis            1      1      1      3' in capsys.readouterr().out


def test_what_is_prepared_is_used_again_until_something_changes(cohort, tmp_path, capsys):
    def prepare_again(**changes) -> bool:
        prepare.prepare(settings(cohort, **changes), tmp_path / 'out')
        return 'Using the ROIs of 10 scans' not in capsys.readouterr().out

    assert prepare_again()
    before = (tmp_path / 'out' / 'cohort.json').stat()
    assert not prepare_again()
    assert not prepare_again(workers=2, on_error='skip')  # these do not change the ROIs
    assert (tmp_path / 'out' / 'cohort.json').stat() == before
    assert prepare_again(split={'seed': 1, 'val': 0.2, 'test': 0.2})
    assert prepare_again(roi_size=(12, 16, 16))
    assert open_cohort(tmp_path / 'out').roi_size == (12, 16, 16)
    assert not prepare_again(roi_size=(12, 16, 16))
    write_scan(cohort / 'LGG' / 'P00' / 'P00', seed=99)
    assert prepare_again(roi_size=(12, 16, 16))
    write_scan(cohort / 'HGG' / 'P99' / 'P99', seed=100)
    prepare.prepare(settings(cohort, roi_size=(12, 16, 16)), tmp_path / 'out')
    assert len(open_cohort(tmp_path / 'out').scans) == 11


def test_what_another_version_prepared_is_prepared_anew(good_cohort, tmp_path, capsys):
    report = prepare.prepare(settings(good_cohort), tmp_path).report
    (tmp_path / 'cohort.json').write_text(json.dumps(report | {'format': 1}))  # of ROIs with the axes of their files
    assert prepare.prepare(settings(good_cohort), tmp_path).report == report
    assert 'Another version of vqroi_jax has prepared' in capsys.readouterr().out


def test_tumours_that_are_lost_in_the_background_are_told_by_name(cohort, tmp_path, capsys):
    prepare.prepare(settings(cohort), tmp_path / 'before')
    assert 'lost in it' not in capsys.readouterr().out
    for name, dark in (('P01', 3), ('P03', 40), ('P05', 126)):  # of 315 voxels
        path = cohort / 'HGG' / name / f'{name}_flair.nii.gz'
        image = nibabel.load(path)
        voxels = np.asarray(image.dataobj).astype(np.float32)
        inside = tuple(np.argwhere(np.asarray(nibabel.load(str(path).replace('flair', 'seg')).dataobj))[:dark].T)
        voxels[inside] = -1
        nibabel.save(nibabel.Nifti1Image(voxels, image.affine), path)
    report = prepare.prepare(settings(cohort), tmp_path / 'out').report
    (warning,) = report['warnings']
    assert 'in 2 scans (share of the tumour): P05 (40%), P03 (13%). Images' in warning
    assert f'warning: {warning}' in capsys.readouterr().out


def damage(cohort: Path) -> None:
    """Faults of two kinds: one seen in the folder, one only on reading the volume."""
    (cohort / 'HGG' / 'P01' / 'P01_seg.nii.gz').unlink()
    image = cohort / 'LGG' / 'P04' / 'P04_flair.nii.gz'
    image.write_bytes(image.read_bytes()[:-500])


def test_by_default_faulty_patients_stop_it_with_all_of_them_told(cohort, tmp_path, capsys):
    damage(cohort)
    with pytest.raises(InputError) as error:
        prepare.prepare(settings(cohort), tmp_path / 'out')
    message = str(error.value)
    assert '\n' not in message
    assert message.startswith('2 of 10 scans cannot be used: patient P01')
    assert '(and 1 more, listed above)' in message
    assert 'data.on_error=skip' in message
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith('cannot be used: ')]
    assert len(printed) == 2
    assert 'P04_flair.nii.gz: truncated' in printed[1]
    assert os.listdir(tmp_path / 'out') == []


def test_with_skip_the_others_go_on_and_the_faults_are_reported(cohort, tmp_path, capsys):
    damage(cohort)
    prepared = prepare.prepare(settings(cohort, on_error='skip'), tmp_path / 'out')
    assert [problem['id'] for problem in prepared.report['problems']] == ['P01', 'P04']
    assert sorted(prepared.scans) == [f'P{n:02d}' for n in range(10) if n not in (1, 4)]
    # Splits are of those that are left: each class still gives one of its four to validation and one to the test.
    assert {name: len(ids) for name, ids in prepared.splits.items()} == {'train': 4, 'val': 2, 'test': 2}
    lines = capsys.readouterr().out.splitlines()
    assert [line[:21] for line in lines if line.startswith('left out')] == [f'left out: patient P0{n}' for n in (1, 4)]
    assert sum('P04_flair.nii.gz: truncated' in line for line in lines) == 1
    # What was prepared with faults skipped does not pass for a cohort without any.
    with pytest.raises(InputError, match='2 of 10 scans'):
        prepare.prepare(settings(cohort), tmp_path / 'out')


def test_one_is_told_in_the_singular(good_cohort, tmp_path, capsys):
    report = prepare.prepare(settings(good_cohort), tmp_path / 'out').report
    scan = {**report['scans'][0], 'counts': dict.fromkeys(report['scans'][0]['counts'], 1)}
    table = prepare.cohort_table({**report, 'scans': [scan]})
    assert ': 1 patient, 1 scan\n' in table
    assert '(1 scan)\n' in table
    assert ': 1 voxel in 1 scan\n' in table


def test_when_no_scan_is_left_skipping_does_not_help(tmp_path):
    write_scan(tmp_path / 'cohort' / 'LGG' / 'P' / 'P', 0)
    with pytest.raises(InputError, match=r'1 of 1 scans .* larger than data.roi_size .* no scan is left'):
        prepare.prepare(settings(tmp_path / 'cohort', roi_size=(4, 4, 4), on_error='skip'), tmp_path / 'out')


def test_a_prepared_folder_is_a_cohort_too(good_cohort, tmp_path, capsys):
    prepare.prepare(settings(good_cohort), tmp_path / 'prepared')
    capsys.readouterr()
    path = tmp_path / 'prepared'
    there = prepare.prepare(settings(path, split={'seed': 7, 'val': 0.2, 'test': 0.2}), tmp_path / 'run')
    assert there.folder == path
    assert len(there.split('train')) == 6
    assert "split={'seed': 0, 'test': 0.2, 'val': 0.2}" in capsys.readouterr().out  # whose settings count
    with pytest.raises(InputError, match=r'prepared with roi_size=\(16, 16, 16\), but data.roi_size=\(32, 32, 32\)'):
        prepare.prepare(settings(path, roi_size=(32, 32, 32)), tmp_path / 'run')
    with pytest.raises(InputError, match=r"prepared with classes=\('LGG', 'HGG'\)"):
        prepare.prepare(settings(path, classes=('HGG', 'LGG')), tmp_path / 'run')


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'roi_size': (16, 16)}, 'three whole numbers'),
        ({'roi_size': (16, 0, 16)}, 'three whole numbers'),
        ({'on_error': 'ignore'}, 'choose one of stop, skip'),
        ({'oversize': 'shrink'}, 'choose one of refuse, crop'),
        ({'workers': -1}, '0 for one a core'),
        ({'mask_labels': (0, 1)}, r'data.mask_labels=\(0, 1\): 0 is the background'),
        ({'path': '', 'phantom': {'patients': 2, 'seed': 0, 'spacing': 0.0}}, r'data.phantom.spacing is 0.0 mm'),
    ],
)
def test_settings_that_cannot_be(good_cohort, tmp_path, changes, message):
    with pytest.raises(InputError, match=message):
        prepare.prepare(settings(**{'path': good_cohort, **changes}), tmp_path)


def test_no_room_on_the_disk_is_said_before_anything_long(good_cohort, tmp_path, monkeypatch):
    full = type(shutil.disk_usage('/'))(total=2**40, used=2**40, free=2**20)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: full)
    monkeypatch.setattr(prepare, 'crop_scans', None)
    monkeypatch.setattr(prepare.phantom, 'write_phantom_cohort', None)
    for path in (good_cohort, ''):
        with pytest.raises(InputError, match='no disk space'):
            prepare.prepare(settings(path), tmp_path)


def test_a_damaged_folder_is_told(good_cohort, tmp_path):
    with pytest.raises(InputError, match='holds no prepared cohort'):
        open_cohort(tmp_path)
    prepare.prepare(settings(good_cohort), tmp_path)
    (records,) = tmp_path.glob('brats_roi/*/*-train.array_record-*')
    whole = records.read_bytes()
    for damaged in (whole[: len(whole) // 2], b'', whole[:300] + bytes(64) + whole[364:]):
        records.write_bytes(damaged)
        batches = Batches(open_cohort(tmp_path).split('train'), 6, seed=0)
        with pytest.raises(InputError, match=rf'^{records}: record . of the train split cannot be read .*; remove '):
            next(batches.iterator())
    records.write_bytes(whole)
    report = json.loads((tmp_path / 'cohort.json').read_text())
    (tmp_path / 'cohort.json').write_text(json.dumps(report | {'format': 0}))
    with pytest.raises(InputError, match='another version'):
        open_cohort(tmp_path)
    (tmp_path / 'cohort.json').write_text(json.dumps(report | {'scans': report['scans'][1:]}))
    with pytest.raises(InputError, match='do not belong together'):
        open_cohort(tmp_path)
    (tmp_path / 'cohort.json').write_text('{')
    with pytest.raises(InputError, match='damaged'):
        open_cohort(tmp_path)


# Run in a process of its own, which kills itself: as its first crop arrives, or when all is stored but the last file.
KILLED = """
import multiprocessing, os, signal, sys

def die(*_):
    print(*[child.pid for child in multiprocessing.active_children()], flush=True)
    os.kill(os.getpid(), signal.SIGKILL)

if __name__ == '__main__':  # not in the processes that crop, which import this file
    sys.path.insert(0, {tests!r})
    import test_prepare
    from vqroi_jax import prepare
    from vqroi_jax.data.brats_roi import crops
    {module}.{function} = die
    prepare.prepare(test_prepare.settings({cohort!r}, workers=2), {out!r})
"""


@pytest.mark.parametrize(('module', 'function'), [('crops', 'as_completed'), ('prepare', 'write_splits')])
def test_a_killed_preparation_is_never_taken_for_whole(good_cohort, tmp_path, capsys, module, function):
    out = tmp_path / 'out'
    script = tmp_path / 'killed.py'
    names = {'tests': str(Path(__file__).parent), 'cohort': str(good_cohort), 'out': str(out)}
    script.write_text(KILLED.format(module=module, function=function, **names))
    killed = subprocess.run([sys.executable, script], capture_output=True, text=True, timeout=120)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    workers = [int(pid) for pid in killed.stdout.split()]
    assert bool(workers) == (module == 'crops')
    assert os.listdir(out)
    assert not is_prepared(out)
    deadline = time.monotonic() + 10
    while any(map(alive, workers)) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(map(alive, workers))  # the processes that cropped went with the one that started them
    assert len(prepare.prepare(settings(good_cohort), out).split('train')) == 6
    assert sorted(os.listdir(out)) == ['brats_roi', 'cohort.json', 'figures', 'splits.json']


def draw_for_long(task):
    time.sleep(5)


def test_sigterm_ends_the_drawing_of_phantoms_at_once_and_leaves_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(prepare.phantom, '_write_patient', draw_for_long)

    def terminate():
        while len(multiprocessing.active_children()) < 2:
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    before = signal.signal(signal.SIGTERM, lambda *_: None)  # or the test's own process would end
    sender = threading.Thread(target=terminate)
    try:
        sender.start()
        with pytest.raises(KeyboardInterrupt):
            prepare.prepare(settings(workers=2), tmp_path)
        assert not multiprocessing.active_children()
        assert not list(tmp_path.iterdir())
    finally:
        sender.join()
        handler = signal.signal(signal.SIGTERM, before)
    assert handler.__name__ == '<lambda>'  # not that of the preparation any more


def alive(pid: int) -> bool:
    """Whether a process runs; one that ended and waits to be reaped does not."""
    status = Path(f'/proc/{pid}/stat')
    try:
        return status.read_text().rpartition(')')[2].split()[0] != 'Z'
    except FileNotFoundError:
        return False


def test_the_command(good_cohort, tmp_path):
    config = ml_collections.ConfigDict({'task': 'prepare', 'data': settings(good_cohort)}).lock()
    prepare.run(config, tmp_path)
    assert is_prepared(tmp_path)
