"""Merging by the command: trained, calibrated, and taken up by the other commands."""

import csv
import json
import re
import shutil
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

import timm_tokens
from timm_tokens import TokenViT, apply_dtem_merging
from timm_tokens.cli import CommandError, call, main
from timm_tokens.cli.common.features import load_features
from timm_tokens.cli.common.runs import load_run
from timm_tokens.cli.run import with_merger
from timm_tokens.cli.train import dtem
from timm_tokens.merger_file import read_merger

pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # of timm's data sets

CLASSES = ("n01440764", "n02102040")  # of ImageNet
QUICK = {"model": "test_vit", "img_size": 64, "workers": 0, "device": "cpu"}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    """Two classes of eight images to train on and three to validate."""
    root = tmp_path_factory.mktemp("images")
    generator = torch.Generator().manual_seed(0)
    for split, count in (("train", 8), ("val", 3)):
        for name in CLASSES:
            (root / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(256, (12, 12, 3), dtype=torch.uint8, generator=generator)
                Image.fromarray(pixels.numpy()).resize((80, 80)).save(root / split / name / f"{i}.png")
    return root


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    torch.manual_seed(3)
    path = tmp_path_factory.mktemp("weights") / "vit.safetensors"
    save_file(timm.create_model("test_vit", img_size=64).state_dict(), path)
    return path


@pytest.fixture(scope="module")
def vit(weights):
    return timm.create_model("test_vit", img_size=64, checkpoint_path=str(weights)).eval()


@pytest.fixture(scope="module")
def trained(images, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    options = dict(
        checkpoint=weights, data_dir=images, out=out, steps=3, batch_size=4, r=(2, 5), table_r=(0, 4), lr=0.01
    )
    return call("train dtem", **QUICK, **options), out


def rows(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def test_a_run_gives_a_merger(trained, vit):
    result, out = trained
    assert isinstance(result.model, TokenViT) and result.model.merger.r == 2
    loaded = apply_dtem_merging(vit, weights=out)  # no warning: it is for these weights
    assert loaded.merger.r == 2  # 6 blocks merge 12 of 16 patches
    for ours, theirs in zip(loaded.merger.parameters(), result.model.merger.parameters(), strict=True):
        assert torch.equal(ours, theirs.half().float())
    assert not torch.equal(loaded.merger.embed[0].weight, apply_dtem_merging(vit).merger.embed[0].weight)
    for name, value in vit.state_dict().items():
        assert torch.equal(value, result.model.base.state_dict()[name]), name
    names = ["last.pth", "merger.safetensors", "merging.csv", "model.safetensors", "options.json", "steps.csv"]
    assert {*names, "summary.csv"} <= {path.name for path in out.iterdir()}
    assert float(rows(out / "summary.csv")[-1]["eval_top1"]) >= 0


def test_the_table(trained, images):
    out = trained[1]
    found = rows(out / "merging.csv")
    assert [(row["merging"], row["r"], row["tokens"]) for row in found] == [
        ("none", "0", "17"), ("learned", "0", "17"), ("learned", "4", "2"), ("keys", "0", "17"), ("keys", "4", "2"),
    ]  # fmt: skip
    assert found[0]["agreement"] == found[1]["agreement"] == "100.0" and 0 <= float(found[2]["accuracy"]) <= 100
    assert found[2]["patch_cosine"] != found[4]["patch_cosine"]
    notes = read_merger(out).notes
    assert notes["data"] == str(images) and notes["table"][2]["tokens"] == 2


def test_labels_mixing_and_all_of_the_model(images, weights, tmp_path):
    options = dict(checkpoint=weights, data_dir=images, steps=2, batch_size=4, table_r=(4,))
    more = dict(target="labels", train="all", mixup=0.8, cutmix=1.0, aa="rand-m9-mstd0.5-inc1", re_prob=0.25)
    result = call("train dtem", out=tmp_path / "all", **QUICK, **options, **more)
    moved = timm.create_model("test_vit", img_size=64, checkpoint_path=str(weights))
    assert not torch.equal(result.model.base.head.weight, moved.head.weight)
    again = dict(merger=str(tmp_path / "all"), eval_r=3, target="labels")
    with pytest.warns(UserWarning, match="on other weights of test_vit"):  # trained with all of the model
        result = call("train dtem", out=tmp_path / "again", **QUICK, **options, **again)
    assert result.model.merger.r == 3 and read_merger(tmp_path / "again").config["r"] == 3


def test_models_without_classes(images, tmp_path, capsys):
    """As timm makes DINOv2."""
    kwargs, name = {"embed_dim": 32, "depth": 3, "num_heads": 2}, "vit_small_patch14_reg4_dinov2"
    save_file(timm.create_model(name, img_size=56, **kwargs).state_dict(), tmp_path / "weights.safetensors")
    options = QUICK | dict(model=name, model_kwargs=kwargs, img_size=56, checkpoint=tmp_path / "weights.safetensors")
    options |= dict(data_dir=images, steps=1, batch_size=4, table_r=(4,))
    call("train dtem", out=tmp_path, **options)
    assert "eval_cosine" in rows(tmp_path / "summary.csv")[0]
    assert rows(tmp_path / "merging.csv")[1]["agreement"] == "" and "cosine of patches" in capsys.readouterr().out
    with pytest.raises(CommandError, match="--target labels needs the model's own classes"):
        call("train dtem", out=tmp_path / "labels", target="labels", **options)


def test_resume_needs_the_same_settings(trained, images, weights, capsys):
    _, out = trained
    line = (
        f"train dtem --model test_vit --img-size 64 --workers 0 --device cpu --checkpoint {weights} --data-dir {images}"
    )
    line += f" --steps 3 --batch-size 4 --r 2 5 --table-r 0 4 --lr 0.01 --out {out} --resume"
    assert main(line.split()) == 0
    assert main(f"{line} --r 3".split()) == 2
    assert "started with other settings (r [2, 5] -> [3])" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"checkpoint": None}, "Give --pretrained for timm's, or --checkpoint FILE"),
        ({"r": (5, 2)}, r"--r must be one number, or the lowest and the highest, got \(5, 2\)"),
        ({"r": (9,)}, "--r 9 is too large: a block merges at most half of the 16 patches, 8"),
        ({"r": (2, 9)}, "--r 9 is too large"),
        ({"eval_r": 9}, "--eval-r 9 is too large"),
        ({"table_r": (4, 9)}, "--table-r 9 is too large"),
        ({"smoothing": 0.1}, r"--smoothing needs mixup or cutmix: the labels of other images stay, got 0\.1"),
        ({"merger": "nowhere"}, "there is no file nowhere"),
        ({"model": "vit_small_patch16_18x2_224"}, "parallel"),
    ],
)
def test_what_does_not_fit_is_refused(options, words, images, weights, tmp_path):
    given = QUICK | dict(checkpoint=weights, data_dir=images, out=tmp_path / "run", steps=1) | options
    given |= {"random": True, "checkpoint": None} if "model" in options else {}
    with pytest.raises(CommandError, match=words):
        call("train dtem", **given)


@pytest.fixture(scope="module")
def calibrated(images, weights, tmp_path_factory):
    out = tmp_path_factory.mktemp("calibrated")
    options = dict(checkpoint=weights, data_dir=images, out=out, images=8, test_images=4, flops_ratio=0.7, batch_size=4)
    return call("calibrate", **QUICK, **options), out


def test_calibrate(calibrated, vit):
    schedule, out = calibrated
    model = apply_dtem_merging(vit, weights=out)
    assert model.merger.r == schedule and model.merger.metric == "keys"
    assert 0.6 < model.flops() / model.flops(0) <= 0.7
    assert json.loads((out / "options.json").read_text())["flops_ratio"] == 0.7


def test_train_after_calibration(calibrated, images, weights, tmp_path):
    """With the schedule of a merger by keys, which has no embeddings to start from."""
    schedule, out = calibrated
    given = dict(checkpoint=weights, data_dir=images, merger=str(out), steps=1, batch_size=4, table_r=(4,), lr=0.01)
    result = call("train dtem", out=tmp_path / "run", embed_dim=16, **QUICK, **given)
    assert result.model.merger.metric == "learned" and result.model.merger.embed_dim == 16
    assert result.model.merger.r == schedule == tuple(read_merger(tmp_path / "run").config["r"])
    assert [row["r"] for row in rows(tmp_path / "run/merging.csv")] == ["0", *["4", " ".join(map(str, schedule))] * 2]
    options = dtem.Options(out=tmp_path / "again", **QUICK, **given | {"merger": str(tmp_path / "run")})
    task = dtem.build(options).task  # goes on from the trained ones, with their schedule
    task.start_step(0, 1, 1)
    assert task.product.merger.r == schedule
    assert dtem.build(replace(options, r=(2,))).task._range == (2, 2)


def test_calibrate_a_trained_merger(trained, images, weights, tmp_path, capsys):
    options = dict(checkpoint=weights, data_dir=images, out=tmp_path, images=4, test_images=4, max_blocks=2)
    schedule = call("calibrate", merger=str(trained[1]), flops_ratio=0.8, **QUICK, **options)
    assert sum(r > 0 for r in schedule) <= 2 and read_merger(tmp_path).config["metric"] == "learned"
    printed = capsys.readouterr().out
    assert f"Weights: {weights}. r = {' '.join(map(str, schedule))}: " in printed and printed.count("| learned |") == 2
    assert "| keys |" not in printed
    with pytest.raises(CommandError, match="--merger brings what tokens are compared by: leave out --metric"):
        call("calibrate", merger=str(trained[1]), metric="keys", **QUICK, **options)
    with pytest.raises(CommandError, match=r"--flops-ratio=0\.01 can't be reached"):
        call("calibrate", flops_ratio=0.01, **QUICK, **options)
    with pytest.raises(CommandError, match="Give --pretrained for timm's, or --checkpoint FILE"):
        call("calibrate", **QUICK, **options | {"checkpoint": None})


def test_what_is_done_with_too_few_images_is_said(images, weights, tmp_path, capsys):
    options = dict(checkpoint=weights, data_dir=images, images=14, flops_ratio=0.9, max_blocks=1)
    call("calibrate", out=tmp_path / "some", test_images=4, **QUICK, **options)
    assert "There are 16 images: 14 are to calibrate by, and 2 for the table." in capsys.readouterr().err
    call("calibrate", out=tmp_path / "none", test_images=4, **QUICK, **options | {"images": 16})
    assert "16 are to calibrate by, and none for the table." in capsys.readouterr().err


def test_images_that_can_not_be_read_are_left_out(images, weights, tmp_path, capsys):
    spoilt = tmp_path / "images"
    shutil.copytree(images, spoilt)
    for split in ("train", "val"):
        (spoilt / split / CLASSES[0] / "0.png").write_bytes(b"")
    options = dict(checkpoint=weights, data_dir=spoilt, **QUICK)
    call("train dtem", out=tmp_path / "run", steps=1, batch_size=4, r=(2,), table_r=(4,), **options)
    noted = json.loads((tmp_path / "run" / "images.json").read_text())
    assert [noted[split]["unreadable"].keys() for split in ("train", "val")] == [{"0"}, {"0"}]
    capsys.readouterr()
    call("calibrate", out=tmp_path / "calibrated", images=8, test_images=8, flops_ratio=0.9, max_blocks=1, **options)
    said = capsys.readouterr().err
    assert f"train: left out 1 (can't be read): {CLASSES[0]}/0.png" in said and "There are 15 images: 8 are" in said


def test_calibrate_a_vit_of_few_patches(images, tmp_path):
    few = QUICK | {"img_size": 32}  # 4 patches, of which a block merges 2 at most
    options = dict(random=True, data_dir=images, images=4, test_images=0, flops_ratio=0.9, out=tmp_path)
    assert 0 < max(call("calibrate", **few, **options)) <= 2


def test_usual_numbers_of_tokens_to_merge():
    """They are 8, 12 and 16 for 196 patches and 12 blocks, and in proportion for others."""
    usual = {(224, 12): (8, 12, 16), (224, 24): (4, 6, 8), (448, 12): (33, 49, 65), (32, 1): (2, 2, 2)}
    for (size, depth), expected in usual.items():
        vit = timm.create_model("vit_tiny_patch16_224", img_size=size, depth=depth)
        model = apply_dtem_merging(vit)
        assert tuple(dtem.usual_r(model, share) for share in (0.5, 0.75, 1.0)) == expected


def test_a_teacher_that_is_not_finite_is_named(images, weights, tmp_path):
    state = load_file(weights)
    state["head.weight"].fill_(3e38)
    save_file(state, tmp_path / "huge.safetensors")
    given = dict(checkpoint=tmp_path / "huge.safetensors", data_dir=images, out=tmp_path / "run", steps=1, batch_size=4)
    with pytest.raises(CommandError, match=r"the loss is nan at step 0; .*The outputs without merging are not finite"):
        call("train dtem", **QUICK, **given)


def test_bench_takes_a_merger(calibrated, capsys):
    schedule, out = calibrated
    line = f"bench test_vit --img-size 64 --merger {out} --r 4 --batch-size 2 --rounds 1 --device cpu --no-memory"
    assert main(line.split()) == 0
    printed = capsys.readouterr().out
    assert f"| forward | 2 | {' '.join(map(str, schedule))} |" in printed and "| forward | 2 | 4 |" in printed


def test_draw_takes_a_merger(trained, images, weights, tmp_path):
    photo = next(images.rglob("*.png"))
    given = dict(image=photo, model="test_vit", img_size=64, checkpoint=weights, device="cpu")
    panels = call("draw", out=tmp_path / "a.png", merger=str(trained[1]), **given)
    assert panels[-1].tokens == 16 - 12
    panels = call("draw", out=tmp_path / "b.png", merger=str(trained[1]), r=1, **given)
    assert panels[-1].tokens == 16 - 6
    with pytest.raises(CommandError, match="leave out --metric"):
        call("draw", out=tmp_path / "c.png", merger=str(trained[1]), metric="keys", **given)
    with pytest.raises(CommandError, match=r"which weights\? Give --pretrained"):
        call("draw", out=tmp_path / "c.png", merger=str(trained[1]), **given | {"checkpoint": None})


def test_probe_takes_a_merger_and_a_run(trained, images, weights, tmp_path):
    given = dict(data_dir=images, epochs=2, neighbours=[3], lrs=[0.1], plot=False, workers=0, device="cpu")
    call(
        "probe",
        out=tmp_path / "merged",
        merger=str(trained[1]),
        checkpoint=weights,
        model="test_vit",
        img_size=64,
        **given,
    )
    call("probe", out=tmp_path / "run", run_dir=trained[1], **given)
    call("probe", out=tmp_path / "plain", checkpoint=weights, model="test_vit", img_size=64, **given)
    reports = {name: (tmp_path / name / "probe.csv").read_text() for name in ("merged", "run", "plain")}
    found = {}
    for name in ("merged", "plain"):
        files = map(load_features, (tmp_path / name).glob("*.safetensors"))
        found[name] = {len(each.labels): each.features for each in files}
    assert found["merged"].keys() == {16, 6} and reports["run"]
    assert not torch.allclose(found["merged"][6], found["plain"][6], atol=1e-3)
    run = load_run(trained[1]).source.make()
    assert run.num_classes == 0 and torch.equal(run.merger.embed[2].weight, trained[0].model.merger.embed[2].weight)


def test_run_takes_a_merger(trained, weights, tmp_path):
    assert with_merger(["--model", "test_vit", "-b", "8"]) == ["--model", "test_vit", "-b", "8"]
    assert with_merger(["x", "--merger", "run", "--model", "m", "--model-kwargs", "a=1"]) == [
        "x", "--model", "token_vit", "--model-kwargs", "base=m", "merger={'weights': 'run'}", "a=1",
    ]  # fmt: skip
    for words, match in ((["--merger"], "needs a file"), (["--merger", "run"], "needs --model NAME")):
        with pytest.raises(CommandError, match=match):
            with_merger(words)
    script = tmp_path / "validate.py"
    script.write_text(
        "import argparse, timm\nfrom timm.utils import ParseKwargs\n"
        "p = argparse.ArgumentParser()\np.add_argument('--model')\np.add_argument('--checkpoint', default='')\n"
        "p.add_argument('--model-kwargs', nargs='*', default={}, action=ParseKwargs)\n"
        "a = p.parse_args()\n"
        "model = timm.create_model(a.model, img_size=64, checkpoint_path=a.checkpoint, **a.model_kwargs)\n"
    )
    before = list(sys.argv)
    arguments = ("--model", "test_vit", "--checkpoint", str(weights), "--merger", str(trained[1]))
    with pytest.warns(UserWarning, match="on other weights"):  # the checkpoint comes later
        made = call("run", script=script, arguments=arguments)["model"]
    assert made.merger.r == 2 and sys.argv == before
    assert torch.equal(made.merger.embed[1].bias, trained[0].model.merger.embed[1].bias.half().float())
    assert made.base.pretrained_cfg["architecture"] == "test_vit"


def test_the_lines_of_the_readme(images, weights, tmp_path, monkeypatch):
    """Its three lines of shell, on a tiny model, few images and few steps."""
    text = (Path(timm_tokens.__file__).parent.parent / "README.md").read_text()
    section = text.split("## Train, calibrate and share a merger")[1].split("## ")[0]
    lines = re.search(r"```sh\n(.*?)```", section, re.DOTALL)[1].splitlines()
    short = {
        "train": "--steps 2 --batch-size 4 --table-r 2", "calibrate": "--images 4 --test-images 2 --batch-size 4",
        "bench": "--rounds 1 --no-memory",
    }  # fmt: skip
    monkeypatch.chdir(tmp_path)
    for line in lines:
        line = line.removeprefix("timm-tokens ").replace("vit_tiny_patch16_224", "test_vit --img-size 64")
        line = line.replace("--pretrained", f"--checkpoint {weights}").replace(
            "--data-dir images", f"--data-dir {images}"
        )
        machine = "--device cpu" if line.startswith("bench") else "--device cpu --workers 0"
        assert main(f"{line} {machine} {short.pop(line.split()[0])}".split()) == 0, line
    assert not short and read_merger("calibrated").config["metric"] == "learned"


def test_objective_options_are_those_of_the_task(images, weights, tmp_path):
    options = dict(checkpoint=weights, data_dir=images, out=tmp_path, r=(3,), tau1=0.2, candidates=5, val_split="")
    built = dtem.build(dtem.Options(**QUICK, **options))
    assert built.task.product.merger.config == dict(
        r=2, embed_dim=32, metric="learned", candidates=5, tau1=0.2, tau2=0.1, prop_attn=True
    )
    built.task.start_step(0, 1, 1)
    assert built.task.product.merger.r == 3 and built.evaluate is None and len(built.dataset) == 16
