"""`--push-to-hub` of the commands that train; the hub is a folder here."""

import json
import shutil
from types import SimpleNamespace

import pytest
import timm
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

import timm_tokens
from timm_tokens import hub
from timm_tokens.cli import CommandError, call

# timm's ImageDataset leaves the closing of its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

QUICK = {"model": "test_vit", "img_size": 32, "steps": 1, "batch_size": 2, "workers": 0, "device": "cpu"}


@pytest.fixture
def fake(tmp_path, monkeypatch):
    def upload(repo_id, folder_path, commit_message, **more):
        shutil.copytree(folder_path, tmp_path / repo_id)

    api = SimpleNamespace(
        whoami=lambda: {"name": "user"}, create_repo=lambda repo_id, **more: SimpleNamespace(repo_id=repo_id),
        file_exists=lambda *names, **more: False, upload_folder=upload,
    )  # fmt: skip
    monkeypatch.setattr(hub, "HfApi", lambda **options: api)
    for i in range(4):
        path = tmp_path / "images" / ("train", "val")[i // 2] / "ab"[i % 2] / f"{i}.png"
        path.parent.mkdir(parents=True)
        Image.new("RGB", (40, 40), (60 * i, 10, 200)).save(path)
    return api


def test_the_model_comes_back_from_the_hub(fake, tmp_path, capsys):
    options = QUICK | {"data_dir": tmp_path / "images", "out": tmp_path / "run", "aa": ""}
    result = call("train token-label", push_to_hub="user/mine", **options)
    assert "uploaded to https://huggingface.co/user/mine" in capsys.readouterr().out
    loaded = timm.create_model(f"local-dir:{tmp_path / 'user/mine'}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), result.model(x))
    card = ModelCard.load(tmp_path / "user/mine/README.md")
    assert card.data.pipeline_tag == "image-classification" and "timm-tokens train token-label" in card.text
    assert f"| {result.epochs[-1]['eval_top1']:.4g} |" in card.text
    assert str(tmp_path) not in card.text  # nobody's folders
    assert json.loads((tmp_path / "user/mine/config.json").read_text())["num_classes"] == 2


def test_of_dtem_the_merger_is_uploaded(fake, tmp_path):
    vit = timm.create_model("test_vit")
    save_file(vit.state_dict(), tmp_path / "w.safetensors")
    options = QUICK | {"data_dir": tmp_path / "images", "out": tmp_path / "run", "img_size": None}
    call(
        "train dtem", push_to_hub="user/merger", checkpoint=tmp_path / "w.safetensors", r=(2,), table_r=(2,), **options
    )
    assert timm_tokens.apply_dtem_merging(vit, weights=tmp_path / "user/merger").merger is not None
    card = (tmp_path / "user/merger/README.md").read_text()
    assert "Images of images." in card and "| learned | 2 |" in card


def test_what_can_not_be_uploaded_is_refused_before_training(fake, tmp_path):
    options = QUICK | {"data_dir": tmp_path / "images", "out": tmp_path / "run"}
    for name in ("mine", "a/b/c", "user/-", ""):
        with pytest.raises(CommandError, match="can't push to the hub: "):
            call("train token-label", push_to_hub=name, **options)

    def offline():
        raise OSError("no network")

    fake.whoami = offline
    with pytest.raises(CommandError, match="can't push to the hub: no network"):
        call("train token-label", push_to_hub="user/mine", **options)
    assert not (tmp_path / "run").exists()
