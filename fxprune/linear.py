"""A layer that is linear in its weight, as a least-squares problem: which values its weight
multiplies, and where its elements go.

All that is known of an op is the letters of its rule. Letters that weight, input and output share
are blocks; those of weight and input alone are contracted; those of the weight alone are windows;
those of weight and output alone are made. What a window reads is had from the op itself, run with
weights that are one at one place: no op is named here.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from .errors import RuleError
from .letters import Dims, DimsUse, operand_names
from .pattern import resized
from .stepping import Stepper


@dataclass(frozen=True)
class Linear:
    """How a node contracts an input with a weight. ``operands``: the names of input, weight and of
    what is added, if anything is."""

    use: DimsUse
    input: int
    weight: int
    added: int | None
    blocks: tuple[str, ...]
    contracted: tuple[str, ...]
    windows: tuple[str, ...]
    made: tuple[str, ...]

    @property
    def param(self) -> str:
        return self.use.params[self._names[self.weight]]

    @property
    def _names(self) -> list[str]:
        return operand_names(self.use.rule, len(self.use.binding.inputs))

    @property
    def shift(self) -> str | None:
        """The parameter that is added."""
        return None if self.added is None else self.use.params[self._names[self.added]]

    @property
    def out_dim(self) -> int:
        """The dim of the output that the weight makes."""
        return next(
            d for d, names in enumerate(self.use.binding.output) if set(names) & {*self.made}
        )


def linear(use: DimsUse) -> Linear | None:
    """How a node is linear in a weight; None where it is not, or in several."""
    binding, rule = use.binding, use.rule
    given = [i for i, dims in enumerate(binding.inputs) if dims is not None]
    names = operand_names(rule, len(binding.inputs))
    adds = [i for i in given if names[i] in rule.adds]
    factors = [i for i in given if i not in adds]
    weights = [i for i in factors if names[i] in use.params]
    if len(factors) != 2 or len(weights) != 1 or len(adds) > 1:
        return None
    weight = weights[0]
    other = next(i for i in factors if i != weight)
    w, x, y = (
        _letters(dims) for dims in (binding.inputs[weight], binding.inputs[other], binding.output)
    )
    made = tuple(n for n in w if n in y and n not in x)
    homes = [names for names in binding.output if set(names) & {*made}]
    plain = len(homes) == 1 and all(n in w for n in homes[0])
    known = all(names[i] in use.params for i in adds)
    contracted = tuple(n for n in w if n in x and n not in y)
    if not plain or not known or not contracted:
        return None
    return Linear(
        use,
        other,
        weight,
        adds[0] if adds else None,
        tuple(n for n in w if n in x and n in y),
        contracted,
        tuple(n for n in w if n not in x and n not in y),
        made,
    )


def _letters(dims: Dims | None) -> list[str]:
    return [name for names in dims or () for name in names]


class Problem:
    """A `Linear` at the sizes that are there now: weights, inputs and outputs as matrices."""

    def __init__(
        self, how: Linear, stepper: Stepper, node: fx.Node, weight: Tensor, output: Tensor
    ):
        self.how, self.call = how, Call(how, stepper, node)
        self.source = self._source(node)
        inputs = stepper.values[0][self.source]
        binding = how.use.binding
        dims = (binding.inputs[how.input], binding.inputs[how.weight], binding.output)
        shapes = (inputs.shape, weight.shape, output.shape)
        self.sizes = resized([each or () for each in dims], shapes, self.call.sizes())
        self.rows = [n for n in _letters(binding.output) if n not in {*how.made, *how.blocks}]

    def _source(self, node: fx.Node) -> fx.Node:
        """The node that gives the input."""
        params = {self.how.param, self.how.shift}
        rest = [n for n in node.all_input_nodes if not (n.op == "get_attr" and n.target in params)]
        if len(rest) != 1:
            raise RuleError(f"%{node.name} reads {len(rest)} values")
        return rest[0]

    def size(self, letters: Sequence[str]) -> int:
        return math.prod(self.sizes[n] for n in letters)

    # -- as matrices -----------------------------------------------------------------------------

    def of_weight(self, weight: Tensor) -> Tensor:
        """(blocks, contracted and windows, made)."""
        how = self.how
        inner = (*how.contracted, *how.windows)
        laid = _laid(weight, self._weight_dims(), self.sizes, (*how.blocks, *inner, *how.made))
        return laid.reshape(self.size(how.blocks), self.size(inner), self.size(how.made))

    def to_weight(self, matrix: Tensor) -> Tensor:
        """A weight's tensor from its matrix."""
        how, dims = self.how, self._weight_dims()
        order = [*how.blocks, *how.contracted, *how.windows, *how.made]
        spread = matrix.reshape([self.sizes[n] for n in order])
        letters = _letters(dims)
        shape = [self.size(names) for names in dims]
        return spread.permute([order.index(n) for n in letters]).reshape(shape)

    def of_output(self, output: Tensor) -> Tensor:
        """(rows, blocks, made)."""
        how = self.how
        order = (*self.rows, *how.blocks, *how.made)
        laid = _laid(output, how.use.binding.output, self._row_sizes(output), order)
        return laid.reshape(-1, self.size(how.blocks), self.size(how.made))

    def columns(self, env: dict[fx.Node, Any]) -> Tensor:
        """(rows, blocks, contracted and windows): what each element of the weight is multiplied
        with, for each element of the output."""
        how, inputs = self.how, env[self.source]
        if not how.windows:
            order = (*self.rows, *how.blocks, *how.contracted)
            dims = how.use.binding.inputs[how.input]
            laid = _laid(inputs, dims, self._row_sizes(inputs, dims), order)
            return laid.reshape(-1, self.size(how.blocks), self.size(how.contracted))
        if len(how.blocks) == 1 and self.call.resizable:
            return self._by_single_inputs(env, inputs)
        return self._by_ones(env, inputs)

    def _by_single_inputs(self, env: dict[fx.Node, Any], inputs: Tensor) -> Tensor:
        """By one block for each input, with a window each: few operations."""
        how, windows = self.how, self.size(self.how.windows)
        inner = self.size(how.contracted)
        sizes = {**self.sizes, how.blocks[0]: self.size(how.blocks) * inner, how.made[0]: windows}
        sizes |= dict.fromkeys((*how.contracted, *how.made[1:]), 1)
        eye = torch.eye(windows, dtype=inputs.dtype, device=inputs.device)
        ones = self._ones(eye, sizes, (how.made[0], *how.windows), windows)
        output = self.call(env, inputs, ones, sizes)
        rows = self._row_sizes(output) | {n: sizes[n] for n in (*how.blocks, *how.made)}
        order = (*self.rows, *how.blocks, *how.made)
        laid = _laid(output, how.use.binding.output, rows, order)
        return laid.reshape(-1, self.size(how.blocks), inner * windows)

    def _by_ones(self, env: dict[fx.Node, Any], inputs: Tensor) -> Tensor:
        """By as many outputs a block as there are weights of one."""
        how = self.how
        inner = (*how.contracted, *how.windows)
        count = self.size(inner)
        sizes = {**self.sizes, how.made[0]: count} | dict.fromkeys(how.made[1:], 1)
        eye = torch.eye(count, dtype=inputs.dtype, device=inputs.device)
        ones = self._ones(eye, sizes, (how.made[0], *inner), count)
        output = self.call(env, inputs, ones, sizes)
        rows = self._row_sizes(output) | {n: sizes[n] for n in (*how.blocks, *how.made)}
        laid = _laid(output, how.use.binding.output, rows, (*self.rows, *how.blocks, *how.made))
        return laid.reshape(-1, self.size(how.blocks), count)

    def _ones(
        self, eye: Tensor, sizes: Mapping[str, int], along: Sequence[str], count: int
    ) -> Tensor:
        """A weight that is an identity over the letters `along`, the same for all others."""
        dims = self._weight_dims()
        letters = _letters(dims)
        order = [n for n in along if n in letters]
        spread = eye.reshape([sizes[n] for n in order])
        spread = spread.permute(sorted(range(len(order)), key=lambda a: letters.index(order[a])))
        shape = [sizes[n] if n in order else 1 for n in letters]
        full = spread.reshape(shape).expand([sizes[n] for n in letters])
        return full.reshape([math.prod(sizes[n] for n in names) for names in dims]).contiguous()

    def _weight_dims(self) -> Dims:
        return self.how.use.binding.inputs[self.how.weight] or ()

    def _row_sizes(self, tensor: Tensor, dims: Dims | None = None) -> dict[str, int]:
        """The sizes of letters, those of rows as a batch has them."""
        found = dict(self.sizes)
        for names, size in zip(dims or self.how.use.binding.output, tensor.shape, strict=True):
            if len(names) == 1 and names[0] in self.rows:
                found[names[0]] = size
        return found


def _laid(tensor: Tensor, dims: Any, sizes: Mapping[str, int], order: Sequence[str]) -> Tensor:
    """A tensor with a dim a letter, in this order."""
    letters = _letters(dims)
    spread = tensor.reshape([sizes[n] for n in letters])
    return spread.permute([letters.index(n) for n in order])


class Call:
    """A node's call with other weights, and other sizes where it is a module's."""

    def __init__(self, how: Linear, stepper: Stepper, node: fx.Node):
        self.how, self.stepper, self.node = how, stepper, node
        is_module = node.op == "call_module"
        self.module = stepper.graph.get_submodule(str(node.target)) if is_module else None

    @property
    def resizable(self) -> bool:
        return self.module is not None

    def sizes(self) -> dict[str, int]:
        """Letters' sizes that attributes or arguments hold."""
        held: Mapping[str, Any] = self.node.kwargs if self.module is None else vars(self.module)
        named = self.how.use.rule.sizes.items()
        return {text: held[key] for key, text in named if text.isidentifier() and key in held}

    def __call__(
        self, env: dict[fx.Node, Any], inputs: Tensor, weight: Tensor, sizes: Mapping[str, int]
    ) -> Tensor:
        """The output for another weight, with nothing added."""
        given = {self.how.param: weight}
        if self.how.shift is not None:
            dims = self.how.use.binding.inputs[self.how.added or 0] or ()
            shape = [math.prod(sizes[n] for n in names) for names in dims]
            given[self.how.shift] = weight.new_zeros(shape)
        if self.module is None:
            return self._function(env, given)
        return self._module(self.module, inputs, given, sizes)

    def _module(self, module: Any, inputs: Tensor, given: dict[str, Tensor], sizes: Any) -> Tensor:
        module = copy.copy(module)
        own = {name.rpartition(".")[2]: tensor for name, tensor in given.items()}
        module._parameters = {**module._parameters, **own}
        for attribute, text in self.how.use.rule.sizes.items():
            setattr(module, attribute, math.prod(sizes[n] for n in text.split()))
        return module.forward(inputs)

    def _function(self, env: dict[fx.Node, Any], given: dict[str, Tensor]) -> Tensor:
        nodes = {n.target: n for n in self.node.all_input_nodes if n.op == "get_attr"}
        return self.stepper.once(self.node, {**env, **{nodes[k]: t for k, t in given.items()}})
