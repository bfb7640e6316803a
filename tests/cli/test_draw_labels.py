"""`timm-tokens draw labels`: what the picture shows, and what it refuses."""

import pytest
import torch
from PIL import Image

from timm_tokens.cli import call, main
from timm_tokens.cli.draw import labels as draw_labels
from timm_tokens.data import TokenLabelWriter, unpack_labels
from timm_tokens.ops import crop_token_labels

# PIL keeps a handle of a corrupt file open until it is collected
pytestmark = pytest.mark.filterwarnings("ignore::ResourceWarning")
QUADRANTS = torch.tensor([[0, 1], [2, 3]])


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """images/tench/1.png, whose quadrants are of classes 0 to 3, with its label in a store and in the .pt layout."""
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "images" / "tench" / "1.png"
    path.parent.mkdir(parents=True)
    Image.fromarray(torch.randint(0, 255, (60, 90, 3), dtype=torch.uint8).numpy()).save(path)
    classes = QUADRANTS.repeat_interleave(4, 0).repeat_interleave(4, 1)
    with TokenLabelWriter(tmp_path / "labels", num_classes=12) as writer:
        writer.add(
            "tench/1", torch.tensor([9.0, 1.0])[:, None, None].expand(2, 8, 8), torch.stack([classes, classes + 4])
        )
    unpack_labels(tmp_path / "labels", tmp_path / "files")
    return tmp_path


def draw(**options):
    return call(
        "draw labels", **{"image": "images/tench/1.png", "out": "labels.png", "labels": "labels", "size": 4} | options
    )


def test_the_label_map_and_the_targets_of_a_crop(folder):
    drawn = draw(crop=(0.0, 0.25, 0.5, 0.5))  # the border of classes 0 and 1 is in the middle
    assert torch.equal(drawn.whole.patches.argmax(0), QUADRANTS.repeat_interleave(4, 0).repeat_interleave(4, 1))
    assert torch.equal(drawn.crop.patches.argmax(0), torch.tensor([0, 0, 1, 1]).expand(4, 4))
    mirrored = draw(crop=(0.0, 0.25, 0.5, 0.5), flip=True)
    torch.testing.assert_close(mirrored.crop.patches, drawn.crop.patches.flip(2))
    assert Image.open("labels.png").size[0] > 3 * Image.open("labels.png").size[1]


def test_the_targets_are_those_of_training(folder):
    drawn, box = draw(crop=(0.1, 0.2, 0.7, 0.35)), torch.tensor([[0.1, 0.2, 0.7, 0.35]])
    label = draw_labels.TokenLabelStore("labels")["tench/1"]
    expected = crop_token_labels(label.values[None], label.indices[None], box, 12, 4, dense=True)[0]
    torch.testing.assert_close(torch.cat([drawn.crop.cls[:, None], drawn.crop.patches.flatten(1)], 1), expected)


def test_a_drawn_crop_is_decided_by_the_seed(folder):
    options = dict(aa="rand-m9-mstd0.5-inc1")
    maps = [draw(seed=seed, **options).map for seed in (1, 1, 2)]
    assert torch.equal(maps[0], maps[1]) and not torch.equal(maps[0], maps[2])


def test_published_files_and_class_names(folder):
    (folder / "names.txt").write_text("\n".join(f"kind {k}" for k in range(12)))
    store = draw(class_map="names.txt", crop=(0, 0, 1, 1))
    files = draw(labels="files", num_classes=12, name="tench/1", flip=True)
    torch.testing.assert_close(files.crop.patches, store.crop.patches.flip(2))
    assert draw_labels._names("names.txt", 13)[11:] == ["kind 11", "class 12"]
    assert draw_labels._names(None, 1000)[217] == "English springer"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ("--labels nowhere", "no label store in nowhere"),
        ("--labels images", "holds neither index.json nor .pt files"),
        ("--id trout/1", "no label for image 'trout/1'"),
        ("--crop 0.5 0.5 0.6 0.5", "inside the image, from 0 to 1, got (0.5, 0.5, 0.6, 0.5)"),
        ("--crop 0 0 1 0", "inside the image"),
        ("--size 0", "--size must be at least 1, got 0"),
        ("--flip --auto-augment rand-m9", "leave --crop and --flip out"),
        ("--auto-augment augmix-m5", "augmix"),
        ("--class-map names.csv", "names.csv can't be read as class names"),
        ("--labels files --num-classes 5", "the label has class 7, and --num-classes is 5"),
    ],
)
def test_refuses_and_leaves_nothing(change, words, folder, capsys):
    files = set(folder.rglob("*"))
    argv = ["draw", "labels", "images/tench/1.png", "labels.png", "--labels", "labels", *change.split()]
    assert main(argv) == 2
    assert words in capsys.readouterr().err
    assert set(folder.rglob("*")) == files


def test_an_image_without_a_label_is_told_what_ids_look_like(folder, capsys):
    (folder / "photo.png").write_bytes((folder / "images" / "tench" / "1.png").read_bytes())
    assert main(["draw", "labels", "photo.png", "labels.png", "--labels", "labels"]) == 2
    assert "no label for photo.png in labels, whose ids are like 'tench/1': give --id" in capsys.readouterr().err
