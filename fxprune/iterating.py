"""Pruning in several steps, with training of one's own between them.

Every step chooses anew among the channels of the *original*: those that went before go again, and
the others are scored by the weights that training gave them. So rates, floors, rounding and
rankings over the whole network mean what they mean in one step, nothing drifts, and each step's
plan can be applied to the original.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, fields, replace
from functools import partial
from itertools import pairwise
from typing import Any, Literal

import numpy as np
import torch
from torch import nn

from .analysis import Analysis
from .api import analyze, check_prunable, compensated, pruned_by
from .batches import batches
from .calibration import Calibration, Loss, calibrate
from .check import check_count, check_model, clone, device_of, tensors_of
from .compensation import Compensate, check_compensate
from .errors import ModelError, OptionError
from .groups import Member
from .ignore import by_name
from .planning import make_plan
from .plans import Plan
from .progress import unseen
from .pruned import PrunedModule
from .score import score
from .select import Options, asked_widths
from .settings import Settings, settings
from .spread import spread
from .watch import silent

Schedule = Literal["linear", "geometric"] | Callable[[float], float]
_READ_BY = ("mixing", "scatter", "heads")
_AS_IT_IS = "train the network that was handed out, and leave its layers as they are"
_AS_BEFORE = "give the options of the loop that start is from; or iterate without start"
_OPTIONS = "rate, criterion, scope, ... as in fxprune.prune; dumps are of single prunings"


def iterate(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    steps: int = 5,
    schedule: Schedule = "linear",
    verify: bool | Literal["shapes"] = True,
    frontend: Literal["symbolic", "export", "record"] | None = None,
    strict: bool = False,
    start: nn.Module | None = None,
    data: Any = None,
    loss: Loss | None = None,
    compensate: Compensate | bool | None = None,
    recipe: Any = None,
    **options: Any,
) -> Iterator[PrunedModule]:
    """Prune a little, train a little: ``for pruned in fxprune.iterate(model, x): train(pruned)``.

    Each network is smaller than the one before and begins with its weights, as they are when the
    loop goes on; train the network that was handed out, in place. The last one has the rate that
    was asked of the original. ``pruned.fxprune.plan`` and the report are of the original, which is
    not changed. Parameters are new ones at every step: make a new optimizer for each.

    Args:
        model: any `torch.nn.Module`.
        example_inputs: as in `fxprune.prune`.
        steps: how many networks are handed out.
        schedule: how the rate grows: "linear", "geometric" (each step takes the same share of what
            is left), or a function from the share of steps done, in (0, 1], to that of the rate.
        verify: as in `fxprune.prune`, at every step.
        frontend: as in `fxprune.prune`.
        strict: as in `fxprune.prune`.
        start: a network that an earlier loop handed out, trained or loaded since: the loop goes on
            with the steps after it. `model` is the original, and options are of the same kind, a
            rate or a target of the same things, as in that loop.
        data: as in `fxprune.prune`: at every step, criteria ask it of the trained network.
        loss: as in `fxprune.prune`.
        compensate: as in `fxprune.prune`: each network is fitted to the trained one before it.
        recipe: as in `fxprune.prune`.
        options: rate, or a target in shares, criterion, scope and the others of `fxprune.prune`
            that choose channels.

    Raises what `fxprune.prune` raises, and `ModelError` where a handed out network was changed in
    other ways than by training. At the first step already, not when the loop begins.
    """
    check_count("steps", steps)
    check_model(model)
    named: dict[str, Any] = {
        option: by_name(options[option], model)
        for option in ("only", "ignore")
        if option in options
    }
    unknown = options.keys() - {each.name for each in fields(Settings)}
    if unknown:
        raise OptionError(f"iterate has no option `{min(unknown)}`", hint=_OPTIONS)
    chosen = settings(recipe, {**options, **named})
    _check_target(chosen)
    grows = _growth(schedule)
    how: Any = {name: getattr(chosen, name) for name in _READ_BY}
    whole = clone(model)  # it gets the trained weights
    analysis = analyze(whole, example_inputs, frontend=frontend, strict=strict, **how)
    check_prunable(analysis)
    rates = [grows(k / steps, chosen) for k in range(1, steps + 1)]
    if any(_asked(a) > _asked(b) for a, b in pairwise(rates)):
        raise OptionError("schedule falls", hint="channels that went do not come back")
    if start is not None:
        begun = _plan_of(start, analysis)
        _check_start(begun, chosen)
        done = _asked(begun)
        rates = [at for at in rates if _asked(at) > done + 1e-9]
    fits = check_compensate(compensate)
    known = batches(data, device_of(model)) if fits or chosen.found.needs else None
    return _steps(analysis, rates, verify, start, _Data(known, loss, fits))


@dataclass(frozen=True)
class _Data:
    """What steps do with data."""

    batches: Any
    loss: Loss | None
    fits: Compensate | None

    def calibration(self, analysis: Analysis, chosen: Settings) -> Calibration | None:
        needs = chosen.found.needs
        return calibrate(analysis, self.batches, needs, self.loss) if needs else None

    def finish(self, analysis: Analysis) -> Any:
        how = self.fits
        return partial(compensated, analysis, self.batches, how, silent, unseen) if how else None


def _asked(at: Settings | Plan) -> float:
    """How much a step takes: its rate, or what its targets leave."""
    return at.rate or 0.0 if not at.target else -sum(at.target.values())


def _check_target(chosen: Settings) -> None:
    for kind, amount in (chosen.target or {}).items():
        if kind == "latency_ms" or amount > 1:
            raise OptionError(
                f"target[{kind!r}]={amount:g} is no share, and steps go by shares",
                hint='target={"macs": 0.5}',
            )


def _plan_of(start: Any, analysis: Analysis) -> Plan:
    plan = getattr(getattr(start, "fxprune", None), "plan", None)
    if not isinstance(plan, Plan):
        raise ModelError(
            f"start is a {type(start).__name__}, and no pruned network",
            hint="pass what fxprune.iterate handed out, or fxprune.load gave",
        )
    plan.check_fits(analysis.tensors)
    return plan


def _check_start(begun: Plan, chosen: Settings) -> None:
    """Raise `OptionError` where the start was made by another kind of request: how far it is on the
    way to this one cannot be told, as rates cannot be compared with targets."""
    for kind, amount in begun.target.items():
        if kind == "latency_ms" or amount > 1:
            raise OptionError(f"start was made for {amount:g} {kind}, no share", hint=_AS_BEFORE)
    before, now = _request(begun.target), _request(chosen.target or {})
    if before != now:
        raise OptionError(f"start was made {before}, not {now}", hint=_AS_BEFORE)
    for name in _READ_BY:
        own, wanted = getattr(begun, name), getattr(chosen, name)
        if own != wanted:
            raise OptionError(
                f"start was made with {name}={own!r}, not {wanted!r}", hint=_AS_BEFORE
            )


def _request(target: Mapping[str, float]) -> str:
    return f"for {' and '.join(sorted(target))}" if target else "by a rate"


def _steps(
    analysis: Analysis, rates: list[Settings], verify: Any, start: Any, data: _Data
) -> Iterator[PrunedModule]:
    pruned, names = start, None
    for at in rates:
        how: dict[str, Any] = {}
        if pruned is None:
            how["calibration"] = data.calibration(analysis, at)
        else:
            how["scorer"] = _Trained(analysis, pruned, data)
            _check_same(pruned, names)
            _put_back(analysis.model, pruned, pruned.fxprune.plan)
        make = partial(make_plan, analysis, at, silent, **how)
        pruned = pruned_by(analysis, make, verify, silent, data.finish(analysis))
        names = set(tensors_of(pruned))
        yield pruned


def _check_same(pruned: nn.Module, names: set[str] | None) -> None:
    """A network that was handed out may be trained, and not be changed otherwise."""
    changed = names ^ set(tensors_of(pruned)) if names is not None else ()
    if changed:
        raise ModelError(f"`{min(changed)}` came or went in training", hint=_AS_IT_IS)


def _example(analysis: Analysis) -> Any:
    return analysis.inputs.kwargs or analysis.inputs.args


# -- schedules -------------------------------------------------------------------------------------


def _growth(schedule: Schedule) -> Callable[[float, Settings], Settings]:
    """The settings of a step, from the share of steps done."""
    shapes: dict[str, Callable[[float, float], float]] = {
        "linear": lambda done, rate: rate * done,
        "geometric": lambda done, rate: 1 - (1 - rate) ** done,
    }
    if callable(schedule):
        shape = lambda done, rate: rate * _share(schedule(done))  # noqa: E731
    elif schedule in shapes:
        shape = shapes[schedule]
    else:
        raise OptionError(
            f"schedule={schedule!r} is not known",
            details=[("known", ", ".join(shapes))],
            hint="or a function from the share of steps done to that of the rate",
        )

    def grows(done: float, chosen: Settings) -> Settings:
        if chosen.target is not None:
            left = {kind: 1 - shape(done, 1 - share) for kind, share in chosen.target.items()}
            return replace(chosen, target=left)
        rates = {pattern: shape(done, rate) for pattern, rate in chosen.rates.items()}
        return replace(chosen, rate=shape(done, chosen.rate), rates=rates)

    return grows


def _share(value: Any) -> float:
    if not isinstance(value, (int, float)) or not 0 <= value <= 1:
        raise OptionError(f"schedule gives {value!r}", hint="a share of the rate, from 0 to 1")
    return float(value)


# -- scores of what is left ------------------------------------------------------------------------


class _Trained:
    """Scores of the original's channels: those of the trained network, and lower ones for what went
    before."""

    def __init__(self, analysis: Analysis, pruned: Any, data: _Data):
        self.data = data
        self.analysis, self.plan = analysis, pruned.fxprune.plan
        how: Any = {name: getattr(analysis, name) for name in (*_READ_BY, "frontend")}
        self.small = analyze(pruned, _example(analysis), **how)

    def __call__(self, options: Options, chosen: Settings) -> dict[int, np.ndarray]:
        places = list(self._places())
        keep = None
        if chosen.found.kind == "set":
            widths = asked_widths(self.analysis.all_groups, options)
            keep = {
                i: _width(widths, groups, i, self.small) for i, (groups, _) in enumerate(places)
            }
        groups, tensors = self.small.all_groups, self.small.tensors
        how: Any = {"reduce": chosen.reduce, "keep": keep}
        how["calibration"] = self.data.calibration(self.small, chosen)
        found = score(groups, tensors, chosen.found, **how)
        scores = {
            i: np.full(len(group), np.nan)
            for i, group in enumerate(self.analysis.groups)
            if group.prunable
        }
        for i, values in found.items():
            for group, channel, value in zip(*places[i], values, strict=True):
                if group in scores:
                    scores[int(group)][channel] = value
        return {i: _gone_first(values) for i, values in scores.items()}

    def _places(self) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """For each group of the trained network, where its channels are in the original: the number
        of the group, and that of the channel in it."""
        owners: dict[tuple[str, int], dict[int, tuple[int, int]]] = {}
        for i, group in enumerate(self.analysis.groups):
            for member in group.members:
                own = owners.setdefault((member.param, member.dim), {})
                first = member.positions.reshape(len(group), -1)[:, 0].tolist()
                own.update({at: (i, channel) for channel, at in enumerate(first)})
        for group in self.small.groups:
            known = [m for m in group.members if (m.param, m.dim) in owners]
            if not known:
                raise ModelError(f"the original has no {group.members[0].param}", hint=_AS_IT_IS)
            member = known[0]
            at = _before(member, len(group), self.plan)
            found = [owners[member.param, member.dim][each] for each in at.tolist()]
            yield np.array([i for i, _ in found]), np.array([c for _, c in found])


def _before(member: Member, size: int, plan: Plan) -> np.ndarray:
    """Where a member's channels lay before the plan was applied."""
    now = member.positions.reshape(size, -1)[:, 0]
    kept = plan.kept.get(member.param, {}).get(member.dim)
    if kept is None:
        return now
    if not isinstance(kept[0], list):
        return np.asarray(kept)[now]
    rows = np.asarray(kept)
    width = plan.shapes[member.param][member.dim]
    block, within = np.divmod(now, rows.shape[1])
    return rows[block, within] + block * width


def _width(widths: Mapping[int, int], groups: np.ndarray, i: int, small: Analysis) -> int:
    """How many channels a set criterion keeps of a group of the trained network."""
    return min(widths[int(groups[0])], len(small.groups[i]))


def _gone_first(values: np.ndarray) -> np.ndarray:
    """Channels without a score went before: they go first again."""
    gone = np.isnan(values)
    low = np.nanmin(values) if not gone.all() else 0.0
    return np.where(gone, 0.0 if low > 0 else low - 1.0, values)  # no share of a sum, where it can


# -- weights of what is left -----------------------------------------------------------------------


@torch.no_grad()
def _put_back(whole: nn.Module, pruned: nn.Module, plan: Plan) -> None:
    """Put a trained network's tensors where they were in the original; what went is zero."""
    target, found = tensors_of(whole), tensors_of(pruned)
    for name, tensor in target.items():
        if name not in found:
            continue
        kept = plan.kept.get(name, {})
        if not kept and tensor.shape != found[name].shape:
            raise ModelError(
                f"{name} is {list(found[name].shape)} after training, and was {list(tensor.shape)}",
                hint=_AS_IT_IS,
            )
        tensor.copy_(spread(found[name], tensor, kept) if kept else found[name])
    for name, module in whole.named_modules():
        if name in dict(pruned.named_modules()):
            module.training = pruned.get_submodule(name).training
