"""How long a network would take at other widths, from times of its ops on the user's device.

Each op is measured alone over a grid of widths: along the channels that it reads, and along those
that it makes. In between, times are interpolated linearly. What whole networks take beside their
ops is told by a few that were measured.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .analysis import Analysis, analyze
from .check import check_count, device_of, usable_device
from .costs import Term
from .errors import OptionError, PlanError
from .inputs import batched
from .latencies import _settings
from .latency_grid import Entry, Grid
from .latency_network import network_of
from .latency_wholes import dtype_of, whole_times
from .progress import Progress, shown
from .timings import Timings, default_folder, environment


@dataclass(frozen=True)
class LatencyTable:
    """Times of a network's ops over widths.

    ``environment``  device, torch version, threads and dtype that were measured
    ``batch``        the batch size
    ``count``        how many ids the analysis has
    ``axes``         channels that get fewer together: an id of each
    ``entries``      the times of each node
    ``alone_ms``     what the ops of networks at a few widths take, each measured alone; ascending
    ``whole_ms``     what these networks take, the last of which is the unpruned one
    ``unmeasured``   nodes that cannot be run alone; whole networks cover them
    ``network``      a hash of ops, widths and the size of inputs, without the batch: networks that
                     share it share a table
    """

    environment: Mapping[str, Any]
    batch: int
    count: int
    axes: tuple[tuple[int, ...], ...]
    entries: tuple[Entry, ...]
    alone_ms: tuple[float, ...] = ()
    whole_ms: tuple[float, ...] = ()
    unmeasured: tuple[str, ...] = ()
    network: str = ""

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
        progress: Progress | bool | None = None,
        threads: int | None = None,
    ) -> LatencyTable:
        """Measure the ops of an analysed network, best while the machine does nothing else: what is
        found is remembered.

        Args:
            device: where to measure; by default where the model is.
            batch: the batch size; by default that of the analysis' example inputs. A pruning for
                inputs of another batch size takes the table, and its report says so.
            points: how many widths along each axis, in equal steps up to all channels; the least
                possible one is added.
            budget_s: about how many seconds to measure for; every call is made a few times, however
                long that takes. By default about 0.04 s a call.
            cache: folder of the times already known; by default ``FXPRUNE_CACHE``, or
                ``~/.cache/fxprune``. Calls that are known are not measured again.
            progress: True for a bar on stderr, or a function, which is called with what is measured
                and the share that is done.
            threads: of torch, while measuring; by default as many as it has.

        Raises `OptionError` for a network of which only a record exists, and for values that
        cannot be used.
        """
        _check(analysis, batch, points, budget_s, threads)
        analysis = _at_batch(analysis, batch)
        where = usable_device(device) if device is not None else _device(analysis)
        folder = Path(cache) if cache is not None else default_folder()
        with shown(progress) as seen, _settings({"": analysis.model}, threads):
            timings = Timings(where, environment(where, dtype_of(analysis)), folder)
            try:
                return _measured(analysis, timings, points, budget_s, seen)
            finally:
                timings.save()  # what is known need not be measured again, whatever happened

    def check_fits(self, analysis: Analysis) -> None:
        """Raise `OptionError` if the table is of another network than the analysed one. Tables in
        files of older versions do not say of which they are; their ids must be there at least."""
        same = self.network in ("", network_of(analysis))
        if not same or self.count != analysis.flow.ids.count:
            raise OptionError(
                f"the latency_table is of another network than {type(analysis.model).__name__} "
                f"on {analysis.inputs.describe()}",
                details=[("table", str(self))],
                hint="measure one with the same example inputs, batch and options: "
                "fxprune.LatencyTable.measure(fxprune.analyze(model, x))",
            )

    def ms(self, kept: Tensor | None = None) -> float:
        """Milliseconds of a call with only the ids in the mask `kept`; of the unpruned network
        without one."""
        if kept is not None and tuple(kept.shape) != (self.count,):
            raise OptionError(
                f"the mask has the shape {tuple(kept.shape)}, the network {self.count} ids",
                hint="the mask and the table must come from one analysis",
            )
        return self.whole_of(self.parts_ms(kept))

    def parts_ms(self, kept: Tensor | None = None) -> float:
        """The sum of what the ops take alone."""
        kept = torch.ones(self.count, dtype=torch.bool) if kept is None else kept
        return sum(_at(surface, self._ids, kept) for surface in self._surfaces)

    def whole_of(self, parts: float) -> float:
        """What a network takes whose ops alone take so long."""
        return _mapped(parts, self.alone_ms, self.whole_ms)

    def parts_of(self, whole: float) -> float:
        """What the ops of a network may take alone, if it shall take so long; 0 where none does."""
        low, high = 0.0, max(self.alone_ms[-1] if self.alone_ms else whole, whole) * 4
        for _ in range(60):
            middle = (low + high) / 2
            low, high = (middle, high) if self.whole_of(middle) <= whole else (low, middle)
        return low

    def terms(self, analysis: Analysis) -> Iterator[Term]:
        """What ops take alone, as summands of a cost."""
        channel = analysis.all_groups.channel
        for surface in self._surfaces:
            ids = [self._ids[axis] for axis in surface.axes]
            found = np.unique(channel[torch.cat(ids).numpy()]) if ids else np.zeros(0, np.int64)
            yield Term(partial(_at, surface, self._ids), found[found > 0])

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
            for name in ("alone_ms", "whole_ms"):
                data[name] = tuple(map(float, data[name]))
            table = cls(**{**data, "unmeasured": tuple(data["unmeasured"])})
            if not isinstance(table.network, str):
                raise ValueError("the name of the network is no text")
            _check_sound(table)
            return table
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PlanError(
                f"not a table of times: {error}", hint="write tables with table.to_json()"
            ) from None


def _measured(
    analysis: Analysis, timings: Timings, points: int, budget_s: float | None, progress: Progress
) -> LatencyTable:
    ops, rest = (None, None) if budget_s is None else (budget_s * 0.8, budget_s * 0.2)
    grid = Grid(analysis, timings, points, ops, progress)
    entries = grid.entries()
    progress("measure whole networks", 1.0)
    found = whole_times(analysis, grid.masks(), timings, grid.name, rest)
    size, axes = analysis.flow.ids.count, tuple(grid.axes)
    missed = tuple(grid.unmeasured)
    table = LatencyTable(
        timings.environment,
        analysis.batch,
        size,
        axes,
        entries,
        unmeasured=missed,
        network=network_of(analysis),
    )
    alone, whole = _rising([(table.parts_ms(mask), ms) for mask, ms in found])
    return replace(table, alone_ms=alone, whole_ms=whole)


def _rising(pairs: list[tuple[float, float]]) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Times of ops and of networks without those that are no less than a wider one's; the last
    pair, of the unpruned network, stays."""
    found = [pair for pair in pairs[-1:] if pair[0] > 0]
    for parts, whole in sorted(pairs[:-1], reverse=True):
        if found and 0 < parts < found[0][0] and whole <= found[0][1]:
            found.insert(0, (parts, whole))
    return tuple(parts for parts, _ in found), tuple(whole for _, whole in found)


def _entry(data: Mapping[str, Any]) -> Entry:
    shares = tuple(tuple(map(float, each)) for each in data["shares"])
    axes, ms = tuple(map(int, data["axes"])), tuple(map(float, data["ms"]))
    return Entry(str(data["node"]), axes, shares, ms)


def _check_sound(table: LatencyTable) -> None:
    """Raise `ValueError` where times could not be told from what a file said."""
    if not all(axis and all(0 < each < table.count for each in axis) for axis in table.axes):
        raise ValueError("an axis has ids that no network has")
    if len(table.alone_ms) != len(table.whole_ms) or not _rises((0.0, *table.alone_ms)):
        raise ValueError("the times of whole networks do not rise")
    if not all(0 < ms < math.inf for ms in table.whole_ms):
        raise ValueError("a time of a whole network is no number")
    for entry in table.entries:
        if not all(0 <= axis < len(table.axes) for axis in entry.axes):
            raise ValueError(f"{entry.node} has an axis that is not there")
        if not 0 < len(entry.ms) == math.prod(map(len, entry.shares)):
            raise ValueError(f"the times of {entry.node} are no grid")
        if len(entry.axes) != len(entry.shares) or not all(map(_rises, entry.shares)):
            raise ValueError(f"the widths of {entry.node} do not rise")
        if not all(0 <= ms < math.inf for ms in entry.ms):
            raise ValueError(f"a time of {entry.node} is no number")


def _rises(shares: tuple[float, ...]) -> bool:
    return all(a < b for a, b in itertools.pairwise(shares)) and math.isfinite(sum(shares))


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

    def __call__(self, shares: Sequence[float]) -> float:
        """The time at a share of each axis."""
        if self.linear is None:
            return self.constant
        pairs = zip(shares, self.ends, strict=True)
        return self.linear([min(max(share, low), high) for share, (low, high) in pairs]).item()


def _at(surface: _Surface, ids: Sequence[Tensor], kept: Tensor) -> float:
    """What ops take with only the ids in a mask."""
    return surface([float(kept[ids[axis]].float().mean()) for axis in surface.axes])


def _mapped(parts: float, alone: Sequence[float], whole: Sequence[float]) -> float:
    if not alone:
        return parts
    nearest = min(max(parts, alone[0]), alone[-1])
    return float(np.interp(nearest, alone, whole)) * parts / nearest


# -- arguments -------------------------------------------------------------------------------------


def _check(analysis: Any, batch: Any, points: Any, budget_s: float | None, threads: Any) -> None:
    if not isinstance(analysis, Analysis):
        kind = type(analysis).__name__
        raise OptionError(
            f"a table is measured for an Analysis, not a {kind}", hint="fxprune.analyze(model)"
        )
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
