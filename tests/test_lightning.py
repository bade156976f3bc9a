"""Pruning within a Lightning fit, and a run that is resumed."""

from __future__ import annotations

import logging
import warnings

import lightning
import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from fxprune.errors import ModelError, OptionError
from fxprune.lightning import IterativePruning

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)


class Module(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        self.model = nn.Sequential(
            nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16), nn.ReLU(),
            nn.Conv2d(16, 8, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4),
        )  # fmt: skip
        self.seen: list[tuple[int, int, float]] = []

    def training_step(self, batch, index):
        x, y = batch
        return nn.functional.cross_entropy(self.model(x), y)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1, momentum=0.9)
        schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
        return {"optimizer": optimizer, "lr_scheduler": schedule}

    def on_train_epoch_end(self):
        optimizer = self.optimizers()
        assert {id(p) for g in optimizer.param_groups for p in g["params"]} == {
            id(p) for p in self.parameters()
        }
        width = self.model.get_submodule("0").out_channels
        self.seen.append((self.current_epoch, width, optimizer.param_groups[0]["lr"]))


def batches() -> DataLoader:
    generator = torch.Generator().manual_seed(0)
    x = torch.rand(24, 3, 8, 8, generator=generator)
    y = torch.randint(4, (24,), generator=generator)
    return DataLoader(TensorDataset(x, y), batch_size=8)


def fit(module, epochs, folder, pruning, path=None):
    trainer = lightning.Trainer(
        max_epochs=epochs,
        accelerator="cpu",
        callbacks=[pruning, ModelCheckpoint(folder, save_last=True, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
        logger=False,
        default_root_dir=folder,
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(module, batches(), ckpt_path=path)
    return trainer


def pruning(**more) -> IterativePruning:
    return IterativePruning({1: 0.25, 3: 0.5}, example_inputs=torch.rand(2, 3, 8, 8), **more)


def test_a_fit_prunes_and_trains_on(tmp_path):
    torch.manual_seed(0)
    module = Module()
    trainer = fit(module, 4, tmp_path, pruning())
    assert [(e, w) for e, w, _ in module.seen] == [(0, 16), (1, 12), (2, 12), (3, 8)]
    assert [lr for _, _, lr in module.seen] == pytest.approx([0.05, 0.025, 0.0125, 0.00625])
    assert module.model.fxprune.plan.rate == 0.5
    assert module.model.fxprune.report.verification.difference < 1e-12
    assert float(trainer.callback_metrics["fxprune/rate"]) == 0.5


def test_a_resumed_run_ends_as_the_whole_one(tmp_path):
    torch.manual_seed(0)
    whole = Module()
    start = {name: t.clone() for name, t in whole.state_dict().items()}
    fit(whole, 4, tmp_path / "whole", pruning())
    first, second = Module(), Module()
    first.load_state_dict(start)
    second.load_state_dict(start)
    fit(first, 3, tmp_path / "part", pruning())
    fit(second, 4, tmp_path / "part", pruning(), tmp_path / "part" / "last.ckpt")
    assert [(e, w) for e, w, _ in second.seen] == [(3, 8)]
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, second.model.state_dict()[name]), name


def test_the_original_is_the_network_before_the_fit(tmp_path):
    module, callback = Module(), pruning(criterion="bn_gamma", scope="global")
    fit(module, 2, tmp_path, callback)
    assert callback.original.get_submodule("0").out_channels == 16
    assert module.model.fxprune.plan.criterion == "bn_gamma"
    assert module.model.fxprune.plan.scope == "global"


@pytest.mark.parametrize("at", [{}, {2: 0.5, 1: 0.6}, {1: 0.5, 2: 0.4}, {1: 1.5}])
def test_wrong_epochs_are_a_clear_error(at):
    with pytest.raises(OptionError):
        IterativePruning(at)


def test_a_missing_attribute_is_a_clear_error(tmp_path):
    with pytest.raises(ModelError, match="has no network `net`"):
        fit(Module(), 1, tmp_path, pruning(attribute="net"))
