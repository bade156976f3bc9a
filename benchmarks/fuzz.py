"""Prune many random networks and check the laws on each: `python benchmarks/fuzz.py --count 2000`.

Each seed stands for one network and one way of pruning it (see tests/strategies.py). The pruned
network must compute the masked original in float64, keep its output shapes and hold slices of the
original's tensors; every 20th network must also come back unchanged at rate 0. A failure is printed
with its seed and the fewest blocks that still fail; `--seed-only SEED` runs it again with a
traceback. The exit status is 1 if anything failed.
"""

from __future__ import annotations

import argparse
import sys
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from multiprocessing import get_context
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(_ROOT), str(_ROOT / "tests")]

import torch  # noqa: E402
from rich.console import Console  # noqa: E402
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn  # noqa: E402
from strategies import BLOCKS, HEADS, Choice, Network, draw_choice, draw_network  # noqa: E402
from test_laws import check_nothing_dropped, check_sliced_is_masked  # noqa: E402

console = Console()


@dataclass(frozen=True)
class Result:
    """What came of one seed; ``removed`` is None where nothing could go."""

    seed: int
    parts: tuple[str, ...]
    removed: float | None = None
    fault: str = ""
    smallest: str = ""


def start() -> None:
    torch.set_num_threads(1)


def run(seed: int) -> Result:
    """Check one seed; a failure is shrunk to fewer blocks."""
    network, choice = draw_network(seed), draw_choice(seed)
    parts = (*network.blocks, network.head)
    try:
        return Result(seed, parts, laws(network, choice, rate_0=seed % 20 == 0))
    except Exception as error:
        small = shrunk(network, choice, type(error))
        return Result(seed, parts, None, fault_of(error), f"{small}, {choice}")


def laws(network: Network, choice: Choice, *, rate_0: bool) -> float | None:
    removed = check_sliced_is_masked(network, choice)
    if rate_0:
        check_nothing_dropped(network)
    return removed


def fault_of(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    line = (str(error).splitlines() or [""])[0]
    return f"{type(error).__name__} at {Path(frame.filename).name}:{frame.lineno}: {line}"[:300]


def shrunk(network: Network, choice: Choice, error: type[Exception]) -> Network:
    """Leave out blocks, and change the head for the plainest, as long as it fails the same way."""
    for i in range(len(network.blocks)):
        smaller = replace(network, blocks=network.blocks[:i] + network.blocks[i + 1 :])
        if smaller.blocks and fails(smaller, choice, error):
            return shrunk(smaller, choice, error)
    plain = replace(network, head="PooledHead")
    return plain if network.head != plain.head and fails(plain, choice, error) else network


def fails(network: Network, choice: Choice, error: type[Exception]) -> bool:
    try:
        laws(network, choice, rate_0=False)
    except Exception as found:
        return type(found) is error
    return False


def results(seeds: range, jobs: int) -> Iterator[Result]:
    if jobs == 1:
        start()
        yield from map(run, seeds)
        return
    with ProcessPoolExecutor(jobs, mp_context=get_context("spawn"), initializer=start) as pool:
        yield from pool.map(run, seeds, chunksize=4)


def fuzz(seeds: range, jobs: int) -> list[Result]:
    """Run all seeds beside a progress bar; failures are printed as they come."""
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
    )
    found = []
    with Progress(*columns, console=console) as bar:
        task = bar.add_task("networks", total=len(seeds))
        for result in results(seeds, jobs):
            found.append(result)
            bar.advance(task)
            if result.fault:
                console.print(
                    f"seed {result.seed}: {result.fault}\n  {result.smallest}",
                    markup=False,
                    soft_wrap=True,
                )
    return found


def summary(found: list[Result], seconds: float) -> str:
    failed = sum(bool(r.fault) for r in found)
    shares = [r.removed for r in found if r.removed is not None]
    idle = sum(r.removed is None and not r.fault for r in found)
    seen = Counter(part for r in found for part in r.parts)
    every = {*BLOCKS, *HEADS}
    mean = sum(shares) / len(shares) if shares else 0.0
    each = seconds / max(len(found), 1)
    least = min(seen.values(), default=0)
    lines = [
        f"{len(found)} networks in {seconds:.0f} s ({each:.2f} s each): {failed} failed",
        f"{len(every & set(seen))} of {len(every)} structures covered, each at least {least} times",
        f"{mean:.0%} of channels removed on average; in {idle} networks nothing could go",
    ]
    missing = sorted(every - set(seen))
    return "\n".join([*lines, *([f"not covered: {', '.join(missing)}"] if missing else [])])


def reproduce(seed: int) -> int:
    network, choice = draw_network(seed), draw_choice(seed)
    console.print(f"{network}\n{choice}", markup=False, soft_wrap=True)
    removed = laws(network, choice, rate_0=True)
    console.print(
        "all laws hold; "
        + ("nothing could go" if removed is None else f"{removed:.0%} of channels removed")
    )
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--count", type=int, default=500, help="how many networks")
    parser.add_argument("--seed", type=int, default=0, help="the first seed")
    parser.add_argument("--jobs", type=int, default=1, help="worker processes")
    parser.add_argument(
        "--seed-only", type=int, metavar="SEED", help="run one seed, with a traceback if it fails"
    )
    options = parser.parse_args()
    start()
    if options.seed_only is not None:
        return reproduce(options.seed_only)
    began = time.perf_counter()
    found = fuzz(range(options.seed, options.seed + options.count), options.jobs)
    console.print(summary(found, time.perf_counter() - began), markup=False)
    return int(any(r.fault for r in found))


if __name__ == "__main__":
    sys.exit(main())
