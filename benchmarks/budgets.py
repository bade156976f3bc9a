"""Budgets: how near they are met, and what a budget of operations gives in time.

    python -m benchmarks.budgets [--networks resnet50 ...] [--output budgets.json]
    python -m benchmarks.budgets --speed

The first prints, for each network, what is left at several targets. The second prunes networks to
half of their multiply-accumulates with ``round_to="auto"``, by the knapsack and by one rate for all
layers, and measures them beside each other.
Weights are random: widths are chosen by scores that say little, their cost is what it is.
"""

from __future__ import annotations

import argparse
import json
import time
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
    """Operations and time before over after, for a batch of 1 and of 8, all measured in turns."""
    model = torchvision_model(name)
    how: dict[str, Any] = {"target": {"macs": 0.5}, "round_to": "auto", "verify": "shapes"}
    made = {
        "knapsack": fxprune.prune(model, X, **how),
        "one rate": fxprune.prune(model, X, scope="local", **how),
    }
    ratios = {way: _ratio(pruned.fxprune.report.macs) for way, pruned in made.items()}
    both = {"before": model, **made}
    found = fxprune.latency(both, X, batch_sizes=(1, 8), threads=1, budget_s=budget_s)
    rows: dict[str, Any] = {way: {"macs": ratio} for way, ratio in ratios.items()}
    for each in found.speedups:
        ratio = ratios[each.name]
        rows[each.name][f"batch {each.batch}"] = each.median
        print(
            f"{name:14} {ratio:.2f} times fewer MACs; {each}: {each.median / ratio:.2f} of the "
            f"ratio",
            flush=True,
        )
    return rows


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
