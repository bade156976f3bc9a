"""Criteria: every score that ships, beside the number worked out by hand."""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any, Literal

import numpy as np
import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune import criteria, models
from fxprune.analysis import Analysis
from fxprune.criteria import Slices
from fxprune.errors import CriterionError, OptionError

torch.set_num_threads(1)


# -- small layers with weights to count with -------------------------------------------------------


def filled(layer: nn.Module, weight: Sequence) -> nn.Module:
    """A layer with this weight (in the order of its elements), and a bias that would show."""
    with torch.no_grad():
        layer.weight.copy_(torch.tensor(weight, dtype=torch.float32).reshape(layer.weight.shape))
        if getattr(layer, "bias", None) is not None:
            layer.bias.fill_(1000.0)
    return layer


def conv(weight: Sequence[Sequence[float]], **options: Any) -> nn.Conv2d:
    """A 1x1 convolution: one row of numbers a filter."""
    groups = options.get("groups", 1)
    return filled(nn.Conv2d(len(weight[0]) * groups, len(weight), 1, **options), weight)


def norm(gamma: Sequence[float]) -> nn.BatchNorm2d:
    return filled(nn.BatchNorm2d(len(gamma)), gamma)


class Net(nn.Module):
    """Layers by name, and a forward of them."""

    def __init__(self, forward, **layers: nn.Module):
        super().__init__()
        self.layers = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self, x)


def chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def image(channels: int, side: int = 4) -> Tensor:
    return torch.rand(1, channels, side, side)


def scores(model: nn.Module, x: Tensor, criterion: Any, **options: Any) -> list[list[float]]:
    """The scores of all groups that may shrink."""
    made = fxprune.plan(fxprune.analyze(model, x), criterion=criterion, scores=True, **options)
    return [group.scores for group in made.groups if group.scores is not None]


def close(*expected: float) -> Any:
    return pytest.approx(list(expected), rel=1e-6, abs=1e-12)


def seen(model: nn.Module, x: Tensor) -> list[Slices]:
    """What a criterion is given, group by group."""
    found = []

    def look(group: Slices) -> Tensor:
        found.append(group)
        return torch.ones(len(group))

    fxprune.plan(fxprune.analyze(model, x), criterion=look)
    return found


THREE = [[3, -4], [0, 5], [1, -1]]
TAIL = dict(o=nn.Conv2d(3, 2, 1))


# -- norms of filters ------------------------------------------------------------------------------

NORMS = {"l1": (7, 5, 2), "l2": (5, 5, math.sqrt(2)), "linf": (4, 5, 1)}


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_a_convolution(name):
    assert scores(chain(a=conv(THREE), **TAIL), image(2), name) == [close(*NORMS[name])]


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_a_linear_layer(name):
    model = chain(a=filled(nn.Linear(2, 3), THREE), o=nn.Linear(3, 2))
    assert scores(model, torch.rand(1, 2), name) == [close(*NORMS[name])]


@pytest.mark.parametrize("name", NORMS)
def test_norms_of_a_transposed_convolution_run_over_its_dim_1(name):
    layer = filled(nn.ConvTranspose2d(2, 3, 1), [[3, 0, 1], [-4, 5, -1]])
    assert scores(chain(a=layer, **TAIL), image(2), name) == [close(*NORMS[name])]


def test_norms_run_over_the_whole_kernel():
    layer = filled(nn.Conv2d(1, 2, (1, 3)), [[1, -2, 3], [4, 0, -4]])
    assert scores(chain(a=layer, o=nn.Conv2d(2, 1, 1)), image(1), "l1") == [close(6, 8)]


def test_norms_of_a_grouped_convolution():
    model = chain(a=conv([[1, 2], [3, -4], [5, 6], [-7, 8]], groups=2), o=nn.Conv2d(4, 2, 1))
    assert scores(model, image(4), "l1") == [close(3, 7, 11, 15)]


def test_norms_of_a_grouped_transposed_convolution():
    layer = filled(nn.ConvTranspose2d(4, 4, 1, groups=2), [[1, 2], [3, 4], [5, 6], [7, 8]])
    model = chain(a=layer, o=nn.Conv2d(4, 2, 1))
    assert scores(model, image(4), "l1") == [close(1 + 3, 2 + 4, 5 + 7, 6 + 8)]


def test_a_channel_of_several_filters_has_the_norm_of_them_all():
    model = chain(
        a=conv([[n] for n in range(1, 9)]), shuffle=nn.PixelShuffle(2), o=nn.Conv2d(2, 2, 1)
    )
    assert scores(model, image(1), "l1") == [close(1 + 2 + 3 + 4, 5 + 6 + 7 + 8)]
    assert scores(model, image(1), "linf") == [close(4, 8)]


def test_a_depthwise_layer_makes_no_channels_of_its_own():
    depthwise = conv([[100], [1], [1]], groups=3)
    model = chain(a=conv(THREE), d=depthwise, **TAIL)
    assert scores(model, image(2), "l1") == [close(7, 5, 2)]


def test_half_precision_is_scored_in_float32():
    model = chain(a=conv([[60000, 60000], [1, 2]]), o=nn.Conv2d(2, 1, 1)).half()
    with torch.no_grad():
        model.o.weight.zero_()
    assert scores(model, image(2).half(), "l1") == [close(120000, 3)]  # the largest half is 65504


# -- norms of what makes a channel and of what reads it --------------------------------------------


def test_in_out_norm_is_the_norm_of_the_filter_times_that_of_its_readers():
    reader = filled(nn.Conv2d(3, 2, 1), [[3, 1, 0], [4, -1, 0]])
    expected = close(5 * 5, 5 * math.sqrt(2), 0)
    assert scores(chain(a=conv(THREE), o=reader), image(2), "in_out_norm") == [expected]


def read_twice(m: Net, x: Tensor) -> Tensor:
    x = m.a(x) + m.b(x)
    return m.o(x) + m.p(x)


def test_in_out_norm_lays_all_makers_and_all_readers_end_to_end():
    ends = dict(o=conv([[8, 1]]), p=conv([[-6, 0]]))
    model = Net(read_twice, a=conv([[3], [1]]), b=conv([[-4], [0]]), **ends)
    assert scores(model, image(1), "in_out_norm") == [close(5 * 10, 1 * 1)]


def test_in_out_norm_where_no_layer_reads_is_the_norm_of_the_filter():
    model = Net(lambda m, x: m.a(x).sum(1), a=conv(THREE))
    assert scores(model, image(2), "in_out_norm") == [close(5, 5, math.sqrt(2))]


# -- scales of norms -------------------------------------------------------------------------------

GAMMA = [4, -3, 2, 1]
UNIT = [[1], [2], [3], [4]]


def scaled(*norms: nn.Module, weight=UNIT) -> nn.Sequential:
    named = {f"n{i}": each for i, each in enumerate(norms)}
    return chain(a=conv(weight), **named, o=nn.Conv2d(4, 2, 1))


def test_bn_gamma_is_the_size_of_gamma():
    assert scores(scaled(norm(GAMMA)), image(1), "bn_gamma") == [close(4, 3, 2, 1)]


def test_bn_gamma_of_two_norms_in_a_row_is_joined():
    model = scaled(norm(GAMMA), norm([0, 1, 0, -5]))
    assert scores(model, image(1), "bn_gamma") == [close(2, 2, 1, 3)]


@pytest.mark.parametrize("norms", [(), (nn.BatchNorm2d(4, affine=False),)])
def test_bn_gamma_without_a_gamma_is_the_l1_norm(norms):
    assert scores(scaled(*norms), image(1), "bn_gamma") == [close(1, 2, 3, 4)]


def test_bn_gamma_of_a_layer_norm():
    hidden = filled(nn.Linear(1, 3), [[1], [1], [1]])
    model = chain(a=hidden, n=filled(nn.LayerNorm(3), [-2, 0.5, 1]), o=nn.Linear(3, 2))
    assert scores(model, torch.rand(1, 1), "bn_gamma") == [close(2, 0.5, 1)]


# -- shares of the layer ---------------------------------------------------------------------------


def test_ratio_sum_is_the_share_of_all_gammas():
    assert scores(scaled(norm(GAMMA)), image(1), "ratio_sum") == [close(0.4, 0.3, 0.2, 0.1)]


def test_ratio_sum_without_gammas_is_the_share_of_all_l1_norms():
    assert scores(scaled(), image(1), "ratio_sum") == [close(0.1, 0.2, 0.3, 0.4)]


def test_ratio_sum_of_dead_gammas_is_zero():
    assert scores(scaled(norm([0, 0, 0, 0])), image(1), "ratio_sum") == [[0, 0, 0, 0]]


NORMALIZED = {"name": "ratio_sum", "normalize": True}


def test_ratio_sum_normalized_is_the_share_over_the_mean_share():
    assert scores(scaled(norm(GAMMA)), image(1), NORMALIZED) == [close(1.6, 1.2, 0.8, 0.4)]
    assert scores(scaled(), image(1), NORMALIZED) == [close(0.4, 0.8, 1.2, 1.6)]  # L1 norms


def test_ratio_sum_normalized_counts_the_channels_of_the_whole_layer():
    assert scores(parted(), image(1), NORMALIZED) == [close(0.4, 0.8), close(1.2, 1.6)]


def two_norms() -> nn.Module:
    b = filled(nn.Conv2d(4, 2, 1), [1] * 8)
    return chain(a=conv(UNIT), n=norm(GAMMA), b=b, m=norm([3, 1]), o=nn.Conv2d(2, 2, 1))


def gone(model: nn.Module, x: Tensor, **options: Any) -> dict[str, list[int]]:
    kept = fxprune.plan(fxprune.analyze(model, x), **options).kept
    sizes = {name: len(t) for name, t in model.state_dict().items() if name in ("a.bias", "b.bias")}
    return {
        name[0]: sorted({*range(n)} - {*kept.get(name, {0: range(n)})[0]})
        for name, n in sizes.items()
    }


@pytest.mark.parametrize("rho", [0.35, 0.3])  # in floating point, 0.1 + 0.2 is more than 0.3
def test_ratio_sum_read_as_the_sum_of_what_goes(rho):
    """a has shares .4 .3 .2 .1, of which .1 + .2 may go; b's .25 alone"""
    found = gone(two_norms(), image(1), criterion="ratio_sum", rate=rho, select_by="cumulative")
    assert found["a"] == [2, 3]
    assert found["b"] == ([1] if rho >= 0.25 else [])


def test_ratio_sum_read_as_one_cut_through_all_layers():
    """.1 .2 .25 .3 .4 .75: the one at a half is .3, which goes too"""
    found = gone(two_norms(), image(1), criterion="ratio_sum", rate=0.5, select_by="threshold")
    assert found == {"a": [1, 2, 3], "b": [1]}


def halves(m: Net, x: Tensor) -> Tensor:
    left, right = m.a(x).chunk(2, 1)
    return m.o(left) + m.p(right)


def parted(weight=UNIT) -> Net:
    """The channels of one layer, of which two layers read a half each: two groups."""
    return Net(halves, a=conv(weight), o=nn.Conv2d(2, 2, 1), p=nn.Conv2d(2, 2, 1))


def test_ratio_sum_of_a_part_is_its_share_of_the_whole_layer():
    assert scores(parted(), image(1), "ratio_sum") == [close(0.1, 0.2), close(0.3, 0.4)]


def halves_of_norm(m: Net, x: Tensor) -> Tensor:
    left, right = m.n(m.a(x)).chunk(2, 1)
    return m.o(left) + m.p(right)


def test_ratio_sum_of_a_part_of_a_norm_is_its_share_of_the_whole_norm():
    ends = dict(o=nn.Conv2d(2, 2, 1), p=nn.Conv2d(2, 2, 1))
    model = Net(halves_of_norm, a=conv(UNIT), n=norm(GAMMA), **ends)
    assert scores(model, image(1), "ratio_sum") == [close(0.4, 0.3), close(0.2, 0.1)]


def wide_and_narrow() -> nn.Module:
    """Shares .15 .2 .25 .4 of four channels, which are .6 .8 1 1.6 of their mean; .22 .78 of two,
    which are .44 1.56."""
    b = filled(nn.Conv2d(4, 2, 1), [1] * 8)
    ends = dict(m=norm([22, -78]), o=nn.Conv2d(2, 2, 1))
    return chain(a=conv(UNIT), n=norm([3, -4, 5, 8]), b=b, **ends)


@pytest.mark.parametrize(
    ("criterion", "expected"),
    [("ratio_sum", {"a": [0, 1], "b": []}), (NORMALIZED, {"a": [0], "b": [0]})],
)
def test_wide_layers_have_small_shares_but_not_when_normalized(criterion, expected):
    cut = dict(rate=1 / 6, scope="global", select_by="threshold")
    assert gone(wide_and_narrow(), image(1), criterion=criterion, **cut) == expected


SIX = scaled(nn.BatchNorm2d(6), weight=[[1]] * 6)
SIX.o = nn.Conv2d(6, 2, 1)
SIX_ANALYSED = fxprune.analyze(SIX, image(1))


@settings(max_examples=150)
@given(st.lists(st.integers(0, 9), min_size=6, max_size=6), st.floats(0, 0.999))
def test_the_longest_run_of_small_gammas_goes_and_never_all(gammas, rho):
    """counted in fractions; the floor of one channel has nothing to do"""
    total = sum(gammas)
    assume(total)
    sums = [Fraction(sum(sorted(gammas)[:n]), total) for n in range(1, 7)]
    assume(all(abs(each - Fraction(rho)) > 1e-9 for each in sums))
    filled(SIX.n0, gammas)
    made = fxprune.plan(SIX_ANALYSED, criterion="ratio_sum", rate=rho, select_by="cumulative")
    kept = made.kept.get("a.weight", {0: list(range(6))})[0]
    count = sum(each <= rho for each in sums)
    left_out = sorted(range(6), key=lambda i: (gammas[i], i))[:count]
    assert kept == sorted({*range(6)} - {*left_out}) and kept
    assert made.groups[0].reason == ""


def hidden_norms(model: nn.Module) -> dict[str, nn.BatchNorm2d]:
    """Behind the expansions and the head of a Mobile_BLNet; gammas that are not all alike."""
    torch.manual_seed(0)
    found = {}
    for name, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            nn.init.uniform_(module.weight, -1.5, 1.5)
            if name.endswith("expand.bn") or name == "head.bn":
                found[name] = module
    return found


def small_shares(gammas: list[np.ndarray], rate: float) -> list[np.ndarray]:
    return [np.cumsum(np.sort(g) / g.sum()) > rate for g in gammas]


def small_over_all(gammas: list[np.ndarray], rate: float) -> list[np.ndarray]:
    shares = [np.sort(g) * len(g) / g.sum() for g in gammas]
    every = np.sort(np.concatenate(shares))
    return [share > every[int(len(every) * rate)] for share in shares]


@pytest.mark.parametrize(
    ("variant", "rate", "kept"), [("cumulative", 0.2, small_shares), ("share", 0.5, small_over_all)]
)
def test_both_readings_prune_the_hidden_channels_of_mobile_blnet(variant, rate, kept):
    model = models.mobile_blnet()
    norms = hidden_norms(model)
    pruned = fxprune.prune(model, image(3, 16), recipe=f"mobile_blnet_ratio_sum:{variant}")
    gammas = [n.weight.detach().double().abs().numpy() for n in norms.values()]
    widths = [int(each.sum()) for each in kept(gammas, rate)]
    assert [pruned.get_submodule(name).num_features for name in norms] == widths
    for name in ("stem.bn", "bl1.widen.bn", "bl2.fusion.project.bn", "tail.0.project.bn"):
        assert pruned.get_submodule(name).num_features == model.get_submodule(name).num_features
    assert pruned.fxprune.report.verification.difference is not None


def test_geometric_median_sums_the_distances_to_the_others():
    points = conv([[0, 0], [3, 4], [6, 8]])  # 5 apart each
    assert scores(chain(a=points, **TAIL), image(2), "geometric_median") == [close(15, 10, 15)]


def test_geometric_median_of_a_part_counts_the_whole_layer():
    expected = [close(1 + 3 + 6, 1 + 2 + 5), close(3 + 2 + 3, 6 + 5 + 3)]
    assert scores(parted([[0], [1], [3], [6]]), image(1), "geometric_median") == expected


def test_geometric_median_of_channels_of_several_filters_compares_whole_channels():
    rows = [[0], [0], [0], [0], [1], [1], [1], [1], [3], [3], [3], [3]]
    model = chain(a=conv(rows), shuffle=nn.PixelShuffle(2), **TAIL)
    assert scores(model, image(1), "geometric_median") == [close(2 + 6, 2 + 4, 6 + 4)]


def test_geometric_median_of_equal_filters_is_zero():
    model = chain(a=conv([[1, 2], [1, 2], [1, 2]]), **TAIL)
    assert scores(model, image(2), "geometric_median") == [[0, 0, 0]]


def test_lamp_divides_by_what_is_not_smaller():
    model = chain(a=conv([[2], [1], [-3]]), **TAIL)
    assert scores(model, image(1), "lamp") == [close(4 / (4 + 9), 1 / (1 + 4 + 9), 9 / 9)]


def test_lamp_of_equal_filters_is_equal():
    model = chain(a=conv([[2], [1], [2]]), **TAIL)
    assert scores(model, image(1), "lamp") == [close(4 / 8, 1 / 9, 4 / 8)]


def test_lamp_of_a_part_counts_the_whole_layer():
    expected = [close(1 / 30, 4 / 29), close(9 / 25, 16 / 16)]
    assert scores(parted(), image(1), "lamp") == expected


def test_lamp_of_channels_of_several_filters():
    rows = [[1], [0], [0], [0], [0], [1], [1], [0], [2], [0], [0], [0]]
    model = chain(a=conv(rows), shuffle=nn.PixelShuffle(2), **TAIL)
    assert scores(model, image(1), "lamp") == [close(1 / 7, 2 / 6, 4 / 4)]


def test_lamp_of_dead_filters_is_zero():
    assert scores(chain(a=conv([[0], [0], [0]]), **TAIL), image(1), "lamp") == [[0, 0, 0]]


@pytest.mark.parametrize("name", ["ratio_sum", "lamp"])
def test_shares_do_not_depend_on_the_scale_of_the_layer(name):
    ours, tenfold = (scores(scaled(weight=[[k], [2 * k], [3 * k], [4 * k]]), image(1), name)
                     for k in (1, 10))  # fmt: skip
    assert ours == [close(*tenfold[0])]


# -- how many of a filter's weights are large ------------------------------------------------------

LARGE = [[9, 1, -1, 1], [9, -9, 1, 1], [9, 9, 9, -9]]  # 1, 2, 4 of 4 above the mean of 68 / 12
BELOW = {"name": "sparsity", "side": "below"}


def test_sparsity_is_the_share_of_weights_above_the_mean_of_the_layer():
    assert scores(chain(a=conv(LARGE), **TAIL), image(4), "sparsity") == [[0.25, 0.5, 1]]


def test_sparsity_below_is_the_complement():
    assert scores(chain(a=conv(LARGE), **TAIL), image(4), BELOW) == [[0.75, 0.5, 0]]


@pytest.mark.parametrize(
    ("side", "expected"), [("above", [0, 0.25, 0.5]), ("below", [0, 0.5, 0.25])]
)
def test_a_weight_of_exactly_the_mean_is_on_neither_side(side, expected):
    model = chain(a=conv([[2, -2, 2, 2], [2, 1, 1, -3], [3, -3, 1, 2]]), **TAIL)
    assert scores(model, image(4), {"name": "sparsity", "side": side}) == [expected]


def test_a_shrunken_filter_has_no_weight_above_the_mean():
    torch.manual_seed(0)
    layer = nn.Conv2d(112, 8, 1)
    with torch.no_grad():
        layer.weight[5] *= 1e-9
    model = chain(a=layer, o=nn.Conv2d(8, 2, 1))
    above, below = (scores(model, image(112, 2), which)[0] for which in ("sparsity", BELOW))
    assert above.index(0) == 5 == below.index(1) and min(above[:5] + above[6:]) > 0.2


def test_the_filter_with_the_fewest_large_weights_goes_first():
    made = fxprune.plan(
        fxprune.analyze(chain(a=conv(LARGE), **TAIL), image(4)), criterion="sparsity", rate=0.34
    )
    assert made.kept["a.weight"] == {0: [1, 2]}


FAN_IN = {
    "pointwise over 112": (nn.Conv2d(112, 40, 1), 112),
    "pointwise over 160": (nn.Conv2d(160, 30, 1), 160),
    "3x3": (nn.Conv2d(6, 20, 3), 54),
    "linear": (nn.Linear(7, 9), 7),
    "two blocks": (nn.Conv2d(6, 8, 1, groups=2), 3),
    "transposed": (nn.ConvTranspose2d(5, 8, (1, 2)), 10),
}


@pytest.mark.parametrize("name", FAN_IN)
def test_sparsity_is_a_count_over_the_fan_in(name):
    layer, fan_in = FAN_IN[name]
    torch.manual_seed(3)
    nn.init.normal_(layer.weight)
    weight = layer.weight.detach()
    if isinstance(layer, nn.ConvTranspose2d):
        weight = weight.transpose(0, 1)
    rows = weight.flatten(1).abs().tolist()
    mean = math.fsum(map(math.fsum, rows)) / (len(rows) * fan_in)
    linear = isinstance(layer, nn.Linear)
    x = torch.rand(1, 7) if linear else image(layer.in_channels)
    last = nn.Linear(len(rows), 2) if linear else nn.Conv2d(len(rows), 2, 1)
    found = scores(chain(a=layer, o=last), x, "sparsity")[0]
    assert len(rows[0]) == fan_in
    assert found == close(*(sum(w > mean for w in row) / fan_in for row in rows))
    assert len(set(found)) > 2


def test_sparsity_takes_the_mean_of_the_whole_layer_also_in_a_part():
    """3.5; the left half's own would be 1.5, which its second filter is above"""
    assert scores(parted([[1], [2], [3], [8]]), image(1), "sparsity") == [[0, 0], [0, 1]]


def test_sparsity_takes_the_mean_of_all_blocks_of_a_grouped_convolution():
    model = chain(a=conv([[1, 2], [3, -4], [5, 4], [-7, 8]], groups=2), o=nn.Conv2d(4, 2, 1))
    assert scores(model, image(4), "sparsity") == [[0, 0, 0.5, 1]]  # 34 / 8


def test_sparsity_of_coupled_layers_has_a_mean_for_each():
    model = coupled(conv([[1, 3, 4], [1, 1, 2]]), conv([[60, 60, 10], [40, 90, -90]]))
    found = [scores(model, image(3), "sparsity", reduce=how)[0] for how in ("first", "mean")]
    left, right = (2 / 3, 0), (2 / 3, 2 / 3)  # 12 / 6 and 350 / 6; the 2 is exactly the mean
    assert found[0] == close(*left)
    assert found[1] == close(*((a + b) / 2 for a, b in zip(left, right, strict=True)))


def test_sparsity_of_a_channel_of_several_filters_counts_them_all():
    rows = [[9], [1], [-1], [1], [9], [-9], [1], [1]]
    model = chain(a=conv(rows), shuffle=nn.PixelShuffle(2), o=nn.Conv2d(2, 2, 1))
    assert scores(model, image(1), "sparsity") == [[0.25, 0.5]]


# -- times gamma -----------------------------------------------------------------------------------


def with_gammas(gammas: Sequence[float], rows: Sequence[Sequence[float]] = LARGE) -> nn.Module:
    return chain(a=conv(rows), n=norm(gammas), o=nn.Conv2d(len(rows), 2, 1))


def first_to_go(model: nn.Module, criterion: Any) -> int:
    (found,) = scores(model, image(4), criterion)
    return found.index(min(found))


def test_sparsity_gamma_is_the_product():
    expected = [close(0.25 * 8, 0.5 * 3, 1 * 2)]
    assert scores(with_gammas([8, -3, 2]), image(4), "sparsity_gamma") == expected


def test_the_product_may_decide_against_both_its_factors():
    model = with_gammas([10, 2, -1.5])
    assert first_to_go(model, "sparsity") == 0
    assert first_to_go(model, "bn_gamma") == 2
    assert first_to_go(model, "sparsity_gamma") == 1  # 2.5, 1 and 1.5


@pytest.mark.parametrize(("gammas", "gone"), [((3, 1), 1), ((1.5, -1), 0)])
def test_of_two_filters_the_smaller_product_goes(gammas, gone):
    """.5 and 1 of the weights are large: gamma alone would take the second in both cases, the
    sparse value alone the first"""
    model = with_gammas(gammas, [[9, 9, 1, 1], [9, 9, 9, 9]])
    assert first_to_go(model, "sparsity_gamma") == gone
    assert (first_to_go(model, "bn_gamma"), first_to_go(model, "sparsity")) == (1, 0)


def test_sparsity_gamma_below():
    which = {"name": "sparsity_gamma", "side": "below"}
    assert scores(with_gammas([8, -3, 2]), image(4), which) == [close(0.75 * 8, 0.5 * 3, 0)]


def test_l1_gamma_is_the_product_of_norm_and_gamma():
    expected = [close(12 * 0.5, 20 * 2, 36 * 0)]
    assert scores(with_gammas([-0.5, 2, 0]), image(4), "l1_gamma") == expected


@pytest.mark.parametrize("name", ["sparsity_gamma", "l1_gamma"])
def test_the_sign_of_gamma_is_nothing(name):
    ours, theirs = (with_gammas([8, 3 * sign, 2 * sign]) for sign in (1, -1))
    assert scores(ours, image(4), name) == scores(theirs, image(4), name)


@pytest.mark.parametrize("norms", [(), (nn.BatchNorm2d(3, affine=False),)])
@pytest.mark.parametrize(
    ("name", "expected"), [("sparsity_gamma", [0.25, 0.5, 1]), ("l1_gamma", [12, 20, 36])]
)
def test_without_a_gamma_the_product_is_its_other_factor(name, expected, norms):
    named = {f"n{i}": each for i, each in enumerate(norms)}
    model = chain(a=conv(LARGE), **named, o=nn.Conv2d(3, 2, 1))
    assert scores(model, image(4), name) == [close(*expected)]


def in_turn(m: Net, x: Tensor) -> Tensor:
    return m.o(m.n(m.a(x)) + m.b(x) + m.q(m.c(x)))


def test_each_coupled_layer_is_multiplied_with_the_norm_right_behind_it():
    layers = dict(a=conv([[1], [2]]), n=norm([5, -6]), b=conv([[3], [4]]))
    model = Net(in_turn, **layers, c=conv([[7], [9]]), q=norm([0.5, 2]), o=nn.Conv2d(2, 2, 1))
    (group,) = seen(model, image(1))
    assert [gammas.tolist() for gammas in group.gammas] == [[5, 6], [1, 1], [0.5, 2]]
    found = scores(model, image(1), "l1_gamma", reduce="sum")
    assert found == [close(1 * 5 + 3 + 7 * 0.5, 2 * 6 + 4 + 9 * 2)]


def gate(m: Net, x: Tensor) -> Tensor:
    x = m.m(m.d(m.n(m.e(x))))
    return m.o(x * torch.sigmoid(m.g(torch.relu(m.f(x.mean((2, 3), keepdim=True))))))


def inverted_residual(behind: nn.Module) -> Net:
    """An expansion with `behind` it, a depthwise layer and a norm whose numbers would show, and a
    gate that makes the same channels. Of two weights a filter, 1 2 0 are above the expansion's mean
    of 2, and 1 0 2 above the gate's of 3."""
    own = dict(e=conv([[3, 1], [3, -3], [1, 1]]), n=behind)
    deep = dict(d=conv([[7], [8], [9]], groups=3), m=norm([100, 200, 300]))
    gates = dict(f=nn.Conv2d(3, 2, 1), g=conv([[5, 1], [1, 1], [5, -5]]))
    return Net(gate, **own, **deep, **gates, o=nn.Conv2d(3, 2, 1))


BEHIND = {"a norm": (norm([-4, 1, 9]), (4, 1, 9)), "nothing": (nn.Identity(), (1, 1, 1))}


@pytest.mark.parametrize("behind", BEHIND)
def test_an_expansion_goes_with_its_own_norm_not_with_that_of_the_depthwise_layer(behind):
    layer, gamma = BEHIND[behind]
    model = inverted_residual(layer)
    share = scores(model, image(2), "sparsity_gamma", reduce="first")[0]
    norms = scores(model, image(2), "l1_gamma", reduce="first")[0]
    assert share == close(0.5 * gamma[0], 1 * gamma[1], 0)
    assert norms == close(4 * gamma[0], 6 * gamma[1], 2 * gamma[2])


def test_the_gate_has_no_norm_and_is_joined_as_it_is():
    model = inverted_residual(norm([-4, 1, 9]))
    mean = scores(model, image(2), "sparsity_gamma", reduce="mean")[0]
    assert mean == close((0.5 * 4 + 0.5) / 2, (1 * 1 + 0) / 2, (0 + 1) / 2)


# -- the rule of Network Slimming ------------------------------------------------------------------


def slimming_mobilenet() -> nn.Module:
    """MobileNetV3-Large with gammas that all differ, none of them small."""
    torch.manual_seed(0)
    model = models.mobilenet_v3_large()
    for _, gamma in expansions(model):
        nn.init.uniform_(gamma, 0.5, 1.5)
    return model


def expansions(model: nn.Module) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Weight and gamma of the expansion of each block."""
    blocks = [each.block[0] for each in list(model.features)[1:16]]
    return [(block[0].weight, block[1].weight) for block in blocks]


def importances(model: nn.Module) -> list[np.ndarray]:
    """Sparse value times |gamma|, block by block."""
    found = []
    for weight, gamma in expansions(model):
        size = weight.detach().double().flatten(1).abs().numpy()
        found.append((size > size.mean()).mean(1) * gamma.detach().double().abs().numpy())
    return found


def kept_of(made: fxprune.Plan, model: nn.Module) -> list[list[int]]:
    """What the plan keeps of each expansion."""
    sizes = [len(gamma) for _, gamma in expansions(model)]
    names = [f"features.{i}.block.0.0.weight" for i in range(1, 16)]
    found = (made.kept.get(name, {}).get(0) for name in names)
    return [[*range(n)] if each is None else each for n, each in zip(sizes, found, strict=True)]


@pytest.fixture(scope="module")
def slimming() -> tuple[nn.Module, Analysis, list[np.ndarray]]:
    model = slimming_mobilenet()
    return model, fxprune.analyze(model, image(3, 64)), importances(model)


RECIPE = "mobilenetv3_sparsity_gamma"


@pytest.mark.parametrize(
    ("rate", "left"),
    [(0.1, 4514), (0.2, 4012), (0.3, 3511), (0.4, 3009), (0.5, 2507), (0.6, 2006)],
)
def test_the_recipe_keeps_what_is_strictly_above_one_cut_through_all_blocks(slimming, rate, left):
    model, analysis, values = slimming
    every = np.sort(np.concatenate(values))
    cut = every[int(len(every) * rate)]
    assert len(every) == len(set(every)) == 5016
    kept = kept_of(fxprune.plan(analysis, recipe=RECIPE, rate=rate), model)
    assert kept == [np.flatnonzero(each > cut).tolist() for each in values]
    assert sum(map(len, kept)) == left and min(map(len, kept)) > 1  # no floor had to help


def test_a_block_that_would_be_emptied_keeps_its_best_channel():
    model = slimming_mobilenet()
    with torch.no_grad():
        expansions(model)[2][1].mul_(1e-6)
    values = importances(model)
    pruned = fxprune.prune(model, image(3, 64), recipe=RECIPE)
    kept = kept_of(pruned.fxprune.plan, model)
    cut = np.sort(np.concatenate(values))[2508]
    assert kept[2] == [int(values[2].argmax())] and values[2].max() < cut
    assert kept[:2] + kept[3:] == [
        np.flatnonzero(each > cut).tolist() for each in values[:2] + values[3:]
    ]
    assert sum(map(len, kept)) == 2507 + 1
    (row,) = [
        row for row in pruned.fxprune.report.shortfalls() if row.name == "features.3.block.0.0"
    ]
    assert row.kept == 1 and "min_channels=1" in row.reason
    assert pruned.fxprune.report.verification.difference is not None


def test_products_that_tie_at_the_cut_all_go():
    """.5 * 4 and 1 * 2 tie; sorted 0 2 2 5, and the one at a quarter is 2"""
    rows = [[9, -1], [9, 9], [1, 1], [9, -9]]
    model = with_gammas([4, -2, 7, 5], rows)
    found = gone(model, image(2), criterion="sparsity_gamma", rate=0.25, select_by="threshold")
    assert found == {"a": [0, 1, 2]}


# -- random ----------------------------------------------------------------------------------------


def test_random_is_seeded_by_the_name_of_the_group():
    model = chain(first=conv(THREE), second=nn.Conv2d(3, 4, 1), o=nn.Conv2d(4, 2, 1))
    for name, found in zip(("first", "second"), scores(model, image(2), "random"), strict=True):
        generator = torch.Generator().manual_seed(zlib.crc32(name.encode()))
        assert found == torch.rand(len(found), generator=generator).tolist()


def test_random_asks_nothing_of_weights_and_of_the_global_seed():
    torch.manual_seed(1)
    before = scores(chain(a=conv(THREE), **TAIL), image(2), "random")
    torch.manual_seed(2)
    others = conv([[9, 9], [0, 0], [1, 1]])
    assert scores(chain(a=others, **TAIL), image(2), "random") == before


def test_random_leaves_the_global_generator_alone():
    model, x = chain(a=conv(THREE), **TAIL), image(2)
    state = torch.get_rng_state()
    scores(model, x, "random")
    assert torch.equal(torch.get_rng_state(), state)


# -- coupled layers --------------------------------------------------------------------------------


def sum_of_two(m: Net, x: Tensor) -> Tensor:
    return m.o(m.a(x) + m.b(x))


def coupled(left, right) -> Net:
    return Net(sum_of_two, a=left, b=right, o=nn.Conv2d(2, 2, 1))


REDUCED = {"mean": (2, 1.5), "sum": (4, 3), "max": (3, 2), "first": (1, 2)}


@pytest.mark.parametrize("reduce", REDUCED)
def test_scores_of_coupled_layers_are_joined(reduce):
    model = coupled(conv([[1], [-2]]), conv([[3], [1]]))
    assert scores(model, image(1), "l1", reduce=reduce) == [close(*REDUCED[reduce])]


def test_the_mean_is_the_default():
    model = coupled(conv([[1], [-2]]), conv([[3], [1]]))
    assert scores(model, image(1), "l1") == scores(model, image(1), "l1", reduce="mean")


def test_each_coupled_layer_is_weighed_against_itself():
    model = coupled(conv([[1], [3]]), conv([[60], [40]]))
    expected = [close((0.25 + 0.6) / 2, (0.75 + 0.4) / 2)]
    assert scores(model, image(1), "ratio_sum") == expected


def test_coupled_layers_of_different_kinds():
    transposed = filled(nn.ConvTranspose2d(1, 2, 1), [[5, 6]])
    assert scores(coupled(conv([[1], [2]]), transposed), image(1), "l1") == [close(3, 4)]


def test_one_tensor_of_scores_is_not_joined():
    model = coupled(conv([[1], [2]]), conv([[3], [4]]))
    found = scores(model, image(1), lambda group: torch.tensor([5.0, 6.0]), reduce="sum")
    assert found == [[5, 6]]


# -- what a criterion sees -------------------------------------------------------------------------


def test_filters_and_scales_have_the_channels_first():
    (group,) = seen(scaled(norm(GAMMA)), image(1))
    assert [f.tolist() for f in group.filters] == [UNIT]
    assert [s.tolist() for s in group.scales] == [[4, 3, 2, 1]]
    assert group.layers[0].tolist() == UNIT and group.all_scales[0].tolist() == [4, 3, 2, 1]


def test_a_part_of_a_layer_sees_itself_and_the_whole():
    left, right = seen(parted(), image(1))
    assert left.filters[0].tolist() == [[1], [2]] and right.filters[0].tolist() == [[3], [4]]
    assert left.layers[0].tolist() == right.layers[0].tolist() == UNIT


def test_consumers_are_the_columns_that_read_a_channel():
    reader = filled(nn.Conv2d(3, 2, 1), [[1, 2, 3], [4, 5, 6]])
    (group,) = seen(chain(a=conv(THREE), o=reader), image(2))
    assert [c.tolist() for c in group.consumers] == [[[1, 4], [2, 5], [3, 6]]]


def test_consumers_after_a_flatten_are_whole_blocks_of_columns():
    reader = filled(nn.Linear(8, 2), list(range(16)))
    model = chain(a=conv([[1], [2]]), flat=nn.Flatten(), o=reader)
    (group,) = seen(model, image(1, 2))
    table = torch.arange(16.0).reshape(2, 2, 4)  # (units, channels, pixels)
    for channel, read in enumerate(group.consumers[0]):
        assert sorted(read.tolist()) == sorted(table[:, channel].reshape(-1).tolist())


def test_consumers_of_a_grouped_convolution_are_read_in_their_block():
    reader = conv([[1, 2], [3, 4], [5, 6], [7, 8]], groups=2)
    group, _ = seen(chain(a=conv(UNIT), g=reader, o=nn.Conv2d(4, 2, 1)), image(1))
    assert [c.tolist() for c in group.consumers] == [[[1, 3], [2, 4], [5, 7], [6, 8]]]


def test_consumers_of_a_transposed_convolution_are_its_dim_0():
    reader = filled(nn.ConvTranspose2d(3, 2, 1), [[1, 2], [3, 4], [5, 6]])
    (group,) = seen(chain(a=conv(THREE), o=reader), image(2))
    assert [c.tolist() for c in group.consumers] == [[[1, 2], [3, 4], [5, 6]]]


def test_where_nothing_normalises_there_are_no_scales():
    (group,) = seen(scaled(), image(1))
    assert group.scales == [] == group.all_scales


def test_a_group_says_its_name_size_seed_and_all_tensors():
    model = chain(a=conv(THREE), **TAIL)
    (group,) = seen(model, image(2))
    assert (group.group.name, len(group), group.seed) == ("a", 3, zlib.crc32(b"a"))
    assert group.tensors.keys() == model.state_dict().keys()


def test_criteria_run_without_gradients():
    tracked = []

    def look(group: Slices) -> Tensor:
        found = group.filters[0].sum(1) * group.tensors["a.weight"].sum()
        tracked.append((torch.is_grad_enabled(), found.requires_grad))
        return found

    scores(chain(a=conv(THREE), **TAIL), image(2), look)
    assert tracked == [(False, False)]


# -- criteria of one's own -------------------------------------------------------------------------


def first_weight(group: Slices) -> list[Tensor]:
    return [filters[:, 0] for filters in group.filters]


def test_a_function_is_a_criterion():
    made = fxprune.plan(
        fxprune.analyze(chain(a=conv(THREE), **TAIL), image(2)),
        criterion=first_weight,
        rate=0.4,
        scores=True,
    )
    assert made.criterion == "first_weight"
    assert made.groups[0].scores == [3, 0, 1] and made.kept["a.weight"] == {0: [0, 2]}


def test_a_registered_function_has_a_name(monkeypatch):
    monkeypatch.setattr(criteria, "_known", dict(criteria._known))
    assert fxprune.criterion("first weight")(first_weight) is first_weight
    assert "first weight" in criteria.names()
    assert scores(chain(a=conv(THREE), **TAIL), image(2), "first weight") == [[3, 0, 1]]


def test_an_object_that_can_be_called_is_a_criterion():
    class Weighted:
        def __call__(self, group: Slices) -> Tensor:
            return 2 * group.filters[0][:, 0]

    assert scores(chain(a=conv(THREE), **TAIL), image(2), Weighted()) == [[6, 0, 2]]


@pytest.mark.parametrize("kind", [torch.int64, torch.float16, torch.bool])
def test_scores_may_be_of_any_type(kind):
    found = scores(scaled(), image(1), lambda group: torch.tensor([0, 1, 1, 0]).to(kind))
    assert found == [[0, 1, 1, 0]]


def test_scores_may_be_negative():
    model = chain(a=conv([[1], [2], [-5]]), **TAIL)
    made = fxprune.plan(fxprune.analyze(model, image(1)), criterion=first_weight, rate=0.34)
    assert made.kept["a.weight"] == {0: [0, 1]}


# -- options of criteria ---------------------------------------------------------------------------


def described(which: Any) -> str:
    """How a plan names the criterion it was made by."""
    model = chain(a=conv(THREE), **TAIL)
    return fxprune.plan(fxprune.analyze(model, image(2)), criterion=which).criterion


@pytest.mark.parametrize(
    ("which", "text"),
    [
        ("sparsity", "sparsity"),
        ({"name": "sparsity"}, "sparsity"),
        ({"name": "sparsity", "side": "below"}, "sparsity(side=below)"),
        ({"name": "ratio_sum", "normalize": True}, "ratio_sum(normalize=True)"),
        (
            {"name": "distribution_fit", "norm": 1, "redundancy": None},
            "distribution_fit(norm=1, redundancy=None)",
        ),
    ],
)
def test_the_plan_names_criterion_and_options(which, text):
    assert described(which) == text


def test_the_default_may_be_given_too():
    model = chain(a=conv(LARGE), **TAIL)
    above = scores(model, image(4), {"name": "sparsity", "side": "above"})
    assert above == scores(model, image(4), "sparsity") != scores(model, image(4), BELOW)


def test_options_may_be_any_mapping_and_are_not_remembered():
    class Given(Mapping):
        held = {"name": "sparsity", "side": "below"}

        def __getitem__(self, key):
            return self.held[key]

        def __iter__(self):
            return iter(self.held)

        def __len__(self):
            return len(self.held)

    assert described(Given()) == "sparsity(side=below)" and described("sparsity") == "sparsity"
    assert Given.held == {"name": "sparsity", "side": "below"}


@pytest.fixture
def registry(monkeypatch) -> None:
    """What a test registers is gone after it."""
    monkeypatch.setattr(criteria, "_known", dict(criteria._known))


def power(group: Slices, *, to: float = 1.0, of: Literal["first", "last"] = "first", plus=0):
    column = 0 if of == "first" else -1
    return [filters[:, column].abs() ** to + plus for filters in group.filters]


@pytest.mark.parametrize(
    ("options", "expected"),
    [({}, (3, 0, 1)), ({"to": 2}, (9, 0, 1)), ({"of": "last", "plus": 0.5}, (4.5, 5.5, 1.5))],
)
def test_a_criterion_of_ones_own_has_options_too(registry, options, expected):
    fxprune.criterion("power")(power)
    for name in ("power", power):
        found = scores(chain(a=conv(THREE), **TAIL), image(2), {"name": name, **options})
        assert found == [close(*expected)]


def refusal(which: Any) -> OptionError:
    with pytest.raises(OptionError) as caught:
        fxprune.prune(chain(a=conv(THREE), **TAIL), image(2), criterion=which)
    return caught.value


@pytest.mark.parametrize(
    ("which", "fault", "known", "hint"),
    [
        (
            {"name": "sparsity", "sides": "below"},
            "criterion `sparsity` has no option `sides`",
            "side",
            "did you mean `side`?",
        ),
        (
            {"name": "distribution_fit", "redundant": None},
            "criterion `distribution_fit` has no option `redundant`",
            "redundancy, fit, norm",
            "did you mean `redundancy`?",
        ),
        ({"name": "l1", "side": "below"}, "criterion `l1` has no option `side`", "it has none", ""),
        ({"name": "l1", "group": 3}, "criterion `l1` has no option `group`", "it has none", ""),
        (
            {"name": "distribution_fit", "keep": 3},
            "criterion `distribution_fit` has no option `keep`",
            "redundancy, fit, norm",
            "",
        ),
    ],
)
def test_an_option_that_a_criterion_does_not_have(which, fault, known, hint):
    error = refusal(which)
    assert (error.fault, error.details, error.hint) == (fault, [("known", known)], hint)


@pytest.mark.parametrize(
    ("which", "fault", "allowed"),
    [
        ({"name": "sparsity", "side": "sideways"}, "`sparsity` option side='sideways'", "'below'"),
        ({"name": "sparsity_gamma", "side": 1}, "`sparsity_gamma` option side=1", "'above'"),
        ({"name": "distribution_fit", "norm": 3}, "`distribution_fit` option norm=3", "1 or 2"),
        ({"name": "distribution_fit", "norm": "2"}, "option norm='2'", "1 or 2"),
        ({"name": "distribution_fit", "fit": None}, "option fit=None", "'gaussian'"),
        ({"name": "distribution_fit", "redundancy": "fpgm"}, "redundancy='fpgm'", "median"),
        ({"name": "ratio_sum", "normalize": "yes"}, "option normalize='yes'", "boolean"),
        ({"name": "ratio_sum", "normalize": 1}, "option normalize=1", "boolean"),
    ],
)
def test_an_option_with_a_value_it_cannot_have(which, fault, allowed):
    error = refusal(which)
    assert fault in error.fault and allowed in error.fault


def test_a_value_that_ones_own_criterion_cannot_have(registry):
    fxprune.criterion("power")(power)
    assert "`power` option to='2'" in refusal({"name": "power", "to": "2"}).fault
    assert "`power` option of='middle'" in refusal({"name": "power", "of": "middle"}).fault


@pytest.mark.parametrize("which", [{}, {"side": "below"}])
def test_options_of_nothing(which):
    error = refusal(which)
    assert error.fault == "criterion has no `name`" and '"name": "sparsity"' in error.hint


def test_options_of_a_criterion_that_is_not_known():
    error = refusal({"name": "sparsty", "side": "below"})
    assert error.fault == "no criterion `sparsty`"
    assert error.hint == "did you mean `sparsity`?"
    assert refusal({"name": 3}).fault == "criterion is a int"


# -- criteria that fail ----------------------------------------------------------------------------


def failure(function) -> CriterionError:
    model = chain(a=conv(THREE), n=nn.BatchNorm2d(3), **TAIL)
    with pytest.raises(CriterionError) as caught:
        fxprune.prune(model, image(2), criterion=function)
    assert "criterion `wrong`" in caught.value.fault and "group a" in caught.value.fault
    assert f"\n\nhint: {caught.value.hint}" in str(caught.value)
    return caught.value


@pytest.mark.parametrize(
    ("give", "shown"),
    [
        (lambda g: torch.ones(4), "(4,)"),
        (lambda g: g.filters[0], "(3, 2)"),
        (lambda g: torch.tensor(1.0), "()"),
        (lambda g: [torch.ones(3), torch.ones(2)], "(2,)"),
        (lambda g: 1.0, "float"),
        (lambda g: None, "NoneType"),
        (lambda g: [1.0, 2.0, 3.0], "float"),
    ],
)
def test_scores_of_a_wrong_shape(give, shown):
    def wrong(group: Slices):
        return give(group)

    error = failure(wrong)
    assert error.fault == f"criterion `wrong` gave {shown} for group a of 3 channels"
    assert error.hint == "return one score a channel: shape (3,), or a list of those"


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_scores_that_are_not_finite(value):
    def wrong(group: Slices):
        return torch.tensor([1.0, value, 1.0])

    error = failure(wrong)
    assert error.fault == f"criterion `wrong` gave {value} for channel 1 of group a"
    assert "division by zero" in error.hint


def test_no_scores_at_all():
    def wrong(group: Slices):
        return []

    error = failure(wrong)
    assert error.fault == "criterion `wrong` gave no scores for group a"
    assert "group.scales is empty where nothing normalises" in error.hint


def test_a_criterion_that_raises():
    def wrong(group: Slices):
        return group.gamma

    error = failure(wrong)
    assert "fails on group a: AttributeError: 'Slices' object has no" in error.fault
    assert error.details[0][0] == "members" and "a.weight[0], a.bias[0]" in error.details[0][1]
    assert ".filters, .scales, .layers, .consumers" in error.hint
    assert isinstance(error.__cause__, AttributeError)


def test_a_failing_criterion_leaves_the_model_alone():
    model = chain(a=conv(THREE), **TAIL)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with pytest.raises(CriterionError):
        fxprune.prune(model, image(2), criterion=lambda group: torch.ones(1))
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


# -- where a filter's gamma is, and whose share counts ---------------------------------------------


def test_a_filters_gamma_is_found_along_the_graph_not_in_the_order_of_calls():
    def late(m, x):
        left, right = m.a(x), m.b(x)
        return m.o(m.n(left) + m.p(right))

    def joint(m, x):
        return m.o(m.n(m.a(x) + m.b(x)))

    layers = {"a": conv([[1], [2]]), "b": conv([[3], [4]]), "o": nn.Conv2d(2, 2, 1)}
    model = Net(late, **layers, n=norm([5, 6]), p=norm([7, 8]))
    assert [g.tolist() for g in seen(model, image(1))[0].gammas] == [[5, 6], [7, 8]]
    model = Net(joint, **layers, n=norm([5, 6]))
    assert [g.tolist() for g in seen(model, image(1))[0].gammas] == [[5, 6], [5, 6]]


def test_gammas_lie_where_the_filters_do():
    (group,) = seen(scaled(), image(1))
    away = Slices(group.group, {k: t.to("meta") for k, t in group.tensors.items()})
    assert away.gammas[0].device.type == "meta"


@pytest.mark.parametrize("value", [0.1, 0.3, 0.7])
@pytest.mark.parametrize("side", ["above", "below"])
def test_equal_weights_are_on_neither_side(value, side):
    model = chain(a=conv([[value] * 24] * 144), o=nn.Conv2d(144, 2, 1))
    assert set(scores(model, image(24), {"name": "sparsity", "side": side})[0]) == {0}


def test_an_option_may_be_a_tensor(monkeypatch):
    def weighed(group: Slices, *, by: Tensor) -> Tensor:
        return group.filters[0] @ by

    monkeypatch.setattr(criteria, "_known", dict(criteria._known))
    fxprune.criterion("weighed")(weighed)
    which = {"name": "weighed", "by": torch.tensor([1.0, 0.0])}
    model = chain(a=conv([[3, 1], [0, 2], [1, 5]]), o=nn.Conv2d(3, 2, 1))
    assert scores(model, image(2), which) == [[3, 0, 1]]


def test_normalized_shares_have_mean_1_also_of_several_filters():
    which = {"name": "ratio_sum", "normalize": True}
    layers = {"s": nn.PixelShuffle(2), "o": nn.Conv2d(2, 2, 1)}
    model = chain(a=conv([[1]] * 8), n=norm([1] * 8), **layers)
    assert scores(model, image(1), which) == [close(1, 1)]
    assert scores(chain(a=conv([[1]] * 8), **layers), image(1), which) == [close(1, 1)]


def test_a_threshold_takes_the_lowest_score_even_at_a_tiny_rate():
    made = fxprune.plan(
        fxprune.analyze(scaled(norm([4, 3, 2, 1])), image(1)),
        criterion="bn_gamma", scope="global", select_by="threshold", rate=0.01,
    )  # fmt: skip
    assert made.kept["n0.weight"] == {0: [0, 1, 2]}


# -- the whole list --------------------------------------------------------------------------------

SHIPPED = (
    "bn_gamma distribution_fit geometric_median in_out_norm l1 l1_gamma l2 lamp linf random "
    "ratio_sum sparsity sparsity_gamma"
).split()


def test_this_file_knows_every_criterion_that_ships():
    ours = [
        name
        for name in criteria.names()
        if criteria.find(name).function.__module__.startswith("fxprune.")
        and not criteria.find(name).needs  # those are in test_calibration.py
    ]
    assert ours == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_criterion_is_finite_on_a_network_of_zeros(name):
    model = scaled(norm([0, 0, 0, 0]), weight=[[0], [0], [0], [0]])
    (found,) = scores(model, image(1), name)
    assert len(found) == 4 and all(math.isfinite(score) for score in found)
