"""The command `demo`: the whole pipeline, small, on the phantom cohort.

Each stage is a run of its own in a subfolder, by the same code and with the same files as its own command would leave.
"""

from pathlib import Path

from ml_collections import ConfigDict

from vqroi_jax import prepare, train_vqgan
from vqroi_jax.training import loop
from vqroi_jax.workdir import open_workdir


def run(config: ConfigDict, workdir: str | Path) -> None:
    """Runs `--config=configs/demo.py`."""
    with open_workdir(workdir, config) as folder:
        prepare.run(config.prepare, folder / 'cohort')
        stage1 = config.vqgan.copy_and_resolve_references()
        stage1.data.path = str(folder / 'cohort')
        train_vqgan.run(stage1, folder / 'vqgan')
        print(reconstruction_table(loop.last_evaluation(folder / 'vqgan')))
        print(f'Look at {folder / "cohort/figures/cohort.png"} and {folder / "vqgan/figures/reconstructions.png"}')


def reconstruction_table(figures: dict[str, float]) -> str:
    """The validation's figures as lines of text: all held-out patients, then class by class."""
    columns = (
        ('psnr', 'PSNR, dB'),
        ('psnr_box', 'in the box'),
        ('ssim', 'SSIM'),
        ('l1', 'L1'),
        ('accuracy', 'class right'),
    )
    labels = sorted(name.split('/')[2] for name in figures if name.startswith('val/psnr/'))
    lines = ['', 'Reconstructions of held-out phantoms', f'{"":8}' + ''.join(f'{title:>13}' for _, title in columns)]
    for label in ('', *labels):
        values = (figures[f'val/{name}' + (f'/{label}' if label else '')] for name, _ in columns)
        lines.append(f'{label or "all":8}' + ''.join(f'{value:13.3f}' for value in values))
    lines.append(f'codes in use: {figures["val/live_codes"]:.0%}, perplexity {figures["val/perplexity"]:.0f}\n')
    return '\n'.join(lines)
