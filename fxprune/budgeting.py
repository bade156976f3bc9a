"""The selection for a budget: by a knapsack, or by the rate that just meets it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from .analysis import Analysis
from .select import Options, Selection, families, select
from .settings import Settings
from .targets import CLOSE, Budget, Reached, budget

Scores = Callable[[Options], dict[int, np.ndarray]]
Following = Callable[[Selection, Options], tuple[Selection, dict[int, np.ndarray]]]
_TRIES, _HALVINGS = 6, 16


@dataclass
class Chosen:
    """A selection, the scores and the options it was made with, and what came of the budget."""

    selection: Selection
    scores: Mapping[int, np.ndarray]
    options: Options
    reached: tuple[Reached, ...] = ()


def choose(
    analysis: Analysis,
    scores: Scores,
    options: Options,
    chosen: Settings,
    following: Following | None = None,
    table: Any = None,
) -> Chosen:
    """What stays. `following` narrows layers that follow others, after each selection; `table` is
    that of latencies, where a target is one."""
    maker = _Maker(analysis, scores, following)
    if chosen.target is None:
        return maker.made(options)
    goal = budget(analysis, chosen.target, table)
    if options.rule == "knapsack":
        found = _by_knapsack(maker, options, goal)
    else:
        found = _by_rate(maker, options, goal)
    costs = _costs(analysis, goal, found.selection)
    notes = {kind: _note(found, goal, costs, kind, options) for kind in goal.targets}
    found.reached = tuple(goal.reached(costs, notes))
    found.selection.warnings += [f"target missed: {each}" for each in found.reached if not each.met]
    return found


@dataclass
class _Maker:
    analysis: Analysis
    scores: Scores
    following: Following | None

    def made(self, options: Options, goal: Budget | None = None) -> Chosen:
        scores = self.scores(options)
        costs = goal.costs if goal is not None else None
        selection = select(self.analysis.all_groups, scores, options, costs)
        if self.following is not None:
            solved = selection.solved
            selection, followed = self.following(selection, options)
            selection.solved = solved
            scores = {**scores, **followed}
        return Chosen(selection, scores, options)


def _costs(analysis: Analysis, goal: Budget, selection: Selection) -> dict[str, float]:
    ids = torch.from_numpy(selection.kept[analysis.all_groups.channel])
    terms = goal.costs.terms.items()
    return {kind: sum(term.cost(ids) for term in own) for kind, own in terms}


def _by_knapsack(maker: _Maker, options: Options, goal: Budget) -> Chosen:
    """Aims are moved where layers that follow change the cost behind the knapsack's back."""
    for _ in range(_TRIES):
        found = maker.made(replace(options, target=dict(goal.aims)), goal)
        if maker.following is None or found.selection.solved is None:
            break
        costs = _costs(maker.analysis, goal, found.selection)
        nearest = max(goal.targets, key=lambda kind: costs[kind] / goal.targets[kind])
        ratio = costs[nearest] / goal.targets[nearest]
        if 1 - CLOSE / 2 <= ratio <= 1 or not found.selection.solved.met:
            break
        for kind in goal.aims:
            goal.aims[kind] *= (1 - CLOSE / 4) / ratio
    return found


def _by_rate(maker: _Maker, options: Options, goal: Budget) -> Chosen:
    """The lowest rate at which the targets are met, by bisection."""
    low, high, above = 0.0, 0.999, None
    best = maker.made(replace(options, rate=high))
    if _over(maker, goal, best) > 1:
        return best
    for _ in range(_HALVINGS):
        middle = (low + high) / 2
        found = maker.made(replace(options, rate=middle))
        if _over(maker, goal, found) <= 1:
            high, best = middle, found
        else:
            low, above = middle, found
    if above is not None:
        _filled(maker, goal, best, above)
    return best


def _filled(maker: _Maker, goal: Budget, best: Chosen, above: Chosen) -> None:
    """Give groups the width of the next lower rate, one after the other, while the targets hold."""
    kept, wider = best.selection.kept, above.selection.kept
    groups = maker.analysis.all_groups
    for family in families(groups, best.scores):
        channels = np.concatenate([groups.groups[i].channels for i in family.groups])
        before = kept[channels].copy()
        if (before == wider[channels]).all():
            continue
        kept[channels] = wider[channels]
        if _over(maker, goal, best) > 1:
            kept[channels] = before


def _over(maker: _Maker, goal: Budget, found: Chosen) -> float:
    costs = _costs(maker.analysis, goal, found.selection)
    return max(costs[kind] / target for kind, target in goal.targets.items())


def _note(found: Chosen, goal: Budget, costs: Any, kind: str, options: Options) -> str:
    """Why the cost is not within a percent below its target."""
    target = goal.targets[kind]
    if costs[kind] > target * (1 + 1e-9):
        return (
            "no layer may get narrower: what is left is frozen, or kept by min_channels, max_rate, "
            "round_to or ignore"
        )
    if costs[kind] >= target * (1 - CLOSE):
        return ""
    if any(costs[k] >= t * (1 - CLOSE) for k, t in goal.targets.items() if k != kind):
        return "another target allows no more"
    if goal.costs.dense[kind] <= target:
        return "the unpruned network costs no more"
    return "the next width up would cost more than is left"
