"""The examples that decode merged tokens: segmentation and captioning."""

import csv
import importlib
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from timm_tokens.cli import CommandError

EXAMPLES = Path(__file__).parents[2] / "examples"


@pytest.fixture
def example(monkeypatch):
    """A loader of examples by name, with their helpers beside them."""
    monkeypatch.syspath_prepend(str(EXAMPLES))
    names = ("segmentation", "captioning", "_segmenter", "_scenes", "_data", "_example")
    for name in names:
        sys.modules.pop(name, None)
    yield importlib.import_module
    for name in names:
        sys.modules.pop(name, None)


def test_mean_iou_by_hand(example):
    confusion = torch.tensor([[3, 1, 0], [2, 2, 0], [0, 0, 0]])  # the third class does not occur
    assert example("segmentation").mean_iou(confusion) == pytest.approx((3 / 6 + 2 / 5) / 2)


def test_a_token_of_size_two_decodes_as_the_same_token_twice(example):
    x = torch.randn(1, 5, 8)
    twice, size = torch.cat([x[:, :1], x], dim=1), torch.tensor([[2.0, 1, 1, 1, 1]])
    decoder = example("_segmenter").MaskDecoder(8, num_classes=3, dim=12).eval()
    torch.testing.assert_close(decoder(x, size), decoder(twice)[:, 1:])
    writer = example("captioning").Decoder(dim=12).eval()
    tokens, text = torch.randn(1, 5, 12), torch.tensor([[10, 3]])
    twice = torch.cat([tokens[:, :1], tokens], dim=1)
    torch.testing.assert_close(writer(text, tokens, size), writer(text, twice))


def test_scattered_digits_have_exact_masks(example):
    scenes = example("_scenes")
    digits, labels = torch.ones(2, 8, 8), torch.tensor([4, 7])
    images, masks = scenes.scatter_digits(digits, labels, 20, 40, torch.Generator().manual_seed(0))
    assert set(masks.unique().tolist()) == {0, 5, 8}
    assert images[:, 0][masks > 0].float().mean() > 230
    assert images[:, 0][masks == 0].float().mean() < 20


@pytest.mark.parametrize("layout", ["images/{}|masks/{}", "{}|{}_masks", "{}/images|{}/masks"])
def test_folders_of_masks(example, tmp_path, layout):
    scenes = example("_scenes")
    for split in ("train", "val"):
        images, masks = (tmp_path / part.format(split) for part in layout.split("|"))
        for folder in (images, masks):
            folder.mkdir(parents=True)
        for k in range(5):
            Image.new("RGB", (6, 4), (k, 0, 0)).save(images / f"{k}.png")
            Image.fromarray(np.full((4, 6), k, dtype=np.uint8)).save(masks / f"{k}.png")
    train, val = scenes.scene_folders(tmp_path, hold_out=False)
    assert [len(x) for x in (*train, *val)] == [5, 5, 5, 5]
    assert torch.equal(train.images[:, 0], train.masks)
    train, val = scenes.scene_folders(tmp_path, hold_out=True)
    assert train.masks[:, 0, 0].tolist() == [0, 1, 2, 3]
    assert val.masks[:, 0, 0].tolist() == [4]
    next(masks.glob("3.png")).unlink()
    with pytest.raises(CommandError, match=r"3.png has no mask 3.png in"):
        scenes.scene_folders(tmp_path, hold_out=False)


def test_segmentation_measures_every_r(example, tmp_path, monkeypatch):
    segmentation = example("segmentation")
    scatter = segmentation.scatter_digits
    monkeypatch.setattr(segmentation, "scatter_digits", lambda d, y, count, *rest: scatter(d, y, count // 100, *rest))
    options = ["--steps", "2", "--merge-steps", "1", "--batch-size", "2", "--r", "20", "--out", str(tmp_path)]
    options += ["--calibrate", "2"]
    assert segmentation.main(options) == 0
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    names = ["0", "20", "late, as 20", "every second, as 20", "calibrated, as 20"]
    assert [(row["r"], row["metric"]) for row in rows] == [(name, m) for m in ("keys", "learned") for name in names]
    assert [row["tokens"] for row in rows[:2]] == ["144", "64"]
    assert all(int(row["tokens"]) < 64 for row in rows[2:4])  # merging later, they merge more
    assert all(0.85 < float(row["gflops"]) / float(rows[1]["gflops"]) < 1.01 for row in rows[2:5])
    assert rows[0]["linear"] == rows[5]["linear"]  # r = 0 is the same model
    assert rows[0]["mask"] == rows[0]["mask_on_merged"]
    assert (tmp_path / "miou.png").stat().st_size > 1000


def test_a_schedule_that_cannot_save_as_much_is_left_out(example):
    vit = example("_example").averaging_vit(48, 4, in_chans=1, dim=48, depth=4, num_heads=3)
    net = example("segmentation").timm_tokens.apply_dtem_merging(vit, r=0, metric="keys").eval()
    assert set(example("segmentation").alternatives(net, 20, None)) == {"late, as 20", "every second, as 20"}
    assert "every second, as 34" not in example("segmentation").alternatives(net, 34, None)


def test_rows_of_digits(example):
    digits, labels = torch.stack([torch.ones(8, 8), torch.zeros(8, 8)]), torch.tensor([4, 7])
    images, text = example("_scenes").digit_rows(digits, labels, 20, 3, torch.Generator().manual_seed(0))
    bright = images[:, 0].unflatten(2, (3, 16)) > 127  # (20, 24, 3, 16)
    assert images.shape == (20, 1, 24, 48) and bright.sum((1, 3)).eq(torch.where(text == 4, 256, 0)).all()
    heights = bright[:, :, :, 0].int().argmax(1)[text == 4]
    assert heights.min() == 0 and heights.max() == 8


def test_captioning_measures_every_r(example, tmp_path, monkeypatch):
    captioning = example("captioning")
    rows_of = captioning.digit_rows
    monkeypatch.setattr(captioning, "digit_rows", lambda d, y, count, *rest: rows_of(d, y, min(count, 30), *rest))
    options = ["--steps", "2", "--merge-steps", "1", "--batch-size", "2", "--r", "16", "--out", str(tmp_path)]
    assert captioning.main(options) == 0
    with (tmp_path / "table.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [(row["r"], row["tokens"]) for row in rows] == [("0", "96"), ("0", "96"), ("16", "32"), ("16", "32")]


def test_a_missing_folder_is_named(example, tmp_path, capsys):
    assert example("segmentation").main(["--data-dir", str(tmp_path)]) == 2
    assert "needs images/train/ and masks/train/" in capsys.readouterr().err
