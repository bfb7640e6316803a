"""Which patches of an image became one token."""

from collections.abc import Mapping

import torch
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from torch import Tensor

from timm_tokens.drawing.style import LINES, figure, show


def draw_groups(images: Tensor, groups: Mapping[str, Tensor], first: str = "image") -> Figure:
    """A row for each image: as it is, then its groups of patches, outlined.

    Groups of a colour image are filled with their mean colour. Where the patches of a token do not touch, it is split:
    the same number is written on each of its pieces. Groups of a grey image are tinted, each token in a colour of its
    own, and patches that are a token by themselves stay grey.

    Args:
        images: (B, 1 or 3, h, w), values in [0, 1].
        groups: By title, (B, rows, columns) int64: which token each patch ended in.
        first: Title of the column of images.
    """
    columns = 1 + len(groups)
    picture = figure(2.3 * columns, 2.6 * len(images) + 0.2)
    grid = picture.subplots(len(images), columns, squeeze=False)
    for axes, image in zip(grid[:, 0], images, strict=True):
        show(axes, image, first)
    grey = images.shape[1] == 1
    for column, (title, of_all) in enumerate(groups.items(), 1):
        for axes, image, group in zip(grid[:, column], images.cpu(), of_all.cpu(), strict=True):
            show(axes, tint(image, group) if grey else fill(image, group), title)
            axes.add_collection(LineCollection(outlines(group), colors="white", linewidths=0.9))
            split = 0 if grey else mark_pieces(axes, group)
            axes.set_xlabel(f"{len(group.unique())} tokens" + (f", {split} split" if split else ""), fontsize=9)
    same = "patches of one colour belong to one token; grey ones are tokens of their own"
    words = same if grey else "pieces with the same number belong to one token"
    picture.supxlabel(words, fontsize=8, color="grey")
    return picture


def fill(image: Tensor, group: Tensor) -> Tensor:
    """Give each pixel of an image (C, h, w) the mean colour of its group of patches (rows, columns)."""
    owner = enlarge(group.unique(return_inverse=True)[1], image)
    sums = image.new_zeros(len(image), int(owner.max()) + 1).index_add_(1, owner.flatten(), image.flatten(1))
    return (sums / owner.flatten().bincount().clamp_min(1))[:, owner]


def tint(image: Tensor, group: Tensor) -> Tensor:
    """Colour a grey image (1, h, w) by its groups of several patches (rows, columns), the largest first: (3, h, w)."""
    _, token, sizes = group.unique(return_inverse=True, return_counts=True)
    lines = LINES[:-1]  # all but grey
    order = sizes.argsort(descending=True, stable=True)
    colors = torch.ones(len(sizes), 3)
    for place, number in enumerate(order[sizes[order] > 1].tolist()):
        paler = 1 - 0.5 ** (place // len(lines))
        colors[number] = torch.tensor(to_rgb(lines[place % len(lines)])).lerp(torch.ones(3), paler)
    return colors.T[:, enlarge(token, image)] * (0.4 + 0.6 * image)


def enlarge(cells: Tensor, image: Tensor) -> Tensor:
    """Cells of an image, for each of its pixels: (..., rows, columns) and (C, h, w) -> (..., h, w)."""
    (rows, columns), (height, width) = cells.shape[-2:], image.shape[-2:]
    y, x = torch.arange(height) * rows // height, torch.arange(width) * columns // width
    return cells[..., y, :][..., x]


def outlines(group: Tensor) -> list[list[tuple[float, float]]]:
    """Edges between patches (rows, columns) of different groups: segments (x, y) in coordinates from 0 to 1."""
    rows, columns = group.shape
    beside = (group[:, 1:] != group[:, :-1]).nonzero().tolist()
    below = (group[1:] != group[:-1]).nonzero().tolist()
    edges = [((x + 1, y), (x + 1, y + 1)) for y, x in beside] + [((x, y + 1), (x + 1, y + 1)) for y, x in below]
    return [[(x / columns, y / rows) for x, y in edge] for edge in edges]


def pieces(group: Tensor) -> Tensor:
    """Number the connected pieces of groups (rows, columns): patches of a group that touch have the same number."""
    piece = torch.arange(group.numel()).view_as(group)
    while True:  # each patch takes the smallest number among its neighbours of the same group
        before = piece.clone()
        for axis in (0, 1):
            a, b = piece.narrow(axis, 0, piece.shape[axis] - 1), piece.narrow(axis, 1, piece.shape[axis] - 1)
            same = group.diff(dim=axis) == 0
            smaller = torch.minimum(a, b)
            a.copy_(torch.where(same, smaller, a))
            b.copy_(torch.where(same, torch.minimum(b, a), b))
        if torch.equal(piece, before):
            return piece


def mark_pieces(axes: Axes, group: Tensor) -> int:
    """Write a token's number on each of its pieces, where it has several; returns how many tokens have."""
    (rows, columns), piece, split = group.shape, pieces(group), 0
    for token in group.unique():
        parts = piece[group == token].unique()
        if len(parts) == 1:
            continue
        split += 1
        for part in parts:
            y, x = (piece == part).nonzero()[0].add(0.5).tolist()
            text = axes.text(x / columns, y / rows, str(split), ha="center", va="center", color="white", fontsize=5)
            text.set_path_effects([withStroke(linewidth=1, foreground="black")])  # also on white patches
    return split
