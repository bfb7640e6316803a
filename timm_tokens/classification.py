"""Class logits of what the blocks leave: by the base's own classifier, by a token-label head, or by both."""

from torch import Tensor, nn

from timm_tokens import pooling
from timm_tokens.driver import Trace
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
    if trace and not pooling.pools_by_size(base):
        x, size = unmerge_all(trace, x), None
    if classifier is None:
        return pooling.head(base, x, size)
    logits: Tensor = classifier(pooling.head(base, x, size, pre_logits=True))
    return logits


def _patches(base: ViT, x: Tensor) -> Tensor:
    """The patch tokens of normed tokens (B, P + N, C), as a classifier of tokens wants them."""
    return pooling.head_norm(base, x[:, base.num_prefix_tokens :])
