"""A merger on the hub: what is uploaded, and what its card says; the hub is a folder here."""

import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from tiny import base

import timm_tokens
from timm_tokens import hub, merger_file


class Folder:
    """What `push_merger_to_hub` calls of HfApi, on a folder."""

    def __init__(self, folder):
        self.folder, self.calls = folder, []

    def __call__(self, **kwargs):
        self.calls.append(kwargs)
        return self

    def create_repo(self, repo_id, **kwargs):
        (self.folder / repo_id).mkdir(parents=True, exist_ok=True)
        self.calls.append(kwargs)
        return SimpleNamespace(repo_id=repo_id)

    def file_exists(self, repo_id, name, revision=None):
        return (self.folder / repo_id / name).exists()

    def upload_folder(self, repo_id, folder_path, **kwargs):
        shutil.copytree(folder_path, self.folder / repo_id, dirs_exist_ok=True)
        self.calls.append(kwargs)
        return repo_id


@pytest.fixture
def fake(tmp_path, monkeypatch):
    api = Folder(tmp_path)
    monkeypatch.setattr(hub, "HfApi", api)
    monkeypatch.setattr(merger_file, "hf_hub_download", lambda repo, name, **kwargs: str(tmp_path / repo / name))
    return api


def test_a_merger_comes_back_from_the_hub(fake):
    vit = timm.create_model("test_vit")
    model = timm_tokens.apply_dtem_merging(vit, [4, 0, 6]).eval()
    table = [{"r": 0, "accuracy": 74.12345}, {"r": 12, "accuracy": 71.0, "more": 1}]
    options = dict(data="imagenet-1k", table=table, license="apache-2.0", token="secret")
    assert timm_tokens.push_merger_to_hub(model, "user/test-merger", private=True, **options) == "user/test-merger"
    assert [call.get("token") for call in fake.calls] == ["secret", None, None] and fake.calls[1]["private"]
    loaded = timm_tokens.apply_dtem_merging(vit, weights="hf-hub:user/test-merger").merger
    assert loaded.r == (4, 0, 6)
    assert torch.equal(loaded.embed[2].weight, model.merger.embed[2].weight.half().float())

    card = ModelCard.load(fake.folder / "user/test-merger/README.md")
    assert (card.data.base_model, card.data.license, card.data.datasets) == (
        "timm/test_vit.r160_in1k", "apache-2.0", ["imagenet-1k"],
    )  # fmt: skip
    assert "\n| r | accuracy |\n| --- | --- |\n| 0 | 74.12 |\n| 12 | 71 |\n" in card.text
    assert 'weights="hf-hub:user/test-merger"' in card.text and "`test_vit.r160_in1k`" in card.text
    assert "`r=[4, 0, 6]`, `embed_dim=32`, `metric='learned'`" in card.text


def test_a_card_that_is_there_stays(fake):
    model = timm_tokens.apply_dtem_merging(base(), 3)
    readme = fake.folder / "user/name/README.md"
    readme.parent.mkdir(parents=True)
    readme.write_text("mine")
    timm_tokens.push_merger_to_hub(model, "user/name")
    assert readme.read_text() == "mine" and (readme.parent / "merger.safetensors").exists()


def test_a_card_without_knowledge(fake):
    text = hub.merger_card(timm_tokens.apply_dtem_merging(base(), 3), "name", data="1000 photographs").content
    assert "a ViT with 2 blocks, 48 channels, 3 heads" in text and "1000 photographs" in text
    assert "datasets" not in text and "base_model" not in text
    model = timm_tokens.apply_dtem_merging(base(), 3)
    rows = [f"| {r} | {model.flops(count) / 1e9:.2f} |" for r, count in (("0", 0), ("as saved", 3))]
    assert "\n".join(["| r | GFLOPs |", "| --- | --- |", *rows]) in text


def test_without_a_merger_nothing_is_uploaded(fake):
    with pytest.raises(ValueError, match="merges no tokens"):
        timm_tokens.push_merger_to_hub(base(), "user/name")
    assert not (fake.folder / "user").exists()
