"""Fréchet distance between two sets of features, taken as normal distributions.

Source: Heusel et al. 2017, *GANs trained by a two time-scale update rule*. Which features they are decides on the name:
only those of Inception-v3 make it FID.
"""

import numpy as np


def frechet_distance(x: np.ndarray, y: np.ndarray) -> float:
    """`|mean x - mean y|² + trace(X + Y - 2 (X Y)^½)` with X and Y the covariances, over n - 1.

    With A and B the centred features divided by sqrt(n - 1), X = A'A and Y = B'B, the trace of (X Y)^½ is the sum of
    the singular values of A B', which has n rows and m columns, and which stays what it is when A and B are replaced
    by the triangular factors of their QR decompositions. So no matrix root is taken, and nothing is lost where there
    are fewer samples than features. By NumPy, in float64, which accelerators lack.

    Args:
        x: `[n, features]`, n at least 2.
        y: `[m, features]`, m at least 2.
    """
    sets = [np.asarray(features, np.float64) for features in (x, y)]
    means = [features.mean(axis=0) for features in sets]
    roots = [_root(features - mean) for features, mean in zip(sets, means, strict=True)]
    variances = sum(np.sum(np.square(root)) for root in roots)
    product = np.linalg.svd(roots[0] @ roots[1].T, compute_uv=False).sum()
    return float(np.sum(np.square(means[0] - means[1])) + variances - 2 * product)


def _root(centred: np.ndarray) -> np.ndarray:
    """R with R'R the covariance, and as few rows as there are samples or features."""
    samples, features = centred.shape
    centred = centred / np.sqrt(samples - 1.0)
    return np.asarray(np.linalg.qr(centred, mode='r')) if samples > features else centred
