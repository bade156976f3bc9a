"""Prune every CNN of torchvision by half, without example inputs, and check what comes out.

``python -m benchmarks.torchvision_table --only "resnet*" --out table.md``

Each network runs in a process of its own. The exit code is 1 if any check of any network failed.
"""

from __future__ import annotations

import argparse
import copy
import dataclasses
import json
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import dataclass, field
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxprune
from benchmarks import common

MODULE = "benchmarks.torchvision_table"
LEFT = 0.55  # of the parameters, at most
LIMIT = 1e-9  # of the largest output, in float64
DEPENDS = (
    1e-6  # outputs of two inputs differ by more than this, or a comparison would prove nothing
)
LARGE = 300e6  # parameters; above, the second comparison is made in float32
SIDES = (64, 96, 128, 160)  # image sizes tried before the default


@dataclass
class Result:
    """What was found for one network. ``problems`` are checks that failed, ``notes`` those that
    could not be made, or were made in a weaker form."""

    name: str
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    input: str = ""
    params: tuple[int, int] = (0, 0)
    macs: tuple[int, int] = (0, 0)
    difference: float | None = None
    reference: str = ""
    masked: float | None = None
    depends: float = 0.0
    loss: tuple[float, float] = (0.0, 0.0)
    seconds: float = 0.0
    memory: int = 0


@dataclass
class Case:
    """A network, what was made of it, and an input small enough to run it often."""

    model: nn.Module
    pruned: Any
    x: Tensor
    result: Result


class Failed(Exception):
    """A check did not hold."""


def require(holds: bool, otherwise: str) -> None:
    if not holds:
        raise Failed(otherwise)


def check(name: str, example: Tensor | None = None) -> Result:
    """Prune a network of torchvision by half and make all checks; nothing is raised."""
    result = Result(name)
    try:
        case = prepared(result, example)
    except Exception as error:
        result.problems.append(f"prune: {type(error).__name__}: {str(error).splitlines()[0]}")
        return result
    for step in CHECKS:
        try:
            step(case)
        except Failed as error:
            result.problems.append(f"{step.__name__}: {error}")
        except Exception as error:
            first = (str(error).splitlines() or [""])[0]
            result.problems.append(f"{step.__name__}: {type(error).__name__}: {first}")
    result.memory = common.peak_memory()
    return result


def prepared(result: Result, example: Tensor | None) -> Case:
    model = common.torchvision_model(result.name)
    shape = example.shape if example is not None else default_shape(model)
    x = small(model, tuple(shape))
    common.randomised(model, x)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    start = time.perf_counter()
    pruned = fxprune.prune(model, example, criterion="l2", rate=0.5)
    result.seconds = time.perf_counter() - start
    after = model.state_dict()
    require(all(torch.equal(before[k], after[k]) for k in before), "the model was changed")
    report = pruned.fxprune.report
    result.input, result.params, result.macs = report.inputs, report.params, report.macs
    return Case(model, pruned, x, result)


def default_shape(model: nn.Module) -> tuple[int, ...]:
    """The shape of the input fxprune takes when it is given none."""
    return tuple(fxprune.analyze(model).inputs.args[0].shape)


def small(model: nn.Module, shape: tuple[int, ...]) -> Tensor:
    """A random input with a smaller image, where the network takes one."""
    torch.manual_seed(2)
    for side in SIDES:
        if side < shape[-1]:
            x = torch.randn(*shape[:-2], side, side)
            if runs(model, x):
                return x
    return torch.randn(shape)


def runs(model: nn.Module, x: Tensor) -> bool:
    try:
        with torch.no_grad():
            model(x)
    except (RuntimeError, ValueError):
        return False
    return True


def outputs(model: nn.Module, x: Tensor) -> list[Tensor]:
    with torch.no_grad():
        return tensors(model(x))


def tensors(value: Any) -> list[Tensor]:
    return [t for t in pytree.tree_leaves(value) if isinstance(t, Tensor)]


def gap(expected: list[Tensor], got: list[Tensor]) -> float:
    """The largest difference, as a share of the largest expected value."""
    scale = max(float(t.abs().max()) for t in expected)
    return max(float((a - b).abs().max()) for a, b in zip(expected, got, strict=True)) / max(
        scale, 1e-300
    )


# -- the checks ------------------------------------------------------------------------------------


def size(case: Case) -> None:
    """Half of the channels are about a quarter of the parameters; biases and heads keep more."""
    before, after = case.result.params
    require(
        after == sum(p.numel() for p in case.pruned.parameters()),
        "the report counts other parameters",
    )
    require(after <= LEFT * before, f"{after / before:.0%} of the parameters are left")


def verification(case: Case) -> None:
    """prune's own proof: in float64, within the limit."""
    found = case.pruned.fxprune.report.verification
    case.result.difference, case.result.reference = found.difference, found.reference
    require(found.shapes and found.difference is not None, "numbers were not compared")
    require(found.dtype == "float64", f"compared in {found.dtype}")
    require(found.difference <= LIMIT, f"differs by {found.difference:.1e}")


def structure(case: Case) -> None:
    """The output is nested as before, of the same shapes."""
    with torch.no_grad():
        old, new = case.model(case.x), case.pruned(case.x)
    shape = lambda t: tuple(t.shape)  # noqa: E731
    require(
        type(old) is type(new), f"the output is a {type(new).__name__}, was a {type(old).__name__}"
    )
    require(
        pytree.tree_map(shape, old) == pytree.tree_map(shape, new), "the output changed its shape"
    )


def slices(case: Case) -> None:
    """Each tensor of the result is the planned slice of the original's tensor of that name."""
    old, plan = case.model.state_dict(), case.pruned.fxprune.plan
    for name, new in case.pruned.state_dict().items():
        require(name in old, f"{name} is not in the original")
        require(
            torch.equal(new, sliced(old[name], plan.kept.get(name, {}))), f"{name} is not a slice"
        )
        require(new.dtype == old[name].dtype, f"{name} is {new.dtype}")


def sliced(tensor: Tensor, kept: dict[int, Any]) -> Tensor:
    """The kept indices of a tensor, element block by element block."""
    blocks = next((rows for rows in kept.values() if rows and isinstance(rows[0], list)), None)
    if blocks is None:
        for dim, rows in kept.items():
            tensor = tensor[(slice(None),) * dim + (rows,)]
        return tensor
    rows = torch.tensor(kept.get(0, list(range(len(tensor))))).chunk(len(blocks))
    own = [
        {d: r[b] if isinstance(r[0], list) else r for d, r in kept.items() if d}
        for b in range(len(blocks))
    ]
    return torch.cat([sliced(tensor[part], dims) for part, dims in zip(rows, own, strict=True)])


def masked(case: Case) -> None:
    """The pruned network against a copy of the original with the other slices zeroed, both run as
    they are, on another batch size and image size. Not for statistics over channels."""
    case.result.depends = dependence(case)
    require(case.result.depends > DEPENDS, "the output does not depend on the input")
    if "normalised" in case.result.reference:
        case.result.notes.append("no second comparison: normalises over channels")
        return
    dtype, limit = (
        (torch.float64, LIMIT) if case.result.params[0] <= LARGE else (torch.float32, 1e-3)
    )
    if dtype is torch.float32:
        case.result.notes.append("second comparison in float32: over 300 M parameters")
    x = other_batch(case.x).to(dtype)
    expected = outputs(zeroed(case.model, case.pruned.fxprune.plan).to(dtype), x)
    case.result.masked = gap(expected, outputs(copy.deepcopy(case.pruned).to(dtype), x))
    require(case.result.masked <= limit, f"differs by {case.result.masked:.1e}")


def dependence(case: Case) -> float:
    """How far the pruned network's outputs of two inputs differ."""
    other = torch.randn(case.x.shape, generator=torch.Generator().manual_seed(9))
    return gap(outputs(case.pruned, case.x), outputs(case.pruned, other))


def zeroed(model: nn.Module, plan: fxprune.Plan) -> nn.Module:
    """A copy of the model with every element that the plan does not keep set to zero."""
    model = copy.deepcopy(model)
    with torch.no_grad():
        for name, tensor in model.state_dict().items():
            if name in plan.kept:
                where = sliced(torch.arange(tensor.numel()).view(tensor.shape), plan.kept[name])
                keep = torch.zeros(tensor.numel(), dtype=torch.bool)
                keep[where.reshape(-1)] = True
                tensor.mul_(keep.view(tensor.shape))
    return model


def other_batch(x: Tensor) -> Tensor:
    return torch.randn(3, *x.shape[1:], generator=torch.Generator().manual_seed(3))


def batch(case: Case) -> None:
    """Another batch size runs."""
    for x in (other_batch(case.x), case.x[:1]):
        old, new = outputs(case.model, x), outputs(case.pruned, x)
        require(
            [t.shape for t in old] == [t.shape for t in new],
            f"another shape for a batch of {len(x)}",
        )


def image(case: Case) -> None:
    """Another image size, neither square nor even, runs where the original does."""
    *lead, height, width = case.x.shape
    x = torch.randn(*lead, height + 31, width + 16)
    if not runs(case.model, x):
        case.result.notes.append("takes one image size only")
        return
    old, new = outputs(case.model, x), outputs(case.pruned, x)
    require(
        [t.shape for t in old] == [t.shape for t in new], "another shape for another image size"
    )


def dtypes(case: Case) -> None:
    """It runs in float64, and in bfloat16 where the original does."""
    for dtype in (torch.float64, torch.bfloat16):
        x = case.x.to(dtype)
        if dtype is torch.bfloat16 and not runs(copy.deepcopy(case.model).to(dtype), x):
            case.result.notes.append("has no bfloat16 form here")
            return
        found = outputs(copy.deepcopy(case.pruned).to(dtype), x)
        require(all(t.dtype == dtype for t in found), f"the output of {dtype} has another dtype")
        require(all(bool(t.isfinite().all()) for t in found), f"not finite in {dtype}")


def copies(case: Case) -> None:
    """A deep copy computes the same and shares nothing."""
    twin = copy.deepcopy(case.pruned)
    require(
        same(outputs(case.pruned, case.x), outputs(twin, case.x)), "a copy computes something else"
    )
    mine = {p.data_ptr() for p in case.pruned.parameters()}
    require(not mine & {p.data_ptr() for p in twin.parameters()}, "a copy shares parameters")


def saves(case: Case) -> None:
    """Saved and loaded, it computes the same."""
    with tempfile.TemporaryFile() as file:
        torch.save(case.pruned, file)
        file.seek(0)
        loaded = torch.load(file, weights_only=False)
    require(
        same(outputs(case.pruned, case.x), outputs(loaded, case.x)),
        "what was loaded computes something else",
    )


def same(a: list[Tensor], b: list[Tensor]) -> bool:
    return all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


def modes(case: Case) -> None:
    """In eval() the output is a function of the input and statistics rest; in train() statistics
    move, and dropout and stochastic depth draw."""
    net = copy.deepcopy(case.pruned).eval()
    norms: list[Any] = [m for m in net.modules() if isinstance(m, common.BATCH_NORM)]
    means = [norm.running_mean.clone() for norm in norms]
    require(same(outputs(net, case.x), outputs(net, case.x)), "two runs in eval() differ")
    require(same(means, [norm.running_mean for norm in norms]), "statistics move in eval()")
    net.train()
    require(all(m.training for m in net.modules()), "train() does not reach every module")
    first, second = (seeded(net, case.x, seed) for seed in (4, 5))
    moved = [not torch.equal(a, n.running_mean) for a, n in zip(means, norms, strict=True)]
    require(
        all(moved), f"{moved.count(False)} of {len(norms)} normalisations do not move in train()"
    )
    if draws(case.model):
        require(not same(first, second), "nothing is dropped in train()")
    net.eval()
    require(
        same(outputs(net, case.x), outputs(net, case.x)), "two runs in eval() after train() differ"
    )


def seeded(net: nn.Module, x: Tensor, seed: int) -> list[Tensor]:
    torch.manual_seed(seed)
    return outputs(net, x)


def draws(model: nn.Module) -> bool:
    """Whether the model draws random numbers in train()."""
    kinds = ("Dropout", "Dropout2d", "Dropout3d", "StochasticDepth")
    main = [
        m for n, m in model.named_modules() if type(m).__name__ in kinds and not n.startswith("aux")
    ]
    return any(m.p > 0 for m in main)


def trains(case: Case) -> None:
    """Every parameter gets a gradient, and a few SGD steps on one batch lower the loss."""
    for share in (0.1, 0.01, 0.001):  # the step that would lower a linear loss by this share
        losses = trained(
            copy.deepcopy(case.pruned).train(), torch.cat([case.x, case.x.flip(-1)]), share
        )
        case.result.loss = (losses[0], losses[-1])
        if losses[-1] < losses[0]:
            return
    raise Failed(f"the loss goes from {losses[0]:.4g} to {losses[-1]:.4g}")


def trained(net: nn.Module, x: Tensor, share: float, steps: int = 4) -> list[float]:
    losses = []
    torch.manual_seed(6)
    targets = [torch.randn_like(t) for t in seeded(net, x, 7)]
    for _ in range(steps):
        torch.manual_seed(7)  # the same draw each time, so that the loss is one function
        found = tensors(net(x))
        loss = torch.stack(
            [(a - b).square().mean() for a, b in zip(found, targets, strict=True)]
        ).sum()
        net.zero_grad(set_to_none=True)
        loss.backward()
        missing = [name for name, p in net.named_parameters() if p.grad is None]
        require(not missing, f"no gradient: {', '.join(missing[:3])}")
        slope = sum(float(p.grad.square().sum()) for p in net.parameters() if p.grad is not None)
        torch.optim.SGD(net.parameters(), lr=share * loss.item() / slope).step()
        losses.append(loss.item())
    return losses


CHECKS: list[Callable[[Case], None]] = [
    size, verification, structure, slices, masked, batch, image, dtypes, copies, saves, modes,
    trains,
]  # fmt: skip


# -- the table -------------------------------------------------------------------------------------

COLUMNS = (
    "network", "input", "parameters", "left", "MACs left", "difference", "reference",
    "2nd difference", "loss", "s", "GB", "result",
)  # fmt: skip
HOW = """{versions}.
`fxprune.prune(model, criterion="l2", rate=0.5)`, no example inputs. `difference`: prune's own check
in float64; `2nd difference`: against a zeroed copy run as it is, on another input; both as a share
of the largest output. `loss`: before and after three SGD steps. `s`: seconds of prune with its
check, one thread. `GB`: the most memory the process held, with all checks.
"""


def row(r: Result) -> list[str]:
    verdict = "; ".join(r.problems) if r.problems else "ok"
    share = lambda pair: f"{pair[1] / pair[0]:.1%}" if pair[0] else ""  # noqa: E731
    reference = "over kept" if "normalised" in r.reference else "masked" if r.reference else ""
    loss = f"{r.loss[0]:.4g} to {r.loss[1]:.4g}"
    return [
        r.name, r.input, f"{r.params[0]:,}", share(r.params), share(r.macs), number(r.difference),
        reference, number(r.masked), loss, f"{r.seconds:.1f}", f"{r.memory / 2**30:.1f}",
        "; ".join([verdict, *r.notes]),
    ]  # fmt: skip


def number(value: float | None) -> str:
    return "" if value is None else f"{value:.0e}"


def measured(name: str, limit: float) -> Result:
    found = common.apart(MODULE, "--one", name, limit=limit)
    if "problem" in found:
        return Result(name, [found["problem"]])
    return Result(**found)


def run_all(names: list[str], jobs: int, limit: float) -> list[Result]:
    results = {}
    with Progress(console=common.console) as progress, ThreadPoolExecutor(jobs) as pool:
        task = progress.add_task("networks", total=len(names))
        waiting = {pool.submit(measured, name, limit): name for name in names}
        for done in as_completed(waiting):
            results[waiting[done]] = result = done.result()
            if result.problems:
                progress.console.print(f"[red]{result.name}[/red]: {'; '.join(result.problems)}")
            progress.update(task, advance=1, description=result.name)
    return [results[name] for name in names]


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", default="*", help="a shell-style pattern of names")
    parser.add_argument("--out", help="a Markdown file to write")
    parser.add_argument("--jobs", type=int, default=2, help="processes at once")
    parser.add_argument("--limit", type=float, default=900, help="seconds a network may take")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.one:
        torch.set_num_threads(1)
        print(json.dumps(dataclasses.asdict(check(options.one))))
        return 0
    results = run_all(common.torchvision_cnns(options.only), options.jobs, options.limit)
    return publish(results, options.out)


def publish(results: list[Result], out: str | None) -> int:
    good = sum(not r.problems for r in results)
    title = f"torchvision's CNNs pruned by half: {good} of {len(results)} pass every check"
    rows = [row(r) for r in results]
    common.show(title, COLUMNS, rows)
    how = HOW.format(versions=common.versions("torchvision"))
    common.write(out, "fxprune on torchvision", [how, common.markdown(title, COLUMNS, rows)])
    return int(good < len(results))


if __name__ == "__main__":
    sys.exit(main())
