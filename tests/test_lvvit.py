"""LV-ViT: its base, the registered models, and the published checkpoints."""

import argparse

import pytest
import timm
import torch
from safetensors.torch import save_file
from test_protocol import save
from timm.data import resolve_model_data_config
from timm.models import VisionTransformer
from timm.models.vision_transformer import Block

import timm_tokens
from timm_tokens import DenseLogits, apply_dtem_merging
from timm_tokens.models.lvvit_base import lvvit_base

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
    model = lvvit_base(**TINY).eval()
    model.load_state_dict({name: w for name, w in published[1].items() if not name.startswith("aux_head")})
    return model


@pytest.fixture
def model(published):
    """The tiny model with the reference's weights."""
    model = tiny().eval()
    model.load_state_dict(published[1])
    return model


def tiny(**options):
    return timm.create_model("lvvit_s", **TINY | options)


@torch.no_grad()
def test_features_and_logits_are_the_references(published, plain, model):
    expected, _ = published
    x = expected["images"]
    close(plain.forward_features(x), expected["features"])
    close(model.forward_features(x), expected["features"])
    close(model(x), expected["eval_logits"])
    close(model.forward_head(expected["features"]), expected["eval_logits"])
    dense = model(x, dense=True)
    assert isinstance(dense, DenseLogits) and dense.tokens.shape == (2, 16, 7)
    close(dense.cls + 0.5 * dense.tokens.amax(1), expected["eval_logits"])


def test_the_base_is_timms(plain):
    assert type(plain) is VisionTransformer
    assert all(type(block).forward is Block.forward for block in plain.blocks)


def test_residuals_are_divided_after_drop_path():
    slow, fast = (lvvit_base(**TINY | dict(skip_lam=s), drop_path_rate=0.5) for s in (2.0, 1.0))
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
    model = lvvit_base(**TINY, dynamic_img_size=True).eval()
    assert model.forward_features(x).shape == (2, 21, 24)
    padded = lvvit_base(**TINY, dynamic_img_size=True, dynamic_img_pad=True).eval()
    padded.load_state_dict(model.state_dict())
    close(padded(x[:, :, :37, :30]), model(torch.nn.functional.pad(x[:, :, :37, :30], (0, 2, 0, 3))))
    with pytest.raises(AssertionError, match="37 x 32 pixels should be divisible by the patch size"):
        model(x[:, :, :37])
    fixed = lvvit_base(**TINY).eval()
    with pytest.raises(AssertionError, match=r"40 x 32 pixels don't match the model, made for \(32, 32\)"):
        fixed(x)
    fixed.load_state_dict(model.state_dict())
    fixed.set_input_size((40, 32))
    close(fixed(x), model(x))
    with pytest.raises(ValueError, match=r"patch size is \(8, 8\) and can't be changed, got 16"):
        fixed.set_input_size(patch_size=16)


@pytest.mark.parametrize(
    ("name", "millions", "size", "crop"),
    [
        ("lvvit_t", 8.53, 224, 0.9),
        ("lvvit_s", 26.15, 224, 0.9),
        ("lvvit_m", 55.83, 224, 1),
        ("lvvit_l", 150.47, 448, 1),
    ],
)
def test_sizes_and_data(name, millions, size, crop):
    with torch.device("meta"):
        model = timm.create_model(name)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=0.005)
    data = resolve_model_data_config(model)
    assert data["input_size"] == (3, size, size) and data["crop_pct"] == crop and data["interpolation"] == "bicubic"
    assert data["mean"] == (0.485, 0.456, 0.406) and data["std"] == (0.229, 0.224, 0.225)
    assert f"{name}.tl_in1k" in {tagged.removesuffix("_448") for tagged in timm.list_pretrained("lvvit*")}


def test_the_model_counts_its_flops():
    with torch.device("meta"):
        model = timm.create_model("lvvit_s")
    assert model.flops() / 1e9 == pytest.approx(6.6, abs=0.1)  # as published


def module(weights):
    return {f"module.{name}": weight for name, weight in weights.items()}


@pytest.mark.parametrize(
    ("suffix", "form"),
    [
        (".pth.tar", lambda w: {"state_dict": w, "arch": "lvvit_s", "epoch": 299, "args": argparse.Namespace(lr=1e-3)}),
        (".pth.tar", lambda w: {"state_dict": module(w)}),
        (".pth", lambda w: w),
        (".pth", module),
        (".safetensors", None),
    ],
)
@torch.no_grad()
def test_published_checkpoints_load(published, tmp_path, suffix, form):
    expected, weights = published
    file = tmp_path / f"lvvit{suffix}"
    save_file(weights, file) if form is None else torch.save(form(weights), file)
    close(tiny(checkpoint_path=str(file)).eval()(expected["images"]), expected["eval_logits"])
    overlay = dict(file=str(file), num_classes=7, input_size=(3, 32, 32))
    close(tiny(pretrained=True, pretrained_cfg_overlay=overlay).eval()(expected["images"]), expected["eval_logits"])
    merging = tiny(checkpoint_path=str(file), merger=dict(r=0)).eval()
    close(merging(expected["images"]), expected["eval_logits"])


def test_the_url_of_a_published_checkpoint_is_read(published, monkeypatch):
    expected, weights = published
    urls = []

    def download(url, **_):
        urls.append(url)
        return {"state_dict": module(weights)}

    monkeypatch.setattr(timm.models._builder, "load_state_dict_from_url", download)
    model = tiny(pretrained=True, num_classes=7, pretrained_cfg_overlay=dict(num_classes=7))
    assert urls == ["https://github.com/zihangJiang/TokenLabeling/releases/download/1.0/lvvit_s-26M-224-83.3.pth.tar"]
    close(model.eval()(expected["images"]), expected["eval_logits"])
    fewer = tiny(pretrained=True, num_classes=3, in_chans=1)
    assert fewer.base.patch_embed.conv1.in_channels == 1 and fewer.num_classes == fewer.head.num_classes == 3
    assert torch.equal(fewer.base.blocks[2].attn.qkv.weight, weights["blocks.2.attn.qkv.weight"])


@pytest.mark.parametrize("missing", ["aux_head.weight", "head.bias", "blocks.1.attn.qkv.weight", "aux_head"])
def test_a_checkpoint_that_lacks_weights_is_refused(published, missing):
    weights = {name: weight for name, weight in published[1].items() if not name.startswith(missing)}
    with pytest.raises(RuntimeError, match="Missing key"):
        tiny().load_state_dict(weights)
    with pytest.raises(RuntimeError, match=r"Unexpected key.*base\.blocks\.0\.attn\.qkv\.bias"):
        tiny().load_state_dict(published[1] | {"blocks.0.attn.qkv.bias": torch.zeros(72)})


@torch.no_grad()
def test_other_image_sizes(published, model, tmp_path):
    expected, weights = published
    torch.save({"state_dict": weights}, tmp_path / "lvvit.pth.tar")
    larger = tiny(img_size=48, checkpoint_path=str(tmp_path / "lvvit.pth.tar")).eval()
    x = torch.nn.functional.interpolate(expected["images"], size=(48, 48))
    model.set_input_size(48)
    assert model.image_size == (48, 48)
    close(larger(x), model(x))
    dynamic = tiny(dynamic_img_size=True, checkpoint_path=str(tmp_path / "lvvit.pth.tar")).eval()
    close(dynamic(x), model(x))
    close(dynamic(expected["images"]), expected["eval_logits"])
    assert dynamic(x, dense=True).tokens.shape == (2, 36, 7)
    again = tiny(img_size=48)
    again.load_state_dict(tiny().state_dict())  # a whole checkpoint of another size


@torch.no_grad()
def test_features_only_and_intermediates(published, model):
    x = published[0]["images"]
    final, maps = model.forward_intermediates(x, indices=[0, 2], norm=True)
    close(maps[1].flatten(2).transpose(1, 2), final[:, 1:])
    theirs = model.base.forward_intermediates(x, indices=[0, 2], norm=True)
    close([final, *maps], [theirs[0], *theirs[1]])
    features = tiny(features_only=True, out_indices=(0, 1)).eval()
    assert features.feature_info.channels() == [24, 24] and features.feature_info.reduction() == [8, 8]
    assert [m.shape for m in features(x)] == [(2, 24, 4, 4)] * 2


def test_classes_can_be_changed(published):
    x = published[0]["images"]
    model = tiny()
    model.reset_classifier(3)
    assert model(x).shape == (2, 3) and model(x, dense=True).tokens.shape == (2, 16, 3)
    model.reset_classifier(0)
    assert model(x).shape == (2, 24)
    assert tiny(num_classes=0)(x).shape == (2, 24) and tiny(num_classes=0).head is None
    average = tiny(head=dict(pool="avg", pool_weight=1.0)).eval()
    dense = average(x, dense=True)
    close(average(x), dense.cls + dense.tokens.mean(1))


@pytest.mark.parametrize("r", [0, 3])
@torch.no_grad()
def test_merging_around_it(model, published, r):
    x = published[0]["images"]
    merging = apply_dtem_merging(model, r=r).eval()
    assert merging.head is model.head and merging.base is model.base
    assert merging.token_groups(x).unique().numel() == 16 - 3 * r
    if r == 0:
        close(merging(x), model(x))
    merging.load_state_dict(published[1])  # published checkpoints load here, too
    loss = merging.train()(x).square().mean()
    assert loss.isfinite() and loss > 0


@pytest.fixture
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def test_compiles(model, published, fresh_compiler):
    x = published[0]["images"]
    close(torch.compile(model, fullgraph=True, backend="eager")(x), model(x))


def test_exports_with_a_dynamic_batch(model, published, fresh_compiler):
    x, batch = published[0]["images"], torch.export.Dim("batch", max=64)
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},)).module()
    for size in (1, 3):
        images = torch.randn(size, 3, 32, 32)
        close(program(images), model(images))


@pytest.mark.parametrize(
    "change",
    [
        {},
        dict(num_classes=0),
        dict(img_size=48, mlp_ratio=2.0, head=dict(pool="avg", pool_weight=0.3)),
        dict(aux=dict(num_cls=2, num_pooled=0), merger=dict(r=2)),
    ],
)
@torch.no_grad()
def test_saving_gives_the_same_model(tmp_path, change):
    model = tiny(**change).eval()
    x = torch.randn(2, 3, *model.image_size)
    save(model, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    close(again(x), model(x), 0)
    assert again.pretrained_cfg["architecture"] == "lvvit_s" and again.model_args == model.model_args
    if model.head is not None:
        fewer = timm.create_model(f"local-dir:{tmp_path}", pretrained=True, num_classes=3).eval()
        assert fewer(x).shape == (2, 3) and fewer(x, dense=True).tokens.shape[2] == 3


@torch.no_grad()
def test_a_wrapped_model_is_saved_with_its_head(tmp_path, model):
    merging = apply_dtem_merging(model, r=3).eval()
    merging.head.pool_weight = 0.25
    save(merging, tmp_path)
    again = timm.create_model(f"local-dir:{tmp_path}", pretrained=True).eval()
    x = torch.randn(2, 3, 32, 32)
    close(again(x), merging(x), 0)
    assert again.model_args == merging.model_args and again.pretrained_cfg["architecture"] == "token_vit"


def test_trains_with_timms_tools(model):
    groups = timm.optim.param_groups_layer_decay(model, weight_decay=0.05, layer_decay=0.5)
    scales = {id(p): group["lr_scale"] for group in groups for p in group["params"]}
    assert scales[id(model.base.patch_embed.conv1.weight)] == 0.5**4 < scales[id(model.head.tokens.weight)]
    optimizer = timm.optim.create_optimizer_v2(model, opt="adamw", weight_decay=0.05)
    decayed = {id(p) for group in optimizer.param_groups for p in group["params"] if group["weight_decay"]}
    base = model.base
    assert not decayed & {id(base.pos_embed), id(base.cls_token), id(base.patch_embed.bn1.weight)}
    assert id(base.patch_embed.conv1.weight) in decayed
    logits = model.train()(torch.randn(2, 3, 32, 32), dense=True, box=(0, 1, 2, 3))
    timm_tokens.losses.TokenLabelLoss()(logits, torch.tensor([1, 2]), box=(0, 1, 2, 3)).backward()
    assert all(p.grad is not None for p in model.parameters())
