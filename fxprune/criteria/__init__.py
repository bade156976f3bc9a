"""Criteria: how much a channel matters. Low scores go first.

A criterion is a function of a group (`Slices`) that gives one score a channel, or a list of such
scores, one a coupled layer, which ``reduce=`` joins::

    @fxprune.criterion("mine")
    def mine(group):
        return [filters.abs().amax(1) for filters in group.filters]
"""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor

from ..errors import OptionError, nearest
from .slices import Slices

Scores = Tensor | list[Tensor]
Criterion = Callable[[Slices], Scores]

_known: dict[str, Criterion] = {}


def criterion(name: str) -> Callable[[Criterion], Criterion]:
    """Register a function as a criterion: ``@fxprune.criterion("name")``."""

    def register(function: Criterion) -> Criterion:
        _known[name] = function
        return function

    return register


def find(which: str | Criterion) -> tuple[str, Criterion]:
    """A criterion and its name; `OptionError` with the nearest name for one that is not known."""
    if callable(which):
        return getattr(which, "__name__", "custom"), which
    if not isinstance(which, str):
        raise OptionError(
            f"criterion is a {type(which).__name__}", hint="pass a name, or a function of a group"
        )
    if which not in names():
        raise OptionError(
            f"no criterion `{which}`",
            details=[("known", ", ".join(names()))],
            hint=nearest(which, names()) or "pass one of these, or a function of your own",
        )
    return which, _known[which]


def names() -> list[str]:
    """The names of all criteria."""
    from . import magnitude, shares  # noqa: F401

    return sorted(_known)


__all__ = ["Criterion", "Scores", "Slices", "criterion", "find", "names"]
