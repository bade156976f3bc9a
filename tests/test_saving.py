"""Pruned networks on disk: the same one comes back, and nothing else does."""

from __future__ import annotations

import copy
import json
import struct
import warnings
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import fxprune
from fxprune import saving
from fxprune.errors import ModelError, PlanError, SaveError


class Net(nn.Module):
    """Two convolutions with one kernel, a norm with statistics, and a head."""

    def __init__(self, width: int = 12):
        super().__init__()
        self.stem = nn.Conv2d(3, width, 3, padding=1)
        self.left, self.right = nn.Conv2d(width, width, 3, padding=1), nn.Conv2d(width, width, 3)
        self.right.weight = self.left.weight
        self.norm, self.head = nn.BatchNorm2d(width), nn.Linear(width, 5)

    def forward(self, x):
        x = self.right(self.norm(torch.relu(self.left(self.stem(x)))))
        return self.head(x.mean((2, 3)))


class Detects(Net):
    """What it does depends on values, so that it has no graph."""

    def forward(self, x):
        found = super().forward(x)
        return found[found[:, 0] > float(found.mean())]


X = torch.rand(2, 3, 8, 8)


def trained(model: nn.Module) -> nn.Module:
    """A pruned network after one step."""
    pruned = fxprune.prune(model, X, rate=0.5).train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=0.1)
    pruned(X).square().sum().backward()
    optimizer.step()
    return pruned.eval()


def signed_file(tensors: dict, path: Path, header: dict[str, str]) -> None:
    """What someone would write who knows the format."""
    digest = saving._digest(header, tensors)
    save_file(tensors, path, metadata={**header, "fxprune_digest": digest})


def alike(a: nn.Module, b: nn.Module) -> bool:
    left, right = a.state_dict(), b.state_dict()
    return left.keys() == right.keys() and all(
        torch.equal(left[k], right[k]) and left[k].dtype == right[k].dtype for k in left
    )


@pytest.mark.parametrize("cls", [Net, Detects])
def test_a_trained_network_comes_back(cls, tmp_path):
    torch.manual_seed(0)
    pruned, fresh = trained(cls()), cls()
    before = copy.deepcopy(fresh.state_dict())
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        fxprune.save(pruned, tmp_path / "a" / "small")
    graph = isinstance(pruned, torch.fx.GraphModule)
    assert graph == (tmp_path / "a" / "small" / "model.py").exists()
    assert graph == (not any("has no model.py" in str(each.message) for each in told))
    again = fxprune.load(tmp_path / "a" / "small", fresh).eval()
    assert alike(pruned, again) and torch.equal(pruned(X), again(X))
    assert again.fxprune.plan == pruned.fxprune.plan and again.left.weight is again.right.weight
    assert all(torch.equal(before[k], t) for k, t in fresh.state_dict().items())
    text = (tmp_path / "a" / "small" / "plan.json").read_text()
    assert fxprune.Plan.from_json(text) == pruned.fxprune.plan


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_dtypes_are_those_saved(dtype, tmp_path):
    pruned = fxprune.prune(Net(), X, rate=0.5).to(dtype)
    fxprune.save(pruned, tmp_path)
    again = fxprune.load(tmp_path, Net())
    assert alike(pruned, again) and again.stem.weight.dtype == dtype


def test_a_network_pruned_twice_is_of_the_first_one(tmp_path):
    first = fxprune.prune(Net(), X, rate=0.25)
    second = fxprune.prune(first, X, rate=0.5)
    fxprune.save(second, tmp_path)
    assert alike(fxprune.load(tmp_path, first), second)
    with pytest.raises(PlanError, match="another model"):
        fxprune.load(tmp_path, Net())


def test_a_crash_leaves_the_older_network_whole(tmp_path, monkeypatch):
    old, new = fxprune.prune(Net(), X, rate=0.5), fxprune.prune(Net(), X, rate=0.25)
    fxprune.save(old, tmp_path)
    (tmp_path / "notes.txt").write_text("mine")
    files = {p.name: p.read_bytes() for p in tmp_path.iterdir()}

    def full(tensors, path, metadata):
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(SaveError, match="No space left"):
        fxprune.save(new, tmp_path)
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == files


def test_only_pruned_networks_are_saved(tmp_path):
    with pytest.raises(ModelError, match="pruned network"):
        fxprune.save(Net(), tmp_path)
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveError, match="cannot be written"):
        fxprune.save(fxprune.prune(Net(), X), tmp_path / "file")


class Complex(Net):
    def __init__(self):
        super().__init__()
        self.register_buffer("wave", torch.zeros(1, dtype=torch.complex128))

    def forward(self, x):
        return super().forward(x) + self.wave.real


class Extra(Detects):
    def get_extra_state(self):
        return {"epoch": 3}

    def set_extra_state(self, state):
        self.epoch = state["epoch"]


@pytest.mark.parametrize(("cls", "told"), [(Complex, "complex128"), (Extra, "_extra_state is a")])
def test_what_the_format_cannot_hold(cls, told, tmp_path):
    pruned = fxprune.prune(cls(), X, rate=0.5)
    with pytest.raises(SaveError, match=told):
        fxprune.save(pruned, tmp_path)
    assert not list(tmp_path.iterdir())


# -- what is refused -------------------------------------------------------------------------------


@pytest.fixture
def saved(tmp_path):
    fxprune.save(fxprune.prune(Net(), X, rate=0.5), tmp_path)
    return tmp_path


def test_a_missing_or_foreign_folder(tmp_path):
    with pytest.raises(SaveError, match="there is no"):
        fxprune.load(tmp_path / "nowhere", Net())
    save_file(Net(4).head.state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(SaveError, match="holds no plan"):
        fxprune.load(tmp_path, Net())
    torch.save(Net().state_dict(), tmp_path / "model.safetensors")
    with pytest.raises(SaveError, match="is damaged"):
        fxprune.load(tmp_path, Net())


def test_a_plan_and_weights_that_do_not_fit(saved):
    path = saved / "model.safetensors"
    plan = fxprune.Plan.from_json((saved / "plan.json").read_text()).to_json()
    good = load_file(path)

    def write(tensors, plan):
        signed_file(tensors, path, {"fxprune_plan": plan})

    for change, told in [
        ({"stem.weight": torch.zeros(7, 3, 3, 3)}, r"stem.weight is \[7, 3, 3, 3\]"),
        ({"stem.weight": torch.zeros(6, 3, 3, 3).int()}, "torch.int32"),
        ({"more": torch.zeros(1)}, "unexpected"),
    ]:
        write({**good, **change}, plan)
        with pytest.raises(SaveError, match=told):
            fxprune.load(saved, Net())
    write({k: v for k, v in good.items() if k != "norm.weight"}, plan)
    with pytest.raises(SaveError, match=r"missing +norm.weight"):
        fxprune.load(saved, Net())
    write(good, plan[:-40])
    with pytest.raises(SaveError, match=r"plan in .* is damaged"):
        fxprune.load(saved, Net())
    save_file(good, path, metadata={"fxprune_plan": plan})
    with pytest.raises(SaveError, match="checksum"):
        fxprune.load(saved, Net())


def test_any_damage_is_a_clear_error_or_harmless(saved):
    """Bytes of the file are changed or cut at random: never another exception."""
    path = saved / "model.safetensors"
    good, model, generator = path.read_bytes(), Net(), torch.Generator().manual_seed(0)
    (size,) = struct.unpack("<Q", good[:8])
    assert "stem.weight" in json.loads(good[8 : 8 + size])
    refused = 0
    for n in range(120):
        head = 8 + size if n % 3 else len(good)
        at = int(torch.randint(head, (1,), generator=generator))
        byte = int(torch.randint(256, (1,), generator=generator))
        path.write_bytes(good[:at] if n % 5 == 0 else good[:at] + bytes([byte]) + good[at + 1 :])
        try:
            fxprune.load(saved, model)
        except fxprune.FxpruneError:
            refused += 1
        else:
            assert path.read_bytes() == good
    assert refused > 100


class Masked(Net):
    """A mask of floats and a table of integers that are not saved."""

    def __init__(self):
        super().__init__()
        self.register_buffer("mask", torch.tensor([0.0, -1.0] * 4), persistent=False)
        self.register_buffer("turn", torch.arange(8).flip(0), persistent=False)

    def forward(self, x):
        return super().forward(x[..., self.turn] + self.mask)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_buffers_that_are_not_saved_follow_the_precision(dtype, tmp_path):
    """A network that was cast as a whole is loaded cast as a whole."""
    pruned = fxprune.prune(Masked(), X, rate=0.5).eval().to(dtype)
    fxprune.save(pruned, tmp_path)
    again = fxprune.load(tmp_path, Masked()).eval()
    assert again.mask.dtype == dtype and again.turn.dtype == torch.int64
    assert torch.equal(again(X.to(dtype)), pruned(X.to(dtype)))


def test_buffers_that_are_not_saved_stay_where_weights_differ(tmp_path):
    """Some layers were cast and others not, which says nothing of a buffer."""
    pruned = fxprune.prune(Masked(), X, rate=0.5)
    pruned.head.half()
    fxprune.save(pruned, tmp_path)
    assert fxprune.load(tmp_path, Masked()).mask.dtype == torch.float32
