"""The laws every pruning must keep, on random networks with random scores.

The reference here is made without `fxprune.verify`: a copy of the original *module* with zeros
written over every dropped element, whose normalisations take their statistics over what is kept.
"""

from __future__ import annotations

import copy
import io
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, event, given, settings
from hypothesis import strategies as st
from strategies import Choice, Network, choices, draw_choice, draw_network, networks
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from fxprune import pattern, rules
from fxprune.errors import NothingToPrune

LIMIT = 1e-9


# -- the reference ---------------------------------------------------------------------------------


def kept_elements(name: str, tensor: Tensor, plan: fxprune.Plan) -> Tensor:
    """A mask of the elements of a parameter that a plan keeps."""
    keep = torch.ones(tensor.shape, dtype=torch.bool)
    kept = plan.kept.get(name, {})
    for dim, rows in kept.items():
        if not _nested(rows):
            keep &= _line(tensor, dim, rows)
    for dim, rows in kept.items():
        if _nested(rows):
            keep &= _blocks(tensor, dim, rows, kept.get(0))
    return keep


def _nested(rows) -> bool:
    return bool(rows) and isinstance(rows[0], list)


def _line(tensor: Tensor, dim: int, rows: list[int]) -> Tensor:
    line = torch.zeros(tensor.shape[dim], dtype=torch.bool)
    line[rows] = True
    return line.view([-1 if d == dim else 1 for d in range(tensor.ndim)])


def _blocks(tensor: Tensor, dim: int, lists: list[list[int]], first) -> Tensor:
    """Each of equally many kept indices of dim 0 goes with the next list along `dim`."""
    outer = list(range(tensor.shape[0])) if first is None else first
    keep = torch.zeros(tensor.shape, dtype=torch.bool)
    each = len(outer) // len(lists)
    for b, rows in enumerate(lists):
        keep[outer[b * each : (b + 1) * each]] = _line(tensor, dim, rows)
    return keep


def masked(net: nn.Module, plan: fxprune.Plan) -> nn.Module:
    """A copy of the network with zeros for all that is dropped."""
    net = copy.deepcopy(net)
    with torch.no_grad():
        for name, tensor in _tensors(net).items():
            if name in plan.kept:
                tensor.mul_(kept_elements(name, tensor, _directed(name, plan)).to(tensor.dtype))
    for name, module in net.named_modules():
        rows = plan.kept.get(f"{name}.weight", {}).get(0)
        if rows is not None and isinstance(module, (nn.GroupNorm, nn.LayerNorm)):
            module.forward = _norm_over_kept(module, torch.tensor(rows))
    return net


def _directed(name: str, plan: fxprune.Plan) -> fxprune.Plan:
    """weight_norm's directions keep their rows (zeros have none); their lengths become 0."""
    if not name.endswith("weight.original1"):
        return plan
    inner = {dim: rows for dim, rows in plan.kept[name].items() if dim != 0}
    return plan.model_copy(update={"kept": {name: inner}})


def _norm_over_kept(module: nn.GroupNorm | nn.LayerNorm, rows: Tensor):
    """The norm over the kept channels alone, laid into a tensor of zeros."""
    weight, bias = module.weight[rows], None if module.bias is None else module.bias[rows]

    def forward(x: Tensor) -> Tensor:
        if isinstance(module, nn.LayerNorm):
            dim, shape = -len(module.normalized_shape), (len(rows), *module.normalized_shape[1:])
            found = F.layer_norm(x.index_select(dim, rows), shape, weight, bias, module.eps)
            return torch.zeros_like(x).index_copy(dim, rows, found)
        left = len(torch.unique(rows // (module.num_channels // module.num_groups)))
        found = F.group_norm(x[:, rows], left, weight, bias, module.eps)
        return torch.zeros_like(x).index_copy(1, rows, found)

    return forward


def _tensors(net: nn.Module) -> dict[str, Tensor]:
    return {**dict(net.named_parameters()), **dict(net.named_buffers())}


def outputs(net: nn.Module, inputs: tuple) -> list[Tensor]:
    with torch.no_grad():
        found = net(*inputs)
    return [leaf for leaf in pytree.tree_leaves(found) if isinstance(leaf, Tensor)]


def difference(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference, relative to each output's largest value."""
    assert [t.shape for t in expected] == [t.shape for t in got]
    assert all(torch.isfinite(t).all() for t in expected)
    gaps = [
        float((a - b).abs().max() / a.abs().max().clamp_min(1e-30))
        for a, b in zip(expected, got, strict=True)
    ]
    return max(gaps)


# -- the laws, as functions that the fuzzer shares -------------------------------------------------


def pruned_by(
    net: nn.Module, inputs: tuple, choice: Choice, **more
) -> fxprune.api.PrunedModule | None:
    """The pruned network; None where nothing may go."""
    try:
        return fxprune.prune(net, inputs, **{**choice.options(), **more})
    except NothingToPrune:
        return None


def comparable(network: Network, choice: Choice) -> bool:
    """Whether `masked` says what the pruned network computes: not where softmax, means and the like
    run over fewer channels, or a weight's own statistics do."""
    mixed = {"none": set(), "norms": {"weights"}, "all": {"weights", "all"}}[choice.mixing]
    return not mixed & network.mixes()


def check_sliced_is_masked(network: Network, choice: Choice) -> float | None:
    """Law 1, and the shapes; the share of channels removed, or None where nothing may go."""
    net, inputs = network.build(), network.inputs()
    pruned = pruned_by(net, inputs, choice)
    if pruned is None:
        return None
    plan = pruned.fxprune.plan
    checked = pruned.fxprune.report.verification
    assert checked.difference is not None and checked.difference <= LIMIT
    got = outputs(pruned, inputs)
    assert [t.shape for t in got] == [t.shape for t in outputs(net, inputs)]
    check_slices(net, pruned)
    if comparable(network, choice):
        assert difference(outputs(masked(net, plan), inputs), got) <= LIMIT
    before, after = pruned.fxprune.report.channels
    return 1 - after / before


def check_slices(net: nn.Module, pruned: nn.Module) -> None:
    """Every tensor of the result is a slice of the original's tensor of that name."""
    old, plan = net.state_dict(keep_vars=True), pruned.fxprune.plan
    names = {id(t): name for name, t in reversed(_tensors(net).items())}
    for key, new in pruned.state_dict().items():
        keep = kept_elements(names[id(old[key])], old[key], plan)
        assert torch.equal(new.reshape(-1), old[key].detach()[keep]), key
        assert new.dtype == old[key].dtype


def check_nothing_dropped(network: Network) -> None:
    """Law 2: at rate 0 all is equal, and the input is bit for bit what it was."""
    net, inputs = network.build(), network.inputs()
    before = copy.deepcopy(net.state_dict())
    attributes = {name: set(vars(m)) for name, m in net.named_modules()}
    expected = outputs(net, inputs)
    for rate in (0.0, 0.5):
        pruned = pruned_by(net, inputs, Choice(1, rate))
        if pruned is None:
            continue
        if rate == 0.0:
            assert pruned.fxprune.plan.kept == {}
            for key, value in pruned.state_dict().items():
                assert torch.equal(value, before[key]), key
            assert difference(expected, outputs(pruned, inputs)) <= 1e-12
            assert not {t.data_ptr() for t in pruned.parameters()} & {
                t.data_ptr() for t in net.parameters()
            }
        after = net.state_dict()
        assert list(after) == list(before)
        assert all(torch.equal(_bits(after[k]), _bits(before[k])) for k in before)
        assert {name: set(vars(m)) for name, m in net.named_modules()} == attributes
        assert all(p.grad is None and p.requires_grad for p in net.parameters())
        assert not net.training and difference(expected, outputs(net, inputs)) == 0.0


def _bits(tensor: Tensor) -> Tensor:
    return tensor.detach().contiguous().reshape(-1).view(torch.uint8)


# -- tests -----------------------------------------------------------------------------------------


@given(networks(), choices())
def test_sliced_is_masked(network: Network, choice: Choice) -> None:
    """Law 1: the pruned network computes the masked original, for any choice of channels."""
    removed = check_sliced_is_masked(network, choice)
    event("nothing may go" if removed is None else f"removed {int(removed * 10)}0 % or more")


@settings(max_examples=80)
@given(networks())
def test_nothing_dropped(network: Network) -> None:
    """Law 2: dropping nothing gives the same network, and the input is never touched."""
    check_nothing_dropped(network)


@settings(max_examples=80)
@given(
    networks(most=3),
    st.integers(0, 2**31 - 1),
    st.sampled_from([0.2, 0.4]),
    st.sampled_from([0.2, 0.5]),
)
def test_twice_is_once(network: Network, seed: int, first: float, second: float) -> None:
    """Law 3: dropping A, then B of what is left, is dropping A and B at once."""
    net, inputs = network.build(), network.inputs()
    once = pruned_by(net, inputs, Choice(seed, first))
    assume(once is not None)
    twice = pruned_by(once, inputs, Choice(seed + 1, second))
    assume(twice is not None)
    plan = composed(net, inputs, once.fxprune.plan, twice.fxprune.plan)
    at_once = fxprune.apply(net, plan, inputs)
    assert_same(at_once, twice, inputs)


def composed(net: nn.Module, inputs: tuple, a: fxprune.Plan, b: fxprune.Plan) -> fxprune.Plan:
    """The plan that keeps of `net` what `b` keeps of what `a` kept."""
    slots = fxprune.analyze(net, inputs).flow.ids.slots
    tensors = _tensors(net)
    kept = {}
    for name in {*a.kept, *b.kept}:
        keep = kept_elements(name, tensors[name], a)
        keep[keep.clone()] = kept_elements(
            name, _sliced(tensors[name], keep, a.kept.get(name, {})), b
        ).reshape(-1)
        kept[name] = {slot.dim: _indices(keep, slot) for slot in slots[name]}
    kept = {
        n: {d: r for d, r in dims.items() if _drops(r, tensors[n].shape[d])}
        for n, dims in kept.items()
    }
    return a.model_copy(update={"kept": {name: dims for name, dims in kept.items() if dims}})


def _sliced(tensor: Tensor, keep: Tensor, kept: Mapping[int, list]) -> Tensor:
    """A tensor of the shape that is left."""
    shape = list(tensor.shape)
    for dim, rows in kept.items():
        shape[dim] = len(rows[0]) if _nested(rows) else len(rows)
    assert keep.sum() == torch.Size(shape).numel()
    return torch.empty(shape)


def _indices(keep: Tensor, slot) -> list:
    """The kept indices along a slot's dim, one list a block where it has blocks."""
    if slot.ids.ndim == 1:
        others = [d for d in range(keep.ndim) if d != slot.dim]
        return (keep.any(others) if others else keep).nonzero().flatten().tolist()
    found = []
    for block in keep.chunk(slot.ids.shape[0]):
        rows = (
            block.any([d for d in range(keep.ndim) if d != slot.dim]).nonzero().flatten().tolist()
        )
        found += [rows] if rows else []
    return found


def _drops(rows: list, size: int) -> bool:
    lists = rows if _nested(rows) else [rows]
    return any(len(one) < size for one in lists)


def assert_same(a: nn.Module, b: nn.Module, inputs: tuple) -> None:
    """Equal tensors under equal names, and equal outputs."""
    one, other = a.state_dict(), b.state_dict()
    assert set(one) == set(other)
    for key in one:
        assert torch.equal(one[key], other[key]), key
    assert difference(outputs(a, inputs), outputs(b, inputs)) <= 1e-12


@settings(max_examples=60)
@given(networks(), choices())
def test_plans_replay(network: Network, choice: Choice) -> None:
    """Law 4: a plan is the same after JSON, and writes the same network again."""
    net, inputs = network.build(), network.inputs()
    pruned = pruned_by(net, inputs, choice)
    assume(pruned is not None)
    plan = pruned.fxprune.plan
    read = fxprune.Plan.from_json(plan.to_json())
    assert read == plan
    assert read.to_json() == plan.to_json()
    again = fxprune.apply(network.build(), read, inputs)
    assert again.fxprune.plan == plan
    assert_same(again, pruned, inputs)
    assert again.code == pruned.code


def _dims_rules() -> list:
    return [rule for rule in rules.current().rules if rule.dims is not None]


@pytest.mark.parametrize("rule", _dims_rules(), ids=lambda rule: rule.name)
def test_rules_print_and_parse(rule) -> None:
    """Law 4: what a rule prints reads back equal."""
    assert pattern.parse(str(rule.pattern)) == rule.pattern
    assert str(pattern.parse(rule.dims)).split() == rule.dims.split()


@settings(max_examples=60)
@given(networks(), choices())
def test_results_are_modules(network: Network, choice: Choice) -> None:
    """A pruned network copies, pickles, loads its own state, and trains."""
    net, inputs = network.build(), network.inputs()
    pruned = pruned_by(net, inputs, choice, verify="shapes")
    assume(pruned is not None)
    twin = copy.deepcopy(pruned)
    assert not {p.data_ptr() for p in twin.parameters()} & {
        p.data_ptr() for p in pruned.parameters()
    }
    assert_same(twin, pruned, inputs)
    file = io.BytesIO()
    torch.save(pruned, file)
    file.seek(0)
    loaded = torch.load(file, weights_only=False)
    assert_same(loaded, pruned, inputs)
    assert loaded.fxprune.plan == pruned.fxprune.plan
    twin.load_state_dict(loaded.state_dict())
    check_trains(twin, inputs)
    assert difference(outputs(pruned, inputs), outputs(loaded, inputs)) == 0.0


def check_trains(net: nn.Module, inputs: tuple) -> None:
    """One step changes the loss and every parameter that has a gradient."""
    net.train()
    assert all(m.training for m in net.modules())
    leaves = [t for t in pytree.tree_leaves(net(*inputs)) if isinstance(t, Tensor)]
    sum(t.square().mean() for t in leaves).backward()
    grads = [p for p in net.parameters() if p.grad is not None and bool(p.grad.abs().max() > 1e-8)]
    assert grads and all(torch.isfinite(p.grad).all() for p in grads)
    before = [p.detach().clone() for p in grads]
    torch.optim.SGD(net.parameters(), lr=0.1).step()
    assert all(not torch.equal(p, old) for p, old in zip(grads, before, strict=True))


@settings(max_examples=40)
@given(networks(), choices())
def test_two_runs_choose_the_same(network: Network, choice: Choice) -> None:
    """Law 5: the same network, built and pruned again, loses the same channels."""
    net, inputs = network.build(), network.inputs()
    pruned = pruned_by(net, inputs, choice, verify=False)
    again = pruned_by(network.build(), network.inputs(), choice, verify=False)
    assume(pruned is not None)
    assert again.fxprune.plan == pruned.fxprune.plan
    assert again.code == pruned.code


_SCRIPT = """
import hashlib, json, sys
import torch
torch.set_num_threads(1)
from strategies import draw_choice, draw_network
from test_laws import pruned_by
for seed in json.loads(sys.argv[1]):
    network = draw_network(seed)
    pruned = pruned_by(network.build(), network.inputs(), draw_choice(seed), verify=False)
    text = "" if pruned is None else pruned.fxprune.plan.to_json() + pruned.code
    print(seed, hashlib.sha256(text.encode()).hexdigest())
"""


def test_processes_choose_the_same() -> None:
    """Law 5: processes whose sets and dicts hash differently choose the same channels."""
    here = Path(__file__).parent
    seeds = json.dumps(list(range(20)))
    found = []
    for hash_seed in ("1", "2"):
        paths = os.pathsep.join([str(here), str(here.parent), os.environ.get("PYTHONPATH", "")])
        env = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": paths}
        run = subprocess.run(
            [sys.executable, "-c", _SCRIPT, seeds],
            env=env,
            capture_output=True,
            text=True,
            check=True,
        )
        found.append(run.stdout.splitlines())
    assert len(found[0]) == 20
    assert found[0] == found[1]


@pytest.mark.parametrize("seed", range(30))
def test_networks_are_alive(seed: int) -> None:
    """The networks drawn are worth the laws: their outputs are finite and follow the input, a wrong
    slice shows, and they train."""
    network = draw_network(seed)
    net, (x,) = network.build(), network.inputs()
    plain = outputs(net, (x,))
    moved = outputs(net, (x * 1.05,))
    assert difference(plain, moved) > 1e-5
    assert difference(plain, outputs(network.build(), (x,))) == 0.0
    pruned = pruned_by(
        net, (x,), replace(draw_choice(seed), rate=0.5, select_by="rate", round_to=1)
    )
    if pruned is not None and pruned.fxprune.plan.removed:
        assert difference(plain, outputs(pruned, (x,))) > 1e-6
    check_trains(net, (x,))
