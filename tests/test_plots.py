"""Pictures of a report: bars as long as its numbers, the cut where channels went."""

from __future__ import annotations

import io
import itertools
import json
import pickle
import sys

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from torch import nn

import fxprune
from fxprune.errors import OptionError
from fxprune.layers import LayerRow, Scores
from fxprune.report import Report, Row


class Net(nn.Module):
    """A depthwise layer, a norm, a table, weights used twice, and a layer that no call reads."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 16, 3, padding=1)
        self.norm = nn.BatchNorm2d(16)
        self.depthwise = nn.Conv2d(16, 16, 3, groups=16)
        self.up = nn.ConvTranspose2d(16, 12, 2)
        self.again = nn.Conv2d(12, 12, 1)
        self.table = nn.Parameter(torch.randn(12))
        self.head = nn.Linear(12, 5)
        self.unused = nn.Linear(7, 7)

    def forward(self, x):
        x = self.up(self.depthwise(torch.relu(self.norm(self.stem(x)))))
        x = self.again(torch.relu(self.again(x)))
        return self.head(x.mean((2, 3)) * self.table)


X = torch.rand(2, 3, 8, 8)


@pytest.fixture(scope="module")
def pruned() -> fxprune.pruned.PrunedModule:
    torch.manual_seed(0)
    return fxprune.prune(Net(), X, rate=0.5)


@pytest.fixture
def report(pruned) -> Report:
    return pruned.fxprune.report


def lengths(figure: Figure) -> dict[str, tuple[float, float]]:
    """Each bar's name with its lengths, before and after."""
    (ax,) = figure.axes
    names = [label.get_text() for label in ax.get_yticklabels()]
    before, after = ([bar.get_width() for bar in bars] for bars in ax.containers)
    assert len(names) == len(before) == len(after)
    return dict(zip(names, zip(before, after, strict=True), strict=True))


# -- what a report knows of layers -----------------------------------------------------------------


def test_layers_have_the_widths_of_the_pruned_modules(report, pruned):
    modules = dict(pruned.named_modules())
    widths = {row.name: row.width for row in report.layers if row.width}
    assert widths == {
        "stem": (16, modules["stem"].out_channels),
        "depthwise": (16, modules["depthwise"].out_channels),
        "up": (12, modules["up"].out_channels),
        "again": (12, modules["again"].out_channels),
        "head": (5, 5),
    }
    assert widths["stem"] == (16, 8)


def test_layers_come_to_the_whole_network(report):
    for i in (0, 1):
        assert sum(row.params[i] for row in report.layers) == report.params[i]
        assert sum(row.macs[i] for row in report.layers) == report.macs[i]
    rows = {row.name: row for row in report.layers}
    assert rows["unused"].params == (56, 0) and rows["table"].params == (12, 6)
    assert rows["again"].macs == (2 * 12 * 12 * 49, 2 * 6 * 6 * 49)
    assert rows["norm"].width is None and rows["norm"].macs == (0, 0)


def test_tied_weights_count_once():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.words, self.mid, self.out = nn.Embedding(20, 8), nn.Linear(8, 8), nn.Linear(8, 20)
            self.out.weight = self.words.weight

        def forward(self, x):
            return self.out(torch.relu(self.mid(self.words(x))))

    found = fxprune.prune(Tied(), torch.zeros(2, 3, dtype=torch.int64)).fxprune.report
    for i in (0, 1):
        assert sum(row.params[i] for row in found.layers) == found.params[i]


def test_recorded_networks_have_layers_too():
    found = fxprune.prune(Net(), X, frontend="record").fxprune.report
    own = {row.name: row.width for row in found.layers if row.width}
    assert own["stem"] == (16, 8) and own["up"] == (12, 6)


def test_layers_are_in_the_json_and_scores_are_not(report):
    found = json.loads(report.to_json())
    assert found["layers"][0] == {
        "name": "stem", "width": [16, 8], "params": list(report.layers[0].params),
        "macs": list(report.layers[0].macs),
    }  # fmt: skip
    assert "scores" not in found and report.scores


# -- bars ------------------------------------------------------------------------------------------


def test_bars_are_as_long_as_the_widths(report):
    assert lengths(report.plot("widths")) == {
        row.name: row.width for row in report.layers if row.width
    }


@pytest.mark.parametrize("what", ["params", "macs"])
def test_bars_are_as_long_as_the_counts(report, what):
    found = lengths(report.plot(what))
    rows = {row.name: getattr(row, what) for row in report.layers if getattr(row, what)[0]}
    assert {name: found[name] for name in rows} == rows
    assert sum(before for before, _ in found.values()) == getattr(report, what)[0]


def test_small_layers_are_one_bar():
    big = LayerRow("big", (8, 4), (10_000, 5_000), (9, 3))
    norms = [LayerRow(f"norm{i}", None, (16, 8), (0, 0)) for i in range(3)]
    report = Report(
        "Net", "l2", 0.5, "local", "symbolic", "2x6", "", layers=[norms[0], big, *norms]
    )
    found = lengths(report.plot("params"))
    assert found == {"big": (10_000, 5_000), "4 others (norms and the like)": (64, 32)}


def many(count: int) -> Report:
    rows = [
        LayerRow(f"block{i}." + "deep." * 12 + "conv", (64, 32), (9, 4), (9, 4))
        for i in range(count)
    ]
    return Report("Net", "l2", 0.5, "local", "symbolic", "2x6", "", layers=rows)


@pytest.mark.parametrize("count", [1, 10, 60, 200])
def test_names_do_not_overlap(count):
    """However many layers: the letters of each name end above those of the next, in the picture."""
    figure = many(count).plot("widths")
    figure.draw_without_rendering()
    (ax,) = figure.axes
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert len(boxes) == count
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in itertools.pairwise(boxes))
    assert min(box.x0 for box in boxes) >= 0 and ax.get_window_extent().width > 400
    assert max(text.get_window_extent().x1 for text in ax.texts) < figure.bbox.x1


def test_in_small_axes_some_names_are_left_out():
    ax = Figure(figsize=(4, 3)).add_subplot()
    figure = many(200).plot("widths", ax=ax)
    figure.draw_without_rendering()
    assert figure is ax.figure and len(ax.containers[0]) == 200
    boxes = [label.get_window_extent() for label in ax.get_yticklabels()]
    assert 10 < len(boxes) < 60
    assert all(upper.y0 >= lower.y1 - 1 for upper, lower in itertools.pairwise(boxes))


# -- scores ----------------------------------------------------------------------------------------


def bins(figure: Figure) -> tuple[dict[str, float], float]:
    """How many channels the bins of each colour hold, and where the cut is."""
    (ax,) = figure.axes
    names = [text.get_text() for text in ax.get_legend().get_texts()]
    counts = [sum(bar.get_height() for bar in bars) for bars in ax.containers]
    (line,) = ax.lines
    return dict(zip(names, counts, strict=False)), line.get_xdata()[0]


def test_the_cut_parts_what_stays_from_what_goes(report):
    for i, row in enumerate(report.groups):
        if i not in report.scores:
            continue
        found, cut = bins(report.plot("scores", group=row.name))
        assert found == {
            f"{row.size - row.kept} removed": row.size - row.kept,
            f"{row.kept} kept": row.kept,
        }
        scores = report.scores[i]
        assert (scores.values[scores.kept] > cut).all() and (
            scores.values[~scores.kept] < cut
        ).all()


def test_no_bin_lies_on_both_sides_of_the_cut(report):
    (ax,) = report.plot("scores", group="stem").axes
    removed, kept = ax.containers
    cut = ax.lines[0].get_xdata()[0]
    for bars, side in ((removed, -1), (kept, 1)):
        full = [bar for bar in bars if bar.get_height()]
        assert all(side * (bar.get_x() + bar.get_width() / 2 - cut) > 0 for bar in full)


def test_scores_of_all_groups_are_relative_to_their_cuts(report):
    found, cut = bins(report.plot("scores"))
    gone = sum(row.size - row.kept for row in report.groups)
    assert cut == pytest.approx(1, abs=0.05) and found[f"{gone} removed"] == gone


def test_a_global_choice_has_one_cut():
    report = fxprune.prune(Net(), X, rate=0.4, scope="global").fxprune.report
    _, cut = bins(report.plot("scores"))
    lost = [each for each in report.scores.values() if not each.kept.all()]
    values, kept = (np.concatenate([getattr(each, p) for each in lost]) for p in ("values", "kept"))
    assert (values < cut).sum() == (~kept).sum()


def test_the_cut_counts_what_went_where_constraints_choose_others():
    scores = Scores(np.array([1.0, 2.0, 3.0, 4.0]), np.array([False, True, False, True]))
    assert scores.cut == 2.5
    assert Scores(scores.values, np.ones(4, bool)).cut is None


@pytest.mark.parametrize("value", [0.0, 0.002, -3.0])
def test_equal_scores_are_drawn_close_by(value):
    report = many(1)
    report.groups.append(Row("a", 4, 2, 1))
    report.scores[0] = Scores(np.full(4, value), np.array([False, True, False, True]))
    figure = report.plot("scores", group="a")
    assert bins(figure) == ({"2 removed": 2, "2 kept": 2}, value)
    low, high = figure.axes[0].get_xlim()
    assert high - low < max(abs(value), 2.5)


def test_hardly_anything_left_is_not_nothing():
    report = many(1)
    report.layers[0] = LayerRow("a", (64, 1), (10_000, 9), (9, 0))
    shown = [
        [text.get_text() for text in report.plot(what).axes[0].texts] for what in ("params", "macs")
    ]
    assert shown == [["<1%"], ["0%"]]


def test_plans_with_scores_give_them_back():
    torch.manual_seed(0)
    analysis = fxprune.analyze(Net(), X)
    plan = fxprune.plan(analysis, rate=0.5, scores=True)
    report = fxprune.apply(analysis.model, plan).fxprune.report
    assert bins(report.plot("scores", group="stem"))[0] == {"8 removed": 8, "8 kept": 8}
    bare = fxprune.apply(analysis.model, fxprune.plan(analysis, rate=0.5)).fxprune.report
    with pytest.raises(OptionError, match="has no scores"):
        bare.plot("scores")
    assert lengths(bare.plot("widths"))["stem"] == (16, 8)


# -- where it is drawn -----------------------------------------------------------------------------


def test_no_global_state_of_pyplot_is_used(report, monkeypatch):
    monkeypatch.delitem(sys.modules, "matplotlib.pyplot", raising=False)
    for what in ("widths", "scores"):
        report.plot(what)._repr_png_()
    assert "matplotlib.pyplot" not in sys.modules


@pytest.mark.parametrize("kind", ["png", "svg", "pdf"])
def test_figures_are_saved_in_all_formats(report, kind):
    out = io.BytesIO()
    report.plot("scores").savefig(out, format=kind)
    assert len(out.getvalue()) > 3000


def test_notebooks_show_the_figure(report):
    assert report.plot("widths")._repr_png_().startswith(b"\x89PNG")


def test_without_matplotlib_the_error_says_what_to_install(report, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(OptionError, match=r"hint: pip install 'fxprune\[plot\]'"):
        report.plot("widths")


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (dict(what="width"), "width"),
        (dict(what="macs", group="stem"), "is for scores"),
        (dict(what="scores", group="stemm"), "did you mean `stem`"),
    ],
)
def test_wrong_options_are_refused(report, how, says):
    with pytest.raises(OptionError, match=says):
        report.plot(**how)


def test_a_report_without_layers_says_so():
    with pytest.raises(OptionError, match="knows no layers"):
        many(0).plot("widths")


def test_a_pruned_network_is_pickled_with_its_scores(pruned):
    found = pickle.loads(pickle.dumps(pruned)).fxprune.report
    assert bins(found.plot("scores", group="stem")) == bins(
        pruned.fxprune.report.plot("scores", group="stem")
    )
