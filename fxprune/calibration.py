"""What data says about channels: statistics of the values that layers read, and of the gradients
of gates laid on them.

A channel is *read* where a layer contracts it with its weight. A gate is a factor of one on what is
read: the loss's gradient by it says what taking the channel away would do, to first order, and its
mean square, over items of the data, to second order (the Fisher information). All statistics are
sums over items, so that the ranks of a process group add theirs up and choose the same channels.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from .analysis import Analysis
from .batches import Batch, arguments, batches
from .check import clone, device_of
from .distilling import Loss, lost, task_loss
from .errors import InputError, ModelError, OptionError, first_line
from .groups import Group
from .ids import Layer, Value
from .linear import Linear, linear
from .progress import Progress

_ROWS = 65536  # of a batch, at most, that go into a Gram matrix
_WIDEST = 4096  # places that get one


@dataclass(eq=False)
class Read:
    """One layer of ids of a value that a node contracts with a weight.

    ``node`` and ``operand`` are of the graph that was run, ``origin`` is the node of the analysis.
    ``classes``: the channel number of each place along the ids. ``sums`` over the data, one number
    a place but for the Gram matrix:

    ``elements``   how many elements a place had (one number)
    ``total``, ``square``, ``magnitude``, ``positive``   of the elements; the last counts them
    ``rank``       of each item's map, and ``maps`` how many there were (one number)
    ``gram``       (places + 1, places + 1) products of values at a position, the last one 1
    ``steep``      squared gradients of the node's output, one number an index of the dim that the
                   weight makes, summed over all others
    """

    node: fx.Node
    operand: fx.Node
    layer: Layer
    classes: np.ndarray
    how: Linear | None = None
    origin: fx.Node | None = None
    sums: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, value: Tensor) -> None:
        value = value.detach().double().cpu()
        self.sums[name] = self.sums[name] + value if name in self.sums else value

    @property
    def dim(self) -> int | None:
        """The dim along which the ids vary, where it is one."""
        varying = self.layer.varying
        return varying[0] if len(varying) == 1 else None

    def places(self, group: Group) -> np.ndarray | None:
        """(channels, places) where a group's channels stand; None where they do not, or not equally
        often."""
        order = np.argsort(self.classes, kind="stable")
        first, last = (
            np.searchsorted(self.classes, group.channels, side, sorter=order)
            for side in ("left", "right")
        )
        count = int((last - first).max())
        if not count or (last - first != count).any():
            return None
        return order[first[:, None] + np.arange(count)]


@dataclass
class Calibration:
    """What data said. ``gates``: "total", "magnitude" and "square" of the gradients by a channel's
    gate, a number a channel number, summed over ``items``. ``gradients``: of each parameter, the
    mean over items."""

    reads: list[Read]
    gates: dict[str, Tensor] = field(default_factory=dict)
    gradients: dict[str, Tensor] = field(default_factory=dict)
    items: int = 0

    def of(self, group: Group) -> list[tuple[Read, np.ndarray]]:
        """The reads of a group's channels, with the (channels, places) of its channels there."""
        pairs = ((read, read.places(group)) for read in self.reads)
        return [(read, at) for read, at in pairs if at is not None]

    def gate(self, name: str, group: Group) -> Tensor:
        """A mean over items for each channel of a group."""
        return self.gates[name][torch.from_numpy(group.channels)] / max(self.items, 1)

    def slope(self, read: Read, param: str, weight: Tensor) -> Tensor:
        """Mean squared gradient of what a weight makes, to broadcast over the weight: a mean over
        items of the sum over positions."""
        found = read.sums["steep"] / max(self.items, 1)
        binding = read.how.use.binding if read.how else None
        if binding is None or read.how is None:
            return found.mean()
        names = binding.output[read.how.out_dim]
        dims = binding.inputs[read.how.weight] or ()
        if names not in dims:
            return found.mean()
        return found.reshape([-1 if each == names else 1 for each in dims])


def calibrate(
    analysis: Analysis,
    data: Any,
    needs: Iterable[str],
    loss: Loss | None = None,
    progress: Progress | None = None,
) -> Calibration:
    """Run the network on `data` (see `batches.batches`) in eval mode, and sum up what is needed:
    "gates" (which needs a loss), "values", "ranks", "grams". The model is not changed.

    In a process group every rank runs its own data, and the sums of all are returned.
    """
    needs = frozenset(needs)
    if loss is not None and not callable(loss):
        raise OptionError(f"loss is a {type(loss).__name__}", hint="a function of (output, target)")
    if analysis.recorded:
        raise OptionError(
            "criteria of data need a graph of the whole network, and this one was recorded",
            hint="take a criterion of weights: fxprune.criteria.names()",
        )
    graph = clone(analysis.graph).eval().requires_grad_("gradients" in needs)
    found = Calibration(list(_reads(analysis, graph)))
    every = batches(data, device_of(analysis.model))
    for number, batch in enumerate(every):
        if progress:
            progress("calibrate", number / len(every))
        _Watched(graph, found, needs, analysis.all_groups.channel, loss).measure(batch)
    _add_up(found)
    _check_finite(found)
    found.gradients = {name: sums / found.items for name, sums in found.gradients.items()}
    return found


# -- where channels are read -----------------------------------------------------------------------


def _reads(analysis: Analysis, graph: fx.GraphModule) -> Iterator[Read]:
    """Each layer of ids that a weight contracts; of groups that nothing contracts with a weight,
    those that leave the layers that make them."""
    nodes = dict(zip(analysis.graph.graph.nodes, graph.graph.nodes, strict=True))
    flow, channel = analysis.flow, analysis.all_groups.channel
    seen: set[tuple[fx.Node, fx.Node, int]] = set()
    for group in analysis.all_groups.prunable:
        wanted = _contracted(analysis, group) or _made(group)
        for node, operand in wanted:
            value = flow.values.get(operand)
            for number, layer in enumerate(value.layers if isinstance(value, Value) else ()):
                classes = channel[layer.ids.reshape(-1).numpy()]
                if (node, operand, number) in seen or not np.isin(classes, group.channels).any():
                    continue
                seen.add((node, operand, number))
                use = flow.uses.get(node)
                how = linear(use) if use is not None else None
                yield Read(nodes[node], nodes[operand], layer, classes, how, node)


def _contracted(analysis: Analysis, group: Group) -> list[tuple[fx.Node, fx.Node]]:
    readers = dict.fromkeys(m.node for m in group.members if m.role == "in" and m.node)
    return [(node, operand) for node in readers for operand in node.all_input_nodes]


def _made(group: Group) -> list[tuple[fx.Node, fx.Node]]:
    makers = dict.fromkeys(m.node for m in group.members if m.role == "out" and m.node)
    return [(node, node) for node in makers]


# -- one batch -------------------------------------------------------------------------------------


class _Watched(fx.Interpreter):
    """Runs the graph with gates on what is read, and adds up."""

    def __init__(self, graph, found: Calibration, needs: frozenset[str], channel, loss):
        super().__init__(graph)
        self.found, self.needs, self.loss = found, needs, loss or default_loss
        self.channels = int(channel.max()) + 1
        self.by_node: dict[fx.Node, list[Read]] = {}
        for read in found.reads:
            self.by_node.setdefault(read.node, []).append(read)
        self.gates: list[tuple[Read, Tensor]] = []
        self.size = 0

    def measure(self, batch: Batch) -> None:
        self.size = len(batch)
        wants_gradients = not self.needs.isdisjoint(("gates", "gradients"))
        given = arguments(self.module, batch)
        try:
            with torch.set_grad_enabled(wants_gradients):
                output = self.run(*given.values())
        except (OptionError, ModelError, InputError):
            raise
        except Exception as error:
            shapes = ", ".join("x".join(map(str, t.shape)) for t in batch.tensors)
            raise InputError(
                f"the network does not run on a batch of data: {first_line(error)}",
                details=[("batch", shapes)],
                hint="a batch is inputs as in example_inputs, or a pair (inputs, target)",
            ) from error
        if wants_gradients:
            self._backward(output, batch.target)
        self.found.items += self.size

    def run_node(self, node: fx.Node) -> Any:
        own = self.by_node.get(node, ())
        made = [read for read in own if read.operand is node]
        taken = [read for read in own if read.operand is not node]
        found = self._reading(node, taken) if taken else super().run_node(node)
        return self._gated(found, made)

    def _reading(self, node: fx.Node, reads: list[Read]) -> Any:
        """What a node gives, with gates on what it is given."""
        before = {operand: self.env[operand] for operand in (read.operand for read in reads)}
        for operand, value in before.items():
            self.env[operand] = self._gated(value, [r for r in reads if r.operand is operand])
        found = super().run_node(node)
        self.env.update({k: v for k, v in before.items() if k in self.env})
        if "grams" in self.needs and "gates" in self.needs and isinstance(found, Tensor):
            self._watch_slope(reads, found)
        return found

    def _gated(self, value: Any, reads: list[Read]) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value
        for read in reads:
            if value.ndim == read.layer.ids.ndim:
                with torch.no_grad():
                    _sum_values(read, value, self.needs, self.size)
                if "gates" in self.needs:
                    gate = torch.ones(_gate_shape(read, value), dtype=value.dtype)
                    gate = gate.to(value.device).requires_grad_()
                    self.gates.append((read, gate))
                    value = value * gate
        return value

    def _watch_slope(self, reads: list[Read], output: Tensor) -> None:
        """Square the gradient of what a node gives, an index of its channels at a time."""

        def seen(gradient: Tensor) -> None:
            squares = (gradient * self.size).square()  # of an item's loss, not of the mean
            for read in reads:
                if read.how is not None:
                    rest = [d for d in range(gradient.ndim) if d != read.how.out_dim]
                    read.add("steep", squares.sum(rest))

        if output.requires_grad and output.shape[0] == self.size:
            output.register_hook(seen)

    def _backward(self, output: Any, target: Any) -> None:
        loss = lost(self.loss, output, target)
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            kind = list(loss.shape) if isinstance(loss, Tensor) else type(loss).__name__
            raise OptionError(
                f"loss gives {kind}", hint="a tensor of one number, a mean over items"
            )
        if not loss.requires_grad:
            raise ModelError("the loss does not depend on any channel that could go")
        params = {n: p for n, p in self.module.named_parameters() if p.requires_grad}
        wanted = [*(gate for _, gate in self.gates), *params.values()]
        every = torch.autograd.grad(loss, wanted, allow_unused=True)
        found, own = every[: len(self.gates)], every[len(self.gates) :]
        for name, gradient in zip(params, own, strict=True):
            if gradient is not None:
                known = self.found.gradients.get(name, 0)
                self.found.gradients[name] = known + gradient.double().cpu() * self.size
        if self.gates:
            self._add_gates(found)

    def _add_gates(self, found: Sequence[Tensor | None]) -> None:
        slopes = torch.zeros(self.size, self.channels, dtype=torch.float64)
        for (read, _), gradient in zip(self.gates, found, strict=True):
            if gradient is not None:
                _add_slopes(slopes, read, gradient, self.size)
        for name, sums in (("total", slopes), ("magnitude", slopes.abs()), ("square", slopes**2)):
            self.found.gates[name] = self.found.gates.get(name, 0) + sums.sum(0)


def _gate_shape(read: Read, value: Tensor) -> list[int]:
    """One gate an item for each place; one for all where the first dim is not of items."""
    shape = list(read.layer.ids.shape)
    if shape[0] == 1:
        shape[0] = value.shape[0]
    return shape


def _add_slopes(slopes: Tensor, read: Read, gradient: Tensor, size: int) -> None:
    """Add the gradients by the gates of a read to those of channels. The loss is a mean over
    items: times their number it is an item's own."""
    by_item = gradient.shape[0] % size == 0 and read.layer.ids.shape[0] == 1
    places = len(read.classes)
    if by_item:
        each = gradient.reshape(size, -1, places).sum(1) * size
    else:  # of the whole batch
        each = gradient.reshape(-1, places).sum(0, keepdim=True).expand(size, places)
    slopes.index_add_(1, torch.from_numpy(read.classes), each.double().cpu())


def _sum_values(read: Read, value: Tensor, needs: frozenset[str], size: int) -> None:
    ids = read.layer.ids
    fixed = [d for d in range(value.ndim) if ids.shape[d] == 1]
    value = value if value.dtype in (torch.float32, torch.float64) else value.float()

    def over(each: Tensor) -> Tensor:
        return (each.double().sum(fixed) if fixed else each.double()).reshape(-1)

    if "values" in needs or "grams" in needs:
        read.add("elements", torch.tensor(value.numel() / len(read.classes)))
        read.add("total", over(value))
        read.add("square", over(value.square()))
        read.add("magnitude", over(value.abs()))
        read.add("positive", over(value > 0))
    if "ranks" in needs and read.dim is not None and value.ndim > read.dim + 1:
        maps = value.movedim(read.dim, 1).flatten(3) if value.ndim > 3 else value[:, :, None]
        maps = maps.reshape(value.shape[0], len(read.classes), value.shape[read.dim + 1], -1)
        read.add("rank", torch.linalg.matrix_rank(maps.float()).double().sum(0))
        read.add("maps", torch.tensor(float(value.shape[0])))
    if "grams" in needs and read.dim is not None and len(read.classes) <= _WIDEST:
        rows = value.movedim(read.dim, -1).reshape(-1, len(read.classes))
        rows = rows[:: -(-len(rows) // _ROWS)].float()
        rows = torch.cat([rows, torch.ones_like(rows[:, :1])], 1)
        read.add("gram", rows.T @ rows)


def _check_finite(found: Calibration) -> None:
    """Raise `InputError` where values or gradients are not finite: scores of them say nothing."""
    for read in found.reads:
        if not all(bool(torch.isfinite(sums).all()) for sums in read.sums.values()):
            raise InputError(
                f"the values that %{read.node.name} reads are not finite on the data",
                hint="look for values of the inputs or weights that are too large, or no numbers",
            )
    if not all(bool(torch.isfinite(sums).all()) for sums in found.gates.values()):
        raise InputError(
            "the gradients of the loss are not finite on the data",
            hint="look at the loss, and for targets and inputs that are too large",
        )


# -- process groups --------------------------------------------------------------------------------


def _add_up(found: Calibration) -> None:
    """Sum over the ranks of a process group, where there is one."""
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    found.items = int(_reduced(torch.tensor(float(found.items))))
    found.gates = {name: _reduced(sums) for name, sums in found.gates.items()}
    found.gradients = {name: _reduced(sums) for name, sums in sorted(found.gradients.items())}
    for read in found.reads:
        read.sums = {name: _reduced(sums) for name, sums in sorted(read.sums.items())}


def _reduced(value: Tensor) -> Tensor:
    on_gpu = torch.distributed.get_backend() == "nccl"
    value = value.cuda() if on_gpu else value.clone()
    torch.distributed.all_reduce(value)
    return value.cpu()


# -- the loss --------------------------------------------------------------------------------------


def default_loss(output: Any, target: Any) -> Tensor:
    """Cross-entropy for classes, the mean squared difference for targets like the output."""
    output = _first_tensor(output)
    if target is None:
        raise OptionError(
            "data has no targets, and the criterion needs a loss",
            hint="data of pairs (inputs, target), one batch is data=[(X, Y)]; or loss=a function "
            "of (output, None)",
        )
    return task_loss(output, target)


def _first_tensor(output: Any) -> Tensor:
    found = [leaf for leaf in pytree.tree_leaves(output) if isinstance(leaf, Tensor)]
    if not found:
        raise InputError("the network gives no tensor")
    return found[0]
