"""Accuracy after pruning, beside Torch-Pruning: as pruned, and after the same short fine-tuning.

    python -m benchmarks.accuracy --cifar FOLDER --fashion FOLDER --cache FOLDER [--tasks resnet20]
    python -m benchmarks.accuracy --table            # the tables of what was measured so far

Each task is a trained network (`benchmarks/accuracy_data.py`). It is pruned to 70, 50 and 30 % of
its multiply-accumulates by each way of both tools, from the same calibration images. All ways are
measured as pruned, with no training, on held-out images. The `--ours` and `--best` of the two tools
there go on to the test images: as pruned, and after `--steps` of fine-tuning
with the same images in the same order, at the task's learning rate and at a fifth of it. The
unpruned network is fine-tuned alike. A seed draws the calibration images and the order of the
training images.

Rows are kept as they come (``--output``, JSON lines), so a run that was stopped goes on.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxprune

from . import accuracy_peer as peer
from .accuracy_data import TASKS, Folders, Split, Task, add_folders, fit, part, task

SHARES = (0.7, 0.5, 0.3)
OURS: dict[str, dict[str, Any]] = {
    "fisher, fitted": {"criterion": "fisher", "compensate": True},
    "fisher": {"criterion": "fisher"},
    "reconstruction, fitted": {"criterion": "reconstruction", "compensate": True},
    "reconstruction, capped, fitted": {
        "criterion": "reconstruction",
        "compensate": True,
        "max_rate": 0,  # by the share, see `capped`
    },
    "l2, local, fitted": {"criterion": "l2", "scope": "local", "compensate": True},
}
HELD_OUT, TEST = 2000, 5000  # images
FACTORS = {"after": 1.0, "after_low": 0.2}  # on the task's learning rate
STEPS = {"resnet20": 100, "resnet56": 60, "fashion": 100, "pitch": 40}
Row = dict[str, Any]


class Run:
    """One task; `rows` are what was measured, of all tasks."""

    def __init__(self, args: argparse.Namespace, name: str):
        self.args, self.name, self.file = args, name, args.output
        self.task: Task = task(name, Folders(args.cifar, args.fashion, args.cache))
        self.steps = STEPS[name] if args.steps is None else args.steps
        self.held_out, self.test = part(self.task.held_out, HELD_OUT), part(self.task.test, TEST)
        self.rows = read(self.file)

    def calibration(self, seed: int) -> list[Split]:
        x, y = self.task.train
        generator = torch.Generator().manual_seed(100 + seed)
        chosen = torch.randperm(len(x), generator=generator)[: self.args.calibration]
        return list(self.task.batches((x[chosen], y[chosen]), 64))

    # -- pruning ---------------------------------------------------------------------------------

    def ours(self, way: str, share: float, seed: int) -> nn.Module:
        options = {"target": {"macs": share}, **OURS[way]}
        if "max_rate" in options:
            options["max_rate"] = capped(share)
        data = self.calibration(seed)
        return fxprune.prune(
            self.task.model(), self.task.example, data=data, loss=self.task.loss, **options
        )

    def theirs(self, way: str, share: float, seed: int) -> nn.Module:
        found = peer.ways(self.task.kept)[way]
        data = self.calibration(seed)
        return peer.prune(self.task.model(), found, self.task.example, share, data, self.task.loss)

    def makers(self, share: float) -> Iterator[tuple[str, str, Callable[[int], nn.Module]]]:
        for way in OURS:
            yield "fxprune", way, lambda seed, way=way: self.ours(way, share, seed)
        for way in peer.ways(self.task.kept):
            if self.args.inner and self.task.kept and not way.endswith("inner"):
                continue
            yield "torch-pruning", way, lambda seed, way=way: self.theirs(way, share, seed)

    # -- measuring -------------------------------------------------------------------------------

    def whole(self) -> None:
        seeds = range(self.args.seeds)
        for seed in range(min(2, self.args.seeds)):
            self.measure("dense", "dense", 1.0, seed, lambda seed: self.task.model(), tuned=True)
        for share in self.args.shares:
            makers = {(tool, way): make for tool, way, make in self.makers(share)}
            for (tool, way), make in makers.items():
                self.measure(tool, way, share, 0, make, tuned=False)
            chosen = [*self.best("fxprune", share), *self.best("torch-pruning", share)]
            for seed in seeds:
                for tool, way in chosen:
                    self.measure(tool, way, share, seed, makers[tool, way], tuned=True)

    def best(self, tool: str, share: float) -> list[tuple[str, str]]:
        """The tool's ways that are best on held-out data after pruning alone."""
        own = [
            row
            for row in self.rows.values()
            if row["task"] == self.name and row["share"] == share and row["seed"] == 0
        ]
        known = [row for row in own if row["tool"] == tool and "held_out" in row]
        known.sort(key=lambda row: -row["held_out"])
        most = self.args.best if tool == "torch-pruning" else self.args.ours
        return [(tool, row["way"]) for row in known[:most]]

    def measure(
        self,
        tool: str,
        way: str,
        share: float,
        seed: int,
        make: Callable[[int], nn.Module],
        tuned: bool,
    ) -> None:
        """Add a row, or to one, what is not known of it yet."""
        key = (self.name, tool, way, share, seed)
        row = self.rows.get(key, {})
        open_ = [name for name in FACTORS if name not in row] if tuned else []
        if "problem" in row or ("held_out" in row and not open_):
            return
        start = time.perf_counter()
        try:
            model = make(seed)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}".partition("\n")[0]
            return self.keep(key, {"problem": problem})
        if "held_out" not in row:
            row = {"prune_s": time.perf_counter() - start, "left": self.left(model)}
            row["held_out"] = self.task.accuracy(model, self.held_out)
        if tuned and "before" not in row:
            row["before"] = self.task.accuracy(model, self.test)
        for name in open_:
            tuned_one = copy.deepcopy(model)
            fit(tuned_one, self.task, self.steps, seed, FACTORS[name])
            row |= {name: self.task.accuracy(tuned_one, self.test), "steps": self.steps}
        self.keep(key, row)

    def left(self, model: nn.Module) -> float:
        return peer.macs(model, self.task.example) / peer.macs(self.task.model(), self.task.example)

    def keep(self, key: tuple, row: Row) -> None:
        names = ("task", "tool", "way", "share", "seed")
        self.rows[key] = dict(zip(names, key, strict=True)) | row
        with self.file.open("a") as file:
            file.write(json.dumps(self.rows[key]) + "\n")
        print(json.dumps(self.rows[key]), flush=True)


def capped(share: float) -> float:
    """A third more than the rate at which all layers alike leave this share of operations."""
    return min(0.95, 4 / 3 * (1 - share**0.5))


def read(file: Path) -> dict[tuple, Row]:
    """The last row of each key."""
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(r["task"], r["tool"], r["way"], r["share"], r["seed"]): r for r in rows}


# -- tables ----------------------------------------------------------------------------------------


def spread(values: list[float]) -> str:
    """Mean and standard deviation in percent."""
    if not values:
        return ""
    shown = f"{100 * statistics.mean(values):.1f}"
    return f"{shown} ± {100 * statistics.stdev(values):.1f}" if len(values) > 1 else shown


def tables(rows: dict[tuple, Row]) -> str:
    """Markdown: for each task and share, what was fine-tuned, and the best as pruned."""
    return "\n\n".join(
        f"### {name}\n\n{_table([r for r in rows.values() if r['task'] == name])}"
        for name in TASKS
        if any(r["task"] == name for r in rows.values())
    )


def _table(rows: list[Row]) -> str:
    lines = [
        "| MACs | tool | way | MACs left | held out | as pruned | fine-tuned | gently | seeds |",
        "|--:|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple, list[Row]] = {}
    for row in rows:
        groups.setdefault((-row["share"], row["tool"], row["way"]), []).append(row)
    order = sorted(groups, key=lambda k: (k[0], k[1], -_best(groups[k])))
    return "\n".join([*lines, *(_line(key, groups[key]) for key in order)])


def _best(rows: list[Row]) -> float:
    """The higher mean of both fine-tunings; below all, ways that were not fine-tuned."""
    tuned = [statistics.mean(f) for n in FACTORS if (f := [r[n] for r in rows if n in r])]
    known = [row["held_out"] for row in rows if "held_out" in row]
    return max(tuned) if tuned else statistics.mean(known or [0.0]) - 1


def _line(key: tuple, rows: list[Row]) -> str:
    share, tool, way = -key[0], key[1], key[2]
    known = [row for row in rows if "held_out" in row]
    if not known:
        return f"| {share:.0%} | {tool} | {way} | | {rows[0]['problem']} | | | | |"
    left = statistics.mean(row["left"] for row in known)
    names = ("held_out", "before", *FACTORS)
    cells = [spread([r[k] for r in known if k in r]) for k in names]
    return f"| {share:.0%} | {tool} | {way} | {left:.1%} | {' | '.join(cells)} | {len(known)} |"


def plot(rows: dict[tuple, Row], file: Path) -> None:
    """The best of each tool over the share of operations, as pruned and fine-tuned."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    names = [name for name in TASKS if any(r["task"] == name for r in rows.values())]
    figure, axes = pyplot.subplots(2, len(names), figsize=(3.3 * len(names), 5.6), squeeze=False)
    for column, name in enumerate(names):
        own = [row for row in rows.values() if row["task"] == name and "before" in row]
        for axis, what in zip(axes[:, column], (("before",), tuple(FACTORS)), strict=True):
            _curves(axis, own, what)
        axes[0, column].set_title(name)
    axes[0, 0].set_ylabel("as pruned: accuracy, %")
    axes[1, 0].set_ylabel("fine-tuned: accuracy, %")
    axes[0, 0].legend(frameon=False, fontsize=8)
    figure.tight_layout()
    figure.savefig(file, dpi=120)


def _curves(axis: Any, rows: list[Row], what: tuple[str, ...]) -> None:
    colours = {"fxprune": "#1a6fb5", "torch-pruning": "#c2571a"}
    for tool, colour in colours.items():
        points = dict(_best_by_share(rows, tool, what))
        if points:
            x = [100 * share for share in points]
            mean = [100 * statistics.mean(values) for values in points.values()]
            error = [100 * _deviation(values) for values in points.values()]
            label = f"{tool}, its best way"
            axis.errorbar(x, mean, error, color=colour, marker="o", capsize=3, label=label)
    dense = [[r[w] for r in rows if r["tool"] == "dense" and w in r] for w in what]
    if any(dense):
        best = max(statistics.mean(values) for values in dense if values)
        axis.axhline(100 * best, color="#777777", lw=1, ls="--", label="unpruned")
    axis.set_xlabel("multiply-accumulates left, %")
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(alpha=0.25)


def _deviation(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


def _best_by_share(
    rows: list[Row], tool: str, what: tuple[str, ...]
) -> Iterator[tuple[float, list[float]]]:
    for share in sorted({row["share"] for row in rows if row["tool"] == tool}):
        ways: dict[tuple[str, str], list[float]] = {}
        for row in rows:
            for name in what:
                if row["tool"] == tool and row["share"] == share and name in row:
                    ways.setdefault((row["way"], name), []).append(row[name])
        if ways:
            yield share, max(ways.values(), key=statistics.mean)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    add_folders(parser)
    parser.add_argument("--output", type=Path, default=here / "results" / "accuracy.jsonl")
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--shares", nargs="+", type=float, default=list(SHARES))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, help="of fine-tuning; by default the task's own")
    parser.add_argument("--calibration", type=int, default=1024, help="images")
    parser.add_argument("--ours", type=int, default=2, help="ways of fxprune to fine-tune")
    parser.add_argument("--best", type=int, default=4, help="ways of the other tool to fine-tune")
    parser.add_argument("--inner", action="store_true", help="of ways with two parts, this one")
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    parser.add_argument("--plot", type=Path, help="write a picture of what was measured")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    for name in () if args.table or args.plot else args.tasks:
        Run(args, name).whole()
    rows = read(args.output)
    print(tables(rows))
    if args.plot:
        plot(rows, args.plot)


if __name__ == "__main__":
    main()
