"""Positions that the graph computes: where they pick along dims without channels, ids pass.

What is picked then has the same channels whatever the positions are, so ids are run with zeros in
their place.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from .trees import leaves, mapped


def standins(args: Any) -> Any:
    """Arguments with zeros in place of computed positions, which have a shape and no values."""

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        return torch.zeros(value.shape, dtype=value.dtype)

    return mapped(zeros, args)


def are_computed(args: Any) -> bool:
    return any(t.is_meta for t in leaves(args, Tensor))


def picked_dims(index: Any, rank: int) -> set[int] | None:
    """The dims of a value of `rank` along which ``value[index]`` picks by computed positions; None
    where computed flags pick."""
    parts = index if isinstance(index, (tuple, list)) else (index,)
    taken = sum(_consumes(part) for part in parts)
    dims, at = set(), 0
    for part in parts:
        if isinstance(part, Tensor) and part.is_meta:
            if part.dtype in (torch.bool, torch.uint8):
                return None
            dims.add(at)
        at += rank - taken if part is Ellipsis else _consumes(part)
    return dims


def _consumes(part: Any) -> int:
    """How many dims a part of an index takes."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    flags = isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)
    return part.ndim if flags else 1
