"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import SaveError


def write_text(path: Path, text: str) -> Path:
    """Write a text file; an older one stays whole until the new one is."""
    return write_whole(path, lambda made: made.write_text(text + "\n", encoding="utf-8"))


def write_whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Let `write` fill a file beside `path`, then put it in its place. `SaveError` where nothing
    can be written there; what `write` raises is passed on, and the older file stays."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(handle)
    except OSError as error:
        raise SaveError(f"{path} cannot be written: {error.strerror}") from None
    made = Path(name)
    try:
        write(made)
        _flush(made)
        made.chmod(0o666 & ~_umask())
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
    return path


def _flush(path: Path) -> None:
    """Have the system write a file to disk before it takes the place of another."""
    with path.open("rb+") as file:
        os.fsync(file.fileno())


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
