"""Reference networks of three published pruning systems, to be trained, pruned and compared.

`mobilenet_v3_large` (Liu & Lei 2023), `resnet20` to `resnet110` (Zhang, Kou & Liu 2022) and
`mobile_blnet` (Yuan et al. 2023) with its module `BigLittle`. All start from random weights. Each
docstring says which numbers a paper states, and which are a reconstruction.
"""

from __future__ import annotations

from .big_little import BigLittle, InvertedResidual
from .mobile_blnet import MobileBLNet, mobile_blnet
from .mobilenet_v3 import MobileNetV3Large, mobilenet_v3_large
from .resnet_cifar import ResNetCifar, resnet20, resnet32, resnet44, resnet56, resnet110

__all__ = [
    "BigLittle",
    "InvertedResidual",
    "MobileBLNet",
    "MobileNetV3Large",
    "ResNetCifar",
    "mobile_blnet",
    "mobilenet_v3_large",
    "resnet20",
    "resnet32",
    "resnet44",
    "resnet56",
    "resnet110",
]
