"""The example that compares objectives with and without auxiliary tokens runs, on digits and on a folder."""

import csv
import runpy
import sys
from pathlib import Path

import pytest
import torch
from PIL import Image

from timm_tokens.data import Crop

EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = "--steps 2 --batch-size 16 --prototypes 8 --num-cls 1 --num-pooled 1 --depth 1 --dim 24 --seeds 0"


@pytest.fixture
def example(monkeypatch):
    monkeypatch.setattr(sys, "path", [str(EXAMPLES), *sys.path])
    return runpy.run_path(str(EXAMPLES / "mte.py"))


def scores(out):
    with (out / "scores.csv").open() as file:
        return list(csv.DictReader(file))


def test_digits(example, tmp_path, capsys):
    pytest.importorskip("sklearn")
    assert example["main"]([*QUICK.split(), "--objectives", "dino", "moby", "--hold-out", "--out", str(tmp_path)]) == 0
    rows = scores(tmp_path)
    assert {row["method"] for row in rows} == {f"{o}{m}" for o in ("dino", "moby") for m in ("", " + MTE")}
    assert all(0 <= float(row["value"]) <= 100 for row in rows if "%" in row["measure"])
    assert (tmp_path / "scores.png").is_file() and "| dino + MTE |" in capsys.readouterr().out


def test_a_folder(example, tmp_path):
    for split in ("train", "val"):
        for i in range(40):
            folder = tmp_path / "images" / split / str(i % 2)
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (40, 30), (5 * i, 10, 100)).save(folder / f"{i}.png")
    command = f"{QUICK} --data-dir {tmp_path / 'images'} --objectives dino --only-mte --out {tmp_path / 'out'}"
    assert example["main"](command.split()) == 0
    assert {row["method"] for row in scores(tmp_path / "out")} == {"dino + MTE"}


def test_a_missing_folder_is_one_line(example, tmp_path, capsys):
    assert example["main"](["--data-dir", str(tmp_path / "nowhere")]) == 2
    assert capsys.readouterr().err.startswith("mte: no folder")


def test_crops_of_a_batch(example):
    """Whole images where nothing may change them; otherwise as each kind of crop says, from the generator alone."""
    batch_crops, images = sys.modules["_crops"].batch_crops, torch.randint(256, (6, 3, 16, 16)).byte()
    whole = Crop(16, scale=(1, 1), ratio=(1, 1), flip=0, jitter_prob=0, grayscale=0, blur=0)
    kinds = [whole, whole._replace(flip=1.0), whole._replace(grayscale=1.0), whole._replace(solarize=1.0)]
    same, flipped, grey, solarized = batch_crops(images, kinds, torch.Generator())
    expected = images / 127.5 - 1
    torch.testing.assert_close(same, expected, atol=1e-5, rtol=0)
    torch.testing.assert_close(flipped, expected.flip(3), atol=1e-5, rtol=0)
    torch.testing.assert_close(grey, expected.mean(1, keepdim=True).expand(-1, 3, -1, -1), atol=1e-5, rtol=0)
    torch.testing.assert_close(solarized, torch.where(expected >= 0, -expected, expected), atol=1e-5, rtol=0)
    (smooth,) = batch_crops(images, [whole._replace(blur=1.0, blur_sigma=(2, 2))], torch.Generator())
    assert smooth.var() < expected.var() / 4
    many = [Crop(8, 2, (0.2, 0.5)), Crop(4)]
    a, b = (batch_crops(images, many, torch.Generator().manual_seed(1)) for _ in range(2))
    assert [x.shape[2] for x in a] == [8, 8, 4] and all(torch.equal(x, y) for x, y in zip(a, b, strict=True))
    assert not torch.equal(a[0], a[1])
