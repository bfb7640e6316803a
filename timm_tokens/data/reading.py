"""Images of a data set by name, read one at a time; an unreadable one is an error that names it."""

from collections.abc import Callable, Sequence
from typing import Any

from PIL import Image
from timm.data import ImageDataset
from torch import Generator
from torch.utils.data import DataLoader, Dataset, IterableDataset
from tqdm import tqdm

from timm_tokens.data.decoding import decode_image, reason, to_rgb
from timm_tokens.data.label_format import image_id


class Images(Dataset):
    """Images of an indexed data set with their classes, (transformed image, class), all read by `read_image`.

    Unlike timm's `ImageDataset`, which gives the next image in the place of one that it can't read, this raises an
    error. `unreadable` finds such images, and `select` leaves them out.

    Args:
        dataset: Such as timm's `ImageDataset`, or torchvision's data sets; its own transform is not used.
        transform: Of PIL images in RGB; None: the images themselves.
        rows: Numbers, in the data set, of the images that are used; None: all.

    Raises:
        TypeError: The data set is a stream.
        OSError: On reading, an image can't be read; names it.
    """

    def __init__(self, dataset: Dataset, transform: Callable | None = None, rows: Sequence[int] | None = None):
        check_indexed(dataset)
        self.dataset, self.transform = dataset, transform
        self.rows: Sequence[int] = range(len(dataset)) if rows is None else rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[Any, int]:
        image, label = read_image(self, index)
        return (image if self.transform is None else self.transform(image)), label

    def select(self, rows: Sequence[int]) -> "Images":
        """The images with these numbers alone."""
        return Images(self.dataset, self.transform, [self.rows[row] for row in rows])

    @property
    def left_out(self) -> dict[str, list[str]]:
        """Names of the files that a folder of images has beside these, by the reason why they were left out."""
        return getattr(getattr(self.dataset, "reader", None), "left_out", {})

    @property
    def classes(self) -> list[str] | None:
        """The names of the classes, by their numbers; None where the data set has none."""
        source = getattr(self.dataset, "reader", self.dataset)
        for name in ("class_to_idx", "class_name_to_idx"):
            numbers = getattr(source, name, None)
            if numbers:
                return sorted(numbers, key=numbers.get)
        return list(getattr(source, "classes", ())) or None

    @property
    def targets(self) -> list[int] | None:
        """The class of each image, without reading any; None where the data set does not say."""
        source = getattr(self.dataset, "reader", self.dataset)
        targets = getattr(source, "targets", None)
        if targets is None and hasattr(source, "samples"):
            targets = [target for _, target in source.samples]
        return None if targets is None else [int(targets[row]) for row in self.rows]


def check_indexed(dataset: Dataset) -> None:
    """Refuse what gives images in its own order.

    Raises:
        TypeError: The data set is a stream.
    """
    if isinstance(dataset, IterableDataset) or not hasattr(dataset, "__getitem__"):
        raise TypeError(
            f"dataset must be indexed, such as a timm.data.ImageDataset, got {type(dataset).__name__}: "
            "images are found by their numbers, and streams of images have none"
        )


def image_name(dataset: Dataset, index: int) -> str:
    """The id of an image: from its file (see `image_id`), or its number where a data set knows no files."""
    return image_id(file_name(dataset, index))


def image_names(dataset: Dataset) -> list[str]:
    """The ids of all images.

    Raises:
        ValueError: Two images have the same id.
    """
    names, first = [image_name(dataset, index) for index in range(len(dataset))], {}
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


def read_image(dataset: Dataset, index: int) -> tuple[Image.Image, int]:
    """An image in RGB (see `decode_image`) and its class, -1 without one; the data set's transform is not used.

    Raises:
        OSError: The image can't be read; names it.
    """
    try:
        return _read(dataset, index)
    except OSError as error:
        raise OSError(f"image {file_name(dataset, index)!r} can't be read: {error}") from error


def unreadable(images: Dataset, workers: int = 0, rows: Sequence[int] | None = None, **bar: Any) -> dict[int, str]:
    """The images that can't be read, by number, with the reason. Reads each once, JPEGs at an eighth of their size.

    Args:
        images: `Images`, or another indexed data set.
        workers: Processes that read.
        rows: Numbers of the images to read; None: all.
        bar: For the progress bar, tqdm.
    """
    attempts = _Attempts(images, range(len(images)) if rows is None else rows)
    # A generator of its own: torch would draw from the global one, and change what a run draws after it.
    loader = DataLoader(attempts, 16, num_workers=workers, collate_fn=list, generator=Generator())
    found: dict[int, str] = {}
    with tqdm(total=len(attempts), desc="checking images", unit="image", leave=False, **bar) as shown:
        for batch in loader:
            found.update((number, why) for number, why in batch if why)
            shown.update(len(batch))
    return found


class _Attempts(Dataset):
    """(number, why the image can't be read, empty if it can)."""

    def __init__(self, images: Dataset, rows: Sequence[int]):
        self.images, self.rows = images, rows

    def __len__(self) -> int:
        return len(self.rows)

    def __getitem__(self, index: int) -> tuple[int, str]:
        try:
            _read(self.images, self.rows[index], draft=1)
        except OSError as error:
            return self.rows[index], str(error)
        return self.rows[index], ""


def _inner(dataset: Dataset, index: int) -> tuple[Dataset, int]:
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
