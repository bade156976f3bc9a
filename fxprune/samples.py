"""Samples of rules as calls that can be run, and the names by which a rule's ops are called."""

from __future__ import annotations

import contextlib
import importlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from . import rules as rule_files
from .rules import Rule, Sample

_SPACES = ("torch", "torch.nn.functional", "Tensor", "aten", "operator", "torch._C._nn")
_OPTIONAL = ("torchvision", "timm")
_RANGES = {
    "positive": (0.5, 1.5),
    "unit": (-0.9, 0.9),
    "share": (0.1, 0.9),
    "above_one": (1.1, 2.0),
}
Shape = tuple[int, ...]


@dataclass(frozen=True)
class Hole:
    """The place of operand `index` among a call's arguments."""

    index: int
    spec: Any


def _shape(spec: Any) -> Shape | None:
    """The shape a sample's argument asks a tensor of; None if it asks for something else."""
    if isinstance(spec, dict):
        keys = (*_RANGES, "bool", "places", "complex", "shape")
        spec = next((spec[key] for key in keys if key in spec), None)
    numbers = isinstance(spec, list) and all(isinstance(n, int) for n in spec)
    return tuple(spec) if numbers else None


def _values(spec: Any, generator: torch.Generator) -> Tensor:
    """Random values for an operand, as its spec asks."""
    shape = _shape(spec)
    assert shape is not None
    if isinstance(spec, dict):
        if "index" in spec:
            return torch.randint(0, spec["index"], shape, generator=generator)
        if "bool" in spec:
            return torch.rand(shape, generator=generator) > 0.5
        if "places" in spec:  # of maxima in a picture, each taken once
            count, size = math.prod(shape[:2]), math.prod(shape[2:])
            planes = [torch.randperm(size, generator=generator) for _ in range(count)]
            return torch.stack(planes).view(shape)
        if "complex" in spec:
            return torch.randn(shape, generator=generator, dtype=torch.complex128)
        for key, (low, high) in _RANGES.items():
            if key in spec:
                share = torch.rand(shape, generator=generator, dtype=torch.float64)
                return share * (high - low) + low
    return torch.randn(shape, generator=generator, dtype=torch.float64)


def _read(spec: Any, holes: list[Hole]) -> Any:
    """A sample's argument: a literal, or a hole for a tensor (nested in lists)."""
    if isinstance(spec, dict):
        if "plain" in spec or "text" in spec:
            return spec.get("plain", spec.get("text"))
        if "tensor" in spec:
            made = torch.tensor(spec["tensor"])
            return made.double() if made.is_floating_point() else made
        if "at" in spec:
            return _index(str(spec["at"]))
        if "list" in spec:
            return [_read(each, holes) for each in spec["list"]]
        if "tuple" in spec:
            return tuple(_read(each, holes) for each in spec["tuple"])
        if "dtype" in spec:
            return getattr(torch, spec["dtype"])
    if _shape(spec) is None:
        raise ValueError(f"`{spec}` is not a shape or one of the forms a sample knows")
    holes.append(Hole(len(holes), spec))
    return holes[-1]


def _index(text: str) -> Any:
    """``:, 1:3`` as a tuple of slices; ``4 0 1`` in it are positions."""
    parts = [_index_part(part.strip()) for part in text.split(",")]
    return tuple(parts) if len(parts) > 1 else parts[0]


def _index_part(text: str) -> Any:
    if ":" in text:
        return slice(*(int(n) if n.strip() else None for n in text.split(":")))
    if text in ("...", "None"):
        return Ellipsis if text == "..." else None
    return torch.tensor([int(n) for n in text.split()]) if " " in text else int(text)


@dataclass
class Call:
    """One spelling of an op, with arguments to run it on; `holes` are its tensor operands."""

    name: str
    target: Any
    args: list[Any]
    options: dict[str, Any]
    holes: list[Hole]
    module: nn.Module | None = None
    defined: bool = True

    @property
    def title(self) -> str:
        shown = [_shown(arg) for arg in self.args]
        shown += [f"{key}={_shown(value)}" for key, value in self.options.items()]
        return f"{self.name}({', '.join(shown)})"

    def values(self, seed: int) -> list[Tensor]:
        generator = torch.Generator().manual_seed(seed)
        return [_values(hole.spec, generator) for hole in self.holes]

    def filled(self, tensors: Sequence[Tensor]) -> tuple[list[Any], dict[str, Any]]:
        """The arguments with tensors in their places."""

        def fill(arg: Any) -> Any:
            return tensors[arg.index] if _is_hole(arg) else arg

        return _map(self.args, fill), _map(self.options, fill)

    def __call__(self, tensors: Sequence[Tensor]) -> Any:
        args, options = self.filled(tensors)
        if self.module is not None:
            return self.module(*args, **options)
        if self.name.startswith("Tensor."):
            found = getattr(args[0], self.name.removeprefix("Tensor."))
            return found(*args[1:], **options) if callable(self.target) else found
        result = self.target(*args, **options)
        return args[0] if result is None else result


def _shown(arg: Any) -> str:
    if _is_hole(arg):
        return "x".join(map(str, _shape(arg.spec) or ()))
    if isinstance(arg, list) and any(map(_is_hole, arg)):
        return f"[{', '.join(map(_shown, arg))}]"
    return str(arg.tolist() if isinstance(arg, Tensor) else arg)


def _is_hole(value: Any) -> bool:
    return isinstance(value, Hole)


def _map(value: Any, fill: Callable[[Any], Any]) -> Any:
    if isinstance(value, dict):
        return {key: _map(item, fill) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_map(item, fill) for item in value)
    return fill(value)


def resolve(name: str) -> Any:
    """The object a rule's name means; None if this installation has none."""
    if name.startswith("Tensor."):
        return getattr(torch.Tensor, name.removeprefix("Tensor."), None)
    if name.startswith(("aten.", "torch.ops.")):
        return _op(*name.removeprefix("torch.ops.").split(".")[:2])
    if name.split(".")[0] in ("torch", "operator"):
        return rule_files.resolve(name)
    module, _, field = name.rpartition(".")
    try:
        return getattr(importlib.import_module(module), field, None)
    except (ImportError, ValueError):
        return None


def _op(library: str, name: str) -> Any:
    """An op of a library of ops, which its Python package brings."""
    if library in _OPTIONAL:
        with contextlib.suppress(ImportError):
            importlib.import_module(library)
    found = getattr(getattr(torch.ops, library), name, None)
    return found if isinstance(found, torch._ops.OpOverloadPacket) else None


def made_call(name: str, sample: Sample) -> Call:
    """The call a sample describes; raises whatever building it raises."""
    target = resolve(name)
    holes: list[Hole] = []
    args = [_read(spec, holes) for spec in sample.inputs]
    options = {
        key: _read(value, holes) if isinstance(value, dict) else value
        for key, value in sample.options.items()
    }
    module = None
    if isinstance(target, type) and issubclass(target, nn.Module):
        init = sample.init
        seed_torch(0)
        module = target(**init) if isinstance(init, dict) else target(*init)
        module = module.double().eval()
        _randomize(module)
    return Call(name, target, args, options, holes, module, sample.values)


def seed_torch(number: int) -> None:
    """Seed torch's CPU generator alone; `torch.manual_seed` asks every device, which is slow."""
    torch.default_generator.manual_seed(number)


def _randomize(module: nn.Module) -> None:
    """Parameters and statistics that are neither all one nor all zero."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*module.parameters(), *module.buffers()):
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator, dtype=torch.float64) + 0.1)


def leaves(value: Any) -> list[Tensor]:
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, Tensor)]


def is_discrete(spec: Any) -> bool:
    return isinstance(spec, dict) and bool({"index", "bool", "places"} & spec.keys())


def spellings(rule: Rule) -> list[str]:
    """Every dotted name whose calls the rule means."""
    found = [text.partition("(")[0] for text in (*rule.calls, *rule.modules)]
    for word in rule.words:
        found += word_spellings(word)
    return list(dict.fromkeys(found))


def word_spellings(word: str) -> Iterator[str]:
    if word[0].isupper() and isinstance(getattr(nn, word, None), type):
        yield f"torch.nn.{word}"
        return
    seen: list[Any] = []
    for space in _SPACES:
        for spelled in dict.fromkeys((word, f"{word}_")):
            found = resolve(f"{space}.{spelled}")
            if not callable(found) and space != "Tensor":
                continue  # torch.float is a dtype
            if spelled.startswith("__") and space not in ("Tensor", "aten"):
                continue  # every object has an __eq__
            if found is not None and not any(found is other for other in seen):
                seen.append(found)
                yield f"{space}.{spelled}"


def needs_device(target: Any) -> bool:
    """Whether a method moves a tensor to a device that is not there."""
    try:
        target(torch.zeros(1))
    except Exception as error:
        return "CUDA" in str(error) or "NVIDIA" in str(error)
    return False


def is_missing(name: str) -> bool:
    root = name.removeprefix("torch.ops.").split(".")[0]
    if root not in _OPTIONAL:
        return False
    try:
        importlib.import_module(root)
    except ImportError:
        return True
    return False
