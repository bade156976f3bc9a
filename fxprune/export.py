"""The second way to a graph: `torch.export` sees every op that runs, whatever Python calls it.

The model runs once in `torch.export`, which records ops as the dispatcher meets them: those of
scripted functions, of C++ code and of `torch.func` too. Modules with a rule, and calls that are
passed a `training` flag, go through it as one opaque op each. Then the exported ops are called
again under the tracer of `trace`, which writes down its usual graph: the same leaf modules, the
same names, sizes computed from shapes. All other ops are spelled ``torch.ops.aten``.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import operator
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from . import opaque, sizes
from .errors import FxpruneError, TraceError
from .rules import Rules
from .sizes import Traced, TracedFlag, TracedInt
from .trace import GRADIENTS, Source, Tracer, body_of, describe, is_users, traced_by
from .trees import leaves, mapped

_FIXED = "exported for sizes {} of `{}`: the pruned network takes no others where a number stands"


def export(
    model: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None, *, rules: Rules
) -> fx.GraphModule:
    """The model's eval-mode forward on these inputs as a graph, of the form that `trace` gives.

    Raises `TraceError` where `torch.export` refuses, `InputError` where the inputs do not fit.
    """
    return traced_by(_Exporter, model, args, kwargs or {}, rules)


class _Root(nn.Module):
    """What is exported: tensors in, tensors out, whatever the model takes and gives."""

    def __init__(self, model: nn.Module, run: Callable[[tuple], list]):
        super().__init__()
        self.model = model
        self.__dict__["run"] = run

    def forward(self, *tensors: torch.Tensor) -> tuple:
        return tuple(self.run(tensors))


class _Exporter(Tracer):
    """A tracer that is given exported ops in place of the model's own calls."""

    def __init__(self, model: nn.Module, rules: Rules, *, flags: bool = True):
        super().__init__(model, rules, flags=flags)
        self.running = False  # whether the model runs, inside `torch.export`
        self.calls = opaque.Calls()
        self.failure: FxpruneError | None = None
        self.output: Any = None  # as the model gave it inside the export
        self.here: Source | None = None  # where the op being called again stands
        self.dtypes: set[torch.dtype] = set()  # those that forward asked tensors for

    def trace(self, args: tuple, kwargs: dict[str, Any]) -> None:
        bound = self.bind(args, kwargs)
        given = (bound.args, bound.kwargs)
        program = self.exported(given)
        with torch.no_grad():
            output = _Replay(self, program).output(leaves(given, torch.Tensor))
        self.finish(output)

    # -- exporting -------------------------------------------------------------------------------

    def exported(self, given: Any) -> Any:
        """The exported program; sizes of inputs are left open where they can be."""
        try:
            return self.exported_with(given, dynamic=True)
        except TraceError:
            return self.exported_with(given, dynamic=False)

    def exported_with(self, given: Any, *, dynamic: bool) -> Any:
        device = _device_of(self.original)
        tensors = tuple(
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device)
            for t in leaves(given, torch.Tensor)
        )
        auto = [{d: torch.export.Dim.AUTO for d in range(t.ndim)} for t in tensors]
        self.calls = opaque.Calls()
        root = _Root(self.model, lambda fakes: self.run_model(given, fakes)).eval()
        try:
            with torch.no_grad(), warnings.catch_warnings(), self.leaves_hooked():
                warnings.simplefilter("ignore")
                shapes: Any = {"tensors": tuple(auto)} if dynamic else None
                return torch.export.export(root, tensors, dynamic_shapes=shapes, strict=False)
        except Exception as error:
            raise self.failure or self.refused(error) from None

    def run_model(self, given: Any, fakes: Sequence[torch.Tensor]) -> list[Any]:
        """Called inside the export."""
        args, kwargs = opaque.filled(given, fakes, [])
        self.failure = None
        try:
            with self.listening():
                self.output = self.model(*args, **kwargs)
        except FxpruneError as error:
            self.failure = error
            raise
        except Exception as error:
            if not _is_exports(error):
                self.failure = self.failed(error)
            raise
        found: list[Any] = []
        _rebuilt(lambda leaf: found.append(leaf) or leaf, self.output)
        return [leaf for leaf in found if _is_open(leaf)]

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        sizes.noted, self.running = self.note_number, True
        try:
            with self:
                yield
        finally:
            sizes.noted, self.running = None, False
            torch.backends.mha.set_fastpath_enabled(fast)

    @contextlib.contextmanager
    def leaves_hooked(self) -> Iterator[None]:
        """Leaf modules, called as opaque."""
        hooked = [module for module in self.model.modules() if self.is_leaf(module)]
        for module in hooked:
            module.__dict__["forward"] = self.opaque_forward(module)
        try:
            yield
        finally:
            for module in hooked:
                del module.__dict__["forward"]

    def opaque_forward(self, module: nn.Module) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            if self.calls.inside or not leaves((args, kwargs), torch.Tensor):
                return type(module).forward(module, *args, **kwargs)
            return self.opaque(module, args, kwargs)

        return forward

    def opaque(self, function: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        return self.calls.make(opaque.Call(function, args, kwargs, self.source()))

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        if not self.running:
            return super().__torch_function__(func, _types, args, kwargs)
        kwargs = kwargs or {}
        self.listen(func, args)
        if not self.calls.inside and self.is_opaque(func, args, kwargs):
            body = body_of(func) if isinstance(func, types.FunctionType) else None
            if body is None or self.rule_of(func, args, kwargs) is not None:
                return self.opaque(func, args, kwargs)
            with self:
                return body(*args, **kwargs)
        return func(*args, **kwargs)

    def listen(self, func: Any, args: tuple) -> None:
        """What the export drops: dtypes that are read, gradients switched off."""
        if func is _DTYPE:
            self.dtypes.add(args[0].dtype)
        elif func is torch._C._set_grad_enabled and args[0] is False:
            if sys._getframe(2).f_code.co_name != "__exit__":
                self.note(GRADIENTS)

    def is_opaque(self, func: Any, args: tuple, kwargs: dict[str, Any]) -> bool:
        """Whether a call is passed flags, or a tensor that is only asked for its dtype."""
        if not leaves((args, kwargs), torch.Tensor):
            return False
        if any(isinstance(leaf, Traced) for leaf in pytree.tree_leaves((args, kwargs))):
            return True
        use = self.rule_of(func, args, kwargs)
        return use is not None and bool(use.rule.ignores)

    def refused(self, error: Exception) -> TraceError:
        """What `torch.export` says, in short."""
        name = type(self.original).__name__
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        where = _user_frame(error)
        return TraceError(
            f"torch.export refuses {name}: {type(error).__name__}: {(lines or [''])[0][:300]}",
            details=[("at", describe(where))],
            hint="a graph has one path for all inputs; move what depends on values out of forward, "
            "or prune the part of the model before it",
        )

    # -- calling again ---------------------------------------------------------------------------

    def source(self) -> Source | None:
        return super().source() if self.running else self.here


_DTYPE = torch.Tensor.dtype.__get__  # type: ignore[attr-defined]


def _is_open(leaf: Any) -> bool:
    return isinstance(leaf, torch.Tensor) or opaque.is_symbol(leaf)


def _device_of(model: nn.Module) -> torch.device:
    tensors = (*model.parameters(), *model.buffers())
    return tensors[0].device if tensors else torch.device("cpu")


def _is_exports(error: Exception) -> bool:
    """Whether an error is raised by the export, and not by what it exports."""
    return type(error).__module__.startswith(("torch._dynamo", "torch.fx", "torch._subclasses"))


def _user_frame(error: Exception) -> Source | None:
    frames = [f for f in inspect.getinnerframes(error.__traceback__) if is_users(f.filename)]
    return (frames[-1].filename, frames[-1].lineno, frames[-1].function) if frames else None


def _rebuilt(fn: Callable[[Any], Any], value: Any) -> Any:
    """The same structure with `fn` of each leaf; also of dataclasses that pytree does not know."""

    def leaf(found: Any) -> Any:
        if not dataclasses.is_dataclass(found) or isinstance(found, type):
            return fn(found)
        fields = [f.name for f in dataclasses.fields(found) if f.init]
        made = {name: _rebuilt(fn, getattr(found, name)) for name in fields}
        return dataclasses.replace(found, **made)

    return pytree.tree_map(leaf, value)


_FRAME = re.compile(r'File "(.+?)", line (\d+), in (\S+)')


def _source_of(node: fx.Node) -> Source | None:
    """The user's line in a node's stack trace."""
    frames = _FRAME.findall(node.meta.get("stack_trace") or "")
    found = [(file, int(line), name) for file, line, name in frames if is_users(file)]
    return found[-1] if found else None


class _Replay:
    """Calls the ops of an exported program again, so that the tracer writes them down."""

    def __init__(self, tracer: _Exporter, program: Any):
        self.tracer, self.program = tracer, program
        self.device = _device_of(tracer.original)

    def output(self, inputs: Sequence[torch.Tensor]) -> Any:
        """What the model gave, in terms of the tracer's tensors."""
        self.answer(inputs)
        found = iter(self.run(self.program.graph_module, self.placeholders(inputs)))

        def value(leaf: Any) -> Any:
            return next(found) if _is_open(leaf) else leaf

        return _rebuilt(value, self.tracer.output)

    def answer(self, inputs: Sequence[torch.Tensor]) -> None:
        """Devices, and dtypes that were asked for, are those of inputs or parameters."""
        floats = [t for t in inputs if t.is_floating_point()]
        nodes, asked = self.tracer.nodes, self.tracer.asked
        for tensor in (*floats[:1], *inputs[:1]):
            asked.setdefault(torch.device("meta"), nodes[id(tensor)])
        for dtype in self.tracer.dtypes:
            for tensor in (*inputs, *self.tracer.original.parameters()):
                if tensor.dtype == dtype and dtype not in asked:
                    asked[dtype] = self.tracer.node_of(tensor)

    def placeholders(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        model, given = self.tracer.original, iter(inputs)
        own = dict(model.named_parameters(remove_duplicate=False))
        own |= dict(model.named_buffers(remove_duplicate=False))
        found = []
        for spec in self.program.graph_signature.input_specs:
            name = (spec.target or "").removeprefix("model.")
            if spec.target is None:
                found.append(next(given))
            else:
                found.append(own[name] if name in own else self.program.constants[spec.target])
        return found

    def run(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        left, env = iter(inputs), {}

        def known(args: Any) -> Any:
            return fx.node.map_aggregate(args, lambda a: env[a] if isinstance(a, fx.Node) else a)

        for node in module.graph.nodes:
            if node.op == "output":
                return known(node.args[0])
            if node.op == "placeholder":
                env[node] = next(left)
            elif node.op == "get_attr":
                env[node] = operator.attrgetter(node.target)(module)
            else:
                env[node] = self.called(node, known(node.args), known(node.kwargs))
        raise AssertionError("a graph ends in its output")

    def called(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.tracer.here = _source_of(node)
        try:
            return self.call(node.target, self.plain(args), self.plain(kwargs))
        except FxpruneError:
            raise
        except Exception as error:
            name = type(self.tracer.original).__name__
            message = str(error).strip().split("\n")[0][:200]
            raise TraceError(
                f"{name} is exported with {node.target}, which has no one shape: {message}",
                details=[("at", describe(self.tracer.here))],
            ) from error

    def plain(self, value: Any) -> Any:
        """Arguments as the tracer takes them."""
        if isinstance(value, (list, tuple)):
            return [*map(self.plain, value)] if isinstance(value, list) else tuple(map(self.plain, value))
        if isinstance(value, dict):
            return {key: self.plain(each) for key, each in value.items()}
        return torch.device("meta") if value == self.device and isinstance(value, torch.device) else value

    def call(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if target is opaque.op():
            return self.opaque(*args)
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self.region(target.name(), args)
        if not isinstance(target, torch._ops.OpOverload):
            return self.number(target, args)
        if not target._schema.returns:  # it checks something of sizes or of dtypes
            return None
        packet = target.overloadpacket
        if packet in _SIZES:
            return self.size(packet, *args)
        return self.tracer.record(packet, packet.__name__, args, kwargs)

    def opaque(self, index: int, tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
        call = self.tracer.calls.calls[index]
        self.tracer.here = call.source
        args, kwargs = call.filled(tensors, numbers)
        if isinstance(call.function, nn.Module):
            with self.tracer.patched():
                found = call.function(*args, **kwargs)
        else:
            name = getattr(call.function, "__name__", "")
            found = self.tracer.record(call.function, name, args, kwargs)
        return leaves(found, torch.Tensor)

    def number(self, function: Callable, args: tuple) -> Any:
        """An item, or a number computed from sizes."""
        numbers = [arg for arg in args if isinstance(arg, Traced)]
        found = function(*(sizes.plain(arg) for arg in args))
        return sizes.traced(found, (function, *args)) if numbers else found

    def size(self, packet: Any, tensor: torch.Tensor, *dim: int) -> Any:
        found = packet(tensor, *dim)
        if id(tensor) not in self.tracer.nodes or packet not in _SIZES:
            return found
        return TracedInt(found, (_SIZES[packet], tensor, *dim))

    def region(self, name: str, args: tuple) -> Any:
        """Part of forward under a context."""
        if name == "wrap_with_set_grad_enabled":
            return self.run(args[1], args[2:])
        if name == "wrap_with_autocast" and not args[2]:
            return self.run(args[4], args[5:])
        what = "switches autocast on" if "autocast" in name else f"uses {name}"
        raise TraceError(
            f"forward {what}, which a graph cannot hold",
            details=[("at", describe(self.tracer.here))],
            hint="take it out of forward, or prune the part of the model before it",
        )


_SIZES = {torch.ops.aten.sym_size: "size", torch.ops.aten.sym_numel: "numel"}
