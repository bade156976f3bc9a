"""Prune trained CIFAR-10 ResNets and look what the accuracy says.

    python examples/prune_resnet_cifar.py DATA_FOLDER [--images 1000] [--epochs 1]

DATA_FOLDER holds resnet20.safetensors and resnet56.safetensors (the option-A networks of He et al.
2015) and cifar10_jpg.tar.xz (train/CLASS/NAME.jpg and test/CLASS/NAME.jpg). The shortcut of these
networks pads channels with zeros: the widths before and after it are free, its pad is rewritten.

With --epochs, every network is fine-tuned on the training images, the unpruned one too. Needs
safetensors, Pillow and rich.
"""

from __future__ import annotations

import argparse
import io
import tarfile
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F

import fxprune

CLASSES = "airplane automobile bird cat deer dog frog horse ship truck".split()
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
NETWORKS = ("resnet20", "resnet32", "resnet44", "resnet56")


Split = tuple[Tensor, Tensor]
Variant = tuple[nn.Module, tuple[str, str], tuple[int, int]]


def images(folder: Path, cache: Path, split: str) -> Split:
    """The images of one split as uint8 [N, 3, 32, 32] with their labels; decoded once."""
    file = cache / f"cifar10_{split}.npz"
    if not file.exists():
        cache.mkdir(parents=True, exist_ok=True)
        with tarfile.open(folder / "cifar10_jpg.tar.xz") as archive:
            rows = sorted(_decoded(archive, split), key=lambda row: row[0])
        np.savez(file, x=np.stack([row[1] for row in rows]), y=np.array([row[2] for row in rows]))
    with np.load(file) as found:
        return torch.from_numpy(found["x"]).permute(0, 3, 1, 2), torch.from_numpy(found["y"])


def _decoded(archive: tarfile.TarFile, split: str) -> Iterator[tuple[str, np.ndarray, int]]:
    for member in archive:
        parts = Path(member.name).parts
        if member.isfile() and parts[-3] == split:
            picture = Image.open(io.BytesIO(archive.extractfile(member).read()))
            yield member.name, np.asarray(picture.convert("RGB")), CLASSES.index(parts[-2])


def sample(data: Split, count: int) -> Split:
    order = torch.randperm(len(data[0]), generator=torch.Generator().manual_seed(0))[:count]
    return data[0][order], data[1][order]


def normalised(x: Tensor) -> Tensor:
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return (x.float() / 255 - mean) / std


def batches(data: Split, size: int, order: Tensor | None = None) -> Iterator[Split]:
    x, y = data
    order = torch.arange(len(x)) if order is None else order
    for batch in order.split(size):
        yield normalised(x[batch]), y[batch]


@torch.no_grad()
def accuracy(model: nn.Module, data: Split, progress: Progress, title: str) -> float:
    model.eval()
    right, task = 0, progress.add_task(title, total=len(data[0]))
    for x, y in batches(data, 250):
        right += int((model(x).argmax(1) == y).sum())
        progress.advance(task, len(x))
    progress.remove_task(task)
    return right / len(data[0])


def fine_tune(model: nn.Module, data: Split, epochs: int, progress: Progress, title: str) -> None:
    """SGD with a one-cycle rate; shifted and mirrored images."""
    steps = epochs * -(-len(data[0]) // 128)
    optimizer = torch.optim.SGD(model.parameters(), 0.05, 0.9, weight_decay=1e-4, nesterov=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.05, total_steps=steps)
    generator, task = torch.Generator().manual_seed(0), progress.add_task(title, total=steps)
    model.train()
    for _ in range(epochs):
        for x, y in batches(data, 128, torch.randperm(len(data[0]), generator=generator)):
            loss = F.cross_entropy(model(augmented(x, generator)), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            progress.advance(task)
    progress.remove_task(task)


def augmented(x: Tensor, generator: torch.Generator) -> Tensor:
    mirrored = torch.rand(len(x), 1, 1, 1, generator=generator) < 0.5
    x = F.pad(torch.where(mirrored, x.flip(3), x), (4, 4, 4, 4))
    top, left = torch.randint(0, 9, (2, len(x)), generator=generator)
    rows = top[:, None] + torch.arange(32)
    columns = left[:, None] + torch.arange(32)
    each = torch.arange(len(x))[:, None, None]
    return x[each, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def trained(folder: Path, name: str) -> nn.Module:
    model = getattr(fxprune.models, name)()
    model.load_state_dict(load_file(folder / f"{name}.safetensors"))
    return model.eval()


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("folder", type=Path, metavar="DATA_FOLDER")
    parser.add_argument("--cache", type=Path, help="folder for decoded images")
    parser.add_argument("--images", type=int, default=10_000, help="how many test images")
    parser.add_argument("--networks", nargs="+", default=["resnet20", "resnet56"], choices=NETWORKS)
    parser.add_argument("--criteria", nargs="+", default=["l1", "ratio_sum"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.3, 0.5])
    parser.add_argument("--epochs", type=int, default=0, help="of fine-tuning, for each network")
    return parser.parse_args()


def variants(dense: nn.Module, example: Tensor, args: argparse.Namespace) -> Iterator[Variant]:
    """The network as it is, then pruned in every way asked for."""
    pruned = [
        (by, rate, fxprune.prune(dense, example, criterion=by, rate=rate))
        for by in args.criteria
        for rate in args.rates
    ]
    first = pruned[0][2].fxprune.report
    yield dense, ("", ""), (first.params[0], first.macs[0])
    for by, rate, model in pruned:
        report = model.fxprune.report
        yield model, (by, f"{rate:g}"), (report.params[1], report.macs[1])


def main() -> None:
    args, console = arguments(), Console()
    torch.manual_seed(0)
    cache = args.cache or Path(tempfile.mkdtemp(prefix="cifar10-"))
    test = sample(images(args.folder, cache, "test"), args.images)
    train = images(args.folder, cache, "train") if args.epochs else None
    tuned = f", {args.epochs} epochs of fine-tuning" if train else ""
    table = Table(title=f"CIFAR-10 (JPEG q75 copy), {len(test[0]):,} test images{tuned}")
    for column in ("network", "pruned by", "rate", "parameters", "MACs", "accuracy"):
        table.add_column(column, justify="left" if column in ("network", "pruned by") else "right")
    if train:
        table.add_column("fine-tuned", justify="right")

    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn())
    with Progress(*columns, TimeElapsedColumn(), console=console) as progress:
        count = len(args.networks) * (len(args.criteria) * len(args.rates) + 1)
        whole = progress.add_task("networks", total=count)
        for name in args.networks:
            dense, example = trained(args.folder, name), normalised(test[0][:2])
            for model, how, sizes in variants(dense, example, args):
                title = " ".join((name, *how))
                shares = [accuracy(model, test, progress, title)]
                if train:
                    fine_tune(model, train, args.epochs, progress, f"fine-tuning {title}")
                    shares.append(accuracy(model, test, progress, title))
                numbers = [f"{n:,}" for n in sizes] + [f"{share:.1%}" for share in shares]
                table.add_row(name, *how, *numbers)
                progress.advance(whole)
    console.print(table)


if __name__ == "__main__":
    main()
