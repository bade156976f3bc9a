"""MobileNetV3-Large (Howard et al. 2019), in the form that Liu & Lei (2023) prune.

Stem: 3x3 convolution to 16, hard-swish, stride 2. Then 15 inverted residuals, here on 224x224:

    block  input     kernel  hidden  out  squeeze  activation  stride
        1  16x112²        3      16   16  -        ReLU             1
        2  16x112²        3      64   24  -        ReLU             2
        3  24x56²         3      72   24  -        ReLU             1
        4  24x56²         5      72   40  24       ReLU             2
        5  40x28²         5     120   40  32       ReLU             1
        6  40x28²         5     120   40  32       ReLU             1
        7  40x28²         3     240   80  -        hard-swish       2
        8  80x14²         3     200   80  -        hard-swish       1
        9  80x14²         3     184   80  -        hard-swish       1
       10  80x14²         3     184   80  -        hard-swish       1
       11  80x14²         3     480  112  120      hard-swish       1
       12  112x14²        3     672  112  168      hard-swish       1
       13  112x14²        5     672  160  168      hard-swish       2
       14  160x7²         5     960  160  240      hard-swish       1
       15  160x7²         5     960  160  240      hard-swish       1

Then a 1x1 convolution to 960 and hard-swish, the mean over the image, a linear layer to 1280 and
hard-swish, dropout, and a linear layer to the classes.

The paper states this table but for the squeeze widths. It lists 9 of 16 hidden channels as kept in
block 1, while the block's output keeps all its 16. So the hidden channels of block 1 cannot be the
block's input: there is an expansion convolution from 16 to 16 channels, which the usual network
leaves out. With it the parameters come to the 4.22 M (10 classes) and 4.33 M (100 classes) that the
paper states; without it they are 4.21 M and 4.33 M.

A reconstruction, as in Howard et al. and in torchvision: that this convolution carries a
normalisation and ReLU like the others, the squeeze widths, the momentum and epsilon of the
normalisation layers, the dropout, the initial weights.
"""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor, nn

from ..check import check_count
from ..errors import OptionError
from ..squeeze import Squeeze
from .initial import initialise

SQUEEZE = Squeeze(divide=4, round_to=8)  # a quarter of the gated width, to a multiple of 8


class Row(NamedTuple):
    """One block of the table. Channels, but for the kernel's edge in pixels and the stride."""

    kernel: int
    hidden: int
    outs: int
    squeeze: bool
    act: type[nn.Module]
    stride: int


_RELU, _SWISH = nn.ReLU, nn.Hardswish
BLOCKS = (
    Row(3, 16, 16, False, _RELU, 1),
    Row(3, 64, 24, False, _RELU, 2),
    Row(3, 72, 24, False, _RELU, 1),
    Row(5, 72, 40, True, _RELU, 2),
    Row(5, 120, 40, True, _RELU, 1),
    Row(5, 120, 40, True, _RELU, 1),
    Row(3, 240, 80, False, _SWISH, 2),
    Row(3, 200, 80, False, _SWISH, 1),
    Row(3, 184, 80, False, _SWISH, 1),
    Row(3, 184, 80, False, _SWISH, 1),
    Row(3, 480, 112, True, _SWISH, 1),
    Row(3, 672, 112, True, _SWISH, 1),
    Row(5, 672, 160, True, _SWISH, 2),
    Row(5, 960, 160, True, _SWISH, 1),
    Row(5, 960, 160, True, _SWISH, 1),
)
_STEM, _LAST, _HEAD = 16, 960, 1280


def mobilenet_v3_large(
    num_classes: int = 10, *, expand_first: bool = True, dropout: float = 0.2
) -> MobileNetV3Large:
    """MobileNetV3-Large with random weights: [N, 3, H, W] -> [N, num_classes].

    expand_first: block 1 has an expansion convolution of its own (`features.1.block.0`), so that
                  its hidden channels can be pruned, as Liu & Lei (2023) do. Without it the network
                  is torchvision's `mobilenet_v3_large`, and takes its weights.
    dropout:      share of the 1280 features zeroed in training, before the last layer.

    4,215,130 parameters and 218,533,824 MACs on 224x224 for 10 classes. Raises `OptionError` for a
    `num_classes` below 1 or a `dropout` outside [0, 1).
    """
    check_count("num_classes", num_classes)
    if not (isinstance(dropout, (int, float)) and 0 <= dropout < 1):
        raise OptionError(
            f"dropout={dropout!r} is no share in [0, 1)", hint="0.2 is usual, 0 leaves it out"
        )
    return MobileNetV3Large(num_classes, expand_first, dropout)


class MobileNetV3Large(nn.Module):
    """The network of the table above; children are named as torchvision's."""

    def __init__(self, num_classes: int, expand_first: bool, dropout: float):
        super().__init__()
        stem = _layer(3, _STEM, 3, _SWISH, stride=2)
        last = _layer(BLOCKS[-1].outs, _LAST, 1, _SWISH)
        self.features = nn.Sequential(stem, *_blocks(expand_first), last)
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.classifier = nn.Sequential(
            nn.Linear(_LAST, _HEAD),
            nn.Hardswish(),
            nn.Dropout(dropout),
            nn.Linear(_HEAD, num_classes),
        )
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        return self.classifier(self.avgpool(self.features(x)).flatten(1))


def _blocks(expand_first: bool) -> list[nn.Module]:
    widths = [_STEM, *(row.outs for row in BLOCKS)]
    return [
        Bottleneck(ins, row, expand=expand_first or row.hidden != ins)
        for ins, row in zip(widths, BLOCKS, strict=False)
    ]


class Bottleneck(nn.Module):
    """Expansion, depthwise convolution, squeeze-and-excitation, projection; each where it is asked
    for. `block.0` is the expansion, the last of `block` the projection. [N, ins, H, W] -> [N,
    row.outs, ceil(H / row.stride), ceil(W / row.stride)]."""

    def __init__(self, ins: int, row: Row, *, expand: bool):
        super().__init__()
        layers: list[nn.Module] = [_layer(ins, row.hidden, 1, row.act)] if expand else []
        layers += [_layer(row.hidden, row.hidden, row.kernel, row.act, row.stride, row.hidden)]
        layers += [SqueezeExcitation(row.hidden)] if row.squeeze else []
        self.block = nn.Sequential(*layers, _layer(row.hidden, row.outs, 1))
        self.adds = row.stride == 1 and ins == row.outs

    def forward(self, x: Tensor) -> Tensor:
        y = self.block(x)
        return x + y if self.adds else y


class SqueezeExcitation(nn.Module):
    """Scales each channel by a gate in [0, 1] that sees the means of all channels."""

    def __init__(self, channels: int):
        super().__init__()
        self.avgpool = nn.AdaptiveAvgPool2d(1)
        self.fc1 = nn.Conv2d(channels, SQUEEZE.width(channels), 1)
        self.activation = nn.ReLU()
        self.fc2 = nn.Conv2d(SQUEEZE.width(channels), channels, 1)
        self.scale_activation = nn.Hardsigmoid()

    def forward(self, x: Tensor) -> Tensor:
        gate = self.fc2(self.activation(self.fc1(self.avgpool(x))))
        return x * self.scale_activation(gate)


def _layer(
    ins: int,
    outs: int,
    kernel: int,
    act: type[nn.Module] | None = None,
    stride: int = 1,
    groups: int = 1,
) -> nn.Sequential:
    """Convolution, normalisation and, where there is one, the activation."""
    conv = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, groups=groups, bias=False)
    norm = nn.BatchNorm2d(outs, eps=0.001, momentum=0.01)
    return nn.Sequential(conv, norm, *([act()] if act else []))
