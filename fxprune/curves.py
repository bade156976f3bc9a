"""Sensitivity curves: how much worse a network gets, the more channels a group loses."""

from __future__ import annotations

import itertools
from collections.abc import Container
from typing import TYPE_CHECKING, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, ValidationError

from .check import check_share
from .errors import OptionError, PlanError, nearest

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

Curve = list[tuple[float, float]]


def unique(name: str, taken: Container[str]) -> str:
    """The name, with a number behind it where it is taken."""
    found, number = name, 2
    while found in taken:
        found, number = f"{name}#{number}", number + 1
    return found


class Sensitivity(BaseModel):
    """What `fxprune.sensitivity` found.

    ``base``: the loss, or metric, of the unpruned network. ``groups``: name -> (share of channels
    that went, what that adds to the loss, or takes from the metric), by rising share; a group that
    no asked rate takes a channel of is left out. ``together``: name of a group that can only be
    pruned together with others -> the group whose curve stands for all of them.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", ser_json_inf_nan="constants")
    format: Literal[1] = 1
    model: str
    criterion: str
    measure: Literal["loss", "metric"] = "loss"
    base: float
    groups: dict[str, Curve]
    together: dict[str, str] = {}

    def loss_at(self, name: str, rate: float) -> float:
        """What is added to the loss when a share `rate` of a group's channels goes, linear between
        the measured points and (0, 0). Past the last point its line goes on, but never down.

        Raises `OptionError` for a group that has no curve, and for a rate outside [0, 1).
        """
        check_share("rate", rate)
        curve = self._curve(name)
        rates, losses = zip((0.0, 0.0), *curve, strict=True)
        if rate <= rates[-1]:
            return float(np.interp(rate, rates, losses))
        slope = (losses[-1] - losses[-2]) / (rates[-1] - rates[-2])
        return float(losses[-1] + max(0.0, slope) * (rate - rates[-1]))

    def _curve(self, name: str) -> Curve:
        found = self.groups.get(self.together.get(name, name))
        if found is None:
            known = [*self.groups, *self.together]
            hint = nearest(str(name), known) or "sensitivity.groups lists them"
            raise OptionError(f"no group `{name}` has a curve", hint=hint)
        return found

    @property
    def ranking(self) -> list[str]:
        """Names of the groups, the most sensitive first: by what each loses at the largest share
        that was measured of all."""
        shared = min((curve[-1][0] for curve in self.groups.values()), default=0.0)
        worst = {name: _order(self.loss_at(name, shared)) for name in self.groups}
        return sorted(self.groups, key=lambda name: -worst[name])

    def plot(self, *, ax: Axes | None = None) -> Figure:
        """A line a group over the share of channels that goes, the most sensitive ones named.
        `OptionError` where matplotlib is missing, or nothing is there to draw."""
        from .plots import curves

        return curves(self, ax)

    def to_json(self, *, indent: int | None = None) -> str:
        """As JSON; `Sensitivity.from_json` reads it back equal."""
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str | bytes) -> Sensitivity:
        """Read what `to_json` wrote; `PlanError` if it is something else."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"]))
            raise PlanError(
                f"this is no sensitivity: {first['msg']}",
                details=[("at", where)],
                hint="pass what Sensitivity.to_json gave",
            ) from None

    def __str__(self) -> str:
        sign = "+" if self.measure == "loss" else "-"
        rows = [
            [name, *(_cell(point, sign) for point in self.groups[name])] for name in self.ranking
        ]
        taken = "added to" if self.measure == "loss" else "taken from"
        head = (
            f"{self.model}: {self.measure} {self.base:.4g}; what is {taken} it when a group alone "
            f"loses channels by {self.criterion}, most sensitive first"
        )
        return "\n".join([head, *_lined_up(rows), *self._notes()])

    __repr__ = __str__

    def _notes(self) -> list[str]:
        return [f"{name} goes together with {first}" for name, first in self.together.items()]


def _order(loss: float) -> float:
    """A loss that is no number is the worst."""
    return loss if loss == loss else float("inf")


def _cell(point: tuple[float, float], sign: str) -> str:
    rate, loss = point
    return f"{rate:4.0%} {_signed(loss, sign)}"


def _signed(loss: float, sign: str) -> str:
    if loss == 0:
        return "0"
    other = {"+": "-", "-": "+"}[sign]
    return f"{other if loss < 0 else sign}{abs(loss):.3g}"


def _lined_up(rows: list[list[str]]) -> list[str]:
    columns = [max(map(len, column)) for column in itertools.zip_longest(*rows, fillvalue="")]
    return [
        "  ".join(cell.ljust(width) for cell, width in zip(row, columns, strict=False)).rstrip()
        for row in rows
    ]
