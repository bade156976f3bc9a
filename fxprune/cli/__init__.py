"""The command ``fxprune``. Nothing here imports torch before a command needs it: help, version and
completion are quick."""

from __future__ import annotations

import sys


def main() -> None:
    """Run the command line that this process was started with, and exit."""
    try:
        from .app import app
    except ModuleNotFoundError as error:
        if (error.name or "").partition(".")[0] not in ("typer", "rich", "click"):
            raise
        print(
            f"error: the fxprune command needs {error.name}, which is not installed\n\n"
            "hint: pip install 'fxprune[cli]'",
            file=sys.stderr,
        )
        sys.exit(2)
    app(prog_name="fxprune")


__all__ = ["main"]
