"""Random small networks: one class a structure, drawn by hypothesis or from a seed.

A network is a stem, a list of blocks and a head, all given by name, and a seed for every number in
them. `networks()` is the hypothesis strategy (it shrinks the list of blocks); `random_network`
draws the same kind of network from a seed alone. Everything is float64, a few dozen channels wide
at most, on pictures of 8x8. Statistics and affine parameters of norms are random, so that none
is an identity by luck.
"""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn.utils import parametrizations

BLOCKS: dict[str, type[Block]] = {}
HEADS: dict[str, type[Head]] = {}
SIDE = 8
BATCH = 2
CLASSES = 5
WIDEST = 32

Dice = random.Random

# The fused encoder layer would pass by the layers inside it, which the laws replace.
torch.backends.mha.set_fastpath_enabled(False)


def width(dice: Dice) -> int:
    """A width with many divisors."""
    return dice.choice((8, 12, 16, 24))


def any_width(dice: Dice) -> int:
    """Any small width."""
    return dice.randint(5, 14)


def conv(i: int, o: int, k: int = 3, **options) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def conv_bn(i: int, o: int, k: int = 3, **options) -> nn.Sequential:
    return nn.Sequential(conv(i, o, k, bias=False, **options), nn.BatchNorm2d(o))


def conv_bn_act(i: int, o: int, k: int = 3, **options) -> nn.Sequential:
    return nn.Sequential(*conv_bn(i, o, k, **options), nn.ReLU())


class Block(nn.Module):
    """One structure. It takes `c` channels on `side` x `side` pixels and gives ``self.out`` of them
    on ``self.side`` a side. ``mixes`` says what takes statistics over channels: "norms" (layers),
    "weights" (of a weight, while running) or "all" (other ops)."""

    mixes = ""

    def __init_subclass__(cls) -> None:
        BLOCKS[cls.__name__] = cls

    def __init__(self, dice: Dice, c: int, side: int):
        super().__init__()
        self.out, self.side = c, side
        self.make(dice, c, side)

    def make(self, dice: Dice, c: int, side: int) -> None:
        raise NotImplementedError


# -- plain layers ----------------------------------------------------------------------------------


class Plain(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv = conv(c, self.out, dice.choice((1, 3)), bias=dice.random() < 0.3)
        self.bn = nn.BatchNorm2d(self.out)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class Activation(Block):
    """Activations with f(0) != 0 among them: a masked channel is no zero behind them."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv = conv(c, self.out)
        kinds = (
            nn.GELU,
            nn.SiLU,
            nn.Sigmoid,
            nn.Tanh,
            nn.Hardswish,
            nn.Softplus,
            nn.ELU,
            nn.Hardsigmoid,
        )
        self.act = dice.choice(kinds)()

    def forward(self, x):
        return self.act(self.conv(x))


class OneChannel(Block):
    """A layer with a single output channel, and one that reads it."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.narrow, self.wide = conv(c, 1), conv(1, self.out)

    def forward(self, x):
        return self.wide(torch.tanh(self.narrow(x)))


class Downsample(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.side = side // 2 if side > 4 else side
        self.conv = conv(c, self.out, stride=side // self.side)
        self.pool = dice.choice((nn.MaxPool2d(3, 1, 1), nn.AvgPool2d(3, 1, 1), nn.Identity()))
        self.drop = nn.Dropout2d(0.2)

    def forward(self, x):
        return self.drop(self.pool(F.silu(self.conv(x))))


class Prelu(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv = conv(c, self.out)
        self.act = nn.PReLU(dice.choice((1, self.out)))

    def forward(self, x):
        return self.act(self.conv(x))


class InPlace(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.b = conv(c, self.out), conv(c, self.out, 1)

    def forward(self, x):
        h = self.a(x)
        h.add_(self.b(x)).mul_(0.5)
        h += 0.25 * h
        h = h * torch.sigmoid_(self.b(x))
        return F.leaky_relu_(h, 0.1)


class Transposed(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv = nn.ConvTranspose2d(c, self.out, 3, padding=1)
        self.bn = nn.BatchNorm2d(self.out)

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)))


class TransposedGroups(Block):
    def make(self, dice, c, side):
        wide, self.out = width(dice), width(dice)
        self.pre = conv_bn_act(c, wide, 1)
        self.down = nn.MaxPool2d(2)
        self.conv = nn.ConvTranspose2d(wide, self.out, 2, stride=2, groups=dice.choice((2, 4)))

    def forward(self, x):
        return F.elu(self.conv(self.down(self.pre(x))))


class Conv1d(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv, self.bn = nn.Conv1d(c, self.out, 3, padding=1), nn.BatchNorm1d(self.out)

    def forward(self, x):
        n, _, h, w = x.shape
        y = F.relu(self.bn(self.conv(x.flatten(2))))
        return y.view(n, -1, h, w)


class Conv3d(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv = nn.Conv3d(c, self.out, (1, 3, 3), padding=(0, 1, 1))
        self.bn = nn.BatchNorm3d(self.out)

    def forward(self, x):
        return F.relu(self.bn(self.conv(x.unsqueeze(2)))).squeeze(2)


class Functional(Block):
    """Weights that are the block's own parameters."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.w = nn.Parameter(torch.randn(self.out, c, 3, 3) / (3 * c**0.5))
        self.b = nn.Parameter(torch.randn(self.out))

    def forward(self, x):
        return F.relu(F.conv2d(x, self.w, self.b, padding=1))


class Einsum(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.w = nn.Parameter(torch.randn(self.out, c) / c**0.5)

    def forward(self, x):
        return torch.einsum("nchw,oc->nohw", x, self.w).relu()


class Matmul(Block):
    """A 1x1 convolution as a matrix product."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.w = nn.Parameter(torch.randn(self.out, c) / c**0.5)

    def forward(self, x):
        n, c, h, w = x.shape
        return torch.matmul(self.w, x.reshape(n, c, h * w)).reshape(n, -1, h, w).tanh()


class LinearNHWC(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.b = nn.Linear(c, 2 * self.out), nn.Linear(2 * self.out, self.out)

    def forward(self, x):
        y = x.permute(0, 2, 3, 1)
        return self.b(F.gelu(self.a(y))).permute(0, 3, 1, 2).contiguous()


class UnfoldConv(Block):
    """A convolution as im2col and a product."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv = conv(c, self.out, bias=False)

    def forward(self, x):
        n, _, h, w = x.shape
        columns = F.unfold(x, 3, padding=1)
        return (self.conv.weight.flatten(1) @ columns).view(n, -1, h, w)


class TokenMixer(Block):
    """A Linear over pixels leaves channels alone."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv = conv(c, self.out, 1)
        self.mix = nn.Linear(side * side, side * side)

    def forward(self, x):
        y = self.conv(x)
        return y + self.mix(y.flatten(2)).view_as(y)


# -- residual and shared ---------------------------------------------------------------------------


class Residual(Block):
    def make(self, dice, c, side):
        middle = any_width(dice)
        self.a, self.b = conv_bn_act(c, middle), conv_bn(middle, c)

    def forward(self, x):
        return F.relu(x + self.b(self.a(x)))


class Bottleneck(Block):
    def make(self, dice, c, side):
        middle, self.out = any_width(dice), any_width(dice)
        self.side = side // 2 if side > 4 and dice.random() < 0.5 else side
        stride = side // self.side
        self.body = nn.Sequential(
            conv_bn_act(c, middle, 1),
            conv_bn_act(middle, middle, stride=stride),
            conv_bn(middle, self.out, 1),
        )
        self.short = conv_bn(c, self.out, 1, stride=stride)

    def forward(self, x):
        y = self.body(x)
        y += self.short(x)
        return F.relu(y, inplace=True)


class Shared(Block):
    """One module, used twice on different values."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.b, self.shared = (
            conv(c, self.out),
            conv(c, self.out, 1),
            conv(self.out, self.out),
        )

    def forward(self, x):
        return self.shared(torch.relu(self.a(x))) + self.shared(torch.tanh(self.b(x)))


class Looped(Block):
    """One convolution applied again and again."""

    def make(self, dice, c, side):
        self.conv, self.bn, self.times = conv(c, c), nn.BatchNorm2d(c), dice.randint(2, 3)

    def forward(self, x):
        for _ in range(self.times):
            x = F.relu(self.bn(self.conv(x)))
        return x


class Tied(Block):
    """Two convolutions, one Parameter."""

    def make(self, dice, c, side):
        middle, self.out = any_width(dice), any_width(dice)
        self.a, self.b = conv(c, middle, 1), conv(c, middle, 1)
        self.c, self.d = conv(middle, self.out), conv(middle, self.out)
        self.d.weight = self.c.weight

    def forward(self, x):
        return self.c(F.relu(self.a(x))) * torch.sigmoid(self.d(F.relu(self.b(x))))


class AutoEncoder(Block):
    """A weight and its transpose."""

    def make(self, dice, c, side):
        self.conv = conv(c, any_width(dice), 1, bias=False)

    def forward(self, x):
        code = torch.tanh(self.conv(x))
        return F.conv_transpose2d(code, self.conv.weight)


# -- groups ----------------------------------------------------------------------------------------


class Depthwise(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.dw, self.pw = conv_bn_act(c, c, groups=c), conv_bn_act(c, self.out, 1)

    def forward(self, x):
        return self.pw(self.dw(x))


class Multiplier(Block):
    def make(self, dice, c, side):
        times = dice.choice((2, 3))
        self.out = any_width(dice)
        self.pre, self.dw = conv_bn_act(c, 6, 1), conv_bn_act(6, 6 * times, groups=6)
        self.pw = conv(6 * times, self.out, 1) if dice.random() < 0.7 else nn.Identity()
        if isinstance(self.pw, nn.Identity):
            self.out = 6 * times

    def forward(self, x):
        return self.pw(self.dw(self.pre(x)))


class InvertedResidual(Block):
    def make(self, dice, c, side):
        wide = 2 * c
        self.body = nn.Sequential(
            conv_bn_act(c, wide, 1), conv_bn_act(wide, wide, groups=wide), conv_bn(wide, c, 1)
        )

    def forward(self, x):
        return x + self.body(x)


class Grouped(Block):
    def make(self, dice, c, side):
        wide, self.out = width(dice), width(dice)
        self.pre = conv_bn_act(c, wide, 1)
        self.conv = conv_bn_act(wide, self.out, groups=dice.choice((2, 4)))

    def forward(self, x):
        return self.conv(self.pre(x))


class GroupedRow(Block):
    """Group convolutions with different group counts, one after another."""

    def make(self, dice, c, side):
        self.pre = conv_bn_act(c, 24, 1)
        groups = dice.sample((2, 3, 4, 6, 8), dice.randint(2, 3))
        self.row = nn.Sequential(*(conv_bn_act(24, 24, groups=g) for g in groups))
        self.out = 24

    def forward(self, x):
        return self.row(self.pre(x))


class GroupedResidual(Block):
    """ResNeXt: a group convolution between pointwise ones, beside a shortcut."""

    def make(self, dice, c, side):
        wide, groups = width(dice), dice.choice((2, 4))
        self.body = nn.Sequential(
            conv_bn_act(c, wide, 1), conv_bn_act(wide, wide, groups=groups), conv_bn(wide, c, 1)
        )

    def forward(self, x):
        return F.relu(x + self.body(x))


class Straddle(Block):
    """A grouped convolution whose block reaches over the seam of a cat."""

    def make(self, dice, c, side):
        self.out = 12
        self.a, self.b = conv(c, 5), conv(c, 7, 1)
        self.conv = conv(12, 12, groups=dice.choice((2, 3)))

    def forward(self, x):
        return self.conv(torch.relu(torch.cat([self.a(x), self.b(x)], 1)))


class ShuffleView(Block):
    def make(self, dice, c, side):
        self.out, self.groups = width(dice), dice.choice((2, 4))
        self.pre = conv_bn_act(c, self.out, 1, groups=1)
        self.post = conv_bn_act(self.out, self.out, groups=dice.choice((1, 2, 4)))

    def forward(self, x):
        x = self.pre(x)
        n, c, h, w = x.shape
        x = x.view(n, self.groups, c // self.groups, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.post(x)


class ShuffleLiteral(Block):
    def make(self, dice, c, side):
        self.out = 12
        self.pre, self.post = conv_bn_act(c, 12, groups=1), conv(12, 12, groups=3)

    def forward(self, x):
        x = self.pre(x)
        x = x.reshape(-1, 3, 4, self.side, self.side).permute(0, 2, 1, 3, 4)
        return self.post(x.contiguous().view(-1, 12, self.side, self.side))


class ShuffleModule(Block):
    def make(self, dice, c, side):
        self.out, groups = width(dice), dice.choice((2, 4))
        self.a, self.b = conv_bn_act(c, self.out, 1), conv_bn_act(self.out, self.out, groups=groups)
        self.shuffle = nn.ChannelShuffle(groups)

    def forward(self, x):
        return self.shuffle(self.b(self.shuffle(self.a(x))))


class ShuffleUnits(Block):
    """ShuffleNetV2: chunk, one half through a branch, cat, shuffle; several in a row."""

    def make(self, dice, c, side):
        self.out = width(dice)
        half = self.out // 2
        self.pre = conv_bn_act(c, self.out, 1)
        self.branches = nn.ModuleList(
            nn.Sequential(
                conv_bn_act(half, half, 1),
                conv_bn(half, half, groups=half),
                conv_bn_act(half, half, 1),
            )
            for _ in range(dice.randint(1, 3))
        )

    def forward(self, x):
        x = self.pre(x)
        for branch in self.branches:
            a, b = x.chunk(2, dim=1)
            x = self.shuffled(torch.cat((a, branch(b)), dim=1))
        return x

    def shuffled(self, x):
        n, c, h, w = x.shape
        return x.view(n, 2, c // 2, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


# -- joining and cutting ---------------------------------------------------------------------------


class Cat(Block):
    def make(self, dice, c, side):
        sizes = [any_width(dice) for _ in range(dice.randint(2, 3))]
        self.branches = nn.ModuleList(conv_bn_act(c, n) for n in sizes)
        self.out = sum(sizes)

    def forward(self, x):
        return torch.cat([branch(x) for branch in self.branches], 1)


class NestedCat(Block):
    def make(self, dice, c, side):
        self.a, self.b = conv(c, 5), conv(c, 4, 1)
        self.out = 2 * 5 + 4 + c

    def forward(self, x):
        a = self.a(x).relu()
        return torch.cat([a, torch.cat([x, a], 1), self.b(x)], 1)


class SelfCat(Block):
    def make(self, dice, c, side):
        self.a = conv_bn_act(c, dice.randint(4, 8))
        self.out = 2 * self.a[0].out_channels

    def forward(self, x):
        y = self.a(x)
        return torch.cat([y, y], 1)


class Inception(Block):
    def make(self, dice, c, side):
        self.a, self.b = (
            conv_bn_act(c, 4, 1),
            nn.Sequential(conv_bn_act(c, 6, 1), conv_bn_act(6, 5)),
        )
        self.pool, self.c = nn.AvgPool2d(3, 1, 1), conv_bn_act(c, 3, 1)
        self.out = 12

    def forward(self, x):
        return torch.cat((self.a(x), self.b(x), self.c(self.pool(x))), dim=-3)


class Dense(Block):
    """DenseNet: every layer reads all before it."""

    def make(self, dice, c, side):
        self.pre = conv(c, 6, 1)
        self.norms = nn.ModuleList(nn.BatchNorm2d(6 + 4 * i) for i in range(3))
        self.convs = nn.ModuleList(conv(6 + 4 * i, 4) for i in range(3))
        self.out = 18

    def forward(self, x):
        found = [self.pre(x)]
        for norm, layer in zip(self.norms, self.convs, strict=True):
            found.append(layer(F.relu(norm(torch.cat(found, 1)))))
        return torch.cat(found, 1)


class UnevenSplit(Block):
    def make(self, dice, c, side):
        cut = dice.randint(3, 6)
        self.sizes, self.out = [cut, 10 - cut], any_width(dice)
        self.pre = conv_bn_act(c, 10)
        self.a, self.b = conv(cut, self.out), conv(10 - cut, self.out, 1)

    def forward(self, x):
        a, b = torch.split(self.pre(x), self.sizes, dim=1)
        return self.a(a) + self.b(b)


class EvenSplit(Block):
    """Pieces of one size, and what is over."""

    def make(self, dice, c, side):
        self.pre, self.a = conv_bn_act(c, 11), conv(4, 6)
        self.out = 6 + 7

    def forward(self, x):
        a, b, rest = self.pre(x).split(4, 1)
        return torch.cat([self.a(a), b, rest], 1)


class Narrowed(Block):
    def make(self, dice, c, side):
        self.pre, self.a, self.b = conv_bn_act(c, 9), conv(4, 6, 1), conv(3, 6, 1)
        self.out = 6

    def forward(self, x):
        y = self.pre(x)
        return self.a(y.narrow(1, 2, 4)) + self.b(torch.narrow(y, 1, 5, 3)) + y[:, :1]


class Tensorsplit(Block):
    def make(self, dice, c, side):
        self.pre, self.out = conv_bn_act(c, 10), 10
        self.a = conv(4, 4)

    def forward(self, x):
        a, b, c = torch.tensor_split(self.pre(x), 3, dim=1)
        return torch.cat([c, self.a(a).tanh(), b], 1)


class ChunkGate(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a = conv(c, 2 * self.out)

    def forward(self, x):
        p, q = self.a(x).chunk(2, 1)
        return p * torch.sigmoid(q)


class Glu(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.module = conv_bn(c, 2 * self.out), dice.random() < 0.5
        self.glu = nn.GLU(1)

    def forward(self, x):
        return self.glu(self.a(x)) if self.module else F.glu(self.a(x), dim=1)


class StridedSlice(Block):
    def make(self, dice, c, side):
        self.pre, self.out = conv_bn_act(c, 9), 7
        self.a, self.b = conv(5, 7), conv(4, 7, 1)

    def forward(self, x):
        y = self.pre(x)
        return self.a(y[:, ::2]) + self.b(y[:, 1::2, :, :])


class PartialConv(Block):
    """FasterNet: a convolution over the first channels, the others pass."""

    def make(self, dice, c, side):
        self.pre, self.out, self.part = conv_bn_act(c, 12, 1), 12, dice.choice((3, 4, 6))
        self.conv = conv(self.part, self.part, bias=False)

    def forward(self, x):
        x = self.pre(x)
        return torch.cat((self.conv(x[:, : self.part]), x[:, self.part :]), 1)


class PartialAssign(Block):
    """The same, written into a copy."""

    def make(self, dice, c, side):
        self.pre, self.out = conv_bn_act(c, 8, 1), 8
        self.conv = conv(3, 3)

    def forward(self, x):
        x = self.pre(x)
        y = x.clone()
        y[:, :3] = self.conv(x[:, :3])
        return y


class Res2Net(Block):
    def make(self, dice, c, side):
        self.n = dice.choice((3, 4))
        each = dice.randint(3, 5)
        self.out, self.each = any_width(dice), each
        self.pre, self.post = conv_bn_act(c, self.n * each, 1), conv_bn(self.n * each, self.out, 1)
        self.convs = nn.ModuleList(conv_bn_act(each, each) for _ in range(self.n - 1))

    def forward(self, x):
        pieces = torch.split(self.pre(x), self.each, 1)
        made, last = [pieces[0]], None
        for piece, layer in zip(pieces[1:], self.convs, strict=True):
            last = layer(piece if last is None else piece + last)
            made.append(last)
        return self.post(torch.cat(made, 1))


class C2f(Block):
    """A list that grows from the chunks of one convolution."""

    def make(self, dice, c, side):
        half, self.out = dice.randint(4, 6), any_width(dice)
        count = dice.randint(1, 2)
        self.pre = conv_bn_act(c, 2 * half, 1)
        self.inner = nn.ModuleList(
            nn.Sequential(conv_bn_act(half, 5), conv_bn_act(5, half)) for _ in range(count)
        )
        self.post = conv_bn_act((2 + count) * half, self.out, 1)
        self.add = dice.random() < 0.5

    def forward(self, x):
        y = list(self.pre(x).chunk(2, 1))
        for layer in self.inner:
            y.append(y[-1] + layer(y[-1]) if self.add else layer(y[-1]))
        return self.post(torch.cat(y, 1))


class Ghost(Block):
    """Primary features beside cheap depthwise ones, cut to size."""

    def make(self, dice, c, side):
        self.out = dice.choice((9, 10))
        self.primary, self.cheap = conv_bn_act(c, 5, 1), conv_bn_act(5, 5, groups=5)

    def forward(self, x):
        a = self.primary(x)
        return torch.cat([a, self.cheap(a)], dim=1)[:, : self.out, :, :]


class PadChannels(Block):
    """The ResNet shortcut of option A: fewer pixels, more channels, zeros for the new ones."""

    def make(self, dice, c, side):
        self.side = side // 2 if side > 4 else side
        self.stride = side // self.side
        self.front, self.back = dice.randint(1, 3), dice.randint(0, 4)
        self.out = c + self.front + self.back
        self.body = nn.Sequential(conv_bn_act(c, 7, stride=self.stride), conv_bn(7, self.out))

    def forward(self, x):
        short = F.pad(x[:, :, :: self.stride, :: self.stride], (0, 0, 0, 0, self.front, self.back))
        return F.relu(short + self.body(x))


class ZerosCat(Block):
    """Zero channels by cat with a tensor of zeros."""

    def make(self, dice, c, side):
        self.more = dice.randint(1, 4)
        self.out = c + self.more
        self.body = conv_bn(c, self.out)

    def forward(self, x):
        n, _, h, w = x.shape
        return F.relu(torch.cat([x, x.new_zeros(n, self.more, h, w)], 1) + self.body(x))


class Focus(Block):
    def make(self, dice, c, side):
        self.out, self.up = any_width(dice), side <= 4
        self.conv = conv_bn_act(4 * c, self.out)
        self.side = side if self.up else side // 2

    def forward(self, x):
        parts = [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]]
        y = self.conv(torch.cat(parts, 1))
        return F.interpolate(y, scale_factor=2) if self.up else y


class UnbindStack(Block):
    """Dims taken apart and put together again."""

    def make(self, dice, c, side):
        self.out = 2 * dice.randint(3, 6)
        self.a, self.b = conv_bn_act(c, self.out), conv(self.out, self.out)

    def forward(self, x):
        y = self.a(x)
        n, c, h, w = y.shape
        p, q = y.view(n, 2, c // 2, h, w).unbind(1)
        y = torch.stack([q, p], 1).flatten(1, 2)
        rows = torch.stack(self.b(y).unbind(2), 2)
        return rows + y


class StackBranches(Block):
    """Branches stacked and joined by learned weights (selective kernels)."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.branches = nn.ModuleList([conv_bn_act(c, self.out), conv_bn_act(c, self.out, 1)])
        self.squeeze, self.gate = conv(self.out, 6, 1), conv(6, 2 * self.out, 1)

    def forward(self, x):
        found = torch.stack([branch(x) for branch in self.branches], dim=1)
        pooled = found.sum(1).mean((2, 3), keepdim=True)
        gate = self.gate(F.relu(self.squeeze(pooled)))
        gate = gate.view(gate.shape[0], 2, -1, 1, 1).softmax(1)
        return (found * gate).sum(1)


class Maxout(Block):
    def make(self, dice, c, side):
        self.out, self.inner = any_width(dice), dice.random() < 0.5
        self.conv = conv(c, 2 * self.out)

    def forward(self, x):
        y = self.conv(x)
        n, c, h, w = y.shape
        if self.inner:
            return y.view(n, c // 2, 2, h, w).max(2)[0]
        return y.view(n, 2, c // 2, h, w).amax(1)


# -- index maps ------------------------------------------------------------------------------------


class Flip(Block):
    def make(self, dice, c, side):
        self.pre, self.post = conv_bn_act(c, 7), conv(7, 8)
        self.out = 8

    def forward(self, x):
        return self.post(torch.flip(self.pre(x), (1,)))


class Roll(Block):
    def make(self, dice, c, side):
        self.pre, self.post, self.by = conv_bn_act(c, 7), conv(7, 8), dice.randint(-3, 8)
        self.out = 8

    def forward(self, x):
        return self.post(torch.roll(self.pre(x), shifts=(self.by, 1), dims=(1, 2)))


class IndexSelect(Block):
    def make(self, dice, c, side):
        self.pre, self.post = conv_bn_act(c, 8), conv(6, 9, 1)
        self.register_buffer("idx", torch.tensor(dice.choices(range(8), k=6)))
        self.out = 9

    def forward(self, x):
        return self.post(torch.index_select(self.pre(x), 1, self.idx))


class IndexBuffer(Block):
    def make(self, dice, c, side):
        self.pre, self.post = conv_bn_act(c, 8), conv_bn(8, 8, groups=dice.choice((1, 2)))
        self.register_buffer(
            "idx", torch.tensor(dice.sample(range(8), 8)), persistent=dice.random() < 0.5
        )
        self.out = 8

    def forward(self, x):
        return self.post(self.pre(x)[:, self.idx])


class Repeat(Block):
    def make(self, dice, c, side):
        self.pre, self.out = conv_bn_act(c, 5), 7
        self.post = conv(10, 7)

    def forward(self, x):
        return self.post(self.pre(x).repeat(1, 2, 1, 1))


class RepeatInterleave(Block):
    def make(self, dice, c, side):
        self.pre, self.out = conv_bn_act(c, 5), 7
        self.body, self.post = conv(c, 10), conv(10, 7)

    def forward(self, x):
        return self.post(torch.repeat_interleave(self.pre(x), 2, dim=1) + self.body(x))


class LiteralView(Block):
    """Sizes written as numbers."""

    mixes = "all"  # the Linear's outputs are pixels that can go, over which a later mean runs

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.pre, self.fc = conv_bn_act(c, self.out, 1), nn.Linear(side * side, side * side)
        self.shape = (-1, self.out, side * side)
        self.back = (BATCH, self.out, side, side)

    def forward(self, x):
        y = self.pre(x).view(self.shape)
        return torch.relu(self.fc(y)).reshape(*self.back)


class PixelShuffle(Block):
    def make(self, dice, c, side):
        self.out = dice.randint(3, 6)
        self.pre, self.pool = conv(c, 4 * self.out), nn.AvgPool2d(2)
        self.shuffle, self.module = nn.PixelShuffle(2), dice.random() < 0.5

    def forward(self, x):
        y = self.pre(x)
        return torch.relu(self.pool(self.shuffle(y) if self.module else F.pixel_shuffle(y, 2)))


class PixelUnshuffle(Block):
    def make(self, dice, c, side):
        self.out = 7
        self.pre, self.post = conv_bn_act(c, 5, 1), conv_bn_act(20, 7)
        self.shuffle = nn.PixelUnshuffle(2)

    def forward(self, x):
        return F.interpolate(self.post(self.shuffle(self.pre(x))), scale_factor=2, mode="nearest")


class DepthToSpace(Block):
    """pixel_shuffle written with views."""

    def make(self, dice, c, side):
        self.out = dice.randint(3, 6)
        self.pre, self.pool = conv(c, 4 * self.out), nn.MaxPool2d(2)

    def forward(self, x):
        y = self.pre(x)
        n, c, h, w = y.shape
        y = (
            y.reshape(n, c // 4, 2, 2, h, w)
            .permute(0, 1, 4, 2, 5, 3)
            .reshape(n, c // 4, 2 * h, 2 * w)
        )
        return self.pool(y)


class Decoder(Block):
    """Linear outputs seen as a picture."""

    def make(self, dice, c, side):
        self.seen, self.out, half = dice.randint(4, 6), any_width(dice), side // 2
        self.fc = nn.Linear(c, self.seen * half * half)
        self.conv, self.half = conv_bn_act(self.seen, self.out), half

    def forward(self, x):
        y = F.relu(self.fc(x.mean((2, 3)))).view(-1, self.seen, self.half, self.half)
        return F.interpolate(self.conv(y), scale_factor=2, mode="bilinear", align_corners=False)


class Windows(Block):
    """Pictures cut to windows and put together again, channels last."""

    mixes = "all"  # as in LiteralView

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.b = nn.Linear(c, self.out), nn.Linear(16, 16)

    def forward(self, x):
        n, _, h, w = x.shape
        y = self.a(x.permute(0, 2, 3, 1))
        c = y.shape[-1]
        y = y.view(n, h // 4, 4, w // 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(-1, 16, c)
        y = self.b(y.transpose(1, 2)).transpose(1, 2)
        y = y.reshape(n, h // 4, w // 4, 4, 4, c).permute(0, 1, 3, 2, 4, 5).reshape(n, h, w, c)
        return y.permute(0, 3, 1, 2)


# -- several resolutions ---------------------------------------------------------------------------


class HighResolution(Block):
    """HRNet: two branches, each added to the other."""

    def make(self, dice, c, side):
        self.out, low = any_width(dice), any_width(dice)
        self.high, self.low = conv_bn_act(c, self.out), conv_bn_act(c, low, stride=2)
        self.up, self.down = conv_bn(low, self.out, 1), conv_bn(self.out, low, stride=2)
        self.merge = conv(low, self.out, 1)

    def forward(self, x):
        a, b = self.high(x), self.low(x)
        up = F.interpolate(self.up(b), size=a.shape[2:], mode="bilinear", align_corners=True)
        a, b = F.relu(a + up), F.relu(b + self.down(a))
        return a + F.interpolate(self.merge(b), scale_factor=2)


class BigLittle(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.big = nn.Sequential(conv_bn_act(c, self.out, stride=2), conv_bn(self.out, self.out))
        self.little = nn.Sequential(conv_bn_act(c, 4), conv_bn(4, self.out, 1))
        self.merge = conv_bn_act(self.out, self.out, 1)

    def forward(self, x):
        little = self.little(x)
        big = F.interpolate(
            self.big(x), size=little.shape[2:], mode="bilinear", align_corners=False
        )
        return self.merge(F.relu(big + little))


class Blur(Block):
    """A fixed kernel, as a functional depthwise convolution."""

    def make(self, dice, c, side):
        self.out, self.side = any_width(dice), side // 2 if side > 4 else side
        self.pre, self.stride = conv_bn_act(c, self.out), side // self.side
        line = torch.tensor([1.0, 2.0, 1.0])
        kernel = (line[:, None] * line / 16).expand(self.out, 1, 3, 3).clone()
        self.register_buffer("kernel", kernel, persistent=dice.random() < 0.5)

    def forward(self, x):
        y = F.pad(self.pre(x), (1, 1, 1, 1), mode="reflect")
        return F.conv2d(y, self.kernel, stride=self.stride, groups=y.shape[1])


class BlurExpand(Block):
    """The same with one kernel, expanded to all channels while running."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.pre = conv_bn_act(c, self.out)
        self.register_buffer("kernel", torch.rand(1, 1, 3, 3))

    def forward(self, x):
        y = self.pre(x)
        return F.conv2d(y, self.kernel.expand(y.shape[1], -1, -1, -1), padding=1, groups=y.shape[1])


# -- gates and attention ---------------------------------------------------------------------------


class SqueezeConv(Block):
    def make(self, dice, c, side):
        self.out, middle = any_width(dice), dice.randint(3, 6)
        self.pre = conv_bn_act(c, self.out)
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.a, self.b = conv(self.out, middle, 1), conv(middle, self.out, 1)

    def forward(self, x):
        x = self.pre(x)
        return x * torch.sigmoid(self.b(F.relu(self.a(self.pool(x)))))


class SqueezeLinear(Block):
    def make(self, dice, c, side):
        self.literal = dice.random() < 0.5
        self.out, middle = any_width(dice), dice.randint(3, 6)
        self.pre = conv_bn_act(c, self.out)
        self.a, self.b = nn.Linear(self.out, middle), nn.Linear(middle, self.out)

    def forward(self, x):
        x = self.pre(x)
        n, c, _, _ = x.size()
        gate = F.adaptive_avg_pool2d(x, 1).view(n, c)
        gate = self.b(F.relu(self.a(gate))).sigmoid()
        return x * (
            gate.view(-1, self.out, 1, 1) if self.literal else gate.view(n, c, 1, 1).expand_as(x)
        )


class EffectiveSqueeze(Block):
    def make(self, dice, c, side):
        self.fc = conv(c, c, 1)

    def forward(self, x):
        return x * F.hardsigmoid(self.fc(x.mean((2, 3), keepdim=True)))


class CoordinateAttention(Block):
    def make(self, dice, c, side):
        middle = dice.randint(4, 6)
        self.a, self.rows, self.columns = (
            conv_bn(c, middle, 1),
            conv(middle, c, 1),
            conv(middle, c, 1),
        )

    def forward(self, x):
        n, c, h, w = x.size()
        rows, columns = x.mean(3, keepdim=True), x.mean(2, keepdim=True).permute(0, 1, 3, 2)
        y = F.hardswish(self.a(torch.cat([rows, columns], dim=2)))
        rows, columns = torch.split(y, [h, w], dim=2)
        return x * self.rows(rows).sigmoid() * self.columns(columns.permute(0, 1, 3, 2)).sigmoid()


class Cbam(Block):
    mixes = "all"

    def make(self, dice, c, side):
        self.a, self.b, self.spatial = conv(c, 4, 1), conv(4, c, 1), conv(2, 1, 5)

    def forward(self, x):
        gate = sum(
            self.b(F.relu(self.a(pool(x, 1))))
            for pool in (F.adaptive_avg_pool2d, F.adaptive_max_pool2d)
        )
        x = x * torch.sigmoid(gate)
        seen = torch.cat([x.mean(1, keepdim=True), x.max(1, keepdim=True)[0]], 1)
        return x * torch.sigmoid(self.spatial(seen))


class EfficientAttention(Block):
    """ECA: a convolution that slides over the channels."""

    def make(self, dice, c, side):
        self.pre, self.out = conv_bn_act(c, 9), 9
        self.slide = nn.Conv1d(1, 1, 3, padding=1, bias=False)

    def forward(self, x):
        x = self.pre(x)
        y = self.slide(x.mean((2, 3)).unsqueeze(1)).transpose(1, 2).unsqueeze(-1)
        return x * y.sigmoid()


class SpatialMask(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.mask = conv_bn(c, self.out), conv(c, 1)

    def forward(self, x):
        return self.a(x) * torch.sigmoid(self.mask(x))


class Film(Block):
    """Scale and shift predicted from the pooled input."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.fc = conv_bn(c, self.out), nn.Linear(c, 2 * self.out)

    def forward(self, x):
        scale, shift = self.fc(x.mean((-1, -2)))[:, :, None, None].chunk(2, 1)
        return F.relu(self.a(x) * (1 + scale) + shift)


class NonLocal(Block):
    def make(self, dice, c, side):
        inner = dice.randint(4, 6)
        self.q, self.k, self.v, self.back = (
            conv(c, inner, 1),
            conv(c, inner, 1),
            conv(c, 5, 1),
            conv(5, c, 1),
        )

    def forward(self, x):
        n, _, h, w = x.shape
        q, k, v = self.q(x).flatten(2), self.k(x).flatten(2), self.v(x).view(n, -1, h * w)
        weights = torch.softmax(torch.bmm(q.transpose(1, 2), k), dim=-1)
        y = torch.matmul(v, weights.permute(0, 2, 1)).view(n, -1, h, w)
        return x + self.back(y)


class Attention(Block):
    """Heads by hand, as vision transformers write them."""

    def make(self, dice, c, side):
        self.heads, self.each, self.fused = 2, dice.randint(3, 5), dice.random() < 0.5
        inner = self.heads * self.each
        self.scale = self.each**-0.5
        self.qkv, self.proj = nn.Linear(c, 3 * inner, bias=dice.random() < 0.7), nn.Linear(inner, c)

    def forward(self, x):
        n, c, h, w = x.shape
        y = x.flatten(2).transpose(1, 2)
        b, length, _ = y.shape
        q, k, v = (
            self.qkv(y)
            .reshape(b, length, 3, self.heads, self.each)
            .permute(2, 0, 3, 1, 4)
            .unbind(0)
        )
        if self.fused:
            y = F.scaled_dot_product_attention(q, k, v)
        else:
            y = ((q * self.scale) @ k.transpose(-2, -1)).softmax(-1) @ v
        y = self.proj(y.transpose(1, 2).reshape(b, length, self.heads * self.each))
        return x + y.transpose(1, 2).reshape(n, c, h, w)


class MultiHead(Block):
    def make(self, dice, c, side):
        self.pre, self.out = conv_bn_act(c, 8, 1), 8
        self.attention = nn.MultiheadAttention(8, 2, batch_first=True)

    def forward(self, x):
        x = self.pre(x)
        y = x.flatten(2).permute(0, 2, 1)
        z, _ = self.attention(y, y, y, need_weights=False)
        return x + z.permute(0, 2, 1).view_as(x)


class LinearAttention(Block):
    """Attention over channels (the matrix is channels by channels)."""

    mixes = "all"

    def make(self, dice, c, side):
        self.q, self.k, self.v, self.out = conv(c, 6, 1), conv(c, 6, 1), conv(c, 6, 1), 6

    def forward(self, x):
        n, _, h, w = x.shape
        q, k, v = (layer(x).flatten(2) for layer in (self.q, self.k, self.v))
        weights = (F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).transpose(1, 2)).softmax(-1)
        return (weights @ v).view(n, -1, h, w)


# -- scales, norms, reductions ---------------------------------------------------------------------


class LayerScale(Block):
    def make(self, dice, c, side):
        shape = dice.choice(((c, 1, 1), (1, c, 1, 1)))
        self.gamma = nn.Parameter(torch.randn(shape))
        self.body = conv_bn_act(c, c)

    def forward(self, x):
        return x + self.gamma * self.body(x)


class BufferScale(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.register_buffer("scale", torch.randn(self.out))
        self.register_buffer("shift", torch.randn(1, self.out, 1, 1))
        self.body = conv(c, self.out)

    def forward(self, x):
        return self.body(x) * self.scale.view(1, -1, 1, 1) + self.shift


class FrozenNorm(Block):
    """Detection backbones' batch norm of buffers."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.body = conv(c, self.out, bias=False)
        for name in ("weight", "bias", "running_mean"):
            self.register_buffer(name, torch.randn(self.out))
        self.register_buffer("running_var", torch.rand(self.out) + 0.5)

    def forward(self, x):
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + 1e-5).rsqrt()
        return F.relu(self.body(x) * scale + (b - rm * scale))


class PositionTable(Block):
    """A learned map added to the features."""

    def make(self, dice, c, side):
        self.table = nn.Parameter(torch.randn(1, c, side, side))
        self.rows = nn.Parameter(torch.randn(c, side, 1))

    def forward(self, x):
        return x + self.table + self.rows


class GroupNorm(Block):
    mixes = "norms"

    def make(self, dice, c, side):
        self.out = width(dice)
        self.conv, self.norm = conv(c, self.out), nn.GroupNorm(dice.choice((1, 2, 4)), self.out)

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class LayerNormNHWC(Block):
    """ConvNeXt's block."""

    mixes = "norms"

    def make(self, dice, c, side):
        self.dw, self.norm = conv(c, c, groups=c), nn.LayerNorm(c)
        self.a, self.b = nn.Linear(c, 2 * c), nn.Linear(2 * c, c)
        self.gamma = nn.Parameter(torch.randn(c))

    def forward(self, x):
        y = self.norm(self.dw(x).permute(0, 2, 3, 1))
        y = self.gamma * self.b(F.gelu(self.a(y)))
        return x + y.permute(0, 3, 1, 2)


class PreNorm(Block):
    """Layer norm over channels of tokens, with a wider output."""

    mixes = "norms"

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.pre, self.norm, self.fc = conv(c, 9, 1), nn.LayerNorm(9), nn.Linear(9, self.out)

    def forward(self, x):
        n, _, h, w = x.shape
        y = self.fc(self.norm(self.pre(x).flatten(2).transpose(1, 2)))
        return y.transpose(1, 2).unflatten(2, (h, w))


class InstanceNorm(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv, self.norm = (
            conv(c, self.out),
            nn.InstanceNorm2d(self.out, affine=dice.random() < 0.7),
        )

    def forward(self, x):
        return F.relu(self.norm(self.conv(x)))


class HandNorm(Block):
    """A layer norm over channels in plain arithmetic."""

    mixes = "all"

    def make(self, dice, c, side):
        self.weight, self.bias = nn.Parameter(torch.randn(c)), nn.Parameter(torch.randn(c))

    def forward(self, x):
        mean = x.mean(1, keepdim=True)
        spread = (x - mean).pow(2).mean(1, keepdim=True)
        x = (x - mean) / torch.sqrt(spread + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class WeightNorm(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv = parametrizations.weight_norm(conv(c, self.out))

    def forward(self, x):
        return F.relu(self.conv(x))


class SpectralNorm(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv = parametrizations.spectral_norm(conv(c, self.out))

    def forward(self, x):
        return F.relu(self.conv(x))


class ChannelMean(Block):
    mixes = "all"

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv, self.kind = conv_bn(c, self.out), dice.choice(("mean", "softmax", "amax"))

    def forward(self, x):
        x = self.conv(x)
        if self.kind == "softmax":
            return x + x.softmax(1)
        return x - (x.mean(1, keepdim=True) if self.kind == "mean" else x.amax(1, keepdim=True))


class ChannelSum(Block):
    """Sums over channels are exact as long as masked channels are zero."""

    mixes = "all"

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv, self.zero = conv_bn(c, self.out), dice.random() < 0.5

    def forward(self, x):
        y = self.conv(x)
        y = F.relu(y) if self.zero else torch.sigmoid(y)
        return y * y.sum(1, keepdim=True)


class Normalize(Block):
    """SSD's L2Norm: a unit vector a pixel, one scale a channel."""

    mixes = "all"  # what comes in need not be zero where it is masked

    def make(self, dice, c, side):
        self.scale = nn.Parameter(torch.randn(c))

    def forward(self, x):
        return F.normalize(x, dim=1) * self.scale[None, :, None, None]


class ConstantAdded(Block):
    """A constant makes a masked channel nonzero, and the padded convolution sees its border."""

    def make(self, dice, c, side):
        self.a, self.b, self.out = conv_bn(c, 7), conv(7, 6), 6

    def forward(self, x):
        y = (self.a(x) + 1) * 3
        return self.b(y) + 0.5


class ConstantMap(Block):
    """Channels that meet a table of constants, which no slice of a parameter makes."""

    def make(self, dice, c, side):
        self.a, self.out = conv_bn(c, 6), 6
        self.table = [0.5, -1.0, 2.0, 0.1, 1.5, -0.3]

    def forward(self, x):
        return self.a(x) * torch.tensor(self.table, dtype=x.dtype).view(1, 6, 1, 1)


class Selects(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.b = conv_bn(c, self.out), conv_bn(c, self.out, 1)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        y = torch.where(a > b, a, b * 0.5)
        return torch.maximum(y, a.clamp(-1, 1)) + torch.lerp(a, b, 0.3)


# -- less usual ------------------------------------------------------------------------------------


class ChannelsToBatch(Block):
    """Every channel through the same small network, as items of a larger batch."""

    def make(self, dice, c, side):
        self.pre, self.a, self.b = conv_bn_act(c, 6, 1), conv(1, 3), conv(3, 1)
        self.out = 6

    def forward(self, x):
        y = self.pre(x)
        n, c, h, w = y.shape
        z = self.b(F.relu(self.a(y.reshape(n * c, 1, h, w))))
        return y + z.view(n, c, h, w)


class BilinearPooling(Block):
    """Products of all pairs of channels, flattened."""

    def make(self, dice, c, side):
        self.a, self.b, self.out = conv(c, 4, 1), conv(c, 3, 1), 5
        self.fc = nn.Linear(12, 5)

    def forward(self, x):
        a, b = self.a(x).flatten(2), self.b(x).flatten(2)
        pairs = torch.einsum("bcl,bdl->bcd", a, b) / a.shape[-1]
        return self.fc(pairs.flatten(1))[:, :, None, None].expand(-1, -1, *x.shape[2:])


class DynamicConv(Block):
    """Kernels mixed for each item from a bank, applied as one grouped convolution."""

    mixes = "all"

    def make(self, dice, c, side):
        self.out, self.c = any_width(dice), c
        self.bank = nn.Parameter(torch.randn(3, self.out, c, 3, 3) / (3 * c**0.5))
        self.route = nn.Linear(c, 3)

    def forward(self, x):
        n, c, h, w = x.shape
        mix = self.route(x.mean((2, 3))).softmax(1)
        kernels = (mix @ self.bank.flatten(1)).view(n * self.out, c, 3, 3)
        y = F.conv2d(x.reshape(1, n * c, h, w), kernels, padding=1, groups=n)
        return y.view(n, self.out, h, w)


class OddChunk(Block):
    """Pieces that are not equal, by chunk and by computed sizes."""

    def make(self, dice, c, side):
        self.pre, self.a, self.b, self.out = conv_bn_act(c, 7), conv(4, 5), conv(3, 5, 1), 5 + 7

    def forward(self, x):
        y = self.pre(x)
        p, q = y.chunk(2, dim=1)
        cut = y.size(1) // 2
        back = torch.cat([y[:, cut:], y[:, :cut]], dim=1)
        return torch.cat([self.a(p) + self.b(q), back], dim=1)


class Indexing(Block):
    """Lists, masks, negative bounds and single channels."""

    def make(self, dice, c, side):
        self.pre, self.out = conv_bn_act(c, 9), 3 + 4 + 3
        self.register_buffer(
            "mask", torch.tensor([True, False, True, True, False, False, True, False, False])
        )

    def forward(self, x):
        y = self.pre(x)
        return torch.cat([y[:, [0, 2, 5]], y[:, self.mask], y[:, -3:] * y[:, 1:2]], 1)


class SingleChannel(Block):
    """One channel of several is a map for the others."""

    def make(self, dice, c, side):
        self.a, self.out = conv(c, 7), 6

    def forward(self, x):
        y = self.a(x)
        return y[:, 1:] * torch.sigmoid(y[:, 0]).unsqueeze(1)


class ExpandedChannel(Block):
    """One channel copied to as many as another value has."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.one, self.b = conv_bn(c, self.out), conv(c, 1), conv(self.out, self.out, 1)

    def forward(self, x):
        y = self.a(x)
        return self.b(self.one(x).expand(-1, y.shape[1], -1, -1) + y)


class Comparisons(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.b = conv_bn(c, self.out), conv_bn(c, self.out, 1)

    def forward(self, x):
        a, b = self.a(x), self.b(x)
        y = a * (a > b).to(a.dtype) + b.masked_fill(b < 0, 0.25)
        return torch.minimum(y, a.abs().sqrt()).clamp(max=3.0)


class ReZero(Block):
    """Scalars as parameters."""

    def make(self, dice, c, side):
        self.alpha, self.beta = nn.Parameter(torch.randn(1)), nn.Parameter(torch.randn(()))
        self.a = conv_bn_act(c, c)

    def forward(self, x):
        return x + self.alpha * self.a(x) - self.beta


class PaddedModes(Block):
    def make(self, dice, c, side):
        self.out = any_width(dice)
        mode = dice.choice(("reflect", "circular", "replicate"))
        self.conv = conv(c, self.out, padding_mode=mode)
        self.pad, self.b = nn.ReflectionPad2d(1), nn.Conv2d(self.out, self.out, 3)

    def forward(self, x):
        return self.b(self.pad(torch.tanh(self.conv(x))))


class CosineConv(Block):
    """Weights normalised while running, and a learned temperature."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.weight = nn.Parameter(torch.randn(self.out, c))
        self.scale = nn.Parameter(torch.tensor(3.0))

    def forward(self, x):
        w = F.normalize(self.weight, dim=1)
        y = F.linear(x.permute(0, 2, 3, 1), w) * self.scale
        return y.permute(0, 3, 1, 2)


class StandardisedConv(Block):
    """Weight standardisation: mean and spread of each filter are taken out."""

    mixes = "weights"

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv = conv(c, self.out)

    def forward(self, x):
        w = self.conv.weight
        w = (w - w.mean((1, 2, 3), keepdim=True)) / (w.std((1, 2, 3), keepdim=True) + 1e-5)
        return F.conv2d(x, w, self.conv.bias, padding=1)


class LayerNormCHW(Block):
    """Statistics over channels and pixels, affine over both."""

    mixes = "norms"

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.conv, self.norm = conv(c, self.out), nn.LayerNorm([self.out, side, side])

    def forward(self, x):
        return self.norm(self.conv(x))


class BareNorm(Block):
    """Norms without parameters, or without running statistics."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.b = conv(c, self.out), conv(self.out, self.out)
        self.p = nn.BatchNorm2d(self.out, affine=False)
        self.q = nn.BatchNorm2d(self.out, track_running_stats=False)

    def forward(self, x):
        return F.relu(self.q(self.b(F.relu(self.p(self.a(x))))))


class Grid(Block):
    """Sampling at learned positions."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.theta = conv_bn_act(c, self.out), nn.Linear(c, 6)

    def forward(self, x):
        y = self.a(x)
        theta = 0.3 * self.theta(x.mean((2, 3))).tanh().view(-1, 2, 3)
        grid = F.affine_grid(theta, list(y.size()), align_corners=False)
        return F.grid_sample(y, grid, align_corners=False)


class StackMean(Block):
    """Branches joined by max, mean and sum over a new dim."""

    def make(self, dice, c, side):
        self.out, self.kind = any_width(dice), dice.choice(("max", "mean", "sum"))
        self.branches = nn.ModuleList(conv_bn(c, self.out, k) for k in (1, 3, 3))

    def forward(self, x):
        found = [branch(x) for branch in self.branches]
        if self.kind == "sum":
            return sum(found)
        y = torch.stack(found, dim=-1 if self.kind == "max" else 0)
        return y.max(dim=-1).values if self.kind == "max" else torch.mean(y, 0)


class Reordering(Block):
    """Sizes and dims named in unusual ways."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a, self.fc = conv_bn_act(c, self.out), nn.Linear(self.out, self.out)
        self.unflatten = nn.Unflatten(2, (side, side))

    def forward(self, x):
        y = self.a(x).movedim(1, -1)
        y = self.fc(y.swapaxes(1, 2)).transpose(-1, 1)
        return self.unflatten(y.flatten(start_dim=-2)).mT


class HeadsOfChannels(Block):
    """Channels seen as heads, each with its own scale."""

    def make(self, dice, c, side):
        self.out = 12
        self.a, self.scale = conv_bn(c, 12), nn.Parameter(torch.randn(1, 3, 1, 1, 1))

    def forward(self, x):
        n, _, h, w = x.shape
        y = self.a(x).reshape(n, 3, 4, h, w) * self.scale
        return F.silu(y.reshape(n, 12, h, w))


class TwoWayShuffle(Block):
    """A shuffle and its inverse, with something between."""

    def make(self, dice, c, side):
        self.out, groups = 12, dice.choice((2, 3))
        self.a, self.b = conv_bn_act(c, 12, 1), conv_bn_act(12, 12, groups=12)
        self.there, self.back = nn.ChannelShuffle(groups), nn.ChannelShuffle(12 // groups)

    def forward(self, x):
        y = self.a(x)
        return y + self.back(self.b(self.there(y)))


class Transformer(Block):
    mixes = "norms"

    def make(self, dice, c, side):
        self.pre, self.out = conv(c, 8, 1), 8
        self.layer = nn.TransformerEncoderLayer(
            8,
            2,
            11,
            batch_first=True,
            norm_first=dice.random() < 0.5,
            activation=dice.choice(("relu", "gelu")),
        )

    def forward(self, x):
        y = self.pre(x)
        return self.layer(y.flatten(2).mT).mT.reshape(y.shape)


class CrossAttention(Block):
    """Queries of their own read the pixels; einsum throughout."""

    def make(self, dice, c, side):
        self.out, self.heads, each = any_width(dice), 2, 3
        self.queries = nn.Parameter(torch.randn(5, self.heads * each))
        self.k, self.v = nn.Linear(c, self.heads * each), nn.Linear(c, self.heads * each)
        self.o, self.a = nn.Linear(self.heads * each, self.out), conv(c, self.out)

    def forward(self, x):
        y = x.flatten(2).mT
        q = self.queries.unflatten(-1, (self.heads, -1))
        k, v = (layer(y).unflatten(-1, (self.heads, -1)) for layer in (self.k, self.v))
        weights = torch.einsum("qhd,bkhd->bhqk", q, k).softmax(-1)
        y = torch.einsum("bhqk,bkhd->bqhd", weights, v).flatten(2)
        return self.a(x) + self.o(y).amax(1)[..., None, None]


class Recurrent(Block):
    """A cell that steps over the rows."""

    def make(self, dice, c, side):
        self.out, self.cell = 6, nn.GRUCell(c, 6)

    def forward(self, x):
        rows = x.mean(3)
        state, found = x.new_zeros(x.shape[0], 6), []
        for i in range(rows.shape[2]):
            state = self.cell(rows[:, :, i], state)
            found.append(state)
        return torch.stack(found, 2).unsqueeze(3).expand(-1, -1, -1, x.shape[3])


class Accumulating(Block):
    """A cumulative sum over channels, and one over rows."""

    mixes = "all"

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a = conv_bn(c, self.out)

    def forward(self, x):
        y = torch.tanh(self.a(x))
        return y.cumsum(1) + y.cumsum(dim=2)


class WeightUsedTwice(Block):
    """A layer's weight is also read by name."""

    def make(self, dice, c, side):
        self.out = any_width(dice)
        self.a = conv(c, self.out, 1)

    def forward(self, x):
        size = self.a.weight.pow(2).sum((1, 2, 3)).sqrt()
        return self.a(x) / (1 + size.view(1, -1, 1, 1))


# -- heads -----------------------------------------------------------------------------------------


class Head(nn.Module):
    """The end of a network: from the last features and the network's input to its outputs."""

    def __init_subclass__(cls) -> None:
        HEADS[cls.__name__] = cls

    def __init__(self, dice: Dice, c: int, side: int):
        super().__init__()
        self.make(dice, c, side)

    def make(self, dice: Dice, c: int, side: int) -> None:
        raise NotImplementedError


class PooledHead(Head):
    def make(self, dice, c, side):
        self.pool, self.fc = nn.AdaptiveAvgPool2d(1), nn.Linear(c, CLASSES)

    def forward(self, h, x):
        return self.fc(torch.flatten(self.pool(h), 1))


class FlattenHead(Head):
    def make(self, dice, c, side):
        self.fc, self.drop = nn.Linear(c * side * side, 7), nn.Dropout(0.1)
        self.out, self.kind = nn.Linear(7, CLASSES), dice.choice(("flatten", "view", "literal"))
        self.size = c * side * side

    def forward(self, h, x):
        if self.kind == "flatten":
            y = h.flatten(1)
        else:
            y = h.reshape(h.size(0), -1) if self.kind == "view" else h.reshape(-1, self.size)
        return self.out(self.drop(F.relu(self.fc(y))))


class NhwcHead(Head):
    def make(self, dice, c, side):
        self.fc = nn.Linear(c * side * side, CLASSES)

    def forward(self, h, x):
        return self.fc(h.permute(0, 2, 3, 1).flatten(1))


class PooledFlattenHead(Head):
    """VGG: features pooled to a few pixels, then flattened; two hidden layers."""

    def make(self, dice, c, side):
        self.pool = nn.AdaptiveAvgPool2d(2)
        self.a, self.b, self.c = nn.Linear(4 * c, 9), nn.Linear(9, 8), nn.Linear(8, CLASSES)
        self.relu, self.drop, self.bn = nn.ReLU(inplace=True), nn.Dropout(), nn.BatchNorm1d(8)

    def forward(self, h, x):
        y = self.drop(self.relu(self.a(torch.flatten(self.pool(h), 1))))
        return self.c(F.gelu(self.bn(self.b(y))))


class DenseHead(Head):
    def make(self, dice, c, side):
        self.conv = conv(c, 3, 1)

    def forward(self, h, x):
        return F.interpolate(self.conv(h), size=x.shape[-2:], mode="bilinear", align_corners=False)


class BareHead(Head):
    """The last features are the output."""

    def make(self, dice, c, side):
        self.act = nn.Tanh()

    def forward(self, h, x):
        return self.act(h)


class InputResidualHead(Head):
    def make(self, dice, c, side):
        self.conv = conv(c, 3)

    def forward(self, h, x):
        return x + F.interpolate(self.conv(h), size=x.shape[2:])


class TwoHeads(Head):
    def make(self, dice, c, side):
        self.map, self.fc = conv(c, 4), nn.Linear(c, CLASSES)

    def forward(self, h, x):
        return self.map(h), self.fc(h.amax((2, 3)))


class DictHead(Head):
    def make(self, dice, c, side):
        self.hidden, self.map, self.fc = conv_bn_act(c, 8), conv(8, 2, 1), nn.Linear(8, CLASSES)

    def forward(self, h, x):
        y = self.hidden(h)
        return {"map": self.map(y), "classes": [self.fc(y.mean((2, 3)))], "note": "kept"}


class LstmHead(Head):
    def make(self, dice, c, side):
        kind = dice.choice((nn.LSTM, nn.GRU))
        self.rnn = kind(c, 6, batch_first=True, bidirectional=dice.random() < 0.5)
        self.fc = nn.Linear(12 if self.rnn.bidirectional else 6, CLASSES)

    def forward(self, h, x):
        y, _ = self.rnn(h.mean(2).transpose(1, 2))
        return self.fc(y)


class TokenHead(Head):
    """A class token before the pixels' tokens, and a position table."""

    mixes = "norms"

    def make(self, dice, c, side):
        self.proj = nn.Linear(c, 8)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.table = nn.Parameter(torch.randn(1, side * side + 1, 8))
        self.norm, self.mix, self.fc = (
            nn.LayerNorm(8),
            nn.Linear(side * side + 1, 3),
            nn.Linear(8, CLASSES),
        )

    def forward(self, h, x):
        y = self.proj(h.flatten(2).transpose(1, 2))
        y = torch.cat([self.token.expand(y.shape[0], -1, -1), y], dim=1) + self.table
        return self.fc(self.norm(self.mix(y.transpose(1, 2)).transpose(1, 2)[:, 0]))


# -- networks --------------------------------------------------------------------------------------


class RandomNet(nn.Module):
    """Stem, blocks, head. A block wider than `WIDEST` is followed by a narrowing convolution."""

    def __init__(self, blocks: Sequence[str], head: str, seed: int):
        super().__init__()
        dice = random.Random(seed)
        c = any_width(dice)
        self.stem = conv_bn_act(3, c)
        self.blocks = nn.ModuleList()
        side = SIDE
        for name in blocks:
            made = BLOCKS[name](dice, c, side)
            self.blocks.append(made)
            c, side = made.out, made.side
            if c > WIDEST:
                c, wide = any_width(dice), c
                self.blocks.append(conv_bn_act(wide, c, 1))
        self.head = HEADS[head](dice, c, side)

    def forward(self, x):
        h = self.stem(x)
        for block in self.blocks:
            h = block(h)
        return self.head(h, x)


@dataclass(frozen=True)
class Network:
    """What a random network is made of; `build` makes the same module every time."""

    blocks: tuple[str, ...]
    head: str
    seed: int

    def build(self) -> RandomNet:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.seed)
            net = RandomNet(self.blocks, self.head, self.seed).double()
            _randomise(net)
        return net.eval()

    def inputs(self) -> tuple[Tensor]:
        generator = torch.Generator().manual_seed(self.seed + 1)
        return (torch.randn(BATCH, 3, SIDE, SIDE, generator=generator, dtype=torch.float64),)

    def mixes(self) -> set[str]:
        """Which kinds of mixing over channels the network does."""
        parts = [*(BLOCKS[name] for name in self.blocks), HEADS[self.head]]
        return {kind for part in parts if (kind := getattr(part, "mixes", ""))}

    def __str__(self) -> str:
        return f"{' > '.join(self.blocks)} > {self.head} (seed {self.seed})"


def _randomise(net: nn.Module) -> None:
    """Random statistics and affine parameters for every norm, random starts for the rest."""
    with torch.no_grad():
        for module in net.modules():
            for name in ("running_mean", "bias"):
                found = getattr(module, name, None)
                if _is_norm(module) and found is not None:
                    found.normal_(0, 0.5)
            if _is_norm(module) and getattr(module, "running_var", None) is not None:
                module.running_var.uniform_(0.5, 1.5)
            if _is_norm(module) and module.weight is not None:
                module.weight.uniform_(0.5, 1.5)
                module.weight.mul_(torch.where(torch.rand_like(module.weight) < 0.3, -1.0, 1.0))
            if isinstance(module, (nn.modules.conv._ConvNd, nn.Linear)):
                module.weight.mul_(2.0)  # keeps signals alive through many layers
            if isinstance(module, nn.PReLU):
                module.weight.uniform_(0.05, 0.6)
            if isinstance(module, nn.MultiheadAttention):
                module.in_proj_bias.normal_()
                module.out_proj.bias.normal_()


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, (nn.modules.batchnorm._NormBase, nn.GroupNorm, nn.LayerNorm))


def draw_network(seed: int, *, most: int = 5) -> Network:
    """The network a seed stands for."""
    dice = random.Random(seed)
    blocks = tuple(dice.choices(sorted(BLOCKS), k=dice.randint(1, most)))
    return Network(blocks, dice.choice(sorted(HEADS)), dice.randrange(2**31))


def random_network(seed: int, *, most: int = 5) -> tuple[RandomNet, tuple[Tensor]]:
    """A network and example inputs from a seed alone."""
    drawn = draw_network(seed, most=most)
    return drawn.build(), drawn.inputs()


@st.composite
def networks(draw, most: int = 4) -> Network:
    """Hypothesis strategy for networks; shrinks to few blocks, the plainest first."""
    names = list(BLOCKS)
    blocks = draw(st.lists(st.sampled_from(names), min_size=1, max_size=most))
    return Network(
        tuple(blocks), draw(st.sampled_from(list(HEADS))), draw(st.integers(0, 2**31 - 1))
    )


@dataclass(frozen=True)
class Choice:
    """How a network is pruned: options of `prune`, and the seed of its random scores."""

    seed: int
    rate: float
    scope: str = "local"
    round_to: int = 1
    mixing: str = "norms"
    select_by: str = "rate"
    scatter: bool = False

    def criterion(self, group) -> Tensor:
        """A random score a channel, the same on every machine."""
        generator = torch.Generator().manual_seed((self.seed * 1000003 + group.seed) % 2**63)
        return torch.rand(len(group), generator=generator, dtype=torch.float64)

    def options(self) -> dict:
        own = {
            name: getattr(self, name)
            for name in ("rate", "scope", "round_to", "mixing", "select_by", "scatter")
        }
        return {"criterion": self.criterion, **own}


SCOPES = ("local", "global")
ROUNDINGS = (1, 1, 1, 2, 4)
MIXINGS = ("norms", "norms", "norms", "all", "none")
SELECTIONS = ("rate", "rate", "rate", "cumulative", "threshold")


def draw_choice(seed: int) -> Choice:
    """The way of pruning a seed stands for."""
    dice = random.Random(seed + 7)
    return Choice(
        seed=dice.randrange(2**31),
        rate=round(dice.uniform(0.1, 0.9), 2),
        scope=dice.choice(SCOPES),
        round_to=dice.choice(ROUNDINGS),
        mixing=dice.choice(MIXINGS),
        select_by=dice.choice(SELECTIONS),
        scatter=dice.random() < 0.25,
    )


def choices() -> st.SearchStrategy[Choice]:
    """Hypothesis strategy for ways of pruning."""
    return st.builds(
        Choice,
        seed=st.integers(0, 2**31 - 1),
        rate=st.integers(1, 9).map(lambda n: n / 10),
        scope=st.sampled_from(SCOPES),
        round_to=st.sampled_from(ROUNDINGS),
        mixing=st.sampled_from(MIXINGS),
        select_by=st.sampled_from(SELECTIONS),
        scatter=st.booleans(),
    )
