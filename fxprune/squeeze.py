"""Gates that follow the width they gate: a squeeze layer as wide as if it had been built so.

Squeeze-and-excite units are built with a width that depends on the channels they gate, as
``make_divisible(E / 4, 8)`` of MobileNetV3. Where the E channels have become fewer, so may the
squeeze; the units that stay are those whose weights carry most (`in_out_norm`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from .analysis import Analysis
from .check import check_count
from .criteria import find
from .errors import OptionError, nearest
from .roles import Roles
from .score import score
from .select import Options, Selection, select


@dataclass(frozen=True)
class Squeeze:
    """A squeeze layer has ``make_divisible(E / divide, round_to)`` units for E gated channels."""

    divide: float = 4
    round_to: int = 8

    def width(self, gated: int) -> int:
        """Rounded to the nearest multiple, and up where that would lose more than a tenth."""
        exact = gated / self.divide
        near = max(self.round_to, int(exact + self.round_to / 2) // self.round_to * self.round_to)
        return near + self.round_to if near < 0.9 * exact else near


def as_squeeze(given: Any) -> Squeeze | None:
    """`OptionError` for what is no description of squeeze widths."""
    if given is None or given is False:
        return None
    if isinstance(given, Squeeze):
        given = asdict(given)
    if not isinstance(given, Mapping):
        kind = type(given).__name__
        raise OptionError(f"squeeze is a {kind}", hint='squeeze={"divide": 4, "round_to": 8}')
    for key in given:
        if key not in ("divide", "round_to"):
            hint = nearest(str(key), ("divide", "round_to"))
            raise OptionError(f"squeeze has no `{key}`", hint=hint)
    found = Squeeze(**given)
    check_count("squeeze['round_to']", found.round_to)
    divide: Any = found.divide
    number = isinstance(divide, (int, float)) and not isinstance(divide, bool)
    if not number or not 1e-3 <= divide < float("inf"):
        raise OptionError(f"squeeze['divide']={divide!r} must be a number above 0")
    return found


def outside(analysis: Analysis) -> frozenset[int]:
    """The squeeze groups: their widths follow, so nothing is asked of them by rate."""
    return frozenset(Roles(analysis).of("squeeze"))


def follow(
    analysis: Analysis, selection: Selection, options: Options, how: Squeeze
) -> tuple[Selection, dict[int, np.ndarray]]:
    """The selection with the squeeze layers of narrower channels narrowed too, and their scores."""
    widths = _widths(analysis, selection, options, how)
    if not widths:
        return selection, {}
    scores = score(analysis.all_groups, analysis.tensors, find("in_out_norm"))
    scores = {i: scores[i] for i in widths}
    alone = replace(options, rule="rate", scope="local", rates={}, rate=0.0, round_to=1, max_rate=1)
    alone = replace(alone, own={})  # their widths are said, and not to be rounded again
    found = select(analysis.all_groups, scores, replace(alone, widths=widths, outside=frozenset()))
    reasons = {**selection.reasons, **found.reasons}
    return Selection(selection.kept & found.kept, reasons, selection.warnings), scores


def _widths(
    analysis: Analysis, selection: Selection, options: Options, how: Squeeze
) -> dict[int, int]:
    roles, found = Roles(analysis), {}
    for i in sorted(roles.of("squeeze") - set(options.ignored)):
        size = len(analysis.groups[i])
        gates = [selection.kept[analysis.groups[g].channels] for g in roles.gated(i)]
        left, whole = sum(int(k.sum()) for k in gates), sum(len(k) for k in gates)
        if left < whole:
            found[i] = min(size, max(how.width(left), options.of(i).min_channels))
    return found
