"""The class-conditional transformer of stage 2 in PyTorch: network, loss, training step and uncached sampling.

Tokens are [batch, length]; ids 0 to codes - 1 are codes, then [MASK], then the classes. Which positions are corrupted
and what stands there comes from outside, so that both implementations read the same.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass(frozen=True)
class Sizes:
    """Everything that scales the network; the defaults are the paper's.

    Attributes:
        codes: in the codebook.
        classes: number of classes.
        length: tokens a sample.
        layers: number of blocks.
        width: numbers a token.
        heads: of attention.
        causal: a position sees itself and earlier ones alone; else all, of one position more (the class).
    """

    codes: int = 1024
    classes: int = 2
    length: int = 512
    layers: int = 24
    width: int = 1024
    heads: int = 16
    causal: bool = True

    @property
    def vocabulary(self) -> int:
        """Codes, [MASK] and classes."""
        return self.codes + 1 + self.classes


class Attention(nn.Module):
    """Attention of several heads with its four linear layers."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.heads, self.causal = sizes.heads, sizes.causal
        self.query, self.key, self.value, self.projection = (nn.Linear(sizes.width, sizes.width) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        query, key, value = (
            layer(x).view(batch, length, self.heads, width // self.heads).transpose(1, 2)
            for layer in (self.query, self.key, self.value)
        )
        attended = F.scaled_dot_product_attention(query, key, value, is_causal=self.causal)
        return self.projection(attended.transpose(1, 2).reshape(batch, length, width))


class Block(nn.Module):
    """One layer: attention, then a hidden layer four times as wide, each behind a norm and beside a short cut."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.norm_1, self.norm_2 = (nn.LayerNorm(sizes.width, eps=1e-5) for _ in range(2))
        self.attention = Attention(sizes)
        self.mlp = nn.Sequential(
            nn.Linear(sizes.width, 4 * sizes.width), nn.GELU(), nn.Linear(4 * sizes.width, sizes.width)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm_1(x))
        return x + self.mlp(self.norm_2(x))


class GPT(nn.Module):
    """Token ids [batch, T] to logits [batch, T, vocabulary]."""

    def __init__(self, sizes: Sizes):
        super().__init__()
        self.sizes = sizes
        self.tokens = nn.Embedding(sizes.vocabulary, sizes.width)
        positions = sizes.length if sizes.causal else sizes.length + 1
        self.positions = nn.Parameter(torch.zeros(positions, sizes.width))
        self.blocks = nn.Sequential(*(Block(sizes) for _ in range(sizes.layers)))
        self.norm = nn.LayerNorm(sizes.width, eps=1e-5)
        self.head = nn.Linear(sizes.width, sizes.vocabulary, bias=False)
        for module in self.modules():
            if isinstance(module, nn.Linear | nn.Embedding):
                nn.init.normal_(module.weight, std=0.02)
            if isinstance(module, nn.Linear) and module.bias is not None:
                nn.init.zeros_(module.bias)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.tokens(ids) + self.positions[: ids.shape[1]]
        return self.head(self.norm(self.blocks(x)))


def loss(network: GPT, corrupted: Tensor, tokens: Tensor, labels: Tensor, counted: Tensor) -> Tensor:
    """Mean cross-entropy of the true tokens.

    Args:
        network: of either kind.
        corrupted: ids [batch, length] that are read.
        tokens: the true ones [batch, length].
        labels: [batch].
        counted: bool [batch, length], the positions that the mean goes over.
    """
    condition = (network.sizes.codes + 1 + labels)[:, None]
    read = corrupted[:, :-1] if network.sizes.causal else corrupted
    logits = network(torch.cat([condition, read], dim=1))
    if not network.sizes.causal:
        logits = logits[:, 1:]
    return F.cross_entropy(logits[counted], tokens[counted])


class Trainer:
    """The network with its optimiser: AdamW, weight decay on the kernels of linear layers alone, cosine by step."""

    def __init__(self, sizes: Sizes, learning_rate: float = 4.5e-6, final: float = 1e-8, steps: int = 1000):
        self.network = GPT(sizes)
        self.learning_rate, self.final, self.steps, self.taken = learning_rate, final, steps, 0
        kernels = [module.weight for module in self.network.modules() if isinstance(module, nn.Linear)]
        ids = {id(kernel) for kernel in kernels}
        others = [parameter for parameter in self.network.parameters() if id(parameter) not in ids]
        groups = [{'params': kernels, 'weight_decay': 0.01}, {'params': others, 'weight_decay': 0.0}]
        self.optimiser = torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.95), eps=1e-8, fused=True)

    def fuse(self, fused: bool) -> None:
        """Whether the optimiser runs as one fused operation or as PyTorch's default, with the same result."""
        for group in self.optimiser.param_groups:
            group['fused'] = fused

    def step(self, corrupted: Tensor, tokens: Tensor, labels: Tensor, counted: Tensor) -> float:
        """Takes one step; returns the loss before it."""
        self.optimiser.zero_grad()
        value = loss(self.network, corrupted, tokens, labels, counted)
        value.backward()
        share = 0.5 * (1 + math.cos(math.pi * self.taken / self.steps))
        for group in self.optimiser.param_groups:
            group['lr'] = self.final + (self.learning_rate - self.final) * share
        self.optimiser.step()
        self.taken += 1
        return value.item()


def likely(logits: Tensor, top_k: int, top_p: float) -> Tensor:
    """Logits [batch, codes] with those beyond the `top_k` best, then beyond probability `top_p`, at minus infinity."""
    ordered, order = logits.sort(dim=-1, descending=True)
    if top_k:
        ordered[:, top_k:] = -torch.inf
    share = ordered.softmax(dim=-1)
    ordered[share.cumsum(dim=-1) - share >= top_p] = -torch.inf
    return torch.empty_like(logits).scatter(1, order, ordered)


@torch.no_grad()
def sample(
    network: GPT,
    labels: Tensor,
    noise: Tensor,
    given: Tensor | None = None,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Draws tokens one after the other from a causal network, everything computed anew for each.

    Args:
        network: causal.
        labels: [batch].
        noise: Gumbel numbers [batch, length, codes].
        given: [batch, length] tokens that are to stay, -1 where to draw; None: all are drawn.
        temperature: of the logits; 0: the likeliest.
        top_k: best codes that may come out; 0: all.
        top_p: probability of the codes that may come out.

    Returns:
        Tokens [batch, length], and by how much the drawn one was ahead of the next, [batch, length].
    """
    ids, codes, ahead = (network.sizes.codes + 1 + labels)[:, None], network.sizes.codes, []
    for position in range(noise.shape[1]):
        logits = network(ids)[:, -1, :codes]
        if temperature > 0:
            logits = likely(logits / temperature, top_k, top_p) + noise[:, position]
        best = logits.topk(2, dim=-1)
        ahead.append(best.values[:, 0] - best.values[:, 1])
        token = best.indices[:, 0]
        if given is not None:
            token = torch.where(given[:, position] < 0, token, given[:, position])
        ids = torch.cat([ids, token[:, None]], dim=1)
    return ids[:, 1:], torch.stack(ahead, dim=1)
