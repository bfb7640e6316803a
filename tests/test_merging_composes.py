"""A merger that was trained and calibrated goes wherever its ViT goes."""

import warnings

import families
import pytest
import timm
import tiny
import torch

import timm_tokens
from timm_tokens import apply_dtem_merging, calibrate, save_merger
from timm_tokens.tasks import DTEMTask


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A merger's file, for the tiny ViT, after a few steps and a calibration."""
    model = apply_dtem_merging(tiny.base(depth=3), 4)
    task = DTEMTask(model, r=(2, 6))
    optimizer = torch.optim.AdamW(model.merger.parameters(), lr=1e-2)
    for step in range(3):
        task.train().start_step(step, 3, 3)
        optimizer.zero_grad()
        task(tiny.images(4))["loss"].backward()
        optimizer.step()
        task.end_step()
    calibrate(model, tiny.images(4), 0.7, progress=False)
    return save_merger(model, tmp_path_factory.mktemp("merger") / "merger.safetensors")


def quantised(vit):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        return torch.ao.quantization.quantize_dynamic(vit, {torch.nn.Linear})


@torch.no_grad()
def test_int8(trained):
    float_model = apply_dtem_merging(tiny.base(depth=3), weights=trained).eval()
    model = apply_dtem_merging(quantised(tiny.base(depth=3)), weights=trained).eval()
    difference = (model(tiny.images()) - float_model(tiny.images())).norm() / float_model(tiny.images()).norm()
    assert model.merger.r == float_model.merger.r and 0 < difference < 0.5
    merged = model(tiny.images(), tokens="merged")
    assert merged.patches.shape == float_model(tiny.images(), tokens="merged").patches.shape
    calibrate(model, tiny.images(4), 0.8, progress=False)
    assert model.flops() <= 0.8 * model.flops(0)


@torch.no_grad()
def test_int8_of_torchao(trained):
    quantization = pytest.importorskip("torchao.quantization")
    float_model = apply_dtem_merging(tiny.base(depth=3), weights=trained).eval()
    base = tiny.base(depth=3)
    quantization.quantize_(base, quantization.Int8WeightOnlyConfig())
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # weights can't be compared
        model = apply_dtem_merging(base, weights=trained).eval()
    for name, value in float_model.merger.state_dict().items():
        assert torch.equal(model.merger.state_dict()[name], value)
    expected = float_model(tiny.images())
    assert 0 < (model(tiny.images()) - expected).norm() < 0.3 * expected.norm()
    calibrate(model, tiny.images(4), 0.8, progress=False)
    assert model.flops() <= 0.8 * model.flops(0)


def test_lora(trained, tmp_path):
    peft = pytest.importorskip("peft")
    plain = apply_dtem_merging(tiny.base(depth=3), weights=trained)
    lora = peft.get_peft_model(tiny.base(depth=3), peft.LoraConfig(r=4, target_modules=["qkv"]))
    model = apply_dtem_merging(lora.get_base_model(), weights=trained)
    torch.testing.assert_close(model.eval()(tiny.images()), plain.eval()(tiny.images()))  # LoRA starts as nothing
    with torch.no_grad():
        for name, weight in lora.named_parameters():
            if "lora_B" in name:
                weight.normal_(std=0.3, generator=torch.Generator().manual_seed(0))
    assert not torch.allclose(model(tiny.images()), plain(tiny.images()), atol=1e-2)
    task = DTEMTask(model).train()
    task(tiny.images())["loss"].backward()
    learning = {name for name, weight in model.named_parameters() if weight.grad is not None}
    assert learning and all(name.startswith("merger.") for name in learning)
    schedule = calibrate(model, tiny.images(4), 0.7, progress=False)
    path = save_merger(model, tmp_path / "m.safetensors")
    folded = apply_dtem_merging(lora.merge_and_unload(), weights=path).eval()
    assert folded.merger.r == schedule
    torch.testing.assert_close(folded(tiny.images()), model.eval()(tiny.images()), atol=1e-4, rtol=1e-4)


def test_int8_passes_no_gradients():
    with pytest.raises(ValueError, match="is quantised and passes no gradients: train the merger on the model before"):
        DTEMTask(apply_dtem_merging(quantised(tiny.base()), 3))


@torch.no_grad()
def test_other_parts(trained):
    plain = apply_dtem_merging(tiny.base(depth=3), weights=trained).eval()
    around = timm_tokens.token_label_head(timm_tokens.add_aux_tokens(tiny.base(depth=3), 2, 2))
    model = apply_dtem_merging(around, weights=trained).eval()
    tokens = model(tiny.images(), tokens=True)
    torch.testing.assert_close(tokens.patches, plain(tiny.images(), tokens=True).patches, atol=1e-5, rtol=1e-5)
    assert tokens.aux_cls.shape == (3, 2, 48) and model(tiny.images(), dense=True).tokens.shape == (3, 16, 10)
    again = calibrate(model, tiny.images(4), 0.7, progress=False)
    assert model.merger.r == again and model.aux is around.aux


def test_lvvit():
    model = apply_dtem_merging(timm_tokens.token_label_head(families.create("lvvit")), 5)
    loss = DTEMTask(model).train()(families.images())["loss"]
    loss.backward()
    assert loss > 0 and model.merger.embed[0].weight.grad.abs().sum() > 0
    schedule = calibrate(model, families.images(), 0.98, progress=False)  # its stem costs most
    assert sum(schedule) > 0 and model.eval()(families.images(), tokens="merged").patches.shape[1] == 36 - sum(schedule)


@torch.no_grad()
def test_features_only(tmp_path):
    torch.manual_seed(1)
    named = timm.create_model("token_vit", base="test_vit", img_size=64, merger={"r": [0, 3, 2]}).eval()
    path = save_merger(named, tmp_path / "m.safetensors")
    with pytest.warns(UserWarning, match="other weights"):  # random ones
        options = dict(base="test_vit", img_size=64, merger={"weights": str(path)}, features_only=True)
        extractor = timm.create_model("token_vit", **options).eval()
    extractor.model.load_state_dict(named.state_dict(), strict=False)
    images = torch.randn(2, 3, 64, 64)
    expected = named.forward_intermediates(images, indices=3, intermediates_only=True)
    torch.testing.assert_close(extractor(images), expected)
    assert extractor.model.merger.r == (0, 3, 2)


@torch.no_grad()
def test_compiled(trained):
    model = apply_dtem_merging(tiny.base(depth=3), weights=trained).eval()
    expected = model(tiny.images())
    torch._dynamo.reset()
    fast = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(fast(tiny.images()), expected, atol=1e-5, rtol=1e-5)
    schedule = calibrate(fast, tiny.images(4), 0.8, progress=False)
    assert model.merger.r == schedule
    torch.testing.assert_close(fast(tiny.images()), model(tiny.images()), atol=1e-5, rtol=1e-5)
    assert save_merger(fast, trained.with_name("compiled.safetensors")).exists()
    torch._dynamo.reset()


def test_compiled_training_step():
    losses = []
    for compiled in (False, True):
        torch._dynamo.reset()
        task = DTEMTask(tiny.merging(r=4)).train()
        if compiled:
            task.trainable_module = torch.compile(task.trainable_module, fullgraph=True, backend="aot_eager")
        out = task(tiny.images())
        out["loss"].backward()
        losses.append((out["loss"].detach(), task.product.merger.embed[0].weight.grad))
    torch.testing.assert_close(losses[0], losses[1], atol=1e-5, rtol=1e-3)
    torch._dynamo.reset()
