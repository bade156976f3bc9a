"""Where the nodes of a graph are drawn: a row for each step of the computation, branches in lanes
beside each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence


def positions(inputs: Mapping[str, Sequence[str]]) -> dict[str, tuple[int, int]]:
    """A lane and a row for each node, given the nodes that each takes, in an order in which a
    graph can run.

    A node lies below all that it takes. It goes on in the lane of the input that is nearest above
    it and goes no further; the first lane is the longest way through the network.
    """
    rows = _rows(inputs)
    last = {taken: name for name, names in inputs.items() for taken in names}
    taken: dict[tuple[int, int], str] = {}
    lanes: dict[str, int] = {}
    free_from: list[int] = []  # the row from which each lane is free
    for name, names in inputs.items():
        row = rows[name]
        lane = _lane(name, names, lanes, rows, taken, free_from)
        lanes[name] = lane
        taken[lane, row] = name
        free_from.extend([0] * (lane + 1 - len(free_from)))
        free_from[lane] = max(free_from[lane], rows.get(last.get(name, ""), row))
    return {name: (lanes[name], rows[name]) for name in inputs}


def _rows(inputs: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The longest way from a start to each node; what starts late stands right above its first
    use."""
    rows: dict[str, int] = {}
    for name, names in inputs.items():
        rows[name] = max((rows[each] + 1 for each in names), default=0)
    uses: dict[str, int] = {}
    for name, names in inputs.items():
        for each in names:
            uses[each] = min(uses.get(each, rows[name]), rows[name])
    for name, names in inputs.items():
        if not names and name in uses and rows[name] == 0:
            rows[name] = max(uses[name] - 1, 0)
    return rows


def _lane(
    name: str,
    names: Sequence[str],
    lanes: Mapping[str, int],
    rows: Mapping[str, int],
    taken: dict[tuple[int, int], str],
    free_from: Sequence[int],
) -> int:
    """That of the nearest input in which no other node has gone on, else the nearest free one."""
    row = rows[name]
    mine = sorted(set(names), key=lambda each: (lanes[each], -rows[each]))
    for each in mine:
        lane = lanes[each]
        if all((lane, r) not in taken for r in range(rows[each] + 1, row + 1)):
            return lane
    start = lanes[mine[0]] + 1 if mine else 0
    lane = start
    while (lane < len(free_from) and free_from[lane] >= row) or (lane, row) in taken:
        lane += 1
    return lane
