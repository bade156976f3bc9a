"""A report as parts to show, and these as Markdown, and as HTML for notebooks."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from .report import Report, Row
    from .verifier import Verification

_STYLE = "text-align:{};padding:2px 12px 2px 0"


@dataclass(frozen=True)
class Line:
    """A line of text, and what it is to the report."""

    text: str
    kind: Literal["title", "inputs", "verified", "unverified", "warning", "head"]


@dataclass(frozen=True)
class Table:
    """Cells of text. Columns of ``numbers`` stand right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: tuple[int, ...] = ()


def parts(report: Report) -> Iterator[Line | Table]:
    """What there is to say, from the totals to the groups that gave less than asked."""
    title, inputs = report.heading()
    yield Line(title, "title")
    yield Line(inputs, "inputs")
    totals = {"channels": report.channels, "parameters": report.params, "MACs": report.macs}
    yield Table(
        ["", "before", "after", "left"], [_change(*each) for each in totals.items()], (1, 2, 3)
    )
    yield verified(report.verification)
    for each in report.targets:
        yield Line(f"target: {each}", "verified" if each.met else "unverified")
    if report.compensation is not None:
        yield Line(f"fitted: {report.compensation}", "inputs")
    yield from (Line(f"warning: {text}", "warning") for text in report.warnings)
    if report.causes:
        yield Line("less than half of the channels could go, mostly because of", "head")
        rows = [[f"{c.channels:,}", c.where, c.remedy] for c in report.causes]
        yield Table(["channels", "because", "what frees them"], rows, (0,))
    short = report.shortfalls()
    if short:
        yield Line(f"{len(short)} of {len(report.groups)} groups gave less than asked", "head")
        yield Table(["group", "kept", "because"], _by_reason(short), (1,))


def verified(found: Verification | None) -> Line:
    """What was proven of a pruned network."""
    return Line(f"verified: {found}", "verified") if found else Line("not verified", "unverified")


def _change(name: str, values: tuple[int, int]) -> list[str]:
    before, after = values
    return [name, f"{before:,}", f"{after:,}", f"{after / before:.1%}" if before else ""]


_NODE = re.compile(r"( at)? \(?%\w+\)?")


def _by_reason(short: Sequence[Row]) -> list[list[str]]:
    """Groups with one reason, at whatever nodes, as one row."""
    reasons: dict[str, list[Row]] = {}
    for row in short:
        reasons.setdefault(_NODE.sub("", row.reason), []).append(row)
    return [_joined(reason, rows) for reason, rows in reasons.items()]


def _joined(reason: str, rows: list[Row]) -> list[str]:
    names = list(dict.fromkeys(row.name for row in rows))
    more = f" and {len(names) - 1} more" if names[1:] else ""
    kept, size = sum(row.kept for row in rows), sum(row.size for row in rows)
    return [
        f"{names[0]}{more}",
        f"{kept:,} of {size:,}",
        rows[0].reason if len(rows) == 1 else reason,
    ]


# -- Markdown --------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The report as GitHub's Markdown."""
    shown = [_md_table(p) if isinstance(p, Table) else _md_line(p) for p in parts(report)]
    return "\n\n".join(shown) + "\n"


def _md_line(line: Line) -> str:
    return f"**{_md(line.text)}**" if line.kind == "title" else _md(line.text)


def _md_table(table: Table) -> str:
    rule = ["--:" if i in table.numbers else "---" for i in range(len(table.columns))]
    rows = [[_md(cell) for cell in row] for row in (table.columns, *table.rows)]
    lines = [rows[0], rule, *rows[1:]]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def _md(text: str) -> str:
    for sign in "\\`*_|<[":
        text = text.replace(sign, f"\\{sign}")
    return " ".join(text.split())


# -- HTML ------------------------------------------------------------------------------------------


def html(report: Report) -> str:
    """The report as a fragment of HTML, with no script and no style sheet."""
    shown = [_html_table(p) if isinstance(p, Table) else _html_line(p) for p in parts(report)]
    return "\n".join(["<div>", *shown, "</div>"])


def _html_line(line: Line) -> str:
    text = escape(line.text)
    return f"<p><b>{text}</b></p>" if line.kind == "title" else f"<p>{text}</p>"


def _html_table(table: Table) -> str:
    head = _html_row(table, table.columns, "th")
    rows = "".join(_html_row(table, row, "td") for row in table.rows)
    return f"<table><thead>{head}</thead><tbody>{rows}</tbody></table>"


def _html_row(table: Table, row: Sequence[str], tag: str) -> str:
    sides = ["right" if i in table.numbers else "left" for i in range(len(row))]
    cells = [
        f'<{tag} style="{_STYLE.format(side)}">{escape(cell)}</{tag}>'
        for side, cell in zip(sides, row, strict=True)
    ]
    return f"<tr>{''.join(cells)}</tr>"
