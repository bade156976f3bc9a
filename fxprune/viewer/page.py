"""The page: data, drawing library, style and script put into one HTML file."""

from __future__ import annotations

import json
import os
from html import escape
from pathlib import Path
from typing import Any

from pydantic import BaseModel, FiniteFloat, ValidationError

from ..errors import NamingError, SaveError, first_line, nearest
from ..files import write_text

_HERE = Path(__file__).parent
_NAME = "view.html"
_DATA = "view.json"
_VERSION = 1


class _Step(BaseModel):
    name: str
    seconds: float
    summary: str


class _Node(BaseModel):
    id: str
    kind: str
    call: str
    shape: str
    source: str
    inputs: list[str]
    at: list[int]
    groups: list[list[int]]
    rule: str | None = None
    unknown: str | None = None
    ids: list[str] | None = None
    frozen: list[str] | None = None
    new_shape: str | None = None
    new_call: str | None = None
    added: list[str] | None = None


class _Scores(BaseModel):
    low: FiniteFloat
    high: FiniteFloat
    counts: list[int]
    gone: list[int] | None = None
    cut: FiniteFloat | None = None


class _Group(BaseModel):
    name: str
    size: int
    stays: str
    stays_at: str
    stays_source: str
    members: list[list[str]]
    ties: list[list[str]]
    kept: int | None
    reason: str
    kept_channels: str | None = None
    scores: _Scores | None = None


class _Report(BaseModel):
    title: str
    inputs: str
    channels: list[int]
    params: list[int]
    macs: list[int]
    warnings: list[str]
    causes: list[list[Any]]


class _View(BaseModel):
    """What ``view.json`` holds; data.py writes it."""

    version: int
    fxprune: str
    model: str
    steps: list[_Step]
    nodes: list[_Node]
    groups: list[_Group]
    layers: list[list[Any]]
    constraints: list[str]
    report: _Report | None


def view(folder: str | os.PathLike[str], out: str | os.PathLike[str] | None = None) -> Path:
    """Write one HTML file that shows a dump, and give its path.

    `folder` is what ``prune(..., dump=folder)`` wrote; the page is ``view.html`` in it, or `out`.
    It needs no server and no network. Raises `NamingError` where there is no dump, `SaveError`
    where it is damaged, or the page cannot be written.
    """
    home = Path(folder)
    data = _read(home)
    path = Path(out) if out is not None else home / _NAME
    return write_text(path, _page(data))


def _read(folder: Path) -> dict[str, Any]:
    path = folder / _DATA
    if not path.is_file():
        near = nearest(str(folder), map(str, folder.parent.glob("*/")))
        what = f"{folder} holds no {_DATA}" if folder.is_dir() else f"there is no folder {folder}"
        hint = "fxprune dump MODEL FOLDER writes one"
        raise NamingError(what, hint=hint if folder.is_dir() else near or hint)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SaveError(f"{path} cannot be read: {first_line(error)}", hint=_AGAIN) from None
    version = data.get("version") if isinstance(data, dict) else None
    if version != _VERSION:
        raise SaveError(f"{path} is not of this version of fxprune", hint=_AGAIN)
    try:
        _View.model_validate(data, strict=True)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise SaveError(f"{path} is damaged: {where}: {first['msg']}", hint=_AGAIN) from None
    return data


_AGAIN = "write the dump again"


def _page(data: dict[str, Any]) -> str:
    parts = {
        "TITLE": escape(f"{data.get('model', '')} in fxprune"),
        "STYLE": (_HERE / "page.css").read_text(encoding="utf-8"),
        "LIBRARY": (_HERE / "vendor" / "cytoscape.min.js").read_text(encoding="utf-8"),
        "SCRIPT": (_HERE / "page.js").read_text(encoding="utf-8"),
        "DATA": _embedded(data),
    }
    text = (_HERE / "page.html").read_text(encoding="utf-8")
    head, *rest = text.split("%%")
    return head + "".join(parts.get(each, each) for each in rest)


def _embedded(data: dict[str, Any]) -> str:
    """JSON that cannot end the script that it stands in, nor break a line of it."""
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=True)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
