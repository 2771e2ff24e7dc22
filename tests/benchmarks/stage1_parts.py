"""Where does the time of a training step of stage 1 go?

    python tests/benchmarks/stage1_parts.py [--side=128] [--config.FIELD=VALUE …]

One step of our side of `stage1_step.py` is traced by JAX's profiler. Each moment counts for what runs then, in equal
shares where several operations run side by side; moments in which none is seen (an asynchronous product, the loops'
own work, waiting) have a row of their own. An operation belongs to the module in whose name it was traced, or the loop
that it is in, forward and backward together. Products are those of matrices and convolutions. Prints a Markdown table.
"""

import argparse
import collections
import re
import sys
import tempfile
from pathlib import Path

import jax
from stage1_step import count_operations, make_step, product_rate, settings

from vqroi_jax import hlo, large_pages

PARTS = {  # by what the name of an operation contains, the first that does
    'optimiser': r'\boptimizer/',
    'LPIPS': r'\bLPIPS\b',
    'discriminator': r'\bDiscriminator\b',
    'image gradient': r'image_gradient',
    'scorer and classifier': r'\b(scorer|classifier)\b',
    'encoder': r'\bencoder/',
    **{f'decoder, level {level}': rf'\bdecoder/(conv|norm|block)_{level}(_|/)' for level in range(9)},
}
OTHER, UNSEEN = 'everything else', 'not seen by the profiler'
PRODUCTS = re.compile(r'ynn|dot|conv(?!ert)')
CONTAINERS = re.compile(r'(while|call|conditional)\b')  # instructions that run others


def part_of(name: str) -> str:
    """The part of the step that an operation of this name belongs to."""
    return next((part for part, pattern in PARTS.items() if re.search(pattern, name)), OTHER)


def time_by_part(trace: Path, names: dict[str, str]) -> tuple[collections.Counter, collections.Counter]:
    """Seconds of each part in a trace, and of those the seconds of products."""
    (file,) = trace.rglob('*.xplane.pb')
    changes = []
    for plane in jax.profiler.ProfileData.from_file(str(file)).planes:
        for line in plane.lines:
            for event in line.events:
                if event.name in names and not CONTAINERS.match(event.name):
                    changes += [(event.start_ns, 1, event.name), (event.start_ns + event.duration_ns, -1, event.name)]
    changes.sort()
    times, products, last = collections.Counter(), collections.Counter(), changes[0][0]
    running: collections.Counter[str] = collections.Counter()
    for now, change, instruction in changes:
        share = (now - last) / 1e9 / max(len(running), 1)
        for one in running:
            times[part_of(names[one])] += share
            products[part_of(names[one])] += share if PRODUCTS.match(one) else 0
        times[UNSEEN] += 0 if running else share
        running[instruction] += change
        if not running[instruction]:
            del running[instruction]
        last = now
    return times, products


def main(arguments: list[str]) -> None:
    """Measures and prints the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('--side', type=int, default=128, help='voxels')
    options, fields = parser.parse_known_args(arguments)
    config = settings(options.side, fields)
    rate = product_rate()
    step, (state, batch, weights), plain_step = make_step(config)
    compiled = step.lower(state, batch, weights).compile()
    for _ in range(2):
        state, metrics = compiled(state, batch, weights)
        jax.block_until_ready(metrics)
    with tempfile.TemporaryDirectory() as folder:
        detailed = jax.profiler.ProfileOptions()
        detailed.host_tracer_level, detailed.python_tracer_level = 3, 0
        with jax.profiler.trace(folder, profiler_options=detailed):
            state, metrics = compiled(state, batch, weights)
            jax.block_until_ready(metrics)
        times, products = time_by_part(Path(folder), hlo.operation_names(compiled.as_text()))
    tera = collections.Counter()
    for name, number in count_operations(jax.make_jaxpr(plain_step)(state, batch).jaxpr).items():
        tera[part_of(name)] += number / 1e12

    total = sum(times.values())
    print(f'{options.side}³, batch 1, float32, matrix product {rate / 1e9:.0f} GFLOP/s; a step of {total:.2f} s\n')
    print('| part | ms | share | of it products | TFLOP | GFLOP/s |')
    print('| --- | --- | --- | --- | --- | --- |')
    for part, seconds in times.most_common():
        print(
            f'| {part} | {1e3 * seconds:.0f} | {100 * seconds / total:.0f} % | {100 * products[part] / seconds:.0f} % '
            f'| {tera[part]:.2f} | {1e3 * tera[part] / seconds:.0f} |'
        )


if __name__ == '__main__':
    large_pages.ask()
    main(sys.argv[1:])
