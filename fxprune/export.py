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
import logging
import math
import operator
import re
import sys
import types
import warnings
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import get_proxy_mode, make_fx
from torch.utils import _pytree as pytree

from . import shapes, sizes
from .errors import FxpruneError, TraceError
from .meta import OnMeta
from .opaque import Call, Calls, arguments, computed, is_open, mapped_arguments, merged, op
from .rules import Rules
from .sizes import Traced, TracedInt, TracedSize
from .trace import (
    GRADIENTS,
    OWN_BACKWARD,
    Source,
    Tracer,
    body_of,
    custom_function,
    describe,
    is_users,
    nearest_source,
    property_of,
    traced_by,
)
from .trees import leaves, mapped

_BATCH = "torch.export fixed the size of the inputs' first dim: the pruned network takes no other"


def export(
    model: nn.Module, args: tuple = (), kwargs: dict[str, Any] | None = None, *, rules: Rules
) -> fx.GraphModule:
    """The model's eval-mode forward on these inputs as a graph, of the form that `trace` gives.

    Raises `TraceError` where `torch.export` refuses, `InputError` where the inputs do not fit.
    """
    graph = traced_by(_Exporter, model, args, kwargs or {}, rules)
    if _is_for_one_batch(graph, rules):
        graph.meta["fxprune_notes"].append((_BATCH, None))
    return graph


def _is_for_one_batch(graph: fx.GraphModule, rules: Rules) -> bool:
    """Whether the graph does not run on inputs twice as long in the first dim."""
    given = [node.meta["val"] for node in graph.graph.nodes if node.op == "placeholder"]
    (output,) = (node.meta["val"] for node in graph.graph.nodes if node.op == "output")
    firsts = {t.shape[0] for t in leaves(given, torch.Tensor) if t.ndim}
    if len(firsts) != 1:
        return False
    wanted = [
        _doubled(t, firsts).shape for t in _open_leaves(output) if isinstance(t, torch.Tensor)
    ]
    try:
        with OnMeta(partial(shapes.of_call, rules)), torch.no_grad():
            found = _OnShapes(graph, rules).run(*mapped(lambda v: _doubled(v, firsts), given))
    except Exception:  # of whatever kind, it does not run
        return True
    return wanted != [t.shape for t in _open_leaves(found) if isinstance(t, torch.Tensor)]


def _doubled(value: Any, firsts: Container[int]) -> Any:
    if not isinstance(value, torch.Tensor) or not value.ndim or value.shape[0] not in firsts:
        return value
    with torch._C.DisableTorchFunction():
        return value.new_empty((2 * value.shape[0], *value.shape[1:]), device="meta")


class _OnShapes(fx.Interpreter):
    """Runs a graph for its shapes."""

    def __init__(self, graph: fx.GraphModule, rules: Rules):
        super().__init__(graph)
        self.rules = rules

    def call_module(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        module = self.submodules[target]
        with torch._C.DisableTorchFunction():
            found = shapes.of_module(self.rules, module, args, kwargs)
        return module(*args, **kwargs) if found is None else found


class _Root(nn.Module):
    """What is exported: tensors in, tensors out, whatever the model takes and gives."""

    def __init__(self, model: nn.Module, run: Callable[[tuple], tuple]):
        super().__init__()
        self.model = model
        self.__dict__["run"] = run

    def forward(self, *tensors: torch.Tensor) -> tuple:
        return self.run(tensors)


class _Exporter(Tracer):
    """A tracer that is given exported ops in place of the model's own calls."""

    def __init__(self, model: nn.Module, rules: Rules, *, flags: bool = True):
        super().__init__(model, rules, flags=flags)
        self.running = False  # whether the model runs, inside `torch.export`
        self.recorded = fx.Graph()  # the export's own
        self.sized = True  # whether sizes that Python code asks for are traced
        self.calls = Calls()
        self.failure: FxpruneError | None = None
        self.output: Any = None  # as the model gave it inside the export
        self.here: Source | None = None  # where the op being called again stands
        self.dtypes: set[torch.dtype] = set()  # those that forward asked tensors for

    def trace(self, args: tuple, kwargs: dict[str, Any]) -> None:
        bound = self.bind(args, kwargs)
        given = (bound.args, bound.kwargs)
        inputs = leaves(given, torch.Tensor)
        program = self.exported(given, inputs)
        with torch.no_grad():
            output = _Replay(self, program).output(inputs)
        self.finish(output)

    def source(self) -> Source | None:
        return nearest_source() if self.running else self.here

    # -- exporting -------------------------------------------------------------------------------

    def exported(self, given: Any, inputs: Sequence[torch.Tensor]) -> Any:
        """The exported program, of the first way that works: what follows knows less of sizes."""
        known = len(self.notes)
        for self.sized, batch in ((True, True), (False, True), (False, False)):
            del self.notes[known:]
            self.calls, self.failure = Calls(), None
            try:
                return self.exported_with(given, inputs, batch)
            except Exception as error:
                last = self.failure or self.refused(error)
        raise last from None

    def exported_with(self, given: Any, inputs: Sequence[torch.Tensor], batch: bool) -> Any:
        """With the batch's size left open, or none."""
        device = _device_of(self.original)
        tensors = tuple(
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in inputs
        )
        first = tuple({0: torch.export.Dim.AUTO} if t.ndim else {} for t in tensors)
        dims: Any = {"tensors": first} if batch else None
        root = _Root(self.model, lambda fakes: self.run_model(given, fakes))
        with torch.no_grad(), _silent(), self.leaves_hooked():
            return torch.export.export(root, tensors, dynamic_shapes=dims, strict=False)

    def run_model(self, given: Any, fakes: Sequence[torch.Tensor]) -> tuple:
        """Called inside the export."""
        left = iter(fakes)
        args, kwargs = mapped(lambda v: next(left) if isinstance(v, torch.Tensor) else v, given)
        try:
            with self.listening():
                self.output = self.model(*args, **kwargs)
        except Exception as error:
            if isinstance(error, FxpruneError) or not _is_exports(error):
                self.failure = error if isinstance(error, FxpruneError) else self.failed(error)
            raise
        return tuple(_open_leaves(self.output))

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        sizes.noted, self.running = self.note_number, True
        self.recorded = get_proxy_mode().tracer.graph  # type: ignore[union-attr]
        try:
            with self:
                yield
        finally:
            sizes.noted, self.running = None, False
            torch.backends.mha.set_fastpath_enabled(fast)

    @contextlib.contextmanager
    def leaves_hooked(self) -> Iterator[None]:
        """Leaf modules pass through the export whole."""
        hooked = [module for module in self.model.modules() if self.is_leaf(module)]
        for module in hooked:
            module.__dict__["forward"] = self.whole(module)
        try:
            yield
        finally:
            for module in hooked:
                del module.__dict__["forward"]

    def whole(self, module: nn.Module) -> Callable:
        def forward(*args: Any, **kwargs: Any) -> Any:
            call = Call(module, args, kwargs, self.source())
            if self.calls.inside or _in_transform() or not call.operands():
                return type(module).forward(module, *args, **kwargs)
            return self.calls.make(call)

        return forward

    def __torch_function__(self, func, _types, args=(), kwargs=None):
        if not self.running:
            return super().__torch_function__(func, _types, args, kwargs)
        call = Call(func, args, kwargs or {})
        if _in_transform() or (getattr(func, "__module__", "") or "").startswith(_TRANSFORMS):
            return self.placed(call)
        if args and isinstance(args[0], torch.Tensor):
            found = self.told(call, args[0])
            if found is not NotImplemented:
                return found
        self.note_losses(call)
        traced = any(isinstance(leaf, Traced) for leaf in arguments((args, call.kwargs)))
        rule = self.rule_of(func, args, call.kwargs)
        if traced and rule is None and isinstance(func, types.FunctionType) and body_of(func):
            with self:
                return body_of(func)(*args, **call.kwargs)
        if (traced or (rule is not None and rule.rule.ignores)) and call.operands():
            call.source = self.source()
            return self.calls.make(call)
        return self.placed(call)

    def placed(self, call: Call) -> Any:
        """Make a call; what the export records of it is told where it stands."""
        nodes = self.recorded.nodes
        last = next(iter(reversed(nodes)), None)
        args, kwargs = mapped_arguments(computed, (call.args, call.kwargs))
        found = call.function(*args, **kwargs)
        for node in reversed(nodes):
            if node is last:
                break
            node.stack_trace = _as_text(self.source())
        return found

    def told(self, call: Call, tensor: torch.Tensor) -> Any:
        """Sizes as traced numbers; a dtype is remembered."""
        prop = property_of(call.function)
        if prop == "dtype":
            self.dtypes.add(tensor.dtype)
        if not self.sized or prop not in ("shape", "size", "numel", "nelement"):
            return NotImplemented
        with torch._C.DisableTorchFunction():
            shape = [_hint(n) for n in tensor.shape]
        if None in shape:
            return NotImplemented
        if prop in ("numel", "nelement"):
            return TracedInt(math.prod(shape), ("numel", tensor))
        size = TracedSize(TracedInt(n, ("size", tensor, i)) for i, n in enumerate(shape))
        dim = call.kwargs.get("dim", call.args[1] if len(call.args) > 1 else None)
        return size if dim is None or prop == "shape" else size[dim]

    def note_losses(self, call: Call) -> None:
        """What of the gradients the export does not hold."""
        off = call.function is torch._C._set_grad_enabled and call.args[0] is False
        if off and sys._getframe(2).f_code.co_name != "__exit__":
            self.note(GRADIENTS)
        owner = custom_function(sys._getframe(2))
        if owner:
            self.note(OWN_BACKWARD.format(owner))

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


def _hint(size: Any) -> int | None:
    """The size that an open one has in the example; None where that is not known."""
    return size if isinstance(size, int) else getattr(size.node, "hint", None)


@contextlib.contextmanager
def _silent() -> Iterator[None]:
    """Without what the export logs: what matters of it is raised."""
    known = logging.root.manager.loggerDict
    heard = [each for name, each in known.items() if name.startswith("torch.")]
    loggers = [each for each in heard if isinstance(each, logging.Logger) and not each.disabled]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.disabled = False


def _open_leaves(output: Any) -> list[Any]:
    found: list[Any] = []
    _rebuilt(lambda leaf: found.append(leaf) or leaf, output)
    return [leaf for leaf in found if is_open(leaf)]


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


_TRANSFORMS = ("torch._functorch", "torch._C._functorch")


def _in_transform() -> bool:
    """Whether code runs under `torch.func`, where tensors are others than those recorded."""
    return torch._C._functorch.maybe_current_level() is not None


def _as_text(source: Source | None) -> str:
    return 'File "{}", line {}, in {}'.format(*source) if source else ""


def _is_transform(node: fx.Node) -> bool:
    return getattr(node.target, "__module__", "") == "torch._functorch.predispatch"


def _region(first: fx.Node, more: Iterator[fx.Node]) -> list[fx.Node]:
    """The nodes from where a transform of `torch.func` begins to where it ends."""
    found, depth = [first], _step(first)
    while depth or not _step(found[-1]):
        found.append(next(more))
        depth += _step(found[-1])
    return found


def _step(node: fx.Node) -> int:
    """How many transforms a node enters."""
    name = getattr(node.target, "__name__", "")
    return name.endswith("increment_nesting") - name.endswith("decrement_nesting")


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
            return next(found) if is_open(leaf) else leaf

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
                found.append(own[name] if name in own else self.constant(spec.target))
        return found

    def constant(self, name: str) -> Any:
        """A tensor that forward made, or took from elsewhere; not one of data, taken for one."""
        found = self.program.constants[name]
        wrapped = torch._C._functorch.is_functorch_wrapped_tensor(found)
        if not wrapped and not isinstance(found, FakeTensor):
            return found
        raise TraceError(
            f"torch.export took what {type(self.tracer.original).__name__} computes for constant",
            hint="gradients inside forward have no graph; prune the part of the model before them",
        )

    def run(self, module: fx.GraphModule, inputs: Sequence[Any]) -> Any:
        left, env = iter(inputs), {}

        def known(args: Any) -> Any:
            return fx.node.map_aggregate(args, lambda a: env[a] if isinstance(a, fx.Node) else a)

        nodes = iter(module.graph.nodes)
        for node in nodes:
            if node.op == "output":
                return known(node.args[0])
            if node.op == "placeholder":
                env[node] = next(left)
            elif node.op == "get_attr":
                env[node] = operator.attrgetter(node.target)(module)
            elif _is_transform(node):
                self.transformed(_region(node, nodes), env)
            else:
                env[node] = self.called(node, known(node.args), known(node.kwargs))
        raise AssertionError("a graph ends in its output")

    def transformed(self, region: Sequence[fx.Node], env: dict[fx.Node, Any]) -> None:
        """Nodes under a transform of `torch.func`: traced once more, so that it dissolves."""
        inside = set(region)
        inputs = {arg for node in region for arg in node.all_input_nodes} - inside
        read = [arg for arg in env if arg in inputs]
        given = [node for node in region if set(node.users) - inside]

        def run(*values: Any) -> list[Any]:
            own = dict(zip(read, values, strict=True))
            for node in region:
                args, kwargs = fx.node.map_aggregate(
                    (node.args, node.kwargs),
                    lambda a: own.get(a, a) if isinstance(a, fx.Node) else a,
                )
                own[node] = node.target(*args, **kwargs)
            return [own[node] for node in given]

        self.tracer.here = next(filter(None, map(_source_of, region)), None)
        values = [sizes.plain(env[node]) for node in read]
        metas = [
            torch.empty_like(v, device="meta") if isinstance(v, torch.Tensor) else v for v in values
        ]
        with _silent():
            dissolved = make_fx(run, tracing_mode="symbolic")(*metas)
        env.update(zip(given, self.run(dissolved, [env[node] for node in read]), strict=True))

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
            return (
                [*map(self.plain, value)]
                if isinstance(value, list)
                else tuple(map(self.plain, value))
            )
        if isinstance(value, dict):
            return {key: self.plain(each) for key, each in value.items()}
        return (
            torch.device("meta")
            if value == self.device and isinstance(value, torch.device)
            else value
        )

    def call(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if target is op():
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
        operands = merged(call.operands(), tensors, numbers)
        args, kwargs = call.with_operands(operands, lambda number: number)
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
