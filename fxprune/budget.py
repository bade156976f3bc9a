"""Choosing widths for a budget: the least importance lost at a cost that may be spent.

Each group (or family of groups bound together) offers levels: so many channels removed, of so much
importance. What a level saves depends on the widths of the neighbours: the operations of a layer go
with the product of two widths. So the program is solved around a point: with costs made linear
there, the best levels for a price of cost are each group's own, a knapsack's Lagrangian; the price
is found by bisection on the true cost; then costs are made linear anew where that led. What the
steps of levels leave of the budget is filled up, and levels are exchanged as long as that helps.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .costs import Costs

_ROUNDS, _HALVINGS, _FILLS, _TRIES = 8, 30, 60, 12
_STEPS = ((256, 6, 20), (1024, 2, 2), (math.inf, 1, 0))  # levels in all, tried, exchanges
_NEAR = 0.99  # of a target
_TRACE = 1e-6  # of the largest loss

Move = tuple[float, float, list[int]]  # share of the targets, minus the loss, levels


@dataclass
class Choice:
    """What one family offers. ``removed[l]`` channels go at level l, of summed importance
    ``loss[l]``; level 0 keeps all. ``masks[l]`` says which of ``channels`` stay."""

    channels: np.ndarray
    removed: np.ndarray
    loss: np.ndarray
    masks: Sequence[np.ndarray]

    def __len__(self) -> int:
        return len(self.removed)


@dataclass
class Solved:
    """The level of each choice; costs there; whether all targets are met."""

    levels: list[int]
    cost: dict[str, float]
    loss: float
    met: bool


def solve_for(choices: Sequence[Choice], costs: Costs, targets: Mapping[str, float]) -> Solved:
    """The levels of least summed loss at which no cost is above its target; the last levels of all
    where there are none."""
    state = _State(_graded(choices), costs, targets)
    last = [len(choice) - 1 for choice in choices]
    state.go(last)
    if state.over() > 1:
        return state.solved(last, met=False)
    state.go([0] * len(choices))
    if state.over() <= 1:
        return state.solved([0] * len(choices), met=True)
    starts = ([0] * len(choices), _halfway(choices))
    found = [
        state.solved(_near(state, _improved(state, _from(state, start))), met=True)
        for start in starts
    ]
    best = min(found, key=lambda each: each.loss)
    state.go(best.levels)
    return best


def _graded(choices: Sequence[Choice]) -> list[Choice]:
    """Where removing more loses nothing, a trace is lost nevertheless, more for the narrower layer:
    else all that is worth nothing goes at any price, and not only what the budget asks for."""
    most = max((float(c.loss.max()) for c in choices), default=0.0) or 1.0
    return [replace(c, loss=c.loss + _TRACE * most * _narrowed(c)) for c in choices]


def _narrowed(choice: Choice) -> np.ndarray:
    share = choice.removed / max(len(choice.channels), 1)
    return -np.log1p(-np.minimum(share, 1 - 1e-9))


def _halfway(choices: Sequence[Choice]) -> list[int]:
    return [len(choice) // 2 for choice in choices]


class _State:
    """Choices at some levels, with what they cost."""

    def __init__(self, choices: Sequence[Choice], costs: Costs, targets: Mapping[str, float]):
        self.choices, self.costs, self.targets = choices, costs, targets
        self.touched = [costs.touched(choice.channels) for choice in choices]
        self.levels = [0] * len(choices)
        self.go(self.levels, whole=True)

    def go(self, levels: Sequence[int], whole: bool = False) -> None:
        changed = [f for f, level in enumerate(levels) if whole or level != self.levels[f]]
        for f in changed:
            self.costs.put(self.choices[f].channels, self.choices[f].masks[levels[f]])
        self.costs.count(list({each for f in changed for each in self.touched[f]}))
        self.levels = list(levels)

    def over(self) -> float:
        """The largest cost in shares of its target."""
        total = self.costs.total()
        return max(total[kind] / max(target, 1e-9) for kind, target in self.targets.items())

    def loss(self) -> float:
        return sum(float(c.loss[level]) for c, level in zip(self.choices, self.levels, strict=True))

    def gain(self, f: int, level: int) -> float:
        """How much less is lost at another level of a choice."""
        return float(self.choices[f].loss[self.levels[f]] - self.choices[f].loss[level])

    def solved(self, levels: list[int], met: bool) -> Solved:
        self.go(levels)
        return Solved(levels, self.costs.total(), self.loss(), met)

    def saved(self, f: int, level: int) -> dict[str, float]:
        """What moving one choice to another level would save of each cost, in shares of targets."""
        before = {each: self.costs.values[each[0]][each[1]] for each in self.touched[f]}
        choice, here = self.choices[f], self.levels[f]
        self.costs.put(choice.channels, choice.masks[level])
        saved = dict.fromkeys(self.targets, 0.0)
        for kind, i in self.touched[f]:
            if kind in saved:
                saved[kind] += before[kind, i] - self.costs.terms[kind][i].cost(self.costs.ids)
        self.costs.put(choice.channels, choice.masks[here])
        return {kind: each / max(self.targets[kind], 1e-9) for kind, each in saved.items()}

    def slopes(self) -> list[dict[str, float]]:
        """What a channel of each choice costs here."""
        found = []
        for f, choice in enumerate(self.choices):
            here = self.levels[f]
            other = here + 1 if here + 1 < len(choice) else here - 1
            if len(choice) == 1:
                found.append(dict.fromkeys(self.targets, 0.0))
                continue
            step = choice.removed[other] - choice.removed[here]
            found.append({kind: each / step for kind, each in self.saved(f, other).items()})
        return found


def _from(state: _State, start: list[int]) -> list[int]:
    """Levels within the targets, from the slopes of costs at `start` and at where they lead."""
    state.go(start)
    weights = dict.fromkeys(state.targets, 1.0)
    slopes: list[dict[str, float]] | None = None
    best: tuple[float, list[int]] | None = None
    for _ in range(_ROUNDS):
        here = state.slopes()
        slopes = [*map(_between, slopes or here, here)]
        levels = _priced(state, [_weighed(slope, weights) for slope in slopes])
        loss = state.loss()
        if best is not None and levels == best[1] and len(weights) == 1:
            break
        if best is None or loss < best[0]:
            best = (loss, levels)
        total = state.costs.total()
        for kind, target in state.targets.items():  # what is slack needs no price
            weights[kind] *= (total[kind] / max(target, 1e-9)) ** 4
    assert best is not None
    return best[1]


def _between(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """Slopes halfway to new ones, or they swing."""
    return {kind: (max(before[kind], 0.0) * max(now[kind], 0.0)) ** 0.5 for kind in now}


def _weighed(slope: Mapping[str, float], weights: Mapping[str, float]) -> float:
    return max(sum(weights[kind] * max(each, 0.0) for kind, each in slope.items()), 1e-15)


def _priced(state: _State, slopes: list[float]) -> list[int]:
    """The levels at the lowest price of cost at which the best choices meet the targets."""
    low, high = 0.0, 1.0
    while state.over() > 1 or low == 0.0:
        _choose(state, slopes, high)
        if state.over() <= 1:
            break
        low, high = high, high * 8
        if high > 1e30:
            state.go([len(choice) - 1 for choice in state.choices])
            return list(state.levels)
    met = list(state.levels)
    for _ in range(_HALVINGS):
        middle = (low * high) ** 0.5 if low > 0 else high / 1000
        _choose(state, slopes, middle)
        if state.over() <= 1:
            high, met = middle, list(state.levels)
        else:
            low = middle
        if low > 0 and high / low < 1 + 1e-6:
            break
    state.go(met)
    return met


def _choose(state: _State, slopes: list[float], price: float) -> None:
    pairs = zip(state.choices, slopes, strict=True)
    state.go([int(np.argmin(c.loss - price * slope * c.removed)) for c, slope in pairs])


# -- what the steps leave --------------------------------------------------------------------------


def _improved(state: _State, levels: list[int]) -> list[int]:
    """Channels given back as long as any fit, and levels exchanged as long as less is lost."""
    state.go(levels)
    exchanges = _effort(state)[1]
    for _ in range(_FILLS):
        up = _given_back(state)
        if up is not None:
            state.go(_moved(state.levels, *up))
            continue
        if not exchanges:
            break
        exchanges -= 1
        loss, levels = state.loss(), list(state.levels)
        found = [each for each in _exchanges(state, levels) if -each[1] < loss - 1e-9 * abs(loss)]
        if not found:
            break
        state.go(max(found, key=lambda each: each[1])[2])
    return list(state.levels)


def _moved(levels: Sequence[int], f: int, by: int) -> list[int]:
    return [level + by * (i == f) for i, level in enumerate(levels)]


def _given_back(state: _State) -> tuple[int, int] | None:
    """The choice whose next channel is worth most for its cost, of those that fit."""
    total = state.costs.total()
    room = {kind: 1 - total[kind] / max(t, 1e-9) for kind, t in state.targets.items()}
    best, most = None, 0.0
    for f, here in enumerate(state.levels):
        if here:
            cost = {k: -s for k, s in state.saved(f, here - 1).items()}
            worth = state.gain(f, here - 1) / max(*cost.values(), 1e-12)
            if worth > most and all(cost[k] <= room[k] + 1e-12 for k in room):
                best, most = (f, -1), worth
    return best


def _exchanges(state: _State, levels: list[int]) -> list[Move]:
    """All that is within the targets where one choice went up and another down, by a few levels."""
    found: list[Move] = []
    steps = _effort(state)[0]
    for f, up in _ups(state, steps):
        state.go(_moved(levels, f, -up))
        found += _downs(state, f, steps)
    state.go(levels)
    return found


def _effort(state: _State) -> tuple[int, int]:
    """How many levels an exchange tries, and how often levels are exchanged: less where there are
    many, whose steps are fine."""
    count = sum(map(len, state.choices))
    return next((steps, rounds) for most, steps, rounds in _STEPS if count <= most)


def _near(state: _State, levels: list[int]) -> list[int]:
    """Where more than a percent of the budget is left because no single channel fits: the exchange
    that loses least of those that spend it, if there are any."""
    state.go(levels)
    if state.over() < _NEAR:
        near = [move for move in _exchanges(state, levels) if move[0] >= _NEAR]
        levels = max(near, key=lambda each: each[1])[2] if near else levels
        state.go(levels)
    return levels


def _ups(state: _State, steps: int) -> list[tuple[int, int]]:
    """A few levels up for each choice; of many choices, those worth most for their cost."""
    worth = {}
    for f, here in enumerate(state.levels):
        if here:
            cost = max((-s for s in state.saved(f, here - 1).values()), default=0.0)
            worth[f] = state.gain(f, here - 1) / max(cost, 1e-12)
    first = sorted(worth, key=lambda f: -worth[f])[:_TRIES]
    return [(f, up) for f in first for up in range(1, steps + 1) if state.levels[f] >= up]


def _downs(state: _State, but: int, steps: int) -> Iterator[Move]:
    """How near the targets one choice a few levels down comes, where they hold; with minus the
    loss, and the levels."""
    total, loss, levels = state.costs.total(), state.loss(), list(state.levels)
    if state.over() <= 1:
        yield state.over(), -loss, levels
    for g, choice in enumerate(state.choices):
        for down in range(1, steps + 1) if g != but else ():
            there = levels[g] + down
            if there >= len(choice):
                break
            saved = state.saved(g, there)
            over = max(total[k] / max(t, 1e-9) - saved[k] for k, t in state.targets.items())
            if over <= 1:
                yield over, -loss + state.gain(g, there), _moved(levels, g, down)
