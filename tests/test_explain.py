"""Explanations: the chain from one slice to another, as text."""

from __future__ import annotations

import re
import sys
import textwrap
import time
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import OptionError

sys.path.insert(0, str(Path(__file__).parent / "snapshots"))

from small_net import SmallNet


def text(explanation) -> str:
    return re.sub(r"\.py:\d+", ".py:N", str(explanation))


def expected(block: str) -> str:
    return textwrap.dedent(block).strip()


@pytest.fixture(scope="module")
def small():
    return fxprune.analyze(SmallNet(), torch.zeros(2, 3, 16, 16))


@pytest.fixture(scope="module")
def resnet():
    torchvision = pytest.importorskip("torchvision")
    return fxprune.analyze(torchvision.models.resnet18(), torch.zeros(2, 3, 64, 64))


# -- chains ----------------------------------------------------------------------------------------


def test_layers_that_meet_in_an_addition(small):
    assert text(small.explain("conv1", "conv2")) == expected("""
        conv1 and conv2 are coupled:
          conv1.weight[0] ~ conv2.weight[0]
              meet in %add = %relu + %conv2
              small_net.py:N, in forward: x = x + self.conv2(x)
    """)


def test_a_norm_has_the_channels_of_the_layer_before_it_without_a_tie(small):
    assert text(small.explain("conv1.weight", "bn1.weight")) == expected("""
        conv1.weight and bn1.weight are coupled:
          conv1.weight[0] ~ bn1.weight[0]
              scaled in %bn1 = BatchNorm2d bn1(%conv1)
              small_net.py:N, in forward: x = F.relu(self.bn1(self.conv1(x)))
    """)


def test_a_chain_through_a_norm_and_an_addition(small):
    assert text(small.explain("bn1", "conv2")) == expected("""
        bn1 and conv2 are coupled:
          bn1.weight[0] ~ conv1.weight[0]
              scaled in %bn1 = BatchNorm2d bn1(%conv1)
              small_net.py:N, in forward: x = F.relu(self.bn1(self.conv1(x)))
          conv1.weight[0] ~ conv2.weight[0]
              meet in %add = %relu + %conv2
              small_net.py:N, in forward: x = x + self.conv2(x)
    """)


def test_a_layer_that_reads_another(small):
    assert text(small.explain("gate", "conv1")) == expected("""
        gate and conv1 are not coupled, but gate reads what conv1 makes:
          conv1.weight[0] ~ gate.weight[1]
              read in %gate = Conv2d gate(%add)
              small_net.py:N, in forward: a, b = self.gate(x).chunk(2, 1)
    """)
    assert text(small.explain("conv1", "gate")).startswith("conv1 and gate are not coupled, but")


def test_layers_that_have_nothing_to_do_with_each_other(small):
    assert text(small.explain("conv1", "fc")) == expected("""
        conv1 and fc are not coupled:
          conv1 is in group conv1 (8 channels)
          fc is in group fc (5 channels)
    """)


def test_a_layer_and_itself(small):
    assert text(small.explain("gate", "gate")) == expected("""
        gate and gate are the same:
          gate is in group gate (6 channels)
    """)


def test_steps_are_data_too(small):
    (step,) = small.explain("conv1", "conv2").steps
    assert (step.left, step.right, step.how) == ("conv1.weight[0]", "conv2.weight[0]", "meet")
    assert step.node == "%add = %relu + %conv2" and "small_net.py" in step.source


def test_chain_says_which_of_many_equal_lines_it_was(resnet):
    assert text(resnet.explain("layer3.0.conv2", "layer3.0.downsample.0")) == expected("""
        layer3.0.conv2 and layer3.0.downsample.0 are coupled:
          layer3.0.conv2.weight[0] ~ layer3.0.downsample.0.weight[0]
              meet in %add__4 = %layer3_0_bn2.add_(%layer3_0_downsample_1)
              resnet.py:N, in forward: out += identity
    """)


def test_chain_is_the_shortest(resnet):
    found = resnet.explain("conv1", "layer1.1.bn2")
    assert [step.how for step in found.steps] == ["meet", "meet", "scaled"]
    assert [step.node.split()[0] for step in found.steps] == ["%add_", "%add__1", "%layer1_1_bn2"]


def test_inner_layer_and_downsample_of_another_stage_are_not_coupled(resnet):
    assert text(resnet.explain("layer1.0.conv1", "layer3.0.downsample.0")) == expected("""
        layer1.0.conv1 and layer3.0.downsample.0 are not coupled:
          layer1.0.conv1 is in group layer1.0.conv1 (64 channels)
          layer3.0.downsample.0 is in group layer3.0.conv2 (256 channels)
    """)


def test_chain_through_rows_that_go_as_a_whole():
    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.scale = nn.Linear(3, 8), nn.Linear(3, 4)
            self.out = nn.Linear(8, 2)

        def forward(self, x):
            rows = self.a(x).unflatten(1, (4, 2)) * self.scale(x).unsqueeze(2)
            return self.out(rows.sum(2).repeat(1, 2))

    analysis = fxprune.analyze(Rows(), torch.zeros(5, 3))
    assert "a and scale are coupled:" in text(analysis.explain("a", "scale"))


def test_padding_is_named_as_such():
    class Padded(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 4, 1), nn.Conv2d(3, 8, 1)
            self.out = nn.Conv2d(8, 2, 1)

        def forward(self, x):
            padded = nn.functional.pad(self.a(x), (0, 0, 0, 0, 2, 2))
            return self.out(padded + self.b(x))

    analysis = fxprune.analyze(Padded(), torch.zeros(2, 3, 4, 4))
    found = text(analysis.explain("a", "b"))
    assert found.startswith("a and b are coupled:") and "meet in %add = %pad + %b" in found


# -- groups ----------------------------------------------------------------------------------------


def test_the_group_of_a_layer(small):
    assert text(small.explain("conv1")) == expected("""
        conv1:
          group conv1, 8 channels, may shrink
            makes  conv1.weight[0]
            makes  bn1.*[0]
            makes  conv2.{weight,bias}[0]
            reads  conv2.weight[1]
            reads  gate.weight[1]
            keeps equal counts in 2 blocks of 4, for %conv2
    """)


def test_places_a_channel_has_are_counted(small):
    found = text(small.explain("gate"))
    assert "makes  gate.{weight,bias}[0] x2" in found and "reads  fc.weight[1] x16" in found


def test_frozen_group_says_where(small):
    assert text(small.explain("fc")) == expected("""
        fc:
          group fc, 5 channels, frozen: reaches the network's output
            in %output
            makes  fc.{weight,bias}[0]
    """)


def test_a_layer_in_several_groups():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 12, 1)
            self.b, self.c = nn.Conv2d(4, 2, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            left, right = self.a(x).split([4, 8], 1)
            return self.b(left), self.c(right)

    found = text(fxprune.analyze(Split(), torch.zeros(2, 3, 4, 4)).explain("a"))
    assert "makes  a.{weight,bias}[0]\n    reads  b.weight[1]" in found
    assert "makes  a.{weight,bias}[0] 4..11\n    reads  c.weight[1]" in found


# -- names -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("names", [("conv3",), ("conv1", "conv3"), ("conv3", "conv1")])
def test_names_that_are_not_there_are_refused_with_a_hint(small, names):
    with pytest.raises(OptionError) as error:
        small.explain(*names)
    assert "`conv3` has no channels in this network" in str(error.value)
    assert "did you mean `conv" in str(error.value)


def test_large_networks_are_explained_at_once():
    torchvision = pytest.importorskip("torchvision")
    analysis = fxprune.analyze(torchvision.models.densenet201(), torch.zeros(2, 3, 32, 32))
    start = time.perf_counter()
    first, last = "features.denseblock1.denselayer1.conv2", "features.transition1.norm"
    assert "are coupled" in str(analysis.explain(first, last))
    assert "not coupled" in str(analysis.explain("features.conv0", "classifier"))
    assert time.perf_counter() - start < 1.0


# -- at the prompt ---------------------------------------------------------------------------------


def test_what_is_returned_is_short_at_the_prompt(small):
    counts = r"\d+ of \d+ groups can shrink, with \d+ of \d+ channels"
    assert re.fullmatch(f"Analysis of SmallNet on 2x3x16x16: {counts}", repr(small))
    assert re.fullmatch(r"<Group conv1: \d+ channels in \d+ slices>", repr(small.groups[0]))
    plan = fxprune.plan(small, rate=0.5)
    assert re.fullmatch(r"<Plan for SmallNet by l2 at 0.5: \d+ of \d+ channels go>", f"{plan!r}")
    explanation = small.explain("conv1", "conv2")
    assert repr(explanation) == str(explanation)


def test_a_report_is_shown_as_it_is_printed():
    report = fxprune.prune(SmallNet(), torch.zeros(2, 3, 16, 16), verify="shapes").fxprune.report
    assert repr(report) == str(report) and "channels" in str(report)


class Fusion(torch.nn.Module):
    """Two maps joined by masks that a layer makes."""

    def __init__(self):
        super().__init__()
        self.a, self.b = torch.nn.Conv2d(3, 8, 3), torch.nn.Conv2d(8, 4, 1)
        self.w = torch.nn.Conv2d(3, 3, 3)

    def forward(self, x):
        w, x = self.w(x), self.a(x)
        return self.b(w[:, :1] * x + w[:, 1:2] * x.relu() + w[:, 2:] * x.tanh())


def test_what_stays_for_the_same_reason_is_one_line():
    report = fxprune.prune(Fusion(), torch.rand(2, 3, 8, 8), rate=0.5).fxprune.report
    (line,) = [line for line in str(report).splitlines() if line.startswith("    w ")]
    assert "3 of 3" in line and "is picked alone by %getitem" in line
