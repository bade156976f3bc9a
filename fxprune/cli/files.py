"""Pruned networks, and pictures of them, in files of other formats."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from ..errors import NamingError, OptionError, SaveError, first_line
from ..files import write_whole
from ..inputs import Inputs, batch_of, batched, has_batch, of_spec, random_like
from ..plots import check_matplotlib
from ..report import Report
from ..retrace import silent

Remark = Callable[[str], None]
_PICTURES = (".png", ".svg", ".pdf")


def save_onnx(pruned: Any, path: Path, remark: Remark) -> Path:
    """Export a pruned network for any batch size, or for the example's where its graph holds that
    one, with a remark. `NamingError` where no export is possible."""
    own = next(pruned.parameters())
    inputs = random_like(of_spec(pruned.fxprune.plan.inputs), dtype=own.dtype, device=own.device)
    try:
        return write_whole(path, lambda made: _export(pruned, inputs, made, remark))
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


def _export(pruned: Any, inputs: Inputs, path: Path, remark: Remark) -> None:
    def export(given: Inputs, **more: Any) -> None:
        how: Any = {"dynamo": True, "external_data": False, "verbose": False, **more}
        torch.onnx.export(pruned, given.args, str(path), kwargs=given.kwargs, **how)

    try:
        wide = batched(inputs, 3)  # sizes 1 are taken for constants
        with silent():
            export(wide, dynamic_shapes=_any_batch(pruned, wide))
    except ImportError:
        raise
    except Exception as error:
        export(inputs)
        why = first_line(_first_cause(error))
        remark(f"the ONNX file takes {inputs.describe()} only, not any batch size: {why}")


def _first_cause(error: BaseException) -> BaseException:
    """The exception that others were raised from."""
    return error if error.__cause__ is None else _first_cause(error.__cause__)


def _any_batch(pruned: Any, inputs: Inputs) -> dict[str, Any]:
    """The first dim of arguments that hold the batch, as one that may vary."""
    size, batch = batch_of(inputs), torch.export.Dim("batch")
    given = inspect.signature(pruned.forward).bind(*inputs.args, **inputs.kwargs).arguments
    found = {
        name: {0: batch} if isinstance(value, torch.Tensor) and has_batch(value, size) else None
        for name, value in given.items()
    }
    if not any(found.values()):
        raise ValueError("no argument is a batch")
    return found


def check_picture(path: Path) -> None:
    """Refuse kinds of pictures that cannot be written, and a missing matplotlib."""
    if path.suffix not in _PICTURES:
        kinds = ", ".join(_PICTURES)
        raise OptionError(f"--plot {path} is no picture's name", hint=f"its end is one of {kinds}")
    check_matplotlib()


def save_picture(report: Report, path: Path) -> Path:
    """Draw the widths of layers, before and after."""
    figure, kind = report.plot("widths"), path.suffix.removeprefix(".")
    return write_whole(path, lambda made: figure.savefig(made, format=kind))
