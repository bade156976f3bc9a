"""Sensitivities are those of networks masked by hand, wherever and in however many runs they are
computed."""

from __future__ import annotations

import copy
import functools
import importlib.util
import itertools
import json
import math
import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn import functional as F

import fxprune
from fxprune.errors import (
    CriterionError,
    InputError,
    ModelError,
    NothingToPrune,
    OptionError,
    PlanError,
)
from fxprune.told import told


class Plain(nn.Module):
    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Conv2d(3, 8, 3), nn.Conv2d(8, 12, 3)
        self.head = nn.Linear(12, 4)

    def forward(self, x):
        x = torch.relu(self.second(torch.relu(self.first(x))))
        return self.head(x.mean((2, 3)))


class Residual(nn.Module):
    """A residual stream, dropout, and a norm over channels at the end of it."""

    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Linear(6, 16), nn.LayerNorm(16)
        self.up, self.down = nn.Linear(16, 24), nn.Linear(24, 16)
        self.drop, self.head = nn.Dropout(0.5), nn.Linear(16, 3)

    def forward(self, x):
        x = self.stem(x)
        return self.head(self.norm(x + self.drop(self.down(torch.relu(self.up(x))))))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
        self.grouped, self.head = nn.Conv2d(16, 8, 3, groups=2), nn.Linear(8, 4)

    def forward(self, x):
        x = torch.relu(torch.cat([self.left(x), self.right(x)], 1))
        return self.head(torch.relu(self.grouped(x)).mean((2, 3)))


def images(batches: int = 2, size: int = 4) -> list:
    generator = torch.Generator().manual_seed(0)
    return [
        (
            torch.rand(size + i, 3, 8, 8, generator=generator),
            torch.randint(0, 4, (size + i,), generator=generator),
        )
        for i in range(batches)
    ]


def squared(output, target):
    return (output[:, 0] - target).square().mean()


def accuracy(model, data) -> float:
    right = [(model(x).argmax(1) == y).float() for x, y in data]
    return float(torch.cat(right).mean())


@pytest.fixture(scope="module")
def plain() -> nn.Module:
    torch.manual_seed(0)
    return Plain()


@pytest.fixture(scope="module")
def found(plain) -> fxprune.Sensitivity:
    return fxprune.sensitivity(plain, images())


# -- values ----------------------------------------------------------------------------------------


def masked(model: Plain, layer: str, reader: str, rate: float) -> nn.Module:
    """The network with the lowest filters of a layer, and what reads them, set to zero; a channel's
    score is the mean over both of its slices' norms."""
    model = copy.deepcopy(model).eval()
    own, other = model.get_submodule(layer), model.get_submodule(reader)
    scores = own.weight.flatten(1).norm(dim=1)
    gone = scores.argsort()[: int(rate * len(scores))]
    with torch.no_grad():
        own.weight[gone] = 0
        own.bias[gone] = 0
        other.weight[:, gone] = 0
    return model


def cross_entropy(model: nn.Module, data) -> float:
    with torch.no_grad():
        output = torch.cat([model(x) for x, _ in data])
    return float(F.cross_entropy(output, torch.cat([y for _, y in data])))


def test_values_are_those_of_networks_masked_by_hand(plain, found):
    dense = cross_entropy(plain, images())
    assert found.base == pytest.approx(dense, rel=1e-6) and list(found.groups) == [
        "first",
        "second",
    ]
    for layer, reader in (("first", "second"), ("second", "head")):
        assert len(found.groups[layer]) >= 3
        for rate, loss in found.groups[layer]:
            expected = cross_entropy(masked(plain, layer, reader, rate), images()) - dense
            assert loss == pytest.approx(expected, abs=2e-6) and abs(loss) > 1e-5


def test_rates_are_those_taken_each_once(plain):
    curves = fxprune.sensitivity(plain, images(), rates=(0.5, 0.05, 0.26, 0.25)).groups
    assert [rate for rate, _ in curves["first"]] == [0.25, 0.5]
    assert [rate for rate, _ in curves["second"]] == [0.25, 0.5]
    floor = fxprune.sensitivity(plain, images(), rates=(0.9,), min_channels=4, round_to=4).groups
    assert floor["first"][0][0] == 0.5 and floor["second"][0][0] == pytest.approx(8 / 12)


def test_a_loss_and_a_metric_of_ones_own(plain):
    data = [(x, y.float()) for x, y in images()]
    own = fxprune.sensitivity(plain, data, loss=squared, rates=(0.5,))
    with torch.no_grad():
        output = torch.cat([plain(x) for x, _ in data])
        expected = float(squared(output, torch.cat([y for _, y in data])))
    assert own.base == pytest.approx(expected, rel=1e-6) and own.measure == "loss"
    found = fxprune.sensitivity(plain, images(), metric=accuracy, rates=(0.75,))
    assert found.base == accuracy(plain, images()) and found.measure == "metric"
    (_, lost), *_ = found.groups["first"]
    small = masked(plain, "first", "second", 0.75)
    assert lost == pytest.approx(found.base - accuracy(small, images()))


def test_without_targets_outputs_are_compared(plain):
    data = [x for x, _ in images()]
    found = fxprune.sensitivity(plain, data, rates=(0.5,))
    (rate, loss), *_ = found.groups["second"]
    whole, small = plain.eval(), masked(plain, "second", "head", rate)
    with torch.no_grad():
        gaps = torch.cat([whole(x) - small(x) for x in data])
    assert found.base == 0 and loss == pytest.approx(float(gaps.square().mean()), rel=1e-4)
    same = fxprune.sensitivity(plain, [{"x": x} for x in data], rates=(0.5,))
    assert same.groups == found.groups


def test_a_residual_stream_under_a_norm_over_channels():
    """The norm runs over what is left, as in the pruned network; dropout is off."""
    torch.manual_seed(0)
    model = Residual().train()
    state = copy.deepcopy(model.state_dict())
    data = [torch.rand(5, 6) for _ in range(2)]
    found = fxprune.sensitivity(model, data, rates=(0.5,))
    assert list(found.groups) == ["stem", "up"] and model.training
    assert all(torch.equal(state[name], tensor) for name, tensor in model.state_dict().items())
    pruned = fxprune.prune(model, data[0], rate=0.5, only=["stem"]).eval()
    model.eval()
    with torch.no_grad():
        expected = torch.cat([model(x) - pruned(x) for x in data]).square().mean()
    assert found.groups["stem"] == [(0.5, pytest.approx(float(expected), rel=1e-5))]


def test_groups_bound_together_share_a_curve():
    torch.manual_seed(0)
    found = fxprune.sensitivity(Grouped(), images(), rates=(0.5,))
    assert found.together == {"right": "left"} and "left" in found.groups
    assert found.loss_at("right", 0.3) == found.loss_at("left", 0.3) != 0
    assert "right goes together with left" in str(found)


def test_layers_are_left_out(plain):
    assert list(fxprune.sensitivity(plain, images(), only=[plain.second]).groups) == ["second"]
    assert list(fxprune.sensitivity(plain, images(), ignore=["second"]).groups) == ["first"]


@pytest.mark.parametrize("criterion", ["random", "distribution_fit", {"name": "l1"}])
def test_other_criteria(plain, criterion):
    found = fxprune.sensitivity(plain, images(), rates=(0.5,), criterion=criterion)
    assert [rate for rate, _ in found.groups["first"]] == [0.5]


def test_a_recorded_network(plain, found):
    again = fxprune.sensitivity(plain, images(), frontend="record")
    for name, curve in found.groups.items():
        assert [loss for _, loss in curve] == pytest.approx(
            [loss for _, loss in again.groups[name]], abs=1e-5
        )


# -- where it runs ---------------------------------------------------------------------------------


def test_two_workers_find_the_same(plain, found):
    seen = []
    again = fxprune.sensitivity(
        plain, images(), workers=2, progress=lambda what, share: seen.append(share)
    )
    assert again == found
    assert len(seen) == sum(map(len, found.groups.values())) and seen[-1] == 1.0


def test_an_executor_of_ones_own(plain, found):
    threads = torch.get_num_threads()
    with ThreadPoolExecutor(2) as pool:
        assert fxprune.sensitivity(plain, images(), engine=pool) == found
    assert torch.get_num_threads() == threads


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="ray is not installed")
def test_ray_finds_the_same(plain, found):
    assert fxprune.sensitivity(plain, images(), workers=2, engine="ray") == found


def test_without_ray_the_error_says_what_to_install(plain, monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(OptionError, match=r"hint: pip install 'fxprune\[ray\]'"):
        fxprune.sensitivity(plain, images(), engine="ray")


def test_what_cannot_be_sent_is_named(plain):
    local = copy.deepcopy(plain)
    local.note = lambda: 0
    with pytest.raises(OptionError, match="the model cannot be sent to another process"):
        fxprune.sensitivity(local, images(), workers=2)
    with pytest.raises(OptionError, match="the loss cannot be sent"):
        fxprune.sensitivity(plain, images(), loss=lambda o, t: o.mean(), workers=2)


# -- stopped and taken up again --------------------------------------------------------------------


def test_a_stopped_run_goes_on(plain, found, tmp_path):
    path, tried = tmp_path / "cache.json", []

    def stop(what, share):
        tried.append(what)
        if len(tried) == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fxprune.sensitivity(plain, images(), cache=path, progress=stop)
    assert len(json.loads(path.read_text())["losses"]) == 3
    rest = []
    again = fxprune.sensitivity(
        plain, images(), cache=path, progress=lambda what, share: rest.append(what)
    )
    assert again == found and not set(rest) & set(tried)
    assert len(rest) + 3 == sum(map(len, found.groups.values()))
    assert fxprune.sensitivity(plain, images(), cache=path, progress=stop) == found  # asks nothing


def test_a_cache_of_something_else_is_refused(plain, tmp_path):
    path = tmp_path / "cache.json"
    fxprune.sensitivity(plain, images(), rates=(0.5,), cache=path)
    other = copy.deepcopy(plain)
    with torch.no_grad():
        other.head.bias[0] += 1
    for model, data, how in (
        (other, images(), {}),
        (plain, images(1), {}),
        (plain, images(), {"criterion": "l1"}),
    ):
        with pytest.raises(OptionError, match="of another network, other data or other options"):
            fxprune.sensitivity(model, data, rates=(0.5,), cache=path, **how)
    path.write_text("{")
    with pytest.raises(OptionError, match="is no cache"):
        fxprune.sensitivity(plain, images(), cache=path)


class Squares:
    """A loss with attributes of its own."""

    def __init__(self, power: float):
        self.power, self.note = power, lambda: 0

    def __call__(self, output, target):
        return (output.mean(1) - target).abs().pow(self.power).mean()


def closure(factor):
    def loss(output, target):
        return squared(output, target) * factor

    return loss


def powered(output, target, power=2):
    return (output[:, 0] - target).abs().pow(power).mean()


def keeps_first(group):
    return -torch.arange(len(group)).float()


SCALE = 1.0


def scaled(output, target):
    return squared(output, target) * SCALE


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (lambda o, t: o.mean(), lambda o, t: o.std()),
        (lambda o, t: (o[:, 0] - 1).mean(), lambda o, t: (o[:, 0] - 2).mean()),
        (lambda o, t: (lambda x: x + 1)(o.mean()), lambda o, t: (lambda x: x + 2)(o.mean())),
        (nn.CrossEntropyLoss(), nn.CrossEntropyLoss(label_smoothing=0.9)),
        (
            nn.CrossEntropyLoss(weight=torch.ones(4)),
            nn.CrossEntropyLoss(weight=torch.tensor([1.0, 2.0, 1.0, 1.0])),
        ),
        (closure(1.0), closure(2.0)),
        (closure(torch.ones(1)), closure(torch.zeros(1))),
        (functools.partial(powered, power=2), functools.partial(powered, power=3)),
        (functools.partial(powered, power=2), functools.partial(scaled, power=2)),
        (Squares(1.0), Squares(2.0)),
        (Squares(1.0).__call__, Squares(2.0).__call__),
    ],
)
def test_losses_that_differ_are_told_apart(one, other):
    assert told(one) == told(copy.deepcopy(one)) != told(other)


def test_defaults_and_globals_of_functions_are_told(monkeypatch):
    before = told(powered), told(scaled)
    monkeypatch.setattr(powered, "__defaults__", (3,))
    monkeypatch.setitem(globals(), "SCALE", 2.0)
    assert not {told(powered), told(scaled)} & {*before}


def test_what_leads_back_to_itself_is_told():
    loss = Squares(1.0)
    loss.own = [loss]
    assert told(loss) == told(loss)


TOLD = """
import sys
sys.path.insert(0, {tests!r})
import functools, torch
from test_sensitivity import Squares, closure, powered, told
from torch import nn
print(told([Squares(2.0), closure({{"b", "a"}}), functools.partial(powered, power=3), nn.MSELoss,
            lambda o, t: o in {{"x", "y", "z"}}, object(), torch.relu, nn.CrossEntropyLoss()]))
"""


def test_what_is_told_is_the_same_in_every_run():
    tests = Path(__file__).parent
    code = TOLD.format(tests=str(tests))
    found = set()
    for seed in ("1", "2"):
        paths = os.pathsep.join([str(tests.parent), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths, "PYTHONHASHSEED": seed}
        done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        found.add(done.stdout)
    assert len(found) == 1 and "0x" not in found.pop()


@pytest.mark.parametrize(
    ("one", "other"),
    [
        (dict(loss=nn.CrossEntropyLoss()), dict(loss=nn.CrossEntropyLoss(label_smoothing=0.9))),
        (dict(metric=lambda m, d: accuracy(m, d)), dict(metric=lambda m, d: -accuracy(m, d))),
        (dict(criterion=keeps_first), dict(criterion=lambda g: torch.arange(len(g)).float())),
    ],
)
def test_a_cache_of_another_loss_is_refused(plain, tmp_path, one, other):
    path = tmp_path / "cache.json"
    fxprune.sensitivity(plain, images(), rates=(0.5,), cache=path, **one)
    fxprune.sensitivity(plain, images(), rates=(0.5,), cache=path, **one)
    with pytest.raises(OptionError, match="of another network, other data or other options"):
        fxprune.sensitivity(plain, images(), rates=(0.5,), cache=path, **other)


# -- what it gives ---------------------------------------------------------------------------------


def made(**groups) -> fxprune.Sensitivity:
    return fxprune.Sensitivity(model="Net", criterion="l2", base=1.0, groups=groups)


def test_losses_between_points_lie_on_lines():
    found = made(a=[(0.2, 0.1), (0.6, 0.5)], b=[(0.5, -0.2)])
    got = [found.loss_at("a", rate) for rate in (0, 0.1, 0.2, 0.4, 0.6, 0.8)]
    assert got == pytest.approx([0, 0.05, 0.1, 0.3, 0.5, 0.7])
    assert found.loss_at("b", 0.25) == pytest.approx(-0.1) and found.loss_at("b", 0.9) == -0.2
    with pytest.raises(OptionError, match="no group `c`"):
        found.loss_at("c", 0.5)
    with pytest.raises(OptionError, match="outside"):
        found.loss_at("a", 1.5)


def test_the_most_sensitive_group_is_first():
    found = made(a=[(0.5, 0.1)], b=[(0.5, 0.9), (0.9, 1.0)], c=[(0.5, math.nan)])
    assert found.ranking == ["c", "b", "a"]
    lines = str(found).splitlines()
    assert lines[0].startswith("Net: loss 1;") and [line[0] for line in lines[1:]] == [
        "c",
        "b",
        "a",
    ]
    assert "50% +0.9" in lines[2] and "90% +1" in lines[2]


def test_json_gives_back_the_same(found):
    assert fxprune.Sensitivity.from_json(found.to_json()) == found
    odd = made(a=[(0.5, math.inf)])
    assert fxprune.Sensitivity.from_json(odd.to_json(indent=2)) == odd
    with pytest.raises(PlanError, match="this is no sensitivity"):
        fxprune.Sensitivity.from_json('{"base": 1}')


@pytest.mark.parametrize("count", [1, 3, 12])
def test_the_most_sensitive_groups_are_named_in_the_plot(count):
    groups = {f"layer{i}": [(0.25, 0.001 * 2**i), (0.75, 0.02 * 2**i)] for i in range(count)}
    figure = made(**groups).plot()
    figure.draw_without_rendering()
    (ax,) = figure.axes
    named = {text.get_text() for text in ax.texts}
    assert named == {f"layer{i}" for i in range(count)[-6:]}
    assert sum(len(line.get_xdata()) == 3 for line in ax.lines) == count
    boxes = sorted((text.get_window_extent() for text in ax.texts), key=lambda box: box.y0)
    assert all(low.y1 <= high.y0 + 1 for low, high in itertools.pairwise(boxes))
    assert max(box.x1 for box in boxes) <= figure.bbox.x1
    assert figure._repr_png_().startswith(b"\x89PNG")


# -- errors ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (dict(rates=()), "must hold shares above 0"),
        (dict(rates=(0.0, 0.5)), "must hold shares above 0"),
        (dict(rates=(1.5,)), "outside"),
        (dict(rates=0.5), "no series of rates"),
        (dict(workers=0), "workers=0"),
        (dict(engine="dask"), "engine='dask' is not known"),
        (dict(onyl=["first"]), "did you mean `only`"),
        (dict(loss="mse"), "loss is a str"),
        (dict(loss=squared, metric=accuracy), "both given"),
        (dict(data=torch.rand(2, 3, 8, 8)), "data is a Tensor"),
        (dict(data=[]), "no batches"),
        (dict(data=[torch.rand(2, 3, 8, 8)], loss=squared), "no target"),
    ],
)
def test_wrong_options_are_refused(plain, how, says):
    with pytest.raises(OptionError, match=says):
        fxprune.sensitivity(plain, how.pop("data", images()), **how)


def test_other_errors(plain):
    with pytest.raises(ModelError, match="loss of the unpruned network is nan"):
        fxprune.sensitivity(plain, images(), loss=lambda output, target: output.sum() * math.nan)
    with pytest.raises(NothingToPrune):
        fxprune.sensitivity(nn.Conv2d(3, 4, 1), [torch.rand(2, 3, 4, 4)])
    with pytest.raises(CriterionError, match="gave nan"):
        fxprune.sensitivity(plain, images(), criterion=lambda g: torch.full((len(g),), math.nan))


X, Y = images(1)[0]


@pytest.mark.parametrize(
    ("data", "says", "hint"),
    [
        ([(X, Y), (X[:, :2], Y)], "does not run on batch 1 of data", "as in example_inputs"),
        ([(X, Y), (X.long(), Y)], "does not run on batch 1 of data", "as in example_inputs"),
        ([(X, Y + 4)], "class number", "from 0 to 3"),
        ([(X, Y - 3)], "class number", "from 0 to 3"),
        ((X, Y), "data is a pair of tensors", r"data=\[\(X, Y\)\]"),
        ([X, Y], "data is a pair of tensors", r"data=\[\(X, Y\)\]"),
        ([(X, Y), (X[:0], Y[:0])], "batch 1 of data holds no items", "batches"),
        ([(X[:0], Y[:0])], "batch 0 of data holds no items", "batches"),
        ([(X.numpy(), Y)], "ndarray", "tensor"),
        ([(X, Y.numpy())], "ndarray", "tensor"),
    ],
)
def test_data_that_do_not_fit_are_named(plain, data, says, hint):
    with pytest.raises((InputError, OptionError), match=says) as caught:
        fxprune.sensitivity(plain, data, X, rates=(0.5,))
    assert re.search(hint, caught.value.hint)


def test_a_tuple_of_batches_is_taken(plain):
    one = fxprune.sensitivity(plain, [X, X + 1], rates=(0.5,))
    assert fxprune.sensitivity(plain, (X, X + 1), rates=(0.5,)) == one
    assert fxprune.sensitivity(plain, ((X, Y), (X, Y)), rates=(0.5,)).base > 0


@pytest.mark.parametrize(
    ("how", "says"),
    [
        (dict(metric=lambda m, d: None), "metric gives None"),
        (dict(metric=lambda m, d: torch.ones(2)), r"metric gives float32 \[2\]"),
        (dict(loss=lambda o, t: None), "loss gives None"),
        (dict(loss=lambda o, t: o.mean(1)), r"loss gives float32 \[4\]"),
        (dict(loss=lambda o, t: F.cross_entropy(o, t + 9)), "loss fails on outputs of float32"),
        (dict(metric=lambda m: 1.0), "metric fails"),
        (dict(cache=3), "cache is a int"),
        (dict(progress=3), "no way to show progress"),
        (dict(min_channels={3: 4}), "min_channels holds a pattern that is a int"),
        (dict(max_rate={nn.Linear: 0.5}), "max_rate holds a pattern that is a type"),
        (dict(criterion="fisher"), "criterion `fisher` needs data"),
        (dict(criterion="apoz"), "criterion `apoz` needs data"),
    ],
)
def test_what_gives_no_number_or_cannot_rank_is_refused(plain, how, says):
    with pytest.raises(OptionError, match=says) as caught:
        fxprune.sensitivity(plain, images(), rates=(0.5,), **how)
    assert caught.value.hint


def test_progress_is_shown_as_in_prune(plain, found):
    assert fxprune.sensitivity(plain, images(), progress=True) == found
    assert fxprune.sensitivity(plain, images(), progress=False) == found


def test_a_rate_of_one_says_what_rates_are(plain):
    with pytest.raises(OptionError, match=r"rates=1.0 is outside") as caught:
        fxprune.sensitivity(plain, images(), rates=(1.0,))
    assert "below 1" in caught.value.hint and "half" not in caught.value.hint


@pytest.mark.parametrize("dtype", [torch.int8, torch.int32, torch.uint8])
def test_class_numbers_of_any_kind_are_the_same(plain, found, dtype):
    assert fxprune.sensitivity(plain, [(x, y.to(dtype)) for x, y in images()]) == found


def test_targets_shaped_as_the_output_are_compared_as_in_prune(plain):
    data = [(x, torch.rand(len(x), 4)) for x, _ in images()]
    found = fxprune.sensitivity(plain, data, rates=(0.5,))
    with torch.no_grad():
        gaps = torch.cat([plain(x) - y for x, y in data])
        small = masked(plain, "first", "second", 0.5)
        after = torch.cat([small(x) - y for x, y in data])
    assert found.base == pytest.approx(float(gaps.square().mean()), rel=1e-5)
    (_, lost), *_ = found.groups["first"]
    assert lost == pytest.approx(float(after.square().mean()) - found.base, abs=1e-6)


def test_classes_of_every_pixel_are_compared_by_cross_entropy():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), nn.Conv2d(8, 4, 1))
    y = torch.randint(0, 4, (4, 6, 6))
    found = fxprune.sensitivity(model, [(X, y)], rates=(0.5,))
    with torch.no_grad():
        assert found.base == pytest.approx(float(F.cross_entropy(model(X), y)), rel=1e-5)


def test_no_change_is_a_plain_zero():
    assert "25% 0" in str(made(a=[(0.25, 0.0)])) and "50% 0" in str(made(a=[(0.5, -0.0)]))
    metric = made(a=[(0.25, 0.0)]).model_copy(update={"measure": "metric"})
    assert "-0" not in str(metric)
