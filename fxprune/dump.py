"""What each step of the pipeline did, as text files to read and a drawing, or as log lines.

Both hang on the hook between steps (`watch`): ``prune(model, dump="folder")`` or ``FXPRUNE_DUMP``
writes the files, ``FXPRUNE_DEBUG=1`` to ``4`` logs to stderr.
"""

from __future__ import annotations

import difflib
import logging
import os
import textwrap
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from .analysis import Analysis
from .check import tensors_of
from .errors import OptionError
from .explain import call_text, members_text, ranges, target_text
from .flow import Flow
from .groups import Constraint, Group, Groups
from .ids import Layer, Slot, Value
from .meta import OnMeta
from .plans import Kept, Plan
from .pruned import PrunedModule
from .trace import describe
from .watch import Watch

_WIDTH = 120
_BARS = " ▁▂▃▄▅▆▇█"
Row = Sequence[str]


def dump_to(folder: str | os.PathLike[str]) -> Watch:
    """A watch that writes a numbered text file after every step, and ``groups.dot``.

    The folder is made where it is missing; `OptionError` if nothing can be written there.
    """
    path = Path(folder)
    try:
        path.mkdir(parents=True, exist_ok=True)
        (path / "01-trace.txt").write_text("")
    except OSError as error:
        raise OptionError(
            f"dump={str(folder)!r} cannot be written: {error.strerror or error}",
            hint="name a folder that exists, or can be made",
        ) from None

    def watch(step: str, before: Any, after: Any) -> None:
        for name, text in _files(step, before, after):
            (path / name).write_text(text + "\n", encoding="utf-8")

    return watch


def _files(step: str, before: Any, after: Any) -> Iterator[tuple[str, str]]:
    writers: dict[str, Callable[[Any, Any], str]] = {
        "trace": trace_text,
        "flow": flow_text,
        "groups": groups_text,
        "score": score_text,
        "select": select_text,
        "rewrite": rewrite_text,
        "verify": verify_text,
    }
    number = list(writers).index(step) + 1 if step in writers else 0
    if number:
        yield f"{number:02}-{step}.txt", writers[step](before, after)
    if step == "groups":
        yield "groups.dot", groups_dot(before, after)


# -- trace -----------------------------------------------------------------------------------------


def trace_text(model: nn.Module, graph: fx.GraphModule) -> str:
    """The graph, one node a line, with shapes and the source line each came from."""
    rows = [
        [f"%{n.name}", _call(n, graph), shapes_text(n.meta.get("val")), _source(n)]
        for n in graph.graph.nodes
    ]
    calls = sum(n.op.startswith("call_") for n in graph.graph.nodes)
    head = f"{type(model).__name__}: {len(rows)} nodes, {calls} calls"
    return _page(head, _table(["node", "call", "shape", "source"], rows))


def _call(node: fx.Node, graph: fx.GraphModule) -> str:
    if node.op == "placeholder":
        return "(input)"
    if node.op == "get_attr":
        return f"self.{node.target}"
    if node.op == "output":
        return "return " + ", ".join(f"%{n.name}" for n in node.all_input_nodes)
    return _cut(call_text(node, graph), 72)


def shapes_text(value: Any) -> str:
    if isinstance(value, Tensor):
        return str(list(value.shape))
    if isinstance(value, (tuple, list)):
        return f"({', '.join(map(shapes_text, value))})"
    if isinstance(value, dict):
        return f"{{{', '.join(f'{key}: {shapes_text(v)}' for key, v in value.items())}}}"
    return "" if value is None else str(value)


def _source(node: fx.Node) -> str:
    return describe(node.meta.get("source"))


# -- flow ------------------------------------------------------------------------------------------


def flow_text(graph: fx.GraphModule, flow: Flow) -> str:
    """The channel ids of values and parameters, the rule of every node, ties, what is frozen."""
    rows = [row for node in flow.values for row in _value_rows(flow, node)]
    blocks = [
        _table(["value", "shape", "channels", "rule"], rows),
        _section("parameters", _table(["", "shape", "channels", "role"], _slot_rows(flow))),
        _section("ties", _table(["in", "channels", "", "with"], _tie_rows(flow))),
        _section("frozen", _table(["in", "channels", "because"], _frozen_rows(flow))),
        _section("no rule", [f"%{n.name} {why}   {_source(n)}" for n, why in flow.unknown.items()]),
    ]
    head = f"{flow.ids.count - 1} channel ids; `1: 9..16` means that ids 9 to 16 lie along dim 1"
    return _page(head, *blocks)


def _value_rows(flow: Flow, node: fx.Node) -> Iterator[Row]:
    leaves = pytree.tree_leaves(flow.values[node], is_leaf=lambda v: isinstance(v, Value))
    values = [leaf for leaf in leaves if isinstance(leaf, Value)]
    use = flow.rules.get(node)
    rule = f"{use.rule.name}  {use.rule.where}" if use else flow.unknown.get(node, "")
    if node.op in ("placeholder", "get_attr"):
        rule = {"placeholder": "input", "get_attr": "parameter"}[node.op]
    for i, value in enumerate(values):
        name = f"%{node.name}" + (f"[{i}]" if len(values) > 1 else "")
        layers = [layer_text(layer) for layer in value.layers] or [value.param or "-"]
        yield [name, str(list(value.shape)), layers[0], rule if i == 0 else ""]
        for text in layers[1:]:
            yield ["", "", text, ""]


def layer_text(layer: Layer) -> str:
    """``1: 9..16``: the dims along which ids vary, and the ids."""
    varying = layer.varying
    dims = ",".join(map(str, varying))
    shape = [layer.ids.shape[d] for d in varying]
    grid = f"({'x'.join(map(str, shape))}) " if len(shape) > 1 else ""
    kept = "" if layer.zero else "  (not zero where masked)"
    return f"{dims}: {grid}{ranges(layer.ids.reshape(-1).tolist(), limit=4)}{kept}"


def _slot_rows(flow: Flow) -> Iterator[Row]:
    shapes = {name: list(t.shape) for name, t in _tensors(flow.graph)}
    for param, slots in flow.ids.slots.items():
        for i, slot in enumerate(slots):
            name, shape = (param, str(shapes.get(param, ""))) if i == 0 else ("", "")
            yield [name, shape, f"{slot.dim}: {_slot_ids(slot)}", slot.role]


def _tensors(module: nn.Module) -> list[tuple[str, Tensor]]:
    return [*module.named_parameters(), *module.named_buffers()]


def _slot_ids(slot: Slot) -> str:
    text = ranges(slot.ids.reshape(-1).tolist())
    return f"{slot.ids.shape[0]} blocks of {text}" if slot.ids.ndim == 2 else text


def _tie_rows(flow: Flow) -> Iterator[Row]:
    for tie in flow.ids.ties:
        left, right = tie.left.reshape(-1).tolist(), tie.right.reshape(-1).tolist()
        yield [_node_name(tie.node), ranges(left), "~", ranges(right)]
    for what, found in (("rows", flow.ids.rows), ("columns", flow.ids.columns)):
        for each in found:
            other = "no channels" if each.other is None else ranges(each.other.reshape(-1).tolist())
            ids = ranges(each.ids.reshape(-1).tolist())
            yield [_node_name(each.node), f"{what} of {ids}", "~", other]


def _frozen_rows(flow: Flow) -> Iterator[Row]:
    for freeze in flow.ids.frozen:
        yield [_node_name(freeze.node), ranges(freeze.ids.reshape(-1).tolist()), freeze.reason]


def _node_name(node: fx.Node | None) -> str:
    return f"%{node.name}" if node is not None else ""


# -- groups ----------------------------------------------------------------------------------------


def groups_text(flow: Flow, groups: Groups) -> str:
    """A table of groups: what makes their channels, what reads them, what binds or freezes them."""
    width = min(max([len(g.name) for g in groups.groups], default=5), 48)
    lines = [f"{'group':<{width}} {'size':>5}  makes | reads"]
    for group in groups.groups:
        lines += _group_lines(group, width)
    may, all_ = groups.prunable, groups.groups
    count = f"{sum(map(len, may))} of {sum(map(len, all_))} channels"
    head = f"{len(may)} of {len(all_)} groups may shrink, {count}"
    bound = [constraint_text(groups, c) for c in groups.constraints]
    pieces = [f"one stays of {_owner(groups, piece)}" for piece in groups.keep_one]
    notes = [
        "left of | stands what makes or carries the channels, right of it what reads them",
        "x4 says that a channel has four places there",
    ]
    return _page(
        head, lines, _section("equal counts", bound), _section("never emptied", pieces), notes
    )


def _group_lines(group: Group, width: int) -> list[str]:
    made, read = members_text(group)
    text = " ".join(made) + (" | " + " ".join(read) if read else "")
    name = group.name if len(group.name) <= width else "..." + group.name[3 - width :]
    lead = f"{name:<{width}} {len(group):>5}  "
    lines = _wrapped(text, lead)
    if group.frozen is not None:
        source = describe(group.frozen.node.meta.get("source")) if group.frozen.node else ""
        lines.append(" " * len(lead) + f"frozen: {group.frozen.reason}   {source}".rstrip())
    return lines


def constraint_text(groups: Groups, constraint: Constraint) -> str:
    rows, columns = constraint.rows.shape
    owner = _owner(groups, constraint.rows)
    return (
        f"%{constraint.node.name}: {rows} blocks of {columns}, {owner}   {_source(constraint.node)}"
    )


def _owner(groups: Groups, channels: np.ndarray) -> str:
    """The groups that channels are of, with how many."""
    counts: dict[str, int] = {}
    for group in groups.groups:
        found = int(np.isin(group.channels, channels.reshape(-1)).sum())
        counts[group.name] = counts.get(group.name, 0) + found
    return _cut(", ".join(f"{count} of {name}" for name, count in counts.items() if count), 160)


# -- score and select ------------------------------------------------------------------------------


def score_text(analysis: Analysis, scores: dict[int, np.ndarray]) -> str:
    """Each group's scores from the lowest up, and how they are spread."""
    lines: list[str] = []
    for i, values in scores.items():
        group = analysis.groups[i]
        span = [f"{x:.4g}" for x in (values.min(), float(np.median(values)), values.max())]
        spread = f"min {span[0]}  median {span[1]}  max {span[2]}  {_histogram(values)}"
        lines.append(f"{group.name}  {len(group)} channels  {spread}")
        order = np.argsort(values, kind="stable")
        shown = [f"{c}:{values[c]:.4g}" for c in order[:256].tolist()]
        shown += [f"and {len(order) - 256} more"] if len(order) > 256 else []
        lines += [*_wrapped("  ".join(shown), "    "), ""]
    return _page(f"scores of {len(scores)} groups; `7:0.25` is channel 7, low ones go first", lines)


def _histogram(values: np.ndarray, bins: int = 16) -> str:
    """``▁▃█▂``: how many values lie in equal steps from the least to the greatest."""
    counts, _ = np.histogram(values, bins=bins)
    heights = np.ceil(counts / counts.max() * (len(_BARS) - 1)).astype(int)
    return "[" + "".join(_BARS[h] for h in heights) + "]"


def select_text(before: tuple[Analysis, Any], plan: Plan) -> str:
    """What the plan keeps of each group and of each parameter."""
    analysis, _ = before
    rows = [
        [g.name, f"{g.kept:>5} of {g.size}", _kept_of(group, plan, analysis), g.reason]
        for g, group in zip(plan.groups, analysis.groups, strict=False)
    ]
    params = [
        [
            name if i == 0 else "",
            f"{dim}: {_size(rows_)} of {plan.shapes[name][dim]}" if name in plan.shapes else "",
            _kept_text(rows_),
        ]
        for name, dims in plan.kept.items()
        for i, (dim, rows_) in enumerate(sorted(dims.items()))
    ]
    rate = f" at {plan.rate:g}" if plan.rate is not None else ""
    head = f"{plan.removed} channels go by {plan.criterion}{rate} ({plan.scope})"
    return _page(
        head,
        _table(["group", "kept", "channels kept", "reason"], rows),
        _section("parameters", _table(["", "dim", "indices kept"], params)),
    )


def _kept_of(group: Group, plan: Plan, analysis: Analysis) -> str:
    """The channels of a group that stay, counted within the group."""
    kept = stays(group, plan, analysis)
    return "all" if kept.all() else ranges(np.flatnonzero(kept).tolist())


def stays(group: Group, plan: Plan, analysis: Analysis) -> np.ndarray:
    """Which channels of a group stay by a plan."""
    member = group.members[0]
    kept = plan.kept.get(member.param, {}).get(member.dim)
    if kept is None:
        return np.ones(len(group), dtype=bool)
    slots = analysis.flow.ids.slots[member.param]
    width = next(s for s in slots if s.dim == member.dim).ids.shape[-1]
    flat = np.array(kept).reshape(-1)
    if member.blocks > 1:
        flat = np.concatenate([np.array(row) + b * width for b, row in enumerate(kept)])
    return np.isin(member.positions.reshape(len(group), -1)[:, 0], flat)


def _size(kept: Kept) -> int:
    return len(kept[0]) if kept and isinstance(kept[0], list) else len(kept)


def _kept_text(kept: Kept) -> str:
    if kept and isinstance(kept[0], list):
        return " | ".join(ranges(row, limit=4) for row in kept if isinstance(row, list))
    return ranges([n for n in kept if isinstance(n, int)])


# -- rewrite and verify ----------------------------------------------------------------------------


def rewrite_text(before: tuple[Analysis, Plan], pruned: nn.Module) -> str:
    """The new graph with its shapes, and its code; of a copy of a model, the new widths."""
    if not isinstance(pruned, PrunedModule):
        return _copy_text(before[0], pruned)
    shapes = new_shapes(before[0], pruned)
    rows = [
        [f"%{n.name}", _call(n, pruned), shapes_text(shapes.get(n.name)), _source(n)]
        for n in pruned.graph.nodes
    ]
    table = _table(["node", "call", "shape", "source"], rows)
    code = pruned.code.strip().splitlines()
    return _page(f"{type(pruned).__name__}: {len(rows)} nodes", table, code)


def _copy_text(analysis: Analysis, pruned: nn.Module) -> str:
    """A record has no graph that could be written anew: what changed are parameters."""
    new = {name: shapes_text(t) for name, t in tensors_of(pruned).items()}
    old = {name: shapes_text(t) for name, t in analysis.tensors.items()}
    rows = [[name, was, "->", new[name]] for name, was in old.items() if was != new[name]]
    head = (
        f"{type(pruned).__name__}: a copy of the model, {len(rows)} of {len(old)} tensors narrower"
    )
    return _page(head, _table(["", "old", "", "new"], rows))


class _Shapes(fx.Interpreter):
    """Runs a graph on the meta device and notes what each node gives."""

    def __init__(self, module: fx.GraphModule):
        super().__init__(module)
        self.found: dict[str, Any] = {}

    def run_node(self, n: fx.Node) -> Any:
        self.found[n.name] = super().run_node(n)
        return self.found[n.name]


def new_shapes(analysis: Analysis, pruned: fx.GraphModule) -> dict[str, Any]:
    inputs = [n.meta["val"] for n in analysis.graph.graph.nodes if n.op == "placeholder"]
    runner = _Shapes(pruned)
    try:
        with OnMeta(), torch.no_grad():
            runner.run(*inputs)
    except Exception as error:  # verification says it in full; the dump shows how far it went
        last = list(runner.found)[-1] if runner.found else ""
        runner.found["failed"] = f"after %{last}: {error}"
    return runner.found


def verify_text(before: tuple[Analysis, Plan], pruned: nn.Module) -> str:
    """What differs between the graphs, and what the comparison of their outputs gave."""
    analysis, _ = before
    if not isinstance(pruned, PrunedModule):
        info: Any = pruned.fxprune
        lines = str(info.report).splitlines()
        return _page(f"verified: {info.report.verification or 'no'}", lines)
    shapes = new_shapes(analysis, pruned)
    old = {n.name: _line(n, analysis.graph) for n in analysis.graph.graph.nodes}
    new = {n.name: _line(n, pruned) for n in pruned.graph.nodes}
    widths = {n.name: shapes_text(n.meta.get("val")) for n in analysis.graph.graph.nodes}
    rows = [
        [new[name], was, "->", now]
        for name, was in widths.items()
        if old[name] == new.get(name) and was != (now := shapes_text(shapes.get(name)))
    ]
    diff = list(difflib.unified_diff([*old.values()], [*new.values()], lineterm="", n=0))[2:]
    changed = [f"{line[0]} {line[1:]}" for line in diff if not line.startswith("@@")]
    report = pruned.fxprune.report
    return _page(
        f"verified: {getattr(report, 'verification', None) or 'no'}",
        str(report).splitlines(),
        _section("calls that changed (- old, + new)", changed),
        _section("widths that changed", _table(["", "old", "", "new"], rows)),
    )


def _line(node: fx.Node, graph: fx.GraphModule) -> str:
    return f"%{node.name} = {_call(node, graph)}"


# -- drawing ---------------------------------------------------------------------------------------


def groups_dot(flow: Flow, groups: Groups) -> str:
    """The graph in the DOT language, each node in the colour of its channels' group."""
    number = {c: i for i, group in enumerate(groups.groups) for c in group.channels.tolist()}
    lines = [
        "digraph groups {",
        '  node [shape=box, style=filled, fontname="sans-serif", fontsize=10];',
    ]
    for node in flow.values:
        label = [node.name, kind_of(node, flow.graph), shapes_text(node.meta.get("val"))]
        layers = layers_of(flow.values[node])
        group = _group_of(layers, groups, number)
        colour = "gray85" if layers else "white"  # frozen channels, or none
        if group is not None:
            colour = _colour(group)
            label.append(groups.groups[group].name)
        text = "\\n".join(_escaped(part) for part in label if part)
        lines.append(f'  "{_escaped(node.name)}" [label="{text}", fillcolor="{colour}"];')
    for node in flow.values:
        for operand in node.all_input_nodes:
            lines.append(f'  "{_escaped(operand.name)}" -> "{_escaped(node.name)}";')
    return "\n".join([*lines, "}"])


def kind_of(node: fx.Node, graph: fx.GraphModule) -> str:
    if node.op == "call_module":
        return type(graph.get_submodule(str(node.target))).__name__
    if node.op in ("placeholder", "output"):
        return ""
    return node.target if isinstance(node.target, str) else target_text(node.target)


def layers_of(value: Any) -> list[Layer]:
    leaves = pytree.tree_leaves(value, is_leaf=lambda v: isinstance(v, Value))
    return [layer for v in leaves if isinstance(v, Value) for layer in v.layers]


def _group_of(layers: list[Layer], groups: Groups, number: dict[int, int]) -> int | None:
    """The group that most channels are of; frozen ones have none."""
    found = [c for layer in layers for c in groups.channel[layer.ids.numpy()].reshape(-1).tolist()]
    owned = [number[c] for c in found if c in number]
    return max(set(owned), key=owned.count) if owned else None


def _colour(group: int) -> str:
    """Hues a golden angle apart, so that neighbours differ."""
    return f"{group * 0.618034 % 1:.3f} 0.35 1.0"


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", " ")


# -- log -------------------------------------------------------------------------------------------


def log_at(level: str | int) -> Watch:
    """A watch that logs to stderr: 1 steps with times, 2 groups in sum, 3 all groups, 4 nodes."""
    if str(level) not in ("1", "2", "3", "4"):
        raise OptionError(
            f"FXPRUNE_DEBUG={level} is not known",
            hint="1 logs steps and times, 2 groups in sum, 3 each group, 4 each node",
        )
    depth, logger, last = int(level), _logger(), [time.perf_counter()]

    def watch(step: str, before: Any, after: Any) -> None:
        now = time.perf_counter()
        for at, line in _log_lines(step, before, after, now - last[0]):
            if at <= depth:
                logger.info(line)
        last[0] = time.perf_counter()

    return watch


def _logger() -> logging.Logger:
    """The logger ``fxprune``; it prints to stderr unless it was given a handler of its own."""
    logger = logging.getLogger("fxprune")
    if not logger.handlers:
        handler = logging.StreamHandler()
        handler.setFormatter(logging.Formatter("fxprune: %(message)s"))
        logger.addHandler(handler)
        logger.setLevel(logging.INFO)
        logger.propagate = False
    return logger


def _log_lines(step: str, before: Any, after: Any, seconds: float) -> Iterator[tuple[int, str]]:
    yield 1, f"{step:<8} {seconds * 1000:8.1f} ms  {_summary(step, before, after)}".rstrip()
    if step == "trace":
        yield from ((4, line) for line in trace_text(before, after).splitlines()[2:])
    if step == "flow":
        yield from ((4, line) for line in flow_text(before, after).splitlines()[2:])
    if step == "groups":
        yield 2, groups_text(before, after).splitlines()[0].removeprefix("# ")
        yield from ((3, line) for group in after.groups for line in _group_lines(group, 32))
    if step == "select":
        yield 2, select_text(before, after).splitlines()[0].removeprefix("# ")
        yield from ((3, f"{g.name}  {g.kept} of {g.size}  {g.reason}") for g in after.groups)


def _summary(step: str, before: Any, after: Any) -> str:
    if step == "trace":
        return f"{len(after.graph.nodes)} nodes"
    if step == "flow":
        return (
            f"{after.ids.count - 1} ids, {len(after.ids.ties)} ties, {len(after.unknown)} no rule"
        )
    if step == "groups":
        return f"{len(after.groups)} groups"
    if step == "verify":
        return str(after.fxprune.report.verification or "not verified")
    return ""


# -- layout ----------------------------------------------------------------------------------------


def _page(head: str, *blocks: Sequence[str]) -> str:
    """A heading and blocks of lines, an empty line between them."""
    return "\n\n".join([f"# {head}", *("\n".join(block).rstrip() for block in blocks if block)])


def _section(title: str, lines: Sequence[str]) -> list[str]:
    return [f"{title}:", *(f"  {line}" for line in lines)] if lines else []


def _table(heads: Row, rows: Iterable[Row]) -> list[str]:
    """Columns side by side, the last one and a rare long cell as long as they are. Nothing where
    there are no rows."""
    rows = list(rows)
    if not rows:
        return []
    full = [heads, *rows]
    lengths = [[len(row[k]) for row in full] for k in range(len(heads) - 1)]
    widths = [max(n for n in column if n <= 60 or n == min(column)) for column in lengths]
    return [_padded(row, widths) for row in full]


def _padded(row: Row, widths: Sequence[int]) -> str:
    cells = [f"{cell:<{width}}" for cell, width in zip(row, widths, strict=False)]
    return "  ".join([*cells, row[-1]]).rstrip()


def _wrapped(text: str, lead: str) -> list[str]:
    """Text after `lead`, wrapped to the page's width and indented under itself."""
    width = max(_WIDTH, len(lead) + 40)
    return textwrap.wrap(
        text,
        width,
        initial_indent=lead,
        subsequent_indent=" " * len(lead),
        break_long_words=False,
        break_on_hyphens=False,
    ) or [lead.rstrip()]


def _cut(text: str, width: int) -> str:
    return text if len(text) <= width else text[: width - 3] + "..."


__all__ = ["dump_to", "log_at"]
