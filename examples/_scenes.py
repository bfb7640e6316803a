"""Images with more than one thing in them: digits scattered over a canvas, rows of digits, folders with masks."""

from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms.v2.functional import pil_to_tensor
from tqdm import tqdm

from timm_tokens.cli import CommandError

VOID = 255  # pixels that count neither in the loss nor in the score


class Scenes(NamedTuple):
    """Images (N, C, H, W) of uint8, and the class of each of their pixels (N, H, W) of uint8, VOID where unknown."""

    images: Tensor
    masks: Tensor


def scatter_digits(digits: Tensor, labels: Tensor, count: int, side: int, generator: torch.Generator) -> Scenes:
    """Canvases of side x side pixels with three to six digits each; class 0 is the background, 1 + d the digit d."""
    images, masks = torch.zeros(count, side, side), torch.zeros(count, side, side, dtype=torch.uint8)
    for image, mask in zip(images, masks, strict=True):
        for _ in range(_draw(3, 7, generator)):
            which, size = _draw(0, len(digits), generator), side // 3
            top, left = (_draw(0, side - size, generator) for _ in range(2))
            ink = F.interpolate(digits[which, None, None], (size, size), mode="bilinear")[0, 0]
            place = (slice(top, top + size), slice(left, left + size))
            drawn = ink > 0.3
            image[place] = torch.where(drawn, ink, image[place])
            mask[place] = torch.where(drawn, labels[which].to(torch.uint8) + 1, mask[place])
    noise = 0.1 * torch.randn(images.shape, generator=generator)
    return Scenes((images + noise).clamp(0, 1).mul(255).byte()[:, None], masks)


def digit_rows(
    digits: Tensor, labels: Tensor, count: int, length: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Images (count, 1, 24, 16 * length) of uint8, each a row of digits at different heights, and the digits (count,
    length)."""
    which = torch.randint(len(digits), (count, length), generator=generator)
    glyphs = F.interpolate(digits[which].flatten(0, 1)[:, None], (16, 16), mode="bilinear").unflatten(0, which.shape)
    top = torch.randint(0, 9, which.shape, generator=generator)
    rows = (top[..., None] + torch.arange(16))[..., None].expand(-1, -1, -1, 16)
    columns = torch.zeros(count, length, 24, 16).scatter(2, rows, glyphs[:, :, 0])
    images = columns.transpose(1, 2).flatten(2)
    noise = 0.05 * torch.randn(images.shape, generator=generator)
    return (images + noise).clamp(0, 1).mul(255).byte()[:, None], labels[which]


def _draw(low: int, high: int, generator: torch.Generator) -> int:
    return int(torch.randint(low, high, (), generator=generator))


def scene_folders(root: Path, hold_out: bool) -> tuple[Scenes, Scenes]:
    """Scenes to learn from and to report on: DIR/images and DIR/masks, each with train/ and val/, or DIR/train with
    DIR/train_masks and DIR/val with DIR/val_masks. Without val, or with `hold_out`, the last fifth of train by name.

    Raises:
        CommandError: If a folder, or an image's mask, is missing, or the images have several sizes.
    """
    folders = _pair(root, "train")
    if folders is None:
        raise CommandError(f"--data-dir {root} needs images/train/ and masks/train/ (or train/ and train_masks/)")
    train, folders = _read(*folders), _pair(root, "val")
    if folders is not None and not hold_out:
        return train, _read(*folders)
    kept = len(train.images) - len(train.images) // 5
    return Scenes(*(x[:kept] for x in train)), Scenes(*(x[kept:] for x in train))


def _pair(root: Path, split: str) -> tuple[Path, Path] | None:
    """The folders of a split's images and masks, if they are there."""
    pairs = [
        (root / "images" / split, root / "masks" / split),
        (root / split / "images", root / split / "masks"),
        (root / split, root / f"{split}_masks"),
    ]
    if split == "train":
        pairs.append((root / "images", root / "masks"))
    return next((pair for pair in pairs if all(folder.is_dir() for folder in pair)), None)


def _read(images: Path, masks: Path) -> Scenes:
    names = {path.stem: path for path in sorted(masks.iterdir()) if path.suffix.lower() in (".png", ".bmp", ".tif")}
    pictures, classes = [], []
    for path in tqdm([p for p in sorted(images.iterdir()) if p.is_file()], f"reading {images}"):
        if path.stem not in names:
            raise CommandError(f"{path} has no mask {path.stem}.png in {masks}")
        try:
            with Image.open(path) as image, Image.open(names[path.stem]) as mask:
                pictures.append(pil_to_tensor(image.convert("RGB")))
                classes.append(torch.from_numpy(np.array(mask)).to(torch.uint8))
        except (OSError, SyntaxError, ValueError) as error:
            raise CommandError(f"can't read {path} or its mask: {str(error).splitlines()[0]}") from None
    sizes = {tuple(x.shape[-2:]) for x in pictures} | {tuple(x.shape) for x in classes}
    if len(sizes) != 1:
        raise CommandError(f"images and masks in {images} must all have one size, and masks one channel; got {sizes}")
    return Scenes(torch.stack(pictures), torch.stack(classes))
