"""Images that a CSV file lists with their labels, as the standard few-shot splits are published."""

import csv
from collections import Counter
from pathlib import Path

from timm.data import ImageDataset
from timm.data.readers.reader_image_folder import ReaderImageFolder

from timm_tokens.data.images import Images


def open_split_file(path: Path, root: Path) -> Images:
    """The images in a folder that a CSV file of lines "filename,label" lists, without a transform.

    The first line may be the header `filename,label`, as of mini-ImageNet's lists. An image is looked for in the
    folder, in the sub-folder of its label, and in the sub-folder `images`. Missing images are a FileNotFoundError, and
    malformed lines and images that are listed twice a ValueError.
    """
    return Images(ImageDataset(str(root), reader=SplitReader(path, root)))


class SplitReader(ReaderImageFolder):
    """timm's reader of images, of those that a CSV file lists, in its order; labels are numbered in theirs."""

    def __init__(self, path: Path, root: Path):
        rows = _read(path)
        self.root = str(root)
        self.class_to_idx = {label: i for i, label in enumerate(sorted({label for _, label in rows}))}
        places = [(_find(root, name, label), label) for name, label in rows]
        missing = [name for (name, _), (place, _) in zip(rows, places, strict=True) if place is None]
        if missing:
            raise FileNotFoundError(
                f"{len(missing)} of {len(rows)} images of {path} are not in {root}: {missing[0]} ..."
            )
        self.samples = [(str(place), self.class_to_idx[label]) for place, label in places]
        twice = [place for place, count in Counter(place for place, _ in self.samples).items() if count > 1]
        if twice:
            raise ValueError(f"{path} lists {Path(twice[0]).name} more than once")


def _read(path: Path) -> list[tuple[str, str]]:
    with path.open(newline="", encoding="utf-8-sig") as file:
        rows = [[cell.strip() for cell in row] for row in csv.reader(file) if row]
    for number, row in enumerate(rows, start=1):
        if len(row) != 2 or not all(row):
            raise ValueError(f"line {number} of {path} must be filename,label, got {','.join(row)!r}")
    rows = rows[1:] if rows[:1] == [["filename", "label"]] else rows
    if not rows:
        raise ValueError(f"{path} lists no images")
    return [(name, label) for name, label in rows]


def _find(root: Path, name: str, label: str) -> Path | None:
    places = (root / name, root / label / name, root / "images" / name)
    return next((place for place in places if place.is_file()), None)
