"""From a `Plan` back to the channels it keeps, for a model it was made for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from .analysis import Analysis
from .errors import PlanError
from .planning import kept_ids
from .plans import Kept, Plan


def kept_by_plan(analysis: Analysis, plan: Plan) -> Tensor:
    """The mask of kept ids a plan means; `PlanError` if it breaks a coupling of the model."""
    lines = [
        _line(analysis, param, dim, rows)
        for param, dims in plan.kept.items()
        for dim, rows in dims.items()
    ]
    kept = np.ones(int(analysis.all_groups.channel.max()) + 1, bool)
    for line in lines:
        for channels in line.channels:
            kept[channels] = False
    for line in lines:  # a channel stays if any of its slices does
        for channels in line.channels:
            kept[channels[line.mask]] = True
    kept[0] = True
    for line in lines:
        _check(line, kept)
    _check_unplanned(analysis, plan, kept)
    return kept_ids(analysis, kept)


def _check_unplanned(analysis: Analysis, plan: Plan, kept: np.ndarray) -> None:
    """What the plan does not name is whole, and so is everything coupled to it."""
    for param, slots in analysis.flow.ids.slots.items():
        for slot in slots:
            lost = not kept[analysis.all_groups.channel[slot.ids.numpy()]].all()
            if lost and slot.dim not in plan.kept.get(param, {}):
                raise PlanError(
                    f"the plan leaves out {param} dim {slot.dim}, coupled to what it narrows",
                    hint="coupled slices go together; fxprune.analyze(model).explain lists them",
                )


@dataclass(frozen=True)
class _Line:
    """One dim of one parameter: the channels of its indices (one array a layer), and what stays."""

    title: str
    channels: list[np.ndarray]
    mask: np.ndarray


def _line(analysis: Analysis, param: str, dim: int, rows: Kept) -> _Line:
    title = f"{param} dim {dim}"
    slots = [s for s in analysis.flow.ids.slots.get(param, ()) if s.dim == dim]
    if not slots:
        raise PlanError(f"the plan narrows {title}, which has no channels that can go")
    channels = [analysis.all_groups.channel[s.ids.numpy()] for s in slots]
    return _Line(title, channels, _mask(title, channels[0].shape, rows))


def _mask(title: str, shape: tuple[int, ...], rows: Kept) -> np.ndarray:
    """Kept indices as a mask; blocks that are left out whole have no list of their own."""
    nested = bool(rows) and isinstance(rows[0], list)
    if nested != (len(shape) == 2) or (nested and len(rows) != shape[0]):
        raise PlanError(f"the plan's indices of {title} do not have the layout of its blocks")
    if not rows or (nested and len({len(row) for row in rows if isinstance(row, list)}) > 1):
        raise PlanError(f"the plan keeps nothing of {title}, or blocks of different widths")
    mask = np.zeros(shape, bool)
    lists: Any = rows if nested else [rows]
    for line, indices in zip(mask.reshape(-1, shape[-1]), lists, strict=True):
        if indices != sorted(set(indices)) or (
            indices and not 0 <= indices[0] <= indices[-1] < shape[-1]
        ):
            raise PlanError(
                f"the plan's indices of {title} are not ascending and below {shape[-1]}"
            )
        line[indices] = True
    return mask


def _check(line: _Line, kept: np.ndarray) -> None:
    if (np.logical_and.reduce([kept[c] for c in line.channels]) == line.mask).all():
        return
    if any((c[~line.mask] == 0).any() for c in line.channels):
        raise PlanError(
            f"the plan removes channels of {line.title} that cannot go",
            hint="fxprune.analyze(model).frozen says why",
        )
    raise PlanError(
        f"the plan breaks the coupling of {line.title}",
        hint="coupled slices go together; fxprune.analyze(model).explain(layer) lists them",
    )
