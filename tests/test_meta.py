"""Models made on the meta device, and in another type: nothing stays without values, and nothing is left to chance."""

import pytest
import timm
import torch
from families import MERGEABLE, create, images
from torch import nn

from timm_tokens import add_aux_tokens, apply_dtem_merging, token_label_head
from timm_tokens.wrap import add_mask_token

# those that differ in what their layers compute when they are made
FAMILIES = ("vit", "deit_distilled", "lvvit", "siglip_map", "prr", "eva", "dinov3", "rope_mixed", "naflex_rope")
OWN = ("deit_tiny_dtem", "vit_tiny_mte", "lvvit_t", "token_vit")
PARTS = dict(merger=dict(r=3), aux=dict(num_cls=2, num_pooled=2), head=dict(num_classes=7), mask_token=True)
TINY = dict(embed_dim=48, depth=2, num_heads=3, num_classes=5)


def close(a, b, tolerance=1e-5):
    torch.testing.assert_close(a, b, atol=tolerance, rtol=tolerance)


def with_all_parts(base):
    """A TokenViT with every part, whose weights are not those that it starts with."""
    model = add_mask_token(token_label_head(add_aux_tokens(apply_dtem_merging(base, r=4), 2, 2), 7))
    for parameter in model.parameters():
        if not parameter.is_meta:
            nn.init.normal_(parameter, std=0.1)
    return model.eval()


def meta_twin(family):
    with torch.device("meta"):
        return with_all_parts(MERGEABLE[family]())


def results(model, x):
    with torch.no_grad():
        return [model(x), *model(x, tokens=True), *model(x, dense=True)]


def spoil(model):
    """NaN in all that `to_empty` made, so that nothing passes that only happens to be finite."""
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.data.fill_(float("nan"))


def test_every_model_of_ours_is_made_on_meta_and_in_a_type():
    for name in OWN:
        for where in (dict(device="meta"), dict(dtype=torch.bfloat16), dict(device="meta", dtype=torch.float64)):
            options = PARTS if name == "token_vit" else {}
            model = timm.create_model(name, **TINY, **where, **options)
            for key, tensor in (*model.named_parameters(), *model.named_buffers()):
                assert tensor.is_meta == ("device" in where), (name, where, key)
                assert not tensor.is_floating_point() or tensor.dtype == where.get("dtype", torch.float32), (name, key)
        with torch.device("meta"):
            assert all(p.is_meta for p in timm.create_model(name, **TINY, **options).parameters())


@pytest.mark.parametrize("family", FAMILIES)
def test_whole_checkpoints_give_the_same_model(family):
    model, x = with_all_parts(create(family)), images()
    expected = results(model, x)
    assigned = meta_twin(family)
    assigned.load_state_dict(model.state_dict(), assign=True)
    close(results(assigned, x), expected)
    for outer in (False, True):  # the model itself, and as a part of another one
        emptied = nn.Sequential(meta_twin(family)) if outer else meta_twin(family)
        emptied.to_empty(device="cpu")
        spoil(emptied)
        emptied.load_state_dict((nn.Sequential(model) if outer else model).state_dict())
        close(results(emptied[0] if outer else emptied, x), expected)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("assign", [False, True])
def test_plain_checkpoints_leave_no_part_without_values(family, assign):
    base, model = create(family), meta_twin(family)
    if not assign:
        model.to_empty(device="cpu")
        spoil(model)
    model.load_state_dict(base.state_dict(), assign=assign)
    assert all(value.isfinite().all() for value in (*model.parameters(), *model.buffers()))
    for name, value in base.state_dict().items():
        assert torch.equal(model.base.state_dict()[name], value)
    started = apply_dtem_merging(base, r=4).merger.state_dict()  # as the keys of these weights
    for name, value in started.items():
        close(model.merger.state_dict()[name], value)
    assert model.mask_token.std() > 0.01 and model.aux.tokens.std() > 0.01 and model.head.tokens.weight.std() > 0.01
    assert all(result.isfinite().all() for result in results(model, images()))


def test_parts_with_values_keep_them():
    base, model = create("vit"), with_all_parts(create("vit"))
    kept = {name: value.clone() for name, value in model.state_dict().items() if not name.startswith("base.")}
    identities = {name: id(parameter) for name, parameter in model.named_parameters()}
    for assign in (False, True):
        assert model.load_state_dict(base.state_dict(), assign=assign) == ([], [])
        for name, value in kept.items():
            assert torch.equal(model.state_dict()[name], value)
            assert id(model.get_parameter(name)) == identities[name]


def test_part_of_a_head_that_a_published_checkpoint_has_is_kept():
    model, weights = meta_twin("lvvit"), create("lvvit").state_dict()
    published = torch.randn(7, 48), torch.randn(7)
    weights |= dict(zip(("aux_head.weight", "aux_head.bias"), published, strict=True))
    model.load_state_dict(weights, assign=True)
    assert torch.equal(model.head.tokens.weight, published[0]) and torch.equal(model.head.tokens.bias, published[1])
    assert model.head.cls.weight.isfinite().all() and not model.head.cls.bias.any()


def test_parts_follow_the_type_of_what_was_assigned():
    model = meta_twin("vit")
    model.load_state_dict(create("vit").bfloat16().state_dict(), assign=True)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.bfloat16}
    assert model(images().bfloat16()).dtype == torch.bfloat16


@pytest.mark.parametrize("family", FAMILIES)
def test_init_weights_sets_everything(family):
    model = meta_twin(family)
    model.to_empty(device="cpu")
    spoil(model)
    plain = {name for name, tensor in spoiled(create(family)).state_dict().items() if not tensor.isfinite().all()}
    model.init_weights()
    left = {name for name, tensor in model.state_dict().items() if not tensor.isfinite().all()}
    assert left == {f"base.{name}" for name in plain}  # timm leaves mixed rotary frequencies and Eva's pooling query


def spoiled(base):
    """A plain ViT after to_empty and timm's own init_weights."""
    spoil(base)
    base.init_weights()
    return base


def test_what_cannot_be_set_is_refused():
    model = meta_twin("vit")
    with torch.device("meta"):
        model.base.register_buffer("table", torch.zeros(3), persistent=False)
    with pytest.raises(RuntimeError, match=r"leaves base.table on the meta device; call model.to_empty"):
        model.load_state_dict(create("vit").state_dict(), assign=True)
