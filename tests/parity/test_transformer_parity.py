"""Stage 2's transformer, training steps and cached sampling against the PyTorch oracle."""

import functools
import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason="PyTorch is not installed: pip install -e '.[parity]'")

from oracle import torch_transformer  # noqa: E402
from oracle.comparison import QUICK_COMPILATION, assert_near  # noqa: E402
from oracle.from_flax import transformer_state  # noqa: E402

from vqroi_jax import decoding  # noqa: E402
from vqroi_jax.models.transformer import Transformer  # noqa: E402
from vqroi_jax.training import partitioning, transformer  # noqa: E402

SIZES = torch_transformer.Sizes(codes=13, classes=3, length=24, layers=3, width=32, heads=4)
GRID, ROWS, STEPS = (2, 3, 4), 4, 5
LEARNING_RATE = 1e-3
# It shifts all logits of a query alike: its gradient is rounding, which Adam turns into steps.
ZERO_GRADIENT = 'attention.key.bias'
CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'transformer.py'


def make_recipe(attention, loss_on):
    config = runpy.run_path(str(CONFIG))['get_config']('paper')
    config.model.layers, config.model.width, config.model.heads = SIZES.layers, SIZES.width, SIZES.heads
    config.model.attention, config.loss_on = attention, loss_on
    config.optimizer.learning_rate = LEARNING_RATE
    config.training.duration = f'{STEPS} steps'
    return transformer.make_recipe(config, SIZES.codes, SIZES.classes, GRID, steps_per_epoch=1.0)


def random_parameters(params):
    """None left at zero or one, kernels of the scale of their fan-in."""
    rng = np.random.default_rng(3)

    def draw(path, leaf):
        noise = rng.normal(size=leaf.shape)
        kind = path[-1].key
        scaled = {'kernel': noise * leaf.shape[-2] ** -0.5 if leaf.ndim > 1 else 0, 'scale': 1 + 0.1 * noise}
        return jnp.asarray(scaled.get(kind, 0.3 * noise), jnp.float32)

    return jax.tree_util.tree_map_with_path(draw, params)


@functools.cache
def start(attention='causal', loss_on='all'):
    """A recipe, a state with random parameters, and the oracle's trainer with the same."""
    recipe = make_recipe(attention, loss_on)
    state = transformer.create_state(recipe, partitioning.make_mesh({'data': 1}))
    state = state.replace(params=random_parameters(state.params))
    sizes = torch_transformer.Sizes(**{**vars(SIZES), 'causal': attention == 'causal'})
    trainer = torch_transformer.Trainer(sizes, LEARNING_RATE, recipe.settings.optimizer.final_learning_rate, STEPS)
    trainer.network.load_state_dict(transformer_state(state.params))
    trainer.network.double()
    return recipe, state, trainer


def make_example(recipe, step):
    """Ours, and what the oracle takes of it."""
    rng = np.random.default_rng(step)
    tokens = rng.integers(SIZES.codes, size=(ROWS, SIZES.length)).astype(np.int32)
    scores = rng.uniform(0.1, 0.9, tokens.shape).astype(np.float32)
    label = rng.integers(SIZES.classes, size=ROWS).astype(np.int32)
    keys = transformer.draw_keys(recipe, jnp.int32(step), ROWS).masking
    example = transformer.make_example(recipe, keys, tokens, scores, label)
    corrupted = transformer.masking.corrupt(keys, tokens, scores, recipe.masking).tokens
    theirs = (torch.tensor(np.asarray(array)).long() for array in (corrupted, tokens, label))
    return example, (*theirs, torch.tensor(np.asarray(example.weight) > 0))


def test_parameters_at_paper_scale_are_as_many_as_the_design_says():
    with torch.device('meta'):
        theirs = torch_transformer.GPT(torch_transformer.Sizes())
    assert sum(parameter.numel() for parameter in theirs.parameters()) == 304_939_008


@pytest.mark.parametrize('loss_on', ['all', 'masked'])
@pytest.mark.parametrize('attention', ['causal', 'bidirectional'])
def test_loss_and_gradients(attention, loss_on):
    recipe, state, trainer = start(attention, loss_on)
    example, theirs = make_example(recipe, 0)
    gradients = jax.jit(functools.partial(transformer.gradients, recipe), compiler_options=QUICK_COMPILATION)
    gradient, metrics = gradients(state.params, example)
    value = torch_transformer.loss(trainer.network, *theirs)
    assert float(metrics['loss']) == pytest.approx(value.item(), rel=1e-5)
    trainer.network.zero_grad()
    value.backward()
    ours = transformer_state(gradient)
    for name, parameter in trainer.network.named_parameters():
        if not name.endswith(ZERO_GRADIENT):
            assert_near(ours[name], parameter.grad, name)


@pytest.mark.parametrize('attention', ['causal', 'bidirectional'])
def test_logits(attention):
    recipe, state, trainer = start(attention)
    example, _ = make_example(recipe, 1)
    with torch.no_grad():
        theirs = trainer.network(torch.tensor(np.asarray(example.ids)).long())
    assert_near(recipe.model.apply({'params': state.params}, example.ids), theirs, 'logits', 1e-5)


def test_three_training_steps():
    start.cache_clear()  # the oracle's parameters move
    recipe, state, trainer = start()
    take_step = jax.jit(functools.partial(transformer.update, recipe), compiler_options=QUICK_COMPILATION)
    for step in range(3):
        example, theirs = make_example(recipe, step)
        state, metrics = take_step(state, example)
        assert float(metrics['loss']) == pytest.approx(trainer.step(*theirs), rel=1e-4)
        ours = transformer_state(state.params)
        for name, parameter in trainer.network.named_parameters():
            moved = (ours[name] - parameter.detach()) / LEARNING_RATE
            limit = 3 if name.endswith(ZERO_GRADIENT) else 0.5
            assert moved.abs().max() <= limit, f'{name} at step {step}'
            if limit < 3:
                assert moved.square().mean().sqrt() <= 0.01, f'{name} at step {step}'
    start.cache_clear()


@pytest.mark.parametrize(
    'changes', [{}, {'temperature': 0.0}, {'temperature': 0.8, 'top_k': 5}, {'top_p': 0.7}], ids=str
)
def test_cached_sampling_token_by_token(changes):
    recipe, state, trainer = start()
    keys, labels = jax.random.split(jax.random.key(7), ROWS), np.arange(ROWS, dtype=np.int32) % SIZES.classes
    given = np.full((ROWS, SIZES.length), decoding.UNKNOWN, np.int32)
    given[1, :9] = np.arange(9)
    sampling = decoding.Sampling(**changes)
    drawn = decoding.drawing_params(recipe.model, state.params)
    draw = jax.jit(
        lambda *arrays: decoding.autoregressive(recipe.model, drawn, *arrays, SIZES.codes, sampling),
        compiler_options=QUICK_COMPILATION,
    )
    tokens = np.asarray(draw(keys, labels, given))
    noise = np.stack([decoding.gumbel(keys, step, (SIZES.codes,)) for step in range(SIZES.length)], axis=1)
    theirs, ahead = torch_transformer.sample(
        trainer.network,
        torch.tensor(labels).long(),
        torch.tensor(noise).double(),
        torch.tensor(given).long(),
        **changes,
    )
    for row in range(ROWS):
        close = np.flatnonzero((ahead[row] < 1e-4).numpy() & (given[row] == decoding.UNKNOWN))
        told = close[0] if len(close) else SIZES.length
        assert told > SIZES.length // 2
        np.testing.assert_array_equal(tokens[row, :told], theirs[row, :told])


def test_ours_has_as_many_parameters():
    shapes = jax.eval_shape(Transformer(1024 + 1 + 2, 512).init, jax.random.key(0), jnp.zeros((1, 512), jnp.int32))
    assert sum(leaf.size for leaf in jax.tree.leaves(shapes)) == 304_939_008
