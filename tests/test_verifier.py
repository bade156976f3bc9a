"""What a verification sees: signals that fade must not hide a network that is wired wrongly."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import VerificationError

torch.set_num_threads(1)
X = torch.rand(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def fading(layers: int = 12) -> nn.Sequential:
    """Every layer leaves a hundredth of what it is given, and adds a bias."""
    torch.manual_seed(0)
    widths = [3, *[8] * layers]
    found: list[nn.Module] = []
    for ins, outs in pairwise(widths):
        layer = nn.Conv2d(ins, outs, 3, padding=1)
        with torch.no_grad():
            layer.weight.mul_(0.01)
        found += [layer, nn.ReLU()]
    return nn.Sequential(*found, nn.Flatten(), nn.Linear(8 * 64, 4)).eval()


def scrambled(pruned: nn.Module, name: str) -> nn.Module:
    with torch.no_grad():
        weight = pruned.get_submodule(name).weight
        weight.copy_(weight.flip(0))
    return pruned


def moved(model: nn.Module) -> float:
    x = X.double()
    first, other = model(x), model(torch.rand_like(x))
    return float(((first - other).abs().max() / first.abs().max()).detach())


def test_a_faded_signal_is_made_louder():
    model = fading()
    assert moved(model.double()) < 1e-9
    pruned = fxprune.prune(model.float(), X, rate=0.5)
    found = pruned.fxprune.report.verification
    assert found.note == "with weights scaled up, as signals fade in this network"
    assert str(found).endswith(found.note) and found.difference < 1e-12


def test_a_wrong_layer_is_found_behind_layers_that_fade():
    model = fading()
    pruned = fxprune.prune(model, X, rate=0.5)
    with pytest.raises(VerificationError, match="differs from the masked original"):
        fxprune.verify(model, scrambled(pruned, "2"), pruned.fxprune.plan)


def test_a_network_that_ignores_its_input_is_said_to():
    class Deaf(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x * 0))

    found = fxprune.prune(Deaf(), X, rate=0.5).fxprune.report.verification
    assert "hardly depend on the input" in str(found)


def test_an_example_of_zeros_is_an_example():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    assert not fxprune.prune(model, X * 0, rate=0.5).fxprune.report.verification.note


def test_a_network_that_hears_is_compared_as_it_is():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 2, 3))
    assert not fxprune.prune(model, X, rate=0.5).fxprune.report.verification.note


@pytest.mark.parametrize("name", ["mobilenet_v3_small", "efficientnet_b0", "mnasnet0_5"])
def test_fresh_torchvision_networks_that_fade(name):
    import torchvision

    model = getattr(torchvision.models, name)(num_classes=5).eval()
    pruned = fxprune.prune(model, torch.rand(1, 3, 32, 32), rate=0.4)
    found = pruned.fxprune.report.verification
    assert "scaled up" in found.note and found.difference < 1e-9


def test_keywords_in_another_order_than_forwards():
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 6), nn.Linear(4, 6), nn.Linear(6, 2)

        def forward(self, x: Tensor, y: Tensor) -> Tensor:
            return self.c(self.a(x) + self.b(y))

    inputs = {"y": torch.rand(2, 4), "x": torch.rand(2, 3)}
    pruned = fxprune.prune(Two(), inputs, rate=0.5)
    assert pruned(**inputs).shape == (2, 2)
    assert pruned.fxprune.report.verification.difference < 1e-12
