"""Results on the meta device without running there, where a rule says enough.

Torch computes many ops on the meta device in Python, step by step, which takes milliseconds (and
the first of them imports its compiler). What a rule declares often tells the shape; the rest comes
from the real op on an empty batch, or on one element of each operand.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .errors import RuleError
from .meta import evaluate, in_place
from .pattern import Atom, Operand, Pattern, bind
from .rules import Rule, Rules, Use
from .sizes import plain
from .trees import leaves

_MISFITS = (RuntimeError, TypeError, ValueError, IndexError, NotImplementedError)


def of_module(
    rules: Rules, module: nn.Module, args: tuple, kwargs: Mapping[str, Any]
) -> Tensor | None:
    """The output of a module on its one input; None where it has to be run to be known.

    Parameters that do not fit the input raise, as they would in a run.
    """
    use = rules.of_module(type(module))
    if use is None or len(args) != 1 or kwargs or not isinstance(args[0], Tensor):
        return None
    if use.misfits(module):
        return None
    rule, x = use.rule, args[0]
    if not x.is_meta:
        return None
    if rule.kind == "pointwise" and not module._parameters and x.is_floating_point():
        return _like(x, x.shape, x.dtype, x.stride())
    if rule.kind != "dims" or rule.at or any(not hasattr(module, r) for r in rule.ranks.values()):
        return None
    arguments = _Attributes(module)
    if rule.pattern.output == rule.pattern.inputs[0]:
        _check_fits(rule, arguments, x, x.shape)
        return _like(x, x.shape, x.dtype, x.stride())
    own = [p for p in module._parameters.values() if p is not None]
    try:  # not module(), which is written down while the model is traced
        return _on_empty_batch(rule, module.forward, x, own, arguments)
    except (*_MISFITS, RuleError):
        return None


class _Attributes:
    """A module's attributes, looked up as in a dict."""

    def __init__(self, module: nn.Module):
        self.module = module

    def get(self, name: str) -> Any:
        return getattr(self.module, name, None)


def _like(
    x: Tensor, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None
) -> Tensor:
    if stride is None:
        return torch.empty(tuple(shape), dtype=dtype, device=x.device)
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=x.device)


def _check_fits(rule: Rule, arguments: Any, x: Tensor, found: Sequence[int]) -> None:
    """Raise `RuleError` unless the rule's dims fit the input, other operands and the result."""
    operands = [arguments.get(name) for name in rule.operands[1:]]
    shapes = [x.shape, *(None if t is None else t.shape for t in operands)]
    told = arguments.get
    ranks = {letter: len(told(key)) for letter, key in rule.ranks.items() if told(key) is not None}
    sizes = {
        letter: plain(told(key))
        for key, letter in rule.sizes.items()
        if letter.isidentifier() and told(key) is not None
    }
    fixed = {**rule.fixed, **sizes}
    bind(rule.pattern, shapes, tuple(found), sizes=fixed, ranks=ranks)


def _on_empty_batch(
    rule: Rule, run: Callable[[Tensor], Any], x: Tensor, others: Sequence[Tensor], arguments: Any
) -> Tensor | None:
    """The result of an op that maps the items of a batch, from a run on none."""
    pattern = rule.pattern
    if x.ndim < max(2, len(pattern.inputs[0].terms)) or not _maps_items(pattern):
        return None
    if not all(t.is_contiguous() for t in (x, *others)):
        return None
    device = others[0].device if others else torch.device("cpu")
    found = run(torch.empty((0, *x.shape[1:]), dtype=x.dtype, device=device))
    if not isinstance(found, Tensor) or found.is_meta or not found.ndim or found.shape[0]:
        return None
    shape = (x.shape[0], *found.shape[1:])
    _check_fits(rule, arguments, x, shape)  # some kernels make little of nothing
    return _like(x, shape, found.dtype)


@cache
def _maps_items(pattern: Pattern) -> bool:
    """Whether input and output begin with the same dim, of items that no other operand knows.

    Where the output has letters of its own, that dim must be a single one: ops that rearrange what
    comes after any number of dims are not all right on nothing (pixel_unshuffle is not).
    """
    first, out = _leading(pattern.inputs[0]), _leading(pattern.output)
    others = {letter for operand in pattern.inputs[1:] for letter in operand.letters()}
    given = others.union(pattern.inputs[0].letters())
    if first is None or first != out or first.letter in others:
        return False
    return not first.star or given.issuperset(pattern.output.letters())


def _leading(operand: Operand) -> Atom | None:
    atoms = operand.terms[0].atoms if operand.terms else ()
    return atoms[0] if len(atoms) == 1 else None


def of_call(rules: Rules, func: Callable, args: tuple, kwargs: Mapping[str, Any]) -> Tensor | None:
    """The result of a function or method on meta tensors; None where it has to be computed."""
    name = getattr(func, "__name__", "")
    if in_place(name):
        return None
    use = rules.of_function(func, (args, dict(kwargs)))
    if use is None and getattr(torch.Tensor, name, None) is func:
        use = rules.of_method(name, (args, dict(kwargs)))
    shortcut = _SHORTCUTS.get(use.rule.kind) if use is not None else None
    if use is None or shortcut is None or "out" in kwargs or kwargs.get("inplace"):
        return None
    tensors = leaves((args, kwargs), Tensor)
    if not any(t.is_meta for t in tensors) or not all(t.is_contiguous() for t in tensors):
        return None
    try:
        return shortcut(_Call(use, func, args, kwargs, tensors))
    except (*_MISFITS, RuleError):
        return None


@dataclass(frozen=True)
class _Call:
    use: Use
    func: Callable
    args: tuple
    kwargs: Mapping[str, Any]
    tensors: list[Tensor]

    def run(self, standin: Callable[[Tensor], Tensor]) -> Any:
        """Call it with something real in place of each tensor."""
        return evaluate(self.func, self.args, self.kwargs, lambda t, *_: standin(t), real=True)

    def bound(self) -> dict[str, Any]:
        return self.use.bound(self.args, dict(self.kwargs))

    def like(self, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        return _like(next(t for t in self.tensors if t.is_meta), shape, dtype)


def _pointwise(call: _Call) -> Tensor | None:
    """The dtype from one element of each operand, the shape by broadcasting."""
    shape = np.broadcast_shapes(*(tuple(t.shape) for t in call.tensors))
    found = call.run(lambda t: torch.ones([1] * t.ndim, dtype=t.dtype))
    single = isinstance(found, Tensor) and found.ndim == len(shape)
    return call.like(shape, found.dtype) if single else None


def _joined(call: _Call) -> Tensor | None:
    dim, rank = plain(call.bound().get("dim", 0)), call.tensors[0].ndim
    return _of_items(call) if -rank <= dim < rank and dim % rank else None


def _reduced(call: _Call) -> Tensor | None:
    dim, rank = call.bound().get("dim"), call.tensors[0].ndim
    dims = [plain(d) for d in dim] if isinstance(dim, (tuple, list)) else [plain(dim)]
    apart = dims and all(isinstance(d, int) and d % max(rank, 1) for d in dims)
    return _of_items(call) if apart else None


def _of_items(call: _Call) -> Tensor | None:
    """The result from empty batches, for an op that leaves the items of a batch apart."""
    first = call.tensors[0].shape
    if len(first) < 2 or any(t.ndim != len(first) or t.shape[0] != first[0] for t in call.tensors):
        return None
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # as of a deviation of nothing
        found = call.run(lambda t: torch.empty((0, *t.shape[1:]), dtype=t.dtype))
    if not isinstance(found, Tensor) or not found.ndim or found.shape[0]:
        return None
    return call.like((first[0], *found.shape[1:]), found.dtype)


def _by_dims(call: _Call) -> Tensor | None:
    """The result of an op on one value of the network and on weights."""
    rule, arguments = call.use.rule, call.bound()
    x = arguments.get(rule.operands[0])
    others = [t for t in call.tensors if t is not x]
    if rule.at or not isinstance(x, Tensor) or any(t.is_meta for t in others):
        return None
    return _on_empty_batch(
        rule, lambda none: call.run(lambda t: none if t is x else t), x, others, arguments
    )


_SHORTCUTS: dict[str, Callable[[_Call], Tensor | None]] = {
    "pointwise": _pointwise,
    "cat": _joined,
    "reduce": _reduced,
    "dims": _by_dims,
}
