"""What is in the way where little can go, and what was found to free it."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from zoo_small import conv, image, net, randomise

import fxprune

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


@net(image(), s=conv(3, 4), a=conv(4, 16), b=conv(16, 4))
def softmaxed(m, x):
    return m.b(m.a(m.s(x)).softmax(1))


@net(image(), a=conv(3, 8), b=conv(8, 3), c=conv(3, 4))
def added_to_the_input(m, x):
    return m.c(m.b(torch.relu(m.a(x))) + x)


@net(image(), a=conv(3, 4), b=conv(4, 12))
def wide_outputs(m, x):
    return m.b(m.a(x))


@torch.library.custom_op("fxprune_tests::strange", mutates_args=())
def strange(x: torch.Tensor) -> torch.Tensor:
    return x.flip(1).clone()


@strange.register_fake
def _(x):
    return torch.empty_like(x)


@net(image(), a=conv(3, 16), b=conv(16, 4))
def with_an_unknown_op(m, x):
    return m.b(torch.ops.fxprune_tests.strange(m.a(x)))


def causes(case, **options):
    return fxprune.analyze(randomise(case.build()), X, **options).causes()


def test_an_option_is_named_once_it_was_seen_to_free_channels():
    first = causes(softmaxed)[0]
    assert first.reason == "softmax mixes channels (mixing='norms')" and first.channels == 16
    assert first.remedy == "mixing='all' would free 16 of them"
    assert "test_causes.py" in first.source and "softmax(1)" in first.source
    small = fxprune.prune(randomise(softmaxed.build()), X, mixing="all")
    assert small.a.out_channels == 8


def test_branches_that_meet_the_input_are_freed_by_scatter():
    stuck = next(c for c in causes(added_to_the_input) if "constant or an input" in c.reason)
    assert (stuck.channels, stuck.remedy) == (3, "scatter=True would free 3 of them")


def test_outputs_stay_with_any_option():
    (cause,) = causes(wide_outputs)
    assert cause.remedy == "outputs keep their shape; no option frees them"


def test_an_unknown_op_wants_a_rule():
    first = causes(with_an_unknown_op)[0]
    assert first.channels == 16 and "strange" in first.reason and "a rule" in first.remedy


def test_kept_heads_are_freed_by_letting_them_go():
    from test_heads import TOKENS, Packed

    model, x = randomise(Packed()), torch.randn(2, TOKENS, 5, dtype=torch.float64)
    kept = next(c for c in fxprune.analyze(model, x, heads="keep").causes() if "heads" in c.reason)
    assert kept.remedy.startswith("heads='dims' would free")


@pytest.mark.parametrize("case, told", [(softmaxed, True), (added_to_the_input, False)])
def test_the_report_tells_where_less_than_half_could_go(case, told):
    report = fxprune.prune(randomise(case.build()), X, rate=0.5).fxprune.report
    assert ("less than half of the channels could go" in str(report)) == told
    assert bool(report.causes) == told
    if told:
        assert "mixing='all' would free 16 of them" in str(report)


def test_the_three_costliest_are_told_first():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.stems = nn.ModuleList(conv(3, n) for n in (4, 5, 6, 7))
            self.heads = nn.ModuleList(conv(n, 1) for n in (4, 5, 6, 7))

        def forward(self, x):
            a, b, c, d = (stem(x) for stem in self.stems)
            found = a.softmax(1), b.sigmoid().amax(1, True).expand_as(b), c.cumsum(1), d.sort(1)[0]
            return torch.cat([head(y) for head, y in zip(self.heads, found, strict=True)], 1)

    found = fxprune.analyze(randomise(Many()), X).causes()
    assert len(found) == 3 and [c.channels for c in found] == sorted(
        (c.channels for c in found), reverse=True
    )
