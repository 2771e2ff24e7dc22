"""The small classifier: that it learns what can be learnt, and counts right."""

import jax.numpy as jnp
import numpy as np
from scipy import ndimage

from vqroi_jax import class_agreement


def rois(number, seed):
    """Balls of two sizes, and large ones with a dark core, somewhere in a box of 12 x 14 x 17."""
    rng = np.random.default_rng(seed)
    labels = np.arange(number) % 3
    grid = np.stack(np.meshgrid(np.arange(12), np.arange(14), np.arange(17), indexing='ij'), axis=-1)
    volumes = np.full((number, 12, 14, 17), -1.0, np.float32)
    for volume, label in zip(volumes, labels, strict=True):
        distance = np.linalg.norm(grid - rng.uniform(5, 7, 3), axis=-1)
        volume[distance < (3, 5, 5)[label]] = 0.8
        if label == 2:
            volume[distance < 3] = -0.4
    return volumes, labels


def test_tells_classes_of_roi_that_it_has_not_seen():
    volumes, labels = rois(96, seed=0)
    params = class_agreement.train(volumes, labels, classes=3, seed=0, epochs=20)
    new, truth = rois(30, seed=1)
    logits, features = class_agreement.tell(params, new, classes=3)
    assert logits.shape == (30, 3)
    assert len(features) == 30
    assert np.mean(np.argmax(logits, axis=1) == truth) > 0.9
    for few, many in zip(class_agreement.tell(params, new[:7], classes=3), (logits, features), strict=True):
        np.testing.assert_allclose(few, many[:7], rtol=1e-4, atol=1e-4)


def test_smoothing_is_a_1_2_1_filter_along_each_axis():
    volumes = np.random.default_rng(0).normal(size=(2, 4, 5, 6)).astype(np.float32)
    expected = volumes
    for axis in (1, 2, 3):
        expected = ndimage.correlate1d(expected, [0.25, 0.5, 0.25], axis=axis, mode='nearest')
    np.testing.assert_allclose(class_agreement.smooth(jnp.asarray(volumes)), expected, atol=1e-6)
