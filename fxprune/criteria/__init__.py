"""Criteria: how much a channel matters, or which channels to keep.

A scoring criterion is a function of a group (`Slices`) that gives one score a channel, or a list of
such scores, one a coupled layer, which ``reduce=`` joins; low scores go first::

    @fxprune.criterion("mine")
    def mine(group):
        return [filters.abs().amax(1) for filters in group.filters]

A set criterion judges sets, not channels: it is told how many to keep, and returns their indices::

    @fxprune.criterion("every_other", kind="set")
    def every_other(group, keep):
        return torch.linspace(0, len(group) - 1, keep).round().long()

Keyword arguments after those are options: ``criterion={"name": "mine", "option": 3}``.
"""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from pydantic import ConfigDict, TypeAdapter, ValidationError
from torch import Tensor

from ..errors import OptionError, nearest
from .slices import Slices

Scores = Tensor | list[Tensor]
Kind = Literal["score", "set"]
Function = Callable[..., Any]


@dataclass(frozen=True)
class Criterion:
    """A criterion with its options, ready to be asked."""

    name: str
    function: Function
    kind: Kind = "score"
    options: Mapping[str, Any] = field(default_factory=dict)
    needs: tuple[str, ...] = ()
    comparable: bool = False

    def __call__(self, group: Slices, *count: int) -> Any:
        return self.function(group, *count, **self.options)

    def __str__(self) -> str:
        options = ", ".join(f"{key}={value}" for key, value in self.options.items())
        return f"{self.name}({options})" if options else self.name


CriterionLike = str | Mapping[str, Any] | Function | Criterion

_known: dict[str, Criterion] = {}


NEEDS = ("gates", "gradients", "values", "ranks", "grams")


def criterion(
    name: str, *, kind: Kind = "score", needs: Sequence[str] = (), comparable: bool = False
) -> Callable[[Function], Function]:
    """Register a function as a criterion: ``@fxprune.criterion("name")``.

    A function of ``kind="set"`` takes the group and the number of channels to keep. `needs` says
    what of data it reads: "gates" and "gradients" (of a loss), "values", "ranks", "grams" (of
    activations); see `fxprune.criteria.Slices`. `comparable` scores mean the same in all groups,
    and their sums are what is lost.
    """
    unknown = [each for each in needs if each not in NEEDS]
    if isinstance(needs, str) or unknown:
        raise OptionError(f"needs={needs!r} is not known", hint=f"a tuple of {', '.join(NEEDS)}")
    if kind not in ("score", "set"):
        raise OptionError(f"kind={kind!r} is not known", hint='"score" or "set"')

    def register(function: Function) -> Function:
        shipped = _known.get(name)
        own = function.__module__.startswith(f"{__name__}.")
        if shipped is not None and shipped.function.__module__.startswith(__name__) and not own:
            raise OptionError(f"criterion `{name}` ships with fxprune", hint="choose another name")
        _known[name] = Criterion(name, function, kind, {}, tuple(needs), comparable)
        return function

    return register


def find(which: CriterionLike) -> Criterion:
    """The criterion that is meant; `OptionError` with the nearest name for one that is not known,
    or for an option that it does not have."""
    if isinstance(which, Criterion):
        return which
    if isinstance(which, Mapping):
        return _with_options(which)
    if callable(which):
        known = (found for found in _known.values() if found.function is which)
        name = getattr(which, "__name__", "custom")
        return next(known, Criterion(name, which))
    if not isinstance(which, str):
        raise OptionError(
            f"criterion is a {type(which).__name__}",
            hint='pass a name, {"name": ..., "option": ...}, or a function of a group',
        )
    if which not in names():
        raise OptionError(
            f"no criterion `{which}`",
            details=[("known", ", ".join(names()))],
            hint=nearest(which, names()) or "pass one of these, or a function of your own",
        )
    return _known[which]


def _with_options(given: Mapping[str, Any]) -> Criterion:
    if "name" not in given:
        raise OptionError("criterion has no `name`", hint='{"name": "sparsity", "side": "below"}')
    found = find(given["name"])
    known = _options(found)
    options = {key: value for key, value in given.items() if key != "name"}
    for key in options:
        if key not in known:
            raise OptionError(
                f"criterion `{found.name}` has no option `{key}`",
                details=[("known", ", ".join(known) or "it has none")],
                hint=nearest(str(key), known),
            )
    options = {key: _checked(found.name, key, known[key], options[key]) for key in options}
    return replace(found, options=options)


def _options(found: Criterion) -> dict[str, Any]:
    """The names of a criterion's options with what they may be."""
    first = 1 if found.kind == "score" else 2
    parameters = list(inspect.signature(found.function).parameters)[first:]
    try:
        hints = typing.get_type_hints(found.function)
    except (NameError, TypeError):
        hints = {}
    return {name: hints.get(name, Any) for name in parameters}


def _checked(name: str, key: str, hint: Any, value: Any) -> Any:
    try:
        return TypeAdapter(
            hint, config=ConfigDict(strict=True, arbitrary_types_allowed=True)
        ).validate_python(value)
    except ValidationError as error:
        why = error.errors()[0]["msg"]
        raise OptionError(f"criterion `{name}` option {key}={value!r}: {why}") from None


def names() -> list[str]:
    """The names of all criteria."""
    from . import fits, magnitude, measured, shares, sparsities  # noqa: F401

    return sorted(_known)


__all__ = ["Criterion", "CriterionLike", "Scores", "Slices", "criterion", "find", "names"]
