"""Tables that fit the terminal: names are folded where they must, never cut."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

from .. import rendered
from .spoken import spoken

Column = tuple[str, Literal["left", "right", "full"]]


def table(columns: Sequence[Column], rows: Iterable[Sequence[Any]]) -> Table:
    """A table. Numbers stand right and are kept whole; "full" text takes the room that is left."""
    made = Table(box=box.SIMPLE_HEAD, show_header=any(name for name, _ in columns))
    made.pad_edge = False
    for name, kind in columns:
        made.add_column(
            Text(name),
            justify="right" if kind == "right" else "left",
            no_wrap=kind == "right",
            overflow="fold",
        )
    for row in rows:
        made.add_row(*(cell if isinstance(cell, Text) else Text(str(cell)) for cell in row))
    return made


_MOST = 12  # rows of one table of a report; --json lists all
_STYLES = {"title": "bold", "inputs": "dim", "unverified": "yellow", "head": ""}
_LABELS = {"verified": "green bold", "warning": "yellow bold"}


def report(found: Any) -> list[RenderableType]:
    """A pruning's report as people read it in a terminal."""
    return [each for part in rendered.parts(found) for each in _shown(part)]


def _shown(part: rendered.Line | rendered.Table) -> Iterator[RenderableType]:
    if isinstance(part, rendered.Line):
        yield line(part)
        return
    rows = [[spoken(cell) for cell in row] for row in part.rows]
    yield table([*_columns(part)], rows[:_MOST])
    if rows[_MOST:]:
        yield Text(f"and {len(rows) - _MOST} more: --json lists all")


def _columns(part: rendered.Table) -> Iterator[Column]:
    for i, name in enumerate(part.columns):
        yield name, "right" if i in part.numbers else "full" if i else "left"


def line(part: rendered.Line) -> Text:
    """A line of a report: what it is, in colour; heads of tables stand apart."""
    if part.kind in _LABELS:
        label, _, rest = part.text.partition(" ")
        return Text.assemble((label, _LABELS[part.kind]), " ", rest)
    return Text("\n" * (part.kind == "head") + part.text, style=_STYLES[part.kind])
