"""What all figures share: colours, how an image is shown, axes that start at zero or say so, and saving."""

from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from timm_tokens.files import replacing

# Okabe and Ito's colours, which colour-blind readers can tell apart; the last, grey, is for all that is left.
COLOURS = ("#E69F00", "#56B4E9", "#009E73", "#F0E442", "#0072B2", "#D55E00", "#CC79A7", "#777777")
LINES = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#CC79A7", "#56B4E9", "#777777")  # the dark ones first


def figure(width: float, height: float) -> Figure:
    """An empty figure of so many inches. Not pyplot's, which would need a display and keep state."""
    return Figure(figsize=(width, height), layout="constrained")


def show(axes: Axes, image: Tensor, title: str = "") -> None:
    """Show an image (1 or 3, h, w) of values in [0, 1], in coordinates from 0 to 1."""
    pixels = image.detach().float().clamp(0, 1).expand(3, -1, -1).permute(1, 2, 0).cpu().numpy()  # (h, w, 3)
    axes.imshow(pixels, extent=(0, 1, 1, 0), aspect=pixels.shape[0] / pixels.shape[1], interpolation="nearest")
    axes.set(xticks=[], yticks=[])
    axes.set_title(title, fontsize=10)


def from_zero(axes: Axes) -> None:
    """Start the vertical axis at zero; where that would hide all differences, say at which value it starts."""
    low, high = axes.get_ylim()
    if axes.dataLim.y0 < 0:
        return
    if low < 0.5 * high:
        axes.set_ylim(bottom=0)
    else:
        axes.set_ylabel(f"{axes.get_ylabel()}\n(axis starts at {low:.3g})")


def legend_beside(axes: Axes) -> None:
    """A legend to the right of the axes, where it covers nothing."""
    axes.legend(loc="upper left", bbox_to_anchor=(1.02, 1), borderaxespad=0, frameon=False, fontsize=8)


def save(picture: Figure, path: Path, dpi: int = 130) -> None:
    """Write a figure as the file's suffix says, whole or not at all."""
    with replacing(Path(path)) as partial:
        picture.savefig(partial, dpi=dpi, format=Path(path).suffix[1:])
