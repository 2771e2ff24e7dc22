"""What does the `light` decoder of stage 1 save, and what does it cost in its reconstructions?

    python tests/benchmarks/decoders.py [--side=64] [--steps=300] [--out=FOLDER]

Trains decoders with and without the ResBlock at full resolution by the training command, one after the other, on the
same phantoms with the same draws, with the demo's narrow networks (a level deeper) and its optimiser, so that a CPU can
take enough steps. Quality is that of each run's last validation, on held-out phantoms; times and peaks of resident
memory are the run's own reports. Prints a Markdown table. With `--out`, the runs stay there, and the same command goes
on with them.
"""

import argparse
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path

from vqroi_jax.training.loop import last_evaluation
from vqroi_jax.training.metric_writers import METRICS_FILE, read_metrics

ROOT = Path(__file__).parents[2]
WIDTH = 128.0  # mm of an ROI, as at paper scale
DECODERS = {'paper': (1, 1, 1), 'light': (1, 1, 0)}  # ResBlocks after each doubling
COLUMNS = {'psnr': 'PSNR', 'psnr_box': "PSNR, tumour's box", 'ssim': 'SSIM', 'l1': 'L1'}


def command(decoder: str, side: int, steps: int, workdir: Path) -> list[str]:
    """The training command with a decoder."""
    settings = {
        'data.roi_size': (side,) * 3,
        'data.phantom.spacing': WIDTH / side,
        'batch_size': 4,
        'eval_batch_size': 4,
        'model.channels': (16, 32, 64),
        'model.encoder_res_blocks': (1, 1, 1),
        'model.decoder_res_blocks': DECODERS[decoder],
        'discriminator.channels': (16, 32, 64),
        'losses.adversarial_start': f'{steps // 2} steps',
        'optimizer.learning_rate': 3e-3,
        'training.duration': f'{steps} steps',
        'training.log_every': '10 steps',
        **{f'training.{name}_every': f'{steps} steps' for name in ('eval', 'figures')},
        'training.checkpoint_every': f'{max(steps // 4, 1)} steps',
    }
    changes = [f'--config.{field}={value}' for field, value in settings.items()]
    config = ROOT / 'configs' / 'vqgan.py:demo'
    return [sys.executable, '-m', 'vqroi_jax.main', f'--config={config}', f'--workdir={workdir}', *changes]


def row(decoder: str, workdir: Path) -> str:
    """A run's figures as a line of the table."""
    reports = [line for line in read_metrics(workdir / METRICS_FILE) if 'perf/steps_per_second' in line]
    seconds = 1 / statistics.median(line['perf/steps_per_second'] for line in reports)
    memory = max(line['perf/peak_memory_gib'] for line in reports)
    quality = last_evaluation(workdir)
    values = ' | '.join(f'{quality[f"val/{name}"]:.3f}' for name in COLUMNS)
    return f'| {decoder} | {seconds:.2f} | {memory:.1f} | {values} |'


def main(arguments: Iterable[str]) -> None:
    """Trains both and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--side', type=int, default=64)
    parser.add_argument('--steps', type=int, default=300)
    parser.add_argument('--out', type=Path)
    options = parser.parse_args(list(arguments))
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.out or Path(temporary)
        rows = []
        for decoder in DECODERS:
            workdir = folder / decoder
            subprocess.run(command(decoder, options.side, options.steps, workdir), cwd=ROOT, check=True)
            rows.append(row(decoder, workdir))
    print(f'\n{options.side}³, batch 4, {options.steps} steps\n')
    print('| decoder | seconds a step | peak memory, GiB | ' + ' | '.join(COLUMNS.values()) + ' |')
    print('| --- ' * (3 + len(COLUMNS)) + '|')
    print('\n'.join(rows))


if __name__ == '__main__':
    main(sys.argv[1:])
