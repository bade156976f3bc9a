"""Which widths each node of a graph is measured at, and measuring it there.

A node's time depends on a few sets of channels, its *axes*: mostly those that it reads and those
that it makes. Times have steps: a processor rounds widths up to a multiple of what it computes at
once. So beside each width of the grid, the one above it is measured too.
"""

from __future__ import annotations

import hashlib
import itertools
import time
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, fx, nn

from .alone import Alone, params_of
from .analysis import Analysis
from .errors import InputError
from .ids import Value
from .planning import kept_ids
from .progress import Progress
from .select import Options, select
from .timings import Timings
from .trees import has_tensors, leaves
from .widths import RewriteError, Widths

_FINE = 256  # channels; on wider axes a step is a small part of the time
_AXES = 2


@dataclass(frozen=True)
class Entry:
    """The times of one node. ``axes`` are numbers of the table's axes, ``shares`` the widths that
    were measured along each, ascending, as shares of its channels; ``ms`` holds a time for each
    combination, those of the last axis beside each other."""

    node: str
    axes: tuple[int, ...]
    shares: tuple[tuple[float, ...], ...]
    ms: tuple[float, ...]


@dataclass(frozen=True, eq=False)
class _Point:
    """A node with some channels left along its axes."""

    node: fx.Node
    axes: list[np.ndarray]
    levels: tuple[np.ndarray, ...]


@dataclass(frozen=True, eq=False)
class _Draft:
    """An entry whose times are still names of calls."""

    node: fx.Node
    axes: list[np.ndarray]
    shares: tuple[tuple[float, ...], ...]
    calls: list[str]


class Grid:
    """Measures the nodes of an analysis. ``axes`` numbers what it finds, an id a channel;
    ``unmeasured`` are nodes that cannot be run alone; ``name`` is that of all networks which have
    these ops, once they are measured."""

    def __init__(
        self,
        analysis: Analysis,
        timings: Timings,
        points: int,
        budget_s: float | None,
        progress: Progress,
    ):
        self.analysis, self.timings = analysis, timings
        self.clock = _Clock(budget_s)
        self.progress = progress
        steps = [step / points for step in range(points + 1)]
        self.levels = [level(analysis, share) for share in steps]
        self.above = [level(analysis, share, 1) for share in steps[1:-1]]
        self.channels, self.first = np.unique(analysis.all_groups.channel, return_index=True)
        self.axes: dict[tuple[int, ...], int] = {}
        self.unmeasured: list[str] = []
        self.name = ""
        self.fresh: list[_Point] = []

    def masks(self) -> list[Tensor]:
        """Masks over ids at the least widths, and at equal steps up to all channels."""
        return [kept_ids(self.analysis, each) for each in self.levels]

    def entries(self) -> tuple[Entry, ...]:
        """The times of all nodes. What was not known is measured in two passes, of which the lower
        time counts: what disturbs a machine for a while only adds to times."""
        nodes = [node for node in self.analysis.graph.graph.nodes if _works(node)]
        drafts: list[_Draft] = []
        for i, node in enumerate(nodes):
            self.progress(f"measure %{node.name}", i / len(nodes) / 2)
            drafts += self._draft(node, self.clock.share(0.5, len(nodes) - i))
        self._measure_again()
        calls = (name for draft in drafts for name in draft.calls)
        self.name = hashlib.sha256("\n".join(calls).encode()).hexdigest()[:16]
        return tuple(map(self._entry, drafts))

    def _measure_again(self) -> None:
        for i, point in enumerate(self.fresh):
            budget_s = self.clock.share(1.0, len(self.fresh) - i)
            if budget_s == 0:
                return
            self.progress(f"measure %{point.node.name} again", (1 + i / len(self.fresh)) / 2)
            self._measure(self._call(point), budget_s)

    def _draft(self, node: fx.Node, budget_s: float | None) -> list[_Draft]:
        """A node over its axes; at one width alone, where others cannot be written or run."""
        found = axes_of(self.analysis, node)
        for axes in (found, []) if found else ([],):
            try:
                return [self._measured(node, axes, budget_s)]
            except (RewriteError, InputError):
                continue
        self.unmeasured.append(node.name)
        return []

    def _measured(self, node: fx.Node, axes: list[np.ndarray], budget_s: float | None) -> _Draft:
        axes = [axis for axis in axes if len(self._steps(axis)) > 1]
        steps = [self._steps(axis) for axis in axes]
        places = [*itertools.product(*(each.values() for each in steps))]
        share = None if budget_s is None else budget_s / len(places)
        calls = [self._time(_Point(node, axes, levels), share) for levels in places]
        return _Draft(node, axes, tuple(tuple(each) for each in steps), calls)

    def _steps(self, axis: np.ndarray) -> dict[float, np.ndarray]:
        """The shares that can be reached along an axis, ascending, and what stays at each."""
        levels = [*self.levels, *(self.above if len(axis) <= _FINE else ())]
        found = {float(each[axis].mean()): each for each in levels}
        return dict(sorted(found.items()))

    def _time(self, point: _Point, budget_s: float | None) -> str:
        """The name of the call, once its time is known."""
        call = self._call(point)
        if call.signature not in self.timings.known:
            self._measure(call, budget_s)
            self.fresh.append(point)
        return call.signature

    def _measure(self, call: Alone, budget_s: float | None) -> None:
        module, inputs = call.module(self.timings.device), call.inputs(self.timings.device)
        try:
            self.timings.again(call.signature, module, inputs, budget_s)
        finally:
            _emptied(module)

    def _call(self, point: _Point) -> Alone:
        kept = np.ones_like(self.levels[0])
        for axis, left in zip(point.axes, point.levels, strict=True):
            kept[axis] = left[axis]
        return Alone(self.analysis, point.node, kept_ids(self.analysis, kept))

    def _entry(self, draft: _Draft) -> Entry:
        ms = tuple(self.timings.known[name] for name in draft.calls)
        return Entry(draft.node.name, tuple(map(self._number, draft.axes)), draft.shares, ms)

    def _number(self, axis: np.ndarray) -> int:
        ids = tuple(self.first[np.searchsorted(self.channels, axis)].tolist())
        return self.axes.setdefault(ids, len(self.axes))


def _emptied(module: nn.Module) -> None:
    """Let go of tensors now: a module of torch.fx is a cycle, which waits for the collector."""
    for each in module.modules():
        each._parameters.clear()
        each._buffers.clear()


class _Clock:
    """Deals out the seconds there are; without a number of them, the usual ones a call."""

    def __init__(self, budget_s: float | None):
        self.budget_s, self.start = budget_s, time.perf_counter()

    def share(self, part: float, count: int) -> float | None:
        """For one of `count` things, of what is left of that part of the time."""
        if self.budget_s is None:
            return None
        left = self.budget_s * part - (time.perf_counter() - self.start)
        return max(left, 0.0) / count


def level(analysis: Analysis, share: float, more: int = 0) -> np.ndarray:
    """Which channels stay where each group keeps about a share of its own, and `more`; one at
    least, and what constraints ask for. They lie anywhere, as those of a pruning do: others might
    spare a gather."""
    groups = analysis.all_groups
    sizes = {i: len(group) for i, group in enumerate(groups.groups) if group.prunable}
    scores = {i: 1.0 + np.random.default_rng(i).permutation(n) for i, n in sizes.items()}
    widths = {i: min(size, max(1, round(size * share) + more)) for i, size in sizes.items()}
    return select(groups, scores, Options(widths=widths)).kept


def axes_of(analysis: Analysis, node: fx.Node) -> list[np.ndarray]:
    """Channels that a node's time depends on, in sets that a width of their own is measured for.

    Channels of one layer of ids are in one set, and so are those of layers that share any: a sum of
    parts is as wide as all of them. The two largest sets are free; others move with the second.
    """
    sets: list[np.ndarray] = []
    for ids in _layers(analysis, node):
        own = np.unique(analysis.all_groups.channel[ids.reshape(-1).numpy()])
        own = own[own > 0]
        near = [each for each in sets if np.intersect1d(each, own).size]
        sets = [each for each in sets if not any(each is one for one in near)]
        sets += [np.unique(np.concatenate([own, *near]))] if own.size else []
    sets.sort(key=len, reverse=True)
    rest = sets[_AXES - 1 :]
    return [*sets[: _AXES - 1], np.unique(np.concatenate(rest))] if rest else sets


def _layers(analysis: Analysis, node: fx.Node) -> list[Tensor]:
    """Ids of what a node reads, gives, and has for parameters."""
    flow = analysis.flow
    widths = Widths(flow, torch.empty(0))
    values = [flow.values.get(each) for each in (*node.all_input_nodes, node)]
    layers = [la.ids for each in values for v in leaves(each, Value) for la in widths.layers(v)]
    names = params_of(analysis, node)
    return layers + [slot.ids for name in names for slot in flow.ids.slots.get(name, ())]


def _works(node: fx.Node) -> bool:
    called = node.op in ("call_module", "call_function", "call_method")
    return called and has_tensors(node.meta["val"])
