"""The annotate command: its maps, its summary, kills, damaged images, several processes, and what it refuses."""

import json
import os
import re
import signal
import socket

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file

from timm_tokens.cli import CommandError, call
from timm_tokens.cli.annotate.annotator import Annotator
from timm_tokens.cli.common import loading
from timm_tokens.cli.common.datasets import class_names, class_numbers, open_dataset
from timm_tokens.data import TokenLabelStore, TokenLabelWriter
from timm_tokens.dense import dense_scores
from timm_tokens.ops import crop_token_labels
from timm_tokens.stopping import Stopped

# timm's data sets and Pillow leave the closing of files to the garbage collector.
pytestmark = [
    pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning"),
    pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning"),
]
needs_fork = pytest.mark.skipif(not hasattr(os, "fork"), reason="forks processes")


@pytest.fixture
def images(tmp_path):
    """Three classes of five images, none of them square."""
    for c, name in enumerate(["ant", "bee", "cat"]):
        (tmp_path / "images" / name).mkdir(parents=True)
        for i in range(5):
            pixels = torch.randint(255, (40 + i, 60, 3), dtype=torch.uint8)
            pixels[..., c] = 255
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / f"{i}.png")
    return tmp_path / "images"


@pytest.fixture
def weights(tmp_path):
    torch.save(timm.create_model("test_resnet", num_classes=3).state_dict(), tmp_path / "weights.pth")
    return tmp_path / "weights.pth"


@pytest.fixture
def arguments(images, weights, tmp_path):
    given = {"dataset": images, "out": tmp_path / "labels", "model": "test_resnet", "checkpoint": weights}
    return given | {"num_classes": 3, "img_size": [64, 96], "top_k": 2, "batch_size": 4, "workers": 0}


def expected_scores(weights, file):
    """The scores (H, W, K) of an image, squashed to 64 x 96 by hand."""
    model = timm.create_model("test_resnet", num_classes=3).eval()
    model.load_state_dict(torch.load(weights))
    config = timm.data.resolve_model_data_config(model)
    mean, std = (torch.tensor(config[name]).view(3, 1, 1) for name in ("mean", "std"))
    with Image.open(file) as image:
        pixels = image.convert("RGB").resize((96, 64), Image.Resampling[config["interpolation"].upper()])
    x = torch.frombuffer(bytearray(pixels.tobytes()), dtype=torch.uint8).view(64, 96, 3).permute(2, 0, 1) / 255
    with torch.no_grad():
        return dense_scores(model, ((x - mean) / std)[None])[0]


def test_maps_are_the_best_classes_of_every_cell_of_the_whole_image(arguments, images, weights, capsys):
    summary = call("annotate", **arguments)
    store = TokenLabelStore(arguments["out"])
    assert len(store) == 15 and store.num_classes == 3
    right, sure, others = 0, 0.0, 0.0
    for file in sorted(images.rglob("*.png")):
        scores = expected_scores(weights, file)
        values, indices = store[f"{file.parent.name}/{file.stem}"]
        best = scores.topk(2, dim=-1)
        torch.testing.assert_close(values.permute(1, 2, 0).float(), best.values, atol=2e-3, rtol=2e-3)
        close = (best.values[..., 0] - best.values[..., 1]).abs() < 5e-3
        assert ((indices.permute(1, 2, 0) == best.indices).all(-1) | close).float().mean() > 0.9
        votes = torch.zeros(3).scatter_add(0, indices.flatten().long(), values.float().softmax(0).flatten())
        right += ["ant", "bee", "cat"][int(votes.argmax())] == file.parent.name
        kept = torch.zeros(3, 2, 3).scatter(0, indices.long(), values.float())  # every cell counts the same in a whole
        sure += kept.mean((1, 2)).softmax(0)[["ant", "bee", "cat"].index(file.parent.name)].item()
        others += 1 - kept.softmax(0).gather(0, indices.long()).sum(0).mean().item()
    shares = [pytest.approx(x / 15, rel=1e-5) for x in (right, sure, others)]
    assert summary == (15, 15, 15, *shares)
    printed = capsys.readouterr().out
    assert "15 of 15 images have a map of 2 x 3 cells, 15 of them new; the map's top class is the folder's" in printed


def biased(weights, shift, factor, file):
    """The annotator with other biases, and with scores that are so many times as far apart."""
    state = torch.load(weights)
    state["fc.weight"] *= factor
    state["fc.bias"] += shift
    torch.save(state, file)
    return file


def test_a_bias_far_below_zero_does_not_spoil_the_maps(arguments, images, weights, tmp_path, capsys):
    """Models trained by binary cross entropy have one: classes that are not kept, and score 0, would get nearly all."""
    arguments |= {"top_k": 1, "checkpoint": biased(weights, -10, 40, tmp_path / "low.pth")}
    assert call("annotate", **arguments).others < 0.5
    store, whole = TokenLabelStore(arguments["out"]), torch.tensor([[0.0, 0, 1, 1]])
    for file in sorted(images.rglob("*.png")):
        values, indices = store[f"{file.parent.name}/{file.stem}"]
        target = crop_token_labels(values[None], indices[None], whole, 3, (2, 3), dense=True)[0, :, 1:]
        own = expected_scores(arguments["checkpoint"], file).softmax(-1).flatten(0, 1).mT
        torch.testing.assert_close(target.amax(0), own.amax(0), atol=0.02, rtol=0)
    assert "warning" not in capsys.readouterr().out


def test_warns_of_maps_that_say_little(arguments, weights, tmp_path, capsys):
    unsure = arguments | {"top_k": 1, "checkpoint": biased(weights, -10, 0.1, tmp_path / "unsure.pth")}
    summary = call("annotate", **unsure)
    assert summary.others == pytest.approx(2 / 3, abs=0.05)
    printed = capsys.readouterr().out
    assert f"warning: on average {summary.others:.0%} of a cell's probability is left to the classes that" in printed


def test_weights_are_known_by_their_values(arguments, weights, tmp_path):
    call("annotate", **arguments)
    weights.rename(tmp_path / "moved.pth")
    assert call("annotate", **arguments | {"checkpoint": tmp_path / "moved.pth"}).annotated == 0
    biased(tmp_path / "moved.pth", 1, 1, weights)
    with pytest.raises(CommandError, match=r"holds maps with weights 'sha256:.*write to another folder"):
        call("annotate", **arguments)


def test_only_the_classes_of_the_folders(arguments, images, tmp_path):
    synsets, numbers = ["n01440764", "n02102040", "n03888257"], torch.tensor([0, 217, 701])
    for name, synset in zip(["ant", "bee", "cat"], synsets, strict=True):
        (images / name).rename(images / synset)
    torch.save(timm.create_model("test_resnet").state_dict(), tmp_path / "weights.pth")
    arguments |= {"num_classes": None, "folder_classes": True}
    summary = call("annotate", **arguments)
    every = call("annotate", **arguments | {"out": tmp_path / "every", "folder_classes": False, "top_k": 1000})
    assert summary[:3] == every[:3] == (15, 15, 15)
    store, whole, right = TokenLabelStore(arguments["out"]), TokenLabelStore(tmp_path / "every"), 0
    assert store.num_classes == 3
    for name in store:
        scores = torch.empty(1000, 2, 3).scatter_(0, whole[name].indices.long(), whole[name].values.float())[numbers]
        best = scores.topk(2, dim=0)
        torch.testing.assert_close(store[name].values.float(), best.values)
        torch.testing.assert_close(scores.gather(0, store[name].indices.long()), best.values)
        votes = torch.zeros(3).scatter_add(0, best.indices.flatten(), best.values.softmax(0).flatten())
        right += synsets[int(votes.argmax())] == name.split("/")[0]
    assert summary.agreement == pytest.approx(right / 15)
    with pytest.raises(CommandError, match="holds maps with classes 3, this run would make them with 1000"):
        call("annotate", **arguments | {"folder_classes": False})
    with pytest.raises(CommandError, match=r"--top-k must lie in \[1, 3\], the classes, got 5"):
        call("annotate", **arguments | {"out": tmp_path / "new", "top_k": 5})
    (images / "n03888257").rename(images / "cat")
    with pytest.raises(CommandError, match=r"--folder-classes needs folders with WordNet names.*'cat'"):
        call("annotate", **arguments | {"out": tmp_path / "new"})


def test_a_second_run_has_nothing_to_do(arguments, monkeypatch):
    first = call("annotate", **arguments)
    monkeypatch.setattr(loading, "read_image", None)  # not called
    assert call("annotate", **arguments) == first._replace(annotated=0)


def test_new_images_are_added(arguments, images):
    call("annotate", **arguments)
    Image.new("RGB", (50, 50)).save(images / "bee" / "new.jpg")
    assert call("annotate", **arguments)[:3] == (16, 1, 16)


def in_processes(count, work):
    """Run work(rank) in forked processes, as torchrun would start them; their exit codes."""
    with socket.socket() as free:
        free.bind(("localhost", 0))
        port = free.getsockname()[1]
    children = []
    for rank in range(count):
        children.append(os.fork())
        if children[-1] == 0:
            code = 1
            try:
                names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": count, "MASTER_PORT": port}
                os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="localhost")
                work(rank)
                code = 0
            finally:
                os._exit(code)
    return [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children]


def annotate_until_killed(arguments, count):
    """A run that is killed before it adds one more map than count."""
    add = TokenLabelWriter.add

    def add_or_die(writer, *label):
        if len(writer) == count:
            os.kill(os.getpid(), signal.SIGKILL)
        add(writer, *label)

    TokenLabelWriter.add = add_or_die
    call("annotate", **arguments)


@needs_fork
def test_a_killed_run_resumes_and_loses_nothing(arguments, tmp_path):
    arguments |= {"shard_size": 3, "device": "cpu"}
    assert in_processes(1, lambda rank: annotate_until_killed(arguments, 7)) == [-signal.SIGKILL]
    assert list(arguments["out"].glob("*.journal"))
    summary = call("annotate", **arguments)
    assert summary[:3] == (15, 8, 15)
    assert call("annotate", **arguments | {"out": tmp_path / "at once"}).agreement == summary.agreement
    assert contents(arguments["out"]) == contents(tmp_path / "at once")


def contents(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir() if not path.name.startswith(".")}


@pytest.mark.parametrize("workers", [0, 1])
def test_stopped_by_a_signal_and_resumed(arguments, tmp_path, monkeypatch, capsys, workers):
    annotate, calls = Annotator.__call__, []

    def signalled(self, images):
        calls.append(len(images))
        if len(calls) == 2:
            signal.raise_signal(signal.SIGTERM)
        return annotate(self, images)

    arguments |= {"device": "cpu", "workers": workers}
    with monkeypatch.context() as patch, pytest.raises(Stopped) as stopped:
        patch.setattr(Annotator, "__call__", signalled)
        call("annotate", **arguments)
    assert stopped.value.code == 143 and len(TokenLabelStore(arguments["out"])) == 8
    message = f"stopped by SIGTERM: {arguments['out']} has all maps so far; to go on, run the same again"
    assert capsys.readouterr().err.splitlines()[-1] == message
    assert call("annotate", **arguments)[:3] == (15, 7, 15)
    call("annotate", **arguments | {"out": tmp_path / "at once"})
    resumed, whole = TokenLabelStore(arguments["out"]), TokenLabelStore(tmp_path / "at once")
    assert all(torch.equal(resumed[name].values, whole[name].values) for name in whole)


@needs_fork
def test_processes_take_disjoint_shares_of_one_store(arguments, images, tmp_path):
    arguments |= {"device": "cpu"}
    (images / "cat" / "4.png").write_text("no picture")
    assert in_processes(1, lambda rank: annotate_until_killed(arguments, 2)) == [-signal.SIGKILL]

    def work(rank):
        assert call("annotate", **arguments)[:3] == (15, 12, 14)
        (tmp_path / f"{rank} is done").touch()

    assert in_processes(2, work) == [0, 0]
    assert (tmp_path / "0 is done").exists() and (tmp_path / "1 is done").exists()
    store = TokenLabelStore(arguments["out"])
    assert len(store) == 14 and not list(arguments["out"].glob("*.journal"))
    index = json.loads((arguments["out"] / "index.json").read_text())
    rows = {shard["file"]: len(load_file(arguments["out"] / shard["file"])["keys"]) for shard in index["shards"]}
    assert sum(rows.values()) == 14  # no image twice
    assert rows["labels-00000-00000.safetensors"] == 2  # what the killed run had
    assert sum(count for file, count in rows.items() if file.startswith("labels-00001")) >= 6
    (images / "cat" / "4.png").unlink()
    assert call("annotate", **arguments)[:3] == (14, 0, 14)


def test_unreadable_images_are_named_and_left_out(arguments, images, capsys):
    broken = images / "bee" / "2.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    (images / "cat" / "4.png").write_text("no picture")
    (images / "cat" / "notes.txt").write_text("no picture")
    for workers, new in ((2, 13), (0, 0)):
        assert call("annotate", **arguments | {"workers": workers})[:3] == (15, new, 13)
        said = capsys.readouterr()
        assert "13 of 15 images have a map" in said.out and f"Weights: {arguments['checkpoint']}. " in said.out
        named = r"left out 2 \(can't be read\): bee/2.png \(image file is truncated\), cat/4.png \(it is empty, or"
        assert re.search(named, said.err) and "left out 1 (no images by their suffix): cat/notes.txt" in said.err
    assert len(TokenLabelStore(arguments["out"])) == 13
    broken.write_bytes(whole)
    (images / "cat" / "4.png").unlink()
    assert call("annotate", **arguments)[:3] == (14, 1, 14)


def test_two_runs_in_one_folder_are_refused(arguments):
    with (
        TokenLabelWriter(arguments["out"], 3),
        pytest.raises(CommandError, match="another writer is at work on part 0 of"),
    ):
        call("annotate", **arguments)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"model": "pit_ti_224", "img_size": None, "checkpoint": None, "random": True},
            "^PoolingVisionTransformer reads a class token",
        ),
        ({"model": "test_resnett"}, "timm has no model 'test_resnett'; close are"),
        ({"checkpoint": "missing.pth"}, "no checkpoint file missing.pth"),
        ({"num_classes": 4}, "weights.pth: it doesn't fit the model: size mismatch for fc.weight"),
        ({"dataset": "images/nowhere"}, "no folder images/nowhere: give a folder"),
        ({"dataset": "torch/cifar10"}, "no images of torch/cifar10, split 'train': "),
        ({"dataset": "nowhere"}, "no folder nowhere: give a folder with one folder of images per class"),
        (
            {"dataset": "torch/nothing", "data_dir": "."},
            r"no images of torch/nothing in \., split 'train': Unknown",
        ),
        ({"top_k": 4}, r"--top-k must lie in \[1, 3\], the classes, got 4"),
        ({"top_k": 0}, r"--top-k must lie in"),
    ],
)
def test_refuses_in_words_and_writes_nothing(change, message, arguments, monkeypatch):
    create = timm.create_model
    monkeypatch.setattr(timm, "create_model", lambda *a, **k: create(*a, **k | {"pretrained": False}))
    with pytest.raises(CommandError, match=message):
        call("annotate", **arguments | change)
    assert not arguments["out"].exists()


def test_maps_of_two_annotators_are_not_mixed(arguments, images):
    call("annotate", **arguments)
    with pytest.raises(CommandError, match=r"holds maps with top 2, this run would make them with 1: write to another"):
        call("annotate", **arguments | {"top_k": 1})
    Image.new("RGB", (50, 50)).save(images / "bee" / "0.jpg")
    with pytest.raises(CommandError, match=r"bee/0.(jpg|png) and bee/0.(jpg|png) are both named 'bee/0'"):
        call("annotate", **arguments)


def test_labels_that_were_packed_are_not_mixed_with_new_ones(arguments):
    with TokenLabelWriter(arguments["out"], 3) as writer:
        writer.add("ant/0", torch.ones(2, 2, 3), torch.zeros(2, 2, 3).int())
    with pytest.raises(CommandError, match="holds maps that were not made by this command: write to another folder"):
        call("annotate", **arguments)


def test_autocast_gives_nearly_the_same(arguments, tmp_path):
    call("annotate", **arguments)
    call("annotate", **arguments | {"out": tmp_path / "half", "dtype": "bfloat16"})
    for name, label in TokenLabelStore(arguments["out"]).items():
        half = TokenLabelStore(tmp_path / "half")[name].values
        assert not torch.equal(half, label.values)
        torch.testing.assert_close(half, label.values, atol=0.1, rtol=0.1)


def test_a_vit_takes_other_sizes(arguments, tmp_path):
    torch.save(timm.create_model("test_vit", num_classes=3).state_dict(), tmp_path / "vit.pth")
    call("annotate", **arguments | {"model": "test_vit", "checkpoint": tmp_path / "vit.pth"})
    assert TokenLabelStore(arguments["out"])["ant/0"].values.shape == (2, 4, 6)


def test_torchvisions_data_sets_are_named_by_number(arguments, images):
    summary = call("annotate", **arguments | {"dataset": "torch/image_folder", "data_dir": images})
    assert summary[:3] == (15, 15, 15) and summary.agreement is not None
    assert "00000014" in TokenLabelStore(arguments["out"])


def test_streams_have_no_names_for_their_maps(arguments, images, monkeypatch):
    stream = timm.data.IterableImageDataset(str(images), reader=[])
    monkeypatch.setattr("timm_tokens.cli.annotate.command.open_dataset", lambda *_: stream)
    with pytest.raises(CommandError, match="streams of images have none"):
        call("annotate", **arguments)
    assert not arguments["out"].exists()


def test_folders_named_as_imagenets_classes_are_those(tmp_path):
    for name in ("n02102040", "n01440764"):
        (tmp_path / "train" / name).mkdir(parents=True)
        Image.new("RGB", (8, 8)).save(tmp_path / "train" / name / "a.png")
    dataset = open_dataset(tmp_path)
    assert class_names(dataset) == ["n01440764", "n02102040"] and dataset.targets == [0, 1]
    assert class_numbers(class_names(dataset), 1000) == {"n01440764": 0, "n02102040": 217}
    assert class_numbers(["cat", "dog"], 1000) is None and class_numbers(None, 1000) is None
    assert class_numbers(["cat", "dog"], 2) == {"cat": 0, "dog": 1}
