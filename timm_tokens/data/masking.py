"""Block-wise masks of patches, which a masked image model has to predict."""

import math
from collections.abc import Sequence
from typing import cast

import torch
from torch import Tensor

from timm_tokens.ops.ranges import check_counts, check_spans, check_within

# On the CPU: one for the whole batch, one for each image, or torch's own
Generator = torch.Generator | Sequence[torch.Generator] | None
_ROUNDS = 100  # 5 to 20 do, unless nearly everything is to be masked
_ATTEMPTS = 400  # with rejection; of 14 x 14 patches all images are done after 150


def block_masks(
    count: int | Tensor,
    grid: tuple[int, int],
    batch: int | None = None,
    *,
    min_block: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    generator: Generator = None,
) -> Tensor:
    """Mask exactly `count` patches of each image, in rectangles that may overlap.

    Rectangles are drawn one after the other, their area uniform between min_block and what is still to mask, the
    logarithm of their aspect ratio uniform, until there are enough; of the last one only the first rows are masked.
    All images of the batch are drawn at once.

    Args:
        count: Patches to mask: one number, or one for each image (B,).
        grid: (H, W), patches in a column and in a row.
        batch: B, where count is one number.
        min_block: The least area of a rectangle, in patches; None: a ninth of the grid, 16 of 14 x 14.
        aspect: Range of height over width.
        generator: On the CPU; a sequence of them, one for each image, makes masks that do not depend on the batch.

    Returns:
        (B, H W) bool, True where masked, on the CPU.

    Raises:
        ValueError: If a count is not in [0, H W], B is not given once, or there is not a generator for each image.

    Source: BEiT (arXiv 2106.08254), algorithm 1.
    """
    check_counts(rows_of_grid=grid[0], columns_of_grid=grid[1], min_block=1 if min_block is None else min_block)
    check_counts(0, batch=batch or 0)
    check_spans(aspect=aspect)
    counts = _counts(count, batch, grid[0] * grid[1])
    min_block = (min(grid) // 3) ** 2 if min_block is None else min_block
    mask = torch.zeros(len(counts), grid[0] * grid[1], dtype=torch.bool)
    for drawn in _uniform(len(counts), (_ROUNDS, 4), generator).unbind(1):
        missing = counts - mask.sum(1)
        if not missing.any():
            return mask
        block = _blocks(missing, grid, min_block, aspect, drawn).flatten(1) & ~mask
        mask |= block & (block.cumsum(1) <= missing[:, None])
    order = _uniform(len(mask), mask.shape[1:], generator).masked_fill_(mask, 2).argsort(1).argsort(1)
    return mask | (order < (counts - mask.sum(1))[:, None])


def random_ratio_masks(
    batch: int,
    grid: tuple[int, int],
    *,
    ratio: tuple[float, float] = (0.1, 0.5),
    prob: float = 0.5,
    min_block: int | None = None,
    aspect: tuple[float, float] = (0.3, 1 / 0.3),
    exact: bool = True,
    generator: Generator = None,
) -> Tensor:
    """`block_masks` of a different share of each image: with probability `prob` uniform in `ratio`, otherwise none.

    Args:
        batch: B.
        grid: (H, W), patches in a column and in a row.
        ratio: Range of the share.
        prob: Probability that an image has a mask.
        min_block: As for `block_masks`.
        aspect: As for `block_masks`.
        exact: Mask exactly the drawn share. False: as iBOT's code does, which rejects rectangles that mask too much,
            and gives up after ten in a row, so that masks may fall short.
        generator: As for `block_masks`.

    Returns:
        (B, H W) bool, True where masked, on the CPU.

    Raises:
        ValueError: If ratio or prob is not within [0, 1].

    Source: iBOT (arXiv 2111.07832), section 3.3 and appendix.
    """
    if not 0 <= ratio[0] <= ratio[1] <= 1:
        raise ValueError(f"ratio must be a range within [0, 1], low first, got {ratio}")
    check_within(prob=prob)
    check_counts(0, batch=batch)
    share, chosen = _uniform(batch, (2,), generator).unbind(1)
    counts = (ratio[0] + (ratio[1] - ratio[0]) * share) * (chosen < prob) * (grid[0] * grid[1])
    if not exact:
        return _rejecting(counts, grid, (min(grid) // 3) ** 2 if min_block is None else min_block, aspect, generator)
    return block_masks(counts.round().long(), grid, min_block=min_block, aspect=aspect, generator=generator)


def _uniform(batch: int, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Numbers (B, *shape) in [0, 1); with a generator for each image, an image's are from its own."""
    if generator is None or isinstance(generator, torch.Generator):
        return torch.rand(batch, *shape, generator=generator)
    if len(generator) != batch:
        raise ValueError(f"give one generator, or one for each of the {batch} images, got {len(generator)}")
    return torch.stack([torch.rand(shape, generator=own) for own in generator])


def _blocks(
    missing: Tensor, grid: tuple[int, int], min_block: int, aspect: tuple[float, float], drawn: Tensor
) -> Tensor:
    """One rectangle an image, (B, H, W) bool, of min_block to `missing` (B,) patches, by numbers (B, 4) in [0, 1)."""
    area = missing.clamp(max=min_block) + (missing - min_block).clamp(min=0) * drawn[:, 0]
    sides = [side.clamp(1, size) for side, size in zip(_sides(area, aspect, drawn[:, 1]), grid, strict=True)]
    return _rectangles(sides, grid, drawn[:, 2:])


def _sides(area: Tensor, aspect: tuple[float, float], drawn: Tensor) -> tuple[Tensor, Tensor]:
    """Height and width (B,) in whole patches, by numbers (B,) in [0, 1) for the aspect ratio."""
    ratio = (math.log(aspect[0]) + math.log(aspect[1] / aspect[0]) * drawn).exp()
    return (area * ratio).sqrt().round(), (area / ratio).sqrt().round()


def _rectangles(sides: Sequence[Tensor], grid: tuple[int, int], drawn: Tensor) -> Tensor:
    """Rectangles (B, H, W) bool with these sides, (B,) each, placed by numbers (B, 2) in [0, 1)."""
    inside = []
    for size, side, place in zip(grid, sides, drawn.unbind(1), strict=True):
        first, index = (place * (size - side + 1)).floor(), torch.arange(size)
        inside.append((index >= first[:, None]) & (index < (first + side)[:, None]))  # (B, size)
    return inside[0][:, :, None] & inside[1][:, None, :]


def _rejecting(
    wanted: Tensor, grid: tuple[int, int], min_block: int, aspect: tuple[float, float], generator: Generator
) -> Tensor:
    """Masks (B, H W) as iBOT's code draws them, which may fall short of the (B,) patches that are wanted.

    A rectangle that masks nothing new, or too much, is rejected; after ten in a row the image has enough.
    """
    mask, rejected = torch.zeros(len(wanted), *grid, dtype=torch.bool), torch.zeros(len(wanted))
    for drawn in _uniform(len(wanted), (_ATTEMPTS, 4), generator).unbind(1):
        missing = wanted - mask.sum((1, 2))
        active = (missing > 0) & (rejected < 10)
        if not active.any():
            break
        height, width = _sides(min_block + (missing - min_block) * drawn[:, 0], aspect, drawn[:, 1])
        new = _rectangles((height, width), grid, drawn[:, 2:]) & ~mask
        count = new.sum((1, 2))
        taken = active & (height < grid[0]) & (width < grid[1]) & (count > 0) & (count <= missing)
        mask |= new & taken[:, None, None]
        rejected = torch.where(taken, 0, rejected + 1)
    return mask.flatten(1)


def _counts(count: int | Tensor, batch: int | None, patches: int) -> Tensor:
    if isinstance(count, Tensor) == (batch is not None):
        raise ValueError("give count as one number with batch, or as a tensor (B,) without it")
    counts = count.cpu() if isinstance(count, Tensor) else torch.full((cast(int, batch),), count)
    if counts.numel() and not 0 <= counts.min() <= counts.max() <= patches:
        raise ValueError(f"count must be in [0, {patches}], got {counts.min():d} to {counts.max():d}")
    return counts
