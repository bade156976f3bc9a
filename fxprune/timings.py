"""Times of single calls, measured once a device and remembered in a file."""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import platform
import statistics
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import SaveError
from .files import write_text
from .inputs import Inputs
from .latencies import _BLOCK_S, _Runner, _warm_up
from .trees import leaves

_ROUNDS = range(3, 16)  # samples of one call: at least and at most
_LARGE = 31 << 20  # bytes: glibc adapts to blocks of up to 32 MiB
_CALL_S = 0.01
_FORMAT = 1


def default_folder() -> Path:
    """``FXPRUNE_CACHE``, or ``~/.cache/fxprune``."""
    named = os.environ.get("FXPRUNE_CACHE")
    return Path(named) if named else Path.home() / ".cache" / "fxprune"


def environment(device: torch.device, dtype: torch.dtype | None) -> dict[str, Any]:
    """What the times of all calls depend on, as plain data."""
    found: dict[str, Any] = {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "dtype": str(dtype).removeprefix("torch."),
    }
    if device.type == "cuda":
        found["cudnn"] = f"{torch.backends.cudnn.version()}"
        found["benchmark"] = torch.backends.cudnn.benchmark
        with contextlib.suppress(RuntimeError):  # refused where newer settings were used as well
            found["tf32"] = [torch.backends.cudnn.allow_tf32, torch.backends.cuda.matmul.allow_tf32]
    return found


def device_name(device: torch.device) -> str:
    """The model of a processor, as its maker calls it."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    if device.type != "cpu":
        return f"{device.type} {platform.machine()}"
    known = (line.partition(":") for line in _read("/proc/cpuinfo").splitlines())
    names = (text.strip() for label, _, text in known if label.strip() == "model name")
    kind = next(names, "") or platform.processor() or platform.machine()
    return f"{kind} {torch.backends.cpu.get_cpu_capability()}"


def _read(path: str | Path) -> str:
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return ""


def timed_ms(module: nn.Module, inputs: Inputs, device: torch.device, budget_s: float) -> float:
    """The median time of a call in milliseconds, measured for about `budget_s` seconds after as
    long a warm-up; `InputError` where the call fails."""
    _settled_allocator(device)
    runner = _Runner(type(module).__name__, module, inputs, device)
    _warm_up(runner, 1, budget_s, 1)
    block = min(1.0, budget_s / _ROUNDS.start / _BLOCK_S)
    runner.calls = max(1, round(runner.calls * block))
    samples: list[float] = []
    start = time.perf_counter()
    while len(samples) < _ROUNDS.stop:
        if len(samples) >= _ROUNDS.start and time.perf_counter() - start > budget_s:
            break
        samples.append(runner.seconds())
    return statistics.median(samples) * 1000


def _settled_allocator(device: torch.device) -> None:
    """The C library gives memory back to the system, and pays for new pages at each call, until
    something as large was freed once: a network has done so, an op alone might not."""
    if device.type == "cpu":
        torch.empty(_LARGE, dtype=torch.uint8)


@dataclass
class Timings:
    """Milliseconds by signature, in one environment; 0 for the empty one. ``measured`` counts what
    was measured in this run."""

    device: torch.device
    environment: Mapping[str, Any]
    folder: Path
    measured: int = 0

    def __post_init__(self) -> None:
        self.known = {"": 0.0, **self._stored()}

    @property
    def path(self) -> Path:
        """The file of this environment."""
        text = json.dumps(self.environment, sort_keys=True)
        return self.folder / f"latency-{hashlib.sha256(text.encode()).hexdigest()[:16]}.json"

    def again(
        self, name: str, module: nn.Module, inputs: Inputs, budget_s: float | None = None
    ) -> None:
        """Measure a call for about so many seconds after as long a warm-up; of what is known, the
        lower time is kept. `InputError` where the call fails."""
        _steady(module, inputs)
        budget_s = _CALL_S if budget_s is None else budget_s / 2
        found = timed_ms(module, inputs, self.device, budget_s)
        self.known[name] = min(found, self.known.get(name, found))
        self.measured += 1

    def save(self) -> None:
        """Write what is known, and what other processes have written meanwhile. A folder that
        cannot be written to costs time, and is no error."""
        if not self.measured:
            return
        data = {
            "format": _FORMAT,
            "environment": dict(self.environment),
            "ms": {**self._stored(), **self.known},
        }
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            write_text(self.path, json.dumps(data, indent=1))
        except (OSError, SaveError):
            return

    def _stored(self) -> dict[str, float]:
        """What the file holds; nothing where it is missing, damaged, or of another version."""
        try:
            data = json.loads(_read(self.path) or "{}")
        except (ValueError, RecursionError):
            return {}
        if not isinstance(data, dict) or data.get("format") != _FORMAT:
            return {}
        found = data.get("ms")
        return found if isinstance(found, dict) and all(map(_is_time, found.values())) else {}


def _is_time(value: Any) -> bool:
    return type(value) in (int, float) and math.isfinite(value) and value >= 0


def _steady(module: nn.Module, inputs: Inputs) -> None:
    """Set to zero what a call changes in place: halved again and again, numbers would get so small
    that processors take their time with them."""
    tensors = leaves(inputs.args, Tensor)
    before = [tensor._version for tensor in tensors]
    with contextlib.suppress(Exception):  # whatever a call raises, the clock's own call will too
        module(*inputs.args)
    for tensor, version in zip(tensors, before, strict=True):
        if tensor._version != version:
            tensor.zero_()
