"""Tensors joined along a dim, or stacked along a new one."""

from __future__ import annotations

from typing import Any

from torch import fx

from .. import movement
from ..ids import Layer, Value
from ..rules import Use
from .meeting import real_dims, tied
from .run import Run


def cat(run: Run, node: fx.Node, use: Use) -> Any:
    bound = use.bound(node.args, node.kwargs)
    tensors = bound["tensors"]
    if isinstance(tensors, fx.Node):
        tensors = run.result.values[tensors]
    shape = tuple(node.meta["val"].shape)
    dim = run.concrete(bound.get("dim", 0)) % len(shape)
    values = [run.opened(v if isinstance(v, Value) else run.result.values[v]) for v in tensors]
    rank = len(shape) - use.rule.new_dim
    for value in values:
        if len(value.shape) != rank:
            for layer in value.layers:
                run.ids.freeze(node, layer.ids, f"is joined at %{node.name} with another rank")
    values = [v for v in values if len(v.shape) == rank]
    if not values:
        return Value(shape)
    if use.rule.new_dim:
        values = [_unsqueezed(v, dim) for v in values]
        rows = [_as_row(v, dim) for v in values]
        if all(rows) and len({row.varying for row in rows if row}) == 1:
            return _stacked(run, node, shape, dim, rows, all(v.weight for v in values))
    layers = [*_across(run, node, values, dim), *_joined(run, node, values, dim)]
    return run.made(shape, layers, all(v.weight for v in values))


def _stacked(
    run: Run, node: fx.Node, shape: tuple[int, ...], dim: int, rows: list[Any], weight: bool
) -> Value:
    """Pieces side by side, each a row of channels of its own."""
    ids = movement.join([row.ids for row in rows], [1] * len(rows), dim)
    if len(rows) > 1:
        run.ids.split(node, ids)
    zero = all(row.zero for row in rows)
    return run.made(shape, [Layer(ids, zero, ids.squeeze())], weight)


def _across(run: Run, node: fx.Node, values: list[Value], dim: int) -> list[Layer]:
    """Layers that do not vary along the joined dim: the pieces share those channels."""
    flat = [[layer for layer in v.layers if dim not in layer.varying] for v in values]
    real = [real_dims(v, len(v.shape)) - {dim} for v in values]
    merged = tied(run, node, flat, real)
    return [Layer(la.ids, all(any(o.zero for o in ls) for ls in flat), la.origin) for la in merged]


def _joined(run: Run, node: fx.Node, values: list[Value], dim: int) -> list[Layer]:
    along = [[layer for layer in v.layers if dim in layer.varying] for v in values]
    for layers in along:
        for extra in layers[1:]:
            run.ids.freeze(node, extra.ids, f"is one of several layers joined at %{node.name}")
    pieces = [layers[0] if layers else None for layers in along]
    present = [p for p in pieces if p is not None]
    if not present:
        return []
    ids = movement.join([p.ids if p else None for p in pieces], [v.shape[dim] for v in values], dim)
    origin = ids.squeeze() if any(len(p.varying) > 1 for p in present) else None
    return [Layer(ids, all(p.zero for p in present), origin)]


def _as_row(value: Value, dim: int) -> Layer | None:
    """The one layer of a piece that is stacked before its channels, which makes it a row."""
    if len(value.layers) != 1 or len(value.layers[0].varying) != 1:
        return None
    return value.layers[0] if dim < value.layers[0].varying[0] else None


def _unsqueezed(value: Value, dim: int) -> Value:
    shape = (*value.shape[:dim], 1, *value.shape[dim:])
    layers = tuple(Layer(la.ids.unsqueeze(dim), la.zero, la.origin) for la in value.layers)
    return Value(shape, layers, weight=value.weight)
