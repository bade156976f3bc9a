"""How much worse a network gets when a choice of channels of one group goes.

The channels are cut out, not masked: a smaller network is quicker than a masked one, and right as
well where a norm takes statistics over channels.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from .analysis import Analysis, analyze
from .api import check_prunable, pruned_by
from .check import device_of
from .copies import narrow
from .curves import unique
from .distilling import are_classes, classes, lost, said
from .errors import FxpruneError, InputError, ModelError, OptionError, first_line
from .frontends import Frontend
from .inputs import Inputs, given
from .planning import Made, bound_options, make_plan, plan_of, scored
from .rewrite import rewrite
from .select import Options, Selection, families, select
from .settings import Settings, settings
from .trees import leaves, mapped
from .watch import silent
from .widths import RewriteError

Loss = Callable[[Any, Any], Tensor]
Metric = Callable[[nn.Module, Any], float]
READ_BY = ("mixing", "scatter", "heads")


@dataclass(frozen=True)
class Question:
    """All that is asked, as it can be sent to another process. ``data`` is a list of batches unless
    there is a ``metric``; ``options`` are settings by name."""

    model: nn.Module
    data: Any
    inputs: Any
    options: Mapping[str, Any]
    loss: Loss | None = None
    metric: Metric | None = None
    frontend: Frontend | None = None
    strict: bool = False


class Point(NamedTuple):
    """One network to try: ``gone`` of the ``size`` channels of a family, at an asked ``rate``."""

    name: str
    rate: float
    gone: int
    size: int


class Damage:
    """Answers a `Question`. Two that are made of equal questions answer the same to the last bit,
    in whatever order they are asked."""

    def __init__(self, question: Question):
        self.asked, self.chosen = question, settings(None, question.options)
        _check_ranks(self.chosen)
        how: Any = {name: getattr(self.chosen, name) for name in READ_BY}
        self.analysis = analyze(
            question.model,
            question.inputs,
            frontend=question.frontend,
            strict=question.strict,
            **how,
        )
        _settle(self.analysis, lambda: make_plan(self.analysis, self.chosen, silent))
        self.options = bound_options(self.analysis, self.chosen)
        self.scores = scored(self.analysis, self.options, self.chosen)
        self.families = self._named()

    def _named(self) -> dict[str, list[int]]:
        """Groups that go together, by the name of their first that may be pruned."""
        groups = self.analysis.all_groups
        found: dict[str, list[int]] = {}
        left_out = {*self.options.outside, *self.options.ignored}
        for family in families(groups, self.scores):
            own = [i for i in sorted(family.groups) if i not in left_out]
            if own:
                found[unique(groups.groups[own[0]].name, found)] = own
        return found

    # -- choices -----------------------------------------------------------------------------------

    def points(self, rates: Sequence[float]) -> list[Point]:
        """The networks to try, each once: rates that take equally many channels are one."""
        found: dict[tuple[str, int], Point] = {}
        for name in self.families:
            for rate in rates:
                point = self._point(name, rate)
                if point.gone:
                    found.setdefault((name, point.gone), point)
        return list(found.values())

    def _point(self, name: str, rate: float) -> Point:
        channels = self._channels(name)
        gone = int((~self.selection(name, rate).kept[channels]).sum())
        return Point(name, rate, gone, len(channels))

    def _channels(self, name: str) -> np.ndarray:
        return np.concatenate([self.analysis.groups[i].channels for i in self.families[name]])

    def selection(self, name: str, rate: float) -> Selection:
        """What stays when one family loses a share of its channels and all others none."""
        others = set(range(len(self.analysis.groups))) - set(self.families[name])
        alone = replace(self.options, rate=rate, outside=frozenset(others))
        return select(self.analysis.all_groups, self._scores(alone), alone)

    def _scores(self, options: Options) -> Mapping[int, np.ndarray]:
        """Those of a set criterion depend on how many channels stay."""
        by_set = self.chosen.found.kind == "set"
        return scored(self.analysis, options, self.chosen) if by_set else self.scores

    # -- losses ------------------------------------------------------------------------------------

    def base(self) -> float:
        """The loss or metric of the unpruned network; `ModelError` where it is no finite number."""
        found = self._measured(self.asked.model)
        if not math.isfinite(found):
            what = "loss" if self.asked.metric is None else "metric"
            raise ModelError(
                f"the {what} of the unpruned network is {found}",
                hint="look at the data, and at the weights, for NaN and infinity",
            )
        return found

    def __call__(self, point: Point) -> float | None:
        """The loss or metric without a point's channels; None where no network can be written."""
        made = plan_of(self.analysis, self.selection(point.name, point.rate), self.chosen)
        try:
            network = _written(self.analysis, made)
        except RewriteError:
            return None
        return self._measured(network.eval())

    @torch.no_grad()
    def _measured(self, network: nn.Module) -> float:
        if self.asked.metric is not None:
            return _number("metric", _metric(self.asked, network))
        total, count = 0.0, 0
        for i, (inputs, target) in enumerate(self._batches()):
            size = _samples(inputs)
            output = _run(network, inputs, i)
            total += _number("loss", self._loss(output, target, i)) * size
            count += size
        return total / count

    @cached_property
    @torch.no_grad()
    def _own(self) -> list[Any]:
        """The unpruned network's outputs, batch by batch."""
        model = self.asked.model
        return [_run(model, inputs, i) for i, (inputs, _) in enumerate(self._batches())]

    def _batches(self) -> Iterator[tuple[Inputs, Any]]:
        device = device_of(self.asked.model)
        for batch in self.asked.data:
            here = mapped(lambda t: t.to(device) if isinstance(t, Tensor) else t, as_batch(batch))
            yield given(here[0], self.asked.model), here[1]

    def _loss(self, output: Any, target: Any, i: int) -> Any:
        if self.asked.loss is not None:
            return lost(self.asked.loss, output, target)
        first: Any = next(iter(leaves(output, Tensor)), None)
        if are_classes(first, target):
            return F.cross_entropy(first, classes(first, target))
        if _is_like(target, first):
            return _squared(first, target)
        return _squared(output, self._own[i])


def as_batch(batch: Any) -> tuple[Any, Any]:
    """A batch's inputs and target: a pair is both, all else is inputs alone."""
    if isinstance(batch, (tuple, list)):
        return (batch[0], batch[1]) if len(batch) == 2 else (tuple(batch), None)
    return batch, None


def _check_ranks(chosen: Settings) -> None:
    if chosen.found.needs:
        raise OptionError(
            f"criterion `{chosen.found}` needs data, and sensitivity ranks channels by weights",
            hint="a criterion of weights, as l2 or geometric_median; `data` are for the loss",
        )


def _run(network: nn.Module, inputs: Inputs, number: int) -> Any:
    """What a network gives for a batch; `InputError` where it does not run on it."""
    try:
        return network(*inputs.args, **inputs.kwargs)
    except (FxpruneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"the network does not run on batch {number} of data: {first_line(error)}",
            details=[("batch", inputs.describe())],
            hint="a batch is inputs as in example_inputs, or a pair (inputs, target)",
        ) from error


def _metric(asked: Question, network: nn.Module) -> Any:
    try:
        return asked.metric(network, asked.data) if asked.metric is not None else None
    except (FxpruneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        hint = "it is called with a network and `data`, as they were given"
        raise OptionError(f"metric fails: {first_line(error)}", hint=hint) from error


def _is_like(target: Any, output: Any) -> bool:
    """Whether a target holds floats, one for each of the output's."""
    both = isinstance(target, Tensor) and isinstance(output, Tensor)
    return both and target.is_floating_point() and target.shape == output.shape


def _number(what: str, found: Any) -> float:
    try:
        return float(found)
    except (TypeError, ValueError, RuntimeError):
        hint = "one number" if what == "loss" else "one number: the larger, the better"
        raise OptionError(f"{what} gives {said(found)}", hint=hint) from None


def _settle(analysis: Analysis, make: Callable[[], Made]) -> None:
    """Freeze what turns out to be in the way of writing, before any choice is numbered."""
    check_prunable(analysis)
    pruned_by(analysis, make, False, silent)


def _written(analysis: Analysis, made: Made) -> Any:
    write = narrow if analysis.recorded else rewrite
    return write(analysis.model, analysis.flow, made.kept, made.plan.kept)


def _samples(inputs: Inputs) -> int:
    tensors = leaves((inputs.args, inputs.kwargs), Tensor)
    return next((t.shape[0] for t in tensors if t.ndim), 1)


def _squared(output: Any, own: Any) -> float:
    """The mean squared difference over all elements of all outputs that are real numbers."""
    pairs = [
        (a, b)
        for a, b in zip(leaves(output, Tensor), leaves(own, Tensor), strict=True)
        if a.is_floating_point()
    ]
    if not pairs:
        raise OptionError(
            "the network gives no real numbers, whose squared differences could be taken",
            hint="loss= takes a function of an output and a target",
        )
    summed = sum(float((a.double() - b.double()).square().sum()) for a, b in pairs)
    return summed / max(1, sum(a.numel() for a, _ in pairs))
