"""Choosing under equal counts that overlap: a small integer program, solved exactly (HiGHS)."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from .groups import Constraint


def solve(
    channels: np.ndarray, value: np.ndarray, constraints: Sequence[Constraint], limit: int
) -> np.ndarray:
    """Whether each of `channels` is kept: at most `limit` go, as many as can, of the least value.

    An infinite value must stay. If no choice removes anything, all are kept.
    """
    from scipy.optimize import Bounds, LinearConstraint, milp

    keep_all = np.ones(len(channels), bool)
    if limit <= 0:
        return keep_all
    rows, counts = _equations(channels, constraints)
    size = len(channels) + len(constraints)
    finite = np.where(np.isinf(value), 0.0, value)
    # removing one more channel always outweighs any difference in value
    cost = 1.0 - finite / (finite.max() + 1e-12) / (len(channels) + 1) * 0.5
    objective = np.concatenate([cost, np.zeros(len(constraints))])
    lower = np.concatenate([np.isinf(value).astype(float), np.ones(len(constraints))])
    upper = np.concatenate([np.ones(len(channels)), np.full(len(constraints), np.inf)])
    total = np.concatenate([np.ones(len(channels)), np.zeros(len(constraints))])
    found = milp(
        objective,
        integrality=np.ones(size),
        bounds=Bounds(lower, upper),
        constraints=[
            LinearConstraint(rows, counts, counts),
            LinearConstraint(total[None], len(channels) - limit, np.inf),
        ],
        options={"time_limit": 20.0, "mip_rel_gap": 0.0},
    )
    if found.x is None:
        return keep_all
    return found.x[: len(channels)] > 0.5


def _equations(channels: np.ndarray, constraints: Sequence[Constraint]):
    """For each row of each constraint: kept channels in it minus the constraint's count is minus
    the row's fixed elements."""
    from scipy.sparse import lil_matrix

    place = {c: k for k, c in enumerate(channels.tolist())}
    total = sum(len(c.rows) for c in constraints)
    matrix = lil_matrix((total, len(channels) + len(constraints)))
    right = np.zeros(total)
    r = 0
    for k, constraint in enumerate(constraints):
        for row in constraint.rows.tolist():
            for c in row:
                if c in place:
                    matrix[r, place[c]] += 1
                else:
                    right[r] -= 1
            matrix[r, len(channels) + k] = -1
            r += 1
    return matrix.tocsr(), right
