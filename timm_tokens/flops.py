"""Multiply-adds of a driven model, read off the shapes of its layers.

Counted as the papers count them, one for a multiplication with its addition: half of what torch's flop counter says.
"""

from copy import deepcopy
from typing import TYPE_CHECKING, Any

import torch
from timm.layers import AttentionPoolLatent, DiffAttention
from timm.models.vision_transformer import DiffParallelScalingBlock
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from timm_tokens import blocks, pooling
from timm_tokens.ops import schedule
from timm_tokens.ops.flops import BlockCost, block_flops, token_counts

if TYPE_CHECKING:
    from timm_tokens.vit import TokenViT


def model_tokens(model: "TokenViT", r: Any = None, image_size: tuple[int, int] | None = None) -> list[int]:
    """Tokens, prefix included, before the first block and after each; arguments as of `TokenViT.flops`."""
    base, merger, prefix = model.base, model.merger, model.num_prefix_tokens
    depth = len(base.blocks)
    counts = schedule(r, depth) if r is not None else merger.schedule if merger is not None else (0,) * depth
    rows, columns = blocks.grid_size(base, image_size or model.image_size)
    return token_counts(counts, prefix + rows * columns, prefix)


def model_flops(model: "TokenViT", r: Any = None, image_size: tuple[int, int] | None = None) -> int:
    """Multiply-adds of a TokenViT for one image in evaluation; see `TokenViT.flops`."""
    base, merger, prefix = model.base, model.merger, model.num_prefix_tokens
    tokens = model_tokens(model, r, image_size)
    embed_dim = merger.embed_dim if merger is not None else 0
    pooled = tokens[-1 if pooling.pools_by_size(base) else 0]
    total = stem_flops(base, image_size or model.image_size) + head_flops(base, pooled)
    if model.head is not None:
        own = 0 if model.head.cls is None else model.head.cls.weight.numel() - sum(map(_linear, _classifiers(base)))
        total += own + (tokens[-1] - prefix) * model.head.tokens.weight.numel()
    for block, before, after in zip(base.blocks, tokens, tokens[1:], strict=False):
        metric = merger.flops_per_token(block) if merger is not None else 0
        total += block_flops(block_cost(block), before, before - after, prefix, metric, embed_dim)
    return total


def block_cost(block: nn.Module) -> BlockCost:
    """What the block computes, from the shapes of its linear maps."""
    attentions = [m for m in block.modules() if type(m).forward in blocks.ATTENTIONS]
    if not attentions:  # attention and MLP share their linear maps
        width = block.num_heads * block.head_dim
        differential = type(block).forward is DiffParallelScalingBlock.forward
        return BlockCost(_linear(block), 6 * width if differential else 2 * width, 0)
    attend = sum(map(_linear, attentions))
    # differential attention reads its values twice, which are twice as wide as its queries
    pair = sum(a.num_heads * a.head_dim * (6 if isinstance(a, DiffAttention) else 2) for a in attentions)
    return BlockCost(attend, pair, _linear(block) - attend)


def head_flops(base: nn.Module, tokens: int) -> int:
    """Multiply-adds of pooling and classifying this many tokens."""
    pool, classify = getattr(base, "attn_pool", None), sum(map(_linear, _classifiers(base)))
    if pool is None:
        return classify
    if not isinstance(pool, AttentionPoolLatent):  # PRR: attention without linear maps, over all tokens un-merged
        return classify + 2 * tokens**2 * base.embed_dim
    tokens -= pooling.pooled_from(base)
    per_token = _linear(pool.kv)
    per_query = _linear(pool) - per_token + 2 * tokens * pool.num_heads * pool.head_dim
    return classify + per_token * tokens + per_query * pool.latent_len


def stem_flops(base: nn.Module, image_size: tuple[int, int]) -> int:
    """Multiply-adds of the patch embedding for one image, counted by torch on tensors without data."""
    images = torch.empty(1, base.in_chans, *image_size, device="meta")
    with FlopCounterMode(display=False) as counter:  # no no_grad: the counter trips over expanded parameters there
        deepcopy(blocks.stem(base)).to("meta").eval()(images)
    return counter.get_total_flops() // 2


def _linear(module: nn.Module) -> int:
    return sum(m.weight.numel() for m in module.modules() if isinstance(m, nn.Linear))


def _classifiers(base: nn.Module) -> tuple[nn.Module, ...]:
    classifier = base.get_classifier()
    return classifier if isinstance(classifier, tuple) else (classifier,)
