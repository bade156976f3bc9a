"""A report as Markdown, and as HTML for notebooks: the same parts in two notations."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from html import escape
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .report import Report

_STYLE = "text-align:{};padding:2px 12px 2px 0"


@dataclass(frozen=True)
class Table:
    """Cells of text. Columns of ``numbers`` stand right."""

    columns: Sequence[str]
    rows: Sequence[Sequence[str]]
    numbers: tuple[int, ...] = ()


Part = str | Table


def parts(report: Report) -> Iterator[Part]:
    """What there is to say, from the totals to the groups that gave less than asked."""
    yield from report.heading()
    totals = {"channels": report.channels, "parameters": report.params, "MACs": report.macs}
    rows = [
        [name, f"{a:,}", f"{b:,}", f"{b / a:.1%}" if a else ""] for name, (a, b) in totals.items()
    ]
    yield Table(["", "before", "after", "left"], rows, (1, 2, 3))
    yield f"verified: {report.verification or 'no'}"
    yield from (f"warning: {text}" for text in report.warnings)
    if report.causes:
        yield "less than half of the channels could go, mostly because of"
        yield Table(
            ["channels", "because", "what frees them"],
            [
                [f"{c.channels:,}", f"{c.reason} {c.source}".strip(), c.remedy]
                for c in report.causes
            ],
            (0,),
        )
    short = report.joined_shortfalls()
    if short:
        yield f"{len(report.shortfalls())} of {len(report.groups)} groups gave less than asked"
        rows = [[row.name, f"{row.kept:,} of {row.size:,}", row.reason] for row in short]
        yield Table(["group", "kept", "because"], rows, (1,))


# -- Markdown --------------------------------------------------------------------------------------


def markdown(report: Report) -> str:
    """The report as GitHub's Markdown."""
    title, *rest = parts(report)
    shown = [_md_table(each) if isinstance(each, Table) else _md(each) for each in rest]
    return "\n\n".join([f"**{_md(str(title))}**", *shown]) + "\n"


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
    title, *rest = parts(report)
    shown = [
        _html_table(each) if isinstance(each, Table) else f"<p>{escape(each)}</p>" for each in rest
    ]
    return "\n".join(["<div>", f"<p><b>{escape(str(title))}</b></p>", *shown, "</div>"])


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
