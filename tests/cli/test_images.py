"""Images as users have them, in every command: odd formats, files that are no images, grey models, sizes."""

import json
import re

import pytest
import timm
import torch
from gloo import on_two
from PIL import Image
from safetensors.torch import load_file, save_file

from timm_tokens.cli import CommandError, call, main
from timm_tokens.cli.commands import module_of
from timm_tokens.cli.common.datasets import open_split
from timm_tokens.cli.parser import build
from timm_tokens.cli.train import images as run_images
from timm_tokens.data import TokenLabelStore, TokenLabelWriter
from timm_tokens.tasks import TokenLabelTask

# timm's data sets leave the closing of their files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]

QUICK = {"model": "test_vit", "img_size": 32, "workers": 0, "device": "cpu"}
TRAIN = QUICK | {"steps": 2, "batch_size": 4, "warmup_epochs": 0}
OBJECTIVES = {
    "token-label": {"aa": "rand-m9-mstd0.5-inc1"},
    "dtm": {"teacher": "test_vit", "max_rounds": 1, "drop_path": 0.0},
    "mira": {"prototypes": 8, "head_hidden": 16, "head_dim": 8, "local_crops": 1},
    "mte": {"prototypes": 16, "head_hidden": 16, "local_crops": 1},
}


@pytest.fixture
def images(tmp_path):
    """Three classes in three formats, of five images to train on and two to validate."""
    for split, count in (("train", 5), ("val", 2)):
        for k, (name, suffix) in enumerate((("a", "png"), ("b", "webp"), ("c", "JPG"))):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(200, (40, 56, 3), dtype=torch.uint8)
                pixels[..., k] += 50
                Image.fromarray(pixels.numpy()).save(tmp_path / "images" / split / name / f"{i}.{suffix}")
    return tmp_path / "images"


@pytest.fixture
def weights(tmp_path):
    def make(**options):
        torch.manual_seed(0)
        save_file(timm.create_model("test_vit", **options).state_dict(), tmp_path / "weights.safetensors")
        return tmp_path / "weights.safetensors"

    return make


def spoil(images):
    (images / "train" / "a" / "1.png").write_bytes(b"")
    (images / "train" / "c" / "2.JPG").write_bytes((images / "train" / "c" / "2.JPG").read_bytes()[:-300])
    (images / "train" / "b" / "notes.txt").write_text("no image")
    (images / "val" / "a" / "0.png").write_text("no image")


def train(objective, images, out, **options):
    if objective == "dtm":
        options["teacher_checkpoint"] = out.parent / "weights.safetensors"
    return call(f"train {objective}", data_dir=images, out=out, **TRAIN | OBJECTIVES[objective] | options)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_training_leaves_out_what_it_names(images, weights, tmp_path, capsys, objective):
    weights(img_size=32)
    spoil(images)
    result = train(objective, images, tmp_path / "run", workers=1)
    said = capsys.readouterr()
    empty = "it is empty, or of no format that Pillow knows"
    truncated = r"image file is truncated \(\d+ bytes not processed\)"
    assert re.search(rf"train: left out 2 \(can't be read\): a/1\.png \({empty}\), c/2\.JPG \({truncated}\)", said.err)
    assert "train: left out 1 (no images by their suffix): b/notes.txt" in said.err
    validated = objective == "token-label"
    assert (f"val: left out 1 (can't be read): a/0.png ({empty})" in said.err) == validated
    assert f"{2 + validated} images could not be read and were left out: " in said.out
    noted = json.loads((tmp_path / "run" / "images.json").read_text())["train"]
    assert noted["unreadable"].keys() == {"1", "12"}
    assert noted["left out"]["can't be read"][0] == f"a/1.png ({empty})" and len(noted["left out"]) == 2
    if validated:
        assert result.model.num_classes == 3  # that of webp files among them


def test_a_resumed_run_has_the_images_of_one_that_was_not(images, tmp_path, monkeypatch):
    spoil(images)
    train("token-label", images, tmp_path / "whole", steps=6, val_split="")

    def die(task):
        if task.step == 4:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(TokenLabelTask, "before_optimizer", die)
        train("token-label", images, tmp_path / "half", steps=6, val_split="", save_every=2)
    resume = {"steps": 6, "val_split": "", "save_every": 2, "resume": True}
    with monkeypatch.context() as patch:
        patch.setattr(run_images, "unreadable", None)  # not called: what the run noted is taken
        train("token-label", images, tmp_path / "half", **resume)
    whole, half = (load_file(tmp_path / name / "model.safetensors") for name in ("whole", "half"))
    assert all(torch.equal(whole[name], half[name]) for name in whole)
    Image.new("RGB", (40, 40)).save(images / "train" / "a" / "1.png")  # repaired: another set of images
    with pytest.raises(CommandError, match=r"images 13 -> 14"):
        train("token-label", images, tmp_path / "half", **resume)


@pytest.mark.parametrize("content", ["{", "[1]", '{"train": 3}', '{"train": {"unreadable": {"x": "why"}}}'])
def test_a_corrupt_record_of_images_is_named(images, tmp_path, content):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "images.json").write_text(content)
    with pytest.raises(CommandError, match=r"images\.json is .*: delete it"):
        train("token-label", images, tmp_path / "run", steps=1, val_split="", resume=True)


def test_labels_of_what_annotate_could_read(images, weights, tmp_path, capsys):
    spoil(images)
    given = QUICK | {"checkpoint": weights(num_classes=3), "num_classes": 3, "top_k": 2}
    summary = call("annotate", dataset=images / "train", out=tmp_path / "labels", **given | {"img_size": [32]})
    assert summary[:3] == (15, 13, 13)
    assert set(TokenLabelStore(tmp_path / "labels")) >= {"a/0", "b/0.webp", "c/0"}
    noted = json.loads((tmp_path / "labels" / "images.json").read_text())["left out"]
    assert [name.split(" (")[0] for name in noted["can't be read"]] == ["a/1.png", "c/2.JPG"]
    Image.new("RGB", (40, 40)).save(images / "train" / "a" / "1.png")  # repaired since
    train("token-label", images, tmp_path / "run", labels=tmp_path / "labels")
    said = capsys.readouterr().err
    assert "train: left out 1 (can't be read): c/2.JPG (" in said
    assert f"left out 1 (no label in {tmp_path / 'labels'}: timm-tokens annotate makes them): a/1.png" in said
    (images / "train").rename(images / "others")
    (images / "others" / "a").rename(images / "others" / "d")
    with pytest.raises(CommandError, match=r"no images; .*left out 14 \(no label in "):
        call("train token-label", data_dir=images / "others" / "..", train_split="others", out=tmp_path / "new",
             labels=empty_store(tmp_path), **TRAIN)  # fmt: skip


def empty_store(tmp_path):
    with TokenLabelWriter(tmp_path / "other labels", 3) as writer:
        writer.add("x/1", torch.zeros(1, 2, 2), torch.zeros(1, 2, 2, dtype=torch.int64))
    return tmp_path / "other labels"


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_grey_models_train(images, weights, tmp_path, objective):
    weights(img_size=32)
    result = train(objective, images, tmp_path / "run", in_chans=1)
    state = load_file(result.path)
    stem = next(name for name in state if name.endswith("patch_embed.proj.weight"))
    assert state[stem].shape[1] == 1


def test_grey_models_are_measured(images, weights, tmp_path):
    given = QUICK | {"in_chans": 1, "checkpoint": weights(num_classes=3, in_chans=1)}
    fit = {"data_dir": images, "out": tmp_path / "probe", "neighbours": [3], "epochs": 2, "lrs": [0.1], "plot": False}
    assert call("probe", **fit, **given).images == (15, 6)
    labels = {"dataset": images / "train", "out": tmp_path / "labels", "num_classes": 3, "top_k": 2}
    assert call("annotate", **given | labels | {"img_size": [32]})[:3] == (15, 15, 15)
    line = f"draw {images}/val/a/0.png {tmp_path}/out.png --model test_vit --img-size 32 --in-chans 1 --r 1 --random"
    assert main(line.split()) == 0
    train("mte", images, tmp_path / "run", in_chans=1)
    assert call("probe", **fit, run_dir=tmp_path / "run", workers=0, device="cpu").images == (15, 6)


def test_sizes_that_patches_do_not_fill(images, weights, tmp_path, capsys):
    weights()
    message = "images of 100 x 100 px are not filled by the model's patches of 16 x 16 px: take 96 x 96 or 112 x 112"
    for objective in OBJECTIVES:
        with pytest.raises(CommandError, match=f"--img-size 100 does not fit: {message}"):
            train(objective, images, tmp_path / "run", img_size=100)
        if objective in ("mira", "mte"):
            with pytest.raises(CommandError, match="--local-size 20 does not fit: images of 20 x 20 px are not filled"):
                train(objective, images, tmp_path / "run", local_size=20)
    commands = [f"probe --data-dir {images}", f"annotate {images} {tmp_path / 'labels'}"]
    commands += [f"draw {images}/val/a/0.png {tmp_path}/out.png", f"fewshot --data-dir {images}/train"]
    for command in [*(f"{line} --random --model test_vit" for line in commands), "bench test_vit"]:
        assert main([*command.split(), "--img-size", "100", "--device", "cpu"]) == 2
        line = capsys.readouterr().err.splitlines()[-1]
        assert message in line and line.startswith("timm-tokens "), line
    assert not (tmp_path / "run").exists() and not (tmp_path / "labels").exists()


def test_one_class_is_nothing_to_learn(images, tmp_path):
    for split in ("train", "val"):
        (images / split / "a").rename(images / f"{split} of a")
        (images / split).rename(images / f"rest of {split}")
        (images / f"{split} of a").rename(images / split)
    with pytest.raises(CommandError, match="lie in no folders that name their classes"):
        train("token-label", images, tmp_path / "run")
    with pytest.raises(CommandError, match="all images are of one class, '': there is nothing to tell apart"):
        call("probe", data_dir=images, out=tmp_path / "probe", random=True, plot=False, **QUICK)
    assert train("mira", images, tmp_path / "mira").path.is_file()  # which learns without classes


def test_weights_are_named_or_asked_for(images, weights, tmp_path, capsys):
    commands = {
        "probe": {"data_dir": images, "out": tmp_path / "probe"},
        "fewshot": {"data_dir": images / "train", "out": tmp_path / "fewshot"},
        "annotate": {"dataset": images, "out": tmp_path / "labels"},
        "draw": {"image": images / "val/a/0.png", "out": tmp_path / "out.png"},
    }
    unknown = r"which weights\? Give --pretrained .*, or --checkpoint .* --random asks for"
    for command, options in commands.items():
        with pytest.raises(CommandError, match=unknown):
            call(command, model="test_vit", device="cpu", **options)
        with pytest.raises(CommandError, match="--random is for a model without --pretrained and --checkpoint"):
            call(command, model="test_vit", device="cpu", random=True, checkpoint=weights(), **options)
    broken = r"^(base\.)?norm\.weight of the model has 1 of 64 numbers that are not finite"
    state = load_file(tmp_path / "weights.safetensors")
    state["norm.weight"][3] = float("nan")
    save_file(state, tmp_path / "weights.safetensors")
    for command, options in commands.items():
        with pytest.raises(CommandError, match=broken):
            call(command, model="test_vit", device="cpu", checkpoint=tmp_path / "weights.safetensors", **options)
    with pytest.raises(CommandError, match=broken):
        train("token-label", images, tmp_path / "run", checkpoint=tmp_path / "weights.safetensors")


def share(rank, folder):
    """What a process of two leaves out of its training images."""
    options = OBJECTIVES["mte"] | TRAIN | {"data_dir": folder / "images", "out": folder / "run"}
    settled = build(module_of("train mte").Options, options)
    images = run_images.readable(open_split(settled, "train"), settled, "train")
    return torch.tensor(list(images.rows))


def test_processes_leave_out_the_same(images, tmp_path):
    spoil(images)
    expected = [row for row in range(15) if row not in (1, 12)]
    assert [rows.tolist() for rows in on_two(share, tmp_path)] == [expected] * 2
