"""What fxprune knows of a model before anything is chosen: `analyze` and its `Analysis`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from . import counters
from . import rules as rule_files
from .causes import Cause, causes
from .check import check_choice, check_model, tensors_of
from .errors import RuleError
from .explain import Explanation, explain
from .flow import Flow, Mixing, flow
from .frontends import WAYS, Frontend, traced
from .groups import Group, Groups, groups
from .heads import Heads
from .ids import Freeze
from .inputs import Inputs, of_spec
from .trace import describe
from .unsure import freeze_unsure
from .watch import Watch, silent


@dataclass
class Frozen:
    """Channels that cannot go: how many, why, at which node and source line."""

    group: str
    channels: int
    reason: str
    node: str = ""
    source: str = ""


@dataclass(repr=False)
class Analysis:
    """A traced model with its channel groups.

    ``graph`` is the traced `fx.GraphModule`, ``groups`` the list of groups, ``frozen`` what cannot
    go and why.
    """

    model: nn.Module
    flow: Flow
    inputs: Inputs
    all_groups: Groups
    tensors: Mapping[str, Tensor]
    mixing: Mixing = "norms"
    scatter: bool = False
    heads: Heads = "dims"
    frontend: Frontend = "symbolic"
    warnings: list[str] = field(default_factory=list)

    @property
    def graph(self) -> fx.GraphModule:
        return self.flow.graph

    @property
    def recorded(self) -> bool:
        """Whether the graph is a record, so that a plan is applied to a copy of the model."""
        return self.frontend == "record"

    @property
    def groups(self) -> list[Group]:
        return self.all_groups.groups

    @property
    def frozen(self) -> list[Frozen]:
        return [_frozen(group) for group in self.groups if group.frozen is not None]

    def __repr__(self) -> str:
        can = [group for group in self.groups if group.prunable]
        some, every = sum(map(len, can)), sum(map(len, self.groups))
        return (
            f"Analysis of {type(self.model).__name__} on {self.inputs.describe()}: {len(can)} of "
            f"{len(self.groups)} groups can shrink, with {some:,} of {every:,} channels"
        )

    def explain(self, a: str, b: str | None = None) -> Explanation:
        """Why `a` is in its group; with `b`, the chain of ties from `a` to `b`.

        Names are of parameters (``conv1.weight``) or modules (``layer1.0.conv1``). Raises
        `OptionError` for others.
        """
        return explain(self, a, b)

    @property
    def share(self) -> float:
        """The share of all channels that could go."""
        every = sum(map(len, self.groups))
        return sum(len(group) for group in self.groups if group.prunable) / max(every, 1)

    def causes(self, most: int = 3) -> list[Cause]:
        """The costliest causes of channels that stay, and which option would free them.

        The graph is analysed again with each option, so this takes a few times as long.
        """
        return causes(self, most)

    def regroup(self) -> None:
        """Merge ties again, after something more was frozen."""
        self.all_groups = groups(self.flow)

    def macs(self, kept: Tensor | None = None) -> int:
        """Multiply-accumulates of convolutions and linear layers for one item of the batch; with
        only the ids in the mask `kept`, where given."""
        return counters.macs(self.flow, self.batch, kept)

    def counts(self, kept: Tensor | None = None) -> counters.Counts:
        """Parameters, MACs and FLOPs; with only the ids in the mask `kept`, where given."""
        return counters.counts(self.flow, self.tensors, self.batch, kept)

    @property
    def batch(self) -> int:
        first = next((v for v in self.graph.graph.nodes if v.op == "placeholder"), None)
        value = first.meta["val"] if first is not None else None
        return int(value.shape[0]) if isinstance(value, Tensor) and value.ndim > 1 else 1


def _frozen(group: Group) -> Frozen:
    freeze = group.frozen
    assert freeze is not None
    return Frozen(group.name, len(group), freeze.reason, _node_name(freeze), _source(freeze))


def _node_name(freeze: Freeze) -> str:
    return freeze.node.name if freeze.node is not None else ""


def _source(freeze: Freeze) -> str:
    return describe(freeze.node.meta.get("source")) if freeze.node is not None else ""


@torch.inference_mode(False)
def analyze(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    mixing: Mixing = "norms",
    scatter: bool = False,
    heads: Heads = "dims",
    frontend: Frontend | None = None,
    strict: bool = False,
    watch: Watch = silent,
) -> Analysis:
    """Trace a model and find its channel groups. The model is not changed.

    `example_inputs` is a tensor, a tuple of forward's arguments, or a dict of keyword arguments;
    where it is missing, a pruned network's own are taken, and else the usual shapes are tried.
    `mixing` says which ops may go on over fewer
    channels although their statistics then differ from the masked network's: "norms"
    (normalisation layers), "all" (softmax, mean, max over channels too) or "none". With `scatter`,
    streams that are added up keep their width, and each branch may lose channels of its own: what
    is left of it is scattered back before the addition. `heads` says what may go of attention
    heads: "dims", equally many of each; "whole" ones; or "keep" for neither. `frontend` forces one
    way to the graph (see `fxprune.frontends`); without it the first that works is taken. `strict`
    raises `RuleError` on an op that no rule knows, instead of freezing what reaches it.
    """
    check_model(model)
    example_inputs = _own_inputs(model) if example_inputs is None else example_inputs
    check_choice("mixing", mixing, ("norms", "all", "none"))
    check_choice("heads", heads, ("dims", "whole", "keep"))
    rules = rule_files.current()
    if frontend is not None:
        check_choice("frontend", frontend, tuple(WAYS))
    way = traced(model, example_inputs, rules, frontend)
    graph = way.graph
    watch("trace", model, graph)
    recorded = way.frontend == "record"
    how: Any = {"mixing": mixing, "scatter": scatter, "heads": heads}
    found = flow(graph, rules, **how, rewritable=not recorded)
    unsure = freeze_unsure(found) if recorded else []
    if strict and found.unknown:
        _refuse(found)
    watch("flow", graph, found)
    grouped = groups(found)
    watch("groups", found, grouped)
    tensors = tensors_of(model)
    analysis = Analysis(
        model, found, way.inputs, grouped, tensors, mixing, scatter, heads, way.frontend
    )
    if recorded and scatter:
        unsure.append("scatter needs a graph that can be written anew: streams are coupled instead")
    analysis.warnings = [*unsure, *_warnings(found, grouped)]
    return analysis


def _own_inputs(model: Any) -> Any:
    """Those that a pruned network was pruned with, where its plan knows them."""
    plan = getattr(getattr(model, "fxprune", None), "plan", None)
    spec = getattr(plan, "inputs", None)
    if spec is None:
        return None
    inputs = of_spec(spec)
    return inputs.kwargs or inputs.args


def _refuse(found: Flow) -> None:
    node, reason = next(iter(found.unknown.items()))
    raise RuleError(
        f"{_target(node)} {reason}",
        details=[("node", f"%{node.name}"), ("at", describe(node.meta.get("source")))],
        hint="add a line to a rule file and load it with fxprune.rules.load, "
        "or leave strict out to freeze what it touches",
    )


def _warnings(found: Flow, grouped: Groups):
    """What the graph does not hold; unknown ops, once each, with their cost in channels."""
    cost: dict[str, int] = {}
    for group in grouped.groups:
        node = group.frozen.node if group.frozen is not None else None
        if node is not None and node in found.unknown:
            cost[node.name] = cost.get(node.name, 0) + len(group)
    for text, source in found.graph.meta.get("fxprune_notes", ()):
        yield text + (f" ({describe(source)})" if source else "")
    for node, reason in found.unknown.items():
        if cost.get(node.name):
            what = f"%{node.name} ({_target(node)}) {reason}"
            where = describe(node.meta.get("source"))
            yield f"{what}: {cost[node.name]} channels are frozen because of it ({where})"


def _target(node: fx.Node) -> str:
    if isinstance(node.target, (str, torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(node.target)
    return torch.typename(node.target)
