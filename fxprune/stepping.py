"""Running a graph node by node, over several batches side by side."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import fx

from .batches import Batch, arguments
from .errors import InputError, first_line


class Stepper:
    """A graph at some node, with what every batch holds there; `step` runs the next one.

    Values are let go behind their last reader.
    """

    def __init__(self, graph: fx.GraphModule, batches: Sequence[Batch]):
        self.graph = graph
        self.runner = fx.Interpreter(graph, garbage_collect_values=False)
        self.values: list[dict[fx.Node, Any]] = [arguments(graph, batch) for batch in batches]
        self.dying = _last_readers(graph.graph)

    def step(self, node: fx.Node) -> None:
        """Run a node on every batch; all it reads must have been run. `InputError` where it does
        not run."""
        for env in self.values:
            if node.op != "placeholder":
                try:
                    env[node] = self.once(node, env)
                except Exception as error:  # an op may raise anything
                    raise _failed(node, error) from error

    def once(self, node: fx.Node, env: dict[fx.Node, Any]) -> Any:
        """What a node gives on one batch, which keeps nothing of it."""
        self.runner.env = env
        return self.runner.run_node(node)

    def forget(self, node: fx.Node) -> None:
        """Let go of what is read for the last time by a node."""
        for env in self.values:
            for each in self.dying.get(node, ()):
                env.pop(each, None)


def _failed(node: fx.Node, error: Exception) -> InputError:
    return InputError(
        f"the network does not run on a batch of data: {first_line(error)}",
        details=[("node", f"%{node.name}")],
        hint="a batch is inputs as in example_inputs, or a pair (inputs, target)",
    )


def _last_readers(graph: fx.Graph) -> dict[fx.Node, list[fx.Node]]:
    """Node -> the nodes whose values nothing behind it reads."""
    last: dict[fx.Node, fx.Node] = {}
    for node in graph.nodes:
        for operand in (node, *node.all_input_nodes):
            last[operand] = node
    dying: dict[fx.Node, list[fx.Node]] = {}
    for node, reader in last.items():
        dying.setdefault(reader, []).append(node)
    return dying
