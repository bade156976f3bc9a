"""The notation of dims rules: text and data are the same, and shapes give letters their sizes."""

from __future__ import annotations

import string

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fxprune import rules as rule_files
from fxprune.errors import RuleError
from fxprune.pattern import Atom, Operand, Pattern, Term, bind, parse

CONV = "n (g i) *s, (g o) i *k, (g o)? -> n (g o) *t; *s = *k = *t"

# -- text and data ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text",
    [
        CONV,
        "*b i, o i, o? -> *b o",
        "i, i -> ",
        "n c *s, c?, c?, c?, c? -> n c *s",
        "*a (h c) *b -> *a c *b",
        "x1 y_2 -> y_2 x1",
    ],
)
def test_text_survives_reading(text):
    assert str(parse(text)) == text
    assert parse(str(parse(text))) == parse(text)


def test_spaces_do_not_matter():
    assert parse("  n  ( g i )*s ,c?->n  *s; *s") == parse("n (g i) *s, c? -> n *s; *s")


def test_parts_of_a_pattern():
    pattern = parse("n (g i) *s, c? -> n *s")
    assert pattern.inputs[0] == Operand(
        (Term((Atom("n"),)), Term((Atom("g"), Atom("i"))), Term((Atom("s", star=True),)))
    )
    assert pattern.inputs[1].optional and not pattern.inputs[0].optional
    assert pattern.inputs[0].letters() == ["n", "g", "i", "s"]


@pytest.mark.parametrize("rule", [r for r in rule_files.current().rules if r.dims], ids=str)
def test_shipped_patterns_survive_reading(rule):
    assert parse(str(rule.pattern)) == rule.pattern


_PLAIN, _STARRED = string.ascii_lowercase[:13], string.ascii_lowercase[13:]


@st.composite
def operands(draw, optional: bool):
    letters = draw(st.lists(st.sampled_from(_PLAIN), unique=True, max_size=4))
    stars = draw(st.lists(st.sampled_from(_STARRED), unique=True, max_size=2))
    terms = []
    while letters:
        take = draw(st.integers(1, len(letters)))
        terms.append(Term(tuple(Atom(letter) for letter in letters[:take])))
        letters = letters[take:]
    terms += [Term((Atom(star, star=True),)) for star in stars]
    return Operand(tuple(draw(st.permutations(terms))), optional and draw(st.booleans()))


@st.composite
def patterns(draw):
    first = draw(operands(optional=False))
    rest = draw(st.lists(operands(optional=True), max_size=2))
    output = draw(operands(optional=False))
    stars = {a.letter for o in (first, *rest, output) for t in o.terms for a in t.atoms if a.star}
    equal = draw(st.permutations(sorted(stars))) if len(stars) > 1 and draw(st.booleans()) else ()
    return Pattern((first, *rest), output, tuple(equal))


@given(patterns())
def test_any_pattern_survives_writing(pattern):
    assert parse(str(pattern)) == pattern


@pytest.mark.parametrize(
    ("text", "fault"),
    [
        ("n c", "`n c` has no `->`"),
        ("n c c -> n", "`c` stands twice in `n c c`"),
        ("n (c c) -> n", "`c` stands twice"),
        ("n c -> n + c", "`+ c` is not part of the notation"),
        ("n 3 -> n", "`3` is not part of the notation"),
        ("n (c -> n", "a bracket is not closed in `n (c`"),
        ("n c) -> n", "`)` is out of place in `n c)`"),
        ("n () -> n", "`)` is out of place in `n ()`"),
        ("n ((c d)) -> n", "`(` is out of place"),
        ("n c? d -> n", "`?` is out of place"),
        ("n (*c d) -> n", "`*c` cannot stand inside brackets"),
        ("n c, *c -> n", "`c` stands both with and without a star"),
        ("n? -> n", "the first operand of `n? -> n` cannot be optional"),
        ("n, c -> c?", "the output of `n, c -> c?` cannot be optional"),
        ("n *s -> n *s; *t", "`*t` is no star of"),
        ("n *s -> n *s; *s = n", "`*n` is no star of"),
    ],
)
def test_what_is_not_a_pattern_is_refused(text, fault):
    with pytest.raises(RuleError) as error:
        parse(text)
    assert fault in str(error.value)


# -- patterns on shapes ----------------------------------------------------------------------------


def test_shapes_give_letters_their_sizes():
    bound = bind(parse(CONV), [(2, 6, 7, 5), (9, 2, 3, 3), (9,)], (2, 9, 5, 3), sizes={"g": 3})
    assert {k: bound.sizes[k] for k in "n g i o".split()} == {"n": 2, "g": 3, "i": 2, "o": 3}
    assert (bound.sizes["s0"], bound.sizes["s1"], bound.sizes["t0"]) == (7, 5, 5)
    assert bound.inputs[0] == (("n",), ("g", "i"), ("s0",), ("s1",))
    assert bound.output == (("n",), ("g", "o"), ("t0",), ("t1",))


def test_absent_operand_has_no_dims():
    bound = bind(parse(CONV), [(2, 6, 7), (9, 6, 3), None], (2, 9, 5), sizes={"g": 1})
    assert bound.inputs[2] is None and bound.sizes["o"] == 9


def test_operand_of_size_one_is_broadcast():
    bound = bind(parse("n c *s, c -> n c *s"), [(2, 4, 3), (1,)], (2, 4, 3))
    assert bound.inputs[1] == ((),) and bound.sizes["c"] == 4
    bound = bind(parse("n c, n c -> n c"), [(1, 4), (2, 4)], (2, 4))
    assert bound.inputs[0] == ((), ("c",)) and bound.sizes["n"] == 2


def test_shorter_operand_lacks_the_leading_dims_of_its_star():
    bound = bind(parse("*m o, *m i, i o -> *m o"), [(5,), (3, 4), (4, 5)], (3, 5))
    assert bound.inputs[0] == (("o",),) and bound.sizes["m0"] == 3
    bound = bind(parse("*b c, *b c -> *b c"), [(3, 4), (2, 3, 4)], (2, 3, 4))
    assert bound.inputs[0] == (("b1",), ("c",))


def test_ranks_of_stars_can_be_given():
    text = "*b *c, *c? -> *b *c"
    bound = bind(parse(text), [(2, 3, 4), None], (2, 3, 4), ranks={"c": 2})
    assert bound.inputs[0] == (("b0",), ("c0",), ("c1",))
    bound = bind(
        parse("*a (h c) *b -> *a c *b"), [(2, 6, 3)], (2, 3, 3), sizes={"h": 2}, ranks={"a": 1}
    )
    assert bound.inputs[0] == (("a0",), ("h", "c"), ("b0",))


def test_scalars_have_no_letters():
    assert bind(parse("i, i -> "), [(5,), (5,)], ()).output == ()


@pytest.mark.parametrize(
    ("text", "shapes", "output", "options", "fault"),
    [
        ("n c, c -> n c", [(2, 3), None], (2, 3), {}, "operand `c` of `n c, c -> n c` is missing"),
        ("n c, c -> n c", [(2, 3), (4,)], (2, 3), {}, "`c` is 3 in one operand, 4 in another"),
        ("n c -> n c", [(2, 3, 4)], (2, 3, 4), {}, "`n c` does not fit a value of 3 dims"),
        ("n (g i) -> n g", [(2, 6)], (2, 4), {}, "do not give the size of `g i`"),
        ("n (g i) -> n (g i)", [(2, 6)], (2, 6), {}, "do not give the size of `g i`"),
        ("*a *b -> *a *b", [(2, 3)], (2, 3), {}, "do not say how many dims each star has"),
        (
            CONV,
            [(3, 8, 8), (5, 3, 2, 2), None],
            (5, 7, 7),
            {"g": 1},
            "`*s` has 1 dims here, `*k` has 2",
        ),
    ],
)
def test_shapes_that_do_not_fit_are_refused(text, shapes, output, options, fault):
    with pytest.raises(RuleError) as error:
        bind(parse(text), shapes, output, sizes=options)
    assert fault in str(error.value)
