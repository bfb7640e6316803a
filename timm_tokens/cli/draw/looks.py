"""What a model's tokens look at: read from a copy of the model, so that the model itself stays as it is."""

from copy import deepcopy
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from timm_tokens import blocks
from timm_tokens.vit import TokenViT


class Looks(NamedTuple):
    """Where tokens look, over the patch grid, and how alike they end up.

    Attributes:
        cls: (B, H, W) the class token's attention, averaged over heads; None without class token.
        aux_cls: (B, k_a, H, W) the auxiliary class tokens'; None without.
        pooled: (B, k_p, H, W) the pooling weights, averaged over channels; None without pooled tokens.
        cosine: (B, T, T) cosines between the global token, the auxiliary class tokens and the pooled tokens.
    """

    cls: Tensor | None
    aux_cls: Tensor | None
    pooled: Tensor | None
    cosine: Tensor


@torch.no_grad()
def looks(model: TokenViT, images: Tensor, block: int = -1) -> Looks:
    """Where the tokens of a model look in a block, for images (B, 3, h, w). Nothing is merged for it.

    Raises:
        ValueError: If the block's attention has no weights to read.
    """
    net: Any = deepcopy(model).eval()
    net.merger = None
    read = _record_attention(net.base.blocks[block])
    tokens = net(images, tokens=True)
    if not read:
        raise ValueError(f"the attention of {type(model.base.blocks[block]).__name__} gives no weights to draw")
    prefix, n = model.num_prefix_tokens, tokens.patches.shape[1]
    grid = blocks.grid_size(model.base, images.shape[-2:])
    attention = read[-1].mean(dim=1)[:, :, prefix : prefix + n].unflatten(2, grid)  # (B, N + A, H, W)
    pooled = None
    if tokens.pooled is not None:
        pool = net.aux.pool
        weights = pool.weights(pool.normed(tokens.patches.transpose(1, 2).unflatten(2, grid)))
        pooled = (weights.mean(dim=1) if pool.per_channel else weights).unflatten(2, grid)
    kinds = [tokens.cls[:, None], tokens.aux_cls, tokens.pooled]
    every = nn.functional.normalize(torch.cat([kind for kind in kinds if kind is not None], dim=1), dim=2)
    return Looks(
        cls=attention[:, 0] if model.has_class_token else None,
        aux_cls=None if tokens.aux_cls is None else attention[:, prefix + n :],
        pooled=pooled,
        cosine=every @ every.transpose(1, 2),
    )


def _record_attention(block: nn.Module) -> list[Tensor]:
    """A list that gets the block's attention weights (B, heads, N, N), where timm drops some of them in training."""
    read: list[Tensor] = []
    module: Any
    for module in block.modules():
        if hasattr(module, "fused_attn"):
            module.fused_attn = False
            module.attn_drop.register_forward_hook(lambda module, args, output: read.append(output))
    return read
