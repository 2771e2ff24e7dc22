"""One whole training step of the 3D VQGAN in PyTorch, with both optimisers, as the `paper` recipe has it."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from oracle import torch_losses as losses
from oracle.torch_vqgan import VQGAN, Discriminator, Sizes, initialise_kernels


@dataclass(frozen=True)
class Recipe:
    """Settings of the optimisers; both have the same.

    Attributes:
        learning_rate: at the first step.
        steps: of the whole run, over which the learning rate falls to 0 as half a cosine.
        betas: of Adam.
        eps: of Adam.
        clip: largest absolute value of an element of a gradient.
    """

    learning_rate: float = 1e-4
    steps: int = 940_000
    betas: tuple[float, float] = (0.5, 0.9)
    eps: float = 1e-8
    clip: float = 1.0


class Trainer:
    """Networks, optimisers and the step."""

    def __init__(self, sizes: Sizes, recipe: Recipe, lpips: losses.LPIPS):
        self.vqgan, self.discriminator, self.lpips = VQGAN(sizes), Discriminator(sizes), lpips
        for network in (self.vqgan.encoder, self.vqgan.decoder, self.discriminator):
            initialise_kernels(network)
        self.recipe, self.steps_taken = recipe, 0
        self.optimiser, self.discriminator_optimiser = (
            torch.optim.Adam(network.parameters(), betas=recipe.betas, eps=recipe.eps, fused=True)
            for network in (self.vqgan, self.discriminator)
        )

    def step(self, real: Tensor, labels: Tensor, slices: Tensor, adversarial: bool = True) -> dict[str, Tensor]:
        """Updates both networks and the codebook once.

        One forward pass of the generator and one of the discriminator on each of the real and the
        reconstructed volumes serve all terms. Each gradient, clipped, stays in its parameter until the next
        step.

        Args:
            real: volumes [batch, 1, D, H, W] in [-1, 1].
            labels: class numbers [batch], int64.
            slices: depth indices of the axial slices that LPIPS sees, [batch, slices a sample], int64.
            adversarial: whether the adversarial and the discriminator's terms have started; before that, the
                discriminator and its optimiser stand still.

        Returns:
            Every loss, unweighted; 'adversarial_weight', 0 before the start; 'loss', the generator's sum.
        """
        model = self.vqgan
        z = model.pre_quantisation(model.encoder(real))
        normalised, code, quantised, indices = model.codebook(z)
        fake = model.decoder(model.post_quantisation(quantised))
        real_logits, real_maps = self.discriminator(real)
        fake_logits, fake_maps = self.discriminator(fake)

        terms = {
            'l1': (fake - real).abs().mean(),
            'lpips': losses.perceptual_loss(self.lpips, fake, real, slices),
            'commitment': losses.codebook_loss(normalised, code),
            'feature_matching': losses.feature_matching_loss(fake_maps, real_maps),
            'image_gradient': losses.gradient_loss(fake, real),
            'adversarial': losses.adversarial_loss(fake_logits),
            'cross_entropy': losses.classification_loss(model.classifier(z, model.scorer(z)), labels),
            'hinge': losses.hinge_loss(real_logits, fake_logits),
            'adversarial_weight': torch.zeros(()),
        }
        if adversarial:
            kernel = model.decoder.last_kernel
            terms['adversarial_weight'] = losses.adaptive_weight(terms['l1'], terms['adversarial'], kernel)
        terms['loss'] = total_loss(terms)
        self._update(terms, adversarial)
        model.codebook.update(normalised.detach(), indices)
        return {name: value.detach() for name, value in terms.items()}

    def _update(self, terms: dict[str, Tensor], adversarial: bool) -> None:
        """Takes both gradients from the one graph, then steps the optimisers.

        The generator's loss reaches the discriminator's parameters too: they are left out by naming the
        inputs of each backward pass. The hinge loss goes first, so that the generator's pass, which holds
        most of the memory, can free the graph as it goes.
        """
        goals = [(self.vqgan, self.optimiser, terms['loss'])]
        if adversarial:
            goals.insert(0, (self.discriminator, self.discriminator_optimiser, terms['hinge']))
        for network, optimiser, goal in goals:
            optimiser.zero_grad()
            goal.backward(inputs=list(network.parameters()), retain_graph=goal is terms['hinge'])
        rate = 0.5 * (1 + math.cos(math.pi * self.steps_taken / self.recipe.steps))
        for network, optimiser, _ in goals:
            torch.nn.utils.clip_grad_value_(network.parameters(), self.recipe.clip)
            optimiser.param_groups[0]['lr'] = self.recipe.learning_rate * rate
            optimiser.step()
        self.steps_taken += 1


def total_loss(terms: dict[str, Tensor]) -> Tensor:
    """The generator's loss: the weighted sum of its terms."""
    image = (
        4 * terms['l1']
        + terms['lpips']
        + terms['commitment']
        + 4 * terms['feature_matching']
        + 4 * terms['image_gradient']
        + terms['adversarial_weight'] * terms['adversarial']
    )
    return 0.8 * image + 0.2 * terms['cross_entropy']
