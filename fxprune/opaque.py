"""Calls that pass through `torch.export` whole, as one op each.

What the export records of such a call is its number and its operands; the call itself is kept
here, and can be made again later. While the model is exported it runs on fake tensors alone.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from .errors import TraceError
from .sizes import Traced, TracedSize, plain, retraced
from .trace import OF_ONE_PATH, ON_VALUES, describe
from .trees import leaves, mapped

_SYMBOLS = (torch.SymInt, torch.SymFloat, torch.SymBool)


def is_open(value: Any) -> bool:
    """Whether the export records what computes this value: a tensor, or a size it leaves open."""
    return isinstance(value, (torch.Tensor, *_SYMBOLS))


@dataclass
class Call:
    """What was called, with what, and where; ``result`` is what it gave inside the export."""

    function: Any
    args: tuple
    kwargs: dict[str, Any]
    source: Any = None
    result: Any = None
    failed: bool = False  # and forward went on

    def operands(self) -> list[Any]:
        """Tensors and open numbers among the arguments, and tensors whose sizes are arguments."""
        found: dict[int, Any] = {}
        for leaf in arguments((self.args, self.kwargs)):
            for each in _tensors_of(leaf) if isinstance(leaf, Traced) else [leaf]:
                if is_open(each):
                    found[id(each)] = each
        return list(found.values())

    def with_operands(self, new: Sequence[Any], number: Callable[[Any], Any]) -> Any:
        """The arguments with other operands; `number` gives what takes a traced number's place."""
        known = dict(zip(map(id, self.operands()), new, strict=True))

        def replaced(leaf: Any) -> Any:
            if isinstance(leaf, Traced):
                return number(retraced(leaf, known))
            return known.get(id(leaf), leaf)

        return mapped_arguments(replaced, (self.args, self.kwargs))

    def run(self, operands: Sequence[Any]) -> list[torch.Tensor]:
        args, kwargs = self.with_operands(operands, computed)
        function = self.function
        if isinstance(function, nn.Module):
            function = functools.partial(type(function).forward, function)
        self.result = function(*args, **kwargs)
        return leaves(self.result, torch.Tensor)


def arguments(value: Any) -> list[Any]:
    """The leaves of arguments; bounds of slices too."""
    found: list[Any] = []
    mapped_arguments(found.append, value)
    return found


def mapped_arguments(fn: Callable[[Any], Any], value: Any) -> Any:
    """Arguments with `fn` of each leaf, also of bounds of slices and of fields of dataclasses."""
    if isinstance(value, slice):
        return slice(*(mapped_arguments(fn, v) for v in (value.start, value.stop, value.step)))
    if type(value) in (tuple, list, TracedSize):
        made = [mapped_arguments(fn, v) for v in value]
        return made if isinstance(value, list) else tuple(made)
    if type(value) is dict:
        return {key: mapped_arguments(fn, v) for key, v in value.items()}
    if dataclasses.is_dataclass(value) and type(value) not in pytree.SUPPORTED_NODES:
        fields = [f.name for f in dataclasses.fields(value) if f.init]
        changed = {name: mapped_arguments(fn, getattr(value, name)) for name in fields}
        return dataclasses.replace(value, **changed)  # type: ignore[type-var]
    children, spec = pytree.tree_flatten(value, is_leaf=lambda v: v is not value)
    if spec.is_leaf():
        return fn(value)
    return pytree.tree_unflatten([mapped_arguments(fn, v) for v in children], spec)


def _tensors_of(number: Any) -> Iterator[torch.Tensor]:
    """The tensors from whose sizes a number was computed."""
    for part in number.expr:
        if isinstance(part, Traced):
            yield from _tensors_of(part)
        elif isinstance(part, torch.Tensor):
            yield part


def computed(number: Any) -> Any:
    """A traced number from the open sizes of its tensors."""
    if not isinstance(number, Traced):
        return number
    function, *args = number.expr
    if function == "size":
        return args[0].shape[args[1]]
    if function == "numel":
        return args[0].numel()
    return plain(number) if isinstance(function, str) else function(*map(computed, args))


@dataclass
class Calls:
    """The opaque calls of one export, in order."""

    calls: list[Call] = field(default_factory=list)
    inside: int = 0  # how many of them are running

    def make(self, call: Call) -> Any:
        """Make a call through the op; what it gives is recorded as the op's."""
        global _current
        _current = self
        operands = call.operands()
        tensors = [each for each in operands if isinstance(each, torch.Tensor)]
        numbers = [each for each in operands if not isinstance(each, torch.Tensor)]
        if not all(isinstance(number, torch.SymInt) for number in numbers):
            raise TraceError(
                ON_VALUES,
                details=[("at", describe(call.source))],
                hint=OF_ONE_PATH,
            )
        self.calls.append(call)
        made = iter(op()(len(self.calls) - 1, tensors, numbers))

        def recorded(leaf: Any) -> Any:
            return next(made) if isinstance(leaf, torch.Tensor) else leaf

        return mapped(recorded, call.result)

    def run(self, index: int, tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
        self.inside += 1
        call = self.calls[index]
        try:
            return call.run(merged(call.operands(), tensors, numbers))
        except Exception:
            call.failed = True
            raise
        finally:
            self.inside -= 1


def merged(old: Sequence[Any], tensors: Sequence[Any], numbers: Sequence[Any]) -> list[Any]:
    """New operands in the order of the old ones."""
    tensors_left, numbers_left = iter(tensors), iter(numbers)
    return [next(tensors_left if isinstance(x, torch.Tensor) else numbers_left) for x in old]


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
