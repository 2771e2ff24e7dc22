"""Multi-scale SSIM of two volumes [D, H, W] by SciPy's Gaussian filter, in the dtype that they come in."""

import numpy as np
from scipy import ndimage
from skimage.measure import block_reduce

from vqroi_jax.metrics.ssim import WEIGHTS


def maps(x, y, c1, c2, truncate, crop):
    """Wang et al.'s maps by SciPy's Gaussian: similarity, and contrast and structure alone."""

    def means(a):
        return ndimage.gaussian_filter(a, 1.5, truncate=truncate)[(slice(crop, -crop if crop else None),) * 3]

    mx, my = means(x), means(y)
    variances, covariance = means(x * x) - mx * mx + means(y * y) - my * my, means(x * y) - mx * my
    contrast = (2 * covariance + c2) / (variances + c2)
    return (2 * mx * my + c1) / (mx * mx + my * my + c1) * contrast, contrast


def standard(x, y, levels, keep=None):
    weights = np.array(WEIGHTS[:levels]) / sum(WEIGHTS[:levels])
    result = 1.0
    for level in range(levels):
        similarity, contrast = maps(x, y, 0.02**2, 0.06**2, 3.5, 5)
        chosen = similarity if level == levels - 1 else contrast
        inside = np.ones_like(x, bool) if keep is None else keep
        result *= max(chosen[inside[5:-5, 5:-5, 5:-5]].mean(), 0) ** weights[level]
        x, y = (block_reduce(a, 2, np.mean)[tuple(slice(s // 2) for s in a.shape)] for a in (x, y))
        keep = None if keep is None else block_reduce(keep, 2, np.any)[tuple(slice(s // 2) for s in keep.shape)]
    return result


def release(x, y):
    """The evaluation that the paper names, rewritten: five levels, and the slip in the product."""
    similarities, contrasts = [], []
    for _ in range(5):
        similarity, contrast = maps(x, y, 0.01**2, 0.03**2, 4.0, 0)
        similarities.append(similarity.mean())
        contrasts.append(contrast.mean())
        x, y = (block_reduce(a, 2, np.mean)[tuple(slice(s // 2) for s in a.shape)] for a in (x, y))
    powers = [contrast**weight for contrast, weight in zip(contrasts, WEIGHTS, strict=True)]
    return np.prod([power * similarities[-1] ** WEIGHTS[-1] for power in powers[:-1]])
