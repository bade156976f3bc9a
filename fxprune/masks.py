"""From masks to slices: channels that masks have switched off are taken out of the network.

``torch.nn.utils.prune`` leaves weights where they are and multiplies them by masks. A channel goes
where that changes nothing: where what makes it is zero, and zero is all that is read of it, or
where every layer that reads it has zeros for it. A filter of zeros is not enough: its bias, or the
normalisation behind it, may keep its channel alive at a constant.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .analysis import Analysis
from .api import analyze, pruned_by
from .check import check_choice, check_model, clone
from .errors import OptionError, nearest
from .groups import Group, Member
from .ids import Value
from .planning import Made, plan_of
from .pruned import PrunedModule
from .select import Selection
from .settings import Settings
from .watch import silent

Constants = Literal["keep", "drop"]


def from_masks(
    model: nn.Module,
    example_inputs: Any = None,
    *,
    masks: Mapping[str, Tensor] | None = None,
    constants: Constants = "keep",
    verify: bool | Literal["shapes"] = True,
    **how: Any,
) -> PrunedModule:
    """The network without the channels that its masks have switched off, and with the other masks
    applied for good. It computes what the masked network computes.

    Args:
        model: a network with masks of `torch.nn.utils.prune` on it; it is not changed.
        example_inputs: as in `fxprune.prune`.
        masks: masks of your own in place of those, by parameter name, shaped as the parameter: zero
            where it is switched off.
        constants: what becomes of a channel whose filter is zero, and which a bias or a norm keeps
            at a constant: "keep" it, and say so in the report, or "drop" it, as if the bias and the
            norm were masked too. The network then computes something else than the masked one.
        verify: as in `fxprune.prune`.
        how: mixing, scatter, heads, frontend and strict, as in `fxprune.analyze`. By default no
            channel goes over which a norm takes statistics (``mixing="none"``): zeros count there.

    Raises `OptionError` for masks that fit no parameter, and what `fxprune.prune` raises, but
    for `NothingToPrune`: where no channel is switched off, all of them stay.
    """
    check_model(model)
    check_choice("constants", constants, ("keep", "drop"))
    how.setdefault("mixing", "none")  # a norm over channels counts zeros too
    masked = clone(model)
    _apply(masked, masks) if masks is not None else _settle(masked)
    analysis = analyze(masked, example_inputs, **how)
    return pruned_by(analysis, lambda: _made(analysis, constants), verify, silent)


# -- masks -----------------------------------------------------------------------------------------


def _settle(model: nn.Module) -> None:
    """Apply masks of `torch.nn.utils.prune` for good, and take them off."""
    from torch.nn.utils import prune

    for module in model.modules():
        for hook in list(module._forward_pre_hooks.values()):
            if isinstance(hook, prune.BasePruningMethod):
                prune.remove(module, hook._tensor_name)


@torch.no_grad()
def _apply(model: nn.Module, masks: Any) -> None:
    known = dict(model.named_parameters(remove_duplicate=False))
    if not isinstance(masks, Mapping):
        kind = type(masks).__name__
        raise OptionError(f"masks is a {kind}", hint='masks={"conv1.weight": mask}')
    for name, mask in masks.items():
        if name not in known:
            raise OptionError(f"there is no parameter `{name}`", hint=nearest(str(name), known))
        if not isinstance(mask, Tensor) or mask.shape != known[name].shape:
            shape = list(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise OptionError(f"the mask of `{name}` is {shape}, not {list(known[name].shape)}")
        if not bool(((mask == 0) | (mask == 1)).all()):
            raise OptionError(f"the mask of `{name}` holds more than 0 and 1")
        known[name].mul_(mask.to(known[name]))


# -- channels --------------------------------------------------------------------------------------


def _made(analysis: Analysis, constants: Constants) -> Made:
    groups = analysis.all_groups
    kept = np.ones(int(groups.channel.max(initial=0)) + 1, bool)
    alive = _alive_where_read(analysis)
    reasons = {}
    for i, group in enumerate(groups.groups):
        if group.prunable:
            gone, constant = _off(analysis, group, alive, constants)
            kept[group.channels[gone]] = False
            if constant.any():
                reasons[i] = _told(int(constant.sum()))
    _evened(analysis, kept, reasons)
    return plan_of(analysis, Selection(kept, reasons), Settings(criterion="masks"))


def _told(count: int) -> str:
    many = "1 channel of zeros stays" if count == 1 else f"{count} channels of zeros stay"
    return f"{many}: a bias, a norm or an op makes them constants"


def _off(
    analysis: Analysis, group: Group, alive: np.ndarray, constants: Constants
) -> tuple[np.ndarray, np.ndarray]:
    """Which channels of a group are switched off, and which are constants that stay."""
    tensors, size = analysis.tensors, len(group)
    zero = {id(m): _zero(m, tensors[m.param], size) for m in group.members}
    made = [m for m in group.members if m.role == "out" and tensors[m.param].ndim > 1]
    carried = [m for m in group.members if m.role != "in" and not _is_statistic(m, tensors)]
    read = [m for m in group.members if m.role == "in"]
    empty = _all([zero[id(m)] for m in made], size)
    silent_ = _all([zero[id(m)] for m in carried], size) & ~alive[group.channels]
    unread = _all([zero[id(m)] for m in read], size) if read else np.zeros(size, bool)
    gone = unread | (empty if constants == "drop" else empty & silent_)
    return gone, empty & ~gone


def _zero(member: Member, tensor: Tensor, size: int) -> np.ndarray:
    """Which channels of a member hold zeros alone."""
    if member.blocks > 1:
        tall = tensor.reshape(member.blocks, -1, *tensor.shape[1:])
        rows = tall.movedim(member.dim + 1, 1).flatten(2) if member.dim else tall.flatten(2)
        flat = (rows.reshape(member.blocks * rows.shape[1], -1) == 0).all(1)
    else:
        flat = (tensor.movedim(member.dim, 0).reshape(tensor.shape[member.dim], -1) == 0).all(1)
    return flat.cpu().numpy()[member.positions.reshape(size, -1)].all(1)


def _is_statistic(member: Member, tensors: Mapping[str, Tensor]) -> bool:
    """Whether these are running statistics: with a scale of zero they are not seen."""
    return not isinstance(tensors[member.param], nn.Parameter)


def _all(each: list[np.ndarray], size: int) -> np.ndarray:
    return np.logical_and.reduce(each) if each else np.zeros(size, bool)


def _alive_where_read(analysis: Analysis) -> np.ndarray:
    """Channels that some value carries as something else than zero when they are masked."""
    channel = analysis.all_groups.channel
    alive = np.zeros(int(channel.max(initial=0)) + 1, bool)
    for values in analysis.flow.values.values():
        leaves = pytree.tree_leaves(values, is_leaf=lambda v: isinstance(v, Value))
        for layer in (x for v in leaves if isinstance(v, Value) for x in v.layers):
            if not layer.zero:
                alive[np.unique(channel[layer.ids.numpy().reshape(-1)])] = True
    return alive


def _evened(analysis: Analysis, kept: np.ndarray, reasons: dict[int, str]) -> None:
    """Blocks that must keep equal counts keep as many as the fullest; pieces keep one, and so does
    every group."""
    groups = analysis.all_groups
    for piece in [*groups.keep_one, *(g.channels for g in groups.groups if g.prunable)]:
        if not kept[piece].any():
            kept[piece[0]] = True
    for constraint in groups.constraints:
        rows = constraint.rows[(constraint.rows > 0).all(1)]
        most = max((int(kept[row].sum()) for row in rows), default=0)
        for row in rows:
            kept[row[~kept[row]][: most - int(kept[row].sum())]] = True
