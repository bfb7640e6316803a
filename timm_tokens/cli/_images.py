"""Batches of images with their names, where a damaged image costs no other."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.utils.data import Dataset

from timm_tokens.data import read_image


class Batch(NamedTuple):
    """Names and transformed images (B, 3, h, w), and a line for each image that can't be read."""

    names: list[str]
    images: Tensor | None
    errors: list[str]


class NamedImages(Dataset):
    """Chosen images of a data set: a name and the transformed image (3, h, w), or a line on why it can't be read."""

    def __init__(self, dataset: Dataset, names: list[str], chosen: Sequence[int], transform: Callable):
        self.dataset, self.transform = dataset, transform
        self.chosen = [(i, names[i]) for i in chosen]

    def __len__(self) -> int:
        return len(self.chosen)

    def __getitem__(self, row: int) -> tuple[str, Tensor | str]:
        index, name = self.chosen[row]
        try:
            return name, self.transform(read_image(self.dataset, index)[0])
        except OSError as error:
            return name, str(error)


def collate(items: list[tuple[str, Tensor | str]]) -> Batch:
    """Batch of a loader over `NamedImages`."""
    good = [(name, image) for name, image in items if isinstance(image, Tensor)]
    images = torch.stack([image for _, image in good]) if good else None
    return Batch([name for name, _ in good], images, [line for _, line in items if isinstance(line, str)])
