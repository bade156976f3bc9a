"""A model, its weights and its inputs named by text, as a command line names them.

``torchvision:resnet18``, ``timm:resnet18``   a network of a zoo, by its registered name
``package.module:name``   a class, a function that builds a model, or a model, of a module
``file.py:name``          the same, of a file
"""

from __future__ import annotations

import ast
import contextlib
import importlib
import importlib.util
import inspect
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

from . import zoos
from .errors import FxpruneError, InputError, NamingError, OptionError, first_line, nearest

if TYPE_CHECKING:
    from torch import Tensor, nn

_FORMS = "torchvision:resnet18, timm:resnet18, package.module:Class, or file.py:Class"
_PRETRAINED = "DEFAULT"
_OFFLINE = "download the file where there is a network, and pass it with --weights FILE"


def model(
    text: str,
    *,
    weights: str | None = None,
    arguments: Mapping[str, Any] | None = None,
    device: str = "cpu",
    seed: int = 0,
) -> nn.Module:
    """The model that `text` names, in eval mode.

    `weights`: a .safetensors, .pt or .pth file, loaded strictly; for a zoo's network also the name
    of weights to download ("DEFAULT" for the usual ones). Without it, weights are as the code
    makes them, after ``torch.manual_seed(seed)``. `arguments` are keywords of what builds the
    model. Raises `NamingError` for what cannot be found or read, `OptionError` for a device or
    arguments that do not fit.
    """
    from .check import usable_device

    where = usable_device(device)
    zoo, _, name = text.partition(":")
    downloads = weights if weights and zoo in zoos.ZOOS and not _is_file_name(weights) else None
    _seed(seed)
    made = _made(text, zoo, name, dict(arguments or {}), downloads)
    if weights and not downloads:
        from .weights import load_into

        load_into(made, weights)
    with _told(f"{text} cannot be moved to {device}"):
        return made.to(where).eval()


def _seed(seed: int) -> None:
    import torch

    try:
        torch.manual_seed(seed)
    except (RuntimeError, ValueError, OverflowError) as error:
        raise OptionError(f"seed={seed} cannot be used: {first_line(error)}") from None


def _made(
    text: str, zoo: str, name: str, arguments: dict[str, Any], downloads: str | None
) -> nn.Module:
    if Path(text).is_dir():
        return _saved(text, arguments)
    if zoo in zoos.ZOOS:
        return _of_zoo(zoo, name, arguments, downloads)
    return _built(text, thing(text), arguments)


def _saved(folder: str, arguments: Mapping[str, Any]) -> nn.Module:
    from .saving import load

    _refuse(arguments, f"{folder} is a saved network")
    return load(folder)


def _is_file_name(text: str) -> bool:
    return Path(text).suffix in (".safetensors", ".pt", ".pth", ".bin", ".ckpt")


def _refuse(arguments: Mapping[str, Any], why: str) -> None:
    if arguments:
        raise OptionError(f"{why}, which takes no arguments", hint="leave --arg out")


# -- zoos ------------------------------------------------------------------------------------------


def _of_zoo(zoo: str, name: str, arguments: dict[str, Any], weights: str | None) -> nn.Module:
    if not zoos.installed(zoo):
        raise NamingError(f"{zoo} is not installed", hint=f"pip install {zoo}")
    known = zoos.names(zoo)
    if name.partition(".")[0] not in known:
        other = next((z for z in zoos.ZOOS if z != zoo and name in zoos.names(z)), None)
        hint = f"{other} has it: {other}:{name}" if other else nearest(name, known)
        raise NamingError(
            f"{zoo} has no network `{name}`" if name else f"no network of {zoo} is named",
            details=[
                ("known", f"{len(known)} names, as {', '.join(known[:: len(known) // 4][:4])}")
            ]
            if known
            else [],
            hint=hint or f"the names are those of {zoo}'s list_models()",
        )
    builds = {"torchvision": _torchvision, "timm": _timm}[zoo]
    with _quiet(), _told(f"{zoo}:{name} cannot be built"):
        return builds(name, arguments, weights)


def _torchvision(name: str, arguments: dict[str, Any], weights: str | None) -> nn.Module:
    from torchvision import models

    builder = models.get_model_builder(name)
    taken = inspect.signature(builder).parameters
    if "weights_backbone" in taken:  # by default a detector downloads those of its backbone
        arguments.setdefault("weights_backbone", None)
    if weights:
        known = models.get_model_weights(builder)
        chosen = weights.rpartition(".")[2]
        if chosen not in known.__members__:
            raise NamingError(
                f"torchvision:{name} has no weights `{weights}`, and no file is called so",
                details=[("known", ", ".join(known.__members__))],
                hint=nearest(chosen, known.__members__),
            )
        with _told(f"the weights {known[chosen]} cannot be had", hint=_OFFLINE):
            return builder(weights=known[chosen], **arguments)
    return builder(weights=None, **arguments)


def _timm(name: str, arguments: dict[str, Any], weights: str | None) -> nn.Module:
    import timm

    if weights and weights != _PRETRAINED:
        name = f"{name.partition('.')[0]}.{weights}"
    if not weights:
        return timm.create_model(name, pretrained=False, **arguments)
    with _told(f"the weights of timm:{name} cannot be had", hint=_OFFLINE):
        return timm.create_model(name, pretrained=True, **arguments)


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the advice that libraries give to who builds their networks."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


# -- things in modules and files -------------------------------------------------------------------


def thing(text: str) -> Any:
    """The object that ``package.module:name`` or ``file.py:name`` names; the name may be dotted.

    Modules are looked for in the current folder too, and a file finds those beside it.
    """
    home, _, name = text.rpartition(":")
    if not home or not name:
        raise NamingError(f"`{text}` names no model", hint=_hint_for(text))
    module = _of_file(Path(home)) if home.endswith(".py") else _of_module(home)
    found: Any = module
    for part in name.split("."):
        if not hasattr(found, part):
            _raise_missing(found, part, home)
        found = getattr(found, part)
    return found


def _raise_missing(found: Any, part: str, home: str) -> None:
    own = [n for n, v in vars(found).items() if not n.startswith("_") and callable(v)]
    shown = [n for n in own if getattr(getattr(found, n), "__module__", "") == found.__name__]
    raise NamingError(
        f"{home} has no `{part}`",
        details=[("it has", ", ".join((shown or own)[:12]))],
        hint=nearest(part, shown or own),
    )


def _hint_for(text: str) -> str:
    """What may be meant by a text that names nothing."""
    path, bare = Path(text.rstrip(":")), text.rstrip(":")
    if path.suffix == ".py" and path.is_file():
        own = zoos.classes(path)
        return f"name what is in it, as in {path}:{own[-1] if own else 'Class'}"
    for zoo in zoos.ZOOS:
        if bare in zoos.names(zoo):
            return f"write {zoo}:{bare}"
    close = nearest(bare, [f"{zoo}:{name}" for zoo in zoos.ZOOS for name in zoos.names(zoo)])
    return close or f"name it as {_FORMS}"


def _of_file(path: Path) -> ModuleType:
    if not path.is_file():
        near = [str(p) for p in path.parent.glob("*.py")] if path.parent.is_dir() else []
        raise NamingError(f"there is no file {path}", hint=nearest(str(path), near))
    name = path.stem if path.stem not in sys.modules else f"{path.stem}_{len(sys.modules)}"
    spec = importlib.util.spec_from_file_location(name, path.resolve())
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    _look_in(path.resolve().parent)
    sys.modules[name] = module
    try:
        with _told(f"{path} fails when it is imported"):
            spec.loader.exec_module(module)
    except BaseException:
        sys.modules.pop(name, None)
        raise
    return module


def _of_module(name: str) -> ModuleType:
    _look_in(Path.cwd())
    try:
        with _told(f"module {name} fails when it is imported"):
            return importlib.import_module(name)
    except NamingError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and _is_above(missing.name or "", name):
            raise NamingError(
                f"there is no module `{missing.name}`", hint=_module_hint(name)
            ) from None
        raise


def _is_above(missing: str, name: str) -> bool:
    """Whether the module that is missing is the one asked for, or a package of it."""
    return f"{name}.".startswith(f"{missing}.")


def _module_hint(name: str) -> str:
    files = [p.stem for p in Path.cwd().glob("*.py")]
    packages = [p.parent.name for p in Path.cwd().glob("*/__init__.py")]
    return (
        nearest(name, (*files, *packages, *zoos.ZOOS))
        or f"modules are looked for in {Path.cwd()} and where Python does"
    )


def _look_in(folder: Path) -> None:
    """As Python does for a script: what lies in the folder can be imported, also later on."""
    if str(folder) not in sys.path:
        sys.path.insert(0, str(folder))


# -- building --------------------------------------------------------------------------------------


def _built(text: str, found: Any, arguments: dict[str, Any]) -> nn.Module:
    from torch import nn

    if isinstance(found, nn.Module):
        _refuse(arguments, f"{text} is a model")
        return found
    if not callable(found):
        raise NamingError(
            f"{text} is no model, and nothing that builds one: {_kind(found)}",
            hint="name a class, a function that returns a model, or a model",
        )
    _check_arguments(text, found, arguments)
    with _told(f"{text} cannot be built"):
        made = found(**arguments)
    if not isinstance(made, nn.Module):
        raise NamingError(f"{text} gives {_kind(made)}, not a torch.nn.Module")
    return made


def _kind(found: Any) -> str:
    name = type(found).__name__
    return f"{'an' if name[0].lower() in 'aeiou' else 'a'} {name}"


def _check_arguments(text: str, builder: Callable[..., Any], arguments: dict[str, Any]) -> None:
    try:
        signature = inspect.signature(builder)
    except (TypeError, ValueError):  # some built-ins have none
        return
    try:
        signature.bind(**arguments)
    except TypeError as error:
        unknown = [key for key in arguments if key not in signature.parameters]
        raise OptionError(
            f"{text}: {error}",
            details=[("takes", str(signature))],
            hint=(unknown and nearest(unknown[0], signature.parameters))
            or "give arguments with --arg name=value",
        ) from None


def argument(text: str) -> tuple[str, Any]:
    """``num_classes=10`` as a name and a value: a Python literal, or else the text itself."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise OptionError(f"`{text}` is no argument", hint="write name=value, as num_classes=10")
    return name, literal(value)


def literal(text: str) -> Any:
    """A Python literal (a number, True, a list, ...), or else the text itself."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


# -- failures of other people's code ---------------------------------------------------------------


@contextlib.contextmanager
def _told(fault: str, hint: str = "") -> Iterator[None]:
    """An exception of code that is not ours, as a `NamingError` with the line it came from."""
    try:
        yield
    except FxpruneError:
        raise
    except Exception as error:
        raise NamingError(
            f"{fault}: {type(error).__name__}: {first_line(error)}",
            details=[("at", culprit(error))],
            hint=hint,
        ) from error


def culprit(error: BaseException) -> str:
    """``net.py:12, in forward: x = self.fc(x)``: the last line of the user's own code that an
    exception went through; of a library's, where there is none."""
    if isinstance(error, SyntaxError) and error.filename:
        return f"{_short(error.filename)}:{error.lineno}: {(error.text or '').strip()}"
    frames = [f for f in traceback.extract_tb(error.__traceback__) if not _is_ours(f.filename)]
    own = [f for f in frames if not _is_library(f.filename)]
    if not frames:
        return ""
    last = (own or frames)[-1]
    line = f": {last.line}" if last.line else ""
    return f"{_short(last.filename)}:{last.lineno}, in {last.name}{line}"


def _is_ours(file: str) -> bool:
    return file.startswith("<frozen") or Path(__file__).parent in Path(file).parents


def _is_library(file: str) -> bool:
    standard = str(Path(traceback.__file__).parent)
    return "site-packages" in file or file.startswith((standard, "<"))


def _short(file: str) -> str:
    with contextlib.suppress(ValueError):
        return str(Path(file).relative_to(Path.cwd()))
    return file


# -- inputs ----------------------------------------------------------------------------------------


def inputs(texts: Sequence[str], *, device: str = "cpu", seed: int = 0) -> Any:
    """Example inputs from ``1x3x224x224``, ``1x77:int64`` or ``name=1x77:int64``; None from none.

    Floating-point tensors hold normal noise, others zeros. Named ones are keyword arguments of
    forward, and then all must be named. `InputError` for a text that cannot be read.
    """
    if not texts:
        return None
    import torch

    generator = torch.Generator().manual_seed(seed)
    named = [text.rpartition("=")[::2] for text in texts]
    if all(name for name, _ in named):
        return {name: _tensor(shape, generator).to(device) for name, shape in named}
    if any(name for name, _ in named):
        raise InputError("some inputs are named and some are not", hint="name all of them, or none")
    return tuple(_tensor(shape, generator).to(device) for _, shape in named)


def _tensor(text: str, generator: Any) -> Tensor:
    import torch

    sizes, _, kind = text.partition(":")
    parts = sizes.replace(",", "x").split("x")
    if not all(part.isdecimal() for part in parts):
        raise InputError(
            f"`{text}` is no shape", hint="write 1x3x224x224, or 1x77:int64 for tokens"
        )
    dtype = getattr(torch, kind or "float32", None)
    if not isinstance(dtype, torch.dtype):
        known = [n for n in vars(torch) if isinstance(getattr(torch, n), torch.dtype)]
        raise InputError(f"`{kind}` is no type of tensors", hint=nearest(kind, known))
    shape = [int(part) for part in parts]
    try:
        if dtype.is_floating_point:
            return torch.randn(shape, generator=generator).to(dtype)
        return torch.zeros(shape, dtype=dtype)
    except (RuntimeError, TypeError, ValueError, OverflowError, MemoryError) as error:
        fault = f"no tensor of `{text}` can be made: {first_line(error)}"
        raise InputError(fault, hint="smaller sizes do as well: only shapes matter") from None


__all__ = ["argument", "culprit", "inputs", "literal", "model", "thing"]
