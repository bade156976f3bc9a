"""The second way to a graph: `torch.export` sees every op that runs, whatever Python calls it.

The model runs once in `torch.export`, which records ops as the dispatcher meets them: those of
scripted functions, of C++ code and of `torch.func` too, spelled ``torch.ops.aten``. Modules and
calls with a rule, and calls that are passed a `training` flag or a size, pass through it whole (see
`opaque`). Then all of this is called again under the tracer of `trace`, which writes down its usual
graph: the same leaf modules, the same names, sizes computed from shapes.
"""

from __future__ import annotations

import contextlib
import inspect
import math
import sys
import types
from collections.abc import Callable, Container, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import fx, nn
from torch.fx.experimental.proxy_tensor import get_proxy_mode

from . import shapes, sizes
from .check import device_of
from .errors import FxpruneError, TraceError
from .meta import OnMeta
from .opaque import Call, Calls, arguments, computed, mapped_arguments
from .retrace import Retracer, replayed, silent
from .rules import Rules
from .sizes import Traced, TracedInt, TracedSize
from .trace import (
    GRADIENTS,
    OF_ONE_PATH,
    ON_VALUES,
    OWN_BACKWARD,
    SIZE,
    TRAINING,
    Source,
    body_of,
    custom_function,
    describe,
    is_users,
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
    try:
        with OnMeta(partial(shapes.of_call, rules)), torch.no_grad():
            found = _OnShapes(graph, rules).run(*mapped(lambda v: _doubled(v, firsts), given))
    except Exception:  # of whatever kind, it does not run
        return True
    pairs = zip(_tensors(output), _tensors(found), strict=True)
    return not all(_follows(old, new, firsts) for old, new in pairs)


def _follows(old: torch.Tensor, new: torch.Tensor, firsts: Container[int]) -> bool:
    """Whether an output's shape is that of twice as many items, or of none of them."""
    alone = old.shape == new.shape and (not old.ndim or old.shape[0] not in firsts)
    return alone or tuple(new.shape) == (2 * old.shape[0], *old.shape[1:])


def _tensors(value: Any) -> list[torch.Tensor]:
    return [leaf for leaf in arguments(value) if isinstance(leaf, torch.Tensor)]


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
        self.__dict__["_run"] = (run,)

    def forward(self, *tensors: torch.Tensor) -> tuple:
        return self.__dict__["_run"][0](tensors)


class _Exporter(Retracer):
    """Exports the model and calls the exported ops again."""

    def __init__(self, model: nn.Module, rules: Rules, *, flags: bool = True):
        super().__init__(model, rules, flags=flags)
        self.running = False  # whether the model runs, inside `torch.export`
        self.recorded = fx.Graph()  # the export's own
        self.sized = True  # whether sizes that Python code asks for are traced
        self.failure: FxpruneError | None = None

    def trace(self, args: tuple, kwargs: dict[str, Any]) -> None:
        bound = self.bind(args, kwargs)
        given = (bound.args, bound.kwargs)
        inputs = leaves(given, torch.Tensor)
        program = self.exported(given, inputs)
        with torch.no_grad():
            output = replayed(self, program, inputs)
        self.finish(output)

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
            if ON_VALUES in last.fault:
                break  # whatever is known of sizes
        raise last from None

    def exported_with(self, given: Any, inputs: Sequence[torch.Tensor], batch: bool) -> Any:
        """With the batch's size left open, or none."""
        device = device_of(self.original)
        tensors = tuple(
            torch.empty_strided(t.shape, t.stride(), dtype=t.dtype, device=device) for t in inputs
        )
        dims: Any = None
        if batch:
            auto = torch.export.Dim.AUTO
            dims = {"tensors": tuple({0: auto} if t.ndim else {} for t in tensors)}
        root = _Root(self.model, lambda fakes: self.run_model(given, fakes))
        with torch.no_grad(), silent(), self.leaves_hooked():
            return torch.export.export(root, tensors, dynamic_shapes=dims, strict=False)

    def run_model(self, given: Any, fakes: Sequence[torch.Tensor]) -> tuple:
        """Called inside the export."""
        left = iter(fakes)
        args, kwargs = mapped(lambda v: next(left) if isinstance(v, torch.Tensor) else v, given)
        try:
            with self.listening():
                output = self.model(*args, **kwargs)
        except FxpruneError as error:
            self.failure = error
            raise
        except Exception as error:
            self.failure = None if _is_exports(error) else self.failed(error)
            raise
        self.output = Call(None, (output,), {})
        return tuple(computed(each) for each in self.output.operands())

    @contextlib.contextmanager
    def listening(self) -> Iterator[None]:
        fast = torch.backends.mha.get_fastpath_enabled()
        torch.backends.mha.set_fastpath_enabled(False)
        sizes.noted, self.running = self.note_number, True
        mode = get_proxy_mode()
        assert mode is not None
        self.recorded = mode.tracer.graph
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
            inside = self.calls.inside or _in_transform()
            if _in_transform() and "training" in type(module).forward.__code__.co_names:
                self.note(TRAINING)
            if inside or not call.operands():
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
        known = self.rule_of(func, args, call.kwargs) is not None or func is _ASSIGN
        traced = any(isinstance(leaf, Traced) for leaf in arguments((args, call.kwargs)))
        body = None if known or not traced else _body_of(func)
        if body is not None:
            with self:
                return body(*args, **call.kwargs)
        if (known or traced) and call.operands():
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
        """Sizes as traced numbers, tensors of a tensor; a dtype is remembered."""
        prop = property_of(call.function)
        if prop == "dtype":
            self.dtypes.add(tensor.dtype)
        if prop in ("__len__", "stride"):
            self.note(SIZE)
        read = prop != getattr(call.function, "__name__", "")
        if read and self.rules.of_method(prop) is not None:
            return self.calls.make(Call(getattr, (tensor, prop), {}, self.source()))
        if not self.sized or prop not in ("shape", "size", "numel", "nelement"):
            return NotImplemented
        with torch._C.DisableTorchFunction():
            shape = [n for n in map(_hint, tensor.shape) if n is not None]
        if len(shape) < tensor.ndim:
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
        name, kind = type(self.original).__name__, type(error).__name__
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        why = (lines or [""])[0].split(". ")[0][:200]
        fault = f"torch.export refuses {name}: {kind}: {why}"
        if any(word in kind for word in ("DataDependent", "DynamicOutputShape")):
            fault = f"{name}.{ON_VALUES}: {why}"
        return TraceError(
            fault,
            details=[("at", describe(_user_frame(error)))],
            hint=OF_ONE_PATH,
        )


_ASSIGN = torch.Tensor.__setitem__


def _body_of(func: Any) -> Callable | None:
    return body_of(func) if isinstance(func, types.FunctionType) else None


def _hint(size: Any) -> int | None:
    """The size that an open one has in the example; None where that is not known."""
    return size if isinstance(size, int) else getattr(size.node, "hint", None)


def _is_exports(error: Exception) -> bool:
    """Whether an error is raised by the export, and not by what it exports."""
    return type(error).__module__.startswith(("torch._dynamo", "torch.fx", "torch._subclasses"))


def _user_frame(error: Exception) -> Source | None:
    trace = error.__traceback__
    frames = inspect.getinnerframes(trace) if trace is not None else []
    frames = [f for f in frames if is_users(f.filename)]
    return (frames[-1].filename, frames[-1].lineno, frames[-1].function) if frames else None


_TRANSFORMS = ("torch._functorch", "torch._C._functorch")


def _in_transform() -> bool:
    """Whether code runs under `torch.func`, where tensors are others than those recorded."""
    return torch._C._functorch.maybe_current_level() is not None


def _as_text(source: Source | None) -> str:
    return 'File "{}", line {}, in {}'.format(*source) if source else ""
