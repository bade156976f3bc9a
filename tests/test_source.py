"""Saved networks need nothing: they load without the original, and their source runs alone."""

from __future__ import annotations

import copy
import importlib.util
import json
import subprocess
import sys
import textwrap
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file
from test_saving import signed_file
from torch import nn
from wild import WILD, Wild
from zoo_small import leaves

import fxprune
from fxprune import described, opnames, rules, saving
from fxprune.errors import SaveError

OWN_CLASSES = {"gives_a_dataclass", "gives_a_named_tuple"}  # their outputs are no plain data


def saved(case: Wild, folder: Path) -> nn.Module:
    model = case.build()
    example = case.args() if not case.keywords else case.kwargs()
    pruned = fxprune.prune(model, example, rate=0.5, mixing=case.mixing, verify=False)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        fxprune.save(pruned, folder)
    return pruned


def outputs(case: Wild, model: nn.Module, *, train: bool) -> list:
    torch.manual_seed(5)
    own = copy.deepcopy(model).train(train)
    with torch.no_grad():
        return leaves(own(**case.kwargs()) if case.keywords else own(*case.args()))


def same(left: list, right: list) -> bool:
    return len(left) == len(right) and all(
        torch.equal(a.isnan(), b.isnan()) and torch.equal(a.nan_to_num(), b.nan_to_num())
        for a, b in zip(left, right, strict=True)
    )


def module(path: Path) -> Any:
    spec = importlib.util.spec_from_file_location(f"of_{path.parent.name}", path)
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


@pytest.mark.parametrize("name", WILD)
def test_a_network_comes_back_without_the_original(name, tmp_path):
    case = WILD[name]
    pruned = saved(case, tmp_path)
    if name in OWN_CLASSES:
        assert not (tmp_path / "model.py").exists()
        with pytest.raises(SaveError, match="does not say how"):
            fxprune.load(tmp_path)
        return
    again, own = fxprune.load(tmp_path), module(tmp_path / "model.py").load()
    assert list(again.state_dict()) == list(pruned.state_dict())
    assert own.state_dict().keys() == pruned.state_dict().keys()
    for train in (False, True) if case.trains else (False,):
        expected = outputs(case, pruned, train=train)
        assert same(outputs(case, again, train=train), expected)
        assert same(outputs(case, own, train=train), expected)
    learns = {n: p.requires_grad for n, p in pruned.named_parameters(remove_duplicate=False)}
    for found in (again, own):
        assert learns == {
            n: p.requires_grad for n, p in found.named_parameters(remove_duplicate=False)
        }


class Gated(nn.Module):
    """Tied weights, buffers of both kinds, a frozen layer, a number of its own, odd names."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        self.blocks = nn.ModuleDict({"in-1": nn.Conv2d(8, 8, 1), "0": nn.PReLU(8)})
        self.twin = nn.Conv2d(8, 8, 1)
        self.twin.weight = self.blocks["in-1"].weight
        self.register_buffer("table", torch.rand(8), persistent=False)
        self.register_buffer("shift", torch.rand(1, 8, 1, 1))
        self.drop, self.head = nn.Dropout(0.3), nn.Linear(8, 4)
        self.stem.requires_grad_(False)

    def forward(self, x, scale: float = 2.0):
        x = self.blocks["0"](self.blocks["in-1"](self.stem(x)) + self.shift)
        x = self.twin(x) * self.table[None, :, None, None] ** 2
        return {"logits": self.head(self.drop(-x.mean((2, 3)) * scale)), "size": x.shape[0]}


def test_what_a_network_owns_comes_back(tmp_path):
    x = torch.rand(2, 3, 8, 8)
    pruned = fxprune.prune(Gated(), x, rate=0.5)
    fxprune.save(pruned, tmp_path)
    again, own = fxprune.load(tmp_path), module(tmp_path / "model.py").load()
    for found in (again, own):
        assert torch.equal(found.eval()(x)["logits"], pruned.eval()(x)["logits"])
        assert found.twin.weight is found.blocks.get_submodule("in-1").weight
        assert "table" not in found.state_dict() and not found.stem.weight.requires_grad
        assert found(x)["size"] == 2
    assert again.fxprune.plan == pruned.fxprune.plan
    assert str(again.fxprune.report) == str(pruned.fxprune.report)
    assert str(pruned.fxprune.report.heading()[0]) in (tmp_path / "model.py").read_text()


def test_a_size_among_the_outputs(tmp_path):
    class Sized(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)

        def forward(self, x):
            x = self.b(self.a(x))
            return x, x.shape, -x + 0 - -1

    x = torch.rand(2, 3, 8, 8)
    pruned = fxprune.prune(Sized(), x)
    fxprune.save(pruned, tmp_path)
    for found in (fxprune.load(tmp_path), module(tmp_path / "model.py").load()):
        assert found(x)[1] == pruned(x)[1] and torch.equal(found(x)[2], pruned(x)[2])


def test_a_saved_network_knows_its_inputs(tmp_path):
    """And its nodes name no line of whoever asked for the analysis."""
    fxprune.save(fxprune.prune(Gated(), torch.rand(2, 3, 10, 10)), tmp_path)
    analysis = fxprune.analyze(fxprune.load(tmp_path))
    assert analysis.inputs.describe() == "2x3x10x10"
    assert all(node.meta.get("source") is None for node in analysis.graph.graph.nodes)
    plain = fxprune.analyze(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)))
    assert all(node.meta.get("source") is None for node in plain.graph.graph.nodes)


def test_a_loaded_network_is_like_any(tmp_path):
    """It trains, copies, is pruned again, and saved again."""
    x = torch.rand(2, 3, 8, 8)
    fxprune.save(fxprune.prune(Gated(), x, rate=0.25), tmp_path / "a")
    again = fxprune.load(tmp_path / "a").train()
    before = again.head.weight.detach().clone()
    optimizer = torch.optim.SGD([p for p in again.parameters() if p.requires_grad], lr=0.1)
    again(x)["logits"].square().sum().backward()
    optimizer.step()
    assert not torch.equal(before, again.head.weight)
    smaller = fxprune.prune(copy.deepcopy(again), x, rate=0.5)
    fxprune.save(smaller, tmp_path / "b")
    assert smaller.stem.out_channels == fxprune.load(tmp_path / "b").stem.out_channels == 3


def test_the_source_needs_neither_fxprune_nor_the_original(tmp_path):
    import torchvision

    x = torch.rand(2, 3, 64, 64)
    pruned = fxprune.prune(torchvision.models.shufflenet_v2_x0_5().eval(), x, rate=0.5)
    fxprune.save(pruned, tmp_path)
    torch.save({"x": x, "y": pruned(x)}, tmp_path / "expected.pt")
    script = """
        import sys
        class Refuse:
            def find_spec(self, name, path=None, target=None):
                if name.split(".")[0] in ("fxprune", "torchvision", "pickle_of_the_original"):
                    raise ImportError(name)
        sys.meta_path.insert(0, Refuse())
        import torch
        torch.set_num_threads(1)
        from model import load
        wanted = torch.load("expected.pt")
        print(torch.equal(load()(wanted["x"]), wanted["y"]), "fxprune" in sys.modules)
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(script)],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.stdout == "True False\n", done.stderr


# -- layers of other libraries ---------------------------------------------------------------------

WRITTEN = [
    (rule, name) for rule in rules.current().rules for name in rule.written if "timm" in name
]


@pytest.mark.parametrize(("rule", "name"), WRITTEN, ids=lambda x: str(x).rpartition(".")[2][:20])
def test_what_a_rule_writes_computes_the_same(rule, name, tmp_path):
    """In training too, where statistics and drawn numbers count."""
    import timm.layers

    cls = getattr(timm.layers, name.rpartition(".")[2], None) or getattr(
        timm.layers.norm_act, name.rpartition(".")[2]
    )

    class Holds(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 8, 1)
            self.layer = cls(0.4) if "Drop" in name else cls(8)
            self.last = nn.Conv2d(8, 4, 1)

        def forward(self, x):
            return self.last(self.layer(self.conv(x)))

    x = torch.rand(6, 3, 4, 4)
    pruned = fxprune.prune(Holds(), x, rate=0.5)
    fxprune.save(pruned, tmp_path)
    again = fxprune.load(tmp_path)
    assert isinstance(again.layer, opnames.layer_of(rule.written[name].kind))
    if "Sync" in name:
        return  # it runs in a process group alone
    for train in (True, False):
        found = []
        for model in (pruned, again):
            torch.manual_seed(1)
            found.append(model.train(train)(x))
        assert torch.equal(*found)
    assert all(torch.equal(t, again.state_dict()[n]) for n, t in pruned.state_dict().items())


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def folder(tmp_path):
    fxprune.save(fxprune.prune(Gated(), torch.rand(2, 3, 8, 8), rate=0.5), tmp_path)
    return tmp_path


def changed(folder: Path, change: Any) -> None:
    """Write the file anew, its network changed, with a checksum that fits."""
    path = folder / "model.safetensors"
    with safe_open(path, "pt") as file:
        header = file.metadata()
    network = json.loads(header["fxprune_network"])
    change(network)
    header = {k: v for k, v in header.items() if k != "fxprune_digest"}
    signed_file(load_file(path), path, {**header, "fxprune_network": json.dumps(network)})


def call(network: dict) -> dict:
    return next(node for node in network["nodes"] if node["op"] == "call_function")


def put(path: str, value: Any, at: Any = None):
    """A change: the first call's field, or the network's."""

    def change(network: dict) -> None:
        home = call(network) if at == "call" else network if at is None else at(network)
        home[path] = value

    return change


def layer(network: dict) -> dict:
    return network["layers"]["stem"]


def read(network: dict) -> dict:
    return next(node for node in network["nodes"] if node["op"] == "get_attr")


EVIL = '"); import os; os.system("touch /tmp/never'
TARGETS = (
    "os.system builtins.eval builtins.exec builtins.__import__ torch.load torch.hub.load "
    "operator.attrgetter torch.Tensor.apply_ torch.serialization.load aten.from_file.default "
    "torch.ops.load_library torch.Tensor.__reduce_ex__ torch.compile numpy.load "
    "collections.Counter torch.nn.Module builtins.print torch.set_default_device x"
).split()


@pytest.mark.parametrize("target", TARGETS)
def test_no_other_function_is_called(folder, target):
    changed(folder, put("target", target, "call"))
    with pytest.raises(SaveError, match="not allowed"):
        fxprune.load(folder)


@pytest.mark.parametrize(
    "change",
    [
        put("target", "__class__", read),
        put("target", "stem.__init__", read),
        put("target", "stem.forward", read),
        put("target", "_modules", read),
        put("target", "a.b.c", read),
        put("name", EVIL, "call"),
        put("name", "lambda", "call"),
        put("name", EVIL),
        put("kwargs", {"dict": [[EVIL, 1]]}, "call"),
        put("args", {"tuple": [{"node": "nowhere"}]}, "call"),
        put("args", {"tuple": [{"pickle": "gASV"}]}, "call"),
        put("args", {"dtype": "load"}, "call"),
        put("kind", "torch.nn.modules.module.Module", layer),
        put("kind", "torch.utils.data.DataLoader", layer),
        put("kind", "os.system", layer),
        put("args", {"in_channels": 10**12, "out_channels": 10**12, "kernel_size": 3}, layer),
        put("args", {"in_channels": "3"}, layer),
        put("args", {}, layer),
        put("layers", {}),
        put("nodes", []),
        put("tied", {"stem.weight": "head.weight"}),
        put("owns", {"forward": "buffer"}),
        put("values", {"forward": 3}),
        put("values", {"stem.forward": 3}),
        put("same", {"head": "stem"}),
        lambda network: network["layers"].update({EVIL: {}}),
        lambda network: network["layers"].update({"forward": {}}),
        lambda network: network["layers"].update({"a.b": {}}),
        lambda network: network["nodes"].reverse(),
        lambda network: network["nodes"].append(network["nodes"][0]),
        lambda network: network.update(more=1),
        lambda network: network["layers"].update(
            {"deep": {"kind": "torch.nn.LSTM", "args": {"input_size": 1, "hidden_size": 1,
                                                        "num_layers": 10**9}}}),
    ],
)  # fmt: skip
def test_other_data_are_a_clear_error(folder, change):
    changed(folder, change)
    with pytest.raises(SaveError, match="is damaged") as told:
        fxprune.load(folder)
    assert told.value.hint and "\n" not in told.value.fault
    assert not Path("/tmp/never").exists()


def test_attributes_of_tensors_only(folder):
    def asks(network: dict) -> None:
        node = call(network)
        first = {"node": network["nodes"][0]["name"]}
        node.update(target="builtins.getattr", args={"tuple": [first, "__class__"]})

    changed(folder, asks)
    with pytest.raises(SaveError, match="not allowed"):
        fxprune.load(folder)


class Named(nn.Module):
    def __init__(self, name: str):
        super().__init__()
        self.add_module(name, nn.Conv2d(3, 8, 1))
        self.last, self.word = nn.Conv2d(8, 4, 1), name

    def forward(self, x):
        return torch.einsum("nchw->nchw", self.last(getattr(self, self.word)(x)))


def test_names_do_not_become_code(tmp_path):
    for name in ('a"); print("b', "a\nb", "a\\"):
        with pytest.raises(fxprune.errors.ModelError, match="has a name that a module written by"):
            fxprune.prune(Named(name), torch.rand(1, 3, 4, 4))
    pruned = fxprune.prune(Named("a'+b"), torch.rand(1, 3, 4, 4))
    with pytest.warns(UserWarning, match="source code cannot hold"):
        fxprune.save(pruned, tmp_path)
    assert not (tmp_path / "model.py").exists()


def test_an_older_source_goes_where_the_new_network_has_none(folder):
    pruned = fxprune.prune(Named("a b"), torch.rand(1, 3, 4, 4), verify=False)
    with pytest.warns(UserWarning, match="has no model.py"):
        fxprune.save(pruned, folder)
    assert not (folder / "model.py").exists()
    assert fxprune.load(folder, Named("a b")).last.in_channels == 4


def test_hooks_and_foreign_layers_are_told(tmp_path):
    model = Named("conv")
    pruned = fxprune.prune(model, torch.rand(1, 3, 4, 4))
    pruned.last.register_forward_hook(lambda *args: None)
    with pytest.raises(described.Undescribed, match="has hooks"):
        described.describe_network(pruned)
    assert saving._described(pruned)[0] is None


# -- the zoo ---------------------------------------------------------------------------------------


def families() -> list[str]:
    """The smallest of every family of torchvision's that is pruned as a graph."""
    from torchvision import models

    kinds = (models, models.segmentation, models.video, models.quantization)
    found: dict[str, str] = {}
    for kind in kinds:
        for name in models.list_models(module=kind):
            found.setdefault(models.get_model_builder(name).__module__, name)
    return list(found.values())


@pytest.mark.zoo
@pytest.mark.parametrize("name", families())
def test_networks_of_torchvision_come_back(name, tmp_path):
    from torchvision import models

    torch.manual_seed(0)
    segments = "segmentation" in models.get_model_builder(name).__module__
    backbone = {"weights_backbone": None} if segments else {}
    model = models.get_model(name, weights=None, **backbone).eval()
    video = "video" in type(model).__module__
    x = torch.rand(1, 3, 16, 224, 224) if video else torch.rand(1, 3, 224, 224)
    pruned = fxprune.prune(model, x, rate=0.5, verify=False)
    fxprune.save(pruned, tmp_path)
    again, own = fxprune.load(tmp_path), module(tmp_path / "model.py").load()
    with torch.no_grad():
        expected = leaves(pruned(x))
        assert same(leaves(again(x)), expected) and same(leaves(own(x)), expected)
