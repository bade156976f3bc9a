"""Growing regularisation: which weights, how strongly, and that a resumed run ends the same."""

from __future__ import annotations

import copy
import io

import pytest
import torch
from test_group_lasso import Grouped, Plain, X, model_of
from torch import nn

import fxprune
from fxprune.errors import OptionError, PlanError

FAST = {"delta": 0.1, "every": 5, "ceiling": 2.0}


def train(model: nn.Module, optimizer, steps: int) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        (model(X) - 1).square().mean().backward()
        optimizer.step()


def numbers(model: nn.Module) -> int:
    return sum(param.numel() for param in model.parameters())


def sgd(model: nn.Module) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)


def test_the_strength_grows_in_steps_to_its_ceiling():
    model = model_of(Plain)
    plan = fxprune.plan(fxprune.analyze(model, X), rate=0.5)
    penalty = fxprune.GrowingPenalty(model, plan, delta=0.1, every=2, ceiling=0.25)
    found = []
    for _ in range(7):
        found.append(penalty.s)
        penalty.step()
    assert found == pytest.approx([0.1, 0.1, 0.2, 0.2, 0.25, 0.25, 0.25])
    assert penalty.done


@pytest.mark.parametrize("kind", [Plain, Grouped])
def test_penalised_is_what_the_plan_removes(kind):
    """All that is left when these weights are zero is what `apply` keeps."""
    model = model_of(kind)
    plan = fxprune.plan(fxprune.analyze(model, X), rate=0.5)
    penalty = fxprune.GrowingPenalty(model, plan)
    pruned = fxprune.apply(model, plan)
    assert len(penalty) == numbers(model) - numbers(pruned)


@pytest.mark.parametrize("kind", [Plain, Grouped])
def test_add_grad_is_the_gradient_of_the_loss(kind):
    model = model_of(kind)
    plan = fxprune.plan(fxprune.analyze(model, X), rate=0.5)
    other = copy.deepcopy(model)
    model(X).square().mean().backward()
    fxprune.GrowingPenalty(model, plan, delta=0.1).add_grad()
    (other(X).square().mean() + fxprune.GrowingPenalty(other, plan, delta=0.1).loss()).backward()
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.allclose(a.grad, b.grad, atol=1e-6)


def test_what_goes_is_near_zero_and_goes_unnoticed():
    model = model_of(Plain).eval()
    plan = fxprune.plan(fxprune.analyze(model, X), rate=0.5)
    penalty = fxprune.GrowingPenalty(model, plan, **FAST)
    optimizer = sgd(model)
    with penalty.attach(optimizer):
        train(model, optimizer, 200)
    assert penalty.done and penalty.value < 1e-6
    assert torch.allclose(fxprune.apply(model, plan)(X), model(X), atol=1e-4)


def test_prox_divides():
    model = model_of(Plain)
    plan = fxprune.plan(fxprune.analyze(model, X), rate=0.5)
    penalty = fxprune.GrowingPenalty(model, plan, delta=1.0)
    before = penalty.value
    penalty.prox(1.0)
    assert penalty.value == pytest.approx(before / 4)


def test_a_resumed_run_ends_bit_equal():
    whole, first = model_of(Plain), model_of(Plain)
    plan = fxprune.plan(fxprune.analyze(whole, X), rate=0.5)
    optimizer = sgd(whole)
    fxprune.GrowingPenalty(whole, plan, **FAST).attach(optimizer)
    train(whole, optimizer, 40)

    optimizer = sgd(first)
    penalty = fxprune.GrowingPenalty(first, plan, **FAST)
    penalty.attach(optimizer)
    train(first, optimizer, 13)
    file = io.BytesIO()
    states = [each.state_dict() for each in (first, optimizer, penalty)]
    torch.save(states, file)
    file.seek(0)
    states = torch.load(file, weights_only=True)

    second = model_of(Plain)
    optimizer = sgd(second)
    penalty = fxprune.GrowingPenalty(second, fxprune.Plan.from_json(plan.to_json()))
    for each, state in zip((second, optimizer, penalty), states, strict=True):
        each.load_state_dict(state)
    penalty.attach(optimizer)
    train(second, optimizer, 27)
    assert all(
        torch.equal(a, b) for a, b in zip(whole.parameters(), second.parameters(), strict=True)
    )


def test_errors():
    model = model_of(Plain)
    plan = fxprune.plan(fxprune.analyze(model, X), rate=0.5)
    with pytest.raises(PlanError, match="another model"):
        fxprune.GrowingPenalty(model_of(Grouped), plan)
    with pytest.raises(PlanError, match="removes no"):
        fxprune.GrowingPenalty(model, fxprune.plan(fxprune.analyze(model, X), rate=0.0))
    with pytest.raises(OptionError, match="plan is a"):
        fxprune.GrowingPenalty(model, "plan.json")
    with pytest.raises(OptionError, match="every"):
        fxprune.GrowingPenalty(model, plan, every=0)
    with pytest.raises(OptionError, match="no state"):
        fxprune.GrowingPenalty(model, plan).load_state_dict({"count": 1})


def test_the_strength_of_a_short_run_is_there_after_fifty_updates():
    model = model_of(Plain)
    plan = fxprune.plan(fxprune.analyze(model, X), rate=0.5)
    penalty = fxprune.GrowingPenalty(model, plan, delta=0.02, every=1)
    for _ in range(49):
        assert not penalty.done
        penalty.step()
    assert penalty.done and "delta=0.02, every=1" in fxprune.GrowingPenalty.__doc__
