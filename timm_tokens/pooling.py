"""Pooling of tokens that stand for several patches, as timm pools patches."""

from timm.layers import AttentionPoolLatent
from timm.models import Eva, VisionTransformerDistilled
from torch import Tensor

from timm_tokens.ops import size_bias
from timm_tokens.timm_types import ViT


def head(base: ViT, x: Tensor, size: Tensor | None, pre_logits: bool = False) -> Tensor:
    """Pool normed tokens (B, N, C), each weighted by its size (B, N), and classify: (B, K)."""
    pooling = "map" if getattr(base, "attn_pool", None) is not None else base.global_pool
    if size is None or pooling in ("", "token") or isinstance(base, VisionTransformerDistilled):
        return base.forward_head(x, pre_logits=pre_logits)
    x = base.head_drop(base.fc_norm(_pool(base, x, size, pooling)))
    return x if pre_logits else base.head(x)


def head_norm(base: ViT, x: Tensor) -> Tensor:
    """Tokens (B, N, C) after the final norm as a classifier of tokens wants them: normed also where timm norms last."""
    return base.fc_norm(x)


def pooled_from(base: ViT) -> int:
    """The first token that pooling over tokens reads: the first patch, or the first prefix token."""
    # Eva's attention pooling reads its prefix tokens too, without saying so
    everything = getattr(base, "pool_include_prefix", isinstance(base, Eva) and base.attn_pool is not None)
    return 0 if everything else base.num_prefix_tokens


def _pool(base: ViT, x: Tensor, size: Tensor, pooling: str) -> Tensor:
    x, size = x[:, pooled_from(base) :], size[:, pooled_from(base) :]
    if pooling == "map":
        return base.attn_pool(x, attn_mask=size_bias(size).to(x.dtype))
    if pooling == "max":
        return x.amax(dim=1)
    share = (size / size.sum(dim=1, keepdim=True)).unsqueeze(2).to(x.dtype)
    mean = (x * share).sum(dim=1)
    return mean if pooling == "avg" else 0.5 * (mean + x.amax(dim=1))


def pools_by_size(base: ViT) -> bool:
    """Whether `head` can weigh tokens by size; otherwise it needs them un-merged: PRR attention pooling, or none."""
    pool = getattr(base, "attn_pool", None)
    if pool is None and not base.global_pool:  # one row of logits per token
        return False
    return pool is None or (type(pool).forward is AttentionPoolLatent.forward and pool.pos_embed is None)
