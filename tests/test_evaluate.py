"""The evaluation: that constructed sets get the figures that they must have, what it leaves, and what it refuses."""

import dataclasses
import functools
import hashlib
import json
import pathlib
import re
import runpy
import shutil
import sys

import jax
import nibabel
import numpy as np
import pytest
from matplotlib.text import Text
from scipy import linalg, ndimage, spatial

from vqroi_jax import evaluate, features, figures_of_merit, main, report
from vqroi_jax.data import roi_sets
from vqroi_jax.data.roi_sets import RoiSet
from vqroi_jax.errors import InputError
from vqroi_jax.merit import networks, privacy, voxels
from vqroi_jax.merit.evaluation import Evaluation, halves

CONFIG = pathlib.Path(__file__).parents[1] / 'configs' / 'evaluate.py'
SIDE = 24


def balls(label, number, seed, side=SIDE):
    """ROIs float32 [number, side, side, side] in [0, 1]: LGG smaller and even, HGG larger with a dark core."""
    rng = np.random.default_rng([seed, len(label), ord(label[0])])
    grid = np.stack(np.meshgrid(*[np.arange(side)] * 3, indexing='ij'), axis=-1)
    volumes = []
    for _ in range(number):
        distance = np.linalg.norm((grid - rng.uniform(side / 2 - 1, side / 2, 3)) / rng.uniform(0.9, 1.1, 3), axis=-1)
        radius = rng.uniform(4, 7) if label == 'LGG' else rng.uniform(7, 10)
        texture = 0.7 + ndimage.gaussian_filter(rng.normal(size=distance.shape), 1)
        volume = np.where(distance < radius, np.clip(texture, 0.2, None), 0)
        if label == 'HGG':
            volume[distance < radius / 2] *= 0.3
        volumes.append(volume / volume.max())
    return np.stack(volumes).astype(np.float32)


def write(folder, number, seed, labels=('LGG', 'HGG'), peak=1.0, affine=None):
    """A folder of NIfTI files, by class."""
    for label in labels:
        (folder / label).mkdir(parents=True)
        for i, volume in enumerate(balls(label, number, seed)):
            image = nibabel.Nifti1Image(peak * volume, np.diag([-2.0, -2, 2, 1]) if affine is None else affine)
            nibabel.save(image, folder / label / f'{label}_{i}.nii.gz')
    return folder


def config(**changes):
    """The smoke variant's settings, with changes."""
    settings = runpy.run_path(str(CONFIG))['get_config']('smoke')
    settings.update_from_flattened_dict(changes)
    return settings


def as_set(volumes, splits=None):
    """A set from arrays: ROIs of LGG, as many of HGG."""
    half = len(volumes) // 2
    return RoiSet(
        path='somewhere',
        ids=tuple(f'ROI {i}' for i in range(len(volumes))),
        labels=np.repeat([0, 1], half),
        classes=('LGG', 'HGG'),
        volumes=2 * volumes - 1,
        spacing=(2.0, 2.0, 2.0),
        range=(0.0, 1.0),
        patients=tuple(f'P{i}' for i in range(len(volumes))),
        splits=splits,
        sha256='',
        facts=(),
    )


NUMBER = 12
REAL = np.concatenate([balls(label, 2 * NUMBER, seed=0) for label in ('LGG', 'HGG')])
OTHERS = np.concatenate([balls(label, NUMBER, seed=1) for label in ('LGG', 'HGG')])


def figures(fake, splits=None, metrics=('ms_ssim', 'mmd', 'coverage', 'statistics', 'privacy')):
    """What is found: the evaluation, and its figures by metric and class."""
    settings = config(metrics=metrics, pairs=40, bootstrap=20, neighbours=3)
    evaluation = Evaluation(as_set(REAL, splits), as_set(fake), settings)
    figures_of_merit.measure(evaluation)
    return evaluation, {(figure.metric, figure.label): figure for figure in evaluation.figures}


def assert_near_floor(found, *metrics):
    for label in ('LGG', 'HGG'):
        for metric in metrics:
            figure = found[metric, label]
            assert abs(figure.value - figure.floor) <= 2 * max(figure.spread, figure.floor_spread), metric
            assert figure.n == NUMBER


def test_new_draws_from_the_same_distribution_stand_near_the_floor():
    _, found = figures(OTHERS, metrics=('ms_ssim', 'mmd', 'statistics'))
    assert_near_floor(found, 'MS-SSIM, standard', 'MMD, RBF, squared', 'tumour volume [mL]')


@pytest.mark.long
def test_new_draws_are_near_and_no_copies_in_what_vgg16_sees():
    evaluation, found = figures(OTHERS, metrics=('coverage', 'privacy'))
    assert_near_floor(found, 'coverage')
    assert sum(pair['closer_than_any_held_out'] for pair in evaluation.neighbours) <= 3


def test_shifted_places_and_intensities_are_seen():
    evaluation, found = figures(np.roll(0.6 * OTHERS, 6, axis=1), metrics=('mmd', 'statistics'))
    for metric in ('MMD, RBF, squared', 'MMD, linear, all at once', 'MMD, linear, by mini-batches', 'mean intensity'):
        figure = found[metric, 'HGG']
        assert figure.value > figure.floor + max(figure.spread, figure.floor_spread), metric
    assert found['mean intensity', 'HGG'].value == 1
    assert found['tumour volume [mL]', 'HGG'].value < 0.5
    assert told_in_picture(evaluation, 'mean intensity') == ['KS distance of all these 1.00'] * 2
    expected = []
    for real, fake in zip(np.split(REAL, 2), np.split(OTHERS, 2), strict=True):
        voxels_of = [np.sum(part > 0, axis=(1, 2, 3)) for part in (real, fake)]
        below = [np.mean(part[:, None] <= np.concatenate(voxels_of), axis=0) for part in voxels_of]
        expected.append(f'KS distance of all these {np.abs(below[0] - below[1]).max():.2f}')
    assert told_in_picture(evaluation, 'tumour volume [mL]') == expected


def told_in_picture(evaluation, name):
    return [axes.get_legend().get_title().get_text() for axes in evaluation.pictures[name].axes]


def test_tumours_without_an_end_in_the_box_are_told():
    crossing = np.zeros_like(OTHERS[:NUMBER])
    crossing[:, 12, 12, :] = crossing[:, 12, :, 12] = crossing[:, :, 12, 12] = 1
    fake = np.concatenate([crossing, OTHERS[NUMBER:]])
    fake[NUMBER : NUMBER + NUMBER // 2] = 1  # half of HGG, which is not most
    fake[NUMBER - 1, :, :, 0] = fake[NUMBER - 2, 0] = 0  # two of LGG do not touch one face
    told = told_of_faces(fake)
    assert len(told) == 1
    assert told[0].startswith('In 10 of 12 synthetic ROIs of class LGG the tumour reaches all six faces')
    assert 'in 0 of 24 real ROIs' in told[0]
    fake[-1], fake[-1, 0] = 1, 0  # one of HGG more, which fills 23 of 24 slices
    assert len(told_of_faces(fake)) == 2


def told_of_faces(fake):
    evaluation = Evaluation(as_set(REAL), as_set(fake), config(metrics=()))
    figures_of_merit.measure(evaluation)
    return [note for note in evaluation.notes if 'six faces' in note]


def test_figures_are_computed_with_all_digits_of_float32(monkeypatch):
    used = []
    note = lambda evaluation: used.append(jax.config.jax_default_matmul_precision)  # noqa: E731
    monkeypatch.setitem(figures_of_merit.GROUPS, 'statistics', note)
    figures(OTHERS, metrics=('statistics',))
    assert used == ['highest']
    assert jax.config.jax_default_matmul_precision != 'highest'


def test_phantoms_are_not_called_real():
    real = dataclasses.replace(as_set(REAL[::6]), phantoms=True)
    evaluation = Evaluation(real, as_set(OTHERS[::6]), config(metrics=('statistics',), bootstrap=2))
    figures_of_merit.measure(evaluation)
    evaluate._draw(evaluation)
    for picture in evaluation.pictures.values():
        texts = [text.get_text() for text in picture.findobj(Text)]
        assert not any('real' in text for text in texts)
    assert any(text.get_text() == 'LGG, phantoms' for text in evaluation.pictures['real'].texts)
    found = evaluate.describe_inputs(evaluation, None) | evaluate.describe(evaluation)
    page = report.render(found, {}, evaluate._viewer(evaluation))
    for heading in ('<title>Synthetic ROIs beside phantoms</title>', '<h3>Phantoms</h3>', 'medians of all: phantoms'):
        assert heading in page
    assert 'synthetic / phantoms to phantoms' in evaluate.summary(found)


def test_one_roi_repeated_is_a_collapse():
    one = np.concatenate([np.repeat(OTHERS[:1], NUMBER, 0), np.repeat(OTHERS[-1:], NUMBER, 0)])
    noisy = np.clip(one + (one > 0) * np.random.default_rng(0).normal(0, 1e-3, one.shape), 0, 1).astype(np.float32)
    _, found = figures(noisy, metrics=('ms_ssim', 'coverage'))
    for label in ('LGG', 'HGG'):
        assert found['MS-SSIM, standard', label].value > 0.99 > found['MS-SSIM, standard', label].floor + 0.1
        assert found['MS-SSIM, release', label].value > found['MS-SSIM, release', label].floor
        assert found['recall', label].value < 0.3 < found['recall', label].floor


def test_copies_of_training_rois_are_listed(cheap_networks):
    splits = ('train', 'test') * (2 * NUMBER)
    copies = np.concatenate([REAL[: 2 * NUMBER : 2], REAL[2 * NUMBER :: 2]])
    evaluation, found = figures(copies, splits, metrics=('privacy',))
    assert found['nearest training ROI, MS-SSIM', ''].value > 0.999 > found['nearest training ROI, MS-SSIM', ''].floor
    assert found['nearest training ROI, VGG distance', ''].value < 0.05
    assert len(evaluation.neighbours) == 2 * NUMBER
    assert all(pair['closer_than_any_held_out'] for pair in evaluation.neighbours)
    assert {(pair['synthetic'], pair['real']) for pair in evaluation.neighbours} == {
        (f'ROI {i}', f'ROI {2 * i}') for i in range(2 * NUMBER)
    }
    _, fresh = figures(OTHERS, splits, metrics=('privacy',))
    figure = fresh['nearest training ROI, MS-SSIM', '']
    assert abs(figure.value - figure.floor) < 2 * max(figure.spread, figure.floor_spread)


def test_the_width_of_the_kernel_is_of_the_real_rois_that_are_compared():
    rng = np.random.default_rng(0)
    real, fake = rng.uniform(0, 1, (7, 4, 4, 4)), rng.uniform(0, 0.3, (5, 4, 4, 4))
    evaluation = Evaluation(of_one_class(real), of_one_class(fake), config(bootstrap=2))
    voxels.measure_mmd(evaluation)
    (sides,) = evaluation.sides
    one, other, made = (
        2 * volumes[rows].reshape(3, -1) - 1
        for volumes, rows in ((real, sides.one), (real, sides.other), (fake, sides.fake))
    )
    width = np.median(spatial.distance.pdist(np.concatenate([one, other])))
    figure = next(figure for figure in evaluation.figures if figure.metric == 'MMD, RBF, squared')
    assert f'bandwidth {width:.4g} (median distance of 6 real ROIs)' in figure.settings

    def kernel(x, y):
        return np.exp(-(spatial.distance.cdist(x, y) ** 2) / (2 * width**2))

    for found, y in ((figure.value, made), (figure.floor, other)):
        within = sum((kernel(part, part).sum() - 3) / 6 for part in (one, y))
        assert found == pytest.approx(within - 2 * kernel(one, y).mean(), abs=1e-5)


def of_one_class(volumes, **changes):
    """A set of ROIs of LGG."""
    part = dataclasses.replace(as_set(volumes), labels=np.zeros(len(volumes), int), classes=('LGG',))
    return dataclasses.replace(part, **changes)


def test_another_scan_of_the_same_patient_is_nobodys_neighbour(cheap_networks):
    again = np.clip(REAL[:8] + (REAL[:8] > 0) * 1e-3, 0, 1)  # all but the same
    limits = []
    for volumes, patients in ((REAL[:8], range(8)), (np.concatenate([REAL[:8], again]), [*range(8), *range(8)])):
        real = of_one_class(volumes, patients=tuple(f'P{i}' for i in patients))
        evaluation = Evaluation(real, of_one_class(REAL[:2]), config(**{'privacy.candidates': 100}))
        privacy.measure_privacy(evaluation)
        limits.append(evaluation.notes[-1])
        assert [pair['real'] for pair in evaluation.neighbours] == ['ROI 0', 'ROI 1']
    assert '2 of 2 synthetic ROIs are closer' in limits[1]
    of_each = [float(re.search(r'MS-SSIM above ([0-9.]+)', text)[1]) for text in limits]
    assert of_each[0] == pytest.approx(of_each[1], abs=2e-3)


@pytest.mark.parametrize(
    ('axes', 'said'), [((), ''), ((1,), 'left to right'), ((0, 2), 'top to bottom, front to back')]
)
def test_mirrored_copies_are_found(axes, said, cheap_networks):
    real = of_one_class(REAL[:16], splits=('train', 'test') * 8)
    copies = np.flip(REAL[:8:2], [axis + 1 for axis in axes])
    evaluation = Evaluation(real, of_one_class(copies), config())
    privacy.measure_privacy(evaluation)
    assert '4 of 4 synthetic ROIs are closer' in evaluation.notes[-1]
    # As likely as the first of four and eight to be the nearest.
    assert 'about 0.4 would be by either measure, by chance, so between 0.4 and 0.9 in all' in evaluation.notes[-1]
    assert {(pair['synthetic'], pair['real'], pair['mirrored']) for pair in evaluation.neighbours} == {
        (f'ROI {i}', f'ROI {2 * i}', said) for i in range(4)
    }
    for pair in evaluation.neighbours:
        assert pair['ms_ssim'] == pytest.approx(1)
        assert pair['vgg_distance'] < 0.05


def test_one_measure_is_enough_to_be_closer_than_any_held_out_roi(monkeypatch):
    """Sample 0 is nearer in VGG's features alone, 1 in MS-SSIM alone, 2 in neither, 3 in both."""
    alike = {'real': np.full(4, 0.5), 'fake': np.array([0.4, 0.6, 0.5, 0.6])}
    far = {'real': [2, 2, 3, 2], 'fake': [1, 3, 2, 1]}
    real = of_one_class(REAL[:4], splits=('train', 'test') * 2)
    evaluation = Evaluation(real, of_one_class(OTHERS[:4]), config())

    def similarities(pairs, volumes, *unused):
        return alike['real' if volumes is real.volumes else 'fake'][pairs[:, 0]]

    monkeypatch.setattr(privacy, 'similarities', similarities)
    apart = np.square([*far['real'], *far['fake']]).astype(np.float32)
    monkeypatch.setattr(privacy, '_features_apart', lambda evaluation: np.stack([apart, apart + 1], axis=1))
    privacy.measure_privacy(evaluation)
    closer = {pair['synthetic'] for pair in evaluation.neighbours if pair['closer_than_any_held_out']}
    assert closer == {'ROI 0', 'ROI 1', 'ROI 3'}
    assert '3 of 4 synthetic ROIs are closer' in evaluation.notes[-1]
    assert {pair['real_by_vgg'] for pair in evaluation.neighbours} == {'ROI 0'}
    written = [text.get_text() for text in evaluation.pictures['nearest'].texts]
    assert any(text.startswith('MS-SSIM 0.400, VGG distance 1') for text in written)


def test_features_of_every_mirroring_are_searched(cheap_networks, monkeypatch):
    """Against the features of the mirrored volumes themselves, eight times over."""
    monkeypatch.setattr(features, 'places', lambda volume, axis, slices, keep: np.array([3, 20]))  # alike mirrored
    evaluation = Evaluation(of_one_class(REAL[:5]), of_one_class(OTHERS[:3]), config())
    expected = np.full((8, 5), np.inf)
    for axes in ((), (1,), (2,), (3,), (1, 2), (1, 3), (2, 3), (1, 2, 3)):
        mirrored = Evaluation(of_one_class(np.flip(REAL[:5], axes)), of_one_class(OTHERS[:3]), config())
        apart = np.sum((evaluation.overall[:, None] - mirrored.overall[None, :5]) ** 2, axis=2)
        expected = np.minimum(expected, apart)
    np.testing.assert_allclose(privacy._features_apart(evaluation), expected, rtol=1e-4, atol=1e-5)


def test_one_roi_that_was_learnt_from_is_everybodys_neighbour(cheap_networks):
    real = of_one_class(REAL[:6], splits=('train', *['test'] * 5))
    evaluation = Evaluation(real, of_one_class(REAL[:3]), config())
    privacy.measure_privacy(evaluation)
    assert [pair['real'] for pair in evaluation.neighbours] == 3 * ['ROI 0']
    assert evaluation.neighbours[0]['ms_ssim'] == pytest.approx(1)


def test_rois_of_one_patient_alone_have_no_other_to_be_nearest_to(cheap_networks):
    evaluation = Evaluation(of_one_class(REAL[:4], patients=('P',) * 4), of_one_class(OTHERS[:2]), config())
    privacy.measure_privacy(evaluation)
    assert not evaluation.figures
    assert 'are of one patient' in evaluation.notes[-1]


@pytest.mark.parametrize(
    ('splits', 'record', 'learnt', 'said'),
    [
        (
            ('train', 'test'),
            None,
            'train',
            'is not known: somewhere has no learnt_from.json that says so. What is held',
        ),
        (('train', 'test'), ('train',), 'train', None),
        (
            ('test', 'train'),
            ('test',),
            'test',
            f'of {2 * NUMBER} ROIs that are not in the training split, and not from ',
        ),
        (('val', 'test'), ('val',), 'val', f'of {2 * NUMBER} ROIs that are not in the training split, and not from'),
        (None, ('train',), None, 'somewhere does not say of which patients its ROIs are, so none is known to be held'),
        (None, None, None, 'that says so. No real ROI is known to be held out.'),
        (
            ('train', 'test'),
            ('train', 'test'),
            None,
            f'of {2 * NUMBER} ROIs that are not in the training split, and no',
        ),
        (
            ('train', 'test'),
            (),
            None,
            f'of 0 ROIs that are not in the training split, and not from those of {2 * NUMBER}',
        ),
    ],
)
def test_nobody_that_the_generator_has_learnt_from_is_held_out(splits, record, learnt, said):
    """`record`: in which splits the patients are that it names; `learnt`: where those are that count as learnt from."""
    of_row = splits and np.array(splits * (2 * NUMBER))
    named = None if record is None else frozenset(f'P{row}' for row in np.flatnonzero(np.isin(of_row, record)))
    fake = dataclasses.replace(as_set(OTHERS), learnt_from=named)
    evaluation = Evaluation(as_set(REAL, splits and tuple(of_row)), fake, config())
    everyone = np.arange(4 * NUMBER)
    np.testing.assert_array_equal(evaluation.training, np.flatnonzero(of_row == learnt) if learnt else everyone)
    np.testing.assert_array_equal(evaluation.held_out, np.flatnonzero(of_row != learnt) if learnt else everyone)
    assert evaluation.has_held_out == (learnt is not None)
    notes = privacy.provenance(evaluation)
    assert len(notes) == (said is not None)
    assert said is None or said in notes[0]


@pytest.fixture(scope='module')
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp('sets')
    return write(root / 'real', 6, seed=0), write(root / 'fake', 3, seed=1)


@pytest.fixture(scope='module')
def done(folders, tmp_path_factory):
    """The folder of an evaluation, with everything in it."""
    workdir = tmp_path_factory.mktemp('evaluation')
    evaluate.run(config(real=str(folders[0]), fake=str(folders[1])), workdir)
    return workdir


def test_leaves_metrics_with_floors_settings_and_identities(done):
    found = json.loads((done / 'metrics.json').read_text())
    assert found['real']['rois'] == {'LGG': 6, 'HGG': 6}
    assert found['fake']['spacing_mm'] == [2, 2, 2]
    assert re.fullmatch('[0-9a-f]{64}', found['real']['sha256'])
    metrics = {figure['metric'] for figure in found['figures']}
    for start in ('MS-SSIM', 'MMD', 'FD-VGG, axial', 'FD-VGG, coronal', 'FD-VGG, sagittal', 'FD-3D', 'KID', 'density'):
        assert any(metric.startswith(start) for metric in metrics), start
    assert 'class agreement' in metrics
    assert metrics <= {*evaluate.known_metrics()}
    for figure in found['figures']:
        assert figure['settings']
        assert all(figure[name] is not None for name in ('value', 'floor', 'spread', 'floor_spread')), figure['metric']
    by_class = [f for f in found['figures'] if f['label'] and f['metric'] != 'class agreement']
    assert {(figure['n'], figure['floor_n']) for figure in by_class} == {(3, 3)}
    agreement = {f['label']: (f['n'], f['floor_n']) for f in found['figures'] if f['metric'] == 'class agreement'}
    assert agreement == {'': (6, 6), 'LGG': (3, 3), 'HGG': (3, 3)}
    assert {(f['n'], f['floor_n']) for f in found['figures'] if f['metric'].startswith('nearest')} == {(6, 12)}
    assert found['config']['pairs'] == 10
    assert not list(done.glob('.volumes*'))


def test_the_report_is_one_page_that_holds_everything(done):
    page = (done / 'report.html').read_text()
    found = json.loads((done / 'metrics.json').read_text())
    assert page.count('<img src="data:image/png;base64,') == 7
    assert 'niivue' in page
    assert not re.search(r'(src|href)="(?!data:)', page)
    for figure in found['figures']:
        assert figure['metric'] in page
    for pair in found['neighbours']:
        assert pair['synthetic'] in page


def test_the_same_command_again_measures_nothing_and_other_rois_anew(done, folders, tmp_path, monkeypatch):
    fake = tmp_path / 'fake'
    shutil.copytree(folders[1], fake)
    settings = config(real=str(folders[0]), fake=str(fake), metrics=('statistics',))
    evaluate.run(settings, tmp_path / 'out')
    first = (tmp_path / 'out' / 'metrics.json').read_text()
    monkeypatch.setattr(evaluate, 'measure', lambda evaluation: pytest.fail('measured again'))
    evaluate.run(settings, tmp_path / 'out')
    monkeypatch.undo()
    (fake / 'HGG' / 'HGG_2.nii.gz').unlink()
    evaluate.run(settings, tmp_path / 'out')
    second = json.loads((tmp_path / 'out' / 'metrics.json').read_text())
    assert second['fake']['rois'] == {'LGG': 3, 'HGG': 2}
    assert second['fake']['sha256'] != json.loads(first)['fake']['sha256']


def test_a_report_that_is_gone_or_another_format_is_measured_anew(folders, tmp_path):
    settings, out = config(real=str(folders[0]), fake=str(folders[1]), metrics=('statistics',)), tmp_path / 'out'
    evaluate.run(settings, out)
    first = (out / 'metrics.json').read_text()
    (out / 'report.html').unlink()
    evaluate.run(settings, out)
    assert (out / 'report.html').exists()
    # As an earlier version left it: without a field that there was not yet.
    older = json.loads(first)
    older.pop('published')
    (out / 'metrics.json').write_text(json.dumps(older | {'format': evaluate.FORMAT - 1}))
    evaluate.run(settings, out)
    assert (out / 'metrics.json').read_text() == first


def test_an_evaluation_that_died_before_its_end_is_measured_anew(folders, tmp_path, monkeypatch):
    settings = config(real=str(folders[0]), fake=str(folders[1]), metrics=('statistics',))
    write, files = evaluate.write_atomically, []

    def dying(path, text):
        files.append(path.name)
        if len(files) == 2:
            raise KeyboardInterrupt
        write(path, text)

    monkeypatch.setattr(evaluate, 'write_atomically', dying)
    with pytest.raises(KeyboardInterrupt):
        evaluate.run(settings, tmp_path / 'out')
    monkeypatch.undo()
    evaluate.run(settings, tmp_path / 'out')
    assert files == ['report.html', 'metrics.json']
    assert (tmp_path / 'out' / 'metrics.json').exists()


def test_draws_without_pairs_are_left_out_of_the_spread():
    evaluation = Evaluation(as_set(REAL), as_set(OTHERS), config(bootstrap=300))
    values, one, two = np.array([0.2, 0.5, 0.7]), np.array([0, 0, 1]), np.array([1, 2, 2])
    mean = functools.partial(voxels.mean_over_pairs, values, one, two)
    value, spread = evaluation.bootstrap('test', mean, np.arange(3))
    assert value == pytest.approx(np.mean(values))
    # All means lie between the values: a draw of one row over and over, which has none, would count as 0.
    assert 0 < spread < 1.96 * (0.7 - 0.2) / 2
    assert np.isnan(mean(np.zeros(3, int)))
    assert np.isnan(evaluation.bootstrap('test', lambda rows: np.nan, np.arange(3))[1])
    of_one_pair = functools.partial(voxels.mean_over_pairs, values[:1], one[:1], two[:1])
    value, spread = evaluation.bootstrap('test', of_one_pair, np.arange(2))
    assert (value, np.isnan(spread)) == (0.2, True)  # not 0, for nothing is known of another pair


def test_no_patient_is_in_both_halves():
    rows, one_each = np.array([5, 2, 7, 0, 3]), [f'P{row}' for row in range(8)]
    assert [half.tolist() for half in halves(rows, one_each)] == [[5, 2], [7, 0, 3]]
    # P0 has rows 5, 0 and 3.
    several = ['P0', 'P1', 'P2', 'P0', 'P4', 'P0', 'P6', 'P7']
    assert [half.tolist() for half in halves(rows, several)] == [[5, 0, 3], [2, 7]]
    assert [half.tolist() for half in halves(rows, ['P0'] * 8)] == [[], rows.tolist()]


def test_time_points_of_a_patient_stay_in_one_half_and_away_from_the_classifier():
    times = dataclasses.replace(as_set(REAL), patients=tuple(f'P{i // 3}' for i in range(len(REAL))))
    evaluation = Evaluation(times, as_set(OTHERS), config(metrics=()))
    figures_of_merit.measure(evaluation)
    for sides in evaluation.sides:
        one, other = ({times.patients[row] for row in rows} for rows in (sides.one, sides.other))
        assert not one & other
        assert sides.n == NUMBER
        assert not {times.patients[row] for row in evaluation.apart} & other
    assert len(evaluation.apart) == len(REAL) - 2 * NUMBER
    alone = dataclasses.replace(as_set(REAL), patients=tuple('AB'[i // 24] for i in range(len(REAL))))
    with pytest.raises(InputError, match='has too few patients of class LGG: its ROIs are split in two halves'):
        figures_of_merit.measure(Evaluation(alone, as_set(OTHERS), config(metrics=('mmd',))))


def test_the_floor_of_the_classifiers_features_is_of_rois_that_it_has_not_learnt_from(monkeypatch):
    asked = []

    def tell(evaluation, rows):
        asked.append(rows)
        sets = evaluation.real, evaluation.fake
        return tuple((np.zeros((len(part.labels), 2)), np.random.default_rng(0).normal(size=(48, 3))) for part in sets)

    monkeypatch.setattr(Evaluation, 'told_by', tell)
    splits = tuple('test' if row % 6 == 0 else 'train' for row in range(len(REAL)))
    real, fake = as_set(REAL, splits), dataclasses.replace(as_set(OTHERS), volumes=as_set(REAL).volumes)
    fake = dataclasses.replace(fake, labels=real.labels, ids=real.ids, patients=real.patients)
    evaluation = Evaluation(real, fake, config(metrics=('frechet', 'agreement'), bootstrap=2))
    monkeypatch.setattr(networks, '_measure_planes', lambda *unused: None)
    monkeypatch.setattr(Evaluation, 'seen_by_vgg16', None)
    figures_of_merit.measure(evaluation)
    of_distance, of_agreement = asked
    assert not set(of_distance) & {row for sides in evaluation.sides for row in sides.other}
    np.testing.assert_array_equal(of_agreement, evaluation.training)


def test_what_is_hidden_or_was_left_is_not_read_and_one_set_is_read_once(tmp_path, monkeypatch):
    real = write(tmp_path / 'real', 4, 0)
    for hidden in ('LGG/._LGG_0.nii.gz', '.cache/LGG_9.nii'):
        (real / hidden).parent.mkdir(exist_ok=True)
        (real / hidden).write_bytes(b'no image')
    (tmp_path / '.volumes-killed').mkdir()
    (tmp_path / '.volumes-killed' / 'real.npy').touch()
    read, names = roi_sets._Raw.read, []
    monkeypatch.setattr(roi_sets._Raw, 'read', lambda name, *others: (names.append(name), read(name, *others))[1])
    with roi_sets.open_sets(str(real), str(real), config(), tmp_path) as (one, other):
        assert one is other
        assert one.counts() == {'HGG': 4, 'LGG': 4}
        assert len(list(tmp_path.glob('.volumes-*'))) == 1
    assert names == ['real']
    assert not list(tmp_path.glob('.volumes-*'))


def test_figures_do_not_depend_on_the_order_of_metrics(folders, tmp_path):
    both = []
    for metrics in (('mmd', 'statistics'), ('statistics',)):
        workdir = tmp_path / '-'.join(metrics)
        evaluate.run(config(real=str(folders[0]), fake=str(folders[1]), metrics=metrics), workdir)
        found = json.loads((workdir / 'metrics.json').read_text())['figures']
        both.append([figure for figure in found if not figure['metric'].startswith('MMD')])
    assert both[0] == both[1]


def corners(weights, slices):
    """A cheap network: the means of a slice's quarters."""
    n, rows, columns = slices.shape
    return slices.reshape(n, 2, rows // 2, 2, columns // 2).mean(axis=(2, 4)).reshape(n, 4) * weights


@pytest.fixture
def cheap_networks(monkeypatch):
    """In place of VGG16 and of Inception-v3, whose weights a file has that is not looked into."""
    monkeypatch.setattr(features, 'vgg16', lambda: features.Network(corners, 1.0))
    monkeypatch.setattr(features, 'inception_v3', lambda path: features.Network(corners, 10.0))
    monkeypatch.setattr(evaluate.inception, 'load_weights', lambda path: {})


def test_fid_is_of_inception_alone_and_of_the_planes_it_names(cheap_networks):
    real, fake = (
        dataclasses.replace(as_set(part), labels=np.zeros(len(part), int), classes=('LGG',)) for part in (REAL, OTHERS)
    )
    settings = config(metrics=('frechet',), inception='w.pth')
    evaluation = Evaluation(real, fake, settings)
    figures_of_merit.measure(evaluation)
    found = {figure.metric: figure for figure in evaluation.figures}
    (sides,) = evaluation.sides
    for number, (plane, axis) in enumerate((('axial', 1), ('coronal', 3), ('sagittal', 2))):
        seen = []
        for part, rows in ((real, sides.one), (fake, sides.fake), (real, sides.other)):
            taken = []
            for volume in part.volumes[rows]:
                extent = np.flatnonzero(np.max(volume, axis=tuple(a for a in range(3) if a != axis - 1)) > -1)
                quarter = (extent[-1] - extent[0] + 1) // 4
                places = extent[0] + quarter, extent[-1] - quarter
                taken += [np.take(volume, place, axis - 1) for place in places]
            quarters = [[s[:12, :12].mean(), s[:12, 12:].mean(), s[12:, :12].mean(), s[12:, 12:].mean()] for s in taken]
            seen.append(np.array(quarters))
        expected = [by_matrix_root(seen[0], seen[1]), by_matrix_root(seen[0], seen[2])]
        for name, scale in ((f'FD-VGG, {plane}', 1), (f'FID-{"ACS"[number]}', 100)):
            figure = found.pop(name)
            np.testing.assert_allclose([figure.value, figure.floor], np.multiply(expected, scale), rtol=1e-3)
            assert ('Inception' in figure.settings) == name.startswith('FID')
            assert ('VGG16' in figure.settings) == name.startswith('FD-VGG')
    assert {*found} == {
        f'KID-{network}, {p}' for network in ('VGG', 'Inception') for p in ('axial', 'coronal', 'sagittal')
    }


def pairwise_kid(x, y):
    """KID of slices [n, slices, features], pair by pair of slices of two volumes."""

    def k(a, b):
        return (a @ b.T / a.shape[-1] + 1) ** 3

    within = [np.mean([k(a, b) for i, a in enumerate(part) for j, b in enumerate(part) if i != j]) for part in (x, y)]
    return sum(within) - 2 * np.mean([k(a, b) for a in x for b in y])


def test_kid_is_of_pairs_of_rois_and_its_interval_of_rois_drawn_anew():
    rng = np.random.default_rng(0)
    real, fake = rng.normal(size=(20, 1, 4)), rng.normal(0.5, 1, (10, 1, 4))
    real, fake = (part + 0.1 * rng.normal(size=(len(part), 6, 4)) for part in (real, fake))
    evaluation = Evaluation(of_one_class(REAL[:20]), of_one_class(OTHERS[:10]), config(bootstrap=300))
    networks._measure_planes(evaluation, {'axial': ('FD', 'KID')}, 'a network', {'axial': (real, fake)})
    ((sides,), (figure,)) = evaluation.sides, [figure for figure in evaluation.figures if figure.metric == 'KID']
    expected = [pairwise_kid(real[sides.one], second) for second in (fake[sides.fake], real[sides.other])]
    np.testing.assert_allclose([figure.value, figure.floor], expected, rtol=1e-3, atol=1e-4)
    # Slices of an ROI come together: six of them say hardly more than one.
    first = Evaluation(evaluation.real, evaluation.fake, evaluation.config)
    networks._measure_planes(first, {'axial': ('FD', 'KID')}, '', {'axial': (real[:, :1], fake[:, :1])})
    assert figure.spread == pytest.approx(first.figures[-1].spread, rel=0.2)


def test_intervals_of_shares_are_wilsons_and_never_without_width():
    # By hand: of 3 of 4 the interval is from 0.3006 to 0.9544; of 5 of 5 from 0.5655 to 1.
    for hits, spread in (([1, 1, 0, 1], 0.75 - 0.3006), ([1] * 5, 1 - 0.5655), ([0] * 5, 1 - 0.5655)):
        assert networks._spread_of_share(np.array(hits)) == pytest.approx(spread, abs=1e-4)
    evaluation = Evaluation(of_one_class(REAL[:8]), of_one_class(REAL[:4]), config(metrics=('coverage',)))
    evaluation.overall = np.random.default_rng(0).normal(size=(12, 6)).astype(np.float32)
    networks.measure_coverage(evaluation)
    shares = [figure for figure in evaluation.figures if figure.metric != 'density']
    assert {figure.metric for figure in shares} == {'precision', 'recall', 'coverage'}
    for figure in shares:
        assert figure.spread > 0.3
        assert figure.floor_spread > 0.3


def test_agreement_counts_classes_alike_and_its_floor_is_of_held_out_rois():
    """The classifier is right on six of ten of one class and nine of ten of the other, on all that it has learnt."""
    labels, held_out = np.repeat([0, 1], (20, 40)), np.arange(60) % 2 == 1
    real = dataclasses.replace(
        as_set(np.zeros((60, 2, 2, 2))), labels=labels, splits=tuple(np.where(held_out, 'test', 'train'))
    )
    fake = dataclasses.replace(as_set(np.zeros((40, 2, 2, 2))), labels=np.repeat([0, 1], 20))

    def logits(labels, of):
        told = np.eye(2)[labels]
        for label, wrong in ((0, 4), (1, 1)):
            rows = np.flatnonzero(of & (labels == label))
            told[[row for place, row in enumerate(rows) if place % 10 < wrong]] = np.eye(2)[1 - label]
        return told, None

    evaluation = Evaluation(real, fake, config())
    evaluation.told = logits(labels, held_out), logits(fake.labels, np.full(40, True))
    networks.measure_agreement(evaluation)
    found = {figure.label: figure for figure in evaluation.figures}
    for label, share, counts in (('LGG', 0.6, (20, 10)), ('HGG', 0.9, (20, 20)), ('', 0.75, (40, 30))):
        figure = found[label]
        np.testing.assert_allclose([figure.value, figure.floor], share, rtol=1e-6, err_msg=label)
        assert (figure.n, figure.floor_n) == counts
    both = [found[label].spread for label in ('LGG', 'HGG')]
    assert found[''].spread == pytest.approx(np.sqrt(np.sum(np.square(both))) / 2)


def test_a_boxs_surface_to_volume_is_per_millimetre():
    box = np.zeros((1, 8, 8, 8), np.float32)
    box[0, 2:6, 2:6, 2:6] = 0.5  # 8 mm a side
    measured = voxels._measurements(of_one_class(box))
    np.testing.assert_allclose([measured[name][0] for name in voxels.QUANTITIES], [0.512, 6 / 8, 0], atol=1e-6)


def by_matrix_root(x, y):
    covariances = [np.cov(a, rowvar=False) for a in (x, y)]
    root = linalg.sqrtm(covariances[0] @ covariances[1]).real
    return np.sum((x.mean(0) - y.mean(0)) ** 2) + np.trace(sum(covariances) - 2 * root)


def test_other_weights_of_inception_are_measured_anew_and_told(cheap_networks, tmp_path, monkeypatch):
    real, fake = (write(tmp_path / name, 4, seed, ('LGG',)) for seed, name in enumerate(('real', 'fake')))
    weights, out = tmp_path / 'w.pth', tmp_path / 'out'
    settings = config(real=str(real), fake=str(fake), metrics=('frechet',), inception=str(weights))
    identities = []
    for content in (b'some', b'some', b'others'):
        weights.write_bytes(content)
        evaluate.run(settings, out)
        identities.append(
            (json.loads((out / 'metrics.json').read_text())['inception'], (out / 'metrics.json').stat().st_mtime_ns)
        )
    assert identities[0] == identities[1]
    assert identities[2][0] == {'path': str(weights), 'sha256': hashlib.sha256(b'others').hexdigest()}
    assert identities[2][1] > identities[0][1]
    page = (out / 'report.html').read_text()
    assert 'Fréchet Inception distance' in page
    assert 'w.pth is not the file that FID is computed with elsewhere' in page
    monkeypatch.setattr(evaluate.inception, 'SHA256', hashlib.sha256(b'the known').hexdigest())
    weights.write_bytes(b'the known')
    evaluate.run(settings, out)
    assert 'is not the file' not in (out / 'report.html').read_text()


def test_a_published_table_stands_beside_ours(folders, tmp_path, capsys):
    table, (real, fake) = tmp_path / 'table.json', folders
    volumes = [{'metric': 'tumour volume [mL]', 'class': 'HGG', 'value': 0.123, 'spread': 0.045}]
    more = ('--config.metrics=("statistics",)', f'--config.published={table}')
    for figures in (volumes, [*volumes, {'metric': 'FID-A', 'value': 98.7}]):
        table.write_text(json.dumps({'source': 'Doe & Roe', 'figures': figures}))
        assert command(tmp_path, real, fake, *more) == 0
        found = json.loads((tmp_path / 'out' / 'metrics.json').read_text())['published']
        assert found['source'] == 'Doe & Roe'
        assert [figure['value'] for figure in found['figures']] == [figure['value'] for figure in figures]
        assert found['figures'][0]['label'] == 'HGG'
    page = (tmp_path / 'out' / 'report.html').read_text()
    rows = re.findall(r'<tr>.*?</tr>', page, re.DOTALL)
    (volume,) = (row for row in rows if '<b>tumour volume' in row)
    assert 'data-label="Doe &amp; Roe">HGG 0.123 ± 0.045</td>' in volume
    (other,) = (row for row in rows if '<b>FID-A' in row)
    assert 'not measured here' in other
    assert '>all 98.7</td>' in other
    table.write_text(json.dumps({'source': 'Doe', 'figures': [volumes[0] | {'class': 'DIPG'}]}))
    assert command(tmp_path, real, fake, *more) == 2
    assert "class 'DIPG' is none of LGG, HGG" in capsys.readouterr().err


def test_without_pytorch_inception_is_refused_before_anything_is_read(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, 'torch', None)
    weights = tmp_path / 'w.pth'
    weights.touch()
    assert command(tmp_path, 'nowhere', 'nowhere', f'--config.inception={weights}') == 2
    assert 'pip install "vqroi_jax[convert]"' in capsys.readouterr().err


def command(tmp_path, real, fake, *more):
    arguments = [f'--config={CONFIG}:smoke', f'--workdir={tmp_path / "out"}', f'--config.real={real}']
    return main.main(['main', *arguments, f'--config.fake={fake}', *more])


@pytest.mark.parametrize(
    ('make', 'more', 'message'),
    [
        (lambda f, t: (f[0], ''), (), 'config.fake is empty'),
        (lambda f, t: (f[0], t / 'nowhere'), (), 'there is no such folder'),
        (lambda f, t: (f[0], (t / 'empty').mkdir() or t / 'empty'), (), 'no NIfTI file'),
        (lambda f, t: (f[0], write(t / 'x', 1, 2)), (), 'has 1 ROI of class LGG; at least 2 are needed'),
        (lambda f, t: (write(t / 'x', 3, 2), f[1]), (), 'has 3 ROIs of class LGG; at least 4 are needed, as they are'),
        (lambda f, t: (f[0], write(t / 'x', 3, 2, ('HGG',))), (), 'no ROI of class LGG, only of HGG; name the classes'),
        (lambda f, t: (f[0], write(t / 'x', 3, 2, peak=800)), (), '[0, 800]; expected both in [0, 1]'),
        (lambda f, t: (f[0], write(t / 'x', 3, 2, affine=np.eye(4))), (), 'of 1 x 1 x 1 mm: they do not compare'),
        (lambda f, t: f, ('--config.metrics=("fid",)',), "'fid' is none of ms_ssim"),
        (
            lambda f, t: f,
            ('--config.metrics=("mmd",)', '--config.inception=w.pth'),
            "w.pth: it is for 'frechet', which",
        ),
        (
            lambda f, t: (f[0], write(t / 'x', 7, 2)),
            ('--config.metrics=("mmd", "reconstruction")',),
            'HGG_6.nii.gz has no pair',
        ),
        (lambda f, t: f, ('--config.metrics=()',), 'config.metrics is empty: name some of ms_ssim, mmd'),
        (lambda f, t: f, ('--config.metrics=("mmd", "mmd")',), "config.metrics: 'mmd' is named twice"),
        (lambda f, t: f, ('--config.pairs=0',), 'config.pairs=0: expected at least 1'),
        (lambda f, t: f, ('--config.slices.empty=skip',), "'skip' is none of drop, keep"),
        (lambda f, t: f, ('--config.grid=near',), "config.grid='near' is none of same, resample"),
        (lambda f, t: f, ('--config.classes=("DIPG",)',), 'no ROI of class DIPG, only of LGG, HGG'),
    ],
)
def test_what_cannot_be_compared_is_told_in_one_line(make, more, message, folders, tmp_path, capsys):
    real, fake = make(folders, tmp_path)
    assert command(tmp_path, real, fake, *more) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count('\n') == 1


def test_rois_that_vgg16_cannot_see_are_refused(tmp_path):
    small = as_set(REAL[:, :15, :15, :15])
    for metrics in (('privacy',), ('frechet', 'mmd')):
        with pytest.raises(InputError, match='15 x 15 x 15 voxels are too small for VGG16'):
            figures_of_merit.measure(Evaluation(small, small, config(metrics=metrics)))


def damage(folder, content):
    """A copy of the last file of a class with other content, or other voxels."""
    path = folder / 'HGG' / 'HGG_2.nii.gz'
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        nibabel.save(nibabel.Nifti1Image(content, np.diag([-2.0, -2, 2, 1])), path)
    return folder


@pytest.mark.parametrize(
    ('content', 'message'),
    [
        (np.full((SIDE,) * 3, np.nan, np.float32), 'HGG_2.nii.gz: it has voxels that are not finite'),
        (np.ones((SIDE, SIDE, SIDE - 1), np.float32), 'HGG/HGG_2.nii.gz has 23 x 24 x 24 voxels'),
        (b'no NIfTI', 'HGG_2.nii.gz: not a NIfTI file'),
        (b'', 'HGG_2.nii.gz: empty file'),
    ],
)
def test_a_damaged_file_is_named(content, message, folders, tmp_path, capsys):
    fake = damage(write(tmp_path / 'fake', 3, seed=2), content)
    assert command(tmp_path, folders[0], fake) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / 'out' / 'metrics.json').exists()


def test_an_empty_real_roi_is_refused_and_an_empty_synthetic_one_counted(folders, tmp_path, capsys):
    empty = damage(write(tmp_path / 'with-empty', 4, seed=2), np.zeros((SIDE,) * 3, np.float32))
    assert command(tmp_path, empty, folders[1]) == 2
    assert 'HGG/HGG_2.nii.gz is empty' in capsys.readouterr().err
    assert command(tmp_path, folders[0], empty, '--config.metrics=("statistics",)') == 0
    assert '1 of the synthetic ROIs are empty' in capsys.readouterr().out


@pytest.mark.parametrize(
    ('rows', 'message'),
    [
        (['LGG/LGG_0.nii.gz,LGG', 'HGG/HGG_0.nii.gz,GBM'], 'real has no ROI of class GBM, only of LGG, HGG'),
        (['LGG/LGG_0.nii.gz,LGG'], 'fake has no ROI of class HGG, only of LGG'),
        (['LGG/LGG_0.nii.gz,LGG', 'HGG/none.nii.gz,HGG'], 'none.nii.gz: there is no such file'),
        (['LGG/LGG_0.nii.gz,LGG', 'HGG/HGG_0.nii.gz'], 'manifest.csv is damaged: row 3 has 1 of 2 columns'),
    ],
)
def test_a_manifest_that_does_not_fit_is_told_in_one_line(rows, message, folders, tmp_path, capsys):
    fake = tmp_path / 'fake'
    shutil.copytree(folders[1], fake)
    (fake / 'manifest.csv').write_text('\n'.join(['file,class', *rows, '']))
    assert command(tmp_path, folders[0], fake) == 2
    printed = capsys.readouterr().err
    assert message in printed
    assert printed.count('\n') == 1
