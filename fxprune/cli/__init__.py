"""The command ``fxprune``. Nothing here imports torch before a command needs it: help, version and
completion are quick."""

from __future__ import annotations

import contextlib
import io
import os
import sys
from collections.abc import Callable
from typing import Any


def main() -> None:
    """Run the command line that this process was started with, and exit."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        print(
            f"error: the fxprune command needs {error.name}, which is not installed\n\n"
            "hint: pip install 'typer>=0.19' 'rich>=13.8'",
            file=sys.stderr,
        )
        sys.exit(2)
    if os.environ.get("_FXPRUNE_COMPLETE") == "complete_bash":
        _complete_in_bash(app)
    app(prog_name="fxprune")


def _complete_in_bash(app: Callable[..., Any]) -> None:
    from .complete import prepare_bash

    said, prefix = io.StringIO(), prepare_bash()
    try:
        with contextlib.redirect_stdout(said):
            app(prog_name="fxprune")
    finally:
        for line in said.getvalue().splitlines():
            print(line.removeprefix(prefix))


__all__ = ["main"]
