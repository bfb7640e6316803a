"""Tiny models with weights large enough that a wrong bias, size or merge shows in the logits."""

import timm
import torch
from timm.models import Eva, VisionTransformer
from torch import nn

import timm_tokens

_SHAPE = dict(img_size=32, patch_size=8, embed_dim=48, num_heads=3, num_classes=10)  # 16 patches
FAMILIES = {
    "class_token": lambda **kw: VisionTransformer(**_SHAPE | kw),
    "average": lambda **kw: VisionTransformer(**_SHAPE | kw, class_token=False, reg_tokens=1, global_pool="avg"),
    "attention_pool": lambda **kw: VisionTransformer(**_SHAPE | kw, class_token=False, global_pool="map"),
    "rope": lambda **kw: Eva(**_SHAPE | kw, use_rot_pos_emb=True),
    "mixed_rope": lambda **kw: timm.create_model("vit_small_patch16_rope_mixed_224", **_SHAPE | kw, init_values=0.5),
}


def base(family="class_token", depth=2, **kwargs):
    """A plain timm ViT in evaluation mode, the same at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(1)
        vit = FAMILIES[family](depth=depth, **kwargs).eval()
        for parameter in vit.parameters():
            if parameter.ndim > 1:
                nn.init.normal_(parameter, std=max(parameter[0].numel(), 3) ** -0.5)
    return vit


def merging(family="class_token", depth=2, r=3, base_args=None, **kwargs):
    """A TokenViT around `base`, in evaluation mode; its embeddings are the same at every call, too."""
    return timm_tokens.apply_dtem_merging(base(family, depth, **(base_args or {})), r, **kwargs).eval()


def images(batch=3, seed=0):
    return torch.randn(batch, 3, 32, 32, generator=torch.Generator().manual_seed(seed))
