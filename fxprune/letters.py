"""How ids pass an op whose rule is a line of letters.

A letter in two inputs and not in the output is contracted (tied), one in an input and the output is
tied through, one only in a weight and the output makes new channels, one in a single input only is
a window (never shrinks). The roles follow from where a letter stands; no op is named here.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Tensor, fx

from . import heads as attention
from .heads import Heads
from .ids import ColumnTie, Ids, Layer, Role, RowTie, Value
from .pattern import Binding
from .rules import Rule

Dims = tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Named:
    """Ids over letters instead of dims; only letters along which they may vary."""

    letters: tuple[str, ...]
    ids: Tensor
    zero: bool = True
    origin: Tensor | None = None

    def over(self, letters: Sequence[str]) -> Tensor:
        """The ids with one axis a letter of `letters`, in that order, size 1 for the others."""
        order = [self.letters.index(letter) for letter in letters if letter in self.letters]
        ids = self.ids.permute(order)
        for axis, letter in enumerate(letters):
            if letter not in self.letters:
                ids = ids.unsqueeze(axis)
        return ids


@dataclass
class DimsUse:
    """What a dims rule did at one node; the rewriter reads the new sizes of letters from it."""

    rule: Rule
    binding: Binding
    layers: list[Named] = field(default_factory=list)
    params: dict[str, str] = field(default_factory=dict)
    windows: list[tuple[int, int]] = field(default_factory=list)  # (operand, dim) read by position

    def given(self, operand: str) -> bool:
        """Whether the call has this operand."""
        return self.binding.inputs[self.rule.operands.index(operand)] is not None

    def macs(self, kept: Tensor | None = None) -> int:
        """Multiply-accumulates of the call; with only the ids in the mask `kept`, where given."""
        product = 1 if self.rule.macs else 0
        for letter in self._letters(self.rule.macs):
            old = self.binding.sizes[letter]
            product *= old if kept is None else new_size(letter, self.layers, kept, old)
        return product

    def _letters(self, text: str) -> Iterator[str]:
        for word in text.split():
            if not word.startswith("*"):
                yield word
                continue
            for name in self.binding.sizes:  # `*k` stands for k1, k2, ...
                if name != word[1:] and name.rstrip("0123456789") == word[1:]:
                    yield name


def operand_names(rule: Rule, count: int) -> list[str]:
    """The names of a call's operands; numbers for those that the rule does not name."""
    return [*rule.operands[:count], *map(str, range(len(rule.operands), count))]


@dataclass
class _Call:
    ids: Ids
    node: fx.Node
    rule: Rule
    binding: Binding
    values: list[Value | None]
    heads: Heads = "dims"
    windows: list[tuple[int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.sizes = self.binding.sizes
        self._real = [self._letters(dims or ()) for dims in self.binding.inputs]
        self.out = self._letters(self.binding.output)

    def _letters(self, dims: Dims) -> set[str]:
        return {letter for names in dims for letter in names if self.sizes[letter] > 1}

    def real(self, i: int) -> set[str]:
        """Letters of operand `i` with more than one element there."""
        return self._real[i]

    def is_raw(self, i: int) -> bool:
        value = self.values[i]
        return value is not None and value.param is not None


def flow(
    ids: Ids,
    node: fx.Node,
    rule: Rule,
    binding: Binding,
    values: list[Value | None],
    heads: Heads = "dims",
) -> tuple[list[Layer], DimsUse, list[Named]]:
    """Run a dims rule: bind parameters, tie, and return the output's layers.

    The last item holds the layers that are mixed by a normalisation, for the caller's policy to
    judge.
    """
    call = _Call(ids, node, rule, binding, values, heads)
    layers = {i: _named_layers(call, i) for i in range(len(call.values)) if not call.is_raw(i)}
    layers = {i: _without_windows(call, i, found) for i, found in layers.items()}
    layers = _blocks_as_wholes(call, layers)
    if heads != "dims":
        layers = _heads_as_wholes(call, layers)
    else:
        _heads_stay(call, layers)
    merged = _tied(call, layers)
    merged = _bind_params(call, merged)
    made = _make_channels(call, merged)
    mixed: list[Named] = []
    found = (_passed(call, layers, named, mixed) for named in [*merged, *made])
    out = [layer for layer in found if layer]
    use = DimsUse(call.rule, call.binding, [*merged, *made], windows=call.windows)
    for name, value in zip(operand_names(rule, len(values)), call.values, strict=True):
        if value is not None and value.param is not None:
            use.params[name] = value.param
    return out, use, mixed


def _named_layers(call: _Call, i: int) -> list[Named]:
    value, dims = call.values[i], call.binding.inputs[i]
    if value is None or dims is None:
        return []
    return [named for layer in value.layers if (named := _named(call, layer, dims)).letters]


def _named(call: _Call, layer: Layer, dims: Dims) -> Named:
    letters: list[str] = []
    for names, size in zip(dims, layer.ids.shape, strict=True):
        if size > 1:
            split = [name for name in names if call.sizes[name] > 1]
            if len(split) > 1:
                call.ids.split(call.node, _split_axis(layer.ids, dims, call.sizes))
            letters += split
    shape = [call.sizes[letter] for letter in letters]
    return Named(tuple(letters), layer.ids.reshape(shape), layer.zero, layer.origin)


def _split_axis(ids: Tensor, dims: Dims, sizes: Mapping[str, int]) -> Tensor:
    shape = [
        sizes[n]
        for names, size in zip(dims, ids.shape, strict=True)
        if size > 1
        for n in names
        if sizes[n] > 1
    ]
    return ids.reshape(shape)


def _along(call: _Call, named: Named, gone: Iterable[str]) -> Named:
    """Tie along the letters `gone`, and forget them."""
    gone = [letter for letter in gone if letter in named.letters]
    if not gone:
        return named
    ids = named.ids
    for letter in gone:
        ids = ids.narrow(named.letters.index(letter), 0, 1)
    call.ids.tie(call.node, named.ids, ids)
    rest = tuple(letter for letter in named.letters if letter not in gone)
    return Named(rest, ids.reshape([call.sizes[letter] for letter in rest]), named.zero)


def _without_windows(call: _Call, i: int, layers: list[Named]) -> list[Named]:
    others = {letter for j in range(len(call.values)) if j != i for letter in call.real(j)}
    windows = call.real(i) - others - call.out
    kept = []
    for named in layers:
        if set(named.letters) <= windows and _can_be_wide(call, i, named):
            call.windows.append((i, _home(call, i, named)))
        elif set(named.letters) <= windows:
            call.ids.freeze(call.node, named.ids, "is read by position, as in a window")
        else:
            kept.append(_along(call, named, windows))
    return kept


def _can_be_wide(call: _Call, i: int, named: Named) -> bool:
    """Whether zeros may be laid out where channels went, and the op be run over all places.

    Not in computed kernels, which make channels of their own: their places are no channels.
    """
    value, dims = call.values[i], call.binding.inputs[i] or ()
    single = isinstance(call.node.meta["val"], Tensor)
    others = {letter for j in range(len(call.values)) if j != i for letter in call.real(j)}
    kernel = i > 0 and bool(call.real(i) & call.out - others)
    data = value is not None and not value.weight and not kernel
    return single and data and named.zero and named.letters in dims


def _home(call: _Call, i: int, named: Named) -> int:
    return (call.binding.inputs[i] or ()).index(named.letters)


def places(use: DimsUse) -> list[int]:
    """Dims of the output that the op makes: where a window stood."""
    given = {n for dims in use.binding.inputs for names in dims or () for n in names}
    sizes, out = use.binding.sizes, use.binding.output
    return [
        d
        for d, names in enumerate(out)
        if len(names) == 1 and names[0] not in given and sizes[names[0]] > 1
    ]


def _made_letters(call: _Call) -> list[tuple[list[str], list[str]]]:
    """For each output dim that weights make: letters passed on from others, letters made."""
    raw = {letter for i in range(len(call.values)) if call.is_raw(i) for letter in call.real(i)}
    given = {
        letter for i in range(len(call.values)) if not call.is_raw(i) for letter in call.real(i)
    }
    found = []
    for names in call.binding.output:
        made = [n for n in names if n in raw - given]
        if made:
            found.append(([n for n in names if n in given], made))
    return found


def _blocks_as_wholes(call: _Call, layers: dict[int, list[Named]]) -> dict[int, list[Named]]:
    """Blocks of one channel on either side (depthwise convolutions) come and go whole."""
    for names in call.binding.output:
        for i, found in layers.items():
            passed = [n for n in names if n in call.real(i)]
            if len(names) > 1 and passed:
                inner = _beside(call, i, passed[0])
                rest = [n for n in names if n not in passed]
                whole = rest and math.prod(call.sizes[n] for n in rest) == 1
                if whole and inner - call.out:
                    layers = {
                        **layers,
                        i: [_along(call, named, inner - call.out) for named in found],
                    }
    return layers


def _heads_as_wholes(call: _Call, layers: dict[int, list[Named]]) -> dict[int, list[Named]]:
    """Rows of channels that a product of activations keeps apart come and go whole, or stay."""
    data = [i for i in layers if (value := call.values[i]) is not None and not value.weight]
    letters = {i: [named.letters for named in layers[i]] for i in data}
    heads = attention.shared(letters, call.out)
    if not heads:
        return layers
    whole = dict(layers)
    for i in data:
        whole[i] = [_along(call, named, _others(named, heads)) for named in layers[i]]
        for named in whole[i] if call.heads == "keep" else ():
            if set(named.letters) <= heads:
                call.ids.freeze(call.node, named.ids, "heads stay (heads='keep')")
    return whole


def _heads_stay(call: _Call, layers: dict[int, list[Named]]) -> None:
    """Rows that a product keeps apart do not go as a whole: behind it there is no channel for what
    it has summed over, and two operands that share rows alone would lose others."""
    if any(map(call.is_raw, range(len(call.values)))):
        return
    for i, named in ((i, named) for i, found in layers.items() for named in found):
        others = [la for j, found in layers.items() if j != i for la in found]
        shared = [set(la.letters) for la in others if not _matches(named, la)]
        summed = not set(named.letters) <= call.out
        rows = call.out if summed else set().union(*shared)
        own = [letter for letter in named.letters if letter in rows]
        if own and len(own) < len(named.letters):
            _rows_stay(call, named, own)


def _others(named: Named, heads: set[str]) -> set[str]:
    """Letters of a layer beside those of the heads, where it has both."""
    return set(named.letters) - heads if heads & set(named.letters) else set()


def _beside(call: _Call, i: int, letter: str) -> set[str]:
    dims = call.binding.inputs[i] or ()
    return {
        n for names in dims if letter in names for n in names if n != letter and call.sizes[n] > 1
    }


def _matches(a: Named, b: Named) -> bool:
    return set(a.letters) <= set(b.letters) or set(b.letters) <= set(a.letters)


def _numbers_rows(a: Named, b: Named) -> bool:
    """Whether `a` has one channel for each row of `b`: heads of attention, blocks."""
    return set(a.letters) < set(b.letters) and b.letters[-1] not in a.letters


def _row_tie(call: _Call, wide: Named, narrow: Named) -> None:
    rows = narrow.letters
    rest = [letter for letter in wide.letters if letter not in rows]
    ids = wide.over([*rows, *rest]).reshape(narrow.ids.numel(), -1)
    call.ids.rows.append(RowTie(call.node, ids, narrow.ids.reshape(-1, 1)))


def _tie(call: _Call, a: Named, b: Named) -> None:
    letters = [*a.letters, *(letter for letter in b.letters if letter not in a.letters)]
    call.ids.tie(call.node, a.over(letters), b.over(letters))


def _tied(call: _Call, operands: dict[int, list[Named]]) -> list[Named]:
    """Tie what meets; one layer is left for those tied, over the most letters.

    Layers of one operand are never tied to each other, though they may share letters. Ids that meet
    an operand which is as wide there, but has no channels left for them, are frozen.
    """
    merged: list[Named] = []
    owners: list[set[int]] = []
    found = [(i, named) for i, layers in operands.items() for named in layers]
    for i, named in sorted(found, key=lambda pair: -len(pair[1].letters)):
        free = [k for k in range(len(merged)) if i not in owners[k]]
        rows = [k for k in free if _numbers_rows(named, merged[k])]
        k = next((k for k in free if _matches(named, merged[k]) and k not in rows), None)
        if k is not None:
            owners[k].add(i)
            _tie(call, merged[k], named)
            zero = merged[k].zero or named.zero
            merged[k] = Named(merged[k].letters, merged[k].ids, zero, merged[k].origin)
        elif rows:
            for k in rows:
                owners[k].add(i)
                _row_tie(call, merged[k], named)
        else:
            merged.append(named)
            owners.append({i})
    return [
        named
        for named, mine in zip(merged, owners, strict=True)
        if not any(_stopped(call, named, j) for j in operands if j not in mine)
    ]


def _stopped(call: _Call, named: Named, j: int) -> bool:
    """Freeze ids that meet operand `j`, which has no channels for them."""
    if call.values[j] is None or not _meets(call, named, j):
        return False
    name = call.rule.operands[j] if j < len(call.rule.operands) else "an operand"
    call.ids.freeze(call.node, named.ids, f"meets `{name}`, which has no channels for it")
    return True


def _meets(call: _Call, named: Named, j: int) -> bool:
    contracted, real = set(named.letters) - call.out, call.real(j)
    return set(named.letters) <= real or bool(contracted and contracted <= real)


def _bind_params(call: _Call, layers: list[Named]) -> list[Named]:
    """Give each parameter no rule has read yet the ids of what it meets."""
    for i in range(len(call.values)):
        if not call.is_raw(i):
            continue
        for k, named in enumerate(layers):
            contracted = set(named.letters) - call.out
            shared = set(named.letters) & call.real(i)
            if not shared or not contracted <= call.real(i):
                continue
            role: Role = "in" if contracted else _role(call, shared)
            if call.heads != "dims" and len(shared) < len(named.letters):
                _bind_columns(call, i, named, role)
                continue
            layers[k] = named = _along(call, named, set(named.letters) - call.real(i))
            _bind(call, i, named, role)
    return layers


def _role(call: _Call, letters: set[str]) -> Role:
    """What only an added operand brings, as a computed bias does, the weight makes."""
    added = {i for i, name in enumerate(call.rule.operands) if name in call.rule.adds}
    data = [i for i in range(len(call.values)) if not call.is_raw(i) and call.values[i] is not None]
    if set(data) <= added or any(letters & call.real(i) for i in data if i not in added):
        return "through"
    return "out"


def _bind(call: _Call, i: int, named: Named, role: Role) -> None:
    value, dims = call.values[i], call.binding.inputs[i]
    assert value is not None and value.param is not None and dims is not None
    if call.rule.scales and call.rule.scales == call.rule.operands[i]:
        role = "scale"
    homes = [d for d, names in enumerate(dims) if set(names) & set(named.letters)]
    dim = next((d for d in homes if set(named.letters) <= set(dims[d])), homes[-1])
    own = [n for n in dims[dim] if call.sizes[n] > 1]
    block = [n for n in named.letters if n not in own]
    letters = [*block, *own]
    shape = [call.sizes[n] for n in letters]
    ids = named.over(letters).expand(shape)
    if block:
        leads = len(block) == 1 and dim != 0 and dims[0] and dims[0][0] == block[0]
        if not leads:
            named = _along(call, named, block)
            return _bind(call, i, named, role)
        if all(names == (block[0],) for names in call.binding.output if block[0] in names):
            _rows_stay(call, named, block)  # the parameter's own blocks cannot go
        ids = ids.reshape(call.sizes[block[0]], -1)
    else:
        ids = ids.reshape(-1)
    call.ids.slot(value.param, dim, ids, role, call.node)


def _bind_columns(call: _Call, i: int, named: Named, role: Role) -> None:
    """Bind a parameter with one element a column, shared by all rows, which may go whole."""
    own = tuple(letter for letter in named.letters if letter in call.real(i))
    rows = [letter for letter in named.letters if letter not in own]
    other = Named(own, call.ids.fresh(*(call.sizes[n] for n in own)))
    ids = named.over([*rows, *own]).reshape(-1, other.ids.numel())
    call.ids.columns.append(ColumnTie(call.node, ids, other.ids.reshape(-1)))
    _bind(call, i, other, role)


def _make_channels(call: _Call, merged: list[Named]) -> list[Named]:
    made_layers = []
    for passed, made in _made_letters(call):
        inner = {
            n
            for i in range(len(call.values))
            if not call.is_raw(i)
            for p in passed
            for n in _beside(call, i, p)
        }
        if passed and not inner:
            continue  # depthwise with a multiplier: the outputs of a block are bound to its input
        letters = (*passed, *made)
        named = Named(letters, call.ids.fresh(*(call.sizes[n] for n in letters)))
        if len(letters) > 1:
            call.ids.split(call.node, named.ids)
        if passed:  # no block may go on one side alone
            for each in (named, *(la for la in merged if set(passed) < set(la.letters))):
                _rows_stay(call, each, passed)
        for i in range(len(call.values)):
            if call.is_raw(i) and set(made) <= call.real(i):
                _bind(call, i, named, "out")
        made_layers.append(named)
    return made_layers


def _passed(
    call: _Call, layers: dict[int, list[Named]], named: Named, mixed: list[Named]
) -> Layer | None:
    letters = set(named.letters)
    raws = [i for i in range(len(call.values)) if call.is_raw(i)]
    mixes = {m.lstrip("*") for m in call.rule.mixes}
    if any(letter.rstrip("0123456789") in mixes or letter in mixes for letter in letters):
        mixed.append(named)
    if not letters <= call.out:
        weighed = any(letters - call.out <= call.real(i) for i in raws)
        if (
            not weighed
            and not named.zero
            and not any(v is not None and v.weight for v in call.values)
        ):
            call.ids.freeze(
                call.node, named.ids, "is summed over channels that masking does not make zero"
            )
        return None
    zero = _stays_zero(call, layers, letters)
    return Layer(_on_output(call, named), zero, named.origin if len(letters) > 1 else None)


def _rows_stay(call: _Call, named: Named, rows: list[str]) -> None:
    rest = [letter for letter in named.letters if letter not in rows]
    count = math.prod(call.sizes[letter] for letter in rows)
    ids = named.over([*rows, *rest]).reshape(count, -1)
    call.ids.rows.append(RowTie(call.node, ids, None))


def _stays_zero(call: _Call, layers: dict[int, list[Named]], letters: set[str]) -> bool:
    """Whether the result is zero where channels over `letters` are masked: an operand that
    multiplies is zero there, and so is every one that is added."""

    def is_zero(i: int) -> bool:
        if call.is_raw(i):
            return bool(letters & call.real(i))
        return any(named.zero and letters & set(named.letters) for named in layers[i])

    rule = call.rule
    name = dict(enumerate(rule.operands))
    given = [i for i, value in enumerate(call.values) if value is not None]
    adds = [i for i in given if name.get(i) in rule.adds]
    chosen = [i for i in given if name.get(i) in rule.multiplies]
    multiplies = chosen if rule.multiplies else [i for i in given if i not in adds]
    return rule.zero != "no" and any(map(is_zero, multiplies)) and all(map(is_zero, adds))


def _on_output(call: _Call, named: Named) -> Tensor:
    letters = [n for names in call.binding.output for n in names]
    ids = named.over(letters)
    full = []
    for names in call.binding.output:
        varies = any(n in named.letters for n in names)
        full += [call.sizes[n] if varies else 1 for n in names]
    ids = ids.expand(full)
    shape, at = [], 0
    for names in call.binding.output:
        shape.append(math.prod(full[at : at + len(names)]))
        at += len(names)
    return ids.reshape(shape)


def new_size(letter: str, layers: Iterable[Named], kept: Tensor, old: int) -> int:
    """A letter's size once only ids in the mask `kept` are left, of all layers over it."""
    over = [named for named in layers if letter in named.letters]
    if not over:
        return old
    widest = max(over, key=lambda named: len(named.letters))
    mask = kept[widest.ids]
    for named in over:
        if named is not widest and set(named.letters) <= set(widest.letters):
            mask = mask & kept[named.over(widest.letters)]
    axis = widest.letters.index(letter)
    if axis == len(widest.letters) - 1 and axis > 0:
        return int(mask.sum(-1).max())
    others = [a for a in range(mask.ndim) if a != axis]
    return int((mask.any(dim=tuple(others)) if others else mask).sum())
