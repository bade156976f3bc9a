"""Reshapes: ids are laid out anew, and shuffles found."""

from __future__ import annotations

from torch import fx

from .. import movement
from ..ids import Layer, Value
from ..rules import Use
from ..shuffle import find_gather, in_order
from .meeting import meet
from .move import rerun
from .run import Run


def reshape(run: Run, node: fx.Node, use: Use) -> Value:
    value = run.first(node)
    shape = tuple(node.meta["val"].shape)
    layers = [_reshaped(run, node, layer, value.shape, shape) for layer in value.layers]
    others = run.tensors(node)[1:]
    if others:  # the result takes another tensor's shape, so its channels are that one's
        for layer in layers:
            if len(layer.varying) > 1:
                run.ids.freeze(node, layer.ids, f"is laid out as another tensor at %{node.name}")
        layers = [layer for layer in layers if len(layer.varying) == 1]
        first = Value(shape, tuple(layers), weight=value.weight)
        layers, _ = meet(run, node, [first, *others], shape, use)
    return run.made(shape, layers, value.weight)


def _reshaped(
    run: Run, node: fx.Node, layer: Layer, old: tuple[int, ...], new: tuple[int, ...]
) -> Layer:
    ids = movement.reshape(layer.ids, old, new)
    before, after = len(layer.varying), len(Layer(ids).varying)
    if after > 1 and (layer.origin is None or after > before):
        run.ids.split(node, ids)
        return Layer(ids, layer.zero, ids.squeeze())
    if layer.origin is None or after >= before:
        return Layer(ids, layer.zero, layer.origin)
    if not in_order(layer.ids, layer.origin):
        _shuffled(run, node, layer)
    return Layer(ids, layer.zero, layer.origin if after > 1 else None)


def _shuffled(run: Run, node: fx.Node, layer: Layer) -> None:
    """Channels leave in another order: gather them, or keep the same ones of each block."""
    gather = None
    if run.rewritable:
        gather = find_gather(node, run.result.values, lambda n, x, s: rerun(run, n, x, s))
    if gather is None:
        rows = layer.origin.reshape(-1, layer.origin.shape[-1])  # type: ignore[union-attr]
        run.ids.tie(node, rows, rows[:1])
        return
    run.result.gathers[node] = gather
    for inner in gather.inside:
        run.ids.splits.pop(inner, None)
