"""What penalties share: a strength with a schedule, and hooks that let an optimizer's step apply it
once."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, ClassVar
from weakref import WeakKeyDictionary

from torch import Tensor, nn, no_grad, zeros
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from .check import check_choice
from .errors import ModelError, OptionError

Schedule = Callable[[int], float]


class Penalty:
    """A penalty on parameters of a model: its strength, how many updates it has seen, three ways to
    apply it, and `attach`, which does it by itself.

    A kind of penalty says three things, of parameters by their names: its sum (`_sum`), how it adds
    to gradients (`_pull`), and its proximal step (`_shrink`).
    """

    what: ClassVar[str] = "parameters"

    def __init__(
        self, model: nn.Module, s: float, names: Sequence[str], schedule: Schedule | None = None
    ):
        check_number("s", s)
        _check_schedule(schedule)
        self.model, self.schedule, self.count = model, schedule, 0
        self._s, self._names = float(s), list(names)

    def _sum(self, trained: bool) -> Tensor | None:
        """The penalty without `s`, a scalar with a gradient; None where nothing is penalised. Of
        parameters that are `trained` alone, or of all."""
        raise NotImplementedError

    def _pull(self, by: Mapping[str, float]) -> None:
        """Add the gradient, times a strength for each parameter, to gradients that are there."""
        raise NotImplementedError

    def _shrink(self, by: Mapping[str, float]) -> None:
        """Make the proximal step, of a length for each parameter."""
        raise NotImplementedError

    # -- what it acts on -------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the penalised parameters, as in ``model.named_parameters()``."""
        return list(self._names)

    @property
    def value(self) -> float:
        """The penalty's sum over all that is penalised, without `s`."""
        with no_grad():
            found = self._sum(trained=False)
        return 0.0 if found is None else float(found)

    def _trained(self) -> list[tuple[str, nn.Parameter]]:
        return [(name, param) for name, param in self._named() if param.requires_grad]

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name in self._names:
            try:
                yield name, self.model.get_parameter(name)
            except AttributeError:
                raise ModelError(
                    f"the model has no parameter `{name}` any more",
                    hint=f"make a new {type(self).__name__} after changing the model",
                ) from None

    # -- strength --------------------------------------------------------------------------------

    @property
    def s(self) -> float:
        """The strength of the coming update: `s` as given, times the schedule's factor."""
        if self.schedule is None:
            return self._s
        factor = self.schedule(self.count)
        check_number(f"the schedule's factor after {self.count} updates", factor)
        return self._s * float(factor)

    def step(self) -> None:
        """Count an update; only where `loss` is used, as the other ways count by themselves."""
        self.count += 1

    def state_dict(self) -> dict[str, Any]:
        """What resuming needs: the count of updates and `s` without the schedule's factor."""
        return {"count": self.count, "s": self._s}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on where `state_dict` was taken; the schedule itself is not in it."""
        if not isinstance(state, Mapping) or not {"count", "s"} <= set(state):
            raise OptionError(
                f"this is no state of a {type(self).__name__}", hint="it holds `count` and `s`"
            )
        check_steps("count", state["count"], least=0)
        check_number("s", state["s"])
        self.count, self._s = state["count"], float(state["s"])

    # -- three ways ------------------------------------------------------------------------------

    def add_grad(self, scale: float = 1.0) -> None:
        """Add the penalty's gradient to the gradients. Counts an update.

        Call it just before the optimizer's step. Under AMP call ``scaler.unscale_(optimizer)``
        first; only where that cannot be, give ``scale=scaler.get_scale()``.
        """
        self._check_detached("add_grad")
        strength = self.s * float(scale)
        self._pull({name: strength for name, _ in self._trained()})
        self.step()

    def loss(self) -> Tensor:
        """`s` times the sum, a scalar with a gradient: that of `add_grad`. Counts nothing."""
        self._check_detached("loss")
        found = self._sum(trained=True)
        return zeros(()) if found is None else self.s * found

    def prox(self, lr: float | Tensor) -> None:
        """Make the proximal step, with exact zeros where the penalty has them. Counts an update.

        Call it just after the optimizer's step, with the learning rate of that step.
        """
        self._check_detached("prox")
        lr = float(lr) if isinstance(lr, Tensor) else lr
        check_number("lr", lr)
        by = lr * self.s
        self._shrink({name: by for name, _ in self._trained()})
        self.step()

    def _check_detached(self, call: str) -> None:
        if any(handle.penalty is self for _, handle in _handles()):
            raise OptionError(
                f"{call} would penalise twice: the penalty is attached to an optimizer",
                hint="leave the call out, or remove() the handle that attach gave; "
                "to look at it, read `value` and `s`",
            )

    # -- by itself -------------------------------------------------------------------------------

    def attach(self, optimizer: Optimizer, how: str | None = None) -> Attached:
        """Let every step of `optimizer` apply the penalty, once, until the handle is removed.

        `how`: "grad" adds the gradient just before the step, whatever was done to gradients until
        then; "prox" shrinks just after it, by the learning rate of each parameter's group.
        None takes "prox" where steps are not proportional to gradients (Adam and its kin, Lion,
        Rprop: the optimizer has ``eps``, ``betas`` or ``etas``), and "grad" otherwise. A step that
        a GradScaler skips changes and counts nothing.

        Raises `OptionError` if the optimizer lacks a trained parameter, or is hooked already.
        """
        _check_optimizer(optimizer)
        check_choice("how", how, (None, "grad", "prox"))
        self._check_held(optimizer)
        self._check_free(optimizer)
        return Attached(self, optimizer, how or ("prox" if _rescales(optimizer) else "grad"))

    def _check_held(self, optimizer: Optimizer) -> None:
        """Raise `OptionError` unless the optimizer trains all parameters that are not frozen."""
        held = _groups_of(optimizer)
        live = [(name, param) for name, param in self._named() if param.requires_grad]
        if not live:
            raise OptionError(
                f"all {len(self.names)} {self.what} are frozen (requires_grad is False)",
                details=rows("frozen", self.names),
                hint="thaw them before attaching the penalty",
            )
        missing = [name for name, param in live if id(param) not in held]
        if missing:
            raise OptionError(
                f"the optimizer does not hold {len(missing)} of the {len(live)} {self.what}",
                details=rows("missing", missing),
                hint="give it all parameters of this model, or leave layers out with `ignore`",
            )

    def _check_free(self, optimizer: Optimizer) -> None:
        """Raise `OptionError` if a step would penalise a parameter twice."""
        mine = {id(param) for _, param in self._named()}
        for other, handle in _handles():
            if handle.penalty is self:
                raise OptionError(
                    "the penalty is attached already",
                    hint="remove() the first handle before attaching again",
                )
            both = [name for name, param in handle.penalty._named() if id(param) in mine]
            if other is optimizer and both:
                raise OptionError(
                    f"another penalty on the same {self.what} is attached to this optimizer",
                    details=rows("shared", both),
                    hint="remove() its handle first, or part the layers with `only` and `ignore`",
                )


class Attached:
    """A penalty hooked to an optimizer, until `remove` or the end of a ``with`` block."""

    def __init__(self, penalty: Penalty, optimizer: Optimizer, how: str):
        self.penalty, self.how = penalty, how
        if how == "grad":
            self._hook = optimizer.register_step_pre_hook(self._before)
        else:
            self._hook = optimizer.register_step_post_hook(self._after)
        _ATTACHED.setdefault(optimizer, []).append(self)

    def remove(self) -> None:
        """Turn the penalty off, for fine-tuning; a second call does nothing."""
        self._hook.remove()
        for handles in list(_ATTACHED.values()):
            if self in handles:
                handles.remove(self)

    def __enter__(self) -> Attached:
        return self

    def __exit__(self, *error: object) -> None:
        self.remove()

    def _before(self, optimizer: Optimizer, args: Any, kwargs: Any) -> tuple[Any, Any] | None:
        """Add the gradient; where a closure is to compute gradients yet, at the closure's end."""
        positional = len(args) > 1  # the first is the optimizer
        closure = args[1] if positional else kwargs.get("closure")
        if closure is None:
            self._add(optimizer)
            return None

        def closed() -> Any:
            loss = closure()
            self._add(optimizer)
            return loss

        if positional:
            return (args[0], closed, *args[2:]), kwargs
        return args, {**kwargs, "closure": closed}

    def _add(self, optimizer: Optimizer) -> None:
        if _overflowed(optimizer):
            return
        strength = self.penalty.s * _grad_scale(optimizer)
        stepped = self._stepped(optimizer)
        self.penalty._pull({n: -strength if g.get("maximize") else strength for n, g in stepped})
        self.penalty.step()

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _overflowed(optimizer):
            return
        strength = self.penalty.s
        self.penalty._shrink({n: float(g["lr"]) * strength for n, g in self._stepped(optimizer)})
        self.penalty.step()

    def _stepped(self, optimizer: Optimizer) -> Iterator[tuple[str, dict[str, Any]]]:
        """Names of the parameters that this step moves, with their parameter groups."""
        held = _groups_of(optimizer)
        for name, param in self.penalty._trained():
            if param.grad is not None and id(param) in held:
                yield name, held[id(param)]


_ATTACHED: WeakKeyDictionary[Optimizer, list[Attached]] = WeakKeyDictionary()


def _handles() -> list[tuple[Optimizer, Attached]]:
    return [(optimizer, handle) for optimizer, own in _ATTACHED.items() for handle in own]


def attached(optimizer: Optimizer) -> list[Penalty]:
    """The penalties that are attached to an optimizer, in the order in which they were."""
    return [handle.penalty for handle in _ATTACHED.get(optimizer, ())]


def _groups_of(optimizer: Optimizer) -> dict[int, dict[str, Any]]:
    return {id(param): group for group in optimizer.param_groups for param in group["params"]}


# A GradScaler leaves the gradients of fused optimizers scaled: for the time of the step it sets
# `grad_scale`, by which their kernels divide, and `found_inf`, at which these do nothing.


def _grad_scale(optimizer: Optimizer) -> float:
    scale = getattr(optimizer, "grad_scale", None)
    return 1.0 if scale is None else float(scale)


def _overflowed(optimizer: Optimizer) -> bool:
    found = getattr(optimizer, "found_inf", None)
    return found is not None and bool(found)


# -- checks and helpers ---------------------------------------------------------------------------


def unwrapped(model: Any) -> Any:
    while isinstance(model, (DataParallel, DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module  # torch.compile's, or a wrapper's
    return model


def rows(label: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """At most three names, a row each, and how many more there are."""
    shown = [(label if i == 0 else "", name) for i, name in enumerate(names[:3])]
    return shown + ([("", f"and {len(names) - 3} more")] if len(names) > 3 else [])


def check_number(name: str, value: Any) -> None:
    """Raise `OptionError` unless `value` is a finite number of at least 0."""
    if isinstance(value, bool) or not isinstance(value, numbers.Real):
        raise OptionError(f"{name} is a {type(value).__name__}", hint="a number, as in 1e-4")
    if not math.isfinite(value) or value < 0:
        raise OptionError(f"{name}={value} is not a finite number of at least 0")


def _check_schedule(schedule: Any) -> None:
    if schedule is not None and not callable(schedule):
        kind = type(schedule).__name__
        raise OptionError(f"schedule is a {kind}", hint="a function: updates done -> factor")


def _check_optimizer(optimizer: Any) -> None:
    if not isinstance(optimizer, Optimizer):
        raise OptionError(
            f"a torch.optim.Optimizer is needed, not {type(optimizer).__name__}",
            hint="call add_grad or prox yourself around the step of any other",
        )
    if isinstance(optimizer, LBFGS):
        raise OptionError(
            "LBFGS calls its closure several times a step, and searches along the loss",
            hint="add penalty.loss() to the loss inside the closure instead",
        )


def check_steps(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name}={value!r} must be a whole number of at least {least}")


def _rescales(optimizer: Optimizer) -> bool:
    """Whether steps are not proportional to gradients: by a second moment or by sign alone."""
    return any(key in optimizer.defaults for key in ("eps", "betas", "etas"))
