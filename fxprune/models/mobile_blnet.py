"""Mobile_BLNet: Big-Little modules of inverted residuals (Yuan et al. 2023), a reconstruction.

    part                         for 224x224 images      for 32x32 images
    stem    3x3 convolution      3 -> 32, s2             3 -> 16, s1
    pre.0   inverted residual    32 -> 16, t1, s1        16 -> 12, t1, s1
    pre.1   inverted residual    16 -> 24, t6, s2        -
    bl1     Big-Little           24 -> 40, n3, s2        12 -> 16, n3, s2
    bl2     Big-Little           40 -> 80, n4, s2        16 -> 32, n3, s2
    bl3     Big-Little           80 -> 112, n3, s1       32 -> 48, n3, s1
    tail.0  inverted residual    112 -> 160, t6, s2      48 -> 96, t6, s2
    tail.1  inverted residual    160 -> 160, t6, s1      -
    head    1x1 convolution      160 -> 1280             96 -> 1280
    mean, classifier             1280 -> classes         1280 -> classes

(s: stride, t: hidden channels in multiples of the input's, n: blocks of a module.) Big-Little
modules have alpha = 2, beta = 4 and t6. Stem and head, like all but projections, have ReLU6.

The paper states what the network is made of: Big-Little Net's modules (Chen et al. 2019), depthwise
separable convolutions and inverted residuals, with a balance of computation between the branches.
It also states the sizes of the pruned networks: 0.1 M parameters and 9.6 M MACs on CIFAR-10, 0.3 M
and 12.7 M on CIFAR-100, 1.0 M and 203.0 M on Food-101, 2.1 M and 249.6 M on ImageNet. (It calls
them FLOPs; the networks it compares with are listed with their MACs.)

The table above, and so the networks before pruning, are chosen here: no table of layers was to be
had. One network an image size, whose hidden channels and head are pruned by shares that differ by
kind only, comes to all four sizes. It reproduces the paper's sizes, not its design.
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor, nn

from ..check import check_count
from ..errors import OptionError
from .big_little import BigLittle, InvertedResidual, conv_bn_relu6
from .initial import initialise

_HEAD = 1280


@dataclass(frozen=True)
class Layout:
    """A column of the table. ``pre`` and ``tail`` list (outs, expand, stride), ``modules`` lists
    (outs, n, stride)."""

    stem: tuple[int, int]
    pre: tuple[tuple[int, int, int], ...]
    modules: tuple[tuple[int, int, int], ...]
    tail: tuple[tuple[int, int, int], ...]


LAYOUTS = {
    32: Layout(
        stem=(16, 1),
        pre=((12, 1, 1),),
        modules=((16, 3, 2), (32, 3, 2), (48, 3, 1)),
        tail=((96, 6, 2),),
    ),
    224: Layout(
        stem=(32, 2),
        pre=((16, 1, 1), (24, 6, 2)),
        modules=((40, 3, 2), (80, 4, 2), (112, 3, 1)),
        tail=((160, 6, 2), (160, 6, 1)),
    ),
}


def mobile_blnet(num_classes: int = 10, *, image_size: int = 32) -> MobileBLNet:
    """Mobile_BLNet with random weights: [N, 3, image_size, image_size] -> [N, num_classes].

    image_size: 32 (CIFAR) or 224 (Food-101, ImageNet); each has layers of its own.

    334,770 parameters and 19,560,960 MACs for 32x32 and 10 classes; 2,875,424 and 360,918,048 for
    224x224 and 1000. Raises `OptionError` for other image sizes, or `num_classes` below 1.
    """
    check_count("num_classes", num_classes)
    if image_size not in tuple(LAYOUTS):
        raise OptionError(
            f"Mobile_BLNet has no layers for image_size={image_size!r}",
            details=[("known", ", ".join(map(str, LAYOUTS)))],
            hint="image_size chooses the layers; images of another size can be fed to either",
        )
    return MobileBLNet(LAYOUTS[image_size], num_classes)


class MobileBLNet(nn.Module):
    """The network of one layout. Height and width must stay even up to `bl3`: multiples of 8 for
    the layout of 32, of 32 for that of 224."""

    def __init__(self, layout: Layout, num_classes: int):
        super().__init__()
        width, stride = layout.stem
        bl1, bl2, bl3 = layout.modules
        self.stem = conv_bn_relu6(3, width, 3, stride)
        self.pre = _residuals(width, layout.pre)
        self.bl1 = BigLittle(layout.pre[-1][0], *bl1)
        self.bl2 = BigLittle(bl1[0], *bl2)
        self.bl3 = BigLittle(bl2[0], *bl3)
        self.tail = _residuals(bl3[0], layout.tail)
        self.head = conv_bn_relu6(layout.tail[-1][0], _HEAD)
        self.classifier = nn.Linear(_HEAD, num_classes)
        initialise(self)

    def forward(self, x: Tensor) -> Tensor:
        x = self.pre(self.stem(x))
        x = self.bl3(self.bl2(self.bl1(x)))
        x = self.head(self.tail(x))
        return self.classifier(x.mean((2, 3)))


def _residuals(ins: int, rows: tuple[tuple[int, int, int], ...]) -> nn.Sequential:
    widths = [ins, *(outs for outs, _, _ in rows)]
    return nn.Sequential(*(InvertedResidual(i, *row) for i, row in zip(widths, rows, strict=False)))
