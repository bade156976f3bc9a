"""Calls on meta tensors, which have shapes and no data."""

from __future__ import annotations

import contextlib
from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from .sizes import Traced, plain
from .trees import leaves, mapped

LARGE = 1 << 18  # elements of a computed constant of which only the shape is kept
Standin = Callable[[torch.Tensor, bool, bool], torch.Tensor]


_IN_PLACE = frozenset(
    f"__i{name}__"
    for name in "add sub mul truediv floordiv mod pow and or xor lshift rshift".split()
)


def in_place(name: str) -> bool:
    """Whether an op of this name changes its first operand: ``add_``, ``__iand__``."""
    return (name.endswith("_") and not name.endswith("__")) or name in _IN_PLACE


def to_meta(tensor: torch.Tensor, known: dict[int, Any]) -> torch.Tensor:
    """The tensor without its data; `known` remembers what was converted."""
    if tensor.is_meta:
        return tensor
    found = known.get(id(tensor))
    if found is None:
        meta = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device="meta")
        known[id(tensor)] = found = (meta, tensor)
    return found[0]


def evaluate(func, args, kwargs, standin: Standin, *, real: bool = False, devices: bool = True):
    """Call `func` on meta tensors if any operand is one, else on the real constants.

    `standin` gives what takes a tensor's place; `real` says that it gives none on the meta device.
    With `devices`, everything is put on one device.
    """
    tensors = leaves((args, kwargs), torch.Tensor)
    meta = not real and any(t.is_meta for t in tensors)
    scalars = {id(t) for t in tensors[1:] if meta and t.ndim == 0 and not t.is_meta}
    if scalars:  # some ops take them as numbers, which they have to be then
        with contextlib.suppress(RuntimeError):
            return _evaluate(func, args, kwargs, standin, meta, scalars, devices)
    return _evaluate(func, args, kwargs, standin, meta, set(), devices)


def _evaluate(
    func, args, kwargs, standin: Standin, meta: bool, real: set[int], devices: bool = True
):
    """One call; the tensors whose ids are `real` stay what they are."""
    first = next(iter(leaves((args, kwargs), torch.Tensor)), None)
    name = getattr(func, "__name__", "")
    changed = (not meta and in_place(name)) or name == "__setitem__"
    device = torch.device("meta" if meta else "cpu")
    if meta and name in ("__getitem__", "getitem"):
        args = (args[0], _without_masks(args[1]))

    def convert(value):
        if isinstance(value, torch.Tensor):
            return standin(value, meta and id(value) not in real, changed and value is first)
        if isinstance(value, Traced):
            return plain(value)
        if (devices and isinstance(value, torch.device)) or (
            meta and isinstance(value, str) and value.split(":")[0] in _DEVICES
        ):
            return device
        if isinstance(value, slice):
            return slice(*map(bound, (value.start, value.stop, value.step)))
        if isinstance(value, tuple):
            made = [convert(v) for v in value]
            return type(value)(*made) if hasattr(value, "_fields") else tuple(made)
        if isinstance(value, list):
            return [convert(v) for v in value]
        return {key: convert(v) for key, v in value.items()} if isinstance(value, dict) else value

    def bound(value):
        constant = isinstance(value, torch.Tensor) and not value.is_meta
        return standin(value, False, False) if constant else convert(value)

    if meta and name in ("cuda", "cpu", "numpy"):
        return convert(args[0]).detach()
    return func(*convert(tuple(args)), **convert(dict(kwargs)))


_DEVICES = ("cpu", "cuda", "mps", "meta", "xpu")


def _without_masks(index: Any) -> Any:
    """A constant boolean mask picks known positions, which also work on meta tensors."""
    parts = index if isinstance(index, tuple) else (index,)
    if not any(
        isinstance(p, torch.Tensor) and p.dtype == torch.bool and not p.is_meta for p in parts
    ):
        return index
    made: list[Any] = []
    for part in parts:
        masks = isinstance(part, torch.Tensor) and part.dtype == torch.bool and not part.is_meta
        made += part.nonzero(as_tuple=True) if masks else [part]
    return tuple(made)


def lightened(value: Any, call: Any) -> Any:
    """What a call gave; of a large computed constant, as a table of biases looked up for each pair
    of positions, the shape is enough."""
    operands = leaves(call, torch.Tensor)
    return mapped(lambda v: _light(v, operands), value) if operands else value


def _light(value: Any, operands: list[torch.Tensor]) -> Any:
    if not isinstance(value, torch.Tensor) or value.is_meta or value.numel() < LARGE:
        return value
    own = value.untyped_storage().data_ptr()
    shared = any(not t.is_meta and t.untyped_storage().data_ptr() == own for t in operands)
    return value if shared or not value.is_floating_point() else to_meta(value, {}).detach()


class OnMeta(TorchFunctionMode):
    """Computes shapes: real tensors that meet meta ones are taken as meta.

    `shortcut` may tell a result before it is computed.
    """

    def __init__(self, shortcut: Callable[[Callable, tuple, dict], Any] = lambda *call: None):
        super().__init__()
        self.known: dict[int, Any] = {}
        self.shortcut = shortcut

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        found = self.shortcut(func, args, kwargs or {})
        if found is not None:
            return found
        return lightened(evaluate(func, args, kwargs or {}, self._standin), (args, kwargs))

    def _standin(self, tensor: torch.Tensor, meta: bool, changed: bool) -> torch.Tensor:
        if meta:
            return to_meta(tensor, self.known)
        return tensor.clone() if changed else tensor
