"""Prune in several steps, with training between them, beside one large step and no pruning at all.

    python examples/iterative.py [--rate 0.8] [--steps 4] [--epochs 2]

All three networks get the same training after the first: --steps times --epochs epochs.
"""

from __future__ import annotations

import argparse
import copy

import torch
from demo import DigitNet, accuracy, digits, fit
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

import fxprune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--rate", type=float, default=0.8)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=2)
    options = parser.parse_args()
    torch.manual_seed(0)
    data, x, total = digits(), torch.rand(2, 1, 8, 8), options.steps * options.epochs
    with Progress(console=Console(stderr=True), transient=True) as progress:
        model = DigitNet()
        fit(model, data, 10, 0.1, progress, "train")
        dense = copy.deepcopy(model)
        fit(dense, data, total, 0.05, progress, "dense")
        once = fxprune.prune(model, x, rate=options.rate)
        fit(once, data, total, 0.05, progress, "in one step")
        for pruned in fxprune.iterate(model, x, rate=options.rate, steps=options.steps):
            fit(pruned, data, options.epochs, 0.05, progress, "in several steps")
    table = Table(title=f"{options.rate:.0%} of the channels gone, {total} epochs after training")
    for name in ("", "accuracy", "parameters"):
        table.add_column(name, justify="right" if name else "left")
    several = f"in {options.steps} steps"
    for name, network in (("dense", dense), ("in one step", once), (several, pruned)):
        count = sum(p.numel() for p in network.parameters())
        table.add_row(name, f"{accuracy(network, data):.1%}", f"{count:,}")
    Console().print(table)


if __name__ == "__main__":
    main()
