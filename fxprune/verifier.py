"""Step `verify`: proof that the new graph computes the masked old one.

Shapes are proven by running the new graph on the meta device. Numbers are compared on one input, in
float64: the pruned network against the original with every dropped element of every parameter set
to zero. Parameters that are constant (a zero-initialised layer) get the same noise in both. Where a
normalisation takes statistics over channels that went, the reference normalises over the kept ones.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .check import tensors_of
from .errors import VerificationError
from .flow import Flow
from .ids import Value
from .inputs import Inputs, random_like
from .plans import Kept
from .rules import current
from .trace import OnMeta, unchanged_shape
from .widths import Widths, gather

_LIMITS = {torch.float64: 1e-9, torch.float32: 1e-3}


@dataclass(frozen=True)
class Verification:
    """What was compared. ``difference`` is the largest, relative to the largest reference value."""

    shapes: bool
    difference: float | None = None
    elements: int = 0
    dtype: str = ""
    input: str = ""
    reference: str = ""

    def __str__(self) -> str:
        if self.difference is None:
            return "shapes proven; numbers not compared"
        what = f"{self.elements} outputs on {self.input} ({self.dtype})"
        worst = f"at most {self.difference:.1e} of the largest"
        return f"shapes proven; {what} differ from the {self.reference} by {worst}"


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
    with OnMeta(), torch.no_grad():
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
                f"the pruned graph does not run at %{n.name}: {str(error).splitlines()[0]}",
                details=[("node", n.format_node() or "")],
                hint="this is a defect of fxprune, or of a rule; please report it with the dump",
            ) from error
        n.meta["val"] = found
        return found

    def call_module(self, target, args, kwargs):
        module = self.submodules[target]
        with torch._C.DisableTorchFunction():
            found = unchanged_shape(self.rules, module, args, kwargs)
        return module(*args, **kwargs) if found is None else found


def verify_numbers(
    flow: Flow,
    pruned: fx.GraphModule,
    kept: Mapping[str, dict[int, Kept]],
    widths: Widths,
    inputs: Inputs,
) -> Verification:
    """Compare the pruned network with its reference; `VerificationError` if they differ."""
    errors: list[Exception] = []
    for dtype in (torch.float64, None):
        try:
            return _compare(flow, pruned, kept, widths, inputs, dtype)
        except VerificationError:
            raise
        except RuntimeError as error:  # code that fixes a dtype does not run in another
            errors.append(error)
    raise VerificationError(
        f"the original or the pruned network does not run: {errors[-1]}"
    ) from errors[-1]


def _compare(flow, pruned, kept, widths, inputs: Inputs, dtype: torch.dtype | None) -> Verification:
    device = next((t.device for t in flow.graph.parameters()), torch.device("cpu"))
    full, narrow = _jitters(flow, kept)
    cast = _Cast(pruned, dtype, narrow)
    reference = _Masked(flow, cast, kept, widths, full)
    with torch.no_grad():
        _run_itself(flow, pruned, inputs, device)
        expected = _tensors(reference.run(*_arguments(flow, inputs, dtype, device)))
        got = _tensors(cast.run(*_arguments(flow, inputs, dtype, device)))
    own = dtype or next((t.dtype for t in expected if t.is_floating_point()), torch.float32)
    worst = max((_difference(a, b) for a, b in zip(expected, got, strict=True)), default=0.0)
    elements = sum(t.numel() for t in expected)
    names = {True: "original normalised over the kept channels", False: "masked original"}
    result = Verification(
        True,
        worst,
        elements,
        str(own).removeprefix("torch."),
        inputs.describe(),
        names[bool(flow.mixing)],
    )
    if not worst <= _LIMITS.get(own, 5e-2):
        raise VerificationError(
            f"the pruned network differs from the {result.reference} by {worst:.2e} of its largest",
            hint="this is a defect of fxprune or of a rule; a dump (dump=) shows every step",
        )
    return result


def _run_itself(flow: Flow, pruned: fx.GraphModule, inputs: Inputs, device: torch.device) -> None:
    """Run the module as its user will: generated code, own dtype."""
    dtype = next((p.dtype for p in pruned.parameters() if p.is_floating_point()), None)
    flags = {module: module.training for module in pruned.modules()}
    buffers = {name: b.clone() for name, b in pruned.named_buffers(remove_duplicate=False)}
    pruned.eval()
    try:
        functional_call(pruned, buffers, tuple(_arguments(flow, inputs, dtype, device)))
    except Exception as error:
        raise VerificationError(
            f"the pruned network does not run: {type(error).__name__}: {error}",
            hint="this is a defect of fxprune; please report it with the dump",
        ) from error
    finally:
        for module, flag in flags.items():
            module.training = flag


def _arguments(
    flow: Flow, inputs: Inputs, dtype: torch.dtype | None, device: torch.device
) -> list[Any]:
    """Fresh copies of the inputs, in the order of the graph's placeholders."""
    real = random_like(inputs, dtype=dtype, device=device)
    leaves = iter([*real.args, *real.kwargs.values()])
    return [next(leaves, n.meta["val"]) for n in flow.graph.graph.nodes if n.op == "placeholder"]


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


Jitter = Callable[[str], "Tensor | None"]


def _jitters(flow: Flow, kept: Mapping[str, dict[int, Kept]]) -> tuple[Jitter, Jitter]:
    """Noise for parameters that are constant, in the original's and in the pruned shape.

    Behind a layer that starts as all zeros nothing could be told apart; both networks get the same
    noise there, so that the comparison depends on every layer.
    """
    aliases: dict[str, str] = flow.graph.meta.get("fxprune_aliases", {})
    tensors = tensors_of(flow.graph)

    @cache
    def full(name: str) -> Tensor | None:
        name = aliases.get(name, name)
        value = tensors.get(name)
        if value is None or not value.is_floating_point() or not _constant(value):
            return None
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        size = max(abs(float(value.flatten()[0])), 0.2)
        return (torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.5) * size

    def narrow(name: str) -> Tensor | None:
        noise = full(name)
        return None if noise is None else gather(noise, kept.get(aliases.get(name, name), {}))

    return full, narrow


def _constant(value: Tensor) -> bool:
    flat = value.detach().flatten()
    if flat.numel() < 2 or not bool((flat[:64] == flat[0]).all()):
        return False
    return bool((flat == flat[0]).all())


class _Cast(fx.Interpreter):
    """Runs a graph in eval mode with every parameter cast to one dtype on the way, none changed."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype | None, jitter: Jitter):
        super().__init__(module, garbage_collect_values=True)
        self.dtype, self.jitter = dtype, jitter

    def tensor(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value.clone() if isinstance(value, Tensor) else value
        found = value.detach().to(self.dtype or value.dtype, copy=True)
        noise = self.jitter(name)
        return found if noise is None else found + noise.to(found)

    def fetch_attr(self, target: str) -> Any:
        flag = target.rpartition(".")[2] == "training"
        return False if flag else self.tensor(target, super().fetch_attr(target))

    def call_module(self, target, args, kwargs):
        module = self.module.get_submodule(target)
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        state = {name: self.tensor(f"{target}.{name}", value) for name, value in own.items()}
        was = module.training
        module.training = False
        try:
            return functional_call(module, state, args, kwargs)
        finally:
            module.training = was


class _Masked(_Cast):
    """The original with dropped elements of its parameters zeroed."""

    def __init__(
        self,
        flow: Flow,
        pruned: _Cast,
        kept: Mapping[str, dict[int, Kept]],
        widths: Widths,
        jitter: Jitter,
    ):
        super().__init__(flow.graph, pruned.dtype, jitter)
        self.flow, self.kept, self.widths = flow, kept, widths
        self.aliases: dict[str, str] = flow.graph.meta.get("fxprune_aliases", {})
        self.narrow = {n.name: n for n in pruned.graph.nodes}
        self.pruned = pruned

    def tensor(self, name: str, value: Any) -> Any:
        found = super().tensor(name, value)
        kept = self.kept.get(self.aliases.get(name, name))
        return mask(found, kept) if kept else found

    def run_node(self, n: fx.Node) -> Any:
        twin = self.narrow.get(n.name)
        if n in self.flow.mixing and twin is not None and self._shrinks(n):
            return self._over_kept(n, twin)
        found = super().run_node(n)
        value = self.flow.values.get(n)
        if (
            isinstance(value, Value)
            and value.weight
            and isinstance(found, Tensor)
            and n.op != "get_attr"
        ):
            # what a weight is computed from may be divided by its own norm: 0 / 0 is no weight
            keep = self._mask(value, found.shape).to(found.device)
            return torch.where(keep, found, torch.zeros_like(found))
        return found

    def _shrinks(self, n: fx.Node) -> bool:
        return any(self.widths.changed(self.widths.value(o)) for o in n.all_input_nodes)

    def _over_kept(self, n: fx.Node, twin: fx.Node) -> Any:
        """The op over the kept channels alone, laid back into a full tensor of zeros."""
        args, kwargs = fx.node.map_aggregate(
            (n.args, n.kwargs), lambda a: self._taken(a) if isinstance(a, fx.Node) else a
        )
        literals = (twin.args, twin.kwargs)
        args, kwargs = _merge((args, kwargs), (n.args, n.kwargs), literals)
        found = getattr(self.pruned, n.op)(twin.target, args, kwargs)
        values = pytree.tree_leaves(self.flow.values[n], is_leaf=lambda v: isinstance(v, Value))
        leaves, spec = pytree.tree_flatten(found)
        laid = [
            self._laid(n, v, t) if isinstance(t, Tensor) else t
            for v, t in zip(values, leaves, strict=True)
        ]
        return pytree.tree_unflatten(laid, spec)

    def _mask(self, value: Value, shape) -> Tensor:
        mask_ = torch.ones(tuple(shape), dtype=torch.bool)
        for layer in self.widths.layers(value):
            mask_ &= self.widths.kept[layer.ids]
        return mask_

    def _taken(self, node: fx.Node) -> Any:
        found, value = self.env[node], self.flow.values.get(node)
        if not isinstance(value, Value) or not isinstance(found, Tensor):
            return found
        return found[self._mask(value, found.shape).to(found.device)].reshape(
            self.widths.shape(node, value)
        )

    def _laid(self, n: fx.Node, value: Value, found: Tensor) -> Tensor:
        full = torch.zeros(value.shape, dtype=found.dtype, device=found.device)
        full[self._mask(value, value.shape).to(found.device)] = found.reshape(-1)
        return full


def _merge(run: Any, old: Any, new: Any) -> Any:
    """Tensors as computed, everything else as written in the new graph."""
    if isinstance(old, fx.Node):
        return run if isinstance(run, Tensor) else new if not isinstance(new, fx.Node) else run
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)) and len(old) == len(new):
        return type(old)(_merge(r, o, n) for r, o, n in zip(run, old, new, strict=True))
    if isinstance(old, dict):
        return {
            key: _merge(run[key], old[key], new[key]) if key in old else new[key] for key in new
        }
    return new


def mask(tensor: Tensor, kept: dict[int, Kept]) -> Tensor:
    """The tensor with everything but the kept indices set to zero."""
    keep = torch.zeros(tensor.shape, dtype=torch.bool)
    blocks = next((rows for rows in kept.values() if rows and isinstance(rows[0], list)), None)
    if blocks is None:
        keep[...] = True
        for dim, rows in kept.items():
            line = torch.zeros(tensor.shape[dim], dtype=torch.bool)
            line[rows] = True
            keep &= line.view([-1 if d == dim else 1 for d in range(tensor.ndim)])
    else:
        _keep_blocks(keep, kept, len(blocks))
    return tensor * keep.to(tensor.device)


def _keep_blocks(keep: Tensor, kept: dict[int, Kept], left: int) -> None:
    own = {dim: rows for dim, rows in kept.items() if isinstance(rows[0], list)}
    first = kept.get(0, list(range(keep.shape[0])))
    size = len(first) // left
    for b in range(left):
        rows = first[b * size : (b + 1) * size]
        part = torch.ones((len(rows), *keep.shape[1:]), dtype=torch.bool)
        for dim, lists in kept.items():
            if dim != 0:
                line = torch.zeros(keep.shape[dim], dtype=torch.bool)
                line[lists[b] if dim in own else lists] = True
                part &= line.view([-1 if d == dim else 1 for d in range(keep.ndim)])
        keep[torch.tensor(rows)] = part


def _meta(value: Any) -> Any:
    return value.to("meta") if isinstance(value, Tensor) else value


def _tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(_opened(value)) if isinstance(t, Tensor)]


def _opened(value: Any) -> Any:
    """Containers pytree does not know, as dicts."""
    if hasattr(value, "__dataclass_fields__"):
        return {key: _opened(getattr(value, key)) for key in value.__dataclass_fields__}
    if isinstance(value, Mapping):
        return {key: _opened(item) for key, item in value.items()}
    return value
