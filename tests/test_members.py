"""The members of timm's Vision Transformers on a TokenViT: each is the base's, honoured, or refused in words."""

import copy
import inspect
import pickle

import pytest
import timm
import torch
from families import DRIVABLE, MERGEABLE, create, images
from timm.models import Eva, VisionTransformer, VisionTransformerDistilled
from timm.models.naflexvit import NaFlexVit
from timm.task import TokenDistillationTask
from torch import nn

from timm_tokens import TokenViT, add_aux_tokens, apply_dtem_merging, token_label_head
from timm_tokens.wrap import add_mask_token

# What reads NaFlexVit's batches of patches, which a TokenViT does not take.
ONLY_AT_THE_BASE = {"prewarm_patch_interpolator", "supports_patch_interpolation", "use_key_only_attn_mask"}


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def masks(count):
    """What tokens may attend to: themselves, and some others at random; as a mask, as scores, and for each head."""
    generator = torch.Generator().manual_seed(3)
    seen = (torch.rand(count, count, generator=generator) < 0.4) | torch.eye(count, dtype=torch.bool)
    scores = torch.randn(2, 1, count, count, generator=generator)
    return seen, torch.zeros(count, count).masked_fill(~seen, float("-inf")), scores


@torch.no_grad()
def test_attention_masks_are_honoured_where_nothing_merges():
    x = images()
    for i, family in enumerate(DRIVABLE):
        base = create(family)
        models = [TokenViT(base), add_aux_tokens(base, 2, 0)]
        models += [apply_dtem_merging(base, r=0)] if family in MERGEABLE else []
        count = base.num_prefix_tokens + 36
        causal = torch.ones(count, count, dtype=torch.bool).tril()
        for model in models:
            model.eval().set_grad_checkpointing(model is not models[0])
            for mask in masks(count)[i % 3 :: 1 if family == "vit" else 3]:  # each kind with a third of the families
                features = base.forward_features(x, attn_mask=mask)
                assert not torch.allclose(features, base.forward_features(x), atol=1e-3), family
                close(model.forward_features(x, mask), features)
                close(model(x, attn_mask=mask), base.forward_head(features))
                close(model(x, tokens=True, attn_mask=mask, aux=False).patches, features[:, base.num_prefix_tokens :])
                options = dict(indices=[0], output_fmt="NLC", intermediates_only=True)
                theirs = base.forward_intermediates(x, attn_mask=mask, **options)
                close(model.forward_intermediates(x, attn_mask=mask, **options), theirs)
                close(model.get_intermediate_layers(x, [0], attn_mask=mask), theirs)
            features = base.forward_features(x, attn_mask=causal)
            close(model.forward_features(x, is_causal=True), features)
            close(model(x, is_causal=True), base.forward_head(features))
            final, _ = model.forward_intermediates(x, is_causal=True)
            close(final, features)


@torch.no_grad()
def test_attention_masks_are_refused_where_tokens_merge():
    x, mask = images(), torch.ones(37, 37, dtype=torch.bool).tril()
    model = apply_dtem_merging(create("vit"), r=[0, 4]).eval()
    for training in (False, True):
        model.train(training)
        for call in (model, model.forward_features, model.forward_intermediates):
            with pytest.raises(ValueError, match=r"attn_mask can't say .* block 1 merges 4; set model.merger.r = 0"):
                call(x, attn_mask=mask)
            with pytest.raises(ValueError, match="is_causal can't say what merged tokens"):
                call(x, is_causal=True)
    before = dict(indices=[0], stop_early=True, intermediates_only=True)  # block 0 merges nothing
    close(
        model.forward_intermediates(x, attn_mask=mask, **before),
        model.base.forward_intermediates(x, attn_mask=mask, **before),
    )
    with pytest.raises(ValueError, match="attn_mask or is_causal=True, not both"):
        model(x, attn_mask=mask, is_causal=True)
    with pytest.raises(ValueError, match="can't say what auxiliary tokens may attend to; call with aux=False"):
        add_aux_tokens(create("vit"))(x, tokens=True, attn_mask=mask)


@torch.no_grad()
def test_get_intermediate_layers_and_pool_are_timms():
    x = images()
    for family in MERGEABLE:
        base = create(family)
        model = apply_dtem_merging(base, r=0).eval()
        if hasattr(base, "get_intermediate_layers"):
            for options in (dict(n=2), dict(n=[0, 2], reshape=True, norm=True, return_prefix_tokens=True)):
                close(model.get_intermediate_layers(x, **options), base.get_intermediate_layers(x, **options))
        features = base.forward_features(x)
        if family != "deit_distilled":  # whose head pools by itself
            close(base.head(base.fc_norm(model.pool(features))), base(x))
        close(model.pool(features, "avg"), getattr(base, "pool", None or getattr(base, "_pool", None))(features, "avg"))
        merging = apply_dtem_merging(base, r=4).eval()
        assert [y.shape for y in merging.get_intermediate_layers(x, 2)] == [(2, 36, 48)] * 2


def test_every_public_member_is_there():
    """What timm has today, so that a member that it gets tomorrow is noticed."""
    known = set(dir(nn.Module))
    for family in MERGEABLE:
        base = create(family)
        model = TokenViT(base)
        public = {name for name in set(dir(base)) - known if not name.startswith("_")}
        missing = {name for name in public if not hasattr(model, name)}
        assert missing <= ONLY_AT_THE_BASE, (family, missing)
        for cls in (VisionTransformer, VisionTransformerDistilled, Eva, NaFlexVit):  # and none that it can't answer
            others = {name for name in set(dir(cls)) - known if not name.startswith("_") and name not in public}
            for name in others - {"pool", "get_intermediate_layers", "load_pretrained"}:
                assert not hasattr(model, name) or not callable(getattr(base, name, None)), (family, name)


def test_layers_of_the_base_are_read_and_set_there():
    base = create("vit")
    model = apply_dtem_merging(base, r=3)
    assert model.blocks is base.blocks and model.pos_embed is base.pos_embed and model.norm is base.norm
    names, keys = [name for name, _ in model.named_modules()], list(model.state_dict())
    model.fc_norm = nn.LayerNorm(48)
    model.pos_embed = nn.Parameter(torch.zeros(1, 37, 48))
    model.norm_pre = nn.Identity()
    model.attn_pool = None
    model.grad_checkpointing = True
    assert isinstance(base.fc_norm, nn.LayerNorm) and not base.pos_embed.any() and base.grad_checkpointing
    assert [name for name, _ in model.named_modules()] == names
    assert set(model.state_dict()) - set(keys) == {"base.fc_norm.weight", "base.fc_norm.bias"}
    with pytest.raises(TypeError, match=r"token-label head, got a Linear; .* model.reset_classifier\(num_classes\)"):
        model.head = nn.Linear(48, 3)
    with pytest.raises(AttributeError, match="num_classes"):
        model.num_classes = 3
    model.head = None
    model.blocks = model.blocks[:2]
    assert len(base.blocks) == 2 and model(images()).shape == (2, 5)


def test_members_are_those_that_can_be_had():
    for family in ("vit", "eva02", "naflex", "deit_distilled"):
        for model in (TokenViT(create(family)), token_label_head(apply_dtem_merging(create(family), r=3))):
            members = dict(inspect.getmembers(model))
            assert set(members) == set(dir(model))
            assert all(hasattr(model, name) for name in dir(model))
            assert ("set_input_size" in members) == hasattr(model.base, "set_input_size")
            assert ("set_distilled_training" in members) == (family == "deit_distilled")
            assert "model_args" not in members and "merger" in members
    assert "model_args" in dict(inspect.getmembers(timm.create_model("token_vit", base="test_vit")))


def test_distillation_by_a_token_is_for_distilled_models():
    with pytest.raises(ValueError, match="set_distilled_training"):
        TokenDistillationTask(apply_dtem_merging(create("vit"), r=3), create("vit"))
    model = token_label_head(create("deit_distilled"))
    with pytest.raises(ValueError, match="one set of logits; distil one without the head"):
        model.set_distilled_training()
    model.set_distilled_training(False)


def test_naflex_takes_images_of_any_size_without_being_told():
    model = apply_dtem_merging(create("naflex"), r=2)
    assert not hasattr(model, "set_input_size")
    assert not hasattr(model.base, "get_patch_size") or model.get_patch_size() == (8, 8)  # newer than timm 1.0.26
    assert model(torch.randn(1, 3, 64, 32)).shape == (1, 5)


@torch.no_grad()
def test_copies_load_and_compute_by_themselves(tmp_path):
    for family in ("vit", "naflex_rope", "lvvit"):
        model = token_label_head(add_aux_tokens(apply_dtem_merging(create(family), r=3), 2, 2)).eval()
        x, plain = images(), create(family).state_dict()
        expected = model(x)
        torch.save(model, tmp_path / "model.pt")
        copies = [
            copy.deepcopy(model),
            pickle.loads(pickle.dumps(model)),
            torch.load(tmp_path / "model.pt", weights_only=False),
        ]
        for twin in copies:
            assert list(twin.state_dict()) == list(model.state_dict())
            assert [n for n, _ in twin.named_parameters()] == [n for n, _ in model.named_parameters()]
            for parameter in twin.parameters():
                parameter.add_(1.0)
            twin.load_state_dict(plain)  # the hooks are the copy's own
            twin.load_state_dict(model.state_dict())
            close(twin(x), expected, 0)
        close(model(x), expected, 0)
        half = copy.deepcopy(model).bfloat16()
        assert {p.dtype for p in half.parameters()} == {torch.bfloat16} and half(x.bfloat16()).dtype == torch.bfloat16


def test_pruning_leaves_what_the_features_need():
    x = images()
    for family in MERGEABLE:
        if not hasattr(create(family), "prune_intermediate_layers"):  # NaFlexVit in timm 1.0.26
            continue
        model = add_mask_token(add_aux_tokens(token_label_head(apply_dtem_merging(create(family), r=3)), 2, 2)).eval()
        with torch.no_grad():
            whole, taps = model(x), model.forward_intermediates(x, intermediates_only=True)
            uncut = copy.deepcopy(model)
            uncut.prune_intermediate_layers([2], prune_head=False)
            close(uncut(x), whole)
        for i in range(3):
            pruned = copy.deepcopy(model)
            taken = pruned.prune_intermediate_layers([i], prune_norm=True)
            with torch.no_grad():
                (features,) = pruned.forward_intermediates(x, indices=taken, intermediates_only=True)
                close(features, taps[i])
                assert pruned(x).shape[-1] == 48 and pruned.num_classes == 0
            pruned.train().forward_features(x).sum().backward()
            assert not [name for name, parameter in pruned.named_parameters() if parameter.grad is None], (family, i)
