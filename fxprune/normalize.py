"""Scores of different groups on one scale, for rankings over the whole network."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Literal

import numpy as np

from .groups import Group, Groups

Normalize = Literal["none", "mean", "std", "sum", "max", "kind"]
NORMALIZE = ("none", "mean", "std", "sum", "max", "kind")

_SCALES: dict[str, Callable[[np.ndarray], float]] = {
    "none": lambda scores: 1.0,
    "mean": lambda scores: float(scores.mean()),
    "std": lambda scores: float(scores.std()),
    "sum": lambda scores: float(scores.sum()),
    "max": lambda scores: float(scores.max()),
}


def normalized(
    groups: Groups, scores: Mapping[int, np.ndarray], how: Normalize
) -> dict[int, np.ndarray]:
    """Each group's scores over their mean, standard deviation, sum or largest one.

    "kind" ranks channels among those of groups of one kind alone, with members of the same roles
    and shapes of dims, and gives the share of ranks below (Fang et al. 2024, Isomorphic Pruning):
    each kind then loses the same share.
    """
    if how == "kind":
        return _by_kind(groups, scores)
    scale = _SCALES[how]
    return {i: values / (scale(values) or 1.0) for i, values in scores.items()}


def by_layers(groups: Groups, scores: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    """Each group's scores over their mean, times the layers that make its channels: a channel that
    many layers make is as much as one of each."""
    found = normalized(groups, scores, "mean")
    return {i: values * _layers(groups.groups[i]) for i, values in found.items()}


def _layers(group: Group) -> int:
    return max(1, len({m.param for m in group.members if m.role == "out"}))


def _by_kind(groups: Groups, scores: Mapping[int, np.ndarray]) -> dict[int, np.ndarray]:
    kinds: dict[tuple, list[int]] = {}
    for i in scores:
        kinds.setdefault(_kind(groups.groups[i]), []).append(i)
    found: dict[int, np.ndarray] = {}
    for own in kinds.values():
        flat = np.concatenate([scores[i] / (scores[i].mean() or 1.0) for i in own])
        order = np.argsort(flat, kind="stable")
        ranks = np.empty(len(flat))
        ranks[order] = (np.arange(len(flat)) + 0.5) / len(flat)
        ends = np.cumsum([len(scores[i]) for i in own])[:-1]
        found.update(zip(own, np.split(ranks, ends), strict=True))
    return {i: found[i] for i in scores}


def _kind(group: Group) -> tuple:
    """What makes groups alike: the roles and places of their members, and the ops they are in."""
    return tuple(sorted((m.role, m.dim, m.blocks > 1, _op(m.node)) for m in group.members))


def _op(node: object) -> str:
    target, kind = getattr(node, "target", ""), getattr(node, "op", "")
    return kind if kind == "call_module" else str(target)
