"""Rotary position embeddings, as timm makes them, for tokens that were added or left out."""

import torch
from torch import Tensor


def per_block(rope: Tensor | None, depth: int, mixed: bool) -> list[Tensor] | None:
    """The rotary embedding of each block, which is one for all unless mixed; None without any."""
    if rope is None:
        return None
    return list(rope) if mixed else [rope] * depth


def unrotated(rope: Tensor, count: int) -> Tensor:
    """The rotary embedding with `count` more tokens at its end that are not rotated: (..., N, D) -> (..., N + A, D)."""
    sin, cos = rope.chunk(2, dim=-1)
    shape = (*sin.shape[:-2], count, sin.shape[-1])
    return torch.cat([rope, torch.cat([sin.new_zeros(shape), cos.new_ones(shape)], dim=-1)], dim=-2)


def rope_rows(rope: Tensor, rows: Tensor | None) -> Tensor:
    """The rotary embedding (B, 1 or heads, M, D) of the tokens that are left: that of patch `rows` (B, M); all if None.

    `rope` is (N, D), (heads, N, D) or (B, 1 or heads, N, D).
    """
    if rows is None:
        return rope
    if rope.ndim == 2:
        return rope[rows].unsqueeze(1)
    if rope.ndim == 3:
        return rope[:, rows].transpose(0, 1)
    return rope.expand(rows.shape[0], -1, -1, -1).gather(
        2, rows[:, None, :, None].expand(-1, rope.shape[1], -1, rope.shape[3])
    )
