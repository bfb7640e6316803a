"""Which files of a folder are taken, in which classes, and what is said about the others."""

import os
import tarfile

import pytest
from PIL import Image

from timm_tokens.data.folders import FolderReader, left_out_lines, open_folder


@pytest.fixture
def folder(tmp_path):
    """Two classes of two and three images."""
    for name in ("a/2.png", "a/10.JPG", "b/1.webp", "b/ünï 图.tiff", "b/x.BMP"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        Image.new("RGB", (8, 8), "red").save(tmp_path / name)
    return tmp_path


def names(reader):
    return [os.path.relpath(path, reader.root) for path, _ in reader.samples]


def test_images_of_all_formats_in_natural_order(folder):
    reader = FolderReader(folder)
    assert names(reader) == ["a/2.png", "a/10.JPG", "b/1.webp", "b/x.BMP", "b/ünï 图.tiff"]
    assert reader.class_to_idx == {"a": 0, "b": 1} and [label for _, label in reader.samples] == [0, 0, 1, 1, 1]
    assert reader.left_out == {} and reader.joined == {}


def test_what_is_left_out_is_named(folder):
    for name in ("notes.txt", "a/Thumbs.db", "b/pic.jpg.bak", ".DS_Store", "a/._2.png", ".cache/1.png", "loose.png"):
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(b"x")
    (folder / "c").mkdir()
    (folder / "a" / "gone.png").symlink_to("nowhere.png")
    (folder / "a" / "itself.png").symlink_to("itself.png")
    os.mkfifo(folder / "a" / "pipe.png")
    (folder / os.fsdecode(b"a/\xff.png")).write_bytes(b"x")
    reader = FolderReader(folder)
    assert reader.left_out == {
        "no images by their suffix": ["a/Thumbs.db", "b/pic.jpg.bak", "notes.txt"],
        "hidden": [".cache", ".DS_Store", "a/._2.png"],
        "empty folders": ["c"],
        "no files, or links to none": ["a/gone.png", "a/itself.png", "a/pipe.png"],
        "names that are not UTF-8": ["a/\udcff.png"],
        "in no class folder": ["loose.png"],
    }
    assert len(reader) == 5 and reader.class_to_idx == {"a": 0, "b": 1}
    lines = left_out_lines(reader.left_out)
    assert "left out 3 (no images by their suffix): a/Thumbs.db, b/pic.jpg.bak, notes.txt" in lines
    assert r"left out 1 (names that are not UTF-8): a/\udcff.png" in lines
    assert left_out_lines({"hidden": [str(i) for i in range(23)]})[0].endswith("18, 19, and 3 more")


def test_links_are_followed_but_not_in_circles(folder):
    (folder / "c").symlink_to(folder / "a")
    (folder / "a" / "up").symlink_to("..")
    (folder / "b" / "other").symlink_to(folder / "a")
    (folder / "a" / "other").symlink_to(folder / "b")
    found = names(FolderReader(folder))
    assert {"c/2.png", "b/other/2.png", "a/other/1.webp"} <= set(found)
    assert not [name for name in found if name.count("/") > 3]


def test_class_maps_and_classes_of_several_folders(folder):
    reader = FolderReader(folder, {"b": 7})
    assert {label for _, label in reader.samples} == {7}
    assert reader.left_out == {"of none of the classes": ["a/2.png", "a/10.JPG"]}
    (folder / "names.txt").write_text("z\nb\n")
    assert set(open_folder(folder, str(folder / "names.txt")).targets) == {1}
    for part in ("first", "second"):
        (folder / "c" / part / "x²1²").mkdir(parents=True)  # digits to Python, but no numbers
        Image.new("L", (8, 8)).save(folder / "c" / part / "x²1²" / "1.png")
    reader = FolderReader(folder)
    assert reader.class_to_idx == {"a": 0, "b": 1, "x²1²": 2}
    assert reader.joined == {"x²1²": ["c/first/x²1²", "c/second/x²1²"]}


def test_images_without_class_folders(folder):
    reader = FolderReader(folder / "a")
    assert reader.class_to_idx == {"": 0} and names(reader) == ["2.png", "10.JPG"]


def test_no_images(folder, tmp_path):
    (folder / "empty").mkdir()
    (folder / "empty" / "notes.txt").write_text("x")
    with pytest.raises(FileNotFoundError, match=r"no images in .*empty; left out 1 \(no images by .*\): notes.txt"):
        open_folder(folder / "empty")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        open_folder(folder / "nowhere")
    (folder / "broken.tar").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"broken.tar can't be read as a tar of images"):
        open_folder(folder / "broken.tar")


@pytest.mark.filterwarnings("ignore:unclosed file:ResourceWarning")  # timm keeps tars open
def test_a_tar_is_as_its_folder(folder, tmp_path):
    (folder / "a" / "notes.txt").write_text("x")
    with tarfile.open(tmp_path / "images.tar", "w") as tar:
        for name in ("a", "b"):
            tar.add(folder / name, name)
    images, expected = open_folder(tmp_path / "images.tar"), open_folder(folder)
    assert images.classes == expected.classes == ["a", "b"] and images.targets == expected.targets
    assert images.left_out == {"no images by their suffix": ["a/notes.txt"]}
    assert [images[i][0].size for i in range(5)] == [(8, 8)] * 5
