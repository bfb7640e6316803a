"""The verbs that give a model a part: each takes a timm ViT or a TokenViT and returns a new TokenViT."""

from collections.abc import Sequence

from torch import nn

from timm_tokens import blocks
from timm_tokens.flops import model_flops
from timm_tokens.parts import TokenMerger
from timm_tokens.vit import TokenViT


def apply_dtem_merging(
    model: nn.Module,
    r: int | Sequence[int] | tuple[int, float] | None = None,
    *,
    embed_dim: int | None = None,
    metric: str = "learned",
    candidates: int = 3,
    tau1: float = 0.1,
    tau2: float = 0.1,
    prop_attn: bool = True,
    flops_ratio: float | None = None,
) -> TokenViT:
    """Merge the most similar tokens in each block of a ViT: learned (DTEM) or training-free (ToMe).

        vit = timm.create_model("deit_small_patch16_224", pretrained=True)
        model = timm_tokens.apply_dtem_merging(vit, r=13)
        logits = model(images)

    The weights are shared with `model`, which stays as it is. Train the result as any classifier; `freeze_base()` first
    to train the merging alone. `result.merger.r` is a dial between speed and accuracy.

    Args:
        model: A timm ViT, or a TokenViT without a merger.
        r: Tokens to merge in each block: an int (8 if neither r nor flops_ratio is given), (int, float inflection), or
            one int a block, padded with 0.
        embed_dim: Width of the learned embedding; None: a head's width, twice that from 1024 channels on.
        metric: "learned" (DTEM), or "keys": the attention's keys averaged over heads, which needs no training.
        candidates, tau1, tau2: Of relaxed merging in training: partners considered, and the two temperatures.
        prop_attn: Whether a token counts as many times as it has members in the attention.
        flops_ratio: Instead of r: merge the fewest tokens, the same in each block, with which the FLOPs are at most
            this share of the base's.

    Returns:
        A TokenViT around the same base, with a merger.

    Raises:
        TypeError: If the model can't be driven (the message names its block class), or r has the wrong type.
        ValueError: If the model merges already, r and flops_ratio are both given, or a value is out of range.

    Source: DTEM (arXiv 2412.10569); ToMe (arXiv 2210.09461) for metric="keys".
    """
    base = model.base if isinstance(model, TokenViT) else model
    if isinstance(model, TokenViT) and model.merger is not None:
        raise ValueError("this model merges tokens already; set model.merger.r, or wrap model.base to start again")
    if r is not None and flops_ratio is not None:
        raise ValueError(f"give r or flops_ratio, not both, got r={r} and flops_ratio={flops_ratio}")
    blocks.check(base, merging=True)
    options = dict(embed_dim=embed_dim, metric=metric, candidates=candidates, tau1=tau1, tau2=tau2, prop_attn=prop_attn)
    merged = TokenViT(base, merger=TokenMerger(base, 8 if r is None else r, **options))
    if flops_ratio is not None:
        merged.merger.r = smallest_r(merged, flops_ratio)
    return merged


def smallest_r(model: TokenViT, flops_ratio: float) -> int:
    """The smallest constant r with which the model needs at most this share of the base's FLOPs.

    Raises:
        ValueError: If the share is not in (0, 1], or no r reaches it.
    """
    if not 0 < flops_ratio <= 1:
        raise ValueError(f"flops_ratio must lie in (0, 1], got {flops_ratio}")
    full, last = model_flops(model, 0), None
    for r in range(10**6):
        ratio = model_flops(model, r) / full
        if ratio <= flops_ratio:
            return r
        if ratio == last:
            break
        last = ratio
    raise ValueError(f"flops_ratio={flops_ratio} can't be reached: merging all it can leaves {last:.3f} of the FLOPs")
