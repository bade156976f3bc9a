"""From an analysis and options to a `Plan`: score, select, and write down what is kept."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from .analysis import Analysis
from .errors import OptionError
from .ids import Freeze
from .ignore import check_patterns, ignored, selected
from .plans import GroupPlan, Plan, fingerprint, shapes_of
from .score import score
from .select import Options, Selection, asked_rate, asked_widths, select
from .settings import Settings, as_options
from .squeeze import Squeeze, follow
from .squeeze import outside as squeezes
from .watch import Watch
from .widths import Widths


class Made(NamedTuple):
    """A plan, the mask of kept ids it was written from, and the scores it was made by."""

    plan: Plan
    kept: Tensor
    scores: Mapping[int, np.ndarray]


Scorer = Callable[[Options, Settings], dict[int, np.ndarray]]


def make_plan(
    analysis: Analysis,
    chosen: Settings,
    watch: Watch,
    *,
    with_scores: bool = False,
    scorer: Scorer | None = None,
) -> Made:
    """Score, select, and write down what stays; the plan holds the scores where asked to. A
    `scorer` gives scores of another source than the network's own weights."""
    options = bound_options(analysis, chosen)
    groups = analysis.all_groups
    scores = scorer(options, chosen) if scorer else scored(analysis, options, chosen)
    watch("score", analysis, scores)
    selection = select(groups, scores, options)
    if isinstance(chosen.squeeze, Squeeze):
        selection, followed = follow(analysis, selection, options, chosen.squeeze)
        scores = {**scores, **followed}
    kept = kept_ids(analysis, selection.kept)
    made = _write_plan(analysis, selection, kept, chosen, options, scores if with_scores else {})
    watch("select", (analysis, scores), made)
    return Made(made, kept, scores)


def plan_of(analysis: Analysis, selection: Selection, chosen: Settings) -> Made:
    """The plan of a selection that was made by other means than scores."""
    kept = kept_ids(analysis, selection.kept)
    made = _write_plan(analysis, selection, kept, chosen, Options(rate=1.0), {})
    return Made(made.model_copy(update={"rate": None}), kept, {})


def scored(analysis: Analysis, options: Options, chosen: Settings) -> dict[int, np.ndarray]:
    """The scores by the settings' criterion, which is told widths where it chooses sets."""
    groups, criterion = analysis.all_groups, chosen.found
    keep = asked_widths(groups, options) if criterion.kind == "set" else None
    return score(groups, analysis.tensors, criterion, reduce=chosen.reduce, keep=keep)


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
    return replace(as_options(chosen), ignored=leave, outside=outside)


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
        rate=options.rate,
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
