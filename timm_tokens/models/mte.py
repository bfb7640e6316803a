"""MTE models: timm's ViTs with auxiliary tokens for self-supervised pre-training (arXiv 2411.15787).

`model(images)` is the plain ViT's output; `model(images, tokens=True)` gives the auxiliary tokens, too.
`pretrained=True` loads the base's weights; the auxiliary tokens start fresh.
"""

from typing import Any

from timm.models import register_model

from timm_tokens.models.token_vit import build, cfgs
from timm_tokens.vit import TokenViT

_BASES = {
    "vit_tiny_mte": "vit_tiny_patch16_224",
    "vit_small_mte": "vit_small_patch16_224",
    "vit_base_mte": "vit_base_patch16_224",
}

default_cfgs = cfgs(_BASES)


def _mte(variant: str, pretrained: bool, aux: dict[str, Any] | None = None, **kwargs: Any) -> TokenViT:
    return build(variant, pretrained, base=_BASES[variant], aux=aux or {}, **kwargs)


@register_model
def vit_tiny_mte(pretrained: bool = False, **kwargs: Any) -> TokenViT:
    """ViT-Tiny/16 with auxiliary tokens."""
    return _mte("vit_tiny_mte", pretrained, **kwargs)


@register_model
def vit_small_mte(pretrained: bool = False, **kwargs: Any) -> TokenViT:
    """ViT-Small/16 with auxiliary tokens."""
    return _mte("vit_small_mte", pretrained, **kwargs)


@register_model
def vit_base_mte(pretrained: bool = False, **kwargs: Any) -> TokenViT:
    """ViT-Base/16 with auxiliary tokens."""
    return _mte("vit_base_mte", pretrained, **kwargs)
