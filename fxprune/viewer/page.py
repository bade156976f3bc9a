"""The page: data, drawing library, style and script put into one HTML file."""

from __future__ import annotations

import json
import os
from html import escape
from pathlib import Path
from typing import Any

from ..errors import NamingError, SaveError, first_line, nearest
from ..files import write_text

_HERE = Path(__file__).parent
_NAME = "view.html"
_DATA = "view.json"
_VERSION = 1
_KEYS = {"steps": list, "nodes": list, "groups": list, "layers": list, "constraints": list}


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
        hint = "fxprune dump MODEL FOLDER writes one, and fxprune.prune(model, dump=FOLDER)"
        raise NamingError(what, hint=hint if folder.is_dir() else near or hint)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SaveError(f"{path} cannot be read: {first_line(error)}", hint=_AGAIN) from None
    version = data.get("version") if isinstance(data, dict) else None
    if version != _VERSION:
        raise SaveError(f"{path} is not of this version of fxprune", hint=_AGAIN)
    wrong = [key for key, kind in _KEYS.items() if not isinstance(data.get(key), kind)]
    if wrong:
        raise SaveError(f"{path} is damaged: `{wrong[0]}` is missing", hint=_AGAIN)
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
