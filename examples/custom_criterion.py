"""A criterion of your own: a function of a group that gives one score a channel.

python examples/custom_criterion.py
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import fxprune


@fxprune.criterion("in_and_out")
def in_and_out(group: fxprune.criteria.Slices) -> Tensor:
    """A channel matters as much as what makes it times what reads it."""
    made = sum(filters.abs().sum(1) for filters in group.filters)
    read = sum(weights.abs().sum(1) for weights in group.consumers)
    return made * read


def network() -> nn.Module:
    torch.manual_seed(0)
    conv = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 32, 3)]
    return nn.Sequential(*conv, nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))


def main() -> None:
    model, x = network(), torch.rand(2, 3, 16, 16)
    for criterion in ("l1", "in_and_out"):
        pruned = fxprune.prune(model, x, criterion=criterion, rate=0.5)
        kept = pruned.fxprune.plan.kept["3.weight"][0]
        print(f"{criterion:<10} keeps of the second convolution: {kept}")


if __name__ == "__main__":
    main()
