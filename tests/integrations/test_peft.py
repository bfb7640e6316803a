"""peft's LoRA, on the base before it is wrapped and on the whole model, until it is folded in."""

import copy

import pytest
import torch
from families import create, images

from timm_tokens import apply_dtem_merging

peft = pytest.importorskip("peft")

CLOSE = dict(atol=1e-4, rtol=1e-4)


def adapted(model, **options):
    """LoRA on every qkv, with weights that matter."""
    lora = peft.get_peft_model(model, peft.LoraConfig(r=4, target_modules=["qkv"], init_lora_weights=False, **options))
    for name, weight in lora.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(weight, std=0.3)
    return lora.eval()


@pytest.mark.parametrize("options", [{}, {"use_dora": True}, {"use_rslora": True}], ids=["lora", "dora", "rslora"])
@pytest.mark.parametrize("metric", ["keys", "learned"])
@torch.no_grad()
def test_an_adapted_base_merges_as_the_folded_one(metric, options):
    base, x = create("vit"), images(4)
    plain = apply_dtem_merging(base, 6, metric=metric).eval().token_groups(x)
    lora = adapted(base, **options)
    model = apply_dtem_merging(lora.get_base_model(), 6, metric=metric).eval()
    logits, groups = model(x), model.token_groups(x)
    folded = apply_dtem_merging(copy.deepcopy(lora).merge_and_unload(), 6, metric=metric).eval()
    torch.testing.assert_close(logits, folded(x), **CLOSE)
    assert torch.equal(groups, folded.token_groups(x))
    assert (groups == plain).float().mean() < 0.9  # the adapters matter


@pytest.mark.parametrize("metric", ["keys", "learned"])
def test_a_merging_model_is_adapted_trained_and_folded(metric):
    base, x = create("vit"), images(4)
    model = apply_dtem_merging(base, 6, metric=metric)
    lora = adapted(model, lora_dropout=0.1, modules_to_save=["head"])
    lora.train()(x).square().mean().backward()
    trained = {name.split(".")[-3] for name, weight in lora.named_parameters() if weight.grad is not None}
    assert trained >= {"lora_A", "lora_B"}
    with torch.no_grad():
        logits = lora.eval()(x)
        folded = lora.merge_and_unload()
        assert folded is model
        torch.testing.assert_close(folded.eval()(x), logits, **CLOSE)
