"""What a run will need on a machine that one does not have: its real step, compiled for it here.

    python -m vqroi_jax.main --config=configs/plan.py --config.stage=vqgan --config.target=v5e:4x4 \
        --config.vqgan.dtype=bfloat16 --workdir=runs/plan

Leaves `plan.json` and `figures/plan.png`: memory a chip by kind, operations, memory traffic, exchanges between chips,
the least time a step and a run can take, and the largest batch that fits. TPU targets need `pip install
"vqroi_jax[tpu]"`, and no TPU. At paper scale each compilation takes minutes and some GB of memory; what was compiled is
kept in the workdir.

The blocks `vqgan`, `transformer` and `generate` are those of the stages' own config files. Variants are theirs too:
`paper` (default), `v5e_16`, `release`, `bidirectional`, `demo` and `smoke`; a stage that has no such variant takes
`paper`.
"""

import pathlib
import runpy

import ml_collections

STAGES = ('vqgan', 'transformer', 'generate')


def get_config(variant: str = 'paper') -> ml_collections.ConfigDict:
    """Settings of the task `plan`."""
    files = {stage: runpy.run_path(str(pathlib.Path(__file__).with_name(f'{stage}.py'))) for stage in STAGES}
    variants = sorted({name for file in files.values() for name in file['VARIANTS']})
    if variant not in variants:
        raise ValueError(f'configs/plan.py has no variant {variant!r}; choose one of {", ".join(variants)}')
    config = ml_collections.ConfigDict()
    config.task = 'plan'
    config.stage = 'vqgan'  # whose run is planned: 'vqgan', 'transformer' or 'generate'
    # Machine: a TPU topology such as 'v5e:4x4' or 'v5p:2x2x1'; 'cuda:h100' or 'cuda:a100' (one GPU; lowered for it, but
    # operations, memory and traffic are those of a program for this machine's CPU); or 'cpu' (this machine).
    config.target = 'v5e:4x4'

    config.cohort = cohort = ml_collections.ConfigDict()
    cohort.rois = 282  # in the training split, as published; of BraTS 2019, configs/prepare.py leaves 251
    cohort.classes = 2

    # Also look for the largest batch that fits, by three compilations or so for each of `remat`.
    config.search = variant != 'smoke'
    # Settings of the stage's `model.remat` to look with; empty: its own and all others. Generation has none.
    config.remat = ()
    config.margin = 0.03  # share of the chip's memory that a batch of the search leaves free

    for stage, file in files.items():
        config[stage] = file['get_config'](variant if variant in file['VARIANTS'] else 'paper')
    return config
