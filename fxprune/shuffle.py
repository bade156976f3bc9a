"""Channels that leave a chain of movements in another order than they came.

A channel shuffle (view to blocks, transpose, view back) mixes blocks: after pruning, the same
chain would deliver the kept channels in another order. One gather in its place delivers exactly
the right ones, so that channels on either side can be chosen freely.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .ids import Value


@dataclass(frozen=True)
class Gather:
    """``out[j] = source[positions[j]]`` along `dim` says what the chain up to a node does."""

    source: fx.Node
    dim: int
    positions: Tensor
    inside: tuple[fx.Node, ...]


Rerun = Callable[[fx.Node, Tensor, Sequence[int]], "list[Tensor] | None"]


def in_order(ids: Tensor, origin: Tensor) -> bool:
    """Whether runs of `ids` along its last varying dim are runs of `origin`'s rows, in order.

    If so, any choice with equal counts a row passes a row-major reshape in the right order.
    """
    rows = ids.squeeze()
    rows = rows.reshape(-1, rows.shape[-1])
    known = origin.reshape(-1)
    first = torch.full((int(max(known.max(), rows.max())) + 1,), len(known))
    first.scatter_reduce_(0, known, torch.arange(len(known)), "amin")
    where = first[rows]
    if bool((where == len(known)).any()):
        return False
    row, position = where // origin.shape[-1], where % origin.shape[-1]
    return bool((row == row[:, :1]).all()) and bool((position[:, 1:] > position[:, :-1]).all())


def find_gather(node: fx.Node, values: dict[fx.Node, Any], rerun: Rerun) -> Gather | None:
    """The gather that equals the chain of single-reader movements ending in `node`, if any."""
    chain = [node]
    source = node.args[0]
    while isinstance(source, fx.Node) and isinstance(values.get(source), Value):
        value = values[source]
        if len(value.layers) != 1:
            return None
        if len(value.layers[0].varying) == 1:
            return _checked(source, value, chain[::-1], values, rerun)
        if (
            sum(
                isinstance(user.meta.get("val"), Tensor) or user.op == "output"
                for user in source.users
            )
            != 1
        ):
            return None
        chain.append(source)
        source = (
            source.args[0]
            if source.args and source.op in ("call_method", "call_function")
            else None
        )
    return None


def _checked(
    source: fx.Node, value: Value, chain: list[fx.Node], values, rerun: Rerun
) -> Gather | None:
    dim = value.layers[0].varying[0]
    positions = None
    for d, size in enumerate(value.shape):
        if size == 1:
            continue
        shape = [1] * len(value.shape)
        shape[d] = size
        found = _run(torch.arange(1, size + 1).view(shape), source, chain, rerun)
        if found is None or found.ndim != len(value.shape) or found.shape[d] == 1:
            return None
        if any(n > 1 for i, n in enumerate(found.shape) if i != d):
            return None
        if d == dim:
            positions = found.reshape(-1) - 1
        elif not torch.equal(found.reshape(-1), torch.arange(1, size + 1)):
            return None
    return None if positions is None else Gather(source, dim, positions, tuple(chain))


def _run(ids: Tensor, source: fx.Node, chain: list[fx.Node], rerun: Rerun) -> Tensor | None:
    shape: Sequence[int] = source.meta["val"].shape
    for node in chain:
        found = rerun(node, ids, shape)
        if found is None or len(found) != 1:
            return None
        ids, shape = found[0], node.meta["val"].shape
    return ids
