"""The wheel holds everything: it works in an environment that has never seen the checkout."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
import sysconfig
import textwrap
import zipfile
from collections.abc import Iterable, Iterator
from pathlib import Path

import pytest

import fxprune
from fxprune import recipes

ROOT = Path(__file__).resolve().parent.parent


def _run(*command: object, cwd: Path) -> str:
    done = subprocess.run(list(map(str, command)), cwd=cwd, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    _run(sys.executable, "-m", "hatchling", "build", "-t", "wheel", "-d", folder, cwd=ROOT)
    (built,) = folder.glob("*.whl")
    return built


@pytest.fixture(scope="module")
def clean_python(wheel, tmp_path_factory) -> Path:
    """A new environment with the wheel alone; torch and the rest are lent by a path file.

    Path files of the lending folder are not read, so an editable install there is not seen.
    """
    folder = tmp_path_factory.mktemp("venv")
    _run(sys.executable, "-m", "venv", "--without-pip", folder, cwd=folder)
    python = folder / "bin" / "python"
    site = sysconfig.get_path("purelib", vars={"base": str(folder), "platbase": str(folder)})
    (Path(site) / "lent.pth").write_text(sysconfig.get_path("purelib") + "\n")
    pip = [sys.executable, "-m", "pip", "--python", python, "--disable-pip-version-check"]
    _run(*pip, "install", "--quiet", "--no-index", "--no-deps", wheel, cwd=folder)
    return python


def test_wheel_holds_the_package_its_rules_and_nothing_else(wheel):
    assert wheel.name == f"fxprune-{fxprune.__version__}-py3-none-any.whl"
    names = zipfile.ZipFile(wheel).namelist()
    rules = {f.relative_to(ROOT / "rules").as_posix() for f in (ROOT / "rules").rglob("*.yaml")}
    assert rules
    assert {f"fxprune/_rules/{name}" for name in rules} <= set(names)
    assert "fxprune/py.typed" in names
    assert any(name.endswith("licenses/LICENSE") for name in names)
    assert {name.split("/")[0].split("-")[0] for name in names} == {"fxprune"}


def test_declared_dependencies_are_what_the_package_imports(wheel):
    with zipfile.ZipFile(wheel) as archive:
        (metadata,) = (n for n in archive.namelist() if n.endswith(".dist-info/METADATA"))
        lines = archive.read(metadata).decode().splitlines()
        sources = [archive.read(n) for n in archive.namelist() if n.endswith(".py")]
    needed = [x.split(": ")[1] for x in lines if x.startswith("Requires-Dist")]
    declared = _names(text for text in needed if "extra" not in text)
    optional = _names(text for text in needed if "extra" in text)
    imported = {name for source in sources for name in _imported(ast.parse(source))}
    imported -= {*sys.stdlib_module_names, "fxprune"}
    assert declared <= imported <= declared | optional


def _names(needed: Iterable[str]) -> set[str]:
    """What requirements are imported as."""
    found = {re.match(r"[\w-]+", text)[0].lower() for text in needed}
    own = {"pyyaml": "yaml", "huggingface-hub": "huggingface_hub"}
    return {own.get(name, name) for name in found}


def _imported(tree: ast.AST) -> Iterator[str]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name.split(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            yield node.module.split(".")[0]


def test_installed_wheel_prunes_with_its_own_rules(clean_python, tmp_path):
    script = """
        import pathlib, sys
        import torch
        from torch import nn
        import fxprune

        torch.set_num_threads(1)
        inside = pathlib.Path(sys.prefix).resolve()
        package = pathlib.Path(fxprune.__file__).resolve().parent
        assert inside in package.parents, package
        assert fxprune.rules.folder() == package / "_rules", fxprune.rules.folder()

        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3))
        pruned = fxprune.prune(model, torch.rand(1, 3, 8, 8), rate=0.5)
        print(pruned.get_submodule("0").out_channels, pruned(torch.rand(5, 3, 8, 8)).shape)
        x = torch.rand(1, 3, 32, 32)
        pruned = fxprune.prune(fxprune.models.resnet20(), x, recipe="distribution_fit_resnet:A")
        print(len(fxprune.recipes.names()), pruned.fxprune.plan.recipe)
    """
    # -I: neither this folder nor PYTHONPATH can lend the checkout's package
    found = _run(clean_python, "-I", "-c", textwrap.dedent(script), cwd=tmp_path)
    first, second = found.strip().splitlines()
    assert first == "4 torch.Size([5, 4, 4, 4])"
    assert second == f"{len(recipes.names())} distribution_fit_resnet:A"


def test_installed_wheel_has_the_command(clean_python, tmp_path):
    command = clean_python.parent / "fxprune"
    assert _run(command, "--version", cwd=tmp_path) == f"fxprune {fxprune.__version__}\n"
    shown = _run(command, "recipes", "show", "fpgm", "--json", cwd=tmp_path)
    assert '"criterion": "geometric_median"' in shown
