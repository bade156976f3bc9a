"""Data sets: where their images lie, and batches of them, shifted and mirrored for training."""

from __future__ import annotations

import gzip
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

Batch = tuple[Tensor, Tensor]
DIGITS = "digits"
MIRRORED = ("cifar10", "cifar100", "food101")
"""Data sets whose images show the same when mirrored; a mirrored digit is none."""
NEEDS_FOLDER = ("cifar10", "cifar100", "fashion", "food101")


@dataclass
class Images:
    """A split that fits into memory: x is uint8 [N, 3, H, W], y is int64 [N]."""

    x: Tensor
    y: Tensor
    mirror: bool = False

    def __len__(self) -> int:
        return len(self.y)

    def batches(
        self, indices: Sequence[Tensor], device: torch.device, noise: torch.Generator | None
    ) -> Iterator[Batch]:
        for index in indices:
            x = self.x[index]
            yield (augmented(x, noise, mirror=self.mirror) if noise else x), self.y[index]


@dataclass
class Files:
    """A split that is read and cut to size in other processes: a torchvision data set whose items
    are (uint8 [3, size, size], label)."""

    dataset: Any
    workers: int = 4

    def __len__(self) -> int:
        return len(self.dataset)

    def batches(
        self, indices: Sequence[Tensor], device: torch.device, noise: torch.Generator | None
    ) -> Iterator[Batch]:
        yield from torch.utils.data.DataLoader(
            self.dataset,
            batch_sampler=[index.tolist() for index in indices],
            num_workers=self.workers,
            pin_memory=device.type == "cuda",
            generator=noise,  # seeds the processes, and with them the crops
        )


@dataclass
class Data:
    """Two splits, and how their images become what a network reads."""

    name: str
    classes: int
    train: Images | Files
    test: Images | Files
    size: int
    """Height and width that the network gets, in pixels."""
    mean: list[float] = field(default_factory=lambda: [0.485, 0.456, 0.406])
    std: list[float] = field(default_factory=lambda: [0.229, 0.224, 0.225])

    def batches(
        self,
        split: Images | Files,
        indices: Sequence[Tensor],
        device: torch.device,
        noise: torch.Generator | None = None,
    ) -> Iterator[Batch]:
        """Normalised images [N, 3, size, size] and labels; augmented where `noise` is given."""
        for x, y in split.batches(indices, device, noise):
            yield self.ready(x.to(device, non_blocking=True)), y.to(device, non_blocking=True)

    def ready(self, x: Tensor) -> Tensor:
        """uint8 [N, 3, H, W] -> float32 [N, 3, size, size], about zero and of variance one."""
        mean, std = (x.new_tensor(v, dtype=torch.float32) for v in (self.mean, self.std))
        x = (x.float() / 255 - mean[:, None, None]) / std[:, None, None]
        if x.shape[2:] == (self.size, self.size):
            return x
        return F.interpolate(x, size=(self.size, self.size), mode="bilinear", align_corners=False)


def augmented(x: Tensor, noise: torch.Generator, *, mirror: bool) -> Tensor:
    """Every image shifted by up to an eighth of its width, zeros where it was not; half of them
    mirrored. [N, C, H, W] -> the same shape and type."""
    count, _, height, width = x.shape
    by = width // 8
    if mirror:
        flipped = torch.rand(count, 1, 1, 1, generator=noise).to(x.device) < 0.5
        x = torch.where(flipped, x.flip(3), x)
    top, left = torch.randint(0, 2 * by + 1, (2, count), generator=noise).to(x.device)
    rows = top[:, None] + torch.arange(height, device=x.device)
    columns = left[:, None] + torch.arange(width, device=x.device)
    each = torch.arange(count, device=x.device)[:, None, None]
    padded = F.pad(x, (by, by, by, by))
    return padded[each, :, rows[:, :, None], columns[:, None]].permute(0, 3, 1, 2)


def load(
    name: str, folder: Path | None, *, size: int | None, download: bool = False, workers: int = 4
) -> Data:
    """A data set by name, or an .npz file of x_train, y_train, x_test, y_test (x: uint8 NHWC); its
    images are brought to `size`, None leaves them as they are.

    Raises `SystemExit` with what to do where it is not known or not there.
    """
    if name in NEEDS_FOLDER and folder is None:
        raise SystemExit(f"--data {name} needs --data-dir FOLDER")
    folder = folder or Path()
    if name == "food101":
        return _food101(folder, size or 224, download, workers)
    if name == DIGITS:
        parts = _digits()
    elif name.endswith(".npz"):
        parts = _archive(Path(name))
    elif name == "fashion":
        parts = _fashion(folder, download)
    elif name in ("cifar10", "cifar100"):
        parts = _cifar(name, folder, download)
    else:
        known = ", ".join((DIGITS, *NEEDS_FOLDER))
        raise SystemExit(f"no data set `{name}`; known are {known} and .npz files")
    return in_memory(Path(name).stem, parts, size)


HOMES = {
    "cifar10": "cifar-10-batches-py",
    "cifar100": "cifar-100-python",
    "food101": "food-101",
    "fashion": "*-ubyte.gz",
}


def found_in(folder: Path) -> str:
    """The data set that lies in a folder, by the names torchvision gives its files; `SystemExit`
    where there is none, or more than one."""
    found = [name for name, home in HOMES.items() if any(folder.glob(home))]
    found += ["fashion"] if (folder / "FashionMNIST").is_dir() else []
    if len(found) != 1:
        held = " and ".join(found) or "no data set that is known"
        raise SystemExit(
            f"{folder} holds {held}: name it, as in --data cifar10 --data-dir {folder}"
        )
    return found[0]


def in_memory(name: str, arrays: Sequence[np.ndarray], size: int | None) -> Data:
    """`Data` of x_train, y_train, x_test, y_test; x is uint8 [N, H, W] or [N, H, W, 1 or 3]."""
    mirror = name in MIRRORED
    x_train, x_test = _pictures(arrays[0]), _pictures(arrays[2])
    y_train, y_test = (torch.tensor(a, dtype=torch.long).reshape(-1) for a in arrays[1::2])
    classes = int(torch.cat([y_train, y_test]).max()) + 1
    train, test = Images(x_train, y_train, mirror), Images(x_test, y_test, mirror)
    return Data(name, classes, train, test, size or x_train.shape[-1], *_moments(x_train))


def _pictures(x: np.ndarray) -> Tensor:
    if x.dtype != np.uint8 or x.ndim not in (3, 4):
        raise SystemExit(f"images must be uint8 [N, H, W, C], not {x.dtype} {list(x.shape)}")
    x = x[..., None] if x.ndim == 3 else x
    return torch.from_numpy(np.array(x)).permute(0, 3, 1, 2).expand(-1, 3, -1, -1).contiguous()


def _moments(x: Tensor) -> tuple[list[float], list[float]]:
    """Mean and deviation of each channel, of values in [0, 1]; from counts, so that no float copy
    of all images is made."""
    values = torch.arange(256, dtype=torch.float64) / 255
    shares = [
        torch.bincount(c.reshape(-1), minlength=256).double() / c.numel() for c in x.unbind(1)
    ]
    means = [float(s @ values) for s in shares]
    squares = [float(s @ values.square()) for s in shares]
    return means, [max(q - m * m, 1e-4) ** 0.5 for q, m in zip(squares, means, strict=True)]


def on_device(data: Data, device: torch.device, most: int = 4 << 30) -> Data:
    """The same data, with the images of splits of at most `most` bytes on `device`."""

    def moved(split: Images | Files) -> Images | Files:
        if isinstance(split, Files) or split.x.numel() > most:
            return split
        return replace(split, x=split.x.to(device), y=split.y.to(device))

    return replace(data, train=moved(data.train), test=moved(data.test))


# -- where the images lie --------------------------------------------------------------------------


def _digits() -> list[np.ndarray]:
    """1,797 images of 8x8 pixels, one in four of them for testing."""
    from sklearn.datasets import load_digits

    raw = load_digits()
    x, y = (raw.images * (255 / 16)).round().astype(np.uint8), raw.target
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0)).numpy()
    test, train = order[: len(x) // 4], order[len(x) // 4 :]
    return [x[train], y[train], x[test], y[test]]


def _archive(file: Path) -> list[np.ndarray]:
    names = ("x_train", "y_train", "x_test", "y_test")
    if not file.exists():
        raise SystemExit(f"there is no {file}")
    with np.load(file) as found:
        missing = [name for name in names if name not in found]
        if missing:
            raise SystemExit(f"{file} has no {', '.join(missing)}")
        return [found[name] for name in names]


def _fashion(folder: Path, download: bool) -> list[np.ndarray]:
    """The four .gz files, in `folder` itself or where torchvision puts them."""
    if download:
        from torchvision.datasets import FashionMNIST

        FashionMNIST(str(folder), download=True)
    raw = folder / "FashionMNIST" / "raw"
    folder = raw if raw.exists() else folder
    return [
        _idx(folder / f"{split}-{kind}-ubyte.gz")
        for split in ("train", "t10k")
        for kind in ("images-idx3", "labels-idx1")
    ]


def _idx(file: Path) -> np.ndarray:
    """An idx file: two zeros, the type, the number of dims, the dims, then the bytes."""
    if not file.exists():
        raise SystemExit(f"there is no {file}; --download fetches it")
    raw = gzip.decompress(file.read_bytes())
    shape = np.frombuffer(raw, ">i4", count=raw[3], offset=4)
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * raw[3]).reshape(shape)


def _cifar(name: str, folder: Path, download: bool) -> list[np.ndarray]:
    from torchvision import datasets

    kind = {"cifar10": datasets.CIFAR10, "cifar100": datasets.CIFAR100}[name]
    try:
        splits = [kind(str(folder), train=train, download=download) for train in (True, False)]
    except RuntimeError as error:
        raise SystemExit(f"{error}\n--download fetches it into {folder}") from None
    return [part for split in splits for part in (split.data, np.array(split.targets))]


def _food101(folder: Path, size: int, download: bool, workers: int) -> Data:
    """101 classes of photographs, cut to `size`: anywhere for training, the middle for testing."""
    from torchvision import transforms as T
    from torchvision.datasets import Food101

    cut = [T.RandomResizedCrop(size, scale=(0.35, 1.0)), T.RandomHorizontalFlip()]
    middle = [T.Resize(size * 256 // 224), T.CenterCrop(size)]
    how = {
        "train": T.Compose([*cut, T.PILToTensor()]),
        "test": T.Compose([*middle, T.PILToTensor()]),
    }
    try:
        train, test = (
            Files(Food101(str(folder), split, transform=how[split], download=download), workers)
            for split in ("train", "test")
        )
    except RuntimeError as error:
        raise SystemExit(f"{error}\n--download fetches it into {folder}") from None
    return Data("food101", 101, train, test, size)
