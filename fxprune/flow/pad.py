"""Padding: what is added along channels is new ones."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from ..ids import Layer
from ..rules import Use
from .run import Run


def pad(run: Run, node: fx.Node, use: Use) -> Any:
    bound = use.bound(node.args, node.kwargs)
    value, pads = run.first(node), list(run.concrete(bound["pad"]))
    constant = bound.get("mode", "constant") == "constant"
    clean = not constant or not bound.get("value")
    layers = []
    for layer in value.layers:
        last = len(value.shape) - 1
        touched = {last - i // 2 for i, amount in enumerate(pads) if amount}
        if not touched & set(layer.varying):
            layers.append(Layer(layer.ids, layer.zero and clean, layer.origin))
        elif constant and len(layer.varying) == 1:
            layers.append(Layer(_padded(run, layer, pads), layer.zero and clean))
        else:
            run.ids.freeze(node, layer.ids, f"is padded with copies at %{node.name}")
    return run.made(tuple(node.meta["val"].shape), layers, value.weight)


def _padded(run: Run, layer: Layer, pads: list[int]) -> Tensor:
    """Channels of padding are new ones: they may go when what they meet goes."""
    dim, rank = layer.varying[0], layer.ids.ndim
    at = 2 * (rank - 1 - dim)
    only = [0] * at + pads[at : at + 2]
    ids = torch.nn.functional.pad(layer.ids, only, value=-1)
    empty = ids < 0  # 0 stands for elements without a channel, which there may be
    ids[empty] = run.ids.fresh(int(empty.sum()))
    return ids
