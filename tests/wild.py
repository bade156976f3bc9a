"""Small twins of published networks: their structure as it is, a few channels wide.

An entry is a function that builds a network, and what is expected of it::

    @wild(image(), stays=5, half="stem 4, block.expand 8")
    def some_net():
        return SomeNet()

``stays`` is how many channels of layers may rightly stay: those of outputs, and what the comment
beside it says. ``half`` gives widths at rate 0.5.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
import torchvision
from torch import Tensor, nn
from zoo_small import image, randomise, real, tensor


@dataclass
class Wild:
    """A network, what it is called with, and what pruning must leave of it."""

    make: Callable[[], nn.Module]
    inputs: tuple
    stays: int
    half: dict[str, int]
    keywords: dict[str, Any] = field(default_factory=dict)
    mixing: str = "norms"
    oracle: str = "masked"
    why: str = ""
    warns: str = ""
    trains: bool = True

    def build(self) -> nn.Module:
        """The network in float64 and eval mode, with random statistics; the same at each call."""
        torch.manual_seed(0)
        return randomise(self.make())

    def args(self) -> tuple:
        return real(self.inputs)

    def kwargs(self) -> dict[str, Any]:
        return real(self.keywords)


WILD: dict[str, Wild] = {}


def wild(*inputs: Any, half: str, stays: int, **more: Any) -> Callable:
    """Enter a network into `WILD` under its builder's name."""
    pairs = (item.rsplit(maxsplit=1) for item in half.split(",") if item.strip())
    sizes = {name.strip(): int(size) for name, size in pairs}

    def register(make: Callable[[], nn.Module]) -> Callable[[], nn.Module]:
        assert make.__name__ not in WILD, make.__name__
        WILD[make.__name__] = Wild(make, inputs, stays, sizes, **more)
        return make

    return register


class ConvBN(nn.Sequential):
    """Convolution, BatchNorm and an activation."""

    def __init__(self, i, o, k=1, s=1, g=1, d=1, act=None):
        super().__init__()
        self.conv = nn.Conv2d(i, o, k, s, (k // 2) * d, groups=g, dilation=d, bias=False)
        self.bn = nn.BatchNorm2d(o)
        self.act = act if act is not None else nn.ReLU()


def silu(i, o, k=1, s=1, g=1):
    return ConvBN(i, o, k, s, g, act=nn.SiLU())


def linear(i, o, k=1, s=1, g=1):
    return ConvBN(i, o, k, s, g, act=nn.Identity())


class Classifier(nn.Module):
    """Pool, flatten, and a linear layer."""

    def __init__(self, c, classes=5):
        super().__init__()
        self.pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Linear(c, classes)

    def forward(self, x):
        return self.fc(self.pool(x).flatten(1))


class Chain(nn.Sequential):
    """Named modules one after the other."""

    def __init__(self, **parts):
        super().__init__(collections.OrderedDict(parts))


# -- one-stage detectors ---------------------------------------------------------------------------


class Bottleneck(nn.Module):
    def __init__(self, i, o, shortcut=True, e=0.5):
        super().__init__()
        hidden = int(o * e)
        self.cv1, self.cv2 = silu(i, hidden, 3), silu(hidden, o, 3)
        self.add = shortcut and i == o

    def forward(self, x):
        return x + self.cv2(self.cv1(x)) if self.add else self.cv2(self.cv1(x))


class C2f(nn.Module):
    """Halves of a convolution, a list that grows, and a concatenation."""

    def __init__(self, i, o, n=1, shortcut=False, e=0.5):
        super().__init__()
        self.c = int(o * e)
        self.cv1, self.cv2 = silu(i, 2 * self.c), silu((2 + n) * self.c, o)
        self.m = nn.ModuleList(Bottleneck(self.c, self.c, shortcut, 1.0) for _ in range(n))

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C2fSplit(C2f):
    def forward(self, x):
        y = self.cv1(x).split((self.c, self.c), 1)
        y = [y[0], y[1]]
        y.extend(m(y[-1]) for m in self.m)
        return self.cv2(torch.cat(y, 1))


class C3k(nn.Module):
    def __init__(self, i, o, n=1):
        super().__init__()
        c = o // 2
        self.cv1, self.cv2, self.cv3 = silu(i, c), silu(i, c), silu(2 * c, o)
        self.m = nn.Sequential(*(Bottleneck(c, c, True, 1.0) for _ in range(n)))

    def forward(self, x):
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class C3k2(C2f):
    def __init__(self, i, o, n=1):
        super().__init__(i, o, n, True)
        self.m = nn.ModuleList(C3k(self.c, self.c, 2) for _ in range(n))


class SPPF(nn.Module):
    def __init__(self, i, o, k=5):
        super().__init__()
        self.cv1, self.cv2 = silu(i, i // 2), silu(i // 2 * 4, o)
        self.m = nn.MaxPool2d(k, 1, k // 2)

    def forward(self, x):
        y = [self.cv1(x)]
        y.extend(self.m(y[-1]) for _ in range(3))
        return self.cv2(torch.cat(y, 1))


class SPPELAN(nn.Module):
    def __init__(self, i, o, c):
        super().__init__()
        self.cv1 = silu(i, c)
        self.cv2, self.cv3, self.cv4 = (nn.MaxPool2d(3, 1, 1) for _ in range(3))
        self.cv5 = silu(4 * c, o)

    def forward(self, x):
        y = [self.cv1(x)]
        y.extend(m(y[-1]) for m in [self.cv2, self.cv3, self.cv4])
        return self.cv5(torch.cat(y, 1))


class AreaAttention(nn.Module):
    """Attention over pixels with a positional depthwise convolution of the values."""

    def __init__(self, dim, heads=2, ratio=0.5):
        super().__init__()
        self.heads, self.head_dim = heads, dim // heads
        self.key_dim = int(self.head_dim * ratio)
        self.scale = self.key_dim**-0.5
        self.qkv = linear(dim, dim + self.key_dim * heads * 2)
        self.proj = linear(dim, dim)
        self.pe = linear(dim, dim, 3, g=dim)

    def forward(self, x):
        b, c, h, w = x.shape
        n = h * w
        qkv = self.qkv(x).view(b, self.heads, self.key_dim * 2 + self.head_dim, n)
        q, k, v = qkv.split([self.key_dim, self.key_dim, self.head_dim], dim=2)
        attn = ((q.transpose(-2, -1) @ k) * self.scale).softmax(dim=-1)
        x = (v @ attn.transpose(-2, -1)).view(b, c, h, w) + self.pe(v.reshape(b, c, h, w))
        return self.proj(x)


class PSA(nn.Module):
    def __init__(self, c, e=0.5):
        super().__init__()
        self.c = int(c * e)
        self.cv1, self.cv2 = silu(c, 2 * self.c), silu(2 * self.c, c)
        self.attn = AreaAttention(self.c)
        self.ffn = nn.Sequential(silu(self.c, self.c * 2), linear(self.c * 2, self.c))

    def forward(self, x):
        a, b = self.cv1(x).split((self.c, self.c), dim=1)
        b = b + self.attn(b)
        b = b + self.ffn(b)
        return self.cv2(torch.cat((a, b), 1))


class DFL(nn.Module):
    """The mean of a distribution over bins, as a convolution with fixed weights."""

    def __init__(self, bins=4):
        super().__init__()
        self.conv = nn.Conv2d(bins, 1, 1, bias=False).requires_grad_(False)
        self.conv.weight.data[:] = torch.arange(bins, dtype=torch.float).view(1, bins, 1, 1)
        self.bins = bins

    def forward(self, x):
        b, _, a = x.shape
        return self.conv(x.view(b, 4, self.bins, a).transpose(2, 1).softmax(1)).view(b, 4, a)


def make_anchors(feats, strides, offset=0.5):
    points, found = [], []
    dtype, device = feats[0].dtype, feats[0].device
    for i, stride in enumerate(strides):
        _, _, h, w = feats[i].shape
        sx = torch.arange(end=w, device=device, dtype=dtype) + offset
        sy = torch.arange(end=h, device=device, dtype=dtype) + offset
        sy, sx = torch.meshgrid(sy, sx, indexing="ij")
        points.append(torch.stack((sx, sy), -1).view(-1, 2))
        found.append(torch.full((h * w, 1), stride, dtype=dtype, device=device))
    return torch.cat(points), torch.cat(found)


class Detect(nn.Module):
    """Boxes and classes at several scales, decoded at anchors made on the way."""

    shape = None
    stride = (2, 4, 8)

    def __init__(self, classes=3, ch=(), bins=4):
        super().__init__()
        self.nc, self.nl, self.reg_max = classes, len(ch), bins
        self.no = classes + bins * 4
        c2, c3 = max(8, ch[0] // 4), max(ch[0], 6)
        self.cv2 = nn.ModuleList(
            nn.Sequential(silu(x, c2, 3), silu(c2, c2, 3), nn.Conv2d(c2, 4 * bins, 1)) for x in ch
        )
        self.cv3 = nn.ModuleList(
            nn.Sequential(
                nn.Sequential(silu(x, x, 3, g=x), silu(x, c3, 1)), nn.Conv2d(c3, classes, 1)
            )
            for x in ch
        )
        self.dfl = DFL(bins)

    def forward(self, x):
        for i in range(self.nl):
            x[i] = torch.cat((self.cv2[i](x[i]), self.cv3[i](x[i])), 1)
        if self.training:
            return x
        shape = x[0].shape
        x_cat = torch.cat([xi.view(shape[0], self.no, -1) for xi in x], 2)
        if self.shape != shape:
            made = make_anchors(x, self.stride)
            self.anchors, self.strides = (a.transpose(0, 1) for a in made)
            self.shape = shape
        box, cls = x_cat.split((self.reg_max * 4, self.nc), 1)
        lt, rb = self.dfl(box).chunk(2, 1)
        anchors = self.anchors.unsqueeze(0)
        x1y1, x2y2 = anchors - lt, anchors + rb
        boxes = torch.cat(((x1y1 + x2y2) / 2, x2y2 - x1y1), 1) * self.strides
        return torch.cat((boxes, cls.sigmoid()), 1), x


class Detector(nn.Module):
    """Backbone, a path up and down again, three heads; layers named by where they take from."""

    def __init__(self, block):
        super().__init__()
        up, cat = nn.Upsample(None, 2, "nearest"), Concat()
        self.model = nn.Sequential(
            silu(3, 8, 3),
            silu(8, 8, 3, 2),
            block(8, 8),
            silu(8, 12, 3, 2),
            block(12, 12),
            silu(12, 16, 3, 2),
            SPPF(16, 16),
            up,
            cat,
            block(28, 12),
            up,
            cat,
            block(20, 8),
            silu(8, 8, 3, 2),
            cat,
            block(20, 12),
            silu(12, 12, 3, 2),
            cat,
            block(28, 16),
            Detect(ch=(8, 12, 16)),
        )
        self.take = [-1] * 8 + [
            [-1, 4],
            -1,
            -1,
            [-1, 2],
            -1,
            -1,
            [-1, 9],
            -1,
            -1,
            [-1, 6],
            -1,
            [12, 15, 18],
        ]
        self.save = {2, 4, 6, 9, 12, 15, 18}

    def forward(self, x):
        y = []
        for i, (take, layer) in enumerate(zip(self.take, self.model, strict=True)):
            if take != -1:
                x = [x if j == -1 else y[j] for j in take]
            x = layer(x)
            y.append(x if i in self.save else None)
        return x


class Concat(nn.Module):
    def forward(self, x):
        return torch.cat(x, 1)


TRAINING = "branches on `training`"
DETECT = {"stays": 7, "warns": TRAINING}  # 3 classes and 4 sides, coupled over scales and bins


@wild(
    image(3, 16),
    **DETECT,
    half="model.0.conv 4, model.2.cv1.conv 4, model.2.m.0.cv1.conv 2, model.6.cv1.conv 4,"
    "model.12.cv2.conv 4, model.19.cv2.0.0.conv 4, model.19.cv3.1.0.0.conv 6",
)
def detector_c2f():
    return Detector(C2f)


@wild(
    image(3, 16),
    **DETECT,
    half="model.0.conv 4, model.2.cv1.conv 4, model.2.m.0.cv1.conv 1, model.2.cv2.conv 4",
)
def detector_c3k2():
    return Detector(C3k2)


@wild(image(3, 16), **DETECT, half="model.2.cv1.conv 4, model.9.m.0.cv2.conv 3")
def detector_split():
    return Detector(C2fSplit)


class RepConv(nn.Module):
    """A 3x3 and a 1x1 convolution added up, for training."""

    def __init__(self, i, o):
        super().__init__()
        self.conv1, self.conv2 = linear(i, o, 3), linear(i, o, 1)
        self.act = nn.SiLU()

    def forward(self, x):
        return self.act(self.conv1(x) + self.conv2(x))


class RepBottleneck(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.cv1, self.cv2 = RepConv(c, c), silu(c, c, 3)

    def forward(self, x):
        return x + self.cv2(self.cv1(x))


class RepCSP(nn.Module):
    def __init__(self, i, o):
        super().__init__()
        c = o // 2
        self.cv1, self.cv2, self.cv3 = silu(i, c), silu(i, c), silu(2 * c, o)
        self.m = nn.Sequential(RepBottleneck(c))

    def forward(self, x):
        return self.cv3(torch.cat((self.m(self.cv1(x)), self.cv2(x)), 1))


class RepNCSPELAN4(nn.Module):
    def __init__(self, c1, c2, c3, c4):
        super().__init__()
        self.c = c3 // 2
        self.cv1 = silu(c1, c3)
        self.cv2 = nn.Sequential(RepCSP(c3 // 2, c4), silu(c4, c4, 3))
        self.cv3 = nn.Sequential(RepCSP(c4, c4), silu(c4, c4, 3))
        self.cv4 = silu(c3 + 2 * c4, c2)

    def forward(self, x):
        y = list(self.cv1(x).chunk(2, 1))
        y.extend((m(y[-1])) for m in [self.cv2, self.cv3])
        return self.cv4(torch.cat(y, 1))


class ADown(nn.Module):
    """Average, halve, one half by a strided convolution and one by a pool."""

    def __init__(self, i, o):
        super().__init__()
        self.c = o // 2
        self.cv1, self.cv2 = silu(i // 2, self.c, 3, 2), silu(i // 2, self.c, 1)

    def forward(self, x):
        x = F.avg_pool2d(x, 2, 1, 0, False, True)
        x1, x2 = x.chunk(2, 1)
        x1 = self.cv1(x1)
        x2 = F.max_pool2d(x2, 3, 2, 1)
        x2 = self.cv2(x2)
        return torch.cat((x1, x2), 1)


@wild(
    image(3, 16),
    stays=5,
    half="stem.conv 4, elan.cv1.conv 4, elan.cv2.0.cv1.conv 2, down.cv1.conv 4, spp.cv1.conv 3",
)
def gelan():
    return Chain(
        stem=silu(3, 8, 3, 2),
        elan=RepNCSPELAN4(8, 16, 8, 8),
        down=ADown(16, 16),
        elan2=RepNCSPELAN4(16, 16, 8, 4),
        spp=SPPELAN(16, 8, 6),
        head=Classifier(8),
    )


class ELAN(nn.Module):
    """Every second convolution of a chain, and two projections, joined."""

    def __init__(self, i, c, o):
        super().__init__()
        self.a, self.b = silu(i, c), silu(i, c)
        self.chain = nn.ModuleList(silu(c, c, 3) for _ in range(4))
        self.out = silu(4 * c, o)

    def forward(self, x):
        kept = [self.a(x), self.b(x)]
        y = kept[-1]
        for i, layer in enumerate(self.chain):
            y = layer(y)
            if i % 2:
                kept.append(y)
        return self.out(torch.cat(kept[::-1], dim=1))


@wild(image(), stays=5, half="stem.conv 4, elan.a.conv 3, elan.chain.0.conv 3, elan.out.conv 6")
def elan():
    return Chain(stem=silu(3, 8, 3), elan=ELAN(8, 6, 12), head=Classifier(12))


@wild(image(), stays=5, half="stem.conv 8, psa.cv1.conv 8, psa.ffn.0.conv 8, psa.cv2.conv 8")
def partial_self_attention():
    return Chain(stem=silu(3, 16, 3), psa=PSA(16), head=Classifier(16))


class Reorg(nn.Module):
    """Space to depth by slices: the focus layer."""

    def __init__(self, i, o):
        super().__init__()
        self.conv = silu(4 * i, o, 3)

    def forward(self, x):
        return self.conv(
            torch.cat(
                [x[..., ::2, ::2], x[..., 1::2, ::2], x[..., ::2, 1::2], x[..., 1::2, 1::2]], dim=1
            )
        )


@wild(image(), stays=5, half="focus.conv.conv 4, again.conv.conv 4")
def focus_net():
    return Chain(focus=Reorg(3, 8), again=Reorg(8, 8), head=Classifier(8))


# -- dense prediction ------------------------------------------------------------------------------


class AttentionGate(nn.Module):
    def __init__(self, gate, skip, c):
        super().__init__()
        self.w_g = nn.Sequential(nn.Conv2d(gate, c, 1), nn.BatchNorm2d(c))
        self.w_x = nn.Sequential(nn.Conv2d(skip, c, 1), nn.BatchNorm2d(c))
        self.psi = nn.Sequential(nn.Conv2d(c, 1, 1), nn.BatchNorm2d(1), nn.Sigmoid())

    def forward(self, g, x):
        return x * self.psi(F.relu(self.w_g(g) + self.w_x(x)))


def double(i, o):
    return nn.Sequential(ConvBN(i, o, 3), ConvBN(o, o, 3))


class AttentionUNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.down1, self.down2, self.down3 = double(1, 8), double(8, 12), double(12, 16)
        self.pool = nn.MaxPool2d(2)
        self.up3, self.up2 = nn.ConvTranspose2d(16, 12, 2, 2), nn.ConvTranspose2d(12, 8, 2, 2)
        self.att3, self.att2 = AttentionGate(12, 12, 6), AttentionGate(8, 8, 4)
        self.dec3, self.dec2 = double(24, 12), double(16, 8)
        self.out = nn.Conv2d(8, 2, 1)

    def forward(self, x):
        e1 = self.down1(x)
        e2 = self.down2(self.pool(e1))
        e3 = self.down3(self.pool(e2))
        d3 = self.up3(e3)
        d3 = self.dec3(torch.cat((self.att3(d3, e2), d3), dim=1))
        d2 = self.up2(d3)
        d2 = self.dec2(torch.cat((self.att2(d2, e1), d2), dim=1))
        return self.out(d2)


@wild(
    image(1),
    stays=2,
    half="down1.0.conv 4, down3.1.conv 8, up3 8, att3.w_g.0 3, att2.psi.0 1, dec2.0.conv 4",
)
def attention_unet():
    return AttentionUNet()


class UNetPlusPlus(nn.Module):
    """Nodes x(i, j) that take all x(i, 0..j-1) and the upsampled x(i+1, j-1)."""

    def __init__(self, c=(6, 8, 10), deep=True):
        super().__init__()
        self.pool, self.up = nn.MaxPool2d(2), nn.Upsample(scale_factor=2, mode="bilinear")
        self.nodes = nn.ModuleDict()
        for i, width in enumerate(c):
            self.nodes[f"{i}_0"] = double(3 if i == 0 else c[i - 1], width)
        for j in range(1, len(c)):
            for i in range(len(c) - j):
                self.nodes[f"{i}_{j}"] = double(c[i] * j + c[i + 1], c[i])
        self.depth = len(c)
        self.finals = nn.ModuleList(nn.Conv2d(c[0], 2, 1) for _ in range(self.depth - 1))

    def forward(self, x):
        made = {}
        for i in range(self.depth):
            made[i, 0] = x = self.nodes[f"{i}_0"](x if i == 0 else self.pool(x))
            for j in range(1, i + 1):
                row = i - j
                below = self.up(made[row + 1, j - 1])
                before = [made[row, k] for k in range(j)]
                made[row, j] = self.nodes[f"{row}_{j}"](torch.cat([*before, below], 1))
        return [final(made[0, j + 1]) for j, final in enumerate(self.finals)]


@wild(image(), stays=4, half="nodes.0_0.0.conv 3, nodes.1_0.1.conv 4, nodes.0_2.1.conv 3")
def unet_plus_plus():
    return UNetPlusPlus()


class Basic(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, i, o, s=1):
        super().__init__()
        self.conv1, self.conv2 = ConvBN(i, o, 3, s), linear(o, o, 3)
        self.down = linear(i, o, 1, s) if s != 1 or i != o else None

    def forward(self, x):
        y = self.conv2(self.conv1(x))
        return F.relu(y + (x if self.down is None else self.down(x)))


class Fusion(nn.Module):
    """Every resolution of the next step is a sum over all of this one."""

    def __init__(self, widths):
        super().__init__()
        self.branches = nn.ModuleList(Basic(c, c) for c in widths)
        self.fuse = nn.ModuleList()
        for i, to in enumerate(widths):
            row = nn.ModuleList()
            for j, of in enumerate(widths):
                if j > i:
                    row.append(
                        nn.Sequential(linear(of, to), nn.Upsample(scale_factor=2 ** (j - i)))
                    )
                elif j == i:
                    row.append(None)
                else:
                    steps = [ConvBN(of, of, 3, 2) for _ in range(i - j - 1)]
                    row.append(nn.Sequential(*steps, linear(of, to, 3, 2)))
            self.fuse.append(row)

    def forward(self, x):
        x = [branch(each) for branch, each in zip(self.branches, x, strict=True)]
        out = []
        for i in range(len(self.fuse)):
            y = x[0] if i == 0 else self.fuse[i][0](x[0])
            for j in range(1, len(self.branches)):
                y = y + (x[j] if i == j else self.fuse[i][j](x[j]))
            out.append(F.relu(y))
        return out


class HRNet(nn.Module):
    def __init__(self, widths=(4, 6, 8)):
        super().__init__()
        a, b, c = widths
        self.stem = ConvBN(3, 8, 3)
        self.transition1 = nn.ModuleList([ConvBN(8, a, 3), ConvBN(8, b, 3, 2)])
        self.stage2 = nn.Sequential(Fusion((a, b)))
        self.transition2 = nn.ModuleList([None, None, nn.Sequential(ConvBN(b, c, 3, 2))])
        self.stage3 = nn.Sequential(Fusion(widths), Fusion(widths))
        self.last = nn.Sequential(
            nn.Conv2d(a + b + c, 10, 1), nn.BatchNorm2d(10), nn.ReLU(), nn.Conv2d(10, 2, 1)
        )

    def forward(self, x):
        x = self.stem(x)
        x = self.stage2([layer(x) for layer in self.transition1])
        x = [x[i] if layer is None else layer(x[-1]) for i, layer in enumerate(self.transition2)]
        x = self.stage3(x)
        h, w = x[0].size(2), x[0].size(3)
        up = [F.interpolate(y, size=(h, w), mode="bilinear", align_corners=False) for y in x[1:]]
        return self.last(torch.cat([x[0], *up], 1))


@wild(
    image(3, 16),
    stays=2,
    half="stem.conv 4, transition1.0.conv 2, stage3.0.fuse.2.0.0.conv 2, "
    "stage3.1.branches.1.conv1.conv 3, "
    "transition2.2.0.conv 4, last.0 5",
)
def hrnet():
    return HRNet()


class DLARoot(nn.Module):
    def __init__(self, i, o, residual):
        super().__init__()
        self.conv, self.bn, self.residual = (
            nn.Conv2d(i, o, 1, bias=False),
            nn.BatchNorm2d(o),
            residual,
        )

    def forward(self, *x):
        children = x
        y = self.bn(self.conv(torch.cat(x, 1)))
        if self.residual:
            y = y + children[0]
        return F.relu(y)


class DLABlock(nn.Module):
    def __init__(self, i, o, s=1):
        super().__init__()
        self.conv1, self.conv2 = ConvBN(i, o, 3, s), linear(o, o, 3)

    def forward(self, x, residual=None):
        residual = x if residual is None else residual
        return F.relu(self.conv2(self.conv1(x)) + residual)


class DLATree(nn.Module):
    def __init__(self, levels, i, o, s=1, level_root=False, root_dim=0, residual=False):
        super().__init__()
        root_dim = root_dim or 2 * o
        root_dim += i if level_root else 0
        if levels == 1:
            self.tree1, self.tree2 = DLABlock(i, o, s), DLABlock(o, o)
            self.root = DLARoot(root_dim, o, residual)
        else:
            self.tree1 = DLATree(levels - 1, i, o, s, residual=residual)
            self.tree2 = DLATree(levels - 1, o, o, root_dim=root_dim + o, residual=residual)
        self.levels, self.level_root = levels, level_root
        self.downsample = nn.MaxPool2d(s, stride=s) if s > 1 else None
        self.project = linear(i, o) if i != o else None

    def forward(self, x, residual=None, children=None):
        children = [] if children is None else children
        bottom = self.downsample(x) if self.downsample else x
        residual = self.project(bottom) if self.project else bottom
        if self.level_root:
            children.append(bottom)
        x1 = self.tree1(x, residual)
        if self.levels == 1:
            x2 = self.tree2(x1)
            return self.root(x2, x1, *children)
        children.append(x1)
        return self.tree2(x1, children=children)


@wild(
    image(),
    stays=5,
    half="base.conv 3, one.tree1.conv1.conv 4, one.root.conv 4, two.tree1.tree1.conv1.conv 5,"
    "two.tree2.root.conv 5",
)
def deep_layer_aggregation():
    return Chain(
        base=ConvBN(3, 6, 3),
        one=DLATree(1, 6, 8, 2),
        two=DLATree(2, 8, 10, 2, level_root=True, residual=True),
        head=Classifier(10),
    )


# -- searched and unusual cells --------------------------------------------------------------------


class OctConv(nn.Module):
    """Convolution of two frequencies, each a tensor of its own; either may be missing."""

    def __init__(self, i, o, k=3, alpha_in=0.5, alpha_out=0.5, s=1):
        super().__init__()
        li, lo, p = int(alpha_in * i), int(alpha_out * o), k // 2
        self.l2l = None if not (li and lo) else nn.Conv2d(li, lo, k, 1, p)
        self.l2h = None if li == 0 or alpha_out == 1 else nn.Conv2d(li, o - lo, k, 1, p)
        self.h2l = None if alpha_in == 1 or lo == 0 else nn.Conv2d(i - li, lo, k, 1, p)
        self.h2h = None if alpha_in == 1 or alpha_out == 1 else nn.Conv2d(i - li, o - lo, k, 1, p)
        self.s, self.down = s, nn.AvgPool2d(2, 2)

    def forward(self, x):
        high, low = x if isinstance(x, tuple) else (x, None)
        high = self.down(high) if self.s == 2 else high
        y_high, y_low = self.h2h(high), None
        if self.h2l is not None:
            y_low = self.h2l(self.down(high))
        if low is not None:
            y_high = y_high + F.interpolate(self.l2h(low), scale_factor=2, mode="nearest")
            if self.l2l is not None:
                low = self.down(low) if self.s == 2 else low
                y_low = self.l2l(low) + y_low
        return y_high if y_low is None else (y_high, y_low)


class OctBlock(nn.Module):
    def __init__(self, i, o, alpha_in=0.5, alpha_out=0.5):
        super().__init__()
        self.conv = OctConv(i, o, 3, alpha_in, alpha_out)
        low = int(o * alpha_out)
        self.bn_h = nn.BatchNorm2d(o - low)
        self.bn_l = nn.BatchNorm2d(low) if low else None

    def forward(self, x):
        y = self.conv(x)
        if isinstance(y, tuple):
            return F.relu(self.bn_h(y[0])), F.relu(self.bn_l(y[1]))
        return F.relu(self.bn_h(y))


@wild(
    image(),
    stays=5,
    half="first.conv.h2h 3, first.conv.h2l 3, middle.conv.l2h 4, middle.conv.l2l 4, "
    "last.conv.h2h 4",
)
def octave_net():
    return Chain(
        first=OctBlock(3, 12, 0, 0.5),
        middle=OctBlock(12, 16),
        last=OctBlock(16, 8, 0.5, 0),
        head=Classifier(8),
    )


class SeparableTwice(nn.Module):
    """ReLU, depthwise, pointwise, BatchNorm, twice."""

    def __init__(self, i, o, k, s=1):
        super().__init__()
        self.op = nn.Sequential(
            nn.ReLU(),
            nn.Conv2d(i, i, k, s, k // 2, groups=i, bias=False),
            nn.Conv2d(i, i, 1, bias=False),
            nn.BatchNorm2d(i),
            nn.ReLU(),
            nn.Conv2d(i, i, k, 1, k // 2, groups=i, bias=False),
            nn.Conv2d(i, o, 1, bias=False),
            nn.BatchNorm2d(o),
        )

    def forward(self, x):
        return self.op(x)


class ReluConvBN(nn.Sequential):
    def __init__(self, i, o, k=1, s=1):
        super().__init__(nn.ReLU(), nn.Conv2d(i, o, k, s, k // 2, bias=False), nn.BatchNorm2d(o))


class FactorizedReduce(nn.Module):
    """Two strided convolutions, the second one pixel further, joined."""

    def __init__(self, i, o):
        super().__init__()
        self.conv_1 = nn.Conv2d(i, o // 2, 1, 2, bias=False)
        self.conv_2 = nn.Conv2d(i, o // 2, 1, 2, bias=False)
        self.bn = nn.BatchNorm2d(o)

    def forward(self, x):
        x = F.relu(x)
        return self.bn(torch.cat([self.conv_1(x), self.conv_2(x[:, :, 1:, 1:])], 1))


class PathReduce(nn.Module):
    """NASNet's own: pad and cut by one, subsample, two convolutions."""

    def __init__(self, i, o):
        super().__init__()
        self.path_1 = nn.Sequential(
            nn.AvgPool2d(1, 2, count_include_pad=False), nn.Conv2d(i, o // 2, 1)
        )
        self.path_2 = nn.Sequential(
            nn.ZeroPad2d((-1, 1, -1, 1)),
            nn.AvgPool2d(1, 2, count_include_pad=False),
            nn.Conv2d(i, o // 2, 1),
        )
        self.bn = nn.BatchNorm2d(o // 2 * 2)

    def forward(self, x):
        x = F.relu(x)
        return self.bn(torch.cat([self.path_1(x), self.path_2(x)], 1))


class NASNetCell(nn.Module):
    """Five sums of two ops over two earlier cells, joined with one of the inputs."""

    def __init__(self, before, now, c, reduced_before=False):
        super().__init__()
        self.adjust = PathReduce(before, c) if reduced_before else ReluConvBN(before, c)
        self.conv_1x1 = ReluConvBN(now, c)
        self.left0, self.right0 = SeparableTwice(c, c, 5), SeparableTwice(c, c, 3)
        self.left1, self.right1 = SeparableTwice(c, c, 5), SeparableTwice(c, c, 3)
        self.left2 = nn.AvgPool2d(3, 1, 1, count_include_pad=False)
        self.left3, self.right3 = (nn.AvgPool2d(3, 1, 1, count_include_pad=False) for _ in "ab")
        self.left4 = SeparableTwice(c, c, 3)

    def forward(self, x, x_prev):
        prev, now = self.adjust(x_prev), self.conv_1x1(x)
        s0 = self.left0(now) + self.right0(prev)
        s1 = self.left1(prev) + self.right1(prev)
        s2 = self.left2(now) + prev
        s3 = self.left3(prev) + self.right3(prev)
        s4 = self.left4(now) + now
        return torch.cat([prev, s0, s1, s2, s3, s4], 1)


class NASNetReduce(nn.Module):
    def __init__(self, before, now, c):
        super().__init__()
        self.adjust, self.conv_1x1 = ReluConvBN(before, c), ReluConvBN(now, c)
        self.left0, self.right0 = SeparableTwice(c, c, 5, 2), SeparableTwice(c, c, 5, 2)
        self.left1, self.right1 = nn.MaxPool2d(3, 2, 1), SeparableTwice(c, c, 5, 2)
        self.left2, self.right2 = nn.AvgPool2d(3, 2, 1), SeparableTwice(c, c, 5, 2)
        self.right3 = nn.AvgPool2d(3, 1, 1)
        self.left4, self.right4 = SeparableTwice(c, c, 3), nn.MaxPool2d(3, 2, 1)

    def forward(self, x, x_prev):
        prev, now = self.adjust(x_prev), self.conv_1x1(x)
        s0 = self.left0(now) + self.right0(prev)
        s1 = self.left1(now) + self.right1(prev)
        s2 = self.left2(now) + self.right2(prev)
        s3 = self.right3(s0) + s1
        s4 = self.left4(s0) + self.right4(now)
        return torch.cat([s1, s2, s3, s4], 1)


class NASNet(nn.Module):
    def __init__(self, c=4):
        super().__init__()
        self.conv0 = linear(3, 6, 3)
        self.cell0 = NASNetCell(6, 6, c)
        self.reduce = NASNetReduce(6, 6 * c, c)
        self.cell1 = NASNetCell(6 * c, 4 * c, c, reduced_before=True)
        self.head = Classifier(6 * c)

    def forward(self, x):
        x0 = self.conv0(x)
        x1 = self.cell0(x0, x0)
        x2 = self.reduce(x1, x0)
        x3 = self.cell1(x2, x1)
        return self.head(F.relu(x3))


@wild(
    image(),
    stays=5,
    half="conv0.conv 3, cell0.conv_1x1.1 2, cell0.left0.op.2 2, reduce.right0.op.6 2,"
    "cell1.adjust.path_1.1 1, cell1.adjust.path_2.2 1",
)
def nasnet():
    return NASNet()


class PNASCell(nn.Module):
    """Five sums whose outputs are all joined; one branch convolves with a factorised kernel."""

    def __init__(self, left, right, c, s=1):
        super().__init__()
        self.conv_prev = FactorizedReduce(left, c) if s == 0 else ReluConvBN(left, c)
        self.conv_1x1 = ReluConvBN(right, c)
        s = max(s, 1)
        self.l0, self.r0 = SeparableTwice(c, c, 5, s), nn.MaxPool2d(3, s, 1)
        self.l1, self.r1 = SeparableTwice(c, c, 7, s), nn.MaxPool2d(3, s, 1)
        self.l2, self.r2 = SeparableTwice(c, c, 5, s), SeparableTwice(c, c, 3, s)
        self.l3, self.r3 = SeparableTwice(c, c, 3), nn.MaxPool2d(3, s, 1)
        self.l4 = SeparableTwice(c, c, 3, s)
        self.r4 = ReluConvBN(c, c, 1, s) if s > 1 else None

    def forward(self, left, right):
        a, b = self.conv_prev(left), self.conv_1x1(right)
        s0 = self.l0(a) + self.r0(a)
        s1 = self.l1(b) + self.r1(b)
        s2 = self.l2(b) + self.r2(b)
        s3 = self.l3(s2) + self.r3(b)
        s4 = self.l4(a) + (self.r4(b) if self.r4 is not None else b)
        return torch.cat([s0, s1, s2, s3, s4], 1)


class PNASNet(nn.Module):
    def __init__(self, c=4):
        super().__init__()
        self.conv_0 = linear(3, 8, 3)
        self.cell_0 = PNASCell(8, 8, c, 2)
        self.cell_1 = PNASCell(8, 5 * c, c, 0)
        self.head = Classifier(5 * c)

    def forward(self, x):
        x0 = self.conv_0(x)
        x1 = self.cell_0(x0, x0)
        x2 = self.cell_1(x0, x1)
        return self.head(F.relu(x2))


@wild(
    image(),
    stays=5,
    half="conv_0.conv 4, cell_0.conv_1x1.1 2, cell_0.l1.op.2 2, cell_1.conv_prev.conv_1 1",
)
def pnasnet():
    return PNASNet()


class Zero(nn.Module):
    def __init__(self, s):
        super().__init__()
        self.s = s

    def forward(self, x):
        return x.mul(0.0) if self.s == 1 else x[:, :, :: self.s, :: self.s].mul(0.0)


class DilatedConv(nn.Sequential):
    def __init__(self, c, k, s):
        super().__init__(
            nn.ReLU(),
            nn.Conv2d(c, c, k, s, k - 1, dilation=2, groups=c, bias=False),
            nn.Conv2d(c, c, 1, bias=False),
            nn.BatchNorm2d(c, affine=False),
        )


OPS = {
    "none": lambda c, s: Zero(s),
    "max_pool": lambda c, s: nn.Sequential(nn.MaxPool2d(3, s, 1), nn.BatchNorm2d(c, affine=False)),
    "skip": lambda c, s: nn.Identity() if s == 1 else FactorizedReduce(c, c),
    "sep_conv": lambda c, s: SeparableTwice(c, c, 3, s),
    "dil_conv": lambda c, s: DilatedConv(c, 3, s),
}


class MixedOp(nn.Module):
    """All ops at once, weighed."""

    def __init__(self, c, s):
        super().__init__()
        self._ops = nn.ModuleList(make(c, s) for make in OPS.values())

    def forward(self, x, weights):
        return sum(w * op(x) for w, op in zip(weights, self._ops, strict=True))


class DARTSCell(nn.Module):
    def __init__(self, before, now, c, reduction, reduction_before, steps=2):
        super().__init__()
        pre = FactorizedReduce(before, c) if reduction_before else ReluConvBN(before, c)
        self.preprocess0, self.preprocess1 = pre, ReluConvBN(now, c)
        self._steps = steps
        self._ops = nn.ModuleList(
            MixedOp(c, 2 if reduction and j < 2 else 1) for i in range(steps) for j in range(2 + i)
        )

    def forward(self, s0, s1, weights):
        states = [self.preprocess0(s0), self.preprocess1(s1)]
        offset = 0
        for _ in range(self._steps):
            s = sum(self._ops[offset + j](h, weights[offset + j]) for j, h in enumerate(states))
            offset += len(states)
            states.append(s)
        return torch.cat(states[-2:], dim=1)


class DARTS(nn.Module):
    """The supernet during search: architecture parameters through a softmax over ops."""

    def __init__(self, c=4):
        super().__init__()
        self.stem = linear(3, 6, 3)
        self.cells = nn.ModuleList(
            [
                DARTSCell(6, 6, c, False, False),
                DARTSCell(6, 2 * c, c, True, False),
                DARTSCell(2 * c, 2 * c, c, False, True),
            ]
        )
        self.reduces = [False, True, False]
        self.alphas_normal = nn.Parameter(1e-3 * torch.randn(5, len(OPS)))
        self.alphas_reduce = nn.Parameter(1e-3 * torch.randn(5, len(OPS)))
        self.head = Classifier(2 * c)

    def forward(self, x):
        s0 = s1 = self.stem(x)
        for cell, reduces in zip(self.cells, self.reduces, strict=True):
            weights = F.softmax(self.alphas_reduce if reduces else self.alphas_normal, dim=-1)
            s0, s1 = s1, cell(s0, s1, weights)
        return self.head(s1)


@wild(image(), stays=5, half="stem.conv 3, cells.0.preprocess0.1 2, cells.1._ops.0._ops.3.op.2 2")
def darts_supernet():
    return DARTS()


class LearnedGroupConv(nn.Module):
    """CondenseNet when trained: pick inputs by an index, then a grouped convolution."""

    def __init__(self, i, o, groups, keep):
        super().__init__()
        self.norm = nn.BatchNorm2d(keep)
        self.conv = nn.Conv2d(keep, o, 1, groups=groups, bias=False)
        self.register_buffer("index", torch.randperm(i)[:keep])

    def forward(self, x):
        x = torch.index_select(x, 1, self.index)
        return self.conv(F.relu(self.norm(x)))


def shuffle_channels(x, groups):
    n, c, h, w = x.size()
    return x.view(n, groups, c // groups, h, w).transpose(1, 2).contiguous().view(n, c, h, w)


class CondenseLayer(nn.Module):
    def __init__(self, i, growth, groups=2, bottleneck=2):
        super().__init__()
        self.groups = groups
        self.conv_1 = LearnedGroupConv(i, bottleneck * growth, groups, i // 2)
        self.norm = nn.BatchNorm2d(bottleneck * growth)
        self.conv_2 = nn.Conv2d(
            bottleneck * growth, growth, 3, padding=1, groups=groups, bias=False
        )

    def forward(self, x):
        y = shuffle_channels(self.conv_1(x), self.groups)
        y = self.conv_2(F.relu(self.norm(y)))
        return torch.cat([x, y], 1)


@wild(
    image(), stays=5, half="stem 10, one.conv_1.conv 4, one.conv_2 2, two.conv_2 2"
)  # blocks of two layers overlap
def condensenet():
    return Chain(
        stem=nn.Conv2d(3, 16, 3, padding=1),
        one=CondenseLayer(16, 4),
        two=CondenseLayer(20, 4),
        norm=nn.BatchNorm2d(24),
        head=Classifier(24),
    )


class GhostModule(nn.Module):
    def __init__(self, i, o, relu=True):
        super().__init__()
        self.o = o
        first = math.ceil(o / 2)
        self.primary_conv = ConvBN(i, first, 1, act=nn.ReLU() if relu else nn.Identity())
        self.cheap = ConvBN(first, first, 3, g=first, act=nn.ReLU() if relu else nn.Identity())

    def forward(self, x):
        x1 = self.primary_conv(x)
        return torch.cat([x1, self.cheap(x1)], dim=1)[:, : self.o, :, :]


class HardSE(nn.Module):
    def __init__(self, c, r):
        super().__init__()
        self.reduce, self.expand = nn.Conv2d(c, r, 1), nn.Conv2d(r, c, 1)

    def forward(self, x):
        y = F.adaptive_avg_pool2d(x, 1)
        return x * (F.relu6(self.expand(F.relu(self.reduce(y))) + 3.0) / 6.0)


class GhostBottleneck(nn.Module):
    def __init__(self, i, mid, o, s=1, se=True):
        super().__init__()
        self.ghost1 = GhostModule(i, mid)
        self.dw = linear(mid, mid, 3, s, g=mid) if s > 1 else None
        self.se = HardSE(mid, 4) if se else None
        self.ghost2 = GhostModule(mid, o, relu=False)
        self.shortcut = (
            nn.Sequential()
            if i == o and s == 1
            else nn.Sequential(linear(i, i, 3, s, g=i), linear(i, o))
        )

    def forward(self, x):
        y = self.ghost1(x)
        y = self.dw(y) if self.dw is not None else y
        y = self.se(y) if self.se is not None else y
        return self.ghost2(y) + self.shortcut(x)


@wild(
    image(),
    stays=5,
    half="stem.conv 4, one.ghost1.primary_conv.conv 6, one.se.reduce 2, two.ghost2.cheap.conv 4",
)
def ghostnet():
    return Chain(
        stem=ConvBN(3, 8, 3),
        one=GhostBottleneck(8, 24, 8),
        two=GhostBottleneck(8, 24, 16, 2),
        head=Classifier(16),
    )


@wild(image(), stays=5, half="stem.conv 4, odd.primary_conv.conv 3, odd.cheap.conv 3")
def ghost_of_an_odd_width():
    return Chain(stem=ConvBN(3, 8, 3), odd=GhostModule(8, 9), head=Classifier(9))


class RevBlock(nn.Module):
    """Additive coupling of channel halves."""

    def __init__(self, c):
        super().__init__()
        self.f, self.g = Basic(c // 2, c // 2), Basic(c // 2, c // 2)

    def forward(self, x):
        x1, x2 = torch.chunk(x, 2, dim=1)
        y1 = x1 + self.f(x2)
        y2 = x2 + self.g(y1)
        return torch.cat((y1, y2), dim=1)


@wild(image(), stays=5, half="stem.conv 6, one.f.conv1.conv 3, one.g.conv2.conv 3")
def revnet():
    return Chain(stem=ConvBN(3, 12, 3), one=RevBlock(12), two=RevBlock(12), head=Classifier(12))


def squeeze2(x, b=2):
    """Pixels into channels, as i-RevNet does it: each position is a run of all channels."""
    pixels = x.permute(0, 2, 3, 1)
    n, h, _, c = pixels.size()
    stack = [each.contiguous().view(n, h // b, c * b * b) for each in pixels.split(b, 2)]
    return torch.stack(stack, 1).permute(0, 2, 1, 3).permute(0, 3, 1, 2)


class IRevBlock(nn.Module):
    def __init__(self, c, s):
        super().__init__()
        self.s = s
        wide = c * s * s
        self.bottleneck = nn.Sequential(
            ConvBN(c, 6, 3, s), ConvBN(6, 6, 3), nn.Conv2d(6, wide, 3, padding=1, bias=False)
        )

    def forward(self, x):
        x1, x2 = x
        fx2 = self.bottleneck(x2)
        if self.s == 2:
            x1, x2 = squeeze2(x1), squeeze2(x2)
        return x2, fx2 + x1


class IRevNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = ConvBN(3, 8, 3)
        self.stack = nn.ModuleList([IRevBlock(4, 1), IRevBlock(4, 2), IRevBlock(16, 1)])
        self.bn, self.head = nn.BatchNorm2d(32), Classifier(32)

    def forward(self, x):
        x = self.stem(x)
        out = (x[:, :4], x[:, 4:])
        for block in self.stack:
            out = block(out)
        return self.head(F.relu(self.bn(torch.cat((out[0], out[1]), 1))))


@wild(image(), stays=5, half="stem.conv 4, stack.0.bottleneck.0.conv 3, stack.1.bottleneck.2 8")
def i_revnet():
    return IRevNet()


# -- one weight, many places -----------------------------------------------------------------------


class Siamese(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(ConvBN(3, 8, 3), ConvBN(8, 12, 3), nn.AdaptiveAvgPool2d(2))
        self.fc = nn.Linear(12 * 2 * 2, 10)
        self.out = nn.Linear(10, 1)

    def embed(self, x):
        return self.fc(self.body(x).view(x.size(0), -1))

    def forward(self, a, b):
        return torch.sigmoid(self.out(torch.abs(self.embed(a) - self.embed(b))))


@wild(image(), image(), stays=0, half="body.0.conv 4, body.1.conv 6, fc 5")
def siamese_pair():
    return Siamese()


class Correlation(nn.Module):
    """Siamese tracking: the template's features are the kernels, one a channel."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(ConvBN(3, 8, 3), ConvBN(8, 6, 3))
        self.cls = nn.Conv2d(6, 2, 1)

    def forward(self, z, x):
        kernel, x = self.body(z), self.body(x)
        batch, c = kernel.shape[:2]
        x = x.view(1, batch * c, x.size(2), x.size(3))
        kernel = kernel.view(batch * c, 1, kernel.size(2), kernel.size(3))
        out = F.conv2d(x, kernel, groups=batch * c)
        return self.cls(out.view(batch, c, out.size(2), out.size(3)))


@wild(image(3, 4), image(3, 8), stays=2, half="body.0.conv 4, body.1.conv 3")
def siamese_tracker():
    return Correlation()


class Recurrent(nn.Module):
    """One block used again and again, its state added to its input."""

    def __init__(self):
        super().__init__()
        self.stem, self.block, self.head = ConvBN(3, 8, 3), Basic(8, 8), Classifier(8)

    def forward(self, x):
        state = start = self.stem(x)
        for _ in range(3):
            state = self.block(state + start)
        return self.head(state)


@wild(image(), stays=5, half="stem.conv 4, block.conv1.conv 4")
def recurrent_block():
    return Recurrent()


class SharedHead(nn.Module):
    """A pyramid whose levels share one head but have scales of their own."""

    def __init__(self, c=8):
        super().__init__()
        self.c2, self.c3, self.c4 = ConvBN(3, 6, 3), ConvBN(6, 8, 3, 2), ConvBN(8, 10, 3, 2)
        self.lateral = nn.ModuleList(nn.Conv2d(i, c, 1) for i in (6, 8, 10))
        self.smooth = nn.ModuleList(nn.Conv2d(c, c, 3, padding=1) for _ in range(3))
        self.tower = nn.Sequential(nn.Conv2d(c, c, 3, padding=1), nn.GroupNorm(2, c), nn.ReLU())
        self.cls, self.box = nn.Conv2d(c, 2 * 3, 3, padding=1), nn.Conv2d(c, 4, 3, padding=1)
        self.scales = nn.Parameter(torch.ones(3))

    def forward(self, x):
        feats = [self.c2(x)]
        feats.append(self.c3(feats[-1]))
        feats.append(self.c4(feats[-1]))
        maps = [layer(f) for layer, f in zip(self.lateral, feats, strict=True)]
        for i in (1, 0):
            maps[i] = maps[i] + F.interpolate(maps[i + 1], size=maps[i].shape[-2:], mode="nearest")
        maps = [layer(f) for layer, f in zip(self.smooth, maps, strict=True)]
        found = collections.OrderedDict()
        for i, level in enumerate(maps):
            t = self.tower(level)
            cls = self.cls(t)
            n, _, h, w = cls.shape
            cls = cls.view(n, -1, 3, h, w).permute(0, 3, 4, 1, 2).reshape(n, -1, 3)
            found[f"p{i}"] = {"cls": cls, "box": F.relu(self.box(t) * self.scales[i])}
        return found


@wild(image(), stays=10, half="c2.conv 3, lateral.0 4, smooth.1 4, tower.0 4")
def shared_head():
    return SharedHead()


class TiedLanguage(nn.Module):
    """Words in, words out, by one table; a recurrent-free mixer between."""

    def __init__(self, words=11, dim=8):
        super().__init__()
        self.embed, self.position = nn.Embedding(words, dim), nn.Embedding(5, dim)
        self.norm = nn.LayerNorm(dim)
        self.up, self.down = nn.Linear(dim, 16), nn.Linear(16, dim)
        self.decode = nn.Linear(dim, words, bias=False)
        self.decode.weight = self.embed.weight

    def forward(self, ids):
        where = torch.arange(ids.shape[1], device=ids.device).unsqueeze(0)
        x = self.embed(ids) + self.position(where)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.decode(x)


@wild(
    torch.tensor([[1, 5, 2, 0, 9], [3, 10, 4, 4, 6]]),
    stays=0,
    half="embed 11, position 5, up 8, down 4, norm 4",
)
def tied_embeddings():
    return TiedLanguage()


# -- volumes, sound, text in pictures --------------------------------------------------------------


class Volume(nn.Module):
    """A U-Net for scans: instance norm, leaky ReLU, residuals, outputs at two depths."""

    def __init__(self, c=(4, 6, 8)):
        super().__init__()
        self.enc = nn.ModuleList(
            self.block(i, o, s) for i, o, s in zip((1, *c), c, (1, 2, 2), strict=False)
        )
        self.up = nn.ModuleList(
            nn.ConvTranspose3d(c[i + 1], c[i], 2, 2, bias=False) for i in (1, 0)
        )
        self.dec = nn.ModuleList(self.block(2 * c[i], c[i]) for i in (1, 0))
        self.seg = nn.ModuleList(nn.Conv3d(c[i], 2, 1) for i in (1, 0))

    @staticmethod
    def block(i, o, s=1):
        return nn.Sequential(
            nn.Conv3d(i, o, 3, s, 1),
            nn.InstanceNorm3d(o, affine=True),
            nn.LeakyReLU(0.01, inplace=True),
            nn.Conv3d(o, o, 3, 1, 1),
            nn.InstanceNorm3d(o, affine=True),
            nn.LeakyReLU(0.01, inplace=True),
        )

    def forward(self, x):
        skips, outputs = [], []
        for block in self.enc:
            x = block(x)
            skips.append(x)
        skips.pop()
        for up, dec, seg in zip(self.up, self.dec, self.seg, strict=True):
            x = dec(torch.cat((up(x), skips.pop()), 1))
            outputs.append(seg(x))
        return tuple(outputs[::-1])


@wild(tensor(2, 1, 8, 8, 8), stays=4, half="enc.0.0 2, enc.2.3 4, up.0 4, dec.1.0 2, enc.1.1 3")
def medical_unet():
    return Volume()


class CausalConv(nn.Module):
    def __init__(self, i, o, k, d):
        super().__init__()
        self.pad, self.conv = (k - 1) * d, nn.Conv1d(i, o, k, dilation=d)

    def forward(self, x):
        return self.conv(F.pad(x, (self.pad, 0)))


class WaveBlock(nn.Module):
    """Gated: one convolution whose halves are filter and gate; a residual and a skip."""

    def __init__(self, residual, gate, skip, d):
        super().__init__()
        self.conv = CausalConv(residual, 2 * gate, 2, d)
        self.condition = nn.Conv1d(3, 2 * gate, 1)
        self.res, self.skip = nn.Conv1d(gate, residual, 1), nn.Conv1d(gate, skip, 1)

    def forward(self, x, c):
        a, b = (self.conv(x) + self.condition(c)).chunk(2, dim=1)
        z = torch.tanh(a) * torch.sigmoid(b)
        return (self.res(z) + x) * math.sqrt(0.5), self.skip(z)


class WaveNet(nn.Module):
    def __init__(self):
        super().__init__()
        self.first = CausalConv(1, 8, 2, 1)
        self.layers = nn.ModuleList(WaveBlock(8, 6, 10, 2**i) for i in range(3))
        self.last = nn.Sequential(nn.ReLU(), nn.Conv1d(10, 10, 1), nn.ReLU(), nn.Conv1d(10, 4, 1))

    def forward(self, x, c):
        x, skips = self.first(x), 0
        for layer in self.layers:
            x, skip = layer(x, c)
            skips = skips + skip
        return self.last(skips * math.sqrt(1.0 / len(self.layers)))


@wild(
    tensor(2, 1, 16),
    tensor(2, 3, 16),
    stays=4,
    half="first.conv 4, layers.0.conv.conv 6, layers.0.condition 6, layers.1.res 4, "
    "layers.2.skip 5, last.1 5",
)
def wavenet():
    return WaveNet()


class GlobalNorm(nn.Module):
    """Normalisation over channels and time, by hand."""

    def __init__(self, c):
        super().__init__()
        self.gamma, self.beta = (
            nn.Parameter(torch.ones(1, c, 1)),
            nn.Parameter(torch.zeros(1, c, 1)),
        )

    def forward(self, y):
        mean = y.mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        var = (torch.pow(y - mean, 2)).mean(dim=1, keepdim=True).mean(dim=2, keepdim=True)
        return self.gamma * (y - mean) / torch.pow(var + 1e-8, 0.5) + self.beta


class TasBlock(nn.Module):
    def __init__(self, c, hidden, d, norm):
        super().__init__()
        self.net = nn.Sequential(
            nn.Conv1d(c, hidden, 1, bias=False),
            nn.PReLU(),
            norm(hidden),
            nn.Conv1d(hidden, hidden, 3, padding=d, dilation=d, groups=hidden, bias=False),
            nn.PReLU(),
            norm(hidden),
            nn.Conv1d(hidden, c, 1, bias=False),
        )

    def forward(self, x):
        return self.net(x) + x


class ConvTasNet(nn.Module):
    """Encode sound, a mask for each speaker, decode by overlap and add."""

    def __init__(self, norm, n=12, length=4, c=8, hidden=10, speakers=2):
        super().__init__()
        self.speakers, self.n = speakers, n
        self.encoder = nn.Conv1d(1, n, length, stride=length // 2, bias=False)
        self.norm = norm(n)
        self.bottleneck = nn.Conv1d(n, c, 1, bias=False)
        self.blocks = nn.Sequential(*(TasBlock(c, hidden, 2**i, norm) for i in range(2)))
        self.mask = nn.Conv1d(c, speakers * n, 1, bias=False)
        self.basis = nn.Linear(n, length, bias=False)

    def forward(self, mixture):
        w = F.relu(self.encoder(torch.unsqueeze(mixture, 1)))
        m, n, k = w.size()
        score = self.mask(self.blocks(self.bottleneck(self.norm(w))))
        mask = F.relu(score.view(m, self.speakers, n, k))
        source = torch.unsqueeze(w, 1) * mask
        frames = self.basis(torch.transpose(source, 2, 3))
        return overlap_and_add(frames, frames.size(-1) // 2)


def overlap_and_add(signal, step):
    outer, (frames, length) = signal.size()[:-2], signal.size()[-2:]
    sub = math.gcd(length, step)
    size = step * (frames - 1) + length
    pieces = signal.view(*outer, -1, sub)
    where = torch.arange(0, size // sub, device=signal.device).unfold(0, length // sub, step // sub)
    where = where.contiguous().view(-1)
    result = signal.new_zeros(*outer, size // sub, sub)
    result.index_add_(-2, where, pieces)
    return result.view(*outer, -1)


@wild(tensor(2, 18), stays=2, half="encoder 6, bottleneck 4, blocks.0.net.0 5, mask 12")
def conv_tasnet():
    return ConvTasNet(nn.BatchNorm1d)


@wild(
    tensor(2, 18),
    stays=2,
    half="encoder 6, bottleneck 4, blocks.0.net.0 5, mask 12",
    mixing="all",
    oracle="narrowed",
)
def conv_tasnet_with_global_norm():
    return ConvTasNet(GlobalNorm)


class M5(nn.Module):
    """Raw waveforms, a pool as long as what is left of them."""

    def __init__(self, c=8):
        super().__init__()
        self.conv1, self.bn1 = nn.Conv1d(1, c, 8, stride=4), nn.BatchNorm1d(c)
        self.conv2, self.bn2 = nn.Conv1d(c, 2 * c, 3), nn.BatchNorm1d(2 * c)
        self.pool1, self.pool2 = nn.MaxPool1d(2), nn.MaxPool1d(2)
        self.fc1 = nn.Linear(2 * c, 5)

    def forward(self, x):
        x = self.pool1(F.relu(self.bn1(self.conv1(x))))
        x = self.pool2(F.relu(self.bn2(self.conv2(x))))
        x = F.avg_pool1d(x, x.shape[-1])
        return F.log_softmax(self.fc1(x.permute(0, 2, 1)), dim=2)


@wild(tensor(2, 1, 64), stays=5, half="conv1 4, conv2 8")
def m5():
    return M5()


class Chomp(nn.Module):
    def __init__(self, size):
        super().__init__()
        self.size = size

    def forward(self, x):
        return x[:, :, : -self.size].contiguous()


class TemporalBlock(nn.Module):
    def __init__(self, i, o, k, d, norm):
        super().__init__()
        p = (k - 1) * d
        self.conv1, self.conv2 = (norm(nn.Conv1d(c, o, k, padding=p, dilation=d)) for c in (i, o))
        self.chomp1, self.chomp2 = Chomp(p), Chomp(p)
        self.net = nn.Sequential(
            self.conv1, self.chomp1, nn.ReLU(), self.conv2, self.chomp2, nn.ReLU()
        )
        self.downsample = nn.Conv1d(i, o, 1) if i != o else None

    def forward(self, x):
        return F.relu(self.net(x) + (x if self.downsample is None else self.downsample(x)))


class TCN(nn.Module):
    def __init__(self, norm):
        super().__init__()
        self.network = nn.Sequential(
            *(
                TemporalBlock(i, o, 3, 2**n, norm)
                for n, (i, o) in enumerate([(2, 8), (8, 8), (8, 6)])
            )
        )
        self.linear = nn.Linear(6, 3)

    def forward(self, x):
        return self.linear(self.network(x)[:, :, -1])


TCN_STAYS = 2 + 6 * 3 + 3  # what is read from the input, kernels, outputs


@wild(
    tensor(2, 2, 12),
    stays=TCN_STAYS,
    half="network.0.conv1.parametrizations.weight.original1 4, network.2.conv2.bias 3",
)
def temporal_convolutions():
    return TCN(torch.nn.utils.parametrizations.weight_norm)


def old_weight_norm(layer):
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return torch.nn.utils.weight_norm(layer)


@wild(
    tensor(2, 2, 12),
    stays=TCN_STAYS,
    half="network.0.conv1.weight_v 4, network.0.conv1.weight_g 4, network.2.conv2.bias 3",
)
def temporal_convolutions_with_hooks():
    model = TCN(old_weight_norm)
    with torch.no_grad():
        model(
            torch.randn(2, 2, 12)
        )  # before it has run, its weights are no leaves, and no copies can be made
    return model


class BiLSTM(nn.Module):
    def __init__(self, i, hidden, o):
        super().__init__()
        self.rnn, self.embedding = nn.LSTM(i, hidden, bidirectional=True), nn.Linear(hidden * 2, o)

    def forward(self, x):
        recurrent, _ = self.rnn(x)
        t, b, h = recurrent.size()
        return self.embedding(recurrent.view(t * b, h)).view(t, b, -1)


class CRNN(nn.Module):
    """Text in pictures: columns of features through two recurrent layers."""

    def __init__(self, letters=6):
        super().__init__()
        self.cnn = nn.Sequential(
            nn.Conv2d(1, 6, 3, 1, 1),
            nn.ReLU(True),
            nn.MaxPool2d(2, 2),
            nn.Conv2d(6, 8, 3, 1, 1),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.MaxPool2d((2, 2), (2, 1), (0, 1)),
            nn.Conv2d(8, 10, 2, 1, 0),
            nn.ReLU(True),
        )
        self.rnn = nn.Sequential(BiLSTM(10, 6, 8), BiLSTM(8, 6, letters))

    def forward(self, x):
        conv = self.cnn(x)
        b, c, h, w = conv.size()
        assert h == 1, "the height of conv must be 1"
        return self.rnn(conv.squeeze(2).permute(2, 0, 1))


@wild(
    tensor(2, 1, 8, 16),
    stays=6,
    half="cnn.0 3, cnn.3 4, cnn.7 5, rnn.0.embedding 4, rnn.1.rnn.weight_hh_l0_reverse 12",
)
def crnn():
    return CRNN()


# -- super-resolution and generators ---------------------------------------------------------------


class EDSR(nn.Module):
    """Residual blocks without norms, a long skip, upsampling by sub-pixels."""

    def __init__(self, c=8, scale=4):
        super().__init__()
        self.register_buffer("mean", torch.tensor([0.4, 0.5, 0.3]).view(1, 3, 1, 1))
        self.head = nn.Conv2d(3, c, 3, padding=1)
        self.body = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, c, 3, padding=1), nn.ReLU(True), nn.Conv2d(c, c, 3, padding=1)
            )
            for _ in range(2)
        )
        self.body_end = nn.Conv2d(c, c, 3, padding=1)
        up = []
        for _ in range(int(math.log2(scale))):
            up += [nn.Conv2d(c, 4 * c, 3, padding=1), nn.PixelShuffle(2)]
        self.tail = nn.Sequential(*up, nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, x):
        x = start = self.head(x - self.mean)
        for block in self.body:
            x = x + block(x).mul(0.1)
        return self.tail(self.body_end(x) + start) + self.mean


@wild(image(), stays=3, half="head 4, body.0.0 4, body.1.2 4, tail.0 16, tail.2 16")
def edsr():
    return EDSR()


class ESPCN(nn.Module):
    def __init__(self, scale=3):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = (
            nn.Conv2d(1, 8, 5, padding=2),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.Conv2d(6, scale**2, 3, padding=1),
        )
        self.shuffle = nn.PixelShuffle(scale)

    def forward(self, x):
        return torch.sigmoid(
            self.shuffle(self.conv3(torch.tanh(self.conv2(torch.tanh(self.conv1(x))))))
        )


@wild(image(1), stays=9, half="conv1 4, conv2 3, conv3 9")
def espcn():
    return ESPCN()


class RCAB(nn.Module):
    def __init__(self, c, reduction=2):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(c, c, 3, padding=1), nn.Conv2d(c, c, 3, padding=1)
        self.gate = nn.Sequential(
            nn.AdaptiveAvgPool2d(1),
            nn.Conv2d(c, c // reduction, 1),
            nn.ReLU(True),
            nn.Conv2d(c // reduction, c, 1),
            nn.Sigmoid(),
        )

    def forward(self, x):
        y = self.conv2(F.relu(self.conv1(x)))
        return x + y * self.gate(y)


class ResidualGroup(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.body = nn.Sequential(RCAB(c), RCAB(c), nn.Conv2d(c, c, 3, padding=1))

    def forward(self, x):
        return x + self.body(x)


@wild(
    image(),
    stays=3,
    half="head 4, body.0.body.0.conv1 4, body.0.body.1.gate.1 2, body.1.body.2 4, tail.0 16",
)
def rcan():
    c = 8
    return Chain(
        head=nn.Conv2d(3, c, 3, padding=1),
        body=nn.Sequential(ResidualGroup(c), ResidualGroup(c)),
        tail=nn.Sequential(
            nn.Conv2d(c, 4 * c, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(c, 3, 3, padding=1)
        ),
    )


class LapSRN(nn.Module):
    """A pyramid: features and picture are both doubled, residuals are added at each level."""

    def __init__(self, c=8):
        super().__init__()
        self.conv_input = nn.Conv2d(1, c, 3, padding=1)
        self.embed = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c, c, 3, padding=1),
                nn.LeakyReLU(0.2),
                nn.ConvTranspose2d(c, c, 4, 2, 1),
                nn.LeakyReLU(0.2),
            )
            for _ in range(2)
        )
        self.up = nn.ModuleList(nn.ConvTranspose2d(1, 1, 4, 2, 1, bias=False) for _ in range(2))
        self.residual = nn.ModuleList(nn.Conv2d(c, 1, 3, padding=1) for _ in range(2))

    def forward(self, x):
        f, found = F.leaky_relu(self.conv_input(x), 0.2), []
        for embed, up, residual in zip(self.embed, self.up, self.residual, strict=True):
            f = embed(f)
            x = up(x) + residual(f)
            found.append(x)
        return found


@wild(image(1), stays=0, half="conv_input 4, embed.0.0 4, embed.0.2 4, embed.1.2 4")
def lapsrn():
    return LapSRN()


class DCGAN(nn.Module):
    """A linear layer seen as a small picture, and transposed convolutions."""

    def __init__(self):
        super().__init__()
        self.init_size = 4
        self.l1 = nn.Sequential(nn.Linear(6, 8 * self.init_size**2))
        self.blocks = nn.Sequential(
            nn.BatchNorm2d(8),
            nn.ConvTranspose2d(8, 8, 4, 2, 1, bias=False),
            nn.BatchNorm2d(8),
            nn.ReLU(True),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(8, 6, 3, padding=1),
            nn.BatchNorm2d(6, 0.8),
            nn.LeakyReLU(0.2, inplace=True),
            nn.Conv2d(6, 3, 3, padding=1),
            nn.Tanh(),
        )

    def forward(self, z):
        out = self.l1(z)
        out = out.view(out.shape[0], 8, self.init_size, self.init_size)
        return self.blocks(out)


@wild(tensor(2, 6), stays=3, half="l1.0 64, blocks.1 4, blocks.2 4, blocks.5 3")
def dcgan_generator():
    return DCGAN()


class ModulatedConv(nn.Module):
    """StyleGAN2: weights scaled by a style, normalised, one set for each picture of the batch."""

    def __init__(self, i, o, k, style, demodulate=True, upsample=False):
        super().__init__()
        self.i, self.o, self.k = i, o, k
        self.scale = 1 / math.sqrt(i * k**2)
        self.weight = nn.Parameter(torch.randn(1, o, i, k, k))
        self.modulation = nn.Linear(style, i)
        self.demodulate, self.upsample = demodulate, upsample

    def forward(self, x, style):
        batch, c, h, w = x.shape
        style = self.modulation(style).view(batch, 1, c, 1, 1)
        weight = self.scale * self.weight * style
        if self.demodulate:
            demod = torch.rsqrt(weight.pow(2).sum([2, 3, 4]) + 1e-8)
            weight = weight * demod.view(batch, self.o, 1, 1, 1)
        weight = weight.view(batch * self.o, c, self.k, self.k)
        if self.upsample:
            x = x.view(1, batch * c, h, w)
            weight = weight.view(batch, self.o, c, self.k, self.k)
            weight = weight.transpose(1, 2).reshape(batch * c, self.o, self.k, self.k)
            out = F.conv_transpose2d(x, weight, padding=0, stride=2, groups=batch)
        else:
            x = x.view(1, batch * c, h, w)
            out = F.conv2d(x, weight, padding=self.k // 2, groups=batch)
        _, _, h, w = out.shape
        return out.view(batch, self.o, h, w)


class StyledConv(nn.Module):
    def __init__(self, i, o, style, upsample=False):
        super().__init__()
        self.conv = ModulatedConv(i, o, 2 if upsample else 3, style, upsample=upsample)
        self.noise, self.bias = nn.Parameter(torch.zeros(1)), nn.Parameter(torch.zeros(1, o, 1, 1))

    def forward(self, x, style):
        return F.leaky_relu(self.conv(x, style) + self.bias, 0.2) * 2**0.5


class StyleGAN(nn.Module):
    def __init__(self, style=6):
        super().__init__()
        self.mapping = nn.Sequential(
            nn.Linear(4, style), nn.LeakyReLU(0.2), nn.Linear(style, style)
        )
        self.start = nn.Parameter(torch.randn(1, 8, 4, 4))
        self.conv1, self.up, self.conv2 = (
            StyledConv(8, 8, style),
            StyledConv(8, 6, style, True),
            StyledConv(6, 6, style),
        )
        self.to_rgb1, self.to_rgb2 = (ModulatedConv(c, 3, 1, style, False) for c in (8, 6))

    def forward(self, z):
        z = z * torch.rsqrt(torch.mean(z**2, dim=1, keepdim=True) + 1e-8)
        w = self.mapping(z)
        x = self.conv1(self.start.repeat(z.shape[0], 1, 1, 1), w)
        rgb = self.to_rgb1(x, w)
        x = self.conv2(self.up(x, w), w)
        return self.to_rgb2(x, w) + F.interpolate(rgb, scale_factor=2, mode="bilinear")


@wild(tensor(2, 4), stays=0, half="mapping.0 3, mapping.2 3, conv1.conv.modulation 4, up.bias 1")
def stylegan_generator():
    return StyleGAN()


class Discriminator(nn.Module):
    def __init__(self):
        super().__init__()
        sn = torch.nn.utils.parametrizations.spectral_norm
        self.net = nn.Sequential(
            sn(nn.Conv2d(3, 8, 4, 2, 1)),
            nn.LeakyReLU(0.2),
            sn(nn.Conv2d(8, 12, 4, 2, 1)),
            nn.LeakyReLU(0.2),
        )
        self.fc = sn(nn.Linear(12 * 2 * 2, 1))

    def forward(self, x):
        return self.fc(self.net(x).view(-1, 12 * 2 * 2))


@wild(image(), stays=0, half="net.0.bias 4, net.2.bias 6")
def spectral_discriminator():
    return Discriminator()


class TimeEmbedding(nn.Module):
    def __init__(self, dim):
        super().__init__()
        self.half = 4
        self.mlp = nn.Sequential(nn.Linear(8, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t):
        rates = torch.exp(
            -math.log(10000) * torch.arange(self.half, dtype=t.dtype, device=t.device) / self.half
        )
        args = t[:, None] * rates[None]
        return self.mlp(torch.cat([torch.cos(args), torch.sin(args)], dim=-1))


class DiffusionBlock(nn.Module):
    def __init__(self, i, o, emb, film=False):
        super().__init__()
        self.film = film
        self.norm1, self.conv1 = nn.GroupNorm(2, i), nn.Conv2d(i, o, 3, padding=1)
        self.emb = nn.Sequential(nn.SiLU(), nn.Linear(emb, 2 * o if film else o))
        self.norm2, self.conv2 = nn.GroupNorm(2, o), nn.Conv2d(o, o, 3, padding=1)
        self.skip = nn.Conv2d(i, o, 1) if i != o else nn.Identity()

    def forward(self, x, emb):
        h = self.conv1(F.silu(self.norm1(x)))
        e = self.emb(emb)
        while len(e.shape) < len(h.shape):
            e = e[..., None]
        if self.film:
            scale, shift = torch.chunk(e, 2, dim=1)
            h = self.norm2(h) * (1 + scale) + shift
        else:
            h = self.norm2(h + e)
        return self.skip(x) + self.conv2(F.silu(h))


class PixelAttention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm, self.qkv, self.out = (
            nn.GroupNorm(2, c),
            nn.Conv1d(c, 3 * c, 1),
            nn.Conv1d(c, c, 1),
        )

    def forward(self, x):
        b, c, *spatial = x.shape
        x = x.reshape(b, c, -1)
        q, k, v = self.qkv(self.norm(x)).chunk(3, dim=1)
        scale = 1 / math.sqrt(math.sqrt(c))
        weight = torch.softmax(torch.einsum("bct,bcs->bts", q * scale, k * scale), dim=-1)
        h = torch.einsum("bts,bcs->bct", weight, v)
        return (x + self.out(h)).reshape(b, c, *spatial)


class Diffusion(nn.Module):
    def __init__(self, c=8, emb=16, film=False):
        super().__init__()
        self.time = TimeEmbedding(emb)
        block = functools.partial(DiffusionBlock, emb=emb, film=film)
        self.inp = nn.Conv2d(3, c, 3, padding=1)
        self.down = nn.ModuleList([block(c, c), nn.Conv2d(c, c, 3, 2, 1), block(c, 2 * c)])
        self.mid = nn.ModuleList([block(2 * c, 2 * c), PixelAttention(2 * c), block(2 * c, 2 * c)])
        self.up = nn.ModuleList(
            [block(4 * c, 2 * c), block(3 * c, 2 * c), block(3 * c, c), block(2 * c, c)]
        )
        self.upconv = nn.Conv2d(2 * c, 2 * c, 3, padding=1)
        self.out = nn.Sequential(nn.GroupNorm(2, c), nn.SiLU(), nn.Conv2d(c, 3, 3, padding=1))

    def forward(self, x, t):
        emb = self.time(t)
        h = self.inp(x)
        hs = [h]
        for layer in self.down:
            h = layer(h, emb) if isinstance(layer, DiffusionBlock) else layer(h)
            hs.append(h)
        for layer in self.mid:
            h = layer(h, emb) if isinstance(layer, DiffusionBlock) else layer(h)
        for i, layer in enumerate(self.up):
            h = layer(torch.cat([h, hs.pop()], dim=1), emb)
            if i == 1:
                h = self.upconv(F.interpolate(h, scale_factor=2, mode="nearest"))
        return self.out(h)


@wild(
    image(),
    tensor(2),
    stays=3,
    half="time.mlp.0 8, inp 4, down.0.conv1 4, mid.1.out 8, mid.0.emb.1 8, up.3.conv2 4",
)
def diffusion_unet():
    return Diffusion()


@wild(
    image(),
    tensor(2),
    stays=3,
    half="time.mlp.0 8, inp 4, down.0.conv1 4, mid.0.emb.1 16, up.3.conv2 4",
)
def diffusion_unet_with_film():
    return Diffusion(film=True)


# -- attention, gates and adaptive weights in convolutional networks -------------------------------


class NonLocal(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.inter = c // 2
        self.g, self.theta, self.phi = (nn.Conv2d(c, self.inter, 1) for _ in range(3))
        self.w = nn.Sequential(nn.Conv2d(self.inter, c, 1), nn.BatchNorm2d(c))
        self.pool = nn.MaxPool2d(2)

    def forward(self, x):
        n = x.size(0)
        g = self.pool(self.g(x)).view(n, self.inter, -1).permute(0, 2, 1)
        theta = self.theta(x).view(n, self.inter, -1).permute(0, 2, 1)
        phi = self.pool(self.phi(x)).view(n, self.inter, -1)
        y = torch.matmul(F.softmax(torch.matmul(theta, phi), dim=-1), g)
        y = y.permute(0, 2, 1).contiguous().view(n, self.inter, *x.size()[2:])
        return self.w(y) + x


@wild(image(), stays=5, half="stem.conv 6, block.g 3, block.theta 3, block.w.0 6")
def non_local():
    return Chain(stem=ConvBN(3, 12, 3), block=NonLocal(12), head=Classifier(12))


class CBAM(nn.Module):
    def __init__(self, c, r=4):
        super().__init__()
        self.mlp = nn.Sequential(nn.Flatten(), nn.Linear(c, r), nn.ReLU(), nn.Linear(r, c))
        self.spatial = linear(2, 1, 7)

    def forward(self, x):
        att = 0
        for pool in ("avg", "max"):
            size = (x.size(2), x.size(3))
            y = (
                F.avg_pool2d(x, size, stride=size)
                if pool == "avg"
                else F.max_pool2d(x, size, stride=size)
            )
            att = att + self.mlp(y)
        x = x * torch.sigmoid(att).unsqueeze(2).unsqueeze(3).expand_as(x)
        pooled = torch.cat((torch.max(x, 1)[0].unsqueeze(1), torch.mean(x, 1).unsqueeze(1)), dim=1)
        return x * torch.sigmoid(self.spatial(pooled))


# the mean and the maximum over channels are over the kept ones
@wild(image(), stays=5, half="stem.conv 4, block.mlp.1 2", mixing="all", oracle="narrowed")
def cbam():
    return Chain(stem=ConvBN(3, 8, 3), block=CBAM(8), head=Classifier(8))


@wild(image(), stays=5, half="stem.conv 4, block.mlp.1 2")
def cbam_of_all_channels():
    return Chain(stem=ConvBN(3, 8, 3), block=CBAM(8), head=Classifier(8))


class GatedConv(nn.Module):
    """Inpainting: features, and a gate for each."""

    def __init__(self, i, o):
        super().__init__()
        self.feature, self.mask = nn.Conv2d(i, o, 3, padding=1), nn.Conv2d(i, o, 3, padding=1)

    def forward(self, x):
        return F.elu(self.feature(x)) * torch.sigmoid(self.mask(x))


@wild(image(4), stays=3, half="one.feature 4, one.mask 4, glu.0 8, two.feature 3")
def gated_inpainting():
    return Chain(
        one=GatedConv(4, 8),
        glu=nn.Sequential(nn.Conv2d(8, 16, 3, padding=1), nn.GLU(dim=1)),
        two=GatedConv(8, 6),
        out=nn.Conv2d(6, 3, 1),
    )


class GRN(nn.Module):
    """Global response normalisation, channels last."""

    def __init__(self, c):
        super().__init__()
        self.gamma, self.beta = (
            nn.Parameter(torch.zeros(1, 1, 1, c)),
            nn.Parameter(torch.zeros(1, 1, 1, c)),
        )

    def forward(self, x):
        g = torch.norm(x, p=2, dim=(1, 2), keepdim=True)
        n = g / (g.mean(dim=-1, keepdim=True) + 1e-6)
        return self.gamma * (x * n) + self.beta + x


class ChannelNorm(nn.Module):
    """LayerNorm over channels that come first, by hand."""

    def __init__(self, c):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(c)), nn.Parameter(torch.zeros(c))

    def forward(self, x):
        u = x.mean(1, keepdim=True)
        s = (x - u).pow(2).mean(1, keepdim=True)
        x = (x - u) / torch.sqrt(s + 1e-6)
        return self.weight[:, None, None] * x + self.bias[:, None, None]


class ConvNeXtBlock(nn.Module):
    def __init__(self, c, grn=False):
        super().__init__()
        self.dwconv, self.norm = nn.Conv2d(c, c, 7, padding=3, groups=c), nn.LayerNorm(c, eps=1e-6)
        self.pwconv1, self.pwconv2 = nn.Linear(c, 4 * c), nn.Linear(4 * c, c)
        self.grn = GRN(4 * c) if grn else nn.Identity()
        self.gamma = nn.Parameter(1e-6 * torch.ones(c))

    def forward(self, x):
        y = self.norm(self.dwconv(x).permute(0, 2, 3, 1))
        y = self.gamma * self.pwconv2(self.grn(F.gelu(self.pwconv1(y))))
        return x + y.permute(0, 3, 1, 2)


def convnext_like(grn, norm):
    return Chain(
        stem=nn.Conv2d(3, 8, 2, 2),
        norm=norm(8),
        one=ConvNeXtBlock(8, grn),
        down=nn.Conv2d(8, 12, 2, 2),
        two=ConvNeXtBlock(12, grn),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(1),
        last=nn.LayerNorm(12),
        head=nn.Linear(12, 5),
    )


@wild(image(), stays=5, half="stem 4, one.dwconv 4, one.pwconv1 16, two.gamma 6")
def convnext():
    return convnext_like(False, nn.BatchNorm2d)


@wild(
    image(), stays=5, half="stem 4, one.pwconv1 16, one.pwconv2 4", mixing="all", oracle="narrowed"
)
def convnext_v2():
    return convnext_like(True, ChannelNorm)


class ECA(nn.Module):
    def __init__(self, k=3):
        super().__init__()
        self.conv = nn.Conv1d(1, 1, k, padding=k // 2, bias=False)

    def forward(self, x):
        y = x.mean((2, 3)).view(x.shape[0], 1, -1)
        return x * torch.sigmoid(self.conv(y)).view(x.shape[0], -1, 1, 1)


# the window over neighbouring channels sees zeros where channels went
@wild(image(), stays=5, half="stem.conv 4, mid.conv 4")
def efficient_channel_attention():
    return Chain(mid=ConvBN(3, 8, 3), stem=ConvBN(8, 8, 3), block=ECA(), head=Classifier(8))


class SimAM(nn.Module):
    """A gate without weights, of statistics over space."""

    def forward(self, x):
        n = x.shape[2] * x.shape[3] - 1
        d = (x - x.mean(dim=[2, 3], keepdim=True)).pow(2)
        v = d.sum(dim=[2, 3], keepdim=True) / n
        return x * torch.sigmoid(d / (4 * (v + 1e-4)) + 0.5)


class CoordAtt(nn.Module):
    """Pool along rows and columns, one bottleneck for both, two gates."""

    def __init__(self, c, r):
        super().__init__()
        self.conv1, self.bn1, self.act = nn.Conv2d(c, r, 1), nn.BatchNorm2d(r), nn.Hardswish()
        self.conv_h, self.conv_w = nn.Conv2d(r, c, 1), nn.Conv2d(r, c, 1)

    def forward(self, x):
        n, c, h, w = x.size()
        x_h = F.adaptive_avg_pool2d(x, (h, 1))
        x_w = F.adaptive_avg_pool2d(x, (1, w)).permute(0, 1, 3, 2)
        y = self.act(self.bn1(self.conv1(torch.cat([x_h, x_w], dim=2))))
        x_h, x_w = torch.split(y, [h, w], dim=2)
        return x * self.conv_w(x_w.permute(0, 1, 3, 2)).sigmoid() * self.conv_h(x_h).sigmoid()


class SEBlock(nn.Module):
    def __init__(self, c, r=4):
        super().__init__()
        self.avg_pool = nn.AdaptiveAvgPool2d(1)
        self.fc = nn.Sequential(
            nn.Linear(c, c // r, bias=False),
            nn.ReLU(),
            nn.Linear(c // r, c, bias=False),
            nn.Sigmoid(),
        )

    def forward(self, x):
        b, c, _, _ = x.size()
        y = self.fc(self.avg_pool(x).view(b, c)).view(b, c, 1, 1)
        return x * y.expand_as(x)


class ContextBlock(nn.Module):
    """GCNet: one spatial softmax for all channels, then a bottleneck that is added."""

    def __init__(self, c, r):
        super().__init__()
        self.conv_mask = nn.Conv2d(c, 1, 1)
        self.add = nn.Sequential(
            nn.Conv2d(c, r, 1), nn.LayerNorm([r, 1, 1]), nn.ReLU(), nn.Conv2d(r, c, 1)
        )

    def forward(self, x):
        n, c, h, w = x.size()
        flat = x.view(n, c, h * w).unsqueeze(1)
        mask = F.softmax(self.conv_mask(x).view(n, 1, h * w), dim=2).unsqueeze(-1)
        return x + self.add(torch.matmul(flat, mask).view(n, c, 1, 1))


@wild(
    image(),
    stays=5,
    half="stem.conv 4, sim.0.conv 4, coord.1.conv1 2, se.1.fc.0 1, context.1.add.0 2, "
    "context.1.conv_mask 1",
)
def gates_of_all_kinds():
    step = lambda: ConvBN(8, 8, 3)  # noqa: E731
    return Chain(
        stem=ConvBN(3, 8, 3),
        sim=nn.Sequential(step(), SimAM()),
        coord=nn.Sequential(step(), CoordAtt(8, 4)),
        se=nn.Sequential(step(), SEBlock(8)),
        context=nn.Sequential(step(), ContextBlock(8, 4)),
        head=Classifier(8),
    )


class FrozenBN(nn.Module):
    """BatchNorm with fixed buffers, as detectors write it."""

    def __init__(self, c):
        super().__init__()
        self.register_buffer("weight", torch.ones(c))
        self.register_buffer("bias", torch.zeros(c))
        self.register_buffer("running_mean", torch.zeros(c))
        self.register_buffer("running_var", torch.ones(c))

    def forward(self, x):
        w, b = self.weight.reshape(1, -1, 1, 1), self.bias.reshape(1, -1, 1, 1)
        rv, rm = self.running_var.reshape(1, -1, 1, 1), self.running_mean.reshape(1, -1, 1, 1)
        scale = w * (rv + 1e-5).rsqrt()
        return x * scale + (b - rm * scale)


@wild(image(), stays=5, half="a 4, one 4, b 6, two.running_mean 6")
def frozen_norms():
    return Chain(
        a=nn.Conv2d(3, 8, 3),
        one=FrozenBN(8),
        r=nn.ReLU(),
        b=nn.Conv2d(8, 12, 3),
        two=torchvision.ops.FrozenBatchNorm2d(12),
        r2=nn.ReLU(),
        head=Classifier(12),
    )


class Involution(nn.Module):
    """A kernel for each pixel, shared by the channels of a group."""

    def __init__(self, c, k=3, groups=2, r=2):
        super().__init__()
        self.k, self.groups, self.group_channels = k, groups, c // groups
        self.reduce = ConvBN(c, c // r)
        self.span = nn.Conv2d(c // r, k**2 * groups, 1)
        self.unfold = nn.Unfold(k, 1, (k - 1) // 2, 1)

    def forward(self, x):
        weight = self.span(self.reduce(x))
        b, c, h, w = weight.shape
        weight = weight.view(b, self.groups, self.k**2, h, w).unsqueeze(2)
        out = self.unfold(x).view(b, self.groups, self.group_channels, self.k**2, h, w)
        return (weight * out).sum(dim=3).view(b, -1, h, w)


@wild(
    image(), stays=18 + 5, half="stem.conv 4, inv.reduce.conv 2, inv.span 18"
)  # 2 groups of 9 positions
def involution():
    return Chain(stem=ConvBN(3, 8, 3), inv=Involution(8), bn=nn.BatchNorm2d(8), head=Classifier(8))


class DynamicConv(nn.Module):
    """A sum of K kernels, weighed by attention, one for each picture of the batch."""

    def __init__(self, i, o, k=3, kernels=4, groups=1):
        super().__init__()
        self.i, self.o, self.k, self.kernels, self.groups = i, o, k, kernels, groups
        self.fc1, self.fc2 = nn.Conv2d(i, 4, 1, bias=False), nn.Conv2d(4, kernels, 1)
        self.weight = nn.Parameter(torch.randn(kernels, o, i // groups, k, k))
        self.bias = nn.Parameter(torch.zeros(kernels, o))

    def forward(self, x):
        attention = self.fc2(F.relu(self.fc1(F.adaptive_avg_pool2d(x, 1)))).view(x.size(0), -1)
        attention = F.softmax(attention / 30.0, 1)
        b, i, h, w = x.size()
        x = x.view(1, -1, h, w)
        weight = self.weight.view(self.kernels, -1)
        weight = torch.mm(attention, weight).view(-1, self.i // self.groups, self.k, self.k)
        bias = torch.mm(attention, self.bias).view(-1)
        out = F.conv2d(x, weight=weight, bias=bias, padding=self.k // 2, groups=self.groups * b)
        return out.view(b, self.o, out.size(-2), out.size(-1))


@wild(
    image(), stays=4 + 4 + 5, half="stem.conv 4, one.fc1 2, two.fc1 2, bn 5"
)  # softmax over the kernels
def dynamic_convolution():
    return Chain(
        stem=ConvBN(3, 8, 3),
        one=DynamicConv(8, 10),
        bn=nn.BatchNorm2d(10),
        r=nn.ReLU(),
        two=DynamicConv(10, 6),
        head=Classifier(6),
    )


class CondConv(nn.Module):
    """Experts' kernels mixed by sigmoids, one for each picture."""

    def __init__(self, i, o, k=3, experts=3):
        super().__init__()
        self.shape, self.k = (o, i, k, k), k
        self.routing = nn.Linear(i, experts)
        self.weight = nn.Parameter(torch.randn(experts, o * i * k * k))

    def forward(self, x):
        routing = torch.sigmoid(self.routing(F.adaptive_avg_pool2d(x, 1).flatten(1)))
        b, c, h, w = x.shape
        o, i, k, _ = self.shape
        weight = torch.matmul(routing, self.weight).view(b * o, i, k, k)
        x = x.reshape(1, b * c, h, w)
        return F.conv2d(x, weight, padding=self.k // 2, groups=b).view(b, o, h, w)


# all kernels of an expert in one row: inputs are told apart there, outputs are not
@wild(image(), stays=5, half="stem.conv 4, one.routing 2, bn 10")
def condconv():
    return Chain(
        stem=ConvBN(3, 8, 3), one=CondConv(8, 10), bn=nn.BatchNorm2d(10), head=Classifier(10)
    )


class StackedCondConv(nn.Module):
    """The same, by an einsum over a stack of kernels and a loop over the batch."""

    def __init__(self, i, o, k=3, experts=3):
        super().__init__()
        self.routing = nn.Linear(i, experts)
        self.weight = nn.Parameter(torch.randn(experts, o, i, k, k))

    def forward(self, x):
        routing = self.routing(x.mean((2, 3))).sigmoid()
        weight = torch.einsum("be,eoikl->boikl", routing, self.weight)
        return torch.cat(
            [F.conv2d(x[b : b + 1], weight[b], padding=1) for b in range(x.shape[0])], 0
        )


@wild(image(), stays=3 + 3 + 5, half="stem.conv 4, one.routing 2, bn 5")  # kernels of 3 x 3
def condconv_in_a_loop():
    return Chain(
        stem=ConvBN(3, 8, 3), one=StackedCondConv(8, 10), bn=nn.BatchNorm2d(10), head=Classifier(10)
    )


class Deformable(nn.Module):
    def __init__(self, i, o, k=3):
        super().__init__()
        self.offset, self.mask = (
            nn.Conv2d(i, 2 * k * k, k, padding=1),
            nn.Conv2d(i, k * k, k, padding=1),
        )
        self.regular = torchvision.ops.DeformConv2d(i, o, k, padding=1, bias=False)

    def forward(self, x):
        offset, mask = self.offset(x), 2.0 * torch.sigmoid(self.mask(x))
        return torchvision.ops.deform_conv2d(
            x,
            offset=offset,
            weight=self.regular.weight,
            bias=self.regular.bias,
            padding=1,
            mask=mask,
        )


@wild(image(), stays=9 + 5, half="stem.conv 4, dcn.regular 5, dcn.offset 9")
def deformable():
    return Chain(
        stem=ConvBN(3, 8, 3), dcn=Deformable(8, 10), bn=nn.BatchNorm2d(10), head=Classifier(10)
    )


class SKConv(nn.Module):
    """Branches with other kernels, chosen by a softmax over the branches."""

    def __init__(self, c, m=2, d=6):
        super().__init__()
        self.convs = nn.ModuleList(ConvBN(c, c, 3, d=1 + i, g=2) for i in range(m))
        self.fc = nn.Linear(c, d)
        self.fcs = nn.ModuleList(nn.Linear(d, c) for _ in range(m))

    def forward(self, x):
        for i, conv in enumerate(self.convs):
            fea = conv(x).unsqueeze(dim=1)
            feas = fea if i == 0 else torch.cat([feas, fea], dim=1)  # noqa: F821
        z = self.fc(torch.sum(feas, dim=1).mean(-1).mean(-1))
        for i, fc in enumerate(self.fcs):
            vector = fc(z).unsqueeze(dim=1)
            vectors = vector if i == 0 else torch.cat([vectors, vector], dim=1)  # noqa: F821
        attention = torch.softmax(vectors, dim=1).unsqueeze(-1).unsqueeze(-1)
        return (feas * attention).sum(dim=1)


@wild(
    image(), stays=5, half="stem.conv 6, sk.convs.0.conv 6, sk.convs.1.conv 6, sk.fc 3, sk.fcs.1 6"
)
def selective_kernels():
    return Chain(stem=ConvBN(3, 12, 3), sk=SKConv(12), head=Classifier(12))


class RadixSoftmax(nn.Module):
    def __init__(self, radix, cardinality):
        super().__init__()
        self.radix, self.cardinality = radix, cardinality

    def forward(self, x):
        batch = x.size(0)
        x = x.view(batch, self.cardinality, self.radix, -1).transpose(1, 2)
        return F.softmax(x, dim=1).reshape(batch, -1)


class SplitAttention(nn.Module):
    def __init__(self, i, c, radix=2, groups=1, inter=6):
        super().__init__()
        self.radix = radix
        self.conv = ConvBN(i, c * radix, 3, g=groups * radix)
        self.fc1 = nn.Sequential(
            nn.Conv2d(c, inter, 1, groups=groups), nn.BatchNorm2d(inter), nn.ReLU()
        )
        self.fc2 = nn.Conv2d(inter, c * radix, 1, groups=groups)
        self.rsoftmax = RadixSoftmax(radix, groups)

    def forward(self, x):
        x = self.conv(x)
        batch, rchannel = x.shape[:2]
        splits = torch.split(x, rchannel // self.radix, dim=1)
        gap = F.adaptive_avg_pool2d(sum(splits), 1)
        atten = self.rsoftmax(self.fc2(self.fc1(gap))).view(batch, -1, 1, 1)
        attens = torch.split(atten, rchannel // self.radix, dim=1)
        return sum(att * split for att, split in zip(attens, splits, strict=True)).contiguous()


@wild(image(), stays=5, half="stem.conv 4, block.conv.conv 8, block.fc1.0 3, block.fc2 8")
def resnest():
    return Chain(stem=ConvBN(3, 8, 3), block=SplitAttention(8, 8), head=Classifier(8))


@wild(image(), stays=5, half="stem.conv 4, block.conv.conv 8, block.fc2 8")
def resnest_of_two_groups():
    return Chain(stem=ConvBN(3, 8, 3), block=SplitAttention(8, 8, groups=2), head=Classifier(8))


class Bottle2neck(nn.Module):
    """Res2Net: splits in a chain, each added to the next."""

    def __init__(self, i, width, scale=4):
        super().__init__()
        self.width, self.scale = width, scale
        self.conv1, self.conv3 = ConvBN(i, width * scale), linear(width * scale, i)
        self.convs = nn.ModuleList(
            nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(scale - 1)
        )
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(scale - 1))

    def forward(self, x):
        out = self.conv1(x)
        spx = torch.split(out, self.width, 1)
        for i in range(self.scale - 1):
            sp = spx[i] if i == 0 else sp + spx[i]  # noqa: F821
            sp = F.relu(self.bns[i](self.convs[i](sp)))
            out = sp if i == 0 else torch.cat((out, sp), 1)
        return F.relu(self.conv3(torch.cat((out, spx[self.scale - 1]), 1)) + x)


@wild(image(), stays=5, half="stem.conv 4, block.conv1.conv 8, block.convs.1 2, block.conv3.conv 4")
def res2net():
    return Chain(stem=ConvBN(3, 8, 3), block=Bottle2neck(8, 4), head=Classifier(8))


class ShuffleUnit(nn.Module):
    """ShuffleNet V1: grouped, shuffled, depthwise, grouped; added, or joined with a pool."""

    def __init__(self, i, o, groups=2, s=1):
        super().__init__()
        mid, out = o // 4, o - i if s == 2 else o
        self.groups, self.s = groups, s
        self.conv1, self.dw, self.conv2 = (
            ConvBN(i, mid, g=groups),
            linear(mid, mid, 3, s, g=mid),
            linear(mid, out, g=groups),
        )

    def forward(self, x):
        y = shuffle_channels(self.conv1(x), self.groups)
        y = self.conv2(self.dw(y))
        if self.s == 2:
            return F.relu(torch.cat((y, F.avg_pool2d(x, 3, 2, 1)), 1))
        return F.relu(x + y)


@wild(
    image(), stays=5, half="stem.conv 8, down.conv1.conv 4, down.conv2.conv 8, unit.conv2.conv 16"
)
def shufflenet():
    return Chain(
        stem=ConvBN(3, 16, 3),
        down=ShuffleUnit(16, 32, s=2),
        unit=ShuffleUnit(32, 32),
        head=Classifier(32),
    )


class ShuffleUnit2(nn.Module):
    def __init__(self, c, s=1):
        super().__init__()
        self.s, half = s, c if s == 2 else c // 2
        self.branch1 = nn.Sequential(linear(c, c, 3, 2, g=c), ConvBN(c, half)) if s == 2 else None
        self.branch2 = nn.Sequential(
            ConvBN(c if s == 2 else half, half),
            linear(half, half, 3, s, g=half),
            ConvBN(half, half),
        )

    def forward(self, x):
        if self.s == 1:
            x1, x2 = x.chunk(2, dim=1)
            out = torch.cat((x1, self.branch2(x2)), dim=1)
        else:
            out = torch.cat((self.branch1(x), self.branch2(x)), dim=1)
        return shuffle_channels(out, 2)


@wild(
    image(),
    stays=5,
    half="stem.conv 4, down.branch1.1.conv 4, one.branch2.0.conv 4, two.branch2.2.conv 4",
)
def shufflenet_v2():
    return Chain(
        stem=ConvBN(3, 8, 3),
        down=ShuffleUnit2(8, 2),
        one=ShuffleUnit2(16),
        two=ShuffleUnit2(16),
        head=Classifier(16),
    )


class MixConv(nn.Module):
    """Splits of the channels, each with a depthwise kernel of its own size."""

    def __init__(self, c, kernels=(3, 5, 7)):
        super().__init__()
        self.splits = [c // len(kernels)] * len(kernels)
        self.splits[0] += c - sum(self.splits)
        self.layers = nn.ModuleList(
            nn.Conv2d(s, s, k, padding=k // 2, groups=s, bias=False)
            for s, k in zip(self.splits, kernels, strict=True)
        )

    def forward(self, x):
        x_split = torch.split(x, self.splits, dim=1)
        return torch.cat([layer(t) for layer, t in zip(self.layers, x_split, strict=True)], 1)


@wild(image(), stays=5, half="stem.conv 7, mix.layers.0 3, mix.layers.2 2, out.conv 3")
def mixconv():
    return Chain(
        stem=ConvBN(3, 14, 3),
        mix=MixConv(14),
        bn=nn.BatchNorm2d(14),
        out=ConvBN(14, 6),
        head=Classifier(6),
    )


class Inception(nn.Module):
    def __init__(self, i):
        super().__init__()
        self.branch1 = ConvBN(i, 6)
        self.branch5 = nn.Sequential(ConvBN(i, 4), ConvBN(4, 6, 5))
        self.branch3 = nn.ModuleList(
            [
                ConvBN(i, 4),
                nn.Conv2d(4, 6, (1, 3), padding=(0, 1)),
                nn.Conv2d(4, 6, (3, 1), padding=(1, 0)),
            ]
        )
        self.pool = ConvBN(i, 4)

    def forward(self, x):
        b3 = self.branch3[0](x)
        b3 = [self.branch3[1](b3), self.branch3[2](b3)]
        pool = self.pool(F.avg_pool2d(x, kernel_size=3, stride=1, padding=1))
        return torch.cat([self.branch1(x), self.branch5(x), torch.cat(b3, 1), pool], 1)


@wild(
    image(), stays=5, half="stem.conv 4, one.branch1.conv 3, one.branch3.1 3, two.branch5.0.conv 2"
)
def inception():
    return Chain(stem=ConvBN(3, 8, 3), one=Inception(8), two=Inception(28), head=Classifier(28))


class DenseLayer(nn.Module):
    def __init__(self, i, growth, size=2):
        super().__init__()
        self.norm1, self.conv1 = nn.BatchNorm2d(i), nn.Conv2d(i, size * growth, 1, bias=False)
        self.norm2, self.conv2 = (
            nn.BatchNorm2d(size * growth),
            nn.Conv2d(size * growth, growth, 3, padding=1, bias=False),
        )

    def forward(self, features):
        x = torch.cat([features] if isinstance(features, Tensor) else features, 1)
        return self.conv2(F.relu(self.norm2(self.conv1(F.relu(self.norm1(x))))))


class DenseBlock(nn.ModuleDict):
    def __init__(self, i, growth, n):
        super().__init__({f"layer{j}": DenseLayer(i + j * growth, growth) for j in range(n)})

    def forward(self, x):
        features = [x]
        for _, layer in self.items():
            features.append(layer(features))
        return torch.cat(features, 1)


@wild(
    image(),
    stays=5,
    half="stem 4, one.layer0.conv1 4, one.layer2.conv2 2, trans.1 5, two.layer1.conv2 2",
)
def densenet():
    return Chain(
        stem=nn.Conv2d(3, 8, 3, padding=1),
        one=DenseBlock(8, 4, 3),
        trans=nn.Sequential(nn.BatchNorm2d(20), nn.Conv2d(20, 10, 1), nn.AvgPool2d(2)),
        two=DenseBlock(10, 4, 2),
        norm=nn.BatchNorm2d(18),
        head=Classifier(18),
    )


class Fire(nn.Module):
    def __init__(self, i, s, e):
        super().__init__()
        self.squeeze, self.expand1, self.expand3 = (
            nn.Conv2d(i, s, 1),
            nn.Conv2d(s, e, 1),
            nn.Conv2d(s, e, 3, padding=1),
        )

    def forward(self, x):
        x = F.relu(self.squeeze(x))
        return torch.cat([F.relu(self.expand1(x)), F.relu(self.expand3(x))], 1)


@wild(image(), stays=5, half="stem.conv 4, one.squeeze 2, one.expand1 3, two.expand3 4")
def squeezenet():
    return Chain(
        stem=ConvBN(3, 8, 3),
        one=Fire(8, 4, 6),
        two=Fire(12, 4, 8),
        last=nn.Conv2d(16, 5, 1),
        pool=nn.AdaptiveAvgPool2d(1),
        flat=nn.Flatten(),
    )


class BlurPool(nn.Module):
    """A fixed filter, once for each channel, in a buffer."""

    def __init__(self, c):
        super().__init__()
        a = torch.tensor([1.0, 2.0, 1.0])
        filt = (a[:, None] * a[None, :]) / 16
        self.pad = nn.ReflectionPad2d([1, 1, 1, 1])
        self.register_buffer("filt", filt[None, None].repeat((c, 1, 1, 1)))

    def forward(self, x):
        return F.conv2d(self.pad(x), self.filt, stride=2, groups=x.shape[1])


class BlurPoolExpanded(nn.Module):
    """One filter, expanded to the width at hand."""

    def __init__(self):
        super().__init__()
        self.register_buffer("filt", torch.rand(1, 1, 3, 3))

    def forward(self, x):
        c = x.shape[1]
        return F.conv2d(
            F.pad(x, (1, 1, 1, 1), "reflect"), self.filt.expand(c, -1, -1, -1), stride=2, groups=c
        )


@wild(image(), stays=5, half="a.conv 4, blur.filt 4, b.conv 5")
def blurpool():
    return Chain(
        a=ConvBN(3, 8, 3),
        blur=BlurPool(8),
        b=ConvBN(8, 10, 3),
        again=BlurPoolExpanded(),
        head=Classifier(10),
    )


class AddCoords(nn.Module):
    def forward(self, x):
        n, _, h, w = x.size()
        xx = torch.arange(w, dtype=x.dtype, device=x.device).repeat(1, h, 1)
        yy = torch.arange(h, dtype=x.dtype, device=x.device).repeat(1, w, 1).transpose(1, 2)
        xx, yy = xx / (w - 1) * 2 - 1, yy / (h - 1) * 2 - 1
        xx, yy = xx.repeat(n, 1, 1, 1), yy.repeat(n, 1, 1, 1)
        r = torch.sqrt(torch.pow(xx - 0.5, 2) + torch.pow(yy - 0.5, 2))
        return torch.cat([x, xx, yy, r], dim=1)


@wild(image(), stays=5, half="a 4, c 5")
def coordconv():
    return Chain(
        one=AddCoords(),
        a=nn.Conv2d(6, 8, 3, padding=1),
        r=nn.ReLU(),
        two=AddCoords(),
        c=nn.Conv2d(11, 10, 3),
        r2=nn.ReLU(),
        head=Classifier(10),
    )


# -- capsules, lambdas, and other ways to mix ------------------------------------------------------


def squash(x, dim=-1):
    square = (x**2).sum(dim=dim, keepdim=True)
    return square / (1 + square) * x / (torch.sqrt(square) + 1e-8)


class Capsules(nn.Module):
    """Primary capsules from a convolution, routed by agreement to one capsule a class."""

    def __init__(self, classes=3, dim=4, out=5, kinds=2):
        super().__init__()
        self.dim, self.conv = dim, ConvBN(3, 8, 3)
        self.primary = nn.Conv2d(8, kinds * dim, 3, stride=4, padding=1)
        self.w = nn.Parameter(0.01 * torch.randn(1, kinds * 4, classes, out, dim))
        self.decoder = nn.Sequential(nn.Linear(classes * out, 12), nn.ReLU(), nn.Linear(12, 6))

    def forward(self, x):
        x = self.primary(self.conv(x))
        u = squash(x.view(x.size(0), -1, self.dim))
        u_hat = torch.matmul(self.w, u[:, :, None, :, None])
        b = torch.zeros(
            x.size(0), u_hat.size(1), u_hat.size(2), 1, 1, dtype=x.dtype, device=x.device
        )
        for _ in range(2):
            c = F.softmax(b, dim=2)
            v = squash((c * u_hat).sum(dim=1, keepdim=True), dim=3)
            b = b + (u_hat * v).sum(dim=3, keepdim=True)
        v = v.squeeze(1).squeeze(-1)
        return v.norm(dim=-1), self.decoder(v.view(v.size(0), -1))


# a softmax over the classes; what a capsule says of a class may shrink
@wild(image(), stays=3 + 6, half="conv.conv 4, primary 4, decoder.0 6", why="softmax")
def capsules():
    return Capsules()


class Lambda(nn.Module):
    """Keys and values become a linear function of the queries, with content and position."""

    def __init__(self, c, o, k=4, heads=2, u=1, n=64):
        super().__init__()
        self.k, self.heads, self.u, self.v = k, heads, u, o // heads
        self.to_q, self.to_k, self.to_v = (
            nn.Conv2d(c, k * heads, 1, bias=False),
            nn.Conv2d(c, k * u, 1, bias=False),
            nn.Conv2d(c, self.v * u, 1, bias=False),
        )
        self.norm_q, self.norm_v = nn.BatchNorm2d(k * heads), nn.BatchNorm2d(self.v * u)
        self.pos = nn.Parameter(torch.randn(n, n, k, u))

    def forward(self, x):
        b, c, hh, ww = x.shape
        q = self.norm_q(self.to_q(x)).reshape(b, self.heads, self.k, hh * ww)
        k = self.to_k(x).reshape(b, self.u, self.k, hh * ww).softmax(dim=-1)
        v = self.norm_v(self.to_v(x)).reshape(b, self.u, self.v, hh * ww)
        content = torch.einsum("bukm,buvm->bkv", k, v)
        y_content = torch.einsum("bhkn,bkv->bhvn", q, content)
        position = torch.einsum("nmku,buvm->bnkv", self.pos, v)
        y_position = torch.einsum("bhkn,bnkv->bhvn", q, position)
        return (y_content + y_position).reshape(b, -1, hh, ww)


@wild(image(), stays=64 + 5, half="stem.conv 4, lam.to_k 2, lam.to_v 2, bn 4")
def lambda_layer():
    return Chain(stem=ConvBN(3, 8, 3), lam=Lambda(8, 8), bn=nn.BatchNorm2d(8), head=Classifier(8))


class FNetBlock(nn.Module):
    """The real part of a Fourier transform mixes tokens; here along tokens alone."""

    def __init__(self, c, hidden):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.fc1, self.fc2 = nn.Linear(c, hidden), nn.Linear(hidden, c)

    def forward(self, x):
        x = self.norm1(x + torch.fft.fft(x, dim=1).real)
        return self.norm2(x + self.fc2(F.gelu(self.fc1(x))))


class GlobalFilter(nn.Module):
    """GFNet: multiply in the frequency domain."""

    def __init__(self, c, h=4, w=3):
        super().__init__()
        self.complex_weight = nn.Parameter(torch.randn(h, w, c, 2) * 0.02)

    def forward(self, x):
        b, n, c = x.shape
        a = int(math.sqrt(n))
        x = x.view(b, a, a, c)
        x = torch.fft.rfft2(x, dim=(1, 2), norm="ortho")
        x = x * torch.view_as_complex(self.complex_weight)
        x = torch.fft.irfft2(x, s=(a, a), dim=(1, 2), norm="ortho")
        return x.reshape(b, n, c)


class Tokens(nn.Module):
    """A picture as a row of patches."""

    def __init__(self, c, p=2, i=3):
        super().__init__()
        self.proj = nn.Conv2d(i, c, p, p)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class TokenHead(nn.Module):
    def __init__(self, c, classes=5):
        super().__init__()
        self.norm, self.fc = nn.LayerNorm(c), nn.Linear(c, classes)

    def forward(self, x):
        return self.fc(self.norm(x).mean(dim=1))


@wild(image(), stays=5, half="embed.proj 4, one.fc1 8, one.norm1 4, two.fc2 4")
def fnet():
    return Chain(embed=Tokens(8), one=FNetBlock(8, 16), two=FNetBlock(8, 16), head=TokenHead(8))


@wild(image(), stays=4 + 3 + 5, half="embed.proj 4, norm 4, mlp.0 8")  # frequencies stay
def global_filter():
    return Chain(
        embed=Tokens(8),
        norm=nn.LayerNorm(8),
        filt=GlobalFilter(8),
        mlp=Mlp(8, 16),
        head=TokenHead(8),
    )


class Mlp(nn.Sequential):
    def __init__(self, c, hidden, o=None):
        super().__init__(nn.Linear(c, hidden), nn.GELU(), nn.Linear(hidden, o or c))


class MixerBlock(nn.Module):
    def __init__(self, n, c, tokens=10, hidden=16):
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(c), nn.LayerNorm(c)
        self.token_mix, self.channel_mix = Mlp(n, tokens), Mlp(c, hidden)

    def forward(self, x):
        x = x + self.token_mix(self.norm1(x).transpose(1, 2)).transpose(1, 2)
        return x + self.channel_mix(self.norm2(x))


# the number of tokens is the picture's
@wild(
    image(),
    stays=2 * 16 + 5,
    half="embed.proj 4, one.token_mix.0 5, one.channel_mix.0 8, one.norm1 4",
)
def mlp_mixer():
    return Chain(embed=Tokens(8), one=MixerBlock(16, 8), two=MixerBlock(16, 8), head=TokenHead(8))


class SpatialGate(nn.Module):
    """gMLP: half of the channels, mixed over tokens, gate the other half."""

    def __init__(self, c, n):
        super().__init__()
        self.norm, self.proj = nn.LayerNorm(c // 2), nn.Conv1d(n, n, 1)

    def forward(self, x):
        u, v = x.chunk(2, dim=-1)
        return u * self.proj(self.norm(v))


class GMLPBlock(nn.Module):
    def __init__(self, n, c, hidden):
        super().__init__()
        self.norm, self.fc1, self.gate, self.fc2 = (
            nn.LayerNorm(c),
            nn.Linear(c, hidden),
            SpatialGate(hidden, n),
            nn.Linear(hidden // 2, c),
        )

    def forward(self, x):
        return x + self.fc2(self.gate(F.gelu(self.fc1(self.norm(x)))))


@wild(image(), stays=2 * 16 + 5, half="embed.proj 4, one.fc1 12, one.gate.norm 6, two.fc2 4")
def gmlp():
    return Chain(
        embed=Tokens(8), one=GMLPBlock(16, 8, 24), two=GMLPBlock(16, 8, 24), head=TokenHead(8)
    )


class PoolMixer(nn.Module):
    def __init__(self):
        super().__init__()
        self.pool = nn.AvgPool2d(3, 1, 1, count_include_pad=False)

    def forward(self, x):
        return self.pool(x) - x


class PoolBlock(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.norm1, self.norm2, self.mixer = nn.GroupNorm(1, c), nn.GroupNorm(1, c), PoolMixer()
        self.fc1, self.fc2 = nn.Conv2d(c, 2 * c, 1), nn.Conv2d(2 * c, c, 1)
        self.scale1, self.scale2 = (
            nn.Parameter(1e-5 * torch.ones(c)),
            nn.Parameter(1e-5 * torch.ones(c)),
        )

    def forward(self, x):
        x = x + self.scale1.unsqueeze(-1).unsqueeze(-1) * self.mixer(self.norm1(x))
        return x + self.scale2.unsqueeze(-1).unsqueeze(-1) * self.fc2(
            F.gelu(self.fc1(self.norm2(x)))
        )


@wild(image(), stays=5, half="stem 4, one.fc1 8, one.scale1 4, down 6, two.norm2 6")
def poolformer():
    return Chain(
        stem=nn.Conv2d(3, 8, 3, padding=1),
        one=PoolBlock(8),
        down=nn.Conv2d(8, 12, 3, 2, 1),
        two=PoolBlock(12),
        norm=nn.GroupNorm(1, 12),
        head=Classifier(12),
    )


# -- transformers ----------------------------------------------------------------------------------


class Attention(nn.Module):
    def __init__(self, c, heads=2):
        super().__init__()
        self.heads, self.head_dim = heads, c // heads
        self.scale = self.head_dim**-0.5
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, self.head_dim).permute(2, 0, 3, 1, 4)
        q, k, v = qkv.unbind(0)
        attn = ((q * self.scale) @ k.transpose(-2, -1)).softmax(dim=-1)
        x = (attn @ v).transpose(1, 2).reshape(b, n, self.heads * self.head_dim)
        return self.proj(x)


class PreNorm(nn.Module):
    def __init__(self, c, mixer, hidden):
        super().__init__()
        self.norm1, self.mixer, self.norm2, self.mlp = (
            nn.LayerNorm(c),
            mixer,
            nn.LayerNorm(c),
            Mlp(c, hidden),
        )

    def forward(self, x):
        x = x + self.mixer(self.norm1(x))
        return x + self.mlp(self.norm2(x))


class ViT(nn.Module):
    """A class token, a distillation token, positions for all."""

    def __init__(self, c=8, n=16):
        super().__init__()
        self.embed = Tokens(c)
        self.cls_token, self.dist_token = (
            nn.Parameter(torch.zeros(1, 1, c)),
            nn.Parameter(torch.zeros(1, 1, c)),
        )
        self.pos_embed = nn.Parameter(torch.zeros(1, n + 2, c))
        self.blocks = nn.Sequential(PreNorm(c, Attention(c), 16), PreNorm(c, Attention(c), 16))
        self.norm, self.head, self.head_dist = nn.LayerNorm(c), nn.Linear(c, 5), nn.Linear(c, 5)

    def forward(self, x):
        b = x.shape[0]
        x = self.embed(x)
        cls, dist = self.cls_token.expand(b, -1, -1), self.dist_token.expand(b, -1, -1)
        x = self.blocks(torch.cat((cls, dist, x), dim=1) + self.pos_embed)
        x = self.norm(x)
        return (self.head(x[:, 0]) + self.head_dist(x[:, 1])) / 2


@wild(image(), stays=5, half="embed.proj 4, blocks.0.mlp.0 8, blocks.1.norm2 4, norm 4")
def vit():
    return ViT()


def windows_of(x, size):
    b, h, w, c = x.shape
    x = x.view(b, h // size, size, w // size, size, c)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(-1, size, size, c)


def windows_back(windows, size, h, w):
    b = int(windows.shape[0] / (h * w / size / size))
    x = windows.view(b, h // size, w // size, size, size, -1)
    return x.permute(0, 1, 3, 2, 4, 5).contiguous().view(b, h, w, -1)


class WindowAttention(nn.Module):
    def __init__(self, c, size, heads):
        super().__init__()
        self.size, self.heads, self.scale = size, heads, (c // heads) ** -0.5
        self.table = nn.Parameter(torch.zeros((2 * size - 1) ** 2, heads))
        coords = torch.stack(
            torch.meshgrid(torch.arange(size), torch.arange(size), indexing="ij")
        ).flatten(1)
        relative = (
            (coords[:, :, None] - coords[:, None, :]).permute(1, 2, 0).contiguous() + size - 1
        )
        relative[:, :, 0] *= 2 * size - 1
        self.register_buffer("relative_index", relative.sum(-1))
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x, mask=None):
        b_, n, c = x.shape
        qkv = self.qkv(x).reshape(b_, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 1, 4)
        q, k, v = qkv[0], qkv[1], qkv[2]
        attn = (q * self.scale) @ k.transpose(-2, -1)
        bias = self.table[self.relative_index.view(-1)].view(n, n, -1).permute(2, 0, 1).contiguous()
        attn = attn + bias.unsqueeze(0)
        if mask is not None:
            windows = mask.shape[0]
            attn = attn.view(b_ // windows, windows, self.heads, n, n) + mask.unsqueeze(
                1
            ).unsqueeze(0)
            attn = attn.view(-1, self.heads, n, n)
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(b_, n, c)
        return self.proj(x)


class SwinBlock(nn.Module):
    def __init__(self, c, side, size=2, shift=0, heads=2):
        super().__init__()
        self.side, self.size, self.shift = side, size, shift
        self.norm1, self.norm2, self.mlp = nn.LayerNorm(c), nn.LayerNorm(c), Mlp(c, 2 * c)
        self.attn = WindowAttention(c, size, heads)
        mask = None
        if shift:
            img = torch.zeros((1, side, side, 1))
            cuts = (slice(0, -size), slice(-size, -shift), slice(-shift, None))
            for number, (h, w) in enumerate((h, w) for h in cuts for w in cuts):
                img[:, h, w, :] = number
            flat = windows_of(img, size).view(-1, size * size)
            mask = flat.unsqueeze(1) - flat.unsqueeze(2)
            mask = mask.masked_fill(mask != 0, -100.0).masked_fill(mask == 0, 0.0)
        self.register_buffer("attn_mask", mask)

    def forward(self, x):
        h = w = self.side
        b, n, c = x.shape
        assert n == h * w
        shortcut = x
        x = self.norm1(x).view(b, h, w, c)
        x = torch.roll(x, shifts=(-self.shift, -self.shift), dims=(1, 2)) if self.shift else x
        x = windows_of(x, self.size).view(-1, self.size * self.size, c)
        x = self.attn(x, mask=self.attn_mask).view(-1, self.size, self.size, c)
        x = windows_back(x, self.size, h, w)
        x = torch.roll(x, shifts=(self.shift, self.shift), dims=(1, 2)) if self.shift else x
        x = shortcut + x.view(b, h * w, c)
        return x + self.mlp(self.norm2(x))


class PatchMerging(nn.Module):
    def __init__(self, c, side):
        super().__init__()
        self.side, self.norm, self.reduction = (
            side,
            nn.LayerNorm(4 * c),
            nn.Linear(4 * c, 2 * c, bias=False),
        )

    def forward(self, x):
        h = w = self.side
        b, n, c = x.shape
        x = x.view(b, h, w, c)
        x = torch.cat(
            [x[:, 0::2, 0::2, :], x[:, 1::2, 0::2, :], x[:, 0::2, 1::2, :], x[:, 1::2, 1::2, :]], -1
        )
        return self.reduction(self.norm(x.view(b, -1, 4 * c)))


@wild(
    image(),
    stays=5,
    half="embed.proj 4, one.mlp.0 8, two.norm1 4, merge.reduction 8, three.mlp.2 8",
    warns="a size became a plain number",
)
def swin():
    return Chain(
        embed=Tokens(8),
        one=SwinBlock(8, 4),
        two=SwinBlock(8, 4, shift=1),
        merge=PatchMerging(8, 4),
        three=SwinBlock(16, 2),
        head=TokenHead(16),
    )


class XCA(nn.Module):
    """Attention between channels: normalised over tokens, a temperature for each head."""

    def __init__(self, c, heads=2):
        super().__init__()
        self.heads, self.temperature = heads, nn.Parameter(torch.ones(heads, 1, 1))
        self.qkv, self.proj = nn.Linear(c, 3 * c), nn.Linear(c, c)

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, 3, self.heads, c // self.heads).permute(2, 0, 3, 4, 1)
        q, k, v = qkv[0], qkv[1], qkv[2]
        q, k = F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        attn = (q @ k.transpose(-2, -1) * self.temperature).softmax(dim=-1)
        return self.proj((attn @ v).permute(0, 3, 1, 2).reshape(b, n, c))


class LocalPatch(nn.Module):
    def __init__(self, c, side):
        super().__init__()
        self.side = side
        self.conv1, self.bn, self.conv2 = (
            nn.Conv2d(c, c, 3, padding=1, groups=c),
            nn.BatchNorm2d(c),
            nn.Conv2d(c, c, 3, padding=1, groups=c),
        )

    def forward(self, x):
        b, n, c = x.shape
        x = x.permute(0, 2, 1).reshape(b, c, self.side, self.side)
        return self.conv2(self.bn(F.gelu(self.conv1(x)))).reshape(b, c, n).permute(0, 2, 1)


class XCABlock(nn.Module):
    def __init__(self, c, side):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(c) for _ in range(3))
        self.attn, self.lpi, self.mlp = XCA(c), LocalPatch(c, side), Mlp(c, 2 * c)
        self.gamma1, self.gamma2, self.gamma3 = (nn.Parameter(torch.ones(c)) for _ in range(3))

    def forward(self, x):
        x = x + self.gamma1 * self.attn(self.norm1(x))
        x = x + self.gamma3 * self.lpi(self.norm3(x))
        return x + self.gamma2 * self.mlp(self.norm2(x))


# a softmax over channels: queries, keys and values of a head stay, two blocks of them
@wild(image(), stays=2 + 5, half="embed.proj 4, one.mlp.0 8, one.lpi.conv1 4, one.gamma3 4")
def xcit():
    return Chain(embed=Tokens(8), one=XCABlock(8, 4), head=TokenHead(8))


class Meta4D(nn.Module):
    """EfficientFormer: pooling at four dims, attention at three."""

    def __init__(self, c):
        super().__init__()
        self.mixer, self.conv1, self.conv2 = PoolMixer(), ConvBN(c, 2 * c), linear(2 * c, c)
        self.s1, self.s2 = nn.Parameter(torch.ones(c)), nn.Parameter(torch.ones(c))

    def forward(self, x):
        x = x + self.s1.view(1, -1, 1, 1) * self.mixer(x)
        return x + self.s2[None, :, None, None] * self.conv2(self.conv1(x))


class BiasedAttention(nn.Module):
    """LeViT and EfficientFormer: narrow keys, wide values, a learned bias by offset."""

    def __init__(self, c, key=4, heads=2, ratio=2, side=4):
        super().__init__()
        self.heads, self.key, self.d, self.scale = heads, key, ratio * key, key**-0.5
        self.qkv, self.proj = nn.Linear(c, heads * (2 * key + self.d)), nn.Linear(heads * self.d, c)
        points = [(i, j) for i in range(side) for j in range(side)]
        offsets: dict[tuple, int] = {}
        index = [
            offsets.setdefault((abs(p[0] - q[0]), abs(p[1] - q[1])), len(offsets))
            for p in points
            for q in points
        ]
        self.attention_biases = nn.Parameter(torch.zeros(heads, len(offsets)))
        self.register_buffer("bias_index", torch.tensor(index).view(len(points), len(points)))

    def forward(self, x):
        b, n, c = x.shape
        qkv = self.qkv(x).reshape(b, n, self.heads, -1).permute(0, 2, 1, 3)
        q, k, v = qkv.split([self.key, self.key, self.d], dim=-1)
        attn = (q @ k.transpose(-2, -1)) * self.scale + self.attention_biases[:, self.bias_index]
        x = (attn.softmax(dim=-1) @ v).transpose(1, 2).reshape(b, n, self.heads * self.d)
        return self.proj(F.hardswish(x))


@wild(
    image(), stays=5, half="stem.conv 4, pool.conv1.conv 8, pool.s1 4, attn.mlp.0 8, attn.norm1 4"
)
def efficientformer():
    return Chain(
        stem=ConvBN(3, 8, 3, 2),
        pool=Meta4D(8),
        flat=ToTokens(),
        attn=PreNorm(8, BiasedAttention(8), 16),
        head=TokenHead(8),
    )


class ToTokens(nn.Module):
    def forward(self, x):
        return x.flatten(2).transpose(1, 2)


class LinearBN(nn.Sequential):
    """LeViT: a linear layer over tokens and BatchNorm over all of them."""

    def __init__(self, i, o):
        super().__init__()
        self.add_module("c", nn.Linear(i, o, bias=False))
        self.add_module("bn", nn.BatchNorm1d(o))

    def forward(self, x):
        x = self.c(x)
        return self.bn(x.flatten(0, 1)).reshape_as(x)


class Residual(nn.Module):
    def __init__(self, m):
        super().__init__()
        self.m = m

    def forward(self, x):
        return x + self.m(x)


class LeViTAttention(nn.Module):
    def __init__(self, c, key=4, heads=2, ratio=2):
        super().__init__()
        self.heads, self.key, self.d, self.scale = heads, key, ratio * key, key**-0.5
        self.qkv, self.proj = (
            LinearBN(c, heads * (2 * key + self.d)),
            nn.Sequential(nn.Hardswish(), LinearBN(heads * self.d, c)),
        )

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = self.qkv(x).view(b, n, self.heads, -1).split([self.key, self.key, self.d], dim=3)
        q, k, v = q.permute(0, 2, 1, 3), k.permute(0, 2, 3, 1), v.permute(0, 2, 1, 3)
        attn = (q @ k * self.scale).softmax(dim=-1)
        return self.proj((attn @ v).transpose(1, 2).reshape(b, n, self.heads * self.d))


@wild(image(), stays=5, half="stem.0.conv 4, stem.1.conv 4, mlp.m.0.c 8, attn.m.proj.1.c 4")
def levit():
    return Chain(
        stem=nn.Sequential(ConvBN(3, 8, 3, 2), linear(8, 8, 3)),
        flat=ToTokens(),
        attn=Residual(LeViTAttention(8)),
        mlp=Residual(nn.Sequential(LinearBN(8, 16), nn.Hardswish(), LinearBN(16, 8))),
        head=TokenHead(8),
    )


class MobileViTBlock(nn.Module):
    """Unfold to patches, attend across patches, fold, and join with what came in."""

    def __init__(self, c, dim, p=2):
        super().__init__()
        self.p = p
        self.local = nn.Sequential(silu(c, c, 3), nn.Conv2d(c, dim, 1, bias=False))
        self.transformer, self.norm = PreNorm(dim, Attention(dim), 2 * dim), nn.LayerNorm(dim)
        self.proj, self.fusion = silu(dim, c), silu(2 * c, c, 3)

    def forward(self, x):
        shortcut = x
        x = self.local(x)
        b, c, h, w = x.shape
        p, nh, nw = self.p, h // self.p, w // self.p
        x = x.reshape(b * c * nh, p, nw, p).transpose(1, 2)
        x = x.reshape(b, c, nh * nw, p * p).transpose(1, 3).reshape(b * p * p, nh * nw, c)
        x = self.norm(self.transformer(x))
        x = x.contiguous().view(b, p * p, nh * nw, -1)
        x = x.transpose(1, 3).reshape(b * c * nh, nw, p, p)
        x = self.proj(x.transpose(1, 2).reshape(b, c, h, w))
        return self.fusion(torch.cat((shortcut, x), dim=1))


@wild(
    image(),
    stays=5,
    half="stem.conv 4, block.local.0.conv 4, block.local.1 6, block.transformer.mlp.0 12, "
    "block.proj.conv 4",
)
def mobilevit():
    return Chain(stem=silu(3, 8, 3), block=MobileViTBlock(8, 12), head=Classifier(8))


class EinsumAttention(nn.Module):
    """Everything by einsum; heads as a dim of the weights."""

    def __init__(self, c, heads=2, d=4):
        super().__init__()
        self.wq, self.wk, self.wv = (nn.Parameter(torch.randn(c, heads, d)) for _ in range(3))
        self.wo, self.scale = nn.Parameter(torch.randn(heads, d, c)), d**-0.5

    def forward(self, x):
        q, k, v = (torch.einsum("btc,chd->bhtd", x, w) for w in (self.wq, self.wk, self.wv))
        attn = torch.einsum("bhtd,bhsd->bhts", q, k).mul(self.scale).softmax(-1)
        return torch.einsum(
            "bhsd,hdc->bsc",
            torch.einsum("bhts,bhsd->bhtd", attn, v).transpose(1, 2).transpose(1, 2),
            self.wo,
        )


class ExternalAttention(nn.Module):
    """Two linear layers as memories; normalised twice."""

    def __init__(self, c, s=6):
        super().__init__()
        self.mk, self.mv = nn.Linear(c, s, bias=False), nn.Linear(s, c, bias=False)

    def forward(self, x):
        attn = self.mk(x).softmax(dim=1)
        attn = attn / torch.sum(attn, dim=2, keepdim=True)
        return self.mv(attn)


class LinearAttention(nn.Module):
    """Keys meet values first."""

    def __init__(self, c, heads=2):
        super().__init__()
        self.heads, self.q, self.k, self.v, self.out = heads, *(nn.Linear(c, c) for _ in range(4))

    def forward(self, x):
        b, n, c = x.shape
        q, k, v = (
            f(x).view(b, n, self.heads, -1).transpose(1, 2) for f in (self.q, self.k, self.v)
        )
        q, k = F.elu(q) + 1, F.elu(k) + 1
        kv = k.transpose(-2, -1) @ v
        z = 1 / (q @ k.sum(dim=-2).unsqueeze(-1) + 1e-6)
        return self.out(((q @ kv) * z).transpose(1, 2).reshape(b, n, -1))


# a softmax over tokens, divided by its sum over the memory; sums of ELU + 1, which is 1 at 0
@wild(
    image(),
    stays=6 + 8 + 5,
    half="embed.proj 4, one.mlp.0 8, two.mlp.2 4, three.norm1 4",
    why="mixes",
)
def attentions_of_other_kinds():
    return Chain(
        embed=Tokens(8),
        one=PreNorm(8, EinsumAttention(8), 16),
        two=PreNorm(8, ExternalAttention(8), 16),
        three=PreNorm(8, LinearAttention(8), 16),
        head=TokenHead(8),
    )


# -- ways in and out -------------------------------------------------------------------------------


@wild(image(), stays=5, half="stem.conv 4, block.conv1.conv 4")
def traced_already():
    return torch.fx.symbolic_trace(
        Chain(stem=ConvBN(3, 8, 3), block=Basic(8, 8), head=Classifier(8))
    )


@dataclasses.dataclass
class Found:
    boxes: Tensor
    scores: Tensor
    features: list[Tensor]
    name: str = "p0"


class Pair(NamedTuple):
    logits: Tensor
    extra: dict[str, Tensor]


class Heads(nn.Module):
    def __init__(self, wrap):
        super().__init__()
        self.wrap, self.stem, self.body = wrap, ConvBN(3, 8, 3), Basic(8, 10)
        self.box, self.score, self.deep = (
            nn.Conv2d(10, 4, 1),
            nn.Conv2d(10, 2, 1),
            nn.Conv2d(8, 3, 1),
        )

    def forward(self, x):
        x = self.stem(x)
        y = self.body(x)
        return self.wrap(self.box(y), self.score(y), self.deep(x))


@wild(image(), stays=9, half="stem.conv 4, body.conv1.conv 5")
def gives_a_dataclass():
    return Heads(lambda box, score, deep: Found(box, score.sigmoid(), [deep]))


@wild(image(), stays=9, half="stem.conv 4, body.conv1.conv 5")
def gives_a_named_tuple():
    return Heads(lambda box, score, deep: Pair(box, {"score": score, "deep": deep}))


@wild(image(), stays=9, half="stem.conv 4, body.conv1.conv 5")
def gives_a_dict_of_lists():
    return Heads(
        lambda box, score, deep: {"boxes": [box, {"score": score}], "deep": (deep, None, 3)}
    )


class Multimodal(nn.Module):
    """A dict of two inputs, and a list of pictures."""

    def __init__(self):
        super().__init__()
        self.image, self.sound = ConvBN(3, 8, 3), nn.Sequential(nn.Conv1d(1, 6, 3), nn.ReLU())
        self.view = ConvBN(3, 4, 3)
        self.fc = nn.Sequential(nn.Linear(18, 10), nn.ReLU(), nn.Linear(10, 5))

    def forward(self, batch, views):
        a = self.image(batch["image"]).mean((2, 3))
        b = self.sound(batch["sound"]).amax(-1)
        c = torch.stack([self.view(v).mean((2, 3)) for v in views]).sum(0)
        return self.fc(torch.cat([a, b, c], 1))


@wild(
    {"image": image(), "sound": tensor(2, 1, 9)},
    [image(), image()],
    stays=5,
    half="image.conv 4, sound.0 3, view.conv 2, fc.0 5",
)
def takes_dicts_and_lists():
    return Multimodal()


class KeywordOnly(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = ConvBN(3, 8, 3), ConvBN(1, 8, 3), Classifier(8)

    def forward(self, *, picture, depth=None, scale: float = 1.0):
        x = self.a(picture)
        if depth is not None:
            x = x + self.b(depth)
        return self.head(x * scale)


@wild(stays=5, half="a.conv 4, b.conv 4", keywords={"depth": image(1), "picture": image()})
def keyword_only():
    return KeywordOnly()


class Dispatch(nn.Module):
    """Modules in a dict, called by names, some by `getattr`."""

    def __init__(self):
        super().__init__()
        self.steps = nn.ModuleDict(
            {"conv": ConvBN(3, 8, 3), "res": Basic(8, 8), "wide": ConvBN(8, 12, 3)}
        )
        self.act = nn.ModuleDict({"relu": nn.ReLU(), "lrelu": nn.LeakyReLU()})
        self.head_a, self.head_b = Classifier(12), Classifier(12, 3)
        self.order = ["conv", "res", "wide"]

    def forward(self, x, task="a"):
        for name in self.order:
            x = self.act["relu" if name == "conv" else "lrelu"](self.steps[name](x))
        return getattr(self, f"head_{task}")(x)


@wild(image(), stays=5, half="steps.conv.conv 4, steps.res.conv1.conv 4, steps.wide.conv 6")
def dispatch_by_name():
    return Dispatch()


class PConv(nn.Module):
    """FasterNet: convolve a share of the channels, leave the rest, by slices or by a split."""

    def __init__(self, c, div=4, cut=True):
        super().__init__()
        self.part, self.cut = c // div, cut
        self.rest = c - self.part
        self.conv = nn.Conv2d(self.part, self.part, 3, padding=1, bias=False)

    def forward(self, x):
        if not self.cut:
            x = x.clone()
            x[:, : self.part, :, :] = self.conv(x[:, : self.part, :, :])
            return x
        x1, x2 = torch.split(x, [self.part, self.rest], dim=1)
        return torch.cat((self.conv(x1), x2), 1)


class FasterBlock(nn.Module):
    def __init__(self, c, cut):
        super().__init__()
        self.mixing = PConv(c, cut=cut)
        self.mlp = nn.Sequential(ConvBN(c, 2 * c), nn.Conv2d(2 * c, c, 1, bias=False))

    def forward(self, x):
        return x + self.mlp(self.mixing(x))


@wild(image(), stays=5, half="stem.conv 8, one.mixing.conv 2, one.mlp.0.conv 16, two.mlp.1 8")
def fasternet():
    return Chain(
        stem=ConvBN(3, 16, 3),
        one=FasterBlock(16, True),
        two=FasterBlock(16, True),
        head=Classifier(16),
    )


# as published it is for inference only: the slice that a convolution reads is written to
@wild(
    image(),
    stays=5,
    half="stem.conv 8, one.mixing.conv 2, one.mlp.0.conv 16, two.mlp.1 8",
    trains=False,
)
def fasternet_by_slices():
    return Chain(
        stem=ConvBN(3, 16, 3),
        one=FasterBlock(16, False),
        two=FasterBlock(16, False),
        head=Classifier(16),
    )


# -- computed positions, states, and time ----------------------------------------------------------


def edge_features(x, k=3):
    """DGCNN: each point beside its nearest neighbours, found in the space of the features."""
    b, c, n = x.shape
    inner = -2 * torch.matmul(x.transpose(2, 1), x)
    square = torch.sum(x**2, dim=1, keepdim=True)
    near = (-square - inner - square.transpose(2, 1)).topk(k=k, dim=-1)[1]
    base = torch.arange(0, b, device=x.device).view(-1, 1, 1) * n
    near = (near + base).view(-1)
    points = x.transpose(2, 1).contiguous()
    feature = points.view(b * n, -1)[near, :].view(b, n, k, c)
    points = points.view(b, n, 1, c).repeat(1, 1, k, 1)
    return torch.cat((feature - points, points), dim=3).permute(0, 3, 1, 2).contiguous()


class PointGraph(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = ConvBN(6, 8), ConvBN(16, 10)
        self.conv3 = nn.Sequential(nn.Conv1d(18, 12, 1), nn.BatchNorm1d(12), nn.LeakyReLU(0.2))
        self.fc = nn.Linear(24, 5)

    def forward(self, x):
        x1 = self.conv1(edge_features(x)).max(dim=-1, keepdim=False)[0]
        x2 = self.conv2(edge_features(x1)).max(dim=-1, keepdim=False)[0]
        x = self.conv3(torch.cat((x1, x2), dim=1))
        pools = F.adaptive_max_pool1d(x, 1), F.adaptive_avg_pool1d(x, 1)
        return self.fc(torch.cat([p.view(x.size(0), -1) for p in pools], 1))


@wild(tensor(2, 3, 7), stays=5, half="conv1.conv 4, conv2.conv 5, conv3.0 6")
def point_graph():
    return PointGraph()


class Selected(nn.Module):
    """A transformer that goes on with the tokens its class token looks at, and a mean of others."""

    def __init__(self, c=8, keep=6):
        super().__init__()
        self.embed, self.keep = Tokens(c), keep
        self.cls = nn.Parameter(torch.zeros(1, 1, c))
        self.score = nn.Linear(c, 1)
        self.one, self.two = PreNorm(c, Attention(c), 16), PreNorm(c, Attention(c), 16)
        self.norm, self.head = nn.LayerNorm(c), nn.Linear(c, 5)

    def forward(self, x):
        x = self.embed(x)
        x = self.one(torch.cat((self.cls.expand(x.shape[0], -1, -1), x), 1))
        cls, rest = x[:, :1], x[:, 1:]
        score = self.score(rest).squeeze(-1)
        best = torch.topk(score, self.keep, dim=1)[1]
        index = best.unsqueeze(-1).expand(-1, -1, x.shape[-1])
        taken = torch.gather(rest, dim=1, index=index)
        mean = (rest * score.softmax(1).unsqueeze(-1)).sum(1, keepdim=True)
        x = self.two(torch.cat((cls, taken, mean), dim=1))
        return self.head(self.norm(x)[:, 0])


@wild(image(), stays=5, half="embed.proj 4, one.mlp.0 8, two.mlp.2 4, norm 4")
def tokens_selected():
    return Selected()


class Translator(nn.Module):
    """Encoder and decoder with additive attention, a step at a time, fed what it gave."""

    def __init__(self, words=9, dim=8, hidden=6):
        super().__init__()
        self.embed_in, self.embed_out = nn.Embedding(words, dim), nn.Embedding(words, dim)
        self.encoder = nn.GRU(dim, hidden, batch_first=True, bidirectional=True)
        self.bridge, self.decoder = (
            nn.Linear(2 * hidden, hidden),
            nn.GRUCell(dim + 2 * hidden, hidden),
        )
        self.keys, self.query = nn.Linear(2 * hidden, 4), nn.Linear(hidden, 4, bias=False)
        self.energy, self.out = nn.Linear(4, 1), nn.Linear(hidden + 2 * hidden, words)

    def forward(self, source, target):
        memory, h = self.encoder(self.embed_in(source))
        state = torch.tanh(self.bridge(torch.cat((h[-2], h[-1]), dim=1)))
        keys, found = self.keys(memory), []
        for t in range(target.shape[1]):
            score = self.energy(torch.tanh(keys + self.query(state).unsqueeze(1))).squeeze(2)
            context = torch.bmm(score.softmax(1).unsqueeze(1), memory).squeeze(1)
            state = self.decoder(torch.cat((self.embed_out(target[:, t]), context), 1), state)
            found.append(self.out(torch.cat((state, context), 1)))
        return torch.stack(found, 1)


@wild(
    torch.tensor([[1, 2, 3, 4], [8, 7, 0, 5]]),
    torch.tensor([[1, 6, 2], [3, 0, 8]]),
    stays=9,
    half="encoder.weight_ih_l0 9, bridge 3, decoder.weight_hh 9, keys 2, embed_in 9",
)
def translator():
    return Translator()


class TemporalShift(nn.Module):
    """Some channels of the frame before, some of the frame after, then the block."""

    def __init__(self, net, frames=4, div=4):
        super().__init__()
        self.net, self.frames, self.div = net, frames, div

    def forward(self, x):
        nt, c, h, w = x.size()
        x = x.view(nt // self.frames, self.frames, c, h, w)
        fold = c // self.div
        out = torch.zeros_like(x)
        out[:, :-1, :fold] = x[:, 1:, :fold]
        out[:, 1:, fold : 2 * fold] = x[:, :-1, fold : 2 * fold]
        out[:, :, 2 * fold :] = x[:, :, 2 * fold :]
        return self.net(out.view(nt, c, h, w))


class ShiftedVideo(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.one = ConvBN(3, 8, 3), TemporalShift(ConvBN(8, 8, 3))
        self.two, self.head = TemporalShift(Basic(8, 8)), Classifier(8)

    def forward(self, clips):
        b, t = clips.shape[:2]
        x = self.two(self.one(self.stem(clips.flatten(0, 1))))
        return self.head(x).view(b, t, -1).mean(1)


@wild(tensor(2, 4, 3, 6, 6), stays=5, half="stem.conv 4, one.net.conv 4, two.net.conv1.conv 4")
def temporal_shift():
    return ShiftedVideo()
