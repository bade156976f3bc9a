"""Small networks with one hard idea each, and the oracle they are judged by.

A network is one function and the modules it uses::

    @net(image(), a=conv(3, 8), b=conv(8, 4))
    def gate(m, x):
        return m.b(m.a(x).sigmoid())

The oracle knows nothing of fxprune but `Plan.kept`: it zeroes what was dropped in a deep copy of the
original and runs both.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxprune

torch.set_num_threads(1)

# -- building --------------------------------------------------------------------------------------


@dataclass
class Case:
    """A network: its forward, the inputs, the modules, and the widths expected at rate 0.5.

    ``half`` gives the length of dim 0 of a layer's weight (or of a parameter); ``mixing`` is what
    `prune` is called with; ``frozen`` is a text that some group's reason must hold.
    """

    forward: Callable
    inputs: tuple
    parts: dict[str, Any]
    half: dict[str, int] = field(default_factory=dict)
    frozen: tuple[str, ...] = ()
    mixing: str = "norms"

    def build(self, seed: int = 0) -> nn.Module:
        """A fresh network in float64 and eval mode, with random statistics."""
        made = type(self.forward.__name__, (nn.Module,), {"forward": self.forward})()
        for name, part in copy.deepcopy(self.parts).items():
            if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
                made.register_buffer(name, part)
            else:
                setattr(made, name, part)
        return randomise(made, seed)

    def args(self, seed: int = 0) -> tuple:
        return real(self.inputs, seed)


def net(*inputs: Any, half: Mapping[str, int] | None = None, frozen=(), mixing="norms", into=None, **parts: Any):
    """Register a network under its function's name."""

    def register(forward: Callable) -> Case:
        frozen_ = (frozen,) if isinstance(frozen, str) else tuple(frozen)
        case = Case(forward, inputs, parts, dict(half or {}), frozen_, mixing)
        if into is not None:
            into[forward.__name__] = case
        return case

    return register


@dataclass(frozen=True)
class Shape:
    """An input to be filled with noise."""

    shape: tuple[int, ...]


def tensor(*shape: int) -> Shape:
    return Shape(shape)


def image(channels: int = 3, side: int = 8) -> Shape:
    return Shape((2, channels, side, side))


def real(value: Any, seed: int = 0) -> Any:
    """The same nest with noise in place of shapes."""
    generator = torch.Generator().manual_seed(seed)

    def fill(item: Any) -> Any:
        if isinstance(item, Shape):
            return torch.randn(item.shape, generator=generator, dtype=torch.float64)
        if isinstance(item, dict):
            return {key: fill(v) for key, v in item.items()}
        if isinstance(item, (tuple, list)):
            return type(item)(fill(v) for v in item)
        return item

    return fill(value)


def randomise(model: nn.Module, seed: int = 0) -> nn.Module:
    """Random running statistics, scales and constants; float64, eval mode."""
    generator = torch.Generator().manual_seed(seed)
    model.double().eval()
    with torch.no_grad():
        for name, tensor_ in [*model.named_parameters(), *model.named_buffers()]:
            if not tensor_.is_floating_point():
                continue
            noise = torch.rand(tensor_.shape, generator=generator, dtype=torch.float64)
            if name.endswith("running_var"):
                tensor_.copy_(noise + 0.5)
            elif tensor_.ndim < 2 or bool((tensor_ == tensor_.reshape(-1)[0]).all()):
                tensor_.copy_(noise * 2 - 0.7)
            else:
                tensor_.copy_((noise * 2 - 1) * 1.5 / max(tensor_[0].numel(), 1) ** 0.5)
    return model


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    options.setdefault("padding", k // 2)
    return nn.Conv2d(i, o, k, **options)


def par(*shape: int) -> nn.Parameter:
    return nn.Parameter(torch.ones(shape))


# -- judging ---------------------------------------------------------------------------------------


def masked(model: nn.Module, kept: Mapping[str, Mapping[int, Any]]) -> nn.Module:
    """A deep copy in which everything that `kept` drops is zero."""
    made = copy.deepcopy(model)
    tensors: dict[str, Tensor] = {**dict(made.named_parameters()), **dict(made.named_buffers())}
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, rows in dims.items():
                if isinstance(rows[0], list):
                    for part, own in zip(tensors[name].chunk(len(rows), 0), rows, strict=True):
                        _zero(part, dim, own)
                else:
                    _zero(tensors[name], dim, rows)
    return made


def _zero(part: Tensor, dim: int, keep: list[int]) -> None:
    gone = sorted(set(range(part.shape[dim])) - set(keep))
    if gone:
        part.index_fill_(dim, torch.tensor(gone), 0)


def leaves(value: Any) -> list[Tensor]:
    """The tensors in any nest of containers, dataclasses among them."""
    if isinstance(value, Tensor):
        return [value]
    if dataclasses.is_dataclass(value):
        return [t for f in dataclasses.fields(value) for t in leaves(getattr(value, f.name))]
    if isinstance(value, Mapping):
        return [t for v in value.values() for t in leaves(v)]
    if isinstance(value, (tuple, list)):
        return [t for v in value for t in leaves(v)]
    return []


def gap(expected: Any, got: Any) -> float:
    """The largest difference of two nests, relative to the largest expected value."""
    worst = 0.0
    for a, b in zip(leaves(expected), leaves(got), strict=True):
        assert a.shape == b.shape and a.dtype == b.dtype, (a.shape, b.shape, a.dtype, b.dtype)
        if a.numel():
            scale = float(a.abs().max()) or 1.0
            worst = max(worst, float((a - b).abs().max()) / scale)
    return worst


def run(model: nn.Module, args: tuple, kwargs: Mapping[str, Any] | None = None) -> Any:
    with torch.no_grad():
        return model(*copy.deepcopy(args), **copy.deepcopy(dict(kwargs or {})))


def assert_slices(model: nn.Module, pruned: nn.Module, kept: Mapping[str, Mapping[int, Any]]) -> None:
    """Every tensor of `pruned` is the slice of the original's that `kept` names."""
    old = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    for name, new in {**dict(pruned.named_parameters()), **dict(pruned.named_buffers())}.items():
        if name not in old:  # constants of the graph
            continue
        dims = kept.get(name, {})
        whole = old[name]
        nested = [rows for rows in dims.values() if isinstance(rows[0], list)]
        if not nested:
            for dim, rows in dims.items():
                whole = whole.index_select(dim, torch.tensor(rows))
            assert torch.equal(whole, new), name
        else:
            assert new.shape[0] == len(dims.get(0, range(whole.shape[0]))), name


def assert_exact(
    model: nn.Module, args: tuple, rate: float = 0.5, kwargs: Mapping[str, Any] | None = None, *,
    others: tuple[tuple, ...] = (), **options: Any,
) -> Any:  # fmt: skip
    """Prune `model` and prove that the result computes the masked original; give the result.

    `others` are further arguments to compare on (other batch and image sizes).
    """
    before = {k: v.clone() for k, v in model.state_dict().items()}
    example = args if kwargs is None else _bound(model, args, kwargs)
    pruned = fxprune.prune(model, example, criterion="l1", rate=rate, **options)
    plan = pruned.fxprune.plan
    reference = masked(model, plan.kept)
    for arguments in (args, *others):
        expected = run(reference, arguments, kwargs)
        got = run(pruned, arguments, kwargs)
        assert gap(expected, got) < 1e-9, f"differs by {gap(expected, got):.2e}"
    whole = run(model, args, kwargs)
    assert [t.shape for t in leaves(whole)] == [t.shape for t in leaves(run(pruned, args, kwargs))]
    if plan.removed:
        assert gap(whole, expected if not others else run(reference, args, kwargs)) > 1e-6, "dropped nothing that counts"
    assert_slices(model, pruned, plan.kept)
    after = model.state_dict()
    assert before.keys() == after.keys() and all(torch.equal(v, after[k]) for k, v in before.items())
    return pruned


def _bound(model: nn.Module, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
    import inspect

    return dict(inspect.signature(model.forward).bind(*args, **kwargs).arguments)


def widths(module: nn.Module) -> dict[str, int]:
    """Length of dim 0 of each layer's weight, and of each parameter that is not in a layer."""
    found = {}
    for name, tensor_ in module.state_dict().items():
        if tensor_.ndim:
            found[name.removesuffix(".weight") if name.endswith(".weight") else name] = tensor_.shape[0]
    return found


def reasons(pruned: Any) -> str:
    """All reasons of a report, in one text."""
    return "\n".join(row.reason for row in pruned.fxprune.report.groups if row.reason)


def source(pruned: Any) -> str:
    """The Python of the pruned network."""
    return pruned.code


__all__ = ["F", "copy"]
