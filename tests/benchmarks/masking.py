"""How long does the masking of stage 2 take, beside the release's way of doing it?

    python tests/benchmarks/masking.py [--variant=paper] [--samples=256] [--side=8] [--codes=1024] [--repeats=200]

A batch of samples of side³ tokens, masked as a variant of `configs/transformer.py` says. The other side is written anew
in PyTorch in the manner of the release: one sort of the batch, `multinomial`, and for each sample Python lists of
starts, neighbours and what fills up; with the release's choices whatever the variant is (draws weighted by places,
adjacent starts dropped, random codes anywhere). Both sides run in one process, in turns. Prints a Markdown table;
without PyTorch, of our side alone.
"""

import argparse
import importlib.util
import itertools
import os
import runpy
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path

import jax
import numpy as np

from vqroi_jax import masking

ROOT = Path(__file__).parents[2]
THEIRS, OURS = "PyTorch, the release's way", 'ours'
EVERY = {THEIRS: 20, OURS: 1}  # each side takes its turn in every so many repeats


def our_side(settings: masking.Settings, tokens: np.ndarray, scores: np.ndarray) -> Callable[[], None]:
    """Compiles our masking; returns a function that masks the batch once, with new keys each time."""
    batch, steps = jax.device_put((tokens, scores)), itertools.count()

    @jax.jit
    def corrupt(step: jax.Array, tokens: jax.Array, scores: jax.Array) -> masking.Corruption:
        return masking.corrupt(jax.random.split(jax.random.key(step), len(tokens)), tokens, scores, settings)

    def run() -> None:
        jax.block_until_ready(corrupt(next(steps), *batch))

    return run


def pytorch_side(settings: masking.Settings, tokens: np.ndarray, scores: np.ndarray) -> Callable[[], None]:
    """The release's way, likewise."""
    import torch

    true, importance = torch.from_numpy(tokens).long(), torch.from_numpy(scores)
    size, important = settings.slice_length, settings.important
    links = [i * size - back for i in range(1, settings.grid[0]) for back in (1, 0)]

    def neighbours(starts: list[int]) -> list[int]:
        """Starts, without those next to an earlier one, and one neighbour of each."""
        taken, waiting = [], list(starts)
        while waiting:
            place = waiting.pop(0)
            along_row = torch.randint(2, (1,)).item() == 1
            by, last = (1, place % size == size - 1) if along_row else (size, place + size >= settings.length)
            taken += [place, place - by if last else place + by]
            for other in (place + 1, place - 1, place + size, place - size):
                if other in waiting:
                    waiting.remove(other)
        return list(set(taken))

    def run() -> None:
        ranked = importance.clone()
        ranked[:, links] = -float('inf')
        order = ranked.sort(descending=True, dim=1).indices
        top, rest = order[:, : settings.candidates], order[:, settings.candidates :]
        starts = top.gather(1, torch.multinomial(top.float(), settings.starts))
        masked = [neighbours(row) for row in starts.tolist()]
        for taken, free in zip(masked, rest.tolist(), strict=True):
            for place in free:
                if len(taken) == important:
                    break
                if place not in taken:
                    taken.append(place)
        hidden = torch.tensor([taken[:important] for taken in masked])
        left = [np.setdiff1d(row, gone) for row, gone in zip(order.numpy(), hidden.numpy(), strict=True)]
        free = torch.from_numpy(np.stack(left))
        wrong = free.gather(1, torch.multinomial(free.float(), settings.corrupted - important))
        result = true.scatter(1, wrong, torch.randint(settings.codes, wrong.shape))
        result.scatter_(1, hidden, settings.codes)
        if (result == settings.codes).sum() != hidden.numel():
            raise AssertionError('PyTorch has not masked as many tokens as it should')

    return run


def measure(sides: dict[str, Callable[[], None]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each call of each side, after two of each to compile and warm up."""
    for run in sides.values():
        run()
        run()
    times = {name: [] for name in sides}
    for repeat, name in itertools.product(range(repeats), sides):
        if repeat % EVERY[name] == 0:
            start = time.perf_counter()
            sides[name]()
            times[name].append(time.perf_counter() - start)
    return times


def main(arguments: list[str]) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--variant', default='paper', choices=('paper', 'release'), help='whose masking')
    parser.add_argument('--samples', type=int, default=256, help='a batch')
    parser.add_argument('--side', type=int, default=8, help='tokens')
    parser.add_argument('--codes', type=int, default=1024, help='in the codebook')
    parser.add_argument('--repeats', type=int, default=200, help='timed batches of ours')
    options = parser.parse_args(arguments)
    config = runpy.run_path(str(ROOT / 'configs' / 'transformer.py'))['get_config'](options.variant).masking
    settings = masking.Settings.read(config, (options.side,) * 3, options.codes)
    settings.check()

    rng = np.random.default_rng(0)
    tokens = rng.integers(0, options.codes, (options.samples, settings.length), np.int32)
    scores = rng.uniform(0.1, 0.9, tokens.shape).astype(np.float32)
    sides = {OURS: our_side(settings, tokens, scores)}
    if importlib.util.find_spec('torch'):
        sides = {THEIRS: pytorch_side(settings, tokens, scores)} | sides
    else:
        print('PyTorch is not installed (pip install torch): the table has our side alone', file=sys.stderr)
    times = measure(sides, options.repeats)

    platform = jax.devices()[0].platform
    print(f'{options.samples} samples of {settings.length} tokens, {platform}, {os.cpu_count()} cores\n')
    print('| | ms a batch (10 to 90 % of repeats) | µs a sample | repeats |')
    print('| --- | --- | --- | --- |')
    for name, seconds in times.items():
        low, high = np.quantile(seconds, (0.1, 0.9)) * 1e3
        median = statistics.median(seconds)
        print(
            f'| {name} | {median * 1e3:.1f} ({low:.1f} to {high:.1f}) | {median / options.samples * 1e6:.1f} '
            f'| {len(seconds)} |'
        )
    if THEIRS in times:
        print(f'\nPyTorch / ours: {statistics.median(times[THEIRS]) / statistics.median(times[OURS]):.1f}')


if __name__ == '__main__':
    main(sys.argv[1:])
