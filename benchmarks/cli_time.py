"""How long each command of ``fxprune`` takes on a network, from its start to its end.

Every command runs in a process of its own, several times; the table shows the median and the range.
Importing PyTorch is a part of most times: it stands in a row of its own.

    python -m benchmarks.cli_time                    # torchvision:resnet50
    python -m benchmarks.cli_time --model torchvision:resnet18 --repeat 5 --json times.json
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from benchmarks import common

ROOT = Path(__file__).resolve().parents[1]
COMMANDS = (
    "--version",
    "--help",
    "prune --help",
    "criteria",
    "recipes",
    "rules list",
    "rules check my_rules.yaml",
    "rules probe conv",
    "count MODEL",
    "groups MODEL",
    "explain MODEL conv1 layer1.0.conv3",
    "dump MODEL steps",
    "prune MODEL",
    "prune MODEL --verify shapes",
    "prune MODEL --plan plan.json",
    "prune MODEL --scope global -c lamp",
    "verify MODEL --plan plan.json",
    "prune MODEL -o small",
    "verify MODEL small",
    "view steps --no-open",
    "count small",
    "bench MODEL --batch 1 --seconds 2",
)
RULES = """\
my_relu:
  words: relu
  kind: pointwise
  samples:
    - {call: torch.relu, inputs: [[2, 3]]}
"""


def seconds(words: list[str], folder: Path, **more: str) -> tuple[float, int]:
    """The time of a process, and its exit code."""
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "PYTHONPATH": path, **more}
    start = time.perf_counter()
    done = subprocess.run([sys.executable, *words], cwd=folder, env=env, capture_output=True)
    return time.perf_counter() - start, done.returncode


def measured(model: str, repeat: int, folder: Path) -> Iterator[dict]:
    """One row a command, in an order in which later ones find what earlier ones wrote."""
    yield row("python -c 'import torch'", ["-c", "import torch"], repeat, folder)
    yield row("python -c 'import torchvision'", ["-c", "import torchvision"], repeat, folder)
    asked = {"_FXPRUNE_COMPLETE": "complete_bash", "COMP_WORDS": f"fxprune\nprune\n{model[:-1]}"}
    words = ["-m", "fxprune"]
    yield row("completion of MODEL", words, repeat, folder, **asked, COMP_CWORD="2")
    for command in COMMANDS:
        given = [model if word == "MODEL" else word for word in shlex.split(command)]
        yield row(f"fxprune {command}", [*words, *given], repeat, folder)


def row(name: str, words: list[str], repeat: int, folder: Path, **more: str) -> dict:
    times, codes = zip(*(seconds(words, folder, **more) for _ in range(repeat)), strict=True)
    print(f"{statistics.median(times):6.2f} s  {name}", file=sys.stderr)
    return {"command": name, "seconds": [round(t, 3) for t in times], "exit_code": max(codes)}


COLUMNS = ("command", "median", "least", "most", "exit code")


def cells(each: dict) -> list[str]:
    times = each["seconds"]
    shown = (statistics.median(times), min(times), max(times))
    return [each["command"], *(f"{x:.2f}" for x in shown), str(each["exit_code"])]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="torchvision:resnet50")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write the rows to a file")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "my_rules.yaml").write_text(RULES)
        rows = list(measured(options.model, options.repeat, folder))
    common.show(f"seconds of each command on {options.model}", COLUMNS, list(map(cells, rows)))
    if options.json:
        options.json.write_text(json.dumps({"model": options.model, "rows": rows}, indent=2))


if __name__ == "__main__":
    main()
