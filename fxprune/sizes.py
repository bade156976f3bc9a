"""Numbers that remember how they were computed from a tensor's shape.

While a model is traced, ``x.shape`` holds `TracedInt`s: real ints, so that every ``if``, ``range``
and unpacking works on them, which also keep the expression they came from, so that the graph can
compute them again for another image size.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Mapping
from typing import Any

# told of each traced number that code turns into a plain one with ``int()``, and of each flag that
# it branches on; set while tracing
noted: Callable[[Any], None] | None = None

# told of each comparison that code makes of a traced number, as (function, left, right); set while
# recording, when the same code is to run on other widths
compared: Callable[[Callable[..., bool], Any, Any], None] | None = None


class TracedInt(int):
    """An int with the expression ``(function, *arguments)`` that gave it."""

    expr: tuple[Any, ...]

    def __new__(cls, value: int, expr: tuple[Any, ...]):
        self = super().__new__(cls, value)
        self.expr = expr
        return self

    def __int__(self) -> int:
        if noted is not None:
            noted(self)
        return int.__int__(self)

    def __reduce__(self):
        return int, (int.__int__(self),)

    def __deepcopy__(self, memo):
        return self


class TracedFloat(float):
    """A float computed from traced ints."""

    expr: tuple[Any, ...]

    def __new__(cls, value: float, expr: tuple[Any, ...]):
        self = super().__new__(cls, value)
        self.expr = expr
        return self

    def __int__(self) -> int:
        if noted is not None:
            noted(self)
        return int(float.__float__(self))

    def __reduce__(self):
        return float, (float.__float__(self),)

    def __deepcopy__(self, memo):
        return self


class TracedFlag(TracedInt):
    """``module.training`` while tracing: false, but remembered where it is passed on."""

    def __int__(self) -> int:
        return int.__int__(self)

    def __bool__(self) -> bool:
        if noted is not None:
            noted(self)
        return bool(int.__int__(self))

    def __repr__(self) -> str:
        return "False"


Traced = (TracedInt, TracedFloat)


def plain(value):
    """The value without its history."""
    if isinstance(value, TracedFlag):
        return bool(int.__int__(value))
    if isinstance(value, TracedInt):
        return int.__int__(value)
    return float.__float__(value) if isinstance(value, TracedFloat) else value


def traced(value, expr: tuple[Any, ...]):
    """`value` with a history, if it is a number."""
    if isinstance(value, bool):
        return value
    if isinstance(value, int):
        return TracedInt(value, expr)
    return TracedFloat(value, expr) if isinstance(value, float) else value


def retraced(value, tensors: Mapping[int, Any]):
    """A traced number of other tensors; `tensors` maps the ids of the old ones to the new ones."""
    function, *args = value.expr
    made = [retraced(a, tensors) if isinstance(a, Traced) else tensors.get(id(a), a) for a in args]
    return type(value)(plain(value), (function, *made))


def _binary(function, swapped: bool):
    def method(self, other):
        if not isinstance(other, (int, float)):
            return NotImplemented
        left, right = (other, self) if swapped else (self, other)
        return traced(function(plain(left), plain(right)), (function, left, right))

    return method


def _unary(function):
    def method(self, *args):
        return traced(function(plain(self), *args), (function, self, *args))

    return method


def _comparison(function, own):
    def method(self, other):
        if compared is not None:
            compared(function, self, other)
        return own(self, other)

    return method


def _truth(own):
    def method(self):
        if compared is not None:
            compared(operator.ne, self, 0)
        return own(self)

    return method


def _install() -> None:
    bases: list[tuple[Any, Any]] = [(TracedInt, int), (TracedFloat, float)]
    for cls, base in bases:
        for name in ("eq", "ne", "lt", "le", "gt", "ge"):
            own = getattr(base, f"__{name}__")
            setattr(cls, f"__{name}__", _comparison(getattr(operator, name), own))
        cls.__bool__ = _truth(base.__bool__)
        cls.__hash__ = base.__hash__
    for name in ("add", "sub", "mul", "floordiv", "mod", "truediv", "pow"):
        function = getattr(operator, name)
        for cls in Traced:
            setattr(cls, f"__{name}__", _binary(function, swapped=False))
            setattr(cls, f"__r{name}__", _binary(function, swapped=True))
    for cls in Traced:
        setattr(cls, "__neg__", _unary(operator.neg))  # noqa: B010
        for name, function in (("ceil", math.ceil), ("floor", math.floor), ("round", round)):
            setattr(cls, f"__{name}__", _unary(function))


_install()


class TracedSize(tuple):
    """What ``x.shape`` gives while tracing: a tuple of traced ints."""

    def numel(self):
        return math.prod(self)

    def __getitem__(self, index):
        found = super().__getitem__(index)
        return TracedSize(found) if isinstance(index, slice) else found
