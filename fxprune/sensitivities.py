"""How sensitive each group of channels is, seen on data: `sensitivity`."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from pydantic import BaseModel, ConfigDict, ValidationError
from torch import Tensor, nn

from .check import check_model, check_share, check_tensors, clone, tensors_of
from .criteria import CriterionLike
from .curves import Sensitivity
from .damage import Damage, Loss, Metric, Point, Question, as_batch
from .engines import Engine, answers, check_engine, one_thread
from .errors import InputError, OptionError, nearest
from .files import write_text
from .frontends import Frontend
from .ignore import by_name
from .progress import Progress, shown
from .told import bytes_of, told
from .trees import leaves

_OPTIONS = (
    *("only", "ignore", "reduce", "min_channels", "max_rate", "round_to"),
    *("mixing", "scatter", "heads"),
)


@torch.inference_mode(False)
def sensitivity(
    model: nn.Module,
    data: Any,
    example_inputs: Any = None,
    *,
    loss: Loss | None = None,
    metric: Metric | None = None,
    rates: Sequence[float] = (0.25, 0.5, 0.75, 0.9),
    criterion: CriterionLike = "l2",
    workers: int = 1,
    engine: Engine = None,
    progress: Progress | bool | None = None,
    cache: str | os.PathLike[str] | None = None,
    frontend: Frontend | None = None,
    strict: bool = False,
    **options: Any,
) -> Sensitivity:
    """How much worse a network gets when one group of channels alone is pruned, at several rates.

    The network is evaluated in eval mode and on one thread; `model` is not changed. Groups that
    constraints bind together, as those of a grouped convolution, are pruned together.

    Args:
        model: any `torch.nn.Module`.
        data: batches, as a list or a DataLoader, gone through once and kept. A pair is
            (inputs, target); anything else is inputs: a tensor, a dict of forward's arguments, or
            a tuple of one or of three and more (two are written ``((a, b), None)``).
        example_inputs: as in `fxprune.prune`; the first batch's inputs if missing.
        loss: a function of the network's output and a batch's target that gives a scalar, averaged
            over the samples. By default as in `fxprune.prune`, cross entropy for classes and the
            squared error for targets shaped as the output; where there are no such targets, the
            mean squared difference to the unpruned network's own outputs.
        metric: in its place, a function of a network and `data`, which can be anything then, that
            gives a number: the larger, the better, as accuracy is.
        rates: shares of a group's channels, in (0, 1).
        criterion: which channels go first, as in `fxprune.prune`: one of weights, as `data` are for
            the loss alone and `fisher` and others would rank by them.
        workers: how many processes share the work; each gets the model and the data once. What is
            found is the same, to the last bit.
        engine: "ray" for its tasks, or an object with a `map` as the executors of
            `concurrent.futures` have, in the place of processes.
        progress: True for a bar on stderr, or a function, which is called with what was tried and
            the share that is done.
        cache: a JSON file for what is known already, so that a run that was stopped goes on. That
            of another network, other data or other options is refused; functions are told apart by
            their code and what it closes over, not by what other modules do when they call them.
        frontend: as in `fxprune.prune`.
        strict: as in `fxprune.prune`.
        options: only, ignore, reduce, min_channels, max_rate, round_to, mixing, scatter and heads,
            as in `fxprune.prune`.

    Raises what `fxprune.prune` raises; `OptionError` for data, options or a cache that do not fit,
    and for what cannot be sent to another process; `InputError` for a batch that the network does
    not run on; `ModelError` where the unpruned network's own loss is no finite number.
    """
    check_model(model)
    check_engine(engine, workers)
    if cache is not None and not isinstance(cache, (str, os.PathLike)):
        raise OptionError(f"cache is a {type(cache).__name__}", hint="the name of a JSON file")
    asked = Question(
        clone(model).eval(),
        _kept(data, loss, metric),
        example_inputs,
        {"criterion": criterion, **_named(options, model)},
        loss,
        metric,
        frontend,
        strict,
    )
    if example_inputs is None and metric is None:
        asked = _with_example(asked)
    with shown(progress) as seen, one_thread():
        damage = Damage(asked)
        points = damage.points(_checked(rates))
        known = _known(damage, cache)
        _try(damage, points, known, workers, engine, seen)
    return _found(damage, points, known)


def _try(
    damage: Damage,
    points: list[Point],
    known: _Known,
    workers: int,
    engine: Engine,
    progress: Progress,
) -> None:
    """Ask for every point that is not known yet."""
    left = [point for point in points if _key(point) not in known.losses]
    for done, (point, value) in enumerate(
        answers(damage, left, workers, engine), len(points) - len(left) + 1
    ):
        known.add(point, value)
        progress(f"{point.name}, {point.gone} of {point.size} channels", done / len(points))


def _found(damage: Damage, points: list[Point], known: _Known) -> Sensitivity:
    groups: dict[str, list[tuple[float, float]]] = {}
    sign = 1 if damage.asked.metric is None else -1
    for point in sorted(points, key=lambda point: point.gone / point.size):
        value = known.losses[_key(point)]
        if value is not None:
            worse = sign * (value - known.base)
            groups.setdefault(point.name, []).append((point.gone / point.size, worse))
    return Sensitivity(
        model=type(damage.asked.model).__name__,
        criterion=str(damage.chosen.criterion),
        measure="loss" if damage.asked.metric is None else "metric",
        base=known.base,
        groups={name: groups[name] for name in damage.families if name in groups},
        together=_together(damage, groups),
    )


def _together(damage: Damage, groups: Mapping[str, Any]) -> dict[str, str]:
    """Groups without a curve of their own, and whose they share."""
    named = damage.analysis.groups
    return {
        named[i].name: first
        for first, family in damage.families.items()
        for i in family[1:]
        if first in groups and named[i].name not in groups
    }


# -- what is asked ---------------------------------------------------------------------------------


def _kept(data: Any, loss: Any, metric: Any) -> Any:
    """The batches, which are gone through many times; what a metric reads is its own."""
    for name, given in (("loss", loss), ("metric", metric)):
        if given is not None and not callable(given):
            hint = "a function of (output, target)" if name == "loss" else "of (network, data)"
            raise OptionError(f"{name} is a {type(given).__name__}, and no function", hint=hint)
    if metric is not None:
        if loss is not None:
            raise OptionError("loss and metric are both given", hint="one of them is measured")
        return data
    if isinstance(data, (Tensor, Mapping, str)) or not isinstance(data, Iterable):
        kind = type(data).__name__
        hint = "a list of batches, or a DataLoader: [(images, labels), ...]"
        raise OptionError(f"data is a {kind}, and no series of batches", hint=hint)
    batches = list(data)
    if not batches:
        raise OptionError("data has no batches", hint="a few hundred samples say much already")
    _check_batches(data, batches)
    if loss is not None and any(as_batch(batch)[1] is None for batch in batches):
        raise OptionError("a batch has no target for loss=", hint="batches are (inputs, target)")
    return batches


def _check_batches(data: Any, batches: list[Any]) -> None:
    """Raise for what is no series of batches, or holds one that says nothing."""
    for number, batch in enumerate(batches):
        check_tensors(batch)
        first = next((t for t in leaves(as_batch(batch)[0], Tensor) if t.ndim), None)
        if first is not None and not len(first):
            hint = "batches of one item at least; a DataLoader's sampler may give none"
            raise InputError(f"batch {number} of data holds no items", hint=hint)
    if isinstance(data, (tuple, list)) and len(data) == 2 and _is_pair(data):
        raise OptionError(
            "data is a pair of tensors that differ, and no series of batches",
            hint="one batch is data=[(X, Y)]",
        )


def _is_pair(data: Any) -> bool:
    """Whether these are inputs and targets. Two batches are alike, pictures up to their size."""
    if not all(isinstance(each, Tensor) for each in data):
        return False
    one, other = data
    alike = one.dtype == other.dtype and one.ndim == other.ndim
    return not alike or (isinstance(data, tuple) and one.shape[1:] != other.shape[1:])


def _with_example(asked: Question) -> Question:
    return replace(asked, inputs=as_batch(asked.data[0])[0])


def _named(options: Mapping[str, Any], model: nn.Module) -> dict[str, Any]:
    """Options of choice, with modules by their names."""
    for name in options:
        if name not in _OPTIONS:
            hint = nearest(name, _OPTIONS) or ", ".join(_OPTIONS)
            raise OptionError(f"sensitivity has no option `{name}`", hint=hint)
    given = {name: value for name, value in options.items() if value is not None}
    return {
        name: by_name(value, model) if name in ("only", "ignore") else value
        for name, value in given.items()
    }


def _checked(rates: Any) -> list[float]:
    if isinstance(rates, str) or not isinstance(rates, Iterable):
        raise OptionError(f"rates={rates!r} is no series of rates", hint="rates=(0.25, 0.5)")
    found = list(rates)
    for rate in found:
        check_share("rates", rate, hint="shares above 0 and below 1, as in rates=(0.25, 0.5)")
    if not found or min(found) <= 0:
        raise OptionError(f"rates={rates!r} must hold shares above 0", hint="rates=(0.25, 0.5)")
    return sorted({float(rate) for rate in found})


# -- what is known ---------------------------------------------------------------------------------


class _Known(BaseModel):
    """Losses found so far, those of an earlier run too. ``of`` says of which network and data."""

    model_config = ConfigDict(extra="forbid", ser_json_inf_nan="constants")
    of: str
    base: float
    losses: dict[str, float | None] = {}
    _path: Path | None = None

    def add(self, point: Point, value: float | None) -> None:
        self.losses[_key(point)] = value
        self.write()

    def write(self) -> None:
        if self._path is not None:
            write_text(self._path, self.model_dump_json(indent=1))


def _key(point: Point) -> str:
    return f"{point.name}: {point.gone} of {point.size}"


def _known(damage: Damage, cache: str | os.PathLike[str] | None) -> _Known:
    if cache is None:
        return _Known(of="", base=damage.base())
    path, of = Path(cache), _fingerprint(damage.asked)
    found = _read(path, of) if path.exists() else _Known(of=of, base=damage.base())
    found._path = path
    found.write()
    return found


def _read(path: Path, of: str) -> _Known:
    try:
        found = _Known.model_validate_json(path.read_bytes())
    except (ValidationError, OSError):
        hint = "name another file, or delete this one"
        raise OptionError(f"{path} is no cache of fxprune.sensitivity", hint=hint) from None
    if found.of != of:
        raise OptionError(
            f"the cache {path} is of another network, other data or other options",
            hint="name another file, or delete this one",
        )
    return found


def _fingerprint(asked: Question) -> str:
    """Equal for runs whose losses are the same. Of what a metric reads, only tensors are seen."""
    found = hashlib.sha256()
    for name, tensor in tensors_of(asked.model).items():
        found.update(f"{name} {tuple(tensor.shape)}".encode() + bytes_of(tensor))
    for tensor in leaves(asked.data, Tensor):
        found.update(str(tuple(tensor.shape)).encode() + bytes_of(tensor))
    how = (asked.options, asked.loss, asked.metric, asked.frontend, type(asked.model))
    found.update(told(how).encode())
    return found.hexdigest()
