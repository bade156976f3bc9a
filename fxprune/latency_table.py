"""How long a network would take at other widths, from times of its ops on the user's device.

Each op is measured alone over a grid of widths: along the channels that it reads, and along those
that it makes. In between, times are interpolated linearly. What a network takes is more than its
ops take alone: caches are colder, calls cost Python's time. A factor, and a rest that does not
depend on widths, are fitted to two whole networks: as it is, and with each width at one step.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .analysis import Analysis, analyze
from .check import check_count, device_of, usable_device
from .errors import OptionError, PlanError
from .inputs import batched, random_like
from .latencies import Progress, _on, _settings, _unseen
from .latency_grid import Entry, Grid
from .rewrite import rewrite
from .timings import Timings, default_folder, environment, timed_ms
from .widths import RewriteError, Widths

_WHOLE_S = 1.0  # seconds that the whole network is measured for


@dataclass(frozen=True)
class LatencyTable:
    """Times of a network's ops over widths.

    ``environment``  device, torch version, threads and dtype that were measured
    ``batch``        the batch size
    ``count``        how many ids the analysis has
    ``axes``         channels that get fewer together: an id of each
    ``entries``      the times of each node
    ``factor``       how much longer ops take in the network than alone
    ``rest_ms``      what the network takes beside them
    ``unmeasured``   nodes that cannot be run alone; factor and rest cover them
    """

    environment: Mapping[str, Any]
    batch: int
    count: int
    axes: tuple[tuple[int, ...], ...]
    entries: tuple[Entry, ...]
    factor: float = 1.0
    rest_ms: float = 0.0
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
            budget_s: about how many seconds to measure for; every call is made a few times, however
                long that takes. By default about 0.04 s a call.
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
        folder = Path(cache) if cache is not None else default_folder()
        with _settings({"": analysis.model}, threads):
            timings = Timings(where, environment(where, _dtype(analysis)), folder)
            grid = Grid(analysis, timings, points, budget_s, progress or _unseen)
            wholes = _Wholes(analysis, grid.one_step(), where, budget_s)
            wholes.measure()
            try:
                entries = grid.entries()
            finally:
                timings.save()  # what is known need not be measured again, whatever happened
            wholes.measure()
        size, axes = analysis.flow.ids.count, tuple(grid.axes)
        env, missed = timings.environment, tuple(grid.unmeasured)
        return wholes.fitted(cls(env, analysis.batch, size, axes, entries, unmeasured=missed))

    def ms(self, kept: Tensor | None = None) -> float:
        """Milliseconds of a call with only the ids in the mask `kept`; of the unpruned network
        without one."""
        if kept is not None and tuple(kept.shape) != (self.count,):
            raise OptionError(
                f"the mask has the shape {tuple(kept.shape)}, the network {self.count} ids",
                hint="the mask and the table must come from one analysis",
            )
        return self.factor * self.parts_ms(kept) + self.rest_ms

    def parts_ms(self, kept: Tensor | None = None) -> float:
        """The sum of what the ops take alone."""
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
            table = cls(**{**data, "unmeasured": tuple(data["unmeasured"])})
            _check_sound(table)
            return table
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise PlanError(
                f"not a table of times: {error}", hint="write tables with table.to_json()"
            ) from None


def _entry(data: Mapping[str, Any]) -> Entry:
    shares = tuple(tuple(map(float, each)) for each in data["shares"])
    axes, ms = tuple(map(int, data["axes"])), tuple(map(float, data["ms"]))
    return Entry(str(data["node"]), axes, shares, ms)


def _check_sound(table: LatencyTable) -> None:
    """Raise `ValueError` where times could not be told from what a file said."""
    if not all(axis and all(0 < each < table.count for each in axis) for axis in table.axes):
        raise ValueError("an axis has ids that no network has")
    if not (0 < table.factor < math.inf and 0 <= table.rest_ms < math.inf):
        raise ValueError("the factor or the rest is no number")
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

    def __call__(self, shares: list[float]) -> float:
        if self.linear is None:
            return self.constant
        ends = zip(self.axes, self.ends, strict=True)
        return self.linear([min(max(shares[a], low), high) for a, (low, high) in ends]).item()


# -- whole networks --------------------------------------------------------------------------------


class _Wholes:
    """The network as it is, and with the ids in the mask `kept`, where that can be written."""

    def __init__(
        self, analysis: Analysis, kept: Tensor, device: torch.device, budget_s: float | None
    ):
        self.kept, self.device = kept, device
        self.budget_s = min(_WHOLE_S, budget_s / 20 if budget_s is not None else _WHOLE_S)
        self.inputs = random_like(analysis.inputs, dtype=_dtype(analysis), device=device)
        on_meta = any(tensor.is_meta for tensor in analysis.tensors.values())
        self.networks = [] if on_meta else [_on(device, analysis.model)]
        if not on_meta and not kept.all():
            self.networks += [each.to(device) for each in _written(analysis, kept)]
        self.ms = [math.inf] * len(self.networks)

    def measure(self) -> None:
        """Once more; the lower time counts."""
        for i, network in enumerate(self.networks):
            found = timed_ms(network, self.inputs, self.device, self.budget_s)
            self.ms[i] = min(found, self.ms[i])

    def fitted(self, table: LatencyTable) -> LatencyTable:
        """The table with factor and rest; no rest where it would be none."""
        parts = table.parts_ms()
        if not self.ms or not parts:
            return table
        if len(self.ms) > 1 and (less := parts - table.parts_ms(self.kept)) > 0:
            factor = (self.ms[0] - self.ms[1]) / less
            rest = self.ms[0] - factor * parts
            if factor > 0 and rest > 0:
                return replace(table, factor=factor, rest_ms=rest)
        return replace(table, factor=self.ms[0] / parts)


def _written(analysis: Analysis, kept: Tensor) -> list[nn.Module]:
    widths = Widths(analysis.flow, kept)
    rows = {name: found for name in analysis.flow.ids.slots if (found := widths.kept_of(name))}
    try:
        return [rewrite(analysis.model, analysis.flow, kept, rows)]
    except RewriteError:
        return []


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
