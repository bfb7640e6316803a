"""Counting: tokens left and multiply-adds, from shapes alone.

FLOPs are counted as the papers count them, one for a multiplication with its addition (DeiT-S: 4.6 G), which is half of
what torch.utils.flop_counter prints.
"""

from collections.abc import Sequence
from typing import NamedTuple

from timm_tokens.ops.matching import mergeable


class BlockCost(NamedTuple):
    """Multiply-adds of one block: of its attention a token and a pair of tokens, and of its MLP a token."""

    attend: int
    pair: int
    feed: int


def token_counts(schedule: Sequence[int], num_tokens: int, num_prefix_tokens: int) -> list[int]:
    """Tokens (prefix included) before the first block and after each block that merges schedule[block] of them."""
    counts = [num_tokens]
    for r in schedule:
        counts.append(counts[-1] - mergeable(r, counts[-1], num_prefix_tokens))
    return counts


def block_flops(cost: BlockCost, tokens: int, merged: int, num_prefix_tokens: int, metric: int, embed_dim: int) -> int:
    """Multiply-adds of one block that removes `merged` of its tokens between attention and MLP, for one image.

    Args:
        cost: Of the block.
        tokens: Tokens that enter. merged: tokens that merge away.
        metric: Multiply-adds a token to make the embedding that tokens are compared by. embed_dim: its width.
    """
    left = tokens - merged
    flops = cost.attend * tokens + cost.pair * tokens**2 + cost.feed * left
    if merged:
        patches = tokens - num_prefix_tokens
        similarity = (patches // 2) * (patches - patches // 2) * embed_dim
        flops += metric * tokens + similarity
    return flops
