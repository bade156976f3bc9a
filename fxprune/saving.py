"""Pruned networks on disk: weights, plan and source code in a folder, without pickle.

``model.safetensors``  the weights, and in the header the plan and the network's description: all
                       that `load` reads
``plan.json``          the plan again, for people and other programs
``model.py``           the network as source code, which needs neither fxprune nor the original
"""

from __future__ import annotations

import hashlib
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from .api import apply
from .check import check_model
from .described import Network, build, describe_network, tensors_of
from .errors import ModelError, PlanError, SaveError, first_line
from .files import write_text, write_whole
from .plain import Undescribed, Unsound
from .plans import Plan
from .pruned import Info
from .report import Report
from .source import written

WEIGHTS, PLAN, SOURCE = "model.safetensors", "plan.json", "model.py"
_PLAN, _NETWORK, _REPORT = "fxprune_plan", "fxprune_network", "fxprune_report"
_DIGEST = "fxprune_digest"
_SHOWN = 6
_PICKLE = "torch.save(pruned, file) pickles the whole network"
_AGAIN = "save the network again"
_OURS = "name a folder that fxprune.save wrote"


def save(pruned: nn.Module, folder: str | os.PathLike[str]) -> Path:
    """Write a pruned network, trained or not, into a folder, which is made where it is missing.

    Each file appears whole or not at all, and other files in the folder are left alone. A network
    that is no graph of PyTorch's own ops, as a recorded detector, gets no ``model.py``, and a
    warning says why; `load` needs the original then. Raises `ModelError` if `pruned` is not what
    `prune`, `apply` or `load` gave, `SaveError` if nothing can be written there, or if the format
    cannot hold the weights.
    """
    plan, path = _plan_of(pruned), Path(folder)
    network, why = _described(pruned)
    header = {_PLAN: plan.to_json(), "format": "pt", **_said_of(pruned, network)}
    try:
        path.mkdir(parents=True, exist_ok=True)
        write_whole(path / WEIGHTS, lambda made: _write_weights(pruned, header, made))
        write_text(path / PLAN, plan.to_json(indent=2))
        if network is None:
            (path / SOURCE).unlink(missing_ok=True)  # an older one would be of another network
        else:
            write_text(path / SOURCE, _source(pruned, network))
    except OSError as error:
        why = error.strerror or str(error)
        raise SaveError(f"{path} cannot be written: {why}", hint="name another folder") from None
    if network is None:
        warnings.warn(
            f"{path} has no {SOURCE}, and is loaded by fxprune.load(folder, model): {why}",
            stacklevel=2,
        )
    return path


def load(folder: str | os.PathLike[str], model: nn.Module | None = None) -> Any:
    """The network that `save` wrote, with the saved weights, ``.fxprune.plan`` and the report.

    It is made of what the folder says: layers of PyTorch and calls of its ops. No code of the
    folder is run, ``model.py`` is not read. It computes what the saved network computed, bit for
    bit on the same machine, trains, exports, and can be pruned again.

    With `model`, built as the original was, it is made anew from that and the plan; networks that
    were saved without a ``model.py`` need it. The weights of `model` do not matter, and it is not
    changed; the result is on its device. Raises `SaveError` where files are missing, damaged or
    foreign, `PlanError` where they are of another model.
    """
    path = Path(folder) / WEIGHTS
    header, tensors = _read(path)
    plan = _plan_in(header, path)
    if model is None:
        return _rebuilt(path, header, tensors, plan)
    check_model(model)
    pruned = apply(model, plan, verify=False)
    own = tensors_of(pruned)
    _check_alike(path, own, tensors)
    with torch.no_grad():
        for name, tensor in own.items():
            tensor.data = tensors[name].to(tensor.device)
    return pruned


def report_of(folder: str | os.PathLike[str]) -> Report | None:
    """The report of a saved network, without building it; `SaveError` as in `load`."""
    path = Path(folder) / WEIGHTS
    header, _ = _read(path)
    try:
        return Report.from_json(header[_REPORT]) if _REPORT in header else None
    except ValidationError as error:
        raise SaveError(f"{path} is damaged: {_why(error)}", hint=_AGAIN) from None


# -- what is saved ---------------------------------------------------------------------------------


def _described(pruned: nn.Module) -> tuple[Network | None, str]:
    """The network as data; or why it has no such form."""
    try:
        return describe_network(pruned), ""
    except Undescribed as why:
        return None, str(why)


def _said_of(pruned: Any, network: Network | None) -> dict[str, str]:
    found = {_NETWORK: network.model_dump_json()} if network else {}
    report = pruned.fxprune.report
    return {**found, _REPORT: report.to_json(indent=None)} if report else found


def _source(pruned: Any, network: Network) -> str:
    tensors = tensors_of(pruned)
    shapes = {n: (list(t.shape), str(t.dtype).rpartition(".")[2]) for n, t in tensors.items()}
    report = pruned.fxprune.report
    return written(network, shapes, "\n\n".join(_about(report)) if report else network.name)


def _about(report: Report) -> list[str]:
    title, inputs = report.heading()
    counts = (("channels", report.channels), ("parameters", report.params), ("MACs", report.macs))
    lines = [f"    {name:<10} {a:>16,} -> {b:>16,}" for name, (a, b) in counts]
    return [f"{title}.", "\n".join(lines), f"Traced on {inputs.partition(' on ')[2] or inputs}."]


def _plan_of(pruned: nn.Module) -> Plan:
    check_model(pruned)
    plan = getattr(getattr(pruned, "fxprune", None), "plan", None)
    if isinstance(plan, Plan):
        return plan
    raise ModelError(
        f"a pruned network is needed, not {type(pruned).__name__}",
        hint="pass what fxprune.prune or fxprune.apply gave",
    )


def _write_weights(pruned: nn.Module, header: Mapping[str, str], path: Path) -> None:
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    for name, value in pruned.state_dict().items():
        if not isinstance(value, Tensor):
            kind = type(value).__name__
            raise SaveError(f"{name} is a {kind}, and only tensors are saved", hint=_PICKLE)
    tensors, seen = {}, set()
    for name, tensor in tensors_of(pruned).items():
        whole = tensor.detach().cpu().contiguous()
        place = whole.untyped_storage().data_ptr()
        tensors[name] = whole.clone() if place in seen else whole  # the format shares no memory
        seen.add(place)
    digest = _digest(header, tensors)
    try:
        save_file(tensors, path, metadata={**header, _DIGEST: digest})
    except (KeyError, ValueError, SafetensorError) as error:  # a dtype, a layout
        raise SaveError(
            f"safetensors cannot hold these weights: {first_line(error)}", hint=_PICKLE
        ) from None


def _digest(header: Mapping[str, str], tensors: Mapping[str, Tensor]) -> str:
    """A checksum of all that a file says, against damage; it proves nothing of who wrote it."""
    found = hashlib.blake2b(digest_size=16)
    said = {name: text for name, text in header.items() if name != _DIGEST}
    found.update(json.dumps(said, sort_keys=True).encode())
    for name, tensor in sorted(tensors.items()):
        found.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        found.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


# -- what is read ----------------------------------------------------------------------------------


def _read(path: Path) -> tuple[dict[str, str], dict[str, Tensor]]:
    """The header and the weights of a file."""
    from safetensors import SafetensorError, safe_open

    if not path.is_file():
        raise SaveError(f"there is no {path}", hint=_OURS)
    try:
        with safe_open(path, "pt") as file:
            header = file.metadata() or {}
            # what lies in the file is not aligned, and would be summed up in another order
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError, RuntimeError) as error:
        raise SaveError(f"{path} is damaged: {first_line(error)}", hint=_AGAIN) from None
    if _PLAN not in header:
        raise SaveError(f"{path} holds no plan", hint=_OURS)
    if header.get(_DIGEST) != _digest(header, tensors):
        raise SaveError(f"{path} is damaged: its checksum is another", hint=_AGAIN)
    return header, tensors


def _plan_in(header: Mapping[str, str], path: Path) -> Plan:
    try:
        return Plan.from_json(header[_PLAN])
    except PlanError as error:
        raise SaveError(f"the plan in {path} is damaged: {error.fault}", hint=_AGAIN) from None


def _rebuilt(
    path: Path, header: Mapping[str, str], tensors: Mapping[str, Tensor], plan: Plan
) -> nn.Module:
    if _NETWORK not in header:
        raise SaveError(
            f"{path} does not say how the network is built",
            hint="build the original, and call fxprune.load(folder, model)",
        )
    try:
        pruned = build(Network.model_validate_json(header[_NETWORK]), tensors)
        report = Report.from_json(header[_REPORT]) if _REPORT in header else None
    except (Unsound, ValidationError, RecursionError) as error:
        raise SaveError(f"{path} is damaged: {_why(error)}", hint=_AGAIN) from None
    pruned.meta["fxprune"] = Info(plan, report)
    return pruned


def _why(error: Exception) -> str:
    if isinstance(error, ValidationError):
        first = error.errors()[0]
        return f"{'.'.join(map(str, first['loc']))}: {first['msg']}"
    return first_line(error)


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
            hint=_AGAIN,
        )


def _kind(tensor: Tensor) -> tuple[bool, bool]:
    """What a change of precision leaves as it is."""
    return tensor.is_floating_point(), tensor.is_complex()
