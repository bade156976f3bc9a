"""Prune whole zoos of networks by half, with fxprune and with Torch-Pruning beside it.

``python -m benchmarks.zoo --list torchvision --list timm-families --resume zoo.jsonl``
``python -m benchmarks.zoo --page --resume zoo.jsonl --out docs/zoo.md``

Every network runs in a process of its own, for each tool, with limits of time and memory. Results
are appended to the JSONL file as they come, so that a run can be stopped and goes on where it was;
``--page`` makes a page of such a file, and runs nothing. A list is a name below, or a file with a
name a line. Needs the extra ``bench``.
"""

from __future__ import annotations

import argparse
import copy
import json
import sys
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

from benchmarks import common, zoo_networks
from benchmarks.zoo_networks import Network
from benchmarks.zoo_ours import Record, first_line, pruned_by_fxprune, warm_fxprune
from benchmarks.zoo_peer import pruned_by_torch_pruning, warm_torch_pruning
from benchmarks.zoo_reference import compared

OPENING = 600.0  # seconds for building a network and running it, before a tool begins
LISTS: dict[str, Callable[[], list[str]]] = {
    "torchvision": zoo_networks.torchvision_names,
    "timm-families": zoo_networks.timm_family_names,
    "timm": zoo_networks.timm_names,
    "small": zoo_networks.small_names,
}
TOOLS = {
    "fxprune": (pruned_by_fxprune, warm_fxprune),
    "torch-pruning": (pruned_by_torch_pruning, warm_torch_pruning),
}


# -- one network -----------------------------------------------------------------------------------


def measure(
    name: str,
    tool: str,
    say: Callable[[Record], None],
    side: int = 0,
    shapes_above: float = float("inf"),
) -> Record:
    """What `tool` makes of the network of this name. `say` gets the record at every stage."""
    record: Record = {"name": name, "tool": tool, "verdict": "", "why": ""}

    def stage(which: str) -> None:
        record["stage"] = which
        say(record)

    record["stage"] = "build"
    prune, warm = TOOLS[tool]
    warm()
    try:
        network = zoo_networks.network(name, side, shapes_above)
        record |= described(network)
        shape = None if network.large else structure(network, network.model)
    except Exception as error:
        record["verdict"], record["why"] = (
            "not built",
            f"{type(error).__name__}: {first_line(error)}",
        )
        say(record)
        return record
    original = network.model if tool == "fxprune" else copy.deepcopy(network.model)
    result = prune(network, record, stage)
    if result is not None:
        pruned, kept = result
        stage("run")
        record["verdict"], record["why"] = judged(network, pruned, shape, record)
        stage("check")
        if record["verdict"] == "ok" and not network.large:
            record["check"] = compared(network, original, pruned, kept)
            if record["check"]["verdict"] == "differs":
                record["verdict"] = "silently wrong"
    stage("done")
    return record


def measured(name: str, tool: str, shapes_above: float) -> None:
    """Measure one network, and print the record at every stage."""
    torch.set_num_threads(1)
    say = lambda record: print(json.dumps(record), flush=True)  # noqa: E731
    measure(name, tool, say, shapes_above=shapes_above)


def described(network: Network) -> Record:
    return {
        "family": network.family,
        "kind": network.kind,
        "input": shape_of(network.args),
        "large": network.large,
        "params": [sum(p.numel() for p in network.model.parameters())] * 2,
        "attention": not network.large and zoo_networks.attends(network.model, network.args),
    }


def judged(network: Network, pruned: nn.Module, shape: Any, record: Record) -> tuple[str, str]:
    """The verdict on a pruned network, by runs of our own; a large one is not run."""
    try:
        found = shape if network.large else structure(network, pruned)
    except Exception as error:
        return "does not run", f"{type(error).__name__}: {first_line(error)}"
    if found != shape:
        return "shape changed", f"{found}, was {shape}"[:300]
    before, after = record["params"]
    if after >= before:
        return "nothing pruned", "no parameter went"
    return "ok", ""


def structure(network: Network, model: nn.Module) -> Any:
    """How the outputs are nested, and their shapes; the number of objects a detector finds is
    free."""
    with torch.no_grad():
        found = model(*zoo_networks.others(network.args, seed=1))
    return nested(found, free=network.kind == "detection")


def nested(value: Any, free: bool) -> Any:
    if isinstance(value, Tensor):
        shape = list(value.shape)
        return ["tensor", str(value.dtype), *(["any", *shape[1:]] if free else shape)]
    if isinstance(value, dict):
        return [type(value).__name__, *([key, nested(each, free)] for key, each in value.items())]
    if isinstance(value, (tuple, list)):
        return [type(value).__name__, *(nested(each, free) for each in value)]
    return repr(value) if isinstance(value, (int, str, bool, type(None))) else type(value).__name__


def shape_of(args: Any) -> str:
    return ", ".join("x".join(map(str, each.shape)) for each in zoo_networks.tensors(args))


# -- many ------------------------------------------------------------------------------------------


def apart(name: str, tool: str, options: argparse.Namespace) -> Record:
    """The record of one network, measured in a process of its own."""
    start = time.monotonic()
    limits = {"limit": options.limit, "memory": options.memory * 2**30}
    limits["opening"] = max(OPENING, options.limit)
    found = common.forked(measured, name, tool, options.shapes_above * 1e6, **limits)
    record = {"name": name, "tool": tool, "verdict": "", "stage": "build", **found}
    problem, ended = record.pop("problem", ""), record.pop("ended", "")
    if problem:
        record |= broken(record, problem, ended)
    return record | {"wall": time.monotonic() - start}


def broken(record: Record, problem: str, ended: str) -> Record:
    """What a process that was ended means: in our own check it is not the tool's failure."""
    if record["stage"] == "build":
        return {"verdict": "not built", "why": problem}
    if record["stage"] == "check":
        return {"check": {"verdict": "not compared", "note": problem}}
    verdict = {"time": "time", "memory": "memory"}.get(ended, "error: process ended")
    return {"verdict": verdict, "why": problem}


class Log:
    """JSONL files of records, the last of each network and tool counting, and of lists. All are
    read, the last is written to."""

    def __init__(self, *paths: str):
        self.path, self.lock = Path(paths[-1]) if paths else None, threading.Lock()
        self.records: dict[tuple[str, str], Record] = {}
        self.lists: dict[str, list[str]] = {}
        for path in map(Path, paths):
            for line in path.read_text().splitlines() if path.exists() else []:
                self._take(json.loads(line))

    def _take(self, entry: Record) -> None:
        if "list" in entry:
            self.lists[entry["list"]] = entry["names"]
        else:
            self.records[entry["name"], entry["tool"]] = entry

    def add(self, entry: Record) -> None:
        with self.lock:
            self._take(entry)
            if self.path:
                with self.path.open("a") as file:
                    file.write(json.dumps(entry) + "\n")

    def names(self, which: str) -> list[str]:
        """The names of a list, drawn up once; a file's list is called as the file is."""
        title = which if which in LISTS else Path(which).stem
        if title not in self.lists:
            names = LISTS[which]() if which in LISTS else zoo_networks.names_in(which)
            self.add({"list": title, "names": names})
        return self.lists[title]


def run(log: Log, options: argparse.Namespace) -> None:
    """Measure all that the log does not hold yet."""
    tools = tuple(TOOLS) if options.tool == "both" else (options.tool,)
    names = dict.fromkeys(name for which in options.list for name in log.names(which))
    names = zoo_networks.matching(names, options.only)
    todo = [(name, tool) for name in names for tool in tools if wanted(log, name, tool, options)]
    with Progress(console=common.console) as progress, ThreadPoolExecutor(options.jobs) as pool:
        task = progress.add_task("networks", total=len(todo))
        waiting = {pool.submit(apart, *each, options): each for each in todo}
        try:
            for done in as_completed(waiting):
                record = done.result()
                log.add(record)
                progress.console.print(line(record), highlight=False)
                progress.advance(task)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def wanted(log: Log, name: str, tool: str, options: argparse.Namespace) -> bool:
    known = log.records.get((name, tool))
    return known is None or any(common.matches(known["verdict"], v) for v in options.again)


def line(record: Record) -> str:
    before, after = record.get("params", (0, 0))
    left = f"{after / before:.0%} left" if before else ""
    seconds = f"{record['seconds']:.1f} s" if "seconds" in record else ""
    said = (record["name"], record["tool"], record["verdict"], record.get("why", ""), left, seconds)
    return "  ".join(each for each in said if each)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--list", action="append", default=[], help=f"{', '.join(LISTS)}, or a file"
    )
    parser.add_argument("--only", default="*", help="a shell-style pattern of names")
    parser.add_argument("--tool", choices=(*TOOLS, "both"), default="both")
    parser.add_argument("--jobs", type=int, default=1, help="processes at once")
    parser.add_argument("--limit", type=float, default=300, help="seconds to prune a network")
    parser.add_argument("--memory", type=float, default=8, help="GiB a process may hold")
    parser.add_argument("--shapes-above", type=float, default=float("inf"), metavar="MILLIONS",
                        help="larger networks are verified by shapes alone")  # fmt: skip
    parser.add_argument("--resume", action="append", default=[], metavar="FILE.jsonl",
                        help="results, old and new; of several the last is written to")  # fmt: skip
    parser.add_argument("--again", action="append", default=[], metavar="VERDICT",
                        help="measure those of this verdict again (a pattern)")  # fmt: skip
    parser.add_argument("--page", action="store_true", help="make the page and run nothing")
    parser.add_argument("--note", default="", help="a sentence on the page about this run")
    parser.add_argument("--out", help="a Markdown file to write")
    options = parser.parse_args()
    log = Log(*options.resume)
    if not options.page:
        options.list = options.list or ["torchvision"]
        run(log, options)
    if options.out:
        from benchmarks import zoo_page

        zoo_page.publish(log.lists, list(log.records.values()), options.out, options.note)
    return 0


if __name__ == "__main__":
    sys.exit(main())
