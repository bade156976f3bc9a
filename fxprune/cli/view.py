"""``fxprune view``: a dump as a page in the browser."""

from __future__ import annotations

import webbrowser
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer
from rich.text import Text

from ..errors import NamingError, nearest
from .command import Answer, command, flag, option
from .output import Output


@dataclass
class Page:
    """What `view` shows, and where it is written."""

    folder: Annotated[
        Path, typer.Argument(help="A folder written by dump or prune --dump.", metavar="DUMP")
    ]
    out: Annotated[
        Path | None,
        option("--out", "-o", help="The HTML file.", default="in the folder", metavar="FILE"),
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
    """Make one HTML file of a dump, and open it: the graph with its channel groups at every step.

    The file needs no server and no network: it can be mailed, or kept beside a checkpoint.
    """
    if not page.folder.is_dir():
        near = [str(p) for p in page.folder.parent.glob("*/")]
        raise NamingError(
            f"there is no folder {page.folder}",
            hint=nearest(str(page.folder), near) or "fxprune dump MODEL FOLDER writes one",
        )
    output.steps.at("write the page")
    path = page_of(page.folder, page.out, opened=page.opened)
    return Answer({"page": str(path)}, [Text(str(path))])


def page_of(folder: Path, out: Path | None, *, opened: bool) -> Path:
    """Write the page of a dump, and open it where asked."""
    from .. import viewer

    path = Path(viewer.write_page(folder, out))
    if opened:
        webbrowser.open(path.resolve().as_uri())
    return path
