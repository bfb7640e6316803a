"""Multiply-adds of a model for one image, counted by torch's own counter on tensors without data.

Counted as the papers count them, one for a multiplication with its addition (DeiT-S: 4.6 G): half of what
`torch.utils.flop_counter` prints. Merging itself is not counted: it adds rows to rows, though where that is fastest (on
GPUs, and when compiled) a small matrix product does it, which is less than 1 % of a block.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import cache
from itertools import chain, repeat
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from timm_tokens import blocks, last_block
from timm_tokens.classification import pools_by_size
from timm_tokens.ops.schedule import schedule, token_counts
from timm_tokens.parts import TokenMerger
from timm_tokens.timm_types import Block, Wrapped

_OF_EVERY_MODULE = vars(nn.Module()).keys()


class BlockCost(NamedTuple):
    """Multiply-adds of one block."""

    token: int  # of its attention per token that enters; of all of it where it has no halves
    pair: int  # of its attention per pair of tokens that enter
    feed: int  # of its MLP per token that is left after merging
    metric: int  # per token that enters, to make what tokens are compared by
    width: int  # per pair of tokens that are compared

    def flops(self, before: int, after: int, num_prefix_tokens: int) -> int:
        """Multiply-adds for one image, of whose `before` tokens `after` are left."""
        total = self.token * before + self.pair * before**2 + self.feed * after
        if before != after:
            patches = before - num_prefix_tokens
            total += self.metric * before + (patches // 2) * (patches - patches // 2) * self.width
        return total


class Costs:
    """What the pieces of a TokenViT, given as a `meta_copy`, cost: from that the FLOPs of any schedule follow."""

    def __init__(self, model: Wrapped, image_size: tuple[int, int]) -> None:
        base, merger, head = model.base, model.merger, model.head
        self.base, self.head, self.prefix = base, head, base.num_prefix_tokens
        rows, columns = blocks.grid_size(base, image_size)
        self.num_tokens = self.prefix + rows * columns
        self.stem = count(lambda images: blocks.embed(base, images)[0], base.in_chans, *image_size)
        self.head_flops = cache(self._head_flops)
        self.prefix_alone = head is None and last_block.needs_prefix_alone(base)
        counted: dict[Any, BlockCost] = {}  # most ViTs repeat one block, which then is counted once
        self.blocks = []
        for i, block in enumerate(base.blocks):
            embed = None if merger is None or merger.embed is None else merger.embed[i]
            key = _structure(block), embed and _structure(embed)
            if key not in counted:
                counted[key] = _block_cost(i, block, base.embed_dim, merger)
            self.blocks.append(counted[key])

    def flops(self, schedule: Sequence[int], features: bool = False) -> int:
        """Multiply-adds for the class logits of one image where block i merges schedule[i] tokens; or for the features
        of all tokens, for which the last block may have more to do."""
        tokens = token_counts(schedule, self.num_tokens, self.prefix)
        inside = list(map(BlockCost.flops, self.blocks, tokens, tokens[1:], repeat(self.prefix)))
        if self.prefix_alone and not features:
            last, entering = self.blocks[-1], tokens[-2]
            inside[-1] = last.flops(entering, entering, self.prefix) - last.feed * (entering - self.prefix)
        return self.stem + sum(inside) + self.head_flops(tokens[-1])

    def _head_flops(self, tokens: int) -> int:
        pooled, width = tokens if pools_by_size(self.base) else self.num_tokens, self.base.embed_dim
        if self.head is None:
            return count(self.base.forward_head, pooled, width)
        own, classify = self.head.cls, self.base.forward_head
        cls = classify if own is None else lambda x: own(classify(x, pre_logits=True))
        return count(cls, pooled, width) + count(self.head.tokens, tokens - self.prefix, width)


def _structure(module: nn.Module) -> tuple[Any, ...]:
    """What decides a module's cost, to be compared: classes, shapes and plain values, and other objects themselves."""

    def content(part: nn.Module) -> Iterator[tuple[str, Any]]:
        for name, tensor in chain(part.named_parameters(recurse=False), part.named_buffers(recurse=False)):
            yield name, tensor.shape
        for name in vars(part).keys() - _OF_EVERY_MODULE:
            value = vars(part)[name]
            yield name, repr(value) if isinstance(value, str | int | float | list | tuple | dict | None) else id(value)

    return tuple((name, type(part), frozenset(content(part))) for name, part in module.named_modules())


def _block_cost(i: int, block: Block, width: int, merger: TokenMerger | None) -> BlockCost:
    if not blocks.has_halves(block):
        return BlockCost(*_per_token_and_pair(block, width), 0, 0, 0)
    halves = blocks.halves(block)
    token, pair = _per_token_and_pair(lambda x: halves.attend(block, x, halves.read(block, x)), width)
    feed = count(lambda x: halves.feed(block, x), 1, width)
    if merger is None:
        return BlockCost(token, pair, feed, 0, 0)
    metric = count(lambda x: merger.compared_by(i, block, x), 1, width)
    compared = merger.compared_by(i, block, torch.empty(1, 1, width, device="meta")).shape[-1]
    return BlockCost(token, pair, feed, metric, compared)


def _per_token_and_pair(function: Callable[[Tensor], Tensor], width: int) -> tuple[int, int]:
    """(a, b) where function(x (B, N, C)) costs a N + b N^2."""
    one, two = count(function, 1, width), count(function, 2, width)
    pair = (two - 2 * one) // 2
    return one - pair, pair


def schedule_of(merger: TokenMerger | None, depth: int, r: Any = None) -> tuple[int, ...]:
    """How many tokens each block merges at r, as in `timm_tokens.ops.schedule`; None: as the merger is set."""
    if r is None:
        return (0,) * depth if merger is None else merger.schedule
    counts = schedule(r, depth)
    if merger is None and any(counts):
        raise ValueError(f"this model merges no tokens, got r={r}; apply_dtem_merging(model) gives it a merger")
    return counts


def count(function: Callable[[Tensor], object], *shape: int) -> int:
    """Multiply-adds of function(x (B, *shape)) for one more in the batch: what is made once a batch is not counted."""

    def flops(batch: int) -> int:
        # the counter trips over expanded parameters where gradients are off
        with torch.enable_grad(), FlopCounterMode(display=False) as counter:
            function(torch.empty(batch, *shape, device="meta"))
        return counter.get_total_flops()

    return (flops(2) - flops(1)) // 2
