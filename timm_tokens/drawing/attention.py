"""What a model's tokens attend to, and how similar they are."""

from collections.abc import Mapping

import torch.nn.functional as F
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from timm_tokens.drawing.style import figure, show


def draw_attention(image: Tensor, rows: Mapping[str, Mapping[str, Tensor]], cosine: Tensor) -> Figure:
    """An image, rows of maps over it, each row with one scale from zero, and the cosines between the tokens.

    Args:
        image: (3, h, w), values in [0, 1].
        rows: By what is shown ("attention", "pooling weight"), the maps (H, W) of tokens by their names.
        cosine: (T, T), in the order of the names. A name that stands in no row, such as a global token without
            attention, is "global".
    """
    columns = max(2, *(len(maps) for maps in rows.values()))
    picture = figure(1.9 * columns + 1, 2.4 + 2.2 * len(rows))
    first, *others = picture.subfigures(1 + len(rows), height_ratios=[2.4] + [2.2] * len(rows), squeeze=False)[:, 0]
    left, right = first.subplots(1, 2)
    show(left, image, "image")
    names = [name for maps in rows.values() for name in maps]
    _draw_cosines(right, ["global"] * (len(cosine) - len(names)) + names, cosine)
    for strip, (what, maps) in zip(others, rows.items(), strict=True):
        cells = strip.subplots(1, columns)
        top = max(float(values.max()) for values in maps.values())
        for axes in cells[len(maps) :]:
            axes.set_axis_off()
        for axes, (name, values) in zip(cells, maps.items(), strict=False):
            show(axes, image.mean(0, keepdim=True), name)
            larger = F.interpolate(values[None, None], size=image.shape[1:], mode="bilinear")[0, 0].cpu().numpy()
            aspect = axes.get_aspect()
            heat = axes.imshow(larger, "viridis", alpha=0.7, vmin=0, vmax=top, extent=(0, 1, 1, 0), aspect=aspect)
        strip.colorbar(heat, ax=list(cells), label=what, shrink=0.8)
    return picture


def _draw_cosines(axes: Axes, names: list[str], cosine: Tensor) -> None:
    shades = axes.imshow(cosine.cpu().numpy(), "cividis", vmin=-1, vmax=1)
    axes.set_xticks(range(len(names)), names, rotation=90, fontsize=5)
    axes.set_yticks(range(len(names)), names, fontsize=5)
    axes.set_title("cosine similarity", fontsize=10)
    axes.figure.colorbar(shades, ax=axes, shrink=0.8)
