"""MixToken: CutMix on the patch grid, after the patch embedding, so that no token mixes two images.

Jiang et al., NeurIPS 2021, https://arxiv.org/abs/2104.10858, Sec. 3.2
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from timm_tokens.ops.chunking import makes_graph
from timm_tokens.ops.ranges import check_counts


def draw_mix_box(grid: tuple[int, int], generator: torch.Generator | None = None, *, even: bool = False) -> Tensor:
    """Draw a CutMix box on the patch grid: an area of about 1 - lambda, lambda ~ Beta(1, 1), around a uniform centre.

    Args:
        grid: H, W of the patch grid.
        generator: On the CPU.
        even: Extents are even numbers of cells, 2 * (cut // 2), as in the paper's code: odd ones lose a cell there.

    Returns:
        (4,) int64 on the CPU: top, left, bottom, right, the last two exclusive. The box is cut at the border and may be
        empty. A tensor, and not four ints, so that a compiled model does not recompile for each box.

    Raises:
        ValueError: The grid is empty.
    """
    check_counts(rows_of_grid=grid[0], columns_of_grid=grid[1])
    lam, *centre = torch.rand(3, generator=generator, dtype=torch.float64).unbind()  # Beta(1, 1) is uniform
    cells = torch.tensor(grid)
    extent = (cells * (1 - lam).sqrt()).long()
    extent = extent // 2 * 2 if even else extent
    start = (cells * torch.stack(centre)).long() - extent // 2
    return torch.cat([start.clamp(min=0), torch.minimum(start + extent, cells)])


def mix_tokens(x: Tensor, box: Tensor | Sequence[int], grid: tuple[int, int]) -> Tensor:
    """Exchange the tokens inside the box with those of the flipped batch. Its own inverse.

    Applied to the patch embeddings it mixes the images; applied to the dense outputs it returns every token's output to
    the image that the token came from.

    Args:
        x: (B, N, C) patch tokens, row by row, without prefix tokens.
        box: Top, left, bottom, right on the grid, the last two exclusive: a (4,) tensor or four ints.
        grid: H, W of the patch grid, H * W = N.

    Returns:
        (B, N, C).

    Raises:
        ValueError: N is not H * W, or the box is not on the grid.
    """
    H, W = grid
    check_counts(rows_of_grid=H, columns_of_grid=W)
    _check_box(box, H * W, H, W)
    if x.ndim != 3 or x.shape[1] != H * W:
        raise ValueError(f"x must be (B, N, C) with N = {H} * {W} = {H * W} patch tokens, got {tuple(x.shape)}")
    top, left, bottom, right = box
    row, column = torch.arange(H, device=x.device)[:, None], torch.arange(W, device=x.device)
    inside = (row >= top) & (row < bottom) & (column >= left) & (column < right)
    return torch.where(inside.flatten()[:, None], x.flip(0), x)


def mix_ratio(box: Tensor | Sequence[int], num_tokens: int) -> Tensor | float:
    """Share of an image's own tokens: lambda = 1 - area of the box / N. A tensor for a tensor box, else a float.

    Raises:
        ValueError: The box has more than N tokens, or ends before it starts.
    """
    check_counts(num_tokens=num_tokens)
    _check_box(box, num_tokens)
    top, left, bottom, right = box
    return 1 - (bottom - top) * (right - left) / num_tokens


def _check_box(box: Tensor | Sequence[int], num_tokens: int, rows: float = math.inf, columns: float = math.inf) -> None:
    """Refuse what is no box of a grid, where that can be told without waiting for a device or tracing a branch."""
    if isinstance(box, Tensor):
        if box.device.type != "cpu" or makes_graph():
            return
        box = box.tolist()
    top, left, bottom, right = box
    ordered = 0 <= top <= bottom <= rows and 0 <= left <= right <= columns
    if not ordered or (bottom - top) * (right - left) > num_tokens:
        raise ValueError(f"box must be top, left, bottom, right within a grid of {num_tokens} tokens, got {tuple(box)}")
