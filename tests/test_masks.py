"""Masks of torch.nn.utils.prune become slices: the same outputs, and nothing more goes."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import fxprune
from fxprune import check, masks
from fxprune.errors import OptionError

X = torch.rand(2, 3, 8, 8)


class Net(nn.Module):
    """Two coupled convolutions without biases, one with, a norm, a head."""

    def __init__(self, norm: bool = False, bias: bool = False):
        super().__init__()
        self.stem = nn.Conv2d(3, 12, 3, padding=1, bias=bias)
        self.norm = nn.BatchNorm2d(12) if norm else nn.Identity()
        self.left, self.right = nn.Conv2d(12, 8, 1, bias=bias), nn.Conv2d(12, 8, 1, bias=bias)
        self.head = nn.Linear(8 * 64, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = torch.relu(self.left(x) + self.right(x))
        return self.head(x.view(-1, 8 * 64))


def outputs(model: nn.Module, x: torch.Tensor = X) -> torch.Tensor:
    with torch.no_grad():
        return copy.deepcopy(check.clone(model)).double().eval()(x.double())


def same(masked: nn.Module, pruned: nn.Module, x: torch.Tensor = X) -> bool:
    with torch.no_grad():
        found = copy.deepcopy(pruned).double().eval()(x.double())
    return torch.allclose(outputs(masked, x), found, atol=1e-12)


def settled(model: nn.Module) -> nn.Module:
    made = check.clone(model)
    masks._settle(made)
    return made


def test_filters_of_zeros_go():
    model = Net()
    prune.ln_structured(model.stem, "weight", amount=5, n=2, dim=0)
    before = {name: t.clone() for name, t in model.state_dict().items()}
    pruned = fxprune.from_masks(model, X)
    assert pruned.stem.out_channels == 7 and pruned.left.in_channels == 7
    assert same(settled(model), pruned)
    assert model.state_dict().keys() == before.keys() and prune.is_pruned(model)
    assert all(torch.equal(t, model.state_dict()[name]) for name, t in before.items())
    assert not prune.is_pruned(pruned) and "stem.weight" in pruned.state_dict()


def test_coupled_filters_go_where_both_are_zero():
    model = Net()
    mask = torch.ones(8, 12, 1, 1)
    mask[:3] = 0
    prune.custom_from_mask(model.left, "weight", mask)
    assert fxprune.from_masks(model, X).left.out_channels == 8  # right's filters are alive
    other = torch.ones(8, 12, 1, 1)
    other[1:5] = 0
    prune.custom_from_mask(model.right, "weight", other)
    pruned = fxprune.from_masks(model, X)
    assert pruned.left.out_channels == pruned.right.out_channels == 6
    assert same(settled(model), pruned)


def test_a_channel_that_no_one_reads_goes():
    """Whatever makes it, biases and norms included."""
    model = Net(norm=True, bias=True)
    for layer in (model.left, model.right):
        prune.ln_structured(layer, "weight", amount=4, n=1, dim=1)
        layer.weight_mask.copy_(model.left.weight_mask)
        layer.weight = layer.weight_orig * layer.weight_mask
    pruned = fxprune.from_masks(model, X)
    assert pruned.stem.out_channels == 8 and pruned.norm.num_features == 8
    assert same(settled(model), pruned)


@pytest.mark.parametrize("norm", [False, True])
def test_a_bias_or_a_norm_keeps_a_channel_alive(norm):
    model = Net(norm=norm, bias=not norm)
    if norm:
        nn.init.uniform_(model.norm.bias, 0.1, 1.0)
    prune.ln_structured(model.stem, "weight", amount=5, n=2, dim=0)
    pruned = fxprune.from_masks(model, X)
    assert pruned.stem.out_channels == 12 and same(settled(model), pruned)
    told = str(pruned.fxprune.report)
    assert "5 channels of zeros stay: a bias, a norm or an op makes them constants" in told
    dropped = fxprune.from_masks(model, X, constants="drop")
    assert dropped.stem.out_channels == 7 and not same(settled(model), dropped)


@pytest.mark.parametrize("norm", [False, True])
def test_biases_and_norms_may_be_masked_too(norm):
    model = Net(norm=norm, bias=not norm)
    prune.ln_structured(model.stem, "weight", amount=5, n=2, dim=0)
    off = (model.stem.weight_mask.flatten(1).sum(1) == 0).nonzero().flatten()
    for layer, name in (
        [(model.norm, "weight"), (model.norm, "bias")] if norm else [(model.stem, "bias")]
    ):
        mask = torch.ones(12)
        mask[off] = 0
        prune.custom_from_mask(layer, name, mask)
    pruned = fxprune.from_masks(model, X)
    assert pruned.stem.out_channels == 7 and same(settled(model), pruned)


def test_an_op_that_makes_something_of_zero_keeps_a_channel():
    class Gated(Net):
        def forward(self, x):
            x = torch.sigmoid(self.stem(x))
            return self.head(torch.relu(self.left(x) + self.right(x)).view(-1, 8 * 64))

    model = Gated()
    prune.ln_structured(model.stem, "weight", amount=5, n=2, dim=0)
    pruned = fxprune.from_masks(model, X)
    assert pruned.stem.out_channels == 12 and same(settled(model), pruned)


def test_zeros_count_in_a_norm_over_channels():
    model = nn.Sequential(
        nn.Conv2d(3, 12, 1, bias=False), nn.GroupNorm(1, 12, affine=False), nn.Conv2d(12, 4, 1)
    )
    prune.ln_structured(model[0], "weight", amount=5, n=2, dim=0)
    pruned = fxprune.from_masks(model, X)
    assert pruned.get_submodule("0").out_channels == 12 and same(settled(model), pruned)


def test_other_masks_are_applied_for_good():
    model = Net()
    prune.random_unstructured(model.left, "weight", amount=0.6)
    pruned = fxprune.from_masks(model, X)
    assert (pruned.left.weight == 0).float().mean() == pytest.approx(0.6, abs=0.02)
    assert same(settled(model), pruned)


def test_masks_of_ones_own():
    model = Net()
    mask = torch.ones(12, 3, 3, 3)
    mask[[2, 5]] = 0
    pruned = fxprune.from_masks(model, X, masks={"stem.weight": mask})
    assert pruned.stem.out_channels == 10
    assert torch.equal(
        pruned.stem.weight, model.stem.weight[[i for i in range(12) if i not in (2, 5)]]
    )
    for given, told in [
        ({"stem.wait": mask}, "no parameter"),
        ({"stem.weight": mask[:3]}, "not \\[12"),
        ({"stem.weight": mask * 0.5}, "more than 0 and 1"),
        ({"stem.weight": mask * float("nan")}, "more than 0 and 1"),
        ([mask], "masks is a list"),
    ]:
        with pytest.raises(OptionError, match=told):
            fxprune.from_masks(model, X, masks=given)


def test_blocks_keep_equal_counts_and_groups_keep_one():
    model = nn.Sequential(
        nn.Conv2d(3, 8, 1, bias=False), nn.Conv2d(8, 8, 3, groups=2, bias=False), nn.Conv2d(8, 4, 1)
    )
    mask = torch.ones(8, 3, 1, 1)
    mask[:3] = 0  # three of the first block, one of the second
    mask[7] = 0
    pruned = fxprune.from_masks(model, X, masks={"0.weight": mask})
    assert pruned.get_submodule("0").out_channels == 6
    nothing = {"0.weight": torch.zeros(8, 3, 1, 1)}
    assert fxprune.from_masks(model, X, masks=nothing).get_submodule("0").out_channels == 2


def test_resnet_with_masked_norms():
    model = torchvision.models.resnet18().eval()
    for block in (model.layer1[0], model.layer2[1]):
        prune.ln_structured(block.conv1, "weight", amount=0.5, n=2, dim=0)
        off = block.conv1.weight_mask.flatten(1).sum(1) == 0
        for name in ("weight", "bias"):
            prune.custom_from_mask(block.bn1, name, (~off).float())
    x = torch.rand(1, 3, 64, 64)
    pruned = fxprune.from_masks(model, x)
    assert pruned.get_submodule("layer1.0").conv1.out_channels == 32
    assert pruned.get_submodule("layer2.1").conv1.out_channels == 64
    assert same(settled(model), pruned, x)
