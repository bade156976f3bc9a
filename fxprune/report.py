"""What came out: for people to read, and for programs as plain data."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter

from . import rendered
from .causes import Cause
from .compensation import Compensation
from .layers import LayerRow, Scores
from .targets import Reached
from .verifier import Verification

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from .plots import What


@dataclass(frozen=True)
class Row:
    """One group in the report. ``reason`` says why it gave less than asked, or nothing at all."""

    name: str
    size: int
    kept: int
    layers: int
    reason: str = ""

    def plus(self, other: Row) -> Row:
        return replace(self, size=self.size + other.size, kept=self.kept + other.kept)


@dataclass(repr=False)
class Report:
    """The result of a pruning. Parameters are counted once where tied; MACs (multiply-accumulates
    of convolutions and linear layers) are for one item of the batch. ``causes`` are the three
    costliest ones of a network of which less than half of the channels could go. ``scores``: those
    of each group that was scored, by its place in ``groups``."""

    model: str
    criterion: str
    rate: float | None
    scope: str
    frontend: str
    inputs: str
    guessed: str
    recipe: str = ""
    select_by: str = "rate"
    groups: list[Row] = field(default_factory=list)
    layers: list[LayerRow] = field(default_factory=list)
    scores: dict[int, Scores] = field(default_factory=dict)
    params: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    warnings: list[str] = field(default_factory=list)
    causes: list[Cause] = field(default_factory=list)
    verification: Verification | None = None
    targets: tuple[Reached, ...] = ()
    compensation: Compensation | None = None

    @property
    def channels(self) -> tuple[int, int]:
        """Channels before and after."""
        return sum(r.size for r in self.groups), sum(r.kept for r in self.groups)

    def shortfalls(self) -> list[Row]:
        """Groups that gave less than was asked, with the reason."""
        return [row for row in self.groups if row.reason]

    def to_dict(self) -> dict[str, Any]:
        """The report as plain data, without the scores, which are many."""
        from dataclasses import asdict

        data = asdict(replace(self, scores={}))
        del data["scores"]
        return data

    def to_json(self, *, indent: int | None = 2) -> str:
        """The report as JSON."""
        return json.dumps(self.to_dict(), indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote; pydantic's `ValidationError` for any other text."""
        return TypeAdapter(cls).validate_json(text)

    def to_markdown(self) -> str:
        """The report as Markdown, for a model card or a pull request."""
        return rendered.markdown(self)

    def plot(
        self, what: What = "widths", *, group: str | None = None, ax: Axes | None = None
    ) -> Figure:
        """A picture, as a matplotlib figure: ``report.plot("macs").savefig("macs.png")``.

        what:  "widths", "params" or "macs" of each layer, before and after; or the "scores" of all
               groups that lost channels, or of one `group`, with the cut.
        ax:    axes to draw into; without them a figure that is large enough is made.

        Raises `OptionError` where matplotlib is missing, or the scores are not known: a report has
        them after `fxprune.prune`, and where the plan that was applied holds them.
        """
        from .plots import plot

        return plot(self, what, group, ax)

    def _repr_html_(self) -> str:
        return rendered.html(self)

    def heading(self) -> list[str]:
        """What was done, and on which inputs."""
        recipe = f" (recipe {self.recipe})" if self.recipe else ""
        rate = f" at {self.rate:g}" if self.rate is not None else ""
        guessed = f", guessed from {self.guessed}" if self.guessed else ""
        return [
            f"{self.model} pruned by {self.criterion}{recipe}{rate} ({self.scope}{self._rule})",
            f"{self.frontend} trace on {self.inputs}{guessed}",
        ]

    @property
    def _rule(self) -> str:
        return "" if self.select_by == "rate" else f", {self.select_by}"

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        lines = [
            ", ".join(self.heading()),
            _change("channels", *self.channels),
            _change("parameters", *self.params),
            _change("MACs", *self.macs),
            f"  verified    {self.verification or 'no'}",
        ]
        lines += [f"  target      {each}" for each in self.targets]
        lines += [f"  fitted      {self.compensation}"] if self.compensation else []
        lines += [f"  warning     {text}" for text in self.warnings]
        if self.causes:
            lines.append("  less than half of the channels could go, mostly because of")
            lines += [f"    {cause}" for cause in self.causes]
        short = self.shortfalls()
        if short:
            lines.append(f"  {len(short)} of {len(self.groups)} groups gave less than asked:")
            lines += _listed(_joined(short))
        return "\n".join(lines)


def _joined(rows: list[Row]) -> list[Row]:
    """Rows of one layer that differ only in the node that is to blame, as one."""
    found: dict[tuple[str, str], Row] = {}
    for row in rows:
        key = row.name, re.sub(r"%\w+", "%", row.reason)
        known = found.get(key)
        found[key] = known.plus(row) if known else row
    return list(found.values())


def _listed(rows: list[Row], most: int = 12) -> list[str]:
    width = max(len(row.name) for row in rows[:most])
    lines = [
        f"    {row.name:<{width}}  {row.kept:>5} of {row.size:<5} kept  {row.reason}"
        for row in rows[:most]
    ]
    return [*lines, f"    and {len(rows) - most} more"] if len(rows) > most else lines


def _change(label: str, before: int, after: int) -> str:
    share = f"{after / before:.1%} left" if before else ""
    return f"  {label:<11} {before:>14,} -> {after:>14,}  {share}"
