"""Training a pruned network, with its dense one as teacher where there is one, so that a killed run
goes on where it was."""

from __future__ import annotations

import math
import os
import pickle
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_map_only

from .check import check_choice, check_count, check_share, device_of, usable_device
from .distilling import Loss, distance, task_loss
from .errors import InputError, ModelError, OptionError, SaveError, first_line
from .files import write_whole
from .penalties import attached, check_number

Progress = Callable[[int, int, float], Any]
Makes = Callable[[Iterable[nn.Parameter]], Optimizer]


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


def finetune(
    model: nn.Module,
    data: Iterable[Any],
    *,
    teacher: nn.Module | None = None,
    epochs: int = 1,
    steps: int | None = None,
    loss: Loss | None = None,
    optimizer: Optimizer | Makes | None = None,
    lr: float = 0.01,
    schedule: Literal["one_cycle", "cosine"] | None = "one_cycle",
    temperature: float = 4.0,
    alpha: float = 0.5,
    device: str | torch.device | None = None,
    progress: Progress | None = None,
    checkpoint: str | os.PathLike[str] | None = None,
    every: int = 100,
    seed: int = 0,
) -> History:
    """Train a (pruned) network in place: ``fxprune.finetune(pruned, loader, teacher=model)``.

    A network that is in training mode trains with its modes as they are, so that layers in eval
    mode stay so; any other is put into training mode for the time. Frozen parameters stay. The
    caller's random numbers are not used up.

    Args:
        model: the network; what `fxprune.prune` gave, or any other.
        data: a DataLoader, a list or another iterable of (inputs, targets) that can be gone through
            more than once. Inputs: a tensor, a tuple of arguments, or a dict of keyword arguments.
        teacher: a network with the same outputs, as the dense one: the loss is then ``alpha`` times
            the distance of outputs and ``1 - alpha`` times the task's. It is not changed.
        epochs: how often `data` is gone through. Data without a length need `steps` instead.
        steps: how many steps are made, in place of `epochs`.
        loss: a function of outputs and targets; else cross entropy for class numbers, the mean
            squared error for floats.
        optimizer: one that holds the model's parameters, or a function of parameters that makes
            one; else SGD with Nesterov momentum 0.9 and weight decay 1e-4. One that was handed in
            keeps its own learning rate, and `lr` is not used.
        lr: the highest learning rate.
        schedule: of the learning rate: "one_cycle" (up for 30% of the steps, then down), "cosine"
            (down), or None.
        temperature: by which a teacher's logits are softened.
        alpha: the share of the teacher.
        device: where to train; the model is moved there. Else where it is.
        progress: called with steps done, steps in all, and the loss, after every step.
        checkpoint: a file that holds the run, written anew after so many steps as `every` says and
            at the end. If it is there, the run goes on from it, and ends with the weights of a run
            that was never killed, bit for bit, where batches depend on torch's random numbers
            alone and the device computes the same each time. Penalties that are attached to the
            optimizer are in it; attach them again, in the same order, before going on.
        every: steps between two writings of `checkpoint`.
        seed: of the order of batches, dropout and the like.

    Raises `OptionError` for options that cannot be used, `InputError` for data that give nothing or
    something else than pairs, `ModelError` where nothing is trained or the loss is not finite, and
    `SaveError` where the checkpoint cannot be read or is of another run.
    """
    check_number("lr", lr)
    check_share("alpha", alpha, whole=True)
    check_choice("schedule", schedule, (None, "one_cycle", "cosine"))
    check_count("every", every)
    _check_temperature(temperature)
    _check_teacher(teacher, model)
    total = _total(data, epochs, steps)
    if device is not None:
        model.to(usable_device(device))
    where = device_of(model)
    run = _Run(
        model, teacher, loss or task_loss, temperature, alpha, _made(optimizer, model, lr), where
    )
    about = {"total": total, "seed": seed, "schedule": str(schedule), "alpha": alpha}
    about |= {"temperature": temperature, "lr": run.rates, "teacher": teacher is not None}
    file = _Checkpoint(Path(checkpoint), every, about) if checkpoint is not None else None
    with _random(seed, where), _modes(model, teacher):
        return _train(run, data, total, _FACTORS[schedule], seed, progress, file)


def _train(
    run: _Run,
    data: Iterable[Any],
    total: int,
    factor: Callable[[float], float],
    seed: int,
    progress: Progress | None,
    file: _Checkpoint | None,
) -> History:
    """Go through the data until all steps are made."""
    at = file.load(run) if file is not None else _Place()
    history, began = at.history, time.perf_counter() - at.history.seconds
    try:
        for batch in _batches(data, at, total, seed, run.device):
            run.set_rate(factor(history.steps / total))
            history.losses.append(run.step(batch, history.steps))
            history.seconds = time.perf_counter() - began
            if file is not None and (history.steps % file.every == 0 or history.steps == total):
                file.save(run, at)
            if progress is not None:
                progress(history.steps, total, history.losses[-1])
    finally:
        run.set_rate(1.0)
    return history


# -- a step ----------------------------------------------------------------------------------------


@dataclass
class _Run:
    """What makes a step."""

    model: nn.Module
    teacher: nn.Module | None
    loss: Loss
    temperature: float
    alpha: float
    optimizer: Optimizer
    device: torch.device

    def __post_init__(self) -> None:
        self.rates = [float(group["lr"]) for group in self.optimizer.param_groups]

    def set_rate(self, factor: float) -> None:
        for group, rate in zip(self.optimizer.param_groups, self.rates, strict=True):
            group["lr"] = rate * factor

    def step(self, batch: Any, done: int) -> float:
        """One update; the loss before it."""
        inputs, targets = _pair(batch, self.device)
        self.optimizer.zero_grad()
        loss = self._loss(inputs, targets)
        found = float(loss.detach())
        if not math.isfinite(found):
            raise ModelError(
                f"the loss is {found} at step {done + 1}",
                hint="a lower lr, or look for inputs that are not finite",
            )
        loss.backward()
        self.optimizer.step()
        return found

    def _loss(self, inputs: Any, targets: Any) -> Tensor:
        outputs = _call(self.model, inputs)
        if self.teacher is None:
            return self.loss(outputs, targets)
        with torch.no_grad():
            wanted = _call(self.teacher, inputs)
        far = distance(outputs, wanted, targets, self.temperature)
        if self.alpha == 1:
            return far
        return self.alpha * far + (1 - self.alpha) * self.loss(outputs, targets)


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, dict):
        return model(**inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _pair(batch: Any, device: torch.device) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise InputError(
            f"data gave a {type(batch).__name__}{size}, and no pair of inputs and targets",
            hint="a DataLoader of (inputs, targets), or a generator that makes these pairs",
        )
    inputs, targets = tree_map_only(Tensor, lambda each: each.to(device), tuple(batch))
    return inputs, targets


def _made(optimizer: Any, model: nn.Module, lr: float) -> Optimizer:
    params = [param for param in model.parameters() if param.requires_grad]
    if not params:
        raise ModelError("all parameters are frozen", hint="set requires_grad of some to True")
    if optimizer is None:
        return SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    found = optimizer if isinstance(optimizer, Optimizer) else optimizer(params)
    held = {id(param) for group in found.param_groups for param in group["params"]}
    if not any(id(param) in held for param in params):
        raise OptionError(
            "the optimizer holds no parameter of the model",
            hint="pruning makes new parameters: make the optimizer after it",
        )
    return found


# -- the order of batches --------------------------------------------------------------------------


@dataclass
class _Place:
    """Where in the data a run is, and the random numbers to go on with."""

    epoch: int = 0
    batch: int = 0
    history: History = field(default_factory=History)
    random: list[Tensor] | None = None


def _batches(
    data: Iterable[Any], at: _Place, total: int, seed: int, device: torch.device
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
                _set_random(at.random or [], device)
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
def _random(seed: int, device: torch.device) -> Iterator[None]:
    cards = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(devices=cards):
        torch.manual_seed(seed)
        yield


def _get_random(device: torch.device) -> list[Tensor]:
    cards = [torch.cuda.get_rng_state(device)] if device.type == "cuda" else []
    return [torch.get_rng_state(), *cards]


def _set_random(states: list[Tensor], device: torch.device) -> None:
    if not states:
        return
    torch.set_rng_state(states[0])
    if device.type == "cuda" and len(states) > 1:
        torch.cuda.set_rng_state(states[1], device)


@contextmanager
def _modes(model: nn.Module, teacher: nn.Module | None) -> Iterator[None]:
    """Training mode for a model that has none, eval for the teacher; as they were afterwards."""
    both = [model] if teacher is None else [model, teacher]
    modes = [(module, module.training) for each in both for module in each.modules()]
    if not model.training:
        model.train()
    if teacher is not None:
        teacher.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


# -- a run on disk ---------------------------------------------------------------------------------


_BROKEN = (RuntimeError, ValueError, KeyError, TypeError, AttributeError)


@dataclass
class _Checkpoint:
    """The file that holds a run: weights, the optimizer's state, random numbers, and the place."""

    path: Path
    every: int
    about: dict[str, Any]

    def save(self, run: _Run, at: _Place) -> None:
        state = {
            "fxprune": "finetune",
            "about": self.about,
            "model": run.model.state_dict(),
            "optimizer": run.optimizer.state_dict(),
            "penalties": [penalty.state_dict() for penalty in attached(run.optimizer)],
            "random": _get_random(run.device),
            "place": [at.epoch, at.batch],
            "losses": torch.tensor(at.history.losses, dtype=torch.float64),
            "seconds": at.history.seconds,
        }
        write_whole(self.path, lambda made: torch.save(state, made))

    def load(self, run: _Run) -> _Place:
        """Put what the file holds into the run; the beginning where there is no file."""
        if not self.path.exists():
            return _Place()
        state = self._read()
        try:
            run.model.load_state_dict(state["model"])
            run.optimizer.load_state_dict(state["optimizer"])
            for penalty, own in zip(attached(run.optimizer), state["penalties"], strict=True):
                penalty.load_state_dict(own)
            history = History(state["losses"].tolist(), state["seconds"])
            epoch, batch = state["place"]
            return _Place(epoch, batch, history, state["random"])
        except (OptionError, *_BROKEN) as error:
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
                f"{self.path} cannot be read", details=[("why", first_line(error))]
            ) from None
        if not isinstance(state, dict) or state.get("fxprune") != "finetune":
            raise SaveError(f"{self.path} is no checkpoint of fxprune.finetune")
        theirs = state.get("about", {})
        wrong = [key for key, value in self.about.items() if theirs.get(key) != value]
        if wrong:
            raise SaveError(
                f"{self.path} is of another run: {wrong[0]} was {theirs.get(wrong[0])}, "
                f"and is {self.about[wrong[0]]}",
                hint="call finetune as before, or delete the file to begin anew",
            )
        return state


# -- options ---------------------------------------------------------------------------------------


def _one_cycle(done: float) -> float:
    if done < 0.3:
        return 0.04 + 0.96 * (1 - math.cos(math.pi * done / 0.3)) / 2
    return (1 + math.cos(math.pi * (done - 0.3) / 0.7)) / 2


_FACTORS: dict[str | None, Callable[[float], float]] = {
    "one_cycle": _one_cycle,
    "cosine": lambda done: (1 + math.cos(math.pi * done)) / 2,
    None: lambda done: 1.0,
}


def _total(data: Any, epochs: int, steps: int | None) -> int:
    if steps is not None:
        check_count("steps", steps)
        return steps
    check_count("epochs", epochs)
    try:
        size = len(data)
    except TypeError:
        raise OptionError(
            f"{type(data).__name__} has no length, so that epochs={epochs} says no number of steps",
            hint="give steps=",
        ) from None
    if not size:
        raise InputError("data holds no batch", hint="a DataLoader with drop_last may hold none")
    return epochs * size


def _check_temperature(value: Any) -> None:
    check_number("temperature", value)
    if value == 0:
        raise OptionError("temperature=0", hint="a number above 0; 1 softens nothing")


def _check_teacher(teacher: Any, model: nn.Module) -> None:
    if teacher is None:
        return
    if not isinstance(teacher, nn.Module):
        raise OptionError(f"teacher is a {type(teacher).__name__}", hint="a torch.nn.Module")
    own = {id(param) for param in model.parameters()}
    if any(id(param) in own for param in teacher.parameters()):
        raise OptionError("teacher and model share parameters", hint="the teacher is to stay")
