"""What the user's code wrote itself in the call that is running."""

from __future__ import annotations

import ast
import linecache
import types
from collections.abc import Iterator
from functools import lru_cache
from itertools import islice

import torch


def names_dtype(frame: types.FrameType | None, dtype: torch.dtype) -> bool:
    """Whether the call that `frame` is at has ``torch.float32`` or the like among its arguments,
    and it is `dtype`. False where that cannot be told: without the source, or before Python 3.11.
    """
    places = getattr(frame.f_code, "co_positions", None) if frame is not None else None
    if frame is None or places is None:
        return False
    place = next(islice(places(), frame.f_lasti // 2, None))
    return dtype in _dtypes(frame.f_code.co_filename, *place)


@lru_cache(maxsize=1024)
def _dtypes(
    file: str, line: int | None, end: int | None, column: int | None, stop: int | None
) -> frozenset[torch.dtype]:
    """The dtypes that the call at a place in a file names."""
    if line is None or end is None or column is None or stop is None:
        return frozenset()
    lines = [text.encode() for text in linecache.getlines(file)[line - 1 : end]]
    if not lines:
        return frozenset()
    lines[-1] = lines[-1][:stop]
    lines[0] = lines[0][column:]
    try:
        call = ast.parse(b"(" + b"".join(lines) + b")", mode="eval").body
    except (SyntaxError, ValueError):
        return frozenset()
    found = (getattr(torch, name, None) for name in _names(call))
    return frozenset(each for each in found if isinstance(each, torch.dtype))


def _names(call: ast.expr) -> Iterator[str]:
    """The attributes among a call's arguments; calls inside them are calls of their own."""
    rest: list[ast.AST] = []
    if isinstance(call, ast.Call):
        rest = [*call.args, *(word.value for word in call.keywords)]
    while rest:
        node = rest.pop()
        if isinstance(node, ast.Attribute):
            yield node.attr
        if not isinstance(node, ast.Call):
            rest += ast.iter_child_nodes(node)
