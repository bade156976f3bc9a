"""Step `flow`: run the traced graph once more, on channel ids instead of numbers."""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

from torch import fx

from .. import scatter as scattering
from ..errors import RuleError
from ..heads import Heads
from ..ids import Value
from ..rules import Rules
from ..trees import has_tensors, mapped
from .assign import assign
from .dims import dims, of_einsum, of_matmul
from .join import cat
from .move import move
from .pad import pad
from .plain import fill, plain
from .pointwise import pointwise
from .recurrent import recurrent
from .reduce import reduce
from .reshape import reshape
from .run import Flow, Mixing, Run, without_channels

KINDS: dict[str, Callable[[Run, fx.Node, Any], Any]] = {
    "assign": assign,
    "cat": cat,
    "dims": dims,
    "einsum": of_einsum,
    "fill": fill,
    "matmul": of_matmul,
    "move": move,
    "pad": pad,
    "plain": plain,
    "pointwise": pointwise,
    "recurrent": recurrent,
    "reduce": reduce,
    "reshape": reshape,
}


def flow(
    graph: fx.GraphModule,
    rules: Rules,
    *,
    mixing: Mixing = "norms",
    scatter: bool = False,
    heads: Heads = "dims",
    rewritable: bool = True,
) -> Flow:
    """Which channels each value of the graph carries, what ties them, what freezes them.

    `mixing` says which ops may go on over fewer channels although their statistics then differ
    from the masked network's: normalisation layers, all, or none. `scatter` leaves what is added up
    at full width and unties the branches. `heads` says what may go of attention heads. Where the
    graph is not `rewritable`, as it is a record of code that stays what it is, nothing counts on a
    gather in place of a shuffle, nor on zeros laid out.
    """
    run = Walk(Flow(graph), rules, mixing, scatter, heads, rewritable)
    for node in graph.graph.nodes:
        run.result.values[node] = run.value(node)
    for node in run.result.scatters:
        scattering.freeze_if_shown(run.result, node)
    return run.result


class Walk(Run):
    """Finds the value of one node after the other."""

    def value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return mapped(without_channels, node.meta["val"])
        if node.op == "get_attr":
            return self.param(node.target, node.meta["val"])
        if node.op == "output":
            return self.output(node)
        if node.op == "call_function" and isinstance(node.target, type):
            return self._container(node)
        if node.meta.get("reads"):
            return self.read_by_python(node)
        if not has_tensors(node.meta["val"]) and node.target is not operator.setitem:
            return None
        return self.call(node)

    def read_by_python(self, node: fx.Node) -> None:
        self.freeze(node, self.inputs(node), f"is read as values by {self.title(node)}")

    def output(self, node: fx.Node) -> None:
        self.freeze(node, self.inputs(node), "reaches the network's output")

    def call(self, node: fx.Node) -> Any:
        use = self.use(node)
        if isinstance(node.kwargs.get("out"), fx.Node):
            return self.freeze_all(node, "writes to another tensor")
        if use is not None:
            try:
                found = KINDS[use.rule.kind](self, node, use)
            except RuleError as error:
                return self.freeze_all(node, f"does not fit {use.rule.where}: {error.fault}")
            if found is not NotImplemented:
                self.result.rules[node] = use
                return found
        container = self._container(node)
        return container if container is not None else self.freeze_all(node, self._no_rule(node))

    def _no_rule(self, node: fx.Node) -> str:
        known = node.op == "call_module" and self.rules.of_module(type(self.modules[node.target]))
        misfits = ", ".join(self.misfits(node, known)) if known else ""
        return f"has no rule for {misfits}" if misfits else "has no rule"

    def _container(self, node: fx.Node) -> Any:
        """An item of a tuple or dict, or a class that only holds its arguments."""
        parent = self.result.values.get(node.args[0]) if node.args else None
        if node.target is operator.getitem and not isinstance(parent, Value):
            return parent[node.args[1]] if parent is not None else None
        if isinstance(node.target, type) and node.op == "call_function":
            return [self.opened(v) for v in self.inputs(node)]
        return None
