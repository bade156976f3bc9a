"""The names of torchvision's and timm's networks, read from their source files.

Importing either library takes seconds, which a shell that completes a word does not have; so the
files are searched for what they register.
"""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path

ZOOS = ("torchvision", "timm")
_REGISTERED = re.compile(
    r"^@register_model(?:\((?:\s*name\s*=\s*[\"'](\w+)[\"'])?[^)]*\))?\s*\n"
    r"(?:@(?:[^\n]*\n(?:[ )]+[^\n]*\n)*))*"
    r"def (\w+)",
    re.MULTILINE,
)


@cache
def names(zoo: str) -> tuple[str, ...]:
    """All names that a zoo registers, sorted; none where it is not installed."""
    found = {name for path in _files(zoo) for name in _registered(path)}
    return tuple(sorted(found))


def installed(zoo: str) -> bool:
    """Whether a package is there; it is not imported."""
    return importlib.util.find_spec(zoo) is not None


def _files(zoo: str) -> Iterator[Path]:
    spec = importlib.util.find_spec(zoo)
    for folder in (spec.submodule_search_locations or ()) if spec is not None else ():
        yield from sorted(Path(folder, "models").rglob("*.py"))


def _registered(path: Path) -> Iterator[str]:
    text = path.read_text(encoding="utf-8", errors="replace")
    if "register_model" in text:
        for given, name in _REGISTERED.findall(text):
            yield given or name


def classes(path: Path) -> list[str]:
    """The classes that a Python file defines at its top; none where it cannot be read."""
    try:
        tree = ast.parse(path.read_bytes())
    except (OSError, SyntaxError, ValueError):
        return []
    return [node.name for node in tree.body if isinstance(node, ast.ClassDef)]
