"""The command `demo`: the whole pipeline, small, on the phantom cohort.

Each stage is a run of its own in a subfolder, by the same code and with the same files as its own command would leave.
The last one, `evaluation`, measures what the samples are worth beside phantoms that no training has seen.
"""

import math
from collections.abc import Mapping
from pathlib import Path

from ml_collections import ConfigDict

from vqroi_jax import evaluate, generate, prepare, train_transformer, train_vqgan
from vqroi_jax.errors import fields_of
from vqroi_jax.training import loop, transformer, vqgan
from vqroi_jax.workdir import open_workdir


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/demo.py`."""
    with open_workdir(workdir, config) as folder:
        check_settings(config, folder)
        prepare.run(config.prepare, folder / 'cohort')
        train_vqgan.run(_with(config.vqgan, **{'data.path': folder / 'cohort'}), folder / 'vqgan')
        train_transformer.run(_with(config.transformer, vqgan_workdir=folder / 'vqgan'), folder / 'transformer')
        generate.run(_with(config.generate, transformer_workdir=folder / 'transformer'), folder / 'generated')
        print(reconstruction_table(loop.last_evaluation(folder / 'vqgan')))
        sides = {'real': folder / 'cohort', 'fake': folder / 'generated'}
        evaluate.run(_with(config.evaluate, **sides), folder / 'evaluation')
        print('And look at')
        for figure in (
            'cohort/figures/cohort.png',
            'vqgan/figures/reconstructions.png',
            'transformer/figures/masking.png',
            'transformer/figures/completions.png',
            'generated/figures/samples.png',
            'generated/figures/surfaces.png',
        ):
            print(f'  {folder / figure}')


def check_settings(config: ConfigDict, folder: Path) -> None:
    """Refuses what a stage could not use, before the first of them is begun.

    Raises:
        InputError: naming the field and what it may be.
    """
    generation = _with(config.generate, transformer_workdir=folder / 'transformer')
    for block, check, settings in (
        ('vqgan', vqgan.check_settings, config.vqgan),
        ('transformer', transformer.check_settings, config.transformer),
        ('generate', generate.check_settings, generation),
        ('evaluate', evaluate.check_settings, config.evaluate),
    ):
        with fields_of(block):
            check(settings)


def _with(config: ConfigDict, **paths: Path) -> ConfigDict:
    """A copy of a stage's config that reads from other stages' folders."""
    changed = config.copy_and_resolve_references()
    changed.update_from_flattened_dict({field: str(path) for field, path in paths.items()})
    return changed


def reconstruction_table(figures: Mapping[str, float | None]) -> str:
    """The validation's figures, if there are any, as text: all held-out patients, then by class; 'nan' for None."""
    if not figures:
        return 'No phantoms are held out, so none is reconstructed.'
    finite = {name: math.nan if value is None else value for name, value in figures.items()}
    columns = [
        ('psnr', 'PSNR, dB'),
        ('psnr_box', 'in the box'),
        ('ssim', 'SSIM'),
        ('l1', 'L1'),
        ('accuracy', 'class right'),
    ]
    columns = [(name, title) for name, title in columns if f'val/{name}' in figures]  # of small ROIs there is no SSIM
    labels = sorted(name.split('/')[2] for name in figures if name.startswith('val/psnr/'))
    lines = ['', 'Reconstructions of held-out phantoms', f'{"":8}' + ''.join(f'{title:>13}' for _, title in columns)]
    for label in ('', *labels):
        values = (finite[f'val/{name}' + (f'/{label}' if label else '')] for name, _ in columns)
        lines.append(f'{label or "all":8}' + ''.join(f'{value:13.3f}' for value in values))
    lines.append(f'codes in use: {finite["val/live_codes"]:.0%}, perplexity {finite["val/perplexity"]:.0f}\n')
    return '\n'.join(lines)
