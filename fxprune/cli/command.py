"""A command: its options from dataclasses, its answer printed, its failures turned into exit codes.

A command is a function of dataclasses whose fields are typer's options, and of an `Output`::

    @command(app, examples=["fxprune count torchvision:resnet18"])
    def count(named: Named, output: Output) -> Answer: ...
"""

from __future__ import annotations

import contextlib
import errno
import inspect
import os
import sys
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, Field, dataclass, fields, is_dataclass
from typing import Annotated, Any

import typer
from rich.console import RenderableType

from .. import __version__
from ..errors import FxpruneError, NamingError, first_line
from .output import Output

OK, FAILED, USAGE, BAD_FILE, DEFECT, INTERRUPTED, CLOSED_PIPE = 0, 1, 2, 3, 4, 130, 141

# errors by the name of their class; all others say that the network could not be pruned
_CODES = {
    "OptionError": USAGE,
    "InputError": USAGE,
    "NamingError": BAD_FILE,
    "PlanError": BAD_FILE,
    "RecipeError": BAD_FILE,
    "SaveError": BAD_FILE,
}
EXIT_CODES = (
    (OK, "done"),
    (FAILED, "the network cannot be pruned, or a check does not hold"),
    (USAGE, "wrong options or inputs"),
    (BAD_FILE, "a model, or a file, that is missing, broken, or does not fit"),
    (DEFECT, "an unexpected exception"),
    (INTERRUPTED, "Ctrl-C"),
    (CLOSED_PIPE, "the output's reader has gone"),
)


@dataclass
class Answer:
    """What a command found: keys of a JSON object, the same for people, and remarks for stderr."""

    data: dict[str, Any]
    shown: Sequence[RenderableType] = ()
    code: int = OK
    notes: Sequence[str] = ()


def option(*names: str, help: str, default: str = "", **more: Any) -> Any:
    """A `typer.Option` whose help ends with its default, in words where it has no value."""
    shown = rf"{help} [dim]\[default: {default}][/dim]" if default else help
    return typer.Option(*names, help=shown, show_default=False, **more)


def flag(*names: str, help: str, **more: Any) -> Any:
    """An option without a value; off by default."""
    return option(*names, help=help, metavar=" ", **more)


_TALK = "Output"


@dataclass
class Talk:
    """The options that every command has."""

    json: Annotated[bool, flag("--json", help="Print one JSON object.", rich_help_panel=_TALK)] = (
        False
    )
    quiet: Annotated[
        bool, flag("--quiet", "-q", help="Only data and errors.", rich_help_panel=_TALK)
    ] = False
    verbose: Annotated[
        bool, flag("--verbose", "-v", help="Each step with its time.", rich_help_panel=_TALK)
    ] = False
    debug: Annotated[bool, flag("--debug", help="Tracebacks of errors.", rich_help_panel=_TALK)] = (
        False
    )


@dataclass
class Nothing:
    """A command without options of its own."""


def command(
    app: typer.Typer, *, examples: Sequence[str], name: str = "", panel: str | None = None
) -> Callable[[Callable[..., Answer]], Callable[..., Answer]]:
    """Register a function as a command; `examples` end its help, and are run by the tests."""

    def register(function: Callable[..., Answer]) -> Callable[..., Answer]:
        called = name or function.__name__.strip("_").replace("_", "-")
        help = _paragraphs(function.__doc__ or "")
        how: Any = {"help": help, "epilog": _epilog(examples), "rich_help_panel": panel}
        app.command(called, **how)(_expanded(function, called))
        return function

    return register


def listing(app: typer.Typer, function: Callable[..., Answer]) -> None:
    """Let a group of commands, called without one of them, do what `function` does."""
    run = _expanded(function, str(app.info.name))

    def alone(ctx: typer.Context, **given: Any) -> None:
        if ctx.invoked_subcommand is None:
            run(**given)

    own = inspect.Parameter("ctx", inspect.Parameter.KEYWORD_ONLY, annotation=typer.Context)
    signature = inspect.signature(run)
    alone.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=[own, *signature.parameters.values()]
    )
    alone.__annotations__ = {"ctx": typer.Context, **run.__annotations__}
    app.callback(invoke_without_command=True)(alone)


def _paragraphs(doc: str) -> str:
    """A docstring without the line breaks of its source."""
    return "\n\n".join(" ".join(part.split()) for part in doc.split("\n\n"))


def _epilog(examples: Sequence[str]) -> str:
    return "\n\n".join(["[bold]Examples[/bold]", *(f"$ {text}" for text in examples)])


# -- options from dataclasses ----------------------------------------------------------------------


def _expanded(function: Callable[..., Answer], called: str) -> Callable[..., None]:
    """A function of all single options, which typer reads, for one of dataclasses."""
    hints = typing.get_type_hints(function)
    kinds = {key: hints[key] for key in inspect.signature(function).parameters if key != "output"}

    def run(**given: Any) -> None:
        talk = Output(**{each.name: given[each.name] for each in fields(Talk)})
        run_command(called, talk, lambda: function(**_filled(kinds, given), output=talk))

    parameters = [p for kind in (*kinds.values(), Talk) for p in _parameters(kind)]
    ordered = sorted(parameters, key=lambda p: p.default is not inspect.Parameter.empty)
    run.__signature__ = inspect.Signature(ordered)  # type: ignore[attr-defined]
    run.__annotations__ = {p.name: p.annotation for p in ordered}
    run.__doc__, run.__name__ = function.__doc__, called
    return run


def _parameters(kind: type) -> Iterator[inspect.Parameter]:
    assert is_dataclass(kind), kind
    hints = typing.get_type_hints(kind, include_extras=True)
    own = set(vars(kind).get("__annotations__", ()))
    for each in sorted(fields(kind), key=lambda each: each.name not in own):  # inherited ones last
        yield inspect.Parameter(
            each.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=_default(each),
            annotation=hints[each.name],
        )


def _default(each: Field[Any]) -> Any:
    if each.default is not MISSING:
        return each.default
    return None if each.default_factory is not MISSING else inspect.Parameter.empty


def _filled(kinds: dict[str, type], given: dict[str, Any]) -> dict[str, Any]:
    return {key: _made(kind, given) for key, kind in kinds.items()}


def _made(kind: type, given: dict[str, Any]) -> Any:
    """The dataclass with what was given; a list that was not has its own default."""
    lists = {f.name for f in fields(kind) if f.default_factory is not MISSING}
    names = (f.name for f in fields(kind) if given[f.name] or f.name not in lists)
    return kind(**{name: given[name] for name in names})


# -- running ---------------------------------------------------------------------------------------


def run_command(called: str, output: Output, body: Callable[[], Answer]) -> None:
    """Print a command's answer and exit with its code; turn what goes wrong into a message."""
    try:
        answer = _answer(output, body)
        output.steps.close()
        output.data({"fxprune": __version__, "command": called, **answer.data}, answer.shown)
        output.out.file.flush()
        for text in answer.notes:
            output.note(text)
        code = answer.code
    except KeyboardInterrupt:
        output.steps.close()
        output.err.print("interrupted")
        code = INTERRUPTED
    except OSError as error:
        code = _closed(output) if error.errno == errno.EPIPE else _unexpected(called, output, error)
    except FxpruneError as error:
        code = code_of(error)
        _failed(called, output, error, code)
    except Exception as error:
        code = _unexpected(called, output, error)
    raise typer.Exit(code)


def _answer(output: Output, body: Callable[[], Answer]) -> Answer:
    """Run a command; what a model's code prints goes to stderr, as stdout is for data."""
    with contextlib.redirect_stdout(sys.stderr), output.listening():
        return body()


def code_of(error: FxpruneError) -> int:
    """The exit code of an error of fxprune."""
    if getattr(error, "bad_file", False):
        return BAD_FILE
    return next((_CODES[k.__name__] for k in type(error).__mro__ if k.__name__ in _CODES), FAILED)


def _failed(called: str, output: Output, error: FxpruneError, code: int) -> None:
    output.steps.close()
    if output.json:
        output.data({"fxprune": __version__, "command": called, **_plain(error, code)}, ())
    output.error(error)


def _plain(error: FxpruneError, code: int) -> dict[str, Any]:
    return {
        "error": {
            "kind": type(error).__name__,
            "fault": error.fault,
            "details": [list(row) for row in error.details],
            "hint": error.hint,
        },
        "exit_code": code,
    }


def _unexpected(called: str, output: Output, error: Exception) -> int:
    from ..naming import culprit

    told = FxpruneError(
        f"{type(error).__name__}: {first_line(error)}",
        details=[("at", culprit(error))],
        hint="no one foresaw this: it is a defect of fxprune, or of the model's code; "
        "--debug shows the traceback, which a report should have",
    )
    _failed(called, output, told, DEFECT)
    return DEFECT


def _closed(output: Output) -> int:
    """The reader has gone: nothing more can be said, not even when Python flushes at its end."""
    output.steps.close()
    with contextlib.suppress(OSError, ValueError):
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return CLOSED_PIPE


@contextlib.contextmanager
def of_file() -> Iterator[None]:
    """Errors inside are about a file that was named, whatever their class says elsewhere."""
    try:
        yield
    except FxpruneError as error:
        error.bad_file = True  # type: ignore[attr-defined]
        raise


def writable(path: Any, what: str) -> Any:
    """Refuse a file that cannot be written before the work is done for it."""
    if path is not None and not path.parent.is_dir():
        raise NamingError(
            f"{what} {path} cannot be written: there is no folder {path.parent}",
            hint="make the folder first, or name another",
        )
    return path
