"""One tiny model for each family of timm's Vision Transformers, with weights that make its features differ."""

import torch
from timm.models import Eva, VisionTransformer, VisionTransformerDistilled
from timm.models.naflexvit import NaFlexVit, NaFlexVitCfg
from timm.models.vision_transformer import (
    DiffParallelScalingBlock,
    ParallelScalingBlock,
    ParallelThingsBlock,
    ResPostBlock,
)

from timm_tokens.models.lvvit_base import lvvit_base

TINY = dict(img_size=48, patch_size=8, embed_dim=48, depth=3, num_heads=3, num_classes=5)
NAFLEX = dict(patch_size=8, embed_dim=48, depth=3, num_heads=3, pos_embed_grid_size=(6, 6))


def vit(**options):
    return lambda **more: VisionTransformer(**TINY, **options, **more)


def eva(**options):
    return lambda **more: Eva(**TINY, **{"qkv_fused": True, **options}, **more)


def naflex(**options):
    return lambda **more: NaFlexVit(NaFlexVitCfg(**NAFLEX, **options), num_classes=5, **more)


MERGEABLE = {
    "vit": vit(),
    "vit_no_class_token": vit(class_token=False, global_pool="avg"),
    "vit_avgmax": vit(global_pool="avgmax"),
    "vit_max": vit(global_pool="max"),
    "vit_pool_with_prefix": vit(global_pool="avg", pool_include_prefix=True),
    "vit_qk_norm": vit(qk_norm=True),
    "vit_scale_norms": vit(scale_attn_norm=True, scale_mlp_norm=True),
    "deit_distilled": lambda **more: VisionTransformerDistilled(**TINY, **more),
    "deit3": vit(no_embed_class=True, init_values=0.3),
    "lvvit": lambda **more: lvvit_base(**TINY, skip_lam=2.0, **more),
    "clip": vit(pre_norm=True, act_layer="quick_gelu"),
    "siglip_map": vit(class_token=False, global_pool="map"),
    "dinov2_registers": vit(reg_tokens=4, no_embed_class=True, init_values=0.3),
    "respost": vit(block_fn=ResPostBlock, init_values=0.3),
    "differential": vit(attn_layer="diff"),
    "prr": vit(global_pool="prr"),
    "eva": eva(),
    "eva_map": eva(global_pool="map", class_token=True),
    "eva02": eva(use_rot_pos_emb=True, swiglu_mlp=True, scale_mlp=True, qkv_fused=False, global_pool="avg"),
    "eva02_post_norm": eva(use_rot_pos_emb=True, use_post_norm=True),
    "dinov3": eva(
        use_rot_pos_emb=True,
        use_abs_pos_emb=False,
        rope_type="dinov3",
        num_reg_tokens=4,
        init_values=0.3,
        no_embed_class=True,
    ),
    "rope_axial": eva(use_rot_pos_emb=True, use_abs_pos_emb=False, attn_type="rope", rope_grid_offset=0.5),
    "rope_mixed": eva(use_rot_pos_emb=True, rope_type="mixed", attn_type="rope"),
    "naflex": naflex(class_token=True, global_pool="token"),
    "naflex_map": naflex(global_pool="map", reg_tokens=2),
    "naflex_rope": naflex(rope_type="axial", attn_type="rope", global_pool="avg", reg_tokens=1),
    "naflex_rope_mixed": naflex(rope_type="mixed", attn_type="rope", global_pool="avg", class_token=True),
}
WHOLE_BLOCKS = {
    "parallel_things": vit(block_fn=ParallelThingsBlock),
    "parallel_scaling": vit(block_fn=ParallelScalingBlock),
    "parallel_differential": vit(block_fn=DiffParallelScalingBlock),
}
DRIVABLE = MERGEABLE | WHOLE_BLOCKS


@torch.no_grad()
def create(name: str, **more) -> torch.nn.Module:
    """The family's model in evaluation mode; its weights are the same at every call."""
    generator = torch.Generator().manual_seed(0)
    model = DRIVABLE[name](**more).eval()
    for key, parameter in sorted(model.named_parameters()):
        noise = torch.randn(parameter.shape, generator=generator)
        if parameter.ndim > 1:
            parameter.copy_(noise * 0.15)
        elif "norm" in key and key.endswith("weight"):
            parameter.copy_(1 + 0.1 * noise)
        elif "gamma" not in key and "lambda" not in key:
            parameter.copy_(0.1 * noise)
    return model


def images(batch: int = 2, size: int = 48) -> torch.Tensor:
    """Random images (B, 3, size, size), the same at every call."""
    return torch.randn(batch, 3, size, size, generator=torch.Generator().manual_seed(1))
