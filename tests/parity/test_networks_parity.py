"""Encoder, decoder, discriminator, scorer, classifier and codebook against the PyTorch oracle, same weights."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason="PyTorch is not installed: pip install -e '.[parity]'")

from oracle import from_flax, torch_vqgan  # noqa: E402
from oracle.comparison import (  # noqa: E402
    QUICK_COMPILATION,
    assert_near,
    channels_first,
    channels_last,
    random_parameters,
)

from vqroi_jax.models import quantizer  # noqa: E402
from vqroi_jax.models.discriminator import Discriminator  # noqa: E402
from vqroi_jax.models.vqgan import VQGAN  # noqa: E402

SIZES = torch_vqgan.Sizes(
    volume=16,
    channels=(16, 32),
    hidden=32,
    code_dim=16,
    num_codes=24,
    discriminator_channels=(16, 16, 32, 32),
    classifier_hidden=128,
    classes=3,
    dropout=0.0,
)
BATCH, LATENT = 3, (4,) * 3


@pytest.fixture(scope='module')
def generators():
    """Our generator, its variables, and the oracle with the same."""
    model = VQGAN(
        classes=SIZES.classes,
        channels=SIZES.channels,
        hidden=SIZES.hidden,
        codes=SIZES.num_codes,
        code_features=SIZES.code_dim,
        encoder_res_blocks=(1, 1),
        decoder_res_blocks=(1, 1),
        classifier_hidden=SIZES.classifier_hidden,
        classifier_dropout=SIZES.dropout,
    )
    shapes = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *[SIZES.volume] * 3, 1)))
    params = random_parameters(shapes['params'], seed=0)
    codes = np.random.default_rng(1).normal(size=(SIZES.num_codes, SIZES.code_dim))
    codes /= np.linalg.norm(codes, axis=1, keepdims=True)
    codebook = {'codes': jnp.asarray(codes, jnp.float32), 'usage': jnp.zeros(SIZES.num_codes)}

    oracle = torch_vqgan.VQGAN(SIZES).double()
    state = from_flax.vqgan_state(params, stages=2)
    state |= {f'codebook.{name}': value for name, value in from_flax.codebook_state(codebook).items()}
    oracle.load_state_dict(state)
    return model, {'params': params, 'codebook': {'codebook': codebook}}, oracle


def compare(ours, theirs, params, inputs, oracle, to_state):
    """Outputs, and the gradients of random projections of them at the inputs and at every parameter.

    Args:
        ours: function of (params, *inputs) to a tuple of arrays, channels last.
        theirs: function of the same inputs, channels first, to as many tensors.
        params: ours.
        inputs: arrays, channels last.
        oracle: whose parameters `theirs` depends on.
        to_state: from our parameters' gradient to the oracle's names.
    """
    tensors = [channels_first(x).requires_grad_() for x in inputs]
    expected = theirs(*tensors)
    rng = np.random.default_rng(5)
    cotangents = tuple(rng.normal(size=channels_last(x).shape).astype(np.float32) for x in expected)
    oracle.zero_grad()
    torch.autograd.backward(expected, [channels_first(c) for c in cotangents])

    def run(params, inputs, cotangents):
        outputs, pull = jax.vjp(ours, params, *inputs)
        return outputs, pull(cotangents)

    outputs, (at_params, *at_inputs) = jax.jit(run, compiler_options=QUICK_COMPILATION)(params, inputs, cotangents)
    for number, (ours_out, theirs_out) in enumerate(zip(outputs, expected, strict=True)):
        assert_near(ours_out, channels_last(theirs_out), f'output {number}')
    for number, (gradient, tensor) in enumerate(zip(at_inputs, tensors, strict=True)):
        assert_near(gradient, channels_last(tensor.grad), f'gradient at input {number}')
    state = to_state(at_params)
    gradients = {name: p.grad for name, p in oracle.named_parameters() if p.grad is not None}
    assert gradients
    for name, gradient in gradients.items():
        if name not in ZERO_GRADIENTS:
            assert_near(state[name], gradient, f'gradient of {name}')


# A constant added before a normalisation changes nothing: these gradients are rounding.
ZERO_GRADIENTS = ('scorer.2.bias',)


def generator_state(params):
    return from_flax.vqgan_state(params, stages=2)


def test_encoder(generators):
    model, variables, oracle = generators
    volume = np.random.default_rng(2).uniform(-1, 1, (BATCH, 16, 16, 16, 1)).astype(np.float32)
    compare(
        lambda p, x: (model.apply({'params': p}, x, method='encode'),),
        lambda x: (oracle.pre_quantisation(oracle.encoder(x)),),
        variables['params'],
        [volume],
        oracle,
        generator_state,
    )


def test_decoder(generators):
    model, variables, oracle = generators
    latent = np.random.default_rng(3).normal(size=(BATCH, *LATENT, SIZES.code_dim)).astype(np.float32)

    def decode(params, x):
        bound = model.bind({'params': params})
        return (bound.head(bound.decoder(bound.post_quantisation(x))),)

    compare(
        decode,
        lambda x: (oracle.decoder(oracle.post_quantisation(x)),),
        variables['params'],
        [latent],
        oracle,
        generator_state,
    )


def test_scorer_and_classifier(generators):
    model, variables, oracle = generators
    latent = np.random.default_rng(4).normal(0.5, 2.0, (BATCH, *LATENT, SIZES.code_dim)).astype(np.float32)

    def score(params, z):
        bound = model.bind({'params': params})
        scores = bound.scorer(z)
        return scores[..., None], bound.classifier(z, scores)

    def oracle_score(z):
        scores = oracle.scorer(z)
        return scores, oracle.classifier(z, scores)

    compare(score, oracle_score, variables['params'], [latent], oracle, generator_state)


def test_discriminator_logits_and_hidden_maps():
    sizes = torch_vqgan.Sizes(discriminator_channels=SIZES.discriminator_channels)
    model, oracle = Discriminator(sizes.discriminator_channels), torch_vqgan.Discriminator(sizes).double()
    volume = np.random.default_rng(6).uniform(-1, 1, (1, 64, 64, 64, 1)).astype(np.float32)
    params = random_parameters(jax.eval_shape(model.init, jax.random.key(0), volume)['params'], seed=7)
    oracle.load_state_dict(from_flax.discriminator_state(params, stages=4))

    def ours(p, x):
        logits, hidden = model.apply({'params': p}, x)
        return (logits, *hidden)

    def theirs(x):
        logits, hidden = oracle(x)
        return (logits, *hidden)

    compare(ours, theirs, params, [volume], oracle, lambda p: from_flax.discriminator_state(p, stages=4))


def test_codebook_looks_up_and_moves_alike(generators):
    _, variables, _ = generators
    z = np.random.default_rng(8).normal(size=(BATCH, *LATENT, SIZES.code_dim)).astype(np.float32)
    codes, usage = variables['codebook']['codebook']['codes'], np.full(SIZES.num_codes, 0.3, np.float32)
    z[..., 0] = np.abs(z[..., 0]) + 3  # one-sided, so that some codes go unused
    normalised = quantizer.l2_normalise(z)
    tokens = quantizer.nearest_codes(normalised, codes)
    assignments = quantizer.assign(normalised, tokens, SIZES.num_codes)
    moved, new_usage = quantizer.update_codes(codes, usage, assignments, decay=0.99)

    book = torch_vqgan.Codebook(SIZES).double()
    book.load_state_dict(from_flax.codebook_state({'codes': codes, 'usage': usage}))
    theirs, code, _, indices = book(channels_first(z))
    book.update(theirs, indices)

    np.testing.assert_array_equal(tokens, indices.numpy())
    assert_near(normalised, channels_last(theirs), 'normalised latent')
    assert_near(codes[tokens], channels_last(code), 'codes looked up')
    unused = np.bincount(np.ravel(tokens), minlength=SIZES.num_codes) == 0
    assert 0 < unused.sum() < SIZES.num_codes
    np.testing.assert_array_equal(np.asarray(moved)[unused], np.asarray(codes)[unused])
    assert_near(moved - codes, book.codes.numpy() - np.asarray(codes), 'move of the codes', tolerance=1e-3)
    np.testing.assert_allclose(new_usage, book.usage.numpy(), rtol=1e-6)
