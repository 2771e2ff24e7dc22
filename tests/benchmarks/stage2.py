"""How long do a training step of stage 2 and a sample take, beside the same in PyTorch?

    python tests/benchmarks/stage2.py [--layers=24] [--width=1024] [--length=512] [--repeats=3] [--only=train]

Training: a step of batch 3, masking included on our side, float32. The PyTorch sides are the oracle of the parity
tests: as the published code has it, which encodes its volumes in every step, where ours keeps the tokens of a cohort;
without that; and with PyTorch's fused attention and optimiser. All run in one process in turn, as in `stage1_step.py`,
which says how; memory is the peak of resident memory of a process that does nothing else. Operations are counted as
each side does them.

Sampling: ours as it is, with the keys and values of earlier tokens kept. PyTorch's computes everything anew for each
token: it is timed at a few lengths of what has been drawn, and the times in between are interpolated and added up; what
drawing from the logits takes is left out. Parallel decoding of the bidirectional network is timed on our side alone.
What weights of 2 bytes or 1 would give is measured on a token's products alone.
Two floors stand beside our times: reading the weights of all layers once a token, which a batch shares, at the
bandwidth measured here; and the matrix products at the rate of a large one. The keys and values that are read too are
in neither. Prints Markdown tables.

PyTorch's threads sleep while they wait for each other (OMP_WAIT_POLICY=PASSIVE, unless it is set). By default they
spin, and where another program wants the cores too, small passes then take up to a hundred times as long. Measure on an
idle machine all the same: the load is printed with the tables.
"""

import argparse
import functools
import gc
import math
import os
import resource
import runpy
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
from stage1_step import MEMORY_STEPS, Side, compare_steps, count_operations, peak_memory, product_rate, seconds

from vqroi_jax import compiler_memory, decoding, large_pages
from vqroi_jax.training import partitioning, transformer

ROOT = Path(__file__).parents[2]
CODES, CLASSES = 1024, 2
SLICE = (8, 8)  # height and width of the latent grid; the length decides on the depth
DOWNSAMPLING = 16  # of stage 1: voxels a side of a latent region
HEAD_WIDTH = 64
TRAINING_BATCH = 3
SAMPLING_BATCHES = (1, 16)
PARALLEL_BATCH, PARALLEL_PASSES = 16, 12
RATES = 3  # of matrix products, the best of which counts: other programs can only lower it
PREFIXES = 5  # lengths at which PyTorch's sampler is timed

sys.path.insert(0, str(ROOT / 'tests'))  # for the oracle
os.environ.setdefault('OMP_WAIT_POLICY', 'PASSIVE')  # read when PyTorch is loaded, which is later


def settings(layers: int, width: int, attention: str) -> ml_collections.ConfigDict:
    """The paper's config with a network of this size and kind."""
    config = runpy.run_path(str(ROOT / 'configs' / 'transformer.py'))['get_config']('paper')
    config.model.layers, config.model.width, config.model.heads = layers, width, width // HEAD_WIDTH
    config.model.attention = attention
    return config


def make_recipe(options: argparse.Namespace, attention: str = 'causal') -> transformer.Recipe:
    """Our network and optimiser."""
    grid = options.length // math.prod(SLICE), *SLICE
    config = settings(options.layers, options.width, attention)
    return transformer.make_recipe(config, CODES, CLASSES, grid, steps_per_epoch=94)


def make_tokens(length: int) -> np.ndarray:
    """A batch to train on, int32 [3, length]; the time does not depend on what it says."""
    return np.random.default_rng(0).integers(CODES, size=(TRAINING_BATCH, length)).astype(np.int32)


def make_volumes(length: int) -> np.ndarray:
    """A batch to encode, float32 [3, D, H, W, 1] in [-1, 1]; likewise."""
    sides = (side * DOWNSAMPLING for side in (length // math.prod(SLICE), *SLICE))
    return np.random.default_rng(2).uniform(-1, 1, (TRAINING_BATCH, *sides, 1)).astype(np.float32)


def our_step(options: argparse.Namespace) -> Side:
    """Compiles our step; returns a function that takes one step and one that counts its operations."""
    mesh, recipe = partitioning.make_mesh({'data': 1}), make_recipe(options)
    tokens, label = make_tokens(options.length), np.arange(TRAINING_BATCH, dtype=np.int32) % CLASSES
    scores = np.random.default_rng(1).uniform(0.1, 0.9, tokens.shape).astype(np.float32)
    batch = partitioning.put_batch({'tokens': tokens, 'scores': scores, 'label': label}, mesh)
    state = [transformer.create_state(recipe, mesh)]
    gc.collect()
    step = transformer.jit_step(recipe, state[0], mesh)

    def run() -> None:
        state[0], metrics = step(state[0], batch)
        if not metrics['finite']:
            raise FloatingPointError('our step is not finite')

    def plain_step(state):
        keys = transformer.draw_keys(recipe, state.step, TRAINING_BATCH).masking
        return transformer.update(recipe, state, transformer.make_example(recipe, keys, tokens, scores, label))

    return run, lambda: count_operations(jax.make_jaxpr(plain_step)(state[0]).jaxpr).total()


def pytorch_sizes(options: argparse.Namespace):
    """The oracle's sizes."""
    from oracle.torch_transformer import Sizes

    return Sizes(CODES, CLASSES, options.length, options.layers, options.width, options.width // HEAD_WIDTH)


@functools.cache
def pytorch_trainer(sizes):
    """The oracle of these sizes with a batch; half of its tokens are masked beforehand."""
    import torch
    from oracle.torch_transformer import Trainer

    torch.manual_seed(0)
    trainer, tokens = Trainer(sizes), torch.from_numpy(make_tokens(sizes.length)).long()
    corrupted = torch.where(torch.rand(tokens.shape) < 0.5, CODES, tokens)
    return trainer, (corrupted, tokens, torch.arange(TRAINING_BATCH) % CLASSES, torch.ones_like(tokens).bool())


@functools.cache
def pytorch_encoder(length: int) -> Callable:
    """The oracle's stage 1 as the published code uses it in every step of stage 2, with a batch of volumes."""
    import torch
    from oracle import torch_vqgan

    torch.manual_seed(0)
    network = torch_vqgan.VQGAN(torch_vqgan.Sizes(classifier_hidden=32))  # nothing here reads the classifier
    volumes = torch.from_numpy(make_volumes(length)).movedim(-1, 1)

    @torch.no_grad()
    def encode():
        latent = network.pre_quantisation(network.encoder(volumes))
        network.scorer(latent)
        normalised, *_, tokens = network.codebook(latent)
        network.codebook.update(normalised, tokens)
        return tokens.flatten(1)

    return encode


def pytorch_step(options: argparse.Namespace, fused: bool, encodes: bool = False) -> Side:
    """The oracle's step, likewise; the same network whether fused or not."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    trainer, (corrupted, tokens, *rest) = pytorch_trainer(pytorch_sizes(options))

    def step() -> float:
        targets = pytorch_encoder(options.length)() if encodes else tokens
        return trainer.step(corrupted, targets, *rest)

    def run() -> None:
        trainer.fuse(fused)
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION if fused else SDPBackend.MATH):
            if not math.isfinite(step()):
                raise FloatingPointError("PyTorch's step is not finite")

    def count() -> float:
        """Of plain attention, since the counter does not know the fused one of CPUs."""
        with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
            step()
        return counter.get_total_flops()

    return run, count


STEPS = {
    'PyTorch, as published': functools.partial(pytorch_step, fused=False, encodes=True),
    'PyTorch, plain': functools.partial(pytorch_step, fused=False),
    'PyTorch, fused': functools.partial(pytorch_step, fused=True),
    'ours': our_step,
}


def pytorch_product_rate() -> float:
    """Operations a second of PyTorch's 4096 x 4096 float32 matrix product."""
    import torch

    a = torch.ones((4096, 4096))
    return 2 * 4096**3 / seconds(lambda: a @ a)[0]


def measure_training(options: argparse.Namespace, arguments: Sequence[str], rate: float) -> None:
    """Measures both sides' training steps and prints their table."""
    memory = {name: peak_memory(__file__, arguments, name) for name in STEPS}
    theirs = max(pytorch_product_rate() for _ in range(RATES))
    print(
        f'\nTraining step, batch {TRAINING_BATCH}; matrix product {rate / 1e9:.0f} GFLOP/s, '
        f"PyTorch's {theirs / 1e9:.0f}\n"
    )
    compare_steps({name: make(options) for name, make in STEPS.items()}, memory, options.repeats, rate)


def bandwidth() -> float:
    """Bytes of memory read a second: the best of products of a gigabyte's matrix with a vector."""
    matrix, vector = jnp.ones((16384, 16384)), jnp.ones((1, 16384))
    product = jax.jit(lambda vector, matrix: jnp.einsum('bi,oi->bo', vector, matrix))
    product(vector, matrix).block_until_ready()
    return matrix.nbytes / min(seconds(lambda: product(vector, matrix).block_until_ready())[0] for _ in range(9))


def make_params(recipe: transformer.Recipe) -> dict:
    """Our network's first parameters, without an optimiser's state."""
    ids = jnp.zeros((1, recipe.model.positions), jnp.int32)
    return jax.jit(lambda key: recipe.model.init(key, ids)['params'])(jax.random.key(0))


def our_sampler(recipe: transformer.Recipe, params: dict, batch: int, length: int) -> Callable[[], None]:
    """Compiles the sampler of this kind of network; returns a function that draws a batch."""
    decode = {'autoregressive': decoding.autoregressive, 'parallel': decoding.parallel}
    method, sampling = decode[decoding.method_of(recipe.model)], decoding.Sampling(passes=PARALLEL_PASSES)

    def draw(params, keys, labels, given):
        return method(recipe.model, params, keys, labels, given, CODES, sampling)

    keys, labels = jax.random.split(jax.random.key(0), batch), jnp.arange(batch, dtype=jnp.int32) % CLASSES
    arrays = params, keys, labels, jnp.full((batch, length), decoding.UNKNOWN, jnp.int32)
    compiled = jax.jit(draw).lower(*arrays).compile()
    return lambda: compiled(*arrays).block_until_ready()


def pytorch_passes(options: argparse.Namespace, batch: int) -> dict[int, Callable[[], None]]:
    """Forward passes of the oracle as its sampler takes them, by the length of what they read."""
    import torch
    from oracle.torch_transformer import GPT

    network = GPT(pytorch_sizes(options))

    def make(length: int) -> Callable[[], None]:
        ids = torch.zeros((batch, length), dtype=torch.long)

        @torch.no_grad()
        def run() -> None:
            network(ids)

        return run

    lengths = np.linspace(1, options.length, PREFIXES).round().astype(int)
    return {int(length): make(int(length)) for length in lengths}


def add_up(times: dict[int, float], length: int) -> float:
    """The sum over all lengths from 1, from the times at a few of them."""
    return float(np.interp(np.arange(1, length + 1), list(times), list(times.values())).sum())


def weights(params: dict) -> tuple[int, int]:
    """Numbers that a token needs of a network's parameters: all but the embeddings, and of these the kernels."""
    leaves = jax.tree.leaves_with_path({name: part for name, part in params.items() if not name.endswith('_embedding')})
    kernels = [leaf for path, leaf in leaves if path[-1].key == 'kernel']
    return sum(leaf.size for _, leaf in leaves), sum(kernel.size for kernel in kernels)


def measure_sampling(options: argparse.Namespace, rate: float) -> None:
    """Measures both sides' samplers and prints their tables."""
    recipe = make_recipe(options)
    params = jax.jit(decoding.drawing_params, static_argnums=0)(recipe.model, make_params(recipe))
    read, multiplied = weights(params)
    speed = bandwidth()
    rows, notes = [], []
    for batch in SAMPLING_BATCHES:
        run, passes = our_sampler(recipe, params, batch, options.length), pytorch_passes(options, batch)
        for run_pass in passes.values():  # warms up; ours is compiled, and of hundreds of tokens the first tells little
            run_pass()
        times, of_passes = [], {length: [] for length in passes}
        for _ in range(options.repeats):
            times.append(seconds(run)[0] / batch)
            for length, run_pass in passes.items():
                of_passes[length].append(seconds(run_pass)[0])
        ours = statistics.median(times)
        medians = {length: statistics.median(values) for length, values in of_passes.items()}
        theirs = add_up(medians, options.length) / batch
        floors = 4 * read * options.length / speed / batch, 2 * multiplied * options.length / rate
        rows.append(
            f'| {batch} | {ours:.2f} ({", ".join(f"{value:.2f}" for value in times)}) | {floors[0]:.2f} '
            f'| {floors[1]:.2f} | {ours / max(floors):.2f} | {theirs:.1f} | {theirs / ours:.0f} |'
        )
        notes.append(f'batch {batch}: ' + ', '.join(f'{value:.3f} s at {n}' for n, value in medians.items()))
    print(f'\nSampling; memory {speed / 1e9:.1f} GB/s, matrix product {rate / 1e9:.0f} GFLOP/s; seconds a sample\n')
    print('| batch | ours (all) | floor: weights | floor: products | ours / higher floor | PyTorch | PyTorch / ours |')
    print('| --- | --- | --- | --- | --- | --- | --- |')
    print(*rows, sep='\n')
    print('\nA pass of PyTorch, by the length of what it reads: ' + '; '.join(notes))


def measure_narrow_weights(options: argparse.Namespace) -> None:
    """Measures what weights of fewer bytes give to a token's products, and prints the table.

    One row times a matrix a layer, [4 width, width], either way that XLA has for it: as a product, and as a sum of what
    is multiplied number by number.
    """
    shape = options.layers, 4 * options.width, options.width
    wide = jax.random.normal(jax.random.key(0), shape)
    row, scales = jnp.ones(options.width), jnp.full(shape[:2], 1 / 32)
    ways = {
        'as a product': lambda row, matrix: jnp.einsum('i,oi->o', row, matrix, preferred_element_type=jnp.float32),
        'as a sum': lambda row, matrix: jnp.sum(row.astype(jnp.float32) * matrix.astype(jnp.float32), -1),
    }
    print('\n| weights | ' + ' | '.join(f'{way}, ms' for way in ways) + ' |\n' + '| --- ' * (1 + len(ways)) + '|')
    for dtype in (jnp.float32, jnp.bfloat16, jnp.int8):
        # As separate arrays, as the sampler has them: slices of one would be copied.
        matrices = list((wide * 32).astype(dtype) if dtype == jnp.int8 else wide.astype(dtype))
        of_row = jnp.float32 if dtype == jnp.int8 else dtype
        times = []
        for way in ways.values():

            def products(row, matrices, scales, way=way, of_row=of_row):
                for matrix, scale in zip(matrices, scales, strict=True):  # each from the one before, as layers are
                    result = way(row.astype(of_row), matrix)
                    row = row + (result * scale if matrix.dtype == jnp.int8 else result)[: options.width] * 1e-6
                return row

            compiled = jax.jit(products).lower(row, matrices, scales).compile()
            run = functools.partial(compiled, row, matrices, scales)
            run().block_until_ready()
            times.append(min(seconds(lambda run=run: run().block_until_ready())[0] for _ in range(9)))
        print(f'| {jnp.dtype(dtype).name} | ' + ' | '.join(f'{1e3 * value:.1f}' for value in times) + ' |')


def measure_parallel(options: argparse.Namespace, rate: float) -> None:
    """Measures parallel decoding and prints its table."""
    recipe = make_recipe(options, 'bidirectional')
    params = make_params(recipe)
    _, multiplied = weights(params)
    run = our_sampler(recipe, params, PARALLEL_BATCH, options.length)
    times = [seconds(run)[0] / PARALLEL_BATCH for _ in range(options.repeats)]
    ours = statistics.median(times)
    floor = 2 * multiplied * recipe.model.positions * PARALLEL_PASSES / rate
    print(f'\nParallel decoding of {PARALLEL_PASSES} passes; seconds a sample\n')
    print('| batch | ours (all) | floor: products | ours / floor |')
    print('| --- | --- | --- | --- |')
    print(
        f'| {PARALLEL_BATCH} | {ours:.2f} ({", ".join(f"{value:.2f}" for value in times)}) | {floor:.2f} '
        f'| {ours / floor:.2f} |'
    )


def main(arguments: list[str]) -> None:
    """Measures and prints the tables; with --memory, the figure of one side."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--layers', type=int, default=24)
    parser.add_argument('--width', type=int, default=1024, help=f'of each layer, a multiple of {HEAD_WIDTH}')
    parser.add_argument('--length', type=int, default=512, help=f'tokens, a multiple of {math.prod(SLICE)}')
    parser.add_argument('--repeats', type=int, default=3, help='timed runs of each side')
    parser.add_argument('--only', choices=('train', 'sample'), help='measure one of the two')
    parser.add_argument('--memory', choices=tuple(STEPS), help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    if options.width % HEAD_WIDTH or options.length % math.prod(SLICE):
        parser.error(f'--width has to divide by {HEAD_WIDTH}, --length by {math.prod(SLICE)}')

    if options.memory:
        run, _ = STEPS[options.memory](options)
        for _ in range(MEMORY_STEPS):
            run()
        print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
        return

    print(
        f'{options.layers} x {options.width}, {options.length} tokens, float32, {os.cpu_count()} cores, '
        f'load before the start {os.getloadavg()[0]:.1f}'
    )
    rate = max(product_rate() for _ in range(RATES))
    if options.only != 'sample':
        measure_training(options, arguments, rate)
        gc.collect()
    if options.only != 'train':
        measure_sampling(options, rate)
        measure_narrow_weights(options)
        measure_parallel(options, rate)


if __name__ == '__main__':
    large_pages.ask()
    with compiler_memory.given_back():  # as a run does
        main(sys.argv[1:])
