"""Class logits of what the blocks leave: by the base's own classifier, by a token-label head, or by both.

Tokens that stand for several patches are pooled as timm pools those patches.
"""

from timm.layers import AttentionPoolLatent
from timm.models import Eva, VisionTransformerDistilled
from torch import Tensor, nn

from timm_tokens.driver import Trace
from timm_tokens.ops import size_bias
from timm_tokens.ops.matching import Matching
from timm_tokens.parts import DenseLogits, TokenLabelHead
from timm_tokens.parts.merger import unmerge_all
from timm_tokens.timm_types import ViT, Wrapped


def check_call(head: TokenLabelHead | None, dense: bool, box: object, tokens: bool | str) -> None:
    """Refuse arguments of `TokenViT.forward` that don't fit each other or the model."""
    if isinstance(tokens, str) and tokens != "merged":
        raise ValueError(f"tokens must be False, True or 'merged', got {tokens!r}")
    if dense and head is None:
        raise ValueError("dense=True needs a token-label head; give the model one with token_label_head(model)")
    if dense and tokens:
        raise ValueError(f"ask for dense=True or tokens={tokens!r}, not both")
    if box is not None and not dense:
        raise ValueError("box mixes the batch's patches (MixToken), whose logits need dense=True")


def class_logits(model: Wrapped, x: Tensor, size: Tensor | None, trace: Trace) -> Tensor:
    """Logits (B, K) of tokens x (B, P + N, C) after the final norm, of sizes (B, P + N), None for one patch each."""
    base, head = model.base, model.head
    if head is None:
        return _classify(base, None, x, size, trace)
    cls = _classify(base, head.cls, x, size, trace)
    if trace and not isinstance(trace[0], Matching):  # relaxed: tokens that are gone still have their rows
        x, size = unmerge_all(trace, x), None
    return head(cls, _patches(base, x), None if size is None else size[:, base.num_prefix_tokens :])


def dense_logits(model: Wrapped, x: Tensor, size: Tensor | None, trace: Trace) -> DenseLogits:
    """Logits of the class token and of every patch, un-merged; arguments as in `class_logits`."""
    base, head = model.base, model.head
    cls = _classify(base, head.cls, x, size, trace)
    return DenseLogits(cls, head.tokens(_patches(base, unmerge_all(trace, x))))


def _classify(base: ViT, classifier: nn.Module | None, x: Tensor, size: Tensor | None, trace: Trace) -> Tensor:
    """The class token's logits: by the base's head, or by another classifier of its pooled features."""
    if trace and not pools_by_size(base):
        x, size = unmerge_all(trace, x), None
    if classifier is None:
        return pool_and_classify(base, x, size)
    return classifier(pool_and_classify(base, x, size, pre_logits=True))


def _patches(base: ViT, x: Tensor) -> Tensor:
    """The patch tokens of (B, P + N, C) as a classifier of tokens wants them: normed also where timm norms last."""
    return base.fc_norm(x[:, base.num_prefix_tokens :])


def pool_and_classify(base: ViT, x: Tensor, size: Tensor | None, pre_logits: bool = False) -> Tensor:
    """Pool normed tokens (B, N, C), each weighted by its size (B, N), and classify: (B, K)."""
    pooling = "map" if getattr(base, "attn_pool", None) is not None else base.global_pool
    if size is None or pooling in ("", "token") or isinstance(base, VisionTransformerDistilled):
        return base.forward_head(x, pre_logits=pre_logits)
    x = base.head_drop(base.fc_norm(_pool(base, x, size, pooling)))
    return x if pre_logits else base.head(x)


def _pool(base: ViT, x: Tensor, size: Tensor, pooling: str) -> Tensor:
    # Eva's attention pooling reads its prefix tokens too, without saying so
    everything = getattr(base, "pool_include_prefix", isinstance(base, Eva) and base.attn_pool is not None)
    if not everything:
        x, size = x[:, base.num_prefix_tokens :], size[:, base.num_prefix_tokens :]
    if pooling == "map":
        return base.attn_pool(x, attn_mask=size_bias(size).to(x.dtype))
    if pooling == "max":
        return x.amax(dim=1)
    share = (size / size.sum(dim=1, keepdim=True)).unsqueeze(2).to(x.dtype)
    mean = (x * share).sum(dim=1)
    return mean if pooling == "avg" else 0.5 * (mean + x.amax(dim=1))


def pools_by_size(base: ViT) -> bool:
    """Whether tokens can be weighed by size; PRR attention pooling and no pooling need them un-merged."""
    pool = getattr(base, "attn_pool", None)
    if pool is None and not base.global_pool:  # one row of logits per token
        return False
    return pool is None or (type(pool).forward is AttentionPoolLatent.forward and pool.pos_embed is None)
