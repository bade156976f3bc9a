"""Why two slices go together: the chain of ties between them."""

from __future__ import annotations

import itertools
import operator
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import fx

from .errors import OptionError, nearest
from .groups import Group, Member
from .ids import Slot
from .trace import describe

if TYPE_CHECKING:
    from .analysis import Analysis

_HOW = {
    "in": "read",
    "through": "carried on",
    "scale": "scaled",
    "out": "made",
    "free": "held",
}


_SIGNS = {
    operator.add: "+",
    operator.sub: "-",
    operator.mul: "*",
    operator.truediv: "/",
    operator.floordiv: "//",
    operator.mod: "%",
    operator.pow: "**",
    operator.matmul: "@",
}


@dataclass(frozen=True)
class Step:
    """One link of a chain: what is tied to what, at which node, on which source line."""

    left: str
    right: str
    node: str
    source: str
    how: str = "meet"

    def __str__(self) -> str:
        at = f" in {self.node}" if self.node else ""
        where = f"\n    {self.source}" if self.source else ""
        return f"{self.left} ~ {self.right}\n    {self.how}{at}{where}"


@dataclass(frozen=True, repr=False)
class Explanation:
    """An answer of `Analysis.explain`, as text and as steps."""

    title: str
    steps: tuple[Step, ...] = ()
    lines: tuple[str, ...] = ()

    def __repr__(self) -> str:
        return str(self)

    def __str__(self) -> str:
        blocks = [str(step) for step in self.steps] + list(self.lines)
        lines = [f"  {line}" for block in blocks for line in block.splitlines()]
        return "\n".join([self.title, *lines])


def explain(analysis: Analysis, a: str, b: str | None = None) -> Explanation:
    """The groups of `a`, or the chain of ties from `a` to `b`.

    Where the two are not coupled, but `b` reads what `a` makes (or the other way round), the chain
    shows that. Raises `OptionError` for names not known.
    """
    for name in (a, a if b is None else b):
        _check_name(name)
    slots = [slot for per in analysis.flow.ids.slots.values() for slot in per]
    if b is None:
        return _groups_of(analysis, a, _meant(a, slots))
    _meant(a, slots), _meant(b, slots)
    ties = _Ties(analysis)
    if _meant(a, slots) == _meant(b, slots):
        return Explanation(f"{a} and {b} are the same:", lines=(_in_groups(analysis, a, slots),))
    for x, y, read in ((a, b, False), (a, b, True), (b, a, True)):
        steps = ties.chain(_meant(x, slots), _meant(y, slots, read))
        if steps:
            title = f"{a} and {b} are coupled:"
            if read:
                title = f"{a} and {b} are not coupled, but {y} reads what {x} makes:"
            return Explanation(title, tuple(steps))
    lines = tuple(_in_groups(analysis, name, slots) for name in (a, b))
    return Explanation(f"{a} and {b} are not coupled:", lines=lines)


def _check_name(name: Any) -> None:
    if not isinstance(name, str):
        raise OptionError(
            f"explain takes names, not a {type(name).__name__}",
            hint="name a layer or a parameter, as in explain('layer1.0.conv1')",
        )


def _meant(name: str, slots: Sequence[Slot], read: bool = False) -> list[Slot]:
    """The slots a name means: a parameter's, or what a module makes (`read`: what it reads)."""
    inside = [s for s in slots if s.param == name or s.param.rpartition(".")[0] == name]
    if not inside:
        known = {s.param for s in slots} | {s.param.rpartition(".")[0] for s in slots}
        raise OptionError(
            f"`{name}` has no channels in this network",
            hint=nearest(name, known) or "name a layer or a parameter",
        )
    if read:
        return [s for s in inside if s.role == "in"]
    if inside[0].param == name:
        return inside
    return [s for s in inside if s.role in ("out", "free")] or inside


def title(slot: Slot) -> str:
    """``conv1.weight[0]``: a parameter's dim."""
    return f"{slot.param}[{slot.dim}]"


# -- chains ----------------------------------------------------------------------------------------


class _Ties:
    """All pairs of ids tied to each other, each with its node."""

    def __init__(self, analysis: Analysis):
        self.analysis = analysis
        ids = analysis.flow.ids
        self.slots = [slot for per in ids.slots.values() for slot in per]
        self.count = ids.count
        pairs = [(t.left, t.right, t.node) for t in analysis.all_groups.ties]
        left = [a.reshape(-1).numpy() for a, _, _ in pairs] or [np.zeros(0, np.int64)]
        right = [b.reshape(-1).numpy() for _, b, _ in pairs] or [np.zeros(0, np.int64)]
        self.nodes = [node for _, _, node in pairs]
        self.which = np.repeat(np.arange(len(left)), [len(a) for a in left])
        self.left, self.right = np.concatenate(left), np.concatenate(right)

    def chain(self, start: list[Slot], end: list[Slot]) -> list[Step]:
        """The shortest chain from an id of `start` to one of `end`; nothing if there is none."""
        if not start or not end:
            return []
        path = self.path(_ids(start), _ids(end))
        if not path:
            return []
        steps = [self.tied(x, y) for x, y in itertools.pairwise(path)]
        first, last = _holding(start, path[0]), _holding(end, path[-1])
        before = self.held(first, path[0], swapped=False)
        after = self.held(last, path[-1], swapped=True)
        if not steps and not before and not after and title(first) != title(last):
            after = [self.step(title(first), title(last), last.node, _HOW[last.role])]
        return [*before, *steps, *after]

    def path(self, sources: np.ndarray, goals: np.ndarray) -> list[int]:
        """Breadth first from all `sources` at once to the nearest of `goals`."""
        from scipy.sparse import coo_matrix
        from scipy.sparse.csgraph import breadth_first_order

        real = (self.left > 0) & (self.right > 0)
        root = np.full(len(sources), self.count)
        left = np.concatenate([self.left[real], root])
        right = np.concatenate([self.right[real], sources])
        size = self.count + 1
        edges = coo_matrix((np.ones(len(left), bool), (left, right)), shape=(size, size)).tocsr()
        order, before = breadth_first_order(edges, self.count, directed=False)
        reached = order[np.isin(order, goals)]
        if not len(reached):
            return []
        path = [int(reached[0])]
        while before[path[-1]] != self.count:
            path.append(int(before[path[-1]]))
        return path[::-1]

    def tied(self, x: int, y: int) -> Step:
        there = (self.left == x) & (self.right == y) | (self.left == y) & (self.right == x)
        node = self.nodes[int(self.which[np.flatnonzero(there)[0]])]
        return self.step(self.named(x), self.named(y), node, "meet")

    def step(self, left: str, right: str, node: fx.Node | None, how: str) -> Step:
        if node is None:
            return Step(left, right, "", "", how)
        shown = node_text(node, self.analysis.graph)
        return Step(left, right, shown, describe(node.meta.get("source")), how)

    def held(self, slot: Slot, one: int, swapped: bool) -> list[Step]:
        """The step between a slot and the one that makes its channels, where that is another."""
        maker = self.maker(one)
        if maker is None or slot.role in ("out", "free") or title(maker) == title(slot):
            return []
        names = (title(maker), title(slot)) if swapped else (title(slot), title(maker))
        return [self.step(*names, slot.node, _HOW[slot.role])]

    def maker(self, one: int) -> Slot | None:
        holding = [slot for slot in self.slots if bool((slot.ids == one).any())]
        made = [slot for slot in holding if slot.role in ("out", "free")]
        return next(iter(made or holding), None)

    def named(self, one: int) -> str:
        """The slot that makes an id; padding makes ids that lie in no parameter."""
        maker = self.maker(one)
        return title(maker) if maker is not None else "padding"


def _ids(slots: Iterable[Slot]) -> np.ndarray:
    found = np.unique(np.concatenate([slot.ids.reshape(-1).numpy() for slot in slots]))
    return found[found > 0]


def _holding(slots: Iterable[Slot], one: int) -> Slot:
    """The slot that holds an id; a weight rather than a statistic."""
    holding = [slot for slot in slots if bool((slot.ids == one).any())]
    return min(holding, key=lambda slot: slot.role == "through")


# -- groups ----------------------------------------------------------------------------------------


def _of_slots(analysis: Analysis, slots: Sequence[Slot]) -> list[Group]:
    """The groups in which slots lie."""
    wanted = {(slot.param, slot.dim, slot.role) for slot in slots}
    return [
        group
        for group in analysis.groups
        if any((m.param, m.dim, m.role) in wanted for m in group.members)
    ]


def _in_groups(analysis: Analysis, name: str, slots: Sequence[Slot]) -> str:
    found = _of_slots(analysis, _meant(name, slots))
    shown = ", ".join(f"group {g.name} ({len(g)} channels)" for g in found[:4]) or "no group"
    return f"{name} is in {shown}" + (f" and {len(found) - 4} more" if len(found) > 4 else "")


def _groups_of(analysis: Analysis, name: str, slots: Sequence[Slot]) -> Explanation:
    lines: list[str] = []
    for group in _of_slots(analysis, slots):
        lines.append(f"group {group.name}, {len(group)} channels, {state(group)}")
        if group.frozen is not None and group.frozen.node is not None:
            node = group.frozen.node
            where = describe(node.meta.get("source"))
            lines.append(f"  in {node_text(node, analysis.graph)}   {where}".rstrip())
        made, read = members_text(group)
        lines += [f"  makes  {text}" for text in made]
        lines += [f"  reads  {text}" for text in read]
        lines += [f"  {text}" for text in _bounds(analysis, group)]
    return Explanation(f"{name}:", lines=tuple(lines))


def state(group: Group) -> str:
    """``may shrink``, or why not."""
    return "may shrink" if group.frozen is None else f"frozen: {group.frozen.reason}"


def _bounds(analysis: Analysis, group: Group) -> list[str]:
    """The equal counts that bind a group, each node once."""
    mine = set(group.channels.tolist())
    found = {}
    for constraint in analysis.all_groups.constraints:
        rows = constraint.rows
        if mine & set(rows.reshape(-1).tolist()):
            shape = f"{rows.shape[0]} blocks of {rows.shape[1]}"
            found[constraint.node] = f"keeps equal counts in {shape}, for %{constraint.node.name}"
    return list(found.values())


def members_text(group: Group) -> tuple[list[str], list[str]]:
    """What makes or carries a group's channels, and what reads them, as ``conv1.weight[0]``.

    A layer's tensors are one entry: ``conv1.{weight,bias}[0]``, ``bn1.*[0]``. Where a group holds
    only a part of a dim, its positions follow: ``[1] 0..7``; ``x16`` says a channel has so many.
    """
    made: dict[str, list[str]] = {}
    read: list[str] = []
    for member in group.members:
        text = _positions(member)
        if member.role == "in":
            read.append(f"{member.param}[{member.dim}]{text}")
        else:
            module, _, leaf = member.param.rpartition(".")
            made.setdefault(f"{module}\n[{member.dim}]{text}", []).append(leaf)
    return [_joined(key, leaves) for key, leaves in made.items()], read


def _joined(key: str, leaves: list[str]) -> str:
    module, _, rest = key.partition("\n")
    prefix = f"{module}." if module else ""
    shown = leaves[0] if len(leaves) == 1 else f"{{{','.join(leaves)}}}"
    return f"{prefix}{'*' if len(leaves) > 2 else shown}{rest}"


def _positions(member: Member) -> str:
    positions = member.positions
    times = f" x{positions.shape[1]}" if positions.ndim > 1 and positions.shape[1] > 1 else ""
    flat = np.sort(positions.reshape(-1))
    whole = flat[0] == 0 and len(flat) == flat[-1] + 1
    return times if whole else f" {ranges(flat.tolist())}{times}"


# -- text ------------------------------------------------------------------------------------------


def node_text(node: fx.Node, graph: fx.GraphModule | None = None) -> str:
    """``%add_ = add_(%bn2, %maxpool)``: a node as it would be written."""
    if node.op in ("placeholder", "output", "get_attr"):
        return f"%{node.name}"
    return f"%{node.name} = {call_text(node, graph)}"


def call_text(node: fx.Node, graph: fx.GraphModule | None = None) -> str:
    """A node's call: ``Conv2d conv1(%x)``, ``torch.cat([%a, %b], 1)``, ``%x.view(2, -1)``."""
    args = [_argument(arg) for arg in node.args]
    args += [f"{key}={_argument(value)}" for key, value in node.kwargs.items()]
    if node.op == "call_module":
        module = graph.get_submodule(str(node.target)) if graph is not None else None
        kind = f"{type(module).__name__} " if module is not None else ""
        return f"{kind}{node.target}({', '.join(args)})"
    if node.op == "call_method":
        return f"{args[0]}.{node.target}({', '.join(args[1:])})"
    if node.target is getattr:
        return f"{args[0]}.{node.args[1]}"
    if node.target is operator.getitem:
        return f"{args[0]}[{args[1].removeprefix('(').removesuffix(')')}]"
    if node.target is operator.setitem:
        return f"{args[0]}[{args[1].removeprefix('(').removesuffix(')')}] = {args[2]}"
    if node.target in _SIGNS and len(args) == 2:
        return f"{args[0]} {_SIGNS[node.target]} {args[1]}"
    return f"{target_text(node.target)}({', '.join(args)})"


def target_text(target: object) -> str:
    """``torch.cat``, ``F.gelu``, ``aten.relu.default``: what a node calls."""
    if isinstance(target, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return str(target)
    name = getattr(target, "__name__", "")
    for space, module in (("torch", torch), ("F", torch.nn.functional), ("operator", operator)):
        if getattr(module, name, None) is target:
            return f"{space}.{name}"
    return torch.typename(target).replace("torch._C._nn.", "F.")


def _argument(arg: object) -> str:
    if isinstance(arg, fx.Node):
        return f"%{arg.name}"
    if isinstance(arg, (list, tuple)):
        inside = ", ".join(map(_argument, arg))
        return f"[{inside}]" if isinstance(arg, list) else f"({inside})"
    if isinstance(arg, slice):
        parts = [arg.start, arg.stop, arg.step]
        shown = ["" if part is None else _argument(part) for part in parts]
        return ":".join(shown[:2] if parts[2] is None else shown)
    if isinstance(arg, torch.Tensor):
        return f"tensor{list(arg.shape)}"
    return "..." if arg is Ellipsis else repr(arg)


def ranges(numbers: Sequence[int], *, limit: int = 8) -> str:
    """Numbers in readable runs; long lists are cut.

    ``0..3 7 9..12``, ``(0..56 step 4)``, ``5 x16`` (16 times 5), ``1..8 each x4`` (1 1 1 1 2 ...).
    """
    each = _each(numbers)
    if each > 1 and len(numbers) > each:
        return f"{ranges(numbers[::each], limit=limit)} each x{each}"
    runs = list(_runs(numbers))
    rest = sum(len(run) for run in runs[limit:])
    return " ".join(map(_run, runs[:limit])) + (f" and {rest} more" if rest else "")


def _each(numbers: Sequence[int]) -> int:
    """How often each number stands in a row, if all do so equally often."""
    counts = [len(list(same)) for _, same in itertools.groupby(numbers)]
    return counts[0] if counts and len(set(counts)) == 1 else 0


def _runs(numbers: Sequence[int]) -> Iterator[Sequence[int]]:
    """The numbers cut where their step changes; other steps than 1 and 0 need four numbers."""
    at = 0
    while at < len(numbers):
        end = at + 1
        step = numbers[end] - numbers[at] if end < len(numbers) else 0
        while end < len(numbers) and numbers[end] - numbers[end - 1] == step:
            end += 1
        if step not in (0, 1) and end - at < 4:
            end = at + 1
        yield numbers[at:end]
        at = end


def _run(run: Sequence[int]) -> str:
    first, last = run[0], run[-1]
    if len(run) == 1:
        return str(first)
    if first == last:
        return f"{first} x{len(run)}"
    if run[1] - first == 1:
        return f"{first}..{last}" if len(run) > 2 else f"{first} {last}"
    return f"({first}..{last} step {run[1] - first})"
