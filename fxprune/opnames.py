"""Functions, methods and layers by name: those that a saved network may call, and no others.

A name is allowed where PyTorch says that the function computes with tensors
(`torch.overrides.get_overridable_functions`), or where a rule knows it; reading files, running code
and looking into objects is neither.
"""

from __future__ import annotations

import builtins
import collections
import functools
import math
import operator
import re
import sys
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from . import rules

SPACES = (
    "torch.nn.functional",
    "torch",
    "torch.special",
    "torch.linalg",
    "torch.fft",
    "operator",
    "math",
    "builtins",
    "collections",
    "torch.Tensor",
    "torchvision.ops",
)
_METHODS = "torch.Tensor"
_PLAIN = {
    builtins: "abs bool float getattr int len max min pow range round slice sum tuple".split(),
    math: "ceil floor log log2 prod sqrt".split(),
    torch: "Size _assert".split(),
    collections: "OrderedDict".split(),
}
_ASKS = "H T device dtype imag is_cuda itemsize layout mH mT nbytes ndim real requires_grad shape"
ATTRIBUTES = frozenset(_ASKS.split())  # that `getattr` may ask a tensor for
_OP = re.compile(r"(aten|torchvision)\.(\w+)(?:\.(\w+))?")


def name_of(function: Any) -> str | None:
    """The name under which a saved network may call this function; None where it may not."""
    if isinstance(function, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        name = str(function)
    else:
        name = _names().get(function, "")
    try:
        return name if name and function_of(name) == function else None
    except LookupError:
        return None


def function_of(name: str) -> Any:
    """The function of a name; `LookupError` for one that a saved network may not call."""
    op = _OP.fullmatch(name)
    if op and "." in name and not name.startswith("torchvision.ops"):
        return _op(*op.groups())
    space, _, word = name.rpartition(".")
    found = getattr(_module(space), word, None) if space in SPACES else None
    allowed = is_method(word) if space == _METHODS else _is_allowed(found, word)
    if found is None or not allowed:
        raise LookupError(name)
    return found


def is_method(name: str) -> bool:
    """Whether a saved network may call this method of a tensor."""
    return rules.current().knows_method(name) or (not name.startswith("_") and name in _methods())


def layer_of(name: str) -> type[nn.Module]:
    """The class of a layer: of torch.nn, or of torchvision.ops. `LookupError` for any other."""
    space, _, word = name.rpartition(".")
    found = (
        getattr(_module(space), word, None) if space in ("torch.nn", "torchvision.ops") else None
    )
    if not (isinstance(found, type) and issubclass(found, nn.Module)) or word.startswith("_"):
        raise LookupError(name)
    return found


def layer_name(layer: nn.Module) -> str | None:
    """The name of the class that computes as this layer does; None where no class of PyTorch
    does."""
    for cls in type(layer).__mro__:
        space = "torchvision.ops" if cls.__module__.startswith("torchvision.ops") else "torch.nn"
        if cls is not nn.Module and getattr(_module(space), cls.__name__, None) is cls:
            return f"{space}.{cls.__name__}" if rules.computes_as(type(layer), cls) else None
    return None


def _op(space: str, word: str, overload: str | None) -> Any:
    packet = getattr(getattr(torch.ops, space), word, None)
    found = getattr(packet, overload, None) if overload else packet
    known = word.rstrip("_") in _overridable_names() or rules.current().knows(found)
    if found is None or not known:
        raise LookupError(word)
    return found


def _is_allowed(found: Any, word: str) -> bool:
    if any(getattr(space, word, None) is found for space, ws in _PLAIN.items() if word in ws):
        return True
    if not callable(found) or isinstance(found, type):
        return False
    return found in _overridable() or rules.current().knows(found)


def _module(name: str) -> Any:
    """A module that is there already; of torchvision, one that can be imported."""
    if name.startswith("torchvision"):
        try:
            import torchvision.ops  # noqa: F401
        except ImportError:
            return None
    return torch.Tensor if name == _METHODS else sys.modules.get(name)


def _names() -> Mapping[Any, str]:
    return _names_in(SPACES if "torchvision" in sys.modules else SPACES[:-1])


@functools.cache
def _names_in(spaces: tuple[str, ...]) -> Mapping[Any, str]:
    """Every callable of the spaces, under its own name, or the first of its others."""
    found: dict[Any, str] = {}
    others: dict[Any, str] = {}
    for space in spaces:
        for word, value in _inside(space):
            if callable(value) and (not word.startswith("__") or space == _METHODS):
                own = getattr(value, "__name__", "") == word
                (found if own else others).setdefault(_hashed(value), f"{space}.{word}")
    return others | found


def _inside(space: str) -> Iterator[tuple[str, Any]]:
    home = _module(space)
    words = dir(home) if space == _METHODS else vars(home)
    return ((word, getattr(home, word, None)) for word in words)


def _hashed(value: Any) -> Any:
    try:
        hash(value)
    except TypeError:
        return id(value)
    return value


@functools.cache
def _overridable() -> frozenset[Any]:
    return frozenset(_of_pytorch())


@functools.cache
def _overridable_names() -> frozenset[str]:
    return frozenset(getattr(each, "__name__", "") for each in _of_pytorch())


@functools.cache
def _methods() -> frozenset[str]:
    every = torch.overrides.get_overridable_functions()[torch.Tensor]
    return frozenset(getattr(each, "__name__", "") for each in every) - _TAKES_CODE


# These call what they are given, reach what lies beside the values, or leave the tensors' world.
_TAKES_CODE = frozenset(
    "apply_ map_ map2_ register_hook register_post_accumulate_grad_hook backward storage "
    "untyped_storage set_ share_memory_ numpy data_ptr".split()
)


def _of_pytorch() -> Iterator[Any]:
    for functions in torch.overrides.get_overridable_functions().values():
        yield from functions
    yield from (getattr(operator, word) for word in _OPERATORS)


_OPERATORS = (
    "abs add and_ contains eq floordiv ge getitem gt iadd iand ifloordiv ilshift imatmul imod "
    "imul index inv invert ior ipow irshift is_ is_not isub itruediv ixor le lshift lt matmul mod "
    "mul ne neg not_ or_ pos pow rshift setitem sub truediv truth xor"
).split()
