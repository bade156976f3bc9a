"""What is left of each value once a choice of channels is made."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, fx

from .errors import FxpruneError
from .flow import Flow
from .ids import Layer, Slot, Value
from .plans import Kept


class RewriteError(FxpruneError):
    """A choice of channels cannot be written as a graph at this node."""

    def __init__(self, node: fx.Node, fault: str):
        super().__init__(fault)
        self.node = node


class Widths:
    """New shapes, masks and compacted ids of values. ``kept``: id -> whether it stays."""

    def __init__(self, flow: Flow, kept: Tensor):
        self.flow, self.kept = flow, kept
        self._shapes: dict[fx.Node, tuple[int, ...]] = {}

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
        mask = mask.squeeze()
        if mask.ndim == 1:
            return [int(mask.sum())]
        sizes = [int(mask.any(dim=_others(mask.ndim, d)).sum()) for d in range(mask.ndim)]
        if mask.ndim > 1:
            counts = mask.reshape(-1, mask.shape[-1]).sum(-1)
            counts = counts[counts > 0]
            if len(counts) == 0 or int(counts.min()) != int(counts.max()):
                raise RewriteError(
                    node, f"blocks at %{node.name} would keep different numbers of channels"
                )
            sizes[-1] = int(counts[0])
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
            if layer.varying == (dim,):
                kept &= mask.reshape(-1)
            elif not mask.any(dim=_others(mask.ndim, dim)).all() or dim == layer.varying[-1]:
                return None
        return kept

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
        masks: dict[int, Tensor] = {}
        for slot in self.flow.ids.slots.get(name, ()):
            mask = self.kept[slot.ids]
            masks[slot.dim] = masks[slot.dim] & mask if slot.dim in masks else mask
        return {dim: _indices(mask) for dim, mask in masks.items() if not mask.all()}


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


def gather(tensor: Tensor, kept: dict[int, Kept]) -> Tensor:
    """The kept slices of a parameter, in one copy.

    Blocks of dim 0 with indices of their own (lists of lists) are taken block by block.
    """
    blocks = next((rows for rows in kept.values() if rows and isinstance(rows[0], list)), None)
    if blocks is None:
        for dim, rows in kept.items():
            tensor = tensor.index_select(
                dim, torch.tensor(rows, dtype=torch.long, device=tensor.device)
            )
        return tensor
    own = {dim: rows for dim, rows in kept.items() if rows and isinstance(rows[0], list)}
    shared = {dim: rows for dim, rows in kept.items() if dim not in own and dim != 0}
    first = kept.get(0, list(range(tensor.shape[0])))
    size = len(first) // len(blocks)
    parts = []
    for b in range(len(blocks)):
        part = {
            0: first[b * size : (b + 1) * size],
            **shared,
            **{dim: rows[b] for dim, rows in own.items()},
        }
        parts.append(gather(tensor, part))
    return torch.cat(parts)
