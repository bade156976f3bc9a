"""Training a pruned network, with its dense one as teacher where there is one, so that a killed run
goes on where it was."""

from __future__ import annotations

import inspect
import math
import numbers
import os
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
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
from .checkpoints import Checkpoint
from .distilling import Loss, distance, lost, said, task_loss
from .errors import FxpruneError, InputError, ModelError, OptionError, SaveError, first_line
from .history import History, Place, in_order, seeded
from .inputs import Inputs
from .penalties import check_number
from .progress import shown
from .trees import leaves

Progress = Callable[[int, int, float], Any]
Makes = Callable[[Iterable[nn.Parameter]], Optimizer]


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
    file = Checkpoint(path, every, about) if path is not None else None
    with _seen(progress) as seen, seeded(seed, where), _modes(model, teacher):
        return _train(run, data, total, _FACTORS[schedule], seed, seen, file)


def _train(
    run: _Run,
    data: Iterable[Any],
    total: int,
    factor: Callable[[float], float],
    seed: int,
    progress: Progress,
    file: Checkpoint | None,
) -> History:
    """Go through the data until all steps are made."""
    at = file.load(run) if file is not None else Place()
    history, began = at.history, time.perf_counter() - at.history.seconds
    try:
        for batch in in_order(data, at, total, seed, run.device):
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
