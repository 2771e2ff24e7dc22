"""How long does MS-SSIM of pairs of volumes take, beside the published evaluation's way of doing it?

    python tests/benchmarks/ms_ssim.py [--side=128] [--pairs=40] [--theirs=5] [--volumes=16,64]

Ours reads pairs from a file on disk as an evaluation does. The other side is SciPy's Gaussian filter, level by level,
as the published evaluation has it, in float32. Prints a Markdown table, and the peak memory of our side with ever more
volumes, each measured in a process of its own (on Linux).
"""

import argparse
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
from scipy import ndimage

sys.path.insert(0, str(Path(__file__).parents[1]))  # for the oracle


def volumes_on_disk(folder: Path, number: int, side: int) -> np.ndarray:
    """Smooth volumes in [-1, 1] that are somewhat alike, in a file."""
    volumes = np.lib.format.open_memmap(folder / 'volumes.npy', 'w+', np.float32, (number, side, side, side))
    rng = np.random.default_rng(0)
    shared = rng.normal(size=(8, 8, 8))
    for volume in volumes:
        volume[:] = np.clip(ndimage.zoom(shared + 0.5 * rng.normal(size=(8, 8, 8)), side / 8, order=1), -1, 1)
    return volumes


def ours(volumes: np.ndarray, pairs: np.ndarray, mode: str) -> np.ndarray:
    """As an evaluation computes it."""
    from vqroi_jax.merit.voxels import similarities

    return similarities(pairs, volumes, volumes, mode, foreground=False)


def peak(side: int, number: int, pairs: int) -> None:
    """Prints the peak memory of a process that compares pairs among so many volumes, less the mapped file, in bytes."""
    with tempfile.TemporaryDirectory() as folder:
        volumes = volumes_on_disk(Path(folder), number, side)
        ours(volumes, np.random.default_rng(0).integers(0, number, (pairs, 2)), 'standard')
        status = Path('/proc/self/status').read_text()
    mapped = int(re.search(r'RssFile:\s+(\d+) kB', status)[1])  # which the system takes back when it needs to
    print((resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - mapped) * 1024)


def main(arguments: list[str]) -> None:
    """Measures and prints the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--side', type=int, default=128, help='voxels')
    parser.add_argument('--pairs', type=int, default=40, help='timed pairs of ours')
    parser.add_argument('--theirs', type=int, default=5, help='timed pairs of SciPy')
    parser.add_argument('--volumes', default='16,64', help='numbers of volumes for the memory')
    parser.add_argument('--peak', type=int, default=0, help='only print the peak memory with so many volumes')
    options = parser.parse_args(arguments)
    if options.peak:
        peak(options.side, options.peak, options.pairs)
        return
    with tempfile.TemporaryDirectory() as folder:
        volumes = volumes_on_disk(Path(folder), 8, options.side)
        pairs = np.random.default_rng(0).integers(0, 8, (options.pairs, 2))
        rows, found = [], {}
        for mode in ('standard', 'release'):
            ours(volumes, pairs[:8], mode)  # compiles
            start = time.perf_counter()
            found[mode] = ours(volumes, pairs, mode)
            rows.append((f'ours, {mode}', (time.perf_counter() - start) / options.pairs))
        from oracle import scipy_ms_ssim

        times, values = [], []
        for one, two in pairs[: options.theirs]:
            start = time.perf_counter()
            values.append(scipy_ms_ssim.release(volumes[one], volumes[two]))
            times.append(time.perf_counter() - start)
        rows.append(("SciPy, the published evaluation's way", statistics.median(times)))
        apart = np.abs(np.array(values) - found['release'][: options.theirs]).max()
    print(f'Pairs of {options.side}³ voxels, {os.cpu_count()} cores\n')
    print('| | seconds a pair | 1,000 pairs, minutes |\n| --- | --- | --- |')
    for name, seconds in rows:
        print(f'| {name} | {seconds:.3f} | {seconds * 1000 / 60:.1f} |')
    print(f"\nOurs in the mode 'release' and SciPy's differ by at most {apart:.1e}.\n")
    print('| volumes | peak memory, GB, without the mapped file |\n| --- | --- |')
    for number in options.volumes.split(','):
        command = [sys.executable, __file__, f'--peak={number}', f'--side={options.side}', f'--pairs={options.pairs}']
        printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
        print(f'| {number} | {int(printed.split()[-1]) / 1e9:.2f} |')


if __name__ == '__main__':
    main(sys.argv[1:])
