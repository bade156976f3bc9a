"""Step `rewrite` for a recorded network: a copy of the model itself, with narrow parameters.

Its class, its code and its training stay what they are. A graph can be written anew; code cannot:
where it holds a number that the narrower widths would change, channels stay.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

from torch import Tensor, fx, nn

from .flow import Flow
from .ids import Value
from .pattern import sizes_of
from .plans import Kept
from .record import copied
from .rewrite import Writer, set_sizes, sliced
from .rules import current
from .trace import describe
from .trees import leaves
from .widths import RewriteError


def narrow(
    model: nn.Module, flow: Flow, kept_ids: Tensor, kept: Mapping[str, dict[int, Kept]]
) -> nn.Module:
    """A copy of the model without the channels whose ids are not in the mask `kept_ids`.

    `kept` says the same of parameters, per dim. The model is not changed, and no parameter is
    copied at full width. Raises one `RewriteError` for all the lines of code that do not fit.
    """
    sizes = _Reading(model, flow, kept_ids, kept).sizes()
    indices: dict[int, Tensor] = {}
    made = copied(model, lambda name, old: sliced(old, kept.get(name, {}), indices))
    for name in {owner for param in kept if (owner := param.rpartition(".")[0])} - sizes.keys():
        sizes[name] = _held(made.get_submodule(name))
    for name, found in sizes.items():
        set_sizes(made.get_submodule(name), found)
    return made


def _held(module: nn.Module) -> dict[str, int]:
    """What a layer's attributes are to say of its tensors, where code reads these and never calls
    the layer."""
    use = current().of_module(type(module))
    if use is None or use.rule.dims is None:
        return {}
    rule, held = use.rule, use.rule.sizes
    pairs = zip(rule.pattern.inputs, rule.operands, strict=True)
    tensors = [(operand, getattr(module, name, None)) for operand, name in pairs]
    shapes = [(operand, tensor.shape) for operand, tensor in tensors if isinstance(tensor, Tensor)]
    known = {text: getattr(module, key, None) for key, text in held.items() if text.isidentifier()}
    found = sizes_of(shapes, {letter: n for letter, n in known.items() if isinstance(n, int)})
    whole = {key: text.split() for key, text in held.items() if {*text.split()} <= found.keys()}
    return {key: math.prod(found[letter] for letter in letters) for key, letters in whole.items()}


class _Reading(Writer):
    """Goes through a graph as if to write it anew, and notes where that would differ."""

    def __init__(self, *args: Any):
        super().__init__(*args)
        self.faults: dict[fx.Node, RewriteError] = {}
        self.attributes: dict[str, dict[str, Any]] = {}

    def sizes(self) -> dict[str, dict[str, Any]]:
        """Name of a leaf module -> the attributes that hold sizes, with their new values."""
        for node in self.old.graph.nodes:
            try:
                self.write(node)
            except RewriteError as error:
                self.failed(node, error.fault)
        if self.faults:
            first, *others = self.faults.values()
            raise RewriteError(first.node, first.fault, others)
        return self.attributes

    def failed(self, node: fx.Node, fault: str) -> None:
        self.faults.setdefault(node, RewriteError(node, fault))
        self.env.setdefault(node, None)

    def is_touched(self, node: fx.Node) -> bool:
        """Whether channels of what a node gives or is given go, or a number it is given changes."""
        values = leaves([self.widths.value(n) for n in (node, *node.all_input_nodes)], Value)
        numbers = (n for n in node.all_input_nodes if n in self.numbers)
        changed = any(self.numbers[n] != n.meta["val"] for n in numbers)
        return changed or any(map(self.widths.changed, values))

    def holds_number(self, node: fx.Node) -> None:
        if not self.is_touched(node):
            return
        where = describe(node.meta.get("source"))
        at = f"the code at {where}" if where else f"%{node.name}"
        self.failed(node, f"{at} holds its size, which a copy of the model cannot change")

    def write(self, node: fx.Node) -> None:
        if node.meta.get("reads"):  # gives Python a value, and the graph nothing
            self.env[node] = None
            return
        super().write(node)
        if node.meta.get("decides") and self.numbers[node] != node.meta["val"]:
            self.failed(node, f"the code at {describe(node.meta['source'])} decides by its size")
        if node.op == "output" and self.pinned(node.args[0]) != node.args[0]:
            self.failed(node, "a size of it reaches the network's output")

    # -- sizes that layers hold ------------------------------------------------------------------

    def get_attr(self, node: fx.Node) -> None:
        super().get_attr(node)
        if "size_of" in node.meta:
            self.numbers[node] = self.size_of(node)

    def size_of(self, node: fx.Node) -> int:
        """What an attribute of a layer will be; as it was, where the layer is not called."""
        name, key = node.meta["size_of"]
        calls = (use for node, use in self.flow.uses.items() if node.target == name)
        use = next(calls, None)
        return node.meta["val"] if use is None else self._letters_size(use, use.rule.sizes[key])

    def _pin(self, node: fx.Node) -> Any:
        if "size_of" in node.meta:
            same = self.numbers[node] == node.meta["val"]
            return node if same else node.meta["val"]
        return super()._pin(node)

    # -- what a graph would be given -------------------------------------------------------------

    def tensor(self, name: str, old: Tensor) -> Tensor:
        return old

    def submodule(self, target: str, attrs: dict[str, Any]) -> Any:
        return None

    def _emit(self, op, target, args, kwargs, node, attrs=None, env=None):
        same = (op, target) == (node.op, node.target)
        if not same or _tuples((args, kwargs)) != _tuples((node.args, node.kwargs)):
            self.holds_number(node)
        if op == "call_module" and self.attributes.setdefault(target, attrs or {}) != (attrs or {}):
            self.failed(node, f"is of another size at each call of {target}")

    def _gather(self, source, dim, positions, mask, node):
        self.holds_number(node)

    def _scatter(self, source, dim, mask, value, operand):
        self.holds_number(operand)

    def _cut(self, source, dim, mask, node):
        self.holds_number(node)

    def _scaled(self, source, part, node):
        self.holds_number(node)

    def by_gather(self, node: fx.Node) -> None:
        self.holds_number(node)


def _tuples(value: Any) -> Any:
    """Lists as tuples, which calls take for the same."""
    if isinstance(value, (tuple, list)):
        return tuple(map(_tuples, value))
    if isinstance(value, dict):
        return {key: _tuples(each) for key, each in value.items()}
    return value
