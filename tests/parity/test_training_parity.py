"""Three whole training steps of the `paper` recipe against the PyTorch oracle, from the same weights and draws."""

import pathlib
import runpy

import jax
import jax.numpy as jnp
import numpy as np
import pytest

torch = pytest.importorskip('torch', reason="PyTorch is not installed: pip install -e '.[parity]'")

from oracle import from_flax, torch_losses, torch_training, torch_vqgan  # noqa: E402
from oracle.comparison import QUICK_COMPILATION, assert_near, channels_first, random_parameters  # noqa: E402

from vqroi_jax.training import partitioning, vqgan  # noqa: E402

SIZES = torch_vqgan.Sizes(
    volume=16,
    channels=(16, 32),
    hidden=32,
    code_dim=16,
    num_codes=24,
    discriminator_channels=(16, 32),
    classifier_hidden=128,
    classes=3,
    dropout=0.0,
)
BATCH, SLICES = 3, 2
DURATION = 5  # steps of the schedule, 4 of which are taken
LEARNING_RATE = 1e-4
# Chosen so that no activation and no absolute difference comes closer than 5e-6 to its kink, where rounding decides.
SEED = 21
# A constant added before a normalisation changes nothing: these gradients are rounding, which Adam turns into steps.
ZERO_GRADIENTS = ('scorer.2.bias',)
# So are those of single elements of the scorer's first bias: of channels whose ReLU is open everywhere.
UNSTEADY = (*ZERO_GRADIENTS, 'scorer.0.bias')


def make_recipe(adversarial_start):
    """The `paper` recipe on small networks, without dropout."""
    root = pathlib.Path(__file__).parents[2]
    config = runpy.run_path(str(root / 'configs' / 'vqgan.py'))['get_config']('paper')
    config.data.roi_size = (SIZES.volume,) * 3
    config.model.channels = SIZES.channels
    config.model.hidden = SIZES.hidden
    config.model.code_features = SIZES.code_dim
    config.model.encoder_res_blocks = config.model.decoder_res_blocks = (1,) * len(SIZES.channels)
    config.model.classifier_hidden = SIZES.classifier_hidden
    config.model.classifier_dropout = SIZES.dropout
    config.codebook.codes = SIZES.num_codes
    config.discriminator.channels = SIZES.discriminator_channels
    config.losses.adversarial_start = f'{adversarial_start} steps'
    config.training.duration = f'{DURATION} steps'
    return vqgan.make_recipe(config, SIZES.classes, steps_per_epoch=1.0)


def make_state(recipe):
    """A state before its first step, with random parameters."""
    state = vqgan.create_state(recipe, partitioning.make_mesh({'data': 1}))
    return state.replace(
        params=random_parameters(state.params, SEED),
        # Where an activation is linear for real and fake alike, the hinge terms cancel: so it must not be, often.
        discriminator=random_parameters(state.discriminator, SEED + 1, offset=1.5),
    )


def make_oracle(state):
    trainer = torch_training.Trainer(
        SIZES, torch_training.Recipe(learning_rate=LEARNING_RATE, steps=DURATION), torch_losses.LPIPS()
    )
    codebook = {f'codebook.{name}': value for name, value in from_flax.codebook_state(state.codebook).items()}
    trainer.vqgan.load_state_dict(from_flax.vqgan_state(state.params, stages=2) | codebook)
    trainer.discriminator.load_state_dict(from_flax.discriminator_state(state.discriminator, stages=2))
    for network in (trainer.vqgan, trainer.discriminator, trainer.lpips):
        network.double()
    return trainer


def make_batch(step):
    rng = np.random.default_rng(100 + 10 * SEED + step)
    volume = rng.uniform(-1, 1, (BATCH, *[SIZES.volume] * 3, 1)).astype(np.float32)
    volume[:, :, :5] = -1.0  # background
    return volume, rng.integers(SIZES.classes, size=BATCH), rng.integers(SIZES.volume, size=(BATCH, SLICES))


def clipped_gradients(before, after):
    """The gradients that Adam saw, from its first moment before and after a step: m' = (m + g) / 2, as b1 = .5."""
    return jax.tree.map(lambda m, moved: 2 * moved - m, before[1].mu, after[1].mu)


def test_a_step_before_the_adversarial_start_and_three_after():
    recipe = make_recipe(adversarial_start=1)
    state = make_state(recipe)
    oracle = make_oracle(state)
    take_step = jax.jit(lambda *arguments: vqgan.update(recipe, *arguments), compiler_options=QUICK_COMPILATION)
    for step in range(4):
        volume, label, slices = make_batch(step)
        noise = vqgan.Noise(jnp.asarray(slices), dropout=None)
        before = state
        state, metrics = take_step(state, {'volume': volume, 'label': label}, noise, recipe.lpips_weights)
        started = step >= recipe.adversarial_start
        terms = oracle.step(channels_first(volume), torch.tensor(label), torch.tensor(slices), started)

        assert metrics['finite']
        for name, value in terms.items():
            assert float(metrics[name]) == pytest.approx(value.item(), rel=1e-4), f'{name} at step {step}'
        assert (metrics['adversarial_weight'] > 0) == started
        gradients = clipped_gradients(before.optimizer, state.optimizer)
        compare_gradients(from_flax.vqgan_state(gradients, stages=2), oracle.vqgan, step)
        if started:
            gradients = clipped_gradients(before.discriminator_optimizer, state.discriminator_optimizer)
            compare_gradients(from_flax.discriminator_state(gradients, stages=2), oracle.discriminator, step)
        compare_parameters(from_flax.vqgan_state(state.params, stages=2), oracle.vqgan, step)
        compare_parameters(from_flax.discriminator_state(state.discriminator, stages=2), oracle.discriminator, step)
        for name, ours in from_flax.codebook_state(state.codebook).items():
            np.testing.assert_allclose(ours, getattr(oracle.vqgan.codebook, name), atol=1e-6)


def compare_gradients(ours, network, step):
    for name, parameter in network.named_parameters():
        if name not in ZERO_GRADIENTS:
            assert_near(ours[name], parameter.grad, f'gradient of {name} at step {step}')


def compare_parameters(ours, network, step):
    """Each within 3 steps of Adam; all but the listed ones within one, and a hundredth as root mean square.

    Adam divides each element by its own size, so an element that is small in its array magnifies the array's rounding.
    """
    for name, parameter in network.named_parameters():
        steps = (ours[name] - parameter.detach()) / LEARNING_RATE
        limit, mean_limit = (3, 3) if name in UNSTEADY else (1, 0.01)
        assert steps.abs().max() <= limit, f'{name} at step {step}'
        assert steps.square().mean().sqrt() <= mean_limit, f'{name} at step {step}'
