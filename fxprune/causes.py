"""Why a network can lose so little: the costliest causes, and what would free their channels.

Options are not guessed at: the graph is analysed once more with each, and what it frees is counted.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import rules
from .flow import flow
from .groups import Group, Groups, groups
from .trace import describe

if TYPE_CHECKING:
    from .analysis import Analysis

# options of `analyze` that may free channels, and how they are written
_OPTIONS: dict[str, tuple[str, Any]] = {
    "mixing='all'": ("mixing", "all"),
    "scatter=True": ("scatter", True),
    "heads='dims'": ("heads", "dims"),
    "heads='whole'": ("heads", "whole"),
}
_PLACE = re.compile(r" at %\w+|%\w+")


@dataclass(frozen=True)
class Cause:
    """Channels that stay for one reason, at one or several places, and what would free them."""

    reason: str
    channels: int
    places: int
    source: str
    remedy: str

    @property
    def where(self) -> str:
        """The reason, at how many places, and the first one's source line."""
        source = f" ({self.source})" if self.source else ""
        places = f" at {self.places} places" if self.places > 1 else ""
        return f"{self.reason}{places}{source}"

    def __str__(self) -> str:
        return f"{self.channels:,} channels: {self.where}\n      {self.remedy}"


def causes(analysis: Analysis, most: int = 3) -> list[Cause]:
    """The costliest causes of channels that cannot go, at most so many."""
    found: dict[str, list[Group]] = {}
    for group in analysis.groups:
        if group.frozen is not None:
            found.setdefault(_PLACE.sub("", group.frozen.reason), []).append(group)
    costly = sorted(found.items(), key=lambda item: -sum(map(len, item[1])))[:most]
    others = list(_with_options(analysis)) if costly else []
    return [_cause(analysis, reason, stuck, others) for reason, stuck in costly]


def _cause(
    analysis: Analysis, reason: str, stuck: list[Group], others: list[tuple[str, Groups]]
) -> Cause:
    nodes = [group.frozen.node for group in stuck if group.frozen is not None]
    first = max(stuck, key=len).frozen
    node = first.node if first is not None else None
    source = describe(node.meta.get("source")) if node is not None else ""
    count = sum(map(len, stuck))
    remedy = _remedy(analysis, reason, nodes, stuck, others)
    return Cause(reason, count, len(set(nodes)), source, remedy)


def _remedy(analysis: Analysis, reason: str, nodes, stuck: list[Group], others) -> str:
    if any(node in analysis.flow.unknown for node in nodes):
        return "a rule would free them: docs/add-an-op.md says how to write one"
    freed = [(sum(_freed(group, other) for group in stuck), text) for text, other in others]
    best = max(freed, default=(0, ""), key=lambda pair: pair[0])
    if best[0]:
        return f"{best[1]} would free {best[0]:,} of them"
    if "output" in reason:
        return "outputs keep their shape; no option frees them"
    return "no option frees them; only other code in the model would"


def _with_options(analysis: Analysis) -> Iterator[tuple[str, Groups]]:
    """The groups that the same graph has with each option that it was not analysed with."""
    now = {"mixing": analysis.mixing, "scatter": analysis.scatter, "heads": analysis.heads}
    for text, (name, value) in _OPTIONS.items():
        if now[name] != value:
            how: Any = {**now, name: value}
            yield text, groups(flow(analysis.graph, rules.current(), **how))


def _freed(group: Group, other: Groups) -> int:
    """How many of a group's channels could go in other groups, found by a slice of each."""
    own = group.members[0]
    places = own.positions[:, 0]
    free: set[int] = set()
    for each in other.prunable:
        for member in each.members:
            if (member.param, member.dim) == (own.param, own.dim):
                free |= set(np.unique(member.positions).tolist())
    return sum(int(place) in free for place in places)
