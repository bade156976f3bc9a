"""Saved networks on the Hub: what goes up and comes down, without a network."""

from __future__ import annotations

import shutil
from pathlib import Path

import huggingface_hub
import pytest
import torch
from torch import nn

import fxprune
from fxprune.errors import SaveError

X = torch.rand(2, 3, 8, 8)


@pytest.fixture
def server(tmp_path, monkeypatch) -> Path:
    """Repositories as folders, behind the functions of the real client."""
    home = tmp_path / "server"

    def create_repo(self, repo_id, *, private=None, exist_ok=False):
        huggingface_hub.utils.validate_repo_id(repo_id)
        (home / repo_id).mkdir(parents=True, exist_ok=exist_ok)

    def upload_folder(self, *, repo_id, folder_path, commit_message, allow_patterns):
        for pattern in allow_patterns:
            for file in Path(folder_path).glob(pattern):
                shutil.copy(file, home / repo_id)
        return f"https://hub/{repo_id}/commit/1"

    def download(repo_id, filename, *, revision=None, token=None):
        path = home / repo_id / filename
        if not path.exists():
            raise huggingface_hub.errors.EntryNotFoundError(f"404: {repo_id}\nmore")
        return str(path)

    monkeypatch.setattr(huggingface_hub.HfApi, "create_repo", create_repo)
    monkeypatch.setattr(huggingface_hub.HfApi, "upload_folder", upload_folder)
    monkeypatch.setattr(huggingface_hub, "hf_hub_download", download)
    return home


def pruned() -> nn.Module:
    return fxprune.prune(nn.Sequential(nn.Conv2d(3, 8, 1), nn.Conv2d(8, 4, 1)), X, rate=0.5).eval()


def test_a_network_goes_up_and_comes_down(server):
    small = pruned()
    assert fxprune.hub.push(small, "me/small") == "https://hub/me/small/commit/1"
    names = {path.name for path in (server / "me" / "small").iterdir()}
    assert names == {"model.safetensors", "plan.json", "model.py", "README.md"}
    again = fxprune.hub.load("me/small")
    assert torch.equal(again(X), small(X)) and again.fxprune.plan == small.fxprune.plan


def test_the_card_is_valid_and_says_what_was_done(server):
    fxprune.hub.push(pruned(), "me/small")
    text = (server / "me" / "small" / "README.md").read_text()
    card = huggingface_hub.ModelCard(text)
    assert card.data.library_name == "fxprune" and "structured-pruning" in card.data.tags
    assert "Sequential pruned by l2 at 0.5" in text and "| parameters | 68 |" in text
    assert 'fxprune.hub.load("me/small")' in text and "from model import load" in text


def test_a_folder_with_a_card_of_its_own_goes_up_as_it_is(server, tmp_path):
    fxprune.save(pruned(), tmp_path / "small")
    (tmp_path / "small" / "README.md").write_text("# mine\n")
    (tmp_path / "small" / "secret.env").write_text("token")
    fxprune.hub.push(tmp_path / "small", "me/mine")
    assert (server / "me" / "mine" / "README.md").read_text() == "# mine\n"
    assert not (server / "me" / "mine" / "secret.env").exists()


def test_what_fails_is_a_clear_error(server, tmp_path):
    with pytest.raises(SaveError, match=r"holds no model\.safetensors"):
        fxprune.hub.push(tmp_path, "me/small")
    with pytest.raises(SaveError, match="cannot be uploaded to the Hub: HFValidationError"):
        fxprune.hub.push(pruned(), "not a name")
    with pytest.raises(SaveError, match="cannot be downloaded from the Hub: EntryNotFound") as told:
        fxprune.hub.load("me/nothing")
    assert "\n" not in told.value.fault and "user/name" in told.value.hint
