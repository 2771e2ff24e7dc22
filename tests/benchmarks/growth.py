"""How do time, memory and exchanges of a run grow with its sizes?

    python tests/benchmarks/growth.py [--repeats=5] [--out=FOLDER] [--most=96]

Steps are the training commands' own, with narrow networks so that a CPU can take them; one size changes at a time.
Memory is what the compiler needs for arguments and temporaries. The exponent is the slope of a straight line through
logarithms: of the whole table, and of its last three rows, where fixed costs matter least (of what is sent, of the rows
where anything is). Prints Markdown tables; with `--out`, leaves `growth.png` too.
"""

import os

os.environ['XLA_FLAGS'] = f'{os.environ.get("XLA_FLAGS", "")} --xla_force_host_platform_device_count=8'

import argparse
import runpy
import statistics
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path

import jax
import ml_collections
import numpy as np

from vqroi_jax import compiler_memory, hlo, large_pages
from vqroi_jax.data.pipeline import Batches, RoiSource
from vqroi_jax.training import partitioning, transformer, vqgan
from vqroi_jax.viz import save_figure
from vqroi_jax.viz.page import COLOURS, TEXT, Page, style

ROOT = Path(__file__).parents[2]
SIDES, BATCHES, CODES = (32, 48, 64, 96, 128, 160), (1, 2, 4, 8), (256, 1024, 4096, 16384)
GRIDS, PATIENTS, DEVICES = (4, 6, 8, 10), (1, 10, 100, 1000, 10_000), (1, 2, 4, 8)
Row = tuple[float, float, float, float]  # size, seconds, bytes of memory, bytes that a device sends


def config(name: str) -> ml_collections.ConfigDict:
    """The demo's config of a stage: narrow networks, no VGG16."""
    return runpy.run_path(str(ROOT / 'configs' / f'{name}.py'))['get_config']('demo')


def measure(jitted: Callable, state, rest: tuple, size: float, repeats: int) -> Row:
    """Compiles a step and times it; the first call is not counted."""
    compiled = jitted.lower(state, *rest).compile()
    needed, sent = compiled.memory_analysis(), hlo.read_cost(compiled.as_text()).sent
    times = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        state, metrics = compiled(state, *rest)
        jax.block_until_ready(metrics)
        times.append(time.perf_counter() - start)
    memory = needed.argument_size_in_bytes + needed.temp_size_in_bytes
    return size, statistics.median(times[1:]), memory, sent


def stage1(size: float, repeats: int, side: int = 32, batch: int = 1, codes: int = 128, devices: int = 1) -> Row:
    """A step of stage 1."""
    settings = config('vqgan')
    settings.data.roi_size, settings.batch_size, settings.codebook.codes = (side,) * 3, batch, codes
    mesh = partitioning.make_mesh({'data': devices})
    recipe = vqgan.make_recipe(settings, classes=2, steps_per_epoch=10)
    volume = np.random.default_rng(0).uniform(-1, 1, (batch, side, side, side, 1)).astype(np.float32)
    rows = partitioning.put_batch({'volume': volume, 'label': np.arange(batch, dtype=np.int32) % 2}, mesh)
    state = vqgan.create_state(recipe, mesh)
    weights = jax.device_put(recipe.lpips_weights, partitioning.replicated(mesh))
    return measure(vqgan.jit_step(recipe, state, mesh), state, (rows, weights), size, repeats)


def stage2(size: float, repeats: int, grid: int) -> Row:
    """A step of stage 2, batch 4."""
    settings, length, rng = config('transformer'), grid**3, np.random.default_rng(0)
    settings.batch_size, settings.augment.flip = 4, ()
    mesh = partitioning.make_mesh({'data': 1})
    recipe = transformer.make_recipe(settings, 128, 2, (grid,) * 3, steps_per_epoch=10)
    batch = {
        'tokens': rng.integers(128, size=(4, length)).astype(np.int32),
        'scores': rng.uniform(size=(4, length)).astype(np.float32),
        'label': np.arange(4, dtype=np.int32) % 2,
        'index': np.arange(4, dtype=np.int32),
    }
    state = transformer.create_state(recipe, mesh)
    jitted = transformer.jit_step(recipe, state, mesh)
    return measure(jitted, state, (partitioning.put_batch(batch, mesh),), size, repeats)


def cohort(patients: int, repeats: int) -> Row:
    """A batch of 8 ROIs of 64³ from so many patients, who are one and the same record by reference."""
    record = {'volume': np.zeros((64, 64, 64), np.float32)}

    class Referred(RoiSource):
        def volume(self, index: int) -> np.ndarray:
            return self[index]['volume'][..., None]

    class Records:
        def __len__(self) -> int:
            return patients

        def __getitem__(self, index: int) -> dict:
            return record

    source = Referred('train', [str(n) for n in range(patients)], [n % 2 for n in range(patients)], Records())
    batches = Batches(source, 8, 0, process_index=0, process_count=1)
    iterator = batches.iterator()
    number = 100 * repeats
    next(iterator)
    start = time.perf_counter()
    for _ in range(number):
        next(iterator)
    seconds = (time.perf_counter() - start) / number  # all together, for most come from those that were read ahead
    names = sum(sys.getsizeof(name) for name in source.ids)
    return patients, seconds, source.labels.nbytes + names, 0.0


def exponent(rows: list[Row], column: int) -> str:
    """Slope in logarithms over all rows where there is something and over the last three; a dash where there is not."""
    sizes, values = np.asarray([(row[0], row[column]) for row in rows if row[column] > 0], float).reshape(-1, 2).T
    if len(sizes) < 2:
        return '-'
    slopes = [np.polyfit(np.log(sizes[part]), np.log(values[part]), 1)[0] for part in (slice(None), slice(-3, None))]
    return f'{slopes[0]:z.2f}, {slopes[1]:z.2f}'


def table(title: str, rows: list[Row]) -> None:
    """Prints a table as Markdown."""
    print(f'\n{title}\n\n| size | ms | memory, MB | sent a device, MB |\n| --- | --- | --- | --- |')
    for size, seconds, memory, sent in rows:
        print(f'| {size:g} | {1e3 * seconds:.3g} | {memory / 1e6:.3g} | {sent / 1e6:.3g} |')
    print(
        '| exponent: all, last three | ' + ' | '.join(exponent(rows, column) for column in (1, 2, 3)) + ' |', flush=True
    )


def draw(tables: dict[str, list[Row]], path: Path) -> None:
    """A panel a table: how many times its first row's each figure grows to; below, from what to what, and exponents.

    What is sent is compared with the first row that sends anything.
    """
    lines = ((1, 'time', _seconds), (2, 'memory', _bytes), (3, 'sent', _bytes))
    page = Page(12.3, 7.0)
    for number, (title, rows) in enumerate(tables.items()):
        left, top = 0.8 + 4.0 * (number % 3), 0.3 + 3.4 * (number // 3)
        axes = page.axes(left, top, 3.1, 2.0)
        style(axes)
        axes.set_xscale('log')
        axes.set_yscale('log')
        axes.minorticks_off()
        baseline = top + 2.65
        for line, (column, name, unit) in enumerate(lines):
            known = [row for row in rows if row[column] > 0]
            if not known:
                continue
            sizes, values = [row[0] for row in known], [row[column] for row in known]
            axes.plot(sizes, [value / values[0] for value in values], color=COLOURS[line], marker='o', markersize=3)
            text = f'{name} {unit(values[0])} to {unit(values[-1])}, exponent {exponent(rows, column)}'
            page.text(left, baseline, text, TEXT, COLOURS[line])
            baseline += 0.18
        axes.set_xticks([row[0] for row in rows], [f'{row[0]:g}' for row in rows])
        axes.set_xlabel(title)
        low, high = axes.get_ylim()
        low, high = min(low, 0.7), max(high, 4)
        ticks = [10.0**power for power in range(5) if 10**power < high]
        ticks += [3] if len(ticks) < 3 else []
        axes.set_yticks(ticks, [f'{tick:g}x' for tick in ticks])
        axes.set_ylim(low, high)
    save_figure(page.figure, path)


def _seconds(value: float) -> str:
    return f'{value:.3g} s' if value >= 1 else f'{1e3 * value:.3g} ms'


def _bytes(value: float) -> str:
    size, unit = next((size, unit) for size, unit in ((1e9, 'GB'), (1e6, 'MB'), (1e3, 'kB'), (1, 'B')) if value >= size)
    return f'{value / size:.3g} {unit}'


def main(arguments: Iterable[str]) -> None:
    """Measures and prints all tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument('--repeats', type=int, default=5)
    parser.add_argument('--most', type=int, default=96, help='largest side of a volume')
    parser.add_argument('--out', type=Path)
    options = parser.parse_args(list(arguments))
    tables: dict[str, list[Row]] = {}

    def add(title: str, rows: Iterable[Row]) -> None:
        tables[title] = list(rows)
        table(title, tables[title])

    repeats = options.repeats
    add('side of the volume', (stage1(side, repeats, side=side) for side in SIDES if side <= options.most))
    add('ROIs a batch', (stage1(batch, repeats, batch=batch) for batch in BATCHES))
    add('codes', (stage1(codes, repeats, codes=codes) for codes in CODES))
    add('tokens', (stage2(grid**3, repeats, grid) for grid in GRIDS))
    add('patients', (cohort(patients, repeats) for patients in PATIENTS))
    add('devices, 2 ROIs each', (stage1(n, repeats, batch=2 * n, devices=n) for n in DEVICES))
    if options.out:
        draw(tables, options.out / 'growth.png')


if __name__ == '__main__':
    large_pages.ask()
    with compiler_memory.given_back():  # as a run does
        main(sys.argv[1:])
