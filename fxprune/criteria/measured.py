"""Criteria of what data does in the network: activations, and the gradients of a loss.

They need ``data=``, and those of gradients a loss (see `fxprune.prune`). All look at a channel
where layers read it, behind activations and gates.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ..calibration import Read
from . import Scores, criterion
from .magnitude import l2
from .slices import Slices


@criterion("taylor", needs=("gates",), comparable=True)
def taylor(group: Slices) -> Scores:
    """Mean of |d loss / d gate| over items, a gate being a factor of one on the channel wherever it
    is read: the first-order change of an item's loss when the channel goes (Molchanov et al. 2017,
    Pruning Convolutional Neural Networks for Resource Efficient Inference)."""
    return group.gate("magnitude")


@criterion("fisher", needs=("gates",), comparable=True)
def fisher(group: Slices) -> Scores:
    """Mean of (d loss / d gate)² over items: the diagonal of the empirical Fisher information,
    which stands for the loss's curvature (LeCun et al. 1989, Optimal Brain Damage; Theis et al.
    2018, Faster Gaze Prediction; Liu et al. 2021, Group Fisher Pruning, for coupled channels)."""
    return group.gate("square")


@criterion("gradient_gamma", needs=("gradients",))
def gradient_gamma(group: Slices) -> Scores:
    """|gamma * d loss / d gamma| of each normalisation; of filters, where nothing normalises them,
    the sum of weights times gradients (Molchanov et al. 2019, Importance Estimation for Neural
    Network Pruning)."""
    products = group.gradient_products("scale") or group.gradient_products("out")
    return products or l2(group)


@criterion("apoz", needs=("values",))
def apoz(group: Slices) -> Scores:
    """Share of a channel's activations above zero, one minus the average percentage of zeros (Hu et
    al. 2016, Network Trimming)."""
    return _measured(group, "positive")


@criterion("mean_activation", needs=("values",))
def mean_activation(group: Slices) -> Scores:
    """Mean magnitude of a channel's activations (Molchanov et al. 2017, as a criterion to compare
    with)."""
    return _measured(group, "magnitude")


def _measured(group: Slices, name: str) -> Scores:
    return [group.mean_of(read, at, name) for read, at in group.reads] or l2(group)


@criterion("hrank", needs=("ranks",))
def hrank(group: Slices) -> Scores:
    """Mean rank of a channel's feature maps (Lin et al. 2020, HRank). Where no layer reads maps, by
    the filters' norms."""
    reads = [(read, at) for read, at in group.reads if "rank" in read.sums]
    return [read.sums["rank"][at].mean(1) / read.sums["maps"] for read, at in reads] or l2(group)


@criterion("reconstruction", needs=("grams",), comparable=True)
def reconstruction(group: Slices, *, ridge: float = 1e-4) -> Scores:
    """How much worse the layers that read a channel do without it, when the others make up for it
    as well as they can: the squared error of their outputs relative to the outputs' size. Channels
    go one by one, the one of least error first, and the others take over its part (after Luo et al.
    2017, ThiNet, and He et al. 2017; the greedy order and its score are ours).

    Goes well with ``compensate``. Where a layer reads several elements of a channel, as behind a
    flatten, nothing makes up for it; channels that no weight reads are scored by norms.
    """
    problems = [_problem(group, read, at) for read, at in _with_grams(group)]
    if problems:
        return _elimination([(g, m / _energy(g, m)) for g, m in problems], ridge)
    return [_alone(group, read, at) for read, at in group.reads if group.reader(read)] or l2(group)


def _alone(group: Slices, read: Read, at: np.ndarray) -> Tensor:
    """The share of a layer's output, were its inputs independent, that each channel makes."""
    weights = group.whole_of(read).square().sum(1)
    mean, square = (read.sums[n] / read.sums["elements"] for n in ("total", "square"))
    made = (square - mean.square()).clamp_min(0) * weights
    return made[at].sum(1) / made.sum().clamp_min(1e-30)


@criterion("surgeon", needs=("grams", "gates"), comparable=True)
def surgeon(group: Slices, *, ridge: float = 1e-4) -> Scores:
    """As `reconstruction`, but each output's error counts by the mean square of the loss's gradient
    there, so that scores are changes of the loss and can be ranked over the whole network (after
    Hassibi & Stork 1993, Optimal Brain Surgeon, with the curvature of Martens & Grosse 2015, K-FAC;
    the form for channels is ours). Channels that no layer reads one by one are scored by `fisher`.
    """
    reads = _with_grams(group)
    if not reads or not all("steep" in read.sums for read, _ in reads):
        return group.gate("square") / 2
    problems = [_problem(group, read, at, sloped=True) for read, at in reads]
    return _elimination(problems, ridge) / 2


def _with_grams(group: Slices) -> list[tuple[Read, np.ndarray]]:
    """Reads of one element a channel by a weight."""
    return [
        (read, at[:, 0])
        for read, at in group.reads
        if "gram" in read.sums and at.shape[1] == 1 and group.reader(read) is not None
    ]


def _problem(
    group: Slices, read: Read, at: np.ndarray, sloped: bool = False
) -> tuple[Tensor, Tensor]:
    """Products of the channels' values (centred), and of the weights that read them."""
    gram, weights = read.sums["gram"], group.weights_of(read, sloped)
    mean = gram[-1] / gram[-1, -1]
    centred = gram / gram[-1, -1] - torch.outer(mean, mean)
    return centred[at][:, at], weights @ weights.T


def _energy(values: Tensor, weights: Tensor) -> Tensor:
    """The variance of what a layer gives."""
    return (values * weights).sum().clamp_min(1e-30)


def _elimination(problems: list[tuple[Tensor, Tensor]], ridge: float) -> Tensor:
    """The error at each channel's turn, over all layers that read it; never less than before."""
    count = len(problems[0][0])
    pairs = [(torch.linalg.inv(_damped(values, ridge)), w.clone()) for values, w in problems]
    scores, worst = torch.zeros(count, dtype=torch.float64), 0.0
    channels, left = torch.arange(count), torch.ones(count, dtype=torch.bool)
    for _ in range(count):
        if 4 * int(left.sum()) < 3 * len(left):
            pairs = [(v[left][:, left], w[left][:, left]) for v, w in pairs]
            channels, left = channels[left], left[left]
        costs = sum(w.diagonal() / v.diagonal() for v, w in pairs)
        c = int(torch.where(left, costs, torch.inf).argmin())
        worst = max(worst, float(costs[c]))
        scores[channels[c]], left[c] = worst, False
        for v, w in pairs:
            _take_out(v, w, c)
    return scores


def _damped(values: Tensor, ridge: float) -> Tensor:
    diagonal = values.diagonal()
    return values + torch.eye(len(values)) * (ridge * diagonal.mean() + 1e-12)


def _take_out(inverse: Tensor, weights: Tensor, c: int) -> None:
    """The others take over channel c's part in the weights' products, and c leaves the inverse."""
    column, pivot = inverse[:, c].clone(), float(inverse[c, c])
    share, row = -column / pivot, weights[c].clone()
    share[c] = 0
    half = row + share * (row[c] / 2)
    weights.addmm_(torch.stack([share, half], 1), torch.stack([half, share]))
    weights[c], weights[:, c] = 0, 0
    inverse.addr_(column, column, alpha=-1 / pivot)
    inverse[c], inverse[:, c] = 0, 0
    inverse[c, c] = 1
