"""Law 6: channels are tied where they must be and nowhere else.

Each case is a small network whose number of independent channels is known by hand. Too few mean
over-tying, which comparing numbers cannot see; too many would break the pruned network.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import pytest
import torch
import torch.nn.functional as F
from strategies import conv, conv_bn, conv_bn_act
from torch import Tensor, nn

import fxprune

OUTPUT = "reaches the network's output"
CONSTANT = "meets a constant or an input"
MIXED = "mixes channels"


class Net(nn.Module):
    """Modules, parameters and buffers by name, and a forward written as a function of them."""

    def __init__(self, forward: Callable[[Net, Tensor], object], **parts: object):
        super().__init__()
        self._run = forward
        for name, part in parts.items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                self.register_buffer(name, part)
            else:
                setattr(self, name, part)

    def forward(self, x: Tensor) -> object:
        return self._run(self, x)


@dataclass
class Case:
    """A network on a 2x3x8x8 input. ``free``: how many channels can go, each alone. ``frozen``: for
    groups that cannot, a part of the reason; the last layer's outputs are always among them."""

    name: str
    net: Net
    free: int
    frozen: dict[str, str] = field(default_factory=dict)
    mixing: str = "norms"


CASES: list[Case] = []


def case(name: str, free: int, forward, *, frozen: dict[str, str] | None = None, mixing="norms", **parts) -> None:
    """A network that ends in a classifier of 5 classes, `fc`, on pooled features where it has one."""
    frozen = {**({"fc": OUTPUT} if "fc" in parts else {}), **(frozen or {})}
    CASES.append(Case(name, Net(forward, **parts), free, frozen, mixing))


def pooled(m: Net, y: Tensor) -> Tensor:
    return m.fc(y.mean((2, 3)))


def fc(c: int) -> nn.Linear:
    return nn.Linear(c, 5)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


# -- chains, shortcuts, sharing --------------------------------------------------------------------

case("plain", 8, lambda m, x: pooled(m, m.a(x)), a=conv_bn_act(3, 8), fc=fc(8))
case("two layers", 8 + 6, lambda m, x: pooled(m, m.b(m.a(x))), a=conv(3, 8), b=conv(8, 6), fc=fc(6))
case("residual", 8 + 6, lambda m, x: pooled(m, (y := m.a(x)) + m.c(m.b(y))),
     a=conv(3, 8), b=conv_bn_act(8, 6), c=conv_bn(6, 8), fc=fc(8))  # fmt: skip
case("two residuals, one spine", 8 + 6 + 4, lambda m, x: pooled(m, (z := (y := m.a(x)) + m.c(m.b(y))) + m.e(m.d(z))),
     a=conv(3, 8), b=conv(8, 6), c=conv(6, 8), d=conv(8, 4), e=conv(4, 8), fc=fc(8))  # fmt: skip
case("residual to the input", 8, lambda m, x: pooled(m, x + m.b(m.a(x))),
     frozen={"b": CONSTANT}, a=conv(3, 8), b=conv(8, 3), fc=fc(3))  # fmt: skip
case("shared by two inputs", 8 + 6, lambda m, x: pooled(m, m.s(m.a(x)) * m.s(m.b(x))),
     a=conv(3, 8), b=conv(3, 8), s=conv(8, 6), fc=fc(6))  # fmt: skip
case("loop", 8, lambda m, x: pooled(m, m.b(m.b(m.a(x)))), a=conv(3, 8), b=conv(8, 8), fc=fc(8))


def _tied() -> dict[str, nn.Module]:
    c, d = conv(8, 6), conv(8, 6)
    d.weight = c.weight
    return dict(a=conv(3, 8), b=conv(3, 8), c=c, d=d, fc=fc(12))


case("one Parameter in two layers", 8 + 6,
     lambda m, x: pooled(m, torch.cat([m.c(m.a(x)), m.d(m.b(x))], 1)), **_tied())  # fmt: skip
case("a weight and its transpose", 6, lambda m, x: pooled(m, F.conv_transpose2d(m.a(x), m.a.weight)),
     a=nn.Conv2d(3, 6, 1), fc=fc(3))  # fmt: skip
case("also an output", 6, lambda m, x: (pooled(m, m.b(y := m.a(x))), y),
     frozen={"a": OUTPUT}, a=conv(3, 8), b=conv(8, 6), fc=fc(6))  # fmt: skip
case("in place", 8, lambda m, x: pooled(m, m.a(x).relu_().add_(m.b(x))), a=conv(3, 8), b=conv(3, 8), fc=fc(8))

# -- joining and cutting ---------------------------------------------------------------------------

case("cat", 8 + 4, lambda m, x: pooled(m, torch.cat([m.a(x), m.b(x)], 1)), a=conv(3, 8), b=conv(3, 4), fc=fc(12))
case("cat with the input", 8 + 6, lambda m, x: pooled(m, m.b(torch.cat([m.a(x), x], 1))),
     a=conv(3, 8), b=conv(11, 6), frozen={"b": "is made by no parameter"}, fc=fc(6))  # fmt: skip
case("self cat", 8, lambda m, x: pooled(m, torch.cat([y := m.a(x), y], 1)), a=conv(3, 8), fc=fc(16))
case("nested cat", 5 + 4, lambda m, x: pooled(m, torch.cat([y := m.a(x), torch.cat([m.b(x), y], 1)], 1)),
     a=conv(3, 5), b=conv(3, 4), fc=fc(14))  # fmt: skip
case("cat meets a sum", 12, lambda m, x: pooled(m, torch.cat([m.a(x), m.b(x)], 1) + m.c(x)),
     a=conv(3, 5), b=conv(3, 7), c=conv(3, 12), fc=fc(12))  # fmt: skip
case("cat over rows", 8, lambda m, x: pooled(m, torch.cat([m.a(x), m.b(x)], 2)), a=conv(3, 8), b=conv(3, 8), fc=fc(8))
case("uneven split", 10 + 4, lambda m, x: pooled(m, m.b((p := m.a(x).split([3, 7], 1))[0]) + m.c(p[1])),
     a=conv(3, 10), b=conv(3, 4), c=conv(7, 4), fc=fc(4))  # fmt: skip
case("chunk gate", 6, lambda m, x: pooled(m, (p := m.a(x).chunk(2, 1))[0] * p[1].sigmoid()), a=conv(3, 12), fc=fc(6))
case("F.glu", 6, lambda m, x: pooled(m, F.glu(m.a(x), 1)), a=conv(3, 12), fc=fc(6))
case("nn.GLU", 6, lambda m, x: pooled(m, m.g(m.a(x))), a=conv(3, 12), g=nn.GLU(1), fc=fc(6))
case("strided slices", 9 + 4, lambda m, x: pooled(m, m.b((y := m.a(x))[:, ::2]) + m.c(y[:, 1::2])),
     a=conv(3, 9), b=conv(5, 4), c=conv(4, 4), fc=fc(4))  # fmt: skip
case("partial convolution", 12 + 4, lambda m, x: pooled(m, torch.cat((m.b((y := m.a(x))[:, :4]), y[:, 4:]), 1)),
     a=conv(3, 12), b=conv(4, 4), fc=fc(12))  # fmt: skip
# channel i is tied to i + 1: all nine go together
case("overlapping slices added", 1, lambda m, x: pooled(m, (y := m.a(x))[:, :8] + y[:, 1:]),
     a=conv(3, 9), fc=fc(8))  # fmt: skip
case("Res2Net", 4 + 4 + 4 + 4, lambda m, x: pooled(m, torch.cat(_res2net(m, m.a(x).split(4, 1)), 1)),
     a=conv(3, 12), b=conv(4, 4), c=conv(4, 4), fc=fc(12))  # fmt: skip


def _res2net(m: Net, p) -> list[Tensor]:
    q = m.b(p[1])
    return [p[0], q, m.c(p[2] + q)]


case("C2f", 8 + 3 + 4, lambda m, x: pooled(m, torch.cat([*(y := m.a(x).chunk(2, 1)), m.c(m.b(y[1]))], 1)),
     a=conv(3, 8), b=conv(4, 3), c=conv(3, 4), fc=fc(12))  # fmt: skip
case("C2f with shortcut", 8 + 3, lambda m, x: pooled(m, torch.cat([*(y := m.a(x).chunk(2, 1)), y[1] + m.c(m.b(y[1]))], 1)),
     a=conv(3, 8), b=conv(4, 3), c=conv(3, 4), fc=fc(12))  # fmt: skip
case("Ghost", 5, lambda m, x: pooled(m, torch.cat([y := m.a(x), m.b(y)], 1)[:, :9]),
     a=conv(3, 5), b=conv(5, 5, groups=5), fc=fc(9))  # fmt: skip
# the rows of a stack keep equally many channels, not the same ones
case("stack and flatten", 5 + 5, lambda m, x: pooled(m, torch.stack([m.a(x), m.b(x)], 1).flatten(1, 2)),
     a=conv(3, 5), b=conv(3, 5), fc=fc(10))  # fmt: skip
case("stack and sum", 5, lambda m, x: pooled(m, torch.stack([m.a(x), m.b(x)], 1).sum(1)),
     a=conv(3, 5), b=conv(3, 5), fc=fc(5))  # fmt: skip
case("unbind and swap", 8, lambda m, x: pooled(m, torch.cat(m.a(x).unflatten(1, (2, 4)).unbind(1)[::-1], 1)),
     a=conv(3, 8), fc=fc(8))  # fmt: skip
case("maxout over halves", 6, lambda m, x: pooled(m, m.a(x).unflatten(1, (2, 6)).amax(1)), a=conv(3, 12), fc=fc(6))
case("maxout over neighbours", 6, lambda m, x: pooled(m, m.a(x).unflatten(1, (6, 2)).amax(2)), a=conv(3, 12), fc=fc(6))

# -- index maps ------------------------------------------------------------------------------------

case("flip", 8, lambda m, x: pooled(m, m.a(x).flip(1)), a=conv(3, 8), fc=fc(8))
case("flip meets itself", 4, lambda m, x: pooled(m, (y := m.a(x)) + y.flip(1)), a=conv(3, 8), fc=fc(8))
case("roll", 8, lambda m, x: pooled(m, m.a(x).roll(3, 1)), a=conv(3, 8), fc=fc(8))
case("roll by half meets itself", 4, lambda m, x: pooled(m, (y := m.a(x)) + y.roll(4, 1)), a=conv(3, 8), fc=fc(8))
case("index_select", 8, lambda m, x: pooled(m, m.a(x).index_select(1, m.i)),
     a=conv(3, 8), i=torch.tensor([7, 0, 0, 3]), fc=fc(4))  # fmt: skip
case("index buffer", 8, lambda m, x: pooled(m, m.a(x)[:, m.i]), a=conv(3, 8), i=torch.randperm(8), fc=fc(8))
case("repeat", 5, lambda m, x: pooled(m, m.a(x).repeat(1, 2, 1, 1)), a=conv(3, 5), fc=fc(10))
case("repeat_interleave", 5, lambda m, x: pooled(m, m.a(x).repeat_interleave(2, 1)), a=conv(3, 5), fc=fc(10))
case("padded channels", 12, lambda m, x: pooled(m, F.pad(m.a(x), (0, 0, 0, 0, 1, 3)) + m.b(x)),
     a=conv(3, 8), b=conv(3, 12), fc=fc(12))  # fmt: skip
case("zeros by cat", 12, lambda m, x: pooled(m, torch.cat([m.a(x), x.new_zeros(x.shape[0], 4, 8, 8)], 1) + m.b(x)),
     a=conv(3, 8), b=conv(3, 12), fc=fc(12))  # fmt: skip
# as many zeros as there are channels in a slice: they stay as many
case("zeros like a slice", 8, lambda m, x: pooled(m, torch.cat([y := m.a(x), torch.zeros_like(y[:, :4])], 1) + m.b(x)),
     a=conv(3, 8), b=conv(3, 12), fc=fc(12))  # fmt: skip
case("shuffle by views", 12 + 6,
     lambda m, x: pooled(m, m.b((y := m.a(x)).view(-1, 3, 4, 8, 8).transpose(1, 2).reshape(y.shape))),
     a=conv(3, 12), b=conv(12, 6), fc=fc(6))  # fmt: skip
case("nn.ChannelShuffle", 12, lambda m, x: pooled(m, m.s(m.a(x))), a=conv(3, 12), s=nn.ChannelShuffle(3), fc=fc(12))
case("shuffle before groups", 12 + 12, lambda m, x: pooled(m, m.b(m.s(m.a(x)))),
     a=conv(3, 12), s=nn.ChannelShuffle(3), b=conv(12, 12, groups=3), fc=fc(12))  # fmt: skip
case("pixel_shuffle", 4, lambda m, x: pooled(m, F.pixel_shuffle(m.a(x), 2)), a=conv(3, 16), fc=fc(4))
case("pixel_shuffle by views", 4,
     lambda m, x: pooled(m, m.a(x).view(-1, 4, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(-1, 4, 16, 16)),
     a=conv(3, 16), fc=fc(4))  # fmt: skip
case("pixel_unshuffle", 5, lambda m, x: pooled(m, F.pixel_unshuffle(m.a(x), 2)), a=conv(3, 5), fc=fc(20))
case("focus", 5, lambda m, x: pooled(m, torch.cat([(y := m.a(x))[..., ::2, ::2], y[..., 1::2, ::2]], 1)),
     a=conv(3, 5), fc=fc(10))  # fmt: skip
case("flatten", 8, lambda m, x: m.fc(m.p(m.a(x)).flatten(1)), a=conv(3, 8), p=nn.MaxPool2d(4), fc=fc(32))
case("flatten channels last", 8, lambda m, x: m.fc(m.p(m.a(x)).permute(0, 2, 3, 1).flatten(1)),
     a=conv(3, 8), p=nn.MaxPool2d(4), fc=fc(32))  # fmt: skip
case("baked view", 8, lambda m, x: m.fc(m.p(m.a(x)).view(-1, 32)), a=conv(3, 8), p=nn.MaxPool2d(4), fc=fc(32))
case("Linear seen as a picture", 8 + 4 + 6, lambda m, x: pooled(m, m.c(m.l(m.a(x).mean((2, 3))).view(-1, 4, 4, 4))),
     a=conv(3, 8), l=nn.Linear(8, 64), c=conv(4, 6), fc=fc(6))  # fmt: skip

# -- layers ----------------------------------------------------------------------------------------

case("depthwise", 8, lambda m, x: pooled(m, m.b(m.a(x))), a=conv(3, 8), b=conv(8, 8, groups=8), fc=fc(8))
case("depthwise multiplier", 4 + 6, lambda m, x: pooled(m, m.c(m.b(m.a(x)))),
     a=conv(3, 4), b=conv(4, 8, groups=4), c=conv(8, 6), fc=fc(6))  # fmt: skip
case("grouped", 12 + 12, lambda m, x: pooled(m, m.b(m.a(x))), a=conv(3, 12), b=conv(12, 12, groups=3), fc=fc(12))
case("groups of 2, then of 3", 36, lambda m, x: pooled(m, m.c(m.b(m.a(x)))),
     a=conv(3, 12), b=conv(12, 12, groups=2), c=conv(12, 12, groups=3), fc=fc(12))  # fmt: skip
case("grouped over a seam", 5 + 7 + 6, lambda m, x: pooled(m, m.c(torch.cat([m.a(x), m.b(x)], 1))),
     a=conv(3, 5), b=conv(3, 7), c=conv(12, 6, groups=3), fc=fc(6))  # fmt: skip
case("transposed", 8 + 6, lambda m, x: pooled(m, m.b(m.a(x))), a=conv(3, 8), b=nn.ConvTranspose2d(8, 6, 2), fc=fc(6))
case("transposed groups", 8 + 6, lambda m, x: pooled(m, m.b(m.a(x))),
     a=conv(3, 8), b=nn.ConvTranspose2d(8, 6, 2, groups=2), fc=fc(6))  # fmt: skip
case("PReLU a channel", 8, lambda m, x: pooled(m, m.p(m.a(x))), a=conv(3, 8), p=nn.PReLU(8), fc=fc(8))
case("PReLU for all", 8, lambda m, x: pooled(m, m.p(m.a(x))), a=conv(3, 8), p=nn.PReLU(), fc=fc(8))
case("one output channel", 8 + 6, lambda m, x: pooled(m, m.c(m.b(m.a(x)))),
     a=conv(3, 8), b=conv(8, 1), c=conv(1, 6), fc=fc(6))  # fmt: skip
case("own weights", 6, lambda m, x: pooled(m, F.conv2d(x, m.w, m.b)), w=weight(6, 3, 1, 1), b=weight(6), fc=fc(6))
case("einsum", 8 + 6, lambda m, x: pooled(m, torch.einsum("nchw,oc->nohw", m.a(x), m.w)),
     a=conv(3, 8), w=weight(6, 8), fc=fc(6))  # fmt: skip
case("1x1 as matmul", 8 + 6, lambda m, x: pooled(m, (m.w @ m.a(x).flatten(2)).unflatten(2, (8, 8))),
     a=conv(3, 8), w=weight(6, 8), fc=fc(6))  # fmt: skip
case("weight_norm", 8, lambda m, x: pooled(m, m.a(x)), frozen={"a.parametrizations.weight.original1": "window"},
     a=nn.utils.parametrizations.weight_norm(conv(3, 8)), fc=fc(8))  # fmt: skip
case("conv3d excursion", 8, lambda m, x: pooled(m, m.a(x.unsqueeze(2)).squeeze(2)), a=nn.Conv3d(3, 8, 1), fc=fc(8))
case("LSTM reads channels", 8, lambda m, x: m.fc(m.r(m.a(x).mean(2).transpose(1, 2))[0]),
     a=conv(3, 8), r=nn.LSTM(8, 6, batch_first=True), fc=fc(6))  # fmt: skip

# -- gates, scales, norms --------------------------------------------------------------------------

case("SE by convolutions", 8 + 3, lambda m, x: pooled(m, (y := m.a(x)) * m.c(m.b(y.mean((2, 3), True)).relu()).sigmoid()),
     a=conv(3, 8), b=conv(8, 3, 1), c=conv(3, 8, 1), fc=fc(8))  # fmt: skip
case("SE by Linear", 8 + 3,
     lambda m, x: pooled(m, (y := m.a(x)) * m.c(m.b(y.mean((2, 3))).relu()).sigmoid().view(-1, 8, 1, 1)),
     a=conv(3, 8), b=nn.Linear(8, 3), c=nn.Linear(3, 8), fc=fc(8))  # fmt: skip
case("spatial mask", 8, lambda m, x: pooled(m, m.a(x) * m.b(x).sigmoid()), a=conv(3, 8), b=conv(3, 1), fc=fc(8))
case("scale and shift predicted", 8, lambda m, x: pooled(m, m.a(x) * (s := m.l(x.mean((2, 3)))[..., None, None].chunk(2, 1))[0] + s[1]),
     a=conv(3, 8), l=nn.Linear(3, 16), fc=fc(8))  # fmt: skip
case("selective kernels", 8 + 4, lambda m, x: pooled(m, _selective(m, torch.stack([m.a(x), m.b(x)], 1))),
     a=conv(3, 8), b=conv(3, 8), s=conv(8, 4, 1), g=conv(4, 16, 1), fc=fc(8))  # fmt: skip


def _selective(m: Net, y: Tensor) -> Tensor:
    gate = m.g(m.s(y.sum(1).mean((2, 3), keepdim=True)))
    return (y * gate.view(-1, 2, 8, 1, 1).softmax(1)).sum(1)


case("non-local", 8 + 4 + 5, lambda m, x: pooled(m, (y := m.a(x)) + m.o(_non_local(m, y))),
     a=conv(3, 8), q=conv(8, 4, 1), k=conv(8, 4, 1), v=conv(8, 5, 1), o=conv(5, 8, 1), fc=fc(8))  # fmt: skip


def _non_local(m: Net, y: Tensor) -> Tensor:
    weights = (m.q(y).flatten(2).transpose(1, 2) @ m.k(y).flatten(2)).softmax(-1)
    return (m.v(y).flatten(2) @ weights.transpose(1, 2)).view(y.shape[0], -1, 8, 8)


case("two heads by hand", 8 + 6 + 6 + 7, lambda m, x: m.fc(m.o(_heads(m, m.a(x).flatten(2).transpose(1, 2))).mean(1)),
     a=conv(3, 8), qkv=nn.Linear(8, 18), o=nn.Linear(6, 7), fc=fc(7))  # fmt: skip


def _heads(m: Net, y: Tensor) -> Tensor:
    q, k, v = m.qkv(y).reshape(y.shape[0], -1, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(y.shape[0], -1, 6)


case("layer scale (C, 1, 1)", 8, lambda m, x: pooled(m, m.g * m.a(x)), a=conv(3, 8), g=weight(8, 1, 1), fc=fc(8))
case("layer scale (1, C, 1, 1)", 8, lambda m, x: pooled(m, m.a(x) * m.g), a=conv(3, 8), g=weight(1, 8, 1, 1), fc=fc(8))
case("scale buffer (C,)", 8, lambda m, x: pooled(m, m.a(x) * m.g.view(1, -1, 1, 1)),
     a=conv(3, 8), g=torch.randn(8), fc=fc(8))  # fmt: skip
case("a learned map", 8, lambda m, x: pooled(m, m.a(x) + m.t), frozen={"t": CONSTANT},
     a=conv(3, 8), t=weight(1, 8, 8, 8), fc=fc(8))  # fmt: skip
case("constants a channel", 4, lambda m, x: pooled(m, m.b(m.a(x) * torch.tensor([[[1.0]], [[2.0]], [[3.0]]]))),
     frozen={"a": CONSTANT}, a=conv(3, 3), b=conv(3, 4), fc=fc(4))  # fmt: skip
case("blur", 8, lambda m, x: pooled(m, F.conv2d(m.a(x), m.k, groups=8)), a=conv(3, 8), k=torch.ones(8, 1, 3, 3), fc=fc(8))
case("BatchNorm", 8, lambda m, x: pooled(m, m.n(m.a(x))), mixing="none", a=conv(3, 8), n=nn.BatchNorm2d(8), fc=fc(8))
case("GroupNorm", 8, lambda m, x: pooled(m, m.n(m.a(x))), a=conv(3, 8), n=nn.GroupNorm(4, 8), fc=fc(8))
case("GroupNorm, nothing may mix", 0, lambda m, x: pooled(m, m.n(m.a(x))),
     mixing="none", frozen={"a": MIXED}, a=conv(3, 8), n=nn.GroupNorm(4, 8), fc=fc(8))  # fmt: skip
case("LayerNorm", 8, lambda m, x: m.fc(m.n(m.a(x).flatten(2).transpose(1, 2))), a=conv(3, 8), n=nn.LayerNorm(8), fc=fc(8))
case("mean over channels", 6, lambda m, x: pooled(m, m.b(m.a(x).mean(1, keepdim=True))),
     frozen={"a": MIXED}, a=conv(3, 8), b=conv(1, 6), fc=fc(6))  # fmt: skip
case("mean over channels, all may mix", 8 + 6, lambda m, x: pooled(m, m.b(m.a(x).mean(1, keepdim=True))),
     mixing="all", a=conv(3, 8), b=conv(1, 6), fc=fc(6))  # fmt: skip
case("softmax over channels", 0, lambda m, x: pooled(m, m.a(x).softmax(1)), frozen={"a": MIXED}, a=conv(3, 8), fc=fc(8))
case("sum of zeros", 8, lambda m, x: pooled(m, (y := m.a(x).relu()) * y.sum(1, True)), a=conv(3, 8), fc=fc(8))
case("sum of halves", 0, lambda m, x: pooled(m, (y := m.a(x).sigmoid()) * y.sum(1, True)),
     frozen={"a": MIXED}, a=conv(3, 8), fc=fc(8))  # fmt: skip
case("channels slid over", 0, lambda m, x: m.fc(m.s(m.a(x).mean((2, 3)).unsqueeze(1)).squeeze(1)),
     frozen={"a": "window"}, a=conv(3, 8), s=nn.Conv1d(1, 1, 3, padding=1), fc=fc(8))  # fmt: skip
case("upsampled sum", 8 + 4, lambda m, x: pooled(m, m.a(x) + F.interpolate(m.c(m.b(x)), size=(8, 8), mode="bilinear")),
     a=conv(3, 8), b=conv(3, 4, stride=2), c=conv(4, 8, 1), fc=fc(8))  # fmt: skip


@pytest.fixture(autouse=True, scope="module")
def _fixed_seed():
    torch.manual_seed(0)


def analyzed(each: Case) -> fxprune.Analysis:
    return fxprune.analyze(each.net.eval(), torch.randn(2, 3, 8, 8), mixing=each.mixing)


@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_coupling(each: Case) -> None:
    """Exactly the channels that are independent can go, and what cannot says why."""
    analysis = analyzed(each)
    free = sum(len(group) for group in analysis.groups if group.prunable)
    shown = {group.name: (len(group), group.prunable) for group in analysis.groups}
    assert free == each.free, shown
    reasons = {frozen.group: frozen.reason for frozen in analysis.frozen}
    assert set(reasons) == set(each.frozen), reasons
    for group, part in each.frozen.items():
        assert part in reasons[group], reasons[group]
