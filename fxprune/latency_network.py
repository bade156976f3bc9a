"""Which network a table of times is of."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

from torch import Tensor, fx, nn

from .alone import _function
from .analysis import Analysis
from .inputs import batch_of
from .trees import leaves


def network_of(analysis: Analysis) -> str:
    """Equal for networks whose ops take equally long: of the same ops, widths and sizes of inputs,
    whatever their weights, the names of their layers, and the batch."""
    text = "\n".join([*_inputs(analysis), *_ops(analysis), *_parameters(analysis)])
    return hashlib.sha256(text.encode()).hexdigest()[:16]


def _inputs(analysis: Analysis) -> Iterator[str]:
    """A list of tensors, each without a dim for the batch, is as one of them."""
    size = batch_of(analysis.inputs)
    for value in (*analysis.inputs.args, *analysis.inputs.kwargs.values()):
        yield str([*dict.fromkeys(_without_batch(each, size) for each in leaves(value, Tensor))])


def _without_batch(tensor: Tensor, size: int) -> tuple[int, ...]:
    """The shape; a leading dim of 1 counts as a batch, as it does in one of 1."""
    shape = tuple(tensor.shape)
    return shape[1:] if len(shape) > 1 and shape[0] in (1, size) else shape


def _ops(analysis: Analysis) -> Iterator[str]:
    """Arguments are left out: sizes among them hold the batch."""
    for node in analysis.graph.graph.nodes:
        yield f"{node.op} {_called(analysis, node)}"


def _called(analysis: Analysis, node: fx.Node) -> str:
    if node.op == "call_module":
        return "\n".join(map(_settings, analysis.graph.get_submodule(str(node.target)).modules()))
    if node.op == "call_method":
        return str(node.target)
    return _function(node.target) if callable(node.target) else ""


def _settings(module: nn.Module) -> str:
    return f"{type(module).__qualname__} {module.extra_repr()}"


def _parameters(analysis: Analysis) -> Iterator[str]:
    """Shapes, and the ids along them."""
    ids = analysis.flow.ids
    for name, slots in ids.slots.items():
        yield str(tuple(analysis.tensors[name].shape) if name in analysis.tensors else "")
        for slot in slots:
            yield f"{slot.dim} {_bytes(slot.ids)}"
    yield str(ids.count)


def _bytes(ids: Any) -> str:
    return hashlib.sha256(ids.contiguous().numpy().tobytes()).hexdigest()
