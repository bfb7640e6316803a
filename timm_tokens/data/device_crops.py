"""Crops that are cut and coloured on the device, a batch at a time, where loading is slower than training.

Each image has its own parameters: torchvision's v2 draws one set for a batch. Shapes: B images (B, C, H, W) with values
in [0, 1]. Whatever decides which images are changed is on the CPU, so that nothing waits for the device.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torchvision.transforms import v2
from torchvision.transforms.v2.functional import rgb_to_grayscale

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
        if crops.interpolation not in ("bicubic", "bilinear"):
            raise ValueError(f"crops on the device are bicubic or bilinear, got interpolation {crops.interpolation!r}")
        self.crops, self.side = crops, side or 2 * max(crop.size for crop in crops.crops)

    def draw(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """An image (C, side, side) in 8 bits, and what is drawn for each of its V crops, (V, 16)."""
        image = image.convert(self.crops.mode)
        whole = torch.empty(1, image.height, image.width, dtype=torch.uint8, device="meta")
        with drawn_from(None):
            rows = [_draw(steps, whole) for _, steps in self.crops.steps]
        if image.size != (self.side, self.side):
            image = image.resize((self.side, self.side), Image.Resampling.BICUBIC)
        return v2.functional.pil_to_tensor(image), torch.stack(rows)

    def __call__(self, batch: Any, device: torch.device) -> list[Tensor]:
        """The V crops (B, C, size, size) of a batch of what `draw` gives, normalised, on the device."""
        images, drawn = batch
        images = images.to(device, non_blocking=True).float() / 255
        pairs = zip(drawn.unbind(1), self.crops.steps, strict=True)
        return [self._make(images, row, crop) for row, (crop, _) in pairs]

    def _make(self, images: Tensor, drawn: Tensor, crop: Crop) -> Tensor:
        """One crop of each image, (B, C, size, size), by its row of numbers (B, 16) on the CPU."""
        there = drawn.to(images.device, non_blocking=True)
        flip, gray, solarize = (there[:, i, None, None, None] > 0 for i in (_FLIP, _GRAY, _SOLARIZE))
        x = crop_resize(images, there[:, _BOX], crop.size, self.crops.interpolation)
        x = torch.where(flip, x.flip(-1), x)
        x = jitter(x, drawn[:, _ORDER], drawn[:, _FACTORS])
        x = torch.where(gray, rgb_to_grayscale(x), x)
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


def crop_resize(images: Tensor, boxes: Tensor, size: int, interpolation: str = "bicubic") -> Tensor:
    """A part of each image (B, C, H, W), resized with antialiasing by two matrix products: (B, C, size, size).

    Boxes (B, 4) are top, left, height and width as shares of the image, interpolation is "bicubic" or "bilinear". The
    results are those of `resized_crop(..., antialias=True)` of each image.
    """
    rows = _resampling(boxes[:, 0], boxes[:, 2], images.shape[-2], size, interpolation)
    columns = _resampling(boxes[:, 1], boxes[:, 3], images.shape[-1], size, interpolation)
    return (rows[:, None] @ images @ columns[:, None].mT).clamp(0, 1)


def _resampling(start: Tensor, length: Tensor, pixels: int, size: int, interpolation: str) -> Tensor:
    """(B, size, pixels) weights of the pixels of a row for each pixel of the result."""
    start, length = start[:, None, None] * pixels, length[:, None, None] * pixels
    scale = length / size
    place = torch.arange(pixels, device=start.device) + 0.5
    center = start + (torch.arange(size, device=start.device)[:, None] + 0.5) * scale
    x = (place - center).abs() / scale.clamp(min=1)  # in the units of the filter, which is as wide as what it merges
    weights = _cubic(x) if interpolation == "bicubic" else (1 - x).clamp(min=0)
    weights = weights * ((place > start) & (place < start + length))  # the crop has no pixels outside
    return weights / weights.sum(-1, keepdim=True)


def _cubic(x: Tensor) -> Tensor:
    """Keys' filter with a = -1/2 for x >= 0, which is antialiasing bicubic's."""
    near = (1.5 * x - 2.5) * x * x + 1
    far = ((-0.5 * x + 2.5) * x - 4) * x + 2
    return torch.where(x < 1, near, torch.where(x < 2, far, 0.0))


def jitter(images: Tensor, order: Tensor, factors: Tensor) -> Tensor:
    """Brightness, contrast, saturation and hue of each image (B, 1 or 3, H, W), changed in an order of its own.

    On the CPU: the order (B, 4), numbers of the four changes, -1 for none; and the factors (B, 4) of the changes.
    """
    for place in order.unbind(1):
        for number, change in enumerate((_brightness, _contrast, _saturation, _hue)):
            images = change_rows(images, place == number, change, factors[:, number])
    return images


def change_rows(images: Tensor, chosen: Tensor, change: Callable[[Tensor, Tensor], Tensor], amount: Tensor) -> Tensor:
    """Images (B, C, H, W) with `change(images, amount)` of those that are chosen, by (B,) bool and amounts on the CPU.

    It gets images (b, C, H, W) and amounts (b, 1, 1, 1).
    """
    if not chosen.any():
        return images
    rows = chosen.nonzero().squeeze(1)
    amount = amount[rows].to(images, non_blocking=True).view(-1, 1, 1, 1)
    rows = rows.to(images.device, non_blocking=True)
    return images.index_copy(0, rows, change(images[rows], amount))


def _brightness(x: Tensor, factor: Tensor) -> Tensor:
    return (x * factor).clamp(0, 1)


def _contrast(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(rgb_to_grayscale(x).mean((1, 2, 3), keepdim=True), x, factor).clamp(0, 1)


def _saturation(x: Tensor, factor: Tensor) -> Tensor:
    return torch.lerp(rgb_to_grayscale(x), x, factor).clamp(0, 1)


def _hue(x: Tensor, shift: Tensor) -> Tensor:
    """The hue turned by a share of the circle: to HSV, and back."""
    if x.shape[1] == 1:
        return x
    value, low = x.amax(1, keepdim=True), x.amin(1, keepdim=True)
    chroma = value - low
    red, green, blue = x.split(1, 1)
    span = chroma.clamp(min=1e-8)
    hue = torch.where(value == red, (green - blue) / span, torch.where(value == green, 2 + (blue - red) / span,
                                                                       4 + (red - green) / span))  # fmt: skip
    turned = hue + 6 * shift  # in sixths of the circle
    k = (torch.tensor([5.0, 3.0, 1.0], device=x.device).view(1, 3, 1, 1) + turned) % 6
    return value - chroma * torch.minimum(k, 4 - k).clamp(0, 1)


def blur(images: Tensor, sigma: Tensor, reach: int) -> Tensor:
    """Gaussian blur of each image by its own sigma (B, 1, 1, 1), in pixels, with a kernel of 2 reach + 1 pixels."""
    places = torch.arange(-reach, reach + 1, device=images.device)
    kernel = (-(places**2) / (2 * sigma.view(-1, 1) ** 2)).softmax(1)  # (B, k)
    kernel = kernel.repeat_interleave(images.shape[1], 0)[:, None]  # a channel is a group: (B C, 1, k)
    x = F.pad(images, [reach] * 4, mode="reflect").flatten(0, 1)[None]
    x = F.conv2d(x, kernel[..., None], groups=x.shape[1])
    return F.conv2d(x, kernel[:, :, None], groups=x.shape[1])[0].view_as(images)
