"""Prune within a Lightning fit: a quarter of the channels before the third epoch, half before the
fifth.

    pip install 'fxprune[lightning]'
    python examples/lightning_callback.py [--epochs 8]
"""

from __future__ import annotations

import argparse
import logging

import lightning
import torch
from demo import Data, DigitNet, digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune.lightning import IterativePruning


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = DigitNet()

    def training_step(self, batch: list[Tensor], index: int) -> Tensor:
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def validation_step(self, batch: list[Tensor], index: int) -> None:
        images, labels = batch
        found = (self.model(images).argmax(1) == labels).float().mean()
        self.log("accuracy", found, prog_bar=True)

    def on_validation_epoch_end(self) -> None:
        count = sum(p.numel() for p in self.model.parameters())
        accuracy = float(self.trainer.callback_metrics["accuracy"])
        print(f"epoch {self.current_epoch}: accuracy {accuracy:.1%}, {count:,} parameters")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        return {
            "optimizer": optimizer,
            "lr_scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7),
        }


def batches(data: Data) -> tuple[DataLoader, DataLoader]:
    train = TensorDataset(*data.train)
    test = TensorDataset(*data.test)
    return DataLoader(train, batch_size=64, shuffle=True), DataLoader(test, batch_size=1000)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--epochs", type=int, default=8)
    options = parser.parse_args()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    lightning.seed_everything(0, verbose=False)
    pruning = IterativePruning({2: 0.25, 4: 0.5}, example_inputs=torch.rand(2, 1, 8, 8))
    trainer = lightning.Trainer(
        max_epochs=options.epochs,
        accelerator="cpu",
        callbacks=[pruning],
        num_sanity_val_steps=0,
        enable_progress_bar=False,
        enable_model_summary=False,
        enable_checkpointing=False,
        logger=False,
    )
    module = Digits()
    trainer.fit(module, *batches(digits()))
    print(module.model.fxprune.report)


if __name__ == "__main__":
    main()
