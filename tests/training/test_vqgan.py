"""The fast step of stage 1 against a plain one, on one device and on eight."""

import dataclasses
import functools
import math
import pathlib
import re
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from vqroi_jax import losses
from vqroi_jax.errors import InputError
from vqroi_jax.models import perceptual
from vqroi_jax.training import partitioning, vqgan

CONFIG = pathlib.Path(__file__).parents[2] / 'configs' / 'vqgan.py'
CENTRED = ("['scorer']['score']['bias']", "['classifier']['hidden']['bias']")


def tiny_config(**changes):
    config = runpy.run_path(str(CONFIG))['get_config']('smoke')
    config.data.roi_size = (16, 16, 20)
    config.model.channels = (8,)
    config.model.encoder_res_blocks = config.model.decoder_res_blocks = (1,)
    config.model.hidden = 16
    config.model.num_groups = 4  # with one channel a group, a bias before a norm would have no gradient at all
    config.discriminator.channels = (8, 16)
    config.codebook.warmup = '0 steps'
    config.codebook.restart_every = '0 steps'
    config.losses.adversarial_start = '0 steps'
    config.optimizer.learning_rate = 1e-4
    config.update_from_flattened_dict(changes)
    return config


def tiny_batch(config):
    rows = config.batch_size
    volume = np.random.default_rng(0).uniform(-1, 1, (rows, *config.data.roi_size, 1)).astype(np.float32)
    return {'volume': volume, 'label': np.arange(rows, dtype=np.int32) % 2}


def start(config, devices=1):
    mesh = partitioning.make_mesh({'data': devices})
    recipe = vqgan.make_recipe(config, classes=2, steps_per_epoch=10)
    state = vqgan.create_state(recipe, mesh)
    batch = partitioning.put_batch(tiny_batch(config), mesh)
    state = vqgan.initialise_codebook(recipe, state, [batch], mesh)
    return recipe, mesh, state, batch


@functools.cache
def default_start():
    """`start` at the default config, for tests that give no state away."""
    recipe, _, state, batch = start(tiny_config())
    return recipe, state, batch, vqgan.draw_noise(recipe, state.step, 8)


@functools.cache
def default_gradient():
    return whole_gradient(*default_start())


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
        lpips = 0.0
        if recipe.lpips is not None:
            weights = recipe.lpips_weights
            lpips = perceptual.perceptual_loss(recipe.lpips, weights, fake, batch['volume'], noise.slices)
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


def whole_gradient(recipe, state, batch, noise):
    """Gradients, and the codebook after the step."""

    def compute(state, batch, noise, weights):
        found = vqgan.gradients(recipe, state, batch, noise, weights)
        return found, vqgan._update_codebook(recipe, state, found.normalised, found.tokens)[0]

    return jax.jit(compute)(state, batch, noise, recipe.lpips_weights)


@pytest.mark.parametrize('perceptual_name', ['none', pytest.param('vgg16', marks=pytest.mark.long)])
def test_gradients_equal_the_plain_objective(perceptual_name):
    recipe, state, batch, noise = default_start()
    if perceptual_name == 'vgg16':
        config = tiny_config(perceptual='vgg16', **{'losses.slices': 1})  # of VGG16's passes few do, and they are slow
        recipe = vqgan.make_recipe(config, classes=2, steps_per_epoch=10)
        batch, noise = jax.tree.map(lambda x: x[:2], batch), vqgan.draw_noise(recipe, state.step, 2)
    loss, weight, gradient = jax.jit(functools.partial(plain_losses, recipe))(state, batch, noise)
    fast, _ = default_gradient() if perceptual_name == 'none' else whole_gradient(recipe, state, batch, noise)
    np.testing.assert_allclose(fast.metrics['loss'], loss, rtol=1e-5)
    np.testing.assert_allclose(fast.metrics['adversarial_weight'], weight, rtol=1e-4)
    assert 0 < float(weight) <= 1
    assert_trees_close(fast.params, gradient, 1e-4)


def test_discriminator_learns_from_the_hinge_alone():
    recipe, state, batch, _ = default_start()

    def hinge(params):
        variables = {'params': state.params, 'codebook': {'codebook': state.codebook}}
        fake = recipe.model.apply(variables, batch['volume'])
        judge = functools.partial(recipe.discriminator.apply, {'params': params})
        return losses.hinge(judge(batch['volume'])[0], real=True) + losses.hinge(judge(fake)[0], real=False)

    expected = jax.jit(jax.grad(hinge))(state.discriminator)
    assert_trees_close(default_gradient()[0].discriminator, expected, 1e-4)


@pytest.mark.long
def test_networks_that_judge_a_volume_take_turns():
    """Real and fake volumes, and the three gradients at the latter, do not keep their maps at the same time."""
    channels, side = (16, 32), 32
    config = tiny_config(batch_size=1, **{'data.roi_size': (side,) * 3, 'discriminator.channels': channels})
    recipe = vqgan.make_recipe(config, classes=2, steps_per_epoch=10)
    state = vqgan.create_state(recipe, partitioning.make_mesh({'data': 1}))
    features, noise = jnp.ones((1, side, side, side, config.model.channels[0])), vqgan.draw_noise(recipe, state.step, 1)
    maps = []
    for options in (partitioning.keep_barriers('cpu'), None):
        terms = jax.jit(functools.partial(vqgan._volume_terms, recipe), compiler_options=options)
        compiled = terms.lower(state, recipe.lpips_weights, features, tiny_batch(config), noise).compile()
        maps.append(compiled.memory_analysis().temp_size_in_bytes / (side // 2) ** 3 / channels[0] / 4)
    assert maps[0] < 15 < 20 < maps[1]


@pytest.mark.parametrize(
    'change',
    [
        {'micro_batches': 4},
        {'model.remat': 'activations'},
        pytest.param({'model.remat': 'blocks'}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_saving_memory_changes_no_gradient(change):
    """Codebook sums and both gradients in the adversarial weight span all micro-batches."""
    _, state, batch, noise = default_start()
    saving = vqgan.make_recipe(tiny_config(**change), classes=2, steps_per_epoch=10)
    (expected, expected_codebook), (actual, codebook) = default_gradient(), whole_gradient(saving, state, batch, noise)
    for name, value in expected.metrics.items():
        np.testing.assert_allclose(actual.metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
    assert_trees_close(actual.params, expected.params, 1e-4)
    assert_trees_close(actual.discriminator, expected.discriminator, 1e-4)
    assert_trees_close(codebook, expected_codebook, 1e-5)
    # By their places codes that are dead begin anew.
    np.testing.assert_allclose(actual.normalised, expected.normalised, atol=1e-5)
    np.testing.assert_array_equal(actual.tokens, expected.tokens)


def test_dead_codes_begin_anew_after_a_period_and_not_when_it_is_late():
    changes = {'training.duration': '14 steps', 'codebook.warmup': '2 steps', 'codebook.restart_every': '3 steps'}
    recipe = vqgan.make_recipe(tiny_config(**changes, **{'codebook.dead_below': 1e9}), classes=2, steps_per_epoch=10)
    _, state, _, _ = default_start()
    vectors = jax.random.normal(jax.random.key(3), (2, 2, 2, 2, recipe.model.code_features))
    vectors /= jnp.linalg.norm(vectors, axis=-1, keepdims=True)
    tokens, due = jnp.zeros(vectors.shape[:-1], jnp.int32), []
    update = jax.jit(lambda state: vqgan._update_codebook(recipe, state, vectors, tokens)[0]['codes'])
    for step in range(14):
        codes = update(dataclasses.replace(state, step=jnp.asarray(step)))
        apart = 1 - codes @ vectors.reshape(-1, vectors.shape[-1]).T
        if float(apart.min(axis=1).max()) < 1e-5:  # every code is one of the vectors
            due.append(step)
    assert due == [5, 8, 11]


def assert_states_close(actual, expected, rate):
    """As after the same step: all to float tolerance, but what Adam moves on rounding, within 3 learning rates."""
    assert_trees_close(actual.codebook, expected.codebook, 1e-4)
    others = dict(jax.tree.leaves_with_path((actual.params, actual.discriminator)))
    for path, leaf in jax.tree.leaves_with_path((expected.params, expected.discriminator)):
        difference = np.abs(np.asarray(others[path]) - np.asarray(leaf))
        name = jax.tree_util.keystr(path)
        assert difference.max() <= 3 * rate, name
        if not any(centred in name for centred in CENTRED):
            assert np.mean(difference > 0.05 * rate) < 0.02, name


def on_mesh(state, mesh):
    """A copy of a state on another mesh."""
    return jax.device_put(jax.device_get(state), partitioning.state_shardings(state, mesh))


def exchanged(text):
    """Kinds and shapes of what the devices of a compiled program exchange."""
    kinds = 'all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast'
    return {
        (kind, tuple(map(int, shape.split(','))))
        for result, kind in re.findall(rf'= (.*?) ({kinds})(?:-start)?\(', text)
        for shape in re.findall(r'\[([\d,]+)\]', result)
    }


def assert_no_map_is_exchanged(text, parameters, thin, rows, roi_size):
    """Parameters and what is thin aside, devices exchange halos, and else less than a volume of one channel.

    Args:
        text: of the compiled step.
        parameters: shapes.
        thin: shapes of maps that may be put together.
        rows: that a device has of the batch.
        roi_size: depth, height and width.
    """
    volume = rows * math.prod(roi_size)
    # Kernels of 4 with strides of 2 are multiplied as kernels of 2 with eight times the channels.
    gradients = parameters | {(2, 2, 2, shape[4], 8 * shape[3]) for shape in parameters if shape[:-2] == (4, 4, 4)}
    for kind, shape in exchanged(text):
        if kind == 'collective-permute':
            assert len(shape) == 5, (kind, shape)
            assert shape[1] <= 3, (kind, shape)  # slices of a halo
        elif kind == 'all-gather':
            assert math.prod(shape) < volume or shape in parameters | thin, (kind, shape)
        elif kind == 'all-reduce':
            assert math.prod(shape) < volume or shape in gradients | thin, (kind, shape)
        else:
            assert math.prod(shape) < volume // roi_size[0], (kind, shape)


def thin_maps(config, rows, parts):
    """Shapes of the discriminator's maps of which a device has an odd number of depth slices, or less than one."""
    sides = [np.array(config.data.roi_size) // 2 ** (level + 1) for level in range(len(config.discriminator.channels))]
    maps = zip(sides, config.discriminator.channels, strict=True)
    return {(rows, *side.tolist(), channels) for side, channels in maps if side[0] % (2 * parts)}


def same_steps(config, mesh_settings, steps, tolerance):
    """Takes steps on one device and on a mesh, which have to be equal.

    Each is taken from the state that one device has come to, so that rounding that Adam enlarges (a first step is as
    long for a gradient of 1e-9 as for one of 1) is not carried from step to step.

    Args:
        config: of the training.
        mesh_settings: the mesh's.
        steps: how many.
        tolerance: of gradients, as a share of each parameter's largest.

    Returns:
        The compiled step on one device; that on the mesh and its last state; the last state on one device.
    """
    recipe, mesh, state, batch = start(config)
    wide = partitioning.make_mesh(mesh_settings)
    wide_batch = partitioning.put_batch(tiny_batch(config), wide)
    depth = wide_batch['volume'].addressable_shards[0].data.shape[1]
    assert depth == config.data.roi_size[0] // wide.shape['spatial']
    shapes = vqgan.state_shapes(recipe)
    step, wide_step = (
        vqgan.jit_step(recipe, shapes, each).lower(shapes, tiny_batch(config), recipe.lpips_weights).compile()
        for each in (mesh, wide)
    )
    weights, wide_weights = (
        jax.device_put(recipe.lpips_weights, partitioning.replicated(each)) for each in (mesh, wide)
    )
    for _ in range(steps):
        wide_state = on_mesh(state, wide)
        state, metrics = step(state, {name: batch[name] for name in ('volume', 'label')}, weights)
        wide_state, wide_metrics = wide_step(
            wide_state, {name: wide_batch[name] for name in ('volume', 'label')}, wide_weights
        )
        for name, value in metrics.items():
            np.testing.assert_allclose(wide_metrics[name], value, rtol=1e-4, atol=1e-6, err_msg=name)
        assert_states_close(wide_state, state, config.optimizer.learning_rate)
        moments = [s.optimizer[1].mu for s in (wide_state, state)]  # the gradients, as Adam has them
        assert_trees_close(*moments, tolerance)
    return step, (wide_step, wide_state), state


@pytest.mark.parametrize(
    ('mesh_settings', 'changes'),
    [
        ({'data': 2, 'fsdp': 2, 'spatial': 2}, {'codebook.restart_every': '2 steps'}),
        pytest.param({'data': 8}, {}, marks=pytest.mark.long),
        pytest.param({'fsdp': 8}, {'model.remat': 'activations'}, marks=pytest.mark.long),
        pytest.param({'spatial': 8}, {}, marks=pytest.mark.long),
        pytest.param({'data': 2, 'spatial': 4}, {'perceptual': 'vgg16'}, marks=pytest.mark.long),
        pytest.param({'fsdp': 2, 'spatial': 4}, {'model.remat': 'blocks', 'micro_batches': 2}, marks=pytest.mark.long),
        pytest.param({'data': 2, 'fsdp': 2}, {'perceptual': 'vgg16', 'micro_batches': 2}, marks=pytest.mark.long),
        pytest.param({'data': 4, 'fsdp': 2}, {}, marks=pytest.mark.long),
        pytest.param({'data': 2, 'fsdp': 4}, {}, marks=pytest.mark.long),
        pytest.param({'data': 4, 'spatial': 2}, {}, marks=pytest.mark.long),
        pytest.param({'fsdp': 4, 'spatial': 2}, {}, marks=pytest.mark.long),
    ],
    ids=str,
)
def test_several_devices_equal_one(mesh_settings, changes, monkeypatch):
    monkeypatch.setattr(partitioning, 'FSDP_SMALLEST', 64)
    # With some seeds a ReLU stands so near 0 that a last bit of the parameters turns it, on one device as well.
    config = tiny_config(seed=3, ema_decay=0.5, **{'model.code_features': 4}, **changes)
    # VGG16's maxima enlarge rounding; it shows at biases before norms, whose gradients nearly cancel.
    tolerance = 5e-4 if config.perceptual == 'vgg16' else 1e-4
    _, (wide_step, wide_state), state = same_steps(config, mesh_settings, 3, tolerance)

    kept_apart = re.search(r' opt-barrier\(.*remat', wide_step.as_text())  # what is computed again, from what was there
    assert bool(kept_apart) == (config.model.remat != 'none')

    # Along fsdp, parameters alone are put together; along depth, only what is smaller than a volume of one channel, and
    # the discriminator's maps that are too thin to be halved in parts.
    spatial = mesh_settings.get('spatial', 1)
    rows = config.batch_size * spatial // math.prod(mesh_settings.values()) // config.micro_batches
    parameters = {leaf.shape for leaf in jax.tree.leaves((state.params, state.discriminator))}
    text, thin = wide_step.as_text(), thin_maps(config, rows, spatial)
    assert_no_map_is_exchanged(text, parameters, thin, rows, config.data.roi_size)
    if spatial == 1:
        assert {shape for kind, shape in exchanged(text) if kind == 'all-gather'} <= parameters
    kernel = wide_state.discriminator_optimizer[1].nu['conv_1']['kernel']
    assert kernel.size == kernel.addressable_shards[0].data.size * mesh_settings.get('fsdp', 1)


@pytest.mark.long
def test_256_cubed_trains_in_eight_parts():
    """As deep a network as the paper's, with narrow channels."""
    changes = {'model.channels': (4, 8, 8, 8), 'discriminator.channels': (4, 8, 8, 8), 'model.remat': 'activations'}
    changes |= {f'model.{side}_res_blocks': (1, 1, 1, 1) for side in ('encoder', 'decoder')}
    # Rounding grows on the way back through sums over 17 million voxels; it shows most at biases before norms. It is
    # about 1e-6 beside gradients of 1e-2: with such an epsilon a step follows the gradient there, too, not its sign.
    changes |= {'optimizer.epsilon': 1e-4}
    config = tiny_config(seed=3, batch_size=1, **{'data.roi_size': (256,) * 3, 'model.num_groups': 2}, **changes)
    step, (wide_step, _), _ = same_steps(config, {'spatial': 8}, 1, tolerance=1e-2)
    whole, part = (each.memory_analysis().temp_size_in_bytes for each in (step, wide_step))
    print(f'a step needs {whole / 2**30:.2f} GiB on one device, {part / 2**30:.2f} GiB on each of eight')
    assert part < whole / 6
    slices = [shape for kind, shape in exchanged(wide_step.as_text()) if kind != 'collective-permute']
    assert max(map(math.prod, slices)) < math.prod(config.data.roi_size[1:])  # numbers of one slice of the volume


def test_more_parts_than_the_latent_grid_has_slices_are_refused():
    config = tiny_config()  # depth 16, halved once
    vqgan.check_mesh(config, partitioning.make_mesh({'spatial': 8}))
    with pytest.raises(InputError, match=r'config.mesh.spatial=3 does not divide the 8 depth slices .* 1, 2, 4, 8$'):
        vqgan.check_mesh(config, partitioning.make_mesh({'data': 2, 'spatial': 3}))


def test_bfloat16_keeps_parameters_and_losses_in_float32_and_near():
    _, state, batch, noise = default_start()
    half = vqgan.make_recipe(tiny_config(dtype='bfloat16'), classes=2, steps_per_epoch=10)
    (expected, _), (actual, _) = default_gradient(), whole_gradient(half, state, batch, noise)
    assert {leaf.dtype for leaf in jax.tree.leaves((actual.params, actual.metrics))} == {jnp.dtype('float32')}
    np.testing.assert_allclose(actual.metrics['loss'], expected.metrics['loss'], rtol=0.02)
    for part in ('last', 'conv_0'):
        one, other = (np.ravel(g.params['decoder'][part]['kernel']) for g in (actual, expected))
        assert np.dot(one, other) / np.linalg.norm(one) / np.linalg.norm(other) > 0.98


IN_TURN = {'codebook.warmup': '2 steps', 'losses.adversarial_start': '3 steps', 'ema_decay': 0.5}


def test_nothing_is_quantised_or_moved_before_the_warm_up_is_over():
    config = tiny_config(**IN_TURN)
    mesh = partitioning.make_mesh({'data': 1})
    recipe = vqgan.make_recipe(config, classes=2, steps_per_epoch=10)
    state = vqgan.create_state(recipe, mesh)
    batch = partitioning.put_batch(tiny_batch(config), mesh)
    step, before = vqgan.make_train_step(recipe, state, mesh), jax.device_get(state)
    for number in range(4):
        if number == 2:
            np.testing.assert_array_equal(state.codebook['codes'], before.codebook['codes'])
            state = vqgan.initialise_codebook(recipe, state, [batch, batch], mesh)
            initialised = np.asarray(state.codebook['codes'])
            assert np.abs(initialised - before.codebook['codes']).max() > 0.1
        if number == 3:
            assert_trees_close(state.discriminator, before.discriminator, 0)
            assert np.asarray(state.codebook['usage']).sum() > 0
            assert np.abs(np.asarray(state.codebook['codes']) - initialised).max() > 0
        previous = jax.device_get((state.params, state.average))
        state, metrics = step(state, batch)
        assert (metrics['commitment'] == 0) == (number < 2)
        assert (metrics['adversarial_weight'] == 0) == (number < 3)
        kept = min(0.5, (1 + number) / (10 + number))
        expected = jax.tree.map(lambda a, p, kept=kept: kept * a + (1 - kept) * p, previous[1], state.params)
        assert_trees_close(state.average, expected, 1e-6)
    moved = jax.tree.map(lambda new, old: np.abs(new - old).max(), state.discriminator, before.discriminator)
    assert max(jax.tree.leaves(moved)) > 0


def test_codebook_is_in_no_optimiser():
    _, state, _, _ = default_start()
    shapes = {leaf.shape for leaf in jax.tree.leaves((state.optimizer, state.discriminator_optimizer))}
    assert state.codebook['codes'].shape not in shapes


def test_a_loss_that_is_not_finite_moves_only_the_step():
    recipe, mesh, state, batch = start(tiny_config(**IN_TURN))
    state = state.replace(step=state.step + 3)  # from when on everything moves
    bad = {**batch, 'volume': batch['volume'].at[0, 0, 0, 0].set(jnp.nan)}
    before = jax.device_get(state)
    state, metrics = vqgan.make_train_step(recipe, state, mesh)(state, bad)
    assert not metrics['finite']
    assert not np.isfinite(metrics['l1'])
    assert int(state.step) == 4
    jax.tree.map(np.testing.assert_array_equal, before.replace(step=4), jax.device_get(state))


def test_draws_depend_on_seed_step_and_row_only():
    recipe, *_ = default_start()
    few, many = (vqgan.draw_noise(recipe, jnp.asarray(5), rows) for rows in (3, 8))
    np.testing.assert_array_equal(few.slices, many.slices[:3])
    other = vqgan.draw_noise(recipe, jnp.asarray(6), 8)
    assert (np.asarray(other.slices) != np.asarray(many.slices)).any()
    first, last = perceptual.slice_range(16)
    drawn = np.asarray(vqgan.draw_noise(recipe, jnp.asarray(0), 300).slices)
    assert set(np.unique(drawn)) == set(range(first, last))
    assert perceptual.slice_range(128) == (30, 98)


@pytest.mark.parametrize(
    ('change', 'words'),
    [
        ({'data.roi_size': (16, 17, 16)}, ('height 17', 'divide by 2')),
        ({'data.roi_size': (16, 16)}, ('data.roi_size=(16, 16)', 'three whole numbers')),
        ({'data.roi_size': (16, 16, 16, 16)}, ('data.roi_size=(16, 16, 16, 16)', 'three whole numbers')),
        ({'model.channels': (10,)}, ('model.channels', '10', 'num_groups=4')),
        ({'model.encoder_res_blocks': (1, 1)}, ('encoder_res_blocks has 2 entries',)),
        ({'discriminator.channels': (8, 16, 32)}, ('depth 16 is too small', '32')),
        ({'model.classifier_hidden': 136}, ('classifier_hidden=136', 'multiple of 32')),
        ({'model.classifier_hidden': 64}, ('classifier_hidden=64', 'from 96 up')),
        ({'perceptual': 'alexnet'}, ('perceptual', 'vgg16, none')),
        ({'dtype': 'float16'}, ('dtype', 'bfloat16')),
        ({'data.roi_size': (16, 16)}, ('data.roi_size=(16, 16): expected three whole numbers above 0',)),
        ({'codebook.codes': 1}, ('codebook.codes=1: expected 2 or more',)),
        ({'codebook.decay': 1.0}, ('codebook.decay=1.0: expected 0 to below 1',)),
        ({'codebook.init_batches': 0}, ('codebook.init_batches=0: expected 1 or more',)),
        ({'codebook.kmeans_rounds': -1}, ('codebook.kmeans_rounds=-1',)),
        ({'codebook.warmup': '12 steps'}, ("codebook.warmup='12 steps'", "training.duration='12 steps'")),
        ({'losses.slices': 0}, ('losses.slices=0: expected 1 or more',)),
        ({'losses.label_smoothing': 1.0}, ('losses.label_smoothing=1.0',)),
        ({'model.classifier_dropout': 1.0}, ('model.classifier_dropout=1.0: expected 0 to below 1',)),
        ({'model.num_groups': 0}, ('model.num_groups=0: expected 1 or more',)),
        ({'model.channels': ()}, ('model.channels=(): expected numbers of 1 or more',)),
        ({'model.channels': (0,)}, ('model.channels=(0,)',)),
        ({'model.hidden': 0}, ('model.hidden=0',)),
        ({'model.code_features': 0}, ('model.code_features=0',)),
        ({'discriminator.channels': ()}, ('discriminator.channels=(): expected 1 number or more',)),
        ({'discriminator.channels': (0,)}, ('discriminator.channels=(0,)',)),
        ({'figure_rois': 0}, ('figure_rois=0: expected 1 or more',)),
        ({'seed': -1}, ('config.seed=-1: expected 0 to 2**32 - 1',)),
        ({'seed': 2**32}, ('config.seed=4294967296',)),
        ({'ema_decay': 1.0}, ('config.ema_decay=1.0: expected 0 (none) to below 1',)),
        ({'optimizer.clip_value': -1.0}, ('config.optimizer.clip_value=-1.0: expected 0 (no clipping) or more',)),
        ({'losses.adversarial_start': 'soon'}, ('losses.adversarial_start', 'soon')),
    ],
    ids=str,
)
def test_sizes_that_do_not_fit_are_refused(change, words):
    with pytest.raises(InputError) as error:
        vqgan.make_recipe(tiny_config(**change), classes=2, steps_per_epoch=10)
    for word in words:
        assert word in str(error.value)
