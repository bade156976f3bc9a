"""The pipeline, as one flat function of named steps: trace, flow, groups, score, select, rewrite, verify."""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from .analysis import Analysis, analyze
from .check import check_choice, check_count, check_finite, check_share
from .criteria import Criterion, find
from .errors import NothingToPrune, OptionError, PlanError, nearest
from .flow import Mixing
from .ids import Freeze
from .inputs import Inputs, of_spec
from .plans import GroupPlan, Kept, Plan, fingerprint, shapes_of
from .pruned import Info, PrunedModule
from .report import Report, Row
from .rewrite import rewrite
from .score import Reduce, score
from .select import Options, Scope, Selection, SelectRule, layer_names, select
from .verifier import Verification, verify_numbers, verify_shapes
from .watch import Watch, silent, together
from .widths import RewriteError, Widths

Ignore = Sequence["str | nn.Module | type"]
Verify = bool | Literal["shapes"]


def prune(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    criterion: str | Criterion = "l2",
    rate: float = 0.5,
    scope: Scope = "local",
    select_by: SelectRule = "rate",
    reduce: Reduce = "mean",
    rates: Mapping[str, float] | None = None,
    ignore: Ignore = (),
    min_channels: int = 1,
    max_rate: float = 1.0,
    round_to: int = 1,
    mixing: Mixing = "norms",
    verify: Verify = True,
    dump: str | os.PathLike[str] | None = None,
    strict: bool = False,
    watch: Watch = silent,
) -> PrunedModule:
    """A new, smaller network that computes what `model` computes without the removed channels.

    `model` is not changed. The result is an `fx.GraphModule` with ``pruned.fxprune.plan`` and
    ``pruned.fxprune.report``; its ``state_dict`` holds slices of the original's tensors under the
    original's names. Inputs and outputs of the network keep their shapes.

    example_inputs: a tensor, a tuple of forward's arguments or a dict of them; guessed if missing.
    criterion:      a name (`fxprune.criteria.names()`) or a function of a group's `Slices`.
    rate:           share of channels removed, in [0, 1): of each group (``scope="local"``) or of all
                    prunable channels together (``scope="global"``).
    select_by:      "rate"; "cumulative" (per group, the longest run of lowest scores whose summed
                    share is at most `rate`); "threshold" (all scores strictly above the one at `rate`).
    reduce:         how scores of coupled layers are joined: mean, sum, max, first.
    rates:          name pattern of layers -> rate, over `rate`; the last match counts.
    ignore:         layers whose output channels all stay, as name patterns, modules or types;
                    ``"in:PATTERN"`` keeps a layer's input channels instead.
    min_channels, max_rate, round_to: floor, cap and divisor of each group's width.
    mixing:         which ops may run on over fewer channels although their statistics change:
                    "norms" (the default), "all", "none".
    verify:         True compares shapes and numbers, "shapes" shapes only, False nothing.
    dump:           a folder for a text file and a drawing after every step (or ``FXPRUNE_DUMP``).
    strict:         raise on an op no rule knows, instead of freezing what reaches it.

    Raises `ModelError`, `InputError`, `TraceError`, `OptionError`, `CriterionError`,
    `NothingToPrune` or `VerificationError`; each says where and what to do.
    """
    name, function = find(criterion)
    _check_options(rate, scope, select_by, rates or {}, min_channels, max_rate, round_to, verify)
    watch = _watches(watch, dump)
    analysis = analyze(model, example_inputs, mixing=mixing, strict=strict, watch=watch)
    check_finite(analysis.tensors)
    options = Options(
        rate=rate, scope=scope, rule=select_by, rates=dict(rates or {}), min_channels=min_channels,
        max_rate=max_rate, round_to=round_to,
    )  # fmt: skip
    while True:
        _check_prunable(analysis)
        made, kept = _planned(analysis, name, function, reduce, options, ignore, watch)
        try:
            return _finish(analysis, made, kept, verify, watch)
        except RewriteError as error:
            _freeze_at(analysis, error)


def _check_options(rate, scope, select_by, rates, min_channels, max_rate, round_to, verify) -> None:
    check_share("rate", rate)
    check_share("max_rate", max_rate, whole=True)
    for pattern, value in rates.items():
        check_share(f"rates[{pattern!r}]", value)
    check_choice("scope", scope, ("local", "global"))
    check_choice("select_by", select_by, ("rate", "cumulative", "threshold"))
    check_choice("verify", verify, (True, False, "shapes"))  # type: ignore[arg-type]
    check_count("min_channels", min_channels)
    check_count("round_to", round_to)


def _watches(watch: Watch, dump: str | os.PathLike[str] | None) -> Watch:
    folder = dump or os.environ.get("FXPRUNE_DUMP")
    debug = os.environ.get("FXPRUNE_DEBUG")
    if not folder and not debug:
        return watch
    from .dump import dump_to, log_at

    extra = [dump_to(folder)] if folder else []
    return together(watch, *extra, *([log_at(debug)] if debug else []))


def _check_prunable(analysis: Analysis) -> None:
    if any(group.prunable for group in analysis.groups):
        return
    why = [
        (f.group, f"{f.channels} channels: {f.reason} {f.source}".rstrip())
        for f in analysis.frozen[:5]
    ]
    raise NothingToPrune(
        f"no channel of {type(analysis.model).__name__} may go",
        details=why,
        hint="the last layer's outputs always stay; `fxprune.analyze(model).frozen` lists every reason"
        if why else "the model has no layer with channels that a rule knows",
    )  # fmt: skip


def _freeze_at(analysis: Analysis, error: RewriteError) -> None:
    """A choice that cannot be written there is no choice: freeze what reaches the node."""
    ids = analysis.flow.ids
    for operand in [error.node, *error.node.all_input_nodes]:
        value = analysis.flow.values.get(operand)
        for layer in getattr(value, "layers", ()):
            ids.freeze(error.node, layer.ids, error.fault)
    before = sum(len(g) for g in analysis.groups if g.prunable)
    analysis.regroup()
    if sum(len(g) for g in analysis.groups if g.prunable) == before:
        raise error


# -- plan ------------------------------------------------------------------------------------------


def plan(
    analysis: Analysis,
    *,
    criterion: str | Criterion = "l2",
    rate: float = 0.5,
    scope: Scope = "local",
    select_by: SelectRule = "rate",
    reduce: Reduce = "mean",
    rates: Mapping[str, float] | None = None,
    ignore: Ignore = (),
    min_channels: int = 1,
    max_rate: float = 1.0,
    round_to: int = 1,
    scores: bool = False,
) -> Plan:
    """What to keep of every parameter, without writing a network; the options are `prune`'s.

    ``scores=True`` puts every channel's score into the plan.
    """
    name, function = find(criterion)
    _check_options(rate, scope, select_by, rates or {}, min_channels, max_rate, round_to, True)
    check_finite(analysis.tensors)
    _check_prunable(analysis)
    options = Options(
        rate=rate, scope=scope, rule=select_by, rates=dict(rates or {}), min_channels=min_channels,
        max_rate=max_rate, round_to=round_to,
    )  # fmt: skip
    return _planned(analysis, name, function, reduce, options, ignore, silent, with_scores=scores)[
        0
    ]


def _planned(
    analysis: Analysis, name: str, function: Criterion, reduce: Reduce, options: Options, ignore: Ignore,
    watch: Watch, *, with_scores: bool = False,
) -> tuple[Plan, Tensor]:  # fmt: skip
    """The plan, and the mask of kept ids it was written from."""
    ignored = _ignored(analysis, ignore)
    _check_patterns(analysis, options.rates)
    scores = score(analysis.all_groups, analysis.tensors, name, function, reduce=reduce)
    watch("score", analysis, scores)
    options = Options(**{**options.__dict__, "ignored": ignored})
    selection = select(analysis.all_groups, scores, options)
    kept = _kept_ids(analysis, selection.kept)
    made = _write_plan(analysis, selection, kept, name, options, scores if with_scores else {})
    watch("select", (analysis, scores), made)
    return made, kept


def _write_plan(
    analysis: Analysis, selection: Selection, kept_ids: Tensor, name: str, options: Options, scores
) -> Plan:
    from . import __version__

    widths = Widths(analysis.flow, kept_ids)
    shapes = shapes_of(analysis.tensors)
    kept = {param: found for param in analysis.flow.ids.slots if (found := widths.kept_of(param))}
    rows = [_group_plan(analysis, i, selection, scores.get(i)) for i in range(len(analysis.groups))]
    return Plan(
        fxprune=__version__, torch=torch.__version__, model=type(analysis.model).__name__,
        fingerprint=fingerprint(shapes), shapes=shapes, inputs=analysis.inputs.spec(), criterion=name,
        rate=options.rate, scope=options.scope, mixing=analysis.mixing, kept=kept, groups=rows,
    )  # fmt: skip


def _group_plan(
    analysis: Analysis, i: int, selection: Selection, scores: np.ndarray | None
) -> GroupPlan:
    group = analysis.groups[i]
    kept = int(selection.kept[group.channels].sum()) if group.prunable else len(group)
    reason = selection.reasons.get(i, "")
    if group.frozen is not None:
        node = group.frozen.node
        at = (
            f" (%{node.name})"
            if node is not None and f"%{node.name}" not in group.frozen.reason
            else ""
        )
        reason = group.frozen.reason + at
    return GroupPlan(name=group.name, size=len(group), kept=kept, reason=reason,
                     scores=None if scores is None else scores.tolist())  # fmt: skip


def _kept_ids(analysis: Analysis, kept: np.ndarray) -> Tensor:
    return torch.from_numpy(kept[analysis.all_groups.channel])


def _ignored(analysis: Analysis, ignore: Ignore) -> dict[int, str]:
    if isinstance(ignore, (str, nn.Module, type)):
        ignore = (ignore,)
    found: dict[int, str] = {}
    for item in ignore:
        names, inputs = _names_of(analysis, item)
        shown = item if isinstance(item, str) else getattr(item, "__name__", type(item).__name__)
        for i, group in enumerate(analysis.groups):
            mine = layer_names(group) if not inputs else _reader_names(group)
            if any(name in names for name in mine):
                found[i] = f"ignored by `{shown}`"
    return found


def _reader_names(group) -> list[str]:
    readers = [m.param for m in group.members if m.role == "in"]
    return [name for param in readers for name in (param, param.rpartition(".")[0])]


def _names_of(analysis: Analysis, item: Any) -> tuple[set[str], bool]:
    """The names of modules and parameters an `ignore` item means, and whether their inputs are meant."""
    modules = dict(analysis.model.named_modules())
    if isinstance(item, str):
        inputs, pattern = item.startswith("in:"), item.removeprefix("in:")
        known = {*modules, *analysis.tensors}
        names = {n for n in known if fnmatch.fnmatchcase(n, pattern)}
        names |= {n for n in known if any(n.startswith(f"{m}.") for m in names if m)}
        _must_match(bool(names), f"ignore pattern `{item}`", pattern, known)
        return names, inputs
    if isinstance(item, nn.Module):
        names = {n for n, m in modules.items() for inner in item.modules() if m is inner}
    elif isinstance(item, type):
        names = {
            f"{n}.{k}".strip(".")
            for n, m in modules.items()
            if isinstance(m, item)
            for k, _ in m.named_modules()
        }
    else:
        raise OptionError(
            f"ignore holds a {type(item).__name__}", hint="name patterns, modules or module types"
        )
    _must_match(
        bool(names), f"ignore={getattr(item, '__name__', type(item).__name__)}", "", modules
    )
    return names, False


def _check_patterns(analysis: Analysis, rates: Mapping[str, float]) -> None:
    names = {name for group in analysis.groups for name in layer_names(group)}
    for pattern in rates:
        _must_match(
            any(fnmatch.fnmatchcase(n, pattern) for n in names),
            f"rates pattern `{pattern}`",
            pattern,
            names,
        )


def _must_match(found: bool, what: str, pattern: str, known) -> None:
    if not found:
        raise OptionError(
            f"{what} matches nothing in the model",
            hint=nearest(pattern, known) or "patterns are shell-style, as in `layer1.*.conv2`",
        )


# -- apply -----------------------------------------------------------------------------------------


def apply(
    model: nn.Module,
    plan: Plan,
    example_inputs: Any = None,
    *,
    verify: Verify = True,
    watch: Watch = silent,
) -> PrunedModule:
    """Write the network a plan describes. `PlanError` if the plan is for another model, or breaks
    the couplings of this one."""
    analysis = _analysis_for(model, plan, example_inputs)
    return _finish(analysis, plan, _kept_by_plan(analysis, plan), verify, watch)


def _analysis_for(model: nn.Module, plan: Plan, example_inputs: Any) -> Analysis:
    from .check import tensors_of

    if not isinstance(model, nn.Module):
        from .check import check_model

        check_model(model)
    plan.check_fits(tensors_of(model))
    if example_inputs is None and plan.inputs is not None:
        spec: Inputs = of_spec(plan.inputs)
        example_inputs = spec.args
    return analyze(model, example_inputs, mixing=plan.mixing)  # type: ignore[arg-type]


def _kept_by_plan(analysis: Analysis, plan: Plan) -> Tensor:
    """The mask of kept ids that a plan's kept indices mean; `PlanError` if they break a coupling."""
    channel = analysis.all_groups.channel
    masks = []
    for param, dims in plan.kept.items():
        for dim, rows in dims.items():
            slots = [s for s in analysis.flow.ids.slots.get(param, ()) if s.dim == dim]
            if not slots:
                raise PlanError(
                    f"the plan narrows {param} dim {dim}, which has no channels that can go"
                )
            mask = _slot_mask(param, dim, slots[0].ids.shape, rows)
            masks.append((param, dim, [channel[s.ids.numpy()] for s in slots], mask))
    kept = _kept_channels(int(channel.max()) + 1, masks)
    for param, dim, slots, mask in masks:
        if any((s[~mask] == 0).all() and not mask.all() for s in slots) and len(slots) == 1:
            raise PlanError(
                f"the plan removes channels of {param} dim {dim} that cannot go",
                hint="fxprune.analyze(model).frozen says why",
            )
        if (np.logical_and.reduce([kept[s] for s in slots]) != mask).any():
            raise PlanError(
                f"the plan breaks the coupling of {param} dim {dim}",
                hint="coupled slices go together; fxprune.analyze(model).explain(layer) lists them",
            )
    return _kept_ids(analysis, kept)


def _kept_channels(count: int, masks: list) -> np.ndarray:
    """A channel stays if any of its slices does."""
    kept = np.ones(count, bool)
    for _, _, slots, _ in masks:
        for channels in slots:
            kept[channels] = False
    for _, _, slots, mask in masks:
        for channels in slots:
            kept[channels[mask]] = True
    kept[0] = True
    return kept


def _slot_mask(param: str, dim: int, shape, rows: Kept) -> np.ndarray:
    mask = np.zeros(tuple(shape), bool)
    nested = bool(rows) and isinstance(rows[0], list)
    if nested != (len(shape) == 2) or (nested and len(rows) != shape[0]):
        raise PlanError(
            f"the plan's indices of {param} dim {dim} do not have the layout of the model's blocks"
        )
    lists = rows if nested else [rows]
    for r, indices in enumerate(lists):
        if any(not 0 <= i < shape[-1] for i in indices) or list(indices) != sorted(set(indices)):  # type: ignore
            raise PlanError(
                f"the plan's indices of {param} dim {dim} are not ascending indices below {shape[-1]}"
            )
        (mask[r] if nested else mask)[indices] = True
    return mask


def _finish(
    analysis: Analysis, plan: Plan, kept: Tensor, verify: Verify, watch: Watch
) -> PrunedModule:
    pruned = rewrite(analysis.model, analysis.flow, kept, plan.kept)
    watch("rewrite", (analysis, plan), pruned)
    pruned.meta["fxprune"] = Info(plan, _report(analysis, plan, kept, pruned))
    if verify:
        checked = _verified(analysis, plan, kept, pruned, verify)
        pruned.fxprune.report.verification = checked
    watch("verify", (analysis, plan), pruned)
    return pruned


def _verified(
    analysis: Analysis, plan: Plan, kept: Tensor, pruned: fx.GraphModule, verify: Verify
) -> Verification:
    verify_shapes(analysis.flow, pruned, analysis.inputs)
    on_meta = any(t.is_meta for t in analysis.tensors.values())
    if verify == "shapes" or on_meta:
        return Verification(True)
    widths = Widths(analysis.flow, kept)
    return verify_numbers(analysis.flow, pruned, plan.kept, widths, analysis.inputs)


def verify(
    model: nn.Module, pruned: fx.GraphModule, plan: Plan, example_inputs: Any = None
) -> Verification:
    """Prove that `pruned` computes what `model` computes with the plan's channels masked.

    Raises `VerificationError` with the largest difference if it does not, `PlanError` if the plan is
    for another model.
    """
    analysis = _analysis_for(model, plan, example_inputs)
    return _verified(analysis, plan, _kept_by_plan(analysis, plan), pruned, True)


def _report(analysis: Analysis, plan: Plan, kept: Tensor, pruned: PrunedModule) -> Report:
    rows = [
        Row(g.name, g.size, g.kept, len(group.members), g.reason)
        for g, group in zip(plan.groups, analysis.groups, strict=False)
    ]
    return Report(
        model=plan.model, criterion=plan.criterion, rate=plan.rate, scope=plan.scope, frontend=analysis.frontend,
        inputs=analysis.inputs.describe(), guessed=analysis.inputs.guessed, groups=rows,
        params=(sum(p.numel() for p in analysis.model.parameters()), sum(p.numel() for p in pruned.parameters())),
        macs=(analysis.macs(), analysis.macs(kept)), warnings=list(analysis.warnings),
    )  # fmt: skip


__all__ = ["Freeze", "analyze", "apply", "plan", "prune", "verify"]
