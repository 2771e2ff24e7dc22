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


class MedicalNetBlock(nn.Module):
    """A basic block or a bottleneck under MedicalNet's names."""

    def __init__(self, inward: int, inner: int, expansion: int, stride: int, dilation: int, shortcut: str):
        super().__init__()
        self.outer, self.stride = inner * expansion, stride
        spread = {'dilation': dilation, 'padding': dilation, 'bias': False}
        if expansion == 1:
            self.conv1 = nn.Conv3d(inward, inner, 3, stride, **spread)
            self.conv2 = nn.Conv3d(inner, inner, 3, 1, **spread)
        else:
            self.conv1 = nn.Conv3d(inward, inner, 1, bias=False)
            self.conv2 = nn.Conv3d(inner, inner, 3, stride, **spread)
            self.conv3 = nn.Conv3d(inner, self.outer, 1, bias=False)
            self.bn3 = nn.BatchNorm3d(self.outer)
        self.bn1, self.bn2 = nn.BatchNorm3d(inner), nn.BatchNorm3d(inner)
        self.changes = stride != 1 or inward != self.outer
        if self.changes and shortcut == 'B':
            projection = nn.Conv3d(inward, self.outer, 1, stride, bias=False)
            self.downsample = nn.Sequential(projection, nn.BatchNorm3d(self.outer))

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        if hasattr(self, 'conv3'):
            hidden = self.bn3(self.conv3(F.relu(hidden)))
        if hasattr(self, 'downsample'):
            x = self.downsample(x)
        elif self.changes:
            x = F.avg_pool3d(x, 1, self.stride)
            x = torch.cat([x, x.new_zeros(len(x), self.outer - x.shape[1], *x.shape[2:])], dim=1)
        return F.relu(x + hidden)


class MedicalNet(nn.Module):
    """The network whose weights MedicalNet publishes: [batch, 1, D, H, W] to features [batch, C, D/8, H/8, W/8].

    By its layers' names in the files; with a stand-in for the head that its segmentation has and its features lack.
    """

    def __init__(self, depth: int, shortcut: str, width: int = 64):
        super().__init__()
        expansion, inward = 4 if depth == 50 else 1, width
        self.conv1 = nn.Conv3d(1, width, 7, 2, 3, bias=False)
        self.bn1 = nn.BatchNorm3d(width)
        for stage, (number, stride, dilation) in enumerate(zip(STAGES[depth], (1, 2, 1, 1), (1, 1, 2, 4), strict=True)):
            blocks = []
            for block in range(number):
                first = stride if block == 0 else 1
                blocks.append(MedicalNetBlock(inward, width * 2**stage, expansion, first, dilation, shortcut))
                inward = blocks[-1].outer
            self.add_module(f'layer{stage + 1}', nn.Sequential(*blocks))
        self.conv_seg = nn.Sequential(nn.ConvTranspose3d(inward, 2, 2, 2), nn.BatchNorm3d(2))

    def forward(self, volume: Tensor) -> Tensor:
        x = F.max_pool3d(F.relu(self.bn1(self.conv1(volume))), 3, 2, 1)
        return self.layer4(self.layer3(self.layer2(self.layer1(x))))
