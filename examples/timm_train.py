"""A network of timm: create, prune, train as timm's own script does, save.

    python examples/timm_train.py [--model resnet18] [--pretrained] [--output small]

The optimizer, the schedule, the loss and the running average of weights are timm's, as in its own
train.py. The pictures are handwritten digits, enlarged.
"""

from __future__ import annotations

import argparse
from types import SimpleNamespace

import timm
import torch
from demo import Data, accuracy, digits
from timm.loss import LabelSmoothingCrossEntropy
from timm.optim import create_optimizer_v2, optimizer_kwargs
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3
from torch import nn

import fxprune


def enlarged(data: Data, side: int = 32) -> Data:
    def picture(x: torch.Tensor) -> torch.Tensor:
        return nn.functional.interpolate(x, side, mode="bilinear").expand(-1, 3, -1, -1)

    return Data(*((picture(x), y) for x, y in (data.train, data.test)))


def train(network: nn.Module, data: Data, epochs: int) -> nn.Module:
    """What timm's train.py does in an epoch, and the average of the weights."""
    settings = SimpleNamespace(opt="sgd", lr=0.05, weight_decay=2e-5, momentum=0.9)
    optimizer = create_optimizer_v2(network, **optimizer_kwargs(settings))
    schedule, epochs = create_scheduler_v2(optimizer, "cosine", num_epochs=epochs, warmup_epochs=1)
    average, loss_of = ModelEmaV3(network, decay=0.9), LabelSmoothingCrossEntropy(0.1)
    for epoch in range(epochs):
        network.train()
        schedule.step(epoch)
        images, labels = data.train
        for part in torch.randperm(len(images)).split(64):
            optimizer.zero_grad()
            loss_of(network(images[part]), labels[part]).backward()
            optimizer.step()
            average.update(network)
    return average.module


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--model", default="resnet18")
    parser.add_argument("--pretrained", action="store_true")
    parser.add_argument("--epochs", type=int, default=4)
    parser.add_argument("--output", default="small")
    options = parser.parse_args()
    torch.manual_seed(0)
    data = enlarged(digits())
    model = timm.create_model(options.model, pretrained=options.pretrained, num_classes=10)
    pruned = fxprune.prune(model, torch.rand(2, 3, 32, 32), rate=0.75)
    print(pruned.fxprune.report)
    best = train(pruned, data, options.epochs)
    fxprune.save(best, options.output)
    print(f"accuracy {accuracy(best, data):.1%}, saved in {options.output}")


if __name__ == "__main__":
    main()
