"""``fxprune criteria`` and ``fxprune recipes``: what can be named in options."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Annotated, Any

import typer
from rich.console import RenderableType
from rich.text import Text

from . import tables
from .command import Answer, Nothing, command, listing
from .complete import Registered, complete_recipe, criteria
from .output import Output

recipes_app = typer.Typer(name="recipes", help="Whole prunings by name: list them, or show one.")

_PAPER = re.compile(r"\(([^()]*\b(?:19|20)\d\d\b[^()]*)\)")


def register(app: typer.Typer, panel: str) -> None:
    command(app, panel=panel, examples=["fxprune criteria", "fxprune criteria --json"])(_criteria)
    listing(recipes_app, _list)
    app.add_typer(recipes_app, rich_help_panel=panel)


def _criteria(nothing: Nothing, output: Output) -> Answer:
    """List the criteria: how much a channel matters.

    Options of a criterion follow its name: --criterion sparsity,side=below.
    """
    found = [_described(each) for each in criteria()]
    rows = [
        [Text(each["name"], style="bold"), _with_options(each), each["paper"]] for each in found
    ]
    columns: list[tables.Column] = [
        ("name", "left"),
        ("a channel's score", "full"),
        ("paper", "full"),
    ]
    return Answer({"criteria": found}, [tables.table(columns, rows)])


def _with_options(each: dict[str, Any]) -> str:
    kind = "Chooses a set. " if each["kind"] == "set" else ""
    options = f" Options: {', '.join(each['options'])}." if each["options"] else ""
    return f"{kind}{each['doc']}{options}"


def _described(each: Registered) -> dict[str, Any]:
    papers = _PAPER.findall(each.doc)
    doc = re.sub(r"\s+([.,;:])", r"\1", _PAPER.sub("", each.doc))
    first = re.split(r"(?<=[.;])\s", doc.strip())[0].rstrip(".;")
    return {
        "name": each.name,
        "doc": f"{first}.",
        "paper": "; ".join(papers),
        "kind": each.kind,
        "options": list(each.options),
    }


# -- recipes ---------------------------------------------------------------------------------------


@dataclass
class Which:
    """Which recipe is shown."""

    name: Annotated[
        str,
        typer.Argument(
            help="A recipe by name, with its variant behind a colon, or a YAML file.",
            autocompletion=complete_recipe,
            metavar="NAME",
        ),
    ]


@command(recipes_app, name="list", examples=["fxprune recipes", "fxprune recipes list --json"])
def _list(nothing: Nothing, output: Output) -> Answer:
    """List the shipped recipes, variants among them.

    A YAML file of your own works the same way: fxprune prune MODEL --recipe my.yaml.
    """
    output.steps.at("load PyTorch")
    from .. import recipes

    found = [_of(recipes.find(name), name) for name in recipes.names()]
    rows = [[Text(each["name"], style="bold"), each["about"]] for each in found]
    columns: list[tables.Column] = [("name", "left"), ("what it does", "full")]
    return Answer({"recipes": found}, [tables.table(columns, rows)])


def _of(recipe: Any, name: str) -> dict[str, Any]:
    given = {"name": name, "about": recipe.about, "source": recipe.source}
    return {**given, "criterion": recipe.criterion, "rate": recipe.rate}


@command(
    recipes_app,
    name="show",
    examples=["fxprune recipes show network_slimming", "fxprune recipes show fpgm --json"],
)
def _show(which: Which, output: Output) -> Answer:
    """Show a recipe: all of its settings, and what its source leaves open."""
    output.steps.at("load PyTorch")
    from .. import recipes

    recipe = recipes.find(which.name)
    data = recipe.model_dump()
    return Answer({"recipe": data}, _page(data))


def _page(data: dict[str, Any]) -> list[RenderableType]:
    head = Text(data["name"], style="bold")
    prose = [Text(data[key]) for key in ("about",) if data[key]]
    said = ("name", "about", "variants")
    rows = [
        [key, _value(value)] for key, value in data.items() if key not in said and _is_said(value)
    ]
    variants = [Text(f"variants: {', '.join(data['variants'])}")] if data["variants"] else []
    return [head, *prose, tables.table([("field", "left"), ("value", "full")], rows), *variants]


def _is_said(value: Any) -> bool:
    return value is not None and value not in ("", [], {}, ())


def _value(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{key}: {_value(item)}" for key, item in value.items() if _is_said(item))
    if isinstance(value, (list, tuple)):
        return ", ".join(map(_value, value))
    return " ".join(str(value).split())
