"""Elements picked by computed positions: channels along other dims pass as they are.

``x[keep]`` and ``x[rows, :, columns] = y`` pick along the dims that `keep`, `rows` and `columns`
stand at, wherever their values point. Ids that do not vary there do not depend on the values.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from .ids import compress
from .trees import leaves


def is_computed(index: Any) -> bool:
    """Whether positions in an index depend on the input."""
    if isinstance(index, slice):
        return is_computed((index.start, index.stop, index.step))
    if isinstance(index, (tuple, list)):
        return any(map(is_computed, index))
    return any(t.is_meta for t in leaves(index, Tensor))


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
    rest = rank - sum(map(consumes, parts))
    dim = 0
    for part in parts:
        if part is Ellipsis:
            for d in range(dim, dim + rest):
                yield slice(None), range(d, d + 1)
            dim += rest
        else:
            yield part, range(dim, dim + consumes(part))
            dim += consumes(part)


def consumes(part: Any) -> int:
    """How many dims a part of an index stands for."""
    if part is None or part is Ellipsis or isinstance(part, bool):
        return 0
    is_mask = isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)
    return part.ndim if is_mask else 1


def _at_zero(part: Any, count: int) -> list[Any]:
    """What picks the one element of dims of size 1, and leaves as many dims as `part` does."""
    if isinstance(part, slice):
        return [slice(None)]
    if isinstance(part, int):
        return [0]
    is_mask = isinstance(part, Tensor) and part.dtype in (torch.bool, torch.uint8)
    rank = 1 if is_mask or not isinstance(part, Tensor) else part.ndim  # a list is a row
    return [torch.zeros([1] * rank, dtype=torch.long)] * count
