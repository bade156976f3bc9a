"""A training on disk, so that a killed run goes on where it was."""

from __future__ import annotations

import pickle
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import nn
from torch.optim import Optimizer

from .errors import OptionError, SaveError, first_line
from .files import write_whole
from .history import History, Place, random_state
from .penalties import attached

_ANEW = "name another file, or delete this one to begin anew"
_BROKEN = (RuntimeError, ValueError, KeyError, TypeError, AttributeError)


class Run(Protocol):
    """What a file holds beside the place: anything that has these."""

    model: nn.Module
    optimizer: Optimizer
    device: torch.device


@dataclass
class Checkpoint:
    """The file that holds a run: weights, the optimizer's state, random numbers, and the place."""

    path: Path
    every: int
    about: dict[str, Any]

    def save(self, run: Run, at: Place) -> None:
        state = {
            "fxprune": "finetune",
            "about": self.about,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "penalties": [penalty.state_dict() for penalty in attached(run.optimizer)],
            "random": random_state(run.device),
            "place": [at.epoch, at.batch],
            "losses": torch.tensor(at.history.losses, dtype=torch.float64),
            "seconds": at.history.seconds,
        }
        write_whole(self.path, lambda made: torch.save(state, made))

    def load(self, run: Run) -> Place:
        """Put what the file holds into the run; the beginning where there is no file."""
        if not self.path.exists():
            return Place()
        state = self._read()
        holders: list[Any] = [run.optimizer, *attached(run.optimizer)]
        before = [holder.state_dict() for holder in holders]
        try:
            history = History(state["losses"].tolist(), state["seconds"])
            epoch, batch = state["place"]
            place = Place(epoch, batch, history, state["random"])
            _check_tensors(state["model"], run.model.state_dict())
            _put(holders, [state["optimizer"], *state["penalties"]])
            run.model.load_state_dict(state["model"])  # last: weights are written over
            return place
        except (OptionError, *_BROKEN) as error:
            _put(holders, before)
            raise SaveError(
                f"{self.path} does not fit this model and optimizer",
                details=[("why", first_line(error))],
                hint="delete the file to begin anew",
            ) from None

    def _read(self) -> dict[str, Any]:
        try:
            state = torch.load(self.path, map_location="cpu", weights_only=True)
        except (RuntimeError, OSError, EOFError, ValueError, KeyError, pickle.PickleError) as error:
            raise SaveError(
                f"{self.path} cannot be read", details=[("why", first_line(error))], hint=_ANEW
            ) from None
        if not isinstance(state, dict) or state.get("fxprune") != "finetune":
            raise SaveError(f"{self.path} is no checkpoint of fxprune.finetune", hint=_ANEW)
        theirs = state.get("about", {})
        wrong = [key for key, value in self.about.items() if theirs.get(key) != value]
        if wrong:
            raise SaveError(
                f"{self.path} is of another run: {wrong[0]} was {theirs.get(wrong[0])}, "
                f"and is {self.about[wrong[0]]}",
                hint="call finetune as before, or delete the file to begin anew",
            )
        return state


def _check_tensors(stored: Mapping[str, Any], own: Mapping[str, Any]) -> None:
    """Raise `ValueError` where a file's weights are not those of a model: putting them in would
    stop at the first that does not fit, with the others changed."""
    missing = [*(own.keys() - stored.keys()), *(stored.keys() - own.keys())]
    if missing:
        where = "the file" if min(missing) in own else "the model"
        raise ValueError(f"{min(missing)} is not in {where}")
    for name, tensor in own.items():
        shapes = [list(getattr(each, "shape", ())) for each in (stored[name], tensor)]
        if shapes[0] != shapes[1]:
            raise ValueError(f"{name} is {shapes[0]} in the file, and {shapes[1]} in the model")


def _put(holders: list[Any], states: list[Any]) -> None:
    for holder, state in zip(holders, states, strict=True):
        holder.load_state_dict(state)
