"""What a run over the graph knows: the `Flow` it fills, and how a node's operands are read."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from ..heads import Heads
from ..ids import Ids, Layer, Value
from ..letters import DimsUse
from ..rules import Rules, Use
from ..shuffle import Gather
from ..trees import leaves, mapped
from ..widen import Wide

Mixing = Literal["norms", "all", "none"]


@dataclass
class Flow:
    """What one run over the graph found.

    ``values``   node -> Value, or a nest of them where a node gives several tensors
    ``uses``     node -> the dims rule used there, with the sizes of its letters
    ``rules``    node -> the rule that fired
    ``unknown``  nodes no rule fits
    ``mixing``   nodes whose statistics run over channels that may go -> those layers
    ``gathers``  node -> the shuffle that a gather can take the place of
    ``scatters`` node -> operands that are laid out at full width before it, zeros for what went
    ``wide``     node -> operands it reads channels of by position, laid out like those of scatters
    ``averages`` node -> ids it takes means over, which are scaled to the original's count
    """

    graph: fx.GraphModule
    ids: Ids = field(default_factory=Ids)
    values: dict[fx.Node, Any] = field(default_factory=dict)
    uses: dict[fx.Node, DimsUse] = field(default_factory=dict)
    rules: dict[fx.Node, Use] = field(default_factory=dict)
    unknown: dict[fx.Node, str] = field(default_factory=dict)
    mixing: set[fx.Node] = field(default_factory=set)
    gathers: dict[fx.Node, Gather] = field(default_factory=dict)
    scatters: dict[fx.Node, list[fx.Node]] = field(default_factory=dict)
    wide: dict[fx.Node, Wide] = field(default_factory=dict)
    averages: dict[fx.Node, list[Tensor]] = field(default_factory=dict)


class Run:
    """One run: its options, and what ops of all kinds ask of a node."""

    def __init__(
        self,
        result: Flow,
        rules: Rules,
        mixing: Mixing,
        scatter: bool = False,
        heads: Heads = "dims",
        rewritable: bool = True,
    ):
        self.result, self.rules, self.mixing, self.scatter = result, rules, mixing, scatter
        self.heads, self.rewritable = heads, rewritable
        self.ids = result.ids
        self.modules: dict[str, nn.Module] = dict(result.graph.named_modules())
        self.aliases: dict[str, str] = result.graph.meta.get("fxprune_aliases", {})
        self.registered = frozenset(result.graph.meta.get("fxprune_registered", ()))

    def use(self, node: fx.Node) -> Use | None:
        if node.op == "call_module":
            found = self.rules.of_module(type(self.modules[node.target]))
            return None if found is None or self.misfits(node, found) else found
        call = (node.args, node.kwargs)
        if node.op == "call_method":
            return self.rules.of_method(node.target, call)
        if node.target is getattr:
            return self.rules.of_method(node.args[1], call)
        return self.rules.of_function(node.target, call)

    def misfits(self, node: fx.Node, use: Use) -> list[str]:
        return use.misfits(self.modules[node.target])

    def freeze_all(self, node: fx.Node, reason: str) -> Any:
        self.result.unknown[node] = reason
        self.freeze(node, self.inputs(node), f"reaches {self.title(node)}, which {reason}")
        return mapped(without_channels, node.meta["val"])

    def title(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{type(self.modules[node.target]).__name__} {node.target}"
        name = (
            node.target
            if isinstance(node.target, str)
            else getattr(node.target, "__name__", str(node.target))
        )
        return f"{name} at %{node.name}"

    def inputs(self, node: fx.Node) -> list[Value]:
        found: list[Value] = []
        for operand in node.all_input_nodes:
            found += leaves(self.result.values.get(operand), Value)
        return found

    def of(self, arg: Any) -> Any:
        """An argument with its nodes replaced by values (tensors) or numbers."""
        return _map_nodes(arg, self._of_node)

    def _of_node(self, node: fx.Node) -> Any:
        value = self.result.values.get(node)
        return node.meta["val"] if value is None else value

    def concrete(self, arg: Any) -> Any:
        """An argument with its nodes replaced by what they held while tracing."""
        return _map_nodes(arg, lambda n: n.meta["val"])

    def bound(self, node: fx.Node, use: Use) -> dict[str, Any]:
        bound = use.bound(node.args, node.kwargs)
        if node.op == "call_module":
            module = self.modules[node.target]
            for name in (
                *use.rule.operands,
                *use.rule.sizes,
                *use.rule.ranks.values(),
                *use.rule.at,
                "dim",
            ):
                if name not in bound and hasattr(module, name):
                    bound[name] = getattr(module, name)
        return bound

    def param(self, name: str, tensor: Any) -> Value | None:
        if not isinstance(tensor, Tensor):
            return None
        if not (tensor.is_floating_point() or tensor.is_complex()):
            return Value(tuple(tensor.shape), weight=True)
        name = self.aliases.get(name, name)
        if not self.rewritable and name not in self.registered:
            return Value(tuple(tensor.shape))
        if name not in self.ids.slots:
            return Value(tuple(tensor.shape), param=name, weight=True)
        return Value(tuple(tensor.shape), self._layers_of(name, tensor), weight=True)

    def _layers_of(self, name: str, tensor: Tensor) -> tuple[Layer, ...]:
        layers = []
        for slot in self.ids.slots[name]:
            shape = [1] * tensor.ndim
            shape[slot.dim] = tensor.shape[slot.dim]
            ids = slot.ids
            if ids.ndim == 2:
                shape[0] = tensor.shape[0]
                ids = ids.repeat_interleave(tensor.shape[0] // ids.shape[0], 0)
            layers.append(Layer(ids.reshape(shape), True))
        return tuple(layers)

    def opened(self, value: Value) -> Value:
        """A parameter no rule has read gets channels of its own along each dim."""
        if value.param is None:
            return value
        name = value.param
        if name not in self.ids.slots:
            for d, size in enumerate(value.shape):
                if size > 1:
                    self.ids.slot(name, d, self.ids.fresh(size), "free", None)
        tensor = torch.empty(value.shape, device="meta")
        return Value(
            value.shape,
            self._layers_of(name, tensor) if name in self.ids.slots else (),
            weight=True,
        )

    def operand(self, node: fx.Node, bound: dict[str, Any], name: str) -> Value | None:
        """One operand of a dims rule: an argument, or a parameter of the module."""
        found = bound.get(name)
        if isinstance(found, fx.Node):
            found = self.result.values[found]
            return (
                self.param(found.param, _stand_in(found))
                if isinstance(found, Value) and found.param
                else found
            )
        if isinstance(found, Tensor) and node.op == "call_module":
            return self.param(f"{node.target}.{name}", found)
        return None

    def freeze_unnamed(self, node: fx.Node, rest: dict[str, Any]) -> None:
        """Channels in an argument the rule says nothing about stay."""
        for name, arg in rest.items():
            self.freeze(node, leaves(self.of(arg), Value), f"is `{name}` of {self.title(node)}")

    def freeze(self, node: fx.Node, values: Iterable[Value], reason: str) -> None:
        """All channels of these values stay, because of `node`."""
        for value in values:
            for layer in self.opened(value).layers:
                self.ids.freeze(node, layer.ids, reason)

    def made(self, shape: tuple[int, ...], layers: Sequence[Layer], weight: bool = False) -> Value:
        return Value(shape, tuple(layer for layer in layers if layer.varying), weight=weight)

    def mixes(self, node: fx.Node, ids: list[Tensor], needs: str) -> None:
        module = self.modules[node.target] if node.op == "call_module" else None
        whole = self.rewritable or (module is not None and module._parameters)
        if whole and (self.mixing == "all" or self.mixing == needs):
            self.result.mixing.add(node)
            return
        for each in ids:
            allowed = self.mixing in ("all", needs)
            why = "in code that stays as it is" if allowed else f"(mixing={self.mixing!r})"
            self.ids.freeze(node, each, f"{self.title(node)} mixes channels {why}")

    def tensors(self, node: fx.Node) -> list[Value]:
        found = [self.result.values.get(arg) for arg in leaves((node.args, node.kwargs), fx.Node)]
        return [self.opened(v) for v in found if isinstance(v, Value)]

    def first(self, node: fx.Node) -> Value:
        value = self.result.values.get(node.args[0]) if node.args else None
        if not isinstance(value, Value):
            value = next(v for v in self.inputs(node))
        return self.opened(value)


def _stand_in(value: Value) -> Tensor:
    return torch.empty(value.shape, device="meta")


def _map_nodes(arg: Any, fn: Callable[[fx.Node], Any]) -> Any:
    return fx.node.map_aggregate(arg, lambda a: fn(a) if isinstance(a, fx.Node) else a)


def first_zero(values: Any) -> Any:
    """Of several outputs only the first is known to be zero where masked: others are indices."""
    if not isinstance(values, (tuple, list)):
        return values
    return [*values[:1], *(mapped(_not_zero, v) for v in values[1:])]


def _not_zero(value: Any) -> Any:
    if not isinstance(value, Value):
        return value
    return replace(value, layers=tuple(Layer(la.ids, False, la.origin) for la in value.layers))


def without_channels(value: Any) -> Any:
    return Value(tuple(value.shape)) if isinstance(value, Tensor) else value
