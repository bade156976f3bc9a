"""What a criterion sees of a group: its coupled slices of parameters."""

from __future__ import annotations

import zlib
from collections import deque
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from ..errors import OptionError
from ..groups import Group, Member

if TYPE_CHECKING:
    from ..calibration import Calibration, Read


@dataclass(frozen=True)
class Slices:
    """A group's slices, always with the channel axis first.

    ``tensors`` holds the model's parameters and buffers by name, ``calibration`` what data said,
    for criteria that need it.
    """

    group: Group
    tensors: Mapping[str, Tensor]
    calibration: Calibration | None = None

    def __len__(self) -> int:
        return len(self.group)

    @property
    def filters(self) -> list[Tensor]:
        """(channels, weights) of each layer that makes these channels: its filters."""
        return [self.of(m) for m in self._filters()]

    @property
    def layers(self) -> list[Tensor]:
        """(all channels, weights) of the same layers as `filters`, pruned or not."""
        return [self.whole(m) for m in self._filters()]

    @property
    def scales(self) -> list[Tensor]:
        """(channels,) of each normalisation's scale (gamma) of these channels."""
        return [self.of(m).reshape(len(self), -1).abs().sum(1) for m in self._members("scale")]

    @property
    def all_scales(self) -> list[Tensor]:
        """(all channels,) of the same normalisations as `scales`."""
        return [self.whole(m).abs().sum(1) for m in self._members("scale")]

    @property
    def per_scale(self) -> list[int]:
        """How many elements of each normalisation's scale belong to one channel."""
        return [m.positions.shape[1] for m in self._members("scale")]

    @property
    def gammas(self) -> list[Tensor]:
        """(channels,) for each of `filters`: |gamma| of the first normalisation behind that layer,
        ones where there is none before the next layer."""
        return [self._gamma_behind(member) for member in self._filters()]

    def _gamma_behind(self, member: Member) -> Tensor:
        scale = self._first_scale(member)
        if scale is None:
            whole = self.whole(member)
            return torch.ones(len(self), dtype=whole.dtype, device=whole.device)
        return self.of(scale).reshape(len(self), -1).abs().sum(1)

    def _first_scale(self, member: Member) -> Member | None:
        """Breadth first along the graph, up to layers that read or make these channels."""
        scales = {m.node: m for m in self._members("scale")}
        layers = {m.node for m in self.group.members if self.tensors[m.param].ndim > 1}
        rest, seen = deque([member.node]), {member.node}
        while rest:
            at = rest.popleft()
            if at in scales:
                return scales[at]
            if at is not None and (at is member.node or at not in layers):
                rest += [user for user in at.users if user not in seen]
                seen |= {*at.users}
        return None

    @property
    def consumers(self) -> list[Tensor]:
        """(channels, weights) of each layer that reads these channels."""
        return [self.of(m) for m in self._members("in") if self.tensors[m.param].ndim > 1]

    # -- what data said --------------------------------------------------------------------------

    @property
    def measured(self) -> Calibration:
        """What data said; `OptionError` without data."""
        if self.calibration is None:
            raise OptionError(
                "the criterion needs data", hint="pass data=batches, and needs=(...) to register it"
            )
        return self.calibration

    def gate(self, name: str) -> Tensor:
        """(channels,) means over items of the loss's gradients by a gate on each channel: "total",
        "magnitude" or "square" (needs "gates")."""
        return self.measured.gate(name, self.group)

    @property
    def reads(self) -> list[tuple[Read, np.ndarray]]:
        """Where layers read these channels, with the (channels, places) of them there; see
        `fxprune.calibration.Read` for what was summed up (needs "values", "ranks" or "grams")."""
        return self.measured.of(self.group)

    def mean_of(self, read: Read, at: np.ndarray, name: str) -> Tensor:
        """(channels,) the mean over elements of what was summed up at a read."""
        return read.sums[name][at].mean(1) / read.sums["elements"]

    def gradient_products(self, role: str) -> list[Tensor]:
        """(channels,) for each weight of a role, "out", "in" or "scale": |sum of weights times
        their gradients| (needs "gradients")."""
        known = self.measured.gradients
        found = []
        for member in self._members(role):
            if member.param in known:
                products = self.tensors[member.param].detach().double().cpu() * known[member.param]
                sliced = Slices(self.group, {member.param: products}).of(member)
                found.append(sliced.reshape(len(self), -1).sum(1).abs())
        return found

    def reader(self, read: Read) -> Member | None:
        """The weight by which a read's node contracts these channels."""
        own = [m for m in self._members("in") if m.node is read.origin]
        return next((m for m in own if self.tensors[m.param].ndim > 1), None)

    def weights_of(self, read: Read, sloped: bool = False) -> Tensor:
        """(channels, elements) of the weight that reads these channels, float64; with `sloped` each
        output's part times the root of its mean squared gradient."""
        member = self.reader(read)
        assert member is not None
        weight = self.tensors[member.param].detach().double().cpu()
        if sloped:
            weight = weight * self.measured.slope(read, member.param, weight).sqrt()
        return Slices(self.group, {member.param: weight}).of(member)

    def whole_of(self, read: Read) -> Tensor:
        """(places, elements) of the weight of a read, for all that it reads."""
        member = self.reader(read)
        assert member is not None
        return self.whole(member).double().cpu()

    def _members(self, role: str) -> list[Member]:
        return [m for m in self.group.members if m.role == role]

    def _filters(self) -> list[Member]:
        found = [m for m in self._members("out") if self.tensors[m.param].ndim > 1]
        return (
            found or self._members("out") or self._members("free") or list(self.group.members[:1])
        )

    def of(self, member: Member) -> Tensor:
        """The member's slices as (channels, elements)."""
        whole, positions = self.whole(member), member.positions
        if (
            positions.shape[1] == 1
            and len(positions) == len(whole)
            and (positions[:, 0] == np.arange(len(whole))).all()
        ):
            return whole
        return whole[torch.from_numpy(positions.reshape(-1))].reshape(len(positions), -1)

    def whole(self, member: Member) -> Tensor:
        """The whole parameter as (indices of the member's dim, elements)."""
        tensor = self.tensors[member.param].detach()
        if tensor.dtype in (torch.float16, torch.bfloat16):
            tensor = tensor.float()
        if member.blocks == 1:
            return tensor.movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1)
        split = tensor.reshape(member.blocks, -1, *tensor.shape[1:]).movedim(member.dim + 1, 1)
        return split.reshape(member.blocks * tensor.shape[member.dim], -1)

    @property
    def seed(self) -> int:
        """A number that is this group's own and the same on every machine."""
        return zlib.crc32(self.group.name.encode())
