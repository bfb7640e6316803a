"""Batches of a data set's images, without those that can't be read."""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import Compose

from timm_tokens.cli.options import LoadingOptions
from timm_tokens.data import read_image
from timm_tokens.data.decoding import to_rgb
from timm_tokens.stopping import outlast_signals


class Batch(NamedTuple):
    """Transformed images (B, C, h, w), their numbers in the data set and classes, and why others can't be read.

    Attributes:
        unread: The reasons, by the numbers of the images in the data set.
    """

    numbers: list[int]
    images: Tensor | None
    labels: list[int]
    unread: dict[int, str]

    def __len__(self) -> int:
        return len(self.labels) + len(self.unread)


def batches(
    dataset: Any, transform: Callable, options: LoadingOptions, chosen: Sequence[int] | None = None, pin: bool = False
) -> Iterator[Batch]:
    """The images in order, or those of the numbers in `chosen`; `pin`: in memory from which a GPU copies fast.

    A stream is read as timm reads it, and turned upright afterwards; it may leave images out with a warning of its own.
    """
    loading: dict[str, Any] = {"batch_size": options.batch_size, "num_workers": options.workers, "pin_memory": pin}
    loading["worker_init_fn"] = outlast_signals
    if isinstance(dataset, IterableDataset):
        stream: Any = dataset
        stream.transform, count = Compose([to_rgb, transform]), 0
        for images, labels in DataLoader(stream, **loading):
            yield Batch(list(range(count, count + len(labels))), images, labels.tolist(), {})
            count += len(labels)
        return
    chosen = range(len(dataset)) if chosen is None else chosen
    yield from DataLoader(_Images(dataset, transform, chosen), collate_fn=_collate, **loading)


class _Images(Dataset):
    """(number, transformed image (C, h, w), class), with the reason why it can't be read in the place of an image."""

    def __init__(self, dataset: Dataset, transform: Callable, chosen: Sequence[int]):
        self.dataset, self.transform, self.chosen = dataset, transform, chosen

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, row: int) -> tuple[int, Tensor | str, int]:
        number = self.chosen[row]
        try:
            image, label = read_image(self.dataset, number)
        except OSError as error:
            return number, str(error.__cause__), -1
        return number, self.transform(image), int(label)


def _collate(items: list[tuple[int, Tensor | str, int]]) -> Batch:
    good = [item for item in items if isinstance(item[1], Tensor)]
    numbers, images, labels = ([list(column) for column in zip(*good, strict=True)]) if good else ([], [], [])
    unread = {number: why for number, why, _ in items if isinstance(why, str)}
    return Batch(numbers, torch.stack(images) if images else None, labels, unread)
