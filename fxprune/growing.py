"""Growing regularisation: what a plan removes is driven to zero before it goes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from .check import check_count, tensors_of
from .errors import OptionError, PlanError
from .penalties import Penalty, check_number, check_steps, unwrapped
from .plans import Plan
from .spread import gone


class GrowingPenalty(Penalty):
    """``s / 2 * sum w**2`` over all weights that a plan removes, with an `s` that grows by `delta`
    every `every` updates, from `delta` up to `ceiling` (GReg-1).

    The network moves what these channels did to others, while they fade::

        plan = fxprune.plan(fxprune.analyze(model, x), rate=0.5)
        penalty = fxprune.GrowingPenalty(model, plan)
        with penalty.attach(optimizer):
            while not penalty.done:                     # and for some epochs more
                ...                                     # a usual training step
        pruned = fxprune.apply(model, plan)             # removes what is near zero

    The defaults are the paper's, of a training of 100,000 updates until `done`; for a short run:
    ``delta=0.02, every=1``, 50 updates.

    Penalised are the parameters' slices, those that read a channel too. `state_dict` holds what
    resuming needs. `model` may be wrapped in DistributedDataParallel. `add_grad`, `loss`, `prox`
    and `attach` are those of `fxprune.SparsityPenalty`; `prox` divides by ``1 + lr * s``.

    Raises `PlanError` where the plan is for another model or removes no parameter, `OptionError`
    for options that cannot be used, and `ModelError` when a parameter has left the model since.

    Wang et al., Neural Pruning via Growing Regularization, ICLR 2021. There only filters are
    penalised, as a plan of one layer knows no others.
    """

    what = "parameters that shrink"

    def __init__(
        self,
        model: nn.Module,
        plan: Plan,
        *,
        delta: float = 1e-4,
        every: int = 10,
        ceiling: float = 1.0,
    ):
        _check_plan(plan)
        whole = unwrapped(model)
        tensors = tensors_of(whole)
        plan.check_fits(tensors)
        self._set(delta, every, ceiling)
        self._masks = {
            name: gone(tensors[name], kept)
            for name, kept in plan.kept.items()
            if isinstance(tensors[name], nn.Parameter)
        }
        if not self._masks:
            raise PlanError("the plan removes no parameter", hint="ask for a higher rate")
        super().__init__(whole, delta, list(self._masks))

    def _set(self, delta: Any, every: Any, ceiling: Any) -> None:
        check_number("delta", delta)
        check_number("ceiling", ceiling)
        check_count("every", every)
        self.delta, self.every, self.ceiling = float(delta), every, float(ceiling)

    def __len__(self) -> int:
        """How many weights are penalised."""
        return sum(int(mask.sum()) for mask in self._masks.values())

    def __repr__(self) -> str:
        return (
            f"GrowingPenalty(s={self.s:g} of {self.ceiling:g}: {len(self):,} weights in "
            f"{len(self.names)} parameters, {self.count} update{'' if self.count == 1 else 's'})"
        )

    @property
    def s(self) -> float:
        """The strength of the coming update."""
        return min(self.ceiling, self.delta * (1 + self.count // self.every))

    @property
    def done(self) -> bool:
        """Whether the strength is at its ceiling."""
        return self.s >= self.ceiling

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs beside the plan: the count of updates, and how strength grows."""
        grows = {"delta": self.delta, "every": self.every, "ceiling": self.ceiling}
        return {"count": self.count, **grows}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken, with a penalty of the same plan."""
        if not isinstance(state, Mapping) or not {*self.state_dict()} <= set(state):
            raise OptionError(
                "this is no state of a GrowingPenalty",
                hint="it holds `count`, `delta`, `every` and `ceiling`",
            )
        check_steps("count", state["count"], least=0)
        self._set(state["delta"], state["every"], state["ceiling"])
        self.count = state["count"]

    def _of(self, names: Iterable[str]) -> Iterator[tuple[str, nn.Parameter, Tensor]]:
        wanted = set(names)
        for name, param in self._named():
            if name in wanted:
                mask = self._masks[name] = self._masks[name].to(param.device)
                yield name, param, mask

    def _sum(self, trained: bool) -> Tensor | None:
        names = [name for name, _ in self._trained()] if trained else self._names
        terms = [_half_square(param, mask) for _, param, mask in self._of(names)]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None

    @torch.no_grad()
    def _pull(self, by: Mapping[str, float]) -> None:
        for name, param, mask in self._of(by):
            if param.grad is not None:
                param.grad.add_(param * mask, alpha=by[name])

    @torch.no_grad()
    def _shrink(self, by: Mapping[str, float]) -> None:
        for name, param, mask in self._of(by):
            param.copy_(torch.where(mask, param / (1 + by[name]), param))


def _check_plan(plan: Any) -> None:
    if not isinstance(plan, Plan):
        raise OptionError(f"plan is a {type(plan).__name__}", hint="fxprune.plan makes one")


def _half_square(param: Tensor, mask: Tensor) -> Tensor:
    wide = param if param.dtype in (torch.float32, torch.float64) else param.float()
    return (wide.square() * mask).sum() / 2
