"""Losses: the usual one of a task, and how far outputs are from a teacher's."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from .errors import FxpruneError, InputError, OptionError, first_line
from .trees import leaves

Loss = Callable[[Any, Any], Tensor]
_LEFT_OUT = -100  # by which cross entropy marks items that do not count


def task_loss(outputs: Any, targets: Any) -> Tensor:
    """Cross entropy where targets are class numbers, the mean squared error where they are floats
    of the outputs' shape; `OptionError` for others."""
    if isinstance(outputs, Tensor) and isinstance(targets, Tensor):
        if are_classes(outputs, targets):
            return F.cross_entropy(outputs, classes(outputs, targets))
        if outputs.shape == targets.shape and targets.is_floating_point():
            return F.mse_loss(outputs, targets)
    raise OptionError(
        f"there is no usual loss for outputs of {said(outputs)} and targets of {said(targets)}",
        hint="give loss=, a function of outputs and targets",
    )


def lost(loss: Loss, outputs: Any, targets: Any) -> Any:
    """What a user's loss gives; `OptionError` where it fails."""
    try:
        return loss(outputs, targets)
    except (FxpruneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise OptionError(
            f"loss fails on outputs of {said(outputs)} and targets of {said(targets)}: "
            f"{first_line(error)}",
            hint="it is called with the network's outputs and a batch's targets, as data give them",
        ) from error


def are_classes(outputs: Any, targets: Any) -> bool:
    """Whether these are scores of classes along the second dim (the only one, of a single item),
    and the numbers of the right ones."""
    if not isinstance(outputs, Tensor) or not isinstance(targets, Tensor) or not outputs.ndim:
        return False
    whole = not targets.is_floating_point() and not targets.is_complex()
    shape = outputs.shape[:1] + outputs.shape[2:] if outputs.ndim > 1 else ()
    return whole and tuple(targets.shape) == tuple(shape)


def classes(outputs: Tensor, targets: Tensor) -> Tensor:
    """Class numbers of any integer dtype, as cross entropy takes them; `InputError` for a number
    that is no class of the outputs': on a GPU it would end the process's use of it."""
    numbers, count = targets.long(), outputs.shape[min(1, outputs.ndim - 1)]
    wrong = numbers[((numbers < 0) | (numbers >= count)) & (numbers != _LEFT_OUT)]
    if wrong.numel():
        raise InputError(
            f"targets hold the class number {int(wrong[0])}, and outputs {said(outputs)}",
            hint=f"class numbers go from 0 to {count - 1}; {_LEFT_OUT} leaves an item out",
        )
    return numbers


def distance(outputs: Any, wanted: Any, targets: Any, temperature: float) -> Tensor:
    """How far outputs are from a teacher's. For (N, classes) logits and class numbers as targets
    the divergence of the softened distributions, times temperature**2 so that its gradients keep
    their size (Hinton et al., Distilling the Knowledge in a Neural Network, 2015); for all others
    the mean squared error, summed over tensors of floats."""
    if _are_logits(outputs, wanted, targets):
        soft, target = (F.log_softmax(each / temperature, 1) for each in (outputs, wanted))
        divergence = F.kl_div(soft, target, reduction="batchmean", log_target=True)
        return divergence * temperature**2
    ours, theirs = _floats(outputs), _floats(wanted)
    if not ours or [each.shape for each in ours] != [each.shape for each in theirs]:
        raise OptionError(
            f"the teacher gives {said(wanted)}, and the model {said(outputs)}",
            hint="the teacher is to be a network with the same outputs, as the dense one",
        )
    terms = [F.mse_loss(own, other) for own, other in zip(ours, theirs, strict=True)]
    return torch.stack(terms).sum()


def _are_logits(outputs: Any, wanted: Any, targets: Any) -> bool:
    if not all(isinstance(each, Tensor) for each in (outputs, wanted, targets)):
        return False
    numbers = not targets.is_floating_point()
    return bool(outputs.ndim == 2 and outputs.shape == wanted.shape and numbers)


def _floats(value: Any) -> list[Tensor]:
    return [each for each in leaves(value, Tensor) if each.is_floating_point()]


def said(value: Any) -> str:
    """What an error calls a value."""
    if value is None:
        return "None"
    if isinstance(value, Tensor):
        return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"
    return type(value).__name__
