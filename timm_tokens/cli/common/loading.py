"""Batches of a data set's images, without those that can't be read."""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, NamedTuple, cast

import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset, IterableDataset
from torchvision.transforms import Compose

from timm_tokens.cli.options import LoadingOptions
from timm_tokens.data import read_image
from timm_tokens.data.decoding import to_rgb
from timm_tokens.stopping import outlast_signals


class Batch(NamedTuple):
    """Transformed images (B, C, h, w), their numbers in the data set and classes, and why others can't be read."""

    numbers: list[int]
    images: Tensor | None
    labels: list[int]
    unread: dict[int, str]  # the reasons, by the numbers of the images in the data set

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
    yield from DataLoader(cast(Any, chosen), collate_fn=partial(_read, dataset, transform), **loading)


def _read(dataset: Dataset, transform: Callable, chosen: list[int]) -> Batch:
    """The images of these numbers, read in a worker of the loader."""
    numbers, images, labels, unread = [], [], [], {}
    for number in chosen:
        try:
            image, label = read_image(dataset, number)
        except OSError as error:
            unread[number] = str(error.__cause__)
            continue
        numbers.append(number)
        images.append(transform(image))
        labels.append(int(label))
    return Batch(numbers, torch.stack(images) if images else None, labels, unread)
