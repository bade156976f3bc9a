"""What a choice of channels costs, in parts that are counted again only where a choice changed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
import torch
from torch import Tensor, nn

from .analysis import Analysis
from .ids import Slot
from .letters import DimsUse

Cost = Callable[[Tensor], float]  # of the mask of kept ids


@dataclass(frozen=True)
class Term:
    """One summand of a cost, and the channels it depends on."""

    cost: Cost
    channels: np.ndarray


def macs_terms(analysis: Analysis) -> Iterator[Term]:
    """Multiply-accumulates for one item of the batch, a node at a time."""
    batch, channel = max(analysis.batch, 1), analysis.all_groups.channel
    for use in analysis.flow.uses.values():
        if use.rule.macs:
            ids = [named.ids for named in use.layers]
            yield Term(partial(_macs, use, batch), _channels(channel, ids))


def _macs(use: DimsUse, batch: int, kept: Tensor) -> float:
    return use.macs(kept) / batch


def params_terms(analysis: Analysis) -> Iterator[Term]:
    """Elements of parameters, a parameter at a time."""
    channel = analysis.all_groups.channel
    for name, tensor in analysis.tensors.items():
        if isinstance(tensor, nn.Parameter):
            slots = analysis.flow.ids.slots.get(name, [])
            ids = [slot.ids for slot in slots]
            count = partial(_elements, slots, tuple(tensor.shape))
            yield Term(count, _channels(channel, ids))


def _channels(channel: np.ndarray, ids: list[Tensor]) -> np.ndarray:
    if not ids:
        return np.zeros(0, np.int64)
    found = np.unique(channel[torch.cat([each.reshape(-1) for each in ids]).numpy()])
    return found[found > 0]


def _elements(slots: list[Slot], size: tuple[int, ...], kept: Tensor) -> float:
    shape = [float(n) for n in size]
    for dim in {slot.dim for slot in slots}:
        masks = [kept[slot.ids] for slot in slots if slot.dim == dim]
        mask = masks[0] if len(masks) == 1 else torch.stack(masks).all(0)
        shape[dim] = float(mask.sum()) / (len(mask) if mask.ndim == 2 else 1)
    return math.prod(shape)


TERMS: Mapping[str, Callable[[Analysis], Iterator[Term]]] = {
    "macs": macs_terms,
    "params": params_terms,
}


class Costs:
    """The costs of a choice that changes step by step. ``kept``: channel number -> kept."""

    def __init__(self, analysis: Analysis, terms: Mapping[str, list[Term]]):
        channel = analysis.all_groups.channel
        order = np.argsort(channel, kind="stable")
        ends = np.searchsorted(channel[order], np.arange(int(channel.max()) + 2))
        self._ids = [order[a:b] for a, b in pairwise(ends)]
        self.kept = np.ones(len(self._ids), bool)
        self.ids = torch.ones(len(channel), dtype=torch.bool)
        self.terms = terms
        self.values = {k: np.array([t.cost(self.ids) for t in own]) for k, own in terms.items()}
        self.dense = self.total()
        self._touched: dict[int, list[tuple[str, int]]] = {}
        for kind, own in terms.items():
            for i, term in enumerate(own):
                for c in term.channels.tolist():
                    self._touched.setdefault(c, []).append((kind, i))

    def total(self) -> dict[str, float]:
        return {kind: float(values.sum()) for kind, values in self.values.items()}

    def touched(self, channels: np.ndarray) -> list[tuple[str, int]]:
        """The terms that a choice among channels changes."""
        return list({each for c in channels.tolist() for each in self._touched.get(c, ())})

    def put(self, channels: np.ndarray, keep: np.ndarray) -> None:
        """Keep those of `channels` that the mask `keep` says; costs are not counted yet."""
        changed = channels[self.kept[channels] != keep]
        self.kept[channels] = keep
        if len(changed):
            ids = np.concatenate([self._ids[c] for c in changed])
            self.ids[torch.from_numpy(ids)] = torch.from_numpy(
                np.concatenate([np.full(len(self._ids[c]), self.kept[c]) for c in changed])
            )

    def count(self, which: list[tuple[str, int]]) -> None:
        """Count some terms again."""
        for kind, i in which:
            self.values[kind][i] = self.terms[kind][i].cost(self.ids)
