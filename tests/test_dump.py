"""Dumps: the text of every step is compared with what lies in ``snapshots/dump``.

``FXPRUNE_WRITE_SNAPSHOTS=1 pytest tests/test_dump.py`` writes the files anew; read the difference
before it is committed.
"""

from __future__ import annotations

import logging
import os
import re
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune.dump import dump_to, groups_dot, log_at
from fxprune.errors import OptionError
from fxprune.explain import ranges

SNAPSHOTS = Path(__file__).parent / "snapshots"
sys.path.insert(0, str(SNAPSHOTS))

from small_net import SmallNet  # noqa: E402

FILES = [
    "01-trace.txt",
    "02-flow.txt",
    "03-groups.txt",
    "04-score.txt",
    "05-select.txt",
    "06-rewrite.txt",
    "07-verify.txt",
    "groups.dot",
    "view.json",
]


def settled(text: str) -> str:
    """The text without what may differ from one machine or one rule file to the next."""
    text = re.sub(r"\d\.\de-\d\d", "#", text)
    return re.sub(r"(rules/ops/\w+\.yaml):\d+", r"\1:#", text)


@pytest.fixture(scope="module")
def dumped(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dump") / "made" / "on the way"
    fxprune.prune(SmallNet(), torch.zeros(2, 3, 16, 16), rate=0.5, dump=folder)
    return folder


@pytest.mark.parametrize("name", FILES[:-1])
def test_dump_is_what_it_was(dumped, name):
    found = settled((dumped / name).read_text(encoding="utf-8"))
    kept = SNAPSHOTS / "dump" / name
    if os.environ.get("FXPRUNE_WRITE_SNAPSHOTS"):
        kept.write_text(found, encoding="utf-8")
    assert found == kept.read_text(encoding="utf-8")


def test_dump_writes_these_files_and_no_others(dumped):
    assert sorted(path.name for path in dumped.iterdir()) == FILES


def test_lines_of_tables_stay_readable(dumped):
    for name in FILES[:-2]:
        lines = (dumped / name).read_text(encoding="utf-8").splitlines()
        assert max(map(len, lines)) < 180, name


def test_environment_asks_for_a_dump(monkeypatch, tmp_path):
    monkeypatch.setenv("FXPRUNE_DUMP", str(tmp_path / "here"))
    fxprune.prune(SmallNet(), torch.zeros(2, 3, 16, 16), verify=False)
    assert (tmp_path / "here" / "06-rewrite.txt").exists()


def test_unknown_ops_are_listed_with_their_source_line(tmp_path):
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1)
            self.fc = nn.Linear(8, 2)

        def forward(self, x):
            x = torch.special.i1(self.a(x))
            return self.fc(self.b(x).mean((2, 3)))

    fxprune.prune(Net(), torch.zeros(2, 3, 8, 8), dump=tmp_path)
    flow = (tmp_path / "02-flow.txt").read_text()
    assert "no rule:\n  %special_i1 has no rule   test_dump.py:" in flow
    assert "in forward: x = torch.special.i1(self.a(x))" in flow
    assert "frozen: reaches special_i1" in (tmp_path / "03-groups.txt").read_text()


def test_folder_that_cannot_be_made_is_an_option_error(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OptionError, match=r"cannot be written: .*directory"):
        dump_to(tmp_path / "file" / "below")
    with pytest.raises(OptionError, match="dump="):
        fxprune.prune(SmallNet(), torch.zeros(2, 3, 16, 16), dump=tmp_path / "file")


def test_steps_that_are_not_known_write_nothing(tmp_path):
    watch = dump_to(tmp_path)
    watch("finetune", None, None)
    assert [path.name for path in tmp_path.iterdir()] == ["01-trace.txt"]


# -- the drawing -----------------------------------------------------------------------------------


def test_drawing_gives_each_group_a_colour_and_frozen_channels_gray(dumped):
    text = (dumped / "groups.dot").read_text()
    colours = dict(re.findall(r'"(\w+)" \[label=.*fillcolor="([^"]+)"', text))
    assert colours["conv1"] == colours["conv2"] == colours["relu"]
    assert colours["gate"] == colours["mul"] != colours["conv1"]
    assert colours["fc"] == "gray85" and colours["x"] == "white"


def test_drawing_escapes_names(dumped):
    analysis = fxprune.analyze(SmallNet(), torch.zeros(2, 3, 16, 16))
    next(iter(analysis.graph.graph.nodes)).name = 'a"b\\c'
    text = groups_dot(analysis.flow, analysis.all_groups)
    assert '"a\\"b\\\\c" [label="a\\"b\\\\c\\n' in text
    assert text.count("{") == text.count("}") == 1
    quoted = re.sub(r'\\\\|\\"', "", text)
    assert all(line.count('"') % 2 == 0 for line in quoted.splitlines())


# -- the log ---------------------------------------------------------------------------------------


@pytest.fixture
def logged(caplog):
    logger = logging.getLogger("fxprune")
    before = (list(logger.handlers), logger.level, logger.propagate)
    logger.handlers, logger.propagate = [caplog.handler], False
    caplog.set_level(logging.INFO, "fxprune")
    yield caplog
    logger.handlers, logger.level, logger.propagate = before


def log_of(logged, level: str) -> list[str]:
    fxprune.prune(SmallNet(), torch.zeros(2, 3, 16, 16), rate=0.5, watch=log_at(level))
    return logged.messages


def test_level_1_logs_steps_and_times(logged):
    lines = log_of(logged, "1")
    assert [line.split()[0] for line in lines] == [
        "trace", "flow", "groups", "score", "select", "rewrite", "verify",
    ]  # fmt: skip
    assert all(re.match(r"\w+ +\d+\.\d ms", line) for line in lines)


def test_level_2_sums_up_groups(logged):
    lines = log_of(logged, "2")
    assert "2 of 3 groups may shrink, 14 of 19 channels" in lines
    assert "7 channels go by l2 at 0.5 (local)" in lines


def test_level_3_logs_every_group(logged):
    lines = "\n".join(log_of(logged, "3"))
    assert "conv1.weight[0] bn1.*[0] conv2.{weight,bias}[0] | conv2.weight[1]" in lines
    assert "%relu" not in lines


def test_level_4_logs_every_node(logged):
    lines = "\n".join(log_of(logged, "4"))
    assert "%relu" in lines and "conv  rules/ops/layers.yaml" in lines


def test_log_goes_to_stderr(capfd, monkeypatch):
    logger = logging.getLogger("fxprune")
    monkeypatch.setattr(logger, "handlers", [])
    monkeypatch.setattr(logger, "propagate", logger.propagate)
    monkeypatch.setenv("FXPRUNE_DEBUG", "1")
    fxprune.prune(SmallNet(), torch.zeros(2, 3, 16, 16), verify=False)
    out, err = capfd.readouterr()
    assert out == "" and "fxprune: trace" in err


@pytest.mark.parametrize("level", ["0", "5", "yes", ""])
def test_other_levels_are_refused(level):
    with pytest.raises(OptionError, match=f"FXPRUNE_DEBUG={level} is not known"):
        log_at(level)


# -- numbers in runs -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("numbers", "text"),
    [
        ([], ""),
        ([5], "5"),
        ([0, 1], "0 1"),
        ([0, 1, 2, 3], "0..3"),
        ([0, 1, 2, 7, 9, 10, 11], "0..2 7 9..11"),
        ([3, 3, 3], "3 x3"),
        ([1, 1, 2, 2, 3, 3], "1..3 each x2"),
        ([0, 4, 8, 12], "(0..12 step 4)"),
        ([4, 3, 2, 1], "(4..1 step -1)"),
        ([0, 2, 3, 9], "0 2 3 9"),
        ([1, 2, 3, 1, 2, 3], "1..3 1..3"),
        (
            list(range(0, 90, 10)) + [5, 80, 3, 81, 2, 90, 1, 33, 8],
            "(0..80 step 10) 5 80 3 81 2 90 1 and 2 more",
        ),
    ],
)
def test_ranges(numbers, text):
    assert ranges(numbers) == text
