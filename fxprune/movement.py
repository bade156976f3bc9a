"""Ids through ops that only move elements: the op itself is run on the id tensors.

Dims along which ids do not vary have size 1, and the op is run on those small tensors where that
gives the right shape, on expanded ones where it does not.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from .ids import compress

Run = Callable[[Tensor], Any]


def move(
    ids: Tensor, shape: Sequence[int], run: Run, outputs: Sequence[Sequence[int]]
) -> list[Tensor] | None:
    """Run a movement op on ids of a value of `shape`; one result an output, or None if it fails."""
    for tensor in (ids, ids.expand(tuple(shape))):
        try:
            found = run(tensor)
        except (RuntimeError, IndexError, ValueError, TypeError):
            continue
        results = list(found) if isinstance(found, (tuple, list)) else [found]
        if _fits(results, outputs):
            return [compress(r, range(r.ndim)) for r in results]
    return None


def _fits(results: list[Tensor], outputs: Sequence[Sequence[int]]) -> bool:
    return len(results) == len(outputs) and all(
        r.ndim == len(shape) and all(a in (1, b) for a, b in zip(r.shape, shape, strict=True))
        for r, shape in zip(results, outputs, strict=True)
    )


def reshape(ids: Tensor, old: Sequence[int], new: Sequence[int]) -> Tensor:
    """Ids of a value reshaped from `old` to `new`, row-major; only dims that mix are expanded.

    [6, 4, 4] -> [2, 3, 16] falls into the blocks 6 -> 2 3 and 4 4 -> 16; ids that vary over the
    first dim alone become (2, 3, 1) without touching the 16.
    """
    expanded: list[int] = []
    target: list[int] = []
    for rows, columns in _blocks(old, new):
        varies = any(ids.shape[d] > 1 for d in rows)
        expanded += [old[d] if varies else 1 for d in rows]
        target += [new[d] if varies else 1 for d in columns]
    found = ids.expand(expanded).reshape(target)
    mixed = [
        d for rows, columns in _blocks(old, new) if len(rows) + len(columns) > 2 for d in columns
    ]
    return compress(found, mixed)


def _blocks(old: Sequence[int], new: Sequence[int]) -> list[tuple[list[int], list[int]]]:
    """The finest runs of old and new dims with equal products."""
    blocks: list[tuple[list[int], list[int]]] = []
    i = j = 0
    while i < len(old) or j < len(new):
        rows: list[int] = []
        columns: list[int] = []
        a = b = 1
        while (
            not (rows or columns)
            or a != b
            or (i >= len(old) and j < len(new))
            or (j >= len(new) and i < len(old))
        ):
            if i < len(old) and (a <= b or j >= len(new)):
                a *= old[i]
                rows.append(i)
                i += 1
            elif j < len(new):
                b *= new[j]
                columns.append(j)
                j += 1
            else:
                break
        blocks.append((rows, columns))
    return blocks


def join(pieces: Sequence[Tensor | None], sizes: Sequence[int], dim: int) -> Tensor:
    """Ids of a concatenation along `dim`, from those of the pieces (None where there are none)."""
    ndim = next(p.ndim for p in pieces if p is not None)
    full = [max((p.shape[d] for p in pieces if p is not None), default=1) for d in range(ndim)]
    laid = []
    for piece, size in zip(pieces, sizes, strict=True):
        shape = [size if d == dim else full[d] for d in range(ndim)]
        ids = torch.zeros([1] * ndim, dtype=torch.int64) if piece is None else piece
        laid.append(ids.expand(shape))
    return torch.cat(laid, dim)
