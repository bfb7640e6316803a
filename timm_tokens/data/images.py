"""The data set of images that commands and tasks use; an image that can't be read is an error that names it."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, cast

from PIL import Image
from timm.data import ImageDataset
from torch import Generator
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from timm_tokens.data.decoding import decode_image, reason, to_rgb
from timm_tokens.data.label_format import image_id

_MOST_NAMED = 20


class Images(Dataset):
    """Images of an indexed data set with their classes, (transformed image, class), all read by `read_image`.

    Unlike timm's `ImageDataset`, which gives the next image in the place of one that it can't read, this raises an
    error. `unreadable` finds such images, and `without` leaves them out.

    Args:
        dataset: Such as timm's `ImageDataset`, or torchvision's data sets; its own transform is not used.
        transform: Applied to PIL images in RGB; None: the images themselves.
        rows: Numbers, in the data set, of the images that are used; None: all.
        left_out: Names of files that are not used, by the reason; None: those that the data set's reader left out.

    Raises:
        TypeError: The data set is a stream.
        ImageError: On reading, an image can't be read; names it.
    """

    def __init__(
        self,
        dataset: Any,
        transform: Callable | None = None,
        rows: Sequence[int] | None = None,
        left_out: dict[str, list[str]] | None = None,
    ):
        check_indexed(dataset)
        self.dataset, self.transform = dataset, transform
        self.rows: Sequence[int] = range(len(dataset)) if rows is None else rows
        self.left_out: dict[str, list[str]] = getattr(self._source, "left_out", {}) if left_out is None else left_out

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = read_image(self, index)
        return (image if self.transform is None else self.transform(image)), label

    def select(self, rows: Sequence[int]) -> "Images":
        """The images with these numbers alone."""
        return Images(self.dataset, self.transform, [self.rows[row] for row in rows], self.left_out)

    def without(self, images: dict[int, str], why: str = "can't be read") -> "Images":
        """All but the images with these numbers, which are noted as left out; the numbers' values are notes on each.

        Raises:
            ValueError: No image is left.
        """
        if not images:
            return self
        rows = [row for row in range(len(self)) if row not in images]
        names = [file_name(self, row) + (f" ({note})" if note else "") for row, note in sorted(images.items())]
        left = self.select(rows)
        left.left_out = self.left_out | {why: names}
        if not rows:
            raise ValueError("; ".join(["no images", *left.notes()]))
        return left

    def notes(self) -> list[str]:
        """Lines that say what was left out, and which classes were put together of several folders."""
        joined = getattr(self._source, "joined", {}).items()
        lines = [f"class {name!r} has {len(which)} folders: {listed(which)}" for name, which in joined]
        return left_out_lines(self.left_out) + lines

    @property
    def _source(self) -> Any:
        return getattr(self.dataset, "reader", self.dataset)

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, by their numbers; None where the data set has none."""
        return classes_of(self._source)

    @property
    def targets(self) -> list[int] | None:
        """The class of each image, without reading any; None where the data set does not say."""
        source = self._source
        targets = getattr(source, "targets", None)
        if targets is None and hasattr(source, "samples"):
            targets = [target for _, target in source.samples]
        return None if targets is None else [int(targets[row]) for row in self.rows]


def left_out_lines(left_out: Mapping[str, Sequence[str]]) -> list[str]:
    """For each reason a line: how many files were left out, why, and the names of the first of them."""
    return [f"left out {len(names)} ({why}): {listed(names)}" for why, names in left_out.items() if names]


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are; what can't be printed is escaped."""
    shown = [name if name.isprintable() else ascii(name)[1:-1] for name in names[:_MOST_NAMED]]
    more = len(names) - len(shown)
    return ", ".join(shown) + (f", and {more} more" if more else "")


def classes_of(source: Any) -> list[str] | None:
    """The names of the classes that timm's reader, or a data set of torchvision, knows; None where it knows none."""
    for name in ("class_to_idx", "class_name_to_idx"):
        numbers = getattr(source, name, None)
        if numbers:
            return sorted(numbers, key=numbers.get)
    return list(getattr(source, "classes", ())) or None


def as_images(dataset: Any) -> Any:
    """timm's `ImageDataset` as `Images`, so that an unreadable image is an error; other data sets as they are."""
    plain = type(dataset) is ImageDataset and not (dataset.load_bytes or dataset.additional_features)
    return Images(dataset, dataset.transform) if plain else dataset


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
        if first.setdefault(name, index) != index:
            files = " and ".join(file_name(dataset, i) for i in (first[name], index))
            raise ValueError(f"{files} are both named {name!r}, so their labels would be mixed up: rename one")
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
    return (dataset.dataset, dataset.rows[index]) if isinstance(dataset, Images) else (dataset, index)


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
