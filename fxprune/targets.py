"""Budgets: what ``target=`` may say, and the choice that meets it."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .analysis import Analysis
from .check import check_choice
from .costs import TERMS, Costs, Term
from .errors import OptionError

if TYPE_CHECKING:
    from .latency_table import LatencyTable

KINDS = ("macs", "params", "latency_ms")
CLOSE = 0.01  # a budget is met where the cost is that near, and not above


@dataclass(frozen=True)
class Reached:
    """One target, what the network cost before, and what it costs now; ``note`` says why it is not
    nearer, where it is off by more than one percent, and of which batch times are, where it is
    another one than the example inputs'."""

    kind: str
    target: float
    before: float
    after: float
    note: str = ""

    @property
    def met(self) -> bool:
        return self.after <= self.target * (1 + 1e-9)

    def __str__(self) -> str:
        unit = {"latency_ms": " ms"}.get(self.kind, "")
        note = f": {self.note}" if self.note else ""
        return (
            f"{self.kind} {_shown(self.after)}{unit} of at most {_shown(self.target)}{unit} "
            f"({self.after / max(self.before, 1e-30):.1%} left){note}"
        )


def _shown(amount: float) -> str:
    return f"{amount:,.0f}" if amount >= 1000 else f"{amount:.4g}"


def check_target(target: Any) -> dict[str, float]:
    """Checked as ``{"macs": 0.5}``: shares of at most 1, or amounts; `OptionError` for others."""
    if not isinstance(target, Mapping) or not target:
        raise OptionError(
            f"target={target!r} is no budget",
            hint='target={"macs": 0.5}, {"params": 2_000_000}, {"latency_ms": 4.0}, or several',
        )
    for kind, amount in target.items():
        check_choice("target", kind, KINDS)
        number = isinstance(amount, numbers.Real) and not isinstance(amount, bool)
        if not number or not math.isfinite(amount) or amount <= 0:
            raise OptionError(
                f"target[{kind!r}]={amount!r} must be a number above 0",
                hint="up to 1 it is a share of the unpruned network's, else an amount"
                if kind != "latency_ms"
                else "milliseconds of one call",
            )
    return {kind: float(amount) for kind, amount in target.items()}


@dataclass
class Budget:
    """Targets as amounts, and the costs they are of. ``aims``: what to aim at, where
    something behind the selection changes costs too. ``batch``: that of the example inputs."""

    targets: dict[str, float]
    costs: Costs
    aims: dict[str, float] = field(default_factory=dict)
    table: LatencyTable | None = None
    batch: int = 0

    def reached(self, costs: Mapping[str, float], notes: Mapping[str, str]) -> list[Reached]:
        found = []
        for kind, target in self.targets.items():
            amounts = (target, self.costs.dense[kind], costs[kind])
            note = notes.get(kind, "")
            if kind == "latency_ms" and self.table is not None:  # what ops take alone
                amounts = tuple(map(self.table.whole_of, amounts))  # type: ignore[assignment]
                note = "; ".join(filter(None, [note, self._batches()]))
            found.append(Reached(kind, *amounts, note))
        return found

    def _batches(self) -> str:
        """Says so where times are of another batch than that of the example inputs."""
        of = self.table.batch if self.table is not None else self.batch
        return (
            f"times are of batch {of}, the example inputs of {self.batch}"
            if of != self.batch
            else ""
        )


def budget(
    analysis: Analysis, target: Mapping[str, float], table: LatencyTable | None = None
) -> Budget:
    """The budget of a network; `table` tells what ops take, where time is limited."""
    known: dict[str, Callable[[Analysis], Iterable[Term]]] = dict(TERMS)
    if table is not None:
        _check_table(table, analysis)
        known["latency_ms"] = table.terms
    costs = Costs(analysis, {kind: list(known[kind](analysis)) for kind in target})
    amounts = {}
    for kind, amount in target.items():
        if kind == "latency_ms" and table is not None:
            amounts[kind] = table.parts_of(amount)
        else:
            amounts[kind] = amount * costs.dense[kind] if amount <= 1 else amount
    return Budget(amounts, costs, dict(amounts), table, analysis.batch)


def _check_table(table: Any, analysis: Analysis) -> None:
    from .latency_table import LatencyTable

    if not isinstance(table, LatencyTable):
        raise OptionError(
            f"latency_table is a {type(table).__name__}",
            hint="pass what fxprune.LatencyTable.measure or LatencyTable.from_json gave",
        )
    table.check_fits(analysis)
