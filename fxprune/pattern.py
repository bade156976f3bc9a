"""The notation of dims rules, as text and as data, and its fit to real shapes.

``n (g i) *s, (g o) i *k, (g o)? -> n (g o) *t`` reads: the first operand has a batch dim ``n``, a
dim made of ``g`` blocks of ``i``, and any number of dims ``s``; the third may be absent. The same
letter is the same dim, wherever it stands. ``; *s = *k`` at the end says that these stars have
equally many dims.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

from .errors import RuleError

Shape = Sequence[int]


@dataclass(frozen=True)
class Atom:
    letter: str
    star: bool = False

    def __str__(self) -> str:
        return f"*{self.letter}" if self.star else self.letter


@dataclass(frozen=True)
class Term:
    """One dim (or, with a star, a run of dims); several atoms make a product, outermost first."""

    atoms: tuple[Atom, ...]

    @property
    def star(self) -> bool:
        return self.atoms[0].star

    def __str__(self) -> str:
        text = " ".join(map(str, self.atoms))
        return f"({text})" if len(self.atoms) > 1 else text


@dataclass(frozen=True)
class Operand:
    terms: tuple[Term, ...]
    optional: bool = False

    def letters(self) -> list[str]:
        return [atom.letter for term in self.terms for atom in term.atoms]

    def __str__(self) -> str:
        text = " ".join(map(str, self.terms))
        return text + "?" if self.optional else text


@dataclass(frozen=True)
class Pattern:
    """``equal`` names stars that stand for equally many dims."""

    inputs: tuple[Operand, ...]
    output: Operand
    equal: tuple[str, ...] = ()

    @cached_property
    def _hash(self) -> int:
        return hash((self.inputs, self.output, self.equal))

    def __hash__(self) -> int:
        return self._hash

    def __str__(self) -> str:
        text = ", ".join(map(str, self.inputs)) + " -> " + str(self.output)
        return text + ("; " + " = ".join(f"*{star}" for star in self.equal) if self.equal else "")


_TOKEN = re.compile(r"\s*(\*?[A-Za-z]\w*|[()?])")


def parse(text: str) -> Pattern:
    """Read a rule's dims; raise `RuleError` on anything that is not the notation."""
    left, arrow, right = text.partition("->")
    if not arrow:
        raise RuleError(
            f"`{text}` has no `->`", hint="write `inputs -> output`, as in `*b i, o i -> *b o`"
        )
    right, _, equal = right.partition(";")
    stars = tuple(name.strip().lstrip("*") for name in equal.split("=") if name.strip())
    pattern = Pattern(tuple(_operand(part) for part in left.split(",")), _operand(right), stars)
    _check(pattern)
    return pattern


def _operand(text: str) -> Operand:
    tokens, at = [], 0
    while at < len(text.rstrip()):
        found = _TOKEN.match(text, at)
        if not found:
            raise RuleError(
                f"`{text[at:].strip()}` is not part of the notation",
                hint="letters, `*letter`, `(a b)` and `?`",
            )
        tokens.append(found.group(1))
        at = found.end()
    optional = bool(tokens) and tokens[-1] == "?"
    return Operand(tuple(_terms(tokens[:-1] if optional else tokens, text)), optional)


def _terms(tokens: list[str], text: str):
    inside: list[Atom] | None = None
    for token in tokens:
        if token == "(" and inside is None:
            inside = []
        elif token == ")" and inside:
            yield Term(tuple(inside))
            inside = None
        elif token in "()?":
            raise RuleError(f"`{token}` is out of place in `{text.strip()}`")
        else:
            atom = Atom(token.lstrip("*"), token.startswith("*"))
            if inside is None:
                yield Term((atom,))
            elif atom.star:
                raise RuleError(
                    f"`*{atom.letter}` cannot stand inside brackets in `{text.strip()}`"
                )
            else:
                inside.append(atom)
    if inside is not None:
        raise RuleError(f"a bracket is not closed in `{text.strip()}`")


def _check(pattern: Pattern) -> None:
    kinds: dict[str, bool] = {}
    for operand in (*pattern.inputs, pattern.output):
        letters = operand.letters()
        twice = {letter for letter in letters if letters.count(letter) > 1}
        if twice:
            raise RuleError(
                f"`{min(twice)}` stands twice in `{operand}`",
                hint="a dim as wide as another of the same tensor needs a letter of its own",
            )
        for term in operand.terms:
            for atom in term.atoms:
                if kinds.setdefault(atom.letter, atom.star) != atom.star:
                    raise RuleError(
                        f"`{atom.letter}` stands both with and without a star in `{pattern}`"
                    )
    for star in pattern.equal:
        if not kinds.get(star):
            raise RuleError(f"`*{star}` is no star of `{pattern}`")
    if pattern.inputs[0].optional:
        raise RuleError(f"the first operand of `{pattern}` cannot be optional")
    if pattern.output.optional:
        raise RuleError(f"the output of `{pattern}` cannot be optional")


@dataclass(frozen=True)
class Binding:
    """A pattern on real shapes: the size of each letter, and the letters of each dim.

    A starred letter becomes ``s0, s1, ...``. An operand of size 1 where others are larger is
    broadcast: that dim has no letters.
    """

    sizes: Mapping[str, int]
    inputs: tuple[tuple[tuple[str, ...], ...] | None, ...]
    output: tuple[tuple[str, ...], ...]


def bind(
    pattern: Pattern,
    shapes: Sequence[Shape | None],
    output: Shape,
    *,
    sizes: Mapping[str, int] | None = None,
    ranks: Mapping[str, int] | None = None,
) -> Binding:
    """Fit `pattern` to the operands' shapes (None: absent) and the output's shape.

    `sizes` gives letters that the shapes alone do not (``groups``), `ranks` the lengths of stars.
    """
    plain = tuple(None if shape is None else tuple(shape) for shape in shapes)
    given = (tuple(sorted((sizes or {}).items())), tuple(sorted((ranks or {}).items())))
    return _bind(pattern, plain, tuple(output), *given)


def resized(
    dims: Sequence[Sequence[tuple[str, ...]]], shapes: Sequence[Shape], sizes: Mapping[str, int]
) -> dict[str, int]:
    """The sizes of letters, laid out over `dims` as a `Binding` has them, for other shapes.

    `sizes` gives those that shapes alone do not. Raises `RuleError` where they do not agree.
    """
    words = [" ".join("(" + " ".join(names) + ")" for names in each) for each in dims]
    return _solve(list(zip(dims, shapes, strict=True)), dict(sizes), ", ".join(words))


def sizes_of(operands: Sequence[tuple[Operand, Shape]], known: Mapping[str, int]) -> dict[str, int]:
    """The sizes of letters, as far as the shapes of some operands tell them; `known` those of
    letters that share a dim with others."""
    dims = [pair for operand, shape in operands for pair in _unstarred(operand, shape)]
    found = {atoms[0]: size for atoms, size in dims if len(atoms) == 1}
    for atoms, size in dims:
        given = {letter: n for letter, n in {**known, **found}.items() if letter in atoms}
        open_ = [letter for letter in atoms if letter not in given]
        if len(open_) == 1 and (rest := math.prod(given.values())) and size % rest == 0:
            found |= {**given, open_[0]: size // rest}
    return found


def _unstarred(operand: Operand, shape: Shape) -> Iterator[tuple[tuple[str, ...], int]]:
    """The letters and sizes of the dims before the first star."""
    for term, size in zip(operand.terms, shape, strict=False):
        if term.star:
            return
        yield tuple(atom.letter for atom in term.atoms), size


@lru_cache(maxsize=4096)
def _bind(pattern: Pattern, shapes, output, sizes, ranks) -> Binding:
    counts = tuple(None if shape is None else len(shape) for shape in shapes)
    dims = _laid(pattern, counts, len(output), ranks)
    pairs = list(zip(dims, [s for s in (*shapes, output) if s is not None], strict=True))
    letters = _solve(pairs, dict(sizes), pattern)
    laid = [
        tuple(
            () if size == 1 and _product(names, letters) > 1 else names
            for names, size in zip(d, s, strict=True)
        )
        for d, s in pairs
    ]
    found = iter(laid[:-1])
    return Binding(letters, tuple(None if s is None else next(found) for s in shapes), laid[-1])


@lru_cache(maxsize=1024)
def _laid(pattern: Pattern, counts, output: int, ranks) -> list[list[tuple[str, ...]]]:
    """The letters of each dim of the operands that are there, and of the output."""
    for operand, count in zip(pattern.inputs, counts, strict=True):
        if count is None and not operand.optional:
            raise RuleError(f"operand `{operand}` of `{pattern}` is missing")
    pairs = [(o, n) for o, n in zip(pattern.inputs, counts, strict=True) if n is not None]
    pairs.append((pattern.output, output))
    known = _star_ranks(pairs, dict(ranks), pattern)
    return [_dims(operand, count, known) for operand, count in pairs]


def _star_ranks(pairs, ranks: dict[str, int], pattern: Pattern) -> dict[str, int]:
    for _ in range(len(pairs) + 1):
        for operand, count in pairs:
            stars = [term.atoms[0].letter for term in operand.terms if term.star]
            unknown = [letter for letter in stars if letter not in ranks]
            rest = count - (len(operand.terms) - len(stars)) - sum(ranks.get(s, 0) for s in stars)
            if len(unknown) == 1 and rest >= 0:
                ranks[unknown[0]] = rest
    # a star stands for the broadcast of its operands: the longest one gives its rank
    for operand, count in pairs:
        stars = [term.atoms[0].letter for term in operand.terms if term.star]
        if len(stars) == 1:
            ranks[stars[0]] = max(ranks.get(stars[0], 0), count - len(operand.terms) + 1)
        elif any(letter not in ranks for letter in stars):
            raise RuleError(f"`{pattern}`: the shapes do not say how many dims each star has")
    for first, other in zip(pattern.equal, pattern.equal[1:], strict=False):
        if ranks[first] != ranks[other]:
            counts = f"`*{first}` has {ranks[first]} dims here, `*{other}` has {ranks[other]}"
            raise RuleError(f"`{pattern}`: {counts}", hint="is the batch dim missing?")
    return ranks


def _dims(operand: Operand, count: int, ranks: Mapping[str, int]) -> list[tuple[str, ...]]:
    stars = [term for term in operand.terms if term.star]
    missing = len(operand.terms) - len(stars) + sum(ranks[t.atoms[0].letter] for t in stars) - count
    dims: list[tuple[str, ...]] = []
    for term in operand.terms:
        letter = term.atoms[0].letter
        if not term.star:
            dims.append(tuple(atom.letter for atom in term.atoms))
        else:  # a shorter operand lacks the leading dims of its star
            skip = min(max(missing, 0), ranks[letter])
            missing -= skip
            dims += [(f"{letter}{i}",) for i in range(skip, ranks[letter])]
    if missing or len(dims) != count:
        raise RuleError(f"`{operand}` does not fit a value of {count} dims")
    return dims


def _product(names: Sequence[str], sizes: Mapping[str, int]) -> int:
    return math.prod(sizes.get(name, 1) for name in names)


def _solve(pairs, sizes: dict[str, int], pattern: Pattern | str) -> dict[str, int]:
    changed = True
    while changed:
        changed = False
        for dims, shape in pairs:
            for names, size in zip(dims, shape, strict=True):
                unknown = [name for name in names if name not in sizes]
                known = _product(names, sizes)
                if len(unknown) == 1 and known and size % known == 0:
                    sizes[unknown[0]], changed = size // known, True
                elif not unknown and len(names) == 1 and sizes[names[0]] == 1 < size:
                    sizes[names[0]], changed = size, True  # the other operand was broadcast
    for dims, shape in pairs:
        for names, size in zip(dims, shape, strict=True):
            if any(name not in sizes for name in names):
                raise RuleError(
                    f"`{pattern}`: the shapes do not give the size of `{' '.join(names)}`"
                )
            if size not in (1, _product(names, sizes)):
                known, term = _product(names, sizes), " ".join(names)
                raise RuleError(
                    f"`{pattern}`: `{term}` is {known} in one operand, {size} in another"
                )
    return sizes
