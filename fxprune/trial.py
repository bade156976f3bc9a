"""One call of an op with channel ids on its operands: what flow says of it, and what runs say."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .flow import Flow, Mixing, Walk
from .groups import Groups, groups
from .ids import Layer, Slot, Value
from .letters import Dims
from .reference import mask
from .rules import Rules
from .samples import Call, leaves, seed_torch
from .trace import trace
from .widths import Widths


class Caller(nn.Module):
    """A network of one call: some operands are its inputs, the others its parameters."""

    def __init__(self, call: Call, tensors: Sequence[Tensor], params: Iterable[int]):
        super().__init__()
        self.call = call
        if call.module is not None:
            self.op = call.module
        self.given = [i for i in range(len(tensors)) if i not in set(params)]
        self.count = len(tensors)
        for i in params:
            self.register_parameter(f"x{i}", nn.Parameter(tensors[i].clone(), requires_grad=False))

    def forward(self, *inputs):
        found = dict(zip(self.given, inputs, strict=True))
        return self.call(
            [found[i] if i in found else getattr(self, f"x{i}") for i in range(self.count)]
        )


# -- flow on a sample ----------------------------------------------------------------------------


class Seeded(Walk):
    """Flow with ids on the network's inputs, and outputs that may shrink."""

    def __init__(self, result: Flow, rules: Rules, mixing: Mixing, seeds: dict[str, bool | None]):
        super().__init__(result, rules, mixing)
        self.seeds = iter(seeds.items())

    def value(self, node: fx.Node) -> Any:
        if node.op == "output":
            return None
        return self.seeded(node) if node.op == "placeholder" else super().value(node)

    def seeded(self, node: fx.Node) -> Value:
        name, zero = next(self.seeds)
        shape = tuple(node.meta["val"].shape)
        layers = []
        for d, size in enumerate(shape):
            if size > 1 and zero is not None:
                self.ids.slot(name, d, self.ids.fresh(size), "out", node)
                dims = [1] * len(shape)
                dims[d] = size
                layers.append(Layer(self.ids.slots[name][-1].ids.view(dims), zero))
        return Value(shape, tuple(layers))


@dataclass(frozen=True, eq=False)
class Part:
    """Slice `index` along a dim of an operand, the elements it is, and its channel (0: none)."""

    name: str
    dim: int
    index: int
    where: Tensor
    channel: int

    def __str__(self) -> str:
        return f"{self.name}[{', '.join([':'] * self.dim + [str(self.index)])}]"


@dataclass
class Trial:
    """One sample, traced and flowed through in one assignment of roles.

    `zeros`: for each input, whether its masked channels hold zeros; None for one without channels.
    """

    call: Call
    caller: Caller
    flow: Flow
    zeros: dict[str, bool | None]
    tensors: dict[str, Tensor]
    outputs: list[Value]

    @cached_property
    def groups(self) -> Groups:
        return groups(self.flow)

    @cached_property
    def told(self) -> list[int]:
        """The outputs that the rule speaks of: a letters rule says nothing of saved statistics,
        which have another rank than the first output."""
        told = self.outputs[0].shape if self.outputs else ()
        letters = bool(self.flow.uses)
        return [i for i, v in enumerate(self.outputs) if not letters or len(v.shape) == len(told)]

    @property
    def values(self) -> list[Value]:
        """What flow says of those outputs."""
        return [self.outputs[i] for i in self.told]

    @property
    def source(self) -> fx.Node:
        """The first node, where one is asked for."""
        return next(iter(self.flow.graph.graph.nodes))

    def run(self, tensors: dict[str, Tensor], seed: int = 0) -> list[Tensor]:
        """The original's outputs for these inputs and parameters."""
        inputs = [tensors[f"x{i}"].clone() for i in self.caller.given]
        own = dict(self.caller.named_parameters()) | dict(self.caller.named_buffers())
        state = {name: tensors[name].clone() for name in own}
        seed_torch(seed)
        found = leaves(functional_call(self.caller, state, tuple(inputs)))
        return [found[i] for i in self.told]

    def masked(self, widths: Widths) -> dict[str, Tensor]:
        """Operands with what goes set to zero, but for inputs which masking does not make zero."""
        found = {}
        for name, tensor in self.tensors.items():
            kept = widths.kept_of(name) if self.zeros.get(name, True) else {}
            found[name] = mask(tensor, kept) if kept else tensor
        return found

    def parts(self) -> Iterator[Part]:
        """Every slice of every operand that has a channel."""
        for name in [n for n in self.flow.ids.slots if n in self.tensors]:
            for slot in self.flow.ids.slots[name]:
                channels = self.groups.channel[slot.ids.reshape(-1).numpy()]
                for k, channel in enumerate(channels.tolist()):
                    where = slot_mask(self.tensors[name], slot, k)
                    yield Part(name, slot.dim, k, where, channel)


def make_trial(
    call: Call, rules: Rules, params: Sequence[int], zeros: Sequence[bool | None], mixing: Mixing
) -> Trial:
    tensors = call.values(0)
    caller = Caller(call, tensors, params).eval()
    inputs = tuple(tensors[i].clone() for i in caller.given)
    graph = trace(caller, inputs, rules=rules)
    flow = Flow(graph)
    seeds = {f"x{i}": zero for i, zero in zip(caller.given, zeros, strict=True)}
    run = Seeded(flow, rules, mixing, seeds)
    for node in graph.graph.nodes:
        flow.values[node] = run.value(node)
    output = next(n for n in graph.graph.nodes if n.op == "output")
    named = {f"x{i}": tensors[i] for i in caller.given}
    named |= {name: p.detach() for name, p in caller.named_parameters()}
    named |= dict(caller.named_buffers())
    values = pytree.tree_leaves(
        fx.node.map_aggregate(
            output.args[0], lambda a: flow.values[a] if isinstance(a, fx.Node) else a
        ),
        is_leaf=lambda v: isinstance(v, Value),
    )
    opened = [run.opened(v) for v in values if isinstance(v, Value)]
    return Trial(call, caller, flow, seeds, named, opened)


# -- what runs say ---------------------------------------------------------------------------------


def unread(trial: Trial, outputs: list[Tensor]) -> set[str]:
    """Operands whose values change nothing (only their shape is read)."""
    dead = set()
    for name, tensor in trial.tensors.items():
        whole = torch.ones(tensor.shape, dtype=torch.bool)
        if not any(bool(c.any()) for c in differences(trial, outputs, name, whole)):
            dead.add(name)
    return dead


def others(trial: Trial, name: str, seed: int) -> Tensor:
    """Other values for an operand, drawn as the sample's were; a parameter's are positive."""
    if name in trial.zeros or (name[0] == "x" and name[1:].isdigit()):
        return trial.call.values(seed)[int(name[1:])]
    old = trial.tensors[name]
    if not old.is_floating_point():
        return old
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(old.shape, generator=generator, dtype=torch.float64) + 0.1


def differences(trial: Trial, outputs: list[Tensor], name: str, where: Tensor) -> list[Tensor]:
    """Which output elements ever change when an operand is changed at `where`."""
    changed = [torch.zeros(t.shape, dtype=torch.bool) for t in outputs]
    for seed in range(10, 16):
        tensors, before = trial.tensors, outputs
        if seed > 11:  # nothing saw it so far: try with other operands beside it
            if any(bool(c.any()) for c in changed):
                break
            tensors = {n: others(trial, n, seed + 10) for n in trial.tensors}
            before = trial.run(tensors)
        tensor = torch.where(where, others(trial, name, seed), tensors[name])
        found = trial.run({**tensors, name: tensor})
        for k, (a, b) in enumerate(zip(before, found, strict=True)):
            changed[k] |= differs(a, b)
    return changed


def differs(a: Tensor, b: Tensor) -> Tensor:
    if a.is_complex():
        return differs(as_real(a), as_real(b)).any(-1)
    if not a.is_floating_point() or not b.is_floating_point():
        return a != b
    gap = (a - b).abs() > 1e-12 * (1 + a.abs())
    return gap | (torch.isnan(a) != torch.isnan(b)) | (torch.isinf(a) != torch.isinf(b))


def slot_mask(tensor: Tensor, slot: Slot, k: int) -> Tensor:
    """The elements of a parameter that are index `k` of a slot, counted over its blocks."""
    where = torch.zeros(tensor.shape, dtype=torch.bool)
    if slot.ids.ndim == 1:
        where.select(slot.dim, k).fill_(True)
        return where
    blocks, width = slot.ids.shape
    rows = tensor.shape[0] // blocks
    block, at = divmod(k, width)
    where.narrow(0, block * rows, rows).select(slot.dim, at).fill_(True)
    return where


def slices_meet(trial: Trial, outputs: list[Tensor], a: Part, b: Part) -> bool:
    """Whether what slice `a` does to the output depends on slice `b`."""
    return any(_meet_once(trial, outputs, a, b, seed) for seed in (21, 22, 23))


def _meet_once(trial: Trial, outputs: list[Tensor], a: Part, b: Part, seed: int) -> bool:
    def moved(tensors: dict[str, Tensor], part: Part, seed: int) -> dict[str, Tensor]:
        new = others(trial, part.name, seed)
        return {**tensors, part.name: torch.where(part.where, new, tensors[part.name])}

    one, other = moved(trial.tensors, a, seed), moved(trial.tensors, b, seed + 10)
    runs = [trial.run(tensors) for tensors in (one, other, moved(one, b, seed + 10))]
    for base, x, y, xy in zip(outputs, *runs, strict=True):
        wide = torch.complex128 if xy.is_complex() else torch.float64
        mixed = (xy.to(wide) - x.to(wide)) - (y.to(wide) - base.to(wide))
        if bool((mixed.abs() > 1e-9).any()):
            return True
    return False


def carriers(value: Value, channel: np.ndarray, one: int) -> Tensor:
    """The elements of a value that belong to a channel."""
    found = torch.zeros(value.shape, dtype=torch.bool)
    for layer in value.layers:
        found |= torch.from_numpy(channel[layer.ids.numpy()] == one)
    return found


def compared(
    trial: Trial, widths: Widths, value: Value, whole: Tensor, part: Tensor, values: bool
) -> str:
    shape = widths.shape(trial.source, value)
    if tuple(part.shape) != shape:
        return f"it gives {list(part.shape)}, the rule says {list(shape)}"
    if not values:
        return ""
    stays = torch.ones(value.shape, dtype=torch.bool)
    for layer in value.layers:
        stays &= widths.kept[layer.ids]
    if not equal(whole[stays].reshape(shape), part):
        return "it differs from the masked op"
    for layer in value.layers:
        gone = ~widths.kept[layer.ids].expand(value.shape)
        left = whole[gone]
        if layer.zero and bool(((left != 0) & (left == left)).any()):  # 0 / 0 cannot be helped
            return "masked channels are said to stay zero, and do not"
    return ""


def letter_mask(
    dims: Dims, sizes: Mapping[str, int], letter: str, k: int, shape: Sequence[int]
) -> Tensor:
    """The elements of a tensor with dims `dims` at index `k` of a letter."""
    flat = [name for names in dims for name in (names or ("",))]
    where = torch.zeros([sizes[name] if name else 1 for name in flat], dtype=torch.bool)
    where.select(flat.index(letter), k).fill_(True)
    return where.reshape(tuple(shape))


def equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if a.is_complex() and b.is_complex():
        a, b = as_real(a), as_real(b)
    if not a.is_floating_point():
        return bool((a == b).all())
    return torch.allclose(a.double(), b.double(), rtol=1e-7, atol=1e-9, equal_nan=True)


def as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj())
