"""The random weights that the networks of this package start from."""

from __future__ import annotations

from torch import nn


def initialise(model: nn.Module) -> None:
    """Convolutions as He et al. (2015) by fan-out, linear layers N(0, 0.01), biases zero.

    Normalisation layers keep their scale of one and shift of zero.
    """
    for module in model.modules():
        if isinstance(module, nn.Conv2d):
            nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        elif isinstance(module, nn.Linear):
            nn.init.normal_(module.weight, std=0.01)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
