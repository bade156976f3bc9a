"""Calls that pass through `torch.export` whole, as one op each.

What the export records of such a call is its number and its operands; the call itself is kept
here, and can be made again later. While the model is exported it runs on fake tensors alone.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .sizes import plain
from .trees import leaves, mapped

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def is_symbol(value: Any) -> bool:
    """Whether a number stands for a size that the export leaves open."""
    return isinstance(value, _SYMBOLS)


@dataclass
class Call:
    """What was called, with what, and where; ``result`` is what it gave inside the export."""

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    source: Any
    result: Any = None

    def run(self, tensors: Sequence[torch.Tensor], numbers: Sequence[Any]) -> list[torch.Tensor]:
        args, kwargs = mapped(plain, self.filled(tensors, numbers))
        function = self.function
        if isinstance(function, nn.Module):
            function = functools.partial(type(function).forward, function)
        self.result = function(*args, **kwargs)
        return leaves(self.result, torch.Tensor)

    def filled(self, tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
        """Its arguments with other tensors and other open sizes, in order."""
        return filled((self.args, self.kwargs), tensors, numbers)


def filled(value: Any, tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
    """The same containers with other tensors and other open sizes, in order."""
    tensors_left, numbers_left = iter(tensors), iter(numbers)

    def fill(leaf: Any) -> Any:
        if isinstance(leaf, torch.Tensor):
            return next(tensors_left)
        return next(numbers_left) if is_symbol(leaf) else leaf

    return pytree.tree_map(fill, value)


@dataclass
class Calls:
    """The opaque calls of one export, in order."""

    calls: list[Call] = field(default_factory=list)
    inside: int = 0  # how many of them are running

    def make(self, call: Call) -> Any:
        """Make a call through the op; what it gives is recorded as the op's."""
        global _current
        tensors = leaves((call.args, call.kwargs), torch.Tensor)
        numbers = [n for n in pytree.tree_leaves((call.args, call.kwargs)) if is_symbol(n)]
        _current = self
        self.calls.append(call)
        made = op()(len(self.calls) - 1, tensors, numbers)
        return filled(call.result, made, [])

    def run(self, index: int, tensors: Sequence[torch.Tensor], numbers: Sequence[Any]) -> Any:
        self.inside += 1
        try:
            return self.calls[index].run(tensors, numbers)
        finally:
            self.inside -= 1


_current = Calls()
_library: list[torch.library.Library] = []


@functools.cache
def op() -> Callable:
    """The op that stands for an opaque call."""
    library = torch.library.Library("fxprune", "FRAGMENT")
    library.define("opaque(int call, Tensor[] tensors, SymInt[] numbers) -> Tensor[]")
    torch.library.register_fake("fxprune::opaque", lambda *args: _current.run(*args), lib=library)
    _library.append(library)  # the op goes when its library is collected
    found = torch.ops.fxprune.opaque.default
    fx.node.has_side_effect(found)  # it may change its operands
    return found
