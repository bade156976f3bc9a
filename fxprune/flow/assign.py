"""Assignments to a part of a tensor: what is assigned meets what it replaces."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor, fx

from .. import positions
from ..ids import Layer, Value, compress
from ..rules import Use
from ..trees import leaves
from .meeting import meet
from .run import Run


def assign(run: Run, node: fx.Node, use: Use) -> None:
    """``target[index] = given``: channels meet where whole ones are assigned to."""
    target = run.opened(run.result.values[node.args[0]])
    given = run.result.values.get(node.args[2])
    index = run.concrete(node.args[1])
    if _by_elements(index, target):
        return _assign_computed(run, node, use, target)
    index = positions.standins(index)
    source = run.opened(given) if isinstance(given, Value) else Value(())
    met = [part for la in target.layers if (part := _assigned(run, node, la, target, index))]
    shape = tuple(torch.empty(target.shape, device="meta")[index].shape)
    meet(run, node, [Value(shape, tuple(met)), source], shape, use)
    changed = tuple(Layer(la.ids, False, la.origin) for la in target.layers)
    run.result.values[node.args[0]] = Value(target.shape, changed, weight=target.weight)


def _assigned(run: Run, node: fx.Node, layer: Layer, target: Value, index: Any) -> Layer | None:
    """The channels of a layer that are assigned to: all of them, or some that lie along one
    dim, each once. Others are frozen."""
    part = layer.ids.expand(target.shape)[index]
    ids = compress(part, range(part.ndim))
    found = torch.unique(part)
    if len(layer.varying) == 1 and ids.numel() == len(found) > 1:
        if len(found) < layer.ids.numel():
            run.ids.pieces.append(found)
        return Layer(ids, layer.zero)
    some = layer.ids if len(layer.varying) > 1 else found
    run.ids.freeze(node, some, f"is assigned to in part at %{node.name}")
    return None


def _assign_computed(run: Run, node: fx.Node, use: Use, target: Value) -> None:
    index = run.result.values.get(node.args[1]) if isinstance(node.args[1], fx.Node) else None
    whole = isinstance(index, Value) and index.shape == target.shape
    if whole or _any_layers(run, node.args[1]):
        _assign_where(run, node, use, target)
    else:
        _assign_rows(run, node, use, target)


def _assign_rows(run: Run, node: fx.Node, use: Use, target: Value) -> None:
    """``target[index] = given`` by computed positions: channels along other dims meet."""
    met, rest = [], []
    for layer, ids in _apart(run, node, target, "assigns to single elements"):
        if ids.numel() < layer.ids.numel():
            run.ids.freeze(node, layer.ids, f"is assigned to in part at %{node.name}")
        else:
            met.append(Layer(ids, layer.zero))
            rest.append(Layer(layer.ids, False, layer.origin))
    given = run.result.values.get(node.args[2])
    source = run.opened(given) if isinstance(given, Value) else Value(())
    shape = np.broadcast_shapes(source.shape, *(tuple(m.ids.shape) for m in met))
    meet(run, node, [Value(shape, tuple(met)), source], shape, use)
    run.result.values[node.args[0]] = Value(target.shape, tuple(rest), weight=target.weight)


def _assign_where(run: Run, node: fx.Node, use: Use, target: Value) -> None:
    """``target[mask] = number`` by a computed mask, which shares the channels of what it cuts.

    Anything else that picks single elements freezes what it meets.
    """
    index, number = node.args[1:3]
    mask = run.result.values.get(index) if isinstance(index, fx.Node) else None
    plain = isinstance(number, (int, float))
    if plain and isinstance(mask, Value) and _is_mask_of(mask, index.meta["val"].dtype, target):
        meet(run, node, [target, run.opened(mask)], target.shape, use)
    else:
        run.freeze_all(node, "assigns to single elements")
    zero = plain and number == 0
    layers = tuple(Layer(la.ids, la.zero and zero, la.origin) for la in target.layers)
    run.result.values[node.args[0]] = Value(target.shape, layers, weight=target.weight)


def _apart(run: Run, node: fx.Node, value: Value, why: str) -> list[tuple[Layer, Tensor]]:
    """Layers that do not vary along dims in which an index is computed, with the ids picked of
    them; the others are frozen."""
    index = run.concrete(node.args[1])
    found = [(layer, positions.picked(layer.ids, index)) for layer in value.layers]
    if found and all(ids is None for _, ids in found):
        run.result.unknown[node] = why
    for layer, ids in found:
        if ids is None:
            run.ids.freeze(node, layer.ids, f"reaches {run.title(node)}, which {why}")
    return [(layer, ids) for layer, ids in found if ids is not None]


def _any_layers(run: Run, args: Any) -> bool:
    """Whether any value in these arguments has channels."""
    return any(run.opened(v).layers for v in leaves(run.of(args), Value))


def _by_elements(index: Any, target: Value) -> bool:
    """Whether an index is computed, or a mask over several dims with channels along one of them."""
    tensors = leaves(index, Tensor)
    picked = positions.picked_dims(index, len(target.shape))
    computed = positions.is_computed(index)
    if computed or picked is None or any(picked & set(la.varying) for la in target.layers):
        return True
    tensors = leaves(index, Tensor)
    flags = (torch.bool, torch.uint8)
    masked = max((t.ndim for t in tensors if t.dtype in flags), default=0)
    # before other parts of an index it is not clear where the mask lies
    end = masked if isinstance(index, Tensor) else len(target.shape)
    return masked > 1 and any(min(la.varying, default=0) < end for la in target.layers)


def _is_mask_of(mask: Value, dtype: torch.dtype, target: Value) -> bool:
    """Whether a mask has one flag for each element of `target`, and no channels of its own."""
    known = {layer.varying for layer in target.layers}
    alike = dtype == torch.bool and mask.shape == target.shape
    return alike and all(layer.varying in known for layer in mask.layers)
