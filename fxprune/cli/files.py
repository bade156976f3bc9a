"""Pruned networks in files of other formats."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from ..errors import NamingError, SaveError, first_line
from ..files import write_whole


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
        return write_whole(path, export)
    except ImportError as error:
        hint = "pip install 'fxprune[onnx]'"
        raise NamingError(f"ONNX needs {error.name}, which is not installed", hint=hint) from None
    except (OSError, SaveError):
        raise
    except Exception as error:
        raise NamingError(
            f"the pruned network cannot be exported to ONNX: {first_line(error)}",
            hint="the network itself is pruned and can be saved with -o; --debug shows more",
        ) from error
