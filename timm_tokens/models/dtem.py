"""DTEM models: timm's DeiT and ViT with learned token merging (arXiv 2412.10569).

r = 12 removes 37 % of the FLOPs, as the paper reports for DeiT-S; set `model.merger.r` for another balance.
`pretrained=True` loads the base's weights; the merging starts as that by attention keys, and is there to be trained.
"""

from typing import Any

from timm.models import register_model

from timm_tokens.models.token_vit import build, cfgs
from timm_tokens.vit import TokenViT

_BASES = {
    "deit_tiny_dtem": "deit_tiny_patch16_224",
    "deit_small_dtem": "deit_small_patch16_224",
    "deit_base_dtem": "deit_base_patch16_224",
    "vit_small_dtem": "vit_small_patch16_224",
    "vit_base_dtem": "vit_base_patch16_224",
}

default_cfgs = cfgs(_BASES)


def _dtem(variant: str, pretrained: bool, merger: dict[str, Any] | None = None, **kwargs: Any) -> TokenViT:
    return build(variant, pretrained, base=_BASES[variant], merger={"r": 12} | (merger or {}), **kwargs)


@register_model
def deit_tiny_dtem(pretrained: bool = False, **kwargs: Any) -> TokenViT:
    """DeiT-Tiny/16 with learned token merging."""
    return _dtem("deit_tiny_dtem", pretrained, **kwargs)


@register_model
def deit_small_dtem(pretrained: bool = False, **kwargs: Any) -> TokenViT:
    """DeiT-Small/16 with learned token merging."""
    return _dtem("deit_small_dtem", pretrained, **kwargs)


@register_model
def deit_base_dtem(pretrained: bool = False, **kwargs: Any) -> TokenViT:
    """DeiT-Base/16 with learned token merging."""
    return _dtem("deit_base_dtem", pretrained, **kwargs)


@register_model
def vit_small_dtem(pretrained: bool = False, **kwargs: Any) -> TokenViT:
    """ViT-Small/16 with learned token merging."""
    return _dtem("vit_small_dtem", pretrained, **kwargs)


@register_model
def vit_base_dtem(pretrained: bool = False, **kwargs: Any) -> TokenViT:
    """ViT-Base/16 with learned token merging."""
    return _dtem("vit_base_dtem", pretrained, **kwargs)
