"""The networks of the 3D VQGAN in PyTorch: encoder, decoder, discriminator, scorer, classifier and codebook.

Modules are named after what they are; the order of their layers is the order of the forward pass, on which
`from_flax` relies.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Everything that scales the networks; the defaults are the paper's.

    Attributes:
        volume: side of the cubic volume in voxels.
        channels: of the encoder's stages, each of which halves the side; the decoder mirrors them.
        hidden: channels between the encoder's last stage and the pre-quantisation conv.
        code_dim: numbers in a code.
        num_codes: codes in the codebook.
        discriminator_channels: of the discriminator's hidden maps, each of half the side of the one before.
        classifier_hidden: units of the auxiliary classifier's hidden layer.
        classifier_groups: groups of its group norm.
        classes: number of classes.
        groups: groups of all other group norms.
        dropout: of the auxiliary classifier.
    """

    volume: int = 128
    channels: tuple[int, ...] = (32, 64, 128, 256)
    hidden: int = 512
    code_dim: int = 128
    num_codes: int = 1024
    discriminator_channels: tuple[int, ...] = (64, 128, 256, 512)
    classifier_hidden: int = 1024
    classifier_groups: int = 32
    classes: int = 2
    groups: int = 8
    dropout: float = 0.2

    @property
    def latent(self) -> int:
        """Side of the latent grid, in tokens."""
        return self.volume // 2 ** len(self.channels)


def group_norm(groups: int, channels: int) -> nn.GroupNorm:
    """Group norm with the epsilon that the method uses everywhere."""
    return nn.GroupNorm(groups, channels, eps=1e-6)


def layer_norm(x: Tensor) -> Tensor:
    """Normalises each sample over all but its first axis; no scale, no bias, eps 1e-5."""
    return F.layer_norm(x, x.shape[1:])


class ResBlock(nn.Module):
    """x + act(norm(conv(act(norm(conv(x)))))), both norms with one and the same scale and bias."""

    def __init__(self, channels: int, groups: int, activation: nn.Module):
        super().__init__()
        self.conv1 = nn.Conv3d(channels, channels, 3, padding=1)
        self.conv2 = nn.Conv3d(channels, channels, 3, padding=1)
        self.norm = group_norm(groups, channels)
        self.activation = activation

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.activation(self.norm(self.conv1(x)))
        return x + self.activation(self.norm(self.conv2(hidden)))


class Encoder(nn.Sequential):
    """[batch, 1, D, H, W] to [batch, hidden, D/s, H/s, W/s], s = 2 ** number of stages."""

    def __init__(self, sizes: Sizes):
        layers, before = [], 1
        for channels in sizes.channels:
            layers += self.stage(nn.Conv3d(before, channels, 4, stride=2, padding=1), sizes.groups)
            before = channels
        layers += self.stage(nn.Conv3d(before, sizes.hidden, 3, padding=1), sizes.groups)
        super().__init__(*layers)

    @staticmethod
    def stage(conv: nn.Conv3d, groups: int) -> list[nn.Module]:
        """A conv with its norm and activation, and the residual block after it."""
        activation = nn.LeakyReLU(0.2, inplace=True)
        return [
            conv,
            group_norm(groups, conv.out_channels),
            activation,
            ResBlock(conv.out_channels, groups, activation),
        ]


class Decoder(nn.Sequential):
    """[batch, hidden, d, h, w] to volumes [batch, 1, d*s, h*s, w*s] in [-1, 1]."""

    def __init__(self, sizes: Sizes):
        layers, before = [], sizes.hidden
        for channels in reversed(sizes.channels):
            layers += [
                nn.Upsample(scale_factor=2, mode='nearest'),
                nn.Conv3d(before, channels, 3, padding=1),
                group_norm(sizes.groups, channels),
                nn.ReLU(inplace=True),
                ResBlock(channels, sizes.groups, nn.ReLU(inplace=True)),
            ]
            before = channels
        super().__init__(*layers, nn.Conv3d(before, 1, 1), nn.Tanh())

    @property
    def last_kernel(self) -> nn.Parameter:
        """The kernel that the adaptive weight compares gradients on."""
        return self[-2].weight


class Discriminator(nn.Module):
    """PatchGAN: logits [batch, 1, d, h, w], and the hidden maps that feature matching compares."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.stages, before = nn.ModuleList(), 1
        for channels in sizes.discriminator_channels:
            conv = nn.Conv3d(before, channels, 4, stride=2, padding=1)
            norm = [group_norm(sizes.groups, channels)] if before > 1 else []
            self.stages.append(nn.Sequential(conv, *norm, nn.LeakyReLU(0.2, inplace=True)))
            before = channels
        self.head = nn.Conv3d(before, 1, 4)

    def forward(self, x: Tensor) -> tuple[Tensor, list[Tensor]]:
        maps = []
        for stage in self.stages:
            x = stage(x)
            maps.append(x)
        return self.head(x), maps


class Scorer(nn.Sequential):
    """Importance of latent regions: z [batch, code_dim, d, h, w] to scores [batch, 1, d, h, w] in (0, 1)."""

    def __init__(self, sizes: Sizes):
        super().__init__(
            nn.Conv3d(sizes.code_dim, sizes.code_dim, 3, padding=1),
            nn.ReLU(),
            nn.Conv3d(sizes.code_dim, 1, 1),
            group_norm(1, 1),
            nn.Sigmoid(),
        )

    def forward(self, z: Tensor) -> Tensor:
        return super().forward(layer_norm(z))


class Classifier(nn.Sequential):
    """Auxiliary classifier: z times its scores, flattened channel first, to logits [batch, classes]."""

    def __init__(self, sizes: Sizes):
        hidden = sizes.classifier_hidden
        super().__init__(
            nn.Linear(sizes.code_dim * sizes.latent**3, hidden),
            group_norm(sizes.classifier_groups, hidden),
            nn.ReLU(),
            nn.Dropout(sizes.dropout),
            nn.Linear(hidden, sizes.classes),
        )

    def forward(self, z: Tensor, scores: Tensor) -> Tensor:
        return super().forward((layer_norm(z) * scores).flatten(1))


def l2_normalise(x: Tensor, axis: int) -> Tensor:
    """Vectors along the axis to unit length; those shorter than 1e-12 are divided by 1e-12."""
    return F.normalize(x, dim=axis, eps=1e-12)


class Codebook(nn.Module):
    """Unit-length codes that follow the latents assigned to them by an exponential moving average.

    Attributes:
        codes: [num_codes, code_dim], unit length.
        usage: [num_codes], moving average of the number of latents a code is given in a step; starts at zero.
    """

    codes: Tensor
    usage: Tensor

    def __init__(self, sizes: Sizes, decay: float = 0.99):
        super().__init__()
        self.decay = decay
        self.register_buffer('codes', l2_normalise(torch.randn(sizes.num_codes, sizes.code_dim), 1))
        self.register_buffer('usage', torch.zeros(sizes.num_codes))

    def forward(self, z: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Looks z up; nothing moves.

        Args:
            z: [batch, code_dim, d, h, w].

        Returns:
            z normalised, and the nearest code at each position, both [batch, code_dim, d, h, w]; the same
            code with the gradient of the normalised z (straight-through); code numbers [batch, d, h, w].
        """
        normalised = l2_normalise(z, 1)
        with torch.no_grad():
            indices = (normalised.movedim(1, -1) @ self.codes.T).argmax(-1)
            code = self.codes[indices].movedim(-1, 1)
        return normalised, code, normalised + (code - normalised).detach(), indices

    @torch.no_grad()
    def update(self, normalised: Tensor, indices: Tensor) -> None:
        """Moves the used codes towards the mean of their latents, and the usage of all of them."""
        latents = normalised.movedim(1, -1).flatten(0, -2)
        indices = indices.flatten()
        counts = torch.zeros_like(self.usage).index_add_(0, indices, torch.ones_like(latents[:, 0]))
        sums = torch.zeros_like(self.codes).index_add_(0, indices, latents)
        used = counts > 0
        target = l2_normalise(sums[used] / counts[used, None], 1)
        self.codes[used] = l2_normalise(self.decay * self.codes[used] + (1 - self.decay) * target, 1)
        self.usage.mul_(self.decay).add_(counts, alpha=1 - self.decay)


class VQGAN(nn.Module):
    """All that the generator's optimiser trains, and the codebook, which no optimiser does."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.encoder = Encoder(sizes)
        self.pre_quantisation = nn.Conv3d(sizes.hidden, sizes.code_dim, 1)
        self.post_quantisation = nn.Conv3d(sizes.code_dim, sizes.hidden, 1)
        self.decoder = Decoder(sizes)
        self.scorer = Scorer(sizes)
        self.classifier = Classifier(sizes)
        self.codebook = Codebook(sizes)


def initialise_kernels(network: nn.Module) -> None:
    """Draws the conv kernels of an encoder, decoder or discriminator from N(0, .02).

    Everything else keeps PyTorch's own initial values, which are the method's: uniform within
    1/sqrt(fan_in), and norms at 1 and 0.
    """
    for module in network.modules():
        if isinstance(module, nn.Conv3d):
            nn.init.normal_(module.weight, std=0.02)
