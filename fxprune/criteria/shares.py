"""Criteria that weigh a channel against the rest of its layer."""

from __future__ import annotations

import torch
from torch import Tensor

from . import Scores, criterion
from .slices import Slices


@criterion("ratio_sum")
def ratio_sum(group: Slices) -> Scores:
    """A channel's share of its layer's total: |gamma_i| / sum |gamma|, or of the filters' L1 norms
    where nothing normalises them (Yuan et al. 2023, Mobile_BLNet; the formula is our reading)."""
    if group.scales:
        return [
            _share(own, whole) for own, whole in zip(group.scales, group.all_scales, strict=True)
        ]
    pairs = zip(group.filters, group.layers, strict=True)
    return [_share(own.abs().sum(1), whole.abs().sum(1)) for own, whole in pairs]


def _share(own: Tensor, whole: Tensor) -> Tensor:
    return own / whole.sum().clamp_min(torch.finfo(whole.dtype).tiny)


@criterion("geometric_median")
def geometric_median(group: Slices) -> Scores:
    """Sum of distances to all filters of the layer (He et al. 2019, FPGM): filters near the
    geometric median say what others say."""
    pairs = zip(group.filters, group.layers, strict=True)
    return [_distances(own, whole) for own, whole in pairs]


def _distances(own: Tensor, whole: Tensor) -> Tensor:
    if own.shape[1] != whole.shape[1]:  # several filters a channel: compare whole channels
        whole = own
    return torch.cdist(own, whole, compute_mode="donot_use_mm_for_euclid_dist").sum(1)


@criterion("lamp")
def lamp(group: Slices) -> Scores:
    """Squared norm over the sum of all squared norms of the layer not smaller (Lee et al. 2021,
    LAMP, on filters): comparable between layers."""
    pairs = zip(group.filters, group.layers, strict=True)
    return [_lamp(own, whole) for own, whole in pairs]


def _lamp(own: Tensor, whole: Tensor) -> Tensor:
    if own.shape[1] != whole.shape[1]:  # several filters a channel: compare whole channels
        whole = own
    squares, every = own.square().sum(1), whole.square().sum(1).sort().values
    rest = every.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(every, squares * (1 - 1e-6))  # equal norms may differ by rounding
    return squares / rest[first].clamp_min(torch.finfo(squares.dtype).tiny)
