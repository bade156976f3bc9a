"""Torch-Pruning's side of benchmarks/accuracy.py: its criteria, used as its own examples use them.

A network is pruned in one step, to a share of its multiply-accumulates. Where all layers take one
ratio, one step of it may be too coarse for that; then some layers take the next one.
"""

from __future__ import annotations

import copy
import fnmatch
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

Loss = Callable[[Tensor, Tensor], Tensor]
Batches = Iterable[tuple[Tensor, Tensor]]
Gradients = Callable[[nn.Module, Any, Batches, Loss], None]
LAYERS = (nn.Linear, nn.modules.conv._ConvNd)
NEAR, FAR = 0.01, 0.02  # off the share: look no further, and give up
SAMPLES = 100  # for a Hessian


@dataclass(frozen=True)
class Way:
    """One way to prune: by what, ranked in each layer or over all, and what is left alone."""

    importance: Callable[[], Any]
    everywhere: bool
    gradients: Gradients | None = None
    kept: tuple[str, ...] = ()


def ways(kept: Sequence[str] = ()) -> dict[str, Way]:
    """All ways, of the whole network and, where layers to keep are named, of the rest alone: those
    are the layers whose channels Torch-Pruning loses count of, so that each way is at its best."""
    parts: dict[str, tuple[str, ...]] = {"whole": ()}
    if kept:
        parts["inner"] = tuple(kept)
    return {
        f"{name}, {scope}, {part}": Way(make, scope == "global", gradients, names)
        for name, (make, gradients) in _criteria().items()
        for scope in ("local", "global")
        for part, names in parts.items()
    }


def _criteria() -> dict[str, tuple[Callable[[], Any], Gradients | None]]:
    from torch_pruning import importance as tp

    return {
        "l2": (tp.GroupMagnitudeImportance, None),  # p=2, and all else as it comes
        "bn_scale": (tp.BNScaleImportance, None),
        "taylor": (tp.GroupTaylorImportance, summed),
        "hessian": (tp.GroupHessianImportance, squared),
        "hessian, mended": (_mended_hessian(), squared),
        "lamp": (tp.LAMPImportance, None),
        "fpgm": (tp.FPGMImportance, None),
    }


# -- pruning ---------------------------------------------------------------------------------------


def prune(
    model: nn.Module, way: Way, example: Tensor, share: float, batches: Batches, loss: Loss
) -> nn.Module:
    """A pruned copy that is as near to this share of the multiply-accumulates as its steps allow.

    Criteria that need gradients take those of `loss` over `batches`, the Hessian of the first 100
    samples, one by one. Raises `ValueError` where the share is missed by more than 0.02.
    """
    importance = way.importance()
    scored = copy.deepcopy(model).eval()
    if way.gradients:
        way.gradients(scored, importance, batches, loss)
    whole = macs(scored, example)

    def left(made: nn.Module) -> float:
        return macs(made, example) / whole

    def at(ratio: float, next_ratio: float = 0.0, layers: int = 0) -> nn.Module:
        return _pruned(scored, way, importance, example, ratio, next_ratio, layers)

    made = min(_tried(at, left, share, scored, way), key=lambda made: abs(left(made) - share))
    if abs(left(made) - share) > FAR:
        raise ValueError(f"comes to {left(made):.3f} of the multiply-accumulates, not {share:g}")
    made.zero_grad()
    return made


def _tried(
    at: Callable[..., nn.Module],
    left: Callable[[nn.Module], float],
    share: float,
    model: nn.Module,
    way: Way,
) -> Iterator[nn.Module]:
    """The last network above the share and the first below it, by bisection on the ratio; where
    both are too far off, those between, by bisection on how many layers take the higher ratio."""
    low, high = _bisected(lambda ratio: left(at(ratio)) > share, 0.0, 1.0, 2e-4)
    above, below = at(low), at(high)
    yield from (above, below)
    near = min(abs(left(made) - share) for made in (above, below))
    if near > NEAR and not way.everywhere:
        count = len(_layers(model, way))
        few, many = _bisected(lambda k: left(at(low, high, round(k))) > share, 0, count, 1)
        yield from (at(low, high, round(k)) for k in (few, many))


def _bisected(
    over: Callable[[float], bool], low: float, high: float, width: float
) -> tuple[float, float]:
    while high - low > width:
        middle = (low + high) / 2
        low, high = (middle, high) if over(middle) else (low, middle)
    return low, high


def _pruned(
    scored: nn.Module,
    way: Way,
    importance: Any,
    example: Tensor,
    ratio: float,
    next_ratio: float,
    layers: int,
) -> nn.Module:
    """A copy, pruned; its last `layers` layers by `next_ratio`."""
    import torch_pruning as tp

    model = with_gradients(scored)
    further = _layers(model, way)[::-1][:layers]
    tp.pruner.BasePruner(
        model, example, importance=importance, pruning_ratio=ratio,
        global_pruning=way.everywhere, ignored_layers=ignored(model, way.kept),
        pruning_ratio_dict=dict.fromkeys(further, next_ratio),
        in_channel_groups={}, out_channel_groups={},  # its defaults are shared by all its objects
    ).step()  # fmt: skip
    return corrected(model)


def _layers(model: nn.Module, way: Way) -> list[nn.Module]:
    """Those that may be pruned."""
    left_alone = ignored(model, way.kept)
    return [m for m in model.modules() if isinstance(m, LAYERS) and m not in left_alone]


def ignored(model: nn.Module, kept: Sequence[str]) -> list[nn.Module]:
    """The classifier, which is the last layer of all tasks, and the layers of these names."""
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, LAYERS)]
    named = [m for name, m in layers if any(fnmatch.fnmatchcase(name, k) for k in kept)]
    return [*named, layers[-1][1]]


def corrected(model: Any) -> nn.Module:
    """With the width that a forward reads from an attribute, which users are told to set by hand
    (torchcrepe's)."""
    if hasattr(model, "in_features") and hasattr(model, "classifier"):
        model.in_features = model.classifier.in_features
    return model


def with_gradients(model: nn.Module) -> nn.Module:
    """A deep copy; those of PyTorch leave the gradients behind."""
    made = copy.deepcopy(model)
    for old, new in zip(model.parameters(), made.parameters(), strict=True):
        new.grad = None if old.grad is None else old.grad.clone()
    return made


def macs(model: nn.Module, example: Tensor) -> int:
    """Multiply-accumulates of the convolutions and linear layers, for one input."""
    found = []

    def note(layer: Any, inputs: tuple[Tensor], out: Tensor) -> None:
        found.append(out[0].numel() * layer.weight[0].numel())

    hooks = [m.register_forward_hook(note) for m in model.modules() if isinstance(m, LAYERS)]
    with torch.no_grad():
        model(example)
    for hook in hooks:
        hook.remove()
    return sum(found)


# -- gradients -------------------------------------------------------------------------------------


def summed(model: nn.Module, importance: Any, batches: Batches, loss: Loss) -> None:
    """Of the loss, over all batches."""
    for x, y in batches:
        loss(model(x), y).backward()


def squared(model: nn.Module, importance: Any, batches: Batches, loss: Loss) -> None:
    """The mean square of each sample's, as the importance adds them up.

    It would write them into `grad` when it scores; they are there already, so that copies of the
    network have them.
    """
    importance.zero_grad()
    samples = (pair for x, y in batches for pair in zip(x.split(1), y.split(1), strict=True))
    for x, y in islice(samples, SAMPLES):
        model.zero_grad()
        loss(model(x), y).backward()
        importance.accumulate_grad(model)
    for parameter, total in importance._accu_grad.items():
        parameter.grad = total / importance._counter[parameter]
    importance.zero_grad()


def _mended_hessian() -> type:
    """1.6.1 looks for sums of a parameter's squares under its name, and puts them under the
    parameter: every sample replaces the one before. This one adds them up, as is meant."""
    from torch_pruning.pruner.importance import GroupHessianImportance

    class Mended(GroupHessianImportance):
        def accumulate_grad(self, model: nn.Module) -> None:
            for parameter in model.parameters():
                if parameter.grad is not None:
                    before = self._accu_grad.get(parameter, 0)
                    self._accu_grad[parameter] = before + parameter.grad**2
                    self._counter[parameter] = self._counter.get(parameter, 0) + 1

    return Mended
