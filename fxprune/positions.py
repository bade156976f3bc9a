"""Positions that the graph computes: where they pick along dims without channels, ids pass.

What is picked then has the same channels whatever the positions are, so ids are run with zeros in
their place.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .ids import compress
from .trees import leaves, mapped


def standins(args: Any) -> Any:
    """Arguments with zeros in place of computed positions, which have a shape and no values."""

    def zeros(value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_meta:
            return value
        return torch.zeros(value.shape, dtype=value.dtype)

    return mapped(zeros, args)


def is_computed(index: Any) -> bool:
    """Whether positions in an index, or in arguments by name, depend on the input."""
    if isinstance(index, slice):
        return is_computed((index.start, index.stop, index.step))
    if isinstance(index, dict):
        return is_computed(list(index.values()))
    if isinstance(index, (tuple, list)):
        return any(map(is_computed, index))
    return any(t.is_meta for t in leaves(index, Tensor))


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


def picked(ids: Tensor, index: Any) -> Tensor | None:
    """The ids that ``value[index]`` has, with size 1 where they do not vary.

    None where the index picks by computed positions along dims in which the ids vary.
    """
    if isinstance(index, list):
        return None
    made: list[Any] = []
    for part, dims in _parts(index if isinstance(index, tuple) else (index,), ids.ndim):
        varies = any(ids.shape[d] > 1 for d in dims)
        if varies and is_computed(part):
            return None
        made += [part] if varies or not dims else _at_zero(part, len(dims))
    try:
        found = ids[tuple(made)]
    except (IndexError, RuntimeError, TypeError):
        return None
    return compress(found, range(found.ndim))


def _parts(parts: tuple, rank: int) -> Iterator[tuple[Any, range]]:
    """Each part of an index with the dims it stands at; an ellipsis as slices."""
    rest = rank - sum(map(_consumes, parts))
    dim = 0
    for part in parts:
        if part is Ellipsis:
            for d in range(dim, dim + rest):
                yield slice(None), range(d, d + 1)
            dim += rest
        else:
            yield part, range(dim, dim + _consumes(part))
            dim += _consumes(part)


def _at_zero(part: Any, count: int) -> list[Any]:
    """What picks the one element of dims of size 1, and leaves as many dims as `part` does."""
    if isinstance(part, slice):
        return [slice(None)]
    if isinstance(part, int):
        return [0]
    is_mask = isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)
    rank = 1 if is_mask or not isinstance(part, Tensor) else part.ndim  # a list is a row
    return [torch.zeros([1] * rank, dtype=torch.long)] * count
