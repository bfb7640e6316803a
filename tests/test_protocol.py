"""timm's protocol: what timm's scripts, optimizers, savers and feature extractors ask of a model."""

import json

import pytest
import timm
import torch
from families import MERGEABLE, create, images
from safetensors.torch import save_file
from timm.data import resolve_model_data_config
from timm.optim import create_optimizer_v2, param_groups_layer_decay
from timm.utils import ModelEmaV3

import timm_tokens
from timm_tokens import TokenViT, apply_dtem_merging

every_mergeable = pytest.mark.parametrize("family", MERGEABLE)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


@every_mergeable
def test_layer_decay_and_weight_decay_groups_are_the_bases(family):
    base = create(family)
    model = apply_dtem_merging(base, r=2)

    def groups(m, prefix):
        decay = param_groups_layer_decay(m, weight_decay=0.05, layer_decay=0.7)
        known = {id(p): name for name, p in m.named_parameters()}
        return {
            known[id(p)].removeprefix(prefix): (round(g["lr_scale"], 6), g["weight_decay"])
            for g in decay
            for p in g["params"]
            if known[id(p)].startswith(prefix)
        }

    assert groups(model, "base.") == groups(base, "")
    embeds = groups(model, "merger.embed.")
    blocks = groups(model, "base.blocks.")
    for i in range(3):  # an embedding learns at the pace of its block
        assert embeds[f"{i}.weight"][0] == blocks[f"{i}.attn.proj.weight"][0]


def test_weight_decay_spares_position_embeddings():
    model = apply_dtem_merging(create("vit"), r=2)
    optimizer = create_optimizer_v2(model, opt="adamw", weight_decay=0.1)
    spared = {id(p) for group in optimizer.param_groups if group["weight_decay"] == 0 for p in group["params"]}
    assert {id(model.base.pos_embed), id(model.base.cls_token)} <= spared
    assert id(model.merger.embed[0].weight) not in spared


@every_mergeable
def test_members_are_the_bases(family):
    base = create(family)
    model = apply_dtem_merging(base, r=2)
    for member in ("num_classes", "num_features", "head_hidden_size", "embed_dim", "num_prefix_tokens", "global_pool"):
        assert getattr(model, member) == getattr(base, member)
    assert model.get_classifier() is base.get_classifier() or model.get_classifier() == base.get_classifier()
    assert [(f["num_chs"], f["reduction"]) for f in model.feature_info] == [
        (f["num_chs"], f["reduction"]) for f in base.feature_info
    ]
    for info in model.feature_info:
        model.get_submodule(info["module"])
    model.set_grad_checkpointing()
    assert base.grad_checkpointing and model.grad_checkpointing


@every_mergeable
@pytest.mark.parametrize("r", [0, 6])
@torch.no_grad()
def test_forward_intermediates_has_timms_forms(family, r):
    base, x = create(family), images()
    model = apply_dtem_merging(base, r=r).eval()
    for options in (
        dict(indices=2),
        dict(indices=[0, -1], norm=True, return_prefix_tokens=True),
        dict(indices=[1], stop_early=True, output_fmt="NLC", intermediates_only=True),
        dict(indices=None, stop_early=True),
    ):
        ours, theirs = model.forward_intermediates(x, **options), base.forward_intermediates(x, **options)
        flat = [torch.utils._pytree.tree_leaves(result) for result in (ours, theirs)]
        assert [t.shape for t in flat[0]] == [t.shape for t in flat[1]]
        assert type(ours) is type(theirs)
        if r == 0:
            for a, b in zip(*flat, strict=True):
                close(a, b)


@torch.no_grad()
def test_intermediates_stop_early_and_as_dict():
    model, x = apply_dtem_merging(create("vit"), r=6).eval(), images()
    calls = []
    model.merger.register_forward_hook(lambda *_: calls.append(1))
    (early,) = model.forward_intermediates(x, indices=[0], stop_early=True, intermediates_only=True)
    assert len(calls) == 1
    result = model.forward_intermediates(x, indices=[0], output_dict=True, return_prefix_tokens=True)
    assert set(result) == {"image_intermediates", "image_intermediates_prefix", "image_features"}
    close(result["image_intermediates"][0], early)
    close(result["image_features"], model.forward_features(x))
    with pytest.raises(ValueError, match="'NCHW' or 'NLC', got 'NHWC'"):
        model.forward_intermediates(x, output_fmt="NHWC")


@every_mergeable
@torch.no_grad()
def test_tokens(family):
    base, x = create(family), images()
    model = apply_dtem_merging(base, r=6).eval()
    tokens = model(x, tokens=True)
    p = base.num_prefix_tokens
    assert tokens.prefix.shape == (2, p, 48) and tokens.patches.shape == (2, 36, 48) and tokens.cls.shape == (2, 48)
    assert tokens.aux_cls is None and tokens.pooled is None
    close(torch.cat([tokens.prefix, tokens.patches], dim=1), model.forward_features(x))
    if model.has_class_token:
        close(tokens.cls, tokens.prefix[:, 0])


def test_reset_classifier_and_input_size():
    model = apply_dtem_merging(create("vit"), r=2).eval()
    model.reset_classifier(7)
    assert model.num_classes == 7 and model(images()).shape == (2, 7)
    model.reset_classifier(0, "avg")
    assert model(images()).shape == (2, 48)
    model.set_input_size((64, 32))
    x = torch.randn(1, 3, 64, 32)
    assert model.token_groups(x).shape == (1, 8, 4)
    assert model.image_size == (64, 32)


@pytest.mark.parametrize("family", ["vit", "vit_no_class_token", "dinov3", "naflex"])
@pytest.mark.parametrize("training", [False, True])
@torch.no_grad()
def test_without_pooling_every_token_has_its_logits(family, training):
    base, x = create(family), images()
    base.reset_classifier(4, "")
    model = apply_dtem_merging(base, r=5).train(training)
    logits = model(x)
    assert logits.shape == base(x).shape == (2, base.num_prefix_tokens + 36, 4)
    close(logits, model.forward_head(model.forward_features(x)))
    model.merger.r = 0
    close(model(x), base(x))
    with pytest.raises(ValueError, match="global_pool=''"):
        timm_tokens.token_label_head(base)


@pytest.mark.parametrize("family", ["vit", "deit_distilled", "dinov2_registers", "eva02", "dinov3", "rope_mixed"])
@torch.no_grad()
def test_dynamic_image_size(family):
    base = create(family, dynamic_img_size=True)
    x = torch.randn(2, 3, 64, 40)
    model = apply_dtem_merging(base, r=0).eval()
    close(model(x), base(x))
    model.merger.r = 5
    assert model(x).shape == (2, 5) and model.token_groups(x).shape == (2, 8, 5)


@pytest.mark.parametrize("family", ["vit", "eva02", "rope_mixed", "naflex", "naflex_rope", "naflex_rope_mixed"])
def test_patch_dropout(family):
    base = create(family, patch_drop_rate=0.5)
    model = apply_dtem_merging(base, r=3)
    torch.manual_seed(3)
    ours = model.train()(images())
    assert ours.shape == (2, 5) and ours.isfinite().all()
    model.merger.r = 0
    torch.manual_seed(3)
    ours = model(images())
    torch.manual_seed(3)
    close(ours, base.train()(images()))


def test_naflex_takes_images_only():
    model = apply_dtem_merging(create("naflex"), r=3)
    with pytest.raises(TypeError, match=r"images as a tensor .* got a dict"):
        model({"patches": torch.zeros(1, 4, 192)})


def test_distilled_training_returns_both_heads():
    model = apply_dtem_merging(create("deit_distilled"), r=3)
    model.set_distilled_training()
    assert [t.shape for t in model.train()(images())] == [(2, 5), (2, 5)]
    assert model.eval()(images()).shape == (2, 5)


@torch.no_grad()
def test_ema_and_data_config():
    model = timm.create_model("deit_tiny_dtem", num_classes=3)
    assert resolve_model_data_config(model) == resolve_model_data_config(model.base)
    ema = ModelEmaV3(model, decay=0.5)
    for parameter in model.parameters():
        parameter.add_(1.0)
    ema.update(model)
    close(ema.module.merger.embed[0].weight, model.merger.embed[0].weight - 0.5)


def test_plain_and_whole_checkpoints_load(tmp_path):
    base, other = create("vit"), create("vit")
    model = apply_dtem_merging(create("vit"), r=3)
    torch.nn.init.ones_(base.head.bias)
    torch.nn.init.ones_(model.merger.embed[0].bias)
    model.load_state_dict(base.state_dict())  # strict
    assert torch.equal(model.base.head.bias, base.head.bias)
    assert torch.equal(model.merger.embed[0].bias, torch.ones(16))
    again = apply_dtem_merging(other, r=3)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.merger.embed[0].bias, torch.ones(16))
    assert set(model.base.state_dict()) == set(base.state_dict())
    torch.save({"state_dict": base.state_dict()}, tmp_path / "plain.pth")
    timm.models.load_checkpoint(again, str(tmp_path / "plain.pth"))
    close(again.eval()(images()), model.eval()(images()))


def test_a_checkpoint_that_does_not_fit_is_refused():
    model = apply_dtem_merging(create("vit"), r=3)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*base\.extra"):
        model.load_state_dict(create("vit").state_dict() | {"extra": torch.zeros(1)})
    with pytest.raises(RuntimeError, match=r"Missing key.*base\.cls_token"):
        model.load_state_dict({k: v for k, v in create("vit").state_dict().items() if k != "cls_token"})
    wide = apply_dtem_merging(create("vit"), r=3, embed_dim=32)
    with pytest.raises(RuntimeError, match=r"size mismatch for merger\.embed\.0\.weight"):
        model.load_state_dict(wide.state_dict())


def save(model, folder):
    """timm's own saver; before timm recorded a model's arguments by itself, it was told them."""
    known = {} if hasattr(timm.models._builder, "_init_model_traits") else {"model_args": model.model_args}
    timm.models.save_for_hf(model, folder, safe_serialization=True, **known)


@pytest.mark.parametrize(
    ("name", "args"),
    [
        ("deit_tiny_dtem", dict(num_classes=3, merger=dict(r=[4, 2], embed_dim=32))),
        ("token_vit", dict(base="test_vit", num_classes=3, merger=dict(r=5, metric="keys"))),
        ("token_vit", dict(base="test_vit3", merger=dict(r=(6, -1.0)), img_size=96)),
        ("token_vit", dict(base="test_vit2.r160_in1k")),
    ],
)
@torch.no_grad()
def test_save_for_hf_and_local_dir_give_the_same_model(tmp_path, name, args):
    model = timm.create_model(name, **args).eval()
    x = torch.randn(1, 3, *model.image_size)
    save(model, tmp_path)
    json.loads((tmp_path / "config.json").read_text())
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    close(again(x), model(x), tolerance=0)
    assert again.pretrained_cfg["architecture"] == name
    assert (again.merger is None) == (model.merger is None)
    if model.merger is not None:
        assert again.merger.config == model.merger.config


@pytest.mark.skipif(not hasattr(timm.models._builder, "_init_model_traits"), reason="this timm saves no image size")
@torch.no_grad()
def test_a_grid_that_is_not_square_is_resampled_as_it_is(tmp_path):
    model = timm.create_model(
        "token_vit", base="test_vit", img_size=(32, 128), merger=dict(r=2)
    )  # 2 x 8, as many as 4 x 4
    torch.nn.init.normal_(model.base.pos_embed)
    save(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, img_size=(64, 64))
    model.set_input_size((64, 64))
    close(again.base.pos_embed, model.base.pos_embed)


@torch.no_grad()
def test_a_wrapped_model_saves_as_token_vit(tmp_path):
    model = apply_dtem_merging(timm.create_model("test_vit", num_classes=4), r=3).eval()
    model.merger.r = 7
    save(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 160, 160)
    close(again(x), model(x), tolerance=0)
    assert again.merger.r == 7


@pytest.mark.parametrize("head", [{}, dict(num_classes=9)])
@torch.no_grad()
def test_a_saved_model_with_a_label_head_can_get_other_classes(tmp_path, head):
    model = timm.create_model("token_vit", base="test_vit", num_classes=6, head=head).eval()
    save(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
    x = torch.randn(1, 3, 160, 160)
    assert again(x).shape == (1, 3) and again(x, dense=True).tokens.shape[2] == 3
    close(again.forward_features(x), model.forward_features(x))
    if head:  # the base keeps a classifier of its own
        close(again.base(x), model.base(x))


def test_a_base_without_a_name_cannot_be_described():
    with pytest.raises(ValueError, match="does not say by which name"):
        _ = apply_dtem_merging(create("vit")).model_args


@torch.no_grad()
def test_pretrained_loads_the_bases_weights_through_timm(tmp_path):
    base = timm.create_model("test_vit", num_classes=10).eval()
    file = tmp_path / "weights.safetensors"
    save_file(base.state_dict(), file)
    overlay = dict(file=str(file), num_classes=10)
    model = timm.create_model(
        "token_vit", base="test_vit", pretrained=True, pretrained_cfg_overlay=overlay, merger=dict(r=0)
    ).eval()
    x = torch.randn(2, 3, 160, 160)
    close(model(x), base(x))
    fewer = timm.create_model(
        "token_vit", base="test_vit", pretrained=True, pretrained_cfg_overlay=overlay, num_classes=3, in_chans=1
    )
    close(fewer.base.blocks[1].attn.qkv.weight, base.blocks[1].attn.qkv.weight)
    assert fewer.num_classes == 3 and fewer.base.patch_embed.proj.in_channels == 1


@torch.no_grad()
def test_features_only():
    model = timm.create_model("deit_tiny_dtem", features_only=True, out_indices=(2, 5)).eval()
    maps = model(torch.randn(1, 3, 224, 224))
    assert [m.shape for m in maps] == [(1, 192, 14, 14)] * 2
    assert model.feature_info.channels() == [192, 192] and model.feature_info.reduction() == [16, 16]
    assert len(model.model.base.blocks) == len(model.model.merger.embed) == 6


def test_registered_models_are_known_to_timm():
    known = timm.list_models("*dtem*")
    assert {"deit_tiny_dtem", "deit_small_dtem", "deit_base_dtem", "vit_small_dtem", "vit_base_dtem"} <= set(known)
    assert "deit_small_dtem.fb_in1k" in timm.list_pretrained("*dtem*")
    assert timm.models.get_pretrained_cfg("deit_small_dtem").hf_hub_id == "timm/deit_small_patch16_224.fb_in1k"
    assert timm.is_model("token_vit")
    with pytest.raises(TypeError, match=r"base must be the name of a timm ViT.*got 3"):
        timm.create_model("token_vit", base=3)
    assert timm.create_model("token_vit").base.pretrained_cfg["architecture"] == "vit_tiny_patch16_224"
    with pytest.raises(RuntimeError, match="Unknown base model"):
        timm.create_model("token_vit", base="no_such_model")
    assert isinstance(timm.create_model("token_vit", base="test_vit"), TokenViT)
    assert timm_tokens.__version__
