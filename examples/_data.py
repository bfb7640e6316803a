"""Where the examples' images come from: scikit-learn's digits, or any folder of images."""

import sys
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from timm_tokens.cli import CommandError
from timm_tokens.data import Images, input_config, input_transform, open_folder, unreadable


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


def digits(size: int, test_size: float = 0.5) -> tuple[tuple[Tensor, Tensor], tuple[Tensor, Tensor]]:
    """scikit-learn's 1797 handwritten digits: images (N, size, size) in [0, 1] and labels (N,), to learn from and, with
    the share `test_size` of each class, to report on."""
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    source = load_digits()  # 8 x 8, from 0 to 16
    images = F.interpolate(torch.from_numpy(source.images).float()[:, None] / 16, (size, size), mode="bilinear")[:, 0]
    labels = torch.from_numpy(source.target)
    rows = train_test_split(range(len(labels)), test_size=test_size, random_state=0, stratify=labels)
    train, val = ((images[part], labels[part]) for part in rows)
    return train, val


def moving_digits(size: int) -> Data:
    """Digits as (1, size, size) in [-1, 1], those to learn from moved a little, anew every time."""
    (train, labels), (val, val_labels) = digits(size)
    return Data(Moving(2 * train[:, None] - 1, labels), TensorDataset(2 * val[:, None] - 1, val_labels))


def image_folder(root: Path, model: nn.Module) -> Data:
    """The images in root/train/<class>/ and root/val/<class>/, transformed as the model expects.

    Raises:
        CommandError: If a folder is missing or has no images, or the two differ in classes.
    """
    train, val, config = open_images(root / "train"), open_images(root / "val"), input_config(model)
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise CommandError(f"{root}: train/ and val/ must have the same classes, but only one of them has {odd}")
    train.transform = input_transform(config, is_training=True, scale=(0.35, 1.0), color_jitter=None)
    val.transform = input_transform(config)
    return Data(train, val)


def open_images(path: Path) -> Images:
    """The images in path/<class>/; those that can't be read, and other files, are left out and named.

    Raises:
        CommandError: If there is no such folder, or no image in it.
    """
    if not path.is_dir():
        raise CommandError(f"no folder {path}: --data-dir must have train/<class>/ and val/<class>/ with images")
    try:
        images = open_folder(path)
        images = images.without(unreadable(images))
    except (OSError, ValueError) as error:
        raise CommandError(f"{path}: {error}") from None
    for line in images.notes():
        print(f"{path}: {line}", file=sys.stderr)
    return images


def samples(data: Data, count: int) -> Tensor:
    """So many images of val/, from all over it, as one batch."""
    count = min(count, len(data.val))
    return torch.stack([data.val[i * len(data.val) // count][0] for i in range(count)])
