"""The fast step of stage 1 against a plain one, on one device and on eight."""

import runpy

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from vqroi_jax import losses
from vqroi_jax.errors import InputError
from vqroi_jax.models import perceptual, quantizer
from vqroi_jax.training import partitioning, vqgan

CONFIG = 'configs/vqgan.py'


def tiny_config(**changes):
    config = runpy.run_path(CONFIG)['get_config']('smoke')
    config.data.roi_size = (16, 16, 20)
    config.model.channels = (8,)
    config.model.encoder_res_blocks = config.model.decoder_res_blocks = (1,)
    config.model.hidden = 16
    config.discriminator.channels = (8, 16)
    config.codebook.warmup = '0 steps'
    config.codebook.restart_every = '0 steps'
    config.losses.adversarial_start = '0 steps'
    config.perceptual = 'vgg16'
    config.update_from_flattened_dict(changes)
    return config


def tiny_batch(config, rows=8):
    volume = np.random.default_rng(0).uniform(-1, 1, (rows, *config.data.roi_size, 1)).astype(np.float32)
    return {'volume': volume, 'label': np.arange(rows, dtype=np.int32) % 2}


def start(config, devices=1):
    mesh = partitioning.make_mesh(devices)
    recipe = vqgan.make_recipe(config, classes=2, steps_per_epoch=10)
    state = vqgan.create_state(recipe, mesh)
    batch = partitioning.put_batch(tiny_batch(config), mesh)
    state = vqgan.initialise_codebook(recipe, state, [batch], mesh)
    return recipe, mesh, state, batch


def plain_losses(recipe, state, batch, noise):
    """The objective of section 2.2 as one function of all generator parameters, differentiated by JAX."""

    def everything(params, weight):
        variables = {'params': params, 'codebook': {'codebook': state.codebook}}
        trunk = recipe.model.apply(variables, batch['volume'], jnp.asarray(True), noise.dropout, method='trunk')
        fake = recipe.model.apply(variables, trunk.features, method='head')
        judge = lambda x: recipe.discriminator.apply({'params': state.discriminator}, x)  # noqa: E731
        fake_logits, fake_hidden = judge(fake)
        _, real_hidden = judge(batch['volume'])
        l1 = jnp.mean(jnp.abs(fake - batch['volume']))
        adversarial = losses.adversarial(fake_logits)
        lpips = perceptual.perceptual_loss(recipe.lpips, recipe.lpips_weights, fake, batch['volume'], noise.slices)
        generator = (
            4 * l1
            + lpips
            + losses.commitment(trunk.normalised, trunk.codes)
            + 4 * losses.feature_matching(fake_hidden, real_hidden)
            + 4 * losses.image_gradient(fake, batch['volume'])
            + weight * adversarial
        )
        loss = 0.8 * generator + 0.2 * losses.cross_entropy(trunk.logits, batch['label'], 0.1)
        return loss, (l1, adversarial)

    def part(number):
        gradient = jax.grad(lambda p: everything(p, 0.0)[1][number])(state.params)
        return gradient['decoder']['last']['kernel']

    weight = losses.adaptive_weight(part(0), part(1))
    (loss, _), gradient = jax.value_and_grad(everything, has_aux=True)(state.params, weight)
    return loss, weight, gradient


def assert_trees_close(actual, expected, relative):
    """Every leaf, to a share of its own largest value (or of 1e-3 of the largest anywhere)."""
    largest = max(float(jnp.abs(leaf).max()) for leaf in jax.tree.leaves(expected))
    for path, leaf in jax.tree.leaves_with_path(expected):
        other = dict(jax.tree.leaves_with_path(actual))[path]
        scale = max(float(jnp.abs(leaf).max()), 1e-3 * largest)
        np.testing.assert_allclose(other, leaf, rtol=0, atol=relative * scale, err_msg=jax.tree_util.keystr(path))


def test_gradients_equal_the_plain_objective():
    config = tiny_config()
    recipe, _, state, batch = start(config)
    noise = vqgan.draw_noise(recipe, state.step, 8)
    loss, weight, gradient = plain_losses(recipe, state, batch, noise)
    fast = jax.jit(lambda s, b, n, w: vqgan.gradients(recipe, s, b, n, w))(state, batch, noise, recipe.lpips_weights)
    np.testing.assert_allclose(fast.metrics['loss'], loss, rtol=1e-5)
    np.testing.assert_allclose(fast.metrics['adversarial_weight'], weight, rtol=1e-4)
    assert 0 < float(weight) < 1
    assert_trees_close(fast.params, gradient, 1e-4)
