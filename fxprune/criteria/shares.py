"""Criteria that weigh a channel against the rest of its layer."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from . import Scores, criterion
from .slices import Slices


@criterion("ratio_sum")
def ratio_sum(group: Slices, *, normalize: bool = False) -> Scores:
    """A channel's share of its layer's total: |gamma_i| / sum |gamma|, or of the filters' L1 norms
    where nothing normalises them (Yuan et al. 2023, Mobile_BLNet; the formula is our reading).

    With `normalize` the share is relative to the layer's mean share, N |gamma_i| / sum |gamma|, so
    that wide and narrow layers can be ranked together. The paper's two possible readings are
    ``select_by="cumulative"`` on the plain share, and a global threshold on the normalised one.
    """
    return [
        _share(own, whole, len(whole) / each if normalize else 1)
        for own, whole, each in _sizes(group)
    ]


def _sizes(group: Slices) -> Iterator[tuple[Tensor, Tensor, int]]:
    """For each layer: sizes of the group's channels, of all elements, elements a channel."""
    if group.scales:
        yield from zip(group.scales, group.all_scales, group.per_scale, strict=True)
        return
    for own, whole in _layers(group):
        yield own.abs().sum(1), whole.abs().sum(1), own.shape[1] // whole.shape[1]


def _layers(group: Slices) -> Iterator[tuple[Tensor, Tensor]]:
    return zip(group.filters, group.layers, strict=True)


def _share(own: Tensor, whole: Tensor, factor: float) -> Tensor:
    return factor * own / whole.sum().clamp_min(torch.finfo(whole.dtype).tiny)


@criterion("geometric_median")
def geometric_median(group: Slices) -> Scores:
    """Sum of distances to all filters of the layer (He et al. 2019, FPGM): filters near the
    geometric median say what others say."""
    return [_distances(own, whole) for own, whole in _layers(group)]


def _distances(own: Tensor, whole: Tensor) -> Tensor:
    if own.shape[1] != whole.shape[1]:  # several filters a channel: compare whole channels
        whole = own
    return summed_distances(own, whole)


def summed_distances(own: Tensor, others: Tensor) -> Tensor:
    """For each row of `own` the sum of its Euclidean distances to the rows of `others`.

    Wide layers are compared by matrix products, which are many times faster and, in float64, exact
    enough: equal rows are then up to 1e-8 of their length apart.
    """
    if len(own) * others.numel() < 2**32:
        return torch.cdist(own, others, compute_mode="donot_use_mm_for_euclid_dist").sum(1)
    own, others = own.double(), others.double()
    return torch.cdist(own, others, compute_mode="use_mm_for_euclid_dist").sum(1)


@criterion("lamp")
def lamp(group: Slices) -> Scores:
    """Squared norm over the sum of all squared norms of the layer not smaller (Lee et al. 2021,
    LAMP, on filters): comparable between layers."""
    return [_lamp(own, whole) for own, whole in _layers(group)]


def _lamp(own: Tensor, whole: Tensor) -> Tensor:
    if own.shape[1] != whole.shape[1]:  # several filters a channel: compare whole channels
        whole = own
    squares, every = own.square().sum(1), whole.square().sum(1).sort().values
    rest = every.flip(0).cumsum(0).flip(0)
    first = torch.searchsorted(every, squares * (1 - 1e-6))  # equal norms may differ by rounding
    return squares / rest[first].clamp_min(torch.finfo(squares.dtype).tiny)
