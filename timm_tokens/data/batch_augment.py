"""Augmentations of whole batches on any device, where each image has its own parameters: torchvision's v2 draws one set
for a batch.

Shapes: B images (B, C, H, W) with values in [0, 1]. Whatever decides which images are changed is on the CPU, so that
nothing waits for the device.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor
from torchvision.transforms.v2.functional import rgb_to_grayscale

REACH = {"bicubic": 2.0, "bilinear": 1.0}  # of the filters, in pixels


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
