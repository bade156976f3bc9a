"""What fxprune makes of one network of a zoo: pruned by half, measured, and looked at."""

from __future__ import annotations

import re
import time
from collections import Counter, defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import nn

import fxprune
from benchmarks import common
from benchmarks.zoo_networks import Network
from fxprune.errors import NothingToPrune, VerificationError

OUTPUT = "reaches the network's output"
Record = dict[str, Any]
Say = Callable[[str], None]


def pruned_by_fxprune(network: Network, record: Record, say: Say) -> Any:
    """Prune by half with all defaults; the result and what was kept of every parameter, or None.
    What else was found is written to the record."""
    marks = Marks()
    common.settle_memory()
    before = common.memory()
    say("prune")
    marks.start = time.perf_counter()
    try:
        verify: Any = "shapes" if network.large else True
        pruned = fxprune.prune(network.model, network.args, rate=0.5, verify=verify, watch=marks)
    except Exception as error:
        record["verdict"], record["why"] = failure(error)
        pruned = None
    record["seconds"] = time.perf_counter() - marks.start
    record["memory"] = max(common.peak_since_reset() - before, 0)
    if "rewrite" in marks.at:
        record["seconds_unverified"] = marks.at["rewrite"]
        record["memory_unverified"] = max(marks.peak["rewrite"] - before, 0)
    if marks.analysis is not None:
        record |= channels(marks.analysis)
    elif pruned is not None:
        record |= channels(fxprune.analyze(network.model, network.args))
    if pruned is None:
        return None
    record |= reported(pruned)
    return pruned, pruned.fxprune.plan.kept


class Marks:
    """Watches the steps: when each ended, the memory until then, and the analysis they share."""

    def __init__(self) -> None:
        self.start = 0.0
        self.at: dict[str, float] = {}
        self.peak: dict[str, int] = {}
        self.analysis: Any = None

    def __call__(self, step: str, before: Any, after: Any) -> None:
        self.at[step] = time.perf_counter() - self.start
        self.peak[step] = common.peak_since_reset()
        if step == "rewrite":
            self.analysis = before[0]


def failure(error: Exception) -> tuple[str, str]:
    """A verdict for an exception of prune, and its first line."""
    why = first_line(error)
    if isinstance(error, NothingToPrune):
        return "nothing pruned", why
    if isinstance(error, VerificationError):
        if "changed its shape" in why:
            return "shape changed", why
        if "differs from" in why:
            return "differs", why
    return f"error: {type(error).__name__}", why


def first_line(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0][:300]


def channels(analysis: fxprune.Analysis) -> Record:
    """How many channels there are, may go, and are the network's own outputs; why the others stay,
    by the three costliest reasons."""
    found: Counter[str] = Counter()
    where: dict[str, str] = defaultdict(str)
    for group in analysis.frozen:
        reason = re.sub(r"%\w+", "%", group.reason)
        found[reason] += group.channels
        where[reason] = where[reason] or group.source
    costliest = found.most_common()
    costliest = [(reason, n) for reason, n in costliest if reason != OUTPUT][:3]
    return {
        "channels": sum(map(len, analysis.groups)),
        "prunable": sum(len(group) for group in analysis.groups if group.prunable),
        "outputs": found[OUTPUT],
        "frozen": [[reason, n, where[reason]] for reason, n in costliest],
    }


def reported(pruned: Any) -> Record:
    report = pruned.fxprune.report
    found: Record = {
        "frontend": report.frontend,
        "params": list(report.params),
        "macs": list(report.macs),
        "warnings": len(report.warnings),
    }
    checked = report.verification
    if checked is not None:
        found["verified"] = {
            "difference": checked.difference,
            "dtype": checked.dtype,
            "reference": checked.reference,
            "note": checked.note,
        }
    return found


def warm_fxprune() -> None:
    """Import everything and read every rule, on a network of three layers."""
    net = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
    fxprune.prune(net.eval(), torch.randn(1, 3, 8, 8), rate=0.5)
