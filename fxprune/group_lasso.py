"""Sparse training of whole channels: a group lasso on all slices that go together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from .analysis import Analysis, analyze
from .coupled import Coupled, coupled, params_of
from .errors import OptionError
from .ignore import Ignore, ignored, selected
from .penalties import Penalty, Schedule, check_number, rows, unwrapped


class GroupLasso(Penalty):
    """``s * sum sqrt(size) * norm`` over the channels that may go: the L2 norm of *all* slices that
    go with a channel (filters, biases, scales, and the slices that read it), and their number.

    Whole channels fall to zero together, in every layer that they are coupled through, so that
    pruning them changes little. Use it as `fxprune.SparsityPenalty`: `attach` it to the optimizer,
    or call one of `add_grad`, `loss` and `prox` once an update. `prox` scales a channel by
    ``max(0, 1 - lr * s * sqrt(size) / norm)``. A weight lies in a channel of its output and in
    one of its input: both count it, and `prox` shrinks it for one after the other, so that where
    channels overlap it is not the prox of the sum. Frozen parameters are left alone and are no part
    of the norm.

    `only` and `ignore` choose groups as in `fxprune.prune`, and `model` may be an
    `fxprune.Analysis`. `schedule`: a function of the updates done that gives a factor on `s`.

    Raises `OptionError` where no channel may go or an option cannot be used; what `fxprune.analyze`
    raises; and `ModelError` when a parameter has left the model since.

    Wen et al., Learning Structured Sparsity in Deep Neural Networks, NeurIPS 2016; over coupled
    slices as in Fang et al., DepGraph: Towards Any Structural Pruning, CVPR 2023.
    """

    def __init__(
        self,
        model: nn.Module | Analysis,
        s: float = 1e-4,
        *,
        example_inputs: Any = None,
        schedule: Schedule | None = None,
        only: Sequence[Any] = (),
        ignore: Ignore = (),
    ):
        check_number("s", s)
        found = model if isinstance(model, Analysis) else analyze(unwrapped(model), example_inputs)
        self._groups = _in_scope(found, only, ignore)
        if not self._groups:
            raise _nothing(found)
        super().__init__(found.model, s, params_of(self._groups), schedule)

    def __len__(self) -> int:
        """How many channels are penalised."""
        return sum(len(each.group) for each in self._groups)

    def __repr__(self) -> str:
        return (
            f"GroupLasso(s={self.s:g}: {len(self):,} channels in {len(self._groups)} groups, "
            f"{self.count} update{'' if self.count == 1 else 's'})"
        )

    def norms(self) -> dict[str, Tensor]:
        """Name of each group -> (channels,) norms, as they are: what is near zero can go."""
        tensors = {name: param.detach() for name, param in self._named()}
        found = {each.group.name: each.norms(tensors) for each in self._groups}
        return {name: norms for name, norms in found.items() if norms is not None}

    def _sum(self, trained: bool) -> Tensor | None:
        tensors = dict(self._trained() if trained else self._named())
        found = [(each, each.norms(tensors)) for each in self._groups]
        terms = [(_roots(each, norms) * norms).sum() for each, norms in found if norms is not None]
        return torch.stack([term.to(terms[0].device) for term in terms]).sum() if terms else None

    @torch.no_grad()
    def _pull(self, by: Mapping[str, float]) -> None:
        tensors = dict(self._trained())
        for each in self._groups:
            norms = each.norms(tensors)
            if norms is None:
                continue
            pull = torch.where(norms > 0, _roots(each, norms) / norms, 0.0)
            for part in each.parts:
                param = tensors.get(part.param)
                if param is not None and param.grad is not None and part.param in by:
                    each_row = part.rows(param) * part.spread(pull, param, 0.0)
                    part.rows(param.grad).add_(each_row, alpha=by[part.param])

    @torch.no_grad()
    def _shrink(self, by: Mapping[str, float]) -> None:
        tensors = dict(self._trained())
        for each in self._groups:
            norms = each.norms(tensors)
            if norms is None:
                continue
            ratio = torch.where(norms > 0, _roots(each, norms) / norms, 0.0)
            for part in each.parts:
                if part.param in by and part.param in tensors:
                    param = tensors[part.param]
                    left = (1 - by[part.param] * ratio).clamp(min=0)
                    part.rows(param).mul_(part.spread(left, param, 1.0))


def _roots(each: Coupled, norms: Tensor) -> Tensor:
    return each.sizes.sqrt().to(norms)


def _in_scope(analysis: Analysis, only: Sequence[Any], ignore: Ignore) -> list[Coupled]:
    chosen, left_alone = selected(analysis, only), ignored(analysis, ignore)
    found = [
        coupled(group, analysis.tensors)
        for i, group in enumerate(analysis.groups)
        if i in chosen and i not in left_alone and group.prunable
    ]
    return [each for each in found if each.parts]


def _nothing(analysis: Analysis) -> OptionError:
    if any(group.prunable for group in analysis.groups):
        return OptionError(
            "`only` and `ignore` leave no channel to penalise",
            hint="widen them: channels belong to the layer that makes them",
        )
    return OptionError(
        "no channel of the model may go",
        details=rows("stays", sorted({frozen.reason for frozen in analysis.frozen})),
        hint="analysis.causes() says which option would free them",
    )
