"""``fxprune view``: a dump as a page in the browser."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from .command import Answer, command, flag, option, writable
from .output import Output


@dataclass
class Page:
    """What `view` shows, and where it is written."""

    folder: Annotated[
        Path, typer.Argument(help="A folder written by dump or prune --dump.", metavar="DUMP")
    ]
    out: Annotated[
        Path | None,
        option("--out", "-o", help="The page.", default="view.html in the dump", metavar="FILE"),
    ] = None
    opened: Annotated[
        bool, flag("--open/--no-open", help="Open it in the browser.", default="open")
    ] = True


def register(app: typer.Typer, panel: str) -> None:
    command(
        app,
        panel=panel,
        examples=[
            "fxprune view steps/",
            "fxprune view steps/ --out page.html --no-open",
        ],
    )(view)


def view(page: Page, output: Output) -> Answer:
    """Make one HTML page of a dump, and open it: the graph with its channel groups at every step.

    Click a group, or a node of the graph, to see its members, its scores with the cut, and the
    lines of code that tie it. The page needs no server and no network: it can be mailed, or kept
    beside a checkpoint.
    """
    writable(page.out, "page")
    output.steps.at("write the page")
    path = page_of(page.folder, page.out, opened=page.opened)
    return Answer({"page": str(path)}, [Text(str(path))])


def page_of(folder: Path, out: Path | None, *, opened: bool) -> Path:
    """Write the page of a dump, and open it where asked."""
    import fxprune

    path = fxprune.view(folder, out)
    if opened:
        webbrowser.open(path.resolve().as_uri())
    return path
