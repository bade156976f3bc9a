"""Latency: what is measured, its statistics, and that the networks are left as they were."""

from __future__ import annotations

import copy
import gc
import json
import math
import random
import statistics
import time
from typing import Any

import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import InputError, ModelError, OptionError
from fxprune.inputs import batched, given
from fxprune.latencies import Latency, median_interval, outliers


class Sleeps(nn.Module):
    """Takes the time it is told, and notes how it was called."""

    def __init__(self, seconds: float, log: list | None = None, name: str = ""):
        super().__init__()
        self.seconds, self.log, self.name = seconds, log if log is not None else [], name
        self.inner = nn.Dropout()

    def forward(self, x):
        seen = (self.training, torch.is_grad_enabled(), x.shape, torch.get_num_threads())
        self.log.append((self.name, *seen))
        time.sleep(self.seconds)
        return x


X = torch.zeros(2, 3)
QUICK = dict(rounds=8, budget_s=0.1)


# -- statistics ------------------------------------------------------------------------------------


def _coverage(n: int, k: int) -> float:
    """The probability that the k-th lowest and k-th highest of n hold the median."""
    return 1 - 2 * sum(math.comb(n, i) for i in range(k)) / 2**n


@pytest.mark.parametrize("n", [6, 8, 9, 20, 57, 200])
@pytest.mark.parametrize("confidence", [0.5, 0.9, 0.95])
def test_the_interval_is_the_narrowest_that_keeps_the_confidence(n, confidence):
    middle, low, high = median_interval(random.Random(n).sample(range(1, n + 1), n), confidence)
    k = low  # the samples are 1 to n: the k-th lowest is k
    assert high == n + 1 - k and middle == (n + 1) / 2
    assert _coverage(n, k) >= confidence
    assert _coverage(n, k + 1) < confidence or k + 1 > n / 2


def test_too_few_samples_give_their_whole_range():
    assert median_interval([3.0, 1.0, 2.0], 0.95) == (2.0, 1.0, 3.0)
    assert median_interval([5.0], 0.95) == (5.0, 5.0, 5.0)


def test_the_interval_holds_the_true_median_of_a_skewed_distribution_as_often_as_it_says():
    draw = random.Random(0)
    hits = 0
    for _ in range(2000):
        _, low, high = median_interval([draw.lognormvariate(0, 1) for _ in range(25)], 0.9)
        hits += low <= 1.0 <= high
    expected = _coverage(25, 9)  # of 25 samples, the 9th lowest and highest are meant
    assert expected >= 0.85 and abs(hits / 2000 - 0.9) < 0.06


def test_outliers_are_counted():
    assert outliers([1.0, 1.1, 0.9, 1.05, 0.95, 9.0]) == 1
    assert outliers([1.0] * 9) == 0


# -- measuring -------------------------------------------------------------------------------------


def test_a_network_is_measured():
    found = fxprune.latency(Sleeps(0.004), X, **QUICK)
    (one,) = found.measured
    assert 4 <= one.low_ms <= one.median_ms <= one.high_ms
    assert (one.name, one.device, one.batch, one.rounds) == ("Sleeps", "cpu", 1, 8)
    assert one.median_ms == statistics.median(one.samples_ms)
    assert found.speedups == () and len(one.samples_ms) == 8


def test_networks_take_turns_in_both_orders():
    log: list = []
    networks = {"a": Sleeps(0.003, log, "a"), "b": Sleeps(0.003, log, "b")}
    fxprune.latency(networks, X, rounds=4, budget_s=0.01)
    assert [entry[0] for entry in log[-8:]] == list("abbaabba")


def test_the_speedup_is_of_the_rounds_and_has_an_interval():
    found = fxprune.latency({"before": Sleeps(0.006), "after": Sleeps(0.003)}, X, **QUICK)
    (ratio,) = found.speedups
    assert (ratio.name, ratio.of) == ("after", "before")
    assert ratio.low <= ratio.median <= ratio.high
    before, after = (m.samples_ms for m in found.measured)
    assert ratio.median == pytest.approx(
        statistics.median(a / b for a, b in zip(before, after, strict=True))
    )


def test_short_calls_are_measured_in_blocks():
    (one,) = fxprune.latency(nn.ReLU(), X, **QUICK).measured
    assert one.calls > 20


def test_slow_networks_get_ten_calls_to_settle():
    log: list = []
    fxprune.latency(Sleeps(0.03, log), X, rounds=8, budget_s=0.5)
    assert len(log) == 1 + 10 + 8  # one that shows that it runs, ten to warm up, and the rounds
    (one,) = fxprune.latency(Sleeps(0.02), X, rounds=8, budget_s=0.05).measured
    assert not one.settled


def test_more_rounds_are_made_while_there_is_time():
    (short,) = fxprune.latency(Sleeps(0.003), X, budget_s=0.01).measured
    (long,) = fxprune.latency(Sleeps(0.003), X, budget_s=0.3).measured
    assert short.rounds == 8 < 20 < long.rounds


def test_batches_and_modes_and_threads():
    log: list = []
    before = torch.get_num_threads()
    model = Sleeps(0.002, log).train()
    model.inner.eval()
    found = fxprune.latency(model, X, batch_sizes=(1, 5), threads=2, rounds=8, budget_s=0.02)
    assert {entry[1:] for entry in log} == {
        (False, False, torch.Size([1, 3]), 2),
        (False, False, torch.Size([5, 3]), 2),
    }
    assert [m.batch for m in found.measured] == [1, 5] and found.threads == 2
    assert torch.get_num_threads() == before and torch.is_grad_enabled() and gc.isenabled()
    assert model.training and not model.inner.training


def test_all_is_restored_after_a_failure():
    class Fails(nn.Module):
        def forward(self, x):
            raise ValueError("no such shape")

    model, before = Fails().train(), torch.get_num_threads()
    with pytest.raises(InputError, match="Fails does not run on a batch of 1: no such shape"):
        fxprune.latency(model, X, threads=2)
    assert model.training and torch.get_num_threads() == before and gc.isenabled()


def test_outliers_are_kept_in_the_samples():
    class Hiccups(Sleeps):
        def forward(self, x):
            late = len(self.log) % 20 == 19
            self.log.append(0)
            time.sleep(0.1 if late else 0.003)
            return x

    (one,) = fxprune.latency(Hiccups(0), X, rounds=45, budget_s=0.05).measured
    assert one.outliers >= 1 and max(one.samples_ms) > 90
    assert one.median_ms < max(one.samples_ms)


@pytest.mark.parametrize("order", [("before", "after"), ("after", "before")])
def test_a_pruned_network_knows_the_inputs_of_all(order):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 5 * 5, 4))
    networks = {"before": model, "after": fxprune.prune(model, torch.rand(2, 3, 7, 7), rate=0.5)}
    found = fxprune.latency({name: networks[name] for name in order}, batch_sizes=(3,), **QUICK)
    assert tuple(each.name for each in found.measured) == order
    with pytest.raises(InputError, match="no usual input fits"):
        fxprune.latency(model, **QUICK)


def test_usual_inputs_are_tried_without_any():
    assert fxprune.latency(nn.Linear(5, 2), **QUICK).measured


def test_networks_are_measured_as_they_are_deployed():
    """Cast, laid out and compiled: each gets inputs of its dtype, the layout stays, and compiling
    anew for a batch size is no part of what is measured."""
    seen: list = []

    class Looks(nn.Conv2d):
        def forward(self, x):
            if not torch.compiler.is_compiling():
                last = x.is_contiguous(memory_format=torch.channels_last)
                seen.append((x.dtype, last and not x.is_contiguous(), len(x)))
            return super().forward(x)

    plain = Looks(3, 8, 3)
    last = copy.deepcopy(plain).to(memory_format=torch.channels_last).bfloat16()
    compiled: Any = torch.compile(copy.deepcopy(plain), backend="aot_eager")
    x = torch.rand(2, 3, 8, 8).to(memory_format=torch.channels_last)
    networks = {"plain": plain, "bfloat16": last, "compiled": compiled}
    found = fxprune.latency(networks, x, batch_sizes=(1, 3), rounds=8, budget_s=0.1)
    assert set(seen) == {(t, True, n) for t in (torch.float32, torch.bfloat16) for n in (1, 3)}
    assert [m.name for m in found.measured] == [*networks] * 2
    assert all(m.median_ms < 100 for m in found.measured)


def test_a_compiled_pruned_network_knows_its_inputs():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Linear(8 * 5 * 5, 4))
    pruned = fxprune.prune(model, torch.rand(2, 3, 7, 7), rate=0.5)
    compiled: Any = torch.compile(pruned, backend="aot_eager")
    assert fxprune.latency(compiled, **QUICK).measured


def test_lists_of_images_are_repeated():
    found = batched(given(([torch.zeros(3, 4, 4), torch.ones(3, 5, 5)],)), 3)
    assert [tuple(t.shape) for t in found.args[0]] == [(3, 4, 4), (3, 5, 5), (3, 4, 4)]


def test_tensors_beside_the_batch_stay():
    found = batched(given({"x": torch.zeros(2, 3), "table": torch.zeros(7, 3), "n": 5}), 4)
    assert found.kwargs["x"].shape == (4, 3) and found.kwargs["table"].shape == (7, 3)


def test_the_result_is_text_and_plain_data():
    found = fxprune.latency({"before": Sleeps(0.004), "after": Sleeps(0.002)}, X, **QUICK)
    assert isinstance(found, Latency)
    lines = str(found).splitlines()
    assert len(lines) == 4 and "95% intervals" in lines[0] and "times as fast as before" in lines[3]
    data = json.loads(json.dumps(found.to_dict()))
    assert data["measured"][0]["batch"] == 1 and data["speedups"][0]["of"] == "before"


def test_progress_is_told():
    told: list = []
    fxprune.latency(Sleeps(0.002), X, progress=lambda *each: told.append(each), **QUICK)
    assert told[0] == ("warm up, batch 1 on cpu", 0.0)
    assert [share for _, share in told[1:]] == [i / 8 for i in range(8)]


@pytest.mark.parametrize(
    ("how", "kind"),
    [
        (dict(batch_sizes=(0,)), OptionError),
        (dict(threads=0), OptionError),
        (dict(device="tpu"), OptionError),
        (dict(device="meta:x"), OptionError),
        (dict(rounds=-1), OptionError),
        (dict(budget_s=0), OptionError),
        (dict(confidence=1.0), OptionError),
    ],
)
def test_options_out_of_range(how, kind):
    with pytest.raises(kind):
        fxprune.latency(nn.ReLU(), X, **how)


def test_what_is_no_network():
    with pytest.raises(ModelError, match="network `a` is a int"):
        fxprune.latency({"a": 3}, X)
    with pytest.raises(OptionError):
        fxprune.latency({}, X)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_copy_is_measured_on_the_gpu():
    model = nn.Conv2d(3, 64, 3)
    (one,) = fxprune.latency(model, torch.rand(2, 3, 64, 64), device="cuda", **QUICK).measured
    assert one.device.startswith("cuda") and 0 < one.median_ms < 100
    assert next(model.parameters()).device.type == "cpu"
