"""Saved networks on the Hugging Face Hub: the folder of `fxprune.save`, with a model card.

Needs the extra ``hub``.
"""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

from torch import nn

from . import saving
from .errors import OptionError, SaveError, first_line
from .files import write_text
from .saving import SOURCE, WEIGHTS, save

CARD = "README.md"
_FILES = ["*.safetensors", "*.json", "*.py", "*.md"]

_USE = """
## Use

```python
import fxprune

model = fxprune.hub.load("{repo_id}")
```
"""
_ALONE = """
Without fxprune: `model.py` is the network as source code, which needs torch and safetensors alone.

```python
import sys
from huggingface_hub import snapshot_download

sys.path.insert(0, snapshot_download("{repo_id}"))
from model import load

model = load()
```
"""


def push(
    network: nn.Module | str | os.PathLike[str],
    repo_id: str,
    *,
    private: bool | None = None,
    token: str | None = None,
    message: str = "Upload a network pruned with fxprune",
) -> str:
    """Upload a pruned network, or a folder of `fxprune.save`, and give the address of the commit.

    The repository ``user/name`` is made where it is missing. The folder's ``README.md``, the model
    card, is written from the report, unless there is one. Raises `OptionError` where
    huggingface_hub is missing or `repo_id` is no name, `SaveError` where the upload fails.
    """
    api = _hub().HfApi(token=token)
    with tempfile.TemporaryDirectory() as made:
        folder = save(network, made) if isinstance(network, nn.Module) else Path(network)
        if not (folder / WEIGHTS).is_file():
            raise SaveError(f"{folder} holds no {WEIGHTS}", hint="name a folder of fxprune.save")
        if not (folder / CARD).exists():
            write_text(folder / CARD, card(folder, repo_id))
        try:
            api.create_repo(repo_id, private=private, exist_ok=True)
            found = api.upload_folder(
                repo_id=repo_id, folder_path=folder, commit_message=message, allow_patterns=_FILES
            )
        except Exception as error:  # of the network, of the server, of names
            raise _failed("uploaded to", repo_id, error) from None
    return str(getattr(found, "commit_url", found))


def load(
    repo_id: str,
    model: nn.Module | None = None,
    *,
    revision: str | None = None,
    token: str | None = None,
) -> Any:
    """The network of a repository on the Hub, as `fxprune.load` gives it: no code of it is run.

    `revision` is a branch, a tag or a commit. Raises `SaveError` where it cannot be downloaded, and
    what `fxprune.load` raises.
    """
    hub = _hub()
    try:
        path = hub.hf_hub_download(repo_id, WEIGHTS, revision=revision, token=token)
    except Exception as error:
        raise _failed("downloaded from", repo_id, error) from None
    return saving.load(Path(path).parent, model)


def card(folder: str | os.PathLike[str], repo_id: str) -> str:
    """The model card of a saved network: what was pruned, what is left, how to use it."""
    report = saving.report_of(folder)
    head = "---\nlibrary_name: fxprune\ntags:\n- pruning\n- structured-pruning\n- pytorch\n---\n"
    said = report.to_markdown() if report else "A pruned network.\n"
    alone = _ALONE if (Path(folder) / SOURCE).exists() else ""
    return (
        f"{head}\n# {repo_id.rpartition('/')[2]}\n\n{said}{(_USE + alone).format(repo_id=repo_id)}"
    )


def _hub() -> Any:
    try:
        import huggingface_hub
    except ImportError:
        hint = "pip install 'fxprune[hub]'"
        raise OptionError("the Hub needs huggingface_hub, which is not there", hint=hint) from None
    return huggingface_hub


def _failed(what: str, repo_id: str, error: Exception) -> SaveError:
    return SaveError(
        f"{repo_id} cannot be {what} the Hub: {type(error).__name__}: {first_line(error)}",
        hint="`hf auth login` signs in; a repository is named user/name",
    )
