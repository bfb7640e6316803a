"""The command that trains: from folders of images to a model that timm loads, and what it refuses."""

import csv
import json

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import timm_tokens
from timm_tokens.cli import CommandError, call, main
from timm_tokens.cli.commands import COMMANDS
from timm_tokens.cli.common import checks
from timm_tokens.cli.train.token_label import _numbers as class_numbers
from timm_tokens.data import TokenLabelWriter, unpack_labels
from timm_tokens.data.label_format import LabelMap, write_label_file

# timm's ImageDataset leaves the closing of its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

COLOURS = ("blue", "green", "red")
QUICK = {"model": "test_vit", "img_size": 32, "epochs": 2, "batch_size": 4, "workers": 0, "aa": "", "device": "cpu"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Three classes of four images to train on and two to validate."""
    root = tmp_path_factory.mktemp("images")
    for split, count in (("train", 4), ("val", 2)):
        for k, colour in enumerate(COLOURS):
            (root / split / colour).mkdir(parents=True)
            for i in range(count):
                colours = tuple(60 * i + 10 if c == k else 30 for c in range(3))
                Image.new("RGB", (40, 40), colours).save(root / split / colour / f"{split}{i}.png")
    return root


def annotate(folder, classes=3, leave_out=()):
    """A map for every training image, whose class stands out."""
    with TokenLabelWriter(folder, classes) as writer:
        for k, colour in enumerate(COLOURS):
            for i in range(4):
                if (colour, i) not in leave_out:
                    indices = torch.tensor([k, (k + 1) % 3])[:, None, None].expand(2, 4, 4)
                    writer.add(f"{colour}/train{i}", torch.tensor([8.0, 1.0])[:, None, None].expand(2, 4, 4), indices)
    return folder


@pytest.fixture
def labels(tmp_path):
    return annotate(tmp_path / "labels")


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_with_token_labels(images, labels, tmp_path, capsys):
    out = tmp_path / "out"
    result = call("train token-label", data_dir=str(images), labels=str(labels), out=str(out), plot=True, **QUICK)
    assert [row["epoch"] for row in rows(out / "summary.csv")] == ["0", "1"]
    assert 0 <= float(rows(out / "summary.csv")[1]["eval_top1"]) <= 100
    assert len(rows(out / "steps.csv")) == 6
    with Image.open(out / "curves.png") as picture:
        assert picture.width > 400
    options = {"base": "test_vit", "num_classes": 3, "img_size": 32, "head": {}}
    loaded = timm.create_model("token_vit", **options, checkpoint_path=str(out / "model.safetensors"))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded.eval()(x), result.model(x))
    timm.models.save_for_hf(result.model, tmp_path / "hub", model_args=result.model.model_args)
    with torch.no_grad():
        hub = timm.create_model(f"local-dir:{tmp_path / 'hub'}", pretrained=True).eval()
        torch.testing.assert_close(hub(x), result.model(x))
    assert json.loads((out / "options.json").read_text())["command"] == "train token-label"
    assert f"The model is in {out / 'model.safetensors'}" in capsys.readouterr().out


def test_warns_of_published_labels_that_say_little(images, tmp_path, capsys):
    """Those of annotators trained by binary cross entropy: classes without a score, at 0, outweigh the others."""
    for colour in COLOURS:
        for i in range(4):
            label = LabelMap(torch.full((2, 4, 4), -7.0), torch.tensor([0, 1])[:, None, None].expand(2, 4, 4))
            write_label_file(tmp_path / "files" / colour / f"train{i}.pt", label)
    options = QUICK | {"steps": 1, "data_dir": str(images), "num_classes": 3, "labels": str(tmp_path / "files")}
    call("train token-label", out=str(tmp_path / "out"), **options)
    assert "warning: the labels leave 100% of a cell's probability to the classes" in capsys.readouterr().out


@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
def test_without_labels_it_is_an_ordinary_classifier(images, tmp_path, model):
    arguments = QUICK | {"model": model, "lr": 3e-3, "scale": (0.9, 1.0), "epochs": 8, "re_prob": 0.0}
    result = call("train token-label", data_dir=images, out=tmp_path, **arguments)
    assert not isinstance(result.model, timm_tokens.TokenViT)
    losses = [row["train_loss"] for row in result.epochs]
    assert losses[-1] < losses[0] - 0.1
    loaded = timm.create_model(model, num_classes=3, checkpoint_path=str(tmp_path / "model.safetensors"), **(
        {"img_size": 32} if model == "test_vit" else {}
    ))  # fmt: skip
    assert all(torch.equal(a, b) for a, b in zip(loaded.parameters(), result.model.parameters(), strict=True))


def test_command_line_and_resume(images, labels, tmp_path, capsys):
    line = f"train token-label --data-dir {images} --labels {labels} --model test_vit --img-size 32 --batch-size 4"
    line += f" --workers 0 --device cpu --steps 3 --ema 0.5 --clip-grad 1 --out {tmp_path / 'out'}"
    assert main(line.split()) == 0
    before = (tmp_path / "out" / "steps.csv").read_text()
    assert main(line.split()) == 2
    assert "there is a run in" in capsys.readouterr().err
    assert main([*line.split(), "--resume"]) == 0
    assert (tmp_path / "out" / "steps.csv").read_text() == before
    assert main([*line.split(), "--resume", "--lr", "0.5"]) == 2
    assert "started with other settings (lr 0.001 -> 0.5)" in capsys.readouterr().err
    assert main([*line.split(), "--resume", "--no-mix", "--log-every", "1"]) == 2
    assert "started with other settings (mix True -> False)" in capsys.readouterr().err


def test_starts_from_a_checkpoint(images, tmp_path):
    torch.manual_seed(7)
    other = timm.create_model("test_vit", num_classes=5)  # 160 pixels, so another position embedding, too
    save_file(other.state_dict(), tmp_path / "weights.safetensors")
    quick = QUICK | {"steps": 1, "lr": 1e-12}
    result = call(
        "train token-label",
        data_dir=images,
        out=tmp_path / "out",
        checkpoint=tmp_path / "weights.safetensors",
        **quick,
    )
    torch.testing.assert_close(result.model.blocks[0].attn.qkv.weight, other.blocks[0].attn.qkv.weight)
    assert result.model.num_classes == 3
    same = timm.create_model("test_vit", num_classes=3, img_size=32)
    save_file(same.state_dict(), tmp_path / "same.safetensors")
    result = call(
        "train token-label",
        data_dir=images,
        out=tmp_path / "same",
        checkpoint=tmp_path / "same.safetensors",
        **quick,
    )
    torch.testing.assert_close(result.model.head.weight, same.head.weight)


def test_classes_are_matched_to_the_labels():
    assert class_numbers(["b", "a"], 2) == {"b": 0, "a": 1}
    assert class_numbers(["n01440764", "n03888257"], 1000) == {"n01440764": 0, "n03888257": 701}
    assert class_numbers(None, 10) is None
    with pytest.raises(CommandError, match=r"have 1000 classes, but the images are in 2 folders"):
        class_numbers(["n01440764", "cat"], 1000)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"data_dir": None}, "--data-dir is missing"),
        ({"data_dir": "nowhere"}, "no folder nowhere/train: --data-dir must have train/<class>/"),
        ({"val_split": "other"}, "no folder .*/other"),
        ({"model": None}, "--model is missing"),
        ({"model": "no_such_vit"}, "timm has no model 'no_such_vit'"),
        ({"out": None}, "--out is missing"),
        ({"labels": "nowhere"}, "no label store in nowhere"),
        ({"checkpoint": "nowhere.pth"}, "no checkpoint file nowhere.pth"),
        ({"batch_size": 13}, "a batch takes 13 images"),
        ({"command": "train sleep"}, "there is no command 'train sleep': choose from"),
        ({"lr_rate": 1}, "there is no option 'lr_rate': there are .*lr"),
        ({"lr": 1e30, "epochs": 9, "re_prob": 0.0}, "Lower the learning rate"),
    ],
)
def test_refuses_in_words(images, tmp_path, monkeypatch, changes, message):
    arguments = {"command": "train token-label", "data_dir": images, "out": tmp_path / "out"} | QUICK | changes
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match=message):
        call(**arguments)


def test_refuses_labels_that_do_not_fit(images, tmp_path):
    arguments = {"command": "train token-label", "data_dir": images, "out": tmp_path / "out"} | QUICK
    many = annotate(tmp_path / "many", classes=50)
    with pytest.raises(CommandError, match=r"have 50 classes, but the images are in 3 folders, such as 'blue'"):
        call(**arguments, labels=many)
    three = annotate(tmp_path / "three")
    with pytest.raises(CommandError, match="three are over 3 classes, not 4"):
        call(**arguments, labels=three, num_classes=4)
    for name, label in unpack_labels(three, tmp_path / "files").items():  # of which class 3 is none of the folders
        write_label_file(tmp_path / "files" / f"{name}.pt", label._replace(indices=label.indices + 1))
    with pytest.raises(CommandError, match=r"/train\d': classes must be in \[0, 3\), got"):
        call(**arguments | {"out": tmp_path / "new"}, labels=tmp_path / "files")
    with pytest.raises(CommandError, match="ResNet can't be driven from outside"):
        call(**arguments | {"model": "test_resnet"}, labels=three)


def test_refuses_to_plot_without_matplotlib(monkeypatch, tmp_path):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"the plot takes matplotlib: pip install 'timm-tokens\[viz\]'"):
        call("train token-label", data_dir=tmp_path, model="test_vit", plot=True, out=tmp_path)


def test_help_names_the_objectives(capsys):
    with pytest.raises(SystemExit):
        main(["train", "--help"])
    printed = capsys.readouterr().out
    assert all(name in printed for name in COMMANDS if name.startswith("train "))
    with pytest.raises(SystemExit):
        main(["train", "token-label", "--help"])
    assert "--weight-decay-end" in capsys.readouterr().out
