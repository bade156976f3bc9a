"""The report in every notation: the same figures, and no text of a model taken for markup."""

from __future__ import annotations

import json
from html.parser import HTMLParser

import pytest
import torch
from torch import nn

import fxprune
from fxprune.causes import Cause
from fxprune.report import Report, Row


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.head = nn.Linear(6, 16), nn.Linear(16, 12), nn.Linear(12, 3)

    def forward(self, x):
        return self.head(torch.relu(self.b(torch.relu(self.a(x)))))


@pytest.fixture(scope="module")
def report() -> Report:
    return fxprune.prune(Net(), torch.rand(2, 6), rate=0.5).fxprune.report


class Cells(HTMLParser):
    """The text of each cell, and every tag."""

    def __init__(self, text: str):
        super().__init__()
        self.cells: list[str] = []
        self.tags: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        if tag in ("td", "th"):
            self.cells.append("")

    def handle_data(self, data):
        if self.tags and self.tags[-1] in ("td", "th"):
            self.cells[-1] += data.rstrip("\n")


def test_json_is_the_whole_report(report):
    found = json.loads(report.to_json())
    assert found["params"] == [355, 131] and [row["kept"] for row in found["groups"]] == [8, 6, 3]
    assert found["verification"]["elements"] == report.verification.elements


def test_markdown_has_the_figures(report):
    lines = report.to_markdown().splitlines()
    assert lines[0] == "**Net pruned by l2 at 0.5 (local)**"
    assert "| parameters | 355 | 131 | 36.9% |" in lines
    assert r"| head | 3 of 3 | reaches the network's output (%output) |" in lines
    tables = [line for line in lines if line.startswith("|")]
    assert {line.count(" | ") for line in tables} == {3, 2}


def test_html_has_the_figures(report):
    cells = Cells(report._repr_html_()).cells
    at = cells.index("parameters")
    assert cells[at : at + 4] == ["parameters", "355", "131", "36.9%"]
    assert "3 of 3" in cells and "before" in cells


def test_text_of_a_model_is_no_markup():
    evil = "<script>alert(1)</script>|`*"
    row = Row(evil, 8, 8, 1, evil)
    report = Report(evil, "l2", 0.5, "local", "symbolic", evil, "", groups=[row], warnings=[evil])
    assert set(Cells(report._repr_html_()).tags) == {
        "div", "p", "b", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    text = report.to_markdown()
    assert "\\<script>" in text and not text.replace("\\<", "").count("<")
    (line,) = [line for line in text.splitlines() if "8 of 8" in line]
    assert line.replace("\\|", "").count("|") == 4


def test_causes_are_in_all_notations():
    cause = Cause("meets a constant", 1200, 2, "net.py:3", "mixing='all' frees 1,000 of them")
    report = Report("Net", "l2", 0.5, "local", "symbolic", "2x6", "", causes=[cause])
    cells = Cells(report._repr_html_()).cells
    at = cells.index("1,200")
    assert cells[at + 1 : at + 3] == ["meets a constant at 2 places (net.py:3)", cause.remedy]
    want = "| 1,200 | meets a constant at 2 places (net.py:3) | mixing='all' frees 1,000 of them |"
    assert want in report.to_markdown() and "mostly because of" in str(report)
