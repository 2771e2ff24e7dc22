"""Stage 1: a 3D VQGAN that turns tumour ROIs into tokens and back, with an importance score a region.

    python -m vqroi_jax.main --config=configs/vqgan.py --config.data.path=BRATS --workdir=runs/vqgan

Variants: `paper` (default: 128³, 10,000 epochs), `light` (a decoder without its ResBlock at full resolution), `v5e_16`
(`paper` on 16 chips of a TPU v5e, topology 4x4; what it changes and why stands below), `release` (the learning rates of
the authors' published code), `demo` (24³ phantoms, minutes on a CPU) and `smoke` (under a minute on a CPU, for tests).
Durations are text, '2000 epochs' or '500 steps'; inside the program everything is counted in steps.
"""

import pathlib
import runpy

import ml_collections

VARIANTS = ('paper', 'light', 'v5e_16', 'release', 'demo', 'smoke')


def get_config(variant: str = 'paper') -> ml_collections.ConfigDict:
    """Settings of the task `vqgan`."""
    if variant not in VARIANTS:
        raise ValueError(f'configs/vqgan.py has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
    config = ml_collections.ConfigDict()
    config.task = 'vqgan'
    config.seed = 0  # of initial values, shuffling and every draw in training
    config.data = _data(variant)  # see configs/prepare.py

    config.dtype = 'float32'  # of products and activations: 'float32' or 'bfloat16'; the rest is float32
    config.batch_size = 3  # ROIs a step, over all devices and hosts
    config.micro_batches = 1  # parts that a step is computed in, one after the other, to save memory
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # devices that share the batch; -1, in one of the three: all that are left
    config.mesh.fsdp = 1  # devices that share the batch and all parameters and optimiser states: less memory
    # Devices that share each ROI, by its depth slices, for ROIs or batches too large for one; with the two above it
    # makes the number of devices. It divides the latent grid's depth (8 at 128³).
    config.mesh.spatial = 1
    config.print_shardings = False  # print where every parameter would live, and how many bytes of a device, and end

    config.model = model = ml_collections.ConfigDict()
    model.channels = (32, 64, 128, 256)  # after each halving of the volume; the decoder mirrors them
    model.hidden = 512  # channels between the networks and the 1x1x1 convolutions around the codebook
    model.code_features = 128  # numbers a code
    model.num_groups = 8  # of the group normalisations
    model.encoder_res_blocks = (1, 1, 1, 1)  # after each halving
    model.decoder_res_blocks = (1, 1, 1, 1)  # after each doubling, from the latent grid outwards
    model.classifier_hidden = 1024  # width of the auxiliary classifier's hidden layer
    model.classifier_dropout = 0.2  # share of it dropped in training
    # What the backward pass computes again, to save memory: 'none', 'activations' (norms and activations: cheap)
    # or 'blocks' (the inside of each ResBlock: a third more time).
    model.remat = 'activations'

    config.discriminator = ml_collections.ConfigDict()
    config.discriminator.channels = (64, 128, 256, 512)  # after each halving; sides of at least 4 * 2**len

    config.codebook = codebook = ml_collections.ConfigDict()
    codebook.codes = 1024
    codebook.decay = 0.99  # of the moving averages
    codebook.beta = 1.0  # of the commitment term
    codebook.warmup = '0 steps'  # without quantisation, before k-means gives the codes their first values
    codebook.init_batches = 1  # global batches whose latent vectors k-means sees
    codebook.kmeans_rounds = 10
    codebook.dead_below = 0.01  # assignments a step (moving average) under which a code counts as dead
    codebook.restart_every = '0 steps'  # put dead codes onto current latent vectors; 0: never

    config.perceptual = 'vgg16'  # LPIPS on VGG16, or 'none'
    config.losses = losses = ml_collections.ConfigDict()
    losses.generator = 0.8  # weight of all reconstruction terms together
    losses.classification = 0.2  # weight of the auxiliary cross-entropy
    losses.l1 = 4.0
    losses.lpips = 1.0
    losses.commitment = 1.0
    losses.feature_matching = 4.0
    losses.image_gradient = 4.0
    losses.slices = 6  # axial slices of a sample that LPIPS sees
    losses.label_smoothing = 0.1
    losses.adversarial_start = '2000 epochs'  # of the adversarial and the discriminator's terms
    losses.adversarial_ramp = '0 steps'  # over which the adversarial weight grows to its full value

    config.optimizer = optimizer = ml_collections.ConfigDict()  # Adam, one for each of the two networks
    optimizer.learning_rate = 1e-4  # at the first step
    optimizer.final_learning_rate = 0.0  # at the last step, along half a cosine
    optimizer.b1 = 0.5
    optimizer.b2 = 0.9
    optimizer.epsilon = 1e-8
    optimizer.clip_value = 1.0  # largest absolute gradient of a parameter; 0: no clipping
    config.ema_decay = 0.0  # of the generator's parameters for evaluation and sampling; 0: none

    config.training = training = ml_collections.ConfigDict()
    training.duration = '10000 epochs'
    training.log_every = '1 epochs'
    training.eval_every = '20 epochs'
    training.figures_every = '100 epochs'
    training.checkpoint_every = '20 epochs'
    training.keep_last = 2  # checkpoints
    training.keep_best = 1  # checkpoints, by the metric below
    training.best_metric = 'val/l1'
    training.best_mode = 'min'  # or 'max'
    training.on_nonfinite = 'stop'  # at a loss that is not finite: 'stop', or 'skip' the update and count it
    config.eval_batch_size = 3  # ROIs an evaluation step, over all devices and hosts; more if they do not divide them
    config.figure_rois = 4  # held-out ROIs in each figure

    if variant == 'light':
        # The ResBlock at full resolution takes a quarter of a step's operations and has 1 of 170 decoder parameters.
        model.decoder_res_blocks = (1, 1, 1, 0)
    if variant == 'v5e_16':
        # One ROI a chip, which takes 7.0 of its 16 GiB (configs/plan.py). As many epochs as before, so as many samples
        # seen and the adversarial terms from the same one on, in 3/16 of the steps. The learning rate grows with the
        # square root of the batch, as fits Adam (Malladi et al. 2022); the codebook's decay is raised to the power of
        # 16/3, so that it forgets as fast by samples (Busbridge et al. 2023).
        config.dtype = 'bfloat16'
        config.batch_size = config.eval_batch_size = 16
        optimizer.learning_rate = 2.3e-4
        codebook.decay = 0.948
    if variant == 'release':
        # Not taken over: the generator's loss leaking into the discriminator's gradients (they are never cleared).
        optimizer.learning_rate = 5e-5
        optimizer.final_learning_rate = 3e-7
    if variant in ('demo', 'smoke'):
        config.batch_size = config.eval_batch_size = 8
        model.channels = (16, 32)
        model.hidden = 64
        model.code_features = 32
        model.encoder_res_blocks = (1, 1)
        model.decoder_res_blocks = (1, 0)  # a ResBlock at full resolution would take most of the time
        model.classifier_hidden = 128
        model.remat = 'none'
        config.discriminator.channels = (16, 32)
        config.perceptual = 'none'  # VGG16 would take half of the time
        codebook.codes = 128
        codebook.warmup = '60 steps'
        codebook.init_batches = 8
        codebook.restart_every = '50 steps'
        codebook.dead_below = 0.1
        losses.adversarial_start = '300 steps'
        losses.adversarial_ramp = '100 steps'
        optimizer.learning_rate = 6e-3
        optimizer.b1 = 0.9
        optimizer.b2 = 0.99
        training.duration = '1200 steps'
        training.log_every = '25 steps'
        training.eval_every = '200 steps'
        training.figures_every = '400 steps'
        training.checkpoint_every = '400 steps'
    if variant == 'smoke':
        model.channels = (8, 16)
        model.hidden = 32
        model.code_features = 8
        model.encoder_res_blocks = model.decoder_res_blocks = (0, 0)
        config.discriminator.channels = (8, 16)
        codebook.codes = 32
        codebook.warmup = '4 steps'
        codebook.init_batches = 2
        losses.adversarial_start = '8 steps'
        losses.adversarial_ramp = '0 steps'
        training.duration = '12 steps'
        training.log_every = '2 steps'
        training.eval_every = '6 steps'
        training.figures_every = '12 steps'
        training.checkpoint_every = '6 steps'
    return config


def _data(variant: str) -> ml_collections.ConfigDict:
    prepare = runpy.run_path(str(pathlib.Path(__file__).with_name('prepare.py')))
    return prepare['get_config']({'light': 'paper', 'release': 'paper', 'v5e_16': 'paper'}.get(variant, variant)).data
