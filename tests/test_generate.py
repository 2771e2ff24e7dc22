"""Generation as a user meets it, with a fake model that draws ellipsoids: files, manifest, resuming, pasting, slips."""

import csv
import dataclasses
import errno
import json
import os
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
import weakref
from collections.abc import Iterator, Sequence
from pathlib import Path

import matplotlib.image
import nibabel
import numpy as np
import pytest
from ml_collections import ConfigDict

from vqroi_jax import generate, main
from vqroi_jax.data import samples
from vqroi_jax.data.learnt_from import LearntFrom
from vqroi_jax.data.roi import to_nifti, to_volume
from vqroi_jax.errors import InputError, Stopped
from vqroi_jax.workdir import read_config

CONFIG = Path(__file__).parents[1] / 'configs' / 'generate.py'
SIZE = (8, 10, 12)  # depth, height, width
BRAIN = (30, 34, 26)  # i, j, k
BRATS_AXES = ('L', 'P', 'S')


def ellipsoid(seed: int, label: int, index: int, size: Sequence[int] = SIZE) -> np.ndarray:
    """A sample: float32 [D, H, W] in [-1, 1], background near -1 as a decoder draws it."""
    rng = np.random.default_rng([seed, label, index])
    grid = np.meshgrid(*(np.linspace(-1, 1, side) for side in size), indexing='ij')
    distance = sum((x / radius) ** 2 for x, radius in zip(grid, rng.uniform(0.4, 0.9 - 0.2 * label, 3), strict=True))
    grain = rng.uniform(-0.1, 0.1, size)
    return np.where(distance < 1, 0.8 - 0.5 * label * distance + grain, -1 + 0.05 * np.abs(grain)).astype(np.float32)


@dataclasses.dataclass
class FakeSampler:
    """Draws ellipsoids, a batch in one array; `fail` is called with what was drawn so far before each."""

    seed: int
    rows: int
    size: Sequence[int]
    draw_one: object = ellipsoid
    fail: object = None
    drawn: list = dataclasses.field(default_factory=list)
    batches: list = dataclasses.field(default_factory=list)

    def draw(self, label: int, indices: Sequence[int]) -> Iterator[np.ndarray]:
        assert 1 <= len(indices) <= self.rows
        assert not any(batch() is not None for batch in self.batches)  # none of those before is still in memory
        batch = np.stack([self.draw_one(self.seed, label, index, self.size) for index in indices])
        self.batches.append(weakref.ref(batch))
        for index, volume in zip(indices, batch, strict=True):
            if self.fail:
                self.fail(self.drawn)
            self.drawn.append((label, index))
            yield volume


class FakeTransformer:
    """What `trained.load_transformer` returns, as far as generation uses it; its samplers are in `samplers`."""

    def __init__(self, **changes):
        self.classes, self.step, self.identity = ('LGG', 'HGG'), 500, 'abc123'
        self.roi_size, self.spacing, self.synthetic = SIZE, (2.0, 1.0, 1.5), True
        self.method, self.learnt_from = 'autoregressive', LearntFrom(frozenset({'P2', 'P1'}), frozenset({'P3'}))
        self.rows, self.settings, self.samplers = 3, {}, []
        vars(self).update(changes)

    def sampler(self, sampling: ConfigDict, seed: int, mesh) -> FakeSampler:
        self.samplers.append(FakeSampler(seed, self.rows, self.roi_size, **self.settings))
        return self.samplers[-1]

    @property
    def drawn(self) -> list[tuple[int, int]]:
        return self.samplers[-1].drawn


@pytest.fixture
def model(monkeypatch) -> FakeTransformer:
    """The model that is loaded, whatever folder is named; `loaded` notes what was asked for."""
    fake = FakeTransformer(loaded=[])

    def load(*arguments):
        fake.loaded.append(arguments)
        return fake

    monkeypatch.setattr(generate.trained, 'load_transformer', load)
    return fake


def settings(**changes) -> ConfigDict:
    config = runpy.run_path(str(CONFIG))['get_config']('smoke')
    config.transformer_workdir, config.number, config.seed = 'runs/transformer', 4, 7
    for name, value in changes.items():
        block, _, field = name.rpartition('__')
        setattr(config[block] if block else config, field, value)
    return config.lock()


def contents(folder: Path) -> dict[str, bytes]:
    """All files of a run but the lock and the figures."""
    left_out = '.lock', str(generate.FIGURE), str(generate.SURFACES)
    files = (path for path in folder.rglob('*') if path.is_file())
    found = {str(path.relative_to(folder)): path for path in files}
    return {name: path.read_bytes() for name, path in found.items() if name not in left_out}


def manifest(folder: Path) -> list[dict[str, str]]:
    with open(folder / 'manifest.csv', newline='', encoding='utf-8') as file:
        return list(csv.DictReader(file))


def names(label: str, number: int) -> list[str]:
    return [f'samples/{label}/{label}_{index:04d}.nii.gz' for index in range(number)]


# ---------------------------------------------------------------------------------------------- what is written


def test_leaves_a_file_a_sample_a_manifest_and_a_figure(model, tmp_path, capsys):
    generate.run(settings(), tmp_path)
    expected = names('LGG', 4) + names('HGG', 4)
    assert set(contents(tmp_path)) == {'config.json', 'learnt_from.json', 'manifest.csv', *expected}
    rows = manifest(tmp_path)
    assert [row['file'] for row in rows] == expected
    assert [(row['class'], row['index']) for row in rows] == [
        (label, str(index)) for label in ('LGG', 'HGG') for index in range(4)
    ]
    same = {name: value for name, value in rows[0].items() if name not in ('file', 'class', 'index')}
    assert same == {
        'pasted': '',
        'seed': '7',
        'checkpoint': '500',
        'identity': 'abc123',
        'synthetic': 'true',
        'trained_on': 'phantoms',
        'method': 'autoregressive',
        'temperature': '1.0',
        'top_k': '0',
        'top_p': '1.0',
        'guidance': '0.0',
        'passes': '4',
        'choice_temperature': '4.5',
        'sub_batch': '2',
        'intensity_maximum': '1.0',
        'intensity_background': '0.05',
    }
    assert all(row | same == row for row in rows)
    assert model.loaded == [('runs/transformer', 'latest', '')]
    assert model.drawn == [(label, index) for label in (0, 1) for index in range(4)]
    for figure in (generate.FIGURE, generate.SURFACES):
        assert matplotlib.image.imread(tmp_path / figure).ndim == 3
    (line,) = capsys.readouterr().out.splitlines()
    assert line.startswith('8 samples, 4 of each of LGG, HGG, by step 500 of runs/transformer (trained on SYNTHETIC')
    assert '8 of them made now' in line
    assert line.endswith(f'Look at {tmp_path / "figures/samples.png"}')


@pytest.mark.parametrize('maximum', [1.0, 700.0])
def test_the_voxels_are_those_of_the_model_along_the_right_axes(model, tmp_path, maximum):
    generate.run(settings(intensity__maximum=maximum), tmp_path)
    for label, name in enumerate(('LGG', 'HGG')):
        for index, file in enumerate(names(name, 4)):
            volume, image = ellipsoid(7, label, index), nibabel.load(tmp_path / file)
            assert image.shape == (10, 12, 8)
            assert image.get_data_dtype() == np.float32
            values = np.asarray(image.dataobj)
            for k in range(8):
                share = (volume[k].astype(np.float64) + 1) / 2
                expected = np.where(share < 0.05, 0, share * maximum)
                np.testing.assert_allclose(values[:, :, k], expected, rtol=1e-6, atol=1e-6 * maximum)
            assert (values == 0).any()  # the grain of the background is gone
            assert values.max() <= maximum


def test_a_background_share_of_0_keeps_every_voxel_above_the_lowest(model, tmp_path):
    generate.run(settings(intensity__background=0.0, classes=('HGG',), number=1), tmp_path)
    values = np.asarray(nibabel.load(tmp_path / names('HGG', 1)[0]).dataobj)
    np.testing.assert_allclose(values.transpose(2, 0, 1), (ellipsoid(7, 1, 0) + 1) / 2, atol=1e-6)


@pytest.mark.parametrize(('spacing', 'sides'), [((2.0, 1.0, 1.5), (1.0, 1.5, 2.0)), (None, (1.0, 1.0, 1.0))])
def test_the_header_says_millimetres_the_axes_of_brats_and_synthetic(model, tmp_path, spacing, sides):
    model.spacing = spacing
    generate.run(settings(number=1), tmp_path)
    image = nibabel.load(tmp_path / names('LGG', 1)[0])
    assert image.header.get_zooms() == pytest.approx(sides)
    assert image.header.get_xyzt_units()[0] == 'mm'
    assert b'SYNTHETIC' in image.header['descrip'].item()
    for affine, code in (image.get_sform(coded=True), image.get_qform(coded=True)):
        assert code == 1
        np.testing.assert_allclose(affine, image.affine, atol=1e-6)
    assert nibabel.aff2axcodes(image.affine) == BRATS_AXES
    middle = (np.array(image.shape) - 1) / 2
    np.testing.assert_allclose(nibabel.affines.apply_affine(image.affine, middle), 0, atol=1e-6)


def test_the_affine_can_be_that_of_a_reference(model, tmp_path, capsys):
    affine = np.array([[0, -1, 0, 10], [1.5, 0, 0, -20], [0, 0, 2, 30], [0, 0, 0, 1.0]])
    nibabel.save(nibabel.Nifti1Image(np.zeros((3, 4, 5), np.int16), affine), tmp_path / 'patient.nii.gz')
    generate.run(settings(reference=str(tmp_path / 'patient.nii.gz'), number=1), tmp_path / 'out')
    image = nibabel.load(tmp_path / 'out' / names('LGG', 1)[0])
    np.testing.assert_allclose(image.affine, affine, atol=1e-6)
    np.testing.assert_allclose(image.get_qform(), affine, atol=1e-5)
    generate.run(settings(number=1), tmp_path / 'plain')
    plain = np.asarray(nibabel.load(tmp_path / 'plain' / names('LGG', 1)[0]).dataobj)
    # The sample's axes to the left and to the back are the reference's second and, from behind, its first.
    np.testing.assert_array_equal(np.asarray(image.dataobj), plain[:, ::-1].transpose(1, 0, 2))
    shown = [(tmp_path / folder / generate.FIGURE).read_bytes() for folder in ('out', 'plain')]
    assert shown[0] == shown[1]
    assert 'warning' not in capsys.readouterr().out  # the voxels are of the size that the model was trained on
    model.spacing = (4.0, 4.0, 4.0)
    generate.run(settings(reference=str(tmp_path / 'patient.nii.gz'), number=1), tmp_path / 'other')
    warning = 'config.reference are 2 x 1 x 1.5 mm (depth, height, width), the model was trained on 4 x 4 x 4 mm'
    assert warning in capsys.readouterr().out


def test_chosen_classes_come_in_their_order(model, tmp_path):
    model.classes = ('meningioma', 'LGG', 'a/b')
    generate.run(settings(classes=('a/b', 'meningioma'), number=2), tmp_path)
    assert model.drawn == [(2, 0), (2, 1), (0, 0), (0, 1)]
    assert [row['file'] for row in manifest(tmp_path)] == names('a%2Fb', 2) + names('meningioma', 2)
    assert [row['class'] for row in manifest(tmp_path)] == ['a/b'] * 2 + ['meningioma'] * 2


def test_folders_of_classes_are_distinct_and_stay_inside():
    labels = ['LGG', 'grade II, IDH-mutant', 'a/b', 'a%2Fb', '..', '.', 'a\\b', 'é', 'a\nb', '...x']
    folders = [samples.class_folder(label) for label in labels]
    assert len(set(folders)) == len(labels)
    assert not any(set('/\\\n') & set(folder) or folder.startswith('.') for folder in folders)
    assert folders[:2] + folders[7:8] == ['LGG', 'grade II, IDH-mutant', 'é']


def test_numbers_of_five_digits_are_not_cut():
    assert generate.sample_file('LGG', 12, 10_000) == 'LGG/LGG_0012.nii.gz'
    assert generate.sample_file('LGG', 12, 10_001) == 'LGG/LGG_00012.nii.gz'


def test_no_more_than_one_batch_of_volumes_is_in_memory(model, tmp_path):
    generate.run(settings(number=10), tmp_path)
    assert len(model.samplers[-1].batches) == 8  # each has looked for those before it


def test_the_figure_shows_the_first_samples_with_their_volumes(model, tmp_path, monkeypatch):
    shown = {}
    sheet = generate.viz.contact_sheet

    def note(volumes, labels, titles, spacing):
        shown.update(volumes=volumes, labels=labels, titles=titles, spacing=spacing)
        return sheet(volumes, labels, titles, spacing)

    monkeypatch.setattr(generate.viz, 'contact_sheet', note)
    generate.run(settings(figure_samples=2, intensity__maximum=300.0), tmp_path)
    assert [label.split(':')[0] for label in shown['labels']] == ['LGG', 'LGG', 'HGG', 'HGG']
    assert shown['spacing'] == pytest.approx((2.0, 1.0, 1.5))
    for number, (label, index) in enumerate([(0, 0), (0, 1), (1, 0), (1, 1)]):
        volume = ellipsoid(7, label, index)
        tumour = (volume + 1) / 2 >= 0.05
        np.testing.assert_allclose(shown['volumes'][number], np.where(tumour, volume, -1), atol=1e-6)
        assert shown['titles'][number] == f'{("LGG", "HGG")[label]}_{index:04d}, {tumour.sum() * 3 / 1000:.1f} mL'


def test_samples_without_a_tumour_are_told(model, tmp_path, capsys):
    def sometimes_empty(seed, label, index, size):
        return np.full(size, -1, np.float32) if index == 1 else ellipsoid(seed, label, index, size)

    model.settings['draw_one'] = sometimes_empty
    generate.run(settings(), tmp_path)
    assert 'warning: 2 samples have no voxel above config.intensity.background' in capsys.readouterr().out
    assert len(manifest(tmp_path)) == 8


def test_samples_that_are_not_finite_are_refused(model, tmp_path):
    model.settings['draw_one'] = lambda seed, label, index, size: np.full(size, np.nan, np.float32)
    with pytest.raises(InputError, match=r'sample 0 of class LGG has voxels that are not in \[-1, 1\]'):
        generate.run(settings(), tmp_path)
    assert not list(tmp_path.rglob('*.nii.gz'))


def test_of_several_processes_only_the_primary_writes_and_all_compute(model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(generate, 'is_primary', lambda: False)
    monkeypatch.setattr(
        generate.partitioning, 'from_primary', lambda numbers: np.full_like(numbers, -1 if numbers.ndim < 2 else 1)
    )
    generate.run(settings(), tmp_path)
    assert len(model.drawn) == 8
    assert set(contents(tmp_path)) == {'config.json'}  # open_workdir's, which took this process for the primary
    assert capsys.readouterr().out == ''


def test_says_which_patients_the_model_has_learnt_from(model, tmp_path, capsys):
    generate.run(settings(number=1), tmp_path / 'known')
    assert json.loads((tmp_path / 'known' / 'learnt_from.json').read_text()) == {'train': ['P1', 'P2'], 'val': ['P3']}
    assert 'which patients' not in capsys.readouterr().out
    model.learnt_from = None
    generate.run(settings(number=1), tmp_path / 'unknown')
    assert json.loads((tmp_path / 'unknown' / 'learnt_from.json').read_text()) == {'train': None, 'val': None}
    assert 'warning: the runs of runs/transformer and its stage 1 do not say which patients' in capsys.readouterr().out


# ---------------------------------------------------------------------------------------------------- resuming


class Killed(BaseException):
    pass


def kill_after(number: int):
    """To be called before each sample: the end comes when `number` have been drawn."""

    def fail(drawn):
        if len(drawn) == number:
            raise Killed

    return fail


@pytest.fixture
def brain(tmp_path) -> Path:
    """A host: a bright box in a dark volume, of whole numbers."""
    voxels = np.zeros(BRAIN, np.int16)
    voxels[2:28, 2:32, 2:24] = np.random.default_rng(0).integers(1, 900, (26, 30, 22))
    path = tmp_path / 'brain.nii.gz'
    nibabel.save(nibabel.Nifti1Image(voxels, np.diag([-1.0, -1.5, 2.0, 1.0])), path)
    return path


def test_killed_and_resumed_it_ends_as_if_unbroken(model, tmp_path, brain, capsys):
    config = settings(number=5, paste__brain=str(brain), paste__centre=(14, 16, 12))
    generate.run(config, tmp_path / 'unbroken')
    expected = contents(tmp_path / 'unbroken')
    figure = (tmp_path / 'unbroken' / generate.FIGURE).read_bytes()
    for number in (0, 1, 3, 4, 7):  # of 10, in batches of 3, 2, 3 and 2
        out = tmp_path / f'killed{number}'
        model.settings['fail'] = kill_after(number)
        with pytest.raises(Killed):
            generate.run(config, out)
        assert len(list((out / 'samples').rglob('*.nii.gz'))) == number
        model.settings['fail'] = None
        generate.run(config, out)
        assert len(model.drawn) == 10 - number
        assert contents(out) == expected
        assert (out / generate.FIGURE).read_bytes() == figure
        assert f'{10 - number} of them made now' in capsys.readouterr().out


def terminate_after(number: int):
    """To be called before each sample: SIGTERM comes when `number` have been drawn."""

    def ask_to_stop(drawn):
        if len(drawn) == number:
            os.kill(os.getpid(), signal.SIGTERM)

    return ask_to_stop


def test_sigterm_ends_it_after_the_batch_with_everything_listed(model, tmp_path, capsys):
    generate.run(settings(number=5), tmp_path / 'unbroken')
    model.settings['fail'] = terminate_after(4)  # of 10, in batches of 3, 2, 3 and 2: in the second
    with pytest.raises(Stopped, match=r'stopped with 5 of 10 samples in .*; the same command again goes on'):
        generate.run(settings(number=5), tmp_path / 'out')
    assert len(manifest(tmp_path / 'out')) == 5
    model.settings['fail'] = None
    generate.run(settings(number=5), tmp_path / 'out')
    assert '5 of them made now' in capsys.readouterr().out
    assert contents(tmp_path / 'out') == contents(tmp_path / 'unbroken')


def test_more_samples_and_classes_are_added_later(model, tmp_path, capsys):
    generate.run(settings(number=5), tmp_path / 'at once')
    generate.run(settings(number=2, classes=('HGG',)), tmp_path / 'later')
    generate.run(settings(number=3), tmp_path / 'later')
    generate.run(settings(number=5), tmp_path / 'later')
    assert '4 of them made now' in capsys.readouterr().out
    assert len(manifest(tmp_path / 'later')) == 10
    made = [
        {path.relative_to(folder): path.read_bytes() for path in folder.rglob('*.nii.gz')}
        for folder in (tmp_path / 'at once', tmp_path / 'later')
    ]
    assert made[0] == made[1]
    with pytest.raises(InputError, match=r'names of another length \(samples/HGG/HGG_0000.nii.gz\)'):
        generate.run(settings(number=10_001), tmp_path / 'later')


def test_what_is_done_is_left_alone(model, tmp_path, capsys):
    generate.run(settings(), tmp_path)
    before = {path: path.stat() for path in tmp_path.rglob('*.nii.gz')} | {'': (tmp_path / 'manifest.csv').stat()}
    (tmp_path / generate.FIGURE).unlink()  # the last that is written, so it may be missing
    generate.run(settings(), tmp_path)
    assert model.drawn == []
    after = {path: path.stat() for path in tmp_path.rglob('*.nii.gz')} | {'': (tmp_path / 'manifest.csv').stat()}
    assert {path: (stat.st_ino, stat.st_mtime_ns) for path, stat in before.items()} == {
        path: (stat.st_ino, stat.st_mtime_ns) for path, stat in after.items()
    }
    assert (tmp_path / generate.FIGURE).exists()
    assert '0 of them made now. Look' in capsys.readouterr().out


@pytest.mark.parametrize('cut', [1, 20, None])
def test_a_torn_line_is_repaired_and_its_sample_made_again(model, tmp_path, cut):
    generate.run(settings(), tmp_path)
    expected = contents(tmp_path)
    whole = (tmp_path / 'manifest.csv').read_bytes()
    torn = whole[:-cut] if cut else whole[:15]  # in the last line, or already in the first
    (tmp_path / 'manifest.csv').write_bytes(torn)
    generate.run(settings(), tmp_path)
    assert model.drawn == ([(1, 3)] if cut else [(label, index) for label in (0, 1) for index in range(4)])
    assert contents(tmp_path) == expected


def test_what_an_interruption_left_unlisted_is_replaced(model, tmp_path):
    generate.run(settings(), tmp_path)
    expected = contents(tmp_path)
    lines = (tmp_path / 'manifest.csv').read_bytes().splitlines(keepends=True)
    (tmp_path / 'manifest.csv').write_bytes(b''.join(lines[:-1]))
    (tmp_path / names('HGG', 4)[3]).write_bytes(b'of another model')
    (tmp_path / f'{names("HGG", 4)[3]}.tmp').write_bytes(b'half')
    generate.run(settings(), tmp_path)
    assert model.drawn == [(1, 3)]
    assert contents(tmp_path) == expected


def test_a_listed_file_that_is_missing_is_made_again_and_no_other(model, tmp_path, brain):
    config = settings(paste__brain=str(brain), paste__centre=(14, 16, 12))
    generate.run(config, tmp_path / 'out')
    expected = contents(tmp_path / 'out')
    for missing in (names('LGG', 4)[2], f'pasted/HGG/{Path(names("HGG", 4)[1]).name}'):
        (tmp_path / 'out' / missing).unlink()
    kept = tmp_path / 'out' / names('HGG', 4)[1]
    mine = (tmp_path / 'out' / names('HGG', 4)[0]).read_bytes()
    kept.write_bytes(mine)
    generate.run(config, tmp_path / 'out')
    assert model.drawn == [(0, 2), (1, 1)]
    assert contents(tmp_path / 'out') == expected | {names('HGG', 4)[1]: mine}  # listed and there: never overwritten


@pytest.mark.parametrize('calls', [1, 4, 5, 6, 8])
def test_a_full_disk_leaves_what_is_written_whole_and_listed(model, tmp_path, brain, monkeypatch, capsys, calls):
    """Each sample takes three writes: itself, pasted, its row; so the disk fills at each of them."""
    config = settings(paste__brain=str(brain), paste__centre=(14, 16, 12))
    generate.run(config, tmp_path / 'unbroken')
    expected = contents(tmp_path / 'unbroken')
    out, done, fsync = tmp_path / 'full', [], os.fsync

    def fill(descriptor):
        path = os.readlink(f'/proc/self/fd/{descriptor}')
        if 'config.json' not in path and 'learnt_from.json' not in path:
            done.append(path)
            if len(done) == calls:
                os.truncate(path, os.stat(path).st_size - 3)  # what had room
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        fsync(descriptor)

    monkeypatch.setattr(generate.samples.os, 'fsync', fill)
    arguments = [f'--config={CONFIG}:smoke', f'--workdir={out}', '--config.transformer_workdir=runs/transformer']
    arguments += ['--config.number=4', '--config.seed=7', f'--config.paste.brain={brain}']
    arguments += ['--config.paste.centre=14,16,12']
    assert main.main(['main', *arguments]) == 2
    error = capsys.readouterr().err
    assert 'No space left on device' in error
    assert 'run the same command again to resume' in error
    written = contents(out)
    listed = manifest(out) if calls > 3 else []
    assert len(listed) == (calls - 1) // 3
    assert set(written) - {'config.json', 'learnt_from.json', 'manifest.csv'} == {
        row[name] for row in listed for name in ('file', 'pasted')
    }
    assert all(expected[name].startswith(content) for name, content in written.items())
    assert all(expected[name] == content for name, content in written.items() if name.endswith('.gz'))
    assert (out / 'manifest.csv').exists() == bool(listed)
    assert not listed or written['manifest.csv'].endswith(b'\n')
    monkeypatch.undo()
    monkeypatch.setattr(generate.trained, 'load_transformer', lambda *_: model)
    assert main.main(['main', *arguments]) == 0
    assert contents(out) == expected


def test_no_room_is_said_before_the_first_sample(model, tmp_path, monkeypatch):
    full = type(shutil.disk_usage('/'))(total=2**40, used=2**40, free=2**20)
    monkeypatch.setattr(shutil, 'disk_usage', lambda path: full)
    with pytest.raises(InputError, match='no disk space: writing 8 samples needs'):
        generate.run(settings(), tmp_path)
    assert model.drawn == []
    assert not (tmp_path / 'config.json').exists()  # nothing is left that a mended command would run into


def test_it_goes_on_with_the_checkpoint_it_began_with(model, tmp_path, monkeypatch):
    model.settings['fail'] = kill_after(2)
    with pytest.raises(Killed):
        generate.run(settings(), tmp_path)
    model.settings['fail'] = None
    generate.run(settings(), tmp_path)
    assert model.loaded == [('runs/transformer', 'latest', ''), ('runs/transformer', '500', '')]

    def gone(workdir, checkpoint, vqgan_workdir):
        raise InputError(f'there is no checkpoint {checkpoint}')

    monkeypatch.setattr(generate.trained, 'load_transformer', gone)
    with pytest.raises(InputError, match=r'no checkpoint 500 .*are of step 500; name another --workdir'):
        generate.run(settings(), tmp_path)
    with pytest.raises(InputError, match=r'no checkpoint latest$'):
        generate.run(settings(), tmp_path / 'new')


def test_a_listed_file_that_was_damaged_is_told(model, tmp_path):
    generate.run(settings(), tmp_path)
    (tmp_path / names('LGG', 4)[1]).write_bytes(b'damaged')
    with pytest.raises(InputError, match=r'LGG_0001\.nii\.gz: not a NIfTI file'):
        generate.run(settings(), tmp_path)


def test_samples_of_another_model_are_not_added(model, tmp_path):
    generate.run(settings(), tmp_path)
    before = contents(tmp_path)
    model.identity = 'def456'
    with pytest.raises(InputError, match=r"LGG_0000\.nii\.gz with identity 'abc123' there, 'def456' now"):
        generate.run(settings(), tmp_path)
    assert contents(tmp_path) == before
    (tmp_path / 'manifest.csv').write_text(
        '\n'.join(line for line in before['manifest.csv'].decode().splitlines() if 'HGG' not in line) + '\n'
    )
    with pytest.raises(InputError, match=r"LGG_0000\.nii\.gz with identity 'abc123' there, 'def456' now"):
        generate.run(settings(classes=('HGG',)), tmp_path)  # none of which are listed


@pytest.mark.parametrize(
    ('spoil', 'message'),
    [
        (lambda text: text.replace('LGG_0001', 'LGG_0000'), 'lists a file twice'),
        (lambda text: text.replace('samples/LGG/LGG_0001.nii.gz,', ''), 'row 3 has'),
        (lambda text: text.replace('checkpoint', 'step'), 'does not say of which checkpoint'),
        (lambda text: text.replace('guidance', 'strength'), 'has other columns than file, class, seed'),
        (lambda text: text.replace('LGG_0001', 'LGG_\xff"'), 'damaged'),
    ],
)
def test_a_damaged_manifest_is_told(model, tmp_path, spoil, message):
    generate.run(settings(), tmp_path)
    path = tmp_path / 'manifest.csv'
    path.write_bytes(spoil(path.read_text()).encode('latin-1'))
    with pytest.raises(InputError, match=message):
        generate.run(settings(), tmp_path)


PROCESS = """
import sys
import jax
jax.config.update('jax_cpu_collectives_implementation', 'gloo')
jax.distributed.initialize(f'127.0.0.1:{sys.argv[1]}', 2, int(sys.argv[2]))
import test_generate
from vqroi_jax import generate
model = test_generate.FakeTransformer()
generate.trained.load_transformer = lambda workdir, checkpoint, vqgan_workdir: print(checkpoint) or model
if len(sys.argv) > 4:
    model.settings['fail'] = eval(sys.argv[4], vars(test_generate))
try:
    generate.run(test_generate.settings(), sys.argv[3])
    print(model.drawn)
except generate.Stopped as stopped:
    print(stopped)
"""


def slowly(then=None):
    """To be called before each sample."""

    def wait(drawn):
        time.sleep(1)
        if then:
            then(drawn)

    return wait


def two_processes(folder: Path, *fail: str) -> list[list[str]]:
    """What each of two processes prints that go on together; `fail`: an expression for each one's model, if any."""
    with socket.socket() as probe:
        probe.bind(('127.0.0.1', 0))
        port = str(probe.getsockname()[1])
    where = {'cwd': Path(__file__).parent, 'stdout': subprocess.PIPE, 'text': True}
    command = [sys.executable, '-c', PROCESS, port]
    processes = [subprocess.Popen([*command, str(rank), folder, *fail[rank : rank + 1]], **where) for rank in range(2)]
    outputs = [process.communicate()[0].splitlines() for process in processes]
    assert [process.returncode for process in processes] == [0, 0]
    return [[line for line in lines if '[Gloo]' not in line] for lines in outputs]


@pytest.mark.long
def test_two_processes_go_on_together_and_one_writes(model, tmp_path):
    generate.run(settings(), tmp_path / 'unbroken')
    model.settings['fail'] = kill_after(5)
    with pytest.raises(Killed):
        generate.run(settings(), tmp_path / 'out')
    outputs = two_processes(tmp_path / 'out')
    assert outputs[1] == ['500', '[(1, 1), (1, 2), (1, 3)]']  # what only the primary one had read
    assert [*outputs[0][:1], *outputs[0][2:]] == outputs[1]
    assert '3 of them made now' in outputs[0][1]
    assert contents(tmp_path / 'out') == contents(tmp_path / 'unbroken')


@pytest.mark.long
def test_sigterm_to_one_of_two_processes_stops_both_after_the_same_batch(model, tmp_path):
    generate.run(settings(), tmp_path / 'unbroken')
    outputs = two_processes(tmp_path / 'out', 'slowly()', 'slowly(terminate_after(1))')
    assert outputs[0][-1] == outputs[1][-1]
    assert outputs[0][-1].startswith('stopped with ')
    assert 3 <= len(manifest(tmp_path / 'out')) < 8
    two_processes(tmp_path / 'out')
    assert contents(tmp_path / 'out') == contents(tmp_path / 'unbroken')


# ------------------------------------------------------------------------------------------------------ pasting


def pasted(folder: Path, label: str, index: int) -> nibabel.Nifti1Image:
    return nibabel.load(folder / 'pasted' / label / f'{label}_{index:04d}.nii.gz')


def test_a_pasted_roi_lies_at_its_place_in_the_brain(model, tmp_path, brain):
    centre = (13, 20, 11)
    config = settings(number=2, paste__brain=str(brain), paste__centre=centre, paste__maximum=1200.0)
    generate.run(config, tmp_path / 'out')
    host = np.asarray(nibabel.load(brain).dataobj)
    for label, name in enumerate(('LGG', 'HGG')):
        for index in range(2):
            image, volume = pasted(tmp_path / 'out', name, index), ellipsoid(7, label, index)
            expected = host.copy()
            for d, h, w in np.ndindex(*SIZE):
                share = (float(volume[d, h, w]) + 1) / 2
                if share >= 0.05:
                    place = centre[0] + h - 10 // 2, centre[1] + w - 12 // 2, centre[2] + d - 8 // 2
                    expected[place] = round(share * 1200)
            np.testing.assert_array_equal(np.asarray(image.dataobj), expected)
            assert image.get_data_dtype() == np.int16
            np.testing.assert_array_equal(image.affine, nibabel.load(brain).affine)
            assert b'SYNTHETIC' in image.header['descrip'].item()
    assert [row['pasted'] for row in manifest(tmp_path / 'out')] == [
        row['file'].replace('samples/', 'pasted/') for row in manifest(tmp_path / 'out')
    ]


@pytest.mark.parametrize('codes', ['LPS', 'RAS', 'AIR'])
def test_a_pasted_roi_keeps_its_sides_in_a_brain_of_any_axes(codes):
    brain = np.zeros((28, 30, 32), np.int16)
    brain[4:-4, 4:-4, 4:-4] = 100
    turn = nibabel.orientations.axcodes2ornt(codes)
    affine = np.linalg.inv(nibabel.orientations.inv_ornt_aff(turn, brain.shape))
    host = generate.Host(to_volume(brain), affine, 0.0, 250.0, (15, 13, 14))
    assert nibabel.aff2axcodes(affine) == tuple(codes)
    own = samples.centred_affine(SIZE, (1, 1, 1))
    for d, h, w in [(4, 1, 6), (7, 5, 6), (4, 5, 2)]:
        volume = np.full(SIZE, -1, np.float32)
        volume[d, h, w] = 1
        generate._check_fit(host, SIZE)
        changed = np.argwhere(to_nifti(host.paste(volume, volume > -1) - host.brain))
        places = nibabel.affines.apply_affine(affine, [*changed, (13, 14, 15)])
        in_sample = nibabel.affines.apply_affine(own, [(h, w, d), (5, 6, 4)])
        assert len(changed) == 1
        np.testing.assert_allclose(places[0] - places[1], in_sample[0] - in_sample[1])


def test_where_an_roi_fits_is_said_in_the_axes_of_the_brain():
    # To the front, down and to the right: the ROI's width, depth and height, the latter two from their ends.
    turn = nibabel.orientations.axcodes2ornt('AIR')
    affine = np.linalg.inv(nibabel.orientations.inv_ornt_aff(turn, (28, 30, 32)))
    host = generate.Host(np.zeros((32, 28, 30)), affine, 0.0, 1.0, (15, 13, 40))
    with pytest.raises(
        InputError,
        match=r'centre=\(13, 40, 15\): an ROI of 10 x 12 x 8 .* choose i from 5 to 21, j from 3 to 25, k from 4 to 26',
    ):
        generate._check_fit(host, SIZE)


@pytest.mark.parametrize('kind', ['int16', 'scaled', 'z-scored'])
def test_by_default_the_brightest_voxel_is_as_bright_as_the_brain(model, tmp_path, kind):
    voxels, background = np.zeros(BRAIN), 0.0
    voxels[2:28, 2:32, 2:24] = np.random.default_rng(1).integers(1, 900, (26, 30, 22))
    if kind == 'z-scored':
        voxels, background = (voxels - 450) / 260, -450 / 260
    if kind == 'scaled':
        voxels /= 3  # nibabel stores whole numbers and a slope
    dtype = np.float64 if kind == 'z-scored' else '>i2'
    stored = voxels.astype(dtype) if kind == 'int16' else voxels
    nibabel.save(nibabel.Nifti1Image(stored, np.diag([-1, -1.5, 2, 1]), dtype=dtype), tmp_path / 'brain.nii')
    model.settings['draw_one'] = lambda seed, label, index, size: np.pad(
        np.ones([side - 2 for side in size], np.float32), 1, constant_values=-1
    )
    config = settings(number=1, paste__brain=str(tmp_path / 'brain.nii'), paste__centre=(14, 16, 12))
    generate.run(config, tmp_path / 'out')
    result = pasted(tmp_path / 'out', 'LGG', 0)
    values = np.asarray(result.dataobj)
    expected = np.asarray(nibabel.load(tmp_path / 'brain.nii').dataobj).copy()
    np.testing.assert_allclose(expected, voxels, atol=0.01)
    brightest = np.percentile(voxels[voxels > background], 99.5)
    assert result.get_data_dtype().kind == ('i' if kind == 'int16' else 'f')
    expected[14 - 5 + 1 : 14 + 5 - 1, 16 - 6 + 1 : 16 + 6 - 1, 12 - 4 + 1 : 12 + 4 - 1] = brightest
    np.testing.assert_allclose(values, expected, atol=0.5 if kind == 'int16' else 0.01)


# ------------------------------------------------------------------------------------------------------- slips


@pytest.mark.parametrize(
    ('changes', 'message'),
    [
        ({'transformer_workdir': ''}, 'no --config.transformer_workdir given'),
        ({'number': 0}, 'config.number=0: expected at least 1'),
        ({'figure_samples': 0}, 'config.figure_samples=0: expected at least 1'),
        ({'seed': -1}, 'config.seed=-1: expected a whole number from 0'),
        ({'seed': 2**32}, 'config.seed=4294967296'),
        ({'classes': ('LGG', 'GBM')}, "unknown class 'GBM'; the model knows LGG, HGG"),
        ({'classes': ('LGG', 'LGG')}, 'a class is named twice'),
        ({'mesh__data': 999}, 'config.mesh.data=999'),
        ({'intensity__maximum': 0.0}, 'config.intensity.maximum=0.0: expected an intensity above 0'),
        ({'intensity__maximum': float('nan')}, 'config.intensity.maximum=nan'),
        ({'intensity__maximum': float('inf')}, 'config.intensity.maximum=inf'),
        ({'intensity__background': 1.0}, 'config.intensity.background=1.0: expected a share'),
        ({'intensity__background': -0.1}, 'config.intensity.background=-0.1'),
        ({'reference': '{tmp}/none.nii.gz'}, 'config.reference=.*none.nii.gz: there is no such file'),
        ({'reference': '{tmp}/text.nii.gz'}, 'config.reference=.*text.nii.gz: not a NIfTI file'),
        ({'reference': '{tmp}/other.mgz'}, 'config.reference=.*other.mgz: .*NIfTI file'),
        ({'reference': '{tmp}'}, 'config.reference=.*: not a NIfTI file'),
        ({'reference': '{tmp}/flat.nii'}, 'its affine does not map voxels to places'),
        ({'paste__centre': (1, 2, 3)}, 'config.paste.brain is empty'),
        ({'paste__maximum': 3.0}, 'config.paste.brain is empty'),
        ({'paste__brain': '{tmp}/none.nii.gz'}, r'config.paste.centre=\(\): expected three whole numbers'),
        ({'paste__brain': '{tmp}/none.nii.gz', 'paste__centre': (14, 16)}, 'expected three whole numbers'),
        ({'paste__brain': '{tmp}/none.nii.gz', 'paste__centre': (14, 16, 1.5)}, 'expected three whole numbers'),
        ({'paste__brain': '{tmp}/none.nii.gz', 'paste__centre': (14, 16, 12)}, 'there is no such file'),
        ({'paste__brain': '{tmp}/cut.nii.gz', 'paste__centre': (14, 16, 12)}, 'truncated or damaged'),
        ({'paste__brain': '{tmp}/series.nii', 'paste__centre': (14, 16, 12)}, r'three axes is needed.*\(3, 3, 3, 2\)'),
        ({'paste__brain': '{tmp}/flat2.nii', 'paste__centre': (14, 16, 12)}, 'nothing in it is brighter'),
        ({'paste__brain': '{tmp}/nan.nii', 'paste__centre': (14, 16, 12)}, 'not finite'),
        ({'paste__brain': '{tmp}/brain.nii.gz', 'paste__centre': (1, 16, 12)}, 'outside of the brain.*i from 2 to 27'),
        ({'paste__brain': '{tmp}/brain.nii.gz', 'paste__centre': (14, 99, 12)}, 'outside of the brain'),
        (
            {'paste__brain': '{tmp}/brain.nii.gz', 'paste__centre': (14, 16, 3)},
            r'centre=\(14, 16, 3\): an ROI of 8 x 10 x 12 .* choose i from 5 to 25, j from 6 to 28, k from 4 to 22',
        ),
        ({'paste__brain': '{tmp}/brain.nii.gz', 'paste__centre': (14, 16, 23)}, 'leaves'),
        ({'paste__brain': '{tmp}/small.nii', 'paste__centre': (5, 5, 5)}, 'does not fit into its 9 x 11 x 11'),
        (
            {'paste__brain': '{tmp}/brain.nii.gz', 'paste__centre': (14, 16, 12), 'paste__maximum': 40000.0},
            'at most 32767, as its voxels are int16',
        ),
        (
            {'paste__brain': '{tmp}/brain.nii.gz', 'paste__centre': (14, 16, 12), 'paste__maximum': -1.0},
            'config.paste.maximum=-1.0',
        ),
    ],
)
def test_slips_are_told_before_anything_is_drawn(model, tmp_path, brain, changes, message):
    (tmp_path / 'text.nii.gz').write_text('hello')
    (tmp_path / 'cut.nii.gz').write_bytes(brain.read_bytes()[:-2000])
    nibabel.save(nibabel.MGHImage(np.zeros((3, 3, 3), np.float32), np.eye(4)), tmp_path / 'other.mgz')
    series = np.zeros((3, 3, 3, 2), np.float32)
    nibabel.save(nibabel.Nifti1Image(series, np.eye(4)), tmp_path / 'series.nii')
    nibabel.save(nibabel.Nifti1Image(series[..., 0], np.eye(4)), tmp_path / 'flat2.nii')
    nibabel.save(nibabel.Nifti1Image(np.full((9, 9, 9), np.nan, np.float32), np.eye(4)), tmp_path / 'nan.nii')
    small = np.pad(np.ones((9, 9, 7), np.float32), 1)
    nibabel.save(nibabel.Nifti1Image(small, np.eye(4)), tmp_path / 'small.nii')
    flat = nibabel.Nifti1Image(series[..., 0], np.eye(4))
    flat.header.set_sform(np.diag([1, 1, 0, 1]), code=1)
    flat.header.set_qform(None, code=0)
    (tmp_path / 'flat.nii').write_bytes(flat.header.binaryblock + bytes(4) + series[..., 0].tobytes())
    changes = {name: value.format(tmp=tmp_path) if isinstance(value, str) else value for name, value in changes.items()}
    with pytest.raises(InputError, match=message) as error:
        generate.run(settings(**changes), tmp_path / 'out')
    assert '\n' not in str(error.value)
    assert not any(sampler.drawn for sampler in model.samplers)
    assert not (tmp_path / 'out' / 'config.json').exists()


def test_a_folder_that_holds_no_run_is_told(tmp_path):
    with pytest.raises(InputError, match='nowhere'):
        generate.run(settings(transformer_workdir=str(tmp_path / 'nowhere')), tmp_path / 'out')


@pytest.mark.parametrize(('variant', 'number'), [('', 250), (':paper', 250), (':demo', 100), (':smoke', 4)])
def test_every_variant_of_the_config_is_read_by_the_command_line(variant, number):
    arguments = ['--workdir=out', '--config.transformer_workdir=runs/t', '--config.checkpoint=1500']
    arguments += ['--config.classes=HGG', '--config.paste.centre=(120,100,70)', '--config.intensity.maximum=500']
    config, workdir, _ = main.parse_arguments(['main', f'--config={CONFIG}{variant}', *arguments])
    assert (config.task, workdir, config.number) == ('generate', 'out', number)
    assert (config.checkpoint, config.classes, config.paste.centre) == ('1500', ('HGG',), (120, 100, 70))
    assert config.intensity.maximum == 500.0
    assert config.is_locked
    config = main.load_config(f'{CONFIG}{variant}')
    config.transformer_workdir = 'runs/t'
    generate.check_settings(config)


def test_an_unknown_variant_is_told():
    with pytest.raises(InputError, match="no variant 'huge'; choose one of paper, demo, smoke"):
        main.load_config(f'{CONFIG}:huge')


def test_the_config_is_recorded_with_its_run(model, tmp_path):
    generate.run(settings(), tmp_path)
    assert read_config(tmp_path).sampling.sub_batch == 2


def test_a_dark_core_belongs_to_the_tumour():
    volume = np.full((9, 9, 9), -0.99, np.float32)
    volume[2:7, 2:7, 2:7] = 0.6
    volume[3:6, 3:6, 3:6] = -0.8  # below the background's share, but enclosed
    volume[4, 4, 0:3] = -0.99  # a notch from outside
    intensity = ConfigDict({'maximum': 2.0, 'background': 0.2})
    tumour, values = generate.to_intensities(volume, intensity)
    expected = np.zeros(volume.shape, bool)
    expected[2:7, 2:7, 2:7] = True
    expected[4, 4, 2] = False
    expected[3:6, 3:6, 3:6] = False  # the notch opens it
    np.testing.assert_array_equal(tumour, expected)
    volume[4, 4, 2] = 0.6
    tumour, values = generate.to_intensities(volume, intensity)
    assert tumour.sum() == 125
    np.testing.assert_allclose(values[4, 4, 4], 0.2, atol=1e-6)
    assert (values[~tumour] == 0).all()
