"""A model, its weights and its inputs named by text."""

from __future__ import annotations

import sys

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

import fxprune
from fxprune import naming, weights, zoos
from fxprune.errors import FxpruneError, InputError, NamingError, OptionError, SaveError

NET = """\
import torch
from torch import nn


class Net(nn.Module):
    def __init__(self, width=4, depth: int = 1):
        super().__init__()
        self.conv = nn.Conv2d(3, width, 3)
        self.head = nn.Linear(width, 2)

    def forward(self, x):
        return self.head(self.conv(x).mean((2, 3)))


class Outer:
    Inner = Net


def make(width=4):
    return Net(width)


ready = Net(6).train()
number = 3


def wrong():
    return 3


def fails():
    return nn.Linear("many", 3)
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """A folder with a file of networks, as the current one; what it imports is forgotten."""
    (tmp_path / "own_net.py").write_text(NET)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    yield tmp_path
    for name in [n for n in sys.modules if n.startswith("own_")]:
        del sys.modules[name]


def fault(kind, call, *args, **kwargs) -> FxpruneError:
    with pytest.raises(kind) as caught:
        call(*args, **kwargs)
    return caught.value


# -- zoos ------------------------------------------------------------------------------------------


def test_names_of_zoos_are_those_that_the_libraries_list():
    import timm
    import torchvision

    assert zoos.names("torchvision") == tuple(sorted(torchvision.models.list_models()))
    assert zoos.names("timm") == tuple(sorted(timm.list_models()))
    assert zoos.names("no_such_package") == ()


def test_a_network_of_torchvision_and_its_arguments():
    model = naming.model("torchvision:resnet18", arguments={"num_classes": 7})
    assert type(model).__name__ == "ResNet" and model.fc.out_features == 7
    assert not model.training


def test_a_network_of_timm():
    model = naming.model("timm:test_resnet", arguments={"num_classes": 3})
    assert model.num_classes == 3


def test_random_weights_depend_on_the_seed_alone():
    first, again = (naming.model("torchvision:squeezenet1_1", seed=3) for _ in range(2))
    other = naming.model("torchvision:squeezenet1_1", seed=4)
    pairs = zip(first.parameters(), again.parameters(), other.parameters(), strict=True)
    same = [(torch.equal(a, b), torch.equal(a, c)) for a, b, c in pairs]
    assert all(a for a, _ in same) and not all(c for _, c in same)


def test_a_seed_that_torch_does_not_take():
    error = fault(OptionError, naming.model, "torchvision:squeezenet1_1", seed=2**70)
    assert "seed=" in error.fault


def test_a_detector_is_built_without_downloading_its_backbone(monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("downloads")

    monkeypatch.setattr(torch.hub, "load_state_dict_from_url", refuse)
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", refuse)
    assert naming.model("torchvision:ssdlite320_mobilenet_v3_large")


@pytest.mark.parametrize(
    ("text", "hint"),
    [
        ("torchvision:resnet19", "resnet18"),
        ("torchvision:convnextv2_tiny", "timm:convnextv2_tiny"),
        ("timm:resnet_18", "resnet"),
        ("resnet18", "torchvision:resnet18"),
        ("convnextv2_tiny", "timm:convnextv2_tiny"),
        ("torchvison:resnet18", "torchvision"),
    ],
)
def test_what_no_zoo_has_is_refused_with_the_nearest_name(text, hint, folder):
    assert hint in fault(NamingError, naming.model, text).hint


def test_weights_of_another_name_are_refused_with_those_there_are():
    error = fault(NamingError, naming.model, "torchvision:resnet50", weights="IMAGENET1K_V3")
    assert "IMAGENET1K_V1, IMAGENET1K_V2" in str(error) and "IMAGENET1K_V" in error.hint


def test_a_download_that_fails_says_so(monkeypatch):
    def fail(*args, **kwargs):
        raise OSError("<urlopen error no route to host>")

    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", fail)
    error = fault(NamingError, naming.model, "torchvision:squeezenet1_1", weights="DEFAULT")
    assert "IMAGENET1K_V1 cannot be had: OSError: <urlopen error no route to host>" in error.fault
    assert "--weights FILE" in error.hint


# -- files and modules -----------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["own_net.py:Net", "own_net:Net", "own_net.py:Outer.Inner"])
def test_a_class_of_a_file_or_module(text, folder):
    model = naming.model(text, arguments={"width": 5})
    assert model.conv.out_channels == 5 and not model.training


def test_a_function_and_a_model(folder):
    assert naming.model("own_net.py:make", arguments={"width": 3}).conv.out_channels == 3
    assert naming.model("own_net.py:ready").conv.out_channels == 6
    error = fault(OptionError, naming.model, "own_net.py:ready", arguments={"width": 3})
    assert "is a model, which takes no arguments" in error.fault


def test_a_file_finds_those_beside_it_from_elsewhere(folder, monkeypatch):
    inner = folder / "inner"
    inner.mkdir()
    (inner / "own_parts.py").write_text("WIDTH = 9\n")
    (inner / "own_main.py").write_text(
        "from own_parts import WIDTH\nfrom torch import nn\n\n\ndef make():\n"
        "    return nn.Linear(WIDTH, 2)\n"
    )
    assert naming.model("inner/own_main.py:make").in_features == 9


def test_two_files_of_one_name_do_not_mix(folder):
    other = folder / "other"
    other.mkdir()
    (other / "own_net.py").write_text(NET.replace("width=4", "width=8"))
    assert naming.model("own_net.py:Net").conv.out_channels == 4
    assert naming.model("other/own_net.py:Net").conv.out_channels == 8


@pytest.mark.parametrize(
    ("text", "said", "hint"),
    [
        ("own_net.py:Nett", "own_net.py has no `Nett`", "did you mean `Net`?"),
        ("own_nte.py:Net", "there is no file own_nte.py", "did you mean `own_net.py`?"),
        ("own_nte:Net", "there is no module `own_nte`", "did you mean `own_net`?"),
        ("own_net.py", "`own_net.py` names no model", "own_net.py:Outer"),
        ("own_net.py:number", "is no model, and nothing that builds one: an int", "a class"),
        ("own_net.py:wrong", "gives an int, not a torch.nn.Module", ""),
        ("no_such_package.net:Net", "there is no module `no_such_package`", "looked for in"),
    ],
)
def test_what_names_no_model_is_refused(text, said, hint, folder):
    error = fault(NamingError, naming.model, text)
    assert said in error.fault and hint in error.hint


def test_arguments_that_do_not_fit_show_what_is_taken(folder):
    error = fault(OptionError, naming.model, "own_net.py:Net", arguments={"widht": 5})
    assert "unexpected keyword argument 'widht'" in error.fault
    assert "(width=4, depth: int = 1)" in str(error) and "`width`" in error.hint


@pytest.mark.parametrize(
    ("code", "said", "at"),
    [
        ("x = 1\nimport no_such_thing\n", "ModuleNotFoundError", "own_bad.py:2, in <module>"),
        ("x = 1\n\ny = nn.Linear(1, 1)\n", "NameError: name 'nn'", "own_bad.py:3, in <module>"),
        ("def f(:\n    pass\n", "SyntaxError", "own_bad.py:1: def f(:"),
        ("import json\njson.loads('{')\n", "JSONDecodeError", "own_bad.py:2, in <module>"),
    ],
)
@pytest.mark.parametrize("form", ["own_bad.py:Net", "own_bad:Net"])
def test_a_file_that_fails_shows_its_own_line(code, said, at, form, folder):
    (folder / "own_bad.py").write_text(code)
    error = fault(NamingError, naming.model, form)
    assert "fails when it is imported" in error.fault and said in error.fault
    assert dict(error.details)["at"].startswith(at)


def test_a_class_that_fails_shows_the_users_line_not_torchs(folder):
    error = fault(NamingError, naming.model, "own_net.py:fails")
    assert "own_net.py:fails cannot be built: TypeError" in error.fault
    assert 'own_net.py:32, in fails: return nn.Linear("many", 3)' in str(error)


def test_a_saved_folder_is_a_model(tmp_path):
    with pytest.raises(SaveError, match="there is no"):
        naming.model(str(tmp_path))
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1))
    pruned = fxprune.prune(model, torch.rand(1, 3, 8, 8))
    fxprune.save(pruned, tmp_path)
    assert naming.model(str(tmp_path)).get_submodule("0").out_channels == 4
    with pytest.raises(OptionError, match="takes no arguments"):
        naming.model(str(tmp_path), arguments={"width": 3})


@pytest.mark.parametrize("device", ["tpu", "cuda:77"])
def test_a_device_that_is_not_there(device, folder):
    error = fault(OptionError, naming.model, "own_net.py:Net", device=device)
    assert f"device `{device}` cannot be used" in error.fault


# -- weights ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt", "w.pth"])
def test_weights_are_loaded(name, folder):
    trained = naming.model("own_net.py:Net", seed=1).state_dict()
    save_file(trained, name) if name.endswith("tensors") else torch.save(trained, name)
    found = naming.model("own_net.py:Net", weights=name, seed=2).state_dict()
    assert all(torch.equal(found[key], trained[key]) for key in trained)


def test_weights_inside_a_checkpoint_are_found(folder):
    trained = naming.model("own_net.py:Net", seed=1).state_dict()
    torch.save({"epoch": 3, "state_dict": trained}, "w.pt")
    assert weights.read("w.pt").keys() == trained.keys()


def test_weights_that_do_not_fit_are_listed_by_kind(folder):
    trained = naming.model("own_net.py:Net").state_dict()
    trained["more"], trained["head.bias"] = trained.pop("conv.bias"), torch.zeros(9)
    save_file(trained, "w.safetensors")
    error = fault(NamingError, naming.model, "own_net.py:Net", weights="w.safetensors")
    assert "w.safetensors does not fit Net: 1 missing, 1 unexpected, 1 of another" in error.fault
    assert error.details == [
        ("missing", "conv.bias [4]"),
        ("unexpected", "more [4]"),
        ("shape", "head.bias is [9], needed [2]"),
    ]


def test_long_lists_of_keys_are_cut(folder):
    save_file({f"key{i}": torch.zeros(1) for i in range(20)}, "w.safetensors")
    error = fault(NamingError, naming.model, "own_net.py:Net", weights="w.safetensors")
    assert ("", "and 14 more") in error.details and len(error.details) == 4 + 7


def test_a_wrappers_prefix_is_named(folder):
    trained = naming.model("own_net.py:Net").state_dict()
    save_file({f"module.{key}": tensor for key, tensor in trained.items()}, "w.safetensors")
    error = fault(NamingError, naming.model, "own_net.py:Net", weights="w.safetensors")
    assert "all keys begin with `module.`" in error.hint


class _Evil:
    def __reduce__(self):
        return open, ("was_run", "w")


def test_a_pickle_that_holds_code_is_refused_and_not_run(folder):
    torch.save({"weight": _Evil()}, "w.pt")
    error = fault(NamingError, weights.read, "w.pt")
    assert "holds more than tensors" in error.fault
    assert not (folder / "was_run").exists()


@pytest.mark.parametrize("name", ["w.safetensors", "w.pt"])
@pytest.mark.parametrize("content", [b"", b"not weights at all", b"\xff" * 99])
def test_damaged_files_are_refused(name, content, folder):
    (folder / name).write_bytes(content)
    assert name in fault(NamingError, weights.read, name).fault


def test_a_file_that_is_not_there_and_one_without_weights(folder):
    (folder / "weights.pt").write_bytes(b"")
    assert "weights.pt" in fault(NamingError, weights.read, "weihgts.pt").hint
    torch.save({"epoch": 3, "name": "x"}, "w.pt")
    error = fault(NamingError, weights.read, "w.pt")
    assert ("it holds", "epoch (int), name (str)") in error.details


# -- arguments and inputs --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "value"),
    [("a=3", 3), ("a=1e-2", 0.01), ("a=[1, 2]", [1, 2]), ("a=relu", "relu"), ("a=True", True)]
    + [("a=", ""), ("a=b=c", "b=c")],
)
def test_arguments_are_literals_or_text(text, value):
    assert naming.argument(text) == ("a", value)


@pytest.mark.parametrize("text", ["a", "=3", "a b=3", ""])
def test_what_is_no_argument(text):
    assert "is no argument" in fault(OptionError, naming.argument, text).fault


def test_inputs_of_several_types():
    image, tokens, flags = naming.inputs(["2x3x8x8", "1x7:int64", "4:bool"])
    assert image.shape == (2, 3, 8, 8) and image.std() > 0.5
    assert tokens.dtype == torch.int64 and tokens.shape == (1, 7)
    assert flags.dtype == torch.bool
    assert naming.inputs(["1x2:float16"])[0].dtype == torch.float16
    assert torch.equal(naming.inputs(["2x3x8x8"])[0], image)


def test_named_inputs_and_none():
    found = naming.inputs(["ids=1x7:int64", "mask=1x7"])
    assert list(found) == ["ids", "mask"] and found["ids"].dtype == torch.int64
    assert naming.inputs([]) is None


@pytest.mark.parametrize(
    ("texts", "said"),
    [
        (["1x3xx8"], "`1x3xx8` is no shape"),
        (["1x-3"], "is no shape"),
        (["big"], "is no shape"),
        (["1x3:int65"], "`int65` is no type"),
        (["99999999x99999999x99999999"], "no tensor of `99999999x"),
        (["99999999999999999999"], "no tensor of `9999"),
        (["a=1x3", "1x3"], "some inputs are named"),
    ],
)
def test_inputs_that_cannot_be_read(texts, said):
    error = fault(InputError, naming.inputs, texts)
    assert said in error.fault and error.hint
