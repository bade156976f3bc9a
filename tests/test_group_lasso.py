"""Group lasso: by hand, by autograd, its prox, and whole channels that fall to zero."""

from __future__ import annotations

import copy
import math

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune.errors import OptionError

X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(1))
S, LR = 0.01, 0.1


class Plain(nn.Module):
    """One group of four channels: a filter, a bias, a scale and a shift, and what reads them."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.bn, self.b = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Conv2d(4, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.b(self.bn(self.a(x)).relu()).mean((2, 3))


class Grouped(nn.Module):
    """A residual stream (out and in of one weight), and a grouped layer's blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.mid = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
        self.grouped, self.head = nn.Conv2d(8, 12, 3, groups=2), nn.Linear(12, 2)

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x).relu()
        return self.head(self.grouped(x + self.mid(x)).relu().mean((2, 3)))


def model_of(kind: type[nn.Module]) -> nn.Module:
    torch.manual_seed(0)
    return kind()


def by_hand(model: Plain) -> list[Tensor]:
    """The coupled vector of each channel."""
    return [
        torch.cat(
            [
                model.a.weight[c].reshape(-1),
                model.b.weight[:, c].reshape(-1),
                torch.stack([model.a.bias[c], model.bn.weight[c], model.bn.bias[c]]),
            ]
        )
        for c in range(4)
    ]


def test_the_loss_is_that_of_hand():
    model = model_of(Plain)
    penalty = fxprune.GroupLasso(model, S, example_inputs=X)
    expected = S * sum(math.sqrt(27 + 2 + 3) * vector.norm() for vector in by_hand(model))
    assert torch.allclose(penalty.loss(), expected)
    assert penalty.value == pytest.approx(float(expected.detach()) / S)
    assert len(penalty) == 4


@pytest.mark.parametrize("kind", [Plain, Grouped])
def test_add_grad_is_the_gradient_of_the_loss(kind):
    model = model_of(kind)
    with torch.no_grad():
        first = next(model.children())
        first.weight[1], first.bias[1] = 0, 0
    other = copy.deepcopy(model)
    model(X).square().mean().backward()
    fxprune.GroupLasso(model, S, example_inputs=X).add_grad()
    (other(X).square().mean() + fxprune.GroupLasso(other, S, example_inputs=X).loss()).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_a_channel_of_zeros_has_a_finite_gradient():
    model = model_of(Plain)
    with torch.no_grad():
        for tensor in (model.a.weight, model.a.bias, model.bn.weight, model.bn.bias):
            tensor[2] = 0
        model.b.weight[:, 2] = 0
    fxprune.GroupLasso(model, S, example_inputs=X).loss().backward()
    assert all(torch.isfinite(p.grad).all() for p in model.parameters() if p.grad is not None)
    assert not model.a.weight.grad[2].any()


def test_prox_shrinks_the_whole_vector():
    model = model_of(Plain)
    before = [vector.detach().clone() for vector in by_hand(model)]
    kept = model.b.bias.detach().clone()
    fxprune.GroupLasso(model, S, example_inputs=X).prox(LR)
    for old, new in zip(before, by_hand(model), strict=True):
        assert torch.allclose(new, old * max(0, 1 - LR * S * math.sqrt(32) / float(old.norm())))
    assert torch.equal(model.b.bias, kept)


@pytest.mark.parametrize("kind", [Plain, Grouped])
def test_a_long_prox_gives_exact_zeros(kind):
    model = model_of(kind)
    penalty = fxprune.GroupLasso(model, 1.0, example_inputs=X)
    penalty.prox(1e3)
    assert penalty.value == 0
    assert all(not norms.any() for norms in penalty.norms().values())


def test_adam_gets_the_prox():
    model = model_of(Plain)
    penalty = fxprune.GroupLasso(model, S, example_inputs=X)
    assert penalty.attach(torch.optim.Adam(model.parameters())).how == "prox"


def test_attached_whole_channels_fall_and_go_unnoticed():
    model = model_of(Plain).eval()
    weak = [0, 2]
    with torch.no_grad():
        for tensor in (model.a.weight, model.a.bias, model.bn.weight, model.bn.bias):
            tensor[weak] *= 0.1
        model.b.weight[:, weak] *= 0.1
    chosen = torch.optim.SGD(model.parameters(), lr=0.05)
    penalty = fxprune.GroupLasso(model, 0.05, example_inputs=X)
    with penalty.attach(chosen, "prox"):
        for _ in range(60):
            chosen.zero_grad()
            (model(X) - 1).square().mean().backward()
            chosen.step()
    (norms,) = penalty.norms().values()
    assert penalty.count == 60
    assert (norms == 0).nonzero().flatten().tolist() == weak
    pruned = fxprune.prune(model, X, criterion="l2", rate=0.5)
    assert torch.allclose(pruned(X), model(X), atol=1e-6)


def test_attach_counts_and_penalises_once():
    model = model_of(Plain)
    optimizer = torch.optim.SGD(model.parameters(), lr=LR)
    penalty = fxprune.GroupLasso(model, S, example_inputs=X)
    other = copy.deepcopy(model)
    plain = torch.optim.SGD(other.parameters(), lr=LR)
    model(X).square().mean().backward()
    (other(X).square().mean() + fxprune.GroupLasso(other, S, example_inputs=X).loss()).backward()
    penalty.attach(optimizer)
    optimizer.step(), plain.step()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a, b, atol=1e-7)
    with pytest.raises(OptionError, match="twice"):
        penalty.loss()


def test_frozen_parameters_are_left_alone():
    model = model_of(Plain)
    model.a.weight.requires_grad_(False)
    before = model.a.weight.clone()
    fxprune.GroupLasso(model, 1.0, example_inputs=X).prox(1e3)
    assert torch.equal(model.a.weight, before) and not model.bn.weight.any()


def test_errors():
    model = model_of(Plain)
    with pytest.raises(OptionError, match="only"):
        fxprune.GroupLasso(model, S, example_inputs=X, ignore=["a"])
    with pytest.raises(OptionError, match="no channel"):
        fxprune.GroupLasso(nn.Sequential(nn.Linear(3, 2)), S, example_inputs=torch.rand(2, 3))
    with pytest.raises(OptionError, match="s=-1"):
        fxprune.GroupLasso(model, -1)
