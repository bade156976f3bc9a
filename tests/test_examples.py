"""Every example runs, and prints what its docstring promises."""

from __future__ import annotations

import importlib.util
import io
import os
import re
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

import fxprune

ROOT = Path(__file__).resolve().parent.parent
EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


def _run(name: str, *arguments: object, cwd: Path) -> str:
    """An example's output, run as a user would, in a folder of its own."""
    path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / name), *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def _numbers(line: str) -> list[float]:
    return [float(n.replace(",", "")) for n in re.findall(r"\d[\d,]*(?:\.\d+)?", line)]


def _row(text: str, start: str) -> list[float]:
    line = next(line for line in text.splitlines() if line.strip(" │|").startswith(start))
    return _numbers(line.split(start, 1)[1])


def test_demo_trains_prunes_and_fine_tunes(tmp_path):
    """The network gets smaller, and after fine-tuning it still reads digits."""
    text = _run("demo.py", "--epochs", 2, "--output", "dumps", cwd=tmp_path)
    for row in ("parameters", "MACs"):
        before, pruned, tuned = _row(text, row)
        assert pruned == tuned < 0.5 * before
    dense, _, tuned = _row(text, "accuracy")
    assert min(dense, tuned) > 80
    assert "shapes proven" in text
    assert len(list((tmp_path / "dumps").glob("*.txt"))) >= 7


def test_quantize_example_makes_both_networks_smaller(tmp_path):
    """8 bits take about a quarter; the network that was pruned first stays the smallest."""
    pytest.importorskip("torchao")
    text = _run("quantize.py", "--epochs", 2, cwd=tmp_path)
    names = ("dense ", "pruned ", "dense, 8 bits", "pruned, 8 bits")
    accuracy, size = zip(*(_row(text, name)[:2] for name in names), strict=True)
    assert min(accuracy) > 80
    assert size[1] < 0.5 * size[0] and all(size[i + 2] < 0.3 * size[i] for i in (0, 1))
    for name in names[2:]:
        assert _row(text, name)[3] > 95  # of the images, both precisions read the same digit
    assert "batch norms left in the graph of 8 bits: 0" in text


def test_cifar_example_reads_weights_and_images(tmp_path):
    """On a data folder of the same layout, with noise for images and untrained weights."""
    _noise_data(tmp_path / "data")
    arguments = ["--networks", "resnet20", "--rates", 0.5, "--criteria", "l1", "--epochs", 1]
    cache = ["--cache", tmp_path / "cache", "--images", 20]
    text = _run("prune_resnet_cifar.py", tmp_path / "data", *arguments, *cache, cwd=tmp_path)
    dense, pruned = [line for line in text.splitlines() if "resnet20" in line and "│" in line]
    assert "20 test images" in text
    assert _numbers(dense)[1] == 269_722
    assert _numbers(pruned.split("l1")[1])[1] < 0.3 * 269_722
    assert sorted(f.name for f in (tmp_path / "cache").iterdir()) == [
        "cifar10_test.npz",
        "cifar10_train.npz",
    ]


def _noise_data(folder: Path) -> None:
    example = _module("prune_resnet_cifar")
    folder.mkdir()
    save_file(fxprune.models.resnet20().state_dict(), folder / "resnet20.safetensors")
    noise = np.random.default_rng(0)
    with tarfile.open(folder / "cifar10_jpg.tar.xz", "w:xz") as archive:
        for split, count in (("train", 13), ("test", 3)):
            for label in example.CLASSES:
                for i in range(count):
                    _add(archive, f"{split}/{label}/{i:04}.jpg", noise)


def _add(archive: tarfile.TarFile, name: str, noise: np.random.Generator) -> None:
    data = io.BytesIO()
    Image.fromarray(noise.integers(0, 256, (32, 32, 3), np.uint8)).save(data, "JPEG")
    info = tarfile.TarInfo(name)
    info.size = data.tell()
    data.seek(0)
    archive.addfile(info, data)


def _module(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "examples" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_random_crops_stay_inside_the_padded_image():
    """The example's augmentation keeps the shape, and with no shift to make, the pixels."""
    example = _module("prune_resnet_cifar")
    x = torch.rand(64, 3, 32, 32)
    moved = example.augmented(x, torch.Generator().manual_seed(0))
    assert moved.shape == x.shape
    padded = torch.nn.functional.pad(x, (4, 4, 4, 4))
    for before, after in zip(padded, moved, strict=True):
        windows = [before[:, i : i + 32, j : j + 32] for i in range(9) for j in range(9)]
        assert any(torch.equal(after, w) or torch.equal(after, w.flip(2)) for w in windows)


def test_custom_criterion_chooses_other_channels(tmp_path):
    l1, own = _run("custom_criterion.py", cwd=tmp_path).splitlines()
    kept = [line.split(":")[1] for line in (l1, own)]
    assert own.startswith("in_and_out") and kept[0] != kept[1]
    assert all(len(_numbers(k)) == 16 for k in kept)


def test_custom_rule_frees_channels_that_were_frozen(tmp_path):
    text = _run("custom_rule.py", cwd=tmp_path)
    without, with_rule = text.split("with the rule:")
    assert "16 channels are frozen" in without
    assert "the rule and the op agree" in without
    assert _row(with_rule, "channels")[:2] == [24, 16]


@pytest.mark.parametrize("file", EXAMPLES, ids=lambda f: f.name)
def test_every_example_has_a_test(file):
    tests = Path(__file__).parent.glob("test_*.py")
    assert any(f'"{file.name}"' in test.read_text() for test in tests)


def test_steps_beside_one_step(tmp_path):
    """The same sizes, whichever way, and a dense network with the same training beside them."""
    text = _run("iterative.py", "--steps", 2, "--epochs", 1, cwd=tmp_path)
    dense, once, several = (_row(text, name) for name in ("dense", "in one step", "in 2 steps"))
    assert once[1] == several[1] < 0.2 * dense[1]
    assert dense[0] > 90


def test_masks_example_gives_the_same_outputs(tmp_path):
    text = _run("masks.py", cwd=tmp_path)
    before, after = _numbers(text.splitlines()[0].split(";")[0])
    assert after < 0.6 * before and float(text.split("differ by ")[1].split()[0]) < 1e-5
    assert "sliced on cpu" in text


def test_lightning_example_prunes_twice(tmp_path):
    text = _run("lightning_callback.py", "--epochs", 5, cwd=tmp_path)
    counts = [_numbers(line)[-1] for line in text.splitlines() if line.startswith("epoch")]
    assert counts[1] > counts[2] == counts[3] > counts[4]


@pytest.mark.parametrize("name", ["accelerate_train.py", "timm_train.py"])
def test_examples_of_libraries_train_and_save(name, tmp_path):
    text = _run(name, "--epochs", 2, cwd=tmp_path)
    assert "saved in small" in text
    assert fxprune.load(tmp_path / "small").fxprune.plan.removed > 0


def test_ddp_ranks_choose_the_same_channels(tmp_path):
    path = os.pathsep.join([str(ROOT), os.environ.get("PYTHONPATH", "")])
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [sys.executable, *command, str(ROOT / "examples" / "ddp.py"), "--epochs", "1"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    for rank in range(2):
        assert f"rank {rank}: same plan everywhere: True" in done.stdout
    assert fxprune.load(tmp_path / "small").fxprune.plan.removed > 0
