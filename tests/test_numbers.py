"""Numbers of the pruned network: those of sizes follow, those in values stay what they were."""

from __future__ import annotations

import collections
import copy
import math
import operator

import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import rules
from fxprune.errors import ModelError, TraceError

X = torch.rand(2, 3, 8, 8, dtype=torch.float64)


class Net(nn.Module):
    """A factor computed from the first layer's output, on the second layer's."""

    def __init__(self, factor):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 4, 3, padding=1)
        self.factor = factor

    def forward(self, x, *more):
        y = self.a(x)
        return self.b(y) * self.factor(y, *more)


def net(factor) -> Net:
    return Net(factor).double().eval()


def masked(model: nn.Module, kept: dict) -> nn.Module:
    made = copy.deepcopy(model)
    tensors = dict(made.named_parameters()) | dict(made.named_buffers())
    with torch.no_grad():
        for name, dims in kept.items():
            for dim, rows in dims.items():
                gone = sorted(set(range(tensors[name].shape[dim])) - set(rows))
                tensors[name].index_fill_(dim, torch.tensor(gone, dtype=torch.long), 0.0)
    return made


def gram(y: Tensor) -> Tensor:
    n, c, h, w = y.shape
    flat = y.view(n, c, h * w)
    return (flat @ flat.transpose(1, 2) / (c * h * w)).sum((1, 2)).view(-1, 1, 1, 1)


def mean_by(count):
    return lambda y: y.sum((1, 2, 3), keepdim=True) / count(y)


FACTORS = {
    "gram": gram,
    "numel": mean_by(lambda y: y.numel()),
    "numel of an item": mean_by(lambda y: y[0].numel()),
    "flattened": mean_by(lambda y: y.flatten(1).shape[1]),
    "product of a shape": mean_by(lambda y: math.prod(y.shape[1:])),
    "width": mean_by(lambda y: y.shape[1]),
    "width and height": mean_by(lambda y: y.shape[1] ** 0.5 + y.size(2)),
    "full": lambda y: torch.full((y.shape[0], 1, 1, 1), y.shape[1] / 2, dtype=y.dtype),
    "new_full": lambda y: y.new_full((1,), y.shape[1] * y.shape[2]),
}


@pytest.mark.parametrize("name", FACTORS)
@pytest.mark.parametrize("shape", [(2, 3, 8, 8), (3, 3, 8, 8), (2, 3, 12, 10)])
def test_numbers_in_values_are_the_originals_at_every_size(name, shape):
    model = net(FACTORS[name])
    pruned = fxprune.prune(model, X, rate=0.5)
    assert pruned.a.out_channels == 4 and not pruned.fxprune.report.warnings
    x = torch.rand(shape, dtype=torch.float64)
    expected = masked(model, pruned.fxprune.plan.kept)(x)
    torch.testing.assert_close(pruned(x), expected, rtol=1e-9, atol=1e-12)


def test_sizes_that_are_returned_are_the_originals():
    class Sizes(Net):
        def forward(self, x):
            y = self.a(x)
            return self.b(y), y.shape, y.shape[1], y.shape[2]

    pruned = fxprune.prune(Sizes(None).double().eval(), X, rate=0.5)
    _, shape, width, height = pruned(torch.rand(5, 3, 6, 6, dtype=torch.float64))
    assert isinstance(shape, torch.Size)
    assert (shape, width, height) == ((5, 8, 6, 6), 8, 6)


@pytest.mark.parametrize("value", [2.5, 3, True, None, "same"])
def test_a_python_argument_is_the_traced_one_or_an_error(value):
    model = net(lambda y, more: y.sum() * (more if isinstance(more, (int, float)) else 1))
    pruned = fxprune.prune(model, (X, value), rate=0.5)
    expected = masked(model, pruned.fxprune.plan.kept)(X, value)
    torch.testing.assert_close(pruned(X, value), expected)
    with pytest.raises(AssertionError, match="another value needs another trace"):
        pruned(X, 7)
    assert torch.equal(copy.deepcopy(pruned)(X, value), pruned(X, value))


def test_a_python_argument_may_stand_before_a_tensor():
    model = net(lambda y, scale, z: y.sum() * scale + z)
    pruned = fxprune.prune(model, (X, 2.0, X.mean()), rate=0.5)
    assert pruned(X, 2.0, X.mean()).shape == (2, 4, 8, 8)


# -- what the graph does not hold is said ----------------------------------------------------------


class Round(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.round()

    @staticmethod
    def backward(ctx, g):
        return g


bound = Round.apply


def without_gradients(y):
    with torch.no_grad():
        return y.sum()


NOTED = {
    "the backward of `Round` is not in the graph": lambda y: bound(y).sum(),
    "forward switches gradients off": without_gradients,
    "a size became a plain number": lambda y: y.sum() * int(y.shape[2]),
}


@pytest.mark.parametrize("text", NOTED)
def test_what_the_graph_does_not_hold_is_a_warning_with_its_line(text):
    (warning,) = fxprune.prune(net(NOTED[text]), X, rate=0.5).fxprune.report.warnings
    assert warning.startswith(text) and "test_numbers.py" in warning


def test_a_branch_on_training_is_a_warning_with_its_line():
    class Branch(Net):
        def forward(self, x):
            y = self.b(self.a(x))
            return y * 2 if self.training else y

    (warning,) = fxprune.prune(Branch(None).double(), X, rate=0.5).fxprune.report.warnings
    assert warning.startswith("forward branches on `training`")
    assert "return y * 2 if self.training else y" in warning


def test_modules_of_torch_that_ask_for_training_are_no_branch():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), nn.Dropout(), nn.Conv2d(8, 4, 1))
    assert not fxprune.prune(model, X.float(), rate=0.5).fxprune.report.warnings


def test_a_flag_for_code_that_wants_a_bool_is_taken_as_eval():
    class Dropped(Net):
        def forward(self, x):
            return self.b(torch.dropout(self.a(x), 0.5, self.training))

    pruned = fxprune.prune(Dropped(None).double(), X, rate=0.5)
    assert pruned.a.out_channels == 4
    assert "forward branches on `training`" in pruned.fxprune.report.warnings[0]


# -- the model is left alone -----------------------------------------------------------------------


def test_a_cache_that_forward_fills_stays_empty():
    class Cached(Net):
        def forward(self, x):
            y = self.a(x)
            key = tuple(int(n) for n in y.shape[-2:])
            if key not in self.cache:
                self.cache[key] = torch.linspace(0, 1, key[1]).to(y)
            self.seen[0].append(y)
            return self.b(y * self.cache[key])

    model = Cached(None).double().eval()
    model.cache, model.seen = {}, [[]]
    pruned = fxprune.prune(model, X, rate=0.5)
    assert model.cache == {} and model.seen == [[]]
    expected = masked(model, pruned.fxprune.plan.kept)(X)
    torch.testing.assert_close(pruned(X), expected)


def test_layers_in_a_plain_list_are_named():
    class Unregistered(Net):
        def forward(self, x):
            return self.b(self.layers[0](self.a(x)))

    model = Unregistered(None).double()
    model.layers = [nn.Conv2d(8, 8, 1).double()]
    with pytest.raises(ModelError, match="registered nowhere in the model") as error:
        fxprune.prune(model, X, rate=0.5)
    assert "nn.ModuleList" in error.value.hint


# -- containers ------------------------------------------------------------------------------------


def test_a_defaultdict_comes_back_as_a_dict():
    class Many(Net):
        def forward(self, x):
            found = collections.defaultdict(list)
            found["y"].append(self.b(self.a(x)))
            return found

    pruned = fxprune.prune(Many(None).double().eval(), X, rate=0.5)
    assert operator.itemgetter("y")(pruned(X))[0].shape == (2, 4, 8, 8)


@pytest.mark.parametrize(
    "wrapped",
    [lambda y: Box(y), lambda y: (t for t in (y,)), lambda y: {"y": Box([Box({"y": y})])}],
)
def test_an_output_that_cannot_be_looked_into_is_named(wrapped):
    class Boxed(Net):
        def forward(self, x):
            return wrapped(self.b(self.a(x)))

    with pytest.raises(TraceError, match="cannot be looked into"):
        fxprune.prune(Boxed(None).double(), X, rate=0.5)


class Box:
    def __init__(self, y):
        self.y = y


# -- shared tensors --------------------------------------------------------------------------------


def test_one_norm_under_two_names():
    class Twice(Net):
        def forward(self, x):
            return self.b(self.second(self.first(self.a(x))))

    model = Twice(None)
    model.first = model.second = nn.BatchNorm2d(8)
    pruned = fxprune.prune(model.double().eval(), X, rate=0.5)
    expected = masked(model, pruned.fxprune.plan.kept)(X)
    torch.testing.assert_close(pruned(X), expected)


class NormAct(nn.BatchNorm2d):
    """A norm with an activation of its own, which asks for `training` in a branch, as timm's."""

    def __init__(self, width):
        super().__init__(width)
        self.act = nn.PReLU()

    def forward(self, x):
        whole = True if self.training else self.running_mean is None
        mean, var = self.running_mean, self.running_var
        return self.act(nn.functional.batch_norm(x, mean, var, self.weight, self.bias, whole))


RULE = """
norm_act:
  dims: "n c *s, c?, c?, c?, c? -> n c *s"
  operands: [x, running_mean, running_var, weight, bias]
  sizes: {num_features: c}
  zero: "no"
  modules: [test_numbers.NormAct(x)]
"""


def test_a_module_with_modules_of_its_own_follows_train_and_shares_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr(rules, "_current", rules.current())
    (tmp_path / "mine.yaml").write_text(RULE)
    rules.load(tmp_path / "mine.yaml")
    model = nn.Sequential(nn.Conv2d(3, 8, 3), NormAct(8), nn.Conv2d(8, 4, 1)).double().eval()
    pruned = fxprune.prune(model, X, rate=0.5).train()
    assert not pruned.fxprune.report.warnings and not model[1].act.training
    assert {id(p) for p in pruned.parameters()}.isdisjoint(map(id, model.parameters()))
    before = pruned.get_submodule("1").running_mean.clone()
    pruned(X)
    assert not torch.equal(pruned.get_submodule("1").running_mean, before)
