"""Roles: what the groups of a network are to it, and ``only``, which picks them."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from zoo_small import Case, conv, image, masked, net, randomise, tensor, widths
from zoo_small import gap as gap_of

import fxprune
from fxprune.errors import OptionError
from fxprune.roles import ROLES, Roles

CASES: dict[str, Case] = {}
WANTED: dict[str, dict[str, set[str]]] = {}


def roles(*inputs: Any, parts: dict[str, Any], **wanted: str) -> Callable[[Callable], Case]:
    """Register a network; each role stands with the names of its groups."""

    def register(forward: Callable) -> Case:
        WANTED[forward.__name__] = {role: set(names.split()) for role, names in wanted.items()}
        return net(*inputs, into=CASES, **parts)(forward)

    return register


def played(model: nn.Module, inputs: Any, role: str, **options: Any) -> set[str]:
    """The names of the groups that may go and play a role."""
    analysis = fxprune.analyze(model, inputs, **options)
    groups = [analysis.groups[i] for i in Roles(analysis).of(role)]
    return {group.name for group in groups if group.prunable}


# -- small networks --------------------------------------------------------------------------------

# A network's parts stand in one paragraph, not one a line.
# fmt: off


@roles(
    image(), stream="s", inner="a", stem="s",
    parts=dict(s=conv(3, 8), a=conv(8, 6), b=conv(6, 8), o=conv(8, 2)),
)
def residual(m, x):
    x = m.s(x)
    return m.o(F.relu(x + m.b(F.relu(m.a(x)))))


@roles(
    image(), stream="s", inner="e", expansion="e", stem="s",
    parts=dict(s=conv(3, 8), e=conv(8, 24, 1), en=nn.BatchNorm2d(24), d=conv(24, 24, groups=24),
               dn=nn.BatchNorm2d(24), p=conv(24, 8, 1), o=conv(8, 2)),
)
def inverted_residual(m, x):
    x = m.s(x)
    return m.o(x + m.p(F.relu6(m.dn(m.d(F.relu6(m.en(m.e(x))))))))


@roles(
    image(), inner="s e p", expansion="e", head="p", stem="s",
    parts=dict(s=conv(3, 8), sd=conv(8, 8, groups=8), e=conv(8, 24, 1),
               d=conv(24, 24, groups=24), p=conv(24, 8, 1), o=nn.Linear(8, 2)),
)
def separable(m, x):
    """A depthwise layer behind the 3x3 stem makes no expansion of it."""
    x = F.relu(m.sd(F.relu(m.s(x))))
    x = F.relu(m.p(F.relu(m.d(F.relu(m.e(x))))))
    return m.o(x.mean((2, 3)))


@roles(
    image(), stream="s", inner="a", stem="s",
    parts=dict(s=conv(3, 8), a=conv(8, 16, 1), b=conv(16, 16, groups=4), c=conv(16, 8, 1),
               o=conv(8, 2)),
)
def groups_are_not_depthwise(m, x):
    """A grouped convolution is no depthwise one: its inputs are not its outputs."""
    x = m.s(x)
    return m.o(x + m.c(F.relu(m.b(F.relu(m.a(x))))))


WANTED["groups_are_not_depthwise"]["inner"] = {"a", "b"}


@roles(
    image(), inner="s f", squeeze="f", stem="s",
    parts=dict(s=conv(3, 16), f=conv(16, 4, 1), g=conv(4, 16, 1), o=conv(16, 2)),
)
def squeeze_of_convolutions(m, x):
    x = m.s(x)
    return m.o(x * m.g(F.relu(m.f(F.adaptive_avg_pool2d(x, 1)))).sigmoid())


@roles(
    image(), inner="s f", squeeze="f", stem="s",
    parts=dict(s=conv(3, 16), f=nn.Linear(16, 4), fn=nn.BatchNorm1d(4), g=nn.Linear(4, 16),
               o=conv(16, 2)),
)
def squeeze_of_linears(m, x):
    x = m.s(x)
    gate = F.hardsigmoid(m.g(F.relu(m.fn(m.f(x.mean((2, 3)))))))
    return m.o(gate.view(*gate.shape, 1, 1) * x)


@roles(
    image(), stream="s", inner="f", squeeze="f", stem="s",
    parts=dict(s=conv(3, 16), a=conv(16, 16), f=nn.Linear(16, 4), g=nn.Linear(4, 16),
               o=conv(16, 2)),
)
def squeeze_of_a_stream(m, x):
    x = m.s(x)
    y = m.a(x)
    gate = torch.sigmoid(m.g(F.relu(m.f(y.mean((2, 3))))))
    return m.o(x + y * gate[:, :, None, None])


@roles(
    image(), inner="s a", stem="s",
    parts=dict(s=conv(3, 16), a=conv(16, 4, 1), b=conv(4, 16, 1), o=conv(16, 2)),
)
def a_gate_of_every_pixel(m, x):
    """Its layers see all pixels: they are not squeezed."""
    x = m.s(x)
    return m.o(x * m.b(F.relu(m.a(x))).sigmoid())


@roles(
    image(), tensor(2, 1, 8, 8), inner="p q c", stem="p q", head="c",
    parts=dict(bn=nn.BatchNorm2d(3), p=conv(3, 8), q=conv(1, 6), c=conv(14, 8), o=conv(8, 2)),
)
def two_stems(m, x, depth):
    """One is behind a norm of the input, and behind an arithmetic of its own."""
    p = m.p(m.bn(x * 2 - 1))
    return m.o(F.relu(m.c(F.relu(torch.cat([p, m.q(depth)], 1)))))


@roles(
    image(), image(), inner="s a", stem="s", head="a",
    parts=dict(s=conv(3, 8), a=conv(8, 8), o=conv(8, 2)),
)
def one_stem_for_two_inputs(m, x, y):
    return m.o(F.relu(m.a(m.s(x)) * m.a(m.s(y))))


@roles(
    image(), inner="s a b", stem="s", head="a b",
    parts=dict(s=conv(3, 8), a=conv(8, 8), b=conv(8, 6), o=conv(14, 2), p=nn.Linear(8, 3)),
)
def two_outputs(m, x):
    x = F.relu(m.s(x))
    a, b = F.relu(m.a(x)), F.relu(m.b(x))
    return m.o(torch.cat([a, b], 1)), m.p(a.mean((2, 3)))


@roles(
    image(), inner="s a", stem="s", head="",
    parts=dict(s=conv(3, 8), a=conv(8, 8), b=conv(8, 6), o=conv(8, 2), p=conv(6, 2)),
)
def read_by_a_hidden_layer_too(m, x):
    """What an output and a hidden layer read is no head; nor are outputs themselves."""
    x = F.relu(m.a(F.relu(m.s(x))))
    return m.o(x), m.p(F.relu(m.b(x)))


WANTED["read_by_a_hidden_layer_too"] |= {"inner": {"s", "a", "b"}, "head": {"b"}}


@roles(tensor(2, 5), inner="a b", stem="a", head="b",
       parts=dict(a=nn.Linear(5, 12), b=nn.Linear(12, 9), o=nn.Linear(9, 2)))
def perceptron(m, x):
    return m.o(F.relu(m.b(F.relu(m.a(x)))))


# fmt: on


@pytest.mark.parametrize("role", ROLES)
@pytest.mark.parametrize("name", CASES)
def test_what_groups_are_to_a_network(name: str, role: str) -> None:
    case = CASES[name]
    assert played(case.build(), case.args(), role) == WANTED[name].get(role, set())


@pytest.mark.parametrize("name", CASES)
def test_only_a_role_is_pruned(name: str) -> None:
    case = CASES[name]
    model, args = case.build(), case.args()
    for role, wanted in WANTED[name].items():
        if not wanted:
            continue
        pruned = fxprune.prune(model, args, only=[f"role:{role}"])
        plan = pruned.fxprune.plan
        assert {g.name for g in plan.groups if g.kept < g.size} == wanted
        assert all(g.kept == (g.size + 1) // 2 for g in plan.groups if g.name in wanted)
        assert gap_of(masked(model, plan.kept)(*args), pruned(*args)) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_what_is_ignored_is_the_rest(name: str) -> None:
    """`only` all but a role is to `ignore` the role."""
    case = CASES[name]
    model, args = case.build(), case.args()
    for role, wanted in WANTED[name].items():
        rest = {"stream", "inner"} if role not in ("stream", "inner") else {role}
        every = set().union(*(WANTED[name].get(r, set()) for r in ("stream", "inner")))
        if not wanted or rest == {role} or every == wanted:
            continue
        plan = fxprune.prune(model, args, ignore=[f"role:{role}"]).fxprune.plan
        assert {g.name for g in plan.groups if g.kept < g.size} == every - wanted


# -- networks that look like others ----------------------------------------------------------------


def by_hand(x: Tensor) -> Tensor:
    """GELU's approximation adds the hidden channels to themselves."""
    return 0.5 * x * (1 + torch.tanh(0.797885 * (x + 0.044715 * x**3)))


def test_an_activation_by_hand_makes_no_stream() -> None:
    case = CASES["inverted_residual"]
    parts = {name: part for name, part in case.parts.items() if not name.endswith("n")}
    model = net(image(), **parts)(
        lambda m, x: m.o((y := m.s(x)) + m.p(by_hand(m.d(by_hand(m.e(y))))))
    ).build()
    assert played(model, case.args(), "stream") == {"s"}
    assert played(model, case.args(), "expansion") == {"e"}


def test_a_gate_of_two_poolings_is_a_squeeze() -> None:
    """CBAM: one pair of layers for the mean and the maximum."""
    case = two_poolings()
    assert played(case.build(), case.args(), "squeeze") == {"f"}


def test_a_gate_of_two_poolings_makes_no_stream() -> None:
    case = two_poolings()
    assert played(case.build(), case.args(), "stream") == set()


def two_poolings() -> Case:
    parts = dict(s=conv(3, 16), f=conv(16, 4, 1), n=nn.BatchNorm2d(4), g=conv(4, 16, 1))

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.s(x)
        pools = (F.adaptive_avg_pool2d(x, 1), F.adaptive_max_pool2d(x, 1))
        a, b = (m.g(F.relu(m.n(m.f(p)))) for p in pools)
        return m.o(x * torch.sigmoid(a + b))

    return net(image(), **parts, o=conv(16, 2))(forward)


def test_branches_are_streams_where_they_are_scattered() -> None:
    parts = dict(s=conv(3, 8), a=conv(8, 6), b=conv(6, 8), c=conv(8, 6), d=conv(6, 8), o=conv(8, 2))

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.s(x)
        x = x + m.b(F.relu(m.a(x)))
        return m.o(x + m.d(F.relu(m.c(x))))

    case = net(image(), **parts)(forward)
    for scatter, streams in ((False, {"s"}), (True, {"s", "b", "d"})):
        assert played(case.build(), case.args(), "stream", scatter=scatter) == streams
        assert played(case.build(), case.args(), "inner", scatter=scatter) == {"a", "c"}


def test_a_residual_perceptron_is_no_squeeze() -> None:
    parts = dict(s=nn.Linear(5, 16), a=nn.Linear(16, 32), b=nn.Linear(32, 16), o=nn.Linear(16, 2))
    case = net(tensor(2, 5), **parts)(
        lambda m, x: m.o((y := m.s(x)) + m.b(F.relu(m.a(y))))
    )  # fmt: skip
    assert played(case.build(), case.args(), "squeeze") == set()


def stream_first(stream: Tensor, branch: Tensor) -> Tensor:
    return stream + branch


def branch_first(stream: Tensor, branch: Tensor) -> Tensor:
    return branch + stream


@pytest.mark.parametrize("add", [stream_first, branch_first])
def test_a_swish_by_hand_is_no_gate(add: Callable[[Tensor, Tensor], Tensor]) -> None:
    parts = dict(s=nn.Linear(5, 16), a=nn.Linear(16, 32), b=nn.Linear(32, 16), o=nn.Linear(16, 2))

    def forward(m: Any, x: Tensor) -> Tensor:
        x = m.s(x)
        x = add(x, m.b(F.relu(m.a(x))))
        return m.o(x * torch.sigmoid(x))

    case = net(tensor(2, 5), **parts)(forward)
    assert played(case.build(), case.args(), "squeeze") == set()


def test_a_bottleneck_at_one_pixel_is_no_squeeze() -> None:
    """The last blocks of a network on small images."""
    parts = dict(s=conv(3, 8), e=conv(8, 24, 1), d=conv(24, 24, groups=24), p=conv(24, 8, 1))
    case = net(image(), **parts, o=conv(8, 2))(
        lambda m, x: m.o((y := F.adaptive_avg_pool2d(m.s(x), 1)) + m.p(F.relu(m.d(m.e(y)))))
    )
    assert played(case.build(), case.args(), "squeeze") == set()
    assert played(case.build(), case.args(), "expansion") == {"e"}


def test_behind_an_embedding_nothing_is_a_stem() -> None:
    class Words(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.e, self.a, self.b = nn.Embedding(11, 16), nn.Linear(16, 32), nn.Linear(32, 16)
            self.c, self.o = nn.Linear(16, 12), nn.Linear(12, 2)

        def forward(self, i: Tensor) -> Tensor:
            x = self.e(i)
            x = x + self.b(F.gelu(self.a(x)))
            return self.o(F.gelu(self.c(x)))

    assert played(Words(), torch.randint(0, 11, (2, 5)), "stem") == {"e"}


# -- what `only` may hold --------------------------------------------------------------------------


class Small(nn.Module):
    """A stem, an inverted residual with a gate, and a head of two layers."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = conv(3, 16)
        self.block = nn.ModuleDict(
            {
                "expand": conv(16, 48, 1),
                "deep": conv(48, 48, groups=48),
                "narrow": conv(48, 12, 1),
                "wide": conv(12, 48, 1),
                "project": conv(48, 16, 1),
            }
        )
        self.hidden, self.out = nn.Linear(16, 20), nn.Linear(20, 3)

    def forward(self, x: Tensor) -> Tensor:
        x, block = self.stem(x), self.block
        y = F.relu(block["deep"](F.relu(block["expand"](x))))
        y = y * block["wide"](F.relu(block["narrow"](y.mean((2, 3), keepdim=True)))).sigmoid()
        x = x + block["project"](y)
        return self.out(F.relu(self.hidden(x.mean((2, 3)))))


@pytest.fixture
def small() -> tuple[Small, Tensor]:
    return randomise(Small()), torch.randn(2, 3, 8, 8, dtype=torch.float64)


LAYERS = ("stem", "block.expand", "block.narrow", "hidden")
WHOLE = dict(zip(LAYERS, (16, 48, 12, 20), strict=True))


def left(pruned: nn.Module) -> dict[str, int]:
    return {name: size for name, size in widths(pruned).items() if name in LAYERS}


def pruned_small(small: tuple[Small, Tensor], **options: Any) -> Any:
    model, x = small
    pruned = fxprune.prune(model, x, **options)
    assert gap_of(masked(model, pruned.fxprune.plan.kept)(x), pruned(x)) < 1e-9
    return pruned


HALF = {name: size // 2 for name, size in WHOLE.items()}


@pytest.mark.parametrize(
    ("only", "halved"),
    [
        (["role:expansion"], ["block.expand"]),
        ("role:expansion", ["block.expand"]),
        (("role:squeeze", "role:stem"), ["block.narrow", "stem"]),
        (["role:stream", "role:inner"], LAYERS),
        (["role:head", "block.narrow"], ["hidden", "block.narrow"]),
        (["block.project"], ["stem"]),
        (["stem", "stem", "role:stream"], ["stem"]),
        (["block"], ["block.expand", "block.narrow", "stem"]),
        (["block.*pand"], ["block.expand"]),
        (["block.expand.weight"], ["block.expand"]),
        (["in:block.expand"], ["stem"]),
        (["in:out", "role:squeeze"], ["hidden", "block.narrow"]),
        (["*"], LAYERS),
        ([], LAYERS),
        ((), LAYERS),
        (None, LAYERS),
        (nn.Linear, ["hidden"]),
        ([nn.Linear, "role:expansion"], ["hidden", "block.expand"]),
        ([nn.Module], LAYERS),
    ],
)
def test_only_takes_names_roles_and_types(small: Any, only: Any, halved: list[str]) -> None:
    assert left(pruned_small(small, only=only)) == WHOLE | {name: HALF[name] for name in halved}


def test_only_takes_modules(small: Any) -> None:
    model, _ = small
    found = left(pruned_small(small, only=[model.block["narrow"], model.hidden]))
    assert found == WHOLE | {"block.narrow": 6, "hidden": 10}
    assert left(pruned_small(small, only=model)) == HALF


def test_only_ignore_and_rates_together(small: Any) -> None:
    """`ignore` wins over `only`, and rates hold within it."""
    options = {"only": ["role:inner"], "ignore": ["role:head"], "rates": {"block.expand": 0.25}}
    pruned = pruned_small(small, **options, rate=0.5)
    assert left(pruned) == WHOLE | {"block.expand": 36, "block.narrow": 6}


def test_a_rate_of_a_layer_that_is_not_meant_asks_nothing(small: Any) -> None:
    pruned = pruned_small(small, only=["role:squeeze"], rates={"stem": 0.75, "block.*": 0.75})
    assert left(pruned) == WHOLE | {"block.narrow": 3}


def test_what_is_not_meant_is_no_shortfall(small: Any) -> None:
    pruned = pruned_small(small, only=["role:expansion", "role:head"], ignore=["hidden"])
    rows = {row.name: row.reason for row in pruned.fxprune.report.groups if row.reason}
    assert list(rows) == ["hidden"] and "ignored by `hidden`" in rows["hidden"]
    text = str(pruned.fxprune.report)
    assert "stem" not in text and "block.narrow" not in text


def test_frozen_groups_that_are_meant_are_reported(small: Any) -> None:
    """The output layer's channels are asked of, and stay."""
    for only, named in (("out", {"out"}), ("role:stem", set())):
        report = pruned_small(small, only=[only]).fxprune.report
        assert {row.name for row in report.groups if row.reason} == named


def test_a_cut_through_all_counts_what_is_meant(small: Any) -> None:
    """Network Slimming's threshold: strictly above the score at the rate, of 48 + 12."""
    options = {"only": ["role:expansion", "role:squeeze"], "scope": "global", "rate": 0.4}
    by_rate = left(pruned_small(small, **options))
    assert by_rate["block.expand"] + by_rate["block.narrow"] == 60 - 24
    by_threshold = left(pruned_small(small, **options, select_by="threshold"))
    assert by_threshold["block.expand"] + by_threshold["block.narrow"] == 60 - 24 - 1
    assert {by_rate[name] for name in ("stem", "hidden")} == {16, 20}


@pytest.mark.parametrize("option", ["only", "ignore"])
@pytest.mark.parametrize(
    ("role", "hint"),
    [("expansoin", "did you mean `expansion`"), ("Stream", "did you mean `stream`"), ("", ""),
     ("*", ""), ("stem.conv", "did you mean `stem`")],
)  # fmt: skip
def test_roles_that_are_not_known(small: Any, option: str, role: str, hint: str) -> None:
    with pytest.raises(OptionError, match=f"{option} names the role") as caught:
        fxprune.prune(*small, **{option: [f"role:{role}"]})
    assert hint in str(caught.value) and "squeeze" in str(caught.value)


@pytest.mark.parametrize(
    ("only", "fault"),
    [
        (["blok.expand"], "only pattern `blok.expand` matches nothing"),
        (["role:stem", "x*"], "only pattern `x\\*` matches nothing"),
        ([nn.LSTM], "only=LSTM matches nothing"),
        ([nn.Linear(2, 2)], "only=Linear matches nothing"),
        (["in:nothing"], "only pattern `in:nothing` matches nothing"),
        ([3], "only holds a int"),
        (3, "only is a int"),
        ({"role:stem": 0.5}, "only is a dict"),
    ],
)
def test_only_that_means_nothing(small: Any, only: Any, fault: str) -> None:
    with pytest.raises(OptionError, match=fault):
        fxprune.prune(*small, only=only)


def test_only_a_role_that_no_group_plays() -> None:
    case = CASES["perceptron"]
    with pytest.raises(OptionError, match="role:expansion"):
        fxprune.prune(case.build(), case.args(), only=["role:expansion"])


def test_a_plan_takes_roles(small: Any) -> None:
    model, x = small
    plan = fxprune.plan(fxprune.analyze(model, x), only=["role:expansion"], rate=0.5)
    assert plan == fxprune.prune(model, x, only=["role:expansion"], rate=0.5).fxprune.plan


# -- torchvision and timm --------------------------------------------------------------------------


def tv(name: str, **options: Any) -> nn.Module:
    models = pytest.importorskip("torchvision.models")
    return models.get_model(name, **options).eval()


def tm(name: str) -> nn.Module:
    return pytest.importorskip("timm").create_model(name).eval()


def found(model: nn.Module, side: int = 64) -> dict[str, set[str]]:
    """Role -> groups, of one analysis."""
    analysis = fxprune.analyze(model, torch.randn(1, 3, side, side))
    own = Roles(analysis)
    groups = analysis.groups
    return {r: {groups[i].name for i in own.of(r) if groups[i].prunable} for r in ROLES}


def named(model: nn.Module, test: Callable[[str, nn.Module], bool]) -> set[str]:
    return {name for name, module in model.named_modules() if test(name, module)}


def wide_parts(model: nn.Module) -> set[str]:
    """The 1x1 convolutions right before a depthwise one, as modules are registered."""
    convs = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Conv2d)]
    return {
        name
        for (name, a), (_, b) in pairwise(convs)
        if a.kernel_size == (1, 1) and b.groups == b.in_channels == a.out_channels
        and a.out_channels > a.in_channels
    }  # fmt: skip


def test_resnet18() -> None:
    model = tv("resnet18")
    own = found(model)
    inside = named(model, lambda n, m: n.startswith("layer") and n.endswith(".conv1"))
    assert own["inner"] == inside and len(inside) == 8
    assert own["stem"] == {"conv1"} and not own["expansion"] | own["squeeze"] | own["head"]
    assert own["stream"] == {"conv1", *(f"layer{i}.0.conv2" for i in (2, 3, 4))}


def test_mobilenet_v2() -> None:
    model = tv("mobilenet_v2")
    own = found(model)
    assert own["expansion"] == wide_parts(model) and len(own["expansion"]) == 16
    assert own["head"] == {"features.18.0"} and own["stem"] == {"features.0.0"}
    assert not own["squeeze"]
    # blocks that change the width start a stream; the first and the last block's has no addition
    assert own["stream"] == {f"features.{i}.conv.2" for i in (2, 4, 7, 11, 14)}
    assert own["inner"] >= {"features.1.conv.1", "features.17.conv.2"}


def test_mobilenet_v3_large() -> None:
    model = tv("mobilenet_v3_large")
    own = found(model)
    # block 1 has no expansion: its hidden channels are the stream; block 2's is 16 -> 64
    assert own["expansion"] == wide_parts(model) and len(own["expansion"]) == 14
    assert own["squeeze"] == named(model, lambda n, m: n.endswith(".fc1"))
    assert len(own["squeeze"]) == 8
    assert own["head"] == {"classifier.0"} and own["stem"] == {"features.0.0"}
    assert "features.0.0" in own["stream"] and len(own["stream"]) == 6


def test_the_published_network_of_liu_and_lei() -> None:
    """Every block has an expansion there."""
    own = found(fxprune.models.mobilenet_v3_large().eval())
    assert len(own["expansion"]) == 15 and len(own["squeeze"]) == 8


def test_mobilenet_v3_large_on_small_images() -> None:
    """Its last blocks see one pixel each."""
    model = tv("mobilenet_v3_large")
    assert found(model, side=32) == found(model, side=64)


def test_efficientnet_b0() -> None:
    model = tv("efficientnet_b0")
    own = found(model)
    assert own["expansion"] == wide_parts(model) and len(own["expansion"]) == 15
    assert own["squeeze"] == named(model, lambda n, m: n.endswith(".fc1"))
    assert len(own["squeeze"]) == 16
    assert own["head"] == {"features.8.0"} and own["stem"] == {"features.0.0"}


def test_regnet_y_400mf() -> None:
    model = tv("regnet_y_400mf")
    own = found(model)
    assert own["squeeze"] == named(model, lambda n, m: n.endswith(".se.fc1"))
    assert own["stem"] == {"stem.0"} and not own["expansion"] | own["head"]
    assert own["stream"] == {f"trunk_output.block{i}.block{i}-0.proj.0" for i in (1, 2, 3, 4)}
    wide = named(model, lambda n, m: n.endswith((".f.a.0", ".f.b.0")))
    assert own["inner"] == wide | own["squeeze"] | (own["stem"] - own["stream"])


def test_densenet121() -> None:
    """Concatenations are no additions: every group is inner."""
    own = found(tv("densenet121"))
    assert not own["stream"] | own["expansion"] | own["squeeze"]
    assert own["stem"] == {"features.conv0"}
    assert own["head"] == {"features.denseblock4.denselayer16.conv2"}
    assert len(own["inner"]) == 120


def test_shufflenet_v2() -> None:
    model = tv("shufflenet_v2_x0_5")
    own = found(model)
    assert not own["stream"] | own["squeeze"]
    assert own["expansion"] >= named(model, lambda n, m: n.endswith("branch2.0"))
    assert own["head"] == {"conv5.0"} and own["stem"] == {"conv1.0"}
    assert "conv1.0" not in own["expansion"]


@pytest.mark.parametrize(
    ("name", "stem", "head"),
    [
        ("squeezenet1_1", {"features.0"}, {"features.12.expand1x1", "features.12.expand3x3"}),
        ("vgg11", {"features.0"}, {"classifier.3"}),
        ("alexnet", {"features.0"}, {"classifier.4"}),
    ],
)
def test_plain_networks(name: str, stem: set[str], head: set[str]) -> None:
    own = found(tv(name))
    assert (own["stem"], own["head"]) == (stem, head)
    assert not own["stream"] | own["expansion"] | own["squeeze"]


def test_googlenet() -> None:
    own = found(tv("googlenet", init_weights=False, aux_logits=False))
    assert own["stem"] == {"conv1.conv"}
    ends = ("branch1", "branch2.1", "branch3.1", "branch4.1")
    assert own["head"] == {f"inception5b.{end}.conv" for end in ends}
    assert not own["stream"] | own["expansion"] | own["squeeze"]


@pytest.mark.parametrize("name", ["mobilenetv3_small_050", "efficientnet_lite0", "semnasnet_075"])
def test_mobile_networks_of_timm(name: str) -> None:
    model = tm(name)
    own = found(model)
    assert own["expansion"] == named(model, lambda n, m: n.endswith(".conv_pw") and _is_wide(m))
    assert own["squeeze"] == named(model, lambda n, m: n.endswith(".se.conv_reduce"))
    assert own["stem"] <= {"conv_stem"} and own["head"] == {"conv_head"}


def _is_wide(module: nn.Module) -> bool:
    return isinstance(module, nn.Conv2d) and module.out_channels > module.in_channels


def test_seresnet18_of_timm() -> None:
    model = tm("seresnet18")
    own = found(model)
    assert own["squeeze"] == named(model, lambda n, m: n.endswith(".se.fc1"))
    assert len(own["squeeze"]) == 8 and own["stem"] == {"conv1"}
    inside = named(model, lambda n, m: n.startswith("layer") and n.endswith(".conv1"))
    assert own["inner"] - own["squeeze"] == inside


def test_seresnet18_on_small_images() -> None:
    model = tm("seresnet18")
    assert found(model, side=32) == found(model, side=64)


def test_convnext_of_timm() -> None:
    """Its wide layers come behind the depthwise one."""
    own = found(tm("convnext_atto"))
    assert own["stem"] == {"stem.0"} and own["stem"] < own["stream"]
    assert not own["expansion"] | own["squeeze"] and len(own["stream"]) == 4


def test_expansions_of_mobilenet_v2_are_halved() -> None:
    """And nothing else is."""
    model = randomise(tv("mobilenet_v2", width_mult=0.25, num_classes=5))
    x = torch.randn(1, 3, 32, 32, dtype=torch.float64)
    pruned = fxprune.prune(model, x, only=["role:expansion"], rate=0.5)
    wide, new = wide_parts(model), widths(pruned)
    assert gap_of(masked(model, pruned.fxprune.plan.kept)(x), pruned(x)) < 1e-9
    for name, module in model.named_modules():
        if isinstance(module, nn.Conv2d) and module.groups == 1:
            assert new[name] == module.out_channels // (2 if name in wide else 1), name
