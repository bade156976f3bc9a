"""Which groups a user's patterns, roles, modules and types mean."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from torch import nn

from .analysis import Analysis
from .errors import OptionError, nearest
from .groups import Group
from .roles import ROLES, Roles
from .select import layer_names

Ignore = Sequence["str | nn.Module | type"]


def ignored(analysis: Analysis, ignore: Ignore) -> dict[int, str]:
    """Group number -> why it is left alone; `OptionError` for an item that matches nothing."""
    found: dict[int, str] = {}
    for item in _items("ignore", ignore):
        for i in _meant(analysis, "ignore", item):
            found[i] = f"ignored by `{_shown(item)}`"
    return found


def selected(analysis: Analysis, only: Ignore) -> set[int]:
    """The groups in scope: all, if `only` is empty. `OptionError` for an item that matches none."""
    items = _items("only", only)
    if not items:
        return set(range(len(analysis.groups)))
    found = {i for item in items for i in _meant(analysis, "only", item)}
    if not found:
        shown = ", ".join(f"`{_shown(item)}`" for item in items)
        roles = Roles(analysis)
        there = ", ".join(f"{role} ({len(roles.of(role))})" for role in ROLES if roles.of(role))
        raise OptionError(
            f"only {shown} matches nothing in the model",
            details=[("roles", f"groups of this network are: {there}")],
            hint="choose others with only=[...]",
        )
    return found


def _items(option: str, given: Any) -> Sequence[Any]:
    items = (given,) if isinstance(given, (str, nn.Module, type)) else given
    if not isinstance(items, Sequence):
        kind = type(items).__name__
        hint = "a list of name patterns, roles, modules or types"
        raise OptionError(f"{option} is a {kind}", hint=hint)
    return items


def _shown(item: Any) -> str:
    return item if isinstance(item, str) else getattr(item, "__name__", type(item).__name__)


def _meant(analysis: Analysis, option: str, item: Any) -> set[int]:
    """The groups one item means."""
    if isinstance(item, str) and item.removeprefix("in:").startswith("role:"):
        if item.startswith("in:"):
            raise OptionError(f"{option} holds `{item}`", hint="roles are of channels: no `in:`")
        return _of_role(analysis, option, item.removeprefix("role:"))
    names, inputs = _names_of(analysis, option, item)
    groups = enumerate(analysis.groups)
    return {i for i, group in groups if any(name in names for name in _names(group, inputs))}


def _of_role(analysis: Analysis, option: str, role: str) -> set[int]:
    if role not in ROLES:
        raise OptionError(
            f"{option} names the role `{role}`, which is not known",
            details=[("known", ", ".join(ROLES))],
            hint=nearest(role, ROLES),
        )
    return Roles(analysis).of(role)


def _names(group: Group, inputs: bool) -> list[str]:
    """The layers that read a group's channels, or else those that make or pass them on."""
    params = [m.param for m in group.members if (m.role == "in") == inputs]
    return [name for param in params for name in (param, param.rpartition(".")[0])]


def _names_of(analysis: Analysis, option: str, item: Any) -> tuple[set[str], bool]:
    """Names of modules and parameters an item means, and whether their inputs are meant."""
    modules = dict(analysis.model.named_modules())
    if isinstance(item, str):
        inputs, pattern = item.startswith("in:"), item.removeprefix("in:")
        known = {*modules, *analysis.tensors} - {""}
        names = {n for n in known if fnmatch.fnmatchcase(n, pattern)}
        names |= {n for n in known if any(n.startswith(f"{m}.") for m in names if m)}
        _must_match(bool(names), f"{option} pattern `{item}`", pattern, known)
        return names, inputs
    if isinstance(item, nn.Module):
        roots = [name for name, module in modules.items() if module is item]
    elif isinstance(item, type):
        roots = [name for name, module in modules.items() if isinstance(module, item)]
    else:
        kind = type(item).__name__
        raise OptionError(f"{option} holds a {kind}", hint="name patterns, modules or module types")
    names = {n for n in modules if any(n == r or n.startswith(f"{r}.") or not r for r in roots)}
    _must_match(bool(names), f"{option}={_shown(item)}", "", ())
    return names, False


def check_patterns(analysis: Analysis, rates: Mapping[str, float], option: str = "rates") -> None:
    """Raise `OptionError` for a pattern of an option that matches no layer with channels."""
    names = {name for group in analysis.groups for name in layer_names(group)}
    for pattern in rates:
        if not isinstance(pattern, str):
            raise OptionError(
                f"{option} holds a pattern that is a {type(pattern).__name__}",
                hint='name patterns of layers, as in {"layer1.*": 4}',
            )
        found = any(fnmatch.fnmatchcase(name, pattern) for name in names)
        _must_match(found, f"{option} pattern `{pattern}`", pattern, names)


def _must_match(found: bool, what: str, pattern: str, known: Iterable[str]) -> None:
    if not found:
        raise OptionError(
            f"{what} matches nothing in the model",
            hint=nearest(pattern, known) or "patterns are shell-style, as in `layer1.*.conv2`",
        )


def by_name(given: Any, model: nn.Module) -> Any:
    """Modules by their names, which those of a copy share."""
    names = {id(module): name for name, module in model.named_modules()}
    if isinstance(given, (str, nn.Module, type)):
        return names.get(id(given), given)
    return [names.get(id(each), each) for each in given]
