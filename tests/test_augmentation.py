"""Augmentation against SciPy, and what it may not do."""

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest
from scipy import ndimage
from scipy.spatial.transform import Rotation

from vqroi_jax import augmentation

SHAPE = (12, 14, 17)
MM = (1.0, 1.0, 1.0)
STILL = {'flip': False, 'rotation': 0.0, 'scale': 1.0, 'elastic': 0.0}


def settings(**changes):
    return ml_collections.ConfigDict({**STILL, **changes})


def volume(seed=0):
    result = np.full(SHAPE, -1.0, np.float32)
    result[3:9, 4:11, 5:13] = np.random.default_rng(seed).uniform(-0.5, 1, (6, 7, 8))
    return result


def change(flip=(False,) * 3, matrix=None, bend=None):
    matrix = np.eye(3) if matrix is None else matrix
    bend = np.zeros((4, 4, 4, 3)) if bend is None else bend
    return augmentation.Change(jnp.array(flip), jnp.asarray(matrix, jnp.float32), jnp.asarray(bend, jnp.float32))


def test_no_change_changes_nothing():
    np.testing.assert_allclose(augmentation.apply_change(volume(), change()), volume(), atol=1e-6)


def test_affine_changes_equal_scipy():
    matrix = Rotation.from_euler('xyz', (20, -15, 10), degrees=True).as_matrix() / 1.2
    middle = (np.array(SHAPE) - 1) / 2
    expected = ndimage.affine_transform(
        volume().astype(float), matrix, middle - matrix @ middle, order=1, mode='grid-constant', cval=-1
    )
    found = augmentation.apply_change(volume(), change(matrix=matrix))
    np.testing.assert_allclose(found, expected, atol=1e-4)


def test_bending_equals_scipy():
    bend = np.random.default_rng(1).normal(0, 0.8, (4, 4, 4, 3))
    places = np.meshgrid(*[np.arange(side, dtype=float) for side in SHAPE], indexing='ij')
    knots = np.meshgrid(*[np.linspace(0, 3, side) for side in SHAPE], indexing='ij')
    source = [place + ndimage.map_coordinates(bend[..., a], knots, order=1) for a, place in enumerate(places)]
    expected = ndimage.map_coordinates(volume().astype(float), source, order=1, mode='grid-constant', cval=-1)
    np.testing.assert_allclose(augmentation.apply_change(volume(), change(bend=bend)), expected, atol=1e-4)


def test_mirrors_along_the_chosen_axes():
    found = augmentation.apply_change(volume(), change(flip=(True, False, True)))
    np.testing.assert_allclose(found, volume()[::-1, :, ::-1], atol=1e-6)


def test_draws_stay_within_the_settings():
    keys = jax.random.split(jax.random.key(0), 400)
    draw = jax.vmap(lambda key: augmentation.draw_change(key, settings(flip=True, rotation=30, scale=1.5), SHAPE, MM))
    drawn = draw(keys)
    np.testing.assert_allclose(np.mean(drawn.flip, axis=0), 0.5, atol=0.1)
    factors = np.linalg.det(drawn.matrix) ** (-1 / 3)
    assert factors.min() > 1 / 1.5 - 1e-3
    assert factors.max() < 1.5 + 1e-3
    assert abs(np.log(factors).mean()) < 0.05
    rotations = Rotation.from_matrix(np.asarray(drawn.matrix) * factors[:, None, None])
    angles = rotations.as_euler('XYZ', degrees=True)
    assert np.abs(angles).max() < 30.01
    assert np.abs(angles).max(axis=0).min() > 25
    assert not np.any(drawn.bend)


def test_voxels_that_are_no_cubes_are_turned_and_shifted_in_millimetres():
    how, keys = settings(rotation=30, scale=1.5, elastic=0.1), jax.random.split(jax.random.key(2), 200)
    spacing = np.array([5.0, 1.0, 2.0])
    drawn = jax.vmap(lambda key: augmentation.draw_change(key, how, SHAPE, tuple(spacing)))(keys)
    turns = np.asarray(drawn.matrix) * spacing[:, None] / spacing  # of places in mm
    factors = np.linalg.det(turns) ** (-1 / 3)
    turns = turns * factors[:, None, None]
    np.testing.assert_allclose(turns @ turns.transpose(0, 2, 1), np.broadcast_to(np.eye(3), turns.shape), atol=1e-5)
    shifts = np.std(drawn.bend, axis=(0, 1, 2, 3)) * spacing
    np.testing.assert_allclose(shifts, 0.1 * np.min(SHAPE * spacing), rtol=0.05)


@pytest.mark.parametrize('flip', [True, False])
def test_a_sample_depends_on_its_own_key_alone(flip):
    volumes = jnp.stack([volume(seed) for seed in range(3)])[..., None]
    keys = jax.random.split(jax.random.key(1), 3)
    how = settings(flip=flip, rotation=30.0, scale=1.5, elastic=0.05)
    found = augmentation.augment(keys, volumes, how, MM)
    np.testing.assert_allclose(augmentation.augment(keys[1:], volumes[1:], how, MM), found[1:], atol=1e-5)
    assert found.shape == volumes.shape
    assert found.min() >= -1
    assert found.max() <= 1
    assert np.all(np.abs(np.asarray(found) - np.asarray(volumes)).max(axis=(1, 2, 3, 4)) > 0.1)
