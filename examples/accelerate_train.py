"""Prune, then fine-tune with Hugging Face Accelerate: on one device, or on those it was set up for.

    pip install accelerate
    python examples/accelerate_train.py [--output small]
    accelerate launch examples/accelerate_train.py

The network is pruned before `prepare`, so what Accelerate wraps is an ordinary module.
"""

from __future__ import annotations

import argparse

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from demo import DigitNet, accuracy, digits
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import fxprune


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--output", default="small")
    parser.add_argument("--epochs", type=int, default=4)
    options = parser.parse_args()
    set_seed(0)
    accelerator = Accelerator()
    data = digits()
    pruned = fxprune.prune(DigitNet(), torch.rand(2, 1, 8, 8), rate=0.5)
    optimizer = torch.optim.AdamW(pruned.parameters(), lr=3e-3)
    images = DataLoader(TensorDataset(*data.train), batch_size=64, shuffle=True)
    network, optimizer, images = accelerator.prepare(pruned.train(), optimizer, images)
    for _ in range(options.epochs):
        for x, y in images:
            with accelerator.accumulate(network):
                accelerator.backward(nn.functional.cross_entropy(network(x), y))
                optimizer.step()
                optimizer.zero_grad()
    accelerator.wait_for_everyone()
    if accelerator.is_main_process:
        own = accelerator.unwrap_model(network).cpu()
        fxprune.save(own, options.output)
        print(f"accuracy {accuracy(own, data):.1%}, saved in {options.output}")


if __name__ == "__main__":
    main()
