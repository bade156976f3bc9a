"""Prune and fine-tune with DistributedDataParallel: every rank chooses the same channels.

    torchrun --nproc-per-node 2 examples/ddp.py [--output small]

Each rank prunes for itself, before the network is wrapped: the choice depends on the weights alone,
which are the same everywhere. The first rank saves.
"""

from __future__ import annotations

import argparse

import torch
import torch.distributed as dist
from demo import DigitNet, accuracy, digits
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler, TensorDataset

import fxprune


def same_everywhere(plan: fxprune.Plan) -> bool:
    """Whether all ranks have this plan."""
    found: list[str] = [""] * dist.get_world_size()
    dist.all_gather_object(found, plan.to_json())
    return len(set(found)) == 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="small")
    parser.add_argument("--epochs", type=int, default=3)
    options = parser.parse_args()
    dist.init_process_group("gloo")
    torch.manual_seed(0)
    torch.set_num_threads(1)
    data, model = digits(), DigitNet()
    pruned = fxprune.prune(model, torch.rand(2, 1, 8, 8), rate=0.5)
    print(f"rank {dist.get_rank()}: same plan everywhere: {same_everywhere(pruned.fxprune.plan)}")
    network = DistributedDataParallel(pruned.train())
    optimizer = torch.optim.SGD(network.parameters(), lr=0.1, momentum=0.9)
    images = TensorDataset(*data.train)
    sampler = DistributedSampler(images, seed=0)
    for epoch in range(options.epochs):
        sampler.set_epoch(epoch)
        for x, y in DataLoader(images, batch_size=32, sampler=sampler):
            optimizer.zero_grad()
            nn.functional.cross_entropy(network(x), y).backward()
            optimizer.step()
    if dist.get_rank() == 0:
        fxprune.save(pruned, options.output)
        print(f"accuracy {accuracy(pruned, data):.1%}, saved in {options.output}")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
