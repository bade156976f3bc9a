"""Widths that the hardware likes, for ``round_to="auto"``.

Matrix kernels work on blocks of channels, and a block that is not full takes as long as one that
is: 16 float32 channels with AVX-512 and 8 with AVX2 or NEON (the blocked layouts of oneDNN), 8
channels of two bytes and 4 of four on tensor cores (NVIDIA, Deep Learning Performance Guide).
Narrow layers get finer steps, or nothing could go.
"""

from __future__ import annotations

import torch
from torch import Tensor


def liked(size: int, tensor: Tensor) -> int:
    """The multiple for a layer of `size` channels, by a tensor's device and dtype."""
    best = _on_gpu(tensor) if tensor.is_cuda else _on_cpu()
    while best > 1 and best * 4 > size:
        best //= 2
    return best


def _on_gpu(tensor: Tensor) -> int:
    return 8 if tensor.element_size() <= 2 else 4


def _on_cpu() -> int:
    return 16 if "AVX512" in torch.backends.cpu.get_cpu_capability() else 8
