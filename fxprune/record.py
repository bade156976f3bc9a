"""Step `trace` where no single graph exists: run the model on real data, and write down each call.

The tracer is that of `trace.py`, but data is real: what Python decides by values, it decides as in
any run. The record is the way that this input takes, so no network can be written from it; its
channels are found as in any graph, and `copies.py` applies a plan to a copy of the model itself.
"""

from __future__ import annotations

import contextlib
import copy
import weakref
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import _get_current_function_mode_stack
from torch.utils._python_dispatch import TorchDispatchMode

from . import sizes
from .check import device_of
from .errors import TraceError
from .inputs import Inputs, random_like
from .meta import evaluate, to_meta
from .rules import Rules
from .sizes import Traced, TracedInt, plain
from .trace import Tracer, describe
from .trees import leaves, mapped

_LARGEST_CONSTANT = 1_000_000  # elements; larger ones are taken for data, and not kept
_UNWRITTEN = ("aten::empty", "aten::empty_strided")  # memory that C++ code fills unseen


def record(model: nn.Module, inputs: Inputs, rules: Rules) -> fx.GraphModule:
    """The calls of one eval-mode run on these inputs, as a graph that is read and never run.

    ``meta["val"]`` of a node is a meta tensor where the value depends on the inputs, and the real
    one where it is constant; data is not kept. Inputs without data are random numbers. The model
    is not changed. Raises `TraceError` where a run cannot be recorded, `InputError` where the model
    does not run on the inputs.
    """
    if any(t.is_meta for t in (*model.parameters(), *model.buffers())):
        raise TraceError(
            f"{type(model).__name__} has weights without data, so it cannot be run and recorded",
            hint="load the weights first",
        )
    real = random_like(inputs, dtype=None, device=device_of(model))
    recorder = Recorder(model, rules)
    with Unseen(recorder):
        recorder.trace(real.args, real.kwargs)
    made = recorder.module()
    made.meta["fxprune_idle"] = recorder.idle()  # name -> sizes of weights
    made.meta["fxprune_registered"] = frozenset(recorder.tensor_names.values())
    return made


def example(model: nn.Module, inputs: Inputs, dtype: torch.dtype | None = None) -> Inputs:
    """The inputs with data, on the model's device; in its dtype unless another is given."""
    own = next((p.dtype for p in model.parameters() if p.is_floating_point()), None)
    return random_like(inputs, dtype=dtype or own, device=device_of(model))


def copied(model: nn.Module, tensors: Callable[[str, Tensor], Tensor]) -> nn.Module:
    """A deep copy of the model, with `tensors(name, old)` in place of each parameter and buffer."""
    memo: dict[int, Any] = {}
    named = dict(model.named_modules(remove_duplicate=False))
    for table in ("_parameters", "_buffers"):
        for prefix, module in named.items():
            for field, old in module.__dict__[table].items():
                if old is not None and id(old) not in memo:
                    memo[id(old)] = tensors(f"{prefix}.{field}".lstrip("."), old)
    try:
        return copy.deepcopy(model, memo)
    except Exception as error:
        raise TraceError(
            f"{type(model).__name__} cannot be copied: {error}",
            hint="copy.deepcopy(model) must work: a recorded network is pruned in a copy of it",
        ) from error


class Recorder(Tracer):
    """A tracer whose data is real."""

    def __init__(self, model: nn.Module, rules: Rules):
        self.ran: set[str] = set()  # leaf modules that were called
        self.values_read = False  # whether Python has seen a value that depends on the inputs
        self.made: dict[int, weakref.ref[Tensor]] = {}  # id -> every tensor made in this run
        super().__init__(model, rules, flags=False)

    def _copied(self, model: nn.Module, named: Mapping[str, nn.Module]) -> nn.Module:
        made = copied(model, lambda name, t: t if isinstance(t, nn.Parameter) else t.clone())
        twins = dict(made.named_modules(remove_duplicate=False))
        self.module_names, self.copies = {}, {}
        for name, module in named.items():
            twin = twins[name]
            twin.__dict__["training"] = False
            self._trace_sizes(name, twin)
            self.copies[id(module)] = twin
            self.module_names.setdefault(id(twin), name)
            self.module_names.setdefault(id(module), name)
        return made

    def _trace_sizes(self, name: str, module: nn.Module) -> None:
        """Widths that a layer holds are remembered where other code reads them."""
        use = self.rules.of_module(type(module))
        for key in use.rule.sizes if use is not None else ():
            value = module.__dict__.get(key)
            if isinstance(value, int) and not isinstance(value, (bool, TracedInt)):
                module.__dict__[key] = TracedInt(value, ("attribute", name, key))

    def _name_tensors(self, named: Mapping[str, nn.Module]) -> None:
        super()._name_tensors(dict(self.model.named_modules(remove_duplicate=False)))

    # -- what is kept: nodes, and no data --------------------------------------------------------

    def known(self, tensor: Tensor) -> fx.Node | None:
        alive, node = self.nodes.get(id(tensor), (None, None))
        return node if alive is not None and alive() is tensor else None

    def remember(self, tensor: Tensor, node: fx.Node) -> None:
        self.nodes[id(tensor)] = (weakref.ref(tensor), node)

    def example(self, value: Any) -> Any:
        return value

    def seen(self, node: fx.Node, value: Any) -> Any:
        data = node.op == "placeholder" or any(map(_is_data, node.all_input_nodes))
        with torch._C.DisableTorchFunction():
            return mapped(lambda t: _kept(t, data), value)

    def unseen(self, tensor: Tensor) -> fx.Node | None:
        made = self.made.get(id(tensor))
        if made is not None and made() is tensor:
            raise TraceError(
                "a tensor came from code that the recorder cannot see",
                details=[("at", describe(self.source()))],
                hint="wrap a C++ call in torch.library.custom_op, or prune the part before it",
            )
        large = tensor.numel() > _LARGEST_CONSTANT and not isinstance(tensor, nn.Parameter)
        if not self.values_read and not large:
            return None
        node = self.create("call_function", _from_values, (), {})
        with torch._C.DisableTorchFunction():
            node.meta["val"] = _kept(tensor, True)
        self.remember(tensor, node)
        return node

    def check_input(self, node: fx.Node, value: Any) -> None:
        """Another value may take another way, as in the original."""

    def check_autocast(self, node: fx.Node) -> None:
        """A copy of the model switches it as the original does."""

    def note(self, text: str) -> None:
        """What a graph cannot hold, a copy of the model does."""

    def note_number(self, number: Any) -> None:
        """The copy computes it again."""

    def tidy(self) -> None:
        """A copy of the model computes what nothing reads, too."""

    # -- running ---------------------------------------------------------------------------------

    def trace(self, args: tuple, kwargs: dict[str, Any]) -> None:
        sizes.compared = self.compares
        try:
            super().trace(args, kwargs)
        finally:
            sizes.compared = None
        self.notes.clear()  # what a graph does not hold, a copy of the model does

    def compares(self, function: Callable[..., bool], left: Any, right: Any) -> None:
        """What Python decides by a size, it decides again in the copy, by another one."""
        if self.inside or not all(isinstance(n, (int, float)) for n in (left, right)):
            return
        key = (function, *map(self.number_of, (left, right)))
        if key not in self.exprs:
            self.exprs[key] = node = self.create("call_function", function, key[1:], {})
            node.meta.update(val=function(plain(left), plain(right)), decides=True)

    def number_of(self, value: Any) -> Any:
        return self.number(value) if isinstance(value, Traced) else value

    def query(self, func, name: str, args, kwargs):
        if id(args[0]) in self.tensor_names:
            self.node_of(args[0])  # its sizes are widths that may go
        return super().query(func, name, args, kwargs)

    def number(self, value: Any) -> Any:
        if value.expr[0] != "attribute":
            return super().number(value)
        if value.expr not in self.exprs:
            _, name, key = value.expr
            self.exprs[value.expr] = node = self.create("get_attr", f"{name}.{key}", (), {})
            node.meta.update(val=plain(value), size_of=(name, key))
        return self.exprs[value.expr]

    def evaluate(self, func, args, kwargs):
        return evaluate(func, args, kwargs, self.standin, real=True, devices=False)

    def call_module(self, call: Callable, module: nn.Module, args, kwargs):
        if not self.inside:
            self.ran.add(self.module_names.get(id(module), ""))
        return super().call_module(call, module, args, kwargs)

    def idle(self) -> dict[str, set[int]]:
        """Modules with weights of their own that never ran, nor were read, and all their sizes."""
        read = {n.target for n in self.graph.nodes if n.op == "get_attr"}
        return {
            name: {n for p in module.parameters(recurse=False) for n in p.shape}
            for name, module in self.original.named_modules()
            if any(p is not None for p in module._parameters.values())
            and name not in self.ran
            and not any(f"{name}.{field}".lstrip(".") in read for field in module._parameters)
        }

    def reads(self, func, name: str, args, kwargs) -> None:
        """Note a call that turns data into Python values: it needs more than shapes."""
        operands = [self.known(t) for t in leaves((args, kwargs), Tensor)]
        if not any(n is not None and _is_data(n) for n in operands):
            return
        if _needs_no_data(func, args, kwargs):
            return
        op, target = self.target(func, name, bool(kwargs))
        node = self.create(op, target, self.nodes_of(args), self.nodes_of(kwargs))
        node.meta.update(val=None, reads=True)
        self.values_read = True

    def create(self, op: str, target: Any, args: tuple, kwargs: dict[str, Any]) -> fx.Node:
        node = super().create(op, target, args, kwargs)
        node.meta["after_read"] = self.values_read
        return node

    def listens(self) -> bool:
        """Whether an op was called by none of the calls being recorded."""
        return not self.inside and self in _get_current_function_mode_stack()

    def changes(self, node: fx.Node, tensor: Tensor) -> None:
        """What data is written to is data."""
        if not any(map(_is_data, node.all_input_nodes)):
            return
        for each in (tensor, tensor._base):
            written = None if each is None else self.known(each)
            if written is not None:
                with torch._C.DisableTorchFunction():
                    written.meta["val"] = mapped(lambda t: _kept(t, True), written.meta["val"])


class Unseen(TorchDispatchMode):
    """Sees what reaches torch from elsewhere than Python, such as scripted functions.

    Calling the op again from here, where the recorder is on, has it recorded.
    """

    def __init__(self, recorder: Recorder):
        super().__init__()
        self.recorder = recorder

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        hidden = func.name().split(".")[0] in _UNWRITTEN and self.recorder.listens()
        with torch._C.DisableTorchFunction() if hidden else contextlib.nullcontext():
            found = func(*args, **(kwargs or {}))
        for tensor in leaves(found, Tensor):
            self.recorder.made[id(tensor)] = weakref.ref(tensor)
        return found


def _from_values() -> Tensor:
    """Stands for a tensor made from values that Python had read."""
    raise NotImplementedError


def _is_data(node: fx.Node) -> bool:
    return any(t.is_meta for t in leaves(node.meta.get("val"), Tensor))


def _kept(value: Any, data: bool) -> Any:
    """What a record holds of a tensor: its values, if they are the same for every input."""
    if not isinstance(value, Tensor):
        return plain(value) if isinstance(value, Traced) else value
    if not data and value.numel() <= _LARGEST_CONSTANT:
        return value
    strided = value.layout == torch.strided
    return to_meta(value, {}) if strided else torch.empty_like(value, device="meta")


def _needs_no_data(func, args, kwargs) -> bool:
    """Whether a call says the same of tensors that have shapes alone."""
    try:
        evaluate(func, args, kwargs, lambda t, *_: to_meta(t, {}), real=True, devices=False)
    except Exception:  # whatever it wanted, it was more than a shape
        return False
    return True
