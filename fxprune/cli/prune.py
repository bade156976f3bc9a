"""``fxprune prune`` and ``fxprune dump``."""

from __future__ import annotations

import tempfile
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import OptionError
from ..files import write_text
from . import tables
from .command import Answer, command, flag, option, writable
from .options import Named, Pruning
from .output import Output
from .view import page_of

if TYPE_CHECKING:
    from torch import nn

_FILES = "Files"


@dataclass
class Files:
    """What `prune` writes."""

    out: Annotated[
        Path | None,
        option(
            "--out",
            "-o",
            help="A folder for the pruned network: its weights, its plan and its source code.",
            default="none: only the report",
            metavar="FOLDER",
            rich_help_panel=_FILES,
        ),
    ] = None
    plan: Annotated[
        Path | None,
        option(
            help="What is kept of each parameter, as JSON.",
            default="none",
            metavar="FILE",
            rich_help_panel=_FILES,
        ),
    ] = None
    onnx: Annotated[
        Path | None,
        option(
            help="The pruned network as ONNX, for any batch size where that is possible.",
            default="none",
            metavar="FILE",
            rich_help_panel=_FILES,
        ),
    ] = None
    plot: Annotated[
        Path | None,
        option(
            help="A picture of each layer's width, before and after: .png, .svg or .pdf.",
            default="none",
            metavar="FILE",
            rich_help_panel=_FILES,
        ),
    ] = None

    view: Annotated[
        bool,
        flag("--view", help="Open a page of all steps in the browser.", rich_help_panel=_FILES),
    ] = False

    def check(self) -> None:
        """Refuse what cannot be written before any work is done for it."""
        files = ((self.plan, "plan"), (self.onnx, "ONNX file"), (self.plot, "picture"))
        for path, what in ((self.out, "folder"), *files):
            writable(path, what)
        if self.out is not None and self.out.is_file():
            raise OptionError(f"--out {self.out} is a file", hint="name a folder")
        if self.plot is not None:
            from .files import check_picture

            check_picture(self.plot)

    @property
    def any(self) -> bool:
        return any((self.out, self.plan, self.onnx, self.plot))


def register(app: typer.Typer, panel: str) -> None:
    command(
        app,
        panel=panel,
        examples=[
            "fxprune prune torchvision:resnet18 --rate 0.5 -o small/",
            "fxprune prune net.py:Net -i 1x3x32x32 -c l1 --plan plan.json",
        ],
    )(prune)
    command(
        app,
        panel="Look",
        examples=[
            "fxprune dump torchvision:resnet18 steps/",
            "fxprune dump net.py:Net steps/ -i 1x3x32x32 --rate 0.25",
        ],
    )(dump)


def prune(named: Named, chosen: Pruning, files: Files, output: Output) -> Answer:
    """Prune a network, prove the result, and save it.

    What must shrink together is found from the model's own code: no list of layers is needed. The
    model is run beside the result, with the removed channels set to zero, and the two must agree.
    """
    files.check()
    options = chosen.given()
    if files.view:
        options.setdefault("dump", Path(tempfile.mkdtemp(prefix="fxprune-")))
    start = time.perf_counter()
    pruned = _pruned(named, options, output)
    seconds = time.perf_counter() - start
    written = _written(pruned, files, output)
    if files.view:
        output.steps.at("write the page")
        written["view"] = page_of(options["dump"], None, opened=True)
    report = pruned.fxprune.report
    data = {"report": report.to_dict(), "files": _plain(written), "seconds": round(seconds, 3)}
    return Answer(data, tables.report(report), notes=_told(files, written, seconds))


def _pruned(named: Named, options: dict[str, Any], output: Output) -> Any:
    model = named.load(output)
    import fxprune

    output.steps.at("trace", 7)
    steps = output.steps
    how: Any = {"watch": steps.watch, "progress": steps.progress, **options}
    return fxprune.prune(model, named.example(), **how)


def _written(pruned: nn.Module, files: Files, output: Output) -> dict[str, Path]:
    """Write what was asked for; what was written, by option."""
    import fxprune

    from .files import save_onnx, save_picture

    info: Any = pruned.fxprune
    written: dict[str, Path] = {}
    if files.out is not None:
        output.steps.at("save")
        written["out"] = fxprune.save(pruned, files.out)
    if files.plan is not None:
        written["plan"] = write_text(files.plan, info.plan.to_json(indent=2))
    if files.onnx is not None:
        output.steps.at("export to ONNX")
        written["onnx"] = save_onnx(pruned, files.onnx, output.warn)
    if files.plot is not None:
        written["plot"] = save_picture(info.report, files.plot)
    return written


def _plain(written: dict[str, Path]) -> dict[str, str]:
    return {name: str(path) for name, path in written.items()}


def _told(files: Files, written: dict[str, Path], seconds: float) -> list[str]:
    """What was written, and what was not."""
    lines = [f"{'saved' if name == 'out' else name}: {path}" for name, path in written.items()]
    source = written["out"] / "model.py" if "out" in written else None
    lines += [f"as source code: {source}"] if source and source.exists() else []
    saved = "" if files.any else "; nothing was saved: -o FOLDER saves the network"
    return [*lines, f"pruned in {seconds:.1f} s{saved}"]


@dataclass
class Into:
    """Where `dump` writes."""

    folder: Annotated[
        Path, typer.Argument(help="A folder for a text file after every step.", metavar="FOLDER")
    ]


def dump(named: Named, into: Into, chosen: Pruning, output: Output) -> Answer:
    """Prune, and write what every step did as text: the graph, the channels each value carries, the
    groups, the scores, the plan, the new graph, the difference.

    Read the files in a pager, compare two of them with diff, or see them with `fxprune view`.
    """
    writable(into.folder, "folder")
    if chosen.dump not in (None, into.folder):
        raise OptionError("--dump names another folder than the argument", hint="leave --dump out")
    pruned = _pruned(named, {**chosen.given(), "dump": into.folder}, output)
    found = sorted(path for path in into.folder.iterdir() if path.is_file())
    rows = [[path.name, f"{path.stat().st_size:,}", _head(path)] for path in found]
    columns: Iterable[tables.Column] = [("file", "left"), ("bytes", "right"), ("", "full")]
    data = {
        "folder": str(into.folder),
        "files": [{"name": path.name, "bytes": path.stat().st_size} for path in found],
        "report": pruned.fxprune.report.to_dict(),
    }
    return Answer(data, [tables.table([*columns], rows)])


def _head(path: Path) -> str:
    """The heading of a dump's text file."""
    with path.open(encoding="utf-8", errors="replace") as file:
        first = file.readline().strip() if path.suffix == ".txt" else ""
    return first.removeprefix("# ")
