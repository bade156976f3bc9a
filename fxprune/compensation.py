"""Making up for channels that went, from data and without training.

The pruned network and the original run side by side, node by node. Where a layer of the pruned one
has run, its weight is fitted so that its output is what the original's is there, by least squares;
what comes in is what the pruned network, fitted so far, really gives it (He et al. 2017, Channel
Pruning for Accelerating Very Deep Neural Networks). So errors do not add up unseen. The constant
part of what is missing goes into the layer's bias, or the mean of the normalisation behind it:
for channels that are constant that part is all there is.

Which layers are linear in a weight, what is added to them and which operands of a normalisation are
its statistics, is read off the rules; nothing here knows an op.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .analysis import Analysis
from .batches import batches
from .check import check_choice, clone, device_of
from .errors import InputError, OptionError, RuleError
from .ids import Value
from .linear import Linear, Problem, linear
from .progress import Progress
from .stepping import Stepper
from .widths import Widths

Compensate = Literal["least_squares", "bias", "statistics"]
WAYS: tuple[Compensate, ...] = ("least_squares", "bias", "statistics")
_RIDGE = 1e-4
_FLAT = 1e-10  # share of an output's square that is its variance, below which it is constant


@dataclass
class Compensation:
    """What was done: layer -> the squared error of its output over the output's variance (over its
    square where it is constant), before and after its fit; the normalisations whose statistics
    were taken anew; layers left as they are, with why."""

    how: str
    items: int
    fitted: dict[str, tuple[float, float]] = field(default_factory=dict)
    statistics: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if self.how == "statistics":
            return f"{len(self.statistics)} normalisations' statistics on {self.items} items"
        skipped = f", {len(self.skipped)} left as they are" if self.skipped else ""
        return (
            f"{len(self.fitted)} layers by {self.how.replace('_', ' ')} on {self.items} items"
            f"{skipped}{self._error()}; the numbers verified are those before the fit"
        )

    def _error(self) -> str:
        if not self.fitted:
            return ""
        before, after = [*self.fitted.values()][-1]
        what = "the last one's squared error over the output's variance"
        return f"; {what} from {before:.3g} to {after:.3g}"


def check_compensate(given: Any) -> Compensate | None:
    """Which compensation is meant; `OptionError` for what is none."""
    if given in (None, False):
        return None
    found: Any = "least_squares" if given is True else given
    check_choice("compensate", found, WAYS)
    return found


@torch.no_grad()
def compensate(
    analysis: Analysis,
    pruned: fx.GraphModule,
    kept: Tensor,
    data: Any,
    how: Compensate = "least_squares",
    progress: Progress | None = None,
    ridge: float = _RIDGE,
) -> Compensation:
    """Fit a pruned network to the one of `analysis`, in place; `kept` is the mask of kept ids."""
    if analysis.recorded:
        raise OptionError(
            "only a network that is one graph can be fitted, and this one was recorded",
            hint="fine-tune it instead",
        )
    found = batches(data, device_of(analysis.model))
    dense = clone(analysis.graph).eval()
    modes = {module: module.training for module in pruned.modules()}
    pruned.eval()
    try:
        fit = _Fit(analysis, dense, pruned, kept, found, how, ridge)
        fit.run(progress)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return fit.done


class _Fit:
    def __init__(self, analysis, dense, pruned, kept, data, how, ridge):
        self.analysis, self.how, self.ridge = analysis, how, ridge
        self.widths = Widths(analysis.flow, kept)
        self.dense, self.small = Stepper(dense, data), Stepper(pruned, data)
        self.old = {node.name: node for node in analysis.graph.graph.nodes}
        pairs = zip(analysis.graph.graph.nodes, dense.graph.nodes, strict=True)
        self.copies = {copy: node.name for node, copy in pairs}
        self.seen: set[str] = set()
        self.tensors = dict([*pruned.named_parameters(), *pruned.named_buffers()])
        self.readers = _readers(analysis)
        self.done = Compensation(how, sum(map(len, data)))

    def run(self, progress: Progress | None) -> None:
        waiting = iter(self.dense.graph.graph.nodes)
        nodes = list(self.small.graph.graph.nodes)
        for number, node in enumerate(nodes):
            if progress:
                progress("compensate", number / len(nodes))
            name = node.meta.get("was", "")
            if name in self.old and name not in self.seen and node.op != "output":
                self._catch_up(waiting, name)
                self._fit(node, self.old[name])
            if node.op != "output":
                self.small.step(node)
            self.small.forget(node)

    def _catch_up(self, waiting: Any, name: str) -> None:
        """Run the original up to a node of that name."""
        self.at: fx.Node
        for node in waiting:
            self.dense.step(node)
            self.at = node
            self.seen.add(self.copies[node])
            if self.copies[node] == name:
                return
            self.dense.forget(node)

    def _fit(self, node: fx.Node, old: fx.Node) -> None:
        use = self.analysis.flow.uses.get(old)
        if use is not None:
            how = linear(use) if self.how != "statistics" else None
            if how is not None and self._is_alone(how.param):
                self._fit_layer(node, old, how)
            elif self.how == "statistics" and use.rule.variance in use.params:
                self._take_statistics(node, use)
        self.dense.forget(self.at)

    def _is_alone(self, param: str) -> bool:
        """Whether one node alone reads a parameter: what suits one may not suit another."""
        return self.readers.get(id(self.analysis.tensors[param])) == 1

    def _fit_layer(self, node: fx.Node, old: fx.Node, how: Linear) -> None:
        name = how.param.rpartition(".")[0] or how.param
        target = self._targets(old, how)
        if target is None:
            self.done.skipped[name] = "what it should give is not known"
            return
        try:
            self._solve(node, old, how, target, name)
        except (RuleError, RuntimeError) as error:
            self.done.skipped[name] = str(error).partition("\n")[0]

    def _targets(self, old: fx.Node, how: Linear) -> list[Tensor] | None:
        """What the original gives, of the channels that the pruned layer gives."""
        value = self.analysis.flow.values[old]
        mask = self.widths.along(value, how.out_dim) if isinstance(value, Value) else None
        if mask is None:
            return None
        at = mask.nonzero().flatten()
        whole = mask.all()
        outputs = [env[self.at] for env in self.dense.values]
        return outputs if whole else [t.index_select(how.out_dim, at.to(t.device)) for t in outputs]

    def _solve(
        self, node: fx.Node, old: fx.Node, how: Linear, targets: list[Tensor], name: str
    ) -> None:
        shift = self._shift(old, how)
        if shift is None and self.how == "bias":
            self.done.skipped[name] = "neither it nor a normalisation behind it has a constant"
            return
        problem, sums = self._summed(node, how, targets, shift is not None)
        _check_finite(name, *sums.tensors)
        change = _Change(problem, self.tensors[how.param], shift, sums.solve(self.ridge))
        _check_finite(name, *change.tensors)
        before, after = sums.left(), sums.left(change.step)
        if after < before:  # rounded to few digits, a small change may do harm
            change.write()
        self.done.fitted[name] = (before, min(before, after))

    def _summed(
        self, node: fx.Node, how: Linear, targets: list[Tensor], shifts: bool
    ) -> tuple[Problem, _Sums]:
        """A layer as a least-squares problem, and its sums over the data."""
        problem, sums = None, _Sums(shifts)
        for env, target in zip(self.small.values, targets, strict=True):
            output = self.small.once(node, env)
            problem = problem or Problem(how, self.small, node, self.tensors[how.param], output)
            columns = problem.columns(env) if self.how == "least_squares" else None
            residual = _wide(target) - _wide(output)
            sums.add(columns, problem.of_output(residual), problem.of_output(target))
        assert problem is not None
        return problem, sums

    def _shift(self, old: fx.Node, how: Linear) -> tuple[Tensor, int] | None:
        """The tensor that moves the layer's output by a constant a channel, and its sign."""
        if how.shift is not None:
            return self.tensors[how.shift], 1
        users = list(old.users)
        use = self.analysis.flow.uses.get(users[0]) if len(users) == 1 else None
        if use is not None and use.rule.mean in use.params:
            return self.tensors[use.params[use.rule.mean or ""]], -1
        return None

    def _take_statistics(self, node: fx.Node, use: Any) -> None:
        """The mean and variance of what a normalisation is given."""
        rule, params = use.rule, use.params
        if rule.mean not in params or not self._is_alone(params[rule.mean]):
            return
        (letter,) = use.binding.inputs[rule.operands.index(rule.mean)][0]
        dim = next(d for d, names in enumerate(use.binding.inputs[0]) if letter in names)
        given = [env[node.all_input_nodes[0]] for env in self.small.values]
        rows = torch.cat([x.movedim(dim, -1).reshape(-1, x.shape[dim]) for x in given])
        name, rows = params[rule.mean].rpartition(".")[0], rows.double()
        tensors = [self.tensors[params[each]] for each in (rule.mean, rule.variance)]
        anew = rows.mean(0), rows.var(0, correction=0)
        found = [new.to(own.dtype) for new, own in zip(anew, tensors, strict=True)]
        _check_finite(name, *found)
        for own, new in zip(tensors, found, strict=True):
            own.copy_(new)
        self.done.statistics.append(name)


class _Change:
    """What a layer's weight, and the tensor that shifts its output, become. ``step``: by how much,
    as rows of a solution, in the digits that the tensors have."""

    def __init__(
        self, problem: Problem, weight: Tensor, shift: tuple[Tensor, int] | None, step: Tensor
    ):
        rows = step if shift is None else step[:, :-1]
        self.new: list[tuple[Tensor, Tensor]] = []
        parts = []
        if rows.shape[1]:
            parts.append(problem.of_weight(self._moved(weight, problem.to_weight(rows))))
        if shift is not None:
            tensor, sign = shift
            moved = sign * self._moved(tensor, sign * step[:, -1].reshape(-1))
            parts.append(moved.reshape(step.shape[0], 1, -1))
        self.step = torch.cat(parts, 1)

    def _moved(self, tensor: Tensor, by: Tensor) -> Tensor:
        """By how much a tensor moves if it is to move so much."""
        new = (tensor.double() + by).to(tensor.dtype)
        self.new.append((tensor, new))
        return new.double() - tensor.double()

    @property
    def tensors(self) -> list[Tensor]:
        return [new for _, new in self.new]

    def write(self) -> None:
        for tensor, new in self.new:
            tensor.copy_(new)
        torch.clear_autocast_cache()  # which would go on with the old ones


def _readers(analysis: Analysis) -> Counter[int]:
    """How many nodes read a tensor, by its identity: modules may share one, or run twice."""
    graph, found = analysis.graph, Counter[int]()
    modules = dict(graph.named_modules(remove_duplicate=False))
    for node in graph.graph.nodes:
        if node.op == "call_module":
            module = modules[node.target]
            found.update(id(t) for t in (*module.parameters(), *module.buffers()))
        elif node.op == "get_attr":
            found[id(node.meta["val"])] += len(node.users)
    return found


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise InputError(
            f"the values at layer `{name}` are not finite on the data",
            hint="look for NaN and infinity in the data; values of a network in half precision may "
            "overflow: prune and fit it in float32, and cast what comes of it",
        )


def _wide(tensor: Tensor) -> Tensor:
    """In float32 at least: sums and differences need more digits than half precision has."""
    return tensor.to(torch.promote_types(tensor.dtype, torch.float32))


class _Sums:
    """Normal equations of residuals on columns, a system a block; with ``shifts``, on a constant
    too."""

    def __init__(self, shifts: bool) -> None:
        self.constants = int(shifts)
        self.gram: Any = 0.0
        self.right: Any = 0.0
        self.residual: Any = 0.0
        self.total: Any = 0.0  # of what the original gives, a channel
        self.square: Any = 0.0
        self.count = 0

    def add(self, columns: Tensor | None, residual: Tensor, target: Tensor) -> None:
        rows, blocks, _ = residual.shape
        parts = [] if columns is None else [_wide(columns)]
        parts += [residual.new_ones(rows, blocks, 1)] * self.constants
        x = torch.cat(parts, 2).transpose(0, 1)
        y = residual.transpose(0, 1)
        with torch.autocast(x.device.type, enabled=False):
            self.gram = self.gram + (x.transpose(1, 2) @ x).double()
            self.right = self.right + (x.transpose(1, 2) @ y).double()
        self.residual = self.residual + residual.double().square().sum()
        self.total = self.total + target.double().sum(0)
        self.square = self.square + target.double().square().sum()
        self.count += rows

    @property
    def tensors(self) -> Sequence[Tensor]:
        return self.gram, self.right, self.residual, self.square

    @property
    def size(self) -> float:
        """What errors are relative to: the output's variance, where it has any."""
        square = float(self.square)
        centred = square - float(self.total.square().sum()) / self.count
        return centred if centred > _FLAT * square else square or float(self.residual) or 1.0

    def solve(self, ridge: float) -> Tensor:
        """What to add to the weights."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        weight = (ridge * diagonal.mean(1, keepdim=True) + 1e-12).expand_as(diagonal).clone()
        weight[:, diagonal.shape[1] - self.constants :] = 0  # a constant is not held back
        return torch.linalg.solve(self.gram + torch.diag_embed(weight), self.right)

    def left(self, step: Tensor | None = None) -> float:
        """The error that is left when so much was added to the weights."""
        gain = 0.0
        if step is not None:
            gain = float(2 * (step * self.right).sum() - (step * (self.gram @ step)).sum())
        return max(float(self.residual) - gain, 0.0) / self.size
