"""Pruning within a Lightning fit: ``Trainer(callbacks=[IterativePruning({2: 0.3, 4: 0.5})])``.

Needs the extra ``lightning``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from torch import nn

from .api import apply
from .check import check_share
from .errors import ModelError, OptionError
from .iterating import iterate
from .plans import Plan


class IterativePruning(Callback):
    """Prunes a module's network at the beginning of given epochs, and trains on.

    The network is an attribute of the LightningModule. At each epoch of `at`, it is pruned to that
    rate of the original (see `fxprune.iterate`), optimizers and schedulers are configured anew with
    the new parameters, and schedulers go on where they were. Checkpoints hold the plan: a run that
    is resumed from one builds the narrow network first. One device only.

    Args:
        at: epoch -> rate of the original's channels that are gone from then on; rates grow.
        attribute: the name of the network in the module.
        example_inputs: as in `fxprune.prune`; by default the module's ``example_input_array``, or
            guessed.
        options: those of `fxprune.iterate`, but for rate, steps and schedule.

    Raises `OptionError` where `at` is no such mapping, or several devices train.
    """

    def __init__(
        self,
        at: Mapping[int, float],
        *,
        attribute: str = "model",
        example_inputs: Any = None,
        **options: Any,
    ):
        if not at or list(at.values()) != sorted(set(at.values())) or sorted(at) != list(at):
            hint = "IterativePruning({2: 0.3, 4: 0.5})"
            raise OptionError("at must map growing epochs to growing rates", hint=hint)
        for epoch, rate in at.items():
            check_share(f"at[{epoch}]", rate)
        self.at, self.attribute = dict(at), attribute
        self.example_inputs, self.options = example_inputs, options
        self.original: nn.Module | None = None

    # -- hooks -----------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.world_size > 1:
            raise OptionError(
                f"IterativePruning trains on one device, and {trainer.world_size} are there",
                hint="prune before the fit: module.model = fxprune.prune(module.model)",
            )
        if self.original is None:
            self.original = copy.deepcopy(self._network(pl_module))
        self._narrow_before_loading(pl_module)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        pl_module.__dict__.pop("on_load_checkpoint", None)

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        rate = self.at.get(trainer.current_epoch)
        if rate is None or rate <= self._rate_of(pl_module):
            return
        pruned = next(self._steps(pl_module, rate)).to(pl_module.device)
        setattr(pl_module, self.attribute, pruned.train())
        _new_optimizers(trainer)
        macs = float(pruned.fxprune.report.macs[1])
        pl_module.log_dict({"fxprune/rate": rate, "fxprune/macs": macs})

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        info = getattr(self._network(pl_module), "fxprune", None)
        if info is not None:
            checkpoint["fxprune_plan"] = info.plan.to_json()

    # -- networks --------------------------------------------------------------------------------

    def _network(self, pl_module: LightningModule) -> Any:
        found = getattr(pl_module, self.attribute, None)
        if not isinstance(found, nn.Module):
            raise ModelError(
                f"{type(pl_module).__name__} has no network `{self.attribute}`",
                hint="name the attribute that holds it: IterativePruning(..., attribute='net')",
            )
        return found

    def _rate_of(self, pl_module: LightningModule) -> float:
        info = getattr(self._network(pl_module), "fxprune", None)
        return (info.plan.rate or 0.0) if info is not None else 0.0

    def _steps(self, pl_module: LightningModule, rate: float) -> Iterator[Any]:
        network = self._network(pl_module)
        started = hasattr(network, "fxprune")
        original = self.original if started else network
        inputs = self.example_inputs
        inputs = pl_module.example_input_array if inputs is None else inputs
        start = network if started else None
        assert original is not None  # set up before the fit
        own = copy.deepcopy(original).to(pl_module.device)
        return iterate(own, inputs, rate=rate, steps=1, start=start, **self.options)

    def _narrow_before_loading(self, pl_module: LightningModule) -> None:
        """Have the network made as narrow as a checkpoint's before its weights are loaded: the
        module's own hook is the only one that Lightning calls so early."""
        own = pl_module.on_load_checkpoint

        def narrowed(checkpoint: dict[str, Any]) -> None:
            text = checkpoint.get("fxprune_plan")
            if text is not None and self.original is not None:
                pruned = apply(self.original, Plan.from_json(text), verify=False)
                setattr(pl_module, self.attribute, pruned.to(pl_module.device))
            own(checkpoint)

        pl_module.__dict__["on_load_checkpoint"] = narrowed


def _new_optimizers(trainer: Trainer) -> None:
    """Optimizers and schedulers for the parameters that are there now."""
    before = [config.scheduler.state_dict() for config in trainer.lr_scheduler_configs]
    trainer.strategy.setup_optimizers(trainer)
    for config, state in zip(trainer.lr_scheduler_configs, before, strict=True):
        config.scheduler.load_state_dict(state)
        rates = config.scheduler.get_last_lr()
        for group, rate in zip(config.scheduler.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate
