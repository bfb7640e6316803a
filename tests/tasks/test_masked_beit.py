"""BEiT as DTM's student: masked from outside, and otherwise itself."""

import pytest
import timm
import torch
from tiny import base, images

import timm_tokens
from timm_tokens.losses import DTMLoss
from timm_tokens.tasks import DTMTask
from timm_tokens.tasks.masked_beit import MaskedBeit


def beit(**kwargs):
    torch.manual_seed(0)
    shape = dict(img_size=32, patch_size=8, embed_dim=48, depth=2, num_heads=3, num_classes=0, global_pool="token")
    model = timm.create_model("beit_base_patch16_224", **shape | kwargs).eval()
    for parameter in model.parameters():  # biases of positions are 0 at first
        torch.nn.init.normal_(parameter, std=0.2)
    return model


VARIANTS = [{}, {"use_shared_rel_pos_bias": True}, {"use_rel_pos_bias": False, "use_abs_pos_emb": True}]


@pytest.mark.parametrize("kwargs", VARIANTS)
def test_without_a_mask_it_gives_the_models_own_features(kwargs):
    model = beit(**kwargs)
    expected = model.forward_features(images())
    found = MaskedBeit(model)(images(), mask=torch.zeros(3, 16, dtype=torch.bool))
    torch.testing.assert_close(torch.cat([found.prefix, found.patches], 1), expected)
    model.set_grad_checkpointing()
    again = MaskedBeit(model)(images(), mask=torch.zeros(3, 16, dtype=torch.bool))
    torch.testing.assert_close(again.patches, found.patches)


def test_a_masked_patch_is_hidden():
    task, mask = DTMTask(beit(use_shared_rel_pos_bias=True), base()).eval(), torch.zeros(3, 16, dtype=torch.bool)
    mask[:, 5] = True
    other = images()
    other[:, :, 8:16, 8:16] += 1  # patch 5
    hidden = task.student(images(), mask)
    torch.testing.assert_close(task.student(other, mask), hidden)
    assert not torch.allclose(task.student(other, ~mask), task.student(images(), ~mask))
    with torch.no_grad():
        task.student.vit.mask_token += 1
    assert not torch.allclose(task.student(images(), mask), hidden)


@pytest.mark.parametrize("grouping", ["matching", "kmeans", "superpixels"])
def test_it_learns(grouping):
    model = beit(use_shared_rel_pos_bias=True)
    forward, task = type(model).forward, DTMTask(model, base(), DTMLoss(grouping=grouping, normalize_target=True))
    assert task.product is model and type(model).forward is forward
    optimizer, losses = torch.optim.AdamW(task.train().student.parameters(), lr=3e-3), []
    for step in range(8):
        task.start_step(step, 8, 8)
        optimizer.zero_grad()
        out = task([images(), torch.arange(16).expand(3, -1) % 3 == 0])
        out["loss"].backward()
        optimizer.step()
        losses.append(out["loss"].item())
    assert losses[-1] < 0.9 * losses[0]
    assert task.student.vit.mask_token.grad.any() and model.blocks[0].attn.relative_position_bias_table.grad.any()


def test_compiles_in_one_graph():
    masked, mask = MaskedBeit(beit()), torch.arange(16).expand(3, -1) % 2 == 0
    compiled = torch.compile(masked, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(images(), mask=mask).patches, masked(images(), mask=mask).patches)


def test_what_needs_more_than_whole_blocks_is_refused():
    for refused in (timm_tokens.apply_dtem_merging, timm_tokens.add_aux_tokens, timm_tokens.TokenViT):
        with pytest.raises(TypeError, match=r"timm\.models\.beit\.Beit.* can't be driven from outside"):
            refused(beit())
    with pytest.raises(TypeError, match="VisionTransformer is no BEiT of timm's: for other ViTs use add_mask_token"):
        MaskedBeit(base())
