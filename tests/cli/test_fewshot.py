"""The few-shot command: features by a model and their cache, results, and what it refuses."""

import csv
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import save_file

import timm_tokens
from timm_tokens.cli import CommandError, call
from timm_tokens.cli.common import checks
from timm_tokens.cli.common import features as _features
from timm_tokens.cli.common.datasets import open_dataset
from timm_tokens.cli.options import LoadingOptions
from timm_tokens.fewshot import CLASSIFIERS, ESFR, bd_cspn, compare

# timm's ImageDataset leaves the closing of its files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")

LOADING = LoadingOptions(batch_size=5, workers=0)
QUICK = {"workers": 0, "device": "cpu", "ways": 2, "shots": [1], "queries": 2, "episodes": 3, "plot": False}


def named(model, **options):
    return _features.named(_features.FeatureOptions(model=model, **options))


@pytest.fixture
def images(tmp_path):
    """Three classes of four images."""
    for k, colour in enumerate(["red", "green", "blue"]):
        folder = tmp_path / "images" / colour
        folder.mkdir(parents=True)
        for i in range(4):
            Image.new("RGB", (40, 40), tuple(60 * i + 10 if c == k else 30 for c in range(3))).save(folder / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def feature_file(tmp_path):
    labels = torch.arange(5).repeat_interleave(12)
    features = torch.randn(5, 8)[labels] + 0.5 * torch.randn(60, 8)
    save_file({"features": features, "labels": labels}, tmp_path / "ready.safetensors")
    return tmp_path / "ready.safetensors"


def test_ready_made_features_give_table_csv_and_plot(feature_file, tmp_path, capsys):
    out = tmp_path / "out"
    results = call("fewshot", features=feature_file, ways=3, shots=[1, 3], queries=4, episodes=4, out=out)
    assert [(r.shots, r.classifier) for r in results] == [
        (shot, name) for shot in (1, 3) for name in ("nearest_centroid", "cosine_centroid", "bd_cspn")
    ]
    with (out / "fewshot.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [float(row["gain"]) for row in rows] == pytest.approx([r.gain.mean for r in results])
    assert [float(row["plain_ci95"]) for row in rows] == pytest.approx([r.plain.half_width for r in results])
    with Image.open(out / "fewshot.png") as picture:
        assert picture.width > picture.height
    printed = capsys.readouterr().out
    assert all(f"| {r.shots} | {r.classifier} | {r.plain} | {r.adapted} | {r.gain} |" in printed for r in results)


def test_a_table_as_papers_have_it(feature_file, tmp_path, capsys):
    results = call(
        "fewshot", **QUICK | {"shots": [5, 1], "classifiers": ["bd_cspn"]}, features=feature_file, out=tmp_path
    )
    five, one = results
    printed = capsys.readouterr().out
    assert f"| method | 1-shot | 5-shot |\n| --- | --- | --- |\n| bd_cspn | {one.plain} | {five.plain} |" in printed
    assert f"| bd_cspn + ESFR | {one.adapted} | {five.adapted} |" in printed
    with (tmp_path / "methods.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["method"] for row in rows] == ["bd_cspn", "bd_cspn + ESFR"]
    assert float(rows[1]["1-shot"]) == pytest.approx(100 * one.adapted.mean)
    assert float(rows[1]["5-shot_ci95"]) == pytest.approx(100 * five.adapted.half_width)


def test_options_of_esfr_and_bd_cspn_reach_them(feature_file, tmp_path):
    options = QUICK | {"features": feature_file, "out": tmp_path, "episodes": 4, "queries": 6, "ways": 4}
    results = call(
        "fewshot", nets=2, dropout=0.3, support_weight=0.5, bd_temperature=0.7, bd_normalized=True, **options
    )
    found, labels, _ = _features.load_features(feature_file)
    expected = compare(
        found, labels, ways=4, shots=1, queries=6, episodes=4, generator=torch.Generator().manual_seed(0),
        classifiers=CLASSIFIERS | {"bd_cspn": partial(bd_cspn, temperature=0.7, normalized=True)},
        esfr=ESFR(num_nets=2, dropout=0.3, support_weight=0.5),
    )  # fmt: skip
    assert results == expected


def test_features_of_numpy_and_torch_files(feature_file, tmp_path):
    features, labels, _ = _features.load_features(feature_file)
    np.savez(tmp_path / "x.npz", features=features.double().numpy(), labels=labels.int().numpy())
    torch.save({"features": features, "labels": labels}, tmp_path / "x.pt")
    expected = call("fewshot", **QUICK, features=feature_file, out=tmp_path / "out")
    for name in ("x.npz", "x.pt"):
        assert call("fewshot", **QUICK, features=tmp_path / name, out=tmp_path / "out") == expected
    np.savez(tmp_path / "objects.npz", features=np.array([{}]), labels=np.zeros(1))
    (tmp_path / "text.npz").write_text("text")
    for name, kind in (("objects.npz", "NumPy"), ("text.npz", "NumPy")):
        with pytest.raises(CommandError, match=f"{name} is not a {kind} file: "):
            call("fewshot", **QUICK, features=tmp_path / name)


def test_a_split_by_a_csv_file(images, tmp_path, capsys):
    names = sorted(images.glob("*/*.png"))
    flat = tmp_path / "flat" / "images"
    flat.mkdir(parents=True)
    for number, path in enumerate(names):
        shutil.copy(path, flat / f"n{number}.png")
    lines = [f"n{number}.png,{'xyz'[number % 3]}" for number in range(11)]  # other classes than those of the folders
    (tmp_path / "test.csv").write_text("\n".join(["filename,label", *lines]) + "\n")
    options = QUICK | {"model": "test_vit", "random": True, "data_dir": flat.parent, "out": tmp_path / "out"}
    call("fewshot", split_file=tmp_path / "test.csv", **options | {"queries": 2})
    (kept,) = (tmp_path / "out").glob("*.safetensors")
    assert _features.load_features(kept).labels.tolist() == [n % 3 for n in range(11)]
    (tmp_path / "test.csv").write_text("\n".join(line.replace("z", "x") for line in lines))
    call("fewshot", split_file=tmp_path / "test.csv", **options)
    labels = [_features.load_features(kept).labels.tolist() for kept in (tmp_path / "out").glob("*.safetensors")]
    assert sorted(labels) == [[n % 3 % 2 for n in range(11)], [n % 3 for n in range(11)]]
    for text, message in (
        ("n0.png,x\nlost.png,y", "1 of 2 images of .*test.csv are not in .*flat: lost.png"),
        ("n0.png,x\nn0.png,y", "lists n0.png more than once"), ("n0.png", "line 1 of .* must be filename,label, got"),
        ("filename,label", "lists no images"),
    ):  # fmt: skip
        (tmp_path / "test.csv").write_text(text)
        with pytest.raises(CommandError, match=message):
            call("fewshot", split_file=tmp_path / "test.csv", **options)
    with pytest.raises(CommandError, match="--split-file lists images in --data-dir: leave out --features"):
        call("fewshot", **QUICK, features=kept, split_file=tmp_path / "test.csv")


def test_seed_decides_and_shots_are_independent(feature_file, tmp_path):
    arguments = QUICK | {"features": feature_file, "out": tmp_path / "out", "queries": 6, "ways": 3}
    first, both = call("fewshot", **arguments), call("fewshot", **arguments | {"shots": [2, 1]})
    assert first == both[3:]
    assert first != call("fewshot", **arguments | {"seed": 1})


def test_features_of_a_model_are_computed_once(images, tmp_path, monkeypatch):
    arguments = QUICK | {"model": "test_vit", "data_dir": images, "out": tmp_path / "out", "batch_size": 5}
    arguments |= {"random": True}
    calls = []
    extract = _features._extract
    monkeypatch.setattr(_features, "_extract", lambda *a: calls.append(a) or extract(*a))
    first = call("fewshot", **arguments)
    assert call("fewshot", **arguments) == first
    assert len(calls) == 1
    Image.new("RGB", (40, 41)).save(images / "red" / "new.png")
    call("fewshot", **arguments)
    assert len(calls) == 2
    files = sorted((tmp_path / "out").glob("*"))
    assert [f.suffix for f in sorted(files, key=lambda file: file.suffix)] == [
        ".csv",
        ".csv",
        ".json",
        ".safetensors",
        ".safetensors",
    ]  # nothing partial is left behind


def test_features_are_those_of_the_model(images, tmp_path):
    torch.manual_seed(1)
    net = timm.create_model("test_vit", num_classes=7).eval()
    save_file(net.state_dict(), tmp_path / "weights.safetensors")
    dataset = open_dataset(images, split="")
    source = named("test_vit", checkpoint=tmp_path / "weights.safetensors")
    got = _features.cached_features(tmp_path, dataset, source, LOADING)
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    with torch.no_grad(), Image.open(images / "green" / "2.png") as image:
        expected = net.forward_head(net.forward_features(transform(image)[None]), pre_logits=True)[0]
    torch.testing.assert_close(got.features[4 + 2], expected, atol=1e-5, rtol=1e-5)  # classes: blue, green, red
    assert got.labels.tolist() == [0] * 4 + [1] * 4 + [2] * 4
    assert got.metadata["model"] == "test_vit" and got.metadata["classes"] == '["blue", "green", "red"]'


def test_interrupted_extraction_leaves_no_file(images, tmp_path, monkeypatch):
    def interrupted(path, tensors, metadata):
        Path(path).write_bytes(b"half")
        raise KeyboardInterrupt

    monkeypatch.setattr(_features, "save_tensors", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _features.cached_features(tmp_path / "cache", open_dataset(images), named("test_vit", random=True), LOADING)
    assert not list((tmp_path / "cache").iterdir())


@pytest.mark.parametrize("name", ["test_vit", "test_vit3"])
def test_features_of_a_model_that_merges(images, tmp_path, name):
    weights = tmp_path / "weights.safetensors"
    torch.manual_seed(1)
    net = timm.create_model(name, num_classes=7).eval()
    save_file(net.state_dict(), weights)
    sources = (named(name, checkpoint=weights, r=r) for r in (0, 30))
    plain, merged = (_features.cached_features(tmp_path, open_dataset(images), source, LOADING) for source in sources)
    assert merged.metadata["merge_r"] == "30"
    net.reset_classifier(0)
    by_keys = timm_tokens.apply_dtem_merging(net, r=30, metric="keys").eval()
    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(net))
    with torch.no_grad(), Image.open(images / "green" / "2.png") as image:
        expected = by_keys(transform(image)[None])[0]
    torch.testing.assert_close(merged.features[4 + 2], expected, atol=1e-5, rtol=1e-5)
    assert not torch.allclose(merged.features, plain.features, atol=1e-4)


def test_features_of_registered_models_with_parts(images, tmp_path):
    torch.manual_seed(1)
    plain = timm.create_model("test_vit").eval()
    auxiliary = timm_tokens.add_aux_tokens(plain, num_cls=1, num_pooled=2)
    merging = timm_tokens.apply_dtem_merging(plain, r=10)
    for name, net in {"auxiliary": auxiliary, "merging": merging}.items():
        timm.models.save_for_hf(net, tmp_path / name, model_args=net.model_args)

    def features(name, r=0):
        source = named(f"local-dir:{tmp_path / name}", pretrained=True, r=r)
        return _features.cached_features(tmp_path, open_dataset(images), source, LOADING).features[4 + 2]

    transform = timm.data.create_transform(**timm.data.resolve_model_data_config(plain))
    with Image.open(images / "green" / "2.png") as image:
        x = transform(image)[None]
    torch.testing.assert_close(features("auxiliary"), class_feature(plain, x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(features("merging"), class_feature(merging, x), atol=1e-5, rtol=1e-5)
    merging.merger.r = 30
    torch.testing.assert_close(features("merging", r=30), class_feature(merging, x), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def class_feature(net, x):
    return net.eval().forward_head(net.forward_features(x), pre_logits=True)[0]


def test_a_model_that_can_not_merge_is_refused(images, tmp_path):
    with pytest.raises(CommandError, match="ResNet can't be driven from outside; supported are"):
        call("fewshot", **QUICK | {"model": "test_resnet", "random": True, "r": 8, "data_dir": images, "out": tmp_path})


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({}, "pass either --features FILE, or --model NAME with --data-dir FOLDER"),
        ({"model": "test_vit"}, "pass either --features"),
        ({"features": "nowhere.safetensors"}, "no feature file nowhere.safetensors"),
        ({"model": "test_vit", "random": True, "data_dir": "nowhere"}, "no folder nowhere"),
        ({"model": "test_vit", "random": True, "data_dir": "."}, r"^no images in \.$"),
        ({"model": "test_vit", "data_dir": "."}, "which weights.* --pretrained .* --checkpoint FILE.* --random"),
        ({"classifiers": ["svm"]}, "--classifiers must be one of nearest_centroid, .* got 'svm'"),
        ({"model": "test_vit", "data_dir": ".", "out": __file__}, "--out .*test_fewshot.py is a file: give a folder"),
        ({"model": "test_vit", "data_dir": ".", "device": "nowhere"}, "can't use --device nowhere: "),
    ],
)
def test_refuses_in_words(arguments, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CommandError, match=message):
        call("fewshot", **QUICK | arguments)


def test_refuses_models_and_checkpoints_that_do_not_fit(images, tmp_path):
    arguments = QUICK | {"data_dir": images, "out": tmp_path}
    with pytest.raises(CommandError, match=r"timm has no model 'no_such_vit'"):
        call("fewshot", **arguments, model="no_such_vit", random=True)
    with pytest.raises(CommandError, match=r"no checkpoint file nowhere.pth"):
        call("fewshot", **arguments, model="test_vit", checkpoint="nowhere.pth")
    save_file({"cls_token": torch.zeros(1, 1, 64)}, tmp_path / "part.safetensors")
    with pytest.raises(CommandError, match=r"part.safetensors: it doesn't fit the model, of whose .* lacks 77: "):
        call("fewshot", **arguments, model="test_vit", checkpoint=tmp_path / "part.safetensors")


def test_unreadable_images_are_named_and_left_out(images, tmp_path, capsys):
    (images / "red" / "1.png").write_text("no picture")
    (images / "blue" / "notes.txt").write_text("no picture")
    given = QUICK | {"data_dir": images, "out": tmp_path / "out", "model": "test_vit", "random": True, "shots": [1]}
    for _ in range(2):  # the second takes the features from the first's
        call("fewshot", **given | {"ways": 3, "queries": 2, "episodes": 2})
        said = capsys.readouterr()
        assert "left out 1 (can't be read): red/1.png (it is empty, or of no format that Pillow knows)" in said.err
        assert "left out 1 (no images by their suffix): blue/notes.txt" in said.err
        assert "Weights of test_vit: random" in said.out
    (kept,) = (tmp_path / "out").glob("*.safetensors")
    assert _features.load_features(kept).labels.bincount().tolist() == [4, 4, 3]
    for image in images.glob("*/*.png"):
        image.write_bytes(b"")
    with pytest.raises(CommandError, match=r"no images; .*left out 12 \(can't be read\): blue/0.png \(it is empty"):
        call("fewshot", **given)


def test_weights_that_are_not_finite_are_refused(images, tmp_path):
    state = timm.create_model("test_vit").state_dict()
    state["norm.weight"][0] = float("nan")
    save_file(state, tmp_path / "nan.safetensors")
    given = QUICK | {"data_dir": images, "out": tmp_path / "out", "model": "test_vit"}
    with pytest.raises(CommandError, match=r"^norm.weight of the model has 1 of 64 numbers that are not finite"):
        call("fewshot", **given, checkpoint=tmp_path / "nan.safetensors")
    state["norm.weight"][0] = 3e38  # finite, but its product is not
    state["patch_embed.proj.weight"].mul_(1e20)
    save_file(state, tmp_path / "large.safetensors")
    with pytest.raises(CommandError, match=r"features of \d+ images are not finite, the first of them blue/.*png"):
        call("fewshot", **given, checkpoint=tmp_path / "large.safetensors")
    assert not list((tmp_path / "out").glob("*.safetensors"))
    save_file(
        {"features": torch.full((40, 3), torch.inf), "labels": torch.arange(40) % 5}, tmp_path / "inf.safetensors"
    )
    with pytest.raises(CommandError, match=r"features must be finite, got inf at \[0, 0\]; 40 of 40 rows"):
        call("fewshot", **QUICK, features=tmp_path / "inf.safetensors", out=tmp_path / "out")


def test_refuses_feature_files_that_do_not_fit(feature_file, tmp_path):
    save_file({"features": torch.zeros(4, 2)}, tmp_path / "unlabelled.safetensors")
    with pytest.raises(
        CommandError, match=r"must hold features \(N, D\) and labels \(N,\); it holds {'features': \(4, 2\)}"
    ):
        call("fewshot", **QUICK, features=tmp_path / "unlabelled.safetensors")
    (tmp_path / "text.safetensors").write_text("no tensors at all")
    with pytest.raises(CommandError, match=r"text.safetensors is not a safetensors file"):
        call("fewshot", **QUICK, features=tmp_path / "text.safetensors")
    with pytest.raises(CommandError, match="0 of 5 classes have the 41 images"):
        call("fewshot", **QUICK | {"queries": 40}, features=feature_file, out=tmp_path)


def test_refuses_to_plot_without_matplotlib(feature_file, monkeypatch):
    monkeypatch.setattr(checks, "find_spec", lambda name: None)
    with pytest.raises(CommandError, match=r"pip install 'timm-tokens\[viz\]', or pass --no-plot"):
        call("fewshot", **QUICK | {"plot": True}, features=feature_file)
