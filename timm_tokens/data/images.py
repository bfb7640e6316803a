"""The data set of images that commands and tasks use."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from timm.data import ImageDataset
from torch.utils.data import Dataset

from timm_tokens.data.reading import check_indexed, file_name, read_image

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
