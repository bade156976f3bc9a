"""The options that several commands share: how a model is named, and those of `fxprune.prune`."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from ..errors import OptionError
from .command import flag, of_file, option
from .complete import complete_criterion, complete_model, complete_recipe
from .output import Output
from .readers import READERS

_MODEL, _WHAT, _HOW, _CHECK = "The model", "What is removed", "How it may be removed", "Checks"


# -- the model -------------------------------------------------------------------------------------


@dataclass
class Named:
    """A model as a command line names it."""

    model: Annotated[
        str,
        typer.Argument(
            help="torchvision:NAME, timm:NAME, file.py:CLASS, package.module:CLASS (or a function "
            "or a model there), or a FOLDER that prune -o wrote.",
            autocompletion=complete_model,
            metavar="MODEL",
        ),
    ]
    weights: Annotated[
        str | None,
        option(
            "--weights",
            help="A .safetensors or .pt file, which must fit exactly; of a zoo's network also "
            "DEFAULT, to download what it was trained to.",
            default="random ones",
            metavar="FILE",
            rich_help_panel=_MODEL,
        ),
    ] = None
    inputs: Annotated[
        list[str] | None,
        option(
            "--input",
            "-i",
            help="Shape of an example input, 1x3x224x224 or 1x77:int64; NAME=SHAPE for one of "
            "forward's keywords. Again for more inputs.",
            default="guessed",
            metavar="SHAPE",
            rich_help_panel=_MODEL,
        ),
    ] = field(default_factory=list)
    arguments: Annotated[
        list[str] | None,
        option(
            "--arg",
            help="An argument of what builds the model, as num_classes=10. Again for more.",
            default="none",
            metavar="NAME=VALUE",
            rich_help_panel=_MODEL,
        ),
    ] = field(default_factory=list)
    device: Annotated[
        str,
        option(
            "--device",
            help="cpu, cuda, cuda:1, ...",
            metavar="NAME",
            default="cpu",
            rich_help_panel=_MODEL,
        ),
    ] = "cpu"
    seed: Annotated[
        int,
        option(
            "--seed",
            help="Of random weights and inputs.",
            metavar="N",
            default="0",
            rich_help_panel=_MODEL,
        ),
    ] = 0
    rules: Annotated[
        list[Path] | None,
        option(
            "--rules",
            help="A rule file of your own, over the shipped rules. Again for more.",
            default="none",
            metavar="FILE",
            rich_help_panel=_MODEL,
        ),
    ] = field(default_factory=list)

    def load(self, output: Output) -> Any:
        """The model itself, with the user's rules in force."""
        output.steps.at("load PyTorch")
        import torch  # noqa: F401

        from .. import naming, rules

        output.steps.at(f"build {self.model}")
        for path in self.rules or ():
            with of_file():
                rules.load(path)
        arguments = dict(naming.argument(text) for text in self.arguments or ())
        how: Any = {"device": self.device, "seed": self.seed, "weights": self.weights}
        return naming.model(self.model, arguments=arguments, **how)

    def example(self) -> Any:
        """The example inputs; None where they are to be guessed."""
        from .. import naming

        return naming.inputs(self.inputs or (), device=self.device, seed=self.seed)


# -- what prune takes ------------------------------------------------------------------------------


@dataclass
class Reading:
    """The options of `fxprune.prune` that analysis depends on too."""

    mixing: Annotated[
        Literal["norms", "all", "none"] | None,
        option(
            help="norms, all or none: ops over channels that may run on over fewer, with other "
            "statistics.",
            metavar="OPS",
            default="norms",
            rich_help_panel=_HOW,
        ),
    ] = None
    scatter: Annotated[
        bool | None,
        flag(
            "--scatter/--no-scatter",
            help="Residual streams keep their width; each branch loses channels of its own.",
            default="no-scatter",
            rich_help_panel=_HOW,
        ),
    ] = None
    heads: Annotated[
        Literal["dims", "whole", "keep"] | None,
        option(
            help="dims, whole or keep: what may go of attention heads, dims of each, whole ones, "
            "or neither.",
            metavar="WHAT",
            default="dims",
            rich_help_panel=_HOW,
        ),
    ] = None
    frontend: Annotated[
        Literal["symbolic", "export", "record"] | None,
        option(
            help="symbolic, export or record: the way to a graph.",
            metavar="WAY",
            default="the first that works",
            rich_help_panel=_HOW,
        ),
    ] = None
    strict: Annotated[
        bool,
        flag(
            "--strict",
            help="Refuse an op without a rule, instead of freezing what it touches.",
            rich_help_panel=_CHECK,
        ),
    ] = False

    def asked(self) -> dict[str, Any]:
        """These options as arguments of `fxprune.analyze`; those not given are left out."""
        own = {each.name: getattr(self, each.name) for each in fields(Reading)}
        return {name: value for name, value in own.items() if value is not None}


@dataclass
class Pruning(Reading):
    """The options of `fxprune.prune`."""

    recipe: Annotated[
        str | None,
        option(
            help="A whole pruning by name or from a YAML file; options beside it win.",
            default="none",
            autocompletion=complete_recipe,
            metavar="NAME|FILE",
            rich_help_panel=_WHAT,
        ),
    ] = None
    criterion: Annotated[
        str | None,
        option(
            "--criterion",
            "-c",
            help="How much a channel matters: NAME, NAME,OPTION=VALUE, or file.py:FUNCTION.",
            default="l2",
            autocompletion=complete_criterion,
            metavar="NAME",
            rich_help_panel=_WHAT,
        ),
    ] = None
    rate: Annotated[
        float | None,
        option(
            "--rate",
            "-r",
            help="Share of channels removed, from 0 to below 1.",
            metavar="SHARE",
            default="0.5",
            rich_help_panel=_WHAT,
        ),
    ] = None
    target: Annotated[
        list[str] | None,
        option(
            "--target",
            "-t",
            help="A budget in place of a rate: macs=0.5, params=0.5 (shares, or amounts above 1), "
            "latency_ms=4. Again for more.",
            metavar="KIND=AMOUNT",
            default="none",
            rich_help_panel=_WHAT,
        ),
    ] = field(default_factory=list)
    data: Annotated[
        str | None,
        option(
            help="Batches to calibrate and to compensate on: file.py:NAME of an iterable, or of a "
            "function that gives one.",
            metavar="FILE:NAME",
            default="none",
            rich_help_panel=_WHAT,
        ),
    ] = None
    loss: Annotated[
        str | None,
        option(
            help="A function of (output, target), as file.py:NAME, for criteria of gradients.",
            metavar="FILE:NAME",
            default="by the targets",
            rich_help_panel=_WHAT,
        ),
    ] = None
    compensate: Annotated[
        Literal["least_squares", "bias", "statistics"] | None,
        option(
            help="least_squares, bias or statistics: what is left is fitted on the data to what "
            "the original gave, without training.",
            metavar="HOW",
            default="none",
            rich_help_panel=_WHAT,
        ),
    ] = None
    sensitivity: Annotated[
        Path | None,
        option(
            help="A file that fxprune.sensitivity(...).to_json() gave: what groups lose, for a "
            "target.",
            metavar="FILE",
            default="none",
            rich_help_panel=_HOW,
        ),
    ] = None
    latency_table: Annotated[
        Path | None,
        option(
            help="A file that fxprune.LatencyTable.measure(...).to_json() gave: what ops take, for "
            "a target of latency_ms.",
            metavar="FILE",
            default="measured here",
            rich_help_panel=_HOW,
        ),
    ] = None
    normalize: Annotated[
        Literal["none", "mean", "std", "sum", "max", "kind"] | None,
        option(
            help="mean, std, sum or max: what scores of a group are divided by; kind: they are "
            "ranked among groups of one kind; none.",
            metavar="HOW",
            default="none",
            rich_help_panel=_HOW,
        ),
    ] = None
    scope: Annotated[
        Literal["local", "global"] | None,
        option(
            help="local or global: that share of each group, or of all channels together.",
            metavar="SCOPE",
            default="local",
            rich_help_panel=_WHAT,
        ),
    ] = None
    rates: Annotated[
        list[str] | None,
        option(
            help="Another rate for some layers, as 'layer1.*=0.3'. Again for more.",
            default="none",
            metavar="PATTERN=RATE",
            rich_help_panel=_WHAT,
        ),
    ] = field(default_factory=list)
    only: Annotated[
        list[str] | None,
        option(
            help="Layers to prune, by name pattern or role:stream, role:inner, role:expansion, ... "
            "Again for more.",
            default="all",
            metavar="PATTERN",
            rich_help_panel=_WHAT,
        ),
    ] = field(default_factory=list)
    ignore: Annotated[
        list[str] | None,
        option(
            help="Layers that keep all channels, in the same words; in:PATTERN keeps their inputs. "
            "Again for more.",
            default="none",
            metavar="PATTERN",
            rich_help_panel=_WHAT,
        ),
    ] = field(default_factory=list)
    select_by: Annotated[
        Literal["rate", "cumulative", "threshold", "knapsack"] | None,
        option(
            help="rate, cumulative or threshold: how scores become a choice; knapsack, which a "
            "target means: the least loss at it.",
            metavar="RULE",
            default="rate",
            rich_help_panel=_WHAT,
        ),
    ] = None
    reduce: Annotated[
        Literal["mean", "sum", "max", "first"] | None,
        option(
            help="mean, sum, max or first: how scores of coupled layers are joined.",
            metavar="HOW",
            default="mean",
            rich_help_panel=_WHAT,
        ),
    ] = None
    min_channels: Annotated[
        list[str] | None,
        option(
            help="No group gets narrower; for some layers 'layer1.*=8'. Again for more.",
            metavar="N",
            default="1",
            rich_help_panel=_HOW,
        ),
    ] = field(default_factory=list)
    max_rate: Annotated[
        list[str] | None,
        option(
            help="No group loses a larger share; for some layers 'fc=0.25'. Again for more.",
            metavar="SHARE",
            default="1.0",
            rich_help_panel=_HOW,
        ),
    ] = field(default_factory=list)
    round_to: Annotated[
        str | None,
        option(
            help="Widths are rounded up to a multiple; auto: one that the device likes.",
            default="1",
            rich_help_panel=_HOW,
            metavar="N",
        ),
    ] = None
    squeeze: Annotated[
        str | None,
        option(
            help="Squeeze layers follow the width they gate: divide=4,round_to=8; no: beside a "
            "recipe, leave them alone.",
            default="groups like any other",
            metavar="OPTIONS",
            rich_help_panel=_HOW,
        ),
    ] = None
    verify: Annotated[
        Literal["numbers", "shapes", "no"],
        option(
            help="numbers, shapes or no: compare shapes and numbers with the masked original, "
            "shapes only, or nothing.",
            metavar="WHAT",
            default="numbers",
            rich_help_panel=_CHECK,
        ),
    ] = "numbers"
    no_verify: Annotated[
        bool, flag("--no-verify", help="As --verify no.", rich_help_panel=_CHECK)
    ] = False
    dump: Annotated[
        Path | None,
        option(
            help="A folder for a text file after every step.",
            default="none",
            metavar="FOLDER",
            rich_help_panel="Files",
        ),
    ] = None

    def given(self) -> dict[str, Any]:
        """Arguments of `fxprune.prune`; those not given are left out, so that a recipe's hold."""
        own = {each.name: getattr(self, each.name) for each in fields(self)}
        own = {name: value for name, value in own.items() if value not in (None, [])}
        del own["verify"], own["no_verify"]
        found = {name: READERS.get(name, _same)(value) for name, value in own.items()}
        return {**found, "verify": self._verify()}

    def _verify(self) -> Any:
        if self.no_verify and self.verify == "shapes":
            raise OptionError("--verify shapes and --no-verify cannot both hold")
        meant: dict[str, Any] = {"numbers": True, "shapes": "shapes", "no": False}
        return meant["no" if self.no_verify else self.verify]


def _same(value: Any) -> Any:
    return value
