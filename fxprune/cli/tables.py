"""Tables that fit the terminal: names are folded where they must, never cut."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Any, Literal

from rich import box
from rich.console import RenderableType
from rich.table import Table
from rich.text import Text

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


def share(before: float, after: float) -> str:
    return f"{after / before:.1%}" if before else ""


def change(rows: Iterable[tuple[str, int, int]]) -> Table:
    """What was and what is, side by side."""
    return table(
        [("", "left"), ("before", "right"), ("after", "right"), ("left", "right")],
        [[name, f"{old:,}", f"{new:,}", share(old, new)] for name, old, new in rows],
    )


def report(found: Any) -> list[RenderableType]:
    """A pruning's report as people read it in a terminal."""
    recipe = f" (recipe {found.recipe})" if found.recipe else ""
    rate = f" at {found.rate:g}" if found.rate is not None else ""
    guessed = f", guessed from {found.guessed}" if found.guessed else ""
    head = f"{found.model} pruned by {found.criterion}{recipe}{rate} ({found.scope})"
    shown: list[RenderableType] = [
        Text(head, style="bold"),
        Text(f"{found.frontend} trace on {found.inputs}{guessed}", style="dim"),
        change(
            [("channels", *found.channels), ("parameters", *found.params), ("MACs", *found.macs)]
        ),
        verified(found.verification),
    ]
    shown += [Text.assemble(("warning: ", "yellow bold"), text) for text in found.warnings]
    return [*shown, *_causes(found), *_shortfalls(found)]


def verified(found: Any) -> Text:
    if found is None:
        return Text.assemble(("not verified", "yellow"))
    return Text.assemble(("verified: ", "green bold"), str(found))


def _causes(found: Any) -> list[RenderableType]:
    if not found.causes:
        return []
    head = Text("\nless than half of the channels could go, mostly because of")
    return [head, *(Text(f"  {spoken(str(cause))}") for cause in found.causes)]


def _shortfalls(found: Any, most: int = 12) -> list[RenderableType]:
    short = found.shortfalls()
    if not short:
        return []
    head = Text(f"\n{len(short)} of {len(found.groups)} groups gave less than asked")
    rows = _by_reason(short)
    made = table([("group", "left"), ("kept", "right"), ("because", "full")], rows[:most])
    rest = [Text(f"and {len(rows) - most} more reasons: --json lists all")] if rows[most:] else []
    return [head, made, *rest]


_NODE = re.compile(r"( at)? \(?%\w+\)?")


def _by_reason(short: Sequence[Any]) -> list[list[str]]:
    """Groups with one reason, at whatever nodes, as one row."""
    reasons: dict[str, list[Any]] = {}
    for row in short:
        reasons.setdefault(_NODE.sub("", row.reason), []).append(row)
    return [_joined(reason, rows) for reason, rows in reasons.items()]


def _joined(reason: str, rows: list[Any]) -> list[str]:
    names = list(dict.fromkeys(row.name for row in rows))
    more = f" and {len(names) - 1} more" if names[1:] else ""
    kept, size = sum(row.kept for row in rows), sum(row.size for row in rows)
    shown = rows[0].reason if len(rows) == 1 else reason
    return [f"{names[0]}{more}", f"{kept:,} of {size:,}", spoken(shown)]
