"""The pages of docs/reference that are made from the data are up to date.

``python -m tools.pages`` writes them.
"""

from __future__ import annotations

import pytest

from tools import pages


@pytest.fixture(scope="module")
def written() -> dict[str, str]:
    return pages.written()


@pytest.mark.parametrize(
    "name", ["criteria.md", "recipes.md", "rules.md", "errors.md", "examples.md", "changes.md"]
)
def test_a_page_says_what_the_data_says(written, name):
    assert (pages.FOLDER / name).read_text() == written[name], "run `python -m tools.pages`"


def test_texts_of_errors_are_read_off_the_code():
    source = pages._Source(
        pages.ast.parse(
            'HINT = "try | again"\n'
            "def told(fault):\n"
            "    raise SaveError(fault, hint=HINT)\n"
            "def saves(path):\n"
            '    told(f"{path} is <lost>")\n'
            '    told("gone" if path else "away")\n'
        ),
        "fxprune/errors.py",
    )
    ((function, call),) = [(f, c) for f, c in source.calls() if pages._name(c) == "SaveError"]
    found = list(pages._said(source, function, call, "errors.py"))
    assert [each.fault for each in found] == ["… is &lt;lost>", "gone or: away"]
    assert {each.hint for each in found} == {"try | again"}
    assert "try \\| again" in pages.table(["hint"], [[found[0].hint]])
