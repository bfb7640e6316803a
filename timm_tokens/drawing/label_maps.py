"""Label maps, and the targets that token labeling makes of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Polygon
from torch import Tensor

from timm_tokens.drawing.groups import enlarge, outlines
from timm_tokens.drawing.style import COLOURS, figure, show


class LabelPanel(NamedTuple):
    """One panel of a picture of label maps.

    Attributes:
        title: Above the panel.
        image: (3, h, w), values in [0, 1].
        probabilities: (K, H, W) of each class in each cell; None shows the image alone.
        corners: (4, 2) the corners of a crop, (row, column) from 0 to 1; None for none.
    """

    title: str
    image: Tensor
    probabilities: Tensor | None = None
    corners: Tensor | None = None


def draw_label_maps(panels: Sequence[LabelPanel], names: Sequence[str], note: str = "") -> Figure:
    """Panels side by side: each cell has the colour of its most probable class, the stronger the more probable.

    Args:
        panels: From left to right.
        names: (K,) what the classes are called.
        note: A line above the legend.
    """
    widths = [panel.image.shape[2] / panel.image.shape[1] for panel in panels]
    picture = figure(3.2 * sum(widths), 4.1)
    legend = frequent_classes([p.probabilities for p in panels if p.probabilities is not None])
    for axes, panel in zip(
        picture.subplots(1, len(panels), width_ratios=widths, squeeze=False)[0], panels, strict=True
    ):
        if panel.probabilities is None:
            show(axes, panel.image, panel.title)
        else:
            show(axes, tint(panel.image, panel.probabilities, legend), panel.title)
            for edge in outlines(panel.probabilities.argmax(dim=0)):
                axes.plot(*zip(*edge, strict=True), color="white", linewidth=0.8)
        if panel.corners is not None:
            for colour, width in (("black", 3.5), ("white", 1.8)):
                axes.add_patch(Polygon(panel.corners.flip(1), fill=False, edgecolor=colour, linewidth=width))
    entries = [Patch(color=COLOURS[i], label=names[k]) for i, k in enumerate(legend)]
    if len(legend) == len(COLOURS) - 1:
        entries.append(Patch(color=COLOURS[-1], label="other classes"))
    title = f"{note}\nThe stronger the colour, the more probable the class.".strip()
    picture.legend(handles=entries, loc="outside lower center", ncols=4, frameon=False, title=title, fontsize=9)
    return picture


def frequent_classes(maps: Sequence[Tensor]) -> list[int]:
    """The classes that get a colour of their own: those that are most often the best of a cell of maps (K, H, W)."""
    best = torch.cat([probabilities.argmax(dim=0).flatten() for probabilities in maps])
    classes, counts = best.unique(return_counts=True)
    return classes[counts.argsort(descending=True, stable=True)][: len(COLOURS) - 1].tolist()


def tint(image: Tensor, probabilities: Tensor, legend: Sequence[int]) -> Tensor:
    """Tint the cells of a grey copy of an image (3, h, w) with the colours of their most probable classes (K, H, W)."""
    probability, best = probabilities.max(dim=0)
    slots = torch.full((len(probabilities),), len(COLOURS) - 1)
    slots[list(legend)] = torch.arange(len(legend))
    colours = torch.tensor([to_rgb(colour) for colour in COLOURS])[slots[best]].permute(2, 0, 1)  # (3, H, W)
    return torch.lerp(image.mean(0, keepdim=True), enlarge(colours, image), 0.8 * enlarge(probability, image))
