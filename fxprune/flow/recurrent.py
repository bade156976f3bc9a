"""How ids pass recurrent layers: a unit goes with its rows in every gate, at every time step.

Layers and directions of one module have a common width, so each keeps equally many units. A masked
unit is zero at every step if it starts as zero: no other unit reads it, and nothing is added to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn

from ..ids import Ids, Layer, Role, Value
from ..letters import DimsUse, Named
from ..pattern import Binding
from ..rules import Rule, Use
from ..trees import leaves, mapped
from .run import Run


def recurrent(run: Run, node: fx.Node, use: Use) -> Any:
    """A module's outputs: ids of its hidden units, which are as many at each step."""
    own = weights(run.modules[node.target])
    bound = use.bound(node.args, node.kwargs)
    source = run.of(bound.get("input"))
    if not own.all_own() or not isinstance(source, Value):
        return run.freeze_all(node, "has computed weights, or steps of several lengths")
    call = Recurrence(run.ids, node, own, lambda name: _own(run, node, name))
    hidden, given = call.units()
    read = call.reads(run.opened(source))
    states = [run.opened(v) for v in leaves(run.of(bound.get("hx")), Value)]
    zero = [call.starts(u, s) for u, s in zip((given, hidden), states, strict=False)]
    run.result.uses[node] = call.used(use.rule, read, hidden, given)
    tensors = leaves(node.meta["val"], Tensor)
    made = results(own, tensors, hidden, given, all(zero))
    return mapped(lambda _: next(made), node.meta["val"])


def _own(run: Run, node: fx.Node, name: str) -> str:
    """The full name of a module's parameter."""
    return run.aliases.get(f"{node.target}.{name}", f"{node.target}.{name}")


@dataclass(frozen=True)
class Weights:
    """The weights of a recurrent module: a tail of names for each layer and direction."""

    module: nn.Module
    tails: tuple[str, ...]
    directions: int

    @property
    def hidden(self) -> int:
        return int(self.module.hidden_size)  # type: ignore[arg-type]

    @property
    def projected(self) -> int:
        """The width of what is given out; 0 where it is the hidden one."""
        return int(getattr(self.module, "proj_size", 0))

    def own(self, kind: str, tail: str) -> Tensor | None:
        return self.module._parameters.get(f"{kind}{tail}")

    def all_own(self) -> bool:
        """Whether each weight is a parameter, none computed from others."""
        kinds = ("weight_ih", "weight_hh", *(["weight_hr"] if self.projected else []))
        return all(self.own(kind, tail) is not None for kind in kinds for tail in self.tails)


def weights(module: nn.Module) -> Weights:
    """The weights of an `RNNBase` or of a cell, which is one layer in one direction."""
    if not isinstance(module, nn.RNNBase):
        return Weights(module, ("",), 1)
    ways = ("", "_reverse") if module.bidirectional else ("",)
    tails = tuple(f"_l{layer}{way}" for layer in range(module.num_layers) for way in ways)
    return Weights(module, tails, len(ways))


@dataclass
class Recurrence:
    """One call of a recurrent module. ``name`` gives the full name of a parameter of it."""

    ids: Ids
    node: fx.Node
    weights: Weights
    name: Callable[[str], str]

    def units(self) -> tuple[Tensor, Tensor]:
        """Ids of the hidden units, and of those given out, over (layers x directions, units)."""
        found = [self._known(f"weight_hh{tail}", 1) for tail in self.weights.tails]
        if found[0] is not None:
            given = torch.stack([ids for ids in found if ids is not None])
            rows = [self._known(f"weight_hh{tail}", 0) for tail in self.weights.tails]
            hidden = torch.stack([r[: self.weights.hidden] for r in rows if r is not None])
            return hidden, given
        hidden = self._fresh(self.weights.hidden)
        given = self._fresh(self.weights.projected) if self.weights.projected else hidden
        for at, tail in enumerate(self.weights.tails):
            self._bind(tail, hidden[at], given[at])
            before = at - at % self.weights.directions - self.weights.directions
            if before >= 0:
                below = given[before : before + self.weights.directions]
                self._slot(f"weight_ih{tail}", 1, below.reshape(-1), "in")
        return hidden, given

    def _fresh(self, size: int) -> Tensor:
        ids = self.ids.fresh(len(self.weights.tails), size)
        if len(ids) > 1:
            self.ids.split(self.node, ids)
        return ids

    def _bind(self, tail: str, hidden: Tensor, given: Tensor) -> None:
        weight = self.weights.own("weight_ih", tail)
        assert weight is not None
        gates = hidden.repeat(weight.shape[0] // len(hidden))
        for kind in ("weight_ih", "weight_hh", "bias_ih", "bias_hh"):
            self._slot(f"{kind}{tail}", 0, gates, "out")
        self._slot(f"weight_hh{tail}", 1, given, "in")
        self._slot(f"weight_hr{tail}", 0, given, "out")
        self._slot(f"weight_hr{tail}", 1, hidden, "in")

    def _slot(self, name: str, dim: int, ids: Tensor, role: Role) -> None:
        if self.weights.own(name, "") is not None:
            self.ids.slot(self.name(name), dim, ids, role, self.node)

    def _known(self, name: str, dim: int) -> Tensor | None:
        slots = self.ids.slots.get(self.name(name), ())
        return next((slot.ids for slot in slots if slot.dim == dim), None)

    def reads(self, value: Value) -> list[Named]:
        """Tie the input's channels to the first layer's columns; those along time steps stay."""
        known = self._known("weight_ih" + self.weights.tails[0], 1)
        last = len(value.shape) - 1
        found = []
        for layer in value.layers:
            if layer.varying == (last,):
                found.append(Named(("i",), layer.ids.reshape(-1)))
            else:
                self.ids.freeze(self.node, layer.ids, "lies along time steps of a recurrent layer")
        if known is not None and not found:
            self.ids.freeze(self.node, known, "meets an input without channels")
        for named in found:
            self._read(named.ids, known)
        return found

    def _read(self, ids: Tensor, known: Tensor | None) -> None:
        if known is not None:
            self.ids.tie(self.node, ids, known)
            return
        for tail in self.weights.tails[: self.weights.directions]:
            self._slot(f"weight_ih{tail}", 1, ids, "in")

    def starts(self, units: Tensor, state: Value) -> bool:
        """Tie a state that is given to the units it starts; say whether masked ones are zero."""
        last = len(state.shape) - 1
        fitting = []
        for layer in state.layers:
            if layer.varying in ((last,), (0, last)):
                fitting.append(layer)
            else:
                self.ids.freeze(self.node, layer.ids, "lies along layers of a recurrent state")
        if not fitting:
            self.ids.freeze(self.node, units, "starts from a state without channels")
        for layer in fitting:
            self.ids.tie(self.node, layer.ids.reshape(-1, units.shape[-1]), units)
        return any(layer.zero for layer in fitting)

    def used(self, rule: Rule, read: Sequence[Named], hidden: Tensor, given: Tensor) -> DimsUse:
        """The sizes of the module's attributes, for the rewriter."""
        module = self.weights.module
        sizes = {"h": self.weights.hidden, "p": self.weights.projected, "i": int(module.input_size)}  # type: ignore[arg-type]
        over = [*read, Named(("h",), hidden[0])]
        if self.weights.projected:
            over.append(Named(("p",), given[0]))
        return DimsUse(rule, Binding(sizes, (), ()), over)


def results(
    weights: Weights, tensors: Sequence[Tensor], hidden: Tensor, given: Tensor, zero: bool
) -> Iterator[Value]:
    """What the module gives, in order: all steps of the last layer, then the states at the end."""
    states = [given, hidden]
    if isinstance(weights.module, nn.RNNBase):
        states.insert(0, given[-weights.directions :].reshape(1, -1))
    for tensor, units in zip(tensors, states, strict=False):
        dims = [1] * tensor.ndim
        dims[-1] = units.shape[-1]
        if len(units) > 1:
            dims[0] = len(units)
        spread = units if len(units) > 1 else None
        shape = tuple(tensor.shape)
        yield Value(shape, (Layer(units.reshape(dims), zero, spread),) if max(dims) > 1 else ())
