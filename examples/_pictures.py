"""The examples' plot and picture, as matplotlib figures."""

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from _measure import Row
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor


def plot_accuracy(rows: Sequence[Row]) -> Figure:
    """Accuracy against GFLOPs with learned and with training-free merging."""
    figure = Figure(figsize=(6.4, 4.2), layout="constrained")
    axes = figure.add_subplot(xlabel="GFLOPs an image (multiply-adds)", ylabel="accuracy, %")
    gflops = [row.gflops for row in rows]
    axes.plot(gflops, [100 * row.training_free for row in rows], "s--C1", label="training-free (attention keys)")
    axes.plot(gflops, [100 * row.learned for row in rows], "o-C0", label="learned (DTEM)")
    for row in rows:
        point = row.gflops, 100 * max(row.learned, row.training_free)
        axes.annotate(f"r = {row.r}", point, (0, 7), textcoords="offset points", ha="center")
    axes.margins(x=0.1, y=0.15)
    axes.grid(alpha=0.3)
    axes.legend(loc="lower right")
    return figure


def draw_groups(images: Tensor, groups: Mapping[str, Tensor]) -> Figure:
    """One row an image: as it is, then groups of its patches, filled with their mean colour and outlined.

    Args:
        images: (B, 1 or 3, height, width), normalised in any way.
        groups: By title (B, rows, columns) int64, which token each patch ended in.
    """
    rows, columns = len(images), 1 + len(groups)
    figure = Figure(figsize=(1.7 * columns, 1.7 * rows + 0.3), layout="constrained")
    grid = figure.subplots(rows, columns, squeeze=False)
    for axes, title in zip(grid[0], ["image", *groups], strict=True):
        axes.set_title(title)
    low, high = images.amin((1, 2, 3), keepdim=True), images.amax((1, 2, 3), keepdim=True)
    for i, image in enumerate((images - low) / (high - low).clamp(min=1e-6)):
        _show(grid[i, 0], image)
        for axes, group in zip(grid[i, 1:], groups.values(), strict=True):
            _show(axes, fill(image, group[i]))
            axes.add_collection(LineCollection(outlines(group[i], image.shape[-1]), colors="tab:red", linewidths=0.8))
            axes.set_xlabel(f"{len(group[i].unique())} tokens", fontsize=8)
    return figure


def _show(axes: Axes, image: Tensor) -> None:
    axes.imshow(image.expand(3, -1, -1).permute(1, 2, 0).cpu().numpy(), extent=(0, image.shape[-1], image.shape[-2], 0))
    axes.set(xticks=[], yticks=[])


def fill(image: Tensor, group: Tensor) -> Tensor:
    """Replace each pixel of an image (channels, height, width) by the mean of its group of patches (rows, columns)."""
    patch = image.shape[-2] // group.shape[0], image.shape[-1] // group.shape[1]
    index = group.repeat_interleave(patch[0], 0).repeat_interleave(patch[1], 1).flatten()
    total = torch.zeros(len(image), int(index.max()) + 1, device=image.device).index_add(1, index, image.flatten(1))
    return (total / index.bincount().clamp(min=1))[:, index].view_as(image)


def outlines(group: Tensor, width: int) -> list[np.ndarray]:
    """The edges between patches of different groups, as segments in pixels of an image of this width."""
    group, scale = group.cpu().numpy(), width / group.shape[1]
    across = [((x + 1, y), (x + 1, y + 1)) for y, x in np.argwhere(group[:, 1:] != group[:, :-1])]
    below = [((x, y + 1), (x + 1, y + 1)) for y, x in np.argwhere(group[1:] != group[:-1])]
    return [scale * np.array(edge) for edge in across + below]
