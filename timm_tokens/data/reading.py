"""Images of a data set by number and by name, read one at a time; an unreadable one is an error that names it."""

from collections.abc import Sequence
from functools import partial
from typing import Any, cast

from PIL import Image
from timm.data import ImageDataset
from torch import Generator
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from timm_tokens.data.decoding import decode_image, reason, to_rgb
from timm_tokens.data.label_format import image_id


class ImageError(OSError):
    """An image that can't be read; the message names it."""

    def __init__(self, message: str):
        # A DataLoader makes a worker's error anew, of the traceback's text: the message is its end.
        super().__init__(message.rsplit("ImageError: ", 1)[-1].strip())


def check_indexed(dataset: Dataset) -> None:
    """Refuse what gives images in its own order, with a TypeError."""
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset must be indexed, such as a timm.data.ImageDataset, got {type(dataset).__name__}: "
            "images are found by their numbers, and streams of images have none"
        )


def image_name(dataset: Dataset, index: int) -> str:
    """The id of an image: from its file (see `image_id`), or its number where a data set knows no files."""
    return image_id(file_name(dataset, index))


def image_names(dataset: Any) -> list[str]:
    """The ids of all images.

    Raises:
        ValueError: Two images have the same id.
    """
    names = [image_name(dataset, index) for index in range(len(dataset))]
    first: dict[str, int] = {}
    for index, name in enumerate(names):
        if name in first:
            files = " and ".join(file_name(dataset, i) for i in (first[name], index))
            raise ValueError(f"{files} are both named {name!r}, so their labels would be mixed up: rename one")
        first[name] = index
    return names


def file_name(dataset: Dataset, index: int) -> str:
    """An image's file, relative to the data set's folder; its number where a data set knows no files."""
    source, row = _inner(dataset, index)
    return (isinstance(source, ImageDataset) and source.filename(row)) or f"{row:08d}"


def read_image(dataset: Dataset, index: int, *, draft: int | None = None) -> tuple[Image.Image, int]:
    """An image in RGB and its class, -1 without one; the data set's transform is not used.

    Args:
        draft: Side, in pixels, that is enough; see `decode_image`.

    Raises:
        ImageError: The image can't be read; names it.
    """
    try:
        return _read(dataset, index, draft)
    except OSError as error:
        raise ImageError(f"image {file_name(dataset, index)!r} can't be read: {error}") from error


def unreadable(images: Any, workers: int = 0, rows: Sequence[int] | None = None, **bar: Any) -> dict[int, str]:
    """The images that can't be read, by number, with the reason. Reads each once, JPEGs at an eighth of their size.

    Args:
        images: `Images`, or another indexed data set.
        workers: Processes that read.
        rows: Numbers of the images to read; None: all.
        bar: For the progress bar, tqdm.
    """
    rows = range(len(images)) if rows is None else rows
    # A generator of its own: torch would draw from the global one, and change what a run draws after it.
    attempts = DataLoader(
        cast(Any, rows), 16, num_workers=workers, collate_fn=partial(_attempt, images), generator=Generator()
    )
    found: dict[int, str] = {}
    with tqdm(total=len(rows), desc="checking images", unit="image", leave=False, **bar) as shown:
        for count, reasons in attempts:
            found |= reasons
            shown.update(count)
    return found


def _attempt(images: Dataset, rows: list[int]) -> tuple[int, dict[int, str]]:
    """How many images were read, and why some of them can't be."""
    found = {}
    for row in rows:
        try:
            _read(images, row, draft=1)
        except OSError as error:
            found[row] = str(error)
    return len(rows), found


def _inner(dataset: Any, index: int) -> tuple[Any, int]:
    """The data set that has the files, and the image's number in it."""
    rows = getattr(dataset, "rows", None)
    return (dataset, index) if rows is None else (dataset.dataset, rows[index])


def _read(dataset: Dataset, index: int, draft: int | None = None) -> tuple[Image.Image, int]:
    """As `read_image`; the error is the reason alone."""
    source, row = _inner(dataset, index)
    # Not source[row]: for an image that can't be read timm's returns the next one, which has another label map.
    try:
        if not isinstance(source, ImageDataset):
            image, label = source[row][:2]
            return to_rgb(image), label
        file, label, *_ = source.reader[row]
        with file:
            image = decode_image(file, draft=draft)
    except Exception as error:  # what torchvision's data sets read, Pillow's parsers may raise anything on
        raise OSError(reason(error)) from error
    if label is None:
        return image, -1
    return image, source.target_transform(label) if source.target_transform else label
