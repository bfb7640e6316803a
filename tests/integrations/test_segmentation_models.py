"""segmentation_models_pytorch's DPT reads a TokenViT's un-merged maps."""

import pytest
import torch

import timm_tokens

smp = pytest.importorskip("segmentation_models_pytorch")


def test_dpt_on_a_wrapped_encoder():
    torch.manual_seed(0)
    model = smp.DPT("tu-vit_tiny_patch16_224", encoder_weights=None, classes=3, dynamic_img_size=True).eval()
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        plain = model(images)
        model.encoder.model = timm_tokens.apply_dtem_merging(model.encoder.model, 0, metric="keys").eval()
        torch.testing.assert_close(model(images), plain, atol=1e-4, rtol=1e-4)
        model.encoder.model.merger.r = 2
        assert model(images).shape == (1, 3, 64, 64)
        maps = model.encoder.model.forward_intermediates(images, intermediates_only=True, norm=True)
        assert all(m.shape == (1, 192, 4, 4) for m in maps)  # nothing of the grid is missing


def test_dpt_on_a_registered_encoder():
    model = smp.DPT("tu-deit_tiny_dtem", encoder_weights=None, classes=3, dynamic_img_size=True).eval()
    assert model(torch.randn(1, 3, 64, 64)).shape == (1, 3, 64, 64)
