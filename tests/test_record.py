"""Networks without a single graph: recorded while they run, and pruned in a copy of themselves.

Exactness is judged by `zoo_small`, which knows nothing of fxprune but the kept indices in the plan.
"""

from __future__ import annotations

import copy
import gc
import pickle
import warnings
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
import torchvision
from test_structures import ALL
from torch import Tensor, nn
from zoo_small import assert_exact, gap, masked, reasons, run, widths

import fxprune
from fxprune import rules
from fxprune.errors import (
    InputError,
    ModelError,
    NothingToPrune,
    TraceError,
    VerificationError,
)
from fxprune.inputs import given
from fxprune.record import record

DETECTION = torchvision.models.detection


def net(forward, **parts: Any) -> nn.Module:
    """A double network with these parts and this forward, and weights that differ everywhere."""
    torch.manual_seed(0)
    made = type("Net", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        if isinstance(part, Tensor) and not isinstance(part, nn.Parameter):
            made.register_buffer(name, part)
        else:
            setattr(made, name, part)
    return _lively(made).double().eval()


def _lively(model: nn.Module) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            for tensor in (module.weight, module.bias, module.running_mean, module.running_var):
                nn.init.uniform_(tensor, 0.2, 1.0)
    return model


def conv(i: int, o: int, k: int = 3, **options: Any) -> nn.Conv2d:
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def image(*shape: int) -> Tensor:
    return torch.rand(*(shape or (2, 3, 8, 8)), dtype=torch.float64)


def exact(model: nn.Module, *args: Any, half: dict[str, int], **options: Any) -> Any:
    """Prune by half by a record, prove it, and check the widths that are left."""
    pruned = assert_exact(model, args, 0.5, **options)
    assert pruned.fxprune.report.frontend == "record"
    assert pruned.fxprune.report.verification.difference is not None
    assert type(pruned) is type(model)
    assert {name: widths(pruned)[name] for name in half} == half
    return pruned


# -- what Python decides by values -----------------------------------------------------------------


def test_a_branch_by_value():
    def forward(m, x):
        bright = x.mean() > 0.1
        x = m.b(m.a(x))
        return m.o(x.relu() if bright else x)

    exact(net(forward, a=conv(3, 8), b=conv(8, 6), o=conv(6, 2)), image(), half={"a": 4, "b": 3})


def test_a_while_loop_and_a_list_that_grows_by_value():
    def forward(m, x):
        left, x, found = x.abs().max(), m.a(x), []
        while left > 0.2:
            left = left / 2
            x = torch.tanh(m.b(x))
            found.append(x)
        return m.o(m.c(torch.stack(found).sum(0)))

    parts = {"a": nn.Linear(5, 8), "b": nn.Linear(8, 8), "c": nn.Linear(8, 6), "o": nn.Linear(6, 2)}
    exact(net(forward, **parts), image(2, 5), half={"a": 4, "b": 4, "c": 3})


def test_an_early_exit_keeps_what_the_rest_may_read():
    """The layer that did not run has 8 inputs, so what is 8 wide stays; and a warning says so."""

    def forward(m, x):
        x = m.b(m.a(x))
        y = m.early(x.flatten(1).sum(1, keepdim=True))
        if y[0, 0] < 1e9:
            return y
        return m.late(x)

    parts = {"a": conv(3, 6), "b": conv(6, 8), "early": nn.Linear(1, 2), "late": conv(8, 2)}
    pruned = exact(net(forward, **parts), image(), half={"a": 3, "b": 8})
    (warning,) = pruned.fxprune.report.warnings
    assert "late did not run" in warning
    assert "late, which did not run" in reasons(pruned)


def test_a_dict_of_images_and_a_list_of_images():
    def forward(m, images):
        named = images if isinstance(images, dict) else dict(enumerate(images))
        return {key: m.o(m.a(x) + m.b(x)) for key, x in named.items() if x.sum() > 0}

    model = net(forward, a=conv(3, 8), b=conv(3, 8), o=conv(8, 2))
    for images in ({"x": image(1, 3, 8, 8), "y": image(1, 3, 6, 9)}, [image(1, 3, 5, 5)]):
        exact(model, images, half={"a": 4, "b": 4})


def test_values_that_python_reads_stay():
    """What is turned into numbers, lists or arrays may be used in any way."""

    def forward(m, x):
        x = m.a(x)
        scale = sum(x[:, 2:4].tolist()[0][0][0])
        return m.o(m.b(x) * scale)

    model = net(forward, a=conv(3, 8), b=conv(8, 6), o=conv(6, 2))
    pruned = exact(model, image(), half={"a": 8, "b": 3})
    assert "is read as values by tolist" in reasons(pruned)


def test_a_cut_at_a_number_that_was_read_stays():
    def forward(m, x):
        n = 4 + int((x > 2).sum())
        y = m.a(x)
        return m.o(m.b(y[:, :n]))

    model = net(forward, a=conv(3, 8), b=conv(4, 6), o=conv(6, 2))
    pruned = exact(model, image(), half={"a": 8, "b": 3})
    assert "is cut after forward has read values" in reasons(pruned)


def test_a_tensor_from_numpy_is_data_once_values_were_read():
    def forward(m, x):
        order = torch.from_numpy(np.argsort(x.numpy().sum((0, 2, 3))))
        return m.o(m.a(x)[:, order])

    with pytest.raises(NothingToPrune):
        fxprune.prune(net(forward, a=conv(3, 3), o=conv(3, 2)), image())


@torch.jit.script
def scripted(x: Tensor, y: Tensor) -> Tensor:
    return torch.relu(x + y)


@torch.jit.script
def scripted_cut(x: Tensor) -> Tensor:
    return torch.softmax(x, 1)


def test_scripted_functions_are_recorded_op_by_op():
    def forward(m, x):
        x = scripted(m.a(x), m.b(x))
        x = m.d(scripted_cut(m.c(x)))
        return m.o(x)

    parts = {"a": conv(3, 8), "b": conv(3, 8), "c": conv(8, 4), "d": conv(4, 6), "o": conv(6, 2)}
    model = net(by_value(forward), **parts)
    pruned = exact(model, image(), half={"a": 4, "b": 4, "c": 4, "d": 3})
    assert "softmax" in reasons(pruned)


def test_code_that_cannot_be_seen_is_refused():
    def forward(m, x):
        bright = x.mean() > 0.1
        x = torch.vmap(lambda one: one * 2)(m.a(x))
        return m.o(x if bright else -x)

    with pytest.raises(TraceError, match="the recorder cannot see") as caught:
        fxprune.prune(net(forward, a=conv(3, 8), o=conv(8, 2)), image(), frontend="record")
    assert "m.o(x if bright else -x)" in dict(caught.value.details)["at"]


def test_an_op_that_no_rule_knows_freezes():
    @torch.library.custom_op("fxprune_tests::twice", mutates_args=())
    def twice(x: Tensor) -> Tensor:
        return x * 2

    def forward(m, x):
        return m.o(m.b(twice(m.a(x))))

    model = net(forward, a=conv(3, 8), b=conv(8, 6), o=conv(6, 2))
    pruned = exact(model, image(), half={"a": 8, "b": 3})
    assert "has no rule" in reasons(pruned)


# -- what a copy cannot change ---------------------------------------------------------------------


def by_value(forward):
    """The same forward, which no graph holds."""

    def decided(m, x):
        assert bool(x.isfinite().all())
        return forward(m, x)

    return decided


def test_a_size_written_in_the_code_stays_and_is_named():
    def forward(m, x):
        return m.o(m.b(m.a(x)).view(-1, 6 * 8 * 8))

    model = net(by_value(forward), a=conv(3, 8), b=conv(8, 6), o=nn.Linear(384, 2))
    pruned = exact(model, image(), half={"a": 4, "b": 6})
    assert "m.o(m.b(m.a(x)).view(-1, 6 * 8 * 8)) holds its size" in reasons(pruned)


def test_a_size_computed_from_a_shape_follows():
    def forward(m, x):
        y = m.b(m.a(x))
        n, c, h, w = y.shape
        return m.o(y.view(n, c * h * w))

    model = net(by_value(forward), a=conv(3, 8), b=conv(8, 6), o=nn.Linear(384, 2))
    exact(model, image(), half={"a": 4, "b": 3})


def test_a_decision_by_a_width_stays():
    def forward(m, x):
        y = m.a(x)
        if y.shape[1] != m.width:
            raise ValueError
        y = m.b(y)
        if y.shape[1] > 2:
            y = y.relu()
        return m.o(y)

    model = net(by_value(forward), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2))
    model.width = 8
    pruned = exact(model, image(), half={"a": 8, "b": 3})
    assert "if y.shape[1] != m.width: decides by its size" in reasons(pruned)


def test_a_width_that_becomes_a_value_stays():
    def forward(m, x):
        y = m.a(x)
        return m.o(m.b(y / y.shape[1]))

    model = net(by_value(forward), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2))
    exact(model, image(), half={"a": 8, "b": 3})


def test_a_width_read_from_a_layer_stays():
    def forward(m, x):
        return m.o(m.b(m.a(x)) / m.b.out_channels)

    model = net(by_value(forward), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2))
    exact(model, image(), half={"a": 4, "b": 6})


def test_a_width_read_from_a_weight_stays():
    def forward(m, x):
        return m.o(m.b(m.a(x)) / m.b.weight.shape[0])

    model = net(by_value(forward), a=conv(3, 8), b=conv(8, 6), o=conv(6, 2))
    exact(model, image(), half={"a": 4, "b": 6})


def test_a_shuffle_keeps_the_same_channels_of_each_block():
    def forward(m, x):
        y = m.a(x)
        n, c, h, w = y.shape
        y = y.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return m.o(y)

    exact(net(by_value(forward), a=conv(3, 8), o=conv(8, 2)), image(), half={"a": 4})


def test_a_gather_would_be_needed():
    def forward(m, x):
        return m.o(m.a(x).roll(3, 1))

    with pytest.raises(NothingToPrune, match="holds its size"):
        fxprune.prune(net(by_value(forward), a=conv(3, 8), o=conv(8, 2)), image())


def test_streams_are_coupled_where_no_graph_can_scatter():
    def forward(m, x):
        return m.o(m.a(x) + m.b(x))

    model = net(by_value(forward), a=conv(3, 8), b=conv(3, 8), o=conv(8, 2))
    pruned = exact(model, image(), half={"a": 4, "b": 4}, scatter=True, strict=True)
    assert "scatter needs a graph" in pruned.fxprune.report.warnings[0]


# -- what a copy keeps -----------------------------------------------------------------------------


def test_norms_over_channels_run_over_the_kept_ones():
    def forward(m, x):
        x = m.gn(m.a(x)).relu()
        x = m.ln(m.b(x).mean((2, 3)))
        return m.o(x)

    parts = {"a": conv(3, 8), "gn": nn.GroupNorm(2, 8), "b": conv(8, 6), "ln": nn.LayerNorm(6)}
    model = net(by_value(forward), **parts, o=nn.Linear(6, 2))
    pruned = exact(model, image(), half={"a": 4, "b": 3})
    assert "over the kept channels" in pruned.fxprune.report.verification.reference
    assert (pruned.gn.num_channels, pruned.ln.normalized_shape) == (4, (3,))


def test_tied_weights_stay_tied():
    def forward(m, x):
        y = m.e(x)
        return m.o(y + m.k(m.l(y).relu()))

    parts = {"e": nn.Embedding(10, 8), "l": nn.Linear(8, 6), "k": nn.Linear(6, 8)}
    model = net(lambda m, x: forward(m, x + int(x.min())), **parts, o=nn.Linear(8, 10, bias=False))
    model.o.weight = model.e.weight
    pruned = exact(model, torch.tensor([[0, 1, 2], [4, 5, 6]]), half={"l": 3, "k": 4})
    assert pruned.o.weight is pruned.e.weight
    assert pruned.e.weight.shape == (10, 4)


def test_a_recurrent_network():
    def forward(m, x):
        return m.o(m.r(m.a(x))[0])

    parts = {"a": nn.Linear(5, 8), "r": nn.LSTM(8, 6, num_layers=2, batch_first=True)}
    model = net(by_value(forward), **parts, o=nn.Linear(6, 2))
    pruned = exact(model, image(2, 4, 5), half={"a": 4})
    assert pruned.r.input_size == 4
    pruned.train()(image(2, 4, 5)).sum().backward()
    assert pruned.r.weight_ih_l0.grad is not None


def test_attention_inside():
    def forward(m, x):
        x = m.a(x)
        x = x + m.m(x, x, x)[0]
        return m.o(m.g(m.f(x).relu()) + x)

    parts = {"a": nn.Linear(5, 8), "m": nn.MultiheadAttention(8, 2, batch_first=True)}
    parts |= {"f": nn.Linear(8, 12), "g": nn.Linear(12, 8), "o": nn.Linear(8, 2)}
    pruned = exact(net(by_value(forward), **parts), image(2, 4, 5), half={"f": 6})
    assert "decides by its size" in reasons(pruned)


class Helper:
    """What is no module, and holds one."""

    def __init__(self, layer: nn.Module):
        self.layer, self.calls = layer, []

    def __call__(self, x: Tensor) -> Tensor:
        self.calls.append(tuple(x.shape))
        return self.layer(x).relu()


def test_helper_objects_are_copied_and_follow():
    def forward(m, x):
        return m.o(m.bn(m.helper(x)))

    model = net(by_value(forward), a=conv(3, 8), bn=nn.BatchNorm2d(8), o=conv(8, 2))
    model.helper = Helper(model.a)
    fxprune.prune(model, image())
    assert model.helper.calls == []
    pruned = exact(model, image(), half={"a": 4})
    assert pruned.helper.layer is pruned.a
    assert model.helper.layer is model.a


def test_a_helper_in_training_mode_runs_the_copy():
    """The original's BatchNorm is in train mode; it must not see a batch."""

    def forward(m, x):
        return m.o(m.helper(m.a(x)))

    model = net(by_value(forward), a=conv(3, 8), bn=nn.BatchNorm2d(8), o=conv(8, 2)).train()
    model.helper = Helper(model.bn)
    before = model.bn.running_mean.clone()
    pruned = fxprune.prune(model, image())
    assert torch.equal(model.bn.running_mean, before)
    assert pruned.training
    assert pruned.bn.training


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.o = conv(3, 8), conv(8, 6), conv(6, 2)
        self.register_buffer("seen", torch.zeros(2))
        self.register_buffer("hidden", torch.ones(8, 1, 1), persistent=False)
        self.a.weight.requires_grad_(False)

    def forward(self, x: Tensor) -> Tensor:
        self.seen[0] += 1
        self.seen += x.sum() > 0
        sign = 1 if x.isfinite().all() else 0
        return self.o(self.b(self.a(x) * self.hidden)) * sign


def test_the_model_stays_as_it_was_and_its_marks_survive():
    model = Counting().to(memory_format=torch.channels_last)
    model.b.train(False)
    before = copy.deepcopy(model.state_dict())
    pruned: Any = fxprune.prune(model, torch.rand(2, 3, 8, 8))
    assert all(torch.equal(t, before[name]) for name, t in model.state_dict().items())
    assert (pruned.a.out_channels, pruned.b.in_channels) == (4, 4)
    assert pruned.hidden.shape == (4, 1, 1)
    assert not pruned.a.weight.requires_grad
    assert pruned.b.weight.requires_grad
    assert (pruned.training, pruned.b.training) == (True, False)
    assert "hidden" not in pruned.state_dict()
    assert pruned.b.weight.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(pruned.seen, torch.zeros(2))


def test_a_pruned_copy_copies_pickles_and_loads():
    pruned: Any = fxprune.prune(Counting(), torch.rand(2, 3, 8, 8))
    other = pickle.loads(pickle.dumps(copy.deepcopy(pruned)))
    assert type(other) is Counting
    assert other.fxprune.plan == pruned.fxprune.plan
    other.load_state_dict(pruned.state_dict())


def test_a_plan_is_applied_again_and_verified():
    model, x = Counting(), torch.rand(2, 3, 8, 8)
    pruned: Any = fxprune.prune(model, x)
    plan = fxprune.Plan.from_json(pruned.fxprune.plan.to_json())
    assert plan.frontend == "record"
    again: Any = fxprune.apply(model, plan)
    assert type(again) is Counting
    assert gap(run(pruned, (x,)), run(again, (x,))) == 0
    assert fxprune.verify(model, again, plan).difference < 1e-9
    with pytest.raises(ModelError, match="a pruned network is needed"):
        fxprune.verify(model, nn.Linear(2, 2), plan)


@pytest.mark.parametrize("name", ["a.bias", "b.weight", "o.weight"])
def test_a_wrong_copy_is_found(name):
    model, x = Counting(), torch.rand(2, 3, 8, 8)
    pruned: Any = fxprune.prune(model, x, verify=False)
    with torch.no_grad():
        pruned.get_parameter(name).flatten()[0].add_(0.01)
    with pytest.raises(VerificationError, match="differs from the masked original"):
        fxprune.verify(model, pruned, pruned.fxprune.plan, x)


def test_shapes_alone():
    pruned: Any = fxprune.prune(Counting(), torch.rand(2, 3, 8, 8), verify="shapes")
    found = pruned.fxprune.report.verification
    assert found.shapes
    assert found.difference is None


def test_the_steps_are_dumped(tmp_path):
    fxprune.prune(Counting(), torch.rand(2, 3, 8, 8), dump=tmp_path)
    assert "a.weight" in (tmp_path / "06-rewrite.txt").read_text()
    assert "record trace" in (tmp_path / "07-verify.txt").read_text()


def _alive() -> list[Tensor]:
    gc.collect()
    found = [t for t in gc.get_objects() if isinstance(t, Tensor)]
    return [t for t in found if t.dtype == torch.float64 and not t.is_meta]


def test_the_record_keeps_no_data():
    """Sizes of the record's own tensors: those of parameters, and of nothing that was computed."""

    def forward(m, x):
        for _ in range(4):
            x = m.b(m.a(x)).relu()
        return x

    model = net(by_value(forward), a=conv(3, 8), b=conv(8, 3))
    x = image(2, 3, 50, 50)
    before = {id(t) for t in _alive()}
    found = record(model, given(x), rules.current())
    made = [t.numel() for t in _alive() if id(t) not in before]
    assert max(made, default=0) < x.numel()
    assert len(found.graph.nodes) > 12


# -- what is refused -------------------------------------------------------------------------------


def test_weights_without_data_cannot_run():
    with pytest.raises(TraceError, match="weights without data"):
        fxprune.prune(Counting().to("meta"), torch.rand(2, 3, 8, 8), frontend="record")


def test_a_model_that_cannot_be_copied():
    model = Counting()
    model.generator = (n for n in range(3))
    with pytest.raises(TraceError, match="Counting cannot be copied"):
        fxprune.prune(model, torch.rand(2, 3, 8, 8), frontend="record")


def test_inputs_that_do_not_fit():
    with pytest.raises(InputError, match="fails on the example inputs"):
        fxprune.prune(Counting(), torch.rand(2, 4, 8, 8))


# -- against the other way -------------------------------------------------------------------------


def _recorded_structure(name: str) -> None:
    """Whatever a record lets go, goes exactly; and no more goes than in a graph."""
    case = ALL[name]
    options: Any = {"mixing": case.mixing, "oracle": case.oracle, "frontend": "record"}
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        try:
            pruned = assert_exact(case.build(), case.args(), 0.5, **options)
        except NothingToPrune:
            return
    assert pruned.fxprune.report.frontend == "record"


# counts in Python how wide a value is, without comparing it
UNSEEN = {"python_all_over"}


@pytest.mark.slow
@pytest.mark.parametrize("name", [name for name in ALL if name not in UNSEEN])
def test_every_structure_is_pruned_exactly(name):
    _recorded_structure(name)


@pytest.mark.parametrize("name", [name for name in ALL if name not in UNSEEN][::12])
def test_some_structures_are_pruned_exactly(name):
    _recorded_structure(name)


@pytest.mark.parametrize("name", ["matrix_transposes", "called_in_odd_ways"])
def test_layers_whose_weights_code_reads_say_what_they_are(name):
    _recorded_structure(name)


@pytest.mark.parametrize("name", ["resnet18", "mobilenet_v3_small"])
def test_the_same_channels_go_as_in_a_graph(name):
    torch.manual_seed(0)
    model, x = getattr(torchvision.models, name)(), torch.rand(1, 3, 64, 64)
    options: Any = {"criterion": "l1", "verify": "shapes"}
    graph: Any = fxprune.prune(model, x, **options)
    copied: Any = fxprune.prune(model, x, frontend="record", **options)
    assert copied.fxprune.plan.kept == graph.fxprune.plan.kept
    assert type(copied) is type(model)


def test_a_shuffle_network_by_a_record():
    torch.manual_seed(0)
    model = _lively(torchvision.models.shufflenet_v2_x0_5()).double().eval()
    pruned = assert_exact(model, (image(1, 3, 64, 64),), 0.5, frontend="record")
    before, after = pruned.fxprune.report.channels
    assert after < 0.7 * before


# -- detectors -------------------------------------------------------------------------------------


class Toy(nn.Module):
    """Finds boxes on each image of a list, and learns them."""

    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(conv(3, 8), nn.BatchNorm2d(8), nn.ReLU(), conv(8, 12, stride=2))
        self.score, self.box = conv(12, 1, 1), conv(12, 4, 1)

    def forward(self, images: list[Tensor], targets: list[dict[str, Tensor]] | None = None) -> Any:
        found = [self.detect(x) for x in images]
        if self.training and targets is not None:
            wanted = [t["boxes"][0] for t in targets]
            pairs = zip(found, wanted, strict=True)
            return {
                "loss": sum(F.l1_loss(boxes, box.expand_as(boxes)) for (boxes, _), box in pairs)
            }
        return [self.picked(*each) for each in found]

    def detect(self, x: Tensor) -> tuple[Tensor, Tensor]:
        features = self.body(x[None]).relu()
        corner, size = self.box(features)[0].flatten(1).t().split(2, dim=1)
        boxes = torch.cat([corner * 4, corner * 4 + size.exp()], 1)
        return boxes, self.score(features).flatten().sigmoid()

    def picked(self, boxes: Tensor, scores: Tensor) -> dict[str, Tensor]:
        keep = torchvision.ops.nms(boxes, scores, 0.3)
        keep = keep[scores[keep] > 0.4]
        return {"boxes": boxes[keep], "scores": scores[keep]}


def test_a_toy_detector_without_example_inputs():
    torch.manual_seed(0)
    model = _lively(Toy())
    pruned: Any = fxprune.prune(model)
    report = pruned.fxprune.report
    assert (report.frontend, report.guessed) == ("record", "a list of images")
    assert (pruned.body[0].out_channels, pruned.body[3].out_channels) == (4, 6)
    _finds_what_the_masked_original_finds(model, pruned, [image(3, 16, 12), image(3, 9, 20)])
    _trains(pruned, [torch.rand(3, 16, 12)], 0.05)


def _finds_what_the_masked_original_finds(
    model: nn.Module, pruned: Any, images: list[Tensor], limit: float = 1e-6
) -> int:
    """The heads' outputs are rounded to float32: places with equal scores but for their last bits
    would otherwise come in one order or the other."""
    kept = pruned.fxprune.plan.kept
    original = masked(copy.deepcopy(model).double().eval(), kept)
    copied = copy.deepcopy(pruned).double().eval()
    for network in (original, copied):
        for name, layer in network.named_modules():
            if isinstance(layer, (nn.Conv2d, nn.Linear)) and 0 not in kept.get(
                f"{name}.weight", {}
            ):
                layer.register_forward_hook(lambda *call: call[2].float().double())
    expected, got = run(original, (images,)), run(copied, (images,))
    assert [len(each["boxes"]) for each in expected] == [len(each["boxes"]) for each in got]
    assert gap(expected, got) < limit
    count = sum(len(each["boxes"]) for each in got)
    assert count > 0
    return count


def _trains(pruned: Any, images: list[Tensor], rate: float, steps: int = 4) -> None:
    """A few steps on one image, given twice, lower the loss; then boxes are still found."""
    height, width = images[0].shape[-2:]
    box = torch.tensor([[0.2 * width, 0.2 * height, 0.8 * width, 0.7 * height]])
    target: dict[str, Tensor] = {"boxes": box, "labels": torch.tensor([1])}
    target["masks"] = torch.ones(1, height, width, dtype=torch.uint8)
    target["keypoints"] = torch.tensor([[[0.5 * width, 0.5 * height, 1.0]] * 17])
    pruned.train()
    optimizer = torch.optim.SGD(pruned.parameters(), lr=rate, momentum=0.5)
    losses = []
    for _ in range(steps):
        torch.manual_seed(0)
        loss = sum(pruned([*images, *images], [target, target]).values())
        losses.append(float(loss.detach()))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(pruned.parameters(), 1.0)
        optimizer.step()
    assert losses[-1] < losses[0], losses
    found = run(pruned.eval(), (images,))
    assert set(found[0]) >= {"boxes", "scores"}


DETECTORS = {
    "fasterrcnn_resnet50_fpn": 0.52,
    "fasterrcnn_resnet50_fpn_v2": 0.52,
    "fasterrcnn_mobilenet_v3_large_320_fpn": 0.53,
    "maskrcnn_resnet50_fpn": 0.53,
    "maskrcnn_resnet50_fpn_v2": 0.53,
    "keypointrcnn_resnet50_fpn": 0.53,
    "retinanet_resnet50_fpn": 0.54,
    "retinanet_resnet50_fpn_v2": 0.54,
    "fcos_resnet50_fpn": 0.52,
    "ssd300_vgg16": 0.54,
    "ssdlite320_mobilenet_v3_large": 0.54,
}


def detector(name: str, images: list[Tensor]) -> nn.Module:
    """A detector that is not trained, but whose scores differ from place to place."""
    torch.manual_seed(0)
    sizes: Any = {} if "ssd" in name else {"min_size": 128, "max_size": 160}
    model = _lively(getattr(DETECTION, name)(weights=None, weights_backbone=None, **sizes))
    for part, layer in model.named_modules():
        heads = ("cls_logits", "cls_score", "classification_head.module_list")
        if any(head in part for head in heads) and isinstance(layer, (nn.Conv2d, nn.Linear)):
            layer.register_forward_hook(_spread)
    run(model.eval(), (images,))
    for layer in model.modules():
        layer._forward_hooks.clear()
    if hasattr(model, "roi_heads"):
        model.roi_heads.score_thresh = 0.005
    return model.train()


def _spread(layer: nn.Module, _args: tuple, out: Tensor) -> Tensor:
    """Scale a layer so that what it gives has a deviation of 3, and no offset."""
    bias = layer.bias if layer.bias is not None else torch.zeros(out.shape[1])
    out = out - bias.view([1, -1, *[1] * (out.ndim - 2)])
    factor = 3 / float(out.std())
    layer.weight.data.mul_(factor)
    if layer.bias is not None:
        layer.bias.data.zero_()
    return out * factor


@pytest.mark.slow
@pytest.mark.parametrize("name", DETECTORS)
def test_a_detector_pruned_by_half(name):
    images = [torch.rand(3, 128, 160, generator=torch.Generator().manual_seed(0))]
    model = detector(name, images)
    pruned: Any = fxprune.prune(model, (images,))
    report = pruned.fxprune.report
    assert (report.frontend, type(pruned)) == ("record", type(model))
    assert report.verification.difference < 1e-6
    before, after = report.channels
    assert after < DETECTORS[name] * before
    assert report.params[1] < 0.4 * report.params[0]
    _finds_what_the_masked_original_finds(model, pruned, [x.double() for x in images])
    _trains(pruned, images, 0.002)


def test_a_detector_that_finds_nothing_is_compared_layer_by_layer():
    torch.manual_seed(0)
    model = _lively(Toy())
    nn.init.constant_(model.score.bias, -50.0)
    x = ([torch.rand(3, 12, 12)],)
    pruned: Any = fxprune.prune(model, x)
    assert "layer calls" in pruned.fxprune.report.verification.note
    with torch.no_grad():
        pruned.box.weight[0, 0] += 0.1
    with pytest.raises(VerificationError):
        fxprune.verify(model, pruned, pruned.fxprune.plan, x)
