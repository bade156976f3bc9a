"""Channel ids: which channel each element of a value belongs to, and which channels go together.

An id is a positive integer; 0 means "no channel, cannot go". A value carries *layers* of ids: int
tensors of the value's rank whose dims have the value's size, or 1 where the ids do not vary. An
element is gone when the channel of any of its layers is.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor, fx

_MANY = 1 << 16  # ids of a freeze that are better kept once each

Role = Literal["out", "in", "through", "scale", "free"]


@dataclass(frozen=True, eq=False)
class Layer:
    """One layer of ids. ``zero``: masked channels hold exact zeros here. ``origin``: the ids as
    they stood when a reshape first spread them over several dims."""

    ids: Tensor
    zero: bool = True
    origin: Tensor | None = None

    @property
    def varying(self) -> tuple[int, ...]:
        """The dims along which the ids vary."""
        return tuple(d for d, size in enumerate(self.ids.shape) if size > 1)


@dataclass(frozen=True, eq=False)
class Value:
    """What flow knows of one tensor. ``param`` names a parameter or buffer no rule has read yet;
    ``weight``: computed from parameters alone."""

    shape: tuple[int, ...]
    layers: tuple[Layer, ...] = ()
    param: str | None = None
    weight: bool = False


@dataclass(frozen=True, eq=False)
class Slot:
    """One dim of one parameter or buffer, with the channel of each index.

    ``ids`` is 1-D, or (blocks, size) where each of equal blocks of dim 0 has its own channels at
    the same index (the inputs of a grouped convolution).
    """

    param: str
    dim: int
    ids: Tensor
    role: Role
    node: fx.Node | None = None


@dataclass(frozen=True, eq=False)
class Tie:
    """Ids that must go together, elementwise, and the node that says so."""

    node: fx.Node | None
    left: Tensor
    right: Tensor


@dataclass(frozen=True, eq=False)
class RowTie:
    """Ids over (rows, columns) that meet something with one element a row.

    If the columns of a row turn out to go together, the row is tied to ``other`` (frozen, if
    ``other`` has no ids). If not, columns go row by row in equal numbers and rows stay: then
    ``other`` stays too. ``other`` is over (rows, columns of its own): where these go one by one as
    well, nothing ties the two.
    """

    node: fx.Node | None
    ids: Tensor
    other: Tensor | None


@dataclass(frozen=True, eq=False)
class ColumnTie:
    """Ids over (rows, columns) that meet something with one element a column.

    If rows turn out to go as a whole, all columns stay, and with them ``other``. If not, each
    column is tied to ``other`` (frozen, if ``other`` has no ids).
    """

    node: fx.Node | None
    ids: Tensor
    other: Tensor | None


@dataclass(frozen=True, eq=False)
class Freeze:
    """Ids that cannot go, where and why."""

    node: fx.Node | None
    ids: Tensor
    reason: str


@dataclass
class Ids:
    """All ids handed out so far and what is known of them."""

    count: int = 1
    ties: list[Tie] = field(default_factory=list)
    frozen: list[Freeze] = field(default_factory=list)
    rows: list[RowTie] = field(default_factory=list)
    columns: list[ColumnTie] = field(default_factory=list)
    slots: dict[str, list[Slot]] = field(default_factory=dict)
    splits: dict[fx.Node, list[Tensor]] = field(default_factory=dict)
    pieces: list[Tensor] = field(default_factory=list)

    def fresh(self, *shape: int) -> Tensor:
        """New ids of this shape."""
        size = 1
        for n in shape:
            size *= n
        made = torch.arange(self.count, self.count + size).view(shape)
        self.count += size
        return made

    def tie(self, node: fx.Node | None, left: Tensor, right: Tensor) -> None:
        """Tie two broadcastable id tensors element by element."""
        if left is right:
            return
        left, right = torch.broadcast_tensors(left, right)
        self.ties.append(Tie(node, left, right))

    def freeze(self, node: fx.Node | None, ids: Tensor, reason: str) -> None:
        self.frozen.append(Freeze(node, self._each(ids) if ids.numel() > _MANY else ids, reason))

    def _each(self, ids: Tensor) -> Tensor:
        """The ids of a large tensor, each once."""
        found = torch.zeros(self.count, dtype=torch.bool)
        found[ids.reshape(-1)] = True
        return found.nonzero().flatten()

    def split(self, node: fx.Node, ids: Tensor) -> None:
        """The ids vary jointly over several dims here: the kept ones must stay a full grid."""
        self.splits.setdefault(node, []).append(ids.squeeze())

    def slot(self, param: str, dim: int, ids: Tensor, role: Role, node: fx.Node | None) -> None:
        self.slots.setdefault(param, []).append(Slot(param, dim, ids, role, node))


def compress(ids: Tensor, dims: Sequence[int]) -> Tensor:
    """The same ids with those of `dims` along which they do not vary reduced to size 1."""
    before = ids.numel()
    for d in dims:
        if ids.shape[d] > 1:
            first = ids.narrow(d, 0, 1)
            if torch.equal(ids, first.expand_as(ids)):
                ids = first
    return ids.clone() if ids.numel() < before else ids  # a view would keep all of them alive
