"""Least squares with a ridge that is judged on rows it was not fitted to.

Where rows are hardly more than columns, as behind a flatten on a few hundred images, a fit that is
not held back gives anything: with 256 images it is worse than with 64 (Belkin et al. 2019,
Reconciling modern machine-learning practice and the bias-variance trade-off). So rows are summed up
in two halves, and each judges what the other is fitted to (Stone 1974, Cross-Validatory Choice).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

_RIDGES = (1e-4, 1e-3, 1e-2, 0.1, 1.0, 10.0)  # of the mean square of columns
_WORSE = 1.1  # as often the least error: further ridges are not tried, solving takes its time
_FLAT = 1e-10  # share of an output's square that is its variance, below which it is constant


def wide(tensor: Tensor) -> Tensor:
    """In float32 at least: sums and differences need more digits than half precision has."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class Sums:
    """Normal equations of residuals on columns, a system a block. The last ``constants`` columns
    are constants, which a ridge does not hold back."""

    def __init__(self, constants: int):
        self.constants, self.rows = constants, 0
        self.gram: Any = 0.0
        self.right: Any = 0.0
        self.residual: Any = 0.0

    def add(self, x: Tensor, y: Tensor) -> None:
        """Columns and residuals, (blocks, rows, ...)."""
        with torch.autocast(x.device.type, enabled=False):
            self.gram = self.gram + (x.transpose(1, 2) @ x).double()
            self.right = self.right + (x.transpose(1, 2) @ y).double()
        self.residual = self.residual + y.double().square().sum()
        self.rows += x.shape[1]

    @property
    def tensors(self) -> list[Tensor]:
        """All sums."""
        return [self.gram, self.right, self.residual]

    def __add__(self, other: Sums) -> Sums:
        found = Sums(self.constants)
        found.gram, found.right = self.gram + other.gram, self.right + other.right
        found.residual, found.rows = self.residual + other.residual, self.rows + other.rows
        return found

    def solve(self, ridge: float) -> Tensor:
        """What to add to the weights."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        weight = (ridge * diagonal.mean(1, keepdim=True) + 1e-12).expand_as(diagonal).clone()
        weight[:, diagonal.shape[1] - self.constants :] = 0
        return torch.linalg.solve(self.gram + torch.diag_embed(weight), self.right)

    def left(self, step: Tensor | None = None) -> float:
        """The squared error that is left when so much was added to the weights."""
        if step is None:
            return float(self.residual)
        gain = 2 * (step * self.right).sum() - (step * (self.gram @ step)).sum()
        return max(float(self.residual - gain), 0.0)


class Halves:
    """Sums over two halves of the rows; with ``shifts``, a constant is fitted too."""

    def __init__(self, shifts: bool) -> None:
        self.parts = (Sums(int(shifts)), Sums(int(shifts)))
        self.constants = int(shifts)
        self.total: Any = 0.0  # of what the original gives, a channel
        self.square: Any = 0.0
        self.count = 0

    def add(self, columns: Tensor | None, residual: Tensor, target: Tensor) -> None:
        """Rows of a batch, (rows, blocks, ...)."""
        rows, blocks, _ = residual.shape
        given = [] if columns is None else [wide(columns)]
        given += [residual.new_ones(rows, blocks, 1)] * self.constants
        x, y = torch.cat(given, 2).transpose(0, 1), residual.transpose(0, 1)
        fewer, more = sorted(self.parts, key=lambda part: part.rows)  # a batch may be one row
        half = (rows + 1) // 2
        fewer.add(x[:, :half], y[:, :half])
        more.add(x[:, half:], y[:, half:])
        self.total = self.total + target.double().sum(0)
        self.square = self.square + target.double().square().sum()
        self.count += rows

    @property
    def tensors(self) -> list[Tensor]:
        """All sums."""
        sums = [each for part in self.parts if part.rows for each in part.tensors]
        return [*sums, self.square]

    @property
    def size(self) -> float:
        """What errors are relative to: the output's variance, where it has any."""
        square = float(self.square)
        centred = square - float(self.total.square().sum()) / self.count
        return centred if centred > _FLAT * square else square or self._squares() or 1.0

    def solve(self) -> Tensor:
        """What to add to the weights."""
        one, other = self.parts
        return (one + other).solve(self._ridge())

    def _ridge(self) -> float:
        """That with which the fit to either half is best on the other."""
        one, other = self.parts
        best, chosen = math.inf, _RIDGES[0]
        for ridge in _RIDGES if one.rows and other.rows else ():
            error = one.left(other.solve(ridge)) + other.left(one.solve(ridge))
            if error > _WORSE * best:
                break
            best, chosen = min((best, chosen), (error, ridge))
        return chosen

    def left(self, step: Tensor | None = None) -> float:
        """The share of the error that is left when so much was added to the weights."""
        return self._squares(step) / self.size

    def _squares(self, step: Tensor | None = None) -> float:
        return sum(part.left(step) for part in self.parts if part.rows)
