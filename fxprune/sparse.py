"""Sparse training: L1 on the scales of normalisation layers, so that channels fall to zero."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .analysis import Analysis, analyze
from .errors import OptionError
from .groups import Group, Member
from .ignore import Ignore, ignored, selected
from .penalties import Attached as Attached
from .penalties import Penalty, Schedule, check_number, check_steps, rows, unwrapped


class SparsityPenalty(Penalty):
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

    `add_grad`  adds ``s * sign(gamma)``, 0 where gamma is 0; just before the optimizer's step,
                after all backwards, ``scaler.unscale_`` and clipping. Under DDP every rank does
                the same.
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

    what = "scales"

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
        check_number("s", s)
        found = model if isinstance(model, Analysis) else analyze(unwrapped(model), example_inputs)
        masks = _masks(found, _in_scope(found, all_bn, only, ignore))
        if not masks:
            raise _nothing(found, all_bn)
        super().__init__(found.model, s, list(masks), schedule)
        self._size = sum(int(mask.sum()) for mask in masks.values())
        self._masks = {name: None if mask.all() else mask for name, mask in masks.items()}

    # -- what it acts on -------------------------------------------------------------------------

    def __len__(self) -> int:
        """How many gammas are penalised: one a channel for each BatchNorm it passes."""
        return self._size

    def __repr__(self) -> str:
        return (
            f"SparsityPenalty(s={self.s:g}: {len(self):,} gammas in {len(self.names)} scales, "
            f"{self.count} update{'' if self.count == 1 else 's'})"
        )

    def _of(self, names: Iterable[str]) -> Iterator[tuple[str, nn.Parameter, Tensor | None]]:
        """Each scale with its mask: looked up afresh, as a model may get new parameters."""
        wanted = set(names)
        for name, gamma in self._named():
            if name in wanted:
                yield name, gamma, self._mask(name, gamma)

    def _sum(self, trained: bool) -> Tensor | None:
        names = [name for name, _ in self._trained()] if trained else self._names
        terms = [_l1(gamma, mask) for _, gamma, mask in self._of(names)]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None

    def _pull(self, by: Mapping[str, float]) -> None:
        for name, gamma, mask in self._of(by):
            _add_grad(gamma, mask, by[name])

    def _shrink(self, by: Mapping[str, float]) -> None:
        for name, gamma, mask in self._of(by):
            _shrink(gamma, mask, by[name])

    def _mask(self, name: str, gamma: Tensor) -> Tensor | None:
        mask = self._masks[name]
        if mask is not None and mask.device != gamma.device:
            mask = self._masks[name] = mask.to(gamma.device)
        return mask


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
        details=rows("stays", sorted({frozen.reason for frozen in analysis.frozen})),
        hint="all_bn=True penalises the scales of channels that stay too",
    )


# -- schedules -------------------------------------------------------------------------------------


def warmup(steps: int) -> Schedule:
    """Linear from 0 to 1 over so many updates, then 1."""
    check_steps("steps", steps, least=0)
    return lambda count: count / steps if count < steps else 1.0


def cosine(steps: int) -> Schedule:
    """Along half a cosine from 1 to 0 over so many updates, then 0."""
    check_steps("steps", steps, least=1)
    return lambda count: (1 + math.cos(math.pi * min(count / steps, 1.0))) / 2
