"""torchao's int8, weights alone or activations, too, before and after a model is wrapped."""

import pytest
import torch
from families import create, images

from timm_tokens import apply_dtem_merging, token_label_head
from timm_tokens.keys import mean_keys

quantization = pytest.importorskip("torchao.quantization")

CONFIGS = ["Int8WeightOnlyConfig", "Int8DynamicActivationInt8WeightConfig"]


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_a_quantised_model_merges_by_its_own_keys(config):
    config, x = getattr(quantization, config)(), images(4)
    plain = apply_dtem_merging(create("vit"), 6, metric="keys").eval()
    base = create("vit")
    quantization.quantize_(base, config)
    before = apply_dtem_merging(base, 6, metric="keys").eval()
    after = apply_dtem_merging(create("vit"), 6, metric="keys").eval()
    quantization.quantize_(after, config)
    torch.testing.assert_close(after(x), before(x), atol=0, rtol=0)
    attn, y = base.blocks[0].attn, torch.randn(2, 7, 48)
    expected = attn.qkv(y).chunk(3, dim=-1)[1].unflatten(-1, (3, 16)).mean(dim=2)
    torch.testing.assert_close(mean_keys(attn, y), expected)
    keys = mean_keys(plain.base.blocks[0].attn, y)
    assert 0 < (expected - keys).abs().max() < 0.05 * keys.abs().max()
    assert before.flops() == plain.flops()


@pytest.mark.parametrize("config", CONFIGS)
@torch.no_grad()
def test_learned_embeddings_of_a_quantised_model(config):
    config, base, y = getattr(quantization, config)(), create("vit"), torch.randn(2, 7, 48)
    quantization.quantize_(base, config)
    model = token_label_head(apply_dtem_merging(base, 6)).eval()
    keys = mean_keys(base.blocks[0].attn, y)
    assert (model.merger.embed[0](y) - keys).abs().max() < 0.05 * keys.abs().max()
    logits = model(images(4))
    for part in (model.merger, model.head):
        quantization.quantize_(part, config)
    assert (model(images(4)) - logits).abs().mean() < 0.1 * logits.std()
    model.reset_classifier(7)
    assert model(images(4)).shape == (4, 7)
