"""The repository's own files hold together: workflows, templates, version."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

import fxprune

ROOT = Path(__file__).resolve().parent.parent
YAML = [
    *sorted((ROOT / ".github").rglob("*.yml")),
    ROOT / ".pre-commit-config.yaml",
    ROOT / "mkdocs.yml",
    ROOT / "CITATION.cff",
]


@pytest.mark.parametrize("path", YAML, ids=lambda path: path.name)
def test_settings_are_sound_yaml(path):
    assert yaml.safe_load(path.read_text())


@pytest.mark.parametrize("path", sorted((ROOT / ".github/ISSUE_TEMPLATE").glob("[!c]*.yml")))
def test_forms_have_what_a_form_needs(path):
    form = yaml.safe_load(path.read_text())
    assert form["name"] and form["description"]
    assert all(each["attributes"]["label"] for each in form["body"] if each["type"] == "textarea")
    ids = [each["id"] for each in form["body"]]
    assert len(set(ids)) == len(ids)


def test_what_the_workflows_install_and_run_exists():
    pyproject = (ROOT / "pyproject.toml").read_text()
    for path in (ROOT / ".github/workflows").glob("*.yml"):
        for extra in re.findall(r'"?\.\[(\w+)\]', path.read_text()):
            assert re.search(rf"^{extra} = \[", pyproject, re.MULTILINE), extra


def test_the_version_stands_in_one_place():
    pyproject = (ROOT / "pyproject.toml").read_text()
    assert 'dynamic = ["version"]' in pyproject and not re.search(r"^version = ", pyproject, re.M)
    assert f"## {fxprune.__version__}" in (ROOT / "CHANGELOG.md").read_text()


def test_python_versions_agree():
    """Those that are promised are tested."""
    workflow = yaml.safe_load((ROOT / ".github/workflows/ci.yml").read_text())
    tested = {each["python"] for each in workflow["jobs"]["test"]["strategy"]["matrix"]["include"]}
    promised = re.findall(r"Python :: (3\.\d+)", (ROOT / "pyproject.toml").read_text())
    assert tested == set(promised)
