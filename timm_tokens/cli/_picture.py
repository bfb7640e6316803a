"""Pictures of patch groups: tensors in, tensors out, and a sheet of titled panels."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor


def paint_groups(groups: Tensor, image: Tensor, line: float = 1.0) -> Tensor:
    """Fill each group of patches with its mean colour, and draw a line two pixels wide where groups meet.

    Args:
        groups: (H, W) int64, equal for patches of one group.
        image: (C, h, w) colours, h >= H and w >= W.
        line: The lines' value in every channel.

    Returns:
        (C, h, w)

    Raises:
        ValueError: If the image has fewer pixels than there are patches.
    """
    (rows, columns), (height, width) = groups.shape, image.shape[1:]
    if height < rows or width < columns:
        raise ValueError(f"an image of {height} x {width} pixels can't show {rows} x {columns} patches; enlarge it")
    y, x = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    owner = groups.unique(return_inverse=True)[1][y][:, x]  # (h, w)
    colours = image.flatten(1)  # (C, h, w) -> (C, h * w)
    sums = colours.new_zeros(len(colours), int(owner.max()) + 1).index_add_(1, owner.flatten(), colours)
    painted = (sums / owner.flatten().bincount())[:, owner]
    painted[:, borders(owner)] = line
    return painted


def borders(owner: Tensor) -> Tensor:
    """The pixels (h, w) bool that touch a pixel of another owner (h, w) beside, above or below."""
    border = torch.zeros_like(owner, dtype=torch.bool)
    beside, below = owner[:, 1:] != owner[:, :-1], owner[1:] != owner[:-1]
    border[:, 1:] |= beside
    border[:, :-1] |= beside
    border[1:] |= below
    border[:-1] |= below
    return border


def enlarge(image: Tensor, side: int) -> Tensor:
    """An image (C, h, w) of values in [0, 1], its shorter side a whole number of times as long, and at least `side`."""
    factor = -(-side // min(image.shape[1:]))
    larger = torch.nn.functional.interpolate(image[None], scale_factor=factor, mode="bicubic", antialias=True)
    return larger[0].clamp(0, 1)


def sheet(panels: Sequence[tuple[str, Tensor]], gap: int = 16) -> Image.Image:
    """Titled images (3, h, w) of values in [0, 1], all of one size, side by side on white."""
    height, width = panels[0][1].shape[1:]
    font = ImageFont.load_default(size=max(12, width // 18))
    title = 2 * font.size
    picture = Image.new("RGB", (len(panels) * (width + gap) + gap, title + height + gap), "white")
    draw = ImageDraw.Draw(picture)
    for i, (text, image) in enumerate(panels):
        left = gap + i * (width + gap)
        draw.text((left + width / 2, title / 2), text, fill="black", font=font, anchor="mm")
        picture.paste(_to_pil(image), (left, title))
    return picture


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy())
