"""Compensation: exact where it can be, for every op that is linear in a weight; else nearer."""

from __future__ import annotations

import copy

import pytest
import torch
from hypothesis import given, settings
from strategies import networks
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils import _pytree as pytree

import fxprune
from fxprune.errors import FxpruneError, InputError, OptionError

torch.set_num_threads(1)


# -- exact: channels that others make up for -------------------------------------------------------


class Mixed(nn.Module):
    """A layer of eight channels of which the last four are mixtures of the others, then another."""

    def __init__(self, consumer: nn.Module, dims: int = 2, behind: nn.Module | None = None):
        super().__init__()
        torch.manual_seed(0)
        kind = {0: nn.Linear, 1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
        self.make = kind(3, 8) if dims == 0 else kind(3, 8, 1)
        with torch.no_grad():
            mixture = torch.randn(4, 4)
            for tensor in (self.make.weight, self.make.bias):
                flat = tensor.reshape(8, -1)
                flat[4:] = mixture @ flat[:4]
            self.make.weight[4:] *= 1e-3  # the criterion takes these
            self.make.bias[4:] *= 1e-3
        self.consumer, self.behind = consumer, behind or nn.Identity()

    def forward(self, x):
        return self.behind(self.consumer(self.make(x)))


class Functional(nn.Module):
    def __init__(self, call, *shape: int, bias: int = 0):
        super().__init__()
        torch.manual_seed(1)
        self.call, self.weight = call, nn.Parameter(torch.randn(*shape))
        self.bias = nn.Parameter(torch.randn(bias)) if bias else None

    def forward(self, x):
        return (
            self.call(x, self.weight) if self.bias is None else self.call(x, self.weight, self.bias)
        )


def _conv_tbc(x, w, b):
    return torch.conv_tbc(x.permute(2, 0, 1).contiguous(), w, b, 1)


CONSUMERS = {
    "conv": (nn.Conv2d(8, 5, 3), 2),
    "conv, strided, padded": (nn.Conv2d(8, 5, 3, stride=2, padding=1, bias=False), 2),
    "conv, dilated, reflecting": (
        nn.Conv2d(8, 5, 3, padding=2, dilation=2, padding_mode="reflect"), 2,
    ),
    "conv 1x1": (nn.Conv2d(8, 5, 1), 2),
    "conv1d": (nn.Conv1d(8, 5, 5, padding=2), 1),
    "conv3d": (nn.Conv3d(8, 5, (1, 3, 2)), 3),
    "transposed": (nn.ConvTranspose2d(8, 5, 3, stride=2, padding=1, output_padding=1), 2),
    "linear": (nn.Linear(8, 5), 0),
    "linear without bias": (nn.Linear(8, 5, bias=False), 0),
    "F.conv2d": (Functional(lambda x, w, b: F.conv2d(x, w, b, padding=1), 5, 8, 3, 3, bias=5), 2),
    "F.linear": (Functional(F.linear, 5, 8), 0),
    "matmul": (Functional(torch.matmul, 8, 5), 0),
    "einsum": (Functional(lambda x, w: torch.einsum("nchw,oc->nohw", x, w), 5, 8), 2),
    "conv_tbc": (
        Functional(_conv_tbc, 3, 8, 5, bias=5), 1,
    ),
}  # fmt: skip


def inputs(dims: int, count: int = 64, seed: int = 3, side: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    shape = (count, 3) if dims == 0 else (count, 3, *[side] * dims)
    return torch.randn(shape, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize("name", CONSUMERS)
def test_what_others_can_make_up_for_is_made_up_for(name):
    consumer, dims = CONSUMERS[name]
    model = Mixed(consumer, dims).double().eval()
    x = inputs(dims)
    plain = fxprune.prune(model, x[:2], rate=0.5, criterion="l1", ignore=["consumer*"])
    fitted = fxprune.prune(
        model,
        x[:2],
        rate=0.5,
        criterion="l1",
        ignore=["consumer*"],
        data=[x[:40], x[40:]],
        compensate=True,
    )
    assert fitted.fxprune.plan.kept == plain.fxprune.plan.kept
    fresh = inputs(dims, seed=4)
    with torch.no_grad():
        wanted, found, before = model(fresh), fitted(fresh), plain(fresh)
    scale = wanted.abs().max()
    assert (found - wanted).abs().max() < 2e-3 * scale, fitted.fxprune.report.compensation
    assert (before - wanted).abs().max() > 5 * (found - wanted).abs().max()
    done = fitted.fxprune.report.compensation
    assert "consumer" in done.fitted and not done.skipped


def test_grouped_blocks_are_fitted_block_by_block():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 6, 3, groups=2, padding=1)).double()
    with torch.no_grad():
        for start in (0, 4):  # in each block of four the last two are mixtures of the first two
            rows = slice(start, start + 2), slice(start + 2, start + 4)
            mixture = torch.randn(2, 2, dtype=torch.float64)
            model[0].weight[rows[1]] = 0.01 * torch.einsum(
                "ij,j...->i...", mixture, model[0].weight[rows[0]]
            )
            model[0].bias[rows[1]] = 0.01 * mixture @ model[0].bias[rows[0]]
            model[1].weight[:, 2:] *= 100
    x = inputs(2)
    options = {"rate": 0.5, "criterion": "l1", "ignore": ["1"], "reduce": "first"}
    plain = fxprune.prune(model, x[:2], **options)
    fitted = fxprune.prune(model, x[:2], data=[x], compensate=True, **options)
    assert fitted.fxprune.report.channels[1] < fitted.fxprune.report.channels[0]
    fresh = inputs(2, seed=4)
    with torch.no_grad():
        wanted = model(fresh)
        errors = [(net(fresh) - wanted).abs().max() for net in (plain, fitted)]
    assert errors[1] < 1e-2 * errors[0]


# -- exact: channels that are constant -------------------------------------------------------------


def constant(behind: nn.Module, bias: bool) -> nn.Module:
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Conv2d(3, 8, 3, bias=False), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 5, 3, bias=bias),
        behind,
    ).double()  # fmt: skip
    with torch.no_grad():
        model[1].weight[::2] = 0
        model[1].bias[::2] = torch.tensor([0.7, 1.5, 0.1, 3.0])
    return model.eval()


@pytest.mark.parametrize("how", ["bias", "least_squares"])
@pytest.mark.parametrize(
    ("behind", "bias"), [(nn.ReLU(), True), (nn.BatchNorm2d(5), False), (nn.BatchNorm2d(5), True)]
)
def test_constant_channels_go_without_a_trace(how, behind, bias):
    model, x = constant(behind, bias), inputs(2)
    options = {"criterion": "bn_gamma", "rate": 0.5, "ignore": ["3"]}
    plain = fxprune.prune(model, x[:2], **options)
    fitted = fxprune.prune(model, x[:2], data=[x], compensate=how, **options)
    fresh = inputs(2, seed=4)
    with torch.no_grad():
        wanted = model(fresh)
        assert (plain(fresh) - wanted).abs().max() > 0.1 * wanted.abs().max()
        tolerance = 1e-9 if how == "bias" else 1e-3
        assert (fitted(fresh) - wanted).abs().max() < tolerance * wanted.abs().max()


def test_nothing_is_added_where_nothing_can_take_it():
    """Without a bias or a normalisation behind it, a layer has no constant to change."""
    model, x = constant(nn.ReLU(), False), inputs(2)
    fitted = fxprune.prune(
        model, x[:2], criterion="bn_gamma", rate=0.5, ignore=["3"], data=[x], compensate="bias"
    )
    plain = fxprune.prune(model, x[:2], criterion="bn_gamma", rate=0.5, ignore=["3"])
    for (name, a), b in zip(fitted.state_dict().items(), plain.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


# -- nearer ----------------------------------------------------------------------------------------


def first(output):
    return output if isinstance(output, Tensor) else pytree.tree_leaves(output)[0]


@settings(deadline=None, max_examples=30)
@given(networks())
def test_random_networks_come_nearer_on_the_data_itself(drawn):
    """To what the original gives; networks in which nothing can go aside."""
    model = drawn.build()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(24, 3, 8, 8, generator=generator, dtype=torch.float64)
    try:
        plain = fxprune.prune(model, x[:2], rate=0.4)
    except fxprune.errors.NothingToPrune:
        return
    fitted = fxprune.prune(model, x[:2], rate=0.4, data=[x[:12], x[12:]], compensate=True)
    assert list(plain.state_dict()) == list(fitted.state_dict())
    done = fitted.fxprune.report.compensation
    for name, (before, after) in done.fitted.items():
        assert after <= before * (1 + 1e-6) + 1e-9, name
    with torch.no_grad():
        wanted = first(model(x))
        errors = [(first(net(x)) - wanted).square().mean() for net in (plain, fitted)]
    assert torch.isfinite(errors[1])
    assert errors[1] <= errors[0] * 1.5 + 1e-12


def test_nothing_changes_where_nothing_goes():
    model = fxprune.models.resnet20().double().eval()
    x = torch.randn(16, 3, 32, 32, dtype=torch.float64)
    fitted = fxprune.prune(model, x[:2], rate=0.0, data=[x], compensate=True)
    with torch.no_grad():
        torch.testing.assert_close(fitted(x), model(x))


def test_statistics_are_those_of_the_pruned_network():
    model = fxprune.models.resnet20().double().eval()
    x = torch.randn(16, 3, 32, 32, dtype=torch.float64)
    fitted = fxprune.prune(model, x[:2], rate=0.5, data=[x[:9], x[9:]], compensate="statistics")
    seen = {}
    for name, module in fitted.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_pre_hook(
                lambda module, args, name=name: seen.__setitem__(name, args[0])
            )
    with torch.no_grad():
        fitted(x)
    assert len(seen) == len(fitted.fxprune.report.compensation.statistics) == 19
    for name, given_to in seen.items():
        module = fitted.get_submodule(name)
        torch.testing.assert_close(module.running_mean, given_to.mean((0, 2, 3)))
        torch.testing.assert_close(
            module.running_var, given_to.var((0, 2, 3), correction=0), rtol=1e-6, atol=1e-9
        )


def test_the_model_and_modes_are_as_before():
    model = fxprune.models.resnet20().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    x = torch.randn(8, 3, 32, 32)
    fitted = fxprune.prune(model, x[:2], rate=0.5, data=[(x, torch.zeros(8))], compensate=True)
    assert model.training and all(module.training for module in fitted.modules())
    assert all(p.requires_grad and p.grad is None for p in fitted.parameters())
    after = model.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_it_saves_and_loads(tmp_path):
    model = fxprune.models.resnet20().eval()
    x = torch.randn(8, 3, 32, 32)
    fitted = fxprune.prune(model, x[:2], rate=0.5, data=[x], compensate=True)
    fxprune.save(fitted, tmp_path / "small")
    loaded = fxprune.load(tmp_path / "small")
    assert torch.equal(loaded(x), fitted(x))
    assert loaded.fxprune.report.compensation == fitted.fxprune.report.compensation


# -- what is left as it is -------------------------------------------------------------------------


class Branches(nn.Module):
    """Two layers of opposite weights, which share something: what suits one is wrong for the
    other."""

    def __init__(self, share: str):
        super().__init__()
        torch.manual_seed(0)
        self.make = nn.Conv2d(3, 16, 3, padding=1)
        self.one = nn.Conv2d(16, 8, 1, bias=share == "bias")
        self.two = nn.Conv2d(16, 8, 1, bias=share == "bias")
        self.two.weight.data.copy_(-self.one.weight.data)
        if share == "bias":
            self.two.bias = self.one.bias
        self.behind = nn.BatchNorm2d(8) if share == "normalisation" else nn.Identity()

    def forward(self, x):
        x = torch.sigmoid(self.make(x))
        return torch.cat([self.behind(self.one(x)), self.behind(self.two(x))], 1)


@pytest.mark.parametrize("share", ["bias", "normalisation"])
def test_constants_that_two_layers_share_are_left_as_they_are(share):
    model = Branches(share).double().eval()
    x = inputs(2)
    options = {"rate": 0.5, "data": [x]}
    plain, moved, fitted = (
        fxprune.prune(model, x[:2], compensate=how, **options) for how in (None, "bias", True)
    )
    for (name, a), b in zip(plain.state_dict().items(), moved.state_dict().values(), strict=True):
        assert torch.equal(a, b) or name.startswith("make"), name
    assert set(moved.fxprune.report.compensation.skipped) == {"one", "two"}
    for name, own in fitted.named_buffers():
        assert torch.equal(own, plain.get_buffer(name)), name
    assert {"one", "two"} <= set(fitted.fxprune.report.compensation.fitted)
    with torch.no_grad():
        wanted = model(x)
        errors = [float((net(x) - wanted).square().mean()) for net in (plain, moved, fitted)]
    assert errors[1] == pytest.approx(errors[0])
    assert errors[2] < 0.1 * errors[0], "weights are fitted alone"


def test_a_normalisation_of_other_channels_takes_no_constant():
    """A linear layer behind which a normalisation goes along another dim of the same size."""
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(6, 16), nn.Sigmoid(), nn.Linear(16, 5, bias=False), nn.BatchNorm1d(5)
    ).double()
    x = torch.randn(64, 5, 6, dtype=torch.float64)
    fitted = fxprune.prune(model.eval(), x[:2], rate=0.5, data=[x], compensate="bias")
    assert "3.running_mean" in fitted.state_dict()
    assert not fitted.state_dict()["3.running_mean"].any()
    assert "2" in fitted.fxprune.report.compensation.skipped


def test_a_weight_of_two_names_is_fitted():
    class Named(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.gain, self.base = nn.Parameter(torch.randn(4, 16)), nn.Parameter(torch.randn(4))
            self.make, self.take = nn.Linear(3, 16), nn.Linear(16, 4)
            self.take.weight, self.take.bias = self.gain, self.base

        def forward(self, x):
            return self.take(self.make(x).sigmoid())

    x = inputs(0)
    fitted = fxprune.prune(Named().double(), x[:2], rate=0.4, data=[x], compensate=True)
    before, after = fitted.fxprune.report.compensation.fitted["take"]
    assert after < 0.2 * before


class Twice(nn.Module):
    def __init__(self):
        super().__init__()
        self.make, self.twice, self.last = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.twice(self.twice(self.make(x)).relu()))


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.make, self.one, self.two = nn.Linear(3, 8), nn.Linear(8, 8), nn.Linear(8, 8)
        self.two.weight, self.last = self.one.weight, nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.two(self.one(self.make(x)).relu()))


class Walk(nn.Module):
    def __init__(self):
        super().__init__()
        self.make, self.walk = nn.Linear(3, 8), nn.LSTM(8, 8, batch_first=True)
        self.last = nn.Linear(8, 2)

    def forward(self, x):
        return self.last(self.walk(self.make(x))[0])


def normed() -> nn.Module:
    parts = nn.utils.parametrizations
    return nn.Sequential(
        nn.Linear(3, 8), parts.weight_norm(nn.Linear(8, 8)), nn.LayerNorm(8), nn.ReLU(),
        parts.spectral_norm(nn.Linear(8, 8)), nn.Linear(8, 2),
    )  # fmt: skip


@pytest.mark.parametrize(
    ("make", "fitted", "skipped"),
    [
        (Twice, {"make", "last"}, {"twice": "its weights are shared with another call of it"}),
        (
            Tied,
            {"make", "last"},
            {
                "one": "its weights are shared with `two`",
                "two": "its weights are shared with `one`",
            },
        ),
        (Walk, {"make", "last"}, {"walk": "it is not linear in one parameter and one input"}),
        (
            normed,
            {"0", "5"},
            dict.fromkeys(("1", "4"), "it is not linear in one parameter and one input"),
        ),
    ],
)
def test_the_report_says_what_was_not_fitted_and_why(make, fitted, skipped):
    torch.manual_seed(0)
    x = torch.randn(16, 5, 3, dtype=torch.float64)
    net = fxprune.prune(make().double().eval(), x[:2], rate=0.5, data=[x], compensate=True)
    done = net.fxprune.report.compensation
    assert set(done.fitted) == fitted
    assert done.skipped == skipped
    assert f"{len(skipped)} left as they are" in str(done)


def test_functions_of_one_place_are_told_apart():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.two = nn.Parameter(torch.randn(16, 3)), nn.Parameter(torch.randn(5, 16))

        def forward(self, x):
            return F.linear(F.linear(x, self.one).relu(), self.two)

    x = inputs(0)
    net = fxprune.prune(
        nn.Sequential(Two()).double(), x[:2], rate=0.5, data=[x], compensate="least_squares"
    )
    assert set(net.fxprune.report.compensation.fitted) == {"0", "0.two"}


def test_what_has_no_parameters_is_not_listed():
    class Blurred(nn.Module):
        def __init__(self):
            super().__init__()
            self.make, self.last = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
            self.register_buffer("kernel", torch.ones(8, 1, 3, 3) / 9)

        def forward(self, x):
            return self.last(F.conv2d(self.make(x), self.kernel, groups=8).relu())

    torch.manual_seed(0)
    model, x = Blurred().double().eval(), inputs(2)
    done = fxprune.prune(
        model, x[:2], rate=0.5, data=[x], compensate="bias"
    ).fxprune.report.compensation  # fmt: skip
    assert set(done.fitted) == {"make", "last"} and not done.skipped


def test_statistics_of_one_value_are_left_as_they_are():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16, 2))
    x = torch.randn(4, 12)
    pruned = fxprune.prune(model.eval(), x, rate=0.5, data=[x[:1]], compensate="statistics")
    assert (pruned.state_dict()["1.running_var"] == 1).all()
    done = pruned.fxprune.report.compensation
    assert done.statistics == [] and "one value" in done.skipped["1"]
    assert "1 left as they are" in str(done)


def test_statistics_that_two_layers_share_are_left_as_they_are():
    model, x = Branches("normalisation").double().eval(), inputs(2)
    pruned = fxprune.prune(model, x[:2], rate=0.5, data=[x], compensate="statistics")
    assert not pruned.state_dict()["behind.running_mean"].any()
    assert "shared" in pruned.fxprune.report.compensation.skipped["behind"]


def test_no_statistics_to_take_anew_are_reported():
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(12, 16), nn.ReLU(), nn.Linear(16, 2)), torch.randn(4, 12)
    pruned = fxprune.prune(model, x, rate=0.5, data=[x], compensate="statistics")
    done = pruned.fxprune.report.compensation
    assert str(done) == "nothing: no normalisation holds statistics"


# -- numbers ---------------------------------------------------------------------------------------


def relative(found: Tensor, wanted: Tensor) -> float:
    """An error over a size, both as norms."""
    return float((found.float() - wanted.float()).norm() / wanted.float().norm())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_fitted_as_float32_is(dtype):
    torch.manual_seed(0)
    model, x = fxprune.models.resnet20().eval(), torch.randn(64, 3, 16, 16)
    half, errors = copy.deepcopy(model).to(dtype), []
    for net in (model, half):
        kind = next(net.parameters()).dtype
        data = x.to(kind)
        fitted = fxprune.prune(
            net, data[:1], rate=0.3, data=[data], compensate=True, verify="shapes"
        )
        assert all(p.dtype == kind for p in fitted.parameters())
        with torch.no_grad():
            errors.append(relative(fitted(data), net(data)))
        done = fitted.fxprune.report.compensation
        assert all(0 <= after <= before for before, after in done.fitted.values())
    assert errors[1] < 1.5 * errors[0]


def test_autocast_is_fitted_as_float32_is():
    torch.manual_seed(0)
    model, x = fxprune.models.resnet20().eval(), torch.randn(64, 3, 16, 16)
    errors = []
    for half in (False, True):
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            fitted = fxprune.prune(
                model, x[:1], rate=0.3, data=[x], compensate=True, verify="shapes"
            )
        with torch.no_grad():
            errors.append(relative(fitted(x), model(x)))
        done = fitted.fxprune.report.compensation
        assert all(0 <= after <= before for before, after in done.fitted.values())
    assert errors[1] < 1.5 * errors[0]


def test_errors_are_over_the_variance_however_data_is_batched():
    model, x = constant(nn.ReLU(), True), inputs(2, count=32)
    options = {"criterion": "bn_gamma", "rate": 0.6, "ignore": ["3"]}
    plain = fxprune.prune(model, x[:2], **options)
    with torch.no_grad():
        wanted, (found,) = model[:4](x), outputs_of(plain, "3", x)
        channels = wanted.var((0, 2, 3), correction=0)
        error = (found - wanted).square().mean((0, 2, 3)).sum() / channels.sum()
    for size in (1, 2, 8, 32):
        data = list(x.split(size))
        fitted = fxprune.prune(model, x[:2], data=data, compensate="bias", **options)
        before, after = fitted.fxprune.report.compensation.fitted["3"]
        assert before == pytest.approx(float(error))
        moved = outputs_of(fitted, "3", x)[0] - wanted
        left = moved.square().mean((0, 2, 3)).sum() / channels.sum()
        assert after == pytest.approx(float(left))


def outputs_of(net: nn.Module, name: str, x: Tensor) -> list[Tensor]:
    """What a layer of a network gives."""
    found: list[Tensor] = []
    hook = net.get_submodule(name).register_forward_hook(lambda *each: found.append(each[2]))
    with torch.no_grad():
        net(x)
    hook.remove()
    return found


@pytest.mark.parametrize("count", [1, 8])
def test_errors_of_an_output_that_is_constant_are_of_its_square(count):
    torch.manual_seed(0)
    model, x = nn.Sequential(nn.Linear(3, 8), nn.ReLU(), nn.Linear(8, 4)), torch.randn(1, 3)
    data = [x.expand(count, 3)]
    fitted = fxprune.prune(model, x, rate=0.5, data=data, compensate="bias")
    before, after = fitted.fxprune.report.compensation.fitted["2"]
    with torch.no_grad():
        plain = fxprune.prune(model, x, rate=0.5)(x)
        assert before == pytest.approx(relative(plain, model(x)) ** 2, rel=1e-3)
    assert 0 <= after < 1e-6


@pytest.mark.parametrize("how", ["bias", "least_squares", "statistics"])
def test_data_that_is_not_finite_is_refused(how):
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8, 4)
    ).double().eval()  # fmt: skip
    analysis = fxprune.analyze(model, torch.randn(2, 3, dtype=torch.float64))
    x = 1e200 * torch.randn(4, 3, dtype=torch.float64)  # finite, but no square of it is
    with pytest.raises(InputError, match=r"layer `\w` are not finite on the data") as error:
        fxprune.prune(model, analysis.inputs.args, rate=0.5, data=[x], compensate=how)
    assert "overflow" in str(error.value)


def test_weights_that_overflow_are_not_written():
    """Each of eight equal channels that stay two would have four times its weight."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(3, 8, bias=False), nn.Linear(8, 4, bias=False)).half()
    with torch.no_grad():
        model[0].weight.copy_(0.1 * torch.randn(3))
        model[1].weight.fill_(3e4)
    x = torch.rand(16, 3).half()
    assert model(x).isfinite().all()
    with pytest.raises(InputError, match="layer `1` are not finite"):
        fxprune.prune(model, x[:2], rate=0.75, data=[x], compensate=True, verify="shapes")


@pytest.mark.parametrize(
    ("options", "fault"),
    [
        ({"compensate": True}, "no data"),
        ({"compensate": "all", "data": [torch.zeros(2, 3, 32, 32)]}, "compensate"),
        ({"compensate": True, "data": [torch.zeros(2, 5, 32, 32)]}, "does not run"),
    ],
)
def test_wrong_options(options, fault):
    with pytest.raises(FxpruneError, match=fault):
        fxprune.prune(fxprune.models.resnet20(), torch.zeros(1, 3, 32, 32), **options)
    assert issubclass(OptionError, FxpruneError)


@pytest.mark.parametrize("rows", [24, 48, 60])
@pytest.mark.parametrize("size", [1, 16, 100])
def test_few_rows_do_no_harm(rows, size):
    """Where rows are about as many as columns, a plain fit is off by many times the output."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(200, 64), nn.Tanh(), nn.Linear(64, 20)).eval()
    model[0].weight.data *= 3  # so that no unit can stand in for another
    x, fresh = torch.randn(rows, 200), torch.randn(1000, 200)

    def error(**how) -> float:
        pruned = fxprune.prune(model, x[:2], criterion="l2", rate=0.25, **how)
        with torch.no_grad():
            return float((pruned(fresh) - model(fresh)).square().mean())

    assert error(data=list(x.split(size)), compensate=True) < 1.1 * error()
