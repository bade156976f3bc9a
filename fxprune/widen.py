"""Ops that read channels by position or by number: exact where what went is laid out as zeros.

A maximum over channels, or a window that slides over them, sees the zeros of masked channels. Just
before such an op the rewriter lays its operand out at full width, with zeros for what went; what a
window gives at their places is cut off again behind it. A mean needs less: it is scaled.
"""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor, fx

from .ids import Layer, Value


@dataclass
class Wide:
    """What a node reads at full width: (operand, dim); and the output's dims that are cut."""

    operands: list[tuple[fx.Node, int]] = field(default_factory=list)
    cut: list[int] = field(default_factory=list)


def can_be_wide(value: Value, layer: Layer) -> bool:
    """Whether zeros in the places of masked channels are what the masked original holds there."""
    return layer.zero and not value.weight and len(layer.varying) == 1


def share(masks: list[Tensor]) -> float:
    """The part of a mean's elements that is left."""
    part = 1.0
    for mask in masks:
        part *= float(mask.double().mean())
    return part
