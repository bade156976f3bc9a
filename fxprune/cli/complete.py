"""Words that a shell completes, found without importing torch."""

from __future__ import annotations

import ast
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from .. import zoos
from ..yamlfile import folder

_CRITERIA = Path(__file__).resolve().parents[1] / "criteria"


@dataclass(frozen=True)
class Registered:
    """A criterion as its source file has it."""

    name: str
    doc: str
    kind: str
    options: tuple[str, ...] = ()


@cache
def criteria() -> tuple[Registered, ...]:
    """The shipped criteria, sorted by name."""
    found = [each for path in _CRITERIA.glob("*.py") for each in _registered(path)]
    return tuple(sorted(found, key=lambda each: each.name))


def _registered(path: Path) -> Iterator[Registered]:
    for node in ast.parse(path.read_text(encoding="utf-8")).body:
        if not isinstance(node, ast.FunctionDef):
            continue
        for call in node.decorator_list:
            if isinstance(call, ast.Call) and getattr(call.func, "id", "") == "criterion":
                yield _read(node, call)


def _read(function: ast.FunctionDef, call: ast.Call) -> Registered:
    named = {key.arg: ast.literal_eval(key.value) for key in call.keywords}
    kind = named.get("kind", "score")
    arguments = [*function.args.args, *function.args.kwonlyargs]
    options = [a.arg for a in arguments[1 if kind == "score" else 2 :]]
    doc = " ".join((ast.get_docstring(function) or "").split())
    return Registered(ast.literal_eval(call.args[0]), doc, kind, tuple(options))


@cache
def recipes() -> tuple[str, ...]:
    """The shipped recipes, variants among them."""
    found: list[str] = []
    for path in sorted((folder() / "recipes").glob("*.yaml")):
        found += [path.stem, *(f"{path.stem}:{name}" for name in _variants(path))]
    return tuple(found)


def _variants(path: Path) -> Iterable[str]:
    import yaml

    data = yaml.load(
        path.read_text(encoding="utf-8"), getattr(yaml, "CSafeLoader", yaml.SafeLoader)
    )
    return [str(name) for name in data.get("variants") or {}]


def _models() -> Iterator[str]:
    for zoo in zoos.ZOOS:
        yield from (f"{zoo}:{name}" for name in zoos.names(zoo))


# -- what typer calls ------------------------------------------------------------------------------


def complete_model(incomplete: str) -> list[str]:
    """Names of networks, classes in a file, files and folders."""
    path, colon, _ = incomplete.rpartition(":")
    if colon and path.endswith(".py"):
        words: Iterable[str] = (f"{path}:{name}" for name in zoos.classes(Path(path)))
    elif colon:
        words = _models()
    else:
        words = [*(f"{zoo}:" for zoo in zoos.ZOOS if zoos.installed(zoo)), *_paths(incomplete)]
    return [word for word in words if word.startswith(incomplete)]


def _paths(incomplete: str) -> Iterator[str]:
    at = Path(incomplete if incomplete.endswith("/") else Path(incomplete).parent)
    for path in sorted(at.iterdir()) if at.is_dir() else ():
        if path.suffix == ".py":
            yield f"{path}:"
        elif path.is_dir() and not path.name.startswith("."):
            yield f"{path}/"


def complete_criterion(incomplete: str) -> list[str]:
    return [each.name for each in criteria() if each.name.startswith(incomplete)]


def complete_recipe(incomplete: str) -> list[str]:
    return [name for name in recipes() if name.startswith(incomplete)]


# -- bash ------------------------------------------------------------------------------------------


def joined(words: Sequence[str], at: int) -> tuple[list[str], int]:
    """Bash takes ``torchvision:resnet18`` for three words: they are one again, and so is the
    number of the word that is completed."""
    made: list[str] = []
    number = at
    glued = False
    for i, word in enumerate(words):
        if made and (word.startswith(":") or glued):
            made[-1] += word
            number -= i <= at
        else:
            made.append(word)
        glued = word.endswith(":")
    return made, number


def prepare_bash() -> str:
    """Join the words that bash asks about; what stands before the last colon of the one that is
    completed, which must not stand in the answers."""
    words, at = os.environ.get("COMP_WORDS", "").split("\n"), os.environ.get("COMP_CWORD", "0")
    made, number = joined(words, int(at) if at.isdecimal() else 0)
    os.environ["COMP_WORDS"], os.environ["COMP_CWORD"] = "\n".join(made), str(number)
    current = made[number] if number < len(made) else ""
    return current[: current.rfind(":") + 1]
