"""Criteria that keep a set of filters which stands for the whole layer."""

from __future__ import annotations

from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from . import criterion
from .shares import summed_distances
from .slices import Slices


@criterion("distribution_fit", kind="set")
def distribution_fit(
    group: Slices,
    keep: int,
    *,
    redundancy: Literal["geometric_median"] | None = "geometric_median",
    fit: Literal["quantile", "gaussian"] = "quantile",
    norm: Literal[1, 2] = 2,
) -> Tensor:
    """Filters whose norms are spread like those of the layer (after Zhang, Kou & Liu 2022; the rule
    is our reconstruction of what the abstract says).

    ``fit="quantile"``: the norms in ascending order are cut into `keep` bins of equal mass, and one
    filter of each stays: the one farthest from all others (the least redundant), or, without
    `redundancy`, the one in the middle of the bin. The largest gap between the distributions of
    kept and of all norms (Kolmogorov-Smirnov) is then below 1 / keep. ``fit="gaussian"``: the
    filters nearest to the quantiles of a normal distribution with the norms' mean and deviation.
    Filters of coupled layers are laid end to end.
    """
    filters = torch.cat([each.double() for each in group.filters], 1)
    norms = torch.linalg.vector_norm(filters, ord=norm, dim=1)
    if fit == "gaussian":
        return _nearest(norms, _normal_quantiles(norms, keep))
    bins = _bins(norms, keep)
    if redundancy is None:
        return torch.stack([each[len(each) // 2] for each in bins])
    apart = summed_distances(filters, filters)
    return torch.stack([each[apart[each].argmax()] for each in bins])


def _bins(norms: Tensor, keep: int) -> list[Tensor]:
    """The filters in ascending order of norm, in `keep` runs as long as each other, or by one."""
    order, count = torch.argsort(norms, stable=True), len(norms)
    edges = [j * count // keep for j in range(keep + 1)]
    return [order[start:stop] for start, stop in pairwise(edges)]


def _normal_quantiles(norms: Tensor, keep: int) -> Tensor:
    shares = (torch.arange(keep, dtype=norms.dtype) + 0.5) / keep
    spread = norms.std(correction=0)
    return norms.mean() + spread * torch.special.ndtri(shares).to(norms.device)


def _nearest(norms: Tensor, targets: Tensor) -> Tensor:
    """A filter of its own for each target, at the least distance in all."""
    from scipy.optimize import linear_sum_assignment  # takes its time to import

    distances = (targets[:, None] - norms[None]).abs().cpu().numpy()
    return torch.from_numpy(linear_sum_assignment(distances)[1])
