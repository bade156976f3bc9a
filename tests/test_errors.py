"""Bad input: each has a message of its own, which says what is wrong, where, and what to do.

A message is the fault in one line, rows of details, then after an empty line ``hint: ...``.
Nothing the user hands in may end in a bare KeyError, IndexError or AttributeError.
"""

from __future__ import annotations

import copy
import fractions
import json
import math
import pickle
import re
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

import fxprune
from fxprune import errors, rules
from fxprune.errors import (
    CriterionError,
    FxpruneError,
    InputError,
    ModelError,
    NothingToPrune,
    OptionError,
    PlanError,
    RuleError,
    TraceError,
    VerificationError,
)

torch.set_num_threads(1)
X = torch.randn(2, 3, 8, 8, generator=torch.Generator().manual_seed(0))


def small() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 8, 3),
        nn.BatchNorm2d(8),
        nn.ReLU(),
        nn.Conv2d(8, 6, 3),
        nn.ReLU(),
        nn.Conv2d(6, 2, 1),
    )


class Two(nn.Module):
    """Two convolutions and something between them."""

    def __init__(self, between: Callable[[Tensor], Any]):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)
        self.between = between

    def forward(self, x):
        return self.b(self.between(self.a(x)))


class Last(nn.Module):
    """A function as a layer."""

    def __init__(self, function: Callable[[Tensor], Any]):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def raised(kind: type[FxpruneError], call: Callable[[], Any]) -> FxpruneError:
    """What `call` raises; exactly of this class, and in the style of the house."""
    with pytest.raises(FxpruneError) as caught:
        call()
    error = caught.value
    assert type(error) is kind, f"{type(error).__name__}: {error}"
    assert_style(error)
    return error


def assert_style(error: FxpruneError) -> None:
    """The fault first, then indented details, an empty line, and the hint."""
    lines = str(error).split("\n")
    assert lines[0] == error.fault.split("\n")[0]
    assert error.fault and len(error.fault.split("\n")) == 1
    assert not error.fault.endswith(".") and len(error.fault) < 300, error.fault
    assert not re.search(r"<(built-in|function|bound|class|.* object at)", error.fault)
    rest = lines[1:]
    if error.hint:
        assert rest[-1] == f"hint: {error.hint}" and rest[-2] == ""
        rest = rest[:-2]
    assert all(line.startswith("  ") for line in rest), rest
    assert "hint:" not in "\n".join([lines[0], *rest])


# -- the style itself ------------------------------------------------------------------------------


def test_a_message_is_fault_details_hint():
    error = OptionError(
        "rate=2 is bad", details=[("at", "here"), ("known", "a, b")], hint="use 0.5"
    )
    assert str(error) == "rate=2 is bad\n  at     here\n  known  a, b\n\nhint: use 0.5"


def test_empty_details_and_hint_leave_no_lines():
    assert str(OptionError("bad", details=[("at", "")])) == "bad"


def test_an_error_survives_pickling():
    error = OptionError("bad", details=[("at", "here")], hint="do this")
    back = pickle.loads(pickle.dumps(error))
    assert type(back) is OptionError and str(back) == str(error)


def test_every_error_is_an_fxprune_error():
    kinds = [v for v in vars(errors).values() if isinstance(v, type) and issubclass(v, Exception)]
    assert len(kinds) > 8 and all(issubclass(kind, FxpruneError) and kind.__doc__ for kind in kinds)


def test_nearest_names_the_closest_word():
    assert errors.nearest("ratiosum", ["l1", "ratio_sum"]) == "did you mean `ratio_sum`?"
    assert errors.nearest("zzz", ["l1", "ratio_sum"]) == ""


# -- options ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("rate", [-0.1, 1.0, 1, 150, math.inf, math.nan])
def test_a_rate_outside_its_range(rate):
    error = raised(OptionError, lambda: fxprune.prune(small(), X, rate=rate))
    assert error.fault == f"rate={rate} is outside [0, 1)"
    assert error.hint == "0.5 removes half of the channels"


def test_a_rate_in_percent():
    error = raised(OptionError, lambda: fxprune.prune(small(), X, rate=40))
    assert str(error) == "rate=40 is outside [0, 1)\n\nhint: a share is meant: 0.4 for 40 %"


@pytest.mark.parametrize("rate", ["0.4", True, [0.5], torch.tensor(0.5)])
def test_a_rate_that_is_no_number(rate):
    error = raised(OptionError, lambda: fxprune.prune(small(), X, rate=rate))
    assert error.fault == f"rate must be a number, not {type(rate).__name__}"


@pytest.mark.parametrize("kind", [np.float64, np.float32, np.float16, fractions.Fraction])
def test_a_rate_from_numpy_is_a_number(kind):
    options = {"rate": kind(0.5), "max_rate": kind(0.75), "rates": {"3": kind(0.25)}}
    pruned = fxprune.prune(small(), X, **options)
    assert pruned.get_submodule("0").weight.shape[0] == 4
    assert pruned.get_submodule("3").weight.shape[0] == 5
    plan = pruned.fxprune.plan
    assert fxprune.Plan.from_json(plan.to_json()) == plan


def test_a_fraction_outside_its_range():
    error = raised(OptionError, lambda: fxprune.prune(small(), X, rate=fractions.Fraction(40)))
    assert error.fault == "rate=40 is outside [0, 1)" and "0.4 for 40 %" in error.hint


def test_a_flag_from_numpy_is_no_number():
    raised(OptionError, lambda: fxprune.prune(small(), X, rate=np.bool_(False)))


@pytest.mark.parametrize("rate", [1.0, -1, "x"])
def test_a_rate_of_a_layer_is_checked_too(rate):
    error = raised(OptionError, lambda: fxprune.prune(small(), X, rates={"3": rate}))
    assert error.fault.startswith("rates['3']")


@pytest.mark.parametrize("rates", [0.5, [("3", 0.5)], {3: 0.5}])
def test_rates_that_are_no_dict_of_patterns(rates):
    error = raised(OptionError, lambda: fxprune.prune(small(), X, rates=rates))
    assert error.fault.startswith("rates")


def test_a_rates_pattern_without_a_match():
    error = raised(OptionError, lambda: fxprune.prune(small(), X, rates={"layer9.*": 0.5}))
    assert error.fault == "rates pattern `layer9.*` matches nothing in the model"
    assert error.hint == "patterns are shell-style, as in `layer1.*.conv2`"


def test_a_rates_pattern_with_a_slip():
    error = raised(OptionError, lambda: fxprune.prune(small(), X, rates={"3.wieght": 0.5}))
    assert error.hint == "did you mean `3.weight`?"


KNOWN = "apoz, bn_gamma, distribution_fit, fisher, geometric_median"


@pytest.mark.parametrize(("name", "meant"), [("ratiosum", "ratio_sum"), ("L2", "l2")])
def test_an_unknown_criterion_with_a_nearest_name(name, meant):
    error = raised(OptionError, lambda: fxprune.prune(small(), X, criterion=name))
    assert error.fault == f"no criterion `{name}`"
    assert error.details[0][0] == "known" and KNOWN in error.details[0][1]
    assert error.hint == f"did you mean `{meant}`?"


def test_an_unknown_criterion_like_no_other():
    error = raised(OptionError, lambda: fxprune.prune(small(), X, criterion="zzz"))
    assert error.hint == "pass one of these, or a function of your own"


@pytest.mark.parametrize("criterion", [3, {}, {"name": 3}, ["l1"]])
def test_a_criterion_that_is_no_name(criterion):
    error = raised(OptionError, lambda: fxprune.prune(small(), X, criterion=criterion))
    assert "criterion" in error.fault


CHOICES = {
    "scope": ("globl", "global"),
    "select_by": ("cumulativ", "cumulative"),
    "reduce": ("means", "mean"),
    "verify": ("shape", "shapes"),
    "mixing": ("norm", "norms"),
}


@pytest.mark.parametrize("name", CHOICES)
def test_an_option_that_is_not_one_of_the_known(name):
    wrong, meant = CHOICES[name]
    error = raised(OptionError, lambda: fxprune.prune(small(), X, **{name: wrong}))
    assert error.fault == f"{name}='{wrong}' is not known"
    assert error.details[0][0] == "known" and meant in error.details[0][1].split(", ")
    assert error.hint == f"did you mean `{meant}`?"


@pytest.mark.parametrize("name", CHOICES)
@pytest.mark.parametrize("value", ["", 3, ["x"]])
def test_an_option_of_another_type(name, value):
    error = raised(OptionError, lambda: fxprune.prune(small(), X, **{name: value}))
    assert error.fault == f"{name}={value!r} is not known"


@pytest.mark.parametrize("name", ["round_to", "min_channels"])
@pytest.mark.parametrize("value", [0, -8, 1.5, "8", True])
def test_a_count_that_is_none(name, value):
    error = raised(OptionError, lambda: fxprune.prune(small(), X, **{name: value}))
    other = ', or "auto"' if name == "round_to" else ""
    assert error.fault == f"{name}={value!r} must be a whole number of at least 1{other}"


@pytest.mark.parametrize(
    ("data", "said", "hint"),
    [
        ([X.numpy()], "batch 0 of data is a ndarray", "tensors: torch.from_numpy(...)"),
        ([X, (X.numpy(), 1)], "batch 1 of data is a ndarray", "tensors: torch.from_numpy(...)"),
        ([3], "batch 0 of data is a int", "a list or DataLoader of batches"),
        ((X, X), "data has no targets, and the criterion", "one batch is data=[(X, Y)]"),
    ],
)
def test_data_that_is_no_batches(data, said, hint):
    kind = OptionError if said.startswith("data has") else InputError
    error = raised(kind, lambda: fxprune.prune(small(), X, criterion="fisher", data=data))
    assert error.fault.startswith(said) and hint in error.hint


@pytest.mark.parametrize("value", [-0.1, 1.5])
def test_max_rate_outside_its_range(value):
    error = raised(OptionError, lambda: fxprune.prune(small(), X, max_rate=value))
    assert error.fault == f"max_rate={value} is outside [0, 1]"


@pytest.mark.parametrize(
    "options", [{"rate": 2}, {"scope": "x"}, {"criterion": "zzz"}, {"round_to": 0}]
)
def test_plan_checks_its_options_as_prune_does(options):
    analysis = fxprune.analyze(small(), X)
    ours = raised(OptionError, lambda: fxprune.plan(analysis, **options))
    assert str(ours) == str(raised(OptionError, lambda: fxprune.prune(small(), X, **options)))


def test_plan_of_a_model_says_to_analyze_it():
    error = raised(OptionError, lambda: fxprune.plan(small(), rate=0.5))
    assert "analyze" in str(error)


# -- ignore ----------------------------------------------------------------------------------------


def test_an_ignore_pattern_without_a_match():
    error = raised(OptionError, lambda: fxprune.prune(small(), X, ignore="layer9"))
    assert error.fault == "ignore pattern `layer9` matches nothing in the model"


def test_an_ignore_pattern_with_a_slip():
    error = raised(OptionError, lambda: fxprune.prune(small(), X, ignore=["3.wieght"]))
    assert error.hint == "did you mean `3.weight`?"


def test_an_empty_ignore_pattern():
    error = raised(OptionError, lambda: fxprune.prune(small(), X, ignore=[""]))
    assert error.fault == "ignore pattern `` matches nothing in the model"


def test_an_input_pattern_without_a_match():
    error = raised(OptionError, lambda: fxprune.prune(small(), X, ignore="in:layer9"))
    assert error.fault == "ignore pattern `in:layer9` matches nothing in the model"


def test_an_ignored_module_of_another_model():
    error = raised(OptionError, lambda: fxprune.prune(small(), X, ignore=[small()[3]]))
    assert error.fault == "ignore=Conv2d matches nothing in the model"


def test_an_ignored_type_that_is_not_there():
    error = raised(OptionError, lambda: fxprune.prune(small(), X, ignore=nn.LSTM))
    assert error.fault == "ignore=LSTM matches nothing in the model"


@pytest.mark.parametrize("item", [3, None, 2.5])
def test_an_ignore_item_of_another_kind(item):
    error = raised(OptionError, lambda: fxprune.prune(small(), X, ignore=["0", item]))
    assert error.fault == f"ignore holds a {type(item).__name__}"
    assert error.hint == "name patterns, modules or module types"


@pytest.mark.parametrize("ignore", [3, 2.5])
def test_ignore_that_is_no_list(ignore):
    assert "ignore" in raised(OptionError, lambda: fxprune.prune(small(), X, ignore=ignore)).fault


# -- models ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("value", "kind"), [(math.nan, "NaN"), (math.inf, "infinity"), (-math.inf, "infinity")]
)
@pytest.mark.parametrize("name", ["3.weight", "0.bias", "1.running_var"])
def test_weights_that_are_not_finite(name, value, kind):
    model = small()
    model.state_dict()[name].view(-1)[0] = value
    error = raised(ModelError, lambda: fxprune.prune(model, X))
    assert error.fault == f"`{name}` holds {kind}"
    assert "load or train sound ones first" in error.hint


@pytest.mark.parametrize("thing", [None, "resnet18", torch.relu, {}, 3, [nn.ReLU()]])
def test_what_is_not_a_module(thing):
    error = raised(ModelError, lambda: fxprune.prune(thing, X))
    assert error.fault == f"a torch.nn.Module is needed, not {type(thing).__name__}"
    assert error.hint == "pass the model object itself"


def test_a_module_class_is_not_a_module():
    assert raised(ModelError, lambda: fxprune.prune(nn.ReLU, X)).fault.endswith("not type")


def test_a_state_dict_is_not_a_module():
    error = raised(ModelError, lambda: fxprune.prune(small().state_dict(), X))
    assert error.fault == "a torch.nn.Module is needed, not OrderedDict"


def test_analyze_and_apply_check_the_model_too():
    plan = fxprune.prune(small(), X).fxprune.plan
    for call in (lambda: fxprune.analyze("net", X), lambda: fxprune.apply("net", plan)):
        assert raised(ModelError, call).fault == "a torch.nn.Module is needed, not str"


def test_a_wrapper_of_data_parallel():
    error = raised(ModelError, lambda: fxprune.prune(nn.DataParallel(small()), X))
    assert error.fault == "the model is wrapped in DataParallel"
    assert error.hint == "prune model.module, and wrap the result again"


def test_a_wrapper_of_distributed_data_parallel(tmp_path):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1
    )
    try:
        wrapped = nn.parallel.DistributedDataParallel(small())
        error = raised(ModelError, lambda: fxprune.prune(wrapped, X))
    finally:
        torch.distributed.destroy_process_group()
    assert error.fault == "the model is wrapped in DistributedDataParallel"
    assert "model.module" in error.hint


def test_a_compiled_model():
    error = raised(ModelError, lambda: fxprune.prune(torch.compile(small()), X))
    assert error.fault == "the model is wrapped in OptimizedModule"
    assert "model._orig_mod" in error.hint


@pytest.mark.parametrize("make", [torch.jit.script, lambda m: torch.jit.trace(m.eval(), X)])
def test_torchscript(make):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = make(small())
    error = raised(ModelError, lambda: fxprune.prune(scripted, X))
    assert error.fault == "the model is TorchScript, which has no Python forward to trace"
    assert error.hint == "prune the eager model"


def test_lazy_modules():
    model = nn.Sequential(nn.LazyConv2d(8, 3), nn.ReLU(), nn.LazyConv2d(2, 3))
    error = raised(ModelError, lambda: fxprune.prune(model, X))
    assert error.fault == "module `0` (LazyConv2d) is lazy: its shapes are not known yet"
    model(X)
    assert fxprune.prune(model, X).get_submodule("0").weight.shape[0] == 4


def test_quantized_modules():
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = torch.ao.quantization.quantize_dynamic(model, {nn.Linear})
    error = raised(ModelError, lambda: fxprune.prune(model, torch.randn(2, 4)))
    assert error.fault == "module `0` (Linear) is quantized: its weights are packed integers"
    assert error.hint == "prune the float model, then quantize the pruned one"


def test_a_model_on_two_devices():
    model = small()
    model[3].to("meta")
    error = raised(ModelError, lambda: fxprune.prune(model, X))
    assert error.fault == "the model is on several devices: cpu, meta"
    assert [label for label, _ in error.details] == ["cpu", "meta"]
    assert error.details[1][1].startswith("3.") and "model.to(device)" in error.hint


# -- nothing to prune ------------------------------------------------------------------------------


def test_only_outputs():
    error = raised(NothingToPrune, lambda: fxprune.prune(nn.Sequential(nn.Conv2d(3, 4, 3)), X))
    assert error.fault == "no channel of Sequential may go"
    assert error.details == [("0", "4 channels: reaches the network's output")]
    assert "frozen" in error.hint


@pytest.mark.parametrize("model", [nn.Sequential(), nn.ReLU(), nn.AvgPool2d(2)])
def test_no_layers(model):
    error = raised(NothingToPrune, lambda: fxprune.prune(model, X))
    assert error.hint == "no layer makes channels that are not the input's or the output's"


def test_a_depthwise_layer_on_the_input():
    """The layer is known; its channels are the input's."""
    model = nn.Sequential(nn.Conv2d(9, 9, 3, groups=9), nn.BatchNorm2d(9), nn.ReLU())
    error = raised(NothingToPrune, lambda: fxprune.prune(model, torch.randn(2, 9, 8, 8)))
    assert "a rule knows" not in str(error)


def test_everything_is_an_output():
    error = raised(
        NothingToPrune, lambda: fxprune.prune(nn.Sequential(nn.Linear(3, 4)), torch.randn(2, 3))
    )
    assert error.details[0][1].startswith("4 channels")


def test_the_reason_names_the_source_line():
    error = raised(NothingToPrune, lambda: fxprune.prune(Two(lambda x: x.softmax(1)), X))
    (label, text), *_ = error.details
    assert label == "a" and text.startswith("8 channels: softmax at %softmax mixes channels")
    assert "test_errors.py:" in text


def test_everything_ignored_is_said_in_the_report():
    pruned = fxprune.prune(small(), X, ignore="*")
    assert pruned.fxprune.plan.removed == 0
    assert all(row.reason for row in pruned.fxprune.report.groups)


# -- inputs ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("inputs", ["x", 3, X.numpy(), (i for i in [X])])
def test_inputs_of_another_type(inputs):
    error = raised(InputError, lambda: fxprune.prune(small(), inputs))
    assert error.fault == f"example_inputs is a {type(inputs).__name__}"
    assert "a tensor, a tuple of forward's arguments, or a dict" in error.hint


@pytest.mark.parametrize(
    ("inputs", "text"),
    [
        ((X, X), "too many positional arguments"),
        ((), "missing a required argument: 'input'"),
        ({"y": X}, "missing a required argument: 'input'"),
        ({"input": X, "y": X}, "unexpected keyword argument 'y'"),
    ],
)
def test_inputs_that_forward_does_not_take(inputs, text):
    error = raised(InputError, lambda: fxprune.prune(small(), inputs))
    assert (
        error.fault.startswith("the example inputs do not fit Sequential.forward: ")
        and text in error.fault
    )
    assert "example_inputs=(x,)" in error.hint


WRONG = {
    "channels": torch.randn(2, 4, 8, 8),
    "rank": torch.randn(2, 3),
    "size": torch.randn(2, 3, 2, 2),
    "dtype": torch.randint(0, 5, (2, 3, 8, 8)),
    "precision": X.double(),
    "nothing": (None,),
    "a list": ([[1, 2]],),
}


@pytest.mark.parametrize("name", WRONG)
def test_inputs_of_the_wrong_shape_or_dtype(name):
    """Which layer cannot take them is said by name: a Sequential has no source line of its own."""
    error = raised(InputError, lambda: fxprune.prune(small(), WRONG[name]))
    assert error.fault.startswith("Sequential.forward fails on the example inputs: ")
    assert dict(error.details)["in"].startswith("Conv2d `0`")
    assert "example_inputs=" in error.hint


def test_the_shape_that_a_layer_cannot_take_is_named():
    error = raised(InputError, lambda: fxprune.prune(small(), WRONG["channels"]))
    assert dict(error.details)["in"] == "Conv2d `0` on 2x4x8x8"


def test_a_failing_forward_names_its_line():
    def fails(x):
        return x.view(2, 7, -1)

    error = raised(InputError, lambda: fxprune.prune(Two(fails), X))
    rows = dict(error.details)
    assert "in fails: return x.view(2, 7, -1)" in rows["at"] and rows["after"].startswith("%a")


@pytest.mark.parametrize(
    ("between", "text"),
    [
        (lambda x: {}["k"], "KeyError: 'k'"),
        (lambda x: x.nothing, "AttributeError"),
        (lambda x: x[9], "IndexError"),
        (lambda x: 1 / 0, "ZeroDivisionError"),
    ],
)
def test_an_error_inside_forward_is_told_with_its_place(between, text):
    error = raised(InputError, lambda: fxprune.prune(Two(between), X))
    assert text in error.fault and "test_errors.py" in dict(error.details)["at"]
    assert error.__cause__ is not None


def test_no_usual_input_fits():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(123, 2))
    error = raised(InputError, lambda: fxprune.prune(model))
    assert error.fault == "no usual input fits Sequential"
    assert [label for label, _ in error.details][:2] == ["2x3x224x224", "2x3x32x32"]
    assert error.hint == "pass example_inputs=(x,) as forward takes them"


def test_no_usual_input_for_two_arguments():
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Conv2d(3, 8, 1)

        def forward(self, x, other):
            return self.a(x) + self.a(other)

    error = raised(InputError, lambda: fxprune.prune(Both()))
    assert "missing a required argument: 'other'" in error.details[0][1]


def test_an_unbatched_example_is_named_as_such():
    """Without a batch dim no rule fits; the reason is that, not a model without layers."""
    error = raised(
        NothingToPrune, lambda: fxprune.prune(small()[0:1].append(nn.Conv2d(8, 2, 1)), X[0])
    )
    assert "a rule knows" not in str(error)


# -- values in control flow ------------------------------------------------------------------------


def branch(x):
    if x.sum() > 0:
        return x
    return -x


VALUES = {
    "a branch": branch,
    "item": lambda x: x * x.max().item(),
    "float": lambda x: x * float(x.max()),
    "int": lambda x: x[: int(x.argmax())],
    "tolist": lambda x: x * x.tolist()[0][0][0][0],
    "a loop": lambda x: next(x for _ in range(x.argmax())),
    "a mask": lambda x: x[x.mean((1, 2, 3)) > 0],
    "nonzero": lambda x: x[x.mean((1, 2, 3)).nonzero().flatten()],
    "all": lambda x: x if torch.all(x > 0) else -x,
    "allclose": lambda x: x if torch.allclose(x, x * 2) else -x,
}


@pytest.mark.parametrize("name", VALUES)
def test_a_forward_that_depends_on_values_names_the_line(name):
    error = raised(TraceError, lambda: fxprune.prune(Two(VALUES[name]), X, frontend="symbolic"))
    assert error.fault.startswith("Two.forward depends on the values in a tensor")
    at = dict(error.details)["at"]
    line = VALUES[name].__code__.co_firstlineno
    assert re.search(rf"test_errors.py:({line}|{line + 1}), in ", at), at
    assert "a graph has one path for all inputs" in error.hint


def test_the_line_of_a_branch_is_quoted():
    error = raised(TraceError, lambda: fxprune.prune(Two(branch), X, frontend="symbolic"))
    assert dict(error.details)["at"].endswith("in branch: if x.sum() > 0:")


def test_a_scripted_function_is_refused_or_right():
    """Its ops cannot be seen; a graph without them would compute something else."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        scripted = torch.jit.script(_swish)
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Two(scripted))
    model[1].a = nn.Conv2d(6, 8, 1)
    try:
        pruned = fxprune.prune(model, X, rate=0.0)
    except FxpruneError as error:
        assert isinstance(error, TraceError) and "scripted function" in str(error)
    else:
        assert torch.allclose(pruned(X), model(X), atol=1e-5)


def _swish(x):
    return x * x.sigmoid()


def test_weights_swapped_inside_forward_are_refused_or_right():
    """A module called with other weights than its own is not that module."""

    class Swapped(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.o = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 2, 1)

        def forward(self, x):
            twice = {"weight": self.b.weight * 2}
            return self.o(torch.func.functional_call(self.b, twice, (self.a(x),)))

    model = Swapped().eval()
    try:
        pruned = fxprune.prune(model, X, rate=0.0)
    except FxpruneError as error:
        assert isinstance(error, (TraceError, VerificationError))
    else:
        assert torch.allclose(pruned(X), model(X), atol=1e-5)


def test_code_without_a_graph_is_named():
    def mapped(x):
        return torch.vmap(lambda one: one * 2)(x)

    error = raised(TraceError, lambda: fxprune.prune(Two(mapped), X, frontend="symbolic"))
    assert error.fault == "a tensor came from code that the tracer cannot see"
    assert "test_errors.py" in dict(error.details)["at"]


def test_autocast_inside_forward_is_named():
    def half(x):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            return torch.matmul(x, x)

    error = raised(TraceError, lambda: fxprune.prune(Two(half), X, frontend="symbolic"))
    assert error.fault == "forward switches autocast on or off, which a graph cannot hold"
    assert "return torch.matmul(x, x)" in dict(error.details)["at"]


def test_autocast_around_the_call_changes_nothing():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        pruned = fxprune.prune(small(), X)
    assert pruned.fxprune.report.verification.difference < 1e-9


def test_a_network_pruned_in_inference_mode_trains():
    with torch.inference_mode():
        pruned = fxprune.prune(small(), X + 0)
    pruned(X).sum().backward()
    assert all(p.grad is not None for p in pruned.parameters())


@pytest.mark.parametrize("name", ["graph", "code", "meta", "for"])
def test_a_child_whose_name_a_graph_module_needs(name):
    """``graph`` and ``code`` are attributes of every result, ``for`` is no name in its code."""
    model = nn.Sequential()
    model.add_module(name, nn.Conv2d(3, 8, 1))
    model.add_module("last", nn.Conv2d(8, 2, 1))
    try:
        pruned = fxprune.prune(model, X)
    except FxpruneError as error:
        assert isinstance(error, ModelError) and f"`{name}`" in str(error)
        assert_style(error)
    else:
        assert pruned(X).shape == (2, 2, 8, 8)


TAKEN = ["graph", "code", "meta", "recompile", "fxprune", "_graph", "self", "class", "training"]


@pytest.mark.parametrize("kind", ["parameter", "buffer", "child"])
@pytest.mark.parametrize("name", TAKEN)
def test_a_name_that_a_graph_module_needs(kind, name):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1))
    table = {"parameter": model._parameters, "buffer": model._buffers, "child": model._modules}
    table[kind][name] = nn.ReLU() if kind == "child" else nn.Parameter(torch.ones(8))
    error = raised(ModelError, lambda: fxprune.prune(model, X))
    assert error.fault.startswith(f"{kind} `{name}` ") and "rename it" in error.hint


@pytest.mark.parametrize("kind", ["parameter", "buffer", "child"])
def test_a_keyword_as_a_name_further_in(kind):
    model = small()
    conv = model[0]
    table = {"parameter": conv._parameters, "buffer": conv._buffers, "child": conv._modules}
    table[kind]["class"] = nn.ReLU() if kind == "child" else nn.Parameter(torch.ones(8))
    error = raised(ModelError, lambda: fxprune.prune(model, X))
    assert "`0.class`" in error.fault and "keyword" in error.hint


# -- unknown ops -----------------------------------------------------------------------------------


def exotic(x):
    return torch.linalg.matrix_exp(x)


def test_strict_refuses_an_unknown_op():
    error = raised(RuleError, lambda: fxprune.prune(Two(exotic), X, strict=True))
    rows = dict(error.details)
    assert error.fault == "linalg_matrix_exp has no rule" or error.fault.endswith(
        "matrix_exp has no rule"
    )
    assert (
        rows["node"] == "%linalg_matrix_exp"
        and "in exotic: return torch.linalg.matrix_exp(x)" in rows["at"]
    )
    assert "fxprune.rules.load" in error.hint


def test_without_strict_an_unknown_op_freezes_and_is_told_once():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), Two(exotic))
    model[1].a = nn.Conv2d(6, 8, 1)
    pruned = fxprune.prune(model, X)
    (warning,) = pruned.fxprune.report.warnings
    assert "8 channels are frozen because of it" in warning and "test_errors.py:" in warning
    assert pruned.get_submodule("0").weight.shape[0] == 3
    assert pruned.get_submodule("1.a").weight.shape == (8, 3, 1, 1)


# -- criteria --------------------------------------------------------------------------------------

CRITERIA = {
    "three scores": (lambda g: torch.ones(3), "gave (3,)"),
    "a column": (lambda g: torch.ones(len(g), 1), "gave (8, 1)"),
    "a float": (lambda g: 1.0, "gave float"),
    "None": (lambda g: None, "gave NoneType"),
    "an array": (lambda g: np.ones(len(g)), "gave ndarray"),
    "floats in a list": (lambda g: [1.0] * len(g), "gave float"),
    "NaN": (lambda g: torch.full((len(g),), math.nan), "gave nan for channel 0"),
    "infinity": (lambda g: torch.full((len(g),), math.inf), "gave inf for channel 0"),
    "no scores": (lambda g: [], "group 0"),
}


@pytest.mark.parametrize("name", CRITERIA)
def test_a_criterion_that_gives_no_scores(name):
    function, text = CRITERIA[name]
    error = raised(CriterionError, lambda: fxprune.prune(small(), X, criterion=function))
    assert (
        text in error.fault and "criterion `<lambda>`" in error.fault and "group 0" in error.fault
    )


def test_the_criterion_is_told_the_shape_it_should_give():
    error = raised(
        CriterionError, lambda: fxprune.prune(small(), X, criterion=lambda g: torch.ones(3))
    )
    assert error.hint == "return one score a channel: shape (8,), or a list of those"


@pytest.mark.parametrize(
    "function", [lambda g: 1 / 0, lambda g: {}["k"], lambda g: g.nothing, lambda g, h: 1]
)
def test_a_criterion_that_fails_is_named_with_its_cause(function):
    error = raised(CriterionError, lambda: fxprune.prune(small(), X, criterion=function))
    assert "<lambda>" in error.fault and "group 0" in str(error)
    assert error.__cause__ is not None and not isinstance(error.__cause__, FxpruneError)


def test_a_registered_criterion_is_named():
    @fxprune.criterion("test_errors_broken")
    def broken(group):
        return None

    try:
        error = raised(
            CriterionError, lambda: fxprune.prune(small(), X, criterion="test_errors_broken")
        )
        assert "criterion `test_errors_broken`" in error.fault
    finally:
        fxprune.criteria._known.pop("test_errors_broken")


# -- plans -----------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def made() -> dict[str, Any]:
    return json.loads(fxprune.prune(small(), X, criterion="l1").fxprune.plan.to_json())


def edited(made: dict[str, Any], **fields: Any) -> fxprune.Plan:
    return fxprune.Plan.from_json(json.dumps({**made, **fields}))


def with_kept(made: dict[str, Any], name: str, dim: int, rows: Any) -> fxprune.Plan:
    kept = copy.deepcopy(made["kept"])
    kept.setdefault(name, {})[str(dim)] = rows
    return edited(made, kept=kept)


def test_a_plan_for_another_model_lists_the_differences(made):
    wide = nn.Sequential(nn.Conv2d(3, 16, 3), *small()[1:])
    error = raised(PlanError, lambda: fxprune.apply(wide, edited(made)))
    assert error.fault == "the plan is for another model: 2 parameters differ"
    assert error.details == [
        ("differs", "0.bias is [16], planned for [8]"),
        ("differs", "0.weight is [16, 3, 3, 3], planned for [8, 3, 3, 3]"),
    ]
    assert error.hint == "the plan was made for Sequential; apply it to a model built the same way"


def test_a_plan_for_a_model_of_other_names(made):
    error = raised(
        PlanError, lambda: fxprune.apply(nn.Sequential(nn.Conv2d(3, 8, 3)), edited(made))
    )
    assert error.fault == "the plan is for another model: 9 parameters differ"
    assert len(error.details) == 9 and error.details[-1] == ("", "and 1 more")
    assert any(text.endswith("is not in the model") for _, text in error.details)


def test_verify_checks_the_plan_too(made):
    pruned = fxprune.apply(small(), edited(made))
    wide = nn.Sequential(nn.Conv2d(3, 16, 3), *small()[1:])
    raised(PlanError, lambda: fxprune.verify(wide, pruned, edited(made)))


@pytest.mark.parametrize("rows", [[0, 1, 2, 99], [-1, 1, 2, 3], [3, 2, 1, 0], [1, 1, 2, 3]])
def test_a_plan_with_bad_indices(made, rows):
    error = raised(PlanError, lambda: fxprune.apply(small(), with_kept(made, "0.weight", 0, rows)))
    assert error.fault == "the plan's indices of 0.weight dim 0 are not ascending and below 8"


def test_a_plan_that_breaks_a_coupling(made):
    rows = [*range(5)]
    error = raised(PlanError, lambda: fxprune.apply(small(), with_kept(made, "0.weight", 0, rows)))
    assert error.fault.startswith("the plan breaks the coupling of ")
    assert "explain" in error.hint


def test_a_plan_that_leaves_out_a_coupled_parameter(made):
    alone = edited(made, kept={"0.weight": made["kept"]["0.weight"]})
    error = raised(PlanError, lambda: fxprune.apply(small(), alone))
    assert "coupl" in error.fault


def test_a_plan_that_keeps_nothing(made):
    nothing = {name: {dim: [] for dim in dims} for name, dims in made["kept"].items()}
    raised(PlanError, lambda: fxprune.apply(small(), edited(made, kept=nothing)))


def test_a_plan_that_removes_an_output(made):
    error = raised(PlanError, lambda: fxprune.apply(small(), with_kept(made, "5.weight", 0, [0])))
    assert error.fault == "the plan removes channels of 5.weight dim 0 that cannot go"


@pytest.mark.parametrize(("name", "dim"), [("nope.weight", 0), ("0.weight", 7), ("0.weight", 1)])
def test_a_plan_that_narrows_what_has_no_channels(made, name, dim):
    error = raised(PlanError, lambda: fxprune.apply(small(), with_kept(made, name, dim, [0])))
    assert error.fault == f"the plan narrows {name} dim {dim}, which has no channels that can go"


def test_a_plan_with_blocks_where_there_are_none(made):
    plan = with_kept(made, "0.weight", 0, [[0, 1], [2, 3]])
    error = raised(PlanError, lambda: fxprune.apply(small(), plan))
    assert (
        error.fault == "the plan's indices of 0.weight dim 0 do not have the layout of its blocks"
    )


def grouped() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3, groups=2), nn.Conv2d(8, 2, 1))


def test_a_plan_with_blocks_of_different_length():
    plan = json.loads(fxprune.prune(grouped(), X).fxprune.plan.to_json())
    for name in ("0.weight", "0.bias"):
        plan["kept"][name]["0"] = [0, 1, 2, 4]
    plan["kept"]["1.weight"]["1"] = [[0, 1, 2], [0]]
    uneven = fxprune.Plan.from_json(json.dumps(plan))
    error = raised(PlanError, lambda: fxprune.apply(grouped(), uneven))
    assert "1.weight" in error.fault


def test_a_plan_without_blocks_where_there_are_some():
    plan = json.loads(fxprune.prune(grouped(), X).fxprune.plan.to_json())
    plan["kept"]["1.weight"]["1"] = [0, 1]
    flat = fxprune.Plan.from_json(json.dumps(plan))
    error = raised(PlanError, lambda: fxprune.apply(grouped(), flat))
    assert "1.weight dim 1" in error.fault


TEXTS = {
    "nothing": "",
    "half a file": '{"kept": ',
    "a list": "[]",
    "null": "null",
    "a number": "3",
    "a path": "plan.json",
    "an unknown field": '{"colour": 3}',
    "indices that are no list": '{"kept": {"0.weight": {"0": "x"}}}',
    "an index that is half": '{"kept": {"0.weight": {"0": [0.5]}}}',
    "a dim that is no number": '{"kept": {"0.weight": {"x": [0]}}}',
    "a format to come": '{"format": 99}',
}


@pytest.mark.parametrize("name", TEXTS)
def test_a_text_that_is_no_plan(name):
    error = raised(PlanError, lambda: fxprune.Plan.from_json(TEXTS[name]))
    assert error.fault.startswith("not a plan: ")


def test_an_unknown_field_of_a_plan_is_named():
    error = raised(PlanError, lambda: fxprune.Plan.from_json(TEXTS["an unknown field"]))
    assert error.fault.startswith("not a plan: colour: ")


NO_INPUTS = [
    [["x"]],
    [[[2, 3, 8, 8], "floaty"]],
    3,
    {},
    {"args": 3, "kwargs": {}},
    {"args": [{"set": []}], "kwargs": {}},
    {"args": [{"tensor": [[2], "floaty"]}], "kwargs": {}},
    {"args": [], "kwargs": [1]},
    {"args": [{"a": 1, "b": 2}], "kwargs": {}},
    {"args": [{"float": "x"}], "kwargs": {}},
    {"args": [{"dict": [[{"list": []}, 1]]}], "kwargs": {}},
]


@pytest.mark.parametrize("inputs", NO_INPUTS)
def test_a_plan_whose_inputs_are_no_shapes(made, inputs):
    error = raised(PlanError, lambda: fxprune.apply(small(), edited(made, inputs=inputs)))
    assert "inputs" in error.fault


@pytest.mark.parametrize("plan", [None, {}, "plan.json"])
def test_what_is_not_a_plan(plan):
    error = raised(PlanError, lambda: fxprune.apply(small(), plan))
    assert "plan" in error.fault and "from_json" in str(error)


def test_verify_finds_a_changed_weight(made):
    model, plan = small(), edited(made)
    pruned = fxprune.apply(model, plan)
    pruned.get_submodule("3").weight.data.mul_(2)
    error = raised(VerificationError, lambda: fxprune.verify(model, pruned, plan))
    assert "differs from the masked original by" in error.fault


def test_verify_of_another_pruned_network(made):
    pruned = fxprune.prune(small(), X, rate=0.25)
    raised(VerificationError, lambda: fxprune.verify(small(), pruned, edited(made)))


def test_verify_of_what_is_no_module(made):
    raised(ModelError, lambda: fxprune.verify(small(), None, edited(made)))


def test_verify_of_a_network_that_was_not_pruned(made):
    error = raised(ModelError, lambda: fxprune.verify(small(), small(), edited(made)))
    assert error.fault == "a pruned network is needed, not Sequential"
    assert error.hint == "pass what fxprune.prune or fxprune.apply gave"


# -- explain ---------------------------------------------------------------------------------------


def test_explaining_an_unknown_layer():
    analysis = fxprune.analyze(small(), X)
    error = raised(OptionError, lambda: analysis.explain("0.weigth"))
    assert (
        str(error) == "`0.weigth` has no channels in this network\n\nhint: did you mean `0.weight`?"
    )


# -- rule files ------------------------------------------------------------------------------------

DIMS = "operands: [input]"
BROKEN = {
    "not YAML": ("a: [1, 2\nb: }", 2, "is not YAML"),
    "a tab": ("conv:\n\tdims: n c -> n c\n", 2, "is not YAML"),
    "a tag of Python": ("a: !!python/name:os.system\n", 1, "is not YAML"),
    "an unknown field": (f"a:\n  dims: n c -> n c\n  {DIMS}\n  colour: red\n", 4, "field `colour`"),
    "a letter twice": (f"a:\n  dims: n c c -> n c\n  {DIMS}\n", 1, "`c` stands twice in `n c c`"),
    "an open bracket": (
        f"a:\n  dims: n (c d -> n c\n  {DIMS}\n",
        1,
        "a bracket is not closed in `n (c d`",
    ),
    "a closing bracket": (
        f"a:\n  dims: n c) -> n c\n  {DIMS}\n",
        1,
        "`)` is out of place in `n c)`",
    ),
    "empty brackets": (f"a:\n  dims: n () -> n c\n  {DIMS}\n", 1, "`)` is out of place in `n ()`"),
    "no arrow": (f"a:\n  dims: n c\n  {DIMS}\n", 1, "`n c` has no `->`"),
    "two arrows": (f"a:\n  dims: n -> c -> n\n  {DIMS}\n", 1, "`-> n` is not part of the notation"),
    "a digit": (f"a:\n  dims: n 3 -> n c\n  {DIMS}\n", 1, "`3` is not part of the notation"),
    "a star in brackets": (
        f"a:\n  dims: n (c *s) -> n c\n  {DIMS}\n",
        1,
        "`*s` cannot stand inside brackets",
    ),
    "a star and a letter": (
        "a:\n  dims: n *s, s -> n s\n  operands: [x, y]\n",
        1,
        "both with and without a star",
    ),
    "an optional first": (f"a:\n  dims: n c? -> n c\n  {DIMS}\n", 1, "the first operand of"),
    "an optional output": (f"a:\n  dims: n c -> n c?\n  {DIMS}\n", 1, "the output of"),
    "an unused operand": (
        "a:\n  dims: n c, k m -> n c\n  operands: [x, w]\n",
        1,
        "no letter of operand `w` (k m)",
    ),
    "an unknown letter": (
        f"a:\n  dims: n c -> n c\n  {DIMS}\n  macs: n q\n",
        1,
        "`q` is not a letter of",
    ),
    "too few operands": (
        f"a:\n  dims: n c, c -> n c\n  {DIMS}\n",
        1,
        "1 operands are named, `n c, c -> n c` has 2",
    ),
    "no operands": ("a:\n  dims: n c -> n c\n", 1, "0 operands are named"),
    "an unknown scale": (
        f"a:\n  dims: n c -> n c\n  {DIMS}\n  scales: gamma\n",
        1,
        "`gamma` is not an operand",
    ),
    "a call without arguments": (
        "a:\n  kind: pointwise\n  calls: [torch.relu]\n",
        1,
        "`torch.relu` is not a call",
    ),
    "a call cut short": (
        "a:\n  kind: pointwise\n  calls: ['torch.relu(x']\n",
        1,
        "`torch.relu(x` is not a call",
    ),
    "an unknown kind": ("a:\n  kind: pointwize\n  words: b\n", 2, "field `kind`"),
    "no kind": ("a:\n  words: b\n", 1, "field `kind`"),
    "kind dims without dims": ("a:\n  kind: dims\n  words: b\n", 1, "`dims` goes with kind dims"),
    "dims of another kind": (
        f"a:\n  kind: cat\n  dims: n c -> n c\n  {DIMS}\n",
        1,
        "`dims` goes with kind dims",
    ),
    "a list at the top": ("- a\n- b\n", 1, "must hold named rules"),
    "a word at the top": ("hello", 1, "must hold named rules"),
    "a rule that is a list": ("\na: [1, 2]\n", 2, "rule `a` must hold fields"),
    "a rule without fields": ("a:\n", 1, "rule `a` must hold fields"),
    "words that are a number": ("a:\n  kind: cat\n  words: 3\n", 3, "field `words`"),
    "zero that is unknown": ("a:\n  kind: cat\n  zero: maybe\n  words: b\n", 3, "field `zero`"),
    "a sample without inputs": (
        "a:\n  kind: cat\n  words: b\n  samples: [{call: c}]\n",
        4,
        "field `samples.0.inputs`",
    ),
    "a size that is a word": (
        "a:\n  dims: n (c r) -> n c\n  operands: [x]\n  fixed: {r: two}\n",
        4,
        "field `fixed.r`",
    ),
    "a name that is a number": ("3:\n  kind: cat\n  words: b\n", 1, "3"),
    "a rule twice": ("a:\n  kind: cat\n  words: b\na:\n  kind: cat\n  words: c\n", 4, "twice"),
    "an unknown fix": ("a:\n  kind: move\n  fix: bananas\n  words: b\n", 3, "bananas"),
    "an operand no call has": (
        f"a:\n  dims: n c -> n c\n  {DIMS}\n  calls: ['b(x)']\n",
        1,
        "input",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_rule_file_names_file_and_line(name, tmp_path):
    text, line, part = BROKEN[name]
    file = tmp_path / "my.yaml"
    file.write_text(text)
    before = len(rules.current().rules)
    error = raised(RuleError, lambda: rules.load(file))
    assert error.fault.startswith(f"{file}:") and part in error.fault
    assert re.match(rf"{re.escape(str(file))}:({line}|{line + 1})\b", error.fault), error.fault
    assert len(rules.current().rules) == before


def test_a_slip_in_a_field_name_gets_the_nearest(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("a:\n  dims: n c -> n c\n  operand: [input]\n")
    assert raised(RuleError, lambda: rules.load(file)).hint == "did you mean `operands`?"


def test_yamls_no_is_not_a_word(tmp_path):
    """``zero: no`` is read as false; the message says to quote it."""
    file = tmp_path / "my.yaml"
    file.write_text("a:\n  kind: pointwise\n  zero: no\n  words: b\n")
    assert '"no"' in str(raised(RuleError, lambda: rules.load(file)))


def test_a_rule_file_that_is_not_text(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_bytes(b"a: \xe9\n")
    error = raised(RuleError, lambda: rules.load(file))
    assert str(file) in error.fault and "UTF-8" in error.fault


@pytest.mark.parametrize("name", ["nope.yaml", ""])
def test_a_rule_file_that_is_not_there(name, tmp_path):
    error = raised(RuleError, lambda: rules.load(tmp_path / name))
    assert str(tmp_path) in error.fault


@pytest.mark.parametrize("text", ["", "# nothing yet\n"])
def test_an_empty_rule_file_is_fine(text, tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text(text)
    before = len(rules.current().rules)
    rules.load(file)
    assert len(rules.current().rules) == before


@pytest.mark.parametrize("name", [0, None, nn.Conv2d, nn.ReLU(), ["0"], 2.5])
def test_explaining_what_is_no_name(name):
    analysis = fxprune.analyze(small(), X)
    error = raised(OptionError, lambda: analysis.explain(name))
    assert error.fault == f"explain takes names, not a {type(name).__name__}" and error.hint
    if name is not None:
        raised(OptionError, lambda: analysis.explain("0", name))


# -- shortfalls ------------------------------------------------------------------------------------


def test_of_which_nothing_was_asked_gave_no_less():
    report = fxprune.prune(small(), X, rate=0).fxprune.report
    assert not report.shortfalls() and "gave less" not in str(report)


def test_a_layer_of_which_nothing_was_asked_gave_no_less():
    def short(**options):
        rows = fxprune.prune(small(), X, rate=0.5, **options).fxprune.report.shortfalls()
        return [row.name for row in rows]

    assert short() == ["5"] and short(ignore="3") == ["3", "5"]
    assert short(ignore="3", rates={"3": 0, "5": 0}) == []


# -- verification ----------------------------------------------------------------------------------


@pytest.mark.parametrize("last", [lambda y: y / 0, lambda y: torch.log(-1 - y.abs())])
def test_outputs_of_which_none_is_finite_are_not_called_equal(last):
    model = nn.Sequential(Two(torch.relu), Last(last))
    report = fxprune.prune(model, X, rate=0.5).fxprune.report
    assert report.verification.difference is None
    note = "no output of the masked original is finite on 2x3x8x8 (float64)"
    assert report.verification.note == note
    assert f"shapes proven; numbers not compared: {note}" in str(report)


def test_outputs_that_are_finite_are_compared_and_counted():
    model = nn.Sequential(Two(torch.relu), Last(lambda y: torch.where(y > 0, y, math.nan)))
    pruned = fxprune.prune(model, X, rate=0.5)
    found = pruned.fxprune.report.verification
    assert found.difference < 1e-9 and 0 < found.elements < 2 * 2 * 8 * 8
    next(pruned.parameters()).data.add_(1)
    raised(VerificationError, lambda: fxprune.verify(model, pruned, pruned.fxprune.plan))
