"""YAML files whose errors name file, line and the nearest word that is known."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import yaml

from .errors import FxpruneError

_HERE = Path(__file__).resolve().parent


class Fault(ValueError):
    """One of fxprune's errors on its way through pydantic, which keeps `ValueError`s only."""

    def __init__(self, error: FxpruneError):
        self.error = error
        super().__init__(error.fault)


def folder() -> Path:
    """Where the shipped rules lie: beside the package in a checkout, inside it in a wheel."""
    inside = _HERE / "_rules"
    return inside if inside.is_dir() else _HERE.parent / "rules"


def shown(path: Path) -> str:
    """A path for people: shipped files without the folder they were installed to."""
    return f"rules/{path.parent.name}/{path.name}" if folder() in path.parents else str(path)


def text_of(path: Path, error: type[FxpruneError]) -> str:
    """A file's text; `error` where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror}", hint="a YAML file") from None
    except UnicodeDecodeError as fault:
        raise error(f"{path} is not UTF-8 text: {fault.reason}") from None


def parsed(text: str, where: str, error: type[FxpruneError]) -> tuple[Any, Any]:
    """A file's YAML as nodes, which know their lines, and as data; None twice if it is empty."""
    try:
        loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
        try:
            root = loader.get_single_node()
            return root, None if root is None else loader.construct_document(root)
        finally:
            loader.dispose()
    except (yaml.YAMLError, ValueError, RecursionError) as fault:
        mark = getattr(fault, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        raise error(f"{where}{line} is not YAML: {getattr(fault, 'problem', fault)}") from None


def line_of(root: Any, path: Sequence[Any]) -> int:
    """The line of a key in a file, or of the nearest thing above it that has one."""
    line, node = root.start_mark.line + 1, root
    for part in path:
        if isinstance(node, yaml.MappingNode):
            found = next(((k, v) for k, v in node.value if k.value == str(part)), None)
        elif isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            found = (node.value[part],) * 2 if part < len(node.value) else None
        else:
            found = None
        if found is None:
            break
        line, node = found[0].start_mark.line + 1, found[1]
    return line


def doubled(root: Any) -> Iterable[tuple[int, str]]:
    """Keys that stand twice in one mapping, with their lines; YAML itself keeps the last."""
    if isinstance(root, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in root.value:
            if key.value in seen:
                yield key.start_mark.line + 1, str(key.value)
            seen.add(key.value if isinstance(key.value, str) else "")
            yield from doubled(value)
