"""A text for a value that is the same in every run, and another one for another value: functions
are told by what they do, not by name or address."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from operator import itemgetter
from types import CodeType, FunctionType, MethodType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_PLAIN = (type(None), bool, int, float, complex, str, bytes, type(...))
_OF_MODULES = ("_parameters", "_buffers", "_modules")


def told(value: Any) -> str:
    """A text for a value. Functions are told by code, defaults, what they close over, and the
    numbers, texts, tensors and functions that they name; objects by attributes, and by the code
    that calling them runs. What has neither is told by its type alone, as a generator is."""
    return _Teller()(value)


class _Teller:
    """Tells each value once; one that is inside itself is known already when it is met there."""

    def __init__(self) -> None:
        self.known: dict[int, tuple[Any, str]] = {}  # values too: their ids are free once they go

    def __call__(self, value: Any) -> str:
        if isinstance(value, _PLAIN):
            return repr(value)
        if id(value) not in self.known:
            self.known[id(value)] = (value, "again")
            parts = "\n".join([torch.typename(type(value)), *self._parts(value)])
            self.known[id(value)] = (value, hashlib.sha256(parts.encode()).hexdigest())
        return self.known[id(value)][1]

    def _parts(self, value: Any) -> Iterator[str]:
        for kind, parts in _KINDS:
            if isinstance(value, kind):
                return parts(self, value)
        return self._object(value)

    def _series(self, values: Iterable[Any]) -> Iterator[str]:
        yield from map(self, values)

    def _set(self, values: Iterable[Any]) -> Iterator[str]:
        yield from sorted(map(told, values))

    def _mapping(self, values: Mapping[Any, Any]) -> Iterator[str]:
        """In the order of keys: options may be given in any."""
        for key, value in sorted(((told(k), v) for k, v in values.items()), key=itemgetter(0)):
            yield f"{key}: {self(value)}"

    def _tensor(self, value: Tensor) -> Iterator[str]:
        yield f"{value.dtype} {tuple(value.shape)}"
        if value.layout == torch.strided and not value.is_meta:
            yield hashlib.sha256(bytes_of(value)).hexdigest()

    def _array(self, value: np.ndarray) -> Iterator[str]:
        yield f"{value.dtype} {value.shape}"
        yield self(value.tolist() if value.dtype.hasobject else value.tobytes())

    # -- what is called ----------------------------------------------------------------------------

    def _code(self, code: CodeType) -> Iterator[str]:
        yield code.co_code.hex()
        yield f"{code.co_names} {code.co_varnames} {code.co_freevars} {code.co_flags}"
        yield from map(self, code.co_consts)

    def _function(self, value: FunctionType) -> Iterator[str]:
        yield self(value.__code__)
        yield self(value.__defaults__)
        yield self(value.__kwdefaults__)
        yield from (self(_content(cell)) for cell in value.__closure__ or ())
        yield self(_named(value))

    def _method(self, value: MethodType) -> Iterator[str]:
        yield self(value.__func__)
        yield self(value.__self__)

    def _partial(self, value: functools.partial[Any]) -> Iterator[str]:
        yield from (self(value.func), self(value.args), self(value.keywords))

    # -- objects -----------------------------------------------------------------------------------

    def _module(self, value: nn.Module) -> Iterator[str]:
        own = vars(value).items()
        yield value.extra_repr()
        yield self({k: each for k, each in own if k[0] != "_" or k in _OF_MODULES})
        yield from self._calls(value, "forward")

    def _object(self, value: Any) -> Iterator[str]:
        if hasattr(value, "__qualname__"):
            yield f"{value.__module__}.{value.__qualname__}"
            yield self(getattr(value, "__wrapped__", None))
        elif hasattr(value, "__dict__"):
            yield self(dict(vars(value)))
            yield from self._calls(value, "__call__")
        elif " at 0x" not in (text := repr(value)):
            yield text

    def _calls(self, value: Any, name: str) -> Iterator[str]:
        """The code that a call runs, where its class is written in Python."""
        found = getattr(type(value), name, None)
        if isinstance(found, FunctionType):
            yield self(found)


_Parts = Callable[[_Teller, Any], Iterator[str]]
_KINDS: list[tuple[Any, _Parts]] = [
    (Tensor, _Teller._tensor),
    (np.ndarray, _Teller._array),
    (Mapping, _Teller._mapping),
    ((tuple, list), _Teller._series),
    ((set, frozenset), _Teller._set),
    (CodeType, _Teller._code),
    (FunctionType, _Teller._function),
    (MethodType, _Teller._method),
    (functools.partial, _Teller._partial),
    (nn.Module, _Teller._module),
]


def bytes_of(tensor: Tensor) -> bytes:
    """A tensor's numbers, wherever it is and however it lies there."""
    plain = tensor.detach().cpu().contiguous().reshape(-1)
    return plain.view(torch.uint8).numpy().tobytes() if plain.numel() else b""


def _content(cell: Any) -> Any:
    """What a function closes over; nothing where that is not there yet."""
    try:
        return cell.cell_contents
    except ValueError:
        return None


def _named(function: FunctionType) -> dict[str, Any]:
    """Globals that a function names. Of functions only those of its own module: others change with
    a package, not from run to run."""
    known, found = function.__globals__, {}
    for name in _names(function.__code__):
        value = known.get(name)
        own = isinstance(value, FunctionType) and value.__globals__ is known
        if own or isinstance(value, (*_PLAIN, Tensor)):
            found[name] = value
    return found


def _names(code: CodeType) -> set[str]:
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return {*code.co_names}.union(*map(_names, inner))
