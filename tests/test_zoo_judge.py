"""What measures whole zoos is itself held to small networks with a known answer."""

from __future__ import annotations

import copy
import json
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch import nn

pytest.importorskip("rich")
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import common, zoo, zoo_networks, zoo_page, zoo_peer, zoo_reference

ROWS = [0, 2, 3, 5]


class Net(nn.Module):
    """Two convolutions, and something between them."""

    def __init__(self, between=F.relu, width=8, norm=None):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, width, 3), nn.Conv2d(width, 4, 3)
        self.norm = norm(width) if norm else nn.Identity()
        self.between = between

    def forward(self, x):
        return self.b(self.between(self.norm(self.a(x))))


def lively(net):
    torch.manual_seed(0)
    for parameter in net.parameters():
        nn.init.normal_(parameter, 0.3, 0.5)
    return net.eval()


def narrow(net, made, rows=ROWS, columns=None):
    """`made`, a net of four channels, with the rows of `net`'s first layer and columns of its
    second."""
    state = {name: t[rows] for name, t in net.state_dict().items() if name[0] in "an" and t.ndim}
    state["b.weight"] = net.b.weight[:, rows if columns is None else columns]
    made.load_state_dict({**net.state_dict(), **state})
    return made.eval()


def judged(net, pruned):
    kept = {n: {0: ROWS} for n, t in net.state_dict().items() if n[0] in "an" and t.ndim}
    kept["b.weight"] = {1: ROWS}
    args = (torch.randn(1, 3, 9, 9),)
    network = zoo_networks.Network("net", "", "classification", net, args)
    return zoo_reference.compared(network, net, pruned, kept)


@pytest.mark.parametrize("norm", [None, nn.BatchNorm2d, lambda n: nn.GroupNorm(1, n)])
def test_the_right_channels_are_the_same(norm):
    net = lively(Net(norm=norm))
    found = judged(net, narrow(net, Net(width=4, norm=norm)))
    assert found["verdict"] == "same" and found["difference"] < 1e-12


class Last(nn.LayerNorm):
    """Over the channels of an image."""

    def forward(self, x):
        return super().forward(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)


@pytest.mark.parametrize("norm", [Last])
def test_norms_run_over_the_kept_channels(norm):
    net = lively(Net(norm=norm))
    assert judged(net, narrow(net, Net(width=4, norm=norm)))["verdict"] == "same"


def test_columns_of_other_channels_are_wrong():
    net = lively(Net())
    found = judged(net, narrow(net, Net(width=4), columns=[0, 2, 3, 6]))
    assert found["verdict"] == "differs" and found["difference"] > 1e-3


def test_a_flip_that_was_taken_for_pointwise_is_wrong():
    flip = lambda x: torch.relu(x).flip(1)  # noqa: E731
    net = lively(Net(flip))
    assert judged(net, narrow(net, Net(flip, width=4)))["verdict"] == "differs"


@pytest.mark.parametrize(
    "mixing, why",
    [
        (lambda x: x * x.mean(1, keepdim=True), "mean over removed channels"),
        (lambda x: x.softmax(1), "_softmax over removed channels"),
        (lambda x: x * x.sigmoid().sum(1, keepdim=True), "sum over removed channels"),
        (lambda x: x / x.shape[1], "div by a number that follows a width"),
    ],
)
def test_what_has_no_masked_form_is_not_compared(mixing, why):
    net = lively(Net(mixing))
    found = judged(net, narrow(net, Net(mixing, width=4)))
    assert (found["verdict"], found["note"]) == ("not compared", why)


def test_a_sum_over_channels_that_are_zero_is_no_excuse():
    gate = lambda x: torch.relu(x) * torch.relu(x).sum(1, keepdim=True)  # noqa: E731
    net = lively(Net(gate))
    assert judged(net, narrow(net, Net(gate, width=4)))["verdict"] == "same"
    assert (
        judged(net, narrow(net, Net(gate, width=4), columns=[1, 2, 3, 5]))["verdict"] == "differs"
    )


def test_a_constant_output_proves_nothing():
    net = lively(Net(lambda x: x * 1e-12))
    made = narrow(net, Net(lambda x: x * 1e-12, width=4), columns=[1, 2, 3, 5])
    assert judged(net, made)["verdict"] == "weak"


@pytest.mark.parametrize("between, verdict", [(F.relu, "same"), (lambda x: x.flip(1), "differs")])
def test_torch_pruning_is_judged_by_what_it_removed(between, verdict):
    pytest.importorskip("torch_pruning")
    net = lively(Net(between))
    network = zoo_networks.Network("net", "", "classification", net, (torch.randn(1, 3, 9, 9),))
    original, record = copy.deepcopy(net), {"params": [1, 1]}
    pruned, kept = zoo_peer.pruned_by_torch_pruning(network, record, lambda stage: None)
    assert kept["b.weight"][1] == kept["a.weight"][0] or verdict == "differs"
    assert zoo_reference.compared(network, original, pruned, kept)["verdict"] == verdict


# -- networks --------------------------------------------------------------------------------------


class Attention(nn.Module):
    def forward(self, x):
        return (x @ x.transpose(-1, -2) / 3).softmax(-1) @ x


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(4, 4))

    def forward(self, x):
        return x * (x @ self.weight).softmax(-1)


@pytest.mark.parametrize("net, attends", [(Attention(), True), (Gate(), False)])
def test_attention_is_a_softmax_of_a_product_of_activations(net, attends):
    assert zoo_networks.attends(net, (torch.randn(2, 4, 4),)) is attends


def test_a_network_that_cannot_be_built_says_so():
    said = []
    zoo.measure("torchvision:no_such_network", "fxprune", lambda record: said.append(dict(record)))
    assert said[-1]["verdict"] == "not built" and "no_such_network" in said[-1]["why"]


def test_the_smallest_network_of_a_family_is_found():
    pytest.importorskip("timm")
    names = ["resnet50", "resnet10t", "resnet101", "test_resnet"]
    assert zoo_networks._smallest(names) == "resnet10t"


# -- processes and pages ---------------------------------------------------------------------------


def test_limits_of_time_and_memory_end_a_process():
    wait = "import time; time.sleep(60)"
    found = common.apart("timeit", "-n1", "-r1", wait, limit=1)
    assert found == {"problem": "took more than 1 s", "ended": "time"}
    fill = f"x = b'1' * 2**29; {wait}"
    found = common.apart("timeit", "-n1", "-r1", fill, limit=50, memory=2**28)
    assert found == {"problem": "held more than 0.2 GiB", "ended": "memory"}


def test_a_process_that_fails_keeps_what_it_said():
    said = "import json; print(json.dumps({'stage': 'prune'})); raise ValueError('no')"
    found = common.apart("timeit", "-n1", "-r1", said, limit=50)
    assert found["stage"] == "prune" and found["ended"] == "code"


RECORDS = [
    {"list": "small", "names": ["timm:a", "timm:b"]},
    {"name": "timm:a", "tool": "fxprune", "verdict": "time", "why": "took long", "params": [9, 9]},
    {
        "name": "timm:a", "tool": "fxprune", "verdict": "ok", "family": "f", "params": [100, 30],
        "channels": 10, "prunable": 8, "outputs": 2, "seconds": 1.0, "memory": 2**20,
        "check": {"verdict": "same"},
    },
    {"name": "timm:b", "tool": "fxprune", "verdict": "silently wrong", "family": "g",
     "params": [100, 30], "channels": 10, "prunable": 1, "outputs": 2, "why": "",
     "frozen": [["an unknown op", 7, ""]]},
]  # fmt: skip


def test_a_page_is_made_of_records_alone(tmp_path):
    path = tmp_path / "zoo.jsonl"
    path.write_text("".join(json.dumps(each) + "\n" for each in RECORDS))
    log = zoo.Log(str(path))
    assert [r["verdict"] for r in log.records.values()] == ["ok", "silently wrong"]
    zoo_page.publish(log.lists, list(log.records.values()), str(tmp_path / "zoo.md"))
    page = (tmp_path / "zoo.md").read_text()
    assert "| small | fxprune | 2 | 2 | 1 | 50.0% | 1 |" in page
    assert "1 of 2 CNN families (those without softmax attention) have >= 70% of all" in page
    assert "7 an unknown op" in page and "| `timm:b` | fxprune | silently wrong |" in page


def test_of_several_files_the_last_counts_and_is_written_to(tmp_path):
    first, last = tmp_path / "first.jsonl", tmp_path / "last.jsonl"
    first.write_text("".join(json.dumps(each) + "\n" for each in RECORDS[:2]))
    last.write_text(json.dumps(RECORDS[2]) + "\n")
    log = zoo.Log(str(first), str(last))
    assert [r["verdict"] for r in log.records.values()] == ["ok"]
    log.add(RECORDS[3])
    assert len(first.read_text().splitlines()) == len(last.read_text().splitlines()) == 2


def test_a_list_shows_its_families_unless_another_did():
    records = [r for r in RECORDS if "family" in r]
    lists = {"some": ["timm:a"], "same": ["timm:a"], "more": ["timm:a", "timm:b"]}
    titles = [title for title, *_ in zoo_page.family_tables(lists, records)]
    assert titles == ["fxprune by family: some", "fxprune by family: more"]


def test_a_list_that_was_hardly_run_has_no_headline():
    records = [r | {"large": True} for r in RECORDS if "family" in r]
    assert list(zoo_page.headlines("small", records)) == []
    assert len(list(zoo_page.headlines("small", RECORDS[2:3]))) == 2
