"""Class logits of a class-token model leave the patches out of the last block's MLP, where nothing could tell."""

import pytest
import torch
import torch.nn.functional as F
from families import DRIVABLE, WHOLE_BLOCKS, create, images
from torch import nn

from timm_tokens import TokenViT, apply_dtem_merging, token_label_head
from timm_tokens.last_block import needs_prefix_alone

CLASS_TOKEN = {
    *("vit", "vit_qk_norm", "vit_scale_norms", "deit_distilled", "deit3", "clip", "dinov2_registers", "respost"),
    *("differential", "naflex"),
}


def tokens_of_the_mlp(model, x):
    """How many tokens each linear map of the last MLP gets."""
    weights, seen, linear = {id(p) for p in model.base.blocks[-1].mlp.parameters()}, set(), F.linear

    def spy(x, weight, bias=None):
        if id(weight) in weights:
            seen.add(x.shape[1])
        return linear(x, weight, bias)

    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(F, "linear", spy)
        model(x)
    return seen


@pytest.mark.parametrize("family", [*DRIVABLE, *(f"{name}, token" for name in ("eva", "eva02_post_norm", "dinov3"))])
@torch.no_grad()
def test_logits_are_the_same_and_class_tokens_take_the_short_way(family):
    name, token = family.removesuffix(", token"), family.endswith(", token")
    base = create(name, global_pool="token") if token else create(name)
    assert needs_prefix_alone(base) == (token or family in CLASS_TOKEN)
    models = [TokenViT(base)] if family in WHOLE_BLOCKS else [TokenViT(base), apply_dtem_merging(base, 7)]
    for model in models:
        features = model.eval().forward_features(images())
        torch.testing.assert_close(model(images()), model.forward_head(features), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("merger", [{}, {"metric": "keys"}, None])
def test_the_mlp_gets_the_prefix_alone(merger, training):
    base = create("dinov2_registers")
    model = TokenViT(base) if merger is None else apply_dtem_merging(base, 7, **merger)
    assert tokens_of_the_mlp(model.train(training), images()) == {5}


@pytest.mark.parametrize("place", ["blocks.2", "blocks.2.mlp", "blocks.2.mlp.fc1", "blocks.2.norm2", "norm"])
@pytest.mark.parametrize("kind", ["register_forward_hook", "register_forward_pre_hook", "register_full_backward_hook"])
def test_hooks_see_all_tokens(place, kind):
    model, shapes = TokenViT(create("vit")).eval(), []

    def hook(module, *tensors):
        tensors = [t[0] if isinstance(t, tuple) else t for t in tensors]
        shapes.extend(t.shape[1] for t in tensors)

    module = model.base.get_submodule(place)
    handle = getattr(module, kind)(hook)
    model(images().requires_grad_()).sum().backward()
    assert shapes and set(shapes) == {37}
    handle.remove()
    assert tokens_of_the_mlp(model, images()) == {1}


def test_what_is_not_known_to_work_token_by_token_gets_all_tokens():
    class Adapted(nn.Linear):
        pass

    model = TokenViT(create("vit")).eval()
    mlp = model.base.blocks[-1].mlp
    mlp.fc2 = Adapted(192, 48)
    assert tokens_of_the_mlp(model, images()) == {37}
    model.base.blocks[-1].mlp = create("vit").blocks[-1].mlp
    model.base.blocks[-1].norm2.forward = model.base.blocks[-1].norm2.forward
    assert tokens_of_the_mlp(model, images()) == {37}
    labels = token_label_head(create("vit")).eval()
    assert tokens_of_the_mlp(labels, images()) == {37}


def test_watched_mergers_merge_in_the_last_block_and_others_do_not():
    model, calls = apply_dtem_merging(create("vit"), 7).eval(), []
    model.merger.embed[2].forward = lambda y: calls.append(y)
    model(images())
    assert not calls
    del model.merger.embed[2].forward
    model.merger.embed[2].register_forward_hook(lambda *_: calls.append(1))
    model(images())
    assert calls == [1]


@pytest.mark.parametrize("options", [{"drop_path_rate": 0.5}, {"proj_drop_rate": 0.5}])
def test_training_gives_the_bases_gradients(options):
    base = create("vit", **options).train()
    gradients = []
    for model in (TokenViT(base).train(), base):
        torch.manual_seed(0)
        F.cross_entropy(model(images(4)), torch.arange(4)).backward()
        gradients.append({name: p.grad.clone() for name, p in base.named_parameters()})
        base.zero_grad()
    torch.testing.assert_close(*gradients, atol=1e-6, rtol=1e-5)
    assert needs_prefix_alone(base) == ("drop_path_rate" in options)
