"""What each choice is worth: criteria, fits, calibration data, schedules, on one of the tasks.

    python -m benchmarks.accuracy_choices --cifar F --fashion F --cache F [--task fashion]
    python -m benchmarks.accuracy_choices --table

The network is pruned to `--share` of its multiply-accumulates. Accuracy is on held-out images, as
pruned and (schedules) after the same number of training steps in all, for each of `--seeds`, which
draws calibration images and the order of training images.
"""

from __future__ import annotations

import argparse
import copy
import json
import statistics
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import nn

import fxprune

from .accuracy_data import TASKS, Folders, Split, Task, _endless, add_folders, fit, part, task

CRITERIA = (
    "random", "l2", "bn_gamma", "geometric_median", "apoz", "mean_activation", "hrank", "taylor",
    "gradient_gamma", "fisher", "surgeon", "reconstruction",
)  # fmt: skip
FITS = (None, "statistics", "bias", "least_squares")
IMAGES = (64, 256, 1024, 4096)
RULES: dict[str, dict[str, Any]] = {
    "knapsack": {},
    "knapsack, max_rate": {"max_rate": 0.6},
    "one rate": {"scope": "local"},
    "global cut": {"scope": "global", "select_by": "rate"},
    "global cut, mean": {"scope": "global", "select_by": "rate", "normalize": "mean"},
    "global cut, by kind": {"scope": "global", "select_by": "rate", "normalize": "kind"},
}
LOW = 0.2  # on the task's learning rate
Key = tuple[str, str, int]


class Run:
    def __init__(self, args: argparse.Namespace):
        self.args = args
        self.task: Task = task(args.task, Folders(args.cifar, args.fashion, args.cache))
        self.test = part(self.task.held_out, 5000)
        self.rows = read(args.output)

    def calibration(self, seed: int, images: int = 1024) -> list[Split]:
        x, y = self.task.train
        generator = torch.Generator().manual_seed(100 + seed)
        chosen = torch.randperm(len(x), generator=generator)[:images]
        return list(self.task.batches((x[chosen], y[chosen]), 64))

    def prune(self, seed: int, images: int = 1024, **options: Any) -> nn.Module:
        how = {"target": {"macs": self.args.share}, "criterion": "fisher", **options}
        data = self.calibration(seed, images)
        model, x = self.task.model(), self.task.example
        return fxprune.prune(model, x, data=data, loss=self.task.loss, **how)

    # -- what is compared ------------------------------------------------------------------------

    def choices(self) -> Iterator[tuple[str, str, Callable[[int], nn.Module]]]:
        for name in CRITERIA:
            for fitted in (False, True):
                what = "criteria, fitted" if fitted else "criteria"
                how = {"criterion": name, "compensate": fitted}
                yield what, name, lambda seed, how=how: self.prune(seed, **how)
        for fits in FITS:
            yield "compensate", str(fits), lambda seed, fits=fits: self.prune(seed, compensate=fits)
        for images in IMAGES:
            make = lambda seed, n=images: self.prune(seed, n, compensate=True)  # noqa: E731
            yield "calibration images", str(images), make
        for name, rule in RULES.items():
            make = lambda seed, rule=rule: self.prune(seed, compensate=True, **rule)  # noqa: E731
            yield "how channels are chosen", name, make
        yield from self.schedules()

    def schedules(self) -> Iterator[tuple[str, str, Callable[[int], nn.Module]]]:
        for name, make in (
            ("one step", self.one_step),
            ("one step, not fitted", lambda seed: self.one_step(seed, fits=False)),
            ("one step, distilled", self.distilled),
            ("three steps", self.several),
            ("growing penalty before", self.growing),
            ("group lasso before", self.lasso),
        ):
            yield "schedules", name, make

    def one_step(self, seed: int, fits: bool = True) -> nn.Module:
        pruned = self.prune(seed, compensate=fits)
        fit(pruned, self.task, self.args.steps, seed, LOW)
        return pruned

    def distilled(self, seed: int) -> nn.Module:
        pruned = self.prune(seed, compensate=True)
        teacher, steps = self.task.model(), self.args.steps
        data = list(islice(_endless(self.task, torch.Generator().manual_seed(seed)), steps))
        optimizer = self.task.optimizer(pruned)
        for group in optimizer.param_groups:
            group["lr"] *= LOW
        fxprune.finetune(
            pruned, data, teacher=teacher, steps=steps, optimizer=optimizer, loss=self.task.loss
        )
        return pruned.eval()

    def several(self, seed: int) -> nn.Module:
        how = {"target": {"macs": self.args.share}, "criterion": "fisher", "compensate": True}
        how |= {"data": self.calibration(seed), "loss": self.task.loss, "steps": 3}
        for number, pruned in enumerate(
            fxprune.iterate(self.task.model(), self.task.example, **how)
        ):
            fit(pruned, self.task, self.args.steps // 3, 10 * seed + number, LOW)
        return pruned

    def growing(self, seed: int) -> nn.Module:
        plan = self.prune(seed).fxprune.plan
        model, steps = self.task.model(), self.args.steps
        penalty = fxprune.GrowingPenalty(model, plan, delta=2.0 / (steps // 2), every=1)
        self._penalised(model, penalty, steps // 2, seed)
        pruned = fxprune.apply(model, plan, self.task.example)
        fit(pruned, self.task, steps - steps // 2, seed, LOW)
        return pruned

    def lasso(self, seed: int) -> nn.Module:
        model, steps = self.task.model(), self.args.steps
        penalty = fxprune.GroupLasso(model, 1e-4, example_inputs=self.task.example)
        self._penalised(model, penalty, steps // 2, seed)
        how = {"target": {"macs": self.args.share}, "criterion": "fisher", "compensate": True}
        how |= {"data": self.calibration(seed), "loss": self.task.loss}
        pruned = fxprune.prune(model.eval(), self.task.example, **how)
        fit(pruned, self.task, steps - steps // 2, seed, LOW)
        return pruned

    def _penalised(self, model: nn.Module, penalty: Any, steps: int, seed: int) -> None:
        optimizer = self.task.optimizer(model)
        for group in optimizer.param_groups:
            group["lr"] *= LOW
        penalty.attach(optimizer)
        model.train()
        for x, y in islice(_endless(self.task, torch.Generator().manual_seed(seed)), steps):
            optimizer.zero_grad()
            self.task.loss(model(x), y).backward()
            optimizer.step()

    # -- measuring -------------------------------------------------------------------------------

    def whole(self) -> None:
        for seed in range(self.args.seeds):
            for what, name, make in self.choices():
                if (what, name, seed) not in self.rows:
                    model = copy.deepcopy(make(seed))
                    self.keep((what, name, seed), self.task.accuracy(model, self.test))

    def keep(self, key: Key, accuracy: float) -> None:
        self.rows[key] = accuracy
        row = dict(zip(("what", "name", "seed"), key, strict=True)) | {"accuracy": accuracy}
        row |= {"task": self.args.task, "share": self.args.share, "steps": self.args.steps}
        with self.args.output.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(row, flush=True)


def read(file: Path) -> dict[Key, float]:
    lines = file.read_text().splitlines() if file.exists() else []
    rows = [json.loads(line) for line in lines]
    return {(row["what"], row["name"], row["seed"]): row["accuracy"] for row in rows}


def tables(rows: dict[Key, float]) -> str:
    """Markdown, a table a question; percent, with the standard deviation over seeds."""
    whats = dict.fromkeys(what for what, _, _ in rows)
    return "\n\n".join(f"### {what}\n\n{_table(rows, what)}" for what in whats)


def _table(rows: dict[Key, float], what: str) -> str:
    lines = ["| | held-out accuracy |", "|---|--:|"]
    for name in dict.fromkeys(name for w, name, _ in rows if w == what):
        values = [100 * value for (w, n, _), value in rows.items() if (w, n) == (what, name)]
        spread = f" ± {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        lines.append(f"| {name} | {statistics.mean(values):.1f}{spread} |")
    return "\n".join(lines)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = Path(__file__).parent
    add_folders(parser)
    parser.add_argument("--output", type=Path, default=here / "results" / "choices.jsonl")
    parser.add_argument("--task", default="fashion", choices=list(TASKS))
    parser.add_argument("--share", type=float, default=0.3, help="of MACs to leave")
    parser.add_argument("--steps", type=int, default=150, help="of training, in all")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--table", action="store_true", help="only print what was measured")
    return parser.parse_args()


def main() -> None:
    args = arguments()
    torch.set_num_threads(1)
    if not args.table:
        Run(args).whole()
    print(tables(read(args.output)))


if __name__ == "__main__":
    main()
