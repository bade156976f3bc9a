"""What is refused before any work: models not fit to be pruned, options out of range."""

from __future__ import annotations

import copy
import itertools
import keyword
import numbers
import re
from collections.abc import Mapping
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from .errors import InputError, ModelError, OptionError, first_line, nearest
from .trees import leaves

_WRAPPERS = {
    "DataParallel": "model.module",
    "DistributedDataParallel": "model.module",
    "FullyShardedDataParallel": "the module before it is wrapped",
    "OptimizedModule": "model._orig_mod",
}


def tensors_of(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name; a tied tensor under its first name."""
    return named_tensors(dict(model.named_modules()))


def named_tensors(modules: Mapping[str, nn.Module]) -> dict[str, Tensor]:
    """The same from named modules, without a walk through the tree: parameters, then buffers."""
    found: dict[str, Tensor] = {}
    for table in ("_parameters", "_buffers"):
        seen: set[int] = set()
        for prefix, module in modules.items():
            for name, tensor in getattr(module, table).items():
                if tensor is not None and id(tensor) not in seen:
                    seen.add(id(tensor))
                    found[f"{prefix}.{name}" if prefix else name] = tensor
    return found


def check_model(model: Any) -> None:
    """Raise `ModelError` for a model that is lazy, quantized, wrapped, scripted or spread out."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a torch.nn.Module is needed, not {type(model).__name__}",
            hint="pass the model object itself",
        )
    wrapper = type(model).__name__
    if wrapper in _WRAPPERS:
        raise ModelError(
            f"the model is wrapped in {wrapper}",
            hint=f"prune {_WRAPPERS[wrapper]}, and wrap the result again",
        )
    modules = dict(model.named_modules())
    scripted = next((n for n, m in modules.items() if isinstance(m, torch.jit.ScriptModule)), None)
    if scripted is not None:
        raise ModelError(
            f"{f'module `{scripted}`' if scripted else 'the model'} is TorchScript, which has no "
            "Python forward to trace",
            hint="prune the eager model",
        )
    for name, module in modules.items():
        _check_module(name, module)
    _check_names(model, modules)
    devices = {str(t.device): name for name, t in named_tensors(modules).items()}
    if len(devices) > 1:
        raise ModelError(
            f"the model is on several devices: {', '.join(sorted(devices))}",
            details=[(device, name) for device, name in sorted(devices.items())],
            hint="move it to one device with model.to(device), prune, and place it again",
        )


def _check_names(model: nn.Module, modules: Mapping[str, nn.Module]) -> None:
    """Raise `ModelError` for a name with which the result's attributes or code would break."""
    for kind in ("_modules", "_parameters", "_buffers"):
        for name in getattr(model, kind):
            if name in _taken_names():
                raise _name_error(_KINDS[kind], name, "it is an attribute of fx.GraphModule")
        for prefix, module in modules.items():
            for name in getattr(module, kind):
                full = f"{prefix}.{name}" if prefix else name
                if keyword.iskeyword(name):
                    raise _name_error(_KINDS[kind], full, "it is a Python keyword")
                if _BREAKS.search(name):
                    raise _name_error(_KINDS[kind], repr(full), "it would end a text in quotes")


_BREAKS = re.compile(r'["\\\n\r]')
_KINDS = {"_modules": "child", "_parameters": "parameter", "_buffers": "buffer"}


@cache
def _taken_names() -> frozenset[str]:
    made = fx.GraphModule(nn.Module(), fx.Graph())
    return frozenset((*dir(made), *vars(made), "meta", "fxprune", "self"))


def _name_error(kind: str, name: str, why: str) -> ModelError:
    fault = f"{kind} `{name}` has a name that a module written by torch.fx cannot have"
    return ModelError(fault, hint=f"rename it; {why}")


def _check_module(name: str, module: nn.Module) -> None:
    kind = type(module)
    for tensor in (*module._parameters.values(), *module._buffers.values()):
        if isinstance(
            tensor, (nn.parameter.UninitializedParameter, nn.parameter.UninitializedBuffer)
        ):
            raise ModelError(
                f"module `{name}` ({kind.__name__}) is lazy: its shapes are not known yet",
                hint="run the model once on an example input before pruning",
            )
    quantized = "quantized" in kind.__module__ and hasattr(module, "_packed_params")
    if quantized or (
        kind.__module__.startswith("torch.ao.nn.quantized") and hasattr(module, "zero_point")
    ):
        raise ModelError(
            f"module `{name}` ({kind.__name__}) is quantized: its weights are packed integers",
            hint="prune the float model, then quantize the pruned one",
        )


def check_finite(tensors: Mapping[str, Tensor]) -> None:
    """Raise `ModelError` for the first tensor that holds NaN or infinity, or nothing at all."""
    for name, tensor in tensors.items():
        if tensor.is_meta:
            raise ModelError(
                f"`{name}` is on the meta device: it has no values to score",
                hint="load the weights first; fxprune.analyze works without values",
            )
        if not tensor.is_floating_point() or bool(tensor.detach().sum().isfinite()):
            continue  # a finite sum has finite terms
        if not bool(torch.isfinite(tensor).all()):
            kind = "NaN" if bool(torch.isnan(tensor).any()) else "infinity"
            raise ModelError(
                f"`{name}` holds {kind}",
                hint="scores of such weights mean nothing; load or train sound ones first",
            )


def check_share(
    name: str,
    value: Any,
    *,
    whole: bool = False,
    hint: str = "0.5 removes half of the channels",
) -> None:
    """Raise `OptionError` unless `value` is a number in [0, 1), or [0, 1] where `whole`."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionError(f"{name} must be a number, not {type(value).__name__}", hint=hint)
    share = float(value)
    if not (0 <= share < 1 or (whole and share == 1)):
        percent = f"{share / 100:g}" if 1 < share < 100 else ""
        raise OptionError(
            f"{name}={value} is outside [0, 1{']' if whole else ')'}",
            hint=f"a share is meant: {percent} for {share:g} %" if percent else hint,
        )


def check_count(name: str, value: Any) -> None:
    """Raise `OptionError` unless `value` is a whole number of at least 1."""
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise OptionError(f"{name}={value!r} must be a whole number of at least 1")


def check_tensors(batch: Any) -> None:
    """Raise `InputError` for a batch of numpy's arrays."""
    if leaves(batch, np.ndarray):
        raise InputError(
            "data gave an ndarray, and no tensor",
            hint="torch.as_tensor makes one: torch.as_tensor(x, dtype=torch.float32)",
        )


def device_of(model: nn.Module) -> torch.device:
    """Where a model is: the device of its first parameter, or buffer; the CPU without any."""
    tensors = itertools.chain(model.parameters(), model.buffers())
    return next((t.device for t in tensors), torch.device("cpu"))


def usable_device(device: str | torch.device) -> torch.device:
    """A device that a tensor can be put on; `OptionError` for any other."""
    try:
        found = torch.device(device)
        torch.empty(1, device=found)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        raise OptionError(
            f"device `{device}` cannot be used: {first_line(error)}",
            hint='"cpu" always works; "cuda" needs a GPU and a PyTorch built for it',
        ) from None
    return found


def check_choice(name: str, value: Any, known: tuple[Any, ...]) -> None:
    """Raise `OptionError` unless `value` is one of `known`."""
    if not any(value is choice or value == choice for choice in known):
        choices = [str(choice) for choice in known]
        raise OptionError(
            f"{name}={value!r} is not known",
            details=[("known", ", ".join(choices))],
            hint=nearest(str(value), choices),
        )


def clone(model: nn.Module) -> nn.Module:
    """A deep copy; what is computed from parameters, as masked weights are, becomes a value."""
    computed = {
        id(value): value.detach().clone()
        for module in model.modules()
        for value in vars(module).values()
        if isinstance(value, Tensor) and not value.is_leaf
    }
    return copy.deepcopy(model, computed)
