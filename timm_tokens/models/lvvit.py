"""LV-ViT: the Vision Transformer made for token labeling (arXiv 2104.10858), with its dense head.

    model = timm.create_model("lvvit_s", checkpoint_path="lvvit_s-26M-224-83.3.pth.tar")
    logits = model(images)  # (B, K): the class token's logits + 0.5 times the largest of the patches'
    cls, tokens = model(images, dense=True)  # (B, K) and (B, N, K)

Published checkpoints load as they are, strictly, at any image size: the position embedding is resampled. Their
published top-1 on ImageNet: T 79.1, S 83.3 (at 384: 84.4), M 84.0 (384: 85.4), L 86.2 (448) and 86.4 (512).
"""

from typing import Any

from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.models import VisionTransformer, build_model_with_cfg, clean_state_dict, generate_default_cfgs, register_model
from timm.models.vision_transformer import _cfg as _vit_cfg
from torch import Tensor

from timm_tokens.loading import PUBLISHED_HEAD, whole_name
from timm_tokens.models.lvvit_base import lvvit_base
from timm_tokens.models.token_vit import fit_position_embedding, with_parts
from timm_tokens.vit import TokenViT

_SIZES: dict[str, dict[str, Any]] = {
    "lvvit_t": dict(embed_dim=240, depth=12, num_heads=4),
    "lvvit_s": dict(embed_dim=384, depth=16, num_heads=6, skip_lam=2.0),
    "lvvit_m": dict(embed_dim=512, depth=20, num_heads=8, skip_lam=2.0),
    "lvvit_l": dict(embed_dim=768, depth=24, num_heads=12, skip_lam=3.0, stem_width=128),
}
# Arguments that need no record: the model tells them by itself, or they are no part of it.
_NOT_KEPT = ("num_classes", "in_chans", "global_pool", "img_size", "device", "dtype")


def _cfg(file: str, size: int = 224, crop_pct: float = 1.0) -> dict[str, Any]:
    return _vit_cfg(
        url=f"https://github.com/zihangJiang/TokenLabeling/releases/download/{file}",
        input_size=(3, size, size),
        crop_pct=crop_pct,
        mean=IMAGENET_DEFAULT_MEAN,
        std=IMAGENET_DEFAULT_STD,
        first_conv="base.patch_embed.conv1",
        classifier=("base.head", "head.tokens"),
    )


default_cfgs = generate_default_cfgs(
    {
        "lvvit_t.tl_in1k": _cfg("v0.2.0/lvvit_t.pth", crop_pct=0.9),
        "lvvit_s.tl_in1k": _cfg("1.0/lvvit_s-26M-224-83.3.pth.tar", crop_pct=0.9),
        "lvvit_s.tl_in1k_384": _cfg("1.0/lvvit_s-26M-384-84.4.pth.tar", 384, crop_pct=0.9),
        "lvvit_m.tl_in1k": _cfg("1.0/lvvit_m-56M-224-84.0.pth.tar"),
        "lvvit_m.tl_in1k_384": _cfg("1.0/lvvit_m-56M-384-85.4.pth.tar", 384),
        "lvvit_l.tl_in1k_448": _cfg("1.0/lvvit_l-150M-448-86.2.pth.tar", 448),
        "lvvit_l.tl_in1k_512": _cfg("1.0/lvvit_l-150M-512-86.4.pth.tar", 512),
    }
)


def _lvvit(variant: str, pretrained: bool, **kwargs: Any) -> TokenViT:
    """Create a variant; kwargs are `timm_tokens.models.token_vit.build`'s parts, and timm's arguments for the base."""

    def make(**base_args: Any) -> VisionTransformer:
        vit = lvvit_base(**_SIZES[variant] | base_args)
        # as timm records for models of its own, so that saved models are made again with them
        arguments: Any = {name: value for name, value in base_args.items() if name not in _NOT_KEPT}
        vit._model_args = arguments
        return vit

    def create(head: dict[str, Any] | None = None, **options: Any) -> TokenViT:
        dense: dict[str, Any] | None = {} if options.get("num_classes") != 0 else None
        model = with_parts(make, head=dense if head is None else head, **options)
        model.register_load_state_dict_pre_hook(_fit)
        return model

    feature_cfg = dict(out_indices=3, feature_cls="getter")
    model = build_model_with_cfg(
        create, variant, pretrained, pretrained_filter_fn=_from_published, feature_cfg=feature_cfg, **kwargs
    )
    if isinstance(model, TokenViT):  # and no feature extractor
        published = dict(first_conv="patch_embed.conv1", classifier=("head", PUBLISHED_HEAD))
        model.base.pretrained_cfg = model.base.default_cfg = model.pretrained_cfg | published
    return model


def _from_published(state_dict: dict[str, Any], model: TokenViT) -> dict[str, Tensor]:
    """The weights of a published checkpoint by a TokenViT's names, fit to the model's image size."""
    weights = clean_state_dict(state_dict.get("state_dict", state_dict))
    if not any(name.startswith("base.") for name in weights):
        weights = {whole_name(name): weight for name, weight in weights.items()}
    return fit_position_embedding(weights, model)


def _fit(model: TokenViT, state_dict: dict[str, Tensor], prefix: str, *_: Any) -> None:
    """Before loading, and after names are a TokenViT's: a checkpoint of another image size is made to fit."""
    if not prefix:  # not inside another model, whose checkpoint is its own affair
        state_dict.update(fit_position_embedding(state_dict, model, described=False))


@register_model
def lvvit_t(pretrained: bool = False, **kwargs: Any) -> TokenViT:
    """LV-ViT-T: 8.53 M parameters."""
    return _lvvit("lvvit_t", pretrained, **kwargs)


@register_model
def lvvit_s(pretrained: bool = False, **kwargs: Any) -> TokenViT:
    """LV-ViT-S: 26.15 M parameters."""
    return _lvvit("lvvit_s", pretrained, **kwargs)


@register_model
def lvvit_m(pretrained: bool = False, **kwargs: Any) -> TokenViT:
    """LV-ViT-M: 55.83 M parameters."""
    return _lvvit("lvvit_m", pretrained, **kwargs)


@register_model
def lvvit_l(pretrained: bool = False, **kwargs: Any) -> TokenViT:
    """LV-ViT-L: 150.47 M parameters, made for images of 448 pixels."""
    return _lvvit("lvvit_l", pretrained, **kwargs)
