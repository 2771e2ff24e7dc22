"""How long does a training step of stage 1 take, and how much memory, beside the same step in PyTorch?

    python tests/benchmarks/stage1_step.py [--side=128] [--repeats=3] [--only=ours] [--config.FIELD=VALUE …]

Paper scale, batch 1, float32, all loss terms on. The PyTorch side is the oracle of the parity tests. Both sides run in
one process in turn, two steps each, of which the second is timed: a run's step follows its own last one, and finds the
memory that this has left. Memory is the peak of resident memory of a process that does nothing else. Operations are
counted as each side does them (multiplications and additions in matrix products and convolutions, PyTorch's by its own
counter). Prints a Markdown table.
"""

import argparse
import collections
import gc
import math
import os
import resource
import runpy
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from jax.extend.core import Jaxpr

from vqroi_jax import compiler_memory, large_pages
from vqroi_jax.main import override
from vqroi_jax.training import partitioning, vqgan

ROOT = Path(__file__).parents[2]
Side = tuple[Callable[[], None], Callable[[], float]]  # takes one step, counts its operations
MEMORY_STEPS = 2  # of the process that measures memory: the second shows what a run needs while it goes on


def settings(side: int, fields: Sequence[str]) -> ml_collections.ConfigDict:
    """The paper's config at batch 1, all terms on from the first step, changed by `--config.FIELD=VALUE` arguments."""
    config = runpy.run_path(str(ROOT / 'configs' / 'vqgan.py'))['get_config']('paper')
    config.batch_size = 1
    config.data.roi_size = (side,) * 3
    config.losses.adversarial_start = '0 steps'
    override(config, ['', *fields])
    return config


def volume(side: int) -> np.ndarray:
    """One volume, float32 [1, side, side, side, 1] in [-1, 1]; the time does not depend on what it shows."""
    return np.random.default_rng(0).uniform(-1, 1, (1, side, side, side, 1)).astype(np.float32)


def make_step(config: ml_collections.ConfigDict) -> tuple[Callable, tuple, Callable]:
    """Our jitted step, its arguments (state, batch, weights), and the same as a plain function of the first two."""
    mesh = partitioning.make_mesh({'data': 1})
    recipe = vqgan.make_recipe(config, classes=2, steps_per_epoch=94)
    numpy_batch = {'volume': volume(config.data.roi_size[0]), 'label': np.zeros(1, np.int32)}
    batch = partitioning.put_batch(numpy_batch, mesh)
    state = vqgan.create_state(recipe, mesh)
    gc.collect()  # the program that made the state, a gigabyte
    step = vqgan.jit_step(recipe, state, mesh)

    def plain_step(state, batch):
        return vqgan.update(recipe, state, batch, vqgan.draw_noise(recipe, state.step, 1), recipe.lpips_weights)

    return step, (state, batch, jax.device_put(recipe.lpips_weights, partitioning.replicated(mesh))), plain_step


def our_step(config: ml_collections.ConfigDict) -> Side:
    """Compiles our step; returns a function that takes one step and one that counts its operations."""
    step, (state, batch, weights), plain_step = make_step(config)
    kept = [state]
    del state  # each step is given its own

    def run() -> None:
        kept[0], metrics = step(kept[0], batch, weights)
        if not metrics['finite']:
            raise FloatingPointError('our step is not finite')

    return run, lambda: count_operations(jax.make_jaxpr(plain_step)(kept[0], batch).jaxpr).total()


def pytorch_step(config: ml_collections.ConfigDict) -> Side:
    """The oracle's step, likewise."""
    sys.path.insert(0, str(ROOT / 'tests'))
    import torch
    from oracle import torch_losses, torch_training, torch_vqgan
    from torch.utils.flop_counter import FlopCounterMode

    torch.manual_seed(0)
    side, rng = config.data.roi_size[0], np.random.default_rng(0)
    sizes = torch_vqgan.Sizes(volume=side, channels=config.model.channels)
    trainer = torch_training.Trainer(sizes, torch_training.Recipe(), torch_losses.LPIPS())
    real = torch.from_numpy(volume(side)).movedim(-1, 1)
    slices = torch.from_numpy(rng.integers(side // 4, 3 * side // 4, (1, config.losses.slices)))

    def run() -> None:
        losses = trainer.step(real, torch.zeros(1, dtype=torch.int64), slices)
        if not math.isfinite(losses['loss']):
            raise FloatingPointError("PyTorch's step is not finite")

    def count() -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops()

    return run, count


SIDES = {'PyTorch': pytorch_step, 'ours': our_step}


def count_operations(jaxpr: Jaxpr, platform: str = 'cpu', outer: str = '', times: int = 1) -> collections.Counter[str]:
    """Multiplications and additions in a program's matrix products and convolutions, loops counted as often as run.

    Args:
        jaxpr: the program.
        platform: whose branch is taken where platforms differ.
        outer: the name in which the program itself was called.
        times: how often it is run.

    Returns:
        Their numbers by the name that they were traced in, such as '/jvp(VQGAN)/encoder/conv_0'.
    """
    operations: collections.Counter[str] = collections.Counter()
    for equation in jaxpr.eqns:
        kind, values = equation.primitive.name, equation.params
        name = f'{outer}/{equation.source_info.name_stack}'
        if kind == 'dot_general':
            (contracted, _), _ = values['dimension_numbers']
            depth = math.prod(equation.invars[0].aval.shape[axis] for axis in contracted)
            operations[name] += 2 * depth * equation.outvars[0].aval.size * times
        elif kind == 'conv_general_dilated':
            numbers, kernel = values['dimension_numbers'], equation.invars[1].aval
            features = kernel.shape[numbers.rhs_spec[0]] * values['batch_group_count']
            operations[name] += 2 * equation.outvars[0].aval.size * kernel.size // features * times
        elif kind == 'cond' and values.get('branches_platforms') is not None:
            chosen = next(
                i for i, names in enumerate(values['branches_platforms']) if names is None or platform in names
            )
            operations += count_operations(values['branches'][chosen].jaxpr, platform, name, times)
        else:
            inner_times = times * (values['length'] if kind == 'scan' else 1)
            for value in jax.tree.leaves(tuple(values.values()), is_leaf=lambda leaf: hasattr(leaf, 'eqns')):
                inner = getattr(value, 'jaxpr', value)
                if hasattr(inner, 'eqns'):
                    operations += count_operations(inner, platform, name, inner_times)
    return operations


def seconds(run: Callable[[], None]) -> tuple[float, float]:
    """Time of one call: on the clock, and of all cores together, which other programs disturb less."""
    start, cores_start = time.perf_counter(), time.process_time()
    run()
    return time.perf_counter() - start, time.process_time() - cores_start


def product_rate() -> float:
    """Operations a second of a 4096 x 4096 float32 matrix product: what this machine can do."""
    a = jnp.ones((4096, 4096))
    product = jax.jit(jnp.matmul)
    product(a, a).block_until_ready()
    return 2 * 4096**3 / statistics.median(seconds(lambda: product(a, a).block_until_ready())[0] for _ in range(7))


def peak_memory(script: str, arguments: Sequence[str], name: str) -> float:
    """Peak resident bytes of a process of a benchmark that takes a few steps of one side."""
    command = [sys.executable, script, *arguments, f'--memory={name}']
    return float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.split()[-1])


def main(arguments: list[str]) -> None:
    """Measures and prints the table; with --memory, the figure of one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--side', type=int, default=128, help='voxels')
    parser.add_argument('--repeats', type=int, default=3, help='timed steps of each side')
    parser.add_argument('--only', choices=tuple(SIDES), help='measure one side')
    parser.add_argument('--memory', choices=tuple(SIDES), help=argparse.SUPPRESS)
    options, fields = parser.parse_known_args(arguments)
    config = settings(options.side, fields)

    if options.memory:
        run, _ = SIDES[options.memory](config)
        for _ in range(MEMORY_STEPS):
            run()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return

    names = [options.only] if options.only else list(SIDES)
    memory = {name: peak_memory(__file__, arguments, name) for name in names}
    rate = product_rate()
    print(f'{options.side}³, batch 1, float32, {os.cpu_count()} cores, matrix product {rate / 1e9:.0f} GFLOP/s\n')
    compare_steps({name: SIDES[name](config) for name in names}, memory, options.repeats, rate)


def compare_steps(sides: Mapping[str, Side], memory: Mapping[str, float], repeats: int, rate: float) -> None:
    """Times the sides' steps, and prints a table and how many times the last, ours, is better than each of the others.

    Args:
        sides: by name.
        memory: of each, bytes.
        repeats: timed steps of each.
        rate: of matrix products, operations a second.
    """
    operations = {name: count() for name, (_, count) in sides.items()}
    times = {name: [] for name in sides}
    for _ in range(repeats):
        for name, (run, _) in sides.items():
            gc.collect()
            run()
            times[name].append(seconds(run))
    print('| | seconds a step (all) | core seconds a step | peak memory | TFLOP a step | GFLOP/s |')
    print('| --- | --- | --- | --- | --- | --- |')
    medians = {name: [statistics.median(column) for column in zip(*times[name], strict=True)] for name in sides}
    for name, (median, core_median) in medians.items():
        print(
            f'| {name} | {median:.2f} ({", ".join(f"{clock:.2f}" for clock, _ in times[name])}) | {core_median:.2f} '
            f'| {memory[name] / 1e9:.1f} GB | {operations[name] / 1e12:.2f} | {operations[name] / median / 1e9:.0f} |'
        )
    print()
    *others, own = sides
    for name in others:
        ratios = [theirs / ours for theirs, ours in zip(medians[name], medians[own], strict=True)]
        print(
            f'{name} / {own}: time {ratios[0]:.2f}, core time {ratios[1]:.2f}, memory {memory[name] / memory[own]:.2f}'
        )
    print(f'{own} / matrix products alone: {medians[own][0] * rate / operations[own]:.2f}')


if __name__ == '__main__':
    large_pages.ask()
    with compiler_memory.given_back():  # as a run does
        main(sys.argv[1:])
