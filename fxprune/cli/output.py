"""Where text goes: data to stdout, everything else to stderr."""

from __future__ import annotations

import json
import os
import sys
import time
import traceback
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, TextIO

from rich.console import Console, Group, RenderableType
from rich.padding import Padding
from rich.progress import BarColumn, Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from ..errors import FxpruneError

STEPS = ("trace", "flow", "groups", "score", "select", "rewrite", "verify")
_WIDE = 2000  # a pipe has no width: lines are left whole, for grep and the like


class _Console(Console):
    def on_broken_pipe(self) -> None:
        """Leave it to the command, which knows the exit code."""
        raise


def console(stream: TextIO) -> Console:
    """A console that takes text as it is: a layer may be called ``[bold]``."""
    piped = not stream.isatty() and not os.environ.get("COLUMNS")
    width = _WIDE if piped else None
    return _Console(
        file=stream, width=width, markup=False, highlight=False, emoji=False, soft_wrap=False
    )


@dataclass
class Output:
    """How a command talks: what was asked for, and the two streams."""

    json: bool = False
    quiet: bool = False
    verbose: bool = False
    debug: bool = False
    out: Console = field(default_factory=lambda: console(sys.stdout))
    err: Console = field(default_factory=lambda: console(sys.stderr))

    def __post_init__(self) -> None:
        self.steps = Steps(self)

    def note(self, text: str) -> None:
        """A line for people, beside the data."""
        if not self.quiet:
            self.err.print(Text(text, style="dim"))

    def warn(self, text: str) -> None:
        if not self.quiet:
            self.err.print(Text.assemble(("warning: ", "yellow bold"), text))

    def data(self, found: dict[str, Any], shown: Sequence[RenderableType]) -> None:
        """The answer: one JSON object, or what people read."""
        if self.json:
            text = json.dumps(
                found, indent=2, default=str, ensure_ascii=not self.out.encoding.startswith("utf")
            )
            print(text, file=self.out.file)
        else:
            for each in shown:
                self.out.print(each)

    def error(self, error: FxpruneError) -> None:
        """``error:``, details and ``hint:``, as all errors of fxprune have them."""
        from .spoken import spoken

        parts: list[RenderableType] = [Text.assemble(("error: ", "red bold"), spoken(error.fault))]
        if error.details:
            parts.append(Padding(_rows(error.details), (0, 0, 0, 2), expand=False))
        if error.hint:
            parts += [Text(), Text.assemble(("hint: ", "cyan bold"), spoken(error.hint))]
        self.err.print(Group(*parts))
        if self.debug:
            self.trace()

    def trace(self) -> None:
        """The traceback of the exception that is being handled."""
        self.err.print(Text(f"\n{traceback.format_exc().rstrip()}", style="dim"))

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Python's warnings as lines on stderr, each once; those for developers with --verbose."""
        seen: set[str] = set()

        def show(message: Any, category: type[Warning], *rest: Any, **more: Any) -> None:
            text = " ".join(str(message).split())
            minor = issubclass(category, (DeprecationWarning, FutureWarning))
            if text not in seen and (self.verbose or not minor):
                seen.add(text)
                self.warn(text)

        with warnings.catch_warnings():
            warnings.showwarning = show
            yield


def _rows(details: Sequence[tuple[str, str]]) -> Table:
    table = Table.grid(padding=(0, 2))
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for label, text in details:
        table.add_row(label, text)
    return table


class Steps:
    """What is running now, on stderr: a bar in a terminal, and a line a step with --verbose."""

    def __init__(self, output: Output):
        self.output = output
        self.bar: Progress | None = None
        self.task: Any = None
        self.name, self.since = "", 0.0

    def at(self, name: str, total: float | None = None) -> None:
        """The last step is over, `name` has begun; `total` where its length is known."""
        self._log()
        self.name, self.since = name, time.perf_counter()
        if self.output.err.is_terminal and not self.output.quiet:
            self._show(name, total)

    def done(self, amount: float) -> None:
        """How much of the step's total is done."""
        if self.bar is not None:
            self.bar.update(self.task, completed=amount)

    def progress(self, what: str, share: float) -> None:
        """A part of a step whose length is known."""
        if what != self.name:
            self.at(what, 1.0)
        self.done(share)

    def watch(self, step: str, before: Any, after: Any) -> None:
        """The hook between the steps of the pipeline."""
        self.name = step if step in STEPS else self.name
        number = STEPS.index(step) + 1 if step in STEPS else len(STEPS)
        following = STEPS[number] if number < len(STEPS) else "report"
        self.at(following, len(STEPS))
        self.done(number)

    def close(self) -> None:
        self._log()
        self.name = ""
        if self.bar is not None:
            self.bar.stop()
            self.bar = None

    def _log(self) -> None:
        if self.output.verbose and self.name:
            seconds = time.perf_counter() - self.since
            if self.name in STEPS or seconds >= 0.001:
                self.output.err.print(Text(f"{seconds:7.2f} s  {self.name}", style="dim"))

    def _show(self, name: str, total: float | None) -> None:
        if self.bar is None:
            self.bar = Progress(
                SpinnerColumn(),
                TextColumn("{task.description}", markup=False),
                BarColumn(bar_width=24),
                TimeElapsedColumn(),
                console=self.output.err,
                transient=True,
            )
            self.task = self.bar.add_task(name, total=total)
            self.bar.start()
        self.bar.update(self.task, description=name, total=total, completed=0)
