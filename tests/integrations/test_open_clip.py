"""open_clip's timm towers take a TokenViT as their trunk."""

import pytest
import timm
import torch

import timm_tokens

open_clip = pytest.importorskip("open_clip")


def tower(trunk):
    vision = {"timm_model_name": trunk, "timm_model_pretrained": False, "timm_proj": "linear", "image_size": 64}
    text = {"context_length": 8, "vocab_size": 100, "width": 32, "heads": 2, "layers": 1}
    return open_clip.model.CLIP(embed_dim=32, vision_cfg={**vision, "timm_pool": ""}, text_cfg=text).eval()


def test_a_wrapped_trunk_embeds_images():
    clip, images = tower("test_vit"), torch.randn(2, 3, 64, 64)
    plain = clip.encode_image(images)
    trunk = clip.visual.trunk
    clip.visual.trunk = timm_tokens.apply_dtem_merging(trunk, 0, metric="keys").eval()
    torch.testing.assert_close(clip.encode_image(images), plain, atol=1e-5, rtol=0)
    clip.visual.trunk.merger.r = 4
    merged = clip.encode_image(images)
    expected = clip.visual.head(timm_tokens.apply_dtem_merging(trunk, 4, metric="keys").eval()(images))
    torch.testing.assert_close(merged, expected)
    assert (merged - plain).abs().max() > 1e-3  # it did merge


def test_registered_models_are_trunks():
    assert timm.is_model("deit_tiny_dtem")
    assert tower("deit_tiny_dtem").encode_image(torch.randn(1, 3, 224, 224)).shape == (1, 32)
