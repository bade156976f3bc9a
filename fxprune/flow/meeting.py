"""Values that meet: channels at the same place go together, and stay beside what has none."""

from __future__ import annotations

import math
from collections.abc import Sequence

from torch import fx

from ..ids import ColumnTie, Layer, RowTie, Value
from ..rules import Use
from .run import Run


def meet(
    run: Run, node: fx.Node, values: list[Value], shape: tuple[int, ...], use: Use
) -> tuple[list[Layer], bool]:
    """Broadcast values: what meets is tied, or frozen by what has no channels."""
    laid = [[_lift(layer, len(shape)) for layer in v.layers] for v in values]
    real = [real_dims(v, len(shape)) for v in values]
    merged = tied(run, node, laid, real)
    zero = _zero(run, node, use, values, laid)
    out = [Layer(m.ids, any(set(m.varying) & z for z in zero), m.origin) for m in merged]
    return out, bool(values) and all(v.weight for v in values)


def tied(
    run: Run, node: fx.Node, operands: Sequence[Sequence[Layer]], real: Sequence[set[int]]
) -> list[Layer]:
    """Tie layers of different operands that vary along the same dims; the widest are left.

    `real` are the dims of each operand that are not broadcast: ids that meet one there which
    has no layer for them are frozen.
    """
    merged: list[Layer] = []
    owners: list[set[int]] = []
    for i, layers in enumerate(operands):
        for layer in layers:
            dims = set(layer.varying)
            free = (k for k in range(len(merged)) if i not in owners[k])
            k = next((k for k in free if dims & set(merged[k].varying)), None)
            if k is None:
                merged.append(layer)
                owners.append({i})
                continue
            reach = set().union(*(real[j] for j in owners[k])), real[i]
            owners[k].add(i)
            if _crossed(merged[k], layer):
                passed = _passed_beside(run, node, merged[k], layer, reach)
                merged[k : k + 1] = passed
                owners[k : k + 1] = [set(owners[k]) for _ in passed]
            else:
                merged[k] = _tied_pair(run, node, merged[k], layer, reach)
    plain = [
        set().union(*(dims for i, dims in enumerate(real) if i not in mine)) & set(la.varying)
        for la, mine in zip(merged, owners, strict=True)
    ]
    return [
        layer
        for layer, dims in zip(merged, plain, strict=True)
        if not dims or _passes_plain(run, node, layer, dims)
    ]


def _tied_pair(
    run: Run, node: fx.Node, a: Layer, b: Layer, reach: tuple[set[int], set[int]]
) -> Layer:
    """Tie two layers; `reach` are the dims along which the values they belong to are no
    broadcasts. What is as wide as the rows are long can lose them only as a whole."""
    narrow, wide = sorted((a, b), key=lambda layer: len(layer.varying))
    beside = set(wide.varying) - set(narrow.varying)
    if by_rows(set(narrow.varying), wide) and not beside & reach[narrow is b]:
        row_tie(run, node, wide, set(narrow.varying), narrow)
    elif _by_columns(run, set(narrow.varying), wide) and not beside & reach[narrow is b]:
        _column_tie(run, node, wide, set(narrow.varying), narrow)
    else:
        run.ids.tie(node, narrow.ids, wide.ids)
    return wide if len(wide.varying) > len(narrow.varying) else a


def _passed_beside(
    run: Run, node: fx.Node, a: Layer, b: Layer, reach: tuple[set[int], set[int]]
) -> list[Layer]:
    """Layers that share rows and have columns of their own: those not frozen by the other."""
    shared = set(a.varying) & set(b.varying)
    row_tie(run, node, a, shared, b)
    met = (a, (set(a.varying) - shared) & reach[1]), (b, (set(b.varying) - shared) & reach[0])
    return [la for la, dims in met if not dims or _passes_plain(run, node, la, dims)]


def _passes_plain(run: Run, node: fx.Node, layer: Layer, dims: set[int]) -> bool:
    """Meet something without channels along `dims`: rows stay, whole layers are frozen."""
    if by_rows(dims, layer):
        row_tie(run, node, layer, dims, None)
        return True
    if _by_columns(run, dims, layer):
        _column_tie(run, node, layer, dims, None)
        return True
    run.ids.freeze(node, layer.ids, f"meets a constant or an input at %{node.name}")
    return False


def row_tie(run: Run, node: fx.Node, wide: Layer, dims: set[int], narrow: Layer | None) -> None:
    """What meets whole rows of channels: see `RowTie`."""
    order = [*sorted(dims), *(d for d in range(wide.ids.ndim) if d not in dims)]
    rows = math.prod(wide.ids.shape[d] for d in dims)
    ids = wide.ids.permute(order).reshape(rows, -1)
    other = None if narrow is None else narrow.ids.permute(order).reshape(rows, -1)
    run.ids.rows.append(RowTie(node, ids, other))


def _by_columns(run: Run, dims: set[int], wide: Layer) -> bool:
    """Whether `dims` are those along which channels of rows go, and rows may go whole."""
    return run.heads != "dims" and {wide.varying[-1]} == dims < set(wide.varying)


def _column_tie(run: Run, node: fx.Node, wide: Layer, dims: set[int], narrow: Layer | None) -> None:
    """What meets the columns of all rows: see `ColumnTie`."""
    (dim,) = dims
    ids = wide.ids.movedim(dim, -1).reshape(-1, wide.ids.shape[dim])
    other = None if narrow is None else narrow.ids.reshape(-1)
    run.ids.columns.append(ColumnTie(node, ids, other))


def _zero(
    run: Run, node: fx.Node, use: Use, values: list[Value], laid: list[list[Layer]]
) -> list[set[int]]:
    """The sets of dims whose masked channels are zero in the result."""
    if use.rule.zero == "no":
        return []
    per = [[set(layer.varying) for layer in layers if layer.zero] for layers in laid]
    if use.rule.zero == "any":
        chosen = per[: len(use.rule.operands) or None]
        return [dims for dims_list in chosen for dims in dims_list]
    scalars = [
        a for a in node.args[: len(use.rule.operands)] if isinstance(a, (int, float)) and a != 0
    ]
    if scalars or not per:
        return []
    return [dims for dims in per[0] if all(any(dims & other for other in o) for o in per[1:])]


def real_dims(value: Value, rank: int) -> set[int]:
    """The dims of a broadcast to `rank` dims along which a value has more than one element."""
    shift = rank - len(value.shape)
    return {d + shift for d, size in enumerate(value.shape) if size > 1}


def by_rows(dims: set[int], wide: Layer) -> bool:
    """Whether `dims` are some of the layer's, and not the one along which channels go."""
    return dims < set(wide.varying) and wide.varying[-1] not in dims


def _crossed(a: Layer, b: Layer) -> bool:
    """Whether two layers share rows, and each has columns along dims of its own."""
    shared = set(a.varying) & set(b.varying)
    return by_rows(shared, a) and by_rows(shared, b)


def _lift(layer: Layer, rank: int) -> Layer:
    ids = layer.ids
    return Layer(ids.reshape([1] * (rank - ids.ndim) + list(ids.shape)), layer.zero, layer.origin)
