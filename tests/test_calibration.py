"""What data says of channels, against what is computed by hand; and the criteria that read it."""

from __future__ import annotations

import subprocess
import sys
import textwrap
from itertools import combinations

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, TensorDataset

import fxprune
from fxprune.calibration import calibrate
from fxprune.criteria import find
from fxprune.errors import CriterionError, FxpruneError, InputError, OptionError
from fxprune.score import score

torch.set_num_threads(1)
MEASURED = (
    "taylor", "fisher", "gradient_gamma", "apoz", "mean_activation", "hrank", "reconstruction",
    "surgeon",
)  # fmt: skip


def conv_bn(i: int, o: int, **options) -> nn.Sequential:
    conv = nn.Conv2d(i, o, 3, padding=1, bias=False, **options)
    return nn.Sequential(conv, nn.BatchNorm2d(o), nn.ReLU())


class Net(nn.Module):
    """A residual stream that is read twice, a depthwise layer, a gate, and a flatten."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.stem, self.one, self.two = conv_bn(3, 8), conv_bn(8, 6), conv_bn(6, 8)
        self.deep = conv_bn(8, 8, groups=8)
        self.gate = nn.Conv2d(8, 8, 1)
        self.last = conv_bn(8, 5)
        self.head = nn.Linear(5 * 4, 3)
        for module in self.modules():
            if isinstance(module, nn.BatchNorm2d):
                nn.init.uniform_(module.weight, 0.5, 1.5)
                nn.init.normal_(module.bias, 0, 0.3)

    def forward(self, x):
        x = self.stem(x)
        x = self.deep(x + self.two(self.one(x)))
        x = x * torch.sigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return self.head(F.adaptive_avg_pool2d(self.last(x), 2).flatten(1))


def sample(count: int = 12, seed: int = 1):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, 3, 8, 8, generator=generator, dtype=torch.float64)
    return x, torch.randint(0, 3, (count,), generator=generator)


def net() -> nn.Module:
    return Net().double().eval()


def scores(model, criterion, data, loss=None, **options):
    analysis = fxprune.analyze(model, sample(2)[0])
    found = find({"name": criterion, **options})
    calibration = calibrate(analysis, data, found.needs, loss)
    values = score(analysis.all_groups, analysis.tensors, found, calibration=calibration)
    return {analysis.groups[i].name: each for i, each in values.items()}


def batched(size: int, count: int = 12):
    return list(zip(*(each.split(size) for each in sample(count)), strict=True))


# -- gates -----------------------------------------------------------------------------------------


def gradients_by_hand(model: nn.Module, x, y) -> dict[str, np.ndarray]:
    """For each item, the loss's gradient by a factor on what layers read of each channel: the sum
    of weights times their gradients over the layers that read it."""
    params = dict(model.named_parameters())
    readers = {
        "stem.0": ["one.0.weight", "deep.0"],
        "one.0": ["two.0.weight"],
        "last.0": ["head.weight"],
    }
    found: dict[str, list] = {name: [] for name in readers}
    for item, target in zip(x, y, strict=True):
        loss = F.cross_entropy(model(item[None]), target[None])
        names = ["one.0.weight", "two.0.weight", "head.weight", "gate.weight", "last.0.weight"]
        grads = dict(zip(names, torch.autograd.grad(loss, [params[n] for n in names]), strict=True))
        by_in = {
            n: (params[n] * grads[n]).flatten(2).sum((0, 2)) for n in names if n != "head.weight"
        }
        found["one.0"].append(by_in["two.0.weight"])
        found["stem.0"].append(
            by_in["one.0.weight"] + by_in["gate.weight"] + by_in["last.0.weight"]
        )
        head = (params["head.weight"] * grads["head.weight"]).sum(0)
        found["last.0"].append(head.reshape(5, 4).sum(1))
    return {name: torch.stack(rows).detach().numpy() for name, rows in found.items()}


@pytest.mark.parametrize("size", [1, 4, 5, 12])
def test_gates_are_had_item_by_item_whatever_the_batch(size):
    model = net()
    hand = gradients_by_hand(model, *sample())
    taylor, fisher = (scores(model, name, batched(size)) for name in ("taylor", "fisher"))
    for name, rows in hand.items():
        np.testing.assert_allclose(taylor[name], np.abs(rows).mean(0), rtol=1e-9)
        np.testing.assert_allclose(fisher[name], (rows**2).mean(0), rtol=1e-9)


def test_to_first_order_a_gate_says_what_removal_does():
    """In a network that is linear in a channel, exactly."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.ReLU(), nn.Linear(6, 3)).double()
    x, y = torch.randn(5, 4, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64)

    def loss(output, target):
        return (output * target).sum(1).mean()

    analysis = fxprune.analyze(model, x)
    found = calibrate(analysis, [(x, y)], ("gates",), loss).gates["total"] / 5
    (group,) = [g for g in analysis.groups if g.prunable]
    for channel in range(6):
        hidden = model[1](model[0](x)).clone()
        whole = loss(model[2](hidden), y)
        hidden[:, channel] = 0
        change = whole - loss(model[2](hidden), y)
        assert float(found[group.channels[channel]]) == pytest.approx(
            float(change.detach()), rel=1e-9
        )


def test_channels_that_no_weight_reads_are_gated_where_they_are_made():
    class Attention(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.q, self.k = nn.Linear(6, 8), nn.Linear(6, 8)

        def forward(self, x):
            return self.q(x) @ self.k(x).transpose(1, 2)

    model = Attention().double()
    x = torch.randn(3, 5, 6, dtype=torch.float64)
    analysis = fxprune.analyze(model, x)
    found = calibrate(analysis, [(x, torch.zeros(3, 5, 5, dtype=torch.float64))], ("gates",))
    values = score(analysis.all_groups, analysis.tensors, find("fisher"), calibration=found)
    assert all((each > 0).all() for each in values.values()) and values


# -- activations -----------------------------------------------------------------------------------


class Towers(nn.Module):
    """What two layers give is multiplied and read by no weight."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.u, self.v = conv_bn(3, 6), conv_bn(3, 6)
        self.uu, self.vv = nn.Conv2d(6, 5, 1), nn.Conv2d(6, 5, 1)

    def forward(self, x):
        return (self.uu(self.u(x)) * self.vv(self.v(x))).sum(1).flatten(1)


@pytest.mark.parametrize("criterion", MEASURED)
def test_layers_that_read_channels_and_make_some_that_no_weight_reads(criterion):
    """Attention has such layers: its products of queries and keys have no weight."""
    x = sample()[0]
    data = [(x, torch.zeros(12, 64, dtype=x.dtype))]
    model = Towers().double().eval()
    pruned = fxprune.prune(model, x[:2], criterion=criterion, rate=0.4, data=data)
    assert pruned.get_submodule("uu").weight.shape[:2] == (3, 4)


def test_class_numbers_may_be_of_any_integer_type():
    x, y = sample()
    found = [scores(net(), "fisher", [(x, y.to(kind))]) for kind in (torch.int64, torch.int32)]
    assert all((found[0][name] == found[1][name]).all() for name in found[0])


def test_activations_are_those_that_layers_read():
    model, (x, _) = net(), sample()
    with torch.no_grad():
        hidden = model.one(model.stem(x))
    found = {
        name: scores(model, name, [x[:5], x[5:]])["one.0"]
        for name in ("apoz", "mean_activation", "hrank")
    }
    np.testing.assert_allclose(found["apoz"], (hidden > 0).double().mean((0, 2, 3)), rtol=1e-9)
    np.testing.assert_allclose(found["mean_activation"], hidden.abs().mean((0, 2, 3)), rtol=1e-9)
    ranks = torch.linalg.matrix_rank(hidden.float()).double().mean(0)
    np.testing.assert_allclose(found["hrank"], ranks, rtol=1e-9)


def test_gradients_times_gamma():
    model, (x, y) = net(), sample()
    F.cross_entropy(model(x), y).backward()
    bn = model.one[1]
    by_hand = (bn.weight * bn.weight.grad).abs().detach()
    model.zero_grad()
    found = scores(model, "gradient_gamma", [(x[:7], y[:7]), (x[7:], y[7:])])["one.0"]
    np.testing.assert_allclose(found, by_hand, rtol=1e-9)
    assert all(p.grad is None for p in model.parameters())


# -- reconstruction --------------------------------------------------------------------------------


def least_squares_error(hidden: torch.Tensor, weight: torch.Tensor, gone: list[int]) -> float:
    """The mean squared error of a layer's outputs, summed over them, when others take the part of
    what went as well as they can."""
    centred = hidden - hidden.mean(0)
    left = [c for c in range(hidden.shape[1]) if c not in gone]
    target = centred @ weight.T
    fit = torch.linalg.lstsq(centred[:, left], target).solution
    return float((target - centred[:, left] @ fit).square().sum(1).mean())


def two_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 7), nn.Tanh(), nn.Linear(7, 3)).double()
    x = torch.randn(400, 4, dtype=torch.float64)
    with torch.no_grad():
        hidden = model[1](model[0](x))
        energy = float((hidden @ model[2].weight.T).var(0, correction=0).sum())
    return model, x, hidden, energy


def test_reconstruction_is_the_least_squares_error_of_what_went():
    """Summed up to any channel in the order of removal, for steps that only rise."""
    model, x, hidden, energy = two_layers()
    analysis = fxprune.analyze(model, x[:2])
    found = calibrate(analysis, list(x.split(100)), ("grams",))
    criterion = find({"name": "reconstruction", "ridge": 1e-12})
    (values,) = score(analysis.all_groups, analysis.tensors, criterion, calibration=found).values()
    order = np.argsort(values)
    for count in range(1, 6):
        error = least_squares_error(hidden, model[2].weight.detach(), order[:count].tolist())
        assert values[order[:count]].sum() == pytest.approx(error / energy, rel=1e-3)


def test_the_first_to_go_is_the_one_that_is_missed_least():
    model, x, hidden, energy = two_layers()
    weight = model[2].weight.detach()
    analysis = fxprune.analyze(model, x[:2])
    found = calibrate(analysis, [x], ("grams",))
    (values,) = score(
        analysis.all_groups, analysis.tensors, find("reconstruction"), calibration=found
    ).values()
    singles = [least_squares_error(hidden, weight, [c]) for c in range(7)]
    assert values.argmin() == np.argmin(singles)
    pairs = {
        pair: least_squares_error(hidden, weight, [*pair]) for pair in combinations(range(7), 2)
    }
    chosen = tuple(sorted(np.argsort(values)[:2].tolist()))
    assert pairs[chosen] <= 1.5 * min(pairs.values())


def test_a_surgeon_counts_outputs_by_their_slope():
    """An output that the loss does not ask for counts for nothing."""
    model, x, hidden, _ = two_layers()

    def loss(output, target):
        return (10 * output[:, 0] * target).mean()

    y = torch.randn(400, dtype=torch.float64)
    analysis = fxprune.analyze(model, x[:2])
    criterion = find({"name": "surgeon", "ridge": 1e-12})
    found = calibrate(analysis, [(x[:250], y[:250]), (x[250:], y[250:])], criterion.needs, loss)
    (values,) = score(analysis.all_groups, analysis.tensors, criterion, calibration=found).values()
    slope = float((10 * y).square().mean())
    first = int(values.argmin())
    error = least_squares_error(hidden, model[2].weight.detach()[:1], [first])
    assert values[first] == pytest.approx(slope * error / 2, rel=1e-3)


def test_copies_of_a_channel_cost_nothing():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 6, 3), nn.ReLU(), nn.Conv2d(6, 4, 3)).double()
    with torch.no_grad():
        model[0].weight[4] = 2 * model[0].weight[1]
        model[0].bias[4] = 2 * model[0].bias[1]
    x = torch.randn(6, 3, 9, 9, dtype=torch.float64)
    analysis = fxprune.analyze(model, x[:1])
    found = calibrate(analysis, [x], ("grams",))
    (values,) = score(
        analysis.all_groups, analysis.tensors, find("reconstruction"), calibration=found
    ).values()
    assert int(values.argmin()) in (1, 4) and values.min() < 1e-3 * np.median(values)
    other = 5 - int(values.argmin())
    assert values[other] > 10 * values.min(), "once one copy is gone the other is missed"


def test_several_elements_of_a_channel_count_together():
    """Behind a flatten: a channel that is constant, or not read, adds nothing."""
    model = net()
    with torch.no_grad():
        model.last[1].weight[2], model.last[1].bias[2] = 0, 3
        model.head.weight[:, 4:8] = 0
    values = scores(model, "reconstruction", [sample()[0]])["last.0"]
    assert values[2] == pytest.approx(0, abs=1e-12) and values[1] == 0
    assert (values[[0, 3, 4]] > 0).all() and values.sum() == pytest.approx(1)


# -- as prune takes it -----------------------------------------------------------------------------


DATA_CRITERIA = [name for name in fxprune.criteria.names() if find(name).needs]


@pytest.mark.parametrize("criterion", DATA_CRITERIA)
def test_every_criterion_of_data_is_finite_on_a_network_of_zeros(criterion):
    model = net()
    for parameter in model.parameters():
        nn.init.zeros_(parameter)
    pruned = fxprune.prune(
        model, sample(2)[0], criterion=criterion, rate=0.5, data=[sample()], verify="shapes"
    )
    assert pruned.fxprune.report.channels[1] < pruned.fxprune.report.channels[0]


@pytest.mark.parametrize("criterion", MEASURED)
def test_every_criterion_of_data_prunes_and_leaves_the_model_alone(criterion):
    model, (x, y) = net(), sample()
    model.train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loader = DataLoader(TensorDataset(x, y), batch_size=5)
    pruned = fxprune.prune(model, x[:2], criterion=criterion, rate=0.5, data=loader)
    assert pruned.fxprune.report.params[1] < pruned.fxprune.report.params[0]
    assert model.training and pruned.training
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_a_criterion_of_ones_own_may_need_data(monkeypatch):
    monkeypatch.setattr(fxprune.criteria, "_known", dict(fxprune.criteria._known))

    @fxprune.criterion("test_variance", needs=("values",))
    def variance(group):
        read, at = group.reads[0]
        mean = group.mean_of(read, at, "total")
        return group.mean_of(read, at, "square") - mean.square()

    pruned = fxprune.prune(net(), sample(2)[0], criterion="test_variance", data=[sample()[0]])
    assert pruned.fxprune.report.channels[1] < pruned.fxprune.report.channels[0]
    with pytest.raises(OptionError, match="needs"):
        fxprune.criterion("test_other", needs=("activations",))


def spoiled(value: float) -> torch.Tensor:
    x = sample()[0]
    x[3, 1, 2, 2] = value
    return x


@pytest.mark.parametrize(
    ("options", "fault", "hint"),
    [
        ({"criterion": "fisher"}, "no data", "data="),
        ({"criterion": "fisher", "data": []}, "no batch", "DataLoader"),
        ({"criterion": "fisher", "data": sample()[0]}, "data is a Tensor", "list or DataLoader"),
        ({"criterion": "fisher", "data": [sample()[0]]}, "no targets", "pairs"),
        ({"criterion": "fisher", "data": [torch.zeros(0, 3, 8, 8)]}, "no items", ""),
        (
            {"criterion": "apoz", "data": [torch.zeros(2, 5, 8, 8).double()]},
            "does not run",
            "example",
        ),
        (
            {"criterion": "fisher", "data": [(sample()[0], torch.zeros(12, 9))]},
            "usual loss",
            "loss=",
        ),
        ({"criterion": "fisher", "data": batched(4), "loss": lambda o, t: o}, "loss gives", "mean"),
        ({"criterion": "fisher", "data": ["a"]}, "str", ""),
        ({"criterion": "apoz", "data": [sample()[0], spoiled(float("nan"))]}, "1 .* NaN", "mend"),
        (
            {"criterion": "apoz", "data": [((sample()[0], sample()[0]), None)]},
            "1 more arguments",
            "example_inputs",
        ),
        (
            {"criterion": "apoz", "data": [{"x": sample()[0], "meta": sample()[0]}]},
            "1 more arguments",
            "example_inputs",
        ),
        ({"criterion": "apoz", "data": [spoiled(1e200)]}, "not finite", "too large"),
        (
            {"criterion": "fisher", "data": batched(4), "loss": lambda o, t: o.missing},
            "loss fails .*missing",
            "outputs",
        ),
        ({"criterion": "fisher", "data": batched(4), "loss": "ce"}, "loss is a str", "function"),
        (
            {"criterion": "fisher", "data": [(sample()[0], torch.full((12,), 7))]},
            "class number 7",
            "0 to 2",
        ),
        (
            {"criterion": "fisher", "data": [(sample()[0], torch.zeros(12, 1).long())]},
            "no usual loss",
            "loss=",
        ),
    ],
)
def test_wrong_data(options, fault, hint):
    with pytest.raises(FxpruneError, match=fault) as error:
        fxprune.prune(net(), sample(2)[0], **options)
    assert hint in str(error.value)


def test_a_shuffling_loader_leaves_the_callers_random_numbers_alone():
    x, y = sample()
    loader = DataLoader(TensorDataset(x, y), 4, shuffle=True)
    before = torch.get_rng_state()
    fxprune.prune(net(), x[:2], criterion="fisher", data=loader, compensate=True)
    assert torch.equal(torch.get_rng_state(), before)


def test_a_criterion_that_needs_data_says_so_without():
    with pytest.raises(CriterionError, match="needs data"):
        analysis = fxprune.analyze(net(), sample(2)[0])
        score(analysis.all_groups, analysis.tensors, find("fisher"))
    assert issubclass(InputError, FxpruneError)


# -- process groups --------------------------------------------------------------------------------

_RANK = """
import sys, torch
sys.path.insert(0, {tests!r})
import torch.distributed as dist
import fxprune
from test_calibration import net, sample
rank = int(sys.argv[1])
dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
x, y = sample(12, seed=5)
mine = slice(0, 5) if rank == 0 else slice(5, 12)   # unequal shares
for criterion in ("fisher", "taylor", "gradient_gamma", "hrank", "surgeon", "reconstruction"):
    plan = fxprune.plan(
        fxprune.analyze(net(), x[:2]), criterion=criterion, data=[(x[mine], y[mine])],
        target={{"macs": 0.5}}, scores=True,
    )
    print(plan.to_json())
"""


def test_two_ranks_choose_the_same_channels_and_those_of_all_data(tmp_path):
    from pathlib import Path

    script = tmp_path / "rank.py"
    script.write_text(textwrap.dedent(_RANK.format(tests=str(Path(__file__).parent))))
    command = [sys.executable, str(script)]
    ranks = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "meet")], stdout=subprocess.PIPE, text=True
        )
        for rank in range(2)
    ]
    outputs = [process.communicate(timeout=180)[0].splitlines() for process in ranks]
    assert len(outputs[0]) == 6 and outputs[0] == outputs[1]
    x, y = sample(12, seed=5)
    for line, criterion in zip(outputs[0], ("fisher", "taylor"), strict=False):
        alone = fxprune.plan(
            fxprune.analyze(net(), x[:2]), criterion=criterion, data=[(x, y)], target={"macs": 0.5}
        )
        assert fxprune.Plan.from_json(line).kept == alone.kept
