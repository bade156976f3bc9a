"""Pruned networks on disk: weights and plan in a folder, without pickle.

``model.safetensors``  the weights, with the plan in the file's header: all that `load` reads
``plan.json``          the plan again, for people and other programs
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .api import apply
from .check import check_model
from .errors import ModelError, PlanError, SaveError, first_line
from .files import write_text, write_whole
from .plans import Plan

WEIGHTS, PLAN = "model.safetensors", "plan.json"
_HEADER = "fxprune_plan"
_SHOWN = 6
_PICKLE = "torch.save(pruned, file) pickles the whole network"


def save(pruned: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a pruned network, trained or not, into a folder, which is made where it is missing.

    Each file appears whole or not at all, and other files in the folder are left alone. Raises
    `ModelError` if `pruned` is not what `prune`, `apply` or `load` gave, `SaveError` if nothing can
    be written there, or if the format cannot hold the weights.
    """
    plan, path = _plan_of(pruned), Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / WEIGHTS, lambda made: _write_weights(pruned, plan, made))
        write_text(path / PLAN, plan.to_json(indent=2))
    except OSError as error:
        why = error.strerror or str(error)
        raise SaveError(f"{path} cannot be written: {why}", hint="name another folder") from None
    return path


def load(folder: str | os.PathLike[str], model: nn.Module) -> Any:
    """The network that `save` wrote, made anew from the original `model` and the plan, with the
    saved weights.

    `model` is built as the original was; its weights do not matter, and it is not changed. The
    result is what `prune` gives, with ``.fxprune.plan`` and a report, on the model's device and in
    the saved dtypes. No code of the folder is run. Raises `SaveError` where files are missing,
    damaged or foreign, `PlanError` where they are of another model.
    """
    check_model(model)
    text, tensors = _read(Path(folder) / WEIGHTS)
    try:
        plan = Plan.from_json(text)
    except PlanError as error:
        raise SaveError(f"the plan in {Path(folder) / WEIGHTS} is damaged: {error.fault}") from None
    pruned = apply(model, plan, verify=False)
    own = pruned.state_dict(keep_vars=True)
    _check_alike(Path(folder) / WEIGHTS, own, tensors)
    _cast_unsaved(pruned, own, tensors)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.data = tensors[name].to(tensor.device)
    return pruned


def _cast_unsaved(
    pruned: nn.Module, own: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> None:
    """Buffers that are not saved follow where all weights of their dtype have another in the
    file, as they did when the network was cast."""
    changes: dict[torch.dtype, set[torch.dtype]] = {}
    for name, tensor in own.items():
        changes.setdefault(tensor.dtype, set()).add(found[name].dtype)
    for name, buffer in pruned.named_buffers():
        dtypes = changes.get(buffer.dtype, set())
        if name not in own and buffer.is_floating_point() and len(dtypes) == 1:
            buffer.data = buffer.to(next(iter(dtypes)))


def _plan_of(pruned: nn.Module) -> Plan:
    check_model(pruned)
    plan = getattr(getattr(pruned, "fxprune", None), "plan", None)
    if isinstance(plan, Plan):
        return plan
    raise ModelError(
        f"a pruned network is needed, not {type(pruned).__name__}",
        hint="pass what fxprune.prune or fxprune.apply gave",
    )


def _write_weights(pruned: nn.Module, plan: Plan, path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    tensors, seen = {}, set()
    for name, tensor in pruned.state_dict().items():
        if not isinstance(tensor, Tensor):
            kind = type(tensor).__name__
            raise SaveError(f"{name} is a {kind}, and only tensors are saved", hint=_PICKLE)
        whole = tensor.detach().cpu().contiguous()
        place = whole.untyped_storage().data_ptr()
        tensors[name] = whole.clone() if place in seen else whole  # the format shares no memory
        seen.add(place)
    try:
        save_file(tensors, path, metadata={_HEADER: plan.to_json(), "format": "pt"})
    except (KeyError, ValueError, SafetensorError) as error:  # a dtype, a layout
        raise SaveError(
            f"safetensors cannot hold these weights: {first_line(error)}", hint=_PICKLE
        ) from None


def _read(path: Path) -> tuple[str, dict[str, Tensor]]:
    """The plan's text and the weights of a file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise SaveError(f"there is no {path}", hint="name a folder that fxprune.save wrote")
    try:
        with safe_open(path, "pt") as file:
            text = (file.metadata() or {}).get(_HEADER)
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise SaveError(f"{path} is damaged: {error}", hint="save the network again") from None
    if text is None:
        raise SaveError(f"{path} holds no plan", hint="name a folder that fxprune.save wrote")
    return text, tensors


def _check_alike(path: Path, own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> None:
    wrong = [("missing", name) for name in own.keys() - found.keys()]
    wrong += [("unexpected", name) for name in found.keys() - own.keys()]
    wrong += [
        ("shape", f"{name} is {list(found[name].shape)}, by its plan {list(own[name].shape)}")
        for name in own.keys() & found.keys()
        if own[name].shape != found[name].shape
    ]
    wrong += [
        ("dtype", f"{name} is {found[name].dtype}, for {own[name].dtype}")
        for name in own.keys() & found.keys()
        if _kind(own[name]) != _kind(found[name])
    ]
    if wrong:
        more = [("", f"and {len(wrong) - _SHOWN} more")] if wrong[_SHOWN:] else []
        raise SaveError(
            f"the weights in {path} do not fit their plan",
            details=[*sorted(wrong)[:_SHOWN], *more],
            hint="save the network again",
        )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """What a change of precision leaves as it is."""
    return tensor.is_floating_point(), tensor.is_complex()
