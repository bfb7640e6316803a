"""Wrong command lines: each ends with exit code 2 and one line on stderr, never a traceback.

They are made of the commands' dataclasses, so that an option that is added is covered by itself: a line that works, and
one value that can't be meant.
"""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import get_type_hints

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from timm_tokens.cli import COMMANDS, main
from timm_tokens.cli.commands import module_of
from timm_tokens.cli.parser import flag
from timm_tokens.data import TokenLabelWriter
from timm_tokens.options import kind

# PIL and timm leave the closing of files to the garbage collector
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")

_TRAIN = "--data-dir images --model test_vit --img-size 32 --out run --steps 1 --batch-size 2 --workers 0 --device cpu"
_KNN = "--knn-every 1 --knn 2"
_VIT = "--model test_vit --checkpoint w.safetensors"
RIGHT = {
    "annotate": f"--dataset images/train --out maps {_VIT} --top-k 2 --workers 0 --device cpu",
    "bench": "--model test_vit --r 2 --batch-size 1 --rounds 1 --no-memory --device cpu --out bench",
    "calibrate": f"{_VIT} --data-dir images --images 2 --test-images 2 --flops-ratio 0.9 --out calibrated --workers 0 "
    "--device cpu",
    "draw": f"--image photo.png --out out.png {_VIT} --device cpu",
    "draw attention": "--image photo.png --out out.png --model vit_tiny_mte --checkpoint mte.safetensors --img-size 32",
    "draw labels": "--image images/train/a/0.png --out out.png --labels labels --num-classes 2 --crop 0 0 1 1",
    "fewshot": f"{_VIT} --data-dir images/train --ways 2 --shots 1 --queries 1 --episodes 2 --no-plot --out few "
    "--workers 0 --device cpu",
    "probe": f"{_VIT} --data-dir images --neighbours 1 --lrs 0.1 --epochs 1 --no-plot --out probe --workers 0 "
    "--device cpu",
    "run": "",  # all that follows a script is its own
    "train dtem": f"{_TRAIN} --checkpoint w.safetensors --r 1 2 --table-r 2",
    "train dtm": f"{_TRAIN} {_KNN} --teacher test_vit --teacher-checkpoint w.safetensors",
    "train mira": f"{_TRAIN} {_KNN} --prototypes 4 --head-hidden 4 --head-dim 4 --local-crops 1 --local-size 16",
    "train mte": f"{_TRAIN} {_KNN} --prototypes 4 --head-hidden 4 --local-crops 1 --local-size 16",
    "train token-label": f"{_TRAIN} --labels labels --aa= --val-split=",
}
_FILES = ("nowhere.pth", "images", "list.pth", "corrupt.safetensors", "empty.pth", "script.py", "other.pth", "\0")
_FOLDERS = ("nowhere", "script.py", "empty", "\0")
_OUT = ("script.py", "script.py/under", "/proc/nothing", "/dev/full", "/dev/full/under", "\0")
_PICTURES = ("out.docx", "out", "images", "script.py/out.png", "/proc/out.png", "folder.png", "\0.png")
WRONG = {  # by the option's name
    "aa": ("augmix-m5", "nothing", "rand-mx", "rand-m5-n0", "rand-m5-n99", "rand-q5", "rand-tno"),
    "checkpoint": _FILES, "features": _FILES, "image": (*_FILES, "corrupt.png"), "teacher_checkpoint": _FILES,
    "class_map": ("nowhere", "images", "list.pth"), "script": ("nowhere", "images", ""),
    "data_dir": _FOLDERS, "labels": _FOLDERS, "run_dir": (*_FOLDERS, "list_run", "named_run"), "out": _OUT,
    "dataset": ("torch/nothing", "nowhere", "hfds/", "wds/nothing", "\0"),
    "device": ("nowhere", "cuda:99", "cpu:-1", "", "meta", "cuda:x", "hpu"),
    "img_size": ("1", "7", "33", "1000001"), "local_size": ("1", "7", "1000001"),
    "merger": (*_FILES, "w.safetensors", "nowhere", "hf-hub:", "hf-hub:nobody/nothing"),
    "model": ("no_such_model", "", "test_resnett", "local-dir:nowhere", "local-dir:script.py", "hf-hub:", ":"),
    "model_kwargs": ("depth", "depth=x", "nothing=1", "=1", "depth=-1", "embed_dim=7", "img_size=0", "num_classes=0",
                     "features_only=True", "patch_size=0"),
    "push_to_hub": ("", "name", "a/b/c", "user/na me", "user/name"),  # the last: there is no access to the hub
    "name": ("nowhere", ""), "opt": ("nothing", ""), "teacher": ("no_such_model", "", "test_resnet"),
    "split_file": ("nowhere", "images", "script.py", "w.safetensors", "corrupt.png", "\0"),
    "split": ("nowhere", "\0"), "train_split": ("nowhere", "\0"), "val_split": ("nowhere", "\0"),
}  # fmt: skip


def out_of_range(limits, whole):
    step = 1 if whole else 1e-3
    for name, sign in (("at_least", -1), ("above", -1), ("at_most", 1), ("below", 1)):
        if limits.get(name) is not None:
            beyond = (limits[name],) if name in ("above", "below") else ()
            yield from (*beyond, limits[name] + sign * step, sign * 10**30)
    if whole and limits.get("below") is None:
        yield 2**31
    if not whole and not limits.get("infinite"):
        yield from ("inf", "-inf")


def wrong_values(command, each, holds):
    yield from _PICTURES if (command.startswith("draw") and each.name == "out") else WRONG.get(each.name, ())
    if holds.type in (int, float):
        yield from ("x", "", "nan", *out_of_range(each.metadata, holds.type is int))
    elif each.metadata.get("choices"):
        yield from ("nothing", "")


def wrong_lines(command, known=()):
    """What is added to a right line, and what the message must name.

    Args:
        known: Metadata of options that were tried with another command, whose values are checked alike.
    """
    options = module_of(command).Options
    hints = get_type_hints(options)
    for each in fields(options):
        holds = kind(hints[each.name])
        if each.metadata.get("rest") or (id(each.metadata) in known and each.name not in WRONG):
            continue
        if holds.type is bool:
            yield [f"{flag(each)}=maybe"], flag(each)
            continue
        for value in wrong_values(command, each, holds):
            named = flag(each) if each.name not in WRONG else ""
            yield [f"{flag(each)}={value}"] if not holds.count else [flag(each), *[str(value)] * holds.count], named
        if each.metadata.get("ascending"):
            yield [flag(each), "0.9", "0.8"], flag(each)
        if holds.type is not dict:
            yield [flag(each)], flag(each)  # without a value
    if command == "run":
        return
    yield from ((["--nothing"], "--nothing"), (["--nothing", "1"], "--nothing"), (["more", "and", "more"], "more"))
    yield from ((["--config", name], name) for name in ("nowhere", "script.py", "images", "other.json", "list.json"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wrong")
    for split in ("train", "val"):
        for k, name in enumerate("ab"):
            (folder / "images" / split / name).mkdir(parents=True)
            for i in range(4):
                pixels = torch.randint(255, (40, 40, 3), dtype=torch.uint8) // (k + 1)
                Image.fromarray(pixels.numpy()).save(folder / "images" / split / name / f"{i}.png")
    with TokenLabelWriter(folder / "labels", num_classes=2) as writer:
        for name in "ab":
            for i in range(4):
                writer.add(f"{name}/{i}", torch.randn(2, 2, 2), torch.arange(2)[:, None, None].expand(2, 2, 2))
    shutil.copy(folder / "images/train/a/0.png", folder / "photo.png")
    (folder / "corrupt.png").write_bytes((folder / "photo.png").read_bytes()[:60])
    save_file(timm.create_model("test_vit").state_dict(), folder / "w.safetensors")
    save_file(timm.create_model("vit_tiny_mte", img_size=32).state_dict(), folder / "mte.safetensors")
    (folder / "corrupt.safetensors").write_bytes((folder / "w.safetensors").read_bytes()[:1000])
    torch.save([1, 2], folder / "list.pth")
    torch.save({"other": torch.ones(1)}, folder / "other.pth")
    (folder / "empty.pth").touch()
    (folder / "script.py").write_text("print('ran')\n")
    (folder / "empty").mkdir()
    (folder / "folder.png").mkdir()
    (folder / "other.json").write_text('{"command": "sleep", "lr": 1}')
    (folder / "list.json").write_text("[1]")
    for name, text in {"list_run": "[1]", "named_run": '{"command": ["x"]}'}.items():
        (folder / name).mkdir()
        (folder / name / "options.json").write_text(text)
    for name, value in {"workers": "x", "model": 1, "lrs": 0.1, "nothing": 1}.items():
        (folder / f"{name}.json").write_text(json.dumps({"command": "probe", name: value}))
    for name, value in {"workers": "x", "device": 1, "nothing": 1}.items():
        lines = {"command": "probe", name: value}
        (folder / f"{name}.json").write_text(json.dumps(lines))
    return folder


@pytest.fixture
def inside(folder, monkeypatch):
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


@pytest.mark.parametrize("command", COMMANDS)
def test_each_is_one_line(command, inside, capsys):
    words, before = command.split(), list(COMMANDS)[: list(COMMANDS).index(command)]
    known = {id(each.metadata) for name in before for each in fields(module_of(name).Options)}
    count = 0
    for wrong, named in wrong_lines(command, known):
        line = [*words, *RIGHT[command].split(), *wrong]
        assert main(line) == 2, " ".join(line)
        said = [text for text in capsys.readouterr().err.splitlines() if text.strip() and "image/s]" not in text]
        assert len(said) == 1 and named in said[0], (line, said)
        count += 1
    assert count > 3


@pytest.mark.parametrize("command", [name for name in COMMANDS if name not in ("run", "bench")])
def test_the_right_lines_are_right(command, inside, capsys):
    """Else all lines made of them would be wrong for another reason."""
    assert main([*command.split(), *RIGHT[command].split()]) == 0, capsys.readouterr().err
    for made in ("run", "calibrated", "maps", "few", "probe"):
        shutil.rmtree(made, ignore_errors=True)


@pytest.mark.parametrize("name", ["workers", "model", "lrs", "nothing"])
def test_wrong_values_in_a_config(name, inside, capsys):
    assert main(["probe", "--config", f"{name}.json"]) == 2
    said = capsys.readouterr().err
    assert name in said and len(said.splitlines()) == 1


@pytest.mark.parametrize("words", [["--version"], ["train", "--help"]])
def test_a_full_disk_under_stdout(words, monkeypatch):
    monkeypatch.delenv("PYTHONUNBUFFERED", raising=False)
    with Path("/dev/full").open("w") as full:
        done = subprocess.run([sys.executable, "-m", "timm_tokens", *words], stdout=full, stderr=-1, text=True)
    assert done.returncode == 2 and done.stderr.endswith("error: can't print: No space left on device\n")


def test_a_reader_that_has_enough(monkeypatch, capsys):
    reads, writes = os.pipe()
    os.close(reads)
    with os.fdopen(writes, "w") as out:
        monkeypatch.setattr(sys, "stdout", out)
        assert main(["train", "dtem", "--list-recipes"]) == 141  # as a shell sees it of `yes | head`
    assert not capsys.readouterr().err
