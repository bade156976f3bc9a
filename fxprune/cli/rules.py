"""``fxprune rules``: what is known of each op; check and probe rules of one's own."""

from __future__ import annotations

import fnmatch
from collections.abc import Iterable, Sized
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.text import Text

from ..errors import NamingError, nearest
from . import tables
from .command import FAILED, Answer, command, of_file, option
from .output import Output

if TYPE_CHECKING:
    from ..rules import Rule

app = typer.Typer(
    name="rules",
    help="What is known of each op: list the rules, check and probe your own.",
    no_args_is_help=True,
)


@dataclass
class Which:
    """Which rules are listed."""

    search: Annotated[
        str,
        option(
            "--search",
            "-s",
            help="Part of a rule's name, or of an op's.",
            default="all",
            metavar="WORD",
        ),
    ] = ""
    kind: Annotated[
        str | None,
        option(
            help="Only of a kind: pointwise, dims, reduce, move, ...", metavar="KIND", default="all"
        ),
    ] = None


@command(
    app,
    name="list",
    examples=["fxprune rules list --search conv", "fxprune rules list --kind reduce --json"],
)
def _list(which: Which, output: Output) -> Answer:
    """List the rules: how channels flow through each op, and the file and line that say so."""
    every = _current(output)
    kinds = sorted({rule.kind for rule in every})
    if which.kind is not None and which.kind not in kinds:
        hint = nearest(which.kind, kinds) or f"kinds are {', '.join(kinds)}"
        raise NamingError(f"no rule is of kind `{which.kind}`", hint=hint)
    found = [_described(rule) for rule in every if _is_meant(rule, which)]
    rows = [
        [Text(each["name"], style="bold"), each["flow"], _ops(each["ops"]), _short(each["where"])]
        for each in found
    ]
    columns: list[tables.Column] = [
        ("rule", "left"), ("channels", "full"), ("ops", "full"), ("where", "full")
    ]  # fmt: skip
    shown = tables.table(columns, rows) if rows else Text(f"no rule holds `{which.search}`")
    return Answer({"rules": found}, [shown])


def _current(output: Output) -> list[Rule]:
    output.steps.at("load PyTorch")
    from .. import rules

    return list(rules.current().rules)


def _is_meant(rule: Rule, which: Which) -> bool:
    word = which.search.lower()
    named = any(word in text.lower() for text in (rule.name, *_names(rule)))
    return named and which.kind in (None, rule.kind)


def _names(rule: Rule) -> Iterable[str]:
    yield from rule.words
    for text in (*rule.calls, *rule.modules):
        yield text.partition("(")[0]


def _described(rule: Rule) -> dict[str, Any]:
    return {
        "name": rule.name,
        "kind": rule.kind,
        "flow": rule.dims or rule.kind,
        "ops": list(dict.fromkeys(_names(rule))),
        "samples": len(rule.samples),
        "where": rule.where,
    }


def _short(where: str) -> str:
    return where.removeprefix("rules/ops/")


def _ops(names: list[str], most: int = 4) -> str:
    short = list(dict.fromkeys(name.rpartition(".")[2] for name in names))
    rest = f" and {len(short) - most} more" if len(short) > most else ""
    return ", ".join(short[:most]) + rest


@dataclass
class One:
    """A rule file."""

    file: Annotated[Path, typer.Argument(help="A YAML file of rules.", metavar="FILE")]


@command(
    app,
    name="check",
    examples=["fxprune rules check my_rules.yaml", "fxprune rules check my_rules.yaml --json"],
)
def _check(one: One, output: Output) -> Answer:
    """Read a rule file, and say what is wrong with it, by file and line.

    This is quick and runs no op; rules probe runs them.
    """
    output.steps.at("load PyTorch")
    from .. import rules

    with of_file():
        found = rules.read(one.file)
    rows = [[rule.name, rule.dims or rule.kind, rule.where] for rule in found]
    columns: list[tables.Column] = [("rule", "left"), ("channels", "full"), ("where", "full")]
    data = {"file": str(one.file), "rules": [_described(rule) for rule in found]}
    return Answer(data, [tables.table(columns, rows), Text(f"{_number(found, 'rule')} read")])


@dataclass
class Probed:
    """What is probed."""

    what: Annotated[
        str,
        typer.Argument(
            help="A YAML file of rules, or the name of a shipped rule (patterns fit many).",
            metavar="FILE|NAME",
        ),
    ]


@command(
    app,
    name="probe",
    examples=["fxprune rules probe my_rules.yaml", "fxprune rules probe conv"],
)
def _probe(probed: Probed, output: Output) -> Answer:
    """Run the ops of rules, and compare what they do with what the rules say.

    One slice is changed at a time, and it is looked which slices of the output change. Exits with 1
    where a rule is wrong, or leaves something out.
    """
    chosen = _chosen(probed.what, _current(output))
    from ..probe import probe

    findings = []
    for number, rule in enumerate(chosen):
        output.steps.at(f"probe {rule.name}", len(chosen))
        output.steps.done(number)
        findings += probe(rule)
    data = {
        "rules": [rule.name for rule in chosen],
        "findings": [
            {"rule": f.rule, "where": f.where, "sample": f.sample, "message": f.message}
            for f in findings
        ],
    }
    head = f"{_number(chosen, 'rule')} probed, {_number(findings, 'finding')}"
    return Answer(data, [*(Text(str(f)) for f in findings), Text(head)], FAILED if findings else 0)


def _number(found: Sized, word: str) -> str:
    return f"{len(found)} {word}{'' if len(found) == 1 else 's'}"


def _chosen(what: str, every: list[Rule]) -> list[Rule]:
    if Path(what).suffix in (".yaml", ".yml") or Path(what).is_file():
        from .. import rules

        with of_file():
            return rules.read(what)
    found = [rule for rule in every if fnmatch.fnmatchcase(rule.name, what)]
    if not found:
        names = [rule.name for rule in every]
        hint = nearest(what, names) or "fxprune rules list shows all"
        raise NamingError(f"no rule is called `{what}`, and no file", hint=hint)
    return found
