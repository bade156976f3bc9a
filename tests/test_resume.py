"""A loop of pruning and training that was killed goes on to the same end."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import torch
from test_iterating import Net

import fxprune

STEPS, KILL_AFTER = 4, 2


def model() -> Net:
    torch.manual_seed(0)
    return Net()


def images() -> torch.Tensor:
    return torch.rand(8, 3, 8, 8, generator=torch.Generator().manual_seed(2))


def train(pruned: torch.nn.Module, k: int) -> None:
    """The k-th training; the same wherever the loop began."""
    x = images()
    y = torch.arange(8) % 4
    fxprune.finetune(pruned, [(x, y)], steps=5, lr=0.05, seed=k)


def loop(folder: Path, start: int = 0, killed: bool = False) -> None:
    """Prune, train, and save every step as `step1`, `step2`, ..."""
    before = fxprune.load(folder / f"step{start}", model()) if start else None
    found = fxprune.iterate(model(), images(), steps=STEPS, rate=0.5, start=before)
    for k, pruned in enumerate(found, start + 1):
        train(pruned, k)
        fxprune.save(pruned, folder / f"step{k}")
        if killed and k == KILL_AFTER:
            os.kill(os.getpid(), signal.SIGKILL)


def run(call: str) -> int:
    tests = Path(__file__).parent
    paths = os.pathsep.join([str(tests.parent), str(tests), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": paths}
    code = f"from pathlib import Path\nfrom test_resume import loop\n{call}"
    return subprocess.run([sys.executable, "-c", code], env=env).returncode


def test_a_killed_loop_ends_at_the_same_network(tmp_path):
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    whole.mkdir(), broken.mkdir()
    assert run(f"loop(Path({str(broken)!r}), killed=True)") == -signal.SIGKILL
    assert not (broken / "step3").exists()
    assert run(f"loop(Path({str(broken)!r}), start={KILL_AFTER})") == 0
    loop(whole)
    for k in range(1, STEPS + 1):
        a, b = (fxprune.load(each / f"step{k}", model()) for each in (whole, broken))
        assert a.fxprune.plan.kept == b.fxprune.plan.kept
        one, other = a.state_dict(), b.state_dict()
        assert one.keys() == other.keys()
        assert all(torch.equal(one[name], other[name]) for name in one)
