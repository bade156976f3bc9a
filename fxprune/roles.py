"""What a group is to the network, found by its structure: ``"role:expansion"`` and the like.

``stream``     meets others in an addition, as the channels between residual blocks do
``inner``      does not: the channels inside a block
``expansion``  inner channels that run through a depthwise convolution and are made by pointwise
               ones: the wide part of an inverted residual
``squeeze``    the narrow part of a gate (squeeze-and-excite): read from the channels it gates, and
               its layers see one value a channel
``head``       inner channels that only the layers of the network's outputs read
``stem``       made by layers that read the network's input
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from functools import cached_property

import numpy as np
from torch import fx

from .analysis import Analysis
from .groups import Group, Member
from .ids import Value
from .letters import DimsUse
from .trees import leaves


class Roles:
    """The roles of an analysed network's groups, as sets of numbers. Frozen ones play none."""

    def __init__(self, analysis: Analysis):
        self.analysis = analysis
        self.groups = analysis.groups

    def of(self, role: str) -> set[int]:
        """The groups that play a role; `role` is one of `ROLES`."""
        found: set[int] = getattr(self, f"_{role}")
        return found

    # -- how groups and parameters lie -----------------------------------------------------------

    @cached_property
    def _owner(self) -> np.ndarray:
        """Channel number -> the prunable group it belongs to; -1 for the others."""
        owner = np.full(int(self.analysis.all_groups.channel.max()) + 1, -1)
        for i, group in enumerate(self.groups):
            if group.prunable:
                owner[group.channels] = i
        return owner

    @cached_property
    def _sides(self) -> dict[tuple[str, str], set[int]]:
        """(parameter, role of the slice) -> the groups that have it."""
        found: dict[tuple[str, str], set[int]] = {}
        for i, group in enumerate(self.groups):
            for member in group.members:
                found.setdefault((member.param, member.role), set()).add(i)
        return found

    @cached_property
    def _uses(self) -> dict[str, tuple[fx.Node, DimsUse]]:
        """Parameter -> the first node that uses it."""
        found: dict[str, tuple[fx.Node, DimsUse]] = {}
        for node, use in self.analysis.flow.uses.items():
            for param in use.params.values():
                found.setdefault(param, (node, use))
        return found

    def makers(self, group: Group) -> list[Member]:
        """The weights that make a group's channels."""
        return [m for m in group.members if m.role == "out" and self._rank(m) > 1]

    def readers(self, group: Group) -> list[Member]:
        """The weights that read a group's channels."""
        return [m for m in group.members if m.role == "in" and self._rank(m) > 1]

    def _rank(self, member: Member) -> int:
        return self.analysis.tensors[member.param].ndim

    def _numbers(self, test: Callable[[int, Group], bool]) -> set[int]:
        return {i for i, group in enumerate(self.groups) if group.prunable and test(i, group)}

    # -- the roles -------------------------------------------------------------------------------

    @cached_property
    def _stream(self) -> set[int]:
        flow, found = self.analysis.flow, set[int]()
        for node, use in flow.rules.items():
            added = self._values(node) if use.rule.joins else []
            if node in flow.scatters or (len(added) > 1 and _distinct(added)):
                found.update(i for value in added for i in self._in(value))
        return found

    def _values(self, node: fx.Node) -> list[Value]:
        """The operands that carry channels and are no weights."""
        values = self.analysis.flow.values
        found = [v for arg in leaves(node.args, fx.Node) for v in leaves(values.get(arg), Value)]
        return [v for v in found if v.layers and not v.weight]

    def _in(self, value: Value) -> Iterator[int]:
        channel = self.analysis.all_groups.channel
        for layer in value.layers:
            found = np.unique(self._owner[channel[layer.ids.numpy()]])
            yield from found[found >= 0].tolist()

    @cached_property
    def _inner(self) -> set[int]:
        return self._numbers(lambda i, group: i not in self._stream and bool(self.makers(group)))

    @cached_property
    def _expansion(self) -> set[int]:
        return self._numbers(lambda i, group: i in self._inner and self._expands(group))

    def _expands(self, group: Group) -> bool:
        deep = any(m.role == "through" and self._rank(m) > 2 for m in group.members)
        return deep and all(self._is_pointwise(m) for m in self.makers(group))

    def _is_pointwise(self, member: Member) -> bool:
        return math.prod(self.analysis.tensors[member.param].shape[2:]) == 1

    @cached_property
    def _squeeze(self) -> set[int]:
        return self._numbers(lambda i, _: i in self._inner and bool(self.gated(i)))

    def gated(self, i: int) -> set[int]:
        """The groups that group `i` is read from and gates; none if it is no squeeze."""
        group = self.groups[i]
        makers, readers = self.makers(group), self.readers(group)
        if not makers or not readers or not all(map(self._sees_one_value, (*makers, *readers))):
            return set()
        read = {g for m in makers for g in self._sides.get((m.param, "in"), ())}
        made = {g for m in readers for g in self._sides.get((m.param, "out"), ())}
        gates = all(self._gates(m) for m in readers)
        return read if read == made and i not in read and gates else set()

    def _gates(self, member: Member) -> bool:
        """Whether what a layer makes becomes a factor of something that does not depend on it,
        before it reaches another layer or is added to anything."""
        carried = set(self._nodes_like(self._uses[member.param][0]))
        below = set(carried)
        for node in self.analysis.graph.graph.nodes:
            operands = node.all_input_nodes
            if below.isdisjoint(operands):
                continue
            below.add(node)
            if node in self._weighty or carried.isdisjoint(operands):
                continue
            others = [n for n in operands if n not in carried and self._is_data(n)]
            use = self.analysis.flow.rules.get(node)
            if others and use is not None and use.rule.zero == "any":
                return below.isdisjoint(others)
            if not others or use is None or not use.rule.joins:
                carried.add(node)
        return False

    def _nodes_like(self, first: fx.Node) -> list[fx.Node]:
        """The calls of one layer; a module may be called again."""
        if first.op != "call_module":
            return [first]
        return [n for n in self.analysis.graph.graph.nodes if n.target == first.target]

    def _is_data(self, node: fx.Node) -> bool:
        value = self.analysis.flow.values.get(node)
        return isinstance(value, Value) and not value.weight

    def _sees_one_value(self, member: Member) -> bool:
        """Whether a layer's weights are used once for each item of the batch."""
        if member.param not in self._uses:
            return False
        _, use = self._uses[member.param]
        weights = self.analysis.tensors[member.param].numel()
        return bool(use.rule.macs) and use.macs() == weights * max(self.analysis.batch, 1)

    @cached_property
    def _head(self) -> set[int]:
        return self._numbers(lambda i, group: i in self._inner and self._ends(group))

    def _ends(self, group: Group) -> bool:
        readers = self.readers(group)
        return bool(readers) and all(self._is_output(m) for m in readers)

    def _is_output(self, member: Member) -> bool:
        made = self._sides.get((member.param, "out"), set())
        return bool(made) and all(self._reaches_output(self.groups[i]) for i in made)

    @staticmethod
    def _reaches_output(group: Group) -> bool:
        node = group.frozen.node if group.frozen is not None else None
        return node is not None and node.op == "output"

    @cached_property
    def _stem(self) -> set[int]:
        first = {param for param, (node, _) in self._uses.items() if self._reads_input(node)}
        return self._numbers(lambda _, group: any(m.param in first for m in self.makers(group)))

    def _reads_input(self, node: fx.Node) -> bool:
        """Whether a node reads a placeholder with no layer between."""
        seen, rest = set(), list(node.all_input_nodes)
        while rest:
            at = rest.pop()
            if at.op == "placeholder":
                return True
            if at not in seen and at not in self._weighty:
                rest += at.all_input_nodes
            seen.add(at)
        return False

    @cached_property
    def _weighty(self) -> set[fx.Node]:
        tensors, uses = self.analysis.tensors, self.analysis.flow.uses
        return {n for n, u in uses.items() if any(tensors[p].ndim > 1 for p in u.params.values())}


def _distinct(values: list[Value]) -> bool:
    """Whether values come from different layers: x and a function of x alone have equal ids."""
    ids = [layer.ids for value in values for layer in value.layers]
    return any(each.shape != ids[0].shape or bool((each != ids[0]).any()) for each in ids)


ROLES = ("stream", "inner", "expansion", "squeeze", "head", "stem")
