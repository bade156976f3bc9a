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
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, fx

from .analysis import Analysis
from .batches import batches
from .check import check_choice, clone, device_of
from .errors import OptionError, RuleError
from .ids import Value
from .linear import Linear, Problem, linear
from .progress import Progress
from .stepping import Stepper
from .widths import Widths

Compensate = Literal["least_squares", "bias", "statistics"]
WAYS: tuple[Compensate, ...] = ("least_squares", "bias", "statistics")
_RIDGE = 1e-4


@dataclass
class Compensation:
    """What was done: layer -> the error of its output relative to the output's own size, before
    and after its fit; the normalisations whose statistics were taken anew; layers left as they
    are, with why."""

    how: str
    items: int
    fitted: dict[str, tuple[float, float]] = field(default_factory=dict)
    statistics: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        last = [f"{before:.3g} to {after:.3g}" for before, after in self.fitted.values()][-1:]
        error = f"; the last one's error from {last[0]}" if last else ""
        if self.how == "statistics":
            return f"{len(self.statistics)} normalisations' statistics on {self.items} items"
        skipped = f", {len(self.skipped)} left as they are" if self.skipped else ""
        return (
            f"{len(self.fitted)} layers by {self.how.replace('_', ' ')} on {self.items} items"
            f"{skipped}{error}; the numbers verified are those before the fit"
        )


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
        weight = self.tensors[how.param]
        shift = self._shift(old, how)
        if shift is None and self.how == "bias":
            self.done.skipped[name] = "neither it nor a normalisation behind it has a constant"
            return
        problem, sums = None, _Sums()
        for env, target in zip(self.small.values, targets, strict=True):
            output = self.small.once(node, env)
            problem = problem or Problem(how, self.small, node, weight, output)
            columns = problem.columns(env) if self.how == "least_squares" else None
            sums.add(
                columns,
                problem.of_output(target - output),
                problem.of_output(target),
                shift is not None,
            )
        assert problem is not None
        step, left = sums.solve(self.ridge)
        if self.how == "least_squares":
            rows = step[:, : step.shape[1] - 1] if shift is not None else step
            weight += problem.to_weight(rows.to(weight.dtype))
        if shift is not None:
            tensor, sign = shift
            tensor += sign * step[:, -1].reshape(-1).to(tensor.dtype)
        self.done.fitted[name] = (sums.error, left)

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
        self.tensors[params[rule.mean]].copy_(rows.double().mean(0))
        self.tensors[params[rule.variance]].copy_(rows.double().var(0, correction=0))
        self.done.statistics.append(params[rule.mean].rpartition(".")[0])


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


class _Sums:
    """Normal equations of residuals on columns, a system a block."""

    def __init__(self) -> None:
        self.gram: Any = 0.0
        self.right: Any = 0.0
        self.residual = 0.0
        self.size = 0.0
        self.constants = 0

    def add(self, columns: Tensor | None, residual: Tensor, target: Tensor, shifts: bool) -> None:
        rows, blocks, _ = residual.shape
        parts = [] if columns is None else [columns]
        self.constants = int(shifts)
        if shifts:
            parts.append(residual.new_ones(rows, blocks, 1))
        x = torch.cat(parts, 2).transpose(0, 1)
        y = residual.transpose(0, 1)
        self.gram = self.gram + (x.transpose(1, 2) @ x).double()
        self.right = self.right + (x.transpose(1, 2) @ y).double()
        self.residual += float(residual.double().square().sum())
        centred = target.double() - target.double().mean(0, keepdim=True)
        self.size += float(centred.square().sum())

    @property
    def error(self) -> float:
        return self.residual / max(self.size, 1e-30)

    def solve(self, ridge: float) -> tuple[Tensor, float]:
        """What to add to the weights, and the error that is left."""
        diagonal = self.gram.diagonal(dim1=1, dim2=2)
        weight = (ridge * diagonal.mean(1, keepdim=True) + 1e-12).expand_as(diagonal).clone()
        weight[:, diagonal.shape[1] - self.constants :] = 0  # a constant is not held back
        step = torch.linalg.solve(self.gram + torch.diag_embed(weight), self.right)
        gain = 2 * (step * self.right).sum() - (step * (self.gram @ step)).sum()
        return step, (self.residual - float(gain)) / max(self.size, 1e-30)
