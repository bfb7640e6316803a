"""Crops of a whole batch at once, for images in memory: on one core, `data.MultiCrop` would take most of the time."""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from timm_tokens.data import Crop


class InMemory:
    """A task that cuts its crops itself, from a batch of whole images; to inherit from before the task's class."""

    crops: list[Crop]

    def forward(self, input: Tensor, target: object = None) -> dict[str, Tensor]:
        return super().forward(batch_crops(input, self.crops, self.generator()))


def batch_crops(images: Tensor, crops: Sequence[Crop], generator: torch.Generator) -> list[Tensor]:
    """The crops of square uint8 images (B, C, H, H), in [-1, 1]: as `MultiCrop` draws them, but for the hue.

    Shapes of the list: (B, C, size, size) each, those of the first kind first.
    """
    images = images.float().div(255)
    return [_colours(_cut(images, crop, generator), crop, generator) for crop in crops for _ in range(crop.count)]


def _cut(images: Tensor, crop: Crop, generator: torch.Generator) -> Tensor:
    """Random resized crops and flips, by one bilinear sampling."""
    area, ratio, down, right, flip = torch.rand(5, len(images), generator=generator)
    area = crop.scale[0] + (crop.scale[1] - crop.scale[0]) * area
    ratio = math.log(crop.ratio[0]) + math.log(crop.ratio[1] / crop.ratio[0]) * ratio
    height, width = ((area * (sign * ratio).exp()).sqrt().clamp(max=1) for sign in (-1, 1))  # shares of the side
    zero, mirror = torch.zeros_like(area), torch.where(flip < crop.flip, -1.0, 1.0)
    rows = [mirror * width, zero, (2 * right - 1) * (1 - width), zero, height, (2 * down - 1) * (1 - height)]
    maps = torch.stack(rows, 1).unflatten(1, (2, 3))
    grid = F.affine_grid(maps, [*images.shape[:2], crop.size, crop.size], align_corners=False)
    return F.grid_sample(images, grid, padding_mode="border", align_corners=False)


def _colours(x: Tensor, crop: Crop, generator: torch.Generator) -> Tensor:
    """Jitter, grey, blur and solarisation of images (B, C, h, w) in [0, 1], each with its probability; normalised."""
    jitter, grey, blur, solarize, sigma, *amounts = torch.rand(8, len(x), 1, 1, 1, generator=generator)
    factors = [
        torch.where(jitter < crop.jitter_prob, 1 + strength * (2 * amount - 1), 1.0)
        for strength, amount in zip(crop.jitter, amounts, strict=False)
    ]
    x = (x * factors[0]).clamp_(0, 1)
    x = x.mean((1, 2, 3), keepdim=True).lerp(x, factors[1])
    x = x.mean(1, keepdim=True).lerp(x, factors[2]).clamp_(0, 1)
    x = torch.where(grey < crop.grayscale, x.mean(1, keepdim=True), x)
    if crop.blur:
        low, high = crop.blur_sigma
        x = torch.where(blur < crop.blur, _blur(x, low + (high - low) * sigma.flatten(), high), x)
    x = torch.where((solarize < crop.solarize) & (x >= 0.5), 1 - x, x)
    return x.mul(2).sub_(1)


def _blur(x: Tensor, sigma: Tensor, largest: float) -> Tensor:
    """Gaussian blur of each image (B, C, h, w) by its own sigma (B,)."""
    reach = min(math.ceil(3 * largest), x.shape[-1] - 1)
    weight = (torch.arange(-reach, reach + 1) / sigma[:, None]).square().mul(-0.5).softmax(1)  # (B, 2 reach + 1)
    weight = weight.repeat_interleave(x.shape[1], 0)[:, None, None]  # (B C, 1, 1, 2 reach + 1)
    flat = F.pad(x.flatten(0, 1)[None], (reach,) * 4, mode="reflect")
    flat = F.conv2d(F.conv2d(flat, weight, groups=len(weight)), weight.mT, groups=len(weight))
    return flat.view_as(x)
