"""New tumours: samples of a trained stage 2 as NIfTI files, so many of each class.

    python -m vqroi_jax.main --config=configs/generate.py --config.transformer_workdir=runs/transformer \
        --workdir=runs/samples

Leaves `samples/CLASS/CLASS_0000.nii.gz` ..., `manifest.csv` and `figures/samples.png`. The same command again goes on
where it was stopped. A sample depends on the checkpoint, the seed, its class, its number and the `sampling` block only,
so a larger `number` begins with the same samples.

Variants: `paper` (default), `demo` and `smoke` (few samples, for the phantoms' models).
"""

import ml_collections

VARIANTS = ('paper', 'demo', 'smoke')


def get_config(variant: str = 'paper') -> ml_collections.ConfigDict:
    """Settings of the task `generate`."""
    if variant not in VARIANTS:
        raise ValueError(f'configs/generate.py has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
    config = ml_collections.ConfigDict()
    config.task = 'generate'
    config.transformer_workdir = ''  # the run of stage 2 to sample from
    config.vqgan_workdir = ''  # its run of stage 1; empty: where the stage 2 run says
    # Of stage 2: 'latest', 'best' or a step. A generation that goes on keeps the step that it began with.
    config.checkpoint = 'latest'
    config.seed = 0  # of the samples, 0 to 2**32 - 1
    config.number = 250  # samples of each class
    config.classes = ()  # names of those to sample; empty: all that the model knows
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # devices that share the samples; -1: all

    config.sampling = sampling = ml_collections.ConfigDict()
    sampling.method = ''  # 'autoregressive' or 'parallel'; empty: what fits the model's attention
    sampling.temperature = 1.0  # of the logits; 0: always the likeliest token
    sampling.top_k = 0  # draw from so many of the likeliest tokens; 0: from all
    sampling.top_p = 1.0  # draw from the likeliest tokens that together have this probability; 1: from all
    sampling.guidance = 0.0  # weight of classifier-free guidance; 0: none. Needs a model trained with label dropout
    sampling.passes = 12  # of parallel decoding through the network
    sampling.choice_temperature = 4.5  # of parallel decoding: noise on which tokens are kept, at the first pass
    sampling.sub_batch = 16  # samples computed together on a device; part of what a sample is, to the last bit

    config.intensity = intensity = ml_collections.ConfigDict()
    # Intensity of the brightest voxel that the model can draw; the background is 0. 1: samples in [0, 1]; or the
    # tumours' maximum on a scanner's FLAIR.
    intensity.maximum = 1.0
    # Voxels below this share of the maximum count as background and are set to 0, unless tumour encloses them.
    intensity.background = 0.05

    # NIfTI file whose affine the samples get, turned to its axes. Empty: the axes of BraTS, voxels of the size that the
    # model was trained on (1 mm if not known), and the ROI's middle at 0 mm.
    config.reference = ''

    config.paste = paste = ml_collections.ConfigDict()  # each sample also into a brain: pasted/CLASS/CLASS_0000.nii.gz
    paste.brain = ''  # NIfTI file to paste into; empty: none
    paste.centre = ()  # its voxel (i, j, k) where the ROI's middle goes; the ROI is turned to the brain's axes
    # Intensity there of the brightest voxel that the model can draw; 0: the brain's own 99.5th percentile.
    paste.maximum = 0.0

    config.figure_samples = 8  # samples of each class in figures/samples.png

    if variant == 'demo':
        config.number = 100
        sampling.guidance = 0.5
        intensity.background = 0.3  # voxels are coarse and edges soft, so the border lies higher up
        sampling.sub_batch = 25
    if variant == 'smoke':
        config.number = 4
        sampling.passes = 4
        sampling.sub_batch = 2
    return config
