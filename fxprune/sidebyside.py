"""Step `verify` for a recorded network: the pruned copy and the masked original run side by side.

No graph holds for every input, so both are run as they are, in float64 and in eval mode. The output
of every layer with weights is compared, as far as its channels were kept, and so are the outputs of
the network. A detector that finds nothing has been compared up to its last layer all the same.
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .errors import VerificationError, first_line
from .flow import Flow
from .ids import Value
from .inputs import Inputs
from .plans import Kept
from .record import copied, example
from .reference import Jitter, jitters, mask
from .trees import leaves
from .verifier import _LIMITS, Verification, _difference, _disturbed, _tensors
from .widths import Widths

# what stands for zero where something may be divided by its own norm: squared, it is a number still
_LEAST = {torch.float64: 1e-100, torch.float32: 1e-16}
_SAMPLE = 4096  # elements of a layer's output that are compared
_ROUNDED = 1e-6  # how far networks may differ whose values are rounded on the way

Lines = list[Tensor]  # for each dim of a layer's output, the mask of what is kept
State = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Layers:
    """Layers with weights, by name. ``lines`` has those whose outputs can be compared, one `Lines`
    a tensor; ``over`` those whose statistics run over channels that went; ``heads`` those that lost
    no output channel. ``read`` are parameters that forward reads without their layer, too."""

    lines: dict[str, list[Lines]]
    over: frozenset[str]
    read: frozenset[str]

    @property
    def heads(self) -> set[str]:
        return {n for n, each in self.lines.items() if all(m.all() for line in each for m in line)}


def layers(flow: Flow, widths: Widths) -> Layers:
    """What the record says of its layers; those that differ from call to call are left out."""
    found: dict[str, list[list[Lines] | None]] = {}
    over = set()
    modules = dict(flow.graph.named_modules())
    for node in flow.graph.graph.nodes:
        if node.op == "call_module" and any(True for _ in modules[node.target].parameters()):
            values = leaves(flow.values.get(node), Value)
            found.setdefault(node.target, []).append(_lines(values, widths))
            if node in flow.mixing and any(map(widths.changed, values)):
                over.add(node.target)
    lines = {name: calls[0] for name, calls in found.items() if _alike(calls)}
    read = frozenset(n.target for n in flow.graph.graph.nodes if n.op == "get_attr")
    return Layers({n: each for n, each in lines.items() if each is not None}, frozenset(over), read)


def _lines(values: list[Value], widths: Widths) -> list[Lines] | None:
    found = [[widths.along(v, d) for d in range(len(v.shape))] for v in values]
    if any(m is None for each in found for m in each):
        return None
    return [[m for m in each if m is not None] for each in found]


def _alike(calls: list[list[Lines] | None]) -> bool:
    """Whether the same goes at every call, along dims that may have other sizes."""
    first = calls[0]
    return first is not None and all(
        other is not None and len(other) == len(first) and all(map(_same_lines, other, first))
        for other in calls[1:]
    )


def _same_lines(a: Lines, b: Lines) -> bool:
    return len(a) == len(b) and all(
        torch.equal(x, y) if not (x.all() and y.all()) else True for x, y in zip(a, b, strict=True)
    )


@dataclass
class Trace:
    """What a run gave: its outputs, and a sample of each layer call's (name, scale, elements)."""

    outputs: list[Tensor] = field(default_factory=list)
    samples: list[tuple[str, float, Tensor]] = field(default_factory=list)
    random: bool = False

    @property
    def elements(self) -> int:
        tensors = [*self.outputs, *(sample for _, _, sample in self.samples)]
        return sum(int(torch.isfinite(t).sum()) for t in tensors)


class Runner:
    """Runs a copy of a module in eval mode, with other tensors in place of its own.

    Parameters of layers are made when the layer is called and forgotten again; the rest at once.
    """

    def __init__(
        self, module: nn.Module, state: State, found: Layers, *, full: bool, rounds: bool = False
    ):
        self.state, self.layers, self.full, self.rounds = state, found, full, rounds
        self.twin: Runner | None = None  # runs a layer over its kept channels alone
        self.heads = found.heads
        self.late = late = _read_by_layers_alone(module, set(found.lines)) - found.read
        self.module = copied(module, lambda name, t: t if name in late else state(name, t))
        self.names: dict[int, str] = {}
        for name, each in self.module.named_modules():
            each.__dict__["training"] = False
            if name in found.lines:
                self.names[id(each)] = name
        self.trace = Trace()
        self.inside = False

    def run(self, inputs: Inputs) -> Trace:
        self.trace = Trace()
        before = torch.get_rng_state()
        with self.patched(), torch.no_grad():
            output = self.module(*inputs.args, **inputs.kwargs)
        self.trace.outputs = [t.detach() for t in _tensors(output)]
        self.trace.random = not torch.equal(before, torch.get_rng_state())
        return self.trace

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        call, runner = nn.Module.__call__, self
        fast = torch.backends.mha.get_fastpath_enabled()

        def watched(module, *args, **kwargs):
            if runner.inside or id(module) not in runner.names:
                return call(module, *args, **kwargs)
            runner.inside = True
            try:
                return runner.layer(runner.names[id(module)], module, args, kwargs)
            finally:
                runner.inside = False

        nn.Module.__call__ = watched  # type: ignore[method-assign]
        torch.backends.mha.set_fastpath_enabled(False)  # it reads weights past their layers
        try:
            yield
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]
            torch.backends.mha.set_fastpath_enabled(fast)

    def layer(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        if self.twin is not None and name in self.layers.over:
            found = self.over_kept(name, args, kwargs)
        else:
            found = self.called(name, module, args, kwargs)
        self.sample(name, found)
        if self.rounds and name in self.heads:
            found = pytree.tree_map(_rounded, found)
        return found

    def called(self, name: str, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> Any:
        own = ((f"{name}.{field}", field, tensor) for field, tensor in module.named_parameters())
        state = {
            field: self.state(full, tensor) for full, field, tensor in own if full in self.late
        }
        return functional_call(module, state, args, kwargs)

    def over_kept(self, name: str, args: tuple, kwargs: dict[str, Any]) -> Any:
        """A normalisation over the kept channels alone, laid back among zeros."""
        assert self.twin is not None
        (line,) = self.layers.lines[name]
        taken = [_taken(a, line) if isinstance(a, Tensor) and a.ndim else a for a in args]
        narrow = self.twin.module.get_submodule(name)
        found = self.twin.called(name, narrow, tuple(taken), kwargs)
        full = torch.zeros_like(args[0], dtype=found.dtype)
        full[torch.meshgrid(*_places(line, full), indexing="ij")] = found
        return full

    def sample(self, name: str, found: Any) -> None:
        tensors = leaves(found, Tensor)
        for tensor, line in zip(tensors, self.layers.lines[name], strict=True):
            scale = max(map(abs, map(float, tensor.aminmax()))) if tensor.numel() else 0.0
            whole = [torch.ones(n, dtype=torch.bool) for n in tensor.shape]
            self.trace.samples.append((name, scale, _some(tensor, line if self.full else whole)))


def _read_by_layers_alone(module: nn.Module, names: set[str]) -> set[str]:
    """Parameters that no other module holds, of layers that are called as a whole."""
    owners: dict[int, list[str]] = {}
    for prefix, each in module.named_modules():
        for name, tensor in each.named_parameters(recurse=False, remove_duplicate=False):
            owners.setdefault(id(tensor), []).append(f"{prefix}.{name}")
    alone = [full[0] for full in owners.values() if len(full) == 1]
    return {full for full in alone if full.rpartition(".")[0] in names}


def _taken(tensor: Tensor, line: Lines) -> Tensor:
    for dim, kept in enumerate(line):
        if not kept.all():
            tensor = tensor.index_select(dim, kept.nonzero().flatten().to(tensor.device))
    return tensor


def _places(line: Lines, full: Tensor) -> list[Tensor]:
    whole = [torch.arange(n) for n in full.shape]
    places = [w if m.all() else m.nonzero().flatten() for m, w in zip(line, whole, strict=True)]
    return [place.to(full.device) for place in places]


def _some(tensor: Tensor, line: Lines) -> Tensor:
    """Elements of what is kept, the same ones of a tensor that holds nothing else."""
    places = _places(line, tensor)
    count = math.prod(map(len, places))
    at = torch.arange(count)
    if count > _SAMPLE:
        at = torch.randint(count, (_SAMPLE,), generator=torch.Generator().manual_seed(count))
    coordinates: list[Tensor] = []
    for place in reversed(places):
        coordinates.insert(0, place[(at % len(place)).to(place.device)] if len(place) else place)
        at = at // max(len(place), 1)
    return tensor[tuple(coordinates)].reshape(-1)


def _rounded(value: Any) -> Any:
    is_double = isinstance(value, Tensor) and value.dtype == torch.float64
    return value.float().double() if is_double else value


def _state(
    name: str,
    value: Tensor,
    *,
    dtype: torch.dtype | None,
    jitter: Jitter,
    kept: Mapping[str, dict[int, Kept]],
    first: Mapping[str, str],
) -> Tensor:
    """A tensor of a network as it is compared: in one dtype, with noise, masked."""
    if not value.is_floating_point():
        return value.detach().clone()
    found = value.detach().to(dtype or value.dtype, copy=True)
    noise = jitter(name)
    found = found if noise is None else found + noise.to(found)
    gone = kept.get(first.get(name, name))
    return mask(found, gone, least=_LEAST.get(found.dtype, 0.0)) if gone else found


# -- the comparison --------------------------------------------------------------------------------


def verify_copy(
    model: nn.Module,
    flow: Flow,
    pruned: nn.Module,
    kept: Mapping[str, dict[int, Kept]],
    widths: Widths,
    inputs: Inputs,
    *,
    numbers: bool = True,
) -> Verification:
    """Run the pruned copy as its user will, then beside the masked original.

    Raises `VerificationError` where the copy does not run, or the two differ.
    """
    _run_itself(flow, pruned, example(model, inputs))
    if not numbers:
        return Verification(True)
    both = _Both(model, flow, pruned, kept, layers(flow, widths), inputs)
    with torch.no_grad():
        return _in_some_dtype(both)


def _in_some_dtype(both: _Both) -> Verification:
    errors: list[Exception] = []
    for dtype in (torch.float64, None):
        try:
            return both.compare(dtype)
        except RuntimeError as error:  # code that fixes a dtype does not run in another
            errors.append(error)
    fault = f"the original or the pruned network does not run: {first_line(errors[-1])}"
    raise VerificationError(fault) from errors[-1]


def _run_itself(flow: Flow, pruned: nn.Module, inputs: Inputs) -> None:
    own = copied(pruned, lambda name, t: t if isinstance(t, nn.Parameter) else t.clone())
    for module in own.modules():
        module.__dict__["training"] = False
    try:
        with torch.no_grad():
            found = own(*inputs.args, **inputs.kwargs)
    except Exception as error:
        raise VerificationError(
            f"the pruned network does not run: {type(error).__name__}: {first_line(error)}",
            hint="forward may take another way where layers are narrower; please report it",
        ) from error
    old = next(n.meta["val"] for n in flow.graph.graph.nodes if n.op == "output")
    if not _same_structure(old, found):
        raise VerificationError("an output changed its structure")


def _same_structure(old: Any, new: Any) -> bool:
    """The same containers, and tensors of the same rank; how many, values may decide."""
    if isinstance(old, Tensor):
        return isinstance(new, Tensor) and old.ndim == new.ndim
    if isinstance(old, Mapping):
        alike = isinstance(new, Mapping) and old.keys() == new.keys()
        return alike and all(_same_structure(old[key], new[key]) for key in old)
    if isinstance(old, (tuple, list)):
        alike = isinstance(new, (tuple, list))
        return alike and all(_same_structure(a, b) for a, b in zip(old, new, strict=False))
    return type(old) is type(new) or is_dataclass(old) or not isinstance(new, Tensor)


@dataclass(frozen=True)
class _Both:
    model: nn.Module
    flow: Flow
    pruned: nn.Module
    kept: Mapping[str, dict[int, Kept]]
    layers: Layers
    inputs: Inputs

    def compare(self, dtype: torch.dtype | None) -> Verification:
        found, moved = self.compared(dtype)
        if found.difference is None or moved:
            return found
        louder, moved = self.compared(dtype, louder=True)
        if louder.difference is not None and moved:
            also = "with weights scaled up, as signals fade in this network"
            return replace(louder, note=f"{louder.note}; {also}")
        also = "the outputs hardly depend on the input, so this says little"
        return replace(found, note=f"{found.note}; {also}")

    def compared(
        self, dtype: torch.dtype | None, *, louder: bool = False
    ) -> tuple[Verification, bool]:
        """One comparison, and whether another input gives other values."""
        try:
            return self.once(dtype, louder, rounds=False)
        except VerificationError:
            if dtype != torch.float64:
                raise
        # equal scores fall in one order or another by their last bits, so these are rounded off
        return self.once(dtype, louder, rounds=True)

    def once(
        self, dtype: torch.dtype | None, louder: bool, *, rounds: bool
    ) -> tuple[Verification, bool]:
        full, narrow = self.runners(dtype, louder, rounds)
        real = partial(example, self.model, self.inputs, dtype)
        expected, got = full.run(real()), narrow.run(real())
        if expected.random:
            return Verification(True, note="the network draws random numbers"), False
        worst = worst_of(expected, got)
        own = dtype or next((t.dtype for t in expected.outputs if t.is_floating_point()), None)
        limit = _ROUNDED if rounds else _LIMITS.get(own or torch.float32, 5e-2)
        kind = "original normalised over the kept channels" if self.layers.over else ""
        kind = kind or "masked original"
        if not worst <= limit:
            raise VerificationError(
                f"the pruned network differs from the {kind} by {worst:.2e} of its largest value",
                hint="where forward computes with a width unseen, as in range(x.shape[1]), leave "
                "its layer alone (ignore=); otherwise this is a defect of fxprune, or of a rule",
            )
        note = f"the outputs of {len(expected.samples)} layer calls are among them"
        name = str(own).removeprefix("torch.")
        found = Verification(
            True, worst, expected.elements, name, self.inputs.describe(), kind, note
        )
        return found, self.moves(narrow, got, real(), min(1000 * limit, 1e-3))

    def runners(self, dtype: torch.dtype | None, louder: bool, rounds: bool):
        first: dict[str, str] = self.flow.graph.meta.get("fxprune_aliases", {})
        wide, slim = jitters(self.flow, self.kept, louder=louder)
        narrow_state = partial(_state, dtype=dtype, jitter=slim, kept={}, first=first)
        full_state = partial(_state, dtype=dtype, jitter=wide, kept=self.kept, first=first)
        narrow = Runner(self.pruned, narrow_state, self.layers, full=False, rounds=rounds)
        full = Runner(self.model, full_state, self.layers, full=True, rounds=rounds)
        full.twin = narrow
        return full, narrow

    def moves(self, runner: Runner, got: Trace, inputs: Inputs, least: float) -> bool:
        """Whether another input changes what the last layers give by more than this share."""
        args, kwargs = pytree.tree_map(_disturbed, (inputs.args, inputs.kwargs))
        tensors = [t for t in pytree.tree_leaves((args, kwargs)) if isinstance(t, Tensor)]
        if not any(t.is_floating_point() for t in tensors):
            return True
        try:
            other = runner.run(Inputs(args, kwargs))
        except Exception:  # a network may refuse such an input, as the original would
            return True
        pairs = [
            (a, b)
            for (name, _, a), (same, _, b) in zip(got.samples, other.samples, strict=False)
            if name == same and name in runner.heads and a.shape == b.shape
        ]
        if not pairs:
            pairs = [
                (a, b)
                for a, b in zip(got.outputs, other.outputs, strict=False)
                if a.shape == b.shape
            ]
        return any(_difference(a, b) >= least for a, b in pairs)


def worst_of(expected: Trace, got: Trace) -> float:
    """The largest difference, each relative to the largest value of its tensor."""
    calls = [[name for name, _, _ in trace.samples] for trace in (expected, got)]
    if calls[0] != calls[1] or len(expected.outputs) != len(got.outputs):
        raise _another_way(*calls)
    gaps = [
        _gap(name, a, b, scale)
        for (name, scale, a), (_, _, b) in zip(expected.samples, got.samples, strict=True)
    ]
    pairs = zip(expected.outputs, got.outputs, strict=True)
    return max([*gaps, *(_difference(a, b) for a, b in pairs)], default=0.0)


def _another_way(expected: list[str], got: list[str]) -> VerificationError:
    pairs = zip([*expected, "its end"], [*got, "its end"], strict=False)
    at = next((pair for pair in pairs if pair[0] != pair[1]), ("its end", "its end"))
    return VerificationError(
        f"the pruned network goes another way: the original runs to {at[0]}, it to {at[1]}",
        hint="where forward asks for a width, leave its layer alone (ignore=)",
    )


def _gap(name: str, expected: Tensor, got: Tensor, scale: float) -> float:
    if expected.shape != got.shape:
        raise VerificationError(f"{name} gives {got.numel()} elements, not {expected.numel()}")
    if not expected.numel():
        return 0.0
    finite = torch.isfinite(expected)
    if not torch.equal(finite, torch.isfinite(got)):
        return float("inf")
    gap = float((expected[finite] - got[finite]).abs().max()) if finite.any() else 0.0
    return gap / scale if 0 < scale < float("inf") else gap
