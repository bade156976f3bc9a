"""From an analysis and options to a `Plan`: score, select, and write down what is kept."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from .analysis import Analysis
from .criteria import Criterion
from .ids import Freeze
from .ignore import Ignore, check_patterns, ignored
from .plans import GroupPlan, Plan, fingerprint, shapes_of
from .score import Reduce, score
from .select import Options, Selection, group_rate, select
from .watch import Watch
from .widths import Widths


def make_plan(
    analysis: Analysis,
    criterion: tuple[str, Criterion],
    reduce: Reduce,
    options: Options,
    ignore: Ignore,
    watch: Watch,
    *,
    with_scores: bool = False,
) -> tuple[Plan, Tensor]:
    """The plan, and the mask of kept ids it was written from."""
    options = replace(options, ignored=ignored(analysis, ignore))
    check_patterns(analysis, options.rates)
    name, function = criterion
    scores = score(analysis.all_groups, analysis.tensors, name, function, reduce=reduce)
    watch("score", analysis, scores)
    selection = select(analysis.all_groups, scores, options)
    kept = kept_ids(analysis, selection.kept)
    made = _write_plan(analysis, selection, kept, name, options, scores if with_scores else {})
    watch("select", (analysis, scores), made)
    return made, kept


def _write_plan(
    analysis: Analysis, selection: Selection, ids: Tensor, name: str, options: Options, scores
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
        criterion=name,
        rate=options.rate,
        scope=options.scope,
        mixing=analysis.mixing,
        kept=kept,
        groups=rows,
    )


def _group_plan(
    analysis: Analysis, i: int, selection: Selection, options: Options, scores: np.ndarray | None
) -> GroupPlan:
    group = analysis.groups[i]
    kept = int(selection.kept[group.channels].sum()) if group.prunable else len(group)
    reason = selection.reasons.get(i, "")
    if group.frozen is not None:
        reason = _with_node(group.frozen)
    if not group_rate(group, options):
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
