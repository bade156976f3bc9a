"""What a network costs: parameters, and operations by two conventions that must not be mixed.

Both conventions count one item of the batch, on the traced graph:

``macs``      multiply-accumulates of convolutions and linear layers
``slimming``  the FLOPs of the code published with Network Slimming (Liu et al. 2017) and Rethinking
              the Value of Network Pruning (Liu et al. 2019): those multiply-accumulates, one for
              each bias added, two for each input element of a normalisation, one for each of a ReLU
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from .flow import Flow
from .ids import Value
from .plans import Kept, kept_size
from .widths import Widths


@dataclass(frozen=True)
class Counts:
    """``parameters`` (tied ones once); ``macs`` and ``slimming`` FLOPs for one item of a batch."""

    parameters: int
    macs: int
    slimming: int

    def __str__(self) -> str:
        return (
            f"{self.parameters:,} parameters, {self.macs:,} MACs, {self.slimming:,} slimming FLOPs"
        )


def counts(
    flow: Flow, tensors: Mapping[str, Tensor], batch: int, kept: Tensor | None = None
) -> Counts:
    """What the graph of `flow` costs; with only the ids in the mask `kept`, where given."""
    widths = None if kept is None else Widths(flow, kept)
    parameters = sum(
        _size(tensor, widths.kept_of(name) if widths else {})
        for name, tensor in tensors.items()
        if isinstance(tensor, nn.Parameter)
    )
    each = [_slimming(flow, node, widths) for node in flow.rules]
    return Counts(parameters, macs(flow, batch, kept), sum(each) // max(batch, 1))


def macs(flow: Flow, batch: int, kept: Tensor | None = None) -> int:
    """Multiply-accumulates for one item of the batch."""
    return sum(use.macs(kept) for use in flow.uses.values()) // max(batch, 1)


def _size(tensor: Tensor, kept: Mapping[int, Kept]) -> int:
    shape = list(tensor.shape)
    for dim, rows in kept.items():
        shape[dim] = kept_size(rows, shape[dim])
    return math.prod(shape)


def _slimming(flow: Flow, node: fx.Node, widths: Widths | None) -> int:
    rule, use = flow.rules[node].rule, flow.uses.get(node)
    total = rule.slimming * _elements(flow, _first(node), widths) if rule.slimming else 0
    if use is not None and rule.macs:
        total += use.macs(None if widths is None else widths.kept)
        biased = [use.given(name) for name in rule.adds]
        total += sum(biased) * _elements(flow, node, widths)
    return total


def _first(node: fx.Node) -> fx.Node:
    return node.args[0] if node.args else node.all_input_nodes[0]


def _elements(flow: Flow, node: fx.Node, widths: Widths | None) -> int:
    value = flow.values.get(node)
    if not isinstance(value, Value):
        return 0
    return math.prod(value.shape if widths is None else widths.shape(node, value))
