"""What each layer of a network has and costs, before and after."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import numpy as np
from pydantic import ConfigDict
from torch import Tensor, fx, nn

from .analysis import Analysis
from .letters import DimsUse
from .plans import Kept, kept_size

Change = tuple[int, int]


@dataclass(frozen=True)
class LayerRow:
    """One module with parameters, or one call without any; each pair is before and after.

    ``width``: channels that a convolution, a linear layer or the like makes, otherwise none.
    ``macs``:  multiply-accumulates for one item of the batch.
    """

    name: str
    width: Change | None
    params: Change
    macs: Change


@dataclass(frozen=True, eq=False)
class Scores:
    """The score of every channel of a group, and which of them stayed."""

    __pydantic_config__ = ConfigDict(arbitrary_types_allowed=True)
    values: np.ndarray
    kept: np.ndarray

    @property
    def cut(self) -> float | None:
        """Half-way between two scores; as many lie below as channels went. None went: no cut."""
        ordered, gone = np.sort(self.values), int((~self.kept).sum())
        return float(ordered[gone - 1 : gone + 1].mean()) if gone else None


def layer_rows(
    analysis: Analysis, pruned: nn.Module, ids: Tensor, kept: Mapping[str, dict[int, Kept]]
) -> list[LayerRow]:
    """All modules that have parameters, and calls that cost something, as they first run.

    `ids` is the mask of kept ids, `kept` the same for parameters. Parameters count once where tied,
    and come to the network's; multiply-accumulates do where the batch divides each of them.
    """
    widths, costs = dict(_widths(analysis, kept)), _macs(analysis, ids)
    before, after = _params(analysis.model, analysis.model), _params(analysis.model, pruned)
    names = dict.fromkeys([*costs, *before])
    return [
        LayerRow(n, widths.get(n), (before.get(n, 0), after.get(n, 0)), costs.get(n, (0, 0)))
        for n in names
    ]


def _widths(
    analysis: Analysis, kept: Mapping[str, dict[int, Kept]]
) -> Iterator[tuple[str, Change]]:
    """The widths of layers that multiply; of several weights of one, those of the first."""
    seen: set[str] = set()
    for use in analysis.flow.uses.values():
        for param in [*use.params.values()][: bool(use.rule.macs)]:
            slots = analysis.flow.ids.slots.get(param, ())
            made = next((slot for slot in slots if slot.role != "in"), None)
            if made is not None and _owner(param) not in seen:
                seen.add(_owner(param))
                size = analysis.tensors[param].shape[made.dim]
                yield _owner(param), (size, kept_size(kept.get(param, {}).get(made.dim), size))


def _macs(analysis: Analysis, ids: Tensor) -> dict[str, Change]:
    """Multiply-accumulates by layer, in the order of the first call."""
    found: dict[str, list[int]] = {}
    for node, use in analysis.flow.uses.items():
        total = found.setdefault(_layer(node, use), [0, 0])
        total[0] += use.macs()
        total[1] += use.macs(ids)
    batch = max(analysis.batch, 1)
    return {n: (old // batch, new // batch) for n, (old, new) in found.items() if old}


def _layer(node: fx.Node, use: DimsUse) -> str:
    """The module whose parameters a call reads; the call itself where it reads none."""
    if node.op == "call_module":
        return node.target
    read = (each.target for each in node.all_input_nodes if each.op == "get_attr")
    params = [*use.params.values(), *read]
    return _owner(params[0]) if params else node.name


def _params(original: nn.Module, module: nn.Module) -> dict[str, int]:
    """How many parameters of `module` each of the original's modules owns."""
    own, seen = dict(module.named_parameters(remove_duplicate=False)), set()
    found: dict[str, int] = {}
    for name, _ in original.named_parameters(remove_duplicate=False):
        tensor = own.get(name)
        if tensor is not None and id(tensor) not in seen:
            seen.add(id(tensor))
            found[_owner(name)] = found.get(_owner(name), 0) + math.prod(tensor.shape)
    return found


def _owner(param: str) -> str:
    return param.rpartition(".")[0] or param
