"""The networks of whole zoos: their names, the networks with lively weights, and their inputs.

A name is ``torchvision:resnet18``, ``timm:vit_tiny_patch16_224`` or ``small:NAME``, a small twin of
a published network with something hard in it (tests/wild.py). Weights are random; nothing is ever
downloaded.
"""

from __future__ import annotations

import contextlib
import re
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from benchmarks import common

SOURCES = ("torchvision", "timm", "small")
TESTS = Path(__file__).resolve().parents[1] / "tests"


@dataclass
class Network:
    """A network in eval mode, what its forward takes, and where it comes from."""

    name: str
    family: str
    kind: str
    model: nn.Module
    args: tuple[Any, ...]
    large: bool = False  # too large to be run


# -- names -----------------------------------------------------------------------------------------


def torchvision_names() -> list[str]:
    """All that torchvision lists: classification, segmentation, video, detection, optical flow, and
    the quantizable ones in their float form."""
    from torchvision import models

    return [f"torchvision:{name}" for name in models.list_models()]


def timm_names() -> list[str]:
    """All that timm registers."""
    import timm

    return [f"timm:{name}" for name in timm.list_models()]


def timm_family_names() -> list[str]:
    """The smallest network of every family of timm, a family being a module of timm.models."""
    import timm
    from timm.models import _registry

    families: dict[str, list[str]] = {}
    for name in timm.list_models():
        families.setdefault(_registry._model_to_module[name], []).append(name)
    return [f"timm:{_smallest(families[family])}" for family in sorted(families)]


def small_names() -> list[str]:
    """The small twins of published networks whose forward takes no keywords."""
    return [f"small:{name}" for name, case in _small_networks().items() if not case.keywords]


def _small_networks() -> dict[str, Any]:
    if str(TESTS) not in sys.path:
        sys.path.append(str(TESTS))
    from wild import WILD

    return WILD


def names_in(path: str) -> list[str]:
    """Names from a file, one a line; those without a source are timm's."""
    lines = [line.split("#")[0].strip() for line in Path(path).read_text().splitlines()]
    return [line if ":" in line else f"timm:{line}" for line in lines if line]


SIZES = "zepto femto atto pico nano xxs xxt xx xs xt tiny mini ti small lite s t".split()
SHORTLIST = 8


def _smallest(names: list[str]) -> str:
    """The one with the fewest parameters among those whose names look the smallest. Networks made
    for timm's own tests stand for no family."""
    shortlist = sorted([n for n in names if not n.startswith("test_")] or names, key=_looks)
    counts = {name: _parameters(name) for name in shortlist[:SHORTLIST]}
    return min(counts, key=lambda name: counts[name])


def _looks(name: str) -> tuple[int, list[int]]:
    """How large a name looks: by its word for a size, then by its numbers."""
    words = [SIZES.index(word) for word in re.split(r"[_\d]+", name) if word in SIZES]
    return min(words, default=len(SIZES)), [int(number) for number in re.findall(r"\d+", name)]


def _parameters(name: str) -> float:
    import timm

    try:
        with torch.device("meta"):
            model = timm.create_model(name, pretrained=False)
    except Exception:  # some read a tensor while they are built
        return float("inf")
    return sum(p.numel() for p in model.parameters())


# -- networks --------------------------------------------------------------------------------------


def network(name: str, side: int = 0, shapes_above: float = float("inf")) -> Network:
    """The network of this name and its inputs; with images of this side, where it takes them.

    One with more than `shapes_above` parameters is not run.
    """
    source, _, short = name.partition(":")
    if source not in SOURCES:
        raise ValueError(f"{name}: a name begins with {' or '.join(f'{s}:' for s in SOURCES)}")
    torch.manual_seed(0)
    made = {"torchvision": _torchvision, "timm": _timm, "small": _small}[source](name, short, side)
    made.large = sum(p.numel() for p in made.model.parameters()) > shapes_above
    if not made.large:
        lively(made.model, made.args)
    return made


def _torchvision(name: str, short: str, side: int) -> Network:
    from torchvision import models

    *_, home, family = models.get_model_builder(short).__module__.split(".")
    kind = "classification" if home == "models" else home
    resized = kind == "detection" and side and not short.startswith("ssd")
    options = {"min_size": side, "max_size": side} if resized else {}
    model = common.torchvision_model(short, **options)
    return Network(name, f"{home}.{family}".removeprefix("models."), kind, model,
                   _arguments(short, kind, side))  # fmt: skip


def _small(name: str, short: str, side: int) -> Network:
    case = _small_networks()[short]
    return Network(name, short, "small", case.build(), case.args())


def _arguments(short: str, kind: str, side: int) -> tuple[Any, ...]:
    """One image, clip or pair of images of the size a network of torchvision is made for."""
    if kind == "detection":
        return ([torch.rand(3, side or 320, side or 320)],)
    if kind == "optical_flow":
        return tuple(torch.rand(1, 3, side or 128, side or 128) * 2 - 1 for _ in range(2))
    if kind == "video":
        frames = 4 if side else 16
        side = side or (224 if short.startswith(("mvit", "swin", "s3d")) else 112)
        return (torch.randn(1, 3, frames, side, side),)
    side = side or (299 if "inception" in short else 224)
    return (torch.randn(1, 3, side, side),)


def _timm(name: str, short: str, side: int) -> Network:
    from timm.models import _registry

    model = _created(short, side).eval()
    channels, height, width = model.default_cfg["input_size"]
    size = (side, side) if side else (height, width)
    family = _registry._model_to_module.get(short, "")
    return Network(name, family, "timm", model, (torch.randn(1, channels, *size),))


def _created(short: str, side: int) -> nn.Module:
    import timm

    if side:
        with contextlib.suppress(TypeError):  # most networks take images of any size
            return timm.create_model(short, pretrained=False, img_size=side)
    return timm.create_model(short, pretrained=False)


def others(args: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Other inputs of the same kind."""
    generator = torch.Generator().manual_seed(seed)

    def fill(value: Any) -> Any:
        if isinstance(value, (tuple, list)):
            return type(value)(fill(each) for each in value)
        if isinstance(value, dict):
            return {key: fill(each) for key, each in value.items()}
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        if float(value.min()) < -1:
            return torch.randn(value.shape, generator=generator, dtype=value.dtype)
        low = float(value.min() < 0)
        return torch.rand(value.shape, generator=generator, dtype=value.dtype) * (1 + low) - low

    return fill(args)


# -- lively weights --------------------------------------------------------------------------------


def lively(model: nn.Module, args: tuple[Any, ...]) -> None:
    """Give the network weights with which its outputs depend on its inputs, as a trained one's do:
    noise for parameters that start constant, and statistics that fit the data."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point() and _constant(parameter):
                size = max(abs(float(parameter.flatten()[0])), 0.2)
                parameter += (torch.rand(parameter.shape, generator=generator) - 0.5) * size
    try:
        common.randomised(model, *args)
    except (RuntimeError, ValueError):  # statistics of a single value cannot be taken
        _settle(model)


def _constant(parameter: Tensor) -> bool:
    flat = parameter.detach().flatten()
    return len(flat) > 1 and bool((flat[:64] == flat[0]).all()) and bool((flat == flat[0]).all())


def _settle(model: nn.Module) -> None:
    for module in model.eval().modules():
        if isinstance(module, common.BATCH_NORM):
            module.momentum = 0.1


# -- attention -------------------------------------------------------------------------------------

ATTENTION = ("scaled_dot_product_attention", "multi_head_attention", "_native_multi_head_attention")
PRODUCTS = ("matmul", "__matmul__", "__rmatmul__", "bmm", "baddbmm", "einsum", "mm")


def attends(model: nn.Module, args: tuple[Any, ...]) -> bool:
    """Whether a run of the network takes a softmax of a product of two activations."""
    with torch.no_grad(), _Attention() as seen:
        model(*args)
    return seen.found


class _Attention(TorchFunctionMode):
    """Marks what is a product of two activations, and what was made of one by anything but a
    convolution; a softmax of such a thing is attention."""

    def __init__(self) -> None:
        super().__init__()
        self.found = False

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        result = func(*args, **(kwargs or {}))
        given = tensors((args, kwargs))
        product = any(getattr(t, "_is_product", False) for t in given)
        if any(name.startswith(known) for known in ATTENTION) or ("softmax" in name and product):
            self.found = True
        activations = [t for t in given if not isinstance(t, nn.Parameter)]
        product = product or (name in PRODUCTS and len(activations) > 1)
        if product and "conv" not in name:
            for tensor in tensors(result):
                tensor._is_product = True
        return result


def tensors(value: Any) -> list[Tensor]:
    """All tensors of nested arguments or outputs."""
    if hasattr(value, "__dataclass_fields__"):
        value = vars(value)
    if isinstance(value, Mapping):
        value = list(value.values())
    if isinstance(value, (tuple, list)):
        return [t for each in value for t in tensors(each)]
    return [value] if isinstance(value, Tensor) else []


def matching(names: Iterable[str], pattern: str) -> list[str]:
    """Names that fit a shell-style pattern, with their source or without."""
    fits = lambda n: common.matches(n, pattern) or common.matches(n.split(":")[1], pattern)  # noqa: E731
    return [name for name in names if fits(name)]
