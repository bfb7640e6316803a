"""Which cells of a label map a patch token sees, and with what weight: RoIAlign written as sparse weights.

RoIAlign averages bilinear samples, so it is linear in the map: a token's score is a weighted sum over a small window of
cells. The window has the same number of cells for every box, so no shape depends on the data.
"""

import math
from typing import TypeAlias

import torch
from torch import Tensor

# The number of samples per token is ceil(cells per token). A box that spans a whole number of cells per token must not
# get one sample more by a rounding error.
_CEIL_SLACK = 1e-4
# How much further than in an upright view of the whole image a warped token may reach: rotated by 45 degrees, 1.41.
_WARP_REACH = 1.5

# The cells that each of N tokens sees, (B, N, S) int64, row * W + column, and their weights (B, N, S) float32.
Windows: TypeAlias = tuple[Tensor, Tensor]


def crop_windows(boxes: Tensor, flip: Tensor | None, grid: tuple[int, int], size: tuple[int, int]) -> Windows:
    """Windows of RoIAlign (torchvision's, `aligned=False`, adaptive sampling), a product of rows and columns.

    The boxes, and which are flipped, are as in `crop_token_labels`; `grid` is the label map's, `size` the tokens'.
    """
    (top, left, height, width), (H, W), (rows, cols) = boxes.float().unbind(-1), grid, size
    first_y, weight_y = _align_axis(top, height, H, rows)
    first_x, weight_x = _align_axis(left, width, W, cols)
    if flip is not None:
        first_x = torch.where(flip[:, None], first_x.flip(1), first_x)
        weight_x = torch.where(flip[:, None, None], weight_x.flip(1), weight_x)
    # (B, rows, T), (B, cols, T) -> (B, rows, cols, T, T)
    y = _taps(first_y, weight_y)[:, :, None, :, None]
    x = _taps(first_x, weight_x)[:, None, :, None, :]
    weights = weight_y[:, :, None, :, None] * weight_x[:, None, :, None, :]
    return (y * W + x).flatten(3).flatten(1, 2), weights.flatten(3).flatten(1, 2)


def warp_windows(maps: Tensor, grid: tuple[int, int], size: tuple[int, int]) -> Windows:
    """Windows of the same average under an affine map, as in `warp_token_labels`; for an upright map they are those of
    `crop_windows`."""
    (H, W), (rows, cols) = grid, size
    origin, down, right, length_down, length_right = _view_in_cells(maps, H, W)
    down, right = down / rows, right / cols  # the edges of one token

    # Places of the samples from the token's centre: (B, 2) -> (B, n, n, 2) -> (B, 1, n * n, 2)
    most = _WARP_REACH * max(grid) / min(size)
    (a, on_a), (b, on_b) = _spread(length_down / rows, math.ceil(most)), _spread(length_right / cols, math.ceil(most))
    within = down[:, None, None] * (a - 0.5)[:, :, None, None] + right[:, None, None] * (b - 0.5)[:, None, :, None]
    taps = _num_taps(most)
    reach = (taps - 2) / 2  # a footprint too long for the window is sampled over its middle
    within = within.flatten(1, 2).clamp(-reach, reach)[:, None]
    on = (on_a[:, :, None] * on_b[:, None]).flatten(1)[:, None, :, None]

    i, j = (torch.arange(n, device=maps.device)[:, None] + 0.5 for n in (rows, cols))
    centres = origin[:, None, None] + down[:, None, None] * i[:, None] + right[:, None, None] * j  # (B, rows, cols, 2)
    y, x = (centres.flatten(1, 2)[:, :, None] + within).unbind(-1)  # (B, N, n * n)
    (first_y, tents_y), (first_x, tents_x) = _tents(y, H, taps), _tents(x, W, taps)
    # Products and sums, not a matmul, which autocast rounds to bfloat16 and a GPU perhaps to TF32.
    weights = torch.stack([(tent[..., None] * on * tents_x).sum(2) for tent in tents_y.unbind(-1)], 2)  # (B, N, T, T)
    y, x = _taps(first_y, tents_y)[..., :, None], _taps(first_x, tents_x)[..., None, :]
    return (y * W + x).flatten(2), weights.flatten(2)


def _view_in_cells(maps: Tensor, H: int, W: int) -> tuple[Tensor, ...]:
    """Corner, left and top edge of a view as (row, column) in cells, (B, 2) each, and the edges' lengths (B,)."""
    down, right, origin = torch.stack([maps[:, 0] * H, maps[:, 1] * W], 1).float().unbind(-1)
    length_down, length_right = down.norm(dim=-1), right.norm(dim=-1)
    # RoIAlign makes a side shorter than one cell one cell long, and keeps its top left end in place.
    long_down = down / length_down.clamp(1e-6, 1)[:, None]
    long_right = right / length_right.clamp(1e-6, 1)[:, None]
    origin = origin - 0.5 + (down - long_down).clamp(min=0) + (right - long_right).clamp(min=0)
    return origin, long_down, long_right, length_down, length_right


def _align_axis(start: Tensor, length: Tensor, cells: int, tokens: int) -> tuple[Tensor, Tensor]:
    """RoIAlign along one axis: the first cell of every token's window (B, tokens) and its weights (B, tokens, T)."""
    start, length = start * cells - 0.5, (length * cells).clamp(min=1)
    most = max(cells / tokens, 1 / tokens)
    place, on = _spread(length / tokens, math.ceil(most))
    step = torch.arange(tokens, device=start.device)[:, None] + place[:, None]  # (B, tokens, n)
    points = start[:, None, None] + (length / tokens)[:, None, None] * step
    first, tents = _tents(points, cells, _num_taps(most))
    return first, (tents * on[:, None, :, None]).sum(2)


def _spread(length: Tensor, most: int) -> tuple[Tensor, Tensor]:
    """Samples of a token `length` (B,) cells long: places in [0, 1] and weights that sum to 1, (B, most) each."""
    count = (length - _CEIL_SLACK).ceil().clamp(1, most)[:, None]
    k = torch.arange(most, device=length.device)
    # Samples beyond the count repeat the last one with weight 0, and so never widen the window.
    return (torch.minimum(k, count - 1) + 0.5) / count, (k < count) / count


def _num_taps(cells_per_token: float) -> int:
    """Cells that the samples of one token can touch along one axis."""
    samples = math.ceil(cells_per_token)
    return math.ceil(cells_per_token * (samples - 1) / samples) + 2


def _tents(points: Tensor, cells: int, taps: int) -> tuple[Tensor, Tensor]:
    """Bilinear weights along one axis: points (B, N, n) -> first cell (B, N), weights (B, N, n, T)."""
    taps = min(taps, cells)
    inside = (points >= -1) & (points <= cells)  # one cell beyond the border still counts, as in torchvision
    points = points.clamp(0, cells - 1)
    first = points.amin(-1).floor().clamp(max=cells - taps)
    tap = first[..., None] + torch.arange(taps, device=points.device)
    weights = (1 - (points[..., None] - tap[:, :, None]).abs()).clamp(min=0)
    return first.long(), weights * inside[..., None]


def _taps(first: Tensor, weights: Tensor) -> Tensor:
    """(B, N) first cells -> (B, N, T) cells of the windows."""
    return first[..., None] + torch.arange(weights.shape[-1], device=first.device)
