"""A pruned network as plain data: its layers with their settings, and the nodes of its graph.

`describe_network` writes it, `build` makes the network of it anew. Building runs nothing that the
data holds: layers are PyTorch's own, made on the meta device, and nodes may call what `opnames`
allows. Names go into the code that fx writes, so they are checked first.
"""

from __future__ import annotations

import inspect
import keyword
import re
from collections.abc import Container, Iterable, Iterator, Mapping
from typing import Any, Literal

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, fx, nn

from . import opnames, rules
from .errors import first_line
from .plain import Undescribed, Unsound, decoded, encoded, is_plain
from .pruned import PrunedModule, assembled
from .rules import Written

_PART = re.compile(r"\w[\w-]*", re.ASCII)
_STARRED = re.compile(r"\*{0,2}(?=[^*])")
_SKIPPED = frozenset({"self", "device", "dtype", "_weight", "_freeze"})
_MANY = 100_000  # no layer has more parts


class Layer(BaseModel):
    """A layer of PyTorch, or a holder of others (no ``kind``)."""

    model_config = ConfigDict(extra="forbid")
    kind: str = ""
    args: dict[str, Any] = Field(default_factory=dict)
    training: bool = False


class Node(BaseModel):
    """A node of the graph; nodes among its arguments are named."""

    model_config = ConfigDict(extra="forbid")
    op: Literal["placeholder", "get_attr", "call_module", "call_function", "call_method", "output"]
    name: str
    target: str
    args: Any = ()
    kwargs: Any = Field(default_factory=dict)
    source: Any = None


class Network(BaseModel):
    """All of a network but the values of its tensors.

    ``same``    modules that are another one, under a second name
    ``tied``    parameters and buffers that are another one
    ``owns``    what modules hold beside their layers: "parameter", "buffer" (saved with the state),
                "table" (a buffer that is not)
    ``values``  numbers and flags that the graph reads off modules
    """

    model_config = ConfigDict(extra="forbid")
    name: str
    training: bool
    layers: dict[str, Layer]
    same: dict[str, str]
    tied: dict[str, str]
    owns: dict[str, Literal["parameter", "buffer", "table"]]
    frozen: list[str]
    values: dict[str, Any]
    nodes: list[Node]


# -- to data ---------------------------------------------------------------------------------------


def describe_network(pruned: nn.Module) -> Network:
    """The data of a pruned network. `Undescribed` says why there is none."""
    if not isinstance(pruned, PrunedModule):
        raise Undescribed("no graph holds the network, which is a copy of the original")
    paths = dict(pruned.named_modules(remove_duplicate=False))
    first = {id(module): path for path, module in reversed(paths.items())}
    same = {path: first[id(m)] for path, m in paths.items() if first[id(m)] != path}
    known = {path: module for path, module in paths.items() if path and not _within(path, same)}
    layers = _layers(known, {str(n.target) for n in pruned.graph.nodes if n.op == "call_module"})
    tensors = tensors_of(pruned)
    for path in (*layers, *same, *tensors):
        if not all(_PART.fullmatch(part) for part in path.split(".")):
            raise Undescribed(f"{path!r} is a name that source code cannot hold")
    return Network(
        name=type(pruned).__name__ if _is_free(type(pruned).__name__) else "Network",
        training=pruned.training,
        layers=layers,
        same={path: home for path, home in same.items() if not _within(path, same, own=False)},
        tied=_tied(tensors),
        owns={
            name: _kind(pruned, name, t) for name, t in tensors.items() if _is_held(name, layers)
        },
        frozen=[n for n, t in tensors.items() if _is_frozen(t)],
        values=_values(pruned),
        nodes=[each for node in pruned.graph.nodes for each in _nodes(node, pruned)],
    )


_RESERVED = frozenset(
    "torch torchvision nn F math operator builtins Path Layers load load_file".split()
)


def _is_free(name: str) -> bool:
    """Whether a name can be given in source code."""
    return name.isidentifier() and name.isascii() and name not in (*keyword.kwlist, *_RESERVED)


def _within(path: str, homes: Iterable[str], own: bool = True) -> bool:
    """Whether a path is one of these, or below one."""
    return any((own and path == home) or path.startswith(f"{home}.") for home in homes)


def _layers(known: Mapping[str, nn.Module], called: Container[str]) -> dict[str, Layer]:
    """The layers, without the parts of PyTorch's own; what is never called only holds others."""
    layers: dict[str, Layer] = {}
    whole: list[str] = []
    for path, module in known.items():
        if _within(path, whole):
            continue
        layers[path] = _layer(path, module, path in called)
        written = _written(module) if layers[path].kind else None
        whole += [path] if written and not written.then else []
    return layers


def _layer(path: str, module: nn.Module, called: bool) -> Layer:
    written = _written(module)
    if written and not _hooks(module):
        args = _settings(path, module, written)
        return Layer(kind=written.kind, args=args, training=module.training)
    if called:
        what = "has hooks" if written else "is no layer of PyTorch's"
        raise Undescribed(f"{path} ({type(module).__name__}) {what}")
    return Layer(training=module.training)


def _written(module: nn.Module) -> Written | None:
    """How a layer is written: as its own class, where that is PyTorch's, or as its rule says."""
    kind = opnames.layer_name(module)
    if kind:
        return Written(kind=kind)
    cls = type(module)
    use = rules.current().of_module(cls)
    return use.rule.written.get(f"{cls.__module__}.{cls.__qualname__}") if use else None


def _hooks(module: nn.Module) -> bool:
    names = ("_forward_hooks", "_forward_pre_hooks", "parametrizations")
    return any(getattr(module, name, None) for name in names)


def _settings(path: str, module: nn.Module, written: Written) -> dict[str, Any]:
    """The arguments that make this layer, as few and as short as say it."""
    cls = opnames.layer_of(written.kind)
    args = {**dict(_arguments(module, cls, written.settings)), **written.fixed}
    wanted = None if written.settings else _looks(module, own=bool(written.then))
    if not _makes(cls, args, wanted, bool(written.then)):
        raise Undescribed(f"{path} ({type(module).__name__}) is not what its settings make")
    if wanted is not None:
        args = _shortest(cls, args, wanted, bool(written.then))
    return {name: encoded(value) for name, value in args.items()}


def _shortest(cls: type[nn.Module], args: dict[str, Any], wanted: Any, own: bool) -> dict[str, Any]:
    """Without what need not be said, and 3 for (3, 3)."""
    for name, value in args.items():
        left_out = {key: each for key, each in args.items() if key != name}
        single = {**args, name: value[0]} if isinstance(value, tuple) and value else args
        args = next((each for each in (left_out, single) if _makes(cls, each, wanted, own)), args)
    return args


def _arguments(
    module: nn.Module, cls: type[nn.Module], names: Mapping[str, str]
) -> Iterator[tuple[str, Any]]:
    for name, parameter in _parameters(cls).items():
        value = getattr(module, names.get(name, name), parameter.default)
        if isinstance(value, Tensor) or (value is None and isinstance(parameter.default, bool)):
            value = value is not None  # as ``bias``, which says whether there is one
        if name not in _SKIPPED and is_plain(value) and value != parameter.default:
            yield name, tuple(value) if isinstance(value, (list, tuple)) else value


def _parameters(cls: type[nn.Module]) -> Mapping[str, inspect.Parameter]:
    """What a class takes; where it hands all on, what its base takes but for one."""
    found = inspect.signature(cls).parameters
    if any(each.kind is each.VAR_POSITIONAL for each in found.values()):
        return dict(list(_parameters(cls.__mro__[1]).items())[1:])
    return found


def _makes(cls: type[nn.Module], args: Mapping[str, Any], wanted: Any, own: bool) -> bool:
    """Whether these arguments make a layer that looks as wanted."""
    try:
        with torch.device("meta"):
            made = cls(**args)
    except (TypeError, ValueError, RuntimeError, AssertionError, IndexError):
        return False
    return wanted is None or _looks(made, own) == wanted


def _looks(layer: nn.Module, own: bool) -> Any:
    """All of a layer but the values of its tensors; with or without its parts."""
    modules = [layer] if own else layer.modules()
    settings = [
        {k: _tuples(v) for k, v in vars(m).items() if is_plain(v) and k != "training"}
        for m in modules
    ]
    tensors = tensors_of(layer)
    return settings, {
        name: list(t.shape) for name, t in tensors.items() if not (own and "." in name)
    }


def _tuples(value: Any) -> Any:
    """Lists mean to a layer what tuples do."""
    return tuple(map(_tuples, value)) if isinstance(value, (list, tuple)) else value


def tensors_of(module: nn.Module) -> dict[str, Tensor]:
    """All parameters and buffers, under all of their names."""
    parameters = dict(module.named_parameters(remove_duplicate=False))
    return {**parameters, **dict(module.named_buffers(remove_duplicate=False))}


def _tied(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    first: dict[int, str] = {}
    return {n: first[id(t)] for n, t in tensors.items() if first.setdefault(id(t), n) != n}


def _is_held(name: str, layers: Mapping[str, Layer]) -> bool:
    """Whether a tensor stands in a holder, not in a layer of PyTorch."""
    holder = name.rpartition(".")[0]
    return not holder or (holder in layers and not layers[holder].kind)


def _kind(root: nn.Module, name: str, tensor: Tensor) -> Literal["parameter", "buffer", "table"]:
    if isinstance(tensor, nn.Parameter):
        return "parameter"
    holder, _, own = name.rpartition(".")
    lost = root.get_submodule(holder)._non_persistent_buffers_set
    return "table" if own in lost else "buffer"


def _is_frozen(tensor: Tensor) -> bool:
    return isinstance(tensor, nn.Parameter) and not tensor.requires_grad


def _values(pruned: fx.GraphModule) -> dict[str, Any]:
    """What the graph reads off modules that is no tensor, but for their training flags."""
    paths = [str(node.target) for node in pruned.graph.nodes if node.op == "get_attr"]
    found: dict[str, Any] = {}
    for path in dict.fromkeys(paths):
        holder, _, own = path.rpartition(".")
        value = getattr(pruned.get_submodule(holder), own)
        if not isinstance(value, (Tensor, nn.Module)) and own != "training":
            found[path] = encoded(value)
    return found


def _nodes(node: fx.Node, pruned: fx.GraphModule) -> Iterator[Node]:
    """A node as it is, or a call of a layer as calls of what it is written as, one by one."""
    made = _node(node)
    layer = pruned.get_submodule(made.target) if node.op == "call_module" else None
    written = _written(layer) if layer is not None else None
    then = [part for part in written.then if hasattr(layer, part)] if written else []
    parts = [made.target, *(f"{made.target}.{part}" for part in then)]
    for i, target in enumerate(parts[:-1]):
        name = f"{made.name}_part_{i}"
        yield made.model_copy(update={"name": name, "target": target})
        made = made.model_copy(update={"args": {"tuple": [{"node": name}]}, "kwargs": {"dict": []}})
    yield made.model_copy(update={"target": parts[-1]})


def _node(node: fx.Node) -> Node:
    target = str(node.target)
    names = [
        *node.kwargs,
        *([_STARRED.sub("", target, count=1)] if node.op == "placeholder" else []),
    ]
    if not all(map(_is_free, names)):
        raise Undescribed(f"%{node.name} has a name that source code cannot hold")
    if node.op == "call_function":
        target = opnames.name_of(node.target) or _refused(node, "calls")
    if node.op == "call_method" and not opnames.is_method(target):
        _refused(node, "calls")
    try:
        args, kwargs = encoded(tuple(node.args)), encoded(dict(node.kwargs))
    except Undescribed as why:
        raise Undescribed(f"%{node.name} {why}") from None
    source = node.meta.get("source")
    return Node(op=node.op, name=node.name, target=target, args=args, kwargs=kwargs,
                source=list(source) if is_plain(source) and source else None)  # fmt: skip


def _refused(node: fx.Node, what: str) -> Any:
    name = getattr(node.target, "__name__", node.target)
    raise Undescribed(f"%{node.name} {what} {name}, which is not known to be PyTorch's")


# -- from data -------------------------------------------------------------------------------------


def build(network: Network, tensors: Mapping[str, Tensor]) -> PrunedModule:
    """The network, with these values of its tensors. `Unsound` where the data are not what
    `describe_network` gives."""
    root = _holder(network.training)
    for path, layer in network.layers.items():
        _place(root, path, _made(path, layer, len(tensors)))
    for path, home in network.same.items():
        _place(root, path, root.get_submodule(home))
    for name, kind in network.owns.items():
        _hold(root, name, kind)
    _fill(root, network, tensors)
    for path, value in network.values.items():
        holder, own = _split(root, path)
        if hasattr(type(holder), own):
            raise Unsound(f"`{path}` is no value of a module")
        setattr(holder, own, decoded(value, {}))
    try:
        return assembled(root, _graph(network, root), _identifier(network.name))
    except (IndexError, KeyError, TypeError, ValueError, AssertionError, SyntaxError) as error:
        what = f"{type(error).__name__}: {first_line(error)}"
        raise Unsound(f"the graph cannot be written as code: {what}") from None


def _holder(training: bool) -> nn.Module:
    made = nn.Module()
    made.training = training
    return made


def _made(path: str, layer: Layer, tensors: int) -> nn.Module:
    if not layer.kind:
        return _holder(layer.training)
    args = {_identifier(name): decoded(value, {}) for name, value in layer.args.items()}
    counts = [v for k, v in args.items() if k.startswith("num_") and "layers" in k]
    if any(not isinstance(n, int) or n > min(tensors, _MANY) for n in counts):
        raise Unsound(f"`{path}` has more layers than there are tensors")
    try:
        with torch.device("meta"):
            made = opnames.layer_of(layer.kind)(**args)
    except LookupError:
        raise Unsound(f"`{path}` is a {layer.kind}, which is no layer of PyTorch's") from None
    except Exception as error:  # whatever a constructor makes of wrong arguments
        raise Unsound(f"`{path}`: {layer.kind} refuses its settings: {error}") from None
    return made.train(layer.training)


def _place(root: nn.Module, path: str, module: nn.Module) -> None:
    holder, name = _split(root, path)
    if hasattr(holder, name):
        raise Unsound(f"`{path}` cannot be a layer's name")
    holder.add_module(name, module)


def _hold(root: nn.Module, path: str, kind: str) -> None:
    holder, name = _split(root, path)
    if hasattr(holder, name):
        raise Unsound(f"`{path}` cannot be a tensor's name")
    empty = torch.empty(0, device="meta")
    if kind == "parameter":
        holder.register_parameter(name, nn.Parameter(empty, requires_grad=False))
    else:
        holder.register_buffer(name, empty, persistent=kind == "buffer")


def _split(root: nn.Module, path: str) -> tuple[nn.Module, str]:
    """The module that holds a path's last part; all parts are names that code can be made of."""
    *above, own = path.split(".")
    if not all(_PART.fullmatch(part) for part in (*above, own)) or own.startswith("__"):
        raise Unsound(f"`{path}` is no name")
    try:
        return root.get_submodule(".".join(above)), own
    except AttributeError:
        raise Unsound(f"`{path}` has no module around it") from None


def _fill(root: nn.Module, network: Network, tensors: Mapping[str, Tensor]) -> None:
    own = tensors_of(root)
    missing = sorted(own.keys() ^ tensors.keys())
    if missing:
        raise Unsound(f"the weights and the layers differ: {', '.join(missing[:6])}")
    for name, tensor in own.items():
        held = network.owns.get(name) is not None
        if not held and tensor.shape != tensors[name].shape:
            shapes = list(tensors[name].shape), list(tensor.shape)
            raise Unsound(f"{name} is {shapes[0]}, by its layer {shapes[1]}")
        _set(root, name, tensors[name], name not in network.frozen)
    for name, home in network.tied.items():
        holder, word = _split(root, name)
        source, known = _split(root, home)
        fits = word in holder._parameters and known in source._parameters
        if not fits or tensors[name].shape != tensors[home].shape:
            raise Unsound(f"{name} and {home} cannot be tied")
        setattr(holder, word, source._parameters[known])


def _set(root: nn.Module, path: str, value: Tensor, learns: bool) -> None:
    holder, _, name = path.rpartition(".")
    module = root.get_submodule(holder)
    if name in module._parameters:
        if learns and not (value.is_floating_point() or value.is_complex()):
            raise Unsound(f"{path} holds {value.dtype}, which cannot be trained")
        setattr(module, name, nn.Parameter(value, requires_grad=learns))  # LSTMs keep a list
    else:
        module._buffers[name] = value


def _graph(network: Network, root: nn.Module) -> fx.Graph:
    graph, made = fx.Graph(), dict[str, fx.Node]()
    if [n for n, node in enumerate(network.nodes, 1) if node.op == "output"] != [
        len(network.nodes)
    ]:
        raise Unsound("the graph does not end in its output")
    for node in network.nodes:
        name = _identifier(node.name)
        args, kwargs = decoded(node.args, made), decoded(node.kwargs, made)
        if name in made or not isinstance(args, tuple) or not isinstance(kwargs, dict):
            raise Unsound(f"%{name} is written twice, or wrongly")
        kwargs = {_identifier(key): value for key, value in kwargs.items()}
        target = _target(node, root, args, network.values)
        made[name] = graph.create_node(node.op, target, args, kwargs, name)
        made[name].meta["source"] = tuple(node.source) if isinstance(node.source, list) else None
    return graph


def _target(node: Node, root: nn.Module, args: tuple, values: Container[str]) -> Any:
    if node.op in ("get_attr", "call_module"):
        return _path(node, root, values)
    if node.op == "call_method":
        if not opnames.is_method(node.target) or not args:
            raise Unsound(f"%{node.name} calls the method {node.target}")
        return node.target
    if node.op == "call_function":
        return _function(node, args)
    return _starred(node.target)


def _path(node: Node, root: nn.Module, values: Container[str]) -> str:
    holder, own = _split(root, node.target)
    found = getattr(holder, own, None)
    if node.op == "call_module":
        fits = isinstance(found, nn.Module)
    else:
        fits = isinstance(found, Tensor) or own == "training" or node.target in values
    if not fits:
        raise Unsound(f"%{node.name} reads `{node.target}`, which is not there")
    return node.target


def _function(node: Node, args: tuple) -> Any:
    try:
        found = opnames.function_of(node.target)
    except LookupError:
        raise Unsound(f"%{node.name} calls {node.target}, which is not allowed") from None
    if found is getattr and (len(args) != 2 or args[1] not in opnames.ATTRIBUTES):
        raise Unsound(f"%{node.name} asks for {args[1:]}, which is not allowed")
    return found


def _starred(name: str) -> str:
    _identifier(_STARRED.sub("", name, count=1))
    return name


def _identifier(name: str) -> str:
    if not _is_free(name):
        raise Unsound(f"`{name[:60]}` is no name")
    return name
