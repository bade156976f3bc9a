"""Exported ops are called again under a tracer, which writes down its usual graph.

Sizes are asked of the tracer's own tensors, so that they stay computed; parameters are the
model's; opaque calls are made as forward made them. What an export wraps into regions, and the
transforms of `torch.func`, dissolve into the ops inside.
"""

from __future__ import annotations

import contextlib
import io
import logging
import operator
import re
import warnings
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import fx, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx.experimental.proxy_tensor import make_fx

from . import sizes
from .check import device_of
from .errors import FxpruneError, TraceError
from .opaque import Call, Calls, merged, op
from .rules import Rules
from .sizes import Traced, TracedInt
from .trace import Source, Tracer, describe, is_users, nearest_source
from .trees import leaves


class Retracer(Tracer):
    """A tracer that is given exported ops in place of the model's own calls."""

    def __init__(self, model: nn.Module, rules: Rules, *, flags: bool = True):
        super().__init__(model, rules, flags=flags)
        self.here: Source | None = None  # where the op being called again stands
        self.calls = Calls()
        self.dtypes: set[torch.dtype] = set()  # those that forward asked tensors for
        self.output = Call(None, (), {})  # what the model gave inside the export is its argument
        self.replaying = False

    def source(self) -> Source | None:
        return self.here if self.replaying else nearest_source()


def replayed(tracer: Retracer, program: Any, inputs: Sequence[torch.Tensor]) -> Any:
    """What the model gave in an exported program, in terms of the tracer's tensors.

    Raises `TraceError` where an exported op has no place in a graph.
    """
    tracer.replaying = True
    try:
        return _Replay(tracer, program).output(inputs)
    except FxpruneError:
        raise
    except Exception as error:
        message = str(error).strip().split("\n")[0][:200]
        raise TraceError(
            f"what torch.export gives for {type(tracer.original).__name__} cannot be called again: "
            f"{type(error).__name__}: {message}",
            details=[("at", describe(tracer.here))],
            hint="a graph has one path and one shape for all inputs; prune the part of the model "
            "before this line",
        ) from error
    finally:
        tracer.replaying = False


class _Replay:
    """Calls the ops of an exported program again, so that the tracer writes them down."""

    def __init__(self, tracer: Retracer, program: Any):
        self.tracer, self.program = tracer, program
        self.device = device_of(tracer.original)

    def output(self, inputs: Sequence[torch.Tensor]) -> Any:
        """What the model gave, in terms of the tracer's tensors."""
        self.answer(inputs)
        found = self.run(self.program.graph_module, self.placeholders(inputs))
        args, _ = self.tracer.output.with_operands(found, _itself)
        return args[0]

    def answer(self, inputs: Sequence[torch.Tensor]) -> None:
        """Devices, and dtypes that were asked for, are those of inputs or parameters."""
        floats = [t for t in inputs if t.is_floating_point()]
        asked = self.tracer.asked
        for tensor in (*floats[:1], *inputs[:1]):
            asked.setdefault(torch.device("meta"), tensor)
        for dtype in self.tracer.dtypes:
            for tensor in (*inputs, *self.tracer.original.parameters()):
                if tensor.dtype == dtype and dtype not in asked:
                    asked[dtype] = tensor

    def placeholders(self, inputs: Sequence[torch.Tensor]) -> list[Any]:
        model, given = self.tracer.original, iter(inputs)
        own: dict[str, torch.Tensor] = dict(model.named_parameters(remove_duplicate=False))
        own.update(model.named_buffers(remove_duplicate=False))
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
        left = iter(inputs)
        env: dict[fx.Node, Any] = {}
        nodes = iter(module.graph.nodes)
        for node in nodes:
            if node.op == "output":
                return _with_nodes(node.args[0], env)
            if node.op == "placeholder":
                env[node] = next(left)
            elif node.op == "get_attr":
                env[node] = operator.attrgetter(node.target)(module)
            elif _is_transform(node):
                self.transformed(_region(node, nodes), env)
            else:
                args, kwargs = _with_nodes((node.args, node.kwargs), env)
                env[node] = self.called(node, args, kwargs)
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
                args, kwargs = _with_nodes((node.args, node.kwargs), own)
                own[node] = node.target(*args, **kwargs)
            return [own[node] for node in given]

        self.tracer.here = next(filter(None, map(_source_of, region)), None)
        values = [sizes.plain(env[node]) for node in read]
        metas = [
            torch.empty_like(v, device="meta") if isinstance(v, torch.Tensor) else v for v in values
        ]
        with silent():
            dissolved = make_fx(run, tracing_mode="symbolic")(*metas)
        env.update(zip(given, self.run(dissolved, [env[node] for node in read]), strict=True))

    def called(self, node: fx.Node, args: tuple, kwargs: dict[str, Any]) -> Any:
        self.tracer.here = _source_of(node)
        return self.call(node.target, self.plain(args), self.plain(kwargs))

    def plain(self, value: Any) -> Any:
        """Arguments as the tracer takes them."""
        if isinstance(value, list):
            return [self.plain(each) for each in value]
        if isinstance(value, tuple):
            return tuple(self.plain(each) for each in value)
        if isinstance(value, dict):
            return {key: self.plain(each) for key, each in value.items()}
        own = isinstance(value, torch.device) and value == self.device
        return torch.device("meta") if own else value

    def call(self, target: Any, args: tuple, kwargs: dict[str, Any]) -> Any:
        if target is op():
            return self.opaque(*args)
        if isinstance(target, torch._ops.HigherOrderOperator):
            return self.region(target.name(), args)
        if not isinstance(target, torch._ops.OpOverload):
            return self.number(target, args)
        packet = target.overloadpacket
        if not target._schema.returns:  # it checks something of sizes or of dtypes
            return self.check_unchanged(target)
        if packet in _SIZES:
            return self.size(packet, *args)
        return self.tracer.record(packet, packet.__name__, args, kwargs)

    def check_unchanged(self, target: Any) -> None:
        if target._schema.is_mutable:
            raise TraceError(
                f"{target} changes what it is given and returns nothing, which a graph cannot hold",
                details=[("at", describe(self.tracer.here))],
                hint="return what was changed, or prune the part of the model before it",
            )

    def opaque(self, index: int, tensors: Sequence[Any], numbers: Sequence[Any]) -> Any:
        call = self.tracer.calls.calls[index]
        if call.failed:
            return []
        self.tracer.here = call.source
        operands = merged(call.operands(), tensors, numbers)
        args, kwargs = call.with_operands(operands, _itself)
        if isinstance(call.function, nn.Module):
            with self.tracer.patched():
                found = call.function(*args, **kwargs)
        else:
            name = getattr(call.function, "__name__", "")
            found = self.tracer.record(call.function, name, args, kwargs)
        return leaves(found, torch.Tensor)

    def number(self, function: Callable, args: tuple) -> Any:
        """An item, or a number computed from sizes."""
        found = function(*(sizes.plain(arg) for arg in args))
        computed = any(isinstance(arg, Traced) for arg in args)
        return sizes.traced(found, (function, *args)) if computed else found

    def size(self, packet: Any, tensor: torch.Tensor, *dim: int) -> Any:
        found = packet(tensor, *dim)
        known = self.tracer.known(tensor)
        return found if known is None else TracedInt(found, (_SIZES[packet], known, *dim))

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


def _itself(number: Any) -> Any:
    return number


@contextlib.contextmanager
def silent() -> Iterator[None]:
    """Without what the export logs and prints: what matters of it is raised."""
    known = logging.root.manager.loggerDict
    heard = [each for name, each in known.items() if name.startswith("torch.")]
    loggers = [each for each in heard if isinstance(each, logging.Logger) and not each.disabled]
    try:
        for logger in loggers:
            logger.disabled = True
        with warnings.catch_warnings(), contextlib.redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger in loggers:
            logger.disabled = False


def _with_nodes(args: Any, env: dict[fx.Node, Any]) -> Any:
    """Arguments with what nodes gave in place of nodes."""
    return fx.node.map_aggregate(args, lambda a: env[a] if isinstance(a, fx.Node) else a)


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
