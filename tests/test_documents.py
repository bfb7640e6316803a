"""What README and docs show runs: their Python blocks one after the other, page by page, without downloads."""

import re
from functools import reduce
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image

import timm_tokens

ROOT = Path(timm_tokens.__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
ELSEWHERE = ("segmentation_models_pytorch", "onnx")  # these have tests of their own


def blocks(page, language):
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


@pytest.fixture
def offline(monkeypatch, tmp_path):
    """timm without weights from elsewhere, in a folder with one image."""
    create = timm.create_model

    def create_without_weights(name, pretrained=False, checkpoint_path="", **kwargs):
        narrow = {"embed_dim": 48, "num_heads": 3} if re.match(r"(vit|deit)_\w+_patch16_224$", name) else {}
        return create(name, **narrow | kwargs)

    monkeypatch.setattr(timm, "create_model", create_without_weights)
    (tmp_path / "images" / "train" / "tench").mkdir(parents=True)
    Image.new("RGB", (64, 48)).save(tmp_path / "images" / "train" / "tench" / "1.jpg")
    monkeypatch.chdir(tmp_path)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.stem)
def test_python_blocks_run(page, offline):
    names = {"timm": timm, "timm_tokens": timm_tokens, "torch": torch, "images": torch.randn(2, 3, 224, 224)}
    for block in blocks(page, "python"):
        if not any(name in block for name in ELSEWHERE):
            exec(compile(block, str(page), "exec"), names)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_names_are_there_after_the_import(page):
    for name in re.findall(r"\btimm_tokens((?:\.[A-Za-z_]\w*)+)", page.read_text()):
        name = name.replace(".schedule.schedule", ".schedule")  # the function, which hides its module
        assert reduce(getattr, name[1:].split("."), timm_tokens), name
