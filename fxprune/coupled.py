"""Coupled slices in place: sums over the channels of a group, and factors on their slices."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from .groups import Group, Member


@dataclass
class Part:
    """A member's slices: ``owner`` is the channel of each index of its dim (over blocks x dim where
    blocks have channels of their own), and the number of channels where it has none."""

    param: str
    dim: int
    blocks: int
    owner: Tensor

    def rows(self, tensor: Tensor) -> Tensor:
        """A view of the parameter, (blocks, dim, ...)."""
        split = tensor.view(self.blocks, -1, *tensor.shape[1:])
        return split.movedim(self.dim + 1, 1)

    def owner_on(self, device: torch.device) -> Tensor:
        """`owner`, kept where it was last needed."""
        if self.owner.device != device:
            self.owner = self.owner.to(device)
        return self.owner

    def squares(self, tensor: Tensor, channels: int) -> Tensor:
        """(channels,) sums of squares, in float32 at least; with a gradient."""
        wide = tensor if tensor.dtype in (torch.float32, torch.float64) else tensor.float()
        each = self.rows(wide.square()).reshape(len(self.owner), -1).sum(1)
        owner = self.owner_on(tensor.device)
        return each.new_zeros(channels + 1).index_add(0, owner, each)[:channels]

    def spread(self, values: Tensor, tensor: Tensor, rest: float) -> Tensor:
        """(channels,) values at the slices of their channels, broadcast against `rows` of `tensor`;
        `rest` at indices of other channels."""
        every = torch.cat([values, values.new_full((1,), rest)]).to(tensor.device, tensor.dtype)
        found = every[self.owner_on(tensor.device)].view(self.blocks, -1)
        return found.view(*found.shape, *[1] * (tensor.ndim - 1))


@dataclass(frozen=True)
class Coupled:
    """The slices of parameters of one group; ``sizes`` counts the elements of each channel."""

    group: Group
    parts: tuple[Part, ...]
    sizes: Tensor

    def norms(self, tensors: Mapping[str, Tensor]) -> Tensor | None:
        """(channels,) L2 norms over all slices of parameters that are in `tensors`; None where none
        is. The gradient is 0 at 0."""
        parts = [part for part in self.parts if part.param in tensors]
        if not parts:
            return None
        found = [part.squares(tensors[part.param], len(self.group)) for part in parts]
        total = torch.stack([each.to(found[0].device) for each in found]).sum(0)
        return torch.where(total > 0, total, 1.0).sqrt() * (total > 0)


def coupled(group: Group, tensors: Mapping[str, Tensor]) -> Coupled:
    """The slices of `group` in parameters; those of buffers are left out."""
    members = [m for m in group.members if isinstance(tensors.get(m.param), torch.nn.Parameter)]
    parts = tuple(_part(member, tensors[member.param], len(group)) for member in members)
    ones = {part.param: torch.ones(tensors[part.param].shape) for part in parts}
    sizes = [part.squares(ones[part.param], len(group)) for part in parts]
    return Coupled(group, parts, torch.stack(sizes).sum(0) if sizes else torch.zeros(len(group)))


def _part(member: Member, tensor: Tensor, channels: int) -> Part:
    owner = torch.full((member.blocks * tensor.shape[member.dim],), channels)
    positions = torch.from_numpy(member.positions.reshape(channels, -1))
    owner[positions] = torch.arange(channels)[:, None].expand_as(positions)
    return Part(member.param, member.dim, member.blocks, owner)


def params_of(found: Iterable[Coupled]) -> list[str]:
    """Names of all parameters, once each."""
    return list(dict.fromkeys(part.param for each in found for part in each.parts))
