"""The library's messages in the words of the command line: ``rate=40`` is ``--rate 40`` here."""

from __future__ import annotations

import re
import shlex
from dataclasses import fields

from .options import Named, Pruning

_FLAGS = {"scatter": ("--scatter", "--no-scatter"), "strict": ("--strict", "--strict")}
_OTHER = {"example_inputs", "device", "seed", "batch_sizes", "threads", "rounds"}
_NAMES = {"example_inputs": "--input", "batch_sizes": "--batch"}
_KNOWN = {each.name for kind in (Named, Pruning) for each in fields(kind)} | _OTHER
_ARGUMENT = re.compile(
    r"(?<![\w.\[])(?P<name>" + "|".join(sorted(_KNOWN, key=len, reverse=True)) + r")="
    r"(?P<value>\"[^\"]*\"|'[^']*'|\([^()]*\)|\[[^\[\]]*\]|\{[^{}]*\}|[\w.+-]*)"
)
_ENTRY = re.compile(
    r"\b(?P<name>rates|target|min_channels|max_rate)\['(?P<key>[^']*)'\]=(?P<value>[\w.+-]+)"
)


def spoken(text: str) -> str:
    """Arguments of Python functions as the options of the same names."""
    text = _ARGUMENT.sub(_option, _ENTRY.sub(_entry, text))
    return re.sub(r"\bexample_inputs\b", "--input", text)


def _entry(found: re.Match[str]) -> str:
    """``rates['layer1.*']=0.3`` as an option, in quotes where a shell would need them."""
    given = shlex.quote(f"{found['key']}={found['value']}")
    return f"--{found['name'].replace('_', '-')} {given}"


def _option(found: re.Match[str]) -> str:
    name, value = found["name"], found["value"]
    if name in _FLAGS and value in ("True", "False"):
        return _FLAGS[name][value == "False"]
    option = _NAMES.get(name, f"--{name.replace('_', '-')}")
    if value[:1] in ("(", "[", "{"):
        value = {"example_inputs": "SHAPE", "rates": "'layer1.*=0.3'"}.get(name, "...")
    bare = value[1:-1] if re.fullmatch(r"(['\"])[\w.+-]+\1", value) else value
    return f"{option} {bare}".rstrip()
