"""The viewer: its data say what the analysis and the plan say, its page works in a real browser."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import NamingError, NothingToPrune, SaveError
from fxprune.viewer.layout import positions

X = torch.rand(2, 3, 8, 8)
EVIL = "</script><script>document.title='broken'</script><b>"


class Net(nn.Module):
    """A residual block, a split, a size in the code, an odd name."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.inner = nn.Conv2d(16, 16, 3, padding=1)
        self.wide = nn.Conv2d(16, 24, 1)
        self.words = nn.ModuleDict({"<b>x</b>": nn.Conv2d(8, 8, 1)})
        self.head = nn.Linear(8 * 64, 5)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.inner(x)
        a, b = self.wide(x).split([8, 16], dim=1)
        a = self.words["<b>x</b>"](a) * b[:, :8]
        return self.head(a.reshape(-1, 8 * 64))


@pytest.fixture(scope="module")
def dumped(tmp_path_factory) -> tuple[Path, Any, Any]:
    torch.manual_seed(0)
    folder, model = tmp_path_factory.mktemp("dump"), Net()
    pruned = fxprune.prune(model, X, rate=0.5, dump=folder)
    return folder, pruned, fxprune.analyze(model, X)


@pytest.fixture(scope="module")
def data(dumped) -> dict:
    return json.loads((dumped[0] / "view.json").read_text())


# -- the data --------------------------------------------------------------------------------------


def test_steps_are_those_of_the_pipeline(data):
    names = ["trace", "flow", "groups", "score", "select", "rewrite", "verify"]
    assert [each["name"] for each in data["steps"]] == names
    assert all(each["seconds"] >= 0 and each["summary"] for each in data["steps"])
    assert "shapes proven" in data["steps"][-1]["summary"]


def test_groups_are_those_of_the_analysis(data, dumped):
    _, pruned, analysis = dumped
    assert [g["name"] for g in data["groups"]] == [g.name for g in analysis.groups]
    for found, group, row in zip(
        data["groups"], analysis.groups, pruned.fxprune.plan.groups, strict=True
    ):
        assert found["size"] == len(group) and found["kept"] == row.kept
        assert [m[0] for m in found["members"]] == [f"{m.param}[{m.dim}]" for m in group.members]
        assert found["stays"] == (group.frozen.reason if group.frozen else "")
    stem = next(g for g in data["groups"] if g["name"] == "stem")
    assert any("x = x + self.inner(x)" in source for _, _, source in stem["ties"])


def test_scores_are_those_of_the_criterion_and_the_cut_parts_them(data, dumped):
    folder, pruned, analysis = dumped
    plan = fxprune.plan(analysis, rate=0.5, scores=True)
    for i, found in enumerate(data["groups"]):
        values = plan.groups[i].scores
        if not values:
            assert "scores" not in found
            continue
        scores = found["scores"]
        assert sum(scores["counts"]) == found["size"]
        assert sum(scores["gone"]) == found["size"] - found["kept"]
        assert scores["low"] == pytest.approx(min(values))
        if scores["cut"] is not None:
            assert (np.array(values) < scores["cut"]).sum() == found["size"] - found["kept"]
    assert any(g.get("scores", {}).get("cut") for g in data["groups"])


def test_nodes_say_their_shapes_rules_and_corrections(data, dumped):
    _, pruned, _ = dumped
    nodes = {node["id"]: node for node in data["nodes"]}
    assert nodes["stem"]["shape"] == "[2, 16, 8, 8]"
    assert nodes["stem"]["new_shape"] == "[2, 8, 8, 8]"
    assert nodes["stem"]["rule"].startswith("conv, rules/ops/layers.yaml:")
    assert "[8, 16]" in nodes["split"]["call"] and "new_call" in nodes["split"]
    assert "self.wide(x).split" in nodes["split"]["source"]
    group = data["groups"][nodes["stem"]["groups"][0][0]]
    assert group["name"] == "stem" and nodes["stem"]["groups"][0][1] == 16
    widths = {name: width for name, width, _, _ in data["layers"]}
    assert widths["stem"] == [16, pruned.stem.out_channels]


def test_a_run_that_fails_leaves_what_it_reached(tmp_path):
    with pytest.raises(NothingToPrune):
        fxprune.prune(nn.Conv2d(3, 4, 1), X, dump=tmp_path)
    found = json.loads((tmp_path / "view.json").read_text())
    assert [each["name"] for each in found["steps"]] == ["trace", "flow", "groups"]
    assert fxprune.view(tmp_path).is_file()


class Detects(Net):
    def forward(self, x):
        found = super().forward(x)
        return found[found[:, 0] > float(found.detach().mean())]


def test_a_recorded_network_has_a_page_too(tmp_path):
    fxprune.prune(Detects(), X, rate=0.5, dump=tmp_path)
    found = json.loads((tmp_path / "view.json").read_text())
    assert found["steps"][-2]["summary"] == "a copy of the model, with narrower parameters"
    assert found["layers"] and fxprune.view(tmp_path, tmp_path / "page.html").is_file()


def test_lanes_and_rows():
    """A node lies below what it takes; no two lie on one place."""
    inputs = {
        "x": [],
        "a": ["x"],
        "b": ["a"],
        "s": ["x"],
        "t": ["b", "s"],
        "w": [],
        "out": ["t", "w"],
    }
    found = positions(inputs)
    assert all(found[name][1] > found[each][1] for name in inputs for each in inputs[name])
    assert len(set(found.values())) == len(inputs)
    assert found["x"][0] == found["a"][0] == found["b"][0] == 0 and found["s"][0] == 1


# -- what is refused -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("", "cannot be read"),
        ("[" * 5000, "cannot be read"),
        ("[]", "version"),
        ('{"version": 99}', "version"),
        ('{"version": 1, "steps": 3}', "fxprune: Field required"),
    ],
)
def test_other_data_are_a_clear_error(text, told, tmp_path):
    (tmp_path / "view.json").write_text(text)
    with pytest.raises(SaveError, match=told):
        fxprune.view(tmp_path)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (("nodes", 0), "x"), (("report",), "x"), (("nodes", 1, "shape"), None),
        (("groups", 0, "size"), "12"), (("groups", 0, "scores", "low"), float("inf")),
        (("steps", 0, "seconds"), "1"), (("nodes", 1, "inputs"), None),
    ],
)  # fmt: skip
def test_wrong_types_inside_are_a_clear_error(path, value, data, tmp_path):
    found = json.loads(json.dumps(data))
    home = found
    for key in path[:-1]:
        home = home[key]
    home[path[-1]] = value
    (tmp_path / "view.json").write_text(json.dumps(found))
    with pytest.raises(SaveError, match=r"is damaged: ") as told:
        fxprune.view(tmp_path)
    assert str(path[0]) in told.value.fault


def test_no_dump_is_a_clear_error(tmp_path):
    with pytest.raises(NamingError, match="there is no folder"):
        fxprune.view(tmp_path / "nowhere")
    with pytest.raises(NamingError, match=r"holds no view.json"):
        fxprune.view(tmp_path)


# -- in a browser ----------------------------------------------------------------------------------

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome")
FLAGS = (
    "--no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    found = os.environ.get("CHROMIUM") or next(filter(None, map(shutil.which, BROWSERS)), None)
    if not found:
        pytest.skip("there is no Chromium")
    with playwright.sync_playwright() as driver:
        made = driver.chromium.launch(executable_path=found, args=FLAGS)
        yield made
        made.close()


class Page:
    """A page of the viewer, and all that it logged or asked for."""

    def __init__(self, browser: Any, path: Path, scheme: str = "light", width: int = 1280):
        self.logged: list[str] = []
        self.asked: list[str] = []
        size = {"width": width, "height": 800}
        self.tab = browser.new_page(viewport=size, color_scheme=scheme)
        self.tab.on("console", lambda message: self.logged.append(message.text))
        self.tab.on("pageerror", lambda error: self.logged.append(str(error)))
        self.tab.on("request", lambda request: self.asked.append(request.url))
        self.tab.goto(path.resolve().as_uri())
        self.tab.wait_for_selector("html[data-ready=yes]")

    def text(self, selector: str) -> str:
        return self.tab.inner_text(selector)

    def press(self, *keys: str) -> None:
        for key in keys:
            self.tab.keyboard.press(key)

    def node_at(self, name: str) -> dict:
        return self.tab.evaluate(f"graph.getElementById({name!r}).renderedPosition()")

    def click_node(self, name: str) -> None:
        at, box = self.node_at(name), self.tab.locator("#graph").bounding_box()
        self.tab.mouse.click(box["x"] + at["x"], box["y"] + at["y"])


@pytest.fixture
def page(browser, dumped):
    made = Page(browser, fxprune.view(dumped[0]))
    yield made
    assert made.logged == [] and len(made.asked) == 1  # the page itself
    made.tab.close()


def test_the_page_opens_with_the_groups(page):
    assert page.text("#model") == "Net"
    assert "groups may shrink" in page.text("#summary")
    assert page.tab.locator("#list .row").count() == 5
    assert page.tab.title() == "Net in fxprune"


def test_a_click_on_a_node_shows_it(page):
    page.click_node("inner")
    details = page.text("#details")
    assert "%inner" in details and "conv, rules/ops/layers.yaml" in details
    assert "[2, 16, 8, 8]" in details and "[2, 8, 8, 8]" in details
    assert "x = x + self.inner(x)" in details


def test_a_click_on_a_group_shows_members_scores_and_ties(page):
    page.tab.click("#list .row >> text=stem")
    details = page.text("#details")
    assert "8 of 16 stay" in details and "stem.weight[0]" in details
    assert "x = x + self.inner(x)" in details
    assert page.tab.locator("#details svg rect.goes").count() == 16
    assert page.tab.locator("#details svg .cut").count() == 1
    page.tab.click("#details .link >> text=inner.weight[0]")
    assert page.text("#details h2") == "%inner"


def test_search_finds_nodes_groups_and_code(page):
    page.tab.fill("#search", "split")
    assert "%split" in page.text("#found")
    page.press("Enter")
    assert page.text("#details h2") == "%split"
    page.tab.fill("#search", "a.reshape")
    page.press("ArrowDown", "ArrowUp", "Enter")
    assert "self.head(a.reshape(-1, 8 * 64))" in page.text("#details")
    page.tab.fill("#search", "nothing like it")
    assert page.text("#found") == "Nothing found"


def test_everything_goes_without_a_mouse(page):
    page.press("/")
    page.tab.keyboard.type("stem")
    page.press("Enter")
    assert page.text("#details h2") == "stem"
    page.press("Escape")
    assert page.text("#details h2") == "groups"
    page.tab.focus("#graph")
    page.press("ArrowDown", "ArrowDown")
    assert page.text("#details h2") == "%stem"
    page.press("ArrowDown", "ArrowUp", "+", "-", "0")
    assert page.text("#details h2") == "%stem"
    page.press("6")
    assert "corrected" in page.text("#summary")
    page.tab.focus("#step-rewrite")
    page.press("ArrowLeft")
    assert "channels go by l2" in page.text("#summary")
    page.tab.focus("#tabs [aria-selected=true]")
    page.press("ArrowRight")
    assert "16 → 8" in page.text("#list")
    page.tab.focus("#list .row")
    page.press("ArrowDown")
    page.press("Enter")
    assert page.text("#details h2").startswith("%")
    focused = "[...document.querySelectorAll('#list button')].indexOf(document.activeElement)"
    assert page.tab.evaluate(focused) == 1  # where it was, though the list was drawn anew


def test_every_step_and_list_says_something(page):
    for i, name in enumerate("trace flow groups score select rewrite verify".split(), 1):
        page.press(str(i))
        assert page.text("#summary") and name in page.text("#details h2")
    said = {"Layers": "stem", "Stays": "reaches the network's output", "Report": "shapes proven"}
    for tab, text in said.items():
        page.tab.click(f"#tabs >> text={tab}")
        assert text in page.text("#list")
    page.press("2")
    assert "0 ops without a rule" in page.text("#summary")


def test_names_are_text(browser, tmp_path):
    """Names and code of a network cannot break out of the page."""

    class Evil(nn.Module):
        def forward(self, x):
            return self.b(self.a(x))  # </script><b>

    model = Evil()
    model.a, model.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)
    type(model).__name__ = EVIL
    fxprune.prune(model, X, dump=tmp_path)
    page = Page(browser, fxprune.view(tmp_path))
    assert page.text("#model") == EVIL and "broken" not in page.tab.title().partition("<")[0]
    assert page.tab.title() == f"{EVIL} in fxprune" and page.logged == []
    page.tab.close()


@pytest.mark.parametrize(("scheme", "width"), [("dark", 1280), ("light", 800), ("light", 500)])
def test_other_screens(browser, dumped, scheme, width):
    page = Page(browser, fxprune.view(dumped[0]), scheme, width)
    page.press("5")
    page.tab.click("#list .row >> text=stem")
    assert "8 of 16 stay" in page.text("#details") and page.logged == []
    wide = page.tab.evaluate("document.documentElement.scrollWidth")
    assert wide <= width
    ground = page.tab.evaluate("getComputedStyle(document.body).backgroundColor")
    assert (sum(map(int, ground[4:-1].split(","))) < 200) == (scheme == "dark")
    page.tab.close()
