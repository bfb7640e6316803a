"""Pictures of patches and classes: tensors in, tensors out, and a sheet of titled panels with a legend."""

from collections.abc import Sequence

import torch
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from torchvision.transforms.functional import pil_to_tensor

SIDE = 448  # pixels of a panel's shorter side, at least


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


def paint_classes(classes: Tensor, strength: Tensor, colours: Tensor, image: Tensor) -> Tensor:
    """Tint the cells of a grey image with their classes' colours, and draw a white line where classes meet.

    Args:
        classes: (H, W) int64, rows of `colours`.
        strength: (H, W) in [0, 1], how much of the tint a cell gets.
        colours: (n, 3)
        image: (3, h, w), h >= H and w >= W.

    Returns:
        (3, h, w)
    """
    (rows, columns), (height, width) = classes.shape, image.shape[1:]
    y, x = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    owner, share = classes[y][:, x], strength[y][:, x]  # (h, w)
    painted = torch.lerp(image.mean(0, keepdim=True), colours[owner].permute(2, 0, 1), share)
    painted[:, borders(owner)] = 1.0
    return painted


def outline(image: Tensor, corners: Sequence[tuple[float, float]]) -> Tensor:
    """Draw a polygon on an image (3, h, w); its corners are (row, column) as fractions of the image."""
    height, width = image.shape[1:]
    picture, points = _to_pil(image), [(column * (width - 1), row * (height - 1)) for row, column in corners]
    draw = ImageDraw.Draw(picture)
    for colour, thickness in (("black", 6), ("white", 3)):
        draw.line([*points, *points[:2]], fill=colour, width=thickness, joint="curve")
    return from_pil(picture)


def sheet(
    panels: Sequence[tuple[str, Tensor]], legend: Sequence[tuple[str, Tensor]] = (), note: str = "", gap: int = 16
) -> Image.Image:
    """Titled images (3, h, w) of values in [0, 1], all of one height, side by side on white.

    Args:
        panels: Titles and images.
        legend: Names and colours (3,), below the panels.
        note: A last line.
    """
    height = panels[0][1].shape[1]
    font = ImageFont.load_default(size=max(12, height // 18))
    line, width = 2 * font.size, gap + sum(image.shape[2] + gap for _, image in panels)
    below = line + height + gap  # where the legend starts
    places = _flow([font.getlength(name) + 3 * font.size for name, _ in legend], width - gap)
    lines = (places[-1][1] + 1 if places else 0) + bool(note)
    picture = Image.new("RGB", (width, below + lines * line), "white")
    draw, left = ImageDraw.Draw(picture), gap
    for text, image in panels:
        draw.text((left + image.shape[2] / 2, line / 2), text, fill="black", font=font, anchor="mm")
        picture.paste(_to_pil(image), (left, line))
        left += image.shape[2] + gap
    for (name, colour), (x, row) in zip(legend, places, strict=True):
        left, top = gap + x, below + row * line
        swatch = [left, top + line / 4, left + font.size, top + 3 * line / 4]
        draw.rectangle(swatch, fill=tuple(colour.mul(255).round().int().tolist()), outline="black")
        draw.text((left + 1.5 * font.size, top + line / 2), name, fill="black", font=font, anchor="lm")
    if note:
        draw.text((gap, below + (lines - 0.5) * line), note, fill="black", font=font, anchor="lm")
    return picture


def rows_of_panels(rows: Sequence[Sequence[tuple[str, Tensor]]], gap: int = 16) -> Image.Image:
    """Rows of titled images, as `sheet` makes one, one below the other."""
    sheets = [sheet(panels, gap=gap) for panels in rows]
    picture = Image.new("RGB", (max(s.width for s in sheets), sum(s.height for s in sheets)), "white")
    top = 0
    for one in sheets:
        picture.paste(one, (0, top))
        top += one.height
    return picture


def paint_heat(values: Tensor, image: Tensor) -> Tensor:
    """A map of values (H, W), from its least, dark, to its largest, bright, over the grey image (3, h, w)."""
    spread = (values.max() - values.min()).clamp_min(1e-12)
    heat = ((values - values.min()) / spread)[None, None]
    heat = torch.nn.functional.interpolate(heat, size=image.shape[1:], mode="bilinear")[0]  # (1, h, w)
    grey = image.mean(dim=0, keepdim=True)
    return torch.lerp(0.5 * grey.expand(3, -1, -1), _ramp(heat[0]), 0.25 + 0.5 * heat)


def paint_matrix(values: Tensor, side: int) -> Tensor:
    """A matrix (T, T) of values from -1, dark, to 1, bright, as an image (3, side, side)."""
    cells = torch.arange(side) * values.shape[0] // side
    return _ramp((values[cells][:, cells] / 2 + 0.5).clamp(0, 1))


def _ramp(values: Tensor) -> Tensor:
    """Values in [0, 1] as colours from black over red and yellow to white: (h, w) -> (3, h, w)."""
    return torch.stack([(3 * values - start).clamp(0, 1) for start in (0, 1, 2)])


def _flow(widths: Sequence[float], line_width: float) -> list[tuple[float, int]]:
    """Where things of these widths come to stand, in lines of at most `line_width`: (left, line)."""
    places, left, line = [], 0.0, 0
    for width in widths:
        if left and left + width > line_width:
            left, line = 0.0, line + 1
        places.append((left, line))
        left += width
    return places


def from_pil(image: Image.Image) -> Tensor:
    """(3, h, w) values in [0, 1]."""
    return pil_to_tensor(image).float() / 255


def _to_pil(image: Tensor) -> Image.Image:
    return Image.fromarray(image.mul(255).round().byte().permute(1, 2, 0).contiguous().numpy())
