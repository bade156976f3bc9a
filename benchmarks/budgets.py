"""Budgets: how near they are met, and what a budget of operations gives in time.

    python -m benchmarks.budgets [--networks resnet50 ...] [--output budgets.json]
    python -m benchmarks.budgets --speed

The first prints, for each network, what is left at several targets. The second prunes networks with
``round_to="auto"``: to half of their multiply-accumulates, by the knapsack and by one rate for all
layers, and to `TIME` of their latency; and measures them beside each other, in PyTorch and in ONNX
Runtime.
Weights are random: widths are chosen by scores that say little, their cost is what it is.
"""

from __future__ import annotations

import argparse
import itertools
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

import fxprune

from .common import torchvision_model

NETWORKS = (
    "resnet18", "resnet50", "vgg16", "mobilenet_v2", "mobilenet_v3_large", "shufflenet_v2_x1_0",
    "densenet121", "efficientnet_b0", "regnet_y_400mf", "googlenet", "mnasnet1_0", "convnext_tiny",
)  # fmt: skip
TARGETS: tuple[dict[str, Any], ...] = (
    {"target": {"macs": 0.5}},
    {"target": {"macs": 0.3}},
    {"target": {"params": 0.5}},
    {"target": {"macs": 0.5, "params": 0.4}},
    {"target": {"macs": 0.5}, "round_to": "auto"},
    {"target": {"macs": 0.5}, "scope": "local"},
)
TIME = 0.7  # of the unpruned network, for a batch of 1
TIMED = ("resnet50", "vgg16", "mobilenet_v2")
X = torch.zeros(1, 3, 224, 224)


def met(name: str) -> dict[str, Any]:
    """For each target: the costs in shares of what was asked, and the seconds the choice took."""
    model = torchvision_model(name)
    analysis, found = fxprune.analyze(model, X), {}
    for options in TARGETS:
        start = time.perf_counter()
        plan = fxprune.plan(analysis, criterion="l2", **options)
        seconds = time.perf_counter() - start
        left = fxprune.count(analysis, plan=plan)
        whole = fxprune.count(analysis)
        costs = {"macs": left.macs / whole.macs, "params": left.parameters / whole.parameters}
        shares = {kind: costs[kind] / asked for kind, asked in options["target"].items()}
        found[str(options)] = {"of target": shares, "seconds": seconds}
        print(f"{name:20} {options}: {_shown(shares)} of the target, {seconds:.1f} s", flush=True)
    return found


def _shown(shares: dict[str, float]) -> str:
    return ", ".join(f"{kind} {share:.2%}" for kind, share in shares.items())


def speed(name: str, budget_s: float) -> dict[str, Any]:
    """Operations and time before over after, in both runtimes, for a batch of 1 and of 8; for each
    batch all networks are measured in turns."""
    model = torchvision_model(name)
    table = fxprune.LatencyTable.measure(fxprune.analyze(model, X))
    ways: dict[str, dict[str, Any]] = {
        "knapsack": {"target": {"macs": 0.5}},
        "one rate": {"target": {"macs": 0.5}, "scope": "local"},
        "latency": {"target": {"latency_ms": TIME * table.ms()}, "latency_table": table},
    }
    how: dict[str, Any] = {"round_to": "auto", "verify": "shapes"}
    made = {way: fxprune.prune(model, X, **how, **options) for way, options in ways.items()}
    rows = {way: {"macs": _ratio(pruned.fxprune.report.macs)} for way, pruned in made.items()}
    for batch, runtime in itertools.product((1, 8), RUNTIMES):
        x = X.expand(batch, -1, -1, -1).contiguous()
        both = {each: RUNTIMES[runtime](m, x) for each, m in ({"before": model} | made).items()}
        found = fxprune.latency(both, x, batch_sizes=(batch,), threads=1, budget_s=budget_s)
        for each in found.speedups:
            rows[each.name][f"{runtime}, batch {batch}"] = each.median
            share = each.median / rows[each.name]["macs"]
            print(f"{name:14} {runtime:12} {each}: {share:.2f} of the ratio of MACs", flush=True)
    print(name, {way: round(row["macs"], 3) for way, row in rows.items()}, flush=True)
    return rows


class Exported(torch.nn.Module):
    """A network in ONNX Runtime, on one thread of the CPU."""

    def __init__(self, model: torch.nn.Module, x: torch.Tensor):
        import onnxruntime

        super().__init__()
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        with tempfile.TemporaryDirectory() as folder:
            file = str(Path(folder) / "network.onnx")
            torch.onnx.export(model.eval(), (x,), file, dynamo=True, verbose=False)
            self.session = onnxruntime.InferenceSession(file, options)
        self.input = self.session.get_inputs()[0].name

    def forward(self, x: torch.Tensor) -> Any:
        return self.session.run(None, {self.input: x.numpy()})

    def __deepcopy__(self, memo: dict[int, Any]) -> Exported:
        return self  # a session cannot be copied, and nothing changes it


RUNTIMES: dict[str, Callable[[torch.nn.Module, torch.Tensor], torch.nn.Module]] = {
    "torch": lambda model, x: model,
    "onnxruntime": Exported,
}


def _ratio(macs: tuple[int, int]) -> float:
    before, after = macs
    return before / after


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--networks", nargs="+", default=[])
    parser.add_argument("--speed", action="store_true")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds a measurement")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.speed:
        found = {name: speed(name, args.budget) for name in args.networks or TIMED}
    else:
        found = {name: met(name) for name in args.networks or NETWORKS}
    if args.output:
        args.output.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
