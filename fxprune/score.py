"""Step `score`: one number a channel, by a criterion."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from .calibration import Calibration
from .check import check_choice
from .criteria import Criterion, Slices
from .errors import CriterionError
from .groups import Groups

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
    criterion: Criterion,
    *,
    reduce: Reduce = "mean",
    keep: Mapping[int, int] | None = None,
    calibration: Calibration | None = None,
) -> dict[int, np.ndarray]:
    """Scores of each prunable group, by its place in ``groups.groups``; float64, higher stays.

    `tensors` are the model's parameters and buffers by name; `reduce` joins the scores of coupled
    layers. A set criterion is asked for ``keep[i]`` channels of group i: those score 1, others 0.
    `calibration` is what data said, for criteria that need it.
    Raises `CriterionError` where the criterion does not give one finite number a channel, or not
    the channels it was asked for.
    """
    check_choice("reduce", reduce, tuple(_REDUCTIONS))
    join = _REDUCTIONS[reduce]
    found = {}
    with torch.no_grad():
        for i, group in enumerate(groups.groups):
            if group.prunable:
                slices = Slices(group, tensors, calibration)
                count = (keep or {}).get(i, len(group))
                chosen = criterion.kind == "set"
                found[i] = (
                    _as_scores(slices, criterion, count)
                    if chosen
                    else _scores(slices, criterion, join)
                )
    return found


def _as_scores(slices: Slices, criterion: Criterion, keep: int) -> np.ndarray:
    size = len(slices)
    if keep >= size:
        return np.ones(size)
    found = _asked(slices, criterion, keep)
    indices = _indices(found)
    inside = len(indices) == keep and 0 <= indices.min() <= indices.max() < size
    if not inside or len(np.unique(indices)) != keep:
        raise CriterionError(
            f"criterion `{criterion}` did not give {keep} different channels of group "
            f"{slices.group.name}, which has {size}",
            hint="a set criterion returns the indices of the channels to keep",
        )
    scores = np.zeros(size)
    scores[indices] = 1
    return scores


def _indices(found: Any) -> np.ndarray:
    """What a set criterion returned as an array of indices; empty if it is none."""
    none = np.zeros(0, np.int64)
    try:
        tensor = torch.as_tensor(found)
    except (TypeError, ValueError, RuntimeError):
        return none
    whole = tensor.ndim == 1 and not tensor.is_floating_point() and not tensor.is_complex()
    return tensor.cpu().numpy() if whole and tensor.dtype != torch.bool else none


def _asked(slices: Slices, criterion: Criterion, *keep: int) -> Any:
    """What the criterion says; its own exceptions as `CriterionError`."""
    group = slices.group
    try:
        return criterion(slices, *keep)
    except Exception as error:
        raise CriterionError(
            f"criterion `{criterion}` fails on group {group.name}: {type(error).__name__}: {error}",
            details=[("members", ", ".join(f"{m.param}[{m.dim}]" for m in group.members[:4]))],
            hint="it gets a group's Slices: .filters, .scales, .layers, .consumers, len(group)",
        ) from error


def _scores(slices: Slices, criterion: Criterion, join: Callable[[Tensor], Tensor]) -> np.ndarray:
    found, group, name = _asked(slices, criterion), slices.group, str(criterion)
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
