"""The quickstart, run as a user runs it but for a few steps."""

import csv
import re
import sys
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from timm_tokens.cli import call

EXAMPLES = Path(__file__).parents[2] / "examples"
RESULTS = {"merger.safetensors", "table.csv", "accuracy.png", "groups.png"}


@pytest.fixture
def quickstart(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    import quickstart

    def small(command, **options):  # a tiny ViT in the place of the full-size one, whose speed takes seconds to measure
        assert (command, options.pop("model"), options.pop("batch_size")) == ("bench", "deit_small_patch16_224", (8,))
        return call(command, model="test_vit", batch_size=(1,), **options | {"rounds": 1})

    monkeypatch.setattr(quickstart, "call", small)
    yield quickstart.main
    for name in ("quickstart", "_data", "_measure", "_example"):
        sys.modules.pop(name)


@pytest.fixture
def folder(tmp_path):
    """A maker of a folder of images with these classes, and of the arguments that run a tiny ViT on it."""

    def make(*classes: str) -> list[str]:
        pixels = np.random.default_rng(0)
        for name in classes:
            for i, split in enumerate(("train", "train", "train", "val")):
                path = tmp_path / "images" / split / name / f"{i}.jpg"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(pixels.integers(0, 255, (170, 170, 3), np.uint8)).save(path)
        save_file(timm.create_model("test_vit").state_dict(), tmp_path / "vit.safetensors")
        weights = ["--model", "test_vit", "--checkpoint", str(tmp_path / "vit.safetensors")]
        run = ["--steps", "1", "--batch-size", "2", "--r", "9", "--out", str(tmp_path / "out")]
        return ["--data-dir", str(tmp_path / "images"), *weights, *run]

    return make


def table(out: Path) -> list[dict[str, float]]:
    with (out / "table.csv").open(newline="") as file:
        return [{name: float(value) for name, value in row.items()} for row in csv.DictReader(file)]


def test_digits(quickstart, tmp_path, capsys):
    assert quickstart(["--steps", "2", "--r", "5", "2", "--out", str(tmp_path / "a" / "b")]) == 0
    assert {path.name for path in (tmp_path / "a" / "b").iterdir()} == RESULTS
    rows = table(tmp_path / "a" / "b")
    assert [row["r"] for row in rows] == [0, 2, 5]
    assert rows[0]["tokens_left"] > rows[1]["tokens_left"] > rows[2]["tokens_left"]
    assert rows[0]["gflops"] > rows[1]["gflops"] > rows[2]["gflops"]
    assert rows[0]["speedup"] == rows[0]["share_of_ideal"] == 1
    assert rows[0]["learned"] == rows[0]["training_free"]  # nothing merged: both are the base
    printed = capsys.readouterr().out
    assert "| 5 | " in printed and "test_vit on " in printed  # the digits' table, and the speed of a larger model


def test_imagenet_classes_keep_the_head(quickstart, folder, tmp_path, capsys):
    arguments = folder("n01440764", "n02102040")
    assert quickstart(arguments) == 0
    assert "among all 1000" in capsys.readouterr().out
    first, merger = table(tmp_path / "out"), tmp_path / "out" / "merger.safetensors"
    assert quickstart([*arguments, "--merger", str(merger)]) == 0  # measured again, not trained
    assert [row["learned"] for row in table(tmp_path / "out")] == [row["learned"] for row in first]
    assert "training" not in capsys.readouterr().err


def test_other_classes_get_a_new_head(quickstart, folder, tmp_path, capsys):
    assert quickstart(folder("coat", "shoe", "hat")) == 0
    assert "a new linear head is trained first" in capsys.readouterr().out
    assert {path.name for path in (tmp_path / "out").iterdir()} == RESULTS


def break_checkpoint(root: Path) -> None:
    save_file({"head.weight": torch.zeros(1000, 3)}, root / "vit.safetensors")


SPOILT = {
    "no folder": (lambda root: (root / "images" / "val").rename(root / "gone"), "no folder .*images/val"),
    "classes differ": (lambda root: (root / "images/val/hat").rename(root / "images/val/cap"), "cap.*hat"),
    "no image": (lambda root: [cut(path, 9) for path in root.glob("images/val/*/*")], "no images; .*hat/3.jpg"),
    "checkpoint": (break_checkpoint, "vit.safetensors: it has no weights of the model; it has head.weight"),
    "out is a file": (lambda root: (root / "out").write_text(""), "out is a file: give a folder"),
}


def cut(path: Path, left: int) -> None:
    path.write_bytes(path.read_bytes()[:left])


def test_what_is_left_out_is_named(quickstart, folder, tmp_path, capsys):
    arguments = folder("coat", "hat")
    cut(tmp_path / "images/train/coat/0.jpg", -500)
    (tmp_path / "images/val/hat/notes.txt").write_text("words")
    (tmp_path / "images/train/shoe").mkdir()
    assert quickstart(arguments) == 0
    said = capsys.readouterr().err
    assert re.search(r"train: left out 1 \(can't be read\): coat/0.jpg \(image file is truncated", said)
    assert "train: left out 1 (empty folders): shoe" in said
    assert "val: left out 1 (no images by their suffix): hat/notes.txt" in said


@pytest.mark.parametrize("case", SPOILT)
def test_bad_input_is_one_line(quickstart, folder, tmp_path, capsys, case):
    spoil, message = SPOILT[case]
    arguments = folder("coat", "hat")
    spoil(tmp_path)
    assert_refused(quickstart(arguments), capsys, message)
    assert not (tmp_path / "out").is_dir()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--model", "vit_tinny_patch16_224"], "no model 'vit_tinny_patch16_224'; close are .*vit_tiny_patch16_224"),
        (["--model", "test_efficientnet"], "EfficientNet .*can't be driven"),
        (["--checkpoint", "gone.pth"], "no checkpoint file gone.pth"),
        (["--merger", "gone.safetensors"], "there is no file gone.safetensors"),
    ],
)
def test_bad_options_are_one_line(quickstart, folder, tmp_path, capsys, options, message):
    arguments = folder("coat", "hat")
    if options[1] == "test_efficientnet":
        save_file(timm.create_model("test_efficientnet").state_dict(), tmp_path / "vit.safetensors")
    assert_refused(quickstart([*arguments, *options]), capsys, message)


def assert_refused(code: int, capsys, message: str) -> None:
    assert code == 2
    last = capsys.readouterr().err.splitlines()[-1]
    assert last.startswith("quickstart: ")
    assert re.search(message, last), last


def test_digits_have_no_checkpoint(quickstart, capsys):
    assert_refused(quickstart(["--checkpoint", "x.pth"]), capsys, "need --data-dir")


@pytest.mark.parametrize("option", ["--r", "--steps", "--batch-size"])
def test_counts_start_at_one(quickstart, capsys, option):
    with pytest.raises(SystemExit, match="2"):
        quickstart([option, "0"])
    assert "must be a whole number from 1 on, got '0'" in capsys.readouterr().err
