"""Stage 2: a class-conditional transformer that learns to draw the tokens of stage 1.

    python -m vqroi_jax.main --config=configs/transformer.py --config.vqgan_workdir=runs/vqgan \
        --workdir=runs/transformer

Variants: `paper` (default: 24 layers of width 1024, 5,000 epochs), `v5e_16` (the same on 16 chips of a TPU v5e,
topology 4x4; what it changes and why stands below), `release` (the authors' published code's choices in masking),
`bidirectional` (fills masks in both directions, and samples in a few passes), `demo` (6³ tokens of phantoms, minutes on
a CPU) and `smoke` (under a minute on a CPU, for tests). Durations are text, '2000 epochs' or '500 steps'; inside the
program everything is counted in steps. Sizes of tokens and codebook, and the classes, are stage 1's.
"""

import pathlib
import runpy

import ml_collections

VARIANTS = ('paper', 'v5e_16', 'release', 'bidirectional', 'demo', 'smoke')


def get_config(variant: str = 'paper') -> ml_collections.ConfigDict:
    """Settings of the task `transformer`."""
    if variant not in VARIANTS:
        raise ValueError(f'configs/transformer.py has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
    config = ml_collections.ConfigDict()
    config.task = 'transformer'
    config.seed = 0  # of initial values, shuffling and every draw in training

    config.vqgan_workdir = ''  # folder of a finished run of configs/vqgan.py
    config.vqgan_checkpoint = 'latest'  # of it: 'latest', 'best', or a step such as '8000'
    config.data = ml_collections.ConfigDict()
    config.data.path = ''  # a folder prepared by configs/prepare.py; empty: stage 1's cohort, with the same splits

    config.dtype = 'float32'  # of products and activations: 'float32' or 'bfloat16'; the rest is float32
    config.batch_size = 3  # ROIs a step, over all devices and hosts
    config.micro_batches = 1  # parts that a step is computed in, one after the other, to save memory
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # devices that share the batch; -1, in one of the three: all that are left
    config.mesh.fsdp = 1  # devices that share the batch and all parameters and optimiser states: less memory
    config.mesh.model = 1  # devices that share the work of each layer, by its units; divides the heads
    config.print_shardings = False  # print where every parameter would live, and how many bytes of a device, and end

    config.model = model = ml_collections.ConfigDict()
    model.layers = 24
    model.width = 1024  # numbers a token
    model.heads = 16  # of attention, which divide the width
    model.attention = 'causal'  # or 'bidirectional': reads all tokens, and is sampled in parallel
    # What the backward pass computes again: 'none', 'activations' (norms and GELU) or 'blocks' (each layer whole: less
    # memory, a third more time).
    model.remat = 'activations'

    config.masking = masking = ml_collections.ConfigDict()
    # Which tokens are corrupted: 'hybrid' (the paper's), 'random' or 'block' (pure [MASK]), 'random_ratio' (a share
    # drawn for each sample), or a function of your own as 'module:function'; see vqroi_jax/masking.py.
    masking.strategy = 'hybrid'
    masking.ratio = 0.5  # share of the tokens that is corrupted
    masking.top_k = 0.25  # share of the tokens, by importance, among which starts are drawn; 0: random codes alone
    masking.neighbours = 1  # that each start takes along: 1, or 2 (both sides)
    masking.neighbour_order = 'grid'  # or 'raster': across the ends of rows, as the release
    masking.adjacent_starts = 'keep'  # or 'drop' a start next to an earlier one, as the release
    masking.random_from = 'outside'  # where random codes go: 'outside' the top k, or 'anywhere'
    masking.keep_slice_links = True  # the last token of a slice and the first of the next are never starts
    masking.block = 2  # side of the blocks of the strategy 'block', in tokens
    config.loss_on = 'all'  # positions: 'all', or 'masked' (the corrupted ones)
    config.label_dropout = 0.0  # share of the labels replaced by none, for guidance in sampling; 0: no null class
    config.augment = ml_collections.ConfigDict()
    config.augment.flip = ()  # axes to mirror ROIs along at random: 'depth', 'height', 'width'

    config.optimizer = optimizer = ml_collections.ConfigDict()  # AdamW; kernels of linear layers decay
    optimizer.learning_rate = 4.5e-6  # at the first step
    optimizer.final_learning_rate = 1e-8  # at the last step, along half a cosine
    optimizer.b1 = 0.9
    optimizer.b2 = 0.95
    optimizer.epsilon = 1e-8
    optimizer.clip_value = 0.0  # largest absolute gradient of a parameter; 0: no clipping
    optimizer.weight_decay = 0.01
    config.ema_decay = 0.0  # of the parameters for evaluation and sampling; 0: none

    config.training = training = ml_collections.ConfigDict()
    training.duration = '5000 epochs'
    training.log_every = '1 epochs'
    training.eval_every = '20 epochs'
    training.figures_every = '100 epochs'
    training.checkpoint_every = '20 epochs'
    training.keep_last = 2  # checkpoints
    training.keep_best = 1  # checkpoints, by the metric below
    training.best_metric = 'val/cross_entropy'
    training.best_mode = 'min'  # or 'max'
    training.on_nonfinite = 'stop'  # at a loss that is not finite: 'stop', or 'skip' the update and count it
    config.eval_batch_size = 3  # ROIs an evaluation step, over all devices and hosts; more if they do not divide them
    config.figure_rois = 4  # held-out ROIs in each figure
    config.sampling = _sampling(variant)  # of the figures; see configs/generate.py

    if variant == 'v5e_16':
        # Three ROIs a chip, which take 7 of its 16 GiB (configs/plan.py; 17 would fit). As many epochs as before, so as
        # many samples seen, in 1/16 of the steps; the learning rates grow with the square root of the batch, as fits
        # Adam (Malladi et al. 2022).
        config.dtype = 'bfloat16'
        config.batch_size = config.eval_batch_size = 48
        optimizer.learning_rate = 1.8e-5
        optimizer.final_learning_rate = 4e-8
    if variant == 'release':
        masking.neighbour_order = 'raster'
        masking.adjacent_starts = 'drop'
        masking.random_from = 'anywhere'
    if variant == 'bidirectional':
        model.attention = 'bidirectional'
        masking.strategy = 'random_ratio'
        config.loss_on = 'masked'
        config.label_dropout = 0.1
    if variant in ('demo', 'smoke'):
        config.batch_size = config.eval_batch_size = 16
        model.layers = 4
        model.width = 128
        model.heads = 2
        # A network this small takes the first tokens of a tumour for random codes where these are many, and so draws
        # tumours too small (at .1 by a third).
        masking.ratio = 0.02
        config.label_dropout = 0.1
        config.augment.flip = ('depth', 'height', 'width')
        config.ema_decay = 0.98
        optimizer.learning_rate = 1.2e-3
        optimizer.final_learning_rate = 1e-5
        optimizer.b2 = 0.98
        training.duration = '700 steps'
        training.log_every = '25 steps'
        training.eval_every = '100 steps'
        training.figures_every = '350 steps'
        training.checkpoint_every = '175 steps'
    if variant == 'smoke':
        config.batch_size = config.eval_batch_size = 8
        model.layers = 2
        model.width = 32
        masking.ratio = 0.5
        config.label_dropout = config.ema_decay = 0.0
        config.augment.flip = ()
        optimizer.learning_rate = 3e-3
        training.duration = '12 steps'
        training.log_every = '2 steps'
        training.eval_every = '6 steps'
        training.figures_every = '12 steps'
        training.checkpoint_every = '6 steps'
    return config


def _sampling(variant: str) -> ml_collections.ConfigDict:
    generate = runpy.run_path(str(pathlib.Path(__file__).with_name('generate.py')))
    return generate['get_config'](variant if variant in ('demo', 'smoke') else 'paper').sampling
