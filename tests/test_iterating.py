"""Several small steps end where one large step does, and each is exact."""

from __future__ import annotations

import copy

import pytest
import torch
import torchvision
from strategies import draw_network
from torch import nn
from torch.nn.utils import prune
from wild import WILD

import fxprune
from fxprune.errors import ModelError, NothingToPrune, OptionError

X = torch.rand(2, 3, 8, 8)


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm = nn.Conv2d(3, 20, 3, padding=1), nn.BatchNorm2d(20)
        self.inner, self.grouped = nn.Conv2d(20, 20, 1), nn.Conv2d(20, 24, 3, groups=2, padding=1)
        self.head = nn.Linear(24, 4)

    def forward(self, x):
        x = torch.relu(self.norm(self.stem(x)))
        x = x + self.inner(x)
        return self.head(torch.relu(self.grouped(x)).mean((2, 3)))


class Detects(Net):
    def forward(self, x):
        found = super().forward(x)
        return found[found[:, 0] > float(found.detach().mean())]


def trained(model: nn.Module) -> nn.Module:
    """As if a training had moved all weights and statistics."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.buffers()]:
            if tensor.is_floating_point():
                tensor.add_(torch.rand(tensor.shape, generator=generator) * 0.1)
    return model


def shapes(model: nn.Module) -> dict:
    return {name: tuple(t.shape) for name, t in model.state_dict().items()}


OPTIONS = [
    {},
    {"criterion": "geometric_median"},
    {"criterion": "distribution_fit"},
    {"scope": "global", "criterion": "lamp"},
    {"round_to": 4},
    {"rates": {"inner": 0.25}, "ignore": ["grouped"]},
    {"scatter": True},
    {"ignore": nn.Linear, "only": ["stem", "grouped"]},
]


@pytest.mark.parametrize("options", OPTIONS, ids=str)
def test_steps_end_at_the_widths_of_one_step(options):
    """Which channels stay may differ: norms change with the channels that a filter reads."""
    torch.manual_seed(0)
    model = Net()
    *_, last = fxprune.iterate(model, X, rate=0.6, steps=4, **options)
    once = fxprune.prune(model, X, rate=0.6, **options)
    assert [g.kept for g in last.fxprune.plan.groups] == [g.kept for g in once.fxprune.plan.groups]
    same = fxprune.apply(model, last.fxprune.plan)
    assert all(torch.equal(t, same.state_dict()[n]) for n, t in last.state_dict().items())


def test_trained_weights_are_carried_on():
    torch.manual_seed(0)
    model, before = Net(), None
    for pruned in fxprune.iterate(model, X, rate=0.6, steps=3):
        if before is not None:
            plan, older = pruned.fxprune.plan, before.fxprune.plan
            gone = set(range(20)) - set(plan.kept["stem.weight"][0])
            assert set(range(20)) - set(older.kept["stem.weight"][0]) < gone
            rows = [older.kept["stem.weight"][0].index(i) for i in plan.kept["stem.weight"][0]]
            assert torch.equal(pruned.stem.weight, before.stem.weight[rows])
            assert torch.equal(pruned.norm.running_mean, before.norm.running_mean[rows])
            assert pruned.training == before.training
        before = trained(pruned).train()


def test_plans_and_reports_are_of_the_original():
    model = Net()
    state = copy.deepcopy(model.state_dict())
    for k, pruned in enumerate(fxprune.iterate(model, X, rate=0.6, steps=3), 1):
        trained(pruned)
        report = pruned.fxprune.report
        assert report.channels[0] == 48 and report.rate == pytest.approx(0.2 * k)
        assert report.verification.difference < 1e-12
        again = fxprune.apply(model, pruned.fxprune.plan)
        assert shapes(again) == shapes(pruned)
    assert all(torch.equal(state[n], t) for n, t in model.state_dict().items())


@pytest.mark.parametrize(
    ("schedule", "widths"),
    [("linear", [16, 10, 6]), ("geometric", [14, 8, 6]), (lambda done: done**2, [20, 14, 6])],
)
def test_schedules(schedule, widths):
    steps = fxprune.iterate(Net(), X, rate=0.75, steps=3, schedule=schedule)
    assert [pruned.stem.out_channels for pruned in steps] == widths


def test_scores_are_of_the_trained_weights():
    """What training made small goes next, and not what was small before."""
    model = Net()
    steps = fxprune.iterate(model, X, rate=0.5, steps=2, criterion="l1")
    pruned = next(steps)
    alive = pruned.fxprune.plan.kept["stem.weight"][0]
    with torch.no_grad():
        pruned.stem.weight[3:6] *= 1e-6
        pruned.inner.weight[3:6] *= 1e-6
    last = next(steps)
    assert not set(alive[3:6]) & set(last.fxprune.plan.kept["stem.weight"][0])


@pytest.mark.parametrize(
    "name", ["shufflenet", "res2net", "hrnet", "vit", "selective_kernels", "crnn"]
)
def test_hard_networks(name):
    case = WILD[name]
    for pruned in fxprune.iterate(case.build(), case.args(), rate=0.5, steps=2, mixing=case.mixing):
        trained(pruned)
        assert pruned.fxprune.report.verification.difference is not None
    once = fxprune.prune(case.build(), case.args(), rate=0.5, mixing=case.mixing)
    assert shapes(pruned) == shapes(once)


def test_layers_named_by_the_module_itself():
    model = Net()
    *_, last = fxprune.iterate(model, X, rate=0.5, steps=2, ignore=[model.grouped])
    assert last.grouped.out_channels == 24 and last.stem.out_channels == 10


@pytest.mark.parametrize("seed", [3, 17, 29, 68, 92])
def test_random_networks(seed):
    """Every step is exact, and the last has the widths of one step."""
    network = draw_network(seed)
    model, x = network.build(), network.inputs()
    for pruned in fxprune.iterate(model, x, rate=0.6, steps=3):
        trained(pruned)
    once = fxprune.prune(model, x, rate=0.6)
    assert [g.kept for g in pruned.fxprune.plan.groups] == [
        g.kept for g in once.fxprune.plan.groups
    ]


def test_a_recorded_network():
    *_, last = fxprune.iterate(Detects(), X, rate=0.5, steps=2)
    assert isinstance(last, Detects) and last.stem.out_channels == 10


def test_global_rates_reach_what_was_asked():
    model = torchvision.models.resnet18().eval()
    x = torch.rand(1, 3, 64, 64)
    for pruned in fxprune.iterate(model, x, rate=0.5, steps=2, scope="global", criterion="lamp"):
        trained(pruned)
    once = fxprune.prune(model, x, rate=0.5, scope="global", criterion="lamp", verify=False)
    before, after = pruned.fxprune.report.channels
    assert before == 3880 and abs(after - once.fxprune.report.channels[1]) <= 2


def test_a_loop_goes_on_where_an_earlier_one_was(tmp_path):
    torch.manual_seed(0)
    model, found = Net(), []
    for pruned in fxprune.iterate(model, X, rate=0.6, steps=3):
        found.append(trained(pruned))
        if len(found) == 1:
            fxprune.save(pruned, tmp_path)
    again = [
        trained(pruned)
        for pruned in fxprune.iterate(model, X, rate=0.6, steps=3, start=fxprune.load(tmp_path))
    ]
    assert len(again) == 2 and again[-1].fxprune.plan.kept == found[-1].fxprune.plan.kept
    assert all(torch.equal(t, again[-1].state_dict()[n]) for n, t in found[-1].state_dict().items())
    assert not list(fxprune.iterate(model, X, rate=0.6, steps=3, start=found[-1]))
    with pytest.raises(ModelError, match="no pruned network"):
        fxprune.iterate(model, X, start=model)


def first(**options):
    return next(fxprune.iterate(Net().eval(), X, steps=3, **options))


@pytest.mark.parametrize(
    ("before", "after", "says"),
    [
        ({"target": {"macs": 0.4}}, {"rate": 0.3}, "start was made for macs, not by a rate"),
        ({"rate": 0.3}, {"target": {"macs": 0.4}}, "start was made by a rate, not for macs"),
        ({"target": {"macs": 0.4}}, {"target": {"params": 0.4}}, "made for macs, not for params"),
        ({"target": {"macs": 0.4}}, {"target": {"macs": 0.4, "params": 0.5}}, "not for macs and"),
    ],
)
def test_a_start_by_another_kind_of_request_is_refused(before, after, says):
    start = first(**before)
    with pytest.raises(OptionError, match=says) as caught:
        fxprune.iterate(Net().eval(), X, steps=3, start=start, **after)
    assert "apply" in caught.value.hint or "options" in caught.value.hint
    assert len(list(fxprune.iterate(Net().eval(), X, steps=3, start=start, **before))) == 2


def test_a_start_by_an_amount_is_refused():
    start = fxprune.prune(Net().eval(), X, target={"macs": 20_000})
    with pytest.raises(OptionError, match="start was made for 20000 macs"):
        fxprune.iterate(Net().eval(), X, target={"macs": 0.4}, start=start)


@pytest.mark.parametrize("option", [{"scatter": True}, {"heads": "whole"}, {"mixing": "all"}])
def test_a_start_by_another_analysis_is_refused(option):
    start = first(rate=0.3, **option)
    with pytest.raises(OptionError, match=f"start was made with {next(iter(option))}="):
        fxprune.iterate(Net().eval(), X, rate=0.3, steps=3, start=start)


def test_errors_come_with_the_call():
    with pytest.raises(OptionError, match="steps"):
        fxprune.iterate(Net(), X, steps=0)
    with pytest.raises(OptionError, match="schedule='cubic' is not known"):
        fxprune.iterate(Net(), X, schedule="cubic")
    with pytest.raises(OptionError, match="schedule gives 3"):
        fxprune.iterate(Net(), X, schedule=lambda done: 3)
    with pytest.raises(OptionError, match="no option `rat`"):
        fxprune.iterate(Net(), X, rat=0.5)
    with pytest.raises(OptionError, match="schedule falls"):
        fxprune.iterate(Net(), X, schedule=lambda done: 1 - done)
    with pytest.raises(NothingToPrune):
        fxprune.iterate(nn.Conv2d(3, 4, 1), X)


def test_widths_never_grow_again():
    """Not by a share of the summed scores either, of which channels that went have none."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 40, 3), nn.ReLU(), nn.Conv2d(40, 28, 3), nn.Conv2d(28, 4, 1))
    widths = []
    for pruned in fxprune.iterate(model, X, rate=0.5, steps=4, select_by="cumulative"):
        weight = trained(pruned).get_submodule("0").weight
        assert bool(weight.flatten(1).any(1).all())  # no filter that went is there again
        widths.append(weight.shape[0])
    assert widths == sorted(widths, reverse=True) and widths[-1] < widths[0]


def test_masked_models_are_pruned_in_steps():
    model = Net()
    prune.ln_structured(model.stem, "weight", amount=0.2, n=2, dim=0)
    *_, last = fxprune.iterate(model, X, rate=0.5, steps=2)
    assert last.fxprune.report.verification.difference < 1e-12


def test_layers_put_in_or_taken_out_in_the_loop_are_refused():
    for change in (
        lambda net: prune.l1_unstructured(net.inner, "weight", amount=0.5),
        lambda net: nn.utils.parametrizations.weight_norm(net.inner),
    ):
        steps = fxprune.iterate(Net(), X, rate=0.5, steps=2)
        change(next(steps))
        with pytest.raises(ModelError, match="came or went in training"):
            next(steps)


def test_another_network_is_refused():
    steps = fxprune.iterate(Net(), X, rate=0.5, steps=2)
    pruned = next(steps)
    pruned.head = nn.Linear(24, 4)
    pruned.norm = nn.BatchNorm2d(7)
    with pytest.raises((ModelError, fxprune.FxpruneError)):
        next(steps)


# -- budgets and data ------------------------------------------------------------------------------


def test_steps_go_towards_a_budget_with_data():
    model = fxprune.models.resnet20().double().eval()
    x = torch.randn(8, 3, 32, 32, dtype=torch.float64)
    data = [(x, torch.arange(8))]
    options = {"criterion": "fisher", "target": {"macs": 0.4}, "data": data, "compensate": True}
    left, seen = [], []
    for pruned in fxprune.iterate(model, x[:2], steps=3, **options):
        report = pruned.fxprune.report
        left.append(report.macs[1] / report.macs[0])
        assert report.targets[0].met and report.compensation.fitted
        kept = pruned.fxprune.plan.kept
        for old in seen:
            for name, dims in old.items():
                for dim, indices in dims.items():
                    assert set(kept[name][dim]) <= set(indices), "what went does not come back"
        seen.append(kept)
    assert left == pytest.approx([0.8, 0.6, 0.4], abs=0.01)


def test_a_budget_of_steps_is_in_shares():
    with pytest.raises(fxprune.errors.OptionError, match="no share"):
        fxprune.iterate(fxprune.models.resnet20(), target={"latency_ms": 3})
    with pytest.raises(fxprune.errors.OptionError, match="no share"):
        fxprune.iterate(fxprune.models.resnet20(), target={"macs": 1e6})
