"""The notebooks run from their first cell to their last, and are committed as they ran."""

from __future__ import annotations

from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).resolve().parent.parent / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


def outputs(notebook: nbformat.NotebookNode) -> list[list[str]]:
    """What each cell of code gave, by kind."""
    return [
        sorted({kind for out in cell.outputs for kind in out.get("data", {"text": ""})})
        for cell in notebook.cells
        if cell.cell_type == "code"
    ]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_a_notebook_runs_and_gives_what_it_shows(path, tmp_path):
    shown = nbformat.read(path, as_version=4)
    ran = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(tmp_path)}}
    NotebookClient(ran, timeout=300, kernel_name="python3", resources=resources).execute()
    assert outputs(ran) == outputs(shown)
    text = path.read_text()
    assert "Traceback" not in text and "Warning" not in text and "/home/" not in text
    assert len(text) < 400_000 and any("image/png" in kinds for kinds in outputs(shown))
