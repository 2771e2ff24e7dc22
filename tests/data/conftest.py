"""Settings as configs/prepare.py has them, and a tiny good patient to damage."""

import runpy
from pathlib import Path

import ml_collections
import nibabel
import numpy as np
import pytest

from vqroi_jax.data.cohort import Scan

CONFIG = Path(__file__).parents[2] / 'configs' / 'prepare.py'
SHAPE = (20, 24, 17)  # NIfTI axes i, j, k
AFFINE = np.array([[-1.0, 0, 0, 0], [0, -1, 0, 239], [0, 0, 1.5, 0], [0, 0, 0, 1]])


@pytest.fixture
def data() -> ml_collections.ConfigDict:
    """The `data` block of the real config, with ROIs for tiny patients."""
    data = runpy.run_path(str(CONFIG))['get_config']().data
    data.roi_size = (12, 14, 16)
    return data.lock()


@pytest.fixture
def brain() -> np.ndarray:
    """int16 [i, j, k]: 0 around, 1 to 899 within."""
    image = np.zeros(SHAPE, np.int16)
    image[2:-2, 2:-2, 2:-2] = np.random.default_rng(0).integers(1, 900, tuple(side - 4 for side in SHAPE))
    return image


@pytest.fixture
def mask() -> np.ndarray:
    """uint8 [i, j, k]: an uneven tumour of the labels 1, 2 and 4, 7 x 9 x 6 voxels at (5, 8, 4)."""
    mask = np.zeros(SHAPE, np.uint8)
    mask[5:12, 8:17, 4:10] = np.random.default_rng(1).choice([0, 1, 2, 4], (7, 9, 6), p=[0.3, 0.3, 0.2, 0.2])
    mask[5, 8, 4] = mask[11, 16, 9] = 1
    return mask


@pytest.fixture
def write_scan(tmp_path):
    """Returns a function that saves arrays [i, j, k] as a patient's two files, and names them as a Scan."""

    def write(image: np.ndarray, mask: np.ndarray, affine=AFFINE, mask_affine=AFFINE, ending='.nii.gz') -> Scan:
        files = [tmp_path / f'P1_{name}{ending}' for name in ('flair', 'seg')]
        for file, array, matrix in zip(files, (image, mask), (affine, mask_affine), strict=True):
            nibabel.save(nibabel.Nifti1Image(array, matrix, dtype=array.dtype), file)
        return Scan('P1', 'P1', 'LGG', *files)

    return write
