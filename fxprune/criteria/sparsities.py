"""Criteria that count how many of a filter's weights are large, alone or times gamma.

Liu & Lei 2023 prune MobileNetV3 by "the product of the sparse value of the convolution layer and
the scale factor of the BN layer". That the sparse value is the share of weights above the layer's
mean magnitude is our reading, derived from the values the paper prints; `side` keeps both open.
"""

from __future__ import annotations

from typing import Literal

from torch import Tensor

from . import Scores, criterion
from .slices import Slices

Side = Literal["above", "below"]


@criterion("sparsity")
def sparsity(group: Slices, *, side: Side = "above") -> Scores:
    """Share of a filter's weights whose magnitude is above (or below) the mean of its layer: k/C
    for a pointwise filter over C channels (Liu et al. 2019, in the reading of Liu & Lei 2023)."""
    pairs = zip(group.filters, group.layers, strict=True)
    return [_share_beside_mean(own, whole, side) for own, whole in pairs]


@criterion("sparsity_gamma")
def sparsity_gamma(group: Slices, *, side: Side = "above") -> Scores:
    """The sparse value of a filter times |gamma| of the normalisation that follows it (Liu & Lei
    2023); the sparse value alone where nothing normalises."""
    return [
        _share_beside_mean(own, whole, side) * gamma
        for own, whole, gamma in zip(group.filters, group.layers, group.gammas, strict=True)
    ]


@criterion("l1_gamma")
def l1_gamma(group: Slices) -> Scores:
    """L1 norm of a filter times |gamma| of the normalisation that follows it; the norm alone where
    nothing normalises. A rival in Liu & Lei 2023, whose form (a product) is our reading."""
    pairs = zip(group.filters, group.gammas, strict=True)
    return [filters.abs().sum(1) * gamma for filters, gamma in pairs]


def _share_beside_mean(own: Tensor, whole: Tensor, side: Side) -> Tensor:
    """(channels,) shares in {0, 1/C, ..., 1}; a weight of exactly the mean is on neither side."""
    size, mean = own.abs().double(), whole.abs().double().mean()
    chosen = size > mean if side == "above" else size < mean
    return chosen.double().mean(1)
