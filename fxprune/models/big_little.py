"""The Big-Little module (Chen et al. 2019), built of inverted residuals (Sandler et al. 2018).

A module of n blocks splits them between two branches that see the same input:

    big     n - 1 blocks of the full width at half the resolution
    little  max(1, n // beta - 1) blocks of outs // alpha channels at the full resolution, and a
            1x1 convolution to the full width
    fusion  one block over big (every pixel doubled in both directions) + little, with the stride
            of the whole module

The branches and alpha, beta, n are Chen et al.'s. Yuan et al. (2023) put depthwise separable
convolutions and inverted residuals in place of their bottlenecks; how exactly is not stated in what
could be read of that paper. So the blocks, and that the sum enters fusion without a ReLU (a
projection is linear in Sandler et al.), are a reconstruction.
"""

from __future__ import annotations

from collections import OrderedDict

from torch import Tensor, nn

from ..check import check_count
from ..errors import OptionError


class BigLittle(nn.Module):
    """[N, ins, H, W] -> [N, outs, ceil(H/stride), ceil(W/stride)], for even H and W.

    n:      blocks on the longer path, at least 2: n - 1 in `big` and one in `fusion`.
    stride: of the fusion block.
    alpha:  how many times narrower `little` is.
    beta:   how many times shorter `little` is.
    expand: hidden channels of every block, in multiples of its input channels.

    Children: `big`, `little` (blocks), `widen` (little's 1x1 convolution), `up`, `fusion`. Raises
    `OptionError` for a count below 1, an n below 2, an alpha above `outs`.
    """

    def __init__(
        self,
        ins: int,
        outs: int,
        n: int,
        stride: int = 1,
        *,
        alpha: int = 2,
        beta: int = 4,
        expand: int = 6,
    ):
        super().__init__()
        _check(outs, n, alpha, beta)
        narrow, short = outs // alpha, max(1, n // beta - 1)
        self.big = _branch(ins, outs, n - 1, 2, expand)
        self.little = _branch(ins, narrow, short, 1, expand)
        self.widen = conv_bn(narrow, outs)
        self.up = nn.Upsample(scale_factor=2)
        self.fusion = InvertedResidual(outs, outs, expand, stride)

    def forward(self, x: Tensor) -> Tensor:
        return self.fusion(self.up(self.big(x)) + self.widen(self.little(x)))


def _check(outs: int, n: int, alpha: int, beta: int) -> None:
    for name, value in (("outs", outs), ("n", n), ("alpha", alpha), ("beta", beta)):
        check_count(name, value)
    if n < 2:
        raise OptionError(f"n={n} leaves the big branch empty", hint="n=2 or more")
    if alpha > outs:
        raise OptionError(
            f"alpha={alpha} leaves the little branch no channel of {outs}",
            hint=f"alpha={outs} or less",
        )


def _branch(ins: int, outs: int, blocks: int, stride: int, expand: int) -> nn.Sequential:
    first = InvertedResidual(ins, outs, expand, stride)
    return nn.Sequential(first, *(InvertedResidual(outs, outs, expand) for _ in range(blocks - 1)))


class InvertedResidual(nn.Module):
    """[N, ins, H, W] -> [N, outs, ceil(H/stride), ceil(W/stride)]: 1x1 convolution to expand * ins
    channels, 3x3 depthwise, 1x1 to `outs` without an activation; the input added where its shape is
    the output's.

    Children `expand` (an identity for expand=1), `depthwise` and `project`, each of `conv`, `bn`
    and, but for `project`, `act`.
    """

    def __init__(self, ins: int, outs: int, expand: int = 6, stride: int = 1):
        super().__init__()
        hidden = expand * ins
        self.expand = nn.Identity() if expand == 1 else conv_bn_relu6(ins, hidden)
        self.depthwise = conv_bn_relu6(hidden, hidden, 3, stride, groups=hidden)
        self.project = conv_bn(hidden, outs)
        self.adds = stride == 1 and ins == outs

    def forward(self, x: Tensor) -> Tensor:
        y = self.project(self.depthwise(self.expand(x)))
        return x + y if self.adds else y


def conv_bn(
    ins: int, outs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """Children `conv` (no bias, the image size kept but for the stride) and `bn`."""
    conv = nn.Conv2d(ins, outs, kernel, stride, kernel // 2, groups=groups, bias=False)
    return nn.Sequential(OrderedDict(conv=conv, bn=nn.BatchNorm2d(outs)))


def conv_bn_relu6(
    ins: int, outs: int, kernel: int = 1, stride: int = 1, groups: int = 1
) -> nn.Sequential:
    """`conv_bn` with a third child `act`."""
    layers = conv_bn(ins, outs, kernel, stride, groups)
    layers.add_module("act", nn.ReLU6())
    return layers
