"""Set criteria: told how many channels to keep, they say which.

What `distribution_fit` promises is measured here by other means: the distance between the
distributions of kept and of all norms, and bins cut by hand.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Sequence
from itertools import combinations, pairwise
from statistics import NormalDist
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import assume, given
from hypothesis import settings as profile
from hypothesis import strategies as st
from torch import Tensor, nn

import fxprune
from fxprune import criteria, models
from fxprune.criteria import Slices
from fxprune.errors import CriterionError, OptionError

torch.set_num_threads(1)


# -- layers ----------------------------------------------------------------------------------------


def conv(weight: Any) -> nn.Conv2d:
    """A 1x1 convolution: one row of numbers a filter."""
    rows = torch.as_tensor(weight, dtype=torch.float32)
    layer = nn.Conv2d(rows.shape[1], len(rows), 1)
    with torch.no_grad():
        layer.weight.copy_(rows[:, :, None, None])
    return layer


def chain(**layers: nn.Module) -> nn.Sequential:
    return nn.Sequential(OrderedDict(layers))


def image(channels: int, side: int = 4) -> Tensor:
    return torch.rand(1, channels, side, side)


def single(weight: Any) -> tuple[nn.Module, Tensor]:
    """A network with these filters in its only layer that may shrink, and an input."""
    layer = conv(weight)
    return chain(a=layer, o=nn.Conv2d(layer.out_channels, 2, 1)), image(layer.in_channels, 2)


class Net(nn.Module):
    """Layers by name, and a forward of them."""

    def __init__(self, forward, **layers: nn.Module):
        super().__init__()
        self.layers = forward
        for name, layer in layers.items():
            self.add_module(name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(self, x)


def kept_of(model: nn.Module, x: Tensor, layer: str, **options: Any) -> list[int]:
    kept = fxprune.plan(fxprune.analyze(model, x), **options).kept
    every = {0: [*range(len(model.get_submodule(layer).weight))]}
    return kept.get(f"{layer}.weight", every)[0]


FIT = {"name": "distribution_fit"}
PLAIN = {"name": "distribution_fit", "redundancy": None}
GAUSSIAN = {"name": "distribution_fit", "fit": "gaussian"}


def fitted(weight: Any, rate: float, criterion: Any = FIT, **options: Any) -> list[int]:
    """What `distribution_fit` keeps of these filters."""
    return kept_of(*single(weight), "a", criterion=criterion, rate=rate, **options)


def drawn(count: int, fan_in: int, seed: int) -> np.ndarray:
    """Filters of different sizes."""
    random = np.random.default_rng(seed)
    filters = random.normal(size=(count, fan_in)) * random.lognormal(0, 0.5, (count, 1))
    return filters.astype(np.float32)


def lengths(filters: np.ndarray, order: int = 2) -> np.ndarray:
    return (np.abs(filters.astype(float)) ** order).sum(1) ** (1 / order)


def gap(part: np.ndarray, whole: np.ndarray) -> float:
    """The largest difference between the distributions of `part` and of `whole`, which holds it."""
    below = [np.searchsorted(np.sort(each), whole, "right") / len(each) for each in (part, whole)]
    return float(np.abs(below[0] - below[1]).max())


def cut_by_hand(filters: np.ndarray, keep: int) -> list[int]:
    """Bins of equal mass, and of each the filter with the largest sum of distances to all."""
    order = np.argsort(lengths(filters), kind="stable")
    apart = np.sqrt(((filters[:, None].astype(float) - filters[None]) ** 2).sum(2)).sum(1)
    ends = [j * len(order) // keep for j in range(keep + 1)]
    return sorted(int(max(order[a:b], key=lambda i: apart[i])) for a, b in pairwise(ends))


# -- distribution_fit: the norms that stay are spread like all norms -------------------------------


@profile(max_examples=120)
@given(st.integers(2, 40), st.integers(1, 6), st.floats(0.01, 0.97), st.integers(0, 999))
@pytest.mark.parametrize("criterion", [FIT, PLAIN])
def test_the_distributions_differ_by_less_than_one_kept_filter(
    criterion, count, fan_in, rate, seed
):
    filters = drawn(count, fan_in, seed)
    keep = count - math.floor(count * rate + 1e-9)
    kept = fitted(filters, rate, criterion)
    norms = lengths(filters)
    assert len(kept) == keep
    assert gap(norms[kept], norms) < 1 / keep
    if count % keep == 0:
        assert gap(norms[kept], norms) <= 1 / keep - 1 / count + 1e-12


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("rule", ["l2", "geometric_median"])
def test_pruning_by_size_or_place_breaks_that_bound_on_the_same_layer(rule, seed):
    filters = drawn(64, 16, seed)
    norms = lengths(filters)
    theirs, ours = (gap(norms[fitted(filters, 0.5, each)], norms) for each in (rule, FIT))
    assert ours <= 1 / 32 - 1 / 64
    assert theirs > 0.4


@pytest.mark.parametrize(
    ("count", "rate", "left"),
    [(7, 0.5, 4), (5, 0.3, 4), (13, 0.625, 5), (9, 0.95, 1), (16, 0.625, 6), (11, 0.05, 11)],
)
def test_the_share_that_goes_is_rounded_down(count, rate, left):
    assert len(fitted(drawn(count, 3, 0), rate)) == left


def test_one_filter_of_each_bin_stays_the_one_farthest_from_all():
    """sizes 1 2 | 3 4 | 5 9, on a line: sums of distances 26 20 | 34 20 | 22 38"""
    assert fitted([[-1], [2], [-3], [4], [5], [9]], 0.5) == [0, 2, 5]


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize(("count", "keep"), [(12, 4), (13, 5), (17, 16), (6, 1)])
def test_the_bins_of_a_random_layer(count, keep, seed):
    filters = drawn(count, 3, seed)
    assert fitted(filters, 1 - keep / count) == cut_by_hand(filters, keep)


def test_without_redundancy_the_middle_of_each_bin_stays():
    sizes = [5, 1, 9, 3, 7, 2, 8, 4, 6]
    kept = fitted([[n] for n in sizes], 0.67, PLAIN)
    assert [sizes[i] for i in kept] == [5, 2, 8]  # of 1 2 3 | 4 5 6 | 7 8 9


def test_bins_differ_in_length_by_one_at_most():
    sizes = [3, 7, 5, 1, 6, 2, 4]
    kept = fitted([[n] for n in sizes], 4 / 7, PLAIN)
    assert [sizes[i] for i in kept] == [6, 2, 4]  # 1 2 | 3 4 | 5 6 7


def test_the_order_of_the_norm():
    """L1: 1 5 | 6 7 and L2: 1 4.24 | 5 7 change places; of two in a bin the second is the middle"""
    filters = [[1, 0], [3, -3], [5, 0], [0, 7]]
    assert fitted(filters, 0.5, {**PLAIN, "norm": 1}) == [2, 3]
    assert fitted(filters, 0.5, {**PLAIN, "norm": 2}) == [1, 3] == fitted(filters, 0.5, PLAIN)


@pytest.mark.parametrize("scale", [0.1, 1 / 3, 3, 7.7, 1e-6, 1e6])
@pytest.mark.parametrize("criterion", [FIT, PLAIN, GAUSSIAN])
def test_the_scale_of_a_layer_is_nothing(criterion, scale):
    filters = drawn(24, 5, 1)
    assert fitted(filters * np.float32(scale), 0.6, criterion) == fitted(filters, 0.6, criterion)


@profile(max_examples=40)
@given(st.permutations(range(15)), st.integers(0, 99))
@pytest.mark.parametrize("criterion", [FIT, PLAIN])
def test_the_order_of_filters_is_nothing(criterion, order, seed):
    filters = drawn(15, 4, seed)
    assume(np.diff(np.sort(lengths(filters))).min() > 1e-4)
    moved = fitted(filters[order], 0.6, criterion)
    assert sorted(order[i] for i in moved) == fitted(filters, 0.6, criterion)


# -- distribution_fit: the redundant go ------------------------------------------------------------


@pytest.mark.parametrize("criterion", [FIT, PLAIN])
def test_of_two_identical_filters_one_stays(criterion):
    filters = drawn(9, 4, 2)
    kept = fitted(np.concatenate([filters, filters]), 0.5, criterion)
    assert sorted(i % 9 for i in kept) == list(range(9))


def test_a_filter_with_a_twin_goes_before_one_without():
    """three norms of 5 in one bin, two of them one filter; 50, 51 and 52 in the other"""
    filters = [[3, 4], [3, 4], [-5, 0], [0, 50], [0, 51], [0, 52]]
    assert 2 in fitted(filters, 0.6)
    assert 1 in fitted(filters, 0.6, PLAIN)  # the middle by place, twin or not


def test_identical_filters_alone_still_leave_as_many_as_were_asked_for():
    for criterion in (FIT, PLAIN, GAUSSIAN):
        assert len(fitted([[1, 2]] * 6, 0.5, criterion)) == 3


# -- distribution_fit: a normal distribution -------------------------------------------------------


@pytest.mark.parametrize(
    ("rate", "expected"),
    [(0.8, [3]), (0.6, [2, 4]), (0.4, [2, 3, 4])],
)
def test_the_filters_nearest_to_the_quantiles_stay(rate, expected):
    """mean 3, deviation sqrt(2): the middle, 3 -+ .674 sqrt(2) or 3 -+ .967 sqrt(2) beside it"""
    sizes = [4, 1, 5, 3, 2]
    kept = fitted([[n] for n in sizes], rate, GAUSSIAN)
    assert sorted(sizes[i] for i in kept) == expected


@profile(max_examples=50)
@given(st.integers(2, 8), st.integers(0, 999), st.data())
def test_no_other_choice_is_nearer_to_the_quantiles(count, seed, data):
    keep = data.draw(st.integers(1, count - 1))
    norms = lengths(drawn(count, 3, seed))
    normal = NormalDist(norms.mean(), norms.std())
    quantiles = np.array([normal.inv_cdf((j + 0.5) / keep) for j in range(keep)])

    def off(chosen: Sequence[int]) -> float:
        return float(np.abs(np.sort(norms[list(chosen)]) - quantiles).sum())

    kept = fitted(drawn(count, 3, seed), 1 - keep / count, GAUSSIAN)
    best = min(combinations(range(count), keep), key=off)
    assert len(set(kept)) == keep
    assert off(kept) == pytest.approx(off(best), rel=1e-9)


def test_far_from_normal_the_fits_differ():
    """mean 4.1, deviation 5.9: the upper quartile of 8.1 is nearer to 1.3 than to 16"""
    sizes = [[1], [1.1], [1.2], [1.3], [16]]
    assert fitted(sizes, 0.6) == [0, 4]
    assert fitted(sizes, 0.6, GAUSSIAN) == [0, 3]


# -- distribution_fit: coupled layers, widths, networks --------------------------------------------


def residual(m: Net, x: Tensor) -> Tensor:
    x = m.stem(x)
    x = x + m.c2(m.c1(x).relu())
    x = x + m.d2(m.d1(x).relu())
    return m.o(x)


def test_filters_of_coupled_layers_are_laid_end_to_end():
    stem, c2, d2 = (drawn(9, width, seed) for width, seed in ((2, 1), (5, 2), (3, 3)))
    inner = dict(c1=nn.Conv2d(9, 5, 1), d1=nn.Conv2d(9, 3, 1))
    ends = dict(stem=conv(stem), c2=conv(c2), d2=conv(d2), o=nn.Conv2d(9, 2, 1))
    model, asked = Net(residual, **ends, **inner), dict(criterion=FIT, rate=0.6)
    joined = cut_by_hand(np.concatenate([stem, c2, d2], 1), 4)
    for layer in ("stem", "c2", "d2"):
        assert kept_of(model, image(2), layer, **asked) == joined
    alone = [cut_by_hand(filters, 4) for filters in (stem, c2, d2)]
    assert joined not in alone


def test_the_stream_of_a_cifar_resnet_is_one_layer_of_long_filters():
    """its first stage's channels are the 9th and on of the second, the 25th and on of the third"""
    torch.manual_seed(0)
    model = models.resnet20()
    parts = [model.conv1.weight]
    for stage, at in ((model.layer1, 0), (model.layer2, 8), (model.layer3, 24)):
        parts += [block.conv2.weight[at : at + 16] for block in stage]
    joined = torch.cat([part.detach().flatten(1) for part in parts], 1).numpy()
    assert len(joined) == 16 and joined.shape[1] > 3 * 9 * (16 + 32 + 64)
    asked = dict(criterion=FIT, rate=0.375)
    assert kept_of(model, image(3, 8), "conv1", **asked) == cut_by_hand(joined, 10)


def test_channels_of_several_filters_are_judged_as_a_whole():
    filters = drawn(20, 3, 5)
    model = chain(a=conv(filters), shuffle=nn.PixelShuffle(2), o=nn.Conv2d(5, 2, 1))
    whole = cut_by_hand(filters.reshape(5, 12), 2)
    kept = kept_of(model, image(3), "a", criterion=FIT, rate=0.6)
    assert kept == [4 * channel + i for channel in whole for i in range(4)]


@pytest.mark.parametrize(
    ("options", "left"),
    [
        (dict(rate=0.5, round_to=4), 8),
        (dict(rate=0.5, max_rate=0.25), 10),
        (dict(rate=0.9, min_channels=5), 5),
        (dict(rate=0.9, rates={"a": 0.3}), 10),
        (dict(rate=0.9, rates={"a": 0}), 13),
    ],
)
def test_the_set_is_asked_for_as_many_as_the_options_leave(options, left):
    """thirteen filters: a smaller set filled up, or a larger one cut, would not fit"""
    filters = drawn(13, 4, 7)
    kept = fitted(filters, criterion=FIT, **options)
    assert kept == cut_by_hand(filters, left)


@pytest.mark.parametrize("criterion", [FIT, PLAIN, GAUSSIAN, {**FIT, "norm": 1}])
def test_a_network_pruned_to_fit_computes_what_the_masked_one_computes(criterion):
    torch.manual_seed(0)
    pruned = fxprune.prune(models.resnet20().eval(), image(3, 8), criterion=criterion, rate=0.6)
    assert pruned.fxprune.report.verification.difference is not None
    assert pruned.conv1.out_channels == 16 - 9


# -- set criteria of one's own ---------------------------------------------------------------------


@pytest.fixture
def own(monkeypatch) -> Callable:
    """Registers a set criterion `mine` for the length of a test."""
    monkeypatch.setattr(criteria, "_known", dict(criteria._known))

    def register(function: Callable) -> Callable:
        return fxprune.criterion("mine", kind="set")(function)

    return register


def every_other(group: Slices, keep: int) -> Tensor:
    return torch.linspace(0, len(group) - 1, keep).round().long()


def two_layers() -> nn.Module:
    return chain(a=conv(drawn(8, 2, 0)), b=conv(drawn(6, 8, 1)), o=nn.Conv2d(6, 2, 1))


def test_a_set_criterion_of_ones_own(own):
    assert own(every_other) is every_other
    for name in ("mine", every_other, {"name": "mine"}):
        assert kept_of(two_layers(), image(2), "a", criterion=name, rate=0.6) == [0, 2, 5, 7]


@pytest.mark.parametrize(
    "form", [list, tuple, np.array, torch.tensor, lambda c: torch.tensor(c, dtype=torch.uint8)]
)
def test_indices_may_be_of_any_form_and_in_any_order(own, form):
    own(lambda group, keep: form([3, 0, 5, 1][:keep]))
    asked = dict(criterion="mine", rate=0.4, only="b")
    assert kept_of(two_layers(), image(2), "b", **asked) == [0, 1, 3, 5]


def test_what_a_set_criterion_is_asked(own):
    """nothing where all stay"""
    asked = []

    def look(group: Slices, keep: int) -> list[int]:
        asked.append((group.group.name, len(group), keep, torch.is_grad_enabled()))
        return list(range(keep))

    own(look)
    analysis = fxprune.analyze(two_layers(), image(2))
    for options in ({}, {"ignore": "a"}, {"only": "a"}, {"rates": {"b": 0.1}}):
        fxprune.plan(analysis, criterion="mine", rate=0.5, **options)
    a, b = ("a", 8, 4, False), ("b", 6, 3, False)
    assert asked == [a, b] + [b] + [a] + [a]


def test_options_reach_a_set_criterion(own):
    def shifted(group: Slices, keep: int, *, by: int = 0) -> list[int]:
        return [(i + by) % len(group) for i in range(keep)]

    own(shifted)
    which = {"name": "mine", "by": 3}
    made = fxprune.plan(fxprune.analyze(two_layers(), image(2)), criterion=which, scores=True)
    assert made.kept["a.weight"] == {0: [3, 4, 5, 6]}
    assert made.criterion == "mine(by=3)"
    assert made.groups[0].scores == [0, 0, 0, 1, 1, 1, 1, 0]


def test_a_kind_that_is_not_known():
    with pytest.raises(OptionError) as caught:
        fxprune.criterion("mine", kind="sets")
    assert caught.value.fault == "kind='sets' is not known"
    assert caught.value.hint == '"score" or "set"'
    assert "mine" not in criteria.names()


CUTS = [dict(scope="global"), dict(select_by="threshold"), dict(select_by="cumulative")]


@pytest.mark.parametrize("cut", CUTS)
def test_sets_have_no_scores_to_cut_through(own, cut):
    own(every_other)
    for name, shown in (("mine", "mine"), (PLAIN, "distribution_fit(redundancy=None)")):
        with pytest.raises(OptionError) as caught:
            fxprune.prune(two_layers(), image(2), criterion=name, **cut)
        assert caught.value.fault.startswith(f"criterion `{shown}` chooses sets")
        assert 'scope="local"' in caught.value.hint and 'select_by="rate"' in caught.value.hint


def test_a_set_in_place_of_the_scores_of_a_recipe_is_refused():
    """whose scope is global"""
    with pytest.raises(OptionError, match="chooses sets"):
        fxprune.prune(two_layers(), image(2), recipe="network_slimming", criterion=FIT)


# -- set criteria that fail ------------------------------------------------------------------------

WRONG = {
    "too many": [0, 1, 2, 3, 4],
    "too few": [0, 1, 2],
    "none": [],
    "twice the same": [0, 1, 2, 2],
    "beyond the last": [0, 1, 2, 8],
    "before the first": [-1, 0, 1, 2],
    "floats": torch.tensor([0.0, 1.0, 2.0, 3.0]),
    "a mask": torch.arange(8) < 4,
    "rows": torch.arange(4)[None],
    "a number": 4,
    "a set": {0, 1, 2, 3},
    "nothing": None,
    "ragged rows": [[0], [1, 2]],
    "short floats": torch.tensor([0, 1, 2, 3], dtype=torch.bfloat16),
    "words": ["0", "1", "2", "3"],
}


@pytest.mark.parametrize("what", WRONG)
def test_what_is_no_set_of_that_size(own, what):
    own(lambda group, keep: WRONG[what])
    model = two_layers()
    before = model.a.weight.clone()
    with pytest.raises(CriterionError) as caught:
        fxprune.prune(model, image(2), criterion="mine")
    expected = "criterion `mine` did not give 4 different channels of group a, which has 8"
    assert caught.value.fault == expected
    assert caught.value.hint == "a set criterion returns the indices of the channels to keep"
    assert torch.equal(model.a.weight, before)


def test_a_set_criterion_that_raises(own):
    def broken(group: Slices, keep: int) -> Tensor:
        return group.filters[keep]

    own(broken)
    with pytest.raises(CriterionError) as caught:
        fxprune.prune(two_layers(), image(2), criterion="mine")
    assert "criterion `mine` fails on group a: IndexError: list index" in caught.value.fault
    assert caught.value.details[0] == ("members", "a.weight[0], a.bias[0], b.weight[1]")
    assert isinstance(caught.value.__cause__, IndexError)


# -- sets under the constraints of flow ------------------------------------------------------------


def grouped(groups: int = 2) -> nn.Module:
    torch.manual_seed(0)
    deep = nn.Conv2d(8, 8, 3, groups=groups, padding=1)
    return chain(a=nn.Conv2d(3, 8, 1), n=nn.BatchNorm2d(8), g=deep, o=nn.Conv2d(8, 2, 1))


@pytest.mark.parametrize("groups", [2, 4])
@pytest.mark.parametrize("criterion", [FIT, GAUSSIAN])
def test_blocks_of_a_grouped_convolution_stay_even(criterion, groups):
    pruned = fxprune.prune(grouped(groups).eval(), image(3), criterion=criterion, rate=0.5)
    assert pruned.fxprune.report.verification.difference is not None
    assert (pruned.a.out_channels, pruned.g.out_channels, pruned.g.groups) == (4, 4, groups)


def test_an_uneven_set_is_evened_out(own):
    """all of the first block were chosen: two of them stay, and two of the second"""
    own(lambda group, keep: list(range(keep)))
    pruned = fxprune.prune(grouped(), image(3), criterion="mine", rate=0.5)
    kept = pruned.fxprune.plan.kept["a.weight"][0]
    assert len(kept) == 4 and sum(i < 4 for i in kept) == 2
    assert pruned.fxprune.report.verification.difference is not None


def in_pieces(m: Net, x: Tensor) -> Tensor:
    return m.o(torch.cat([piece.relu() for piece in m.a(x).chunk(4, 1)], 1))


def test_a_set_that_leaves_out_a_piece_of_a_split_gives_it_one(own):
    own(lambda group, keep: list(range(keep)))
    model = Net(in_pieces, a=conv(drawn(8, 3, 0)), o=nn.Conv2d(8, 2, 1))
    pruned = fxprune.prune(model, image(3), criterion="mine", rate=0.5)
    kept = pruned.fxprune.plan.kept["a.weight"][0]
    assert [i // 2 for i in kept] == [0, 1, 2, 3]
    assert pruned.fxprune.report.verification.difference is not None


def test_a_set_criterion_prunes_a_whole_network(own):
    own(every_other)
    pruned = fxprune.prune(models.mobile_blnet().eval(), image(3, 16), criterion="mine", rate=0.5)
    assert pruned.fxprune.report.verification.difference is not None
    assert pruned.get_submodule("bl1.big.0.expand.conv").out_channels == 36


def test_a_shipped_name_is_not_taken_over():
    with pytest.raises(OptionError, match="`l1` ships with fxprune"):
        fxprune.criterion("l1")(lambda group: group.filters[0].sum(1))
