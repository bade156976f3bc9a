"""The ResNets of He et al. (2015) for 32x32 images; Zhang, Kou & Liu (2022) prune ResNet-110.

With n = (depth - 2) / 6 blocks a stage:

    part           on 32x32   channels
    conv1, bn1     32²              16
    layer1         32²              16   n blocks
    layer2         16²              32   n blocks, the first with stride 2
    layer3          8²              64   n blocks, the first with stride 2
    mean, linear    1²         classes

A block is two 3x3 convolutions with normalisation, the input added before the last ReLU. Where the
width doubles the input comes over "option A": every second pixel, and zeros for the new channels,
half of them before the old ones and half after. So channel c of layer1 is added to channel c + 8
of layer2 and c + 24 of layer3, and pruned together with them.

Zhang, Kou & Liu state the network (ResNet-110 on CIFAR-10) and not its shortcut. Option A is He et
al.'s own choice for these images, and usual in the work on filter pruning; that theirs is the same
is a reconstruction. So is putting the zeros half before and half after, which no size depends on.
"""

from __future__ import annotations

from torch import Tensor, nn
from torch.nn import functional as F

from ..check import check_count
from .initial import initialise


def resnet20(num_classes: int = 10) -> ResNetCifar:
    """ResNet-20: [N, 3, 32, 32] -> [N, num_classes]; 269,722 parameters, 40,551,040 MACs."""
    return ResNetCifar(3, num_classes)


def resnet32(num_classes: int = 10) -> ResNetCifar:
    """ResNet-32: [N, 3, 32, 32] -> [N, num_classes]; 464,154 parameters, 68,862,592 MACs."""
    return ResNetCifar(5, num_classes)


def resnet44(num_classes: int = 10) -> ResNetCifar:
    """ResNet-44: [N, 3, 32, 32] -> [N, num_classes]; 658,586 parameters, 97,174,144 MACs."""
    return ResNetCifar(7, num_classes)


def resnet56(num_classes: int = 10) -> ResNetCifar:
    """ResNet-56: [N, 3, 32, 32] -> [N, num_classes]; 853,018 parameters, 125,485,696 MACs."""
    return ResNetCifar(9, num_classes)


def resnet110(num_classes: int = 10) -> ResNetCifar:
    """ResNet-110: [N, 3, 32, 32] -> [N, num_classes]; 1,727,962 parameters, 252,887,680 MACs."""
    return ResNetCifar(18, num_classes)


class ResNetCifar(nn.Module):
    """Three stages of `blocks` residual blocks each, of 16, 32 and 64 channels.

    Any image size will do. Raises `OptionError` for a count below 1.
    """

    def __init__(self, blocks: int, num_classes: int = 10):
        super().__init__()
        check_count("blocks", blocks)
        check_count("num_classes", num_classes)
        self.conv1 = nn.Conv2d(3, 16, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(16)
        self.layer1 = _stage(16, 16, blocks)
        self.layer2 = _stage(16, 32, blocks)
        self.layer3 = _stage(32, 64, blocks)
        self.linear = nn.Linear(64, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn1(self.conv1(x)))
        x = self.layer3(self.layer2(self.layer1(x)))
        return self.linear(x.mean((2, 3)))


def _stage(ins: int, outs: int, blocks: int) -> nn.Sequential:
    return nn.Sequential(Block(ins, outs), *(Block(outs, outs) for _ in range(blocks - 1)))


class Block(nn.Module):
    """Two 3x3 convolutions beside the shortcut; halves the image where it widens."""

    def __init__(self, ins: int, outs: int):
        super().__init__()
        stride = 1 if outs == ins else 2
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, padding=1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.shortcut = nn.Identity() if outs == ins else PadShortcut(outs - ins)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.shortcut(x))


class PadShortcut(nn.Module):
    """Option A: [N, C, H, W] -> [N, C + extra, ceil(H/2), ceil(W/2)], without weights.

    Every second pixel, beginning with the first; `extra` channels of zeros, half of them in front.
    """

    def __init__(self, extra: int):
        super().__init__()
        self.front = extra // 2
        self.back = extra - self.front

    def forward(self, x: Tensor) -> Tensor:
        return F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.front, self.back))
