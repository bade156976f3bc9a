"""Ops on each element: operands are broadcast, and what meets goes together."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx

from .. import scatter as scattering
from ..rules import Use
from ..trees import leaves, mapped
from .meeting import meet
from .run import Run, first_zero


def pointwise(run: Run, node: fx.Node, use: Use) -> Any:
    shape = tuple(leaves(node.meta["val"], Tensor)[0].shape)
    values = run.tensors(node)
    if run.scatter and run.rewritable and use.rule.joins:
        values = scattering.untied(run.result, node, values)
    layers, weight = meet(run, node, values, shape, use)
    value = run.made(shape, layers, weight)
    return first_zero(mapped(lambda _: value, node.meta["val"]))
