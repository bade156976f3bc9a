"""Sums, means, norms, maxima along some dims."""

from __future__ import annotations

from typing import Any

import numpy as np
from torch import Tensor, fx

from ..ids import Layer, Value
from ..rules import Use
from ..trees import leaves, mapped
from ..widen import Wide, can_be_wide
from .meeting import by_rows, meet, row_tie
from .pointwise import pointwise
from .run import Run, first_zero


def reduce(run: Run, node: fx.Node, use: Use) -> Any:
    bound = run.bound(node, use)
    dim = bound.get("dim")
    if isinstance(dim, fx.Node) and isinstance(dim.meta["val"], Tensor):
        return pointwise(run, node, use)
    values = run.tensors(node)
    shape = _joint_shape(values)
    layers, weight = meet(run, node, values, shape, use) if len(values) > 1 else (
        list(values[0].layers), values[0].weight)  # fmt: skip
    dims = _reduced(run, run.concrete(dim), len(shape))
    layers = [
        r for layer in layers if (r := _reduce(run, node, use, layer, dims, weight)) is not None
    ]
    return first_zero(
        mapped(lambda t: _reduced_value(run, t, shape, layers, dims, weight), node.meta["val"])
    )


def _reduced(run: Run, dim: Any, rank: int) -> set[int]:
    if dim is None or dim == () or dim == []:
        return set(range(rank))
    return {d % rank for d in ((dim,) if isinstance(dim, int) else dim)}


def _reduce(
    run: Run, node: fx.Node, use: Use, layer: Layer, dims: set[int], weight: bool
) -> Layer | None:
    gone = set(layer.varying) & dims
    zero = layer.zero and use.rule.zero != "no"
    if not gone:
        return Layer(layer.ids, zero, layer.origin)
    rest = set(layer.varying) - dims
    if layer.zero and use.rule.additive and use.rule.keeps_dims:
        return layer
    if rest and by_rows(rest, layer) and _sums_rows(run, node, use, layer, weight):
        row_tie(run, node, layer, rest, None)
        return None
    if rest:  # whole runs along the reduced dims come and go with each channel of the rest
        ids = layer.ids
        for d in gone:
            ids = ids.narrow(d, 0, 1)
        run.ids.tie(node, layer.ids, ids)
        return Layer(ids, zero)
    if _reduced_exactly(run, node, use, layer):
        return None
    if not (use.rule.additive and layer.zero):
        run.mixes(node, [layer.ids], "norms" if weight else "all")
    return layer if use.rule.keeps_dims else None


def _sums_rows(run: Run, node: fx.Node, use: Use, layer: Layer, weight: bool) -> bool:
    """Whether each row's result is exact over what is left of it, equally many of each.

    A result that keeps its dims is for the rows it is of; without them it is of channels of its
    own, one a row, and rows go whole.
    """
    kept = leaves(node.meta["val"], Tensor)[0].ndim == layer.ids.ndim
    if not (layer.zero and kept) or weight or len(layer.varying) != 2 or run.heads != "dims":
        return False
    if use.rule.averages and run.mixing != "all":
        run.result.averages.setdefault(node, []).append(layer.ids)
        return True
    return use.rule.additive


def _reduced_exactly(run: Run, node: fx.Node, use: Use, layer: Layer) -> bool:
    """Whether the result over what is left can be made that over all, zeros where it went."""
    operands = [n for n in node.all_input_nodes if isinstance(run.result.values[n], Value)]
    if run.mixing == "all" or use.rule.additive or use.rule.keeps_dims or len(operands) != 1:
        return False
    if not run.rewritable:
        return False
    value = run.opened(run.result.values[operands[0]])
    if use.rule.averages and layer.zero and not value.weight:
        run.result.averages.setdefault(node, []).append(layer.ids)
        return True
    if not can_be_wide(value, layer):
        return False
    wide = run.result.wide.setdefault(node, Wide())
    wide.operands.append((operands[0], layer.varying[0]))
    return True


def _reduced_value(
    run: Run, tensor: Any, shape: tuple[int, ...], layers: list[Layer], dims: set[int], weight: bool
):
    if not isinstance(tensor, Tensor):
        return tensor
    if tensor.ndim == len(shape):
        return run.made(tuple(tensor.shape), layers, weight)
    kept = [d for d in range(len(shape)) if d not in dims]
    moved = [
        Layer(la.ids.reshape([la.ids.shape[d] for d in kept]), la.zero, la.origin) for la in layers
    ]
    return run.made(tuple(tensor.shape), moved, weight)


def _joint_shape(values: list[Value]) -> tuple[int, ...]:
    return np.broadcast_shapes(*(v.shape for v in values))
