"""Ops that give tensors without channels of their operands: read as a whole, or new."""

from __future__ import annotations

from typing import Any

from torch import fx

from ..ids import Layer, Value
from ..rules import Use
from ..trees import mapped
from .run import Run, without_channels


def plain(run: Run, node: fx.Node, use: Use) -> Any:
    """A tensor that carries no channels: those of an operand cannot go."""
    run.freeze(node, run.inputs(node), f"is read as a whole by {run.title(node)}")
    return mapped(without_channels, node.meta["val"])


def fill(run: Run, node: fx.Node, use: Use) -> Value:
    shape = tuple(node.meta["val"].shape)
    layers = []
    for d, size in enumerate(shape):
        if size > 1:
            dims = [1] * len(shape)
            dims[d] = size
            layers.append(Layer(run.ids.fresh(size).view(dims), use.rule.zero == "keeps"))
    return Value(shape, tuple(layers))
