"""Do synthetic tumours make a classifier better? The paper's experiments, each a table from one command.

    python -m vqroi_jax.main --config=configs/classifier.py:experiment1 --config.real=runs/cohort \
        --config.fake=runs/new --workdir=runs/experiment1

An experiment has arms: what a 3D ResNet is pre-trained on, if at all, and what it is then trained on. Each arm is run
several times, validated on other patients each time, and tried on the real test split, which no generator and no arm
has seen. Leaves `metrics.json` (mean and standard deviation, t-tests against the baseline), `report.html`,
`figures/roc.png`, `figures/confusion.png`, and a run's folder for each part. The same command again goes on where it
was stopped.

Variants: `experiment1` (default; pre-training on real HGG or synthetic HGG, with synthetic LGG), `experiment2`
(pre-training on synthetic ROIs alone), `augmentation` (LGG brought to the number of HGG by traditional augmentation),
`transfer` (features of an earlier experiment's network are frozen and a new head learns, beside a network from
scratch), `medicalnet` (the same with a file of MedicalNet's weights) and `smoke` (seconds, for tests):

    --config=configs/classifier.py:transfer --config.arms.frozen.weights=runs/experiment2/parts/synthetic/run_0/pretrain
    --config=configs/classifier.py:medicalnet --config.arms.frozen.weights=resnet_34.pth
"""

import ml_collections

VARIANTS = ('experiment1', 'experiment2', 'augmentation', 'transfer', 'medicalnet', 'smoke')


def get_config(variant: str = 'experiment1') -> ml_collections.ConfigDict:
    """Settings of the task `classifier`."""
    if variant not in VARIANTS:
        raise ValueError(f'configs/classifier.py has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
    config = ml_collections.ConfigDict()
    config.task = 'classifier'
    config.real = ''  # the prepared cohort, with its splits; its test split is what every arm is tried on
    config.fake = ''  # folder of synthetic ROIs, as configs/generate.py leaves; may be empty if no arm wants them
    config.classes = ()  # names of those to tell apart; empty: all. Of two the second counts as positive
    config.intensity = 'as_is'  # see configs/evaluate.py
    config.grid = 'same'
    config.seed = 0
    config.runs = 3  # of each arm, with other initial values and other validation sets
    config.validation = 0.15  # share of each class's ROIs, of other patients in each run
    config.dtype = 'float32'  # of convolutions: 'float32' or 'bfloat16'
    config.mesh = ml_collections.ConfigDict()
    config.mesh.data = -1  # devices that a batch is split over; -1: all

    config.model = ml_collections.ConfigDict()  # a 3D ResNet
    config.model.depth = 50  # 10, 18, 34 or 50
    config.model.width = 64  # channels of its first stage
    config.model.shortcut = 'B'  # or 'A': zeros for the channels that are missing
    config.model.layout = 'hara'  # strides; or 'medicalnet': its strides and dilations, for its weights
    config.model.standardise = False  # bring a tumour's voxels to mean 0 and deviation 1 first, as MedicalNet's were
    config.model.hidden = ()  # widths of the head's hidden layers; empty: one linear layer
    config.gamma = 2.0  # of the focal loss; its alpha is the inverse of a class's share of the ROIs

    config.augment = augment = ml_collections.ConfigDict()  # of arms that ask for it, at each step
    augment.flip = True  # along each axis by a fair coin
    augment.rotation = 30.0  # degrees at most about each axis
    augment.scale = 1.5  # times larger or smaller at most
    augment.elastic = 0.02  # bending: standard deviation of 4³ knots' shifts, as a share of the shortest side

    config.pretrain = _training('50 epochs', 8, 1e-3)
    config.finetune = _training('50 epochs', 10, 1e-2)

    # Each arm: classes whose pre-training ROIs are real and synthetic (both empty: no pre-training), how many of each,
    # and how many real ROIs of each class it is then trained on (0: all that there are). Real ROIs for pre-training
    # are those that are left. `balance` lets ROIs of rarer classes come several times in an epoch. `weights` are what
    # the features begin with, and `frozen` leaves them as they are, so that the head alone learns.
    config.baseline = 'real_only'  # the arm that others are compared with
    config.arms = ml_collections.ConfigDict()
    if variant == 'experiment1':
        config.arms.real_only = _arm(rois=51)
        config.arms.real_hgg_synthetic_lgg = _arm(real=('HGG',), synthetic=('LGG',), pretrain_rois=183, rois=51)
        config.arms.synthetic = _arm(synthetic=('LGG', 'HGG'), pretrain_rois=183, rois=51)
    if variant == 'experiment2':
        config.arms.real_only = _arm(rois=51)
        config.arms.synthetic = _arm(synthetic=('LGG', 'HGG'), pretrain_rois=250, rois=51)
    if variant == 'augmentation':
        config.baseline = 'unbalanced'
        config.arms.unbalanced = _arm()
        config.arms.augmented = _arm(augment=True, balance=True)
    if variant in ('transfer', 'medicalnet'):
        config.model.hidden = (128,)
        if variant == 'medicalnet':
            config.model.depth = 34  # of resnet_34.pth; of 10 and 50 the shortcut is 'B'
            config.model.shortcut = 'A'
            config.model.layout = 'medicalnet'
            config.model.standardise = True
        config.baseline = 'from_scratch'
        config.arms.from_scratch = _arm()
        config.arms.frozen = _arm(frozen=True)
    if variant == 'smoke':
        config.runs = 2
        config.validation = 0.25
        config.model.depth = 10
        config.model.width = 4
        config.pretrain = _training('4 steps', 4, 1e-3)
        config.finetune = _training('4 steps', 4, 1e-3)
        config.arms.real_only = _arm(augment=True)
        config.arms.synthetic = _arm(synthetic=('LGG', 'HGG'), pretrain_rois=4)
    return config


def _arm(
    real: tuple[str, ...] = (),
    synthetic: tuple[str, ...] = (),
    pretrain_rois: int = 0,
    rois: int = 0,
    augment: bool = False,
    balance: bool = False,
    frozen: bool = False,
) -> ml_collections.ConfigDict:
    return ml_collections.ConfigDict(
        {
            'pretrain_real': real,  # classes
            'pretrain_synthetic': synthetic,  # classes
            'pretrain_rois': pretrain_rois,  # of each class; 0: all that there are
            'rois': rois,  # real ones of each class to train on; 0: all that there are
            'augment': augment,
            'balance': balance,
            'weights': '',  # folder of a part of an earlier experiment, or a file of MedicalNet; empty: drawn
            'frozen': frozen,
        }
    )


def _training(duration: str, batch_size: int, learning_rate: float) -> ml_collections.ConfigDict:
    every = duration if duration.endswith('steps') else '1 epochs'
    return ml_collections.ConfigDict(
        {
            'batch_size': batch_size,  # ROIs a step, over all devices and hosts
            'optimizer': {  # Adam
                'learning_rate': learning_rate,  # at the first step
                'final_learning_rate': learning_rate,  # at the last, along half a cosine
                'b1': 0.9,
                'b2': 0.999,
                'epsilon': 1e-8,
                'clip_value': 0.0,  # largest absolute gradient of a parameter; 0: no clipping
            },
            'training': {
                'duration': duration,
                'log_every': every,
                'eval_every': every,
                'figures_every': duration,
                'checkpoint_every': every,
                'keep_last': 1,  # checkpoints
                'keep_best': 1,  # checkpoints, by the metric below; the best goes on to the next part
                'best_metric': 'val/loss',
                'best_mode': 'min',  # or 'max'
                'on_nonfinite': 'stop',  # at a loss that is not finite: 'stop', or 'skip' the update and count it
            },
        }
    )
