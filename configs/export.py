"""A trained generator as one file, `generator.zip`, that draws new tumours without this package.

    python -m vqroi_jax.main --config=configs/export.py --config.transformer_workdir=runs/transformer \
        --workdir=runs/export

Leaves `generator.zip` and `README.txt`, which says how to use it. Its samples are those of configs/generate.py for the
same checkpoint, seed, class, number and `sampling` block.

Variants: `paper` (default), `demo` and `smoke` (for the phantoms' models).
"""

import pathlib
import runpy

import ml_collections

VARIANTS = ('paper', 'demo', 'smoke')


def get_config(variant: str = 'paper') -> ml_collections.ConfigDict:
    """Settings of the task `export`."""
    if variant not in VARIANTS:
        raise ValueError(f'configs/export.py has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
    config = ml_collections.ConfigDict()
    config.task = 'export'
    config.transformer_workdir = ''  # the run of stage 2 to export
    config.vqgan_workdir = ''  # its run of stage 1; empty: where the stage 2 run says
    config.checkpoint = 'latest'  # of stage 2: 'latest', 'best' or a step
    config.platforms = ('cpu', 'cuda', 'tpu')  # that the file can draw on; also 'rocm'
    generate = runpy.run_path(str(pathlib.Path(__file__).with_name('generate.py')))
    config.sampling = generate['get_config'](variant).sampling  # fixed in the file; see configs/generate.py
    return config
