"""From a class to tokens: how stage 2's transformer is sampled.

`autoregressive` draws token after token from the causal model, with the keys and values of earlier ones kept;
`parallel` fills a bidirectional model's masks over a few passes. Both are pure functions of a key a sample: what a
sample becomes depends on its own key, class and given tokens, and, to the last bit, on the number of rows that are
computed together, for matrix products of different sizes round differently. `vqroi_jax.trained` therefore samples in
groups of fixed size. Only codes of the codebook can come out. Source: section 2.4 of the design; `parallel` after
Chang et al. 2022, MaskGIT.
"""

import dataclasses
import itertools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp
import ml_collections

from vqroi_jax.errors import InputError, check_fields
from vqroi_jax.models.transformer import Block, Transformer

UNKNOWN = -1  # in place of a token that is to be drawn
_BY_OUTPUT = 512  # least width of a network whose kernels are turned over: drawing then takes less time
_SEGMENTS = 4  # of a sequence; the caches grow from one to the next, so that early tokens do not attend to empty places


@dataclasses.dataclass(frozen=True)
class Sampling:
    """How tokens are drawn from logits; see `configs/generate.py` for the fields that it reads."""

    temperature: float = 1.0  # logits are divided by it; 0: the likeliest token
    top_k: int = 0  # so many of the likeliest codes may come out; 0: all
    top_p: float = 1.0  # the likeliest codes that together have this probability may come out
    guidance: float = 0.0  # logits + guidance * (logits - logits of the null class)
    passes: int = 12  # of parallel decoding
    choice_temperature: float = 4.5  # noise on what parallel decoding is sure of, in the first pass
    sub_batch: int = 16  # rows that are computed together; part of what a sample is, to the last bit

    @classmethod
    def read(cls, settings: ml_collections.ConfigDict, model: Transformer, codes: int, classes: int) -> 'Sampling':
        """Reads and checks the block `sampling` of a config.

        Args:
            settings: the block.
            model: that will be sampled.
            codes: in the codebook, K.
            classes: that it was trained on.

        Raises:
            InputError: a field has a value that it cannot have, or that this model has no use for.
        """
        method = method_of(model)
        if settings.method not in ('', method):
            raise InputError(f'config.sampling.method={settings.method!r}: this model is sampled by {method!r}')
        fields = (
            ('temperature', 0 <= settings.temperature < math.inf, '0 (the likeliest token) or more'),
            ('top_k', 0 <= settings.top_k <= codes, f'0 (off) to {codes}, the codes there are'),
            ('top_p', 0 < settings.top_p <= 1, 'above 0, up to 1 (off)'),
            ('guidance', 0 <= settings.guidance < math.inf, '0 (off) or more'),
            ('passes', settings.passes >= 1, '1 or more'),
            ('choice_temperature', 0 <= settings.choice_temperature < math.inf, '0 or more'),
            ('sub_batch', settings.sub_batch >= 1, '1 row or more'),
        )
        check_fields('config.sampling', settings, fields)
        if settings.guidance > 0 and model.vocabulary == codes + 1 + classes:
            raise InputError(
                f'config.sampling.guidance={settings.guidance}: the model has no null class; train it with '
                '--config.label_dropout above 0'
            )
        return cls(**{field.name: settings[field.name] for field in dataclasses.fields(cls)})


def method_of(model: Transformer) -> str:
    """How a model is sampled: 'autoregressive' or 'parallel'."""
    return 'autoregressive' if model.causal else 'parallel'


def drawing_params(model: Transformer, params: dict) -> dict:
    """A trained network's parameters as it is sampled with them; the functions below take no others.

    The kernels of linear layers, nearly all of a network, are of the model's dtype, to which they would be rounded for
    every product: reading them is most of what a token takes. A causal network's `blocks` become a list of one dict a
    layer, with those kernels turned over, [out, in], if it is wide.

    Args:
        model: of stage 2.
        params: float32, NumPy's or JAX's, blocks stacked; the result is of the same kind.
    """

    def kernel(path, p):
        return p.astype(model.dtype, copy=False) if path[-1].key == 'kernel' else p

    params = jax.tree_util.tree_map_with_path(kernel, params)
    if not model.causal:
        return params
    blocks = [jax.tree.map(lambda p, n=n: p[n], params['blocks']) for n in range(model.layers)]
    if _by_output(model):
        blocks = jax.tree.map(lambda p: p.T, blocks)
    return {**params, 'blocks': blocks}


def _by_output(model: Transformer) -> bool:
    return model.width >= _BY_OUTPUT


def sample(
    model: Transformer,
    params: dict,
    seed: jax.Array,
    labels: jax.Array,
    indices: jax.Array,
    given: jax.Array,
    codes: int,
    sampling: Sampling,
) -> jax.Array:
    """Draws tokens by the model's own method, each sample from the key that its seed, class and index make.

    Args:
        model: of stage 2.
        params: its `drawing_params`.
        seed: uint32 scalar.
        labels: class numbers int32 `[B]`.
        indices: uint32 `[B]`.
        given: int32 `[B, L]`: tokens in [0, K) that are to stay, and `UNKNOWN` where to draw.
        codes: in the codebook, K.
        sampling: how to draw.

    Returns:
        int32 `[B, L]`, each in [0, K).
    """
    key = jax.random.key(seed)
    keys = jax.vmap(lambda c, i: jax.random.fold_in(jax.random.fold_in(key, c), i))(labels, indices)
    method = autoregressive if model.causal else parallel
    return method(model, params, keys, labels, given, codes, sampling)


def keep_likely(logits: jax.Array, top_k: int = 0, top_p: float = 1.0) -> jax.Array:
    """Sets the logits of unlikely codes to minus infinity: first those beyond `top_k`, then those beyond `top_p`.

    Args:
        logits: float32 `[..., K]`.
        top_k: so many codes stay (more where they are as likely as the last); 0 or K and more: all.
        top_p: the fewest of the likeliest codes stay that together have at least this probability; 1: all.
    """
    if 0 < top_k < logits.shape[-1]:
        least = jax.lax.top_k(logits, top_k)[0][..., -1:]
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    if top_p < 1:
        ordered = jnp.sort(logits, axis=-1, descending=True)
        share = jax.nn.softmax(ordered, axis=-1)
        before = jnp.cumsum(share, axis=-1) - share
        number = jnp.sum(before < top_p, axis=-1, keepdims=True)
        least = jnp.take_along_axis(ordered, number - 1, axis=-1)
        logits = jnp.where(logits >= least, logits, -jnp.inf)
    return logits


def draw(logits: jax.Array, noise: jax.Array, sampling: Sampling) -> jax.Array:
    """Draws codes: int32 `[...]` from logits float32 `[..., K]` and Gumbel numbers of the same shape."""
    if sampling.temperature == 0:
        return jnp.argmax(logits, axis=-1).astype(jnp.int32)
    kept = keep_likely(logits / sampling.temperature, sampling.top_k, sampling.top_p)
    return jnp.argmax(kept + noise, axis=-1).astype(jnp.int32)


def gumbel(keys: jax.Array, step: jax.Array | int, shape: Sequence[int]) -> jax.Array:
    """Each sample's Gumbel numbers of a step, float32 `[B, *shape]`: they depend on its own key alone."""
    return jax.vmap(lambda key: jax.random.gumbel(jax.random.fold_in(key, step), tuple(shape), jnp.float32))(keys)


def _conditions(model: Transformer, labels: jax.Array, codes: int, sampling: Sampling) -> jax.Array:
    """Class tokens int32 `[B]`, and with guidance the null class for as many rows more."""
    tokens = codes + 1 + labels
    null = jnp.full_like(tokens, model.vocabulary - 1)
    return jnp.concatenate([tokens, null]) if sampling.guidance > 0 else tokens


def _guide(logits: jax.Array, sampling: Sampling) -> jax.Array:
    """Logits float32 `[B, ...]` from those of the conditions."""
    if sampling.guidance == 0:
        return logits
    of_class, of_null = jnp.split(logits, 2)
    return of_class + sampling.guidance * (of_class - of_null)


def _twice(rows: jax.Array, sampling: Sampling) -> jax.Array:
    return jnp.concatenate([rows, rows]) if sampling.guidance > 0 else rows


def autoregressive(
    model: Transformer,
    params: dict,
    keys: jax.Array,
    labels: jax.Array,
    given: jax.Array,
    codes: int,
    sampling: Sampling,
) -> jax.Array:
    """Draws tokens one after the other in raster order, each from all before it.

    Args:
        model: causal.
        params: its `drawing_params`.
        keys: random keys `[B]`.
        labels: class numbers int32 `[B]`.
        given: int32 `[B, L]`: tokens in [0, K) that are to stay, and `UNKNOWN` where to draw. A token is drawn from
            what lies before it alone, so given tokens tell later ones only. A given first half is prefix completion.
        codes: in the codebook, K.
        sampling: how to draw.

    Returns:
        int32 `[B, L]`, each in [0, K).
    """
    conditions = _conditions(model, labels, codes, sampling)
    length = given.shape[1]
    block = Block(model.width, model.heads, dtype=model.dtype, by_output=_by_output(model))
    empty = jnp.zeros((len(conditions), model.heads, 0, model.width // model.heads), model.dtype)

    def one_position(position, carry):
        ids, caches, tokens = carry
        x = model.apply({'params': params}, ids[:, None], position, method='embed')
        moved = []
        for layer, (cached_keys, cached_values) in zip(params['blocks'], caches, strict=True):
            x, *cache = block.apply({'params': layer}, x, cached_keys, cached_values, position, method='step')
            moved.append(tuple(cache))
        logits = model.apply({'params': params}, x, method='logits')[:, 0, :codes]
        drawn = draw(_guide(logits, sampling), gumbel(keys, position, (codes,)), sampling)
        fixed = jax.lax.dynamic_index_in_dim(given, position, axis=1, keepdims=False)
        token = jnp.where(fixed == UNKNOWN, drawn, fixed)
        tokens = jax.lax.dynamic_update_index_in_dim(tokens, token, position, axis=1)
        return _twice(token, sampling), moved, tokens

    carry = conditions, [(empty, empty)] * model.layers, jnp.zeros_like(given)
    bounds = [length * number // _SEGMENTS for number in range(_SEGMENTS + 1)]
    for begin, end in itertools.pairwise(sorted(set(bounds))):  # fewer tokens than segments leave some empty
        ids, caches, tokens = carry
        caches = jax.tree.map(lambda c, n=end - begin: jnp.pad(c, ((0, 0), (0, 0), (0, n), (0, 0))), caches)
        carry = jax.lax.fori_loop(begin, end, one_position, (ids, caches, tokens))
    return carry[2]


def parallel(
    model: Transformer,
    params: dict,
    keys: jax.Array,
    labels: jax.Array,
    given: jax.Array,
    codes: int,
    sampling: Sampling,
) -> jax.Array:
    """Draws all tokens at once, keeps those that the model is surest of, and draws the others anew, pass after pass.

    After pass t of T, a share of cos(pi/2 * t/T) of the unknown tokens is masked again: those with the least
    log-probability plus Gumbel noise, which fades out linearly over the passes.

    Args:
        model: bidirectional.
        params: its `drawing_params`.
        keys: random keys `[B]`.
        labels: class numbers int32 `[B]`.
        given: int32 `[B, L]`: tokens in [0, K) that are to stay (in-painting), and `UNKNOWN` where to draw.
        codes: in the codebook, K; token K is [MASK].
        sampling: how to draw.

    Returns:
        int32 `[B, L]`, each in [0, K).
    """
    conditions = _conditions(model, labels, codes, sampling)
    unknown = jnp.sum(given == UNKNOWN, axis=1)

    def one_pass(number, tokens):
        ids = jnp.concatenate([conditions[:, None], _twice(tokens, sampling)], axis=1)
        logits = model.apply({'params': params}, ids)[:, 1:, :codes]
        logits = _guide(logits, sampling)
        drawn = draw(logits, gumbel(keys, 2 * number, logits.shape[1:]), sampling)
        masked = tokens == codes
        sure = jnp.take_along_axis(jax.nn.log_softmax(logits), drawn[..., None], axis=-1)[..., 0]
        done = (number + 1) / sampling.passes
        sure += sampling.choice_temperature * (1 - done) * gumbel(keys, 2 * number + 1, sure.shape[1:])
        sure = jnp.where(masked, sure, jnp.inf)
        left = jnp.floor(unknown * jnp.cos(jnp.pi / 2 * done) + 1e-4).astype(jnp.int32)
        left = jnp.where(number + 1 < sampling.passes, left, 0)
        rank = jnp.argsort(jnp.argsort(sure, axis=1), axis=1)
        return jnp.where(rank < left[:, None], codes, jnp.where(masked, drawn, tokens))

    start = jnp.where(given == UNKNOWN, codes, given)
    return jax.lax.fori_loop(0, sampling.passes, one_pass, start)
