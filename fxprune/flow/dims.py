"""Ops whose dims a pattern of letters names: layers, norms, products, windows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from torch import Tensor, fx

from .. import einsum, letters
from ..ids import Layer, Value
from ..letters import DimsUse
from ..pattern import bind
from ..rules import Use
from ..trees import leaves, mapped
from ..widen import Wide
from .run import Run, first_zero


def dims(run: Run, node: fx.Node, use: Use) -> Any:
    bound = run.bound(node, use)
    rule = use.rule.standing(_attributes(run, node, bound)) if use.rule.still else use.rule
    use = replace(use, rule=rule)
    values = [run.operand(node, bound, name) for name in rule.operands]
    known = {*rule.operands, *rule.ignores}
    run.freeze_unnamed(node, {name: bound[name] for name in bound if name not in known})
    return run_letters(run, node, use, rule.pattern, values, bound)


def _attributes(run: Run, node: fx.Node, bound: dict[str, Any]) -> dict[str, Any]:
    """What a call's arguments are, or a module's attributes."""
    return vars(run.modules[node.target]) if node.op == "call_module" else bound


def of_einsum(run: Run, node: fx.Node, use: Use) -> Any:
    bound = use.bound(node.args, node.kwargs)
    values = [run.operand(node, {"x": v}, "x") for v in bound["operands"]]
    shapes = [v.shape for v in values if v is not None]
    return run_letters(run, node, use, einsum.of_equation(bound["equation"], shapes), values, {})


def of_matmul(run: Run, node: fx.Node, use: Use) -> Any:
    bound = use.bound(node.args, node.kwargs)
    values = [run.operand(node, bound, name) for name in use.rule.operands]
    if any(v is None for v in values):
        return NotImplemented
    ranks = [len(v.shape) for v in values if v is not None]
    return run_letters(run, node, use, einsum.of_matmul(*ranks), values, {})


def run_letters(
    run: Run, node: fx.Node, use: Use, pattern, values: list[Value | None], bound: dict[str, Any]
) -> Any:
    outputs = leaves(node.meta["val"], Tensor)
    sizes = {
        text: run.concrete(bound[key])
        for key, text in use.rule.sizes.items()
        if key in bound and text.isidentifier()
    }
    ranks = {
        letter: len(run.concrete(bound[key]))
        for letter, key in use.rule.ranks.items()
        if key in bound
    }
    ranks |= _ranks_at(run, use, bound, values)
    shapes = [None if v is None else v.shape for v in values]
    fixed = {**use.rule.fixed, **sizes}
    binding = bind(pattern, shapes, tuple(outputs[0].shape), sizes=fixed, ranks=ranks)
    values = [_if_raw(run, v) for v in values]
    layers, done, mixed = letters.flow(run.ids, node, use.rule, binding, values, run.heads)
    layers += _past_windows(run, node, done, values)
    if mixed:
        run.mixes(node, [n.ids for n in mixed], "norms" if use.rule.norm else "all")
    run.result.uses[node] = done
    weight = all(v.weight for v in values if v is not None)
    return first_zero(
        mapped(lambda t: _dims_output(run, t, outputs[0], layers, weight), node.meta["val"])
    )


def _past_windows(run: Run, node: fx.Node, done: DimsUse, values: list[Any]) -> list[Layer]:
    """Channels under a window are laid out at full width; each place it gives has a new one."""
    if not done.windows:
        return []
    if not run.rewritable:
        for i, dim in done.windows:
            for layer in values[i].layers:
                if dim in layer.varying:
                    why = f"is read by position, as in a window (%{node.name})"
                    run.ids.freeze(node, layer.ids, why)
        return []
    operands = {id(run.result.values[n]): n for n in node.all_input_nodes}
    wide = run.result.wide[node] = Wide()
    wide.operands += [(operands[id(values[i])], dim) for i, dim in done.windows]
    wide.cut += letters.places(done)
    shape = leaves(node.meta["val"], Tensor)[0].shape
    return [Layer(_along(run, dim, shape), False) for dim in wide.cut]


def _along(run: Run, dim: int, shape: Sequence[int]) -> Tensor:
    """New ids along one dim of a shape."""
    return run.ids.fresh(shape[dim]).view([-1 if d == dim else 1 for d in range(len(shape))])


def _if_raw(run: Run, value: Value | None) -> Value | None:
    return run.opened(value) if value is not None and value.param in run.ids.slots else value


def _ranks_at(run: Run, use: Use, bound: dict[str, Any], values: list[Any]) -> dict[str, int]:
    """The dims before the one that an argument points at are the first star's."""
    ranks = {}
    for key in use.rule.at:
        rank = len(values[0].shape)
        dim = run.concrete(bound.get(key, -1)) % rank
        before = use.rule.pattern.inputs[0].terms[0].atoms[0].letter
        ranks[before] = dim
    return ranks


def _dims_output(run: Run, tensor: Any, first: Tensor, layers: list[Layer], weight: bool) -> Any:
    if not isinstance(tensor, Tensor):
        return tensor
    fitting = tuple(layer for layer in layers if _broadcasts(layer.ids.shape, tensor.shape))
    return run.made(tuple(tensor.shape), fitting if tensor.ndim == first.ndim else (), weight)


def _broadcasts(small: Sequence[int], shape: Sequence[int]) -> bool:
    return len(small) == len(shape) and all(a in (1, b) for a, b in zip(small, shape, strict=True))
