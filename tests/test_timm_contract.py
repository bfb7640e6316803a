"""What timm's own tests ask of every model, asked quickly of each that this package registers.

docs/models.md says which of timm's tests do not apply, and why.
"""

import fnmatch

import pytest
import timm
import torch
from timm.models._manipulate import group_parameters

from timm_tokens.models import dtem, lvvit, mte, token_vit

TINY = dict(embed_dim=48, depth=3, num_heads=3)  # the rest is as registered, and merges at 224 pixels
MODULES = (dtem, lvvit, mte, token_vit)
NAMES = sorted({name.split(".")[0] for module in MODULES for name in module.default_cfgs})
IDLE = ("aux.",)  # in class logits, auxiliary tokens take no part
NEWER = tuple(map(int, timm.__version__.split(".")[:3])) > (1, 0, 26)


def on_meta(name, **options):
    return timm.create_model(name, device="meta", **{"depth": 3} | options)


def test_all_our_models_are_asked():
    assert set(NAMES) == {
        name for module in MODULES for name in timm.list_models(module=module.__name__.split(".")[-1])
    }
    assert len(NAMES) == 13 and all(timm.models.get_pretrained_cfg(name) is not None for name in NAMES)


@pytest.mark.parametrize("name", NAMES)
def test_configuration(name):
    model = on_meta(name).eval()
    cfg, weights = model.default_cfg, model.state_dict()
    assert model.in_chans == cfg["input_size"][0] and model.num_classes == cfg["num_classes"] == 1000
    classifiers = (cfg["classifier"],) if isinstance(cfg["classifier"], str) else cfg["classifier"]
    for layer in (*classifiers, cfg["first_conv"]):
        assert f"{layer}.weight" in weights, layer
    x = torch.randn(1, *cfg["input_size"], device="meta")
    features = model.forward_features(x)
    assert features.shape[-1] == model.num_features
    pooled = model.forward_head(features, pre_logits=True)
    assert pooled.shape == (1, model.head_hidden_size)
    assert model.to(torch.bfloat16)(x.bfloat16()).dtype == torch.bfloat16
    model.float().reset_classifier(0)
    assert model.num_classes == 0 and model(x).shape == on_meta(name, num_classes=0).eval()(x).shape == pooled.shape
    with pytest.raises(TypeError):
        on_meta(name, not_an_argument=1)


@pytest.mark.parametrize("name", NAMES)
def test_parameter_groups(name):
    model = on_meta(name)
    names = [name for name, _ in model.named_parameters()]
    groups = group_parameters(model, model.group_matcher(coarse=False), reverse=True)
    assert set(groups) == set(names) and len(set(groups.values())) > len(model.blocks)
    for pattern in model.no_weight_decay():
        if not fnmatch.filter(names, pattern):  # of an optional parameter that this model does not have
            owner, _, leaf = pattern.rpartition(".")
            owner = model.get_submodule(owner) if owner != "aux" or model.aux is not None else None
            assert getattr(owner, leaf, None) is None, pattern


@pytest.mark.parametrize("name", NAMES)
def test_new_classifiers_and_sizes_follow_the_model(name):
    model = on_meta(name).double().train()
    model.reset_classifier(0)
    model.reset_classifier(2)
    assert model.num_classes == 2
    if NEWER:  # before, timm's own models get a classifier on the CPU in float32
        assert all(p.is_meta and p.dtype == torch.float64 for p in model.parameters())
    assert all(module.training for module in model.modules())
    frozen = on_meta(name).requires_grad_(False)
    frozen.reset_classifier(0)
    frozen.set_input_size(img_size=tuple(2 * side for side in frozen.default_cfg["input_size"][-2:]))
    if NEWER:  # before, timm's own models resample to a position embedding that learns
        assert not [name for name, parameter in frozen.named_parameters() if parameter.requires_grad]


def test_forward_checkpointing_and_gradients():
    for name in ("deit_tiny_dtem", "vit_tiny_mte", "lvvit_t", "token_vit"):
        model = timm.create_model(name, **TINY, num_classes=7, img_size=64).eval()
        x = torch.randn(2, 3, 64, 64)
        with torch.no_grad():
            logits = model(x)
            final, maps = model.forward_intermediates(x)
            assert logits.shape == (2, 7) and logits.isfinite().all()
            assert [m.shape for m in maps] == [(2, info["num_chs"], 4, 4) for info in model.feature_info]
            torch.testing.assert_close(model.forward_features(x), final)
        model.set_grad_checkpointing()
        with torch.no_grad():
            torch.testing.assert_close(model(x), logits)
            torch.testing.assert_close(model.forward_intermediates(x)[0], final)
        model.train()(x).mean().backward()
        idle = [name for name, parameter in model.named_parameters() if parameter.grad is None]
        assert all(name.startswith(IDLE) for name in idle) and bool(idle) == (model.aux is not None)


@torch.no_grad()
def test_features_only():
    for name in ("deit_tiny_dtem", "vit_tiny_mte", "lvvit_t", "token_vit"):
        for options in ({}, dict(feature_cls="getter"), dict(out_indices=(0, 2))):
            model = timm.create_model(name, features_only=True, **TINY, img_size=64, **options).eval()
            maps, info = model(torch.randn(1, 3, 64, 64)), model.feature_info
            assert [m.shape[1] for m in maps] == info.channels() == [48] * len(maps)
            assert [64 // m.shape[2] for m in maps] == info.reduction()


def test_init_weights_after_to_empty():
    for name in ("deit_tiny_dtem", "vit_tiny_mte", "lvvit_t", "token_vit"):
        model = on_meta(name, dtype=torch.float64, **TINY, img_size=64).to_empty(device="cpu").eval()
        for tensor in (*model.parameters(), *model.buffers()):
            if tensor.is_floating_point():
                tensor.data.fill_(float("nan"))
        model.init_weights()
        assert all(tensor.isfinite().all() for tensor in (*model.parameters(), *model.buffers())), name
        assert model(torch.randn(1, 3, 64, 64, dtype=torch.float64)).isfinite().all()
