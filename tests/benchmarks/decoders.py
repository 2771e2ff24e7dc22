"""What does the `light` decoder of stage 1, without a ResBlock at full resolution, cost in its reconstructions?

    python tests/benchmarks/decoders.py [--side=64] [--steps=800] [--out=FOLDER]

Trains both decoders by the training command, one after the other, on the same phantoms with the same draws. Networks
and schedule are the demo's, whose narrowness lets a CPU take enough steps, but for two things: a quarter of the steps
are without quantisation, since codes that begin before anything is learnt hold it up, and the auxiliary classifier is
left out, which has a weight for every latent vector and of such a volume too many for the demo's learning rate.
Quality is that of each run's last validation, on held-out phantoms. Prints a Markdown table. With `--out`, the runs
stay there, and the same command goes on with them. What the ResBlock costs in time: `stage1_step.py --only=ours
"--config.model.decoder_res_blocks=(1,1,1,0)"`.
"""

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from vqroi_jax.training.loop import last_evaluation

ROOT = Path(__file__).parents[2]
WIDTH = 128.0  # mm of an ROI, as at paper scale
DECODERS = {'paper': (1, 1), 'light': (1, 0)}  # ResBlocks after each doubling
BATCH = 4
COLUMNS = {'psnr': 'PSNR', 'psnr_box': "PSNR, tumour's box", 'ssim': 'SSIM', 'l1': 'L1'}


def command(decoder: str, side: int, steps: int, workdir: Path) -> list[str]:
    """The training command with a decoder."""
    settings = {
        'data.roi_size': (side,) * 3,
        'data.phantom.spacing': WIDTH / side,
        'batch_size': BATCH,
        'eval_batch_size': BATCH,
        'model.decoder_res_blocks': DECODERS[decoder],
        'codebook.warmup': f'{steps // 4} steps',
        'losses.classification': 0.0,
        'training.duration': f'{steps} steps',
        **{f'training.{name}_every': f'{max(steps // 4, 1)} steps' for name in ('eval', 'figures', 'checkpoint')},
    }
    changes = [f'--config.{field}={value}' for field, value in settings.items()]
    config = ROOT / 'configs' / 'vqgan.py:demo'
    return [sys.executable, '-m', 'vqroi_jax.main', f'--config={config}', f'--workdir={workdir}', *changes]


def row(decoder: str, workdir: Path) -> str:
    """A run's figures as a line of the table."""
    quality = last_evaluation(workdir)
    return f'| {decoder} | ' + ' | '.join(f'{quality[f"val/{name}"]:.4g}' for name in COLUMNS) + ' |'


def main(arguments: Iterable[str]) -> None:
    """Trains both and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--side', type=int, default=64)
    parser.add_argument('--steps', type=int, default=800)
    parser.add_argument('--out', type=Path)
    options = parser.parse_args(list(arguments))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        rows = []
        for decoder in DECODERS:
            workdir = folder / decoder
            subprocess.run(command(decoder, options.side, options.steps, workdir), cwd=ROOT, check=True)
            rows.append(row(decoder, workdir))
    print(f'\n{options.side}³, batch {BATCH}, {options.steps} steps\n')
    print('| decoder | ' + ' | '.join(COLUMNS.values()) + ' |')
    print('| --- ' * (1 + len(COLUMNS)) + '|')
    print('\n'.join(rows))


if __name__ == '__main__':
    main(sys.argv[1:])
