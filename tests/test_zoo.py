"""torchvision's CNNs, pruned by half and checked as benchmarks/torchvision_table.py does it.

A spread of architectures on small images runs always; all others run with ``-m zoo``.
"""

from __future__ import annotations

import copy
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

pytest.importorskip("torchvision")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import fxprune
from benchmarks import common, prune_time
from benchmarks import torchvision_table as table

SMALL = {
    "resnet18": (2, 3, 64, 64),
    "mobilenet_v2": (2, 3, 64, 64),
    "mobilenet_v3_small": (2, 3, 64, 64),
    "shufflenet_v2_x0_5": (2, 3, 64, 64),
    "squeezenet1_1": (2, 3, 64, 64),
    "densenet121": (2, 3, 64, 64),
    "googlenet": (2, 3, 64, 64),
    "regnet_y_400mf": (2, 3, 64, 64),
    "efficientnet_b0": (2, 3, 64, 64),
    "convnext_tiny": (2, 3, 64, 64),
    "lraspp_mobilenet_v3_large": (2, 3, 64, 64),
    "r3d_18": (2, 3, 4, 32, 32),
    "quantized_shufflenet_v2_x0_5": (2, 3, 64, 64),
}


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", SMALL)
def test_pruned_by_half_on_small_images(name):
    result = table.check(name, torch.randn(SMALL[name]))
    assert not result.problems
    assert result.loss[1] < result.loss[0]


@pytest.mark.zoo
@pytest.mark.parametrize("name", [n for n in common.torchvision_cnns() if n not in SMALL])
def test_pruned_by_half_on_the_default_input(name):
    result = table.measured(name, limit=900)
    assert not result.problems


def independent(model: nn.Module) -> int:
    """How many classes of channels may go, each without another."""
    found = fxprune.analyze(model, torch.zeros(1, 3, 64, 64))
    return sum(len(group) for group in found.groups if group.prunable)


def test_shuffles_leave_every_channel_free(monkeypatch):
    """Each of the 2,944 channels that convolutions make is a class of its own. With equal positions
    kept in both halves of every shuffle, several shuffles in a row leave 2,080 classes."""
    model = common.torchvision_model("shufflenet_v2_x0_5")
    made = [m for m in model.modules() if isinstance(m, nn.Conv2d) and m.groups == 1]
    assert independent(model) == sum(m.out_channels for m in made) == 2944
    monkeypatch.setattr("fxprune.flow.reshape.find_gather", lambda *call: None)
    assert independent(model) == 2080


# -- the checks notice what they are for -----------------------------------------------------------


@pytest.fixture(scope="module")
def sound() -> table.Case:
    case = table.prepared(table.Result("shufflenet_v2_x0_5"), torch.randn(2, 3, 64, 64))
    table.verification(case)
    return case


def tampered(case: table.Case) -> table.Case:
    """The case with a copy of its pruned network and a result of its own."""
    return table.Case(
        case.model,
        copy.deepcopy(case.pruned),
        case.x,
        table.Result(case.result.name, reference="masked"),
    )


def test_swapped_channels_are_noticed(sound):
    case = tampered(sound)
    with torch.no_grad():
        weight = case.pruned.get_parameter("fc.weight")
        weight[:, [0, 1]] = weight[:, [1, 0]].clone()
    with pytest.raises(table.Failed, match=r"fc\.weight is not a slice"):
        table.slices(case)
    case.result.params = sound.result.params
    with pytest.raises(table.Failed, match="differs by"):
        table.masked(case)


def test_norms_that_forget_to_train_are_noticed(sound):
    case = tampered(sound)
    norm = next(m for m in case.pruned.modules() if isinstance(m, nn.BatchNorm2d))
    norm.forward = lambda x: nn.functional.batch_norm(x, norm.running_mean, norm.running_var)
    with pytest.raises(table.Failed, match=r"1 of \d+ normalisations do not move"):
        table.modes(case)


def test_a_parameter_cut_off_from_the_loss_is_noticed(sound):
    case = tampered(sound)
    case.pruned.get_parameter("conv1.0.weight").requires_grad_(False)
    with pytest.raises(table.Failed, match=r"no gradient: conv1\.0\.weight"):
        table.trains(case)


def test_what_was_not_pruned_is_noticed(sound):
    case = tampered(sound)
    case.pruned = fxprune.prune(case.model, case.x, rate=0.1, verify=False)
    case.result.params = case.pruned.fxprune.report.params
    with pytest.raises(table.Failed, match="of the parameters are left"):
        table.size(case)


def test_a_constant_output_proves_nothing(sound):
    case = tampered(sound)
    with torch.no_grad():
        case.pruned.get_parameter("fc.weight").zero_()
    with pytest.raises(table.Failed, match="does not depend on the input"):
        table.masked(case)


def test_a_broken_network_is_a_problem_not_an_exception(monkeypatch):
    monkeypatch.setattr(common, "torchvision_model", lambda name: nn.Linear(3, 3))
    result = table.check("no such network")
    assert len(result.problems) == 1 and result.problems[0].startswith("prune: NothingToPrune")


def test_blocks_are_sliced_block_by_block():
    weight = torch.arange(24.0).view(4, 3, 2)
    got = table.sliced(weight, {0: [0, 1, 2, 3], 1: [[0, 2], [1, 2]]})
    assert torch.equal(got, torch.stack([*weight[:2, [0, 2]], *weight[2:, [1, 2]]]))


# -- the clock -------------------------------------------------------------------------------------


def test_growth_is_fitted():
    assert prune_time.fitted([10, 20, 40], [3.0, 12.0, 48.0]) == "2.00"


@pytest.mark.parametrize("kind, per", [("residual blocks", 7), ("dense layers", 7)])
def test_growing_networks_grow_and_are_pruned(kind, per):
    small, large = (prune_time.sized(f"{kind}/{count}") for count in (4, 8))
    assert large["nodes"] - small["nodes"] == 4 * per
    assert large["elements"] > small["elements"]
    model, x = prune_time.network(f"{kind}/4")
    analysis, total, left = prune_time.ours(model, x)
    assert 0 < analysis < total
    assert left < 0.5 * small["elements"]


def test_both_tools_leave_the_same_number_of_parameters():
    pytest.importorskip("torch_pruning")
    model, x = prune_time.network("residual blocks/4")
    own = prune_time.ours(copy.deepcopy(model), x)
    assert own[2] == prune_time.theirs(copy.deepcopy(model), x)[2]
