"""`squeeze={"divide": 4, "round_to": 8}`: gates are as wide as if built for what is left."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from zoo_small import conv, gap, masked, randomise, widths

import fxprune
from fxprune.errors import OptionError
from fxprune.squeeze import Squeeze

RULE = {"divide": 4, "round_to": 4}


# -- the rule --------------------------------------------------------------------------------------


def rounded(exact: float, to: int) -> int:
    """The multiple of `to` nearest to `exact` (the larger of two), at least one; the next where
    that is less than 90 % of it."""
    below = math.floor(exact / to) * to
    near = below if exact - below < below + to - exact else below + to
    near = max(near, to)
    return near if near >= 0.9 * exact else near + to


@settings(max_examples=500)
@given(st.integers(1, 4096), st.sampled_from([1, 2, 3, 4, 5, 6, 8, 16, 24]), st.integers(1, 32))
def test_widths_are_rounded_as_they_were_built(gated: int, divide: int, to: int) -> None:
    width = Squeeze(divide, to).width(gated)
    assert width == rounded(gated / divide, to)
    assert width % to == 0 and width >= to and width >= 0.9 * gated / divide


@pytest.mark.parametrize("gated", [1, 16, 41, 72, 96, 100, 120, 209, 240, 480, 484, 540, 672, 960])
def test_torchvisions_rule(gated: int) -> None:
    """Its MobileNetV3 divides whole numbers first."""
    mobilenet = pytest.importorskip("torchvision.models._utils")
    assert Squeeze(4, 8).width(gated) == mobilenet._make_divisible(gated / 4, 8)


def test_the_published_network_of_liu_and_lei() -> None:
    """Squeeze widths for the hidden widths of Table 5."""
    kept = {72: 24, 102: 24, 89: 24, 209: 56, 38: 16, 540: 136, 484: 120, 255: 64}
    assert {hidden: Squeeze(4, 8).width(hidden) for hidden in kept} == kept


@pytest.mark.parametrize(
    ("gated", "divide", "to", "width"),
    [(50, 4, 8, 16), (36, 4, 8, 16), (35, 4, 8, 8), (48, 4, 8, 16), (1, 4, 8, 8), (7, 1, 1, 7),
     (10, 4, 1, 3), (9, 4, 1, 3), (20, 2.5, 4, 8), (3, 0.5, 1, 6)],
)  # fmt: skip
def test_widths_by_hand(gated: int, divide: float, to: int, width: int) -> None:
    """36 / 4 = 9 is nearest to 8, which is less than 8.1."""
    assert Squeeze(divide, to).width(gated) == width


# -- a block with a gate ---------------------------------------------------------------------------


class ConvGate(nn.Module):
    def __init__(self, c: int, squeeze: int, norm: bool = False):
        super().__init__()
        self.fc1, self.fc2 = conv(c, squeeze, 1), conv(squeeze, c, 1)
        self.norm = nn.BatchNorm2d(squeeze) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(self.fc2(y))


class LinearGate(nn.Module):
    def __init__(self, c: int, squeeze: int, norm: bool = False):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(c, squeeze, bias=not norm), nn.Linear(squeeze, c, bias=False)
        self.norm = nn.BatchNorm1d(squeeze) if norm else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        n, c = x.shape[:2]
        y = self.fc2(F.silu(self.norm(self.fc1(x.mean((2, 3))))))
        return x * F.hardsigmoid(y).view(n, c, 1, 1)


class Net(nn.Module):
    """An inverted residual of 64 hidden channels; its gate has `squeeze` units."""

    def __init__(
        self, gate: Callable[..., nn.Module] = ConvGate, squeeze: int = 16, **options: Any
    ):
        super().__init__()
        self.stem, self.expand = conv(3, 16), conv(16, 64, 1)
        self.deep, self.gate = conv(64, 64, groups=64), gate(64, squeeze, **options)
        self.project, self.out = conv(64, 16, 1), conv(16, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(x + self.project(self.gate(F.relu(self.deep(F.relu(self.expand(x)))))))


def image() -> Tensor:
    return torch.randn(2, 3, 8, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))


def pruned_net(model: nn.Module, **options: Any) -> Any:
    """The pruned network, which computes what the masked one does."""
    x = image()
    pruned = fxprune.prune(model, x, **{"squeeze": RULE, **options})
    assert gap(masked(model, pruned.fxprune.plan.kept)(x), pruned(x)) < 1e-9
    return pruned


def units(pruned: nn.Module) -> tuple[int, int]:
    """How many channels are gated, and by how many units."""
    found = widths(pruned)
    assert found["gate.fc2"] == found["deep"] == found["expand"]
    assert pruned.get_submodule("gate.fc2").weight.shape[1] == found["gate.fc1"]
    return found["expand"], found["gate.fc1"]


GATES = pytest.mark.parametrize("gate", [ConvGate, LinearGate])
NORMS = pytest.mark.parametrize("norm", [False, True])


@GATES
@NORMS
@pytest.mark.parametrize("rate", [0.0, 0.05, 0.1, 0.3, 0.5, 0.7, 0.95])
def test_a_gate_follows_what_it_gates(gate: Callable, norm: bool, rate: float) -> None:
    pruned = pruned_net(randomise(Net(gate, norm=norm)), rate=rate)
    kept = 64 - int(64 * rate)
    assert units(pruned) == (kept, min(16, rounded(kept / 4, 4)) if kept < 64 else 16)
    if norm:
        assert widths(pruned)["gate.norm.running_var"] == units(pruned)[1]


@GATES
@NORMS
def test_the_units_that_carry_most_stay(gate: Callable, norm: bool) -> None:
    """||row of fc1|| * ||column of fc2||, of the weights as they were."""
    model = randomise(Net(gate, norm=norm))
    order = torch.arange(16, dtype=torch.float64)
    with torch.no_grad():
        model.gate.fc1.weight.transpose(0, -1).mul_(1 + (order * 7) % 16)
        model.gate.fc2.weight.transpose(1, -1).mul_(1 + (order * 5) % 16)
    plan = pruned_net(model, rate=0.5).fxprune.plan
    made = model.gate.fc1.weight.flatten(1).square().sum(1).sqrt()
    read = model.gate.fc2.weight.flatten(1).square().sum(0).sqrt()
    best = sorted((made * read).argsort(descending=True)[:8].tolist())
    assert plan.kept["gate.fc1.weight"][0] == plan.kept["gate.fc2.weight"][1] == best
    assert best != sorted(made.argsort(descending=True)[:8].tolist())
    assert best != sorted(read.argsort(descending=True)[:8].tolist())


@pytest.mark.parametrize("criterion", ["l1", "bn_gamma", "random", "distribution_fit"])
def test_the_units_do_not_depend_on_the_criterion(criterion: str) -> None:
    model = randomise(Net())
    wanted = pruned_net(model, rate=0.5).fxprune.plan.kept["gate.fc1.weight"][0]
    plan = pruned_net(model, rate=0.5, criterion=criterion).fxprune.plan
    assert plan.kept["gate.fc1.weight"][0] == wanted


@pytest.mark.parametrize(
    "options",
    [{"only": ["stem"]}, {"ignore": ["expand"]}, {"rates": {"expand": 0.0}},
     {"only": ["role:stream", "role:head"]}, {"only": ["role:squeeze"]}, {"max_rate": 0.01}],
)  # fmt: skip
def test_a_gate_of_all_channels_stays(options: dict[str, Any]) -> None:
    """Even where a gate built today would be narrower."""
    pruned = pruned_net(randomise(Net(squeeze=24)), rate=0.5, **options)
    assert units(pruned) == (64, 24)


def test_a_gate_never_grows() -> None:
    """Neither to the width of the rule, nor to a floor."""
    for squeeze, rate, more in ((4, 0.5, {}), (6, 0.05, {}), (2, 0.9, {"min_channels": 5})):
        pruned = pruned_net(randomise(Net(squeeze=squeeze)), rate=rate, **more)
        assert units(pruned)[1] == squeeze


def test_a_gate_keeps_the_least_number_of_channels() -> None:
    pruned = pruned_net(randomise(Net()), rate=0.9, min_channels=10)
    assert units(pruned) == (10, 10)


def test_other_options_of_selection_are_for_other_groups() -> None:
    """`rates`, `round_to` and `max_rate` say nothing of what follows."""
    options = {"rates": {"gate.fc1": 0.9, "expand": 0.25}, "round_to": 16, "max_rate": 0.4}
    assert units(pruned_net(randomise(Net()), rate=0.5, **options)) == (48, 12)


def test_ignored_gates_stay() -> None:
    for ignore in (["gate.fc1"], ["role:squeeze"], ["in:gate.fc2"], [ConvGate]):
        pruned = pruned_net(randomise(Net()), rate=0.5, ignore=ignore)
        assert widths(pruned)["gate.fc1"] == 16
    assert units(pruned_net(randomise(Net()), rate=0.5, ignore=["gate.fc1"])) == (32, 16)


def test_without_the_option_gates_are_groups_like_others() -> None:
    assert units(pruned_net(randomise(Net()), rate=0.25, squeeze=None)) == (48, 12)
    assert units(pruned_net(randomise(Net()), rate=0.9, squeeze=None)) == (7, 2)


@pytest.mark.parametrize("select_by", ["rate", "threshold", "cumulative"])
def test_a_cut_through_all_leaves_gates_out(select_by: str) -> None:
    """Their scores count in no cut; they follow what comes of it."""
    model = randomise(Net())
    scope = "local" if select_by == "cumulative" else "global"
    options = {"rate": 0.4, "scope": scope, "select_by": select_by}
    pruned = pruned_net(model, **options)
    gated, squeezed = units(pruned)
    assert gated < 64 and squeezed == rounded(gated / 4, 4)
    rest = pruned_net(model, **options, squeeze=None, ignore=["role:squeeze"])
    assert units(rest) == (gated, 16) and widths(rest)["stem"] == widths(pruned)["stem"]
    if select_by == "rate":
        assert gated + widths(pruned)["stem"] == 80 - 32


def test_a_report_lists_the_gate_but_no_shortfall() -> None:
    report = pruned_net(randomise(Net()), rate=0.9).fxprune.report
    rows = {row.name: row for row in report.groups}
    assert (rows["gate.fc1"].kept, rows["gate.fc1"].reason) == (4, "")


def test_a_plan_holds_the_scores_of_units() -> None:
    model = randomise(Net())
    analysis = fxprune.analyze(model, image())
    plan = fxprune.plan(analysis, rate=0.5, squeeze=RULE, scores=True)
    (group,) = (g for g in plan.groups if g.name == "gate.fc1")
    made, read = (layer.weight.flatten(1) for layer in (model.gate.fc1, model.gate.fc2))
    wanted = torch.linalg.vector_norm(made, dim=1) * torch.linalg.vector_norm(read, dim=0)
    assert torch.allclose(torch.tensor(group.scores, dtype=torch.float64), wanted)


def test_a_plan_writes_the_same_again() -> None:
    model = randomise(Net(LinearGate, norm=True))
    pruned = pruned_net(model, rate=0.6)
    plan = fxprune.Plan.from_json(pruned.fxprune.plan.to_json())
    again = fxprune.apply(model, plan)
    assert gap(pruned(image()), again(image())) == 0.0 and widths(again) == widths(pruned)


def test_pruned_twice() -> None:
    once = pruned_net(randomise(Net()), rate=0.25)
    assert units(once) == (48, 12)
    assert units(pruned_net(once, rate=0.5)) == (24, 8)  # 24 / 4 = 6, and of two as near the larger


# -- other gates -----------------------------------------------------------------------------------


class GroupedGate(nn.Module):
    """Groups of gate units, normalised in groups."""

    def __init__(self, c: int, squeeze: int):
        super().__init__()
        self.fc1, self.fc2 = conv(c, squeeze, 1, groups=4), conv(squeeze, c, 1, groups=4)
        self.norm = nn.GroupNorm(2, squeeze)

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.norm(self.fc1(F.adaptive_avg_pool2d(x, 1))))
        return x * torch.sigmoid(self.fc2(y))


def test_units_in_groups_go_in_equal_numbers() -> None:
    """3 * 3 = 9 of 16 units is no width of four groups; the next that is has 12."""
    pruned = pruned_net(randomise(Net(GroupedGate)), rate=0.5, squeeze={"divide": 4, "round_to": 3})
    assert (widths(pruned)["expand"], widths(pruned)["gate.fc1"]) == (32, 12)
    kept = pruned.fxprune.plan.kept["gate.fc1.weight"][0]
    assert [sum(i // 4 == group for i in kept) for group in range(4)] == [3] * 4


class Selective(nn.Module):
    """A gate of two branches' sum, as in SK units."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.a, self.b = conv(3, 16), conv(16, 32), conv(16, 32, 1)
        self.fc1, self.fc2 = nn.Linear(32, 8), nn.Linear(8, 32)
        self.out = conv(32, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        a, b = self.a(x), self.b(x)
        gate = torch.sigmoid(self.fc2(F.relu(self.fc1((a + b).mean((2, 3))))))[:, :, None, None]
        return self.out(a * gate + b * (1 - gate))


def test_a_gate_between_branches() -> None:
    pruned = pruned_net(randomise(Selective()), rate=0.5, squeeze={"divide": 4, "round_to": 2})
    assert [widths(pruned)[name] for name in ("a", "b", "fc1", "fc2")] == [16, 16, 4, 16]


class Scaled(Net):
    """The gate scales the branch, after the projection."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = ConvGate(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(x + self.gate(self.project(F.relu(self.deep(self.expand(x))))))


@pytest.mark.parametrize("scatter", [False, True])
def test_a_gate_of_a_branch(scatter: bool) -> None:
    """Coupled it follows the stream, scattered the branch alone."""
    options = {"rates": {"stem": 0.25}} if scatter else {"rates": {"stem": 0.5}}
    rule = {"divide": 2, "round_to": 1}
    pruned = pruned_net(randomise(Scaled()), rate=0.5, squeeze=rule, scatter=scatter, **options)
    found = widths(pruned)
    assert found["project"] == 8 and found["gate.fc1"] == 4
    assert found["stem"] == (12 if scatter else 8)


class Perceptron(nn.Module):
    """Pairs of layers over (n, c) beside a stream."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.out = nn.Linear(5, 16), nn.Linear(16, 3)
        self.a, self.b = nn.Linear(16, 32), nn.Linear(32, 16)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        return self.out(x + self.b(F.relu(self.a(x))))


@pytest.mark.parametrize("options", [{"rate": 0.5}, {"rate": 0.5, "only": ["a"]}])
def test_without_a_gate_the_option_changes_nothing(options: dict[str, Any]) -> None:
    model, x = randomise(Perceptron()), torch.randn(2, 5, dtype=torch.float64)
    plain = fxprune.prune(model, x, **options)
    assert widths(fxprune.prune(model, x, **options, squeeze=RULE)) == widths(plain)


class Plain(Net):
    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Identity()


def test_a_network_of_convolutions_alone_has_no_gates() -> None:
    model = randomise(Plain())
    plain, found = (pruned_net(model, rate=0.5, squeeze=rule) for rule in (None, RULE))
    assert found.fxprune.plan == plain.fxprune.plan


# -- what may be given -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("given", "fault"),
    [
        (4, "squeeze is a int"),
        ("mobilenet", "squeeze is a str"),
        ([4, 8], "squeeze is a list"),
        (True, "squeeze is a bool"),
        ({"divid": 4}, "squeeze has no `divid`"),
        ({"divide": 4, "to": 8}, "squeeze has no `to`"),
        ({"divide": 0}, "must be a number above 0"),
        ({"divide": -4}, "must be a number above 0"),
        ({"divide": float("nan")}, "must be a number above 0"),
        ({"divide": True}, "must be a number above 0"),
        ({"round_to": 0}, "round_to.* must be a whole number of at least 1"),
        ({"round_to": 2.5}, "round_to.* must be a whole number of at least 1"),
        ({"round_to": True}, "round_to.* must be a whole number of at least 1"),
        ({"round_to": "8"}, "round_to.* must be a whole number of at least 1"),
        ({"divide": "4"}, "must be a number above 0"),
        ({"divide": None}, "must be a number above 0"),
        ({"divide": float("inf")}, "must be a number above 0"),
    ],
)
def test_what_is_no_rule(given: Any, fault: str) -> None:
    with pytest.raises(OptionError, match=fault):
        fxprune.prune(randomise(Net()), image(), squeeze=given)


def test_the_nearest_key_is_named() -> None:
    with pytest.raises(OptionError, match="did you mean `divide`"):
        fxprune.prune(randomise(Net()), image(), squeeze={"divides": 4})


@pytest.mark.parametrize("given", [{}, {"divide": 4}, {"round_to": 8}, Squeeze(), Squeeze(4, 8)])
def test_the_default_is_mobilenets_rule(given: Any) -> None:
    model = randomise(Net())
    wanted = pruned_net(model, rate=0.5, squeeze={"divide": 4, "round_to": 8}).fxprune.plan
    assert pruned_net(model, rate=0.5, squeeze=given).fxprune.plan == wanted
    assert len(wanted.kept["gate.fc1.weight"][0]) == 8


# -- torchvision and timm --------------------------------------------------------------------------


def gates_of(model: nn.Module, first: str, second: str) -> dict[str, tuple[int, int]]:
    """Name of a gate -> (gated channels, units)."""
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, first):
            made, read = getattr(module, first).weight, getattr(module, second).weight
            assert made.shape[1] == read.shape[0] and made.shape[0] == read.shape[1]
            found[name] = (made.shape[1], made.shape[0])
    return found


def assert_follows(
    model: nn.Module, layers: tuple[str, str], rule: dict[str, Any], **options: Any
) -> None:
    x = torch.randn(1, 3, 64, 64, dtype=torch.float64)
    pruned = fxprune.prune(model, x, squeeze=rule, **options)
    assert gap(masked(model, pruned.fxprune.plan.kept)(x), pruned(x)) < 1e-9
    before, after = gates_of(model, *layers), gates_of(pruned, *layers)
    assert before.keys() == after.keys() and before
    for name, (gated, squeezed) in before.items():
        left, now = after[name]
        wanted = min(squeezed, rounded(left / rule["divide"], rule["round_to"]))
        assert now == (squeezed if left == gated else wanted), name
    assert any(after[name][0] < before[name][0] for name in before)


def test_mobilenet_v3_of_torchvision() -> None:
    models = pytest.importorskip("torchvision.models")
    model = randomise(models.mobilenet_v3_small(num_classes=5))
    options = {"only": ["role:expansion"], "scope": "global", "select_by": "threshold"}
    rule = {"divide": 4, "round_to": 8}
    assert_follows(model, ("fc1", "fc2"), rule, criterion="bn_gamma", **options)


@pytest.mark.parametrize("rate", [0.3, 0.6])
def test_a_whole_efficientnet_b0(rate: float) -> None:
    """Its rule is a share of each block's input: 24 times fewer than the hidden channels."""
    models = pytest.importorskip("torchvision.models")
    model = randomise(models.efficientnet_b0(num_classes=5))
    assert_follows(model, ("fc1", "fc2"), {"divide": 24, "round_to": 1}, rate=rate)


def test_mobilenet_v3_of_timm() -> None:
    timm = pytest.importorskip("timm")
    model = randomise(timm.create_model("mobilenetv3_small_050", num_classes=5))
    rule = {"divide": 4, "round_to": 8}
    assert_follows(model, ("conv_reduce", "conv_expand"), rule, rate=0.5)


def test_seresnet_of_timm() -> None:
    """Its gates are of branches, and have norms inside in some; coupled, they follow streams."""
    timm = pytest.importorskip("timm")
    model = randomise(timm.create_model("seresnet18", num_classes=5))
    for scatter in (False, True):
        assert_follows(
            model, ("fc1", "fc2"), {"divide": 16, "round_to": 8}, rate=0.5, scatter=scatter
        )
