"""The command line, as a user meets it: answers, errors, exit codes, help, both streams."""

from __future__ import annotations

import contextlib
import doctest
import inspect
import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
import typing
from dataclasses import fields
from pathlib import Path

import pytest
import torch
import typer
from typer.testing import CliRunner

import fxprune
from fxprune import criteria, recipes
from fxprune.cli import command, complete, options
from fxprune.cli.app import app
from fxprune.cli.spoken import spoken
from fxprune.settings import Settings

NET = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.conv1 = nn.Conv2d(3, width, 3, padding=1)
        self.conv2 = nn.Conv2d(width, 24, 3, padding=1)
        self.head = nn.Linear(24, 10)

    def forward(self, x):
        print("forward runs")
        x = torch.relu(self.conv1(x))
        x = torch.relu(self.conv2(x))
        return self.head(x.mean((2, 3)))


class Output(nn.Module):
    def __init__(self):
        super().__init__()
        self.only = nn.Linear(4, 2)

    def forward(self, x):
        return self.only(x)


class Fails(Net):
    def forward(self, x):
        raise KeyError("no such thing")
"""
RULES = """\
my_scale:
  words: silu
  kind: pointwise
  samples:
    - {call: torch.nn.functional.silu, inputs: [[2, 3]]}
"""
X = "-i 1x3x8x8"
LEAVES = [
    "prune", "verify", "bench", "dump", "groups", "explain", "count", "view", "criteria",
    "recipes", "recipes list", "recipes show", "rules list", "rules check", "rules probe",
]  # fmt: skip


@pytest.fixture
def home(tmp_path, monkeypatch):
    """A folder of one's own, as the current one."""
    (tmp_path / "net.py").write_text(NET)
    (tmp_path / "my_rules.yaml").write_text(RULES)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("webbrowser.open", lambda url: None)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr("fxprune.rules._current", fxprune.rules.current())
    yield tmp_path
    for name in [n for n in sys.modules if n == "net" or n.startswith("net_")]:
        del sys.modules[name]


def fx(text: str, code: int | None = 0, width: int = 80):
    """Run a command line in this process."""
    env = {"COLUMNS": str(width), "NO_COLOR": "1", "TERM": "dumb"}
    done = CliRunner().invoke(app, shlex.split(text), prog_name="fxprune", env=env)
    if code is not None:
        assert done.exit_code == code, done.output
    return done


def data(text: str, code: int = 0):
    return json.loads(fx(f"{text} --json", code).stdout)


def commands(group=None, above=()):
    """All commands of the app, with their words."""
    group = group or typer.main.get_command(app)
    for name, found in group.commands.items():
        if hasattr(found, "commands"):
            yield from commands(found, (*above, name))
        else:
            yield " ".join((*above, name)), found


def examples(found) -> list[str]:
    lines = (found.epilog or "").splitlines()
    return [line.removeprefix("$ ") for line in lines if line.startswith("$ fxprune ")]


# -- the options are those of the library ----------------------------------------------------------


def _options(kind) -> dict[str, typing.Any]:
    return typing.get_type_hints(kind, include_extras=True)


@pytest.mark.parametrize(
    ("kind", "function", "beside"),
    [
        (options.Pruning, "prune", {"no_verify"}),
        (options.Reading, "analyze", set()),
    ],
)
def test_options_are_the_functions_arguments(kind, function, beside):
    signature = inspect.signature(getattr(fxprune, function))
    taken = set(signature.parameters) - {"model", "example_inputs", "watch"}
    taken -= {"progress"}  # shown of itself
    assert {each.name for each in fields(kind)} - beside == taken


def _choices(hint) -> set[str]:
    """The words a type allows: those of its Literals."""
    if typing.get_origin(hint) is typing.Literal:
        return {word for word in typing.get_args(hint) if isinstance(word, str)}
    return {word for each in typing.get_args(hint) for word in _choices(each)}


def test_choices_are_those_that_prune_takes():
    ours, theirs = _options(options.Pruning), typing.get_type_hints(fxprune.prune)
    compared = 0
    for name, hint in ours.items():
        if name in theirs and name != "verify" and _choices(hint):
            compared += 1
            assert _choices(hint) == _choices(theirs[name]), name
    assert compared == 8
    text = " ".join(fx("prune --help", width=400).output.split())
    for name, hint in ours.items():
        option, words = f"--{name.replace('_', '-')} ", _choices(hint)
        assert all(word in text.partition(option)[2].partition("[default")[0] for word in words)
    assert _choices(ours["verify"]) == {"numbers", "no"} | _choices(theirs["verify"])


def test_help_shows_every_default_of_prune():
    text = " ".join(fx("prune --help", width=400).output.split())
    known = {each.name: getattr(Settings(), each.name) for each in fields(Settings)}
    words = {"squeeze": "groups like any other", "only": "all", "ignore": "none", "rates": "none"}
    words |= {"scatter": "no-scatter", "recipe": "none"}
    words |= dict.fromkeys(("target", "normalize", "sensitivity"), "none")
    for name, value in known.items():
        option = f"--{name.replace('_', '-')}"
        shown = re.search(rf"{option} [^\[]*\[default: ([^\]]*)\]", text)
        assert shown and shown[1] == words.get(name, str(value)), (name, shown)


def test_every_option_with_a_value_shows_a_default():
    for name, found in commands():
        text = " ".join(fx(f"{name} --help", width=400).output.replace("│", "\n").split())
        for param in found.params:
            takes = param.param_type_name == "option" and not getattr(param, "is_flag", False)
            if takes:
                option = re.escape(param.opts[0])
                assert re.search(rf"{option}[ ,](?:(?! --\w).)*?\[default: ", text), (
                    name,
                    param.opts,
                )


# -- help ------------------------------------------------------------------------------------------


def test_all_commands_are_there():
    assert sorted(name for name, _ in commands()) == sorted(c for c in LEAVES if c != "recipes")


def test_help_fits_and_has_examples_and_the_exit_codes():
    for name, found in commands():
        assert 2 <= len(examples(found)) <= 3, name
        for line in fx(f"{name} --help").output.splitlines():
            assert len(line) <= 80
        assert all(len(line) <= 77 for line in examples(found)), name
    text = " ".join(fx("--help").output.split())
    for code, meaning in command.EXIT_CODES:
        assert f"{code} {meaning}" in text


def test_the_examples_of_all_helps_run(home):
    """In the order of the main help, as later ones use what earlier ones wrote."""
    done = 0
    for _, found in commands():
        for line in examples(found):
            fx(line.removeprefix("fxprune "))
            done += 1
    assert done >= 28


def test_version_and_no_arguments():
    assert fx("--version").stdout == f"fxprune {fxprune.__version__}\n"
    assert "Usage: fxprune" in fx("", code=2).output


PAGE = Path(__file__).resolve().parents[1] / "docs" / "cli.md"


def test_the_page_shows_what_is_printed(home):
    """Each ``$`` line of a console block is run; ``...`` stands for anything. Blocks that begin
    with the name of a file are such files."""
    page, how = PAGE.read_text().replace("\\\n", ""), re.MULTILINE | re.DOTALL
    for name, text in re.findall(r"^```python\n# ([\w.]+)\n(.*?)^```$", page, how):
        Path(name).write_text(text)
    shown = re.findall(r"^```console\n(.*?)^```$", page, how)
    parts = [part for block in shown for part in re.split(r"^\$ ", block, flags=re.MULTILINE)[1:]]
    assert parts
    for part in parts:
        line, _, want = part.partition("\n")
        got = fx(line.removeprefix("fxprune ")).stdout
        plain = ["\n".join(x.rstrip() for x in text.strip().splitlines()) for text in (want, got)]
        same = doctest.OutputChecker().check_output(*plain, doctest.ELLIPSIS)
        assert same, f"{line} shows\n{plain[0]}\nbut prints\n{plain[1]}"


# -- json ------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "keys"),
    [
        (f"prune net.py:Net {X}", {"report", "files", "seconds"}),
        (f"groups net.py:Net {X}", {"totals", "groups", "warnings"}),
        (f"explain net.py:Net conv1 {X}", {"title", "steps", "lines"}),
        (f"count net.py:Net {X}", {"model", "inputs", "parameters", "macs", "slimming_flops"}),
        (f"dump net.py:Net steps {X}", {"folder", "files", "report"}),
        (
            f"bench net.py:Net {X} -b 2 --rounds 8",
            {"threads", "confidence", "measured", "speedups"},
        ),
        ("criteria", {"criteria"}),
        ("recipes", {"recipes"}),
        ("recipes list", {"recipes"}),
        ("recipes show fpgm", {"recipe"}),
        ("rules list", {"rules"}),
        ("rules check my_rules.yaml", {"file", "rules"}),
        ("rules probe my_rules.yaml", {"rules", "findings"}),
    ],
)
def test_json_of_every_command(text, keys, home):
    found = data(text)
    assert set(found) == {"fxprune", "command", *keys}
    assert found["fxprune"] == fxprune.__version__ and found["command"] in text


def test_json_of_verify(home):
    fx(f"prune net.py:Net {X} --plan plan.json")
    found = data(f"verify net.py:Net --plan plan.json {X}")
    assert found["verification"]["shapes"] is True and found["plan"]["removed"] == 20


def test_json_of_an_error(home):
    done = fx(f"prune net.py:Net {X} --rate 40 --json", code=2)
    found = json.loads(done.stdout)
    assert found["error"]["kind"] == "OptionError" and found["exit_code"] == 2
    assert "hint: a share is meant: 0.4 for 40 %" in done.stderr


# -- prune and what follows ------------------------------------------------------------------------


def test_prune_does_what_the_library_does(home):
    found = data(
        f"prune net.py:Net {X} -c sparsity,side=below -r 0.25 --rates conv2=0.5 --ignore in:head "
        "--round-to 4 --seed 3 --scope local --verify shapes"
    )
    sys.path.insert(0, str(home))
    import net

    torch.manual_seed(3)
    pruned = fxprune.prune(
        net.Net().eval(),
        torch.rand(1, 3, 8, 8),
        criterion={"name": "sparsity", "side": "below"},
        rate=0.25,
        rates={"conv2": 0.5},
        ignore=["in:head"],
        round_to=4,
        verify="shapes",
    )
    expected = json.loads(json.dumps(pruned.fxprune.report.to_dict(), default=str))
    assert found["report"]["groups"] == expected["groups"]
    assert found["report"]["params"] == expected["params"]
    assert found["report"]["criterion"] == "sparsity(side=below)"
    assert found["report"]["verification"]["difference"] is None


def test_prune_writes_what_it_is_asked_for(home):
    done = fx(f"prune net.py:Net {X} -o small --plan plan.json --dump steps --arg width=8")
    assert (home / "small" / "plan.json").is_file() and (home / "steps" / "01-trace.txt").is_file()
    plan = fxprune.Plan.from_json((home / "plan.json").read_text())
    assert plan.shapes["conv1.weight"] == [8, 3, 3, 3]
    assert "saved: small" in done.stderr and "Net pruned by l2 at 0.5" in done.stdout
    fx(f"verify net.py:Net small {X} --arg width=8")


def test_a_criterion_of_ones_own(home):
    (home / "own_criterion.py").write_text(
        "def last(group):\n    import torch\n    return torch.arange(len(group)).double()\n"
    )
    fx(f"prune net.py:Net {X} -c own_criterion.py:last --plan plan.json")
    plan = fxprune.Plan.from_json((home / "plan.json").read_text())
    assert plan.kept["conv1.weight"][0] == list(range(8, 16)) and plan.criterion == "last"


def test_what_is_not_given_leaves_a_recipe_alone(home):
    (home / "mine.yaml").write_text("rate: 0.25\nonly: [conv1]\nmin_channels: 3\n")
    report = data(f"prune net.py:Net {X} --recipe mine.yaml")["report"]
    assert [row["kept"] for row in report["groups"]] == [12, 24, 10]
    report = data(f"prune net.py:Net {X} --recipe mine.yaml --rate 0.5 --only conv2")["report"]
    assert [row["kept"] for row in report["groups"]] == [16, 12, 10]


def test_no_verify_says_so_and_contradictions_are_refused(home):
    assert "not verified" in fx(f"prune net.py:Net {X} --no-verify").stdout
    fx(f"prune net.py:Net {X} --no-verify --verify shapes", code=2)


def onnx_outputs(file: str, x: torch.Tensor) -> torch.Tensor:
    import onnxruntime

    session = onnxruntime.InferenceSession(file)
    (got,) = session.run(None, {session.get_inputs()[0].name: x.numpy()})
    return torch.from_numpy(got)


def test_view_opens_the_page_of_the_steps(home, monkeypatch):
    opened: list[str] = []
    monkeypatch.setattr("webbrowser.open", opened.append)
    fx(f"prune net.py:Net {X} --view --dump steps")
    assert len(opened) == 1 and opened[0].endswith("/steps/view.html")
    assert "view: " in fx(f"prune net.py:Net {X} --view").stderr and len(opened) == 2
    fx("view steps --no-open --out page.html")
    assert len(opened) == 2 and (home / "page.html").is_file()
    assert data("view steps --no-open")["page"] == "steps/view.html"


def test_onnx_computes_the_same_for_any_batch(home):
    done = fx(f"prune net.py:Net {X} --onnx small.onnx -o small")
    assert "warning" not in done.stderr
    from net import Net

    small = fxprune.load("small", Net()).eval()
    for x in (torch.rand(1, 3, 8, 8), torch.rand(5, 3, 8, 8)):
        assert torch.allclose(onnx_outputs("small.onnx", x), small(x), atol=1e-5)


def test_onnx_of_one_batch_size_says_so(home):
    """The code itself holds the batch size."""
    text = NET.replace("x.mean((2, 3))", "x.mean(3).view(2, 24, 8).mean(2)")
    (home / "two.py").write_text(text)
    done = fx("prune two.py:Net -i 2x3x8x8 --onnx two.onnx -o small")
    told = " ".join(done.stderr.split())
    assert "warning: the ONNX file takes 2x3x8x8 only, not any batch size: " in told
    assert "Next steps" not in told and "_trace.py" not in told
    from two import Net

    x = torch.rand(2, 3, 8, 8)
    assert torch.allclose(
        onnx_outputs("two.onnx", x), fxprune.load("small", Net()).eval()(x), atol=1e-5
    )


@pytest.mark.parametrize("kind, starts", [("png", b"\x89PNG"), ("svg", b"<?xml"), ("pdf", b"%PDF")])
def test_a_picture_of_the_widths(home, kind, starts):
    done = fx(f"prune net.py:Net {X} --plot widths.{kind}")
    assert f"plot: widths.{kind}" in done.stderr and "nothing was saved" not in done.stderr
    assert Path(f"widths.{kind}").read_bytes().startswith(starts)


def test_pictures_are_refused_before_the_work(home, monkeypatch):
    fx(f"prune net.py:Net {X} --plot widths.txt", code=2)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    done = fx(f"prune net.py:Net {X} --plot widths.png", code=2)
    assert "pip install 'fxprune[plot]'" in done.stderr and "forward runs" not in done.stdout


def test_rules_of_ones_own_are_in_force(home):
    (home / "op_net.py").write_text(
        "import torch\nfrom torch import nn\n\n\nclass Net(nn.Module):\n"
        "    def __init__(self):\n        super().__init__()\n"
        "        self.a, self.b = nn.Linear(4, 8), nn.Linear(8, 2)\n\n"
        "    def forward(self, x):\n        return self.b(torch.nn.functional.silu(self.a(x)))\n"
    )
    (home / "frozen.yaml").write_text(RULES.replace("pointwise", "plain"))
    assert data("groups op_net.py:Net -i 1x4")["totals"]["may_shrink"] == 1
    found = fx("groups op_net.py:Net -i 1x4 --rules frozen.yaml --json", code=None)
    assert json.loads(found.stdout)["totals"]["may_shrink"] == 0


def test_groups_are_sorted_and_filtered(home):
    assert [g["name"] for g in data(f"groups net.py:Net {X}")["groups"]] == [
        "conv1", "conv2", "head",
    ]  # fmt: skip
    by_size = data(f"groups net.py:Net {X} --sort channels")["groups"]
    assert [g["channels"] for g in by_size] == [24, 16, 10]
    assert [g["name"] for g in data(f"groups net.py:Net {X} --state frozen")["groups"]] == ["head"]
    assert len(data(f"groups net.py:Net {X} --state free")["groups"]) == 2
    assert len(data(f"groups net.py:Net {X} --limit 1")["groups"]) == 1
    names = [g["name"] for g in data(f"groups net.py:Net {X} -f 'conv1*'")["groups"]]
    assert names == ["conv1"]
    assert "none of them fits" in fx(f"groups net.py:Net {X} -f nothing").stdout
    assert "reads  conv2.weight[1]" in fx(f"groups net.py:Net {X} --members").stdout


def test_explain_shows_the_line_of_the_source(home):
    found = data(f"explain net.py:Net conv1.weight conv2 {X}")
    assert found["steps"] and all("net.py" in step["source"] for step in found["steps"])
    assert "group conv1, 16 channels, may shrink" in fx(f"explain net.py:Net conv1 {X}").stdout


def test_bench_measures_both_and_says_how_much_faster(home):
    found = data(f"bench net.py:Net {X} -b 1 -b 2 --rounds 8 --on cpu")
    assert [(m["name"], m["batch"]) for m in found["measured"]] == [
        ("before", 1), ("after", 1), ("before", 2), ("after", 2),
    ]  # fmt: skip
    assert [s["batch"] for s in found["speedups"]] == [1, 2]
    done = fx(f"bench net.py:Net net.py:Net {X} -b 1 --rounds 8 --threads 1")
    assert "times as fast" in done.stdout and "1 thread, torch" in done.stdout


def test_bench_measures_as_networks_are_deployed(home, monkeypatch):
    seen: list = []
    real, compile = fxprune.latencies.latency, torch.compile

    def look(networks, *rest, **how):
        seen.extend(networks.values())
        return real(networks, *rest, **how)

    monkeypatch.setattr("fxprune.latencies.latency", look)
    monkeypatch.setattr(torch, "compile", lambda net: compile(net, backend="aot_eager"))
    bench = f"bench net.py:Net {X} -b 1 --rounds 8 --on cpu"
    fx(f"{bench} --dtype bfloat16 --channels-last")
    fx(f"{bench} --compile")
    cast, compiled = seen[:2], seen[2:]
    for net in cast:
        weight = net.get_parameter("conv2.weight")
        assert weight.dtype == torch.bfloat16
        assert weight.is_contiguous(memory_format=torch.channels_last)
    assert len(compiled) == 2 and all(hasattr(net, "_orig_mod") for net in compiled)


def test_bench_takes_a_saved_network(home):
    fx(f"prune net.py:Net {X} --rate 0.25 -o small")
    found = data("bench net.py:Net small -b 2 --rounds 8 --on cpu")
    assert [(m["name"], m["batch"]) for m in found["measured"]] == [("before", 2), ("after", 2)]
    (home / "small" / "model.safetensors").unlink()
    assert "there is no small/model" in fx("bench net.py:Net small", code=3).stderr


def test_bench_hands_over_the_original_and_the_pruned_one(home, monkeypatch):
    seen = []
    real = fxprune.latency

    def noted(networks, example, **how):
        seen.append({name: sum(p.numel() for p in n.parameters()) for name, n in networks.items()})
        return real(networks, example, **how)

    monkeypatch.setattr("fxprune.latencies.latency", noted)
    fx(f"bench net.py:Net {X} -b 1 --rounds 8 --on cpu")
    assert seen == [{"before": 4178, "after": 1230}]


def test_verify_refuses_other_weights(home):
    fx(f"prune net.py:Net {X} -o small")
    done = fx(f"verify net.py:Net small {X} --seed 5", code=1)
    assert "error: the pruned network differs from the masked original" in done.stderr
    told = " ".join(done.stderr.split())
    assert "the same --weights, or --seed" in told
    assert "a network that was trained or compensated after pruning differs too" in told


@pytest.mark.parametrize("how", ["least_squares", "bias"])
def test_verify_of_a_fitted_network_proves_its_plan(home, how):
    Path("calibration.py").write_text(_DATA)
    fx(f"prune net.py:Net {X} --data calibration.py:batches --compensate {how} -o fitted")
    shown = " ".join(fx(f"verify net.py:Net fitted {X}").stdout.split())
    assert "verified: shapes proven; numbers not compared: the weights were fitted" in shown
    assert "the plan, applied to the model anew, gives the masked original" in shown
    found = data(f"verify net.py:Net fitted {X}")
    assert found["verification"]["difference"] is None and found["verification"]["shapes"] is True
    assert "another model" in fx(f"verify net.py:Net fitted {X} --arg width=8", code=3).stderr


# -- what fxprune knows ----------------------------------------------------------------------------


def test_criteria_are_those_of_the_package():
    found = data("criteria")["criteria"]
    assert [each["name"] for each in found] == criteria.names()
    for each, registered in zip(found, complete.criteria(), strict=True):
        known = criteria.find(each["name"])
        assert registered.doc == " ".join(inspect.getdoc(known.function).split())
        assert each["kind"] == known.kind and each["options"] == list(criteria._options(known))
        assert each["doc"].endswith(".") and not re.search(r"\s[.,:;]", each["doc"])
    papers = {each["name"]: each["paper"] for each in found}
    assert papers["bn_gamma"] == "Liu et al. 2017, Network Slimming" and papers["l2"] == ""


def test_recipes_are_those_of_the_package():
    assert [each["name"] for each in data("recipes")["recipes"]] == recipes.names()
    assert fx("recipes").stdout == fx("recipes list").stdout
    assert data("recipes show network_slimming")["recipe"]["select_by"] == "threshold"
    done = fx("recipes show network_sliming", code=3)
    assert "did you mean `network_slimming`?" in done.stderr


def test_rules_are_searched_by_name_op_and_kind():
    every, some = data("rules list")["rules"], data("rules list --search conv2d")["rules"]
    assert len(every) == len(fxprune.rules.current().rules)
    assert {"conv", "conv_transpose"} >= {r["name"] for r in some} - {"deform_conv"} - {
        "deform_conv_without_mask"
    }
    kinds = {r["kind"] for r in data("rules list --kind reduce")["rules"]}
    assert kinds == {"reduce"}
    assert "reduce" in fx("rules list --kind redcue", code=3).stderr


def test_a_broken_rule_file_is_named_with_its_line(home):
    (home / "bad.yaml").write_text("one:\n  words: silu\n  kind: pointwise\n  wrods: relu\n")
    done = fx("rules check bad.yaml", code=3)
    assert done.stderr.startswith("error: bad.yaml:4 rule `one`") and "`words`" in done.stderr
    assert "bad.yaml:4" in fx(f"groups net.py:Net {X} --rules bad.yaml", code=3).stderr


def test_probing_finds_a_wrong_rule(home):
    (home / "wrong.yaml").write_text(
        RULES.replace("silu", "cumsum").replace("[2, 3]]", "[2, 3], 1]")
    )
    done = fx("rules probe wrong.yaml", code=None)
    assert done.exit_code == 1 and "wrong.yaml:1 rule `my_scale`" in done.stdout
    assert "did you mean" in fx("rules probe covn", code=3).stderr


# -- tables ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [60, 80, 160])
@pytest.mark.parametrize(
    "text",
    ["criteria", "recipes", "recipes show fpgm", "rules list", "groups torchvision:resnet18"]
    + ["prune torchvision:resnet18 --verify no", "prune --help", "--help"],
)
def test_tables_fit_the_terminal(text, width):
    done = fx(text, width=width)
    assert max(map(len, done.output.splitlines())) <= width
    if width == 160 and text.startswith("groups"):
        assert "layer2.0.conv2" in done.stdout and "reaches the network's output" in done.stdout


def test_groups_of_one_reason_are_one_row():
    done = fx("prune timm:test_vit --mixing none --heads keep --verify no", width=120)
    table = done.stdout.partition("because")[2]
    assert re.search(
        r"blocks.0.attn.qkv and \d+ more +(\d+) of \1 +heads stay \(--heads keep\)", table
    )
    assert table.count("heads stay") == 1


def test_names_are_folded_not_cut():
    joined = "".join(fx("recipes", width=60).stdout.split())
    for name in recipes.names():
        assert name[:12] in joined
    assert "…" not in fx("rules list", width=60).stdout


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "code", "said"),
    [
        ("prune net.py:Output -i 1x4", 1, "error: no channel of Output may go"),
        (f"prune net.py:Net {X} --rate 2", 2, "error: --rate 2.0 is outside [0, 1)"),
        ("prune net.py:Net -i 1x4x8x8", 2, "to have 3 channels, but got 4"),
        (f"prune net.py:Net {X} --scope gobal", 2, "gobal"),
        (f"prune net.py:Net {X} --rates conv1", 2, "--rates conv1 gives no rate"),
        (f"prune net.py:Net {X} --only nothing", 2, "matches nothing"),
        (f"prune net.py:Net {X} --recipe nosuch", 3, "no recipe `nosuch`"),
        (f"prune net.py:Net {X} -o no/such", 3, "there is no folder no"),
        (f"prune net.py:Net {X} --weights no.pt", 3, "there is no file no.pt"),
        (f"prune net.py:Net {X} --device tpu", 2, "device `tpu` cannot be used"),
        (f"prune net.py:Net {X} --arg width", 2, "`width` is no argument"),
        (f"explain net.py:Net conv3 {X}", 2, "did you mean"),
        ("groups net.py:Nte", 3, "did you mean `Net`?"),
        ("prun net.py:Net", 2, "Did you mean 'prune'?"),
        ("verify net.py:Net", 2, "verify takes a folder or --plan"),
        ("verify net.py:Net --plan no.json", 3, "the plan no.json cannot be read"),
        ("verify net.py:Net --plan net.py", 3, "not a plan"),
        ("view nosuch", 3, "there is no folder nosuch"),
        ("view .", 3, "holds no view.json"),
        ("rules check nosuch.yaml", 3, "nosuch.yaml cannot be read"),
    ],
)
def test_errors_have_their_code_and_no_traceback(text, code, said, home):
    done = fx(text, code, width=200)
    assert said in done.stderr and "Traceback" not in done.output
    assert done.stdout == ""


def test_debug_shows_the_traceback(home):
    assert "Traceback" in fx(f"prune net.py:Net {X} --rate 2 --debug", code=2).stderr


def test_an_unexpected_exception_is_called_one(home, monkeypatch):
    def broken(*args, **kwargs):
        raise ZeroDivisionError("division by zero")

    monkeypatch.setattr(fxprune, "analyze", broken)
    done = fx(f"groups net.py:Net {X}", code=4, width=200)
    assert done.stderr.startswith("error: ZeroDivisionError: division by zero\n")
    assert "a defect of fxprune, or of the model's code" in done.stderr
    assert "test_cli.py" in done.stderr and "Traceback" not in done.stderr
    assert "Traceback" in fx(f"groups net.py:Net {X} --debug", code=4).stderr


def test_messages_speak_of_options():
    said = {
        "rate=40 is outside": "--rate 40 is outside",
        "pass example_inputs=(x,) as it takes them": "pass --input SHAPE as it takes them",
        "mixing='all' would free": "--mixing all would free",
        'use scope="local" and select_by="rate"': "use --scope local and --select-by rate",
        "scatter=True frees": "--scatter frees",
        "no criterion `l3`": "no criterion `l3`",
        "x.rate=3": "x.rate=3",
        "max_rate['fc']=2 is outside": "--max-rate fc=2 is outside",
        "rates['layer1.*']=2 is outside": "--rates 'layer1.*=2' is outside",
    }
    assert {text: spoken(text) for text in said} == said


def test_quiet_and_verbose(home):
    assert fx(f"prune net.py:Net {X} -q").stderr.replace("forward runs\n", "") == ""
    assert re.search(r"\d s  rewrite", fx(f"prune net.py:Net {X} -v").stderr)


# -- processes -------------------------------------------------------------------------------------


def process(*words: str, **how):
    env = {**os.environ, "PYTHONPATH": str(Path(fxprune.__file__).parents[1]), "COLUMNS": "80"}
    return subprocess.Popen(
        [sys.executable, "-m", "fxprune", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
        **how,
    )


def test_data_goes_to_stdout_and_the_rest_to_stderr(home):
    running = process("count", "net.py:Net", "-i", "1x3x8x8", "--json", "-v")
    out, err = running.communicate()
    assert running.returncode == 0 and json.loads(out)["parameters"] == 4178
    assert "build net.py:Net" in err


def test_progress_is_shown_in_a_terminal_on_stderr_alone(home):
    pty = pytest.importorskip("pty")
    ours, theirs = pty.openpty()
    words = [sys.executable, "-m", "fxprune", *f"prune net.py:Net {X} --json".split()]
    env = {**os.environ, "PYTHONPATH": str(Path(fxprune.__file__).parents[1]), "TERM": "xterm"}
    running = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=theirs, env=env)
    os.close(theirs)
    seen: list[bytes] = []
    reader = threading.Thread(target=_read_all, args=(ours, seen), daemon=True)
    reader.start()
    assert running.stdout is not None
    assert json.loads(running.stdout.read())["command"] == "prune"
    assert running.wait() == 0
    reader.join(timeout=10)
    shown = b"".join(seen).decode()
    assert "load PyTorch" in shown and "forward runs" in shown


def _read_all(terminal: int, seen: list[bytes]) -> None:
    """Until the other end is closed, which a terminal says by an error."""
    with contextlib.suppress(OSError):
        while part := os.read(terminal, 1 << 16):
            seen.append(part)


@pytest.mark.parametrize("words", ["rules list --json", "criteria"])
def test_a_closed_pipe_is_quiet(words):
    running = process(*words.split())
    assert running.stdout is not None and running.stderr is not None
    running.stdout.close()
    assert (running.wait(), running.stderr.read()) == (141, "")


def test_ctrl_c_is_quiet(home):
    (home / "slow.py").write_text("import time\nprint('here', flush=True)\ntime.sleep(60)\n")
    running = process("count", "slow.py:Net")
    assert running.stderr is not None
    while "here" not in running.stderr.readline():
        pass
    running.send_signal(signal.SIGINT)
    assert running.wait() == 130 and running.stderr.read() == "interrupted\n"


def test_colours_are_off_where_asked_and_in_pipes(home):
    running = process("count", "net.py:Nte")
    _, err = running.communicate()
    assert running.returncode == 3 and "\x1b" not in err


QUICK = [["--help"], ["--version"], ["prune", "--help"], ["criteria"]]


@pytest.mark.parametrize("words", QUICK, ids=" ".join)
def test_help_and_version_do_not_import_torch(words):
    code = (
        "import sys\nfrom fxprune.cli.app import app\n"
        f"try: app({words!r})\nexcept SystemExit as end: assert not end.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_importing_fxprune_imports_neither_typer_nor_rich():
    code = (
        "import sys, fxprune\nfxprune.prune, fxprune.latency\n"
        "assert not {'typer', 'rich'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_without_typer_the_command_says_what_to_install():
    code = "import sys\nsys.modules['typer'] = None\nfrom fxprune.cli import main\nmain()"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 2 and "Traceback" not in done.stderr
    assert "needs typer" in done.stderr and "pip install" in done.stderr


# -- completion ------------------------------------------------------------------------------------


def completed(words: str) -> list[str]:
    """What bash is told, whose words break at colons."""
    parts = [part for word in words.split() for part in re.split("(:)", word) if part]
    code = (
        "import sys\nfrom fxprune.cli import main\n"
        "try: main()\n"
        "finally: assert 'torch' not in sys.modules"
    )
    env = {
        **os.environ,
        "_FXPRUNE_COMPLETE": "complete_bash",
        "COMP_WORDS": "\n".join(parts),
        "COMP_CWORD": str(len(parts) - 1),
    }
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=env, check=True
    )
    return done.stdout.split()


@pytest.mark.parametrize(
    ("words", "found"),
    [
        ("fxprune ex", ["explain"]),
        ("fxprune prune torchvision:resnet1", ["resnet101", "resnet152", "resnet18"]),
        (
            "fxprune prune torchvision:resnet18 --criterion l",
            ["l1", "l1_gamma", "l2", "lamp", "linf"],
        ),
        ("fxprune prune torchvision:resnet18 --recipe mobile_blnet_ratio_sum:s", ["share"]),
        ("fxprune recipes show network", ["network_slimming"]),
    ],
)
def test_completion_in_bash(words, found):
    assert completed(words) == found


def test_completion_of_paths_and_classes(home):
    (home / "folder").mkdir()
    assert complete.complete_model("net.py:") == ["net.py:Net", "net.py:Output", "net.py:Fails"]
    assert complete.complete_model("n") == ["net.py:"] and complete.complete_model("f") == [
        "folder/"
    ]
    assert "timm:resnet18" in complete.complete_model("timm:resnet")
    assert complete.complete_recipe("") == recipes.names()


@pytest.mark.parametrize(
    ("words", "at", "expected"),
    [
        (["a", "b", ":", "c"], 3, (["a", "b:c"], 1)),
        (["a", "b", ":"], 2, (["a", "b:"], 1)),
        (["a", "b", ":", "c", "--x", "d"], 5, (["a", "b:c", "--x", "d"], 3)),
        (["a", "b"], 1, (["a", "b"], 1)),
    ],
)
def test_words_that_bash_took_apart_are_joined(words, at, expected):
    assert complete.joined(words, at) == expected


def test_the_module_is_the_command():
    running = process("--version")
    assert running.communicate()[0] == f"fxprune {fxprune.__version__}\n"


_DATA = """
import torch

def batches():
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(8, 3, 8, 8, generator=generator)
    return [(x, torch.arange(8) % 2)]

ready = [torch.zeros(4, 3, 8, 8)]
number = 3

def of_folder(folder):
    return batches()

def lost():
    raise FileNotFoundError("no such folder")

def breaks():
    yield from batches()
    raise ValueError("the file ends here")

def counted():
    return 3

class Loader:
    def __iter__(self):
        return iter(batches())

def of_output(output):
    return output.mean()

def torn(output, target):
    raise KeyError("no class")

def loss(output, target):
    return torch.nn.functional.cross_entropy(output, target)
"""


def test_budgets_data_and_compensation(home):
    Path("calibration.py").write_text(_DATA)
    words = "-c fisher -t macs=0.5 --data calibration.py:batches --compensate least_squares"
    done = fx(f"prune net.py:Net {X} {words} --json")
    report = json.loads(done.stdout)["report"]
    assert report["macs"][1] <= 0.5 * report["macs"][0]
    assert report["targets"][0]["kind"] == "macs" and report["compensation"]["fitted"]
    shown = fx(f"prune net.py:Net {X} {words}").stdout
    assert "target: macs" in shown and "fitted:" in shown
    fx(f"prune net.py:Net {X} -c apoz --data calibration.py:ready")
    words = "--data calibration.py:Loader --loss calibration.py:loss"
    fx(f"prune net.py:Net {X} -c fisher {words}")


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        ("--data calibration.py:of_folder", 2, "without arguments: missing a required argument"),
        ("--data calibration.py:lost", 3, "fails: FileNotFoundError: no such folder"),
        ("--data calibration.py:breaks", 3, "fails: ValueError: the file ends here"),
        ("--data calibration.py:number", 2, "--data calibration.py:number is an int"),
        ("--data calibration.py:counted", 2, "--data calibration.py:counted gives an int"),
        ("--data calibration.py", 3, "--data calibration.py names nothing in the file"),
        ("--data calibration.py", 3, "hint: calibration.py:NAME"),
        ("--data calibration", 3, "hint: write file.py:NAME"),
        ("--data calibration.py:redy", 3, "calibration.py has no `redy`"),
        ("--data calibration.py:redy", 3, "batches, ready, of_folder, lost, breaks, counted, Load"),
        ("--data calibration.py:redy", 3, "did you mean `ready`?"),
        ("--data calibration.py:Loader.first", 3, "calibration.py has no `Loader.first`"),
        ("--loss calibration.py:ready", 2, "--loss calibration.py:ready is a list"),
        ("--loss calibration.py:of_output", 2, "function of (output, target): too many positional"),
        ("--loss calibration.py:torn", 3, "--loss calibration.py:torn fails: KeyError"),
        ("--loss calibration.py", 3, "--loss calibration.py names nothing in the file"),
    ],
)
def test_data_and_losses_that_cannot_be_used(words, code, said, home):
    Path("calibration.py").write_text(_DATA)
    words = words if "--data" in words else f"{words} --data calibration.py:batches"
    done = fx(f"prune net.py:Net {X} -c fisher {words}", code, width=200)
    assert said in done.stderr and "Traceback" not in done.stderr


def kept_of(words: str) -> list[int]:
    report = data(f"prune net.py:Net {X} --verify no --rate 0.9 {words}")["report"]
    return [row["kept"] for row in report["groups"]]


def test_floors_and_caps_of_single_layers(home):
    assert kept_of("--min-channels 4") == [4, 4, 10]
    assert kept_of("--min-channels 'conv1*=8'") == [8, 3, 10]
    assert kept_of("--min-channels 'conv1*=8' --min-channels 4") == [8, 4, 10]
    assert kept_of("--max-rate .5") == [8, 12, 10]
    assert kept_of("--max-rate conv2=.25 --max-rate .5") == [8, 18, 10]


def test_a_measured_sensitivity_is_read(home):
    sys.path.insert(0, str(home))
    import net

    found = fxprune.sensitivity(net.Net().eval(), [torch.rand(4, 3, 8, 8)], rates=(0.25, 0.5))
    Path("found.json").write_text(found.to_json())
    fx(f"prune net.py:Net {X} -t macs=0.5 --sensitivity found.json")
    Path("found.json").write_bytes(b"\xff")
    done = fx(f"prune net.py:Net {X} -t macs=0.5 --sensitivity found.json", code=3)
    assert "found.json cannot be read: it is no text" in done.stderr


def test_a_table_of_times_meets_a_latency(home):
    sys.path.insert(0, str(home))
    import net

    analysis = fxprune.analyze(net.Net().eval(), torch.rand(1, 3, 8, 8))
    table = fxprune.LatencyTable.measure(analysis, budget_s=0.2, cache=home)
    Path("times.json").write_text(table.to_json())
    words = f"-t latency_ms={table.ms() * 0.9:.6f} --latency-table times.json"
    (reached,) = data(f"prune net.py:Net {X} {words}")["report"]["targets"]
    assert reached["before"] == pytest.approx(table.ms(), rel=1e-3)


@pytest.mark.parametrize(
    ("words", "fault"),
    [
        ("-t macs", "--target macs gives no amount"),
        ("-t 0.5", "--target 0.5 gives no amount"),
        ("-t macs=0.5 -t macs=0.6", "--target macs is given twice"),
        ("-t macs=-1", "--target macs=-1.0 must be a number above 0"),
        ("--rates a=.1 --rates a=.2", "--rates a is given twice"),
        ("--rates conv1=2", "--rates conv1=2.0 is outside"),
        ("--min-channels 2 --min-channels 3", "--min-channels is given twice"),
        ("--min-channels conv1=x", "--min-channels conv1=x gives no whole number"),
        ("--max-rate half", "--max-rate half gives no share"),
        ("--max-rate conv1=2", "--max-rate conv1=2.0 is outside"),
        ("--max-rate conv9=.5", "conv9"),
        ("-t latency_ms=1 --latency-table no.json", "there is no file no.json"),
        ("-t macs=0.5 -r 0.3", "rate and target"),
        ("--round-to best", "--round-to best is no number"),
        ("-c fisher", "no data"),
        ("-t macs=0.5 --sensitivity no.json", "there is no file no.json"),
    ],
)
def test_wrong_budgets_and_data(home, words, fault):
    done = fx(f"prune net.py:Net {X} {words}", code=2)
    assert fault in done.stderr
