"""Step `score`: one number a channel, by a criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from .criteria import Criterion, Slices
from .errors import CriterionError, OptionError, nearest
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
    if reduce not in _REDUCTIONS:
        raise OptionError(
            f"reduce=`{reduce}` is not known",
            hint=nearest(reduce, _REDUCTIONS) or "mean, sum, max, first",
        )
    join = _REDUCTIONS[reduce]
    with torch.no_grad():
        return {
            i: _scores(group, Slices(group, tensors), name, criterion, join)
            for i, group in enumerate(groups.groups)
            if group.prunable
        }


def _scores(group: Group, slices: Slices, name: str, criterion: Criterion, join) -> np.ndarray:
    found = criterion(slices)
    per_layer = list(found) if isinstance(found, (list, tuple)) else [found]
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
