"""Stage 1's networks: sizes at paper scale, shapes, dtypes, and what each method gives."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqroi_jax.models.discriminator import Discriminator
from vqroi_jax.models.scorer import AuxiliaryClassifier, Scorer, normalise_grid
from vqroi_jax.models.vqgan import VQGAN, Decoder
from vqroi_jax.training import partitioning


def count(tree):
    return sum(leaf.size for leaf in jax.tree.leaves(tree))


def small(**changes):
    fields = {
        'classes': 3,
        'channels': (8, 16),
        'hidden': 32,
        'codes': 20,
        'code_features': 12,
        'encoder_res_blocks': (1, 0),
        'decoder_res_blocks': (0, 1),
        'classifier_hidden': 64,
        **changes,
    }
    model = VQGAN(**fields)
    volume = jnp.asarray(np.random.default_rng(0).uniform(-1, 1, (2, 8, 12, 16, 1)), jnp.float32)
    return model, jax.jit(model.init)(jax.random.key(0), volume), volume


def test_parameter_counts_at_paper_scale():
    volume = jax.ShapeDtypeStruct((1, 128, 128, 128, 1), jnp.float32)
    variables = jax.eval_shape(VQGAN(classes=2).init, jax.random.key(0), volume)
    assert {name: count(part) for name, part in variables['params'].items()} == {
        'encoder': 25_156_384,
        'pre_quantisation': 65_664,
        'post_quantisation': 66_048,
        'decoder': 9_403_713,
        'scorer': 442_627,
        'classifier': 67_113_986,
    }
    assert variables['codebook']['codebook']['codes'].shape == (1024, 128)
    discriminator = jax.eval_shape(Discriminator().init, jax.random.key(0), volume)
    assert count(discriminator) == 11_049_665


def test_discriminator_at_paper_scale_returns_5_cubed_logits_and_four_maps():
    volume = jax.ShapeDtypeStruct((1, 128, 128, 128, 1), jnp.float32)
    (logits, hidden), _ = jax.eval_shape(Discriminator().init_with_output, jax.random.key(0), volume)
    assert logits.shape == (1, 5, 5, 5, 1)
    assert [h.shape[1:] for h in hidden] == [(64, 64, 64, 64), (32, 32, 32, 128), (16, 16, 16, 256), (8, 8, 8, 512)]


def test_methods_agree_with_each_other():
    model, variables, volume = small()

    def call(method, *inputs):
        return jax.jit(functools.partial(model.apply, method=method))(variables, *inputs)

    tokens = call('index_quantize', volume)
    assert tokens.shape == (2, 2, 3, 4)
    assert tokens.dtype == jnp.int32
    assert 0 <= int(tokens.min()) <= int(tokens.max()) < 20
    trunk = call('trunk', volume, jnp.asarray(True))
    np.testing.assert_array_equal(trunk.tokens, tokens)
    np.testing.assert_array_equal(trunk.codes, np.asarray(variables['codebook']['codebook']['codes'])[tokens])
    np.testing.assert_allclose(call('importance', volume), trunk.scores, rtol=1e-6)
    assert 0 < float(trunk.scores.min()) < float(trunk.scores.max()) < 1
    assert trunk.logits.shape == (2, 3)
    volumes = call('reconstruct', volume)
    assert volumes.shape == volume.shape
    np.testing.assert_allclose(volumes, call('decode_samples', tokens), rtol=1e-6)
    np.testing.assert_allclose(volumes, call('head', trunk.features), rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(volumes, call('__call__', volume), rtol=1e-4, atol=1e-6)
    free = call('trunk', volume, jnp.asarray(False))
    np.testing.assert_allclose(free.codes, trunk.normalised, rtol=1e-6)


def test_bfloat16_reaches_every_layer_and_float32_stays_where_it_must():
    model, variables, volume = small(dtype=jnp.bfloat16)
    assert {leaf.dtype for leaf in jax.tree.leaves(variables)} == {jnp.dtype('float32')}
    seen = functools.partial(model.apply, capture_intermediates=True, mutable=['intermediates'])
    _, state = jax.eval_shape(seen, variables, volume)
    inside = {
        jax.tree_util.keystr(path): leaf.dtype for path, leaf in jax.tree.leaves_with_path(state['intermediates'])
    }
    assert {dtype for path, dtype in inside.items() if 'encoder' in path or "['conv" in path} == {jnp.dtype('bfloat16')}
    trunk = jax.eval_shape(functools.partial(model.apply, method='trunk'), variables, volume, jnp.asarray(True))
    assert trunk.features.dtype == jnp.bfloat16
    assert {x.dtype for x in (trunk.normalised, trunk.codes, trunk.scores, trunk.logits)} == {jnp.dtype('float32')}
    assert jax.eval_shape(model.apply, variables, volume).dtype == jnp.float32


def test_initial_values_are_those_of_the_design():
    _, variables, _ = small(channels=(32, 64), hidden=128, classifier_hidden=256)
    params = variables['params']
    kernel = np.asarray(params['encoder']['conv_1']['kernel'])
    assert kernel.std() == pytest.approx(0.02, rel=0.05)
    assert np.abs(params['encoder']['conv_1']['bias']).max() <= (32 * 64) ** -0.5
    for part, fan_in in ((params['pre_quantisation'], 128), (params['scorer']['conv'], 27 * 12)):
        bound = fan_in**-0.5
        for leaf in part.values():
            assert 0.7 * bound < np.abs(leaf).max() <= bound
    np.testing.assert_array_equal(params['encoder']['norm_0']['scale'], 1)
    np.testing.assert_array_equal(params['encoder']['norm_0']['bias'], 0)


def test_grid_is_normalised_over_all_of_a_sample():
    latent = np.random.default_rng(0).normal(2, 3, (2, 3, 4, 2, 5)).astype(np.float32)
    expected = [(x - x.mean()) / np.sqrt(x.var() + 1e-5) for x in latent]
    np.testing.assert_allclose(normalise_grid(latent), expected, rtol=1e-4, atol=1e-5)


def test_dropout_depends_on_a_samples_own_key():
    latent = np.random.default_rng(0).normal(size=(3, 2, 2, 2, 4)).astype(np.float32)
    scores = Scorer().init_with_output(jax.random.key(0), latent)[0]
    classifier = AuxiliaryClassifier(classes=2, hidden=64, dropout=0.5)
    variables = classifier.init(jax.random.key(1), latent, scores)
    keys = jax.random.split(jax.random.key(2), 3)
    whole = classifier.apply(variables, latent, scores, keys)
    alone = classifier.apply(variables, latent[1:2], scores[1:2], keys[1:2])
    np.testing.assert_allclose(whole[1:2], alone, rtol=1e-5, atol=1e-6)
    calm = classifier.apply(variables, latent, scores)
    assert np.abs(np.asarray(whole - calm)).max() > 1e-3
    many = jax.random.split(jax.random.key(3), 400)
    mean = np.mean([classifier.apply(variables, latent[:1], scores[:1], key[None]) for key in many[:50]], axis=0)
    np.testing.assert_allclose(mean, calm[:1], atol=0.15)


@pytest.mark.long
def test_computing_again_saves_memory():
    """On a CPU, too, whose compiler merges what is computed again with what was there unless told not to."""
    latent, needed = jnp.ones((1, 16, 16, 16, 8)), {}
    for remat in ('none', 'activations', 'blocks'):
        decoder = Decoder((16,), num_groups=4, res_blocks=(4,), remat=remat)
        params = decoder.init(jax.random.key(0), latent)
        gradient = jax.grad(lambda params, decoder=decoder: jnp.sum(decoder.apply(params, latent) ** 2))
        compiled = jax.jit(gradient, compiler_options=partitioning.keep_barriers('cpu')).lower(params).compile()
        needed[remat] = compiled.memory_analysis().temp_size_in_bytes / latent.size / 4 / 16
    assert needed['activations'] < needed['none'] - 4, needed
    assert needed['blocks'] < needed['activations'] - 2, needed


def test_a_decoder_keeps_one_copy_of_each_map():
    """What a level begins with, what lies between its convolutions, and the features, whoever else reads them."""
    latent, decoder = jnp.ones((1, 16, 16, 16, 8)), Decoder((16,), num_groups=4, res_blocks=(1,), remat='activations')
    params = decoder.init(jax.random.key(0), latent)
    last = decoder.init(jax.random.key(1), jnp.ones((1, 1, 1, 1, 16)), method='head')['params']['last']

    def volume_and_gradient(params, last, gradient):
        features = decoder.apply(params, latent)
        head = functools.partial(decoder.apply, method='head')
        volume, pull = jax.vjp(lambda last: head({'params': {'last': last}}, features), last)
        return volume, pull(gradient)

    function = jax.jit(volume_and_gradient, compiler_options=partitioning.keep_barriers('cpu'))
    compiled = function.lower(params, last, jnp.ones((1, 32, 32, 32, 1))).compile()
    maps = compiled.memory_analysis().temp_size_in_bytes / latent.size / 4 / 16
    assert maps < 3.6  # 4.3 without barriers, 3.7 if the last convolution alone has them
