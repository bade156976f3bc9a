"""From the text of an option to the argument of `fxprune.prune` that it means."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

from ..errors import NamingError, OptionError, nearest

_BATCHES = "a list or DataLoader of batches, or a function without arguments that gives one"
_SHOWN = 12


def criterion(text: str) -> Any:
    """``l2``, ``sparsity,side=below``, or a function of a file."""
    from .. import naming

    if ".py:" in text:
        return naming.thing(text)
    name, *options = text.split(",")
    return {"name": name, **dict(map(naming.argument, options))} if options else name


def squeeze(text: str) -> Any:
    from .. import naming

    return False if text == "no" else dict(naming.argument(part) for part in text.split(","))


def round_to(text: str) -> Any:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise OptionError(
            f"--round-to {text} is no number of channels", hint="write 8, or auto"
        ) from None


# -- numbers by name -------------------------------------------------------------------------------


def rates(texts: Sequence[str]) -> dict[str, float]:
    return _named("--rates", texts, float, "rate", "write 'layer1.*=0.3'")


def target(texts: Sequence[str]) -> dict[str, float]:
    return _named("--target", texts, float, "amount", "write macs=0.5, or latency_ms=4")


def min_channels(texts: Sequence[str]) -> Any:
    how = "write 8, or 'layer1.*=8' for some layers"
    return _for_layers(_numbers("--min-channels", texts, int, "whole number", how))


def max_rate(texts: Sequence[str]) -> Any:
    how = "write 0.5, or 'fc=0.25' for some layers"
    return _for_layers(_numbers("--max-rate", texts, float, "share", how))


def _numbers(
    option: str, texts: Sequence[str], number: Callable[[str], Any], what: str, how: str
) -> dict[str, Any]:
    """Numbers by the name before them; what has no name is under the empty one."""
    found: dict[str, Any] = {}
    for text in texts:
        name, _, amount = text.rpartition("=")
        try:
            value = number(amount)
        except ValueError:
            raise OptionError(f"{option} {text} gives no {what}", hint=how) from None
        if name in found:  # which of the two is meant, nobody can know
            twice = f"{option} {name}".rstrip()
            raise OptionError(f"{twice} is given twice", hint="leave one of them out")
        found[name] = value
    return found


def _named(
    option: str, texts: Sequence[str], number: Callable[[str], Any], what: str, how: str
) -> dict[str, Any]:
    """The same, where every number has a name."""
    found = _numbers(option, texts, number, what, how)
    if "" in found:
        raise OptionError(f"{option} {found['']:g} gives no {what}: it has no name", hint=how)
    return found


def _for_layers(found: dict[str, Any]) -> Any:
    """One number for all layers; with others for some, which come later, as the last one counts."""
    if "" not in found:
        return found
    plain = found.pop("")
    return {"*": plain, **found} if found else plain


# -- things in files -------------------------------------------------------------------------------


def data(text: str) -> Any:
    """Batches: an iterable, or what a function of that name gives."""
    found = _thing("--data", text, _may_give_batches)
    if inspect.isclass(found) or not hasattr(found, "__iter__"):
        found = _made(text, found)
    return found if _is_whole(found) else _read(text, found)


def loss(text: str) -> Any:
    """A function of (output, target), whose failures are its own."""
    from ..naming import _kind, _told

    found = _thing("--loss", text, callable)
    hint = "name a function of (output, target)"
    if not callable(found):
        raise OptionError(f"--loss {text} is {_kind(found)}", hint=hint)
    _check_takes(f"--loss {text} is no function of (output, target)", found, 2, hint)

    def called(output: Any, target: Any) -> Any:
        with _told(f"--loss {text} fails"):
            return found(output, target)

    return called


def _thing(option: str, text: str, fits: Callable[[Any], bool]) -> Any:
    """What ``file.py:NAME`` names; `NamingError` with all that would fit, where nothing is."""
    from .. import naming

    home, _, name = text.rpartition(":")
    if not home or not name:
        path = text.rstrip(":")
        hint = f"{path}:NAME" if path.endswith(".py") else "write file.py:NAME"
        raise NamingError(f"{option} {text} names nothing in the file", hint=hint)
    own: Mapping[str, Any] = naming.thing(f"{home}:__dict__")
    first, _, rest = name.partition(".")
    try:
        return attrgetter(rest)(own[first]) if rest else own[first]
    except (KeyError, AttributeError):
        raise _missing(home, name, [n for n in own if _is_own(own, n) and fits(own[n])]) from None


def _missing(home: str, name: str, fitting: Sequence[str]) -> NamingError:
    shown = ", ".join(fitting[:_SHOWN])
    return NamingError(
        f"{home} has no `{name}`", details=[("it has", shown)], hint=nearest(name, fitting)
    )


def _is_own(module: Mapping[str, Any], name: str) -> bool:
    """Whether a module's name is its own, and not one that it imports."""
    found = module[name]
    imported = inspect.ismodule(found) or (
        (inspect.isroutine(found) or inspect.isclass(found))
        and found.__module__ != module["__name__"]
    )
    return not name.startswith("_") and not imported


def _may_give_batches(found: Any) -> bool:
    return inspect.isroutine(found) or (hasattr(found, "__iter__") and not _is_no_batches(found))


def _is_no_batches(found: Any) -> bool:
    """What can be gone through, and is one thing all the same."""
    from torch import Tensor

    return isinstance(found, (Tensor, str, Mapping))


def _is_whole(found: Any) -> bool:
    """What is read without code of its own, or is refused where batches are."""
    return isinstance(found, (list, tuple)) or _is_no_batches(found)


def _made(text: str, make: Any) -> Any:
    """What a function without arguments gives, which must be batches."""
    from ..naming import _kind, _told

    if not callable(make):
        raise OptionError(f"--data {text} is {_kind(make)}", hint=f"name {_BATCHES}")
    fault = f"--data {text} cannot be called without arguments"
    _check_takes(fault, make, 0, f"name {_BATCHES}")
    with _told(f"--data {text} fails"):
        found = make()
    if not hasattr(found, "__iter__"):
        raise OptionError(f"--data {text} gives {_kind(found)}", hint=f"name {_BATCHES}")
    return found


def _read(text: str, found: Iterable[Any]) -> Iterator[Any]:
    """Batches as they are asked for; a failure names the line of the user's code."""
    from ..naming import _told

    with _told(f"--data {text} fails"):
        yield from found


def _check_takes(fault: str, function: Callable[..., Any], count: int, meant: str) -> None:
    """Refuse a function that does not take so many arguments."""
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError):  # some built-ins have none
        return
    try:
        signature.bind(*[None] * count)
    except TypeError as error:
        details = [("takes", str(signature))]
        raise OptionError(f"{fault}: {error}", details=details, hint=meant) from None


# -- files -----------------------------------------------------------------------------------------


def sensitivity(path: Path) -> Any:
    import fxprune

    text = _text(path, "write it with sensitivity.to_json()")
    return fxprune.Sensitivity.from_json(text)


def latency_table(path: Path) -> Any:
    import fxprune

    return fxprune.LatencyTable.from_json(_text(path, "write it with table.to_json()"))


def _text(path: Path, made_by: str) -> str:
    if not path.is_file():
        raise OptionError(f"there is no file {path}", hint=made_by)
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = getattr(error, "strerror", None) or "it is no text"
        raise NamingError(f"{path} cannot be read: {why}", hint=made_by) from None


READERS: Mapping[str, Callable[[Any], Any]] = {
    each.__name__: each
    for each in (
        criterion,
        data,
        latency_table,
        loss,
        max_rate,
        min_channels,
        rates,
        round_to,
        sensitivity,
        squeeze,
        target,
    )
}
