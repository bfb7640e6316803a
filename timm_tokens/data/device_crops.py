"""Crops that are cut and coloured on the device, a batch at a time, where loading is slower than training."""

from typing import Any

import torch
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2

from timm_tokens.data.batch_augment import REACH, blur, change_rows, crop_resize, jitter
from timm_tokens.data.multi_crop import Crop, MultiCrop, blur_reach
from timm_tokens.seeding import drawn_from

# What is drawn for a crop: numbers in a row of a tensor, which a loader can collate.
_BOX, _FLIP, _ORDER, _FACTORS, _GRAY, _SIGMA, _SOLARIZE = slice(4), 4, slice(5, 9), slice(9, 13), 13, 14, 15
_LENGTH = 16
_SWITCHES = {v2.RandomHorizontalFlip: _FLIP, v2.RandomGrayscale: _GRAY, v2.RandomSolarize: _SOLARIZE}


class DeviceCrops:
    """The crops of a `MultiCrop`, made in two parts: the loader draws them, and the device makes them.

        crops = DeviceCrops(MultiCrop.for_model(vit, dino_crops()))
        dataset = ImageFolder("images", crops.draw)
        train(task, dataset, settings, augment=crops)

    The same random numbers give the same crops as `MultiCrop`, but for rounding (that rounds to whole numbers after
    each change), and for the size to which images are scaled before they go to the device.

    Args:
        crops: What to make.
        side: Side of the squares to which images are scaled, whatever their shape, before they go to the device; None:
            twice that of the largest crop, so that hardly any detail is lost.

    Raises:
        ValueError: The interpolation is not one that is antialiased.
    """

    def __init__(self, crops: MultiCrop, side: int | None = None):
        if crops.interpolation not in REACH:
            raise ValueError(f"crops on the device are bicubic or bilinear, got interpolation {crops.interpolation!r}")
        self.crops, self.side = crops, side or 2 * max(crop.size for crop in crops.crops)

    def draw(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """An image (C, side, side) in 8 bits, and what is drawn for each of its V crops, (V, 16)."""
        image = image.convert(self.crops.mode)
        whole = torch.empty(1, image.height, image.width, dtype=torch.uint8, device="meta")
        rows = []
        with drawn_from(None):
            for crop, steps in zip(self.crops.crops, self.crops.transforms, strict=True):
                rows += [_draw(steps, whole) for _ in range(crop.count)]
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return v2.functional.pil_to_tensor(image), torch.stack(rows)

    def __call__(self, batch: Any, device: torch.device) -> list[Tensor]:
        """The V crops (B, C, size, size) of a batch of what `draw` gives, normalised, on the device."""
        images, drawn = batch
        images = images.to(device, non_blocking=True).float() / 255
        kinds = [crop for crop in self.crops.crops for _ in range(crop.count)]
        return [self._make(images, row, crop) for row, crop in zip(drawn.unbind(1), kinds, strict=True)]

    def _make(self, images: Tensor, drawn: Tensor, crop: Crop) -> Tensor:
        """One crop of each image, (B, C, size, size), by its row of numbers (B, 16) on the CPU."""
        there = drawn.to(images.device, non_blocking=True)
        flip, gray, solarize = (there[:, i, None, None, None] > 0 for i in (_FLIP, _GRAY, _SOLARIZE))
        x = crop_resize(images, there[:, _BOX], crop.size, self.crops.interpolation)
        x = torch.where(flip, x.flip(-1), x)
        x = jitter(x, drawn[:, _ORDER], drawn[:, _FACTORS])
        x = torch.where(gray, v2.functional.rgb_to_grayscale(x), x)
        reach = blur_reach(crop)
        x = change_rows(x, drawn[:, _SIGMA] > 0, lambda rows, sigma: blur(rows, sigma, reach), drawn[:, _SIGMA])
        x = torch.where(solarize & (x > 127.5 / 255), 1 - x, x)
        mean, std = (torch.tensor(v, device=x.device).view(1, -1, 1, 1) for v in (self.crops.mean, self.crops.std))
        return (x - mean) / std


def _draw(steps: v2.Compose, image: Tensor) -> Tensor:
    """What torchvision's steps would draw for one crop of an image of this shape, as numbers (16,)."""
    row, height, width = torch.zeros(_LENGTH), *image.shape[-2:]
    row[_ORDER] = -1
    for step in steps.transforms:
        inner = step.transforms[0] if isinstance(step, v2.RandomApply) else step
        if hasattr(step, "p") and torch.rand(1) >= step.p:
            continue
        if isinstance(inner, v2.RandomResizedCrop):
            box = inner.make_params([image])
            row[_BOX] = torch.tensor([box["top"] / height, box["left"] / width, box["height"] / height,
                                      box["width"] / width])  # fmt: skip
        elif isinstance(inner, v2.ColorJitter):
            changes = inner.make_params([])
            names = ("brightness_factor", "contrast_factor", "saturation_factor", "hue_factor")
            factors = [changes[name] for name in names]
            row[_FACTORS] = torch.tensor([0.0 if factor is None else factor for factor in factors])
            row[_ORDER] = torch.tensor([-1 if factors[i] is None else int(i) for i in changes["fn_idx"]]).float()
        elif isinstance(inner, v2.GaussianBlur):
            row[_SIGMA] = inner.make_params([])["sigma"][0]
        elif type(inner) in _SWITCHES:
            row[_SWITCHES[type(inner)]] = 1
    return row
