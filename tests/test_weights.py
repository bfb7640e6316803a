"""Checkpoints of others: their layouts are found by the model's names, and nothing in them is run."""

import argparse
import pickle
import shutil
from collections import OrderedDict
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from safetensors.torch import save_file
from torch import nn

import timm_tokens
from timm_tokens.checkpoint_file import read_checkpoint
from timm_tokens.digests import save_tensors
from timm_tokens.filling import fill
from timm_tokens.weights import find_weights, read_weights


def vit(seed=0, **kwargs):
    torch.manual_seed(seed)
    model = timm.create_model("test_vit", **{"num_classes": 0} | kwargs)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return model


def prefixed(model, prefix, **more):
    return OrderedDict({f"{prefix}{name}": x for name, x in model.state_dict().items()}, **more)


class Options(dict):
    """As Lightning keeps hyper-parameters: a dict of a class of its own."""


A, B = vit(1), vit(2)
HEAD = {"head.mlp.0.weight": torch.ones(3, 3)}
LIGHTLY = prefixed(A, "student_backbone.vit.") | prefixed(B, "teacher_backbone.vit.") | HEAD
LAYOUTS = {  # with weights of one model
    "plain": A.state_dict(),
    "DDP": prefixed(A, "module."),
    "compiled DDP": prefixed(A, "module._orig_mod."),
    "timm": {"epoch": 3, "arch": "test_vit", "state_dict": A.state_dict(), "optimizer": {"state": {0: torch.ones(1)}}},
    "timm, averaged": {"state_dict": B.state_dict(), "state_dict_ema": A.state_dict()},
    "DeiT, averaged": {"model": B.state_dict(), "model_ema": A.state_dict(), "args": argparse.Namespace(lr=1)},
    "MAE": {"model": prefixed(A, "") | {"mask_token": torch.ones(1, 1, 3), "decoder_embed.weight": torch.ones(3, 3)}},
    "MoBY, one of both": {"model": prefixed(A, "encoder.") | {"queue1": torch.ones(3, 3)}},
    "DINOv2, teacher alone": {"teacher": prefixed(A, "backbone.") | {"dino_head.weight": torch.ones(3, 3)}},
    "Lightning": {"state_dict": prefixed(A, "model.") | HEAD, "hyper_parameters": Options(lr=1, path=Path("x"))},
    "lightly, backbone alone": {"state_dict": prefixed(A, "backbone.vit.") | HEAD, "callbacks": {"x": np.float64(1)}},
    "OpenCLIP": prefixed(A, "visual.trunk.") | {"logit_scale": torch.ones(()), "transformer.ln.weight": torch.ones(3)},
    "OpenCLIP, DDP": {"state_dict": prefixed(A, "module.visual.trunk."), "name": "run", "epoch": 1},
    "the same twice": {"model": A.state_dict(), "weights": {"net": A.state_dict()}},
}
SEVERAL = {  # with weights of two models, and the keys to choose by
    "DINO": (
        {"student": prefixed(A, "module.backbone.") | HEAD, "teacher": prefixed(B, "backbone.") | HEAD, "epoch": 3,
         "args": argparse.Namespace(arch="vit", path=Path("x")), "dino_loss": {"center": torch.ones(3)}},
        {"student": A, "teacher": B, "student.module.backbone": A, "teacher.backbone": B},
    ),
    "MoBY": (
        {"model": prefixed(A, "encoder.") | prefixed(B, "encoder_k.")},
        {"model.encoder": A, "model.encoder_k": B, "encoder": A, "encoder_k": B},
    ),
    "DINOv2": (
        {"model": prefixed(A, "student.backbone.") | prefixed(B, "teacher.backbone.") | HEAD, "iteration": 3},
        {"model.student": A, "model.teacher.backbone": B, "student": A, "teacher": B},
    ),
    "lightly": ({"state_dict": LIGHTLY}, {"state_dict.student_backbone": A, "state_dict.teacher_backbone": B}),
    "pairs": ({"ema": A.state_dict(), "net": B.state_dict()}, {"ema": A, "net": B}),
}  # fmt: skip


def same(found, model):
    wanted = model.state_dict()
    return found.keys() == wanted.keys() and all(torch.equal(x, wanted[name]) for name, x in found.items())


@pytest.fixture
def saved(tmp_path):
    def save(checkpoint):
        torch.save(checkpoint, tmp_path / "checkpoint.pth")
        return tmp_path / "checkpoint.pth"

    return save


def test_where_one_fits_it_is_found(saved):
    for name, layout in LAYOUTS.items():
        assert same(read_weights(saved(layout), vit()), A), name


def test_where_several_fit_a_key_is_asked_for(saved):
    for name, (layout, keys) in SEVERAL.items():
        path = saved(layout)
        with pytest.raises(
            ValueError, match=r"checkpoint.pth: several weights in it fit the model: .*checkpoint_key: "
        ):
            read_weights(path, vit())
        for key, model in keys.items():
            assert same(read_weights(path, vit(), key), model), (name, key)
    with pytest.raises(ValueError, match=r"by checkpoint_key: student.module.backbone, teacher.backbone$"):
        find_weights(SEVERAL["DINO"][0], vit())
    with pytest.raises(ValueError, match=r"several weights in it fit"):
        find_weights(SEVERAL["DINO"][0], vit(), "backbone")
    model = {"model": A.state_dict(), "ema": {"model": B.state_dict()}}
    assert same(find_weights(model, vit(), "model"), A)  # what starts with the key comes first
    with pytest.raises(ValueError, match=r"no weights of the model under 'encode'"):
        find_weights(SEVERAL["MoBY"][0], vit(), "encode")


def test_the_one_that_fits_is_taken_among_models_of_other_sizes():
    small, large = vit(3, embed_dim=32, num_heads=2), vit(4, depth=8)
    checkpoint = {"student": prefixed(small, "module.backbone."), "teacher": prefixed(large, "backbone.")}
    assert same(find_weights(checkpoint, vit(embed_dim=32, num_heads=2)), small)
    assert same(find_weights(checkpoint, vit(depth=8)), large)
    with pytest.raises(ValueError, match=r"of whose \d+ weights it lacks \d+: .* is \(\d.* there and"):
        find_weights(checkpoint, vit(embed_dim=48))


def test_a_classifier_of_other_classes_is_the_loader_s_to_judge():
    other = vit(5, num_classes=7)
    found = find_weights({"model": other.state_dict()}, vit(num_classes=3))
    assert found["head.weight"].shape[0] == 7 and torch.equal(found["norm.weight"], other.norm.weight)


def test_timm_converts_what_it_knows():
    larger = vit(6, img_size=64)
    model = vit(img_size=32)
    found = find_weights({"teacher": prefixed(larger, "backbone.")}, model)
    assert found["pos_embed"].shape == model.pos_embed.shape  # resampled
    model.load_state_dict(found)
    names = {name.replace("blocks.", f"blocks.{int('blocks.3' in name)}."): x for name, x in A.state_dict().items()}
    assert any(name.startswith("blocks.1.3.") for name in names)
    assert same(find_weights({"model": names}, vit()), A)  # DINOv2's groups of blocks


def test_openai_names(saved):
    open_clip = pytest.importorskip("open_clip")
    clip = open_clip.model.CLIP(
        64, open_clip.CLIPVisionCfg(layers=2, width=64, head_width=32, patch_size=8, image_size=32),
        open_clip.CLIPTextCfg(context_length=4, vocab_size=10, width=32, heads=2, layers=1), quick_gelu=True,
    )  # fmt: skip
    path = saved({"state_dict": prefixed(clip, "module.")})
    shape = dict(img_size=32, patch_size=8, embed_dim=64, depth=2, num_heads=2)
    model = timm.create_model("vit_base_patch16_clip_quickgelu_224", num_classes=64, **shape)
    model.load_state_dict(read_weights(path, model))
    x = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        torch.testing.assert_close(model.eval()(x), clip.eval().encode_image(x), atol=1e-4, rtol=1e-3)


def test_token_vits():
    model = timm_tokens.apply_dtem_merging(vit(8))
    whole = timm_tokens.apply_dtem_merging(A)
    for layout in (whole.state_dict(), prefixed(whole, "module."), {"state_dict": prefixed(whole, "net.")}):
        found = find_weights(layout, model)
        assert same(found, whole)
        model.load_state_dict(found)
    assert same(find_weights({"teacher": prefixed(A, "backbone.")}, model), A)


def test_a_run_s_checkpoint_gives_its_model(saved):
    state = {"trainable_module.vit." + name: x for name, x in B.state_dict().items()}
    checkpoint = {"state_dict": A.state_dict(), "task_state": state, "step": 3}
    assert same(find_weights(checkpoint, vit()), A)
    assert same(find_weights(checkpoint, vit(), "task_state"), B)


class Evil:
    """Would copy this file to another place when it is unpickled."""

    def __init__(self, target):
        self.target = str(target)

    def __reduce__(self):
        return (shutil.copyfile, (__file__, self.target))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([torch.ones(1)], "it holds a list, not weights by their names"),
        (torch.ones(1), "it holds a Tensor, not weights"),
        (nn.Linear(2, 2), "it holds a pickled torch.nn.modules.linear.Linear, whose code is not run: save its state"),
        ({"model": nn.Linear(2, 2)}, "no weights of the model; it has model; it holds a pickled .*Linear, whose code"),
        ({}, "it has no weights of the model; it has nothing"),
        ({"a": 1, "teacher": {"x": torch.ones(1)}}, "it has no weights of the model; it has a, teacher"),
        (nn.Linear(2, 2).state_dict(), "it has no weights of the model; it has weight, bias"),
        (vit(embed_dim=32, num_heads=2).state_dict(), r"it doesn't fit .* is \(.*32\) there and \(.*64\) in the model"),
    ],
)  # fmt: skip
def test_what_is_no_checkpoint_of_the_model(content, message, saved):
    with pytest.raises(ValueError, match=f"checkpoint.pth: .*{message}") as error:
        read_weights(saved(content), vit())
    assert "\n" not in str(error.value)


def test_keys_that_are_not_there(saved):
    with pytest.raises(ValueError, match=r"it has no weights of the model under 'teacher'; it has model, args"):
        find_weights({"model": A.state_dict(), "args": 1}, vit(), "teacher")


def test_files_that_can_not_be_read(tmp_path):
    files = {
        "list.safetensors": b"[1, 2]", "short.safetensors": b"\x10", "text.pth": b"not a checkpoint",
        "cut.pth": b"PK\x03\x04 cut", "pickle.pth": pickle.dumps({"a": Evil(tmp_path / "copied")}),
    }  # fmt: skip
    save_file({"a": torch.ones(9)}, tmp_path / "whole.safetensors")
    files["cut.safetensors"] = (tmp_path / "whole.safetensors").read_bytes()[:-9]
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(ValueError, match=f"{name} can't be read as a checkpoint") as error:
            read_checkpoint(tmp_path / name)
        assert "\n" not in str(error.value)
    (tmp_path / "empty.pth").touch()
    with pytest.raises(ValueError, match=r"empty.pth is empty: copy it again"):
        read_checkpoint(tmp_path / "empty.pth")
    with pytest.raises(ValueError, match="is a folder: give a checkpoint in it"):
        read_checkpoint(tmp_path)
    with pytest.raises(FileNotFoundError, match=r"no checkpoint file .*nowhere.pth"):
        read_checkpoint(tmp_path / "nowhere.pth")
    save_tensors(tmp_path / "flipped.safetensors", {"a": torch.ones(9)})
    data = bytearray((tmp_path / "flipped.safetensors").read_bytes())
    data[-1] ^= 1
    (tmp_path / "flipped.safetensors").write_bytes(data)
    with pytest.raises(ValueError, match=r"flipped.safetensors is corrupt, its digest is not"):
        read_checkpoint(tmp_path / "flipped.safetensors")


def test_nothing_is_run(saved, tmp_path):
    checkpoint = {"state_dict": A.state_dict(), "callback": Evil(tmp_path / "copied")}
    assert same(read_weights(saved(checkpoint), vit()), A)
    torch.save(checkpoint, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(ValueError, match=r"old.pth can't be read .*: it is not one, or needs code of its own"):
        read_weights(tmp_path / "old.pth", vit())
    assert not (tmp_path / "copied").exists()
    torch.save(A.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert same(read_weights(tmp_path / "old.pth", vit()), A)


# --- loading ---


def test_a_classifier_of_other_classes_is_left_out_unless_it_is_wanted():
    given, model = vit(9, num_classes=7), vit(10, num_classes=3)
    head = model.head.weight.clone()
    fill(model, given.state_dict())
    assert torch.equal(model.head.weight, head) and torch.equal(
        model.blocks[0].attn.qkv.weight, given.blocks[0].attn.qkv.weight
    )
    for without in (given.state_dict(), vit(9).state_dict()):
        with pytest.raises(ValueError, match=r"size mismatch for head|lacks 2 weights, such as head\.weight"):
            fill(vit(num_classes=3), without, classifier=True)
    fill(vit(), given.state_dict())
    fill(vit(num_classes=7), given.state_dict(), classifier=True)


def test_nothing_stays_random_and_nothing_is_left_over():
    state = A.state_dict()
    with pytest.raises(ValueError, match=r"it doesn't fit the model: it lacks 1 weights, such as blocks.1.norm1"):
        fill(vit(), {name: x for name, x in state.items() if name != "blocks.1.norm1.weight"})
    with pytest.raises(ValueError, match=r"it has \d+ weights that the model does not know, such as blocks.6"):
        fill(vit(), vit(depth=7).state_dict())
    with pytest.raises(ValueError, match=r"size mismatch for norm.weight"):
        fill(vit(), state | {"norm.weight": torch.ones(3)})
    model = timm_tokens.apply_dtem_merging(vit(11))
    embedding = [x.clone() for x in model.merger.parameters()]
    fill(model, state)
    assert same(model.base.state_dict(), A)
    assert all(torch.equal(x, kept) for x, kept in zip(model.merger.parameters(), embedding, strict=True))


def test_the_first_convolution_is_adapted_to_the_channels():
    model = vit(in_chans=1)
    fill(model, A.state_dict())
    torch.testing.assert_close(model.patch_embed.proj.weight, A.patch_embed.proj.weight.sum(1, keepdim=True))
    with pytest.raises(ValueError, match=r"patch_embed.proj.weight is for 1 channels, but the model's images have 4"):
        fill(vit(in_chans=4), model.state_dict())
