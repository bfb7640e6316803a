"""The verbs that give a model a part: each takes a timm ViT or a TokenViT and returns a new TokenViT."""

from bisect import bisect_left
from collections.abc import Sequence
from inspect import signature
from os import PathLike
from typing import Any

from torch import nn

from timm_tokens import blocks
from timm_tokens.merger_file import read_merger
from timm_tokens.parts import AuxTokens, TokenLabelHead, TokenMerger
from timm_tokens.timm_types import ViT
from timm_tokens.vit import TokenViT


def apply_dtem_merging(
    model: nn.Module,
    r: int | Sequence[int] | tuple[int, float] | None = None,
    *,
    embed_dim: int | None = None, metric: str = "learned", candidates: int = 3, tau1: float = 0.1, tau2: float = 0.1,
    prop_attn: bool = True, flops_ratio: float | None = None, weights: str | PathLike[str] | None = None,
) -> TokenViT:  # fmt: skip
    """Merge the most similar tokens in each block of a ViT: learned (DTEM) or training-free (ToMe).

        vit = timm.create_model("deit_small_patch16_224", pretrained=True)
        model = timm_tokens.apply_dtem_merging(vit, r=13)
        logits = model(images)

    Returns a TokenViT around the same base, with a merger and the parts that `model` had; `model` stays as it is. Train
    it as any classifier, or the merging alone after `freeze_base()`. `merger.r` can be set at any time.

    Args:
        model: A timm ViT, or a TokenViT without a merger.
        r: Tokens to merge in each block: an int (default: 8), (int, float inflection), or a sequence of one int per
            block, padded with 0.
        embed_dim: Dimension of the learned embedding; None: a head's dimension, twice that from 1024 channels on.
        metric: "learned" (DTEM), or "keys": the attention's keys averaged over heads, which needs no training.
        candidates: Partners that relaxed merging considers for each token in training.
        tau1: Temperature of the similarities in relaxed merging.
        tau2: Temperature of the choice of pairs in relaxed merging.
        prop_attn: Whether a token counts in the attention once for each of its members.
        flops_ratio: Largest share of the FLOPs without merging, instead of r; the smallest r that reaches it is set.
        weights: A trained merger: a file from `save_merger`, a training run's folder, or "hf-hub:user/name[@revision]".
            It brings its own settings and r; r and flops_ratio override its r.

    Raises:
        TypeError: If the model can't be driven (the message names its block class), or r has the wrong type.
        ValueError: If the model merges already, r and flops_ratio are both given, a value is out of range, or the
            weights are corrupt or were trained for another model or with other settings.
        OSError: If the weights are not found.

    Warns:
        UserWarning: If the merger was trained on other weights of the same model.

    Source: DTEM (arXiv 2412.10569); ToMe (arXiv 2210.09461) for metric="keys".
    """
    options = dict(embed_dim=embed_dim, metric=metric, candidates=candidates, tau1=tau1, tau2=tau2, prop_attn=prop_attn)
    return _with_merger(model, r, flops_ratio, weights, options)


def _with_merger(
    model: nn.Module, r: Any, flops_ratio: float | None, weights: Any, options: dict[str, Any]
) -> TokenViT:
    base = _base_without(model, "merger", "merges tokens already; set model.merger.r")
    if r is not None and flops_ratio is not None:
        raise ValueError(f"give r or flops_ratio, not both, got r={r} and flops_ratio={flops_ratio}")
    blocks.check(base, merging=True)
    if weights is None:
        merger = TokenMerger(base, 8 if r is None else r, **options)
    else:
        defaults = signature(apply_dtem_merging).parameters
        changed = {name: value for name, value in options.items() if value != defaults[name].default}
        merger = read_merger(weights).build(base, r, **changed)
    merged = _with_part(model, merger=merger)
    if flops_ratio is not None:
        merged.merger.r = smallest_r(merged, flops_ratio)
    return merged


def add_aux_tokens(
    model: nn.Module,
    num_cls: int = 6,
    num_pooled: int = 6,
    *,
    kernel_size: int = 11,
    pool_weight: str = "spatial",
    pool_norm: str = "softmax",
    aux_sees_cls: bool = False,
    aux_sees_aux: bool = False,
) -> TokenViT:
    """Give a ViT auxiliary tokens, which help to pre-train it and are dropped afterwards (MTE).

        vit = timm.create_model("vit_small_patch16_224", num_classes=0)
        model = timm_tokens.add_aux_tokens(vit)
        cls, prefix, patches, aux_cls, pooled = model(images, tokens=True)

    The model's own tokens never see an auxiliary one: `model(images)` is the base's output, at the base's cost, and
    `model.base` is the plain ViT to keep. `Tokens.aux_cls` are (B, k_a, C) auxiliary class tokens, `Tokens.pooled`
    (B, k_p, C) tokens pooled from the patches.

    Args:
        model: A timm ViT, or a TokenViT without auxiliary tokens.
        num_cls: k_a, auxiliary class tokens.
        num_pooled: k_p, adaptively pooled tokens.
        kernel_size: Side of the convolution that makes the pooling weights, odd.
        pool_weight: "spatial": one map of pooling weights per token; "channel": one per token and channel.
        pool_norm: "softmax": pooling weights sum to 1; "none": they are the convolution's output.
        aux_sees_cls: Whether auxiliary class tokens attend to the class token and other prefix tokens.
        aux_sees_aux: Whether auxiliary class tokens attend to each other.

    Returns:
        A TokenViT around the same base, with auxiliary tokens and the parts that `model` had.

    Raises:
        TypeError: If the model can't be driven (the message names its block class), or a count is no int.
        ValueError: If the model has auxiliary tokens already, or a value is out of range.

    Source: MTE (arXiv 2411.15787). Conv nets and others with a map: see `timm_tokens.parts.AdaptivePool`.
    """
    base = _base_without(model, "aux", "has auxiliary tokens already")
    blocks.check(base, merging=False)
    options: dict[str, Any] = dict(kernel_size=kernel_size, pool_weight=pool_weight, pool_norm=pool_norm)
    sees: dict[str, Any] = dict(aux_sees_cls=aux_sees_cls, aux_sees_aux=aux_sees_aux)
    return _with_part(model, aux=AuxTokens(base.embed_dim, num_cls, num_pooled, **options, **sees))


def token_label_head(
    model: nn.Module, num_classes: int | None = None, *, pool: str = "max", pool_weight: float = 0.5
) -> TokenViT:
    """Give a ViT a classifier for every patch token, for token labeling and dense predictions.

        vit = timm.create_model("vit_small_patch16_224", num_classes=100)
        model = timm_tokens.token_label_head(vit)
        logits = model(images)  # (B, K): the class token's logits + 0.5 times the largest of the patches'
        cls, tokens = model(images, dense=True)  # (B, K) and (B, N, K), for TokenLabelLoss

    With merging, a token's logits go to every patch of its group.

    Args:
        model: A timm ViT, or a TokenViT without such a head.
        num_classes: K; None: the model's. With another number than the base's own classifier has, the head brings its
            own classifier for the class token, too, and the base keeps its own.
        pool: How patch logits are pooled for `model(images)`: "max" or "avg".
        pool_weight: Weight of the pooled patch logits there.

    Returns:
        A TokenViT around the same base, with the head and the parts that `model` had.

    Raises:
        TypeError: If the model can't be driven (the message names its block class), or num_classes is no int.
        ValueError: If the model has such a head already, or has no classes and none are given.

    Source: token labeling (arXiv 2104.10858), section 3.
    """
    base = _base_without(model, "head", "has a token-label head already; use model.reset_classifier(num_classes)")
    blocks.check(base, merging=False)
    if num_classes is None and not base.num_classes:
        raise ValueError("the model has no classes (num_classes=0): give num_classes")
    if base.global_pool == "":
        raise ValueError("the model pools nothing (global_pool=''), so there is no class token's logit to add to")
    own = base.head_hidden_size if num_classes not in (None, base.num_classes) else None
    classes = base.num_classes if num_classes is None else num_classes
    return _with_part(
        model, head=TokenLabelHead(base.embed_dim, classes, own_classifier=own, pool=pool, pool_weight=pool_weight)
    )


def add_mask_token(model: nn.Module) -> TokenViT:
    """Give a ViT a learned token for masked patches, at `.mask_token`: see `mask` of `TokenViT.forward`.

    Args:
        model: A timm ViT, or a TokenViT without mask token.

    Raises:
        TypeError: If the model can't be driven.
        ValueError: If it has a mask token already.
    """
    _base_without(model, "mask_token", "has a mask token already")
    return _with_part(model, mask_token=True)


def _base_without(model: nn.Module, part: str, problem: str) -> ViT:
    """The plain ViT in `model`, which must not have the part yet."""
    if isinstance(model, TokenViT) and getattr(model, part) is not None:
        raise ValueError(f"this model {problem}, or wrap model.base to start again")
    return model.base if isinstance(model, TokenViT) else model


def _with_part(model: nn.Module, mask_token: bool = False, **part: nn.Module) -> TokenViT:
    """A TokenViT with the model's parts and one more, on the model's device, in its type and its mode."""
    had = model if isinstance(model, TokenViT) else TokenViT(model)
    for new in part.values():
        new.to(**blocks.placement(had.base))
    parts: dict[str, Any] = had.parts | part
    built = TokenViT(had.base, **parts, mask_token=mask_token)
    built._frozen = had._frozen
    built.mask_token = built.mask_token if had.mask_token is None else had.mask_token
    return built.train(model.training)


def smallest_r(model: TokenViT, flops_ratio: float) -> int:
    """The smallest constant r with which the model needs at most this share of its FLOPs without merging."""
    if not 0 < flops_ratio <= 1:
        raise ValueError(f"flops_ratio must lie in (0, 1], got {flops_ratio}")
    costs, depth = model.costs(), len(model.base.blocks)
    full, most = costs.flops((0,) * depth), (costs.num_tokens - costs.prefix) // 2

    def share(r: int) -> float:
        return costs.flops((r,) * depth) / full

    if flops_ratio == 1:
        return 0
    # from 1 on, more merging costs less; the first merge costs the comparison of tokens
    r = 1 + bisect_left(range(1, most + 1), True, key=lambda r: share(r) <= flops_ratio)
    if r > most:
        least = share(most)
        raise ValueError(
            f"flops_ratio={flops_ratio} can't be reached: merging all it can leaves {least:.3f} of the FLOPs"
        )
    return r
