"""``import fxprune`` costs next to nothing beside ``import torch``."""

from __future__ import annotations

import statistics
import subprocess
import sys

CODE = """
import time
start = time.perf_counter()
import torch
middle = time.perf_counter()
import fxprune
print(middle - start, time.perf_counter() - middle)
"""


def _times() -> tuple[float, float]:
    done = subprocess.run([sys.executable, "-c", CODE], capture_output=True, text=True, check=True)
    torch_time, own_time = done.stdout.split()
    return float(torch_time), float(own_time)


def test_import_adds_less_than_a_third_of_a_second_to_torch():
    """The median of several processes, as the first one reads the files from disk."""
    times = [_times() for _ in range(3)]
    torch_time, own_time = (statistics.median(column) for column in zip(*times, strict=True))
    share = own_time / torch_time
    print(f"torch {torch_time:.2f} s, fxprune {own_time:.4f} s more ({share:.2%} of torch)")
    assert own_time < 0.3


def test_public_names_are_there_without_being_imported_first():
    """`import fxprune` loads no step, and every name in ``__all__`` still resolves."""
    code = (
        "import sys, fxprune\n"
        "assert not [m for m in sys.modules if m.startswith('fxprune.')], sys.modules\n"
        "assert all(getattr(fxprune, name) is not None for name in fxprune.__all__)\n"
        "try: fxprune.no_such_name\n"
        "except AttributeError as error: print(error)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert "no_such_name" in done.stdout
