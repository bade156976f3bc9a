"""From the masks of torch.nn.utils.prune to a network that is smaller and faster.

python examples/masks.py
"""

from __future__ import annotations

import copy

import torch
import torchvision
from torch import nn
from torch.nn.utils import prune

import fxprune


def masked_resnet(amount: float = 0.5) -> nn.Module:
    """A ResNet in which the first convolution of each block has filters switched off, and the norm
    behind it with them: its bias would keep their channels alive."""
    torch.manual_seed(0)
    model = torchvision.models.resnet18().eval()
    for block in (
        m for m in model.modules() if isinstance(m, torchvision.models.resnet.BasicBlock)
    ):
        prune.ln_structured(block.conv1, "weight", amount=amount, n=2, dim=0)
        on = block.conv1.weight_mask.flatten(1).any(1)
        for name in ("weight", "bias"):
            prune.custom_from_mask(block.bn1, name, on)
    return model


def main() -> None:
    model, x = masked_resnet(), torch.rand(1, 3, 224, 224)
    small = fxprune.from_masks(model, x)
    with torch.no_grad():
        difference = float((model(x) - small(x)).abs().max())
    plain = copy.deepcopy(torchvision.models.resnet18()).eval()
    before, after = (sum(p.numel() for p in m.parameters()) for m in (plain, small))
    print(f"parameters {before:,} -> {after:,}; outputs differ by {difference:.0e}")
    print(fxprune.latency({"masked": model, "sliced": small}, x, budget_s=2))


if __name__ == "__main__":
    main()
