"""Time and memory of pruning: fxprune beside Torch-Pruning, on the same networks and inputs.

``python -m benchmarks.prune_time --out prune_time.md``

Both remove half of the channels by L2 norms, on one thread, in turns, each time in a fresh process
that has warmed up on a network of three layers, and the median counts. The analysis is what
`fxprune.prune` does up to its step `groups`, and the construction of `BasePruner`; the total is all
it takes to have the small network: `fxprune.prune(..., verify="shapes")`, and construction and
`step()`. Then the growth with deeper networks. Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import copy
import gc
import json
import statistics
import sys
import time
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor, nn

import fxprune
from benchmarks import common

MODULE = "benchmarks.prune_time"
MODELS = (
    "resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0",
    "regnet_y_400mf", "googlenet", "inception_v3", "resnext50_32x4d", "vgg16_bn", "convnext_tiny",
    "densenet121", "densenet201",
)  # fmt: skip
GROWTH = {"residual blocks": (125, 250, 500, 1000), "dense layers": (25, 50, 100, 200)}
PATIENCE = 60.0  # seconds the peer gets for one size of a growing network

Measure = tuple[float, float, int]  # seconds of analysis, seconds in all, parameters left
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
clock: Callable[[], float] = time.perf_counter


# -- networks --------------------------------------------------------------------------------------


def network(name: str) -> tuple[nn.Module, Tensor]:
    """A network and an example input: torchvision's by name, or ``KIND/SIZE`` of a growing one."""
    kind, _, count = name.partition("/")
    if kind in GROWTH:
        torch.manual_seed(0)
        net = (Residual if kind.startswith("residual") else Dense)(int(count))
        return net.eval(), torch.randn(1, 3, 16, 16)
    options = {"aux_logits": False} if name in ("googlenet", "inception_v3") else {}
    side = 299 if name == "inception_v3" else 224
    return common.torchvision_model(name, **options), torch.randn(1, 3, side, side)


class Block(nn.Module):
    """Two 3x3 convolutions and a shortcut."""

    def __init__(self, width: int):
        super().__init__()
        self.conv1 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.conv2 = nn.Conv2d(width, width, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)

    def forward(self, x: Tensor) -> Tensor:
        return torch.relu(x + self.bn2(self.conv2(torch.relu(self.bn1(self.conv1(x))))))


class Residual(nn.Module):
    """A residual network of as many blocks as asked, in four stages of a few channels."""

    def __init__(self, blocks: int, width: int = 8):
        super().__init__()
        layers: list[nn.Module] = [nn.Conv2d(3, width, 3, padding=1)]
        for stage in range(4):
            count = blocks // 4 + (stage < blocks % 4)
            layers += [Block(width) for _ in range(count)]
            if stage < 3:
                layers.append(nn.Conv2d(width, width + 4, 1))
                width += 4
        self.features = nn.Sequential(*layers)
        self.head = nn.Linear(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.features(x).mean((2, 3)))


class DenseLayer(nn.Module):
    """One layer of a dense block: a 1x1 convolution, then a 3x3 one."""

    def __init__(self, width: int, growth: int):
        super().__init__()
        self.bn1, self.conv1 = nn.BatchNorm2d(width), nn.Conv2d(width, 2 * growth, 1, bias=False)
        self.bn2 = nn.BatchNorm2d(2 * growth)
        self.conv2 = nn.Conv2d(2 * growth, growth, 3, padding=1, bias=False)

    def forward(self, features: list[Tensor]) -> Tensor:
        x = self.conv1(torch.relu(self.bn1(torch.cat(features, 1))))
        return self.conv2(torch.relu(self.bn2(x)))


class Dense(nn.Module):
    """One dense block: each layer reads all before it."""

    def __init__(self, layers: int, growth: int = 8):
        super().__init__()
        self.stem = nn.Conv2d(3, growth, 3, padding=1)
        self.layers = nn.ModuleList(DenseLayer(growth * (i + 1), growth) for i in range(layers))
        self.head = nn.Linear(growth * (layers + 1), 10)

    def forward(self, x: Tensor) -> Tensor:
        features = [self.stem(x)]
        for layer in self.layers:
            features.append(layer(features))
        return self.head(torch.cat(features, 1).mean((2, 3)))


# -- the two tools ---------------------------------------------------------------------------------


def ours(model: nn.Module, x: Tensor) -> Measure:
    """fxprune: one `prune`; its analysis ends where the groups are known."""
    at: dict[str, float] = {}

    def watch(step: str, before: Any, after: Any) -> None:
        at[step] = clock()

    start = clock()
    pruned = fxprune.prune(model, (x,), criterion="l2", rate=0.5, verify="shapes", watch=watch)
    end = clock()
    return at["groups"] - start, end - start, sum(p.numel() for p in pruned.parameters())


def theirs(model: nn.Module, x: Tensor) -> Measure:
    """Torch-Pruning: the pruner, which analyses, and one step, which cuts the model itself."""
    import torch_pruning as tp

    last = [m for m in model.modules() if isinstance(m, nn.Linear)][-1]
    importance = tp.importance.GroupMagnitudeImportance(p=2)
    start = clock()
    pruner = tp.pruner.BasePruner(
        model, x, importance=importance, pruning_ratio=0.5, ignored_layers=[last]
    )
    analysed = clock()
    pruner.step()
    end = clock()
    return analysed - start, end - start, sum(p.numel() for p in model.parameters())


TOOLS: dict[str, Callable[[nn.Module, Tensor], Measure]] = {
    "fxprune": ours,
    "Torch-Pruning": theirs,
}


# -- measuring, each in a process of its own -------------------------------------------------------


def warmed(tools: list[str]) -> None:
    """Everything imported and every rule read, on a network of three layers."""
    net = nn.Sequential(
        nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3), nn.Flatten()
    )
    net.append(nn.Linear(8 * 16, 4))
    for tool in tools:
        TOOLS[tool](copy.deepcopy(net).eval(), torch.randn(1, 3, 8, 8))


def timed(name: str, tools: list[str], turn: int) -> dict[str, Any]:
    """Seconds of each tool on a copy of its own; `turn` says which of them begins."""
    warmed(tools)
    model, x = network(name)
    result: dict[str, Any] = {"params": sum(p.numel() for p in model.parameters())}
    for i in range(len(tools)):
        tool = tools[(i + turn) % len(tools)]
        fresh = copy.deepcopy(model)
        gc.collect()
        analysis, total, left = TOOLS[tool](fresh, x)
        result[tool] = {"analysis": analysis, "total": total, "left": left}
    return result


def sized(name: str) -> dict[str, Any]:
    """Nodes and elements: what growth is measured against."""
    model, x = network(name)
    graph = fxprune.analyze(model, (x,)).graph.graph
    return {"nodes": len(graph.nodes), "elements": sum(p.numel() for p in model.parameters())}


def weighed(name: str, tool: str) -> dict[str, Any]:
    """Memory that pruning needs above that of the loaded model."""
    warmed([tool])
    model, x = network(name)
    gc.collect()
    common.reset_peak()
    before = common.memory()
    TOOLS[tool](model, x)
    return {"memory": max(common.peak_since_reset() - before, 0)}


# -- the tables ------------------------------------------------------------------------------------

COLUMNS = (
    "network", "fxprune analysis s", "total s", "memory MB", "left", "Torch-Pruning analysis s",
    "total s", "memory MB", "left", "analysis ratio", "total ratio",
)  # fmt: skip
HOW = """{versions}, one thread.
Half of the channels removed by L2 norms. Seconds ({clock} clock) are medians; ratios say how many
times as long Torch-Pruning takes. Memory is the peak above that of the loaded model, `left` the
share of its parameters.
"""


def repeated(name: str, options: argparse.Namespace, *, tool: str = "", limit: float = 0) -> Any:
    """Median seconds over several processes, so that none finds what an earlier run left behind."""
    runs = []
    for turn in range(1 if limit else options.repeats):
        call = ["--one", name, "--clock", options.clock, "--turn", str(turn)]
        call += ["--tool", tool] if tool else []
        runs.append(common.apart(MODULE, *call, limit=limit or options.limit))
    failed = next((run for run in runs if "problem" in run), None)
    if failed:
        return failed
    for which in TOOLS.keys() & runs[0].keys():
        for what in ("analysis", "total"):
            runs[0][which][what] = statistics.median(run[which][what] for run in runs)
    return runs[0]


def compared(names: list[str], options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """Both tools on each network."""
    results = {}
    with Progress(console=common.console) as progress:
        task = progress.add_task("networks", total=len(names))
        for name in names:
            progress.update(task, description=name)
            found = repeated(name, options)
            for tool in TOOLS.keys() & found.keys():
                call = ("--one", name, "--memory", tool)
                found[tool] |= common.apart(MODULE, *call, limit=options.limit)
            results[name] = found
            progress.advance(task)
    return results


def row(name: str, found: dict[str, Any]) -> list[str]:
    if "problem" in found:
        return [name, found["problem"], *[""] * (len(COLUMNS) - 2)]
    cells = [name]
    for tool in TOOLS:
        t = found[tool]
        cells += [
            f"{t['analysis']:.3f}",
            f"{t['total']:.3f}",
            megabytes(t),
            f"{t['left'] / found['params']:.1%}",
        ]
    return [*cells, f"{ratio(found, 'analysis'):.1f}", f"{ratio(found, 'total'):.1f}"]


def megabytes(found: dict[str, Any]) -> str:
    return f"{found['memory'] / 2**20:.0f}" if "memory" in found else ""


def ratio(found: dict[str, Any], what: str) -> float:
    """How many times as long the peer takes."""
    return found["Torch-Pruning"][what] / found["fxprune"][what]


def geometric(values: list[float]) -> float:
    return float(np.exp(np.mean(np.log(values)))) if values else float("nan")


def grown(options: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """fxprune on networks that grow, and the peer as far as its patience goes."""
    names = [f"{kind}/{count}" for kind, counts in GROWTH.items() for count in counts]
    names = [name for name in names if common.matches(name, options.only)]
    results = {}
    with Progress(console=common.console) as progress:
        task = progress.add_task("growth", total=len(names))
        for name in names:
            progress.update(task, description=name)
            found = repeated(name, options, tool="fxprune")
            found |= common.apart(MODULE, "--one", name, "--size", limit=options.limit)
            peer = repeated(name, options, tool="Torch-Pruning", limit=PATIENCE + 15)
            results[name] = {**found, "Torch-Pruning": peer.get("Torch-Pruning", {})}
            progress.advance(task)
    return results


GROWTH_COLUMNS = (
    "network", "nodes", "parameters", "fxprune analysis s", "total s", "Torch-Pruning total s",
)  # fmt: skip


def growth_row(name: str, found: dict[str, Any]) -> list[str]:
    if "fxprune" not in found:
        return [name, *[""] * 4, found.get("problem", "")]
    kind, _, count = name.partition("/")
    own, peer = found["fxprune"], found["Torch-Pruning"].get("total", PATIENCE)
    beside = f"{peer:.2f}" if peer < PATIENCE else f"over {PATIENCE:.0f}"
    size = [f"{found['nodes']:,}", f"{found['elements']:,}"]
    return [f"{count} {kind}", *size, f"{own['analysis']:.3f}", f"{own['total']:.3f}", beside]


def exponents(results: dict[str, dict[str, Any]]) -> list[list[str]]:
    """The power of the size with which time grows, fitted over all sizes of a network."""
    rows = []
    for kind in GROWTH:
        mine = [r for name, r in results.items() if name.startswith(f"{kind}/") and "fxprune" in r]
        for size in ("nodes", "elements"):
            cells = [f"{kind}, against {size}"]
            for what in ("analysis", "total"):
                cells.append(fitted([r[size] for r in mine], [r["fxprune"][what] for r in mine]))
            rows.append(cells)
    return rows


def fitted(sizes: list[float], seconds: list[float]) -> str:
    if len(sizes) < 2:
        return ""
    return f"{np.polyfit(np.log(sizes), np.log(seconds), 1)[0]:.2f}"


EXPONENT_COLUMNS = ("growth of fxprune's time", "analysis", "total")


# -- the command -----------------------------------------------------------------------------------


def one(options: argparse.Namespace) -> dict[str, Any]:
    global clock
    clock = CLOCKS[options.clock]
    torch.set_num_threads(1)
    if options.memory:
        return weighed(options.one, options.memory)
    if options.size:
        return sized(options.one)
    return timed(options.one, [options.tool] if options.tool else list(TOOLS), options.turn)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="a shell-style pattern of networks")
    parser.add_argument("--out", help="a Markdown file to write")
    parser.add_argument("--repeats", type=int, default=5, help="processes a network")
    parser.add_argument(
        "--clock", choices=CLOCKS, default="wall", help="cpu: for a machine with other work to do"
    )
    parser.add_argument("--limit", type=float, default=900, help="seconds one process may take")
    parser.add_argument("--no-growth", action="store_true", help="leave the growing networks out")
    for hidden in ("--one", "--tool", "--memory"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--turn", type=int, default=0, help=argparse.SUPPRESS)
    parser.add_argument("--size", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        print(json.dumps(one(options)))
        return 0
    names = [name for name in MODELS if common.matches(name, options.only)]
    results = compared(names, options)
    growth = {} if options.no_growth else grown(options)
    return publish(results, growth, options)


def publish(
    results: dict[str, dict[str, Any]],
    growth: dict[str, dict[str, Any]],
    options: argparse.Namespace,
) -> int:
    sound = {name: r for name, r in results.items() if "problem" not in r}
    rows = [row(name, found) for name, found in results.items()]
    means = {
        what: geometric([ratio(r, what) for r in sound.values()]) for what in ("analysis", "total")
    }
    rows.append(["geometric mean", *[""] * 8, f"{means['analysis']:.1f}", f"{means['total']:.1f}"])
    versions = common.versions("torchvision", "torch-pruning")
    parts = [HOW.format(versions=versions, clock=options.clock)]
    tables: list[tuple[str, Sequence[str], common.Rows]] = [("Pruning by half", COLUMNS, rows)]
    if growth:
        tables.append(
            ("Growing networks", GROWTH_COLUMNS, [growth_row(n, r) for n, r in growth.items()])
        )
        tables.append(("Fitted exponents", EXPONENT_COLUMNS, exponents(growth)))
    for table in tables:
        common.show(*table)
        parts.append(common.markdown(*table))
    common.write(options.out, "Time and memory of pruning", parts)
    slower = [name for name, r in sound.items() if ratio(r, "total") < 1]
    return int(bool(slower) or means["total"] < 2 or len(sound) < len(results))


if __name__ == "__main__":
    sys.exit(main())
