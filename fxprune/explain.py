"""Why two slices go together: the chain of ties between them."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from .errors import OptionError, nearest
from .ids import Slot
from .trace import describe

if TYPE_CHECKING:
    from .analysis import Analysis


@dataclass(frozen=True)
class Step:
    """One link of a chain: what is tied to what, at which node, on which source line."""

    left: str
    right: str
    node: str
    source: str

    def __str__(self) -> str:
        at = f"  {self.source}" if self.source else ""
        return f"{self.left} ~ {self.right}  by %{self.node}{at}"


@dataclass(frozen=True)
class Explanation:
    """An answer of `Analysis.explain`, as text and as steps."""

    title: str
    steps: tuple[Step, ...] = ()
    lines: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n".join(
            [
                self.title,
                *(f"  {step}" for step in self.steps),
                *(f"  {line}" for line in self.lines),
            ]
        )


def explain(analysis: Analysis, a: str, b: str | None = None) -> Explanation:
    """The group of `a`, or the chain of ties from `a` to `b`; `OptionError` for names not known."""
    slots = [slot for per in analysis.flow.ids.slots.values() for slot in per]
    start = _slots_of(a, slots)
    if b is None:
        return _group_of(analysis, a, start)
    end = _slots_of(b, slots)
    found = _chain(analysis, start, end)
    if found is None:
        return Explanation(f"{a} and {b} are not coupled")
    return Explanation(f"{a} and {b} are coupled:", tuple(found))


def _slots_of(name: str, slots: list[Slot]) -> list[Slot]:
    """The slots a name means: a module's own channels (what it makes), or a parameter's."""
    exact = [s for s in slots if s.param == name]
    inside = [s for s in slots if s.param.rpartition(".")[0] == name]
    found = exact or [s for s in inside if s.role == "out"] or inside
    if not found:
        known = {s.param for s in slots} | {s.param.rpartition(".")[0] for s in slots}
        raise OptionError(
            f"`{name}` has no channels in this network",
            hint=nearest(name, known) or "name a layer or a parameter",
        )
    return found


def title(slot: Slot) -> str:
    """``conv1.weight[0]``: a parameter's dim."""
    return f"{slot.param}[{slot.dim}]"


def _group_of(analysis: Analysis, name: str, slots: list[Slot]) -> Explanation:
    wanted = {slot.param for slot in slots}
    lines: list[str] = []
    for group in analysis.groups:
        roles = {s.role for s in slots}
        if any(m.param in wanted and m.role in roles for m in group.members):
            state = "may shrink" if group.prunable else f"frozen: {group.frozen.reason}"  # type: ignore[union-attr]
            lines.append(f"group {group.name}, {len(group)} channels, {state}")
            if group.frozen is not None and group.frozen.node is not None:
                lines.append(
                    f"  by %{group.frozen.node.name}  {describe(group.frozen.node.meta.get('source'))}"
                )
            lines += [f"  {m.role:<7} {m.param}[{m.dim}]" for m in group.members]
    return Explanation(f"{name}:", lines=tuple(lines))


def _chain(analysis: Analysis, start: list[Slot], end: list[Slot]) -> list[Step] | None:
    """Breadth first through ties, from an id of `start` to one of `end`."""
    ids = analysis.flow.ids
    goal = set(np.concatenate([s.ids.reshape(-1).numpy() for s in end]).tolist())
    neighbours: dict[int, list[tuple[int, int]]] = {}
    for k, tie in enumerate(ids.ties):
        for x, y in zip(tie.left.reshape(-1).tolist(), tie.right.reshape(-1).tolist(), strict=True):
            if x and y and x != y:
                neighbours.setdefault(x, []).append((y, k))
                neighbours.setdefault(y, []).append((x, k))
    first = sorted(np.concatenate([s.ids.reshape(-1).numpy() for s in start]).tolist())
    came: dict[int, tuple[int, int] | None] = dict.fromkeys(first)
    queue = deque(came)
    while queue:
        here = queue.popleft()
        if here in goal:
            return _steps(analysis, _path(came, here), start, end)
        for other, k in neighbours.get(here, ()):
            if other not in came:
                came[other] = (here, k)
                queue.append(other)
    return None


def _path(came, here: int) -> list[tuple[int, int, int]]:
    path = []
    while came[here] is not None:
        before, k = came[here]
        path.append((before, here, k))
        here = before
    return path[::-1]


def _steps(
    analysis: Analysis, path: list[tuple[int, int, int]], start: list[Slot], end: list[Slot]
) -> list[Step]:
    owners = _owners(analysis)
    if not path:
        readers = [s for s in end if s.node is not None]
        node = readers[0].node if readers else None
        where = describe(node.meta.get("source")) if node is not None else ""
        return [Step(title(start[0]), title(end[0]), node.name if node is not None else "", where)]
    steps = []
    for x, y, k in path:
        node = analysis.flow.ids.ties[k].node
        where = describe(node.meta.get("source")) if node is not None else ""
        steps.append(
            Step(_named(x, owners), _named(y, owners), node.name if node is not None else "", where)
        )
    return steps


def _owners(analysis: Analysis) -> list[tuple[Slot, np.ndarray]]:
    slots = [slot for per in analysis.flow.ids.slots.values() for slot in per]
    slots.sort(key=lambda s: s.role not in ("out", "free"))
    return [(slot, slot.ids.reshape(-1).numpy()) for slot in slots]


def _named(one: int, owners: list[tuple[Slot, np.ndarray]]) -> str:
    for slot, ids in owners:
        at = np.flatnonzero(ids == one)
        if len(at):
            return f"{title(slot)} {int(at[0])}"
    return f"padding {one}"
