"""Where the examples' images come from: scikit-learn's digits, or any folder of images."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo, infer_imagenet_subset
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from timm_tokens.data import Images, input_config, input_transform, open_folder, unreadable


class InputError(Exception):
    """Something the user gave can't be used; the message is one line that says what, and what to do."""


class Data(NamedTuple):
    """Images to learn from, and images to report on."""

    train: Dataset
    val: Dataset


class Moving(Dataset):
    """Images (N, 1, H, W) in [-1, 1] with labels (N,), each a little turned, scaled and shifted, anew every time."""

    def __init__(self, images: Tensor, labels: Tensor):
        self.images, self.labels = images, labels

    def __len__(self) -> int:
        return len(self.labels)

    def __getitems__(self, indices: list[int]) -> list[tuple[Tensor, Tensor]]:
        """A batch at once, as a DataLoader asks for it."""
        images, count = self.images[indices], len(indices)
        angle, shift = torch.rand(count) * 0.4 - 0.2, torch.rand(count, 2, 1) * 0.24 - 0.12  # radians, half images
        turn = torch.stack([angle.cos(), -angle.sin(), angle.sin(), angle.cos()], dim=1).unflatten(1, (2, 2))
        turn = turn * (torch.rand(count, 1, 1) * 0.3 + 0.85)
        grid = F.affine_grid(torch.cat([turn, shift], dim=2), list(images.shape), align_corners=False)
        moved = F.grid_sample(images + 1, grid, align_corners=False) - 1  # what comes in from outside is dark: -1
        return list(zip(moved, self.labels[indices], strict=True))


def digits(size: int) -> Data:
    """scikit-learn's 1797 handwritten digits as (1, size, size) in [-1, 1]; half of each class is to report on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()  # 8 x 8, from 0 to 16
    images = F.interpolate(torch.from_numpy(source.images).float()[:, None] / 8 - 1, (size, size), mode="bilinear")
    labels = torch.from_numpy(source.target)
    train, val = train_test_split(range(len(labels)), test_size=0.5, random_state=0, stratify=labels)
    return Data(Moving(images[train], labels[train]), TensorDataset(images[val], labels[val]))


def image_folder(root: Path, model: nn.Module) -> Data:
    """The images in root/train/<class>/ and root/val/<class>/, transformed as the model expects.

    Raises:
        InputError: If a folder is missing or has no images, or the two differ in classes.
    """
    train, val, config = open_images(root / "train"), open_images(root / "val"), input_config(model)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(f"{root}: train/ and val/ must have the same classes, but only one of them has {odd}")
    train.transform = input_transform(config, is_training=True, scale=(0.35, 1.0), color_jitter=None)
    val.transform = input_transform(config)
    return Data(train, val)


def open_images(path: Path) -> Images:
    """The images in path/<class>/; those that can't be read, and other files, are left out and named.

    Raises:
        InputError: If there is no such folder, or no image in it.
    """
    if not path.is_dir():
        raise InputError(f"no folder {path}: --data-dir must have train/<class>/ and val/<class>/ with images")
    try:
        images = open_folder(path)
        images = images.without(unreadable(images))
    except (OSError, ValueError) as error:
        raise InputError(f"{path}: {error}") from None
    for line in images.notes():
        print(f"{path}: {line}", file=sys.stderr)
    return images


def samples(data: Data, count: int) -> Tensor:
    """So many images of val/, from all over it, as one batch."""
    count = min(count, len(data.val))
    return torch.stack([data.val[i * len(data.val) // count][0] for i in range(count)])


def imagenet_indices(model: nn.Module, classes: list[str]) -> list[int] | None:
    """The model's outputs that the folders stand for, if it has an ImageNet head and they are named by WordNet ids."""
    subset = infer_imagenet_subset(model)
    names = ImageNetInfo(subset).label_names() if subset else []
    return [names.index(name) for name in classes] if set(classes) <= set(names) else None
