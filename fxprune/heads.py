"""Attention heads: what may go of them.

A head is a row of channels that a product of two activations keeps apart: queries and keys over
(heads, dims) give one map for each head. By default dims go, equally many from every head. With
``"whole"`` the rows themselves go, with what is one for each head (a table of relative positions, a
mixing of heads); with ``"keep"`` neither does.
"""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations, product
from typing import Literal

Heads = Literal["dims", "whole", "keep"]


def shared(letters: Mapping[int, list[tuple[str, ...]]], out: set[str]) -> set[str]:
    """The letters that number heads in a product: two operands have them, the result has them, and
    one of the two has channels beside them. `letters` are those of each operand's layers."""
    found: set[str] = set()
    for i, j in combinations(letters, 2):
        for a, b in product(letters[i], letters[j]):
            common = set(a) & set(b) & out
            if common and set(a) | set(b) != common:
                found |= common
    return found
