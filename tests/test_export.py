"""The second way to a graph: what `torch.export` sees, in the form that the tracer gives."""

from __future__ import annotations

import copy
import io
import pickle
import warnings

import pytest
import test_trace
import torch
import torch.nn.functional as F
from test_trace import OTHER_SIZES, OUTPUTS, PYTHON, check, net, nodes, picture
from torch import nn

import fxprune
from fxprune import rules
from fxprune.errors import InputError, ModelError, TraceError
from fxprune.export import export

warnings.filterwarnings("ignore", message=".*torch.jit.*deprecated", category=FutureWarning)


@pytest.fixture
def exported(monkeypatch):
    """The helpers of the tracer's tests take this way."""
    monkeypatch.setattr(test_trace, "trace", export)


# -- the graph is what the tracer gives ------------------------------------------------------------


@pytest.mark.parametrize("name", PYTHON)
def test_python_in_forward_runs(name, exported):
    model, x = PYTHON[name]
    check(model, x)


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_graph_runs_at_other_sizes(name, exported):
    model, shape = OTHER_SIZES[name]
    graph = check(model, picture())
    assert not graph.meta["fxprune_notes"]
    other = picture(*shape)
    torch.testing.assert_close(graph(other), model(other), rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_keep_their_structure(name, exported):
    check(net(OUTPUTS[name]), picture())


def test_the_model_may_be_on_the_meta_device():
    with torch.device("meta"):
        model = net(lambda self, x: self.a(x).relu(), a=nn.Conv2d(3, 4, 3)).eval()
    graph = export(model, (torch.rand(2, 3, 8, 8),), rules=rules.current())
    assert nodes(graph, "call_module") == ["a"]


def test_inputs_that_do_not_fit_are_an_input_error():
    with pytest.raises(InputError, match="fails on the example inputs"):
        fxprune.prune(Layers(), torch.rand(2, 5, 8, 8), frontend="export")


# -- what only this way sees -----------------------------------------------------------------------


@torch.jit.script
def scripted(x):
    return x * torch.sigmoid(x)


@torch.jit.script
def scripted_flat(x):
    return x.mean([2, 3]).view(x.size(0), -1)


class Layers(nn.Module):
    """Two convolutions and what lies between them, which subclasses say."""

    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8)
        self.b = nn.Conv2d(8, 12, 3, padding=1)
        self.drop = nn.Dropout(0.3)
        self.head = nn.Linear(12, 5)

    def between(self, x):
        return torch.relu(x)

    def flat(self, x):
        return x.mean((2, 3))

    def forward(self, x):
        x = self.between(self.bn(self.a(x)))
        return self.head(self.drop(self.flat(torch.relu(self.b(x)))))


class Scripted(Layers):
    def between(self, x):
        return scripted(x)


class ScriptedSizes(Layers):
    def flat(self, x):
        return scripted_flat(x)


class Mapped(Layers):
    def between(self, x):
        return torch.vmap(lambda picture: torch.tanh(picture) * 2)(x)


class Derived(Layers):
    def between(self, x):
        return torch.func.jvp(torch.sin, (x,), (torch.ones_like(x),))[1]


class Hidden(Layers):
    """Calls that no Python code can see, as of an extension in C++."""

    def between(self, x):
        with torch._C.DisableTorchFunction():
            return F.hardswish(x)


class HiddenSizes(Layers):
    def flat(self, x):
        with torch._C.DisableTorchFunction():
            return F.adaptive_avg_pool2d(x, 1).view(x.shape[0], x.shape[1])


ONLY_EXPORT = [Scripted, ScriptedSizes, Mapped, Derived, Hidden, HiddenSizes]


@pytest.mark.parametrize("kind", ONLY_EXPORT)
def test_where_the_tracer_fails_the_export_is_taken(kind):
    torch.manual_seed(0)
    model, x = kind().eval(), torch.rand(2, 3, 8, 8)
    with pytest.raises(TraceError):
        fxprune.prune(model, x, frontend="symbolic")
    before = copy.deepcopy(model.state_dict())
    pruned = fxprune.prune(model, x)
    report = pruned.fxprune.report
    assert report.frontend == "export"
    assert "export trace" in str(report)
    assert not report.warnings
    assert report.verification.difference < 1e-12
    assert pruned.a.out_channels == 4 and pruned.b.out_channels == 6
    test_trace.unchanged(model.state_dict(), before)
    assert pruned(torch.rand(5, 3, 12, 10)).shape == (5, 5)


def test_layers_under_vmap():
    def forward(self, x):
        x = torch.vmap(lambda one: self.b(torch.relu(one)))(self.a(x))
        return torch.vmap(self.head)(x.mean((2, 3)))

    parts = {"a": nn.Conv2d(3, 8, 3), "b": nn.Conv2d(8, 6, 3), "head": nn.Linear(6, 4)}
    pruned = fxprune.prune(net(forward, **parts), torch.rand(2, 3, 8, 8))
    assert pruned.fxprune.report.verification.difference < 1e-12
    shapes = {name: list(p.shape) for name, p in pruned.named_parameters()}
    assert shapes["b.weight"] == [3, 4, 3, 3] and shapes["head.weight"] == [4, 3]


def test_a_shape_that_a_hidden_call_fixes_is_noted():
    def forward(self, x):
        with torch._C.DisableTorchFunction():
            x = self.a(x) + torch.zeros(int(x.shape[0]), 1, 1, 1)
        return self.b(x)

    model = net(forward, a=nn.Conv2d(3, 4, 3), b=nn.Conv2d(4, 5, 3)).eval()
    pruned = fxprune.prune(model, torch.rand(2, 3, 8, 8), frontend="export")
    assert any("fixed the size" in text for text in pruned.fxprune.report.warnings)
    with pytest.raises(RuntimeError):
        pruned(torch.rand(3, 3, 8, 8))


def test_an_op_without_a_rule_freezes_what_reaches_it():
    with torch.library._scoped_library("fxprune_test", "DEF") as library:
        library.define("twice(Tensor x) -> Tensor")
        library.impl("twice", lambda x: x * 2, "CPU")
        torch.library.register_fake("fxprune_test::twice", torch.empty_like, lib=library)

        class Model(Layers):
            def between(self, x):
                with torch._C.DisableTorchFunction():
                    return torch.ops.fxprune_test.twice(x)

        pruned = fxprune.prune(Model(), torch.rand(2, 3, 8, 8))
        report = pruned.fxprune.report
        assert report.frontend == "export"
        assert pruned.a.out_channels == 8 and pruned.b.out_channels == 6
        (warning,) = report.warnings
        assert "fxprune_test.twice) has no rule: 8 channels are frozen" in warning
        assert "test_export.py" in warning


# -- what it refuses -------------------------------------------------------------------------------


def test_all_ways_say_why_they_fail():
    model = net(lambda self, x: x * 2 if x.sum() > 0 else x)
    model.uncopied = (n for n in range(3))
    with pytest.raises(TraceError) as caught:
        fxprune.analyze(model, picture())
    assert caught.value.fault.startswith("Net.forward depends on the values in a tensor")
    assert dict(caught.value.details)["export"].startswith("Net.forward depends on the values")
    assert dict(caught.value.details)["record"].startswith("Net cannot be copied")


def test_values_are_a_trace_error_with_the_line(capfd):
    model = net(lambda self, x: x * 2 if x.sum() > 0 else x)
    with pytest.raises(TraceError, match="depends on the values in a tensor") as caught:
        fxprune.analyze(model, picture(), frontend="export")
    assert "test_export.py" in dict(caught.value.details)["at"]
    model = net(lambda self, x: x[x > 0])
    with pytest.raises(TraceError) as caught:
        fxprune.analyze(model, picture(), frontend="export")
    assert "test_export.py" in dict(caught.value.details)["at"]
    assert capfd.readouterr() == ("", "")


def test_gradients_inside_forward_are_refused():
    model = net(lambda self, x: torch.func.grad(lambda y: (y**2).sum())(x))
    with pytest.raises(TraceError):
        fxprune.analyze(model, picture(), frontend="export")


def test_autocast_that_is_switched_on_is_refused():
    def forward(self, x, enabled):
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            return self.a(x).relu()

    model = net(forward, a=nn.Conv2d(3, 4, 3))
    with pytest.raises(TraceError, match="switches autocast on"):
        fxprune.analyze(model, (torch.rand(2, 3, 8, 8), True), frontend="export")
    assert fxprune.analyze(model, (torch.rand(2, 3, 8, 8), False), frontend="export").groups


def test_a_scripted_module_is_refused():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), torch.jit.script(nn.Hardswish()))
    with pytest.raises(ModelError, match="module `1` is TorchScript"):
        fxprune.prune(model, torch.rand(2, 3, 8, 8))


def test_switches_and_branches_are_noted():
    def forward(self, x):
        with torch.no_grad():
            mean = x.mean()
        return self.a(x - mean) if self.training else self.a(x) - mean

    graph = export(net(forward, a=nn.Conv2d(3, 4, 3)).double(), (picture(),), rules=rules.current())
    notes = [text for text, _ in graph.meta["fxprune_notes"]]
    assert any("switches gradients off" in text for text in notes)
    assert any("branches on `training`" in text for text in notes)


# -- ops without their Python form -----------------------------------------------------------------


def _views(self, x):
    x = self.a(x)
    n, c, h, w = x.shape
    x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, -1, h, w)
    return self.b(F.pad(x, (1, 0)).permute(0, 1, 3, 2).contiguous())


def _pieces(self, x):
    a, b = torch.split(self.a(x), [3, 5], dim=1)
    c, d = b[:, :4].chunk(2, dim=1)
    return self.b(torch.cat([a, c * d, b[:, 4:].expand(-1, 3, -1, -1)], dim=1))


def _picked(self, x):
    x = self.a(x)
    return self.b(x[:, self.order].flip(1).roll(1, 1) + x.select(1, 0).unsqueeze(1))


def _some(self, x):
    x = self.a(x)
    return self.b(torch.cat([x[:, self.order], x[:, ::2], x.index_select(1, self.order)], 1))


def _in_place(self, x):
    x = self.a(x)
    y = x.clone().relu_()
    y.mul_(0.5).add_(x).clamp_(-1, 1).addcmul_(x, x)
    return self.b(F.hardswish(y, inplace=True))


def _tokens(self, x):
    x = self.a(x).flatten(2).transpose(1, 2)
    q, k, v = self.qkv(F.layer_norm(x, (8,), self.scale)).chunk(3, dim=-1)
    q, k, v = (t.unflatten(-1, (2, 4)).transpose(1, 2) for t in (q, k, v))
    y = F.scaled_dot_product_attention(q, k, v) + (q @ k.transpose(-2, -1)).softmax(-1) @ v
    y = self.out(y.transpose(1, 2).flatten(2)) + torch.einsum("btc,oc->bto", x, self.mix)
    return F.gelu(y)


def _pictures(self, x):
    x = F.max_pool2d(F.group_norm(self.a(x), 2), 2)
    x = F.interpolate(x, scale_factor=2, mode="bilinear") + F.interpolate(x, scale_factor=2)
    x = F.silu(x) * torch.sigmoid(F.adaptive_avg_pool2d(x, 1))
    return F.pixel_shuffle(self.b(x), 2)


def _parts(**more):
    return {"a": nn.Conv2d(3, 8, 3, padding=1), "b": nn.Conv2d(8, 8, 3, padding=1), **more}


ATEN = {
    "views": (_views, {}),
    "pieces": (_pieces, {}),
    "picked": (_picked, {"order": torch.tensor([3, 1, 2, 0, 4, 7, 6, 5])}),
    "some": (_some, {"order": torch.tensor([3, 1])}),
    "in_place": (_in_place, {}),
    "pictures": (_pictures, {}),
    "tokens": (
        _tokens,
        {
            "qkv": nn.Linear(8, 24),
            "out": nn.Linear(8, 6),
            "mix": nn.Parameter(torch.rand(6, 8)),
            "scale": nn.Parameter(torch.rand(8)),
        },
    ),
}


@pytest.mark.parametrize("name", ATEN)
def test_hidden_ops_have_the_same_rules(name):
    """What is chosen, and computed, does not depend on how an op is spelled."""
    forward, parts = ATEN[name]

    def hidden(self, x):
        with torch._C.DisableTorchFunction():
            return forward(self, x)

    torch.manual_seed(0)
    seen = net(forward, **_parts(**parts)).eval()
    model = net(hidden, **_parts(**parts)).eval()
    model.load_state_dict(seen.state_dict())
    x = torch.rand(2, 3, 8, 8)
    by_name = fxprune.prune(seen, x, frontend="symbolic")
    pruned = fxprune.prune(model, x, frontend="export")
    spelled = [node.target for node in pruned.graph.nodes if node.op == "call_function"]
    assert any("aten" in str(target) for target in spelled)
    assert not pruned.fxprune.report.warnings
    assert pruned.fxprune.plan.kept == by_name.fxprune.plan.kept
    assert pruned.fxprune.report.verification.difference < 1e-12
    torch.testing.assert_close(pruned(x), by_name(x))


# -- the pruned network ----------------------------------------------------------------------------


class Trained(nn.Module):
    def __init__(self):
        super().__init__()
        self.a = nn.Conv2d(3, 8, 3, padding=1)
        self.bn = nn.BatchNorm2d(8, momentum=None)
        self.b = nn.Conv2d(8, 6, 1)
        self.register_buffer("mean", torch.zeros(6))
        self.register_buffer("var", torch.ones(6))
        self.head = nn.Linear(6, 4)

    def forward(self, x):
        x = F.dropout(scripted(self.bn(self.a(x))), 0.5, self.training)
        x = F.batch_norm(self.b(x), self.mean, self.var, training=self.training)
        return self.head(F.batch_norm(x, self.mean, self.var).mean((2, 3)))


def pruned_in_training() -> tuple[nn.Module, nn.Module]:
    torch.manual_seed(0)
    model = Trained().train()
    return model, fxprune.prune(model, torch.rand(4, 3, 8, 8), frontend="export")


def test_training_follows_the_flag():
    model, pruned = pruned_in_training()
    x = torch.rand(4, 3, 8, 8)
    assert pruned.training and pruned.bn.training
    assert not torch.equal(pruned(x), pruned(x))  # dropout draws
    assert int(pruned.bn.num_batches_tracked) == 2
    assert (pruned.mean != 0).all() and (pruned.bn.running_mean != 0).all()
    pruned.eval()
    before = copy.deepcopy(pruned.state_dict())
    assert torch.equal(pruned(x), pruned(x))
    test_trace.unchanged(pruned.state_dict(), before)
    assert int(model.bn.num_batches_tracked) == 0 and (model.mean == 0).all()


def test_it_trains():
    _, pruned = pruned_in_training()
    optimizer = torch.optim.SGD(pruned.parameters(), 0.1)
    x, target = torch.rand(8, 3, 8, 8), torch.arange(8) % 4
    losses = []
    for _ in range(30):
        optimizer.zero_grad()
        loss = F.cross_entropy(pruned(x), target)
        loss.backward()
        assert all(p.grad is not None for p in pruned.parameters())
        optimizer.step()
        losses.append(loss.item())
    assert sum(losses[-5:]) < sum(losses[:5])


def test_it_copies_pickles_saves_and_loads():
    model, pruned = pruned_in_training()
    pruned.eval()
    x = torch.rand(3, 3, 10, 10)
    expected = pruned(x)
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    for other in (
        copy.deepcopy(pruned),
        pickle.loads(pickle.dumps(pruned)),
        torch.load(file, weights_only=False),
    ):
        assert torch.equal(other(x), expected)
    again = fxprune.prune(model, torch.rand(4, 3, 8, 8), frontend="export").eval()
    for tensor in again.state_dict().values():
        tensor.zero_()
    again.load_state_dict(pruned.state_dict())
    assert torch.equal(again(x), expected)
    slices_of(pruned, model)


def slices_of(pruned: nn.Module, model: nn.Module) -> None:
    """The pruned tensors are the kept slices of the original's, under its names."""
    old = model.state_dict()
    for name, tensor in pruned.state_dict().items():
        expected = old[name]
        for dim, rows in pruned.fxprune.plan.kept.get(name, {}).items():
            if not isinstance(rows[0], list):
                expected = expected.index_select(dim, torch.tensor(rows))
        assert tensor.shape == expected.shape or any(
            isinstance(rows[0], list) for rows in pruned.fxprune.plan.kept[name].values()
        )
        if tensor.shape == expected.shape:
            assert torch.equal(tensor, expected), name


def test_a_plan_remembers_the_way():
    torch.manual_seed(0)
    model, x = Scripted().eval(), torch.rand(2, 3, 8, 8)
    plan = fxprune.plan(fxprune.analyze(model, x), rate=0.5)
    assert plan.frontend == "export"
    again = type(plan).from_json(plan.to_json())
    pruned = fxprune.apply(model, again)
    assert pruned.fxprune.report.frontend == "export"
    assert fxprune.verify(model, pruned, again).difference < 1e-12


# -- whole networks --------------------------------------------------------------------------------

QUICK = ["resnet18", "shufflenet_v2_x0_5"]
TORCHVISION = [
    "mobilenet_v3_small", "densenet121", "googlenet", "regnet_x_400mf", "convnext_tiny", "swin_t",
    "vit_b_16",
]  # fmt: skip
TIMM = ["mixnet_s", "ghostnet_100", "efficientformer_l1", "maxvit_rmlp_pico_rw_256"]


def _same_choice(model: nn.Module, x: torch.Tensor) -> None:
    pruned = fxprune.prune(model, x, frontend="export")
    assert pruned.fxprune.report.verification.difference < 1e-9
    assert set(pruned.state_dict()) <= set(model.state_dict())
    slices_of(pruned, model)
    by_name = fxprune.prune(model, x, frontend="symbolic")
    assert pruned.fxprune.plan.kept == by_name.fxprune.plan.kept
    for name, tensor in by_name.state_dict().items():
        assert torch.equal(pruned.state_dict()[name], tensor)
    torch.testing.assert_close(pruned.eval()(x[:1]), by_name.eval()(x[:1]))


def _torchvision(name: str) -> tuple[nn.Module, torch.Tensor]:
    torchvision = pytest.importorskip("torchvision")
    torch.manual_seed(0)
    extra = {"init_weights": False} if name == "googlenet" else {}
    model = torchvision.models.get_model(name, weights=None, **extra).eval()
    return model, torch.rand(2, 3, *[224 if name == "vit_b_16" else 64] * 2)


@pytest.mark.parametrize("name", QUICK)
def test_networks_are_pruned_as_by_the_tracer(name):
    _same_choice(*_torchvision(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TORCHVISION)
def test_torchvision_networks_are_pruned_as_by_the_tracer(name):
    _same_choice(*_torchvision(name))


@pytest.mark.slow
@pytest.mark.parametrize("name", TIMM)
def test_timm_networks_are_pruned_as_by_the_tracer(name):
    timm = pytest.importorskip("timm")
    torch.manual_seed(0)
    model = timm.create_model(name).eval()
    side = 256 if "256" in name else 224 if name == "efficientformer_l1" else 64
    _same_choice(model, torch.rand(2, 3, side, side))
