"""Calibration data: what a user hands in as `data`, as a list of batches."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .errors import InputError, OptionError
from .inputs import Inputs, given

_KINDS = "a list or DataLoader of batches: inputs, or pairs (inputs, target)"


@dataclass(frozen=True)
class Batch:
    """Arguments of forward, and the target where there is one."""

    inputs: Inputs
    target: Any = None

    def __len__(self) -> int:
        """How many items, as the first dim of the first tensor says."""
        return len(self.tensors[0])

    @property
    def tensors(self) -> list[Tensor]:
        leaves = pytree.tree_leaves((self.inputs.args, self.inputs.kwargs))
        return [leaf for leaf in leaves if isinstance(leaf, Tensor)]

    def to(self, device: torch.device) -> Batch:
        def moved(leaf: Any) -> Any:
            return leaf.to(device) if isinstance(leaf, Tensor) else leaf

        args, kwargs = pytree.tree_map(moved, (self.inputs.args, self.inputs.kwargs))
        return Batch(Inputs(args, kwargs), pytree.tree_map(moved, self.target))


def batches(data: Any, device: torch.device | None = None) -> list[Batch]:
    """The batches of an iterable, on a device.

    A batch is a tensor, or a dict of forward's arguments; or a pair of that, or of a tuple of
    arguments, and a target. Raises `InputError` for what is none, or for no batch at all.
    """
    if isinstance(data, list) and data and all(isinstance(each, Batch) for each in data):
        return data
    if data is None:
        raise OptionError("no data to calibrate on", hint=f"pass data=...: {_KINDS}")
    whole = isinstance(data, (Tensor, str, Mapping)) or not isinstance(data, Iterable)
    if whole:
        raise InputError(f"data is a {type(data).__name__}", hint=_KINDS)
    with torch.random.fork_rng(devices=[]):  # a shuffling loader draws; the caller's numbers stay
        found = list(_read(data, device))
    if not found:
        raise InputError("data holds no batch", hint=_KINDS)
    return found


def _read(data: Iterable[Any], device: torch.device | None) -> Iterator[Batch]:
    for number, each in enumerate(data):
        batch = _batch(each, number)
        if not batch.tensors or not batch.tensors[0].ndim or not len(batch):
            raise InputError(f"batch {number} of data holds no items", hint=_KINDS)
        if any(bool(torch.isnan(tensor).any()) for tensor in batch.tensors):
            raise InputError(
                f"batch {number} of data holds NaN",
                hint="mend the inputs, or leave the batch out: one spoils all sums",
            )
        yield batch if device is None else batch.to(device)


def _batch(each: Any, number: int) -> Batch:
    pair = isinstance(each, (tuple, list)) and len(each) == 2
    inputs, target = each if pair else (each, None)
    if isinstance(inputs, (tuple, list)) and len(inputs) == 1:
        inputs = inputs[0]
    if not isinstance(inputs, (Tensor, Mapping, tuple, list)):
        kind = type(inputs).__name__
        hint = "tensors: torch.from_numpy(...)" if kind == "ndarray" else _KINDS
        raise InputError(f"batch {number} of data is a {kind}", hint=hint)
    return Batch(given(inputs), target)


def arguments(graph: fx.GraphModule, batch: Batch) -> dict[fx.Node, Any]:
    """What each placeholder of a graph is given; `InputError` where one is missing."""
    holders = [node for node in graph.graph.nodes if node.op == "placeholder"]
    named = {str(holder.target) for holder in holders}
    extra = [*batch.inputs.args[len(holders) :], *({*batch.inputs.kwargs} - named)]
    if extra:
        raise InputError(
            f"data gives {len(extra)} more arguments than example_inputs",
            details=[("expected", ", ".join(sorted(named)))],
            hint="a batch is inputs as in example_inputs, or a pair (inputs, target)",
        )
    found = dict(zip(holders, batch.inputs.args, strict=False))
    for holder in holders[len(batch.inputs.args) :]:
        if holder.target in batch.inputs.kwargs:
            found[holder] = batch.inputs.kwargs[holder.target]
        elif holder.args:
            found[holder] = holder.args[0]
        else:
            raise InputError(
                f"data gives nothing for the argument `{holder.target}` of forward",
                hint="a batch is the inputs alone, or a pair (inputs, target); several arguments "
                "go into a tuple: ((a, b), target)",
            )
    return found
