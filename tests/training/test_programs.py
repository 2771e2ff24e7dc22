"""What the compiled programs are made of: bfloat16 products, no calls back to Python, one trace, no copy of the state.

Steps and sampler are traced from shapes, at the small sizes of the configs' variants; nothing is compiled but where a
test says so.
"""

import functools
import runpy
import warnings
from collections import Counter
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import vqroi_jax
from vqroi_jax import train_classifier
from vqroi_jax.decoding import Sampling, drawing_params
from vqroi_jax.trained import draw_function
from vqroi_jax.training import classifier, optimizers, partitioning, transformer, vqgan

ROOT = Path(__file__).parents[2]
PACKAGE = Path(vqroi_jax.__file__).parent
CODES, GRID = 32, (4, 4, 4)

# Products of float32, by the file and function that they stand in; all others are of bfloat16.
STAGE1_FLOAT32 = {
    ('models/quantizer.py', 'nearest_codes'): 'which of two near codes is nearer must not depend on rounding',
    ('models/quantizer.py', 'assign'): 'sums of latent vectors that the codebook moves by',
    ('models/perceptual.py', '__call__'): "LPIPS's heads: weighted sums over channels, one number a place",
}
# The backward pass of `jax.nn.dot_product_attention` gives the logits' gradient, float32, to its products.
STAGE2_FLOAT32 = {('models/transformer.py', '__call__'): "attention's own backward pass"}
CLASSIFIER_FLOAT32 = {
    ('models/resnet3d.py', '__call__'): 'the head, of means over space: a few numbers a sample',
    ('augmentation.py', 'draw_change'): 'rotations: places of voxels need their digits',
    ('augmentation.py', 'apply_change'): 'the same',
}


def config(name, **changes):
    found = runpy.run_path(str(ROOT / 'configs' / f'{name}.py'))['get_config']('smoke')
    found.update_from_flattened_dict({'dtype': 'bfloat16', **changes})
    return found


def shape(*sides, dtype=jnp.int32):
    return jax.ShapeDtypeStruct(sides, dtype)


def mesh():
    return partitioning.make_mesh({'data': 1})


def stage1():
    settings = config('vqgan', perceptual='vgg16')
    recipe = vqgan.make_recipe(settings, classes=2, steps_per_epoch=10)
    state, rows = vqgan.state_shapes(recipe), settings.batch_size
    batch = {'volume': shape(rows, *settings.data.roi_size, 1, dtype=jnp.float32), 'label': shape(rows)}
    return vqgan.jit_step(recipe, state, mesh()), (state, batch, recipe.lpips_weights)


def stage2_recipe(**changes):
    return transformer.make_recipe(config('transformer', **changes), CODES, 2, GRID, steps_per_epoch=10)


def stage2():
    recipe = stage2_recipe()
    state, rows, length = transformer.state_shapes(recipe), 8, recipe.masking.length
    batch = {'tokens': shape(rows, length), 'scores': shape(rows, length, dtype=jnp.float32), 'label': shape(rows)}
    return transformer.jit_step(recipe, state, mesh()), (state, batch | {'index': shape(rows)})


def sampler():
    recipe = stage2_recipe(**{'model.remat': 'none'})
    params = jax.eval_shape(functools.partial(drawing_params, recipe.model), transformer.state_shapes(recipe).params)
    draw = partitioning.jit_on_each_device(draw_function(recipe.model, CODES, Sampling()), mesh())
    wanted = shape(8), shape(8, dtype=jnp.uint32), shape(8, recipe.masking.length)
    return draw, ((params, shape(dtype=jnp.uint32)), wanted)


def classifying():
    settings = runpy.run_path(str(ROOT / 'configs' / 'classifier.py'))['get_config']('smoke')
    settings.dtype = 'bfloat16'
    recipe = classifier.Recipe(
        model=train_classifier.make_model(settings, classes=2),
        optimizer=optimizers.make_optimizer(settings.finetune.optimizer),
        rate=lambda step: 1e-3,
        alpha=(1.0, 1.0),
        gamma=settings.gamma,
        augment=settings.augment,
        spacing=(1.0, 1.0, 1.0),
        seed=0,
    )
    volume = shape(4, 16, 16, 16, 1, dtype=jnp.float32)
    variables = jax.eval_shape(recipe.model.init, jax.random.key(0), volume)
    optimizer = jax.eval_shape(recipe.optimizer.init, variables['params'])
    state = classifier.ClassifierState(shape(), variables['params'], variables['batch_stats'], optimizer)
    batch = {'volume': volume, 'label': shape(4)}
    return classifier.make_train_step(recipe, mesh()), (state, batch)


def equations(jaxpr):
    """All equations, those of inner programs included, whichever way they are kept."""
    for equation in jaxpr.eqns:
        yield equation
        for value in equation.params.values():
            for inner in value if isinstance(value, tuple | list) else (value,):
                inner = getattr(inner, 'jaxpr', inner)
                if hasattr(inner, 'eqns'):
                    yield from equations(inner)


def own_function(equation):
    """File and name of the function of this package that an equation comes from."""
    for frame in equation.source_info.traceback.frames:
        if PACKAGE in Path(frame.file_name).parents:
            return Path(frame.file_name).relative_to(PACKAGE).as_posix(), frame.function_name.split('.')[-1]
    raise AssertionError(f'{equation} comes from elsewhere')


def calls_python(equation):
    """Whether an equation calls back to Python, to compute or to print."""
    return any(word in equation.primitive.name for word in ('callback', 'debug'))


@pytest.mark.parametrize(
    ('make', 'allowed'),
    [(stage1, STAGE1_FLOAT32), (stage2, STAGE2_FLOAT32), (sampler, {}), (classifying, CLASSIFIER_FLOAT32)],
    ids=['stage 1', 'stage 2', 'sampler', 'classifier'],
)
def test_products_are_bfloat16_and_python_is_not_called_back(make, allowed):
    program, arguments = make()
    products: Counter = Counter()
    for equation in equations(program.trace(*arguments).jaxpr.jaxpr):
        assert not calls_python(equation), equation
        if equation.primitive.name in ('dot_general', 'conv_general_dilated'):
            if all(operand.aval.dtype == jnp.bfloat16 for operand in equation.invars[:2]):
                products['bfloat16'] += 1
            else:
                products[own_function(equation)] += 1
    assert products.pop('bfloat16') > 10
    assert products.keys() == allowed.keys()


@pytest.mark.parametrize('make', [stage1, stage2, classifying], ids=['stage 1', 'stage 2', 'classifier'])
def test_the_whole_state_is_stepped_in_place(make):
    program, arguments = make()
    with warnings.catch_warnings():
        warnings.simplefilter('error')  # JAX warns of donated buffers that it cannot use
        text = program.lower(*arguments).as_text()
    assert text.count('tf.aliasing_output') == len(jax.tree.leaves(arguments[0]))


def test_a_step_is_traced_once(monkeypatch):
    traces = []
    update = transformer.update
    monkeypatch.setattr(transformer, 'update', lambda *arguments: traces.append(1) or update(*arguments))
    recipe = stage2_recipe()
    state, length = transformer.create_state(recipe, mesh()), recipe.masking.length
    step = transformer.jit_step(recipe, state, mesh())
    for number in range(3):
        rng = np.random.default_rng(number)
        rows = {
            'tokens': rng.integers(CODES, size=(8, length)).astype(np.int32),
            'scores': rng.uniform(size=(8, length)).astype(np.float32),
            'label': np.arange(8, dtype=np.int32) % 2,
            'index': np.arange(8, dtype=np.int32),
        }
        state, metrics = step(state, partitioning.put_batch(rows, mesh()))
    assert int(state.step) == 3
    assert bool(metrics['finite'])
    assert traces == [1]


@pytest.mark.parametrize(
    ('make', 'module', 'name'),
    [(stage1, vqgan, 'update'), (stage2, transformer, 'update'), (classifying, classifier, 'loss_and_metrics')],
    ids=['stage 1', 'stage 2', 'classifier'],
)
def test_a_program_is_traced_once_for_its_shapes(make, module, name, monkeypatch):
    traces, traced = [], getattr(module, name)
    monkeypatch.setattr(module, name, lambda *arguments: traces.append(1) or traced(*arguments))
    program, arguments = make()
    for _ in range(3):
        program.trace(*arguments)
    assert traces == [1]


def test_stage_1_makes_its_program_once(monkeypatch):
    made = []
    monkeypatch.setattr(vqgan, 'jit_step', lambda *arguments: made.append(1) or (lambda *step: step))
    recipe = vqgan.make_recipe(config('vqgan', perceptual='none'), classes=2, steps_per_epoch=10)
    step = vqgan.make_train_step(recipe, vqgan.state_shapes(recipe), mesh())
    for _ in range(3):
        step(None, {'volume': None, 'label': None})
    assert made == [1]


def test_the_walk_finds_what_it_looks_for():
    """That the first test can fail: float32 products and callbacks are seen within loops and branches."""

    def leaky(x):
        def body(carry, _):
            return jax.lax.cond(carry.sum() > 0, lambda c: c @ c, lambda c: c, carry), None

        jax.debug.print('{}', x[0, 0])
        x = jax.pure_callback(lambda x: x, x, x)
        return jax.lax.scan(body, x, None, length=2)[0]

    found = list(equations(jax.jit(leaky).trace(jnp.ones((2, 2))).jaxpr.jaxpr))
    assert 'dot_general' in [equation.primitive.name for equation in found]
    assert sum(map(calls_python, found)) == 2
