"""Channels, sizes and normalisation that a model takes."""

import numpy as np
import pytest
import timm
import torch
from PIL import Image

import timm_tokens
from timm_tokens.data.model_input import check_size, input_config, input_transform

GREY, COLOUR = Image.new("L", (80, 60), 51), Image.new("RGB", (80, 60), (255, 102, 0))


def test_one_channel():
    model = timm.create_model("test_resnet", in_chans=1)
    model.pretrained_cfg |= {"mean": (0.5, 0.4, 0.3), "std": (0.2, 0.3, 0.4)}
    config = input_config(model, 64)
    assert config["input_size"] == (1, 64, 64) and model.pretrained_cfg["input_size"][0] == 3
    assert (config["mean"], config["std"]) == (pytest.approx((0.4,)), pytest.approx((0.3,)))
    for options in ({}, {"is_training": True, "color_jitter": None, "interpolation": "bilinear"}):
        transform = input_transform(config | options)
        for image, value in ((GREY, 51 / 255), (COLOUR, np.asarray(COLOUR.convert("L"))[0, 0] / 255)):
            x = transform(image if image.mode == "RGB" else image.convert("RGB"))
            expected = torch.full((1, 64, 64), (value - config["mean"][0]) / config["std"][0])
            torch.testing.assert_close(x, expected, atol=0.02, rtol=0)
        assert model.eval()(x[None]).shape == (1, 1000)


def test_three_channels_are_as_timm_has_them():
    model = timm.create_model("test_vit")
    assert input_config(model) == timm.data.resolve_model_data_config(model)
    assert input_config(model, (96, 64))["input_size"] == (3, 96, 64)
    merged = timm_tokens.apply_dtem_merging(model, r=2)
    assert input_config(merged, 64) == input_config(model, 64)
    assert input_transform(input_config(model, 64))(COLOUR).shape == (3, 64, 64)


def test_channels_that_no_image_has():
    with pytest.raises(ValueError, match=r"takes images of 4 channels: make it with in_chans 1 \(grey\) or 3 \(RGB\)"):
        input_config(timm.create_model("test_resnet", in_chans=4))


def test_patches_must_fill_the_image():
    vit = timm.create_model("test_vit")
    message = r"images of 100 x 64 px are not filled by .* patches of 16 x 16 px: take 96 x 64 or 112 x 64"
    for model in (vit, timm_tokens.token_label_head(vit)):
        with pytest.raises(ValueError, match=message):
            input_config(model, (100, 64))
        check_size(model, 96, 64)
    with pytest.raises(ValueError, match=r"take 16 x 16$"):
        check_size(vit, 8, 8)
    check_size(timm.create_model("test_vit", dynamic_img_pad=True), 100, 100)  # these are padded
    check_size(timm.create_model("test_resnet"), 100, 100)
