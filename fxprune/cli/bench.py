"""``fxprune bench``: latency before and after."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.console import RenderableType
from rich.text import Text

from . import tables
from .command import Answer, command, flag, option
from .complete import complete_model
from .options import Named, Pruning
from .output import Output

_MEASURE = "How it is measured"


@dataclass
class Measuring:
    """What is measured, and how long."""

    other: Annotated[
        str | None,
        typer.Argument(
            help="What to compare with: another model, or a folder of prune -o; without it, the "
            "model pruned.",
            autocompletion=complete_model,
            metavar="OTHER",
            show_default=False,
        ),
    ] = None
    on: Annotated[
        list[str] | None,
        option(
            "--on",
            help="Where to measure: cpu, cuda. Again for more.",
            default="cpu, and cuda if there",
            metavar="DEVICE",
            rich_help_panel=_MEASURE,
        ),
    ] = field(default_factory=list)
    batch: Annotated[
        list[int] | None,
        option(
            "--batch",
            "-b",
            help="Batch size. Again for more.",
            default="1 and 8",
            metavar="N",
            rich_help_panel=_MEASURE,
        ),
    ] = field(default_factory=lambda: [1, 8])
    threads: Annotated[
        int | None,
        option(
            help="Of torch, on the CPU.",
            default="as torch has",
            metavar="N",
            rich_help_panel=_MEASURE,
        ),
    ] = None
    rounds: Annotated[
        int | None,
        option(
            help="How many samples of each.",
            default="as many as fit into --seconds",
            metavar="N",
            rich_help_panel=_MEASURE,
        ),
    ] = None
    seconds: Annotated[
        float,
        option(
            help="Time for each device and batch size, beside warming up.",
            default="5",
            metavar="S",
            rich_help_panel=_MEASURE,
        ),
    ] = 5.0
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16", "float16"] | None,
        option(
            help="Cast both networks: float32, float64, bfloat16 or float16.",
            default="as they are",
            metavar="DTYPE",
            rich_help_panel=_MEASURE,
        ),
    ] = None
    channels_last: Annotated[
        bool,
        flag("--channels-last", help="Lay out both channels last.", rich_help_panel=_MEASURE),
    ] = False
    compile: Annotated[
        bool,
        flag(
            "--compile",
            help="Compile both with torch.compile, which is not counted.",
            rich_help_panel=_MEASURE,
        ),
    ] = False

    @property
    def changes(self) -> bool:
        """Whether networks are measured otherwise than they are."""
        return self.dtype is not None or self.channels_last or self.compile


def register(app: typer.Typer, panel: str) -> None:
    command(
        app,
        panel=panel,
        examples=[
            "fxprune bench torchvision:resnet18 --rate 0.5 --batch 1 --seconds 2",
            "fxprune bench torchvision:resnet18 small/ --batch 4 --threads 1 --seconds 2",
        ],
    )(bench)


def bench(named: Named, measuring: Measuring, chosen: Pruning, output: Output) -> Answer:
    """Measure latency before and after pruning, the two networks taking turns.

    The figure is the median; beside it stands the interval that holds the true median with 95 %.
    The speed-up is the median of the ratios of each round.
    """
    model = named.load(output)
    example = named.example()
    other = _other(model, example, named, measuring, chosen, output)
    both = {"before": model, "after": other}
    found = [
        _latency(_deployed(both, measuring, device), example, measuring, device, output)
        for device in measuring.on or _devices()
    ]
    output.steps.close()
    _remark(found, output)
    data = {"threads": found[0].threads, "confidence": found[0].confidence}
    rows = [_row(each) for one in found for each in one.measured]
    ratios = [_row(each) for one in found for each in one.speedups]
    return Answer({**data, "measured": rows, "speedups": ratios}, _shown(found))


def _other(
    model: Any, example: Any, named: Named, measuring: Measuring, chosen: Pruning, output: Output
) -> Any:
    import fxprune

    if measuring.other is None:
        output.steps.at("trace", 7)
        return fxprune.prune(model, example, watch=output.steps.watch, **chosen.given())
    if Path(measuring.other).is_dir():
        output.steps.at(f"load {measuring.other}")
        return fxprune.load(measuring.other, model)
    own = {each.name: getattr(named, each.name) for each in fields(named)}
    alone = {**own, "model": measuring.other, "weights": None, "arguments": [], "rules": []}
    return Named(**alone).load(output)


def _devices() -> list[str]:
    import torch

    return ["cpu", "cuda"] if torch.cuda.is_available() else ["cpu"]


def _deployed(networks: dict[str, Any], measuring: Measuring, device: str) -> dict[str, Any]:
    """Copies as they would be deployed; the networks themselves where nothing is asked."""
    if not measuring.changes:
        return networks
    import torch

    from ..check import usable_device

    def made(model: Any) -> Any:
        how: Any = {"memory_format": torch.channels_last} if measuring.channels_last else {}
        dtype = getattr(torch, measuring.dtype) if measuring.dtype else None
        own = copy.deepcopy(model).eval().to(device=usable_device(device), dtype=dtype, **how)
        return torch.compile(own) if measuring.compile else own

    return {name: made(model) for name, model in networks.items()}


def _latency(networks: Any, example: Any, measuring: Measuring, device: str, output: Output) -> Any:
    from ..latencies import latency

    def progress(what: str, share: float) -> None:
        if what != output.steps.name:
            output.steps.at(what, 1.0)
        output.steps.done(share)

    return latency(
        networks,
        example,
        device=device,
        batch_sizes=measuring.batch or (1, 8),
        threads=measuring.threads,
        rounds=measuring.rounds,
        budget_s=measuring.seconds,
        progress=progress,
    )


def _remark(found: Any, output: Output) -> None:
    """What makes figures less sure than they look."""
    for each in (m for one in found for m in one.measured):
        where = f"{each.name} on {each.device}, batch {each.batch}"
        if not each.settled:
            output.warn(f"{where}: times had not become stable after warming up")
        if abs(each.drift) > 0.1:
            output.warn(f"{where}: the second half took {each.drift:+.0%} of the first; run again")
        if each.outliers > each.rounds / 10:
            output.warn(f"{where}: {each.outliers} of {each.rounds} samples are far from the rest")


def _row(each: Any) -> dict[str, Any]:
    own = {f.name: getattr(each, f.name) for f in fields(each)}
    return {name: value for name, value in own.items() if name != "samples_ms"}


def _shown(found: Any) -> list[RenderableType]:
    columns: list[tables.Column] = [
        ("on", "left"), ("batch", "right"), ("network", "left"), ("ms", "right"),
        ("95 % interval", "right"), ("rounds", "right"), ("outliers", "right"),
    ]  # fmt: skip
    rows = []
    for one in found:
        for m in one.measured:
            between = f"{m.low_ms:.3g} to {m.high_ms:.3g}"
            rows.append(
                [m.device, m.batch, m.name, f"{m.median_ms:.4g}", between, m.rounds, m.outliers]
            )
    ratios = [each for one in found for each in one.speedups]
    lines = [
        Text.assemble(
            f"{s.device}, batch {s.batch}: ",
            (f"{s.median:.2f} times as fast", "bold"),
            f" [{s.low:.2f}, {s.high:.2f}]",
        )
        for s in ratios
    ]
    threads = Text(str(found[0]).splitlines()[0], style="dim")
    return [tables.table(columns, rows), *lines, threads]


__all__ = ["bench", "register"]
