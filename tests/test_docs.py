"""The code in README.md and docs/ runs, and prints what the pages say it prints.

The ``python`` blocks of a page run in order, in one namespace and in a folder of their own. A
``text`` block right after one holds what it prints; ``...`` stands for anything, as in doctest. A
block that starts with the comment ``# name.py`` is run from a file of that name, so that messages
which name a source line can be shown, and a block ``# name.yaml`` is only written to a file.

Lines of rule files and rounding errors may be others than shown.

``FXPRUNE_UPDATE=1 pytest tests/test_docs.py`` writes what is printed into the pages; look at the
difference, and put ``...`` back where machines differ.
"""

from __future__ import annotations

import contextlib
import doctest
import inspect
import io
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch

import fxprune
from fxprune import criteria, rules

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCE = re.compile(r"^```(\w*)[^\n]*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
_FILE = re.compile(r"# ([\w-]+\.(?:py|yaml))\n")
_VARIES = re.compile(r"(?<=\.yaml:)\d+|\d\.\de[-+]\d\d")
_LINK = re.compile(r"\]\(([^)#\s]+)(#[^)\s]*)?\)")


@dataclass
class Block:
    language: str
    text: str
    line: int
    follows: bool
    """Whether nothing but one blank line or a sentence ending in a colon stands before it."""

    @property
    def file(self) -> str:
        found = _FILE.match(self.text)
        return found.group(1) if found else ""


def blocks(text: str) -> list[Block]:
    found, end = [], 0
    for match in _FENCE.finditer(text):
        between = text[end : match.start()].strip()
        line = text.count("\n", 0, match.start()) + 1
        found.append(Block(match.group(1), match.group(2), line, not between))
        end = match.end()
    return found


def run(block: Block, page: Path, folder: Path, names: dict) -> str:
    """What a block prints; written to a file first, so that its lines can be looked up."""
    file = folder / (block.file or f"{page.stem}_{block.line}.py")
    file.write_text(block.text)
    code = compile(block.text, str(file), "exec")
    with contextlib.redirect_stdout(io.StringIO()) as out:
        exec(code, names)
    return out.getvalue()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_blocks_of_a_page_run_and_print_what_it_says(page, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    # rules and criteria that a page adds go again
    monkeypatch.setattr(rules, "_current", rules.current())
    shipped = {name: criteria.find(name) for name in criteria.names()}
    monkeypatch.setattr(criteria, "_known", shipped)
    torch.manual_seed(0)
    names: dict = {"__name__": page.stem.replace("-", "_")}
    printed = ""
    for block in blocks(page.read_text()):
        if block.language == "python":
            printed = run(block, page, tmp_path, names)
        elif block.language == "yaml" and block.file:
            (tmp_path / block.file).write_text(block.text)
        elif block.language == "text" and block.follows:
            _compare(block, printed, page)


def _compare(block: Block, printed: str, page: Path) -> None:
    want, got = (_stripped(text) for text in (block.text, printed))
    plain_want, plain_got = (_VARIES.sub("?", text) for text in (want, got))
    if doctest.OutputChecker().check_output(plain_want, plain_got, doctest.ELLIPSIS):
        return
    if os.environ.get("FXPRUNE_UPDATE") and page.exists():
        page.write_text(page.read_text().replace(f"```text\n{block.text}", f"```text\n{got}", 1))
    else:
        raise AssertionError(f"{page.name}:{block.line} shows\n{want}\nbut the code prints\n{got}")


def _stripped(text: str) -> str:
    """Blanks at the end of a line, and empty lines at the end, do not count."""
    return "\n".join(map(str.rstrip, text.rstrip().splitlines())) + "\n"


def test_a_wrong_output_on_a_page_is_seen(tmp_path):
    """The checker itself: other text fails, ``...`` stands for anything."""
    page = blocks("```python\nprint('a 1.5 b')\n```\n\n```text\na ... b\n```\n")
    assert [b.language for b in page] == ["python", "text"] and page[1].follows
    printed = run(page[0], Path("page.md"), tmp_path, {})
    _compare(page[1], printed, Path("page.md"))
    with pytest.raises(AssertionError, match=r"page.md:5 shows\nc"):
        _compare(Block("text", "c\n", 5, True), printed, Path("page.md"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_between_pages_lead_somewhere(page):
    for target, _ in _LINK.findall(_FENCE.sub("", page.read_text())):
        if "://" not in target:
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def _guide() -> str:
    return (ROOT / "docs" / "prune-a-network.md").read_text()


@pytest.mark.parametrize("option", list(inspect.signature(fxprune.prune).parameters))
def test_every_option_of_prune_is_described(option):
    assert f"`{option}" in _guide()
    readme = (ROOT / "README.md").read_text().partition("## Options")[2].partition("## ")[0]
    assert f"`{option}`" in readme or option == "model"


def test_every_criterion_is_described():
    for name in criteria.names():
        module = criteria.find(name).function.__module__
        if module.startswith("fxprune."):  # other tests may have registered some
            assert f'`"{name}"`' in _guide()


def test_every_field_of_a_rule_is_listed():
    page = (ROOT / "docs" / "add-an-op.md").read_text()
    for field in set(rules.Rule.model_fields) - {"name", "where"}:
        assert f"`{field}`" in page, field


def test_lists_of_plain_ops_exist():
    page = (ROOT / "docs" / "add-an-op.md").read_text()
    table = page[page.index("| list |") : page.index("`zero` matters")]
    named = re.findall(r"^\| `(\w+)`", table, re.MULTILINE)
    known = {rule.name for rule in rules.read(rules.folder() / "ops" / "pointwise.yaml")}
    assert named and set(named) <= known


def test_every_page_is_in_the_navigation():
    navigation = (ROOT / "mkdocs.yml").read_text()
    for page in (ROOT / "docs").rglob("*.md"):
        assert f": {page.relative_to(ROOT / 'docs').as_posix()}\n" in navigation


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    """The documentation as a site; a warning, as of a link that leads nowhere, is an error."""
    folder = tmp_path_factory.mktemp("docs")
    shutil.copytree(ROOT / "docs", folder / "docs")
    shutil.copy(ROOT / "mkdocs.yml", folder)
    tool = Path(sys.executable).with_name("zensical")
    done = subprocess.run(
        [tool, "build", "--strict"], cwd=folder, env=_with_path(), capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / "site"


def _with_path() -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": str(ROOT), "NO_COLOR": "1"}


def test_the_site_has_every_page(site):
    for page in (ROOT / "docs").rglob("*.md"):
        assert (site / page.relative_to(ROOT / "docs").with_suffix(".html")).exists()


@pytest.mark.parametrize("name", fxprune.__all__)
def test_the_reference_has_every_public_name(site, name):
    found = (site / "reference" / "python.html").read_text()
    assert re.search(rf'id="fxprune(\.\w+)?\.{name}[".]', found)


def test_pictures_are_there(site):
    for page in site.rglob("*.html"):
        for source in re.findall(r'<img[^>]* src="([^"]+)"', page.read_text()):
            assert (page.parent / source).exists(), f"{page.name} shows {source}"


def test_every_module_has_its_place_in_the_layout():
    layout = (ROOT / "CONTRIBUTING.md").read_text()
    for file in (ROOT / "fxprune").glob("[a-z]*.py"):
        assert file.name in layout
