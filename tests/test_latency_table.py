"""Tables of times: the grid, what lies between its points, what is remembered, and one real one.

The clock is replaced by one that counts elements, which is linear along each axis: a table must
then tell exactly what the pruned network costs, whatever is cut."""

from __future__ import annotations

import json
import math
from typing import Any

import numpy as np
import pytest
import torch
from torch import fx, nn

import fxprune
from fxprune import timings
from fxprune.errors import InputError, OptionError, PlanError
from fxprune.inputs import Inputs
from fxprune.latency_grid import axes_of, level
from fxprune.latency_table import LatencyTable
from fxprune.planning import kept_ids
from fxprune.replay import kept_by_plan


def _numel(value: Any) -> int:
    tensors: list[torch.Tensor] = []
    fx.node.map_aggregate(
        value, lambda v: tensors.append(v) if isinstance(v, torch.Tensor) else None
    )
    return sum(tensor.numel() for tensor in tensors)


class _Counting(fx.Interpreter):
    """Elements that the nodes of a graph read, make, and have for parameters."""

    total = 0

    def run_node(self, n):
        args, kwargs = self.fetch_args_kwargs_from_env(n)
        made = super().run_node(n)
        if n.op.startswith("call") and _numel(made):
            own = self.module.get_submodule(n.target).parameters() if n.op == "call_module" else []
            self.total += _numel([args, kwargs, made, list(own)])
        return made


def _elements(module: nn.Module, inputs: Inputs) -> int:
    graph = module if isinstance(module, fx.GraphModule) else fx.symbolic_trace(module)
    run = _Counting(graph)
    run.run(*inputs.args)
    return run.total


class Clock:
    """Counts elements in place of milliseconds, and how often it was asked. A whole network takes
    longer than its ops."""

    def __init__(self, cost=lambda n: n / 100, whole=lambda n: 2 * n / 100 + 5):
        self.cost, self.whole, self.asked, self.wholes = cost, whole, 0, 0
        self.is_whole = False

    def __call__(self, module, inputs, device, budget_s):
        assert not torch.is_grad_enabled() and budget_s >= 0
        self.asked += not self.is_whole
        self.wholes += self.is_whole
        return float((self.whole if self.is_whole else self.cost)(_elements(module, inputs)))

    def start(self, monkeypatch) -> Clock:
        """Take the real clock's place."""
        again = timings.Timings.again

        def noted(table, name, *call):
            self.is_whole = name.startswith("network ")
            again(table, name, *call)

        monkeypatch.setattr(timings.Timings, "again", noted)
        monkeypatch.setattr(timings, "timed_ms", self)
        return self


@pytest.fixture
def clock(monkeypatch):
    return Clock().start(monkeypatch)


def _conv(a: int, b: int, k: int = 3, **more: Any) -> nn.Conv2d:
    return nn.Conv2d(a, b, k, padding=k // 2, **more)


class Chain(nn.Sequential):
    def __init__(self, a: int = 12, b: int = 20):
        super().__init__(
            _conv(3, a), nn.BatchNorm2d(a), nn.ReLU(), _conv(a, b), nn.ReLU(),
            nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(b, 5),
        )  # fmt: skip


class Residual(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.a, self.b, self.c = _conv(3, 16), _conv(16, 24), _conv(24, 16), _conv(16, 2)

    def forward(self, x):
        x = self.stem(x).relu()
        return self.c(x + self.b(torch.relu(self.a(x))))


class Separable(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.deep, self.b = _conv(3, 16, 1), _conv(16, 16, groups=16), _conv(16, 24, 1)
        self.c = _conv(24, 2, 1)

    def forward(self, x):
        return self.c(nn.functional.relu6(self.b(self.deep(self.a(x)))))


class Concat(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c, self.d = _conv(3, 8), _conv(3, 12), _conv(20, 16), _conv(16, 2)

    def forward(self, x):
        return self.d(self.c(torch.cat([self.a(x), self.b(x)], 1)))


class Grouped(nn.Module):
    def __init__(self):
        super().__init__()
        self.a, self.b, self.c = _conv(3, 16), _conv(16, 32, groups=4), _conv(32, 2)

    def forward(self, x):
        return self.c(self.b(self.a(x)))


class Sized(nn.Module):
    """Numbers of a node's call are sizes of another."""

    def __init__(self):
        super().__init__()
        self.a, self.b = _conv(3, 8), nn.Linear(8 * 36, 5)

    def forward(self, x):
        x = self.a(x)
        return self.b(x.view(x.size(0), x.shape[1] * 36))


NETWORKS = [Chain, Residual, Separable, Concat, Grouped, Sized]
X = torch.randn(2, 3, 6, 6, generator=torch.Generator().manual_seed(0))


def _table(analysis, folder, **options) -> LatencyTable:
    return LatencyTable.measure(analysis, cache=folder, **options)


def _cut(model, analysis, **options):
    """A pruned network, and the mask of ids that are left."""
    pruned = fxprune.prune(model, X, verify=False, **options)
    return pruned, kept_by_plan(analysis, pruned.fxprune.plan)


# -- what a table tells ----------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_a_cost_that_is_linear_along_widths_is_told_exactly(network, clock, tmp_path):
    model = network()
    analysis = fxprune.analyze(model, X)
    table = _table(analysis, tmp_path)
    for rate in (0.1, 0.25, 0.5, 0.6, 0.75, 0.95):
        pruned, kept = _cut(model, analysis, rate=rate)
        assert table.ms(kept) == pytest.approx(2 * _elements(pruned, Inputs((X,), {})) / 100 + 5)


@pytest.mark.parametrize("network", NETWORKS)
def test_the_unpruned_network_takes_what_was_measured(network, clock, tmp_path):
    model = network()
    table = _table(fxprune.analyze(model, X), tmp_path)
    assert table.ms() == pytest.approx(2 * _elements(model, Inputs((X,), {})) / 100 + 5)
    wanted = [2 * parts + 5 for parts in table.alone_ms]
    assert len(wanted) == 5 and table.whole_ms == pytest.approx(wanted)
    assert not table.unmeasured


def test_a_graph_of_functions_is_measured_as_one_of_layers(clock, tmp_path):
    model = Residual()
    analysis = fxprune.analyze(model, X, frontend="export")
    table = _table(analysis, tmp_path)
    pruned, kept = _cut(model, analysis, rate=0.6, frontend="export")
    assert table.ms(kept) == pytest.approx(2 * _elements(pruned, Inputs((X,), {})) / 100 + 5)
    assert not table.unmeasured


def test_what_has_one_channel_has_one_width(clock, tmp_path):
    table = _table(fxprune.analyze(Chain(1, 4), X), tmp_path)
    entry = next(e for e in table.entries if e.node == "_1")
    assert entry.axes == () and len(entry.ms) == 1
    entry = next(e for e in table.entries if e.node == "_3")
    assert len(entry.axes) == 1 and table.ms() > 0


def test_layers_are_cut_one_by_one_as_well(clock, tmp_path):
    model = Residual()
    analysis = fxprune.analyze(model, X)
    table = _table(analysis, tmp_path)
    for rates in ({"a": 0.5}, {"stem": 0.3}, {"stem": 0.9, "a": 0.1}):
        pruned, kept = _cut(model, analysis, rate=0.0, rates=rates)
        assert table.ms(kept) == pytest.approx(2 * _elements(pruned, Inputs((X,), {})) / 100 + 5)


@pytest.mark.parametrize("network", NETWORKS)
def test_fewer_channels_never_take_longer(network, monkeypatch, tmp_path):
    Clock(lambda n: math.ceil(n / 500), lambda n: math.ceil(n / 700)).start(monkeypatch)
    analysis = fxprune.analyze(network(), X)
    table = _table(analysis, tmp_path)
    channels = np.concatenate([g.channels for g in analysis.groups if g.prunable])
    kept = np.ones(int(analysis.all_groups.channel.max()) + 1, bool)
    before = table.ms()
    for channel in np.random.default_rng(0).permutation(channels):
        kept[channel] = False
        now = table.ms(kept_ids(analysis, kept))
        assert 0 < now <= before + 1e-9
        before = now


def test_the_cost_at_a_point_of_the_grid_is_that_of_the_pruned_network(monkeypatch, tmp_path):
    """Whatever the clock says: points are not smoothed."""
    Clock(lambda n: n % 97 + 1).start(monkeypatch)
    model = Chain(16, 16)
    analysis = fxprune.analyze(model, X)
    table = _table(analysis, tmp_path)
    for rate in (0, 0.25, 0.5, 0.75):
        pruned, kept = _cut(model, analysis, rate=rate)
        run = _Each(pruned)
        run.run(X)
        assert table.parts_ms(kept) == pytest.approx(sum(n % 97 + 1 for n in run.each))


class _Each(_Counting):
    def __init__(self, module):
        super().__init__(module)
        self.each: list[int] = []

    def run_node(self, n):
        before = self.total
        made = super().run_node(n)
        self.each += [self.total - before] if self.total > before else []
        return made


def test_a_mask_of_another_network_is_refused(clock, tmp_path):
    table = _table(fxprune.analyze(Chain(), X), tmp_path)
    with pytest.raises(OptionError, match="ids"):
        table.ms(torch.ones(3, dtype=torch.bool))


# -- axes and widths -------------------------------------------------------------------------------


def _axes(analysis, name: str) -> list[int]:
    node = next(n for n in analysis.graph.graph.nodes if n.name == name)
    return [len(axis) for axis in axes_of(analysis, node)]


def test_axes_are_what_a_node_reads_and_makes():
    chain = fxprune.analyze(Chain(), X)
    assert _axes(chain, "_0") == [12]  # the input's channels stay
    assert _axes(chain, "_1") == [12]
    assert _axes(chain, "_3") == [20, 12]
    assert _axes(chain, "_7") == [20]  # and so do the output's
    assert _axes(fxprune.analyze(Separable(), X), "deep") == [16]
    concat = fxprune.analyze(Concat(), X)
    assert _axes(concat, "cat") == [20]
    assert _axes(concat, "c") == [20, 16]


def test_more_than_two_axes_move_together():
    class Three(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = nn.Linear(3, 8), nn.Linear(3, 6), nn.Linear(8, 2)
            self.mix = nn.Bilinear(8, 6, 5)

        def forward(self, x):
            return self.mix(self.a(x), self.b(x)).sum(-1, keepdim=True)

    analysis = fxprune.analyze(Three(), torch.randn(4, 3))
    for node in analysis.graph.graph.nodes:
        if "val" in node.meta:
            assert len(axes_of(analysis, node)) <= 2


def test_widths_are_equal_steps_the_one_above_each_and_the_least(clock, tmp_path):
    table = _table(fxprune.analyze(Chain(16, 300), X), tmp_path)
    entry = next(e for e in table.entries if e.node == "_3")
    widths = {
        round(s * n)
        for axis, shares in zip(entry.axes, entry.shares, strict=True)
        if (n := len(table.axes[axis])) == 16
        for s in shares
    }
    assert widths == {1, 4, 5, 8, 9, 12, 13, 16}
    wide = next(
        shares
        for axis, shares in zip(entry.axes, entry.shares, strict=True)
        if len(table.axes[axis]) == 300
    )
    assert [round(s * 300) for s in wide] == [1, 75, 150, 225, 300]
    assert len(entry.ms) == 8 * 5


def test_one_point_leaves_all_channels_and_the_fewest(clock, tmp_path):
    table = _table(fxprune.analyze(Chain(), X), tmp_path, points=1)
    entry = next(e for e in table.entries if e.node == "_1")
    assert entry.shares == ((1 / 12, 1.0),)


def test_constraints_hold_at_every_width():
    analysis = fxprune.analyze(Grouped(), X)
    for share in (0, 0.3, 0.5, 1):
        kept = level(analysis, share)
        for constraint in analysis.all_groups.constraints:
            counts = kept[constraint.rows].sum(1)
            assert counts.min() == counts.max() > 0


# -- what is remembered ----------------------------------------------------------------------------


def test_a_second_run_measures_nothing(clock, tmp_path):
    analysis = fxprune.analyze(Chain(), X)
    first, asked = _table(analysis, tmp_path), clock.asked
    assert asked > 0 and clock.wholes == 2 * 5
    assert _table(analysis, tmp_path) == first
    assert (clock.asked, clock.wholes) == (asked, 2 * 5)


def test_another_network_with_such_layers_measures_only_what_is_new(clock, tmp_path):
    _table(fxprune.analyze(Chain(), X), tmp_path)
    asked = clock.asked
    _table(fxprune.analyze(nn.Sequential(Chain()), X), tmp_path)
    assert clock.asked == asked
    _table(fxprune.analyze(Chain(12, 21), X), tmp_path)
    assert clock.asked > asked


def test_equal_layers_are_measured_once_in_each_pass(clock, tmp_path):
    once = nn.Sequential(_conv(3, 8), _conv(8, 8), _conv(8, 8), nn.Conv2d(8, 2, 1))
    _table(fxprune.analyze(once, X), tmp_path / "a")
    asked, clock.asked = clock.asked, 0
    more = nn.Sequential(_conv(3, 8), *(_conv(8, 8) for _ in range(6)), nn.Conv2d(8, 2, 1))
    _table(fxprune.analyze(more, X), tmp_path / "b")
    assert clock.asked == asked


def test_once_time_is_up_nothing_is_measured_twice(clock, tmp_path):
    analysis = fxprune.analyze(Chain(), X)
    _table(analysis, tmp_path / "a")
    asked, clock.asked = clock.asked, 0
    _table(analysis, tmp_path / "b", budget_s=1e-9)
    assert clock.asked == asked / 2


def test_what_differs_is_measured_apart(clock, tmp_path):
    """Settings, memory layouts and precisions."""
    asked = []
    for model in (
        nn.Sequential(_conv(3, 8), nn.Conv2d(8, 2, 3)),
        nn.Sequential(_conv(3, 8), nn.Conv2d(8, 2, 3, stride=2)),
        nn.Sequential(_conv(3, 8), nn.Conv2d(8, 2, 3)).double(),
        nn.Sequential(_conv(3, 8), nn.Conv2d(8, 2, 3)).to(memory_format=torch.channels_last),
    ):
        x = X.to(model[0].weight.dtype)
        _table(fxprune.analyze(model, x), tmp_path)
        asked.append(clock.asked)
    assert asked == sorted(set(asked))


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"format": 1}', '{"format": 1, "ms": {"a": -1}}',
             '{"format": 1, "ms": {"a": NaN}}', '{"format": 2, "ms": {}}', "[" * 100_000, "\udcff"],
)  # fmt: skip
def test_a_damaged_file_is_ignored_and_written_anew(text, clock, tmp_path):
    analysis = fxprune.analyze(Chain(), X)
    first = _table(analysis, tmp_path)
    (path,) = tmp_path.glob("*.json")
    good = json.loads(path.read_text())
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    asked = clock.asked
    assert _table(analysis, tmp_path) == first
    assert clock.asked == 2 * asked
    assert json.loads(path.read_text()) == good
    assert list(tmp_path.iterdir()) == [path]


def test_two_processes_do_not_lose_what_the_other_wrote(clock, tmp_path):
    one, other = fxprune.analyze(Chain(12, 20), X), fxprune.analyze(Chain(7, 9), X)
    late = []

    def progress(what, share):
        if not late:  # the other starts and ends while this one runs
            late.append(what)
            _table(other, tmp_path)

    _table(one, tmp_path, progress=progress)
    asked = clock.asked
    _table(one, tmp_path)
    _table(other, tmp_path)
    assert clock.asked == asked


def test_a_folder_that_cannot_be_written_is_no_error(clock, tmp_path):
    (tmp_path / "file").write_text("")
    assert _table(fxprune.analyze(Chain(), X), tmp_path / "file" / "below").ms() > 0


def test_what_was_measured_before_an_error_is_kept(clock, tmp_path):
    analysis = fxprune.analyze(Chain(), X)

    def stop(what, share):
        if share > 0.4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        _table(analysis, tmp_path, progress=stop)
    (path,) = tmp_path.glob("*.json")
    assert json.loads(path.read_text())["ms"]


def test_the_default_folder_is_the_users(clock, tmp_path, monkeypatch):
    monkeypatch.setenv("FXPRUNE_CACHE", str(tmp_path / "own"))
    LatencyTable.measure(fxprune.analyze(Chain(), X))
    assert len(list((tmp_path / "own").glob("latency-*.json"))) == 1
    monkeypatch.delenv("FXPRUNE_CACHE")
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("USERPROFILE", str(tmp_path))
    assert timings.default_folder() == tmp_path / ".cache" / "fxprune"


def test_threads_have_files_of_their_own(clock, tmp_path):
    analysis = fxprune.analyze(Chain(), X)
    assert _table(analysis, tmp_path, points=1, threads=1).environment["threads"] == 1
    assert _table(analysis, tmp_path, points=1, threads=2).environment["threads"] == 2
    assert len(list(tmp_path.glob("*.json"))) == 2


# -- plain data ------------------------------------------------------------------------------------


@pytest.mark.parametrize("network", NETWORKS)
def test_json_gives_an_equal_table(network, clock, tmp_path):
    model = network()
    analysis = fxprune.analyze(model, X)
    table = _table(analysis, tmp_path)
    again = LatencyTable.from_json(table.to_json())
    assert again == table
    _, kept = _cut(model, analysis, rate=0.4)
    assert again.ms(kept) == table.ms(kept)
    assert str(again) == str(table) and "ms unpruned" in str(table)


@pytest.mark.parametrize("change", [
    lambda data: data.pop("entries"),
    lambda data: data.update(format=2),
    lambda data: data.update(axes=3),
    lambda data: data.update(other=1),
    lambda data: data["entries"][0]["ms"].pop(),
    lambda data: data["entries"][0].update(axes=[99]),
    lambda data: data["entries"][0]["shares"][0].reverse(),
    lambda data: data["entries"][0]["ms"].__setitem__(0, float("nan")),
    lambda data: data["axes"][0].__setitem__(0, 10**6),
    lambda data: data["whole_ms"].pop(),
    lambda data: data["alone_ms"].reverse(),
    lambda data: data["whole_ms"].__setitem__(0, float("inf")),
])  # fmt: skip
def test_what_is_no_table_is_refused(change, clock, tmp_path):
    data = json.loads(_table(fxprune.analyze(Chain(), X), tmp_path).to_json())
    change(data)
    with pytest.raises(PlanError, match="not a table of times"):
        LatencyTable.from_json(json.dumps(data))


@pytest.mark.parametrize("text", ["", "[]", "7", "null", "[" * 100_000])
def test_texts_that_are_no_table_are_refused(text):
    with pytest.raises(PlanError, match="not a table of times"):
        LatencyTable.from_json(text)


# -- options and odd networks ----------------------------------------------------------------------


def test_another_batch_size(clock, tmp_path):
    model = Chain()
    analysis = fxprune.analyze(model, X)
    table = _table(analysis, tmp_path, batch=5)
    assert table.batch == 5
    x = torch.randn(5, 3, 6, 6)
    pruned, kept = _cut(model, analysis, rate=0.6)
    assert table.ms(kept) == pytest.approx(2 * _elements(pruned, Inputs((x,), {})) / 100 + 5)


def test_a_recorded_network_is_refused(tmp_path):
    analysis = fxprune.analyze(Chain(), X, frontend="record")
    assert analysis.recorded
    with pytest.raises(OptionError, match="recorded") as caught:
        _table(analysis, tmp_path)
    assert caught.value.hint


@pytest.mark.parametrize(
    "options",
    [dict(points=0), dict(points=1.5), dict(batch=0), dict(threads=0), dict(budget_s=0),
     dict(budget_s=math.inf), dict(device="nowhere")],
)  # fmt: skip
def test_options_that_cannot_be_used(options, tmp_path):
    with pytest.raises(OptionError):
        _table(fxprune.analyze(Chain(), X), tmp_path, **options)


def test_something_else_than_an_analysis_is_refused(tmp_path):
    with pytest.raises(OptionError, match="Analysis") as caught:
        LatencyTable.measure(Chain(), cache=tmp_path)  # type: ignore[arg-type]
    assert "analyze" in caught.value.hint


class Delicate(nn.Module):
    """An op that runs in the network alone."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Linear(3, 4), nn.Linear(4, 2)

    def forward(self, x):
        y = self.a(x)
        square = y.transpose(0, 1) @ y + torch.eye(4)
        return self.b(torch.linalg.cholesky(square))


def test_nodes_that_do_not_run_alone_are_named(tmp_path):
    table = _table(fxprune.analyze(Delicate(), torch.randn(2, 3)), tmp_path, budget_s=0.2)
    assert table.unmeasured == ("linalg_cholesky",) or "cholesky" in table.unmeasured[0]
    assert table.ms() > 0


def test_a_node_that_runs_at_full_width_only_has_no_axes(monkeypatch, tmp_path):
    def picky(module, inputs, device, budget_s):
        if any(isinstance(m, nn.BatchNorm2d) and m.num_features < 12 for m in module.modules()):
            raise InputError("no")
        return 1.0

    monkeypatch.setattr(timings, "timed_ms", picky)
    table = _table(fxprune.analyze(Chain(), X), tmp_path)
    entry = next(e for e in table.entries if e.node == "_1")
    assert entry.axes == () and entry.ms == (1.0,) and not table.unmeasured


def test_a_network_on_the_meta_device_is_measured_by_its_ops(clock, tmp_path):
    with torch.device("meta"):
        model = Chain()
    table = _table(fxprune.analyze(model, X.to("meta")), tmp_path)
    assert table.alone_ms == ()
    assert table.ms() == pytest.approx(_elements(Chain(), Inputs((X,), {})) / 100)


def test_a_shuffle_of_channels(clock, tmp_path):
    class Shuffled(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = _conv(3, 8), _conv(8, 8, groups=2)
            self.c = _conv(8, 2)
            with torch.no_grad():  # the same channels go in both halves: the shuffle stays
                self.a.weight[4:] = self.a.weight[:4]

        def forward(self, x):
            x = self.a(x)
            n, c, h, w = x.shape
            x = x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
            return self.c(self.b(x))

    analysis = fxprune.analyze(Shuffled(), X)
    table = _table(analysis, tmp_path)
    pruned, kept = _cut(analysis.model, analysis, rate=0.5)
    assert not table.unmeasured
    assert table.parts_ms(kept) == pytest.approx(_elements(pruned, Inputs((X,), {})) / 100)


def test_scattered_streams(clock, tmp_path):
    analysis = fxprune.analyze(Residual(), X, scatter=True)
    table = _table(analysis, tmp_path)
    pruned, kept = _cut(analysis.model, analysis, rate=0.5, scatter=True)
    assert not table.unmeasured
    assert table.parts_ms(kept) == pytest.approx(_elements(pruned, Inputs((X,), {})) / 100)


# -- a real clock ----------------------------------------------------------------------------------


def test_a_real_measurement_leaves_everything_as_it_was(tmp_path):
    model = Chain().train()
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    analysis = fxprune.analyze(model, X)
    torch.manual_seed(3)
    threads, state = torch.get_num_threads(), torch.get_rng_state()
    shown: list[float] = []
    table = _table(
        analysis,
        tmp_path,
        points=2,
        budget_s=0.2,
        threads=2,
        progress=lambda what, share: shown.append(share),
    )
    _, kept = _cut(model, analysis, rate=0.5)
    for found in (table.ms(), table.ms(kept), *table.whole_ms):
        assert math.isfinite(found) and found > 0
    assert not table.unmeasured
    assert torch.get_num_threads() == threads and torch.equal(torch.get_rng_state(), state)
    assert all(module.training for module in model.modules())
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())
    assert shown == sorted(shown) and 0 <= shown[0] and shown[-1] <= 1


def test_what_a_call_changes_in_place_does_not_fade_away(monkeypatch, tmp_path):
    """Halved at each call, it would end in numbers that processors are slow with."""
    seen = []

    def clock(module, inputs, device, budget_s):
        with_state = [m for m in module.modules() if getattr(m, "inplace", False)]
        for _ in range(300 if with_state else 0):
            module(*inputs.args)
        seen.extend(float(inputs.args[0].abs().max()) for _ in with_state)
        return 1.0

    monkeypatch.setattr(timings, "timed_ms", clock)
    model = nn.Sequential(_conv(3, 8), nn.SiLU(inplace=True), _conv(8, 2))
    _table(fxprune.analyze(model, X), tmp_path)
    assert seen and not any(0 < most < 1e-30 for most in seen)


# -- for other networks ----------------------------------------------------------------------------


class Square(nn.Module):
    def __init__(self, wide: int = 8, stride: int = 1):
        super().__init__()
        self.a, self.b, self.c = _conv(3, wide, stride=stride), _conv(wide, wide), _conv(wide, 4)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu())


def _for_latency(model, x, table):
    return fxprune.prune(model, x, target={"latency_ms": 0.9 * table.ms()}, latency_table=table)


@pytest.mark.parametrize(
    ("model", "x"),
    [(Square(16), X), (Square(4), X), (Square(stride=2), X), (Square(), torch.randn(2, 3, 8, 8))],
)
def test_a_table_of_another_network_is_refused(model, x, clock, tmp_path):
    table = _table(fxprune.analyze(Square(), X), tmp_path)
    for each in (table, LatencyTable.from_json(table.to_json())):
        with pytest.raises(OptionError, match="of another network") as caught:
            _for_latency(model, x, each)
        assert "LatencyTable.measure" in caught.value.hint


def test_a_table_of_a_network_with_more_ids_is_refused_where_it_does_not_say_its_network(
    clock, tmp_path
):
    data = json.loads(_table(fxprune.analyze(Square(16), X), tmp_path).to_json())
    del data["network"]
    table = LatencyTable.from_json(json.dumps(data))
    with pytest.raises(OptionError, match="of another network"):
        _for_latency(Square(), X, table)
    assert _for_latency(Square(16), X, table).fxprune.report.targets[0].met


@pytest.mark.parametrize("network", NETWORKS)
def test_a_table_of_other_weights_or_of_a_copy_is_taken(network, clock, tmp_path):
    table = _table(fxprune.analyze(network(), X), tmp_path)
    for model in (network(), nn.Sequential(network()), network().double()):
        x = X.to(next(model.parameters()).dtype)
        pruned = _for_latency(model, x, table)
        assert not pruned.fxprune.report.targets[0].note.startswith("times are of batch")


@pytest.mark.parametrize("network", NETWORKS)
def test_a_table_of_another_batch_says_so(network, clock, tmp_path):
    analysis = fxprune.analyze(network(), X)
    table = _table(analysis, tmp_path, batch=5)
    report = _for_latency(network(), X, table).fxprune.report
    assert "times are of batch 5, the example inputs of 2" in str(report)
    five = fxprune.analyze(network(), torch.randn(5, 3, 6, 6))
    assert _table(five, tmp_path).network == table.network == _table(analysis, tmp_path).network


def test_what_is_no_table_is_named():
    with pytest.raises(OptionError, match="latency_table is a str") as caught:
        fxprune.prune(Square(), X, target={"latency_ms": 1.0}, latency_table="x")
    assert "LatencyTable.measure" in caught.value.hint


def test_progress_is_shown_as_in_prune(clock, tmp_path, capsys):
    analysis = fxprune.analyze(Square(), X)
    assert _table(analysis, tmp_path, progress=True) == _table(analysis, tmp_path, progress=False)
    with pytest.raises(OptionError, match="no way to show progress"):
        _table(analysis, tmp_path, progress=3)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_real_measurement_on_a_gpu(tmp_path):
    table = _table(fxprune.analyze(Chain(), X), tmp_path, device="cuda", budget_s=2)
    assert table.ms() > 0 and table.environment["device"] == torch.cuda.get_device_name()
