"""Probing rules: each is compared with what its ops do when they are run.

A sample is called with channel ids on every operand, as flow would meet it. What flow then says
is checked by running the op in float64: changing a slice may change only what carries its channel,
and must change something there; slices that are tied must meet; dropping channels must give what
is left of the masked result; what is said to stay zero must be zero. `probe_all` probes all rules.
"""

from __future__ import annotations

import contextlib
import io
import math
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from . import rules as rule_files
from .errors import FxpruneError
from .flow import Flow, Mixing, _Run
from .groups import Groups, groups
from .ids import Layer, Slot, Value
from .reference import mask
from .rewrite import rewrite
from .rules import Rule, Rules, Sample, Use
from .samples import (
    Call,
    is_discrete,
    is_missing,
    leaves,
    made_call,
    needs_device,
    resolve,
    seed,
    spellings,
    word_spellings,
)
from .select import Options, select
from .trace import trace
from .widths import RewriteError, Widths, gather


@dataclass(frozen=True)
class Finding:
    """One thing a rule gets wrong: the rule, its file and line, the call that shows it."""

    rule: str
    where: str
    sample: str
    message: str

    def __str__(self) -> str:
        call = f" {self.sample}:" if self.sample else ""
        return f"{self.where} rule `{self.rule}`:{call} {self.message}"


def probe_all(rules: Rules | None = None) -> list[Finding]:
    """What is wrong with the rules in force (or those given), by running all their ops."""
    rules = rules or rule_files.current()
    return [finding for rule in rules.rules for finding in probe(rule, rules)]


def probe(rule: Rule, rules: Rules | None = None) -> list[Finding]:
    """What is wrong with one rule. It is tried on top of `rules`, or of the rules in force.

    Every spelling of the op is run: those that compute the same as one probed are not probed again.
    """
    merged = (rules or rule_files.current()).copy()
    merged.add(rule)
    prober = _Prober(rule, merged)
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]), torch.no_grad():
        warnings.simplefilter("ignore")
        prober.run()
    return list(dict.fromkeys(prober.findings))


class _Caller(nn.Module):
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


class _Seeded(_Run):
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


@dataclass
class _Trial:
    """One sample, traced and flowed through in one assignment of roles.

    `zeros`: for each input, whether its masked channels hold zeros; None for one without channels.
    """

    call: Call
    caller: _Caller
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
        seed(seed)
        found = leaves(functional_call(self.caller, state, tuple(inputs)))
        return [found[i] for i in self.told]

    def masked(self, widths: Widths) -> dict[str, Tensor]:
        """Operands with what goes set to zero, but for inputs which masking does not make zero."""
        found = {}
        for name, tensor in self.tensors.items():
            kept = widths.kept_of(name) if self.zeros.get(name, True) else {}
            found[name] = mask(tensor, kept) if kept else tensor
        return found

    def slots(self) -> Iterator[tuple[str, Slot]]:
        for name, slots in self.flow.ids.slots.items():
            for slot in slots:
                if name in self.tensors:
                    yield name, slot


def _trial(
    call: Call, rules: Rules, params: Sequence[int], zeros: Sequence[bool | None], mixing: Mixing
) -> _Trial:
    tensors = call.values(0)
    caller = _Caller(call, tensors, params).eval()
    inputs = tuple(tensors[i].clone() for i in caller.given)
    graph = trace(caller, inputs, rules=rules)
    flow = Flow(graph)
    seeds = {f"x{i}": zero for i, zero in zip(caller.given, zeros, strict=True)}
    run = _Seeded(flow, rules, mixing, seeds)
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
    return _Trial(call, caller, flow, seeds, named, opened)


# -- the probe -----------------------------------------------------------------------------------


@dataclass
class _Prober:
    rule: Rule
    rules: Rules
    findings: list[Finding] = field(default_factory=list)
    mixing_seen: bool = False
    results: dict[str, list[list[Tensor]]] = field(default_factory=dict)
    probed: int = 0
    values: bool = True
    call: Call | None = None

    def report(self, message: str, sample: str | None = None) -> None:
        shown = sample if sample is not None else self.call.title if self.call else ""
        self.findings.append(Finding(self.rule.name, self.rule.where, shown, message))

    def run(self) -> None:
        self.check_names()
        covered: set[str] = set()
        for sample in self.rule.samples:
            call = self.built(sample)
            if call is not None:
                covered.add(call.name)
                self.deep(call)
                self.guarded(self.known_result, call)
        self.other_spellings(covered)
        self.call = None
        if self.probed and not self.findings and self.rule.mixes and not self.mixing_seen:
            self.report(f"is said to mix along `{' '.join(self.rule.mixes)}`, but no sample does")

    def built(self, sample: Sample) -> Call | None:
        try:
            call = made_call(sample.call, sample)
        except Exception as error:
            self.report(f"cannot be built: {_first_line(error)}", sample.call)
            return None
        if call.target is None:
            self.report("the sample calls what this torch does not have", sample.call)
            return None
        return call

    # -- names -----------------------------------------------------------------------------------

    def check_names(self) -> None:
        """Every name means something, every size an attribute or an argument."""
        for name in spellings(self.rule):
            if resolve(name) is None and not is_missing(name):
                self.report(f"`{name}` is not in this torch ({torch.__version__})", "")
        for word in self.rule.words:
            if not list(word_spellings(word)):
                self.report(f"no op is called `{word}` in this torch ({torch.__version__})", "")

    def check_attributes(self, call: Call) -> None:
        arguments = {n.lstrip("*") for text in self.rule.calls for n in rule_files._names(text)}
        for key in (*self.rule.sizes, *self.rule.ranks.values(), *self.rule.at):
            if key not in arguments and not hasattr(call.module, key):
                self.report(f"`{key}` is neither an attribute of {call.name} nor an argument")

    # -- spellings -------------------------------------------------------------------------------

    def other_spellings(self, covered: set[str]) -> None:
        """Run every way to call the rule's ops that no sample names."""
        missed = []
        for name in spellings(self.rule):
            target = resolve(name)
            if name in covered or target is None or not self.is_mine(name, target):
                continue
            if not self.spelled(name) and not needs_device(target):
                missed.append(name)
        if missed:
            shown = ", ".join(f"`{name}`" for name in missed)
            self.report(f"no sample can be run as {shown}; add samples that call them", "")

    def is_mine(self, name: str, target: Any) -> bool:
        """Whether calls of `name` are given this rule, and not one that knows them better."""
        named = any(text.partition("(")[0] == name for text in self.rule.calls)
        if named or isinstance(target, type):
            return True
        use = self.lookup(name, target, None)
        return use is not None and use.rule is self.rule

    def lookup(self, name: str, target: Any, call: rule_files.Call | None) -> Use | None:
        if name.startswith("Tensor."):
            return self.rules.of_method(name.removeprefix("Tensor."), call)
        return self.rules.of_function(target, call)

    def spelled(self, name: str) -> bool:
        """Try the samples as calls of `name`; those of the same word first."""
        samples = sorted(self.rule.samples, key=lambda s: _last(s.call) != _last(name))
        for sample in samples:
            call = self.respelled(name, sample)
            if call is None:
                continue
            if not self.known_result(call):
                self.deep(call)
            return True
        return False

    def respelled(self, name: str, sample: Sample) -> Call | None:
        """The sample as a call of `name`, if that runs."""
        try:
            call = made_call(name, self.rearranged(name, sample))
            given, named = call.filled(call.values(0))
            use = self.lookup(name, call.target, (tuple(given), named))
            if call.module is None and (use is None or use.rule.name != self.rule.name):
                return None
            seed(0)
            found = call(call.values(0))
        except Exception:
            return None
        return call if leaves(found) else None

    def rearranged(self, name: str, sample: Sample) -> Sample:
        """The sample's arguments in the order in which `name` takes them."""
        signatures = dict(rule_files._signature(text, self.rule) for text in self.rule.calls)
        ours, theirs = signatures.get(name), signatures.get(sample.call)
        if ours is None or theirs is None or ours.arguments == theirs.arguments:
            return sample
        bound = Use(self.rule, theirs.arguments).bound(tuple(sample.inputs), {})
        order = [n for n in ours.arguments if n in bound]
        if list(ours.arguments[: len(order)]) != order or len(order) < len(bound):
            raise ValueError("the sample's arguments have no place in this call")
        return sample.model_copy(update={"inputs": [bound[n] for n in order]})

    def known_result(self, call: Call) -> bool:
        """Whether the call computes what one of the same word, probed before, does."""
        if call.module is not None:
            return False
        seed(0)
        mine = leaves(call(call.values(0)))
        earlier = self.results.setdefault(_last(call.name), [])
        known = any(len(mine) == len(other) and all(map(_equal, mine, other)) for other in earlier)
        earlier.append(mine)
        return known

    # -- one call --------------------------------------------------------------------------------

    def deep(self, call: Call) -> None:
        """Probe a call in all roles its operands can have."""
        self.call = call
        self.values = call.defined
        self.probed += 1
        before = len(self.findings)
        if call.module is not None:
            self.check_attributes(call)
        if self.rule.kind in ("plain", "fill"):
            self.guarded(self.check_made, call)
            return
        for params, zeros in self.roles(call):
            if len(self.findings) > before:
                return
            self.guarded(self.one_trial, call, params, zeros)
        if len(self.findings) == before:
            self.guarded(self.check_letters, call)

    def guarded(self, check: Callable[..., Any], *args: Any) -> None:
        try:
            check(*args)
        except FxpruneError as error:
            self.report(f"{type(error).__name__}: {error.fault}")
        except (
            RuntimeError,
            ValueError,
            TypeError,
            IndexError,
            AssertionError,
            AttributeError,
        ) as error:
            self.report(f"fails: {_first_line(error)}")

    def roles(self, call: Call) -> Iterator[tuple[list[int], list[bool | None]]]:
        """Operands that are parameters, and what the inputs' masked channels hold."""
        count = len(call.holes)
        floats = [i for i in range(count) if not is_discrete(call.holes[i].spec)]
        yield [], [True] * count
        if self.rule.additive and self.rule.kind == "dims":
            return  # such rules speak of weights, which masking makes zero
        yield [], [False] * count
        inplace = call.name.endswith("_") or self.rule.kind == "assign"
        if count > 1:
            for i in range(count):
                yield [], [j == i for j in range(count)]
                yield [], [True if j == i else None for j in range(count)]
            if not inplace and len(floats) > 1:
                for i in (0, count - 1):
                    params = [j for j in floats if j != i]
                    yield params, [True] * (count - len(params))

    def one_trial(self, call: Call, params: list[int], zeros: list[bool | None]) -> None:
        trial = _trial(call, self.rules, params, zeros, "none")
        if not self.fired(trial):
            return
        outputs = trial.run(trial.tensors)
        if not self.shapes_fit(trial, outputs):
            return
        if self.values and not self.random(trial):
            if all(zeros):
                self.check_dependence(trial, outputs)
            if self.rule.kind in ("move", "reshape"):
                self.check_movement(trial)
        self.check_drops(trial, outputs)
        if all(zeros) and self.rule.mixes:
            self.check_drops(_trial(call, self.rules, params, zeros, "all"), outputs, mixed=True)

    def random(self, trial: _Trial) -> bool:
        first, again = trial.run(trial.tensors), trial.run(trial.tensors, seed=1)
        return not all(map(_equal, first, again))

    def fired(self, trial: _Trial) -> bool:
        """Whether the rule was the one used, and fitted."""
        nodes = [n for n, use in trial.flow.rules.items() if use.rule.name == self.rule.name]
        for node, reason in trial.flow.unknown.items():
            self.report(f"%{node.name} {reason}")
            return False
        if not nodes:
            others = {use.rule.name for use in trial.flow.rules.values()}
            self.report(f"another rule is used: {', '.join(sorted(others)) or 'none'}")
        return bool(nodes)

    def shapes_fit(self, trial: _Trial, outputs: list[Tensor]) -> bool:
        for value, found in zip(trial.values, outputs, strict=True):
            if value.shape != tuple(found.shape):
                self.report(f"gives {list(found.shape)}, the rule says {list(value.shape)}")
                return False
            for layer in value.layers:
                sizes = tuple(layer.ids.shape)
                fits = len(sizes) == found.ndim and all(
                    a in (1, b) for a, b in zip(sizes, found.shape, strict=True)
                )
                if not fits:
                    self.report(
                        f"gives {list(found.shape)}, its channels are laid out as {list(sizes)}"
                    )
                    return False
        return True

    # -- checks ----------------------------------------------------------------------------------

    def check_dependence(self, trial: _Trial, outputs: list[Tensor]) -> None:
        """Changing a slice changes what carries its channel, and nothing else."""
        if self.rule.additive:
            return  # what changes in one place changes the length, but zeros do not
        channel = trial.groups.channel
        dead = _unread(trial, outputs)
        for name, slot in trial.slots():
            ids = slot.ids.reshape(-1)
            for k, one in enumerate(channel[ids.numpy()].tolist()):
                if one == 0 or name in dead:
                    continue
                marked = [_carriers(value, channel, one) for value in trial.values]
                if not any(bool(m.any()) for m in marked):
                    self.check_meeting(trial, one, outputs)
                    continue
                changed = _changed(trial, outputs, name, slot, k)
                shown = f"{name}[{', '.join([':'] * slot.dim + [str(k)])}]"
                if any(bool((c & ~m).any()) for c, m in zip(changed, marked, strict=True)):
                    return self.report(f"changing {shown} changes output of other channels too")
                seen = any(bool((c & m).any()) for c, m in zip(changed, marked, strict=True))
                if not seen and name in trial.zeros:
                    return self.report(f"changing {shown} leaves the output tied to it as it is")

    def check_meeting(self, trial: _Trial, one: int, outputs: list[Tensor]) -> None:
        """Slices tied to each other, but to no output, must meet in some product."""
        found = [
            (name, slot, k)
            for name, slot in trial.slots()
            for k, c in enumerate(trial.groups.channel[slot.ids.reshape(-1).numpy()].tolist())
            if c == one
        ]
        reached, rest = found[:1], found[1:]
        while rest:
            met = next(
                (r for r in rest if any(_meet(trial, outputs, r, other) for other in reached)), None
            )
            if met is None:
                (a, slot_a, i), (b, slot_b, j) = reached[0], rest[0]
                pair = f"{a} dim {slot_a.dim} at {i} and {b} dim {slot_b.dim} at {j}"
                return self.report(f"{pair} are tied, but never meet")
            reached.append(met)
            rest.remove(met)

    def check_movement(self, trial: _Trial) -> None:
        """Ids are where the values are: layers, laid out in full, go through the op itself."""
        source = next(iter(trial.zeros))
        slots = trial.flow.ids.slots.get(source, [])
        for slot in slots:
            dims = [1] * trial.tensors[source].ndim
            dims[slot.dim] = -1
            dense = slot.ids.view(dims).expand(trial.tensors[source].shape)
            found = trial.run({**trial.tensors, source: dense.to(trial.tensors[source].dtype)})
            for value, out in zip(trial.values, found, strict=True):
                layers = [layer for layer in value.layers if torch.isin(layer.ids, slot.ids).any()]
                if layers and not torch.equal(layers[0].ids.expand(out.shape), out.long()):
                    return self.report(
                        f"ids along dim {slot.dim} of {source} leave in another order"
                    )

    def check_drops(self, trial: _Trial, outputs: list[Tensor], mixed: bool = False) -> None:
        """Dropping channels gives what is left of the masked result (its shape, where `mixed`)."""
        values = self.values and not self.random(trial)
        found = trial.groups
        prunable = [i for i, group in enumerate(found.groups) if group.prunable]
        rng = np.random.default_rng(0)
        scores = {i: rng.random(len(found.groups[i])) for i in prunable}
        for chosen in [*([i] for i in prunable), prunable]:
            ignored = {i: "" for i in prunable if i not in chosen}
            kept = select(found, scores, Options(rate=0.5, ignored=ignored)).kept
            ids = torch.from_numpy(kept[found.channel])
            if not ids.all() and not self.check_drop(trial, ids, values, mixed):
                return

    def check_drop(self, trial: _Trial, ids: Tensor, values: bool, mixed: bool) -> bool:
        widths = Widths(trial.flow, ids)
        names = [n for n in trial.flow.ids.slots if n in trial.tensors]
        kept = {name: rows for name in names if (rows := widths.kept_of(name))}
        shown = ", ".join(f"{n} dim {d}" for n, rows in kept.items() for d in rows)
        try:
            pruned = rewrite(trial.caller, trial.flow, ids, kept)
        except RewriteError:
            return True  # prune freezes such channels
        inputs = [gather(trial.tensors[n], kept.get(n, {})).clone() for n in trial.zeros]
        seed(0)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # fx prints where its code fails
                found = leaves(pruned.eval()(*inputs))
            got = [found[i] for i in trial.told]
        except Exception as error:
            self.report(f"without part of {shown} it does not run: {_first_line(error)}")
            return False
        full = trial.run(trial.masked(widths))
        for value, whole, part in zip(trial.values, full, got, strict=True):
            message = _compared(trial, widths, value, whole, part, values)
            if message and mixed and tuple(part.shape) == widths.shape(trial.source, value):
                self.mixing_seen = True
            elif message:
                self.report(f"without part of {shown} {message}")
                return False
        return True

    def check_letters(self, call: Call) -> None:
        """A letter that is in an operand and the output and does not mix keeps its slices apart."""
        if self.rule.kind not in ("dims", "einsum", "matmul") or self.rule.additive:
            return
        trial = _trial(call, self.rules, [], [True] * len(call.holes), "all")
        use = next((u for n, u in trial.flow.uses.items()), None)
        if use is None or not use.binding.output:
            return
        for training in (False, True):
            trial.caller.train(training)
            outputs = trial.run(trial.tensors)
            for i, dims in enumerate(use.binding.inputs):
                name = f"x{i}"
                if dims is None or name not in trial.zeros or i >= len(call.holes):
                    continue
                if trial.tensors[name].ndim != len(dims):
                    continue
                for letter in sorted({n for names in dims for n in names}):
                    self.check_letter(trial, use.binding, name, dims, letter, outputs)
        trial.caller.eval()

    def check_letter(self, trial: _Trial, binding, name: str, dims, letter: str, outputs) -> None:
        size = binding.sizes[letter]
        out = [t for t in outputs if t.ndim == len(binding.output)][:1]
        if size < 2 or not out or not any(letter in names for names in binding.output):
            return
        base = letter.rstrip("0123456789")
        mixing = {m.lstrip("*") for m in self.rule.mixes}
        for k in range(size):
            where = _letter_mask(dims, binding.sizes, letter, k, trial.tensors[name].shape)
            changed = _differences(trial, outputs, name, where)[0]
            allowed = _letter_mask(binding.output, binding.sizes, letter, k, out[0].shape)
            if bool((changed & ~allowed).any()):
                if base in mixing or letter in mixing:
                    self.mixing_seen = True
                else:
                    mode = "in training " if trial.caller.training else ""
                    self.report(
                        f"mixes along `{letter}` {mode}: changing {name} at {k} changes others"
                    )
                return

    def check_made(self, call: Call) -> None:
        """Tensors without channels are the same whatever the operands are; fills are uniform."""
        first = leaves(call(call.values(0)))
        if self.rule.kind == "fill":
            for tensor in first if call.defined else ():
                if tensor.numel() and not bool((tensor == tensor.reshape(-1)[0]).all()):
                    self.report("is said to fill, but its elements differ")
                elif self.rule.zero == "keeps" and bool(tensor.any()):
                    self.report("is said to fill with zeros, and does not")
            return
        halved = [v[tuple(slice(0, max(1, n // 2)) for n in v.shape)] for v in call.values(3)]
        other = leaves(call(halved))
        if [t.shape for t in first] != [t.shape for t in other]:
            self.report("is said to carry no channels, but its shape follows an operand's")


def _unread(trial: _Trial, outputs: list[Tensor]) -> set[str]:
    """Operands whose values change nothing (only their shape is read)."""
    dead = set()
    for name, tensor in trial.tensors.items():
        whole = torch.ones(tensor.shape, dtype=torch.bool)
        if not any(bool(c.any()) for c in _differences(trial, outputs, name, whole)):
            dead.add(name)
    return dead


def _others(trial: _Trial, name: str, seed: int) -> Tensor:
    """Other values for an operand, drawn as the sample's were; a parameter's are positive."""
    if name in trial.zeros or (name[0] == "x" and name[1:].isdigit()):
        return trial.call.values(seed)[int(name[1:])]
    old = trial.tensors[name]
    if not old.is_floating_point():
        return old
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(old.shape, generator=generator, dtype=torch.float64) + 0.1


def _differences(trial: _Trial, outputs: list[Tensor], name: str, where: Tensor) -> list[Tensor]:
    """Which output elements ever change when an operand is changed at `where`."""
    changed = [torch.zeros(t.shape, dtype=torch.bool) for t in outputs]
    for seed in range(10, 16):
        tensors, before = trial.tensors, outputs
        if seed > 11:  # nothing saw it so far: try with other operands beside it
            if any(bool(c.any()) for c in changed):
                break
            tensors = {n: _others(trial, n, seed + 10) for n in trial.tensors}
            before = trial.run(tensors)
        tensor = torch.where(where, _others(trial, name, seed), tensors[name])
        found = trial.run({**tensors, name: tensor})
        for k, (a, b) in enumerate(zip(before, found, strict=True)):
            changed[k] |= _differs(a, b)
    return changed


def _differs(a: Tensor, b: Tensor) -> Tensor:
    if a.is_complex():
        return _differs(_as_real(a), _as_real(b)).any(-1)
    if not a.is_floating_point() or not b.is_floating_point():
        return a != b
    gap = (a - b).abs() > 1e-12 * (1 + a.abs())
    return gap | (torch.isnan(a) != torch.isnan(b)) | (torch.isinf(a) != torch.isinf(b))


def _changed(trial: _Trial, outputs, name: str, slot: Slot, k: int) -> list[Tensor]:
    return _differences(trial, outputs, name, _slot_mask(trial.tensors[name], slot, k))


def _slot_mask(tensor: Tensor, slot: Slot, k: int) -> Tensor:
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


def _meet(trial: _Trial, outputs: list[Tensor], a, b) -> bool:
    """Whether what slice `a` does to the output depends on slice `b`."""
    (name_a, slot_a, i), (name_b, slot_b, j) = a, b
    for seed in (21, 22, 23):
        first = _others(trial, name_a, seed)
        moved = {name_a: torch.where(_slot_mask(first, slot_a, i), first, trial.tensors[name_a])}
        both = {**trial.tensors, **moved}
        second = _others(trial, name_b, seed + 10)
        other = torch.where(_slot_mask(second, slot_b, j), second, both[name_b])
        alone = torch.where(_slot_mask(second, slot_b, j), second, trial.tensors[name_b])
        runs = [
            trial.run({**trial.tensors, **moved}),
            trial.run({**trial.tensors, name_b: alone}),
            trial.run({**both, name_b: other}),
        ]
        for base, x, y, xy in zip(outputs, *runs, strict=True):
            wide = torch.complex128 if xy.is_complex() else torch.float64
            mixed = (xy.to(wide) - x.to(wide)) - (y.to(wide) - base.to(wide))
            if bool((mixed.abs() > 1e-9).any()):
                return True
    return False


def _carriers(value: Value, channel: np.ndarray, one: int) -> Tensor:
    """The elements of a value that belong to a channel."""
    found = torch.zeros(value.shape, dtype=torch.bool)
    for layer in value.layers:
        found |= torch.from_numpy(channel[layer.ids.numpy()] == one)
    return found


def _compared(
    trial: _Trial, widths: Widths, value: Value, whole: Tensor, part: Tensor, values: bool
) -> str:
    shape = widths.shape(trial.source, value)
    if tuple(part.shape) != shape:
        return f"it gives {list(part.shape)}, the rule says {list(shape)}"
    if not values:
        return ""
    stays = torch.ones(value.shape, dtype=torch.bool)
    for layer in value.layers:
        stays &= widths.kept[layer.ids]
    if not _equal(whole[stays].reshape(shape), part):
        return "it differs from the masked op"
    for layer in value.layers:
        gone = ~widths.kept[layer.ids].expand(value.shape)
        left = whole[gone]
        if layer.zero and bool(((left != 0) & (left == left)).any()):  # 0 / 0 cannot be helped
            return "masked channels are said to stay zero, and do not"
    return ""


def _letter_mask(dims, sizes, letter: str, k: int, shape) -> Tensor:
    """Elements of a tensor with dims `dims` at index `k` of a letter."""
    full = [sizes[n] if len(names) else 1 for names in dims for n in (names or [""])]
    where = torch.zeros([1], dtype=torch.bool)
    flat = [n for names in dims for n in (names or [""])]
    full = [sizes[n] if n else 1 for n in flat]
    where = torch.zeros(full, dtype=torch.bool)
    where.select(flat.index(letter), k).fill_(True)
    return where.reshape(tuple(shape)) if where.numel() == math.prod(shape) else where.any()


def _equal(a: Tensor, b: Tensor) -> bool:
    if a.shape != b.shape:
        return False
    if a.is_complex() and b.is_complex():
        a, b = _as_real(a), _as_real(b)
    if not a.is_floating_point():
        return bool((a == b).all())
    return torch.allclose(a.double(), b.double(), rtol=1e-7, atol=1e-9, equal_nan=True)


def _as_real(tensor: Tensor) -> Tensor:
    return torch.view_as_real(tensor.resolve_conj())


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {(str(error).strip() or '?').splitlines()[0]}"


def _last(name: str) -> str:
    return name.rpartition(".")[2].rstrip("_")


__all__ = ["Finding", "probe", "probe_all", "replace", "resolve", "spellings"]
