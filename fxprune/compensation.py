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

from collections.abc import Container
from dataclasses import dataclass, field, replace
from itertools import takewhile
from typing import Any, Literal

import torch
from torch import Tensor, fx, nn

from .analysis import Analysis
from .batches import batches
from .check import check_choice, clone, device_of
from .errors import InputError, OptionError, RuleError
from .ids import Value
from .least_squares import Halves, wide
from .letters import DimsUse
from .linear import Linear, Problem, linear
from .progress import Progress
from .stepping import Stepper
from .widths import Widths

Compensate = Literal["least_squares", "bias", "statistics"]
WAYS: tuple[Compensate, ...] = ("least_squares", "bias", "statistics")
_NONE = {"statistics": "no normalisation holds statistics"}


@dataclass
class Compensation:
    """What was done: layer -> the squared error of its output over the output's variance (over its
    square where it is constant), before and after its fit; the normalisations whose statistics
    were taken anew; layers that multiply with weights but were left as they are, with why."""

    how: str
    items: int
    fitted: dict[str, tuple[float, float]] = field(default_factory=dict)
    statistics: list[str] = field(default_factory=list)
    skipped: dict[str, str] = field(default_factory=dict)

    def __str__(self) -> str:
        if not (self.fitted or self.statistics or self.skipped):
            return f"nothing: {_NONE.get(self.how, 'no layer has weights to fit')}"
        skipped = f", {len(self.skipped)} left as they are" if self.skipped else ""
        if self.how == "statistics":
            return (
                f"{len(self.statistics)} normalisations' statistics on {self.items} items{skipped}"
            )
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
        fit = _Fit(analysis, dense, pruned, kept, found, how)
        fit.run(progress)
    finally:
        for module, mode in modes.items():
            module.training = mode
    return fit.done


class _Fit:
    def __init__(self, analysis, dense, pruned, kept, data, how):
        self.analysis, self.how = analysis, how
        self.widths = Widths(analysis.flow, kept)
        self.dense, self.small = Stepper(dense, data), Stepper(pruned, data)
        self.old = {node.name: node for node in analysis.graph.graph.nodes}
        pairs = zip(analysis.graph.graph.nodes, dense.graph.nodes, strict=True)
        self.copies = {copy: node.name for node, copy in pairs}
        self.seen: set[str] = set()
        self.tensors = _every_name(pruned)
        self.read = _Reads(analysis)
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
        use = None if use is None else self.read.named(old, use)
        if self.how != "statistics":
            self._fit_layer(node, old, use)
        elif use is not None and {use.rule.mean, use.rule.variance} <= {*use.params}:
            self._take_statistics(node, old, use)
        self.dense.forget(self.at)

    def _fit_layer(self, node: fx.Node, old: fx.Node, use: DimsUse | None) -> None:
        how = None if use is None else linear(use)
        listed = self.read.multiplies(old, use)
        if how is None and not listed:
            return
        name = self.read.name(old, {*self.done.fitted, *self.done.skipped})
        try:
            self._solve(node, old, self._fittable(old, how), name)
        except (_Left, RuleError, RuntimeError) as error:
            if listed:
                self.done.skipped[name] = str(error).partition("\n")[0]

    def _fittable(self, old: fx.Node, how: Linear | None) -> Linear:
        """`_Left` says why a layer cannot be fitted. A parameter must be read by one node
        alone: what suits one may not suit another."""
        if how is None:
            shared = self.read.others(old, *self.read.direct(old))
            raise _Left(
                f"its parameters are shared with {shared}"
                if shared
                else "it is not linear in one parameter and one input"
            )
        if shared := self.read.others(old, how.param):
            raise _Left(f"its weights are shared with {shared}")
        return how

    def _targets(self, old: fx.Node, how: Linear) -> list[Tensor]:
        """What the original gives, of the channels that the pruned layer gives."""
        value = self.analysis.flow.values[old]
        mask = self.widths.along(value, how.out_dim) if isinstance(value, Value) else None
        if mask is None:
            raise _Left("what it should give is not known")
        at = mask.nonzero().flatten()
        whole = mask.all()
        outputs = [env[self.at] for env in self.dense.values]
        return outputs if whole else [t.index_select(how.out_dim, at.to(t.device)) for t in outputs]

    def _solve(self, node: fx.Node, old: fx.Node, how: Linear, name: str) -> None:
        targets = self._targets(old, how)
        shift = self._shift(old, how)
        if shift is None and self.how == "bias":
            raise _Left("neither it nor a normalisation behind it has a constant of its own")
        problem, sums = self._summed(node, how, targets, shift is not None)
        _check_finite(name, *sums.tensors)
        change = _Change(problem, self.tensors[how.param], shift, sums.solve())
        _check_finite(name, *change.tensors)
        before, after = sums.left(), sums.left(change.step)
        if after < before:  # rounded to few digits, a small change may do harm
            change.write()
        self.done.fitted[name] = (before, min(before, after))

    def _summed(
        self, node: fx.Node, how: Linear, targets: list[Tensor], shifts: bool
    ) -> tuple[Problem, Halves]:
        """A layer as a least-squares problem, and its sums over the data."""
        problem, sums = None, Halves(shifts)
        for env, target in zip(self.small.values, targets, strict=True):
            output = self.small.once(node, env)
            problem = problem or Problem(how, self.small, node, self.tensors[how.param], output)
            columns = problem.columns(env) if self.how == "least_squares" else None
            residual = wide(target) - wide(output)
            sums.add(columns, problem.of_output(residual), problem.of_output(target))
        assert problem is not None
        return problem, sums

    def _shift(self, old: fx.Node, how: Linear) -> tuple[Tensor, int] | None:
        """The tensor that moves the layer's output by a constant a channel, and its sign; None
        where that would move another layer's too."""
        if how.shift is not None:
            shared = self.read.others(old, how.shift)
            return None if shared else (self.tensors[how.shift], 1)
        users = list(old.users)
        use = self.analysis.flow.uses.get(users[0]) if len(users) == 1 else None
        if use is None or use.rule.mean not in use.params or _channel_dim(use) != how.out_dim:
            return None
        mean = use.params[use.rule.mean]
        return None if self.read.others(users[0], mean) else (self.tensors[mean], -1)

    def _take_statistics(self, node: fx.Node, old: fx.Node, use: DimsUse) -> None:
        """The mean and variance of what a normalisation is given."""
        names = [use.params[each] for each in (use.rule.mean, use.rule.variance) if each]
        name, dim = names[0].rpartition(".")[0], _channel_dim(use)
        given = [env[node.all_input_nodes[0]] for env in self.small.values]
        rows = torch.cat([x.movedim(dim, -1).reshape(-1, x.shape[dim]) for x in given]).double()
        if shared := self.read.others(old, *names):
            self.done.skipped[name] = f"its statistics are shared with {shared}"
            return
        if len(rows) < 2:
            self.done.skipped[name] = "one value a channel has no variance"
            return
        tensors = [self.tensors[each] for each in names]
        anew = rows.mean(0), rows.var(0, correction=0)
        found = [new.to(own.dtype) for new, own in zip(anew, tensors, strict=True)]
        _check_finite(name, *found)
        for own, new in zip(tensors, found, strict=True):
            own.copy_(new)
        self.done.statistics.append(name)


class _Left(Exception):
    """Why a layer is left as it is."""


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


class _Reads:
    """Which nodes of the original read which parameters and buffers: modules may share one, or
    run twice."""

    def __init__(self, analysis: Analysis):
        graph = analysis.graph
        self.modules = dict(graph.named_modules(remove_duplicate=False))
        self.tensors = {**_every_name(graph), **analysis.tensors}
        self.constant: dict[fx.Node, list[str]] = {}  # what nodes read that no input reaches
        self.readers: dict[int, list[str]] = {}
        for node in graph.graph.nodes:
            self._read(node)

    def _read(self, node: fx.Node) -> None:
        operands = node.all_input_nodes
        if node.op == "get_attr":
            self.constant[node] = [str(node.target)]
            for user in node.users:
                self.readers.setdefault(id(node.meta["val"]), []).append(_label(user))
        elif operands and all(each in self.constant for each in operands):
            self.constant[node] = [name for each in operands for name in self.constant[each]]
        own = self.direct(node) if node.op == "call_module" else ()
        for key in {id(self.tensors[name]) for name in own}:
            self.readers.setdefault(key, []).append(_label(node))

    def direct(self, node: fx.Node) -> list[str]:
        """The tensors that a node itself reads: all of a module's, or the attributes in a call."""
        if node.op != "call_module":
            return [str(n.target) for n in node.all_input_nodes if n.op == "get_attr"]
        own = _every_name(self.modules[str(node.target)])
        return [f"{node.target}.{name}" for name in own]

    def parameters(self, node: fx.Node) -> list[str]:
        """The parameters that a node reads, or what it reads is computed from."""
        behind = [name for each in node.all_input_nodes for name in self.constant.get(each, ())]
        names = self.direct(node) if node.op == "call_module" else behind
        return [name for name in names if isinstance(self.tensors.get(name), nn.Parameter)]

    def others(self, node: fx.Node, *names: str) -> str:
        """The other nodes that read one of some tensors, as text; empty where there is none."""
        readers = [self.readers.get(id(self.tensors.get(name)), []) for name in names]
        shared = [label for each in readers if len(each) > 1 for label in each]
        found = dict.fromkeys(label for label in shared if label != _label(node))
        return ", ".join(found) or ("another call of it" if shared else "")

    def multiplies(self, node: fx.Node, use: DimsUse | None) -> bool:
        """Whether a node multiplies with parameters and sums up, as layers do: a letter of two
        operands is summed away, or its letters are not known."""
        if node in self.constant or not self.parameters(node):
            return False
        if use is None:
            return node.op == "call_module"
        operands = [{n for names in dims for n in names} for dims in use.binding.inputs if dims]
        output = {n for names in use.binding.output for n in names}
        letters = [n for each in operands for n in each - output]
        return not operands or len({*letters}) < len(letters)

    def named(self, node: fx.Node, use: DimsUse) -> DimsUse:
        """A use whose operands go by the module's own names, those too that it shares with one
        that comes before it."""
        if node.op != "call_module":
            return use
        own = vars(self.modules[str(node.target)])
        held = {name for table in ("_parameters", "_buffers") for name in own[table]}
        names = {each: f"{node.target}.{each}" for each in use.rule.operands if each in held}
        return replace(
            use, params=use.params | {k: n for k, n in names.items() if n in self.tensors}
        )

    def name(self, node: fx.Node, taken: Container[str]) -> str:
        """A layer's name: the module's, or the place of all parameters that a call reads; where
        other calls read some from there, too, the first parameter's."""
        if node.op == "call_module":
            return str(node.target)
        names = self.parameters(node) or self.direct(node)
        words = zip(*(name.split(".")[:-1] for name in names), strict=False)
        same = ".".join(each[0] for each in takewhile(lambda each: len({*each}) == 1, words))
        return same if same and same not in taken else names[0]


def _label(node: fx.Node) -> str:
    return f"`{node.target}`" if node.op == "call_module" else f"%{node.name}"


def _every_name(module: nn.Module) -> dict[str, Tensor]:
    """Parameters and buffers by name, under each of their names."""
    parameters = module.named_parameters(remove_duplicate=False)
    return dict([*parameters, *module.named_buffers(remove_duplicate=False)])


def _channel_dim(use: DimsUse) -> int:
    """The dim of a normalisation's input along which its statistics go."""
    given, mean = (
        use.binding.inputs[use.rule.operands.index(name)] or ()
        for name in (use.rule.operands[0], use.rule.mean or "")
    )
    return next(d for d, names in enumerate(given) if mean[0][0] in names)


def _check_finite(name: str, *tensors: Tensor) -> None:
    if not all(bool(tensor.isfinite().all()) for tensor in tensors):
        raise InputError(
            f"the values at layer `{name}` are not finite on the data",
            hint="look for NaN and infinity in the data; values of a network in half precision may "
            "overflow: prune and fit it in float32, and cast what comes of it",
        )
