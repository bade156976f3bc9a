"""Sparse training: L1 on the scales of normalisation layers, so that channels fall to zero."""

from __future__ import annotations

import math
import numbers
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.nn.parallel import DataParallel, DistributedDataParallel
from torch.optim import LBFGS, Optimizer

from .analysis import Analysis, analyze
from .check import check_choice
from .errors import ModelError, OptionError
from .groups import Group, Member
from .ignore import Ignore, ignored, selected

Schedule = Callable[[int], float]
Gammas = list[tuple[nn.Parameter, Tensor | None]]


class SparsityPenalty:
    """``s * sum |gamma|`` over the scales (gamma) of normalisation layers (Liu et al. 2017).

    Penalised are the scales of channels that may go, and of those alone: a scale that also serves
    channels which stay is penalised in part. `all_bn` takes every scale that the rules know, as
    Network Slimming does; a normalisation of the network's input has no channels they know. `only`
    and `ignore` choose groups as in `fxprune.prune`. `model` may be wrapped in
    DistributedDataParallel or be a ready `fxprune.Analysis`. `s` is the strength, and `schedule` a
    function of the number of updates done so far that gives a factor on it: `warmup` and `cosine`
    of ``fxprune.sparse``, or your own.

    The whole recipe; what is ``[in brackets]`` may be there or not::

        penalty = fxprune.SparsityPenalty(model, s=1e-4, example_inputs=x)
        handle = penalty.attach(optimizer)       # [model = DistributedDataParallel(model)]
        for x, y in batches:                     # [accumulate over several batches]
            scaler.scale(loss(model(x), y)).backward()            # [scaler: torch.amp.GradScaler]
            scaler.unscale_(optimizer)                            # [needed for clipping alone]
            nn.utils.clip_grad_norm_(model.parameters(), 1.0)     # [does not clip the penalty]
            scaler.step(optimizer)               # the penalty acts here, once, on every rank alike
            scaler.update()
            optimizer.zero_grad()
        handle.remove()                          # before fine-tuning

    Without `attach`, call one of three yourself, once an update and never two of them:

    `add_grad`  just before the optimizer's step: after all backwards, ``scaler.unscale_`` and
                clipping. Under DDP every rank does the same.
    `loss`      added to the loss; an accumulated loss gets it once, and clipping sees it.
    `prox`      just after the step, if it was not skipped: the one that gives exact zeros, and the
                right one for Adam and its kin, which would rescale an added gradient to the size of
                any other.

    Weight decay acts on gamma too, and shrinks it in proportion where L1 shrinks it by a constant;
    Network Slimming's authors leave it on. To have L1 alone, put the scales (``penalty.names``)
    into a parameter group with ``weight_decay=0``.

    Gradients of None and frozen parameters are left alone. Raises `OptionError` where there is
    nothing to penalise or an option cannot be used; what `fxprune.analyze` raises; and `ModelError`
    when a scale has left the model since.

    Liu et al., Learning Efficient Convolutional Networks through Network Slimming, ICCV 2017.
    """

    def __init__(
        self,
        model: nn.Module | Analysis,
        s: float = 1e-4,
        *,
        all_bn: bool = False,
        only: Sequence[Any] = (),
        ignore: Ignore = (),
        example_inputs: Any = None,
        schedule: Schedule | None = None,
    ):
        _check_number("s", s)
        _check_schedule(schedule)
        found = model if isinstance(model, Analysis) else analyze(_unwrapped(model), example_inputs)
        self.model = found.model
        self.schedule = schedule
        self.count = 0
        self._s = float(s)
        masks = _masks(found, _in_scope(found, all_bn, only, ignore))
        if not masks:
            raise _nothing(found, all_bn)
        self._size = sum(int(mask.sum()) for mask in masks.values())
        self._masks = {name: None if mask.all() else mask for name, mask in masks.items()}

    # -- what it acts on -------------------------------------------------------------------------

    @property
    def names(self) -> list[str]:
        """Names of the penalised parameters, as in ``model.named_parameters()``."""
        return list(self._masks)

    def __len__(self) -> int:
        """How many gammas are penalised: one a channel for each BatchNorm it passes."""
        return self._size

    def __repr__(self) -> str:
        return (
            f"SparsityPenalty(s={self.s:g}: {len(self):,} gammas in {len(self.names)} scales, "
            f"{self.count} update{'' if self.count == 1 else 's'})"
        )

    @property
    def value(self) -> float:
        """sum |gamma| over what is penalised, without `s`."""
        return sum(float(_l1(gamma.detach(), mask)) for gamma, mask in self._gammas())

    def _gammas(self) -> Gammas:
        """Each scale with its mask: looked up afresh, as a model may get new parameters."""
        return [(gamma, self._mask(name, gamma)) for name, gamma in self._named()]

    def _live(self) -> Gammas:
        return [(gamma, mask) for gamma, mask in self._gammas() if gamma.requires_grad]

    def _named(self) -> Iterator[tuple[str, nn.Parameter]]:
        for name in self._masks:
            try:
                yield name, self.model.get_parameter(name)
            except AttributeError:
                raise ModelError(
                    f"the model has no parameter `{name}` any more",
                    hint="make a new SparsityPenalty after changing the model",
                ) from None

    def _mask(self, name: str, gamma: Tensor) -> Tensor | None:
        mask = self._masks[name]
        if mask is not None and mask.device != gamma.device:
            mask = self._masks[name] = mask.to(gamma.device)
        return mask

    # -- strength --------------------------------------------------------------------------------

    @property
    def s(self) -> float:
        """The strength of the coming update: `s` as given, times the schedule's factor."""
        if self.schedule is None:
            return self._s
        factor = self.schedule(self.count)
        _check_number(f"the schedule's factor after {self.count} updates", factor)
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
                "this is no state of a SparsityPenalty", hint="it holds `count` and `s`"
            )
        _check_steps("count", state["count"], least=0)
        _check_number("s", state["s"])
        self.count, self._s = state["count"], float(state["s"])

    # -- three ways ------------------------------------------------------------------------------

    def add_grad(self, scale: float = 1.0) -> None:
        """Add ``s * sign(gamma)`` to the gradients, 0 where gamma is 0. Counts an update.

        Call it just before the optimizer's step. Under AMP call ``scaler.unscale_(optimizer)``
        first; only where that cannot be, give ``scale=scaler.get_scale()``.
        """
        self._check_detached("add_grad")
        strength = self.s * float(scale)
        for gamma, mask in self._live():
            _add_grad(gamma, mask, strength)
        self.step()

    def loss(self) -> Tensor:
        """``s * sum |gamma|``, a scalar with a gradient: that of `add_grad`. Counts nothing."""
        self._check_detached("loss")
        terms = [_l1(gamma, mask) for gamma, mask in self._live()]
        if not terms:
            return torch.zeros(())
        return self.s * torch.stack([term.to(terms[0].device) for term in terms]).sum()

    def prox(self, lr: float | Tensor) -> None:
        """``gamma <- sign(gamma) * max(|gamma| - lr * s, 0)``, with exact zeros. Counts an update.

        Call it just after the optimizer's step, with the learning rate of that step.
        """
        self._check_detached("prox")
        lr = float(lr) if isinstance(lr, Tensor) else lr
        _check_number("lr", lr)
        by = lr * self.s
        for gamma, mask in self._live():
            _shrink(gamma, mask, by)
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
        then; "prox" shrinks just after it, by the learning rate of each scale's parameter group.
        None takes "prox" where steps are not proportional to gradients (Adam and its kin, Lion,
        Rprop: the optimizer has ``eps``, ``betas`` or ``etas``), and "grad" otherwise. A step that
        a GradScaler skips changes and counts nothing.

        Raises `OptionError` if the optimizer lacks a scale that is trained, or is hooked already.
        """
        _check_optimizer(optimizer)
        check_choice("how", how, (None, "grad", "prox"))
        self._check_held(optimizer)
        self._check_free(optimizer)
        return Attached(self, optimizer, how or ("prox" if _rescales(optimizer) else "grad"))

    def _check_held(self, optimizer: Optimizer) -> None:
        """Raise `OptionError` unless the optimizer trains all scales that are not frozen."""
        held = _groups_of(optimizer)
        live = [(name, gamma) for name, gamma in self._named() if gamma.requires_grad]
        if not live:
            raise OptionError(
                f"all {len(self.names)} scales are frozen (requires_grad is False)",
                details=_rows("frozen", self.names),
                hint="thaw them before attaching the penalty",
            )
        missing = [name for name, gamma in live if id(gamma) not in held]
        if missing:
            raise OptionError(
                f"the optimizer does not hold {len(missing)} of the {len(live)} scales",
                details=_rows("missing", missing),
                hint="give it all parameters of this model, or leave layers out with `ignore`",
            )

    def _check_free(self, optimizer: Optimizer) -> None:
        """Raise `OptionError` if a step would penalise a scale twice."""
        mine = {id(gamma) for _, gamma in self._named()}
        for other, handle in _handles():
            if handle.penalty is self:
                raise OptionError(
                    "the penalty is attached already",
                    hint="remove() the first handle before attaching again",
                )
            both = [name for name, gamma in handle.penalty._named() if id(gamma) in mine]
            if other is optimizer and both:
                raise OptionError(
                    "another penalty on the same scales is attached to this optimizer",
                    details=_rows("shared", both),
                    hint="remove() its handle first, or part the layers with `only` and `ignore`",
                )


class Attached:
    """A penalty hooked to an optimizer, until `remove` or the end of a ``with`` block."""

    def __init__(self, penalty: SparsityPenalty, optimizer: Optimizer, how: str):
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
        for gamma, mask, group in self._stepped(optimizer):
            _add_grad(gamma, mask, -strength if group.get("maximize") else strength)
        self.penalty.step()

    def _after(self, optimizer: Optimizer, args: Any, kwargs: Any) -> None:
        if _overflowed(optimizer):
            return
        strength = self.penalty.s
        for gamma, mask, group in self._stepped(optimizer):
            _shrink(gamma, mask, float(group["lr"]) * strength)
        self.penalty.step()

    def _stepped(self, optimizer: Optimizer) -> Iterator[tuple[nn.Parameter, Tensor | None, dict]]:
        """The scales that this step moves, with their parameter groups."""
        held = _groups_of(optimizer)
        for gamma, mask in self.penalty._live():
            if gamma.grad is not None and id(gamma) in held:
                yield gamma, mask, held[id(gamma)]


_ATTACHED: WeakKeyDictionary[Optimizer, list[Attached]] = WeakKeyDictionary()


def _handles() -> list[tuple[Optimizer, Attached]]:
    return [(optimizer, handle) for optimizer, own in _ATTACHED.items() for handle in own]


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


# -- one scale -------------------------------------------------------------------------------------


def _l1(gamma: Tensor, mask: Tensor | None) -> Tensor:
    wide = gamma if gamma.dtype in (torch.float32, torch.float64) else gamma.float()
    return wide.abs().sum() if mask is None else (wide.abs() * mask).sum()


@torch.no_grad()
def _add_grad(gamma: nn.Parameter, mask: Tensor | None, strength: float) -> None:
    if gamma.grad is None:
        return
    sign = gamma.sign()
    gamma.grad.add_(sign if mask is None else sign * mask, alpha=strength)


@torch.no_grad()
def _shrink(gamma: nn.Parameter, mask: Tensor | None, by: float) -> None:
    part = gamma.clamp(-by, by)  # the whole of a gamma that is no larger: what is left is 0
    gamma.sub_(part if mask is None else part * mask)


# -- which scales ----------------------------------------------------------------------------------


def _unwrapped(model: Any) -> Any:
    while isinstance(model, (DataParallel, DistributedDataParallel)) or hasattr(model, "_orig_mod"):
        model = getattr(model, "_orig_mod", None) or model.module  # torch.compile's, or a wrapper's
    return model


def _in_scope(analysis: Analysis, all_bn: bool, only: Sequence[Any], ignore: Ignore) -> list[Group]:
    chosen, left_alone = selected(analysis, only), ignored(analysis, ignore)
    return [
        group
        for i, group in enumerate(analysis.groups)
        if i in chosen and i not in left_alone and (all_bn or group.prunable)
    ]


def _masks(analysis: Analysis, groups: Sequence[Group]) -> dict[str, Tensor]:
    """Name of each scale of `groups` -> which of its elements they own, in the scale's shape."""
    found: dict[str, Tensor] = {}
    for group in groups:
        for member in group.members:
            scale = analysis.tensors.get(member.param)
            if member.role == "scale" and isinstance(scale, nn.Parameter):
                mask = found.setdefault(member.param, torch.zeros(scale.shape, dtype=torch.bool))
                _mark(mask, member)
    return {name: found[name] for name in analysis.tensors if name in found}


def _mark(mask: Tensor, member: Member) -> None:
    size = mask.shape[member.dim]
    rows = mask.view(member.blocks, -1, *mask.shape[1:]).movedim(member.dim + 1, 1)
    at = torch.from_numpy(member.positions.reshape(-1))
    rows[at // size, at % size] = True


def _nothing(analysis: Analysis, all_bn: bool) -> OptionError:
    if not _masks(analysis, analysis.groups):
        return OptionError(
            "no normalisation layer of the model has a scale (gamma) to penalise",
            hint="choose a criterion that needs none: fxprune.criteria.names()",
        )
    if all_bn or _masks(analysis, analysis.all_groups.prunable):
        return OptionError(
            "`only` and `ignore` leave no scale to penalise",
            hint="widen them: a scale belongs to the layer whose channels it scales",
        )
    return OptionError(
        "no scale belongs to channels that may go",
        details=_rows("stays", sorted({frozen.reason for frozen in analysis.frozen})),
        hint="all_bn=True penalises the scales of channels that stay too",
    )


def _rows(label: str, names: Sequence[str]) -> list[tuple[str, str]]:
    """At most three names, a row each, and how many more there are."""
    shown = [(label if i == 0 else "", name) for i, name in enumerate(names[:3])]
    return shown + ([("", f"and {len(names) - 3} more")] if len(names) > 3 else [])


# -- schedules -------------------------------------------------------------------------------------


def warmup(steps: int) -> Schedule:
    """Linear from 0 to 1 over so many updates, then 1."""
    _check_steps("steps", steps, least=0)
    return lambda count: count / steps if count < steps else 1.0


def cosine(steps: int) -> Schedule:
    """Along half a cosine from 1 to 0 over so many updates, then 0."""
    _check_steps("steps", steps, least=1)
    return lambda count: (1 + math.cos(math.pi * min(count / steps, 1.0))) / 2


def _check_number(name: str, value: Any) -> None:
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


def _check_steps(name: str, value: Any, least: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < least:
        raise OptionError(f"{name}={value!r} must be a whole number of at least {least}")


def _rescales(optimizer: Optimizer) -> bool:
    """Whether steps are not proportional to gradients: by a second moment or by sign alone."""
    return any(key in optimizer.defaults for key in ("eps", "betas", "etas"))
