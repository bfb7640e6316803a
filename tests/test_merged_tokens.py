"""tokens="merged": fewer tokens, how many patches each stands for, and which patch is in which."""

import families
import pytest
import tiny
import torch
from families import DRIVABLE, MERGEABLE, create

import timm_tokens
from timm_tokens import MergedTokens, TokenViT, apply_dtem_merging


class Program(torch.nn.Module):
    """A forward of the images alone, as export wants it."""

    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, images):
        return tuple(self.model(images, tokens="merged"))


def unmerged(merged):
    index = merged.groups.flatten(1).unsqueeze(2).expand(-1, -1, merged.patches.shape[2])
    return merged.patches.gather(1, index)


def check(model, images):
    """The merged tokens, having seen that they agree with everything else that the model says of them."""
    merged, tokens = model(images, tokens="merged"), model(images, tokens=True)
    assert isinstance(merged, MergedTokens)
    torch.testing.assert_close(unmerged(merged), tokens.patches, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(merged.prefix, tokens.prefix, atol=1e-5, rtol=1e-5)
    assert torch.equal(merged.groups, model.token_groups(images)) and merged.groups.dtype == torch.int64
    for groups, size in zip(merged.groups, merged.size, strict=True):
        assert torch.equal(groups.flatten().bincount(minlength=len(size)).float(), size)
    return merged


@torch.no_grad()
def test_unmerging_gives_every_patch_its_token():
    for name in MERGEABLE:
        for r, left in ((4, 24), (0, 36), (30, 5)):  # 36, then at most half in each of 3 blocks
            merged = check(apply_dtem_merging(create(name), r).eval(), families.images())
            assert merged.patches.shape == (2, left, 48) and merged.size.shape == (2, left), name
            assert merged.groups.shape == (2, 6, 6)


@torch.no_grad()
def test_without_merger_every_patch_is_its_own():
    for name in DRIVABLE:
        merged = check(TokenViT(create(name)).eval(), families.images())
        assert torch.equal(merged.groups[1].flatten(), torch.arange(36)) and torch.equal(merged.size, torch.ones(2, 36))


@torch.no_grad()
def test_other_parts_change_nothing():
    base = create("dinov2_registers")
    expected = check(apply_dtem_merging(base, 4).eval(), families.images())
    model = apply_dtem_merging(timm_tokens.token_label_head(timm_tokens.add_aux_tokens(base, 3, 2), 7), 4).eval()
    assert all(map(torch.equal, check(model, families.images()), expected))
    assert expected.prefix.shape == (2, 5, 48)


@torch.no_grad()
def test_grids_of_other_sizes_and_masks():
    model = tiny.merging("class_token", base_args={"dynamic_img_size": True, "img_size": (32, 48)})
    merged = check(model, torch.randn(2, 3, 48, 24))
    assert merged.groups.shape == (2, 6, 3)
    mask = torch.rand(3, 24) < 0.5
    images = torch.randn(3, 3, 32, 48)
    masked = model(images, tokens="merged", mask=mask)
    torch.testing.assert_close(unmerged(masked), model(images, tokens=True, mask=mask).patches)
    assert not torch.allclose(unmerged(masked), unmerged(model(images, tokens="merged")))


def test_gradients_reach_the_images():
    images = tiny.images().requires_grad_()
    merged = tiny.merging()(images, tokens="merged")
    (merged.patches * merged.size.unsqueeze(2)).sum().backward()
    assert (images.grad.flatten(1).abs().amax(1) > 0).all()


def test_in_training_only_what_is_merged_outright():
    model = tiny.merging().train()
    with pytest.raises(ValueError, match=r"relaxed and leaves every token: call model\.merger\.eval\(\)"):
        model(tiny.images(), tokens="merged")
    model.merger.eval()
    assert model.training and check(model, tiny.images()).patches.shape[1] == 10
    check(tiny.merging(metric="keys").train(), tiny.images())


def test_what_does_not_go_is_refused():
    with pytest.raises(ValueError, match="tokens must be False, True or 'merged', got 'all'"):
        tiny.merging()(tiny.images(), tokens="all")
    with pytest.raises(ValueError, match="dense=True or tokens='merged', not both"):
        timm_tokens.token_label_head(tiny.base())(tiny.images(), tokens="merged", dense=True)
    dropping = tiny.merging(metric="keys", base_args={"patch_drop_rate": 0.5}).train()
    with pytest.raises(ValueError, match=r"8 patches don't fill the grid of 4 x 4, as a map of the groups needs"):
        dropping(tiny.images(), tokens="merged")


@torch.no_grad()
def test_compiled_and_on_meta():
    for family in ("class_token", "average", "rope"):
        torch._dynamo.reset()
        program = Program(tiny.merging(family)).eval()
        expected = program(tiny.images())
        fast = torch.compile(program, fullgraph=True, backend="eager")
        torch.testing.assert_close(fast(tiny.images()), expected, atol=1e-5, rtol=1e-5)
        shapes = [x.shape for x in expected]
        assert [x.shape for x in program.to("meta")(tiny.images().to("meta"))] == shapes
    torch._dynamo.reset()


@torch.no_grad()
def test_exported_with_a_dynamic_batch():
    program = Program(tiny.merging("average")).eval()
    batch = torch.export.Dim("batch", max=64)
    exported = torch.export.export(program, (tiny.images(),), dynamic_shapes=({0: batch},)).module()
    for images in (tiny.images(5), tiny.images(1)):
        torch.testing.assert_close(exported(images), program(images), atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_onnx():
    pytest.importorskip("onnxscript")
    onnxruntime = pytest.importorskip("onnxruntime")
    batch = torch.export.Dim("batch", max=64)
    program = Program(tiny.merging("rope", depth=1)).eval()
    onnx = torch.onnx.export(program, (tiny.images(),), dynamo=True, dynamic_shapes=({0: batch},), verbose=False)
    session = onnxruntime.InferenceSession(onnx.model_proto.SerializeToString())
    for images in (tiny.images(), tiny.images(1, seed=4)):
        given = [torch.from_numpy(x) for x in session.run(None, {session.get_inputs()[0].name: images.numpy()})]
        torch.testing.assert_close(tuple(given), program(images), atol=1e-4, rtol=1e-4)
