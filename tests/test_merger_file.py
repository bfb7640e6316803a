"""A merger in a file of its own: what comes back, for which bases, and what is refused."""

import json
import warnings
from pathlib import Path

import families
import pytest
import timm
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tiny import base, images, merging

import timm_tokens
from timm_tokens import apply_dtem_merging, identity, merger_file, save_merger
from timm_tokens.merger_file import read_merger


def trained(vit=None, r=3, **options):
    """A model whose merger is not at its start."""
    model = apply_dtem_merging(base() if vit is None else vit, r, **options).eval()
    with torch.no_grad():
        for parameter in model.merger.parameters():
            parameter.normal_(std=0.5)
    return model


def test_comes_back_the_same(tmp_path):
    model = trained(r=[2, 5], embed_dim=12, tau1=0.2, tau2=0.3, candidates=2, prop_attn=False)
    path = save_merger(model, tmp_path / "new" / "merger.safetensors")
    back = apply_dtem_merging(base(), weights=path)
    assert back.merger.config == model.merger.config | {"r": [2, 5]}
    assert torch.equal(back(images()), model(images()))
    assert not torch.equal(back(images()), merging(r=[2, 5])(images()))
    assert apply_dtem_merging(base(), 1, weights=str(path)).merger.r == 1
    smallest = merging(r=None, embed_dim=12, flops_ratio=0.9).merger.r
    assert apply_dtem_merging(base(), weights=path, flops_ratio=0.9).merger.r == smallest > 0


def test_every_family_comes_back(tmp_path):
    for name in families.MERGEABLE:
        model = trained(families.create(name), 4)
        back = apply_dtem_merging(model.base, weights=save_merger(model, tmp_path / "merger.safetensors"))
        assert torch.equal(back(families.images()), model(families.images())), name


def test_keys_have_no_weights_but_a_file(tmp_path):
    path = save_merger(merging(r=(4, -1.0), metric="keys"), tmp_path / "merger.safetensors")
    back = apply_dtem_merging(base(), weights=path).merger
    assert (back.metric, back.r, load_file(path)) == ("keys", (4, -1.0), {})


def test_half_precision_halves_the_file(tmp_path):
    vit = timm.create_model("vit_tiny_patch16_224")
    model = apply_dtem_merging(vit, 13)
    sizes = [save_merger(model, tmp_path / "m", dtype=dtype).stat().st_size for dtype in (None, torch.float16)]
    assert 590_000 < sizes[0] < 610_000 and 295_000 < sizes[1] < 305_000
    back = apply_dtem_merging(vit, weights=tmp_path / "m").merger
    assert back.embed[3].weight.dtype == torch.float32
    assert torch.equal(back.embed[3].weight, model.merger.embed[3].weight.half().float())


def test_metadata_says_what_it_is(tmp_path):
    vit = timm.create_model("test_vit")
    path = save_merger(trained(vit), tmp_path / "m", notes={"data": "digits"})
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    assert metadata["format"] == "timm-tokens merger" and metadata["base"] == "test_vit.r160_in1k"
    assert json.loads(metadata["config"])["r"] == 3 and json.loads(metadata["notes"]) == {"data": "digits"}


def test_from_a_runs_folder(tmp_path):
    save_merger(trained(), tmp_path / "merger.safetensors")
    assert apply_dtem_merging(base(), weights=tmp_path).merger.r == 3
    (tmp_path / "merger.safetensors").rename(tmp_path / "other.safetensors")
    with pytest.raises(FileNotFoundError, match=r"has no merger\.safetensors"):
        apply_dtem_merging(base(), weights=tmp_path)


def test_from_the_hub(tmp_path, monkeypatch):
    asked = []

    def download(repo, name, revision=None, **kwargs):
        asked.append((repo, name, revision))
        if repo == "user/none":
            raise OSError("404")
        return str(tmp_path / "m")

    monkeypatch.setattr(merger_file, "hf_hub_download", download)
    model = trained()
    save_merger(model, tmp_path / "m")
    for source in ("hf-hub:user/name", "hf_hub:user/name@v1"):
        assert torch.equal(apply_dtem_merging(base(), weights=source)(images()), model(images()))
    assert asked == [("user/name", "merger.safetensors", None), ("user/name", "merger.safetensors", "v1")]
    with pytest.raises(OSError, match=r"merger\.safetensors of user/none can't be downloaded"):
        apply_dtem_merging(base(), weights="hf-hub:user/none")


def test_another_base_is_refused(tmp_path):
    path = save_merger(trained(timm.create_model("test_vit")), tmp_path / "m")
    for other in (timm.create_model("test_vit2"), timm.create_model("test_vit3"), base(embed_dim=96), base(depth=5)):
        with pytest.raises(ValueError, match=r"a merger for test_vit\.r160_in1k \(6 blocks, 64 channels, 2 heads\)"):
            apply_dtem_merging(other, weights=path)
    relative = timm.create_model("test_vit")  # the same shape under another name
    relative.pretrained_cfg = relative.pretrained_cfg | {"architecture": "other_vit_224"}
    with pytest.raises(ValueError, match="but the model is other_vit_224"):
        apply_dtem_merging(relative, weights=path)


def test_the_same_weights_are_known_in_any_precision(tmp_path):
    for dtype in (torch.float16, torch.bfloat16, torch.float64):
        whole, rounded = base(), base().to(dtype)
        for saved, loaded in ((whole, rounded), (rounded, whole)):
            apply_dtem_merging(loaded, weights=save_merger(trained(saved), tmp_path / "m"))  # a warning is an error


def test_other_weights_are_warned_about(tmp_path):
    path = save_merger(trained(), tmp_path / "m")
    other = base()
    with torch.no_grad():
        other.blocks[1].mlp.fc1.weight.mul_(1.001)
    with pytest.warns(UserWarning, match="was trained on other weights than this model has"):
        apply_dtem_merging(other, weights=path)
    classifier = base()
    classifier.reset_classifier(7)  # the merger does not depend on it
    apply_dtem_merging(classifier, weights=path)


def test_what_can_not_be_compared_is_said(tmp_path):
    path = save_merger(trained(base().half()), tmp_path / "m")
    with pytest.warns(UserWarning, match="can't be compared"):
        apply_dtem_merging(base().bfloat16(), weights=path)


def test_adapters_and_quantised_bases_compare_by_what_is_left(tmp_path):
    plain = identity.digest(base())
    wrapped = base()
    for block in wrapped.blocks:
        block.mlp.fc1 = torch.nn.Sequential(block.mlp.fc1)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.ao is deprecated
        quantised = torch.ao.quantization.quantize_dynamic(base(), {torch.nn.Linear})
    for changed in (wrapped, quantised):
        found = identity.digest(changed)
        assert identity.same_weights(plain, found) is True
        assert 0 < len(found["float16"].keys() & plain["float16"]) < len(plain["float16"])
    with torch.no_grad():
        quantised.blocks[1].norm2.weight.mul_(1.01)
    assert identity.same_weights(plain, identity.digest(quantised)) is False


def test_settings_come_with_the_weights(tmp_path):
    path = save_merger(trained(embed_dim=12), tmp_path / "m")
    with pytest.raises(ValueError, match="trained with embed_dim=12, got embed_dim=16"):
        apply_dtem_merging(base(), weights=path, embed_dim=16)
    with pytest.raises(ValueError, match="metric='learned', got metric='keys'"):
        apply_dtem_merging(base(), weights=path, metric="keys")
    assert apply_dtem_merging(base(), weights=path, embed_dim=12).merger.embed_dim == 12


def rewritten(path, weights=None, **metadata):
    """The file with other tensors, or other metadata."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
    save_file(load_file(path) if weights is None else weights, path, old | metadata)


def test_wrong_files_are_refused_in_words(tmp_path):
    path, model = tmp_path / "m", trained()
    weights = load_file(save_merger(model, path))

    def refused(match, error=ValueError):
        with pytest.raises(error, match=match):
            apply_dtem_merging(base(), weights=path)

    rewritten(path, version="2")
    refused("version 2 of the format; this timm-tokens reads 1")
    for name, value in (("config", "{"), ("config", "[]"), ("config", '{"r": 3}'), ("shape", "{}")):
        save_merger(model, path)
        rewritten(path, **{name: value})
        refused(f"is corrupt: '{name}' in its metadata")
    save_merger(model, path)
    rewritten(path, config=json.dumps(model.merger.config | {"tau1": -1}))
    refused("holds no merger for this model: tau1 must be greater than 0")
    save_merger(model, path)
    rewritten(path, {"embed.0.weight": weights["embed.0.weight"]})
    refused("holds no merger for this model: .*\\s.*Missing key")
    rewritten(path, weights | {"embed.1.bias": torch.full((16,), torch.nan)})
    refused(r"not finite: embed\.1\.bias")
    save_file(weights, path)
    refused("the tensors of one, but not the metadata")
    save_file(model.state_dict(), path)
    refused("holds no merger: its .* seem to be a whole model's")
    save_file({}, path)
    refused("holds no merger")
    torch.save(weights, path)
    refused("is corrupt, or no safetensors file")
    save_merger(model, path)
    path.write_bytes(path.read_bytes()[:-40])
    refused("is corrupt, or no safetensors file")
    path = save_merger(model, tmp_path / "flipped.safetensors")
    data = bytearray(path.read_bytes())
    data[-1] ^= 1  # the lowest bit of a weight's exponent
    path.write_bytes(data)
    refused("is corrupt: it is not what was written")
    path.unlink()
    refused("there is no file .* 'hf-hub:user/name'", FileNotFoundError)


def test_what_can_not_be_saved_is_refused(tmp_path):
    with pytest.raises(ValueError, match="merges no tokens"):
        save_merger(base(), tmp_path / "m")
    model = trained()
    with torch.no_grad():
        model.merger.embed[1].bias[2] = 1e6
    save_merger(model, tmp_path / "m")
    with pytest.raises(ValueError, match=r"in torch\.float16 are not finite: embed\.1\.bias"):
        save_merger(model, tmp_path / "half", dtype=torch.float16)
    assert not (tmp_path / "half").exists()


def test_meta_is_refused(tmp_path):
    path = save_merger(trained(), tmp_path / "m")
    with pytest.raises(ValueError, match="the model is on the meta device"):
        apply_dtem_merging(base().to("meta"), weights=path)


def test_parts_are_kept_and_names_work(tmp_path):
    model = timm.create_model("token_vit", base="test_vit", merger={"r": 4})
    path = save_merger(model, tmp_path / "m")
    with pytest.warns(UserWarning, match="on other weights of test_vit"):  # random ones
        named = timm.create_model("token_vit", base="test_vit", merger={"weights": str(path)})
    assert named.merger.r == 4
    aux = apply_dtem_merging(timm_tokens.add_aux_tokens(model.base, 2, 2), weights=path)
    assert aux.aux is not None and aux.merger.r == 4


def test_a_file_of_yesterday():
    """tests/golden/merger.safetensors must load for ever; its logits were written with it."""
    path = Path(__file__).parent / "golden" / "merger.safetensors"
    saved = read_merger(path)
    model = apply_dtem_merging(base(), weights=path)
    assert model.merger.r == (2, 5) and model.merger.embed_dim == 8 and saved.notes["logits"]
    torch.testing.assert_close(model(images(1)), torch.tensor(saved.notes["logits"]), atol=1e-5, rtol=1e-5)


def test_the_merger_of_the_releases():
    """It fits timm's ViT-Tiny; these weights are others, which it says."""
    path = Path(__file__).parents[1] / "mergers" / "vit_tiny_patch16_224.safetensors"
    with pytest.warns(UserWarning, match=r"on other weights of vit_tiny_patch16_224"):
        model = apply_dtem_merging(timm.create_model("vit_tiny_patch16_224"), weights=path).eval()
    assert model.merger.metric == "learned" and model.token_counts()[-1] == 38
    assert model.flops() / model.flops(0) == pytest.approx(0.648, abs=0.001)
    assert path.stat().st_size < 400_000
