"""`timm-tokens draw attention`: what it reads off a model, and what it refuses."""

import shutil
from pathlib import Path

import pytest
import timm
import torch
from families import DRIVABLE, create, images
from PIL import Image
from safetensors.torch import save_file

from timm_tokens import add_aux_tokens, apply_dtem_merging
from timm_tokens.cli import call, main
from timm_tokens.cli.draw import attention
from timm_tokens.cli.draw.attention import looks

# timm's data sets leave the closing of their files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")


def test_attention_is_the_models():
    """Values of a block whose attention is uniform over what a token sees: 1 / 37 for the class token."""
    model = add_aux_tokens(create("vit"), 2, 3, kernel_size=3)
    with torch.no_grad():
        model.base.blocks[1].attn.qkv.weight[:48] = 0
        model.base.blocks[1].attn.qkv.bias[:48] = 0
    seen = looks(model, images(), block=1)
    torch.testing.assert_close(seen.cls, torch.full((2, 6, 6), 1 / 37))
    torch.testing.assert_close(seen.aux_cls, torch.full((2, 2, 6, 6), 1 / 37))  # 36 patches and itself
    assert model.base.blocks[1].attn.fused_attn


@pytest.mark.parametrize("family", DRIVABLE)
def test_every_family_can_be_drawn(family):
    seen = looks(add_aux_tokens(create(family), 2, 3, kernel_size=3), images())
    assert seen.aux_cls.shape == (2, 2, 6, 6) and seen.pooled.shape == (2, 3, 6, 6)
    assert (seen.aux_cls >= 0).all() or "diff" in family
    torch.testing.assert_close(seen.pooled.sum((2, 3)), torch.ones(2, 3))
    assert seen.cosine.shape == (2, 6, 6)
    torch.testing.assert_close(seen.cosine.diagonal(dim1=1, dim2=2), torch.ones(2, 6))


def test_merging_is_left_out_and_stays():
    model = add_aux_tokens(apply_dtem_merging(create("vit"), r=9), 2, 1, kernel_size=3)
    assert looks(model, images()).cls.shape == (2, 6, 6) and model.merger.r == 9


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(torch.randint(0, 255, (60, 90, 3), dtype=torch.uint8).numpy()).save("photo.png")
    return tmp_path


def draw(*options):
    return main(["draw", "attention", "photo.png", "out.png", "--model", *options])


def test_the_picture(folder):
    model = timm.create_model("vit_tiny_mte", img_size=64)
    save_file(model.state_dict(), "model.safetensors")
    assert draw("vit_tiny_mte", "--checkpoint", "model.safetensors", "--image-size", "64") == 0
    with Image.open("out.png") as picture:
        width, height = picture.size
    assert width > 1.5 * height > 600  # three rows, of up to seven maps


def test_the_picture_of_a_run(folder):
    """The teacher of a run, from its last checkpoint, though the run's images are gone."""
    for name in "ab":
        (folder / "images" / "train" / name).mkdir(parents=True)
        Image.new("RGB", (32, 32)).save(folder / "images" / "train" / name / "1.png")
    line = "train mte --data-dir images --out run --model test_vit --img-size 64 --steps 1 --batch-size 2 --workers 0 "
    line += "--prototypes 16 --head-hidden 8 --num-cls 2 --num-pooled 1 --local-crops 0 --device cpu"
    assert main(line.split()) == 0
    shutil.rmtree("images")
    seen = call("draw attention", image="photo.png", out="out.png", run_dir="run")
    assert seen.aux_cls.shape == (1, 2, 4, 4) and seen.pooled.shape == (1, 1, 4, 4)
    state = torch.load("run/last.pth", weights_only=True)["task_state"]
    net = attention._of_run(Path("run"))
    torch.testing.assert_close(net.aux.tokens, state["teacher.encoder.backbone.aux.tokens"])


@pytest.mark.parametrize(
    "options, message",
    [
        (["vit_tiny_mte", "--run", "x"], "give either --run FOLDER, of timm-tokens train mte, or --model NAME"),
        (["vit_tiny_mte"], "give --checkpoint"),
        (["test_vit", "--checkpoint", "x"], "test_vit has no auxiliary tokens"),
        (["vit_tiny_mte", "--checkpoint", "x"], "no checkpoint file x"),
        (["vit_tiny_mte", "--checkpoint", "plain.safetensors"], "holds a plain model"),
        (["vit_tiny_mte", "--checkpoint", "whole.safetensors", "--block", "13"], "--block takes a number from 1 to 12"),
    ],
)
def test_refusals(folder, capsys, options, message):
    if options[-1] == "plain.safetensors":
        save_file(timm.create_model("vit_tiny_mte").base.state_dict(), "plain.safetensors")
    if "whole.safetensors" in options:
        save_file(timm.create_model("vit_tiny_mte").state_dict(), "whole.safetensors")
    assert draw(*options) == 2
    assert message in capsys.readouterr().err and not (folder / "out.png").exists()
