"""Ops that move or pick elements: they are run on the ids themselves."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .. import movement, positions
from ..ids import Layer, Value
from ..rules import Use
from ..trees import leaves
from .run import Run


def move(run: Run, node: fx.Node, use: Use) -> Any:
    if node.args and not isinstance(run.result.values.get(node.args[0]), Value):
        return NotImplemented
    value = run.first(node)
    picked = _picked_dims(run, node, use, len(value.shape))
    if picked is None:
        return run.freeze_all(node, "picks elements by computed positions")
    outputs = leaves(node.meta["val"], Tensor)
    per_output: list[list[Layer]] = [[] for _ in outputs]
    for layer in value.layers:
        if picked & set(layer.varying):
            run.ids.freeze(node, layer.ids, f"is picked by computed positions at %{node.name}")
            continue
        found = rerun(run, node, layer.ids, value.shape)
        if found is None:
            return run.freeze_all(node, "could not be run on channel ids")
        for i, ids in enumerate(found):
            if value.weight and _is_lookup(layer, ids):
                why = f"is a place in a table that %{node.name} looks up"
                run.ids.freeze(node, layer.ids, why)
            else:
                per_output[i].append(_moved(run, node, layer, ids))
    if use.rule.spreads:
        per_output[0] += _spread(run, value.shape, tuple(outputs[0].shape))
    made = [
        run.made(tuple(t.shape), ls, value.weight)
        for t, ls in zip(outputs, per_output, strict=True)
    ]
    return made if isinstance(node.meta["val"], (tuple, list)) else made[0]


def rerun(run: Run, node: fx.Node, ids: Tensor, shape: Sequence[int]) -> list[Tensor] | None:
    """The ids a movement makes of `ids` on a value of `shape`."""
    outputs = [tuple(v.shape) for v in leaves(node.meta["val"], Tensor)]
    if run.result.rules.get(node, run.use(node)).rule.kind == "reshape":  # type: ignore[union-attr]
        return [movement.reshape(ids, shape, outputs[0])]
    return movement.move(ids, shape, lambda x: execute(run, node, x), outputs)


def execute(run: Run, node: fx.Node, ids: Tensor) -> Any:
    if node.op == "call_module":
        return run.modules[node.target](ids)
    args, kwargs = positions.standins(run.concrete((node.args[1:], dict(node.kwargs))))
    if node.op == "call_method":
        return getattr(ids, node.target)(*args, **kwargs)
    return node.target(ids, *args, **kwargs)


def _picked_dims(run: Run, node: fx.Node, use: Use, rank: int) -> set[int] | None:
    """Dims along which positions pick that the graph computes; None where that is not known."""
    bound = use.bound(node.args, node.kwargs)
    rest = {name: run.concrete(arg) for name, arg in bound.items() if arg is not node.args[0]}
    if not positions.is_computed(rest):
        return set()
    run.freeze_unnamed(node, {k: v for k, v in bound.items() if v is not node.args[0]})
    if isinstance(rest.get("dim"), int):
        return {rest["dim"] % rank}
    return positions.picked_dims(rest["index"], rank) if "index" in rest else None


def _spread(run: Run, old: tuple[int, ...], new: tuple[int, ...]) -> list[Layer]:
    """Channels along dims in which one element became many: they go as what they meet does."""
    shift, layers = len(new) - len(old), []
    for d, size in enumerate(new):
        if size > 1 and (d < shift or old[d - shift] == 1):
            dims = [size if i == d else 1 for i in range(len(new))]
            layers.append(Layer(run.ids.fresh(size).view(dims), False))
    return layers


def _moved(run: Run, node: fx.Node, layer: Layer, ids: Tensor) -> Layer:
    moved = Layer(ids, layer.zero, layer.origin)
    if not moved.varying:
        run.ids.freeze(node, ids, f"is picked alone by %{node.name}")
    elif ids.numel() < layer.ids.numel():
        if len(moved.varying) == 1:
            run.ids.pieces.append(ids.reshape(-1))
        else:
            run.ids.split(node, ids)
    if len(moved.varying) > 1 and layer.origin is None and len(moved.varying) > len(layer.varying):
        run.ids.split(node, ids)
        moved = Layer(ids, layer.zero, ids.squeeze())
    return moved


def _is_lookup(layer: Layer, ids: Tensor) -> bool:
    """Whether places along one dim are picked, some more often than others, as a table of positions
    is by the distance of each pair. Nothing later can lose such a place as a whole."""
    if len(layer.varying) != 1 or ids.numel() <= layer.ids.numel():
        return False
    _, counts = torch.unique(ids, return_counts=True)
    return bool((counts != counts[0]).any())
