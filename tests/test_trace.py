"""The tracer: the graph computes what the model does, and the model is left as it was."""

from __future__ import annotations

import collections
import copy
import dataclasses
import inspect
import operator
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations
from torch.utils import _pytree as pytree

import fxprune
from fxprune import rules
from fxprune.errors import InputError, TraceError
from fxprune.trace import describe, skeleton, trace


def net(forward, **parts: Any) -> nn.Module:
    """A module with these parts and this forward; tensors become buffers."""
    made = type("Net", (nn.Module,), {"forward": forward})()
    for name, part in parts.items():
        if isinstance(part, torch.Tensor) and not isinstance(part, nn.Parameter):
            made.register_buffer(name, part)
        else:
            setattr(made, name, part)
    return made


def graph_of(model: nn.Module, *args: Any, **kwargs: Any) -> torch.fx.GraphModule:
    return trace(model, args, kwargs, rules=rules.current())


def given_in_order(model: nn.Module, args: tuple, kwargs: dict) -> list[Any]:
    """The arguments as the graph takes them: one a placeholder."""
    found: list[Any] = []
    bound = inspect.signature(model.forward).bind(*args, **kwargs)
    for name, value in bound.arguments.items():
        kind = bound.signature.parameters[name].kind
        if kind is inspect.Parameter.VAR_POSITIONAL:
            found += value
        elif kind is inspect.Parameter.VAR_KEYWORD:
            found += value.values()
        else:
            found.append(value)
    return found


def leaves(value: Any) -> list[Any]:
    if dataclasses.is_dataclass(value):
        value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
    return [leaf for leaf in pytree.tree_leaves(value) if isinstance(leaf, torch.Tensor)]


def check(model: nn.Module, *args: Any, **kwargs: Any) -> torch.fx.GraphModule:
    """Trace; the graph gives what the model gives, in float64, and the model is as it was."""
    model.double().eval()
    before = copy.deepcopy(model.state_dict())
    inputs = copy.deepcopy((args, kwargs))
    graph = graph_of(model, *args, **kwargs)
    graph.graph.lint()
    unchanged(model.state_dict(), before)
    for old, new in zip(leaves((args, kwargs)), leaves(inputs), strict=True):
        assert torch.equal(old, new)
    expected = model(*copy.deepcopy(args), **copy.deepcopy(kwargs))
    got = graph.eval()(*given_in_order(model, *inputs))
    assert type(got) is type(expected)
    pairs = list(zip(leaves(expected), leaves(got), strict=True))
    assert pairs
    for old, new in pairs:
        assert old.dtype == new.dtype
        torch.testing.assert_close(new, old, rtol=1e-12, atol=1e-12, equal_nan=True)
    shapes_are_true(graph)
    return graph


def unchanged(state: dict[str, torch.Tensor], before: dict[str, torch.Tensor]) -> None:
    assert list(state) == list(before)
    for name, tensor in before.items():
        assert torch.equal(state[name], tensor), name


def shapes_are_true(graph: torch.fx.GraphModule) -> None:
    """Every call has a value and a source line."""
    for node in graph.graph.nodes:
        assert "val" in node.meta
        if node.op.startswith("call_"):
            assert node.meta["source"] is not None, node


def nodes(graph: torch.fx.GraphModule, op: str) -> list[Any]:
    return [node.target for node in graph.graph.nodes if node.op == op]


def picture(*shape: int) -> torch.Tensor:
    return torch.randn(shape or (2, 3, 8, 6), dtype=torch.float64)


conv, linear = (lambda: nn.Conv2d(3, 4, 3, padding=1)), (lambda: nn.Linear(6, 5))

# -- Python in forward -----------------------------------------------------------------------------


def _if_on_shape(self, x):
    return self.a(x) if x.shape[-1] % 2 == 0 else self.a(x[..., 1:])


def _loop_over_a_size(self, x):
    return sum(self.a(x[:, :, i]) for i in range(x.shape[2]))


def _len_and_list(self, x):
    rows = [x[i] for i in range(len(x))]
    return torch.stack(rows[::-1])


def _unpacking(self, x):
    n, c, *_, w = x.shape
    first, *rest = x
    return x.reshape(n, c, -1, w).mean(2) + first.mean(1), rest[0]


def _assertions(self, x):
    torch._assert(x.shape[1] == 3, "three channels")
    assert x.dim() == 4 and x.ndim == 4 and x.is_floating_point()
    return self.a(x)


def _arithmetic_on_sizes(self, x):
    h, w = x.shape[2:]
    pad = (max(h, w) - w) // 2
    out = F.pad(x, (pad, max(h, w) - w - pad, 0, 0))
    return F.interpolate(out, size=(int(h * 2), round(w * 1.5)))


def _numel(self, x):
    return x.view(-1) / x.numel() + x.flatten().size(0) + x.nelement()


def _while_and_try(self, x):
    while x.shape[-1] > 2:
        x = F.avg_pool2d(x, 2)
    try:
        return x.view(5, -1, 7)
    except RuntimeError:
        return x.flatten(1)


def _comprehensions(self, x):
    named = {f"p{k}": F.max_pool2d(x, k) for k in (1, 2)}
    return [value for key, value in sorted(named.items(), reverse=True)]


def _walrus_and_lambda(self, x):
    act = lambda y: F.gelu(y) * 2  # noqa: E731
    return act(y) if (y := x.mean((2, 3))).shape[1] == 3 else y


PYTHON = {
    "if_on_shape": (net(_if_on_shape, a=conv()), picture()),
    "if_on_odd_shape": (net(_if_on_shape, a=conv()), picture(2, 3, 8, 7)),
    "loop_over_a_size": (net(_loop_over_a_size, a=linear()), picture()),
    "len_and_list": (net(_len_and_list), picture()),
    "unpacking": (net(_unpacking), picture()),
    "assertions": (net(_assertions, a=conv()), picture()),
    "arithmetic_on_sizes": (net(_arithmetic_on_sizes), picture()),
    "numel": (net(_numel), picture()),
    "while_and_try": (net(_while_and_try), picture(2, 3, 8, 8)),
    "comprehensions": (net(_comprehensions), picture()),
    "walrus_and_lambda": (net(_walrus_and_lambda), picture()),
}


@pytest.mark.parametrize("name", PYTHON)
def test_python_in_forward_runs(name):
    model, *args = PYTHON[name]
    check(model, *args)


# -- sizes stay computed ---------------------------------------------------------------------------


def _half_size(self, x):
    return F.interpolate(x, size=(x.shape[2] // 2, x.shape[3] * 2))


def _size_of_another(self, x):
    return F.interpolate(F.max_pool2d(x, 2), size=x.shape[-2:]) + x


def _new_tensors(self, x):
    return x.new_zeros(x.shape[0], 2) + torch.ones(x.size(0), 1)


_TOKEN = nn.Parameter(picture(1, 3, 4))

OTHER_SIZES = {
    "view": (net(lambda self, x: self.a(x).view(x.size(0), -1), a=conv()), (5, 3, 10, 4)),
    "shape": (net(lambda self, x: x.reshape(x.shape[0] * 3, *x.shape[2:])), (4, 3, 5, 2)),
    "half_size": (net(_half_size), (1, 3, 12, 5)),
    "size_of_another": (net(_size_of_another), (3, 3, 12, 10)),
    "float_of_size": (net(lambda self, x: x / (x.shape[2] ** 0.5 + x.numel())), (2, 3, 9, 4)),
    "expand": (net(lambda self, x: self.token.expand(x.shape[0], -1, -1), token=_TOKEN), (7, 3)),
    "new_tensors": (net(_new_tensors), (6, 3)),
    "arange": (net(lambda self, x: x + torch.arange(x.shape[-1])), (2, 3, 4, 9)),
    "slices": (net(lambda self, x: x[:, :, : x.shape[2] // 2, x.size(3) // 3 :]), (2, 3, 12, 9)),
    "pad": (net(lambda self, x: F.pad(x, (0, -x.shape[-1] % 4))), (2, 3, 4, 9)),
}


@pytest.mark.parametrize("name", OTHER_SIZES)
def test_graph_runs_at_other_sizes(name):
    model, shape = OTHER_SIZES[name]
    graph = check(model, picture())
    other = picture(*shape)
    torch.testing.assert_close(graph(other), model(other), rtol=1e-12, atol=1e-12)


def test_sizes_are_nodes_asked_once():
    model = net(lambda self, x: x.view(x.shape[0], -1) + x.shape[0] + x.size(0))
    graph = check(model, picture())
    assert nodes(graph, "call_method").count("size") == 1


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: x.view(int(x.shape[0]), -1),
        lambda self, x: x.view(len(x), -1),
        lambda self, x: x / x.stride(1),
        lambda self, x: x * float(np.prod(x.shape)),
    ],
    ids=["int", "len", "stride", "numpy"],
)
def test_a_size_that_becomes_a_plain_number_is_noted(forward):
    graph = graph_of(net(forward), picture())
    (text, source), *_ = graph.meta["fxprune_notes"]
    assert text.startswith("a size became a plain number") and "test_trace.py" in source[0]


# -- modules and modes -----------------------------------------------------------------------------


def block() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(inplace=True), nn.Dropout(0.5)
    )


def test_known_modules_stay_modules():
    graph = check(net(lambda self, x: self.b(x), b=block()), picture())
    assert nodes(graph, "call_module") == ["b.0", "b.1", "b.2", "b.3"]
    assert set(dict(graph.named_parameters())) == {
        "b.0.weight",
        "b.0.bias",
        "b.1.weight",
        "b.1.bias",
    }


def test_other_modules_are_traced_through():
    inner = net(lambda self, x: self.a(x) * 2, a=conv())
    graph = check(net(lambda self, x: self.inner(x), inner=inner), picture())
    assert nodes(graph, "call_module") == ["inner.a"]


def test_modules_of_a_list_or_dict_have_their_names():
    def forward(self, x):
        for layer in self.layers:
            x = layer(x)
        return self.heads["one"](x)

    layers = nn.ModuleList([nn.Conv2d(3, 3, 1), nn.Conv2d(3, 3, 1)])
    graph = check(
        net(forward, layers=layers, heads=nn.ModuleDict({"one": nn.Conv2d(3, 2, 1)})), picture()
    )
    assert nodes(graph, "call_module") == ["layers.0", "layers.1", "heads.one"]


def test_a_module_called_twice_is_one_module():
    graph = check(net(lambda self, x: self.a(self.a(x)), a=nn.Conv2d(3, 3, 1)), picture())
    assert nodes(graph, "call_module") == ["a", "a"]


def test_modules_with_hooks_are_traced_through_and_the_hooks_run():
    model = net(lambda self, x: self.a(x), a=conv())
    model.a.register_forward_hook(lambda module, args, output: output * 3)
    graph = check(model, picture())
    assert "a" not in nodes(graph, "call_module")


def test_training_flag_follows_the_graph():
    model = net(lambda self, x: F.dropout(x, 0.5, self.training))
    x = torch.ones(2, 3, 50, 50, dtype=torch.float64)
    graph = check(model, x)
    assert torch.equal(graph.eval()(x), x)
    assert not torch.equal(graph.train()(x), x)


def test_training_flag_of_an_inner_module_is_its_own():
    inner = net(lambda self, x: F.dropout(x, 0.5, self.training), a=nn.Identity())
    model = net(lambda self, x: self.inner(x) + x, inner=inner)
    x = torch.ones(2, 3, 50, 50, dtype=torch.float64)
    graph = check(model, x)
    assert torch.equal(graph.eval()(x), 2 * x)
    assert not torch.equal(graph.train()(x), 2 * x)


def test_a_model_in_training_is_traced_as_in_eval_and_stays_in_training():
    model = net(lambda self, x: self.b(x) if self.training else self.b(x) * 2, b=block()).double()
    model.train()
    graph = graph_of(model, picture())
    assert model.training and model.b[3].training
    assert operator.mul in nodes(graph, "call_function")


@pytest.mark.parametrize(
    "layer",
    [
        parametrizations.weight_norm(nn.Conv2d(3, 4, 3)),
        parametrizations.spectral_norm(nn.Conv2d(3, 4, 3)),
        parametrizations.orthogonal(nn.Linear(6, 6)),
        torch.nn.utils.weight_norm(nn.Conv2d(3, 4, 3)),
        torch.nn.utils.spectral_norm(nn.Conv2d(3, 4, 3)),
    ],
    ids=["weight_norm", "spectral_norm", "orthogonal", "old_weight_norm", "old_spectral_norm"],
)
def test_parametrizations(layer):
    check(net(lambda self, x: self.a(x), a=layer), picture())


@pytest.mark.parametrize("batch_first", [True, False])
def test_multihead_attention_is_traced_through(batch_first):
    def forward(self, x):
        out, weights = self.att(x, x, x)
        return self.norm(out + x), weights

    model = net(
        forward, att=nn.MultiheadAttention(6, 2, batch_first=batch_first), norm=nn.LayerNorm(6)
    )
    graph = check(model, picture(2, 5, 6))
    assert "att" not in nodes(graph, "call_module")


def test_transformer_layer():
    layer = nn.TransformerEncoderLayer(6, 2, 12, dropout=0.1, batch_first=True)
    check(net(lambda self, x: self.layer(x), layer=layer), picture(2, 5, 6))


@pytest.mark.parametrize("kind", [nn.LSTM, nn.GRU, nn.RNN])
def test_recurrent_layers(kind):
    def forward(self, x):
        out, _ = self.rnn(x.flatten(2).transpose(1, 2))
        return out[:, -1]

    check(net(forward, rnn=kind(3, 5, batch_first=True)), picture())


def test_checkpoint_and_autocast_do_not_stop_the_tracer():
    from torch.utils.checkpoint import checkpoint

    def forward(self, x):
        with torch.no_grad():
            y = self.a(x)
        return checkpoint(self.a, x, use_reentrant=False) + y

    check(net(forward, a=conv()), picture())


# -- arguments and results -------------------------------------------------------------------------


def test_defaults_and_keywords():
    def forward(self, x, scale=2.0, *, bias=None, flip=False):
        y = self.a(x) * scale
        y = y if bias is None else y + bias
        return y.flip(-1) if flip else y

    model = net(forward, a=conv())
    check(model, picture())
    check(model, picture(), 3.0)
    check(model, x=picture(), bias=picture(4, 1, 1), flip=True)


def test_starred_arguments():
    def forward(self, x, *others, **named):
        for other in others:
            x = x + other
        return x * named["gate"] + named["shift"]

    args = [picture() for _ in range(3)]
    check(net(forward), *args, gate=picture(), shift=picture(3, 1, 1))


def test_nested_inputs():
    def forward(self, batch, pair):
        left, (right, factor) = pair
        return self.a(batch["image"]) * factor + left.mean() - right.sum()

    check(net(forward, a=conv()), {"image": picture(), "id": 3}, (picture(2), (picture(3), 2.0)))


def test_numbers_and_flags_among_the_inputs():
    graph = check(net(lambda self, x, n, on: x * n if on else x), picture(), 3, True)
    assert nodes(graph, "placeholder") == ["x", "n", "on"]


Pair = collections.namedtuple("Pair", "first second")


@dataclasses.dataclass
class Output:
    logits: torch.Tensor
    features: torch.Tensor | None = None


OUTPUTS = {
    "tuple": lambda self, x: (x + 1, x * 2),
    "list": lambda self, x: [x + 1, [x * 2, x]],
    "dict": lambda self, x: {"a": x + 1, "b": {"c": x * 2}},
    "ordered_dict": lambda self, x: collections.OrderedDict(a=x + 1, b=x * 2),
    "namedtuple": lambda self, x: Pair(x + 1, x * 2),
    "dataclass": lambda self, x: Output(x + 1, x * 2),
    "dataclass_with_none": lambda self, x: Output(x + 1),
    "input_itself": lambda self, x: x,
    "input_twice": lambda self, x: (x, x),
    "with_numbers": lambda self, x: (x + 1, 3, "text", None),
}


@pytest.mark.parametrize("name", OUTPUTS)
def test_outputs_keep_their_structure(name):
    check(net(OUTPUTS[name]), picture())


def test_sizes_among_the_outputs_stay_computed():
    graph = graph_of(net(lambda self, x: (x + 1, x.shape[-1])), picture())
    assert graph(picture(1, 1, 1, 17))[1] == 17


# -- tensors of the model --------------------------------------------------------------------------


def test_index_buffers_keep_their_values():
    def forward(self, x):
        return self.table[self.index.view(-1)].view(2, 3, 4).permute(2, 0, 1) + x.mean()

    index = torch.tensor([[0, 2, 4], [1, 3, 0]])
    check(net(forward, table=nn.Parameter(picture(5, 4)), index=index), picture())


def test_constants_made_in_forward():
    def forward(self, x):
        kernel = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=x.dtype, device=x.device)
        grid = torch.linspace(-1, 1, x.shape[-1], dtype=x.dtype)
        return F.conv2d(x, kernel.expand(3, 1, 2, 2), groups=3).mean(-1) + grid.sum()

    check(net(forward), picture())


def test_single_constants_are_numbers_to_ops_that_want_numbers():
    def forward(self, x):
        y = self.a(x)
        steps = [y.new_full((2, 1), step) for step in self.steps]
        return torch.cat(steps) + y.mean() * self.steps[1] + torch.stack([self.steps[0], y.sum()])

    check(net(forward, a=conv(), steps=torch.tensor([8.0, 16.0])), picture())


@pytest.mark.filterwarnings("ignore:Using a non-tuple sequence")
def test_a_list_of_slices_is_a_tuple():
    def forward(self, x):
        cut = self.cut[0]
        return x[[slice(None), slice(0, cut), None]] + x[:, self.cut[1] :].mean()

    graph = check(net(forward, cut=torch.tensor([2, 1])), picture())
    indices = [n.args[1] for n in graph.graph.nodes if n.target is operator.getitem]
    assert any(type(index) is tuple and len(index) == 3 for index in indices)


def test_masks_of_constants_pick_known_positions():
    mask = torch.tensor([True, False, True])
    check(net(lambda self, x: x[:, self.mask] + x[:, ~self.mask], mask=mask), picture())


def test_tied_parameters_are_one():
    model = net(
        lambda self, x: F.linear(self.a(x), self.b.weight.t()), a=nn.Linear(6, 4), b=nn.Linear(6, 4)
    )
    model.b.weight = model.a.weight
    graph = check(model, picture())
    assert graph.meta["fxprune_aliases"] == {"b.weight": "a.weight"}


def test_dtype_and_device_follow_the_input():
    def forward(self, x):
        y = torch.zeros(3, 1, 1, dtype=x.dtype, device=x.device)
        return (x + y).to(x.dtype).type_as(x).to(x.device)

    graph = check(net(forward), picture())
    assert graph(picture().half()).dtype == torch.float16
    assert getattr in nodes(graph, "call_function")


@pytest.mark.parametrize("of", ["weight", "bias"])
def test_dtype_and_device_follow_the_weights(of):
    """A weight may be asked before a layer reads it, and a network is cast after it was traced."""

    def forward(self, x):
        own = getattr(self.a, of)
        y = torch.ones(6, device=own.device, dtype=own.dtype)
        return self.a(x.to(device=own.device, dtype=own.dtype)) * y

    graph = check(net(forward, a=nn.Linear(6, 6)), picture())
    assert graph.half()(picture()).dtype == torch.float16
    assert graph.to("meta")(picture().to("meta")).is_meta


@pytest.mark.skipif(sys.version_info < (3, 11), reason="places of calls are not known before")
def test_dtypes_that_the_code_writes_stay():
    """As norms and attention do: some steps in float32, the result in the input's precision."""

    def forward(self, x):
        own = x.dtype
        wide = x.to(torch.float64)
        asked = F.softmax(self.a(x), dim=-1, dtype=torch.float64).to(own)
        several = torch.zeros(
            6,
            dtype=torch.float64,
        )
        nested = torch.add(x.to(dtype=torch.float64), torch.ones(6, dtype=own))
        return wide, several, nested, asked, asked.to(own)

    graph = check(net(forward, a=nn.Linear(6, 6)), picture())
    assert graph.code.count("torch.float64") == 4
    found = graph.float()(picture().float())
    assert [each.dtype for each in found] == [torch.float64] * 3 + [torch.float32] * 2


# -- in place, and aliases -------------------------------------------------------------------------


def _counter(self, x):
    self.count += 1
    return x * self.count


def _in_place_on_a_view(self, x):
    y = x * 1
    y[:, :1].add_(5)
    y[:, 1] = 0
    y[..., 2] *= 3
    return y


def _in_place_seen_through_another_name(self, x):
    y = x.clone()
    z = y
    z.relu_().mul_(2)
    return y + z


def _out_argument(self, x):
    y = torch.empty_like(x)
    torch.add(x, 1, out=y)
    return y * 2


def _list_of_views(self, x):
    parts = list(x.clone().chunk(3, 1))
    parts[0].zero_()
    return torch.cat(parts, 1)


def _inplace_flag(self, x):
    return F.relu(x * 1, inplace=True) + nn.functional.leaky_relu_(x * 1)


IN_PLACE = {
    "view": _in_place_on_a_view,
    "another_name": _in_place_seen_through_another_name,
    "out": _out_argument,
    "list_of_views": _list_of_views,
    "flag": _inplace_flag,
    "identity": lambda self, x: x.contiguous() + x.to(x.dtype) + x.view(x.shape),
    "same_operand_twice": lambda self, x: torch.cat([x, x], 1) + (x * x).repeat(1, 2, 1, 1),
}


@pytest.mark.parametrize("name", IN_PLACE)
def test_in_place_and_aliases(name):
    check(net(IN_PLACE[name]), picture())


def test_a_counter_in_forward_does_not_count_while_tracing():
    model = net(_counter, count=torch.zeros(1))
    graph_of(model, picture())
    assert model.count == 0


def test_a_mask_changed_by_an_operator_is_left_alone_and_seen_by_its_views():
    def forward(self, x):
        mask, more = self.mask, self.more
        part = mask[:2]
        mask |= more
        return x[:, :2] * part

    kept, more = torch.tensor([True, False, False]), torch.tensor([False, True, False])
    model = net(forward, mask=kept[:, None, None].clone(), more=more[:, None, None])
    x = picture()
    graph = graph_of(model, x)
    assert model.mask.sum() == 1
    expected = model(x)
    model.mask.copy_(kept[:, None, None])
    torch.testing.assert_close(graph(x), expected)


def test_statistics_do_not_move_while_tracing_a_model_in_training():
    model = net(lambda self, x: self.b(x), b=block()).double().train()
    before = copy.deepcopy(model.state_dict())
    graph_of(model, picture())
    unchanged(model.state_dict(), before)


def test_gradients_flags_hooks_and_modes_are_left_alone():
    model = net(lambda self, x: self.a(x), a=conv())
    model.a.weight.requires_grad_(False)
    call = nn.Module.__call__
    graph = graph_of(model, torch.randn(2, 3, 4, 4, requires_grad=True))
    assert not model.a.weight.requires_grad and model.a.bias.requires_grad
    assert model.a.weight.grad is None and nn.Module.__call__ is call
    assert torch.is_grad_enabled()
    assert graph.get_submodule("a") is model.a


def test_skeleton_shares_tensors_and_copies_modules():
    model = net(lambda self, x: x, a=conv(), b=nn.Sequential(conv()))
    made = skeleton(model)
    assert made.a is not model.a and made.b[0] is not model.b[0]
    assert made.a.weight is model.a.weight
    made.a.extra = 1
    assert not hasattr(model.a, "extra")


# -- operators -------------------------------------------------------------------------------------

FLOATS = [
    "x + 1", "1 + x", "x - y", "1 - x", "x * y", "2 * x", "x / (y + 9)", "1 / (x + 9)", "x // 2",
    "7 // (x + 9)", "x % 3", "7 % (x + 9)", "x ** 2", "2 ** x", "-x", "+x", "abs(x)", "x @ y.mT",
    "x == y", "x != y", "x < y", "x <= 0", "x > y", "0 >= x", "x[0]", "x[:, ::2]", "x[..., None]",
    "x[[1, 0]]", "x.T if x.ndim == 2 else x.mT", "x.mT", "x.real", "x.data",
    "torch.special.expit(x)", "x.float()", "x.to(torch.float32)", "x.softmax(-1)",
    "x.norm(dim=1)", "x.std(1)", "x.split(2, 2)[0]", "x.unflatten(1, (3, 1))", "x.max(1)[0]",
    "torch.where(x > 0, x, 0.0)", "x.clamp(0, 1)", "torch.max(x, y)", "x.masked_fill(x > 0, 0)",
    "x.unbind(1)[1]", "torch.einsum('nchw,nchw->nc', x, y)", "F.normalize(x)",
    "reversed(list(x)).__next__()", "F.pixel_unshuffle(x, 2)", "torch.stack(list(x), 1)",
    "sum([x, y])", "max(x.shape) * x", "x.pow(0.5).nan_to_num()",
]  # fmt: skip
INTEGERS = [
    "x & 1",
    "1 | x",
    "x ^ 3",
    "~x",
    "x << 1",
    "1 << x",
    "x >> 1",
    "x & x",
    "(x > 1) | (x < 1)",
]
ASSIGNED = ["+= 1", "-= 1", "*= 2", "/= 2", "//= 2", "%= 2", "**= 2"]


@pytest.mark.parametrize("text", FLOATS)
def test_operators(text):
    code = compile(text, "operators", "eval")
    model = net(lambda self, x, y: eval(code, {**globals(), "x": x, "y": y}))
    check_values(model, picture(), picture())


@pytest.mark.parametrize("text", INTEGERS)
def test_operators_of_whole_numbers(text):
    code = compile(text, "operators", "eval")
    check_values(net(lambda self, x: eval(code, {"x": x})), torch.randint(0, 5, (2, 3)))


@pytest.mark.parametrize("text", ASSIGNED)
def test_operators_that_assign(text):
    code = compile(f"z = x.clone()\nz {text}", "operators", "exec")

    def forward(self, x):
        names = {"x": x}
        exec(code, names)
        return names["z"]

    check_values(net(forward), picture())


def check_values(model: nn.Module, *args: torch.Tensor) -> None:
    graph = graph_of(model, *args)
    torch.testing.assert_close(graph(*args), model(*args), equal_nan=True)


# -- where lines come from, and what cannot be traced ----------------------------------------------


def test_nodes_know_their_source_line():
    def forward(self, x):
        y = self.a(x)
        return torch.relu(y)

    graph = graph_of(net(forward, a=conv()), picture().float())
    source = {node.name: describe(node.meta.get("source")) for node in graph.graph.nodes}
    assert source["a"].startswith("test_trace.py:")
    assert source["a"].endswith(", in forward: y = self.a(x)")
    assert source["relu"].endswith(", in forward: return torch.relu(y)")


def test_values_in_an_if_are_a_trace_error():
    def forward(self, x):
        return x * 2 if x.sum() > 0 else x

    with pytest.raises(TraceError) as error:
        graph_of(net(forward), picture())
    assert "Net.forward depends on the values in a tensor" in str(error.value)
    assert "in forward: return x * 2 if x.sum() > 0 else x" in str(error.value)


@pytest.mark.parametrize(
    ("forward", "args"),
    [
        (lambda self, x: self.a(x), (picture(2, 5, 4, 4),)),
        (lambda self, x: self.a(x), ()),
        (lambda self, x: self.a(x), (picture(), picture())),
        (lambda self, x: self.missing(x), (picture(),)),
    ],
    ids=["wrong_channels", "none", "too_many", "broken_forward"],
)
def test_inputs_that_do_not_fit_are_an_input_error(forward, args):
    with pytest.raises(InputError, match=r"Net\.forward"):
        graph_of(net(forward, a=conv()), *args)


def test_parameters_that_do_not_fit_are_an_input_error_of_their_layer():
    model = net(lambda self, x: self.bn(self.a(x)), a=conv(), bn=nn.BatchNorm2d(7)).double()
    with pytest.raises(InputError, match=r"BatchNorm2d `bn` on 2x4x"):
        graph_of(model, picture())


def test_failing_trace_leaves_torch_as_it_was():
    call = nn.Module.__call__
    with pytest.raises(InputError):
        graph_of(net(lambda self, x: self.a(x), a=conv()), picture(2, 5, 4, 4))
    assert nn.Module.__call__ is call
    assert torch.relu(torch.tensor(-1.0)) == 0 and not torch.empty(1).is_meta


@pytest.mark.parametrize(
    "forward",
    [
        lambda self, x: self.a(x).mean(3, keepdim=True).squeeze_(3) + 1,
        lambda self, x: self.a(x).unsqueeze_(1).relu(),
        lambda self, x: _changed_shape(self.a(x)) * 2,
    ],
)
def test_a_value_keeps_its_shape_where_the_next_op_changes_it_in_place(forward):
    graph = check(net(forward, a=nn.Conv2d(3, 4, 1)), picture())
    (conv,) = (node for node in graph.graph.nodes if node.op == "call_module")
    assert conv.meta["val"].shape == (2, 4, 8, 6)
    for node in graph.graph.nodes:
        if node.target == "mean":
            assert node.meta["val"].shape == (2, 4, 8, 1)


def _changed_shape(x):
    x.transpose_(1, 2)
    return x


def test_hooks_that_forward_adds_stay_off_the_model():
    """Some libraries collect what layers give by hooks, which the first run puts there."""

    def forward(self, x):
        if not getattr(self, "hooked", False):
            self.hooked, self.seen = True, []
            self.a.register_forward_hook(lambda module, args, found: self.seen.append(found))
        self.seen.clear()
        return self.b(torch.relu(self.a(x))) + sum(self.seen).mean()

    model = net(forward, a=nn.Conv2d(3, 4, 1), b=nn.Conv2d(4, 2, 1)).double().eval()
    assert fxprune.prune(model, picture(), rate=0.5).fxprune.report.verification.elements
    assert not model.a._forward_hooks and not hasattr(model, "hooked")


class LookedUp(nn.Module):
    """A bias for each pair of 600 tokens, from a table of their distances."""

    def __init__(self, tokens: int = 600):
        super().__init__()
        self.table = nn.Parameter(torch.randn(2 * tokens - 1, 2))
        at = torch.arange(tokens)
        self.register_buffer("index", at[:, None] - at + tokens - 1)
        self.up, self.down = nn.Linear(2, 8), nn.Linear(8, 3)

    def forward(self, x):
        bias = self.table[self.index.view(-1)].view(*self.index.shape, -1).permute(2, 0, 1)
        return self.down(self.up(((bias + 0) @ x).mean(1)))


def test_large_computed_constants_are_shapes_only():
    graph = graph_of(LookedUp(), torch.randn(1, 600, 2))
    values = {node.name: node.meta["val"] for node in graph.graph.nodes}
    real = [name for name, v in values.items() if isinstance(v, torch.Tensor) and not v.is_meta]
    assert set(real) == {"table", "index", "view"}
    small = graph_of(LookedUp(20), torch.randn(1, 20, 2))
    assert not next(n for n in small.graph.nodes if n.name == "getitem").meta["val"].is_meta


class AsksOfALargeConstant(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc, self.head = nn.Linear(600, 600), nn.Linear(600, 2)

    def forward(self, x):
        x = self.fc(x)
        return self.head(x if (self.fc.weight * 2).sum() > -1e9 else x * 2)


def test_the_values_of_a_large_computed_constant_take_another_way():
    small = fxprune.prune(AsksOfALargeConstant(), torch.randn(2, 600), rate=0.5)
    assert small.fxprune.report.frontend == "record" and small.fc.out_features == 300
