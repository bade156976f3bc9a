"""What the viewer shows, as plain data: written into a dump as ``view.json``, after every step."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from torch import fx, nn
from torch.utils import _pytree as pytree

from .. import dump
from ..analysis import Analysis
from ..explain import call_text, ranges
from ..files import write_text
from ..flow import Flow
from ..groups import Group, Groups
from ..ids import Value
from ..plans import Plan
from ..pruned import PrunedModule
from ..report import Report
from ..trace import describe
from ..watch import Watch
from .layout import positions

FILE = "view.json"
VERSION = 1
STEPS = ("trace", "flow", "groups", "score", "select", "rewrite", "verify")
_BINS = 32
_TIES = 200  # of a group; more say nothing new


def record_to(folder: str | os.PathLike[str]) -> Watch:
    """A watch that keeps ``view.json`` up to date in a folder that is there."""
    path, data, last = Path(folder) / FILE, _empty(), [time.perf_counter()]
    path.unlink(missing_ok=True)
    sayers: dict[str, Callable[..., str]] = {
        "trace": _trace, "flow": _flow, "groups": _groups, "score": _score, "select": _select,
        "rewrite": _rewrite, "verify": _verify,
    }  # fmt: skip

    def watch(step: str, before: Any, after: Any) -> None:
        seconds = time.perf_counter() - last[0]
        if step in sayers:
            summary = sayers[step](data, before, after)
            data["steps"] = [each for each in data["steps"] if each["name"] != step]
            data["steps"].append({"name": step, "seconds": seconds, "summary": summary})
            write_text(path, json.dumps(data, separators=(",", ":")))
        last[0] = time.perf_counter()

    return watch


def _empty() -> dict[str, Any]:
    from .. import __version__

    return {
        "version": VERSION, "fxprune": __version__, "model": "", "steps": [], "nodes": [],
        "groups": [], "layers": [], "constraints": [], "report": None,
    }  # fmt: skip


# -- trace, flow -----------------------------------------------------------------------------------


def _trace(data: dict[str, Any], model: nn.Module, graph: fx.GraphModule) -> str:
    nodes = list(graph.graph.nodes)
    places = positions({n.name: [i.name for i in n.all_input_nodes] for n in nodes})
    data["model"] = type(model).__name__
    data["nodes"] = [_node(node, graph, places[node.name]) for node in nodes]
    return f"{len(nodes)} nodes, {sum(n.op.startswith('call_') for n in nodes)} calls"


def _node(node: fx.Node, graph: fx.GraphModule, place: tuple[int, int]) -> dict[str, Any]:
    call = {"placeholder": "input", "output": "output", "get_attr": f"self.{node.target}"}
    return {
        "id": node.name,
        "kind": dump.kind_of(node, graph),
        "call": call.get(node.op) or call_text(node, graph),
        "shape": dump.shapes_text(node.meta.get("val")),
        "source": describe(node.meta.get("source")),
        "inputs": [each.name for each in node.all_input_nodes],
        "at": place,
        "groups": [],
    }


def _flow(data: dict[str, Any], graph: fx.GraphModule, flow: Flow) -> str:
    for node, found in zip(graph.graph.nodes, data["nodes"], strict=False):
        use = flow.rules.get(node)
        found["rule"] = f"{use.rule.name}, {use.rule.where}" if use else ""
        found["unknown"] = flow.unknown.get(node, "")
        found["ids"] = _ids(flow, node)
    return (
        f"{flow.ids.count - 1:,} channel ids, {len(flow.ids.ties):,} ties, "
        f"{len(flow.unknown)} ops without a rule"
    )


def _ids(flow: Flow, node: fx.Node) -> list[str]:
    """What a value carries, as ``dim 1: 9..16``."""
    return [f"dim {dump.layer_text(layer)}" for layer in dump.layers_of(flow.values.get(node))][:6]


# -- groups ----------------------------------------------------------------------------------------


def _groups(data: dict[str, Any], flow: Flow, groups: Groups) -> str:
    numbers = [groups.channel, *(group.channels for group in groups.groups)]
    owner = np.full(max(int(each.max(initial=0)) for each in numbers) + 1, -1)
    for i, group in enumerate(groups.groups):
        owner[group.channels] = i
    data["groups"] = [_group(group) for group in groups.groups]
    named = {found["id"]: found for found in data["nodes"]}
    for (node, values), found in zip(flow.values.items(), data["nodes"], strict=False):
        found["groups"] = _carried(values, groups, owner)
        found["frozen"] = _frozen_at(flow, node)
    for i, group in enumerate(groups.groups):
        made = {m.node.name for m in group.members if m.node and m.role == "out"}
        for name in made & named.keys() if group.frozen else ():
            named[name]["groups"] = named[name]["groups"] or [[i, len(group)]]
    for tie, source in _ties(flow, groups, owner):
        own = data["groups"][tie]["ties"]
        if source not in own and len(own) < _TIES:
            own.append(source)
    data["constraints"] = [dump.constraint_text(groups, each) for each in groups.constraints]
    may = groups.prunable
    channels = f"{sum(map(len, may)):,} of {sum(map(len, groups.groups)):,} channels"
    return f"{len(may)} of {len(groups.groups)} groups may shrink, {channels}"


def _group(group: Group) -> dict[str, Any]:
    stays = group.frozen
    node = stays.node if stays else None
    return {
        "name": group.name,
        "size": len(group),
        "stays": stays.reason if stays else "",
        "stays_at": node.name if node else "",
        "stays_source": describe(node.meta.get("source")) if node else "",
        "members": [
            [f"{m.param}[{m.dim}]", m.role, m.node.name if m.node else ""] for m in group.members
        ],
        "ties": [],
        "kept": None,
        "reason": "",
    }


def _carried(values: Any, groups: Groups, owner: np.ndarray) -> list[list[int]]:
    """The groups whose channels a node's values carry, with how many; the largest first."""
    counts: dict[int, set[int]] = {}
    leaves = pytree.tree_leaves(values, is_leaf=lambda v: isinstance(v, Value))
    for layer in (layer for v in leaves if isinstance(v, Value) for layer in v.layers):
        channels = np.unique(groups.channel[layer.ids.numpy().reshape(-1)])
        for channel in channels[channels > 0].tolist():
            counts.setdefault(int(owner[channel]), set()).add(channel)
    found = [[group, len(channels)] for group, channels in counts.items() if group >= 0]
    return sorted(found, key=lambda each: -each[1])


def _frozen_at(flow: Flow, node: fx.Node) -> list[str]:
    return list(dict.fromkeys(f.reason for f in flow.ids.frozen if f.node is node))


def _ties(flow: Flow, groups: Groups, owner: np.ndarray) -> Iterator[tuple[int, list[str]]]:
    """Every place that ties channels of a group, with the call and its source line."""
    for tie in groups.ties:
        if tie.node is None:
            continue
        channels = np.unique(groups.channel[tie.left.numpy().reshape(-1)])
        for group in {int(owner[c]) for c in channels.tolist() if c > 0 and owner[c] >= 0}:
            source = describe(tie.node.meta.get("source"))
            yield group, [tie.node.name, call_text(tie.node, flow.graph), source]


# -- score, select ---------------------------------------------------------------------------------


def _score(data: dict[str, Any], analysis: Analysis, scores: Mapping[int, np.ndarray]) -> str:
    for i, values in scores.items():
        counts, edges = np.histogram(values, bins=min(_BINS, max(len(values), 1)))
        data["groups"][i]["scores"] = {
            "low": float(edges[0]), "high": float(edges[-1]), "counts": counts.tolist(),
        }  # fmt: skip
    return f"{len(scores)} groups scored"


def _select(data: dict[str, Any], before: tuple[Analysis, Mapping[int, Any]], plan: Plan) -> str:
    analysis, scores = before
    for i, (found, choice) in enumerate(zip(data["groups"], plan.groups, strict=False)):
        found["kept"], found["reason"] = choice.kept, choice.reason
        stays = dump.stays(analysis.groups[i], plan, analysis)
        found["kept_channels"] = ranges(np.flatnonzero(stays).tolist(), limit=40)
        if i in scores:
            found["scores"] |= _cut(np.asarray(scores[i]), stays, len(found["scores"]["counts"]))
    rate = f" at {plan.rate:g}" if plan.rate is not None else ""
    return f"{plan.removed:,} channels go by {plan.criterion}{rate} ({plan.scope})"


def _cut(values: np.ndarray, stays: np.ndarray, bins: int) -> dict[str, Any]:
    """How many of each bin go, and where the cut lies, if all that go score lower."""
    gone, _ = np.histogram(values[~stays], bins=bins, range=(values.min(), values.max()))
    clean = stays.any() and not stays.all() and values[~stays].max() <= values[stays].min()
    cut = float(values[~stays].max() + values[stays].min()) / 2 if clean else None
    return {"gone": gone.tolist(), "cut": cut}


# -- rewrite, verify -------------------------------------------------------------------------------


def _rewrite(data: dict[str, Any], before: tuple[Analysis, Plan], pruned: nn.Module) -> str:
    if not isinstance(pruned, PrunedModule):
        return "a copy of the model, with narrower parameters"
    analysis, _ = before
    shapes = dump.new_shapes(analysis, pruned)
    new = {node.name: node for node in pruned.graph.nodes}
    changed = 0
    for found in data["nodes"]:
        node = new.get(found["id"])
        if node is None:
            continue
        found["new_shape"] = dump.shapes_text(shapes.get(node.name))
        call = call_text(node, pruned) if node.op.startswith("call_") else found["call"]
        if call != found["call"]:
            found["new_call"], changed = call, changed + 1
    _added(data, pruned, shapes)
    corrected = f"{changed or 'no'} call{'' if changed == 1 else 's'} corrected"
    return f"{corrected}, {len(pruned.graph.nodes)} nodes"


def _added(data: dict[str, Any], pruned: fx.GraphModule, shapes: Mapping[str, Any]) -> None:
    """Nodes that only the new graph has, as gathers, are listed with those that take them."""
    known = {found["id"]: found for found in data["nodes"]}
    for node in pruned.graph.nodes:
        if node.name not in known and node.op.startswith("call_"):
            text = f"{call_text(node, pruned)} → {dump.shapes_text(shapes.get(node.name))}"
            for user in (known[u.name] for u in node.users if u.name in known):
                user.setdefault("added", []).append(text)


def _verify(data: dict[str, Any], before: Any, pruned: Any) -> str:
    report: Report | None = pruned.fxprune.report
    if report is None:
        return "not verified"
    data["layers"] = [
        [row.name, row.width, row.params, row.macs] for row in report.layers if row.width
    ]
    title, inputs = report.heading()
    data["report"] = {
        "title": title, "inputs": inputs, "channels": report.channels, "params": report.params,
        "macs": report.macs, "warnings": report.warnings,
        "causes": [[c.channels, c.where, c.remedy] for c in report.causes],
    }  # fmt: skip
    return str(report.verification or "not verified")
