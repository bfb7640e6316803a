"""`timm-tokens train mte`: from a folder of images to a plain timm model."""

import csv
import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from timm_tokens.cli import CommandError, call, main

# timm's ImageDataset leaves the closing of its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

QUICK = "--img-size 32 --local-size 16 --prototypes 16 --head-hidden 16 --batch-size 4 --steps 2 --workers 0"


@pytest.fixture
def images(tmp_path):
    for i in range(8):
        folder = tmp_path / "images" / "train" / str(i % 2)
        folder.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (40, 40), (30 * i, 10, 250 - 30 * i)).save(folder / f"{i}.png")
    return tmp_path / "images"


def run(images, options):
    out = images.parent / "run"
    code = main(f"train mte --data-dir {images} {QUICK} --device cpu --out {out} {options}".split())
    return code, out


@pytest.mark.parametrize(
    ("options", "columns"),
    [
        ("--model test_vit --objective dino --num-cls 6 --local-crops 2", ["loss/cls", "loss/aux5", "loss/pooled5"]),
        (
            "--model test_vit --objective ibot --batch-norm --num-cls 1 --aux-sees-cls --num-pooled 0",
            ["loss/patch", "agreement/aux0"],
        ),
        ("--model test_vit --objective moby --aux-target own", ["gradient/pooled5"]),
        (
            "--model test_efficientnet --num-cls 0 --num-pooled 2 --pool-weight spatial --local-crops 1",
            ["cosine/pooled1"],
        ),
    ],
)
def test_objectives(images, options, columns):
    code, out = run(images, options)
    assert code == 0
    with (out / "steps.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 and all(0 <= float(rows[-1][name]) < 100 for name in columns)
    assert json.loads((out / "options.json").read_text())["weight_decay_end"] == 0.4
    name = options.split()[1]
    kwargs = {"img_size": 32} if name == "test_vit" else {}
    model = timm.create_model(name, num_classes=0, checkpoint_path=out / "model.safetensors", **kwargs)
    assert model.eval()(torch.randn(1, 3, 32, 32)).isfinite().all()


def test_crops_on_the_device(images, capsys):
    code, out = run(images, "--model test_vit --local-crops 1 --augment-on-device --steps 4")
    assert code == 0 and "loader" in capsys.readouterr().out
    with (out / "steps.csv").open() as file:
        assert all(0 < float(row["loss"]) < 100 for row in csv.DictReader(file))


def test_a_registered_model_brings_its_tokens(images):
    code, out = run(images, "--model vit_tiny_mte --objective ibot --local-crops 1 --heads shared --global-weight 0.7")
    assert code == 0
    with (out / "steps.csv").open() as file:
        assert {"loss/aux5", "loss/pooled5", "loss/patch"} <= set(next(csv.DictReader(file)))
    base = timm.create_model("vit_tiny_patch16_224", num_classes=0, img_size=32)
    base.load_state_dict(load_file(out / "model.safetensors"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--model vit_tiny_mte --num-pooled 2", "vit_tiny_mte was made with num_pooled = 6, not 2: name its base"),
        ("--model vit_tiny_mte --aux-sees-cls", "vit_tiny_mte was made with aux_sees_cls = False, not True"),
        ("--model test_efficientnet --num-cls 2", "test_efficientnet can't have auxiliary class tokens, only pooled"),
        ("--model test_efficientnet --objective ibot", "iBOT masks patches, which takes a ViT"),
        ("--model test_vit --objective moby --local-crops 2", "takes two crops, both global, got 4 crops"),
        ("--model test_vit --prototypes 0", "--prototypes must be at least 1, got 0"),
    ],
)
def test_what_does_not_fit_is_refused(images, options, message, capsys):
    assert run(images, options)[0] == 2
    assert message in capsys.readouterr().err


def test_model_kwargs_win_over_what_the_objective_needs(images, tmp_path):
    given = dict(data_dir=images, out=tmp_path / "run", model="test_vit", img_size=32, local_crops=1, local_size=16)
    with pytest.raises(CommandError, match=r"Input height \(16\) doesn't match model \(32\)"):
        call("train mte", **given, model_kwargs={"dynamic_img_size": False}, steps=1, batch_size=4, workers=0)
