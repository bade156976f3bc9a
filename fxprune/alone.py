"""One node of a graph alone: its call over chosen channels, with inputs, ready to be run."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn

from .analysis import Analysis
from .ids import Value
from .inputs import Inputs
from .plain import is_plain
from .rewrite import Writer
from .trees import has_tensors, leaves, mapped
from .widths import Widths


class Alone:
    """A node's call with only the ids in the mask `kept`, written by the rewriter itself.

    ``signature`` says all that its time depends on: ops, settings, shapes, dtypes, memory layouts;
    equal calls of two networks have the same. It is empty where the pruned network has no such
    call. Raises `RewriteError` where the choice cannot be written there.
    """

    def __init__(self, analysis: Analysis, node: fx.Node, kept: Tensor):
        widths = Widths(analysis.flow, kept)
        rows = {name: widths.kept_of(name) for name in params_of(analysis, node)}
        self.writer = Writer(analysis.model, analysis.flow, kept, rows)
        self.standins: list[Any] = []
        if node not in self.writer.dropped or node in analysis.flow.gathers:
            self._write(node)
        self.signature = "; ".join(_described(self.writer, self.standins))

    def _write(self, node: fx.Node) -> None:
        gathered = node in self.writer.dropped
        sources = [self.writer.flow.gathers[node].source] if gathered else node.all_input_nodes
        for operand in sources:
            self._bring(operand)
        self.writer.write(node)
        self.writer.graph.output(self.writer.env[node])

    def _bring(self, node: fx.Node) -> None:
        """An operand: a tensor is given, a number is computed from what is given."""
        writer = self.writer
        if node in writer.env:
            return
        if node.op in ("get_attr", "placeholder") and not _is_input(node):
            writer.write(node)
            self.standins += [node.meta["val"]] if node.op == "placeholder" else []
        elif has_tensors(node.meta["val"]):
            self.standins.append(_narrowed(writer.widths, node))
            writer.env[node] = writer.graph.placeholder(node.name)
        else:
            for operand in node.all_input_nodes:
                self._bring(operand)
            writer.write(node)

    def module(self, device: torch.device) -> nn.Module:
        """The call as a module on a device."""
        module = self.writer.module()
        tensors = [*module.parameters(), *module.buffers()]
        if not any(tensor.is_meta for tensor in tensors):
            return module.to(device)
        module.to_empty(device=device)
        for tensor in (*module.parameters(), *module.buffers()):
            tensor.data = filled(tensor, device)
        return module

    def inputs(self, device: torch.device) -> Inputs:
        """What it is called with, of random values."""

        def fill(value: Any) -> Any:
            return filled(value, device) if isinstance(value, Tensor) else value

        return Inputs(tuple(mapped(fill, each) for each in self.standins), {})


def params_of(analysis: Analysis, node: fx.Node) -> list[str]:
    """Names of parameters and buffers that a node reads."""
    aliases: dict[str, str] = analysis.graph.meta.get("fxprune_aliases", {})
    values = (analysis.flow.values.get(operand) for operand in node.all_input_nodes)
    found = [value.param for each in values for value in leaves(each, Value) if value.param]
    if node.op == "call_module":
        module = analysis.graph.get_submodule(str(node.target))
        own = [*module.named_parameters(), *module.named_buffers()]
        found += [f"{node.target}.{name}" for name, _ in own]
    return [aliases.get(name, name) for name in found]


def filled(like: Tensor, device: torch.device) -> Tensor:
    """A tensor of this shape, dtype and memory layout: random numbers in [0, 1), and zeros for
    what may be an index."""
    order = _order(like)
    shape = [like.shape[d] for d in order]
    made = torch.zeros(shape, dtype=like.dtype, device=device)
    if like.is_floating_point() or like.is_complex():
        source = torch.Generator(device).manual_seed(0)  # the user's random numbers stay theirs
        made.copy_(torch.rand(shape, generator=source, device=device))
    return made.permute([order.index(d) for d in range(like.ndim)])


def _is_input(node: fx.Node) -> bool:
    return node.op == "placeholder" and has_tensors(node.meta["val"])


def _narrowed(widths: Widths, node: fx.Node) -> Any:
    """What a node gives, on the meta device, without the channels that went."""
    tensors = leaves(node.meta["val"], Tensor)
    values = leaves(widths.value(node), Value)
    known = len(values) == len(tensors)
    shapes = [widths.shape(node, value) for value in values] if known else []
    rest = iter(shapes or [tuple(tensor.shape) for tensor in tensors])

    def narrow(value: Any) -> Any:
        return _like(value, next(rest)) if isinstance(value, Tensor) else value

    return mapped(narrow, node.meta["val"])


def _like(tensor: Tensor, shape: tuple[int, ...]) -> Tensor:
    """A tensor of another shape whose dims lie in memory in the same order."""
    order = _order(tensor)
    made = torch.empty([shape[d] for d in order], dtype=tensor.dtype, device="meta")
    return made.permute([order.index(d) for d in range(tensor.ndim)])


def _order(tensor: Tensor) -> list[int]:
    """Dims from the outermost in memory to the innermost."""
    strides = tensor.stride()
    dims = list(range(tensor.ndim))
    return dims if 0 in strides else sorted(dims, key=lambda d: strides[d], reverse=True)


# -- signatures ------------------------------------------------------------------------------------


def _described(writer: Writer, standins: list[Any]):
    """A text a node of the new graph."""
    places = {node: f"%{i}" for i, node in enumerate(writer.graph.nodes)}
    given = iter(standins)
    for node in writer.graph.nodes:
        rest = fx.node.map_aggregate(
            (node.args, node.kwargs), lambda a: _Place(places[a]) if isinstance(a, fx.Node) else a
        )
        yield f"{_target(writer, node, given)} {rest}"


class _Place(str):
    __slots__ = ()
    __repr__ = str.__str__


def _target(writer: Writer, node: fx.Node, given) -> str:
    if node.op == "placeholder":
        return _layout(next(given))
    if node.op == "get_attr":
        name = str(node.target)
        return _layout(writer.root[name] if name in writer.root else writer.constants[name])
    if node.op == "call_module":
        return ", ".join(map(_settings, writer.root[str(node.target)].modules()))
    return node.target if isinstance(node.target, str) else _function(node.target)


def _layout(value: Any) -> str:
    tensors = mapped(lambda v: _Place(_tensor(v)) if isinstance(v, Tensor) else v, value)
    return str(tensors)


def _tensor(tensor: Tensor) -> str:
    kind = str(tensor.dtype).removeprefix("torch.")
    packed = "" if tensor.is_contiguous() else f" strides {tensor.stride()}"
    return f"{kind}{list(tensor.shape)}{packed}"


def _settings(module: nn.Module) -> str:
    """A layer's kind, its plain attributes, and the shapes of its own tensors."""
    own = vars(module).items()
    plain = {k: v for k, v in own if k[0] != "_" and k != "training" and is_plain(v)}
    tensors = {**module._parameters, **module._buffers}
    return f"{torch.typename(type(module))} {plain} {_layout(tensors)}"


def _function(target: Callable[..., Any]) -> str:
    """Its name; two functions of the user's may share one, but not their code."""
    name, code = torch.typename(target), getattr(target, "__code__", None)
    if code is None or name.startswith("torch."):
        return name
    return f"{name} {hashlib.sha256(code.co_code + repr(code.co_consts).encode()).hexdigest()[:8]}"
