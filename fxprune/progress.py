"""Progress of long work: a function of what is done now and of the share that is done."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from .errors import OptionError

Progress = Callable[[str, float], None]


def unseen(what: str, share: float) -> None:
    """Shows nothing."""


@contextmanager
def shown(progress: Progress | bool | None) -> Iterator[Progress]:
    """A user's choice as a function: silent (None, False), a bar on stderr (True), or their own."""
    if progress in (None, False):
        yield unseen
    elif progress is True:
        with _bar() as bar:
            yield bar
    elif callable(progress):
        yield progress
    else:
        raise OptionError(
            f"progress={progress!r} is no way to show progress",
            hint="True for a bar, or a function of what is done and the share that is done",
        )


@contextmanager
def _bar() -> Iterator[Progress]:
    from rich.console import Console
    from rich.progress import Progress as Bar

    with Bar(console=Console(stderr=True), transient=True) as bar:
        tasks: dict[str, Any] = {}

        def show(what: str, share: float) -> None:
            if what not in tasks:
                for task in tasks.values():
                    bar.update(task, visible=False)
                tasks[what] = bar.add_task(what, total=1.0)
            bar.update(tasks[what], completed=share)

        yield show
