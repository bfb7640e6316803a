"""LV-ViT: the plain model inside, the registered ones, and the published checkpoints."""

import pytest
import torch
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block

from timm_tokens import TokenViT, apply_dtem_merging
from timm_tokens.models.lvvit import lvvit

TINY = dict(img_size=32, patch_size=8, embed_dim=24, depth=3, num_heads=3, num_classes=7, skip_lam=2.0)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@pytest.fixture
def published(golden):
    """What the reference implementation gave, and its weights (see tests/golden/README.md)."""
    tensors = golden("lvvit_tiny")
    weights = {name.removeprefix("model."): tensors.pop(name) for name in list(tensors) if name.startswith("model.")}
    return tensors, weights


@pytest.fixture
def plain(published):
    """The tiny plain model with the reference's weights."""
    model = lvvit(**TINY).eval()
    model.load_state_dict({name: w for name, w in published[1].items() if not name.startswith("aux_head")})
    return model


@torch.no_grad()
def test_features_are_the_references(published, plain):
    expected, _ = published
    close(plain.forward_features(expected["images"]), expected["features"], 1e-5)
    close(TokenViT(plain).forward_features(expected["images"]), expected["features"], 1e-5)


def test_the_base_is_timms(plain):
    assert type(plain) is VisionTransformer
    assert all(type(block).forward is Block.forward for block in plain.blocks)


def test_residuals_are_divided_after_drop_path():
    slow, fast = (lvvit(**TINY | dict(skip_lam=s), drop_path_rate=0.5) for s in (2.0, 1.0))
    fast.load_state_dict(slow.state_dict())  # the scaling has no weights
    with torch.no_grad():
        for block in fast.blocks:  # the same, with the scaling in the last map of each branch
            for layer in (block.attn.proj, block.mlp.fc2):
                layer.weight.div_(2)
                layer.bias.div_(2)
    x = torch.randn(4, 3, 32, 32)
    results = []
    for model in (slow, fast):
        torch.manual_seed(1)
        results.append(model.train()(x))
    close(*results)
    assert not torch.allclose(slow.eval()(x), results[0], atol=1e-3)


@torch.no_grad()
def test_the_stem_takes_images_as_timms_does():
    x = torch.randn(2, 3, 40, 32)
    model = lvvit(**TINY, dynamic_img_size=True).eval()
    assert model.forward_features(x).shape == (2, 21, 24)
    padded = lvvit(**TINY, dynamic_img_size=True, dynamic_img_pad=True).eval()
    padded.load_state_dict(model.state_dict())
    close(padded(x[:, :, :37, :30]), model(torch.nn.functional.pad(x[:, :, :37, :30], (0, 2, 0, 3))))
    with pytest.raises(AssertionError, match="37 x 32 pixels should be divisible by the patch size"):
        model(x[:, :, :37])
    fixed = lvvit(**TINY).eval()
    with pytest.raises(AssertionError, match=r"40 x 32 pixels don't match the model, made for \(32, 32\)"):
        fixed(x)
    fixed.load_state_dict(model.state_dict())
    fixed.set_input_size((40, 32))
    close(fixed(x), model(x))
    with pytest.raises(ValueError, match=r"patch size is \(8, 8\) and can't be changed, got 16"):
        fixed.set_input_size(patch_size=16)


@pytest.mark.parametrize("r", [0, 3])
@torch.no_grad()
def test_merging_around_the_plain_model(plain, published, r):
    x = published[0]["images"]
    model = apply_dtem_merging(plain, r=r).eval()
    if r == 0:
        close(model(x), plain(x))
    assert model.token_groups(x).unique().numel() == 16 - 3 * r
