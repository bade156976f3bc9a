"""Step `groups`: merge ties into coupled channels, and channels into groups.

A *channel* is one connected class of ids: slices of parameters that must go together. Channels
whose slices lie in the same dims of the same parameters form a *group*.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import groupby

import numpy as np
import torch
from torch import Tensor, fx

from .flow import Flow
from .ids import ColumnTie, Freeze, Role, RowTie, Slot, Tie


@dataclass(frozen=True)
class Member:
    """A group's part of one parameter dim: ``positions[c]`` are the indices of channel c there.

    Positions count along the dim, or over (blocks x dim) where blocks have channels of their own.
    ``node`` is the one that first reads the parameter.
    """

    param: str
    dim: int
    role: Role
    positions: np.ndarray
    blocks: int = 1
    node: fx.Node | None = None


@dataclass(frozen=True, repr=False)
class Group:
    """Channels that lie in the same parameter dims. ``channels`` are class numbers."""

    name: str
    channels: np.ndarray
    members: tuple[Member, ...]
    frozen: Freeze | None = None

    def __len__(self) -> int:
        return len(self.channels)

    def __repr__(self) -> str:
        stays = f", stays: {self.frozen.reason}" if self.frozen else ""
        return f"<Group {self.name}: {len(self)} channels in {len(self.members)} slices{stays}>"

    @property
    def prunable(self) -> bool:
        return self.frozen is None

    @property
    def is_place(self) -> bool:
        """Whether these are places in a table (of positions, tokens, pixels) and no channels: they
        stay, and no layer makes or reads them."""
        return not self.prunable and all(m.role in ("free", "through") for m in self.members)


@dataclass(frozen=True)
class Constraint:
    """The same number of channels must be kept of each row. Channel 0 is always kept."""

    node: fx.Node
    rows: np.ndarray


@dataclass
class Groups:
    """All groups of a network, and what binds their choice.

    ``groups``      all of channels; places in tables of parameters are left out
    ``channel``     id -> channel number; 0 for ids that cannot go
    ``ties``        all that made classes of ids
    ``keep_one``    sets of channels of which one at least must stay (pieces of a split)
    """

    groups: list[Group]
    channel: np.ndarray
    ties: list[Tie] = field(default_factory=list)
    constraints: list[Constraint] = field(default_factory=list)
    keep_one: list[np.ndarray] = field(default_factory=list)

    @property
    def prunable(self) -> list[Group]:
        return [group for group in self.groups if group.prunable]


_Band = RowTie | ColumnTie


def groups(flow: Flow) -> Groups:
    """Merge the ties of `flow`; order groups as their first parameter appears in the graph."""
    label, ties, extra = _settled(flow)
    reasons = _frozen(flow, label, extra)
    slots = [slot for per in flow.ids.slots.values() for slot in per]
    _freeze_unmade(label, slots, reasons)
    found = [g for g in _grouped(slots, label, reasons) if not g.is_place]
    channel = np.where(np.isin(label, list(reasons)), 0, label + 1) if reasons else label + 1
    channel[0] = 0
    result = Groups([_numbered(group) for group in found], channel, ties)
    result.constraints = list(_constraints(flow, channel))
    result.keep_one = _unique(_pieces(flow, channel))
    return result


def _settled(flow: Flow) -> tuple[np.ndarray, list[Tie], list[Freeze]]:
    """Classes once it is known which rows go as a whole, all ties that made them, and what is
    frozen because of that."""
    rows, columns = list(flow.ids.rows), list(flow.ids.columns)
    ties, frozen = list(flow.ids.ties), []
    while True:
        label = _components(ties, flow.ids.count)
        settled: list[_Band] = [
            row for row in rows if all(_goes_whole(label, ids) for ids in _sides(row))
        ]
        settled = settled or [column for column in columns if not _goes_whole(label, column.ids)]
        if not settled:
            break
        rows = [row for row in rows if row not in settled]
        columns = [column for column in columns if column not in settled]
        ties += [tie for each in settled if (tie := _row_or_column_tie(each))]
        frozen += [_stopped(each) for each in settled if each.other is None]
    rest: list[_Band] = [*rows, *columns]
    frozen += [freeze for tied in rest for freeze in _beside(label, tied)]
    return label, ties, frozen


def _sides(row: RowTie) -> list[Tensor]:
    return [row.ids] if row.other is None else [row.ids, row.other]


def _goes_whole(label: np.ndarray, ids: Tensor) -> bool:
    rows = label[ids.numpy()]
    return bool((rows == rows[:, :1]).all())


def _row_or_column_tie(tied: _Band) -> Tie | None:
    if tied.other is None:
        return None
    if isinstance(tied, RowTie):
        return Tie(tied.node, tied.ids[:, 0], tied.other[:, 0])
    return Tie(tied.node, tied.ids, tied.other.expand_as(tied.ids))


def _beside(label: np.ndarray, tied: _Band) -> list[Freeze]:
    """What would have to go whole beside something that does not."""
    if tied.other is None:
        return []
    sides = _sides(tied) if isinstance(tied, RowTie) else []
    whole = [ids for ids in sides if _goes_whole(label, ids)] if sides else [tied.other]
    return [Freeze(tied.node, ids, "belongs to whole rows of channels") for ids in whole]


def _stopped(tied: _Band) -> Freeze:
    rows = isinstance(tied, RowTie)
    why = "would lose whole blocks on one side" if rows else "meets a constant or an input"
    return Freeze(tied.node, tied.ids, why)


def _components(ties: list[Tie], count: int) -> np.ndarray:
    """A class number for each id."""
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    pairs = [(t.left.reshape(-1).numpy(), t.right.reshape(-1).numpy()) for t in ties]
    left = np.concatenate([a for a, _ in pairs]) if pairs else np.zeros(0, np.int64)
    right = np.concatenate([b for _, b in pairs]) if pairs else np.zeros(0, np.int64)
    real = (left > 0) & (right > 0)
    entries = (np.ones(int(real.sum()), bool), (left[real], right[real]))
    edges = coo_matrix(entries, shape=(count, count))
    return connected_components(edges, directed=False)[1].astype(np.int64)


def _frozen(flow: Flow, label: np.ndarray, extra: list[Freeze]) -> dict[int, Freeze]:
    """Class -> the first thing that freezes it; ties with id 0 freeze too."""
    reasons: dict[int, Freeze] = {}
    records = [*flow.ids.frozen, *extra]
    for tie in flow.ids.ties:
        left, right = tie.left, tie.right
        if bool((left == 0).any()) or bool((right == 0).any()):
            lost = torch.cat([left[right == 0], right[left == 0]])
            records.append(Freeze(tie.node, lost, "meets elements that have no channel"))
    for record in records:
        for each in np.unique(label[record.ids.reshape(-1).numpy()]):
            reasons.setdefault(int(each), record)
    reasons.pop(int(label[0]), None)
    return reasons


def _freeze_unmade(label: np.ndarray, slots: list[Slot], reasons: dict[int, Freeze]) -> None:
    """Channels that no parameter makes stay, and those of tables that no layer reads."""
    if not slots:
        return
    classes, which = _laid_out(slots, label)
    makes = np.array([slot.role in ("out", "free") for slot in slots])
    reads = np.array([slot.role != "free" for slot in slots])
    made = np.zeros(label.max() + 1, bool)
    made[classes[makes[which]]] = True
    first, last = np.zeros(len(made), int), np.zeros(len(made), int)
    first[classes[::-1]], last[classes] = which[::-1], which
    used = first != last  # two tables that share channels read each other
    used[classes[reads[which]]] = True
    for fine, why in ((made, "is made by no parameter"), (used, "is read by no layer")):
        known = fine.copy()
        known[list(reasons)] = True
        freezes: dict[int, Freeze] = {}
        for at in np.flatnonzero(~known[classes]).tolist():
            slot = slots[which[at]]
            freeze = freezes.setdefault(int(which[at]), Freeze(slot.node, slot.ids, why))
            reasons.setdefault(int(classes[at]), freeze)


def _laid_out(slots: list[Slot], label: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The class of each element of all slots in a row, and the number of its slot."""
    arrays = [slot.ids.reshape(-1).numpy() for slot in slots]
    which = np.repeat(np.arange(len(slots)), [len(a) for a in arrays])
    return label[np.concatenate(arrays)], which


def _grouped(slots: list[Slot], label: np.ndarray, reasons: dict[int, Freeze]) -> list[Group]:
    if not slots:
        return []
    classes, which = _laid_out(slots, label)
    ends = np.cumsum([slot.ids.numel() for slot in slots])
    where = np.arange(len(classes)) - np.concatenate([[0], ends[:-1]])[which]
    real = (
        classes != label[0]
    )  # what has no channel, as coordinates beside channels, is in no group
    classes, which, where = classes[real], which[real], where[real]
    if not len(classes):
        return []
    order = np.argsort(classes.astype(np.int32), kind="stable")  # slots are in order already
    classes, which, where = classes[order], which[order], where[order]
    starts = np.flatnonzero(np.concatenate([[True], classes[1:] != classes[:-1]]))
    stops = np.append(starts[1:], len(classes))
    present = np.argsort(order[starts], kind="stable")  # channels as they first appear
    spans, names = np.stack([starts, stops], 1)[present], classes[starts][present]
    signature = _signatures(classes, which, label.max() + 1)[names]
    return [
        _group(names[at], spans[at], which, where, slots, reasons)
        for at in _equal(signature ^ _reason_numbers(names, reasons))
    ]


def _reason_numbers(names: np.ndarray, reasons: dict[int, Freeze]) -> np.ndarray:
    """A number for each class that is the same where the reason is the same object."""
    found = np.zeros(int(names.max()) + 1, np.int64)
    known: dict[int, int] = {}
    for each, why in reasons.items():
        if each < len(found):
            found[each] = known.setdefault(id(why), len(known) + 1)
    return found[names]


def _equal(keys: np.ndarray) -> list[np.ndarray]:
    """The places of equal keys, in the order of their first."""
    order = np.argsort(keys, kind="stable")
    cuts = np.flatnonzero(keys[order][1:] != keys[order][:-1]) + 1
    return sorted(np.split(order, cuts), key=lambda places: places[0])


def _signatures(classes: np.ndarray, which: np.ndarray, count: int) -> np.ndarray:
    """A hash of (slots, how often) for each class; equal for channels of one group."""
    weights = np.random.default_rng(0).integers(1, 2**62, int(which.max()) + 1, dtype=np.int64)
    found = np.zeros(count, np.int64)
    with np.errstate(over="ignore"):
        np.add.at(found, classes, weights[which])
    return found


def _group(
    channels: np.ndarray,
    spans: np.ndarray,
    which,
    where,
    slots: list[Slot],
    reasons: dict[int, Freeze],
) -> Group:
    index = spans[:, :1] + np.arange(spans[0, 1] - spans[0, 0])
    positions, members, at = where[index], [], 0
    for number, run in groupby(which[index[0]].tolist()):
        slot, count = slots[number], len(list(run))
        blocks = slot.ids.shape[0] if slot.ids.ndim == 2 else 1
        taken = positions[:, at : at + count]
        members.append(Member(slot.param, slot.dim, slot.role, taken, blocks, slot.node))
        at += count
    maker = next((m for m in members if m.role in ("out", "free")), members[0])
    name = maker.param.rsplit(".", 1)[0] if maker.param.endswith(".weight") else maker.param
    return Group(name, channels, tuple(members), reasons.get(int(channels[0])))


def _numbered(group: Group) -> Group:
    return Group(group.name, group.channels + 1, group.members, group.frozen)


def _constraints(flow: Flow, channel: np.ndarray):
    seen = set()
    for node, arrays in flow.ids.splits.items():
        for ids in arrays:
            rows = _rows(channel[ids.numpy()])
            if rows is not None and (key := (rows.shape, rows.tobytes())) not in seen:
                seen.add(key)
                yield Constraint(node, rows)


def _rows(grid: np.ndarray) -> np.ndarray | None:
    """The distinct rows along the last varying axis; None if channels vary along one axis only."""
    for axis in range(grid.ndim):
        first = np.take(grid, [0], axis)
        if (grid == first).all():
            grid = first
    grid = grid.reshape([n for n in grid.shape if n > 1] or [1])
    if grid.ndim < 2 or not grid.any():
        return None
    rows = grid.reshape(-1, grid.shape[-1])
    _, first = np.unique(rows, axis=0, return_index=True)
    rows = rows[np.sort(first)]
    return rows if len(rows) > 1 else None


def _pieces(flow: Flow, channel: np.ndarray):
    for ids in flow.ids.pieces:
        found = np.unique(channel[ids.numpy()])
        if len(found) and found[0] > 0:
            yield found


def _unique(arrays) -> list[np.ndarray]:
    return list({array.tobytes(): array for array in arrays}.values())
