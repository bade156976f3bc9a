"""The pages of docs/reference that are made from the data: `python -m tools.pages` writes them.

A test compares them with what is there, so that they cannot fall behind.
"""

from __future__ import annotations

import ast
import functools
import importlib
import inspect
import json
import re
import subprocess
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxprune import errors

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "docs" / "reference"


def main() -> None:
    for name, text in written().items():
        (FOLDER / name).write_text(text)
        print(f"docs/reference/{name}")


def written() -> dict[str, str]:
    """The text of each page, by file name."""
    made: dict[str, Callable[[], str]] = {
        "criteria.md": criteria,
        "recipes.md": recipes,
        "rules.md": rules,
        "errors.md": messages,
        "examples.md": examples,
        "changes.md": changes,
    }
    return {name: make() for name, make in made.items()}


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


def _told(*words: str) -> Any:
    """What the command says with ``--json``."""
    command = [sys.executable, "-m", "fxprune", *words, "--json"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


def _code(names: Iterable[str]) -> str:
    return ", ".join(f"`{name}`" for name in names)


# -- criteria, recipes, rules ----------------------------------------------------------------------


def criteria() -> str:
    rows = [
        [f'`"{each["name"]}"`', each["doc"], _code(each["options"]), each["paper"]]
        for each in _told("criteria")["criteria"]
    ]
    return f"""# Criteria

How much a channel matters; low scores go first. A criterion that chooses a set is told how many
channels to keep instead. Options go beside the name:
`criterion={{"name": "sparsity", "side": "below"}}`, and in a terminal `--criterion
sparsity,side=below`. [Add a criterion](../add-a-criterion.md) shows how to write one.

{table(["name", "a channel's score", "options", "source"], rows)}
"""


def recipes() -> str:
    rows = [
        [f'`"{each["name"]}"`', each["about"], f"`{_criterion(each)}`", str(each["rate"])]
        for each in _told("recipes")["recipes"]
    ]
    return f"""# Recipes that ship

`fxprune recipes show NAME` prints all of a recipe, and what its source leaves open.
[Recipes](../recipes.md) says how to use one, and how to write one.

{table(["name", "what it does", "criterion", "rate"], rows)}
"""


def _criterion(recipe: dict[str, Any]) -> str:
    given = recipe["criterion"]
    return given["name"] if isinstance(given, dict) else given


def rules() -> str:
    found = _told("rules", "list")["rules"]
    files = dict.fromkeys(_file(each) for each in found)
    parts = [_rules_of(file, [each for each in found if _file(each) == file]) for file in files]
    ops = sum(len(each["ops"]) for each in found)
    return "\n".join([_RULES.format(rules=len(found), ops=ops), *parts])


_RULES = """# Rules

What is known of each op: {rules} rules for {ops} names of ops. `dims` are the letters of each
operand and of the result; [Add an op](../add-an-op.md) explains them. An op that stands in no rule
freezes what reaches it, and the report names it.
"""


def _file(rule: dict[str, Any]) -> str:
    return rule["where"].partition(":")[0]


def _rules_of(file: str, found: list[dict[str, Any]]) -> str:
    rows = [[f"`{each['name']}`", f"`{each['flow']}`", _shortly(each["ops"])] for each in found]
    title = Path(file).stem.capitalize()
    return f"## {title}\n\n`{file}`\n\n{table(['rule', 'dims, or kind', 'ops'], rows)}\n"


def _shortly(ops: list[str]) -> str:
    """Names without their modules, each once."""
    return _code(dict.fromkeys(name.rpartition(".")[2] for name in ops))


# -- errors ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Message:
    kind: str
    fault: str
    hint: str
    file: str


def messages() -> str:
    found = sorted(dict.fromkeys(_messages()), key=lambda each: each.file)
    parts = [_errors_of(kind, [m for m in found if m.kind == kind]) for kind in _kinds()]
    return "\n".join([_ERRORS, *parts])


_ERRORS = """# Errors

Every error that fxprune raises on purpose is an `fxprune.FxpruneError`: it says what is wrong,
where, and in a `hint:` what to do. This page lists all of their texts; `…` stands for names and
numbers.
"""


@functools.cache
def _kinds() -> list[str]:
    """The classes of errors in the order in which they are written, without their base."""
    own = filter(inspect.isclass, vars(errors).values())
    return [each.__name__ for each in own if issubclass(each, errors.FxpruneError)][1:]


def _errors_of(kind: str, found: list[Message]) -> str:
    rows = [[each.fault, each.hint, f"`{each.file}`"] for each in found]
    about = inspect.getdoc(getattr(errors, kind))
    return f"## {kind}\n\n{about}\n\n{table(['what it says', 'hint', 'in'], rows)}\n"


def _messages() -> Iterator[Message]:
    for path in sorted((ROOT / "fxprune").rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        source = _Source(ast.parse(path.read_text()), file)
        for function, call in source.calls():
            if _name(call) in _kinds() and call.args:
                yield from _said(source, function, call, file)


def _said(source: _Source, function: str, call: ast.Call, file: str) -> Iterator[Message]:
    """What a call that makes an error may say: one message for each text of its fault."""
    hints = [word.value for word in call.keywords if word.arg == "hint"]
    hint = " or: ".join(text for node in hints for text in source.texts(node, function))
    for fault in source.texts(call.args[0], function):
        yield Message(_name(call), fault, hint, file)


def _name(call: ast.Call) -> str:
    return getattr(call.func, "id", getattr(call.func, "attr", ""))


class _Source:
    """The texts that expressions of a module may be, as far as they can be read off it."""

    def __init__(self, tree: ast.Module, file: str):
        self.module = file.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
        self.homes: dict[str, ast.AST] = {"": tree}
        self.homes |= {n.name: n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)}

    def calls(self) -> Iterator[tuple[str, ast.Call]]:
        """All calls, with the function that they stand in."""
        inner = {id(n) for name in self.homes if name for n in self._within(name)}
        for name in self.homes:
            for node in self._within(name):
                if isinstance(node, ast.Call) and (name or id(node) not in inner):
                    yield name, node

    def _within(self, name: str) -> Iterator[ast.AST]:
        return (n for n in ast.walk(self.homes[name]) if n is not self.homes[name])

    def texts(self, node: ast.expr, function: str) -> list[str]:
        found = self._values(node, function) if isinstance(node, ast.Name) else [node]
        return list(dict.fromkeys(_text(each) for each in found)) or ["…"]

    def _values(self, name: ast.Name, function: str) -> list[ast.expr]:
        """What a name is assigned in its function or the module, or given by calls of it."""
        for home in (function, ""):
            assigned = [n.value for n in self._within(home) if _assigns(n, name.id)]
            if assigned:
                return assigned
        return self._given(name.id, function) or self._imported(name.id)

    def _imported(self, name: str) -> list[ast.expr]:
        value = getattr(importlib.import_module(self.module), name, None)
        return [ast.Constant(value)] if isinstance(value, str) else []

    def _given(self, name: str, function: str) -> list[ast.expr]:
        home = self.homes[function]
        names = [a.arg for a in home.args.args] if isinstance(home, ast.FunctionDef) else []
        at = names.index(name) - (names[0] == "self") if name in names else None
        made = [call for _, call in self.calls() if _name(call) == function]
        return [call.args[at] for call in made if at is not None and len(call.args) > at]


def _assigns(node: ast.AST, name: str) -> bool:
    """Whether a statement is ``name = ...``."""
    target = node.targets[0] if isinstance(node, ast.Assign) else None
    return isinstance(target, ast.Name) and target.id == name


def _text(node: ast.expr) -> str:
    """What an expression will say: its literal parts, ``…`` for the others."""
    if isinstance(node, ast.Constant):
        return str(node.value).replace("<", "&lt;")
    if isinstance(node, ast.JoinedStr):
        return "".join(map(_text, node.values))
    if isinstance(node, ast.BinOp):
        return _text(node.left) + _text(node.right)
    if isinstance(node, (ast.BoolOp, ast.IfExp)):
        either = node.values if isinstance(node, ast.BoolOp) else (node.body, node.orelse)
        return " or: ".join(dict.fromkeys(map(_text, either)))
    return "…"


# -- examples, changes -----------------------------------------------------------------------------


def examples() -> str:
    parts = [_example(path) for path in sorted((ROOT / "examples").glob("*.py"))]
    return "\n".join([_EXAMPLES, *parts])


_EXAMPLES = """# Examples

Whole scripts, one idea each. The tests run all of them.
"""


def _example(path: Path) -> str:
    source = path.read_text()
    doc = ast.get_docstring(ast.parse(source)) or ""
    code = source.partition('"""')[2].partition('"""')[2].strip()
    return f"## {path.name}\n\n{_prose(doc)}\n\n```py\n{code}\n```\n"


def _prose(doc: str) -> str:
    """A docstring as Markdown: command lines become code."""
    return re.sub(r"^(?=python |torchrun )", "    ", doc, flags=re.MULTILINE)


def changes() -> str:
    return (ROOT / "CHANGELOG.md").read_text().replace("](docs/", "](../")


if __name__ == "__main__":
    main()
