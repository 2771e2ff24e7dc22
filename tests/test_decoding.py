"""Sampling against an oracle that recomputes everything for every token, in NumPy but for the network itself."""

import functools
import itertools
import re

import jax
import jax.numpy as jnp
import ml_collections
import numpy as np
import pytest

from vqroi_jax import decoding
from vqroi_jax.decoding import UNKNOWN, Sampling
from vqroi_jax.errors import InputError
from vqroi_jax.models.transformer import Transformer

CODES, CLASSES, LENGTH, ROWS = 13, 3, 18, 5
CLEAR = 1e-4  # the two best must lie this far apart for the best to be told


def make_model(causal=True, null=True):
    positions = LENGTH if causal else LENGTH + 1
    return Transformer(CODES + 1 + CLASSES + null, positions, layers=2, width=24, heads=4, causal=causal)


@functools.cache
def start(causal=True):
    """A model with parameters so large that what it says depends on what it reads."""
    model = make_model(causal)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2), jnp.int32))['params']
    leaves, tree = jax.tree.flatten(params)
    rng = np.random.default_rng(0)
    leaves = [np.asarray(leaf + rng.normal(0, 0.4, leaf.shape), np.float32) for leaf in leaves]
    return model, jax.tree.unflatten(tree, leaves)


@functools.cache
def forward(causal=True):
    model, params = start(causal)
    return jax.jit(lambda ids: model.apply({'params': params}, ids))


def softmax(x):
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def filtered(logits, sampling):
    """Section 2.4's order: temperature, ban, top-k, top-p, one row at a time."""
    kept = np.full(logits.shape, -np.inf)
    order = np.argsort(-logits, kind='stable')
    if sampling.top_k:
        order = order[: sampling.top_k]
    share, total = softmax(logits[order] / sampling.temperature), 0.0
    for code, probability in zip(order, share, strict=True):
        if total >= sampling.top_p:
            break
        kept[code] = logits[code] / sampling.temperature
        total += probability
    return kept


def choose(logits, noise, sampling):
    """The drawn code, and whether rounding could have changed it."""
    scores = logits if sampling.temperature == 0 else filtered(logits, sampling) + noise
    first, second = np.sort(scores)[[-1, -2]]
    return int(np.argmax(scores)), first - second > CLEAR


def guided_logits(ids, labels, sampling, causal):
    """Logits of the codes `[B, T, K]` after the class and `ids`."""

    def of(condition):
        sequence = np.concatenate([condition[:, None], ids], axis=1)
        padded = np.pad(sequence, ((0, 0), (0, LENGTH + (not causal) - sequence.shape[1])))
        return np.asarray(forward(causal)(padded), np.float64)[:, : sequence.shape[1], :CODES]

    of_class = of(CODES + 1 + labels)
    if sampling.guidance == 0:
        return of_class
    of_null = of(np.full_like(labels, CODES + 1 + CLASSES))
    return of_class + sampling.guidance * (of_class - of_null)


def uncached(keys, labels, given, sampling):
    """Tokens `[B, L]`, and for each row how many are told beyond rounding."""
    tokens = np.zeros((len(labels), 0), np.int64)
    told = np.full(len(labels), LENGTH)
    for position in range(LENGTH):
        logits = guided_logits(tokens, labels, sampling, causal=True)[:, -1]
        noise = np.asarray(decoding.gumbel(keys, position, (CODES,)))
        column = []
        for row in range(len(labels)):
            code, clear = choose(logits[row], noise[row], sampling)
            fixed = given[row, position]
            if fixed == UNKNOWN and not clear:
                told[row] = min(told[row], position)
            column.append(code if fixed == UNKNOWN else fixed)
        tokens = np.concatenate([tokens, np.array(column)[:, None]], axis=1)
    return tokens, told


def keys_and_labels(seed=0, rows=ROWS):
    return jax.random.split(jax.random.key(seed), rows), np.arange(rows, dtype=np.int32) % CLASSES


def autoregressive(keys, labels, given, sampling):
    model, params = start()
    drawn = decoding.drawing_params(model, params)
    draw = jax.jit(lambda *args: decoding.autoregressive(model, drawn, *args, CODES, sampling))
    return np.asarray(draw(keys, labels, given))


NOTHING = np.full((ROWS, LENGTH), UNKNOWN, np.int32)


@pytest.fixture(params=[24, 25], ids=['kernels by output', 'kernels by input'])
def least_width(request, monkeypatch):
    """The width of the models here lies on either side of where kernels are turned over."""
    monkeypatch.setattr(decoding, '_BY_OUTPUT', request.param)


@pytest.mark.parametrize('causal', [True, False], ids=['causal', 'bidirectional'])
def test_kernels_are_rounded_once_and_samples_are_the_same(causal):
    model, params = start(causal)
    model = model.clone(dtype=jnp.bfloat16)
    rounded = decoding.drawing_params(model, params)
    full = decoding.drawing_params(model.clone(dtype=jnp.float32), params)
    for path, leaf in jax.tree.leaves_with_path(rounded):
        assert isinstance(leaf, np.ndarray)
        assert leaf.dtype == (jnp.bfloat16 if path[-1].key == 'kernel' else jnp.float32)
    keys, labels = keys_and_labels()
    method = decoding.autoregressive if causal else decoding.parallel
    draw = jax.jit(lambda params: method(model, params, keys, labels, NOTHING, CODES, Sampling()))
    np.testing.assert_array_equal(draw(rounded), draw(full))


@pytest.mark.parametrize('rows', [1, 4])
@pytest.mark.usefixtures('least_width')
def test_caches_are_written_where_they_are(rows):
    model, params = start()
    shapes = (
        jax.eval_shape(functools.partial(decoding.drawing_params, model), params),
        *keys_and_labels(rows=rows),
        NOTHING[:1].repeat(rows, 0),
    )
    draw = jax.jit(lambda *args: decoding.autoregressive(model, *args, CODES, Sampling()))
    text = draw.lower(*shapes).compile().as_text()
    caches = rf'f32\[(?:{rows},{model.heads}|{rows * model.heads}),\d+,{model.width // model.heads}\]'
    assert len(re.findall(rf'= {caches}\S* fusion', text)) >= 2 * model.layers
    copies = re.findall(rf'= {caches}\S* copy\((.*?)\)', text)
    assert [copied for copied in copies if 'broadcast' not in copied] == []  # of zeros: of a segment's new places


@pytest.mark.parametrize(
    'sampling',
    [
        Sampling(),
        Sampling(temperature=0.0),
        Sampling(temperature=0.7, top_k=4),
        Sampling(temperature=1.5, top_p=0.6),
        Sampling(top_k=6, top_p=0.8, guidance=1.5),
        Sampling(top_k=CODES),
    ],
    ids=str,
)
@pytest.mark.usefixtures('least_width')
def test_cached_sampling_equals_recomputing_everything(sampling):
    keys, labels = keys_and_labels()
    tokens = autoregressive(keys, labels, NOTHING, sampling)
    expected, told = uncached(keys, labels, NOTHING, sampling)
    assert told.sum() > 0.8 * ROWS * LENGTH
    for row, length in enumerate(told):
        np.testing.assert_array_equal(tokens[row, :length], expected[row, :length])
    assert tokens.min() >= 0
    assert tokens.max() < CODES


@pytest.mark.parametrize('length', [1, 3])
def test_sequences_shorter_than_the_caches_segments_are_drawn(length):
    keys, labels = keys_and_labels()
    given = np.full((ROWS, LENGTH), UNKNOWN, np.int32)
    expected = autoregressive(keys, labels, given, Sampling(temperature=0.0))[:, :length]
    drawn = autoregressive(keys, labels, given[:, :length], Sampling(temperature=0.0))
    np.testing.assert_array_equal(drawn, expected)


def test_given_tokens_stay_and_tell_later_ones_only():
    keys, labels = keys_and_labels()
    free = autoregressive(keys, labels, NOTHING, Sampling())
    rng = np.random.default_rng(1)
    given = NOTHING.copy()
    given[:, 9:13] = rng.integers(CODES, size=(ROWS, 4))
    tokens = autoregressive(keys, labels, given, Sampling())
    np.testing.assert_array_equal(tokens[:, :9], free[:, :9])
    np.testing.assert_array_equal(tokens[:, 9:13], given[:, 9:13])
    assert (tokens[:, 13:] != free[:, 13:]).any()
    expected, told = uncached(keys, labels, given, Sampling())
    for row, length in enumerate(told):
        np.testing.assert_array_equal(tokens[row, :length], expected[row, :length])


def test_a_sample_is_the_same_in_any_place_of_the_batch():
    keys, labels = keys_and_labels()
    order = np.array([3, 0, 4, 2, 1])
    tokens = autoregressive(keys, labels, NOTHING, Sampling())
    np.testing.assert_array_equal(autoregressive(keys[order], labels[order], NOTHING, Sampling()), tokens[order])


def test_likely_codes_are_kept_as_the_rules_say():
    logits = np.log(np.array([0.4, 0.3, 0.15, 0.1, 0.05]))
    rng = np.random.default_rng(0)
    for top_k, top_p in itertools.product((0, 1, 2, 5, 9), (1.0, 0.9, 0.7, 0.69, 0.4, 1e-3)):
        order = rng.permutation(5)
        kept = decoding.keep_likely(jnp.asarray(logits[order], jnp.float32), top_k, top_p)
        expected = filtered(logits[order], Sampling(top_k=top_k, top_p=top_p - 1e-6))
        np.testing.assert_array_equal(np.isfinite(kept), np.isfinite(expected), err_msg=f'{top_k} {top_p}')


def test_frequencies_are_those_of_the_softmax():
    logits = jnp.array([1.0, 0.0, -1.0, 0.5])
    noise = decoding.gumbel(jax.random.split(jax.random.key(0), 20_000), 0, (4,))
    drawn = decoding.draw(jnp.broadcast_to(logits, noise.shape), noise, Sampling(temperature=0.8, top_k=3))
    share = np.bincount(np.asarray(drawn), minlength=4) / len(drawn)
    expected = softmax(np.array([1.0, 0.0, -np.inf, 0.5]) / 0.8)
    np.testing.assert_allclose(share, expected, atol=0.015)


def parallel_oracle(keys, labels, given, sampling):
    """The rules of parallel decoding in loops."""
    tokens, told = np.where(given == UNKNOWN, CODES, given), np.ones(len(labels), bool)
    for number in range(sampling.passes):
        logits = guided_logits(tokens, labels, sampling, causal=False)[:, 1:]
        noise = np.asarray(decoding.gumbel(keys, 2 * number, (LENGTH, CODES)))
        doubt = np.asarray(decoding.gumbel(keys, 2 * number + 1, (LENGTH,)))
        done = (number + 1) / sampling.passes
        for row in range(len(labels)):
            masked = np.flatnonzero(tokens[row] == CODES)
            sure = {}
            for place in masked:
                code, clear = choose(logits[row, place], noise[row, place], sampling)
                told[row] &= clear
                tokens[row, place] = code
                fading = sampling.choice_temperature * (1 - done)
                sure[place] = np.log(softmax(logits[row, place]))[code] + fading * doubt[row, place]
            unknown = np.sum(given[row] == UNKNOWN)
            left = 0 if number + 1 == sampling.passes else int(unknown * np.cos(np.pi / 2 * done) + 1e-4)
            unsure = sorted(masked, key=sure.get)
            for one, other in itertools.pairwise(unsure):
                told[row] &= sure[other] - sure[one] > CLEAR
            tokens[row, unsure[:left]] = CODES
    return tokens, told


@pytest.mark.parametrize(
    'sampling', [Sampling(passes=4), Sampling(passes=1), Sampling(passes=5, guidance=0.7, temperature=0.8)], ids=str
)
def test_parallel_decoding_equals_the_rules_in_loops(sampling):
    keys, labels = keys_and_labels(2, rows=8)
    given = np.full((8, LENGTH), UNKNOWN, np.int32)
    given[1::2, 3:9] = np.random.default_rng(0).integers(CODES, size=(4, 6))
    model, params = start(causal=False)
    draw = jax.jit(lambda *args: decoding.parallel(model, params, *args, CODES, sampling))
    tokens = np.asarray(draw(keys, labels, given))
    expected, told = parallel_oracle(keys, labels, given, sampling)
    assert told.sum() >= 4
    np.testing.assert_array_equal(tokens[told], expected[told])
    np.testing.assert_array_equal(tokens[given != UNKNOWN], given[given != UNKNOWN])
    assert tokens.min() >= 0
    assert tokens.max() < CODES


def settings(**changes):
    values = {
        'method': '',
        'temperature': 1.0,
        'top_k': 0,
        'top_p': 1.0,
        'guidance': 0.0,
        'passes': 12,
        'choice_temperature': 4.5,
        'sub_batch': ROWS,
    }
    return ml_collections.ConfigDict({**values, **changes})


@pytest.mark.parametrize(
    ('changes', 'words'),
    [
        ({'method': 'parallel'}, "this model is sampled by 'autoregressive'"),
        ({'temperature': -0.1}, r'sampling.temperature=-0.1: expected 0 \(the likeliest token\)'),
        ({'top_k': CODES + 1}, f'sampling.top_k={CODES + 1}: expected 0 .off. to {CODES}'),
        ({'top_p': 0.0}, 'sampling.top_p=0.0: expected above 0'),
        ({'guidance': float('nan')}, 'sampling.guidance=nan: expected 0'),
        ({'passes': 0}, 'sampling.passes=0: expected 1'),
        ({'choice_temperature': -1.0}, 'sampling.choice_temperature=-1.0'),
        ({'sub_batch': 0}, 'sampling.sub_batch=0: expected 1'),
    ],
    ids=str,
)
def test_settings_that_cannot_be_are_refused(changes, words):
    with pytest.raises(InputError, match=words):
        Sampling.read(settings(**changes), make_model(), CODES, CLASSES)


def test_guidance_needs_a_model_that_has_seen_no_class():
    with pytest.raises(InputError, match='no null class; train it with --config'):
        Sampling.read(settings(guidance=1.0), make_model(null=False), CODES, CLASSES)
    assert Sampling.read(settings(guidance=1.0), make_model(), CODES, CLASSES).guidance == 1.0
