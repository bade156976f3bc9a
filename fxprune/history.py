"""How far a training has come: its history, its place in the data, and the random numbers there."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from .errors import InputError


@dataclass
class History:
    """What a training was: the loss of each step, and the seconds it took, over all runs of it."""

    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0

    @property
    def steps(self) -> int:
        return len(self.losses)

    def __repr__(self) -> str:
        last = f", the last loss {self.losses[-1]:.4g}" if self.losses else ""
        return f"<History of {self.steps:,} steps in {self.seconds:.1f} s{last}>"


@dataclass
class Place:
    """Where in the data a run is, and the random numbers to go on with."""

    epoch: int = 0
    batch: int = 0
    history: History = field(default_factory=History)
    random: list[Tensor] | None = None


def in_order(
    data: Iterable[Any], at: Place, total: int, seed: int, device: torch.device
) -> Iterator[Any]:
    """Batches of the steps that are left, each epoch in an order of its own seed."""
    while at.history.steps < total:
        _seed_order(data, seed + at.epoch)
        skip, given = at.batch, 0
        for batch in data:
            given += 1
            if given < skip:
                continue
            if given == skip:  # only now: what was skipped drew some; and before the next one does
                set_random_state(at.random or [], device)
                continue
            at.batch = given
            yield batch
            if at.history.steps >= total:
                return
        if given == 0 or given < skip:
            raise InputError(
                f"data gave {given} batches in epoch {at.epoch + 1}",
                hint="data that can be gone through again: a DataLoader or a list, no generator",
            )
        at.epoch, at.batch, at.random = at.epoch + 1, 0, None


def _seed_order(data: Any, seed: int) -> None:
    torch.manual_seed(seed)
    for holder in (data, getattr(data, "sampler", None)):
        generator = getattr(holder, "generator", None)
        if isinstance(generator, torch.Generator):
            generator.manual_seed(seed)
    set_epoch = getattr(getattr(data, "sampler", None), "set_epoch", None)
    if callable(set_epoch):  # of a DistributedSampler
        set_epoch(seed)


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        torch.manual_seed(seed)
        yield


def random_state(device: torch.device) -> list[Tensor]:
    cards = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cards]


def set_random_state(states: list[Tensor], device: torch.device) -> None:
    if not states:
        return
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)
