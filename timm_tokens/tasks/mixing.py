"""Mixup and CutMix for tasks, the same on however many processes."""

from typing import Any

import torch
from timm.data import Mixup
from torch import Tensor

from timm_tokens import seeding
from timm_tokens.tasks.task import TokenTask


def check_mixup(mixup: Mixup | None) -> None:
    """Refuse a Mixup that does not draw once for the whole batch."""
    if mixup is not None and mixup.mode != "batch":
        raise ValueError(f"mixup must have mode='batch', got {mixup.mode!r}")


def mix_neighbours(task: TokenTask, mixup: Mixup, images: Tensor, target: Any = None) -> tuple[Tensor, Tensor]:
    """Images (B, 3, H, W), and probabilities (B, K) of classes (B,), each mixed with its neighbour's.

    timm's Mixup mixes a batch with its flip, which in the order of `place_mirrored` exchanges neighbours. Without
    targets the probabilities mean nothing.
    """
    if len(images) % 2:
        raise ValueError(f"mixup mixes neighbours, so each process needs an even batch, got {len(images)} images")
    order = task.place_mirrored(images)
    target = torch.zeros_like(order) if target is None else target[order]
    with seeding.seeded(task.seed, task.step):  # timm draws from NumPy; without the rank: the same on all processes
        return mixup(images[order], target)
