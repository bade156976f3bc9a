"""The training loop: schedules, an L1 term, mixed precision, several processes, checkpoints."""

from __future__ import annotations

import contextlib
import copy
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, distributed, nn
from torch.nn import functional as F
from torch.nn.parallel import DistributedDataParallel

import fxprune
from fxprune.sparse import warmup

from .data import Batch, Data

if TYPE_CHECKING:
    from fxprune.recipes import Sparse, Training

Advance = Callable[[], None]


@dataclass(frozen=True)
class Place:
    """Where and how networks run. Under torchrun, one of `world` processes."""

    device: torch.device
    rank: int = 0
    world: int = 1
    amp: bool = False
    channels_last: bool = False

    @property
    def main(self) -> bool:
        """Whether this process prints and writes."""
        return self.rank == 0

    @property
    def format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format

    def put(self, model: nn.Module) -> nn.Module:
        return model.to(self.device).to(memory_format=self.format)

    def images(self, batch: Batch) -> Batch:
        return batch[0].contiguous(memory_format=self.format), batch[1]

    def wrapped(self, model: nn.Module) -> nn.Module:
        """The model with gradients averaged over all processes."""
        if self.world == 1:
            return model
        devices = [self.device.index] if self.device.type == "cuda" else None
        return DistributedDataParallel(model, device_ids=devices)

    def autocast(self) -> contextlib.AbstractContextManager[Any]:
        kind = torch.float16 if self.device.type == "cuda" else torch.bfloat16
        return torch.autocast(self.device.type, kind, enabled=self.amp)

    def summed(self, values: Tensor) -> Tensor:
        if self.world > 1:
            distributed.all_reduce(values)
        return values

    def align(self, model: nn.Module) -> None:
        """The first process's tensors everywhere: running statistics differ between them."""
        if self.world > 1:
            for tensor in model.state_dict().values():
                distributed.broadcast(tensor, 0)

    def wait(self) -> None:
        if self.world > 1:
            distributed.barrier()

    def leave(self) -> None:
        if self.world > 1:
            distributed.destroy_process_group()


def place(device: str, *, amp: bool, channels_last: bool) -> Place:
    """This process's place: "auto", "cpu", "cuda", "cuda:1"; torchrun's where it runs under it.
    `SystemExit` for a device that is not there."""
    name = ("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device
    world, rank = int(os.environ.get("WORLD_SIZE", 1)), int(os.environ.get("RANK", 0))
    if world == 1:
        return Place(_found(name), amp=amp, channels_last=channels_last)
    if name.startswith("cuda"):
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    found = _found(name)
    if found.type == "cuda":
        torch.cuda.set_device(found)
    distributed.init_process_group("nccl" if found.type == "cuda" else "gloo")
    return Place(found, rank, world, amp, channels_last)


def _found(name: str) -> torch.device:
    try:
        torch.zeros(1, device=name).item()  # no name is refused, nor a driver missed, before this
    except (RuntimeError, AssertionError) as error:  # torch asserts that it was built for CUDA
        reason = str(error).partition("\n")[0]
        raise SystemExit(f"--device {name} cannot be used: {reason}") from None
    return torch.device(name)


def factor(how: Training, done: float) -> float:
    """The learning rate's factor when the share `done` of all steps is done."""
    if how.schedule == "step":
        return how.gamma ** sum(done >= m for m in how.milestones)
    if how.schedule == "cosine":
        return (1 + math.cos(math.pi * done)) / 2
    if how.schedule == "one_cycle":
        warm = 0.3
        if done < warm:
            return 0.04 + 0.96 * (1 - math.cos(math.pi * done / warm)) / 2
        return (1 + math.cos(math.pi * (done - warm) / (1 - warm))) / 2
    return 1.0


def optimizer_of(how: Training, model: nn.Module) -> torch.optim.Optimizer:
    """What `how` names, over all parameters."""
    decay = how.weight_decay
    if how.optimizer == "adamw":
        return torch.optim.AdamW(model.parameters(), how.lr, weight_decay=decay)
    return torch.optim.SGD(
        model.parameters(), how.lr, how.momentum, weight_decay=decay, nesterov=how.nesterov
    )


def keep_up(model: nn.Module, steps: int) -> None:
    """Let the running statistics of normalisations follow a training of few steps. MobileNetV3's
    momentum of 0.01 is for many thousands, and would still hold what was there at the start."""
    least = min(0.1, 20 / max(steps, 1))
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.momentum is not None:
            module.momentum = max(module.momentum, least)


def seeded(*numbers: int) -> int:
    """One seed from several numbers: other numbers, another seed."""
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


class Trainer:
    """A training that can stop after any epoch and go on from a file.

    All random numbers of an epoch follow from (seed, epoch, rank), so that a training that was
    stopped and one that was not see the same images, and drop the same features.
    """

    def __init__(
        self,
        model: nn.Module,
        data: Data,
        how: Training,
        place: Place,
        *,
        sparse: Sparse | None = None,
        seed: int = 0,
        steps: int | None = None,
    ):
        if how.batch % place.world:
            raise SystemExit(f"a batch of {how.batch} cannot be dealt to {place.world} processes")
        self.data, self.how, self.place, self.seed = data, how, place, seed
        self.model = place.put(model)
        self.network = place.wrapped(self.model)
        self.optimizer = optimizer_of(how, self.model)
        self.penalty = self._penalty(sparse)
        fp16 = place.amp and place.device.type == "cuda"
        self.scaler = torch.amp.GradScaler(place.device.type, enabled=fp16)
        self.epoch, self.step = 0, 0
        whole = how.epochs * len(self.indices(0))
        self.steps = whole if steps is None else min(whole, steps)
        keep_up(self.model, self.steps)

    def _penalty(self, sparse: Sparse | None) -> fxprune.SparsityPenalty | None:
        """The L1 term on the scales of normalisations, added at every step of the optimizer."""
        if sparse is None:
            return None
        x = torch.zeros(2, 3, self.data.size, self.data.size, device=self.place.device)
        found = fxprune.SparsityPenalty(
            self.model,
            sparse.s,
            all_bn=sparse.all_bn,
            example_inputs=x,
            schedule=warmup(sparse.warmup) if sparse.warmup else None,
        )
        found.attach(self.optimizer)
        return found

    def indices(self, epoch: int) -> list[Tensor]:
        """This process's part of every batch of an epoch. The rest that fills no batch waits for
        another epoch's order."""
        count, batch = len(self.data.train), self.how.batch
        order = torch.randperm(count, generator=_generator(self.seed, epoch))
        full = order[: max(count // batch, 1) * batch].split(batch)
        return [index[self.place.rank :: self.place.world] for index in full]

    def train_epoch(self, advance: Advance) -> None:
        """One pass over the images, or what is left of the steps; `SystemExit` for a loss that is
        no number."""
        torch.manual_seed(seeded(self.seed, self.epoch, self.place.rank))
        noise = _generator(self.seed, self.epoch, 1 + self.place.rank)
        indices = self.indices(self.epoch)[: self.steps - self.step]
        total = torch.zeros((), device=self.place.device)
        self.network.train()
        for batch in self.data.batches(self.data.train, indices, self.place.device, noise):
            total += self._train_step(*self.place.images(batch))
            advance()
        self.epoch += 1
        if not math.isfinite(total):
            raise SystemExit(f"the loss is {float(total)} in epoch {self.epoch}; try a lower --lr")

    def _train_step(self, x: Tensor, y: Tensor) -> Tensor:
        for group in self.optimizer.param_groups:
            group["lr"] = self.how.lr * factor(self.how, self.step / self.steps)
        with self.place.autocast():
            loss = F.cross_entropy(self.network(x), y)
        self.optimizer.zero_grad(set_to_none=True)
        self.scaler.scale(loss).backward()
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.step += 1
        return loss.detach()

    def save(self, file: Path) -> None:
        state = {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "penalty": self.penalty.state_dict() if self.penalty else {},
            "epoch": self.epoch,
            "step": self.step,
        }
        write(file, lambda temporary: torch.save(state, temporary))

    def load(self, file: Path) -> None:
        state = torch.load(file, map_location=self.place.device, weights_only=True)
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        self.scaler.load_state_dict(state["scaler"])
        if self.penalty:
            self.penalty.load_state_dict(state["penalty"])
        self.epoch, self.step = state["epoch"], state["step"]


def fit(trainer: Trainer, checkpoint: Path, advance: Advance) -> None:
    """Train to the end, with a checkpoint after every epoch; goes on from one that is there."""
    if checkpoint.exists():
        trainer.load(checkpoint)
        for _ in range(trainer.step):
            advance()
    while trainer.step < trainer.steps:
        trainer.train_epoch(advance)
        if trainer.place.main:
            trainer.save(checkpoint)
    trainer.place.align(trainer.model)


def _generator(*numbers: int) -> torch.Generator:
    return torch.Generator().manual_seed(seeded(*numbers))


@torch.no_grad()
def accuracy(model: nn.Module, data: Data, place: Place, batch: int = 256) -> float:
    """The share of test images that are named rightly; each process looks at its part of them."""
    indices = torch.arange(len(data.test))[place.rank :: place.world].split(batch)
    right = torch.zeros((), dtype=torch.int64, device=place.device)
    place.put(model).eval()
    for loaded in data.batches(data.test, indices, place.device):
        x, y = place.images(loaded)
        with place.autocast():
            right += (model(x).argmax(1) == y).sum()
    return int(place.summed(right)) / len(data.test)


@torch.no_grad()
def latency(models: list[nn.Module], x: Tensor, place: Place, rounds: int) -> list[float]:
    """Milliseconds that each model takes for the batch `x`: the median of `rounds`, on one thread.
    The models take turns, so that another load on the machine meets all of them."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    models = [place.put(copy.deepcopy(model)).eval() for model in models]
    x = x.to(place.device, memory_format=place.format)
    times = [[_timed(model, x, place) for model in models] for _ in range(rounds + 1)]
    torch.set_num_threads(threads)
    return [1000 * statistics.median(own) for own in zip(*times[1:], strict=True)]


def _timed(model: nn.Module, x: Tensor, place: Place) -> float:
    start = time.perf_counter()
    with place.autocast():
        model(x)
    if place.device.type == "cuda":
        torch.cuda.synchronize(place.device)
    return time.perf_counter() - start


def write(file: Path, save: Callable[[Path], object]) -> None:
    """A file that is whole or not there: `save` writes another, which then takes its name."""
    file.parent.mkdir(parents=True, exist_ok=True)
    temporary = file.with_name(f".{file.name}.part")
    save(temporary)
    os.replace(temporary, file)


def write_text(file: Path, text: str) -> None:
    write(file, lambda temporary: temporary.write_text(text))
