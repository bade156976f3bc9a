"""The reference of a verification: the traced original with the dropped channels masked.

Every dropped element of every parameter is zero. Where a normalisation takes statistics over
channels that went, the op runs over the kept ones alone. Nothing of the model is changed or copied
whole: parameters are cast, masked and given noise one at a time, as the graph reads them.
"""

from __future__ import annotations

import zlib
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functional_call
from torch.utils import _pytree as pytree

from .check import tensors_of
from .flow import Flow
from .ids import Value
from .plans import Kept
from .trace import mutates
from .widths import Widths, gather

Jitter = Callable[[str], "Tensor | None"]


def jitters(
    flow: Flow, kept: Mapping[str, dict[int, Kept]], *, louder: bool = False
) -> tuple[Jitter, Jitter]:
    """What is added to parameters, in the original's and in the pruned shape.

    Behind a layer that starts as all zeros nothing could be told apart; both networks get the same
    noise there, so that the comparison depends on every layer. With `louder` every weight is
    scaled as a whole, to a gain of 2: behind many layers that quieten it, no input is heard.
    """
    aliases: dict[str, str] = flow.graph.meta.get("fxprune_aliases", {})
    tensors = tensors_of(flow.graph)

    @cache
    def gain(name: str) -> float:
        """How much louder a weight gets: 1 for none; 0 for one that is constant."""
        value = tensors.get(name)
        if value is None or not value.is_floating_point():
            return 1.0
        if _constant(value):
            return float(not bool(value.flatten()[0].isfinite()))
        return _louder(value) if louder and value.ndim > 1 else 1.0

    def full(name: str) -> Tensor | None:  # made anew each time: all together are a second model
        name = aliases.get(name, name)
        found, value = gain(name), tensors.get(name)
        if found == 1.0 or value is None:
            return None
        if found:
            return value.detach().double() * (found - 1)
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        size = max(abs(float(value.flatten()[0])), 0.2)
        return (torch.rand(value.shape, generator=generator, dtype=torch.float64) - 0.5) * size

    def narrow(name: str) -> Tensor | None:
        noise = full(name)
        return None if noise is None else gather(noise, kept.get(aliases.get(name, name), {}))

    return full, narrow


def _louder(value: Tensor) -> float:
    """What makes a weight's gain 2: the root of its summed squares for each thing it makes."""
    norms = torch.linalg.vector_norm(value.detach().flatten(1), dim=1, dtype=torch.float64)
    gain = float(norms.square().mean().sqrt())
    return 2 / gain if 0 < gain < float("inf") else 1.0


def _constant(value: Tensor) -> bool:
    flat = value.detach().flatten()
    if flat.numel() < 2 or not bool((flat[:64] == flat[0]).all()):
        return False
    return bool((flat == flat[0]).all())


class Cast(fx.Interpreter):
    """Runs a graph in eval mode with every parameter cast to one dtype on the way, none changed."""

    def __init__(self, module: fx.GraphModule, dtype: torch.dtype | None, jitter: Jitter):
        super().__init__(module, garbage_collect_values=True)
        self.dtype, self.jitter = dtype, jitter

    def tensor(self, name: str, value: Any) -> Any:
        if not isinstance(value, Tensor) or not value.is_floating_point():
            return value.clone() if isinstance(value, Tensor) else value
        found = value.detach().to(self.dtype or value.dtype, copy=True)
        noise = self.jitter(name)
        return found if noise is None else found + noise.to(found)

    def fetch_attr(self, target: str) -> Any:
        flag = target.rpartition(".")[2] == "training"
        return False if flag else self.tensor(target, super().fetch_attr(target))

    def call_module(self, target, args, kwargs):
        module = self.module.get_submodule(target)
        own = {**dict(module.named_parameters()), **dict(module.named_buffers())}
        state = {name: self.tensor(f"{target}.{name}", value) for name, value in own.items()}
        was = module.training
        module.training = False
        try:
            return functional_call(module, state, args, kwargs)
        finally:
            module.training = was


class Masked(Cast):
    """The original with dropped elements of its parameters zeroed."""

    def __init__(
        self,
        flow: Flow,
        pruned: Cast,
        kept: Mapping[str, dict[int, Kept]],
        widths: Widths,
        jitter: Jitter,
    ):
        super().__init__(flow.graph, pruned.dtype, jitter)
        self.flow, self.kept, self.widths = flow, kept, widths
        self.aliases: dict[str, str] = flow.graph.meta.get("fxprune_aliases", {})
        self.narrow = {n.name: n for n in pruned.graph.nodes}
        self.pruned = pruned
        self.laid = False  # whether some op was run over the kept channels alone
        self.coarse = pruned.dtype  # the least precise dtype that data went through

    def tensor(self, name: str, value: Any) -> Any:
        found = super().tensor(name, value)
        kept = self.kept.get(self.aliases.get(name, name))
        return mask_(found, kept) if kept else found

    def run_node(self, n: fx.Node) -> Any:
        twin = self.narrow.get(n.name)
        if n in self.flow.mixing and twin is not None and self._shrinks(n):
            return self._over_kept(n, twin)
        found = super().run_node(n)
        self._note_dtype(n, found)
        value = self.flow.values.get(n)
        if not isinstance(value, Value) or not isinstance(found, Tensor) or mutates(n):
            return found
        infinite = found.is_floating_point() and not bool(found.sum().isfinite())
        computed = value.weight and n.op != "get_attr"
        if (computed or infinite) and self.widths.changed(value):  # else a view stays a view
            # a dropped weight may be divided by its own norm, a dropped value inverted: 0 / 0 and
            # 1 / 0 only ever meet weights that are zero, but 0 * inf is no number
            keep = self._mask(value, found.shape).to(found.device)
            if bool((found[~keep] != 0).any()):  # else a view of a weight stays one, too
                return torch.where(keep, found, torch.zeros_like(found))
        return found

    def _note_dtype(self, n: fx.Node, found: Any) -> None:
        given = n.meta["val"]
        if self.coarse is None or not isinstance(given, Tensor) or not given.is_meta:
            return
        if isinstance(found, Tensor) and found.is_floating_point():
            self.coarse = max(self.coarse, found.dtype, key=lambda dtype: torch.finfo(dtype).eps)

    def _shrinks(self, n: fx.Node) -> bool:
        return any(self.widths.changed(self.widths.value(o)) for o in n.all_input_nodes)

    def _over_kept(self, n: fx.Node, twin: fx.Node) -> Any:
        """The op over the kept channels alone, laid back into a full tensor of zeros."""
        self.laid = True
        args, kwargs = fx.node.map_aggregate(
            (n.args, n.kwargs), lambda a: self._taken(a) if isinstance(a, fx.Node) else a
        )
        literals = (twin.args, twin.kwargs)
        args, kwargs = _merge((args, kwargs), (n.args, n.kwargs), literals)
        found = getattr(self.pruned, n.op)(twin.target, args, kwargs)
        values = pytree.tree_leaves(self.flow.values[n], is_leaf=lambda v: isinstance(v, Value))
        leaves, spec = pytree.tree_flatten(found)
        laid = [
            self._laid(n, v, t) if isinstance(t, Tensor) else t
            for v, t in zip(values, leaves, strict=True)
        ]
        return pytree.tree_unflatten(laid, spec)

    def _mask(self, value: Value, shape) -> Tensor:
        mask_ = torch.ones(tuple(shape), dtype=torch.bool)
        for layer in self.widths.layers(value):
            mask_ &= self.widths.kept[layer.ids]
        return mask_

    def _taken(self, node: fx.Node) -> Any:
        found, value = self.env[node], self.flow.values.get(node)
        if not isinstance(value, Value) or not isinstance(found, Tensor):
            return found
        return found[self._mask(value, found.shape).to(found.device)].reshape(
            self.widths.shape(node, value)
        )

    def _laid(self, n: fx.Node, value: Value, found: Tensor) -> Tensor:
        full = torch.zeros(value.shape, dtype=found.dtype, device=found.device)
        full[self._mask(value, value.shape).to(found.device)] = found.reshape(-1)
        return full


def _merge(run: Any, old: Any, new: Any) -> Any:
    """Tensors as computed, everything else as written in the new graph."""
    if isinstance(old, fx.Node):
        return run if isinstance(run, Tensor) else new if not isinstance(new, fx.Node) else run
    if isinstance(old, (tuple, list)) and isinstance(new, (tuple, list)) and len(old) == len(new):
        return type(old)(_merge(r, o, n) for r, o, n in zip(run, old, new, strict=True))
    if isinstance(old, dict):
        return {
            key: _merge(run[key], old[key], new[key]) if key in old else new[key] for key in new
        }
    return new


def mask(tensor: Tensor, kept: dict[int, Kept], *, least: float = 0.0) -> Tensor:
    """The tensor with everything but the kept indices set to zero, or to what is hardly more."""
    return mask_(tensor.clone(), kept, least=least)


def mask_(tensor: Tensor, kept: dict[int, Kept], *, least: float = 0.0) -> Tensor:
    """`mask` in place; a parameter can be most of a network."""
    blocks = next((rows for rows in kept.values() if rows and isinstance(rows[0], list)), None)
    if blocks is not None:
        keep = torch.zeros(tensor.shape, dtype=torch.bool)
        _keep_blocks(keep, kept, len(blocks))
        return tensor.masked_fill_(~keep.to(tensor.device), least)  # a product would keep inf
    for dim, rows in kept.items():
        gone = torch.ones(tensor.shape[dim], dtype=torch.bool)
        gone[rows] = False
        tensor.index_fill_(dim, gone.nonzero().flatten().to(tensor.device), least)
    return tensor


def _keep_blocks(keep: Tensor, kept: dict[int, Kept], left: int) -> None:
    own = {dim: rows for dim, rows in kept.items() if isinstance(rows[0], list)}
    first = kept.get(0, list(range(keep.shape[0])))
    size = len(first) // left
    for b in range(left):
        rows = first[b * size : (b + 1) * size]
        part = torch.ones((len(rows), *keep.shape[1:]), dtype=torch.bool)
        for dim, lists in kept.items():
            if dim != 0:
                line = torch.zeros(keep.shape[dim], dtype=torch.bool)
                line[lists[b] if dim in own else lists] = True
                part &= line.view([-1 if d == dim else 1 for d in range(keep.ndim)])
        keep[torch.tensor(rows)] = part
