"""Step `trace`: run the model on meta tensors and write down every op it calls.

The model's own code runs, on real `torch.Tensor`s that hold a shape and no data, so every Python
construct works; a `TorchFunctionMode` sees each call and adds a node to an `fx.Graph`. Sizes are
`TracedInt`s, which the graph computes again. Only data is meta: constants keep their values.
Modules with a rule stay modules, so BatchNorm and Dropout follow ``train()`` and ``eval()``.
"""

from __future__ import annotations

import collections
import contextlib
import copy as copying
import dataclasses
import inspect
import linecache
import operator
import os
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import fx, nn
from torch.overrides import TorchFunctionMode

from . import shapes, sizes
from .errors import FxpruneError, InputError, ModelError, RuleError, TraceError
from .meta import evaluate, in_place, lightened, to_meta
from .rules import Rules
from .sizes import Traced, TracedFlag, TracedInt, TracedSize, plain
from .trees import has_tensors, leaves, mapped
from .written import names_dtype

_OWN = str(Path(__file__).parent) + os.sep
_TORCH = str(Path(torch.__file__).parent) + os.sep
_NUMPY = str(Path(np.__file__).parent) + os.sep
_DUNDERS = {
    "__getitem__": operator.getitem,
    "__setitem__": operator.setitem,
    "add": operator.add,
    "sub": operator.sub,
    "mul": operator.mul,
    "div": operator.truediv,
    "matmul": operator.matmul,
    "neg": operator.neg,
}
_EVALUATED = {"__get__", "size", "dim", "numel", "__len__", "nelement", "ndimension", "stride"}
SIZE = "a size became a plain number, so the pruned network may take inputs of this size only"
TRAINING = "forward branches on `training`; what it does in training alone is not in the graph"
ON_VALUES = "forward depends on the values in a tensor"
OF_ONE_PATH = (
    'a graph has one path for all inputs; frontend="record", tried last by default, prunes a copy '
    "of the model for the path that the example takes"
)
GRADIENTS = "forward switches gradients off, which the graph does not hold: use requires_grad"
OWN_BACKWARD = "the backward of `{}` is not in the graph: gradients are those of its forward"


def trace(
    model: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None, *, rules: Rules
) -> fx.GraphModule:
    """The model's eval-mode forward on these inputs as a graph.

    `args` and `kwargs` are tensors (of any device; only shapes and dtypes are used), numbers, or
    nested containers of them. Every node has ``meta["val"]`` (a meta tensor, a real constant, or a
    number) and ``meta["source"]`` (file, line and function). The model is not changed. Raises
    `TraceError` where the forward depends on values, `InputError` where the inputs do not fit.
    """
    return traced_by(Tracer, model, args, kwargs or {}, rules)


def traced_by(
    kind: type[Tracer], model: nn.Module, args: tuple, kwargs: dict[str, Any], rules: Rules
) -> fx.GraphModule:
    """What `trace` promises, by a tracer of this kind."""
    try:
        tracer = kind(model, rules)
        tracer.trace(args, kwargs)
    except (InputError, TraceError) as error:
        if TracedFlag.__name__ not in error.fault:  # C++ code that wants a bool, not an int
            raise
        tracer = kind(model, rules, flags=False)
        tracer.trace(args, kwargs)
    return tracer.module()


class _Unwritten(fx.GraphModule):
    """A graph module whose Python code is written when it is first called or asked for."""

    def recompile(self) -> Any:
        def forward(module: fx.GraphModule, *args: Any, **kwargs: Any) -> Any:
            fx.GraphModule.recompile(module)
            return type(module).forward(module, *args, **kwargs)

        type(self).forward = forward

    @property
    def code(self) -> str:
        fx.GraphModule.recompile(self)
        return self._code


class _Lookup(nn.Module):
    """A root from which `fx.GraphModule` takes submodules and tensors by name, without copies."""

    def __init__(self, model: nn.Module, constants: dict[str, torch.Tensor]):
        super().__init__()
        self.__dict__.update(training=False, _model=model, _constants=constants)

    def __getattr__(self, name: str):
        constants = self.__dict__["_constants"]
        return constants[name] if name in constants else getattr(self.__dict__["_model"], name)


def skeleton(model: nn.Module) -> nn.Module:
    """A copy of the module tree that shares every tensor, so that attributes can be set on it."""
    return _copies(list(model.modules()))[id(model)]


def _copies(modules: Sequence[nn.Module]) -> dict[int, nn.Module]:
    """id of a module -> its copy, for all modules of a tree."""
    copies = {id(m): object.__new__(type(m)) for m in modules}
    known: dict[int, Any] = {}
    for module in modules:
        copy = copies[id(module)]
        copy.__dict__.update(module.__dict__)
        for name, value in module.__dict__.items():
            if type(value) in _CONTAINERS and name not in _TABLES:  # forward may fill it
                copy.__dict__[name] = _unshared(value, known)
        for table in ("_parameters", "_buffers"):
            copy.__dict__[table] = dict(module.__dict__[table])
        for table in _HOOKS:  # forward may add some
            copy.__dict__[table] = module.__dict__[table].copy()
        children = module.__dict__["_modules"].items()
        copy.__dict__["_modules"] = {
            name: None if m is None else copies[id(m)] for name, m in children
        }
    return copies


_TABLES = frozenset(nn.Module().__dict__)
_HOOKS = tuple(sorted(n for n in _TABLES if n.startswith(("_forward_", "_backward_"))))
_CONTAINERS = (list, dict, set, collections.OrderedDict, collections.defaultdict, collections.deque)


def _unshared(value: Any, known: dict[int, Any]) -> Any:
    """A copy of nested containers; `known` keeps one that stands in two places one."""
    if type(value) not in _CONTAINERS:
        return value
    if id(value) not in known:
        known[id(value)] = made = copying.copy(value)
        if isinstance(value, dict):
            made.update((key, _unshared(each, known)) for key, each in value.items())
        elif isinstance(value, list):
            made[:] = [_unshared(each, known) for each in value]
    return known[id(value)]


class Tracer(TorchFunctionMode):
    """Runs a model and writes down what it calls, as nodes of ``graph``."""

    def __init__(self, model: nn.Module, rules: Rules, *, flags: bool = True):
        super().__init__()
        self.flags = flags  # whether the `training` flags are remembered
        self.rules = rules
        self.graph = fx.Graph()
        self.original = model
        self.autocast = _autocast()
        self.defaults = True  # whether inputs that are not tensors have defaults
        self.inside = 0  # how many leaf modules we are in
        self.leaf: tuple = ()  # the leaf module being run, and its arguments, for errors
        self.nodes: dict[int, Any] = {}  # id(tensor) -> node
        self.kept: list[Any] = []  # keeps ids from being used again
        self.exprs: dict[Any, fx.Node] = {}
        self.standins: dict[int, torch.Tensor] = {}
        self.asked: dict[Any, torch.Tensor] = {}  # dtype or device -> what it was asked of
        self.tensor_constants: dict[str, torch.Tensor] = {}
        self.metas: dict[int, Any] = {}
        self.notes: list[tuple[str, Source | None]] = []  # what the graph does not hold, where
        named = dict(model.named_modules(remove_duplicate=False))
        self.model = self._copied(model, named)
        self._name_tensors(named)

    def _copied(self, model: nn.Module, named: Mapping[str, nn.Module]) -> nn.Module:
        """A skeleton of the model that notes where its `training` flags are read."""
        copies = self.copies = _copies([*dict.fromkeys(named.values())])
        self.module_names: dict[int, str] = {}
        for name, module in named.items():
            copy = copies[id(module)]
            if id(copy) not in self.module_names:
                self.module_names[id(copy)] = self.module_names[id(module)] = name
                leaf = self.rules.of_module(type(module)) is not None  # C++ code wants a bool
                where = f"{name}.training".lstrip(".")
                plain_flag = leaf or not self.flags
                flag = False if plain_flag else TracedFlag(0, ("training", where))
                copy.__dict__["training"] = flag
        return copies[id(model)]

    def _name_tensors(self, named: Mapping[str, nn.Module]) -> None:
        self.tensor_names: dict[int, str] = {}
        self.aliases: dict[str, str] = {}
        for table in ("_parameters", "_buffers"):
            for prefix, module in named.items():
                for field, tensor in module.__dict__[table].items():
                    if tensor is not None:
                        self._name_tensor(f"{prefix}.{field}" if prefix else field, tensor)

    def _name_tensor(self, name: str, tensor: torch.Tensor) -> None:
        first = self.tensor_names.setdefault(id(tensor), name)
        if first != name:
            self.aliases[name] = first
        self.kept.append(tensor)

    # -- running ---------------------------------------------------------------------------------

    @contextlib.contextmanager
    def patched(self) -> Iterator[None]:
        call, fast = nn.Module.__call__, torch.backends.mha.get_fastpath_enabled()

        def traced_call(module, *args, **kwargs):
            return self.call_module(call, module, args, kwargs)

        nn.Module.__call__ = traced_call  # type: ignore[method-assign]
        sizes.noted = self.note_number
        torch.backends.mha.set_fastpath_enabled(False)
        try:
            with self:
                yield
        finally:
            nn.Module.__call__ = call  # type: ignore[method-assign]
            sizes.noted = None
            torch.backends.mha.set_fastpath_enabled(fast)

    def trace(self, args: tuple, kwargs: dict[str, Any]) -> None:
        with torch.no_grad(), self.patched():
            output = self.run(args, kwargs)
        self.finish(output)

    def source(self) -> Source | None:
        """Where the call comes from that is being written down."""
        return nearest_source()

    def note(self, text: str) -> None:
        self.notes.append((text, self.source()))

    def note_number(self, number: Any) -> None:
        """A number whose history ends here; torch's own code may ask for flags."""
        if not isinstance(number, TracedFlag):
            self.note(SIZE)
        elif not sys._getframe(2).f_code.co_filename.startswith(_TORCH):
            self.note(TRAINING)

    def run(self, args: tuple, kwargs: dict[str, Any]) -> Any:
        bound = self.bind(args, kwargs)
        try:
            return self.model(*bound.args, **bound.kwargs)
        except RuleError as error:  # a module's parameters do not fit what it is given
            raise self.failed(error) from error
        except FxpruneError:
            raise
        except Exception as error:
            raise self.failed(error) from error

    def bind(self, args: tuple, kwargs: dict[str, Any]) -> inspect.BoundArguments:
        """The arguments of forward with what placeholders give in place of the example inputs."""
        try:
            bound = inspect.signature(self.original.forward).bind(*args, **kwargs)
        except TypeError as error:
            raise InputError(
                f"the example inputs do not fit {type(self.original).__name__}.forward: {error}",
                hint="pass example_inputs=(x,) as forward takes them, or a dict of keywords",
            ) from None
        given = [*bound.arguments.values()]
        last = max((i for i, value in enumerate(given) if has_tensors(value)), default=-1)
        for i, (name, value) in enumerate(bound.arguments.items()):
            self.defaults = i > last  # in Python, what has a default stands at the end
            kind = bound.signature.parameters[name].kind
            if kind is inspect.Parameter.VAR_POSITIONAL:
                bound.arguments[name] = tuple(
                    self.placeholder(f"{name}_{k}", v) for k, v in enumerate(value)
                )
            elif kind is inspect.Parameter.VAR_KEYWORD:
                bound.arguments[name] = {key: self.placeholder(key, v) for key, v in value.items()}
            else:
                bound.arguments[name] = self.placeholder(name, value)
        return bound

    def failed(self, error: Exception) -> FxpruneError:
        frames = inspect.trace()
        user = [
            f for f in frames if not f.filename.startswith((_OWN, _TORCH)) and f.filename[0] != "<"
        ]
        where = user[-1] if user else frames[-1]
        line = (where.code_context or [""])[0].strip()
        details = [("in", self.called())]
        if user or not self.leaf:
            details.append(("at", f"{where.filename}:{where.lineno}, in {where.function}: {line}"))
        last = next(iter(reversed(self.graph.nodes)), None)
        details.append(("after", f"%{last.name} = {last.target}" if last is not None else ""))
        name = type(self.original).__name__
        message = str(error).strip().split("\n")[0].split(". ")[0][:200]
        if "TorchScript" in message:
            return TraceError(
                f"{name}.forward calls a scripted function, which has no Python to trace",
                details=details,
                hint="use the function as it was before torch.jit.script",
            )
        if any(
            word in message.lower()
            for word in ("meta tensor", "meta device", "data-dependent", "nonzero")
        ):
            return TraceError(
                f"{name}.{ON_VALUES}: {message}",
                details=details,
                hint=OF_ONE_PATH,
            )
        return InputError(
            f"{name}.forward fails on the example inputs: {type(error).__name__}: {message}",
            details=details,
            hint="check that the model runs on such inputs; pass others with example_inputs=",
        )

    def called(self) -> str:
        """``Conv2d `stem` on 2x3x8x8``: the leaf module being run."""
        if not self.leaf:
            return ""
        module, *arguments = self.leaf
        operands = ", ".join("x".join(map(str, t.shape)) for t in leaves(arguments, torch.Tensor))
        return f"{type(module).__name__} `{self.module_names[id(module)]}` on {operands}"

    def placeholder(self, name: str, value: Any) -> Any:
        if not has_tensors(value):
            default = value if self.defaults else inspect.Signature.empty
            node = self.graph.placeholder(name, default_value=default)
            node.meta["val"] = value
            self.check_input(node, value)
            return value
        node = self.graph.placeholder(name)
        return self.opened(node, self.example(value))

    def check_input(self, node: fx.Node, value: Any) -> None:
        """Python saw the number itself, so the graph holds for no other."""
        same = operator.is_ if value is None else operator.eq
        found = self.create("call_function", same, (node, value), {})
        text = f"pruned with {node.name}={value!r}: another value needs another trace"
        check = self.create("call_function", torch._assert, (found, text), {})
        found.meta["val"], check.meta["val"] = True, None

    def example(self, value: Any) -> Any:
        """What the model sees of an input."""

        def convert(t: Any) -> Any:
            return to_meta(t, {}).detach() if isinstance(t, torch.Tensor) else t

        with torch._C.DisableTorchFunction():
            return mapped(convert, value)

    def known(self, tensor: torch.Tensor) -> fx.Node | None:
        """The node that gave a tensor."""
        return self.nodes.get(id(tensor))

    def remember(self, tensor: torch.Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = node
        self.kept.append(tensor)

    def seen(self, node: fx.Node, value: Any) -> Any:
        """What the graph holds of a node's value."""
        return value

    def opened(self, node: fx.Node, value: Any) -> Any:
        """Register `value` as what `node` gives, its parts as items of it."""
        node.meta["val"] = self.seen(node, value)
        if isinstance(value, torch.Tensor):
            self.remember(value, node)
        elif isinstance(value, (tuple, list, dict)):
            keys = value.keys() if isinstance(value, dict) else range(len(value))
            for key in keys:
                if has_tensors(value[key]):
                    self.opened(
                        self.create("call_function", operator.getitem, (node, key), {}), value[key]
                    )
        return value

    # -- recording -------------------------------------------------------------------------------

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.inside or _is_decomposition(sys._getframe(1).f_code.co_filename):
            return self.evaluate(func, args, kwargs)
        name = getattr(func, "__name__", "")
        if name in _EVALUATED and isinstance(args[0], torch.Tensor):
            found = self.query(func, name, args, kwargs)
            if found is not NotImplemented:
                return found
        if isinstance(func, types.FunctionType) and self.rule_of(func, args, kwargs) is None:
            body = body_of(func)
            if body is not None:
                with self:
                    return body(*args, **kwargs)
        return self.record(func, name, args, kwargs)

    def rule_of(self, func, args, kwargs):
        return self.rules.of_function(func, (args, kwargs))

    def query(self, func, name: str, args, kwargs):
        """Shapes as traced ints; devices and dtypes remembered with the tensor they are of."""
        tensor = args[0]
        node = self.known(tensor)
        prop = property_of(func)
        if prop in ("shape", "size") and node is not None:
            size = TracedSize(TracedInt(n, ("size", node, i)) for i, n in enumerate(func(tensor)))
            dim = kwargs.get("dim", args[1] if len(args) > 1 else None)
            return size if dim is None or prop == "shape" else size[dim]
        if prop in ("numel", "nelement") and node is not None:
            return TracedInt(tensor.numel(), ("numel", node))
        found = func(*args, **kwargs)
        if prop in ("__len__", "stride") and node is not None:
            self.note(SIZE)
        if prop in ("dtype", "device") and (node is not None or id(tensor) in self.tensor_names):
            self.asked[found] = tensor
        if isinstance(found, torch.Tensor):
            return self.record(getattr, "getattr", (tensor, prop), {}, found)
        return found

    def record(self, func, name: str, args, kwargs, value: Any = NotImplemented):
        if name in ("__getitem__", "__setitem__"):
            args = (args[0], _index(args[1]), *args[2:])
        operands = leaves((args, kwargs), torch.Tensor)
        versions = {id(t): t._version for t in operands}
        shaped = [(t, t.shape, t.stride()) for t in operands[:1]] if in_place(name) else []
        owner = custom_function(sys._getframe(2))
        if owner:
            self.note(OWN_BACKWARD.format(owner))
        if value is NotImplemented:
            value = self.evaluate(func, args, kwargs)
        mutates = func is operator.setitem or name == "__setitem__"
        if not mutates and not has_tensors(value):
            leaves_it = sys._getframe(2).f_code.co_name == "__exit__"
            if func is torch._C._set_grad_enabled and args[0] is False and not leaves_it:
                self.note(GRADIENTS)
            self.reads(func, name, args, kwargs)
            return value
        op, target = self.target(func, name, bool(kwargs))
        node = self.create(op, target, self.nodes_of(args), self.nodes_of(kwargs))
        if mutates or in_place(name):
            self.changes(node, args[0])
        if mutates:
            node.meta["val"] = None
            return value
        for tensor, shape, stride in shaped:
            if tensor.shape != shape:
                self.reshaped(tensor, shape, stride, node)
        return self.opened(node, self.own(value, args, versions))

    def reshaped(self, tensor: torch.Tensor, shape, stride, node: fx.Node) -> None:
        """An op changed a tensor's shape in place: what gave the tensor gave another."""
        old = self.known(tensor)
        if old is not None and old.meta["val"] is tensor:
            with torch._C.DisableTorchFunction():
                made = torch.empty_strided(shape, stride, dtype=tensor.dtype, device="meta")
            old.meta["val"] = made
        self.remember(tensor, node)

    def reads(self, func, name: str, args, kwargs) -> None:
        """A call gave no tensor. Without data, all that it can tell is shapes."""

    def changes(self, node: fx.Node, tensor: torch.Tensor) -> None:
        """A call writes to its first operand."""

    def own(self, value, args, versions):
        """A result that is an operand itself, and was not changed in place, gets an identity."""

        def fresh(t):
            if isinstance(t, torch.Tensor) and id(t) in versions and t._version == versions[id(t)]:
                return t.detach()
            return t

        with torch._C.DisableTorchFunction():
            return mapped(fresh, value)

    def target(self, func, name: str, keywords: bool) -> tuple[str, Any]:
        if isinstance(func, (types.MethodDescriptorType, types.WrapperDescriptorType)) or (
            getattr(torch.Tensor, name, None) is func
        ):
            if name in _DUNDERS and not keywords:  # operators take none
                return "call_function", _DUNDERS[name]
            return "call_method", name
        if getattr(func, "__module__", "") == "torch._tensor":  # Python wrappers of methods
            return "call_method", name
        return "call_function", func

    def create(self, op: str, target: Any, args: tuple, kwargs: dict[str, Any]) -> fx.Node:
        node = self.graph.create_node(op, target, args, kwargs)
        node.meta["source"] = self.source()
        self.check_autocast(node)
        return node

    def check_autocast(self, node: fx.Node) -> None:
        if self.autocast != _autocast():
            raise TraceError(
                "forward switches autocast on or off, which a graph cannot hold",
                details=[("at", describe(node.meta["source"]))],
                hint="use autocast around the call of the model, not in its forward",
            )

    def call_module(self, call: Callable, module: nn.Module, args, kwargs):
        module = self.copies.get(id(module), module)  # helper objects may hold the original's
        if self.inside or not self.is_leaf(module):
            return call(module, *args, **kwargs)
        versions = {id(t): t._version for t in leaves((args, kwargs), torch.Tensor)}
        name = self.module_names[id(module)]
        node_args, node_kwargs = self.nodes_of(args), self.nodes_of(kwargs)
        self.leaf = (module, args, kwargs)
        with torch._C.DisableTorchFunction():
            value = shapes.of_module(self.rules, module, args, kwargs)
        if value is None:
            self.inside += 1
            try:
                value = call(module, *args, **kwargs)
            finally:
                self.inside -= 1
        self.leaf = ()
        node = self.create("call_module", name, node_args, node_kwargs)
        return self.opened(node, self.own(value, args, versions))

    def is_leaf(self, module: nn.Module) -> bool:
        if id(module) not in self.module_names or self.module_names[id(module)] == "":
            return False
        hooked = module._forward_hooks or module._forward_pre_hooks
        return not hooked and self.rules.of_module(type(module)) is not None

    # -- arguments -------------------------------------------------------------------------------

    def nodes_of(self, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return self.node_of(value)
        if isinstance(value, Traced):
            return self.number(value)
        if isinstance(value, np.generic):
            return value.item()
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return type(value)(*(self.nodes_of(v) for v in value))
        if isinstance(value, (tuple, list)):
            return (list if type(value) is list else tuple)(self.nodes_of(v) for v in value)
        if isinstance(value, dict):
            return {key: self.nodes_of(v) for key, v in value.items()}
        if isinstance(value, slice):
            return slice(
                self.nodes_of(value.start), self.nodes_of(value.stop), self.nodes_of(value.step)
            )
        if isinstance(value, torch.device) and value in self.asked:
            return self._attribute(self.asked[value], "device", value)
        if isinstance(value, torch.dtype) and value in self.asked:
            written = names_dtype(_nearest_frame(), value)
            return value if written else self._attribute(self.asked[value], "dtype", value)
        return value

    def _attribute(self, tensor: torch.Tensor, name: str, value: Any) -> fx.Node:
        node = self.node_of(tensor)
        if (node, name) not in self.exprs:
            made = self.create("call_function", getattr, (node, name), {})
            made.meta["val"] = value
            self.exprs[node, name] = made
        return self.exprs[node, name]

    def node_of(self, tensor: torch.Tensor) -> fx.Node:
        known = self.known(tensor)
        if known is not None:
            return known
        name = self.tensor_names.get(id(tensor))
        if name is None:
            unseen = self.unseen(tensor)
            if unseen is not None:
                return unseen
            if tensor.is_meta:
                raise TraceError(
                    "a tensor came from code that the tracer cannot see",
                    details=[("at", describe(self.source()))],
                    hint="scripted functions and C++ calls have no graph; use their Python form",
                )
            if isinstance(tensor, nn.Parameter):
                raise ModelError(
                    f"forward uses a parameter of shape {list(tensor.shape)} that is registered "
                    "nowhere in the model",
                    details=[("at", describe(self.source()))],
                    hint="keep layers in nn.ModuleList or nn.ModuleDict, not in a plain list",
                )
            name = f"_tensor_constant{len(self.tensor_constants)}"
            self.tensor_constants[name] = tensor.detach()
        node = self.create("get_attr", name, (), {})
        node.meta["val"] = tensor
        self.remember(tensor, node)
        return node

    def unseen(self, tensor: torch.Tensor) -> fx.Node | None:
        """The node of a tensor that no call gave and the model does not hold, if it is no
        constant."""
        return None

    def number(self, value) -> Any:
        """The node that computes a traced number."""
        expr = value.expr
        if expr[0] == "training":
            key: Any = expr
        elif expr[0] in ("size", "numel"):
            of = self.known(expr[1]) if isinstance(expr[1], torch.Tensor) else expr[1]
            if of is None or of.graph is not self.graph:  # left over from another trace
                return plain(value)
            key = expr = (expr[0], of, *expr[2:])
        else:
            key = id(value)
        if key not in self.exprs:
            self.exprs[key] = self._number(value, expr)
            self.kept.append(value)
        return self.exprs[key]

    def _number(self, value, expr) -> fx.Node:
        if expr[0] == "training":
            node = self.create("get_attr", expr[1], (), {})
        elif expr[0] == "size":
            node = self.create("call_method", "size", (expr[1], expr[2]), {})
        elif expr[0] == "numel":
            node = self.create("call_method", "numel", (expr[1],), {})
        else:
            node = self.create("call_function", expr[0], self.nodes_of(expr[1:]), {})
        node.meta["val"] = plain(value)
        return node

    # -- evaluating ------------------------------------------------------------------------------

    def evaluate(self, func, args, kwargs):
        found = shapes.of_call(self.rules, func, args, kwargs)
        if found is not None:
            return found
        return lightened(evaluate(func, args, kwargs, self.standin), (args, kwargs))

    def standin(self, tensor: torch.Tensor, meta: bool, changed: bool) -> torch.Tensor:
        """What is computed with in place of a tensor of the model, which must not be touched."""
        if tensor.is_meta or not (meta or changed or id(tensor) in self.standins):
            return tensor
        found = self.standins.get(id(tensor), tensor)
        of_model = any(id(t) in self.tensor_names for t in (tensor, tensor._base))
        if changed and found is tensor and of_model:
            found = self.standins[id(tensor)] = tensor.detach().clone()
            self.kept.append(tensor)
        return to_meta(found, self.metas) if meta else found

    # -- the end ---------------------------------------------------------------------------------

    def finish(self, output: Any) -> None:
        if not self.flags:
            self.notes.append((TRAINING, None))
        with torch._C.DisableTorchFunction():
            self.graph.output(self.output_of(output))
        for node in self.graph.nodes:
            if node.op == "output":
                node.meta["val"] = self.seen(node, output)
                node.meta["source"] = None
        self.tidy()

    def module(self) -> fx.GraphModule:
        lookup = _Lookup(self.original, self.tensor_constants)
        made = _Unwritten(lookup, self.graph, type(self.original).__name__)
        made.meta["fxprune_aliases"] = self.aliases
        made.meta["fxprune_notes"] = list(dict.fromkeys(self.notes))
        return made

    def tidy(self) -> None:
        """What nothing reads need not be computed."""
        sweep(self.graph)

    def output_of(self, value: Any) -> Any:
        """The output's structure in nodes; classes of its own are called in the graph."""
        if isinstance(value, (TracedSize, torch.Size)):
            return self._made(torch.Size, ([self.output_of(v) for v in value],), {}, value)
        if isinstance(value, (torch.Tensor, *Traced)) or type(value) in (tuple, list, dict):
            if type(value) in (tuple, list):
                return type(value)(self.output_of(v) for v in value)
            if type(value) is dict:
                return {key: self.output_of(v) for key, v in value.items()}
            return self.nodes_of(value)
        if isinstance(value, tuple) and hasattr(value, "_fields"):
            return self._made(type(value), tuple(self.output_of(v) for v in value), {}, value)
        if dataclasses.is_dataclass(value) and not isinstance(value, type):
            fields = {
                f.name: self.output_of(getattr(value, f.name)) for f in dataclasses.fields(value)
            }
            return self._made(
                type(value), (), {k: v for k, v in fields.items() if v is not None}, value
            )
        if isinstance(value, collections.abc.Mapping):
            pairs = [(key, self.output_of(v)) for key, v in value.items()]
            kind = dict if isinstance(value, collections.defaultdict) else type(value)
            return self._made(kind, (pairs,), {}, value)
        if isinstance(value, (tuple, list)):
            return [self.output_of(v) for v in value]
        if inspect.isgenerator(value) or _holds_tensors(value, set()):
            raise TraceError(
                f"forward returns a {type(value).__name__}, which cannot be looked into",
                hint="return tensors in tuples, lists, dicts, named tuples or dataclasses; a cache "
                "of keys and values is not part of a graph: switch it off (use_cache=False)",
            )
        return value

    def _made(self, cls, args, kwargs, value) -> fx.Node:
        node = self.create("call_function", cls, args, kwargs)
        node.meta["val"] = value
        return node


def _index(given: Any) -> Any:
    """A list that holds slices is a tuple to torch."""
    parts = given if isinstance(given, list) else ()
    plain = any(part is None or part is Ellipsis or isinstance(part, slice) for part in parts)
    return tuple(parts) if plain else given


def _autocast() -> tuple[bool, ...]:
    return tuple(map(torch.is_autocast_enabled, ("cpu", "cuda")))


def custom_function(frame: types.FrameType) -> str:
    """The `torch.autograd.Function` whose forward runs in a frame, if one does."""
    code = frame.f_code
    first = frame.f_locals.get(code.co_varnames[0]) if code.co_argcount else None
    if not isinstance(first, torch.autograd.function.FunctionCtx):
        return ""
    return type(first).__name__.removesuffix("Backward")


def _holds_tensors(value: Any, seen: set[int]) -> bool:
    """Whether a tensor is in an object, or in what its attributes hold."""
    if isinstance(value, torch.Tensor) or id(value) in seen:
        return isinstance(value, torch.Tensor)
    seen.add(id(value))
    if isinstance(value, collections.abc.Mapping):
        return any(_holds_tensors(each, seen) for each in value.values())
    if isinstance(value, (tuple, list, set)):
        return any(_holds_tensors(each, seen) for each in value)
    return _is_object(value) and _holds_tensors(vars(value), seen)


def _is_object(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, (type, types.FunctionType))


_DECOMPOSITIONS = tuple(
    f"{_TORCH}{name}" for name in ("_refs", "_prims", "_decomp", "_meta_registrations", "_inductor")
)


def _is_decomposition(file: str) -> bool:
    """Whether a call comes from Python code that torch runs for an op on the meta device."""
    return file.startswith(_DECOMPOSITIONS)


def body_of(func: types.FunctionType) -> Callable | None:
    """A functional's body without its dispatch to modes, so that the calls inside are seen."""
    if func.__module__ != "torch.nn.functional":
        return None
    never = dict.fromkeys(
        ("has_torch_function", "has_torch_function_unary", "has_torch_function_variadic"), _never
    )
    copy = types.FunctionType(
        func.__code__,
        {**func.__globals__, **never},
        func.__name__,
        func.__defaults__,
        func.__closure__,
    )
    copy.__kwdefaults__ = func.__kwdefaults__
    return copy


def _never(*_args) -> bool:
    return False


def sweep(graph: fx.Graph) -> None:
    """Remove nodes that nothing reads, except those that change something in place."""
    for node in reversed(list(graph.nodes)):
        kept = node.op in ("placeholder", "output") or node.target is torch._assert
        if not node.users and not kept and not mutates(node):
            graph.erase_node(node)


def mutates(node: fx.Node) -> bool:
    """Whether a node changes one of its operands in place."""
    name = node.target if isinstance(node.target, str) else getattr(node.target, "__name__", "")
    if node.op == "call_module" or node.op == "get_attr":
        return False
    return (
        in_place(name)
        or node.target is operator.setitem
        or node.kwargs.get("inplace") is True
        or "out" in node.kwargs
    )


Source = tuple[str, int, str]


def property_of(func: Any) -> str:
    """The name of a method, or of the property that a getter reads."""
    name = getattr(func, "__name__", "")
    return getattr(getattr(func, "__self__", None), "__name__", "") if name == "__get__" else name


def is_users(file: str) -> bool:
    """Whether code is neither torch's nor ours."""
    return not file.startswith((_OWN, _TORCH, _NUMPY)) and file[0] != "<"


_ENTRY = str(Path(__file__).with_name("analysis.py"))


def nearest_source() -> Source | None:
    """File, line and function of the nearest frame that is neither torch's nor ours."""
    frame = _nearest_frame()
    return frame and (frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name)


def _nearest_frame() -> types.FrameType | None:
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and not is_users(frame.f_code.co_filename):
        # who asked for the analysis is no part of the model
        frame = None if frame.f_code.co_filename == _ENTRY else frame.f_back
    return frame


def describe(source: Source | None) -> str:
    """``net.py:41, in forward: self.c2(h)``"""
    if source is None:
        return ""
    file, line, function = source
    code = linecache.getline(file, line).strip()
    return f"{Path(file).name}:{line}, in {function}" + (f": {code}" if code else "")
