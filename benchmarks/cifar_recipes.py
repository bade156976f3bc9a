"""Recipes on trained CIFAR-10 ResNets: accuracy at half the MACs, after the same fine-tuning.

    python benchmarks/cifar_recipes.py DATA_FOLDER [--networks resnet20] [--seeds 3] [--steps 390]

DATA_FOLDER is that of examples/prune_resnet_cifar.py. Each way to prune gets the rate that leaves
half of the multiply-accumulates; then every network is fine-tuned alike, the unpruned one too. What
was measured already (``--output``, a JSON file) is not measured again, so a run that was stopped
goes on. `network_slimming` needs gammas trained to be sparse: it alone gets one more such phase,
with the penalty on, before it is pruned.
"""

from __future__ import annotations

import argparse
import copy
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from prune_resnet_cifar import Split, augmented, batches, images, normalised

Options = dict[str, Any]
WAYS: dict[str, Options] = {
    "distribution_fit (inner)": {"recipe": "distribution_fit_resnet:B"},
    "l1_filters (inner)": {"recipe": "l1_filters"},
    "ratio_sum, cumulative (inner)": {
        "criterion": "ratio_sum",
        "select_by": "cumulative",
        "only": ["role:inner"],
    },
    "network_slimming": {"recipe": "network_slimming"},
    "fpgm (stream kept)": {"recipe": "fpgm"},
    "distribution_fit (stream kept)": {"recipe": "distribution_fit_resnet:A"},
    "l1 (stream kept)": {"criterion": "l1", "scatter": True, "ignore": ["role:stem"]},
    "random (inner)": {"criterion": "random", "only": ["role:inner"]},
    "distribution_fit, middle of each bin (inner)": {
        "criterion": {"name": "distribution_fit", "redundancy": None},
        "only": ["role:inner"],
    },
}


def rate_for(model: nn.Module, x: Tensor, share: float, options: Options) -> float:
    """The rate that leaves this share of the MACs, by bisection on plans."""
    scatter = fxprune.recipes.find(options["recipe"]).scatter if "recipe" in options else False
    analysis = fxprune.analyze(model, x, scatter=options.get("scatter", scatter))
    rest = {key: value for key, value in options.items() if key != "scatter"}
    low, high, whole = 0.0, 0.99, analysis.macs()
    for _ in range(14):
        middle = (low + high) / 2
        plan = fxprune.plan(analysis, **rest, rate=middle)
        left = fxprune.count(analysis, plan=plan).macs / whole
        low, high = (middle, high) if left > share else (low, middle)
    return high


def fit(model: nn.Module, data: Split, steps: int, seed: int, s: float = 0.0) -> None:
    """SGD with a one-cycle rate on shifted and mirrored images; with s > 0 gammas are penalised."""
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    if s:
        fxprune.SparsityPenalty(model, s, all_bn=True).attach(optimizer)
    model.train()
    for x, y in _forever(data, steps, torch.Generator().manual_seed(seed)):
        loss = F.cross_entropy(model(x.contiguous(memory_format=torch.channels_last)), y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        schedule.step()


def _forever(data: Split, steps: int, generator: torch.Generator) -> Iterator[Split]:
    while steps > 0:
        order = torch.randperm(len(data[0]), generator=generator)[: steps * 128]
        for x, y in batches(data, 128, order):
            yield augmented(x, generator), y
        steps -= -(-len(order) // 128)


@torch.no_grad()
def accuracy(model: nn.Module, data: Split) -> float:
    model.eval()
    right = sum(int((model(x).argmax(1) == y).sum()) for x, y in batches(data, 500))
    return right / len(data[0])


class Run:
    """One network with its data; `rows` are what was measured."""

    def __init__(self, args: argparse.Namespace, name: str):
        self.args, self.name = args, name
        self.train = images(args.folder, args.cache, "train")
        self.test = images(args.folder, args.cache, "test")
        self.rows: dict[str, Any] = {}
        if args.output.exists():
            self.rows = json.loads(args.output.read_text())

    def dense(self) -> nn.Module:
        model = getattr(fxprune.models, self.name)()
        model.load_state_dict(load_file(self.args.folder / f"{self.name}.safetensors"))
        return model.to(memory_format=torch.channels_last).eval()

    def sparse(self, seed: int) -> nn.Module:
        model = self.dense()
        fit(model, self.train, self.args.steps, 1000 + seed, s=self.args.s)
        return model

    def measure(self, way: str, seed: int, make: Callable[[], tuple[nn.Module, Options]]) -> None:
        key = f"{self.name} | {way} | {self.args.steps} | {seed}"
        if key in self.rows:
            return
        start = time.perf_counter()
        model, known = make()
        row = {**known, "before": accuracy(model, self.test)}
        fit(model, self.train, self.args.steps, seed)
        row |= {"after": accuracy(model, self.test), "seconds": time.perf_counter() - start}
        self.rows[key] = row
        temporary = self.args.output.with_suffix(".tmp")
        temporary.write_text(json.dumps(self.rows, indent=1))
        os.replace(temporary, self.args.output)
        print(f"{key}: {row}", flush=True)

    def whole(self, seed: int) -> None:
        """All ways with one seed."""
        x = normalised(self.test[0][:2])
        macs = fxprune.count(self.dense(), x).macs

        def dense() -> tuple[nn.Module, Options]:
            return self.dense(), {"macs": macs, "share": 1.0}

        def pruned(options: Options) -> tuple[nn.Module, Options]:
            slim = options.get("recipe") == "network_slimming"
            model = self.sparse(seed) if slim else self.dense()
            rate = rate_for(model, x, self.args.macs, options)
            made = fxprune.prune(model, x, **{**options, "rate": rate})
            left, params = made.fxprune.report.macs[1], made.fxprune.report.params
            known = {"rate": rate, "macs": left, "share": left / macs, "params": params[1]}
            return copy.deepcopy(made), known

        self.measure("dense", seed, dense)
        for way, options in WAYS.items():
            if way in self.args.ways:
                self.measure(way, seed, lambda options=options: pruned(options))


def table(rows: dict[str, Any]) -> str:
    """The rows as Markdown: means over seeds, with the spread behind."""
    lines = [
        "| network | pruned by | MACs left | parameters | as pruned | fine-tuned | seeds |",
        "|---|---|--:|--:|--:|--:|--:|",
    ]
    found: dict[tuple[str, ...], list[dict[str, Any]]] = {}
    for key, row in rows.items():
        found.setdefault(tuple(key.split(" | ")[:3]), []).append(row)
    for (network, way, steps), same in found.items():
        before, after = ([100 * row[when] for row in same] for when in ("before", "after"))
        share = 100 * statistics.mean(row["share"] for row in same)
        params = statistics.mean(row.get("params", 0) for row in same)
        shown = f"{params:,.0f}" if params else "all"
        lines.append(
            f"| {network}, {steps} steps | {way} | {share:.1f} % | {shown} | {_spread(before)} | "
            f"{_spread(after)} | {len(same)} |"
        )
    return "\n".join(lines)


def _spread(values: list[float]) -> str:
    if len(values) == 1:
        return f"{values[0]:.2f}"
    return f"{statistics.mean(values):.2f} ± {statistics.stdev(values):.2f}"


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DATA_FOLDER")
    parser.add_argument("--cache", type=Path, required=True, help="folder for decoded images")
    parser.add_argument("--output", type=Path, default=Path("cifar_recipes.json"))
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"])
    parser.add_argument("--ways", nargs="+", default=list(WAYS), choices=list(WAYS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=391, help="of fine-tuning; 391 are an epoch")
    parser.add_argument("--macs", type=float, default=0.5, help="share of MACs to leave")
    parser.add_argument("--s", type=float, default=1e-4, help="penalty of sparse training")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    for seed in range(args.seeds):
        for name in args.networks:
            Run(args, name).whole(seed)
    print(table(json.loads(args.output.read_text())))


if __name__ == "__main__":
    main()
