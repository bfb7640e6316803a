"""The examples that compare pre-training targets run on their embedded digits and on folders of images."""

import csv
import re
import sys
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest
import timm
from PIL import Image
from safetensors.torch import save_file

pytest.importorskip("sklearn")
EXAMPLES = Path(__file__).parents[2] / "examples"
QUICK = ["--seeds", "0", "1", "--steps", "1", "--batch-size", "16"]
OF = {
    "dtm": ["--dim", "24", "--depth", "1", "--patch-size", "8", "--finetune-images", "16", "--finetune-epochs", "1"],
    "mira": ["--prototypes", "8", "--hidden", "16", "--local-crops", "1"],
}
METHODS = {
    "dtm": {"no pre-training", "token by token", "morphed (DTM)", "image-level"},
    "mira": {"no training", "MIRA", "Sinkhorn (SwAV)", "softmax"},
}


@pytest.fixture
def example(monkeypatch):
    monkeypatch.syspath_prepend(EXAMPLES)
    yield import_module
    for name in ("dtm", "mira", "_data", "_compare", "_example"):
        sys.modules.pop(name, None)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root, pixels = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for split, count in (("train", 80), ("val", 11)):
        for name in ("coat", "hat"):
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                noise = pixels.integers(0, 255, (40, 50 + i, 3), np.uint8)
                Image.fromarray(noise).save(root / split / name / f"{i}.jpg")
    save_file(timm.create_model("test_vit").state_dict(), root / "vit.safetensors")
    return root


def check_results(out, name, seeds=2):
    with (out / "scores.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert {row["method"] for row in rows} == METHODS[name] and len(rows) == len(METHODS[name]) * seeds * 2
    assert all(0 <= float(row["value"]) <= 100 for row in rows)
    assert (out / "scores.png").is_file()


@pytest.mark.parametrize("name", OF)
def test_digits(example, name, tmp_path, capsys, monkeypatch):
    module, compare = example(name), example("_compare")
    digits = compare.digits

    def few(size):
        return compare.Images(*(compare.Part(images[:40], labels[:40]) for images, labels in digits(size)))

    monkeypatch.setattr(compare, "digits", few)
    assert module.main([*QUICK, *OF[name], "--out", str(tmp_path)]) == 0
    check_results(tmp_path, name)
    assert "±" in capsys.readouterr().out


@pytest.mark.parametrize("name", OF)
def test_folders(example, name, folder, tmp_path):
    teacher = ["--teacher", "test_vit", "--teacher-checkpoint", str(folder / "vit.safetensors")]
    # Maps of one pixel, as smaller crops have, torch 2.14 can't convolve backwards in bfloat16: NaN.
    own = [*(teacher if name == "dtm" else ["--img-size", "64"]), "--amp", "bfloat16", "--hold-out"]
    arguments = [*QUICK, *OF[name], *own, "--data-dir", str(folder), "--seeds", "3", "--out", str(tmp_path)]
    assert example(name).main(arguments) == 0
    check_results(tmp_path, name, seeds=1)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("dtm", ["--data-dir", "gone"], "dtm: .*gone/train"),
        ("mira", ["--data-dir", "gone"], "mira: .*gone/train"),
        ("dtm", ["--data-dir", "{folder}", "--teacher-checkpoint", "gone.pth"], "dtm: no checkpoint file gone.pth"),
        ("mira", ["--data-dir", "{folder}", "--model", "nothing"], "mira: timm has no model 'nothing'"),
    ],
)
def test_bad_options_are_one_line(example, folder, capsys, name, options, message):
    assert example(name).main([option.format(folder=folder) for option in options]) == 2
    assert re.search(message, capsys.readouterr().err.splitlines()[-1])


def test_one_group_leaves_one_token(example):
    from timm_tokens.ops import morph_groups

    dtm = example("dtm")
    import torch

    for tokens in (1, 2, 9, 64, 196):
        assert not morph_groups(torch.randn(1, tokens, 4), dtm.one_group(tokens)).any()
