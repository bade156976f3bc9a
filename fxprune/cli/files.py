"""Files that appear whole or not at all."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from ..errors import NamingError
from ..naming import first_line


def save_text(path: Path, text: str) -> Path:
    """Write a text file; an older one stays whole until the new one is."""
    return _whole(path, lambda made: made.write_text(text + "\n", encoding="utf-8"))


def save_onnx(pruned: Any, path: Path) -> Path:
    """Export a pruned network; `NamingError` where that is not possible."""
    import torch

    from ..inputs import of_spec, random_like

    own = next(pruned.parameters())
    inputs = random_like(of_spec(pruned.fxprune.plan.inputs), dtype=own.dtype, device=own.device)
    how: Any = {"dynamo": True, "external_data": False, "verbose": False}

    def export(made: Path) -> None:
        torch.onnx.export(pruned, inputs.args, str(made), kwargs=inputs.kwargs, **how)

    try:
        return _whole(path, export)
    except ImportError as error:
        hint = "pip install 'fxprune[onnx]'"
        raise NamingError(f"ONNX needs {error.name}, which is not installed", hint=hint) from None
    except OSError:
        raise
    except Exception as error:
        raise NamingError(
            f"the pruned network cannot be exported to ONNX: {first_line(error)}",
            hint="the network itself is pruned and can be saved with -o; --debug shows more",
        ) from error


def _whole(path: Path, write: Callable[[Path], Any]) -> Path:
    """Write beside the file, then put the new one in its place."""
    try:
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
        os.close(handle)
    except OSError as error:
        raise NamingError(f"{path} cannot be written: {error.strerror}") from None
    made = Path(name)
    try:
        write(made)
        made.chmod(0o666 & ~_umask())
        made.replace(path)
    finally:
        made.unlink(missing_ok=True)
    return path


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
