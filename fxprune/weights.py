"""Files of weights, loaded strictly: every key must be there, and none besides."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import NamingError, first_line, nearest

_INSIDE = ("state_dict", "model_state_dict", "model")  # where checkpoints keep the weights
_MOST = 6


def load_into(model: nn.Module, path: str | Path) -> None:
    """Load a file into a model. `NamingError` with all keys that are missing, unexpected or of
    another shape; then the model is as it was."""
    found = read(path)
    own = {name: t for name, t in model.state_dict().items() if isinstance(t, Tensor)}
    wrong = list(_differences(own, found))
    if wrong:
        raise NamingError(
            f"{path} does not fit {type(model).__name__}: {_counted(wrong)}",
            details=list(_shortened(wrong)),
            hint=_hint(own, found),
        )
    model.load_state_dict(found)


def read(path: str | Path) -> dict[str, Tensor]:
    """The tensors of a .safetensors file, or of one that `torch.save` wrote; no code is run."""
    path = Path(path)
    if not path.is_file():
        near = [str(p) for p in path.parent.iterdir()] if path.parent.is_dir() else []
        raise NamingError(f"there is no file {path}", hint=nearest(str(path), near))
    found = _safetensors(path) if path.suffix == ".safetensors" else _pickled(path)
    found = _inner(found)
    if not isinstance(found, Mapping) or not all(isinstance(t, Tensor) for t in found.values()):
        raise NamingError(
            f"{path} holds no tensors by name",
            details=[("it holds", _contents(found))],
            hint="save model.state_dict()",
        )
    return dict(found)


def _safetensors(path: Path) -> Any:
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    try:
        return load_file(path)
    except (SafetensorError, OSError, ValueError) as error:
        raise NamingError(
            f"{path} is not a sound safetensors file: {first_line(error)}", hint="write it again"
        ) from None


def _pickled(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # a damaged pickle may raise anything
        unsafe = "weights_only" in str(error).lower() or "unsupported" in str(error).lower()
        why = "it holds more than tensors" if unsafe else first_line(error)
        raise NamingError(
            f"{path} cannot be read as weights: {why}",
            hint="loading code from a file could run anything: save model.state_dict(), or "
            "write a .safetensors file",
        ) from None


def _inner(found: Any) -> Any:
    """The weights inside a checkpoint that holds other things too."""
    if not isinstance(found, Mapping):
        return found
    inside = [key for key in _INSIDE if isinstance(found.get(key), Mapping)]
    return found[inside[0]] if inside else found


def _contents(found: Any) -> str:
    if not isinstance(found, Mapping):
        return type(found).__name__
    return ", ".join(f"{key} ({type(value).__name__})" for key, value in list(found.items())[:8])


def _differences(
    own: Mapping[str, Tensor], found: Mapping[str, Tensor]
) -> Iterator[tuple[str, str]]:
    yield from (("missing", f"{k} {list(own[k].shape)}") for k in own if k not in found)
    yield from (("unexpected", f"{k} {list(found[k].shape)}") for k in found if k not in own)
    for key in own:
        if key in found and own[key].shape != found[key].shape:
            yield "shape", f"{key} is {list(found[key].shape)}, needed {list(own[key].shape)}"


def _kinds(wrong: list[tuple[str, str]]) -> dict[str, list[str]]:
    kinds: dict[str, list[str]] = {}
    for kind, text in wrong:
        kinds.setdefault(kind, []).append(text)
    return kinds


def _counted(wrong: list[tuple[str, str]]) -> str:
    said = {"missing": "missing", "unexpected": "unexpected", "shape": "of another shape"}
    return ", ".join(f"{len(texts)} {said[kind]}" for kind, texts in _kinds(wrong).items())


def _shortened(wrong: list[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    for kind, texts in _kinds(wrong).items():
        for i, text in enumerate(texts[:_MOST]):
            yield kind if i == 0 else "", text
        if texts[_MOST:]:
            yield "", f"and {len(texts) - _MOST} more"


def _hint(own: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> str:
    """What the difference may come from: a wrapper's prefix, or another number of classes."""
    first = next(iter(found), "")
    prefix = f"{first.partition('.')[0]}."
    if found and all(k.startswith(prefix) for k in found) and first.removeprefix(prefix) in own:
        return (
            f"all keys begin with `{prefix}`: save the state_dict of the module inside the wrapper"
        )
    if own.keys() == found.keys():
        return "build the model as the one that was saved: --arg num_classes=10, for example"
    return "the weights must be of the same architecture, built with the same arguments"


__all__ = ["load_into", "read"]
