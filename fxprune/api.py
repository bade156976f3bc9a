"""The pipeline: trace, flow, groups, score, select, rewrite, verify."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import fields
from functools import partial
from itertools import zip_longest
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from .analysis import Analysis, analyze
from .batches import batches
from .calibration import Calibration, Loss, calibrate
from .check import check_choice, check_finite, check_model, device_of, tensors_of
from .compensation import Compensate, check_compensate
from .compensation import compensate as fit
from .copies import narrow
from .counters import Counts
from .criteria import CriterionLike
from .curves import Sensitivity
from .errors import ModelError, NothingToPrune, OptionError, PlanError
from .flow import Mixing
from .frontends import Frontend
from .heads import Heads
from .ids import Layer, Value
from .ignore import Ignore
from .inputs import of_spec
from .layers import Scores, layer_rows
from .normalize import Normalize
from .planning import Made, make_plan
from .plans import Plan
from .progress import Progress, shown
from .pruned import Info, PrunedModule
from .recipes import RecipeLike
from .replay import kept_by_plan
from .report import Report, Row
from .rewrite import rewrite
from .score import Reduce
from .select import Scope, SelectRule
from .settings import Settings, settings
from .sidebyside import verify_copy
from .squeeze import Squeeze
from .trees import leaves
from .verifier import Verification, verify_numbers, verify_shapes
from .watch import Watch, silent, together
from .widths import RewriteError, Widths

Verify = bool | Literal["shapes"]


@torch.inference_mode(False)
def prune(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    recipe: RecipeLike | None = None,
    criterion: CriterionLike | None = None,
    rate: float | None = None,
    scope: Scope | None = None,
    select_by: SelectRule | None = None,
    reduce: Reduce | None = None,
    rates: Mapping[str, float] | None = None,
    only: Ignore | None = None,
    ignore: Ignore | None = None,
    min_channels: int | Mapping[str, int] | None = None,
    max_rate: float | Mapping[str, float] | None = None,
    round_to: int | Literal["auto"] | None = None,
    target: Mapping[str, float] | None = None,
    normalize: Normalize | None = None,
    sensitivity: Sensitivity | None = None,
    data: Any = None,
    loss: Loss | None = None,
    compensate: Compensate | bool | None = None,
    latency_table: Any = None,
    squeeze: Squeeze | Mapping[str, Any] | Literal[False] | None = None,
    mixing: Mixing | None = None,
    scatter: bool | None = None,
    heads: Heads | None = None,
    verify: Verify = True,
    frontend: Frontend | None = None,
    dump: str | os.PathLike[str] | None = None,
    strict: bool = False,
    progress: Progress | bool | None = None,
    watch: Watch = silent,
) -> PrunedModule:
    """A new, smaller network that computes what `model` computes without the removed channels.

    `model` is not changed. The result is an `fx.GraphModule`, or a copy of `model` where no graph
    holds it, with ``pruned.fxprune.plan`` and ``pruned.fxprune.report``; its ``state_dict`` holds
    slices of the original's tensors under the original's names. Inputs and outputs of the network
    keep their shapes.

    Args:
        model: any `torch.nn.Module`, on any one device.
        example_inputs: a tensor, a tuple of forward's arguments or a dict of them; guessed if
            missing.
        recipe: a whole pruning by name (`fxprune.recipes.names()`) or from a YAML file; what is
            given beside it wins over it. Without one the defaults below hold.
        criterion: a name (`fxprune.criteria.names()`), ``{"name": ..., "option": ...}``, or a
            function of a group's `Slices`; default "l2".
        rate: share of channels removed, in [0, 1); default 0.5.
        scope: "local", that share of each group (the default), or "global", of all together.
        select_by: "rate" (default); "cumulative" (per group, the longest run of lowest scores whose
            summed share is at most `rate`); "threshold" (keep scores above the one at `rate`).
        reduce: how scores of coupled layers are joined: mean (default), sum, max, first.
        rates: name pattern of layers -> rate, over `rate` and `target`; the last match counts.
        only: layers to prune, as name patterns, modules, types or roles ("role:expansion", see
            `fxprune.roles`); default all.
        ignore: layers whose output channels all stay, in the same words; ``"in:PATTERN"`` keeps a
            layer's input channels instead.
        min_channels: no group gets narrower; default 1. Or name pattern of layers -> number.
        max_rate: no group loses a larger share; default 1.0. Or name pattern of layers -> share.
        round_to: widths are rounded up to a multiple; default 1. "auto": one that the device of the
            model likes (16 channels on a CPU with AVX-512), finer in narrow layers.
        target: a budget in place of a rate: ``{"macs": 0.5}``, ``{"params": ...}``, a share up to 1
            or an amount, ``{"latency_ms": 4.0}``, or several. Met by the widths at which the least
            importance is lost (``select_by="knapsack"``), or with another `select_by`, or
            ``scope="local"``, by the rate that meets it.
        normalize: scores of each group over their "mean", "std", "sum" or "max", for rankings over
            the network; "kind": ranked among groups of one kind alone; "none". By default none, but
            in a knapsack of scores that are not comparable: "mean", times the coupled layers.
        sensitivity: what `fxprune.sensitivity` measured: in a knapsack, what a group loses with a
            share of its channels is read off its curve, and scores only say which channels go.
        data: batches for criteria that need data, and for `compensate`: a list or DataLoader of
            inputs, or of pairs (inputs, target).
        loss: a function of (output, target) for criteria of gradients, a mean over items; default:
            cross-entropy for classes, squared error for targets shaped as the output.
        compensate: what is left of the network is fitted on `data` to what the original gave,
            without training: "least_squares" (True) fits weights; "bias" constants alone;
            "statistics" takes those of normalisations anew.
        latency_table: times of the network's ops, by `fxprune.LatencyTable.measure`; where a target
            is a latency and none is given, they are measured where the model is, for the batch of
            the example inputs, and remembered.
        squeeze: ``{"divide": 4, "round_to": 8}``: squeeze layers follow the width they gate; False
            (beside a recipe) leaves them alone.
        mixing: which ops may run on over fewer channels although their statistics change: "norms"
            (the default), "all", "none".
        scatter: residual streams keep their width; each branch that is added to one loses channels
            of its own and is scattered back. Default False: they are coupled.
        heads: what may go of attention heads: "dims", equally many of each head (the default);
            "whole" heads; "keep": neither.
        verify: True compares shapes and numbers, "shapes" shapes only, False nothing.
        frontend: force one way from the model to a graph, "symbolic", "export" or "record" (see
            `fxprune.frontends`); by default the first that works, which the report names.
        dump: a folder for a text file and a drawing after every step (or ``FXPRUNE_DUMP``).
        strict: raise on an op no rule knows, instead of freezing what reaches it.
        progress: of measuring, calibration and compensation: True shows a bar on stderr, a function
            is called with what is done and the share of it that is done.
        watch: called as ``watch(step, before, after)`` after every step, with what went in and what
            came out.

    Raises `ModelError`, `InputError`, `TraceError`, `OptionError`, `RecipeError`, `CriterionError`,
    `NothingToPrune` or `VerificationError`; each says where and what to do.
    """
    chosen = settings(recipe, _given(locals()))
    check_choice("verify", verify, (True, False, "shapes"))
    fits = check_compensate(compensate)
    watch = _watches(watch, dump)
    how: Any = {name: getattr(chosen, name) for name in _READ_BY}
    analysis = analyze(model, example_inputs, frontend=frontend, strict=strict, watch=watch, **how)
    check_finite(_weights(analysis))
    known = batches(data, device_of(model)) if fits or chosen.found.needs else None
    with shown(progress) as seen:
        measured = _Measured(analysis, chosen, known, loss, latency_table, seen)

        def made() -> Made:
            check_prunable(analysis)
            return make_plan(analysis, chosen, watch, **measured())

        made_up = partial(compensated, analysis, known, fits, watch, seen) if fits else None
        return pruned_by(analysis, made, verify, watch, made_up)


def pruned_by(
    analysis: Analysis,
    make: Callable[[], Made],
    verify: Verify,
    watch: Watch,
    finish: Callable[[Made, PrunedModule], None] | None = None,
) -> PrunedModule:
    """The network of a plan that `make` makes. Where a channel turns out to be in the way of
    writing it, it is frozen, and `make` is called again. `finish` is for what is done last."""
    while True:
        made = make()
        try:
            pruned = _finish(analysis, made, verify, watch)
        except RewriteError as error:
            _freeze_at(analysis, error)
            continue
        if finish is not None:
            finish(made, pruned)
        return pruned


class _Measured:
    """What data and the clock say of a network, had once, when it is asked for."""

    def __init__(
        self,
        analysis: Analysis,
        chosen: Settings,
        data: Any,
        loss: Loss | None,
        table: Any = None,
        progress: Progress | None = None,
    ):
        self.analysis, self.chosen, self.data, self.loss = analysis, chosen, data, loss
        self.table, self.progress = table, progress
        self.calibration: Calibration | None = None

    def __call__(self) -> dict[str, Any]:
        needs = self.chosen.found.needs
        if needs and self.calibration is None:
            self.calibration = calibrate(self.analysis, self.data, needs, self.loss, self.progress)
        if self.table is None and "latency_ms" in (self.chosen.target or ()):
            from .latency_table import LatencyTable

            self.table = LatencyTable.measure(self.analysis, progress=self.progress)
        return {"calibration": self.calibration, "table": self.table}


def compensated(
    analysis: Analysis,
    data: Any,
    how: Compensate,
    watch: Watch,
    progress: Progress,
    made: Made,
    pruned: PrunedModule,
) -> None:
    """Fit a pruned network to the original on data, and say so in its report."""
    report = pruned.fxprune.report
    report.compensation = fit(analysis, pruned, made.kept, data, how, progress)
    watch("compensate", (analysis, made.plan), pruned)


_POOR = 0.5  # share of channels that could go, below which the report says what is in the way
_READ_BY = ("mixing", "scatter", "heads")  # settings that analysis depends on
_CHOICES = frozenset(each.name for each in fields(Settings)) - {"recipe"}


def _given(arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Those of a function's arguments that are settings."""
    return {name: value for name, value in arguments.items() if name in _CHOICES}


def _weights(analysis: Analysis) -> dict[str, Tensor]:
    """Parameters, and the statistics of layers. Other buffers may hold infinity, as masks do."""
    slots = analysis.flow.ids.slots
    read = {name for name, own in slots.items() if any(slot.role != "free" for slot in own)}
    tensors = analysis.tensors.items()
    return {name: t for name, t in tensors if isinstance(t, nn.Parameter) or name in read}


def _watches(watch: Watch, dump: str | os.PathLike[str] | None) -> Watch:
    folder = dump or os.environ.get("FXPRUNE_DUMP")
    debug = os.environ.get("FXPRUNE_DEBUG")
    if not folder and not debug:
        return watch
    from .dump import dump_to, log_at
    from .viewer.data import record_to

    written = dump_to(folder) if folder else silent
    extra = [record_to(folder), written] if folder else []  # times are without writing texts
    return together(watch, *extra, *([log_at(debug)] if debug else []))


def check_prunable(analysis: Analysis) -> None:
    if any(group.prunable for group in analysis.groups):
        return
    why = [
        (f.group, f"{f.channels} channels: {f.reason} {f.source}".rstrip())
        for f in analysis.frozen[:5]
    ]
    why += [(n.name, reason) for n, reason in list(analysis.flow.unknown.items())[:5]]
    raise NothingToPrune(
        f"no channel of {type(analysis.model).__name__} may go",
        details=why,
        hint=_why_nothing(analysis),
    )


def _why_nothing(analysis: Analysis) -> str:
    if analysis.frozen:
        return (
            "the last layer's outputs always stay; fxprune.analyze(model).frozen lists all reasons"
        )
    return "no layer makes channels that are not the input's or the output's"


def _freeze_at(analysis: Analysis, error: RewriteError) -> None:
    """A choice that cannot be written there is no choice: freeze what reaches the node."""
    for each in (error, *error.others):
        for layer in _layers_at(analysis, each.node):
            analysis.flow.ids.freeze(each.node, layer.ids, each.fault)
    before = sum(len(g) for g in analysis.groups if g.prunable)
    analysis.regroup()
    if sum(len(g) for g in analysis.groups if g.prunable) == before:
        raise error


def _layers_at(analysis: Analysis, node: fx.Node) -> list[Layer]:
    """Channels of what a node gives and is given, and of what its numbers are sizes of."""
    widths, values = Widths(analysis.flow, torch.empty(0)), analysis.flow.values
    found = [la for v in leaves(values.get(node), Value) for la in widths.layers(v)]
    rest, seen = [node], {node}
    while rest:
        at = rest.pop()
        for operand in at.all_input_nodes:
            given = leaves(values.get(operand), Value)
            found += [la for v in given for la in widths.layers(v) if _is_read(at, v, la)]
            if not given and operand not in seen:
                seen.add(operand)
                rest.append(operand)
    return found


def _is_read(node: fx.Node, value: Value, layer: Layer) -> bool:
    """Whether a node that asks for the size of one dim asks for one of the layer's."""
    is_size = isinstance(node.meta["val"], int) and len(node.args) == 2
    dim = node.args[1] if is_size else None
    return not isinstance(dim, int) or dim % len(value.shape) in layer.varying


# -- plan ------------------------------------------------------------------------------------------


@torch.inference_mode(False)
def plan(
    analysis: Analysis,
    *,
    recipe: RecipeLike | None = None,
    criterion: CriterionLike | None = None,
    rate: float | None = None,
    scope: Scope | None = None,
    select_by: SelectRule | None = None,
    reduce: Reduce | None = None,
    rates: Mapping[str, float] | None = None,
    only: Ignore | None = None,
    ignore: Ignore | None = None,
    min_channels: int | Mapping[str, int] | None = None,
    max_rate: float | Mapping[str, float] | None = None,
    round_to: int | Literal["auto"] | None = None,
    target: Mapping[str, float] | None = None,
    normalize: Normalize | None = None,
    sensitivity: Sensitivity | None = None,
    data: Any = None,
    loss: Loss | None = None,
    latency_table: Any = None,
    squeeze: Squeeze | Mapping[str, Any] | Literal[False] | None = None,
    scores: bool = False,
    progress: Progress | bool | None = None,
) -> Plan:
    """What to keep of every parameter, without writing a network; the options are `prune`'s.

    ``scores=True`` puts every channel's score into the plan.
    """
    given: Any = analysis
    if not isinstance(given, Analysis):
        kind = type(given).__name__
        raise OptionError(f"plan takes an Analysis, not a {kind}", hint="fxprune.analyze(model)")
    chosen = settings(recipe, _given(locals()))
    if recipe is not None:
        _check_analysed(analysis, chosen)
    check_finite(_weights(analysis))
    check_prunable(analysis)
    known = batches(data, device_of(analysis.model)) if chosen.found.needs else None
    with shown(progress) as seen:
        measured = _Measured(analysis, chosen, known, loss, latency_table, seen)
        return make_plan(analysis, chosen, silent, with_scores=scores, **measured()).plan


def _check_analysed(analysis: Analysis, chosen: Settings) -> None:
    """A recipe's options of analysis must be those the analysis was made with."""
    for name in _READ_BY:
        wanted, found = getattr(chosen, name), getattr(analysis, name)
        if wanted != found:
            recipe = chosen.recipe or "without a name"
            raise OptionError(
                f"recipe `{recipe}` needs an analysis with {name}={wanted!r}",
                hint=f"fxprune.analyze(model, {name}={wanted!r})",
            )


# -- apply -----------------------------------------------------------------------------------------


@torch.inference_mode(False)
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
    made = Made(plan, kept_by_plan(analysis, plan), _scores_in(plan))
    return _finish(analysis, made, verify, watch)


def _scores_in(plan: Plan) -> dict[int, np.ndarray]:
    """The scores that a plan holds, by group."""
    found = ((i, group.scores) for i, group in enumerate(plan.groups))
    return {i: np.asarray(scores) for i, scores in found if scores is not None}


def _analysis_for(model: nn.Module, plan: Plan, example_inputs: Any) -> Analysis:
    check_model(model)
    _check_plan(plan, tensors_of(model))
    if example_inputs is None and plan.inputs is not None:
        inputs = of_spec(plan.inputs)
        example_inputs = inputs.kwargs or inputs.args
    how: Any = {name: getattr(plan, name) for name in (*_READ_BY, "frontend")}
    return analyze(model, example_inputs, **how)


def _check_plan(plan: Any, tensors: Mapping[str, Tensor]) -> None:
    if not isinstance(plan, Plan):
        kind = type(plan).__name__
        raise PlanError(f"the plan is a {kind}, not a Plan", hint="Plan.from_json(text)")
    plan.check_fits(tensors)


def _finish(analysis: Analysis, made: Made, verify: Verify, watch: Watch) -> PrunedModule:
    plan, kept = made.plan, made.kept
    write = narrow if analysis.recorded else rewrite
    pruned: Any = write(analysis.model, analysis.flow, kept, plan.kept)
    watch("rewrite", (analysis, plan), pruned)
    info = Info(plan, _report(analysis, made, pruned))
    if analysis.recorded:
        pruned.fxprune = info
    else:
        pruned.meta["fxprune"] = info
    if verify:
        info.report.verification = _verified(analysis, plan, kept, pruned, verify)
    watch("verify", (analysis, plan), pruned)
    return pruned


def _verified(
    analysis: Analysis, plan: Plan, kept: Tensor, pruned: Any, verify: Verify
) -> Verification:
    if analysis.recorded:
        return _verified_copy(analysis, plan, kept, pruned, verify)
    verify_shapes(analysis.flow, pruned, analysis.inputs)
    on_meta = any(t.is_meta for t in analysis.tensors.values())
    if verify == "shapes" or on_meta:
        return Verification(True)
    widths = Widths(analysis.flow, kept)
    flow, inputs = analysis.flow, analysis.inputs
    return verify_numbers(analysis.model, flow, pruned, plan.kept, widths, inputs)


def _verified_copy(
    analysis: Analysis, plan: Plan, kept: Tensor, pruned: nn.Module, verify: Verify
) -> Verification:
    widths, numbers = Widths(analysis.flow, kept), verify != "shapes"
    model, flow, inputs = analysis.model, analysis.flow, analysis.inputs
    return verify_copy(model, flow, pruned, plan.kept, widths, inputs, numbers=numbers)


@torch.inference_mode(False)
def verify(
    model: nn.Module, pruned: nn.Module, plan: Plan, example_inputs: Any = None
) -> Verification:
    """Prove that `pruned` computes what `model` computes with the plan's channels masked.

    Raises `VerificationError` with the largest difference if it does not, `PlanError` if the plan
    is for another model, `ModelError` if `pruned` is not what `prune` or `apply` gives.
    """
    check_model(pruned)
    given: Any = pruned
    if not isinstance(given, fx.GraphModule if plan.frontend != "record" else type(model)):
        raise ModelError(
            f"a pruned network is needed, not {type(given).__name__}",
            hint="pass what fxprune.prune or fxprune.apply gave",
        )
    analysis = _analysis_for(model, plan, example_inputs)
    return _verified(analysis, plan, kept_by_plan(analysis, plan), pruned, True)


def _report(analysis: Analysis, made: Made, pruned: nn.Module) -> Report:
    plan, groups, left = made.plan, analysis.groups, _left(analysis, made.kept)
    planned = zip_longest(groups, left, (g.reason for g in plan.groups[: len(groups)]))
    rows = [
        Row(g.name, len(g), int(stay.sum()), len(g.members), why or "") for g, stay, why in planned
    ]
    layers = layer_rows(analysis, pruned, made.kept, plan.kept)
    scores = {i: Scores(own, left[i]) for i, own in made.scores.items() if len(own) == len(left[i])}
    return Report(
        model=plan.model,
        recipe=plan.recipe,
        criterion=plan.criterion,
        rate=plan.rate,
        scope=plan.scope,
        select_by=plan.select_by,
        frontend=analysis.frontend,
        inputs=analysis.inputs.describe(),
        guessed=analysis.inputs.guessed,
        groups=rows,
        layers=layers,
        scores=scores,
        params=(_count(analysis.model), _count(pruned)),
        macs=(analysis.macs(), analysis.macs(made.kept)),
        targets=made.reached,
        warnings=[*analysis.warnings, *plan.warnings],
        causes=analysis.causes() if analysis.share < _POOR else [],
    )


def _left(analysis: Analysis, kept: Tensor) -> list[np.ndarray]:
    """Which channels of each group the mask of kept ids leaves."""
    channel, gone = analysis.all_groups.channel, ~kept.numpy()
    stays = np.ones(int(channel.max()) + 1, bool)
    stays[channel[gone]] = False
    return [stays[g.channels] if g.prunable else np.ones(len(g), bool) for g in analysis.groups]


def _count(module: nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


@torch.inference_mode(False)
def count(
    model: nn.Module | Analysis, example_inputs: Any = None, *, plan: Plan | None = None
) -> Counts:
    """Parameters, MACs and FLOPs of a network, pruned or not, for one item of the batch.

    `example_inputs` as in `prune`; the counts are for their size. With `plan`, what the network
    would cost once the plan is applied, without writing it: `PlanError` if it is for another model.
    An `Analysis` in place of the model saves tracing again. See `fxprune.counters` for what each
    convention counts.
    """
    if plan is None:
        found = model if isinstance(model, Analysis) else analyze(model, example_inputs)
        return found.counts()
    if not isinstance(model, Analysis):
        model = _analysis_for(model, plan, example_inputs)
    _check_plan(plan, model.tensors)
    if plan.scatter != model.scatter:
        raise OptionError(
            f"the plan was made with scatter={plan.scatter}, the analysis with {model.scatter}",
            hint=f"fxprune.analyze(model, scatter={plan.scatter})",
        )
    return model.counts(kept_by_plan(model, plan))


__all__ = ["analyze", "apply", "count", "plan", "prune", "verify"]
