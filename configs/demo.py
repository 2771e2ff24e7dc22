"""The whole pipeline, small, on synthetic phantoms: minutes on a laptop's CPU.

    python -m vqroi_jax.main --config=configs/demo.py --workdir=runs/demo

Each stage takes the `demo` variant of its own config. Variants: `demo` (default) and `smoke` (seconds, for tests).
"""

import pathlib
import runpy

import ml_collections

VARIANTS = ('demo', 'smoke')


def get_config(variant: str = 'demo') -> ml_collections.ConfigDict:
    """Settings of the task `demo`: one block a stage, each as that stage's own config file has it."""
    if variant not in VARIANTS:
        raise ValueError(f'configs/demo.py has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
    config = ml_collections.ConfigDict()
    config.task = 'demo'
    for stage in ('prepare', 'vqgan'):
        file = pathlib.Path(__file__).with_name(f'{stage}.py')
        config[stage] = runpy.run_path(str(file))['get_config'](variant)
    return config
