"""Step `select`: which channels stay.

Channels are chosen by score within each group (``scope="local"``) or over all (``"global"``), or so
that a budget is met at the least loss of importance ("knapsack"), under the constraints of flow:
equal counts in the blocks of a grouped layer, at least one channel of each piece. Equal scores are
broken by position, so every machine chooses the same.
"""

from __future__ import annotations

import fnmatch
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

import numpy as np

from .budget import Choice, Solved, solve_for
from .costs import Costs
from .groups import Constraint, Group, Groups
from .program import solve

Curve = Callable[[float], float]
_LEVELS = 64  # of families whose choices have to be solved for
_ALMOST_ALL = 1 - 1e-9  # of what a layer is worth

Scope = Literal["local", "global"]
SelectRule = Literal["rate", "cumulative", "threshold", "knapsack"]


@dataclass(frozen=True)
class Options:
    """How much to remove, from where.

    ``rate``: share of channels removed. ``rates``: pattern -> rate, over it. ``rule``: "rate"
    (the lowest scores), "cumulative" (the longest ascending prefix whose summed share is at most
    the rate), "threshold" (Network Slimming: keep scores strictly above the one at the rate),
    "knapsack" (the least summed score removed at which ``target`` is met: kind of cost -> amount).
    ``ignored``: group number -> why it is left alone. ``outside``: groups nothing is asked of.
    ``widths``: group number -> how many channels it keeps, over all rates. ``own``: group number ->
    its own ``min_channels``, ``max_rate`` and ``round_to``. ``curves``: group number -> what is
    lost with a share of its channels, in place of the sum of their scores.
    """

    rate: float = 0.0
    scope: Scope = "local"
    rule: SelectRule = "rate"
    rates: Mapping[str, float] = field(default_factory=dict)
    ignored: Mapping[int, str] = field(default_factory=dict)
    min_channels: int = 1
    max_rate: float = 1.0
    round_to: int = 1
    outside: frozenset[int] = frozenset()
    widths: Mapping[int, int] = field(default_factory=dict)
    target: Mapping[str, float] = field(default_factory=dict)
    curves: Mapping[int, Curve] = field(default_factory=dict)
    own: Mapping[int, Mapping[str, float]] = field(default_factory=dict)

    def of(self, i: int) -> Options:
        """The options of one group."""
        own: Any = self.own.get(i)
        return replace(self, **own, own={}) if own else self


@dataclass
class Selection:
    """``kept``: channel number -> whether it stays. ``reasons``: group -> why it gave less.
    ``warnings``: what is odd about the choice. ``solved``: what came of a budget."""

    kept: np.ndarray
    reasons: dict[int, str]
    warnings: list[str] = field(default_factory=list)
    solved: Solved | None = None


@dataclass
class Family:
    """Groups that constraints bind together; most are a single group."""

    groups: list[int]
    constraints: list[Constraint]


def select(
    groups: Groups,
    scores: Mapping[int, np.ndarray],
    options: Options,
    costs: Costs | None = None,
) -> Selection:
    """Choose the channels to keep of every group in `groups`; a knapsack needs the costs."""
    if options.rule == "knapsack":
        assert costs is not None
        return _knapsack(groups, scores, options, costs)
    kept = np.ones(int(groups.channel.max()) + 1, bool)
    reasons: dict[int, str] = {}
    asked = {i: asked_rate(groups, i, options) for i in scores}
    wanted = _wanted(groups, scores, asked, options)
    must = _must_stay(groups, scores, options)
    for family in families(groups, scores):
        _choose(groups, family, scores, wanted, options, must, kept, reasons)
    _restore_broken(groups, scores, kept, reasons)
    if options.rule != "rate" or options.scope == "global":
        asked = {i: count / len(groups.groups[i]) for i, count in wanted.items()}
    for i, rate in asked.items():
        _explain_shortfall(groups, i, rate, kept, options, reasons)
    return Selection(kept, reasons, list(_ties(scores, wanted, options)))


def _knapsack(groups: Groups, scores, options: Options, costs: Costs) -> Selection:
    kept = np.ones(int(groups.channel.max()) + 1, bool)
    must = _must_stay(groups, scores, options)
    found = families(groups, scores)
    choices = [_choice(groups, family, scores, options, must) for family in found]
    choices = [_at_own_rate(groups, *pair, options) for pair in zip(found, choices, strict=True)]
    for family, choice in zip(found, choices, strict=True):
        curve = next((options.curves[i] for i in family.groups if i in options.curves), None)
        if curve is not None:
            choice.loss = _measured(choice, curve)
    solved = solve_for(choices, costs, options.target)
    for choice, level in zip(choices, solved.levels, strict=True):
        kept[choice.channels] = choice.masks[level]
    reasons = {i: options.ignored[i] for i in scores if i in options.ignored}
    _restore_broken(groups, scores, kept, reasons)
    return Selection(kept, reasons, solved=solved)


def _at_own_rate(groups: Groups, family: Family, choice: Choice, options: Options) -> Choice:
    """The one level that `rates` ask of a family; all levels where they ask for none."""
    own = {i: _own_rate(groups.groups[i], options) for i in family.groups}
    counts = [_count(len(groups.groups[i]) * rate) for i, rate in own.items() if rate is not None]
    if not counts:
        return choice
    level = int(np.searchsorted(choice.removed, sum(counts), side="right")) - 1
    one = [level]
    return Choice(choice.channels, choice.removed[one], choice.loss[one], [choice.masks[level]])


def _measured(choice: Choice, curve: Curve) -> np.ndarray:
    """What was measured to be lost at each level; never less than with fewer gone."""
    losses = [curve(count / len(choice.channels)) if count else 0.0 for count in choice.removed]
    return np.maximum.accumulate(np.array(losses))


def _choice(groups: Groups, family: Family, scores, options: Options, must) -> Choice:
    """The numbers of channels that a family may lose, and what is lost with them."""
    if not family.constraints:
        (i,) = family.groups
        return _single_choice(groups.groups[i].channels, scores[i], options.of(i), must)
    channels = np.concatenate([groups.groups[i].channels for i in family.groups])
    value = np.concatenate([_normal(scores[i]) for i in family.groups])
    flat = np.concatenate([scores[i] for i in family.groups])
    masks = {0: np.ones(len(channels), bool)}
    most = int((~must[channels]).sum())
    for limit in np.unique(np.linspace(0, most, min(most, _LEVELS) + 1).astype(int))[1:]:
        found = _bound(groups, family, channels, value, must, options, int(limit))
        masks.setdefault(int((~found).sum()), found)
    removed = np.array(sorted(masks))
    summed = np.array([float(flat[~masks[count]].sum()) for count in removed])
    loss = _of_what_is_left(summed, flat)
    return Choice(channels, removed, loss, [masks[int(count)] for count in removed])


def _single_choice(channels: np.ndarray, scores: np.ndarray, options: Options, must) -> Choice:
    order = np.lexsort((scores, must[channels]))
    most = int((~must[channels]).sum())
    removed = np.array([k for k in range(most + 1) if _allowed(len(order), k, options) == k])
    summed = np.concatenate([[0.0], np.cumsum(scores[order])])[removed]
    return Choice(channels, removed, _of_what_is_left(summed, scores), _Masks(order, removed))


def _of_what_is_left(summed: np.ndarray, scores: np.ndarray) -> np.ndarray:
    """What is lost with scores of some sums: the sum while it is small, and more as less is left,
    by which each next channel is then divided. The fewer there are, the less can they make up for
    another; sums alone empty whole layers."""
    total = scores.sum()
    if total <= 0:
        return np.maximum.accumulate(np.maximum(summed, 0.0))
    return -total * np.log1p(-np.clip(summed / total, 0, _ALMOST_ALL))


class _Masks(Sequence[np.ndarray]):
    """What stays at each level, the first of an order going first."""

    def __init__(self, order: np.ndarray, removed: np.ndarray):
        self.order, self.removed = order, removed

    def __len__(self) -> int:
        return len(self.removed)

    def __getitem__(self, level: Any) -> Any:
        mask = np.ones(len(self.order), bool)
        mask[self.order[: self.removed[level]]] = False
        return mask


def _ties(scores: Mapping[int, np.ndarray], wanted: Mapping[int, int], options: Options):
    """A threshold takes all scores that equal it."""
    inside = [i for i in scores if i not in options.outside and i not in options.ignored]
    every, gone = sum(len(scores[i]) for i in inside), sum(wanted[i] for i in inside)
    if (
        options.rule == "threshold"
        and gone > every * (options.rate + 0.02) + 1
        and not options.rates
    ):
        yield (
            f"{gone:,} of {every:,} scores are not above the threshold, {options.rate:.0%} were "
            "asked: many are equal, as gammas are before sparse training"
        )


def asked_rate(groups: Groups, i: int, options: Options) -> float:
    """The rate asked of a group: the last pattern that matches one of its layers."""
    if i in options.outside:
        return 0.0
    rate = _own_rate(groups.groups[i], options)
    return options.rate if rate is None else rate


def asked_widths(groups: Groups, options: Options) -> dict[int, int]:
    """How many channels each group is asked to keep, where that does not depend on scores."""
    found = {}
    for i, group in enumerate(groups.groups):
        size = len(group)
        own = options.of(i)
        count = 0 if i in options.ignored else _count(size * asked_rate(groups, i, options))
        found[i] = size - _allowed(size, min(count, size - own.min_channels), own)
    return found


def _own_rate(group: Group, options: Options) -> float | None:
    return own_value(group, options.rates)


def own_value(group: Group, named: Mapping[str, float]) -> float | None:
    """What an option says of a group: the value of the last pattern that matches one of its
    layers."""
    found = None
    for pattern, value in named.items():
        if any(fnmatch.fnmatchcase(name, pattern) for name in layer_names(group)):
            found = value
    return found


def layer_names(group: Group) -> list[str]:
    """The layers that make a group's channels, and their parameters' names."""
    makers = [m.param for m in group.members if m.role in ("out", "free")]
    return [name for param in makers for name in (param, param.rpartition(".")[0])]


def _wanted(groups: Groups, scores, asked: Mapping[int, float], options: Options) -> dict[int, int]:
    """How many channels each group should lose, before constraints."""
    left_out = {*options.ignored, *options.outside, *options.widths}
    allowed = {i: rate for i, rate in asked.items() if i not in left_out}
    if options.rule == "cumulative":
        wanted = {i: _cumulative(scores[i], rate) for i, rate in allowed.items()}
    elif options.scope == "global" or options.rule == "threshold":
        wanted = _global(groups, scores, allowed, options)
    else:
        wanted = {i: _count(len(scores[i]) * rate) for i, rate in allowed.items()}
    wanted |= {i: len(groups.groups[i]) - width for i, width in options.widths.items()}
    return {i: wanted.get(i, 0) for i in asked}


def _count(share: float) -> int:
    return math.floor(share + 1e-9)


def _cumulative(scores: np.ndarray, rate: float) -> int:
    total = scores.sum()
    shares = np.sort(scores / total if total > 0 else np.full(len(scores), 1 / len(scores)))
    return int(np.searchsorted(np.cumsum(shares), rate + 1e-12, side="right"))


def _global(
    groups: Groups, scores, allowed: Mapping[int, float], options: Options
) -> dict[int, int]:
    """One cut through all channels; groups with a rate of their own are cut apart."""
    apart = {
        i: _count(len(scores[i]) * rate)
        for i, rate in allowed.items()
        if _own_rate(groups.groups[i], options) is not None
    }
    shared = [i for i in allowed if i not in apart]
    if not shared:
        return apart
    flat = np.concatenate([scores[i] for i in shared])
    owner = np.concatenate([np.full(len(scores[i]), i) for i in shared])
    order = np.argsort(flat, kind="stable")
    count = _count(len(flat) * options.rate)
    if options.rule == "threshold" and options.rate > 0:
        cut = flat[order[min(count, len(flat) - 1)]]
        gone = flat <= cut
    else:
        gone = np.zeros(len(flat), bool)
        gone[order[:count]] = True
    return {**apart, **{i: int(gone[owner == i].sum()) for i in shared}}


def families(groups: Groups, scores) -> list[Family]:
    """The groups of `scores`, those that share a constraint together."""
    owner = np.full(int(groups.channel.max()) + 1, -1)
    for i in scores:
        owner[groups.groups[i].channels] = i
    parent = {i: i for i in scores}

    def root(i: int) -> int:
        while parent[i] != i:
            i = parent[i]
        return i

    touched = [(c, np.unique(owner[c.rows])) for c in groups.constraints]
    touched = [(c, members[members >= 0]) for c, members in touched]
    for _, members in touched:
        for member in members[1:]:
            parent[root(int(member))] = root(int(members[0]))
    found: dict[int, Family] = {}
    for i in scores:
        found.setdefault(root(i), Family([], [])).groups.append(i)
    for constraint, members in touched:
        if len(members):
            found[root(int(members[0]))].constraints.append(constraint)
    return list(found.values())


def _must_stay(groups: Groups, scores, options: Options) -> np.ndarray:
    """The best channels of each group and of each piece of a split; all of an ignored group. Of
    equal ones the last stay, as the first go."""
    must = np.zeros(int(groups.channel.max()) + 1, bool)
    best = np.zeros(len(must))
    bound = {i for each in families(groups, scores) if each.constraints for i in each.groups}
    for i, values in scores.items():
        channels = groups.groups[i].channels
        best[channels] = values
        whole = i in options.ignored or i in options.outside
        least = 1 if i in bound else options.of(i).min_channels  # the best may lie in one block
        floor = len(values) if whole else min(least, len(values))
        must[channels[np.argsort(values, kind="stable")[-floor:]]] = True
    for piece in groups.keep_one:
        must[piece[np.argsort(best[piece], kind="stable")[-1]]] = True
    return must


def _choose(
    groups: Groups, family: Family, scores, wanted, options: Options, must, kept, reasons
) -> None:
    """Mark the channels of a family that go."""
    channels = np.concatenate([groups.groups[i].channels for i in family.groups])
    count = sum(wanted[i] for i in family.groups)
    count = min(count, int((~must[channels]).sum()))
    limit = _allowed(len(channels), count, options.of(family.groups[0]))
    if not family.constraints:
        (i,) = family.groups
        order = np.lexsort((scores[i], must[channels]))
        kept[channels[order[:limit]]] = False
        return
    value = np.concatenate([_normal(scores[i]) for i in family.groups])
    kept[channels] = _bound(groups, family, channels, value, must, options, limit)
    for i in family.groups:
        c = family.constraints[0]
        blocks = f"{len(c.rows)} blocks of {c.rows.shape[1]}"
        reasons[i] = f"keeps equal counts in {blocks} (%{c.node.name})"


def _bound(
    groups: Groups, family: Family, channels, value, must, options: Options, limit: int
) -> np.ndarray:
    """What stays of a family; fewer go until every group's width is one that `round_to`,
    `min_channels` and `max_rate` allow."""
    while limit > 0:
        found = solve(channels, value, must[channels], family.constraints, limit)
        ends = np.cumsum([len(groups.groups[i]) for i in family.groups])[:-1]
        parts = zip(family.groups, np.split(found, ends), strict=True)
        if all(_fits(part, options.of(i)) for i, part in parts):
            return found
        limit = min(limit - 1, int((~found).sum()) - 1)
    return np.ones(len(channels), bool)


def _fits(kept: np.ndarray, options: Options) -> bool:
    left, size = int(kept.sum()), len(kept)
    even = left % options.round_to == 0 or left == size
    wide = left >= min(options.min_channels, size)
    return even and wide and size - left <= _count(size * options.max_rate)


def _allowed(size: int, count: int, options: Options) -> int:
    """How many of `size` channels may go when `count` should: floors, caps and rounding."""
    count = min(count, _count(size * options.max_rate))
    if options.round_to > 1:
        left = math.ceil((size - count) / options.round_to) * options.round_to
        count = size - min(size, left)
    return max(count, 0)


def _normal(scores: np.ndarray) -> np.ndarray:
    """Scores of bound groups on one scale: relative to the group's mean."""
    mean = scores.mean()
    return scores / mean if mean > 0 else scores


def _restore_broken(groups: Groups, scores, kept: np.ndarray, reasons: dict[int, str]) -> None:
    """Where no uneven choice could be made even, keep all channels of the groups bound together."""
    for family in families(groups, scores):
        for constraint in family.constraints:
            counts = kept[constraint.rows].sum(1)
            if counts.min() != counts.max() or not counts.min():
                for i in family.groups:
                    kept[groups.groups[i].channels] = True
                    reasons[i] = (
                        f"no equal counts were found in the blocks of %{constraint.node.name}"
                    )


def _explain_shortfall(
    groups: Groups, i: int, rate: float, kept, options: Options, reasons: dict[int, str]
) -> None:
    size = len(groups.groups[i])
    gone = size - int(kept[groups.groups[i].channels].sum())
    found = reasons.pop(i, None)
    if gone < _count(size * rate):
        why = options.ignored.get(i) or found or _limit(size, gone, options.of(i))
        reasons[i] = f"asked {rate:.0%}, got {gone / size:.0%}: {why}"
    elif i in options.ignored:
        reasons[i] = options.ignored[i]


def _limit(size: int, gone: int, options: Options) -> str:
    """The option, or else the split, that let no more than `gone` of `size` channels go."""
    if gone == _count(size * options.max_rate):
        return f"max_rate={options.max_rate:g}"
    if size - gone <= options.min_channels:
        return f"min_channels={options.min_channels}"
    if options.round_to > 1:
        return f"round_to={options.round_to}"
    return "every piece of a split keeps one"
