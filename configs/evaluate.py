"""How good a set of ROIs is: figures of merit beside what they would be between real ROIs, as numbers and as a page.

    python -m vqroi_jax.main --config=configs/evaluate.py --config.real=runs/cohort --config.fake=runs/new \
        --workdir=runs/evaluation

Each side is a prepared cohort, a folder that `configs/generate.py` has filled, or any folder of NIfTI ROIs whose
folders are named after their classes. Leaves `metrics.json` and `report.html`, one page to open in a browser.

Most of the time goes into VGG16, MS-SSIM and, where its weights are given, Inception-v3. Volumes lie on the disk of the
workdir meanwhile (4 bytes a voxel); in memory are those alone that the small classifier of 'agreement' is trained on.
Variants: `paper` (default), `demo` and `smoke` (fewer pairs, slices and bootstraps).
"""

import ml_collections

VARIANTS = ('paper', 'demo', 'smoke')


def get_config(variant: str = 'paper') -> ml_collections.ConfigDict:
    """Settings of the task `evaluate`."""
    if variant not in VARIANTS:
        raise ValueError(f'configs/evaluate.py has no variant {variant!r}; choose one of {", ".join(VARIANTS)}')
    config = ml_collections.ConfigDict()
    config.task = 'evaluate'
    config.real = ''  # folder of the real ROIs; a prepared cohort also says which of them were held out
    config.fake = ''  # folder of the ROIs to judge
    config.classes = ()  # names of those to compare; empty: all, which both sides must have
    config.seed = 0  # of halves, pairs, bootstraps and the classifier, 0 to 2**32 - 1
    # 'as_is': both sides must be in [0, 1] or in [-1, 1]; 'each': every ROI is scaled from its background to its own
    # largest intensity. Voxels a little below the background are set to it, and told.
    config.intensity = 'as_is'
    # 'same': both sides must have voxels of one size and ROIs of one shape; 'resample': the second is brought to the
    # first's.
    config.grid = 'same'
    # Groups of figures. A further one, 'reconstruction' (L1, PSNR, SSIM, LPIPS), compares each ROI of `fake` with that
    # of `real` that it was made from, which has the same class and the same file name (without its ending; in a
    # prepared cohort, the ROI's id). Alone: --config.metrics="('reconstruction',)".
    config.metrics = ('ms_ssim', 'mmd', 'frechet', 'coverage', 'agreement', 'statistics', 'privacy')

    config.pairs = 1000  # of ROIs within a class, for MS-SSIM; fewer if there are not so many
    config.foreground = False  # whether MS-SSIM counts windows around tumour voxels only
    config.bootstrap = 200  # how often ROIs are drawn anew, for intervals
    config.frechet_bootstrap = 50  # the same for Fréchet distances, which take longer, FID the longest
    config.neighbours = 5  # that a ball reaches to, for precision, recall, density and coverage

    config.mmd = ml_collections.ConfigDict()
    config.mmd.batch = 4  # ROIs of each side in a mini-batch of the linear MMD, which depends on it
    config.mmd.repeats = 10  # how often all ROIs are gone through

    # Weights of FID's Inception-v3 in the file that pytorch-fid downloads, pt_inception-2015-12-05-6726825d.pth; gives
    # FID and KID-Inception beside the distances by VGG16, as part of 'frechet', and needs PyTorch (the extra
    # 'convert'). Empty: without them.
    config.inception = ''

    # Figures from elsewhere, shown in the report as a column beside ours: a JSON file such as
    #     {"source": "Doe 2024, table 2",
    #      "figures": [{"metric": "FID-A", "class": "HGG", "value": 12.3, "spread": 0.4}]}
    # with metrics called as in the report, and classes as here. "class" may be left out, for a figure of all classes,
    # and "spread", what that source writes after ±. Empty: none.
    config.published = ''

    config.slices = ml_collections.ConfigDict()  # that VGG16 and Inception-v3 see of each ROI; LPIPS adds up axial ones
    config.slices.number = 16  # along each axis, evenly spaced
    # Slices without tumour: 'drop' spreads them over the tumour's extent along the axis, 'keep' over the whole ROI.
    config.slices.empty = 'drop'

    config.classifier = ml_collections.ConfigDict()  # a small CNN, trained on real ROIs alone
    config.classifier.epochs = 60

    config.privacy = ml_collections.ConfigDict()
    config.privacy.candidates = 10  # real ROIs nearest in voxels, mirrored or not, whose MS-SSIM to an ROI is computed

    if variant == 'demo':
        config.pairs = 300
        config.bootstrap = 100
        config.frechet_bootstrap = 20
        config.slices.number = 2
    if variant == 'smoke':
        config.pairs = 10
        config.bootstrap = 5
        config.frechet_bootstrap = 2
        config.slices.number = 2
        config.classifier.epochs = 2
        config.privacy.candidates = 2
    return config
