"""What the benchmarks share: networks to prune, tables to print, processes of their own."""

from __future__ import annotations

import contextlib
import ctypes
import fnmatch
import gc
import json
import multiprocessing
import os
import platform
import resource
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import IO, Any

import torch
from rich.console import Console
from rich.table import Table
from torch import nn

ROOT = Path(__file__).resolve().parents[1]
TRANSFORMERS = ("maxvit*", "mvit*", "swin*", "vit_*")
BATCH_NORM = nn.modules.batchnorm._BatchNorm


# -- networks --------------------------------------------------------------------------------------


def torchvision_cnns(only: str = "*") -> list[str]:
    """Names of torchvision's classification, segmentation and video CNNs and of the float forms of
    its quantizable ones, those that match `only`."""
    from torchvision import models

    homes = (models, models.segmentation, models.video, models.quantization)
    names = [name for home in homes for name in models.list_models(module=home)]
    names = [n for n in names if not any(matches(n, t) for t in TRANSFORMERS)]
    return [name for name in names if matches(name, only)]


def matches(name: str, pattern: str) -> bool:
    """Whether a name fits a shell-style pattern."""
    return fnmatch.fnmatchcase(name, pattern)


def torchvision_model(name: str, **options: Any) -> nn.Module:
    """A torchvision model with random weights, the same on every call, in eval mode."""
    from torchvision import models

    torch.manual_seed(0)
    home = models.get_model_builder(name).__module__
    if ".segmentation." in home or ".detection." in home:
        options.setdefault("weights_backbone", None)
    if "googlenet" in name or "inception" in name:
        options.setdefault("init_weights", False)  # truncated normals take half a minute
    if name.startswith("quantized_"):
        options.setdefault("quantize", False)
    return models.get_model(name, weights=None, **options).eval()


def randomised(model: nn.Module, *args: Any) -> nn.Module:
    """The model with random scales and shifts of its normalisations, and running statistics near
    those of its inputs, so that its outputs depend on them as a trained network's do."""
    torch.manual_seed(1)
    norms = [m for m in model.modules() if isinstance(m, BATCH_NORM)]
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, (BATCH_NORM, nn.LayerNorm, nn.GroupNorm)):
                _draw_affine(module)
        for norm in norms:
            norm.train()
            norm.momentum = 1.0
        model(*args)
        for norm in norms:
            norm.momentum = 0.1
            _blur(norm)
    return model.eval()


def _draw_affine(norm: Any) -> None:
    if norm.weight is not None:
        norm.weight.uniform_(0.5, 1.5)
    if norm.bias is not None:
        norm.bias.normal_(0.0, 0.2)


def _blur(norm: Any) -> None:
    """Move the statistics a little away from those of the batch."""
    mean, var = norm.running_mean, norm.running_var
    mean.add_(torch.randn_like(mean) * var.sqrt() * 0.1)
    var.mul_(torch.empty_like(var).uniform_(0.7, 1.4)).add_(1e-4)


# -- processes -------------------------------------------------------------------------------------


def apart(
    module: str, *arguments: str, limit: float, memory: float = float("inf")
) -> dict[str, Any]:
    """Run ``python -m module arguments`` in a process of its own; the JSON it prints last.

    A process that fails, takes longer than `limit` seconds or holds more than `memory` bytes gives
    ``{"problem": why, "ended": "code" | "time" | "memory"}``, over what it had printed by then.
    """
    command = [sys.executable, "-W", "ignore", "-m", module, *arguments]
    single = {**os.environ, "OMP_NUM_THREADS": "1"}
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        process = subprocess.Popen(command, cwd=ROOT, env=single, stdout=out, stderr=err, text=True)
        try:
            ended = _watched(process, out, limit, memory)
        finally:
            process.kill()
            process.wait()
        return _outcome(process, out, err, ended, limit, memory)


class Forked:
    """A process forked off one that has imported and warmed up all, with `subprocess`'s words."""

    def __init__(self, target: Callable[..., None], arguments: tuple, out: str, err: str):
        self.process = _server().Process(target=_redirected, args=(target, arguments, out, err))
        self.process.start()

    @property
    def pid(self) -> int:
        return self.process.pid or 0

    @property
    def returncode(self) -> int | None:
        return self.process.exitcode

    def poll(self) -> int | None:
        return self.process.exitcode

    def end(self) -> None:
        self.process.kill()
        self.process.join()


@cache
def _server() -> Any:
    os.environ["OMP_NUM_THREADS"] = "1"
    server = multiprocessing.get_context("forkserver")
    server.set_forkserver_preload(["benchmarks.zoo_warm"])
    return server


def _redirected(target: Callable[..., None], arguments: tuple, out: str, err: str) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    for path, stream in ((out, sys.stdout), (err, sys.stderr)):
        file = os.open(path, os.O_WRONLY | os.O_APPEND)
        os.dup2(file, stream.fileno())
    target(*arguments)
    sys.stdout.flush()


def _end_with_parent() -> None:
    """A forked process is the server's child, and would outlive who asked for it."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def forked(
    target: Callable[..., None],
    *arguments: Any,
    limit: float,
    opening: float,
    memory: float = float("inf"),
) -> dict[str, Any]:
    """As `apart`, for a function that prints JSON, in a forked process. It has `opening` seconds
    before it prints anything, and `limit` from one line to the next."""
    with tempfile.NamedTemporaryFile("w+") as out, tempfile.NamedTemporaryFile("w+") as err:
        process = Forked(target, arguments, out.name, err.name)
        try:
            ended = _watched(process, out, limit, memory, opening)
        finally:
            process.end()
        allowed = limit if _last_json(out) else opening
        return _outcome(process, out, err, ended, allowed, memory)


def _outcome(
    process: Any, out: IO[str], err: IO[str], ended: str, limit: float, memory: float
) -> dict[str, Any]:
    """What a process printed last, and what ended it before its time."""
    said = _last_json(out)
    if not ended and process.returncode == 0 and said is not None:
        return said
    problem = {"time": f"took more than {limit:.0f} s", "memory": _held(memory)}.get(ended)
    problem = problem or f"ended with code {process.returncode}: {_last_line(err)}"
    return {**(said or {}), "problem": problem, "ended": ended or "code"}


def _watched(
    process: Any, out: IO[str], limit: float, memory: float, opening: float | None = None
) -> str:
    """Wait for a process; "time" or "memory" where it broke a limit, else nothing."""
    start, printed = time.monotonic(), 0
    while process.poll() is None:
        time.sleep(0.05)
        size = os.fstat(out.fileno()).st_size
        if opening and size > printed:
            start, printed = time.monotonic(), size
        if time.monotonic() - start > (limit if printed or not opening else opening):
            return "time"
        if _status("VmHWM", process.pid) > memory:
            return "memory"
    return "memory" if process.returncode == -signal.SIGKILL else ""  # the system ran out of it


def _held(memory: float) -> str:
    return f"held more than {memory / 2**30:.1f} GiB"


def _last_json(out: IO[str]) -> dict[str, Any] | None:
    out.seek(0)
    for line in reversed(out.read().splitlines()):
        with contextlib.suppress(json.JSONDecodeError):
            if isinstance(found := json.loads(line), dict):
                return found
    return None


def _last_line(err: IO[str]) -> str:
    err.seek(0)
    return (err.read().strip().splitlines() or ["it said nothing"])[-1]


def peak_memory() -> int:
    """The most memory this process ever held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def memory() -> int:
    """The memory this process holds now, in bytes."""
    return _status("VmRSS") or peak_memory()


def settle_memory() -> None:
    """Give back what is free, and forget the highest memory so far."""
    gc.collect()
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    reset_peak()


def reset_peak() -> None:
    """Forget the highest memory so far, where the system can (Linux)."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")


def peak_since_reset() -> int:
    return _status("VmHWM") or peak_memory()


def _status(key: str, process: int | str = "self") -> int:
    with contextlib.suppress(OSError):
        for line in Path(f"/proc/{process}/status").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    return 0


# -- tables ----------------------------------------------------------------------------------------

Rows = Sequence[Sequence[str]]
console = Console(width=None if sys.stdout.isatty() else 180)


def show(title: str, columns: Sequence[str], rows: Rows) -> None:
    """Print a table."""
    table = Table(title=title)
    for i, column in enumerate(columns):
        table.add_column(column, justify="left" if i == 0 else "right", overflow="fold")
    for row in rows:
        table.add_row(*row)
    console.print(table)


def markdown(title: str, columns: Sequence[str], rows: Rows) -> str:
    """The same table as Markdown."""
    lines = [f"## {title}", "", "| " + " | ".join(columns) + " |"]
    lines.append("|" + "|".join("---" if i == 0 else "--:" for i in range(len(columns))) + "|")
    lines += ["| " + " | ".join(cell.replace("|", "\\|") for cell in row) + " |" for row in rows]
    return "\n".join(lines) + "\n"


def versions(*packages: str) -> str:
    """One line: the machine and the versions a measurement was made with."""
    from importlib.metadata import PackageNotFoundError, version

    found = []
    for package in ("torch", *packages):
        with contextlib.suppress(PackageNotFoundError):
            found.append(f"{package} {version(package)}")
    found = [f"Python {platform.python_version()}", *found, platform.machine()]
    return f"{', '.join(found)}, {os.cpu_count()} cores"


def write(path: str | None, heading: str, parts: Iterable[str]) -> None:
    """Write a Markdown file, where a path is given."""
    if path:
        Path(path).parent.mkdir(parents=True, exist_ok=True)
        Path(path).write_text(f"# {heading}\n\n" + "\n".join(parts))
        console.print(f"written to {path}")
