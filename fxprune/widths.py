"""What is left of each value once a choice of channels is made."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from .errors import FxpruneError
from .flow import Flow
from .ids import Layer, Slot, Value
from .plans import Kept


class RewriteError(FxpruneError):
    """A choice of channels cannot be written as a graph at this node, nor at `others`."""

    def __init__(self, node: fx.Node, fault: str, others: Sequence[RewriteError] = ()):
        super().__init__(fault)
        self.node, self.others = node, others


class Widths:
    """New shapes, masks and compacted ids of values. ``kept``: id -> whether it stays."""

    def __init__(self, flow: Flow, kept: Tensor):
        self.flow, self.kept = flow, kept
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}
        self._kept_rows: dict[Any, Kept | None] = {}

    def value(self, node: fx.Node) -> Any:
        return self.flow.values.get(node)

    def layers(self, value: Value) -> tuple[Layer, ...]:
        """A value's layers; those of a parameter are in its slots."""
        if value.param is None:
            return value.layers
        return tuple(
            _slot_layer(slot, value.shape) for slot in self.flow.ids.slots.get(value.param, ())
        )

    def shape(self, node: fx.Node, value: Value) -> tuple[int, ...]:
        """The value's shape once the others are gone; `RewriteError` if what is left is no grid."""
        shape = list(value.shape)
        for layer in self.layers(value):
            mask = self.mask(value, layer)
            if not mask.all():
                for d, n in zip(_varying(mask), self._grid(node, mask), strict=True):
                    shape[d] = n
        return tuple(shape)

    def mask(self, value: Value, layer: Layer) -> Tensor:
        """What stays along the layer's dims: of this layer, and of others that share a dim."""
        mask, dims = self.kept[layer.ids], set(layer.varying)
        for other in self.layers(value):
            if other is not layer and dims & set(other.varying):
                mask = mask & self.kept[other.ids]
        return mask

    def _grid(self, node: fx.Node, mask: Tensor) -> list[int]:
        """How many are left along each varying dim, of what is left along those before it."""
        mask = mask.squeeze()
        sizes = []
        for d in range(mask.ndim):
            some = mask.reshape(*mask.shape[: d + 1], -1).any(-1).reshape(-1, mask.shape[d])
            counts = some.sum(-1)
            counts = counts[counts > 0]
            if len(counts) == 0 or int(counts.min()) != int(counts.max()):
                raise RewriteError(
                    node, f"blocks at %{node.name} would keep different numbers of channels"
                )
            sizes.append(int(counts[0]))
        return sizes

    def changed(self, value: Any) -> bool:
        """Whether any of the value's channels go."""
        return isinstance(value, Value) and any(
            not self.kept[la.ids].all() for la in self.layers(value)
        )

    def along(self, value: Value, dim: int) -> Tensor | None:
        """The mask of kept indices along a dim; None where what goes is spread over other
        dims too."""
        kept = torch.ones(value.shape[dim], dtype=torch.bool)
        for layer in self.layers(value):
            mask = self.kept[layer.ids]
            if dim not in layer.varying or mask.all():
                continue
            own = mask.any(dim=_others(mask.ndim, dim))
            if _is_grid(mask, dim, own):  # whatever else goes, the same indices along the dim do
                kept &= own
            elif not mask.any(dim=_others(mask.ndim, dim)).all() or dim == layer.varying[-1]:
                return None
        return kept

    def has_channels(self, value: Value, dim: int) -> bool:
        """Whether channels run along a dim."""
        return any(dim % len(value.shape) in layer.varying for layer in self.layers(value))

    def is_width(self, value: Value, dim: int) -> bool:
        """Whether a dim holds channels alone, each once; not channels times pixels, say."""
        along = [la for la in self.layers(value) if dim % len(value.shape) in la.varying]
        return all(len(la.ids.unique()) == la.ids.numel() == value.shape[dim] for la in along)

    def compact(self, node: fx.Node, value: Value, layer: Layer) -> Tensor:
        """The layer's ids that stay, as the pruned graph should deliver them."""
        mask = self.mask(value, layer)
        if mask.all():
            return layer.ids
        shape = [1] * layer.ids.ndim
        for d, n in zip(_varying(mask), self._grid(node, mask), strict=True):
            shape[d] = n
        return layer.ids.expand(mask.shape)[mask].reshape(shape)

    def kept_of(self, name: str) -> dict[int, Kept]:
        """The kept indices of each narrower dim of a parameter, as a plan holds them."""
        slots = self.flow.ids.slots.get(name, ())
        if len({slot.dim for slot in slots}) == len(slots):
            found = {slot.dim: self._rows_of(slot.ids) for slot in slots}
            return {dim: rows for dim, rows in found.items() if rows is not None}
        masks: dict[int, Tensor] = {}
        for slot in slots:
            mask = self.kept[slot.ids]
            masks[slot.dim] = masks[slot.dim] & mask if slot.dim in masks else mask
        return {dim: _indices(mask) for dim, mask in masks.items() if not mask.all()}

    def _rows_of(self, ids: Tensor) -> Kept | None:
        """Kept indices of one slot; None if all stay. Equal views give the same list."""
        key = (ids.data_ptr(), ids.shape, ids.stride())
        if key not in self._kept_rows:
            mask = self.kept[ids]
            self._kept_rows[key] = None if mask.all() else _indices(mask)
        return self._kept_rows[key]


def _is_grid(mask: Tensor, dim: int, own: Tensor) -> bool:
    """Whether a mask is one along `dim` and one along all others together."""
    shape = [-1 if d == dim else 1 for d in range(mask.ndim)]
    return torch.equal(mask, mask.any(dim, keepdim=True) & own.view(shape))


def _indices(mask: Tensor) -> Kept:
    if mask.ndim == 1:
        return mask.nonzero().flatten().tolist()
    rows = [row.nonzero().flatten().tolist() for row in mask]
    return [row for row in rows if row]


def _varying(mask: Tensor) -> list[int]:
    return [d for d, size in enumerate(mask.shape) if size > 1]


def _others(rank: int, axis: int) -> tuple[int, ...]:
    return tuple(d for d in range(rank) if d != axis)


def _slot_layer(slot: Slot, shape: tuple[int, ...]) -> Layer:
    dims = [1] * len(shape)
    dims[slot.dim] = shape[slot.dim]
    ids = slot.ids
    if ids.ndim == 2:
        dims[0] = shape[0]
        ids = ids.repeat_interleave(shape[0] // ids.shape[0], 0)
    return Layer(ids.reshape(dims))


def gather(tensor: Tensor, kept: dict[int, Kept], known: dict[int, Tensor] | None = None) -> Tensor:
    """The kept slices of a parameter, in one copy.

    Blocks of dim 0 with indices of their own (lists of lists) are taken block by block.
    `known` remembers the tensors of index lists that are used again.
    """
    known = {} if known is None else known
    for dim, rows in sorted(kept.items()):
        index = known.get(id(rows))
        if index is None:
            index = known[id(rows)] = torch.tensor(rows, dtype=torch.long, device=tensor.device)
        tensor = (
            _by_block(tensor, dim, index) if index.ndim == 2 else tensor.index_select(dim, index)
        )
    return tensor


def _by_block(tensor: Tensor, dim: int, index: Tensor) -> Tensor:
    """Each of equal blocks of dim 0 with its own indices along `dim`."""
    blocks = tensor.unflatten(0, (len(index), -1)).movedim(dim + 1, 1)
    taken = blocks[torch.arange(len(index), device=index.device)[:, None], index]
    return taken.movedim(1, dim + 1).flatten(0, 1).contiguous()
