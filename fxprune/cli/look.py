"""``fxprune groups``, ``explain`` and ``count``: a network before anything is chosen."""

from __future__ import annotations

import fnmatch
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

import typer
from rich.console import RenderableType
from rich.text import Text

from . import tables
from .command import Answer, command, flag, option
from .options import Named, Reading
from .output import Output

if TYPE_CHECKING:
    from ..analysis import Analysis, Frozen
    from ..groups import Group

_WHICH = "Which groups"


@dataclass
class Which:
    """Which groups are listed, and in which order."""

    match: Annotated[
        str,
        option(
            "--filter",
            "-f",
            help="Only groups with a layer whose name fits.",
            default="*",
            metavar="PATTERN",
            rich_help_panel=_WHICH,
        ),
    ] = "*"
    state: Annotated[
        Literal["all", "free", "frozen"],
        option(
            help="all, free or frozen: only those that may shrink, or may not.",
            metavar="STATE",
            default="all",
            rich_help_panel=_WHICH,
        ),
    ] = "all"
    sort: Annotated[
        Literal["graph", "name", "channels", "layers"],
        option(
            help="graph, name, channels or layers: the order; the largest first.",
            metavar="ORDER",
            default="graph",
            rich_help_panel=_WHICH,
        ),
    ] = "graph"
    limit: Annotated[
        int,
        option(
            help="At most so many; 0 for all.",
            default="0",
            metavar="N",
            min=0,
            rich_help_panel=_WHICH,
        ),
    ] = 0
    members: Annotated[bool, flag("--members", help="List all slices.", rich_help_panel=_WHICH)] = (
        False
    )


def register(app: typer.Typer, panel: str) -> None:
    command(
        app,
        panel=panel,
        examples=[
            "fxprune groups torchvision:resnet18 --sort channels --limit 5",
            "fxprune groups torchvision:resnet18 --filter 'layer1.*' --members",
        ],
    )(groups)
    command(
        app,
        panel=panel,
        examples=[
            "fxprune explain torchvision:resnet18 conv1 layer1.0.conv2",
            "fxprune explain torchvision:resnet18 fc",
        ],
    )(explain)
    command(
        app,
        panel=panel,
        examples=[
            "fxprune count torchvision:resnet18",
            "fxprune count torchvision:resnet18 -i 1x3x64x64 --json",
        ],
    )(count)


def _analysis(named: Named, reading: Reading, output: Output) -> Analysis:
    model = named.load(output)
    import fxprune

    output.steps.at("trace", 3)
    return fxprune.analyze(model, named.example(), watch=_watch(output), **reading.asked())


def _watch(output: Output) -> Callable[[str, Any, Any], None]:
    """The analysis is the first three steps of the pipeline."""
    following = {"trace": "flow", "flow": "groups", "groups": "report"}

    def watch(step: str, before: Any, after: Any) -> None:
        output.steps.at(following[step], 3)
        output.steps.done([*following].index(step) + 1)

    return watch


# -- groups ----------------------------------------------------------------------------------------


def groups(named: Named, which: Which, reading: Reading, output: Output) -> Answer:
    """List the channel groups: what must shrink together, and what cannot shrink at all.

    A group is named after the layer that makes its channels. Those that may not shrink say why.
    """
    analysis = _analysis(named, reading, output)
    stuck = iter(analysis.frozen)  # in the order of the groups that are
    every = [_described(g, None if g.prunable else next(stuck)) for g in analysis.groups]
    chosen = _ordered([g for g in every if _is_meant(g, which)], which.sort)
    shown = chosen[: which.limit] if which.limit else chosen
    free = [g for g in every if g["may_shrink"]]
    totals = {
        "groups": len(every),
        "may_shrink": len(free),
        "channels": sum(g["channels"] for g in every),
        "channels_may_shrink": sum(g["channels"] for g in free),
    }
    output.steps.close()
    for text in analysis.warnings:
        output.warn(text)
    data = {"totals": totals, "warnings": analysis.warnings, "groups": shown}
    return Answer(data, _shown(shown, chosen, totals, which))


def _described(group: Group, frozen: Frozen | None) -> dict[str, Any]:
    from ..explain import members_text

    made, read = members_text(group)
    layers = {member.param.rpartition(".")[0] or member.param for member in group.members}
    return {
        "name": group.name,
        "channels": len(group),
        "may_shrink": group.prunable,
        "reason": frozen.reason if frozen else "",
        "node": frozen.node if frozen else "",
        "source": frozen.source if frozen else "",
        "layers": sorted(layers),
        "makes": made,
        "reads": read,
    }


def _is_meant(group: dict[str, Any], which: Which) -> bool:
    fits = any(fnmatch.fnmatchcase(name, which.match) for name in (group["name"], *group["layers"]))
    return fits and which.state in ("all", "free" if group["may_shrink"] else "frozen")


def _ordered(found: list[dict[str, Any]], sort: str) -> list[dict[str, Any]]:
    keys: dict[str, Callable[[dict[str, Any]], Any]] = {
        "name": lambda group: group["name"],
        "channels": lambda group: -group["channels"],
        "layers": lambda group: -len(group["layers"]),
    }
    return sorted(found, key=keys[sort]) if sort in keys else found


def _shown(
    shown: list[dict[str, Any]],
    chosen: list[dict[str, Any]],
    totals: dict[str, int],
    which: Which,
) -> list[RenderableType]:
    head = (
        f"{totals['may_shrink']} of {totals['groups']} groups may shrink, with "
        f"{totals['channels_may_shrink']:,} of {totals['channels']:,} channels"
    )
    if not chosen:
        return [Text(head), Text("none of them fits --filter and --state")]
    rest = len(chosen) - len(shown)
    more = [Text(f"and {rest} more", style="dim")] if rest else []
    return [Text(head), *(_blocks(shown) if which.members else [_table(shown)]), *more]


def _table(shown: list[dict[str, Any]]) -> RenderableType:
    columns: list[tables.Column] = [
        ("group", "left"), ("channels", "right"), ("layers", "right"), ("", "full")
    ]  # fmt: skip
    return tables.table(
        columns, [[g["name"], f"{g['channels']:,}", len(g["layers"]), _state(g)] for g in shown]
    )


def _state(group: dict[str, Any]) -> Text:
    if group["may_shrink"]:
        return Text("may shrink", style="green")
    where = f" ({group['source']})" if group["source"] else ""
    return Text.assemble(("stays: ", "yellow"), f"{group['reason']}{where}")


def _blocks(shown: list[dict[str, Any]]) -> list[RenderableType]:
    blocks: list[RenderableType] = []
    for group in shown:
        head = Text(f"\n{group['name']}, {group['channels']:,} channels, ", style="bold")
        blocks.append(head + _state(group))
        blocks += [Text(f"  makes  {text}") for text in group["makes"]]
        blocks += [Text(f"  reads  {text}") for text in group["reads"]]
    return blocks


# -- explain ---------------------------------------------------------------------------------------


@dataclass
class Layers:
    """What is to be explained."""

    a: Annotated[str, typer.Argument(help="A layer or a parameter.", metavar="A")]
    b: Annotated[
        str | None,
        typer.Argument(
            help="Another one: the chain of ties to it.", metavar="B", show_default=False
        ),
    ] = None


def explain(named: Named, layers: Layers, reading: Reading, output: Output) -> Answer:
    """Explain why a layer is in its group, or by which lines of code two layers are coupled.

    With one name: its groups, and why they may not shrink. With two: each tie between them, with
    the line of the model's source that makes it.
    """
    found = _analysis(named, reading, output).explain(layers.a, layers.b)
    steps = [asdict(step) for step in found.steps]
    data = {"title": found.title, "steps": steps, "lines": list(found.lines)}
    return Answer(data, [Text(str(found))])


# -- count -----------------------------------------------------------------------------------------


def count(named: Named, output: Output) -> Answer:
    """Count a network's parameters and operations, for one item of the batch.

    MACs are multiply-accumulates of convolutions and linear layers; slimming FLOPs count as in
    Network Slimming. They depend on the input's size.
    """
    analysis = _analysis(named, Reading(), output)
    counts, inputs = analysis.counts(), analysis.inputs
    rows = [
        ["parameters", f"{counts.parameters:,}"],
        ["MACs", f"{counts.macs:,}"],
        ["slimming FLOPs", f"{counts.slimming:,}"],
    ]
    guessed = f", guessed from {inputs.guessed}" if inputs.guessed else ""
    name = type(analysis.model).__name__
    data = {
        "model": name,
        "inputs": inputs.describe(),
        "parameters": counts.parameters,
        "macs": counts.macs,
        "slimming_flops": counts.slimming,
    }
    head = Text(f"{name} on {inputs.describe()}{guessed}")
    return Answer(data, [head, tables.table([("", "left"), ("", "right")], rows)])
