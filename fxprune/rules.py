"""Rules: what is known of each op, read from YAML and checked when it is read.

``rules/ops/*.yaml`` ships with the package; `load` adds a file of your own.
"""

from __future__ import annotations

import importlib
import inspect
import operator
import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator
from torch import fx

from . import pattern
from .errors import RuleError, nearest
from .yamlfile import Fault, folder, parsed, shown, text_of

if TYPE_CHECKING:
    from .probe import Finding

_WORD_SPACES = {
    None, "torch", "torch.nn.functional", "torch._C._nn", "torch._C._special", "torch.functional",
    "_operator", "operator", "math", "torch._tensor", "builtins",
}  # fmt: skip


# the functions of `literals.py`, by the name a rule gives them
_FIXES = (
    "shape", "sizes", "squeeze", "sections", "chunks", "tensor_split", "narrow", "slice", "select",
    "index_select", "index", "pad", "repeats",
)  # fmt: skip


class Sample(BaseModel):
    """A call to probe a rule with: a class is built with ``init``, then called with ``inputs``.

    An input is the shape of a random tensor, or names what else it is:

    ``{positive: shape}`` and ``unit``, ``share``, ``above_one``   random numbers in a range
    ``{index: n, shape: shape}``, ``{bool: shape}``   random whole numbers below n, or flags
    ``{places: shape}``, ``{complex: shape}``   places of maxima as pools give them, complex numbers
    ``{tensor: data}``, ``{plain: value}``, ``{text: word}``, ``{dtype: name}``   fixed values
    ``{at: ":, 1:3"}``   an index
    ``{list: inputs}``, ``{tuple: inputs}``   several in one argument

    ``values: false`` says that the op leaves its values undefined.
    """

    model_config = ConfigDict(extra="forbid", populate_by_name=True)
    call: str
    init: list[Any] | dict[str, Any] = Field(default_factory=list)
    inputs: list[Any]
    options: dict[str, Any] = Field(default_factory=dict)
    values: bool = True


class Written(BaseModel):
    """How a saved network writes a layer of another library with PyTorch's own: a class, its
    arguments by the attributes that hold them (those of the same name need none) or as they are,
    and the parts of the layer that are called after it."""

    model_config = ConfigDict(extra="forbid", frozen=True)
    kind: str
    settings: dict[str, str] = Field(default_factory=dict)
    fixed: dict[str, Any] = Field(default_factory=dict)
    then: tuple[str, ...] = ()


class Rule(BaseModel):
    """One entry of a rule file.

    ``kind``     what the op does to channels: pointwise, dims, reduce, reshape, move, cat, pad,
                 fill (makes a uniform tensor), recurrent, plain (its result carries no channels)
    ``dims``     the letters of each operand and of the output (kind dims)
    ``zero``     whether zeros in give zeros out: keeps, any (one zero operand is enough), no
    ``sizes``    attributes or arguments that hold letters' sizes: read, and rewritten
    ``ranks``    stars whose length is the length of an argument
    ``at``       an argument that is the position of a letter's dim
    ``fixed``    letters of a size the op fixes
    ``mixes``    letters over which values are mixed; ``norm`` says the mixing is a normalisation
    ``scales``   the operand that holds one scale a channel
    ``mean``, ``variance``  the operands that hold the statistics a normalisation was trained to
    ``adds``     operands that are added: where they are not zero, the result is not
    ``multiplies``  operands of which one zero makes the result zero (by default all that do not
                 add)
    ``ignores``  tensors of which at most shape and dtype are read
    ``averages`` a sum over dims by their size (of a reduction)
    ``joins``    the operands are added up, as the branches of a residual block are
    ``spreads``  dims of one element may become longer (of a movement)
    ``copies``   the result is never a view of an operand (of a movement)
    ``pins``     arguments whose default hides a letter's size (letter ** -0.5)
    ``defaults`` what arguments are that a call of the function leaves out
    ``when``     what arguments (of a module: attributes) must be for the rule to fit: a value,
                 ``none``, ``tensor``, ``bool``, ``number``, a comparison (``"> 0"``), or a list of
                 which one holds
    ``still``    letters that are another, ``{"*t": "*s"}``, where ``still_when`` holds: a kernel of
                 one element moves nothing
    ``macs``     letters whose product is the op's multiply-accumulates
    ``slimming`` operations an element of the first operand in Network Slimming's FLOPs, beside macs
    ``fix``      how literals in a call of a movement are corrected
    ``written``  how classes of ``modules`` are written in a saved network
    """

    model_config = ConfigDict(extra="forbid", frozen=True)
    name: str = ""
    where: str = ""
    kind: Literal[
        "pointwise",
        "dims",
        "einsum",
        "matmul",
        "reduce",
        "reshape",
        "move",
        "cat",
        "pad",
        "fill",
        "assign",
        "recurrent",
        "plain",
    ]
    words: tuple[str, ...] = ()
    calls: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    dims: str | None = None
    operands: tuple[str, ...] = ()
    zero: Literal["keeps", "any", "no"] = "keeps"
    sizes: dict[str, str] = Field(default_factory=dict)
    ranks: dict[str, str] = Field(default_factory=dict)
    at: dict[str, str] = Field(default_factory=dict)
    fixed: dict[str, int] = Field(default_factory=dict)
    mixes: tuple[str, ...] = ()
    norm: bool = False
    additive: bool = False
    averages: bool = False
    joins: bool = False
    copies: bool = False
    spreads: bool = False
    keeps_dims: bool = False
    scales: str | None = None
    mean: str | None = None
    variance: str | None = None
    adds: tuple[str, ...] = ()
    multiplies: tuple[str, ...] = ()
    ignores: tuple[str, ...] = ()
    pins: dict[str, str] = Field(default_factory=dict)
    macs: str = ""
    slimming: int = 0
    defaults: dict[str, Any] = Field(default_factory=dict)
    when: dict[str, Any] = Field(default_factory=dict)
    still: dict[str, str] = Field(default_factory=dict)
    still_when: dict[str, Any] = Field(default_factory=dict)
    fix: str | None = None
    written: dict[str, Written] = Field(default_factory=dict)
    new_dim: bool = False
    samples: tuple[Sample, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _split_words(cls, data):
        if isinstance(data, dict):
            data = dict(data)
            for key in ("words", "operands", "mixes", "adds", "multiplies", "ignores"):
                if isinstance(data.get(key), str):
                    data[key] = data[key].split()
            if "dims" in data:
                data.setdefault("kind", "dims")
        return data

    @field_validator("fix")
    @classmethod
    def _check_fix(cls, fix: str | None) -> str | None:
        if fix is not None and fix not in _FIXES:
            raise ValueError(f"`{fix}` is no fix; known: {', '.join(_FIXES)}")
        return fix

    @model_validator(mode="after")
    def _check_dims(self):
        if (self.kind == "dims") != (self.dims is not None):
            raise ValueError("`dims` goes with kind dims, and only with it")
        if self.dims is not None:
            try:
                _check_letters(self, self.pattern)
            except RuleError as error:
                raise Fault(error) from None
        for text in (*self.calls, *self.modules):
            if not _SIGNATURE.fullmatch(text):
                raise ValueError(f"`{text}` is not a call; write `name(argument, argument)`")
        for text in self.calls if self.kind == "dims" else ():
            missing = [name for name in self.operands[:1] if name not in argument_names(text)]
            if missing:
                raise ValueError(f"`{text}` has no argument `{missing[0]}`, an operand")
        named = {name.lstrip("*") for text in self.calls for name in argument_names(text)}
        for key in (*self.when, *self.ignores):
            if key not in {*named, *self.operands}:
                known = nearest(key, named)
                raise ValueError(
                    f"no call has an argument `{key}`" + (f"; {known}" if known else "")
                )
        return self

    @property
    def pattern(self) -> pattern.Pattern:
        return _parse(self.dims or "")

    def standing(self, attributes: Mapping[str, Any]) -> Rule:
        """The rule for a call with these arguments, its ``still`` letters replaced if they are."""
        holds = self.still and all(_holds(v, attributes.get(k)) for k, v in self.still_when.items())
        return self._still if holds else self

    @cached_property
    def _still(self) -> Rule:
        """The rule in which the letters of ``still`` are those they are said to be."""
        dims, _, equal = (self.dims or "").partition(";")
        macs = self.macs
        for old, new in self.still.items():
            dims, macs = dims.replace(old, new), macs.replace(old, new)
        stars = [star for star in map(str.strip, equal.split("=")) if star not in ("", *self.still)]
        dims += f"; {' = '.join(stars)}" if len(stars) > 1 else ""
        return self.model_copy(update={"dims": dims, "macs": macs})


@cache
def _parse(text: str) -> pattern.Pattern:
    return pattern.parse(text)


def _check_letters(rule: Rule, dims: pattern.Pattern) -> None:
    if len(rule.operands) != len(dims.inputs):
        raise RuleError(f"{len(rule.operands)} operands are named, `{dims}` has {len(dims.inputs)}")
    letters = {letter for operand in (*dims.inputs, dims.output) for letter in operand.letters()}
    inputs = {letter for operand in dims.inputs for letter in operand.letters()}
    named = [*rule.ranks, *rule.at.values(), *rule.fixed, *rule.pins.values(), *rule.mixes]
    named += [word for text in (*rule.sizes.values(), rule.macs) for word in text.split()]
    for word in named:
        if word.lstrip("*") not in letters:
            raise RuleError(f"`{word}` is not a letter of `{dims}`", hint=nearest(word, letters))
    single = [name for name in (rule.scales, rule.mean, rule.variance) if name]
    for name in (*single, *rule.adds, *rule.multiplies):
        if name not in rule.operands:
            raise RuleError(f"`{name}` is not an operand", hint=nearest(name, rule.operands))
    for operand, name in zip(dims.inputs[1:], rule.operands[1:], strict=True):
        alone = (
            set(operand.letters()) - (inputs - set(operand.letters())) - set(dims.output.letters())
        )
        if set(operand.letters()) and alone == set(operand.letters()):
            others = {x for o in dims.inputs if o is not operand for x in o.letters()}
            if not others & set(operand.letters()):
                raise RuleError(
                    f"no letter of operand `{name}` ({operand}) stands anywhere else in `{dims}`"
                )


_SIGNATURE = re.compile(r"([\w.]+)\(([\w\s,*]*)\)")


Call = tuple[tuple, Mapping[str, Any]]


@dataclass(frozen=True)
class Use:
    """A rule as found for one target, with the names of the call's arguments."""

    rule: Rule
    arguments: tuple[str, ...]
    defaults: Mapping[str, Any] = field(default_factory=dict)

    def bound(self, args: tuple, kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The call's arguments by name; a starred last name takes the rest."""
        found: dict[str, Any] = {}
        for i, name in enumerate(self.arguments):
            if name.startswith("*"):
                rest = args[i:]
                nested = len(rest) == 1 and isinstance(rest[0], (list, tuple))
                if rest or name[1:] not in kwargs:
                    found[name[1:]] = tuple(rest[0]) if nested else tuple(rest)
                break
            if i < len(args):
                found[name] = args[i]
        return {**self.defaults, **found, **kwargs}

    def fits(self, call: Call | None) -> bool:
        """Whether the call's arguments are what the rule's ``when`` asks for."""
        if not self.rule.when:
            return True
        if call is None:
            return False
        bound = self.bound(*call)
        return all(_holds(wanted, bound.get(key)) for key, wanted in self.rule.when.items())

    def misfits(self, module: torch.nn.Module) -> list[str]:
        """The attributes of a module that are not what the rule's ``when`` asks for, as text."""
        found = {key: getattr(module, key, None) for key in self.rule.when}
        return [f"{k}={v}" for k, v in found.items() if not _holds(self.rule.when[k], v)]


_COMPARISON = re.compile(r"(<=|>=|<|>) *(-?[\d.]+)")
_COMPARED = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}


def _holds(wanted: Any, value: Any) -> bool:
    """Whether a condition of ``when`` holds for an argument (a node stands for what it gave)."""
    value = value.meta.get("val") if isinstance(value, fx.Node) else value
    if isinstance(wanted, list):
        return any(_holds(each, value) for each in wanted)
    if isinstance(value, (list, tuple)) and isinstance(wanted, int):
        return all(_holds(wanted, each) for each in value)
    if isinstance(value, torch.Tensor):
        return wanted == "tensor"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    if wanted in ("tensor", "bool", "number", "none", None):
        return {"bool": isinstance(value, bool), "number": number}.get(wanted, False) or (
            wanted in ("none", None) and value is None
        )
    compared = _COMPARISON.fullmatch(wanted) if isinstance(wanted, str) else None
    if compared:
        return number and bool(_COMPARED[compared[1]](value, float(compared[2])))
    return isinstance(value, bool) == isinstance(wanted, bool) and bool(value == wanted)


@dataclass
class Rules:
    """All rules, indexed by what they match."""

    rules: list[Rule] = field(default_factory=list)
    functions: dict[Any, list[Use]] = field(default_factory=dict)
    methods: dict[str, list[Use]] = field(default_factory=dict)
    words: dict[str, Use] = field(default_factory=dict)
    modules: dict[str, Use] = field(default_factory=dict)
    _found: dict[Any, Use | None] = field(default_factory=dict)

    def copy(self) -> Rules:
        functions = {key: list(uses) for key, uses in self.functions.items()}
        methods = {key: list(uses) for key, uses in self.methods.items()}
        return Rules(list(self.rules), functions, methods, dict(self.words), dict(self.modules))

    def add(self, rule: Rule) -> None:
        """Add a rule; it wins over those added before for the same call."""
        self.rules.append(rule)
        for word in rule.words:
            found = getattr(torch.nn, word, None) if word[0].isupper() else None
            if isinstance(found, type):
                self._module(word, found, Use(rule, ("input",)))
            else:
                self.words[_base(word)] = Use(rule, rule.operands, rule.defaults)
        for text in rule.calls:
            self._call(*signature(text, rule))
        for text in rule.modules:
            name, use = signature(text, rule)
            self._module(name, resolve(name), use)
        self._found.clear()

    def _module(self, name: str, found: Any, use: Use) -> None:
        if isinstance(found, type):
            name = f"{found.__module__}.{found.__qualname__}"
        self.modules[name] = Use(use.rule, use.arguments)

    def _call(self, name: str, use: Use) -> None:
        if name.startswith("Tensor."):
            self.methods.setdefault(name.removeprefix("Tensor."), []).insert(0, use)
            name = f"torch.{name}"  # operators reach a tracer as functions of the class
        key = _op_name(name) or resolve(name)
        if key is not None:
            self.functions.setdefault(key, []).insert(0, use)

    def of_function(self, function: Any, call: Call | None = None) -> Use | None:
        """The rule of a function called like this.

        An aten overload stands for its packet, and one in place has its plain form's rule.
        """
        packet = getattr(function, "overloadpacket", function)
        operator_ = isinstance(packet, torch._ops.OpOverloadPacket)
        uses = self.functions.get(str(packet) if operator_ else function, ())
        if operator_ and not uses:
            uses = self.functions.get(_base(str(packet)), ())
        use = next((use for use in uses if use.fits(call)), None)
        return use or self.words.get(_word(function))

    def knows(self, function: Any) -> bool:
        """Whether there is a rule for a function, however it is called."""
        packet = getattr(function, "overloadpacket", function)
        operator_ = isinstance(packet, torch._ops.OpOverloadPacket)
        keys = (str(packet), _base(str(packet))) if operator_ else (function,)
        return any(key in self.functions for key in keys) or _word(function) in self.words

    def knows_method(self, name: str) -> bool:
        """Whether there is a rule for a tensor's method, however it is called."""
        return name in self.methods or _base(name) in self.words

    def of_method(self, name: str, call: Call | None = None) -> Use | None:
        """The rule of a tensor method; an in-place method has its plain form's rule."""
        uses = (*self.methods.get(name, ()), *self.methods.get(_base(name), ()))
        return next((use for use in uses if use.fits(call)), None) or self.words.get(_base(name))

    def of_module(self, cls: type) -> Use | None:
        """The rule of a module class, inherited as long as the subclass computes the same."""
        if cls not in self._found:
            self._found[cls] = self._of_module(cls)
        return self._found[cls]

    def _of_module(self, cls: type) -> Use | None:
        for base in cls.__mro__:
            use = self.modules.get(f"{base.__module__}.{base.__qualname__}")
            if use is not None:
                return use if computes_as(cls, base) else None
        return None


def computes_as(cls: type, base: type) -> bool:
    harmless = {
        "__init__",
        "__module__",
        "__doc__",
        "__qualname__",
        "extra_repr",
        "__repr__",
        "reset_parameters",
    }
    for between in cls.__mro__[: cls.__mro__.index(base)]:
        for name, value in vars(between).items():
            known = getattr(base, name, None)
            if inspect.isfunction(value) and inspect.isfunction(known) and name not in harmless:
                return False
    return True


def _base(name: str) -> str:
    """``relu`` for ``relu_``, ``and`` for ``and_``; ``__rsub__`` stays."""
    return name if name.startswith("__") else name.rstrip("_")


def _op_name(name: str) -> str:
    """``torchvision.nms`` for ``torch.ops.torchvision.nms``: ops are known by their names, so that
    the library that brings them need not be there when rules are read."""
    if name.startswith("aten."):
        return name
    return name.removeprefix("torch.ops.") if name.startswith("torch.ops.") else ""


def _word(function: Any) -> str:
    """The word that means a function, if words can mean it: one of torch's own or an operator."""
    packet = getattr(function, "overloadpacket", function)
    if isinstance(packet, torch._ops.OpOverloadPacket):
        return _base(str(packet).removeprefix("aten.")) if str(packet).startswith("aten.") else ""
    known = getattr(function, "__module__", None) in _WORD_SPACES
    return _base(getattr(function, "__name__", "")) if known else ""


def signature(text: str, rule: Rule) -> tuple[str, Use]:
    return text.partition("(")[0], Use(rule, argument_names(text), rule.defaults)


def argument_names(text: str) -> tuple[str, ...]:
    """The names of the arguments in ``call(argument, argument)``."""
    inside = text.partition("(")[2].rstrip(")")
    return tuple(name.strip() for name in inside.split(",") if name.strip())


def resolve(name: str) -> Any:
    """The object behind a dotted name; None where its package is not there (or not imported)."""
    if name.startswith("aten."):
        return getattr(torch.ops.aten, name.removeprefix("aten."), None)
    parts = name.split(".")
    if parts[0] == "operator":
        return getattr(operator, parts[1], None)
    if parts[0] != "torch":
        return None  # a module's class is matched by its name, so that no package need be imported
    found: Any = torch
    for i, part in enumerate(parts[1:], 2):
        try:
            found = getattr(found, part)
        except AttributeError:
            try:
                found = importlib.import_module(".".join(parts[:i]))
            except ImportError:
                return None
    return found


def read(path: Path | str) -> list[Rule]:
    """The rules of one file; `RuleError` names file and line of what is wrong."""
    path = Path(path)
    return list(_entries(text_of(path, RuleError), shown(path)))


def _entries(text: str, where: str) -> Iterator[Rule]:
    root, data = parsed(text, where, RuleError)
    if root is None:
        return
    if not isinstance(data, dict):
        raise RuleError(
            f"{where}:1 must hold named rules", hint="write `name:` and the rule's fields below it"
        )
    seen: set[str] = set()
    for key, value in root.value:
        line = key.start_mark.line + 1
        if key.tag != "tag:yaml.org,2002:str":
            raise RuleError(f"{where}:{line} a rule's name must be a word, not `{key.value}`")
        if key.value in seen:
            raise RuleError(f"{where}:{line} rule `{key.value}` stands twice in this file")
        seen.add(key.value)
        if not isinstance(data[key.value], dict):
            raise RuleError(f"{where}:{line} rule `{key.value}` must hold fields")
        try:
            yield Rule.model_validate(
                {**data[key.value], "name": key.value, "where": f"{where}:{line}"}
            )
        except ValidationError as error:
            raise _broken(error, key.value, where, line, value) from None


def _broken(error: ValidationError, name: str, where: str, line: int, value) -> RuleError:
    first = error.errors()[0]
    path = [str(part) for part in first["loc"]]
    if path:
        line = next((k.start_mark.line + 1 for k, _ in value.value if k.value == path[0]), line)
    hint = nearest(path[0], Rule.model_fields) if first["type"] == "extra_forbidden" else ""
    message = first["msg"].removeprefix("Value error, ")
    fault = first.get("ctx", {}).get("error")
    if isinstance(fault, Fault):
        message, hint = fault.error.fault, fault.error.hint
    if isinstance(first["input"], bool) and path:
        hint = 'YAML reads a bare no or yes as false or true: quote it, "no"'
    field_name = f" field `{'.'.join(path)}`:" if path else ""
    return RuleError(f"{where}:{line} rule `{name}`:{field_name} {message}", hint=hint)


def build(files: Iterable[Path]) -> Rules:
    """Rules from files, later ones over earlier ones."""
    rules = Rules()
    for file in files:
        for rule in read(file):
            rules.add(rule)
    return rules


_current: Rules | None = None


def current() -> Rules:
    """The rules in force: the shipped ones and those added by `load`."""
    global _current
    if _current is None:
        _current = build(sorted((folder() / "ops").glob("*.yaml")))
    return _current


def load(path: Path | str) -> None:
    """Add the rules of a YAML file to those in force; they win over the shipped ones.

    Raises `RuleError` with file and line; then nothing is added.
    """
    global _current
    rules = current().copy()
    for rule in read(path):
        rules.add(rule)
    _current = rules


def probe(path: Path | str | None = None) -> list[Finding]:
    """What is wrong with the rules of a file (or of all in force), found by running their ops.

    An empty list says that every sample and every spelling of every op does what its rule says.
    """
    from .probe import probe as probe_rule

    rules = current()
    chosen = rules.rules if path is None else read(path)
    return [finding for rule in chosen for finding in probe_rule(rule, rules)]
