"""The demo: that it goes through at smoke size, and (long) that it shows what the README says."""

import json
import pathlib
import runpy
import subprocess
import sys

import nibabel
import numpy as np
import pytest

from vqroi_jax import demo
from vqroi_jax.training import loop

ROOT = pathlib.Path(__file__).parents[1]


def smoke_config(variant='smoke'):
    config = runpy.run_path(str(ROOT / 'configs' / 'demo.py'))['get_config'](variant)
    for stage in (config.prepare, config.vqgan):
        stage.data.phantom.spacing = 8.0
        stage.data.phantom.patients = 4
        stage.data.roi_size = (16, 16, 16)
    config.vqgan.discriminator.channels = (8,)
    config.vqgan.training.duration = config.transformer.training.duration = '5 steps'
    return config


@pytest.fixture
def hasty(monkeypatch):
    """A classifier that is hardly trained, for time's sake."""
    train = demo.class_agreement.train
    monkeypatch.setattr(demo.class_agreement, 'train', lambda *arguments: train(*arguments, epochs=1))


@pytest.mark.usefixtures('hasty')
def test_goes_from_phantoms_to_samples_and_what_they_are_worth(tmp_path, capsys):
    config = smoke_config()
    demo.run(config, tmp_path)
    printed = capsys.readouterr().out
    assert 'Reconstructions of held-out phantoms' in printed
    table = [line.split()[0] for line in printed.splitlines() if line and line.split()[0] in ('all', 'HGG', 'LGG')]
    assert table[-3:] == ['all', 'HGG', 'LGG']
    for figure in printed.partition('Look at\n')[2].split():
        assert pathlib.Path(figure).exists(), figure
    for figure in ('vqgan/figures/curves.png', 'transformer/figures/curves.png', 'figures/tumour_volumes.png'):
        assert (tmp_path / figure).exists()

    results = json.loads((tmp_path / demo.RESULTS_FILE).read_text())
    assert (results['samples'], results['held_out']) == (4, 4)
    for shares in results['agreement'].values():
        assert set(shares) == {'', 'LGG', 'HGG'}
        np.testing.assert_allclose(shares[''], (shares['LGG'] + shares['HGG']) / 2)
    for label in ('LGG', 'HGG'):
        assert 0 <= results['volumes'][label]['samples'] <= 1
        assert f'{results["volumes"][label]["samples"]:.4f}' in printed
    demo.run(config, tmp_path)  # the same command again finds all done
    again = capsys.readouterr().out
    assert again.count('trained to the end') == 2
    assert '0 of them made now' in again


def test_samples_are_read_back_with_their_volumes(tmp_path):
    from vqroi_jax.data import samples

    columns = [samples.KEY, 'class']
    manifest = samples.Manifest(tmp_path / samples.MANIFEST_FILE, columns)
    for number, label in enumerate(('HGG', 'LGG')):
        voxels = np.zeros((6, 7, 8), np.float32)
        voxels[1:3, 2:4, 3 : 5 + number] = 0.5
        image = nibabel.Nifti1Image(voxels, np.diag([2.0, 2.0, 2.5, 1.0]))
        samples.write_whole(tmp_path / f'{label}.nii.gz', samples.pack(image))
        manifest.append({samples.KEY: f'{label}.nii.gz', 'class': label})
    made = demo._made(tmp_path, ('LGG', 'HGG'), maximum=1.0)
    assert made.volumes.shape == (2, 8, 6, 7)
    assert made.labels.tolist() == [1, 0]
    assert set(np.unique(made.volumes)) == {-1.0, 0.0}
    np.testing.assert_allclose(made.tumour_ml, [8 * 0.01, 12 * 0.01])
    np.testing.assert_allclose(made.of(0), [0.12])


@pytest.mark.parametrize('variant', ['demo', 'bidirectional'])
def test_its_stages_take_one_cohort_and_sample_as_they_draw(variant):
    config = runpy.run_path(str(ROOT / 'configs' / 'demo.py'))['get_config'](variant)
    assert tuple(config.prepare.data.roi_size) == tuple(config.vqgan.data.roi_size)
    assert config.prepare.data.phantom == config.vqgan.data.phantom
    assert config.generate.sampling == config.transformer.sampling
    assert config.transformer.model.attention == ('causal' if variant == 'demo' else 'bidirectional')
    assert config.generate.number == 100


@pytest.mark.long
def test_samples_look_like_their_class_as_often_as_held_out_phantoms(tmp_path):
    """The whole demo, as the README has it."""
    command = [sys.executable, '-m', 'vqroi_jax.main', '--config=configs/demo.py', f'--workdir={tmp_path / "demo"}']
    subprocess.run(command, check=True, cwd=ROOT)
    figures = loop.last_evaluation(tmp_path / 'demo' / 'vqgan')
    codes = runpy.run_path(str(ROOT / 'configs' / 'demo.py'))['get_config']().vqgan.codebook.codes
    assert figures['val/psnr'] > 24
    assert figures['val/psnr/HGG'] > 22
    assert figures['val/perplexity'] > codes / 3
    results = json.loads((tmp_path / 'demo' / demo.RESULTS_FILE).read_text())
    for label, share in results['agreement']['held-out phantoms'].items():
        assert abs(results['agreement']['samples'][label] - share) <= 0.05, label or 'all'
    for label, distances in results['volumes'].items():
        assert distances['samples'] < 0.3, label
