"""Reading sets of ROIs: one layout and one range, whatever the files are like."""

import runpy
from pathlib import Path

import nibabel
import numpy as np
import pytest

from vqroi_jax import prepare
from vqroi_jax.data import roi_sets, samples
from vqroi_jax.data.learnt_from import LearntFrom, write_learnt_from
from vqroi_jax.data.phantom import CLASSES, make_phantom
from vqroi_jax.data.roi import crop_roi, scale, to_nifti, to_volume
from vqroi_jax.data.roi_sets import open_sets
from vqroi_jax.errors import InputError
from vqroi_jax.workdir import write_atomically

CONFIGS = Path(__file__).parents[2] / 'configs'
SPACED = np.array([[-1.0, 0, 0, 5], [0, -2.0, 0, 7], [0, 0, 3.0, -4], [0, 0, 0, 1]])


def settings(**changes):
    config = runpy.run_path(str(CONFIGS / 'evaluate.py'))['get_config']('smoke')
    config.update_from_flattened_dict(changes)
    return config


def image(seed, shape=(9, 10, 11), peak=1.0):
    voxels = np.zeros(shape, np.float32)
    inside = tuple(slice(2, side - 3) for side in shape)
    voxels[inside] = np.random.default_rng(seed).uniform(0.1, 1, voxels[inside].shape)
    return peak * voxels / voxels.max()


def write(folder, label, voxels, affine=SPACED):
    (folder / label).mkdir(parents=True, exist_ok=True)
    for i, one in enumerate(voxels):
        nibabel.save(nibabel.Nifti1Image(one, affine), folder / label / f'{i}.nii')
    return folder


def test_files_of_any_orientation_come_out_alike(tmp_path):
    voxels = [image(seed) for seed in (0, 1)]
    real = write(tmp_path / 'real', 'a', voxels)
    # The same bodies, stored to the right, to the front and up, with the axes in another order.
    turned = [one[::-1, ::-1].transpose(2, 0, 1) for one in voxels]
    affine = np.array([[0, 1.0, 0, 0], [0, 0, 2.0, 0], [3.0, 0, 0, 0], [0, 0, 0, 1]])
    fake = write(tmp_path / 'fake', 'a', turned, affine)
    with open_sets(str(real), str(fake), settings(), tmp_path) as (one, other):
        np.testing.assert_array_equal(one.volumes, other.volumes)
        np.testing.assert_allclose(one.volumes[1], 2 * to_volume(voxels[1]) - 1, atol=1e-6)
        assert one.spacing == other.spacing == (3, 1, 2)
        assert (one.ids, one.classes, one.counts()) == (('a/0.nii', 'a/1.nii'), ('a',), {'a': 2})
        assert one.splits is None
        assert one.patients == one.ids
        assert one.sha256 == other.sha256
        assert one.range == (0, 1)
    assert sorted(path.name for path in tmp_path.iterdir()) == ['fake', 'real']


def test_the_identity_covers_voxel_sizes_too(tmp_path):
    one, other = (
        write(tmp_path / name, 'a', [image(0), image(1)], affine)
        for name, affine in (('one', SPACED), ('other', SPACED @ np.diag([2, 2, 2, 1.0])))
    )
    for path, again in ((one, other), (one, one)):
        with open_sets(str(path), str(again), settings(grid='resample'), tmp_path) as (first, second):
            assert (first.sha256 == second.sha256) == (path == again)


def test_each_roi_is_scaled_by_its_own_maximum_if_asked(tmp_path):
    real = write(tmp_path / 'real', 'a', [image(0), image(1)])
    fake = write(tmp_path / 'fake', 'a', [image(0, peak=700.0), image(1, peak=90.0)])
    with (
        pytest.raises(InputError, match=r'fake=.* in \[0, 700\]; expected both'),
        open_sets(str(real), str(fake), settings(), tmp_path),
    ):
        pass
    with open_sets(str(real), str(fake), settings(intensity='each'), tmp_path) as (one, other):
        np.testing.assert_allclose(one.volumes, other.volumes, atol=1e-6)
        assert other.range == (0, 700)


def test_ranges_from_minus_one_are_a_convention_too_but_do_not_mix(tmp_path):
    real = write(tmp_path / 'real', 'a', [image(0), image(1)])
    fake = write(tmp_path / 'fake', 'a', [2 * image(0) - 1, 2 * image(1) - 1])
    with pytest.raises(InputError, match=r'\[-1, 1\]'), open_sets(str(real), str(fake), settings(), tmp_path):
        pass
    with open_sets(str(real), str(fake), settings(intensity='each'), tmp_path) as (one, other):
        np.testing.assert_allclose(one.volumes, other.volumes, atol=1e-6)
    with open_sets(str(fake), str(fake), settings(), tmp_path) as (one, _):
        np.testing.assert_allclose(one.volumes[0], to_volume(2 * image(0) - 1), atol=1e-6)


@pytest.mark.parametrize(
    ('peak', 'low', 'intensity'), [(500.0, -0.5, 'each'), (1.0, -0.001, 'as_is'), (3.0, -1.2, 'each')]
)
def test_voxels_below_the_background_are_set_to_it_and_told(tmp_path, capsys, peak, low, intensity):
    plain, marked = ([image(seed, peak=peak) for seed in (0, 1)] for _ in range(2))
    for one, other in zip(plain, marked, strict=True):
        one[4, 4, 4], other[4, 4, 4] = 0, low
    real, fake = write(tmp_path / 'real', 'a', plain), write(tmp_path / 'fake', 'a', marked)
    with open_sets(str(real), str(fake), settings(intensity=intensity), tmp_path) as (one, other):
        np.testing.assert_allclose(other.volumes, one.volumes, atol=1e-6)
        np.testing.assert_array_equal(other.volumes > -1, one.volumes > -1)
        note = '2 voxels of 2 ROIs below the background, set to it'
        assert note in other.facts
        assert note not in one.facts
    assert f'warning: config.fake={fake}: {note}' in capsys.readouterr().out
    coarse = write(tmp_path / 'coarse', 'a', [np.zeros((12, 12, 12), np.float32)])
    with open_sets(str(coarse), str(fake), settings(intensity='each', grid='resample'), tmp_path) as (_, other):
        assert (other.volumes[:, 0] == -1).all()  # what a box is padded with


@pytest.mark.parametrize('background', [-0.9999, -0.99])
def test_a_background_that_is_not_quite_minus_one_is_background(tmp_path, background):
    exact = [2 * image(seed) - 1 for seed in (0, 1)]
    soft = [np.where(one == -1, np.float32(background), one) for one in exact]
    real, fake = write(tmp_path / 'real', 'a', exact), write(tmp_path / 'fake', 'a', soft)
    with open_sets(str(real), str(fake), settings(), tmp_path) as (one, other):
        np.testing.assert_array_equal(other.volumes, one.volumes)
        assert any('a little above the background' in fact for fact in other.facts)


def test_a_tumour_that_fills_its_box_is_told_and_a_background_in_the_middle_refused(tmp_path):
    exact = [2 * image(seed) - 1 for seed in (0, 1)]
    real = write(tmp_path / 'real', 'a', exact)
    fake = write(tmp_path / 'fake', 'a', [np.maximum(one, -0.9) for one in exact])
    with open_sets(str(real), str(fake), settings(), tmp_path) as (one, other):
        assert any('fills 100% of the box' in fact for fact in other.facts)
        assert not any('of the box' in fact for fact in one.facts)
    middle = write(tmp_path / 'middle', 'a', [np.where(one == -1, 0, one) for one in exact])
    with (
        pytest.raises(InputError, match=r'\[-1, 1\], the lowest being the background'),
        open_sets(str(real), str(middle), settings(), tmp_path),
    ):
        pass


def test_another_grid_is_brought_to_the_first_if_asked(tmp_path):
    fine, coarse = np.diag([-1.0, -1, 1, 1]), np.diag([-2.0, -2, 2, 1])
    voxels = [image(seed, (12, 12, 12)) for seed in (0, 1)]
    real = write(tmp_path / 'real', 'a', [one.repeat(2, 0).repeat(2, 1).repeat(2, 2) for one in voxels], fine)
    fake = write(tmp_path / 'fake', 'a', [one[:, 1:, :-1] for one in voxels], coarse)
    with (
        pytest.raises(InputError, match=r'24 x 24 x 24 voxels of 1 x 1 x 1 mm.*11 x 12 x 11 voxels of 2 x 2 x 2 mm'),
        open_sets(str(real), str(fake), settings(), tmp_path),
    ):
        pass
    with open_sets(str(real), str(fake), settings(grid='resample'), tmp_path) as (one, other):
        assert one.volumes.shape == other.volumes.shape == (2, 24, 24, 24)
        assert other.spacing == (1, 1, 1)
        # The tumour's volume stays; its place moves with the middle of what was cut off.
        np.testing.assert_allclose((other.volumes > -0.5).sum(), (one.volumes > -0.5).sum(), rtol=0.15)


def test_a_manifest_says_which_files_and_classes_there_are(tmp_path):
    write(tmp_path / 'made', 'x', [image(0), image(1), image(2)])
    manifest = samples.Manifest(tmp_path / 'made' / samples.MANIFEST_FILE, [samples.KEY, 'class', 'seed'])
    for number, label in ((2, 'HGG'), (0, 'LGG')):
        manifest.append({samples.KEY: f'x/{number}.nii', 'class': label, 'seed': '7'})
    made = str(tmp_path / 'made')
    with open_sets(made, made, settings(), tmp_path) as (one, _):
        assert (one.ids, one.classes, one.labels.tolist()) == (('x/2.nii', 'x/0.nii'), ('LGG', 'HGG'), [1, 0])
        assert 'seed: 7' in one.facts
    with open_sets(made, made, settings(classes=('HGG',)), tmp_path) as (one, _):
        assert one.counts() == {'HGG': 1}


def test_a_prepared_cohort_says_what_was_held_out(tmp_path):
    config = runpy.run_path(str(CONFIGS / 'prepare.py'))['get_config']('smoke')
    config.data.phantom.spacing = 8.0
    config.data.phantom.patients = 4
    config.data.roi_size = (16, 16, 16)
    cohort = prepare.prepare(config.data, tmp_path / 'cohort')
    with open_sets(str(tmp_path / 'cohort'), str(tmp_path / 'cohort'), settings(), tmp_path) as (one, _):
        ids = [*cohort.splits['train'], *cohort.splits['val'], *cohort.splits['test']]
        assert list(one.ids) == ids
        assert all(name in cohort.splits[split] for name, split in zip(one.ids, one.splits, strict=True))
        assert one.among('val', 'test').tolist() == [
            i for i, name in enumerate(ids) if name not in cohort.splits['train']
        ]
        assert list(one.patients) == [cohort.scans[name]['patient'] for name in ids]
        assert one.spacing == (8, 8, 8)
        assert 'phantoms: drawings, not patients' in one.facts
        np.testing.assert_allclose(one.volumes[0], cohort.split('train').volume(0)[..., 0], atol=1e-6)
        assert one.volumes.min() == -1
        assert one.volumes.max() == 1


@pytest.mark.parametrize('codes', [('LPS',), ('RAS',), ('PIR',), ('LPS', 'RAS')])
def test_perfect_copies_of_a_cohort_of_any_axes_are_equal_to_it(tmp_path, codes):
    rows, expected = ['id,image,mask,label'], {}
    for number in range(4):
        label = CLASSES[number % 2]
        *arrays, affine = make_phantom(label, number, 8.0)
        turn = nibabel.orientations.ornt_transform(
            nibabel.orientations.axcodes2ornt('LPS'), nibabel.orientations.axcodes2ornt(codes[number // 2 % len(codes)])
        )
        for kind, voxels in zip(('image', 'mask'), arrays, strict=True):
            turned = nibabel.Nifti1Image(voxels, affine).as_reoriented(turn)
            nibabel.save(turned, tmp_path / f'{number}_{kind}.nii')
        rows.append(f'{number},{number}_image.nii,{number}_mask.nii,{label}')
        raw, _, _ = crop_roi(to_volume(arrays[0]), to_volume(arrays[1] > 0), (16, 16, 16))
        expected[str(number)] = scale(raw, (0, raw.max()))
    (tmp_path / 'all.csv').write_text('\n'.join(rows))
    config = runpy.run_path(str(CONFIGS / 'prepare.py'))['get_config']('smoke')
    config.data.path, config.data.roi_size, config.data.workers = str(tmp_path / 'all.csv'), (16, 16, 16), 1
    config.data.split.val = config.data.split.test = 0.0
    cohort = prepare.prepare(config.data, tmp_path / 'cohort')
    source = cohort.split('train')
    for i, name in enumerate(source.ids):
        voxels = to_nifti(source.volume(i)[..., 0] + 1) / 2
        image = samples.make_nifti(voxels, samples.centred_affine((16, 16, 16), cohort.spacing()), 'a copy')
        label = cohort.classes[source.labels[i]]
        write_atomically(tmp_path / 'made' / label / f'{name}.nii.gz', samples.pack(image))
    with open_sets(str(tmp_path / 'cohort'), str(tmp_path / 'made'), settings(), tmp_path) as (one, other):
        assert sorted(one.names) == sorted(other.names) == sorted(expected)
        for i, name in enumerate(one.names):
            np.testing.assert_allclose(one.volumes[i], expected[name], atol=1e-6)
            np.testing.assert_allclose(other.volumes[other.names.index(name)], expected[name], atol=1e-6)


def test_a_set_carries_whom_its_generator_has_learnt_from(tmp_path):
    real, fake = (write(tmp_path / name, 'a', [image(0), image(1)]) for name in ('real', 'fake'))
    with open_sets(str(real), str(fake), settings(), tmp_path) as (one, other):
        assert one.learnt_from is other.learnt_from is None
        assert one.sha256 == other.sha256
    write_learnt_from(fake, LearntFrom(frozenset({'P1', 'P2'}), frozenset({'P3'})))
    with open_sets(str(real), str(fake), settings(), tmp_path) as (one, other):
        assert one.learnt_from is None
        assert other.learnt_from == {'P1', 'P2'}
        assert 'generator learnt from 2 patients, listed in its learnt_from.json' in other.facts
        assert one.sha256 != other.sha256  # what it was compared with before is to be compared anew


def test_volumes_are_cropped_and_padded_evenly():
    volume = np.arange(10.0)[:, None, None] * np.ones((1, 3, 2))
    found = roi_sets._on_grid(volume, (1, 1, 1), (4, 3, 5), (1, 1, 1), background=3)
    np.testing.assert_array_equal(found[:, 0, 1], [3, 4, 5, 6])
    np.testing.assert_array_equal(found[0, 0], [3, 3, 3, 3, 3])
    padded = roi_sets._on_grid(volume[2:4], (1, 1, 1), (5, 3, 2), (1, 1, 1), background=2)
    np.testing.assert_array_equal(padded[:, 0, 0], [2, 2, 3, 2, 2])
