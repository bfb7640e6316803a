"""Images of data sets: read by one rule, on workers too; what can't be read is named."""

import numpy as np
import pytest
import torch
from PIL import Image
from timm.data import ImageDataset
from torch.utils.data import DataLoader, Dataset, IterableDataset

from timm_tokens.data.folders import open_folder
from timm_tokens.data.images import ImageError, Images, image_name, image_names, read_image, unreadable

# timm's data sets leave the closing of files to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:.*multi-threaded, use of fork:DeprecationWarning")


@pytest.fixture
def folder(tmp_path):
    """Ten images in two classes; three can't be read."""
    for i in range(10):
        path = tmp_path / "ab"[i // 5] / f"{i}.png"
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 48), (i, i, i)).save(path)
    (tmp_path / "a" / "1.png").write_bytes(b"")
    whole = (tmp_path / "b" / "6.png").read_bytes()
    (tmp_path / "b" / "6.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "b" / "9.png").write_text("no picture")
    return tmp_path


def first_value(image):
    return image.getpixel((0, 0))[0]


def test_unreadable_images_are_found_and_left_out(folder):
    images = open_folder(folder)
    empty = "it is empty, or of no format that Pillow knows"
    for workers in (0, 2):
        state = torch.get_rng_state()
        assert unreadable(images, workers, disable=True) == {1: empty, 6: "image file is truncated", 9: empty}
        assert torch.equal(torch.get_rng_state(), state)  # what is drawn later is the same with and without the check
    assert unreadable(images, rows=range(2, 8), disable=True).keys() == {6}
    kept = images.without(unreadable(images, disable=True))
    kept.transform = first_value
    names = "a/1.png (it is empty, or of no format that Pillow knows), b/6.png (image file is truncated)"
    assert kept.notes()[0].startswith(f"left out 3 (can't be read): {names}, b/9.png (") and images.notes() == []
    assert [kept[i] for i in range(7)] == [(0, 0), (2, 0), (3, 0), (4, 0), (5, 1), (7, 1), (8, 1)]
    assert kept.targets == [0, 0, 0, 0, 1, 1, 1] and kept.classes == ["a", "b"]
    assert image_names(kept) == ["a/0", "a/2", "a/3", "a/4", "b/5", "b/7", "b/8"]
    assert image_name(kept.select([5]), 0) == "b/7" and read_image(kept, 5)[0].getpixel((0, 0)) == (7, 7, 7)


def test_an_unreadable_image_is_named_and_not_replaced(folder):
    images = open_folder(folder)
    for dataset in (images, images.select([9, 6]), ImageDataset(str(folder))):
        with pytest.raises(OSError, match=r"image 'b/6\.png' can't be read: image file is truncated"):
            read_image(dataset, 1 if len(dataset) == 2 else 6)
    (folder / "a" / "0.png").unlink()
    with pytest.raises(OSError, match=r"image 'a/0\.png' can't be read: No such file or directory"):
        images[0]


def test_no_image_can_be_read(folder):
    images = open_folder(folder).select([1, 9])
    with pytest.raises(ValueError, match=r"no images; left out 2 \(can't be read\): a/1\.png \(it is empty"):
        images.without(unreadable(images, disable=True))


def test_workers_say_it_as_well(folder):
    with pytest.raises(ImageError) as caught:
        list(DataLoader(open_folder(folder).select([2, 6]), 2, num_workers=1, collate_fn=list))
    assert str(caught.value) == "image 'b/6.png' can't be read: image file is truncated"


def test_data_sets_without_files(folder):
    class Pictures(Dataset):
        targets = (3, 4)

        def __len__(self):
            return 2

        def __getitem__(self, index):
            if index:
                raise RuntimeError("gone")
            return Image.fromarray(np.full((4, 4), 65535, np.uint16)), 3

    images = Images(Pictures(), first_value)
    assert images[0] == (255, 3) and images.targets == [3, 4] and images.classes is None
    assert unreadable(images, disable=True) == {1: "gone"} and image_names(images) == ["00000000", "00000001"]
    with pytest.raises(TypeError, match="dataset must be indexed"):
        Images(type("Stream", (IterableDataset,), {"__iter__": None})())


def test_names_that_would_be_mixed_up(folder):
    Image.new("L", (8, 8)).save(folder / "a" / "0.jpg")
    with pytest.raises(ValueError, match=r"a/0\.jpg and a/0\.png are both named 'a/0'"):
        image_names(open_folder(folder))
    (folder / "a" / "0.jpg").rename(folder / "a" / "0.webp")  # other suffixes are part of the name
    assert image_names(open_folder(folder))[:2] == ["a/0", "a/0.webp"]
