"""Train a small network on handwritten digits, prune it, fine-tune it, and compare.

    python examples/demo.py

The network has what makes pruning awkward: BatchNorm, a residual add and a squeeze-excite gate.
A text file for each step of the pruning is left in demo-output/.
"""

from __future__ import annotations

import argparse
import statistics
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.progress import Progress
from rich.table import Table
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune


class Gate(nn.Module):
    """Squeeze and excite: every channel is scaled by what all channels say."""

    def __init__(self, width: int):
        super().__init__()
        self.squeeze = nn.Conv2d(width, width // 4, 1)
        self.excite = nn.Conv2d(width // 4, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        return x * torch.sigmoid(self.excite(F.relu(self.squeeze(x.mean((2, 3), keepdim=True)))))


class Block(nn.Module):
    """Two convolutions and a gate, added to a shortcut."""

    def __init__(self, ins: int, outs: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(ins, outs, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(outs)
        self.conv2 = nn.Conv2d(outs, outs, 3, 1, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(outs)
        self.gate = Gate(outs)
        self.shortcut = nn.Identity() if ins == outs else nn.Conv2d(ins, outs, 1, stride)

    def forward(self, x: Tensor) -> Tensor:
        y = self.bn2(self.conv2(F.relu(self.bn1(self.conv1(x)))))
        return F.relu(self.gate(y) + self.shortcut(x))


class DigitNet(nn.Module):
    def __init__(self, width: int = 32):
        super().__init__()
        self.stem = nn.Conv2d(1, width, 3, 1, 1, bias=False)
        self.bn = nn.BatchNorm2d(width)
        self.blocks = nn.Sequential(Block(width, width, 1), Block(width, 2 * width, 2))
        self.head = nn.Linear(2 * width * 4 * 4, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(F.relu(self.bn(self.stem(x)))).flatten(1))


@dataclass
class Data:
    train: tuple[Tensor, Tensor]
    test: tuple[Tensor, Tensor]


def digits() -> Data:
    """1,797 images of 8x8 pixels, one in four of them for testing."""
    raw = load_digits()
    x = torch.tensor(raw.images, dtype=torch.float32)[:, None] / 16
    y = torch.tensor(raw.target)
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    test, train = order[: len(x) // 4], order[len(x) // 4 :]
    return Data((x[train], y[train]), (x[test], y[test]))


def fit(
    model: nn.Module, data: Data, epochs: int, lr: float, progress: Progress, title: str
) -> None:
    x, y = data.train
    optimizer = torch.optim.AdamW(model.parameters(), lr)
    shuffle = torch.Generator().manual_seed(1)
    model.train()
    for _ in progress.track(range(epochs), description=title):
        for batch in torch.randperm(len(x), generator=shuffle).split(64):
            loss = F.cross_entropy(model(x[batch]), y[batch])
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    x, y = data.test
    return float((model(x).argmax(1) == y).float().mean())


@torch.no_grad()
def latency(model: nn.Module, x: Tensor, runs: int = 20) -> float:
    """Milliseconds for one forward pass: the median of `runs`."""
    times = []
    for _ in range(runs + 3):
        start = time.perf_counter()
        model(x)
        times.append(time.perf_counter() - start)
    return 1000 * statistics.median(times[3:])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--rate", type=float, default=0.4)
    parser.add_argument("--criterion", default="ratio_sum")
    parser.add_argument("--output", default="demo-output", help="folder for the dumps")
    args = parser.parse_args()

    torch.manual_seed(0)
    torch.set_num_threads(1)
    console, data = Console(), digits()
    dense = DigitNet()

    with Progress(console=console) as progress:
        fit(dense, data, args.epochs, 2e-3, progress, "training")
        pruned = fxprune.prune(
            dense,
            data.test[0][:2],
            criterion=args.criterion,
            rate=args.rate,
            dump=args.output,
        )
        before = accuracy(pruned, data)
        fit(pruned, data, max(args.epochs // 2, 1), 1e-3, progress, "fine-tuning")

    report = pruned.fxprune.report
    times = [latency(model, data.test[0]) for model in (dense, pruned)]
    table = Table(title=f"DigitNet, {args.criterion} at {args.rate:g}")
    for column in ("", "before", "pruned", "fine-tuned"):
        table.add_column(column, justify="right" if column else "left")
    exact = [accuracy(dense, data), before, accuracy(pruned, data)]
    table.add_row("accuracy", *(f"{share:.1%}" for share in exact))
    for name, (old, new) in (("parameters", report.params), ("MACs", report.macs)):
        table.add_row(name, f"{old:,}", f"{new:,}", f"{new:,}")
    shown = [f"{times[0]:.1f}", f"{times[1]:.1f}", f"{times[1]:.1f}"]
    table.add_row(f"ms for {len(data.test[0])} images", *shown)
    console.print(table)
    console.print(f"verified: {report.verification}", soft_wrap=True)
    console.print(f"what happened, step by step: {args.output}/")


if __name__ == "__main__":
    main()
