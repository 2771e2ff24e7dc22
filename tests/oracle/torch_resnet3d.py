"""3D residual networks in PyTorch, after section 2.6 of the design: volumes [batch, 1, D, H, W] to logits."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

STAGES = {10: (1, 1, 1, 1), 18: (2, 2, 2, 2), 34: (3, 4, 6, 3), 50: (3, 4, 6, 3)}


class Block(nn.Module):
    """A basic block, or a bottleneck where `expansion` is 4."""

    def __init__(self, inward: int, inner: int, expansion: int, stride: int, shortcut: str):
        super().__init__()
        self.outer, self.stride = inner * expansion, stride
        if expansion == 1:
            plan = [(inward, inner, 3, stride), (inner, inner, 3, 1)]
        else:
            plan = [(inward, inner, 1, 1), (inner, inner, 3, stride), (inner, self.outer, 1, 1)]
        self.convs = nn.ModuleList(nn.Conv3d(a, b, k, s, k // 2, bias=False) for a, b, k, s in plan)
        self.norms = nn.ModuleList(nn.BatchNorm3d(conv.out_channels) for conv in self.convs)
        self.changes = stride > 1 or inward != self.outer
        if self.changes and shortcut == 'B':
            self.projection = nn.Sequential(
                nn.Conv3d(inward, self.outer, 1, stride, bias=False), nn.BatchNorm3d(self.outer)
            )
        else:
            self.projection = None

    def forward(self, x: Tensor) -> Tensor:
        hidden = x
        for number, (conv, norm) in enumerate(zip(self.convs, self.norms, strict=True)):
            hidden = norm(conv(hidden))
            if number < len(self.convs) - 1:
                hidden = F.relu(hidden)
        if self.projection is not None:
            x = self.projection(x)
        elif self.changes:
            x = F.avg_pool3d(x, 1, self.stride)
            x = torch.cat([x, x.new_zeros(len(x), self.outer - x.shape[1], *x.shape[2:])], dim=1)
        return F.relu(x + hidden)


class ResNet3D(nn.Module):
    def __init__(self, depth: int, classes: int, width: int = 64, shortcut: str = 'B'):
        super().__init__()
        expansion, inward = 4 if depth == 50 else 1, width
        self.conv = nn.Conv3d(1, width, 7, (1, 2, 2), 3, bias=False)
        self.norm = nn.BatchNorm3d(width)
        self.blocks = nn.ModuleList()
        for stage, number in enumerate(STAGES[depth]):
            for block in range(number):
                stride = 2 if stage > 0 and block == 0 else 1
                self.blocks.append(Block(inward, width * 2**stage, expansion, stride, shortcut))
                inward = self.blocks[-1].outer
        self.head = nn.Linear(inward, classes)

    def forward(self, volume: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.norm(self.conv(volume))), 3, 2, 1)
        for block in self.blocks:
            x = block(x)
        return self.head(x.mean(dim=(2, 3, 4)))
