"""Arguments of nodes and settings of layers as plain data, and back.

Numbers, texts and lists stand for themselves. What JSON has no form for is a dict with one key that
says what it is: ``{"node": "conv1"}``, ``{"tuple": [...]}``, ``{"slice": [...]}``,
``{"dtype": "float32"}``.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import fx

_DEEP = 50  # no argument is nested deeper


class Undescribed(Exception):
    """Something has no form as plain data; the text says what."""


class Unsound(Exception):
    """Plain data that stand for nothing of a network; the text says where."""


def is_plain(value: Any) -> bool:
    """Whether a value is made of numbers and texts."""
    if isinstance(value, (list, tuple)):
        return type(value) in (list, tuple, torch.Size) and all(map(is_plain, value))
    return value is None or isinstance(value, (bool, int, float, str))


def encoded(value: Any) -> Any:
    """A value as plain data. `Undescribed` where it is of another kind."""
    if isinstance(value, fx.Node):
        return {"node": value.name}
    if value is None or isinstance(value, (bool, str)) or type(value) is int:
        return value
    if isinstance(value, float):
        return value if math.isfinite(value) else {"float": str(value)}
    if type(value) in (tuple, torch.Size):
        return {"tuple": [encoded(each) for each in value]}
    if isinstance(value, list):
        return [encoded(each) for each in value]
    return _one_key(value)


def _one_key(value: Any) -> Any:
    if type(value) is dict or isinstance(value, fx.immutable_collections.immutable_dict):
        return {"dict": [[encoded(key), encoded(each)] for key, each in value.items()]}
    if isinstance(value, slice):
        return {"slice": [encoded(each) for each in (value.start, value.stop, value.step)]}
    for kind in (torch.dtype, torch.layout, torch.memory_format):
        if isinstance(value, kind):
            return {kind.__name__: str(value).rpartition(".")[2]}
    if isinstance(value, torch.device):
        return {"device": str(value)}
    if value is Ellipsis:
        return {"ellipsis": None}
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    raise Undescribed(f"holds a {type(value).__name__}")


def decoded(data: Any, nodes: Mapping[str, fx.Node], depth: int = 0) -> Any:
    """The value that plain data stand for; `Unsound` where they stand for none."""
    if depth > _DEEP:
        raise Unsound("arguments are nested too deep")
    if data is None or isinstance(data, (bool, int, float, str)):
        return data
    if isinstance(data, (list, tuple)):
        return type(data)(decoded(each, nodes, depth + 1) for each in data)
    if not isinstance(data, dict) or (data and len(data) != 1):
        raise Unsound("an argument has no kind")
    kind, inner = next(iter(data.items()), ("dict", []))
    try:
        return _DECODERS[kind](inner, nodes, depth + 1)
    except (KeyError, TypeError, ValueError, RuntimeError, AttributeError):
        raise Unsound(f"an argument is no {str(kind)[:40]}") from None


def _of_torch(kind: type) -> Any:
    def read(name: str, nodes: Any, depth: int) -> Any:
        found = getattr(torch, name) if name.replace("_", "").isalnum() else None
        if not isinstance(found, kind):
            raise ValueError(name)
        return found

    return read


def _all(data: Any, nodes: Mapping[str, fx.Node], depth: int) -> list[Any]:
    if not isinstance(data, list):
        raise TypeError(type(data))
    return [decoded(each, nodes, depth) for each in data]


_DECODERS: dict[str, Any] = {
    "node": lambda name, nodes, depth: nodes[name],
    "float": lambda text, nodes, depth: float(text),
    "tuple": lambda data, nodes, depth: tuple(_all(data, nodes, depth)),
    "dict": lambda data, nodes, depth: dict(_all(data, nodes, depth)),
    "slice": lambda data, nodes, depth: slice(*_all(data, nodes, depth)),
    "dtype": _of_torch(torch.dtype),
    "layout": _of_torch(torch.layout),
    "memory_format": _of_torch(torch.memory_format),
    "device": lambda text, nodes, depth: torch.device(text),
    "ellipsis": lambda data, nodes, depth: ...,
    "complex": lambda data, nodes, depth: complex(*data),
}
