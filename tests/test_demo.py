"""The demo: that it goes through at smoke size, and (long) that it shows what the README says."""

import pathlib
import runpy
import subprocess
import sys

import pytest

from vqroi_jax import demo
from vqroi_jax.training import loop

ROOT = pathlib.Path(__file__).parents[1]


def test_goes_from_phantoms_to_reconstructions(tmp_path, capsys):
    config = runpy.run_path(str(ROOT / 'configs' / 'demo.py'))['get_config']('smoke')
    for stage in (config.prepare, config.vqgan):
        stage.data.phantom.spacing = 8.0
        stage.data.phantom.patients = 4
        stage.data.roi_size = (16, 16, 16)
    config.vqgan.model.channels = config.vqgan.discriminator.channels = (8,)
    config.vqgan.model.encoder_res_blocks = config.vqgan.model.decoder_res_blocks = (0,)
    config.vqgan.training.duration = '5 steps'
    demo.run(config, tmp_path)
    printed = capsys.readouterr().out
    assert 'Reconstructions of held-out phantoms' in printed
    table = [line.split()[0] for line in printed.splitlines() if line and line.split()[0] in ('all', 'HGG', 'LGG')]
    assert table[-3:] == ['all', 'HGG', 'LGG']
    for figure in ('cohort/figures/cohort.png', 'vqgan/figures/reconstructions.png', 'vqgan/figures/curves.png'):
        assert (tmp_path / figure).exists()
    demo.run(config, tmp_path)  # the same command again finds all done
    assert 'trained to the end' in capsys.readouterr().out


@pytest.mark.long
def test_reconstructions_of_held_out_phantoms_are_theirs(tmp_path):
    """The whole demo, as the README has it."""
    command = [sys.executable, '-m', 'vqroi_jax.main', '--config=configs/demo.py', f'--workdir={tmp_path / "demo"}']
    subprocess.run(command, check=True, cwd=ROOT)
    figures = loop.last_evaluation(tmp_path / 'demo' / 'vqgan')
    codes = runpy.run_path(str(ROOT / 'configs' / 'demo.py'))['get_config']().vqgan.codebook.codes
    assert figures['val/psnr'] > 24
    assert figures['val/psnr/HGG'] > 22
    assert figures['val/perplexity'] > codes / 3
