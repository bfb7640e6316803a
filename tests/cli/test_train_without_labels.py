"""The command that pre-trains: from folders of images to a plain model that timm loads, and what it refuses."""

import csv

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

from timm_tokens.cli import CommandError, call
from timm_tokens.cli.common.models import make_model
from timm_tokens.cli.options import ModelOptions
from timm_tokens.tasks import DTMTask

# timm's ImageDataset leaves the closing of its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

QUICK = {"img_size": 32, "epochs": 2, "batch_size": 4, "workers": 0, "device": "cpu"}
BEIT = {"embed_dim": 48, "depth": 2, "num_heads": 2}
CLUSTERS = {"prototypes": 10, "head_hidden": 16, "head_dim": 8, "local_crops": 1}


@pytest.fixture(scope="module")
def images(tmp_path_factory):
    root = tmp_path_factory.mktemp("images")
    (root / "train" / "all").mkdir(parents=True)
    for i in range(8):
        Image.new("RGB", (40, 40), (30 * i, 100, 200 - 20 * i)).save(root / "train" / "all" / f"{i}.png")
    torch.manual_seed(0)
    for name in ("test_vit", "test_resnet"):
        save_file(timm.create_model(name).state_dict(), root / f"{name}.safetensors")
    return root


def rows(path):
    with path.open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def pretrain(objective, images, out, **options):
    if objective == "dtm":
        options = {"teacher": "test_vit"} | options
        options["teacher_checkpoint"] = images / f"{options['teacher']}.safetensors"
    return call(f"train {objective}", data_dir=images, out=out, **{**QUICK, **options})


@pytest.mark.parametrize(
    ("objective", "model", "options"),
    [
        ("dtm", "test_vit", {"drop_path": None}),
        ("dtm", "test_vit2", {"teacher_head": True, "distance": "cosine", "masked_only": True, "amp": "bfloat16"}),
        ("dtm", "beit_base_patch16_224", {"model_kwargs": BEIT, "grouping": "superpixels", "normalize_target": True}),
        ("mira", "test_vit", {**CLUSTERS, "amp": "bfloat16"}),
        ("mira", "test_resnet", {**CLUSTERS, "targets": "sinkhorn", "drop_path": None}),
    ],
)
def test_a_plain_model_comes_out(images, tmp_path, objective, model, options):
    result = pretrain(objective, images, tmp_path / "out", model=model, **options)
    assert len(rows(tmp_path / "out" / "steps.csv")) == 4
    sized = {} if "resnet" in model else {"img_size": 32} | options.get("model_kwargs", {})
    path = str(tmp_path / "out" / "model.safetensors")
    loaded = timm.create_model(model, num_classes=0, checkpoint_path=path, **sized).eval()
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(loaded(x), result.model(x))


@pytest.mark.parametrize("model", ["test_vit", "test_resnet"])
@pytest.mark.parametrize("classes", [3, 1000])  # 1000 is what the model has by default
def test_what_came_out_can_be_fine_tuned(tmp_path, model, classes):
    weights = timm.create_model(model, num_classes=0).state_dict()
    save_file(weights, tmp_path / "model.safetensors")
    options = ModelOptions(model=model, checkpoint=tmp_path / "model.safetensors")
    loaded = make_model(options, num_classes=classes)
    assert loaded.num_classes == classes
    state = loaded.state_dict()
    assert all(torch.equal(state[name], value) for name, value in weights.items())
    save_file({"other": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"model.safetensors: it has no weights of the model; it has other"):
        make_model(options, num_classes=classes)


def test_mira_logs_its_information(images, tmp_path):
    pretrain("mira", images, tmp_path, model="test_vit", **CLUSTERS)
    for row in rows(tmp_path / "steps.csv"):
        expected = row["marginal_entropy"] - row["entropy"]
        assert row["mutual_information"] == pytest.approx(expected, abs=1e-4)


def test_a_student_of_other_patches(images, tmp_path):
    options = {"model": "test_vit", "model_kwargs": {"patch_size": 8}, "steps": 1, "epochs": 1}
    result = pretrain("dtm", images, tmp_path, **options)
    assert result.model.patch_embed.grid_size == (4, 4)


def test_a_student_that_takes_any_size_gets_the_size_asked_for(images, tmp_path, monkeypatch):
    seen, forward = [], DTMTask.forward

    def watched(task, input, target=None):
        seen.append((task.grid, tuple(input.shape)))
        return forward(task, input, target)

    monkeypatch.setattr(DTMTask, "forward", watched)
    tiny = {"depth": 1, "embed_dim": 48, "num_heads": 3}
    options = {"model": "naflexvit_base_patch16_gap", "model_kwargs": tiny, "drop_path": None, "img_size": 64}
    pretrain("dtm", images, tmp_path, steps=1, **options)
    assert seen == [((4, 4), (4, 3, 64, 64))]


@pytest.mark.parametrize(
    ("objective", "options", "message"),
    [
        ("dtm", {"teacher": None}, "--teacher is missing"),
        ("dtm", {"teacher": "test_vitt"}, "timm has no model 'test_vitt'"),
        ("dtm", {"teacher": "test_resnet"}, "does not cut images into patches"),
        ("dtm", {"mask_ratio": 1.5}, "--mask-ratio must be above 0 and at most 1, got 1.5"),
        ("dtm", {"min_tokens": 5}, "between 0 and the 4 tokens that may merge, got 5"),
        ("dtm", {"draws": 0}, "--draws must be at least 1, got 0"),
        ("dtm", {"model": "test_resnet"}, "ResNet.* can't be driven"),
        ("mira", {"beta": (0.7, 1.0)}, "--beta must be at least 0 and below 1, got 1.0"),
        ("mira", {"tau_teacher": 0.0}, "--tau-teacher must be above 0, got 0"),
        ("mira", {"tau_teacher": -1.0, "targets": "sinkhorn"}, "--tau-teacher must be above 0, got -1"),
        ("mira", {"local_size": 20}, "--local-size 20 does not fit: images of 20 x 20 px are not filled by"),
        ("mira", {"global_scale": (0.5, 0.2)}, "--global-scale must be a range, its lower end first"),
    ],
)
def test_bad_options_are_refused(images, tmp_path, objective, options, message):
    with pytest.raises(CommandError, match=message):
        pretrain(objective, images, tmp_path, **{"model": "test_vit", **options})
