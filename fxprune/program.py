"""Choosing under equal counts: how many channels each run of interchangeable ones keeps.

Channels that stand in the same rows of all constraints are interchangeable to them: an *atom*. Only
the number kept of each atom matters, and the best-scored channels of an atom fill it. Where atoms
are alike one number serves all; otherwise a small integer program (HiGHS) finds the numbers.
"""

from __future__ import annotations

from collections.abc import Sequence

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
    rows = _as_rows(channels, constraints)
    if rows is not None:
        gone = min(limit // len(rows), rows.shape[1] - max(int(must[rows].sum(1).max()), 1))
        order = np.lexsort((value[rows], must[rows]), axis=1)
        kept[np.take_along_axis(rows, order[:, :gone], 1)] = False
        return kept
    atoms, table, fixed = _atoms(channels, constraints)
    sizes = np.array([len(atom) for atom in atoms])
    least = np.array([int(must[atom].sum()) for atom in atoms])
    counts = _uniform(sizes, least, table, fixed, limit)
    if counts is None:
        counts = _program(sizes, least, table, fixed, limit)
    for atom, count in zip(atoms, counts, strict=True):
        order = np.lexsort((value[atom], must[atom]))
        kept[atom[order[: len(atom) - int(count)]]] = False
    return kept


def _as_rows(channels: np.ndarray, constraints: Sequence[Constraint]) -> np.ndarray | None:
    """The places of a single constraint's channels, if each of `channels` stands there once."""
    rows = constraints[0].rows
    if len(constraints) > 1 or rows.size != len(channels):
        return None
    order = np.argsort(channels)
    at = np.minimum(np.searchsorted(channels[order], rows), len(channels) - 1)
    places = order[at]
    once = (channels[places] == rows).all() and (np.bincount(places.reshape(-1)) == 1).all()
    return np.sort(places, axis=1) if once else None


def _atoms(channels: np.ndarray, constraints: Sequence[Constraint]):
    """Atoms as places in `channels`; for each constraint (rows x atoms) how often an atom's channel
    stands in a row, and how many elements of a row are not up for choice."""
    place = np.full(max(channels.max(), *(c.rows.max() for c in constraints)) + 1, -1)
    place[channels] = np.arange(len(channels))
    places = [place[c.rows] for c in constraints]
    order, ends, owner = _alike(len(channels), places)
    atoms, table = np.split(order, ends[:-1]), []
    for at in places:
        pairs = (owner[at] + len(atoms) * np.arange(len(at))[:, None])[at >= 0]
        counts = np.bincount(pairs, minlength=len(at) * len(atoms)).reshape(len(at), -1)
        table.append(counts // [len(atom) for atom in atoms])
    return atoms, table, [(at < 0).sum(1) for at in places]


def _alike(count: int, places: Sequence[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Channels that stand equally often in each row, side by side; where each run of them ends;
    the number of each channel's run."""
    marks, key = np.random.default_rng(0), np.zeros(count, np.int64)
    with np.errstate(over="ignore"):
        for at in places:
            row = marks.integers(1, 2**62, (len(at), 1), dtype=np.int64)
            np.add.at(key, at[at >= 0], np.broadcast_to(row, at.shape)[at >= 0])
    _, first, run = np.unique(key, return_index=True, return_inverse=True)
    rank = np.empty(len(first), np.int64)
    rank[np.argsort(first)] = np.arange(len(first))  # runs in the order of their first channels
    owner = rank[run]
    return np.argsort(owner, kind="stable"), np.cumsum(np.bincount(owner)), owner


def _uniform(sizes, least, table, fixed, limit: int) -> np.ndarray | None:
    """One number for all atoms, where all are alike and no other numbers let more go."""
    even = all((t.sum(1) == t.sum(1)[0]).all() for t in table) and not any(f.any() for f in fixed)
    if not even or (sizes != sizes[0]).any():
        return None
    gone = min(limit // len(sizes), int(sizes[0] - max(least.max(), 1)))
    forced = any(len(t) == len(sizes) == np.count_nonzero(t) and t.any(0).all() for t in table)
    return sizes - gone if forced or gone * len(sizes) == limit else None


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
    # HiGHS's presolve loses solutions of such programs, and on some it never returns
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
        options={"time_limit": 10.0, "mip_rel_gap": 0.0, "presolve": False},
    )
    return sizes if found.x is None else np.rint(found.x[:n]).astype(np.int64)


def _unit(rows: int, column: int, width: int) -> np.ndarray:
    made = np.zeros((rows, width))
    made[:, column] = 1
    return made
