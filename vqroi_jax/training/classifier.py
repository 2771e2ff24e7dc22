"""The classifier's training step: augmented ROIs, focal loss, and statistics of batch norms that move along.

Where features are frozen the head alone learns: batch norms are then as in evaluation, and nothing of them moves.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import flax.struct
import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from ml_collections import ConfigDict

from vqroi_jax import augmentation, losses
from vqroi_jax.models.resnet3d import ResNet3D, is_head
from vqroi_jax.training import optimizers, partitioning

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class ClassifierState:
    """What training changes."""

    step: jax.Array  # int32 []: updates tried
    params: Any  # float32
    statistics: Any  # float32: running means and variances of the batch norms
    optimizer: optax.OptState  # of the parameters that learn


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What is trained, and how.

    Attributes:
        model: the network.
        optimizer: without the learning rate.
        rate: learning rate by step.
        alpha: weights of the classes in the focal loss.
        gamma: its exponent.
        augment: block of `augmentation.draw_change`; None: ROIs as they are.
        spacing: mm a voxel along D, H and W, for that.
        seed: of initial values and augmentation.
        frozen: whether the head alone learns.
    """

    model: ResNet3D
    optimizer: optax.GradientTransformation
    rate: optax.Schedule
    alpha: tuple[float, ...]
    gamma: float
    augment: ConfigDict | None
    spacing: tuple[float, ...]
    seed: int
    frozen: bool = False

    def learning(self, params: Any) -> dict[str, Any]:
        """Those of the parameters that learn."""
        return {name: layer for name, layer in params.items() if is_head(name) or not self.frozen}


def _draw(recipe: Recipe, roi_size: tuple[int, ...], key: jax.Array) -> dict:
    variables = recipe.model.init(key, jnp.zeros((1, *roi_size, 1)))
    return {'params': variables['params'], 'statistics': variables['batch_stats']}


def _begin(recipe: Recipe, params: Any, statistics: Any) -> ClassifierState:
    optimizer = recipe.optimizer.init(recipe.learning(params))
    return ClassifierState(jnp.zeros((), jnp.int32), params, statistics, optimizer)


def state_shapes(recipe: Recipe, roi_size: tuple[int, ...]) -> ClassifierState:
    """Shapes and types of a state, without any array; arguments as of `create_state`."""
    return jax.eval_shape(lambda key: _begin(recipe, **_draw(recipe, roi_size, key)), jax.random.key(0))


def create_state(recipe: Recipe, roi_size: tuple[int, ...], mesh: Mesh, start: dict | None = None) -> ClassifierState:
    """The state before the first step, created where it will live.

    Args:
        recipe: whose `seed` decides the initial values.
        roi_size: D, H, W.
        mesh: the state is whole on each of its devices.
        start: `params` and `statistics` to begin with, as NumPy arrays; layers that it lacks are drawn. None: all are.
    """
    whole = partitioning.replicated(mesh)
    draw = functools.partial(_draw, recipe, roi_size)
    layers = jax.eval_shape(draw, jax.random.key(recipe.seed))['params']
    if start is None or layers.keys() - start['params'].keys():
        options = partitioning.one_run_options(mesh.devices.flat[0].platform)
        drawn = jax.jit(draw, out_shardings=whole, compiler_options=options)(jax.random.key(recipe.seed))
        start = {name: layers | (start[name] if start else {}) for name, layers in drawn.items()}
    begin = functools.partial(_begin, recipe)
    return jax.jit(begin, out_shardings=whole)(start['params'], start['statistics'])


def loss_and_metrics(
    recipe: Recipe, learning: Any, params: Any, statistics: Any, volume: jax.Array, label: jax.Array
) -> tuple[jax.Array, tuple[Any, Metrics]]:
    """Mean focal loss of a batch in training; and the statistics that it leaves, and metrics.

    `learning`, those of `params` that learn, are an argument of their own to be differentiated.
    """
    variables = {'params': {**params, **learning}, 'batch_stats': statistics}
    logits, changed = recipe.model.apply(variables, volume, train=not recipe.frozen, mutable='batch_stats')
    loss = jnp.mean(losses.focal(logits, label, jnp.asarray(recipe.alpha), recipe.gamma))
    accuracy = jnp.mean(jnp.argmax(logits, axis=-1) == label)
    return loss, (changed['batch_stats'], {'loss': loss, 'accuracy': accuracy})


def make_train_step(recipe: Recipe, mesh: Mesh) -> Callable[[ClassifierState, Batch], tuple[ClassifierState, Metrics]]:
    """The jitted step over a mesh: (state, global batch) to (state, metrics); the state is donated.

    Batch norms see the whole global batch. Where the loss or gradient is not finite, only `step` moves on.
    """

    def step(state: ClassifierState, batch: Batch) -> tuple[ClassifierState, Metrics]:
        volume, label = batch['volume'], batch['label']
        if recipe.augment is not None:
            key = jax.random.fold_in(jax.random.key(recipe.seed), state.step)
            keys = jax.vmap(lambda row: jax.random.fold_in(key, row))(jnp.arange(len(label)))
            volume = augmentation.augment(keys, volume, recipe.augment, recipe.spacing)
        learning = recipe.learning(state.params)
        gradient, (statistics, metrics) = jax.grad(loss_and_metrics, argnums=1, has_aux=True)(
            recipe, learning, state.params, state.statistics, volume, label
        )
        rate = recipe.rate(state.step)
        norm = optax.tree.norm(gradient)
        finite = jnp.isfinite(metrics['loss'] + norm)
        learnt, optimizer = optimizers.step(recipe.optimizer, gradient, learning, state.optimizer, rate, finite)
        statistics = optimizers.where(finite, statistics, state.statistics)
        metrics |= {'gradient_norm': norm, 'learning_rate': rate, 'finite': finite}
        return ClassifierState(state.step + 1, state.params | learnt, statistics, optimizer), metrics

    whole, rows = partitioning.replicated(mesh), partitioning.batch_sharding(mesh)
    return jax.jit(step, in_shardings=(whole, rows), out_shardings=(whole, whole), donate_argnums=0)


def make_logits(recipe: Recipe, mesh: Mesh) -> Callable[[Any, Any, jax.Array], jax.Array]:
    """The jitted forward pass of evaluation: (params, statistics, global volumes) to logits, by rows."""

    def logits(params: Any, statistics: Any, volume: jax.Array) -> jax.Array:
        return recipe.model.apply({'params': params, 'batch_stats': statistics}, volume)

    return jax.jit(logits, out_shardings=partitioning.batch_sharding(mesh))
