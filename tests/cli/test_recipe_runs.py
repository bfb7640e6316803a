"""Every recipe runs with a tiny model, resumes as if nothing had happened, and is the same on two processes."""

import shutil

import pytest
import timm
import torch
from gloo import on_two
from PIL import Image
from safetensors.torch import load_file, save_file

from timm_tokens.cli import CommandError, call
from timm_tokens.data import TokenLabelWriter
from timm_tokens.recipes import load, names
from timm_tokens.tasks import TokenTask
from timm_tokens.training.history import read

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of timm's data sets

CLASSES, IMAGES = ("n01440764", "n02102040"), 16  # of ImageNet; two steps an epoch
VIT = {"patch_size": 8, "embed_dim": 24, "depth": 2, "num_heads": 2}
QUICK = {"img_size": 32, "batch_size": 8, "workers": 0, "device": "cpu", "warmup_epochs": 2, "log_every": 5}
SMALL = {
    "mte": {"model": "vit_small_patch16_224", "model_kwargs": VIT, "prototypes": 12, "head_hidden": 16,
            "local_size": 16, "queue_size": 64},
    "mira": {"model": "test_resnet", "prototypes": 12, "head_hidden": 16, "head_dim": 8, "local_size": 16},
    "dtm": {"model": "beit_base_patch16_224", "model_kwargs": VIT | {"use_shared_rel_pos_bias": True},
            "teacher": "test_vit", "teacher_head": False},
    "token-label": {"model": "lvvit_s", "model_kwargs": {"embed_dim": 24, "depth": 2, "num_heads": 2}},
    "dtem": {"model": "vit_small_patch16_224", "model_kwargs": VIT, "r": (3,), "table_r": (3,), "warmup_epochs": 0},
}  # fmt: skip
RECIPES = [(objective, name) for objective in SMALL for name in names(objective) if name != "short"]
# Plain SGD: Adam makes large steps of gradients that are zero but for rounding, and LARS makes all steps alike.
PLAIN = {
    "opt": "momentum",
    "lr": 0.01,
    "lr_base_size": None,
    "warmup_lr": 0.005,
    "min_lr": 0.001,
    "scale_schedule": False,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("data")
    generator = torch.Generator().manual_seed(0)
    with TokenLabelWriter(root / "labels", len(CLASSES)) as writer:
        for i in range(IMAGES + 4):
            kind, split = CLASSES[i % 2], "train" if i < IMAGES else "val"
            path = root / "images" / split / kind / f"{i}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (6, 6, 3), dtype=torch.uint8, generator=generator)
            Image.fromarray(pixels.numpy()).resize((48, 40)).save(path)
            scores = torch.rand(2, 4, 4, generator=generator) + torch.tensor([4.0, 0.0])[:, None, None]
            writer.add(f"{kind}/{i}", scores, torch.tensor([i % 2, 1 - i % 2])[:, None, None].expand(2, 4, 4))
    torch.manual_seed(0)
    save_file(timm.create_model("test_vit").state_dict(), root / "teacher.safetensors")
    save_file(timm.create_model("vit_small_patch16_224", img_size=32, **VIT).state_dict(), root / "vit.safetensors")
    return root


def run(objective, name, folder, out, **changes):
    own = {
        "dtm": {"teacher_checkpoint": folder / "teacher.safetensors"},
        "token-label": {"labels": folder / "labels"},
        "dtem": {"checkpoint": folder / "vit.safetensors"},
    }.get(objective, {})
    if load(objective, name).options.get("local_crops"):
        own = {"local_crops": 2}
    options = QUICK | SMALL[objective] | own | {"data_dir": folder / "images", "out": out / name} | changes
    return call(f"train {objective}", recipe=name, **options)


def outcome(path):
    """The losses, and the weights."""
    return (path / "steps.csv").read_text(), load_file(path / "model.safetensors")


@pytest.mark.parametrize(("objective", "name"), RECIPES)
def test_resumed_equals_uninterrupted(objective, name, folder, tmp_path, monkeypatch):
    start = TokenTask.start_step

    def copied(task, step, total, epoch):
        if step == 13:  # what a kill leaves
            shutil.copytree(tmp_path / "whole", tmp_path / "killed")
        start(task, step, total, epoch)

    with monkeypatch.context() as patch:
        patch.setattr(TokenTask, "start_step", copied)
        run(objective, name, folder, tmp_path / "whole", steps=20, save_every=5)
    run(objective, name, folder, tmp_path / "killed", steps=20, save_every=5, resume=True)
    (losses, weights), (again, resumed) = (outcome(tmp_path / kind / name) for kind in ("whole", "killed"))
    assert again == losses and len(losses.splitlines()) == 21
    assert all(torch.equal(resumed[key], value) for key, value in weights.items())


def test_batch_norm_of_one_row_is_refused(folder, tmp_path):
    with pytest.raises(CommandError, match="batch norm has to train on more than one value per channel"):
        run("mte", "moby", folder, tmp_path, steps=3, batch_size=1, warmup_epochs=0)


def work(rank, folder):
    for objective, name in RECIPES:
        run(objective, name, folder, folder / "two", steps=3, **PLAIN | {"batch_size": 4, "warmup_epochs": 0})


@pytest.fixture(scope="module")
def two(folder):
    on_two(work, folder)
    return folder / "two"


@pytest.mark.parametrize(("objective", "name"), RECIPES)
def test_two_processes_equal_one(objective, name, folder, two, tmp_path):
    run(objective, name, folder, tmp_path, steps=3, **PLAIN | {"warmup_epochs": 0})
    for found, expected in zip(read(two / name / "steps.csv"), read(tmp_path / name / "steps.csv"), strict=True):
        assert found == pytest.approx(expected, rel=5e-3, abs=1e-5)  # LARS scales up what rounding differs in
    weights = load_file(two / name / "model.safetensors")
    for key, value in load_file(tmp_path / name / "model.safetensors").items():
        torch.testing.assert_close(weights[key], value, atol=2e-5, rtol=1e-3, msg=f"{name}: {key}")
