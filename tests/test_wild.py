"""Whole networks as they are published, small: pruned exactly, trained, pruned again.

Exactness is judged by `zoo_small`, which knows nothing of fxprune but the kept indices in the plan.
"""

from __future__ import annotations

import functools
import warnings
from typing import Any

import pytest
import torch
from torch import nn
from wild import WILD, Wild
from zoo_small import assert_exact, leaves, run, widths

import fxprune


@functools.cache
def pruned_half(name: str) -> tuple[nn.Module, Any]:
    """The network, and half of it: exact, without a warning."""
    case = WILD[name]
    model = case.build()
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return model, exact(case, model)


def exact(case: Wild, model: nn.Module) -> Any:
    kwargs = case.kwargs() or None
    return assert_exact(
        model, case.args(), 0.5, kwargs, oracle=case.oracle, mixing=case.mixing, strict=True
    )


@pytest.mark.parametrize("name", WILD)
def test_half_goes_exactly_and_everything_can_go_but_what_must_stay(name):
    case = WILD[name]
    _, pruned = pruned_half(name)
    report = pruned.fxprune.report
    assert all(case.warns and case.warns in text for text in report.warnings), report.warnings
    found = widths(pruned)
    assert {key: found.get(key) for key in case.half} == case.half
    example = case.args() if not case.keywords else case.kwargs()
    analysis = fxprune.analyze(case.build(), example, mixing=case.mixing)
    frozen = [g for g in analysis.groups if g.frozen and is_of_a_layer(g)]
    assert sum(map(len, frozen)) == case.stays, frozen
    assert case.why in "\n".join(g.frozen.reason for g in frozen)


def is_of_a_layer(group: Any) -> bool:
    """Whether a layer makes or reads a group; other dims are of bare parameters, as kernels are."""
    return any(member.role != "free" for member in group.members)


@pytest.mark.parametrize("name", WILD)
def test_outputs_keep_their_structure(name):
    case = WILD[name]
    model, pruned = pruned_half(name)
    assert same_nest(*(run(m, case.args(), case.kwargs()) for m in (model, pruned)))


def same_nest(a: Any, b: Any) -> bool:
    """Whether two nests have the same containers with tensors of the same shapes."""
    if isinstance(a, torch.Tensor):
        return a.shape == b.shape and a.dtype == b.dtype
    if type(a) is not type(b):
        return False
    if isinstance(a, dict):
        return list(a) == list(b) and all(same_nest(a[key], b[key]) for key in a)
    if isinstance(a, (tuple, list)):
        return len(a) == len(b) and all(map(same_nest, a, b))
    if hasattr(a, "__dict__"):
        return same_nest(vars(a), vars(b))
    return bool(a == b)


@pytest.mark.parametrize("name", [name for name, case in WILD.items() if case.trains])
def test_a_step_of_training_makes_the_loss_smaller(name):
    case = WILD[name]
    _, pruned = pruned_half(name)
    example = case.kwargs() if case.keywords else case.args()
    small = fxprune.apply(case.build(), pruned.fxprune.plan, example, verify=False).train()
    before = loss(small, case)
    before.backward()
    learned = {k for k, p in small.named_parameters() if p.grad is not None}
    assert learned == with_gradient(case) & set(dict(small.named_parameters()))
    assert torch.isfinite(before) and any(
        loss_after_a_step(small, case, rate) < before for rate in (1e-2, 1e-3, 1e-4, 1e-6)
    )


def loss(model: nn.Module, case: Wild) -> torch.Tensor:
    torch.manual_seed(0)
    outputs = [t for t in leaves(model(*case.args(), **case.kwargs())) if t.is_floating_point()]
    return sum(((t - 0.3) ** 2).mean() for t in outputs if t.requires_grad)


def with_gradient(case: Wild) -> set[str]:
    """The parameters that the original trains: those that its outputs depend on."""
    again = case.build()
    loss(again, case).backward()
    return {k for k, p in again.named_parameters() if p.grad is not None}


def loss_after_a_step(model: nn.Module, case: Wild, rate: float) -> torch.Tensor:
    state = {k: v.clone() for k, v in model.state_dict().items()}
    with torch.no_grad():
        for p in model.parameters():
            if p.grad is not None:
                p -= rate * p.grad
        found = loss_without_grad(model, case)
        model.load_state_dict(state)
    return found


def loss_without_grad(model: nn.Module, case: Wild) -> torch.Tensor:
    torch.manual_seed(0)
    with torch.enable_grad():
        return loss(model, case).detach()


@pytest.mark.parametrize("name", WILD)
def test_what_was_pruned_is_pruned_again(name):
    case = WILD[name]
    _, pruned = pruned_half(name)
    again = exact(case, pruned)
    assert again.fxprune.plan.removed
