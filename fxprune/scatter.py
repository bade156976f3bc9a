"""Streams that keep their width: what is added up is untied, and scattered back before that.

The part of `flow` that ``scatter=True`` adds. An operand of an addition may then lose channels of
its own; the rewriter lays what is left of it out at full width, with zeros for what went.
"""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING

import torch
from torch import fx

from .ids import Value
from .trace import mutates

if TYPE_CHECKING:
    from .flow import Flow


def untied(flow: Flow, node: fx.Node, values: list[Value]) -> list[Value]:
    """The operands of an addition without their channels; noted in ``flow.scatters``."""
    varying = {d - len(v.shape) for v in values for la in v.layers for d in la.varying}
    data = [v for v in values if not v.weight and _reaches(v.shape, varying)]
    if len(data) < 2 or all(_same_ids(value, data[0]) for value in data):
        return values
    operands = [n for n in node.all_input_nodes if flow.values.get(n) in data]
    for operand in operands:
        for layer in flow.values[operand].layers:
            if not layer.zero or len(layer.varying) > 1 or _overwrites(flow, node, operand):
                flow.ids.freeze(node, layer.ids, f"cannot be scattered back before %{node.name}")
    flow.scatters[node] = operands
    return [replace(value, layers=()) if value in data else value for value in values]


def _reaches(shape: tuple[int, ...], dims: set[int]) -> bool:
    """Whether a shape has more than one element along any of these dims, counted from the last."""
    return any(shape[d] > 1 for d in dims if -d <= len(shape))


def _same_ids(a: Value, b: Value) -> bool:
    pairs = zip(a.layers, b.layers, strict=False)
    return len(a.layers) == len(b.layers) and all(torch.equal(x.ids, y.ids) for x, y in pairs)


def _overwrites(flow: Flow, node: fx.Node, operand: fx.Node) -> bool:
    """Whether an addition in place writes to what others look at, who would miss its wide copy:
    followed back through what may be views, to the layer that made it."""
    if not mutates(node) or node.args[0] is not operand:
        return False
    while len(operand.users) == 1:
        if _is_new(flow, operand):
            return False
        if not operand.all_input_nodes:
            return True
        operand = operand.all_input_nodes[0]
    return True


def _is_new(flow: Flow, node: fx.Node) -> bool:
    """Whether what a node gives is no view of what it was given."""
    use = flow.rules.get(node)
    if use is None:
        return False
    joint = use.rule.kind == "pointwise" and len(node.all_input_nodes) > 1
    layer = use.rule.kind in ("dims", "einsum", "matmul")
    return layer or use.rule.copies or (joint and not mutates(node))


def freeze_if_shown(flow: Flow, node: fx.Node) -> None:
    """What is added up to the network's output stays: no layer behind it could do without."""
    seen, rest = {node}, [node]
    while rest:
        at = rest.pop()
        if at.op == "output":
            for operand in flow.scatters[node]:
                for layer in flow.values[operand].layers:
                    flow.ids.freeze(at, layer.ids, "reaches the network's output")
            return
        if at is node or not _reads_weights(flow, at):
            rest += [user for user in at.users if user not in seen]
            seen |= {*at.users}


def _reads_weights(flow: Flow, node: fx.Node) -> bool:
    """Whether a node is a layer whose weights read channels or make them."""
    use = flow.uses.get(node)
    slots = (s for p in use.params.values() for s in flow.ids.slots.get(p, ())) if use else ()
    return any(slot.role in ("in", "out") for slot in slots)
