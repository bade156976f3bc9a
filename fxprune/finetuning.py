"""Training a pruned network, with its dense one as teacher where there is one, so that a killed run
goes on where it was."""

from __future__ import annotations

import inspect
import math
import numbers
import os
import pickle
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import SGD, Optimizer
from torch.utils._pytree import tree_map_only

from .check import (
    check_choice,
    check_count,
    check_share,
    check_tensors,
    device_of,
    usable_device,
)
from .distilling import Loss, distance, lost, said, task_loss
from .errors import FxpruneError, InputError, ModelError, OptionError, SaveError, first_line
from .files import write_whole
from .inputs import Inputs
from .penalties import attached, check_number
from .progress import shown
from .trees import leaves

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


@torch.inference_mode(False)
@torch.enable_grad()
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
    progress: Progress | bool | None = None,
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
        loss: a function of outputs and targets that gives a tensor of one number; else cross
            entropy for class numbers, of any integer dtype, the mean squared error for floats.
        optimizer: one that holds the model's parameters, or a function of parameters that makes
            one; else SGD with Nesterov momentum 0.9 and weight decay 1e-4. One that was handed in
            keeps its own learning rate, and `lr` is not used. LBFGS, which computes losses as
            often as it likes, is refused.
        lr: the highest learning rate.
        schedule: of the learning rate: "one_cycle" (up for 30% of the steps, then down), "cosine"
            (down), or None.
        temperature: by which a teacher's logits are softened.
        alpha: the share of the teacher: 0 is the task's loss alone, 1 the teacher's.
        device: where to train; the model is moved there. Else where it is.
        progress: True for a bar on stderr, or a function, which is called with steps done, steps in
            all, and the loss, after every step.
        checkpoint: a file that holds the run, written anew after so many steps as `every` says and
            at the end. If it is there, the run goes on from it, and ends with the weights of a run
            that was never killed, bit for bit, where batches depend on torch's random numbers
            alone and the device computes the same each time. Penalties that are attached to the
            optimizer are in it; attach them again, in the same order, before going on.
        every: steps between two writings of `checkpoint`.
        seed: of the order of batches, dropout and the like.

    Raises `OptionError` for options that cannot be used, `InputError` for data that give nothing or
    something else than pairs that the model takes, `ModelError` where nothing is trained or the
    loss is not finite, and `SaveError` where the checkpoint cannot be read or written or is of
    another run; the model and the optimizer are then as they were.
    """
    _check_model(model)
    check_number("lr", lr)
    check_share("alpha", alpha, whole=True, hint=_ALPHA)
    check_choice("schedule", schedule, (None, "one_cycle", "cosine"))
    check_count("every", every)
    _check_temperature(temperature)
    _check_teacher(teacher, model)
    _check_loss(loss)
    seed = _checked_seed(seed)
    path = _checked_path(checkpoint)
    total = _total(data, epochs, steps)
    if device is not None:
        model.to(usable_device(device))
    where = device_of(model)
    run = _Run(
        model,
        teacher,
        task_loss if loss is None else loss,
        temperature,
        alpha,
        _made(optimizer, model, lr),
        where,
    )
    about = {"total": total, "seed": seed, "schedule": str(schedule), "alpha": alpha}
    about |= {"temperature": temperature, "lr": run.rates, "teacher": teacher is not None}
    file = _Checkpoint(path, every, about) if path is not None else None
    with _seen(progress) as seen, _random(seed, where), _modes(model, teacher):
        return _train(run, data, total, _FACTORS[schedule], seed, seen, file)


def _train(
    run: _Run,
    data: Iterable[Any],
    total: int,
    factor: Callable[[float], float],
    seed: int,
    progress: Progress,
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
        loss = self._loss(inputs, targets, done + 1)
        found = float(loss.detach())
        if not math.isfinite(found):
            raise ModelError(
                f"the loss is {found} at step {done + 1}",
                hint="a lower lr, or look for inputs that are not finite",
            )
        loss.backward()
        self.optimizer.step()
        return found

    def _loss(self, inputs: Any, targets: Any, step: int) -> Tensor:
        outputs = _called("model", self.model, inputs, step)
        if self.teacher is None:
            return _sound(lost(self.loss, outputs, targets))
        with torch.no_grad():
            wanted = _called("teacher", self.teacher, inputs, step)
        far = distance(outputs, wanted, targets, self.temperature)
        if self.alpha == 1:
            return _sound(far)
        return self.alpha * far + (1 - self.alpha) * _sound(lost(self.loss, outputs, targets))


def _called(what: str, model: nn.Module, inputs: Any, step: int) -> Any:
    """What a network gives; `InputError` where it does not run."""
    given = _arguments(inputs)
    try:
        return model(*given.args, **given.kwargs)
    except (FxpruneError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        raise InputError(
            f"the {what} does not run on the batch of step {step}: {first_line(error)}",
            details=[("batch", given.describe())],
            hint="inputs are a tensor, a tuple of forward's arguments, or a dict of them, of the "
            "model's shapes and dtypes",
        ) from error


def _arguments(inputs: Any) -> Inputs:
    if isinstance(inputs, dict):
        return Inputs((), inputs)
    return Inputs(tuple(inputs) if isinstance(inputs, (tuple, list)) else (inputs,), {})


def _sound(loss: Any) -> Tensor:
    """A loss that can be gone down; `OptionError` for what a function gave in its place."""
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise OptionError(f"loss gives {said(loss)}", hint="a tensor of one number, as a mean")
    if not loss.requires_grad:
        raise OptionError(
            "the loss depends on no parameter that is trained",
            hint="it must depend on the output through autograd: without detach, item or numpy",
        )
    return loss.reshape(())


def _pair(batch: Any, device: torch.device) -> tuple[Any, Any]:
    if not isinstance(batch, (tuple, list)) or len(batch) != 2:
        size = f" of {len(batch)}" if isinstance(batch, (tuple, list)) else ""
        raise InputError(
            f"data gave a {type(batch).__name__}{size}, and no pair of inputs and targets",
            hint="a DataLoader of (inputs, targets), or a list of these pairs: one batch is "
            "data=[(X, Y)]",
        )
    check_tensors(batch)
    inputs, targets = tree_map_only(Tensor, lambda each: _usable(each, device), tuple(batch))
    first = next((t for t in leaves(inputs, Tensor) if t.ndim), None)
    if first is not None and not len(first):
        raise InputError("a batch of data holds no items", hint="batches of one item at least")
    return inputs, targets


def _usable(tensor: Tensor, device: torch.device) -> Tensor:
    """On a device; a copy of what was made in inference mode, through which no gradient goes."""
    moved = tensor.to(device)
    return moved.clone() if moved.is_inference() else moved


def _made(optimizer: Any, model: nn.Module, lr: float) -> Optimizer:
    params = [param for param in model.parameters() if param.requires_grad]
    if not params:
        raise ModelError("all parameters are frozen", hint="set requires_grad of some to True")
    if any(tensor.is_inference() for tensor in (*model.parameters(), *model.buffers())):
        raise ModelError(
            "the model was made in torch.inference_mode, and cannot be trained",
            hint="make or load it outside of inference_mode",
        )
    if optimizer is None:
        return SGD(params, lr=lr, momentum=0.9, nesterov=True, weight_decay=1e-4)
    found = optimizer if isinstance(optimizer, Optimizer) else _from(optimizer, params)
    closure = inspect.signature(found.step).parameters.get("closure")
    if closure is not None and closure.default is closure.empty:
        raise OptionError(
            f"{type(found).__name__} computes losses as often as it likes",
            hint="an optimizer that makes a step from one gradient, as SGD or AdamW",
        )
    held = {id(param) for group in found.param_groups for param in group["params"]}
    if not any(id(param) in held for param in params):
        raise OptionError(
            "the optimizer holds no parameter of the model",
            hint="pruning makes new parameters: make the optimizer after it",
        )
    return found


def _from(makes: Any, params: list[nn.Parameter]) -> Optimizer:
    """What a function of parameters makes; `OptionError` where it is no optimizer."""
    if not callable(makes):
        raise OptionError(f"optimizer is a {type(makes).__name__}", hint=_OPTIMIZER)
    try:
        found = makes(params)
    except Exception as error:
        raise OptionError(f"optimizer fails: {first_line(error)}", hint=_OPTIMIZER) from error
    if not isinstance(found, Optimizer):
        raise OptionError(f"optimizer gives {said(found)}", hint=_OPTIMIZER)
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


_ANEW = "name another file, or delete this one to begin anew"
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
        holders: list[Any] = [run.optimizer, *attached(run.optimizer)]
        before = [holder.state_dict() for holder in holders]
        try:
            history = History(state["losses"].tolist(), state["seconds"])
            epoch, batch = state["place"]
            place = _Place(epoch, batch, history, state["random"])
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
    if not isinstance(data, Iterable) and not hasattr(data, "__getitem__"):
        hint = "a DataLoader of (inputs, targets), or a list of such pairs"
        raise InputError(f"data is a {type(data).__name__}", hint=hint)
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


_ALPHA = "0 is the task's loss alone, 1 the teacher's"
_OPTIMIZER = (
    "an optimizer that holds the model's parameters, or a function of parameters that makes one: "
    "lambda params: torch.optim.AdamW(params, lr=1e-3)"
)


@contextmanager
def _seen(progress: Any) -> Iterator[Progress]:
    """A user's choice as a function of steps done, steps in all, and the loss."""
    if callable(progress):
        yield progress
        return
    if progress not in (None, True, False):
        hint = "True for a bar, or a function of steps done, steps in all, and the loss"
        raise OptionError(f"progress={progress!r} is no way to show progress", hint=hint)
    with shown(progress) as bar:
        yield lambda done, total, loss: bar("train", done / total)


def _check_model(model: Any) -> None:
    """Wrapped models, which cannot be pruned, can be trained."""
    if not isinstance(model, nn.Module):
        raise ModelError(
            f"a torch.nn.Module is needed, not {type(model).__name__}",
            hint="pass the model object itself",
        )


def _check_loss(loss: Any) -> None:
    if loss is not None and not callable(loss):
        raise OptionError(
            f"loss is a {type(loss).__name__}", hint="a function of outputs and targets"
        )


def _checked_seed(seed: Any) -> int:
    whole = isinstance(seed, numbers.Integral) and not isinstance(seed, bool)
    if not whole or abs(int(seed)) >= 2**62:
        raise OptionError(f"seed={seed!r} is no whole number", hint="seed=0, or another one")
    return int(seed)


def _checked_path(path: Any) -> Path | None:
    """Where the checkpoint is to be; `SaveError` where no file can be written there, which is
    better known before the training than after its first part."""
    if path is None:
        return None
    if not isinstance(path, (str, os.PathLike)):
        raise OptionError(f"checkpoint is a {type(path).__name__}", hint="the name of a file")
    found = Path(path)
    if found.is_dir():
        raise SaveError(f"{found} cannot be written: it is a folder", hint="name a file in it")
    try:
        tempfile.TemporaryFile(dir=found.parent, prefix=f".{found.name}-").close()
    except OSError as error:
        hint = "make the folder first, or name another"
        raise SaveError(f"{found} cannot be written: {error.strerror}", hint=hint) from None
    return found


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
