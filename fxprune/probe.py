"""Probing rules: each is compared with what its ops do when they are run.

A sample is called with channel ids on every operand, as flow would meet it. What flow then says
is checked by running the op in float64: changing a slice may change only what carries its channel,
and must change something there; slices that are tied must meet; dropping channels must give what
is left of the masked result; what is said to stay zero must be zero. `probe_all` probes all rules.
"""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from . import rules as rule_files
from .errors import FxpruneError, first_line
from .letters import Dims, DimsUse
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
    seed_torch,
    spellings,
    word_spellings,
)
from .select import Options, select
from .trial import (
    Part,
    Trial,
    carriers,
    compared,
    differences,
    equal,
    letter_mask,
    make_trial,
    slices_meet,
    unread,
)
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
            self.report(f"cannot be built: {_fault(error)}", sample.call)
            return None
        if call.target is None and is_missing(sample.call):
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
        named = [rule_files.argument_names(text) for text in self.rule.calls]
        arguments = {name.lstrip("*") for names in named for name in names}
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
            seed_torch(0)
            found = call(call.values(0))
        except Exception:
            return None
        return call if leaves(found) else None

    def rearranged(self, name: str, sample: Sample) -> Sample:
        """The sample's arguments in the order in which `name` takes them."""
        signatures = dict(rule_files.signature(text, self.rule) for text in self.rule.calls)
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
        seed_torch(0)
        mine = leaves(call(call.values(0)))
        earlier = self.results.setdefault(_last(call.name), [])
        known = any(len(mine) == len(other) and all(map(equal, mine, other)) for other in earlier)
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
        except Exception as error:  # whatever an op raises is a finding
            self.report(f"fails: {_fault(error)}")

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
        trial = make_trial(call, self.rules, params, zeros, "none")
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
        self.check_drops(trial)
        if all(zeros) and self.rule.mixes:
            self.check_drops(make_trial(call, self.rules, params, zeros, "all"), mixed=True)

    def random(self, trial: Trial) -> bool:
        first, again = trial.run(trial.tensors), trial.run(trial.tensors, seed=1)
        return not all(map(equal, first, again))

    def fired(self, trial: Trial) -> bool:
        """Whether the rule was the one used, and fitted."""
        nodes = [n for n, use in trial.flow.rules.items() if use.rule.name == self.rule.name]
        for node, reason in trial.flow.unknown.items():
            self.report(f"%{node.name} {reason}")
            return False
        if not nodes:
            others = {use.rule.name for use in trial.flow.rules.values()}
            self.report(f"another rule is used: {', '.join(sorted(others)) or 'none'}")
        return bool(nodes)

    def shapes_fit(self, trial: Trial, outputs: list[Tensor]) -> bool:
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

    def check_dependence(self, trial: Trial, outputs: list[Tensor]) -> None:
        """Changing a slice changes what carries its channel, and nothing else."""
        if self.rule.additive or self.rule.kind == "recurrent":
            return  # a length changes with each of its terms, and the next step with each state
        dead = unread(trial, outputs)
        for part in trial.parts():
            message = ""
            if part.name not in dead and part.channel:
                message = self.wrong_reach(trial, part, outputs)
            if message:
                return self.report(message)

    def wrong_reach(self, trial: Trial, part: Part, outputs: list[Tensor]) -> str:
        """What is wrong with the output elements a slice reaches; nothing if they are right."""
        marked = [carriers(value, trial.groups.channel, part.channel) for value in trial.values]
        if not any(bool(m.any()) for m in marked):
            return self.unmet(trial, part.channel, outputs)
        changed = differences(trial, outputs, part.name, part.where)
        pairs = list(zip(changed, marked, strict=True))
        if any(bool((c & ~m).any()) for c, m in pairs):
            return f"changing {part} changes output of other channels too"
        if self.rule.kind == "assign":
            return ""  # what is written over need not be read
        if part.name in trial.zeros and not any(bool((c & m).any()) for c, m in pairs):
            return f"changing {part} leaves the output tied to it as it is"
        return ""

    def unmet(self, trial: Trial, channel: int, outputs: list[Tensor]) -> str:
        """Slices tied to each other, but to no output, must meet in some product."""
        first, *rest = (part for part in trial.parts() if part.channel == channel)
        reached = [first]
        while rest:
            pairs = ((a, b) for b in rest for a in reached)
            met = next((b for a, b in pairs if slices_meet(trial, outputs, a, b)), None)
            if met is None:
                return f"{first} and {rest[0]} are tied, but never meet"
            reached.append(met)
            rest.remove(met)
        return ""

    def check_movement(self, trial: Trial) -> None:
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

    def check_drops(self, trial: Trial, mixed: bool = False) -> None:
        """Dropping channels gives what is left of the masked result (its shape, where `mixed`)."""
        values = self.values and not self.random(trial)
        found = trial.groups
        prunable = [i for i, group in enumerate(found.groups) if group.prunable]
        rng = np.random.default_rng(0)
        scores = {i: rng.random(len(found.groups[i])) for i in prunable}
        alone = [[i] for i in prunable] if all(trial.zeros.values()) else []
        for chosen in [*alone, prunable]:
            ignored = {i: "" for i in prunable if i not in chosen}
            kept = select(found, scores, Options(rate=0.5, ignored=ignored)).kept
            ids = torch.from_numpy(kept[found.channel])
            if not ids.all() and not self.check_drop(trial, ids, values, mixed):
                return

    def check_drop(self, trial: Trial, ids: Tensor, values: bool, mixed: bool) -> bool:
        widths = Widths(trial.flow, ids)
        names = [n for n in trial.flow.ids.slots if n in trial.tensors]
        kept = {name: rows for name in names if (rows := widths.kept_of(name))}
        shown = ", ".join(f"{n} dim {d}" for n, rows in kept.items() for d in rows)
        try:
            pruned = rewrite(trial.caller, trial.flow, ids, kept)
        except RewriteError:
            return True  # prune freezes such channels
        inputs = [gather(trial.tensors[n], kept.get(n, {})).clone() for n in trial.zeros]
        seed_torch(0)
        try:
            with contextlib.redirect_stderr(io.StringIO()):  # fx prints where its code fails
                found = leaves(pruned.eval()(*inputs))
            got = [found[i] for i in trial.told]
        except Exception as error:
            self.report(f"without part of {shown} it does not run: {_fault(error)}")
            return False
        full = trial.run(trial.masked(widths))
        for value, whole, part in zip(trial.values, full, got, strict=True):
            message = compared(trial, widths, value, whole, part, values)
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
        trial = make_trial(call, self.rules, [], [True] * len(call.holes), "all")
        for training in (False, True):
            use = next(iter(trial.flow.uses.values()))
            trial.caller.train(training)
            outputs = trial.run(trial.tensors)
            for name, dims in _operands(trial, use):
                for letter in sorted({n for names in dims for n in names}):
                    self.check_letter(trial, use, name, dims, letter, outputs)

    def check_letter(
        self, trial: Trial, use: DimsUse, name: str, dims: Dims, letter: str, outputs: list[Tensor]
    ) -> None:
        sizes, out = use.binding.sizes, use.binding.output
        if sizes[letter] < 2 or not any(letter in names for names in out):
            return
        for k in range(sizes[letter]):
            where = letter_mask(dims, sizes, letter, k, trial.tensors[name].shape)
            changed = differences(trial, outputs, name, where)[0]
            allowed = letter_mask(out, sizes, letter, k, outputs[0].shape)
            if bool((changed & ~allowed).any()):
                return self.mixed(letter, f"changing {name} at {k}", trial.caller.training)

    def mixed(self, letter: str, shown: str, training: bool) -> None:
        """Note that values mix along a letter: as said, or a fault."""
        said = {m.lstrip("*") for m in self.rule.mixes}
        if letter in said or letter.rstrip("0123456789") in said:
            self.mixing_seen = True
        else:
            mode = " in training" if training else ""
            self.report(f"mixes along `{letter}`{mode}: {shown} changes others")

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


def _operands(trial: Trial, use: DimsUse) -> Iterator[tuple[str, Dims]]:
    """The inputs that are operands of a letters rule, with the letters of their dims."""
    for name, dims in zip(trial.zeros, use.binding.inputs, strict=False):
        if dims is not None and trial.tensors[name].ndim == len(dims):
            yield name, dims


def _fault(error: Exception) -> str:
    return f"{type(error).__name__}: {first_line(error)}"


def _last(name: str) -> str:
    return name.rpartition(".")[2].rstrip("_")


__all__ = ["Finding", "probe", "probe_all"]
