"""`scatter=True`: streams keep their width, and each branch that is added to one loses its own.

A case is a small network with the widths at rate 0.5: of the layers' outputs (``half``) and of what
they read (``reads``). The reference is a copy of the module with zeros written over all that the
plan drops (`zoo_small.masked`); it knows nothing of scattering.
"""

from __future__ import annotations

import copy
import io
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, settings
from strategies import Choice, Network, choices, networks
from test_laws import LIMIT, check_slices, comparable, difference, outputs
from test_laws import masked as masked_network
from torch import Tensor, nn
from zoo_small import (
    Case,
    assert_exact,
    conv,
    gap,
    image,
    masked,
    net,
    par,
    randomise,
    reasons,
    run,
    tensor,
    widths,
)

import fxprune
from fxprune.errors import NothingToPrune, OptionError, PlanError

CASES: dict[str, Case] = {}
READS: dict[str, dict[str, int]] = {}


def stream(*inputs: Any, reads: str = "", **options: Any) -> Callable[[Callable], Case]:
    """Register a case; ``reads`` gives the inputs that are left of layers."""

    def register(forward: Callable) -> Case:
        pairs = (item.split() for item in reads.split(",") if item.strip())
        READS[forward.__name__] = {name: int(size) for name, size in pairs}
        return net(*inputs, into=CASES, **options)(forward)

    return register


# A network's parts stand in one paragraph, not one a line.
# fmt: off


# -- residual blocks -------------------------------------------------------------------------------


@stream(
    image(), half="s 4, a 3, an 3, b 4, bn 4, c 3, d 4", reads="a 4, b 3, c 8, d 3, o 8",
    s=conv(3, 8), a=conv(8, 6), an=nn.BatchNorm2d(6), b=conv(6, 8), bn=nn.BatchNorm2d(8),
    c=conv(8, 6), d=conv(6, 8), o=conv(8, 2),
)
def basic_blocks(m, x):
    x = F.relu(m.s(x))
    x = F.relu(x + m.bn(m.b(F.relu(m.an(m.a(x))))))
    x = F.relu(m.d(F.relu(m.c(x))) + x)
    return m.o(x)


@stream(
    image(), half="s 4, a 2, b 2, c 6, cn 6, d 6", reads="a 4, b 2, c 2, d 4, o 12",
    s=conv(3, 8), a=conv(8, 4, 1), b=conv(4, 4, stride=2), c=conv(4, 12, 1),
    cn=nn.BatchNorm2d(12), d=conv(8, 12, 1, stride=2), o=conv(12, 2),
)
def bottleneck_with_a_shortcut(m, x):
    x = F.relu(m.s(x))
    return m.o(F.relu(m.cn(m.c(F.relu(m.b(F.relu(m.a(x)))))) + m.d(x)))


@stream(
    image(), half="s 4, a 4, b 4", reads="a 4, b 8, o 8",
    s=conv(3, 8), a=conv(8, 8), b=conv(8, 8), o=conv(8, 2),
)
def in_place(m, x):
    x = m.s(x)
    y = m.a(x)
    y += x
    return m.o(m.b(y).add_(y).relu_())


@stream(
    image(), half="s 4, a 4, an 4, b 4, c 3", reads="a 4, c 8, b 3, o 8",
    s=conv(3, 8), sn=nn.BatchNorm2d(8), a=conv(8, 8), an=nn.BatchNorm2d(8), c=conv(8, 6),
    bn=nn.BatchNorm2d(8), b=conv(6, 8), on=nn.BatchNorm2d(8), o=conv(8, 2),
)
def pre_activation(m, x):
    """The norms `bn` and `on` are of whole streams."""
    x = m.s(x)
    x = x + m.an(m.a(F.relu(m.sn(x))))
    x = x + m.b(F.relu(m.c(F.relu(m.bn(x)))))
    return m.o(F.relu(m.on(x)))


@stream(
    image(), half="s 4, e 12, d 12, p 4", reads="e 4, p 12, o 8",
    s=conv(3, 8), e=conv(8, 24, 1), d=conv(24, 24, groups=24), p=conv(24, 8, 1), o=conv(8, 2),
)
def inverted_residual(m, x):
    x = m.s(x)
    return m.o(x + m.p(F.relu6(m.d(F.relu6(m.e(x))))))


@stream(
    image(), half="s 4, a 6, b 6, c 4", reads="a 4, b 3, c 6, o 8",
    s=conv(3, 8), a=conv(8, 12, 1), b=conv(12, 12, groups=2), c=conv(12, 8, 1), o=conv(8, 2),
)
def groups_in_a_branch(m, x):
    x = m.s(x)
    return m.o(x + m.c(F.relu(m.b(F.relu(m.a(x))))))


@stream(
    image(), half="s 4, a 8, b 8", reads="a 4, b 8, o 16",
    s=conv(3, 8), a=conv(8, 16, stride=2), b=conv(16, 16), o=conv(16, 2),
)
def padded_shortcut(m, x):
    """Option A of He et al.: every other pixel, between channels of zeros."""
    x = F.relu(m.s(x))
    return m.o(m.b(F.relu(m.a(x))) + F.pad(x[:, :, ::2, ::2], (0, 0, 0, 0, 4, 4)))


@stream(
    image(), half="s 4, a 4, f 2, g 4", reads="a 4, f 4, g 2, o 8",
    s=conv(3, 8), a=conv(8, 8), f=nn.Linear(8, 4), g=nn.Linear(4, 8), o=conv(8, 2),
)
def squeeze_in_a_branch(m, x):
    x = m.s(x)
    y = m.a(x)
    gate = torch.sigmoid(m.g(F.relu(m.f(y.mean((2, 3))))))
    return m.o(x + y * gate[:, :, None, None])


@stream(
    image(), half="s 4, a 4, g 4, b 4, f 4", reads="a 4, b 8, o 8",
    s=conv(3, 8), a=conv(8, 8), g=conv(8, 8, groups=8), b=conv(8, 8), f=conv(8, 8, groups=8),
    o=conv(8, 2),
)
def gated_branches_in_place(m, x):
    """A product is a new tensor, which nobody else looks at; one in place need not be."""
    x = m.s(x)
    y = m.a(x)
    y = y * torch.sigmoid(m.g(y))
    y += x
    z = m.b(y)
    z.mul_(0.5)
    z = torch.relu(z).mul(m.f(z).tanh())
    return m.o(z.add_(y))


@stream(
    image(), half="s 8, a 3, b 4", reads="a 8, b 3, o 8",
    s=conv(3, 8), a=conv(8, 6), b=conv(6, 8), o=conv(8, 2),
)
def one_block_twice(m, x):
    """`a` reads the stem and the whole stream: the stem keeps its width."""
    x = m.s(x)
    for _ in range(2):
        x = F.relu(x + m.b(F.relu(m.a(x))))
    return m.o(x)


@stream(
    image(), half="s 4, t 4, b 4", reads="b 4, o 8, p 8",
    s=conv(3, 8), t=conv(3, 8), b=conv(8, 8), o=conv(8, 2), p=conv(8, 2),
)
def one_layer_on_two_streams(m, x):
    """What `b` gives lies at the same places of both."""
    x, y = m.s(x), m.t(x)
    return m.o(x + m.b(y)), m.p(y - m.b(x))


# -- additions of all kinds ------------------------------------------------------------------------


@stream(
    image(), half="a 4, b 4, c 4", reads="o 8",
    a=conv(3, 8), b=conv(3, 8), c=conv(3, 8), o=conv(8, 2),
)
def three_branches(m, x):
    return m.o(m.a(x) + m.b(x) + m.c(x))


@stream(
    image(), half="a 4, b 4, c 4, d 4", reads="o 8",
    a=conv(3, 8), b=conv(3, 8), c=conv(3, 8), d=conv(3, 8), o=conv(8, 2),
)
def a_sum_of_a_list(m, x):
    return m.o(sum([m.a(x), m.b(x), m.c(x)]) + (m.d(x) + 0))


@stream(
    image(), half="a 4, b 4, c 4, d 4", reads="o 8",
    a=conv(3, 8), b=conv(3, 8), c=conv(3, 8), d=conv(3, 8), o=conv(8, 2),
)
def differences(m, x):
    y = m.a(x) - m.b(x)
    y -= m.c(x)
    return m.o(torch.sub(y, m.d(x), alpha=3))


@stream(
    image(), half="a 4, b 4, c 4", reads="o 8",
    a=conv(3, 8), b=conv(3, 8), c=conv(3, 8), o=conv(8, 2),
)
def weighted_sums(m, x):
    y = torch.add(input=m.a(x), other=m.b(x), alpha=0.5)
    return m.o((y.add_(m.c(x), alpha=2) / 2).relu())


@stream(
    image(), half="a 4, b 4, c 4", reads="o 8",
    a=conv(3, 8), b=conv(3, 8), c=conv(3, 8), o=conv(8, 2),
)
def into_zeros(m, x):
    y = torch.zeros(x.shape[0], 8, *x.shape[2:], dtype=x.dtype)
    for each in (m.a, m.b, m.c):
        y = y + each(x)
    return m.o(y)


@stream(image(), half="s 4, b 4", reads="b 4, o 4", s=conv(3, 8), b=conv(8, 8), o=conv(8, 2))
def with_itself(m, x):
    """Both sides lose the same channels, so the sum is as narrow."""
    x = m.s(x)
    y = m.b(x + x)
    return m.o(y + y.tanh() * y)


@stream(image(), half="s 4, g 4", reads="g 4, o 4", s=conv(3, 8), g=conv(8, 8), o=conv(8, 2))
def with_itself_gated(m, x):
    x = m.s(x)
    return m.o(x + x * torch.sigmoid(m.g(x)))


@stream(image(), half="s 4", reads="o 8", s=conv(3, 8), o=conv(8, 2))
def with_itself_turned(m, x):
    x = m.s(x)
    return m.o(x + x.flip(1))


@stream(image(), half="a 4", reads="o 4", a=conv(3, 8), o=conv(4, 2))
def halves_of_one(m, x):
    """Each half loses the channels that it would lose alone."""
    p, q = m.a(x).chunk(2, 1)
    return m.o(p + q)


@stream(
    image(), half="a 4, b 4, c 4", reads="c 3, o 12", a=conv(3, 8), b=conv(3, 8), c=conv(3, 8),
    o=conv(16, 2),
)
def cat_of_streams(m, x):
    y = m.a(x) + m.b(x)
    return m.o(torch.cat([y, m.c(x)], 1))


@stream(
    image(), half="s 4, a 4, b 4", reads="a 4, b 4, o 8, p 8",
    s=conv(3, 8), a=conv(8, 8), b=conv(8, 8), o=conv(8, 2), p=conv(8, 2),
)
def one_operand_of_two_sums(m, x):
    x = m.s(x)
    return m.o(x + m.a(x)), m.p(F.relu(x) - m.b(x))


@stream(
    image(), half="s 4, p 4", reads="p 4, o 8", s=conv(3, 8), p=conv(8, 8, 1), o=conv(8, 2),
)
def broadcast_pixels(m, x):
    """(n, c, h, w) + (n, c, 1, 1)"""
    x = m.s(x)
    return m.o(x + m.p(x.mean((2, 3), keepdim=True)))


@stream(image(), half="s 4, p 4", reads="o 8", s=conv(3, 8), p=nn.Linear(3, 8), o=nn.Linear(8, 2))
def broadcast_ranks(m, x):
    """(n, h, w, c) + (c,)"""
    y = m.s(x).permute(0, 2, 3, 1)
    return m.o(y + m.p(x.mean((0, 2, 3))))


@stream(
    image(), half="a 4, b 4", reads="o 8", a=conv(3, 8), b=conv(3, 8, stride=2), o=conv(8, 2),
)
def pyramid(m, x):
    return m.o(m.a(x) + F.interpolate(m.b(x), scale_factor=2.0))


@stream(
    image(), half="s 4, a 4, b 4", reads="a 4, b 4, o 8",
    s=conv(3, 8), a=nn.Linear(8, 8), b=nn.Linear(8, 8), o=nn.Linear(8, 2),
)
def in_the_head(m, x):
    """(n, c)"""
    y = m.s(x).amax((2, 3))
    return m.o(F.relu(m.a(y) + m.b(y)))


# -- what is added that is no branch ---------------------------------------------------------------


@stream(image(), half="s 4, t 1", reads="o 4", s=conv(3, 8), t=par(1, 8, 1, 1), o=conv(8, 2))
def a_parameter(m, x):
    return m.o(m.s(x) + m.t)


@stream(
    image(), half="s 4, bias 4, a 4", reads="a 4, o 4",
    s=conv(3, 8, bias=False), bias=par(8), a=conv(8, 8), o=conv(8, 2),
)
def a_bias(m, x):
    return m.o(m.a(m.s(x) + m.bias.view(1, -1, 1, 1)) + 1.0)


@stream(
    image(), half="a 4, b 4, w 4, v 4", reads="o 8", a=conv(3, 8), b=conv(3, 8), w=par(8, 3, 1, 1),
    v=par(8, 3, 1, 1), o=conv(8, 2),
)
def weights_are_no_branches(m, x):
    """`w` and `v` are added up before they make channels: they stay tied."""
    return m.o(F.conv2d(x, m.w + m.v) + m.a(x) + m.b(x))


@stream(image(), half="s 4", reads="o 8", s=conv(3, 8), o=conv(8, 2))
def a_constant(m, x):
    return m.o(m.s(x) + torch.arange(8, dtype=x.dtype).view(1, 8, 1, 1))


@stream(image(channels=8), half="a 3, b 4", reads="a 8, b 3, o 8", a=conv(8, 6), b=conv(6, 8),
        o=conv(8, 2))
def the_input(m, x):
    return m.o(x + m.b(F.relu(m.a(x))))


@stream(
    image(), half="s 4, a 8, b 8", reads="o 8", frozen="cannot be scattered back before %",
    s=conv(3, 8), a=conv(8, 8), b=conv(8, 8), o=conv(8, 2),
)
def no_zeros(m, x):
    """A sigmoid's masked channels hold 1/2, a shifted one's 1: no zeros to be scattered."""
    x = m.s(x)
    y = torch.sigmoid(m.a(x)) + x
    return m.o(y + (m.b(y) + 1))


@stream(
    image(), half="s 4, a 8, b 4", reads="b 8, o 8", frozen="cannot be scattered back before %",
    s=conv(3, 8), a=conv(8, 8), b=conv(8, 8), o=conv(8, 2),
)
def overwritten_and_read(m, x):
    """`b` reads the very tensor that is added to in place."""
    y = m.a(m.s(x))
    z = m.b(y)
    y += z
    return m.o(y)


# -- other layouts ---------------------------------------------------------------------------------


@stream(
    tensor(2, 5, 3), half="e 4, a 8, b 4, n 8, c 8, d 4, f 8", reads="a 4, b 8, c 8, d 8, o 8",
    e=nn.Linear(3, 8), a=nn.Linear(8, 16), b=nn.Linear(16, 8), n=nn.LayerNorm(8),
    c=nn.Linear(8, 16), d=nn.Linear(16, 8), f=nn.LayerNorm(8), o=nn.Linear(8, 2),
)
def tokens(m, x):
    """The norms are of whole streams."""
    x = m.e(x)
    x = x + m.b(F.gelu(m.a(x)))
    x = x + m.d(F.gelu(m.c(m.n(x))))
    return m.o(m.f(x))


@stream(
    tensor(2, 5, 3), half="e 4, a 8, b 4, n 4", reads="a 4, b 8, o 8",
    e=nn.Linear(3, 8), a=nn.Linear(8, 16), b=nn.Linear(16, 8), n=nn.LayerNorm(8), o=nn.Linear(8, 2),
)
def a_norm_behind_a_branch(m, x):
    """It is over the channels that the branch keeps."""
    x = m.e(x)
    return m.o(x + m.n(m.b(F.gelu(m.a(x)))))


@stream(
    image(), half="s 4, dw 4, n 4, a 16, b 4, scale 4, d 8, o 2", reads="a 4, b 16, o 8",
    s=conv(3, 8), dw=conv(8, 8, groups=8), n=nn.LayerNorm(8), a=nn.Linear(8, 32),
    b=nn.Linear(32, 8), scale=par(8), d=conv(8, 8, groups=8), o=conv(8, 2),
)
def convnext(m, x):
    """A depthwise layer of the whole stream keeps its width."""
    x = m.s(x)
    y = m.n(m.dw(x).permute(0, 2, 3, 1))
    y = m.scale * m.b(F.gelu(m.a(y)))
    return m.o(m.d(x + y.permute(0, 3, 1, 2)))


@stream(
    tensor(2, 3, 9), half="s 4, a 3, an 3, b 4", reads="a 4, b 3, o 8",
    s=nn.Conv1d(3, 8, 3, padding=1), a=nn.Conv1d(8, 6, 3, padding=1), an=nn.BatchNorm1d(6),
    b=nn.Conv1d(6, 8, 1), o=nn.Conv1d(8, 2, 1),
)
def one_dimension(m, x):
    x = m.s(x)
    return m.o(F.elu(x + m.b(F.elu(m.an(m.a(x))))))


@stream(
    tensor(2, 3, 4, 5, 5), half="s 4, a 3, an 3, b 4", reads="a 4, b 3, o 8",
    s=nn.Conv3d(3, 8, 1), a=nn.Conv3d(8, 6, 3, padding=1), an=nn.BatchNorm3d(6),
    b=nn.Conv3d(6, 8, 1), o=nn.Conv3d(8, 2, 1),
)
def three_dimensions(m, x):
    x = m.s(x)
    y = m.b(F.elu(m.an(m.a(x))))
    y += x
    return m.o(F.elu(y))


@stream(
    image(), half="v 4, w 4, u 4", reads="o 8",
    v=par(8, 3, 1, 1), w=par(8, 3, 3, 3), u=par(8, 8), o=conv(8, 2),
)
def functional_weights(m, x):
    y = F.conv2d(x, m.v)
    y = y + F.conv2d(x, m.w, padding=1)
    return m.o(y + torch.einsum("nchw,oc->nohw", y, m.u))


# fmt: on


# -- every case ------------------------------------------------------------------------------------


def pruned_case(name: str, **options: Any) -> Any:
    case = CASES[name]
    more = {"criterion": "l1", "rate": 0.5, "scatter": True, "mixing": case.mixing, **options}
    return fxprune.prune(case.build(), case.args(), **more)


def inputs_of(module: nn.Module) -> dict[str, int]:
    """The length of dim 1 of each layer's weight."""
    state = module.state_dict()
    return {k.removesuffix(".weight"): v.shape[1] for k, v in state.items() if v.ndim > 1}


@pytest.mark.parametrize("name", CASES)
def test_streams_keep_their_width_and_branches_do_not(name: str) -> None:
    case = CASES[name]
    others = (case.args(1),)
    pruned = assert_exact(
        case.build(), case.args(), others=others, mixing=case.mixing, scatter=True
    )
    out, read = widths(pruned), inputs_of(pruned)
    assert {layer: out[layer] for layer in case.half} == case.half
    assert {layer: read[layer] for layer in READS[name]} == READS[name]
    assert case.frozen in reasons(pruned)
    assert case.frozen or "scattered" not in reasons(pruned)


@pytest.mark.parametrize("name", CASES)
def test_a_single_channel_of_each(name: str) -> None:
    case = CASES[name]
    assert_exact(case.build(), case.args(), 0.95, mixing=case.mixing, scatter=True)


@pytest.mark.parametrize("name", CASES)
def test_a_plan_says_how_it_was_made(name: str) -> None:
    case, pruned = CASES[name], pruned_case(name)
    plan = fxprune.Plan.from_json(pruned.fxprune.plan.to_json())
    assert plan.scatter and plan == pruned.fxprune.plan
    again = fxprune.apply(case.build(), plan)
    assert again.code == pruned.code
    assert again.state_dict().keys() == pruned.state_dict().keys()
    assert gap(run(pruned, case.args()), run(again, case.args())) == 0.0
    assert fxprune.verify(case.build(), again, plan).difference < LIMIT


@pytest.mark.parametrize("name", CASES)
def test_it_can_be_pruned_again(name: str) -> None:
    assert_pruned_again(CASES[name], pruned_case(name, rate=0.3))


def assert_pruned_again(case: Case, once: nn.Module) -> None:
    """Both ways; the reference is the first result's copy with zeros."""
    for scatter in (True, False):
        try:
            twice = fxprune.prune(once, case.args(), rate=0.3, scatter=scatter)
        except NothingToPrune:  # coupled, what is left may all meet a constant
            assert not scatter
            continue
        reference = masked(once, twice.fxprune.plan.kept)
        assert gap(run(reference, case.args()), run(twice, case.args())) < LIMIT


# -- single networks -------------------------------------------------------------------------------


class Block(nn.Module):
    """ResNet's basic block; ``add`` joins the branch and the stream."""

    def __init__(self, i: int, o: int, stride: int, add: Callable[[Tensor, Tensor], Tensor]):
        super().__init__()
        self.conv1, self.bn1 = conv(i, o, bias=False, stride=stride), nn.BatchNorm2d(o)
        self.conv2, self.bn2 = conv(o, o, bias=False), nn.BatchNorm2d(o)
        self.down = conv(i, o, 1, stride=stride, bias=False) if (i, stride) != (o, 1) else None
        self.add = add

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.add(y, x if self.down is None else self.down(x)))


def summed(y: Tensor, x: Tensor) -> Tensor:
    return y + x


def summed_in_place(y: Tensor, x: Tensor) -> Tensor:
    y += x
    return y


class ResNet(nn.Module):
    def __init__(self, add: Callable[[Tensor, Tensor], Tensor] = summed):
        super().__init__()
        self.stem = conv(3, 16, bias=False)
        plan = [(16, 16, 1), (16, 16, 1), (16, 32, 2), (32, 32, 1)]
        self.blocks = nn.Sequential(*(Block(*each, add) for each in plan))
        self.fc = nn.Linear(32, 4)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.blocks(F.relu(self.stem(x))).mean((2, 3)))


def resnet(add: Callable[[Tensor, Tensor], Tensor] = summed) -> tuple[ResNet, Tensor]:
    return randomise(ResNet(add)), torch.randn(2, 3, 8, 8, dtype=torch.float64)


def assert_named(model: nn.Module, x: Tensor, **options: Any) -> Any:
    pruned = fxprune.prune(model, x, **options)
    assert gap(masked(model, pruned.fxprune.plan.kept)(x), pruned(x)) < LIMIT
    return pruned


ADDS = pytest.mark.parametrize("add", [summed, summed_in_place])


@ADDS
def test_every_convolution_of_a_resnet_loses_half_its_filters(add: Callable) -> None:
    model, x = resnet(add)
    pruned = assert_exact(model, (x,), others=((x[:1, :, :6],),), scatter=True)
    out, read = widths(pruned), inputs_of(pruned)
    convs = {name for name, m in model.named_modules() if isinstance(m, nn.Conv2d)}
    assert {name: out[name] for name in convs} == {
        name: model.get_submodule(name).out_channels // 2 for name in convs
    }
    whole = {"blocks.1.conv1": 16, "blocks.2.conv1": 16, "blocks.2.down": 16, "blocks.3.conv1": 32}
    assert {name: read[name] for name in whole} == whole and read["fc"] == 32
    assert read["blocks.0.conv1"] == 8  # reads the stem alone


@ADDS
def test_the_report_counts_what_is_left(add: Callable) -> None:
    """MACs of the pruned network as it stands, counted by hand."""
    model, x = resnet(add)
    report = fxprune.prune(model, x, rate=0.5, scatter=True).fxprune.report
    #      stem      block 0            block 1             block 2 and its shortcut       block 3
    convs = [3 * 8, 8 * 8 + 8 * 8, 16 * 8 + 8 * 8]
    small = [16 * 16 + 16 * 16, 32 * 16 + 16 * 16]
    macs = 9 * (64 * sum(convs) + 16 * sum(small)) + 16 * 16 * 16 + 32 * 4
    assert report.macs[1] == macs
    assert fxprune.count(fxprune.prune(model, x, rate=0.5, scatter=True), x).macs == macs
    assert report.params[1] == sum(
        p.numel() for p in fxprune.prune(model, x, rate=0.5, scatter=True).parameters()
    )


def test_the_coupled_way_is_the_default() -> None:
    model, x = resnet()
    pruned = fxprune.prune(model, x, rate=0.5)
    assert not pruned.fxprune.plan.scatter and "pad" not in pruned.code
    assert inputs_of(pruned)["blocks.1.conv1"] == 8


def test_branches_lose_channels_of_their_own() -> None:
    """Coupled, the filters of all branches of a stream go together; scattered, they do not."""
    model, x = resnet()
    kept = fxprune.prune(model, x, rate=0.5, scatter=True).fxprune.plan.kept
    first, second = kept["blocks.0.conv2.weight"][0], kept["blocks.1.conv2.weight"][0]
    assert first != second
    assert kept["blocks.0.bn2.weight"][0] == first and kept["blocks.0.bn2.running_var"][0] == first
    norms = torch.linalg.vector_norm(model.blocks[0].conv2.weight.flatten(1), dim=1)
    assert first == sorted(norms.topk(8).indices.tolist())


def test_nothing_is_scattered_where_nothing_goes() -> None:
    model, x = resnet()
    pruned = fxprune.prune(model, x, rate=0.0, scatter=True)
    assert pruned.fxprune.plan.kept == {} and "pad" not in pruned.code
    one = fxprune.prune(model, x, rate=0.0, rates={"blocks.1.conv2": 0.5}, scatter=True)
    assert one.code.count("pad(") == 1
    assert gap(masked(model, one.fxprune.plan.kept)(x), one(x)) < LIMIT


def test_the_names_of_the_state_are_the_models() -> None:
    model, x = resnet()
    pruned = fxprune.prune(model, x, rate=0.5, scatter=True)
    assert pruned.state_dict().keys() == model.state_dict().keys()
    check_slices(model, pruned)


@ADDS
def test_it_trains(add: Callable) -> None:
    model, x = resnet(add)
    pruned = fxprune.prune(model, x, rate=0.5, scatter=True).train()
    target = torch.randn(2, 4, dtype=torch.float64)
    optimizer = torch.optim.SGD(pruned.parameters(), lr=1e-3)
    before = {name: p.detach().clone() for name, p in pruned.named_parameters()}
    losses = []
    for _ in range(3):
        optimizer.zero_grad()
        losses.append(F.mse_loss(pruned(x), target))
        losses[-1].backward()
        optimizer.step()
    assert losses[2] < losses[1] < losses[0]
    assert all(not torch.equal(p, before[name]) for name, p in pruned.named_parameters())


def test_it_trains_as_the_masked_network_does() -> None:
    """Gradients are the slices of the masked network's, batch statistics too."""
    model, x = resnet()
    pruned = fxprune.prune(model, x, rate=0.5, scatter=True)
    kept = pruned.fxprune.plan.kept
    reference = masked(model, kept)
    for each in (pruned.train(), reference.train()):
        each(x).square().sum().backward()
    full = dict(reference.named_parameters())
    for name, p in pruned.named_parameters():
        grad = full[name].grad
        for dim, rows in kept.get(name, {}).items():
            grad = grad.index_select(dim, torch.tensor(rows))
        assert gap(grad, p.grad) < 1e-8, name


def test_copies_and_files() -> None:
    model, x = resnet()
    pruned = fxprune.prune(model, x, rate=0.5, scatter=True)
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    for twin in (copy.deepcopy(pruned), torch.load(file, weights_only=False)):
        assert gap(pruned(x), twin(x)) == 0.0 and twin.fxprune.plan == pruned.fxprune.plan
        twin.load_state_dict(pruned.state_dict())
        assert not {p.data_ptr() for p in twin.parameters()} & {
            p.data_ptr() for p in pruned.parameters()
        }


@ADDS
def test_it_exports(add: Callable) -> None:
    model, x = resnet(add)
    pruned = fxprune.prune(model, x, rate=0.5, scatter=True).eval()
    exported = torch.export.export(pruned, (x,))
    assert gap(pruned(x), exported.module()(x)) < 1e-12


def test_it_moves_to_other_dtypes() -> None:
    model, x = resnet()
    pruned = fxprune.prune(model, x, rate=0.5, scatter=True)
    expected = pruned(x)
    assert pruned.to(torch.float32)(x.float()).dtype == torch.float32
    assert gap(expected.float(), pruned(x.float())) < 1e-4


def test_a_plan_of_an_analysis() -> None:
    model, x = resnet()
    plan = fxprune.plan(fxprune.analyze(model, x, scatter=True), rate=0.5)
    pruned = fxprune.prune(model, x, rate=0.5, scatter=True)
    assert plan == pruned.fxprune.plan
    assert fxprune.apply(model, plan, x).code == pruned.code


def test_a_plan_read_the_other_way_is_refused() -> None:
    model, x = resnet()
    plan = fxprune.prune(model, x, rate=0.5, scatter=True).fxprune.plan
    with pytest.raises(PlanError, match="coupl"):
        fxprune.apply(model, plan.model_copy(update={"scatter": False}), x)
    coupled = fxprune.prune(model, x, rate=0.5).fxprune.plan
    with pytest.raises(PlanError):
        fxprune.apply(model, coupled.model_copy(update={"scatter": True}), x)


@pytest.mark.parametrize("value", ["yes", 2, "True"])
def test_scatter_is_true_or_false(value: Any) -> None:
    model, x = resnet()
    with pytest.raises(OptionError, match="scatter"):
        fxprune.prune(model, x, scatter=value)


@pytest.mark.parametrize("add", [summed, summed_in_place])
def test_branches_shrink_again(add: Callable) -> None:
    model, x = resnet(add)
    found = model
    for width in (12, 9, 7, 6):
        found = assert_named(found, x, rate=0.25, scatter=True)
        out = widths(found)
        assert [out[name] for name in ("stem", "blocks.0.conv1")] == [width] * 2
        assert [out[f"blocks.{i}.conv2"] for i in (0, 1)] == [width] * 2
    assert inputs_of(found)["fc"] == 32 and inputs_of(found)["blocks.1.conv1"] == 16


class Transformer(nn.Module):
    """Blocks of attention and an MLP, norms before them."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.head = nn.Linear(3, 16), nn.Linear(16, 4)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(16, 4, 24, 0.0, batch_first=True, norm_first=True)
            for _ in range(2)
        )
        self.norm = nn.LayerNorm(16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def test_norms_of_a_transformers_stream_are_not_changed() -> None:
    model = randomise(Transformer())
    x = torch.randn(2, 5, 3, dtype=torch.float64)
    pruned = assert_exact(model, (x,), scatter=True, ignore=["embed"])
    state, old = pruned.state_dict(), model.state_dict()
    norms = [name for name in old if "norm" in name]
    assert len(norms) == 10
    assert all(torch.equal(state[name], old[name]) for name in norms)
    assert all(m.normalized_shape == (16,) for m in pruned.modules() if isinstance(m, nn.LayerNorm))
    for i in range(2):
        assert state[f"blocks.{i}.linear1.weight"].shape == (12, 16)
        assert state[f"blocks.{i}.linear2.weight"].shape == (8, 12)
        assert state[f"blocks.{i}.self_attn.out_proj.weight"].shape[0] == 8


def test_options_of_selection_hold_for_each_branch() -> None:
    model, x = resnet()
    options = {"rate": 0.7, "round_to": 4, "rates": {"blocks.0.conv2": 0.25}, "scatter": True}
    pruned = assert_named(model, x, ignore=["blocks.1.conv2"], **options)
    out = widths(pruned)
    assert [out[f"blocks.{i}.conv2"] for i in range(4)] == [12, 16, 12, 12]
    assert out["stem"] == 8


@pytest.mark.parametrize(
    "criterion", ["bn_gamma", "geometric_median", "distribution_fit", "in_out_norm"]
)
def test_every_kind_of_criterion_judges_branches(criterion: str) -> None:
    """A branch has makers but no readers of its own."""
    model, x = resnet()
    assert widths(assert_named(model, x, criterion=criterion, scatter=True))["blocks.1.conv2"] == 8


def test_global_selection_over_branches() -> None:
    model, x = resnet()
    pruned = assert_named(model, x, scatter=True, scope="global", rate=0.4)
    before, after = pruned.fxprune.report.channels
    every = sum(m.out_channels for m in model.modules() if isinstance(m, nn.Conv2d))
    assert before - after == int(every * 0.4)


@pytest.mark.parametrize("method", ["add", "sub"])
def test_sums_with_a_factor(method: str) -> None:
    case = net(image(), a=conv(3, 8), b=conv(3, 8), o=conv(8, 2))(
        lambda m, x: m.o(getattr(m.a(x), method)(m.b(x), alpha=2))
    )
    assert_exact(case.build(), case.args(), scatter=True)


# -- in place, through views -----------------------------------------------------------------------

VIEWS: dict[str, Case] = {}
PARTS = dict(s=conv(3, 8), a=conv(8, 8), b=conv(8, 8), o=conv(8, 2))


@net(image(), into=VIEWS, **PARTS)
def half_of_it(m, x):
    h = m.a(m.s(x))
    p, _ = h.chunk(2, 1)
    p += m.b(h)[:, :4]
    return m.o(h)


@net(image(), into=VIEWS, **PARTS)
def flattened(m, x):
    h = m.a(m.s(x))
    v = h.flatten(2)
    v += m.b(h).flatten(2)
    return m.o(h)


@net(image(), into=VIEWS, **PARTS)
def some_rows(m, x):
    h, y = m.a(m.s(x)), m.b(m.s(x))
    v = h[:, :, :4]
    v += y[:, :, :4]
    return m.o(h)


@net(image(), into=VIEWS, **PARTS)
def transposed(m, x):
    h, y = m.a(m.s(x)), m.b(m.s(x))
    v = h.permute(0, 2, 3, 1)
    v += y.permute(0, 2, 3, 1)
    return m.o(h)


@net(image(), into=VIEWS, **PARTS, r=nn.ReLU(inplace=True))
def behind_a_module_in_place(m, x):
    h, y = m.a(m.s(x)), m.b(m.s(x))
    m.r(h).add_(y)
    return m.o(h)


@net(image(), into=VIEWS, **PARTS)
def contiguous_already(m, x):
    h, y = m.a(m.s(x)), m.b(m.s(x))
    v = h.contiguous()
    v += y
    return m.o(h)


@pytest.mark.parametrize("name", VIEWS)
def test_who_reads_what_a_view_was_added_to(name: str) -> None:
    case = VIEWS[name]
    assert_exact(case.build(), case.args(), scatter=True)


# -- outputs ---------------------------------------------------------------------------------------


def test_layers_whose_sum_is_the_output_keep_their_channels() -> None:
    """Half of the classes, or of an image's colours, would come from one layer alone."""
    case = net(
        image(), s=conv(3, 8), a=conv(8, 3), b=conv(8, 5), c=conv(8, 5)
    )(lambda m, x: (x + m.a(F.relu(m.s(x))), m.b(m.s(x)) + m.c(m.s(x))))  # fmt: skip
    pruned = assert_exact(case.build(), case.args(), scatter=True)
    assert [widths(pruned)[name] for name in "sabc"] == [4, 3, 5, 5]


# -- torchvision -----------------------------------------------------------------------------------


def test_resnet18() -> None:
    models = pytest.importorskip("torchvision.models")
    model = randomise(models.resnet18(num_classes=5))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    pruned = fxprune.prune(model, x, rate=0.5, criterion="l1", scatter=True)
    assert gap(masked(model, pruned.fxprune.plan.kept)(x), pruned(x)) < LIMIT
    out, read = widths(pruned), inputs_of(pruned)
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d):
            assert out[name] == module.out_channels // 2, name
            narrow = name.endswith("conv2") or name in ("layer1.0.conv1",)
            assert read[name] == module.in_channels // (2 if narrow else 1), name
    assert read["fc"] == 512


# -- random networks -------------------------------------------------------------------------------


def check_scattered(network: Network, choice: Choice) -> float | None:
    """The share of channels removed; None where nothing may go."""
    model, inputs = network.build(), network.inputs()
    try:
        pruned = fxprune.prune(model, inputs, **{**choice.options(), "scatter": True})
    except NothingToPrune:
        return None
    assert pruned.fxprune.report.verification.difference <= LIMIT
    got = outputs(pruned, inputs)
    assert [t.shape for t in got] == [t.shape for t in outputs(model, inputs)]
    check_slices(model, pruned)
    if comparable(network, choice):
        assert difference(outputs(masked_network(model, pruned.fxprune.plan), inputs), got) <= LIMIT
    before, after = pruned.fxprune.report.channels
    return 1 - after / before


@settings(max_examples=25)
@given(networks(), choices())
def test_scattered_is_masked(network: Network, choice: Choice) -> None:
    """The pruned network computes the masked original, for any choice of channels."""
    assume(check_scattered(network, choice) is not None)
