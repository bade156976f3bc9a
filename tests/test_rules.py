"""Rules: every one is probed by running its ops; wrong ones are caught; broken files say where."""

from __future__ import annotations

import sys
import textwrap
from pathlib import Path

import pytest
import torch
from torch import nn

import fxprune
from fxprune import rules as rule_files
from fxprune import samples
from fxprune.errors import RuleError
from fxprune.probe import Finding, probe
from fxprune.rules import Rules, read
from fxprune.samples import resolve, spellings

_SHIPPED = rule_files.build(sorted((rule_files.folder() / "ops").glob("*.yaml"))).rules


@pytest.fixture(autouse=True)
def _rules_in_force():
    """Leave the rules in force as they were."""
    before = rule_files.current()
    yield
    rule_files._current = before


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(textwrap.dedent(text))
    return path


# -- every shipped rule is what its ops do ---------------------------------------------------------


@pytest.mark.parametrize("rule", _SHIPPED, ids=lambda rule: f"{Path(rule.where).name}-{rule.name}")
def test_shipped_rule_is_what_its_ops_do(rule):
    findings = probe(rule)
    assert not findings, "\n".join(map(str, findings))


def test_a_sample_of_a_library_that_is_not_installed_is_left_out(monkeypatch):
    (rule,) = (rule for rule in _SHIPPED if rule.name == "batch_norm_act")
    monkeypatch.setitem(sys.modules, "timm", None)
    for module in (samples, sys.modules["fxprune.probe"]):
        monkeypatch.setattr(module, "resolve", lambda name: None)
    assert not probe(rule)


def test_names_of_shipped_rules_are_unique():
    names = [rule.name for rule in _SHIPPED]
    assert sorted(names) == sorted(set(names))


def test_no_call_is_claimed_by_two_rules_without_conditions():
    claims: dict[str, list[str]] = {}
    for rule in _SHIPPED:
        if not rule.when:
            for text in (*rule.calls, *rule.modules):
                claims.setdefault(text.partition("(")[0], []).append(rule.name)
            for word in rule.words:
                claims.setdefault(word, []).append(rule.name)
    assert {name: who for name, who in claims.items() if len(who) > 1} == {}


# -- rules that are wrong --------------------------------------------------------------------------

WRONG = {
    "glu_as_pointwise": (
        """
        x:
          kind: pointwise
          modules: [torch.nn.GLU(input)]
          samples: [{call: torch.nn.GLU, init: [1], inputs: [[2, 6, 3, 5]]}]
        """,
        "gives [2, 3, 3, 5], the rule says [2, 6, 3, 5]",
    ),
    "prelu_without_a_weight_letter": (
        """
        x:
          dims: "n c *s -> n c *s"
          operands: [input]
          modules: [torch.nn.PReLU(input)]
          samples: [{call: torch.nn.PReLU, init: [4], inputs: [[2, 4, 3, 5]]}]
        """,
        "without part of x0 dim 1 it does not run",
    ),
    "prelu_scaled_to_zero_by_its_weight": (
        """
        x:
          dims: "n c *s, c -> n c *s"
          operands: [input, weight]
          sizes: {num_parameters: c}
          modules: [torch.nn.PReLU(input)]
          samples: [{call: torch.nn.PReLU, init: [4], inputs: [[2, 4, 3, 5]]}]
        """,
        "masked channels are said to stay zero, and do not",
    ),
    "convolution_without_groups": (
        """
        x:
          dims: "n i *s, o i *k, o? -> n o *t"
          operands: [input, weight, bias]
          adds: bias
          sizes: {in_channels: i, out_channels: o}
          modules: [torch.nn.Conv2d(input)]
          samples:
            - {call: torch.nn.Conv2d, init: [6, 4, 3, 1, 0, 1, 2], inputs: [[2, 6, 7, 5]]}
        """,
        "`i` is 6 in one operand, 3 in another",
    ),
    "depthwise_without_groups": (
        """
        x:
          dims: "n i *s, o i *k, o? -> n o *t"
          operands: [input, weight, bias]
          adds: bias
          sizes: {in_channels: i, out_channels: o}
          modules: [torch.nn.Conv2d(input)]
          samples:
            - {call: torch.nn.Conv2d, init: [5, 5, 3, 1, 0, 1, 5], inputs: [[2, 5, 7, 6]]}
        """,
        "it does not run",
    ),
    "convolution_with_the_weights_of_a_transposed_one": (
        """
        x:
          dims: "n i *s, i o *k, o? -> n o *t"
          operands: [input, weight, bias]
          adds: bias
          sizes: {in_channels: i, out_channels: o}
          modules: [torch.nn.Conv2d(input)]
          samples: [{call: torch.nn.Conv2d, init: [4, 5, 3], inputs: [[2, 4, 7, 6]]}]
        """,
        "does not fit",
    ),
    "square_convolution_with_in_and_out_swapped": (
        """
        x:
          dims: "n i *s, i o *k, o? -> n o *t"
          operands: [input, weight, bias]
          adds: bias
          sizes: {in_channels: i, out_channels: o}
          modules: [torch.nn.Conv2d(input)]
          samples:
            - {call: torch.nn.Conv2d, init: [4, 4, 3], inputs: [[2, 4, 7, 6]]}
        """,
        "changing op.weight[:, 0] changes output of other channels too",
    ),
    "transposed_convolution_with_the_axes_of_a_plain_one": (
        """
        x:
          dims: "n i *s, o i *k, o? -> n o *t"
          operands: [input, weight, bias]
          adds: bias
          sizes: {in_channels: i, out_channels: o}
          modules: [torch.nn.ConvTranspose2d(input)]
          samples:
            - {call: torch.nn.ConvTranspose2d, init: [4, 4, 2], inputs: [[2, 4, 3, 6]]}
        """,
        "changing op.weight[0] changes output of other channels too",
    ),
    "bias_that_is_not_said_to_be_added": (
        """
        x:
          dims: "*b i, o i, o? -> *b o"
          operands: [input, weight, bias]
          sizes: {in_features: i, out_features: o}
          modules: [torch.nn.Linear(input)]
          samples: [{call: torch.nn.Linear, init: [4, 5], inputs: [[2, 3, 4]]}]
        """,
        "masked channels are said to stay zero, and do not",
    ),
    "sizes_that_are_not_rewritten": (
        """
        x:
          dims: "*b *c, *c?, *c? -> *b *c"
          operands: [input, weight, bias]
          adds: bias
          multiplies: weight
          ranks: {c: normalized_shape}
          mixes: ["*c"]
          norm: true
          modules: [torch.nn.LayerNorm(input)]
          samples: [{call: torch.nn.LayerNorm, init: [6], inputs: [[2, 3, 6]]}]
        """,
        "without part of x0 dim 2, op.weight dim 0, op.bias dim 0 it does not run",
    ),
    "flip_as_pointwise": (
        """
        x:
          kind: pointwise
          calls: ["torch.flip(input, dims)"]
          samples: [{call: torch.flip, inputs: [[2, 5, 3], {plain: [1]}]}]
        """,
        "changing x0[:, 0] changes output of other channels too",
    ),
    "sigmoid_keeps_zero": (
        """
        x:
          kind: pointwise
          calls: ["torch.sigmoid(input)"]
          samples: [{call: torch.sigmoid, inputs: [[2, 3, 5]]}]
        """,
        "masked channels are said to stay zero, and do not",
    ),
    "group_norm_without_mixing": (
        """
        x:
          dims: "n (g i) *s, (g i)?, (g i)? -> n (g i) *s"
          operands: [input, weight, bias]
          sizes: {num_groups: g, num_channels: g i}
          norm: true
          scales: weight
          modules: [torch.nn.GroupNorm(input)]
          samples: [{call: torch.nn.GroupNorm, init: [2, 6], inputs: [[2, 6, 3, 5]]}]
        """,
        "changes output of other channels too",
    ),
    "batch_norm_that_does_not_mix_the_batch": (
        """
        x:
          dims: "n c *s, c?, c?, c?, c? -> n c *s"
          operands: [input, running_mean, running_var, weight, bias]
          adds: [running_mean, bias]
          multiplies: [input, weight]
          sizes: {num_features: c}
          mixes: ["*s"]
          modules: [torch.nn.BatchNorm2d(input)]
          samples: [{call: torch.nn.BatchNorm2d, init: [4], inputs: [[2, 4, 3, 5]]}]
        """,
        "mixes along `n` in training",
    ),
    "mixing_that_is_not_there": (
        """
        x:
          dims: "n c *s -> n c *t"
          operands: [input]
          mixes: [c]
          calls: ["torch.nn.functional.avg_pool2d(input, kernel_size)"]
          samples: [{call: torch.nn.functional.avg_pool2d, inputs: [[2, 3, 4, 6], {plain: 2}]}]
        """,
        "is said to mix along `c`, but no sample does",
    ),
    "pixel_shuffle_blocks_in_the_wrong_order": (
        """
        x:
          dims: "n (r c) *s -> n c *t"
          operands: [input]
          modules: [torch.nn.PixelShuffle(input)]
          samples: [{call: torch.nn.PixelShuffle, init: [2], inputs: [[2, 12, 3, 5]]}]
        """,
        "changes output of other channels too",
    ),
    "sum_as_if_channels_stayed": (
        """
        x:
          dims: "n c s -> n c"
          operands: [input]
          calls: ["torch.sum(input, dim)"]
          samples: [{call: torch.sum, inputs: [[2, 4, 4], {plain: 1}]}]
        """,
        "changes output of other channels too",
    ),
    "mean_as_if_it_were_a_sum": (
        """
        x:
          kind: reduce
          additive: true
          operands: [input, dim, keepdim]
          calls: ["torch.mean(input, dim, keepdim)"]
          samples: [{call: torch.mean, inputs: [[2, 3, 5], {plain: 1}]}]
        """,
        "without part of x0 dim 1 it differs from the masked op",
    ),
    "layer_norm_over_the_wrong_dim": (
        """
        x:
          dims: "*b c *s, c?, c? -> *b c *s"
          operands: [input, weight, bias]
          ranks: {s: normalized_shape}
          mixes: [c]
          norm: true
          modules: [torch.nn.LayerNorm(input)]
          samples: [{call: torch.nn.LayerNorm, init: [6], inputs: [[2, 6, 6]]}]
        """,
        "changes",
    ),
    "softmax_as_pointwise": (
        """
        x:
          kind: pointwise
          zero: "no"
          calls: ["torch.softmax(input, dim)"]
          samples: [{call: torch.softmax, inputs: [[2, 3, 5], {plain: 1}]}]
        """,
        "changing x0[:, 0] changes output of other channels too",
    ),
    "add_is_zero_where_one_operand_is": (
        """
        x:
          kind: pointwise
          zero: any
          calls: ["torch.add(input, other)"]
          samples: [{call: torch.add, inputs: [[2, 3, 5], [2, 3, 5]]}]
        """,
        "masked channels are said to stay zero, and do not",
    ),
    "attention_that_may_lose_keys": (
        """
        x:
          dims: "*b l d, *b s d, *b s e -> *b l e"
          operands: [query, key, value]
          multiplies: value
          pins: {scale: d}
          calls: ["torch.nn.functional.scaled_dot_product_attention(query, key, value)"]
          samples:
            - {call: torch.nn.functional.scaled_dot_product_attention,
               inputs: [[2, 3, 5, 7], [2, 3, 4, 7], [2, 3, 4, 6]]}
        """,
        "without part of x1 dim 2, x2 dim 2 it differs from the masked op",
    ),
    "attention_whose_scale_follows_the_width": (
        """
        x:
          dims: "*b l d, *b s d, *b s e -> *b l e"
          operands: [query, key, value]
          multiplies: value
          mixes: s
          calls: ["torch.nn.functional.scaled_dot_product_attention(query, key, value)"]
          samples:
            - {call: torch.nn.functional.scaled_dot_product_attention,
               inputs: [[2, 3, 5, 7], [2, 3, 4, 7], [2, 3, 4, 6]]}
        """,
        "without part of x0 dim 3, x1 dim 3 it differs from the masked op",
    ),
    "product_that_contracts_too_much": (
        """
        x:
          dims: "*b i, *b i -> *b"
          operands: [input, other]
          calls: ["torch.mul(input, other)"]
          samples: [{call: torch.mul, inputs: [[2, 4], [2, 4]]}]
        """,
        "does not fit",
    ),
    "channels_tied_that_have_nothing_to_do_with_each_other": (
        """
        x:
          dims: "a i, b i -> i"
          operands: [input, other]
          calls: ["torch.kron(input, other)"]
          samples: [{call: torch.outer, inputs: [[3], [3]]}]
        """,
        "another rule is used",
    ),
    "uniform_where_it_is_not": (
        """
        x:
          kind: fill
          calls: ["torch.arange(end)"]
          samples: [{call: torch.arange, inputs: [{plain: 4}]}]
        """,
        "is said to fill, but its elements differ",
    ),
    "zeros_where_there_are_ones": (
        """
        x:
          kind: fill
          calls: ["torch.ones(*shape)"]
          samples: [{call: torch.ones, inputs: [{plain: [2, 3]}]}]
        """,
        "is said to fill with zeros, and does not",
    ),
    "channels_forgotten": (
        """
        x:
          kind: plain
          calls: ["torch.relu(input)"]
          samples: [{call: torch.relu, inputs: [[4, 4]]}]
        """,
        "is said to carry no channels, but its shape follows an operand's",
    ),
    "attribute_that_is_not_there": (
        """
        x:
          dims: "*b i, o i, o? -> *b o"
          operands: [input, weight, bias]
          adds: bias
          sizes: {in_feature: i, out_features: o}
          modules: [torch.nn.Linear(input)]
          samples: [{call: torch.nn.Linear, init: [4, 5], inputs: [[2, 4]]}]
        """,
        "`in_feature` is neither an attribute of torch.nn.Linear nor an argument",
    ),
    "name_that_is_not_there": (
        """
        x:
          kind: pointwise
          words: relu reluu
          calls: ["torch.nn.functional.smile(input)"]
          samples: [{call: torch.relu, inputs: [[2, 3]]}]
        """,
        "no op is called `reluu`",
    ),
    "call_that_no_sample_runs": (
        """
        x:
          kind: pointwise
          zero: "no"
          words: sigmoid threshold
          samples: [{call: torch.sigmoid, inputs: [[2, 3]]}]
        """,
        "no sample can be run as `torch.threshold`",
    ),
    "sample_that_cannot_be_built": (
        """
        x:
          kind: pointwise
          modules: [torch.nn.ReLU(input)]
          samples: [{call: torch.nn.ReLU, init: {depth: 3}, inputs: [[2, 3]]}]
        """,
        "cannot be built",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_rule_is_caught(name, tmp_path):
    text, wanted = WRONG[name]
    (rule,) = read(written(tmp_path, text))
    findings = probe(rule)
    assert any(wanted in str(finding) for finding in findings), "\n".join(map(str, findings))
    assert all(f"{tmp_path}/mine.yaml:2 rule `x`" in str(finding) for finding in findings)


def test_finding_shows_rule_line_and_call(tmp_path):
    (rule,) = read(written(tmp_path, WRONG["flip_as_pointwise"][0]))
    assert str(probe(rule)[0]) == (
        f"{tmp_path}/mine.yaml:2 rule `x`: torch.flip(2x5x3, [1]): "
        "changing x0[:, 0] changes output of other channels too"
    )


def test_probing_changes_neither_rules_nor_random_state(tmp_path):
    (rule,) = read(written(tmp_path, WRONG["sigmoid_keeps_zero"][0]))
    before, state = rule_files.current(), torch.get_rng_state()
    assert probe(rule)
    assert rule_files.current() is before and rule not in before.rules
    assert torch.equal(torch.get_rng_state(), state)


def test_probe_all_names_every_wrong_rule(tmp_path):
    text = "".join(
        textwrap.dedent(WRONG[name][0]).replace("x:", f"{name}:", 1)
        for name in ("flip_as_pointwise", "sigmoid_keeps_zero")
    )
    rules = Rules()
    for rule in read(written(tmp_path, text)):
        rules.add(rule)
    found = fxprune.probe.probe_all(rules)
    assert {finding.rule for finding in found} == {"flip_as_pointwise", "sigmoid_keeps_zero"}
    assert all(isinstance(finding, Finding) for finding in found)


# -- the calls a rule means ------------------------------------------------------------------------


def test_word_means_functions_methods_ops_and_in_place_forms():
    (rule,) = (rule for rule in _SHIPPED if "relu" in rule.words)
    assert {"torch.relu", "torch.relu_", "Tensor.relu_", "aten.relu"} <= set(spellings(rule))
    assert "torch.nn.functional.relu" in spellings(rule)


@pytest.mark.parametrize(
    "name", ["torch.nn.functional.gelu", "Tensor.T", "aten.relu", "operator.add"]
)
def test_names_resolve(name):
    assert resolve(name) is not None


@pytest.mark.parametrize("name", ["torch.nope", "Tensor.nope", "aten.nope", "torch.ops.nope.nope"])
def test_other_names_do_not(name):
    assert resolve(name) is None


def rule_of(function, *args, **kwargs) -> str:
    use = rule_files.current().of_function(function, (args, kwargs))
    return use.rule.name if use else ""


def test_aten_overloads_have_their_packets_rule():
    assert rule_of(torch.ops.aten.add.Tensor) == "additions"
    assert rule_of(torch.ops.aten.mean.dim, torch.ones(2), [0]) == "averages"
    assert rule_of(torch.ops.aten.convolution.default, *[None] * 6, False) == "convolution"
    assert (
        rule_of(torch.ops.aten.convolution.default, *[None] * 6, True) == "convolution_transposed"
    )


def test_the_same_name_with_other_arguments_is_another_rule():
    x = torch.ones(2, 3)
    assert rule_of(torch.max, x) == rule_of(torch.max, x, 1) == "statistics"
    assert rule_of(torch.max, x, x) == rule_of(torch.max, x, other=x) == "larger_or_smaller_of_two"
    assert rule_of(torch.pow, x, 2) == rule_of(torch.pow, x, 0.5) == "powers"
    assert rule_of(torch.pow, x, -1) == rule_of(torch.pow, 2, x) == "loses_zero"
    assert rule_of(torch.clamp, x, 0) == rule_of(torch.clamp, x, max=6) == "clamps"
    assert rule_of(torch.clamp, x, 0.1) == rule_of(torch.clamp, x, x) == "loses_zero"
    assert rule_of(torch.var, x, False) == "spreads_of_all"
    assert rule_of(torch.var, x, 1) == rule_of(torch.var, x) == "spreads"
    assert rule_of(torch.masked_fill, x, x > 0, 0.0) == "masked_to_zero"
    assert rule_of(torch.masked_fill, x, x > 0, 1.0) == "loses_zero"
    assert rule_of(torch.nn.functional.hardtanh, x) == "hard_limits"
    assert rule_of(torch.nn.functional.hardtanh, x, 0.5, 2.0) == "loses_zero"
    assert rule_of(torch.normal, 0.0, 1.0, (2, 3)) == "normal_of_size"
    assert rule_of(torch.normal, x, x) == "normal_around"


def test_methods_are_told_apart_by_their_arguments_too():
    def of(name, *args, **kwargs):
        return rule_files.current().of_method(name, (args, kwargs)).rule.name

    x = torch.ones(2, 3)
    assert of("normal_", x) == "random_values"
    assert of("clamp_", x, 0, 6) == "clamps"
    assert of("clamp_", x, 1) == "loses_zero"
    assert of("to", x, x) == "takes_dtype_and_device"
    assert of("to", x, torch.float16) == "keeps_zero"
    assert of("add_", x, x) == "additions"
    assert of("__and__", x, x) == "product"


def test_a_node_stands_for_what_it_held(tmp_path):
    graph = torch.fx.Graph()
    node = graph.placeholder("x")
    node.meta["val"] = torch.ones(2, device="meta")
    assert rule_of(torch.max, node, node) == "larger_or_smaller_of_two"


def test_modules_inherit_a_rule_as_long_as_they_compute_the_same():
    class Same(nn.Conv2d):
        def extra_repr(self):
            return "mine"

    class Other(nn.Conv2d):
        def forward(self, input):
            return super().forward(input) + input.mean()

    rules = rule_files.current()
    assert rules.of_module(Same).rule.name == "conv"
    assert rules.of_module(Other) is None
    assert rules.of_module(nn.MultiheadAttention) is None


# -- reading ---------------------------------------------------------------------------------------

BROKEN = {
    "not_yaml": ("x: [1, 2\n", ":2", "is not YAML"),
    "a_list": ("- one\n- two\n", ":1", "must hold named rules"),
    "no_fields": ("one: 3\n", ":1", "rule `one` must hold fields"),
    "unknown_field": (
        "one:\n  kind: pointwise\n  wrods: relu\n",
        ":3",
        "hint: did you mean `words`?",
    ),
    "unknown_kind": ("one:\n  kind: pointwis\n", ":2", "kind"),
    "unknown_zero": ("one:\n  kind: pointwise\n  zero: maybe\n", ":3", "zero"),
    "dims_without_arrow": ("one:\n  dims: 'n c'\n  operands: [x]\n", ":1", "has no `->`"),
    "dims_and_another_kind": (
        "one:\n  kind: pointwise\n  dims: 'n -> n'\n  operands: [x]\n",
        ":1",
        "goes with kind dims",
    ),
    "kind_dims_alone": ("one:\n  kind: dims\n", ":1", "goes with kind dims"),
    "letter_twice": (
        "one:\n  dims: 'n n -> n'\n  operands: [x]\n",
        ":1",
        "`n` stands twice in `n n`",
    ),
    "operand_count": (
        "one:\n  dims: 'n c, c -> n c'\n  operands: [x]\n",
        ":1",
        "1 operands are named, `n c, c -> n c` has 2",
    ),
    "size_of_no_letter": (
        "one:\n  dims: 'n c -> n c'\n  operands: [x]\n  sizes: {width: d}\n",
        ":1",
        "`d` is not a letter",
    ),
    "mixes_no_letter": (
        "one:\n  dims: 'n c -> n c'\n  operands: [x]\n  mixes: '*s'\n",
        ":1",
        "`*s` is not a letter",
    ),
    "scales_no_operand": (
        "one:\n  dims: 'n c, c -> n c'\n  operands: [x, weight]\n  scales: wieght\n",
        ":1",
        "did you mean `weight`?",
    ),
    "adds_no_operand": (
        "one:\n  dims: 'n c, c -> n c'\n  operands: [x, bias]\n  adds: base\n",
        ":1",
        "`base` is not an operand",
    ),
    "lonely_operand": (
        "one:\n  dims: 'n c, d -> n c'\n  operands: [x, y]\n",
        ":1",
        "no letter of operand `y` (d) stands anywhere else",
    ),
    "no_call": ("one:\n  kind: pointwise\n  calls: [torch.relu]\n", ":1", "is not a call"),
    "condition_on_no_argument": (
        "one:\n  kind: pointwise\n  calls: ['torch.pow(input, exponent)']\n  when: {exponnt: 2}\n",
        ":1",
        "no call has an argument `exponnt`; did you mean `exponent`?",
    ),
    "second_rule": (
        "one:\n  kind: pointwise\n\ntwo:\n  kind: pointwise\n  wrd: x\n",
        ":6",
        "`two`",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_broken_file_names_its_line_and_the_fault(name, tmp_path):
    text, line, fault = BROKEN[name]
    path = tmp_path / "mine.yaml"
    path.write_text(text)
    with pytest.raises(RuleError) as error:
        read(path)
    assert str(error.value).startswith(f"{path}{line} ")
    assert fault in str(error.value)


def test_empty_file_holds_no_rules(tmp_path):
    assert read(written(tmp_path, "# nothing yet\n")) == []


def test_shipped_rules_name_their_file_and_line():
    (conv,) = (rule for rule in _SHIPPED if rule.name == "conv")
    file, line = conv.where.split(":")
    assert file == "rules/ops/layers.yaml"
    text = (rule_files.folder() / "ops" / "layers.yaml").read_text().splitlines()
    assert text[int(line) - 1] == "conv:"


# -- rules of one's own ----------------------------------------------------------------------------


class Doubled(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(8, 2, 1)

    def forward(self, x):
        return self.b(torch.special.i1(self.a(x)))


def test_load_adds_a_rule_of_ones_own(tmp_path):
    x = torch.randn(2, 3, 4, 4)
    assert not fxprune.analyze(Doubled(), x).groups[0].prunable
    path = written(
        tmp_path,
        """
        bessel:
          kind: pointwise
          calls: ["torch.special.i1(input)"]
          samples: [{call: torch.special.i1, inputs: [[2, 3, 5]]}]
        """,
    )
    rule_files.load(path)
    assert fxprune.analyze(Doubled(), x).groups[0].prunable
    assert fxprune.prune(Doubled(), x, rate=0.5).a.weight.shape[0] == 4
    assert rule_files.probe(path) == []


class Scaled(nn.Module):
    """A layer of one's own: a weight for each channel of the last dim."""

    def __init__(self, width):
        super().__init__()
        self.width, self.weight = width, nn.Parameter(torch.ones(width))

    def forward(self, x):
        assert x.shape[-1] == self.width
        return x * self.weight


def test_a_layer_of_ones_own_gets_a_rule_and_is_probed(tmp_path):
    path = written(
        tmp_path,
        f"""
        scaled:
          dims: "*b c, c -> *b c"
          operands: [x, weight]
          sizes: {{width: c}}
          scales: weight
          modules: ["{__name__}.Scaled(x)"]
          samples: [{{call: {__name__}.Scaled, init: [5], inputs: [[2, 3, 5]]}}]
        """,
    )
    assert rule_files.probe(path) == []
    rule_files.load(path)
    model = nn.Sequential(nn.Linear(3, 8), Scaled(8), nn.Linear(8, 2))
    pruned = fxprune.prune(model, torch.randn(4, 3), rate=0.5)
    assert getattr(pruned, "1").width == 4


def test_loaded_rule_wins_over_the_shipped_one(tmp_path):
    rule_files.load(
        written(
            tmp_path, "mine:\n  kind: plain\n  words: relu\n  modules: ['torch.nn.Conv2d(x)']\n"
        )
    )
    assert rule_of(torch.relu) == "mine"
    assert rule_files.current().of_method("relu_").rule.name == "mine"
    assert rule_files.current().of_module(nn.Conv2d).rule.name == "mine"
    assert rule_files.current().of_module(nn.Conv3d).rule.name == "conv"


def test_broken_file_leaves_the_rules_in_force_alone(tmp_path):
    before = rule_files.current()
    path = written(tmp_path, "mine:\n  kind: plain\n  words: relu\n\nbad:\n  kind: none\n")
    with pytest.raises(RuleError, match=r"mine\.yaml:6 rule `bad`"):
        rule_files.load(path)
    assert rule_files.current() is before
    assert rule_of(torch.relu) == "relu"


# -- ordinary code has rules -----------------------------------------------------------------------

EXPRESSIONS = [
    "x + 1", "1 + x", "1 - x", "2 * x", "1 / (x + 9)", "x // 2", "7 // (x + 9)", "x % 3",
    "7 % (x + 9)", "x ** 2", "x ** -1", "2 ** x", "-x", "+x", "abs(x)", "x * (x > 0)",
    "x * (x == x)", "x * ~(x > 0)", "x * ((x > 0) & (x < 1))", "x * ((x > 1) | (x < 0))",
    "x * ((x > 1) ^ (x < 0))", "x.float()", "x.to(x)", "x.type_as(y)", "x.clamp(min=1e-6)",
    "x.clamp_(0, 6)", "x.pow(2).sum(1, keepdim=True) * y", "x.norm(dim=1, keepdim=True) * y",
    "F.normalize(x) * y", "x / x.norm(dim=1, keepdim=True)", "x.max(1, keepdim=True)[0] * y",
    "torch.max(x, y)", "torch.where(x > 0, x, y)", "x.masked_fill(x > 1, 0.0)",
    "x.masked_fill(x > 1, -1.0)", "x.std((2, 3), keepdim=True) * y", "x.lerp(y, 0.3)",
    "torch.var_mean(x, (2, 3), keepdim=True)[1] + x", "x.tril()", "x.flip(1)", "x.roll(1, 1)",
    "x.softmax(-1)", "F.softmax(x, 2).sum(1, keepdim=True) * y", "x.softmax(1)",
    "x.logsumexp((2, 3), keepdim=True) + y", "x.cumsum(2)", "x.sort(-1)[0]",
    "x.topk(2, 3)[0].mean(3, keepdim=True) + y", "torch.fft.fft2(x).real", "x.expand_as(x) + y",
    "x.mT.contiguous().mT", "x.flatten(2).unflatten(2, (4, 5))",
    "x.unbind(2)[0].unsqueeze(2) * y", "torch.tanh_(x)", "torch.special.expit(x) * y",
    "x.addcmul(x, y)", "torch.atan2(x, y)", "x.copy_(y)", "torch.zeros_like(x) + y",
    "x.new_zeros(x.shape) + y", "F.hardtanh(x, 0.5, 2.0)", "F.threshold(x, 0.5, 0.0)",
    "x.uniform_() * 0 + y", "F.pixel_unshuffle(F.pixel_shuffle(x, 2), 2)",
    "F.glu(torch.cat([x, y], 1), 1)", "F.prelu(x, y.mean((0, 2, 3)))",
    "x.mul(y).sum(1, keepdim=True) + y", "F.cosine_similarity(x, y).unsqueeze(1) * y",
    "F.interpolate(x, (4, 5))",
    "F.grid_sample(x, y[:, :2].permute(0, 2, 3, 1), align_corners=False)",
    "F.local_response_norm(x, 2)", "F.instance_norm(x)", "F.layer_norm(x, x.shape[1:])",
    "F.group_norm(x, 2)", "F.avg_pool2d(x, 3, 1, 1)", "F.scaled_dot_product_attention(x, y, y)",
    "x @ x.mT @ y", "torch.einsum('nchw,nchv->ncwv', x, y)[..., :4, :]",
    "F.unfold(x, 1).view(x.shape)", "torch.cross(x[..., :3], y[..., :3], dim=-1)",
]  # fmt: skip


@pytest.mark.parametrize("expression", EXPRESSIONS)
def test_ordinary_code_has_rules_and_is_pruned_exactly(expression):
    code = compile(expression, "expression", "eval")

    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Conv2d(3, 8, 1), nn.Conv2d(3, 8, 1)
            self.outs = nn.ModuleList([nn.Conv2d(8, 2, 1), nn.Conv2d(8, 2, 1)])

        def forward(self, x):
            names = {"torch": torch, "F": nn.functional, "x": self.a(x), "y": self.b(x)}
            found = eval(code, names)
            return self.outs[0](found.float()), self.outs[1](names["y"])

    torch.manual_seed(0)
    x = torch.randn(2, 3, 4, 5)
    net = Net().eval()
    assert fxprune.analyze(net, x).flow.unknown == {}
    fxprune.prune(net, x, rate=0.5)
