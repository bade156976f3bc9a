"""Criteria: every score that ships, beside the number worked out by hand."""

from __future__ import annotations

import math
import zlib
from collections import OrderedDict
from collections.abc import Sequence
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import criteria
from fxprune.criteria import Slices
from fxprune.errors import CriterionError

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


def two_norms() -> nn.Module:
    b = filled(nn.Conv2d(4, 2, 1), [1] * 8)
    return chain(a=conv(UNIT), n=norm(GAMMA), b=b, m=norm([3, 1]), o=nn.Conv2d(2, 2, 1))


def gone(model: nn.Module, x: Tensor, **options: Any) -> dict[str, list[int]]:
    kept = fxprune.plan(fxprune.analyze(model, x), **options).kept
    sizes = {name: len(t) for name, t in model.state_dict().items() if name in ("a.bias", "b.bias")}
    return {name[0]: sorted({*range(n)} - {*kept[name][0]}) for name, n in sizes.items()}


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


# -- the whole list --------------------------------------------------------------------------------

SHIPPED = "bn_gamma geometric_median l1 l2 lamp linf random ratio_sum".split()


def test_this_file_knows_every_criterion_that_ships():
    ours = [
        name
        for name in criteria.names()
        if criteria.find(name)[1].__module__.startswith("fxprune.")
    ]
    assert ours == SHIPPED


@pytest.mark.parametrize("name", SHIPPED)
def test_every_criterion_is_finite_on_a_network_of_zeros(name):
    model = scaled(norm([0, 0, 0, 0]), weight=[[0], [0], [0], [0]])
    (found,) = scores(model, image(1), name)
    assert len(found) == 4 and all(math.isfinite(score) for score in found)
