"""The one hook between steps: ``watch(step, before, after)``."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

Watch = Callable[[str, Any, Any], None]


def silent(step: str, before: Any, after: Any) -> None:
    """Watches nothing."""


def together(*watches: Watch) -> Watch:
    """Several watches as one."""

    def watch(step: str, before: Any, after: Any) -> None:
        for each in watches:
            each(step, before, after)

    return watch
