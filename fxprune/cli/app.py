"""The app: its help, its version, and the commands in the order in which help lists them."""

from __future__ import annotations

from typing import Annotated

import typer

from .. import __version__
from . import bench, look, names, prune, rules, verify, view
from .command import EXIT_CODES

app = typer.Typer(
    name="fxprune",
    no_args_is_help=True,
    rich_markup_mode="rich",
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["--help", "-h"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(f"fxprune {__version__}")
        raise typer.Exit()


def _codes() -> str:
    return "; ".join(f"[bold]{code}[/bold] {text}" for code, text in EXIT_CODES)


@app.callback(
    epilog="[bold]Start with[/bold]\n\n"
    "$ fxprune prune torchvision:resnet18 --rate 0.5 -o small/\n\n"
    "$ fxprune explain torchvision:resnet18 conv1 layer1.0.conv2\n\n"
    f"[bold]Exit codes[/bold]\n\n{_codes()}"
)
def root(
    version: Annotated[
        bool,
        typer.Option("--version", help="Print the version.", callback=_version, is_eager=True),
    ] = False,
) -> None:
    """Structured pruning of PyTorch networks: whole channels go, the graph is rewritten to match,
    and the result is checked against the original.

    Data goes to stdout and everything else to stderr; every command prints JSON with --json.
    """


_PRUNE, _LOOK, _KNOWN = "Prune", "Look", "What fxprune knows"

prune.register(app, _PRUNE)
verify.register(app, _PRUNE)
bench.register(app, _PRUNE)
look.register(app, _LOOK)
view.register(app, _LOOK)
names.register(app, _KNOWN)
app.add_typer(rules.app, rich_help_panel=_KNOWN)

__all__ = ["app"]
