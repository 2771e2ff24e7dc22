"""Checkpoints of the authors' PyTorch code: read into runs of ours, and runs of ours written as such files.

    python -m vqroi_jax.main --config=configs/convert.py --config.release=epoch_4999.pt --workdir=runs/theirs
    python -m vqroi_jax.main --config=configs/convert.py --config.run=runs/transformer --workdir=runs/ours_as_theirs

A file's tensors tell which stage it is of. A stage 1 file makes --workdir a run of stage 1; a stage 2 file, which
brings its own stage 1, makes it a run of stage 2 with that stage 1 in its subfolder `vqgan`. Such runs can be sampled
from, encode, and feed stage 2; they cannot be trained further, for the files have no discriminator and no state of
stage 2's optimiser. Tensors that a run has no place for are kept in the subfolder `release`, so that writing it gives
the file back, bit by bit. The other way, a run is written to `vqgan.pth` or `transformer.pth`.

Needs PyTorch: pip install "vqroi_jax[convert]".
"""

import pathlib
import runpy

import ml_collections

VARIANTS = ('paper',)


def get_config(variant: str = 'paper') -> ml_collections.ConfigDict:
    """Settings of the task `convert`."""
    if variant not in VARIANTS:
        raise ValueError(f'configs/convert.py has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
    config = ml_collections.ConfigDict()
    config.task = 'convert'
    # One of the two:
    config.release = ''  # the file to read, of either stage
    config.run = ''  # the run to write as a file: its folder, of either stage

    config.checkpoint = 'latest'  # of `run`: 'latest', 'best' or a step
    config.vqgan_workdir = ''  # of `run`, if it is of stage 2: its stage 1; empty: where the run says

    # What a file that is read does not tell, and whoever uses it must know.
    config.classes = ('LGG', 'HGG')  # names in the order of their numbers
    config.spacing = (1.0, 1.0, 1.0)  # mm a voxel: depth, height, width; (): not known
    config.synthetic = False  # whether it was trained on phantoms
    config.grid = ()  # latent regions: depth, height, width; (): as many along each
    config.step = 1  # number that its checkpoint gets; files have none

    # The configs that the runs get. What is empty or 0 here the file tells; if it is given, it has to agree with it.
    # `vqgan.data.path`, the prepared cohort that it was trained on, if at hand, is what stage 2 is then trained on.
    config.vqgan = vqgan = _stage('vqgan')
    vqgan.data.roi_size = ()
    vqgan.model.channels = vqgan.model.encoder_res_blocks = vqgan.model.decoder_res_blocks = ()
    vqgan.model.hidden = vqgan.model.code_features = vqgan.model.classifier_hidden = vqgan.codebook.codes = 0
    vqgan.model.num_groups = 8  # not in the file: the authors' code has 8
    vqgan.discriminator.channels = ()  # the file has none
    vqgan.perceptual = 'none'  # for training alone
    vqgan.training.duration = ''
    config.transformer = transformer = _stage('transformer')
    transformer.model.layers = transformer.model.width = 0
    transformer.model.heads = 16  # not in the file: the authors' code has 16
    transformer.training.duration = ''
    return config


def _stage(name: str) -> ml_collections.ConfigDict:
    """The config of a stage, with the authors' settings."""
    return runpy.run_path(str(pathlib.Path(__file__).with_name(f'{name}.py')))['get_config']('release')
