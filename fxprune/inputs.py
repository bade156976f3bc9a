"""Example inputs: the user's, or the usual ones for the first layer."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, List, get_type_hints  # noqa: UP035

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from .errors import InputError, PlanError


@dataclass(frozen=True)
class Inputs:
    """Arguments of forward. ``guessed`` says where they came from when they were not given."""

    args: tuple
    kwargs: dict[str, Any]
    guessed: str = ""

    def describe(self) -> str:
        """``2x3x224x224`` for each tensor."""
        tensors = [t for t in pytree.tree_leaves((self.args, self.kwargs)) if isinstance(t, Tensor)]
        return ", ".join("x".join(map(str, t.shape)) or "scalar" for t in tensors)

    def spec(self) -> Any:
        """Shapes and dtypes of tensors, and all other values, as plain data for a plan.

        None where an argument is of another kind than tensors, numbers, strings and None in
        tuples, lists and dicts: then it has to be given again.
        """
        if not self.kwargs and all(isinstance(arg, Tensor) for arg in self.args):
            return [_tensor_spec(arg) for arg in self.args]
        try:
            args = [_spec(arg) for arg in self.args]
            return {"args": args, "kwargs": {k: _spec(arg) for k, arg in self.kwargs.items()}}
        except TypeError:
            return None


def _tensor_spec(tensor: Tensor) -> list[Any]:
    return [list(tensor.shape), str(tensor.dtype).removeprefix("torch.")]


def _spec(value: Any) -> Any:
    """A value as JSON can hold it: a container or tensor is a dict of one item, its kind."""
    if isinstance(value, Tensor):
        return {"tensor": _tensor_spec(value)}
    if type(value) in (list, tuple):
        return {type(value).__name__: [_spec(item) for item in value]}
    if type(value) is dict:
        return {"dict": [[_spec(key), _spec(item)] for key, item in value.items()]}
    if type(value) is float and not math.isfinite(value):
        return {"float": str(value)}
    if value is None or type(value) in (bool, int, float, str):
        return value
    raise TypeError(f"a plan cannot hold a {type(value).__name__}")


def _of_spec(spec: Any) -> Any:
    """The value that `_spec` wrote down; tensors are on the meta device."""
    if not isinstance(spec, dict):
        return spec
    ((kind, content),) = spec.items()
    if kind == "dict":
        return {_of_spec(key): _of_spec(item) for key, item in content}
    if kind in ("list", "tuple"):
        made = [_of_spec(item) for item in content]
        return made if kind == "list" else tuple(made)
    if kind not in ("tensor", "float"):
        raise ValueError(f"`{kind}` is no kind of input")
    return _tensor_of(content) if kind == "tensor" else float(content)


def _tensor_of(spec: Any) -> Tensor:
    shape, dtype = spec
    return torch.empty(shape, dtype=getattr(torch, dtype), device="meta")


def given(example_inputs: Any, model: nn.Module | None = None) -> Inputs:
    """A tensor, a tuple of arguments, or a dict of keyword arguments; a list of tensors is one
    argument where the model's forward says that it takes one."""
    if type(example_inputs) is list and model is not None and _takes_a_list(model):
        return Inputs((example_inputs,), {})
    if isinstance(example_inputs, Mapping):
        return Inputs((), dict(example_inputs))
    if isinstance(example_inputs, (tuple, list)):
        return Inputs(tuple(example_inputs), {})
    if isinstance(example_inputs, Tensor):
        return Inputs((example_inputs,), {})
    raise InputError(
        f"example_inputs is a {type(example_inputs).__name__}",
        hint="pass a tensor, a tuple of forward's arguments, or a dict of keyword arguments",
    )


def of_spec(spec: Any) -> Inputs:
    """Inputs of the shapes a plan was made with; `PlanError` where they cannot be read."""
    try:
        if not isinstance(spec, dict):  # tensors alone
            return Inputs(tuple(_tensor_of(each) for each in spec), {})
        kwargs = {key: _of_spec(each) for key, each in spec["kwargs"].items()}
        return Inputs(tuple(_of_spec(each) for each in spec["args"]), kwargs)
    except (TypeError, ValueError, KeyError, AttributeError, RuntimeError) as error:
        fault = f"the plan's inputs {spec} cannot be read: {error}"
        raise PlanError(fault, hint="give example_inputs, and they are not needed") from None


def candidates(model: nn.Module) -> Iterator[Inputs]:
    """The usual inputs for the model's first layer, most likely first; all on the meta device."""
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if _takes_a_list(model):
        image = torch.empty(
            (_width(_first_layer(model)) or 3, 224, 224), device="meta", dtype=dtype
        )
        yield Inputs(([image],), {}, "a list of images")
        return
    for why, shape in dict.fromkeys(_shapes(model)):
        made = torch.empty(shape, device="meta", dtype=torch.int64 if why == "Embedding" else dtype)
        yield Inputs((made,), {}, why)


def _shapes(model: nn.Module) -> Iterator[tuple[str, tuple[int, ...]]]:
    size = (getattr(model, "default_cfg", None) or {}).get("input_size")
    if size:
        yield "default_cfg", (2, *size)
    first = _first_layer(model)
    if first is None:
        yield "an image", (2, 3, 224, 224)
        return
    name, width = type(first).__name__, _width(first)
    usual: dict[int, tuple[int, ...]] = {
        1: (1024, 256, 16000, 128),
        2: (224, 32, 28, 64, 299, 512),
        3: (112, 64, 32, 224),
    }
    rank = 0
    if isinstance(first, nn.modules.conv._ConvNd):
        rank = len(first.kernel_size)
    for side in usual.get(rank, ()):
        if rank == 3:
            yield name, (2, width, 16, side, side)
        yield name, (2, width, *[side] * rank)
    if isinstance(first, nn.Embedding):
        yield "Embedding", (2, 16)
    elif rank == 0:
        yield name, (2, width)
        yield name, (2, 16, width)
        yield "an image", (2, 3, 224, 224)
        yield "an image", (2, 1, 28, 28)


def _takes_a_list(model: nn.Module) -> bool:
    """Whether forward says that its first argument is a list of tensors."""
    try:
        hints = get_type_hints(model.forward)
        name = next(iter(inspect.signature(model.forward).parameters))
    except Exception:  # hints may name what cannot be found here
        return False
    return hints.get(name) in (list[Tensor], List[Tensor])  # noqa: UP006


def _first_layer(model: nn.Module) -> nn.Module | None:
    return next((m for m in model.modules() if _width(m)), None)


def _width(module: nn.Module | None) -> int:
    for key in ("in_channels", "in_features", "input_size", "num_embeddings"):
        value = getattr(module, key, None)
        if module is not None and isinstance(value, int) and [*module.parameters(recurse=False)]:
            return value
    return 0


def random_like(
    inputs: Inputs, *, dtype: torch.dtype | None, device: torch.device, seed: int = 0
) -> Inputs:
    """The same structure with real values: those given, or normal noise for meta tensors."""
    generator = torch.Generator().manual_seed(seed)

    def fill(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        if not value.is_floating_point():
            real = torch.zeros(value.shape, dtype=value.dtype) if value.is_meta else value.detach()
            return real.to(device, copy=True)
        real = (
            torch.randn(value.shape, generator=generator, dtype=torch.float64)
            if value.is_meta
            else value.detach()
        )
        return real.to(device=device, dtype=dtype or value.dtype, copy=True)

    args, kwargs = pytree.tree_map(fill, (inputs.args, inputs.kwargs))
    return Inputs(args, kwargs, inputs.guessed)


def batched(inputs: Inputs, batch: int) -> Inputs:
    """The inputs with another batch size: tensors along their first dim, lists of tensors as a
    whole. Tensors whose first dim is not the batch stay."""
    size = batch_of(inputs)

    def repeat(value: Any) -> Any:
        if not has_batch(value, size):
            return value
        places = [i % size for i in range(batch)]
        return value[places] if isinstance(value, Tensor) else [value[i] for i in places]

    args = tuple(map(repeat, inputs.args))
    return Inputs(args, {key: repeat(value) for key, value in inputs.kwargs.items()})


def batch_of(inputs: Inputs) -> int:
    """The batch size: that of the first argument that has one; 0 where none has."""
    values = [*inputs.args, *inputs.kwargs.values()]
    return next((size for size in map(_first_dim, values) if size), 0)


def has_batch(value: Any, size: int) -> bool:
    """Whether an argument holds a batch of that size."""
    return size > 0 and _first_dim(value) == size


def _first_dim(value: Any) -> int:
    if isinstance(value, Tensor):
        return value.shape[0] if value.ndim > 1 else 0
    tensors = isinstance(value, list) and all(isinstance(each, Tensor) for each in value)
    return len(value) if tensors else 0
