"""Patterns of products whose letters come from the call: einsum and matmul."""

from __future__ import annotations

from collections.abc import Sequence

from .errors import RuleError
from .pattern import Atom, Operand, Pattern, Term


def of_equation(equation: str, shapes: Sequence[Sequence[int]]) -> Pattern:
    """``nchw,oc->nohw`` as a pattern; an ellipsis becomes letters, a missing output is inferred."""
    left, arrow, right = equation.replace(" ", "").partition("->")
    inputs = left.split(",")
    if len(inputs) != len(shapes):
        raise RuleError(
            f"einsum `{equation}` names {len(inputs)} operands, {len(shapes)} are given"
        )
    ranks = [
        len(s) - len(text.replace("...", ""))
        for text, s in zip(inputs, shapes, strict=True)
        if "..." in text
    ]
    rank = max(ranks, default=0)
    named = [_letters(text, len(s), rank) for text, s in zip(inputs, shapes, strict=True)]
    if not arrow:
        flat = [letter for letters in named for letter in letters]
        right = "".join(sorted({x for x in flat if flat.count(x) == 1 and not x.startswith("e_")}))
        right = ("..." if rank else "") + right
    output = _letters(right, None, rank)
    for letters in (*named, output):
        if len(set(letters)) != len(letters):
            raise RuleError(f"einsum `{equation}` takes a diagonal")
    return Pattern(tuple(_operand(letters) for letters in named), _operand(output))


def _letters(text: str, rank: int | None, ellipsis: int) -> list[str]:
    before, dots, after = text.partition("...")
    if not dots:
        return list(text)
    count = ellipsis if rank is None else rank - len(before) - len(after)
    return [*before, *(f"e_{i}" for i in range(ellipsis - count, ellipsis)), *after]


def _operand(letters: Sequence[str]) -> Operand:
    return Operand(tuple(Term((Atom(letter),)) for letter in letters))


def of_matmul(left: int, right: int) -> Pattern:
    """The pattern of ``a @ b`` for operands of these ranks; leading dims broadcast."""
    batch = max(left, right) - 2
    names = [f"b_{i}" for i in range(max(batch, 0))]
    a = ["k"] if left == 1 else [*names[len(names) - (left - 2) :], "i", "k"]
    b = ["k"] if right == 1 else [*names[len(names) - (right - 2) :], "k", "j"]
    out = names + (["i"] if left > 1 else []) + (["j"] if right > 1 else [])
    return Pattern((_operand(a), _operand(b)), _operand(out))
