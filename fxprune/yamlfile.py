"""YAML files whose errors name file, line and the nearest word that is known."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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
        return path.read_text(encoding="utf-8-sig")
    except OSError as fault:
        raise error(f"{path} cannot be read: {fault.strerror}", hint="a YAML file") from None
    except UnicodeDecodeError as fault:
        raise error(f"{path} is not UTF-8 text: {fault.reason}") from None
    except ValueError as fault:
        raise error(f"{str(path)!r} is no path: {fault}") from None


def parsed(text: str, where: str, error: type[FxpruneError]) -> tuple[Any, Any]:
    """A file's YAML as nodes, which know their lines, and as data; None twice if it is empty."""
    loader = getattr(yaml, "CSafeLoader", yaml.SafeLoader)(text)
    try:
        root = loader.get_single_node()
        twice = next(iter(doubled(root)), None)  # constructing lays merged keys beside own ones
        data = None if root is None or twice else loader.construct_document(root)
    except _BROKEN as fault:
        mark = getattr(fault, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(fault, "problem", None) or type(fault).__name__
        raise error(f"{where}{line} is not YAML: {problem}") from None
    finally:
        loader.dispose()
    if twice:
        raise error(f"{where}:{twice[0]} `{twice[1]}` stands twice", hint="keep one of them")
    return root, data


# what PyYAML raises on documents and tags that are broken
_BROKEN = (
    yaml.YAMLError,
    ValueError,
    KeyError,
    IndexError,
    AttributeError,
    TypeError,
    RecursionError,
)


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


def doubled(root: Any) -> Iterator[tuple[int, str]]:
    """Keys that stand twice in one mapping, with their lines; YAML itself keeps the last."""
    seen, rest = set[int](), [root]
    while rest:
        node = rest.pop()
        if id(node) in seen:
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            rest += node.value
        elif isinstance(node, yaml.MappingNode):
            rest += [value for _, value in node.value]
            yield from _repeated(node)


def _repeated(node: yaml.MappingNode) -> Iterator[tuple[int, str]]:
    known: set[str] = set()
    for key, _ in node.value:
        name = str(key.value)
        if name in known:
            yield key.start_mark.line + 1, name
        known.add(name)
