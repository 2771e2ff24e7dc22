"""Stage 2's state and training step: pure functions of (state, batch), jitted over the device mesh.

A step corrupts the tokens (`vqroi_jax.masking`), puts the class in front, and learns the true ones. A causal model
reads the class and all corrupted tokens but the last, so what it predicts at a position it has not seen there; a
bidirectional one reads the class and all of them. With augmentation the batch brings each sample's tokens in all its
views, mirrored and not, and a step draws one. Source: sections 2.3 to 2.5 of the design.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from vqroi_jax import masking
from vqroi_jax.errors import InputError, check_fields
from vqroi_jax.models.layers import REMATS
from vqroi_jax.models.transformer import Transformer
from vqroi_jax.training import optimizers, partitioning
from vqroi_jax.training.durations import to_steps

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]

AXES = ('depth', 'height', 'width')  # of a volume


@flax.struct.dataclass
class TransformerState:
    """All that a run of stage 2 is, between two steps."""

    step: jax.Array  # int32: steps taken
    params: Any  # float32, blocks stacked along their first axis
    optimizer: optax.OptState
    average: Any  # moving average of `params`; None where the config has none


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step needs to know besides the state."""

    model: Transformer
    masking: masking.Settings
    codes: int  # in the codebook, K; token K is [MASK]
    classes: int
    optimizer: optax.GradientTransformation  # without the learning rate
    rate: optax.Schedule
    settings: ml_collections.ConfigDict  # the task's config


def check_settings(config: ml_collections.ConfigDict) -> None:
    """Refuses values that training cannot use, before anything is read.

    Raises:
        InputError: naming the field and what would do.
    """
    fields = (
        ('seed', 0 <= config.seed < 2**32, '0 to 2**32 - 1'),
        ('ema_decay', 0 <= config.ema_decay < 1, '0 (none) to below 1'),
        ('figure_rois', config.figure_rois >= 1, '1 or more'),
        ('eval_batch_size', config.eval_batch_size >= 1, '1 or more'),
    )
    check_fields('config', config, fields)
    optimizers.check(config.optimizer, 'config.optimizer')


def make_model(config: ml_collections.ConfigDict, codes: int, classes: int, length: int) -> Transformer:
    """The network of a config of the task `transformer`.

    Args:
        config: as `configs/transformer.py` has it.
        codes: in the codebook.
        classes: of the cohort.
        length: tokens a sample.

    Raises:
        InputError: a size does not divide, or a name is unknown.
    """
    model = config.model
    for field, value, known in (
        ('dtype', config.dtype, ('float32', 'bfloat16')),
        ('loss_on', config.loss_on, ('all', 'masked')),
        ('model.attention', model.attention, ('causal', 'bidirectional')),
        ('model.remat', model.remat, REMATS),
    ):
        if value not in known:
            raise InputError(f'config.{field}={value!r}: choose one of {", ".join(known)}')
    for field in ('layers', 'width', 'heads'):
        if model[field] < 1:
            raise InputError(f'config.model.{field}={model[field]}: expected 1 or more')
    if model.width % model.heads:
        raise InputError(f'config.model.width={model.width} does not divide by config.model.heads={model.heads}')
    if not 0 <= config.label_dropout < 1:
        raise InputError(f'config.label_dropout={config.label_dropout}: expected a share from 0 to below 1')
    if unknown := [axis for axis in config.augment.flip if axis not in AXES]:
        raise InputError(f'config.augment.flip: {unknown[0]!r} is none of {", ".join(AXES)}')
    if len(set(config.augment.flip)) < len(config.augment.flip):
        raise InputError(f'config.augment.flip={tuple(config.augment.flip)}: expected each axis once')
    causal = model.attention == 'causal'
    return Transformer(
        vocabulary=codes + 1 + classes + (config.label_dropout > 0),
        positions=length if causal else length + 1,
        layers=model.layers,
        width=model.width,
        heads=model.heads,
        causal=causal,
        remat=model.remat,
        dtype=jnp.dtype(config.dtype),
    )


def check_mesh(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Refuses a mesh that would cut attention heads.

    Raises:
        InputError: naming the fields.
    """
    heads, parts = config.model.heads, mesh.shape['model']
    if heads % parts:
        raise InputError(f'config.model.heads={heads} does not divide by config.mesh.model={parts}')


def make_recipe(
    config: ml_collections.ConfigDict, codes: int, classes: int, grid: Sequence[int], steps_per_epoch: float
) -> Recipe:
    """Network, masking and durations of a config of the task `transformer`.

    Args:
        config: as `configs/transformer.py` has it.
        codes: in the codebook.
        classes: of the cohort.
        grid: latent depth, height and width.
        steps_per_epoch: steps that see as many samples as the cohort has.

    Raises:
        InputError: a setting cannot be used.
    """
    check_settings(config)
    settings = masking.Settings.read(config.masking, tuple(grid), codes)
    settings.check()
    total = to_steps(config.training.duration, steps_per_epoch, 'config.training.duration')
    return Recipe(
        model=make_model(config, codes, classes, math.prod(grid)),
        masking=settings,
        codes=codes,
        classes=classes,
        optimizer=optimizers.make_optimizer(config.optimizer, decayed=_is_kernel),
        rate=optimizers.cosine_rate(config.optimizer, total),
        settings=config,
    )


def _is_kernel(params: Any) -> Any:
    """Which parameters decay: the kernels of linear layers, the head's included, and no embedding."""
    return jax.tree_util.tree_map_with_path(lambda path, _: path[-1].key == 'kernel', params)


def _initial_state(recipe: Recipe) -> TransformerState:
    ids = jnp.zeros((1, recipe.model.positions), jnp.int32)
    params = recipe.model.init(jax.random.key(recipe.settings.seed), ids)['params']
    return TransformerState(
        step=jnp.zeros((), jnp.int32),
        params=params,
        optimizer=recipe.optimizer.init(params),
        average=jax.tree.map(jnp.copy, params) if recipe.settings.ema_decay > 0 else None,
    )


def state_shapes(recipe: Recipe) -> TransformerState:
    """Shapes and types of a state, without any array."""
    return jax.eval_shape(functools.partial(_initial_state, recipe))


def create_state(recipe: Recipe, mesh: Mesh) -> TransformerState:
    """The state before the first step, created where it will live.

    Args:
        recipe: whose `settings.seed` decides the initial values.
        mesh: whose axes `model` and `fsdp` share the arrays out.
    """
    return partitioning.create(functools.partial(_initial_state, recipe), mesh)


class Example(NamedTuple):
    """A batch as the network sees it."""

    ids: jax.Array  # int32 [B, T]: the class, then corrupted tokens
    target: jax.Array  # int32 [B, L]: the true tokens
    weight: jax.Array  # float32 [B, L]: 1 where a position counts for the loss
    corrupted: jax.Array  # bool [B, L]


def make_example(recipe: Recipe, keys: jax.Array, tokens: jax.Array, scores: jax.Array, label: jax.Array) -> Example:
    """Corrupts tokens and puts the class in front.

    Args:
        recipe: whose masking, loss positions and attention are used.
        keys: random keys `[B]`.
        tokens: int32 `[B, L]`.
        scores: float32 `[B, L]`, importance in (0, 1).
        label: int32 `[B]`; the number of classes stands for none (a dropped label).
    """
    corruption = masking.corrupt(keys, tokens, scores, recipe.masking)
    corrupted = corruption.roles != masking.Role.KEPT
    counted = corrupted if recipe.settings.loss_on == 'masked' else jnp.ones_like(corrupted)
    read = corruption.tokens[:, :-1] if recipe.model.causal else corruption.tokens
    ids = jnp.concatenate([recipe.codes + 1 + label[:, None], read], axis=1)
    return Example(ids, tokens, counted.astype(jnp.float32), corrupted)


def token_logits(recipe: Recipe, params: Any, ids: jax.Array) -> jax.Array:
    """The logits of every token of the grid, float32 `[B, L, V]`."""
    logits = recipe.model.apply({'params': params}, ids)
    return logits if recipe.model.causal else logits[:, 1:]


class Draws(NamedTuple):
    """A step's random keys, one for each row of the batch."""

    masking: jax.Array
    label: jax.Array
    view: jax.Array


def draw_keys(recipe: Recipe, step: jax.Array, rows: int) -> Draws:
    """The keys of a step: they depend on the seed, the step and the row of the global batch, and nothing else."""
    key = jax.random.fold_in(jax.random.key(recipe.settings.seed), step)
    keys = jax.vmap(lambda row: jax.random.split(jax.random.fold_in(key, row), 3))(jnp.arange(rows))
    return Draws(keys[:, 0], keys[:, 1], keys[:, 2])


def drop_labels(keys: jax.Array, label: jax.Array, classes: int, share: float) -> jax.Array:
    """Replaces a share of the labels int32 `[B]` by `classes`, which stands for none."""
    dropped = jax.vmap(lambda key: jax.random.bernoulli(key, share))(keys)
    return jnp.where(dropped, classes, label)


def draw_views(keys: jax.Array, tokens: jax.Array, scores: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Draws one of each sample's views, all as likely: as fair coins would that mirror along each axis.

    Args:
        keys: random keys `[B]`.
        tokens: int32 `[B, V, L]`.
        scores: float32 `[B, V, L]`.

    Returns:
        Tokens and scores `[B, L]`.
    """

    def draw(key, tokens, scores):
        view = jax.random.randint(key, (), 0, len(tokens))
        return tokens[view], scores[view]

    return jax.vmap(draw)(keys, tokens, scores)


def gradients(recipe: Recipe, params: Any, example: Example) -> tuple[Any, Metrics]:
    """Gradient of the mean cross-entropy over all positions that count in the whole global batch, and metrics.

    Computed in `micro_batches` parts one after the other, with the same result.
    """
    total = jnp.maximum(example.weight.sum(), 1.0)
    hidden = jnp.maximum(example.corrupted.sum(), 1)

    def part_loss(params: Any, part: Example) -> tuple[jax.Array, Metrics]:
        logits = token_logits(recipe, params, part.ids)
        loss = jnp.sum(optax.softmax_cross_entropy_with_integer_labels(logits, part.target) * part.weight) / total
        right = jnp.sum((jnp.argmax(logits, axis=-1) == part.target) & part.corrupted) / hidden
        return loss, {'loss': loss, 'top1': right}

    number = recipe.settings.micro_batches
    if number == 1:
        return jax.grad(part_loss, has_aux=True)(params, example)

    def add(total, part):
        return jax.tree.map(jnp.add, total, jax.grad(part_loss, has_aux=True)(params, part)), None

    zeros = jax.tree.map(jnp.zeros_like, params), {'loss': jnp.zeros(()), 'top1': jnp.zeros(())}
    return jax.lax.scan(add, zeros, partitioning.micro_batches(example, number))[0]


def update(recipe: Recipe, state: TransformerState, example: Example) -> tuple[TransformerState, Metrics]:
    """One step on a given example; where the loss or gradient is not finite, only `step` moves on.

    Returns:
        The new state, and metrics: float32 scalars, `finite` bool.
    """
    gradient, metrics = gradients(recipe, state.params, example)
    rate = recipe.rate(state.step)
    norm = optax.tree.norm(gradient)
    finite = jnp.isfinite(metrics['loss'] + norm)
    params, optimizer = optimizers.step(recipe.optimizer, gradient, state.params, state.optimizer, rate, finite)
    average = optimizers.moving_average(params, state.average, recipe.settings.ema_decay, state.step, finite)
    metrics |= {
        'perplexity': jnp.exp(metrics['loss']),
        'gradient_norm': norm,
        'learning_rate': rate,
        'finite': finite,
    }
    return TransformerState(state.step + 1, params, optimizer, average), metrics


def jit_step(
    recipe: Recipe, state: TransformerState, mesh: Mesh
) -> Callable[[TransformerState, Batch], tuple[TransformerState, Metrics]]:
    """The step over a mesh, for `jax.jit`'s own methods as well: (state, global batch) to (state, metrics).

    Args:
        recipe: what to compute.
        state: or its shapes; the state that is stepped is donated.
        mesh: to compute on.

    Returns:
        A jitted function of batches that bring `label` and, of `tokens` and `scores`, `[B, L]`, or `[B, V, L]` where
        the config mirrors.
    """
    settings = recipe.settings

    def step(state, batch):
        label, tokens, scores = batch['label'], batch['tokens'], batch['scores']
        keys = draw_keys(recipe, state.step, len(label))
        if settings.augment.flip:
            tokens, scores = draw_views(keys.view, tokens, scores)
        if settings.label_dropout > 0:
            label = drop_labels(keys.label, label, recipe.classes, settings.label_dropout)
        return update(recipe, state, make_example(recipe, keys.masking, tokens, scores, label))

    whole, rows = partitioning.replicated(mesh), partitioning.batch_sharding(mesh)
    places, step = partitioning.state_shardings(state, mesh), partitioning.traced_on(mesh, step)
    return jax.jit(step, in_shardings=(places, rows), out_shardings=(places, whole), donate_argnums=0)


def evaluation_params(state: TransformerState) -> Any:
    """The parameters for evaluation and sampling: their moving average where there is one."""
    return state.params if state.average is None else state.average
