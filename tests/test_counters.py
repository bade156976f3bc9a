"""Counts of parameters and operations: by hand, beside torch's own counter, before and after."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torchvision
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

import fxprune
from fxprune import models

torch.set_num_threads(1)


def image(side: int = 64, batch: int = 1) -> Tensor:
    return torch.rand(batch, 3, side, side)


class Small(nn.Module):
    """For 3x8x8 images: ops that one of the conventions counts, and some that none does."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.bn = nn.BatchNorm2d(4)
        self.deep = nn.Conv2d(4, 4, 3, stride=2, padding=1, groups=4, bias=False)
        self.fc = nn.Linear(4, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.bn(self.conv(x)))
        x = F.hardswish(self.deep(x)).sigmoid()
        return self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))


MACS = 4 * 3 * 9 * 64 + 4 * 9 * 16 + 4 * 5
# biases of conv and fc; two for each element into the norm; one for each into the ReLU
SLIMMING = MACS + 4 * 64 + 5 + 2 * 4 * 64 + 4 * 64


@pytest.mark.parametrize("batch", [1, 3])
def test_counts_by_hand(batch):
    found = fxprune.count(Small(), image(8, batch))
    parameters = 4 * 27 + 4 + 4 + 4 + 36 + 20 + 5
    assert (found.parameters, found.macs, found.slimming) == (parameters, MACS, SLIMMING)
    assert str(found) == f"{parameters} parameters, {MACS:,} MACs, {SLIMMING:,} slimming FLOPs"


@pytest.mark.parametrize("relu", [nn.ReLU(), nn.ReLU(inplace=True), F.relu, torch.relu_])
def test_every_spelling_of_relu_counts(relu):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.last = nn.Conv2d(3, 4, 1, bias=False), nn.Conv2d(4, 2, 1, bias=False)
            self.act = relu

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.act(self.conv(x)))

    found = fxprune.count(Net(), image(5))
    assert found.slimming - found.macs == 4 * 25


@pytest.mark.parametrize("act", [nn.ReLU6, nn.Hardswish, nn.Sigmoid, nn.LeakyReLU])
def test_other_activations_do_not(act):
    net = nn.Sequential(nn.Conv2d(3, 4, 1, bias=False), act(), nn.Conv2d(4, 2, 1, bias=False))
    found = fxprune.count(net, image(5))
    assert found.slimming == found.macs


def test_tied_parameters_count_once():
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x))

    found = fxprune.count(Tied(), torch.rand(2, 6))
    assert (found.parameters, found.macs) == (36 + 12, 72)


# -- beside torch's own counter, where the conventions agree ---------------------------------------


def torch_macs(model: nn.Module, x: Tensor) -> int:
    """Half of what torch counts: it takes a multiplication and an addition for two."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model.eval()(x)
    return counter.get_total_flops() // 2


NETWORKS = (
    "resnet18 mobilenet_v3_small densenet121 shufflenet_v2_x0_5 squeezenet1_1 efficientnet_b0 "
    "regnet_y_400mf vgg11 mnasnet0_5 resnext50_32x4d"
).split()


@pytest.mark.parametrize("name", NETWORKS)
def test_macs_agree_with_torch(name):
    model, x = getattr(torchvision.models, name)(num_classes=10), image()
    assert fxprune.count(model, x).macs == torch_macs(model, x)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small", "shufflenet_v2_x0_5"])
def test_macs_agree_with_torch_after_pruning(name):
    model, x = getattr(torchvision.models, name)(num_classes=10), image()
    pruned = fxprune.prune(model, x, rate=0.4, verify="shapes")
    found = fxprune.count(pruned, x)
    assert found.macs == torch_macs(pruned, x) == pruned.fxprune.report.macs[1]
    assert found.parameters == sum(p.numel() for p in pruned.parameters())


# -- a plan's cost, before anything is written -----------------------------------------------------

PLANS: dict[str, Any] = {
    "local": {"rate": 0.4},
    "scatter": {"recipe": "fpgm"},
    "global": {"scope": "global", "criterion": "bn_gamma", "rate": 0.3},
}


@pytest.mark.parametrize("name", PLANS)
@pytest.mark.parametrize("make", [models.resnet20, models.mobile_blnet])
def test_what_a_plan_will_cost_is_what_the_network_costs(make, name):
    model, x, options = make(), image(32), PLANS[name]
    analysis = fxprune.analyze(model, x, scatter=name == "scatter")
    plan = fxprune.plan(analysis, **options)
    pruned = fxprune.apply(model, plan, x, verify="shapes")
    assert fxprune.count(analysis, plan=plan) == fxprune.count(pruned, x)


def test_a_grouped_layer_costs_its_blocks():
    net = nn.Sequential(
        nn.Conv2d(3, 12, 1), nn.Conv2d(12, 12, 3, groups=3), nn.ReLU(), nn.Conv2d(12, 2, 1)
    )
    x = image(8)
    analysis = fxprune.analyze(net, x)
    plan = fxprune.plan(analysis, rate=0.5)
    pruned = fxprune.apply(net, plan, x)
    assert fxprune.count(analysis, plan=plan) == fxprune.count(pruned, x)


def test_a_plan_for_another_model_is_refused():
    plan = fxprune.plan(fxprune.analyze(models.resnet20(), image(32)), rate=0.3)
    with pytest.raises(fxprune.errors.PlanError, match="for another model"):
        fxprune.count(models.resnet32(), image(32), plan=plan)


def test_a_plan_knows_its_inputs_and_its_scatter():
    pruned = fxprune.prune(models.resnet20(), image(16), recipe="fpgm", verify="shapes")
    plan = pruned.fxprune.plan
    assert fxprune.count(models.resnet20(), plan=plan) == fxprune.count(pruned, image(16))
    with pytest.raises(fxprune.errors.OptionError, match="scatter=True"):
        fxprune.count(fxprune.analyze(models.resnet20(), image(16)), plan=plan)
    with pytest.raises(fxprune.errors.PlanError, match="a dict, not a Plan"):
        fxprune.count(models.resnet20(), plan={})  # type: ignore[arg-type]


def test_the_report_shows_what_an_edited_plan_keeps():
    model, x = models.resnet20(), image(16)
    plan = fxprune.plan(fxprune.analyze(model, x), only=["layer1.0.conv1"], rate=0.25)
    made = fxprune.Plan.from_json(plan.to_json())
    for name in ("layer1.0.conv1.weight", "layer1.0.conv2.weight"):
        for dim in made.kept[name]:
            made.kept[name][dim] = made.kept[name][dim][:5]
    for name in [n for n in made.kept if n.startswith("layer1.0.bn1")]:
        made.kept[name][0] = made.kept[name][0][:5]
    report = fxprune.apply(model, made, x).fxprune.report
    assert {row.name: row.kept for row in report.groups}["layer1.0.conv1"] == 5
