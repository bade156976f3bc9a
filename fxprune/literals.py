"""Numbers written into a graph that must follow the narrower widths.

Each function corrects one family of literals (``fix:`` in a movement's rule): the sizes of a view,
the sections of a split, the bounds of a slice, constant index tensors, the amounts of a pad. A
number that the graph computes from a shape stays computed where it comes out right.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx

from .ids import Value
from .rules import Use
from .trees import leaves
from .widths import RewriteError, Widths


@dataclass
class Call:
    """A call about to be written: the old node, and the new one's target and arguments (old nodes).

    ``gathers`` are (dim, kept positions) taken from the first argument before the call.
    """

    node: fx.Node
    use: Use
    op: str
    target: Any
    args: tuple
    kwargs: dict[str, Any]
    gathers: list[tuple[int, Tensor]] = field(default_factory=list)
    attrs: dict[str, Any] = field(default_factory=dict)


@dataclass
class Context:
    """What the fixes read: widths, and the new values of numbers the graph computes."""

    widths: Widths
    number: Callable[[fx.Node], Any]
    source: Value
    module: Any = None  # of a call of a module

    def shape(self, node: fx.Node, value: Any = None) -> tuple[int, ...]:
        return self.widths.shape(node, self.widths.value(node) if value is None else value)

    def fits(self, arg: Any, need: int) -> Any:
        """`arg` if it will be `need`, else `need`."""
        if isinstance(arg, fx.Node):
            return arg if self.number(arg) == need else need
        return arg if arg in (-1, need) else need

    def is_open(self, arg: Any) -> bool:
        """Whether a number is computed from sizes of the input, and not from widths alone."""
        if not isinstance(arg, fx.Node):
            return False
        value = self.widths.value(arg.args[0]) if arg.args else None
        if isinstance(value, Value):
            dim = arg.args[1] if len(arg.args) > 1 else None
            return not isinstance(dim, int) or not self.widths.has_channels(value, dim)
        return any(self.is_open(node) for node in arg.all_input_nodes)

    def concrete(self, arg: Any) -> Any:
        return fx.node.map_aggregate(arg, lambda a: a.meta["val"] if isinstance(a, fx.Node) else a)

    def dim(self, arg: Any) -> int:
        return self.concrete(arg) % len(self.source.shape)

    def mask(self, node: fx.Node, dim: int) -> Tensor:
        mask = self.widths.along(self.source, dim)
        if mask is None:
            raise RewriteError(node, f"channels spread over several dims are cut at %{node.name}")
        return mask


Fix = Callable[[Call, Context], None]


def _argument(call: Call, name: str) -> tuple[int | None, Any]:
    """Where an argument stands (None: a keyword) and what it is."""
    if name in call.kwargs:
        return None, call.kwargs[name]
    at = call.use.arguments.index(name)
    return at, call.args[at] if at < len(call.args) else None


def _set(call: Call, name: str, value: Any) -> None:
    at = call.use.arguments.index(name)
    if name in call.kwargs or at >= len(call.args):
        call.kwargs[name] = value
    else:
        call.args = (*call.args[:at], value, *call.args[at + 1 :])


def shape(call: Call, context: Context) -> None:
    """Sizes of view, reshape, expand, zeros."""
    starred = "*shape" in call.use.arguments
    at = call.use.arguments.index("*shape" if starred else "shape")
    rest = call.kwargs.get(
        "shape", call.kwargs.get("size", call.args[at:] if starred else call.args[at])
    )
    nested = starred and len(rest) == 1 and isinstance(rest[0], (list, tuple))
    sizes = rest[0] if nested else rest
    if not sizes or not all(isinstance(s, (int, fx.Node)) for s in sizes):
        return
    need = context.shape(call.node)
    made = [context.fits(size, n) for size, n in zip(sizes, need, strict=True)]
    if call.use.rule.kind == "reshape":
        _leave_one_open(context, sizes, made)
    for key in ("shape", "size"):
        if key in call.kwargs:
            call.kwargs[key] = made
            return
    if starred:
        call.args = (*call.args[:at], *([tuple(made)] if nested else made))
    else:
        _set(call, "shape", tuple(made))


def _leave_one_open(context: Context, given: Any, made: list[Any]) -> None:
    """A size that comes out wrong, but holds the batch or a picture's size too, is left to view."""
    pairs = enumerate(zip(given, made, strict=True))
    wrong = [i for i, (old, new) in pairs if old is not new and context.is_open(old)]
    if len(wrong) == 1 and -1 not in made:
        made[wrong[0]] = -1


def repeats(call: Call, context: Context) -> None:
    """How often a dim of one element is repeated, where channels lie along the copies."""
    starred = "*repeats" in call.use.arguments
    at = call.use.arguments.index("*repeats" if starred else "repeats")
    rest = call.kwargs.get("repeats", call.args[at:] if starred else call.args[at : at + 1])
    nested = isinstance(rest, tuple) and len(rest) == 1 and isinstance(rest[0], (list, tuple))
    given = list(rest[0] if nested else rest)
    need, old = context.shape(call.node), context.source.shape
    for i in range(-1, -len(given) - 1, -1):
        if len(old) < -i or old[i] == 1:
            given[i] = context.fits(given[i], need[i])
    if "repeats" in call.kwargs:
        call.kwargs["repeats"] = tuple(given)
    else:
        call.args = (*call.args[:at], *([tuple(given)] if nested or not starred else given))


def sizes(call: Call, context: Context) -> None:
    """Sizes that one dim is unflattened to."""
    need = context.shape(call.node)
    if call.op == "call_module":
        dim = context.dim(getattr(context.module, "dim", 1))
        count = len(need) - len(context.source.shape) + 1
        call.attrs["unflattened_size"] = tuple(need[dim : dim + count])
        return
    _, given = _argument(call, "sizes")
    dim = context.dim(_argument(call, "dim")[1])
    _set(call, "sizes", [context.fits(s, need[dim + i]) for i, s in enumerate(given)])


def squeeze(call: Call, context: Context) -> None:
    """A squeeze of all dims must not squeeze one that pruning made 1."""
    if _argument(call, "dim")[1] is not None:
        return
    new = context.widths.shape(call.node, context.source)
    if any(n == 1 != old for n, old in zip(new, context.source.shape, strict=True)):
        ones = tuple(d for d, n in enumerate(context.source.shape) if n == 1)
        _set(call, "dim", ones)


def _new_sections(call: Call, context: Context) -> tuple[int, list[int]]:
    dim = context.dim(_argument(call, "dim")[1] or 0)
    return dim, [context.shape(call.node, value)[dim] for value in context.widths.value(call.node)]


def sections(call: Call, context: Context) -> None:
    """Sections of a split: a list where they are no longer equal."""
    _, need = _new_sections(call, context)
    _, given = _argument(call, "split_size")
    if isinstance(given, (list, tuple)):
        _set(call, "split_size", [context.fits(g, n) for g, n in zip(given, need, strict=True)])
    elif all(n == need[0] for n in need[:-1]) and need[-1] <= need[0]:
        _set(call, "split_size", context.fits(given, need[0]))
    else:
        _set(call, "split_size", need)


def chunks(call: Call, context: Context) -> None:
    """A chunk whose halves differ becomes a split."""
    dim, need = _new_sections(call, context)
    _, given = _argument(call, "chunks")
    probe = torch.empty(sum(need), device="meta").chunk(context.concrete(given))
    if [len(p) for p in probe] != need:
        call.op, call.target, call.args, call.kwargs = (
            "call_method",
            "split",
            (call.args[0], need, dim),
            {},
        )


def tensor_split(call: Call, context: Context) -> None:
    """Sections that are not the usual ones any more become those of a split."""
    dim, need = _new_sections(call, context)
    _, given = _argument(call, "indices_or_sections")
    if leaves(given, int) and not leaves(given, fx.Node):
        probe = torch.empty(sum(need), device="meta").tensor_split(given)
        if [len(p) for p in probe] == need:
            return
    call.op, call.target, call.args, call.kwargs = (
        "call_method",
        "split",
        (call.args[0], need, dim),
        {},
    )


def narrow(call: Call, context: Context) -> None:
    dim = context.dim(_argument(call, "dim")[1])
    mask = context.mask(call.node, dim)
    _, start = _argument(call, "start")
    _, length = _argument(call, "length")
    begin = context.concrete(start) % max(len(mask), 1)
    _set(call, "start", context.fits(start, int(mask[:begin].sum())))
    _set(
        call,
        "length",
        context.fits(length, int(mask[begin : begin + context.concrete(length)].sum())),
    )


def slice_(call: Call, context: Context) -> None:
    dim = context.dim(_argument(call, "dim")[1] or 0)
    mask = context.mask(call.node, dim)
    if mask.all():
        return
    start, end, step = (_argument(call, name)[1] for name in ("start", "end", "step"))
    part, gathered = _bounds(slice(start, end, step), mask, context)
    if gathered is not None:
        call.gathers.append((dim, gathered))
    for name, value in (("start", part.start), ("end", part.stop), ("step", part.step or 1)):
        _set(call, name, value)


def select(call: Call, context: Context) -> None:
    dim = context.dim(_argument(call, "dim")[1])
    mask = context.mask(call.node, dim)
    _, index = _argument(call, "index")
    if not mask.all():
        _set(call, "index", int(mask[: context.concrete(index) % len(mask)].sum()))


def index_select(call: Call, context: Context) -> None:
    dim = context.dim(_argument(call, "dim")[1])
    mask = context.mask(call.node, dim)
    index = context.concrete(_argument(call, "index")[1])
    if not mask.all():
        call.gathers.append((dim, index[mask[index]]))
        call.op, call.target = "gathered", None


def index(call: Call, context: Context) -> None:
    """``x[...]``: bounds of slices, positions in constant index tensors."""
    given = call.args[1]
    if _is_cut_itself(call, context, given):
        return
    parts = given if isinstance(given, tuple) else (given,)
    made: list[Any] = []
    dim = 0
    rank = len(context.source.shape)
    taken = sum(_consumes(p) for p in parts)
    for part in parts:
        if part is Ellipsis:
            dim += rank - taken
            made.append(part)
            continue
        width = 0 if _takes_all(part) else _consumes(part)
        mask = context.widths.along(context.source, dim) if width else None
        if width and mask is None:
            raise RewriteError(
                call.node, f"channels spread over several dims are cut at %{call.node.name}"
            )
        made.append(part if mask is None or mask.all() else _part(call, context, part, dim, mask))
        dim += _consumes(part)
    if call.use.rule.kind == "assign":
        made = _at_positions(call, context, made)
    call.args = (call.args[0], tuple(made) if isinstance(given, tuple) else made[0], *call.args[2:])


def _at_positions(call: Call, context: Context, parts: list[Any]) -> list[Any]:
    """What is assigned to cannot be gathered before: kept positions are listed instead."""
    if not call.gathers:
        return parts
    if len(call.gathers) > 1 or not all(isinstance(p, slice) or p is Ellipsis for p in parts):
        raise RewriteError(call.node, f"several positions meet at %{call.node.name}")
    (dim, positions) = call.gathers.pop()
    rank = torch.cumsum(context.mask(call.node, dim), 0) - 1
    at = dim
    if Ellipsis in parts and parts.index(Ellipsis) < dim:
        at = dim - len(context.source.shape) + len(parts)
    places = rank[positions].tolist()
    return [_places(call, context, places) if i == at else part for i, part in enumerate(parts)]


def _places(call: Call, context: Context, places: list[int]) -> Any:
    """Positions to assign to: a slice where they are evenly spaced, as it casts what it gets."""
    step = places[1] - places[0] if len(places) > 1 else 1
    if step > 0 and places == list(range(places[0], places[-1] + 1, step)):
        return slice(places[0], places[-1] + 1, step)
    types = {t.dtype for t in map(context.concrete, (call.args[0], call.args[2])) if _has_type(t)}
    if len(types) > 1:
        raise RewriteError(call.node, f"what is assigned at %{call.node.name} has another dtype")
    return places


def _has_type(value: Any) -> bool:
    return isinstance(value, Tensor)


def _takes_all(part: Any) -> bool:
    return isinstance(part, slice) and part == slice(None)


def _is_cut_itself(call: Call, context: Context, part: Any) -> bool:
    """Whether an assignment is by a mask that has the channels of what it is assigned to."""
    value = context.widths.value(part) if isinstance(part, fx.Node) else None
    return call.use.rule.kind == "assign" and isinstance(value, Value) and bool(value.layers)


def _consumes(part: Any) -> int:
    concrete = part.meta["val"] if isinstance(part, fx.Node) else part
    if concrete is None or concrete is Ellipsis or isinstance(concrete, bool):
        return 0
    if isinstance(concrete, Tensor) and concrete.dtype == torch.bool:
        return concrete.ndim
    return 1


def _part(call: Call, context: Context, part: Any, dim: int, mask: Tensor) -> Any:
    if isinstance(part, slice):
        made, gathered = _bounds(part, mask, context)
        if gathered is not None:
            call.gathers.append((dim, gathered))
        return made
    concrete = context.concrete(part)
    if isinstance(concrete, int):
        return int(mask[: concrete % len(mask)].sum())
    positions = torch.as_tensor(concrete)
    others = [p for p in call.args[1] if p is not part] if isinstance(call.args[1], tuple) else []
    if positions.ndim != 1 or any(isinstance(context.concrete(p), (Tensor, list)) for p in others):
        raise RewriteError(call.node, f"several index tensors meet at %{call.node.name}")
    if positions.dtype == torch.bool:
        positions = positions.nonzero().flatten()
    positions = positions % len(mask)
    call.gathers.append((dim, positions[mask[positions]]))
    return slice(None)


def _bounds(part: slice, mask: Tensor, context: Context) -> tuple[slice, Tensor | None]:
    """New bounds over what is kept; a strided slice gathers instead."""
    begin, end, step = slice(*map(context.concrete, (part.start, part.stop, part.step))).indices(
        len(mask)
    )
    if step != 1:
        positions = torch.arange(begin, end, step)
        return slice(None), positions[mask[positions]]
    start = None if part.start is None else context.fits(part.start, int(mask[:begin].sum()))
    stop = (
        None if part.stop is None else context.fits(part.stop, int(mask[: max(end, begin)].sum()))
    )
    return slice(start, stop), None


def pad(call: Call, context: Context) -> None:
    """Padded channels: as many on each side as are kept of them."""
    _, given = _argument(call, "pad")
    rank = len(context.source.shape)
    out = context.widths.value(call.node)
    made = list(given)
    for i in range(0, len(given), 2):
        before, after = context.concrete(given[i]), context.concrete(given[i + 1])
        mask = context.widths.along(out, rank - 1 - i // 2)
        if (before or after) and mask is not None and not mask.all():
            if before < 0 or after < 0:
                raise RewriteError(
                    call.node, f"channels are cropped by a negative pad at %{call.node.name}"
                )
            made[i] = context.fits(given[i], int(mask[:before].sum()))
            made[i + 1] = context.fits(given[i + 1], int(mask[len(mask) - after :].sum()))
    _set(call, "pad", made)


FIXES: dict[str, Fix] = {
    "shape": shape, "sizes": sizes, "squeeze": squeeze, "sections": sections, "chunks": chunks,
    "tensor_split": tensor_split, "narrow": narrow, "slice": slice_, "select": select,
    "index_select": index_select, "index": index, "pad": pad, "repeats": repeats,
}  # fmt: skip

__all__ = ["FIXES", "Call", "Context", "operator"]
