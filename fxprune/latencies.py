"""How long networks take, with honest statistics.

Networks that are compared take turns within one run, in both orders, so that a machine that gets
warmer or busier slows all of them. The figure is the median of all rounds; its interval comes from
order statistics, which assume no distribution. A ratio is the median of the ratios of each round.
Nothing is thrown away: samples far from the others are counted, not removed.
"""

from __future__ import annotations

import copy
import gc
import math
import statistics
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import nn

from .check import check_count, device_of, usable_device
from .errors import InputError, ModelError, OptionError, first_line
from .inputs import Inputs, batched, candidates, given, of_spec, random_like
from .progress import Progress, unseen

_BLOCK_S = 0.002  # a sample is as many calls as take so long: clocks are coarse
_LEAST = 8  # rounds; 6 are needed for an interval of 95 %
_STABLE = 0.05


@dataclass(frozen=True)
class Measured:
    """Milliseconds of one call of a network: the median, its interval, and how it was measured.

    ``rounds`` samples were taken, each the mean of ``calls`` calls. ``outliers`` of them are far
    from the others (more than five deviations, by the median absolute one); they count. ``drift``
    is how much slower the second half of the rounds was than the first (0.1: a tenth). ``settled``
    says whether the times had become stable before measuring began.
    """

    name: str
    device: str
    batch: int
    median_ms: float
    low_ms: float
    high_ms: float
    rounds: int
    calls: int
    outliers: int
    drift: float
    settled: bool
    samples_ms: tuple[float, ...] = ()

    def __str__(self) -> str:
        odd = f", {self.outliers} outliers" if self.outliers else ""
        return (
            f"{self.name} on {self.device}, batch {self.batch}: {self.median_ms:.3f} ms "
            f"[{self.low_ms:.3f}, {self.high_ms:.3f}] ({self.rounds} rounds{odd})"
        )


@dataclass(frozen=True)
class Speedup:
    """How many times as long the first network takes as another, round by round."""

    name: str
    of: str
    device: str
    batch: int
    median: float
    low: float
    high: float

    def __str__(self) -> str:
        return (
            f"{self.name} on {self.device}, batch {self.batch}: {self.median:.2f} times as fast as "
            f"{self.of} [{self.low:.2f}, {self.high:.2f}]"
        )


@dataclass(frozen=True)
class Latency:
    """What was measured. Intervals hold the true median with the probability ``confidence``, as
    long as rounds do not depend on each other."""

    measured: tuple[Measured, ...]
    speedups: tuple[Speedup, ...]
    threads: int
    confidence: float
    torch: str

    def __str__(self) -> str:
        threads = f"{self.threads} thread{'s' if self.threads > 1 else ''}"
        head = f"{threads}, torch {self.torch}, {self.confidence:.0%} intervals"
        return "\n".join([head, *map(str, self.measured), *map(str, self.speedups)])

    def to_dict(self) -> dict[str, Any]:
        """All of it as plain data."""
        return asdict(self)


@dataclass
class _Runner:
    """One network on one device with its inputs, ready to be called."""

    name: str
    model: nn.Module
    inputs: Inputs
    device: torch.device
    calls: int = 1
    settled: bool = False

    def seconds(self) -> float:
        """The time of a call, as the mean of a block of calls."""
        timer = _cuda_seconds if self.device.type == "cuda" else _wall_seconds
        return timer(self, self.calls) / self.calls

    def call(self) -> Any:
        return self.model(*self.inputs.args, **self.inputs.kwargs)


def latency(
    networks: nn.Module | Mapping[str, nn.Module],
    example_inputs: Any = None,
    *,
    device: str | torch.device | None = None,
    batch_sizes: Sequence[int] = (1,),
    threads: int | None = None,
    rounds: int | None = None,
    budget_s: float = 5.0,
    confidence: float = 0.95,
    progress: Progress | None = None,
) -> Latency:
    """Measure how long a network takes, or several beside each other.

    Args:
        networks: a module, or modules by name: ``{"before": model, "after": pruned}``. The others
            are compared with the first.
        example_inputs: as in `fxprune.prune`; without them, those that one of the networks was
            pruned with, or usual ones; repeated along the batch for each of `batch_sizes`.
        device: where to measure; networks that are elsewhere are copied. Default: where they are.
        threads: of torch, while measuring; by default as many as it has.
        rounds: how many; by default as many as fit into `budget_s` seconds a batch size, at least 8
            and at most 1000.
        progress: called with what is measured and the share that is done.

    The networks run in eval mode without gradients; their modes, and torch's threads, are as before
    when it is over. Raises `InputError` where a network does not run on the inputs.
    """
    named = {type(networks).__name__: networks} if isinstance(networks, nn.Module) else networks
    _check(named, batch_sizes, threads, rounds, budget_s, confidence)
    plan = _Plan(rounds, budget_s, confidence, progress or unseen)
    measured: list[Measured] = []
    speedups: list[Speedup] = []
    with _settings(named, threads):
        inputs = _inputs([*named.values()], example_inputs)
        where = {name: _on(device, model) for name, model in named.items()}
        for batch in batch_sizes:
            runners = [_runner(*each, inputs, batch) for each in where.items()]
            found, ratios = _measured(runners, batch, plan)
            measured += found
            speedups += ratios
        used = torch.get_num_threads()
    return Latency(tuple(measured), tuple(speedups), used, confidence, torch.__version__)


@dataclass(frozen=True)
class _Plan:
    rounds: int | None
    budget_s: float
    confidence: float
    progress: Progress


def _check(
    named: Any, batch_sizes: Any, threads: Any, rounds: Any, budget: Any, confidence: Any
) -> None:
    if not isinstance(named, Mapping) or not named:
        kind = type(named).__name__
        raise OptionError(f"networks is a {kind}", hint='{"before": model, "after": pruned}')
    for name, each in named.items():
        if not isinstance(each, nn.Module):
            raise ModelError(f"network `{name}` is a {type(each).__name__}, not a torch.nn.Module")
    for batch in batch_sizes:
        check_count("batch_sizes", batch)
    if threads is not None:
        check_count("threads", threads)
    if rounds is not None:
        check_count("rounds", rounds)
    if not 0 < budget < float("inf"):
        raise OptionError(f"budget_s={budget!r} must be a number of seconds above 0")
    if not 0.5 <= confidence < 1:
        raise OptionError(f"confidence={confidence!r} is outside [0.5, 1)", hint="0.95 is usual")


# -- networks and inputs ---------------------------------------------------------------------------


@contextmanager
def _settings(named: Mapping[str, nn.Module], threads: int | None) -> Iterator[None]:
    """Eval mode, no gradients, threads and no garbage collection; all as before afterwards."""
    before = torch.get_num_threads()
    modes = [(m, m.training) for model in named.values() for m in model.modules()]
    collects = gc.isenabled()
    try:
        if threads is not None:
            torch.set_num_threads(threads)
        for module, _ in modes:
            module.training = False
        gc.collect()
        gc.disable()
        with torch.no_grad():
            yield
    finally:
        for module, mode in modes:
            module.training = mode
        torch.set_num_threads(before)
        if collects:
            gc.enable()


def _on(device: str | torch.device | None, model: nn.Module) -> nn.Module:
    """The model itself, or a copy on another device."""
    if device is None:
        return model
    wanted = usable_device(device)
    return model if _same_place(wanted, device_of(model)) else copy.deepcopy(model).to(wanted)


def _same_place(wanted: torch.device, found: torch.device) -> bool:
    return wanted.type == found.type and wanted.index in (None, found.index)


def _inputs(models: list[nn.Module], example_inputs: Any) -> Inputs:
    """The inputs given, those of which a pruned network knows, or usual ones."""
    model = models[0]
    if example_inputs is not None:
        return given(example_inputs, model)
    infos = (getattr(each, "fxprune", None) for each in models)
    specs = (info.plan.inputs for info in infos if info is not None)
    known = next((spec for spec in specs if spec is not None), None)
    if known is not None:
        return of_spec(known)
    for inputs in candidates(model):
        try:
            _runner("", model, inputs, 1).call()
        except Exception:  # whatever a model raises on inputs that it does not take
            continue
        return inputs
    raise InputError(f"no usual input fits {type(model).__name__}", hint="pass example_inputs=(x,)")


def _runner(name: str, model: nn.Module, inputs: Inputs, batch: int) -> _Runner:
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    device = device_of(model)
    return _Runner(
        name, model, random_like(batched(inputs, batch), dtype=dtype, device=device), device
    )


# -- measuring -------------------------------------------------------------------------------------


def _measured(
    runners: list[_Runner], batch: int, plan: _Plan
) -> tuple[list[Measured], list[Speedup]]:
    what = f"batch {batch} on {runners[0].device}"
    plan.progress(f"warm up, {what}", 0.0)
    for runner in runners:
        _warm_up(runner, batch, plan.budget_s, len(runners))
    samples = _rounds(runners, plan, f"measure {what}")
    found = [_summed(r, batch, s, plan.confidence) for r, s in zip(runners, samples, strict=True)]
    ratios = [_speedup(runners, i, batch, samples, plan.confidence) for i in range(1, len(runners))]
    return found, ratios


def _warm_up(runner: _Runner, batch: int, budget: float, count: int) -> None:
    """Call until the last times are like those before them, for a share of the budget, or all of it
    where ten calls take so long; then choose how many calls a sample takes. `InputError` where the
    network does not run."""
    try:
        runner.seconds()
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        raise InputError(
            f"{runner.name} does not run on a batch of {batch}: {first_line(error)}",
            hint="other sizes may work, or other example inputs",
        ) from error
    start, times = time.perf_counter(), [runner.seconds()]
    while not _is_stable(times) and len(times) < 1000:
        spent = time.perf_counter() - start
        if spent > (budget if len(times) < 10 else budget / 2 / count):
            break
        times.append(runner.seconds())
    runner.settled = _is_stable(times)
    runner.calls = max(1, min(1000, math.ceil(_BLOCK_S / max(statistics.median(times[-5:]), 1e-7))))


def _is_stable(times: list[float]) -> bool:
    if len(times) < 10:
        return False
    old, new = statistics.median(times[-10:-5]), statistics.median(times[-5:])
    return abs(new - old) <= _STABLE * old


def _rounds(runners: list[_Runner], plan: _Plan, what: str) -> list[list[float]]:
    """Samples of each network, in seconds; odd rounds go backwards, so that no one is always
    first."""
    samples: list[list[float]] = [[] for _ in runners]
    order = list(range(len(runners)))
    start = time.perf_counter()
    for done in range(plan.rounds or 1000):
        spent = time.perf_counter() - start
        if plan.rounds is None and done >= _LEAST and spent > plan.budget_s:
            break
        plan.progress(what, done / plan.rounds if plan.rounds else min(1.0, spent / plan.budget_s))
        for i in order if done % 2 == 0 else reversed(order):
            samples[i].append(runners[i].seconds())
    return samples


def _wall_seconds(runner: _Runner, calls: int) -> float:
    _synchronize(runner.device)
    start = time.perf_counter()
    for _ in range(calls):
        runner.call()
    _synchronize(runner.device)
    return time.perf_counter() - start


def _cuda_seconds(runner: _Runner, calls: int) -> float:
    """By the GPU's own clock, between two events."""
    with ExitStack() as stack:
        stack.enter_context(torch.cuda.device(runner.device))
        _synchronize(runner.device)
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            runner.call()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000


def _synchronize(device: torch.device) -> None:
    if device.type != "cpu":
        torch.get_device_module(device).synchronize()


# -- statistics ------------------------------------------------------------------------------------


def median_interval(samples: Sequence[float], confidence: float) -> tuple[float, float, float]:
    """The median, and the two samples between which the true median lies.

    Each sample is below it with probability 1/2, whatever the distribution: the k-th lowest and
    the k-th highest hold it between them with probability ``1 - 2 * P(Binomial(n, 1/2) < k)``. The
    largest k that keeps `confidence` is taken; with too few samples, their whole range.
    """
    ordered, n = sorted(samples), len(samples)
    outside, k = 0.0, 0
    while k < (n - 1) // 2 and 2 * (outside + math.comb(n, k) / 2**n) <= 1 - confidence:
        outside += math.comb(n, k) / 2**n
        k += 1
    at = max(k - 1, 0)
    return statistics.median(ordered), ordered[at], ordered[n - 1 - at]


def outliers(samples: Sequence[float]) -> int:
    """How many samples lie more than five deviations from the median; the deviation is 1.4826
    times the median absolute one, which equals the standard deviation of normal noise."""
    middle = statistics.median(samples)
    deviation = 1.4826 * statistics.median(abs(s - middle) for s in samples)
    return sum(abs(s - middle) > 5 * deviation for s in samples) if deviation else 0


def _drift(samples: Sequence[float]) -> float:
    half = len(samples) // 2
    if not half:
        return 0.0
    return statistics.median(samples[half:]) / statistics.median(samples[:half]) - 1


def _summed(runner: _Runner, batch: int, seconds: list[float], confidence: float) -> Measured:
    ms = [s * 1000 for s in seconds]
    return Measured(
        runner.name,
        str(runner.device),
        batch,
        *median_interval(ms, confidence),
        rounds=len(ms),
        calls=runner.calls,
        outliers=outliers(ms),
        drift=_drift(ms),
        settled=runner.settled,
        samples_ms=tuple(ms),
    )


def _speedup(
    runners: list[_Runner], i: int, batch: int, samples: list[list[float]], confidence: float
) -> Speedup:
    """Of two times measured one after the other, most of what disturbs is the same."""
    first, other = runners[0], runners[i]
    ratios = [a / b for a, b in zip(samples[0], samples[i], strict=True)]
    where = (str(first.device), batch)
    return Speedup(other.name, first.name, *where, *median_interval(ratios, confidence))


__all__ = ["Latency", "Measured", "Speedup", "latency", "median_interval", "outliers"]
