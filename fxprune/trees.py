"""Arguments and results that hold tensors in tuples, lists and dicts.

As torch's pytree, for any container registered there, but quick on the usual ones.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from torch import Tensor
from torch.utils import _pytree as pytree

T = TypeVar("T")


def leaves(value: Any, kind: type[T]) -> list[T]:
    """All leaves of a type, in order."""
    found: list[T] = []
    _collect(value, kind, found)
    return found


def _collect(value: Any, kind: type[T], found: list[T]) -> None:
    if isinstance(value, kind):
        found.append(value)
    elif isinstance(value, (tuple, list)):
        for each in value:
            _collect(each, kind, found)
    elif isinstance(value, dict):
        for each in value.values():
            _collect(each, kind, found)
    elif type(value) in pytree.SUPPORTED_NODES:
        found += [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, kind)]


def has_tensors(value: Any) -> bool:
    return isinstance(value, Tensor) or bool(leaves(value, Tensor))


def mapped(fn: Callable[[Any], Any], value: Any) -> Any:
    """The same containers with `fn` of each leaf."""
    return fn(value) if isinstance(value, Tensor) else pytree.tree_map(fn, value)
