"""Step `rewrite`: write a second graph in which the channels are gone."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn

from . import literals, movement, positions
from .flow import Flow
from .ids import Layer, Value
from .letters import DimsUse, new_size
from .literals import Call, Context
from .plans import Kept
from .pruned import PrunedModule
from .rules import Use
from .shuffle import find_gather
from .trace import mutates, sweep
from .trees import has_tensors, leaves
from .widen import share
from .widths import RewriteError, Widths, gather

_COMPUTED_SIZES = ("reshape", "move", "fill", "cat", "pad", "assign")


def rewrite(
    model: nn.Module, flow: Flow, kept_ids: Tensor, kept: Mapping[str, dict[int, Kept]]
) -> PrunedModule:
    """A new module: `flow.graph` without the channels whose ids are not in the mask `kept_ids`.

    `kept` says the same of parameters, per dim. Each kept slice is copied once; the model and its
    graph are not touched. Raises `RewriteError` at a node where the choice cannot be written.
    """
    writer = Writer(model, flow, kept_ids, kept)
    for node in flow.graph.graph.nodes:
        writer.write(node)
    sweep(writer.graph)
    return writer.module()


class Writer:
    """Writes the new graph node by node; `copies.py` asks it what would have to be written anew."""

    def __init__(
        self, model: nn.Module, flow: Flow, kept_ids: Tensor, kept: Mapping[str, dict[int, Kept]]
    ):
        self.model, self.flow, self.kept = model, flow, kept
        self.old = flow.graph
        self.widths = Widths(flow, kept_ids)
        self.graph = fx.Graph()
        self.env: dict[fx.Node, Any] = {}
        self.numbers: dict[fx.Node, Any] = {}
        self.pins: dict[fx.Node, Any] = {}
        self.root: dict[str, Any] = {}
        self.tensors: dict[int, Tensor] = {}
        self.constants: dict[str, Tensor] = {}
        self.modules = dict(self.old.named_modules())
        self.indices: dict[int, Tensor] = {}
        self.sources = dict(model.named_modules(remove_duplicate=False))
        self.aliases: dict[str, str] = self.old.meta.get("fxprune_aliases", {})
        self.dropped = self._replaced_by_gathers()

    def _replaced_by_gathers(self) -> set[fx.Node]:
        active = [
            g
            for g in self.flow.gathers.values()
            if self.widths.changed(self.widths.value(g.source))
        ]
        return {node for g in active for node in g.inside}

    # -- nodes -----------------------------------------------------------------------------------

    def write(self, node: fx.Node) -> None:
        if node.op == "placeholder":
            self.env[node] = self.graph.node_copy(node)
            if not has_tensors(node.meta["val"]):
                self.numbers[node] = node.meta["val"]
        elif node.op == "output":
            self.graph.output(self.mapped(self.pinned(node.args[0])))
        elif node.op == "get_attr":
            self.get_attr(node)
        elif node in self.flow.gathers and node in self.dropped:
            self.gathered(node)
        elif node in self.dropped:
            return
        elif not has_tensors(node.meta["val"]) and node.target is not operator.setitem:
            self.number(node)
        else:
            self.call(node)
        if isinstance(self.env.get(node), fx.Node):
            self.env[node].meta["source"] = node.meta.get("source")
            self.env[node].meta.setdefault("was", node.name)  # names may change in a new graph

    def mapped(self, args: Any, env: Mapping[fx.Node, Any] | None = None) -> Any:
        """Arguments with the old graph's nodes replaced by the new one's."""
        known = self.env if env is None else env

        def new(arg: Any) -> Any:
            return known[arg] if isinstance(arg, fx.Node) and arg.graph is not self.graph else arg

        return fx.node.map_aggregate(args, new)

    def number(self, node: fx.Node) -> None:
        """Sizes and what is computed from them."""
        old = node.meta["val"]
        if any(operand not in self.env for operand in node.all_input_nodes):
            self.env[node] = self.numbers[node] = old
            return
        self.numbers[node] = self._new_number(node, old)
        self.env[node] = self.graph.node_copy(node, lambda n: self.env[n])

    def _new_number(self, node: fx.Node, old: Any) -> Any:
        value = (
            self.widths.value(node.args[0])
            if node.args and isinstance(node.args[0], fx.Node)
            else None
        )
        if isinstance(value, Value):
            if not isinstance(old, int) or isinstance(old, bool):
                return old
            shape = self.widths.shape(node.args[0], value)
            dim = node.args[1] if len(node.args) > 1 else None
            return shape[dim] if isinstance(dim, int) else torch.Size(shape).numel()
        args = fx.node.map_aggregate(
            node.args, lambda a: self.numbers.get(a, a) if isinstance(a, fx.Node) else a
        )
        try:
            return node.target(*args) if callable(node.target) else old
        except (TypeError, ValueError, ArithmeticError):
            return old

    def get_attr(self, node: fx.Node) -> None:
        if isinstance(node.meta["val"], Tensor):
            name = self.aliases.get(node.target, node.target)
            self.root[node.target] = self.tensor(name, node.meta["val"])
        else:
            self.numbers[node] = node.meta["val"]
            self.root[node.target] = _training(self.model, node.target.rpartition(".")[0])
        self.env[node] = self.graph.create_node("get_attr", node.target, (), {}, node.name)

    def gathered(self, node: fx.Node) -> None:
        """A shuffle's place is taken by one gather."""
        found = self.flow.gathers[node]
        source = self.widths.value(found.source)
        mask = self.widths.along(source, found.dim)
        assert mask is not None
        places = found.positions[mask[found.positions]]
        self.env[node] = self._gather(self.env[found.source], found.dim, places, mask, node)

    def _gather(
        self, source: fx.Node, dim: int, places: Tensor, mask: Tensor, node: fx.Node
    ) -> fx.Node:
        """The kept positions of `source` in a new order; what `node` gave may have been a view."""
        if self._changed_in_place(node):
            fault = f"%{node.name} is changed in place, and would be a copy where channels go"
            raise RewriteError(node, fault)
        rank = torch.cumsum(mask, 0) - 1
        index = rank[places]
        if torch.equal(index, torch.arange(int(mask.sum()))):
            return source
        name = node.name if f"_gather_{node.name}" not in self.constants else f"{node.name}_{dim}"
        constant = f"_gather_{name}"
        self.constants[constant] = index
        at = self.graph.get_attr(constant)
        return self.graph.call_function(torch.index_select, (source, dim, at))

    def _changed_in_place(self, node: fx.Node) -> bool:
        use = self.flow.rules.get(node)
        if use is not None and use.rule.copies:
            return False
        for user in node.users:
            inplace = user.op == "call_module" and getattr(self.modules[user.target], "inplace", 0)
            if (inplace or mutates(user)) and user.args and user.args[0] is node:
                return True
        return False

    def call(self, node: fx.Node) -> None:
        use = self.flow.rules.get(node)
        if use is None:
            args, kwargs = self.pinned((node.args, dict(node.kwargs)))
            self.env[node] = self._emit(node.op, node.target, args, kwargs, node)
            return
        call = Call(node, use, node.op, node.target, tuple(node.args), dict(node.kwargs))
        if use.rule.kind in _COMPUTED_SIZES:
            self.movement(call)
        else:
            call.args, call.kwargs = self.pinned(call.args), dict(self.pinned(call.kwargs))
            if node in self.flow.uses:
                self.sized(call, self.flow.uses[node])
            self.env[node] = self._emit(
                call.op, call.target, call.args, call.kwargs, node, call.attrs, self._widened(node)
            )
            self._narrowed(node)

    def _widened(self, node: fx.Node) -> dict[fx.Node, Any]:
        """What takes the place of a node's operands, those laid out at full width among it."""
        if node in self.flow.scatters:
            return {**self.env, **self._scattered(node)}
        wide: dict[fx.Node, fx.Node] = {}
        for operand, dim in self.flow.wide[node].operands if node in self.flow.wide else ():
            value = self.widths.value(operand)
            mask = self.widths.along(value, dim)
            if mask is not None and not mask.all():
                at = wide.get(operand, self.env[operand])
                wide[operand] = self._scatter(at, dim, mask, value, operand)
        return {**self.env, **wide} if wide else self.env

    def _narrowed(self, node: fx.Node) -> None:
        """Cut off the places of channels that went, and scale means to the original's count."""
        for dim in self.flow.wide[node].cut if node in self.flow.wide else ():
            mask = self.widths.along(self.widths.value(node), dim)
            if mask is not None and not mask.all():
                self.env[node] = self._cut(self.env[node], dim, mask, node)
        part = share([self.widths.kept[ids] for ids in self.flow.averages.get(node, ())])
        if part < 1:
            self.env[node] = self._scaled(self.env[node], part, node)

    def _scaled(self, source: fx.Node, part: float, node: fx.Node) -> fx.Node:
        return self.graph.call_function(operator.mul, (source, part))

    def _cut(self, source: fx.Node, dim: int, mask: Tensor, node: fx.Node) -> fx.Node:
        constant = f"_kept_{node.name}_{dim}"
        self.constants[constant] = mask.nonzero().flatten()
        at = self.graph.get_attr(constant)
        return self.graph.call_function(torch.index_select, (source, dim, at))

    def _scattered(self, node: fx.Node) -> dict[fx.Node, fx.Node]:
        """The operands of an addition that lost channels, at full width with zeros there."""
        wide: dict[fx.Node, fx.Node] = {}
        for operand in self.flow.scatters[node]:
            value = self.widths.value(operand)
            for layer in value.layers:
                mask = self.widths.kept[layer.ids]
                if not mask.all():
                    (dim,) = layer.varying
                    at = wide.get(operand, self.env[operand])
                    wide[operand] = self._scatter(at, dim, mask.reshape(-1), value, operand)
        return wide

    def _scatter(
        self, source: fx.Node, dim: int, mask: Tensor, value: Value, operand: fx.Node
    ) -> fx.Node:
        """`source` with a slice of zeros behind, which every channel that went is taken from."""
        index = torch.where(mask, torch.cumsum(mask, 0) - 1, int(mask.sum()))
        constant = f"_scatter_{operand.name}_{dim}"
        self.constants[constant] = index
        ends = [0, 0] * (len(value.shape) - 1 - dim) + [0, 1]
        padded = self.graph.call_function(nn.functional.pad, (source, ends))
        at = self.graph.get_attr(constant)
        return self.graph.call_function(torch.index_select, (padded, dim, at))

    def pinned(self, args: Any) -> Any:
        """Numbers that would change with the widths stay what the original computed with."""

        def pin(arg):
            return self.pin(arg) if isinstance(arg, fx.Node) and arg in self.numbers else arg

        return fx.node.map_aggregate(args, pin)

    def pin(self, node: fx.Node) -> Any:
        """What computes a number as it was: from the original's widths and the input's size."""
        if node not in self.pins:
            self.pins[node] = self._pin(node)
        return self.pins[node]

    def _pin(self, node: fx.Node) -> Any:
        old, new = node.meta["val"], self.numbers[node]
        if any(isinstance(self.widths.value(n), Value) for n in node.all_input_nodes):
            return self._pinned_size(node, old, new)
        if node.op != "call_function" or not node.all_input_nodes:
            return node
        args, kwargs = self.pinned((node.args, dict(node.kwargs)))
        if (args, kwargs) == (node.args, node.kwargs):
            return node
        if not leaves((args, kwargs), fx.Node):
            return old
        return self.graph.call_function(node.target, *self.mapped((args, kwargs)))

    def _pinned_size(self, node: fx.Node, old: Any, new: Any) -> Any:
        """A width is the number it was; what has a width as a factor is scaled back."""
        if old == new or not isinstance(old, int) or not isinstance(new, int):
            return node
        value, dim = self.widths.value(node.args[0]), node.args[1:]
        if dim and isinstance(dim[0], int) and self.widths.is_width(value, dim[0]):
            return old
        common = math.gcd(old, new)
        size = self.graph.call_function(operator.mul, (self.env[node], old // common))
        return self.graph.call_function(operator.floordiv, (size, new // common))

    def sized(self, call: Call, use: DimsUse) -> None:
        """Attributes and arguments that hold the sizes of letters."""
        for key, text in use.rule.sizes.items():
            value = self._letters_size(use, text)
            if call.op == "call_module":
                call.attrs[key] = value
            elif key in call.use.arguments:
                self._set_size(call, key, value)
        for key, letter in use.rule.pins.items():
            size = use.binding.sizes[letter]
            if (
                self._letters_size(use, letter) != size
                and call.use.bound(call.args, call.kwargs).get(key) is None
            ):
                call.kwargs[key] = size**-0.5

    def _letters_size(self, use: DimsUse, text: str) -> Any:
        def size(letter: str) -> int:
            return new_size(letter, use.layers, self.widths.kept, use.binding.sizes[letter])

        if text.startswith("*"):
            names = [
                n for n in use.binding.sizes if n.rstrip("0123456789") == text[1:] and n != text[1:]
            ]
            return tuple(
                size(name) for name in sorted(names, key=lambda n: int(n[len(text) - 1 :]))
            )
        product = 1
        for letter in text.split():
            product *= size(letter)
        return product

    def _set_size(self, call: Call, key: str, value: Any) -> None:
        bound = call.use.bound(call.args, call.kwargs)
        if key not in bound:
            return
        given = bound[key]
        if isinstance(given, fx.Node) and self.numbers.get(given) == value:
            return
        if isinstance(given, (list, tuple)):
            value = [
                g if isinstance(g, fx.Node) and self.numbers.get(g) == v else v
                for g, v in zip(given, value, strict=True)
            ]
        at = call.use.arguments.index(key)
        if key in call.kwargs:
            call.kwargs[key] = value
        else:
            call.args = (*call.args[:at], value, *call.args[at + 1 :])

    # -- movements -------------------------------------------------------------------------------

    def movement(self, call: Call) -> None:
        node, rule = call.node, call.use.rule
        source = (
            self.widths.value(node.args[0])
            if node.args and isinstance(node.args[0], fx.Node)
            else None
        )
        source = source if isinstance(source, Value) else Value(())
        self.pin_values(call)
        if rule.fix:
            module = self.modules[call.target] if call.op == "call_module" else None
            numbers = self.numbers.get
            literals.FIXES[rule.fix](call, Context(self.widths, numbers, source, module))
        moves = rule.kind == "move" and not call.gathers and self.widths.changed(source)
        if moves and not self.delivers(call, source):
            return self.by_gather(node)
        env = self.env
        if call.gathers:
            taken = self._pregathered(call, source)
            if call.op == "gathered":
                self.env[node] = taken
                return
            env = {**env, node.args[0]: taken}
        self.env[node] = self._emit(
            call.op, call.target, call.args, call.kwargs, node, call.attrs, env
        )

    def pin_values(self, call: Call) -> None:
        """Numbers that become elements of the result, among others that are sizes of it."""
        for name in ("value", "fill_value"):
            if name in call.kwargs:
                call.kwargs[name] = self.pinned(call.kwargs[name])
            elif name in call.use.arguments[: len(call.args)]:
                at = call.use.arguments.index(name)
                value = self.pinned(call.args[at])
                call.args = (*call.args[:at], value, *call.args[at + 1 :])

    def _pregathered(self, call: Call, source: Value) -> fx.Node:
        taken = self.env[call.node.args[0]]
        for dim, places in call.gathers:
            mask = self.widths.along(source, dim)
            assert mask is not None
            taken = self._gather(taken, dim, places, mask, call.node)
        return taken

    def delivers(self, call: Call, source: Value) -> bool:
        """Whether the corrected call puts the kept channels where they should be."""
        if positions.is_computed(_concrete(call.args[1:])):
            return True  # along other dims than those of the channels
        wanted = self._outputs(call.node)
        shapes = [self.widths.shape(call.node, value) for value in wanted]
        shape = self.widths.shape(call.node.args[0], source)
        for k, layer in enumerate(self.widths.layers(source)):
            ids = self.widths.compact(call.node.args[0], source, layer)
            found = movement.move(ids, shape, lambda x: self._run(call, x), shapes)
            if found is None:
                return False
            for value, ids_out in zip(wanted, found, strict=True):
                if not self._same(call.node, value, k, len(source.layers), ids_out):
                    return False
        return True

    def _same(self, node: fx.Node, value: Value, k: int, count: int, found: Tensor) -> bool:
        layers = [la for la in value.layers if la.varying]
        if len(layers) != count:
            return True
        wanted = self.widths.compact(node, value, layers[k])
        shape = np.broadcast_shapes(tuple(wanted.shape), tuple(found.shape))
        return torch.equal(wanted.expand(shape), found.expand(shape))

    def _outputs(self, node: fx.Node) -> list[Value]:
        return leaves(self.widths.value(node), Value)

    def _run(self, call: Call, ids: Tensor) -> Any:
        def concrete(arg):
            return self.numbers.get(arg, arg.meta["val"]) if isinstance(arg, fx.Node) else arg

        rest = fx.node.map_aggregate((call.args[1:], call.kwargs), concrete)
        args, kwargs = positions.standins(rest)
        if call.op == "call_module":
            return self.modules[call.target](ids)
        if call.op == "call_method":
            return getattr(ids, call.target)(*args, **kwargs)
        return call.target(ids, *args, **kwargs)

    def by_gather(self, node: fx.Node) -> None:
        found = find_gather(node, self.flow.values, self._rerun)
        if found is None or found.source is not node.args[0]:
            raise RewriteError(node, f"the order of channels after %{node.name} cannot be kept")
        mask = self.widths.along(self.widths.value(found.source), found.dim)
        if mask is None:
            raise RewriteError(node, f"channels spread over several dims are moved at %{node.name}")
        places = found.positions[mask[found.positions]]
        self.env[node] = self._gather(self.env[found.source], found.dim, places, mask, node)

    def _rerun(self, node: fx.Node, ids: Tensor, shape):
        outputs = [tuple(v.shape) for v in leaves(node.meta["val"], Tensor)]
        call = Call(
            node, self.flow.rules[node], node.op, node.target, tuple(node.args), dict(node.kwargs)
        )

        def run(x):
            old = fx.node.map_aggregate(
                (call.args[1:], call.kwargs),
                lambda a: a.meta["val"] if isinstance(a, fx.Node) else a,
            )
            old = positions.standins(old)
            if call.op == "call_module":
                return self.modules[call.target](x)
            if call.op == "call_method":
                return getattr(x, call.target)(*old[0], **old[1])
            return call.target(x, *old[0], **old[1])

        return movement.move(ids, shape, run, outputs)

    # -- emitting --------------------------------------------------------------------------------

    def _emit(
        self,
        op: str,
        target: Any,
        args: Any,
        kwargs: Any,
        node: fx.Node,
        attrs: Any = None,
        env=None,
    ) -> fx.Node:
        args, kwargs = self.mapped(args, env), self.mapped(kwargs, env)
        if op == "call_module" and target not in self.root:
            self.root[target] = self.submodule(target, attrs or {})
        return self.graph.create_node(op, target, args, kwargs, node.name)

    def submodule(self, target: str, attrs: dict[str, Any]) -> nn.Module:
        """A copy of a leaf module with narrow parameters and corrected attributes."""
        old = self.sources[target]
        new = object.__new__(type(old))
        new.__dict__.update(old.__dict__)
        for table in ("_parameters", "_buffers"):
            new.__dict__[table] = {
                name: None if t is None else self.tensor(self._name(f"{target}.{name}"), t)
                for name, t in getattr(old, table).items()
            }
        new.__dict__["_modules"] = {
            name: None if child is None else self.submodule(f"{target}.{name}", {})
            for name, child in old._modules.items()
        }
        for name in (
            "_backward_hooks",
            "_forward_hooks",
            "_forward_pre_hooks",
            "_non_persistent_buffers_set",
        ):
            table = old.__dict__[name]
            new.__dict__[name] = type(table)(table)
        if isinstance(old, nn.RNNBase):  # lists its weights a second time
            own = new._parameters
            new.__dict__["_flat_weights"] = [own.get(n) for n in old._flat_weights_names]
        set_sizes(new, attrs)
        return new

    def _name(self, name: str) -> str:
        return self.aliases.get(name, name)

    def tensor(self, name: str, old: Tensor) -> Tensor:
        """The kept slices of a parameter or buffer; tied tensors stay tied."""
        if id(old) not in self.tensors:
            self.tensors[id(old)] = sliced(old, self.kept.get(name, {}), self.indices)
        return self.tensors[id(old)]

    def module(self) -> PrunedModule:
        device = next((t.device for t in self.tensors.values() if not t.is_meta), None)
        constants = {name: index.to(device) for name, index in self.constants.items()}
        root: dict[str, Any] = {**self.root, **constants}
        names = {node.target for node in self.graph.nodes if node.op in ("call_module", "get_attr")}
        module = PrunedModule(
            {name: value for name, value in root.items() if name in names},
            self.graph,
            type(self.model).__name__,
        )
        self._mark_buffers(module)
        for name, child in module.named_modules():
            if name not in self.root:
                source = self.sources.get(name, self.model)
                child.__dict__["training"] = source.training
        module.training = self.model.training
        return module

    def _mark_buffers(self, module: PrunedModule) -> None:
        hidden = set(self.constants) | {n for n in self.root if n.startswith("_tensor_constant")}
        for prefix, owner in self.sources.items():
            if owner._non_persistent_buffers_set:
                hidden |= {f"{prefix}.{n}".lstrip(".") for n in owner._non_persistent_buffers_set}
        if not hidden:
            return
        for name in hidden & {n for n, _ in module.named_buffers(remove_duplicate=False)}:
            owner, _, field = name.rpartition(".")
            module.get_submodule(owner)._non_persistent_buffers_set.add(field)


def _concrete(args: Any) -> Any:
    return fx.node.map_aggregate(args, lambda a: a.meta["val"] if isinstance(a, fx.Node) else a)


def sliced(old: Tensor, kept: dict[int, Kept], known: dict[int, Tensor]) -> Tensor:
    """A copy of the kept slices of a parameter or buffer, otherwise like it."""
    new = gather(old.detach(), kept, known)
    if new.data_ptr() == old.data_ptr() or new is old:
        new = new.clone()
    if (
        old.ndim == 4
        and not old.is_contiguous()
        and old.is_contiguous(memory_format=torch.channels_last)
    ):
        new = new.contiguous(memory_format=torch.channels_last)
    if isinstance(old, nn.Parameter):
        new = nn.Parameter(new, requires_grad=old.requires_grad)
    return new


def set_sizes(module: nn.Module, sizes: Mapping[str, Any]) -> None:
    """Write sizes into the attributes of a leaf module that hold them. One that is 1 stays: it
    serves all channels alike, as the parameter of a PReLU may."""
    for key, value in sizes.items():
        if getattr(module, key, None) == 1:
            continue
        if key in module.__dict__:  # not by setattr, which takes its time in a module
            module.__dict__[key] = value
        elif hasattr(module, key):
            setattr(module, key, value)


def _training(model: nn.Module, name: str) -> bool:
    try:
        return model.get_submodule(name).training
    except AttributeError:
        return model.training


__all__ = ["Layer", "Use", "rewrite"]
