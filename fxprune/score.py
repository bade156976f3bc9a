"""Step `score`: one number a channel, by a criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .check import check_choice
from .criteria import Criterion, Slices
from .errors import CriterionError
from .groups import Group, Groups

Reduce = Literal["mean", "sum", "max", "first"]

_REDUCTIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "mean": lambda scores: scores.mean(0),
    "sum": lambda scores: scores.sum(0),
    "max": lambda scores: scores.amax(0),
    "first": lambda scores: scores[0],
}


def score(
    groups: Groups,
    tensors: Mapping[str, Tensor],
    name: str,
    criterion: Criterion,
    *,
    reduce: Reduce = "mean",
) -> dict[int, np.ndarray]:
    """Scores of each prunable group, by its place in ``groups.groups``; float64, higher stays.

    `tensors` are the model's parameters and buffers by name; `reduce` joins the scores of coupled
    layers. Raises `CriterionError` where the criterion does not give one finite number a channel.
    """
    check_choice("reduce", reduce, tuple(_REDUCTIONS))
    join = _REDUCTIONS[reduce]
    with torch.no_grad():
        return {
            i: _scores(group, Slices(group, tensors), name, criterion, join)
            for i, group in enumerate(groups.groups)
            if group.prunable
        }


def _scores(group: Group, slices: Slices, name: str, criterion: Criterion, join) -> np.ndarray:
    try:
        found = criterion(slices)
    except Exception as error:
        raise CriterionError(
            f"criterion `{name}` fails on group {group.name}: {type(error).__name__}: {error}",
            details=[("members", ", ".join(f"{m.param}[{m.dim}]" for m in group.members[:4]))],
            hint="it gets a group's Slices: .filters, .scales, .layers, .consumers, len(group)",
        ) from error
    per_layer = list(found) if isinstance(found, (list, tuple)) else [found]
    if not per_layer:
        raise CriterionError(
            f"criterion `{name}` gave no scores for group {group.name}",
            hint="return one score a channel; group.scales is empty where nothing normalises",
        )
    for each in per_layer:
        if not isinstance(each, Tensor) or tuple(each.shape) != (len(group),):
            got = tuple(each.shape) if isinstance(each, Tensor) else type(each).__name__
            raise CriterionError(
                f"criterion `{name}` gave {got} for group {group.name} of {len(group)} channels",
                hint=f"return one score a channel: shape ({len(group)},), or a list of those",
            )
    joined = join(torch.stack([each.double().cpu() for each in per_layer])).numpy()
    if not np.isfinite(joined).all():
        bad = int(np.flatnonzero(~np.isfinite(joined))[0])
        raise CriterionError(
            f"criterion `{name}` gave {joined[bad]} for channel {bad} of group {group.name}",
            hint="look for NaN or infinite weights, or a division by zero in the criterion",
        )
    return joined
