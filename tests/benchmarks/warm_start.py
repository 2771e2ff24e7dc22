"""How long after its command does a run take its first step, and how long once it goes on?

    python tests/benchmarks/warm_start.py

Starts a stage 1 of the demo's size on a small cohort of phantoms, which are drawn first, and stops it. The command that
resumes it finds its programs in the workdir. Prints the seconds from either command to the end of its first step.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# The command itself, but that it tells when its first step is done, and is then asked to stop.
COMMAND = """
import os, signal, sys, time
import jax
from vqroi_jax import main
from vqroi_jax.training import loop

put_to_step = loop.TrainingTask.__init__


def told(self, *, train_step, **fields):
    def step(*arguments):
        result = jax.block_until_ready(train_step(*arguments))
        print('first step done', time.time(), flush=True)
        os.kill(os.getpid(), signal.SIGTERM)
        return result

    put_to_step(self, train_step=step, **fields)


loop.TrainingTask.__init__ = told
sys.exit(main.main(sys.argv[1:]))
"""


def seconds_to_first_step(arguments: list[str]) -> float:
    """Starts a training command, which ends after its first step with that saved."""
    environment = {name: value for name, value in os.environ.items() if name != 'JAX_COMPILATION_CACHE_DIR'}
    begin = time.time()
    command = [sys.executable, '-c', COMMAND, 'main', *arguments]
    output = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True, cwd=ROOT).stdout
    (line,) = (line for line in output.splitlines() if line.startswith('first step done'))
    return float(line.split()[-1]) - begin


def main() -> None:
    """Measures and prints."""
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    with tempfile.TemporaryDirectory() as folder:
        phantoms = ['--config=configs/prepare.py:demo', '--config.data.phantom.patients=20', f'--workdir={folder}/rois']
        subprocess.run([sys.executable, '-m', 'vqroi_jax.main', *phantoms], check=True, cwd=ROOT)
        run = ['--config=configs/vqgan.py:demo', f'--config.data.path={folder}/rois', f'--workdir={folder}/run']
        for name in ('started', 'resumed'):
            print(f'{name}: {seconds_to_first_step(run):.1f} s to the end of the first step', flush=True)


if __name__ == '__main__':
    main()
