import math
from functools import partial

import numpy as np
import pytest
import torch

from timm_tokens.data import block_masks, random_ratio_masks
from timm_tokens.data.masking import _blocks


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize(
    ("grid", "count"), [((14, 14), 75), ((8, 8), 30), ((4, 6), 7), ((14, 14), 0), ((7, 5), 35), ((1, 1), 1)]
)
def test_exactly_so_many(grid, count):
    masks = block_masks(count, grid, 32, generator=generator())
    assert masks.shape == (32, grid[0] * grid[1]) and masks.dtype == torch.bool
    assert (masks.sum(1) == count).all()


def test_a_count_an_image():
    counts = torch.tensor([0, 3, 75, 196, 195, 1])
    assert block_masks(counts, (14, 14), generator=generator()).sum(1).equal(counts)


def test_masks_are_blocks():
    """Most masked patches have masked neighbours on all sides, which scattered ones do not."""

    def inner(masks):
        x = masks.unflatten(1, (14, 14))
        return (x[:, 1:-1, 1:-1] & x[:, 2:, 1:-1] & x[:, :-2, 1:-1] & x[:, 1:-1, 2:] & x[:, 1:-1, :-2]).sum() / x.sum()

    scattered = torch.rand(64, 196, generator=generator()).argsort(1) < 75
    assert inner(block_masks(75, (14, 14), 64, generator=generator())) > 0.35 > 5 * inner(scattered)


def test_corners_are_masked_too_and_no_side_is_preferred():
    share = block_masks(75, (14, 14), 4000, generator=generator()).float().mean(0).unflatten(0, (14, 14))
    assert share.min() > 0.03 and share.max() < 0.75  # the middle more than the corners, as rectangles lie inside
    assert (share - share.flip(0)).abs().max() < 0.05 and (share - share.flip(1)).abs().max() < 0.05


def test_the_rectangles_obey_their_limits():
    missing = torch.tensor([75] * 500 + [5] * 50)
    x = _blocks(missing, (14, 14), 16, (0.3, 1 / 0.3), torch.rand(550, 4, generator=generator()))
    rows, columns, area = x.any(2).sum(1), x.any(1).sum(1), x.sum((1, 2))
    assert torch.equal(area, rows * columns)  # rectangles indeed
    assert 13 <= area[:500].min() < 18 and 70 < area[:500].max() <= 84  # (sqrt(75) + 1/2)^2: sides are rounded
    assert area[500:].max() <= 6
    ratio = (rows / columns)[:500]
    assert 0.25 <= ratio.min() < 0.4 and 2.5 < ratio.max() <= 4  # as the rounded sides have it


def test_drawn_from_the_generator_alone():
    state = torch.get_rng_state()
    first = block_masks(75, (14, 14), 8, generator=generator(3))
    assert torch.equal(first, block_masks(75, (14, 14), 8, generator=generator(3)))
    assert not torch.equal(first, block_masks(75, (14, 14), 8, generator=generator(4)))
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("draw", [partial(block_masks, 75), random_ratio_masks])
def test_a_generator_for_each_image_decides_its_mask_alone(draw):
    whole = draw(grid=(14, 14), batch=6, generator=[generator(i) for i in range(6)])
    part = draw(grid=(14, 14), batch=2, generator=[generator(4), generator(2)])
    assert torch.equal(part, whole[[4, 2]]) and len(whole.unique(dim=0)) > 3
    with pytest.raises(ValueError, match="one for each of the 2 images, got 3"):
        draw(grid=(14, 14), batch=2, generator=[generator(i) for i in range(3)])


def test_random_ratios():
    counts = random_ratio_masks(2000, (14, 14), generator=generator()).sum(1)
    none = (counts == 0).float().mean()
    assert 0.45 < none < 0.55
    shares = counts[counts > 0] / 196
    assert 0.09 < shares.min() < 0.12 and 0.48 < shares.max() <= 0.5 and abs(shares.mean() - 0.3) < 0.02
    assert (random_ratio_masks(20, (6, 6), ratio=(0.3, 0.3), prob=1.0).sum(1) == 11).all()


def published_mask(high, grid, attempts):
    """iBOT's code (loader.py), rectangle by rectangle; an attempt takes the next four of the draws in [0, 1)."""
    (H, W), mask, low = grid, np.zeros(grid, dtype=bool), (min(grid) // 3) ** 2
    while mask.sum() < high:
        missing, done = high - mask.sum(), False
        for _ in range(10):
            u = next(attempts)
            area = low + (missing - low) * u[0]
            ratio = math.exp(math.log(0.3) + (math.log(1 / 0.3) - math.log(0.3)) * u[1])
            h, w = round(math.sqrt(area * ratio)), round(math.sqrt(area / ratio))
            if w < W and h < H:
                top, left = int(u[2] * (H - h + 1)), int(u[3] * (W - w + 1))
                new = h * w - mask[top : top + h, left : left + w].sum()
                if 0 < new <= missing:
                    mask[top : top + h, left : left + w] = done = True
            if done:
                break
        if not done:
            break
    return mask


@pytest.mark.parametrize("grid", [(14, 14), (6, 6), (7, 12)])
def test_masks_with_rejection_are_the_published_ones(grid):
    batch, patches = 200, grid[0] * grid[1]
    masks = random_ratio_masks(batch, grid, exact=False, generator=[generator(i) for i in range(batch)])
    short = 0
    for i, mask in enumerate(masks):
        own = generator(i)
        share, chosen = torch.rand(2, generator=own)
        high = float((0.1 + (0.5 - 0.1) * share) * (chosen < 0.5) * patches)
        attempts = iter(torch.rand(400, 4, generator=own).tolist())
        expected = published_mask(high, grid, attempts)
        assert torch.equal(mask, torch.from_numpy(expected).flatten()), i
        short += mask.sum() < high - 1
    assert short > 5


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((20, (4, 4), 2), r"count must be in \[0, 16\], got 20 to 20"),
        ((-1, (4, 4), 2), "got -1 to -1"),
        ((torch.tensor([3, 17]), (4, 4)), "got 3 to 17"),
        ((3, (4, 4)), "give count as one number with batch"),
        ((torch.tensor([3]), (4, 4), 2), "give count as one number with batch"),
    ],
)
def test_impossible_counts_are_refused(arguments, message):
    with pytest.raises(ValueError, match=message):
        block_masks(*arguments)


def test_impossible_ratios_are_refused():
    with pytest.raises(ValueError, match=r"got \(0.5, 0.1\)"):
        random_ratio_masks(2, (4, 4), ratio=(0.5, 0.1))
    with pytest.raises(ValueError, match=r"prob must be in .* got 1\.5"):
        random_ratio_masks(2, (4, 4), prob=1.5)
