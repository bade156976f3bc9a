"""Results on the meta device without running there, where a rule says enough.

Torch computes many ops on the meta device in Python, step by step, which takes milliseconds (and
the first of them imports its compiler). What a rule declares often tells the shape; the rest comes
from the real op on an empty batch, or on one element of each operand.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from .errors import RuleError
from .meta import evaluate
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
    rule, x = use.rule, args[0]
    if not x.is_meta:
        return None
    if rule.kind == "pointwise" and not module._parameters and x.is_floating_point():
        return _like(x, x.shape, x.dtype, x.stride())
    if rule.kind != "dims" or rule.at or any(not hasattr(module, r) for r in rule.ranks.values()):
        return None
    if rule.pattern.output == rule.pattern.inputs[0]:
        _check_fits(rule, module, x, x)
        return _like(x, x.shape, x.dtype, x.stride())
    return _on_empty_batch(rule, module, x)


def _like(
    x: Tensor, shape: Sequence[int], dtype: torch.dtype, stride: Sequence[int] | None = None
) -> Tensor:
    if stride is None:
        return torch.empty(tuple(shape), dtype=dtype, device=x.device)
    return torch.empty_strided(tuple(shape), tuple(stride), dtype=dtype, device=x.device)


def _check_fits(rule: Rule, module: nn.Module, x: Tensor, found: Tensor) -> None:
    """Raise `RuleError` unless the rule's dims fit the input, the parameters and the result."""
    operands = [getattr(module, name, None) for name in rule.operands[1:]]
    shapes = [x.shape, *(None if t is None else t.shape for t in operands)]
    ranks = {letter: len(getattr(module, key)) for letter, key in rule.ranks.items()}
    sizes = {t: getattr(module, key) for key, t in rule.sizes.items() if t.isidentifier()}
    fixed = {**rule.fixed, **sizes}
    bind(rule.pattern, shapes, tuple(found.shape), sizes=fixed, ranks=ranks)


def _on_empty_batch(rule: Rule, module: nn.Module, x: Tensor) -> Tensor | None:
    """The result of a module that maps the items of a batch, from a run on none."""
    pattern = rule.pattern
    own = [p for p in module._parameters.values() if p is not None]
    if x.ndim < max(2, len(pattern.inputs[0].terms)) or not _maps_items(pattern):
        return None
    if not all(t.is_contiguous() for t in (x, *own)):
        return None
    device = own[0].device if own else torch.device("cpu")
    try:  # not module(), which is written down while the model is traced
        found = module.forward(torch.empty((0, *x.shape[1:]), dtype=x.dtype, device=device))
        if not isinstance(found, Tensor) or found.is_meta or not found.ndim or found.shape[0]:
            return None
        found = _like(x, (x.shape[0], *found.shape[1:]), found.dtype)
        _check_fits(rule, module, x, found)  # some kernels make little of nothing
    except (*_MISFITS, RuleError):
        return None
    return found


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
    """The result of a pointwise op or a concatenation; None for others, and where it is unclear."""
    name = getattr(func, "__name__", "")
    if name.endswith("_") and not name.endswith("__"):
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
        return shortcut(use, func, args, kwargs, tensors)
    except _MISFITS:
        return None


def _pointwise(use: Use, func, args, kwargs, tensors: list[Tensor]) -> Tensor | None:
    """The dtype from one element of each operand, the shape by broadcasting."""

    def one(tensor: Tensor, *_) -> Tensor:
        return torch.ones([1] * tensor.ndim, dtype=tensor.dtype)

    shape = torch.broadcast_shapes(*(t.shape for t in tensors))
    found = evaluate(func, args, kwargs, one, real=True)
    single = isinstance(found, Tensor) and found.ndim == len(shape)
    return _like(_meta_of(tensors), shape, found.dtype) if single else None


def _joined(use: Use, func, args, kwargs, tensors: list[Tensor]) -> Tensor | None:
    """The result from empty batches, unless it is the batches that are joined."""
    first = tensors[0].shape
    dim = plain(use.bound(args, dict(kwargs)).get("dim", 0))
    same = all(t.ndim == len(first) and t.shape[0] == first[0] for t in tensors if t.ndim)
    if not same or len(first) < 2 or dim % len(first) == 0 or dim < -len(first):
        return None

    def none(tensor: Tensor, *_) -> Tensor:
        return torch.empty((0, *tensor.shape[1:]), dtype=tensor.dtype)

    found = evaluate(func, args, kwargs, none, real=True)
    return _like(_meta_of(tensors), (first[0], *found.shape[1:]), found.dtype)


def _meta_of(tensors: list[Tensor]) -> Tensor:
    return next(t for t in tensors if t.is_meta)


_SHORTCUTS: dict[str, Callable[..., Tensor | None]] = {"pointwise": _pointwise, "cat": _joined}
