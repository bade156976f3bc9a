"""How long a network would take at other widths, from times of its ops on the user's device.

Each op is measured alone over a grid of widths: along the channels that it reads, and along those
that it makes. In between, times are interpolated linearly. What the network takes beside its ops is
one factor, by which the unpruned network's time is what was measured.
"""

from __future__ import annotations

import itertools
import json
import math
import time
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .alone import Alone, params_of
from .analysis import Analysis, analyze
from .check import check_count, device_of, usable_device
from .errors import InputError, OptionError, PlanError
from .ids import Value
from .inputs import batched, random_like
from .latencies import Progress, _on, _settings, _unseen
from .planning import kept_ids
from .select import Options, select
from .timings import Timings, default_folder, environment, timed_ms
from .trees import has_tensors, leaves
from .widths import RewriteError, Widths

_CALL_S = 0.01  # seconds a call is measured for in each pass
_WHOLE_S = 1.0  # and the whole network
_PASSES = 2
_FINE = 128  # channels; on wider axes, what a processor rounds widths up to is a small part
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


@dataclass(frozen=True)
class LatencyTable:
    """Times of a network's ops over widths.

    ``environment``  device, torch version, threads and dtype that were measured
    ``batch``        the batch size
    ``count``        how many ids the analysis has
    ``axes``         channels that get fewer together: an id of each
    ``entries``      the times of each node
    ``whole_ms``     what the unpruned network takes; 0 where it cannot be run
    ``unmeasured``   nodes that cannot be run alone; the factor covers them
    """

    environment: Mapping[str, Any]
    batch: int
    count: int
    axes: tuple[tuple[int, ...], ...]
    entries: tuple[Entry, ...]
    whole_ms: float = 0.0
    unmeasured: tuple[str, ...] = ()

    @classmethod
    def measure(
        cls,
        analysis: Analysis,
        *,
        device: str | torch.device | None = None,
        batch: int | None = None,
        points: int = 4,
        budget_s: float | None = None,
        cache: str | Path | None = None,
        progress: Progress | None = None,
        threads: int | None = None,
    ) -> LatencyTable:
        """Measure the ops of an analysed network.

        Args:
            device: where to measure; by default where the model is.
            batch: the batch size; by default that of the analysis' example inputs.
            points: how many widths along each axis, in equal steps up to all channels; the least
                possible one is added.
            budget_s: about how many seconds to measure for; every call is measured a few times,
                however long that takes. By default about 0.06 s a call.
            cache: folder of the times already known; by default ``FXPRUNE_CACHE``, or
                ``~/.cache/fxprune``. Calls that are known are not measured again.
            progress: called with what is measured and the share that is done.
            threads: of torch, while measuring; by default as many as it has.

        Raises `OptionError` for a network of which only a record exists, and for values that
        cannot be used.
        """
        _check(analysis, batch, points, budget_s, threads)
        analysis = _at_batch(analysis, batch)
        where = usable_device(device) if device is not None else _device(analysis)
        with _settings({"": analysis.model}, threads):
            dtype = str(_dtype(analysis)).removeprefix("torch.")
            folder = Path(cache) if cache is not None else default_folder()
            timings = Timings(where, environment(where, dtype), folder)
            whole = _whole_ms(analysis, where, budget_s)
            try:
                grid = _Grid(analysis, timings, points, budget_s)
                entries = grid.entries(progress or _unseen)
            finally:
                timings.save()
            whole = min(whole, _whole_ms(analysis, where, budget_s))
        size, env = analysis.flow.ids.count, timings.environment
        axes = tuple(grid.axes)
        return cls(env, analysis.batch, size, axes, entries, whole, tuple(grid.unmeasured))

    def ms(self, kept: Tensor | None = None) -> float:
        """Milliseconds of a call with only the ids in the mask `kept`; of the unpruned network
        without one."""
        if kept is not None and tuple(kept.shape) != (self.count,):
            raise OptionError(
                f"the mask has the shape {tuple(kept.shape)}, the network {self.count} ids",
                hint="the mask and the table must come from one analysis",
            )
        return self.scale * self._parts(kept)

    @cached_property
    def scale(self) -> float:
        """The unpruned network's time over the sum of its ops' times."""
        parts = self._parts(None)
        return self.whole_ms / parts if self.whole_ms and parts else 1.0

    def _parts(self, kept: Tensor | None) -> float:
        shares = [1.0 if kept is None else float(kept[ids].float().mean()) for ids in self._ids]
        return sum(surface(shares) for surface in self._surfaces)

    @cached_property
    def _ids(self) -> list[Tensor]:
        return [torch.tensor(axis) for axis in self.axes]

    @cached_property
    def _surfaces(self) -> list[_Surface]:
        """Entries over the same axes and widths are added up: sums of linear pieces are linear."""
        sums: dict[Any, np.ndarray] = {}
        for entry in self.entries:
            key = (entry.axes, entry.shares)
            sums[key] = sums.get(key, np.zeros(len(entry.ms))) + np.array(entry.ms)
        return [_Surface(axes, shares, ms) for (axes, shares), ms in sums.items()]

    def __str__(self) -> str:
        made = f"{len(self.entries)} ops on {self.environment['device']}, batch {self.batch}"
        return f"LatencyTable of {made}: {self.ms():.3f} ms unpruned"

    def to_json(self) -> str:
        """The table as JSON; `LatencyTable.from_json` reads it back equal."""
        return json.dumps({"format": 1, **asdict(self)})

    @classmethod
    def from_json(cls, text: str) -> LatencyTable:
        """Read a table; `PlanError` where the text is not one."""
        try:
            data = json.loads(text)
            if data.pop("format") != 1:
                raise ValueError("another format")
            data["axes"] = tuple(tuple(map(int, axis)) for axis in data["axes"])
            data["entries"] = tuple(_entry(each) for each in data["entries"])
            return cls(**{**data, "unmeasured": tuple(data["unmeasured"])})
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PlanError(
                f"not a table of times: {error}", hint="write tables with table.to_json()"
            ) from None


def _entry(data: Mapping[str, Any]) -> Entry:
    shares = tuple(tuple(map(float, each)) for each in data["shares"])
    entry = Entry(
        str(data["node"]), tuple(map(int, data["axes"])), shares, tuple(map(float, data["ms"]))
    )
    if math.prod(map(len, shares)) != len(entry.ms) or len(shares) != len(entry.axes):
        raise ValueError(f"the times of {entry.node} are no grid")
    return entry


class _Surface:
    """Times over the shares of up to two axes."""

    def __init__(
        self, axes: tuple[int, ...], shares: tuple[tuple[float, ...], ...], ms: np.ndarray
    ):
        from scipy.interpolate import RegularGridInterpolator  # takes its time to import

        self.axes, self.ends = axes, [(each[0], each[-1]) for each in shares]
        self.constant = float(ms[0])
        grid = ms.reshape([len(each) for each in shares])
        self.linear = RegularGridInterpolator(shares, grid) if axes else None

    def __call__(self, shares: list[float]) -> float:
        if self.linear is None:
            return self.constant
        ends = zip(self.axes, self.ends, strict=True)
        return self.linear([min(max(shares[a], low), high) for a, (low, high) in ends]).item()


# -- measuring -------------------------------------------------------------------------------------


class _Grid:
    """Measures each node of an analysis over its axes."""

    def __init__(self, analysis: Analysis, timings: Timings, points: int, budget_s: float | None):
        self.analysis, self.timings, self.budget_s = analysis, timings, budget_s
        self.channels, self.first = np.unique(analysis.all_groups.channel, return_index=True)
        self.levels = [_level(analysis, step / points) for step in range(points + 1)]
        self.above = [_level(analysis, step / points, 1) for step in range(1, points)]
        self.axes: dict[tuple[int, ...], int] = {}
        self.unmeasured: list[str] = []
        self.start = time.perf_counter()

    def entries(self, progress: Progress) -> tuple[Entry, ...]:
        """The entries of all nodes; calls not known before are measured once in each pass."""
        nodes = [node for node in self.analysis.graph.graph.nodes if _works(node)]
        found: list[Entry | None] = []
        for self.timings.turn in range(_PASSES):
            found = [self._timed(nodes, i, progress) for i in range(len(nodes))]
        self.unmeasured = [n.name for n, e in zip(nodes, found, strict=True) if e is None]
        return tuple(entry for entry in found if entry is not None)

    def _timed(self, nodes: list[fx.Node], i: int, progress: Progress) -> Entry | None:
        done, every = self.timings.turn * len(nodes) + i, _PASSES * len(nodes)
        progress(f"measure %{nodes[i].name}", done / every)
        if self.budget_s is None:
            return self._entry(nodes[i], None)
        left = self.budget_s - (time.perf_counter() - self.start)
        return self._entry(nodes[i], max(left, 0.0) / (every - done))

    def _entry(self, node: fx.Node, budget_s: float | None) -> Entry | None:
        """A node's times; over one width alone, where others cannot be written or run."""
        found = axes_of(self.analysis, node)
        for axes in (found, []) if found else ([],):
            try:
                return self._measured(node, axes, budget_s)
            except (RewriteError, InputError):
                continue
        return None

    def _measured(self, node: fx.Node, axes: list[np.ndarray], budget_s: float | None) -> Entry:
        steps = [self._steps(axis) for axis in axes]
        share = budget_s / 2 / math.prod(map(len, steps)) if budget_s is not None else _CALL_S
        ms = tuple(
            self.timings.ms(self._call(node, axes, levels), share)
            for levels in itertools.product(*(each.values() for each in steps))
        )
        shares = tuple(tuple(each) for each in steps)
        return Entry(node.name, tuple(map(self._number, axes)), shares, ms)

    def _steps(self, axis: np.ndarray) -> dict[float, np.ndarray]:
        """The shares that can be reached along an axis, ascending, and what stays at each."""
        levels = [*self.levels, *(self.above if len(axis) <= _FINE else ())]
        found = {float(level[axis].mean()): level for level in levels}
        return dict(sorted(found.items()))

    def _call(self, node: fx.Node, axes: Iterable[np.ndarray], levels: Iterable) -> Alone:
        kept = np.ones_like(self.levels[0])
        for axis, level in zip(axes, levels, strict=True):
            kept[axis] = level[axis]
        return Alone(self.analysis, node, kept_ids(self.analysis, kept))

    def _number(self, axis: np.ndarray) -> int:
        """An axis as one of the table's: an id of each of its channels."""
        ids = tuple(self.first[np.searchsorted(self.channels, axis)].tolist())
        return self.axes.setdefault(ids, len(self.axes))


def _level(analysis: Analysis, share: float, more: int = 0) -> np.ndarray:
    """What stays of all channels where each group keeps about a share of its own, and `more`."""
    groups = analysis.all_groups
    sizes = {i: len(group) for i, group in enumerate(groups.groups) if group.prunable}
    scores = {i: np.ones(size) for i, size in sizes.items()}
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


def _whole_ms(analysis: Analysis, device: torch.device, budget_s: float | None) -> float:
    if any(tensor.is_meta for tensor in analysis.tensors.values()):
        return 0.0
    inputs = random_like(analysis.inputs, dtype=_dtype(analysis), device=device)
    model = _on(device, analysis.model)
    return timed_ms(model, inputs, device, min(_WHOLE_S, budget_s or _WHOLE_S))


# -- arguments -------------------------------------------------------------------------------------


def _check(
    analysis: Analysis, batch: Any, points: Any, budget_s: float | None, threads: Any
) -> None:
    if analysis.recorded:
        raise OptionError(
            f"{type(analysis.model).__name__} has no graph whose ops could be measured one by one: "
            "it was only recorded",
            hint="give a budget of MACs instead, which is counted on the record",
        )
    check_count("points", points)
    for name, value in (("batch", batch), ("threads", threads)):
        if value is not None:
            check_count(name, value)
    if budget_s is not None and not 0 < budget_s < float("inf"):
        raise OptionError(f"budget_s={budget_s!r} must be a number of seconds above 0")


def _device(analysis: Analysis) -> torch.device:
    found = device_of(analysis.model)
    return torch.device("cpu") if found.type == "meta" else found


def _dtype(analysis: Analysis) -> torch.dtype | None:
    kinds = (p.dtype for p in analysis.model.parameters() if p.is_floating_point())
    return next(kinds, None)


def _at_batch(analysis: Analysis, batch: int | None) -> Analysis:
    """The analysis of inputs of another batch size, with the same ids."""
    if batch in (None, analysis.batch):
        return analysis
    inputs = batched(analysis.inputs, batch)
    how: Any = {
        name: getattr(analysis, name) for name in ("mixing", "scatter", "heads", "frontend")
    }
    found = analyze(analysis.model, inputs.kwargs or inputs.args, **how)
    if found.batch != batch or not np.array_equal(
        found.all_groups.channel, analysis.all_groups.channel
    ):
        raise OptionError(
            f"batch={batch} gives other channels than the analysis, of batch {analysis.batch}",
            hint="analyze with example inputs of the wanted batch, and leave batch out",
        )
    return found
