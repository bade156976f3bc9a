"""A plan: what is kept of every parameter, as a file can hold it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from torch import Tensor

from .errors import PlanError

Kept = list[int] | list[list[int]]


def kept_size(kept: Kept | None, size: int) -> int:
    """How many of `size` indices are kept, in each block where blocks keep different ones."""
    if kept is None:
        return size
    first = kept[0] if kept else 0
    return len(first) if isinstance(first, list) else len(kept)


class GroupPlan(BaseModel):
    """What was decided for one group: how many channels it has, keeps, and why not fewer."""

    model_config = ConfigDict(frozen=True, extra="forbid")
    name: str
    size: int
    kept: int
    reason: str = ""
    scores: list[float] | None = None


class Plan(BaseModel):
    """Kept indices of each parameter and buffer that gets narrower, per dim.

    ``kept["conv2.weight"][0]`` lists the kept indices of dim 0. Where blocks of a grouped layer
    keep different indices, it holds one list a block (all of the same length). ``shapes`` and
    ``fingerprint`` say which model the plan is for.
    """

    model_config = ConfigDict(frozen=True, extra="forbid")
    format: Literal[1] = 1
    fxprune: str = ""
    torch: str = ""
    model: str = ""
    fingerprint: str = ""
    shapes: dict[str, list[int]] = Field(default_factory=dict)
    inputs: Any = None
    recipe: str = ""
    criterion: str = ""
    rate: float | None = None
    target: dict[str, float] = Field(default_factory=dict)
    scope: str = "local"
    select_by: str = "rate"
    mixing: str = "norms"
    scatter: bool = False
    heads: str = "dims"
    frontend: str = "symbolic"
    kept: dict[str, dict[int, Kept]] = Field(default_factory=dict)
    groups: list[GroupPlan] = Field(default_factory=list)
    warnings: list[str] = Field(default_factory=list)

    def __repr__(self) -> str:
        rate = f" at {self.rate:g}" if self.rate is not None else ""
        rate += "".join(f" for {kind}={amount:g}" for kind, amount in self.target.items())
        size = sum(group.size for group in self.groups)
        return (
            f"<Plan for {self.model or 'a model'} by {self.criterion or 'hand'}{rate}: "
            f"{self.removed:,} of {size:,} channels go>"
        )

    __str__ = __repr__

    def to_json(self, *, indent: int | None = None) -> str:
        """The plan as JSON; `Plan.from_json` reads it back equal."""
        return self.model_dump_json(indent=indent)

    @classmethod
    def from_json(cls, text: str) -> Plan:
        """Read a plan; `PlanError` where the text is not one."""
        try:
            return cls.model_validate_json(text)
        except ValidationError as error:
            first = error.errors()[0]
            where = ".".join(map(str, first["loc"])) or "the file"
            raise PlanError(
                f"not a plan: {where}: {first['msg']}", hint="write plans with plan.to_json()"
            ) from None

    @property
    def removed(self) -> int:
        """How many channels go."""
        return sum(group.size - group.kept for group in self.groups)

    def check_fits(self, tensors: Mapping[str, Tensor]) -> None:
        """Raise `PlanError` with the differences if the plan is for another model."""
        shapes = shapes_of(tensors)
        if fingerprint(shapes) == self.fingerprint:
            return
        wrong = list(_differences(self.shapes, shapes))
        raise PlanError(
            f"the plan is for another model: {len(wrong)} parameters differ",
            details=[("differs", text) for text in wrong[:8]]
            + ([("", f"and {len(wrong) - 8} more")] if wrong[8:] else []),
            hint=f"the plan was made for {self.model}; apply it to a model built the same way",
        )


def _differences(planned: Mapping[str, list[int]], found: Mapping[str, list[int]]) -> Iterable[str]:
    for name in sorted(planned.keys() - found.keys()):
        yield f"{name} {planned[name]} is not in the model"
    for name in sorted(found.keys() - planned.keys()):
        yield f"{name} {found[name]} is not in the plan"
    for name in sorted(planned.keys() & found.keys()):
        if planned[name] != found[name]:
            yield f"{name} is {found[name]}, planned for {planned[name]}"


def shapes_of(tensors: Mapping[str, Tensor]) -> dict[str, list[int]]:
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def fingerprint(shapes: Mapping[str, list[int]]) -> str:
    """A hash of names and shapes: models of one architecture share it, whatever their weights."""
    text = json.dumps(sorted(shapes.items()), separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()[:16]
