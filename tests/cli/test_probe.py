"""The probe command: its numbers are those of the functions on the model's features; its report; what it refuses."""

import csv

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from sklearn.metrics import normalized_mutual_info_score

from timm_tokens.cli import CommandError, call, main
from timm_tokens.cli.common import checks, runs
from timm_tokens.cli.common import features as _features
from timm_tokens.data import input_config, input_transform
from timm_tokens.probing import knn_accuracy, linear_probe

# timm's data sets leave the closing of their files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

QUICK = {"workers": 0, "device": "cpu"}


@pytest.fixture
def images(tmp_path):
    """Three classes, of eight training and four validation images each."""
    for split, count in (("train", 8), ("val", 4)):
        for c, name in enumerate(["blue", "green", "red"]):
            (tmp_path / "images" / split / name).mkdir(parents=True)
            for i in range(count):
                pixels = torch.randint(225, (8, 8, 3), dtype=torch.uint8)  # coarse noise, with a tint
                pixels[..., 2 - c] += 6
                Image.fromarray(pixels.numpy()).save(tmp_path / "images" / split / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def arguments(images, tmp_path):
    torch.manual_seed(5)
    save_file(timm.create_model("test_vit").state_dict(), tmp_path / "weights.safetensors")
    given = {"model": "test_vit", "checkpoint": tmp_path / "weights.safetensors", "data_dir": images}
    return given | {
        "workers": 0,
        "device": "cpu",
        "out": tmp_path / "out",
        "neighbours": [3, 10, 100],
        "lrs": [0.01, 0.1],
        "epochs": 10,
    }


def test_the_numbers_are_those_of_the_functions_on_the_models_features(arguments, images, tmp_path, capsys):
    report = call("probe", **arguments)
    net = timm.create_model("test_vit", num_classes=0).eval()
    net.load_state_dict(load_file(tmp_path / "weights.safetensors"), strict=False)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    sets = []
    for split in ("train", "val"):
        files = sorted((images / split).rglob("*.png"))
        with torch.no_grad():
            sets.append(net(torch.stack([transform(Image.open(file)) for file in files])))
        sets.append(torch.tensor([["blue", "green", "red"].index(file.parent.name) for file in files]))
    assert report.images == (24, 12) and report.nmi is None
    assert report.knn == knn_accuracy(*sets, k=[3, 10])  # there are no 100 training images
    expected = linear_probe(*sets, lrs=[0.01, 0.1], epochs=10)
    assert (report.linear.lr, report.linear.held_out) == (expected.lr, pytest.approx(expected.held_out))
    assert report.linear.accuracy == pytest.approx(expected.accuracy)
    assert 0 < report.knn[3] < 1  # else it says nothing
    assert f"| 10 nearest neighbours | {report.knn[10]:.2%} |" in capsys.readouterr().out


def test_the_report_holds_them_all(arguments):
    report = call("probe", **arguments)
    out = arguments["out"]
    with (out / "probe.csv").open() as file:
        rows = [(row["measure"], float(row["setting"]), float(row["value"])) for row in csv.DictReader(file)]
    assert ("knn", 3, report.knn[3]) in rows and ("linear", report.linear.lr, report.linear.accuracy) in rows
    assert [row[1] for row in rows if row[0] == "linear held out"] == [0.01, 0.1]
    text = (out / "report.md").read_text()
    assert "# test_vit" in text and "(probe.png)" in text and "weights.safetensors" in text
    assert "on 12 images (standard error up to 14.4 points) of features of 24 training images" in text
    with Image.open(out / "probe.png") as picture:
        assert picture.width > 2 * picture.height


def test_features_are_computed_once(arguments, monkeypatch):
    first = call("probe", **arguments, plot=False)
    monkeypatch.setattr(_features, "_extract", None)  # not called
    assert call("probe", **arguments, plot=False) == first
    assert len(list(arguments["out"].glob("*.safetensors"))) == 2 and not (arguments["out"] / "probe.png").exists()


@pytest.mark.parametrize("size", [None, 96])
def test_the_image_size_can_be_chosen(arguments, images, size):
    call("probe", **arguments, img_size=size, plot=False)
    kept = [_features.load_features(file) for file in arguments["out"].glob("*.safetensors")]
    val = next(part for part in kept if len(part.labels) == 12)
    net = timm.create_model("test_vit", num_classes=0).eval()
    net.load_state_dict(load_file(arguments["checkpoint"]), strict=False)
    side = size or 160  # the model's own
    net.set_input_size((side, side))
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net) | {"input_size": (3, side, side)})
    files = sorted((images / "val").rglob("*.png"))
    pixels = torch.stack([transform(Image.open(file)) for file in files])
    with torch.no_grad():
        torch.testing.assert_close(val.features, net(pixels), atol=1e-5, rtol=1e-4)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of two steps with one auxiliary token of each kind, and its images."""
    folder = tmp_path_factory.mktemp("trained")
    for i in range(6):
        (folder / "images" / "train" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        (folder / "images" / "val" / str(i % 2)).mkdir(parents=True, exist_ok=True)
        for split in ("train", "val"):
            pixels = torch.randint(255, (48, 48, 3), dtype=torch.uint8, generator=torch.Generator().manual_seed(i))
            Image.fromarray(pixels.numpy()).save(folder / "images" / split / str(i % 2) / f"{i}{split}.png")
    line = f"train mte --data-dir {folder / 'images'} --out {folder / 'run'} --model test_vit --img-size 64 --steps 2 "
    line += "--batch-size 2 --workers 0 --prototypes 16 --head-hidden 8 --num-cls 1 --num-pooled 1 --local-crops 0"
    assert main([*line.split(), "--device", "cpu"]) == 0
    return folder


def test_prototypes_of_a_run_as_tokens_are_added(trained, tmp_path):
    arguments = {
        "data_dir": trained / "images",
        "out": tmp_path,
        "neighbours": [1],
        "epochs": 2,
        "batch_size": 4,
        "workers": 0,
    }
    report = call("probe", run_dir=trained / "run", **arguments | {"lrs": [0.1, 1.0]})
    assert report.tokens == ("cls", "aux0", "pooled0") and len(report.nmi) == 3
    # Again by hand: the teacher's centred logits, at the last temperature.
    task = runs.load_run(trained / "run").task
    transform = input_transform(input_config(task.product, 64))
    files = sorted((trained / "images" / "val").rglob("*.png"))
    pixels = torch.stack([transform(Image.open(file)) for file in files])
    assert pixels.shape[-1] == 64
    with torch.no_grad():
        tokens = task.teacher.encoder.backbone(pixels, tokens=True)
        heads, last = task.teacher.encoder.heads, task.teacher.prototypes
        logits = [last(heads["cls"](tokens.cls)), last(heads["aux"](tokens.aux_cls[:, 0]))]
        logits.append(last(heads["pooled"](tokens.pooled[:, 0])))
    center = task.criterion.baseline.center.value
    probabilities = [((x - center[i]) / 0.07).softmax(-1) for i, x in enumerate(logits)]
    for count in (1, 2, 3):
        assigned = torch.stack(probabilities[:count]).mean(0).argmax(-1)
        expected = normalized_mutual_info_score([int(file.parent.name) for file in files], assigned.numpy())
        assert report.nmi[count - 1] == pytest.approx(expected, abs=1e-6)
    assert len(set(report.nmi)) > 1
    assert "| NMI of prototypes, cls to pooled0 |" in (tmp_path / "report.md").read_text()
    saved = [_features.load_features(file) for file in tmp_path.glob("*.safetensors")]
    with torch.no_grad():
        expected = task.product.eval()(pixels)
    val = next(x for x in saved if "val" in x.metadata["data"])
    torch.testing.assert_close(val.features, expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("objective", "model", "options", "made"),
    [
        (
            "dtm",
            "test_vit",
            "--img-size 32 --model-kwargs depth=1 --teacher test_vit --teacher-checkpoint",
            {"depth": 1},
        ),
        ("mira", "test_vit", "--img-size 64 --local-size 32 --local-crops 1 --prototypes 8 --hidden 8 --width 8", {}),
        ("mira", "test_resnet", "--img-size 64 --local-crops 0 --prototypes 8 --hidden 8 --width 8", {}),
        ("token-label", "test_vit", "--img-size 64 --ema 0.5", {}),
    ],
)
def test_the_model_of_any_run(trained, arguments, tmp_path, objective, model, options, made):
    line = f"train {objective} --data-dir {trained / 'images'} --out {tmp_path / 'run'} --model {model} --steps 2 "
    line += f"--batch-size 2 --workers 0 --device cpu {options}"
    if objective == "dtm":
        line += f" {arguments['checkpoint']}"
    assert main(line.split()) == 0
    shared = {"data_dir": trained / "images", "out": tmp_path, "neighbours": [1], "epochs": 1} | QUICK
    call("probe", run_dir=tmp_path / "run", plot=False, **shared)
    size = 32 if objective == "dtm" else 64
    net = timm.create_model(model, num_classes=0, **made).eval()
    if hasattr(net, "set_input_size"):
        net.set_input_size(img_size=size)
    state = load_file(tmp_path / "run" / "model.safetensors")
    net.load_state_dict(state, strict=objective != "token-label")
    files = sorted((trained / "images" / "val").rglob("*.png"))
    transform = input_transform(input_config(net, size))
    with torch.no_grad():
        expected = net(torch.stack([transform(Image.open(file)) for file in files]))
    saved = [_features.load_features(file) for file in tmp_path.glob("test_*.safetensors")]
    val = next(x for x in saved if "val" in x.metadata["data"])
    torch.testing.assert_close(val.features, expected, atol=1e-5, rtol=1e-4)
    with pytest.raises(CommandError, match="has no ViT with auxiliary tokens"):
        call("draw attention", image=files[0], out=tmp_path / "seen.png", run_dir=tmp_path / "run")


def test_a_run_without_checkpoint_is_refused(arguments, tmp_path):
    (tmp_path / "options.json").write_text('{"command": "train dtm"}')
    with pytest.raises(CommandError, match="has no checkpoint yet"):
        call("probe", **arguments | {"model": None, "checkpoint": None, "run_dir": tmp_path})
    for command, message in {
        '"bench"': "options.json is of timm-tokens bench",
        "[1]": "does not hold the opti",
    }.items():
        (tmp_path / "options.json").write_text(f'{{"command": {command}}}')
        with pytest.raises(CommandError, match=message):
            call("probe", **arguments | {"model": None, "checkpoint": None, "run_dir": tmp_path})


def test_a_changed_byte_of_kept_features_is_noticed(arguments):
    call("probe", **arguments)
    kept = next(arguments["out"].glob("*.safetensors"))
    data = bytearray(kept.read_bytes())
    data[-3] ^= 1
    kept.write_bytes(data)
    with pytest.raises(CommandError, match=rf"{kept.name} is corrupt, its digest is not that of its content"):
        call("probe", **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model": None}, "pass either --model NAME, or --run FOLDER"),
        ({"model": None, "run_dir": "nowhere"}, "--run brings its model: leave out --checkpoint"),
        ({"model": None, "checkpoint": None, "run_dir": "nowhere"}, "no run of timm-tokens train in nowhere"),
        ({"data_dir": None}, "--data-dir is missing"),
        ({"data_dir": "nowhere"}, "no folder nowhere/train"),
        ({"val_split": "train"}, "splits train and train are the same images"),
        ({"model": "no_such_vit"}, "timm has no model 'no_such_vit'"),
        ({"checkpoint": "nowhere.pth"}, "no checkpoint file nowhere.pth"),
        ({"neighbours": [100]}, r"--neighbours must have a number up to 24"),
        ({"lrs": [0.0]}, "--lrs must be above 0, got 0"),
    ],
)
def test_refuses_in_words(change, message, arguments):
    with pytest.raises(CommandError, match=message):
        call("probe", **arguments | change)


def test_splits_of_other_classes_are_refused(arguments, images):
    (images / "val" / "red").rename(images / "val" / "orange")
    with pytest.raises(CommandError, match="splits train and val differ in their classes, only one has orange, red"):
        call("probe", **arguments)


def test_refuses_to_plot_without_matplotlib(arguments, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"pip install 'timm-tokens\[viz\]', or pass --no-plot"):
        call("probe", **arguments)
