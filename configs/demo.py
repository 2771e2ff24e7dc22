"""The whole pipeline, small, on synthetic phantoms: minutes on a laptop's CPU.

    python -m vqroi_jax.main --config=configs/demo.py --workdir=runs/demo

Each stage takes the `demo` variant of its own config. Variants: `demo` (default), `bidirectional` (stage 2 fills masks
in both directions and samples in a few passes) and `smoke` (a minute or two, for tests).
"""

import pathlib
import runpy

import ml_collections

VARIANTS = ('demo', 'bidirectional', 'smoke')


def get_config(variant: str = 'demo') -> ml_collections.ConfigDict:
    """Settings of the task `demo`: one block a stage, each as that stage's own config file has it."""
    if variant not in VARIANTS:
        raise ValueError(f'configs/demo.py has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
    config = ml_collections.ConfigDict()
    config.task = 'demo'
    for stage in ('prepare', 'vqgan', 'transformer', 'generate', 'evaluate'):
        file = pathlib.Path(__file__).with_name(f'{stage}.py')
        config[stage] = runpy.run_path(str(file))['get_config']('smoke' if variant == 'smoke' else 'demo')
    if variant == 'bidirectional':
        config.transformer.model.attention = 'bidirectional'
        config.transformer.masking.strategy = 'random_ratio'
        config.transformer.loss_on = 'masked'
    return config
