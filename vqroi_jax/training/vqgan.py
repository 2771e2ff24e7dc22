"""Stage 1's state and training step: pure functions of (state, batch), jitted over the device mesh.

A step is one forward pass of the generator and one of the discriminator on the real and on the reconstructed volumes.
Every gradient is pulled back from these: the discriminator's own (hinge), and the generator's, whose terms meet at the
reconstruction and go down through the network together, once. The adversarial weight needs the gradients of two terms
at the decoder's last kernel, which lie just behind the reconstruction and cost next to nothing.

With several micro-batches, the first sweep stops at the reconstruction and keeps only its gradients; the weight is then
known for the whole batch, and a second sweep runs the generator again and pulls them down.
Source: sections 2.1 to 2.3 of the design.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import flax.struct
import jax
import jax.numpy as jnp
import ml_collections
import optax
from jax.sharding import Mesh

from vqroi_jax import losses
from vqroi_jax.data.roi import check_roi_size
from vqroi_jax.errors import InputError, check_fields
from vqroi_jax.models import perceptual, quantizer
from vqroi_jax.models.discriminator import Discriminator
from vqroi_jax.models.layers import REMATS
from vqroi_jax.models.scorer import CLASSIFIER_GROUPS
from vqroi_jax.models.vqgan import VQGAN
from vqroi_jax.training import optimizers, partitioning
from vqroi_jax.training.durations import to_steps

Batch = dict[str, jax.Array]
Metrics = dict[str, jax.Array]


@flax.struct.dataclass
class VQGANState:
    """All that a run of stage 1 is, between two steps."""

    step: jax.Array  # int32: steps taken
    params: Any  # of the generator, float32
    discriminator: Any  # parameters, float32
    codebook: Any  # {'codes': float32 [K, C], 'usage': float32 [K]}
    optimizer: optax.OptState  # of `params`
    discriminator_optimizer: optax.OptState
    average: Any  # moving average of `params`; None where the config has none


@dataclasses.dataclass(frozen=True)
class Recipe:
    """What a step needs to know besides the state: networks, optimiser, settings, and durations in steps."""

    model: VQGAN
    discriminator: Discriminator
    lpips: perceptual.LPIPS | None
    lpips_weights: Any  # {} where `lpips` is None
    optimizer: optax.GradientTransformation  # one for each network, without the learning rate
    rate: optax.Schedule
    settings: ml_collections.ConfigDict  # the task's config
    warmup_steps: int  # before the codebook is initialised
    adversarial_start: int
    adversarial_ramp: int
    restart_every: int  # dead codes; 0: never
    steps: int  # of the whole run


def make_model(config: ml_collections.ConfigDict, classes: int) -> VQGAN:
    """The generator of a config of the task `vqgan`, for so many classes."""
    return VQGAN(classes=classes, **config.model, codes=config.codebook.codes, dtype=jnp.dtype(config.dtype))


def make_recipe(config: ml_collections.ConfigDict, classes: int, steps_per_epoch: float) -> Recipe:
    """Networks and durations of a config of the task `vqgan`.

    Args:
        config: as `configs/vqgan.py` has it.
        classes: number of classes of the cohort.
        steps_per_epoch: steps that see as many samples as the cohort has.

    Raises:
        InputError: a size does not divide, a name is unknown, or a duration cannot be read.
    """
    check_settings(config)
    dtype = jnp.dtype(config.dtype)
    lpips = config.perceptual == 'vgg16'

    def steps(field: str, minimum: int = 0) -> int:
        block, name = field.split('.')
        return to_steps(config[block][name], steps_per_epoch, f'config.{field}', minimum)

    total, warmup = steps('training.duration', minimum=1), steps('codebook.warmup')
    if warmup >= total:
        raise InputError(
            f'config.codebook.warmup={config.codebook.warmup!r}: the codebook would never be used; expected less than '
            f'config.training.duration={config.training.duration!r}'
        )
    return Recipe(
        model=make_model(config, classes),
        discriminator=Discriminator(tuple(config.discriminator.channels), config.model.num_groups, dtype=dtype),
        lpips=perceptual.LPIPS(dtype=dtype) if lpips else None,
        lpips_weights=perceptual.load_weights() if lpips else {},
        optimizer=optimizers.make_optimizer(config.optimizer),
        rate=optimizers.cosine_rate(config.optimizer, total),
        settings=config,
        warmup_steps=warmup,
        adversarial_start=steps('losses.adversarial_start'),
        adversarial_ramp=steps('losses.adversarial_ramp'),
        restart_every=steps('codebook.restart_every'),
        steps=total,
    )


def check_settings(config: ml_collections.ConfigDict) -> None:
    """Refuses sizes that do not divide and values that training cannot use, before anything is read.

    Raises:
        InputError: naming the field and what would do.
    """
    check_sizes(config)
    codebook, terms = config.codebook, config.losses
    fields = (
        ('seed', 0 <= config.seed < 2**32, '0 to 2**32 - 1'),
        ('ema_decay', 0 <= config.ema_decay < 1, '0 (none) to below 1'),
        ('figure_rois', config.figure_rois >= 1, '1 or more'),
        ('eval_batch_size', config.eval_batch_size >= 1, '1 or more'),
        ('discriminator.channels', config.discriminator.channels, '1 number or more'),
        ('codebook.decay', 0 <= codebook.decay < 1, '0 to below 1'),
        ('codebook.init_batches', codebook.init_batches >= 1, '1 or more'),
        ('codebook.kmeans_rounds', codebook.kmeans_rounds >= 0, '0 or more'),
        ('losses.slices', terms.slices >= 1, '1 or more'),
        ('losses.label_smoothing', 0 <= terms.label_smoothing < 1, '0 to below 1'),
    )
    check_fields('config', config, fields)
    optimizers.check(config.optimizer, 'config.optimizer')


def check_sizes(config: ml_collections.ConfigDict) -> None:
    """Refuses sizes that no networks have or that do not divide, before anything is compiled.

    Raises:
        InputError: naming the field and what would do.
    """
    check_roi_size(config.data.roi_size)
    model, levels = config.model, len(config.model.channels)
    fields = (
        ('codebook.codes', config.codebook.codes >= 2, '2 or more'),
        ('model.channels', levels and min(model.channels) >= 1, 'numbers of 1 or more'),
        ('model.hidden', model.hidden >= 1, '1 or more'),
        ('model.code_features', model.code_features >= 1, '1 or more'),
        ('model.num_groups', model.num_groups >= 1, '1 or more'),
        ('model.classifier_dropout', 0 <= model.classifier_dropout < 1, '0 to below 1'),
        (
            'discriminator.channels',
            min(config.discriminator.channels, default=1) >= 1,
            'numbers of 1 or more',
        ),
    )
    check_fields('config', config, fields)
    for name in ('encoder_res_blocks', 'decoder_res_blocks'):
        if len(model[name]) != levels:
            raise InputError(f'config.model.{name} has {len(model[name])} entries; channels has {levels}')
    for field, channels in (
        ('model.channels', model.channels),
        ('model.hidden', (model.hidden,)),
        ('discriminator.channels', config.discriminator.channels[1:]),
    ):
        for number in channels:
            if number % model.num_groups:
                raise InputError(
                    f'config.{field}: {number} channels do not divide by config.model.num_groups={model.num_groups}'
                )
    if model.classifier_hidden % CLASSIFIER_GROUPS or model.classifier_hidden < 3 * CLASSIFIER_GROUPS:
        raise InputError(
            f'config.model.classifier_hidden={model.classifier_hidden} is no multiple of {CLASSIFIER_GROUPS} from '
            f'{3 * CLASSIFIER_GROUPS} up: normalised in {CLASSIFIER_GROUPS} groups, one or two units are constant'
        )
    depth = len(config.discriminator.channels)
    for axis, side in zip(('depth', 'height', 'width'), config.data.roi_size, strict=True):
        if side % 2**levels:
            raise InputError(
                f'config.data.roi_size: {axis} {side} does not divide by {2**levels} '
                f'(config.model.channels halves it {levels} times)'
            )
        if side < 4 * 2**depth:
            raise InputError(
                f'config.data.roi_size: {axis} {side} is too small for {depth} discriminator channels, which need '
                f'{4 * 2**depth}; shorten config.discriminator.channels'
            )
        if config.perceptual == 'vgg16' and side < 16 and axis != 'depth':
            raise InputError(f"config.data.roi_size: {axis} {side} is under 16: set config.perceptual='none'")
    for field, value, known in (
        ('perceptual', config.perceptual, ('vgg16', 'none')),
        ('dtype', config.dtype, ('float32', 'bfloat16')),
        ('model.remat', model.remat, REMATS),
    ):
        if value not in known:
            raise InputError(f'config.{field}={value!r}: choose one of {", ".join(known)}')


def check_mesh(config: ml_collections.ConfigDict, mesh: Mesh) -> None:
    """Refuses a mesh that splits depth into more parts than the latent grid has slices, or unevenly.

    All that encoder and decoder compute is then split; what the discriminator has of fewer slices is not.

    Raises:
        InputError: naming the numbers that would do.
    """
    parts, halvings = mesh.shape['spatial'], len(config.model.channels)
    slices = config.data.roi_size[0] // 2**halvings
    if slices % parts:
        fitting = ', '.join(str(number) for number in range(1, slices + 1) if slices % number == 0)
        raise InputError(
            f'config.mesh.spatial={parts} does not divide the {slices} depth slices of the latent grid '
            f'(config.data.roi_size: depth {config.data.roi_size[0]}, halved {halvings} times); choose one of {fitting}'
        )


class Noise(NamedTuple):
    """A step's random draws, one for each row of the batch."""

    slices: jax.Array  # int32 [B, slices]: axial slices that LPIPS sees
    dropout: jax.Array | None  # keys [B] for the auxiliary classifier; None: no dropout


def _initial_state(recipe: Recipe) -> VQGANState:
    settings = recipe.settings
    shape = (1, *settings.data.roi_size, 1)
    key, discriminator_key = jax.random.split(jax.random.key(settings.seed))
    variables = recipe.model.init(key, jnp.zeros(shape))
    discriminator = recipe.discriminator.init(discriminator_key, jnp.zeros(shape))['params']
    return VQGANState(
        step=jnp.zeros((), jnp.int32),
        params=variables['params'],
        discriminator=discriminator,
        codebook=variables['codebook']['codebook'],
        optimizer=recipe.optimizer.init(variables['params']),
        discriminator_optimizer=recipe.optimizer.init(discriminator),
        average=jax.tree.map(jnp.copy, variables['params']) if settings.ema_decay > 0 else None,
    )


def state_shapes(recipe: Recipe) -> VQGANState:
    """Shapes and types of a state, without any array."""
    return jax.eval_shape(functools.partial(_initial_state, recipe))


def create_state(recipe: Recipe, mesh: Mesh) -> VQGANState:
    """The state before the first step, created where it will live.

    Args:
        recipe: whose `settings.seed` decides the initial values.
        mesh: whose axis `fsdp` shares the arrays out.
    """
    return partitioning.create(functools.partial(_initial_state, recipe), mesh)


def draw_noise(recipe: Recipe, step: jax.Array, rows: int) -> Noise:
    """The draws of a step: they depend on the seed, the step and the row of the global batch, and nothing else."""
    key = jax.random.fold_in(jax.random.key(recipe.settings.seed), step)
    keys = jax.vmap(lambda row: jax.random.split(jax.random.fold_in(key, row)))(jnp.arange(rows))
    first, last = perceptual.slice_range(recipe.settings.data.roi_size[0])
    number = recipe.settings.losses.slices
    slices = jax.vmap(lambda k: jax.random.randint(k, (number,), first, last))(keys[:, 0])
    return Noise(slices, keys[:, 1] if recipe.model.classifier_dropout > 0 else None)


class _Side(NamedTuple):
    """What the first sweep leaves of a micro-batch."""

    rest: jax.Array  # [B, D, H, W, 1]: gradient at the reconstruction of all weighted terms but the adversarial one
    adversarial: jax.Array  # [B, D, H, W, 1]: that of the adversarial term, unweighted
    l1_kernel: Any  # gradient of L1 at the decoder's last kernel
    adversarial_kernel: Any  # that of the adversarial term
    discriminator: Any  # the discriminator's gradient
    metrics: Metrics


def _generator_terms(recipe: Recipe, codebook: Any, quantise: jax.Array, batch: Batch, noise: Noise) -> Callable:
    """A function of the parameters: (features, weighted sum of the terms that need no volume), (trunk, metrics)."""
    weights = recipe.settings.losses

    def terms(params):
        variables = {'params': params, 'codebook': {'codebook': codebook}}
        trunk = recipe.model.apply(variables, batch['volume'], quantise, noise.dropout, method='trunk')
        commitment = losses.commitment(trunk.normalised, trunk.codes, recipe.settings.codebook.beta)
        cross_entropy = losses.cross_entropy(trunk.logits, batch['label'], weights.label_smoothing)
        metrics = {
            'commitment': commitment,
            'cross_entropy': cross_entropy,
            'accuracy': jnp.mean(jnp.argmax(trunk.logits, -1) == batch['label'], dtype=jnp.float32),
        }
        scalar = weights.generator * weights.commitment * commitment + weights.classification * cross_entropy
        return (trunk.features, scalar), (trunk, metrics)

    return terms


def _head(recipe: Recipe) -> Callable:
    def head(last, features):
        return recipe.model.apply({'params': {'decoder': {'last': last}}}, features, method='head')

    return head


def _volume_terms(
    recipe: Recipe, state: VQGANState, weights: Any, features: jax.Array, batch: Batch, noise: Noise
) -> _Side:
    """All terms of the reconstruction, and their gradients as far down as the decoder's last kernel."""
    volume, scale = batch['volume'], recipe.settings.losses
    last = state.params['decoder']['last']
    # What follows from its results waits for all that it is given: each network's maps then go before the next come.
    in_turn = jax.lax.optimization_barrier

    def judge(params, x):
        return recipe.discriminator.apply({'params': params}, x)

    (real_logits, real_hidden), pull_real = jax.vjp(lambda p: judge(p, volume), state.discriminator)
    silent = jax.tree.map(jnp.zeros_like, real_hidden)
    real_hinge, at_real_logits = jax.value_and_grad(losses.hinge)(real_logits, real=True)
    (discriminator_real,) = pull_real((at_real_logits, silent))

    fake, pull_head = jax.vjp(lambda p: _head(recipe)(p, features), last)
    l1, l1_gradient = jax.value_and_grad(losses.l1)(fake, volume)
    image_gradient, image_gradient_gradient = jax.value_and_grad(losses.image_gradient)(fake, volume)
    lpips, lpips_gradient = jnp.zeros(()), jnp.zeros_like(fake)
    if (network := recipe.lpips) is not None:
        lpips, lpips_gradient = jax.value_and_grad(
            lambda x: perceptual.perceptual_loss(network, weights, x, volume, noise.slices)
        )(fake)

    fake, discriminator_real, l1_gradient, image_gradient_gradient, lpips_gradient = in_turn(
        (fake, discriminator_real, l1_gradient, image_gradient_gradient, lpips_gradient)
    )
    (fake_logits, fake_hidden), pull_fake = jax.vjp(judge, state.discriminator, fake)
    fake_hinge, at_fake_logits = jax.value_and_grad(losses.hinge)(fake_logits, real=False)
    discriminator_fake = pull_fake((at_fake_logits, silent))[0]
    matching, at_hidden = jax.value_and_grad(losses.feature_matching)(fake_hidden, real_hidden)
    at_hidden, discriminator_fake = in_turn((at_hidden, discriminator_fake))
    matching_gradient = pull_fake((jnp.zeros_like(fake_logits), at_hidden))[1]
    adversarial, at_fake_logits = jax.value_and_grad(losses.adversarial)(fake_logits)
    at_fake_logits, matching_gradient = in_turn((at_fake_logits, matching_gradient))
    adversarial_gradient = pull_fake((at_fake_logits, silent))[1]

    rest = scale.generator * (
        scale.l1 * l1_gradient
        + scale.lpips * lpips_gradient
        + scale.feature_matching * matching_gradient
        + scale.image_gradient * image_gradient_gradient
    )
    told_apart = jnp.mean(real_logits > 0, dtype=jnp.float32) + jnp.mean(fake_logits < 0, dtype=jnp.float32)
    return _Side(
        rest=rest,
        adversarial=adversarial_gradient,
        l1_kernel=pull_head(l1_gradient)[0]['kernel'],
        adversarial_kernel=pull_head(adversarial_gradient)[0]['kernel'],
        discriminator=jax.tree.map(jnp.add, discriminator_real, discriminator_fake),
        metrics={
            'l1': l1,
            'lpips': lpips,
            'image_gradient': image_gradient,
            'feature_matching': matching,
            'adversarial': adversarial,
            'hinge': real_hinge + fake_hinge,
            'discriminator_accuracy': told_apart / 2,
        },
    )


class Gradients(NamedTuple):
    """What the whole global batch says about a step."""

    params: Any
    discriminator: Any
    normalised: jax.Array  # float32 [..., C]: all latent vectors
    tokens: jax.Array  # int32 [...]
    metrics: Metrics


def gradients(recipe: Recipe, state: VQGANState, batch: Batch, noise: Noise, weights: Any) -> Gradients:
    """Losses and both networks' gradients over the whole global batch.

    Args:
        recipe: what to compute.
        state: at which.
        batch: `volume` float32 `[B, D, H, W, 1]` in [-1, 1] and `label` int32 `[B]`.
        noise: the step's draws, for B rows.
        weights: of LPIPS.
    """
    settings = recipe.settings
    quantise = state.step >= recipe.warmup_steps
    strength = _adversarial_strength(recipe, state.step)

    def first_sweep(part, part_noise):
        terms = _generator_terms(recipe, state.codebook, quantise, part, part_noise)
        (features, _), pull, (trunk, metrics) = jax.vjp(terms, state.params, has_aux=True)
        side = _volume_terms(recipe, state, weights, features, part, part_noise)
        return features, pull, trunk, side._replace(metrics={**metrics, **side.metrics})

    def descend(features, pull, side, weight):
        at_volume = side.rest + settings.losses.generator * weight * side.adversarial
        at_last, at_features = jax.vjp(_head(recipe), state.params['decoder']['last'], features)[1](at_volume)
        (gradient,) = pull((at_features, jnp.ones(())))
        return {**gradient, 'decoder': {**gradient['decoder'], 'last': at_last}}

    def weigh(side):
        return strength * losses.adaptive_weight(side.l1_kernel, side.adversarial_kernel)

    if settings.micro_batches == 1:
        features, pull, trunk, side = first_sweep(batch, noise)
        weight = weigh(side)
        params = descend(features, pull, side, weight)
        normalised, tokens = trunk.normalised, trunk.tokens
    else:
        parts = partitioning.micro_batches((batch, noise), settings.micro_batches)

        def one_part(total, part):
            _, _, trunk, side = first_sweep(*part)
            kept = (side.rest, side.adversarial, trunk.normalised, trunk.tokens)
            summed = side._replace(rest=(), adversarial=())
            return jax.tree.map(jnp.add, total, summed), kept

        def second_sweep(total, part):
            (part_batch, part_noise), (rest, adversarial) = part
            terms = _generator_terms(recipe, state.codebook, quantise, part_batch, part_noise)
            (features, _), pull, _ = jax.vjp(terms, state.params, has_aux=True)
            side = _Side(rest, adversarial, (), (), (), {})
            return jax.tree.map(jnp.add, total, descend(features, pull, side, weight)), None

        example = jax.eval_shape(lambda part: first_sweep(*part)[3], jax.tree.map(lambda x: x[0], parts))
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), example._replace(rest=(), adversarial=()))
        side, (rest, adversarial, normalised, tokens) = jax.lax.scan(one_part, zeros, parts)
        normalised, tokens = partitioning.joined_micro_batches((normalised, tokens))
        side = jax.tree.map(lambda x: x / settings.micro_batches, side)
        weight = weigh(side)
        zeros = jax.tree.map(jnp.zeros_like, state.params)
        params, _ = jax.lax.scan(second_sweep, zeros, (parts, (rest, adversarial)))
        params = jax.tree.map(lambda x: x / settings.micro_batches, params)

    metrics = {**side.metrics, 'adversarial_weight': weight}
    return Gradients(params, side.discriminator, normalised, tokens, {'loss': _total(settings, metrics), **metrics})


def _adversarial_strength(recipe: Recipe, step: jax.Array) -> jax.Array:
    """0 before the adversarial terms start, then up to 1 in a straight line over the ramp."""
    done = (step - recipe.adversarial_start + 1) / max(recipe.adversarial_ramp, 1)
    return jnp.clip(done, 0.0, 1.0)


def _total(settings: ml_collections.ConfigDict, metrics: Metrics) -> jax.Array:
    scale = settings.losses
    weighted = (
        scale.l1 * metrics['l1']
        + scale.lpips * metrics['lpips']
        + scale.commitment * metrics['commitment']
        + scale.feature_matching * metrics['feature_matching']
        + scale.image_gradient * metrics['image_gradient']
        + metrics['adversarial_weight'] * metrics['adversarial']
    )
    return scale.generator * weighted + scale.classification * metrics['cross_entropy']


def _update_codebook(
    recipe: Recipe, state: VQGANState, normalised: jax.Array, tokens: jax.Array
) -> tuple[Any, Metrics]:
    """Moves the codes once, by the whole global batch; nothing moves before the codebook is initialised."""
    settings = recipe.settings.codebook
    codes, usage = state.codebook['codes'], state.codebook['usage']
    sums = quantizer.assign(normalised, tokens, settings.codes)
    new_codes, new_usage = quantizer.update_codes(codes, usage, sums, settings.decay)
    if recipe.restart_every > 0:
        # Right after what is saved and measured at the same interval, and early enough to be learnt from.
        since = state.step - recipe.warmup_steps
        due = (since > 0) & (since % recipe.restart_every == 0) & (state.step <= recipe.steps - recipe.restart_every)
        key = jax.random.fold_in(jax.random.key(recipe.settings.seed + 1), state.step)
        restarted = quantizer.restart_dead_codes(key, new_codes, new_usage, normalised, settings.dead_below)
        new_codes, new_usage = jax.tree.map(
            lambda new, old: jnp.where(due, new, old), restarted, (new_codes, new_usage)
        )
    moving = state.step >= recipe.warmup_steps
    codebook = {
        'codes': jnp.where(moving, new_codes, codes),
        'usage': jnp.where(moving, new_usage, usage),
    }
    return codebook, {
        'quantised': jnp.asarray(moving, jnp.float32),  # 0 while the codebook's figures mean nothing yet
        'perplexity': quantizer.perplexity(sums.vectors),
        'dead_codes': jnp.mean(new_usage < settings.dead_below, dtype=jnp.float32),
    }


def update(recipe: Recipe, state: VQGANState, batch: Batch, noise: Noise, weights: Any) -> tuple[VQGANState, Metrics]:
    """One step with given draws; where a loss or gradient is not finite, only `step` moves on.

    Returns:
        The new state, and metrics: float32 scalars, `finite` bool.
    """
    grads = gradients(recipe, state, batch, noise, weights)
    codebook, codebook_metrics = _update_codebook(recipe, state, grads.normalised, grads.tokens)
    rate = recipe.rate(state.step)

    with jax.named_scope('optimizer'):
        norm = optax.tree.norm(grads.params)
        discriminator_norm = optax.tree.norm(grads.discriminator)
        finite = jnp.isfinite(grads.metrics['loss'] + grads.metrics['hinge'] + norm + discriminator_norm)
        playing = finite & (state.step >= recipe.adversarial_start)

        params, optimizer = optimizers.step(recipe.optimizer, grads.params, state.params, state.optimizer, rate, finite)
        discriminator, discriminator_optimizer = optimizers.step(
            recipe.optimizer, grads.discriminator, state.discriminator, state.discriminator_optimizer, rate, playing
        )
        new_state = VQGANState(
            step=state.step + 1,
            params=params,
            discriminator=discriminator,
            codebook=optimizers.where(finite, codebook, state.codebook),
            optimizer=optimizer,
            discriminator_optimizer=discriminator_optimizer,
            average=optimizers.moving_average(params, state.average, recipe.settings.ema_decay, state.step, finite),
        )
    return new_state, {
        **grads.metrics,
        **codebook_metrics,
        'gradient_norm': norm,
        'discriminator_gradient_norm': discriminator_norm,
        'learning_rate': rate,
        'finite': finite,
    }


def jit_step(recipe: Recipe, state: VQGANState, mesh: Mesh) -> Callable[..., tuple[VQGANState, Metrics]]:
    """The step over a mesh, for `jax.jit`'s own methods as well: (state, global batch, weights) to (state, metrics).

    Args:
        recipe: what to compute.
        state: or its shapes; the state that is stepped is donated.
        mesh: to compute on.

    Returns:
        A jitted function, whose batch has `volume` and `label`, and whose weights are LPIPS's, whole on every device.
    """
    whole, places = partitioning.replicated(mesh), partitioning.state_shardings(state, mesh)

    def step(state, batch, weights):
        noise = draw_noise(recipe, state.step, batch['label'].shape[0])
        return update(recipe, state, batch, noise, weights)

    batch = {'volume': partitioning.volume_sharding(mesh), 'label': partitioning.batch_sharding(mesh)}
    return jax.jit(
        partitioning.traced_on(mesh, step),
        in_shardings=(places, batch, whole),
        out_shardings=(places, whole),
        donate_argnums=0,
        compiler_options=partitioning.keep_barriers(mesh.devices.flat[0].platform),
    )


def make_train_step(
    recipe: Recipe, state: VQGANState, mesh: Mesh
) -> Callable[[VQGANState, Batch], tuple[VQGANState, Metrics]]:
    """The jitted step of a run: (state, global batch) to (state, metrics); arguments as of `jit_step`."""
    jitted = jit_step(recipe, state, mesh)
    weights = partitioning.put_whole(recipe.lpips_weights, mesh)
    return lambda state, batch: jitted(state, {name: batch[name] for name in ('volume', 'label')}, weights)


def initialise_codebook(recipe: Recipe, state: VQGANState, batches: list[Batch], mesh: Mesh) -> VQGANState:
    """Codes by cosine k-means over the latent vectors of whole global batches.

    Args:
        recipe: whose `settings.codebook` and seed are used.
        state: whose encoder makes the latent vectors.
        batches: global batches with `volume`.
        mesh: they are on.
    """
    whole, settings = partitioning.replicated(mesh), recipe.settings.codebook

    def normalised(params, volume):
        return quantizer.l2_normalise(recipe.model.apply({'params': params}, volume, method='encode'))

    def cluster(vectors):
        key = jax.random.fold_in(jax.random.key(recipe.settings.seed), state.step)
        return quantizer.kmeans(key, jnp.stack(vectors), settings.codes, settings.kmeans_rounds)

    encode = jax.jit(partitioning.traced_on(mesh, normalised))
    codes = jax.jit(cluster, out_shardings=whole)([encode(state.params, batch['volume']) for batch in batches])
    return dataclasses.replace(state, codebook={**state.codebook, 'codes': codes})


def evaluation_variables(state: VQGANState) -> dict[str, Any]:
    """The generator's variables for evaluation and use: the moving average of the parameters where there is one."""
    params = state.params if state.average is None else state.average
    return {'params': params, 'codebook': {'codebook': state.codebook}}
