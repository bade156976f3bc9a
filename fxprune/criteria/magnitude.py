"""Criteria of one channel's own weights."""

from __future__ import annotations

import torch

from . import Scores, criterion
from .slices import Slices


@criterion("l1")
def l1(group: Slices) -> Scores:
    """L1 norm of each filter (Li et al. 2017, Pruning Filters for Efficient ConvNets)."""
    return [filters.abs().sum(1) for filters in group.filters]


@criterion("l2")
def l2(group: Slices) -> Scores:
    """L2 norm of each filter."""
    return [torch.linalg.vector_norm(filters, dim=1) for filters in group.filters]


@criterion("linf")
def linf(group: Slices) -> Scores:
    """Largest magnitude in each filter."""
    return [filters.abs().amax(1) for filters in group.filters]


@criterion("bn_gamma")
def bn_gamma(group: Slices) -> Scores:
    """|gamma| of the normalisation that follows (Liu et al. 2017, Network Slimming); L1 norms of
    the filters where nothing normalises them."""
    return group.scales or l1(group)


@criterion("in_out_norm")
def in_out_norm(group: Slices) -> Scores:
    """L2 norm of the weights that make a channel times that of those that read it: what a channel
    can carry. The units of a squeeze layer are chosen by it."""
    made = torch.linalg.vector_norm(torch.cat(group.filters, 1), dim=1)
    if not group.consumers:
        return made
    return made * torch.linalg.vector_norm(torch.cat(group.consumers, 1), dim=1)


@criterion("random")
def random(group: Slices) -> Scores:
    """The same random order on every machine and every run; the baseline to beat."""
    generator = torch.Generator().manual_seed(group.seed)
    return torch.rand(len(group), generator=generator)
