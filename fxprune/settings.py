"""All that decides what is removed: options given by hand, over a recipe's, over the defaults."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal

from .check import check_choice, check_count, check_share
from .criteria import Criterion, CriterionLike, find
from .curves import Sensitivity
from .errors import OptionError
from .flow import Mixing
from .heads import Heads
from .ignore import Ignore
from .normalize import NORMALIZE, Normalize
from .recipes import RecipeLike
from .recipes import find as find_recipe
from .score import Reduce
from .select import Options, Scope, SelectRule
from .squeeze import Squeeze, as_squeeze
from .targets import check_target


@dataclass(frozen=True)
class Settings:
    """The options of `prune` with their defaults."""

    criterion: CriterionLike = "l2"
    rate: float = 0.5
    scope: Scope = "local"
    select_by: SelectRule = "rate"
    reduce: Reduce = "mean"
    rates: Mapping[str, float] = field(default_factory=dict)
    only: Ignore = ()
    ignore: Ignore = ()
    min_channels: int | Mapping[str, int] = 1
    max_rate: float | Mapping[str, float] = 1.0
    round_to: int | Literal["auto"] = 1
    target: Mapping[str, float] | None = None
    normalize: Normalize | None = None
    sensitivity: Any = None
    squeeze: Squeeze | Mapping[str, Any] | Literal[False] | None = None
    mixing: Mixing = "norms"
    scatter: bool = False
    heads: Heads = "dims"
    recipe: str = ""

    @property
    def found(self) -> Criterion:
        return find(self.criterion)


def settings(recipe: RecipeLike | None, given: Mapping[str, Any]) -> Settings:
    """Settings from a recipe and what was given by hand (None: not given), checked.

    A rate given by hand takes the place of the recipe's rates for single layers too. Raises
    `OptionError` for what is out of range, `RecipeError` for a recipe that is not there or broken.
    """
    own = {key: value for key, value in given.items() if value is not None}
    found = Settings() if recipe is None else _of_recipe(recipe)
    if found.target is not None and "rate" not in own:
        own.setdefault("target", found.target)
    elif "rate" in own:
        found = replace(found, target=None)
    if "rate" in own or "target" in own:
        own.setdefault("rates", {})
    if "target" in own:
        own = _for_target(own, found)
    found = replace(found, **own)
    _check(found)
    bound: dict[str, Scope] = {
        "threshold": "global",
        "cumulative": "local",
        "knapsack": "global",
    }
    scope = bound.get(found.select_by, found.scope)
    squeeze = as_squeeze(found.squeeze)
    return replace(found, criterion=found.found, scope=scope, squeeze=squeeze)


def _for_target(own: dict[str, Any], found: Settings) -> dict[str, Any]:
    """A budget is met by a knapsack over the whole network, or else by the rate that meets it."""
    if "rate" in own:
        raise OptionError(
            "rate and target are given: the target says how much goes",
            hint="leave one of them out; max_rate caps the share that a layer loses",
        )
    chooses_sets = find(own.get("criterion", found.criterion)).kind == "set"
    local = own.get("scope", "local" if chooses_sets else None) == "local"
    rule = own.get("select_by", "rate" if local or chooses_sets else "knapsack")
    scope = own.get("scope", "local" if local else "global")
    return {**own, "target": check_target(own["target"]), "select_by": rule, "scope": scope}


def _of_recipe(which: RecipeLike) -> Settings:
    recipe = find_recipe(which)
    known = {each.name for each in fields(Settings)} - {"recipe"}
    set_there = recipe.model_fields_set & known
    return Settings(**{key: getattr(recipe, key) for key in set_there}, recipe=recipe.name)


def _check(found: Settings) -> None:
    check_share("rate", found.rate)
    for name, rate in _each("max_rate", found.max_rate):
        check_share(name, rate, whole=True)
    rates: Any = found.rates
    if not (isinstance(rates, Mapping) and all(isinstance(name, str) for name in rates)):
        raise OptionError("rates must map name patterns to rates", hint='rates={"layer1.*": 0.3}')
    for pattern, value in rates.items():
        check_share(f"rates[{pattern!r}]", value)
    check_choice("scope", found.scope, ("local", "global"))
    check_choice("select_by", found.select_by, ("rate", "cumulative", "threshold", "knapsack"))
    check_choice("scatter", found.scatter, (True, False))
    for name, count in _each("min_channels", found.min_channels):
        check_count(name, count)
    _check_round_to(found.round_to)
    if found.normalize is not None:
        check_choice("normalize", found.normalize, NORMALIZE)
    if found.select_by == "knapsack" and found.target is None:
        raise OptionError('select_by="knapsack" needs a target', hint='target={"macs": 0.5}')
    if found.sensitivity is not None and not isinstance(found.sensitivity, Sensitivity):
        kind = type(found.sensitivity).__name__
        raise OptionError(
            f"sensitivity is a {kind}", hint="pass what fxprune.sensitivity(model, data) gave"
        )
    if found.sensitivity is not None and found.select_by != "knapsack":
        raise OptionError("sensitivity is for a budget", hint='target={"macs": 0.5}')
    _check_set(found)


def _check_round_to(given: Any) -> None:
    if given == "auto":
        return
    try:
        check_count("round_to", given)
    except OptionError:
        fault = f'round_to={given!r} must be a whole number of at least 1, or "auto"'
        raise OptionError(fault) from None


def _each(name: str, given: Any) -> list[tuple[str, Any]]:
    """An option's values with their names: one for all layers, or one a name pattern."""
    if not isinstance(given, Mapping):
        return [(name, given)]
    return [(f"{name}[{pattern!r}]", value) for pattern, value in given.items()]


def _check_set(found: Settings) -> None:
    """A set criterion must know how many channels to keep before it is asked."""
    chosen = found.found
    if chosen.kind == "set" and (found.scope == "global" or found.select_by != "rate"):
        raise OptionError(
            f"criterion `{chosen}` chooses sets, which gives no scores to cut through",
            hint='use scope="local" and select_by="rate"; rates= sets the rate of single layers',
        )


def as_options(found: Settings) -> Options:
    """The settings that selection itself reads; those that are of single layers are bound later."""
    floor, cap, multiple = found.min_channels, found.max_rate, found.round_to
    rates = {pattern: float(value) for pattern, value in found.rates.items()}
    return Options(
        rate=float(found.rate),  # a number of numpy's is none in a plan
        scope=found.scope,
        rule=found.select_by,
        rates=rates,
        min_channels=1 if isinstance(floor, Mapping) else floor,
        max_rate=1.0 if isinstance(cap, Mapping) else float(cap),
        round_to=1 if isinstance(multiple, str) else multiple,
    )
