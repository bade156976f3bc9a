"""Recipes: whole prunings as data, with criterion, scope, rate, layers and training settings.

``rules/recipes/*.yaml`` ships with the package; a YAML file of one's own works the same way:
``fxprune.prune(model, recipe="my.yaml")``. A recipe may hold variants, which change some of its
fields: ``recipe="distribution_fit_resnet:A"``.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator

from .criteria import find as find_criterion
from .errors import FxpruneError, RecipeError, nearest
from .flow import Mixing
from .heads import Heads
from .normalize import Normalize
from .score import Reduce
from .select import Scope, SelectRule
from .squeeze import Squeeze, as_squeeze
from .targets import check_target
from .yamlfile import Fault, folder, line_of, parsed, shown, text_of

_STRICT = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class Sparse(BaseModel):
    """Sparse training: the loss gets s * sum |gamma| (see `fxprune.SparsityPenalty`).

    ``all_bn``: of all normalisations, not only those of channels that may go. ``warmup``: steps
    over which s rises from 0.
    """

    model_config = _STRICT
    s: float = Field(gt=0)
    all_bn: bool = False
    warmup: int = Field(0, ge=0)


class Training(BaseModel):
    """Settings of an optimizer and its schedule.

    ``milestones``: shares of the epochs after which the rate is multiplied by ``gamma`` (schedule
    "step").
    """

    model_config = _STRICT
    epochs: int = Field(ge=1)
    batch: int = Field(128, ge=1)
    optimizer: Literal["sgd", "adamw"] = "sgd"
    lr: float = Field(gt=0)
    momentum: float = Field(0.9, ge=0, lt=1)
    nesterov: bool = False
    weight_decay: float = Field(0.0, ge=0)
    schedule: Literal["constant", "step", "cosine", "one_cycle"] = "constant"
    milestones: list[Annotated[float, Field(gt=0, lt=1)]] = Field(default_factory=list)
    gamma: float = Field(0.1, gt=0, le=1)


class Recipe(BaseModel):
    """A whole pruning. The fields from `criterion` to `heads` are `prune`'s options.

    ``about`` says what it does, ``source`` where it is from, ``ours`` what the source leaves open
    and was filled in here. ``sparse``, ``train`` and ``fine_tune`` are settings for a training
    loop, which `prune` does not run.
    """

    model_config = _STRICT
    name: str = ""
    about: str = ""
    source: str = ""
    ours: str = ""
    criterion: str | dict[str, Any] = "l2"
    rate: float = Field(0.5, ge=0, lt=1)
    scope: Scope = "local"
    select_by: SelectRule = "rate"
    reduce: Reduce = "mean"
    rates: dict[str, float] = Field(default_factory=dict)
    only: list[str] = Field(default_factory=list)
    ignore: list[str] = Field(default_factory=list)
    min_channels: int = Field(1, ge=1)
    max_rate: float = Field(1.0, ge=0, le=1)
    round_to: int | Literal["auto"] = 1
    target: dict[str, float] | None = None
    normalize: Normalize | None = None
    squeeze: dict[str, Any] | None = None
    mixing: Mixing = "norms"
    scatter: bool = False
    heads: Heads = "dims"
    sparse: Sparse | None = None
    train: Training | None = None
    fine_tune: Training | None = None
    variants: tuple[str, ...] = ()

    @field_validator("only", "ignore", mode="before")
    @classmethod
    def _listed(cls, given: Any) -> Any:
        return [given] if isinstance(given, str) else given

    @field_validator("criterion")
    @classmethod
    def _check_criterion(cls, given: str | dict[str, Any]) -> str | dict[str, Any]:
        return _passed(find_criterion, given)

    @field_validator("squeeze")
    @classmethod
    def _check_squeeze(cls, given: dict[str, Any] | None) -> dict[str, Any] | None:
        return _passed(as_squeeze, given)

    @field_validator("target")
    @classmethod
    def _check_target(cls, given: dict[str, float] | None) -> dict[str, float] | None:
        return given if given is None else _passed(check_target, given)

    @field_validator("round_to")
    @classmethod
    def _check_round_to(cls, given: Any) -> Any:
        if given != "auto" and given < 1:
            raise ValueError(f"round_to={given} must be a whole number of at least 1, or auto")
        return given

    @field_validator("rates")
    @classmethod
    def _check_rates(cls, given: dict[str, float]) -> dict[str, float]:
        wrong = next((p for p, rate in given.items() if not 0 <= rate < 1), None)
        if wrong is not None:
            raise ValueError(f"the rate of `{wrong}` is {given[wrong]:g}, outside [0, 1)")
        return given


RecipeLike = str | Path | Recipe


def _passed(check: Any, given: Any) -> Any:
    """`given`, if `check` takes it; its error as one that pydantic keeps."""
    try:
        check(given)
    except FxpruneError as error:
        raise Fault(error) from None
    return given


def names() -> list[str]:
    """The names of all shipped recipes, variants among them."""
    found = []
    for path in _shipped():
        recipe = read(path)
        found += [path.stem, *(f"{path.stem}:{variant}" for variant in recipe.variants)]
    return found


def _shipped() -> list[Path]:
    return sorted((folder() / "recipes").glob("*.yaml"))


def find(which: RecipeLike) -> Recipe:
    """A recipe by name, or from a file; ``:variant`` behind either names one of its variants.

    Raises `RecipeError` with the nearest name for one that is not known, and with file and line for
    one that is broken.
    """
    given: Any = which
    if isinstance(given, Recipe):
        return given
    if not isinstance(given, (str, Path)):
        kind = type(given).__name__
        raise RecipeError(f"recipe is a {kind}", hint="a name, the path of a YAML file, a Recipe")
    path, variant = _split(str(given))
    return read(path, variant)


def _split(text: str) -> tuple[Path, str]:
    """The file of a recipe, and its variant."""
    known = {path.stem: path for path in _shipped()}
    name, _, variant = (text, "", "") if _is_file(text) else text.rpartition(":")
    name, variant = (name, variant) if name else (variant or text, "")
    if name in known:
        return known[name], variant
    if Path(name).suffix in (".yaml", ".yml") or _is_file(name):
        return Path(name), variant
    raise RecipeError(
        f"no recipe `{name}`",
        details=[("known", ", ".join(known))],
        hint=nearest(name, known) or "pass one of these, or the path of a YAML file of your own",
    )


def _is_file(text: str) -> bool:
    try:
        return Path(text).is_file()
    except (OSError, ValueError):  # too long for a file's name, or not fit for one
        return False


def read(path: Path, variant: str = "") -> Recipe:
    """The recipe of one file; `RecipeError` names file and line of what is wrong."""
    text = text_of(path, RecipeError)
    found = _read(path, text)
    if variant not in found:
        known = [name for name in found if name]
        raise RecipeError(
            f"recipe `{path.stem}` has no variant `{variant}`",
            details=[("known", ", ".join(known) or "it has none")],
            hint=nearest(variant, known),
        )
    return found[variant]


@lru_cache(maxsize=64)
def _read(path: Path, text: str) -> dict[str, Recipe]:
    """A file's recipe, under the empty name, and its variants."""
    where = shown(path)
    root, data = parsed(text, where, RecipeError)
    if not isinstance(data, dict):
        raise RecipeError(f"{where}:1 must hold the fields of a recipe", hint="`criterion: l1`")
    data = dict(data)
    variants = _variants(data.pop("variants", None), root, where)
    own = {"name": path.stem, **data, "variants": tuple(variants)}
    found = {"": _valid(own, root, where, ())}
    for name, changed in variants.items():
        fields = {**own, **changed, "name": f"{own['name']}:{name}"}
        found[name] = _valid(fields, root, where, ("variants", name))
    return found


def _variants(given: Any, root: Any, where: str) -> dict[str, dict[str, Any]]:
    given = {} if given is None else given
    named = isinstance(given, dict) and all(isinstance(v, dict) for v in given.values())
    if not named or any(not str(name) or name is None for name in given):
        line = line_of(root, ["variants"])
        raise RecipeError(f"{where}:{line} variants must map names to fields")
    for name, changed in given.items():
        for key in {"name", "variants"} & changed.keys():
            line = line_of(root, ["variants", name, key])
            raise RecipeError(f"{where}:{line} `{key}` cannot be changed by a variant")
    return {str(name): changed for name, changed in given.items()}


def _valid(fields: Mapping[str, Any], root: Any, where: str, inside: tuple[Any, ...]) -> Recipe:
    try:
        return Recipe.model_validate(fields)
    except ValidationError as error:
        first = error.errors()[0]
    path = [part for part in first["loc"] if not _is_type(part)]
    line = line_of(root, (*inside, *path))
    message, hint = first["msg"].removeprefix("Value error, "), ""
    fault = first.get("ctx", {}).get("error")
    if isinstance(fault, Fault):
        message, hint = fault.error.fault, fault.error.hint
    if first["type"] == "extra_forbidden":
        message, hint = "is not a field of a recipe", nearest(str(path[-1]), _fields(path[:-1]))
    if first["type"] == "float_type" and _is_number(first["input"]):
        hint = f"YAML reads `{first['input']}` as text: write 1.0e-4 for 1e-4"
    raise RecipeError(f"{where}:{line} `{'.'.join(map(str, path))}`: {message}", hint=hint)


def _is_number(text: Any) -> bool:
    try:
        return isinstance(text, str) and float(text) == float(text)
    except ValueError:
        return False


def _is_type(part: Any) -> bool:
    """Pydantic puts the branches of a union into the path."""
    return isinstance(part, str) and (part.startswith(("dict[", "list[")) or part == "str")


def _fields(path: list[Any]) -> list[str]:
    inner = {"sparse": Sparse, "train": Training, "fine_tune": Training}
    model: Any = inner.get(path[0], Recipe) if path else Recipe
    return [*model.model_fields]


__all__ = ["Recipe", "RecipeLike", "Sparse", "Squeeze", "Training", "find", "names", "read"]
