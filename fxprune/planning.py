"""From an analysis and options to a `Plan`: score, select, and write down what is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from .analysis import Analysis
from .budgeting import choose
from .calibration import Calibration
from .curves import unique
from .errors import OptionError
from .ids import Freeze
from .ignore import check_patterns, ignored, selected
from .multiples import liked
from .normalize import by_layers, normalized
from .plans import GroupPlan, Plan, fingerprint, shapes_of
from .score import score
from .select import Curve, Options, Selection, asked_rate, asked_widths, own_value
from .settings import Settings, as_options
from .squeeze import Squeeze, follow
from .squeeze import outside as squeezes
from .targets import Reached
from .watch import Watch
from .widths import Widths

if TYPE_CHECKING:
    from .latency_table import LatencyTable


class Made(NamedTuple):
    """A plan, the mask of kept ids it was written from, the scores it was made by, and what came of
    a budget."""

    plan: Plan
    kept: Tensor
    scores: Mapping[int, np.ndarray]
    reached: tuple[Reached, ...] = ()


Scorer = Callable[[Options, Settings], dict[int, np.ndarray]]


def make_plan(
    analysis: Analysis,
    chosen: Settings,
    watch: Watch,
    *,
    with_scores: bool = False,
    scorer: Scorer | None = None,
    calibration: Calibration | None = None,
    table: LatencyTable | None = None,
) -> Made:
    """Score, select, and write down what stays; the plan holds the scores where asked to. A
    `scorer` gives scores of another source than the network's own weights; `calibration` is what
    data said, `table` is that of latencies."""
    options = bound_options(analysis, chosen)
    scores = _Scores(analysis, chosen, scorer, calibration)
    chosen_by = choose(analysis, scores, options, chosen, _following(analysis, chosen), table)
    found, selection = chosen_by.scores, chosen_by.selection
    watch("score", analysis, scores.last)
    kept = kept_ids(analysis, selection.kept)
    options = chosen_by.options
    made = _write_plan(analysis, selection, kept, chosen, options, found if with_scores else {})
    watch("select", (analysis, found), made)
    return Made(made, kept, found, chosen_by.reached)


def _following(analysis: Analysis, chosen: Settings) -> Callable[..., Any] | None:
    """What the squeeze layers do after a selection."""
    how = chosen.squeeze
    if not isinstance(how, Squeeze):
        return None
    return lambda selection, options: follow(analysis, selection, options, how)


class _Scores:
    """The scores for some options. Those of a set criterion depend on the widths asked for, all
    others are had once."""

    def __init__(self, analysis: Analysis, chosen: Settings, scorer: Any, calibration: Any):
        self.analysis, self.chosen, self.scorer = analysis, chosen, scorer
        self.calibration = calibration
        self.last: dict[int, np.ndarray] = {}

    def __call__(self, options: Options) -> dict[int, np.ndarray]:
        if not self.last or self.chosen.found.kind == "set":
            self.last = self._made(options)
        return self.last

    def _made(self, options: Options) -> dict[int, np.ndarray]:
        chosen, groups = self.chosen, self.analysis.all_groups
        if self.scorer:
            found = self.scorer(options, chosen)
        else:
            found = scored(self.analysis, options, chosen, self.calibration)
        if chosen.normalize is not None:
            return normalized(groups, found, chosen.normalize)
        adds_up = chosen.select_by == "knapsack" and not chosen.found.comparable
        return by_layers(groups, found) if adds_up else found


def plan_of(analysis: Analysis, selection: Selection, chosen: Settings) -> Made:
    """The plan of a selection that was made by other means than scores."""
    kept = kept_ids(analysis, selection.kept)
    made = _write_plan(analysis, selection, kept, chosen, Options(rate=1.0), {})
    return Made(made.model_copy(update={"rate": None}), kept, {})


def scored(
    analysis: Analysis,
    options: Options,
    chosen: Settings,
    calibration: Calibration | None = None,
) -> dict[int, np.ndarray]:
    """The scores by the settings' criterion, which is told widths where it chooses sets."""
    groups, criterion = analysis.all_groups, chosen.found
    keep = asked_widths(groups, options) if criterion.kind == "set" else None
    how: Any = {"reduce": chosen.reduce, "keep": keep, "calibration": calibration}
    return score(groups, analysis.tensors, criterion, **how)


def bound_options(analysis: Analysis, chosen: Settings) -> Options:
    """The options bound to this network; errors name the recipe they are from."""
    try:
        options = _bound(analysis, chosen)
        check_patterns(analysis, options.rates)
    except OptionError as error:
        if chosen.recipe:
            error.details.append(("recipe", chosen.recipe))
        raise
    return options


def _bound(analysis: Analysis, chosen: Settings) -> Options:
    """The options of selection, with names and roles resolved to groups of this network."""
    outside = frozenset(range(len(analysis.groups))) - selected(analysis, chosen.only)
    if chosen.squeeze is not None:
        outside |= squeezes(analysis)
    leave = ignored(analysis, chosen.ignore)
    curves = _curves(analysis, chosen) if chosen.sensitivity is not None else {}
    own = {i: found for i in range(len(analysis.groups)) if (found := _own(analysis, chosen, i))}
    return replace(as_options(chosen), ignored=leave, outside=outside, own=own, curves=curves)


def _curves(analysis: Analysis, chosen: Settings) -> dict[int, Curve]:
    """What was measured for each group. `OptionError` for a group of which nothing was."""
    found: dict[int, Curve] = {}
    known, names = chosen.sensitivity, set[str]()
    for i, group in enumerate(analysis.groups):
        if group.prunable:
            name = unique(group.name, names)
            names.add(name)
            if name in known.groups or name in known.together:
                found[i] = partial(known.loss_at, name)
    if not found:
        raise OptionError(
            "the sensitivity knows no group of this network",
            hint="measure it for this network: fxprune.sensitivity(model, data)",
        )
    return found


def _own(analysis: Analysis, chosen: Settings, i: int) -> dict[str, Any]:
    """The options that a group has of its own."""
    found, group = {}, analysis.groups[i]
    for name, given in (("min_channels", chosen.min_channels), ("max_rate", chosen.max_rate)):
        if isinstance(given, Mapping):
            check_patterns(analysis, given, name)
            value = own_value(group, given)
            if value is not None:
                found[name] = value
    if chosen.round_to == "auto":
        found["round_to"] = liked(len(group), analysis.tensors[group.members[0].param])
    return found


def _write_plan(
    analysis: Analysis,
    selection: Selection,
    ids: Tensor,
    chosen: Settings,
    options: Options,
    scores: Mapping[int, np.ndarray],
) -> Plan:
    from . import __version__

    widths = Widths(analysis.flow, ids)
    shapes = shapes_of(analysis.tensors)
    kept = {param: found for param in analysis.flow.ids.slots if (found := widths.kept_of(param))}
    count = len(analysis.groups)
    rows = [_group_plan(analysis, i, selection, options, scores.get(i)) for i in range(count)]
    return Plan.model_construct(
        fxprune=__version__,
        torch=torch.__version__,
        model=type(analysis.model).__name__,
        fingerprint=fingerprint(shapes),
        shapes=shapes,
        inputs=analysis.inputs.spec(),
        recipe=chosen.recipe,
        criterion=str(chosen.criterion),
        rate=None if chosen.target else options.rate,
        target=dict(chosen.target or {}),
        scope=options.scope,
        select_by=options.rule,
        mixing=analysis.mixing,
        scatter=analysis.scatter,
        heads=analysis.heads,
        frontend=analysis.frontend,
        kept=kept,
        groups=rows,
        warnings=selection.warnings,
    )


def _group_plan(
    analysis: Analysis, i: int, selection: Selection, options: Options, scores: np.ndarray | None
) -> GroupPlan:
    group = analysis.groups[i]
    kept = int(selection.kept[group.channels].sum()) if group.prunable else len(group)
    reason = selection.reasons.get(i, "")
    if group.frozen is not None:
        reason = _with_node(group.frozen)
    if not asked_rate(analysis.all_groups, i, options):
        reason = ""  # what was not asked for is no shortfall
    found = None if scores is None else scores.tolist()
    return GroupPlan(name=group.name, size=len(group), kept=kept, reason=reason, scores=found)


def _with_node(freeze: Freeze) -> str:
    if freeze.node is None or f"%{freeze.node.name}" in freeze.reason:
        return freeze.reason
    return f"{freeze.reason} (%{freeze.node.name})"


def kept_ids(analysis: Analysis, kept: np.ndarray) -> Tensor:
    """The mask over ids for a mask over channels."""
    return torch.from_numpy(kept[analysis.all_groups.channel])
