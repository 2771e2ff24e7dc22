"""Does a training step ever wait for its batch?

    python tests/benchmarks/pipeline.py [--patients=12] [--step=0.05] [--steps=100]

Prepares phantoms at paper scale (128³ ROIs, 1 mm), then takes batches of 3 as the loop does, while a sleep stands for
the device's step. The wait is what `next` takes beyond that; the first batches, which the threads have not yet read
ahead, are told apart.
"""

import argparse
import runpy
import statistics
import tempfile
import time
from pathlib import Path

from vqroi_jax.data.pipeline import Batches
from vqroi_jax.prepare import prepare

ROOT = Path(__file__).parents[2]
FIRST = 4  # batches


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--patients', type=int, default=12, help='phantoms of each class')
    parser.add_argument('--step', type=float, default=0.05, help='seconds that the device takes')
    parser.add_argument('--steps', type=int, default=100)
    options = parser.parse_args()
    data = runpy.run_path(str(ROOT / 'configs' / 'prepare.py'))['get_config']().data
    data.phantom.patients, data.split.val, data.split.test = options.patients, 0.1, 0.1
    with tempfile.TemporaryDirectory() as folder:
        cohort = prepare(data, Path(folder))
        iterator = Batches(cohort.split('train'), 3, seed=0).iterator()
        waits = []
        for _ in range(options.steps):
            start = time.perf_counter()
            batch = next(iterator)
            waits.append(1e3 * (time.perf_counter() - start))
            time.sleep(options.step)
    size = batch['volume'].nbytes / 1e6
    late = waits[FIRST:]
    print(f'\nbatches of {len(batch["label"])} ROIs ({size:.0f} MB), a step of {1e3 * options.step:g} ms')
    print(f'wait: median {statistics.median(late):.2f} ms, most {max(late):.2f} ms')
    print(f'of the first {FIRST} batches: {max(waits[:FIRST]):.0f} ms')


if __name__ == '__main__':
    main()
