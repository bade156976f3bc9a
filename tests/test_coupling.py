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

Forward = Callable[["Net", Tensor], object]


class Net(nn.Module):
    """Modules, parameters and buffers by name, and a forward written as a function of them."""

    def __init__(self, forward: Forward, **parts: object):
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


def case(
    free: int, *, frozen: dict[str, str] | None = None, mixing: str = "norms", **parts: object
) -> Callable[[Forward], Forward]:
    """A network of these parts and the decorated forward; `fc`, if given, is its last layer."""
    expected = {**({"fc": OUTPUT} if "fc" in parts else {}), **(frozen or {})}

    def add(forward: Forward) -> Forward:
        CASES.append(Case(forward.__name__, Net(forward, **parts), free, expected, mixing))
        return forward

    return add


def pooled(m: Net, y: Tensor) -> Tensor:
    return m.fc(y.mean((2, 3)))


def fc(c: int) -> nn.Linear:
    return nn.Linear(c, 5)


def weight(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.randn(shape))


# -- chains, shortcuts, sharing --------------------------------------------------------------------


@case(8, a=conv_bn_act(3, 8), fc=fc(8))
def plain(m, x):
    return pooled(m, m.a(x))


@case(8 + 6, a=conv(3, 8), b=conv(8, 6), fc=fc(6))
def two_layers(m, x):
    return pooled(m, m.b(m.a(x)))


@case(8 + 6, a=conv(3, 8), b=conv_bn_act(8, 6), c=conv_bn(6, 8), fc=fc(8))
def residual(m, x):
    y = m.a(x)
    return pooled(m, y + m.c(m.b(y)))


@case(8 + 6 + 4, a=conv(3, 8), b=conv(8, 6), c=conv(6, 8), d=conv(8, 4), e=conv(4, 8), fc=fc(8))
def two_residuals_one_spine(m, x):
    y = m.a(x)
    y = y + m.c(m.b(y))
    return pooled(m, y + m.e(m.d(y)))


@case(8, frozen={"b": CONSTANT}, a=conv(3, 8), b=conv(8, 3), fc=fc(3))
def residual_to_the_input(m, x):
    return pooled(m, x + m.b(m.a(x)))


@case(8 + 6, a=conv(3, 8), b=conv(3, 8), s=conv(8, 6), fc=fc(6))
def shared_by_two_inputs(m, x):
    return pooled(m, m.s(m.a(x)) * m.s(m.b(x)))


@case(8, a=conv(3, 8), b=conv(8, 8), fc=fc(8))
def loop(m, x):
    return pooled(m, m.b(m.b(m.a(x))))


def _tied() -> dict[str, nn.Module]:
    c, d = conv(8, 6), conv(8, 6)
    d.weight = c.weight
    return dict(a=conv(3, 8), b=conv(3, 8), c=c, d=d, fc=fc(12))


@case(8 + 6, **_tied())
def one_parameter_in_two_layers(m, x):
    return pooled(m, torch.cat([m.c(m.a(x)), m.d(m.b(x))], 1))


@case(6, a=nn.Conv2d(3, 6, 1), fc=fc(3))
def a_weight_and_its_transpose(m, x):
    return pooled(m, F.conv_transpose2d(m.a(x), m.a.weight))


@case(6, frozen={"a": OUTPUT}, a=conv(3, 8), b=conv(8, 6), fc=fc(6))
def also_an_output(m, x):
    y = m.a(x)
    return pooled(m, m.b(y)), y


@case(8, a=conv(3, 8), b=conv(3, 8), fc=fc(8))
def in_place(m, x):
    return pooled(m, m.a(x).relu_().add_(m.b(x)))


# -- joining and cutting ---------------------------------------------------------------------------


@case(8 + 4, a=conv(3, 8), b=conv(3, 4), fc=fc(12))
def cat(m, x):
    return pooled(m, torch.cat([m.a(x), m.b(x)], 1))


@case(8 + 6, a=conv(3, 8), b=conv(11, 6), fc=fc(6))
def cat_with_the_input(m, x):
    return pooled(m, m.b(torch.cat([m.a(x), x], 1)))


@case(8, a=conv(3, 8), fc=fc(16))
def self_cat(m, x):
    y = m.a(x)
    return pooled(m, torch.cat([y, y], 1))


@case(5 + 4, a=conv(3, 5), b=conv(3, 4), fc=fc(14))
def nested_cat(m, x):
    y = m.a(x)
    return pooled(m, torch.cat([y, torch.cat([m.b(x), y], 1)], 1))


@case(12, a=conv(3, 5), b=conv(3, 7), c=conv(3, 12), fc=fc(12))
def cat_meets_a_sum(m, x):
    return pooled(m, torch.cat([m.a(x), m.b(x)], 1) + m.c(x))


@case(8, a=conv(3, 8), b=conv(3, 8), fc=fc(8))
def cat_over_rows(m, x):
    return pooled(m, torch.cat([m.a(x), m.b(x)], 2))


@case(10 + 4, a=conv(3, 10), b=conv(3, 4), c=conv(7, 4), fc=fc(4))
def uneven_split(m, x):
    p, q = m.a(x).split([3, 7], 1)
    return pooled(m, m.b(p) + m.c(q))


@case(6, a=conv(3, 12), fc=fc(6))
def chunk_gate(m, x):
    p, q = m.a(x).chunk(2, 1)
    return pooled(m, p * q.sigmoid())


@case(6, a=conv(3, 12), fc=fc(6))
def functional_glu(m, x):
    return pooled(m, F.glu(m.a(x), 1))


@case(6, a=conv(3, 12), g=nn.GLU(1), fc=fc(6))
def module_glu(m, x):
    return pooled(m, m.g(m.a(x)))


@case(9 + 4, a=conv(3, 9), b=conv(5, 4), c=conv(4, 4), fc=fc(4))
def strided_slices(m, x):
    y = m.a(x)
    return pooled(m, m.b(y[:, ::2]) + m.c(y[:, 1::2]))


@case(12 + 4, a=conv(3, 12), b=conv(4, 4), fc=fc(12))
def partial_convolution(m, x):
    y = m.a(x)
    return pooled(m, torch.cat((m.b(y[:, :4]), y[:, 4:]), 1))


@case(1, a=conv(3, 9), fc=fc(8))
def overlapping_slices_added(m, x):
    """Channel i is tied to i + 1: all nine go together."""
    y = m.a(x)
    return pooled(m, y[:, :8] + y[:, 1:])


@case(
    8 + 8 + 3,
    a=conv(3, 8),
    mix=nn.Linear(64, 64),
    table=weight(1, 8, 8, 8),
    read=nn.Linear(64, 3),
    fc=fc(24),
)
def pixels_meet_a_table(m, x):
    """The table has rows and columns: pixels go in whole rows, with the table's."""
    y = m.mix(m.a(x).flatten(2)).unflatten(2, (8, 8)) + m.table
    return m.fc(m.read(y.flatten(2)).flatten(1))


@case(
    6 + 2,
    frozen={"b": "meets elements that have no channel"},
    a=conv(3, 6),
    b=conv(7, 9, bias=False),
    fc=fc(9),
)
def pad_after_a_channel_of_zeros(m, x):
    """The zeros that were there stay, those of the pad go with what they meet."""
    y = m.a(x)
    y = torch.cat([y, y.new_zeros(y.shape[0], 1, *y.shape[2:])], 1)
    return pooled(m, F.pad(y, (0, 0, 0, 0, 1, 1)) + m.b(y))


@case(8 + 3, a=conv(3, 8), w=weight(2 * 64, 3, 4), fc=fc(3))
def capsules_squashed_by_their_length(m, x):
    """Each capsule loses as many dims, and is scaled by the length of what is left of it."""
    u = m.a(x).view(-1, 2, 4, 64).permute(0, 1, 3, 2).reshape(-1, 2 * 64, 4)
    u = u * (u**2).sum(-1, keepdim=True)
    return m.fc(torch.einsum("nid,ijd->nij", u, m.w).sum(1))


@case(4 + 4 + 4 + 4, a=conv(3, 12), b=conv(4, 4), c=conv(4, 4), fc=fc(12))
def res2net(m, x):
    p, q, r = m.a(x).split(4, 1)
    q = m.b(q)
    return pooled(m, torch.cat([p, q, m.c(r + q)], 1))


@case(8 + 3 + 4, a=conv(3, 8), b=conv(4, 3), c=conv(3, 4), fc=fc(12))
def c2f(m, x):
    p, q = m.a(x).chunk(2, 1)
    return pooled(m, torch.cat([p, q, m.c(m.b(q))], 1))


@case(8 + 3, a=conv(3, 8), b=conv(4, 3), c=conv(3, 4), fc=fc(12))
def c2f_with_shortcut(m, x):
    p, q = m.a(x).chunk(2, 1)
    return pooled(m, torch.cat([p, q, q + m.c(m.b(q))], 1))


@case(5, a=conv(3, 5), b=conv(5, 5, groups=5), fc=fc(9))
def ghost(m, x):
    y = m.a(x)
    return pooled(m, torch.cat([y, m.b(y)], 1)[:, :9])


@case(5 + 5, a=conv(3, 5), b=conv(3, 5), fc=fc(10))
def stack_and_flatten(m, x):
    """The rows of a stack keep equally many channels, not the same ones."""
    return pooled(m, torch.stack([m.a(x), m.b(x)], 1).flatten(1, 2))


@case(5, a=conv(3, 5), b=conv(3, 5), fc=fc(5))
def stack_and_sum(m, x):
    return pooled(m, torch.stack([m.a(x), m.b(x)], 1).sum(1))


@case(8, a=conv(3, 8), fc=fc(8))
def unbind_and_swap(m, x):
    return pooled(m, torch.cat(m.a(x).unflatten(1, (2, 4)).unbind(1)[::-1], 1))


@case(6, a=conv(3, 12), fc=fc(6))
def maxout_over_halves(m, x):
    return pooled(m, m.a(x).unflatten(1, (2, 6)).amax(1))


@case(6, a=conv(3, 12), fc=fc(6))
def maxout_over_neighbours(m, x):
    return pooled(m, m.a(x).unflatten(1, (6, 2)).amax(2))


# -- index maps ------------------------------------------------------------------------------------


@case(8, a=conv(3, 8), fc=fc(8))
def flip(m, x):
    return pooled(m, m.a(x).flip(1))


@case(4, a=conv(3, 8), fc=fc(8))
def flip_meets_itself(m, x):
    y = m.a(x)
    return pooled(m, y + y.flip(1))


@case(8, a=conv(3, 8), fc=fc(8))
def roll(m, x):
    return pooled(m, m.a(x).roll(3, 1))


@case(4, a=conv(3, 8), fc=fc(8))
def roll_by_half_meets_itself(m, x):
    y = m.a(x)
    return pooled(m, y + y.roll(4, 1))


@case(8, a=conv(3, 8), i=torch.tensor([7, 0, 0, 3]), fc=fc(4))
def index_select(m, x):
    return pooled(m, m.a(x).index_select(1, m.i))


@case(8, a=conv(3, 8), i=torch.randperm(8), fc=fc(8))
def index_buffer(m, x):
    return pooled(m, m.a(x)[:, m.i])


@case(5, a=conv(3, 5), fc=fc(10))
def repeat(m, x):
    return pooled(m, m.a(x).repeat(1, 2, 1, 1))


@case(5, a=conv(3, 5), fc=fc(10))
def repeat_interleave(m, x):
    return pooled(m, m.a(x).repeat_interleave(2, 1))


@case(12, a=conv(3, 8), b=conv(3, 12), fc=fc(12))
def padded_channels(m, x):
    return pooled(m, F.pad(m.a(x), (0, 0, 0, 0, 1, 3)) + m.b(x))


@case(12, a=conv(3, 8), b=conv(3, 12), fc=fc(12))
def zeros_by_cat(m, x):
    return pooled(m, torch.cat([m.a(x), x.new_zeros(x.shape[0], 4, 8, 8)], 1) + m.b(x))


@case(8, a=conv(3, 8), b=conv(3, 12), fc=fc(12))
def zeros_like_a_slice(m, x):
    """As many zeros as there are channels in a slice: they stay as many."""
    y = m.a(x)
    return pooled(m, torch.cat([y, torch.zeros_like(y[:, :4])], 1) + m.b(x))


@case(12 + 6, a=conv(3, 12), b=conv(12, 6), fc=fc(6))
def shuffle_by_views(m, x):
    y = m.a(x)
    y = y.view(-1, 3, 4, 8, 8).transpose(1, 2).reshape(y.shape)
    return pooled(m, m.b(y))


@case(12, a=conv(3, 12), s=nn.ChannelShuffle(3), fc=fc(12))
def module_shuffle(m, x):
    return pooled(m, m.s(m.a(x)))


@case(12 + 12, a=conv(3, 12), s=nn.ChannelShuffle(3), b=conv(12, 12, groups=3), fc=fc(12))
def shuffle_before_groups(m, x):
    return pooled(m, m.b(m.s(m.a(x))))


@case(4, a=conv(3, 16), fc=fc(4))
def pixel_shuffle(m, x):
    return pooled(m, F.pixel_shuffle(m.a(x), 2))


@case(4, a=conv(3, 16), fc=fc(4))
def pixel_shuffle_by_views(m, x):
    y = m.a(x).view(-1, 4, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3)
    return pooled(m, y.reshape(-1, 4, 16, 16))


@case(5, a=conv(3, 5), fc=fc(20))
def pixel_unshuffle(m, x):
    return pooled(m, F.pixel_unshuffle(m.a(x), 2))


@case(5, a=conv(3, 5), fc=fc(10))
def focus(m, x):
    y = m.a(x)
    return pooled(m, torch.cat([y[..., ::2, ::2], y[..., 1::2, ::2]], 1))


@case(8, a=conv(3, 8), p=nn.MaxPool2d(4), fc=fc(32))
def flatten(m, x):
    return m.fc(m.p(m.a(x)).flatten(1))


@case(8, a=conv(3, 8), p=nn.MaxPool2d(4), fc=fc(32))
def flatten_channels_last(m, x):
    return m.fc(m.p(m.a(x)).permute(0, 2, 3, 1).flatten(1))


@case(8, a=conv(3, 8), p=nn.MaxPool2d(4), fc=fc(32))
def baked_view(m, x):
    return m.fc(m.p(m.a(x)).view(-1, 32))


@case(8 + 4 + 6, a=conv(3, 8), l=nn.Linear(8, 64), c=conv(4, 6), fc=fc(6))
def linear_seen_as_a_picture(m, x):
    y = m.l(m.a(x).mean((2, 3)))
    return pooled(m, m.c(y.view(-1, 4, 4, 4)))


# -- layers ----------------------------------------------------------------------------------------


@case(8, a=conv(3, 8), b=conv(8, 8, groups=8), fc=fc(8))
def depthwise(m, x):
    return pooled(m, m.b(m.a(x)))


@case(4 + 6, a=conv(3, 4), b=conv(4, 8, groups=4), c=conv(8, 6), fc=fc(6))
def depthwise_multiplier(m, x):
    return pooled(m, m.c(m.b(m.a(x))))


@case(12 + 12, a=conv(3, 12), b=conv(12, 12, groups=3), fc=fc(12))
def grouped(m, x):
    return pooled(m, m.b(m.a(x)))


@case(36, a=conv(3, 12), b=conv(12, 12, groups=2), c=conv(12, 12, groups=3), fc=fc(12))
def two_groups_then_three(m, x):
    return pooled(m, m.c(m.b(m.a(x))))


@case(5 + 7 + 6, a=conv(3, 5), b=conv(3, 7), c=conv(12, 6, groups=3), fc=fc(6))
def grouped_over_a_seam(m, x):
    return pooled(m, m.c(torch.cat([m.a(x), m.b(x)], 1)))


@case(8 + 6, a=conv(3, 8), b=nn.ConvTranspose2d(8, 6, 2), fc=fc(6))
def transposed(m, x):
    return pooled(m, m.b(m.a(x)))


@case(8 + 6, a=conv(3, 8), b=nn.ConvTranspose2d(8, 6, 2, groups=2), fc=fc(6))
def transposed_groups(m, x):
    return pooled(m, m.b(m.a(x)))


@case(8, a=conv(3, 8), p=nn.PReLU(8), fc=fc(8))
def prelu_a_channel(m, x):
    return pooled(m, m.p(m.a(x)))


@case(8, a=conv(3, 8), p=nn.PReLU(), fc=fc(8))
def prelu_for_all(m, x):
    return pooled(m, m.p(m.a(x)))


@case(8 + 6, a=conv(3, 8), b=conv(8, 1), c=conv(1, 6), fc=fc(6))
def one_output_channel(m, x):
    return pooled(m, m.c(m.b(m.a(x))))


@case(6, w=weight(6, 3, 1, 1), b=weight(6), fc=fc(6))
def own_weights(m, x):
    return pooled(m, F.conv2d(x, m.w, m.b))


@case(8 + 6, a=conv(3, 8), w=weight(6, 8), fc=fc(6))
def einsum(m, x):
    return pooled(m, torch.einsum("nchw,oc->nohw", m.a(x), m.w))


@case(8 + 6, a=conv(3, 8), w=weight(6, 8), fc=fc(6))
def convolution_as_matmul(m, x):
    return pooled(m, (m.w @ m.a(x).flatten(2)).unflatten(2, (8, 8)))


@case(
    8,
    frozen={"a.parametrizations.weight.original1": "window"},
    a=nn.utils.parametrizations.weight_norm(conv(3, 8)),
    fc=fc(8),
)
def weight_norm(m, x):
    return pooled(m, m.a(x))


@case(8, a=nn.Conv3d(3, 8, 1), fc=fc(8))
def conv3d_excursion(m, x):
    return pooled(m, m.a(x.unsqueeze(2)).squeeze(2))


@case(8 + 6, a=conv(3, 8), r=nn.LSTM(8, 6, batch_first=True), fc=fc(6))
def lstm_reads_channels(m, x):
    return m.fc(m.r(m.a(x).mean(2).transpose(1, 2))[0])


# -- gates, scales, norms --------------------------------------------------------------------------


@case(8 + 3, a=conv(3, 8), b=conv(8, 3, 1), c=conv(3, 8, 1), fc=fc(8))
def se_by_convolutions(m, x):
    y = m.a(x)
    gate = m.c(m.b(y.mean((2, 3), keepdim=True)).relu())
    return pooled(m, y * gate.sigmoid())


@case(8 + 3, a=conv(3, 8), b=nn.Linear(8, 3), c=nn.Linear(3, 8), fc=fc(8))
def se_by_linear(m, x):
    y = m.a(x)
    gate = m.c(m.b(y.mean((2, 3))).relu())
    return pooled(m, y * gate.sigmoid().view(-1, 8, 1, 1))


@case(8, a=conv(3, 8), b=conv(3, 1), fc=fc(8))
def spatial_mask(m, x):
    return pooled(m, m.a(x) * m.b(x).sigmoid())


@case(8, a=conv(3, 8), l=nn.Linear(3, 16), fc=fc(8))
def scale_and_shift_predicted(m, x):
    scale, shift = m.l(x.mean((2, 3)))[..., None, None].chunk(2, 1)
    return pooled(m, m.a(x) * scale + shift)


@case(8 + 4, a=conv(3, 8), b=conv(3, 8), s=conv(8, 4, 1), g=conv(4, 16, 1), fc=fc(8))
def selective_kernels(m, x):
    y = torch.stack([m.a(x), m.b(x)], 1)
    gate = m.g(m.s(y.sum(1).mean((2, 3), keepdim=True)))
    return pooled(m, (y * gate.view(-1, 2, 8, 1, 1).softmax(1)).sum(1))


@case(
    8 + 4 + 5,
    a=conv(3, 8),
    q=conv(8, 4, 1),
    k=conv(8, 4, 1),
    v=conv(8, 5, 1),
    o=conv(5, 8, 1),
    fc=fc(8),
)
def non_local(m, x):
    y = m.a(x)
    weights = (m.q(y).flatten(2).transpose(1, 2) @ m.k(y).flatten(2)).softmax(-1)
    z = (m.v(y).flatten(2) @ weights.transpose(1, 2)).view(y.shape[0], -1, 8, 8)
    return pooled(m, y + m.o(z))


@case(8 + 6 + 6 + 7, a=conv(3, 8), qkv=nn.Linear(8, 18), o=nn.Linear(6, 7), fc=fc(7))
def two_heads_by_hand(m, x):
    y = m.a(x).flatten(2).transpose(1, 2)
    q, k, v = m.qkv(y).reshape(-1, 64, 3, 2, 3).permute(2, 0, 3, 1, 4).unbind(0)
    y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(-1, 64, 6)
    return m.fc(m.o(y).mean(1))


@case(8, a=conv(3, 8), g=weight(8, 1, 1), fc=fc(8))
def layer_scale_of_3_dims(m, x):
    return pooled(m, m.g * m.a(x))


@case(8, a=conv(3, 8), g=weight(1, 8, 1, 1), fc=fc(8))
def layer_scale_of_4_dims(m, x):
    return pooled(m, m.a(x) * m.g)


@case(8, a=conv(3, 8), g=torch.randn(8), fc=fc(8))
def scale_buffer(m, x):
    return pooled(m, m.a(x) * m.g.view(1, -1, 1, 1))


@case(8, a=conv(3, 8), t=weight(1, 8, 8, 8), fc=fc(8))
def a_learned_map(m, x):
    return pooled(m, m.a(x) + m.t)


@case(4, frozen={"a": CONSTANT}, a=conv(3, 3), b=conv(3, 4), fc=fc(4))
def constants_a_channel(m, x):
    return pooled(m, m.b(m.a(x) * torch.tensor([[[1.0]], [[2.0]], [[3.0]]])))


@case(8, a=conv(3, 8), k=torch.ones(8, 1, 3, 3), fc=fc(8))
def blur(m, x):
    return pooled(m, F.conv2d(m.a(x), m.k, groups=8))


@case(8, mixing="none", a=conv(3, 8), n=nn.BatchNorm2d(8), fc=fc(8))
def batch_norm(m, x):
    return pooled(m, m.n(m.a(x)))


@case(8, a=conv(3, 8), n=nn.GroupNorm(4, 8), fc=fc(8))
def group_norm(m, x):
    return pooled(m, m.n(m.a(x)))


@case(0, mixing="none", frozen={"a": MIXED}, a=conv(3, 8), n=nn.GroupNorm(4, 8), fc=fc(8))
def group_norm_nothing_may_mix(m, x):
    return pooled(m, m.n(m.a(x)))


@case(8, a=conv(3, 8), n=nn.LayerNorm(8), fc=fc(8))
def layer_norm(m, x):
    return m.fc(m.n(m.a(x).flatten(2).transpose(1, 2)))


@case(8 + 6, a=conv(3, 8), b=conv(1, 6), fc=fc(6))
def mean_over_channels(m, x):
    return pooled(m, m.b(m.a(x).mean(1, keepdim=True)))


@case(6, frozen={"a": MIXED}, a=conv(3, 8), b=conv(1, 6), fc=fc(6))
def mean_over_channels_that_are_not_zero(m, x):
    return pooled(m, m.b(m.a(x).sigmoid().mean(1, keepdim=True)))


@case(8 + 6, mixing="all", a=conv(3, 8), b=conv(1, 6), fc=fc(6))
def mean_over_channels_all_may_mix(m, x):
    return pooled(m, m.b(m.a(x).mean(1, keepdim=True)))


@case(0, frozen={"a": MIXED}, a=conv(3, 8), fc=fc(8))
def softmax_over_channels(m, x):
    return pooled(m, m.a(x).softmax(1))


@case(8, a=conv(3, 8), fc=fc(8))
def sum_of_zeros(m, x):
    y = m.a(x).relu()
    return pooled(m, y * y.sum(1, keepdim=True))


@case(0, frozen={"a": MIXED}, a=conv(3, 8), fc=fc(8))
def sum_of_halves(m, x):
    y = m.a(x).sigmoid()
    return pooled(m, y * y.sum(1, keepdim=True))


@case(8, a=conv(3, 8), s=nn.Conv1d(1, 1, 3, padding=1), fc=fc(8))
def channels_slid_over(m, x):
    """The window sees zeros where channels went; what it gives there stays."""
    return m.fc(m.s(m.a(x).mean((2, 3)).unsqueeze(1)).squeeze(1))


@case(0, frozen={"a": "window"}, a=conv(3, 8), s=nn.Conv1d(1, 1, 3, padding=1), fc=fc(8))
def channels_slid_over_that_are_not_zero(m, x):
    return m.fc(m.s(m.a(x).sigmoid().mean((2, 3)).unsqueeze(1)).squeeze(1))


@case(8, a=conv(3, 8), s=nn.Conv1d(1, 1, 3, padding=1), fc=fc(8))
def channels_slid_over_as_a_gate(m, x):
    x = m.a(x)
    gate = m.s(x.mean((2, 3)).unsqueeze(1)).squeeze(1).sigmoid()
    return pooled(m, x * gate[:, :, None, None])


@case(8 + 4, a=conv(3, 8), b=conv(3, 4, stride=2), c=conv(4, 8, 1), fc=fc(8))
def upsampled_sum(m, x):
    return pooled(m, m.a(x) + F.interpolate(m.c(m.b(x)), size=(8, 8), mode="bilinear"))


# -- tests -----------------------------------------------------------------------------------------


def analyzed(each: Case) -> fxprune.Analysis:
    return fxprune.analyze(each.net.eval(), torch.zeros(2, 3, 8, 8), mixing=each.mixing)


@pytest.mark.parametrize("each", CASES, ids=lambda each: each.name)
def test_coupling(each: Case) -> None:
    """Exactly the channels that are independent can go, and what cannot says why and where."""
    analysis = analyzed(each)
    free = sum(len(group) for group in analysis.groups if group.prunable)
    shown = {group.name: (len(group), group.prunable) for group in analysis.groups}
    assert free == each.free, shown
    found = {frozen.group: frozen for frozen in analysis.frozen}
    assert set(found) == set(each.frozen), found
    for group, part in each.frozen.items():
        assert part in found[group].reason, found[group]
        assert found[group].node


@pytest.mark.parametrize("each", [c for c in CASES if c.free], ids=lambda each: each.name)
def test_freedom_is_used(each: Case) -> None:
    """What can go does go: asked for half, each group loses at least a fifth, despite blocks."""
    analysis = analyzed(each)
    plan = fxprune.plan(analysis, criterion="random", rate=0.5)
    rows = [r for r, group in zip(plan.groups, analysis.groups, strict=True) if group.prunable]
    short = {r.name: r for r in rows if r.size - r.kept < r.size // 5}
    assert not short
