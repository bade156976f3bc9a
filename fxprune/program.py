"""Choosing under equal counts: how many channels each run of interchangeable ones keeps.

Channels that stand in the same rows of all constraints are interchangeable to them: an *atom*. Only
the number kept of each atom matters, and the best-scored channels of an atom fill it. Where atoms
are alike one number serves all; otherwise a small integer program (HiGHS) finds the numbers.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any

import numpy as np

from .groups import Constraint


def solve(
    channels: np.ndarray,
    value: np.ndarray,
    must: np.ndarray,
    constraints: Sequence[Constraint],
    limit: int,
) -> np.ndarray:
    """Whether each of `channels` is kept: at most `limit` go, as many as the constraints allow.

    Within an atom those of least `value` go, equal values in order; those of the mask `must` stay.
    """
    kept = np.ones(len(channels), bool)
    if limit <= 0:
        return kept
    atoms, table, fixed = _atoms(channels, constraints)
    sizes = np.array([len(atom) for atom in atoms])
    least = np.array([int(must[atom].sum()) for atom in atoms])
    counts = _uniform(sizes, least, table, fixed, limit)
    if counts is None:
        counts = _program(sizes, least, table, fixed, limit)
    for atom, count in zip(atoms, counts, strict=True):
        order = np.lexsort((value[atom], must[atom]))
        kept[np.array(atom)[order[: len(atom) - int(count)]]] = False
    return kept


def _atoms(channels: np.ndarray, constraints: Sequence[Constraint]):
    """Atoms as places in `channels`; for each constraint (rows x atoms) how often an atom's channel
    stands in a row, and how many elements of a row are not up for choice."""
    place = {c: k for k, c in enumerate(channels.tolist())}
    stands: list[list[tuple[int, int]]] = [[] for _ in place]
    fixed = [np.zeros(len(c.rows), np.int64) for c in constraints]
    for i, constraint in enumerate(constraints):
        for r, row in enumerate(constraint.rows.tolist()):
            for c in row:
                if c in place:
                    stands[place[c]].append((i, r))
                else:
                    fixed[i][r] += 1
    found: dict[Any, list[int]] = defaultdict(list)
    for k, pairs in enumerate(stands):
        found[tuple(pairs)].append(k)
    table = [np.zeros((len(c.rows), len(found)), np.int64) for c in constraints]
    for a, pairs in enumerate(found):
        for i, r in pairs:
            table[i][r, a] += 1
    return list(found.values()), table, fixed


def _uniform(sizes, least, table, fixed, limit: int) -> np.ndarray | None:
    """One number for all atoms, where all are alike."""
    even = all((t.sum(1) == t.sum(1)[0]).all() for t in table) and not any(f.any() for f in fixed)
    if not even or (sizes != sizes[0]).any():
        return None
    gone = min(limit // len(sizes), int(sizes[0] - max(least.max(), 1)))
    return sizes - gone


def _program(sizes, least, table, fixed, limit: int) -> np.ndarray:
    """The fewest channels kept, and among those the evenest spread over atoms."""
    from scipy.optimize import Bounds, LinearConstraint, milp

    n, m = len(sizes), len(table)
    rows = np.concatenate([np.hstack([t, -_unit(len(t), i, m)]) for i, t in enumerate(table)])
    equal = np.hstack([rows, np.zeros((len(rows), n))])
    right = -np.concatenate(fixed)
    wanted = sizes * (1 - limit / sizes.sum())
    eye, none = np.eye(n), np.zeros((n, m))
    total = np.concatenate([np.ones(n), np.zeros(m + n)])[None]
    found = milp(
        np.concatenate([np.full(n, 2.0 * n + 1), np.zeros(m), 1 / sizes]),
        integrality=np.concatenate([np.ones(n), np.zeros(m + n)]),
        bounds=Bounds(
            np.concatenate([least, np.ones(m), np.zeros(n)]),
            np.concatenate([sizes, np.full(m + n, np.inf)]),
        ),
        constraints=[
            LinearConstraint(equal, right, right),
            LinearConstraint(total, sizes.sum() - limit, np.inf),
            LinearConstraint(np.hstack([eye, none, -eye]), -np.inf, wanted),
            LinearConstraint(np.hstack([-eye, none, -eye]), -np.inf, -wanted),
        ],
        options={"time_limit": 10.0, "mip_rel_gap": 0.0},
    )
    return sizes if found.x is None else np.rint(found.x[:n]).astype(np.int64)


def _unit(rows: int, column: int, width: int) -> np.ndarray:
    made = np.zeros((rows, width))
    made[:, column] = 1
    return made
