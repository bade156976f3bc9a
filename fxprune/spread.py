"""Narrow tensors at their places in wide ones, and what of a wide one goes."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .plans import Kept
from .rewrite import sliced


def gone(like: Tensor, kept: Mapping[int, Kept]) -> Tensor:
    """Mask, in the shape of `like`, of the elements that a plan's `kept` of it leaves out."""
    every = torch.ones(like.shape, dtype=torch.bool)
    return ~spread(sliced(every, dict(kept), {}), every, kept)


def spread(small: Tensor, like: Tensor, kept: Mapping[int, Kept]) -> Tensor:
    """A narrow tensor at its places in one as wide as the original."""
    made = torch.zeros_like(like)
    flat = [list(range(size)) for size in like.shape]
    nested: dict[int, Any] = {}
    for dim, indices in kept.items():
        if indices and isinstance(indices[0], list):
            nested[dim] = indices
        else:
            flat[dim] = [i for i in indices if isinstance(i, int)]
    if not nested:
        made[_grid(flat, like)] = small.to(like)
        return made
    ((dim, blocks),) = nested.items()
    tall = like.shape[0] // len(blocks)
    rows = np.array(flat[0]) // tall
    for block, columns in enumerate(blocks):
        mine = np.flatnonzero(rows == block)
        part = [*flat]
        part[0], part[dim] = [flat[0][i] for i in mine], list(columns)
        made[_grid(part, like)] = small[torch.as_tensor(mine, device=small.device)].to(like)
    return made


def _grid(indices: list[list[int]], like: Tensor) -> tuple[Tensor, ...]:
    grids = torch.meshgrid(
        *(torch.tensor(each, dtype=torch.long, device=like.device) for each in indices),
        indexing="ij",
    )
    return tuple(grids)
