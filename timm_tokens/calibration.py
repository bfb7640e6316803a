"""How many tokens to merge in which block: the schedule that changes the outputs least at a share of the FLOPs."""

import math
from collections.abc import Iterable, Sequence
from itertools import accumulate, pairwise
from typing import Any, cast

import numpy as np
import torch
from timm.utils import unwrap_model
from torch import Tensor
from tqdm import tqdm

from timm_tokens.losses import DistillLoss
from timm_tokens.merger_file import merger_of
from timm_tokens.ops.schedule import token_counts
from timm_tokens.outputs import classifies, evaluating
from timm_tokens.replay import Replay, as_batches
from timm_tokens.vit import TokenViT

Schedule = tuple[int, ...]
BATCH = 32  # images at a time: what a CPU's caches and a small GPU take
KNOTS = 4  # weights from which those of the blocks are interpolated; the last block has one of its own
STEPS = (2.0, 1.5, 1.25)  # factors by which a weight is changed


@torch.no_grad()
def calibrate(
    model: TokenViT, images: Tensor | Iterable[Tensor], flops_ratio: float = 0.6,
    *, max_blocks: int | None = None, progress: bool = True,
) -> Schedule:  # fmt: skip
    """Choose how many tokens each block merges, by unlabelled images, and set `model.merger.r` to it.

        timm_tokens.calibrate(model, images, flops_ratio=0.6)  # a hundred images or more, prepared as for the model

    Of the schedules with these FLOPs it looks for the one that changes the outputs least: by the KL divergence of the
    class probabilities from those without merging, or, for a model without classes, by the cosine of its class token
    and its un-merged patches. Schedules are smooth: merging starts in some block, and from there on the number of
    tokens changes gradually. What each block merged if it were free to differ from its neighbours fits a hundred images
    better and others worse. The result is the same each time, and its shapes are as static as those of any schedule.

    Args:
        model: A TokenViT with a merger, learned or by keys; DDP and torch.compile around it are looked through. It is
            run as in evaluation, whatever mode it is in.
        images: A tensor (B, 3, H, W), or an iterable of images or batches of one size, such as a data loader; of
            (images, labels) the images are taken. All are kept in memory.
        flops_ratio: Largest share of the FLOPs without merging, in (0, 1].
        max_blocks: Merge in so many blocks at most, evenly spaced. Merging costs small operations in each block that
            merges, which take most of the time at batch size 1. None: in any number of blocks.
        progress: Whether to show a progress bar.

    Returns:
        The schedule: a number for each block.

    Raises:
        TypeError: If images are no tensors.
        ValueError: If the model has no merger, there are no images or they differ in size, outputs are not finite, the
            FLOPs can't be brought down as far, or FSDP2 has sharded the model.
    """
    model = unwrap_model(model)
    merger = merger_of(model)
    was: Any = merger.r
    if not 0 < flops_ratio <= 1:
        raise ValueError(f"flops_ratio must lie in (0, 1], got {flops_ratio}")
    _check_whole(model)
    batches = as_batches(images, BATCH, next(model.parameters()).device)
    try:
        with evaluating(model), tqdm(desc="calibrating", unit="schedule", disable=not progress) as bar:
            was = _Search(model, batches, flops_ratio, max_blocks, bar).run()
    finally:
        merger.r = was
    return was


def _check_whole(model: torch.nn.Module) -> None:
    """Refuse a model that FSDP2 has sharded."""
    if any(hasattr(module, "unshard") for module in model.modules()):
        raise ValueError(
            "the model is sharded by FSDP2, but calibration runs its pieces one by one: calibrate an unsharded model "
            "with the same weights, and set model.merger.r to the schedule"
        )


class _Search:
    """A pattern search over few numbers: which blocks merge, and the weights of some of them."""

    def __init__(
        self, model: TokenViT, batches: list[Tensor], flops_ratio: float, max_blocks: int | None, bar: tqdm
    ) -> None:
        height, width = batches[0].shape[-2:]
        self.costs, self.depth, self.bar = model.costs((height, width)), len(model.base.blocks), bar
        self.features = not classifies(model)
        self.placements = placements(self.depth, max_blocks)
        self.goal = flops_ratio * self._flops((0,) * self.depth)
        self._check_goal(flops_ratio)
        self.replay, self.loss = Replay(model, batches, not self.features), DistillLoss()
        self.teacher = self.replay((0,) * self.depth, keep=True)
        self.found: dict[Schedule, float] = {}
        if not math.isfinite(self._divergence((0,) * self.depth)):
            raise ValueError("the model's outputs for these images are not finite: look for NaN in weights and images")

    def run(self) -> Schedule:
        """The best schedule."""
        if self._flops((0,) * self.depth) <= self.goal:
            return (0,) * self.depth
        weights = [1.0] * (KNOTS + 1)
        placed = self._best_placement(range(len(self.placements)), weights)
        for step in STEPS:
            for knot in range(len(weights)):
                for factor in (step, 1 / step):
                    changed = [*weights[:knot], weights[knot] * factor, *weights[knot + 1 :]]
                    if self._value(placed, changed) < self._value(placed, weights):
                        weights = changed
                        break
        placed = self._best_placement((placed, placed - 1, placed + 1), weights)
        return cast(Schedule, self._schedule(placed, weights))  # some reach the goal: `_check_goal`

    def _flops(self, schedule: Sequence[int]) -> int:
        return self.costs.flops(schedule, self.features)

    def _best_placement(self, candidates: Iterable[int], weights: Sequence[float]) -> int:
        inside = [i for i in candidates if 0 <= i < len(self.placements)]
        return min(inside, key=lambda i: self._value(i, weights))

    def _value(self, placed: int, weights: Sequence[float]) -> float:
        """The divergence of a schedule; infinite if there is none that reaches the goal."""
        schedule = self._schedule(placed, weights)
        return math.inf if schedule is None else self._divergence(schedule)

    def _divergence(self, schedule: Schedule) -> float:
        """How much the outputs differ from those without merging, averaged over images."""
        if schedule not in self.found:
            outputs = self.replay(schedule)
            images = [self.loss.per_image(*pair) for pair in zip(outputs, self.teacher, strict=True)]
            self.found[schedule] = torch.cat(images).double().mean().item()
            self.bar.update()
            self.bar.set_postfix(divergence=f"{min(list(self.found.values())[1:], default=0):.3g}")
        return self.found[schedule]

    def _schedule(self, placed: int, weights: Sequence[float]) -> Schedule | None:
        """Fewest tokens in the proportions of these weights that reach the goal; None if none do."""
        shares = block_shares(self.depth, self.placements[placed], weights)
        low, high = 0.0, 2.0 * self.costs.num_tokens * self.depth
        if self._flops(self._counts(shares, high)) > self.goal:
            return None
        for _ in range(40):
            middle = (low + high) / 2
            low, high = (low, middle) if self._flops(self._counts(shares, middle)) <= self.goal else (middle, high)
        return self._counts(shares, high)

    def _counts(self, shares: Sequence[float], total: float) -> Schedule:
        """So many tokens in these shares, rounded so that they add up, where a block merges no more than it can."""
        ends = [round(total * end) for end in (0, *accumulate(shares))]
        tokens = token_counts([b - a for a, b in pairwise(ends)], self.costs.num_tokens, self.costs.prefix)
        return tuple(before - after for before, after in pairwise(tokens))

    def _check_goal(self, flops_ratio: float) -> None:
        full, most = self._flops((0,) * self.depth), self.costs.num_tokens
        least = min(self._flops([most * (i in blocks) for i in range(self.depth)]) for blocks in self.placements)
        if min(least, full) > self.goal:
            raise ValueError(
                f"flops_ratio={flops_ratio} can't be reached: merging all that can be merged in "
                f"{len(self.placements[0])} of {self.depth} blocks leaves {math.ceil(1000 * least / full) / 1000} of "
                "the FLOPs"
            )


def placements(depth: int, max_blocks: int | None) -> list[tuple[int, ...]]:
    """The sets of blocks that may merge: all from some block on, or `max_blocks` that are evenly spaced.

    Raises:
        ValueError: If there are not so many blocks.
    """
    if max_blocks is None or max_blocks == depth:
        return [tuple(range(first, depth)) for first in range(depth)]
    if isinstance(max_blocks, bool) or not isinstance(max_blocks, int) or not 1 <= max_blocks <= depth:
        raise ValueError(f"max_blocks must be an int from 1 to {depth}, the number of blocks, got {max_blocks!r}")
    spaces = range(1, (depth - 1) // max(max_blocks - 1, 1) + 1) if max_blocks > 1 else (1,)
    extents = [(space, space * (max_blocks - 1) + 1) for space in spaces]
    return [
        tuple(range(first, first + extent, space)) for space, extent in extents for first in range(depth - extent + 1)
    ]


def block_shares(depth: int, blocks: Sequence[int], weights: Sequence[float]) -> list[float]:
    """What share of the merged tokens each block merges, adding up to 1.

    Args:
        depth: How many blocks there are.
        blocks: Those that merge.
        weights: The last is of the last of them; the others are interpolated for the blocks before it.
    """
    inner = np.interp(np.linspace(0, 1, len(blocks) - 1), np.linspace(0, 1, len(weights) - 1), weights[:-1])
    shares = np.zeros(depth)
    shares[list(blocks)] = [*inner, weights[-1]]
    return (shares / shares.sum()).tolist()
