"""A network's data as Python: the ``model.py`` of a saved folder, for people to read and to run."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import count
from typing import Any

from .described import Layer, Network, Node

_WIDTH = 96
_TAB = "    "
_INFIX = {
    "add": "+", "sub": "-", "mul": "*", "truediv": "/", "floordiv": "//", "mod": "%", "pow": "**",
    "matmul": "@", "and_": "&", "or_": "|", "xor": "^", "lt": "<", "le": "<=", "gt": ">",
    "ge": ">=", "eq": "==", "ne": "!=", "lshift": "<<", "rshift": ">>",
}  # fmt: skip
_FORMS = {"getitem": "{}[{}]", "setitem": "{}[{}] = {}", "neg": "-{}", "not_": "not {}"}
_SHORT = ("torch.nn.functional.", "F."), ("torch.nn.", "nn."), ("builtins.", "")
_LETTERS = "x y z u v w a b c d e f g h i j k m n p q r s t".split()

_PAGE = '''"""{about}

    from model import load
    model = load()    # {name} in eval mode, with the weights beside this file

Made by fxprune. Needs torch, safetensors{needs}.
"""

{imports}


class Layers(nn.Module):
    """Layers by name: ``layers.conv1``, or ``layers[0]`` where the name is a number."""

    def __init__(self, **layers):
        super().__init__()
        for name, layer in layers.items():
            self.add_module(name, layer)

    def __getitem__(self, name):
        return getattr(self, str(name))


class {name}(nn.Module):
    def __init__(self):
        super().__init__()
{init}

    def forward({signature}):
{forward}


def load(folder=Path(__file__).parent):
    """The network with the weights that lie in the folder, in eval mode."""
    model = {name}()
    weights = load_file(Path(folder) / "model.safetensors")
    tensors = dict(model.named_parameters(remove_duplicate=False))
    tensors |= dict(model.named_buffers(remove_duplicate=False))
    if tensors.keys() != weights.keys():
        raise ValueError(f"{{folder}} holds the weights of another network")
    with torch.no_grad():
        for name, tensor in tensors.items():
            if tensor.shape != weights[name].shape:
                raise ValueError(f"{{name}} is {{weights[name].shape}}, not {{tensor.shape}}")
            tensor.data = weights[name].clone()  # aligned, which what lies in the file is not
    return model.eval()


if __name__ == "__main__":
    print(load())
'''


def written(network: Network, shapes: dict[str, tuple[list[int], str]], about: str) -> str:
    """The source of a network. `shapes` are the sizes and dtypes of its tensors, by name."""
    forward = _Forward(network)
    lines = [part for line in forward.lines() for part in _wrapped(line)]
    lines = lines[1:] if lines[0] == "" else lines
    text = "\n".join([*_init(network, shapes), *lines])
    vision = "torchvision." in text
    return _PAGE.format(
        about=_said(about),
        name=network.name,
        needs=" and torchvision" if vision else "",
        imports="\n".join(_imports(text, vision)),
        init="\n".join(_indented(_init(network, shapes) or ["pass"], 2)),
        signature=", ".join(["self", *forward.signature()]),
        forward="\n".join(_indented(lines, 2)),
    )


def _said(text: str) -> str:
    """Text that cannot end the docstring that it stands in."""
    return text.replace("\\", "/").replace('"""', "'''").rstrip('"')


def _imports(text: str, vision: bool) -> Iterator[str]:
    for module in ("collections", "math", "operator"):
        if f"{module}." in text:
            yield f"import {module}"
    yield from ("from pathlib import Path", "", "import torch")
    yield from (["import torchvision"] if vision else [])
    yield from (["import torch.nn.functional as F"] if re.search(r"\bF\.", text) else [])
    yield from ("from safetensors.torch import load_file", "from torch import nn")


def _indented(lines: Iterable[str], tabs: int) -> Iterator[str]:
    for line in lines:
        yield f"{_TAB * tabs}{line}" if line else ""


def _wrapped(line: str) -> list[str]:
    """A long call with an argument a line."""
    at = _opening(line) if len(line) > _WIDTH and "'" not in line else 0
    if not at:
        return [line]
    return [line[: at + 1], *_indented((f"{p}," for p in _parts(line[at + 1 : -1])), 1), line[-1]]


def _opening(line: str) -> int:
    """Where the bracket opens that closes at the end of a line; 0 where there is none."""
    depth = 0
    for at in range(len(line) - 1, 0, -1):
        depth += (line[at] in ")]}") - (line[at] in "([{")
        if not depth:
            return at if line[at] in "([{" else 0
    return 0


def _parts(text: str) -> Iterator[str]:
    """What stands between the commas of a list, each with all of its own brackets."""
    depth, start = 0, 0
    for at, sign in enumerate(f"{text},"):
        depth += (sign in "([{") - (sign in ")]}")
        if sign == "," and not depth:
            yield text[start:at].strip()
            start = at + 1


# -- __init__ --------------------------------------------------------------------------------------


def _init(network: Network, shapes: dict[str, tuple[list[int], str]]) -> list[str]:
    tree = _Tree(network.layers)
    lines = [line for name in tree.below("") for line in tree.statement(name)]
    lines += [f"{_path(path)} = {_path(home)}" for path, home in network.same.items()]
    for name, kind in network.owns.items():
        lines.append(_held(name, kind, *shapes[name]))
    lines += [f"{_path(path)} = {_literal(value)}" for path, value in network.values.items()]
    lines += [f"{_path(name)} = {_path(home)}" for name, home in network.tied.items()]
    lines += [f"{_path(name)}.requires_grad_(False)" for name in network.frozen]
    return lines


def _held(name: str, kind: str, shape: list[int], dtype: str) -> str:
    """A tensor that stands in no layer; its values come with the weights."""
    holder, _, own = name.rpartition(".")
    sizes = ", ".join(map(str, shape)) or "()"
    typed = "" if dtype == "float32" else f", dtype=torch.{dtype}"
    made = f"torch.empty({sizes}{typed})"
    if kind == "parameter":
        learns = "" if dtype.startswith(("float", "bfloat", "complex")) else ", requires_grad=False"
        made = f"nn.Parameter({made}{learns})"
        return f"{_path(holder)}.register_parameter({own!r}, {made})"
    kept = ", persistent=False" if kind == "table" else ""
    return f"{_path(holder)}.register_buffer({own!r}, {made}{kept})"


class _Tree:
    """The layers, each within the one that holds it."""

    def __init__(self, layers: dict[str, Layer]):
        self.layers = layers
        self.children: dict[str, list[str]] = {}
        for path in layers:
            self.children.setdefault(path.rpartition(".")[0], []).append(path)

    def below(self, path: str) -> list[str]:
        return self.children.get(path, [])

    def statement(self, path: str) -> Iterator[str]:
        own = path.rpartition(".")[2]
        first, *rest = self.made(path)
        call = f"self.{own} = " if _is_name(own) else f"self.add_module({own!r}, "
        lines = [f"{call}{first}", *rest]
        yield from lines if _is_name(own) else [*lines[:-1], f"{lines[-1]})"]
        yield from self.parts(path)

    def parts(self, path: str) -> Iterator[str]:
        """Layers that stand in layers of PyTorch are added to them afterwards."""
        for below in self.below(path):
            if self.layers[path].kind:
                name = below.rpartition(".")[2]
                yield f"{_path(path)}.add_module({name!r}, {self.made(below)[0]})"
            yield from self.parts(below)

    def made(self, path: str) -> list[str]:
        """The lines that make a layer, with those in it."""
        layer = self.layers[path]
        if layer.kind:
            return [_called(_short(layer.kind), _settings(layer))]
        names = [below.rpartition(".")[2] for below in self.below(path)]
        if names and names == [str(i) for i in range(len(names))]:
            return self._nested("nn.ModuleList([", ["" for _ in names], path, "])")
        if all(map(_is_name, names)):
            return self._nested("Layers(", [f"{name}=" for name in names], path, ")")
        return self._nested("Layers(**{", [f"{name!r}: " for name in names], path, "})")

    def _nested(self, opening: str, heads: list[str], path: str, closing: str) -> list[str]:
        lines = []
        for head, below in zip(heads, self.below(path), strict=True):
            first, *rest = self.made(below)
            inner = [f"{head}{first}", *rest]
            inner[-1] += ","
            lines += list(_indented(inner, 1))
        return [opening, *lines, closing] if lines else [f"{opening}{closing}"]


def _settings(layer: Layer) -> list[str]:
    """A layer's arguments: the first ones, which are sizes, without their names."""
    shown, named = [], False
    for name, value in layer.args.items():
        named = named or name not in _SIZES
        shown.append(f"{name}={_literal(value)}" if named else _literal(value))
    return shown


_SIZES = ("in_channels", "out_channels", "in_features", "out_features", "num_features",
          "normalized_shape", "num_embeddings", "embedding_dim", "input_size", "hidden_size",
          "kernel_size", "output_size", "p")  # fmt: skip


# -- forward ---------------------------------------------------------------------------------------


class _Forward:
    """The graph as statements. A variable's name is used again once its value is no longer needed,
    which also lets the memory go."""

    def __init__(self, network: Network):
        self.nodes = network.nodes
        self.last = {name: i for i, node in enumerate(self.nodes) for name in _named(node)}
        self.inputs = [node for node in self.nodes if node.op == "placeholder"]
        self.names = {node.name: node.target.lstrip("*") for node in self.inputs}
        self.taken = set(self.names.values())

    def signature(self) -> Iterator[str]:
        for node in self.inputs:
            default = node.args.get("tuple") if isinstance(node.args, dict) else None
            yield f"{node.target}={_literal(default[0])}" if default else node.target

    def lines(self) -> Iterator[str]:
        part = ""
        for i, node in enumerate(self.nodes):
            if node.op == "call_module":
                found = _block_of(node.target)
                if found != part and (found or part):
                    yield from ("", f"# {found}") if found else ("",)
                part = found
            yield from self._line(i, node)

    def _line(self, i: int, node: Node) -> Iterator[str]:
        if node.op == "placeholder":
            return
        if node.op == "get_attr":
            self.names[node.name] = _path(node.target)
            return
        said = self._said(node)
        for name in _named(node):
            if self.last[name] == i:
                self.taken.discard(self.names[name])
        if node.op == "output":
            yield f"return {said}"
        elif node.name not in self.last:
            yield said
        else:
            self.names[node.name] = self._free()
            yield f"{self.names[node.name]} = {said}"

    def _free(self) -> str:
        more = (f"{letter}{i}" for i in count(1) for letter in _LETTERS)
        name = next(n for n in (*_LETTERS, *_first(more, 10_000)) if n not in self.taken)
        self.taken.add(name)
        return name

    def _said(self, node: Node) -> str:
        data = node.args["tuple"]
        args = [_literal(each, self.names) for each in data]
        kwargs = [f"{k}={_literal(v, self.names)}" for k, v in node.kwargs["dict"]]
        if node.op == "output":
            return args[0]
        if node.op == "call_module":
            return _called(_path(node.target), [*args, *kwargs])
        if node.op == "call_method":
            return _called(f"{_atom(args[0])}.{node.target}", [*args[1:], *kwargs])
        if node.target in ("operator.getitem", "operator.setitem"):
            args[1] = _index(data[1], self.names)
        return _function(node.target, args, kwargs)


def _function(target: str, args: list[str], kwargs: list[str]) -> str:
    """A call of a function, or the operator that means it."""
    space, _, word = target.rpartition(".")
    if space == "operator" and word in _INFIX and len(args) == 2:
        return f"{_operand(args[0])} {_INFIX[word]} {_operand(args[1])}"
    if space == "operator" and word in _FORMS:
        return _FORMS[word].format(_atom(args[0]), *args[1:])
    if target == "builtins.getattr":
        return f"{_atom(args[0])}.{args[1][1:-1]}"
    if space.startswith(("aten", "torchvision")) and space != "torchvision.ops":
        target = f"torch.ops.{target}"
    return _called(_short(target), [*args, *kwargs])


def _block_of(target: str) -> str:
    """The stage and block that a layer is of, ``layer1.0``; nothing for a layer on its own."""
    stage, _, rest = target.partition(".")
    block = rest.partition(".")[0]
    return f"{stage}.{block}" if block.isdigit() and "." in rest else stage if rest else ""


def _first(values: Iterable[str], most: int) -> Iterator[str]:
    return (value for value, _ in zip(values, range(most), strict=False))


def _named(node: Node) -> list[str]:
    """The nodes among a node's arguments."""
    found: list[str] = []
    stack = [node.args, node.kwargs]
    while stack:
        data = stack.pop()
        if isinstance(data, dict) and "node" in data:
            found.append(data["node"])
        elif isinstance(data, dict):
            stack.extend(data.values())
        elif isinstance(data, (list, tuple)):
            stack.extend(data)
    return found


# -- expressions -----------------------------------------------------------------------------------


def _literal(data: Any, names: dict[str, str] | None = None) -> str:
    """Plain data as Python writes it."""
    if isinstance(data, (list, tuple)):
        return f"[{', '.join(_literal(each, names) for each in data)}]"
    if not isinstance(data, dict):
        return repr(data)
    kind, inner = next(iter(data.items()), ("dict", []))
    if kind == "node":
        return (names or {})[str(inner)]
    if kind == "tuple":
        parts = [_literal(each, names) for each in inner]
        return f"({', '.join(parts)}{',' if len(parts) == 1 else ''})"
    if kind == "dict":
        pairs = (f"{_literal(k, names)}: {_literal(v, names)}" for k, v in inner)
        return f"{{{', '.join(pairs)}}}"
    if kind == "slice":
        return f"slice({', '.join(_literal(each, names) for each in inner)})"
    return _SAID[kind](inner)


_SAID: dict[str, Any] = {
    "float": lambda text: f'float("{text}")',
    "dtype": lambda name: f"torch.{name}",
    "layout": lambda name: f"torch.{name}",
    "memory_format": lambda name: f"torch.{name}",
    "device": lambda text: f"torch.device({text!r})",
    "ellipsis": lambda inner: "...",
    "complex": lambda parts: f"complex({parts[0]!r}, {parts[1]!r})",
}


def _operand(text: str) -> str:
    """In brackets where another operator would take it apart."""
    return f"({text})" if text.startswith("-") else text


def _atom(text: str) -> str:
    """In brackets where a dot behind it would take it apart."""
    return f"({text})" if re.match(r"-|\d", text) else text


def _index(data: Any, names: dict[str, str]) -> str:
    """What stands in square brackets: slices with colons, several positions without a tuple."""
    several = data["tuple"] if isinstance(data, dict) and data.get("tuple") else None
    parts = [_position(each, names) for each in (several or [data])]
    return f"{', '.join(parts)}{',' if several and len(parts) == 1 else ''}"


def _position(data: Any, names: dict[str, str]) -> str:
    if not isinstance(data, dict) or "slice" not in data:
        return _literal(data, names)
    start, stop, step = ("" if each is None else _literal(each, names) for each in data["slice"])
    return f"{start}:{stop}:{step}" if step else f"{start}:{stop}"


def _called(head: str, parts: Sequence[str]) -> str:
    return f"{head}({', '.join(parts)})"


def _short(name: str) -> str:
    for long, short in _SHORT:
        if name.startswith(long):
            return f"{short}{name.removeprefix(long)}"
    return name


def _path(name: str) -> str:
    """The expression that reads a module or a tensor off ``self``."""
    found = "self"
    for part in name.split(".") if name else ():
        if part.isdigit() and str(int(part)) == part and found != "self":
            found = f"{found}[{part}]"
        else:
            found = f"{found}.{part}" if _is_name(part) else f"getattr({found}, {part!r})"
    return found


def _is_name(text: str) -> bool:
    return text.isidentifier() and not keyword.iskeyword(text)
