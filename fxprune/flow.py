"""Step `flow`: run the traced graph once more, on channel ids instead of numbers."""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, fx, nn

from . import einsum, letters, movement, positions, recurrent
from . import scatter as scattering
from .errors import RuleError
from .heads import Heads
from .ids import ColumnTie, Ids, Layer, RowTie, Value, compress
from .letters import DimsUse
from .pattern import bind
from .rules import Rules, Use
from .shuffle import Gather, find_gather, in_order
from .trees import has_tensors, leaves, mapped
from .widen import Wide, can_be_wide

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
    run = _Run(Flow(graph), rules, mixing, scatter, heads, rewritable)
    for node in graph.graph.nodes:
        run.result.values[node] = run.value(node)
    for node in run.result.scatters:
        scattering.freeze_if_shown(run.result, node)
    return run.result


class _Run:
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

    # -- one node --------------------------------------------------------------------------------

    def value(self, node: fx.Node) -> Any:
        if node.op == "placeholder":
            return mapped(_plain, node.meta["val"])
        if node.op == "get_attr":
            return self.param(node.target, node.meta["val"])
        if node.op == "output":
            return self.output(node)
        if node.op == "call_function" and isinstance(node.target, type):
            return self._container(node)
        if node.meta.get("reads"):
            return self.read_by_python(node)
        if not has_tensors(node.meta["val"]) and node.target is not setitem:
            return None
        return self.call(node)

    def read_by_python(self, node: fx.Node) -> None:
        for value in self.inputs(node):
            for layer in self.opened(value).layers:
                self.ids.freeze(node, layer.ids, f"is read as values by {self.title(node)}")

    def output(self, node: fx.Node) -> None:
        for value in self.inputs(node):
            for layer in self.opened(value).layers:
                self.ids.freeze(node, layer.ids, "reaches the network's output")

    def call(self, node: fx.Node) -> Any:
        use = self.use(node)
        if isinstance(node.kwargs.get("out"), fx.Node):
            return self.freeze_all(node, "writes to another tensor")
        if use is not None:
            handler: Callable = getattr(self, f"do_{use.rule.kind}")
            try:
                found = handler(node, use)
            except RuleError as error:
                return self.freeze_all(node, f"does not fit {use.rule.where}: {error.fault}")
            if found is not NotImplemented:
                self.result.rules[node] = use
                return found
        container = self._container(node)
        return container if container is not None else self.freeze_all(node, self._no_rule(node))

    def use(self, node: fx.Node) -> Use | None:
        if node.op == "call_module":
            found = self.rules.of_module(type(self.modules[node.target]))
            return None if found is None or self._misfits(node, found) else found
        call = (node.args, node.kwargs)
        if node.op == "call_method":
            return self.rules.of_method(node.target, call)
        if node.target is getattr:
            return self.rules.of_method(node.args[1], call)
        return self.rules.of_function(node.target, call)

    def _misfits(self, node: fx.Node, use: Use) -> list[str]:
        return use.misfits(self.modules[node.target])

    def _no_rule(self, node: fx.Node) -> str:
        known = node.op == "call_module" and self.rules.of_module(type(self.modules[node.target]))
        misfits = ", ".join(self._misfits(node, known)) if known else ""
        return f"has no rule for {misfits}" if misfits else "has no rule"

    def _container(self, node: fx.Node) -> Any:
        """An item of a tuple or dict, or a class that only holds its arguments."""
        if node.target is getitem and not isinstance(self.result.values.get(node.args[0]), Value):
            parent = self.result.values.get(node.args[0])
            return parent[node.args[1]] if parent is not None else None
        if isinstance(node.target, type) and node.op == "call_function":
            return [self.opened(v) for v in self.inputs(node)]
        return None

    def freeze_all(self, node: fx.Node, reason: str) -> Any:
        self.result.unknown[node] = reason
        for value in self.inputs(node):
            for layer in self.opened(value).layers:
                self.ids.freeze(node, layer.ids, f"reaches {self.title(node)}, which {reason}")
        return mapped(_plain, node.meta["val"])

    def title(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return f"{type(self.modules[node.target]).__name__} {node.target}"
        name = (
            node.target
            if isinstance(node.target, str)
            else getattr(node.target, "__name__", str(node.target))
        )
        return f"{name} at %{node.name}"

    # -- operands --------------------------------------------------------------------------------

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
                self.param(found.param, node_tensor(found))
                if isinstance(found, Value) and found.param
                else found
            )
        if isinstance(found, Tensor) and node.op == "call_module":
            return self.param(f"{node.target}.{name}", found)
        return None

    # -- kinds -----------------------------------------------------------------------------------

    def do_plain(self, node: fx.Node, use: Use) -> Any:
        """A tensor that carries no channels: those of an operand cannot go."""
        for value in self.inputs(node):
            for layer in self.opened(value).layers:
                self.ids.freeze(node, layer.ids, f"is read as a whole by {self.title(node)}")
        return mapped(_plain, node.meta["val"])

    def do_fill(self, node: fx.Node, use: Use) -> Value:
        shape = tuple(node.meta["val"].shape)
        layers = []
        for d, size in enumerate(shape):
            if size > 1:
                dims = [1] * len(shape)
                dims[d] = size
                layers.append(Layer(self.ids.fresh(size).view(dims), use.rule.zero == "keeps"))
        return Value(shape, tuple(layers))

    def do_dims(self, node: fx.Node, use: Use) -> Any:
        bound = self.bound(node, use)
        rule = use.rule.standing(self._attributes(node, bound)) if use.rule.still else use.rule
        use = replace(use, rule=rule)
        values = [self.operand(node, bound, name) for name in rule.operands]
        known = {*rule.operands, *rule.ignores}
        self._freeze_unnamed(node, {name: bound[name] for name in bound if name not in known})
        return self.run_letters(node, use, rule.pattern, values, bound)

    def _attributes(self, node: fx.Node, bound: dict[str, Any]) -> dict[str, Any]:
        """What a call's arguments are, or a module's attributes."""
        return vars(self.modules[node.target]) if node.op == "call_module" else bound

    def _freeze_unnamed(self, node: fx.Node, rest: dict[str, Any]) -> None:
        """Channels in an argument the rule says nothing about stay."""
        for name, arg in rest.items():
            for leaf in leaves(self.of(arg), Value):
                for layer in self.opened(leaf).layers:
                    self.ids.freeze(node, layer.ids, f"is `{name}` of {self.title(node)}")

    def do_recurrent(self, node: fx.Node, use: Use) -> Any:
        weights = recurrent.weights(self.modules[node.target])
        bound = use.bound(node.args, node.kwargs)
        source = self.of(bound.get("input"))
        if not weights.all_own() or not isinstance(source, Value):
            return self.freeze_all(node, "has computed weights, or steps of several lengths")
        call = recurrent.Recurrence(self.ids, node, weights, lambda name: self._own(node, name))
        hidden, given = call.units()
        read = call.reads(self.opened(source))
        states = [self.opened(v) for v in leaves(self.of(bound.get("hx")), Value)]
        zero = [call.starts(u, s) for u, s in zip((given, hidden), states, strict=False)]
        self.result.uses[node] = call.used(use.rule, read, hidden, given)
        tensors = leaves(node.meta["val"], Tensor)
        made = recurrent.results(weights, tensors, hidden, given, all(zero))
        return mapped(lambda _: next(made), node.meta["val"])

    def _own(self, node: fx.Node, name: str) -> str:
        """The full name of a module's parameter."""
        return self.aliases.get(f"{node.target}.{name}", f"{node.target}.{name}")

    def do_einsum(self, node: fx.Node, use: Use) -> Any:
        bound = use.bound(node.args, node.kwargs)
        values = [self.operand(node, {"x": v}, "x") for v in bound["operands"]]
        shapes = [v.shape for v in values if v is not None]
        return self.run_letters(
            node, use, einsum.of_equation(bound["equation"], shapes), values, {}
        )

    def do_matmul(self, node: fx.Node, use: Use) -> Any:
        bound = use.bound(node.args, node.kwargs)
        values = [self.operand(node, bound, name) for name in use.rule.operands]
        if any(v is None for v in values):
            return NotImplemented
        ranks = [len(v.shape) for v in values if v is not None]
        return self.run_letters(node, use, einsum.of_matmul(*ranks), values, {})

    def run_letters(
        self, node: fx.Node, use: Use, pattern, values: list[Value | None], bound: dict[str, Any]
    ) -> Any:
        outputs = leaves(node.meta["val"], Tensor)
        sizes = {
            text: self.concrete(bound[key])
            for key, text in use.rule.sizes.items()
            if key in bound and text.isidentifier()
        }
        ranks = {
            letter: len(self.concrete(bound[key]))
            for letter, key in use.rule.ranks.items()
            if key in bound
        }
        ranks |= self._ranks_at(use, bound, values)
        shapes = [None if v is None else v.shape for v in values]
        fixed = {**use.rule.fixed, **sizes}
        binding = bind(pattern, shapes, tuple(outputs[0].shape), sizes=fixed, ranks=ranks)
        values = [self._if_raw(v) for v in values]
        layers, done, mixed = letters.flow(self.ids, node, use.rule, binding, values, self.heads)
        layers += self._past_windows(node, done, values)
        if mixed:
            self.mixes(node, [n.ids for n in mixed], "norms" if use.rule.norm else "all")
        self.result.uses[node] = done
        weight = all(v.weight for v in values if v is not None)
        return _first_zero(
            mapped(lambda t: self._dims_output(t, outputs[0], layers, weight), node.meta["val"])
        )

    def _past_windows(self, node: fx.Node, done: DimsUse, values: list[Any]) -> list[Layer]:
        """Channels under a window are laid out at full width; each place it gives has a new one."""
        if not done.windows:
            return []
        if not self.rewritable:
            for i, dim in done.windows:
                for layer in values[i].layers:
                    if dim in layer.varying:
                        why = f"is read by position, as in a window (%{node.name})"
                        self.ids.freeze(node, layer.ids, why)
            return []
        operands = {id(self.result.values[n]): n for n in node.all_input_nodes}
        wide = self.result.wide[node] = Wide()
        wide.operands += [(operands[id(values[i])], dim) for i, dim in done.windows]
        wide.cut += letters.places(done)
        shape = leaves(node.meta["val"], Tensor)[0].shape
        return [Layer(self._along(dim, shape), False) for dim in wide.cut]

    def _along(self, dim: int, shape: Sequence[int]) -> Tensor:
        """New ids along one dim of a shape."""
        return self.ids.fresh(shape[dim]).view([-1 if d == dim else 1 for d in range(len(shape))])

    def _if_raw(self, value: Value | None) -> Value | None:
        return self.opened(value) if value is not None and value.param in self.ids.slots else value

    def _ranks_at(self, use: Use, bound: dict[str, Any], values: list[Any]) -> dict[str, int]:
        """The dims before the one that an argument points at are the first star's."""
        ranks = {}
        for key in use.rule.at:
            rank = len(values[0].shape)
            dim = self.concrete(bound.get(key, -1)) % rank
            before = use.rule.pattern.inputs[0].terms[0].atoms[0].letter
            ranks[before] = dim
        return ranks

    def _dims_output(self, tensor: Any, first: Tensor, layers: list[Layer], weight: bool) -> Any:
        if not isinstance(tensor, Tensor):
            return tensor
        fitting = tuple(layer for layer in layers if _broadcasts(layer.ids.shape, tensor.shape))
        return self.made(tuple(tensor.shape), fitting if tensor.ndim == first.ndim else (), weight)

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

    def do_pointwise(self, node: fx.Node, use: Use) -> Any:
        shape = tuple(leaves(node.meta["val"], Tensor)[0].shape)
        values = self.tensors(node)
        if self.scatter and self.rewritable and use.rule.joins:
            values = scattering.untied(self.result, node, values)
        layers, weight = self.meet(node, values, shape, use)
        value = self.made(shape, layers, weight)
        return _first_zero(mapped(lambda _: value, node.meta["val"]))

    def tensors(self, node: fx.Node) -> list[Value]:
        found = [self.result.values.get(arg) for arg in leaves((node.args, node.kwargs), fx.Node)]
        return [self.opened(v) for v in found if isinstance(v, Value)]

    def meet(
        self, node: fx.Node, values: list[Value], shape: tuple[int, ...], use: Use
    ) -> tuple[list[Layer], bool]:
        """Broadcast values: what meets is tied, or frozen by what has no channels."""
        laid = [[_lift(layer, len(shape)) for layer in v.layers] for v in values]
        real = [_real(v, len(shape)) for v in values]
        merged = self._tied(node, laid, real)
        zero = self._zero(node, use, values, laid)
        out = [Layer(m.ids, any(set(m.varying) & z for z in zero), m.origin) for m in merged]
        return out, bool(values) and all(v.weight for v in values)

    def _tied(
        self, node: fx.Node, operands: Sequence[Sequence[Layer]], real: Sequence[set[int]]
    ) -> list[Layer]:
        """Tie layers of different operands that vary along the same dims; the widest are left.

        `real` are the dims of each operand that are not broadcast: ids that meet one there which
        has no layer for them are frozen.
        """
        merged: list[Layer] = []
        owners: list[set[int]] = []
        for i, layers in enumerate(operands):
            for layer in layers:
                dims = set(layer.varying)
                free = (k for k in range(len(merged)) if i not in owners[k])
                k = next((k for k in free if dims & set(merged[k].varying)), None)
                if k is None:
                    merged.append(layer)
                    owners.append({i})
                    continue
                reach = set().union(*(real[j] for j in owners[k])), real[i]
                owners[k].add(i)
                if _crossed(merged[k], layer):
                    passed = self._passed_beside(node, merged[k], layer, reach)
                    merged[k : k + 1] = passed
                    owners[k : k + 1] = [set(owners[k]) for _ in passed]
                else:
                    merged[k] = self._tied_pair(node, merged[k], layer, reach)
        plain = [
            set().union(*(dims for i, dims in enumerate(real) if i not in mine)) & set(la.varying)
            for la, mine in zip(merged, owners, strict=True)
        ]
        return [
            layer
            for layer, dims in zip(merged, plain, strict=True)
            if not dims or self._passes_plain(node, layer, dims)
        ]

    def _tied_pair(
        self, node: fx.Node, a: Layer, b: Layer, reach: tuple[set[int], set[int]]
    ) -> Layer:
        """Tie two layers; `reach` are the dims along which the values they belong to are no
        broadcasts. What is as wide as the rows are long can lose them only as a whole."""
        narrow, wide = sorted((a, b), key=lambda layer: len(layer.varying))
        beside = set(wide.varying) - set(narrow.varying)
        if _by_rows(set(narrow.varying), wide) and not beside & reach[narrow is b]:
            self._row_tie(node, wide, set(narrow.varying), narrow)
        elif self._by_columns(set(narrow.varying), wide) and not beside & reach[narrow is b]:
            self._column_tie(node, wide, set(narrow.varying), narrow)
        else:
            self.ids.tie(node, narrow.ids, wide.ids)
        return wide if len(wide.varying) > len(narrow.varying) else a

    def _passed_beside(
        self, node: fx.Node, a: Layer, b: Layer, reach: tuple[set[int], set[int]]
    ) -> list[Layer]:
        """Layers that share rows and have columns of their own: those not frozen by the other."""
        shared = set(a.varying) & set(b.varying)
        self._row_tie(node, a, shared, b)
        met = (a, (set(a.varying) - shared) & reach[1]), (b, (set(b.varying) - shared) & reach[0])
        return [la for la, dims in met if not dims or self._passes_plain(node, la, dims)]

    def _passes_plain(self, node: fx.Node, layer: Layer, dims: set[int]) -> bool:
        """Meet something without channels along `dims`: rows stay, whole layers are frozen."""
        if _by_rows(dims, layer):
            self._row_tie(node, layer, dims, None)
            return True
        if self._by_columns(dims, layer):
            self._column_tie(node, layer, dims, None)
            return True
        self.ids.freeze(node, layer.ids, f"meets a constant or an input at %{node.name}")
        return False

    def _row_tie(self, node: fx.Node, wide: Layer, dims: set[int], narrow: Layer | None) -> None:
        """What meets whole rows of channels: see `RowTie`."""
        order = [*sorted(dims), *(d for d in range(wide.ids.ndim) if d not in dims)]
        rows = math.prod(wide.ids.shape[d] for d in dims)
        ids = wide.ids.permute(order).reshape(rows, -1)
        other = None if narrow is None else narrow.ids.permute(order).reshape(rows, -1)
        self.ids.rows.append(RowTie(node, ids, other))

    def _by_columns(self, dims: set[int], wide: Layer) -> bool:
        """Whether `dims` are those along which channels of rows go, and rows may go whole."""
        return self.heads != "dims" and {wide.varying[-1]} == dims < set(wide.varying)

    def _column_tie(self, node: fx.Node, wide: Layer, dims: set[int], narrow: Layer | None) -> None:
        """What meets the columns of all rows: see `ColumnTie`."""
        (dim,) = dims
        ids = wide.ids.movedim(dim, -1).reshape(-1, wide.ids.shape[dim])
        other = None if narrow is None else narrow.ids.reshape(-1)
        self.ids.columns.append(ColumnTie(node, ids, other))

    def _zero(
        self, node: fx.Node, use: Use, values: list[Value], laid: list[list[Layer]]
    ) -> list[set[int]]:
        """The sets of dims whose masked channels are zero in the result."""
        if use.rule.zero == "no":
            return []
        per = [[set(layer.varying) for layer in layers if layer.zero] for layers in laid]
        if use.rule.zero == "any":
            chosen = per[: len(use.rule.operands) or None]
            return [dims for dims_list in chosen for dims in dims_list]
        scalars = [
            a for a in node.args[: len(use.rule.operands)] if isinstance(a, (int, float)) and a != 0
        ]
        if scalars or not per:
            return []
        return [dims for dims in per[0] if all(any(dims & other for other in o) for o in per[1:])]

    def do_reduce(self, node: fx.Node, use: Use) -> Any:
        bound = self.bound(node, use)
        dim = bound.get("dim")
        if isinstance(dim, fx.Node) and isinstance(dim.meta["val"], Tensor):
            return self.do_pointwise(node, use)
        values = self.tensors(node)
        shape = _joint_shape(values)
        layers, weight = self.meet(node, values, shape, use) if len(values) > 1 else (
            list(values[0].layers), values[0].weight)  # fmt: skip
        dims = self._reduced(self.concrete(dim), len(shape))
        layers = [
            r for layer in layers if (r := self._reduce(node, use, layer, dims, weight)) is not None
        ]
        return _first_zero(
            mapped(lambda t: self._reduced_value(t, shape, layers, dims, weight), node.meta["val"])
        )

    def _reduced(self, dim: Any, rank: int) -> set[int]:
        if dim is None or dim == () or dim == []:
            return set(range(rank))
        return {d % rank for d in ((dim,) if isinstance(dim, int) else dim)}

    def _reduce(
        self, node: fx.Node, use: Use, layer: Layer, dims: set[int], weight: bool
    ) -> Layer | None:
        gone = set(layer.varying) & dims
        zero = layer.zero and use.rule.zero != "no"
        if not gone:
            return Layer(layer.ids, zero, layer.origin)
        rest = set(layer.varying) - dims
        if layer.zero and use.rule.additive and use.rule.keeps_dims:
            return layer
        if rest and _by_rows(rest, layer) and self._sums_rows(node, use, layer, weight):
            self._row_tie(node, layer, rest, None)
            return None
        if rest:  # whole runs along the reduced dims come and go with each channel of the rest
            ids = layer.ids
            for d in gone:
                ids = ids.narrow(d, 0, 1)
            self.ids.tie(node, layer.ids, ids)
            return Layer(ids, zero)
        if self._reduced_exactly(node, use, layer):
            return None
        if not (use.rule.additive and layer.zero):
            self.mixes(node, [layer.ids], "norms" if weight else "all")
        return layer if use.rule.keeps_dims else None

    def _sums_rows(self, node: fx.Node, use: Use, layer: Layer, weight: bool) -> bool:
        """Whether each row's result is exact over what is left of it, equally many of each.

        A result that keeps its dims is for the rows it is of; without them it is of channels of its
        own, one a row, and rows go whole.
        """
        kept = leaves(node.meta["val"], Tensor)[0].ndim == layer.ids.ndim
        if not (layer.zero and kept) or weight or len(layer.varying) != 2 or self.heads != "dims":
            return False
        if use.rule.averages and self.mixing != "all":
            self.result.averages.setdefault(node, []).append(layer.ids)
            return True
        return use.rule.additive

    def _reduced_exactly(self, node: fx.Node, use: Use, layer: Layer) -> bool:
        """Whether the result over what is left can be made that over all, zeros where it went."""
        operands = [n for n in node.all_input_nodes if isinstance(self.result.values[n], Value)]
        if self.mixing == "all" or use.rule.additive or use.rule.keeps_dims or len(operands) != 1:
            return False
        if not self.rewritable:
            return False
        value = self.opened(self.result.values[operands[0]])
        if use.rule.averages and layer.zero and not value.weight:
            self.result.averages.setdefault(node, []).append(layer.ids)
            return True
        if not can_be_wide(value, layer):
            return False
        wide = self.result.wide.setdefault(node, Wide())
        wide.operands.append((operands[0], layer.varying[0]))
        return True

    def _reduced_value(
        self, tensor: Any, shape: tuple[int, ...], layers: list[Layer], dims: set[int], weight: bool
    ):
        if not isinstance(tensor, Tensor):
            return tensor
        if tensor.ndim == len(shape):
            return self.made(tuple(tensor.shape), layers, weight)
        kept = [d for d in range(len(shape)) if d not in dims]
        moved = [
            Layer(la.ids.reshape([la.ids.shape[d] for d in kept]), la.zero, la.origin)
            for la in layers
        ]
        return self.made(tuple(tensor.shape), moved, weight)

    def do_reshape(self, node: fx.Node, use: Use) -> Value:
        value = self.first(node)
        shape = tuple(node.meta["val"].shape)
        layers = [self._reshaped(node, layer, value.shape, shape) for layer in value.layers]
        others = self.tensors(node)[1:]
        if others:  # the result takes another tensor's shape, so its channels are that one's
            for layer in layers:
                if len(layer.varying) > 1:
                    self.ids.freeze(
                        node, layer.ids, f"is laid out as another tensor at %{node.name}"
                    )
            layers = [layer for layer in layers if len(layer.varying) == 1]
            first = Value(shape, tuple(layers), weight=value.weight)
            layers, _ = self.meet(node, [first, *others], shape, use)
        return self.made(shape, layers, value.weight)

    def _reshaped(
        self, node: fx.Node, layer: Layer, old: tuple[int, ...], new: tuple[int, ...]
    ) -> Layer:
        ids = movement.reshape(layer.ids, old, new)
        before, after = len(layer.varying), len(Layer(ids).varying)
        if after > 1 and (layer.origin is None or after > before):
            self.ids.split(node, ids)
            return Layer(ids, layer.zero, ids.squeeze())
        if layer.origin is None or after >= before:
            return Layer(ids, layer.zero, layer.origin)
        if not in_order(layer.ids, layer.origin):
            self._shuffled(node, layer)
        return Layer(ids, layer.zero, layer.origin if after > 1 else None)

    def _shuffled(self, node: fx.Node, layer: Layer) -> None:
        """Channels leave in another order: gather them, or keep the same ones of each block."""
        gather = None
        if self.rewritable:
            gather = find_gather(node, self.result.values, lambda n, x, s: self.rerun(n, x, s))
        if gather is None:
            rows = layer.origin.reshape(-1, layer.origin.shape[-1])  # type: ignore[union-attr]
            self.ids.tie(node, rows, rows[:1])
            return
        self.result.gathers[node] = gather
        for inner in gather.inside:
            self.ids.splits.pop(inner, None)

    def first(self, node: fx.Node) -> Value:
        value = self.result.values.get(node.args[0]) if node.args else None
        if not isinstance(value, Value):
            value = next(v for v in self.inputs(node))
        return self.opened(value)

    def rerun(self, node: fx.Node, ids: Tensor, shape: Sequence[int]) -> list[Tensor] | None:
        """The ids a movement makes of `ids` on a value of `shape`."""
        outputs = [tuple(v.shape) for v in leaves(node.meta["val"], Tensor)]
        if self.result.rules.get(node, self.use(node)).rule.kind == "reshape":  # type: ignore[union-attr]
            return [movement.reshape(ids, shape, outputs[0])]
        return movement.move(ids, shape, lambda x: self.execute(node, x), outputs)

    def execute(self, node: fx.Node, ids: Tensor) -> Any:
        if node.op == "call_module":
            return self.modules[node.target](ids)
        args, kwargs = positions.standins(self.concrete((node.args[1:], dict(node.kwargs))))
        if node.op == "call_method":
            return getattr(ids, node.target)(*args, **kwargs)
        return node.target(ids, *args, **kwargs)

    def do_move(self, node: fx.Node, use: Use) -> Any:
        if node.args and not isinstance(self.result.values.get(node.args[0]), Value):
            return NotImplemented
        value = self.first(node)
        picked = self._picked_dims(node, use, len(value.shape))
        if picked is None:
            return self.freeze_all(node, "picks elements by computed positions")
        outputs = leaves(node.meta["val"], Tensor)
        per_output: list[list[Layer]] = [[] for _ in outputs]
        for layer in value.layers:
            if picked & set(layer.varying):
                self.ids.freeze(node, layer.ids, f"is picked by computed positions at %{node.name}")
                continue
            found = self.rerun(node, layer.ids, value.shape)
            if found is None:
                return self.freeze_all(node, "could not be run on channel ids")
            for i, ids in enumerate(found):
                if value.weight and _is_lookup(layer, ids):
                    why = f"is a place in a table that %{node.name} looks up"
                    self.ids.freeze(node, layer.ids, why)
                else:
                    per_output[i].append(self._moved(node, layer, ids))
        if use.rule.spreads:
            per_output[0] += self._spread(value.shape, tuple(outputs[0].shape))
        made = [
            self.made(tuple(t.shape), ls, value.weight)
            for t, ls in zip(outputs, per_output, strict=True)
        ]
        return made if isinstance(node.meta["val"], (tuple, list)) else made[0]

    def _picked_dims(self, node: fx.Node, use: Use, rank: int) -> set[int] | None:
        """Dims along which positions pick that the graph computes; None where that is not known."""
        bound = use.bound(node.args, node.kwargs)
        rest = {name: self.concrete(arg) for name, arg in bound.items() if arg is not node.args[0]}
        if not positions.is_computed(rest):
            return set()
        self._freeze_unnamed(node, {k: v for k, v in bound.items() if v is not node.args[0]})
        if isinstance(rest.get("dim"), int):
            return {rest["dim"] % rank}
        return positions.picked_dims(rest["index"], rank) if "index" in rest else None

    def _spread(self, old: tuple[int, ...], new: tuple[int, ...]) -> list[Layer]:
        """Channels along dims in which one element became many: they go as what they meet does."""
        shift, layers = len(new) - len(old), []
        for d, size in enumerate(new):
            if size > 1 and (d < shift or old[d - shift] == 1):
                dims = [size if i == d else 1 for i in range(len(new))]
                layers.append(Layer(self.ids.fresh(size).view(dims), False))
        return layers

    def _apart(self, node: fx.Node, value: Value, why: str) -> list[tuple[Layer, Tensor]]:
        """Layers that do not vary along dims in which an index is computed, with the ids picked of
        them; the others are frozen."""
        index = self.concrete(node.args[1])
        found = [(layer, positions.picked(layer.ids, index)) for layer in value.layers]
        if found and all(ids is None for _, ids in found):
            self.result.unknown[node] = why
        for layer, ids in found:
            if ids is None:
                self.ids.freeze(node, layer.ids, f"reaches {self.title(node)}, which {why}")
        return [(layer, ids) for layer, ids in found if ids is not None]

    def _any_layers(self, args: Any) -> bool:
        """Whether any value in these arguments has channels."""
        return any(self.opened(v).layers for v in leaves(self.of(args), Value))

    def _moved(self, node: fx.Node, layer: Layer, ids: Tensor) -> Layer:
        moved = Layer(ids, layer.zero, layer.origin)
        if not moved.varying:
            self.ids.freeze(node, ids, f"is picked alone by %{node.name}")
        elif ids.numel() < layer.ids.numel():
            if len(moved.varying) == 1:
                self.ids.pieces.append(ids.reshape(-1))
            else:
                self.ids.split(node, ids)
        if (
            len(moved.varying) > 1
            and layer.origin is None
            and len(moved.varying) > len(layer.varying)
        ):
            self.ids.split(node, ids)
            moved = Layer(ids, layer.zero, ids.squeeze())
        return moved

    def do_assign(self, node: fx.Node, use: Use) -> None:
        """``target[index] = given``: channels meet where whole ones are assigned to."""
        target = self.opened(self.result.values[node.args[0]])
        given = self.result.values.get(node.args[2])
        index = self.concrete(node.args[1])
        if _by_elements(index, target):
            return self._assign_computed(node, use, target)
        index = positions.standins(index)
        source = self.opened(given) if isinstance(given, Value) else Value(())
        met = [part for la in target.layers if (part := self._assigned(node, la, target, index))]
        shape = tuple(torch.empty(target.shape, device="meta")[index].shape)
        self.meet(node, [Value(shape, tuple(met)), source], shape, use)
        changed = tuple(Layer(la.ids, False, la.origin) for la in target.layers)
        self.result.values[node.args[0]] = Value(target.shape, changed, weight=target.weight)

    def _assigned(self, node: fx.Node, layer: Layer, target: Value, index: Any) -> Layer | None:
        """The channels of a layer that are assigned to: all of them, or some that lie along one
        dim, each once. Others are frozen."""
        part = layer.ids.expand(target.shape)[index]
        ids = compress(part, range(part.ndim))
        found = torch.unique(part)
        if len(layer.varying) == 1 and ids.numel() == len(found) > 1:
            if len(found) < layer.ids.numel():
                self.ids.pieces.append(found)
            return Layer(ids, layer.zero)
        some = layer.ids if len(layer.varying) > 1 else found
        self.ids.freeze(node, some, f"is assigned to in part at %{node.name}")
        return None

    def _assign_computed(self, node: fx.Node, use: Use, target: Value) -> None:
        index = self.result.values.get(node.args[1]) if isinstance(node.args[1], fx.Node) else None
        whole = isinstance(index, Value) and index.shape == target.shape
        if whole or self._any_layers(node.args[1]):
            self._assign_where(node, use, target)
        else:
            self._assign_rows(node, use, target)

    def _assign_rows(self, node: fx.Node, use: Use, target: Value) -> None:
        """``target[index] = given`` by computed positions: channels along other dims meet."""
        met, rest = [], []
        for layer, ids in self._apart(node, target, "assigns to single elements"):
            if ids.numel() < layer.ids.numel():
                self.ids.freeze(node, layer.ids, f"is assigned to in part at %{node.name}")
            else:
                met.append(Layer(ids, layer.zero))
                rest.append(Layer(layer.ids, False, layer.origin))
        given = self.result.values.get(node.args[2])
        source = self.opened(given) if isinstance(given, Value) else Value(())
        shape = np.broadcast_shapes(source.shape, *(tuple(m.ids.shape) for m in met))
        self.meet(node, [Value(shape, tuple(met)), source], shape, use)
        self.result.values[node.args[0]] = Value(target.shape, tuple(rest), weight=target.weight)

    def _assign_where(self, node: fx.Node, use: Use, target: Value) -> None:
        """``target[mask] = number`` by a computed mask, which shares the channels of what it cuts.

        Anything else that picks single elements freezes what it meets.
        """
        index, number = node.args[1:3]
        mask = self.result.values.get(index) if isinstance(index, fx.Node) else None
        plain = isinstance(number, (int, float))
        if plain and isinstance(mask, Value) and _is_mask_of(mask, index.meta["val"].dtype, target):
            self.meet(node, [target, self.opened(mask)], target.shape, use)
        else:
            self.freeze_all(node, "assigns to single elements")
        zero = plain and number == 0
        layers = tuple(Layer(la.ids, la.zero and zero, la.origin) for la in target.layers)
        self.result.values[node.args[0]] = Value(target.shape, layers, weight=target.weight)

    def do_cat(self, node: fx.Node, use: Use) -> Any:
        bound = use.bound(node.args, node.kwargs)
        tensors = bound["tensors"]
        if isinstance(tensors, fx.Node):
            tensors = self.result.values[tensors]
        shape = tuple(node.meta["val"].shape)
        dim = self.concrete(bound.get("dim", 0)) % len(shape)
        values = [
            self.opened(v if isinstance(v, Value) else self.result.values[v]) for v in tensors
        ]
        rank = len(shape) - use.rule.new_dim
        for value in values:
            if len(value.shape) != rank:
                for layer in value.layers:
                    self.ids.freeze(node, layer.ids, f"is joined at %{node.name} with another rank")
        values = [v for v in values if len(v.shape) == rank]
        if not values:
            return Value(shape)
        if use.rule.new_dim:
            values = [_unsqueezed(v, dim) for v in values]
            rows = [_as_row(v, dim) for v in values]
            if all(rows) and len({row.varying for row in rows if row}) == 1:
                return self._stacked(node, shape, dim, rows, all(v.weight for v in values))
        layers = [*self._across(node, values, dim), *self._joined(node, values, dim)]
        return self.made(shape, layers, all(v.weight for v in values))

    def _stacked(
        self, node: fx.Node, shape: tuple[int, ...], dim: int, rows: list[Any], weight: bool
    ) -> Value:
        """Pieces side by side, each a row of channels of its own."""
        ids = movement.join([row.ids for row in rows], [1] * len(rows), dim)
        if len(rows) > 1:
            self.ids.split(node, ids)
        zero = all(row.zero for row in rows)
        return self.made(shape, [Layer(ids, zero, ids.squeeze())], weight)

    def _across(self, node: fx.Node, values: list[Value], dim: int) -> list[Layer]:
        """Layers that do not vary along the joined dim: the pieces share those channels."""
        flat = [[layer for layer in v.layers if dim not in layer.varying] for v in values]
        real = [_real(v, len(v.shape)) - {dim} for v in values]
        merged = self._tied(node, flat, real)
        return [
            Layer(la.ids, all(any(o.zero for o in ls) for ls in flat), la.origin) for la in merged
        ]

    def _joined(self, node: fx.Node, values: list[Value], dim: int) -> list[Layer]:
        along = [[layer for layer in v.layers if dim in layer.varying] for v in values]
        for layers in along:
            for extra in layers[1:]:
                self.ids.freeze(node, extra.ids, f"is one of several layers joined at %{node.name}")
        pieces = [layers[0] if layers else None for layers in along]
        present = [p for p in pieces if p is not None]
        if not present:
            return []
        ids = movement.join(
            [p.ids if p else None for p in pieces], [v.shape[dim] for v in values], dim
        )
        origin = ids.squeeze() if any(len(p.varying) > 1 for p in present) else None
        return [Layer(ids, all(p.zero for p in present), origin)]

    def do_pad(self, node: fx.Node, use: Use) -> Any:
        bound = use.bound(node.args, node.kwargs)
        value, pads = self.first(node), list(self.concrete(bound["pad"]))
        constant = bound.get("mode", "constant") == "constant"
        clean = not constant or not bound.get("value")
        layers = []
        for layer in value.layers:
            last = len(value.shape) - 1
            touched = {last - i // 2 for i, amount in enumerate(pads) if amount}
            if not touched & set(layer.varying):
                layers.append(Layer(layer.ids, layer.zero and clean, layer.origin))
            elif constant and len(layer.varying) == 1:
                layers.append(Layer(self._padded(layer, pads), layer.zero and clean))
            else:
                self.ids.freeze(node, layer.ids, f"is padded with copies at %{node.name}")
        return self.made(tuple(node.meta["val"].shape), layers, value.weight)

    def _padded(self, layer: Layer, pads: list[int]) -> Tensor:
        """Channels of padding are new ones: they may go when what they meet goes."""
        dim, rank = layer.varying[0], layer.ids.ndim
        at = 2 * (rank - 1 - dim)
        only = [0] * at + pads[at : at + 2]
        ids = torch.nn.functional.pad(layer.ids, only, value=-1)
        empty = ids < 0  # 0 stands for elements without a channel, which there may be
        ids[empty] = self.ids.fresh(int(empty.sum()))
        return ids


getitem, setitem = operator.getitem, operator.setitem


def _by_elements(index: Any, target: Value) -> bool:
    """Whether an index is computed, or a mask over several dims with channels along one of them."""
    tensors = leaves(index, Tensor)
    picked = positions.picked_dims(index, len(target.shape))
    computed = positions.is_computed(index)
    if computed or picked is None or any(picked & set(la.varying) for la in target.layers):
        return True
    tensors = leaves(index, Tensor)
    flags = (torch.bool, torch.uint8)
    masked = max((t.ndim for t in tensors if t.dtype in flags), default=0)
    # before other parts of an index it is not clear where the mask lies
    end = masked if isinstance(index, Tensor) else len(target.shape)
    return masked > 1 and any(min(la.varying, default=0) < end for la in target.layers)


def _is_lookup(layer: Layer, ids: Tensor) -> bool:
    """Whether places along one dim are picked, some more often than others, as a table of positions
    is by the distance of each pair. Nothing later can lose such a place as a whole."""
    if len(layer.varying) != 1 or ids.numel() <= layer.ids.numel():
        return False
    _, counts = torch.unique(ids, return_counts=True)
    return bool((counts != counts[0]).any())


def _is_mask_of(mask: Value, dtype: torch.dtype, target: Value) -> bool:
    """Whether a mask has one flag for each element of `target`, and no channels of its own."""
    known = {layer.varying for layer in target.layers}
    alike = dtype == torch.bool and mask.shape == target.shape
    return alike and all(layer.varying in known for layer in mask.layers)


def node_tensor(value: Value) -> Tensor:
    return torch.empty(value.shape, device="meta")


def _real(value: Value, rank: int) -> set[int]:
    """The dims of a broadcast to `rank` dims along which a value has more than one element."""
    shift = rank - len(value.shape)
    return {d + shift for d, size in enumerate(value.shape) if size > 1}


def _by_rows(dims: set[int], wide: Layer) -> bool:
    """Whether `dims` are some of the layer's, and not the one along which channels go."""
    return dims < set(wide.varying) and wide.varying[-1] not in dims


def _crossed(a: Layer, b: Layer) -> bool:
    """Whether two layers share rows, and each has columns along dims of its own."""
    shared = set(a.varying) & set(b.varying)
    return _by_rows(shared, a) and _by_rows(shared, b)


def _map_nodes(arg: Any, fn: Callable[[fx.Node], Any]) -> Any:
    return fx.node.map_aggregate(arg, lambda a: fn(a) if isinstance(a, fx.Node) else a)


def _first_zero(values: Any) -> Any:
    """Of several outputs only the first is known to be zero where masked: others are indices."""
    if not isinstance(values, (tuple, list)):
        return values
    return [*values[:1], *(mapped(_not_zero, v) for v in values[1:])]


def _not_zero(value: Any) -> Any:
    if not isinstance(value, Value):
        return value
    return replace(value, layers=tuple(Layer(la.ids, False, la.origin) for la in value.layers))


def _plain(value: Any) -> Any:
    return Value(tuple(value.shape)) if isinstance(value, Tensor) else value


def _broadcasts(small: Sequence[int], shape: Sequence[int]) -> bool:
    return len(small) == len(shape) and all(a in (1, b) for a, b in zip(small, shape, strict=True))


def _lift(layer: Layer, rank: int) -> Layer:
    ids = layer.ids
    return Layer(ids.reshape([1] * (rank - ids.ndim) + list(ids.shape)), layer.zero, layer.origin)


def _joint_shape(values: list[Value]) -> tuple[int, ...]:
    return np.broadcast_shapes(*(v.shape for v in values))


def _as_row(value: Value, dim: int) -> Layer | None:
    """The one layer of a piece that is stacked before its channels, which makes it a row."""
    if len(value.layers) != 1 or len(value.layers[0].varying) != 1:
        return None
    return value.layers[0] if dim < value.layers[0].varying[0] else None


def _unsqueezed(value: Value, dim: int) -> Value:
    shape = (*value.shape[:dim], 1, *value.shape[dim:])
    layers = tuple(Layer(la.ids.unsqueeze(dim), la.zero, la.origin) for la in value.layers)
    return Value(shape, layers, weight=value.weight)
