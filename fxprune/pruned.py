"""The pruned network: an `fx.GraphModule` that knows its plan and pickles without tracing."""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from .plans import Plan


@dataclass(repr=False)
class Info:
    """``pruned.fxprune``: the plan that was applied and the report of what came out."""

    plan: Plan
    report: Any = None

    def __repr__(self) -> str:
        return str(self.report)


@dataclass(frozen=True)
class _Ref:
    name: str


class PrunedModule(fx.GraphModule):
    """What `prune` returns. It copies, pickles, scripts and trains like any module."""

    __jit_unused_properties__ = (*fx.GraphModule.__jit_unused_properties__, "fxprune")

    @property
    def fxprune(self) -> Info:
        return self.meta["fxprune"]

    def __reduce__(self):
        state = {
            k: v
            for k, v in self.__dict__.items()
            if k not in ("_graph", "_code", "_lineno_map", "_prologue_start")
        }
        return _rebuild, (
            state,
            _nodes(self.graph),
            self.__dict__.get("_name", type(self).__name__),
        )


def _nodes(graph: fx.Graph) -> list[tuple]:
    """The graph as plain data: nodes with references by name."""

    def refs(args: Any) -> Any:
        return fx.node.map_aggregate(args, _referred)

    return [
        (n.op, n.name, _findable(n.target), refs(n.args), refs(n.kwargs), n.meta.get("source"))
        for n in graph.nodes
    ]


@dataclass(frozen=True)
class _Function:
    """What pickle cannot write, but a module has by name."""

    module: str
    name: str


def _referred(arg: Any) -> Any:
    if isinstance(arg, (torch.memory_format, torch.layout)):
        return _Function("torch", str(arg).rpartition(".")[2])
    return _Ref(arg.name) if isinstance(arg, fx.Node) else arg


def _findable(target: Any) -> Any:
    module, name = str(getattr(target, "__module__", "")), str(getattr(target, "__name__", ""))
    local = "<locals>" in getattr(target, "__qualname__", "") and module in sys.modules
    if local and getattr(sys.modules[module], name, None) is target:
        return _Function(module, name)
    return target


def _found(target: Any) -> Any:
    if isinstance(target, _Function):
        return getattr(importlib.import_module(target.module), target.name)
    return target


def _rebuild(state: dict[str, Any], nodes: list[tuple], name: str) -> PrunedModule:
    graph = fx.Graph()
    made: dict[str, fx.Node] = {}

    def back(args: Any) -> Any:
        return _map_refs(args, made)

    for op, node_name, target, args, kwargs, source in nodes:
        made[node_name] = graph.create_node(op, _found(target), back(args), back(kwargs), node_name)
        made[node_name].meta["source"] = source
    root = nn.Module()
    root.__dict__.update(state)
    return assembled(root, graph, name)


def assembled(root: nn.Module, graph: fx.Graph, name: str) -> PrunedModule:
    """A module of this graph that has all that `root` has, used by the graph or not."""
    module = PrunedModule(root, graph, name)
    for key in ("_modules", "_parameters", "_buffers", "_non_persistent_buffers_set", "meta"):
        if key in root.__dict__:
            module.__dict__[key] = root.__dict__[key]
    module.__dict__["training"] = root.training
    return module


def _map_refs(args: Any, made: dict[str, fx.Node]) -> Any:
    if isinstance(args, _Ref):
        return made[args.name]
    if isinstance(args, _Function):
        return _found(args)
    if isinstance(args, tuple):
        items = [_map_refs(a, made) for a in args]
        return type(args)(*items) if hasattr(args, "_fields") else tuple(items)
    if isinstance(args, list):
        return [_map_refs(a, made) for a in args]
    if isinstance(args, dict):
        return {k: _map_refs(v, made) for k, v in args.items()}
    if isinstance(args, slice):
        return slice(*(_map_refs(a, made) for a in (args.start, args.stop, args.step)))
    return args
