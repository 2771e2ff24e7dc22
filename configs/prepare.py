"""From a cohort folder to checked, cropped, split and stored ROIs.

    python -m vqroi_jax.main --config=configs/prepare.py --config.data.path=BRATS --workdir=runs/cohort

Takes about a tenth of a second a patient, most of it gzip. Stage 1 then takes the workdir as `--config.data.path`,
evaluations and experiments as `--config.real`; stage 1 that is given a raw cohort folder prepares it by itself.

Variants: `paper` (default, 128³ ROIs), `demo` and `smoke` (small phantom cohorts).
"""

import ml_collections

VARIANTS = ('paper', 'demo', 'smoke')


def get_config(variant: str = 'paper') -> ml_collections.ConfigDict:
    """Settings of the task `prepare`; the `data` block is that of every task that reads ROIs."""
    if variant not in VARIANTS:
        raise ValueError(f'configs/prepare.py has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
    config = ml_collections.ConfigDict()
    config.task = 'prepare'
    config.data = data = ml_collections.ConfigDict()

    # Where the patients are: a cohort folder, a CSV manifest (id,image,mask,label), or the workdir of an
    # earlier prepare run. Empty: the phantom cohort below is made and used.
    data.path = ''
    data.layout = 'auto'  # 'auto', 'brats2019', 'brats2020', 'brats2021', 'brats2023' or 'manifest'
    data.modality = 'flair'  # which image of a BraTS patient: 'flair', 't1', 't1ce' or 't2'
    data.grades_csv = ''  # CSV (id,label) with each patient's class, where the folders do not say it
    data.classes = ()  # names in the order of their numbers; empty: as found, LGG 0 and HGG 1
    data.mask_labels = ()  # mask values that are tumour; empty: all above 0
    data.known_labels = ()  # mask values that may occur at all; empty: any whole number from 0 up

    data.roi_size = (128, 128, 128)  # voxels: depth, height, width
    data.oversize = 'refuse'  # a tumour larger than the box: 'refuse' (an error) or 'crop' (counted)
    data.on_error = 'stop'  # a faulty patient: 'stop' before anything long, or 'skip' and report

    data.split = ml_collections.ConfigDict()
    data.split.seed = 0  # of the patients' shuffle
    # Held-out patients: below 1 a share of each class, from 1 up that many of each class.
    data.split.val = 0.1
    data.split.test = 25.0

    data.workers = 0  # processes that crop; 0: one a core

    data.phantom = phantom = ml_collections.ConfigDict()
    phantom.patients = 60  # phantom patients of each class
    phantom.seed = 0
    phantom.spacing = 1.0  # mm a voxel, all axes; the head is 240 x 240 x 155 mm

    if variant in ('demo', 'smoke'):
        data.roi_size = (24, 24, 24)
        data.split.val = 0.15
        data.split.test = 0.15
        phantom.spacing = 16 / 3  # the ROI is 128 mm wide, as at paper scale
        phantom.patients = 160
    if variant == 'smoke':
        phantom.patients = 8
        data.split.test = 2.0
    return config
