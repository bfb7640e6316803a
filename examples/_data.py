"""Where the examples' images come from: scikit-learn's digits, or any folder of images."""

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from PIL import Image
from timm.data import ImageNetInfo, create_transform, infer_imagenet_subset, resolve_model_data_config
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset
from torchvision.datasets import ImageFolder
from tqdm import tqdm


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
        InputError: If a folder is missing, a class has no images, the two differ in classes, or an image can't be read.
    """
    config = resolve_model_data_config(model)
    augment = create_transform(**config, is_training=True, scale=(0.35, 1.0), color_jitter=None)
    train = _open_folder(root / "train", augment)
    val = _open_folder(root / "val", create_transform(**config))
    if train.classes != val.classes:
        odd = sorted(set(train.classes) ^ set(val.classes))
        raise InputError(f"{root}: train/ and val/ must have the same classes, but only one of them has {odd}")
    check_images([path for folder in (train, val) for path, _ in folder.samples])
    return Data(train, val)


def _open_folder(path: Path, transform: nn.Module) -> ImageFolder:
    if not path.is_dir():
        raise InputError(f"no folder {path}: --data-dir must have train/<class>/ and val/<class>/ with images")
    try:
        return ImageFolder(path, transform)
    except FileNotFoundError as error:  # no class at all, or a class without images
        raise InputError(f"{path}: {str(error).splitlines()[0]}") from None


def samples(data: Data, count: int) -> Tensor:
    """So many images of val/, from all over it, as one batch."""
    count = min(count, len(data.val))
    return torch.stack([data.val[i * len(data.val) // count][0] for i in range(count)])


def check_images(paths: list[str]) -> None:
    """Decode every image once, so that a broken one is met now and not after the training."""
    with ThreadPoolExecutor() as pool:
        faults = list(tqdm(pool.map(_fault, paths), "checking images", len(paths)))
    broken = [f"{path} ({fault})" for path, fault in zip(paths, faults, strict=True) if fault]
    if broken:
        others = f", and {len(broken) - 1} more" if len(broken) > 1 else ""
        raise InputError(f"can't read the image {broken[0]}{others}: replace or remove what is broken")


def _fault(path: str) -> str | None:
    try:
        with Image.open(path) as image:
            image.draft("RGB", (1, 1))  # JPEGs at an eighth of their size: still reads every byte, far faster
            image.load()
    except (OSError, SyntaxError, ValueError) as error:  # all that PIL raises on broken files
        return str(error).splitlines()[0].replace(f" {path!r}", "")
    return None


def imagenet_indices(model: nn.Module, classes: list[str]) -> list[int] | None:
    """The model's outputs that the folders stand for, if it has an ImageNet head and they are named by WordNet ids."""
    subset = infer_imagenet_subset(model)
    names = ImageNetInfo(subset).label_names() if subset else []
    return [names.index(name) for name in classes] if set(classes) <= set(names) else None
