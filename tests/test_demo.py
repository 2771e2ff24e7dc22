"""The demo and the notebooks at smoke size, and (long) that the demo shows what the README says."""

import json
import os
import pathlib
import runpy
import subprocess
import sys

import nbformat
import pytest
from nbclient import NotebookClient

from vqroi_jax import demo, evaluate
from vqroi_jax.errors import InputError
from vqroi_jax.training import loop

ROOT = pathlib.Path(__file__).parents[1]


def smoke_config(variant='smoke'):
    config = runpy.run_path(str(ROOT / 'configs' / 'demo.py'))['get_config'](variant)
    for stage in (config.prepare, config.vqgan):
        stage.data.phantom.spacing = 8.0
        stage.data.phantom.patients = 4
        stage.data.roi_size = (16, 16, 16)
        stage.data.split.test = 1.0
    config.vqgan.discriminator.channels = (8,)
    for stage in (config.vqgan, config.transformer):
        stage.mesh.data, stage.batch_size, stage.eval_batch_size = 1, 4, 4
    config.evaluate.metrics = ('mmd', 'statistics')  # the rest takes networks' time, and has its own tests
    config.vqgan.training.duration = config.transformer.training.duration = '5 steps'
    return config


def test_reconstructions_are_told_as_far_as_there_are_any():
    assert demo.reconstruction_table({}) == 'No phantoms are held out, so none is reconstructed.'
    figures = {f'val/{name}': 0.5 for name in ('psnr', 'psnr_box', 'l1', 'accuracy', 'live_codes', 'perplexity')}
    lines = demo.reconstruction_table(figures).splitlines()
    assert 'SSIM' not in lines[2]  # of ROIs that are small
    assert lines[3].split() == ['all', '0.500', '0.500', '0.500', '0.500']


@pytest.fixture(scope='module')
def finished(tmp_path_factory):
    """Folder of a finished demo."""
    folder = tmp_path_factory.mktemp('demo')
    demo.run(smoke_config(), folder)
    return folder


def test_goes_from_phantoms_to_samples_and_what_they_are_worth(finished, capsys):
    demo.run(smoke_config(), finished)  # the same command again finds all done, and tells it again
    printed = capsys.readouterr().out
    assert printed.count('trained to the end') == 2
    assert '0 of them made now' in printed
    assert 'Reconstructions of held-out phantoms' in printed
    table = [line.split()[0] for line in printed.splitlines() if line and line.split()[0] in ('all', 'HGG', 'LGG')]
    assert table[-3:] == ['all', 'HGG', 'LGG']
    for figure in printed.partition('look at\n')[2].split():
        assert pathlib.Path(figure).exists(), figure
    assert f'Open {finished / "evaluation" / "report.html"}' in printed
    for figure in ('vqgan/figures/curves.png', 'transformer/figures/curves.png'):
        assert (finished / figure).exists()
    found = json.loads((finished / 'evaluation' / evaluate.METRICS_FILE).read_text())
    assert found['fake']['rois'] == {'LGG': 4, 'HGG': 4}
    assert {figure['label'] for figure in found['figures']} == {'LGG', 'HGG'}


@pytest.mark.parametrize(
    ('field', 'value', 'message'),
    [
        ('generate.number', 0, 'config.generate.number=0: expected at least 1'),
        ('evaluate.bootstrap', 0, 'config.evaluate.bootstrap=0: expected at least 2'),
        ('evaluate.metrics', ('all',), "config.evaluate.metrics: 'all' is none of"),
        ('vqgan.optimizer.learning_rate', 0.0, 'config.vqgan.optimizer.learning_rate=0.0'),
        ('transformer.figure_rois', 0, 'config.transformer.figure_rois=0'),
    ],
)
def test_what_a_stage_cannot_use_is_told_before_the_first(field, value, message, tmp_path):
    config = smoke_config()
    config.update_from_flattened_dict({field: value})
    with pytest.raises(InputError) as caught:
        demo.run(config, tmp_path)
    assert message in str(caught.value)
    assert {path.name for path in tmp_path.iterdir()} == {'.lock'}  # so that a mended one may begin there


LONG_NOTEBOOKS = ('explore_latents', 'scale', 'your_own_data')


@pytest.mark.parametrize(
    'path',
    [
        pytest.param(path, id=path.stem, marks=[pytest.mark.long] * (path.stem in LONG_NOTEBOOKS))
        for path in sorted((ROOT / 'notebooks').glob('*.ipynb'))
    ],
)
def test_notebooks_run_from_top_to_bottom(path, finished):
    notebook = nbformat.read(path, as_version=4)
    assert not any(cell.get('outputs') for cell in notebook.cells), 'outputs are stripped in the repository'
    parameters = [cell for cell in notebook.cells if 'parameters' in cell.metadata.get('tags', ())]
    own = finished.with_name('config.py')
    own.write_text(
        f'from vqroi_jax.workdir import read_config\n\ndef get_config():\n    return read_config({str(finished)!r})\n'
    )
    values = {
        'config': str(own),
        'configs': str(ROOT / 'configs'),
        'patients': 6,
        'run': str(finished),
        'steps': 2,
        'variant': 'smoke',
    }
    known = {name: value for name, value in values.items() if f'\n{name} = ' in f'\n{parameters[0].source}'}
    parameters[0].source = '\n'.join(f'{name} = {value!r}' for name, value in known.items())
    NotebookClient(notebook, timeout=600, kernel_name='python3').execute()


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
    """The whole demo, as the README has it: on one device, and compiled to be quick."""
    command = [sys.executable, '-m', 'vqroi_jax.main', '--config=configs/demo.py', f'--workdir={tmp_path / "demo"}']
    subprocess.run(command, check=True, cwd=ROOT, env={**os.environ, 'XLA_FLAGS': ''})
    figures = loop.last_evaluation(tmp_path / 'demo' / 'vqgan')
    codes = runpy.run_path(str(ROOT / 'configs' / 'demo.py'))['get_config']().vqgan.codebook.codes
    assert figures['val/psnr'] > 24
    assert figures['val/psnr/HGG'] > 22
    assert figures['val/perplexity'] > codes / 3
    found = json.loads((tmp_path / 'demo' / 'evaluation' / evaluate.METRICS_FILE).read_text())
    for figure in found['figures']:
        if figure['metric'] == 'class agreement':
            assert abs(figure['value'] - figure['floor']) <= 0.05, figure['label'] or 'all'
        if figure['metric'].startswith('tumour volume'):
            assert figure['value'] < 0.3, figure['label']
