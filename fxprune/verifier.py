"""Step `verify`: proof that the new graph computes the masked old one.

Shapes are proven by running the new graph on the meta device. Numbers are compared on one input:
the traced graph against the model's own forward in its own dtype, and in float64 the pruned network
against the original with every dropped element of every parameter set to zero. Parameters that are
constant (a zero-initialised layer) get the same noise in both. Where a normalisation takes
statistics over channels that went, the reference normalises over the kept ones.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields, is_dataclass, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.func import functional_call
from torch.utils import _pytree as pytree

from . import shapes
from .errors import VerificationError, first_line
from .flow import Flow
from .inputs import Inputs, random_like
from .meta import OnMeta
from .plans import Kept
from .reference import Cast, Masked, jitters
from .rules import current
from .trace import skeleton
from .widths import Widths

_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass(frozen=True)
class Verification:
    """What was compared. ``difference`` is the largest, relative to the largest reference value;
    ``elements`` counts the finite ones; ``note`` says why numbers were not compared, or say little.
    """

    shapes: bool
    difference: float | None = None
    elements: int = 0
    dtype: str = ""
    input: str = ""
    reference: str = ""
    note: str = ""

    def __str__(self) -> str:
        if self.difference is None:
            return "shapes proven; numbers not compared" + (f": {self.note}" if self.note else "")
        what = f"{self.elements} outputs on {self.input} ({self.dtype})"
        worst = f"at most {self.difference:.1e} of the largest"
        note = f"; {self.note}" if self.note else ""
        return f"shapes proven; {what} differ from the {self.reference} by {worst}{note}"


def verify_shapes(flow: Flow, pruned: fx.GraphModule, inputs: Inputs) -> None:
    """Run the new graph on the meta device; outputs must have the original's shapes.

    Raises `VerificationError` at the node that fails.
    """
    args = [
        pytree.tree_map(_meta, n.meta["val"])
        for n in flow.graph.graph.nodes
        if n.op == "placeholder"
    ]
    runner = _Shapes(pruned)
    with OnMeta(partial(shapes.of_call, current())), torch.no_grad():
        found = runner.run(*args)
    old = next(n.meta["val"] for n in flow.graph.graph.nodes if n.op == "output")
    for expected, got in zip(_tensors(old), _tensors(found), strict=True):
        if expected.shape != got.shape:
            raise VerificationError(
                f"an output changed its shape from {list(expected.shape)} to {list(got.shape)}"
            )


class _Shapes(fx.Interpreter):
    """Writes each node's value to its meta, and names the node that fails."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.rules = current()

    def run_node(self, n: fx.Node) -> Any:
        try:
            found = super().run_node(n)
        except Exception as error:
            raise VerificationError(
                f"the pruned graph does not run at %{n.name}: {first_line(error)}",
                details=[("node", n.format_node() or "")],
                hint="this is a defect of fxprune, or of a rule; please report it with the dump",
            ) from error
        n.meta["val"] = found
        return found

    def call_module(self, target, args, kwargs):
        module = self.submodules[target]
        with torch._C.DisableTorchFunction():
            found = shapes.of_module(self.rules, module, args, kwargs)
        return module(*args, **kwargs) if found is None else found


def verify_numbers(
    model: nn.Module,
    flow: Flow,
    pruned: fx.GraphModule,
    kept: Mapping[str, dict[int, Kept]],
    widths: Widths,
    inputs: Inputs,
) -> Verification:
    """Compare model, traced graph and pruned network; `VerificationError` where two differ."""
    run = _Run(model, flow, pruned, kept, widths, inputs)
    with torch.no_grad():
        if run.model_is_random():
            return Verification(True, note="the network draws random numbers")
        run.pruned_itself()
        errors: list[Exception] = []
        for dtype in (torch.float64, None):
            try:
                return run.compare(dtype)
            except RuntimeError as error:  # code that fixes a dtype does not run in another
                errors.append(error)
    fault = f"the original or the pruned network does not run: {first_line(errors[-1])}"
    raise VerificationError(fault) from errors[-1]


@dataclass(frozen=True)
class _Run:
    model: nn.Module
    flow: Flow
    pruned: fx.GraphModule
    kept: Mapping[str, dict[int, Kept]]
    widths: Widths
    inputs: Inputs

    @property
    def device(self) -> torch.device:
        return next((t.device for t in self.model.parameters()), torch.device("cpu"))

    def real(self, dtype: torch.dtype | None = None) -> Inputs:
        """Fresh copies of the inputs; in the model's dtype unless another is given."""
        own = next((p.dtype for p in self.model.parameters() if p.is_floating_point()), None)
        return random_like(self.inputs, dtype=dtype or own, device=self.device)

    def arguments(self, dtype: torch.dtype | None = None) -> list[Any]:
        """The inputs in the order of the graph's placeholders, which is forward's."""
        real = self.real(dtype)
        nodes = [n for n in self.flow.graph.graph.nodes if n.op == "placeholder"]
        named = [real.kwargs[n.target] for n in nodes[len(real.args) :]]
        return [*real.args, *named]

    def model_is_random(self) -> bool:
        """Check that the traced graph is the model; true if the model differs from itself."""
        first = self.model_once()
        graph = Cast(self.flow.graph, None, lambda name: None).run(*self.arguments())
        worst = _worst(first, _tensors(graph))
        if worst <= 1e-3:
            return False
        if _worst(first, self.model_once()) > 0:
            return True
        raise VerificationError(
            f"the traced graph differs from the model by {worst:.2e} of its largest output",
            hint="forward runs code that the tracer does not see right; please report it",
        )

    def model_once(self) -> list[Tensor]:
        """The original's own forward in eval mode, on a copy that shares its parameters."""
        copy = skeleton(self.model)
        for module in copy.modules():
            module.__dict__["training"] = False
        real = self.real()
        return _tensors(functional_call(copy, self.state(copy), real.args, real.kwargs))

    def state(self, module: nn.Module) -> dict[str, Tensor]:
        """Copies of what a run may change: buffers, and where an op is unknown, all parameters."""
        found = dict(module.named_buffers())
        if self.flow.unknown:
            found |= dict(module.named_parameters())
        return {name: tensor.clone() for name, tensor in found.items()}

    def pruned_itself(self) -> None:
        """Run the module as its user will: generated code, own dtype."""
        pruned = self.pruned
        flags = {module: module.training for module in pruned.modules()}
        state = self.state(pruned)
        for module in flags:
            module.training = False
        try:
            functional_call(pruned, state, tuple(self.arguments()))
        except Exception as error:
            message = f"{type(error).__name__}: {first_line(error)}"
            raise VerificationError(
                f"the pruned network does not run: {message}",
                hint="this is a defect of fxprune; please report it with the dump",
            ) from error
        finally:
            for module, flag in flags.items():
                module.training = flag

    def compare(self, dtype: torch.dtype | None) -> Verification:
        """The pruned network against the masked original, in this dtype. Where the outputs hardly
        depend on the input, and so on little between, all weights are made louder as well."""
        found, moved = self.compared(dtype)
        if found.difference is None or moved:
            return found
        louder, moved = self.compared(dtype, louder=True)
        if louder.difference is not None and moved:
            return replace(louder, note="with weights scaled up, as signals fade in this network")
        return replace(found, note="the outputs hardly depend on the input, so this says little")

    def compared(
        self, dtype: torch.dtype | None, *, louder: bool = False
    ) -> tuple[Verification, bool]:
        """One comparison, and whether another input gives other outputs."""
        full, narrow = jitters(self.flow, self.kept, louder=louder)
        cast = Cast(self.pruned, dtype, narrow)
        reference = Masked(self.flow, cast, self.kept, self.widths, full)
        expected = _tensors(reference.run(*self.arguments(dtype)))
        got = _tensors(cast.run(*self.arguments(dtype)))
        worst = _worst(expected, got)
        own = dtype or next((t.dtype for t in expected if t.is_floating_point()), torch.float32)
        if dtype is not None and worst > _LIMITS.get(dtype, 0):  # forward casts to less itself
            own = reference.coarse or own
        kind = "original normalised over the kept channels" if reference.laid else "masked original"
        if not worst <= _LIMITS.get(own, 5e-2):
            raise VerificationError(
                f"the pruned network differs from the {kind} by {worst:.2e} of its largest output",
                hint="this is a defect of fxprune or of a rule; a dump (dump=) shows every step",
            )
        elements = sum(int(torch.isfinite(t).sum()) for t in expected)
        name = str(own).removeprefix("torch.")
        if not elements and any(t.numel() for t in expected):
            what = f"no output of the {kind} is finite on {self.inputs.describe()} ({name})"
            return Verification(True, note=what), False
        found = Verification(True, worst, elements, name, self.inputs.describe(), kind)
        return found, self.moves(cast, got, dtype, min(1000 * _LIMITS.get(own, 5e-2), 1e-3))

    def moves(self, cast: Cast, got: list[Tensor], dtype: torch.dtype | None, least: float) -> bool:
        """Whether another input changes an output by more than this share of the largest."""
        inputs = [_disturbed(arg) for arg in self.arguments(dtype)]
        if not any(isinstance(arg, Tensor) and arg.is_floating_point() for arg in inputs):
            return True
        return _worst(got, _tensors(cast.run(*inputs))) >= least


def _disturbed(arg: Any) -> Any:
    """Another input of the same kind: noise of the same size."""
    if not isinstance(arg, Tensor) or not arg.is_floating_point():
        return arg
    noise = torch.randn(arg.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    size = float(arg.abs().max()) if arg.numel() else 1.0
    return (noise * (size or 1.0)).to(arg)


def _worst(expected: list[Tensor], got: list[Tensor]) -> float:
    return max((_difference(a, b) for a, b in zip(expected, got, strict=True)), default=0.0)


def _difference(expected: Tensor, got: Tensor) -> float:
    if expected.shape != got.shape:
        raise VerificationError(
            f"an output changed its shape from {list(expected.shape)} to {list(got.shape)}"
        )
    if not expected.is_floating_point() and not expected.is_complex():
        return float((expected != got).any()) if expected.numel() else 0.0
    if not expected.numel():
        return 0.0
    both = torch.isfinite(expected) & torch.isfinite(got)
    if not torch.equal(torch.isfinite(expected), torch.isfinite(got)):
        return float("inf")
    scale = float(expected[both].abs().max()) if both.any() else 0.0
    gap = float((expected[both] - got[both]).abs().max()) if both.any() else 0.0
    return gap / scale if scale > 0 else gap


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(_opened(value)) if isinstance(t, Tensor)]


def _opened(value: Any) -> Any:
    """Containers pytree does not know, as dicts."""
    if is_dataclass(value) and not isinstance(value, type):
        return {f.name: _opened(getattr(value, f.name)) for f in fields(value)}
    if isinstance(value, Mapping):
        return {key: _opened(item) for key, item in value.items()}
    if isinstance(value, (tuple, list)):
        return [_opened(item) for item in value]
    return value
