"""transformers' TimmWrapper runs registered models, and saves and loads them."""

import pytest
import torch

import timm_tokens

transformers = pytest.importorskip("transformers")


def wrapper(name, **args):
    config = transformers.TimmWrapperConfig(architecture=name, model_args={"img_size": 64, **args}, num_labels=10)
    return transformers.TimmWrapperForImageClassification(config).eval()


def test_a_registered_model_survives_saving(tmp_path):
    model, images = wrapper("deit_tiny_dtem"), torch.randn(2, 3, 64, 64)
    model.save_pretrained(tmp_path)
    loaded = transformers.TimmWrapperForImageClassification.from_pretrained(tmp_path).eval()
    assert isinstance(loaded.timm_model, timm_tokens.TokenViT)
    torch.testing.assert_close(loaded(pixel_values=images).logits, model(pixel_values=images).logits)


def test_logits_and_hidden_states_are_those_of_the_token_vit():
    model, images = wrapper("test_vit"), torch.randn(2, 3, 64, 64)
    model.timm_model = timm_tokens.apply_dtem_merging(model.timm_model, 2, metric="keys").eval()
    output = model(pixel_values=images, output_hidden_states=True)
    torch.testing.assert_close(output.logits, model.timm_model(images))
    maps = model.timm_model.forward_intermediates(images, intermediates_only=True)
    for hidden, expected in zip(output.hidden_states, maps, strict=True):
        torch.testing.assert_close(hidden, expected)
