"""Damaged and forged files are a clear error or a right result; `make fuzz-files` tries more."""

from __future__ import annotations

import random
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks import fuzz_files

ROOT = Path(__file__).resolve().parent.parent


def test_no_file_of_many_runs_code_or_ends_in_a_traceback():
    """In processes of their own, as the hook that watches cannot be taken off again."""
    command = [sys.executable, "-m", "benchmarks.fuzz_files", "--count", "120", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for kind in fuzz_files.KINDS:
        line = next(line for line in done.stdout.splitlines() if line.startswith(f"{kind}: "))
        assert (
            "'refused'" in line and "'right'" in line
        )  # mutations are neither all nor never fatal


def test_mutations_are_those_of_their_seed_and_change_something():
    good = {"a": [1, 2, {"b": "c"}], "d": None}
    found = [fuzz_files.of_values(good, random.Random(seed)) for seed in range(40)]
    again = [fuzz_files.of_values(good, random.Random(seed)) for seed in range(40)]
    assert list(map(repr, found)) == list(map(repr, again))
    assert sum(each != good for each in found) > 30
    assert good == {"a": [1, 2, {"b": "c"}], "d": None}


@pytest.mark.parametrize(
    ("code", "what"),
    [
        ("import os; os.system('true')", "os.system"),
        ("open('/tmp/x', 'w')", "open"),
        ("eval('1 + 1')", "exec"),
    ],
)
def test_the_hook_sees_code_that_runs(code, what):
    script = f"""
from pathlib import Path
from benchmarks.fuzz_files import Watched
watched = Watched(Path("/nowhere"))
watched.on = True
try:
    {code}
finally:
    watched.on = False
    print(watched.seen)
"""
    done = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True)
    assert what in done.stdout, done.stderr
